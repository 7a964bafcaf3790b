"""Equivariant transformers: find the pose where the group is a translation, then undo it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.safe import safe_divide
from jaxlayers.core.types import ActivationFn, Dtype, Initializer
from jaxlayers.ops.grid_sample import Padding, centred_grid, grid_sample, project

Limits = tuple[float, float]

# Below this share of the largest possible mean a circular mean has no direction.
_NO_DIRECTION = 1e-5

# Of the log radius: from a tenth of half the image to its corners.
_LOG_RADII = (-math.log(10.0), math.log(2.0) / 2)
_LOG_LENGTHS = (-math.log(10.0), 0.0)
_LOG_SQUEEZES = (-math.log(6.0), math.log(6.0))
_SQUEEZED_RADIUS = math.sqrt(0.5)

# Canonical coordinates ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CanonicalCoordinates:
    """Coordinates of the plane in which a group of maps T_theta is a translation: rho(T_theta p) = rho(p) + theta.

    Points are (row, column) from the centre of the image, in units of half its shorter side. Some coordinates fold the
    plane: then it is cut into sheets, each with coordinates of its own on the same rectangle.

    Attributes:
      name: of the group.
      limits: the rectangle of the two coordinates that is sampled.
      axes: which of the two coordinates theta is added to, one for each parameter.
      periodic: whether each coordinate comes back to its start after the width of its limits.
      sheets: their number.
      to_plane: (coordinates `[..., 2]`, number of the sheet) -> points `[..., 2]`, of NumPy.
      from_plane: points `[..., 2]` -> (coordinates, numbers of the sheets `[...]`), of NumPy.
      matrix: theta `[*batch, parameters]` -> T_theta `[*batch, 3, 3]` on (row, column, 1), of JAX.
      exact: what must hold for poses to be exact besides the interpolation.
    """

    name: str
    limits: tuple[Limits, Limits]
    axes: tuple[int, ...]
    to_plane: Callable[[np.ndarray, int], np.ndarray]
    from_plane: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    matrix: Callable[[Array], Array]
    periodic: tuple[bool, bool] = (False, False)
    sheets: int = 1
    exact: str = ""

    def __post_init__(self) -> None:
        if not all(np.isfinite(limits).all() and limits[0] < limits[1] for limits in self.limits):
            raise ValueError(f"limits={self.limits} of {self.name} must rise from finite to finite; set them")

    def values(self, axis: int, size: int) -> np.ndarray:
        """Return the `size` values of a coordinate that are sampled: the middles of as many equal cells."""
        low, high = self.limits[axis]
        return low + (np.arange(size) + 0.5) * (high - low) / size

    def grid(self, resolution: tuple[int, int]) -> np.ndarray:
        """Return the points that are sampled, `[sheets, *resolution, 2]`, in float64."""
        if len(resolution) != 2 or min(resolution) < 2:
            raise ValueError(f"resolution={tuple(resolution)} must be two sizes of at least 2; set more samples")
        pair = np.meshgrid(*(self.values(axis, size) for axis, size in enumerate(resolution)), indexing="ij")
        return np.stack([self.to_plane(np.stack(pair, axis=-1), sheet) for sheet in range(self.sheets)])


def _one_sheet(points: np.ndarray) -> np.ndarray:
    return np.zeros(points.shape[:-1], np.int64)


def _matrix(theta: Array, entries: Sequence[Sequence[Any]]) -> Array:
    """Return the `[*batch, 3, 3]` matrix of entries that are numbers or arrays `[*batch]`."""
    like = theta[..., 0]
    rows = [jnp.stack([jnp.broadcast_to(jnp.asarray(e, theta.dtype), like.shape) for e in row], -1) for row in entries]
    return jnp.stack(rows, axis=-2)


def _plain_plane(u: np.ndarray, sheet: int) -> np.ndarray:
    return u


def translation(axes: tuple[int, ...] = (0, 1), *, periodic: bool = False) -> CanonicalCoordinates:
    """Return shifts along the height (axis 0), the width (axis 1) or both; `periodic` wraps them, on square images."""

    def matrix(theta: Array) -> Array:
        shift = [theta[..., axes.index(axis)] if axis in axes else 0.0 for axis in (0, 1)]
        return _matrix(theta, ((1.0, 0.0, shift[0]), (0.0, 1.0, shift[1]), (0.0, 0.0, 1.0)))

    return CanonicalCoordinates(
        name="translation" + "".join(("_y", "_x")[axis] for axis in axes if len(axes) == 1),
        limits=((-1.0, 1.0), (-1.0, 1.0)),
        axes=axes,
        to_plane=_plain_plane,
        from_plane=lambda p: (p, _one_sheet(p)),
        matrix=matrix,
        periodic=(periodic, periodic),
        exact="a square image, read with padding 'wrap'" if periodic else "",
    )


def translation_x() -> CanonicalCoordinates:
    """Return shifts along the width: (r, c) -> (r, c + t)."""
    return translation((1,))


def translation_y() -> CanonicalCoordinates:
    """Return shifts along the height: (r, c) -> (r + t, c)."""
    return translation((0,))


def _polar(limits: Limits, axes: tuple[int, ...], name: str, *, logarithmic: bool) -> CanonicalCoordinates:
    def to_plane(u: np.ndarray, sheet: int) -> np.ndarray:
        radius = np.exp(u[..., 0]) if logarithmic else u[..., 0]
        return radius[..., None] * np.stack([np.cos(u[..., 1]), np.sin(u[..., 1])], axis=-1)

    def from_plane(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        radius = np.hypot(p[..., 0], p[..., 1])
        angle = np.arctan2(p[..., 1], p[..., 0])
        return np.stack([np.log(radius) if logarithmic else radius, angle], axis=-1), _one_sheet(p)

    def matrix(theta: Array) -> Array:
        scale: Any = jnp.exp(theta[..., axes.index(0)]) if 0 in axes else 1.0
        angle = theta[..., axes.index(1)] if 1 in axes else jnp.zeros_like(theta[..., 0])
        cosine, sine = scale * jnp.cos(angle), scale * jnp.sin(angle)
        return _matrix(theta, ((cosine, -sine, 0.0), (sine, cosine, 0.0), (0.0, 0.0, 1.0)))

    return CanonicalCoordinates(
        name, (limits, (-np.pi, np.pi)), axes, to_plane, from_plane, matrix, periodic=(False, True)
    )


def rotation(radius: float = 1.0) -> CanonicalCoordinates:
    """Return rotations about the centre, counterclockwise like `numpy.rot90`, in (radius, angle) coordinates."""
    return _polar((0.0, radius), (1,), "rotation", logarithmic=False)


def scale(limits: Limits = _LOG_RADII) -> CanonicalCoordinates:
    """Return scalings p -> e^s p, in (log radius, angle) coordinates; `limits` are those of the log radius."""
    return _polar(limits, (0,), "scale", logarithmic=True)


def rotation_scale(limits: Limits = _LOG_RADII) -> CanonicalCoordinates:
    """Return scalings by e^s with rotations by a, theta = (s, a), in log-polar coordinates."""
    return _polar(limits, (0, 1), "rotation_scale", logarithmic=True)


def _exchanged(group: CanonicalCoordinates, name: str) -> CanonicalCoordinates:
    """Return the same with rows and columns exchanged."""
    swap = np.array([1, 0, 2])
    return dataclasses.replace(
        group,
        name=name,
        to_plane=lambda u, sheet: group.to_plane(u, sheet)[..., ::-1],
        from_plane=lambda p: group.from_plane(p[..., ::-1]),
        matrix=lambda theta: group.matrix(theta)[..., swap, :][..., swap],
    )


def shear_x(limits: Limits = (-5.0, 5.0)) -> CanonicalCoordinates:
    """Return shears (r, c) -> (r, c + t r), in coordinates (r, c / r); `limits` are those of c / r."""

    def from_plane(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([p[..., 0], p[..., 1] / p[..., 0]], axis=-1), _one_sheet(p)

    return CanonicalCoordinates(
        name="shear_x",
        limits=((-1.0, 1.0), limits),
        axes=(1,),
        to_plane=lambda u, sheet: np.stack([u[..., 0], u[..., 0] * u[..., 1]], axis=-1),
        from_plane=from_plane,
        matrix=lambda t: _matrix(t, ((1.0, 0.0, 0.0), (t[..., 0], 1.0, 0.0), (0.0, 0.0, 1.0))),
    )


def shear_y(limits: Limits = (-5.0, 5.0)) -> CanonicalCoordinates:
    """Return shears (r, c) -> (r + t c, c), in coordinates (c, r / c); `limits` are those of r / c."""
    return _exchanged(shear_x(limits), "shear_y")


def scale_x(limits: Limits = _LOG_LENGTHS) -> CanonicalCoordinates:
    """Return stretches (r, c) -> (r, e^s c), in coordinates (r, log |c|), with a sheet for either sign of c."""

    def from_plane(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([p[..., 0], np.log(np.abs(p[..., 1]))], axis=-1), (p[..., 1] < 0).astype(np.int64)

    return CanonicalCoordinates(
        name="scale_x",
        limits=((-1.0, 1.0), limits),
        axes=(1,),
        to_plane=lambda u, sheet: np.stack([u[..., 0], (1 - 2 * sheet) * np.exp(u[..., 1])], axis=-1),
        from_plane=from_plane,
        matrix=lambda t: _matrix(t, ((1.0, 0.0, 0.0), (0.0, jnp.exp(t[..., 0]), 0.0), (0.0, 0.0, 1.0))),
        sheets=2,
    )


def scale_y(limits: Limits = _LOG_LENGTHS) -> CanonicalCoordinates:
    """Return stretches (r, c) -> (e^s r, c), in coordinates (c, log |r|), with a sheet for either sign of r."""
    return _exchanged(scale_x(limits), "scale_y")


def hyperbolic_rotation(limits: Limits = _LOG_SQUEEZES, radius: float = _SQUEEZED_RADIUS) -> CanonicalCoordinates:
    """Return squeezes (r, c) -> (e^-s r, e^s c), in coordinates (sqrt |r c|, log sqrt |c / r|), a sheet a quadrant.

    `limits` are those of the second coordinate, `radius` is the end of the first.
    """

    def to_plane(u: np.ndarray, sheet: int) -> np.ndarray:
        signs = np.array([1 - 2 * (sheet // 2), 1 - 2 * (sheet % 2)])
        return signs * u[..., :1] * np.exp(u[..., 1:] * np.array([-1.0, 1.0]))

    def from_plane(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.abs(p[..., 0]), np.abs(p[..., 1])
        sheet = 2 * (p[..., 0] < 0) + (p[..., 1] < 0)
        return np.stack([np.sqrt(rows * columns), 0.5 * np.log(columns / rows)], axis=-1), sheet.astype(np.int64)

    return CanonicalCoordinates(
        name="hyperbolic_rotation",
        limits=((0.0, radius), limits),
        axes=(1,),
        to_plane=to_plane,
        from_plane=from_plane,
        matrix=lambda t: _matrix(t, ((jnp.exp(-t[..., 0]), 0.0, 0.0), (0.0, jnp.exp(t[..., 0]), 0.0), (0.0, 0.0, 1.0))),
        sheets=4,
    )


def perspective_x(limits: Limits = (1.0, 7.0), angle: float = 0.99 * np.pi / 2) -> CanonicalCoordinates:
    """Return tilts (r, c) -> (r, c) / (1 + t c), in coordinates (angle of (|c|, r), 1 / c), a sheet for each sign of c.

    `limits` are those of 1 / |c|, so that columns nearer the centre than their inverse are not seen; on each sheet the
    second coordinate counts from their middle. The first spans +-`angle`.
    """
    middle = (limits[0] + limits[1]) / 2

    def to_plane(u: np.ndarray, sheet: int) -> np.ndarray:
        sign = 1 - 2 * sheet
        columns = 1 / (u[..., 1] + sign * middle)
        return np.stack([np.abs(columns) * np.tan(u[..., 0]), columns], axis=-1)

    def from_plane(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coordinates = np.stack([np.arctan(p[..., 0] / np.abs(p[..., 1])), 1 / p[..., 1]], axis=-1)
        coordinates[..., 1] -= np.sign(p[..., 1]) * middle
        return coordinates, (p[..., 1] < 0).astype(np.int64)

    return CanonicalCoordinates(
        name="perspective_x",
        limits=((-angle, angle), (limits[0] - middle, limits[1] - middle)),
        axes=(1,),
        to_plane=to_plane,
        from_plane=from_plane,
        matrix=lambda t: _matrix(t, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, t[..., 0], 1.0))),
        sheets=2,
    )


def perspective_y(limits: Limits = (1.0, 7.0), angle: float = 0.99 * np.pi / 2) -> CanonicalCoordinates:
    """Return tilts (r, c) -> (r, c) / (1 + t r); see `perspective_x` with rows and columns exchanged."""
    return _exchanged(perspective_x(limits, angle), "perspective_y")


#: Every group by name.
GROUPS: dict[str, Callable[[], CanonicalCoordinates]] = {
    "translation": translation,
    "translation_x": translation_x,
    "translation_y": translation_y,
    "rotation": rotation,
    "scale": scale,
    "rotation_scale": rotation_scale,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "scale_x": scale_x,
    "scale_y": scale_y,
    "hyperbolic_rotation": hyperbolic_rotation,
    "perspective_x": perspective_x,
    "perspective_y": perspective_y,
}


# Reading images -----------------------------------------------------------------------------------------------------


def read_at(
    x: Float[Array, "*batch height width channels"],
    points: Float[Array, "rows columns 2"],
    matrix: Float[Array, "*batch 3 3"] | None = None,
    *,
    padding: Padding = "zeros",
) -> Float[Array, "*batch rows columns channels"]:
    """Return images read at the places that a projective map takes points to.

    Args:
      x: images.
      points: (row, column) from the centre, in units of half the shorter side of the image.
      matrix: the map of each image, on those coordinates; `None` is the identity. What it takes behind the horizon
        (see `jaxlayers.ops.grid_sample.project`) reads the place (-1, -1) beside the image.
      padding: what lies outside the image.

    Returns:
      What is read, in the dtype of `x`.
    """
    seen = None
    if matrix is not None:
        points, seen = project(matrix, points)
    dtype = at_least_float32(points.dtype)
    shape = np.array(x.shape[-3:-1])
    places = points.astype(dtype) * jnp.asarray(shape.min() / 2, dtype) + jnp.asarray((shape - 1) / 2, dtype)
    if seen is not None:
        places = jnp.where(seen[..., None], places, -1.0)
    return grid_sample(x, places, padding=padding)


def transform_image(
    x: Float[Array, "*batch height width channels"], matrix: Float[Array, "*batch 3 3"], *, padding: Padding = "zeros"
) -> Float[Array, "*batch height width channels"]:
    """Return the images read at T p for every pixel p, where `matrix` is T: their content moves by the inverse of T."""
    shape = (x.shape[-3], x.shape[-2])
    dtype = at_least_float32(matrix.dtype)
    points = centred_grid(shape, dtype) / jnp.asarray(min(shape) / 2, dtype)
    return read_at(x, points, matrix, padding=padding)


def canonical_image(
    x: Float[Array, "*batch height width channels"],
    group: CanonicalCoordinates,
    resolution: tuple[int, int],
    matrix: Float[Array, "*batch 3 3"] | None = None,
    *,
    padding: Padding = "zeros",
) -> Float[Array, "*batch first second sheet_channels"]:
    """Return images resampled to canonical coordinates; the sheets lie beside each other as channels.

    A transformed image x(T_g^-1 p) gives the same picture, shifted by g, up to the interpolation.

    Args:
      x: images.
      group: the coordinates.
      resolution: number of samples of both coordinates.
      matrix: map to read the image through, see `read_at`.
      padding: what lies outside the image.

    Returns:
      The resampled images, in the dtype of `x`.
    """
    sheets, first, second = group.sheets, *resolution
    points = jnp.asarray(group.grid(resolution).reshape(sheets * first, second, 2), at_least_float32(x.dtype))
    read = read_at(x, points, matrix, padding=padding)
    read = read.reshape(*x.shape[:-3], sheets, first, second, x.shape[-1])
    return jnp.moveaxis(read, -4, -2).reshape(*x.shape[:-3], first, second, -1)


# Poses --------------------------------------------------------------------------------------------------------------


def centroid(
    heat: Float[Array, "*batch samples"], values: np.ndarray, *, period: float | None = None
) -> Float[Array, "*batch"]:
    """Return the mean of values under weights that vanish where the heat does.

    The weights are cosh(heat) - 1, up to a factor. Like those of a softmax they grow exponentially; unlike those, they
    are zero for zero heat, so that what is empty does not pull the mean to the middle: where a heat map is zero but for
    a part that moves, its centroid moves by just as much. On a circle it is the angle of the mean of the unit vectors.

    Args:
      heat: any sign.
      values: the value of every sample.
      period: after which the values repeat; `None` on a line.

    Returns:
      The mean, in float32 or better. Zero, with gradient zero, if the heat is zero everywhere, or on a circle has no
      direction (the same heat everywhere): such an image has no pose.
    """
    heat = jnp.abs(heat.astype(at_least_float32(heat.dtype)))
    peak = jax.lax.stop_gradient(jnp.max(heat, axis=-1, keepdims=True))
    # (e^(h/2) - e^(-h/2))^2 = 2 (cosh h - 1), without overflow or cancellation.
    weights = jnp.square(jnp.exp((heat - peak) / 2) * -jnp.expm1(-heat))
    weights = safe_divide(weights, jnp.sum(weights, axis=-1, keepdims=True))
    if period is None:
        return jnp.sum(weights * jnp.asarray(values, weights.dtype), axis=-1)
    angles = 2 * np.pi * np.asarray(values) / period
    mean = [jnp.sum(weights * jnp.asarray(f(angles), weights.dtype), axis=-1) for f in (np.cos, np.sin)]
    directed = jnp.hypot(*jax.lax.stop_gradient(mean)) > _NO_DIRECTION
    # NaN must not hide: a comparison with it is false.
    directed = directed | jnp.isnan(mean[0])
    angle = jnp.arctan2(jnp.where(directed, mean[1], 0.0), jnp.where(directed, mean[0], 1.0))
    return angle * (period / (2 * np.pi))


class PosePredictor(nn.Module):
    """Turn a picture into one heat map along an axis, or two, that shift with the picture.

    h_l = act(K_l * h_(l-1)), heat_a = k_a * max_b h, with convolutions K_l over both axes, a convolution k_a along axis
    a, and the maximum over the other axis b. There are no biases and no strides: an empty picture has zero heat.

    Symmetry:
      Exactly equivariant to shifts by whole samples: wrapped ones along periodic axes, and along others as long as
      everything but zeros stays (depth + 1) x (kernel_size // 2) samples away from the ends.

    Attributes:
      features: width of the convolutions.
      depth: number of two-dimensional convolutions, at least 1.
      kernel_size: length of the kernels along each axis; odd.
      activation_fn: the nonlinearity, which must keep zero.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.

    Cost:
      (channels + (depth - 1) features) x features x kernel_size^2 multiply-accumulates a sample.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import PosePredictor
      >>> z = jax.random.normal(jax.random.key(0), (2, 6, 8, 1))
      >>> predictor = PosePredictor(features=4)
      >>> (heat,), _ = predictor.init_with_output(jax.random.key(1), z, axes=(1,), periodic=(False, True))
      >>> heat.shape
      (2, 8)

    Source:
      Tai, Bailis, Valiant, Equivariant Transformer Networks, ICML 2019, section 4.1; reference code
      stanford-futuredata/equivariant-transformers at 5d0f053, `EquivariantPosePredictor`.

    Differs:
      No strides, which keep only every fourth shift; no batch normalisation, whose bias would give the empty background
      a heat; gelu for the leaky rectifier; `centroid` in place of the softmax.
    """

    features: int = 16
    depth: int = 2
    kernel_size: int = 5
    activation_fn: ActivationFn = nn.gelu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "*batch first second channels"],
        *,
        axes: tuple[int, ...] = (0, 1),
        periodic: tuple[bool, bool] = (False, False),
    ) -> tuple[Float[Array, "*batch samples"], ...]:
        """Predict heat maps.

        Args:
          z: pictures in canonical coordinates.
          axes: along which of the two axes to give a heat map.
          periodic: which axes close to a circle.

        Returns:
          A heat map for each of `axes`, whose length is that of the axis.

        Raises:
          ValueError: on a wrong rank, an even or too long kernel, or no layers.
        """
        if z.ndim < 3:
            raise ValueError(f"picture of shape {z.shape} must be [*batch, first, second, channels]; add axes")
        if self.kernel_size % 2 == 0 or self.kernel_size // 2 > min(z.shape[-3:-1]):
            raise ValueError(
                f"kernel_size={self.kernel_size} must be odd and its half fit into {z.shape[-3:-1]} samples; set "
                "kernel_size or resolution"
            )
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1; set depth")

        def conv(x: Array, features: int, kernel: tuple[int, ...], around: Sequence[bool], name: str) -> Array:
            for axis, wrapped in enumerate(around):
                padding = [(0, 0)] * x.ndim
                padding[x.ndim - 1 - len(around) + axis] = (kernel[axis] // 2,) * 2
                x = jnp.pad(x, padding, mode="wrap" if wrapped else "constant")
            return nn.Conv(
                features,
                kernel,
                padding="VALID",
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=name,
            )(x)

        for layer in range(self.depth):
            z = self.activation_fn(conv(z, self.features, (self.kernel_size,) * 2, periodic, f"conv_{layer}"))
        heats = []
        for axis in axes:
            line = jnp.max(z, axis=-2 if axis == 0 else -3)
            heats.append(conv(line, 1, (self.kernel_size,), periodic[axis : axis + 1], f"heat_{axis}")[..., 0])
        return tuple(heats)


# The layers ---------------------------------------------------------------------------------------------------------


class EquivariantTransformer(nn.Module):
    """Predict how an image is posed, as precisely as poses shift, and undo it.

    z(u) = x(rho^-1(u)), theta = centroid(predictor(z)) + b, out(p) = x(T_theta p), with the image x, the canonical
    coordinates rho of the group of maps T, in which rho(T_g p) = rho(p) + g, and a learned offset b, zero at first.
    Of a transformed image x(T_g^-1 p) the picture z and so theta shift by g, and `out` is the same.

    Symmetry:
      The maps of `group` on the image; theta gets g added, `out` is invariant. Exact where canonical samples of the
      transformed image are those of the image: quarter turns of square images for `rotation()` and `rotation_scale()`
      with a resolution of the angle that 4 divides, and wrapped shifts of square images by whole pixels for
      `translation(periodic=True)` with padding `"wrap"` and a resolution that is the image's. Else approximate: the
      bilinear reading makes an error of about the pixel size squared, and shifts by parts of a sample one that falls
      with the resolution. For smooth pictures moved by two of 24 samples, theta is off by 0.4 % of its range for
      rotations and 1.4 % for rotations with scalings in images of 24 pixels, by 0.03 % and 0.01 % in 192 pixels.
      Where it breaks: what leaves the image or the limits of the coordinates is lost; along axes that are not periodic
      a background other than zero does not move with the picture; an image with a symmetry of its own (the same heat
      all around) has no angle, and theta is b.

    Attributes:
      predictor: called as `predictor(z, axes=..., periodic=...)`, it returns one heat map for each parameter of the
        group, like `PosePredictor`.
      group: the canonical coordinates: `rotation()`, `rotation_scale()`, `shear_x()`... of this file (see `GROUPS`).
      resolution: number of samples of both canonical coordinates; `None` takes (height, width).
      padding: what is read outside the image: `"zeros"`, `"edge"` or `"wrap"`.
      param_dtype: dtype of b.
      bias_init: initialiser of b.

    Collections:
      Theta `[*batch, parameters]` is sown as `theta` into `intermediates`.

    Cost:
      The predictor on the canonical picture, and two bilinear readings. Coordinates and theta are float32 or better.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import EquivariantTransformer, PosePredictor, equivariant_transformers
      >>> layer = EquivariantTransformer(PosePredictor(features=4), equivariant_transformers.rotation())
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> out, variables = layer.init_with_output(jax.random.key(1), x)
      >>> turned = layer.apply(variables, jnp.rot90(x, axes=(1, 2)))
      >>> bool(jnp.allclose(turned, out, atol=1e-4))
      True

    Source:
      Tai, Bailis, Valiant, Equivariant Transformer Networks, ICML 2019, equations 3 to 7, table 1; reference code
      stanford-futuredata/equivariant-transformers at 5d0f053.

    Differs:
      Coordinates are (row, column), so that angles turn the other way. Periodic axes are sampled without their end
      twice, without which no turn is exact; sheets are channels, not more rows, so that no convolution mixes what does
      not touch. Weights of the centroid vanish with the heat (see `centroid`). The offset is not squashed.
    """

    predictor: nn.Module
    group: CanonicalCoordinates
    resolution: tuple[int, int] | None = None
    padding: Padding = "zeros"
    param_dtype: Dtype = jnp.float32
    bias_init: Initializer = zeros()

    @nn.compact
    def pose(
        self, x: Float[Array, "*batch height width channels"], before: Float[Array, "*batch 3 3"] | None = None
    ) -> Float[Array, "*batch parameters"]:
        """Return theta of images read through the maps `before` (see `read_at`), in float32 or better."""
        if x.ndim < 3 or 0 in x.shape[-3:]:
            raise ValueError(f"image of shape {x.shape} must be [*batch, height, width, channels]; add axes")
        resolution = self.resolution or (x.shape[-3], x.shape[-2])
        z = canonical_image(x, self.group, resolution, before, padding=self.padding)
        heats = self.predictor(z, axes=self.group.axes, periodic=self.group.periodic)
        expected = [(*x.shape[:-3], resolution[axis]) for axis in self.group.axes]
        if not isinstance(heats, tuple) or [heat.shape for heat in heats] != expected:
            raise ValueError(
                f"predictor returned shapes {jax.tree.map(jnp.shape, heats)}; it must return a tuple of heat maps of "
                f"shapes {expected}, one for each parameter of {self.group.name}"
            )
        found = []
        for axis, heat in zip(self.group.axes, heats, strict=True):
            low, high = self.group.limits[axis]
            values = self.group.values(axis, resolution[axis]) - (low + high) / 2
            found.append(centroid(heat, values, period=high - low if self.group.periodic[axis] else None))
        bias = self.param("bias", self.bias_init, (len(found),), self.param_dtype)
        theta = jnp.stack(found, axis=-1)
        theta = theta + bias.astype(theta.dtype)
        self.sow("intermediates", "theta", theta)
        return theta

    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height width channels"]:
        """Undo the pose of images.

        Args:
          x: images; any leading axes that the predictor takes.

        Returns:
          The images in their canonical pose, in the dtype of `x`. A NaN pixel that is read makes the whole image NaN.

        Raises:
          ValueError: on a wrong rank, a resolution below 2, a predictor that returns other shapes, or an unknown
            padding.
        """
        matrix = self.group.matrix(self.pose(x))
        return axes.constrain_map(transform_image(x, matrix, padding=self.padding))


class ComposedTransformer(nn.Module):
    """Undo several poses, one after the other, and read the image once.

    theta_i = pose_i(x(M_(i-1) p)), M_i = M_(i-1) T_(theta_i), M_0 = 1, out = backbone(x(M_n p)), with
    `EquivariantTransformer`s pose_i of maps T. No intermediate image is made, so that interpolation does not add up.

    Symmetry:
      As exact as its first transformer, to the maps of its group: the later ones see the same image. To the maps of
      a later group, so far as the earlier poses follow them: a rotation after a translation does if the translation is
      found at a point that turns with the image.

    Attributes:
      transformers: `EquivariantTransformer`s, in order. Give each a predictor of its own: one module in two places
        shares its parameters.
      backbone: what gets the image in its canonical pose; `None` returns that image.
      padding: what is read outside the image: `"zeros"`, `"edge"` or `"wrap"`.

    Collections:
      Each transformer sows its `theta` into `intermediates`.

    Cost:
      The sum of the predictors and two readings, and the backbone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import ComposedTransformer, EquivariantTransformer, PosePredictor
      >>> from jaxlayers.equivariant import equivariant_transformers as groups
      >>> parts = [EquivariantTransformer(PosePredictor(4), make()) for make in (groups.rotation, groups.shear_x)]
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> ComposedTransformer(tuple(parts)).init_with_output(jax.random.key(1), x)[0].shape
      (2, 8, 8, 1)

    Source:
      Tai, Bailis, Valiant, Equivariant Transformer Networks, ICML 2019, section 4.2; reference code
      stanford-futuredata/equivariant-transformers at 5d0f053, `TransformerSequence`.

    Differs:
      none.
    """

    transformers: tuple[nn.Module, ...]
    backbone: nn.Module | None = None
    padding: Padding = "zeros"

    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Any:
        """Undo the poses of images.

        Args:
          x: images; any leading axes that the parts take.

        Returns:
          What the backbone returns for the images in their canonical pose.

        Raises:
          ValueError: if there are no transformers, one of them is another kind of module, or as they do.
        """
        strangers = [type(part).__name__ for part in self.transformers if not isinstance(part, EquivariantTransformer)]
        if strangers or not self.transformers:
            raise ValueError(
                f"transformers must be one or more EquivariantTransformer modules; got {strangers or 'none'}; put "
                "other modules into backbone"
            )
        matrix: Array | None = None
        for part in self.transformers:
            found = part.group.matrix(part.pose(x, matrix))
            matrix = found if matrix is None else jnp.matmul(matrix, found, precision=jax.lax.Precision.HIGHEST)
        assert matrix is not None
        out = axes.constrain_map(transform_image(x, matrix, padding=self.padding))
        return out if self.backbone is None else self.backbone(out)
