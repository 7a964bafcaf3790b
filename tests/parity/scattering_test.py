"""Morlet scattering against kymatio."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.scattering import FilterBank, morlet_bank, morlet_scattering

# Its top module imports the three-dimensional part, which new releases of SciPy do not serve.
frontend = pytest.importorskip("kymatio.scattering2d.frontend.numpy_frontend")


@pytest.mark.parametrize(("scales", "orientations"), [(3, 8), (2, 5)])
def test_filters_equal_those_of_kymatio(scales, orientations):
    filters = frontend.ScatteringNumPy2D(scales, (32, 32), orientations)
    found = morlet_bank(filters.phi["levels"][0].shape, scales=scales, orientations=orientations)
    # It divides by 3.1415 where pi is meant, and computes in single precision.
    expected = np.stack([one["levels"][0] for one in filters.psi]) * 3.1415 / np.pi
    np.testing.assert_allclose(found.band, expected, atol=1e-6)
    np.testing.assert_allclose(found.low_pass, filters.phi["levels"][0] * 3.1415 / np.pi, atol=1e-6)


@pytest.mark.parametrize(("scales", "orientations", "shape"), [(3, 8, (32, 40)), (2, 5, (28, 28))])
def test_coefficients_of_equal_filters_equal_those_of_kymatio(rng, scales, orientations, shape):
    reference = frontend.ScatteringNumPy2D(scales, shape, orientations)
    image = rng.normal(size=shape).astype(np.float32)

    def bank(size):
        return FilterBank(np.stack([one["levels"][0] for one in reference.psi]), reference.phi["levels"][0])

    found = morlet_scattering(
        jnp.asarray(image)[..., None], scales=scales, orientations=orientations, padding="reflect", bank=bank
    )
    expected = np.moveaxis(reference.scattering(image), 0, -1)
    np.testing.assert_allclose(found[..., 0, :], expected, atol=1e-5)
    own = morlet_scattering(jnp.asarray(image)[..., None], scales=scales, orientations=orientations, padding="reflect")
    np.testing.assert_allclose(own[..., 0, :], expected, atol=1e-4)
