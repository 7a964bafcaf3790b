"""Depthwise convolution whose gradient is right on every device mesh."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core.dtypes import at_least_float32


def depthwise_conv(
    x: Float[Array, "*batch height width features"], kernel: Float[Array, "rows columns 1 features"]
) -> Float[Array, "*batch height width features"]:
    """Convolve each feature with its own kernel, with zeros outside the map.

    out[i, j, c] = sum_{a, b} x[i + a - rows // 2, j + b - columns // 2, c] kernel[a, b, 0, c].

    The derivative by the kernel is a sum over shifted maps instead of the grouped convolution that JAX would take. For
    that one the partitioner adds up the shares of all devices, also of those that hold copies of the same part of the
    batch: on a mesh with axes that do not split the batch its result is too large by the product of their lengths
    (seen with JAX 0.10.2 and 0.12.0). The price is memory for `columns` times the map in the backward pass.

    Args:
      x: a map, channels last.
      kernel: kernels of odd sizes.

    Returns:
      A map like `x`.

    Raises:
      ValueError: if a size of the kernel is even, or it is not for the features of `x`.
    """
    if kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]) or not kernel.shape[0] % 2 or not kernel.shape[1] % 2:
        raise ValueError(f"kernel of shape {kernel.shape} must be [odd, odd, 1, {x.shape[-1]}]; set odd sizes")
    return _depthwise_conv(x.reshape(-1, *x.shape[-3:]), kernel).reshape(x.shape)


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
) -> Float[Array, "batch height width features"]:
    """Stand in for `jax.lax.conv_general_dilated` in `nn.Conv(conv_general_dilated=...)`.

    Args:
      x: a map, channels last.
      kernel: see `depthwise_conv`.
      strides: must be 1.
      padding: must be "SAME".
      lhs_dilation: must be 1.
      rhs_dilation: must be 1.
      dimension_numbers: as `nn.Conv` gives them.
      feature_group_count: the number of features.
      precision: must be None.

    Returns:
      A map like `x`.

    Raises:
      ValueError: if the convolution is another than `depthwise_conv`.
    """
    del dimension_numbers  # always channels last in Flax
    steps = {*strides, *lhs_dilation, *rhs_dilation}
    if steps != {1} or padding != "SAME" or feature_group_count != x.shape[-1] or precision is not None:
        raise ValueError(
            f"strides={strides}, dilations={lhs_dilation} and {rhs_dilation}, padding={padding!r}, "
            f"feature_group_count={feature_group_count} and precision={precision} must be 1, 1, 'SAME', "
            f"{x.shape[-1]} and None; use the plain convolution for another one"
        )
    return depthwise_conv(x, kernel)


@jax.custom_jvp
def _depthwise_conv(x: Any, kernel: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", feature_group_count=x.shape[-1], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@_depthwise_conv.defjvp
def _depthwise_conv_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    x, kernel = primals
    dx, dkernel = tangents
    rows, columns = kernel.shape[:2]
    _, height, width, _ = x.shape
    ends = ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    padded = jnp.pad(x, ends)
    # [columns, batch, padded height, width, features]: one sum a row of the kernel, which compiles fast.
    shifted = jnp.stack([padded[:, :, column : column + width] for column in range(columns)])
    # The transpose of this adds up all pixels of the batch, which half precision would not survive.
    wide = at_least_float32(x.dtype)
    dkernel = dkernel.astype(wide)
    by_kernel = sum(
        jnp.sum(shifted[:, :, row : row + height].astype(wide) * dkernel[row, :, None, None], axis=0)
        for row in range(rows)
    )
    return _depthwise_conv(x, kernel), _depthwise_conv(dx, kernel) + jnp.asarray(by_kernel, x.dtype)
