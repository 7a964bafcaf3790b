"""One optimiser step as a pure function, and its compilation over a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from train import mesh as meshes
from train.config import Batch, Task
from train.state import KEYS, BoundModel, TrainState

STOP = "stop"
"""Batch field by which several processes agree to stop: each sends its wish, all read the largest one step later."""

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def train_step(
    model: nn.Module, task: Task, transform: optax.GradientTransformation, learning_rate: optax.Schedule
) -> Step:
    """Return the function `(state, batch) -> (state, metrics)`.

    The key of a step is the run's key folded with the step's number, so a resumed run draws what the uninterrupted
    one drew. `metrics` holds the mean loss, the task's own means, the gradient norm before clipping and the learning
    rate, as scalars.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        fields = dict(batch)
        stop = fields.pop(STOP, None)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=KEYS), state.step)
        model_key, loss_key = jax.random.split(key)

        def objective(params: Any) -> tuple[jax.Array, tuple[Mapping[str, jax.Array], Mapping[str, Any]]]:
            apply = BoundModel(model, params, state.collections, model_key)
            losses, measured = task.loss(apply, fields, loss_key)
            means = {name: jnp.mean(values) for name, values in measured.items()}
            return jnp.mean(losses), (means, apply.collections)

        (loss, (means, collections)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        metrics = {
            **means,
            "loss": loss,
            "gradient_norm": optax.global_norm(gradients),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        if stop is not None:
            metrics[STOP] = jnp.max(stop)
        return (
            dataclasses.replace(
                state,
                step=state.step + 1,
                params=optax.apply_updates(state.params, updates),
                opt_state=opt_state,
                collections=collections,
            ),
            metrics,
        )

    return step


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the shapes and dtypes of `tree` with `shardings` (one, or a tree of them)."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def compile_step(step: Step, state: Any, batch: Any, mesh: Mesh) -> Any:
    """Return `step` compiled for abstract `state` and `batch` (which carry shardings); the state is donated."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(
        step,
        in_shardings=(shardings, meshes.batch_sharding(mesh)),
        out_shardings=(shardings, meshes.replicated(mesh)),
        donate_argnums=0,
    )
    with meshes.use(mesh):
        return jitted.lower(state, batch).compile()
