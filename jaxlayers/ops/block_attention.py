"""Attention from blocks of tokens to chosen blocks of tokens, as dense tiles: which blocks, and the product.

Which blocks a block sees depends on shapes alone and is NumPy: under `jit` it is a constant made while tracing. Lists
of blocks are pairs `(index, valid)` of arrays `[blocks, seen]`: the numbers of the blocks seen, in row-major order of
the grid and each at most once, and whether the entry counts.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlayers.core.dtypes import at_least_float32

BlockLists = tuple[np.ndarray, np.ndarray]


def neighbourhood(grid: Sequence[int], radius: int = 1) -> BlockLists:
    """Return the blocks at most `radius` away along each axis, clipped at the borders of the grid.

    Args:
      grid: number of blocks along each axis.
      radius: 1 gives 3 x 3 blocks, of which a corner has 4.

    Raises:
      ValueError: if the radius is negative or the grid is empty.

    Example:
      >>> from jaxlayers.ops.block_attention import neighbourhood
      >>> index, valid = neighbourhood((4,))
      >>> [row[kept].tolist() for row, kept in zip(index, valid)]
      [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    """
    if radius < 0:
        raise ValueError(f"radius={radius} must not be negative; set radius (0 for the block alone)")
    places = _places(grid)
    spans = [min(2 * radius + 1, length) for length in grid]
    # Near a border the span is moved inside; what is then too far away does not count.
    first = np.clip(places - radius, 0, np.asarray(grid) - spans)
    steps = np.array(list(itertools.product(*map(range, spans)))).reshape(-1, len(spans))
    seen = first[:, None] + steps[None]
    valid = np.all(np.abs(seen - places[:, None]) <= radius, axis=-1)
    index = np.ravel_multi_index(tuple(np.moveaxis(seen, -1, 0)), tuple(grid))
    return index.astype(np.int32), valid


def criss_cross(grid: Sequence[int]) -> BlockLists:
    """Return the blocks that share a coordinate: a row and a column of a plane, three planes of a volume.

    Args:
      grid: number of blocks along each axis.

    Raises:
      ValueError: if the grid is empty.

    Example:
      >>> from jaxlayers.ops.block_attention import criss_cross
      >>> criss_cross((2, 3))[0].tolist()[0]
      [0, 1, 2, 3]
    """
    places = _places(grid)
    shares = np.any(places[:, None] == places[None], axis=-1)
    # Every block shares a coordinate with as many others.
    index = np.nonzero(shares)[1].reshape(len(places), -1).astype(np.int32)
    return index, np.ones(index.shape, bool)


def _places(grid: Sequence[int]) -> np.ndarray:
    """Return the coordinates `[blocks, axes]` of the blocks of a grid."""
    if not len(grid) or min(grid) < 1:
        raise ValueError(f"grid={tuple(grid)} must have a positive entry for each axis; pass at least one block")
    return np.array(list(itertools.product(*map(range, grid)))).reshape(-1, len(grid))


def dense_attention(
    query: Float[Array, "*batch queries heads dim"],
    key: Float[Array, "*batch keys key_heads dim"],
    value: Float[Array, "*batch keys key_heads value_dim"],
    *,
    mask: Bool[Array, "*#batch 1 #queries keys"] | None = None,
    scale: float | None = None,
) -> Float[Array, "*batch queries heads value_dim"]:
    """Return softmax(scale Q K^T) V in the layout of `jax.nn.dot_product_attention`, its softmax in float32 or better.

    Args:
      query: queries.
      key: keys; each of their heads serves an equal number of consecutive heads of the queries.
      value: values.
      mask: true where a query may attend to a key; every query must see at least one.
      scale: factor of the scores; `None` = 1 / sqrt(dim).

    Raises:
      ValueError: if the heads of the keys do not divide those of the queries.
    """
    *batch, queries, heads, dim = query.shape
    key_heads = key.shape[-2]
    if heads % key_heads:
        raise ValueError(f"the {heads} heads of the queries must be a multiple of the {key_heads} of the keys")
    scale = dim**-0.5 if scale is None else scale
    query = (query * jnp.asarray(scale, query.dtype)).reshape(*batch, queries, key_heads, heads // key_heads, dim)
    logits = jnp.einsum("...qhgd,...khd->...hgqk", query, key)
    scores = logits.astype(at_least_float32(logits.dtype))
    where = None if mask is None else jnp.broadcast_to(jnp.expand_dims(mask, -3), scores.shape)
    weights = jax.nn.softmax(scores, axis=-1, where=where).astype(value.dtype)
    out = jnp.einsum("...hgqk,...khd->...qhgd", weights, value)
    return out.reshape(*batch, queries, heads, value.shape[-1])


def block_attention(
    query: Float[Array, "*batch blocks queries heads dim"],
    key: Float[Array, "*batch blocks keys key_heads dim"],
    value: Float[Array, "*batch blocks keys key_heads value_dim"],
    blocks: BlockLists,
    *,
    key_mask: Bool[np.ndarray, "blocks keys"] | None = None,
    shared: tuple[Array, Array] | None = None,
    shared_mask: Bool[Array, "*batch shared"] | None = None,
    scale: float | None = None,
    attend: Callable[..., Array] = dense_attention,
    blocks_at_once: int | None = None,
) -> Float[Array, "*batch blocks queries heads value_dim"]:
    """Let the queries of each block attend to the tokens of its list of blocks, and to tokens that all blocks share.

    The keys and values of a list are gathered and multiplied as one dense tile; there is no array with an entry for
    each pair of tokens.

    Args:
      query: queries of each block.
      key: keys of each block.
      value: values of each block.
      blocks: which blocks each block sees, such as `neighbourhood(grid)`.
      key_mask: false for keys that nobody may see, such as padding; a block must see at least one.
      shared: keys `[*batch, shared, key_heads, dim]` and values of tokens that every block sees; `None` = none.
      shared_mask: false for those of them that nobody may see.
      scale: factor of the scores; `None` = 1 / sqrt(dim).
      attend: the product of a tile, called as `attend(query, key, value, mask=..., scale=...)` with one batch axis:
        `dense_attention`, or `jax.nn.dot_product_attention` with an implementation of your choice.
      blocks_at_once: number of blocks whose tiles are in memory together; `None` = all. The backward pass computes the
        tiles anew instead of keeping those of all blocks.

    Returns:
      What each query gets.

    Raises:
      ValueError: if the lists are not of as many blocks, a mask is of no tokens, or `blocks_at_once` is not positive.
    """
    index, valid = blocks
    *batch, count, queries, heads, _ = query.shape
    if index.shape != valid.shape or len(index) != count:
        raise ValueError(f"lists of shapes {index.shape} and {valid.shape} must be of the {count} blocks; pass those")
    if blocks_at_once is not None and blocks_at_once < 1:
        raise ValueError(f"blocks_at_once={blocks_at_once} must be positive; set it, or None for all blocks")
    if shared_mask is not None and (shared is None or shared_mask.shape[-1] != shared[0].shape[-3]):
        raise ValueError(f"shared_mask of shape {shared_mask.shape} must be of the shared tokens; pass those, or None")
    flat = math.prod(batch)
    query, key, value = (x.reshape(flat, *x.shape[len(batch) :]) for x in (query, key, value))
    seen = np.broadcast_to(valid[:, :, None], (*valid.shape, key.shape[-3]))
    if key_mask is not None:
        seen = seen & key_mask[index]
    seen = seen.reshape(count, -1)
    masked = not seen.all() or shared_mask is not None
    common = [] if shared is None else [x.reshape(flat, *x.shape[len(batch) :]) for x in shared]
    width = common[0].shape[1] if common else 0
    common_seen = jnp.ones((flat, width), bool) if shared_mask is None else shared_mask.reshape(flat, width)

    def one_block(query: Array, index: Array, seen: Array) -> Array:
        tiles = [jnp.take(x, index, axis=1).reshape(flat, -1, *x.shape[-2:]) for x in (key, value)]
        if common:
            tiles = [jnp.concatenate([tile, more], axis=1) for tile, more in zip(tiles, common, strict=True)]
        mask = None
        if masked:
            mask = jnp.concatenate([jnp.broadcast_to(seen, (flat, len(seen))), common_seen], axis=1)[:, None, None]
        return attend(query, *tiles, mask=mask, scale=scale)

    operands = jnp.moveaxis(query, 1, 0), jnp.asarray(index), jnp.asarray(seen)
    if blocks_at_once is None or blocks_at_once >= count:
        out = jax.vmap(one_block)(*operands)
    else:
        # In a loop nothing merges the recomputation with the first computation.
        again = jax.checkpoint(one_block, prevent_cse=False)
        out = jax.lax.map(lambda each: again(*each), operands, batch_size=blocks_at_once)
    return jnp.moveaxis(out, 0, 1).reshape(*batch, count, queries, heads, out.shape[-1])
