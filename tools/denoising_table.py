"""Take noise off whole held-out photographs: MAXIM and a plain network beside scikit-image's denoisers.

    python -m tools.denoising_table

Trains what `configs/maxim_denoising.py` says (in runs/maxim_denoising; what is finished there is not trained again),
adds Gaussian noise of three strengths to the test photographs, and measures what each method gives back. Writes
docs/denoising.md and docs/images/denoising.png.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from configs import maxim_denoising as task
from jaxlayers.ops.image_quality import psnr, ssim
from train import loop
from train.config import Config
from train.photographs import PHOTOGRAPHS, photograph

SIGMAS = (15, 25, 50)
MODELS: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    "plain convolutions": ("rivals/plain_convolutions", task.plain),
    "MAXIM": (".", task.maxim),
}
"""Name -> where it lies in the run, and what it is."""
SHOWN = ("chelsea", 25, (60, 130), 160)
"""Picture, strength, upper left corner and side of the crop that the figure shows."""

Denoiser = Callable[[np.ndarray, float], np.ndarray]
Scores = dict[str, dict[tuple[str, int], tuple[float, float]]]
"""PSNR and SSIM of each method, by picture and strength."""


def unchanged(image: np.ndarray, strength: float) -> np.ndarray:
    """Return the noisy picture."""
    del strength
    return image


def total_variation(image: np.ndarray, strength: float) -> np.ndarray:
    """Return what scikit-image's total variation makes of a picture; its weight is the noise's standard deviation."""
    from skimage.restoration import denoise_tv_chambolle

    return denoise_tv_chambolle(image, weight=strength, channel_axis=-1)


CLASSICAL: Mapping[str, Denoiser] = {
    "noisy": unchanged,
    "total variation": total_variation,
    "non-local means": task.non_local_means,
}


def learned(config: Config, run: Path) -> tuple[dict[str, Denoiser], dict[str, int]]:
    """Return the networks as denoisers, trained unless a finished run lies there, and their numbers of parameters."""
    denoisers, sizes = {}, {}
    for name, (place, make) in MODELS.items():
        model = make()
        alone = dataclasses.replace(config, model=model, rivals={}, baselines=None, title=name)
        state = loop.train(alone, run / place, devices=jax.devices()[:1], silent=True).state
        denoisers[name] = as_denoiser(model, {"params": state.evaluated, **state.collections})
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return denoisers, sizes


def as_denoiser(model: nn.Module, variables: Any) -> Denoiser:
    """Return a network as a function of a picture; it is not told the noise."""
    apply = jax.jit(functools.partial(model.apply, variables, method="restore"))
    return lambda image, strength: in_tiles(apply, image)


def in_tiles(
    restore: Callable[[Any], Any], image: np.ndarray, *, side: int = task.SIZE, at_once: int = 25
) -> np.ndarray:
    """Return a picture restored in squares that overlap by half, weighed by how far a pixel is from their sides.

    The cells of MAXIM's grid, and what it averages over the picture, grow with the picture; in squares as large as the
    crops of training both are what it has learned.
    """
    side = min(side, *image.shape[:2])
    step = max(1, side // 2)
    rows, columns = ((*range(0, length - side, step), length - side) for length in image.shape[:2])
    corners = [(row, column) for row in rows for column in columns]
    tiles = np.stack([image[row : row + side, column : column + side] for row, column in corners])
    tiles = np.pad(tiles, [(0, -len(tiles) % at_once), (0, 0), (0, 0), (0, 0)])  # one shape to compile
    slope = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    weight = (slope[:, None] * slope)[..., None].astype(np.float32)
    total, weights = np.zeros_like(image), np.zeros_like(image)
    restored = np.concatenate([restore(tiles[first : first + at_once]) for first in range(0, len(tiles), at_once)])
    for tile, (row, column) in zip(restored, corners, strict=False):
        inside = (slice(row, row + side), slice(column, column + side))
        total[inside] += weight * tile
        weights[inside] += weight
    return total / weights


def given(name: str, sigma: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a test photograph and its noisy form, the same at every call."""
    clean = photograph(name).astype(np.float32) / 255
    random = np.random.RandomState([PHOTOGRAPHS["test"].index(name), sigma])
    return clean, task.noisy(clean, sigma / 255, lambda shape: random.standard_normal(shape))


def measure(denoisers: Mapping[str, Denoiser], pictures: Sequence[str], sigmas: Sequence[int]) -> Scores:
    """Return what each denoiser reaches on each whole picture."""
    found: Scores = {}
    for method, denoise in denoisers.items():
        found[method] = {}
        for name in pictures:
            for sigma in sigmas:
                clean, noise = given(name, sigma)
                restored = jnp.clip(jnp.asarray(denoise(noise, sigma / 255), jnp.float32), 0, 1)
                truth = jnp.asarray(clean)
                found[method][name, sigma] = (float(psnr(restored, truth)), float(ssim(restored, truth)))
        print(f"{method}: {_means(found[method], sigmas)}", file=sys.stderr, flush=True)
    return found


def _means(scores: Mapping[tuple[str, int], tuple[float, float]], sigmas: Sequence[int]) -> str:
    means = [np.mean([score for (_, one), score in scores.items() if one == sigma], axis=0) for sigma in sigmas]
    return " | ".join(f"{quality:.2f} / {likeness:.3f}" for quality, likeness in means)


def markdown(found: Scores, sigmas: Sequence[int]) -> str:
    """Return a table of means over the pictures, and one of each picture at the middle strength."""
    pictures = sorted({name for name, _ in next(iter(found.values()))}, key=PHOTOGRAPHS["test"].index)
    middle = sigmas[len(sigmas) // 2]
    lines = [
        "| method | " + " | ".join(f"noise {sigma} / 255" for sigma in sigmas) + " |",
        "| --- |" + " --- |" * len(sigmas),
    ]
    lines += [f"| {method} | {_means(scores, sigmas)} |" for method, scores in found.items()]
    lines += ["", f"Each picture at {middle} / 255:", "", "| method | " + " | ".join(pictures) + " |"]
    lines.append("| --- |" + " --- |" * len(pictures))
    for method, scores in found.items():
        cells = [f"{scores[name, middle][0]:.2f} / {scores[name, middle][1]:.3f}" for name in pictures]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lead(found: Scores, sigmas: Sequence[int], name: str = "MAXIM") -> str:
    """Return how far a network is ahead of scikit-image's denoisers on the mean over the pictures, as a list."""
    lines = []
    for other in CLASSICAL:
        if other == "noisy":
            continue
        cells = []
        for sigma in sigmas:
            pairs = [(found[name][key], found[other][key]) for key in found[name] if key[1] == sigma]
            quality, likeness = np.mean([np.subtract(*pair) for pair in pairs], axis=0)
            cells.append(f"{quality:+.2f} dB and {likeness:+.3f} at {sigma} / 255")
        lines.append(f"- {other}: " + ", ".join(cells))
    return "\n".join(lines)


def draw(denoisers: Mapping[str, Denoiser], out: Path) -> None:
    """Draw a crop of one picture: noisy, by non-local means, by MAXIM, clean."""
    name, sigma, (top, left), side = SHOWN
    clean, noise = given(name, sigma)
    restored = [denoisers[method](noise, sigma / 255) for method in ("noisy", "non-local means", "MAXIM")]
    crops = [one[top : top + side, left : left + side] for one in (*restored, clean)]
    out.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.concatenate(crops, axis=1), 0, 1) * 255
    Image.fromarray(np.rint(pixels).astype(np.uint8)).save(out, optimize=True)


DOCUMENT = """# Denoising photographs

    python -m tools.denoising_table

Gaussian noise on three whole photographs that no method has seen, by MAXIM (`jaxlayers/window/maxim.py`,
{maxim} parameters), by a plain chain of convolutions of the same cost a pixel ({plain} parameters), and by
scikit-image's denoisers. Means of PSNR (decibels) and SSIM over {pictures}:

{table}

What MAXIM has over them, PSNR and SSIM on the mean of the pictures:

{lead}

The networks are trained alike by `configs/maxim_denoising.py`: {steps} steps of {batch} crops of {size} x {size} pixels
of fourteen other photographs, in other sizes and colours too, under noise of 5 to 60 / 255. They are not told how
strong the noise is. Whole pictures are restored in tiles of {size} x {size} pixels that overlap by half: MAXIM's grid
has as many cells as in training, which on a whole picture would be larger. Where networks start, how errors are weighed
and how crops are varied was chosen in short runs, most of them of the plain network, by PSNR on the middles (192 x 192)
of coffee, china.jpg and coins, which were left out of training for that.

The others are: total variation has the noise's standard deviation for its weight, non-local means has patches of 5 x 5
within 13 x 13 and h = 0.6 times the noise, as scikit-image's example sets it for known noise. A grey picture gets the
same noise in its three channels. Results are clipped to [0, 1] before they are measured, SSIM is that of
`jaxlayers.ops.image_quality`.

![noisy, non-local means, MAXIM, clean](images/denoising.png)

{shown} at {sigma} / 255: noisy, non-local means, MAXIM, clean.
"""


def main(arguments: Sequence[str] | None = None) -> str:
    """Train what is missing, measure, write, print and return the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.denoising_table", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--run", type=Path, default=Path("runs/maxim_denoising"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--smoke", action="store_true", help="train for a few steps")
    options = parser.parse_args(arguments)
    config = task.config(options.smoke)
    networks, sizes = learned(config, options.run)
    denoisers = {**CLASSICAL, **networks}
    found = measure(denoisers, PHOTOGRAPHS["test"], SIGMAS)
    table = markdown(found, SIGMAS)
    draw(denoisers, options.docs / "images" / "denoising.png")
    page = DOCUMENT.format(
        table=table,
        lead=lead(found, SIGMAS),
        maxim=f"{sizes['MAXIM']:,}",
        plain=f"{sizes['plain convolutions']:,}",
        pictures=", ".join(PHOTOGRAPHS["test"]),
        steps=f"{config.steps:,}",
        batch=config.batch_size,
        size=task.SIZE,
        shown=SHOWN[0].capitalize(),
        sigma=SHOWN[1],
    )
    (options.docs / "denoising.md").write_text(page)
    print(table)
    return table


if __name__ == "__main__":
    main()
