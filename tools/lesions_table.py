"""Compare Us of Swin blocks, with attention in the skips or without, Swin UNETR and a U-Net: lesions and coins.

    python -m tools.lesions_table

Trains every model of `configs/att_swin_unet_lesions.py` that is named on both sets of pictures, by the one train loop
and with equal steps, and writes docs/lesions.md and docs/images/lesions.png. Scores are kept in runs/lesions: what is
there is not trained again.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs import att_swin_unet_lesions as task
from train import loop

DATA: Mapping[task.Data, str] = {"lesions": "lesions", "coins": "coins"}
TITLES = {
    "both": "Att-SwinU-Net",
    "cross_contextual": "cross-contextual attention alone",
    "spatial": "shared attention weights alone",
    "concatenation": "Swin-UNet (concatenation)",
    "swin_unetr": "Swin UNETR",
    "unet": "U-Net",
}
SHOWN = 6

Scores = dict[str, dict[str, float]]
"""Dice and IoU of the class, seconds of processor time and number of parameters, of each run and baseline."""


def run(model: str, data: task.Data, seed: int, out: Path, *, smoke: bool = False) -> dict[str, float]:
    """Return what one training reaches on pictures it has not seen; keep what it says of the first ones."""
    config = dataclasses.replace(task.config(smoke, model, data, seed), rivals={}, baselines=None)
    start = time.process_time()
    folder = out / "runs" / f"{model}_{data}_{seed}"
    result = loop.train(config, folder, devices=jax.devices()[:1], silent=True)
    seconds = time.process_time() - start
    pictures = jnp.asarray(np.stack([record["image"] for record in shown(data, smoke)]))
    logits: Any = config.model.apply({"params": result.state.params}, pictures)
    np.save(out / f"{model}_{data}_{seed}.npy", np.asarray(jnp.argmax(logits, axis=-1), np.uint8))
    return {
        "dice": float(result.metrics["dice_1"]),
        "iou": float(result.metrics["iou_1"]),
        "seconds": seconds,
        "parameters": float(sum(leaf.size for leaf in jax.tree.leaves(result.state.params))),
    }


def shown(data: task.Data, smoke: bool) -> list[Mapping[str, np.ndarray]]:
    """Return the test pictures that are drawn: the first lesions, or coins from all over the picture."""
    source = task.sources(data, smoke)[1]
    count = min(SHOWN, len(source))
    places = range(count) if data == "lesions" else np.linspace(0, len(source) - 1, count).astype(int).tolist()
    return [source[place] for place in places]


def compare(models: Sequence[str], data: Sequence[task.Data], seeds: int, out: Path, *, smoke: bool = False) -> Scores:
    """Return the scores of all runs as `model/data/seed`, and of the baselines; what is in `scores.json` is not run."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "scores.json"
    found: Scores = json.loads(path.read_text()) if path.exists() else {}

    def keep(key: str, scores: dict[str, float]) -> None:
        found[key] = scores
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{key:<32} dice {scores['dice']:.3f} iou {scores['iou']:.3f}", file=sys.stderr, flush=True)

    for one in data:
        for model in models:
            for seed in range(seeds):
                if f"{model}/{one}/{seed}" not in found:
                    keep(f"{model}/{one}/{seed}", run(model, one, seed, out, smoke=smoke))
        if not any(key.startswith("baseline") and f"/{one}/" in key for key in found):
            values = task.baselines(one)
            for name in {key.rpartition(" ")[0]: None for key in values}:
                keep(f"baseline {name}/{one}/0", {key: values[f"{name} {key}_1"] for key in ("dice", "iou")})
    return found


def markdown(found: Scores) -> str:
    """Return the table: mean over the seeds, and standard deviation if there are several."""
    data = [one for one in DATA if any(f"/{one}/" in key for key in found)]
    names = {key.split("/")[0]: None for key in found}
    order = [name for name in TITLES if name in names] + [name for name in names if name not in TITLES]
    heads = [f"{DATA[one]}, {metric}" for one in data for metric in ("Dice", "IoU")]
    lines = ["| model | " + " | ".join(heads) + " | parameters |", "| --- |" + " --- |" * (len(heads) + 1)]
    for name in order:
        runs = {key: scores for key, scores in found.items() if key.startswith(f"{name}/")}
        cells = [
            _spread([scores[metric] for key, scores in runs.items() if f"/{one}/" in key])
            for one in data
            for metric in ("dice", "iou")
        ]
        sizes = {int(scores["parameters"]) for scores in runs.values() if "parameters" in scores}
        cells.append(" and ".join(f"{size:,}" for size in sorted(sizes)))
        lines.append(f"| {TITLES.get(name, name.removeprefix('baseline '))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values):.3f}" if len(values) > 1 else "")


def ranking(found: Scores) -> str:
    """Return, for each set of pictures, the sentence that names all by their mean Dice, the best first."""
    sentences = []
    for one in DATA:
        dice: dict[str, list[float]] = {}
        for key, scores in found.items():
            name, data, _ = key.split("/")
            if data == one:
                dice.setdefault(TITLES.get(name, name.removeprefix("baseline ")), []).append(scores["dice"])
        order = sorted(dice, key=lambda name: -np.mean(dice[name]))
        if order:
            sentences.append(f"On {one} by Dice: {', '.join(f'{name} {np.mean(dice[name]):.3f}' for name in order)}.")
    return " ".join(sentences)


def draw(found: Scores, out: Path, *, smoke: bool = False) -> Figure:
    """Return pictures with what is labelled in them, and what each model marks, of the first seed."""
    figure = Figure(figsize=(2 * SHOWN, 0), layout="constrained")
    FigureCanvasAgg(figure)
    data = [one for one in DATA if any(f"/{one}/" in key for key in found)]
    models = [name for name in TITLES if any(key.startswith(f"{name}/") for key in found)]
    figure.set_size_inches(1.1 * (2 + len(models)) * len(data), 1.1 * SHOWN)
    panels = figure.subplots(SHOWN, (2 + len(models)) * len(data), squeeze=False)
    for axis in panels.ravel():
        axis.set_axis_off()
    for place, one in enumerate(data):
        records = shown(one, smoke)
        columns = {
            "picture": [(record["image"] + 1) / 2 for record in records],
            "labels": [record["label"] for record in records],
            **{
                TITLES[name].split(" (")[0]: list(np.load(out / f"{name}_{one}_0.npy"))
                for name in models
                if f"{name}/{one}/0" in found
            },
        }
        for column, (title, images) in enumerate(columns.items(), place * (2 + len(models))):
            panels[0, column].set_title(title, fontsize=7)
            for axis, image in zip(panels[:, column], images, strict=False):
                axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure


DOCUMENT = """# Marking lesions on simulated skin

    python -m tools.lesions_table

Att-SwinU-Net (`jaxlayers/window/att_swin_unet.py`) against the same U of Swin blocks with plain concatenation in its
skips, Swin-UNet, against Swin UNETR, which has convolutions around its blocks (`jaxlayers/window/swin_unetr.py`), and
against a U-Net of convolutions alone, all with about as many parameters, trained alike:
{steps} of {batch} pictures, cross entropy and Dice loss, {seeds} seed(s), on one core of a shared CPU
({minutes:.0f} minutes of processor time for all trainings together). Dice and IoU are those of the marked class over
all pixels of pictures that were not trained on.

{table}

*Lesions* are {train:,} simulated pictures of {size} x {size} pixels to train on and {test} to test on
(`configs/att_swin_unet_lesions.py`): one blob of irregular outline, soft border and uneven colour on skin under uneven
light, with freckles, hairs and a shadow that belong to the ground. *Coins* are crops of `skimage.data.coins`, the left
half to train on, the right half, cut in {tiles} squares, to test on. Their labels are no human's but those of a
classical method, scikit-image's watershed of the picture's slope: the column says how well a network learns what this
method does. The Us of Swin blocks alone see patches of 2 x 2 pixels as their finest map, the other two every pixel.

{order}

![pictures, labels and what the models mark](images/lesions.png)
"""


def document(found: Scores, seeds: int, docs: Path, out: Path, *, smoke: bool = False) -> str:
    """Write the page and its picture; return the table."""
    table, config = markdown(found), task.config(smoke)
    train, test = task.sources("lesions", smoke)
    (docs / "images").mkdir(parents=True, exist_ok=True)
    page = DOCUMENT.format(
        table=table,
        steps=" and ".join(f"{task.config(smoke, data=one).steps:,} steps on {one}" for one in DATA),
        batch=config.batch_size,
        seeds=seeds,
        minutes=sum(scores.get("seconds", 0) for scores in found.values()) / 60,
        train=len(train),
        test=len(test),
        tiles=len(task.coins("test")),
        size=task.SIZE,
        order=ranking(found),
    )
    (docs / "lesions.md").write_text(page)
    draw(found, out, smoke=smoke).savefig(docs / "images" / "lesions.png", dpi=80)
    return table


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, write, print and return the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.lesions_table", description=(__doc__ or "").split("\n")[0])
    usual = ["both", "concatenation", "swin_unetr", "unet"]
    parser.add_argument("--models", nargs="+", choices=task.MODELS, default=usual)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/lesions"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--smoke", action="store_true", help="a few steps of each")
    options = parser.parse_args(arguments)
    found = compare(options.models, options.data, options.seeds, options.out, smoke=options.smoke)
    table = document(found, options.seeds, options.docs, options.out, smoke=options.smoke)
    print(table)
    return table


if __name__ == "__main__":
    main()
