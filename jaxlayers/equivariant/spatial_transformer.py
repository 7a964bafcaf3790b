"""Spatial transformers: a network looks at an image, and the image is warped as it says, differentiably."""

import dataclasses
import inspect
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.ops.grid_sample import Padding, affine_coordinates, centred_grid, grid_sample, project

Size = tuple[int, int]

# Coordinates from theta ---------------------------------------------------------------------------------------------


def affine_grid(
    theta: Float[Array, "*batch 2 3"], shape: Size, *, source: Size | None = None
) -> Float[Array, "*batch rows columns 2"]:
    """Return the pixel coordinates to read an image at for an affine map of normalised coordinates.

    With q the (row, column) of an output pixel, in units where the edges of the image lie at -1 and 1, the image is
    read at A q + b, where `theta` is [A, b]. The identity reads every pixel at its own place, exactly, where `shape`
    equals `source`.

    Args:
      theta: A and b beside each other, on (row, column).
      shape: (rows, columns) of the output.
      source: (height, width) of the image; `None` takes `shape`.

    Returns:
      Coordinates for `jaxlayers.ops.grid_sample.grid_sample`, in float32 or better.

    Raises:
      ValueError: if theta does not end in `[2, 3]`, or a length is not positive.

    Source:
      Jaderberg et al. 2015, equation 1, there on (x, y): exchange both rows and the first two columns of theta.
    """
    if theta.ndim < 2 or theta.shape[-2:] != (2, 3):
        raise ValueError(f"theta of shape {theta.shape} must be [*batch, 2, 3]; put A and b beside each other")
    source = shape if source is None else source
    theta = theta.astype(at_least_float32(theta.dtype))
    return affine_coordinates(theta * _to_pixels(shape, source, theta.dtype)[:2], shape, source=source)


def projective_grid(
    theta: Float[Array, "*batch 3 3"], shape: Size, *, source: Size | None = None, epsilon: float = 1e-3
) -> Float[Array, "*batch rows columns 2"]:
    """Return the pixel coordinates to read an image at for a projective map of normalised coordinates.

    With q as in `affine_grid` the image is read at (A q + b) / w, w = c . q + d, for `theta` = [[A, b], [c, d]].
    Theta and its multiples are the same map.

    Where w has the sign of d and at least `epsilon` times its size, q lies before the horizon. Elsewhere, on the
    horizon and behind it, there is nothing to see: the coordinate is (-1, -1), where `grid_sample` reads zero with
    padding `"zeros"` (and the corner with the other paddings), and its gradient is zero. With d = 0 all is behind.

    Args:
      theta: the matrix on (row, column, 1).
      shape: (rows, columns) of the output.
      source: (height, width) of the image; `None` takes `shape`.
      epsilon: how near the horizon to read; coordinates grow up to 1 / epsilon image sizes.

    Returns:
      Coordinates for `jaxlayers.ops.grid_sample.grid_sample`, in float32 or better.

    Raises:
      ValueError: if theta does not end in `[3, 3]`, `epsilon` is not positive, or a length is not positive.
    """
    if theta.ndim < 2 or theta.shape[-2:] != (3, 3):
        raise ValueError(f"theta of shape {theta.shape} must be [*batch, 3, 3]; put A, b, c and d into one matrix")
    source = shape if source is None else source
    theta = theta.astype(at_least_float32(theta.dtype))
    matrix = theta * _to_pixels(shape, source, theta.dtype)
    moved, seen = project(matrix, centred_grid(shape, theta.dtype), epsilon=epsilon)
    return jnp.where(seen[..., None], moved + (jnp.asarray(source, theta.dtype) - 1) / 2, -1.0)


def _to_pixels(shape: Size, source: Size, dtype: Dtype) -> Array:
    """Return what a matrix on (row, column, 1) is multiplied by, entry by entry, to act on pixels from the centre."""
    if len(shape) != 2 or len(source) != 2 or min(*shape, *source) < 1:
        raise ValueError(f"shape={shape} must be two positive lengths, as must source={source}; set (rows, columns)")
    # Quotients of equal sizes are one, so that the identity stays what it is.
    return jnp.asarray(np.array([*source, 2.0])[:, None] / np.array([*shape, 2.0]), dtype)


def regular_control_points(rows: int, columns: int) -> np.ndarray:
    """Return rows x columns points that span [-1, 1] squared, row by row, `[rows * columns, 2]` as (row, column).

    Raises:
      ValueError: if there are fewer than two points along an axis.
    """
    if rows < 2 or columns < 2:
        raise ValueError(f"rows={rows} and columns={columns} must be at least 2; set more control points")
    grid = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, 2)


def thin_plate_spline_matrix(control: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the matrix that takes values at control points to the thin-plate spline through them at other points.

    The spline f(p) = a + b . p + sum_k w_k U(|p - c_k|), U(r) = r^2 log r^2, with sum_k w_k = 0 and
    sum_k w_k c_k = 0, takes the given values at the c_k and bends the least of all functions that do. It depends
    linearly on the values; affine functions are reproduced.

    Args:
      control: `[k, 2]`, c.
      points: `[n, 2]`.

    Returns:
      `[n, k]`, in float64.

    Raises:
      ValueError: if the control points are fewer than three, not finite, (nearly) coincident, or all on a line.

    Source:
      Bookstein, Principal Warps: Thin-Plate Splines and the Decomposition of Deformations, 1989.
    """
    control, points = np.asarray(control, np.float64), np.asarray(points, np.float64)
    if control.ndim != 2 or control.shape[1] != 2 or len(control) < 3 or not np.all(np.isfinite(control)):
        raise ValueError(
            f"control of shape {control.shape} must be [k, 2] with at least 3 finite points; pass (row, column) pairs"
        )
    distances = np.linalg.norm(control[:, None] - control, axis=-1)
    extent = distances.max()
    if np.min(distances + extent * np.eye(len(control))) <= 1e-6 * extent:
        raise ValueError("control points must differ, but two coincide; remove one")
    if np.linalg.svd(control - control.mean(axis=0), compute_uv=False)[1] <= 1e-6 * extent:
        raise ValueError("control points must not lie on one line; add one beside it")
    count = len(control)

    def features(at: np.ndarray) -> np.ndarray:
        return np.concatenate([_plate(at, control), np.ones((len(at), 1)), at], axis=1)

    system = np.zeros((count + 3, count + 3))
    system[:count] = features(control)
    system[count:, :count] = system[:count, count:].T
    return features(points) @ np.linalg.inv(system)[:, :count]


def _plate(points: np.ndarray, control: np.ndarray) -> np.ndarray:
    squared = np.sum(np.square(points[:, None] - control), axis=-1)
    return squared * np.log(np.where(squared > 0, squared, 1.0))


def thin_plate_spline_grid(
    displacements: Float[Array, "*batch k 2"], shape: Size, *, control: np.ndarray, source: Size | None = None
) -> Float[Array, "*batch rows columns 2"]:
    """Return the pixel coordinates to read an image at for a thin-plate-spline warp of normalised coordinates.

    The image is read at q + s(q), with q as in `affine_grid` and s the thin-plate spline whose value at control point
    k of the output is displacement k. Zero displacements are the identity, exactly; displacements that are an affine
    function of the control points give that affine map. Displacements that lay control points on each other fold the
    picture, which is as differentiable as any.

    Args:
      displacements: in units where the edges of the image lie at -1 and 1, as (row, column).
      shape: (rows, columns) of the output.
      control: the k control points in the output, `[k, 2]`, of NumPy.
      source: (height, width) of the image; `None` takes `shape`.

    Returns:
      Coordinates for `jaxlayers.ops.grid_sample.grid_sample`, in float32 or better.

    Raises:
      ValueError: on control points that do not define a spline (see `thin_plate_spline_matrix`), a number of
        displacements that is not theirs, or a length that is not positive.
    """
    if displacements.ndim < 2 or displacements.shape[-2:] != (len(control), 2):
        raise ValueError(
            f"displacements of shape {displacements.shape} must be [*batch, {len(control)}, 2]; give one for each "
            "control point"
        )
    source = shape if source is None else source
    dtype = at_least_float32(displacements.dtype)
    still = affine_grid(jnp.eye(2, 3, dtype=dtype), shape, source=source)
    places = np.stack(
        np.meshgrid(*((np.arange(size) + 0.5) * 2 / size - 1 for size in shape), indexing="ij"), axis=-1
    ).reshape(-1, 2)
    matrix = jnp.asarray(thin_plate_spline_matrix(control, places), dtype)
    moved = jnp.matmul(matrix, displacements.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    moved = moved.reshape(*displacements.shape[:-2], *shape, 2)
    return still + moved * (jnp.asarray(source, dtype) / 2)


# Warps: what a module's numbers mean --------------------------------------------------------------------------------


@runtime_checkable
class Warp(Protocol):
    """What turns a module's numbers, all zero for the identity, into coordinates."""

    @property
    def size(self) -> int:
        """How many numbers it takes."""

    def coordinates(self, theta: Array, shape: Size, source: Size) -> Array:
        """Return the coordinates `[*batch, rows, columns, 2]` for the numbers `[*batch, size]`."""


@dataclasses.dataclass(frozen=True)
class AffineWarp:
    """Six numbers, added to the identity of `affine_grid`."""

    size: int = dataclasses.field(default=6, init=False)

    def coordinates(self, theta: Float[Array, "*batch 6"], shape: Size, source: Size) -> Array:
        """Return the coordinates of `affine_grid`."""
        matrix = theta.reshape(*theta.shape[:-1], 2, 3)
        return affine_grid(matrix + jnp.eye(2, 3, dtype=theta.dtype), shape, source=source)


@dataclasses.dataclass(frozen=True)
class AttentionWarp:
    """Three numbers (t, r, c): a window scaled by 1 + t about the place (r, c), without turning.

    Source:
      Jaderberg et al. 2015, equation 2.
    """

    size: int = dataclasses.field(default=3, init=False)

    def coordinates(self, theta: Float[Array, "*batch 3"], shape: Size, source: Size) -> Array:
        """Return the coordinates of `affine_grid`."""
        scaled = (1 + theta[..., :1, None]) * jnp.eye(2, dtype=theta.dtype)
        return affine_grid(jnp.concatenate([scaled, theta[..., 1:, None]], axis=-1), shape, source=source)


@dataclasses.dataclass(frozen=True)
class ProjectiveWarp:
    """Eight numbers, added to the identity of `projective_grid` (whose last entry stays 1).

    Attributes:
      epsilon: how near the horizon to read, see `projective_grid`.
    """

    epsilon: float = 1e-3
    size: int = dataclasses.field(default=8, init=False)

    def coordinates(self, theta: Float[Array, "*batch 8"], shape: Size, source: Size) -> Array:
        """Return the coordinates of `projective_grid`."""
        padded = jnp.pad(theta, [(0, 0)] * (theta.ndim - 1) + [(0, 1)])
        matrix = padded.reshape(*theta.shape[:-1], 3, 3) + jnp.eye(3, dtype=theta.dtype)
        return projective_grid(matrix, shape, source=source, epsilon=self.epsilon)


@dataclasses.dataclass(frozen=True)
class ThinPlateSplineWarp:
    """Two numbers for each point of a regular grid of control points: its displacement.

    Attributes:
      rows: control points along the height, at least 2.
      columns: control points along the width, at least 2.
    """

    rows: int = 4
    columns: int = 4

    @property
    def size(self) -> int:
        """How many numbers it takes."""
        return 2 * self.rows * self.columns

    def coordinates(self, theta: Float[Array, "*batch numbers"], shape: Size, source: Size) -> Array:
        """Return the coordinates of `thin_plate_spline_grid`."""
        control = regular_control_points(self.rows, self.columns)
        displacements = theta.reshape(*theta.shape[:-1], -1, 2)
        return thin_plate_spline_grid(displacements, shape, control=control, source=source)


# The module ---------------------------------------------------------------------------------------------------------


class SpatialTransformer(nn.Module):
    """Warp an image by what a localisation network says about it.

    theta = W localization(U) + b (the dense layer `pose`), out[q] = sum_p U[p] k(T_theta(q) - p), with the image U
    `[height, width, channels]`, its pixels p, the pixels q of the output, the bilinear kernel
    k(r, c) = max(0, 1 - |r|) max(0, 1 - |c|), and the warp T_theta. W and b start at zero, which is the identity:
    before training the image comes out unchanged, to the bit (if `out_shape` is its own).

    Symmetry:
      None is built in: invariance is learned from data, for those poses that the data show. Where it must hold, see
      `EquivariantTransformer` and `FrameAveraging`.

    Attributes:
      localization: any module from the image `[*batch, height, width, channels]` to features `[*batch, features]`; the
        keyword `deterministic` is handed on if its call takes it.
      warp: what theta means: `AffineWarp()`, `AttentionWarp()`, `ProjectiveWarp()`, `ThinPlateSplineWarp(rows,
        columns)`, or anything with a `size` and `coordinates` that are the identity at zero.
      out_shape: (rows, columns) of the output; `None` keeps those of the image.
      padding: what is read outside the image: `"zeros"`, `"edge"` or `"wrap"`.
      param_dtype: dtype of W and b.
      kernel_init: initialiser of W.
      bias_init: initialiser of b; with W zero it is the warp at the start.

    Collections:
      Theta `[*batch, warp.size]` is sown as `theta` into `intermediates`.

    Cost:
      The localisation network, and four reads of each output pixel. Theta, coordinates and weights are float32 or
      better: in bfloat16, 0.4 % of an image of 224 pixels would be a whole pixel.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import SpatialTransformer
      >>> look = nn.Sequential([nn.Conv(4, (5, 5), strides=2), nn.relu, lambda x: x.reshape(*x.shape[:-3], -1)])
      >>> image = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> out, _ = SpatialTransformer(look).init_with_output(jax.random.key(1), image)
      >>> bool((out == image).all())
      True

    Source:
      Jaderberg, Simonyan, Zisserman, Kavukcuoglu, Spatial Transformer Networks, NeurIPS 2015, equations 1, 2 and 5,
      section 3.2 (projective, thin-plate spline). Compared with PyTorch's `affine_grid` and `grid_sample`.

    Differs:
      Theta acts on (row, column), not (x, y). [-1, 1] spans the image from edge to edge of its pixels, as PyTorch's
      default does, so that a theta means the same at every resolution. The thin-plate spline takes displacements of
      the control points rather than their places, so that the identity is exact. Derivatives by coordinates on a
      whole pixel are the slope towards the next one (equation 6 counts the pixel itself).
    """

    localization: nn.Module
    warp: Warp = AffineWarp()
    out_shape: Size | None = None
    padding: Padding = "zeros"
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = zeros()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch rows columns channels"]:
        """Warp images.

        Args:
          x: images; any leading axes that the localisation network takes.
          deterministic: handed on to the localisation network.

        Returns:
          The warped images, in the dtype of `x`. A NaN in what the localisation network returns makes the whole image
          NaN.

        Raises:
          ValueError: if `x` is not `[*batch, height, width, channels]`, the localisation network does not return
            `[*batch, features]`, `out_shape` is not two positive lengths, or the padding is unknown.
        """
        if x.ndim < 3 or 0 in x.shape[-3:]:
            raise ValueError(f"image of shape {x.shape} must be [*batch, height, width, channels]; add axes")
        source = (x.shape[-3], x.shape[-2])
        taken: Any = inspect.signature(type(self.localization).__call__).parameters
        keywords = {"deterministic": deterministic} if "deterministic" in taken else {}
        features = self.localization(x, **keywords)
        if features.ndim != x.ndim - 2 or features.shape[:-1] != x.shape[:-3]:
            raise ValueError(
                f"localization returned shape {features.shape} for images of shape {x.shape}; it must return "
                "[*batch, features], so end it with pooling or flattening"
            )
        theta = nn.Dense(
            self.warp.size,
            dtype=at_least_float32(features.dtype),
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            precision=jax.lax.Precision.HIGHEST,
            name="pose",
        )(features)
        self.sow("intermediates", "theta", theta)
        coordinates = self.warp.coordinates(theta, self.out_shape or source, source)
        return axes.constrain_map(grid_sample(x, coordinates, padding=self.padding))
