"""Windows of a map, cut and joined by the kernel that the scope chooses (`kernels.dispatch`)."""

import math
from collections.abc import Sequence

from jaxtyping import Array, Float, Shaped

from jaxlayers.kernels import dispatch
from jaxlayers.nn.drop_path import DropPath
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
    if not _takes_kernel(x, window, split):
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


def cut_and_keep(
    x: Shaped[Array, "*axes features"], window: Sequence[int], amount: Sequence[int], split: halo.Split
) -> tuple[Shaped[Array, "*windows tokens features"], Shaped[Array, "*axes features"]]:
    """Return `cut_windows` of a map, and the map: a residual sum that goes on with it adds gradients while joining."""
    if not (_is_whole(x, window) and _takes_kernel(x, window, split)):
        return cut_windows(x, window, amount, split), x
    from jaxlayers.kernels import pallas_cut

    return pallas_cut.cut_and_keep(x, _pair(window), _pair(amount))


def add_windows(
    x: Float[Array, "*axes features"],
    windows: Float[Array, "*windows tokens features"],
    window: Sequence[int],
    amount: Sequence[int],
    split: halo.Split,
    drop_path: DropPath,
    drop_path_rate: Float[Array, ""] | None = None,
    *,
    deterministic: bool = True,
) -> Float[Array, "*axes features"]:
    """Return x + drop(join(windows)), in one pass over the map where the scope chooses the kernel.

    Args:
      x: map `[*batch, *size, features]`.
      windows: as `cut_windows` returns them for such a map.
      window: as of `cut_windows`.
      amount: as of `cut_windows`.
      split: as of `cut_windows`.
      drop_path: of the branch.
      drop_path_rate: replaces its field; may be traced.
      deterministic: no dropped branches.

    Returns:
      A map like `x`.
    """
    batch, size, _ = split_shape(x.shape, len(window))
    served = _is_whole(x, window) and x.dtype == windows.dtype and drop_path.batch_ndim == len(batch)
    if not (served and _takes_kernel(x, window, split)):
        y = join_windows(windows, size, window, amount, split)
        return x + drop_path(y, drop_path_rate, deterministic=deterministic)
    from jaxlayers.kernels import pallas_cut

    factor = drop_path.factor(batch, drop_path_rate, deterministic=deterministic)
    return pallas_cut.join(windows, _pair(size), _pair(window), _pair(amount), onto=x, factor=factor)


def _takes_kernel(x: Array, window: Sequence[int], split: halo.Split) -> bool:
    _, size, features = split_shape(x.shape, len(window))
    return not any(split) and dispatch.cut_kernel(_padded(size, window), window, features, x.dtype) == "pallas"


def _is_whole(x: Array, window: Sequence[int]) -> bool:
    _, size, _ = split_shape(x.shape, len(window))
    return _padded(size, window) == size


def _padded(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.ceil(length / step) * step for length, step in zip(size, window, strict=True))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
