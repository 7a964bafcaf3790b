"""Recall stored digits from corrupted ones in a memory without parameters: a table, and pictures before and after.

Command:  python -m tools.hopfield_recall
Expected: of 50 stored digits 0.96 come back exactly when half of one is covered (the nearest by pixels: 0.72), 0.96
          under noise (0.94), 0.46 under both (0.40), at beta = 128; of 1,198 digits, many of which are alike, 0.58
          (0.35), 0.82 (0.82) and 0.11 (0.09), at beta = 512. At beta = 8 all states end in one average, at 32 in
          averages of a few digits. Ten seconds of processor time.

Patterns are digits with mean 0 and norm 1; each starts from a corrupted one and is updated until it settles. Exactly =
within 0.01 of the pattern that was corrupted. A large beta gives the pattern of largest product with the corrupted one.
A covered half is grey, the mean of all pixels; covered in black, the ground of the digits, 0.09 of the 1,198 come back,
for every beta of 256 and more and as the nearest pattern.

`python -m tools.hopfield_recall RUN`, with RUN the working directory of a run of `configs/hopfield_recall_digits.py`,
also draws what the trained memory makes of held-out digits.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs.hopfield_recall_digits import KINDS, Kind, config, corruptions, pictures
from jaxlayers.hopfield import hopfield
from train import checkpoint

STORED = (50, 1198)
BETAS = (8.0, 32.0, 128.0, 512.0)
UPDATE_STEPS, TOLERANCE = 100, 1e-5
EXACT = 0.01
SHOWN = ((0, 1, 2, 5, 6, 13), (0, 1, 2, 3, 4, 5))
"""Digits that are drawn: six classes of those stored, and of those held out."""


class Recall(NamedTuple):
    """What a way of recalling gives for all stored digits, corrupted.

    Attributes:
      found: recalled patterns `[stored, 64]`.
      exact: share of them within `EXACT` of the pattern that was corrupted, whose norm is 1.
      error: mean distance to that pattern.
      steps: mean number of updates.
    """

    found: np.ndarray
    exact: float
    error: float
    steps: float


def standardised(pictures: np.ndarray) -> np.ndarray:
    """Return pictures with mean 0 and norm 1, so that the largest product belongs to the nearest."""
    centred = pictures - pictures.mean(axis=-1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=-1, keepdims=True)


def recall(kind: Kind, count: int, beta: float) -> Recall:
    """Return what each of the first `count` training digits, corrupted, settles on in a memory that holds these."""
    stored, start = standardised(pictures("train")[:count]), standardised(corruptions("train", kind)[:count])
    settled = settle(jnp.asarray(start), jnp.asarray(stored), jnp.asarray(beta))
    return measured(np.asarray(settled.state), stored, float(np.mean(settled.steps)))


def nearest(kind: Kind, count: int) -> Recall:
    """Return the stored digits whose pixels are nearest to those of the corrupted ones."""
    clean, given = pictures("train")[:count], corruptions("train", kind)[:count]
    squares = np.square(clean).sum(axis=-1) - 2 * given @ clean.T
    stored = standardised(clean)
    return measured(stored[np.argmin(squares, axis=-1)], stored, 0.0)


@jax.jit
def settle(start: jax.Array, stored: jax.Array, beta: jax.Array) -> hopfield.Retrieval:
    """Return the fixed point that each state runs into."""
    return hopfield.retrieve(start, stored, beta=beta, update_steps=UPDATE_STEPS, tolerance=TOLERANCE)


def measured(found: np.ndarray, wanted: np.ndarray, steps: float) -> Recall:
    """Return a `Recall` of the patterns that were found."""
    distance = np.linalg.norm(found - wanted, axis=-1)
    return Recall(found, float(np.mean(distance <= EXACT)), float(np.mean(distance)), steps)


def table() -> str:
    """Return, for each memory, corruption and beta, the share recalled exactly, the mean error and the updates."""
    lines = ["stored  corrupted by     beta     exact     error   updates"]
    for count in STORED:
        for kind in KINDS:
            rows = {f"{beta:g}": recall(kind, count, beta) for beta in BETAS}
            rows["nearest"] = nearest(kind, count)
            for name, row in rows.items():
                lines.append(f"{count:6}  {kind:12} {name:>8} {row.exact:9.3f} {row.error:9.3f} {row.steps:9.1f}")
    return "\n".join(lines)


def restored(run: str | Path) -> dict[str, np.ndarray]:
    """Return what the trained memory of a run makes of each kind of corrupted test picture.

    Raises:
      ValueError: if the run has no intact checkpoint of this model.
    """
    model = config().model
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    step = checkpoint.find_step(run)[0]
    leaves = {
        name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.float32, sharding=place)
        for name, leaf in step.leaves.items()
        if name.startswith("params/")
    }
    arrays = step.read(leaves)
    params = unflatten_dict({tuple(name.split("/")[1:]): array for name, array in arrays.items()})
    none = jnp.full(len(pictures("test")), -1)
    apply = jax.jit(lambda given: model.apply({"params": params}, given, own=none))
    return {kind: np.asarray(apply(jnp.asarray(corruptions("test", kind)))) for kind in KINDS}


def draw(trained: Mapping[str, np.ndarray] | None) -> Figure:
    """Return pictures of stored digits before and after recall and, if there is a run, of held-out ones restored."""
    count = STORED[0]
    stored: dict[str, dict[str, np.ndarray]] = {}
    held_out: dict[str, dict[str, np.ndarray]] = {}
    for kind, title in zip(KINDS, ("half covered", "under noise", "both"), strict=True):
        rows = {"corrupted": standardised(corruptions("train", kind)[:count])}
        rows |= {f"recalled, beta = {beta:g}": recall(kind, count, beta).found for beta in BETAS[:3]}
        stored[f"stored digits, {title}"] = rows | {"stored": standardised(pictures("train")[:count])}
        if trained is not None:
            rows = {"corrupted": corruptions("test", kind), "restored": trained[kind], "original": pictures("test")}
            held_out[f"held-out digits, {title}"] = rows
    blocks = [block for block in (stored, held_out) if block]
    heights = [len(next(iter(block.values()))) for block in blocks]
    figure = Figure(figsize=(10.5, 0.42 * sum(heights) + 0.4 * len(blocks)), layout="constrained")
    panels = figure.subplots(len(blocks), len(KINDS), squeeze=False, height_ratios=heights)
    for axes, block, digits in zip(panels, blocks, SHOWN, strict=False):
        for axis, (title, rows) in zip(axes, block.items(), strict=True):
            # One scale for all rows, so that averages look as faint as they are.
            picture = np.full((9 * len(rows) - 1, 9 * len(digits) - 1), np.nan)
            for place, row in enumerate(rows.values()):
                for column, digit in enumerate(row[np.asarray(digits)]):
                    picture[9 * place : 9 * place + 8, 9 * column : 9 * column + 8] = digit.reshape(8, 8)
            last = list(rows.values())[-1][np.asarray(digits)]
            axis.imshow(picture, cmap="magma", vmin=last.min(), vmax=last.max())
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            labels = list(rows) if axis is axes[0] else [""] * len(rows)
            axis.set_yticks(9 * np.arange(len(rows)) + 3.5, labels, fontsize=8)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and draw the picture; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.hopfield_recall", description=main.__doc__)
    parser.add_argument("run", nargs="?", help="a run of configs/hopfield_recall_digits.py to draw too")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/hopfield_recall_digits.png"))
    options = parser.parse_args(arguments)
    try:
        trained = None if options.run is None else restored(options.run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table())
    figure = draw(trained)
    FigureCanvasAgg(figure)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=80)
    print(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
