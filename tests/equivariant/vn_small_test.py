"""VN-small: vectors that turn exactly with a cloud, equal to the reference's, and networks that they make invariant."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.frame_averaging import PointNet
from jaxlayers.equivariant.learned_canonicalization import LearnedCanonicalization
from jaxlayers.equivariant.vn_small import VNSmall
from jaxlayers.geometry.groups import Orthogonal, Rotation, SpecialEuclidean, Symmetric
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant, assert_invariant
from tests.equivariant.vector_neurons_test import reference_weights, started
from tests.reference_files import check_file
from tests.round_trip import check_dialect

GOLDEN = Path(__file__).parents[1] / "golden" / "vn_small_parity.npz"


def clouds(rng, points=6):
    return rng.normal(size=(2, points, 3)) * [1.0, 0.7, 0.4]


def normals(rng):
    return clouds(rng), (rng.normal(size=(2, 6, 3)),), rng.normal(size=(2, 6, 1))


# Every point is a neighbour, so that half precision cannot choose others.
SMALL = VNSmall(features=5, num_neighbors=6)
SHARP = VNSmall(features=5, num_neighbors=4, pooling="max")

CASES = (
    Case(
        name="vn_small",
        module=SMALL,
        inputs=normals,
        symmetries=(
            Symmetry(
                Rotation(3),
                ("points", ("vectors",), None),
                "vectors",
                control=Orthogonal(3),
                reason="cross products keep their sign under a point reflection",
            ),
            Symmetry(Symmetric(6), ("points", ("set",), "set"), control=lambda x, v, s: x[:, 0]),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"positions of shape \(2, 6, 2\)", inputs=lambda rng: (rng.normal(size=(2, 6, 2)),)),
            BadInput(match=r"features=0, num_vectors=4 and num_neighbors=6 must be", module=SMALL.clone(features=0)),
            BadInput(match=r"dropout_rate=1.0 in \[0, 1\)", module=SMALL.clone(dropout_rate=1.0)),
            BadInput(
                match=r"vectors \[\(2, 5, 3\)\] and scalars None must belong to the points \(2, 6, 3\)",
                inputs=lambda rng: (clouds(rng), (rng.normal(size=(2, 5, 3)),)),
            ),
        ),
    ),
)


@pytest.mark.parametrize("module", [SMALL, SHARP], ids=["mean", "max"])
def test_vectors_turn_with_few_neighbours_and_either_pooling(module, rng):
    x = clouds(rng, 12).astype(np.float32)
    variables, apply = started(module.clone(num_neighbors=4), x)
    claim = functools.partial(assert_equivariant, representations=["points"], output="vectors", tolerance=1e-5)
    claim(functools.partial(apply, variables), Rotation(3), x)
    # The controls: reflections, and translations of points that were not centred.
    for group in (Orthogonal(3), SpecialEuclidean(3)):
        with pytest.raises(AssertionError):
            claim(functools.partial(apply, variables), group, x)


def test_network_behind_it_becomes_invariant(rng):
    backbone = PointNet(3, (8,), ())
    model = LearnedCanonicalization(backbone, SMALL, group="SE(d)")
    x = clouds(rng).astype(np.float32)
    variables, apply = started(model, x)
    claim = functools.partial(assert_invariant, representations=["points"], tolerance=1e-4)
    out = apply(variables, x)
    claim(functools.partial(apply, variables), SpecialEuclidean(3), x)
    assert float(jnp.max(jnp.abs(out[0] - out[1]))) > 1e-2
    # The controls: the same network alone, and the mirrored cloud.
    with pytest.raises(AssertionError):
        claim(lambda x: backbone.apply({"params": variables["params"]["backbone"]}, jnp.asarray(x)), Rotation(3), x)
    with pytest.raises(AssertionError):
        claim(functools.partial(apply, variables), Orthogonal(3), x)


def test_normals_and_charges_reach_it_through_the_canonicalisation(rng):
    class First(nn.Module):
        @nn.compact
        def __call__(self, points, vectors, numbers):
            return nn.Dense(2)(jnp.sum(points + vectors, axis=-2))

    model = LearnedCanonicalization(First(), SMALL, group="SO(d)", representations=("points", "vectors", "set"))
    x, (v,), s = (jax.tree.map(lambda leaf: leaf.astype(np.float32), part) for part in normals(rng))
    variables, apply = started(model, x, v, s)
    claim = functools.partial(assert_invariant, functools.partial(apply, variables))
    claim(Rotation(3), x, v, s, representations=["points", "vectors", "set"], tolerance=1e-4)
    assert float(jnp.max(jnp.abs(apply(variables, x, v, s) - apply(variables, x, -v, s)))) > 1e-3
    assert float(jnp.max(jnp.abs(apply(variables, x, v, s) - apply(variables, x, v, -s)))) > 1e-3


def test_dropout_drops_whole_vectors_so_that_training_turns_too(rng):
    x = clouds(rng).astype(np.float32)
    variables, _ = started(SMALL, x)

    @jax.jit
    def train(x, key):
        return SMALL.apply(variables, x, deterministic=False, mutable=["batch_stats"], rngs={"dropout": key})[0]

    one, other = jax.random.split(jax.random.key(1))
    claim = functools.partial(assert_equivariant, representations=["points"], output="vectors", tolerance=1e-5)
    claim(functools.partial(train, key=one), Rotation(3), x)
    assert float(jnp.max(jnp.abs(train(x, one) - train(x, other)))) > 1e-3


def test_padding_changes_nothing_and_gets_no_gradient(rng):
    x = jnp.asarray(clouds(rng), jnp.float32)
    wide = jnp.concatenate([x, jnp.full((2, 2, 3), 1e4)], axis=1)
    mask = jnp.broadcast_to(jnp.arange(8) < 6, (2, 8))
    variables, apply = started(SHARP, x)

    @jax.jit
    def padded(x, mask):
        out, back = jax.vjp(lambda x: jnp.asarray(SHARP.apply(variables, x, mask=mask)), x)
        return out, back(jnp.ones_like(out))[0]

    out, gradient = padded(wide, mask)
    np.testing.assert_allclose(out, apply(variables, x), atol=1e-6)
    assert float(jnp.max(jnp.abs(padded(wide, mask | True)[0] - out))) > 1e-3
    np.testing.assert_array_equal(gradient[:, 6:], 0)
    assert float(jnp.max(jnp.abs(gradient[:, :6]))) > 0
    np.testing.assert_array_equal(padded(wide, mask & False)[0], 0)


# The reference code -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_vectors_and_their_gradient_equal_those_of_the_reference(pooling, golden):
    """The stored file says which code was run, and how."""
    model = VNSmall(num_neighbors=6, pooling=pooling)
    tensors = reference_weights(json.loads(str(golden["shapes"]))[pooling])
    variables = check_file(tensors, model, "official").variables
    x = jnp.asarray(golden["points"])
    projection = jnp.asarray(golden[f"{pooling}/projection"])

    def run(x, deterministic=True):
        module = model.clone(dropout_rate=0.0)
        return module.apply(variables, x, deterministic=deterministic, mutable=["batch_stats"])[0][:, :3]

    @jax.jit
    def found(x):
        out, back = jax.vjp(run, x)
        return out, back(projection)[0], run(x, deterministic=False)

    for name, value, tolerance in zip(("vectors", "gradient", "train"), found(x), (1e-5, 1e-4, 1e-5), strict=True):
        expected = golden[f"{pooling}/{name}"]
        np.testing.assert_allclose(value, expected, atol=tolerance * np.abs(expected).max())
    # The control: in training it is another function.
    assert np.max(np.abs(golden[f"{pooling}/train"] - golden[f"{pooling}/vectors"])) > 1e-2


@pytest.mark.parametrize("module", [SMALL, SHARP], ids=["mean", "max"])
def test_names_of_the_reference_there_and_back(module):
    check_dialect(module, "official", beside=("bn1.bn1d.num_batches_tracked",))


def test_statistics_learn_behind_learned_canonicalization(rng):
    points = jnp.asarray(rng.normal(size=(2, 9, 3)), jnp.float32)
    model = LearnedCanonicalization(PointNet(num_classes=3), VNSmall(num_neighbors=4), group="SO(d)")
    variables = model.init(jax.random.key(0), points)
    streams = {"dropout": jax.random.key(1)}

    def moved(deterministic):
        call = jax.jit(
            lambda variables: model.apply(
                variables, points, deterministic=deterministic, mutable=["batch_stats"], rngs=streams
            )[1]
        )
        changes = jax.tree.map(jnp.subtract, call(variables)["batch_stats"], variables["batch_stats"])
        return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(changes))

    assert moved(deterministic=True) == 0
    assert moved(deterministic=False) > 1e-4
