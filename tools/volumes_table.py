"""Measure Swin UNETR on simulated volumes: each class, whole volumes against patches, sizes that are no multiples.

    python -m tools.volumes_table

Reads the run of `configs/swin_unetr_volumes.py` in runs/swin_unetr_volumes, training first what is not there, and
writes docs/volumes.md and docs/images/volumes.png.
"""

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs import swin_unetr_volumes as task
from jaxlayers.ops.sliding_window import sliding_window
from jaxlayers.window.swin_unetr import SwinUNETR
from train import loop
from train.config import Config
from train.data import Source

Predict = Callable[[jax.Array], jax.Array]
LARGE = (44, 38, 30)

MEMORY = SwinUNETR(embed_dim=12)


def memory(policy: str, size: int, model: SwinUNETR = MEMORY) -> float:
    """Return the GiB that one training step on one volume holds besides parameters and input, as compiled for here."""
    x = jax.ShapeDtypeStruct((1, size, size, size, 1), jnp.float32)
    model = model.clone(remat=policy)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(model.apply({"params": params}, x)))  # type: ignore[arg-type]

    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    analysis = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile().memory_analysis()
    assert analysis is not None, "this backend does not say"
    return analysis.temp_size_in_bytes / 2**30


def trained(config: Config, folder: Path) -> dict[str, tuple[Predict, int]]:
    """Return each trained network as a function from volumes to logits, with its number of parameters."""
    found: dict[str, tuple[Predict, int]] = {}
    places = {"Swin UNETR": (config.model, folder)}
    places |= {
        name: (model, folder / "rivals" / re.sub(r"[^\w.-]+", "_", name)) for name, model in config.rivals.items()
    }
    for name, (model, place) in places.items():
        print(f"{name}: {place}", file=sys.stderr, flush=True)
        # Just as `python -m train` has them, so that what is trained is not trained again.
        alone = dataclasses.replace(config, model=model, rivals={}, baselines=None, extra_tests={})
        params = loop.train(alone, place, devices=jax.devices()[:1], silent=True).state.evaluated
        found[name] = (
            jax.jit(functools.partial(model.apply, {"params": params})),
            sum(leaf.size for leaf in jax.tree.leaves(params)),
        )
    return found


def windowed(predict: Predict) -> Predict:
    """Return the function that runs `predict` on overlapping patches of the size that it was trained on."""
    return jax.jit(lambda x: sliding_window(predict, x, task.SIZE, overlap=0.5, batch=4))


def dice(predict: Predict, source: Source, classes: int = len(task.CLASSES)) -> list[float]:
    """Return the Dice of each class over all voxels of a source."""
    overlap, size = np.zeros(classes), np.zeros(classes)
    for index in range(len(source)):
        record: Mapping[str, Any] = source[index]
        prediction = np.argmax(np.asarray(predict(jnp.asarray(record["image"][None])))[0], axis=-1)
        for each in range(classes):
            there, found = record["label"] == each, prediction == each
            overlap[each] += 2 * np.sum(there & found)
            size[each] += np.sum(there) + np.sum(found)
    return [float(value) for value in overlap / np.maximum(size, 1)]


def table(rows: Mapping[str, Sequence[float]], classes: Sequence[str] = task.CLASSES) -> str:
    """Return rows of Dice as a Markdown table, the mean last."""
    lines = [f"|  | {' | '.join(classes)} | mean |", "| --- |" + " --- |" * (len(classes) + 1)]
    for name, values in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*values, np.mean(values))) + " |")
    return "\n".join(lines)


def picture(
    networks: Mapping[str, Predict],
    source: Source,
    count: int,
    *,
    axis: int = 0,
    least: int = 1,
    classes: int = len(task.CLASSES),
    width: float = 1.7,
) -> Figure:
    """Return a slice of some volumes: image, truth, what each network finds.

    Args:
      networks: the functions from volumes to logits, by name.
      source: of the volumes.
      count: rows of the picture, each of a volume.
      axis: across which volumes are cut, where most voxels are of class `least` or one after it.
      least: see `axis`.
      classes: number of classes.
      width: of a slice, in inches.
    """
    columns = ("image", "truth", *networks)
    high, wide = (length for index, length in enumerate(source[0]["label"].shape) if index != axis)
    figure = Figure(figsize=(width * len(columns), (width * high / wide + 0.1) * count), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(count, len(columns), squeeze=False)
    for row in range(count):
        record: Mapping[str, Any] = source[row]
        found = np.sum(record["label"] >= least, axis=tuple({0, 1, 2} - {axis}))
        best = int(np.argmax(found))
        image = jnp.asarray(record["image"][None])
        labels = [record["label"], *(np.argmax(np.asarray(run(image))[0], axis=-1) for run in networks.values())]
        grid[row, 0].imshow(np.take(record["image"][..., 0], best, axis), cmap="gray", vmin=0, vmax=1.4)
        for panel, label in zip(grid[row, 1:], labels, strict=True):
            cut = np.take(label, best, axis)
            panel.imshow(cut, cmap="viridis", vmin=0, vmax=classes - 1, interpolation="nearest")
        for panel, title in zip(grid[row], columns, strict=True):
            panel.set_axis_off()
            if row == 0:
                panel.set_title(title, fontsize=8)
    return figure


def document(config: Config, folder: Path, docs: Path, *, count: int = 20, side: int = 96) -> str:
    """Write page and picture; return the page."""
    networks = trained(config, folder)
    assert config.test_data is not None
    same: Any = config.test_data
    others = {
        "no multiple of the stride": task.volumes(count, seed=2, size=task.OTHER_SIZE),
        "larger than in training": task.volumes(count, seed=3, size=LARGE),
    }
    found = {name: dice(run, same) for name, (run, _) in networks.items()}
    means = {name: float(np.mean(values)) for name, values in found.items()}
    order = sorted(means, key=lambda name: -means[name])
    sections = [
        "# Swin UNETR on simulated volumes",
        "    python -m tools.volumes_table",
        "Two organs of one brightness, which only a small capsule on one side of the body tells apart, and a tumour of "
        "two parts inside one of them, under a gain of a factor of two, blur and noise; the simulator and the training "
        "are in `configs/swin_unetr_volumes.py`. Capsule, rim and core are drawn larger and more distinct than in "
        "earlier forms of this page, whose figures do not compare with these. Figures are Dice over all "
        "voxels of a test set.",
        "![A slice of volumes, their labels and what the networks find](images/volumes.png)",
        f"## {len(same)} test volumes of {_times(task.SIZE)} voxels",
        table({f"{name} ({size:,} parameters)": found[name] for name, (_, size) in networks.items()}),
        f"By mean Dice: {', '.join(f'{name} {means[name]:.3f}' for name in order)}, each after {config.steps:,} steps "
        f"of {config.batch_size} volumes with one optimiser.",
    ]
    for title, source in others.items():
        size = source[0]["label"].shape
        scores: dict[str, list[float]] = {}
        for name, (run, _) in networks.items():
            scores[f"{name}, whole volume"] = dice(run, source)
            scores[f"{name}, patches of {_times(task.SIZE)}"] = dice(windowed(run), source)
        sections += [f"## {count} volumes of {_times(size)}: {title}", table(scores)]
    sections.append(
        "Patches overlap by a half and are blended by Gaussian weights (`jaxlayers/ops/sliding_window.py`). Nothing in "
        "a patch that does not reach the capsule tells one organ from the other. All that is in a volume grows with "
        "its shortest side, so the larger volumes ask a network to find parts of a size that it was not trained on."
    )
    needed = {policy: memory(policy, side) for policy in ("none", "full")}
    rows = "\n".join(f"| {policy} | {size:.2f} GiB |" for policy, size in needed.items())
    saved = 1 - needed["full"] / needed["none"]
    sections += [
        f"## Memory of training on volumes of {_times((side,) * 3)}",
        f"| `remat` | temporary memory of a step |\n| --- | --- |\n{rows}",
        f"Batch 1, one channel, {MEMORY.num_classes} classes, `embed_dim={MEMORY.embed_dim}`, float32: "
        "`memory_analysis()` of the loss and its gradient compiled for a CPU. "
        + (f"Recomputing saves {saved:.0%} there. " if saved > 0.01 else "Recomputing saves nothing there. ")
        + "What the published size takes on a TPU, where it saves, is in [plan.md](plan.md#worked-plans).",
    ]
    page = "\n\n".join(sections) + "\n"
    (docs / "images").mkdir(parents=True, exist_ok=True)
    (docs / "volumes.md").write_text(page)
    picture({name: run for name, (run, _) in networks.items()}, same, min(4, len(same))).savefig(
        docs / "images" / "volumes.png", dpi=100
    )
    return page


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, write, print and return the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.volumes_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/swin_unetr_volumes"), help="folder of the training")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--count", type=int, default=20, help="volumes of each other size")
    parser.add_argument("--smoke", action="store_true", help="the config's small form")
    options = parser.parse_args(arguments)
    # More than one entry at the coarsest of five resolutions.
    side = 64 if options.smoke else 96
    page = document(task.config(options.smoke), options.run, options.docs, count=options.count, side=side)
    print(page)
    return page


if __name__ == "__main__":
    main()
