"""The Haar transform of pictures: averages and differences of 2 x 2 neighbours, one level or several, and back."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.ops.patches import from_patches, split_shape, to_patches

# Rows are bands, columns the pixels of a neighbourhood in row-major order. The matrix is symmetric and orthogonal, so
# it is its own inverse.
_HAAR = (
    (0.5, 0.5, 0.5, 0.5),
    (0.5, 0.5, -0.5, -0.5),
    (0.5, -0.5, 0.5, -0.5),
    (0.5, -0.5, -0.5, 0.5),
)


def haar(x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch half_height half_width bands"]:
    """Return the four bands of one level of the orthonormal Haar transform.

    Of a neighbourhood [[a, b], [c, d]] they are the sum, the difference of rows (a + b - c - d) / 2, that of columns
    (a - b + c - d) / 2, and (a - b - c + d) / 2: lengths are kept, |haar(x)| = |x|.

    Args:
      x: map of even size.

    Returns:
      Bands one after the other, each with all features.

    Raises:
      ValueError: if `x` has fewer than three axes or an odd size.
    """
    _, size, features = split_shape(x.shape, 2)
    if any(length % 2 for length in size):
        raise ValueError(f"spatial size {size} must be even; crop or pad the map")
    patches = to_patches(x, (2, 2))
    return _mix(patches, features)


def inverse_haar(
    bands: Float[Array, "*batch height width bands"],
) -> Float[Array, "*batch new_height new_width features"]:
    """Return the map that `haar` gives these bands of.

    Raises:
      ValueError: if `bands` has fewer than three axes or its features are no four bands.
    """
    _, _, features = split_shape(bands.shape, 2)
    if features % 4:
        raise ValueError(f"features={features} must be divisible by 4, one part a band; pass what haar returns")
    return from_patches(_mix(bands, features // 4), (2, 2))


def haar_pyramid(
    x: Float[Array, "*batch height width features"], levels: int
) -> tuple[Float[Array, "*batch _height _width _features"], ...]:
    """Return the Haar transform of several levels, each of the averages of the one before.

    Args:
      x: map of a size that `2**levels` divides.
      levels: how many; 0 leaves the map alone.

    Returns:
      The last averages, then the details (three bands) of each level, coarsest first.

    Raises:
      ValueError: if `levels` is negative or does not fit the size.
    """
    _, size, features = split_shape(x.shape, 2)
    if levels < 0 or any(length % 2**levels for length in size):
        raise ValueError(f"levels={levels} must not be negative, and 2**levels must divide the size {size}; set levels")
    details: list[Array] = []
    for _ in range(levels):
        bands = haar(x)
        x, detail = bands[..., :features], bands[..., features:]
        details.insert(0, detail)
    return x, *details


def inverse_haar_pyramid(pyramid: Sequence[Array]) -> Float[Array, "*batch height width features"]:
    """Return the map that `haar_pyramid` gives this transform of.

    Raises:
      ValueError: if there is nothing in it, or a level's details are not three bands.
    """
    if not pyramid:
        raise ValueError(f"pyramid={tuple(pyramid)} must begin with averages; pass what haar_pyramid returns")
    x, *details = pyramid
    for detail in details:
        if detail.shape != (*x.shape[:-1], 3 * x.shape[-1]):
            raise ValueError(
                f"details of shape {detail.shape} must be {(*x.shape[:-1], 3 * x.shape[-1])}, three bands of the "
                f"averages' {x.shape}; pass what haar_pyramid returns"
            )
        x = inverse_haar(jnp.concatenate([x, detail], axis=-1))
    return x


def _mix(x: Array, features: int) -> Array:
    """Return the sums over four parts of the last axis that the matrix gives."""
    parts = [x[..., part * features : (part + 1) * features] for part in range(4)]
    return jnp.concatenate([sum(sign * part for sign, part in zip(row, parts, strict=True)) for row in _HAAR], axis=-1)
