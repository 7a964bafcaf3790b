"""What a run carries from step to step, and the model as a task sees it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from train.config import Batch, Task

KEYS = "threefry2x32"
"""Key implementation: counter-based, so the draws of an array do not depend on how it is split over devices."""


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint needs to continue bitwise; all leaves are arrays on the mesh.

    Attributes:
      step: number of optimiser steps done.
      params: the model's parameters.
      opt_state: the optimiser's moments and counters.
      rng: data of the key that each step folds its number into.
      collections: variable collections besides `params` (running statistics), by name.
      ema: the average of the parameters over the steps, or `None`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    collections: Mapping[str, Any]
    ema: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluation takes: the average where there is one."""
        return self.params if self.ema is None else self.ema


def creator(
    model: nn.Module, task: Task, transform: optax.GradientTransformation, seed: int, *, ema: bool = False
) -> Callable[[Batch], TrainState]:
    """Return the pure function of one batch that makes the first state.

    It is jitted with the shardings of the result, so that no array is ever whole on one device; the forward pass
    inside is dropped by the compiler unless the initialisation depends on the data.
    """

    def create(batch: Batch) -> TrainState:
        init_key, step_key = jax.random.split(jax.random.key(seed, impl=KEYS))
        mode = _mode(model, "__call__", deterministic=True)
        variables = model.init({"params": init_key}, *task.inputs(batch), **task.keywords(batch), **mode)
        collections = {name: tree for name, tree in variables.items() if name != "params"}
        params = variables.get("params", {})
        if isinstance(task.loss, Mapping) and set(task.loss) != set(params):
            raise ValueError(
                f"the losses of a game, {sorted(task.loss)}, must be those of the parameters {sorted(params)} of "
                f"{type(model).__name__}; name its submodules as the players"
            )
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=transform.init(params),
            rng=jax.random.key_data(step_key),
            collections=collections,
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )

    return create


class BoundModel:
    """The `apply` that a task calls: variables, RNG streams and `deterministic` are bound.

    `method="name"` calls another method of the model than `__call__`.

    With `key` it is in training: dropout is on, every RNG stream that the model asks for comes from the key, and
    updates of `collections` are kept in the attribute of that name, from one call to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        collections: Mapping[str, Any],
        key: Any = None,
        recompute: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> None:
        self.collections = dict(collections)
        self._model, self._params, self._key, self._calls = model, params, key, 0
        self._recompute = recompute

    def __call__(self, *inputs: Any, method: str = "__call__", **keywords: Any) -> Any:
        """Return the model's output."""
        if self._key is None:
            variables = {"params": self._params, **self.collections}
            mode = _mode(self._model, method, deterministic=True)
            return self._model.apply(variables, *inputs, **mode, **keywords, method=method)
        # Flax serves a stream that is not listed ("dropout", "drop_path", ...) from "params".
        rngs = {"params": jax.random.fold_in(self._key, self._calls)}
        self._calls += 1
        mode = _mode(self._model, method, deterministic=False)

        @self._recompute
        def forward(params: Any, collections: Any, *arrays: Any) -> Any:
            variables = {"params": params, **collections}
            return self._model.apply(
                variables, *arrays, rngs=rngs, mutable=list(collections), **mode, **keywords, method=method
            )

        outputs, updates = forward(self._params, self.collections, *inputs)
        self.collections |= updates
        return outputs


def _mode(model: nn.Module, method: str, *, deterministic: bool) -> dict[str, Any]:
    takes = "deterministic" in inspect.signature(getattr(type(model), method)).parameters
    return {"deterministic": deterministic} if takes else {}
