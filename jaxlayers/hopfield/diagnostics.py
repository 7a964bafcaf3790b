"""The theory of modern Hopfield networks as functions to run: what a memory does, beside what is proved of it.

Energy along updates, the type of fixed point a state comes to rest in, retrieval errors and their bound, and the
operating class of every head of a model; `capacity` has the basins of patterns and how many can be stored.
Equations, theorems and lemmas are those of Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021
(arXiv:2008.02217v3), N is the number of stored patterns, M their largest norm and Delta_i the separation of pattern i.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.hopfield.hopfield import (
    Beta,
    association,
    energy,
    retrieval_error_bound,
    retrieve,
    separation,
    update,
)

Number = float | int

# Partial sums of float32 weights miss 0.9 by rounding: a mass counts as reached this much (relatively) below it.
_SLACK = 1e-6


def check_memory(stored: jax.Array, beta: Any) -> None:
    """Raise the `ValueError` of a memory without patterns, and of a number `beta` that is out of its range."""
    if stored.shape[-2] < 1:
        raise ValueError("patterns=0 must be at least 1, since an empty memory has no energy; store a pattern")
    if isinstance(beta, int | float) and not 0 < beta < math.inf:
        raise ValueError(f"beta={beta} must be positive and finite; set beta")


# Energy along updates. ------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """What `energy_along` returns; the first entry of each is where the states began.

    Attributes:
      states: `[steps + 1, *batch, states, features]`.
      energies: `[steps + 1, *batch, states]`.
    """

    states: Array
    energies: Array


def energy_along(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    steps: int,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
) -> Trajectory:
    """Return states and energies (Eq. 2) along `steps` updates (Eq. 3); no energy exceeds the one before (Theorem 1).

    Args:
      state: state patterns xi.
      stored: stored patterns.
      beta: inverse temperature, positive, one number or one for each batch element.
      steps: updates, at least 0.
      mask: True = may be retrieved. A state that may retrieve nothing goes to zero.

    Returns:
      Where the states began and what they became after each update, float32 or better.

    Raises:
      ValueError: if nothing is stored, the widths of the patterns differ, or `beta` or `steps` is out of range.
    """
    check_memory(stored, beta)
    if steps < 0:
        raise ValueError(f"steps={steps} must be at least 0; set steps")
    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    state, stored = state.astype(dtype), stored.astype(dtype)
    energy_of = functools.partial(energy, stored=stored, beta=beta, mask=mask)
    shape = jax.eval_shape(energy_of, state).shape
    state = jnp.broadcast_to(state, (*shape, state.shape[-1]))

    def step(xi: jax.Array, _: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return update(xi, stored, beta=beta, mask=mask), (xi, energy_of(xi))

    last, (states, energies) = jax.lax.scan(step, state, length=steps)
    return Trajectory(jnp.concatenate([states, last[None]]), jnp.concatenate([energies, energy_of(last)[None]]))


# The type of a fixed point. -------------------------------------------------------------------------------------------


class Kind(enum.IntEnum):
    """What an association p averages: nothing (all masked), a single pattern, some of the patterns, or all of them."""

    NONE = 0
    SINGLE = 1
    METASTABLE = 2
    GLOBAL = 3


class AssociationType(NamedTuple):
    """What `association_type` returns, each `[*batch, states]`.

    Attributes:
      kind: a `Kind`, as an integer.
      size: m, the number of patterns of the nearest average; 0 if all are masked.
      support: exp of the entropy of p, the effective number of patterns; 0 if all are masked.
      patterns: the paper's k, the least number of patterns whose weights sum up to `mass`; 0 if all are masked.
      available: the number of patterns that the mask leaves.
    """

    kind: Array
    size: Array
    support: Array
    patterns: Array
    available: Array


def association_type(
    weights: Float[Array, "*batch states patterns"],
    *,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    mass: Number = 0.9,
) -> AssociationType:
    """Say of every association which average of patterns it is nearest to.

    An ideal fixed point averages m of the N patterns that may be retrieved: p = u_m, 1/m on the m largest entries of p
    and 0 elsewhere. The association is of the size m whose u_m lies nearest in Euclidean distance. With S_m the sum of
    the m largest entries, |p - u_m|^2 = |p|^2 + (1 - 2 S_m) / m, so m maximises (2 S_m - 1) / m; the smallest such m
    if several do. m = 1 is a single pattern, m = N the global average, anything between a metastable state. No
    threshold is set: p is single against a pair if and only if its largest entry exceeds the second by 1/2 or more, and
    an association that falls evenly from (1 + a)/N to (1 - a)/N is global up to about a = 1/2. With N = 1, single.

    Args:
      weights: associations p, which sum to 1 over the patterns (or are 0, where all are masked).
      mask: True = may be retrieved. Without it every pattern counts towards N, padding too.
      mass: share of the weights that k patterns are to hold, in (0, 1].

    Returns:
      The kind and three measures of size: m, the effective support exp(-sum_i p_i ln p_i), and the paper's k.

    Raises:
      ValueError: if there are no patterns or `mass` is out of range.
    """
    if weights.shape[-1] < 1:
        raise ValueError("patterns=0 must be at least 1; store a pattern")
    allowed = jnp.ones(weights.shape, bool) if mask is None else jnp.broadcast_to(mask, weights.shape)
    weights = jnp.where(allowed, weights.astype(at_least_float32(weights.dtype)), 0)
    available = jnp.sum(allowed, axis=-1)
    sums = jnp.cumsum(_sorted(weights), axis=-1)
    counts = jnp.arange(1, weights.shape[-1] + 1)
    score = jnp.where(counts <= available[..., None], (2 * sums - 1) / counts, -jnp.inf)
    some = sums[..., -1] > 0
    size = jnp.where(some, jnp.argmax(score, axis=-1) + 1, 0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)
    kind = jnp.where(size == available, Kind.GLOBAL, Kind.METASTABLE)
    kind = jnp.where(size == 1, Kind.SINGLE, kind)
    return AssociationType(
        kind=jnp.where(some, kind, Kind.NONE).astype(jnp.int32),
        size=size.astype(jnp.int32),
        support=jnp.where(some, jnp.exp(entropy), 0),
        patterns=patterns_for_mass(weights, mass=mass),
        available=available.astype(jnp.int32),
    )


def patterns_for_mass(weights: Float[Array, "*batch patterns"], *, mass: Number = 0.9) -> Int[Array, "*batch"]:
    """Return k, the least number of patterns whose weights sum up to `mass`: the paper's size of a metastable state.

    Weights that are all 0 (a state that may retrieve nothing) give 0. Sums short of `mass` by a millionth of it count
    as having reached it, since float32 sums of 1/10 do not reach 0.9 exactly.

    Raises:
      ValueError: if `mass` is not in (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass} must be in (0, 1]; set mass, the paper's is 0.9")
    weights = weights.astype(at_least_float32(weights.dtype))
    sums = jnp.cumsum(_sorted(weights), axis=-1)
    missing = jnp.sum(sums < mass * (1 - _SLACK), axis=-1) + 1
    return jnp.where(sums[..., -1] > 0, jnp.minimum(missing, weights.shape[-1]), 0).astype(jnp.int32)


def _sorted(weights: jax.Array) -> jax.Array:
    return jnp.flip(jnp.sort(weights, axis=-1), axis=-1)


class FixedPoint(NamedTuple):
    """What `fixed_point_type` returns.

    Attributes:
      state: where the state came to rest, `[*batch, states, features]`.
      association: p there, `[*batch, states, patterns]`.
      energy: E there, `[*batch, states]`.
      slope: largest eigenvalue of the Jacobian of the update there; below 1 it is a minimum of the energy, above 1 a
        saddle, from which the next disturbance leads away.
      steps: updates taken.
      settled: whether one more would move p by at most the tolerance.
      type: kind and size of the average.
    """

    state: Array
    association: Array
    energy: Array
    slope: Array
    steps: Array
    settled: Array
    type: AssociationType


def fixed_point_type(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    update_steps: int = 1000,
    tolerance: Number = 1e-5,
    mass: Number = 0.9,
) -> FixedPoint:
    """Iterate every state to rest and say what it rests in: a single pattern, a metastable state or the global average.

    Heads are a batch axis. The kinds are those of `association_type`. Which of them there are follows from beta: below
    1 / max_i |x_i - mean|^2 there is one fixed point near the mean of all (A.1.5.2); a group of similar patterns apart
    from the others has a metastable one near its mean (Lemma A12); a well separated pattern has its own (Lemma A7).

    Args:
      state: state patterns xi.
      stored: stored patterns; equal ones share a metastable state at any beta.
      beta: inverse temperature, positive, one number or one for each batch element.
      mask: True = may be retrieved.
      update_steps: the most updates there may be, at least 2.
      tolerance: largest movement of p at which a state counts as at rest.
      mass: of the paper's k.

    Returns:
      The fixed point of each state.

    Raises:
      ValueError: if nothing is stored, the widths of the patterns differ, or an argument is out of range.
    """
    check_memory(stored, beta)
    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    state, stored = state.astype(dtype), stored.astype(dtype)
    rest = retrieve(state, stored, beta=beta, mask=mask, update_steps=update_steps, tolerance=tolerance)
    weights = association(rest.state, stored, beta=beta, mask=mask)
    after = association(update(rest.state, stored, beta=beta, mask=mask), stored, beta=beta, mask=mask)
    fits = None if mask is None else jnp.broadcast_to(mask, weights.shape)
    return FixedPoint(
        state=rest.state,
        association=weights,
        energy=energy(rest.state, stored, beta=beta, mask=mask),
        slope=update_slope(weights, stored, beta=beta),
        steps=rest.steps,
        settled=jnp.linalg.norm(after - weights, axis=-1) <= tolerance,
        type=association_type(weights, mask=fits, mass=mass),
    )


def update_slope(
    weights: Float[Array, "*#batch states patterns"], stored: Float[Array, "*#batch patterns features"], *, beta: Beta
) -> Float[Array, "*#batch states"]:
    """Return the spectral norm of the update's Jacobian J = beta X (diag(p) - p p^T) X^T, for associations p.

    J is symmetric and positive semidefinite, and 1 - J is the Hessian of the energy. A norm below 1 makes the update a
    contraction nearby; Theorem 4 bounds it by 2 beta N M^2 (N - 1) exp(-beta (Delta_i - 2 M distance)) (Eq. 7). One
    state is computed after another, with the memory of a copy of the patterns. An association of zeros gives 0.
    """
    dtype = at_least_float32(jnp.promote_types(weights.dtype, stored.dtype))
    weights, stored = weights.astype(dtype), stored.astype(dtype)

    def variance(p: jax.Array) -> jax.Array:
        # About the mean of p, not as E[x x^T] - mean mean^T, whose rounding is as large as a small covariance.
        apart = stored - jnp.einsum("...p,...pd->...d", p, stored)[..., None, :]
        return jnp.linalg.eigvalsh(jnp.einsum("...p,...pd,...pe->...de", p, apart, apart))[..., -1]

    largest = jax.lax.map(variance, jnp.moveaxis(weights, -2, 0))
    return jnp.moveaxis(largest, 0, -1) * jnp.asarray(beta, dtype)[..., None]


# One update near a pattern. -------------------------------------------------------------------------------------------


class RetrievalErrors(NamedTuple):
    """What `retrieval_errors` returns, each `[*batch, patterns]`.

    Attributes:
      separation: Delta_i (Eq. 5).
      distance: |xi_i - x_i| of the query from its pattern.
      error: |f(xi_i) - x_i| measured, after one update.
      bound: what Theorem 5 (Eq. 8) says it never exceeds.
    """

    separation: Array
    distance: Array
    error: Array
    bound: Array


def retrieval_errors(
    query: Float[Array, "*batch patterns features"], stored: Float[Array, "*batch patterns features"], *, beta: Number
) -> RetrievalErrors:
    """Retrieve every pattern from its own query with one update; return the errors and their bounds side by side.

    Args:
      query: xi_i, the query for pattern i in the place of pattern i.
      stored: patterns x_i, at least two.
      beta: inverse temperature, positive.

    Returns:
      Separation, distance, measured error and bound of every pattern.

    Raises:
      ValueError: if there are fewer than two patterns, shapes differ, or `beta` is out of range.
    """
    check_memory(stored, beta)
    if query.shape != stored.shape:
        raise ValueError(f"query of shape {query.shape} must be that of the patterns, {stored.shape}; pass one each")
    dtype = at_least_float32(jnp.promote_types(query.dtype, stored.dtype))
    query, stored = query.astype(dtype), stored.astype(dtype)
    distance = jnp.linalg.norm(query - stored, axis=-1)
    error = jnp.linalg.norm(update(query, stored, beta=beta) - stored, axis=-1)
    return RetrievalErrors(separation(stored), distance, error, retrieval_error_bound(stored, distance, beta=beta))


# The heads of a model. ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Head:
    """What one head of a model does, over all states of all samples that were passed through it.

    Attributes:
      layer: path of the module that sowed the association.
      call: which call of that module, from 0; modules that are called once have no other.
      head: which head.
      states: states that could retrieve something, over all samples; the others are left out.
      available: median number N of patterns that they could retrieve.
      patterns: median of k, the number of patterns that hold 0.9 of the weights.
      quartiles: lower and upper quartile of k.
      share: median of k / N.
      operating_class: `"I"` to `"IV"`, by `share`; `""` without states.
      entropy: mean entropy of the associations, in nats.
      single: share of states in a single pattern, by `association_type`.
      metastable: share of states in a metastable state.
      average: share of states in the global average.
      steps: mean number of updates; `None` if the layer sowed none.
    """

    layer: str
    call: int
    head: int
    states: int
    available: float
    patterns: float
    quartiles: tuple[float, float]
    share: float
    operating_class: str
    entropy: float
    single: float
    metastable: float
    average: float
    steps: float | None


def operating_class(patterns: Number, available: Number) -> str:
    """Return the paper's class of a head (section 4) by its median k of N patterns.

    I (a very large metastable state or the global average) if N/2 < k, II (large) if N/8 < k <= N/2, III (medium) if
    N/32 < k <= N/8, IV (small, or a single pattern) if k <= N/32.

    Differs:
      k <= 1 is class IV for every N. The paper has N in the hundreds, where that follows; with N < 32 it would leave
      class IV empty.

    Raises:
      ValueError: if k is not in (0, N].
    """
    if not 0 < patterns <= available:
        raise ValueError(f"patterns={patterns} must be positive and at most available={available}; set both")
    if patterns <= 1 or 32 * patterns <= available:
        return "IV"
    if 8 * patterns <= available:
        return "III"
    return "II" if 2 * patterns <= available else "I"


def analyse_heads(
    intermediates: Mapping[str, Any],
    *,
    key_mask: Array | Mapping[str, Array] | None = None,
    state_mask: Array | Mapping[str, Array] | None = None,
    mass: Number = 0.9,
) -> tuple[Head, ...]:
    """Return a table of what every head of every Hopfield layer of a model does, one row a head.

    The intermediates are those of `model.apply(variables, inputs, mutable="intermediates")[1]`; every `association`
    `[*batch, heads, states, patterns]` that a layer sowed is found, wherever it is in the tree. A layer that is scanned
    over has its layer axis among the batch axes, and so one row for all its layers.

    Args:
      intermediates: the collection, or variables that hold it.
      key_mask: True = a pattern, False = padding, `[*batch, patterns]`: one for all layers, or one by layer path (of
        which those absent have no padding).
      state_mask: True = a state that counts, `[*batch, states]`, likewise.
      mass: of k.

    Returns:
      Rows in the order of layer paths, calls and heads.

    Raises:
      ValueError: if no association is found, a mask fits none, or `mass` is out of range.
    """
    flat = flax.traverse_util.flatten_dict(dict(intermediates.get("intermediates", intermediates)))
    found = {"/".join(path[:-1]): (path, value) for path, value in flat.items() if path[-1] == "association"}
    if not found:
        raise ValueError(
            'no association was sown; call model.apply(..., mutable="intermediates") and pass what it sows'
        )
    for name, masks in (("key_mask", key_mask), ("state_mask", state_mask)):
        unknown = sorted(set(masks) - set(found)) if isinstance(masks, Mapping) else []
        if unknown:
            raise ValueError(f"{name} names {unknown[0]!r}, which must be one of {sorted(found)}; pass those paths")
    rows: list[Head] = []
    for layer, (path, value) in sorted(found.items()):
        calls = value if isinstance(value, tuple) else (value,)
        steps = flat.get((*path[:-1], "steps"), (None,) * len(calls))
        steps = steps if isinstance(steps, tuple) else (steps,)
        for call, (weights, taken) in enumerate(zip(calls, steps, strict=True)):
            weights = jnp.asarray(weights)
            keys = _mask_of(key_mask, "key_mask", layer, weights.shape, -1)
            states = _mask_of(state_mask, "state_mask", layer, weights.shape, -2)
            rows.extend(_describe(layer, call, weights, taken, keys, states, mass))
    return tuple(rows)


def _mask_of(masks: Any, name: str, layer: str, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Return the mask over patterns (axis -1) or states (axis -2) of one layer, in the shape of its association."""
    mask = masks.get(layer) if isinstance(masks, Mapping) else masks
    if mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"{name} of dtype {mask.dtype} must be bool, True = counts; pass mask > 0 or the like")
    spread = mask[..., None, None, :] if axis == -1 else mask[..., None, :, None]
    try:
        return jnp.broadcast_to(spread, shape)
    except ValueError:
        raise ValueError(
            f"{name} of shape {mask.shape} must fit the association {shape} of {layer!r}; pass masks by layer path"
        ) from None


_association_type = jax.jit(association_type, static_argnames="mass")


def _describe(
    layer: str, call: int, weights: jax.Array, steps: Any, keys: jax.Array, states: jax.Array, mass: float
) -> list[Head]:
    """Return the rows of one association `[*batch, heads, states, patterns]`."""
    types = _association_type(weights, mask=keys, mass=mass)
    counted = np.asarray(states[..., 0] & (types.kind != Kind.NONE))

    def by_head(array: Any) -> np.ndarray:
        return np.moveaxis(np.asarray(array), -2, 0).reshape(weights.shape[-3], -1)

    counted, kind = by_head(counted), by_head(types.kind)
    k, available = by_head(types.patterns), by_head(types.available)
    support = by_head(types.support).astype(np.float64)
    taken = None if steps is None else by_head(jnp.broadcast_to(jnp.asarray(steps), weights.shape[:-1]))
    rows = []
    for head in range(weights.shape[-3]):
        here = counted[head]
        if not here.any():
            none = math.nan
            rows.append(Head(layer, call, head, 0, none, none, (none, none), none, "", none, none, none, none, None))
            continue
        lower, median, upper = (float(q) for q in np.quantile(k[head][here], (0.25, 0.5, 0.75)))
        middle = float(np.median(available[head][here]))
        share = float(np.median(k[head][here] / available[head][here]))
        # By the share where states see differently many patterns; else the same, and without its rounding.
        typical = median if np.ptp(available[head][here]) == 0 else share * middle
        rows.append(
            Head(
                layer=layer,
                call=call,
                head=head,
                states=int(here.sum()),
                available=middle,
                patterns=median,
                quartiles=(lower, upper),
                share=share,
                operating_class=operating_class(typical, middle),
                entropy=float(np.mean(np.log(support[head][here]))),
                single=float(np.mean(kind[head][here] == Kind.SINGLE)),
                metastable=float(np.mean(kind[head][here] == Kind.METASTABLE)),
                average=float(np.mean(kind[head][here] == Kind.GLOBAL)),
                steps=None if taken is None else float(np.mean(taken[head][here])),
            )
        )
    return rows
