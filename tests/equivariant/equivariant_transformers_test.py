"""Equivariant transformers: groups are translations in their coordinates, poses shift with the image, outputs stay."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant import equivariant_transformers as groups
from jaxlayers.equivariant.equivariant_transformers import (
    GROUPS,
    ComposedTransformer,
    EquivariantTransformer,
    PosePredictor,
    canonical_image,
    centroid,
    read_at,
    transform_image,
)
from jaxlayers.equivariant.spatial_transformer import SpatialTransformer
from jaxlayers.geometry.groups import Cyclic, Translation
from jaxlayers.testing import BadInput, Case, Symmetry

GOLDEN = Path(__file__).parents[1] / "golden" / "equivariant_transformers_parity.npz"
SMALL = PosePredictor(features=3, kernel_size=3)
OTHER = PosePredictor(features=2, kernel_size=3)
TURNS = EquivariantTransformer(SMALL, groups.rotation(), resolution=(5, 8))
SHIFTS = EquivariantTransformer(SMALL, groups.translation(periodic=True), padding="wrap")


def pictures(rng, batch=2, size=8, channels=1):
    """A few slow waves that fade out towards the border."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    wave, phase = rng.uniform(-3, 3, size=(2, batch, 1, 1, channels, 3)), rng.uniform(0, 6, (batch, 1, 1, channels, 3))
    waves = np.sum(np.sin(wave[0] * rows[..., None, None] + wave[1] * columns[..., None, None] + phase), axis=-1)
    return waves * (np.cos(np.pi * rows / 2) * np.cos(np.pi * columns / 2))[..., None] ** 2


class Look(nn.Module):
    """A localisation network that knows no symmetry."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(3, (3, 3))(x))
        return jnp.tanh(nn.Dense(6)(x.reshape(*x.shape[:-3], -1)))


def plain_transformer(x):
    """The control: a spatial transformer with some parameters."""
    module = SpatialTransformer(Look(), kernel_init=nn.initializers.normal(0.2))
    return module.apply(jax.jit(module.init)(jax.random.key(0), x), x)


class Mean(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(*x.shape[:-3], -1))


CASES = (
    Case(
        name="pose_predictor",
        within="composed_transformer",
        module=SMALL,
        inputs=lambda rng: (rng.normal(size=(2, 5, 8, 2)),),
        keywords={"axes": (0, 1), "periodic": (False, True)},
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"picture of shape \(4, 4\) must be", inputs=lambda rng: (rng.normal(size=(4, 4)),)),
            BadInput(match=r"kernel_size=4 must be odd", module=PosePredictor(kernel_size=4)),
            BadInput(match=r"kernel_size=13 must be odd and its half fit", module=PosePredictor(kernel_size=13)),
            BadInput(match=r"depth=0 must be at least 1", module=PosePredictor(depth=0)),
        ),
    ),
    Case(
        name="equivariant_transformer_rotation",
        module=TURNS,
        inputs=lambda rng: (pictures(rng),),
        symmetries=(
            Symmetry(
                Cyclic(4), ("image",), control=plain_transformer, reason="other angles interpolate the image twice"
            ),
        ),
        leading_axes=True,
        bfloat16_tolerance=0.2,  # an angle off by a hundredth moves steep parts of the picture
        bad_inputs=(
            BadInput(match=r"image of shape \(8, 8\) must be", inputs=lambda rng: (rng.normal(size=(8, 8)),)),
            BadInput(
                match=r"resolution=\(1, 8\) must be two sizes of at least 2",
                module=EquivariantTransformer(SMALL, groups.rotation(), resolution=(1, 8)),
            ),
        ),
    ),
    Case(
        name="equivariant_transformer_translation",
        within="composed_transformer",
        module=SHIFTS,
        inputs=lambda rng: (pictures(rng),),
        symmetries=(Symmetry(Translation(2, cyclic=True), ("image",), control=plain_transformer),),
        leading_axes=True,
        bfloat16_tolerance=0.2,
        bad_inputs=(BadInput(match=r"image of shape \(8, 8\) must be", inputs=lambda rng: (rng.normal(size=(8, 8)),)),),
    ),
    Case(
        name="composed_transformer",
        module=ComposedTransformer(
            (TURNS, EquivariantTransformer(OTHER, groups.shear_x(), resolution=(6, 6))), backbone=Mean()
        ),
        inputs=lambda rng: (pictures(rng),),
        symmetries=(Symmetry(Cyclic(4), ("image",), control=plain_transformer),),
        leading_axes=True,
        bfloat16_tolerance=0.2,
        bad_inputs=(
            BadInput(match=r"one or more EquivariantTransformer modules; got none", module=ComposedTransformer(())),
            BadInput(match=r"got \['Look'\]; put other modules into", module=ComposedTransformer((TURNS, Look()))),
        ),
    ),
)


def inside(group, rng, count=40):
    """Coordinates inside the limits, and the sheet of each."""
    low, high = np.array(group.limits).T
    return rng.uniform(low, high, size=(count, 2)), rng.integers(group.sheets, size=count)


def plane(group, coordinates, sheet):
    return np.stack([group.to_plane(u[None], int(s))[0] for u, s in zip(coordinates, sheet, strict=True)])


def apply(matrix, points):
    """Return the images of points under a projective map."""
    homogeneous = np.concatenate([points, np.ones((*points.shape[:-1], 1))], axis=-1) @ np.asarray(matrix).T
    return homogeneous[..., :2] / homogeneous[..., 2:], homogeneous[..., 2]


# The formulas, for every group --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
def test_group_is_a_translation_of_its_coordinates(rng, name):
    """rho(T_g p) = rho(p) + g e, in float64, for points of every sheet."""
    group = GROUPS[name]()
    assert group.name == name
    coordinates, sheet = inside(group, rng)
    points = plane(group, coordinates, sheet)
    found, sheets = group.from_plane(points)
    np.testing.assert_allclose(found, coordinates, atol=1e-12)
    np.testing.assert_array_equal(sheets, sheet)
    low, high = np.array(group.limits).T
    plain = []
    for _ in range(5):
        g = 0.2 * rng.uniform(-1, 1, len(group.axes)) * (high - low)[list(group.axes)]
        with jax.enable_x64(True):
            matrix = np.asarray(group.matrix(jnp.asarray(g)))
        moved, w = apply(matrix, points)
        found, sheets = group.from_plane(moved)
        shift = np.zeros(2)
        shift[list(group.axes)] = g
        error = found - coordinates - shift
        if group.periodic[1]:
            error[:, 1] = (error[:, 1] + np.pi) % (2 * np.pi) - np.pi
        kept = (w > 0) & (sheets == sheet)
        assert np.mean(kept) > 0.8
        np.testing.assert_allclose(error[kept], 0, atol=1e-9)
        plain.append(np.abs(moved - points - shift).max())
    # Negative control: the image coordinates themselves are not shifted by g.
    assert "translation" in name or max(plain) > 1e-2


@pytest.mark.parametrize("name", GROUPS)
def test_matrices_are_a_group(rng, name):
    group = GROUPS[name]()
    with jax.enable_x64(True):
        g, h = (jnp.asarray(0.3 * rng.normal(size=len(group.axes))) for _ in range(2))
        np.testing.assert_allclose(group.matrix(g) @ group.matrix(h), group.matrix(g + h), atol=1e-12)
        np.testing.assert_allclose(group.matrix(0 * g), np.eye(3), atol=0)
        np.testing.assert_allclose(group.matrix(jnp.stack([g, h]))[1], group.matrix(h), atol=1e-12)


def test_rotation_turns_as_rot90(rng):
    x = jnp.asarray(rng.normal(size=(6, 6, 2)), jnp.float32)
    matrix = groups.rotation().matrix(jnp.array([-np.pi / 2], jnp.float32))  # read at T p: the content moves by T^-1
    np.testing.assert_allclose(jax.jit(transform_image)(x, matrix), jnp.rot90(x), atol=1e-5)
    resample = jax.jit(lambda x: canonical_image(x, groups.rotation(), (4, 8)))
    z = [resample(x) for x in (x, jnp.rot90(x))]
    np.testing.assert_allclose(z[1], jnp.roll(z[0], 2, axis=1), atol=1e-5)


@pytest.mark.parametrize("name", ["rotation_scale", "hyperbolic_rotation", "perspective_x", "translation"])
def test_canonical_image_equals_a_loop(rng, name):
    group = GROUPS[name]()
    x = rng.normal(size=(2, 6, 9, 2))
    found = jax.jit(lambda x: canonical_image(x, group, (3, 4)))(jnp.asarray(x, jnp.float32))
    wide = np.pad(x, ((0, 0), (40, 40), (40, 40), (0, 0)))
    assert found.shape == (2, 3, 4, 2 * group.sheets)
    for sheet, i, j in np.ndindex(group.sheets, 3, 4):
        u = [low + (k + 0.5) * (high - low) / n for (low, high), k, n in zip(group.limits, (i, j), (3, 4), strict=True)]
        row, column = group.to_plane(np.array(u), sheet) * 3 + np.array([2.5, 4.0])  # half the shorter side is 3
        tall = np.maximum(0, 1 - np.abs(row - np.arange(-40, 46)))
        flat = np.maximum(0, 1 - np.abs(column - np.arange(-40, 49)))
        expected = np.einsum("h,w,bhwc->bc", tall, flat, wide)
        np.testing.assert_allclose(found[:, i, j, 2 * sheet : 2 * sheet + 2], expected, atol=2e-5)


def test_centroid_equals_cosh_weights_and_moves_with_the_heat(rng):
    heat = rng.normal(size=(3, 9)) * 3
    values = np.linspace(-1, 1, 9)
    weights = np.cosh(heat) - 1
    weights /= weights.sum(axis=-1, keepdims=True)
    with jax.enable_x64(True):
        np.testing.assert_allclose(centroid(jnp.asarray(heat), values), weights @ values, atol=1e-12)
        circle = np.angle(weights @ np.exp(1j * np.pi * values)) / np.pi
        np.testing.assert_allclose(centroid(jnp.asarray(heat), values, period=2.0), circle, atol=1e-12)
        # Part of a line that moves over an empty background moves its centroid by as much; a softmax does not.
        heat = np.zeros(9)
        heat[2:4] = 1.3, -0.4
        moved = np.roll(heat, 3)
        shift = centroid(jnp.asarray(moved), values) - centroid(jnp.asarray(heat), values)
        np.testing.assert_allclose(shift, 0.75, atol=1e-12)
    softmax = [np.exp(h) @ values / np.exp(h).sum() for h in (heat, moved)]
    assert abs(softmax[1] - softmax[0] - 0.75) > 0.1
    large = centroid(jnp.asarray([500.0, 0.0, 490.0]), np.arange(3.0))
    assert float(large) == pytest.approx(2 * np.exp(-10), rel=1e-2)


# Exact where shifts are whole samples -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_poses_shift_with_rolled_canonical_pictures(rng, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        z = np.zeros((1, 20, 12, 2))
        z[:, 8:11] = rng.normal(size=(1, 3, 12, 2))
        z = jnp.asarray(z, dtype)
        predictor = PosePredictor(features=4, kernel_size=5)
        variables = jax.jit(functools.partial(predictor.init, periodic=(False, True)))(jax.random.key(0), z)
        line, circle = np.arange(20.0), np.arange(12.0)

        @jax.jit
        def poses(z):
            heats = predictor.apply(variables, z, periodic=(False, True))
            biased = centroid(heats[0] + 1, line)[0]
            return centroid(heats[0], line)[0], centroid(heats[1], circle, period=12.0)[0], biased

        def pose(z):
            return [float(x) for x in poses(z)]

        first = pose(z)
        for down, around in ((1, 0), (0, 5), (-2, 7), (2, -1)):
            found = pose(jnp.roll(z, (down, around), axis=(1, 2)))
            assert abs(found[0] - first[0] - down) < 20 * tolerance
            assert abs((found[1] - first[1] - around + 6) % 12 - 6) < 12 * tolerance
        # Negative control: a bias gives the empty background a heat of its own.
        assert abs(pose(jnp.roll(z, 2, axis=1))[2] - first[2] - 2) > 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-10)])
def test_poses_turn_and_shift_exactly_with_the_image(rng, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(pictures(rng, batch=1), dtype)
        for layer, moves in (
            (TURNS, [(lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)), np.array([k * np.pi / 2])) for k in (1, 2, 3)]),
            (
                SHIFTS,
                [(lambda x, s=s: jnp.roll(x, s, axis=(1, 2)), np.array(s) / 4) for s in ((1, 0), (-3, 2), (5, 7))],
            ),
        ):
            variables = jax.jit(layer.init)(jax.random.key(0), x)
            period = 2 * np.pi if layer is TURNS else 2.0
            pose = jax.jit(functools.partial(layer.apply, variables, method="pose"))
            for move, g in moves:
                error = (np.asarray(pose(move(x))) - np.asarray(pose(x)) - g + period / 2) % period - period / 2
                assert np.max(np.abs(error)) < tolerance


# Approximate elsewhere: the error falls -----------------------------------------------------------------------------

# Limits that keep the pictures below, and what the group makes of them, inside the image.
NARROW = {
    "shear_x": functools.partial(groups.shear_x, (-1.5, 1.5)),
    "shear_y": functools.partial(groups.shear_y, (-1.5, 1.5)),
    "hyperbolic_rotation": functools.partial(groups.hyperbolic_rotation, (-1.0, 1.0)),
}


def bump(group, points):
    """A smooth picture in the middle half of the canonical coordinates, as a function of the plane."""
    with np.errstate(all="ignore"):
        coordinates, sheet = group.from_plane(points)
    low, high = np.array(group.limits).T
    q = np.nan_to_num(2 * (coordinates - low) / (high - low) - 1, nan=9.0)
    if group.periodic[1]:
        around = 1.3 + np.cos(np.pi * q[..., 1]) + 0.5 * np.sin(2 * np.pi * q[..., 1])
        return np.maximum(0, 1 - (2 * q[..., 0]) ** 2) ** 3 * around
    return np.prod(np.maximum(0, 1 - (2 * q) ** 2) ** 3, axis=-1) * (1 + q[..., 0] + 0.7 * q[..., 1]) * (-0.6) ** sheet


def draw(group, size, g):
    """The picture moved by T_g, without interpolation."""
    pixels = (np.stack(np.meshgrid(*(np.arange(size),) * 2, indexing="ij"), axis=-1) - (size - 1) / 2) * 2 / size
    points, w = apply(np.linalg.inv(np.asarray(group.matrix(jnp.asarray(g, jnp.float32)), np.float64)), pixels)
    return np.where(w > 1e-3, bump(group, points), 0)[..., None]


def pose_errors(group, layer, sizes, elements, method="pose"):
    """Largest errors of theta(T_g x) - theta(x) - g for images of each size."""
    errors = []
    variables = jax.jit(layer.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 1)))
    for size in sizes:
        x = jnp.asarray(np.stack([draw(group, size, g) for g in (0 * elements[0], *elements)]), jnp.float32)
        theta = jax.jit(functools.partial(layer.apply, variables, method=method))(x)
        error = np.array(theta[1:] - theta[0] - np.stack(elements))
        for column, axis in enumerate(group.axes):
            low, high = group.limits[axis]
            if group.periodic[axis]:
                error[:, column] = (error[:, column] + np.pi) % (2 * np.pi) - np.pi
            error[:, column] /= high - low
        errors.append(np.abs(error).max())
    return errors


def measure(name, sizes):
    group = NARROW.get(name, GROUPS[name])()
    step = np.array([(group.limits[axis][1] - group.limits[axis][0]) / 24 for axis in group.axes])
    layer = EquivariantTransformer(SMALL, group, resolution=(24, 24))
    return pose_errors(group, layer, sizes, [k * step for k in (-2, -1, 1, 2)])


@pytest.mark.parametrize("name", ["rotation_scale", "shear_x", "hyperbolic_rotation", "perspective_y"])
def test_pose_error_falls_with_the_size_of_the_image(name):
    coarse, fine = measure(name, (24, 144))
    print(f"{name}: {coarse:.1e} at 24 pixels, {fine:.1e} at 144")
    assert fine < 0.1 * coarse
    assert fine < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GROUPS if "translation" not in name])
def test_pose_error_of_every_group_falls_with_the_size_of_the_image(name):
    errors = measure(name, (24, 48, 96, 192))
    print(name, [f"{error:.1e}" for error in errors])
    assert errors[3] < 0.1 * errors[0]
    assert errors[3] < 3e-3


def test_pose_error_between_samples_falls_with_the_resolution():
    group = groups.rotation()
    elements = [np.array([angle]) for angle in (0.3, -0.7, 1.9)]
    coarse, fine = (
        pose_errors(group, EquivariantTransformer(SMALL, group, resolution=(n, n)), (96,), elements)[0] for n in (8, 48)
    )
    assert fine < 0.2 * coarse, (coarse, fine)
    assert fine < 1e-3


def test_output_is_invariant_up_to_interpolation_and_a_plain_transformer_is_not():
    group = groups.rotation()
    elements = [np.array([angle]) for angle in (0.0, 0.3, -0.7, 1.9)]
    layer = EquivariantTransformer(SMALL, group, resolution=(24, 24))

    def change(apply_, size):
        out = apply_(jnp.asarray(np.stack([draw(group, size, g) for g in elements]), jnp.float32))
        return float(jnp.max(jnp.abs(out[1:] - out[0])) / jnp.max(jnp.abs(out[0])))

    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    errors = [change(jax.jit(functools.partial(layer.apply, variables)), size) for size in (24, 96)]
    control = [change(jax.jit(plain_transformer), size) for size in (24, 96)]
    assert errors[1] < 0.3 * errors[0], errors
    assert errors[1] < 0.03, errors
    assert min(control) > 0.3, control


# Degenerate images, composition, errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rotation_scale", "perspective_x"])
def test_images_without_a_pose_are_finite(name):
    group = GROUPS[name]()
    layer = EquivariantTransformer(SMALL, group, resolution=(8, 8), bias_init=nn.initializers.constant(0.25))
    disk = np.hypot(*np.meshgrid(np.arange(9) - 4, np.arange(9) - 4)) < 3.5
    images = np.stack([np.zeros((9, 9)), np.ones((9, 9)), disk])[..., None]
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.asarray(images, jnp.float32))

    def energy(variables, x):
        out, state = layer.apply(variables, x, mutable=["intermediates"])
        (theta,) = state["intermediates"]["theta"]
        return jnp.sum(out**2) + jnp.sum(jnp.cos(theta)), (theta, out)

    x = jnp.asarray(images, jnp.float32)
    (_, (theta, out)), gradients = jax.jit(jax.value_and_grad(energy, (0, 1), has_aux=True))(variables, x)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((theta, out, gradients)))
    np.testing.assert_allclose(theta[0], 0.25, atol=1e-6)  # an empty image has no pose
    if name == "rotation_scale":
        # The disk has the symmetry of the square: its mean direction vanishes, so that the angle is the offset.
        np.testing.assert_allclose(theta[2, 1], 0.25, atol=1e-5)


def test_nan_comes_out_as_nan():
    x = jnp.ones((2, 8, 8, 1)).at[1, 4, 4].set(jnp.nan)
    out = jax.jit(TURNS.apply)(jax.jit(TURNS.init)(jax.random.key(0), x), x)
    assert bool(jnp.all(jnp.isfinite(out[0])))
    assert bool(jnp.all(jnp.isnan(out[1])))


def test_composed_transformer_multiplies_the_maps_and_reads_once(rng):
    x = jnp.asarray(pictures(rng), jnp.float32)
    parts = (TURNS, EquivariantTransformer(OTHER, groups.scale(), resolution=(8, 8)))
    composed, single = ComposedTransformer(parts), ComposedTransformer(parts[:1])
    variables = jax.jit(composed.init)(jax.random.key(0), x)

    @jax.jit
    def run(variables, x):
        own = [{"params": variables["params"][f"transformers_{i}"]} for i in range(2)]
        first = TURNS.group.matrix(TURNS.apply(own[0], x, method="pose"))
        second = parts[1].group.matrix(parts[1].apply(own[1], x, first, method="pose"))
        found = composed.apply(variables, x, mutable=["intermediates"])
        alone = single.apply({"params": {"transformers_0": own[0]["params"]}}, x), TURNS.apply(own[0], x)
        return found, transform_image(x, first @ second), alone

    (out, state), expected, alone = run(variables, x)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert len(jax.tree.leaves(state["intermediates"])) == 2
    np.testing.assert_allclose(*alone, atol=1e-6)


def test_clear_errors(untyped):
    with pytest.raises(ValueError, match=r"limits=.* of scale must rise from finite to finite; set them"):
        groups.scale((1.0, 0.0))

    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, z, *, axes, periodic):
            return (jnp.mean(z, axis=(-1, -2, -3)),)

    x = jnp.ones((2, 8, 8, 1))
    with pytest.raises(ValueError, match=r"predictor returned shapes .* heat maps of shapes \[\(2, 8\)\]"):
        EquivariantTransformer(Pooled(), groups.rotation()).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="padding='reflect' is unknown"):
        EquivariantTransformer(SMALL, groups.rotation(), padding="reflect").init(jax.random.key(0), x)


# The reference code -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        assert "stanford-futuredata/equivariant-transformers" in str(arrays["provenance"])
        return dict(arrays)


def expected_coordinates(name, u, v):
    """What the reference's (u, v) are in the coordinates of this package."""
    turned = np.pi / 2 - v
    return {
        "logpolar": (u, turned),
        "polar": (u, turned),
        "shearx": (u, v),
        "sheary": (u, v),
        "scalex": (v, u),
        "scaley": (v, u),
        "hyperbolic": (u, v),
        "perspectivex": (v, u - 4),
        "perspectivey": (v, u - 4),
        "identity": (v, u),
    }[name]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("identity", "translation"),
        ("polar", "rotation"),
        ("logpolar", "rotation_scale"),
        ("shearx", "shear_x"),
        ("sheary", "shear_y"),
        ("scalex", "scale_x"),
        ("scaley", "scale_y"),
        ("hyperbolic", "hyperbolic_rotation"),
        ("perspectivex", "perspective_x"),
        ("perspectivey", "perspective_y"),
    ],
)
def test_coordinates_equal_those_of_the_reference(golden, theirs, ours):
    group, points = GROUPS[ours](), golden[f"{theirs}_grid"][..., ::-1].astype(np.float64)
    sheets = 1 if group.sheets == 1 else 2  # it cuts into two what is four quadrants here, with radii of both signs
    (u_low, u_high), (v_low, v_high) = golden[f"{theirs}_grid_limits"]
    v, u = np.meshgrid(np.linspace(v_low, v_high, 8 // sheets), np.linspace(u_low, u_high, 5), indexing="ij")
    for part, block in enumerate(np.split(points, sheets)):
        if theirs.startswith("perspective") and part == 0:  # the left half, from -7 to -1
            expected = (v, 4 - u[:, ::-1])
        else:
            expected = expected_coordinates(theirs, u, v)
        with np.errstate(invalid="ignore"):
            found, _ = group.from_plane(block)
        error = found - np.stack(expected, axis=-1)
        if "shear" in theirs:
            error = error[u != 0]  # where both coordinates vanish
        if group.periodic[1]:
            error[..., 1] = (error[..., 1] + np.pi) % (2 * np.pi) - np.pi
        np.testing.assert_allclose(error, 0, atol=2e-6)


@pytest.mark.parametrize(
    ("theirs", "ours", "sign"),
    [
        ("Rotation", "rotation", [-1]),
        ("Scale", "scale", [1]),
        ("RotationScale", "rotation_scale", [1, -1]),
        ("ShearX", "shear_x", [1]),
        ("ShearY", "shear_y", [1]),
        ("ScaleX", "scale_x", [1]),
        ("ScaleY", "scale_y", [1]),
        ("HyperbolicRotation", "hyperbolic_rotation", [1]),
        ("PerspectiveX", "perspective_x", [1]),
        ("PerspectiveY", "perspective_y", [1]),
    ],
)
def test_matrices_equal_those_of_the_reference(golden, theirs, ours, sign):
    theta = jnp.asarray(golden[f"theta_{theirs}"] * sign, jnp.float32)
    swap = [1, 0, 2]
    found = np.asarray(GROUPS[ours]().matrix(theta))[swap][:, swap]
    np.testing.assert_allclose(found, golden[f"matrix_{theirs}"], atol=1e-6)


def test_centroids_equal_those_of_the_reference(golden):
    heat = jnp.asarray(np.arccosh(1 + golden["heat"]), jnp.float32)  # whose weights are the reference's heat
    np.testing.assert_allclose(centroid(heat, np.linspace(-1, 1, 7)), golden["centroid_line"], atol=1e-5)
    values = np.arange(7) * 2 / 7 - 6 / 7
    np.testing.assert_allclose(centroid(heat, values, period=2.0), golden["centroid_circle"], atol=1e-5)


def test_reading_behind_the_horizon_is_empty():
    x = jnp.ones((1, 6, 6, 1))
    matrix = groups.perspective_y().matrix(jnp.array([[4.0]]))
    out = np.asarray(jax.jit(transform_image)(x, matrix))[0, ..., 0]
    w = 1 + 4 * (2 * np.arange(6) - 5) / 6
    np.testing.assert_array_equal(out[w < 1e-3], 0)
    assert out[w > 0.5].max() == 1
    points = jnp.zeros((1, 1, 2))
    np.testing.assert_array_equal(*jax.jit(lambda x: (read_at(x, points), read_at(x, points, jnp.eye(3)[None])))(x))
