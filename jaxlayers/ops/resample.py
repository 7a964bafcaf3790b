"""Bicubic resampling of parameter tables and patch kernels, as one small matrix per axis."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def cubic_matrix(source: int, target: int, *, antialias: bool = False) -> np.ndarray:
    r"""Return the matrix `[target, source]` that resamples an axis with Keys' cubic convolution.

    Pixel centres are aligned (not corners) and the source is continued by its border values. Without `antialias`
    the kernel's parameter is a = -0.75 and it spans source pixels; with it a = -0.5, when the axis shrinks the
    kernel is widened by `source / target`, and taps outside the source are dropped and the rest renormalised.
    These are the two conventions of PyTorch's `interpolate(mode="bicubic")`.

    Raises:
      ValueError: if a length is not positive.
    """
    if source < 1 or target < 1:
        raise ValueError(f"source={source} and target={target} must be positive; pass lengths of at least 1")
    if source == target:
        return np.eye(source)
    scale = source / target
    matrix = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * scale - 0.5
        if antialias:
            width = max(scale, 1.0)
            weights = _cubic((np.arange(source) - centre) / width, -0.5)
            matrix[row] = weights / weights.sum()
        else:
            taps = int(np.floor(centre)) + np.arange(-1, 3)
            np.add.at(matrix[row], np.clip(taps, 0, source - 1), _cubic(taps - centre, -0.75))
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resample(
    x: Float[Array, "*axes features"], size: Sequence[int], *, antialias: bool = False
) -> Float[Array, "*new_axes features"]:
    """Resample the last `len(size)` spatial axes of `x` bicubically to `size`, see `cubic_matrix`."""
    return _apply_along_axes(x, size, lambda source, target: cubic_matrix(source, target, antialias=antialias))


def resample_relative_table(
    table: Float[Array, "*batch offsets heads"], window: Sequence[int], new_window: Sequence[int]
) -> Float[Array, "*batch new_offsets heads"]:
    """Resample a relative-position table from one window to another.

    Args:
      table: one row for each offset of a window, in row-major order (`jaxlayers.ops.windows`).
      window: the window that the table is for.
      new_window: the window wanted.

    Returns:
      The table for the new window.

    Raises:
      ValueError: if the table does not have the rows of `window`.
    """
    old, new = ([2 * length - 1 for length in lengths] for lengths in (window, new_window))
    if table.shape[-2] != np.prod(old):
        raise ValueError(
            f"a table for window={tuple(window)} must have {np.prod(old)} rows, not shape {table.shape}; set window"
        )
    grid = table.reshape(*table.shape[:-2], *old, table.shape[-1])
    return resample(grid, new).reshape(*table.shape[:-2], -1, table.shape[-1])


def resample_patch_kernel(
    kernel: Float[Array, "*patch in_features out_features"], new_patch: Sequence[int]
) -> Float[Array, "*new_patch in_features out_features"]:
    r"""Resample a patch-embedding kernel so that resized patches keep their embedding.

    With B the matrix that resizes a patch (bicubic, antialiased), the new kernel is `pinv(Bᵀ) w`: where the patch
    grows, `⟨B x, w'⟩ = ⟨x, w⟩` holds for every patch x; where it shrinks, w' is the least-squares solution.

    Source:
      Beyer et al., FlexiViT: One Model for All Patch Sizes, CVPR 2023, section 3.4.
    """
    merged = kernel.reshape(*kernel.shape[:-2], -1)
    resized = _apply_along_axes(
        merged, new_patch, lambda source, target: np.linalg.pinv(cubic_matrix(source, target, antialias=True).T)
    )
    return resized.reshape(*new_patch, *kernel.shape[-2:])


def _apply_along_axes(x: Array, size: Sequence[int], make_matrix: Callable[[int, int], np.ndarray]) -> Array:
    if x.ndim < len(size) + 1:
        raise ValueError(f"size={tuple(size)} needs an array of at least {len(size) + 1} axes; got shape {x.shape}")
    for offset, target in enumerate(size):
        axis = x.ndim - 1 - len(size) + offset
        if x.shape[axis] != target:
            matrix = jnp.asarray(make_matrix(x.shape[axis], target), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis)
    return x
