import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.wavelets import haar, haar_pyramid, inverse_haar, inverse_haar_pyramid


def noise(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_the_inverse_gives_the_picture_back(dtype, tolerance, levels):
    with jax.enable_x64(True):
        x = noise(2, 3, 16, 8, 5, dtype=dtype)
        pyramid = haar_pyramid(x, levels)
        found = inverse_haar_pyramid(pyramid)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, x, rtol=0, atol=tolerance * 4)
        # And the other way round: any bands are those of some picture.
        other = [noise(*part.shape, dtype=dtype) for part in pyramid]
        for a, b in zip(haar_pyramid(inverse_haar_pyramid(other), levels), other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * 4)
        assert pyramid[0].shape[-3:] == (16 >> levels, 8 >> levels, 5)
        # Negative control: bands in another order give another picture.
        if levels:
            low, detail, *finer = pyramid
            swapped = inverse_haar_pyramid([low, jnp.roll(detail, 5, axis=-1), *finer])
            assert np.abs(swapped - x).max() > 0.1


def test_lengths_and_angles_are_kept():
    with jax.enable_x64(True):
        x, y = noise(2, 8, 8, 3, dtype=np.float64)
        np.testing.assert_allclose(jnp.sum(haar(x) * haar(y)), jnp.sum(x * y), rtol=1e-13)
        parts = haar_pyramid(x, 2), haar_pyramid(y, 2)
        np.testing.assert_allclose(sum(jnp.sum(a * b) for a, b in zip(*parts, strict=True)), jnp.sum(x * y), rtol=1e-13)


def test_bands_are_sums_and_differences_of_neighbours():
    a, b, c, d = 1.0, 2.0, 4.0, 8.0
    x = jnp.asarray([[a, b], [c, d]])[..., None]
    expected = [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]
    np.testing.assert_allclose(haar(x)[0, 0], expected)
    # All features of a band stand together.
    two = jnp.concatenate([x, 10 * x], axis=-1)
    np.testing.assert_allclose(haar(two)[0, 0], np.stack([expected, 10 * np.array(expected)], axis=-1).ravel())
    flat = haar_pyramid(jnp.ones((8, 8, 1)), 3)
    np.testing.assert_allclose(flat[0], 8.0)
    assert all(np.all(detail == 0) for detail in flat[1:])


def test_what_cannot_be_transformed_is_refused():
    with pytest.raises(ValueError, match=r"spatial size \(4, 3\) must be even"):
        haar(jnp.ones((4, 3, 1)))
    with pytest.raises(ValueError, match="features=6 must be divisible by 4"):
        inverse_haar(jnp.ones((2, 2, 6)))
    with pytest.raises(ValueError, match=r"levels=3 must not be negative, and 2\*\*levels must divide"):
        haar_pyramid(jnp.ones((8, 4, 1)), 3)
    with pytest.raises(ValueError, match="levels=-1 must not be negative"):
        haar_pyramid(jnp.ones((8, 4, 1)), -1)
    with pytest.raises(ValueError, match=r"pyramid=\(\) must begin with averages"):
        inverse_haar_pyramid([])
    with pytest.raises(ValueError, match=r"details of shape \(2, 2, 2\) must be \(2, 2, 3\)"):
        inverse_haar_pyramid([jnp.ones((2, 2, 1)), jnp.ones((2, 2, 2))])
