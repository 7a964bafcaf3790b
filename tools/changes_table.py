"""Measure Swin UNETR and U-Nets on what changed between two scans in one volume, each trained from several seeds.

    python -m tools.changes_table

Reads the runs of `configs/swin_unetr_changes.py` in runs/swin_unetr_changes, one folder a seed, training first what is
not there, and writes docs/changes.md and docs/images/changes.png.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs import swin_unetr_changes as task
from tools.volumes_table import Predict, dice, picture, table, trained
from train.config import Config

DOCUMENT = """# Changes between two scans in one volume

    python -m tools.changes_table

Two scans of small bright spots lie one behind the other in one volume of {size} voxels. Half of the spots are in both,
the others in one alone, and a network labels each voxel as ground, of a lasting spot or of a changed one; simulator and
training are in `configs/swin_unetr_changes.py`. Which a spot is shows half a volume away and nowhere else, and within a
few voxels there. (Scans that are laid on each other as channels spare a network that.) Figures are Dice over all voxels
of {count} test volumes, the means over {seeds} seeds of parameters and of the order of the training volumes.

![A slice of volumes, their labels and what the networks find](images/changes.png)

{table}

Mean Dice of each seed, after {steps:,} steps of {batch} volumes with one optimiser:

{spread}

Each network with its parameters: {sizes}. {verdict} Thresholds that are told where the other scan is reach
{told:.3f}, naming every spot lasting {lasting:.3f}.

On the volumes of [another page](volumes.md), where what is far away need not be compared finely, Swin UNETR and U-Nets
come to the same Dice.
"""


def verdict(scores: Mapping[str, Sequence[float]]) -> str:
    """Return by how much the first network's mean over seeds leads or trails the best other one's, and the seeds'."""
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    first, *others = means
    best = max(others, key=lambda name: means[name])
    lead = means[first] - means[best]
    worst, top = min(scores[first]), max(max(scores[name]) for name in others)
    return (
        f"{first} is {abs(lead):.3f} {'above' if lead > 0 else 'below'} the best of the others, {best}; its worst seed "
        f"has {worst:.3f}, the best seed of any other {top:.3f}."
    )


def spread(scores: Mapping[str, Sequence[float]]) -> str:
    """Return a row of mean Dice for each network, a column for each seed."""
    count = len(next(iter(scores.values())))
    lines = ["|  | " + " | ".join(f"seed {seed}" for seed in range(count)) + " |", "| --- |" + " --- |" * count]
    lines += [f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for name, values in scores.items()]
    return "\n".join(lines)


def document(config: Config, folder: Path, docs: Path, *, seeds: int) -> str:
    """Write page and picture; return the page."""
    source: Any = config.test_data
    found: dict[str, list[list[float]]] = {}
    sizes: dict[str, int] = {}
    shown: Mapping[str, Predict] = {}
    for seed in range(seeds):
        networks = trained(dataclasses.replace(config, seed=seed), folder / f"seed_{seed}")
        for name, (run, size) in networks.items():
            found.setdefault(name, []).append(dice(run, source, len(task.CLASSES)))
            sizes[name] = size
        shown = shown or {name: run for name, (run, _) in networks.items()}
    scores = {name: [float(np.mean(one)) for one in values] for name, values in found.items()}
    baselines = task.baselines()
    page = DOCUMENT.format(
        size=" x ".join(map(str, task.SIZE)),
        count=len(source),
        seeds=seeds,
        table=table({name: np.mean(values, axis=0).tolist() for name, values in found.items()}, task.CLASSES),
        steps=config.steps,
        batch=config.batch_size,
        spread=spread(scores),
        sizes=", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        verdict=verdict(scores),
        told=baselines["compared by thresholds mean_dice"],
        lasting=baselines["all lasting mean_dice"],
    )
    (docs / "images").mkdir(parents=True, exist_ok=True)
    (docs / "changes.md").write_text(page)
    # Across the second axis, so that both scans are seen, the line between them.
    figure = picture(shown, source, min(3, len(source)), axis=1, least=2, classes=len(task.CLASSES), width=0.9)
    for panel in figure.axes:
        panel.axhline(task.SIZE[0] / 2 - 0.5, color="red", linewidth=0.8)
    figure.savefig(docs / "images" / "changes.png", dpi=100)
    return page


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, write, print and return the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.changes_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/swin_unetr_changes"), help="folder of the trainings")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="the config's small form")
    options = parser.parse_args(arguments)
    page = document(task.config(options.smoke), options.run, options.docs, seeds=options.seeds)
    print(page)
    return page


if __name__ == "__main__":
    main()
