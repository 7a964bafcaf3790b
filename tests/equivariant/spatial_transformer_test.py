"""Spatial transformers: warps that are what their numbers say, and a network that learns to straighten pictures."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from scipy.interpolate import RBFInterpolator

from jaxlayers.equivariant.spatial_transformer import (
    AffineWarp,
    AttentionWarp,
    ProjectiveWarp,
    SpatialTransformer,
    ThinPlateSplineWarp,
    affine_grid,
    projective_grid,
    regular_control_points,
    thin_plate_spline_grid,
    thin_plate_spline_matrix,
)
from jaxlayers.ops.grid_sample import grid_sample
from jaxlayers.testing import BadInput, Case

WARPS = (AffineWarp(), AttentionWarp(), ProjectiveWarp(), ThinPlateSplineWarp(3, 2))
CONTROL = regular_control_points(3, 3)


class Look(nn.Module):
    """A small localisation network."""

    features: int = 5
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2, dtype=self.dtype)(x))
        return nn.Dense(self.features, dtype=self.dtype)(x.reshape(*x.shape[:-3], -1))


def pictures(rng, batch=2, height=7, width=6, channels=2):
    """Smooth pictures: a few slow waves."""
    rows, columns = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    wave = rng.uniform(-4, 4, size=(2, batch, 1, 1, channels, 3))
    phase = rng.uniform(0, 6, size=(batch, 1, 1, channels, 3))
    return np.sum(np.sin(wave[0] * rows[..., None, None] + wave[1] * columns[..., None, None] + phase), axis=-1)


def case(name, warp, *bad, **fields):
    return Case(
        name=name,
        within="" if name == "spatial_transformer" else "spatial_transformer",
        module=SpatialTransformer(Look(), warp=warp, **fields),
        inputs=lambda rng: (pictures(rng),),
        leading_axes=True,
        bad_inputs=bad,
    )


CASES = (
    case(
        "spatial_transformer",
        AffineWarp(),
        BadInput(match=r"image of shape \(4, 4\) must be", inputs=lambda rng: (rng.normal(size=(4, 4)),)),
        BadInput(match=r"localization returned shape \(2, 7, 6, 3\)", module=SpatialTransformer(nn.Dense(3))),
        BadInput(match=r"shape=\(0, 3\) must be two positive", module=SpatialTransformer(Look(), out_shape=(0, 3))),
    ),
    case(
        "spatial_transformer_projective",
        ProjectiveWarp(),
        BadInput(match="epsilon=0.0 must be positive", module=SpatialTransformer(Look(), ProjectiveWarp(0.0))),
        padding="edge",
    ),
    case(
        "spatial_transformer_thin_plate",
        ThinPlateSplineWarp(2, 3),
        BadInput(
            match="rows=1 and columns=3 must be at least 2",
            module=SpatialTransformer(Look(), warp=ThinPlateSplineWarp(1, 3)),
        ),
        out_shape=(4, 5),
        padding="wrap",
    ),
)


def square(theta):
    """Return theta [2, 3] as the matrix that `projective_grid` takes."""
    return jnp.concatenate([theta, jnp.array([[0.0, 0.0, 1.0]])])


def as_displacements(theta):
    """Return the displacements of the control points under an affine theta."""
    control = jnp.asarray(CONTROL, theta.dtype)
    return control @ theta[:, :2].T + theta[:, 2] - control


KINDS = {
    "affine": affine_grid,
    "projective": lambda theta, shape, **kw: projective_grid(square(theta), shape, **kw),
    "thin plate": lambda theta, shape, **kw: thin_plate_spline_grid(
        as_displacements(theta), shape, control=CONTROL, **kw
    ),
}


# The identity and exact warps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warp", "dtype", "padding"),
    list(zip(WARPS, ("float32", "bfloat16") * 2, ("zeros", "edge", "wrap", "zeros"), strict=True)),
)
def test_untrained_transformer_returns_the_image_to_the_bit(rng, warp, dtype, padding):
    x = jnp.asarray(rng.normal(size=(2, 9, 6, 3)), dtype)
    module = SpatialTransformer(Look(), warp=warp, padding=padding)
    out, _ = jax.jit(module.init_with_output)(jax.random.key(0), x)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_pixel_moves_and_quarter_turns_are_rolls_and_rot90(rng, kind):
    x = jnp.asarray(rng.normal(size=(8, 8, 2)), jnp.float32)
    grid = KINDS[kind]
    # Affine and projective coordinates come out whole; those of the spline to rounding.
    compare = (
        functools.partial(np.testing.assert_allclose, atol=2e-5)
        if kind == "thin plate"
        else np.testing.assert_array_equal
    )
    shift = jnp.array([[1.0, 0.0, 2 * 2 / 8], [0.0, 1.0, -2 * 1 / 8]])
    compare(grid_sample(x, grid(shift, (8, 8)), padding="wrap"), jnp.roll(x, (-2, 1), axis=(0, 1)))
    compare(grid_sample(x, grid(shift, (8, 8)))[:6, 1:], x[2:, :7])
    for turns, (cosine, sine) in enumerate(((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))):
        turn = jnp.array([[cosine, sine, 0.0], [-sine, cosine, 0.0]])
        compare(grid_sample(x, grid(turn, (8, 8)), padding="edge"), jnp.rot90(x, turns))
    # Negative control: half a pixel is no roll.
    half = jnp.array([[1.0, 0.0, 0.125], [0.0, 1.0, 0.0]])
    assert float(jnp.max(jnp.abs(grid_sample(x, grid(half, (8, 8)), padding="wrap") - x))) > 0.1


def test_quarter_turn_of_an_image_that_is_not_square():
    x = jnp.arange(12.0).reshape(3, 4, 1)
    turn = jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(grid_sample(x, affine_grid(turn, (4, 3), source=(3, 4))), jnp.rot90(x))


def test_scaling_to_another_size_reads_the_middle_of_blocks(rng):
    x = jnp.asarray(rng.normal(size=(8, 6, 1)), jnp.float32)
    found = grid_sample(x, affine_grid(jnp.eye(2, 3), (4, 3), source=(8, 6)))
    np.testing.assert_allclose(found, x.reshape(4, 2, 3, 2, 1).mean(axis=(1, 3)), atol=1e-6)


# The formulas -------------------------------------------------------------------------------------------------------


def brute_force_coordinates(matrix, shape, source):
    """Coordinates for a projective matrix, a pixel at a time in float64; None behind the horizon."""
    out = np.full((*shape, 2), -1.0)
    for row in range(shape[0]):
        for column in range(shape[1]):
            place = np.array([(2 * row + 1) / shape[0] - 1, (2 * column + 1) / shape[1] - 1, 1.0])
            r, c, w = matrix @ place
            if w / matrix[2, 2] >= 1e-3:
                out[row, column] = ((r / w + 1) * source[0] - 1) / 2, ((c / w + 1) * source[1] - 1) / 2
    return out


def test_projective_and_affine_grids_equal_a_loop(rng):
    behind = 0
    for _ in range(5):
        matrix = np.eye(3) + rng.normal(size=(3, 3)) * np.array([[0.3], [0.3], [0.8]])
        expected = brute_force_coordinates(matrix, (5, 4), (6, 7))
        behind += np.sum(expected[..., 0] == -1)
        with jax.enable_x64(True):
            found = projective_grid(jnp.asarray(matrix), (5, 4), source=(6, 7))
            np.testing.assert_allclose(found, expected, atol=1e-10)
            # A multiple of the matrix, also a negative one, is the same map.
            found = projective_grid(jnp.asarray(-3.7 * matrix), (5, 4), source=(6, 7))
            np.testing.assert_allclose(found, expected, atol=1e-10)
            matrix[2] = 0, 0, 1
            np.testing.assert_allclose(
                affine_grid(jnp.asarray(matrix[:2]), (5, 4), source=(6, 7)),
                brute_force_coordinates(matrix, (5, 4), (6, 7)),
                atol=1e-10,
            )
    assert behind > 0


def test_composed_projective_maps_multiply(rng):
    with jax.enable_x64(True):
        first, second = (np.eye(3) + 0.1 * rng.normal(size=(3, 3)) for _ in range(2))
        size = np.array([6, 5])
        inner = (2 * np.asarray(projective_grid(jnp.asarray(second), (6, 5))) + 1) / size - 1
        homogeneous = np.concatenate([inner, np.ones((6, 5, 1))], axis=-1) @ first.T
        expected = ((homogeneous[..., :2] / homogeneous[..., 2:] + 1) * size - 1) / 2
        np.testing.assert_allclose(projective_grid(jnp.asarray(first @ second), (6, 5)), expected, atol=1e-10)


def test_spline_equals_scipy(rng):
    control = rng.uniform(-1, 1, size=(7, 2))
    points = rng.uniform(-1.5, 1.5, size=(20, 2))
    values = rng.normal(size=(7, 3))
    expected = RBFInterpolator(control, values, kernel="thin_plate_spline", degree=1)(points)
    np.testing.assert_allclose(thin_plate_spline_matrix(control, points) @ values, expected, atol=1e-9)


def test_spline_goes_through_its_control_points_and_keeps_affine_maps(rng):
    control = rng.uniform(-1, 1, size=(6, 2))
    np.testing.assert_allclose(thin_plate_spline_matrix(control, control), np.eye(6), atol=1e-9)
    points = rng.uniform(-2, 2, size=(10, 2))
    matrix, offset = rng.normal(size=(2, 2)), rng.normal(size=2)
    found = thin_plate_spline_matrix(control, points) @ (control @ matrix.T + offset)
    np.testing.assert_allclose(found, points @ matrix.T + offset, atol=1e-9)
    # Negative control: without the affine part, the kernel alone keeps no affine map.
    squared = np.sum((points[:, None] - control) ** 2, axis=-1)
    own = np.sum((control[:, None] - control) ** 2, axis=-1)
    alone = (squared * np.log(squared)) @ np.linalg.solve(own * np.log(own + np.eye(6)), control @ matrix.T + offset)
    assert np.abs(alone - points @ matrix.T - offset).max() > 0.1


def test_spline_with_affine_displacements_is_the_affine_grid(rng):
    theta = jnp.asarray(np.eye(2, 3) + 0.3 * rng.normal(size=(4, 2, 3)), jnp.float32)
    found = jax.vmap(lambda theta: KINDS["thin plate"](theta, (5, 6), source=(9, 8)))(theta)
    np.testing.assert_allclose(found, affine_grid(theta, (5, 6), source=(9, 8)), atol=2e-5)
    bent = as_displacements(theta[0]).at[4].add(0.5)
    found = thin_plate_spline_grid(bent, (5, 6), control=CONTROL, source=(9, 8))
    assert float(jnp.max(jnp.abs(found - affine_grid(theta[0], (5, 6), source=(9, 8))))) > 0.5


def test_attention_is_an_affine_map_without_shear():
    found = AttentionWarp().coordinates(jnp.array([-0.5, 0.25, -0.125]), (4, 6), (4, 6))
    expected = affine_grid(jnp.array([[0.5, 0.0, 0.25], [0.0, 0.5, -0.125]]), (4, 6))
    np.testing.assert_array_equal(found, expected)


# Gradients and degenerate numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warp", WARPS, ids=lambda warp: type(warp).__name__)
def test_gradients_to_image_and_theta_equal_finite_differences(rng, warp):
    with jax.enable_x64(True):
        image = jnp.asarray(rng.normal(size=(2, 5, 4, 2)))
        theta = jnp.asarray(0.2 * rng.normal(size=(2, warp.size)))

        def warped(image, theta):
            image, theta = jnp.asarray(image), jnp.asarray(theta)
            return grid_sample(image, warp.coordinates(theta, (4, 5), (5, 4)), padding="edge")

        check_grads(jax.jit(warped), (image, theta), 1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6, eps=1e-7)


def test_horizon_gives_zeros_with_finite_gradients():
    x = jnp.ones((6, 6, 1))

    def read(theta):
        return grid_sample(x, projective_grid(theta, (6, 6)))

    # w = 1 + 4 q: zero at q = -1/4, a row between pixels; w exactly zero on pixel rows for the second.
    for slope in (4.0, 6.0 / 5.0, 2.0):
        theta = jnp.eye(3).at[2, 0].set(slope)
        out, gradient = read(theta), jax.grad(lambda theta: read(theta).sum())(theta)
        w = 1 + slope * ((2 * np.arange(6) + 1) / 6 - 1)
        np.testing.assert_array_equal(np.asarray(out)[w < 1e-3], 0)
        assert float(out.max()) == 1
        assert bool(jnp.all(jnp.isfinite(gradient)))
    for degenerate in (jnp.zeros((3, 3)), jnp.eye(3).at[2, 2].set(0.0)):
        np.testing.assert_array_equal(read(degenerate), 0)
        assert bool(jnp.all(jnp.isfinite(jax.grad(lambda theta: read(theta).sum())(degenerate))))
    assert bool(jnp.all(jnp.isnan(read(jnp.full((3, 3), jnp.nan)))))


def test_collapsed_affine_maps_and_folded_splines_are_finite(rng):
    x = jnp.asarray(rng.normal(size=(5, 5, 1)), jnp.float32)
    flat = grid_sample(x, affine_grid(jnp.zeros((2, 3)), (5, 5)))
    np.testing.assert_array_equal(flat, jnp.full((5, 5, 1), x[2, 2, 0]))

    def folded(displacements):
        return grid_sample(x, thin_plate_spline_grid(displacements, (5, 5), control=CONTROL)).sum()

    together = -jnp.asarray(CONTROL, jnp.float32)  # all control points read the centre
    assert bool(jnp.isfinite(folded(together)))
    assert bool(jnp.all(jnp.isfinite(jax.grad(folded)(together))))


def test_control_points_that_define_no_spline_are_refused():
    points = np.zeros((1, 2))
    with pytest.raises(ValueError, match="control points must differ, but two coincide; remove one"):
        thin_plate_spline_matrix(np.concatenate([CONTROL, CONTROL[:1] + 1e-8]), points)
    with pytest.raises(ValueError, match="must not lie on one line; add one beside it"):
        thin_plate_spline_matrix(np.outer([0, 1, 2, 5], [1.0, 2.0]), points)
    for control in (CONTROL[:2], CONTROL[:, :1], np.where(CONTROL == 1, np.nan, CONTROL)):
        with pytest.raises(ValueError, match=r"must be \[k, 2\] with at least 3 finite points"):
            thin_plate_spline_matrix(control, points)


def test_clear_errors_of_the_grids(untyped):
    with pytest.raises(ValueError, match=r"theta of shape \(3, 3\) must be \[\*batch, 2, 3\]"):
        affine_grid(jnp.eye(3), (4, 4))
    with pytest.raises(ValueError, match=r"theta of shape \(2, 3\) must be \[\*batch, 3, 3\]"):
        projective_grid(jnp.eye(2, 3), (4, 4))
    with pytest.raises(ValueError, match=r"displacements of shape \(4, 2\) must be \[\*batch, 9, 2\]"):
        thin_plate_spline_grid(jnp.zeros((4, 2)), (4, 4), control=CONTROL)
    with pytest.raises(ValueError, match="padding='reflect' is unknown"):
        SpatialTransformer(Look(), padding="reflect").init(jax.random.key(0), jnp.ones((4, 4, 1)))


# The module ---------------------------------------------------------------------------------------------------------


def test_module_is_the_localisation_network_and_the_warp(rng):
    x = jnp.asarray(pictures(rng), jnp.float32)
    module = SpatialTransformer(Look(), kernel_init=nn.initializers.normal(0.1), out_shape=(4, 3), padding="edge")
    variables = module.init(jax.random.key(0), x)
    out, state = module.apply(variables, x, mutable=["intermediates"])
    params = variables["params"]
    theta = Look().apply({"params": params["localization"]}, x) @ params["pose"]["kernel"] + params["pose"]["bias"]
    np.testing.assert_allclose(state["intermediates"]["theta"][0], theta, atol=1e-5)
    matrix = np.asarray(theta).reshape(2, 2, 3) + np.eye(2, 3)
    for one in range(2):
        places = brute_force_coordinates(np.concatenate([matrix[one], [[0, 0, 1]]]), (4, 3), (7, 6))
        tall = np.maximum(0, 1 - np.abs(np.clip(places[..., :1], 0, 6) - np.arange(7)))
        wide = np.maximum(0, 1 - np.abs(np.clip(places[..., 1:], 0, 5) - np.arange(6)))
        np.testing.assert_allclose(out[one], np.einsum("rch,rcw,hwf->rcf", tall, wide, x[one]), atol=1e-4)


def test_theta_stays_float32_in_bfloat16(rng):
    x = jnp.asarray(pictures(rng), jnp.bfloat16)
    module = SpatialTransformer(Look(dtype=jnp.bfloat16), kernel_init=nn.initializers.normal(0.1))
    _, state = module.apply(module.init(jax.random.key(0), x), x, mutable=["intermediates"])
    assert state["intermediates"]["theta"][0].dtype == jnp.float32


def test_deterministic_reaches_the_localisation_network(rng):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, *, deterministic=True):
            return nn.Dropout(0.5)(x.reshape(x.shape[0], -1), deterministic=deterministic)

    module = SpatialTransformer(Noisy(), kernel_init=nn.initializers.normal(0.1))
    x = jnp.asarray(pictures(rng), jnp.float32)
    variables = module.init(jax.random.key(0), x)
    outs = [
        module.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(seed)}) for seed in range(2)
    ]
    assert float(jnp.max(jnp.abs(outs[0] - outs[1]))) > 1e-3


def test_learns_to_straighten_what_a_plain_classifier_cannot_tell(rng):
    """Two small shapes anywhere in the picture: a linear classifier fails, behind a spatial transformer it does not."""
    shapes = np.array([[[1, 1, 1], [0, 1, 0], [0, 1, 0]], [[0, 1, 0], [0, 1, 0], [1, 1, 1]]], float)

    def draw(count):
        labels = rng.integers(2, size=count)
        images = np.zeros((count, 12, 12, 1), np.float32)
        for image, label, (row, column) in zip(images, labels, rng.integers(9, size=(count, 2)), strict=True):
            image[row : row + 3, column : column + 3, 0] = shapes[label]
        return jnp.asarray(images), jnp.asarray(labels)

    class Classifier(nn.Module):
        straighten: bool

        @nn.compact
        def __call__(self, x):
            if self.straighten:
                x = SpatialTransformer(Look(16), warp=AttentionWarp(), padding="edge")(x)
            return nn.Dense(2)(x.reshape(x.shape[0], -1))

    def accuracy(straighten):
        model = Classifier(straighten)
        images, labels = draw(400)
        params = model.init(jax.random.key(0), images)
        optimiser = optax.adam(1e-2)

        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images), labels).mean()

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                updates, state = optimiser.update(jax.grad(loss)(params), state)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, optimiser.init(params)), length=300)[0][0]

        images_, labels_ = draw(400)
        return float(jnp.mean(jnp.argmax(model.apply(train(params), images_), axis=-1) == labels_))

    plain, straightened = accuracy(False), accuracy(True)
    assert straightened > 0.9, (plain, straightened)
    assert plain < straightened - 0.1, (plain, straightened)
