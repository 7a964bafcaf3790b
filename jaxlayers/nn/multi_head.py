"""Splitting features into heads, and softmax attention over them, as pure functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core.dtypes import at_least_float32


def split_heads(x: Float[Array, "*batch tokens features"], num_heads: int) -> Float[Array, "*batch heads tokens dim"]:
    """Return `x` with its features cut into `num_heads` consecutive groups, heads before tokens.

    Raises:
      ValueError: if the features do not divide by `num_heads`.
    """
    *batch, tokens, features = x.shape
    if features % num_heads:
        raise ValueError(f"features={features} must be divisible by num_heads={num_heads}; set num_heads or features")
    return jnp.swapaxes(x.reshape(*batch, tokens, num_heads, features // num_heads), -2, -3)


def merge_heads(x: Float[Array, "*batch heads tokens dim"]) -> Float[Array, "*batch tokens features"]:
    """Return the inverse of `split_heads`."""
    *batch, heads, tokens, dim = x.shape
    return jnp.swapaxes(x, -2, -3).reshape(*batch, tokens, heads * dim)


def attention_weights(
    logits: Float[Array, "*batch queries keys"],
    *,
    bias: Float[Array, "*#batch #queries #keys"] | None = None,
    mask: Bool[Array, "*#batch #queries #keys"] | None = None,
) -> Float[Array, "*batch queries keys"]:
    """Return softmax over the last axis of `logits + bias`, in float32 or better, then in the dtype of `logits`.

    Args:
      logits: scaled scores.
      bias: added to the logits; broadcasts against them.
      mask: True = may attend; broadcasts against the logits. A query that may attend to nothing gets zeros.

    Returns:
      Weights that sum to one over the keys (or to zero for a fully masked query).
    """
    scores = logits.astype(at_least_float32(logits.dtype))
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if mask is None:
        return jax.nn.softmax(scores, axis=-1).astype(logits.dtype)
    return jax.nn.softmax(scores, axis=-1, where=jnp.broadcast_to(mask, scores.shape)).astype(logits.dtype)
