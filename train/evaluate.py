"""Exact evaluation over a whole set: every example counts once, whatever the batch size and the mesh."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlayers.kernels import dispatch
from jaxlayers.testing import EquivarianceCurve, Symmetry, equivariance_error
from train import mesh as meshes
from train.config import Batch, Task
from train.data import CORRUPT
from train.state import BoundModel

WEIGHT = "weight"
"""Batch field that is 1 for an example and 0 for the padding of the last batch."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result over a set.

    Attributes:
      metrics: means over the examples, with what `Task.finish` makes of them.
      confusion: counts `[truth, prediction]`, or `None`.
      examples: number of examples.
    """

    metrics: dict[str, float]
    confusion: np.ndarray | None
    examples: int


def evaluation_step(model: nn.Module, task: Task, kernels: str = "jnp") -> Callable[[Any, Any, Batch], dict[str, Any]]:
    """Return the function `(params, collections, batch) -> sums` over the examples of weight 1."""

    def step(params: Any, collections: Any, batch: Batch) -> dict[str, Any]:
        fields = dict(batch)
        weight = fields.pop(WEIGHT)
        fields.pop(CORRUPT, None)  # such examples have weight 0
        found = task.evaluate(BoundModel(model, params, collections), fields)
        # Padding may hold anything, so it is selected away: 0 * nan would be nan.
        sums = {name: jnp.sum(jnp.where(weight > 0, values, 0)) for name, values in found.metrics.items()}
        result: dict[str, Any] = {"sums": sums, "examples": jnp.sum(weight)}
        if task.num_classes and found.truth is not None and found.prediction is not None:
            truth = jax.nn.one_hot(found.truth, task.num_classes) * weight[:, None]
            prediction = jax.nn.one_hot(found.prediction, task.num_classes)
            result["confusion"] = jnp.einsum("bt,bp->tp", truth, prediction)
        return result

    return dispatch.using(step, kernels)


def jit_evaluation(step: Callable[..., dict[str, Any]], params: Any, collections: Any, mesh: Mesh) -> Any:
    """Return the jitted function of `compile_evaluation`, to be called or lowered under `mesh.use`."""
    places = jax.tree.map(lambda leaf: leaf.sharding, (params, collections))
    # The batch stays where it was put.
    return jax.jit(step, in_shardings=(*places, None), out_shardings=meshes.replicated(mesh))


def compile_evaluation(step: Callable[..., dict[str, Any]], params: Any, collections: Any, mesh: Mesh) -> Any:
    """Return `step` jitted over `mesh` for parameters and collections placed as the given (abstract) ones."""
    jitted = jit_evaluation(step, params, collections, mesh)

    def call(params: Any, collections: Any, batch: Batch) -> dict[str, Any]:
        with meshes.use(mesh):
            return jitted(params, collections, batch)

    return call


def metric_names(
    step: Callable[..., dict[str, Any]], params: Any, collections: Any, batch: Batch, task: Task
) -> list[str]:
    """Return the names of the metrics that an evaluation will give, without computing it."""
    sums = jax.eval_shape(step, params, collections, batch)["sums"]
    return sorted(sums if task.finish is None else task.finish(dict.fromkeys(sums, 1.0)))


def evaluate(
    step: Callable[[Any, Any, Batch], dict[str, Any]],
    params: Any,
    collections: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    task: Task,
    mesh: Mesh,
    stop: Callable[[], int] = lambda: 0,
) -> Evaluation | None:
    """Return the exact result over `batches`, or `None` when `stop()` became true on the way.

    Sums are taken per batch on the devices (float32) and over batches on the host (float64).

    Raises:
      ValueError: if there is no example.
    """
    totals: dict[str, Any] | None = None
    for batch in batches:
        if stop():
            return None
        sums = jax.device_get(step(params, collections, meshes.put_batch(batch, mesh)))
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    if totals is None or totals["examples"] == 0:
        raise ValueError("the test set has no examples; pass a source with at least one record")
    means = {name: float(total / totals["examples"]) for name, total in totals["sums"].items()}
    confusion = totals.get("confusion")
    return Evaluation(
        metrics=dict(means if task.finish is None else task.finish(means)),
        confusion=None if confusion is None else confusion.astype(np.int64),
        examples=int(totals["examples"]),
    )


def first_examples(batch: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Return the first `count` examples of an evaluation batch, without padding and weight."""
    real = np.flatnonzero(np.asarray(batch[WEIGHT]) > 0)[:count]
    return {name: np.asarray(rows)[real] for name, rows in batch.items() if name not in (WEIGHT, CORRUPT)}


def symmetry_curves(
    model: nn.Module,
    task: Task,
    params: Any,
    collections: Any,
    symmetries: Sequence[Symmetry],
    batch: Mapping[str, np.ndarray],
) -> dict[str, EquivarianceCurve]:
    """Return how far a trained model is from each symmetry, against the size of the group element.

    It runs on one device, in the model's own precision; `Task.logits` picks the output that is compared.
    """
    inputs = [np.asarray(x) for x in task.inputs(batch)]
    keywords: dict[str, Any] = {name: jnp.asarray(value) for name, value in task.keywords(batch).items()}

    @jax.jit
    def outputs(*given: Any) -> Any:
        return task.logits(BoundModel(model, params, collections)(*given, **keywords))

    def fn(*given: Any) -> Any:
        # The group acts in float64.
        return outputs(*(jnp.asarray(x, like.dtype) for x, like in zip(given, inputs, strict=True)))

    curves = {}
    for symmetry in symmetries:
        name = symmetry.group.name
        if name in curves:  # the same group, acting in another way
            name = f"{name} on {', '.join(str(representation) for representation in symmetry.inputs)}"
        curves[name] = equivariance_error(
            fn, symmetry.group, *inputs, representations=symmetry.inputs, output=symmetry.output
        )
    return curves
