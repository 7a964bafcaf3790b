"""Frame averaging: exact for any backbone, also where the spectrum degenerates, and equal to the reference code."""

import functools
import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.frame_averaging import (
    FrameAveraging,
    FrameGNN,
    ParticleGNN,
    PointNet,
    equivariant,
    frame_average,
    frame_pointnet,
    from_reference,
    invariant,
)
from jaxlayers.geometry.frames import principal_frame, pull, weighted_frame
from jaxlayers.geometry.groups import Euclidean, Orthogonal, Product, Rotation, SpecialEuclidean, Symmetric
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant

GOLDEN = Path(__file__).parents[1] / "golden" / "frame_averaging_parity.npz"
GROUPS = {"E(d)": Euclidean, "SE(d)": SpecialEuclidean, "O(d)": Orthogonal, "SO(d)": Rotation}
CUBE = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))


class Flattened(nn.Module):
    """A perceptron of all inputs in a row: it knows neither rotations nor permutations."""

    outputs: int = 4

    @nn.compact
    def __call__(self, *inputs):
        nodes = [x.reshape(*x.shape[:-2], -1) for x in inputs]
        return nn.Dense(self.outputs)(
            jnp.tanh(nn.Dense(16, bias_init=nn.initializers.normal(1.0))(jnp.concatenate(nodes, axis=-1)))
        )


class Pointwise(nn.Module):
    """A perceptron of every point: it knows permutations only, and tells left from right."""

    @nn.compact
    def __call__(self, points):
        hidden = jnp.tanh(nn.Dense(16, bias_init=nn.initializers.normal(1.0))(points))
        hidden = hidden + jnp.mean(hidden, axis=-2, keepdims=True)
        return nn.Dense(points.shape[-1])(hidden)


def bare(module, *inputs):
    """The control: the backbone alone, with some parameters."""
    return module.apply(module.init(jax.random.key(0), *inputs), *inputs)


def clouds(rng, batch=2, n=5, d=3):
    """Clouds whose covariance has eigengaps of about a fifth of its trace."""
    return rng.normal(size=(batch, n, d)) * np.arange(1, d + 1) + 0.5


def particles(rng):
    return clouds(rng), rng.normal(size=(2, 5, 3)), rng.choice([-1.0, 1.0], size=(2, 5, 1))


def graphs(rng):
    upper = np.triu(rng.random((2, 5, 5)) < 0.5, 1).astype(np.float64)
    return rng.integers(0, 2, size=(2, 5, 1)).astype(np.float64), upper + np.swapaxes(upper, 1, 2)


def first_node(x, *_):
    return x[..., 0, :]


SMALL_NET = PointNet(num_classes=3, features=(8, 8), hidden_features=(6,))
SMALL_GNN = ParticleGNN(features=6, depth=2)
CONSTANT_VECTOR = "a vector that is the same in every element of the frame averages to zero over the signs"
few_anchors = functools.partial(weighted_frame, anchors=4)

CASES = (
    Case(
        name="frame_averaging_pointnet",
        module=FrameAveraging(backbone=SMALL_NET, group="E(d)", frame=few_anchors),
        inputs=lambda rng: (clouds(rng, d=2),),
        symmetries=(
            Symmetry(Euclidean(2), ("points",), control=functools.partial(bare, SMALL_NET)),
            Symmetry(Symmetric(5), ("points",), control=first_node),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"group='E\(3\)' is unknown; use", module=FrameAveraging(SMALL_NET, group="E(3)")),
            BadInput(match=r"representation='tensor' is unknown", module=FrameAveraging(SMALL_NET, output="tensor")),
            BadInput(match=r"points of shape \(2,\)", inputs=lambda rng: (rng.normal(size=2),)),
            BadInput(match=r"2 inputs need as many representations", inputs=lambda rng: (clouds(rng),) * 2),
            BadInput(
                match=r"needs an input of representation 'points'",
                module=FrameAveraging(SMALL_NET, representations=("set",)),
            ),
            BadInput(
                match=r"returned shape \(\), which must begin with the frames and batch axes \(4, 2\)",
                module=FrameAveraging(nn.Sequential([nn.Dense(1), jnp.sum])),
            ),
        ),
    ),
    Case(
        name="frame_averaging_rotation",
        module=FrameAveraging(backbone=Pointwise(), group="SO(d)", output="vectors", frame=principal_frame),
        inputs=lambda rng: (clouds(rng),),
        symmetries=(
            Symmetry(
                Product(Symmetric(5), Rotation(3)),
                ("points",),
                "vectors",
                control=Orthogonal(3),
                reason="a proper frame leaves it open to tell left from right",
            ),
        ),
        leading_axes=True,
        zero_gradients={"Dense_1/bias": CONSTANT_VECTOR},
        bad_inputs=(BadInput(match=r"points of shape \(2,\)", inputs=lambda rng: (rng.normal(size=2),)),),
    ),
    Case(
        name="frame_averaging_graph",
        module=FrameAveraging(backbone=Flattened(), group="S_n", representations=("set", "adjacency")),
        inputs=graphs,
        symmetries=(Symmetry(Symmetric(5), ("set", "adjacency"), control=functools.partial(bare, Flattened())),),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"groups with S_n need an input of representation 'set'",
                module=FrameAveraging(Flattened(), group="S_n", representations=(None, "scalar")),
            ),
            BadInput(
                match=r"max_orders=0 must be at least 1",
                module=FrameAveraging(Flattened(), group="S_n", representations=("set", "adjacency"), max_orders=0),
            ),
        ),
    ),
    Case(
        name="pointnet",
        module=SMALL_NET,
        inputs=lambda rng: (clouds(rng),),
        symmetries=(Symmetry(Symmetric(5), ("set",), control=first_node),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"points of shape \(5,\) must be", inputs=lambda rng: (rng.normal(size=5),)),
            BadInput(match=r"features=\(\) .* must not be empty", module=PointNet(features=())),
            BadInput(match=r"hidden_features=\(0,\) must be positive", module=PointNet(hidden_features=(0,))),
        ),
    ),
    Case(
        name="particle_gnn",
        module=SMALL_GNN,
        inputs=particles,
        symmetries=(
            Symmetry(Symmetric(5), ("set",) * 3, "set", control=lambda x, v, c: jnp.cumsum(x * c + v, axis=-2)),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"features=0, depth=2 and dimensions=3 must be", module=ParticleGNN(features=0, depth=2)),
            BadInput(
                match=r"positions \(2, 5, 2\), .* must be \[\*batch, n, 3\] twice",
                inputs=lambda rng: (rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 5, 1))),
            ),
        ),
    ),
    Case(
        name="frame_gnn",
        module=FrameGNN(backbone=SMALL_GNN, frame=principal_frame),
        inputs=particles,
        symmetries=(
            Symmetry(
                Product(Symmetric(5), Euclidean(3)),
                ("points", "vectors", "set"),
                "points",
                control=functools.partial(bare, SMALL_GNN),
            ),
        ),
        leading_axes=True,
        zero_gradients={"layers_0/node/down/bias|decoder/down/bias": CONSTANT_VECTOR},
        bad_inputs=(
            BadInput(match=r"features=8 must be divisible by dimensions=3", module=FrameGNN(ParticleGNN(features=8))),
            BadInput(match=r"group='S_n' is not a group of point clouds", module=FrameGNN(SMALL_GNN, group="S_n")),
        ),
    ),
)


def mixed(x, mask=None):
    """Any function: a number, a point for each point, and a vector, from plain coordinates."""
    d = x.shape[-1]
    rng = np.random.default_rng(1)
    first, second, third = (jnp.asarray(rng.normal(size=shape), x.dtype) for shape in ((d, 16), (16, 4), (16, d)))
    hidden = jnp.tanh(x @ first + jnp.linspace(-1, 1, 16, dtype=x.dtype))
    mean = jnp.mean(hidden, axis=-2, where=None if mask is None else mask[..., None])
    return jnp.tanh(mean @ second), (hidden + mean[..., None, :]) @ third / 4, mean @ third


MIXED = ("scalar", "points", "vector")


# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "d", "precise", "frame"),
    [
        ("E(d)", 3, False, weighted_frame),
        ("SE(d)", 3, False, principal_frame),
        ("O(d)", 3, False, principal_frame),
        ("SO(d)", 3, True, weighted_frame),
        ("E(d)", 2, True, weighted_frame),
    ],
    ids=["E(3)", "SE(3)", "O(3)", "SO(3)-float64", "E(2)-float64"],
)
def test_any_function_becomes_equivariant_to_the_group_and_no_more(group, d, precise, frame, rng):
    with jax.enable_x64(precise):
        dtype, tolerance = (np.float64, 1e-10) if precise else (np.float32, 1e-5)
        points = clouds(rng, d=d)[0].astype(dtype)
        fn = jax.jit(equivariant(mixed, group, output=MIXED, frame=frame))
        claim = functools.partial(assert_equivariant, representations=["points"], output=MIXED, tolerance=tolerance)
        claim(lambda x: fn(jnp.asarray(x)), GROUPS[group](d), points)
        # The controls: the function itself, and for proper groups a reflection.
        with pytest.raises(AssertionError):
            claim(lambda x: mixed(jnp.asarray(x)), GROUPS[group](d), points)
        if group.startswith("S"):
            with pytest.raises(AssertionError):
                claim(lambda x: fn(jnp.asarray(x)), Orthogonal(d), points)


def test_average_equals_a_loop_over_signs_in_numpy(rng):
    points = clouds(rng)[0]
    kernel = rng.normal(size=(3, 3))
    shift = points.mean(axis=0)
    axes = np.linalg.eigh((points - shift).T @ (points - shift))[1]
    expected = np.zeros((5, 3))
    for signs in itertools.product((1, -1), repeat=3):
        rotation = axes * np.array(signs)
        canonical = (points - shift) @ rotation
        expected += (np.tanh(canonical @ kernel + 1) @ rotation.T + shift) / 8
    kernel = jnp.asarray(kernel, jnp.float32)
    averaged = equivariant(lambda x: jnp.tanh(x @ kernel + 1), frame=principal_frame)
    found = averaged(jnp.asarray(points, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_average_of_an_equivariant_function_is_that_function(rng):
    def attract(x):
        offsets = x[..., :, None, :] - x[..., None, :, :]
        return x + jnp.sum(offsets * jnp.exp(-jnp.sum(offsets**2, axis=-1, keepdims=True)), axis=-2)

    averaged = jax.jit(equivariant(attract))
    for points in (clouds(rng, n=8)[0], CUBE):
        points = jnp.asarray(points, jnp.float32)
        np.testing.assert_allclose(averaged(points), attract(points), atol=1e-5)


def test_average_over_orders_and_motions_makes_a_plain_perceptron_equivariant(rng):
    kernels = (
        jnp.asarray(rng.normal(size=(20, 16)) / 4, jnp.float32),
        jnp.asarray(rng.normal(size=(16, 15)), jnp.float32),
    )

    def perceptron(points, charges):
        rows = jnp.concatenate([points, charges], axis=-1).reshape(-1)
        return (jnp.tanh(rows @ kernels[0] + 0.5) @ kernels[1]).reshape(points.shape)

    points, charges = clouds(rng)[0].astype(np.float32), np.array([[1], [-1], [1], [1], [-1]], np.float32)
    representations = ("points", "set")
    claim = functools.partial(assert_equivariant, representations=representations, output="points")
    both = jax.jit(equivariant(perceptron, "S_n x SE(d)", representations=representations, frame=principal_frame))
    claim(lambda *x: both(*map(jnp.asarray, x)), Product(Symmetric(5), SpecialEuclidean(3)), points, charges)
    motions = jax.jit(equivariant(perceptron, "SE(d)", representations=representations, frame=principal_frame))
    claim(lambda *x: motions(*map(jnp.asarray, x)), SpecialEuclidean(3), points, charges)
    with pytest.raises(AssertionError):
        claim(lambda *x: motions(*map(jnp.asarray, x)), Symmetric(5), points, charges)


def test_graphs_that_message_passing_confuses_are_told_apart(rng):
    ring = np.roll(np.eye(6), 1, axis=1)
    ring = ring + ring.T
    triangles = np.kron(np.eye(2), np.ones((3, 3)) - np.eye(3))
    kernels = (
        jnp.asarray(rng.normal(size=(36, 16)) / 3, jnp.float32),
        jnp.asarray(rng.normal(size=(16, 4)), jnp.float32),
    )

    def perceptron(adjacency):
        return jnp.tanh(adjacency.reshape(-1) @ kernels[0]) @ kernels[1]

    def message_passing(adjacency):
        nodes = jnp.ones((6, 1))
        for _ in range(6):
            nodes = jnp.tanh(adjacency @ nodes + nodes)
        return jnp.sum(nodes, axis=0)

    averaged = jax.jit(invariant(perceptron, "S_n", representations=("adjacency",), max_orders=720))
    order = rng.permutation(6)
    ring, triangles, again = (jnp.asarray(x, jnp.float32) for x in (ring, triangles, ring[np.ix_(order, order)]))
    np.testing.assert_allclose(averaged(ring), averaged(again), atol=1e-5)
    assert float(jnp.max(jnp.abs(averaged(ring) - averaged(triangles)))) > 0.05
    np.testing.assert_allclose(message_passing(ring), message_passing(triangles), atol=1e-6)


def test_padding_changes_nothing(rng):
    mask = jnp.array([[True] * 5 + [False] * 3] * 2)

    def padded(x):
        return jnp.concatenate([jnp.asarray(x, jnp.float32), jnp.full((2, 3, x.shape[-1]), 7.0)], axis=1)

    inputs = particles(rng)
    plain, wide = [jnp.asarray(x, jnp.float32) for x in inputs], [padded(x) for x in inputs]
    for module, count in (
        (FrameAveraging(SMALL_NET, frame=principal_frame), 1),
        (FrameGNN(SMALL_GNN, frame=principal_frame), 3),
    ):
        apply = jax.jit(module.apply)
        variables = jax.jit(module.init)(jax.random.key(0), *plain[:count])
        expected = apply(variables, *plain[:count])
        found = apply(variables, *wide[:count], mask=mask)
        unmasked = apply(variables, *wide[:count], mask=mask | True)
        if count == 3:
            found, unmasked = found[:, :5], unmasked[:, :5]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert float(jnp.max(jnp.abs(unmasked - expected))) > 1e-2


# Degenerate spectra -------------------------------------------------------------------------------------------------

ROD = CUBE * np.array([1.0, 1e-2, 1e-2])
BIPYRAMID = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1.7], [0, 0, -1.7]])
NOISE = np.random.default_rng(7).normal(size=CUBE.shape)
# Clouds without a simple spectrum, and whether the plain principal frame loses everything there.
DEGENERATE = {
    "tetrahedron": (CUBE[[0, 3, 5, 6]], True),
    "cube": (CUBE, True),
    "octahedron": (np.concatenate([np.eye(3), -np.eye(3)]), True),
    "square bipyramid": (BIPYRAMID, True),
    "square": (CUBE[::2] * [1, 1, 0], True),
    "rod": (ROD, False),
    "line": (np.outer([-1.0, 0.2, 0.5, 1.3], [1, 2, 3]), False),
    "point thrice": (np.ones((3, 3)), False),
    "single point": (np.array([[1.0, 2.0, 3.0]]), False),
    "cube + 1e-2": (CUBE + 1e-2 * NOISE, False),
    "cube + 1e-3": (CUBE + 1e-3 * NOISE, False),
    "cube + 1e-5": (CUBE + 1e-5 * NOISE, False),
}


@functools.cache
def degenerate_errors(make):
    """Relative errors of value, points and gradient over random motions and orders, each `[elements, clouds]`."""
    rng = np.random.default_rng(0)
    mask = np.array([np.arange(8) < len(points) for points, _ in DEGENERATE.values()])
    points = np.stack([np.pad(points, ((0, 8 - len(points)), (0, 0))) for points, _ in DEGENERATE.values()])
    group = Product(Euclidean(3), Symmetric(8))
    elements = [group.sample(rng) for _ in range(12)]

    @jax.jit
    def evaluate(points, mask):
        def energy(points):
            frame = make(points, mask=mask)
            scalar, moved, _ = frame_average(mixed, frame, points, output=MIXED, mask=mask)
            return jnp.sum(scalar), (scalar, moved)

        gradient, (scalar, moved) = jax.grad(energy, has_aux=True)(points)
        return scalar, moved, gradient

    moved = [group.act(g, points, "points") for g in elements]
    masks = [group.act(g, mask[..., None], "set")[..., 0] for g in elements]
    inputs = np.stack([points, *moved]).astype(np.float32), np.stack([mask, *masks])
    values, outputs, gradients = (np.asarray(x, np.float64) for x in evaluate(*map(jnp.asarray, inputs)))
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(outputs))
    assert np.all(np.isfinite(gradients))
    errors = []
    for found, name, axes in ((values, "scalar", -1), (outputs, "points", (-2, -1)), (gradients, "vectors", (-2, -1))):
        expected = np.stack([group.act(g, found[0], name) for g in elements])
        valid = 1 if name == "scalar" else inputs[1][1:, ..., None]
        errors.append(np.max(np.abs(found[1:] - expected) * valid, axis=axes) / np.max(np.abs(found[0])))
    return errors


@pytest.mark.parametrize("quantity", ["value", "points", "gradient"])
def test_weighted_frame_is_exact_where_the_spectrum_is_degenerate(quantity):
    index = ["value", "points", "gradient"].index(quantity)
    error = dict(zip(DEGENERATE, np.max(degenerate_errors(weighted_frame)[index], axis=0), strict=True))
    assert max(error.values()) < 2e-5, error


def test_principal_frame_is_not(rng):
    """The control: what the plain frame loses, also close to degeneracy."""
    value, points, gradient = (
        dict(zip(DEGENERATE, np.median(errors, axis=0), strict=True)) for errors in degenerate_errors(principal_frame)
    )
    for name, (_, lost) in DEGENERATE.items():
        if lost:
            assert min(value[name], points[name], gradient[name]) > 1e-3, name
    assert points["cube + 1e-5"] > 1e-3
    assert points["cube + 1e-3"] > 2e-5


def test_gradient_is_the_derivative_from_simple_to_degenerate(rng):
    with jax.enable_x64(True):
        direction = jnp.asarray(rng.normal(size=CUBE.shape))
        box = CUBE * [1, 1.02, 1.05]
        points = jnp.asarray(
            np.stack([clouds(rng, n=8)[0], CUBE + 0.1 * NOISE, box, CUBE, BIPYRAMID[[0, 0, 1, 1, 2, 3, 4, 5]]])
        )
        shares = jnp.sum(weighted_frame(points).weights[:8], axis=0)
        assert float(shares[0]) == 1
        assert float(shares[3]) == 0
        assert bool(jnp.any((shares > 0) & (shares < 1)))
        value = invariant(lambda x: jnp.sum(mixed(x)[0], axis=-1))
        energy = jax.jit(jax.vmap(jax.value_and_grad(value)))
        step = 1e-5 * direction
        numeric = (energy(points + step)[0] - energy(points - step)[0]) / 2e-5
        _, gradient = energy(points)
        np.testing.assert_allclose(jnp.sum(gradient * direction, axis=(-2, -1)), numeric, atol=1e-7, rtol=1e-5)


def test_extra_elements_are_evaluated_only_for_degenerate_clouds(rng):
    counts = []

    def counted(x):
        jax.debug.callback(lambda _: counts.append(1), x[0, 0])
        return jnp.sum(jnp.tanh(x))

    average_of = jax.jit(invariant(counted, frame=few_anchors))
    for points, expected in ((clouds(rng, n=8)[0], 8), (CUBE, 8 + 2 * 4)):
        counts.clear()
        jax.block_until_ready(average_of(jnp.asarray(points, jnp.float32)))
        jax.effects_barrier()
        assert len(counts) == expected


class Noisy(nn.Module):
    """A backbone with batch statistics, dropout and records."""

    @nn.compact
    def __call__(self, points, *, deterministic=True):
        x = nn.BatchNorm(use_running_average=deterministic)(nn.Dense(6)(points))
        self.sow("intermediates", "hidden", x)
        return jnp.mean(nn.Dropout(0.5)(x, deterministic=deterministic), axis=-2)


def test_backbone_may_have_batch_statistics_dropout_and_records():
    module = FrameAveraging(backbone=Noisy(), frame=few_anchors)
    points = jnp.asarray(CUBE[None], jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), points)
    rngs = {"dropout": jax.random.key(1), "frame": jax.random.key(2)}
    train = functools.partial(module.apply, deterministic=False, mutable=["batch_stats", "intermediates"])
    out, state = jax.jit(train)(variables, points, rngs=rngs)
    assert out.shape == (1, 6)
    assert state["intermediates"]["backbone"]["hidden"][0].shape == (1, 1, 8, 6)
    assert float(jnp.max(jnp.abs(state["batch_stats"]["backbone"]["BatchNorm_0"]["mean"]))) > 0
    # Every call records the principal elements only, also where the others are evaluated.
    _, state = jax.jit(functools.partial(module.apply, mutable=["intermediates"]))(variables, points)
    assert [x.shape for x in state["intermediates"]["backbone"]["hidden"]] == [(8, 1, 8, 6)]


# The sampled estimator ----------------------------------------------------------------------------------------------


def test_sampled_element_is_the_average_in_expectation(rng):
    points = jnp.asarray(clouds(rng), jnp.float32)
    module = FrameAveraging(backbone=Flattened(), group="E(d)", frame=principal_frame)
    variables = module.init(jax.random.key(0), points)
    keys = jax.random.split(jax.random.key(1), 600)

    @jax.jit
    def drawn(keys):
        return jax.vmap(lambda key: module.apply(variables, points, deterministic=False, rngs={"frame": key}))(keys)

    backbone = functools.partial(Flattened().apply, {"params": variables["params"]["backbone"]})
    each = np.asarray(backbone(pull(principal_frame(points), points, "points")))
    # The mean over all possible samples is the full average.
    np.testing.assert_allclose(each.mean(axis=0), module.apply(variables, points), atol=1e-5)
    distance = np.abs(np.asarray(drawn(keys))[:, None] - each).max(axis=-1)
    assert distance.min(axis=1).max() < 1e-5
    chosen = distance.argmin(axis=1)
    for cloud in range(2):
        counts = np.bincount(chosen[:, cloud], minlength=8)
        assert counts.min() > 40
        assert counts.max() < 120
    # Every cloud of the batch draws for itself.
    assert 0.05 < np.mean(chosen[:, 0] == chosen[:, 1]) < 0.25


# The models ---------------------------------------------------------------------------------------------------------


def test_whole_and_layerwise_averaging_of_the_gnn_are_equivariant_and_differ(rng):
    inputs = [x.astype(np.float32) for x in particles(rng)]
    representations = ("points", "vectors", "set")
    whole = FrameAveraging(SMALL_GNN, output="points", representations=representations, frame=principal_frame)
    layerwise = FrameGNN(SMALL_GNN, frame=principal_frame)
    variables = jax.jit(layerwise.init)(jax.random.key(0), *inputs)
    outputs = [jax.jit(functools.partial(model.apply, variables)) for model in (whole, layerwise)]
    assert_equivariant(outputs[0], Euclidean(3), *inputs, representations=representations, output="points")
    assert float(jnp.max(jnp.abs(outputs[0](*inputs) - outputs[1](*inputs)))) > 1e-3


def test_forces_of_an_invariant_energy_turn_with_the_cloud(rng):
    module = frame_pointnet(num_classes=1, features=(8,), hidden_features=(), frame=principal_frame)
    points = clouds(rng)[0].astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), points)
    forces = jax.jit(jax.grad(lambda x: -module.apply(variables, x)[0]))
    assert_equivariant(forces, Euclidean(3), points, representations=["points"], output="vectors")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def test_canonical_clouds_equal_those_of_the_reference(golden):
    positions, velocities = jnp.asarray(golden["positions"]), jnp.asarray(golden["velocities"])
    frame = principal_frame(positions)
    np.testing.assert_allclose(frame.translation, golden["centroids"], atol=1e-6)
    found = np.concatenate([pull(frame, positions, "points"), pull(frame, velocities, "vectors")], axis=-1)
    # Eigenvectors have no sign of their own, so the two frames list the same elements in different orders.
    distance = np.abs(found[:, None] - golden["canonical"][None]).max(axis=(-2, -1))
    assert distance.min(axis=1).max() < 1e-5
    assert sorted(distance.argmin(axis=1)[:, 0]) == list(range(8))


def test_gnn_and_its_gradient_equal_those_of_the_reference(golden):
    inputs = [jnp.asarray(golden[name]) for name in ("positions", "velocities", "charges")]
    # Frames are constants there.
    module = FrameGNN(ParticleGNN(features=12, depth=3), frame=functools.partial(principal_frame, stop_gradient=True))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

    def tensors(kind):
        return {name.removeprefix(kind): array for name, array in golden.items() if name.startswith(kind)}

    params = from_reference(tensors("weights/"), shapes)
    np.testing.assert_allclose(module.apply({"params": params}, *inputs), golden["predictions"], atol=1e-5)
    gradient = jax.jit(
        jax.grad(lambda params: jnp.sum(module.apply({"params": params}, *inputs) * golden["projection"]))
    )(params)
    scale = max(float(np.abs(array).max()) for array in tensors("gradients/").values())
    for found, expected in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(from_reference(tensors("gradients/"), shapes)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


def test_unfitting_state_dict_is_refused(golden):
    inputs = [jnp.asarray(golden[name]) for name in ("positions", "velocities", "charges")]
    weights = {name.removeprefix("weights/"): x for name, x in golden.items() if name.startswith("weights/")}

    def shapes(**fields):
        return jax.eval_shape(FrameGNN(ParticleGNN(**fields)).init, jax.random.key(0), *inputs)["params"]

    with pytest.raises(ValueError, match=r"missing \[\], unknown \['gcl_2.edge_mlp.0.bias'.*set its fields"):
        from_reference(weights, shapes(features=12, depth=2))
    with pytest.raises(
        ValueError, match=r"must give backbone/.* its shape \(.*\), not \(.*\); set the module's fields"
    ):
        from_reference(weights, shapes(features=6, depth=3))


def test_reference_model_has_as_many_parameters():
    inputs = [jax.ShapeDtypeStruct((1, 5, width), jnp.float32) for width in (3, 3, 1)]
    shapes = jax.eval_shape(FrameGNN(ParticleGNN(features=60, depth=4)).init, jax.random.key(0), *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 92_103
