"""The theory of modern Hopfield networks as functions to run: what a memory does, beside what is proved of it.

Energy along updates, the type of fixed point a state comes to rest in, retrieval errors and their bound, the radius of
a pattern's basin, the number of random patterns that can be stored, and the operating class of every head of a model.
Equations, theorems and lemmas are those of Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021
(arXiv:2008.02217v3), N is the number of stored patterns, M their largest norm and Delta_i the separation of pattern i.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping, Sequence
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
    storage_capacity,
    update,
)

Number = float | int

# Partial sums of float32 weights miss 0.9 by rounding: a mass counts as reached this much (relatively) below it.
_SLACK = 1e-6


def _check_memory(stored: jax.Array, beta: Any) -> None:
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
    _check_memory(stored, beta)
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
    _check_memory(stored, beta)
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
    _check_memory(stored, beta)
    if query.shape != stored.shape:
        raise ValueError(f"query of shape {query.shape} must be that of the patterns, {stored.shape}; pass one each")
    dtype = at_least_float32(jnp.promote_types(query.dtype, stored.dtype))
    query, stored = query.astype(dtype), stored.astype(dtype)
    distance = jnp.linalg.norm(query - stored, axis=-1)
    error = jnp.linalg.norm(update(query, stored, beta=beta) - stored, axis=-1)
    return RetrievalErrors(separation(stored), distance, error, retrieval_error_bound(stored, distance, beta=beta))


# Basins. --------------------------------------------------------------------------------------------------------------


class ProvenRadius(NamedTuple):
    """What `proven_radius` returns, each `[*batch, patterns]`; 0 where nothing is proved.

    Attributes:
      sphere: 1 / (beta N M), the sphere of Eq. 141, for patterns that are well separated in the sense of Eq. 142.
      widest: the largest radius that the same argument gives.
    """

    sphere: Array
    widest: Array


def proven_radius(stored: Float[Array, "*batch patterns features"], *, beta: Number) -> ProvenRadius:
    """Return radii about each pattern from which every state is proved to reach one fixed point near that pattern.

    The paper's spheres have the radius 1 / (beta N M) (Eq. 141). If

      Delta_i >= 2 / (beta N) + ln(2 (N - 1) N beta M^2) / beta   (Eq. 142),

    one update leads from the sphere into itself (Lemma A5) and is a contraction there (Lemma A6), so all of it reaches
    one fixed point (Lemma A7): pattern i is stored in the sense of Definition 1, if the spheres are disjoint. They are
    where beta N Delta_i >= 2, which is asked for too; Eq. 142 alone also holds for a beta so small that the spheres
    hold all patterns.

    The radius is chosen there, not sharp. From a distance r the update comes as near as h(r) = 2 (N - 1) M exp(-beta
    (Delta_i - 2 M r)) (Eq. 8), and |J| <= 2 beta M h(r), since 1 - p_i <= h(r) / (2 M) and the patterns scatter about
    x_i by at most 4 M^2 (1 - p_i). So distances shrink for every r with h(r) < r, down to where 2 beta M h(r) < 1 and
    the update contracts. With y = 2 beta M r and k = beta Delta_i - ln(4 (N - 1) beta M^2), h(r) < r reads
    y - ln(y) < k. It has solutions if k > 1, and their upper end, r = -W(-exp(-k)) / (2 beta M) with the lower branch
    of Lambert's W, is `widest`; if beta Delta_i > 1, it is less than Delta_i / (2 M), half the least distance that
    another pattern can have, to which it tends for large beta.

    Args:
      stored: the patterns, at least two.
      beta: inverse temperature, positive.

    Returns:
      Both radii of every pattern.

    Raises:
      ValueError: if there are fewer than two patterns or `beta` is out of range.
    """
    _check_memory(stored, beta)
    return _proven_radius(stored, beta)


@jax.jit
def _proven_radius(stored: jax.Array, beta: Any) -> ProvenRadius:
    gaps = separation(stored)
    count = stored.shape[-2]
    squares = jnp.max(jnp.sum(jnp.square(stored.astype(gaps.dtype)), axis=-1), axis=-1, keepdims=True)
    largest = jnp.sqrt(squares)
    needed = 2 / count + jnp.log(2 * (count - 1) * count * beta * squares)
    well_separated = (beta * gaps >= needed) & (beta * count * gaps >= 2)
    k = beta * gaps - jnp.log(4 * (count - 1) * beta * squares)
    excess = jnp.maximum(k - 1, 0)
    y = 1 + excess + jnp.sqrt(2 * excess)  # above the root; from there Newton's steps on a convex function only fall
    for _ in range(12):
        y = jnp.where(y > 1, y - (y - jnp.log(y) - 1 - excess) / jnp.maximum(1 - 1 / y, 1e-6), y)
    return ProvenRadius(
        sphere=jnp.where(well_separated, 1 / (beta * count * largest), 0),
        widest=jnp.where((excess > 0) & (beta * gaps > 1), y / (2 * beta * largest), 0),
    )


class BasinRadius(NamedTuple):
    """What `basin_radius` returns, each `[*batch, patterns]`; 0 where a pattern does not retrieve itself.

    Attributes:
      smallest: along the worst of the directions tried; the radius of the basin is at most that.
      median: along the median direction.
    """

    smallest: Array
    median: Array


def basin_radius(
    stored: Float[Array, "*batch patterns features"],
    *,
    beta: Number,
    directions: int = 16,
    update_steps: int = 50,
    bisections: int = 12,
    seed: int = 0,
) -> BasinRadius:
    """Measure how far from each pattern a state may begin and still come to rest in that pattern.

    Retrieved means: after `update_steps` updates the association is of kind `Kind.SINGLE` and its largest entry is that
    pattern's. Along each direction the last retrieved radius is found by bisection between 0 and 2 M (which is the
    answer where even that is retrieved). The directions are random, and one leads to the nearest other pattern, where
    the basin is narrowest. A basin that is left and entered again along a ray gives one of its edges.

    Args:
      stored: the patterns, at least two.
      beta: inverse temperature, positive.
      directions: tried for each pattern, at least 1.
      update_steps: until a state counts as at rest, at least 1.
      bisections: of [0, 2 M], at least 1; each halves the error.
      seed: of the random directions.

    Returns:
      The smallest and the median radius of every pattern.

    Raises:
      ValueError: if there are fewer than two patterns or an argument is out of range.
    """
    _check_memory(stored, beta)
    for name, value in (("directions", directions), ("update_steps", update_steps), ("bisections", bisections)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1; set {name}")
    if stored.shape[-2] < 2:
        raise ValueError(f"patterns={stored.shape[-2]} must be at least 2, since a basin needs another; store more")
    return _basin_radius(stored, beta, seed, directions=directions, update_steps=update_steps, bisections=bisections)


@functools.partial(jax.jit, static_argnames=("directions", "update_steps", "bisections"))
def _basin_radius(
    stored: jax.Array, beta: Any, seed: Any, *, directions: int, update_steps: int, bisections: int
) -> BasinRadius:
    stored = stored.astype(at_least_float32(stored.dtype))
    *batch, count, features = stored.shape
    squares = jnp.sum(jnp.square(stored), axis=-1)
    largest = jnp.sqrt(jnp.max(squares, axis=-1))[..., None, None]
    apart = squares[..., :, None] + squares[..., None, :] - 2 * jnp.einsum("...id,...jd->...ij", stored, stored)
    nearest = jnp.argmin(jnp.where(jnp.eye(count, dtype=bool), jnp.inf, apart), axis=-1)
    towards = jnp.take_along_axis(stored, nearest[..., None], axis=-2) - stored
    shape = (*batch, count, directions, features)
    rays = jax.random.normal(jax.random.key(seed), shape, stored.dtype).at[..., 0, :].set(towards)
    lengths = jnp.linalg.norm(rays, axis=-1, keepdims=True)
    rays = rays / jnp.where(lengths > 0, lengths, 1)  # equal patterns: no direction, and no basin of their own

    def retrieved(radius: jax.Array) -> jax.Array:
        start = (stored[..., None, :] + radius[..., None] * rays).reshape(*batch, count * directions, features)
        end = retrieve(start, stored, beta=beta, update_steps=update_steps).state
        weights = association(end, stored, beta=beta).reshape(*batch, count, directions, count)
        own = jnp.argmax(weights, axis=-1) == jnp.arange(count)[:, None]
        return own & (association_type(weights).kind == Kind.SINGLE)

    def probe(number: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        # First the outer end, which may be inside, then halves.
        radius = jnp.where(number == 0, high, (low + high) / 2)
        inside = retrieved(radius)
        return jnp.where(inside, radius, low), jnp.where(inside, high, radius)

    low, high = jnp.zeros(shape[:-1], stored.dtype), jnp.broadcast_to(2 * largest, shape[:-1])
    # A pattern that does not retrieve itself has no basin, though a state far away may lead to it.
    own = retrieved(low)
    low, _ = jax.lax.fori_loop(0, bisections + 1, probe, (low, high))
    low = jnp.where(own, low, 0)
    return BasinRadius(jnp.min(low, axis=-1), jnp.median(low, axis=-1))


# Capacity. ------------------------------------------------------------------------------------------------------------


class Capacity(NamedTuple):
    """What `measure_capacity` returns.

    Attributes:
      features: width d of the patterns.
      patterns: for each draw the largest number of patterns that passes.
      limited: whether a draw still passes at `max_patterns`, so that its number is only a lower bound.
      proven: the number of Theorem 3 (Eq. 4); `None` where it is silent.
    """

    features: int
    patterns: tuple[int, ...]
    limited: bool
    proven: float | None


def measure_capacity(
    features: int,
    *,
    beta: Number,
    radius_factor: Number,
    error: Number = 0.1,
    fraction: Number = 0.5,
    noise: Number = 0.0,
    criterion: str = "retrieved",
    failure_probability: Number = 0.001,
    queries: int = 128,
    draws: int = 3,
    max_patterns: int = 2**17,
    resolution: Number = 0.02,
    chunk: int = 2048,
    seed: int = 0,
) -> Capacity:
    """Search for the largest number of random patterns on a sphere of which a given fraction can be recalled.

    Patterns are drawn uniformly on the sphere of radius M = K sqrt(d - 1) of Theorem 3. A set of N patterns passes if
    at least `fraction` of the queries do, one query for each of the first `queries` patterns: `"retrieved"`, one update
    of the query ends within `error` M of its pattern; `"separated"`, the pattern is well separated in the sense of
    Eq. 142, which is what the proof of Theorem 3 asks of all patterns. The number is doubled until a set does not pass,
    then bisected to within `resolution`; sets of one draw are nested. Patterns are drawn in chunks when they are
    needed, and never stored, so that memory does not grow with N; the sums over them are carried from chunk to chunk.

    Args:
      features: width d, at least 2.
      beta: inverse temperature, positive.
      radius_factor: K, positive.
      error: largest distance from the pattern that counts as retrieved, in units of M, in (0, 1).
      fraction: of the queries that have to pass, in (0, 1].
      noise: distance of a query from its pattern in a random direction, in units of M; 0 = the pattern itself.
      criterion: `"retrieved"` or `"separated"`.
      failure_probability: p of Theorem 3, for `proven` alone.
      queries: patterns that are asked for, at most `chunk`.
      draws: independent repetitions.
      max_patterns: end of the search.
      resolution: relative width at which the bisection ends, positive.
      chunk: patterns drawn at a time.
      seed: of everything random.

    Returns:
      The number for each draw, and that of the theorem.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> from jaxlayers.hopfield.diagnostics import measure_capacity
      >>> measure_capacity(6, beta=1.0, radius_factor=1.0, draws=1).proven is None
      True
    """
    rules = (
        (features >= 2, f"features={features} must be at least 2; set features"),
        (0 < beta < math.inf, f"beta={beta} must be positive and finite; set beta"),
        (radius_factor > 0, f"radius_factor={radius_factor} must be positive; set radius_factor"),
        (0 < error < 1, f"error={error} must be in (0, 1), in units of the radius; set error"),
        (0 < fraction <= 1, f"fraction={fraction} must be in (0, 1]; set fraction"),
        (noise >= 0, f"noise={noise} must be at least 0; set noise"),
        (1 <= queries <= chunk, f"queries={queries} must be in 1 to chunk={chunk}; set queries or chunk"),
        (draws >= 1, f"draws={draws} must be at least 1; set draws"),
        (max_patterns >= 2, f"max_patterns={max_patterns} must be at least 2; set max_patterns"),
        (resolution > 0, f"resolution={resolution} must be positive; set resolution"),
    )
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
    if criterion not in ("retrieved", "separated"):
        raise ValueError(f"criterion={criterion!r} must be 'retrieved' or 'separated'; set criterion")
    # Widths share one compiled program: patterns are drawn in the next multiple of 32 and cut to their width.
    setting = {"width": -(-features // 32) * 32, "queries": queries, "chunk": chunk}
    radius = radius_factor * math.sqrt(features - 1)

    def passes(draw: int, count: int) -> bool:
        key = jax.random.fold_in(jax.random.key(seed), draw)
        errors, gaps = _recall_random(key, features, count, beta, radius, noise, **setting)
        asked = min(count, queries)
        if criterion == "retrieved":
            good = np.asarray(errors)[:asked] <= error * radius
        else:
            good = beta * np.asarray(gaps)[:asked] >= 2 / count + math.log(2 * (count - 1) * count * beta * radius**2)
        return float(np.mean(good)) >= fraction

    found, limited = [], False
    for draw in range(draws):
        low, high = 1, 2  # one pattern alone is always retrieved
        while high < max_patterns and passes(draw, high):
            low, high = high, min(2 * high, max_patterns)
        if high == max_patterns and passes(draw, high):
            low, limited = high, True
        else:
            while high - low > max(1, resolution * low):
                middle = (low + high) // 2
                low, high = (middle, high) if passes(draw, middle) else (low, middle)
        found.append(low)
    try:
        proven = storage_capacity(
            features, beta=beta, radius_factor=radius_factor, failure_probability=failure_probability
        ).patterns
    except ValueError:
        proven = None
    return Capacity(features, tuple(found), limited, proven)


@functools.partial(jax.jit, static_argnames=("width", "queries", "chunk"))
def _recall_random(
    key: jax.Array,
    features: Any,
    count: Any,
    beta: Any,
    radius: Any,
    noise: Any,
    *,
    width: int,
    queries: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Return error and separation of the first random patterns among `count`; the rest are drawn and forgotten."""

    drawing, disturbing = jax.random.split(key)

    def sphere(key: jax.Array, rows: int) -> jax.Array:
        points = jnp.where(jnp.arange(width) < features, jax.random.normal(key, (rows, width)), 0)
        return points / jnp.linalg.norm(points, axis=-1, keepdims=True)

    def patterns(number: Any) -> jax.Array:
        return radius * sphere(jax.random.fold_in(drawing, number), chunk)

    own = patterns(0)[:queries]
    query = own + noise * radius * sphere(disturbing, queries)

    def add(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, recalled, rival = carry
        drawn = patterns(number)
        index = number * chunk + jnp.arange(chunk)
        stored = index < count
        logits = jnp.where(stored, beta * query @ drawn.T, -jnp.inf)
        peak = jnp.maximum(largest, jnp.max(logits, axis=-1))
        weights, shrunk = jnp.exp(logits - peak[:, None]), jnp.exp(largest - peak)
        others = stored & (index != jnp.arange(queries)[:, None])
        products = jnp.max(jnp.where(others, own @ drawn.T, -jnp.inf), axis=-1)
        return (
            peak,
            total * shrunk + jnp.sum(weights, axis=-1),
            recalled * shrunk[:, None] + weights @ drawn,
            jnp.maximum(rival, products),
        )

    nothing = jnp.full(queries, -jnp.inf)
    start = (nothing, jnp.zeros(queries), jnp.zeros((queries, width)), nothing)
    _, total, recalled, rival = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, add, start)
    return jnp.linalg.norm(recalled / total[:, None] - own, axis=-1), radius**2 - rival


def mean_field_capacity(features: int, *, beta: Number, radius_factor: Number, error: Number = 0.1) -> float:
    """Return the number of random patterns at which the retrieval error of a typical pattern reaches `error` M.

    For many patterns on the sphere the sums over the others are near their means. With a = beta M^2, t the cosine
    between two patterns, z = E[exp(a (t - 1))] and m = E[t exp(a (t - 1))] / z, the update of a pattern falls short of
    it by (1 - m) M s / (1 + s) for s = (N - 1) z, which is `error` M at s = error / (1 - m - error). No part of the
    paper: an estimate to hold beside measurements, where Theorem 3 is a lower bound.

    Args:
      features: width d, at least 2.
      beta: inverse temperature, positive.
      radius_factor: K; M = K sqrt(d - 1).
      error: in units of M, in (0, 1).

    Returns:
      The number N; infinite if even infinitely many patterns do not make so large an error.

    Raises:
      ValueError: if an argument is out of range.
    """
    if features < 2 or not beta > 0 or not radius_factor > 0 or not 0 < error < 1:
        raise ValueError(
            f"features={features}, beta={beta}, radius_factor={radius_factor}, error={error} must be at least 2, "
            "positive, positive and in (0, 1); set the one that is not"
        )
    strength = beta * radius_factor**2 * (features - 1)
    # Midpoints, since for d = 2 the density of the angle is constant and the ends count in full.
    angle = (np.arange(200_000) + 0.5) * (math.pi / 200_000)
    density = np.sin(angle) ** (features - 2)
    tilted = density * np.exp(strength * (np.cos(angle) - 1))
    mean_cosine = np.sum(tilted * np.cos(angle)) / np.sum(tilted)
    if 1 - mean_cosine <= error:
        return math.inf
    return float(1 + error / (1 - mean_cosine - error) * np.sum(density) / np.sum(tilted))


def capacity_exponent(*, beta: Number, radius_factor: Number) -> float:
    """Return the growth of ln N with the width d that `mean_field_capacity` approaches for large d.

    By Laplace's method on z: with g = beta K^2 and t = (sqrt(1 + 4 g^2) - 1) / (2 g), the cosine that counts most,
    d ln N / d d -> g (1 - t) - ln(1 - t^2) / 2. Theorem 3 proves ln(c) / 4.

    Raises:
      ValueError: if an argument is not positive.
    """
    if not beta > 0 or not radius_factor > 0:
        raise ValueError(f"beta={beta} and radius_factor={radius_factor} must be positive; set the one that is not")
    strength = beta * radius_factor**2
    cosine = (math.sqrt(1 + 4 * strength**2) - 1) / (2 * strength)
    return strength * (1 - cosine) - math.log(1 - cosine**2) / 2


def classical_capacity(features: int) -> float:
    """Return 0.138 d, the patterns that a binary Hopfield network with Hebbian weights holds.

    Amit, Gutfreund and Sompolinsky, "Storing infinite numbers of patterns in a spin-glass model of neural networks",
    Physical Review Letters 55, 1985: the load at which retrieval breaks down, for large d, with about 1.5% wrong bits.
    """
    if features < 1:
        raise ValueError(f"features={features} must be at least 1; set features")
    return 0.138 * features


class Growth(NamedTuple):
    """What `fit_growth` returns.

    Attributes:
      slope: s of the exponential law ln N = s d + q.
      slope_error: its standard error.
      intercept: q.
      exponential_residual: root mean square of what the exponential law leaves of ln N.
      power_residual: the same for the power law ln N = s ln d + q, which has as many parameters.
      linear_residual: the same for the linear law N = s d, which has the form of the classical memory's capacity.
    """

    slope: float
    slope_error: float
    intercept: float
    exponential_residual: float
    power_residual: float
    linear_residual: float


def fit_growth(features: Sequence[int | float], patterns: Sequence[int | float]) -> Growth:
    """Fit the growth of a capacity with the width, exponentially and, as controls, by powers and linearly.

    All three are least squares in ln N, so that their residuals compare.

    Args:
      features: widths d, at least three, not all equal.
      patterns: capacities N, at least 1 each.

    Returns:
      The exponential law and the residuals of all three.

    Raises:
      ValueError: if there are too few points or one is out of range.
    """
    width, log_count = np.asarray(features, np.float64), np.log(np.maximum(np.asarray(patterns, np.float64), 1e-300))
    if width.shape != log_count.shape or width.ndim != 1 or len(width) < 3 or len(np.unique(width)) < 2:
        raise ValueError(
            f"{width.size} widths and {log_count.size} capacities must be at least 3 pairs of two widths or more; "
            "measure more"
        )
    if np.min(width) < 1 or np.min(log_count) < 0:
        raise ValueError(
            f"widths {list(features)} and capacities {list(patterns)} must be at least 1; leave others out"
        )

    def line(x: np.ndarray) -> tuple[float, float, np.ndarray]:
        away = x - x.mean()
        slope = float(away @ log_count / (away @ away))
        intercept = float(log_count.mean() - slope * x.mean())
        return slope, intercept, log_count - slope * x - intercept

    slope, intercept, left = line(width)
    spread = np.sum((width - width.mean()) ** 2)
    ratio = log_count - np.log(width)
    return Growth(
        slope=slope,
        slope_error=float(np.sqrt(left @ left / (len(width) - 2) / spread)),
        intercept=intercept,
        exponential_residual=float(np.sqrt(np.mean(left**2))),
        power_residual=float(np.sqrt(np.mean(line(np.log(width))[2] ** 2))),
        linear_residual=float(np.std(ratio)),
    )


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
