"""Sparse relatives of softmax, the entropies they come from, and the losses that fit them.

Each transform is p(z) = argmax over p of <p, z> - Omega(p), over the simplex (or, for `k_subsets`, over 0 <= p <= 1
with sum k), where Omega is a convex negentropy. Its value is the conjugate Omega*(z) = max over p of <p, z> - Omega(p),
whose gradient is p(z), and L(z; y) = Omega*(z) + Omega(y) - <z, y> is the Fenchel-Young loss, zero where p(z) = y.

All transforms act on the last axis, are computed in float32 or better whatever the logits are in, give zeros where the
mask is False, where a logit is -inf and for a row that may choose nothing, and have derivatives of their own: the
solver is not differentiated, so that forward mode, reverse mode and second derivatives cost a few reductions.

Source:
  Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016; Peters, Niculae and Martins, "Sparse
  Sequence-to-Sequence Models", ACL 2019 (entmax); Correia, Niculae and Martins, "Adaptively Sparse Transformers", EMNLP
  2019 (the derivative with respect to alpha); Blondel, Martins and Niculae, "Learning with Fenchel-Young Losses", JMLR
  2020; code: deep-spin/entmax (commit c2bec6d).

Differs:
  Half precision is computed in float32. Bisection is parametrised so that alpha may approach and reach 1. Subsets have
  a derivative of zero where no weight lies between 0 and 1 (code: NaN). Rows that may choose nothing are zero.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.safe import safe_divide

Alpha = float | int | Float[Array, "*#batch"]

# Logits this far below the largest are as good as -inf, and unlike it survive a product with zero.
_LOWEST = -1e30
# Bounds p^(2 - alpha), which for alpha > 2 has a pole at p = 0.
_LARGEST_EXPONENT = 60.0


def sparsemax(
    logits: Float[Array, "*batch choices"], *, mask: Bool[Array, "*#batch #choices"] | None = None
) -> Float[Array, "*batch choices"]:
    """Return the point of the simplex that is nearest to the logits: max(z - tau, 0), exactly, by sorting.

    Args:
      logits: z, in any float dtype.
      mask: True = may be chosen; broadcasts against the logits.

    Returns:
      Weights that sum to one (or to zero in a row that may choose nothing), many of them exactly zero, in the dtype of
      `logits`. One is exactly 1 and the others 0 where the largest logit leads by at least 1.
    """
    return _by_sorting(2.0, _masked(logits, mask)).astype(logits.dtype)


def entmax15(
    logits: Float[Array, "*batch choices"], *, mask: Bool[Array, "*#batch #choices"] | None = None
) -> Float[Array, "*batch choices"]:
    """Return max(z / 2 - tau, 0)^2, the 1.5-entmax, exactly, by sorting; arguments and result as `sparsemax`.

    One weight is exactly 1 where the largest logit leads by at least 2.
    """
    return _by_sorting(1.5, _masked(logits, mask)).astype(logits.dtype)


def entmax(
    logits: Float[Array, "*batch choices"],
    *,
    alpha: Alpha,
    mask: Bool[Array, "*#batch #choices"] | None = None,
) -> Float[Array, "*batch choices"]:
    """Return the alpha-entmax, max((alpha - 1) z - tau, 0)^(1 / (alpha - 1)): softmax at 1, sparsemax at 2.

    Differentiable with respect to `alpha` as well. For an `alpha` that is an array, or a number but 1, 1.5 and 2, the
    threshold comes from bisection to the precision of the dtype. It is parametrised by p = exp_alpha(z - c), with
    exp_alpha(t) = max(1 + (alpha - 1) t, 0)^(1 / (alpha - 1)), whose c stays of the size of the logits as alpha
    approaches 1, where tau does not.

    Args:
      logits: z, in any float dtype.
      alpha: at least 1; a number, or an array with one for each row (it broadcasts against `logits` without its last
        axis), which may be traced and whose values are not checked.
      mask: True = may be chosen.

    Returns:
      Weights that sum to one, in the dtype of `logits`; one is exactly 1 where the largest logit leads by at least
      1 / (alpha - 1). Above alpha = 2 their derivative is unbounded where a weight approaches zero.

    Raises:
      ValueError: if a plain number `alpha` is below 1 or not finite.
    """
    z = _masked(logits, mask)
    transform, parameters = _tsallis_transform(alpha, z)
    return transform(z, *parameters).astype(logits.dtype)


def normmax(
    logits: Float[Array, "*batch choices"], *, gamma: float | int, mask: Bool[Array, "*#batch #choices"] | None = None
) -> Float[Array, "*batch choices"]:
    """Return argmax of <p, z> - ||p||_gamma over the simplex: max(z - tau, 0)^(1 / (gamma - 1)), then scaled to sum 1.

    tau is where max(z - tau, 0)^(gamma / (gamma - 1)) sums to one. Large gamma spreads p evenly over its support.

    Args:
      logits: z, in any float dtype.
      gamma: order of the norm, above 1.
      mask: True = may be chosen.

    Returns:
      Weights that sum to one, in the dtype of `logits`; one is exactly 1 where the largest logit leads by at least 1,
      whatever `gamma`.

    Raises:
      ValueError: if `gamma` is not above 1 or not finite.
    """
    _check_gamma(gamma)
    return _normmax(float(gamma), _masked(logits, mask)).astype(logits.dtype)


def k_subsets(
    logits: Float[Array, "*batch choices"], *, k: int, mask: Bool[Array, "*#batch #choices"] | None = None
) -> Float[Array, "*batch choices"]:
    """Return the point with 0 <= p <= 1 and sum k that is nearest to the logits (SparseMAP of subsets of k).

    Args:
      logits: z, in any float dtype.
      k: size of the subsets, at least 1; `k=1` is `sparsemax`.
      mask: True = may be chosen. A row that may choose k or fewer gets p = 1 on all of them.

    Returns:
      Weights in the dtype of `logits`; exactly 1 on the k largest and 0 elsewhere where the k-th largest logit leads
      the next by at least 1.

    Raises:
      ValueError: if `k` is below 1.
    """
    _check_k(k)
    return _k_subsets(k, _masked(logits, mask)).astype(logits.dtype)


# Negentropies and conjugates ------------------------------------------------------------------------------------------


def tsallis_negentropy(p: Float[Array, "*batch choices"], *, alpha: Alpha) -> Float[Array, "*batch"]:
    """Return Omega_alpha(p) = sum(p^alpha - p) / (alpha (alpha - 1)), and sum(p ln p) at alpha = 1.

    Zero where all p are 0 or 1, negative elsewhere in [0, 1]. Computed as sum(p ln p psi((alpha - 1) ln p)) / alpha
    with psi(x) = (exp(x) - 1) / x, which has no singularity at 1, neither in value nor in derivatives.
    """
    p = p.astype(at_least_float32(p.dtype))
    return _tsallis_negentropy(p, jnp.asarray(alpha, p.dtype)[..., None])


def norm_negentropy(p: Float[Array, "*batch choices"], *, gamma: float | int) -> Float[Array, "*batch"]:
    """Return ||p||_gamma - 1."""
    _check_gamma(gamma)
    return _norm_negentropy(gamma, p.astype(at_least_float32(p.dtype)))


def tsallis_conjugate(
    logits: Float[Array, "*batch choices"],
    *,
    alpha: Alpha,
    mask: Bool[Array, "*#batch #choices"] | None = None,
) -> Float[Array, "*batch"]:
    """Return Omega*(z) = max of <p, z> - Omega_alpha(p) over the simplex, which is logsumexp at alpha = 1.

    Its gradient is `entmax`, whose arguments it takes. Float32 or better; a row that may choose nothing gives 0.
    """
    z = _masked(logits, mask)
    transform, parameters = _tsallis_transform(alpha, z)
    if parameters:
        return _conjugate(transform, _tsallis_negentropy, z, parameters)
    return _conjugate(transform, functools.partial(_tsallis_negentropy, alpha=np.full(1, alpha, z.dtype)), z, ())


def norm_conjugate(
    logits: Float[Array, "*batch choices"], *, gamma: float | int, mask: Bool[Array, "*#batch #choices"] | None = None
) -> Float[Array, "*batch"]:
    """Return max of <p, z> - ||p||_gamma + 1 over the simplex, whose gradient is `normmax`; arguments as `normmax`.

    Float32 or better; a row that may choose nothing gives -Omega(0) = 1.
    """
    _check_gamma(gamma)
    transform = functools.partial(_normmax, float(gamma))
    return _conjugate(transform, functools.partial(_norm_negentropy, gamma), _masked(logits, mask), ())


def k_subsets_conjugate(
    logits: Float[Array, "*batch choices"], *, k: int, mask: Bool[Array, "*#batch #choices"] | None = None
) -> Float[Array, "*batch"]:
    """Return max of <p, z> - Omega_2(p) over 0 <= p <= 1 with sum k, whose gradient is `k_subsets`; arguments as there.

    Float32 or better; a row that may choose nothing gives 0.
    """
    _check_k(k)
    z = _masked(logits, mask)
    negentropy = functools.partial(_tsallis_negentropy, alpha=np.full(1, 2, z.dtype))
    return _conjugate(functools.partial(_k_subsets, k), negentropy, z, ())


class Entropy(NamedTuple):
    """A negentropy Omega with what follows from it: what a sparse memory, attention or loss is made of.

    Attributes:
      transform: `transform(logits, mask=None)`, p(z), of the shape of the logits.
      conjugate: `conjugate(logits, mask=None)`, Omega*(z), without the last axis.
      negentropy: `negentropy(p)`, Omega(p), without the last axis.
      margin: the gap between the `total`-th and the next of the sorted logits from which on p is exactly 1 and 0;
        infinite if it never is.
      total: what p sums to.
    """

    transform: Callable[..., Array]
    conjugate: Callable[..., Array]
    negentropy: Callable[..., Array]
    margin: Any
    total: int = 1


def tsallis_entropy(alpha: Alpha) -> Entropy:
    """Return the entropy of `entmax`: Shannon's, and so softmax, at alpha = 1, with margin 1 / (alpha - 1)."""
    _check_alpha(alpha)
    margin = math.inf if isinstance(alpha, int | float) and alpha == 1 else 1 / (alpha - 1)
    return Entropy(
        functools.partial(entmax, alpha=alpha),
        functools.partial(tsallis_conjugate, alpha=alpha),
        functools.partial(tsallis_negentropy, alpha=alpha),
        margin,
    )


def norm_entropy(gamma: float | int) -> Entropy:
    """Return the entropy of `normmax`, with margin 1."""
    _check_gamma(gamma)
    return Entropy(
        functools.partial(normmax, gamma=gamma),
        functools.partial(norm_conjugate, gamma=gamma),
        functools.partial(norm_negentropy, gamma=gamma),
        1.0,
    )


def subset_entropy(k: int) -> Entropy:
    """Return the entropy of `k_subsets`, whose p sums to k, with margin 1."""
    _check_k(k)
    return Entropy(
        functools.partial(k_subsets, k=k),
        functools.partial(k_subsets_conjugate, k=k),
        functools.partial(tsallis_negentropy, alpha=2),
        1.0,
        k,
    )


def fenchel_young_loss(
    logits: Float[Array, "*batch choices"],
    target: Float[Array, "*batch choices"],
    *,
    entropy: Entropy,
    mask: Bool[Array, "*#batch #choices"] | None = None,
) -> Float[Array, "*batch"]:
    """Return L(z; y) = Omega*(z) + Omega(y) - <z, y>, at least zero, with gradient p(z) - y.

    Cross-entropy for a one-hot y and Shannon's entropy. With a margin it is exactly zero from there on.

    Args:
      logits: z.
      target: y, a point of the set that p(z) lies in; zero where the mask is False.
      entropy: of `tsallis_entropy`, `norm_entropy` or `subset_entropy`.
      mask: True = may be chosen.

    Returns:
      The loss of each row, float32 or better.
    """
    z = _masked(logits, mask)
    y = target.astype(z.dtype)
    # Differences to the largest logit keep the digits of a small loss of large logits.
    top = jnp.max(z, axis=-1, keepdims=True, initial=-jnp.inf)
    z = z - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    chosen = jnp.sum(jnp.where(y != 0, y * jnp.where(y != 0, z, 0), 0), axis=-1)
    return entropy.conjugate(z) + entropy.negentropy(y) - chosen


# Solvers and derivatives ----------------------------------------------------------------------------------------------


def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, int | float) and not (math.isfinite(alpha) and alpha >= 1):
        raise ValueError(f"alpha={alpha} must be finite and at least 1, where entmax is softmax; set alpha")


def _check_gamma(gamma: float | int) -> None:
    if not (math.isfinite(gamma) and gamma > 1):
        raise ValueError(f"gamma={gamma} must be finite and above 1; set gamma")


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1; set k")


def _masked(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the logits in float32 or better, -inf where the mask is False."""
    z = logits.astype(at_least_float32(logits.dtype))
    return z if mask is None else jnp.where(mask, z, -jnp.inf)


def _below(z: jax.Array, top: jax.Array) -> jax.Array:
    """Return z - top, nowhere -inf, so that -inf in a row of nothing else is as low as any other."""
    return jnp.maximum(z - jnp.where(top == -jnp.inf, 0, top), _LOWEST)


def _normalised(p: jax.Array) -> jax.Array:
    return safe_divide(p, jnp.sum(p, axis=-1, keepdims=True))


def _bisect(reached: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Return the largest point, to the precision of the dtype, up to which the decreasing `reached` holds."""

    def halve(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, width = carry
        middle = low + width / 2
        return jnp.where(reached(middle), middle, low), width / 2

    # The widest start is ln(choices), a few bits over one.
    return jax.lax.fori_loop(0, jnp.finfo(low.dtype).nmant + 8, halve, (low, high - low))[0]


def _tsallis_transform(alpha: Any, z: jax.Array) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """Return the solver for `alpha` and, if it takes one, its argument."""
    _check_alpha(alpha)
    if isinstance(alpha, int | float):
        if alpha == 1:
            return _softmax, ()
        if alpha in (1.5, 2):
            return functools.partial(_by_sorting, float(alpha)), ()
    return _entmax, (jnp.broadcast_to(jnp.asarray(alpha, z.dtype), z.shape[:-1])[..., None],)


def _softmax(z: jax.Array) -> jax.Array:
    allowed = z > -jnp.inf
    return jax.nn.softmax(z, axis=-1, where=allowed | jnp.isnan(z))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _by_sorting(alpha: float, z: jax.Array) -> jax.Array:
    """Return the entmax of alpha 2 or 1.5: max(x - tau, 0)^power with x = z / power, powers summing to one."""
    if not z.shape[-1]:
        return z
    power = round(1 / (alpha - 1))
    x = _below(z, jnp.max(z, axis=-1, keepdims=True)) / power
    # tau >= -1, so what lies lower is out, and clipped it cannot spoil the digits of the sums.
    ordered = jnp.flip(jnp.sort(jnp.maximum(x, -1), axis=-1), axis=-1)
    count = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean = jnp.cumsum(ordered, axis=-1) / count
    if power == 1:
        thresholds = mean - 1 / count
    else:
        scatter = count * (jnp.cumsum(jnp.square(ordered), axis=-1) / count - jnp.square(mean))
        thresholds = mean - jnp.sqrt(jnp.maximum(1 - scatter, 0) / count)
    # Those that reach their own threshold come first in the order, and the last of them has the threshold of all.
    last = jnp.sum(thresholds <= ordered, axis=-1, keepdims=True) - 1
    tau = jnp.take_along_axis(thresholds, jnp.maximum(last, 0), axis=-1)
    # Newton's method on the convex sum takes out what rounding of long cumulative sums put in, from either side.
    for _ in range(1 if power == 1 else 4):
        over = jnp.maximum(x - tau, 0)
        slope = power * jnp.sum(over ** (power - 1) * (over > 0), axis=-1, keepdims=True)
        tau = tau + safe_divide(jnp.sum(over**power, axis=-1, keepdims=True) - 1, slope)
    return _normalised(jnp.maximum(x - tau, 0) ** power)


@_by_sorting.defjvp
def _by_sorting_jvp(alpha: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    p = _by_sorting(alpha, *primals)
    return p, _project_tangent(_skew(p, alpha), *tangents)


@jax.custom_jvp
@jax.jit
def _entmax(z: jax.Array, alpha: jax.Array) -> jax.Array:
    """Return the entmax of any alpha; `alpha` has the shape of `z` but 1 for its last axis."""
    if not z.shape[-1]:
        return z
    t, excess = _below(z, jnp.max(z, axis=-1, keepdims=True)), alpha - 1

    def weights(c: jax.Array) -> jax.Array:
        inside = jnp.log1p(jnp.maximum(excess * (t - c), -1))
        return jnp.exp(jnp.where(excess == 0, t - c, inside / jnp.where(excess == 0, 1, excess)))

    # The largest weight is between 1 / choices and 1.
    spread = math.log(z.shape[-1])
    c = _bisect(
        lambda c: jnp.sum(weights(c), axis=-1, keepdims=True) >= 1,
        jnp.zeros_like(alpha),
        spread * _expm1_ratio(-spread * excess),
    )
    return _normalised(weights(c))


@_entmax.defjvp
def _entmax_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (z, alpha), (z_dot, alpha_dot) = primals, tangents
    p = _entmax(z, alpha)
    skew = _skew(p, alpha)
    # z_i - c = (p_i^(alpha - 1) - 1) / (alpha - 1) on the support: a change of alpha acts like one of the logits.
    log = jnp.log(jnp.where(p > 0, p, 1))
    _, slope = jax.jvp(_expm1_ratio, ((alpha - 1) * log,), (jnp.ones_like(log),))
    z_dot = z_dot - jnp.square(log) * slope * alpha_dot
    if z.shape[-1]:
        # Where one skew is far above the others (alpha > 2), its own difference to the mean must not be rounded.
        z_dot = z_dot - jnp.take_along_axis(z_dot, jnp.argmax(skew, axis=-1, keepdims=True), axis=-1)
    return p, _project_tangent(skew, z_dot)


def _skew(p: jax.Array, alpha: Any) -> jax.Array:
    """Return s = p^(2 - alpha) on the support and 0 elsewhere."""
    on = p > 0
    exponent = (2 - alpha) * jnp.log(jnp.where(on, p, 1))
    return jnp.where(on, jnp.exp(jnp.minimum(exponent, _LARGEST_EXPONENT)), 0)


def _project_tangent(skew: jax.Array, z_dot: jax.Array) -> jax.Array:
    """Return (diag(s) - s s^T / sum(s)) z_dot."""
    mean = safe_divide(jnp.sum(skew * z_dot, axis=-1, keepdims=True), jnp.sum(skew, axis=-1, keepdims=True))
    return skew * (z_dot - mean)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _normmax(gamma: float, z: jax.Array) -> jax.Array:
    if not z.shape[-1]:
        return z
    top = jnp.max(z, axis=-1, keepdims=True)
    t, power = _below(z, top), gamma / (gamma - 1)
    low = jnp.full_like(top, -1)
    tau = _bisect(
        lambda tau: jnp.sum(jnp.maximum(t - tau, 0) ** power, axis=-1, keepdims=True) >= 1,
        low,
        jnp.full_like(top, -(z.shape[-1] ** (-1 / power))),
    )
    # Relative to the largest, so that a gamma near 1 takes high powers of nothing but numbers up to 1.
    ratio = jnp.maximum(t - tau, 0) / -tau
    return _normalised(ratio ** (1 / (gamma - 1)))


@_normmax.defjvp
def _normmax_jvp(gamma: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    p, (z_dot,) = _normmax(gamma, *primals), tangents
    # With norm 1, u = p / ||p|| solves u^(gamma - 1) = z - tau on its support; tau' = <p, z'> keeps the norm.
    norm = _norm_negentropy(gamma, p)[..., None] + 1
    skew = _skew(safe_divide(p, norm), gamma) / (gamma - 1)
    moved = skew * (z_dot - jnp.sum(p * z_dot, axis=-1, keepdims=True))
    return p, norm * (moved - p * jnp.sum(moved, axis=-1, keepdims=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _k_subsets(k: int, z: jax.Array) -> jax.Array:
    if z.shape[-1] <= k:
        return (z > -jnp.inf).astype(z.dtype)
    last = jax.lax.top_k(z, k)[0][..., -1:]
    # The k-th largest gets between 0 (others of its size share) and 1: tau lies in the unit below it.
    t = _below(z, last)
    tau = _bisect(
        lambda tau: jnp.sum(jnp.clip(t - tau, 0, 1), axis=-1, keepdims=True) >= k,
        jnp.full_like(last, -1),
        jnp.zeros_like(last),
    )
    # Between its kinks the sum is linear, which gives the exact threshold.
    over = t - tau
    inner, full = (over > 0) & (over < 1), over >= 1
    free = k - jnp.sum(full, axis=-1, keepdims=True).astype(z.dtype)
    inside = jnp.sum(jnp.where(inner, t, 0), axis=-1, keepdims=True)
    count = jnp.sum(inner, axis=-1, keepdims=True).astype(z.dtype)
    tau = jnp.where(count > 0, (inside - free) / jnp.maximum(count, 1), tau)
    few = last == -jnp.inf
    return jnp.where(few, (z > -jnp.inf).astype(z.dtype), jnp.clip(t - tau, 0, 1))


@_k_subsets.defjvp
def _k_subsets_jvp(k: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    p = _k_subsets(k, *primals)
    return p, _project_tangent(((p > 0) & (p < 1)).astype(p.dtype), *tangents)


def _expm1_ratio(x: jax.Array) -> jax.Array:
    """Return (exp(x) - 1) / x, with all digits of value and derivatives at and near zero."""
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0)
    series = jnp.zeros_like(x)
    for order in range(16, 0, -1):
        series = (1 + small * series) / order
    large = jnp.where(near, 1, x)
    return jnp.where(near, series, jnp.expm1(large) / large)


def _tsallis_negentropy(p: jax.Array, alpha: jax.Array | np.ndarray) -> jax.Array:
    log = jnp.log(jnp.where(p > 0, p, 1))
    return jnp.sum(p * log * _expm1_ratio(jnp.asarray(alpha - 1) * log) / alpha, axis=-1)


def _norm_negentropy(gamma: float | int, p: jax.Array) -> jax.Array:
    # Relative to the largest: powers of small weights would underflow for a large gamma.
    top = jax.lax.stop_gradient(jnp.max(p, axis=-1, keepdims=True, initial=0))
    ratio = safe_divide(p, top)
    powers = jnp.sum(jnp.where(ratio > 0, jnp.where(ratio > 0, ratio, 1) ** gamma, 0), axis=-1)
    return top[..., 0] * jnp.where(powers > 0, jnp.where(powers > 0, powers, 1) ** (1 / gamma), 0) - 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _conjugate(transform: Any, negentropy: Any, z: jax.Array, parameters: tuple[jax.Array, ...]) -> jax.Array:
    p = transform(z, *parameters)
    return jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, z, 0), p), axis=-1) - negentropy(p, *parameters)


@_conjugate.defjvp
def _conjugate_jvp(transform: Any, negentropy: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (z, parameters), (z_dot, parameters_dot) = primals, tangents
    p = transform(z, *parameters)
    # The maximum does not move to first order with its argument p.
    tangent = jnp.sum(p * z_dot, axis=-1)
    if parameters:
        tangent = tangent - jax.jvp(functools.partial(negentropy, p), parameters, parameters_dot)[1]
    return _conjugate(transform, negentropy, z, parameters), tangent
