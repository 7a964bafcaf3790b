"""Draw the theory of modern Hopfield networks and measure it: pictures, a table of numbers, and the same as JSON.

Command:  python -m tools.hopfield_figures [--out runs/hopfield_figures] [--quick]

One picture each of energy landscapes in two dimensions with their fixed points, the energy along updates, retrieval
errors beside the bound of Theorem 5, capacity against dimension beside Theorem 3, basins beside the proven radii, and
the operating classes of the heads of a small model before and after it is trained. `--quick` draws the same with fewer
points. `docs/hopfield_theory.md` shows and explains them.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxlayers.hopfield.capacity import (
    basin_radius,
    capacity_exponent,
    classical_capacity,
    fit_growth,
    mean_field_capacity,
    measure_capacity,
    proven_radius,
)
from jaxlayers.hopfield.diagnostics import (
    Kind,
    analyse_heads,
    energy_along,
    fixed_point_type,
    patterns_for_mass,
    retrieval_errors,
)
from jaxlayers.hopfield.hopfield import (
    Hopfield,
    HopfieldBagClassifier,
    HopfieldPooling,
    energy,
    storage_capacity,
)

BLUE, ORANGE, GREEN, RED, GREY, INK = "#2f6fb0", "#e08a1e", "#3a9a5b", "#c0392b", "#8a8f98", "#23272e"
KINDS = {
    Kind.SINGLE: ("single pattern", BLUE, "o"),
    Kind.METASTABLE: ("metastable state", ORANGE, "D"),
    Kind.GLOBAL: ("global average", RED, "s"),
}
CLASSES = {"I": RED, "II": ORANGE, "III": GREEN, "IV": BLUE, "": GREY}

Numbers = dict[str, float | int | str | None]


def sphere(rng: np.random.Generator, *shape: int, radius: float) -> jax.Array:
    """Return random points on a sphere about the origin."""
    points = rng.normal(size=shape)
    return jnp.asarray(radius * points / np.linalg.norm(points, axis=-1, keepdims=True), jnp.float32)


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes `[rows, columns]`, in the look that all pictures share."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, color=GREY)
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
    return figure, axes


# The pictures: each function returns one and the numbers behind it. ---------------------------------------------------


def draw_landscape(quick: bool) -> tuple[Figure, Numbers]:
    """Draw the energy over the plane for three betas, with updates from a ring of states and where they end."""
    angles = np.deg2rad([80, 100, 120, 215, 300, 325])
    stored = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1), jnp.float32)
    side = 60 if quick else 160
    ticks = np.linspace(-1.35, 1.35, side, dtype=np.float32)
    plane = jnp.asarray(np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2))
    ring = np.deg2rad(np.arange(0, 360, 15))
    starts = jnp.asarray(1.25 * np.stack([np.cos(ring), np.sin(ring)], axis=-1), jnp.float32)
    figure, axes = new_figure(1, 3, width=10.5, height=3.9)
    numbers: Numbers = {}
    trace = jax.jit(functools.partial(energy_along, steps=40))
    rest = jax.jit(fixed_point_type)
    for axis, beta in zip(axes[0], (1.0, 8.0, 60.0), strict=True):
        values = np.asarray(energy(plane, stored, beta=beta)).reshape(side, side)
        # The levels lie close where the minima are, and wide on the rising sides.
        levels = np.quantile(values[np.hypot(*np.meshgrid(ticks, ticks)) < 1.3], np.linspace(0, 1, 22) ** 1.6)
        axis.contourf(ticks, ticks, values, np.unique(levels), cmap="Blues_r", extend="both", alpha=0.75)
        paths = np.asarray(trace(starts, stored, beta=beta).states)
        axis.plot(paths[..., 0], paths[..., 1], color=INK, linewidth=0.6, alpha=0.55)
        found = jax.device_get(rest(starts, stored, beta=beta))
        places, first = np.unique(np.round(found.state, 2), axis=0, return_index=True)
        for place, index in zip(places, first, strict=True):
            _, colour, marker = KINDS[Kind(int(found.type.kind[index]))]
            axis.plot(*place, marker, color=colour, markersize=10, markeredgecolor="white", zorder=4)
            size = int(found.type.size[index])
            if size > 1:
                axis.annotate(str(size), place, color="white", fontsize=7, ha="center", va="center", zorder=5)
        axis.plot(*np.asarray(stored).T, "o", color="white", markeredgecolor=INK, markersize=4, zorder=3)
        axis.set_title(f"β = {beta:g}", fontsize=10)
        axis.set(aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        counts = {kind: sum(int(found.type.kind[i]) == kind for i in first) for kind in KINDS}
        numbers[f"fixed points reached, beta {beta:g}"] = ", ".join(
            f"{count} {KINDS[kind][0]}" for kind, count in counts.items() if count
        )
    handles = [
        figure.axes[0].plot([], [], marker, color=colour, markeredgecolor="white", markersize=9, label=label)[0]
        for label, colour, marker in KINDS.values()
    ]
    handles.append(figure.axes[0].plot([], [], "o", color="white", markeredgecolor=INK, label="stored pattern")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Energy, updates from a ring, and where they rest (number = patterns averaged)", fontsize=11)
    return figure, numbers


def draw_energy(quick: bool) -> tuple[Figure, Numbers]:
    """Draw the energy left above the last value along updates, for patterns in clusters and three betas."""
    rng = np.random.default_rng(0)
    centres = sphere(rng, 5, 16, radius=1.0)
    stored = centres[:, None] + 0.25 * sphere(rng, 5, 8, 16, radius=1.0)
    stored = stored.reshape(40, 16) / jnp.linalg.norm(stored.reshape(40, 1, 16), axis=-1)
    states = stored[:: 4 if quick else 2] + sphere(rng, 40, 16, radius=1.2)[:: 4 if quick else 2]
    steps = 15
    figure, axes = new_figure(1, 3, width=10.5, height=3.3)
    numbers: Numbers = {}
    with jax.enable_x64(True):  # down to differences of 1e-12
        states, stored = (jnp.asarray(np.asarray(x, np.float64)) for x in (states, stored))
        trace = jax.jit(functools.partial(energy_along, steps=6 * steps))
        rest = jax.jit(functools.partial(fixed_point_type, tolerance=1e-10))
        for axis, beta in zip(axes[0], (1.0, 9.0, 160.0), strict=True):
            energies = np.asarray(trace(states, stored, beta=beta).energies)
            found = jax.device_get(rest(states, stored, beta=beta).type)
            left = energies[: steps + 1] - energies[-1]
            left = np.where(left > 1e-12, left, np.nan)  # rounding
            for kind, (_, colour, _) in KINDS.items():
                if np.any(found.kind == kind):
                    axis.semilogy(left[:, found.kind == kind], color=colour, linewidth=0.9, alpha=0.7)
            sizes = found.size
            axis.set_title(f"β = {beta:g}: {averages(sizes)}", fontsize=10)
            axis.set(xlabel="updates", xlim=(0, steps))
            axis.set_ylim(1e-12, 10)
            numbers[f"largest rise of the energy in an update, beta {beta:g}"] = float(np.diff(energies, axis=0).max())
            numbers[f"patterns averaged at rest, beta {beta:g}"] = span(sizes)
    axes[0, 0].set_ylabel("energy above its end")
    handles = [axes[0, 0].plot([], [], color=colour, label=label)[0] for label, colour, _ in KINDS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure, numbers


def averages(sizes: np.ndarray) -> str:
    """Return in words how many patterns are averaged."""
    return "single patterns" if np.max(sizes) == 1 else f"averages of {span(sizes)} patterns"


def span(sizes: np.ndarray) -> str:
    """Return a range of whole numbers in words."""
    low, high = int(np.min(sizes)), int(np.max(sizes))
    return f"{low}" if low == high else f"{low} to {high}"


def draw_errors(quick: bool) -> tuple[Figure, Numbers]:
    """Draw measured errors of one update against separation, beside the bound of Theorem 5."""
    rng = np.random.default_rng(0)
    figure, axes = new_figure(1, 2, width=9.0, height=3.8)
    numbers: Numbers = {}
    count = 100 if quick else 400
    with jax.enable_x64(True):  # errors of 1e-12 are wanted
        # Lengths between 2 and 6 give separations of all sizes.
        stored = sphere(rng, count, 10, radius=1.0).astype(jnp.float64) * rng.uniform(2, 6, (count, 1))
        for axis, noise in zip(axes[0], (0.0, 0.2), strict=True):
            query = stored + noise * sphere(rng, count, 10, radius=1.0)
            found = jax.device_get(retrieval_errors(query, stored, beta=1.0))
            axis.semilogy(found.separation, found.bound, ".", color=GREY, markersize=4, label="bound (Eq. 8)")
            axis.semilogy(
                found.separation, np.maximum(found.error, 1e-17), ".", color=BLUE, markersize=4, label="measured"
            )
            axis.set_title(f"queries at distance {noise:g}", fontsize=10)
            axis.set(xlabel="separation Δ")
            inside = found.bound < 1
            numbers[f"errors above their bound, noise {noise:g}"] = int(np.sum(found.error > found.bound * (1 + 1e-9)))
            numbers[f"slope of ln error against separation, noise {noise:g}"] = float(
                np.polyfit(found.separation[inside], np.log(found.error[inside]), 1)[0]
            )
            numbers[f"median of bound / error, noise {noise:g}"] = float(np.median(found.bound / found.error))
    axes[0, 0].set_ylabel("retrieval error")
    axes[0, 1].legend(frameon=False, fontsize=9)
    for axis in axes[0]:
        axis.set_ylim(1e-11, 1e6)
    return figure, numbers


def draw_capacity(quick: bool) -> tuple[Figure, Numbers]:
    """Draw the number of random patterns that are retrieved against their width, beside theorem, estimate and fit."""
    setting: dict[str, Any] = {"beta": 1.0, "radius_factor": 1.0}
    widths = (6, 8, 10, 12) if quick else (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
    draws = 2 if quick else 5
    retrieved = [measure_capacity(d, draws=draws, queries=64, chunk=1024, **setting) for d in widths]
    # The proof asks for all patterns; the last width is only larger for this curve, whose numbers are small.
    wider = (8, 16) if quick else (8, 12, 16, 20, 24, 28, 32)
    separated = [
        measure_capacity(d, draws=draws, queries=1024, chunk=1024, fraction=1.0, criterion="separated", **setting)
        for d in wider
    ]
    middle = [float(np.exp(np.mean(np.log(c.patterns)))) for c in retrieved]
    fit = fit_growth(widths, middle)
    every = np.arange(2, 101)
    estimate = [mean_field_capacity(int(d), **setting) for d in every]
    theorem = [proven_or_nan(int(d)) for d in every]

    figure, axes = new_figure(1, 1, width=7.2, height=4.6)
    axis = axes[0, 0]
    axis.semilogy(
        every,
        np.exp(fit.slope * every + fit.intercept),
        color=BLUE,
        linewidth=1,
        label=(f"fit to the measured: ln N = ({fit.slope:.3f} ± {fit.slope_error:.3f}) d − {-fit.intercept:.2f}"),
    )
    axis.semilogy(every, estimate, "--", color=GREEN, linewidth=1, label="mean-field estimate")
    for place, capacity in zip(widths, retrieved, strict=True):
        axis.semilogy([place] * draws, capacity.patterns, "o", color=BLUE, markersize=4, markeredgecolor="white")
    axis.semilogy([], [], "o", color=BLUE, markersize=5, label="measured: half of the patterns to within 0.1 M")
    centre = [float(np.exp(np.mean(np.log(c.patterns)))) for c in separated]
    axis.semilogy(wider, centre, "^", color=ORANGE, markersize=5, label="measured: all well separated (Eq. 142)")
    axis.semilogy(every, theorem, color=RED, linewidth=2, label="proved for all with probability 0.999 (Theorem 3)")
    axis.semilogy(every, [classical_capacity(int(d)) for d in every], ":", color=INK, label="classical, 0.138 d")
    axis.set(xlabel="dimension d", ylabel="patterns N", xlim=(0, 80), ylim=(0.7, 1e12))
    axis.set_title("Random patterns on the sphere of radius √(d − 1), β = 1", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.47))
    speaks = every[np.isfinite(theorem)]
    numbers: Numbers = {
        "widths measured": f"{widths[0]} to {widths[-1]}",
        "slope of ln N with d": fit.slope,
        "its standard error": fit.slope_error,
        "slope of the estimate over the same widths": float(
            np.polyfit(widths, [math.log(mean_field_capacity(d, **setting)) for d in widths], 1)[0]
        ),
        "slope of the estimate for large d": capacity_exponent(**setting),
        "slope of Theorem 3 at d = 100": float(np.log(theorem[-1] / theorem[-2])),
        "residual of ln N: exponential law": fit.exponential_residual,
        "residual of ln N: power law": fit.power_residual,
        "residual of ln N: linear law": fit.linear_residual,
        "first width of which Theorem 3 says something": int(speaks[0]),
        "theorem there": float(theorem[int(speaks[0]) - 2]),
    }
    for d, capacity in zip(widths, retrieved, strict=True):
        numbers[f"patterns retrieved, d {d}"] = span(np.asarray(capacity.patterns))
    for d, capacity in zip(wider, separated, strict=True):
        numbers[f"patterns well separated, d {d}"] = span(np.asarray(capacity.patterns))
    return figure, numbers


def proven_or_nan(features: int) -> float:
    """Return the number of Theorem 3, NaN where it is silent."""
    try:
        return storage_capacity(features, beta=1.0, radius_factor=1.0, failure_probability=0.001).patterns
    except ValueError:
        return math.nan


def draw_basins(quick: bool) -> tuple[Figure, Numbers]:
    """Draw measured basin radii against the number of patterns, beside the radii that are proved."""
    rng = np.random.default_rng(0)
    counts = (4, 32) if quick else (2, 8, 32, 128)
    features, radius, beta, shown = 24, 6.0, 1.0, 64
    patterns = sphere(rng, counts[-1], features, radius=radius)
    rows = []
    for count in counts:
        stored = patterns[:count]
        basin = jax.device_get(basin_radius(stored, beta=beta, directions=4, update_steps=20, bisections=10))
        proven = jax.device_get(proven_radius(stored, beta=beta))
        apart = np.linalg.norm(np.asarray(stored)[:shown, None] - np.asarray(stored), axis=-1)
        apart = np.where(apart > 0, apart, np.inf).min(axis=-1)
        rows.append(
            [np.median(x[:shown]) for x in (basin.smallest, proven.widest, proven.sphere)] + [np.median(apart) / 2]
        )
    smallest, widest, ball, half = np.where(np.asarray(rows) > 0, rows, np.nan).T
    figure, axes = new_figure(1, 1, width=6.2, height=4.2)
    axis = axes[0, 0]
    axis.loglog(counts, half / radius, ":", color=INK, label="half the distance to the nearest pattern")
    axis.loglog(counts, smallest / radius, "o-", color=BLUE, label="measured, worst direction")
    axis.loglog(counts, widest / radius, "s-", color=GREEN, label="widest radius of the paper's argument")
    axis.loglog(counts, ball / radius, "^-", color=RED, label="the paper's sphere, 1 / (β N M)")
    axis.set_title(f"Basins of random patterns, d = {features}, M = {radius:g}, β = 1", fontsize=10)
    axis.set(xlabel="patterns N", ylabel="radius in units of M")
    axis.set_ylim(1e-5, 2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    numbers: Numbers = {}
    for i, count in enumerate(counts):
        numbers[f"radius / M, N {count}"] = (
            f"measured {smallest[i] / radius:.3f}, argument {widest[i] / radius:.3f}, sphere {ball[i] / radius:.2g}, "
            f"halfway {half[i] / radius:.3f}"
        )
    numbers["smallest of measured / proven"] = float(np.nanmin(smallest / widest))
    return figure, numbers


# The heads of a small model. ------------------------------------------------------------------------------------------


@functools.cache
def digits_apart() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images `[images, 64]` that scikit-learn ships, their digits, and which, a random third, are for tests."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    held_out = np.random.RandomState(0).permutation(len(digits)) < len(digits) // 3
    return (images / 16 - 0.3).astype(np.float32), digits, held_out


def digit_bags(rng: np.random.Generator, count: int, size: int, *, test: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return bags `[count, size, 64]` of handwritten digits, and whether each holds a nine, as every second does.

    Test bags and others are drawn of different images.
    """
    images, digits, held_out = digits_apart()
    nines, others = (np.flatnonzero(((digits == 9) == nine) & (held_out == test)) for nine in (True, False))
    bags = images[rng.choice(others, (count, size))]
    labels = np.arange(count) % 2
    bags[labels == 1, 0] = images[rng.choice(nines, int(labels.sum()))]
    return jnp.asarray(bags), jnp.asarray(labels, jnp.int32)


def draw_heads(quick: bool) -> tuple[Figure, Numbers]:
    """Train a pooling to tell bags of digits with a nine from others; draw how many digits each head averages."""
    import optax

    size, num_heads, steps = 64, 8, 30 if quick else 300
    rng = np.random.default_rng(0)
    model = HopfieldBagClassifier(2, 64, HopfieldPooling(Hopfield(num_heads=num_heads, head_dim=8)))
    bags, labels = digit_bags(np.random.default_rng(1), 100 if quick else 400, size, test=True)
    params = jax.jit(model.init)(jax.random.key(0), bags[:1])["params"]
    optimiser = optax.adam(2e-3)

    @jax.jit
    def step(params: Any, state: Any, bags: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, bags)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    look = jax.jit(functools.partial(model.apply, mutable="intermediates"))
    state, trained = optimiser.init(params), params
    for _ in range(steps):
        trained, state = step(trained, state, *digit_bags(rng, 64, size))
    figure, axes = new_figure(1, 3, width=10.5, height=3.6)
    panels = (
        ("before training", params, labels >= 0),
        ("trained, bags with a nine", trained, labels == 1),
        ("trained, bags without", trained, labels == 0),
    )
    numbers: Numbers = {"digits in a bag": size}
    order: list[int] = []
    for axis, (title, values, chosen) in zip(axes[0], panels, strict=True):
        logits, sown = look({"params": values}, bags[chosen])
        rows = analyse_heads(sown)
        # Heads keep their places from the second panel on, which has something to sort by.
        if values is trained:
            order = order or sorted(range(num_heads), key=lambda head: (-rows[head].patterns, -rows[head].entropy))
        rows = tuple(rows[head] for head in order or range(num_heads))
        weights = sown["intermediates"]["pooling"]["hopfield"]["association"][0]
        sizes = np.asarray(patterns_for_mass(weights))[..., 0]
        bodies = axis.violinplot([sizes[:, row.head] for row in rows], showextrema=False, widths=0.85)["bodies"]
        for place, (body, row) in enumerate(zip(bodies, rows, strict=True), start=1):
            colour = CLASSES[row.operating_class]
            body.set(facecolor=colour, edgecolor="none", alpha=0.6)
            # A violin of equal numbers has no height.
            axis.plot([place - 0.4, place + 0.4], [row.patterns] * 2, color=colour, linewidth=3, alpha=0.6)
            middle = (place, row.patterns)
            axis.annotate(f"{row.patterns:g}", middle, fontsize=8, ha="center", va="center", weight="bold")
            numbers[f"{title}, head {place}"] = (
                f"class {row.operating_class}, k {row.patterns:g} ({row.quartiles[0]:g} to {row.quartiles[1]:g}), "
                f"entropy {row.entropy:.2f}, single {row.single:.2f}"
            )
        for top, bottom, label in ((1, 2, "I"), (2, 8, "II"), (8, 32, "III"), (32, 91, "IV")):
            axis.axhline(size / bottom, color=GREY, linewidth=0.7, linestyle=":")
            axis.annotate(label, (0.15, size / math.sqrt(top * bottom)), fontsize=8, color=GREY, va="center")
        accuracy = float(jnp.mean(jnp.argmax(logits, axis=-1) == labels[chosen]))
        numbers[f"{title}, accuracy"] = accuracy
        axis.set_yscale("log", base=2)
        axis.set_title(f"{title} (accuracy {accuracy:.2f})", fontsize=10)
        axis.set(xlabel="head", ylim=(0.7, size * 1.3))
        axis.set(xlim=(0, num_heads + 0.7), xticks=range(1, num_heads + 1))
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("digits k with 0.9 of the weights")
    return figure, numbers


PICTURES: dict[str, Callable[[bool], tuple[Figure, Numbers]]] = {
    "hopfield_landscape": draw_landscape,
    "hopfield_energy": draw_energy,
    "hopfield_errors": draw_errors,
    "hopfield_capacity": draw_capacity,
    "hopfield_basins": draw_basins,
    "hopfield_heads": draw_heads,
}


def shown(value: Any) -> str:
    """Return a number as the table has it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> dict[str, Numbers]:
    """Draw all pictures into the folder, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.hopfield_figures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/hopfield_figures"), help="folder for pictures and JSON")
    parser.add_argument("--quick", action="store_true", help="the same with fewer points, in seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Numbers] = {}
    for name, draw in PICTURES.items():
        began = time.perf_counter()
        figure, numbers = draw(options.quick)
        figure.savefig(options.out / f"{name}.png", dpi=100)
        everything[name] = numbers
        print(f"\n{name}.png  ({time.perf_counter() - began:.0f} s)")
        for label, value in numbers.items():
            print(f"  {label:<58} {shown(value)}")
    (options.out / "numbers.json").write_text(json.dumps(everything, indent=2) + "\n")
    print(f"\nwritten to {options.out}")
    return everything


if __name__ == "__main__":
    main()
