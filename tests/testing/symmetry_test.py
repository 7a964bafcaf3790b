"""The assertions pass on symmetric functions, fail on broken ones with a useful message, and refuse idle checks."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlayers.geometry.groups import (
    Cyclic,
    Dihedral,
    Euclidean,
    Orthogonal,
    Product,
    Rotation,
    Scale,
    SpecialEuclidean,
    SpecialLinear,
    Symmetric,
    Translation,
)
from jaxlayers.geometry.images import disk_mask
from jaxlayers.testing.symmetry import (
    EquivarianceCurve,
    IdleCheckError,
    Symmetry,
    assert_equivariant,
    assert_invariant,
    equivariance_error,
    sample_elements,
)


@pytest.fixture
def points(rng):
    return rng.normal(size=(2, 5, 3)).astype(np.float32)


def centred(x):
    return x - np.mean(x, axis=-2, keepdims=True)


def triple_product(x):
    """Invariant under rotations; a reflection changes its sign."""
    return np.linalg.det(x[..., :3, :])


# Passing ----------------------------------------------------------------------------------------------------------


def test_symmetric_functions_pass_on_every_kind_of_data(points, rng):
    assert_equivariant(centred, Orthogonal(3), points, representations=["points"], output="points")
    assert_invariant(lambda x: np.sum(centred(x) ** 2), Euclidean(3), points, representations=["points"])
    assert_equivariant(
        lambda x: np.einsum("...ni,...nj->...ij", x, x),
        SpecialLinear(3),
        points,
        representations=["points"],
        output="matrix",
        tolerance=1e-4,
    )
    image = rng.normal(size=(1, 6, 6, 2)).astype(np.float32)
    pool = jax.jit(lambda x: nn.avg_pool(x, (2, 2), strides=(2, 2)))
    assert_equivariant(pool, Dihedral(4), image, representations=["image"], output="image")
    assert_equivariant(
        lambda x: x - np.roll(x, 1, axis=-2),
        Translation(2, cyclic=True),
        image,
        representations=["image"],
        output="image",
    )
    nodes, adjacency = rng.normal(size=(5, 2)), rng.integers(0, 2, size=(5, 5))
    assert_equivariant(
        lambda x, a: (a @ x, a.T @ a), Symmetric(5), nodes, adjacency, representations=["set", "adjacency"],
        output=("set", "adjacency"),
    )  # fmt: skip


def test_two_inputs_of_one_kind_are_moved_together(points):
    other = points[::-1] + 1.0
    cross = lambda x, y: np.cross(x, y)  # noqa: E731
    assert_equivariant(cross, Rotation(3), points, other, representations=["vectors", "vectors"], output="vectors")
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(cross, Rotation(3), points, other, representations=["vectors", None], output="vectors")


def test_weight_space_symmetry_of_a_perceptron(rng):
    weights = [(rng.normal(size=s), rng.normal(size=s[-1])) for s in ((3, 4), (4, 4), (4, 2))]
    x = rng.normal(size=(6, 3))

    def network(weights, x, activation=np.tanh):
        for kernel, bias in weights[:-1]:
            x = activation(x @ kernel + bias)
        return x @ weights[-1][0] + weights[-1][1]

    group = Product(Symmetric(4, layer=0), Symmetric(4, layer=1))
    assert_invariant(network, group, weights, x, representations=["weights", None])
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(network(w, x, jnp.tanh) ** 2)))
    assert_equivariant(gradient, group, weights, representations=["weights"], output="weights")
    with pytest.raises(AssertionError, match="not invariant under S4 x S4"):
        assert_invariant(lambda w: w[0][0] @ w[1][0].T, group, weights, representations=["weights"])


def test_pytrees_in_and_out_take_pytrees_of_names(points):
    def fn(graph):
        x = graph["x"]
        return {
            "centre": np.mean(x, axis=-2),
            "moved": (x + 1.0 * graph["v"], graph["v"]),
            "size": np.sum(graph["v"] ** 2),
        }

    graph = {"x": points, "v": points[::-1]}
    representations = [{"x": "points", "v": "vectors"}]
    output = {"centre": "point", "moved": ("points", "vectors"), "size": "scalar"}
    assert_equivariant(fn, Euclidean(3), graph, representations=representations, output=output)
    wrong = {**output, "moved": ("points", "points")}
    with pytest.raises(AssertionError, match=r"where: output\['moved'\]\[1\] at index"):
        assert_equivariant(fn, Euclidean(3), graph, representations=representations, output=wrong)
    # A prefix of the output tree stands for all below it; None leaves out.
    prefix = {"centre": None, "moved": "vectors", "size": "scalar"}
    assert_equivariant(fn, Rotation(3), graph, representations=["vectors"], output=prefix)


def test_gradient_of_an_invariant_energy_is_equivariant(points):
    group = Product(Symmetric(5), Orthogonal(3))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jnp.sum((x - jnp.mean(x, -2, keepdims=True)) ** 2, -1)))))
    assert_equivariant(gradient, group, points, representations=["points"], output="vectors")
    broken = jax.jit(jax.grad(lambda x: jnp.sum(x**4)))
    with pytest.raises(AssertionError, match=r"not equivariant under S5 x O\(3\)"):
        assert_equivariant(broken, group, points, representations=["points"], output="vectors")


class Attention(nn.Module):
    """Set attention without positions."""

    @nn.compact
    def __call__(self, x, order=False):
        query, key, value = (nn.Dense(4, name=name)(x) for name in ("query", "key", "value"))
        if order:
            value = value * jnp.arange(1.0, 1.0 + x.shape[-2])[:, None]
        return jax.nn.softmax(query @ jnp.swapaxes(key, -1, -2)) @ value


def test_linen_module_with_parameters_under_jit(points):
    module = Attention()
    variables = jax.jit(module.init)(jax.random.key(0), points)
    apply = jax.jit(module.apply, static_argnums=2)
    assert_equivariant(
        lambda v, x: apply(v, x, False), Symmetric(5), variables, points, representations=[None, "set"], output="set"
    )
    with pytest.raises(AssertionError, match=r"not equivariant under S5: relative error .* \(8 of 8 elements fail\)"):
        assert_equivariant(
            lambda v, x: apply(v, x, True), Symmetric(5), variables, points, representations=[None, "set"], output="set"
        )


def test_nnx_module_is_called_as_it_is(points):
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 4, rngs=rngs)
            self.outer = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.outer(jnp.mean(jnp.tanh(self.inner(x)), axis=-2))

    model = Deep(nnx.Rngs(0))
    assert_invariant(nnx.jit(model), Symmetric(5), jnp.asarray(points), representations=["set"])
    with pytest.raises(AssertionError, match=r"\[assert_invariant\] Deep is not invariant under SO\(3\)"):
        assert_invariant(model, Rotation(3), jnp.asarray(points), representations=["points"])


def test_numpy_functions_see_numpy_arrays_of_the_dtype_given(points):
    seen = set()

    def fn(x):
        seen.add((type(x), x.dtype.name))
        return np.sort(np.linalg.norm(x, axis=-1), axis=-1)

    assert_invariant(fn, Product(Symmetric(5), Orthogonal(3)), points, representations=["points"])
    assert_invariant(fn, Orthogonal(3), points.astype(np.float64), representations=["points"])
    assert seen == {(np.ndarray, "float32"), (np.ndarray, "float64")}


def test_jax_arrays_reach_the_function_as_jax_arrays(points):
    def fn(x, key):
        assert isinstance(x, jax.Array)
        assert x.dtype == jnp.bfloat16
        return jnp.sum(x**2, axis=-1) + 0 * jax.random.normal(key)

    key = jax.random.key(0)
    assert_invariant(fn, Rotation(3), jnp.asarray(points, jnp.bfloat16), key, representations=["points", None])


# Failing ----------------------------------------------------------------------------------------------------------


def test_message_names_element_leaf_index_and_size(points):
    def broken(x):
        return {"norms": jnp.linalg.norm(x, axis=-1).at[1, 2].add(0.01 * x[1, 2, 0])}

    with pytest.raises(AssertionError) as caught:
        assert_invariant(broken, Rotation(3), points, representations=["points"], seed=7)
    message = str(caught.value)
    assert message.startswith("[assert_invariant] broken is not invariant under SO(3): relative error ")
    assert "> tolerance 1e-05 (8 of 8 elements fail)" in message
    assert "where: output['norms'] at index (1, 2)" in message
    found = re.search(
        r"element: sample (\d) of 8 \(seed 7, scale 1\.0; .*\), magnitude ([\d.]+), proper: (.*)", message
    )
    element = sample_elements(Rotation(3), 8, seed=7)[int(found[1])]
    assert np.isclose(Rotation(3).magnitude(element), float(found[2]), rtol=5e-3)
    assert found[3] == Rotation(3).describe(element)
    values = re.search(
        r"fn\(g x\) = (\S+), g fn\(x\) = (\S+), difference (\S+), largest entry of the leaf (\S+)", message
    )
    moved = Rotation(3).act(element, points.astype(np.float64), "points")
    norm = np.linalg.norm(points[1, 2])
    assert np.isclose(float(values[1]), norm + 0.01 * moved[1, 2, 0], rtol=1e-5)
    assert np.isclose(float(values[2]), norm + 0.01 * points[1, 2, 0], rtol=1e-5)
    assert np.isclose(float(values[3]), abs(float(values[1]) - float(values[2])), rtol=5e-3)
    error = float(re.search(r"relative error (\S+) >", message)[1])
    assert np.isclose(error, float(values[3]) / float(values[4]), rtol=1e-2)


def test_reflections_are_tried_as_often_as_rotations(points):
    assert_invariant(triple_product, Rotation(3), points, representations=["points"])
    with pytest.raises(AssertionError, match=r"\(4 of 8 elements fail\)") as caught:
        assert_invariant(triple_product, Orthogonal(3), points, representations=["points"])
    assert "improper: [[" in str(caught.value)
    for seed in range(20):  # two samples are enough, whatever the seed
        with pytest.raises(AssertionError, match=r"\(1 of 2 elements fail\)"):
            assert_invariant(triple_product, Orthogonal(3), points, representations=["points"], samples=2, seed=seed)


def test_a_wrong_translation_is_found_where_rotations_alone_would_pass(points):
    fn = lambda x: x / np.linalg.norm(x)  # noqa: E731
    assert_equivariant(fn, Rotation(3), points, representations=["points"], output="points")
    with pytest.raises(AssertionError, match=r"not equivariant under SE\(3\)"):
        assert_equivariant(fn, SpecialEuclidean(3), points, representations=["points"], output="points")


def test_error_is_relative_to_the_output(points):
    for factor in (1e-12, 1e12):
        fn = lambda x, f=factor: f * (np.sum(x**2, -1) + 1e-3 * x[..., 0])  # noqa: E731
        with pytest.raises(AssertionError):
            assert_invariant(fn, Rotation(3), points, representations=["points"], tolerance=1e-4)
        assert_invariant(fn, Rotation(3), points, representations=["points"], tolerance=1e-2)


def test_default_tolerance_follows_the_coarsest_dtype(points):
    fn = lambda x: jnp.sum(x**2, -1) + 1e-7 * x[..., 0]  # noqa: E731
    assert_invariant(fn, Rotation(3), points, representations=["points"])
    with jax.enable_x64(True):
        with pytest.raises(AssertionError, match=r"> tolerance 1e-10"):
            assert_invariant(fn, Rotation(3), points.astype(np.float64), representations=["points"])
        assert_invariant(
            lambda x: jnp.sum(x**2, -1), Rotation(3), points.astype(np.float64), representations=["points"]
        )
    half = jnp.asarray(points, jnp.bfloat16)
    assert_invariant(lambda x: jnp.sum(x.astype(jnp.float32) ** 2, -1), Rotation(3), half, representations=["points"])
    with pytest.raises(AssertionError, match=r"> tolerance 0\.05"):
        assert_invariant(lambda x: jnp.sum(x, -1), Rotation(3), half, representations=["points"])


def test_transformed_inputs_are_computed_in_float64():
    """A far cloud: rotating in float32 would lose what the float64 action keeps."""
    exact = np.random.default_rng(0).normal(size=(6, 3)) * np.array([1.0, 1e-3, 1e3])
    seen = []
    assert_invariant(
        lambda x: [seen.append(x), np.linalg.norm(x.astype(np.float64), axis=-1)][1],
        Rotation(3), exact.astype(np.float32), representations=["points"], samples=1, tolerance=1e-5,
    )  # fmt: skip
    element = sample_elements(Rotation(3), 1)[0]
    expected = (exact.astype(np.float32).astype(np.float64) @ element.T).astype(np.float32)
    np.testing.assert_array_equal(seen[-1], expected)


def test_non_finite_output_under_one_element_is_a_failure(points):
    fn = lambda x: np.sum(x**2, -1) + np.where(x[..., :1, 0] == points[..., :1, 0], 0.0, np.nan)  # noqa: E731
    with pytest.raises(AssertionError, match=r"relative error inf > tolerance 1e-05 \(8 of 8"):
        assert_invariant(fn, Rotation(3), points, representations=["points"])


def test_output_of_another_shape_or_structure_is_a_failure(rng):
    image = rng.normal(size=(4, 6, 1)).astype(np.float32)
    with pytest.raises(AssertionError, match=r"output has shape \(\d, 1\) in fn\(g x\) but \(\d, 1\) in g fn\(x\)"):
        assert_invariant(lambda x: np.sum(x, 0), Cyclic(4), image, representations=["image"])
    with pytest.raises(AssertionError, match="tree structs"):
        assert_invariant(
            lambda x: (x.sum(),) if x[0, 0, 0] == image[0, 0, 0] else [x.sum()],
            Cyclic(2),
            image,
            representations=["image"],
        )


def test_fixed_elements_come_first(points):
    mirror = np.diag([1.0, 1.0, -1.0])
    with pytest.raises(AssertionError, match=r"\(1 of 1 elements fail\)\n  element: sample 0 of 1"):
        assert_invariant(
            triple_product, Orthogonal(3), points, representations=["points"], samples=1, elements=[mirror]
        )


# Idle checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: np.ones(3), "output is constant: it does not depend on the inputs that the group moves"),
        (lambda x: 0.0 * x[..., 0], "output is zero everywhere, so there is no scale to compare with"),
        (lambda x: x[..., 0] * np.inf, "output is not finite, so nothing can be compared"),
        (lambda x: np.zeros((0,)), "output is empty"),
        (lambda x: {"a": np.sum(x**2), "b": np.ones(2)}, r"output\['b'\] is constant"),
    ],
)
def test_an_output_that_could_not_fail_is_refused(fn, message, points):
    with pytest.raises(IdleCheckError, match=message):
        assert_invariant(fn, Rotation(3), points, representations=["points"])


def test_a_group_that_moves_nothing_is_refused(points):
    with pytest.raises(ValueError, match=r"SO\(3\) leaves every input unchanged under representations=\('set',\)"):
        assert_invariant(np.sum, Rotation(3), points, representations=["set"])
    with pytest.raises(ValueError, match=r"SO\(3\) leaves every input unchanged"):
        assert_invariant(np.sum, Rotation(3), np.zeros((5, 3)), representations=["points"])
    with pytest.raises(ValueError, match=r"S5 leaves every input unchanged"):
        assert_invariant(np.sum, Symmetric(5), np.ones((5, 3)), representations=["points"])


def test_an_output_of_the_untouched_inputs_alone_is_refused(points):
    with pytest.raises(ValueError, match="output is constant"):
        assert_invariant(lambda x, y: np.sum(y**3), Rotation(3), points, points, representations=["points", None])


def test_integer_outputs_and_inputs_are_awake_and_compared(rng):
    tokens = rng.integers(0, 7, size=(6, 2))
    assert_invariant(lambda t: np.sum(t, axis=0), Symmetric(6), tokens, representations=["set"])
    assert_equivariant(lambda t: t > 3, Symmetric(6), tokens, representations=["set"], output="set")
    with pytest.raises(AssertionError):
        assert_invariant(lambda t: t > 3, Symmetric(6), tokens, representations=["set"])
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    assert_equivariant(
        lambda x: jnp.argmax(x, -1, keepdims=True), Symmetric(6), logits, representations=["set"], output="set"
    )


def test_leaves_without_a_representation_may_be_constant_but_not_all(points):
    fn = lambda x: (np.sum(x**2), np.ones(2))  # noqa: E731
    assert_equivariant(fn, Rotation(3), points, representations=["points"], output=("scalar", None))
    with pytest.raises(ValueError, match="no leaf of the output is compared"):
        assert_equivariant(fn, Rotation(3), points, representations=["points"], output=None)


@pytest.mark.parametrize(
    ("representations", "output", "samples", "message"),
    [
        ("points", "scalar", 8, r"representations='points' must name one representation for each of 1 inputs"),
        (["points", None], "scalar", 8, r"for each of 1 inputs; pass a list"),
        (["pionts"], "scalar", 8, r"representation 'pionts' is unknown; use one of \['adjacency'"),
        (["points"], "sclar", 8, r"representation 'sclar' is unknown"),
        (["points"], ("scalar", "scalar"), 8, r"representations \('scalar', 'scalar'\) must be a prefix of the data"),
        ([{"x": "points"}], "scalar", 8, r"must be a prefix of the data, PyTreeDef\(\*\)"),
        (["points"], "scalar", 0, "samples=0 must be at least 1; set samples"),
        (["points"], "matrix", 8, r"'matrix' of SO\(3\) needs trailing size 3; got shape \(2, 5\)"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(representations, output, samples, message, points, untyped):
    with pytest.raises(ValueError, match=message):
        assert_equivariant(
            lambda x: np.sum(x**2, -1),
            Rotation(3),
            points,
            representations=representations,
            output=output,
            samples=samples,
        )


# Elements ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group", [Orthogonal(3), Dihedral(4), Dihedral(1), Euclidean(2), Product(Orthogonal(2), Symmetric(3))]
)
def test_sampled_elements_cover_both_orientations_and_never_the_identity(group):
    for seed in range(5):
        drawn = sample_elements(group, 6, seed=seed)
        assert all(group.magnitude(g) > 0.0 for g in drawn)
        proper = [group.is_proper(g) for g in drawn]
        assert proper == ([False] * 6 if group == Dihedral(1) else [True, False] * 3)
    assert all(group.is_proper(g) for g in sample_elements(group, 6, scale=0.5)) or group == Dihedral(1)


def test_element_depends_on_seed_and_index_alone():
    few, many = sample_elements(Euclidean(3), 2, seed=4), sample_elements(Euclidean(3), 5, seed=4)
    for a, b in zip(few, many[:2], strict=True):
        np.testing.assert_array_equal(a.matrix, b.matrix)
    assert not np.allclose(many[0].matrix, many[2].matrix)
    assert not np.allclose(many[0].matrix, sample_elements(Euclidean(3), 1, seed=5)[0].matrix)
    assert all(int(g) == 1 for g in sample_elements(Cyclic(2), 8))


# Curve ------------------------------------------------------------------------------------------------------------


def test_curve_grows_for_a_broken_function_and_stays_at_rounding_for_a_symmetric_one(points):
    scales = (0.01, 0.03, 0.1, 0.3)
    flat = equivariance_error(centred, Rotation(3), points, representations=["points"], output="points", scales=scales)
    assert isinstance(flat, EquivarianceCurve)
    assert flat.errors.shape == flat.magnitudes.shape == (4,)
    assert np.all(flat.errors < 1e-6)
    assert np.all(flat.errors > 0.0)
    broken = equivariance_error(
        np.tanh, Rotation(3), points, representations=["points"], output="points", scales=scales
    )
    assert np.all(np.diff(broken.errors) > 0.0)
    assert np.all(np.diff(broken.magnitudes) > 0.0)
    np.testing.assert_allclose(broken.magnitudes, flat.magnitudes)
    np.testing.assert_allclose(broken.magnitudes / broken.magnitudes[3], np.array(scales) / 0.3, rtol=1e-6)
    assert broken.errors[0] / broken.magnitudes[0] == pytest.approx(broken.errors[1] / broken.magnitudes[1], rel=0.5)


def test_rotating_an_image_is_flat_inside_the_disk_for_an_isotropic_filter(rng):
    rows, columns = np.meshgrid(np.arange(21) - 10.0, np.arange(21) - 10.0, indexing="ij")
    image = np.exp(-((rows - 2) ** 2 + (columns + 1) ** 2) / 12)[..., None].astype(np.float32)
    mask = disk_mask(21, 21, margin=2.0)
    shift = lambda x: mask * (x + np.roll(x, 3, axis=-2))  # noqa: E731
    measure = lambda fn, scales: equivariance_error(  # noqa: E731
        fn, Rotation(2), image, representations=["image"], output="image", scales=scales
    )
    assert np.all(measure(lambda x: mask * x**2, (0.1, 0.3, 1.0)).errors < 0.05)
    assert measure(shift, (1.0,)).errors[0] > 0.3


# Symmetry ---------------------------------------------------------------------------------------------------------


def test_symmetry_checks_its_claim_and_its_control(points):
    norms = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    claim = Symmetry(Orthogonal(3), ("points",), control=Scale())
    claim.check(norms, [points])
    claim.check_control(norms, (points,))
    with pytest.raises(AssertionError, match=r"\[Symmetry.check\] <lambda> lacks the symmetry O\(3\): relative error"):
        claim.check(lambda x: x[..., 0], (points,))
    baseline = Symmetry(Orthogonal(3), ("points",), control=lambda x: x[..., 0])
    baseline.check_control(norms, (points,))


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (
            Rotation(3),
            r"control <lambda> under SO\(3\) must fail but passed 8 samples \(seed 0\): largest relative error",
        ),
        (lambda x: np.sum(x**2), r"control <lambda> under O\(3\) must fail but passed"),
        (lambda x: np.ones(3), r"control <lambda> under O\(3\) says nothing: output is constant"),
        (lambda x: x * np.inf, r"says nothing: output is not finite"),
        (Symmetric(5, layer=0), r"says nothing: S5 leaves every input unchanged"),
    ],
)
def test_a_control_that_does_not_fail_is_an_error(control, message, points):
    claim = Symmetry(Orthogonal(3), ("points",), control=control)
    with pytest.raises(AssertionError, match=message):
        claim.check_control(lambda x: np.linalg.norm(x, axis=-1), (points,))


def test_symmetry_tolerance_follows_the_dtype(points):
    claim = Symmetry(Rotation(3), ("points",), tolerance=1e-3, tolerance64=1e-6)
    fn = lambda x: np.sum(x**2, -1) + 1e-5 * x[..., 0]  # noqa: E731
    claim.check(fn, (points,))
    with pytest.raises(AssertionError, match="> tolerance 1e-07"):
        claim.check(fn, (points,), tolerance=1e-7)
    with jax.enable_x64(True), pytest.raises(AssertionError, match="> tolerance 1e-06"):
        claim.check(fn, (points.astype(np.float64),))
    claim.check(lambda x: jnp.sum(x.astype(jnp.float32) ** 2, -1), (jnp.asarray(points, jnp.bfloat16),))


def test_symmetry_refuses_unknown_names_and_a_missing_control(points):
    with pytest.raises(ValueError, match="representation 'pionts' is unknown"):
        Symmetry(Rotation(3), ("pionts",))
    with pytest.raises(ValueError, match="representation 'vektor' is unknown"):
        Symmetry(Rotation(3), ("points",), output={"a": "vektor"})
    with pytest.raises(
        ValueError, match=r"control=None of the symmetry SO\(3\) cannot fail; set a group or a baseline"
    ):
        Symmetry(Rotation(3), ("points",)).check_control(np.sum, (points,))
