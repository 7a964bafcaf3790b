import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import skimage.data
import skimage.metrics
import skimage.transform
from jax.test_util import check_grads

from jaxlayers.ops.image_quality import luma, ms_ssim, psnr, ssim

MEASURES = (psnr, ssim, ms_ssim)
NAMES = tuple(measure.__name__ for measure in MEASURES)
JITTED = tuple(jax.jit(measure, static_argnames=("data_range", "border")) for measure in MEASURES)


def reference_ssim(x, y, data_range):
    return skimage.metrics.structural_similarity(
        x,
        y,
        data_range=data_range,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


def brute_force_ms_ssim(x, y, data_range):
    """Equation 7 of Wang et al. 2003, in float64, with SciPy's filters."""

    def blurred(each):
        return scipy.ndimage.gaussian_filter(each, 1.5, truncate=3.5)[5:-5, 5:-5]

    def halved(each):
        each = np.pad(each, [(0, length % 2) for length in each.shape], mode="edge")
        return (each[::2, ::2] + each[1::2, ::2] + each[::2, 1::2] + each[1::2, 1::2]) / 4

    out = []
    for a, b in zip(np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0), strict=True):
        product = 1.0
        for scale, power in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            if scale:
                a, b = halved(a), halved(b)
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            ma, mb = blurred(a), blurred(b)
            saa, sbb, sab = blurred(a * a) - ma * ma, blurred(b * b) - mb * mb, blurred(a * b) - ma * mb
            structure = (2 * sab + c2) / (saa + sbb + c2)
            lightness = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
            product *= max(0, np.mean(structure * lightness if scale == 4 else structure)) ** power
        out.append(product)
    return np.mean(out)


@pytest.fixture(scope="module")
def pictures():
    """A photograph, and the same noisy, blurred and another one; float64 in [0, 1], sizes odd and not square."""
    random = np.random.default_rng(0)
    photograph = skimage.data.astronaut()[20:203, 150:361] / 255
    noisy = np.clip(photograph + random.normal(size=photograph.shape) * 0.1, 0, 1)
    blurred = scipy.ndimage.gaussian_filter(photograph, (2, 2, 0))
    other = skimage.data.chelsea()[:183, :211] / 255
    return photograph, {"noisy": noisy, "blurred": blurred, "other": other}


@pytest.mark.parametrize("distortion", ["noisy", "blurred", "other"])
def test_equal_scikit_image_and_the_equations(pictures, distortion):
    x, y = pictures[0], pictures[1][distortion]
    expected = (
        skimage.metrics.peak_signal_noise_ratio(x, y, data_range=1.0),
        reference_ssim(x, y, 1.0),
        brute_force_ms_ssim(x, y, 1.0),
    )
    for measure, value, name in zip(JITTED, expected, NAMES, strict=True):
        found = measure(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
        np.testing.assert_allclose(found, value, rtol=2e-6, err_msg=name)
        with jax.enable_x64(True):
            found = measure(jnp.asarray(x), jnp.asarray(y))
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, value, rtol=1e-12, err_msg=name)


def test_figures_do_not_depend_on_the_unit(pictures):
    x, y = (jnp.asarray(each[:40, :40], jnp.float32) for each in (pictures[0], pictures[1]["noisy"]))
    for measure in JITTED[:2]:
        found = measure(255 * x, 255 * y, data_range=255.0)
        np.testing.assert_allclose(found, measure(x, y), rtol=1e-6)
        assert abs(found - measure(255 * x, 255 * y)) > 1e-3


def test_the_window_and_the_constants_matter(pictures):
    """What a slip would change is far above the tolerance of the test above."""
    x, y = pictures[0], pictures[1]["noisy"]
    found = float(JITTED[1](jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)))
    uniform = skimage.metrics.structural_similarity(x, y, data_range=1.0, channel_axis=-1, win_size=11)
    assert abs(found - uniform) > 1e-3
    assert abs(found - reference_ssim(x, y, 2.0)) > 1e-3


def test_equal_pictures_score_best(pictures):
    x = jnp.asarray(pictures[0], jnp.float32)
    assert [float(measure(x, x)) for measure in JITTED] == [np.inf, 1, 1]


@pytest.mark.parametrize("level", [0.0, 0.99])
def test_float32_keeps_the_digits_of_nearly_equal_flat_pictures(rng, level):
    """Noise of 1e-4 on an even wall: 1 - SSIM is small, and its digits are right, which E[x^2] - E[x]^2 loses."""
    x = (level + 1e-4 * rng.normal(size=(24, 24, 1))).astype(np.float32)
    y = (x + 1e-4 * rng.normal(size=x.shape)).astype(np.float32)
    expected = 1 - reference_ssim(x.astype(np.float64), y.astype(np.float64), 1.0)
    found = 1 - np.float64(ssim(jnp.asarray(x), jnp.asarray(y)))
    assert abs(found - expected) < 1e-7  # 1 is held in steps of 6e-8
    naive = 1 - reference_ssim(x, y, 1.0) if level else expected + 1  # scikit-image computes in the input's float32
    assert abs(naive - expected) > 3e-7


def test_luma_equals_scikit_image(pictures):
    image = pictures[0]
    expected = skimage.color.rgb2ycbcr(image)[..., :1]
    np.testing.assert_allclose(255 * luma(jnp.asarray(image, jnp.float32)), expected, rtol=1e-6)
    whole = np.round(255 * image).astype(np.uint8)
    found = luma(jnp.asarray(whole))
    np.testing.assert_allclose(255 * found, skimage.color.rgb2ycbcr(whole)[..., :1], rtol=1e-6)
    ends = 255 * luma(jnp.array([[[0, 0, 0], [255, 255, 255]]], jnp.uint8))
    np.testing.assert_allclose(ends.ravel(), [16, 235], rtol=1e-6)


def test_borders_are_left_out(pictures):
    x, y = (jnp.asarray(each[:170, :170], jnp.float32) for each in (pictures[0], pictures[1]["noisy"]))
    spoilt = y.at[:3].set(0).at[-3:].set(0).at[:, :3].set(0).at[:, -3:].set(0)
    for measure in JITTED:
        kept = measure(x[3:-3, 3:-3], y[3:-3, 3:-3])
        np.testing.assert_allclose(measure(x, spoilt, border=3), kept, rtol=1e-6)
        assert measure(x, spoilt, border=2) < kept


def test_leading_axes_are_pictures(pictures):
    x = jnp.asarray(pictures[0][:161, :161, :1], jnp.float32)
    y = jnp.asarray(pictures[1]["noisy"][:161, :161, :1], jnp.float32)
    first = jnp.stack([jnp.stack([x, y, x])])
    second = jnp.stack([jnp.stack([y, y, 1 - x])])
    for measure in JITTED:
        expected = [[measure(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]
        np.testing.assert_allclose(measure(first, second), expected, rtol=1e-6)


def test_integers_do_not_wrap_around(pictures):
    x, y = (np.round(255 * each).astype(np.uint8) for each in (pictures[0], pictures[1]["noisy"]))
    found = psnr(jnp.asarray(x), jnp.asarray(y), data_range=255.0)
    np.testing.assert_allclose(found, skimage.metrics.peak_signal_noise_ratio(x, y), rtol=1e-6)
    with pytest.raises(ValueError, match=r"data_range=1.0 does not fit pixels of uint8 and uint8; set it"):
        psnr(jnp.asarray(x), jnp.asarray(y))


def test_half_precision_is_computed_in_float32(pictures):
    x, y = (jnp.asarray(each[:40, :40], jnp.bfloat16) for each in (pictures[0], pictures[1]["noisy"]))
    for measure in JITTED[:2]:
        found = measure(x, y)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, measure(x.astype(jnp.float32), y.astype(jnp.float32)))


def test_gradients(rng):
    x, y = (jnp.asarray(rng.uniform(size=(13, 12, 2)), jnp.float32) for _ in range(2))
    for measure in (psnr, ssim):
        check_grads(
            lambda x, y, measure=measure: measure(jnp.asarray(x), jnp.asarray(y)),
            (x, y),
            1,
            ["rev"],
            atol=1e-2,
            rtol=1e-2,
        )
    assert not np.any(jax.grad(ssim)(x, x))  # the top, without a cusp
    x, y = (jnp.asarray(rng.uniform(size=(161, 161, 1)), jnp.float32) for _ in range(2))
    value_and_grad = jax.jit(jax.value_and_grad(ms_ssim))
    for second in (y, 1 - x):
        value, gradient = value_and_grad(x, second)
        assert np.all(np.isfinite(gradient))
    assert value == 0  # contrasts opposed: the mean is negative


def test_bad_input_is_refused():
    x = jnp.zeros((20, 20, 3))
    for measure in MEASURES:
        with pytest.raises(ValueError, match=r"x of shape \(20, 20, 3\) and y of shape \(20, 19, 3\) must be alike"):
            measure(x, x[:, 1:])
        with pytest.raises(ValueError, match=r"x of shape \(20, 20, 3\) and y of shape \(1, 20, 20, 3\) must be alike"):
            measure(x, x[None])
        with pytest.raises(ValueError, match="data_range=0.0 must be positive"):
            measure(x, x, data_range=0.0)
        with pytest.raises(ValueError, match="border=-1 must leave"):
            measure(x, x, border=-1)
    with pytest.raises(ValueError, match="20 x 20 pixels with border=10 must leave at least 1 along"):
        psnr(x, x, border=10)
    with pytest.raises(ValueError, match="20 x 20 pixels with border=5 must leave at least 11 along"):
        ssim(x, x, border=5)
    with pytest.raises(ValueError, match="20 x 20 pixels with border=0 must leave at least 161 along"):
        ms_ssim(x, x)
    with pytest.raises(ValueError, match=r"image of shape \(20, 20, 1\) must be"):
        luma(x[..., :1])
