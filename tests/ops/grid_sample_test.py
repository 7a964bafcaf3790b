import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlayers.ops.grid_sample import affine_coordinates, centred_grid, grid_sample, project

PADDINGS = ("zeros", "edge", "wrap")


def brute_force(image, coordinates, padding):
    """The sum over all pixels of equation 5 in the paper of spatial transformers, with the image laid out padded."""
    height, width, channels = image.shape
    pad = 2 * max(height, width)
    mode = {"zeros": "constant", "edge": "edge", "wrap": "wrap"}[padding]
    wide = np.pad(image.astype(np.float64), ((pad, pad), (pad, pad), (0, 0)), mode=mode)
    out = np.zeros((*coordinates.shape[:2], channels))
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            r, c = coordinates[row, column]
            tall = np.maximum(0, 1 - np.abs(r - np.arange(-pad, height + pad)))
            flat = np.maximum(0, 1 - np.abs(c - np.arange(-pad, width + pad)))
            out[row, column] = np.einsum("h,w,hwc->c", tall, flat, wide)
    return out


@pytest.mark.parametrize("padding", PADDINGS)
def test_equals_the_sum_over_all_pixels(rng, padding):
    image = rng.normal(size=(5, 4, 3))
    coordinates = rng.uniform(-5, 9, size=(6, 7, 2))
    coordinates[0] = np.round(coordinates[0])
    coordinates[1, :3] = [[0, 0], [4, 3], [-1, 4]]
    expected = brute_force(image, coordinates, padding)
    found = grid_sample(jnp.asarray(image, jnp.float32), jnp.asarray(coordinates, jnp.float32), padding=padding)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with jax.enable_x64(True):
        found = grid_sample(jnp.asarray(image), jnp.asarray(coordinates), padding=padding)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_paddings_differ_outside_only(rng):
    image = jnp.asarray(rng.normal(size=(5, 4, 1)), jnp.float32)
    inside = jnp.asarray(rng.uniform(0, 3, size=(3, 3, 2)), jnp.float32)
    zeros, edge, wrap = (grid_sample(image, inside, padding=padding) for padding in PADDINGS)
    np.testing.assert_array_equal(zeros, edge)
    np.testing.assert_allclose(zeros, wrap, atol=1e-6)
    zeros, edge, wrap = (grid_sample(image, inside - 2.7, padding=padding) for padding in PADDINGS)
    assert min(float(jnp.max(jnp.abs(a - b))) for a, b in ((zeros, edge), (zeros, wrap), (edge, wrap))) > 0.1


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_whole_pixels_are_read_to_the_bit(rng, padding, dtype):
    image = jnp.asarray(rng.normal(size=(2, 7, 6, 3)), dtype)
    still = jnp.eye(2, 3)
    np.testing.assert_array_equal(grid_sample(image, affine_coordinates(still, (7, 6)), padding=padding), image)
    moved = grid_sample(image, affine_coordinates(still.at[:, 2].set(jnp.array([2.0, -1.0])), (7, 6)), padding=padding)
    assert moved.dtype == dtype
    rolled = jnp.roll(image, (-2, 1), axis=(1, 2))
    np.testing.assert_array_equal(moved[:, :-2, 1:], rolled[:, :-2, 1:])
    if padding == "wrap":
        np.testing.assert_array_equal(moved, rolled)
    if padding == "zeros":
        np.testing.assert_array_equal(moved[:, -2:], 0)


def test_quarter_turns_equal_rot90_to_the_bit(rng):
    image = jnp.asarray(rng.normal(size=(6, 6, 2)), jnp.float32)
    for turns, (cosine, sine) in enumerate(((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))):
        matrix = jnp.array([[cosine, sine, 0.0], [-sine, cosine, 0.0]])
        np.testing.assert_array_equal(grid_sample(image, affine_coordinates(matrix, (6, 6))), jnp.rot90(image, turns))


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_equal_finite_differences(rng, padding):
    with jax.enable_x64(True):
        image = jnp.asarray(rng.normal(size=(2, 4, 3, 2)))
        # Away from whole pixels, where the derivative jumps.
        places = rng.integers(-3, 7, size=(2, 3, 4, 2)) + rng.uniform(0.1, 0.9, size=(2, 3, 4, 2))
        check_grads(
            lambda image, x: grid_sample(jnp.asarray(image), jnp.asarray(x), padding=padding),
            (image, jnp.asarray(places)),
            order=1,
            modes=("fwd", "rev"),
            atol=1e-6,
            rtol=1e-6,
        )


def test_gradient_at_a_whole_pixel_is_the_one_sided_slope():
    image = jnp.array([0.0, 1.0, 5.0]).reshape(1, 3, 1)
    slope = jax.grad(lambda x: grid_sample(image, jnp.stack([jnp.zeros(()), x])[None, None], padding="edge").sum())
    assert [float(slope(x)) for x in (0.0, 1.0, 2.0)] == [1.0, 4.0, 0.0]


def test_far_and_missing_coordinates():
    image = jnp.ones((3, 3, 1))
    places = jnp.array([[[1e30, 1.0], [-jnp.inf, 1.0], [1.0, jnp.nan], [1.0, 1.0]]])

    def value(x, padding):
        return grid_sample(image, x, padding=padding)[0, :, 0]

    np.testing.assert_array_equal(value(places, "zeros"), [0, 0, jnp.nan, 1])
    np.testing.assert_array_equal(value(places, "edge"), [1, 1, jnp.nan, 1])
    np.testing.assert_array_equal(jnp.isnan(value(places, "wrap")), [False, True, True, False])
    for padding in ("zeros", "edge"):
        gradient = jax.grad(lambda x: value(x, padding)[:2].sum())(places)  # noqa: B023
        np.testing.assert_array_equal(gradient[0, :2], 0)


def test_leading_axes_broadcast(rng):
    image = jnp.asarray(rng.normal(size=(2, 1, 4, 4, 2)), jnp.float32)
    places = jnp.asarray(rng.uniform(-1, 5, size=(3, 5, 2, 2)), jnp.float32)
    found = grid_sample(image, places)
    assert found.shape == (2, 3, 5, 2, 2)
    np.testing.assert_allclose(found[1, 2], grid_sample(image[1, 0], places[2]), atol=1e-6)
    shared = grid_sample(image, places[:1])
    assert shared.shape == (2, 1, 5, 2, 2)
    np.testing.assert_allclose(shared[:, 0], found[:, 0], atol=1e-6)


def test_coordinates_stay_precise_under_bfloat16(rng):
    image = jnp.asarray(rng.normal(size=(1, 300, 1)), jnp.bfloat16)
    columns = jnp.arange(256.0, 299.0)
    places = jnp.stack([jnp.zeros_like(columns), columns], axis=-1)[None]
    np.testing.assert_array_equal(grid_sample(image, places), image[:, 256:299])
    # Negative control: coordinates rounded to bfloat16 fall on other pixels.
    assert np.any(np.asarray(grid_sample(image, places.astype(jnp.bfloat16)) != image[:, 256:299]))
    assert affine_coordinates(jnp.eye(2, 3, dtype=jnp.bfloat16), (300, 1)).dtype == jnp.float32


def test_centred_coordinates_between_images_of_different_size():
    np.testing.assert_array_equal(centred_grid((2, 3))[0], [[-0.5, -1], [-0.5, 0], [-0.5, 1]])
    found = affine_coordinates(jnp.eye(2, 3), (2, 2), source=(4, 6))
    np.testing.assert_array_equal(found[0], [[1, 2], [1, 3]])


def test_clear_errors(untyped):
    image, places = jnp.ones((2, 4, 4, 1)), jnp.ones((2, 3, 3, 2))
    with pytest.raises(ValueError, match=r"padding='reflect' is unknown; use one of \('zeros', 'edge', 'wrap'\)"):
        grid_sample(image, places, padding="reflect")
    with pytest.raises(ValueError, match=r"image of shape \(4, 4\) must be \[\*batch, height, width, channels\]"):
        grid_sample(image[0, ..., 0], places)
    with pytest.raises(ValueError, match=r"coordinates of shape \(2, 3, 3, 1\) must be"):
        grid_sample(image, places[..., :1])
    with pytest.raises(ValueError, match=r"leading axes \(2,\) of the image and \(3,\) of the coordinates"):
        grid_sample(image, jnp.ones((3, 2, 2, 2)))
    with pytest.raises(ValueError, match=r"matrix of shape \(3, 3\) must be \[\*batch, 2, 3\]"):
        affine_coordinates(jnp.eye(3), (2, 2))
    with pytest.raises(ValueError, match=r"shape=\(0, 2\) must be two positive lengths"):
        centred_grid((0, 2))
    with pytest.raises(ValueError, match=r"matrix of shape \(2, 3\) must be \[\*batch, 3, 3\]"):
        project(jnp.eye(2, 3), places)
    with pytest.raises(ValueError, match=r"points of shape \(2, 3\) must be"):
        project(jnp.eye(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"epsilon=0.0 must be positive"):
        project(jnp.eye(3), places, epsilon=0.0)


def test_projected_points_equal_a_loop(rng):
    matrix, points = np.eye(3) + 0.5 * rng.normal(size=(4, 3, 3)), rng.normal(size=(3, 2, 2))
    with jax.enable_x64(True):
        found, seen = project(jnp.asarray(matrix), jnp.asarray(points))
        multiple, _ = project(jnp.asarray(-2.5 * matrix), jnp.asarray(points))
    np.testing.assert_allclose(multiple, found, atol=1e-10)
    assert 0 < np.mean(seen) < 1
    for index in np.ndindex(4, 3, 2):
        row, column, w = matrix[index[0]] @ [*points[index[1:]], 1.0]
        before = w / matrix[index[0], 2, 2] >= 1e-3
        assert bool(seen[index]) == before
        np.testing.assert_allclose(found[index], np.array([row, column]) / w if before else 0, atol=1e-10)
