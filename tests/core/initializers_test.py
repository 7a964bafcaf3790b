import jax
import numpy as np

from jaxlayers.core.initializers import truncated_normal


def test_truncated_normal_is_cut_at_two_deviations_and_not_rescaled():
    sample = np.asarray(truncated_normal(0.5)(jax.random.key(0), (100_000,)))
    assert np.abs(sample).max() <= 1.0
    # The standard deviation of a unit normal cut at two is 0.8796.
    np.testing.assert_allclose(sample.std(), 0.5 * 0.8796, rtol=0.01)
