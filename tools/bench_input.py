"""Measure how many records a second the input alone delivers, by the number of worker processes.

Command:  python -m tools.bench_input [configs/x.py] [--workers 0 1 2] [--batches 8]

Without a config it reads JPEG images of 500 x 375 pixels that it draws into a temporary folder, through the Swin recipe
at 224 pixels. Nothing is trained and no device is used. The time until the first batch (processes start, modules load)
is told apart from the rate after it.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train import augment, data
from train.records import name_of


@dataclasses.dataclass(frozen=True)
class Rate:
    """What one number of workers delivers.

    Attributes:
        workers: worker processes; 0 = a thread of this process.
        first_seconds: until the first batch.
        records_per_second: after it, in records of this process.
    """

    workers: int
    first_seconds: float
    records_per_second: float


def draw_images(folder: Path, count: int, *, size: tuple[int, int] = (500, 375), seed: int = 0) -> None:
    """Draw JPEG images in ten classes: smooth colours, edges and grain, which compress about as photographs do."""
    import PIL.Image
    import PIL.ImageDraw

    generator = np.random.default_rng(seed)
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), np.uint8)
        picture = PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)
        pen = PIL.ImageDraw.Draw(picture)
        for _ in range(30):
            corner = generator.integers(0, size[0], 4).tolist()
            box = (*np.minimum(corner[:2], corner[2:]).tolist(), *np.maximum(corner[:2], corner[2:]).tolist())
            pen.ellipse(box, outline=tuple(generator.integers(0, 256, 3).tolist()), width=3)
        pixels = np.asarray(picture) + generator.normal(0, 8, (size[1], size[0], 3))
        path = folder / f"class_{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)


def shares(source: Any, transform: Any, records: int) -> tuple[float, float]:
    """Return the seconds that reading, and transforming, one record takes in this process."""
    reading = transforming = 0.0
    for index in range(records + 1):
        start = time.perf_counter()
        record = source[index % len(source)]
        middle = time.perf_counter()
        if transform is not None:
            transform(record, np.random.default_rng(index))
        if index:  # the first one opens files and loads modules
            reading += middle - start
            transforming += time.perf_counter() - middle
    return reading / records, transforming / records


def measure(source: Any, transform: Any, batch_size: int, workers: int, batches: int) -> Rate:
    """Return the rate of the training batches of a source."""
    iterator: Any = data.batches(source, batch_size=batch_size, seed=0, transform=transform, workers=workers)
    try:
        start = time.perf_counter()
        next(iterator)
        first = time.perf_counter()
        # Batches that were made while the first one was awaited are taken out, and as many are in the making at the
        # end: what is left is the rate that lasts.
        for _ in range(2 * workers):
            next(iterator)
        begin = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        seconds = time.perf_counter() - begin
    finally:
        iterator.close()
    return Rate(workers, first - start, batches * batch_size / seconds)


def report(
    name: str, rates: Sequence[Rate], reading: float, transforming: float, batch_size: int, step_seconds: float | None
) -> str:
    """Return the table."""
    whole = reading + transforming
    lines = [
        f"{name}, batches of {batch_size}",
        f"one record, in this process: {1e3 * whole:.2f} ms, of which {reading / whole:.0%} read and decode, "
        f"{transforming / whole:.0%} transform",
        f"{'workers':>7}  {'first batch':>11}  {'records/s':>9}  {'ratio':>5}  {'feeds steps down to':>19}",
    ]
    for rate in rates:
        ratio = rate.records_per_second / rates[0].records_per_second
        lines.append(
            f"{rate.workers:>7}  {rate.first_seconds:>9.2f} s  {rate.records_per_second:>9.1f}  {ratio:>5.2f}  "
            f"{1e3 * batch_size / rate.records_per_second:>16.1f} ms"
        )
    if step_seconds is not None:
        need = batch_size / step_seconds
        best = max(rates, key=lambda rate: rate.records_per_second)
        lines.append(
            f"a step of {1e3 * step_seconds:g} ms needs {need:.1f} records/s: {need / best.records_per_second:.2f} "
            f"times what {best.workers} workers deliver, {need * whole:.1f} processor cores of this kind"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print and return the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_input", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("config", nargs="?", help="a config file, whose training data and transform are measured")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--batches", type=int, default=8, help="batches that are timed")
    parser.add_argument("--batch-size", type=int, help="records in a batch; 32, or that of the config")
    parser.add_argument("--images", type=int, default=256, help="images to draw, without a config")
    parser.add_argument("--step-seconds", type=float, help="of a training step: says what it would need")
    options = parser.parse_args(arguments)
    for name in ("batches", "images"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")

    def run(source: Any, transform: Any, batch_size: int) -> str:
        reading, transforming = shares(source, transform, min(64, len(source)))
        rates = [measure(source, transform, batch_size, count, options.batches) for count in options.workers]
        title = options.config or f"{options.images} JPEG images of 500 x 375, Swin recipe at 224"
        table = report(
            f"{title} ({name_of(source)})" if options.config else title,
            rates,
            reading,
            transforming,
            batch_size,
            options.step_seconds,
        )
        print(table)
        return table

    if options.config:
        from train import config as configs

        config = configs.load(options.config)
        return run(config.train_data, config.train_transform, options.batch_size or config.batch_size)
    with tempfile.TemporaryDirectory(prefix="bench-input-") as folder:
        draw_images(Path(folder), options.images)
        return run(data.image_folder(folder), augment.swin_recipe(224).train, options.batch_size or 32)


if __name__ == "__main__":
    main()
