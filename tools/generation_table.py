"""Measure what generators make, along their training: Frechet distances, sample grids, power spectra.

    python -m tools.generation_table

Trains the two StyleSwin configs in runs/generation (a run that is there is read, not repeated), and writes
docs/generation.md with its pictures. The features of the Frechet distance are those of a small network that is trained
here: for digits it tells the digit, for crops the photograph that a crop was cut from.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train import checkpoint, loop
from train import config as configs
from train.config import Config
from train.data import digits
from train.photographs import PHOTOGRAPHS, photograph

ROOT = Path(__file__).parents[1]


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the squared Frechet distance of the normal distributions with the samples' means and covariances.

    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^(1/2) S_y S_x^(1/2))^(1/2)), in float64, roots by eigenvalues.

    Args:
      x: features `[samples, features]`.
      y: others; as many features.

    Raises:
      ValueError: if the samples are not two matrices of equally many columns and at least two rows.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"samples of shapes {x.shape} and {y.shape} must be [samples, features], at least two and with equal "
            "features; pass such"
        )
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    one, two = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (x, y))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # The eigenvalues are those of S_x S_y; rounding may leave some below zero.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ two @ root), 0)).sum()
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(one) + np.trace(two) - 2 * shared)


def power_spectrum(x: np.ndarray) -> np.ndarray:
    """Return the mean power at each whole number of periods along an axis of square pictures `[n, side, side, c]`.

    |DFT|^2 / side^2 of every row and column from which its mean is taken, averaged.

    Raises:
      ValueError: if the pictures are not square.
    """
    if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise ValueError(f"pictures of shape {x.shape} must be [n, side, side, channels]; crop them")
    lines = np.concatenate([np.moveaxis(x, axis, -1).reshape(-1, x.shape[1]) for axis in (1, 2)])
    lines = lines - lines.mean(axis=1, keepdims=True)
    return (np.abs(np.fft.rfft(lines)) ** 2).mean(axis=0) / x.shape[1] ** 2


def block_peak(x: np.ndarray, period: int) -> float:
    """Return how much a pattern of that period stands out of the spectrum of the steps between neighbours.

    A seam between windows is a step that is larger than others at every window's border, in all pictures alike. With
    d[i] the mean over pictures of |x[i + 1] - x[i]| along an axis, cut to whole periods, it is the largest power of d
    at a multiple of 1 / period over the median at the frequencies that are none; both axes are averaged.

    Raises:
      ValueError: if pictures have fewer than three periods, one of which is cut off at the border: with one alone every
        frequency is a multiple.
    """
    if min(x.shape[1:3]) < 3 * period:
        raise ValueError(
            f"pictures of {x.shape[1:3]} must be at least {3 * period} wide for period={period}; set period"
        )
    found = []
    for axis in (1, 2):
        steps = np.moveaxis(np.abs(np.diff(x, axis=axis)), axis, -1)
        profile = steps.reshape(-1, steps.shape[-1]).mean(axis=0)
        # From the middle of a window on, so that all borders are inside.
        start = period // 2
        profile = profile[start : start + (len(profile) - start) // period * period]
        power = np.abs(np.fft.rfft(profile - profile.mean())) ** 2
        every = len(profile) // period
        places = np.arange(1, len(power))
        found.append(power[places[places % every == 0]].max() / np.median(power[places[places % every != 0]]))
    return float(np.mean(found))


def spectral_peak(x: np.ndarray, period: int) -> float:
    """Return how much the power spectrum stands out where a pattern of that period has its power.

    It is the largest ratio of the power at a multiple of side / period to the geometric mean of that at the two
    frequencies beside it; near 1 in a smooth spectrum. Lines at every border show in it. Seams between flat blocks do
    not: a step function with steps at all borders has no power there, for which there is `block_peak`.

    Raises:
      ValueError: if the period does not divide the side, or leaves no frequency between its multiples.
    """
    side = x.shape[1]
    if side % period or side < 2 * period or period < 3:
        raise ValueError(
            f"period={period} must be at least 3 and divide the side={side} twice or more; set period or crop"
        )
    power = power_spectrum(x)
    places = np.arange(side // period, side // 2, side // period)
    return float((power[places] / np.sqrt(power[places - 1] * power[places + 1])).max())


def ruled(x: np.ndarray, period: int) -> np.ndarray:
    """Return pictures with lines: the first row and column of each block of that side are brighter."""
    first = np.arange(x.shape[1]) % period == 0
    return x + 0.1 * (first[:, None] | first)[None, :, :, None]


def blocked(x: np.ndarray, period: int) -> np.ndarray:
    """Return pictures with seams: each block of that side has a random brightness added."""
    blocks = [length // period for length in x.shape[1:3]]
    offsets = np.random.RandomState(0).normal(0, 0.1, (len(x), *blocks, 1))
    return x + np.repeat(np.repeat(offsets, period, axis=1), period, axis=2)


class Features(nn.Module):
    """Classify pictures by three convolutions of stride 2; the features are what is before the last layer."""

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return logits and features."""
        x = 2 * x - 1
        for _ in range(3):
            x = nn.leaky_relu(nn.Conv(self.width, (3, 3), strides=2)(x), 0.2)
        x = nn.leaky_relu(nn.Dense(self.width)(x.mean(axis=(1, 2))), 0.2)
        return nn.Dense(self.num_classes)(x), x


def extractor(x: np.ndarray, labels: np.ndarray, steps: int) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Return a function from pictures to features, of a network trained to tell the labels, and its accuracy.

    The accuracy is that of the last tenth of the examples, which it is not trained on.
    """
    held = len(x) - len(x) // 10
    model = Features(int(labels.max()) + 1)
    optimiser = optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any, image: jax.Array, label: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits: Any = model.apply(params, image)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(x[:2]))
    state = optimiser.init(params)
    rng = np.random.RandomState(0)
    for _ in range(steps):
        chosen = rng.randint(held, size=64)
        params, state = step(params, state, jnp.asarray(x[chosen]), jnp.asarray(labels[chosen]))

    @jax.jit
    def both(image: jax.Array) -> Any:
        return model.apply(params, image)

    def features(image: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(both(jnp.asarray(part))[1]) for part in _parts(image)])

    logits = np.concatenate([np.asarray(both(jnp.asarray(part))[0]) for part in _parts(x[held:])])
    return features, float((logits.argmax(-1) == labels[held:]).mean())


def _parts(x: np.ndarray, size: int = 100) -> list[np.ndarray]:
    return [x[start : start + size] for start in range(0, len(x), size)]


@dataclasses.dataclass(frozen=True)
class Data:
    """One config with what it is measured by.

    Attributes:
      title: of the section.
      config: name of the file in configs/.
      labelled: returns pictures with labels that the feature network learns, in random order.
      tells: what those labels are.
      period: side of the window at the last stage.
      latent: length of the latent vectors.
    """

    title: str
    config: str
    labelled: Callable[[int], tuple[np.ndarray, np.ndarray]]
    tells: str
    period: int
    latent: int


def labelled_digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return doubled training digits and their digit, at most `count`."""
    from configs.styleswin_digits import doubled

    source = digits("train")
    order = np.random.RandomState(0).permutation(len(source))[:count]
    records = [doubled(source[int(index)]) for index in order]
    return np.stack([one["image"] for one in records]), np.stack([one["label"] for one in records])


def labelled_crops(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return crops of 64 pixels of the training photographs and the number of the photograph, equally many of each."""
    names, size, rng = PHOTOGRAPHS["train"], 64, np.random.RandomState(0)
    labels = np.arange(count) % len(names)
    crops = []
    for label in labels:
        picture = photograph(names[label])
        row, column = (rng.randint(length - size + 1) for length in picture.shape[:2])
        crops.append(picture[row : row + size, column : column + size].astype(np.float32) / 255)
    order = rng.permutation(count)
    return np.stack(crops)[order], labels[order]


DATA: Mapping[str, Data] = {
    "digits": Data("Digits", "styleswin_digits", labelled_digits, "the digit", 8, 32),
    "crops": Data("Crops of photographs", "styleswin_crops", labelled_crops, "the photograph", 8, 64),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """What a run is measured to be.

    Attributes:
      distances: Frechet distance of generated to training pictures by step of the training.
      halves: that of two halves of the training pictures.
      accuracy: of the feature network, on pictures it was not trained on.
      spectra: power of generated, training and blocked pictures by number of periods.
      peaks: how much the windows' period stands out of the steps between neighbours, of the same.
      lines: how much it stands out of the spectrum, of generated and training pictures and of such with lines.
      samples: number of pictures compared.
      seconds: of processor time of the training, if it was done here.
    """

    distances: dict[str, float]
    halves: float
    accuracy: float
    spectra: dict[str, list[float]]
    peaks: dict[str, float]
    lines: dict[str, float]
    samples: int
    seconds: float


def averaged(run: Path, step: int) -> Any:
    """Return the averaged parameters of a checkpoint."""
    (found,) = checkpoint.find_step(run, step)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.float32, sharding=place)
        for name, leaf in found.leaves.items()
        if name.startswith("ema/")
    }
    flat = {tuple(name.split("/")[1:]): array for name, array in found.read(wanted).items()}
    return flax.traverse_util.unflatten_dict(flat)


def measure(data: Data, config: Config, folder: Path, samples: int, feature_steps: int) -> tuple[Score, np.ndarray]:
    """Train a config, or read its run, and measure every checkpoint.

    Returns:
      The score, and pictures `[3, 24, side, side, channels]`: of the beginning, of the end, and real ones.
    """
    start = time.process_time()
    loop.train(config, folder, devices=jax.devices()[:1], silent=True)
    seconds = time.process_time() - start
    real, labels = data.labelled(2 * samples)
    features, accuracy = extractor(real, labels, feature_steps)
    latents = jax.random.normal(jax.random.key(1), (samples, data.latent))
    generate = jax.jit(lambda params, latent: config.model.apply({"params": params}, latent, method="generate"))

    def pictures(params: Any) -> np.ndarray:
        return np.concatenate([np.asarray(generate(params, part)) for part in _parts(np.asarray(latents))])

    batch = {"image": jnp.asarray(real[:4])}
    beginning = jax.jit(config.model.init)(jax.random.key(config.seed), *config.task.inputs(batch))["params"]
    known = features(real)
    made, distances = {"0": pictures(beginning)}, {}
    for found in sorted(checkpoint.find_step(folder), key=lambda found: found.number):
        made[str(found.number)] = pictures(averaged(folder, found.number))
    for step, pictures_of in made.items():
        distances[step] = frechet_distance(features(pictures_of), known)
    last = list(made.values())[-1]
    kinds = {"generated": last, "training": real, "training, blocked": blocked(real, data.period)}
    lined = {"generated": last, "training": real, "training, ruled": ruled(real, data.period)}
    repeats = real.shape[1] >= 3 * data.period
    score = Score(
        distances=distances,
        halves=frechet_distance(known[::2], known[1::2]),
        accuracy=accuracy,
        spectra={name: power_spectrum(x).tolist() for name, x in kinds.items()},
        peaks={name: block_peak(x, data.period) for name, x in kinds.items()} if repeats else {},
        lines={name: spectral_peak(x, data.period) for name, x in lined.items()} if repeats else {},
        samples=samples,
        seconds=seconds,
    )
    return score, np.stack([made["0"][:24], last[:24], real[:24]])


def draw(name: str, score: Score, pictures: np.ndarray, images: Path) -> None:
    """Draw the grids of pictures, and the curves."""
    images.mkdir(parents=True, exist_ok=True)
    rows, columns = 4, 6
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, title in enumerate(("before training", "after training", "training pictures")):
        axis = figure.add_subplot(1, 3, place + 1)
        side = pictures.shape[2]
        grid = pictures[place].reshape(rows, columns, side, side, -1).swapaxes(1, 2)
        grid = np.clip(grid.reshape(rows * side, columns * side, -1), 0, 1)
        axis.imshow(grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(images / f"generation_{name}.png", dpi=110)
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([int(step) for step in score.distances], list(score.distances.values()), "o-", label="generated")
    left.axhline(score.halves, color="gray", linestyle="--", label="two halves of the training pictures")
    left.set_yscale("log")
    left.set_xlabel("steps")
    left.set_ylabel("Frechet distance")
    left.legend(fontsize=8)
    for kind, power in score.spectra.items():
        right.plot(range(1, len(power)), power[1:], label=kind)
    right.set_yscale("log")
    right.set_xlabel("periods along an axis")
    right.set_ylabel("power")
    right.legend(fontsize=8)
    figure.savefig(images / f"generation_{name}_curves.png", dpi=90)


def markdown(scores: Mapping[str, Score]) -> str:
    """Return the tables."""
    blocks = []
    for name, score in scores.items():
        data = DATA[name]
        steps = list(score.distances)
        lines, peaks = (
            ", ".join(f"{kind} {peak:.{digits}f}" for kind, peak in found.items())
            for found, digits in ((score.lines, 2), (score.peaks, 1))
        )
        seams = (
            f"Power of the spectrum at multiples of 1 / {data.period}, the largest, over that beside it: {lines}. "
            f"Power of seams every {data.period} pixels over that at other frequencies: {peaks}."
        )
        blocks.append(
            "\n".join(
                [
                    f"## {data.title}",
                    "",
                    f"| steps | {' | '.join(steps)} | halves of the training pictures |",
                    "| --- |" + " --- |" * (len(steps) + 1),
                    f"| Frechet distance | {' | '.join(f'{score.distances[step]:.3f}' for step in steps)} "
                    f"| {score.halves:.3f} |",
                    "",
                    f"{score.samples} generated pictures, of the averaged parameters and the same latents at every "
                    f"step, against {2 * score.samples} training pictures (or all there are). The feature network "
                    f"tells {data.tells} with an accuracy of {score.accuracy:.2f} on pictures it has not seen.",
                    "",
                    seams if peaks else "The pictures are too small for seams to repeat: two windows along an axis.",
                    "",
                    f"![pictures](images/generation_{name}.png)",
                    "",
                    f"![Frechet distance and power spectrum](images/generation_{name}_curves.png)",
                ]
            )
        )
    return "\n\n".join(blocks)


DOCUMENT = """# Generation

    python -m tools.generation_table

A small StyleSwin (`jaxlayers/window/styleswin.py`) against a small wavelet discriminator, trained by
`configs/styleswin_digits.py` and `configs/styleswin_crops.py`: non-saturating loss, R1, the discriminator at four times
the generator's learning rate, averaged parameters. The Frechet distance is that of normal distributions fitted to the
features of a small network, which is trained here to classify the training pictures; its figures compare runs on this
page and no others. The power spectrum is the mean over rows and columns. Windows that mark their borders alike in all
pictures make peaks in it, at multiples of one over the window's side; training pictures with a brighter line at every
border show how large. Flat blocks make none there, but a seam: a step between neighbours that is larger at every
border. Its power is told as a ratio too, near that of the training pictures where there is no seam; training pictures
with a random brightness added to every block show what one looks like. Anything else of that period counts as a seam as
well, such as what is left of enlarging a map of 8 pixels three times.

{table}

{verdicts}
"""


def verdict(name: str, score: Score) -> str:
    """Say in words what the figures of a run are."""
    found = list(score.distances.values())
    rises = sum(later > earlier for earlier, later in itertools.pairwise(found))
    fallen = f"From first to last the distance of the {name} {'falls' if found[-1] < found[0] else 'does not fall'}"
    fallen += f" by a factor of {found[0] / found[-1]:.0f}" if found[-1] < found[0] else ""
    fallen += ", at every step shown." if not rises else f"; it rises {rises} of {len(found) - 1} times on the way."
    if score.peaks:
        more = score.peaks["generated"] / score.peaks["training"]
        peak = score.lines["generated"] > 1.1 * score.lines["training"]
        fallen += f" The spectrum of generated pictures has {'a' if peak else 'no'} peak at the windows' period."
        fallen += f" Seams are {more:.2g} times as strong in generated pictures as in training pictures."
    return fallen


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, write, print and return the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.generation_table", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", nargs="*", choices=list(DATA), default=list(DATA))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--feature-steps", type=int, default=400)
    parser.add_argument("--smoke", action="store_true", help="the configs' short forms")
    parser.add_argument("--runs", type=Path, default=Path("runs/generation"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    kept = options.runs / "scores.json"
    scores = {name: Score(**fields) for name, fields in json.loads(kept.read_text()).items()} if kept.exists() else {}
    for name in options.data:
        data = DATA[name]
        config = configs.load(ROOT / "configs" / f"{data.config}.py", smoke=options.smoke)
        score, pictures = measure(data, config, options.runs / name, options.samples, options.feature_steps)
        draw(name, score, pictures, options.docs / "images")
        scores[name] = score
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({key: dataclasses.asdict(one) for key, one in scores.items()}) + "\n")
    table = markdown(scores)
    (options.docs / "generation.md").write_text(
        DOCUMENT.format(table=table, verdicts=" ".join(verdict(name, scores[name]) for name in DATA if name in scores))
    )
    print(table)
    return table


if __name__ == "__main__":
    main()
