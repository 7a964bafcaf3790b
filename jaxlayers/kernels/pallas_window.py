"""Attention within windows as Pallas kernels for TPU: a group of windows in fast memory, from projections to output.

XLA gives an attention of small windows many copies: heads are cut out and put side by side, and tokens, scores and
their gradients each lie padded to tiles of their own. Here queries, keys and values are read once, their heads still
side by side; scores and weights exist in fast memory only, and the gradient computes them anew.

A score matrix of 49 tokens fills two fifths of a tile's 128 lanes. So heads are taken together, as many as fit side by
side: their keys are laid on the diagonal of a block matrix, and one product with the queries gives the scores of all of
them in one tile. The same matrix turns the gradient of the scores into that of the queries, and sums over the keys of
each head are products with a block matrix of ones. Each step is written down for several windows before the next one:
the compiler keeps to that order, and fills the latency of the matrix unit with the other windows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes

_LANES = 128
# Of what is written down for one step of the grid, in tiles of 64 x 128 scores; and the bytes of its blocks.
_MOST_TILES = 32
_MEMORY = 6 * 2**20
# Added to scores that a query may not see; two of them do not overflow, in bfloat16 neither.
_BLOCKED = -1e30


def window_attention(
    query: Float[Array, "*windows tokens features"],
    key: Float[Array, "*windows tokens features"],
    value: Float[Array, "*windows tokens features"],
    bias: Float[Array, "heads tokens tokens"],
    mask: Bool[Array, "*#grid tokens tokens"] | None = None,
    *,
    scale: Float[Array, "heads"] | None = None,
    shifts: Float[Array, "3 features"] | None = None,
    names: tuple[str, ...] = (axes.WINDOWS,),
) -> Float[Array, "*windows tokens features"]:
    """Return softmax(s Q K^T + B) V of every window and head; the heads' features lie side by side.

    Differentiable once, in reverse mode, with respect to all but the mask; scores and sums are in float32. On CPU the
    kernels are interpreted, which is slow and meant for tests. With a mesh in scope each device runs them on the batch
    and the heads that the logical rules give it, which the partitioner could not find itself.

    Args:
      query: queries, float32 or bfloat16.
      key: keys of the same dtype.
      value: values of the same dtype.
      bias: added to the scores, alike in every window.
      mask: true where a query (second axis) may attend to a key (last axis); each query may to at least one.
      scale: s of each head, by which the scores are multiplied in float32; `None` = 1.
      shifts: added to every query, key and value, in this order: the biases of the projections that they come from,
        whose gradients would else take XLA a pass over all tokens each; `None` = none.
      names: logical axes of the windows, one or more, which the mask has too.

    Returns:
      An array like the values.

    Raises:
      ValueError: if the heads do not divide the features, or the mask is not one for each window or for all.
    """
    heads, tokens, _ = bias.shape
    *leading, _, features = query.shape
    if features % heads:
        raise ValueError(f"features={features} must be divisible by the {heads} heads of the bias; pass such")
    wanted = (*leading[len(leading) - len(names) :], tokens, tokens)
    if mask is not None and (
        mask.ndim != len(wanted) or any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True))
    ):
        raise ValueError(f"mask of shape {mask.shape} must be {wanted}, or 1 where windows share one; pass such")
    mask = None if mask is None else jnp.broadcast_to(mask, wanted)
    blocked = None if mask is None else jnp.where(mask, 0, jnp.asarray(_BLOCKED, jnp.bfloat16))
    return _attend(names, query, key, value, bias, scale, shifts, blocked)


# Forward and backward, on all devices ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(names: tuple[str, ...], *operands: Any) -> Any:
    return _keep(names, *operands)[0]


def _keep(names: tuple[str, ...], *operands: Any) -> tuple[Any, Any]:
    query, _, _, bias, *_ = operands
    split = _Split.of(names, query.shape, len(bias))
    return split.on_devices(_forward, split.operands, split.tokens)(*operands), operands


def _return(names: tuple[str, ...], kept: Any, gradient: Any) -> tuple[Any, ...]:
    query, _, value, bias, scale, shifts, _ = kept
    split = _Split.of(names, query.shape, len(bias))

    def local(*operands: Any) -> tuple[Any, ...]:
        gradients = _backward(*operands)
        # Each device has those of what all windows share from its own windows.
        others = tuple(name for each in split.leading for name in each)
        return gradients[:3] + (jax.lax.psum(gradients[3:], others) if others else gradients[3:])

    each = split.on_devices(local, (*split.operands, split.tokens), split.operands[:6])
    *gradients, of_bias, of_scale, of_shifts = each(*kept, gradient.astype(value.dtype))
    shared = zip((of_bias, of_scale, of_shifts), (bias, scale, shifts), strict=True)
    return *gradients, *(None if x is None else found.astype(x.dtype) for found, x in shared), None


_attend.defvjp(_keep, _return)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the operands of a call are split over the mesh in scope.

    Attributes:
      leading: the mesh axes of each of `[*batch, *windows]`.
      heads: those of the heads.
      groups: number of axes of windows.
      names: all that are in scope.
    """

    leading: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...]
    groups: int
    names: frozenset[str]

    @classmethod
    def of(cls, names: tuple[str, ...], shape: Sequence[int], heads: int) -> "_Split":
        """Return what the logical rules say of tokens of that shape, as `core.axes.constrain_heads` does."""
        mesh = jax.sharding.get_abstract_mesh()
        free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
        known = (axes.BATCH, *names, axes.HEADS)[-(len(shape) - 1) :]
        found = axes.split((*shape[:-2], heads), *known)
        found = tuple(tuple(name for name in each if name in free) for each in found)
        more = ((),) * (len(shape) - 1 - len(known))
        return cls((*more, *found[:-1]), found[-1], len(names), free)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(*(each or None for each in self.leading), None, self.heads or None)

    @property
    def operands(self) -> tuple[PartitionSpec, ...]:
        """Those of queries, keys, values, bias, scale, shifts and masks."""
        heads, windows = self.heads or None, (each or None for each in self.leading[-self.groups :])
        shared = (PartitionSpec(heads), PartitionSpec(heads), PartitionSpec(None, heads))
        return *(self.tokens,) * 3, *shared, PartitionSpec(*windows)

    def on_devices(self, local: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any) -> Callable[..., Any]:
        """Return `local` run by each device on its part of the operands; one of them may be `None`."""
        if not self.names:
            return local

        def everywhere(*operands: Any) -> Any:
            specs = tuple(None if x is None else spec for x, spec in zip(operands, in_specs, strict=True))
            # The results of a kernel bear no types that say over which axes they vary.
            return jax.shard_map(
                local, in_specs=specs, out_specs=out_specs, axis_names=set(self.names), check_vma=False
            )(*operands)

        return everywhere


# On one device --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the operands of a call lie in blocks.

    Attributes:
      windows: number of windows.
      tokens: tokens of a window.
      heads: number of heads.
      dim: features of a head.
      rows: tokens with those that fill up a tile.
      together: heads whose scores lie side by side.
      head_block: heads of a block.
      window_block: windows of a block.
      masks: windows that have masks of their own; 0 = none.
      scaled: whether scores are multiplied by a number for each head.
    """

    windows: int
    tokens: int
    heads: int
    dim: int
    rows: int
    together: int
    head_block: int
    window_block: int
    masks: int
    scaled: bool

    @classmethod
    def of(cls, query: Any, bias: Any, scale: Any, blocked: Any) -> "_Layout":
        """Return the layout for tokens `[windows, tokens, features]`."""
        windows, tokens, features = query.shape
        heads = len(bias)
        dim = features // heads
        sublanes = 8 * 4 // query.dtype.itemsize
        rows = -(-tokens // sublanes) * sublanes
        together = max(1, min(heads, _LANES // rows, _LANES // dim))
        # The features of a block are whole tiles, or all there are.
        whole = (count for count in range(together, heads, together) if count * dim % _LANES == 0 == heads % count)
        head_block = next(whole, heads)
        masks = 0 if blocked is None else len(blocked)
        groups = -(-head_block // together)
        tiles = groups * -(-rows // 64) * -(-together * rows // _LANES)
        lanes = -(-head_block * dim // _LANES) * _LANES
        # Of two blocks at a time for each of seven operands and results.
        most = min(_MOST_TILES // tiles, _MEMORY // (14 * rows * lanes * query.dtype.itemsize))
        together_windows = math.gcd(windows, masks or windows)
        window_block = max(count for count in range(1, max(1, most) + 1) if together_windows % count == 0)
        scaled = scale is not None
        return cls(windows, tokens, heads, dim, rows, together, head_block, window_block, masks, scaled)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """The first head and the number of heads of each group in a block."""
        return tuple(
            (first, min(self.together, self.head_block - first)) for first in range(0, self.head_block, self.together)
        )

    @property
    def width(self) -> int:
        """Lanes of the scores of a group."""
        return self.together * self.rows

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of heads and, innermost, of windows."""
        return self.heads // self.head_block, self.windows // self.window_block

    def pack(self, bias: Any, scale: Any) -> Any:
        """Return the bias as `[groups of all blocks, rows, width]`, where keys that fill up are blocked.

        Eight more rows follow if there is a scale, of which the first has that of each head.
        """
        missing = self.rows - self.tokens
        padded = jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, missing), (0, 0)))
        padded = jnp.pad(padded, ((0, 0), (0, 0), (0, missing)), constant_values=_BLOCKED)
        if self.scaled:
            rows = jnp.broadcast_to(scale.astype(jnp.float32)[:, None, None], (self.heads, 8, self.rows))
            padded = jnp.concatenate([padded, rows], axis=1)
        blocks = padded.reshape(self.grid[0], self.head_block, *padded.shape[1:])
        blocks = jnp.pad(blocks, ((0, 0), (0, -self.head_block % self.together), (0, 0), (0, 0)))
        blocks = blocks.reshape(-1, self.together, *padded.shape[1:])
        return jnp.swapaxes(blocks, 1, 2).reshape(-1, padded.shape[1], self.width)

    def unpack(self, packed: Any) -> tuple[Any, Any]:
        """Return the inverse of `pack`; of the scale, the sum over lanes."""
        blocks = packed.reshape(-1, packed.shape[1], self.together, self.rows).swapaxes(1, 2)
        blocks = blocks.reshape(self.grid[0], -1, *blocks.shape[2:])[:, : self.head_block]
        rows = blocks.reshape(self.heads, *blocks.shape[2:])
        scale = jnp.sum(rows[:, self.rows], axis=-1) if self.scaled else None
        return rows[:, : self.tokens, : self.tokens], scale

    def pad_mask(self, blocked: Any) -> Any:
        """Return masks `[masks, rows, rows]`."""
        missing = self.rows - self.tokens
        return jnp.pad(blocked, ((0, 0), (0, missing), (0, missing)))

    def call(
        self,
        kernel: Callable[..., None],
        name: str,
        tokens: Sequence[Any],
        shared: Sequence[Any],
        masks: Sequence[Any],
        results: int,
        *,
        gradients: bool,
        products: int,
    ) -> Any:
        """Run a kernel over all blocks.

        Args:
          kernel: takes references to tokens, to what is shared, to masks, and to the results.
          name: of the kernel.
          tokens: arrays `[windows, tokens, features]`.
          shared: the packed bias, and the rows of shifts.
          masks: what `pad_mask` returns, or nothing.
          results: the number of results, which are like the first tokens.
          gradients: results like those shared follow, which all windows add to.
          products: products of each score, for the estimate of costs.
        """
        features = self.head_block * self.dim
        packed, rows = shared
        of_tokens = pl.BlockSpec((self.window_block, self.tokens, features), lambda head, window: (window, 0, head))
        of_shared = [
            pl.BlockSpec((len(self.groups), *packed.shape[1:]), lambda head, window: (head, 0, 0)),
            pl.BlockSpec((rows.shape[0], features), lambda head, window: (0, head)),
        ]
        turns = max(1, self.masks // self.window_block)
        of_masks = pl.BlockSpec(
            (self.window_block, self.rows, self.rows), lambda head, window: (jax.lax.rem(window, turns), 0, 0)
        )
        operands = (*tokens, *shared, *masks)
        out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*tokens[:results], *(shared if gradients else ()))]
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out))
        score = self.windows * self.heads * self.tokens**2
        run = functools.partial(
            pl.pallas_call,
            kernel,
            out_shape=out,
            grid=self.grid,
            in_specs=[of_tokens] * len(tokens) + of_shared + [of_masks] * len(masks),
            out_specs=[of_tokens] * results + (of_shared if gradients else []),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * score * self.dim, bytes_accessed=moved, transcendentals=score
            ),
            name=name,
        )
        # Which of the two is lowered is known only then: code for a TPU may be compiled where there is none.
        return jax.lax.platform_dependent(*operands, cpu=run(interpret=True), tpu=run())


def _forward(query: Any, key: Any, value: Any, bias: Any, scale: Any, shifts: Any, blocked: Any) -> Any:
    shape = query.shape
    query, key, value = (_flat(x) for x in (query, key, value))
    blocked = None if blocked is None else blocked.reshape(-1, *blocked.shape[-2:])
    layout = _Layout.of(query, bias, scale, blocked)
    masks = () if blocked is None else (layout.pad_mask(blocked),)

    def kernel(query: Any, key: Any, value: Any, bias: Any, shifts: Any, *rest: Any) -> None:
        *mask, out = rest
        windows = range(layout.window_block)
        for index, (first, count) in enumerate(layout.groups):
            lanes = slice(first * layout.dim, (first + count) * layout.dim)

            def read(ref: Any, place: int, lanes: slice = lanes) -> list[Any]:
                shift = shifts[place : place + 1, lanes]
                return [_read(ref[window, :, lanes], layout.rows, shift) for window in windows]

            keys = [_diagonal(x, count) for x in read(key, 1)]
            scores, _ = _scores(layout, read(query, 0), keys, bias[index, :, : count * layout.rows], mask, count)
            weights = [jnp.exp(x - _largest(x, count)).astype(query.dtype) for x in scores]
            ones = _blocks((count * layout.rows, count * layout.dim), count, query.dtype)
            sums = [_dot(x, ones, 1, 0) for x in weights]
            values = [_dot(x, _diagonal(y, count), 1, 0) for x, y in zip(weights, read(value, 2), strict=True)]
            for window, x, total in zip(windows, values, sums, strict=True):
                out[window, :, lanes] = (x / total).astype(out.dtype)[: layout.tokens]

    shared = (layout.pack(bias, scale), _rows(shifts, query))
    (out,) = layout.call(kernel, "window_attention", (query, key, value), shared, masks, 1, gradients=False, products=2)
    return out.reshape(shape)


def _backward(
    query: Any, key: Any, value: Any, bias: Any, scale: Any, shifts: Any, blocked: Any, gradient: Any
) -> tuple[Any, ...]:
    """Return the gradients of queries, keys, values, bias, scale and shifts."""
    shape = query.shape
    query, key, value, gradient = (_flat(x) for x in (query, key, value, gradient))
    blocked = None if blocked is None else blocked.reshape(-1, *blocked.shape[-2:])
    layout = _Layout.of(query, bias, scale, blocked)
    masks = () if blocked is None else (layout.pad_mask(blocked),)
    dtype = query.dtype

    def kernel(query: Any, key: Any, value: Any, gradient: Any, bias: Any, shifts: Any, *rest: Any) -> None:
        *mask, by_query, by_key, by_value, by_bias, by_shifts = rest
        windows = range(layout.window_block)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            by_bias[...] = jnp.zeros_like(by_bias)
            by_shifts[...] = jnp.zeros_like(by_shifts)

        for index, (first, count) in enumerate(layout.groups):
            lanes, width = slice(first * layout.dim, (first + count) * layout.dim), count * layout.rows

            def read(ref: Any, place: int | None = None, lanes: slice = lanes) -> list[Any]:
                shift = None if place is None else shifts[place : place + 1, lanes]
                return [_read(ref[window, :, lanes], layout.rows, shift) for window in windows]

            queries, gradients = read(query, 0), read(gradient)
            keys, values = ([_diagonal(x, count) for x in read(ref, place)] for place, ref in ((1, key), (2, value)))
            scores, raw = _scores(layout, queries, keys, bias[index, :, :width], mask, count)
            by_weights = [_dot(x, y, 1, 1) for x, y in zip(gradients, values, strict=True)]
            # Rounded before they are summed, so that they sum to one.
            weights = [jnp.exp(x - _largest(x, count)).astype(dtype) for x in scores]
            ones = _blocks((width, width), count, dtype)
            weights = [_wide(x) / _dot(x, ones, 1, 0) for x in weights]
            # What the gradients of a head's scores have in common, over all lanes of that head.
            common = [_summed(x * y, ones, layout.scaled) for x, y in zip(weights, by_weights, strict=True)]
            by_scores = [x * (y - z) for x, y, z in zip(weights, by_weights, common, strict=True)]
            by_bias[index, : layout.rows, :width] += functools.reduce(jnp.add, by_scores)
            if layout.scaled:
                products = functools.reduce(jnp.add, (x * y for x, y in zip(by_scores, raw, strict=True)))
                total = jnp.sum(products, axis=0, keepdims=True)
                by_bias[index, layout.rows : layout.rows + 1, :width] += total
                by_scores = [x * bias[index, layout.rows : layout.rows + 1, :width] for x in by_scores]
            by_scores, weights = ([x.astype(dtype) for x in each] for each in (by_scores, weights))
            found = (
                (by_query, [_dot(x, y, 1, 0) for x, y in zip(by_scores, keys, strict=True)]),
                (by_key, [_undiagonal(_dot(x, y, 0, 0), count) for x, y in zip(by_scores, queries, strict=True)]),
                (by_value, [_undiagonal(_dot(x, y, 0, 0), count) for x, y in zip(weights, gradients, strict=True)]),
            )
            for place, (ref, products) in enumerate(found):
                # Rows that fill up are zero.
                total = jnp.sum(functools.reduce(jnp.add, products), axis=0, keepdims=True)
                by_shifts[place : place + 1, lanes] += total
                for window, x in zip(windows, products, strict=True):
                    ref[window, :, lanes] = x.astype(ref.dtype)[: layout.tokens]

    shared = (layout.pack(bias, scale), _rows(shifts, query))
    tokens = (query, key, value, gradient)
    *gradients, of_bias, of_shifts = layout.call(
        kernel, "window_attention_backward", tokens, shared, masks, 3, gradients=True, products=5
    )
    return *(x.reshape(shape) for x in gradients), *layout.unpack(of_bias), None if shifts is None else of_shifts[:3]


def _flat(x: Any) -> Any:
    return x.reshape(-1, *x.shape[-2:])


# In a kernel ----------------------------------------------------------------------------------------------------------


def _dot(x: Any, y: Any, axis: int, other: int) -> Any:
    """Return the product over these axes, summed in float32."""
    return jax.lax.dot_general(x, y, (((axis,), (other,)), ((), ())), preferred_element_type=jnp.float32)


def _summed(x: Any, ones: Any, exact: bool) -> Any:
    """Return the sums of the blocks of each row, over all lanes of a block; exact = but for rounding to float32.

    The gradient of a scale is what is left of large sums: they may not differ from them by the rounding of bfloat16.
    """
    rounded = x.astype(ones.dtype)
    out = _dot(rounded, ones, 1, 0)
    return out + _dot((x - _wide(rounded)).astype(ones.dtype), ones, 1, 0) if exact else out


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32)


def _rows(shifts: Any, query: Any) -> Any:
    """Return the shifts as rows of a whole tile."""
    rows = jnp.zeros((3, query.shape[-1]), jnp.float32) if shifts is None else shifts.astype(jnp.float32)
    return jnp.pad(rows, ((0, 5), (0, 0)))


def _read(x: Any, rows: int, shift: Any = None) -> Any:
    """Return `x` shifted, with rows up to whole tiles: finite ones, which nothing may attend to."""
    missing = rows - x.shape[0]
    x = jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)], axis=0) if missing else x
    return x if shift is None else (_wide(x) + shift).astype(x.dtype)


def _block_of(shape: tuple[int, int], axis: int, count: int) -> Any:
    """Return which of the equal blocks along an axis each entry of a matrix is in."""
    return jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, axis), shape[axis] // count)


def _blocks(shape: tuple[int, int], count: int, dtype: Any) -> Any:
    """Return a block matrix with ones on the diagonal's blocks."""
    return (_block_of(shape, 0, count) == _block_of(shape, 1, count)).astype(dtype)


def _diagonal(x: Any, count: int) -> Any:
    """Return heads `[rows, heads x dim]` on the diagonal of a block matrix `[heads x rows, heads x dim]`."""
    if count == 1:
        return x
    block = _block_of(x.shape, 1, count)
    return jnp.concatenate([jnp.where(block == head, x, jnp.zeros_like(x)) for head in range(count)], axis=0)


def _undiagonal(x: Any, count: int) -> Any:
    """Return the inverse of `_diagonal`; the other blocks are left out."""
    rows = x.shape[0] // count
    block = _block_of((rows, x.shape[1]), 1, count)
    out = x[:rows]
    for head in range(1, count):
        out = jnp.where(block == head, x[head * rows : (head + 1) * rows], out)
    return out


def _scores(
    layout: _Layout, queries: Sequence[Any], keys: Sequence[Any], bias: Any, mask: Sequence[Any], count: int
) -> tuple[list[Any], list[Any]]:
    """Return the scores of each window, `[rows, heads x rows]` in float32, and the products of queries and keys."""
    raw = [_dot(query, key, 1, 1) for query, key in zip(queries, keys, strict=True)]
    scores = [x * bias[layout.rows : layout.rows + 1] for x in raw] if layout.scaled else raw
    scores = [x + bias[: layout.rows] for x in scores]
    if mask:
        wide = [_wide(mask[0][window]) for window in range(layout.window_block)]
        scores = [x + jnp.concatenate([each] * count, axis=1) for x, each in zip(scores, wide, strict=True)]
    return scores, raw


def _largest(scores: Any, count: int) -> Any:
    """Return the largest score of each row and head, over all lanes of that head."""
    block = _block_of(scores.shape, 1, count)
    out = jnp.max(jnp.where(block == 0, scores, 2 * _BLOCKED) if count > 1 else scores, axis=-1, keepdims=True)
    for head in range(1, count):
        here = block == head
        out = jnp.where(here, jnp.max(jnp.where(here, scores, 2 * _BLOCKED), axis=-1, keepdims=True), out)
    return out
