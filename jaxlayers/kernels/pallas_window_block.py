"""The attention half of a window transformer block as Pallas kernels for TPU: norm, projections, attention, output.

Each window's tokens are read once, and what is added to them, or the sum, is written once. Queries, keys, values,
scores and weights exist in fast memory only; the gradient computes them anew, and sums those of all parameters there in
float32 while the grid runs over the windows.

Everything lies transposed, features along sublanes and tokens along lanes, two windows of up to 64 tokens side by side.
So a head is a slice of rows, which costs nothing; the norm's and the softmax's sums run over sublanes, which are plain
additions; no entry of a product is masked out but for the other window's; and the statistics of 128 tokens fill one
register. Scores are `[keys, queries]`. The two windows of a pair have keys of their own: these lie beside one another
`[keys, 2 x dim]`, the queries on the diagonal of `[2 x dim, 2 x 64]`, and one product gives the scores of both.

For Swin V2 queries and keys are brought to length 1, by sums over sublanes too, and the norm is one of the result. Its
gradient needs the result of all heads, so the backward pass keeps their weights and goes over the heads twice.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes
from jaxlayers.kernels.pallas_window import _BLOCKED, _dot, _Split, _wide

# Tokens of a window along the lanes, of which a pair fills all.
_SIDE = 64
# Pairs of windows, each of one head, that every step is written down for before the next step.
_CELLS = 12
# Of a block.
_MOST_CELLS = 48
# Of the fast memory, which is 128 MiB on v5e and of which a kernel is given 16 MiB unasked.
_MEMORY = 64 * 2**20
# Rows of ones below the heads' results, whose product with the gradient is that of the output's bias: a tile.
_ONES = 16

# Of the square of a length: shorter vectors have no direction.
_SHORT = 1e-24

# Of each cell: a head and a pair of windows.
_Found = dict[tuple[int, int], Any]


def window_block(
    x: Float[Array, "*windows tokens features"],
    projections: Float[Array, "3 features inner"],
    shifts: Float[Array, "3 inner"] | None,
    out: Float[Array, "inner features"],
    out_shift: Float[Array, "features"] | None,
    bias: Float[Array, "heads tokens tokens"],
    mask: Bool[Array, "*#grid tokens tokens"] | None = None,
    *,
    scale: Float[Array, "heads"] | None = None,
    norm: tuple[Float[Array, "features"], Float[Array, "features"]] | None = None,
    norm_first: bool = True,
    epsilon: float = 1e-5,
    residual: bool = False,
    factor: Float[Array, "*batch"] | None = None,
    names: tuple[str, ...] = (axes.WINDOWS,),
) -> Float[Array, "*windows tokens features"]:
    """Return softmax(Q K^T / sqrt(d) + B) V W_out + b_out of every window, with Q, K, V linear in norm(x).

    With a scale t it is softmax(t cos(Q, K) + B) V W_out + b_out; the norm can be one of the result instead. As a
    residual branch it is x + factor * that, in one pass.

    Differentiable once, in reverse mode, with respect to all but the mask; sums and statistics are in float32, products
    of what is rounded to the dtype of `x`. On CPU the kernels are interpreted, which is slow and meant for tests. With
    a mesh in scope each device runs them on the batch and the windows that the logical rules give it, with all heads.

    Args:
      x: tokens, float32 or bfloat16, at most 64 a window.
      projections: those of queries, keys and values, in this order; the heads' features lie side by side.
      shifts: their biases; `None` = none.
      out: the output's projection W_out.
      out_shift: its bias b_out; `None` = none.
      bias: B, alike in every window.
      mask: true where a query (second axis) may attend to a key (last axis); each query may to at least one.
      scale: t of each head; `None` = products, not cosines. A cosine with a vector of length 0 is 0.
      norm: scale and offset of a layer norm; `None` = none.
      norm_first: the norm is one of the tokens; else one of the result.
      epsilon: added to the norm's variances.
      residual: add x.
      factor: what each example's branch is multiplied by before x is added; no gradient goes to it. `None` = 1.
      names: logical axes of the windows, one or more, which the mask has too.

    Returns:
      An array like `x`.

    Raises:
      ValueError: if a window has too many tokens, the heads do not divide the inner features, the mask is not one for
        each window or for all, or the factor is not one for each example of a residual branch.
    """
    heads, tokens, _ = bias.shape
    *leading, _, _ = x.shape
    inner = projections.shape[-1]
    if tokens > _SIDE:
        raise ValueError(f"windows of {tokens} tokens must have at most {_SIDE}; take pallas_window.window_attention")
    if inner % heads:
        raise ValueError(f"inner features={inner} must be divisible by the {heads} heads of the bias; pass such")
    wanted = (*leading[len(leading) - len(names) :], tokens, tokens)
    if mask is not None and (
        mask.ndim != len(wanted) or any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True))
    ):
        raise ValueError(f"mask of shape {mask.shape} must be {wanted}, or 1 where windows share one; pass such")
    if factor is not None and (not residual or factor.shape != tuple(leading[: len(leading) - len(names)])):
        raise ValueError(
            f"factor of shape {factor.shape} must be {tuple(leading[: len(leading) - len(names)])}, one for each "
            f"example of a residual branch, with residual={residual}; set both"
        )
    mask = None if mask is None else jnp.broadcast_to(mask, wanted)
    blocked = None if mask is None else jnp.where(mask, 0, jnp.asarray(_BLOCKED, jnp.bfloat16))

    # The weights are powers of two, which are the unit's own; JAX differentiates what is folded into the projections.
    of_query = math.log2(math.e) * (inner // heads) ** -0.5 if scale is None else 1.0
    factors = jnp.asarray([of_query, 1.0, 1.0], jnp.float32)
    weights = _wide(projections) * factors[:, None, None]
    columns = jnp.zeros((3, inner), jnp.float32) if shifts is None else _wide(shifts) * factors[:, None]
    row = jnp.zeros(out.shape[1:], jnp.float32) if out_shift is None else _wide(out_shift)
    affine = None if norm is None else jnp.stack([_wide(each) for each in norm])
    if affine is not None and norm_first:
        columns = columns + jnp.einsum("f,pfi->pi", affine[1], weights, precision="highest")
        weights = weights * affine[0][:, None]
        # Tokens less their mean see no common part of a feature's weights, and then their gradient has no mean either.
        weights = weights - jnp.mean(weights, axis=1, keepdims=True)
        affine = None
    elif affine is not None:
        # The result has then no mean to take out.
        out, row = (_wide(each) - jnp.mean(_wide(each), axis=-1, keepdims=True) for each in (out, row))
    weights = jnp.swapaxes(weights, 1, 2).reshape(3 * inner, -1).astype(x.dtype)
    powers = None if scale is None else _wide(scale) * math.log2(math.e)
    operands = (weights, columns.reshape(-1), out.astype(x.dtype), row, _wide(bias) * math.log2(math.e))
    factor = None if factor is None else _wide(factor)
    return _block(names, None if norm is None else epsilon, residual, x, *operands, powers, affine, blocked, factor)


# Forward and backward, on all devices ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _block(names: tuple[str, ...], epsilon: float | None, residual: bool, *operands: Any) -> Any:
    return _keep(names, epsilon, residual, *operands)[0]


def _keep(names: tuple[str, ...], epsilon: float | None, residual: bool, *operands: Any) -> tuple[Any, Any]:
    split = _Split.of(names, operands[0].shape, 1)
    tokens, specs = _specs(split)
    return split.on_devices(functools.partial(_forward, epsilon, residual), specs, tokens)(*operands), operands


def _return(names: tuple[str, ...], epsilon: float | None, residual: bool, kept: Any, gradient: Any) -> tuple[Any, ...]:
    split = _Split.of(names, gradient.shape, 1)
    tokens, specs = _specs(split)

    def local(*operands: Any) -> tuple[Any, ...]:
        of_tokens, *shared = _backward(epsilon, residual, *operands)
        # Each device has those of the parameters from its own windows.
        others = tuple(name for each in split.leading for name in each)
        return of_tokens, *(jax.lax.psum(shared, others) if others else shared)

    found = split.on_devices(local, (*specs, tokens), specs[:-2])(*kept, gradient.astype(kept[0].dtype))
    pairs = zip(found, kept[:-2], strict=True)
    return *(None if x is None else one.astype(x.dtype) for one, x in pairs), None, None


_block.defvjp(_keep, _return)


def _specs(split: _Split) -> tuple[PartitionSpec, tuple[PartitionSpec, ...]]:
    """Return how tokens are split, and how all operands are: tokens, what all windows share, masks, factors."""
    leading = [each or None for each in split.leading]
    tokens, batch = PartitionSpec(*leading), len(leading) - split.groups
    of_masks, of_factors = PartitionSpec(*leading[batch:]), PartitionSpec(*leading[:batch])
    return tokens, (tokens, *(PartitionSpec(),) * 7, of_masks, of_factors)


# On one device --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the operands of a call lie in blocks.

    Attributes:
      pairs: pairs of windows; one window is added if their number is odd.
      tokens: tokens of a window.
      features: features of a token.
      heads: number of heads.
      dim: features of a head.
      pair_block: pairs of a block.
      masks: pairs that have masks of their own, as many as a block's or more; 0 = none.
      dtype: of the tokens.
      epsilon: of the norm; `None` = there is none.
      cosine: scores are cosines times a scale of each head.
      norms_last: the norm is one of the result.
      residual: tokens are added to the result.
      windows: of an example, where each has a factor; else 0.
    """

    pairs: int
    tokens: int
    features: int
    heads: int
    dim: int
    pair_block: int
    masks: int
    dtype: Any
    epsilon: float | None
    cosine: bool
    norms_last: bool
    residual: bool
    windows: int

    @classmethod
    def of(
        cls,
        x: Any,
        bias: Any,
        out: Any,
        blocked: Any,
        factor: Any,
        epsilon: float | None,
        scale: Any,
        affine: Any,
        residual: bool,
    ) -> "_Plan":
        """Return the plan for tokens `[windows, tokens, features]`."""
        windows, tokens, features = x.shape
        heads, pairs = len(bias), -(-windows // 2)
        # An odd number of masks comes twice before a pair has the same ones again.
        masks = 0 if blocked is None else len(blocked) // (1 if len(blocked) % 2 else 2)
        counts = (count for count in range(1, max(1, _MOST_CELLS // heads) + 1) if pairs % count == 0)
        pair_block = max(count for count in counts if not masks or masks % count == 0 or count % masks == 0)
        masks = masks and max(masks, pair_block)
        sizes = pairs, tokens, features, heads, len(out) // heads, pair_block, masks
        of_example = 0 if factor is None else windows // factor.size
        return cls(*sizes, x.dtype, epsilon, scale is not None, affine is not None, residual, of_example)

    @property
    def inner(self) -> int:
        """Features of all heads."""
        return self.heads * self.dim

    @property
    def norms_first(self) -> bool:
        """The norm is one of the tokens."""
        return self.epsilon is not None and not self.norms_last

    @property
    def keys(self) -> int:
        """Tokens of a window with those that fill up a tile of float32."""
        return -(-self.tokens // 8) * 8

    def pad(self, x: Any) -> Any:
        """Return `x` with an even number of windows."""
        return jnp.pad(x, ((0, 2 * self.pairs - len(x)), (0, 0), (0, 0)))

    def pack_bias(self, bias: Any) -> Any:
        """Return the bias as `[heads, keys, 2 x queries]`, where keys that fill up are blocked."""
        wide = jnp.pad(jnp.swapaxes(bias, 1, 2), ((0, 0), (0, 0), (0, _SIDE - self.tokens)))
        wide = jnp.pad(wide, ((0, 0), (0, self.keys - self.tokens), (0, 0)), constant_values=_BLOCKED)
        return jnp.concatenate([wide, wide], axis=2)

    def unpack_bias(self, packed: Any) -> Any:
        """Return the transpose of `pack_bias`."""
        both = packed[..., :_SIDE] + packed[..., _SIDE:]
        return jnp.swapaxes(both[:, : self.tokens, : self.tokens], 1, 2)

    def pack_rest(self, scale: Any, affine: Any) -> tuple[Any, ...]:
        """Return the scales of cosines, a row a head, and a last norm's scale and offset, columns; those there are."""
        rows = () if scale is None else (jnp.broadcast_to(scale[:, None, None], (self.heads, 1, 2 * _SIDE)),)
        return rows + (() if affine is None else (jnp.stack([_columns(each) for each in affine]),))

    def sorted_out(self, refs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Return the references after the bias: to the scale, a last norm's weights, masks, each or none; results."""
        ends = (self.cosine, self.cosine + self.norms_last)
        last = ends[1] + bool(self.masks)
        return refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] : last], refs[last:]

    def pack_masks(self, blocked: Any) -> Any:
        """Return masks as `[pairs, keys, 2 x queries]`."""
        blocked = jnp.concatenate([blocked] * (2 * self.masks // len(blocked)))
        missing = (self.keys - self.tokens, _SIDE - self.tokens)
        wide = jnp.pad(jnp.swapaxes(blocked, 1, 2), ((0, 0), (0, missing[0]), (0, missing[1])))
        return jnp.swapaxes(wide.reshape(self.masks, 2, *wide.shape[1:]), 1, 2).reshape(self.masks, self.keys, -1)

    def call(
        self,
        kernel: Any,
        name: str,
        tokens: Sequence[Any],
        shared: Sequence[Any],
        masks: Sequence[Any],
        factor: Any,
        gradients: Sequence[tuple[int, ...]],
        *,
        products: int,
    ) -> Any:
        """Run a kernel over all blocks.

        Args:
          kernel: takes a product of matrices, the factors of a block's windows, and references to tokens, to what is
            shared, to masks, to the result and to gradients.
          name: of the kernel.
          tokens: arrays `[windows, tokens, features]`.
          shared: what every block reads.
          masks: what `pack_masks` returns, or nothing.
          factor: of each example, or `None`.
          gradients: shapes of what all blocks add to.
          products: products of each weight and each score, for the estimate of costs.
        """
        block_windows = 2 * self.pair_block
        of_tokens = pl.BlockSpec((block_windows, *tokens[0].shape[1:]), lambda block, *_: (block, 0, 0))
        turns = max(1, self.masks // self.pair_block)
        of_masks = pl.BlockSpec(
            (self.pair_block, self.keys, 2 * _SIDE), lambda block, *_: (jax.lax.rem(block, turns), 0, 0)
        )
        results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in gradients]
        # The window that makes their number even is of one example more.
        scalars = [] if factor is None else [jnp.pad(factor.reshape(-1), (0, 1))]
        operands, out = (*tokens, *shared, *masks), [jax.ShapeDtypeStruct(tokens[0].shape, self.dtype), *results]
        count = 2 * self.pairs * self.tokens

        def scaled(dot: Any, *refs: Any) -> None:
            if factor is None:
                return kernel(dot, None, *refs)
            places = (pl.program_id(0) * block_windows + each for each in range(block_windows))
            # Of numbers that are not negative; `//` asks for their sign, whose lowering asks for a TPU.
            return kernel(dot, [refs[0][jax.lax.div(place, self.windows)] for place in places], *refs[1:])

        run = functools.partial(
            pl.pallas_call,
            out_shape=out,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(self.pairs // self.pair_block,),
                in_specs=[of_tokens] * len(tokens) + [_everywhere(x.shape) for x in shared] + [of_masks] * len(masks),
                out_specs=[of_tokens, *(_everywhere(shape) for shape in gradients)],
            ),
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_MEMORY),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * count * self.inner * (2 * self.features + self.tokens),
                bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out)),
                transcendentals=count * self.heads * self.tokens,
            ),
            name=name,
        )
        # Which of the two is lowered is known only then: code for a TPU may be compiled where there is none.
        on_cpu = run(functools.partial(scaled, _exact_dot), interpret=True)
        return jax.lax.platform_dependent(*scalars, *operands, cpu=on_cpu, tpu=run(functools.partial(scaled, _dot)))


def _everywhere(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _forward(
    epsilon: float | None,
    residual: bool,
    x: Any,
    weights: Any,
    columns: Any,
    out: Any,
    out_shift: Any,
    bias: Any,
    scale: Any,
    affine: Any,
    blocked: Any,
    factor: Any,
) -> Any:
    shape = x.shape
    x, blocked = (None if each is None else each.reshape(-1, *each.shape[-2:]) for each in (x, blocked))
    plan = _Plan.of(x, bias, out, blocked, factor, epsilon, scale, affine, residual)

    def kernel(
        dot: Any, factors: Any, x: Any, weights: Any, columns: Any, out: Any, out_shift: Any, bias: Any, *rest: Any
    ) -> None:
        scale, affine, mask, (result,) = plan.sorted_out(rest)
        pairs = range(plan.pair_block)
        tokens, _ = _normed(plan, [_transposed(x, pair) for pair in pairs])
        projected = [dot(weights[...], z.astype(plan.dtype), 1, 0) + columns[...] for z in tokens]
        context: _Found = {}
        for cells in _cells(plan):
            query, key, value = (_heads(plan, projected, cells, part) for part in range(3))
            if plan.cosine:
                (query, _), (key, _) = _directions(query), _directions(key)
            scores = _scored(plan, dot, key, query)
            chances = _softmax(scores, cells, bias, mask, scale)
            diagonals = [_halves(_filled(z)).astype(plan.dtype) for z in chances]
            for cell, z, y in zip(cells, value, diagonals, strict=True):
                context[cell] = dot(z.astype(plan.dtype), y, 1, 0)
        columns_of = [_joined(plan, context, pair).astype(plan.dtype) for pair in pairs]
        found = [dot(out[...], z, 1, 0) + out_shift[...] for z in columns_of]
        if plan.norms_last:
            found = [y * affine[0][0] + affine[0][1] for y in _unit(plan.epsilon, found)[0]]
        _write(plan, result, found, x, factors)

    shared = (weights, _columns(columns), out.T, _columns(out_shift), plan.pack_bias(bias))
    shared += plan.pack_rest(scale, affine)
    masks = () if blocked is None else (plan.pack_masks(blocked),)
    (result,) = plan.call(kernel, "window_block", (plan.pad(x),), shared, masks, factor, (), products=2)
    return result[: len(x)].reshape(shape)


def _backward(
    epsilon: float | None,
    residual: bool,
    x: Any,
    weights: Any,
    columns: Any,
    out: Any,
    out_shift: Any,
    bias: Any,
    scale: Any,
    affine: Any,
    blocked: Any,
    factor: Any,
    gradient: Any,
) -> tuple[Any, ...]:
    """Return the gradients of all but the masks and the factors."""
    shape = x.shape
    x, blocked, gradient = (
        None if each is None else each.reshape(-1, *each.shape[-2:]) for each in (x, blocked, gradient)
    )
    plan = _Plan.of(x, bias, out, blocked, factor, epsilon, scale, affine, residual)
    inner, dtype = plan.inner, plan.dtype

    def kernel(
        dot: Any,
        factors: Any,
        x: Any,
        gradient: Any,
        weights: Any,
        back: Any,
        columns: Any,
        out: Any,
        out_shift: Any,
        bias: Any,
        *rest: Any,
    ) -> None:
        scale, affine, mask, (by_tokens, by_weights, by_columns, by_out, by_bias, *by_rest) = plan.sorted_out(rest)
        by_scale, by_affine = by_rest[: plan.cosine], by_rest[plan.cosine :]
        pairs = range(plan.pair_block)

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            for ref in (by_weights, by_columns, by_out, by_bias, *by_rest):
                ref[...] = jnp.zeros_like(ref)

        def scored(cells: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
            """Return queries, keys and values, the inverse lengths of both first, and their scores."""
            query, key, value = (_heads(plan, projected, cells, part) for part in range(3))
            inverses: tuple[Any, Any] = ((), ())
            if plan.cosine:
                (query, of_query), (key, of_key) = _directions(query), _directions(key)
                inverses = (of_query, of_key)
            return query, key, value, inverses, _scored(plan, dot, key, query)

        def mixed(value: Sequence[Any], chances: Sequence[Any], cells: Sequence[tuple[int, int]]) -> _Found:
            """Return what the weights make of the values, from both in the dtype of the products."""
            return {cell: dot(z, y, 1, 0) for cell, z, y in zip(cells, value, chances, strict=True)}

        tokens, inverses = _normed(plan, [_transposed(x, pair) for pair in pairs])
        rounded = [z.astype(dtype) for z in tokens]
        projected = [dot(weights[...], z, 1, 0) + columns[...] for z in rounded]
        context: _Found = {}
        known: dict[int, tuple[Any, ...]] = {}
        if plan.norms_last:
            # What is normed comes of all heads, and its gradient goes to all of them.
            for number, cells in enumerate(_cells(plan)):
                first = scored(cells)
                known[number] = (*first, _softmax(first[-1], cells, bias, mask, scale))
                diagonals = [_halves(_filled(z)).astype(dtype) for z in known[number][-1]]
                context |= mixed([z.astype(dtype) for z in first[2]], diagonals, cells)
            seen = [_joined(plan, context, pair).astype(dtype) for pair in pairs]
            units, lengths = _unit(plan.epsilon, [dot(out[...], z, 0, 0) + out_shift[...] for z in seen])
            received_by = [_transposed(gradient, pair, factors) for pair in pairs]
            by_affine[0][0] += functools.reduce(jnp.add, [y * z for y, z in zip(received_by, units, strict=True)])
            by_affine[0][1] += functools.reduce(jnp.add, received_by)
            by_units = [y * affine[0][0] for y in received_by]
            common = [jnp.mean(y * z, axis=0, keepdims=True) for y, z in zip(by_units, units, strict=True)]
            by_units = [r * (y - z * c) for r, y, z, c in zip(lengths, by_units, units, common, strict=True)]
            by_units = [z.astype(dtype) for z in by_units]
            gradients = [z.T for z in by_units]
            by_context = [dot(out[...], z, 1, 0) for z in by_units]
        else:
            gradients = [_rows(gradient, pair, factors).astype(dtype) for pair in pairs]
            by_context = [dot(out[...], z, 1, 1) for z in gradients]
        by_query: _Found = {}
        by_key: _Found = {}
        by_value: _Found = {}
        for number, cells in enumerate(_cells(plan)):
            query, key, value, lengths_of, scores, *done = known.get(number) or scored(cells)
            received = _heads(plan, by_context, cells, 0)
            by_chances = _scored(plan, dot, value, received)
            chances = done[0] if done else _softmax(scores, cells, bias, mask, scale)
            common = [jnp.sum(z * y, axis=0, keepdims=True) for z, y in zip(chances, by_chances, strict=True)]
            # But for the factor log(2), see below.
            by_scores = [z * (y - c) for z, y, c in zip(chances, by_chances, common, strict=True)]
            for head in sorted({head for head, _ in cells}):
                same = [index for index, cell in enumerate(cells) if cell[0] == head]
                by_bias[head] += functools.reduce(jnp.add, [by_scores[index] for index in same])
                if plan.cosine:
                    moments = [jnp.sum(by_scores[index] * scores[index], axis=0, keepdims=True) for index in same]
                    by_scale[0][head] += functools.reduce(jnp.add, moments)
            if plan.cosine:
                by_scores = [z * (scale[0][head] * math.log(2)) for z, (head, _) in zip(by_scores, cells, strict=True)]
            chances, by_scores = ([_halves(_filled(z)).astype(dtype) for z in each] for each in (chances, by_scores))
            directions = query, key
            query, key, value, received = ([z.astype(dtype) for z in each] for each in (query, key, value, received))
            if not plan.norms_last:
                context |= mixed(value, chances, cells)
            for found, side, square, axis, direction, length in (
                (by_query, key, by_scores, 0, directions[0], lengths_of[0]),
                (by_key, query, by_scores, 1, directions[1], lengths_of[1]),
                (by_value, received, chances, 1, (), ()),
            ):
                products = [dot(z, y, 1, axis) for z, y in zip(side, square, strict=True)]
                if length:
                    common = [jnp.sum(z * y, axis=0, keepdims=True) for z, y in zip(products, direction, strict=True)]
                    products = [r * (z - y * c) for r, z, y, c in zip(length, products, direction, common, strict=True)]
                found |= dict(zip(cells, products, strict=True))
        by_projected = [
            jnp.concatenate([_joined(plan, found, pair) for found in (by_query, by_key, by_value)], axis=0)
            for pair in pairs
        ]
        by_columns[...] += functools.reduce(jnp.add, by_projected)
        by_projected = [z.astype(dtype) for z in by_projected]
        by_rows = [dot(back[...], z, 1, 0) for z in by_projected]
        by_weights[...] += dot(jnp.concatenate(by_projected, axis=1), jnp.concatenate(rounded, axis=1), 1, 1)
        ones = jnp.ones((_ONES, 2 * _SIDE), dtype)
        seen = [jnp.concatenate([_joined(plan, context, pair).astype(dtype), ones], axis=0) for pair in pairs]
        by_out[...] += dot(jnp.concatenate(seen, axis=1), jnp.concatenate(gradients, axis=0), 1, 0)
        if plan.norms_first:
            common = [jnp.mean(z * y, axis=0, keepdims=True) for z, y in zip(by_rows, tokens, strict=True)]
            by_rows = [r * (z - y * c) for r, z, y, c in zip(inverses, by_rows, tokens, common, strict=True)]
        _write(plan, by_tokens, by_rows, gradient)

    # Of the factor log(2) of powers of two, the gradients of queries and keys are free until here.
    free = 1.0 if plan.cosine else math.log(2)
    factors = jnp.repeat(jnp.asarray([free, free, 1.0], jnp.float32), inner)
    back = (_wide(weights) * factors[:, None]).astype(dtype).T
    shared = (weights, back, _columns(columns), out, _columns(out_shift), plan.pack_bias(bias))
    rest = plan.pack_rest(scale, affine)
    masks = () if blocked is None else (plan.pack_masks(blocked),)
    shapes = [weights.shape, (3 * inner, 2 * _SIDE), (inner + _ONES, plan.features), shared[-1].shape]
    shapes += [each.shape for each in rest]
    tokens = (plan.pad(x), plan.pad(gradient))
    of_tokens, of_weights, of_columns, of_out, of_bias, *of_rest = plan.call(
        kernel, "window_block_backward", tokens, shared + rest, masks, factor, shapes, products=5
    )
    of_scale = math.log(2) * jnp.sum(of_rest[0], axis=(1, 2)) if plan.cosine else None
    return (
        of_tokens[: len(x)].reshape(shape),
        of_weights * factors[:, None],
        jnp.sum(of_columns, axis=1) * factors,
        of_out[:inner],
        of_out[inner],
        plan.unpack_bias(of_bias) * math.log(2),
        of_scale,
        jnp.sum(of_rest[-1], axis=2) if plan.norms_last else None,
    )


def _columns(x: Any) -> Any:
    """Return a vector as a column along all lanes."""
    return jnp.broadcast_to(x[:, None], (len(x), 2 * _SIDE))


# In a kernel ----------------------------------------------------------------------------------------------------------


def _exact_dot(x: Any, y: Any, axis: int, other: int) -> Any:
    """Return what `_dot` does; XLA has no product of bfloat16 for each order of axes on CPU."""
    return _dot(_wide(x), _wide(y), axis, other)


def _cells(plan: _Plan) -> Iterator[list[tuple[int, int]]]:
    """Yield heads and pairs, those of a few at a time: more of them lie in memory than registers, fewer wait."""
    cells = [(head, pair) for head in range(plan.heads) for pair in range(plan.pair_block)]
    for first in range(0, len(cells), _CELLS):
        yield cells[first : first + _CELLS]


def _rows(ref: Any, pair: int, factors: Sequence[Any] | None = None) -> Any:
    """Return a pair's tokens `[2 x 64, features]` in float32, times their factors; those that fill up are zero."""
    windows = [_filled(_wide(ref[2 * pair + side])) for side in range(2)]
    if factors is not None:
        windows = [x * factors[2 * pair + side] for side, x in enumerate(windows)]
    return jnp.concatenate(windows, axis=0)


def _filled(x: Any) -> Any:
    """Return `x` with 64 rows, those that fill up zero."""
    missing = _SIDE - x.shape[0]
    return jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)], axis=0) if missing else x


def _transposed(ref: Any, pair: int, factors: Sequence[Any] | None = None) -> Any:
    return _rows(ref, pair, factors).T


def _normed(plan: _Plan, tokens: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return tokens `[features, 2 x 64]` normed over their features, and the inverse deviations."""
    if not plan.norms_first:
        return list(tokens), []
    tokens = [x - jnp.mean(x, axis=0, keepdims=True) for x in tokens]
    inverses = [jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + (plan.epsilon or 0)) for x in tokens]
    return [x * r for x, r in zip(tokens, inverses, strict=True)], inverses


def _heads(plan: _Plan, projected: Sequence[Any], cells: Sequence[tuple[int, int]], part: int) -> list[Any]:
    """Return the rows of each cell's head, `[dim, 2 x 64]`, of the queries (0), keys (1) or values (2)."""
    firsts = [part * plan.inner + head * plan.dim for head, _ in cells]
    return [projected[pair][first : first + plan.dim] for first, (_, pair) in zip(firsts, cells, strict=True)]


def _joined(plan: _Plan, found: _Found, pair: int) -> Any:
    """Return what was found for each head of a pair, below one another."""
    return jnp.concatenate([found[head, pair] for head in range(plan.heads)], axis=0)


def _halves(x: Any) -> Any:
    """Return `[2 x rows, 2 x 64]` with the two windows of `x` on the diagonal."""
    left = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < _SIDE
    zeros = jnp.zeros_like(x)
    return jnp.concatenate([jnp.where(left, x, zeros), jnp.where(left, zeros, x)], axis=0)


def _scored(plan: _Plan, dot: Any, keys: Sequence[Any], queries: Sequence[Any]) -> list[Any]:
    """Return the products `[keys, 2 x 64 queries]` of each key and query of the same window."""
    beside = [jnp.concatenate([x, pltpu.roll(x, _SIDE, 1)], axis=0).T[: plan.keys] for x in keys]
    return [
        dot(x.astype(plan.dtype), _halves(y).astype(plan.dtype), 1, 0) for x, y in zip(beside, queries, strict=True)
    ]


def _directions(x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return columns of length 1, and the inverse lengths; of columns that are 0, zeros."""
    squares = [jnp.sum(y * y, axis=0, keepdims=True) for y in x]
    inverses = [jnp.where(z > _SHORT, jax.lax.rsqrt(jnp.maximum(z, _SHORT)), 0.0) for z in squares]
    return [y * r for y, r in zip(x, inverses, strict=True)], inverses


def _unit(epsilon: float | None, x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return columns whose mean is 0 with variance 1, and the inverse deviations."""
    inverses = [jax.lax.rsqrt(jnp.mean(y * y, axis=0, keepdims=True) + (epsilon or 0)) for y in x]
    return [y * r for y, r in zip(x, inverses, strict=True)], inverses


def _softmax(
    scores: Sequence[Any], cells: Sequence[tuple[int, int]], bias: Any, mask: Sequence[Any], scale: Sequence[Any]
) -> list[Any]:
    """Return the weights of each cell, whose sum over keys is one, from scores in powers of two, or cosines."""
    if scale:
        scores = [x * scale[0][head] for x, (head, _) in zip(scores, cells, strict=True)]
    scores = [x + bias[head] for x, (head, _) in zip(scores, cells, strict=True)]
    if mask:
        scores = [x + _wide(mask[0][pair]) for x, (_, pair) in zip(scores, cells, strict=True)]
    powers = [jnp.exp2(x - jnp.max(x, axis=0, keepdims=True)) for x in scores]
    return [x * (1 / jnp.sum(x, axis=0, keepdims=True)) for x in powers]


def _write(plan: _Plan, ref: Any, columns: Sequence[Any], onto: Any, factors: Sequence[Any] | None = None) -> None:
    """Write pairs `[features, 2 x 64]` without what fills up, times their factors, and added to those of a residual."""
    for pair, x in enumerate([x.T for x in columns]):
        for side in range(2):
            window = 2 * pair + side
            found = x[side * _SIDE : side * _SIDE + plan.tokens]
            found = found if factors is None else found * factors[window]
            found = found + _wide(onto[window]) if plan.residual else found
            ref[window] = found.astype(ref.dtype)
