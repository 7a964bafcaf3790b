"""One optimiser step as a pure function, and its compilation over a mesh."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxlayers.core import remat
from jaxlayers.kernels import dispatch
from train import data, optim
from train import mesh as meshes
from train.config import Batch, Config, Loss
from train.state import KEYS, BoundModel, TrainState

STOP = "stop"
"""Batch field by which several processes agree to stop: each sends its wish, all read the largest one step later."""

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Differentiated = tuple[Any, dict[str, jax.Array], Mapping[str, Any]]


def train_step(config: Config, transform: optax.GradientTransformation, learning_rate: optax.Schedule) -> Step:
    """Return the function `(state, batch) -> (state, metrics)`.

    The key of a step is the run's key folded with the step's number, so a resumed run draws what the uninterrupted
    one drew. `metrics` holds the mean loss, the task's own means, the gradient norm before clipping and the learning
    rate, as scalars; with `on_nonfinite="skip"` also `skipped`, 1 where the state stayed as it was.
    """
    model, recompute = remat.of_model(config.model, config.remat)

    def differentiate(params: Any, collections: Any, fields: Batch, keys: Sequence[Any]) -> Differentiated:
        """Return the gradient of every parameter, the means to log, and the collections afterwards."""
        model_key, loss_key = keys

        def objective(loss: Loss, trained: Any, whole: Callable[[Any], Any], collections: Any) -> Any:
            apply = BoundModel(model, whole(trained), collections, model_key, recompute)
            losses, measured = loss(apply, fields, loss_key)
            means = {name: jnp.mean(values) for name, values in measured.items()}
            return jnp.mean(losses), (means, apply.collections)

        gradient = jax.value_and_grad(objective, argnums=1, has_aux=True)
        if not isinstance(config.task.loss, Mapping):
            fixed = optim.frozen(config.optim, params)  # what is not trained costs no gradient
            still = lambda tree: jax.tree.map(lambda x, off: jax.lax.stop_gradient(x) if off else x, tree, fixed)  # noqa: E731
            (loss, (means, collections)), gradients = gradient(config.task.loss, params, still, collections)
            return gradients, {**means, "loss": loss}, collections
        gradients, metrics = {}, {"loss": jnp.zeros((), jnp.float32)}
        for player, loss_of in config.task.loss.items():
            with_others = lambda own, player=player: {**params, player: own}  # noqa: E731
            (loss, (means, collections)), gradients[player] = gradient(
                loss_of, params[player], with_others, collections
            )
            metrics |= {**means, f"{player}_loss": loss, "loss": metrics["loss"] + loss}
        return gradients, metrics, collections

    def accumulate(params: Any, collections: Any, fields: Batch, keys: Sequence[Any]) -> Differentiated:
        """Return the mean over equal pieces of the batch, taken one after the other."""
        count = config.accumulate
        if count == 1:
            return differentiate(params, collections, fields, keys)

        def pieces(x: jax.Array) -> jax.Array:
            # Every count-th row, so that each device cuts its own rows and none travels.
            cut = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
            return jax.lax.with_sharding_constraint(cut, PartitionSpec(None, meshes.BATCH_AXES))

        def body(carry: Any, piece: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            total, collections = carry
            number, fields = piece
            gradients, metrics, collections = differentiate(
                params, collections, fields, [jax.random.fold_in(key, number) for key in keys]
            )
            return (jax.tree.map(jnp.add, total, (gradients, metrics)), collections), None

        cut = jax.tree.map(pieces, fields)
        first = jax.tree.map(lambda x: x[0], cut)
        shapes = jax.eval_shape(differentiate, params, collections, first, keys)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[:2])
        (total, collections), _ = jax.lax.scan(body, (zeros, collections), (jnp.arange(count), cut))
        return *jax.tree.map(lambda x: x / count, total), collections

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        fields = dict(batch)
        stop, corrupt = fields.pop(STOP, None), fields.pop(data.CORRUPT, None)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=KEYS), state.step)
        if config.batch_transform is not None:
            fields = dict(config.batch_transform(fields, jax.random.fold_in(key, MIX)))
        gradients, metrics, collections = accumulate(
            state.params, state.collections, fields, tuple(jax.random.split(key))
        )
        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            collections=collections,
            ema=None if state.ema is None else _averaged(config.ema_decay, state, params),
        )
        if config.on_nonfinite == "skip":
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
            new = dataclasses.replace(new, step=state.step + 1)  # the next step draws other numbers
            metrics["skipped"] = 1.0 - finite
        if stop is not None:
            metrics[STOP] = jnp.max(stop)
        if corrupt is not None:
            metrics["corrupt_records"] = jnp.sum(corrupt)
        return new, metrics

    return dispatch.using(step, config.kernels)


MIX = 1 << 20
"""What the key of a step is folded with for `batch_transform`, apart from the streams of the model and the loss."""


def _averaged(decay: float | None, state: TrainState, params: Any) -> Any:
    """Return the moving average after a step; its memory grows to `1 / (1 - decay)` steps with the run's length."""
    done = state.step.astype(jnp.float32)
    keep = jnp.minimum(decay or 0.0, (1 + done) / (10 + done))
    return optax.incremental_update(params, state.ema, 1 - keep)


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the shapes and dtypes of `tree` with `shardings` (one, or a tree of them)."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def compile_step(step: Step, state: Any, batch: Any, mesh: Mesh, *, sequence_parallel: bool = False) -> Any:
    """Return `step` compiled for abstract `state` and `batch` (which carry shardings); the state is donated.

    With `sequence_parallel` what lies between the tensor-parallel products is split along tokens too.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(
        step,
        in_shardings=(shardings, jax.tree.map(lambda leaf: leaf.sharding, batch)),
        out_shardings=(shardings, meshes.replicated(mesh)),
        donate_argnums=0,
    )
    with meshes.use(mesh, sequence_parallel=sequence_parallel):
        return jitted.lower(state, batch).compile()
