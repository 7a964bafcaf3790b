"""Enlarge photographs that no network has seen: a small DRCT, a plain network of its size, and interpolation.

    python -m tools.super_resolution_table

Trains the networks of configs/drct_super_resolution.py (a run that is there is not trained again), measures them on the
middle of three photographs, and writes docs/super_resolution.md and its picture.
"""

import argparse
import dataclasses
import functools
import shlex
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

from configs import drct_super_resolution as task
from jaxlayers.ops.image_quality import luma, psnr, ssim
from jaxlayers.window.drct import feature_intensity
from train import loop
from train.photographs import PHOTOGRAPHS, photograph

SIDE = 256
SCALES = [2, 4]
NAMES = PHOTOGRAPHS["test"]
# Name of the network, and whether its connections are dense.
NETWORKS = {"plain Swin groups": False, "DRCT": True}
METHODS = ("nearest", "bicubic", *NETWORKS)


@dataclasses.dataclass(frozen=True)
class Enlarged:
    """What came of one factor.

    Attributes:
      truth: the middles of the photographs, `[3, SIDE, SIDE, 3]`.
      found: the same enlarged from low resolution, by method.
      parameters: of each network.
      seconds: of processor time that each network's training took in this process; 0 where it was there before.
      intensities: of each network's maps, see `feature_intensity`.
    """

    truth: np.ndarray
    found: Mapping[str, np.ndarray]
    parameters: Mapping[str, int]
    seconds: Mapping[str, float]
    intensities: Mapping[str, Sequence[float]]


def middles(scale: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle of each photograph at low and at full resolution; whole photographs are shrunk, then cut."""
    lows, highs = [], []
    for name in NAMES:
        image = photograph(name).astype(np.float32) / 255
        rows, columns = (length // scale * scale for length in image.shape[:2])
        high = image[:rows, :columns]
        low = task.reduced(high, scale)
        first = [(length - side // scale) // 2 for length in low.shape[:2]]
        lows.append(low[first[0] : first[0] + side // scale, first[1] : first[1] + side // scale])
        highs.append(high[scale * first[0] : scale * first[0] + side, scale * first[1] : scale * first[1] + side])
    return np.stack(lows), np.stack(highs)


def enlarge(scale: int, networks: Sequence[str], steps: int, runs: Path, *, side: int = SIDE) -> Enlarged:
    """Train networks for a factor, and enlarge the photographs."""
    low, truth = middles(scale, side)
    found = {
        "nearest": np.repeat(np.repeat(low, scale, 1), scale, 2),
        "bicubic": task.enlarged(jnp.asarray(low), scale),
    }
    parameters, seconds, intensities = {}, {}, {}
    for name in networks:
        config = task.experiment(scale, dense=NETWORKS[name], steps=steps)
        config = dataclasses.replace(config, baselines=None)
        start = time.process_time()
        result = loop.train(
            config, runs / f"{name.split()[0].lower()}_x{scale}", devices=jax.devices()[:1], silent=True
        )
        seconds[name] = time.process_time() - start
        params = jax.device_get(result.state.params)
        parameters[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
        found[name] = jax.jit(config.model.apply)({"params": params}, low)
        intensities[name] = jax.jit(functools.partial(feature_intensity, config.model.network))(
            {"params": params["network"]}, low[..., : 64 // scale, : 64 // scale, :]
        ).tolist()
        print(f"{name} x{scale}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    kept = {name: np.asarray(task.rounded(image)) for name, image in found.items()}
    return Enlarged(truth, kept, parameters, seconds, intensities)


def scores(truth: Any, found: Any, scale: int) -> dict[str, np.ndarray]:
    """Return PSNR and SSIM of each photograph on luma and on colours, without a border of `scale` pixels."""
    result = {}
    for kind, (a, b) in {"Y": (luma(found), luma(truth)), "RGB": (found, truth)}.items():
        result[f"PSNR {kind}"] = np.asarray(psnr(a, b, border=scale))
        result[f"SSIM {kind}"] = np.asarray(ssim(a, b, border=scale))
    return result


def markdown(results: Mapping[int, Enlarged]) -> str:
    """Return a table for each factor."""
    blocks = []
    for scale, result in results.items():
        head = [f"x{scale}", "parameters", *(f"{name}, PSNR / SSIM of Y" for name in NAMES), "mean Y", "mean RGB"]
        lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
        for method, image in result.found.items():
            score = scores(jnp.asarray(result.truth), jnp.asarray(image), scale)
            cells = [method, f"{result.parameters[method]:,}" if method in result.parameters else "-"]
            cells += [f"{p:.2f} / {s:.4f}" for p, s in zip(score["PSNR Y"], score["SSIM Y"], strict=True)]
            cells += [
                f"{score[f'PSNR {kind}'].mean():.2f} / {score[f'SSIM {kind}'].mean():.4f}" for kind in ("Y", "RGB")
            ]
            lines.append("| " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def gains(results: Mapping[int, Enlarged]) -> str:
    """Return what each network has over bicubic enlargement on the mean of the photographs, as a list."""
    lines = []
    for scale, result in results.items():
        truth = jnp.asarray(result.truth)
        mean = {
            method: {key: values.mean() for key, values in scores(truth, jnp.asarray(image), scale).items()}
            for method, image in result.found.items()
        }
        for name in result.parameters:
            over = {key: value - mean["bicubic"][key] for key, value in mean[name].items()}
            lines.append(f"- {name}, x{scale}: {over['PSNR Y']:+.2f} dB and {over['SSIM Y']:+.4f} on luma")
    return "\n".join(lines)


def intensity_lines(results: Mapping[int, Enlarged]) -> str:
    """Return the intensity along each network as a list."""
    return "\n".join(
        f"- {name}, x{scale}: " + ", ".join(f"{value:.3f}" for value in values)
        for scale, result in results.items()
        for name, values in result.intensities.items()
    )


def draw(result: Enlarged, scale: int, side: int = 64) -> Figure:
    """Return a piece of each photograph as every method enlarges it."""
    columns = {**result.found, "truth": result.truth}
    figure = Figure(figsize=(2 * len(columns), 2 * len(NAMES) + 0.3), dpi=80, layout="constrained")
    for row, axes in enumerate(figure.subplots(len(NAMES), len(columns))):
        for axis, (name, images) in zip(axes, columns.items(), strict=True):
            first = (images.shape[1] - side) // 2
            axis.imshow(np.clip(images[row, first : first + side, first : first + side], 0, 1), interpolation="nearest")
            axis.set_axis_off()
            if not row:
                axis.set_title(f"{name}, x{scale}" if name in NETWORKS else name, fontsize=9)
    return figure


DOCUMENT = """# Super-resolution of photographs

    {command}

Three photographs that no network has seen (astronaut, chelsea and camera of scikit-image) are shrunk bicubically with
antialiasing and rounded to 8 bits; their middles of {side} x {side} pixels are measured as papers do: PSNR in decibels
and SSIM on the luma Y of BT.601, without a border of as many pixels as the factor, and on colours.

{table}

What a network has over bicubic enlargement, on the mean of the three:

{gains}

![The middles of three photographs as every method enlarges them]({picture})

The networks are those of `configs/drct_super_resolution.py`: {steps:,} steps on 8 crops of {crop} x {crop} pixels of
low resolution out of 14 other photographs, least absolute error. Each adds to the bicubic picture what it finds, which
the published DRCT does not; that, the small width and minutes of training instead of days are why nothing here can be
compared with published figures. {rival}One run each, with one seed. The learning
rate and how the last convolution starts were chosen at x2 by the PSNR on crops of coffee, china.jpg and coins, which
were left out of training for that; window and width are small to be quick and were not compared by themselves.

Strength of the feature maps (mean absolute value) before the groups and after each, where the paper sees an information
bottleneck if it falls at the end:

{intensities}
"""
RIVAL = """Plain groups are chains of five Swin blocks and a convolution, wider, so that the network has no fewer
parameters. """


def main(arguments: Sequence[str] | None = None) -> str:
    """Train, measure, write, print and return the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.super_resolution_table", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--scales", type=int, nargs="*", default=SCALES)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=task.STEPS)
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of the middle that is measured")
    parser.add_argument("--runs", type=Path, default=Path("runs/super_resolution"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    results = {
        scale: enlarge(scale, options.networks, options.steps, options.runs, side=options.side)
        for scale in options.scales
    }
    table = markdown(results)
    picture = options.docs / "images" / "super_resolution.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(draw(results[options.scales[-1]], options.scales[-1])).print_png(picture)
    chosen = [name for name in NETWORKS if name in options.networks]
    command = ["python", "-m", "tools.super_resolution_table"]
    command += ["--scales", *map(str, options.scales)] if options.scales != SCALES else []
    command += ["--networks", *chosen] if len(chosen) < len(NETWORKS) else []
    page = DOCUMENT.format(
        command=shlex.join(command),
        table=table,
        gains=gains(results),
        crop=task.CROP,
        rival=RIVAL if len(chosen) == len(NETWORKS) else "",
        side=options.side,
        steps=options.steps,
        picture=picture.relative_to(options.docs),
        intensities=intensity_lines(results),
    )
    (options.docs / "super_resolution.md").write_text(page.rstrip() + "\n")
    print(table)
    return table


if __name__ == "__main__":
    main()
