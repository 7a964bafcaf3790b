"""Robust inference by crop selection: the picture itself says where to look, so that shifts select the same content."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32

Size = tuple[int, int]


def fixed_filter(size: int = 5, *, seed: int = 0) -> np.ndarray:
    """Return a filter `[size, size]` of fixed random entries, with mean zero and norm one, in float64.

    Raises:
      ValueError: if the size is below 2.
    """
    if size < 2:
        raise ValueError(f"filter_size={size} must be at least 2; set filter_size")
    kernel = np.random.default_rng(seed).normal(size=(size, size))
    kernel -= kernel.mean()
    return kernel / np.linalg.norm(kernel)


def filter_response(
    x: Float[Array, "*batch height width channels"], kernel: np.ndarray, *, cyclic: bool = False
) -> Float[Array, "*batch rows columns"]:
    """Return the response of a filter at every window of the mean of the channels, in float32 or better.

    Every window is summed in the same order, so that equal windows give equal responses to the bit, wherever they lie.

    Args:
      x: images.
      kernel: `[rows, columns]`; the first entry meets the pixel that the response is written to.
      cyclic: windows go on at the other side; otherwise only whole windows are scored.

    Returns:
      `[*batch, height, width]` if cyclic, else `[*batch, height - rows + 1, width - columns + 1]`.

    Raises:
      ValueError: if the filter does not fit into the image.
    """
    if kernel.shape[0] > x.shape[-3] or kernel.shape[1] > x.shape[-2]:
        raise ValueError(
            f"a filter of shape {kernel.shape} must fit into images of shape {x.shape}; set a smaller filter_size"
        )
    height, width = x.shape[-3], x.shape[-2]
    x = x.astype(at_least_float32(x.dtype))
    plane = x[..., 0]
    for channel in range(1, x.shape[-1]):
        plane = plane + x[..., channel]
    size = (height, width) if cyclic else (height - kernel.shape[0] + 1, width - kernel.shape[1] + 1)
    if cyclic:
        after = [(0, 0)] * (plane.ndim - 2) + [(0, length - 1) for length in kernel.shape]
        plane = jnp.pad(plane, after, mode="wrap")
    total: Any = 0.0
    for (row, column), weight in np.ndenumerate(kernel):
        total = total + float(weight) * plane[..., row : row + size[0], column : column + size[1]]
    return total


def select_crop(
    x: Float[Array, "*batch height width channels"], crop: Size, kernel: np.ndarray
) -> tuple[Float[Array, "*batch rows columns channels"], Int[Array, "*batch 2"]]:
    """Return the crop at whose centre a filter responds most, and the (row, column) of its first pixel.

    Of several best crops the first in reading order is taken, which is the same content after a shift too.

    Args:
      x: images.
      crop: (rows, columns) of the crop.
      kernel: the filter, no larger than the crop.

    Returns:
      The crops, in the dtype of `x`, and their places. No gradient reaches `x` through the places.

    Raises:
      ValueError: if the crop does not fit into the image, or the filter into the crop.
    """
    _check_image(x)
    height, width = x.shape[-3], x.shape[-2]
    if len(crop) != 2 or min(crop) < 1 or crop[0] > height or crop[1] > width:
        raise ValueError(f"crop={tuple(crop)} must be positive and fit into images of shape {x.shape}; set crop")
    if kernel.shape[0] > crop[0] or kernel.shape[1] > crop[1]:
        raise ValueError(f"a filter of shape {kernel.shape} must fit into crop={tuple(crop)}; set filter_size or crop")
    score = filter_response(jax.lax.stop_gradient(x), kernel)
    # The windows at the centres of all crops that fit.
    places = (height - crop[0] + 1, width - crop[1] + 1)
    start = [(crop[axis] - kernel.shape[axis]) // 2 for axis in (0, 1)]
    score = score[..., start[0] : start[0] + places[0], start[1] : start[1] + places[1]]
    best = jnp.argmax(score.reshape(*score.shape[:-2], -1), axis=-1)
    position = jnp.stack([best // places[1], best % places[1]], axis=-1)
    return _read_from(x, position, crop), position


def canonical_position(x: Float[Array, "*batch height width channels"], kernel: np.ndarray) -> Int[Array, "*batch 2"]:
    """Return the (row, column) that moves with the cyclic shifts of an image.

    It is where a filter responds most. If several places do, the image that starts at each is compared pixel by pixel,
    channel by channel, in reading order, and the largest at the first difference is taken. Places that are still equal
    start the same image (it is periodic), and the first of them is returned.

    Args:
      x: images.
      kernel: the filter.

    Returns:
      The places. For an image with NaN, where nothing compares, some place.

    Raises:
      ValueError: if the filter does not fit into the image.
    """
    _check_image(x)
    height, width, channels = x.shape[-3:]
    x = jax.lax.stop_gradient(x)
    score = filter_response(x, kernel, cyclic=True)

    def keep(candidates: Array, key: Array) -> Array:
        best = jnp.max(jnp.where(candidates, key, -jnp.inf), axis=(-2, -1), keepdims=True)
        return candidates & (key == best)

    def tied(state: tuple[Array, Array]) -> Array:
        step, candidates = state
        return (step < height * width * channels) & jnp.any(jnp.sum(candidates, axis=(-2, -1)) > 1)

    def compare(state: tuple[Array, Array]) -> tuple[Array, Array]:
        step, candidates = state
        pixel, channel = step // channels, step % channels
        plane = jax.lax.dynamic_index_in_dim(x, channel, axis=-1, keepdims=False)
        plane = jnp.take(plane, (jnp.arange(height) + pixel // width) % height, axis=-2)
        plane = jnp.take(plane, (jnp.arange(width) + pixel % width) % width, axis=-1)
        return step + 1, keep(candidates, plane)

    everywhere = jnp.ones(score.shape, bool)
    _, candidates = jax.lax.while_loop(tied, compare, (jnp.zeros((), jnp.int32), keep(everywhere, score)))
    best = jnp.argmax(candidates.reshape(*candidates.shape[:-2], -1), axis=-1)
    return jnp.stack([best // width, best % width], axis=-1)


def canonical_roll(
    x: Float[Array, "*batch height width channels"], kernel: np.ndarray
) -> Float[Array, "*batch height width channels"]:
    """Return the image rolled so that its `canonical_position` comes first: the same for every cyclic shift of it."""
    return _read_from(x, canonical_position(x, kernel), (x.shape[-3], x.shape[-2]))


def _read_from(x: Array, position: Array, size: Size) -> Array:
    """Return the windows of that size that begin at the given places, going on at the other side."""
    batch, (height, width) = x.shape[:-3], x.shape[-3:-1]

    def one(x: Array, position: Array) -> Array:
        rows, columns = ((position[i] + jnp.arange(size[i])) % (height, width)[i] for i in (0, 1))
        return x[rows[:, None], columns]

    read = jax.vmap(one)(x.reshape(-1, *x.shape[-3:]), position.reshape(-1, 2))
    return read.reshape(*batch, *read.shape[1:])


def _check_image(x: Array) -> None:
    if x.ndim < 3 or 0 in x.shape[-3:]:
        raise ValueError(f"image of shape {x.shape} must be [*batch, height, width, channels]; add axes")


def expected_consistency(shape: Size, crop: Size, shift: Size) -> float:
    """Return how often a shifted view selects the same crop, if scores come in any order with equal probability.

    Of K places a view has, C are in both views after the shift; the best of the 2 K - C places of both is among those
    with probability C / (2 K - C), and then, and only then, both views select it. For one pixel along an axis with k
    places that is (k - 1) / (k + 1): smaller crops are more consistent, at the price of what they show.

    Args:
      shape: (height, width) of the views.
      crop: (rows, columns) of the crop.
      shift: (rows, columns) by which the second view lies off the first.

    Returns:
      The probability.

    Example:
      >>> from jaxlayers.equivariant.rics import expected_consistency
      >>> round(expected_consistency((256, 256), (224, 224), (1, 0)), 3)
      0.941
    """
    counts = [length - size + 1 for length, size in zip(shape, crop, strict=True)]
    common = float(np.prod([max(0, count - abs(step)) for count, step in zip(counts, shift, strict=True)]))
    return common / (2 * float(np.prod(counts)) - common)


class RICS(nn.Module):
    """Show a classifier only the crop that the picture itself selects, or roll the picture to where it begins.

    out = classifier(x[p : p + crop]), p = argmax_p (filter * x)[p + (crop - filter) // 2] over all crops that fit; for
    the cyclic version (`crop=None`) out = classifier(roll(x, -p)) with p from `canonical_position`. The filter is
    fixed, nothing is trained, and the classifier, which may be frozen, needs no change.

    Symmetry:
      Cyclic version: exactly invariant, to the bit, to cyclic shifts by whole pixels, for any classifier and any image
      (without NaN). Ties are broken by comparing pixels, so that they shift too.
      Crops: invariant, to the bit, to shifts of the view by whole pixels whenever the selected crop is in both views
      and the best in both; `expected_consistency` says how often. Shifts by parts of a pixel are not covered. On noise
      of 28 x 28 pixels moved by one, a random classifier changed its mind for 9 % of the selected crops of 12 x 12
      and for 62 % of centre crops.

    Attributes:
      classifier: any module that takes images; the keyword `deterministic` is handed on if its call takes it.
      crop: (rows, columns) of the crop; `None` is the cyclic version.
      filter_size: side of the filter, at least 2 and within the crop.
      seed: of the filter's entries.

    Cost:
      filter_size^2 multiply-adds a pixel, and the classifier once. Ties in the cyclic version cost a pass over the
      image for each pixel compared, until they differ: a constant image takes height x width x channels passes.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import RICS
      >>> layer = RICS(nn.Sequential([lambda x: x.reshape(*x.shape[:-3], -1), nn.Dense(3)]), filter_size=3)
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> out, variables = layer.init_with_output(jax.random.key(1), x)
      >>> bool((layer.apply(variables, jnp.roll(x, (3, 5), axis=(1, 2))) == out).all())
      True

    Source:
      Shifman, Weiss, Lost in Translation: Modern Neural Networks Still Struggle With Small Realistic Image
      Transformations, ECCV 2024 (arXiv 2404.07153).

    Differs:
      The score, a random filter of mean zero at the centre of the crop, is chosen here: any score that shifts with the
      picture has the property. It was not compared with the authors' score. The tie-break by pixels is added.
    """

    classifier: nn.Module
    crop: Size | None = None
    filter_size: int = 5
    seed: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True) -> Any:
        """Classify images.

        Args:
          x: images; any leading axes that the classifier takes.
          deterministic: handed on to the classifier.

        Returns:
          What the classifier returns.

        Raises:
          ValueError: if `x` is not `[*batch, height, width, channels]`, or the crop does not fit into the image or the
            filter into the crop.
        """
        kernel = fixed_filter(self.filter_size, seed=self.seed)
        if self.crop is None:
            view = canonical_roll(x, kernel)
        else:
            view, _ = select_crop(x, self.crop, kernel)
        taken: Any = inspect.signature(type(self.classifier).__call__).parameters
        keywords = {"deterministic": deterministic} if "deterministic" in taken else {}
        return self.classifier(axes.constrain_map(view), **keywords)
