"""Assemble broken jugs from posed fragments: equivariant assembly beside a PointNet and closest points.

Command:  python -m train configs/se3_assembly_fragments.py
Expected: 65 degrees of error between the fragments (median 54) and 46 in the jug's frame, after 2,400 steps and seven
          minutes of processor time on one core; 125 by chance, 119 by closest points on an average jug, and 125 with
          the PointNet. No fragment lies near enough to count as placed; see docs/assembly.md.

One kind of solid with a pose in common, as in the published benchmark: jugs of random proportions, broken in two along
a jagged cut in any direction. Each fragment is centred, turned at random and sampled with noise; the network says how
both go back. Errors are those of the smaller fragment in the frame of the larger one, and of both in the jug's frame.
`python -m tools.assembly_table` trains network and rival in the same loop, and draws what comes out.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator

from configs.umereg_fragments import closest_points
from jaxlayers.equivariant.frame_averaging import PointNet
from jaxlayers.equivariant.se3_assembly import (
    Poses,
    SE3Assembly,
    chamfer_distance,
    frame_loss,
    part_accuracy,
    place,
    relative_to,
    rotation_angle,
    rotation_from_vectors,
    translation_loss,
)
from jaxlayers.equivariant.vn_dgcnn import VNDGCNNEncoder
from jaxlayers.geometry.groups import SpecialEuclidean
from jaxlayers.testing import Symmetry
from train.config import Apply, Batch, Config, Evaluated, Optim, Task

POINTS, DENSE, NOISE = 64, 1200, 0.01
# No fragment has less of the surface than this.
SMALLEST = 0.35


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    held_out = Fragments(8 if smoke else 100, seed=1)
    return Config(
        title="Assembly of broken jugs",
        model=assembly(),
        rivals={"PointNet": PointNetAssembly()},
        task=task(),
        train_data=Fragments(32 if smoke else 3000, seed=0),
        test_data=held_out,
        train_transform=turned,
        steps=4 if smoke else STEPS,
        batch_size=8 if smoke else 16,
        eval_batch_size=8 if smoke else 50,
        optim=Optim(learning_rate=4e-3, warmup_steps=2 if smoke else 60, weight_decay=0.0),
        log_every=2 if smoke else 50,
        eval_every=4 if smoke else 800,
        metric="rotation_degrees",
        mode="min",
        # Another motion for each fragment is tested with the layer; here all of them move together.
        symmetries=(Symmetry(SpecialEuclidean(3), inputs=("points",), output="vectors"),),
        symmetry_examples=8,
        baselines=lambda: baselines(held_out, 2 if smoke else 40),
    )


STEPS = 2400


def assembly() -> SE3Assembly:
    """Return the network."""
    encoder = VNDGCNNEncoder(stages=((12,), (12,)), embed_features=24, num_neighbors=8)
    return SE3Assembly(encoder, hidden_features=(64, 32))


class PointNetAssembly(nn.Module):
    """Predict poses with a PointNet of each fragment and the mean over all: the control without symmetry.

    Attributes:
      features: widths of the perceptron of every point.
      hidden_features: width of the perceptron of every fragment.
    """

    features: Sequence[int] = (32, 64, 128)
    hidden_features: int = 64

    @nn.compact
    def __call__(self, parts: jax.Array, *, deterministic: bool = True) -> Poses:
        """Return the poses of parts `[*batch, parts, points, 3]`."""
        del deterministic
        centroids = jnp.mean(parts, axis=-2)
        x = PointNet(0, self.features, (self.hidden_features,))(parts - centroids[..., None, :])
        x = jnp.concatenate([x, jnp.broadcast_to(jnp.mean(x, axis=-2, keepdims=True), x.shape)], axis=-1)
        x = nn.Dense(9)(nn.relu(nn.Dense(self.hidden_features)(x)))
        vectors = x[..., :6].reshape(*x.shape[:-1], 2, 3)
        rotations, margins = rotation_from_vectors(vectors)
        return Poses(rotations, x[..., 6:], centroids, margins, vectors)


# The task -----------------------------------------------------------------------------------------------------------


def task() -> Task:
    """Return the task: frames and places of the fragments, measured in the frame of the first."""

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, dict[str, Any]]:
        del key
        found = apply(batch["parts"])
        frames = frame_loss(found.vectors, batch["rotation"])
        places = translation_loss(found.translations, batch["translation"])
        return frames + 4 * places, {"frames": frames, "places": places}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        return Evaluated(measure(batch, apply(batch["parts"])))

    return Task(
        inputs=lambda batch: (batch["parts"],), loss=loss, evaluate=evaluate, logits=lambda found: found.vectors
    )


def truth(batch: Batch) -> Poses:
    """Return the poses that the fragments have in the jug."""
    centroids = jnp.mean(jnp.asarray(batch["parts"]), axis=-2)
    return Poses(jnp.asarray(batch["rotation"]), jnp.asarray(batch["translation"]), centroids)


def measure(batch: Batch, found: Poses) -> dict[str, jax.Array]:
    """Return the errors of each jug: of all but the largest fragment in the frame of that one, then of all absolutely.

    Rotations in degrees; translations as distances of centroids, and their share across the mirror plane; the share of
    the other fragments within a Chamfer distance of 0.01 of their place, and the Chamfer distance of the whole.
    """
    parts, wanted = jnp.asarray(batch["parts"]), truth(batch)
    one, other = relative_to(found), relative_to(wanted)
    placed, right = place(parts, one), place(parts, other)
    whole = (*parts.shape[:-3], -1, 3)
    off = found.translations - wanted.translations
    return {
        "rotation_degrees": jnp.rad2deg(jnp.mean(rotation_angle(one.rotations, other.rotations)[..., 1:], axis=-1)),
        "translation": jnp.mean(jnp.linalg.norm((one.translations - other.translations)[..., 1:, :], axis=-1), axis=-1),
        "part_accuracy": part_accuracy(placed[..., 1:, :, :], right[..., 1:, :, :]),
        "chamfer": chamfer_distance(placed.reshape(whole), right.reshape(whole)),
        "absolute_degrees": jnp.rad2deg(jnp.mean(rotation_angle(found.rotations, wanted.rotations), axis=-1)),
        "absolute_translation": jnp.mean(jnp.linalg.norm(off, axis=-1), axis=-1),
        "across": jnp.mean(jnp.abs(off[..., 2]), axis=-1),
    }


# The rivals ---------------------------------------------------------------------------------------------------------


def baselines(source: "Fragments", count: int) -> dict[str, float]:
    """Return the mean errors of the methods that learn nothing."""
    batch = batch_of(source, count)
    return {
        f"{title} {name}": float(jnp.mean(value))
        for title, solve in BASELINES.items()
        for name, value in measure(batch, solve(batch)).items()
    }


def batch_of(source: "Fragments", count: int) -> dict[str, np.ndarray]:
    """Return the first records as one batch."""
    records = [source[index] for index in range(count)]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def untouched(batch: Batch) -> Poses:
    """Return the pose of no turn, centroids in the middle: chance."""
    centroids = np.mean(batch["parts"], axis=-2)
    turns = np.broadcast_to(np.eye(3, dtype=np.float32), (*centroids.shape, 3))
    return Poses(jnp.asarray(turns), jnp.zeros(centroids.shape), jnp.asarray(centroids))


def onto_each_other(batch: Batch) -> Poses:
    """Return poses by closest points of every fragment and the first, which stays."""
    return _each(batch, lambda parts, part: None if part is parts[0] else parts[0])


def onto_template(batch: Batch) -> Poses:
    """Return poses by closest points of every fragment and a whole jug of average proportions."""
    template = jug(np.random.RandomState(0), DENSE, spread=0.0)
    return _each(batch, lambda parts, part: template)


BASELINES = {
    "as they lie": untouched,
    "ICP on each other": onto_each_other,
    "ICP on the average jug": onto_template,
}


def _each(batch: Batch, target: Any) -> Poses:
    """Return the poses of the best of 24 ICPs of each part onto its target; `None` leaves it where it is."""
    turns, places = np.zeros((2, *np.shape(batch["rotation"])), np.float32)
    for at, parts in enumerate(np.asarray(batch["parts"])):
        for number, part in enumerate(parts):
            onto = target(parts, part)
            turn, shift = np.eye(3), np.zeros(3)
            if onto is not None:
                record = {"source": part, "target": onto}
                tried = (closest_points(record, start, steps=20, kept=1.0) for start in turns_of_cube())
                turn, shift = min(tried, key=lambda result: result[0])[1]
            turns[at, number] = turn
            places[at, number, 0] = turn @ part.mean(axis=0) + shift
    return Poses(jnp.asarray(turns), jnp.asarray(places[:, :, 0]), jnp.mean(jnp.asarray(batch["parts"]), axis=-2))


@functools.cache
def turns_of_cube() -> tuple[np.ndarray, ...]:
    """Return the 24 rotations of a cube."""
    swaps = (np.eye(3)[list(order)] for order in itertools.permutations(range(3)))
    every = (np.diag(signs) @ swap for swap in swaps for signs in itertools.product((1, -1), repeat=3))
    return tuple(matrix for matrix in every if np.linalg.det(matrix) > 0)


# The jugs -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fragments:
    """A source of jugs in two fragments, each centred and turned for itself, the larger one first.

    Records are {"parts": float32 [2, 64, 3], "rotation": float32 [2, 3, 3], "translation": float32 [2, 3]}: what
    puts the fragments back, R x + t. A jug is made when it is first asked for and then kept.

    Attributes:
      count: number of jugs.
      seed: of all of them.
    """

    count: int
    seed: int

    def __len__(self) -> int:
        """Return the number of jugs."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return the fragments of a jug."""
        return dict(_fragments(self.seed, int(index), POINTS))


@functools.cache
def _fragments(seed: int, index: int, points: int) -> Mapping[str, np.ndarray]:
    # RandomState, unlike Generator, promises the same stream in every NumPy release.
    rng = np.random.RandomState([seed, index])
    while True:
        surface = jug(rng, DENSE)
        pieces = broken(surface, rng)
        if len(pieces[1]) >= SMALLEST * len(surface):
            break
    parts = np.stack([piece[rng.choice(len(piece), points, replace=False)] for piece in pieces])
    parts = parts + NOISE * rng.normal(size=parts.shape)
    centres = parts.mean(axis=1)
    turns = np.stack([_turn(rng.normal(size=4)) for _ in pieces])
    record = {"parts": (parts - centres[:, None]) @ turns, "rotation": turns, "translation": centres}
    return {name: value.astype(np.float32) for name, value in record.items()}


def turned(record: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the record with every fragment turned anew, so that no network learns poses by heart."""
    turns = np.stack([_turn(generator.normal(size=4)) for _ in record["parts"]]).astype(np.float32)
    return {**record, "parts": record["parts"] @ turns, "rotation": record["rotation"] @ turns}


def _turn(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation of a quaternion of any length; normal ones give all rotations alike."""
    w, *v = quaternion / np.linalg.norm(quaternion)
    cross = np.cross(np.eye(3), v)
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def jug(rng: np.random.RandomState, count: int, *, spread: float = 1.0) -> np.ndarray:
    """Return points of the surface of a jug in the canonical pose, float64 `[about count, 3]`.

    The body is a surface of revolution about y, which points up, the spout lies towards +x and the handle towards -x;
    z = 0 is a mirror plane. The axes that a network must find from a fragment are then in that plane, where it can see
    them: a fragment and its mirror image have the same x and y but opposite z, and vectors that turn with reflections
    too, as those of vector neurons, can be x and y but not z.

    Args:
      rng: gives proportions and points.
      count: about how many points, evenly over the surface.
      spread: share of the ranges of all proportions that is used; 0 = the average jug.
    """

    def between(low: float, high: float) -> float:
        return (low + high) / 2 + spread * (high - low) * (rng.uniform() - 0.5)

    height, belly, neck = between(1.3, 1.9), between(0.5, 0.8), between(0.25, 0.5)
    profile = PchipInterpolator(
        [0, between(0.25, 0.5), between(0.7, 0.85), 1], [between(0.3, 0.55), belly, neck, neck * between(1.0, 1.4)]
    )
    u = np.linspace(0, 1, 101)
    radius = profile(u)
    low, high, start = between(0.2, 0.35), between(0.7, 0.9), between(0.2, 0.4)
    grip = [
        [-0.9 * profile(low), low * height],
        [-belly - between(0.4, 0.8), (low + high) / 2 * height],
        [-0.9 * profile(high), high * height],
    ]
    spout = [
        [0.8 * profile(start), start * height],
        [belly + between(0.0, 0.4), (start + 0.1) * height],
        [belly + between(0.3, 0.6), between(0.7, 1.0) * height],
    ]
    thick = between(0.08, 0.14)
    tubes = [(grip, (thick, thick)), (spout, (between(0.16, 0.26), between(0.1, 0.16)))]
    # As many points as there is area: of each piece, and along the profile.
    areas = 2 * np.pi * radius * np.hypot(height, np.gradient(radius, u)) / len(u)
    sizes = [areas.sum(), np.pi * radius[0] ** 2]
    for path, width in tubes:
        way = np.diff(_curve(path, u)[0], axis=0)
        sizes.append(2 * np.pi * np.mean(width) * np.linalg.norm(way, axis=-1).sum())
    piece = rng.choice(4, count, p=np.asarray(sizes) / np.sum(sizes))
    angle, along = rng.uniform(0, 2 * np.pi, count), rng.uniform(size=count)
    level = np.interp(along, np.cumsum(areas) / areas.sum(), u)
    x = _ring(np.where(piece == 0, profile(level), radius[0] * np.sqrt(along)), angle, (piece == 0) * level * height)
    for number, (path, width) in enumerate(tubes):
        on = piece == number + 2
        middle, normal = _curve(path, along[on])
        wide = width[0] + (width[1] - width[0]) * along[on]
        x[on, :2] = middle + normal * (wide * np.cos(angle[on]))[:, None]
        x[on, 2] = wide * np.sin(angle[on])
    hidden = (piece > 1) & (np.hypot(x[:, 0], x[:, 2]) < profile(np.clip(x[:, 1] / height, 0, 1))) & (x[:, 1] < height)
    return (x - [0, height / 2, 0])[~hidden]


def _ring(radius: np.ndarray, angle: np.ndarray, level: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), level, radius * np.sin(angle)], axis=-1)


def _curve(path: Sequence[Sequence[float]], s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return points and unit normals of the quadratic Bezier curve of three points in the plane."""
    a, b, c = np.asarray(path, float)
    s = s[:, None]
    way = (1 - s) * (b - a) + s * (c - b)
    way /= np.linalg.norm(way, axis=-1, keepdims=True)
    return (1 - s) ** 2 * a + 2 * s * (1 - s) * b + s**2 * c, way[:, ::-1] * [-1, 1]


def broken(surface: np.ndarray, rng: np.random.RandomState) -> list[np.ndarray]:
    """Return the two sides of a jagged cut near the middle, in any direction; the larger one first."""
    local = surface @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    level = local[:, 0] - local[:, 0].mean() - rng.uniform(-0.1, 0.1)
    for _ in range(4):
        way, frequency = rng.normal(size=2), rng.uniform(3, 12)
        wave = frequency * local[:, 1:] @ (way / np.linalg.norm(way)) + rng.uniform(0, 2 * np.pi)
        level += 0.25 / frequency * np.sin(wave)
    return sorted((surface[level > 0], surface[level <= 0]), key=len, reverse=True)
