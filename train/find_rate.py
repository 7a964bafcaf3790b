"""The learning-rate range test: how the loss answers to a rate that rises from step to step (Smith, 2017)."""

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import mesh as meshes
from train import step as steps
from train.config import Config
from train.loop import close, first_state, prepare

DIVERGED = 4.0
"""The test ends once the smoothed loss is so many times its smallest value above it."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What `find_rate` measured.

    Attributes:
      rates: learning rate of each step.
      losses: loss of each step, before its update.
      smoothed: exponentially averaged losses.
      suggestion: the rate at which the smoothed loss falls fastest per factor of the rate.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float


def find_rate(
    config: Config,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    count: int = 100,
    devices: Sequence[jax.Device] | None = None,
) -> Rates:
    """Train a fresh model for `count` steps while the rate rises geometrically, and suggest a learning rate.

    Nothing is saved. The suggestion is a peak for a schedule with warmup; it is a rule of thumb, not an optimum.

    Args:
      config: the run; its schedule and number of steps are replaced.
      lowest: the first rate.
      highest: the last one.
      count: steps, at least 10.
      devices: as for `train.loop.train`.

    Raises:
      ValueError: on a range or count that cannot work.
    """
    if not 0 < lowest < highest or count < 10:
        raise ValueError(
            f"lowest={lowest}, highest={highest}, count={count} must rise from above 0 in at least 10 steps; set them"
        )
    rates = lowest * (highest / lowest) ** (np.arange(count) / (count - 1))
    factor = math.log(highest / lowest) / (count - 1)

    def rising(total: int) -> Callable[[Any], Any]:
        del total
        return lambda step: lowest * jax.numpy.exp(factor * step)

    tested = dataclasses.replace(
        config,
        steps=count,
        optim=dataclasses.replace(config.optim, learning_rate=1.0, schedule=rising, warmup_steps=0),
        test_data=None,
        metric=None,
        early_stop=None,
        on_nonfinite="stop",
    )
    plan = prepare(tested, devices)
    state = first_state(plan)
    example = steps.abstract(plan.example, meshes.batch_shardings(plan.example, plan.mesh))
    step = steps.compile_step(
        plan.train_step, plan.abstract, example, plan.mesh, sequence_parallel=config.mesh.sequence_parallel
    )
    batches = plan.train_batches(0)
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    for _ in range(count):
        state, metrics = step(state, meshes.put_batch(next(batches), plan.mesh))
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            break
        average = 0.9 * average + 0.1 * loss
        losses.append(loss)
        smoothed.append(average / (1 - 0.9 ** len(losses)))
        floor = min(smoothed)
        if len(losses) > 10 and smoothed[-1] - floor > DIVERGED * max(smoothed[0] - floor, abs(floor)):
            break
    close(batches)
    if len(losses) < 3:
        raise ValueError(f"the loss is not finite at a rate of {rates[len(losses)]:.2g}; set a smaller lowest rate")
    kept = rates[: len(losses)]
    slope = np.gradient(np.asarray(smoothed), np.log(kept))
    best = int(np.argmin(smoothed))  # beyond its minimum the curve only rises
    return Rates(kept, np.asarray(losses), np.asarray(smoothed), float(kept[int(np.argmin(slope[: best + 1]))]))


def write(found: Rates, folder: Path) -> Path:
    """Write `learning_rate.csv` and `learning_rate.png`; return the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "learning_rate.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("rate", "loss", "smoothed"))
        writer.writerows(zip(found.rates, found.losses, found.smoothed, strict=True))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(found.rates, found.losses, alpha=0.3, label="loss")
    axes.plot(found.rates, found.smoothed, label="smoothed")
    axes.axvline(found.suggestion, linestyle="--", color="black", label=f"suggestion {found.suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.legend()
    path = folder / "learning_rate.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
