"""Hopfield-Fenchel-Young memories: sparse retrieval that is exact, and retrieval of several patterns at once.

Plain functions; the layers of `hopfield` run these memories with `association_fn=entropy.transform`, and so do `update`
and `retrieve` of that file. What is here is what the softmax has no counterpart of: the energy of any entropy,
post-transformations, and the distance from which a pattern is retrieved to the last bit.

Source:
  Santos, Niculae, McNamee and Martins, "Sparse and Structured Hopfield Networks", ICML 2024, and
  "Hopfield-Fenchel-Young Networks: A Unified Framework for Associative Memory Retrieval", 2024; code: deep-spin/HFYN
  (commit 062bddd). Sparsemax memories are those of Hu et al., "On Sparse Modern Hopfield Model", NeurIPS 2023, and
  alpha-entmax memories those of Wu et al., "STanHop", ICLR 2024.

Differs:
  Subsets of k are found by projection, without a factor-graph solver, and their energy has k M for the largest norm M,
  so that it stays at least zero. The retrieval radius of a pattern is the largest there is, derived here; it is never
  below (Delta_i - margin / beta) / (2 M). Layer normalisation has no epsilon and no learned shift. States that may
  retrieve nothing are defined. Sequences of patterns (SparseMAP over pairs of neighbours) and the free recall built on
  a bound for each pattern are left out.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.safe import safe_normalize
from jaxlayers.hopfield import hopfield
from jaxlayers.hopfield.hopfield import Beta, Retrieval, association
from jaxlayers.ops.entmax import Entropy

# States on the border of a ball are there to rounding.
_ON_BORDER = 1e-5


class PostTransform(NamedTuple):
    """What an update does to X p, and the convex potential Psi of the energy whose conjugate has it for a gradient.

    Attributes:
      apply: `apply(x)`, the transformed X p.
      potential: `potential(x)`, Psi(x) without the last axis, infinite outside its domain.
    """

    apply: Callable[[Array], Array]
    potential: Callable[[Array], Array]


def _square(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.square(x), axis=-1)


IDENTITY = PostTransform(lambda x: x, _square)


def unit_norm(radius: float = 1.0) -> PostTransform:
    """Return x / |x| * radius; its potential is 0 in the ball of that radius. The zero vector stays zero."""
    _check_radius("radius", radius)

    def potential(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.linalg.norm(x, axis=-1) <= radius * (1 + _ON_BORDER), 0.0, jnp.inf)

    return PostTransform(lambda x: radius * safe_normalize(x), potential)


def layer_norm(scale: float = 1.0) -> PostTransform:
    """Return scale (x - mean) / std over the features, without an epsilon; equal features give zero.

    Its potential is 0 for mean zero and norm at most scale sqrt(features).
    """
    _check_radius("scale", scale)

    def apply(x: jax.Array) -> jax.Array:
        radius = scale * math.sqrt(x.shape[-1])
        return radius * safe_normalize(x - jnp.mean(x, axis=-1, keepdims=True))

    def potential(x: jax.Array) -> jax.Array:
        radius = scale * math.sqrt(x.shape[-1])
        centred = jnp.abs(jnp.mean(x, axis=-1)) <= scale * _ON_BORDER
        return jnp.where(centred & (jnp.linalg.norm(x, axis=-1) <= radius * (1 + _ON_BORDER)), 0.0, jnp.inf)

    return PostTransform(apply, potential)


def energy(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    entropy: Entropy,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    post: PostTransform = IDENTITY,
) -> Float[Array, "*#batch states"]:
    """Return E = -(Omega*(beta X^T xi) - Omega*(0)) / beta + Psi(xi) + 1/2 (k M)^2 of every state.

    M is the largest norm of the patterns that the mask leaves, k the sum of p (1 but for subsets) and Psi = 1/2 xi^T xi
    unless `post` says otherwise. With Shannon's entropy this is `hopfield.energy`. With Psi = 1/2 xi^T xi, E is at
    least 0, and at most 2 (k M)^2 for states of norm up to k M. A state that may retrieve nothing has E = Psi(xi).

    Args:
      state: state patterns xi.
      stored: stored patterns, the columns of X.
      beta: inverse temperature, positive.
      entropy: Omega, of `jaxlayers.ops.entmax`.
      mask: True = may be retrieved.
      post: the post-transformation of the update.

    Returns:
      The energy, float32 or better.

    Raises:
      ValueError: if the widths of the patterns differ or a plain number `beta` is not positive.
    """
    _check_beta(beta)
    # An association that returns the logits, so that patterns, beta and mask are checked as everywhere.
    logits = association(state, stored, beta=beta, mask=mask, association_fn=_masked_logits)
    allowed = logits != -jnp.inf
    some = jnp.any(allowed, axis=-1)
    count = jnp.sum(allowed, axis=-1, keepdims=True).astype(logits.dtype)
    # The p of the lowest Omega, which is -Omega*(0).
    uniform = allowed * jnp.minimum(entropy.total / jnp.maximum(count, 1), 1)
    attraction = -entropy.conjugate(logits) - entropy.negentropy(uniform)
    squares = jnp.sum(jnp.square(stored.astype(logits.dtype)), axis=-1)[..., None, :]
    largest = jnp.max(jnp.broadcast_to(squares, logits.shape), axis=-1, where=allowed, initial=0.0)
    inverse = 1 / jnp.asarray(beta, logits.dtype)
    bound = 0.5 * entropy.total**2 * largest
    return post.potential(state.astype(logits.dtype)) + jnp.where(some, inverse[..., None] * attraction + bound, 0.0)


def update(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    entropy: Entropy,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    post: PostTransform = IDENTITY,
) -> Float[Array, "*#batch states features"]:
    """Return post(X p(beta X^T xi)), which never raises the energy; arguments as `energy`, with beta of at least 0."""
    recalled = hopfield.update(state, stored, beta=beta, mask=mask, association_fn=entropy.transform)
    return post.apply(recalled)


def retrieve(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    entropy: Entropy,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    post: PostTransform = IDENTITY,
    update_steps: int = 1,
    tolerance: float | None = None,
) -> Retrieval:
    """Iterate the update from `state`: `hopfield.retrieve` with the entropy's transform, and with `post`.

    Args:
      state: state patterns xi.
      stored: stored patterns.
      beta: inverse temperature of at least 0.
      entropy: Omega.
      mask: True = may be retrieved. A state that may retrieve nothing becomes zero.
      post: applied after every update; the first state is taken as it is.
      update_steps: updates, at least 1; with `tolerance` the most there may be, at least 2.
      tolerance: see `hopfield.retrieve`; `None` with a post-transformation, which takes a fixed number of updates.

    Returns:
      The states reached, their associations (before `post`) and their number of updates.

    Raises:
      ValueError: if the widths of the patterns differ, an argument is out of its range, or both `post` and `tolerance`
        are given.
    """
    if post is IDENTITY:
        return hopfield.retrieve(
            state,
            stored,
            beta=beta,
            mask=mask,
            update_steps=update_steps,
            tolerance=tolerance,
            association_fn=entropy.transform,
        )
    if tolerance is not None:
        raise ValueError(f"tolerance={tolerance} must be None with a post-transformation; set update_steps alone")
    if update_steps < 1:
        raise ValueError(f"update_steps={update_steps} must be at least 1; set update_steps")

    def step(xi: jax.Array) -> Retrieval:
        return hopfield.retrieve(xi, stored, beta=beta, mask=mask, association_fn=entropy.transform)

    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    shape = jax.eval_shape(step, state).state.shape
    xi = jnp.broadcast_to(state.astype(dtype), shape)
    xi = jax.lax.fori_loop(0, update_steps - 1, lambda _, xi: post.apply(step(xi).state), xi)
    last = step(xi)
    return Retrieval(post.apply(last.state), last.association, jnp.full_like(last.steps, update_steps))


def exact_retrieval_radius(
    stored: Float[Array, "*batch patterns features"], *, beta: float | int, entropy: Entropy
) -> Float[Array, "*batch patterns"]:
    """Return how far a query may lie from each pattern and still be mapped to it exactly, by one update.

    r_i = min over j != i of (x_i^T (x_i - x_j) - margin / beta) / |x_i - x_j|. From every query nearer than that, p is
    one-hot to the last bit (the margin is a gap between logits, and x_i^T (x_i - x_j) shrinks by at most |x_i - x_j|
    times the distance); from some a little further away it is not. At least (Delta_i - margin / beta) / (2 M), with
    Delta_i the `hopfield.separation` and M the largest norm. A pattern is a fixed point of the update, exactly and by
    itself, if and only if r_i >= 0, which is Delta_i >= margin / beta.

    Args:
      stored: patterns x_i.
      beta: inverse temperature, positive.
      entropy: of p that sums to one.

    Returns:
      The radius of each pattern: negative if the pattern is no such fixed point (equal patterns never are), which under
      Shannon's entropy none is; infinite for a pattern stored alone.

    Raises:
      ValueError: if `beta` is not positive or `entropy` is one of subsets.
    """
    if entropy.total != 1:
        raise ValueError(f"entropy.total={entropy.total} must be 1; call exact_subset_radius")
    _check_beta(beta)
    products, distances = _products_and_distances(stored)
    own = jnp.diagonal(products, axis1=-2, axis2=-1)[..., :, None]
    ratio = _ratio(own - products - entropy.margin / beta, distances)
    itself = jnp.eye(stored.shape[-2], dtype=bool)
    return jnp.min(jnp.where(itself, jnp.inf, ratio), axis=-1, initial=jnp.inf)


def exact_subset_radius(
    stored: Float[Array, "*batch patterns features"],
    members: Bool[Array, "*#batch subsets patterns"],
    *,
    beta: float | int,
    entropy: Entropy,
) -> Float[Array, "*batch subsets"]:
    """Return how far a query may lie from the sum of each subset and still be mapped to it exactly, by one update.

    r = min over i in the subset and j outside of (s^T (x_i - x_j) - margin / beta) / |x_i - x_j|, with s the sum of the
    subset's patterns.

    Args:
      stored: patterns x_i.
      members: True = in the subset; `entropy.total` in each.
      beta: inverse temperature, positive.
      entropy: `subset_entropy(k)`.

    Returns:
      The radius of each subset: negative if its sum is not mapped to itself exactly, infinite if there are no others.

    Raises:
      ValueError: if `beta` is not positive or the memory's size differs from that of `members`.
    """
    _check_beta(beta)
    if members.shape[-1] != stored.shape[-2]:
        raise ValueError(
            f"members for {members.shape[-1]} patterns must be for the {stored.shape[-2]} stored; pass one each"
        )
    products, distances = _products_and_distances(stored)
    members = jnp.broadcast_to(members, (*stored.shape[:-2], *members.shape[-2:]))
    overlaps = jnp.einsum("...si,...ij->...sj", members.astype(products.dtype), products)

    def radius(member: jax.Array, overlap: jax.Array) -> jax.Array:
        spare = overlap[..., :, None] - overlap[..., None, :] - entropy.margin / beta
        borders = member[..., :, None] & ~member[..., None, :]
        return jnp.min(jnp.where(borders, _ratio(spare, distances), jnp.inf), axis=(-2, -1), initial=jnp.inf)

    # One subset at a time, since each needs a number for every pair of patterns.
    first = (jnp.moveaxis(members, -2, 0), jnp.moveaxis(overlaps, -2, 0))
    return jnp.moveaxis(jax.lax.map(lambda subset: radius(*subset), first), 0, -1)


def is_exact(weights: Float[Array, "*batch patterns"]) -> Bool[Array, "*batch"]:
    """Return whether p is 1 and 0 to the last bit, and so the state a stored pattern (or the sum of some) exactly.

    Which one it is, `argmax` tells (for subsets `p > 0`). Copies of one pattern share p and are not exact in this
    sense, though X p may still be the pattern.
    """
    return jnp.all((weights == 0) | (weights == 1), axis=-1) & jnp.any(weights == 1, axis=-1)


def support_size(weights: Float[Array, "*batch patterns"]) -> Int[Array, "*batch"]:
    """Return how many patterns a state mixes: the number of entries of p that are not zero."""
    return jnp.sum(weights > 0, axis=-1)


def _masked_logits(logits: jax.Array, *, mask: jax.Array | None) -> jax.Array:
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)


def _products_and_distances(stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x_i^T x_j and |x_i - x_j| of all pairs."""
    stored = stored.astype(at_least_float32(stored.dtype))
    products = jnp.einsum("...id,...jd->...ij", stored, stored)
    squares = jnp.diagonal(products, axis1=-2, axis2=-1)
    return products, jnp.sqrt(jnp.maximum(squares[..., :, None] + squares[..., None, :] - 2 * products, 0))


def _ratio(spare: jax.Array, distances: jax.Array) -> jax.Array:
    """Return spare / distances; equal patterns cannot be told apart from any distance."""
    return jnp.where(distances > 0, spare / jnp.where(distances > 0, distances, 1), -jnp.inf)


def _check_beta(beta: Beta) -> None:
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"beta={beta} must be positive, since it is divided by; set beta")


def _check_radius(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value} must be positive; set {name}")
