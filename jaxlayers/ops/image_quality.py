"""How alike two pictures are: PSNR, SSIM and MS-SSIM, on all channels or on the luma that super-resolution reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxlayers.core.dtypes import at_least_float32

# Of the SSIM paper: an 11 x 11 Gaussian of 1.5 pixels, and the two constants against division by nearly nothing.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
# Of the MS-SSIM paper, from the finest scale to the coarsest.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# ITU-R BT.601: luma from 16 to 235 of 255.
_LUMA = (65.481, 128.553, 24.966)


def luma(image: Num[Array, "*batch height width channels"]) -> Float[Array, "*batch height width 1"]:
    """Return the luma of RGB pictures, which super-resolution papers measure on.

    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / range, in steps of the range / 255: BT.601 with its head- and footroom,
    so that black is 16 / 255 and white 235 / 255 of the range, as MATLAB's `rgb2ycbcr` has it.

    Args:
      image: red, green and blue; floating-point in [0, 1], or integers in [0, 255].

    Returns:
      One channel, in [16 / 255, 235 / 255], in float32 or better.

    Raises:
      ValueError: if there are not three channels.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.ops.image_quality import luma
      >>> (255 * luma(jnp.array([[[0.0, 0, 0], [1, 1, 1]]]))).round().ravel().tolist()
      [16.0, 235.0]
    """
    if image.ndim < 3 or image.shape[-1] != 3:
        raise ValueError(f"image of shape {image.shape} must be [*batch, height, width, 3]; pass RGB pictures")
    scale = 1.0 if jnp.issubdtype(image.dtype, jnp.floating) else 255.0
    image = _floating(image) / scale
    # By sum: a matrix product may round its factors on an accelerator.
    return (16.0 + jnp.sum(image * jnp.asarray(_LUMA, image.dtype), axis=-1, keepdims=True)) / 255.0


def psnr(
    x: Num[Array, "*batch height width channels"],
    y: Num[Array, "*batch_y height_y width_y channels_y"],
    *,
    data_range: float | int = 1.0,
    border: int = 0,
) -> Float[Array, "*batch"]:
    """Return the peak signal-to-noise ratio, 10 log10(range^2 / mean (x - y)^2), in decibels.

    Args:
      x: pictures.
      y: pictures of the same shape.
      data_range: difference of the greatest and the least value that a pixel may take; 255 for integers of 8 bits.
      border: pixels to leave out along each edge; papers on super-resolution leave out as many as the scale.

    Returns:
      One figure for each picture, over all its pixels and channels; infinite where they are equal.

    Raises:
      ValueError: if the shapes differ or are not pictures, or an option does not fit them.
    """
    x, y = _pair(x, y, data_range, border, least=1)
    return 10 * jnp.log10(data_range**2 / jnp.mean(jnp.square(x - y), axis=(-3, -2, -1)))


def ssim(
    x: Num[Array, "*batch height width channels"],
    y: Num[Array, "*batch_y height_y width_y channels_y"],
    *,
    data_range: float | int = 1.0,
    border: int = 0,
) -> Float[Array, "*batch"]:
    r"""Return the structural similarity, 1 for equal pictures.

    The mean over places and channels of

        (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_xx + s_yy + c_2)),

    with m and s the means and covariances under an 11 x 11 Gaussian window of 1.5 pixels that lies wholly inside, and
    c_i = (K_i range)^2, K = 0.01, 0.03. Computed as (1 - m_d^2 / ...) (1 - s_dd / ...) with d = x - y, and s by the law
    of total variance, so that in float32 neither nearly equal nor bright, flat pictures lose digits.

    Args:
      x: pictures.
      y: pictures of the same shape.
      data_range: difference of the greatest and the least value that a pixel may take; 255 for integers of 8 bits.
      border: pixels to leave out along each edge before anything else.

    Returns:
      One figure for each picture, in [-1, 1].

    Raises:
      ValueError: if the shapes differ or are smaller than the window, or an option does not fit them.

    Source:
      Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE TIP 2004, equation 13
      and section III-C. The same figures as scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
      use_sample_covariance=False)`.

    Differs:
      No shrinking of large pictures before the comparison, which the authors advise; neither do the papers on
      restoration.
    """
    x, y = _pair(x, y, data_range, border, least=_WINDOW)
    return 1 - jnp.mean(_dissimilarity(x, y, data_range)[0], axis=(-3, -2, -1))


def ms_ssim(
    x: Num[Array, "*batch height width channels"],
    y: Num[Array, "*batch_y height_y width_y channels_y"],
    *,
    data_range: float | int = 1.0,
    border: int = 0,
) -> Float[Array, "*batch"]:
    """Return the structural similarity over five scales, each half as fine as the one before.

    The product over the scales of the mean contrast-structure term (of the coarsest: of all of `ssim`) to the powers
    0.0448, 0.2856, 0.3001, 0.2363, 0.1333; of each channel, then their mean. A negative mean counts as 0, whose power
    has no gradient.

    Args:
      x: pictures, at least 161 pixels along each edge.
      y: pictures of the same shape.
      data_range: difference of the greatest and the least value that a pixel may take; 255 for integers of 8 bits.
      border: pixels to leave out along each edge before anything else.

    Returns:
      One figure for each picture, in [0, 1].

    Raises:
      ValueError: if the shapes differ or are too small for five scales, or an option does not fit them.

    Source:
      Wang et al., Multi-scale Structural Similarity for Image Quality Assessment, Asilomar 2003, equation 7 and
      section 3.2.

    Differs:
      Scales are means of 2 x 2 pixels, an odd last row or column repeated, as in the authors' later program.
    """
    x, y = _pair(x, y, data_range, border, least=2 ** (len(_SCALES) - 1) * (_WINDOW - 1) + 1)
    out = jnp.ones((), x.dtype)
    for scale, power in enumerate(_SCALES):
        if scale:
            x, y = _halve(x), _halve(y)
        whole, contrast = _dissimilarity(x, y, data_range)
        mean = 1 - jnp.mean(whole if scale == len(_SCALES) - 1 else contrast, axis=(-3, -2))
        positive = mean > 0
        out = out * jnp.where(positive, jnp.where(positive, mean, 1.0) ** power, 0.0)
    return jnp.mean(out, axis=-1)


def _floating(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32))


def _pair(x: Array, y: Array, data_range: float | int, border: int, *, least: int) -> tuple[Array, Array]:
    """Check two pictures, cut their borders off and make them floating-point, wide enough to subtract."""
    if x.ndim < 3 or x.shape != y.shape:
        raise ValueError(
            f"x of shape {x.shape} and y of shape {y.shape} must be alike, [*batch, height, width, channels]; crop or "
            "broadcast one of them"
        )
    if not data_range > 0:
        raise ValueError(f"data_range={data_range} must be positive; set the greatest less the least value of a pixel")
    if data_range == 1 and not all(jnp.issubdtype(each.dtype, jnp.floating) for each in (x, y)):
        raise ValueError(f"data_range={data_range} does not fit pixels of {x.dtype} and {y.dtype}; set it, such as 255")
    if border < 0 or min(x.shape[-3:-1]) - 2 * border < least:
        raise ValueError(
            f"pictures of {x.shape[-3]} x {x.shape[-2]} pixels with border={border} must leave at least {least} along "
            "each edge; pass larger pictures or set border"
        )
    inside = (..., slice(border, x.shape[-3] - border), slice(border, x.shape[-2] - border), slice(None))
    x, y = _floating(x[inside]), _floating(y[inside])
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return x.astype(dtype), y.astype(dtype)


def _moments(x: Array) -> tuple[Array, Array]:
    """Return mean and variance under the Gaussian window at each place where it lies inside.

    One axis after the other, the variance as the mean of the variances plus the variance of the means: sums of squares
    only, where E[x^2] - E[x]^2 in float32 leaves noise on bright flat pictures.
    """
    taps = np.exp(-0.5 * (np.arange(_WINDOW) - _WINDOW // 2) ** 2 / _SIGMA**2)
    taps = jnp.asarray(taps / taps.sum(), x.dtype)
    mean, variance = x, jnp.zeros_like(x)
    for axis in (-3, -2):
        places = np.arange(x.shape[axis] - _WINDOW + 1) + np.arange(_WINDOW)[:, None]
        weights = taps[:, None, None] if axis == -2 else taps[:, None, None, None]
        means, variances = (jnp.take(each, places, axis=axis) for each in (mean, variance))
        # Sums, not products of matrices, which may round their factors on an accelerator. The middle row is taken off
        # and added again, so that a constant comes out as itself.
        middle = jax.lax.index_in_dim(means, _WINDOW // 2, axis=axis - 1)
        mean = middle + jnp.sum(weights * (means - middle), axis=axis - 1, keepdims=True)
        variance = jnp.sum(weights * (variances + jnp.square(means - mean)), axis=axis - 1)
        mean = jnp.squeeze(mean, axis - 1)
    return mean, variance


@functools.partial(jax.jit, static_argnums=2)
def _dissimilarity(x: Array, y: Array, data_range: float | int) -> tuple[Array, Array]:
    """Return 1 - similarity at each place and channel, and 1 - its factor of contrast and structure.

    From 1, since float32 holds a small difference much better than what is left of 1.
    """
    (mean_x, mean_y, mean_d), (variance_x, variance_y, variance_d) = _moments(jnp.stack([x, y, x - y]))
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    lightness = jnp.square(mean_d) / (jnp.square(mean_x) + jnp.square(mean_y) + c1)
    contrast = variance_d / (variance_x + variance_y + c2)
    return lightness + contrast - lightness * contrast, contrast


def _halve(x: Array) -> Array:
    pad = [(0, 0)] * (x.ndim - 3) + [(0, x.shape[-3] % 2), (0, x.shape[-2] % 2), (0, 0)]
    x = jnp.pad(x, pad, mode="edge")
    *batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(*batch, height // 2, 2, width // 2, 2, channels), axis=(-4, -2))
