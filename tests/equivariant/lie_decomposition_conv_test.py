"""Convolution over GL+(2) and SL(2): the measure is invariant, and the error falls with the samples as it must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxlayers.equivariant.lie_decomposition_conv import (
    GROUPS,
    LieDecompositionConv,
    LieDecompositionNet,
    LieLifting,
    inverse,
    polar_coordinates,
    product_samples,
    sample_group,
    stretch_matrix,
)
from jaxlayers.geometry.groups import Cyclic, Translation
from jaxlayers.testing import BadInput, Case, Symmetry

#: How well code is optimised is not what is checked.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TURN = np.array([[0.0, -1.0], [1.0, 0.0]])  # what np.rot90 does to (row, column)
SMALL = {"hidden_features": (8,), "kernel_size": 3}


def matrices(rng, count=4):
    """Matrices of positive determinant near the rotations."""
    turns = np.linalg.qr(rng.normal(size=(count, 2, 2)))[0]
    turns[..., 0] *= np.linalg.det(turns)[:, None]
    return turns @ np.stack([scipy.linalg.expm(x + x.T) for x in 0.1 * rng.normal(size=(count, 2, 2))])


def start(module, *inputs):
    return fast(module.init)(jax.random.key(0, impl="rbg"), *inputs)


def lifting_inputs(rng):
    return rng.normal(size=(2, 6, 6, 3)), matrices(rng)


def conv_inputs(rng):
    return rng.normal(size=(2, 5, 5, 4, 3)), matrices(rng), rng.uniform(1, 2, size=4)


CASES = (
    Case(
        name="lie_lifting",
        within="lie_decomposition_net",
        module=LieLifting(features=4, kernel_size=5, hidden_features=(8,)),
        inputs=lifting_inputs,
        batched=False,
        bad_inputs=(
            BadInput(match=r"kernel_size=4 odd; set them", module=LieLifting(features=4, kernel_size=4)),
            BadInput(match=r"extent=0.0 must be positive", module=LieLifting(features=4, extent=0.0)),
            BadInput(
                match=r"elements of shape \(2, 2\) must be",
                inputs=lambda rng: (rng.normal(size=(2, 6, 6, 3)), np.eye(2)),
            ),
        ),
    ),
    Case(
        name="lie_decomposition_conv",
        within="lie_decomposition_net",
        module=LieDecompositionConv(features=4, **SMALL),
        inputs=conv_inputs,
        batched=False,
        bad_inputs=(
            BadInput(match=r"group='GL\(2\)' is unknown; use", module=LieDecompositionConv(4, group="GL(2)")),
            BadInput(match=r"bandwidth=0.0 must be positive", module=LieDecompositionConv(4, bandwidth=0.0)),
            BadInput(
                match=r"weights of shape \(3,\) must be",
                inputs=lambda rng: (rng.normal(size=(2, 5, 5, 4, 3)), matrices(rng), np.ones(3)),
            ),
        ),
    ),
    Case(
        name="lie_decomposition_net",
        module=LieDecompositionNet(
            num_classes=3, features=4, depth=1, rotations=4, stretches=2, lifting_size=5, **SMALL
        ),
        inputs=lambda rng: (rng.normal(size=(2, 6, 6, 2)),),
        symmetries=(
            Symmetry(
                Cyclic(4),
                ("image",),
                control=Translation(2, cyclic=True),
                reason="the pixels and the rotations of the samples allow quarter turns",
            ),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"rotations=0 and stretches=4 must", module=LieDecompositionNet(rotations=0)),
            BadInput(match=r"group='SO\(2\)' is unknown", module=LieDecompositionNet(group="SO(2)")),
            BadInput(match=r"image of shape \(6, 6\) must be", inputs=lambda rng: (rng.normal(size=(6, 6)),)),
        ),
    ),
)


# The group and its measure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_samples_are_in_the_group_and_coordinates_give_them_back(group):
    with jax.enable_x64(True):
        samples = sample_group(jax.random.key(0), group, 50, stretch=0.8, dtype=jnp.float64)
        coordinates = polar_coordinates(samples.elements, group)
        turns = jnp.stack([coordinates[:, :2], coordinates[:, 1::-1] * jnp.array([-1.0, 1.0])], axis=-1)
        stretches = np.stack([scipy.linalg.expm(s) for s in np.asarray(stretch_matrix(coordinates[:, 2:], group))])
        np.testing.assert_allclose(turns @ stretches, samples.elements, atol=1e-12)
        lengths = jnp.linalg.norm(coordinates[:, 2:], axis=-1)
        assert float(jnp.max(lengths)) <= 0.8
        np.testing.assert_allclose(
            lengths, [np.linalg.norm(np.log(np.linalg.svd(g)[1])) for g in np.asarray(samples.elements)], atol=1e-12
        )
        if group == "SL(2)":
            np.testing.assert_allclose(np.linalg.det(samples.elements), 1, atol=1e-12)
        assert float(jnp.min(samples.weights)) >= 1
        np.testing.assert_allclose(inverse(samples.elements), np.linalg.inv(samples.elements), atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
def test_fixed_samples_turn_onto_themselves(group):
    samples = product_samples(group, 6, 3)
    angle = np.pi / 3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    distance = np.abs((turn @ np.asarray(samples.elements))[:, None] - np.asarray(samples.elements)).max(axis=(-2, -1))
    nearest = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-6
    assert sorted(nearest) == list(range(18))
    np.testing.assert_allclose(samples.weights[nearest], samples.weights, atol=1e-6)


def bump(elements, group):
    """A function on the group that vanishes for |S| above 0.7."""
    x = polar_coordinates(elements, group)
    radius = jnp.sum(jnp.square(x[..., 2:]), axis=-1) / 0.7**2
    return jnp.square(jnp.maximum(1 - radius, 0)) * (1 + 0.5 * x[..., 0] + x[..., 2])


@pytest.mark.parametrize("group", GROUPS)
def test_integral_is_invariant_from_both_sides_and_its_error_falls_as_the_root_of_the_samples(group, rng):
    coordinates = jnp.asarray([0.0, 0.8] if group == "SL(2)" else [0.0, 0.5, 0.5])
    h = jnp.asarray(scipy.linalg.expm(np.asarray(stretch_matrix(coordinates, group)))) @ jnp.asarray(TURN)

    @functools.partial(fast, static_argnums=1)
    def integrals(key, count):
        samples = sample_group(key, group, count, stretch=1.8)
        moved = (samples.elements, h @ samples.elements, samples.elements @ h)
        return jnp.stack([jnp.mean(w * bump(g, group)) for w in (samples.weights, 1.0) for g in moved])

    exact = np.asarray(integrals(jax.random.key(9), 400_000))
    np.testing.assert_allclose(exact[1:3] / exact[0], 1, atol=0.03)
    # The control: without the density of the measure the moved integrals are other ones.
    assert np.min(np.abs(exact[4:] / exact[3] - 1)) > 0.1
    counts = (200, 3200)
    errors = []
    for count in counts:
        found = np.stack([integrals(key, count)[:3] for key in jax.random.split(jax.random.key(1), 40)])
        errors.append(np.sqrt(np.mean(np.square(found[:, 1:] - found[:, :1]))))
    slope = np.log(errors[1] / errors[0]) / np.log(counts[1] / counts[0])
    assert -0.65 < slope < -0.35, slope


# Lifting ------------------------------------------------------------------------------------------------------------


def perceptron(params, x, channels):
    """The kernel, in NumPy."""
    hidden = x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    entries = hidden @ params["entries"]["kernel"] + params["entries"]["bias"]
    return entries.reshape(channels, -1) / np.sqrt(channels)


def test_lifting_and_convolution_equal_loops_in_numpy(rng):
    for group in GROUPS:
        with jax.enable_x64(True):
            samples = sample_group(jax.random.key(2), group, 3, dtype=jnp.float64)
            image = jnp.asarray(rng.normal(size=(4, 4, 2)))
            lifting = LieLifting(2, kernel_size=3, extent=1.5, hidden_features=(5,), param_dtype=jnp.float64)
            conv = LieDecompositionConv(
                3, group, 3, extent=1.7, bandwidth=1.5, hidden_features=(5,), param_dtype=jnp.float64
            )
            first = start(lifting, image, samples.elements)
            lifted = fast(lifting.apply)(first, image, samples.elements)
            second = start(conv, lifted, *samples)
            out = fast(conv.apply)(second, lifted, *samples)
        image, lifted, elements, weights = (np.asarray(x) for x in (image, lifted, *samples))
        one, two = (jax.tree.map(np.asarray, v["params"]["kernel_net"]) for v in (first, second))
        expected, convolved = np.zeros_like(lifted), np.zeros_like(out)
        steps = {}
        for g, s in np.ndindex(3, 3):
            rotation, stretch = scipy.linalg.polar(np.linalg.solve(elements[g], elements[s]))
            x = scipy.linalg.logm(stretch)
            size = [x[0, 0], np.sqrt(2) * x[0, 1], x[1, 1]]
            size = size if group == "GL+(2)" else [np.sqrt(2) * x[0, 0], np.sqrt(2) * x[0, 1]]
            near = max(0, 1 - np.sum(x**2) / 1.5**2) ** 2 * weights[s] / 3
            steps[g, s] = near, [rotation[0, 0], rotation[1, 0], *size]
        for g, r, c, y, x in np.ndindex(3, 4, 4, 4, 4):
            offset = np.array([y - r, x - c])
            if np.max(np.abs(offset)) > 1:
                continue
            for extent in (1.5, 1.7):
                z = np.linalg.solve(elements[g], offset) / extent
                window = max(0, 1 - z @ z) ** 2 * 3 / (np.pi * extent**2) / np.linalg.det(elements[g])
                if extent == 1.5:
                    expected[r, c, g] += window * image[y, x] @ perceptron(one, z, 2)
                    continue
                for s in range(3):
                    near, place = steps[g, s]
                    convolved[r, c, g] += window * near * lifted[y, x, s] @ perceptron(two, np.array([*z, *place]), 2)
        np.testing.assert_allclose(lifted, expected, atol=1e-10)
        np.testing.assert_allclose(out, convolved, atol=1e-10)


@pytest.mark.parametrize("precise", [False, True], ids=["float32", "float64"])
def test_quarter_turns_of_image_and_samples_turn_the_output_exactly(precise, rng):
    with jax.enable_x64(precise):
        dtype, tolerance = (jnp.float64, 1e-10) if precise else (jnp.float32, 1e-5)
        samples = sample_group(jax.random.key(0), "GL+(2)", 5, dtype=dtype)
        image = jnp.asarray(rng.normal(size=(7, 6, 2)), dtype)
        lifting = LieLifting(3, kernel_size=5, hidden_features=(8,))
        conv = LieDecompositionConv(3, **SMALL)
        first = start(lifting, image, samples.elements)
        second = start(conv, lifting.apply(first, image, samples.elements), *samples)

        @fast
        def network(image, elements, sources):
            lifted = lifting.apply(first, image, elements)
            return conv.apply(second, lifted, sources, samples.weights)

        turned = jnp.asarray(TURN, dtype) @ samples.elements
        expected = jnp.rot90(network(image, samples.elements, samples.elements))
        found = network(jnp.rot90(image), turned, turned)
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(found, expected, atol=tolerance * scale)
        # The control: the elements stay.
        other = network(jnp.rot90(image), samples.elements, samples.elements)
        assert float(jnp.max(jnp.abs(other - expected))) > 1e-2 * scale


# Convolution over the group -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_any_matrix_that_moves_all_elements_leaves_the_features_as_they_were(group, rng):
    with jax.enable_x64(True):
        samples = sample_group(jax.random.key(0), group, 6, dtype=jnp.float64)
        values = jnp.asarray(rng.normal(size=(1, 1, 6, 2)))
        module = LieDecompositionConv(3, group, 1, bandwidth=2.0, hidden_features=(8,))
        variables = start(module, values, *samples)
        call = fast(functools.partial(module.apply, variables))
        expected = call(values, *samples)
        a = jnp.asarray(matrices(rng)[0])
        a = a / jnp.sqrt(jnp.linalg.det(a)) if group == "SL(2)" else a
        # Determinants belong to the pixels: those of the targets divide out.
        found = call(values, a @ samples.elements, samples.weights) * jnp.linalg.det(a)
        np.testing.assert_allclose(found, expected, atol=1e-10)
        other = call(values, samples.elements @ a, samples.weights) * jnp.linalg.det(a)
        assert float(jnp.max(jnp.abs(other - expected))) > 1e-3


@pytest.mark.parametrize("group", [pytest.param("GL+(2)", marks=pytest.mark.slow), "SL(2)"])
def test_error_falls_as_the_root_of_the_samples_with_the_weights_only(group, rng):
    """Samples drawn anew for the moved function: the output at moved targets tends to the one at the targets."""
    a = jnp.asarray(scipy.linalg.expm(0.6 * np.array([[1.0, 0.5], [0.5, -1.0]])), jnp.float32)
    targets = product_samples(group, 3, 2, stretch=0.2).elements
    module = LieDecompositionConv(2, group, 1, bandwidth=0.8, hidden_features=(8,))
    few = sample_group(jax.random.key(0), group, 2)
    variables = start(module, jnp.ones((1, 1, 2, 1)), *few)

    @functools.partial(fast, static_argnums=1)
    def outputs(key, count):
        found = []
        for move, part in zip((jnp.eye(2), a), jax.random.split(key), strict=True):
            samples = sample_group(part, group, count, stretch=1.8)
            values = bump(inverse(move) @ samples.elements, group)[None, None, :, None]
            for weights in (samples.weights, jnp.ones(count)):
                found.append(module.apply(variables, values, samples.elements, weights, targets=move @ targets))
        return jnp.stack(found)

    counts, errors = (100, 1600, 25600), []
    for count in counts:
        found = np.stack([outputs(key, count) for key in jax.random.split(jax.random.key(1), 12)])
        change = (found[:, 2:] - found[:, :2]) / np.sqrt(np.mean(np.square(found)))
        errors.append(np.sqrt(np.mean(np.square(change[:, 0]))))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.35, (slope, errors)
    # The control: without the weights the mean over many draws stays off.
    weighted, plain = np.sqrt(np.mean(np.square(np.mean(change, axis=0)), axis=(1, 2, 3, 4)))
    assert plain > 3 * weighted, (plain, weighted)


def test_gradients_are_finite_where_singular_values_are_equal(rng):
    """A target among its own samples, where h^-1 h_j is the identity, and half turns."""
    elements = jnp.asarray(np.stack([np.eye(2), -np.eye(2), 2 * np.eye(2), TURN]), jnp.float32)
    values = jnp.asarray(rng.normal(size=(3, 3, 4, 2)), jnp.float32)
    module = LieDecompositionConv(2, **SMALL, bandwidth=2.0)
    variables = start(module, values, elements, jnp.ones(4))
    gradient = fast(jax.grad(lambda e: jnp.sum(module.apply(variables, values, e, jnp.ones(4)) ** 2)))(elements)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient)


# The network --------------------------------------------------------------------------------------------------------

NET = LieDecompositionNet(3, features=4, depth=1, rotations=4, stretches=2, lifting_size=5, **SMALL)


def test_constant_images_give_finite_values_and_gradients():
    images = jnp.stack([jnp.zeros((6, 6, 1)), jnp.ones((6, 6, 1))])
    variables = start(NET, images)
    gradient = fast(jax.grad(lambda x: jnp.sum(NET.apply(variables, x) ** 2)))(images)
    assert np.all(np.isfinite(gradient))


def test_drawn_samples_change_with_the_key_only(rng):
    images = jnp.asarray(rng.normal(size=(2, 6, 6, 1)), jnp.float32)
    variables = start(NET, images)
    call = fast(lambda key: NET.apply(variables, images, deterministic=False, rngs={"group": key}))
    first, again, other = call(jax.random.key(0)), call(jax.random.key(0)), call(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.max(jnp.abs(first - other))) > 1e-4


def test_bad_numbers_are_refused(untyped):
    with pytest.raises(ValueError, match=r"count=0 must be positive"):
        sample_group(jax.random.key(0), "SL(2)", 0)
    with pytest.raises(ValueError, match=r"stretch=-1.0 not negative"):
        product_samples("SL(2)", 2, 2, stretch=-1.0)
    with pytest.raises(ValueError, match=r"group='U\(1\)' is unknown"):
        polar_coordinates(jnp.eye(2), "U(1)")
