import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.upfirdn import BINOMIAL, downsample, upfirdn, upsample, upsample_bilinear


def noise(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def twin(x, taps, up, down, padding):
    """The definition, one entry at a time, along one axis."""
    before, after = padding
    u = np.zeros(len(x) * up + before + after)
    for index, value in enumerate(x):
        place = before + index * up
        if 0 <= place < len(u):
            u[place] = value
    starts = range(0, len(u) - len(taps) + 1, down)
    return np.array([sum(tap * u[n + len(taps) - 1 - k] for k, tap in enumerate(taps)) for n in starts])


@pytest.mark.parametrize(
    ("up", "down", "padding"), [(1, 1, (0, 0)), (2, 1, (2, 1)), (1, 2, (1, 1)), (3, 2, (-1, 3)), (2, 3, (0, -2))]
)
def test_it_is_the_sum_of_its_definition(up, down, padding):
    x, taps = noise(7, 9, 2), [0.5, -1.0, 2.0, 3.0]
    found = upfirdn(x, taps, up=up, down=down, padding=padding)
    along = np.apply_along_axis(twin, 0, np.asarray(x), taps, up, down, padding)
    expected = np.apply_along_axis(twin, 1, along, taps, up, down, padding)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # Negative control: the taps are read from the last.
    assert np.abs(upfirdn(x, taps[::-1], up=up, down=down, padding=padding) - expected).max() > 0.1


def test_doubling_is_linear_interpolation_with_the_border_continued():
    x = noise(2, 5, 6, 3)
    np.testing.assert_allclose(upsample_bilinear(x), jax.image.resize(x, (2, 10, 12, 3), "bilinear"), atol=1e-5)
    # Zeros beyond the border give the same inside, and less at the border.
    found = np.abs(upsample(x) - upsample_bilinear(x)).max((0, 3))
    np.testing.assert_allclose(found[1:-1, 1:-1], 0, atol=1e-6)
    assert found[0].min() > 0
    assert np.all(upsample_bilinear(jnp.ones((4, 4, 1))) == 1)


def test_halving_is_the_transpose_of_doubling_but_for_its_gain():
    x, y = noise(8, 6, 3), noise(4, 3, 3)
    np.testing.assert_allclose(4 * jnp.sum(downsample(x) * y), jnp.sum(x * upsample(y)), rtol=1e-4)
    assert sum(BINOMIAL) == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"up=0, down=1 and len\(taps\)=2 must be at least 1"):
        upfirdn(jnp.ones((4, 4, 1)), [1.0, 1.0], up=0)
    with pytest.raises(ValueError, match=r"padding=\(0, 0\) must be at least as long as the 5 taps"):
        upfirdn(jnp.ones((4, 4, 1)), [1.0] * 5)
