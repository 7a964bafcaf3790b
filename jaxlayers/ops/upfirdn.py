"""Small filters over pictures whose size changes by a factor: zeros in, filter, every n-th entry out."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.ops.patches import split_shape


def upfirdn(
    x: Float[Array, "*batch height width features"],
    taps: Sequence[float],
    *,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Float[Array, "*batch new_height new_width features"]:
    """Insert zeros, filter and thin out, alike along both axes and for each feature alone.

    Along an axis, with u the entries of x followed by `up - 1` zeros each and with `padding` around them,
    out[n] = sum_k taps[k] u[n down + len(taps) - 1 - k]: a convolution, so taps are read from the last.

    It is made of slices and sums, so that it has gradients of any order and the partitioner can split any axis; a
    grouped convolution of as many groups as features is slow on most machines.

    Args:
      x: map, channels last.
      taps: the filter along each axis; that of the plane is their product.
      up: zeros are inserted to make the map this many times as large.
      down: every how many-th entry is kept.
      padding: zeros before and after; negative numbers cut off.

    Returns:
      A map of size `(size up + sum(padding) - len(taps)) // down + 1`.

    Raises:
      ValueError: if `x` has fewer than three axes, a factor is not positive, or the filter does not fit into the map.
    """
    batch, size, _ = split_shape(x.shape, 2)
    if up < 1 or down < 1 or not taps:
        raise ValueError(f"up={up}, down={down} and len(taps)={len(taps)} must be at least 1; set them")
    if min(size) * up + sum(padding) < len(taps):
        raise ValueError(
            f"a map of size {size} with up={up} and padding={padding} must be at least as long as the {len(taps)} taps"
        )
    zero = jnp.zeros((), x.dtype)
    for axis in (len(batch), len(batch) + 1):
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (padding[0], padding[1] + up - 1, up - 1)
        padded = jax.lax.pad(x, zero, edges)
        length = (padded.shape[axis] - len(taps)) // down + 1
        terms = [
            float(tap) * jax.lax.slice_in_dim(padded, start, start + (length - 1) * down + 1, down, axis)
            for start, tap in enumerate(reversed(taps))
        ]
        x = functools.reduce(jnp.add, terms)
    return x


BINOMIAL = (0.125, 0.375, 0.375, 0.125)
"""The low-pass filter (1, 3, 3, 1) / 8, of gain one."""


def upsample(x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch new_height new_width features"]:
    """Double a map by the binomial filter, with zeros beyond its border."""
    return upfirdn(x, [2 * tap for tap in BINOMIAL], up=2, padding=(2, 1))


def downsample(x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch new_height new_width features"]:
    """Halve a map by the binomial filter, with zeros beyond its border."""
    return upfirdn(x, BINOMIAL, down=2, padding=(1, 1))


def upsample_bilinear(
    x: Float[Array, "*batch height width features"],
) -> Float[Array, "*batch new_height new_width features"]:
    """Double a map by linear interpolation between the centres of its pixels, the border being continued.

    It is `upsample` but for what lies beyond the border.
    """
    batch, _, _ = split_shape(x.shape, 2)
    continued = jnp.pad(x, [*[(0, 0)] * len(batch), (1, 1), (1, 1), (0, 0)], mode="edge")
    return upfirdn(continued, [2 * tap for tap in BINOMIAL], up=2, padding=(0, -1))
