"""How far a pattern draws states to itself, and how many patterns a memory can hold: what is proved, what is measured.

Equations, theorems and lemmas are those of Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021
(arXiv:2008.02217v3), N is the number of stored patterns, M their largest norm and Delta_i the separation of pattern i.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.hopfield.diagnostics import Kind, Number, association_type, check_memory
from jaxlayers.hopfield.hopfield import (
    association,
    retrieve,
    separation,
    storage_capacity,
)

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
    check_memory(stored, beta)
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
    check_memory(stored, beta)
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
      >>> from jaxlayers.hopfield.capacity import measure_capacity
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
