"""Apply a function made for inputs of one size to larger ones, patch by patch, and blend what overlaps."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.ops.patches import crop, split_shape

MODES = ("gaussian", "constant")


def sliding_window(
    apply: Callable[[Array], Array],
    x: Shaped[Array, "*axes channels"],
    size: Sequence[int],
    *,
    overlap: float = 0.5,
    mode: str = "gaussian",
    batch: int = 1,
) -> Shaped[Array, "*axes features"]:
    """Return the weighted mean of what `apply` gives for overlapping patches of `x`.

    out[p] = sum_k w(p - s_k) apply(x[s_k : s_k + size])[p - s_k] / sum_k w(p - s_k), with starts s_k a step of
    `size * (1 - overlap)` apart along each axis, the last one moved back so that it ends with the input. The weights w
    are 1, or a Gaussian about the middle of the patch with a standard deviation of an eighth of its size, but at least
    0.001, so that what only corners see is divided by no vanishing number.

    Along axes where `x` is shorter than a patch it is padded with zeros on both sides, the odd one at the end, and the
    output is cropped. Placements depend on shapes alone, and the patches run in a `jax.lax.scan`: under `jit` the
    program and its memory do not grow with their number. The sums are in float32 or better.

    Args:
      apply: maps patches `[n, *size, channels]` to `[n, *size, features]`, each for itself; a model as
        `functools.partial(model.apply, variables)`.
      x: input `[*batch, *space, channels]`, one image or volume or many.
      size: size of a patch along each spatial axis; its length says how many there are.
      overlap: share of a patch that it has in common with the next along an axis, in [0, 1).
      mode: "gaussian" or "constant", the weights.
      batch: patches per call of `apply`.

    Returns:
      `[*batch, *space, features]` in the dtype that `apply` returns.

    Raises:
      ValueError: if an argument is out of its range, `x` has too few axes, or `apply` changes the size.
    """
    size = tuple(size)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {list(MODES)}; pass one of them")
    if not 0.0 <= overlap < 1.0:
        raise ValueError(f"overlap={overlap} must lie in [0, 1); pass less, such as 0.5")
    if batch < 1 or any(length < 1 for length in size):
        raise ValueError(f"size={size} and batch={batch} must be positive; pass at least 1")
    leading, space, channels = split_shape(x.shape, len(size))
    missing = [max(0, length - have) for length, have in zip(size, space, strict=True)]
    before = [total // 2 for total in missing]
    ends = [(total // 2, total - total // 2) for total in missing]
    x = jnp.pad(x.reshape(-1, *space, channels), [(0, 0), *ends, (0, 0)])

    found = jax.eval_shape(apply, jax.ShapeDtypeStruct((batch, *size, channels), x.dtype))
    if found.shape[:-1] != (batch, *size):
        raise ValueError(
            f"apply must keep the size [{batch}, {', '.join(map(str, size))}, features] of its patches; got "
            f"{found.shape}; resample in it"
        )
    dtype = at_least_float32(found.dtype)
    weight = jnp.asarray(patch_weights(size, mode), dtype)[..., None]
    starts = placements(x.shape[1:-1], size, overlap)
    corners = np.array([(image, *start, 0) for image in range(len(x)) for start in starts], np.int32)
    # The last call is filled up with placements that count for nothing.
    idle = -len(corners) % batch
    counts = np.concatenate([np.ones(len(corners)), np.zeros(idle)]).reshape(-1, batch)
    corners = np.concatenate([corners, np.repeat(corners[:1], idle, axis=0)]).reshape(-1, batch, corners.shape[-1])

    def add(total: Array, part: Array, place: Array) -> Array:
        before = jax.lax.dynamic_slice(total, tuple(place), part.shape)
        return jax.lax.dynamic_update_slice(total, before + part, tuple(place))

    def step(sums: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        total, weights = sums
        places, real = chunk
        patches = jax.vmap(lambda place: jax.lax.dynamic_slice(x, tuple(place), (1, *size, channels))[0])(places)
        outputs = apply(patches).astype(dtype)
        for index in range(batch):
            share = weight * real[index]
            total = add(total, (outputs[index] * share)[None], places[index])
            weights = add(weights, share[None], places[index])
        return (total, weights), None

    zeros = (jnp.zeros((*x.shape[:-1], found.shape[-1]), dtype), jnp.zeros((*x.shape[:-1], 1), dtype))
    (total, weights), _ = jax.lax.scan(step, zeros, (jnp.asarray(corners), jnp.asarray(counts, dtype)))
    out = (total / weights)[(slice(None), *(slice(start, None) for start in before))]
    return crop(out, space).reshape(*leading, *space, found.shape[-1]).astype(found.dtype)


def placements(space: Sequence[int], size: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """Return where the patches begin that cover an input no smaller than one, in row-major order."""
    rows = []
    for length, patch in zip(space, size, strict=True):
        step = max(1, int(patch * (1 - overlap)))
        count = 1 + math.ceil((length - patch) / step)
        rows.append([min(index * step, length - patch) for index in range(count)])
    return list(itertools.product(*rows))


def patch_weights(size: Sequence[int], mode: str) -> np.ndarray:
    """Return the weight of each entry of a patch, see `sliding_window`."""
    weights: Any = np.ones(())
    for length in size:
        offsets = np.arange(length) - (length - 1) / 2
        row = np.exp(-0.5 * (offsets / (0.125 * length)) ** 2) if mode == "gaussian" else np.ones(length)
        weights = weights[..., None] * row
    return np.maximum(weights, 1e-3)
