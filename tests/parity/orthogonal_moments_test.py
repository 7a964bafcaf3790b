"""Zernike moments against mahotas."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.orthogonal_moments import orthogonal_moments

features = pytest.importorskip("mahotas.features")


@pytest.mark.parametrize("size", [24, 31])
def test_zernike_magnitudes_equal_those_of_mahotas(rng, size):
    image = rng.uniform(size=(size, size))
    centre = (size - 1) / 2
    expected = features.zernike_moments(image, size / 2, degree=10, cm=(centre, centre))
    # It takes the basis at the centres of the pixels, and the image as a density over the disc.
    rows, columns = np.mgrid[:size, :size] - centre
    total = np.sum(image[np.hypot(rows, columns) <= size / 2])
    found = orthogonal_moments(jnp.asarray(image, jnp.float32)[..., None], 10, quadrature=1)[0]
    found = np.abs(found) * (size / 2) ** 2 / total
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.max(expected))
