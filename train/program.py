"""What a config computes on a mesh, from the shapes of a batch alone: neither data nor devices that can run it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from train import evaluate, optim
from train import mesh as meshes
from train import state as states
from train import step as steps
from train.config import Batch, Config


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run, not yet compiled.

    Attributes:
      abstract: shapes of the state, with the shardings that the mesh gives them.
      create: makes the first state from a batch.
      train_step: `(state, batch) -> (state, metrics)`.
      evaluation_step: `(params, collections, batch) -> sums`.
    """

    abstract: states.TrainState
    create: Callable[[Batch], states.TrainState]
    train_step: steps.Step
    evaluation_step: Callable[[Any, Any, Batch], dict[str, Any]]


def check_sizes(config: Config, mesh: Mesh) -> None:
    """Refuse batches that do not divide over the mesh.

    Raises:
      ValueError: naming the size, and those above and below that would do.
    """
    meshes.check_batch_size("batch_size", config.batch_size, mesh)
    if config.accumulate > 1:
        if config.batch_size % config.accumulate:
            raise ValueError(
                f"batch_size={config.batch_size} must be divisible by accumulate={config.accumulate}; set either"
            )
        meshes.check_batch_size("batch_size / accumulate", config.batch_size // config.accumulate, mesh)
    if config.eval_batch_size is not None:
        meshes.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)


def build(config: Config, mesh: Mesh, example: Mapping[str, Any]) -> Program:
    """Return the program of a config.

    Args:
      config: the run.
      mesh: its devices, which need not be there: those of a topology do.
      example: a training batch, or the shapes of one.

    Raises:
      ValueError: on settings of the optimiser that cannot work, or whatever the model refuses about its inputs.
    """
    transform, learning_rate = optim.build(config.optim, config.steps)
    create = states.creator(config.model, config.task, transform, config.seed, ema=config.ema_decay is not None)
    with meshes.use(mesh):
        shapes = jax.eval_shape(create, example)
    return Program(
        abstract=steps.abstract(shapes, meshes.shardings(shapes, mesh, config.mesh.rules)),
        create=create,
        train_step=steps.train_step(config, transform, learning_rate),
        evaluation_step=evaluate.evaluation_step(config.model, config.task, config.kernels),
    )
