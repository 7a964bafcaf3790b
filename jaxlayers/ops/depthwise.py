"""Depthwise convolution whose gradient is right on every device mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core.dtypes import at_least_float32

MOST_SHIFTS = 128
"""Numbers of a kernel up to which a CPU adds up shifted maps: the program grows with them."""


def depthwise_conv(
    x: Float[Array, "*batch height width features"],
    kernel: Float[Array, "rows columns 1 features"],
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> Float[Array, "*batch new_height new_width features"]:
    """Convolve each feature with its own kernel.

    out[i, j, c] = sum_{a, b} x[s i + a - p, s j + b - q, c] kernel[a, b, 0, c], with stride s.

    "SAME": p = rows // 2, q = columns // 2, and zeros outside the map; the result has its size. "VALID": p = q = 0, and
    the result has the places where the kernel fits into the map.

    The derivative by the kernel is a sum over shifted maps instead of the grouped convolution that JAX would take. For
    that one the partitioner adds up the shares of all devices, also of those that hold copies of the same part of the
    batch: on a mesh with axes that do not split the batch its result is too large by the product of their lengths
    (seen with JAX 0.10.2 and 0.12.0). The price is memory for `columns` times the map while it is made.

    On a CPU all of it is sums of shifted maps, which its compiler fuses and which take a tenth of the time of its
    grouped convolution or less, with kernels of up to `MOST_SHIFTS` numbers (`docs/benchmarks/window.md` has models).

    Args:
      x: a map, channels last.
      kernel: kernels, of odd sizes with "SAME".
      stride: steps between the places of the kernel, both ways; 1 with "SAME".
      padding: "SAME" or "VALID".

    Returns:
      A map.

    Raises:
      ValueError: if a size of the kernel is even with "SAME", it is not for the features of `x`, or stride and padding
        do not go together.
    """
    if padding not in ("SAME", "VALID") or stride < 1 or (padding == "SAME" and stride > 1):
        raise ValueError(
            f"stride={stride} and padding={padding!r} must be 1 and 'SAME', or any and 'VALID'; set stride or padding"
        )
    even = padding == "SAME" and any(size % 2 == 0 for size in kernel.shape[:2])
    if kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]) or even:
        sizes = "odd, odd" if padding == "SAME" else "rows, columns"
        raise ValueError(f"kernel of shape {kernel.shape} must be [{sizes}, 1, {x.shape[-1]}]; set its sizes")
    out = _depthwise_conv(x.reshape(-1, *x.shape[-3:]), kernel, stride, padding)
    return out.reshape(*x.shape[:-3], *out.shape[1:])


def as_general_conv(
    x: Float[Array, "batch height width features"],
    kernel: Float[Array, "rows columns 1 features"],
    strides: Sequence[int],
    padding: Any,
    *,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: Any,
    feature_group_count: int,
    precision: Any,
) -> Float[Array, "batch new_height new_width features"]:
    """Stand in for `jax.lax.conv_general_dilated` in `nn.Conv(conv_general_dilated=...)`.

    Args:
      x: a map, channels last.
      kernel: see `depthwise_conv`.
      strides: alike both ways, and 1 with "SAME".
      padding: "SAME" or "VALID".
      lhs_dilation: must be 1.
      rhs_dilation: must be 1.
      dimension_numbers: as `nn.Conv` gives them.
      feature_group_count: the number of features.
      precision: must be None.

    Returns:
      A map.

    Raises:
      ValueError: if the convolution is another than `depthwise_conv`.
    """
    del dimension_numbers  # always channels last in Flax
    one_stride, no_dilation = len(set(strides)) == 1, {*lhs_dilation, *rhs_dilation} == {1}
    if not (one_stride and no_dilation) or feature_group_count != x.shape[-1] or precision is not None:
        raise ValueError(
            f"strides={strides}, dilations={lhs_dilation} and {rhs_dilation}, groups={feature_group_count} and "
            f"precision={precision} must be alike, 1, {x.shape[-1]} and None; use the plain convolution for another"
        )
    return depthwise_conv(x, kernel, stride=strides[0], padding=padding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _depthwise_conv(x: Any, kernel: Any, stride: int, padding: str) -> Array:
    return _by_platform(_gather, x, kernel, stride, padding)


@_depthwise_conv.defjvp
def _depthwise_conv_jvp(
    stride: int, padding: str, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    x, kernel = primals
    dx, dkernel = tangents
    # What the transpose makes of the map is made again there, not kept from the forward pass.
    by_kernel = jax.checkpoint(
        lambda x, dkernel: jax.lax.platform_dependent(
            x,
            dkernel,
            cpu=functools.partial(_by_kernel_in_turn, stride=stride, padding=padding),
            default=functools.partial(_by_kernel_at_once, stride=stride, padding=padding),
        ),
        prevent_cse=False,
    )
    by_x = _by_platform(_scatter, dx, kernel, stride, padding)
    # The transposes add up all pixels of the batch, which half precision would not survive.
    wide = dkernel.astype(at_least_float32(x.dtype))
    return _by_platform(_gather, x, kernel, stride, padding), by_x + by_kernel(x, wide)


def _by_platform(shifts: Callable[..., Array], x: Any, kernel: Any, stride: int, padding: str) -> Array:
    """Convolve as a CPU does best, a fused sum of shifted maps, and elsewhere by what the platform has."""
    if kernel.shape[0] * kernel.shape[1] > MOST_SHIFTS:
        return _convolve(x, kernel, stride, padding)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(shifts, stride=stride, padding=padding),
        default=functools.partial(_convolve, stride=stride, padding=padding),
    )


def _convolve(x: Array, kernel: Array, stride: int, padding: str) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        feature_group_count=x.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _gather(x: Array, kernel: Array, stride: int, padding: str) -> Array:
    """Return the sum of shifted maps, each by a number of the kernel."""
    padded, (height, width) = _padded(x, kernel, padding)
    wide = at_least_float32(x.dtype)
    out: Any = 0
    for row, column in np.ndindex(kernel.shape[:2]):
        rows, columns = slice(row, row + height, stride), slice(column, column + width, stride)
        out = out + padded[:, rows, columns].astype(wide) * kernel[row, column, 0].astype(wide)
    return out.astype(x.dtype)


def _scatter(x: Array, kernel: Array, stride: int, padding: str) -> Array:
    """Return what `_gather` does, in a form whose transpose by `x` is one fused sum of shifted maps.

    Every pixel is handed to the places whose sum it enters; so the transpose collects, as `_gather` does.
    """
    rows, columns = kernel.shape[:2]
    wide = at_least_float32(x.dtype)
    padded, (height, width) = _padded(x, kernel, padding)
    padded = padded.astype(wide)
    out: Any = 0
    for row, column in np.ndindex(rows, columns):
        product = padded * kernel[row, column, 0].astype(wide)
        out = out + jnp.pad(product, ((0, 0), (rows - 1 - row, row), (columns - 1 - column, column), (0, 0)))
    kept = out[:, rows - 1 : rows - 1 + height : stride, columns - 1 : columns - 1 + width : stride]
    return kept.astype(x.dtype)


def _by_kernel_in_turn(x: Array, kernel: Array, *, stride: int, padding: str) -> Array:
    """Convolve a row of the result at a time, so that the transpose by the kernel adds up row after row.

    Its sums have the size of a row for each number of the kernel, [batch, rows, new width, features] `columns` times,
    and stay in a CPU's cache; a reduction over whole maps for each number is tens of times slower there.
    """
    padded, (height, width) = _padded(x, kernel, padding)
    rows, columns = kernel.shape[:2]
    count = len(range(0, width, stride))
    spread = [jnp.broadcast_to(kernel[:, column], (x.shape[0], rows, count, x.shape[-1])) for column in range(columns)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def line(spread: list[Array], padded: Array, start: Array) -> Array:
        seen = jax.lax.dynamic_slice_in_dim(padded, start, rows, 1).astype(kernel.dtype)
        parts = (seen[:, :, column : column + width : stride] * spread[column] for column in range(columns))
        return jnp.sum(functools.reduce(jnp.add, parts), axis=1)

    starts = jnp.arange(0, height, stride)
    _, out = jax.lax.scan(lambda carry, start: (carry, line(spread, padded, start)), None, starts)
    return jnp.moveaxis(out, 0, 1).astype(x.dtype)


def _by_kernel_at_once(x: Array, kernel: Array, *, stride: int, padding: str) -> Array:
    """Convolve by maps shifted along the columns, summed a row of the kernel at a time, which compiles fast."""
    padded, (height, width) = _padded(x, kernel, padding)
    # [columns, batch, padded height, new width, features]
    shifted = jnp.stack([padded[:, :, column : column + width : stride] for column in range(kernel.shape[1])])
    sums = (
        jnp.sum(shifted[:, :, row : row + height : stride].astype(kernel.dtype) * kernel[row, :, None, None], axis=0)
        for row in range(kernel.shape[0])
    )
    return functools.reduce(jnp.add, sums).astype(x.dtype)


def _padded(x: Array, kernel: Array, padding: str) -> tuple[Array, tuple[int, int]]:
    """Return the map with the zeros that the kernel sees, and how far it can move along both sides."""
    rows, columns = kernel.shape[:2]
    margin = (rows // 2, columns // 2) if padding == "SAME" else (0, 0)
    padded = jnp.pad(x, ((0, 0), (margin[0],) * 2, (margin[1],) * 2, (0, 0)))
    return padded, (padded.shape[1] - rows + 1, padded.shape[2] - columns + 1)
