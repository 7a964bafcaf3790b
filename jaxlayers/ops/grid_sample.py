"""Reading an image between its pixels, differentiable in the image and in the places where it is read."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.types import Dtype

Padding = Literal["zeros", "edge", "wrap"]


def grid_sample(
    image: Float[Array, "*#batch height width channels"],
    coordinates: Float[Array, "*#batch rows columns 2"],
    *,
    padding: Padding = "zeros",
) -> Float[Array, "*batch rows columns channels"]:
    """Return the image at the given coordinates, by bilinear interpolation.

    out = sum_p image[p] max(0, 1 - |r - p_r|) max(0, 1 - |c - p_c|) at each coordinate (r, c), over the pixels p of the
    image as `padding` continues it. Whole-pixel coordinates return the pixels themselves, to the bit.

    Coordinates and weights are computed in float32 or better, whatever the dtype of the image. The derivative by a
    coordinate jumps where the coordinate is a whole number; there it is the one towards larger coordinates, as in
    PyTorch. An image of 2^23 pixels along an axis is the largest that float32 coordinates can tell apart.

    Args:
      image: what is read; any leading axes.
      coordinates: (row, column) in pixels, 0 = the centre of the first pixel. Leading axes broadcast with the image's:
        coordinates without any read every image at the same places.
      padding: what lies outside: `"zeros"`, the nearest border pixel (`"edge"`), or the image again (`"wrap"`). With
        zeros the picture fades out over one pixel; beyond that value and derivative are zero.

    Returns:
      The values read, in the dtype of the image. A NaN coordinate gives NaN in its place; an infinite one gives what
      lies outside, and NaN with `"wrap"`.

    Raises:
      ValueError: on an unknown padding, wrong ranks, an empty image, or leading axes that do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.ops.grid_sample import grid_sample
      >>> image = jnp.array([[0.0, 1.0], [2.0, 3.0]])[..., None]
      >>> grid_sample(image, jnp.array([[[0.5, 0.5], [1.0, 1.5]]]), padding="edge")[..., 0].tolist()
      [[1.5, 3.0]]
    """
    if padding not in get_args(Padding):
        raise ValueError(f"padding={padding!r} is unknown; use one of {get_args(Padding)}")
    if image.ndim < 3 or 0 in image.shape[-3:-1]:
        raise ValueError(f"image of shape {image.shape} must be [*batch, height, width, channels] with pixels")
    if coordinates.ndim < 3 or coordinates.shape[-1] != 2:
        raise ValueError(
            f"coordinates of shape {coordinates.shape} must be [*batch, rows, columns, 2]; put (row, column) last"
        )
    batch, places = image.shape[:-3], coordinates.shape[:-3]
    try:
        common = jnp.broadcast_shapes(batch, places)
    except ValueError as error:
        raise ValueError(
            f"leading axes {batch} of the image and {places} of the coordinates must broadcast; add axes of size 1"
        ) from error
    dtype = at_least_float32(jnp.promote_types(image.dtype, coordinates.dtype))
    coordinates = coordinates.astype(dtype)
    if all(size == 1 for size in places):
        read = _read(image, coordinates.reshape(coordinates.shape[-3:]), padding)
        return jnp.broadcast_to(read, common + read.shape[-3:])
    flat = (
        jnp.broadcast_to(image, common + image.shape[-3:]).reshape(-1, *image.shape[-3:]),
        jnp.broadcast_to(coordinates, common + coordinates.shape[-3:]).reshape(-1, *coordinates.shape[-3:]),
    )
    read = jax.vmap(lambda image, coordinates: _read(image, coordinates, padding))(*flat)
    return read.reshape(*common, *read.shape[-3:])


def _read(image: jax.Array, coordinates: jax.Array, padding: Padding) -> jax.Array:
    """Read images `[*batch, height, width, channels]` at shared coordinates `[rows, columns, 2]`."""
    axes = [
        _corners(coordinates[..., axis], size, padding) for axis, size in enumerate((image.shape[-3], image.shape[-2]))
    ]
    total: jax.Array | float = 0.0
    for row, row_weight in axes[0]:
        for column, column_weight in axes[1]:
            pixels = image[..., row, column, :].astype(coordinates.dtype)
            total = total + (row_weight * column_weight)[..., None] * pixels
    return jnp.asarray(total, image.dtype)


def _corners(x: jax.Array, size: int, padding: Padding) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Return the two pixels about each coordinate along one axis of that size, as (index, weight)."""
    # Only then does the conversion to whole numbers hold; comparisons with NaN are false, so that NaN goes through.
    if padding == "wrap":
        x = jnp.mod(x, size)
    elif padding == "edge":
        x = jnp.where(x < 0, 0.0, jnp.where(x > size - 1, size - 1.0, x))
    else:
        x = jnp.where(x <= -1, -1.0, jnp.where(x >= size, float(size), x))
    lower = jax.lax.stop_gradient(jnp.floor(x))
    fraction = x - lower
    index = jnp.nan_to_num(lower).astype(jnp.int32)
    found = []
    for corner, weight in ((index, 1 - fraction), (index + 1, fraction)):
        if padding == "zeros":
            weight = jnp.where((corner < 0) | (corner >= size), 0 * weight, weight)
        corner = corner % size if padding == "wrap" else jnp.clip(corner, 0, size - 1)
        found.append((corner, weight))
    return tuple(found)


def centred_grid(shape: tuple[int, int], dtype: Dtype = jnp.float32) -> Float[Array, "rows columns 2"]:
    """Return the (row, column) of every pixel, in pixels from the centre of an image of that shape.

    Raises:
      ValueError: if a length is not positive.

    Example:
      >>> from jaxlayers.ops.grid_sample import centred_grid
      >>> centred_grid((1, 2))[0].tolist()
      [[0.0, -0.5], [0.0, 0.5]]
    """
    _check_shape(shape)
    axes = (jnp.arange(size, dtype=dtype) - (size - 1) / 2 for size in shape)
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def affine_coordinates(
    matrix: Float[Array, "*batch 2 3"], shape: tuple[int, int], *, source: tuple[int, int] | None = None
) -> Float[Array, "*batch rows columns 2"]:
    """Return where each pixel of the output is read from by an affine map about the centres of the images.

    With p the (row, column) of an output pixel in pixels from the centre of the output, the image is read at
    A p + b from its own centre, where `matrix` is [A, b]. The content of the picture so moves by the inverse map. The
    identity gives whole numbers where `shape` equals `source`, exactly.

    Args:
      matrix: A and b beside each other, b in pixels.
      shape: (rows, columns) of the output.
      source: (height, width) of the image that will be read; `None` takes `shape`.

    Returns:
      Coordinates for `grid_sample`, in float32 or better.

    Raises:
      ValueError: if the matrix does not end in `[2, 3]`, or a length is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.ops.grid_sample import affine_coordinates, grid_sample
      >>> quarter_turn = jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
      >>> image = jnp.arange(4.0).reshape(2, 2, 1)
      >>> grid_sample(image, affine_coordinates(quarter_turn, (2, 2)))[..., 0].tolist()
      [[1.0, 3.0], [0.0, 2.0]]
    """
    if matrix.ndim < 2 or matrix.shape[-2:] != (2, 3):
        raise ValueError(f"matrix of shape {matrix.shape} must be [*batch, 2, 3]; put A and b beside each other")
    source = shape if source is None else source
    _check_shape(source)
    dtype = at_least_float32(matrix.dtype)
    matrix = matrix.astype(dtype)[..., None, None, :, :]
    grid = centred_grid(shape, dtype)
    # Not a matrix product, which accelerators may round to fewer bits.
    moved = matrix[..., 0] * grid[..., :1] + matrix[..., 1] * grid[..., 1:] + matrix[..., 2]
    return moved + (jnp.asarray(source, dtype) - 1) / 2


def project(
    matrix: Float[Array, "*batch 3 3"], points: Float[Array, "*#batch rows columns 2"], *, epsilon: float = 1e-3
) -> tuple[Float[Array, "*batch rows columns 2"], Bool[Array, "*batch rows columns"]]:
    """Return the images (A p + b) / w of points p under projective maps, and whether they lie before the horizon.

    w = c . p + d, where `matrix` is [[A, b], [c, d]]; it and its multiples are the same map. A point lies before the
    horizon if w has the sign of d and at least `epsilon` times its size. Other points (all, if d = 0) come back as
    zeros, with gradient zero.

    Args:
      matrix: on (row, column, 1).
      points: (row, column), in the units of the matrix.
      epsilon: how near the horizon points may lie.

    Returns:
      The points, in float32 or better, and True where they lie before the horizon. NaN counts as such and comes out.

    Raises:
      ValueError: if the matrix does not end in `[3, 3]`, the points do not end in `[2]`, or `epsilon` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.ops.grid_sample import centred_grid, project
      >>> moved, seen = project(jnp.eye(3).at[2, 1].set(1.0), centred_grid((1, 3)))
      >>> moved[0].tolist(), seen[0].tolist()
      ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.5]], [False, True, True])
    """
    if matrix.ndim < 2 or matrix.shape[-2:] != (3, 3):
        raise ValueError(f"matrix of shape {matrix.shape} must be [*batch, 3, 3]; put A, b, c and d into one matrix")
    if points.ndim < 3 or points.shape[-1] != 2:
        raise ValueError(f"points of shape {points.shape} must be [*batch, rows, columns, 2]; put (row, column) last")
    if epsilon <= 0:
        raise ValueError(f"epsilon={epsilon} must be positive; set how near the horizon to read")
    dtype = at_least_float32(jnp.promote_types(matrix.dtype, points.dtype))
    matrix, points = matrix.astype(dtype)[..., None, None, :, :], points.astype(dtype)
    # Not a matrix product, which accelerators may round to fewer bits.
    moved = matrix[..., 0] * points[..., :1] + matrix[..., 1] * points[..., 1:] + matrix[..., 2]
    w, constant = moved[..., 2], matrix[..., 2, 2]
    seen = (w * jnp.sign(constant) >= epsilon * jnp.abs(constant)) & (constant != 0)
    seen = seen | jnp.isnan(w)  # a comparison with NaN is false
    return jnp.where(seen[..., None], moved[..., :2], 0) / jnp.where(seen, w, 1)[..., None], seen


def _check_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape={tuple(shape)} must be two positive lengths; set (rows, columns)")
