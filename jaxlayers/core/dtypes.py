"""Dtype promotion: compute in the dtype asked for, keep geometry and statistics in float32 or better."""

import jax
import jax.numpy as jnp

from jaxlayers.core.types import Dtype


def compute_dtype(*arrays: jax.Array | None, dtype: Dtype | None = None) -> Dtype:
    """Return `dtype`, or the inexact dtype that the given arrays promote to (`None` entries are ignored)."""
    if dtype is not None:
        return dtype
    present = [array for array in arrays if array is not None]
    if not present:
        raise ValueError("dtype=None needs at least one array to infer from; pass dtype or an array")
    result = jnp.result_type(*present)
    return result if jnp.issubdtype(result, jnp.inexact) else jnp.promote_types(result, jnp.float32)


def at_least_float32(dtype: Dtype) -> Dtype:
    """Return the dtype for softmax, norms, frames and decompositions: float32, or float64 when given it."""
    return jnp.promote_types(dtype, jnp.float32)
