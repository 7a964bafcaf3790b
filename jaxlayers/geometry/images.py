"""Moving the content of images about their centre, for NumPy and JAX arrays alike."""

from typing import Any

import jax
import numpy as np

from jaxlayers.core.dtypes import widen


def resample_image(x: Any, matrix: np.ndarray, translation: np.ndarray) -> Any:
    """Move the content of an image by p -> matrix p + translation about its centre, with cubic interpolation.

    The kernel is Keys' piecewise cubic with a = -1/2, exact for whole-pixel moves and for quadratic pictures. What
    comes from outside the image is zero, so compare results inside `disk_mask` only, or on pictures that vanish
    outside it.

    Args:
      x: image `[*batch, height, width, channels]`, NumPy or JAX.
      matrix: invertible `[2, 2]` on coordinates (height, width).
      translation: `[2]`, in pixels.

    Returns:
      Image of the same shape and kind, float (see `Group.act`).

    Raises:
      ValueError: if `x` has fewer than three axes.
    """
    if np.ndim(x) < 3:
        raise ValueError(f"an image needs axes [*batch, height, width, channels]; got shape {np.shape(x)}; add axes")
    wide, dtype = widen(x if isinstance(x, jax.Array) else np.asarray(x))
    shape = np.array(wide.shape[-3:-1])
    centre = (shape - 1) / 2.0
    target = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1) - centre
    source = (target - translation) @ np.linalg.inv(matrix).T + centre
    corner = np.floor(source)
    total = 0.0
    for row in range(-1, 3):
        for column in range(-1, 3):
            place = corner + np.array([row, column])
            weight = np.prod(_cubic(source - place), axis=-1) * np.all((place >= 0) & (place < shape), axis=-1)
            index = np.clip(place, 0, shape - 1).astype(np.int64)
            total = total + weight[..., None].astype(wide.dtype) * wide[..., index[..., 0], index[..., 1], :]
    return total.astype(dtype)  # type: ignore[attr-defined]


def disk_mask(height: int, width: int, *, margin: float = 0.0) -> np.ndarray:
    """Return the disk inscribed in an image, as float64 `[height, width, 1]` of ones and zeros.

    Rotations about the centre keep the disk, which goes through the centres of the outermost pixels. Multiplying
    images by it leaves out the corners, which a rotation moves out of the frame.

    Args:
      height: rows.
      width: columns.
      margin: by how many pixels to shorten the radius.

    Returns:
      The mask.

    Raises:
      ValueError: if nothing is left inside.

    Example:
      >>> disk_mask(3, 3)[..., 0].tolist()
      [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    """
    radius = (min(height, width) - 1) / 2.0 - margin
    rows = np.arange(height)[:, None] - (height - 1) / 2.0
    columns = np.arange(width)[None, :] - (width - 1) / 2.0
    inside = np.hypot(rows, columns) <= radius + 1e-9
    if not inside.any():
        raise ValueError(f"margin={margin} leaves no pixel of a {height} x {width} image; set a smaller margin")
    return inside.astype(np.float64)[..., None]


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' interpolation kernel with a = -1/2."""
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))
