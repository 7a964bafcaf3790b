"""Group laws, actions and sampling of every group on every representation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.geometry.groups import (
    REPRESENTATIONS,
    Cyclic,
    Dihedral,
    Euclidean,
    GeneralLinear,
    Motion,
    Orthogonal,
    Product,
    Rotation,
    Scale,
    SpecialEuclidean,
    SpecialLinear,
    Symmetric,
    Translation,
)
from jaxlayers.geometry.images import disk_mask, resample_image

SETS = ("points", "vectors", "set", "adjacency", "edges")
SPACE = ("points", "vectors", "point", "vector", "matrix")

# Group, size of its space, the representations it moves, and those it moves by interpolation.
TABLE = [
    (Translation(3), 3, ("points", "point"), ()),
    (Translation(2), 2, ("points", "point"), ("image",)),
    (Translation(1, cyclic=True), 3, ("set",), ()),
    (Translation(2, cyclic=True), 3, ("image",), ()),
    (Rotation(2), 2, SPACE, ("image",)),
    (Rotation(3), 3, SPACE, ()),
    (Rotation(4), 4, SPACE, ()),
    (Orthogonal(1), 1, ("points", "vectors", "point", "vector"), ()),
    (Orthogonal(2), 2, SPACE, ("image",)),
    (Orthogonal(3), 3, SPACE, ()),
    (SpecialEuclidean(2), 2, SPACE, ("image",)),
    (SpecialEuclidean(3), 3, SPACE, ()),
    (Euclidean(3), 3, SPACE, ()),
    (Scale(1.5), 3, SPACE, ("image",)),
    (GeneralLinear(3), 3, SPACE, ()),
    (SpecialLinear(3), 3, SPACE, ()),
    (Cyclic(2), 2, ("points", "vectors", "point", "vector", "image"), ()),  # -I leaves a matrix alone
    (Cyclic(4), 2, (*SPACE, "image"), ()),
    (Cyclic(5), 2, SPACE, ("image",)),
    (Cyclic(8), 2, SPACE, ("image",)),
    (Dihedral(1), 2, (*SPACE, "image"), ()),
    (Dihedral(4), 2, (*SPACE, "image"), ()),
    (Dihedral(6), 2, SPACE, ("image",)),
    (Symmetric(5), 3, SETS, ()),
    (Symmetric(5, layer=1), 3, ("weights",), ()),
    (Product(Symmetric(5), Rotation(3)), 3, (*SPACE, "set", "adjacency", "edges"), ()),
    (Product(Scale(1.5), Orthogonal(3)), 3, SPACE, ("image",)),
    (Product(Symmetric(5, layer=0), Symmetric(5, layer=1)), 3, ("weights",), ()),
]
GROUPS = pytest.mark.parametrize(
    ("group", "dimension", "moves", "interpolates"), TABLE, ids=lambda value: str(value)[:48]
)


def bumps(size=25, channels=2):
    """A smooth picture well inside the inscribed disk."""
    rows, columns = np.meshgrid(np.arange(size) - (size - 1) / 2, np.arange(size) - (size - 1) / 2, indexing="ij")
    centres = ((0.08, 0.1), (-0.12, 0.04))[:channels]
    return np.stack(
        [np.exp(-((rows - a * size) ** 2 + (columns - b * size) ** 2) / (0.12 * size) ** 2) for a, b in centres],
        axis=-1,
    )


def data(representation, dimension, rng, batch=(2,)):
    if representation == "weights":
        sizes = (3, 5, 5, 2)
        return [(rng.normal(size=(a, b)), rng.normal(size=b)) for a, b in itertools.pairwise(sizes)]
    shapes = {
        "scalar": (),
        "points": (5, dimension),
        "vectors": (5, dimension),
        "point": (dimension,),
        "vector": (dimension,),
        "matrix": (dimension, dimension),
        "image": (6, 6, 2),
        "set": (5, 4),
        "adjacency": (5, 5),
        "edges": (5, 5, 3),
    }
    return rng.normal(size=batch + shapes[representation])


def close(actual, expected, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def differs(a, b):
    return any(
        x.shape != y.shape or np.max(np.abs(x - y)) > 1e-3
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@GROUPS
def test_elements_obey_the_group_axioms(group, dimension, moves, interpolates, rng):
    a, b, c = (group.sample(rng) for _ in range(3))
    one = group.identity()
    close(group.compose(a, group.compose(b, c)), group.compose(group.compose(a, b), c))
    close(group.compose(one, a), a)
    close(group.compose(a, one), a)
    close(group.compose(a, group.inverse(a)), one)
    close(group.compose(group.inverse(a), a), one)
    assert jax.tree.structure(one) == jax.tree.structure(a) == jax.tree.structure(group.inverse(a))
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype in (np.float64, np.int64) for leaf in jax.tree.leaves(a))


@GROUPS
def test_action_respects_composition_identity_and_inverse_on_every_representation(
    group, dimension, moves, interpolates, rng
):
    for representation in REPRESENTATIONS:
        if representation in interpolates:
            continue
        x = data(representation, dimension, rng)
        moved = False
        for _ in range(12):
            g, h = group.sample(rng), group.sample(rng)
            close(
                group.act(group.compose(g, h), x, representation),
                group.act(g, group.act(h, x, representation), representation),
            )
            close(group.act(group.identity(), x, representation), x, 0.0)
            image = group.act(g, x, representation)
            close(group.act(group.inverse(g), image, representation), x)
            moved = moved or differs(image, x)
        assert moved == (representation in moves), representation


@pytest.mark.parametrize("group", [row[0] for row in TABLE if row[3]], ids=lambda value: str(value)[:48])
def test_interpolated_action_on_images_respects_composition(group, rng):
    x = bumps()
    for _ in range(4):
        g, h = group.sample(rng, scale=0.5), group.sample(rng)
        image = group.act(g, group.act(h, x, "image"), "image")
        assert np.max(np.abs(group.act(group.compose(g, h), x, "image") - image)) < 0.03
        assert np.max(np.abs(group.act(group.inverse(h), group.act(h, x, "image"), "image") - x)) < 0.03
        close(group.act(group.identity(), x, "image"), x)
        assert (
            np.max(np.abs(group.act(group.compose(h, g), x, "image") - x)) > 0.03
            or group.magnitude(group.compose(h, g)) < 0.2
        )


@GROUPS
def test_magnitude_is_zero_at_the_identity_and_scale_shrinks_it(group, dimension, moves, interpolates, rng):
    assert group.magnitude(group.identity()) == 0.0
    near = [group.magnitude(group.sample(rng, scale=0.3)) for _ in range(60)]
    far = [group.magnitude(group.sample(rng)) for _ in range(60)]
    assert max(far) > 0.0
    if group not in (Cyclic(2), Dihedral(1), Orthogonal(1)):  # too few elements to shrink
        assert np.mean(near) < np.mean(far)
        assert max(near) < max(far)


@pytest.mark.parametrize("dimension", [2, 3, 4, 5])
def test_scaled_rotation_multiplies_the_angles_of_the_full_one(dimension):
    group = Rotation(dimension)
    full = group.sample(np.random.default_rng(3))
    for scale in (0.5, 0.1, 1e-3):
        small = group.sample(np.random.default_rng(3), scale=scale)
        assert np.isclose(group.magnitude(small), scale * group.magnitude(full), rtol=1e-8)
        np.testing.assert_allclose(small @ full, full @ small, atol=1e-12)
    close(np.linalg.matrix_power(group.sample(np.random.default_rng(3), scale=0.5), 2), full, 1e-10)


@pytest.mark.parametrize("angle", [0.0, 0.4, 3.0])
def test_magnitude_of_a_rotation_is_its_angle(angle):
    matrix = np.eye(3)
    matrix[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    assert np.isclose(Rotation(3).magnitude(matrix), angle)
    assert np.isclose(Rotation(2).magnitude(matrix[1:, 1:]), angle)
    assert np.isclose(Orthogonal(3).magnitude(np.diag([1.0, -1.0, 1.0])), np.pi / np.sqrt(2))


@pytest.mark.parametrize("dimension", [1, 2, 3, 6])
def test_samples_are_orthogonal_with_the_stated_determinant(dimension, rng):
    groups = [Orthogonal(dimension), Euclidean(dimension)]
    if dimension > 1:
        groups += [Rotation(dimension), SpecialEuclidean(dimension)]
    for group in groups:
        signs = set()
        for scale in (1.0, 0.2):
            for _ in range(24):
                g = group.sample(rng, scale=scale)
                matrix = g.matrix if isinstance(g, Motion) else g
                np.testing.assert_allclose(matrix @ matrix.T, np.eye(dimension), atol=1e-12)
                sign = round(float(np.linalg.det(matrix)))
                assert group.is_proper(g) == (sign == 1)
                if scale == 1.0:
                    signs.add(sign)
                else:
                    assert sign == 1, "no reflection is near the identity"
        assert signs == ({1, -1} if group.has_improper else {1})


def test_linear_groups_draw_well_conditioned_matrices_of_the_right_determinant(rng):
    special = [np.linalg.det(SpecialLinear(4).sample(rng)) for _ in range(20)]
    np.testing.assert_allclose(special, 1.0, rtol=1e-12)
    general = [GeneralLinear(4).sample(rng) for _ in range(40)]
    assert {np.sign(np.linalg.det(g)) for g in general} == {1.0, -1.0}
    assert {GeneralLinear(4).is_proper(g) for g in general} == {True, False}
    assert max(np.linalg.cond(g) for g in general) <= 4.0 + 1e-9
    assert np.std([abs(np.linalg.det(g)) for g in general]) > 0.1


def test_finite_groups_draw_all_their_elements(rng):
    assert {int(Cyclic(6).sample(rng)) for _ in range(200)} == set(range(6))
    assert len({tuple(map(int, Dihedral(3).sample(rng))) for _ in range(200)}) == 6
    assert len({tuple(Symmetric(4).sample(rng)) for _ in range(600)}) == 24
    assert {int(Cyclic(12).sample(rng, scale=0.4)) for _ in range(200)} == {10, 11, 0, 1, 2}


def _moments(draw, count=4000):
    """How many standard errors sample moments lie from those of the Haar measure of O(d), d >= 2."""
    rng = np.random.default_rng(0)
    matrices = np.stack([draw(rng) for _ in range(count)])
    trace = np.trace(matrices, axis1=1, axis2=2)
    corner = matrices[:, 0, 0]
    dimension = matrices.shape[-1]
    samples = {
        "trace": (trace, 0.0),
        "trace squared": (trace**2, 1.0),
        "entry": (corner, 0.0),
        "entry squared": (corner**2, 1.0 / dimension),
        "entry to the fourth": (corner**4, 3.0 / (dimension * (dimension + 2))),
        "product of entries": (corner * matrices[:, 1, 1], 0.0),
    }
    return {name: abs(x.mean() - mean) / (x.std() / np.sqrt(count)) for name, (x, mean) in samples.items()}


@pytest.mark.parametrize("dimension", [3, 4])
def test_orthogonal_samples_have_the_moments_of_haar_measure(dimension):
    scores = _moments(Orthogonal(dimension).sample)
    assert max(scores.values()) < 4.0, scores


def test_rotation_samples_have_the_moments_of_haar_measure():
    scores = _moments(Rotation(3).sample)  # O(3) is SO(3) x {1, -1}, so even moments agree and the trace has mean 0
    assert max(value for name, value in scores.items() if name != "product of entries") < 4.0, scores
    rng = np.random.default_rng(0)
    angles = np.array([Rotation(3).magnitude(Rotation(3).sample(rng)) for _ in range(1000)])
    # The angle of a Haar rotation has density (1 - cos t) / pi on [0, pi], hence mean pi / 2 + 2 / pi.
    assert abs(angles.mean() - (np.pi / 2 + 2 / np.pi)) < 4.0 * angles.std() / np.sqrt(1000)


def test_moments_tell_a_plain_qr_from_haar_measure():
    scores = _moments(lambda rng: np.linalg.qr(rng.standard_normal((3, 3)))[0])
    assert max(scores.values()) > 20.0, scores


# Actions on data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (5, 5), (4, 7), (3, 2)])
@pytest.mark.parametrize("group", [Cyclic(4), Dihedral(4)], ids=str)
def test_quarter_turns_and_flips_of_images_are_exact_to_the_bit(group, shape, rng):
    x = rng.normal(size=(2, *shape, 3)).astype(np.float32)
    height, width = shape
    for _ in range(12):
        g = group.sample(rng)
        y = group.act(g, x, "image")
        assert y.dtype == x.dtype
        steps, flip = (int(g), 0) if isinstance(group, Cyclic) else map(int, g)
        expected = np.empty_like(y)
        for row in range(height):  # every pixel is carried by hand, through doubled coordinates from the centre
            for column in range(width):
                a, b = 2 * row - (height - 1), 2 * column - (width - 1)
                b = -b if flip else b
                for _ in range(steps):
                    a, b = -b, a
                expected[:, (a + y.shape[1] - 1) // 2, (b + y.shape[2] - 1) // 2] = x[:, row, column]
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(group.act(group.inverse(g), y, "image"), x)
        np.testing.assert_array_equal(group.act(g, jnp.asarray(x), "image"), expected)


@pytest.mark.parametrize("size", [8, 9])
def test_interpolation_agrees_with_the_exact_quarter_turn_and_whole_pixel_shift(size, rng):
    x = rng.normal(size=(size, size, 2))
    quarter = Cyclic(4)._parts(np.asarray(1), 2)[0]
    np.testing.assert_allclose(
        Rotation(2).act(quarter, x, "image"), Cyclic(4).act(np.asarray(1), x, "image"), atol=1e-12
    )
    shifted = Translation(2).act(np.array([2.0, -1.0]), x, "image")
    np.testing.assert_allclose(shifted[2:, :-1], x[:-2, 1:], atol=1e-12)
    assert not shifted[:2].any()
    assert not shifted[:, -1].any()
    np.testing.assert_array_equal(
        Translation(2, cyclic=True).act(np.array([2, -1]), x, "image"), np.roll(x, (2, -1), (0, 1))
    )


def test_interpolation_error_falls_with_the_third_power_of_the_pixel():
    """The cubic kernel is third-order; a linear one would lose a factor of four only for each doubling."""
    errors = []
    for size in (25, 50, 100):
        x = bumps(size)
        turned = Rotation(2).act(Cyclic(12)._parts(np.asarray(1), 2)[0], x, "image")
        rows = (np.arange(size) - (size - 1) / 2)[:, None]
        columns = (np.arange(size) - (size - 1) / 2)[None, :]
        cosine, sine = np.cos(np.pi / 6), np.sin(np.pi / 6)
        back = (cosine * rows + sine * columns, cosine * columns - sine * rows)
        exact = np.stack(
            [
                np.exp(-((back[0] - a * size) ** 2 + (back[1] - b * size) ** 2) / (0.12 * size) ** 2)
                for a, b in ((0.08, 0.1), (-0.12, 0.04))
            ],
            axis=-1,
        )
        errors.append(np.max(np.abs((turned - exact) * disk_mask(size, size))))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] > 6.0
    assert errors[1] / errors[2] > 6.0


def test_images_scale_about_their_centre():
    x = bumps(31, 1)
    y = Scale().act(np.asarray(2.0), x, "image")
    np.testing.assert_allclose(y[15 + 6, 15 + 4], x[15 + 3, 15 + 2], atol=1e-12)
    np.testing.assert_allclose(y[15, 15], x[15, 15], atol=1e-12)


def test_permutation_of_a_graph_agrees_with_brute_force_over_edges(rng):
    group, size = Symmetric(6), 6
    g = group.sample(rng)
    nodes, adjacency, edges = rng.normal(size=(6, 2)), rng.integers(0, 2, size=(6, 6)), rng.normal(size=(6, 6, 3))
    new_nodes, new_adjacency, new_edges = np.empty_like(nodes), np.empty_like(adjacency), np.empty_like(edges)
    for i in range(size):
        new_nodes[g[i]] = nodes[i]
        for j in range(size):
            new_adjacency[g[i], g[j]] = adjacency[i, j]
            new_edges[g[i], g[j]] = edges[i, j]
    np.testing.assert_array_equal(group.act(g, nodes, "set"), new_nodes)
    np.testing.assert_array_equal(group.act(g, nodes, "points"), new_nodes)
    np.testing.assert_array_equal(group.act(g, adjacency, "adjacency"), new_adjacency)
    np.testing.assert_array_equal(group.act(g, edges, "edges"), new_edges)
    # Consistent among each other: summing neighbours commutes with the relabelling.
    np.testing.assert_allclose(new_adjacency @ new_nodes, group.act(g, adjacency @ nodes, "set"))
    boolean = adjacency.astype(bool)
    assert group.act(g, boolean, "adjacency").dtype == bool
    matrix = np.zeros((6, 6))
    matrix[g, np.arange(6)] = 1.0
    np.testing.assert_array_equal(matrix @ adjacency @ matrix.T, new_adjacency)


def _perceptron(weights, x):
    for kernel, bias in weights[:-1]:
        x = np.tanh(x @ kernel + bias)
    return x @ weights[-1][0] + weights[-1][1]


def test_hidden_permutation_changes_the_weights_but_not_the_function(rng):
    weights, x = data("weights", 3, rng), rng.normal(size=(7, 3))
    group = Product(Symmetric(5, layer=0), Symmetric(5, layer=1))
    g = (np.array([1, 2, 3, 4, 0]), np.array([4, 0, 1, 2, 3]))
    moved = group.act(g, weights, "weights")
    assert jax.tree.structure(moved) == jax.tree.structure(weights)
    assert differs(moved, weights)
    np.testing.assert_allclose(_perceptron(moved, x), _perceptron(weights, x), rtol=1e-12)
    kernel, bias = weights[0]
    wrong = [(kernel[:, g[0]], bias), *weights[1:]]  # control: a permutation of the kernel alone changes the function
    assert differs(_perceptron(wrong, x), _perceptron(weights, x))


def test_translations_move_points_but_not_vectors(rng):
    x, g = rng.normal(size=(2, 5, 3)), np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(Translation(3).act(g, x, "points"), x + g)
    np.testing.assert_array_equal(Translation(3).act(g, x, "vectors"), x)
    element = Euclidean(3).sample(rng)
    difference = Euclidean(3).act(element, x, "points") - Euclidean(3).act(element, x[:, :1], "points")
    np.testing.assert_allclose(difference, Euclidean(3).act(element, x - x[:, :1], "vectors"), atol=1e-12)


def test_matrix_transforms_as_the_outer_product_of_vectors(rng):
    for group in (Orthogonal(3), GeneralLinear(3), Euclidean(3), Scale()):
        v, g = rng.normal(size=(4, 3)), group.sample(rng)
        w = group.act(g, v, "vector")
        outer = v[:, :, None] * v[:, None, :]
        np.testing.assert_allclose(group.act(g, outer, "matrix"), w[:, :, None] * w[:, None, :], rtol=1e-12, atol=1e-12)


def test_quarter_turns_of_points_are_exact_to_the_bit(rng):
    x = rng.normal(size=(5, 2))
    np.testing.assert_array_equal(Cyclic(4).act(np.asarray(1), x, "points"), np.stack([-x[:, 1], x[:, 0]], axis=-1))


# Kinds and dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "dimension", "moves", "interpolates"),
    [row for row in TABLE if row[0].name in ("T(2)", "Z(2)", "SE(2)", "O(3)", "R+", "D4", "S5", "S5 x SO(3)")],
    ids=lambda value: str(value)[:48],
)
def test_jax_arrays_stay_jax_arrays_of_their_dtype_and_agree_with_numpy(group, dimension, moves, interpolates, rng):
    g = group.sample(rng)
    for representation in (*moves, *interpolates):
        x = jax.tree.map(lambda leaf: leaf.astype(np.float32), data(representation, dimension, rng))
        expected = group.act(g, x, representation)
        actual = group.act(g, jax.tree.map(jnp.asarray, x), representation)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert isinstance(a, jax.Array)
            assert isinstance(b, np.ndarray)
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_action_on_jax_arrays_asks_for_full_precision_of_the_matrix_unit(rng):
    """Accelerators multiply float32 matrices in fewer bits by default, which would look like broken equivariance."""
    jaxpr = str(jax.make_jaxpr(lambda x: Rotation(3).act(Rotation(3).sample(rng), x, "points"))(jnp.ones((4, 3))))
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in jaxpr


def test_action_traces_under_jit_and_keeps_float64_and_bfloat16(rng):
    g = Euclidean(3).sample(rng)
    x = rng.normal(size=(4, 3))
    wide = Euclidean(3).act(g, x, "points")
    assert wide.dtype == np.float64
    narrow = jax.jit(lambda x: Euclidean(3).act(g, x, "points"))(jnp.asarray(x, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float64), wide, atol=0.05)
    assert Euclidean(3).act(g, np.asarray(narrow), "points").dtype == jnp.bfloat16
    with jax.enable_x64(True):
        precise = jax.jit(lambda x: Euclidean(3).act(g, x, "points"))(jnp.asarray(x))
        assert precise.dtype == jnp.float64
        np.testing.assert_allclose(precise, wide, rtol=1e-13)
    assert Euclidean(3).act(g, np.arange(6).reshape(2, 3), "points").dtype == np.float64
    assert Euclidean(3).act(g, x.astype(np.complex64), "points").dtype == np.complex64
    image = rng.normal(size=(6, 6, 1)).astype(np.float32)
    traced = jax.jit(lambda x: Cyclic(8).act(np.asarray(1), x, "image"))(image)
    np.testing.assert_allclose(traced, Cyclic(8).act(np.asarray(1), image, "image"), atol=1e-5)


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "shape", "representation", "message"),
    [
        (Rotation(3), (4, 3), "pionts", r"representation 'pionts' is unknown; use one of \['adjacency', .*'weights'\]"),
        (Rotation(3), (3,), "points", r"'points' needs an array of rank 2 or more; got shape \(3,\); add"),
        (Rotation(3), (4, 2), "points", r"'points' of SO\(3\) needs trailing size 3; got shape \(4, 2\); pass"),
        (Rotation(2), (2, 3), "matrix", r"'matrix' of SO\(2\) needs trailing size 2; got shape \(2, 3\); pass"),
        (Scale(), (2, 3), "matrix", r"'matrix' of R\+ needs trailing size 3; got shape \(2, 3\); pass"),
        (Symmetric(5), (4, 3), "set", r"'set' of S5 needs size 5 at axis -2; got shape \(4, 3\); use Symmetric\(4\)"),
        (Symmetric(5), (5, 4), "adjacency", r"'adjacency' of S5 needs size 5 at axis -1; got shape \(5, 4\)"),
        (Cyclic(8), (4, 5, 1), "image", r"C8 acts on square images only; got shape \(4, 5, 1\); crop or pad"),
        (Dihedral(4), (4, 4), "image", r"'image' needs an array of rank 3 or more; got shape \(4, 4\)"),
        (Symmetric(5, layer=0), (5, 4), "weights", r"'weights' needs a list of \(kernel, bias\) pairs; got PyTreeDef"),
    ],
)
def test_act_says_what_does_not_fit(group, shape, representation, message, rng):
    with pytest.raises(ValueError, match=message):
        group.act(group.sample(rng), np.zeros(shape), representation)


def test_weights_of_the_wrong_size_or_layer_are_named(rng):
    weights = data("weights", 3, rng)
    with pytest.raises(ValueError, match=r"layer=2 must be a hidden layer, at most 1 for 3 pairs"):
        Symmetric(2, layer=2).act(np.arange(2), weights, "weights")
    with pytest.raises(
        ValueError, match=r"S4 at layer=1 needs size 4 at axis -1 of pair 1; got shape \(5, 5\); set size"
    ):
        Symmetric(4, layer=1).act(np.arange(4), weights, "weights")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotation(1), "dimension=1 must be at least 2; set dimension"),
        (lambda: Cyclic(1), "order=1 must be at least 2; set order"),
        (lambda: Symmetric(1), "size=1 must be at least 2; set size"),
        (lambda: Scale(0.5), r"maximum=0\.5 must be above 1; set the largest factor"),
        (lambda: Product(), "a product of 0 groups has no elements; pass at least one group"),
        (lambda: resample_image(np.zeros((3, 3)), np.eye(2), np.zeros(2)), r"got shape \(3, 3\); add axes"),
    ],
)
def test_impossible_groups_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("group", [row[0] for row in TABLE], ids=lambda value: str(value)[:48])
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_scale_outside_its_range_is_refused(group, scale, rng):
    with pytest.raises(ValueError, match=rf"scale={scale} must lie in \(0, 1\]; set scale"):
        group.sample(rng, scale=scale)


def test_names_and_descriptions_are_short():
    names = [row[0].name for row in TABLE]
    assert names[:8] == ["T(3)", "T(2)", "Z(1)", "Z(2)", "SO(2)", "SO(3)", "SO(4)", "O(1)"]
    assert Product(Scale(), Dihedral(4), GeneralLinear(2)).name == "R+ x D4 x GL(2)"
    assert Rotation(2).describe(np.eye(2)) == "[[1., 0.], [0., 1.]]"
    assert len(Symmetric(1000).describe(np.arange(1000))) < 60
    product = Product(Symmetric(3), Rotation(2))
    assert product.describe(product.identity()) == "S3: [0, 1, 2]; SO(2): [[1., 0.], [0., 1.]]"


def test_product_is_improper_when_an_odd_number_of_factors_is():
    group = Product(Orthogonal(3), Dihedral(4))
    mirror, flip = np.diag([1.0, 1.0, -1.0]), Dihedral(4).identity()._replace(flip=np.asarray(1))
    assert group.has_improper
    assert group.is_proper(group.identity())
    assert group.is_proper((mirror, flip))
    assert not group.is_proper((mirror, Dihedral(4).identity()))
    assert not Product(Rotation(3), Symmetric(4)).has_improper
