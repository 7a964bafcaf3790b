"""Cutting arrays with one to three spatial axes into equal blocks, and putting them together again."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxlayers.core.types import Dtype


def to_blocks(x: Shaped[Array, "*axes features"], block: Sequence[int]) -> Shaped[Array, "*axes_and_block features"]:
    """Cut the spatial axes of `x` into blocks: `[*batch, *size, features]` to `[*batch, *grid, *block, features]`.

    Args:
      x: array whose last axes are the `len(block)` spatial ones and the features.
      block: size of a block along each spatial axis.

    Returns:
      The blocks, with `grid = size / block`.

    Raises:
      ValueError: if `x` has too few axes or a spatial axis does not divide by its block.
    """
    batch, size, features = split_shape(x.shape, len(block))
    if any(length % step for length, step in zip(size, block, strict=True)):
        raise ValueError(f"spatial size {size} must be divisible by the block {tuple(block)}; pad the input first")
    rank = len(block)
    cut = [part for length, step in zip(size, block, strict=True) for part in (length // step, step)]
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2), 2 * rank]
    x = x.reshape(*batch, *cut, features)
    return jnp.transpose(x, [*range(len(batch)), *(len(batch) + axis for axis in order)])


def from_blocks(x: Shaped[Array, "*axes_and_block features"], rank: int) -> Shaped[Array, "*axes features"]:
    """Return the inverse of `to_blocks` for `rank` spatial axes."""
    batch, shape, features = split_shape(x.shape, 2 * rank)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    x = jnp.transpose(x, [*range(len(batch)), *(len(batch) + axis for axis in order), x.ndim - 1])
    size = [grid * step for grid, step in zip(shape[:rank], shape[rank:], strict=True)]
    return x.reshape(*batch, *size, features)


def to_patches(
    x: Shaped[Array, "*axes features"], patch: Sequence[int], *, first_axis_fastest: bool = False
) -> Shaped[Array, "*grid patch_features"]:
    """Move each patch into the feature axis: `[*batch, *size, features]` to `[*batch, *grid, prod(patch) features]`.

    Args:
      x: array whose last axes are the `len(patch)` spatial ones and the features.
      patch: size of a patch along each spatial axis.
      first_axis_fastest: order of the pixels in a patch; by default the last spatial axis runs fastest. Features
        always run faster than pixels.

    Returns:
      The patches.

    Raises:
      ValueError: if `x` has too few axes or a spatial axis does not divide by its patch.
    """
    blocks = to_blocks(x, patch)
    rank, features = len(patch), x.shape[-1]
    if first_axis_fastest:
        first = blocks.ndim - 1 - rank
        blocks = jnp.transpose(blocks, [*range(first), *reversed(range(first, first + rank)), blocks.ndim - 1])
    return blocks.reshape(*blocks.shape[: -1 - rank], math.prod(patch) * features)


def project_patches(
    x: Float[Array, "*batch height width features"],
    patch: tuple[int, int],
    kernel: Float[Array, "patch_features out"],
    *,
    dtype: Dtype | None = None,
) -> Float[Array, "*batch new_height new_width out"]:
    """Return p W of the patches p of a map, whose pixels have the first axis fastest, without making them.

    It is a convolution of the map with a stride of a patch: moving the pixels into the features, where these do not
    fill the lanes of a TPU, costs more there than everything else.

    Args:
      x: map; the patch divides it.
      patch: size of a patch.
      kernel: W, of the dtype of `x`.
      dtype: of the result; `None` = that of `x`.

    Raises:
      ValueError: if the patch does not divide the map.
    """
    *batch, height, width, features = x.shape
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"map of {(height, width)} must be a multiple of patch={patch}; pad it")
    product = jax.lax.conv_general_dilated(
        x.reshape(-1, height, width, features),
        kernel.reshape(patch[1], patch[0], features, -1).swapaxes(0, 1),
        patch,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )
    return product.reshape(*batch, height // patch[0], width // patch[1], -1)


def project_normed_patches(
    x: Float[Array, "*batch height width features"],
    patch: tuple[int, int],
    scale: Float[Array, "patch_features"],
    offset: Float[Array, "patch_features"],
    kernel: Float[Array, "patch_features out"],
    *,
    epsilon: float,
) -> Float[Array, "*batch new_height new_width out"]:
    """Return LayerNorm(p) W of the patches p of a map, whose pixels have the first axis fastest, without making them.

    It is r (p * (g W) - m sum(g W)) + b W, with mean m and r = 1 / sqrt(var + epsilon) of each patch, and the product
    with g W that of `project_patches`. Statistics and sums are in float32.

    Args:
      x: map; the patch divides it.
      patch: size of a patch.
      scale: g, for each feature of a patch.
      offset: b, likewise.
      kernel: W.
      epsilon: added to the variance.

    Returns:
      A map of `x`'s dtype.

    Raises:
      ValueError: if the patch does not divide the map.
    """
    weights = (scale.astype(jnp.float32)[:, None] * kernel.astype(jnp.float32)).astype(x.dtype)
    product = project_patches(x, patch, weights, dtype=jnp.float32)
    grid, count = product.shape[-3:-1], x.shape[-1] * math.prod(patch)

    def mean(each: Array) -> Array:
        """Return the mean over each patch of what is summed over features."""
        blocks = each.reshape(*each.shape[:-2], grid[0], patch[0], grid[1], patch[1])
        return blocks.sum((-3, -1))[..., None] / count

    wide = x.astype(jnp.float32)
    centre = mean(wide.sum(-1))
    variance = jnp.maximum(mean(jnp.square(wide).sum(-1)) - jnp.square(centre), 0)
    # Sums of the rounded weights, so that a constant that is added to a patch goes out exactly.
    product = (product - centre * weights.astype(jnp.float32).sum(0)) * jax.lax.rsqrt(variance + epsilon)
    product += offset.astype(jnp.float32) @ kernel.astype(jnp.float32)
    return product.astype(x.dtype)


def from_patches(
    x: Shaped[Array, "*grid patch_features"], patch: Sequence[int], *, first_axis_fastest: bool = False
) -> Shaped[Array, "*axes features"]:
    """Return the inverse of `to_patches`.

    Raises:
      ValueError: if the features do not divide by the number of pixels in a patch.
    """
    pixels, rank = math.prod(patch), len(patch)
    if x.shape[-1] % pixels:
        raise ValueError(f"features={x.shape[-1]} must be divisible by the {pixels} pixels of patch={tuple(patch)}")
    lengths = tuple(reversed(patch)) if first_axis_fastest else tuple(patch)
    blocks = x.reshape(*x.shape[:-1], *lengths, x.shape[-1] // pixels)
    if first_axis_fastest:
        first = blocks.ndim - 1 - rank
        blocks = jnp.transpose(blocks, [*range(first), *reversed(range(first, first + rank)), blocks.ndim - 1])
    return from_blocks(blocks, rank)


def pad_to_multiple(x: Shaped[Array, "*axes features"], multiple: Sequence[int]) -> Shaped[Array, "*padded features"]:
    """Pad the last `len(multiple)` spatial axes of `x` with zeros at their ends, up to multiples of `multiple`."""
    batch, size, _ = split_shape(x.shape, len(multiple))
    if not any(length % step for length, step in zip(size, multiple, strict=True)):
        return x
    ends = [(0, -length % step) for length, step in zip(size, multiple, strict=True)]
    return jnp.pad(x, [(0, 0)] * len(batch) + ends + [(0, 0)])


def crop(x: Shaped[Array, "*axes features"], size: Sequence[int]) -> Shaped[Array, "*cropped features"]:
    """Keep the first `size` entries of the spatial axes of `x`: the inverse of padding at the ends."""
    _, found, _ = split_shape(x.shape, len(size))
    if found == tuple(size):
        return x
    return x[(..., *(slice(length) for length in size), slice(None))]


def split_shape(shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return leading axes, the last `rank` spatial axes, and the number of features of a channels-last shape.

    Raises:
      ValueError: if there are fewer than `rank + 1` axes, or a spatial axis is empty.
    """
    if len(shape) < rank + 1:
        raise ValueError(f"an input with {rank} spatial axes needs at least {rank + 1} axes; got shape {tuple(shape)}")
    first = len(shape) - 1 - rank
    size = tuple(shape[first:-1])
    if 0 in size:
        raise ValueError(f"spatial size {size} must not be empty; pass at least one pixel along each axis")
    return tuple(shape[:first]), size, shape[-1]
