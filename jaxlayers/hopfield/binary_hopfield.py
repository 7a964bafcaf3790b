"""Binary Hopfield networks: Hebbian and pseudo-inverse memories of +-1 patterns, their dynamics and their capacity.

Patterns are rows, `[patterns, neurons]`, and a state is one row of +-1 in a floating dtype. No parameters are learned
here, so everything is a function.

Source:
  Hopfield, "Neural networks and physical systems with emergent collective computational abilities", PNAS 1982. Amit,
  Gutfreund and Sompolinsky, "Storing infinite numbers of patterns in a spin-glass model of neural networks", PRL 1985.
  Personnaz, Guyon and Dreyfus, "Information storage and retrieval in spin-glass like neural networks", J. Physique
  Lettres 1985. Kanter and Sompolinsky, "Associative recall of memory without errors", Phys. Rev. A 1987.

Differs:
  Hopfield's neurons are 0 or 1 and update at random times; here they are +-1 (as in the later papers) and updated in
  sweeps. A neuron whose field is zero stays.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxlayers.core.dtypes import at_least_float32

_HIGHEST = jax.lax.Precision.HIGHEST  # +-1 and fields must not be rounded to bfloat16 on their way into a product


def hebbian_weights(
    patterns: Float[Array, "patterns neurons"], *, self_coupling: bool = False
) -> Float[Array, "neurons neurons"]:
    """Return W = 1/N sum_mu xi^mu xi^mu^T of Hopfield (1982), which holds about 0.138 N random patterns.

    Args:
      patterns: the stored xi^mu, rows of +-1 with N neurons. No row gives W = 0, which keeps every state.
      self_coupling: keep the diagonal, the load patterns / N. Without it (the default, and the model that is analysed)
        it is zero.

    Returns:
      The symmetric weights, float32 or better.
    """
    patterns = patterns.astype(at_least_float32(patterns.dtype))
    weights = jnp.matmul(patterns.T, patterns, precision=_HIGHEST) / _neurons(patterns)
    return weights if self_coupling else _without_diagonal(weights)


def pseudo_inverse_weights(
    patterns: Float[Array, "patterns neurons"], *, self_coupling: bool = True, tolerance: float | None = None
) -> Float[Array, "neurons neurons"]:
    """Return W = X^+ X, the orthogonal projection onto the span of the patterns, the rows of X.

    Every stored pattern has W xi = xi, however the patterns correlate, so all of up to N - 1 independent patterns are
    fixed points (Personnaz et al., 1985). Duplicates and other dependent patterns change nothing but what they span.
    Once they span all states, W = 1 and every state is a fixed point.

    Args:
      patterns: the stored patterns, rows of +-1. No row gives W = 0.
      self_coupling: keep the diagonal. W is then positive semidefinite, so that synchronous updates too never raise the
        energy. False sets it to zero (Kanter and Sompolinsky, 1987): stored patterns stay fixed, as W_ii < 1 unless
        the patterns span neuron i alone, and the basins of attraction grow.
      tolerance: singular values below this part of the largest count as zero. `None` = max(patterns, N) times the
        machine epsilon.

    Returns:
      The symmetric weights, float32 or better.

    Raises:
      ValueError: if `tolerance` is negative.
    """
    patterns = patterns.astype(at_least_float32(patterns.dtype))
    count, neurons = patterns.shape[0], _neurons(patterns)
    if tolerance is None:
        tolerance = max(count, neurons) * float(jnp.finfo(patterns.dtype).eps)
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0; set tolerance")
    if count == 0:
        return jnp.zeros((neurons, neurons), patterns.dtype)
    _, values, rows = jnp.linalg.svd(patterns, full_matrices=False)
    rows = jnp.where((values > tolerance * values[0])[:, None], rows, 0.0)
    weights = jnp.matmul(rows.T, rows, precision=_HIGHEST)
    return weights if self_coupling else _without_diagonal(weights)


def energy(
    state: Float[Array, "*batch neurons"],
    weights: Float[Array, "neurons neurons"],
    *,
    bias: Float[Array, " neurons"] | None = None,
) -> Float[Array, "*batch"]:
    """Return E = -1/2 s^T W s - theta^T s of every state.

    Asynchronous updates never raise it if W is symmetric without negative diagonal.

    Args:
      state: states s of +-1.
      weights: W.
      bias: the field theta that acts on each neuron from outside. `None` = 0.

    Returns:
      The energy, float32 or better.

    Raises:
      ValueError: if the widths differ.
    """
    state, weights, bias = _promote(state, weights, bias)
    inner = jnp.matmul(state, weights, precision=_HIGHEST)
    return -jnp.sum(state * (0.5 * inner + bias), axis=-1)


def overlaps(
    state: Float[Array, "*batch neurons"], patterns: Float[Array, "patterns neurons"]
) -> Float[Array, "*batch patterns"]:
    """Return m_mu = xi^mu . s / N, which is 1 where a state is the pattern and -1 where it is its mirror image.

    Raises:
      ValueError: if the widths differ.
    """
    dtype = at_least_float32(jnp.promote_types(state.dtype, patterns.dtype))
    if state.shape[-1] != _neurons(patterns):
        raise ValueError(
            f"states have {state.shape[-1]} neurons and patterns {patterns.shape[-1]}, which must be equal; "
            "pass patterns of that width"
        )
    return jnp.matmul(state.astype(dtype), patterns.astype(dtype).T, precision=_HIGHEST) / patterns.shape[-1]


def update_synchronously(
    state: Float[Array, "*batch neurons"],
    weights: Float[Array, "neurons neurons"],
    *,
    bias: Float[Array, " neurons"] | None = None,
) -> Float[Array, "*batch neurons"]:
    """Return s_i <- sign(sum_j W_ij s_j + theta_i) of all neurons at once, where a neuron without a field stays.

    This may raise the energy and run into a cycle of two states, unless W is positive semidefinite. Arguments as
    `energy`.
    """
    spins, weights, bias = _promote(state, weights, bias)
    field = jnp.matmul(spins, weights.T, precision=_HIGHEST) + bias
    return _turn(spins, field, _rounding(weights, bias)).astype(state.dtype)


def update_asynchronously(
    state: Float[Array, "*batch neurons"],
    weights: Float[Array, "neurons neurons"],
    *,
    bias: Float[Array, " neurons"] | None = None,
    order: Int[Array, " updates"] | None = None,
) -> Float[Array, "*batch neurons"]:
    """Return the state after s_i <- sign(sum_j W_ij s_j + theta_i), one neuron after the other.

    Each of these lowers the energy or changes nothing, if W is symmetric without negative diagonal. A field of zero,
    to within rounding, leaves the neuron as it is, so none is turned back and forth for ever.

    Args:
      state: states of +-1.
      weights: W.
      bias: theta. `None` = 0.
      order: the neurons to update, in this order, the same for all states; repeated and left out as you like. `None` =
        each once, from the first to the last.

    Returns:
      States of +-1 in the dtype of `state`.

    Raises:
      ValueError: if the widths differ.
    """
    spins, weights, bias = _promote(state, weights, bias)
    order = jnp.arange(spins.shape[-1]) if order is None else order
    zero = _rounding(weights, bias)

    def visit(step: Array, spins: Array) -> Array:
        i = order[step]
        field = jnp.matmul(spins, weights[i], precision=_HIGHEST) + bias[i]
        return spins.at[..., i].set(_turn(spins[..., i], field, zero[i]))

    return jax.lax.fori_loop(0, order.shape[0], visit, spins).astype(state.dtype)


class Settled(NamedTuple):
    """What `settle` and the retrievals return.

    Attributes:
      state: the states reached, `[*batch, neurons]`.
      steps: the number of updates (sweeps over all neurons) after which each state was first there, `[*batch]`.
      period: 1 = a fixed point, 2 = the state and its successor alternate, 0 = neither after the last update allowed.
    """

    state: Array
    steps: Array
    period: Array


def settle(
    update: Callable[[Array, Array], Array],
    state: Float[Array, "*batch neurons"],
    *,
    max_steps: int,
) -> Settled:
    """Iterate an update of +-1 states until each has reached a fixed point or a cycle of two.

    Each state stops on its own, so what the others of the batch do has no influence on it.

    Args:
      update: called as `update(states, step)`. An update that differs between steps must visit every neuron in each,
        or an unchanged state is not yet a fixed point.
      state: where to begin.
      max_steps: updates allowed, at least 1.

    Returns:
      States, numbers of updates and periods.

    Raises:
      ValueError: if `max_steps` is below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} must be at least 1; set max_steps")
    batch = state.shape[:-1]

    def running(carry: Any) -> Array:
        step, _, _, _, period = carry
        return (step < max_steps) & jnp.any(period == 0)

    def advance(carry: Any) -> Any:
        step, previous, current, steps, period = carry
        new = update(current, step)
        fixed, cycles = jnp.all(new == current, axis=-1), jnp.all(new == previous, axis=-1)
        done = jnp.where(fixed, 1, jnp.where(cycles & (step > 0), 2, 0))
        # The cycle was entered one update before the state that came back.
        counted = jnp.where(fixed, step, jnp.where(done == 2, step - 1, step + 1))
        open_ = period == 0
        steps = jnp.where(open_, counted, steps)
        keep = (open_ & (done == 0))[..., None]
        previous, current = jnp.where(keep, current, previous), jnp.where(keep, new, current)
        return step + 1, previous, current, steps, jnp.where(open_, done, period)

    start = (jnp.int32(0), state, state, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))
    _, _, current, steps, period = jax.lax.while_loop(running, advance, start)
    return Settled(current, steps, period)


def retrieve(
    state: Float[Array, "*batch neurons"],
    weights: Float[Array, "neurons neurons"],
    *,
    bias: Float[Array, " neurons"] | None = None,
    key: PRNGKeyArray | None = None,
    synchronous: bool = False,
    max_steps: int = 100,
) -> Settled:
    """Update states until they no longer change.

    Args:
      state: states of +-1, such as stored patterns with some neurons turned.
      weights: W.
      bias: theta. `None` = 0.
      key: asynchronous sweeps in a new random order each, the same for all states. `None` = from first to last neuron.
      synchronous: update all neurons at once, which may end in a cycle of two states (`period` 2; of the two, the
        state returned is the one that came later).
      max_steps: updates (sweeps) allowed.

    Returns:
      States, numbers of sweeps and periods. An asynchronous retrieval ends in a fixed point, a local minimum of the
      energy, if W is symmetric without negative diagonal and `max_steps` suffices.

    Raises:
      ValueError: if the widths differ, `max_steps` is below 1, or a key is given to synchronous updates.
    """
    if synchronous and key is not None:
        raise ValueError("key orders asynchronous updates, and synchronous=True has no order; pass key=None")
    _promote(state, weights, bias)

    def update(states: Array, step: Array) -> Array:
        if synchronous:
            return update_synchronously(states, weights, bias=bias)
        order = None if key is None else jax.random.permutation(jax.random.fold_in(key, step), state.shape[-1])
        return update_asynchronously(states, weights, bias=bias, order=order)

    return settle(update, state, max_steps=max_steps)


def turn_some(
    key: PRNGKeyArray, state: Float[Array, "*batch neurons"], *, fraction: float
) -> Float[Array, "*batch neurons"]:
    """Return the states with round(fraction N) neurons of each, drawn at random, turned to the other side.

    Raises:
      ValueError: if `fraction` is outside 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in 0 to 1; set fraction")
    rank = jnp.argsort(jax.random.uniform(key, state.shape), axis=-1)
    return jnp.where(rank < round(fraction * state.shape[-1]), -state, state)


class CriticalLoad(NamedTuple):
    """What `critical_load` returns.

    Attributes:
      load: alpha_c, the number of patterns over the number of neurons at which retrieval vanishes.
      overlap: the overlap of the retrieval state there, from which it drops to nothing.
    """

    load: float
    overlap: float


def critical_load() -> CriticalLoad:
    """Return where the retrieval solution of the mean field at zero temperature vanishes.

    With y = m / sqrt(2 alpha r) the equations of `mean_field_overlap` become one, sqrt(2 alpha) = erf(y) / y -
    2 / sqrt(pi) exp(-y^2), m = erf(y). Its right side has a largest value, and above this load there is no solution
    but m = 0.

    Example:
      >>> from jaxlayers.hopfield.binary_hopfield import critical_load
      >>> [round(value, 4) for value in critical_load()]
      [0.1379, 0.9674]
    """
    y = _critical_y()
    return CriticalLoad(_root_load(y) ** 2 / 2, math.erf(y))


def mean_field_overlap(load: float) -> float:
    """Return the overlap m with a stored pattern at which retrieval from a Hebbian memory ends, for N -> infinity.

    m solves the equations of Amit, Gutfreund and Sompolinsky (1985) at zero temperature, replica symmetric:
    m = erf(m / sqrt(2 alpha r)), r = 1 / (1 - C)^2, C = sqrt(2 / (pi alpha r)) exp(-m^2 / (2 alpha r)).

    Args:
      load: alpha, random patterns over neurons.

    Returns:
      The larger solution m, 1 for a load of 0; 0 above the critical load, where it does not exist.

    Raises:
      ValueError: if `load` is negative.
    """
    if not load >= 0:
        raise ValueError(f"load={load} must be at least 0; set load")
    if load == 0:
        return 1.0
    if load > critical_load().load:
        return 0.0
    root = math.sqrt(2 * load)
    # From its maximum on the right side falls, and it lies below 1 / y.
    return math.erf(_bisect(lambda y: root - _root_load(y), _critical_y(), 1 / root))


def capacity_curve(
    key: PRNGKeyArray,
    neurons: int,
    loads: Sequence[float],
    *,
    weights_fn: Callable[[Array], Array] = hebbian_weights,
    queries: int = 32,
    fraction: float = 0.0,
    max_steps: int = 100,
) -> Float[Array, "loads queries"]:
    """Return the overlaps with which random patterns are retrieved at each load, by simulation.

    Each load has new patterns. A retrieval begins at one of them, with some neurons turned, and ends at a fixed point.
    Below the critical load the overlaps are those of `mean_field_overlap`; above it a finite network loses them over a
    range of loads, which narrows as N grows. Measured with 256 queries, the part with an overlap above 0.9 is 1.00 at
    a load of 0.13 and 0.73 at 0.18 for N = 250, and 0.95 and 0.22 for N = 1000.

    Args:
      key: of patterns, queries and the order of updates.
      neurons: N, which sets how sharp the drop at the critical load is.
      loads: patterns over neurons; each is rounded to a number of patterns of at least 1.
      weights_fn: makes weights of patterns; rows of zeros, which complete smaller sets, must store nothing.
      queries: retrievals at each load.
      fraction: part of the neurons turned before retrieval; the overlap begins at 1 - 2 fraction.
      max_steps: sweeps allowed.

    Returns:
      Overlap of each state reached with the pattern it began at.

    Raises:
      ValueError: if an argument is out of range.
    """
    if neurons < 2 or queries < 1 or not loads or min(loads) <= 0:
        raise ValueError(
            f"neurons={neurons}, queries={queries} and loads={loads} must be at least 2, at least 1 and positive; set "
            "the one that is not"
        )
    counts = [max(1, round(load * neurons)) for load in loads]

    def measure(pair: tuple[Array, Array]) -> Array:
        count, key = pair
        drawn, turned, order = jax.random.split(key, 3)
        patterns = jax.random.rademacher(drawn, (max(counts), neurons), jnp.float32)
        patterns = jnp.where(jnp.arange(max(counts))[:, None] < count, patterns, 0.0)
        begun = patterns[jnp.arange(queries) % count]
        state = turn_some(turned, begun, fraction=fraction)
        reached = retrieve(state, weights_fn(patterns), key=order, max_steps=max_steps).state
        return jnp.mean(reached * begun, axis=-1)

    return jax.lax.map(measure, (jnp.asarray(counts), jax.random.split(key, len(counts))))


def fixed_fraction(
    patterns: Float[Array, "patterns neurons"], weights: Float[Array, "neurons neurons"]
) -> Float[Array, ""]:
    """Return which part of the patterns are fixed points, that is, not changed by an update; 1 for no pattern."""
    same = jnp.all(update_synchronously(patterns, weights) == patterns, axis=-1)
    return jnp.mean(same, dtype=weights.dtype) if patterns.shape[0] else jnp.ones((), weights.dtype)


def _neurons(patterns: Array) -> int:
    if patterns.ndim != 2 or patterns.shape[-1] < 1:
        raise ValueError(f"patterns have shape {patterns.shape} and must be [patterns, neurons]; reshape them")
    return patterns.shape[-1]


def _without_diagonal(weights: Array) -> Array:
    return jnp.where(jnp.eye(weights.shape[0], dtype=bool), 0.0, weights)


def _promote(state: Array, weights: Array, bias: Array | None) -> tuple[Array, Array, Array]:
    """Return state, weights and bias in one dtype of float32 or better, after a check of their shapes."""
    neurons = state.shape[-1] if state.ndim else 0
    if weights.shape != (neurons, neurons):
        raise ValueError(f"weights of shape {weights.shape} must be ({neurons}, {neurons}), as the states; set weights")
    if bias is not None and bias.shape != (neurons,):
        raise ValueError(f"bias of shape {bias.shape} must be ({neurons},), as the states; set bias")
    dtype = at_least_float32(jnp.promote_types(state.dtype, weights.dtype))
    bias = jnp.zeros(neurons, dtype) if bias is None else bias.astype(dtype)
    return state.astype(dtype), weights.astype(dtype), bias


def _rounding(weights: Array, bias: Array) -> Array:
    """Return how far from zero rounding may carry the field of each neuron."""
    epsilon = 4 * float(jnp.finfo(weights.dtype).eps)
    return epsilon * (jnp.sum(jnp.abs(weights), axis=-1) + jnp.abs(bias))


def _turn(spins: Array, field: Array, zero: Array) -> Array:
    return jnp.where(jnp.abs(field) > zero, jnp.sign(field), spins)


def _root_load(y: float) -> float:
    """Return sqrt(2 alpha) of the mean field whose overlap is erf(y)."""
    return math.erf(y) / y - 2 / math.sqrt(math.pi) * math.exp(-y * y)


def _critical_y() -> float:
    """Return y where `_root_load` is largest: 2 / sqrt(pi) exp(-y^2) (y + 2 y^3) = erf(y)."""
    return _bisect(lambda y: math.erf(y) - 2 / math.sqrt(math.pi) * math.exp(-y * y) * (y + 2 * y**3), 1.0, 3.0)


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of a function that is negative at `low` and positive at `high`."""
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return 0.5 * (low + high)
