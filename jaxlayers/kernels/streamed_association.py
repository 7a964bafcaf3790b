"""softmax(beta R X^T) V without a matrix of weights: chunk by chunk, over devices that each hold some patterns.

The softmax of a row is known once its maximum and its sum of exponentials are, and both can be kept up to date while
the patterns pass by (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Rabe and Staats,
Self-attention does not need O(n^2) memory, 2021). Devices that hold different patterns bring their maxima, sums and
values together at the end; no pattern travels. The gradient passes over the patterns once more and computes the weights
anew from the logarithm of the sum.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.kernels.dispatch import Kernel, check_kernel


class Streamed(NamedTuple):
    """What `streamed_association` returns.

    Attributes:
      values: softmax(beta R X^T) V, `[*batch, states, value_features]`.
      log_sum_exp: ln sum_i exp(beta x_i^T xi) over the patterns that a state may retrieve, `[*batch, states]`; minus
        infinity if there are none.
    """

    values: Array
    log_sum_exp: Array


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of a call is known while tracing."""

    chunk_size: int
    axis: tuple[str, ...]
    kernel: Kernel
    dropout_rate: float
    # The mesh axes that each batch axis is split over, of the last ones; for a kernel, which XLA does not split itself.
    split: tuple[tuple[str, ...], ...] = ()


def streamed_association(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    values: Float[Array, "*#batch patterns value_features"] | None = None,
    *,
    beta: float | int | Float[Array, "*#batch"],
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    exclude: Int[Array, "*#batch #states"] | None = None,
    chunk_size: int = 4096,
    axis: str | tuple[str, ...] = (),
    kernel: Kernel = "jnp",
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Streamed:
    """Return softmax(beta R X^T) V and the logarithm of its normaliser, with memory that N patterns do not add to.

    Equal to the plain form up to rounding, in value and gradient (of `state`, `stored`, `values` and `beta`; reverse
    mode). Besides its operands and their gradients it needs O(states * chunk_size) numbers for each batch element.

    With `axis`, patterns and values lie split over these axes of the mesh in scope (`jax.set_mesh`, `jit`), and each
    device reads its own: of forward and backward pass only the states, their results and their gradients are summed
    over the axis, whatever the number of patterns.

    Args:
      state: state patterns, the rows of R.
      stored: stored patterns, the rows of X.
      values: one for each stored pattern; `None` = the stored patterns.
      beta: inverse temperature of at least 0, one number or one for each batch element.
      mask: True = may be retrieved; with one row for all states, `[*batch, 1, patterns]`, it costs as good as nothing.
      exclude: index of the one pattern that a state may not retrieve, such as its own; -1 = none.
      chunk_size: patterns that a device looks at together.
      axis: mesh axes that the patterns are split over; `()` = none.
      kernel: what computes it: "jnp", or "pallas" for a kernel on TPU, see `kernels.pallas_association`; that serves
        float32 and bfloat16, masks of one row or one column, and no dropout, and on a GPU it is "jnp" that serves. With
        a mesh in scope the kernel runs on the parts that the logical rules in scope give to the last two batch axes,
        `core.axes.BATCH` and `HEADS`, which the partitioner could not find itself.
      dropout_rate: rate of weights dropped (the others grow to keep the mean), in [0, 1).
      dropout_key: needed for dropout.

    Returns:
      The values, in the dtype that states and values promote to, and the log-sum-exp. A state that may retrieve nothing
      gets zeros and minus infinity.

    Raises:
      ValueError: if shapes do not fit, there is no pattern, or an argument is out of its range.
    """
    axis = (axis,) if isinstance(axis, str) else tuple(axis)
    check_operands(state, stored, beta)
    count = stored.shape[-2]
    if values is not None and values.shape[-2] != count:
        raise ValueError(f"values has {values.shape[-2]} rows for {count} stored patterns; pass one for each pattern")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1; set chunk_size")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate={dropout_rate} must be in [0, 1); set dropout_rate")
    if dropout_rate and dropout_key is None:
        raise ValueError(f"dropout_rate={dropout_rate} needs a dropout_key; pass one, or dropout_rate=0")
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask of dtype {mask.dtype} must be bool, True = may be retrieved; pass mask > 0 or the like")
    if mask is not None and mask.shape[-1] not in (1, count):
        raise ValueError(f"mask of shape {mask.shape} must end in {count} stored patterns or 1; pass one that does")
    if axis:
        sizes = dict(jax.sharding.get_abstract_mesh().shape)
        unknown = [name for name in axis if name not in sizes]
        if unknown:
            raise ValueError(f"axis {unknown[0]!r} must be one of the mesh in scope, {tuple(sizes)}; use jax.set_mesh")
        parts = math.prod(sizes[name] for name in axis)
        if count % parts:
            raise ValueError(
                f"patterns={count} must divide by the {parts} devices along {axis}; pad them and mask what is padding"
            )
    check_kernel(kernel)
    beta = jnp.asarray(beta, at_least_float32(jnp.promote_types(state.dtype, stored.dtype)))
    plan = _Plan(chunk_size, axis, kernel, float(dropout_rate))
    if kernel == "pallas":
        _pallas().check_supported(state, stored, mask, dropout_rate)
        batch = jnp.broadcast_shapes(
            _batch(state, stored, beta, mask, exclude), () if values is None else values.shape[:-2]
        )
        plan = dataclasses.replace(plan, split=_batch_split(batch, axis))
    return Streamed(
        *_associate(plan, state, stored, values, beta, mask, exclude, dropout_key if dropout_rate else None)
    )


def check_operands(state: Array, stored: Array, beta: Any) -> None:
    """Raise the `ValueError` for an empty memory, patterns of different widths or a negative number for `beta`."""
    if state.shape[-1] != stored.shape[-1]:
        raise ValueError(
            f"state patterns have {state.shape[-1]} features and stored patterns {stored.shape[-1]}, which must be "
            "equal; project one of them"
        )
    if not stored.shape[-2]:
        raise ValueError("patterns=0 must be at least 1: an empty memory has nothing to retrieve; store a pattern")
    if isinstance(beta, int | float) and not 0 <= beta < math.inf:
        raise ValueError(f"beta={beta} must be finite and at least 0; set beta")


def moved_association(
    state: Float[Array, "*#batch states features"],
    log_sum_exp: Float[Array, "*#batch states"],
    new_state: Float[Array, "*#batch states features"],
    new_log_sum_exp: Float[Array, "*#batch states"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: float | int | Float[Array, "*#batch"],
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    exclude: Int[Array, "*#batch #states"] | None = None,
    chunk_size: int = 4096,
    axis: str | tuple[str, ...] = (),
) -> Float[Array, "*#batch states"]:
    """Return ||p' - p||, how far the association moves between two states, in one pass and without a gradient.

    Args:
      state: the first states.
      log_sum_exp: theirs, from `streamed_association`.
      new_state: the second states.
      new_log_sum_exp: theirs.
      stored: stored patterns.
      beta: as given to `streamed_association`, like the arguments after it.
      mask: see there.
      exclude: see there.
      chunk_size: see there.
      axis: see there.
    """
    plan = _Plan(chunk_size, (axis,) if isinstance(axis, str) else tuple(axis), "jnp", 0.0)
    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    operands = (state, log_sum_exp, new_state, new_log_sum_exp, stored, jnp.asarray(beta, dtype), mask, exclude)
    return _moved(plan, *jax.lax.stop_gradient(operands))


# Forward and backward -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _associate(plan: _Plan, *operands: Any) -> tuple[Array, Array]:
    return _forward(plan, *operands)


@functools.partial(jax.jit, static_argnums=0)
def _forward(plan: _Plan, state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, key: Any) -> Any:
    def local(state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, key: Any) -> Any:
        largest, total, weighted = _partial_sums(plan, state, stored, values, beta, mask, exclude, key)
        if plan.axis:
            own, largest = largest, jax.lax.pmax(largest, plan.axis)
            scale = jnp.exp(own - _finite(largest))
            total, weighted = jax.lax.psum((total * scale, weighted * scale[..., None]), plan.axis)
        some = total > 0
        total = jnp.where(some, total, 1)
        log_sum_exp = jnp.where(some, _finite(largest) + jnp.log(total), -jnp.inf)
        dtype = jnp.promote_types(state.dtype, (stored if values is None else values).dtype)
        return (weighted / total[..., None]).astype(dtype), log_sum_exp

    return _on_devices(plan, local, (None, None))(state, stored, values, beta, mask, exclude, key)


def _forward_and_keep(plan: _Plan, *operands: Any) -> tuple[Any, Any]:
    results = _forward(plan, *operands)
    return results, (operands, results)


@functools.partial(jax.jit, static_argnums=0)
def _backward(plan: _Plan, kept: Any, gradients: tuple[Array, Array]) -> tuple[Any, ...]:
    (state, stored, values, beta, mask, exclude, key), (out, log_sum_exp) = kept
    dtype = log_sum_exp.dtype
    out_gradient, gradient = (each.astype(dtype) for each in gradients)
    # Of the gradient of a softmax, what all patterns of a state have in common.
    common = gradient - jnp.sum(out_gradient * out.astype(dtype), axis=-1)

    def local(
        state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, key: Any, *rest: Any
    ) -> tuple[Any, ...]:
        found = _partial_gradients(plan, state, stored, values, beta, mask, exclude, key, *rest)
        state_gradient, stored_gradient, values_gradient, beta_gradient = found
        if plan.axis:
            state_gradient, beta_gradient = jax.lax.psum((state_gradient, beta_gradient), plan.axis)
        return state_gradient.astype(state.dtype), stored_gradient, values_gradient, beta_gradient

    each = _on_devices(plan, local, (None, -2, -2, None))
    found = each(state, stored, values, beta, mask, exclude, key, out_gradient, common, log_sum_exp)
    return *found, None, None, None


_associate.defvjp(_forward_and_keep, _backward)


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    plan: _Plan, state: Any, total: Any, new_state: Any, new_total: Any, stored: Any, beta: Any, mask: Any, exclude: Any
) -> Array:
    def local(state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, key: Any, *rest: Any) -> Array:
        del values, key
        total, new_state, new_total = rest

        def step(chunk: _Chunk, squares: Array) -> Array:
            part = chunk.take(stored)
            weights = chunk.weights(_logits(state, part, beta), total)
            new_weights = chunk.weights(_logits(new_state, part, beta), new_total)
            return squares + jnp.sum(jnp.square(new_weights - weights), axis=-1)

        shape = _batch(state, stored, beta, mask, exclude)
        start = _varying(plan, jnp.zeros((*shape, state.shape[-2]), beta.dtype))
        squares = _fold(plan, stored, mask, exclude, step, start)
        return jnp.sqrt(jax.lax.psum(squares, plan.axis) if plan.axis else squares)

    each = _on_devices(plan, local, None)
    return each(state, stored, None, beta, mask, exclude, None, total, new_state, new_total)


def _on_devices(plan: _Plan, local: Callable[..., Any], splits: Any) -> Callable[..., Any]:
    """Return `local` run where the patterns are; `splits` names the axis of each result that lies split like them."""
    if plan.kernel == "pallas":
        return _on_all_devices(plan, local, gradients=splits[1:2] == (-2,))
    if not plan.axis:
        return local

    def spec(x: Any, axis: int | None) -> Any:
        split = None if x is None or axis is None else (None,) * (x.ndim + axis) + (plan.axis,)
        return PartitionSpec() if split is None else PartitionSpec(*split)

    def everywhere(
        state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, key: Any, *rest: Any
    ) -> Any:
        operands = (state, stored, values, beta, mask, exclude, key, *rest)
        mask_axis = -1 if mask is not None and mask.shape[-1] == stored.shape[-2] else None
        in_axes = (None, -2, -2, None, mask_axis, *(None,) * (len(operands) - 5))
        in_specs = tuple(spec(x, axis) for x, axis in zip(operands, in_axes, strict=True))
        if isinstance(splits, tuple):
            like = (None, stored, values, None)
            out_specs: Any = tuple(spec(like[place], axis) for place, axis in enumerate(splits))
        else:
            out_specs = PartitionSpec()

        def here(*operands: Any) -> Any:
            # Else the transpose of each product with an operand that all devices share would sum over them at once.
            own = (_varying(plan, x) if axis is None else x for x, axis in zip(operands, in_axes, strict=True))
            return local(*own)

        return jax.shard_map(here, in_specs=in_specs, out_specs=out_specs, axis_names=set(plan.axis))(*operands)

    return everywhere


def _on_all_devices(plan: _Plan, local: Callable[..., Any], *, gradients: bool) -> Callable[..., Any]:
    """Return `local` run by each device on its part of the batch and of the patterns.

    Nothing is left to the partitioner, which cannot split a kernel, so that what `local` returns as the gradients of
    its first operands is to be summed over devices with other parts of the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for name in mesh.axis_names if name not in mesh.manual_axes}
    if not names:
        return local

    def split(batch: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        """Return the mesh axes that the batch axes of an operand are split over."""
        known = ((),) * (len(batch) - len(plan.split)) + plan.split[max(0, len(plan.split) - len(batch)) :]
        return tuple(each if size > 1 else () for each, size in zip(known, batch, strict=True))

    def spec(batch: tuple[int, ...], *trailing: tuple[str, ...]) -> PartitionSpec:
        return PartitionSpec(*(each or None for each in (*split(batch), *trailing)))

    def everywhere(*operands: Any) -> Any:
        state, stored, _, beta, mask, exclude, *_ = operands
        parts = plan.axis if mask is not None and mask.shape[-1] == stored.shape[-2] else ()
        memory, rows, numbers = (plan.axis, ()), ((), ()), ((),)
        trailing = (rows, memory, memory, (), ((), parts), numbers, None, rows, numbers, numbers)
        batches = [
            () if x is None else x.shape[: x.ndim - len(y or ())] for x, y in zip(operands, trailing, strict=False)
        ]
        in_specs = tuple(
            PartitionSpec() if x is None else spec(batch, *(y or ()))
            for x, batch, y in zip(operands, batches, trailing, strict=False)
        )
        weights_batch = _batch(state, stored, beta, mask, exclude)
        out_batch = jnp.broadcast_shapes(weights_batch, batches[2])
        out_specs = in_specs[:4] if gradients else (spec(out_batch, *rows), spec(weights_batch, *numbers))

        def run(*operands: Any) -> Any:
            found = local(*operands)
            return tuple(map(summed, found, batches[:4])) if gradients else found

        def summed(gradient: Any, batch: tuple[int, ...]) -> Any:
            others = {name for each in plan.split for name in each} - {name for each in split(batch) for name in each}
            return jax.lax.psum(gradient, tuple(others)) if others and gradient is not None else gradient

        # The results of a kernel bear no types that say over which axes they vary.
        return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)(*operands)

    return everywhere


# On one device --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A run of stored patterns, and which states may retrieve them.

    Attributes:
      number: which chunk.
      start: its first pattern.
      size: patterns in it.
      allowed: `[*#batch, #states, size]`.
    """

    number: Any
    start: Any
    size: int
    allowed: Array

    def take(self, x: Array) -> Array:
        """Return the rows of the chunk."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=x.ndim - 2)

    def add(self, x: Array, rows: Array) -> Array:
        """Return `x` with `rows` added to those of the chunk."""
        rows = self.take(x) + rows.astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self.start, axis=x.ndim - 2)

    def weights(self, logits: Array, log_sum_exp: Array) -> Array:
        """Return p."""
        return jnp.where(self.allowed, jnp.exp(logits - _finite(log_sum_exp)[..., None]), 0)


def _partial_sums(
    plan: _Plan, state: Any, stored: Any, values: Any, beta: Any, mask: Any, exclude: Any, key: Any
) -> tuple[Array, Array, Array]:
    """Return, of the patterns here, the largest logit, the sum of exponentials, and the sum of values by them."""
    if plan.kernel == "pallas":
        exclude = _counted_here(plan, exclude, stored.shape[-2])
        return _pallas().partial_sums(state, stored, values, beta, mask, exclude, chunk_size=plan.chunk_size)
    values = stored if values is None else values
    dtype = beta.dtype
    shape = (*_batch(state, stored, beta, mask, exclude), state.shape[-2])
    out_shape = (*jnp.broadcast_shapes(shape[:-1], values.shape[:-2]), shape[-1], values.shape[-1])

    def step(chunk: _Chunk, carry: Any) -> Any:
        largest, total, weighted = carry
        logits = jnp.where(chunk.allowed, _logits(state, chunk.take(stored), beta), -jnp.inf)
        new = jnp.maximum(largest, jnp.max(logits, axis=-1))
        scale = jnp.exp(largest - _finite(new))
        weights = jnp.exp(logits - _finite(new)[..., None])
        total = total * scale + jnp.sum(weights, axis=-1)
        weights = _drop(plan, key, chunk.number, weights)
        weighted = weighted * scale[..., None] + _recall(weights, chunk.take(values), state.dtype, dtype)
        return new, total, weighted

    start = (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros(out_shape, dtype))
    return _fold(plan, stored, mask, exclude, step, _varying(plan, start))


def _partial_gradients(
    plan: _Plan,
    state: Any,
    stored: Any,
    values: Any,
    beta: Any,
    mask: Any,
    exclude: Any,
    key: Any,
    out_gradient: Any,
    common: Any,
    log_sum_exp: Any,
) -> tuple[Any, ...]:
    """Return the gradients that come from the patterns here."""
    if plan.kernel == "pallas":
        exclude = _counted_here(plan, exclude, stored.shape[-2])
        operands = (state, stored, values, beta, mask, exclude, out_gradient, common, log_sum_exp)
        return _pallas().partial_gradients(*operands, chunk_size=plan.chunk_size)

    def step(chunk: _Chunk, carry: Any) -> Any:
        state_gradient, stored_gradient, values_gradient, beta_gradient = carry
        part = chunk.take(stored)
        # Weights of a pattern in a row, so that one product alone has a factor to be turned, not two: a CPU takes up to
        # twice the time for those.
        logits, to_operands = jax.vjp(_logits, part, state, beta)
        allowed = jnp.swapaxes(chunk.allowed, -1, -2)
        weights = jnp.where(allowed, jnp.exp(logits - _finite(log_sum_exp)[..., None, :]), 0)

        def recall(weights: Array, value: Array) -> Array:
            if key is not None:
                weights = jnp.swapaxes(_drop(plan, key, chunk.number, jnp.swapaxes(weights, -1, -2)), -1, -2)
            return _recall(weights, value, state.dtype, beta.dtype, "...ps,...pd->...sd")

        _, to_values = jax.vjp(recall, weights, part if values is None else chunk.take(values))
        by_weights, by_values = to_values(out_gradient)
        by_stored, by_state, by_beta = to_operands(weights * (by_weights + common[..., None, :]))
        if values is None:
            by_stored = by_stored + by_values
        else:
            values_gradient = chunk.add(values_gradient, by_values)
        state_gradient = state_gradient + by_state.astype(beta.dtype)
        return state_gradient, chunk.add(stored_gradient, by_stored), values_gradient, beta_gradient + by_beta

    start = (
        jnp.zeros(state.shape, beta.dtype),
        jnp.zeros(stored.shape, stored.dtype),
        None if values is None else jnp.zeros(values.shape, values.dtype),
        jnp.zeros(beta.shape, beta.dtype),
    )
    return _fold(plan, stored, mask, exclude, step, _varying(plan, start))


def _fold(plan: _Plan, stored: Any, mask: Any, exclude: Any, step: Callable[[_Chunk, Any], Any], start: Any) -> Any:
    """Return the carry after all chunks of the patterns here."""
    count = stored.shape[-2]
    size = min(plan.chunk_size, count)
    exclude = _counted_here(plan, exclude, count)

    def body(number: Any, carry: Any) -> Any:
        # The last chunk reaches back over patterns that have been seen.
        begin = jnp.minimum(number * size, count - size)
        index = begin + jnp.arange(size)
        allowed = (index >= number * size)[None]
        if mask is not None:
            wide = mask.shape[-1] == count
            allowed = allowed & (jax.lax.dynamic_slice_in_dim(mask, begin, size, axis=mask.ndim - 1) if wide else mask)
        if exclude is not None:
            allowed = allowed & (index != exclude[..., None])
        return step(_Chunk(number, begin, size, allowed), carry)

    return jax.lax.fori_loop(0, -(-count // size), body, start)


def _counted_here(plan: _Plan, exclude: Any, count: int) -> Any:
    """Return indices of patterns as those among the `count` of this device."""
    return exclude - jax.lax.axis_index(plan.axis) * count if plan.axis and exclude is not None else exclude


def _logits(state: Array, stored: Array, beta: Array) -> Array:
    """Return beta X^T xi, in the dtype of beta."""
    return jnp.einsum("...sd,...pd->...sp", state, stored, preferred_element_type=beta.dtype) * beta[..., None, None]


def _recall(weights: Array, values: Array, state_dtype: Any, dtype: Any, product: str = "...sp,...pd->...sd") -> Array:
    """Return p V, its product taken in the dtype that states and values promote to, and its sum in `dtype`."""
    weights, values = (x.astype(jnp.promote_types(state_dtype, values.dtype)) for x in (weights, values))
    return jnp.einsum(product, weights, values, preferred_element_type=dtype)


def _drop(plan: _Plan, key: Any, number: Any, weights: Array) -> Array:
    """Return the weights without those dropped, the same ones in forward and backward pass."""
    if key is None:
        return weights
    key = jax.random.fold_in(key, number)
    if plan.axis:
        key = jax.random.fold_in(key, jax.lax.axis_index(plan.axis))
    kept = jax.random.bernoulli(key, 1 - plan.dropout_rate, weights.shape)
    return jnp.where(kept, weights / (1 - plan.dropout_rate), 0)


def _batch(state: Array, stored: Array, beta: Array, mask: Any, exclude: Any) -> tuple[int, ...]:
    """Return the batch axes of the weights."""
    others = [] if mask is None else [mask.shape[:-2]]
    others += [] if exclude is None else [exclude.shape[:-1]]
    return jnp.broadcast_shapes(state.shape[:-2], stored.shape[:-2], beta.shape, *others)


def _batch_split(batch: tuple[int, ...], axis: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes of the last of these batch axes, [batch, heads] or [heads], by the logical rules."""
    names = (axes.BATCH, axes.HEADS)[2 - min(2, len(batch)) :]
    taken = {*axis, *jax.sharding.get_abstract_mesh().manual_axes}
    found = axes.split(batch, *names)
    return tuple(tuple(name for name in each if name not in taken) for each in found)


def _pallas() -> Any:
    """Return the module of kernels, which takes over a second to import."""
    from jaxlayers.kernels import pallas_association

    return pallas_association


def _finite(x: Array) -> Array:
    """Return `x` with zeros for the infinities of states that may retrieve nothing."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _varying(plan: _Plan, tree: Any) -> Any:
    """Tell the types that each device along the axis is to hold its own."""
    return jax.lax.pcast(tree, plan.axis, to="varying") if plan.axis else tree
