"""Retrieval from memories larger than a device: updates and fixed points without a matrix of associations.

Patterns pass by in chunks, and may lie split over the devices of a mesh: see `kernels.streamed_association`. The
functions and layers of `hopfield` take a `Streaming` and then come here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.kernels.streamed_association import Kernel, Streamed, moved_association, streamed_association


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How the associations with a large memory are computed, a chunk of stored patterns at a time.

    Attributes:
      chunk_size: patterns that a device looks at together. Memory grows with it, and small ones are slow.
      axis: mesh axes that the patterns are split over, of the mesh in scope (`jax.set_mesh`). `None` = those that the
        logical rules in scope give to `core.axes.PATTERNS` and that divide the number of patterns; `()` = none.
      kernel: what computes a chunk; see `streamed_association`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield.hopfield import retrieve
      >>> from jaxlayers.hopfield.streaming import Streaming
      >>> patterns = jax.random.normal(jax.random.key(0), (50_000, 32))
      >>> found = retrieve(patterns[:3] + 0.1, patterns, beta=8.0, update_steps=3, streaming=Streaming(chunk_size=8192))
      >>> bool(jnp.allclose(found.state, patterns[:3], atol=1e-4))
      True
    """

    chunk_size: int = 4096
    axis: str | tuple[str, ...] | None = None
    kernel: Kernel = "jnp"

    def on(self, count: int) -> dict[str, Any]:
        """Return the keywords of `streamed_association` for a memory of `count` patterns."""
        axis = axes.split((count,), axes.PATTERNS)[0] if self.axis is None else self.axis
        return {"chunk_size": self.chunk_size, "axis": axis, "kernel": self.kernel}


def iterate(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    values: Float[Array, "*#batch patterns value_features"] | None = None,
    *,
    streaming: Streaming,
    beta: float | int | Float[Array, "*#batch"],
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    exclude: Int[Array, "*#batch #states"] | None = None,
    update_steps: int = 1,
    tolerance: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Streamed, Int[Array, "*#batch states"]]:
    """Update the states `update_steps` - 1 times, or until each has settled, and return what they retrieve then.

    The same as `hopfield.retrieve`, in value and gradient; the gradient with a tolerance is in reverse mode only.

    Args:
      state: state patterns.
      stored: stored patterns.
      values: one for each stored pattern, retrieved by the last association; `None` = the stored patterns.
      streaming: how.
      beta: inverse temperature of at least 0, one number or one for each batch element.
      mask: True = may be retrieved.
      exclude: index of the one pattern that a state may not retrieve; -1 = none.
      update_steps: updates, the retrieval of the values included; with `tolerance` the most there may be.
      tolerance: `None`, or the largest movement of the association at which a state stops.
      dropout_rate: rate of associations dropped in the retrieval of the values.
      dropout_key: needed for dropout.

    Returns:
      What each state retrieves with its log-sum-exp, and its number of updates.

    Raises:
      ValueError: if shapes do not fit or an argument is out of its range.
    """
    keywords = streaming.on(stored.shape[-2])
    dropout: dict[str, Any] = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    common: dict[str, Any] = {"mask": mask, "exclude": exclude, **keywords}
    if update_steps == 1:
        found = streamed_association(state, stored, values, beta=beta, **common, **dropout)
        return found, jnp.ones(found.log_sum_exp.shape, jnp.int32)
    # Rounding adds up over updates: states in float32 or better make every product so, a chunk at a time.
    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    beta = jnp.asarray(beta, dtype)
    advance = functools.partial(_advance, stored=stored, beta=beta, **common)
    shape = jax.eval_shape(advance, state).log_sum_exp.shape
    original = jnp.promote_types(state.dtype, (stored if values is None else values).dtype)
    state = jnp.broadcast_to(state.astype(dtype), (*shape, state.shape[-1]))
    if tolerance is None:
        state = jax.lax.fori_loop(0, update_steps - 1, lambda _, xi: advance(xi).values, state)
        steps = jnp.full(shape, update_steps, jnp.int32)
    else:
        plan = _Plan(update_steps, tolerance, **keywords)
        state, steps = _settle(plan, state, stored, beta, mask, exclude)
    found = streamed_association(state, stored, values, beta=beta, **common, **dropout)
    return Streamed(found.values.astype(original), found.log_sum_exp), steps


@dataclasses.dataclass(frozen=True)
class _Plan:
    update_steps: int
    tolerance: float
    chunk_size: int
    axis: str | tuple[str, ...]
    kernel: Kernel

    @property
    def keywords(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk_size, "axis": self.axis, "kernel": self.kernel}


def _advance(state: Array, stored: Array, beta: Array, **common: Any) -> Streamed:
    """Return f(xi) in the dtype of beta."""
    found = streamed_association(state, stored, beta=beta, **common)
    return Streamed(found.values.astype(beta.dtype), found.log_sum_exp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _settle(plan: _Plan, state: Array, stored: Array, beta: Array, mask: Any, exclude: Any) -> tuple[Array, Array]:
    """Return the fixed points reached from the states, and the number of updates that each took."""
    common = {"beta": beta, "mask": mask, "exclude": exclude}
    moved = functools.partial(moved_association, stored=stored, chunk_size=plan.chunk_size, axis=plan.axis, **common)
    advance = functools.partial(_advance, stored=stored, **common, **plan.keywords)

    def unsettled(carry: Any) -> Array:
        return jnp.any(carry[2]) & (jnp.max(carry[3]) < plan.update_steps)

    def step(carry: Any) -> Any:
        xi, (following, log_sum_exp), active, steps = carry
        new_xi = jnp.where(active[..., None], following, xi)
        new = advance(new_xi)
        distance = moved(xi, log_sum_exp, new_xi, new.log_sum_exp)
        return new_xi, new, active & (distance > plan.tolerance), steps + active

    shape = state.shape[:-1]
    start = (state, advance(state), jnp.ones(shape, bool), jnp.ones(shape, jnp.int32))
    xi, _, _, steps = jax.lax.while_loop(unsettled, step, start)
    return xi, steps


def _settle_and_keep(plan: _Plan, *operands: Any) -> Any:
    xi, steps = _settle(plan, *operands)
    return (xi, steps), (xi, *operands[1:])


def _settle_gradient(plan: _Plan, kept: Any, gradients: Any) -> Any:
    # At the fixed point xi = f(xi, X): u = (1 - J^T)^-1 g by its series, which converges as fast as the iteration did.
    xi, stored, beta, mask, exclude = kept
    gradient, _ = gradients
    advance = functools.partial(_advance, mask=mask, exclude=exclude, **plan.keywords)
    _, back = jax.vjp(lambda xi: advance(xi, stored, beta).values, xi)

    def unsettled(carry: Any) -> Array:
        return jnp.any(carry[1]) & (carry[2] < plan.update_steps)

    def step(carry: Any) -> Any:
        u, active, count = carry
        new = jnp.where(active[..., None], gradient + back(u)[0], u)
        change, size = (jnp.linalg.norm(array, axis=-1) for array in (new - u, new))
        return new, active & (change > plan.tolerance * size), count + 1

    u = jax.lax.while_loop(unsettled, step, (gradient, jnp.ones(xi.shape[:-1], bool), jnp.int32(0)))[0]
    _, to_memory = jax.vjp(lambda stored, beta: advance(xi, stored, beta).values, stored, beta)
    return jnp.zeros_like(xi), *to_memory(u), None, None


_settle.defvjp(_settle_and_keep, _settle_gradient)
