"""Depthwise convolution whose gradient is right on every device mesh."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core.dtypes import at_least_float32


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
    (seen with JAX 0.10.2 and 0.12.0). The price is memory for `columns` times the map in the backward pass.

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
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        feature_group_count=x.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@_depthwise_conv.defjvp
def _depthwise_conv_jvp(
    stride: int, padding: str, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    x, kernel = primals
    dx, dkernel = tangents
    rows, columns = kernel.shape[:2]
    margin = (rows // 2, columns // 2) if padding == "SAME" else (0, 0)
    padded = jnp.pad(x, ((0, 0), (margin[0],) * 2, (margin[1],) * 2, (0, 0)))
    height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    # [columns, batch, padded height, new width, features]: one sum a row of the kernel, which compiles fast.
    shifted = jnp.stack([padded[:, :, column : column + width : stride] for column in range(columns)])
    # The transpose of this adds up all pixels of the batch, which half precision would not survive.
    wide = at_least_float32(x.dtype)
    dkernel = dkernel.astype(wide)
    by_kernel = sum(
        jnp.sum(shifted[:, :, row : row + height : stride].astype(wide) * dkernel[row, :, None, None], axis=0)
        for row in range(rows)
    )
    out = _depthwise_conv(x, kernel, stride, padding)
    return out, _depthwise_conv(dx, kernel, stride, padding) + jnp.asarray(by_kernel, x.dtype)
