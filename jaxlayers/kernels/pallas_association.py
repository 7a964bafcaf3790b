"""The passes of `streamed_association` over the patterns of one device as Pallas kernels for TPU.

A block of states stays in fast memory while blocks of patterns come by. Logits, weights and their gradients exist there
only, a tile at a time; main memory sees each pattern once for each block of states, and the results. The forward pass
keeps a running maximum (Dao et al., FlashAttention, 2022); the backward passes compute the weights anew from the
logarithm of their sum, one for the states, over patterns, and one for patterns and values, over states.

Batch elements that share a memory are laid side by side as states of one: the memory is read once for them, and few
states an element still fill a tile. On CPU the kernels are interpreted, which is slow and meant for tests.

A kernel reads arrays in one order of axes only. XLA keeps a memory that a program is given in the order that pads it
least, and copies it where that is another: so it is with several memories of 100,001 patterns, not with a number of
patterns that is a multiple of 16.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# A tile of float32 is of 8 rows and 128 lanes, one of bfloat16 of 16 rows.
_LANES, _SUBLANES = 128, 16
_MOST_STATES = 256
_TILES = 5
# Of the 16 MiB that the compiler gives a kernel unasked, what the blocks may take.
_MEMORY = 29 * 2**19


def check_supported(state: Any, stored: Any, mask: Any, dropout_rate: float) -> None:
    """Raise the `ValueError` for a call that the kernels do not serve."""
    platform = jax.default_backend()
    if platform not in ("cpu", "tpu"):
        raise ValueError(f"kernel='pallas' must run on TPU (or CPU, interpreted), not on {platform}; set kernel='jnp'")
    if dropout_rate:
        raise ValueError(f"dropout_rate={dropout_rate} must be 0 with kernel='pallas'; set kernel='jnp' for dropout")
    if mask is not None and mask.shape[-2] != 1 and mask.shape[-1] != 1:
        raise ValueError(
            f"mask of shape {mask.shape} must be of one row for all states, [..., 1, patterns], with kernel='pallas'; "
            "set kernel='jnp' for a row of each state"
        )
    dtype = jnp.promote_types(state.dtype, stored.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"patterns of dtype {dtype} must be float32 or bfloat16 with kernel='pallas'; set kernel='jnp'"
        )


def partial_sums(
    state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, *, chunk_size: int
) -> tuple[Any, Any, Any]:
    """Return, of the patterns here, the largest logit, the sum of exponentials above it, and the values' sum by them.

    Args:
      state: `[*#batch, states, features]`.
      stored: `[*#batch, patterns, features]`.
      values: `[*#batch, patterns, value_features]`, or `None` for the stored patterns.
      beta: `[*#batch]`.
      mask: `None`, `[*#batch, 1, #patterns]` or `[*#batch, #states, 1]`, True = may be retrieved.
      exclude: `None`, or the index of the pattern that a state may not retrieve, `[*#batch, #states]`.
      chunk_size: the most patterns of a block, rounded up to a multiple of 128.
    """
    columns, rows = _split_mask(mask, stored)
    call = _Call.of(state, stored, values, beta, mask, exclude, columns, chunk_size=chunk_size)
    stats = call.rows(beta[..., None, None])
    weighted, stats = _forward(
        call, call.rows(state), stats, call.excluded(exclude), *call.memory(stored, values, columns)
    )
    largest, total = call.unfold(stats[..., 0]), call.unfold(stats[..., 1])
    weighted = call.unfold(weighted, 1)
    if rows is not None:
        largest, total = jnp.where(rows, largest, -jnp.inf), jnp.where(rows, total, 0)
        weighted = jnp.where(rows[..., None], weighted, 0)
    # Axes that the values alone have repeat the sums.
    shape = call.batch_of(state, stored, beta, mask, exclude)
    largest, total = (_take_first(x, (*shape, state.shape[-2])) for x in (largest, total))
    return largest, total, weighted


def partial_gradients(
    state: Any,
    stored: Any,
    values: Any,
    beta: Any,
    mask: Any,
    exclude: Any,
    out_gradient: Any,
    common: Any,
    log_sum_exp: Any,
    *,
    chunk_size: int,
) -> tuple[Any, Any, Any, Any]:
    """Return the gradients of `state`, `stored`, `values` and `beta` that come from the patterns here.

    Args:
      state: as for `partial_sums`, like the arguments up to `exclude`.
      stored: see there.
      values: see there.
      beta: see there.
      mask: see there.
      exclude: see there.
      out_gradient: gradient of the retrieved, normalised values, `[*#batch, states, value_features]`.
      common: what the gradients of all logits of a state have in common, `[*#batch, states]`.
      log_sum_exp: of the patterns on all devices, `[*#batch, states]`.
      chunk_size: as for `partial_sums`.
    """
    columns, rows = _split_mask(mask, stored)
    if rows is not None:
        log_sum_exp = jnp.where(rows, log_sum_exp, -jnp.inf)
    call = _Call.of(state, stored, values, beta, mask, exclude, columns, chunk_size=chunk_size)
    # States that retrieve nothing, and those that fill up a block, have no weights.
    log_sum_exp = jnp.where(log_sum_exp == -jnp.inf, jnp.inf, log_sum_exp)
    columns_of_stats = (x[..., None] for x in (beta[..., None], log_sum_exp, common))
    shape = (*call.shape, state.shape[-2], 1)
    stats = jnp.concatenate([jnp.broadcast_to(x, shape) for x in columns_of_stats], axis=-1)
    by_row = (
        call.rows(state),
        call.rows(stats, fill=(0.0, jnp.inf, 0.0)),
        call.rows(out_gradient.astype(jnp.promote_types(state.dtype, (stored if values is None else values).dtype))),
        call.excluded(exclude),
    )
    memory = call.memory(stored, values, columns)
    raw = call.unfold(_backward_states(call, *by_row, *memory), 1)
    beta_gradient = _reduce(jnp.sum(raw * state.astype(raw.dtype), axis=(-2, -1)), beta.shape)
    state_gradient = _reduce(raw * beta[..., None, None], state.shape)
    stored_gradient, values_gradient = _backward_memory(call, *by_row, *memory)
    stored_gradient = call.restore(stored_gradient, stored, call.lying[0])
    if values is not None:
        values_gradient = call.restore(values_gradient, values, call.lying[1])
    return state_gradient, stored_gradient, values_gradient, beta_gradient


# How a call is laid out -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """Shapes of a call, and how its arrays lie in blocks.

    Attributes:
      shape: batch axes of all operands together.
      kept: those of them that are axes of the grid; the others are laid side by side as states.
      reduced: those of `kept` that neither patterns nor values have, only the mask.
      states: states of an element of the grid, without those that fill up the last block.
      patterns: stored patterns.
      features: of a pattern.
      value_features: of a value.
      state_block: states of a block.
      pattern_block: patterns of a block.
      shared: whether the patterns are the values.
      held: bytes that the blocks of a kernel may take.
      lying: whether patterns and values lie with the features first, `[*grid, features, patterns]`. So XLA keeps what
        has a number of features that is no multiple of 128, for it pads the last axis to one; in that order a kernel
        can read it where it is.
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]
    reduced: tuple[int, ...]
    states: int
    patterns: int
    features: int
    value_features: int
    state_block: int
    pattern_block: int
    shared: bool
    held: int
    lying: tuple[bool, bool]

    @classmethod
    def of(
        cls, state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, columns: Any, *, chunk_size: int
    ) -> "_Call":
        """Return the layout of a call with these operands."""
        shared = values is None
        values = stored if shared else values
        shape = jnp.broadcast_shapes(cls.batch_of(state, stored, beta, mask, exclude), values.shape[:-2])
        memory = [_batch_like(x, shape) for x in (stored, values)]
        with_mask = memory if columns is None else [*memory, _batch_like(columns, shape)]
        kept = tuple(axis for axis in range(len(shape)) if any(batch[axis] > 1 for batch in with_mask))
        reduced = tuple(axis for axis in kept if all(batch[axis] == 1 for batch in memory))
        states = state.shape[-2] * math.prod(size for axis, size in enumerate(shape) if axis not in kept)
        features, value_features, patterns = stored.shape[-1], values.shape[-1], stored.shape[-2]

        lying = (features % _LANES > 0, value_features % _LANES > 0)
        # Blocks of operands and results, of which two are there at a time, and sums, all as in float32.
        of_state = 4 * (3 * _round_up(features, _LANES) + 5 * _round_up(value_features, _LANES) + 4 * _LANES)
        most = max(_SUBLANES, min(_MOST_STATES, _MEMORY // 2 // of_state // _SUBLANES * _SUBLANES))
        state_block = _balanced(states, most, _SUBLANES)
        # Besides these, the tiles of logits, weights and their gradients, of which not all are there at a time.
        memories = [stored] if shared else [stored, values]
        of_pattern = sum(_round_up(x.shape[-1], _SUBLANES) * (4 * x.dtype.itemsize + 4 + 4) for x in memories)
        most = (_MEMORY - state_block * of_state) // (_TILES * 4 * state_block + of_pattern)
        most = max(_LANES, min(most // _LANES * _LANES, _round_up(chunk_size, _LANES)))
        # Blocks that end with the last pattern need not ask which of theirs are there.
        whole = (size for size in range(most, most // 2, -_LANES) if patterns % size == 0)
        pattern_block = patterns if patterns <= most else next(whole, _balanced(patterns, most, _LANES))
        held = state_block * of_state + pattern_block * (_TILES * 4 * state_block + of_pattern)
        sizes = (states, patterns, features, value_features, state_block, pattern_block)
        return cls(shape, kept, reduced, *sizes, shared, held, lying)

    @staticmethod
    def batch_of(state: Any, stored: Any, beta: Any, mask: Any, exclude: Any) -> tuple[int, ...]:
        """Return the batch axes of the weights."""
        others = [] if mask is None else [mask.shape[:-2]]
        others += [] if exclude is None else [exclude.shape[:-1]]
        return jnp.broadcast_shapes(state.shape[:-2], stored.shape[:-2], beta.shape, *others)

    @property
    def grid(self) -> tuple[int, ...]:
        """The axes of the grid that are batch axes."""
        return tuple(self.shape[axis] for axis in self.kept)

    @property
    def folded(self) -> tuple[int, ...]:
        """The batch axes laid side by side."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.kept)

    @property
    def state_blocks(self) -> int:
        return -(-self.states // self.state_block)

    @property
    def pattern_blocks(self) -> int:
        return -(-self.patterns // self.pattern_block)

    def axis_of_features(self, place: int) -> int:
        """Return which axis of a block of patterns (place 0) or values (1) is that of features."""
        return 0 if self.lying[place] else 1

    @property
    def ragged(self) -> bool:
        """Whether the last block of patterns has some that are not there."""
        return self.patterns % self.pattern_block > 0

    def rows(self, x: Any, *, fill: Sequence[float] = (0.0,)) -> Any:
        """Return `[*#batch, #states, width]` as `[*grid, rows, width]`, with rows of `fill` up to whole blocks."""
        states = self.states // math.prod(self.shape[axis] for axis in self.folded)
        width = x.shape[-1]
        x = jnp.broadcast_to(x, (*self.shape, states, width))
        x = jnp.transpose(x, (*self.kept, *self.folded, len(self.shape), len(self.shape) + 1))
        x = x.reshape(*self.grid, self.states, width)
        missing = self.state_blocks * self.state_block - self.states
        if not missing:
            return x
        more = jnp.broadcast_to(jnp.asarray(fill, x.dtype), (*self.grid, missing, width))
        return jnp.concatenate([x, more], axis=-2)

    def excluded(self, exclude: Any) -> Any:
        """Return the excluded indices as rows."""
        return None if exclude is None else self.rows(exclude.astype(jnp.int32)[..., None])

    def unfold(self, x: Any, trailing: int = 0) -> Any:
        """Return `[*grid, rows, ...]` as `[*batch, states, ...]`."""
        x = jax.lax.slice_in_dim(x, 0, self.states, axis=len(self.grid))
        rest = x.shape[x.ndim - trailing :]
        folded = tuple(self.shape[axis] for axis in self.folded)
        x = x.reshape(*self.grid, *folded, self.states // math.prod(folded), *rest)
        order = (*self.kept, *self.folded)
        batch = len(order)
        places = [order.index(axis) for axis in range(batch)]
        return jnp.transpose(x, (*places, *range(batch, x.ndim)))

    def memory(self, stored: Any, values: Any, columns: Any) -> tuple[Any, Any, Any]:
        """Return patterns, values and mask with an axis for each of the grid, of size 1 where they do not vary."""

        def laid(x: Any, lying: bool) -> Any:
            if x is None:
                return None
            batch = _batch_like(x, self.shape)
            x = x.reshape(*(batch[axis] for axis in self.kept), *x.shape[-2:])
            return jnp.swapaxes(x, -1, -2) if lying else x

        columns = None if columns is None else columns.astype(jnp.int32)
        return laid(stored, self.lying[0]), laid(values, self.lying[1]), laid(columns, False)

    def restore(self, gradient: Any, like: Any, lying: bool) -> Any:
        """Return the gradient of what `memory` made of `like`, summed over axes that it does not have."""
        gradient = jnp.swapaxes(gradient, -1, -2) if lying else gradient
        sizes = iter(gradient.shape[:-2])
        batch = tuple(
            next(sizes) if axis in self.kept and axis not in self.reduced else 1 for axis in range(len(self.shape))
        )
        return _reduce(gradient.reshape(*batch, *gradient.shape[-2:]), like.shape).astype(like.dtype)

    def cost(self, products: Sequence[int], operands: Sequence[Any], results: Sequence[Any]) -> pl.CostEstimate:
        """Return what the compiler is told of a kernel whose products each have these features."""
        cells = math.prod(self.grid) * self.states * self.patterns
        rereads = self.state_blocks
        read = sum(math.prod(x.shape) * x.dtype.itemsize for x in operands if x is not None)
        written = sum(math.prod(x.shape) * x.dtype.itemsize for x in results)
        return pl.CostEstimate(
            flops=2 * cells * sum(products), transcendentals=cells, bytes_accessed=rereads * read + written
        )


def _split_mask(mask: Any, stored: Any) -> tuple[Any, Any]:
    """Return a mask as that of patterns, `[*#batch, 1, patterns]`, and that of states, `[*#batch, #states]`."""
    if mask is None:
        return None, None
    if mask.shape[-2] == 1 and mask.shape[-1] == stored.shape[-2]:
        return mask, None
    return None, mask[..., 0]


def _batch_like(x: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the batch axes of an operand, as many as there are in all."""
    batch = x.shape[:-2]
    return (1,) * (len(shape) - len(batch)) + tuple(batch)


def _reduce(x: Any, shape: tuple[int, ...]) -> Any:
    """Return `x` summed over the axes along which an array of that shape was broadcast."""
    extra = x.ndim - len(shape)
    axes = tuple(axis for axis in range(x.ndim) if axis < extra or shape[axis - extra] != x.shape[axis])
    return jnp.sum(x, axis=axes, keepdims=True).reshape(shape) if axes else x


def _take_first(x: Any, shape: tuple[int, ...]) -> Any:
    """Return the first of the entries along each axis that `shape` does not have."""
    shape = (1,) * (x.ndim - len(shape)) + tuple(shape)
    return x[tuple(slice(0, size) for size in shape)].reshape(shape)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _balanced(number: int, most: int, multiple: int) -> int:
    """Return the size of the least number of blocks, of equal size, that are each no more than `most`."""
    return _round_up(-(-number // -(-number // most)), multiple)


# Kernels --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The blocks that a kernel reads, in the order of its operands."""

    state: Any
    stats: Any
    out_gradient: Any
    exclude: Any
    stored: Any
    values: Any
    mask: Any

    def patterns(self, call: _Call, block: Any) -> Any:
        """Return the stored patterns of the block, zeros behind the last one."""
        return self._there(call, block, self.stored[...], call.lying[0])

    def recalled(self, call: _Call, block: Any) -> Any:
        """Return the values of the block, zeros behind the last one."""
        if self.values is None:
            return self.patterns(call, block)
        return self._there(call, block, self.values[...], call.lying[1])

    def logits(self, call: _Call, block: Any) -> Any:
        """Return beta X^T xi, minus infinity where nothing may be retrieved."""
        state, stored = _promoted(self.state[...], self.stored[...])
        logits = _dot(state, stored, 1, call.axis_of_features(0)) * self.stats[:, :1]
        allowed = []
        if self.mask is not None:
            allowed.append(jnp.broadcast_to(self.mask[...] != 0, logits.shape))
        if call.ragged or self.exclude is not None:
            column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + block * call.pattern_block
            if call.ragged:
                allowed.append(column < call.patterns)
            if self.exclude is not None:
                allowed.append(column != self.exclude[...])
        return jnp.where(functools.reduce(jnp.logical_and, allowed), logits, -jnp.inf) if allowed else logits

    def gradients(self, call: _Call, block: Any) -> tuple[Any, Any]:
        """Return p, and the gradient of the logits over it."""
        weights = jnp.exp(self.logits(call, block) - self.stats[:, 1:2])
        values = (self.stored if self.values is None else self.values)[...]
        out_gradient, values = _promoted(self.out_gradient[...], values)
        by_weights = _dot(out_gradient, values, 1, call.axis_of_features(1))
        inner = weights * (by_weights + self.stats[:, 2:3])
        # What lies behind the last pattern may be anything.
        inner = jnp.where(weights > 0, inner, 0) if call.ragged else inner
        return weights, inner

    def _there(self, call: _Call, block: Any, x: Any, lying: bool) -> Any:
        if not call.ragged:
            return x
        axis = 1 if lying else 0
        shape = (1, x.shape[1]) if lying else (x.shape[0], 1)
        index = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + block * call.pattern_block
        return jnp.where(index < call.patterns, x, jnp.zeros_like(x))


def _dot(a: Any, b: Any, a_axis: int, b_axis: int) -> Any:
    """Return the product over one axis of each, summed in float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _over_states(weights: Any, rows: Any, lying: bool) -> Any:
    """Return the sums of rows by the weights of each pattern, with the features first if they are to lie so."""
    weights = weights.astype(rows.dtype)
    return _dot(rows, weights, 0, 0) if lying else _dot(weights, rows, 0, 0)


def _promoted(a: Any, b: Any) -> tuple[Any, Any]:
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def _forward(call: _Call, state: Any, stats: Any, exclude: Any, stored: Any, values: Any, mask: Any) -> Any:
    """Return the weighted sum of values, `[*grid, rows, value_features]`, and for each row its maximum and sum."""
    axis = len(call.grid) + 1

    def kernel(refs: _Refs, out: Any, found: Any, largest: Any, total: Any, weighted: Any) -> None:
        block = pl.program_id(axis)

        @pl.when(block == 0)
        def _() -> None:
            largest[...] = jnp.full_like(largest, -jnp.inf)
            total[...] = jnp.zeros_like(total)
            weighted[...] = jnp.zeros_like(weighted)

        logits = refs.logits(call, block)
        new = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
        finite = jnp.where(new == -jnp.inf, 0.0, new)
        scale = jnp.exp(largest[...] - finite)
        weights = jnp.exp(logits - finite)
        values = _promoted(refs.recalled(call, block), refs.state[...])[0]
        largest[...] = new
        total[...] = total[...] * scale + jnp.sum(weights, axis=1, keepdims=True)
        weighted[...] = weighted[...] * scale + _dot(
            weights.astype(values.dtype), values, 1, 1 - call.axis_of_features(1)
        )

        @pl.when(block == call.pattern_blocks - 1)
        def _() -> None:
            out[...] = weighted[...]
            found[:, :1] = largest[...]
            found[:, 1:] = total[...]

    rows = state.shape[:-1]
    shapes = [jax.ShapeDtypeStruct((*rows, width), jnp.float32) for width in (call.value_features, 2)]
    size = call.state_block
    scratch = [pltpu.VMEM((size, width), jnp.float32) for width in (1, 1, call.value_features)]
    return _call(
        call, kernel, "association", (state, stats, None, exclude, stored, values, mask), shapes, scratch,
        (call.features, call.value_features),
    )  # fmt: skip


def _backward_states(call: _Call, state: Any, stats: Any, out_gradient: Any, exclude: Any, *memory: Any) -> Any:
    """Return the gradient of the states, `[*grid, rows, features]`, but for the factor beta."""
    axis = len(call.grid) + 1

    def kernel(refs: _Refs, out: Any, total: Any) -> None:
        block = pl.program_id(axis)

        @pl.when(block == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        _, inner = refs.gradients(call, block)
        _, stored = _promoted(refs.state[...], refs.patterns(call, block))
        total[...] += _dot(inner.astype(stored.dtype), stored, 1, 1 - call.axis_of_features(0))

        @pl.when(block == call.pattern_blocks - 1)
        def _() -> None:
            out[...] = total[...]

    shapes = [jax.ShapeDtypeStruct((*state.shape[:-1], call.features), jnp.float32)]
    scratch = [pltpu.VMEM((call.state_block, call.features), jnp.float32)]
    return _call(
        call, kernel, "association_states", (state, stats, out_gradient, exclude, *memory), shapes, scratch,
        (call.features, call.value_features, call.features),
    )[0]  # fmt: skip


def _backward_memory(
    call: _Call, state: Any, stats: Any, out_gradient: Any, exclude: Any, stored: Any, values: Any, mask: Any
) -> tuple[Any, Any]:
    """Return the gradients of patterns and values, `[*outer, patterns, features]`, the second `None` if there is one.

    The outer axes are those of the grid that patterns or values have.
    """
    outer = tuple(axis for axis in call.kept if axis not in call.reduced)
    inner_axes = range(len(outer) + 1, len(call.kept) + 2)

    def kernel(refs: _Refs, *rest: Any) -> None:
        outs, totals = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        block = pl.program_id(len(outer))
        first = functools.reduce(jnp.logical_and, (pl.program_id(axis) == 0 for axis in inner_axes))
        ends = (pl.program_id(axis) == pl.num_programs(axis) - 1 for axis in inner_axes)
        last = functools.reduce(jnp.logical_and, ends)

        @pl.when(first)
        def _() -> None:
            for total in totals:
                total[...] = jnp.zeros_like(total)

        weights, inner = refs.gradients(call, block)
        (state, _), out_gradient = _promoted(refs.state[...], refs.stored[...]), refs.out_gradient[...]
        scaled = inner * refs.stats[:, :1]
        by_stored = _over_states(scaled, state, call.lying[0])
        by_values = _over_states(weights, out_gradient, call.lying[1])
        if call.shared:
            totals[0][...] += by_stored + by_values
        else:
            totals[0][...] += by_stored
            totals[1][...] += by_values

        @pl.when(last)
        def _() -> None:
            for out, total in zip(outs, totals, strict=True):
                out[...] = total[...].astype(out.dtype)

    operands = [stored] if call.shared else [stored, values]
    sizes = tuple(call.shape[axis] for axis in outer)
    # What is still to be summed over axes that an operand does not have stays in float32.
    shapes = [
        jax.ShapeDtypeStruct(
            (*sizes, *x.shape[-2:]),
            x.dtype if all(x.shape[call.kept.index(axis)] == call.shape[axis] for axis in outer) else jnp.float32,
        )
        for x in operands
    ]
    scratch = [
        pltpu.VMEM((x.shape[-2], call.pattern_block) if lying else (call.pattern_block, x.shape[-1]), jnp.float32)
        for x, lying in zip(operands, call.lying, strict=False)
    ]
    found = _call(
        call, kernel, "association_memory", (state, stats, out_gradient, exclude, stored, values, mask), shapes,
        scratch, (call.features, call.value_features, call.features, call.value_features), memory_axes=outer,
    )  # fmt: skip
    return found[0], None if call.shared else found[1]


def _call(
    call: _Call,
    kernel: Callable[..., None],
    name: str,
    operands: Sequence[Any],
    shapes: Sequence[Any],
    scratch: Sequence[Any],
    products: Sequence[int],
    memory_axes: tuple[int, ...] | None = None,
) -> Any:
    """Run a kernel over all blocks.

    Without `memory_axes` the grid is (*grid, blocks of states, blocks of patterns) and results belong to states; with
    them (*memory_axes, blocks of patterns, *other axes of the grid, blocks of states), and results belong to patterns.
    """
    by_states = memory_axes is None
    outer = call.kept if memory_axes is None else memory_axes
    others = tuple(axis for axis in call.kept if axis not in outer)
    order = (*outer, *others)
    states, patterns = (call.state_block, call.state_blocks), (call.pattern_block, call.pattern_blocks)

    def places(indices: Sequence[Any]) -> tuple[dict[int, Any], Any, Any]:
        """Return the index along each batch axis, that of the states and that of the patterns."""
        middle = len(outer)
        batch = dict(zip(order, (*indices[:middle], *indices[middle + 1 : -1]), strict=True))
        return (batch, *((indices[middle], indices[-1]) if by_states else (indices[-1], indices[middle])))

    def of_states(width: int) -> pl.BlockSpec:
        def index(*indices: Any) -> tuple[Any, ...]:
            batch, row, _ = places(indices)
            return (*(batch[axis] for axis in call.kept), row, 0)

        return pl.BlockSpec((*(None,) * len(call.kept), states[0], width), index)

    def of_patterns(x: Any, axes: tuple[int, ...], lying: bool) -> pl.BlockSpec:
        def index(*indices: Any) -> tuple[Any, ...]:
            batch, _, column = places(indices)
            # An axis that the operand does not have is read at its only place.
            leading = (batch[axis] if size > 1 else 0 for axis, size in zip(axes, x.shape[:-2], strict=True))
            return (*leading, 0, column) if lying else (*leading, column, 0)

        block = (x.shape[-2], patterns[0]) if lying else (patterns[0], x.shape[-1])
        return pl.BlockSpec((*(None,) * len(axes), *block), index)

    present = [x is not None for x in operands]
    specs = [None if x is None else of_states(x.shape[-1]) for x in operands[:4]]
    lying = (*call.lying, True)
    memory = zip(operands[4:], lying, strict=True)
    specs += [None if x is None else of_patterns(x, call.kept, each) for x, each in memory]

    def body(*refs: Any) -> None:
        reads = iter(refs[: sum(present)])
        kernel(_Refs(*(next(reads) if here else None for here in present)), *refs[sum(present) :])

    sizes = {axis: call.shape[axis] for axis in call.kept}
    if by_states:
        grid = (*(sizes[axis] for axis in outer), states[1], patterns[1])
        parallel = len(grid) - 1
    else:
        grid = (*(sizes[axis] for axis in outer), patterns[1], *(sizes[axis] for axis in others), states[1])
        parallel = len(outer) + 1
    semantics: list[Any] = ["parallel"] * parallel + ["arbitrary"] * (len(grid) - parallel)
    run = functools.partial(
        pl.pallas_call,
        body,
        out_shape=list(shapes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid,
            in_specs=[spec for spec in specs if spec is not None],
            out_specs=[
                of_states(x.shape[-1]) if by_states else of_patterns(x, outer, each)
                for x, each in zip(shapes, lying, strict=False)
            ],
            scratch_shapes=list(scratch),
        ),
        cost_estimate=call.cost(products, operands, shapes),
        name=name,
    )
    here = [x for x in operands if x is not None]
    # Patterns of many thousand features do not fit what is given unasked, even in the smallest block.
    limit = 2 * call.held if call.held > _MEMORY else None
    # Which of the two is lowered is known only then: code for a TPU may be compiled where there is none.
    return jax.lax.platform_dependent(
        *here,
        cpu=run(interpret=True),
        tpu=run(compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)),
    )
