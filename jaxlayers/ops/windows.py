"""Windows over one to three spatial axes: cutting, cyclic shifts, which tokens may meet, relative positions.

Everything that depends on shapes alone (indices, regions, masks) is NumPy, so under `jit` it is a constant made while
tracing and is never stored with the parameters.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxlayers.core.initializers import truncated_normal
from jaxlayers.core.types import Initializer
from jaxlayers.ops.patches import from_blocks, split_shape, to_blocks


def partition_windows(
    x: Shaped[Array, "*axes features"], window: Sequence[int]
) -> Shaped[Array, "*batch windows tokens features"]:
    """Cut `[*batch, *size, features]` into windows `[*batch, windows, tokens, features]`, both in row-major order.

    Raises:
      ValueError: if a spatial axis does not divide by the window.
    """
    blocks = to_blocks(x, window)
    batch, grid = blocks.shape[: x.ndim - 1 - len(window)], blocks.shape[x.ndim - 1 - len(window) : x.ndim - 1]
    return blocks.reshape(*batch, math.prod(grid), math.prod(window), x.shape[-1])


def merge_windows(
    windows: Shaped[Array, "*batch windows tokens features"], window: Sequence[int], size: Sequence[int]
) -> Shaped[Array, "*axes features"]:
    """Return the inverse of `partition_windows` for an array of spatial size `size`."""
    grid = [length // step for length, step in zip(size, window, strict=True)]
    return from_blocks(windows.reshape(*windows.shape[:-3], *grid, *window, windows.shape[-1]), len(window))


def shift(x: Shaped[Array, "*axes features"], amount: Sequence[int]) -> Shaped[Array, "*axes features"]:
    """Roll the spatial axes of `x` towards their beginnings, so that entry `amount` comes first."""
    return _roll(x, [-step for step in amount])


def unshift(x: Shaped[Array, "*axes features"], amount: Sequence[int]) -> Shaped[Array, "*axes features"]:
    """Return the inverse of `shift`."""
    return _roll(x, amount)


def _roll(x: Array, amount: Sequence[int]) -> Array:
    if not any(amount):
        return x
    return jnp.roll(x, tuple(amount), tuple(range(x.ndim - 1 - len(amount), x.ndim - 1)))


def fit_window(
    size: Sequence[int], window: Sequence[int], amount: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return window and shift for a map of spatial size `size`.

    Along an axis that is not longer than the window, the window is clipped to the map and nothing is shifted: one
    window already sees the whole axis.

    Raises:
      ValueError: if a window is not positive or a shift is not within its window.
    """
    if any(step < 1 for step in window):
        raise ValueError(f"window_size={tuple(window)} must be positive along each axis; set window_size to at least 1")
    if any(not 0 <= step < length for step, length in zip(amount, window, strict=True)):
        raise ValueError(
            f"shift_size={tuple(amount)} must lie in [0, window_size={tuple(window)}); set shift_size lower"
        )
    fitted = tuple(min(step, length) for step, length in zip(window, size, strict=True))
    kept = tuple(0 if length <= step else by for length, step, by in zip(size, window, amount, strict=True))
    return fitted, kept


def window_regions(
    size: Sequence[int], window: Sequence[int], amount: Sequence[int], *, separate_padding: bool = False
) -> np.ndarray:
    """Label the tokens of each shifted window so that those which may attend to each other have equal labels.

    The map is padded at its ends to multiples of the window and then shifted. A window at the end of an axis then
    also holds the entries that were rolled around from the beginning; they are strangers to the others.

    Args:
      size: spatial size of the map before padding.
      window: size of a window along each axis.
      amount: the shift along each axis.
      separate_padding: give padded tokens a label of their own.

    Returns:
      Integer labels `[windows, tokens]`; labels are comparable within one window only.
    """
    rows = []
    for length, step, by in zip(size, window, amount, strict=True):
        whole = -(-length // step) * step
        rows.append(((np.arange(whole) + by) % whole).reshape(-1, step))
    return regions_of_rows(rows, size, amount, separate_padding=separate_padding).reshape(-1, math.prod(window))


def regions_of_rows(
    rows: Sequence[np.ndarray], size: Sequence[int], amount: Sequence[int], *, separate_padding: bool = False
) -> np.ndarray:
    """Label tokens as `window_regions` does, for windows that are given by the entries in them.

    Args:
      rows: for each axis the entries of the padded map, `[windows, window]`, in each window along it.
      size: spatial size of the map before padding.
      amount: the shift along each axis.
      separate_padding: give padded tokens a label of their own.

    Returns:
      Integer labels `[*windows, tokens]`, with one axis of windows for each spatial axis.
    """
    rank = len(rows)
    label, padding = np.zeros((), np.int32), np.zeros((), bool)
    for axis, (origin, length, by) in enumerate(zip(rows, size, amount, strict=True)):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = origin.shape
        label = label + (2**axis * (origin < by)).astype(np.int32).reshape(shape)
        padding = padding | (origin >= length).reshape(shape)
    if separate_padding:
        label = np.where(padding, -1, label).astype(np.int32)
    return label.reshape(*label.shape[:rank], -1)


def shift_mask(
    size: Sequence[int], window: Sequence[int], amount: Sequence[int], *, mask_padding: bool = False
) -> np.ndarray | None:
    """Return which tokens of each shifted window may attend to which, or `None` if all may.

    Args:
      size: spatial size of the map before padding.
      window: size of a window along each axis.
      amount: the shift along each axis.
      mask_padding: let no true token attend to padding. (Padding then attends to padding, so that no row is empty.)

    Returns:
      Booleans `[windows, queries, keys]`, true where a query may attend to a key.
    """
    regions = window_regions(size, window, amount, separate_padding=mask_padding)
    mask = regions[:, :, None] == regions[:, None, :]
    return None if mask.all() else mask


def relative_position_index(window: Sequence[int], table_window: Sequence[int] | None = None) -> np.ndarray:
    """Return the row of a relative-position table for each pair of tokens of a window.

    The table has one row for each offset `query - key` from `-(window - 1)` to `window - 1` along each axis, in
    row-major order.

    Args:
      window: size of the window along each axis.
      table_window: the window that the table was made for, at least as large; `None` means `window`.

    Returns:
      Integers `[tokens, tokens]`, queries first.

    Raises:
      ValueError: if the window is larger than the table's.
    """
    table_window = tuple(window if table_window is None else table_window)
    if len(table_window) != len(window) or any(a > b for a, b in zip(window, table_window, strict=True)):
        raise ValueError(f"window {tuple(window)} must not exceed the table's window_size={table_window}; use resize")
    positions = np.array(list(itertools.product(*map(range, window))), np.int32).reshape(-1, len(window))
    offsets = positions[:, None] - positions[None] + np.array(table_window, np.int32) - 1
    lengths = [2 * length - 1 for length in table_window]
    return np.ravel_multi_index(tuple(np.moveaxis(offsets, -1, 0)), lengths).astype(np.int32)


def relative_position_bias(
    table: Float[Array, "offsets heads"], window: Sequence[int], table_window: Sequence[int] | None = None
) -> Float[Array, "heads tokens tokens"]:
    """Return the attention bias `[heads, queries, keys]` that a table of relative positions gives for a window.

    Args:
      table: one row for each offset, see `relative_position_index`.
      window: size of the window along each axis.
      table_window: the window that the table was made for; `None` means `window`. A smaller window takes the middle
        of the table.

    Raises:
      ValueError: if the window is larger than the table's, or the table does not have that window's rows.
    """
    rows = math.prod(2 * length - 1 for length in (window if table_window is None else table_window))
    if table.shape[0] != rows:
        raise ValueError(f"a table of shape {table.shape} must have {rows} rows for its window; use resize")
    return jnp.moveaxis(jnp.take(table, relative_position_index(window, table_window), axis=0), -1, 0)


def local_position_table(reach: float | int, stddev: float = 0.02) -> Initializer:
    """Return an initialiser of tables of relative positions by which every head begins as a Gaussian blur.

    The row of an offset (dy, dx) is -(dy^2 + dx^2) / (2 reach^2) and a truncated normal for each head. While queries
    and keys are small, a token sees its own neighbourhood instead of the mean of its window, whose borders would show.

    Args:
      reach: standard deviation of the blur, in tokens.
      stddev: of the truncated normal.

    Raises:
      ValueError: if the reach is not positive, or when called for rows that are not those of a square window.
    """
    if reach <= 0:
        raise ValueError(f"reach={reach} must be positive; set reach")
    normal = truncated_normal(stddev)

    def table(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        length = math.isqrt(shape[0])
        if length**2 != shape[0] or length % 2 == 0:
            raise ValueError(f"a table of {shape[0]} rows must be that of a square window; pass another initialiser")
        squares = np.square(np.arange(length) - length // 2)
        mean = -(squares[:, None] + squares).reshape(-1, 1) / (2 * reach**2)
        return (normal(key, shape, jnp.float32) + mean).astype(dtype)

    return table


def partition_grid(
    x: Shaped[Array, "*axes features"], grid: Sequence[int]
) -> Shaped[Array, "*batch groups tokens features"]:
    """Deal the entries of a map `[*batch, *size, features]` out to groups that are spread over all of it.

    Each axis is cut into `grid` equal cells; a group holds the entries at one place of every cell, that is, those that
    are congruent modulo `size / grid` (a dilated window). Groups are in the order of the places in a cell, tokens in
    that of the cells, both row-major.

    Args:
      x: array whose last axes are the `len(grid)` spatial ones and the features.
      grid: number of cells along each axis.

    Returns:
      `[*batch, prod(size / grid), prod(grid), features]`.

    Raises:
      ValueError: if `x` has too few axes or a spatial axis does not divide by the grid.
    """
    batch, size, features = split_shape(x.shape, len(grid))
    if any(cells < 1 or length % cells for length, cells in zip(size, grid, strict=True)):
        raise ValueError(f"spatial size {size} must be divisible by the grid {tuple(grid)}; pad the input first")
    cell = [length // cells for length, cells in zip(size, grid, strict=True)]
    groups = _exchange(to_blocks(x, cell), len(batch), len(grid))
    return groups.reshape(*batch, math.prod(cell), math.prod(grid), features)


def merge_grid(
    groups: Shaped[Array, "*batch groups tokens features"], grid: Sequence[int], size: Sequence[int]
) -> Shaped[Array, "*axes features"]:
    """Return the inverse of `partition_grid` for an array of spatial size `size`."""
    cell = [length // cells for length, cells in zip(size, grid, strict=True)]
    *batch, _, _, features = groups.shape
    return from_blocks(_exchange(groups.reshape(*batch, *cell, *grid, features), len(batch), len(grid)), len(grid))


def _exchange(x: Array, first: int, rank: int) -> Array:
    """Put the `rank` axes from `first` on behind the `rank` axes that follow them."""
    return jnp.moveaxis(x, range(first, first + rank), range(first + rank, first + 2 * rank))


def grid_mask(size: Sequence[int], grid: Sequence[int]) -> np.ndarray | None:
    """Return which tokens of each group of a padded map may attend to which, or `None` if all may.

    Args:
      size: spatial size of the map before padding at its ends to a multiple of the grid.
      grid: number of cells along each axis.

    Returns:
      Booleans `[groups, queries, keys]`. No true token may attend to padding; padding attends to padding, so that no
      row is empty.
    """
    padded = [-(-length // cells) * cells for length, cells in zip(size, grid, strict=True)]
    real = np.zeros(padded, bool)
    real[tuple(map(slice, size))] = True
    rank = len(padded)
    cut = real.reshape(
        [part for whole, cells in zip(padded, grid, strict=True) for part in (cells, whole // cells)]
    ).transpose([*range(1, 2 * rank, 2), *range(0, 2 * rank, 2)])
    label = cut.reshape(-1, math.prod(grid))
    mask = label[:, :, None] == label[:, None, :]
    return None if mask.all() else mask
