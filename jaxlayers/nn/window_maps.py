"""Windows of a map, cut and joined by the kernel that the scope chooses (`kernels.dispatch`)."""

import math
from collections.abc import Sequence

from jaxtyping import Array, Shaped

from jaxlayers.kernels import dispatch
from jaxlayers.ops import halo
from jaxlayers.ops.patches import crop, pad_to_multiple, split_shape


def cut_windows(
    x: Shaped[Array, "*axes features"], window: Sequence[int], amount: Sequence[int], split: halo.Split
) -> Shaped[Array, "*windows tokens features"]:
    """Pad a map with zeros at its ends to multiples of the window, shift it, and cut it into windows.

    Args:
      x: map `[*batch, *size, features]`.
      window: size of a window along each spatial axis.
      amount: the shift along each axis, less than the window.
      split: see `ops.halo.map_split`.

    Returns:
      As `ops.halo.cut_windows`.
    """
    _, size, features = split_shape(x.shape, len(window))
    if any(split) or dispatch.cut_kernel(_padded(size, window), window, features, x.dtype) == "jnp":
        return halo.cut_windows(x, window, amount, split)
    # It takes over a second to import.
    from jaxlayers.kernels import pallas_cut

    return pallas_cut.cut(pad_to_multiple(x, window), _pair(window), _pair(amount))


def join_windows(
    windows: Shaped[Array, "*windows tokens features"],
    size: Sequence[int],
    window: Sequence[int],
    amount: Sequence[int],
    split: halo.Split,
) -> Shaped[Array, "*axes features"]:
    """Return the inverse of `cut_windows` for a map of spatial size `size`; what was padded is left out."""
    padded = _padded(size, window)
    if any(split) or dispatch.cut_kernel(padded, window, windows.shape[-1], windows.dtype) == "jnp":
        return halo.join_windows(windows, size, window, amount, split)
    from jaxlayers.kernels import pallas_cut

    return crop(pallas_cut.join(windows, _pair(padded), _pair(window), _pair(amount)), size)


def _padded(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.ceil(length / step) * step for length, step in zip(size, window, strict=True))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
