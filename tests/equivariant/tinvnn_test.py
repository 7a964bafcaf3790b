"""TinvNN: coordinates from distances alone, and what happens where they are ambiguous."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.frame_averaging import PointNet
from jaxlayers.equivariant.tinvnn import TinvNN, graph_distances, multidimensional_scaling, tinvnn_pointnet
from jaxlayers.geometry.groups import Euclidean, GeneralLinear, Product, Scale, Symmetric
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant, assert_invariant

# Compiled in the least time: how fast it runs is not what is tested.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CUBE = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
SMALL_NET = PointNet(num_classes=3, features=(8, 8), hidden_features=(6,))


def clouds(rng, batch=2, n=7, d=3):
    """Clouds with distinct variances along their axes."""
    return rng.normal(size=(batch, n, d)) * np.linspace(1, 2, d) + 0.5


def bare(module, *inputs):
    """The control: the backbone on raw coordinates."""
    return module.init_with_output(jax.random.key(0), *inputs)[0]


def distances_of(points):
    return np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1)


CASES = (
    Case(
        name="tinvnn",
        module=TinvNN(SMALL_NET, scale=True),
        inputs=lambda rng: (clouds(rng),),
        symmetries=(
            Symmetry(
                Product(Scale(), Euclidean(3)),
                ("points",),
                control=GeneralLinear(3),
                reason="distances are all that is kept",
            ),
            Symmetry(Symmetric(7), ("points",), control=lambda x: x[:, 0]),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"points of shape \(3,\) .* must be floating", inputs=lambda rng: (rng.normal(size=3),)),
            BadInput(match=r"features=0 must be positive", module=TinvNN(SMALL_NET, features=0)),
            BadInput(
                match=r"distances of shape \(2, 7, 3\) .* must be floating \[\*batch, n, n\]",
                module=TinvNN(SMALL_NET, features=3, source="distances"),
            ),
            BadInput(
                match=r"signs='average' needs points and all of their coordinates; got .*features=2",
                module=TinvNN(SMALL_NET, features=2, signs="average"),
            ),
        ),
    ),
    Case(
        name="tinvnn_distances",
        within="tinvnn",
        module=TinvNN(nn.Dense(4), features=2, source="distances"),
        inputs=lambda rng: (distances_of(clouds(rng)),),
        symmetries=(
            Symmetry(Symmetric(7), ("adjacency",), "set", control=lambda x: x[..., :4] @ np.ones((4, 4)) + x[..., :4]),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"features=None needs points to take the dimension from",
                module=TinvNN(nn.Dense(4), source="distances"),
            ),
        ),
    ),
    Case(
        name="tinvnn_average",
        within="tinvnn",
        module=TinvNN(SMALL_NET, signs="average"),
        inputs=lambda rng: (clouds(rng, d=2),),
        symmetries=(Symmetry(Euclidean(2), ("points",), control=functools.partial(bare, SMALL_NET)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"points of shape \(3,\) .* must be floating", inputs=lambda rng: (rng.normal(size=3),)),
        ),
    ),
)


def embed(points, **keywords):
    return jit(functools.partial(multidimensional_scaling, **keywords))(jnp.asarray(points))


# The embedding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precise", [False, True], ids=["float32", "float64"])
def test_coordinates_are_invariant_keep_distances_and_follow_the_order(precise, rng):
    with jax.enable_x64(precise):
        dtype, tolerance = (np.float64, 1e-10) if precise else (np.float32, 1e-5)
        points = clouds(rng, n=9)[0].astype(dtype)

        @jit
        def coordinates(x):
            return multidimensional_scaling(x).coordinates

        fn = lambda x: coordinates(jnp.asarray(x))  # noqa: E731
        assert_invariant(fn, Euclidean(3), points, representations=["points"], tolerance=tolerance)
        assert_equivariant(fn, Symmetric(9), points, representations=["set"], output="set", tolerance=tolerance)
        np.testing.assert_allclose(distances_of(np.asarray(fn(points))), distances_of(points), atol=10 * tolerance)
        # The controls: raw and centred coordinates.
        for control in (jnp.asarray, lambda x: jnp.asarray(x) - jnp.mean(x, axis=0)):
            with pytest.raises(AssertionError):
                assert_invariant(control, Euclidean(3), points, representations=["points"], tolerance=tolerance)
        # The scale is kept unless it is divided by.
        with pytest.raises(AssertionError):
            assert_invariant(fn, Scale(), points, representations=["points"], tolerance=tolerance)
        scaled = jit(lambda x: multidimensional_scaling(x, scale=True).coordinates)
        fn = lambda x: scaled(jnp.asarray(x))  # noqa: E731
        group = Product(Scale(), Euclidean(3))
        assert_invariant(fn, group, points, representations=["points"], tolerance=tolerance)
        np.testing.assert_allclose(np.mean(np.sum(np.square(fn(points)), axis=-1)), 1, atol=tolerance)


def test_random_signs_are_not_invariant(rng):
    """The control of the signs: what is left without a rule."""
    points = clouds(rng)[0]
    group = Euclidean(3)
    outputs = [
        np.asarray(
            embed(np.asarray(group.act(group.sample(rng), points, "points"), np.float32), signs="none").coordinates
        )
        for _ in range(12)
    ]
    np.testing.assert_allclose(np.abs(outputs[1:]), np.abs(outputs[:1]).repeat(11, axis=0), atol=1e-4)
    assert np.max(np.abs(np.asarray(outputs[1:]) - outputs[0])) > 0.5


@pytest.mark.parametrize(("n", "d", "features"), [(8, 3, 3), (8, 3, 2), (3, 5, 5), (8, 3, 6)])
def test_coordinates_equal_classical_scaling_in_numpy(n, d, features, rng):
    points = clouds(rng, n=n, d=d)[0]
    squared = distances_of(points) ** 2
    centring = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-0.5 * centring @ squared @ centring)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    expected = np.zeros((n, features))
    for j in range(min(n - 1, d, features)):
        axis = vectors[:, j] * np.sqrt(values[j])
        expected[:, j] = axis * np.sign(np.sum(axis**3))
    with jax.enable_x64(True):
        found = embed(points, features=features)
        given = jit(lambda x: multidimensional_scaling(distances=x, features=features))(
            jnp.asarray(distances_of(points))
        )
    clear = np.asarray(found.sign_margin) > 0.01
    assert clear.sum() >= 2
    for embedding in (found, given):
        np.testing.assert_allclose(np.abs(embedding.coordinates), np.abs(expected), atol=1e-7)
        np.testing.assert_allclose(embedding.coordinates[:, clear], expected[:, clear], atol=1e-7)
        np.testing.assert_allclose(
            embedding.eigenvalues[: min(n, d, features)], values[: min(n, d, features)], atol=1e-9
        )


def test_padding_changes_nothing(rng):
    points = np.asarray(clouds(rng), np.float32)
    padded = np.concatenate([points, np.full((2, 3, 3), 9.0, np.float32)], axis=1)
    mask = jnp.array([[True] * 7 + [False] * 3] * 2)
    for keywords in ({"features": 3}, {"features": 3, "scale": True}):
        plain = embed(points, **keywords)
        wide = embed(padded, mask=mask, **keywords)
        np.testing.assert_allclose(wide.coordinates[:, :7], plain.coordinates, atol=1e-5)
        assert float(jnp.max(jnp.abs(wide.coordinates[:, 7:]))) == 0
        scaled = jit(lambda x, keywords=keywords: multidimensional_scaling(distances=x, mask=mask, **keywords))
        given = scaled(jnp.asarray(distances_of(padded)))
        np.testing.assert_allclose(given.coordinates[:, :7], plain.coordinates, atol=1e-4)
        assert float(jnp.max(jnp.abs(given.coordinates[:, 7:]))) == 0
        assert float(jnp.max(jnp.abs(embed(padded, **keywords).coordinates[:, :7] - plain.coordinates))) > 0.1
    module = TinvNN(SMALL_NET)
    variables = jit(module.init)(jax.random.key(0), jnp.asarray(points))
    apply = jit(module.apply)
    expected = apply(variables, jnp.asarray(points))
    np.testing.assert_allclose(apply(variables, jnp.asarray(padded), mask=mask), expected, atol=1e-5)


# Ambiguity ----------------------------------------------------------------------------------------------------------

LINE = np.outer([-1.0, 0.2, 0.5, 1.3], [1, 2, 3])
# Mirror symmetric along the second axis: every statistic of that sign vanishes, and nothing else is degenerate.
KITE = np.array([[3.0, 0, 0], [-1, 1, 0], [-1, -1, 0], [-1, 0, 0.3], [0.2, 0, -0.5]])
BOX = CUBE * [3, 2, 1]
DEGENERATE = {
    "line": LINE,
    "point thrice": np.ones((3, 3)),
    "single point": np.array([[1.0, 2.0, 3.0]]),
    "two points": np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]),
    "plane": np.random.default_rng(3).normal(size=(6, 3)) * [2, 1, 0],
    "kite": KITE,
    "box": BOX,
    "cube": CUBE,
    "tetrahedron": CUBE[[0, 3, 5, 6]],
}


@jit
def examine(points, distances):
    """Return the embedding, the gradient of a function of it, and value and gradient by distances."""

    def total(x, **keywords):
        return jnp.sum(jnp.sin(multidimensional_scaling(x, scale=True, **keywords).coordinates))

    return (
        multidimensional_scaling(points),
        jax.grad(total)(points),
        jax.value_and_grad(lambda x: total(None, distances=x, features=3))(distances),
    )


@pytest.mark.parametrize("name", DEGENERATE)
def test_value_and_gradient_are_finite_and_margins_tell(name):
    points = jnp.asarray(DEGENERATE[name], jnp.float32)
    embedding, gradient, given = examine(points, jnp.asarray(distances_of(points)))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((embedding, gradient, given)))
    np.testing.assert_allclose(distances_of(np.asarray(embedding.coordinates)), distances_of(points), atol=2e-5)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert (float(embedding.gap) < 1e-5) == (
        name in ("line", "point thrice", "single point", "two points", "cube", "tetrahedron")
    )
    if name in ("kite", "box"):
        assert float(jnp.min(embedding.sign_margin)) < 1e-5
    if name in ("line", "point thrice"):
        assert float(jnp.min(embedding.sign_margin)) > 0.01


def invariance_error(module, points, elements=8):
    group, rng = Euclidean(3), np.random.default_rng(0)
    moved = np.stack([points, *(group.act(group.sample(rng), points, "points") for _ in range(elements))])
    moved = jnp.asarray(moved, jnp.float32)
    variables = jit(module.init)(jax.random.key(0), moved)
    out = np.asarray(jit(module.apply)(variables, moved))
    return float(np.max(np.abs(out[1:] - out[0])) / np.max(np.abs(out[0])))


class Ordered(nn.Module):
    """A backbone that knows no permutations."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(16, bias_init=nn.initializers.normal(1.0))(x.reshape(*x.shape[:-2], -1)))
        return nn.Dense(4)(x)


def test_open_signs_of_mirror_symmetric_clouds_leave_set_networks_exact():
    for points in (KITE, BOX, LINE):
        assert invariance_error(TinvNN(SMALL_NET), points) < 1e-5
    # Not so for a network that tells the points apart, unless it is averaged over the signs.
    assert invariance_error(TinvNN(Ordered()), BOX) > 1e-2
    assert invariance_error(TinvNN(Ordered(), signs="average"), BOX) < 1e-5


def test_average_is_exact_where_eigenvalues_meet_and_moments_are_not():
    for points in (CUBE, CUBE[[0, 3, 5, 6]]):
        assert invariance_error(TinvNN(SMALL_NET), points) > 1e-2
        assert invariance_error(TinvNN(SMALL_NET, signs="average"), points) < 2e-5


def test_signs_of_centrally_symmetric_clouds_agree_with_each_other(rng):
    """All odd moments vanish on such clouds, but mixed ones tie the axes to the first, up to a mirrored set."""
    half = rng.normal(size=(6, 3)) * [3, 2, 1]
    points = np.concatenate([half, -half])
    third = np.sum(np.asarray(embed(np.asarray(points, np.float32)).coordinates) ** 3, axis=0)
    np.testing.assert_allclose(third, 0, atol=1e-2)
    assert invariance_error(TinvNN(SMALL_NET), points) < 2e-5
    # The control: with signs as they come, mirror images of the set are confused.
    assert invariance_error(TinvNN(SMALL_NET, signs="none"), points) > 1e-3


def test_gradient_is_the_derivative(rng):
    with jax.enable_x64(True):
        points, direction = jnp.asarray(clouds(rng)[0]), jnp.asarray(rng.normal(size=(7, 3)))
        plain = lambda x: jnp.sum(jnp.sin(multidimensional_scaling(x, scale=True).coordinates))  # noqa: E731
        value = jit(plain)
        numeric = (value(points + 1e-6 * direction) - value(points - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(jnp.sum(jit(jax.grad(plain))(points) * direction), numeric, rtol=1e-6)

        def through(x):
            distances = jnp.sqrt(jnp.sum((x[:, None] - x) ** 2, axis=-1) + jnp.eye(7)) - jnp.eye(7)
            embedding = multidimensional_scaling(distances=distances, features=3, scale=True)
            return jnp.sum(jnp.sin(embedding.coordinates))

        np.testing.assert_allclose(jnp.sum(jit(jax.grad(through))(points) * direction), numeric, rtol=1e-5)


def test_nan_comes_out_as_nan(rng):
    points = jnp.asarray(clouds(rng)[0], jnp.float32).at[0, 0].set(jnp.nan)
    assert bool(jnp.all(jnp.isnan(embed(points).coordinates)))


# Graphs -------------------------------------------------------------------------------------------------------------


def test_graph_distances_equal_floyd_and_warshall_in_numpy(rng):
    weights = np.where(rng.random((9, 9)) < 0.25, rng.uniform(0.5, 2, size=(9, 9)), 0)
    expected = np.where(weights > 0, weights, np.inf)
    expected = np.minimum(expected, expected.T)
    np.fill_diagonal(expected, 0)
    for k in range(9):
        expected = np.minimum(expected, expected[:, k : k + 1] + expected[k : k + 1])
    found = np.asarray(graph_distances(jnp.asarray(weights, jnp.float32)))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-6)
    np.testing.assert_allclose(found[~finite], 2 * expected[finite].max(), rtol=1e-6)


def test_graph_parts_and_padding():
    adjacency = jnp.asarray(np.kron(np.eye(2), np.ones((2, 2)) - np.eye(2)), jnp.float32)
    assert graph_distances(adjacency)[0].tolist() == [0, 1, 2, 2]
    masked = graph_distances(adjacency, mask=jnp.array([True, True, False, False]))
    assert masked.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert graph_distances(jnp.zeros((2, 2))).tolist() == [[0, 1], [1, 0]]


def test_ring_is_laid_out_as_a_ring():
    ring = np.roll(np.eye(8), 1, axis=1)
    embedding = multidimensional_scaling(distances=graph_distances(jnp.asarray(ring, jnp.float32)), features=2)
    radius = np.linalg.norm(embedding.coordinates, axis=-1)
    np.testing.assert_allclose(radius, radius[0], rtol=1e-5)
    assert float(embedding.eigenvalues[1]) == pytest.approx(float(embedding.eigenvalues[0]), rel=1e-5)
    np.testing.assert_allclose(np.diff(np.sort(np.arctan2(*np.asarray(embedding.coordinates).T))), np.pi / 4, atol=1e-4)


# Bad input ----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused(untyped):
    points = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"exactly one of points and distances must be given"):
        multidimensional_scaling(points, distances=jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"exactly one of points and distances must be given"):
        multidimensional_scaling()
    with pytest.raises(ValueError, match=r"signs='random' is unknown"):
        multidimensional_scaling(points, signs="random")
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) and dtype bool must be boolean of shape \(4,\)"):
        multidimensional_scaling(points, mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"dtype int32 must be floating"):
        multidimensional_scaling(points.astype(int))
    with pytest.raises(ValueError, match=r"signs='random' and source='points' must be of"):
        TinvNN(SMALL_NET, signs="random").init(jax.random.key(0), points)


def test_pointnet_variant_is_built():
    model = tinvnn_pointnet(num_classes=3, features=(4,), hidden_features=())
    shape = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
    assert shape == (2, 3)
