"""Orthogonal moments: the exact polynomials, the phase law of rotations, and invariants that a dense head may use."""

import fractions
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.group_conv import GroupPool, PointwiseNonlinearity, SteerableConv
from jaxlayers.equivariant.orthogonal_moments import (
    KINDS,
    MomentInvariants,
    MomentNet,
    moment_basis,
    moment_indices,
    orthogonal_moments,
    radial_polynomial,
    reconstruct,
)
from jaxlayers.geometry.groups import Cyclic, Dihedral, Translation
from jaxlayers.geometry.planar_fields import FieldType
from jaxlayers.testing import BadInput, Case, Symmetry, assert_invariant

every_kind = pytest.mark.parametrize("kind", KINDS)


class Turned(nn.Module):
    """A convolution whose kernel is averaged over D4, on maps of scalars: equivariant to D4 at stride 1."""

    features: int = 3
    symmetric: bool = True

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.5), (3, 3, x.shape[-1], self.features))
        kernel = kernel.astype(x.dtype)
        if self.symmetric:
            turns = [jnp.rot90(kernel, k) for k in range(4)]
            kernel = sum(turns + [jnp.flip(turn, 0) for turn in turns]) / 8
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(out).reshape(*lead, *out.shape[1:])


class Flattened(nn.Module):
    """The control: hand on every pixel."""

    @nn.compact
    def __call__(self, x):
        return x.reshape(*x.shape[:-3], -1)


def images(rng, size=7, channels=2, batch=2):
    return rng.normal(size=(batch, size, size, channels))


@functools.cache
def started(module):
    return jax.jit(functools.partial(module.init_with_output, jax.random.key(0)))


def bare(module, *inputs):
    """The module with some parameters, the same ones in every call."""
    return started(module)(*inputs)[0]


WRONG_RANK = BadInput(match=r"image of shape \(7, 7\) must be", inputs=lambda rng: (rng.normal(size=(7, 7)),))
SMALL = MomentInvariants(order=3, kind="pseudo_zernike", invariants="products")

CASES = (
    Case(
        name="moment_invariants",
        within="moment_net",
        module=MomentInvariants(order=4),
        inputs=lambda rng: (images(rng),),
        symmetries=(
            Symmetry(Dihedral(4), ("image",), control=Translation(2, cyclic=True), reason="the disc has a centre"),
        ),
        leading_axes=True,
        bad_inputs=(
            WRONG_RANK,
            BadInput(match="kind='legendre' is unknown; use one of", module=MomentInvariants(kind="legendre")),
            BadInput(match="disk='square' is unknown; use one of", module=MomentInvariants(disk="square")),
            BadInput(match="invariants='phase' is unknown", module=MomentInvariants(invariants="phase")),
            BadInput(match="order=-1 must not be negative", module=MomentInvariants(order=-1)),
            BadInput(match="quadrature=0 must be positive", module=MomentInvariants(quadrature=0)),
            BadInput(match="0 x 7 pixels", inputs=lambda rng: (np.ones((1, 0, 7, 1)),)),
        ),
    ),
    Case(
        name="moment_invariants_chiral",
        within="moment_net",
        module=MomentInvariants(order=3, kind="fourier_mellin", invariants="chiral", disk="circumscribed"),
        inputs=lambda rng: (images(rng, size=6),),
        symmetries=(
            Symmetry(Cyclic(4), ("image",), control=Dihedral(4), reason="the sign of the phase tells left from right"),
        ),
        leading_axes=True,
        bad_inputs=(WRONG_RANK,),
    ),
    Case(
        name="moment_net",
        module=MomentNet(Turned(), SMALL, num_classes=3, hidden_features=(5,)),
        inputs=lambda rng: (images(rng, size=6),),
        symmetries=(
            Symmetry(
                Dihedral(4),
                ("image",),
                control=functools.partial(bare, MomentNet(Turned(), Flattened(), num_classes=3)),
            ),
        ),
        leading_axes=True,
        bad_inputs=(
            WRONG_RANK,
            BadInput(match="hidden_features=\\(0,\\) must be positive", module=MomentNet(hidden_features=(0,))),
            BadInput(match="num_classes=-1 must not be negative", module=MomentNet(num_classes=-1)),
        ),
    ),
)


# The polynomials ----------------------------------------------------------------------------------------------------


def factorial_formula(kind, n, m):
    """Coefficients by power of r, in whole numbers, as the papers print them."""
    f, coefficients = math.factorial, {}
    if kind == "zernike":
        for s in range((n - m) // 2 + 1):
            value = fractions.Fraction(f(n - s), f(s) * f((n + m) // 2 - s) * f((n - m) // 2 - s))
            coefficients[n - 2 * s] = (-1) ** s * value
    elif kind == "pseudo_zernike":
        for s in range(n - m + 1):
            value = fractions.Fraction(f(2 * n + 1 - s), f(s) * f(n + m + 1 - s) * f(n - m - s))
            coefficients[n - s] = (-1) ** s * value
    else:
        for s in range(n + 1):
            coefficients[s] = (-1) ** (n + s) * fractions.Fraction(f(n + s + 1), f(n - s) * f(s) * f(s + 1))
    assert all(value.denominator == 1 for value in coefficients.values())
    return coefficients


@every_kind
def test_radial_polynomials_equal_the_factorial_formula_in_exact_arithmetic(kind):
    points = [fractions.Fraction(k, 32) for k in (0, 1, 5, 16, 27, 31, 32)]
    radius = np.array([float(point) for point in points])
    for n, m in moment_indices(40, kind)[:: 1 if kind == "zernike" else 7]:
        coefficients = factorial_formula(kind, n, m)
        exact = [float(sum(c * r**power for power, c in coefficients.items())) for r in points]
        np.testing.assert_allclose(radial_polynomial(n, m, radius, kind), exact, atol=1e-13)
    # The control: the same sum in floating point, which is how it is usually computed.
    coefficients = factorial_formula(kind, 50, 0)
    rounded = sum(float(c) * radius**power for power, c in coefficients.items())
    assert np.max(np.abs(rounded - radial_polynomial(50, 0, radius, kind))) > 1


def test_known_polynomials():
    r = np.linspace(0, 1, 9)
    for found, expected in (
        (radial_polynomial(4, 0, r), 6 * r**4 - 6 * r**2 + 1),
        (radial_polynomial(5, 3, r), 5 * r**5 - 4 * r**3),
        (radial_polynomial(6, -2, r), 15 * r**6 - 20 * r**4 + 6 * r**2),
        (radial_polynomial(1, 0, r, "pseudo_zernike"), 3 * r - 2),
        (radial_polynomial(3, 1, r, "pseudo_zernike"), 21 * r**3 - 30 * r**2 + 10 * r),
        (radial_polynomial(1, 7, r, "fourier_mellin"), 3 * r - 2),
        (radial_polynomial(2, 0, r, "fourier_mellin"), 10 * r**2 - 12 * r + 3),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-14)


@every_kind
def test_radial_polynomials_are_orthogonal(kind):
    nodes, weights = np.polynomial.legendre.leggauss(64)
    r, weights = (nodes + 1) / 2, weights / 2
    for m in (0, 1, 6):
        degrees = [n for n, found in moment_indices(30, kind) if found == m]
        values = np.stack([radial_polynomial(n, m, r, kind) for n in degrees])
        np.testing.assert_allclose(
            (values * weights * r) @ values.T, np.diag(1 / (2 * (np.array(degrees) + 1))), atol=1e-13
        )


def gram(size, kind, quadrature):
    """V_nm integrated against each other over the discs of pixels: the identity, were the pixels infinitely small."""
    basis = moment_basis(size, size, 6, kind, "inscribed", quadrature).reshape(-1, size * size)
    n = np.array([n for n, _ in moment_indices(6, kind)])
    # A pixel holds the integral of conj(V); over its area, its mean.
    return (basis @ basis.conj().T) * (size / 2) ** 2 / ((n + 1) / np.pi)[None, :]


@every_kind
def test_basis_on_the_grid_becomes_orthogonal_with_resolution(kind):
    errors = [np.max(np.abs(gram(size, kind, 4) - np.eye(len(moment_indices(6, kind))))) for size in (16, 32, 64, 128)]
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.2


# Moments of images --------------------------------------------------------------------------------------------------


def brute_force(image, order, kind, quadrature, scale):
    """Pixel by pixel, part by part, with the factorial formula; image `[height, width]`."""
    height, width = image.shape
    out = []
    for n, m in moment_indices(order, kind):
        total = 0.0
        for i in range(height * quadrature):
            for j in range(width * quadrature):
                y = -((i + 0.5) / quadrature - height / 2) * scale
                x = ((j + 0.5) / quadrature - width / 2) * scale
                r = math.hypot(x, y)
                if r <= 1 + 1e-12 and r > 0:
                    radial = sum(float(c) * r**power for power, c in factorial_formula(kind, n, m).items())
                    angle = math.atan2(y, x)
                    value = radial * complex(math.cos(m * angle), -math.sin(m * angle))
                    total += image[i // quadrature, j // quadrature] * value * (scale / quadrature) ** 2
        out.append((n + 1) / math.pi * total)
    return np.array(out)


@every_kind
@pytest.mark.parametrize(("disk", "scale"), [("inscribed", 2 / 4), ("circumscribed", 2 / math.hypot(4, 6))])
def test_moments_equal_brute_force(rng, kind, disk, scale):
    image = rng.normal(size=(4, 6))
    with jax.enable_x64(True):
        found = orthogonal_moments(jnp.asarray(image)[..., None], 4, kind, disk=disk, quadrature=2)
    np.testing.assert_allclose(found[0], brute_force(image, 4, kind, 2, scale), atol=1e-12)


def blob(size, angle):
    """A smooth picture without symmetry, turned counterclockwise by an angle; it vanishes towards the rim."""
    y, x = (
        t / size for t in np.meshgrid(*[size - 1 - 2 * np.arange(size), 2 * np.arange(size) - size + 1], indexing="ij")
    )
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return (
        np.exp(-18 * ((x - 0.25) ** 2 + (y - 0.1) ** 2))
        + 0.7 * np.exp(-25 * ((x + 0.2) ** 2 + 2 * (y + 0.25) ** 2))
        - 0.4 * np.exp(-30 * ((x + 0.1) ** 2 + (y - 0.35) ** 2))
    )


@every_kind
def test_moments_of_a_turned_picture_turn_in_phase_with_an_error_that_falls_with_resolution(kind):
    m = np.array([m for _, m in moment_indices(8, kind)])
    with jax.enable_x64(True):
        errors, magnitudes, no_phase = [], [], []
        for size in (16, 32, 64):
            before = np.asarray(orthogonal_moments(jnp.asarray(blob(size, 0.0))[..., None], 8, kind))[0]
            after = np.asarray(orthogonal_moments(jnp.asarray(blob(size, 0.7))[..., None], 8, kind))[0]
            scale = np.max(np.abs(before))
            errors.append(np.max(np.abs(after - np.exp(-0.7j * m) * before)) / scale)
            magnitudes.append(np.max(np.abs(np.abs(after) - np.abs(before))) / scale)
            no_phase.append(np.max(np.abs(after - before)) / scale)
    # The functions of Fourier-Mellin jump at the centre; the others are polynomials and converge far faster.
    for found in (errors, magnitudes):
        assert all(after < 0.6 * before for before, after in itertools.pairwise(found)), found
        assert found[-1] < (0.02 if kind == "fourier_mellin" else 2e-6)
    # The control: without the phase they do not agree.
    assert min(no_phase) > 0.1


def test_finer_quadrature_brings_turned_pictures_closer():
    def error(quadrature):
        before, after = (
            jnp.abs(orthogonal_moments(jnp.asarray(x)[..., None], 8, "fourier_mellin", quadrature=quadrature))
            for x in (blob(32, 0.0), blob(32, 0.7))
        )
        return float(jnp.max(jnp.abs(after - before)) / jnp.max(before))

    errors = [error(quadrature) for quadrature in (1, 2, 4, 8)]
    assert all(after < 0.6 * before for before, after in itertools.pairwise(errors)), errors


@every_kind
def test_quarter_turns_and_mirrorings_follow_the_phase_law_exactly(rng, kind):
    m = np.array([m for _, m in moment_indices(6, kind)])
    with jax.enable_x64(True):
        for size in (8, 9):
            image = jnp.asarray(images(rng, size=size))
            before = orthogonal_moments(image, 6, kind)
            for k in range(4):
                after = orthogonal_moments(jnp.rot90(image, k, axes=(1, 2)), 6, kind)
                np.testing.assert_allclose(after, (-1j) ** (k * m) * before, atol=1e-12)
            after = orthogonal_moments(image[:, :, ::-1], 6, kind)
            np.testing.assert_allclose(after, (-1.0) ** m * jnp.conj(before), atol=1e-12)


@pytest.mark.slow
@every_kind
def test_reconstruction_error_falls_with_the_order(kind):
    image = jnp.asarray(blob(48, 0.3)[..., None], jnp.float32)
    errors = []
    for order in (2, 4, 6, 8, 10):
        found = reconstruct(orthogonal_moments(image, order, kind), (48, 48), order, kind)
        errors.append(float(jnp.linalg.norm(found - image) / jnp.linalg.norm(image)))
    assert all(after < 0.9 * before for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.25


def test_reconstruction_refuses_moments_of_another_order(untyped):
    moments = orthogonal_moments(jnp.ones((4, 4, 1)), 3)
    with pytest.raises(ValueError, match="6 moments must be the 9 of kind='zernike' up to order=4"):
        reconstruct(moments, (4, 4), 4)


def test_complex_images_and_impossible_polynomials_are_refused(untyped):
    with pytest.raises(ValueError, match="image of complex64 must be real"):
        orthogonal_moments(jnp.ones((4, 4, 1), jnp.complex64), 3)
    with pytest.raises(ValueError, match="n=3, m=2 is no zernike moment"):
        radial_polynomial(3, 2, np.ones(1))
    with pytest.raises(ValueError, match="n=3, m=4 is no pseudo_zernike moment"):
        radial_polynomial(3, 4, np.ones(1), "pseudo_zernike")


# Invariants ---------------------------------------------------------------------------------------------------------


def test_products_tell_apart_what_magnitudes_cannot():
    # Turning the rings of a picture against each other keeps every |Z| of a picture with one moment a ring.
    pairs = list(moment_indices(3, "zernike"))
    moments = np.zeros((2, 1, len(pairs)), np.complex64)
    moments[:, 0, pairs.index((1, 1))] = 1.0
    moments[:, 0, pairs.index((3, 1))] = 0.5, 0.5j
    pictures = reconstruct(jnp.asarray(moments), (32, 32), 3)
    plain, products = (
        MomentInvariants(order=3, invariants=invariants).apply({}, pictures)
        for invariants in ("magnitudes", "products")
    )
    np.testing.assert_allclose(plain[0], plain[1], atol=2e-2)
    assert float(jnp.max(jnp.abs(products[0] - products[1]))) > 0.3


@pytest.mark.slow
def test_gradient_is_finite_where_moments_vanish():
    for invariants in ("magnitudes", "chiral"):
        layer = MomentInvariants(order=4, invariants=invariants)
        for image in (jnp.zeros((5, 5, 1)), jnp.ones((5, 5, 1)), jnp.zeros((5, 5, 1)).at[2, 2].set(1.0)):
            value, gradient = jax.value_and_grad(lambda x, layer=layer: jnp.sum(layer.apply({}, x)))(image)
            assert bool(jnp.isfinite(value))
            assert bool(jnp.all(jnp.isfinite(gradient)))


def test_nan_shows_in_its_own_channel_only(rng):
    image = jnp.asarray(images(rng)).at[0, 3, 3, 1].set(jnp.nan)
    out = MomentInvariants(order=2).apply({}, image).reshape(2, 2, -1)
    assert bool(jnp.all(jnp.isnan(out[0, 1])))
    assert bool(jnp.all(jnp.isfinite(out[0, 0])))
    assert bool(jnp.all(jnp.isfinite(out[1])))


@pytest.mark.slow
def test_plain_convolutions_and_flattening_are_not_invariant(rng):
    inputs = images(rng, size=6).astype(np.float32)
    for body, invariants, holds in (
        (Turned(), SMALL, True),
        (Turned(symmetric=False), SMALL, False),
        (Turned(), Flattened(), False),
    ):
        model = MomentNet(body, invariants, num_classes=3)
        apply = jax.jit(functools.partial(model.apply, jax.jit(model.init)(jax.random.key(0), inputs)))
        if holds:
            assert_invariant(apply, Dihedral(4), inputs, representations=["image"])
        else:
            with pytest.raises(AssertionError):
                assert_invariant(apply, Dihedral(4), inputs, representations=["image"])


def test_moments_after_a_group_convolution_are_invariant_and_those_of_its_unpooled_channels_are_not(rng):
    inputs = images(rng, size=6, channels=1).astype(np.float32)
    colours, fields = FieldType.trivial(Cyclic(4), 1), FieldType.regular(Cyclic(4), 2)
    maps = [SteerableConv(colours, fields), PointwiseNonlinearity(fields)]
    for body, holds in ((nn.Sequential([*maps, GroupPool(fields)]), True), (nn.Sequential(maps), False)):
        model = MomentNet(body, MomentInvariants(order=3, invariants="chiral"), num_classes=3)
        apply = jax.jit(functools.partial(model.apply, jax.jit(model.init)(jax.random.key(0), inputs)))
        if holds:
            assert_invariant(apply, Cyclic(4), inputs, representations=["image"])
        else:
            with pytest.raises(AssertionError):
                assert_invariant(apply, Cyclic(4), inputs, representations=["image"])


def test_features_do_not_depend_on_the_size_of_the_picture():
    small, large = (
        MomentInvariants(order=6).apply({}, jnp.asarray(blob(size, 0.2)[..., None], jnp.float32)) for size in (32, 96)
    )
    np.testing.assert_allclose(small, large, atol=5e-3)
