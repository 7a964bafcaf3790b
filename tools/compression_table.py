"""Compare a small S2LIC with JPEG at equal numbers of bytes, on photographs that it was not trained on.

    python -m tools.compression_table

Trains one model for each weight of the error, the highest rate first and the others from it, and writes every test
picture as a file, by each model and by JPEG at every quality. Writes docs/compression.md and two pictures. Runs are
kept in runs/s2lic, and what is there is not trained again.
"""

import argparse
import dataclasses
import io
import json
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from configs import s2lic_photographs as task
from jaxlayers.ops.image_quality import ms_ssim, psnr
from jaxlayers.window.s2lic import S2LIC, Codec
from tools.compress import load_params
from train import loop
from train.config import Config
from train.photographs import PHOTOGRAPHS, photograph

WEIGHTS = (0.02, 0.006, 0.002)
SUBSAMPLING = {"4:2:0": 2, "4:4:4": 0}
QUALITIES = tuple(range(1, 96))


@dataclasses.dataclass(frozen=True)
class Point:
    """One file.

    Attributes:
      size: bytes of the whole file.
      psnr: of the three channels, in decibels.
      ms_ssim: of the three channels.
    """

    size: int
    psnr: float
    ms_ssim: float


@dataclasses.dataclass(frozen=True)
class Compared:
    """The files of one picture.

    Attributes:
      pixels: of the picture.
      learned: one for each weight.
      jpeg: by subsampling, one for each quality.
    """

    pixels: int
    learned: list[Point]
    jpeg: dict[str, list[Point]]


def quality(found: np.ndarray, picture: np.ndarray, size: int) -> Point:
    """Return the point of a decoded picture."""
    one, two = (jnp.asarray(x, jnp.float32) for x in (found, picture))
    return Point(size, float(psnr(one, two, data_range=255)), float(ms_ssim(one, two, data_range=255)))


def jpeg(picture: np.ndarray, grade: int, subsampling: int) -> tuple[np.ndarray, int]:
    """Return what comes back from JPEG, with Huffman tables fitted to the picture, and its bytes."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=grade, subsampling=subsampling, optimize=True)
    return np.asarray(Image.open(stream)), len(stream.getvalue())


def at_least(points: Sequence[Point], size: int) -> int:
    """Return the number of the smallest file of at least that size, or the largest."""
    enough = [index for index, point in enumerate(points) if point.size >= size]
    key = lambda index: points[index].size  # noqa: E731
    return min(enough, key=key) if enough else max(range(len(points)), key=key)


def trained(weights: Sequence[float], runs: Path, base: Config, steps: tuple[int, int]) -> list[Codec]:
    """Return the codec of each weight, trained unless its run is complete."""
    codecs = []
    for index, weight in enumerate(weights):
        run = runs / f"{weight:g}"
        config = dataclasses.replace(base, task=task.compression(weight), steps=steps[min(index, 1)])
        if index:
            config = task.tuned(config, str(runs / f"{weights[0]:g}"))
        # A run that was stopped goes on from its last checkpoint.
        if not (run / "summary.json").exists():
            loop.train(config, run)
        model = typing.cast(S2LIC, config.model)
        codecs.append(Codec(model, load_params(run, model)))
    return codecs


def compare(
    codecs: Sequence[Codec], pictures: Mapping[str, np.ndarray], grades: Sequence[int] = QUALITIES
) -> tuple[dict[str, Compared], dict[str, list[np.ndarray]]]:
    """Return the points of each picture, and what the models bring back of it."""
    found: dict[str, Compared] = {}
    back: dict[str, list[np.ndarray]] = {}
    for name, picture in pictures.items():
        learned, back[name] = [], []
        for codec in codecs:
            data = codec.encode(picture)
            back[name].append(codec.decode(data))
            learned.append(quality(back[name][-1], picture, len(data)))
        others = {
            key: [quality(*_first(jpeg(picture, grade, number), picture)) for grade in grades]
            for key, number in SUBSAMPLING.items()
        }
        found[name] = Compared(picture.shape[0] * picture.shape[1], learned, others)
        print(f"{name}: {[point.size for point in learned]} bytes", file=sys.stderr, flush=True)
    return found, back


def _first(coded: tuple[np.ndarray, int], picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    return coded[0], picture, coded[1]


def markdown(found: Mapping[str, Compared], weights: Sequence[float]) -> str:
    """Return a row for each picture and weight."""
    lines = [
        "| picture | weight | bytes | bits a pixel | S2LIC | JPEG 4:2:0 | JPEG 4:4:4 |",
        "| --- |" + " --- |" * 6,
    ]
    for name, one in found.items():
        for weight, point in zip(weights, one.learned, strict=True):
            cells = [name, f"{weight:g}", f"{point.size:,}", f"{8 * point.size / one.pixels:.3f}", _shown(point)]
            for points in one.jpeg.values():
                other = points[at_least(points, point.size)]
                cells.append(f"{_shown(other)} ({other.size:,} bytes)")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(found: Mapping[str, Compared]) -> str:
    """Return how often the network has the better picture, of every kind of JPEG in the table."""
    parts = []
    for field, name in (("psnr", "PSNR"), ("ms_ssim", "MS-SSIM")):
        for kind in SUBSAMPLING:
            leads = [
                getattr(point, field) - getattr(one.jpeg[kind][at_least(one.jpeg[kind], point.size)], field)
                for one in found.values()
                for point in one.learned
            ]
            parts.append(f"in {name} above JPEG {kind} in {sum(lead > 0 for lead in leads)} of {len(leads)} files")
    return f"S2LIC is {', '.join(parts)}."


def _shown(point: Point) -> str:
    return f"{point.psnr:.2f} dB, {point.ms_ssim:.3f}"


def curves(found: Mapping[str, Compared]) -> Any:
    """Draw PSNR and MS-SSIM over the rate, one column a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 5.6), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, sharex="col")
    for column, (name, one) in enumerate(found.items()):
        for row, (field, label) in enumerate((("psnr", "PSNR (dB)"), ("ms_ssim", "MS-SSIM"))):
            panel = panels[row, column]
            for key, points in {"S2LIC": one.learned, **{f"JPEG {k}": v for k, v in one.jpeg.items()}}.items():
                rate = [8 * point.size / one.pixels for point in points]
                panel.plot(rate, [getattr(p, field) for p in points], "o-" if key == "S2LIC" else "-", label=key)
            most = max(8 * point.size / one.pixels for point in one.learned)
            panel.set(xlim=(0, 2 * most), ylabel=label if not column else "", title=name if not row else "")
            panel.grid(alpha=0.3)
        panels[1, column].set_xlabel("bits a pixel")
    panels[0, 0].legend()
    return figure


def side_by_side(picture: np.ndarray, back: np.ndarray, size: int, side: int = 200) -> np.ndarray:
    """Return the centre of a picture, of what the model brings back, and of JPEG at no fewer bytes, in one row."""
    coded = [jpeg(picture, grade, 2) for grade in QUALITIES]
    other = coded[at_least([Point(length, 0, 0) for _, length in coded], size)][0]
    top, left = (max(0, (length - side) // 2) for length in picture.shape[:2])
    return np.concatenate([one[top : top + side, left : left + side] for one in (picture, back, other)], axis=1)


DOCUMENT = """# Compressing photographs

    python -m tools.compression_table

A small S2LIC (`jaxlayers/window/s2lic.py`, {parameters:,} parameters) beside JPEG, on whole photographs that it was
not trained on. Every figure is of a file: its bytes are those on the disk, headers and checksums included on both
sides, and the picture is what decoding it gives. JPEG is Pillow's, with Huffman tables fitted to the picture, at the
lowest quality whose file is no smaller than that of S2LIC: it has as many bytes or more. Cells hold PSNR and MS-SSIM.

{table}

{verdict}

![PSNR and MS-SSIM over the rate](images/compression.png)

{name} at weight {weight:g}: as it is, by S2LIC, and by JPEG (4:2:0) at no fewer bytes.

![{name}, by S2LIC and by JPEG](images/compression_{name}.png)

The model is trained on crops of {crop} x {crop} pixels of the {train} pictures of `train/photographs.py` that are not
test pictures: {steps[0]:,} steps at the highest weight of the error, {steps[1]:,} more from there for each other
weight, of {batch} crops. To use it on a picture of your own:

    python -m tools.compress encode IN.png OUT.s2 --model {runs}/{weight:g}
    python -m tools.compress decode OUT.s2 BACK.png --model {runs}/{weight:g}

A decoder must compute, to the last bit, what the coder computed. It runs the same compiled steps, so on one kind of
machine with one release it does; a file carries a checksum of its symbols, and a decoder that computes otherwise says
so instead of making up a picture. Damaged files, and files of other models, are refused too.
"""


def main(arguments: Sequence[str] | None = None) -> str:
    """Train what is missing, measure, write; return the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compression_table", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--weights", type=float, nargs="+", default=list(WEIGHTS), help="of the error, highest first")
    parser.add_argument("--steps", type=int, nargs=2, default=(task.STEPS, task.TUNING_STEPS), help="first, others")
    parser.add_argument("--runs", type=Path, default=Path("runs/s2lic"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--smoke", action="store_true", help="the config's one-minute version, on small pictures")
    options = parser.parse_args(arguments)
    base = task.config(smoke=options.smoke)
    codecs = trained(options.weights, options.runs, base, tuple(options.steps))
    pictures = {name: photograph(name) for name in PHOTOGRAPHS["test"]}
    if options.smoke:
        pictures = {name: picture[:192, :176] for name, picture in list(pictures.items())[:1]}
    found, back = compare(codecs, pictures, QUALITIES[::24] if options.smoke else QUALITIES)
    table = markdown(found, options.weights)
    images = options.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    curves(found).savefig(images / "compression.png", dpi=80)
    name, last = next(iter(pictures)), len(codecs) - 1
    row = side_by_side(pictures[name], back[name][last], found[name].learned[last].size)
    Image.fromarray(row).save(images / f"compression_{name}.png", optimize=True)
    page = DOCUMENT.format(
        table=table,
        verdict=textwrap.fill(verdict(found), 120),
        parameters=codecs[0].parameters,
        name=name,
        weight=options.weights[last],
        crop=task.SIZE,
        train=len(PHOTOGRAPHS["train"]),
        steps=tuple(options.steps),
        batch=base.batch_size,
        runs=options.runs,
    )
    (options.docs / "compression.md").write_text(page)
    (options.runs / "compression.json").write_text(
        json.dumps({name: dataclasses.asdict(one) for name, one in found.items()}) + "\n"
    )
    print(table)
    return table


if __name__ == "__main__":
    main()
