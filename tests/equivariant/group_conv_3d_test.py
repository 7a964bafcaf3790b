"""Octahedral convolutions: exact for the rotations of the cube, equal to turned filters, and aware of handedness."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.group_conv_3d import (
    ROTATIONS,
    OctahedralCNN,
    OctahedralConv,
    OctahedralNorm,
    OctahedralPool,
    cube_products,
    cube_rotations,
    rotate_fields,
    rotate_volume,
)
from jaxlayers.geometry.groups import Group
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant

# Compiles in the least time: how well code is optimised is not what is tested.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Cube(Group):
    """The rotations of the cube on volumes; channels in `regular` numbers are regular fields."""

    name = "O"

    def __init__(self, *regular):
        self.regular = regular

    def act(self, g, x, representation):
        if representation != "image":
            return x
        return rotate_fields(x, int(g), regular=x.shape[-1] in self.regular)

    def sample(self, rng, *, scale=1.0):
        return np.asarray(rng.integers(ROTATIONS))

    def identity(self):
        return np.asarray(0)

    def compose(self, g, h):
        return np.asarray(cube_products()[g, h])

    def inverse(self, g):
        return np.asarray(np.argmax(cube_products()[g] == 0))

    def magnitude(self, g):
        return float(np.arccos(np.clip((np.trace(cube_rotations()[g]) - 1) / 2, -1, 1)))


class Mirrored(Cube):
    """The control: reflections too, which no layer here claims."""

    name = "O x reflections"

    def act(self, g, x, representation):
        x = super().act(g, x, representation)
        return x[..., ::-1, :] if representation == "image" else x


def volumes(channels, size=3):
    return lambda rng: (rng.normal(size=(2, size, size, size, channels)),)


def plain(features):
    def apply(x):
        module = nn.Conv(features, (3, 3, 3))
        return module.apply(module.init(jax.random.key(0), jnp.asarray(x)), jnp.asarray(x))

    return apply


def claim(*regular, control):
    return Symmetry(Cube(*regular), ("image",), "image", samples=4, control=control)


BAD_CHANNELS = BadInput(match=r"a volume of shape \(2, 3, 3, 3, 25\) must be .* multiple of 24", inputs=volumes(25))

CASES = (
    Case(
        name="octahedral_conv",
        within="octahedral_cnn",
        module=OctahedralConv(1),
        inputs=volumes(24),
        symmetries=(claim(24, control=plain(24)),),
        leading_axes=True,
        bad_inputs=(
            BAD_CHANNELS,
            BadInput(match=r"inputs='vector' must be one of", module=OctahedralConv(1, inputs="vector")),
            BadInput(match=r"outputs='vector' must be one of", module=OctahedralConv(1, outputs="vector")),
            BadInput(match=r"features=0 must be positive", module=OctahedralConv(0)),
            BadInput(match=r"of floating point; got int", inputs=lambda rng: (np.ones((3, 3, 3, 24), np.int32),)),
            BadInput(match=r"of shape \(3, 3, 24\) must be", inputs=lambda rng: (np.ones((3, 3, 24)),)),
            BadInput(
                match=r"length 3 must hold kernel_size=5", module=OctahedralConv(1, kernel_size=5, padding="VALID")
            ),
        ),
    ),
    Case(
        name="octahedral_norm",
        within="octahedral_cnn",
        module=OctahedralNorm(),
        inputs=volumes(48),
        symmetries=(claim(48, control=lambda x: x / (1 + jnp.arange(48))),),
        leading_axes=True,
        bad_inputs=(BAD_CHANNELS,),
    ),
    Case(
        name="octahedral_pool",
        within="octahedral_cnn",
        module=OctahedralPool(),
        inputs=volumes(48),
        symmetries=(claim(48, control=lambda x: x[..., :2]),),
        leading_axes=True,
        bad_inputs=(BAD_CHANNELS, BadInput(match=r"mode='min' must be 'max' or 'mean'", module=OctahedralPool("min"))),
    ),
    Case(
        name="octahedral_cnn",
        module=OctahedralCNN(num_classes=2, widths=(1, 3), depths=(1, 1)),
        inputs=volumes(1, 4),
        symmetries=(Symmetry(Cube(), ("image",), samples=4, control=Mirrored()),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"widths=\(2, 4, 8\) and depths=\(1,\) must have one", module=OctahedralCNN(depths=(1,))),
            BadInput(match=r"num_classes=-1 must not be negative", module=OctahedralCNN(-1)),
            BadInput(match=r"kernel_size=2 must be odd", module=OctahedralCNN(kernel_size=2)),
            BadInput(match=r"of shape \(3, 3, 1\) must be", inputs=lambda rng: (np.ones((3, 3, 1)),)),
        ),
    ),
)


# The group ------------------------------------------------------------------------------------------------------------


def test_there_are_24_different_rotations_and_they_multiply():
    matrices = cube_rotations()
    assert matrices.shape == (24, 3, 3)
    assert len(np.unique(matrices.reshape(24, 9), axis=0)) == 24
    np.testing.assert_allclose(np.linalg.det(matrices), 1)
    np.testing.assert_array_equal(matrices[0], np.eye(3))
    for g, h in np.ndindex(24, 24):
        np.testing.assert_array_equal(matrices[cube_products()[g, h]], matrices[g] @ matrices[h])


def test_volumes_turn_as_points_do(rng):
    x = rng.normal(size=(3, 3, 3, 1))
    for index, matrix in enumerate(cube_rotations()):
        turned = rotate_volume(x, index)
        for point in itertools.product((-1, 0, 1), repeat=3):
            target = matrix @ point + 1
            assert turned[tuple(target)] == x[tuple(np.array(point) + 1)]


def test_fields_turn_as_the_group_multiplies(rng):
    x = rng.normal(size=(2, 3, 3, 48))  # not a cube: sides change places
    for g, h in ((1, 2), (5, 17), (9, 9), (23, 4)):
        both = rotate_fields(x, int(cube_products()[g, h]), regular=True)
        np.testing.assert_array_equal(rotate_fields(rotate_fields(x, h, regular=True), g, regular=True), both)


# The convolution ------------------------------------------------------------------------------------------------------


def correlate(x, filters):
    """Return the cross-correlation of `[n, n, n]` with `[k, k, k]` and zeros outside, by loops over the taps."""
    size = len(filters)
    padded = np.pad(x, size // 2)
    return sum(
        filters[tap] * padded[tuple(slice(start, start + len(x)) for start in tap)]
        for tap in np.ndindex(*filters.shape)
    )


def test_group_convolution_equals_explicitly_turned_filters(rng):
    filters = rng.normal(size=(3, 3, 3, ROTATIONS))
    x = rng.normal(size=(4, 4, 4, ROTATIONS))
    with jax.enable_x64(True):
        layer = OctahedralConv(1, use_bias=False)
        kernel = jnp.asarray(filters.reshape(27 * ROTATIONS, 1, 1))
        found = layer.apply({"params": {"kernel": kernel}}, jnp.asarray(x))
    matrices = list(map(np.ndarray.tolist, cube_rotations()))
    for h in (0, 1, 7, 22):
        expected = np.zeros((4, 4, 4))
        for j in range(ROTATIONS):
            relative = matrices.index((cube_rotations()[h].T @ cube_rotations()[j]).tolist())
            turned = np.zeros((3, 3, 3))
            for point in itertools.product((-1, 0, 1), repeat=3):
                turned[tuple(cube_rotations()[h] @ point + 1)] = filters[(*(np.array(point) + 1), relative)]
            expected += correlate(x[..., j], turned)
        np.testing.assert_allclose(found[..., h], expected, atol=1e-11)


@pytest.mark.parametrize(("inputs", "outputs"), list(itertools.product(("trivial", "regular"), repeat=2)))
def test_every_pair_of_fields_is_exact_and_plain_convolutions_are_not(inputs, outputs, rng):
    channels = 24 if inputs == "regular" else 2
    layer = OctahedralConv(2, inputs, outputs, kernel_size=2, stride=2)
    with jax.enable_x64(True):
        x = rng.normal(size=(4, 4, 4, channels))
        variables = quick(layer.init)(jax.random.key(0), jnp.asarray(x))
        apply = quick(layer.apply)
        check = functools.partial(
            assert_equivariant, representations=["image"], output="image", samples=6, tolerance=1e-10
        )
        check(lambda x: apply(variables, jnp.asarray(x)), Cube(24, 48), x)
        with pytest.raises(AssertionError):
            check(plain(48 if outputs == "regular" else 2), Cube(24, 48), x)
        if inputs == outputs == "trivial":
            return
        with pytest.raises(AssertionError):
            check(lambda x: apply(variables, jnp.asarray(x)), Mirrored(24, 48), x)


def test_grid_report_agrees_with_what_is_measured(rng):
    for size, kernel_size, stride, padding in ((4, 3, 2, "SAME"), (5, 3, 2, "SAME"), (4, 2, 1, "VALID"), (4, 2, 2, 1)):
        layer = OctahedralConv(1, "trivial", kernel_size=kernel_size, stride=stride, padding=padding)
        x = rng.normal(size=(size, size, size, 1)).astype(np.float32)
        variables = quick(layer.init)(jax.random.key(0), jnp.asarray(x))
        apply = quick(functools.partial(layer.apply, variables))
        y = np.asarray(apply(jnp.asarray(x)))
        errors = [
            np.max(np.abs(apply(jnp.asarray(rotate_volume(x, g))) - rotate_fields(y, g, regular=True)))
            for g in (1, 6, 11, 20)
        ]
        assert layer.grid_report(size).exact == (max(errors) < 1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), list(itertools.product(("trivial", "regular"), repeat=2)))
def test_initial_weights_keep_the_variance(inputs, outputs, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 5, 48)), jnp.float32)
    layer = OctahedralConv(16, inputs, outputs, padding="CIRCULAR")
    y, _ = quick(layer.init_with_output)(jax.random.key(0), x)
    assert 0.6 < float(jnp.var(y)) < 1.5


def test_model_tells_a_shape_from_its_mirror_image_and_no_turn_matters(rng):
    # A screw of four voxels along three axes, which no rotation lays onto its mirror image.
    screw = np.zeros((5, 5, 5, 1), np.float32)
    for place in ((1, 1, 1), (3, 1, 1), (3, 3, 1), (3, 3, 3)):
        screw[place] = 1.0
    model = OctahedralCNN(num_classes=3, widths=(1, 3), depths=(1, 1))
    variables = quick(model.init)(jax.random.key(0), jnp.asarray(screw))
    apply = quick(functools.partial(model.apply, variables))
    logits = apply(jnp.asarray(screw))
    for g in (3, 8, 13, 21):
        np.testing.assert_allclose(apply(jnp.asarray(rotate_volume(screw, g))), logits, atol=1e-5)
    assert float(jnp.max(jnp.abs(apply(jnp.asarray(screw[..., ::-1, :])) - logits))) > 1e-3


def test_constant_volumes_have_finite_values_and_gradients():
    model = OctahedralCNN(num_classes=2, widths=(3,), depths=(1,))
    variables = quick(model.init)(jax.random.key(0), jnp.ones((3, 3, 3, 1)))
    both = quick(jax.value_and_grad(lambda variables, x: jnp.sum(model.apply(variables, x) ** 2), argnums=(0, 1)))
    for value in (0.0, 1.0):
        for leaf in jax.tree.leaves(both(variables, jnp.full((3, 3, 3, 1), value))):
            assert np.all(np.isfinite(leaf))
