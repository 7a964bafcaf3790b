"""Dtype promotion: compute in the dtype asked for, keep geometry and statistics in float32 or better."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def array_namespace(x: Any) -> Any:
    """Return the module that computes with `x`: `jax.numpy` for JAX arrays (traced or not), else NumPy."""
    return jnp if isinstance(x, jax.Array) else np


def widen(x: Any) -> tuple[Any, Any]:
    """Return `x` in the dtype to do geometry in, and the dtype for the result.

    NumPy arrays are computed in float64; JAX arrays in float32 or better. The result has the dtype of `x` where that is
    inexact, else float64 (NumPy) or JAX's default.
    """
    if isinstance(x, jax.Array):
        dtype = compute_dtype(x)
        return x.astype(at_least_float32(dtype)), dtype
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else np.dtype(np.float64)
    return x.astype(np.promote_types(dtype, np.float64)), dtype
