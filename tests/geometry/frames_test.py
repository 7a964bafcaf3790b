"""Frames as sets: they turn with their input, count as the theory says, and hold where the spectrum does not."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.geometry.frames import (
    EUCLIDEAN_GROUPS,
    Frame,
    anchor_frame,
    average,
    distance_keys,
    eigengap,
    laplacian_keys,
    permutation_frame,
    principal_frame,
    product,
    pull,
    push,
    sample,
    select,
    stable_eigh,
    weighted_frame,
)
from jaxlayers.geometry.groups import Euclidean, Orthogonal, Rotation, SpecialEuclidean

# Compiled once for all tests of a shape.
principal_frame_of = jax.jit(principal_frame, static_argnames="group")
anchor_frame_of = jax.jit(anchor_frame, static_argnames=("group", "anchors"))
permutation_frame_of = jax.jit(permutation_frame, static_argnames=("max_orders", "tolerance"))
weighted_frame_of = jax.jit(weighted_frame, static_argnames=("group", "anchors"))

GOLDEN_RATIO = (1 + 5**0.5) / 2
CUBE = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))


def cyclic(*corners):
    return np.array([np.roll(corner, shift) for corner in corners for shift in range(3)])


SIGNS = list(itertools.product((-1.0, 1.0), repeat=2))
SOLIDS = {
    "tetrahedron": (CUBE[[0, 3, 5, 6]], 12),
    "cube": (CUBE, 24),
    "octahedron": (np.concatenate([np.eye(3), -np.eye(3)]), 24),
    "icosahedron": (cyclic(*((0, a, b * GOLDEN_RATIO) for a, b in SIGNS)), 60),
    "dodecahedron": (np.concatenate([CUBE, cyclic(*((0, a / GOLDEN_RATIO, b * GOLDEN_RATIO) for a, b in SIGNS))]), 60),
}
# Padded to the same number of points, so that one compilation serves all.
SOLID_MASK = jnp.array([np.arange(20) < len(corners) for corners, _ in SOLIDS.values()])
SOLID_POINTS = jnp.array(
    [np.pad(corners, ((0, 20 - len(corners)), (0, 0)), constant_values=7.0) for corners, _ in SOLIDS.values()],
    jnp.float32,
)
GROUPS = {"E(d)": Euclidean, "SE(d)": SpecialEuclidean, "O(d)": Orthogonal, "SO(d)": Rotation}


def cloud(rng, n=7, d=3):
    """Points whose covariance has eigengaps of about a fifth of its trace."""
    return jnp.asarray(rng.normal(size=(n, d)) * np.arange(1, d + 1) + 0.5, jnp.float32)


def elements(frame):
    """The elements of positive weight, as affine maps [R | t] with their weights."""
    shift = np.zeros(frame.rotations.shape[-1]) if frame.translation is None else np.asarray(frame.translation)
    weights = np.asarray(frame.weights)
    maps = [np.column_stack([rotation, shift]) for rotation in np.asarray(frame.rotations)]
    return [(weight, element) for weight, element in zip(weights, maps, strict=True) if weight > 1e-6]


def distance_of_sets(first, second):
    """The largest distance of an element, with its weight, to its nearest in the other set."""

    def one_way(a, b):
        return max(min(np.abs(x - y).max() + abs(v - w) for w, y in b) for v, x in a)

    return max(one_way(first, second), one_way(second, first))


def moved(group, g, element):
    """The element g h for h = [R | t]: where it takes the axes' tips and the origin."""
    rotation, shift = element[:, :-1], element[:, -1:]
    tips = group.act(g, np.concatenate([rotation + shift, shift], axis=1).T, "points").T
    return np.column_stack([tips[:, :-1] - tips[:, -1:], tips[:, -1:]])


# Euclidean frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 4])
def test_principal_frame_is_all_signs_of_the_eigenvectors_of_numpy(d, rng):
    points = cloud(rng, d=d)
    x = np.asarray(points, np.float64)
    for group in EUCLIDEAN_GROUPS:
        shift = x.mean(axis=0) if "E" in group else np.zeros(d)
        axes = np.linalg.eigh((x - shift).T @ (x - shift))[1]
        signed = [axes * np.array(signs) for signs in itertools.product((1, -1), repeat=d)]
        if "S" in group:
            signed = [rotation for rotation in signed if np.linalg.det(rotation) > 0]
        frame = principal_frame_of(points, group)
        assert frame.size == len(signed) == (2 ** (d - 1) if "S" in group else 2**d)
        expected = [(1 / len(signed), np.column_stack([rotation, shift])) for rotation in signed]
        assert distance_of_sets(elements(frame), expected) < 1e-5


@pytest.mark.parametrize(
    ("make", "group"),
    [
        (principal_frame_of, "E(d)"),
        (principal_frame_of, "SO(d)"),
        (anchor_frame_of, "SO(d)"),
        (weighted_frame_of, "E(d)"),
    ],
    ids=["principal-E", "principal-SO", "anchor-SO", "weighted-E"],
)
def test_frame_turns_with_its_input_as_a_set(make, group, rng):
    points = np.asarray(cloud(rng))
    action = GROUPS[group](3)
    g = action.sample(rng)
    turned = jnp.asarray(action.act(g, points.astype(np.float64), "points"), jnp.float32)
    here = elements(make(jnp.asarray(points), group))
    expected = [(weight, moved(action, g, element)) for weight, element in here]
    assert distance_of_sets(elements(make(turned, group)), expected) < 2e-5
    # The control: a reflection is outside the proper groups, and turns proper elements into improper ones.
    mirror = np.array([1.0, 1.0, -1.0], np.float32)
    mirrored = [(weight, mirror[:, None] * element) for weight, element in here]
    same = distance_of_sets(elements(make(jnp.asarray(points * mirror), group)), mirrored) < 2e-5
    assert same == (group == "E(d)")


@pytest.mark.parametrize("make", [principal_frame_of, weighted_frame_of])
def test_order_and_padding_of_the_points_do_not_matter(make, rng):
    cornerless = [] if make is principal_frame_of else [jnp.asarray(CUBE[:7], jnp.float32)]
    mask = jnp.array([True] * 3 + [False] * 2 + [True] * 4)
    for points in [cloud(rng), *cornerless]:
        expected = elements(make(points, "SO(d)"))
        assert distance_of_sets(elements(make(points[::-1], "SO(d)")), expected) < 1e-5
        padded = jnp.concatenate([points[:3], jnp.array([[9.0, 0.0, 9.0]] * 2), points[3:]])
        assert distance_of_sets(elements(make(padded, "SO(d)", mask=mask)), expected) < 1e-5
        # The control: without the mask the padding counts.
        assert distance_of_sets(elements(make(padded, "SO(d)", mask=mask | True)), expected) > 1e-2


def test_eigengap_is_that_of_known_second_moments():
    axes = jnp.array([[3.0, 0, 0], [-3, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1]])
    np.testing.assert_allclose(eigengap(axes), (4 - 1) / 14, rtol=1e-6)
    assert bool(principal_frame(axes).exact)


def test_degeneracy_of_the_solids_is_detected():
    assert np.all(eigengap(SOLID_POINTS + 0.3, mask=SOLID_MASK) < 1e-5)
    assert not np.any(principal_frame_of(SOLID_POINTS + 0.3, mask=SOLID_MASK).exact)


def test_anchors_of_the_solids_are_as_many_as_their_rotations():
    frame = anchor_frame_of(SOLID_POINTS, "SO(d)", anchors=128, mask=SOLID_MASK)
    assert np.all(frame.exact)
    for index, (name, (_, rotations)) in enumerate(SOLIDS.items()):
        weights = np.asarray(frame.weights[:, index])
        # The axes of the dodecahedron come in two kinds, left and right of a face.
        count = rotations * (2 if name == "dodecahedron" else 1)
        assert np.sum(weights > 1e-6) == count
        np.testing.assert_allclose(weights[weights > 1e-6], 1 / count, rtol=1e-3)


def test_too_few_anchors_are_told():
    exact = weighted_frame_of(SOLID_POINTS, "SO(d)", anchors=24, mask=SOLID_MASK).exact
    np.testing.assert_array_equal(exact, [rotations <= 24 for _, rotations in SOLIDS.values()])


def test_weighted_frame_needs_only_the_principal_elements_where_the_spectrum_is_simple(rng):
    frame = weighted_frame_of(cloud(rng), "E(d)")
    assert frame.principal == 8
    np.testing.assert_allclose(frame.weights[:8], 1 / 8)
    assert not np.any(frame.weights[8:])
    degenerate = weighted_frame_of(jnp.asarray(CUBE[:7], jnp.float32), "E(d)")
    assert not np.any(degenerate.weights[:8])
    np.testing.assert_allclose(jnp.sum(degenerate.weights), 1, rtol=1e-6)


def test_average_is_continuous_through_a_cube_unlike_that_over_the_principal_frame(rng):
    away = rng.normal(size=CUBE.shape)
    path = jnp.asarray(CUBE + np.linspace(-0.3, 0.3, 201)[:, None, None] * away, jnp.float32)
    kernel = jnp.asarray(3 * rng.normal(size=(3, 4)), jnp.float32)

    def largest_step(make):
        def values(path):
            frame = make(path)
            hidden = jnp.tanh(pull(frame, path, "points") @ kernel + 1) ** 3
            return average(frame, jnp.max(hidden, axis=-2), "scalar")

        steps = np.abs(np.diff(np.asarray(jax.jit(values)(path)), axis=0)).max(axis=-1)
        return steps.max() / np.median(steps)

    assert largest_step(weighted_frame) < 8
    assert largest_step(principal_frame) > 40


def test_sample_follows_the_weights_and_carries_their_derivative():
    weights = jnp.array([0.5, 0.25, 0.25, 0.0])
    axes = jnp.stack([jnp.eye(2) * (k + 1) for k in range(4)])

    def frame(weights):
        return Frame(weights, axes, None, None, jnp.array(True), 4)

    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: sample(frame(weights), key).rotations[0, 0, 0]))(keys)
    shares = [float(jnp.mean(drawn == k + 1)) for k in range(4)]
    np.testing.assert_allclose(shares, weights, atol=0.03)
    assert shares[3] == 0

    # The expectation of the derivative of f(g) over samples is the derivative of sum_k w_k f(g_k).
    def estimate(weights, key):
        one = sample(frame(weights), key)
        return average(one, one.rotations[:, 0, 0], "scalar")

    gradients = jax.jit(jax.vmap(jax.grad(estimate), in_axes=(None, 0)))(weights, keys)
    np.testing.assert_allclose(jnp.mean(gradients, axis=0), [1, 2, 3, 0], atol=0.2)
    assert float(estimate(weights, keys[0])) in (1, 2, 3)


def test_eigenvectors_have_the_exact_derivative_where_simple_and_a_finite_one_where_not(rng):
    noise = rng.normal(size=(3, 3))
    simple = jnp.asarray(np.diag([1.0, 2.0, 4.0]) + 0.1 * (noise + noise.T), jnp.float32)

    def projections(decompose):
        # Functions of the eigenvectors alone, that do not depend on their signs.
        return lambda matrix: jnp.sum(jnp.square(decompose(matrix)[1]) * jnp.asarray(noise, jnp.float32))

    stable, plain = jax.grad(projections(stable_eigh)), jax.grad(projections(jnp.linalg.eigh))
    np.testing.assert_allclose(stable(simple), plain(simple), atol=1e-5)
    for repeated in (jnp.eye(3), jnp.zeros((3, 3)), jnp.diag(jnp.array([1.0, 1.0, 2.0]))):
        assert bool(jnp.all(jnp.isfinite(stable(repeated))))
        assert not bool(jnp.all(jnp.isfinite(plain(repeated))))


def test_pull_is_undone_by_push_for_every_representation(rng):
    euclidean = principal_frame(jnp.stack([cloud(rng, n=4), cloud(rng, n=4)]))
    ties = jnp.asarray(rng.integers(0, 2, size=(2, 4, 1)), jnp.float32)
    frame = product(euclidean, permutation_frame_of(ties))
    shapes = {
        "scalar": (5,),
        "points": (4, 3),
        "vectors": (4, 3),
        "point": (3,),
        "vector": (3,),
        "matrix": (3, 3),
        "set": (4, 6),
        "nodes": (4,),
        "adjacency": (4, 4),
        "edges": (4, 4, 2),
    }
    inputs = {name: jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32) for name, shape in shapes.items()}
    pulled = jax.jit(lambda inputs: {name: pull(frame, x, name) for name, x in inputs.items()})(inputs)
    pushed = jax.jit(lambda inputs: {name: push(frame, x, name) for name, x in inputs.items()})(pulled)
    for name, x in inputs.items():
        assert pulled[name].shape == pushed[name].shape == (frame.size, *x.shape)
        np.testing.assert_allclose(pushed[name], np.stack([x] * frame.size), atol=1e-5)
        if name != "scalar":
            assert np.max(np.abs(pulled[name] - x)) > 0.1


def test_product_pairs_all_elements_and_keeps_the_needed_first():
    turns = Frame(
        jnp.array([0.5, 0.3, 0.2]), jnp.arange(3.0)[:, None, None] * jnp.eye(2), None, None, jnp.array(True), 2
    )
    orders = Frame(jnp.array([0.6, 0.4]), None, None, jnp.array([[0, 1], [1, 0]]), jnp.array(False), 1)
    both = product(turns, orders)
    assert (both.size, both.principal, bool(both.exact)) == (6, 2, False)
    pairs = [(int(r[0, 0]), int(o[0])) for r, o in zip(both.rotations, both.orders, strict=True)]
    assert pairs[:2] == [(0, 0), (1, 0)]
    assert sorted(pairs) == list(itertools.product(range(3), range(2)))
    np.testing.assert_allclose(both.weights, [[0.5, 0.3, 0.2][r] * [0.6, 0.4][o] for r, o in pairs], rtol=1e-6)


def test_reduced_precision_inputs_get_frames_in_float32(rng):
    frame = principal_frame(cloud(rng).astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in (frame.weights, frame.rotations, frame.translation)} == {jnp.dtype(jnp.float32)}


# Frames of graphs ---------------------------------------------------------------------------------------------------


def brute_force_orders(keys):
    """Every order of the rows in which they are sorted lexicographically."""
    ordered = sorted(map(tuple, keys))
    candidates = itertools.permutations(range(len(keys)))
    return {order for order in candidates if [tuple(keys[node]) for node in order] == ordered}


@pytest.mark.parametrize("seed", range(2))
def test_permutation_frame_is_all_sorted_orders(seed):
    keys = np.random.default_rng(seed).integers(0, 2, size=(6, 2)).astype(np.float32)
    expected = brute_force_orders(keys)
    frame = permutation_frame_of(jnp.asarray(keys), max_orders=720)
    found = [tuple(order) for order, weight in zip(np.asarray(frame.orders), frame.weights, strict=True) if weight > 0]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert bool(frame.exact)
    np.testing.assert_allclose(frame.weights[frame.weights > 0], 1 / len(expected), rtol=1e-6)
    limited = permutation_frame_of(jnp.asarray(keys), max_orders=2)
    assert bool(limited.exact) == (len(expected) <= 2)


def test_sampled_orders_come_from_the_whole_frame_however_large():
    keys = jnp.array([[1.0], [0.0], [1.0], [0.0], [0.0]])
    frame = permutation_frame_of(keys, max_orders=600, key=jax.random.key(0))
    counts = {}
    for order in map(tuple, np.asarray(frame.orders)):
        counts[order] = counts.get(order, 0) + 1
    assert set(counts) == brute_force_orders(np.asarray(keys))
    assert len(counts) == math.factorial(2) * math.factorial(3)
    assert min(counts.values()) > 25
    assert max(counts.values()) < 85


def test_padding_goes_last_and_adds_no_orders():
    keys = jnp.array([[2.0], [7.0], [1.0], [7.0], [1.0]])
    mask = jnp.array([True, False, True, False, True])
    frame = permutation_frame_of(keys, mask=mask)
    found = {tuple(order) for order, weight in zip(np.asarray(frame.orders), frame.weights, strict=True) if weight > 0}
    assert found == {(2, 4, 0, 1, 3), (4, 2, 0, 1, 3)}


def test_values_within_the_tolerance_tie():
    keys = jnp.array([[1.0], [1.0 + 1e-4], [2.0]])
    assert int(jnp.sum(permutation_frame_of(keys).weights > 0)) == 2
    assert int(jnp.sum(permutation_frame_of(keys, tolerance=1e-5).weights > 0)) == 1


def test_laplacian_keys_are_lengths_in_eigenspaces_whatever_their_basis(rng):
    adjacency = np.triu(rng.random((7, 7)) < 0.4, 1).astype(np.float64)
    adjacency[5:] = 0
    adjacency[:, 5:] = 0
    adjacency = adjacency + adjacency.T
    laplacian = np.diag(adjacency.sum(axis=1)) - adjacency
    values = np.linalg.eigvalsh(laplacian)
    keys = np.asarray(laplacian_keys(jnp.asarray(adjacency, jnp.float32)))
    for value, column in zip(values, keys.T, strict=True):
        # The projector onto an eigenspace as a polynomial in the matrix.
        others = [other for other in sorted(set(np.round(values, 6))) if abs(other - value) > 1e-3]
        projector = np.eye(7)
        for other in others:
            projector = projector @ (laplacian - other * np.eye(7)) / (value - other)
        np.testing.assert_allclose(column, np.sqrt(np.maximum(np.diag(projector), 0)), atol=2e-3)


def test_keys_follow_the_nodes_and_ignore_motions_and_padding(rng):
    points = np.asarray(cloud(rng))
    order = rng.permutation(7)
    group = Euclidean(3)
    turned = jnp.asarray(group.act(group.sample(rng), points.astype(np.float64), "points"), jnp.float32)
    expected = distance_keys(jnp.asarray(points))
    np.testing.assert_allclose(distance_keys(turned[order]), expected[order], atol=1e-4)
    padded = jnp.concatenate([jnp.asarray(points), jnp.full((2, 3), 9.0)])
    mask = jnp.arange(9) < 7
    np.testing.assert_allclose(distance_keys(padded, mask=mask)[:7, :7], expected, atol=1e-5)
    adjacency = rng.random((7, 7)).astype(np.float32)
    adjacency = adjacency + adjacency.T
    expected = laplacian_keys(jnp.asarray(adjacency))
    found = laplacian_keys(jnp.asarray(adjacency[np.ix_(order, order)]))
    np.testing.assert_allclose(found, np.asarray(expected)[order], atol=1e-4)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: principal_frame(x, "SU(2)"), r"group='SU\(2\)' is not a group of point clouds; use one of"),
        (lambda x: principal_frame(x[0]), r"points of shape \(3,\).* must be floating \[\*batch, n, d\]"),
        (lambda x: principal_frame(x.astype(int)), r"dtype int.* must be floating"),
        (lambda x: principal_frame(x[:0]), r"n and d at least 1"),
        (lambda x: principal_frame(x, mask=jnp.ones(3, bool)), r"mask of shape \(3,\) .* boolean of shape \(7,\)"),
        (lambda x: weighted_frame(x, mask=jnp.ones(7)), r"dtype float32 must be boolean"),
        (lambda x: weighted_frame(x, anchors=0), r"anchors=0 must be at least 1"),
        (lambda x: weighted_frame(x, gap_range=(0.1, 0.1)), r"gap_range=\(0.1, 0.1\) must rise within 0 to 1"),
        (lambda x: pull(principal_frame(x), x, "tensor"), r"representation='tensor' is unknown; use one of"),
        (
            lambda x: average(principal_frame(x), x, "points"),
            r"returned shape \(7, 3\), which must begin with .* \(8,\)",
        ),
        (lambda x: permutation_frame(x, max_orders=0), r"max_orders=0 must be at least 1"),
    ],
)
def test_wrong_uses_are_refused(wrong, message, rng):
    with pytest.raises(ValueError, match=message):
        wrong(cloud(rng))


def test_select_keeps_weights_and_counts_the_needed(rng):
    frame = weighted_frame_of(cloud(rng), "E(d)")
    first, rest = select(frame, 0, 8), select(frame, 8, frame.size)
    assert (first.size, first.principal, rest.principal) == (8, 8, 0)
    assert first.size + rest.size == frame.size
