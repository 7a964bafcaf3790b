"""The input pipeline beside timm's, by worker processes; see `tools.bench`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench_measure import OURS, Job, Measured, Page, Session, markdown, ratio
from tools.bench_worker import Program, Ready, needed, torchvision

AGAINST = ("timm",)
PACKAGES = ("grain", "pillow", "numpy", "torch", "torchvision", "timm")
HERE = "tools.bench_loading"

TEXT = """
JPEG files of 500 x 375 pixels, drawn by the tool in ten classes, go through the Swin recipe at {size} pixels: random
resized crop (bicubic), flip, RandAugment m9 mstd0.5 with two operations, normalisation, random erasing with noise in a
quarter. Ours are `train.data.image_folder`, `train.augment.swin_recipe` and `train.data.batches`; timm's are
`timm.data.create_transform` in an `ImageFolder` of torchvision under `torch.utils.data.DataLoader`. Batches have
{batch} records. Each turn starts anew, takes batches until those that were made ahead are used up, and only then counts
{batches} of them; the time given is that of one record. No device is used. Ours gives the same batch whatever the
number of workers, and can begin at any one; the loader beside it promises neither. `python -m tools.bench_input`
measures any config's input in the same way and says how many processor cores a step would need.
"""


def ours(folder: str, workers: Sequence[int], size: int, batch: int, batches: int) -> list[Program]:
    """Return our batches with several numbers of workers."""
    from tools import bench_input
    from train import augment, data

    source, transform = data.image_folder(folder), augment.swin_recipe(size).train

    def program(count: int) -> Program:
        def turn() -> float:
            return 1 / bench_input.measure(source, transform, batch, count, batches).records_per_second

        return Program(f"a record, workers {count}", lambda: Ready(turn))

    return [program(count) for count in workers]


def timm(folder: str, workers: Sequence[int], size: int, batch: int, batches: int) -> list[Program]:
    """Return those of timm's transform under PyTorch's loader."""
    import time

    torch, vision, models = needed("torch"), torchvision(), needed("timm")
    torch.set_num_threads(
        1
    )  # as the loader itself does in its workers; several wait for one another on such small work
    transform = models.data.create_transform(
        size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5",
        color_jitter=None,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    source = vision.datasets.ImageFolder(folder, transform)

    def program(count: int) -> Program:
        def turn() -> float:
            ahead = 2 * count  # the loader's default of two batches a worker
            drawn = torch.utils.data.RandomSampler(
                source, replacement=True, num_samples=batch * (1 + 2 * ahead + batches)
            )
            iterator = iter(torch.utils.data.DataLoader(source, batch, sampler=drawn, num_workers=count))
            for _ in range(1 + ahead):
                next(iterator)
            start = time.perf_counter()
            for _ in range(batches):
                next(iterator)
            return (time.perf_counter() - start) / (batch * batches)

        return Program(f"a record, workers {count}", lambda: Ready(turn))

    return [program(count) for count in workers]


def rates(found: Sequence[Measured]) -> str:
    """Return records a second by workers, with the gain over none and the ratio to ours."""
    own = {one.name: one for one in found if one.label == OURS}
    alone = {one.label: one for one in found if one.name.endswith(" 0")}
    rows = []
    for one in found:
        gain = f"{alone[one.label].median / one.median:.2f}" if one.label in alone else ""
        times = "" if one.label == OURS else str(ratio(own[one.name].seconds, one.seconds))
        rows.append([one.name.rsplit(" ", 1)[1], one.label, f"{1 / one.median:,.1f}", gain, times])
    heads = ["workers", "by", "records a second", "times those without workers", "their time / ours (range)"]
    return markdown(heads, rows)


def bench(session: Session, against: Sequence[str], quick: bool) -> Page:
    """Measure and return the page."""
    from tools import bench_input

    images, size, batch, batches = (8, 32, 2, 2) if quick else (256, 224, 16, 4)
    text = TEXT.format(size=size, batch=batch, batches=batches)
    page = Page("input", "Input pipeline", PACKAGES, text)
    workers = (0, 1) if quick else (0, 1, 2)
    with tempfile.TemporaryDirectory(prefix="bench-input-") as folder:
        bench_input.draw_images(Path(folder), images)
        settings: dict[str, Any] = {"folder": folder, "workers": workers, "size": size}
        settings |= {"batch": batch, "batches": batches}
        jobs = [Job(OURS, HERE, "ours", settings, imports=("grain",))]
        if "timm" in against:
            jobs.append(Job("timm", HERE, "timm", settings, imports=("torch", "torchvision", "timm")))
        page.found = session.measure(jobs)
    page.tables["Rates"] = rates(page.found)
    return page
