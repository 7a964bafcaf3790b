"""Roots, norms and quotients whose value and gradient stay finite at zero."""

import jax
import jax.numpy as jnp


def safe_sqrt(x: jax.Array, *, epsilon: float = 0.0) -> jax.Array:
    """Return sqrt(max(x, epsilon)) with gradient zero where `x <= epsilon` (the plain root has an infinite one)."""
    small = x <= epsilon  # False for NaN, which goes through.
    return jnp.where(small, jnp.sqrt(jnp.asarray(epsilon, x.dtype)), jnp.sqrt(jnp.where(small, 1.0, x)))


def safe_norm(x: jax.Array, *, axis: int | tuple[int, ...] = -1, keepdims: bool = False) -> jax.Array:
    """Return the Euclidean norm along `axis`; at a zero vector value and gradient are zero."""
    return safe_sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=keepdims))


def safe_divide(numerator: jax.Array, denominator: jax.Array, *, otherwise: float = 0.0) -> jax.Array:
    """Return the quotient, and `otherwise` (with zero gradient) where the denominator is exactly zero."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), otherwise)


def safe_normalize(x: jax.Array, *, axis: int = -1, epsilon: float = 1e-12) -> jax.Array:
    """Return `x` divided by its norm along `axis`; vectors shorter than `epsilon` give zero, with zero gradient."""
    norm = safe_norm(x, axis=axis, keepdims=True)
    short = norm <= epsilon
    return jnp.where(short, 0.0, x / jnp.where(short, 1.0, norm))
