"""Recognise simulated solids in any pose after seeing them in one: PointNet averaged over frames, beside the bare one.

Command:  python -m train configs/frame_averaging_points.py
Expected: test accuracy 0.9989 turned and 0.9989 upright; the bare PointNet 1.0000 upright and 0.1011 turned, the chance
          of nine classes. Under three minutes of processor time on two CPU cores for both.

Nine classes of surfaces, stretched at random along their axes, are sampled with noise. Training clouds all stand
in the same pose; the test set turns each by a random rotation of SO(3) and moves it. Two of the classes are mirror
images of each other (left- and right-handed helices), so the group is SE(3): a model invariant to reflections could not
tell them apart. The rival is the same PointNet without frames, trained in the same way; it is also evaluated, as
`upright`, on test clouds in the pose of training, where it does well.
"""

from collections.abc import Callable

import numpy as np

from jaxlayers.equivariant import PointNet
from jaxlayers.equivariant.frame_averaging import frame_pointnet
from jaxlayers.testing import SpecialEuclidean, Symmetry
from train.config import Config, Optim
from train.data import Source, arrays
from train.tasks import classification

POINTS = 128
NOISE = 0.02
Shape = Callable[[np.random.Generator, int], np.ndarray]


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    classes, features, hidden_features = len(SHAPES), (32, 64, 128), (64,)
    train, test = (180, 90) if smoke else (3600, 900)
    return Config(
        title="Frame averaging on turned solids",
        model=frame_pointnet(classes, features, hidden_features, group="SE(d)"),
        rivals={"bare PointNet": PointNet(classes, features, hidden_features)},
        task=classification(classes, inputs=("points",), label="label"),
        train_data=solids(train, seed=0, turned=False),
        test_data=solids(test, seed=1, turned=True),
        extra_tests={"upright": solids(test, seed=1, turned=False)},
        steps=40 if smoke else 600,
        batch_size=64,
        eval_batch_size=90,
        optim=Optim(learning_rate=2e-3, warmup_steps=10 if smoke else 100, weight_decay=0.01),
        log_every=10,
        eval_every=20 if smoke else 200,
        metric="accuracy",
        labels=tuple(SHAPES),
        symmetries=(Symmetry(SpecialEuclidean(3), inputs=("points",)),),
    )


def solids(count: int, *, seed: int, turned: bool) -> Source:
    """Return `count` clouds, as many of each class, as records {"points": float32 [128, 3], "label": int32}.

    Clouds of the same seed differ by their pose only.
    """
    rng, poses = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    group = SpecialEuclidean(3)
    clouds, labels = [], []
    for index in range(count):
        label = index % len(SHAPES)
        cloud = list(SHAPES.values())[label](rng, POINTS) * rng.uniform([0.8, 0.55, 0.35], [1.0, 0.7, 0.45])
        cloud = cloud + NOISE * rng.normal(size=cloud.shape)
        clouds.append(group.act(group.sample(poses), cloud, "points") if turned else cloud)
        labels.append(label)
    return arrays(points=np.asarray(clouds, np.float32), label=np.asarray(labels, np.int32))


def ellipsoid(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points of the unit sphere."""
    x = rng.normal(size=(count, 3))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def box(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points of the surface of a cube."""
    x = rng.uniform(-1, 1, (count, 3))
    x[np.arange(count), rng.integers(3, size=count)] = rng.choice([-1, 1], count)
    return 0.8 * x


def cylinder(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points of an open tube along the first axis."""
    angle = rng.uniform(0, 2 * np.pi, count)
    return np.stack([rng.uniform(-1, 1, count), np.cos(angle), np.sin(angle)], axis=-1)


def cone(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points of an open cone along the first axis."""
    angle, radius = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0, 1, count))
    return np.stack([1 - 2 * radius, radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def torus(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points of a torus around the last axis."""
    around, tube = rng.uniform(0, 2 * np.pi, (2, count))
    radius = 0.75 + 0.25 * np.cos(tube)
    return np.stack([radius * np.cos(around), radius * np.sin(around), 0.25 * np.sin(tube)], axis=-1)


def helix(hand: int) -> Shape:
    """Return a sampler of a wire wound twice around the first axis, right-handed for `hand=1`, left-handed for -1."""

    def points(rng: np.random.Generator, count: int) -> np.ndarray:
        along, phase = rng.uniform(-1, 1, count), rng.uniform(0, 2 * np.pi)
        angle = 2 * np.pi * along + phase
        return np.stack([along, np.cos(angle), hand * np.sin(angle)], axis=-1)

    return points


def cross(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points of three bars along the axes."""
    x = rng.uniform(-0.12, 0.12, (count, 3))
    x[np.arange(count), rng.integers(3, size=count)] = rng.uniform(-1, 1, count)
    return x


def tetrahedron(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points of the surface of a tetrahedron."""
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = np.array([np.delete(np.arange(4), skip) for skip in rng.integers(4, size=count)])
    return np.einsum("nk,nkd->nd", rng.dirichlet(np.ones(3), count), corners[faces])


SHAPES: dict[str, Shape] = {
    "ellipsoid": ellipsoid,
    "box": box,
    "cylinder": cylinder,
    "cone": cone,
    "torus": torus,
    "left helix": helix(-1),
    "right helix": helix(1),
    "cross": cross,
    "tetrahedron": tetrahedron,
}
