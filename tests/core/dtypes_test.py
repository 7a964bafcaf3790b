import jax
import jax.numpy as jnp
import pytest

from jaxlayers.core.dtypes import at_least_float32, compute_dtype


def test_compute_dtype_follows_the_request_then_the_arrays():
    half, whole = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.int32)
    assert compute_dtype(half, dtype=jnp.float32) == jnp.float32
    assert compute_dtype(half, None) == jnp.bfloat16
    assert compute_dtype(half, jnp.ones(2)) == jnp.float32
    assert compute_dtype(whole) == jnp.float32
    with pytest.raises(ValueError, match="at least one array"):
        compute_dtype(None)


def test_geometry_never_falls_below_float32():
    assert at_least_float32(jnp.bfloat16) == jnp.float32
    with jax.enable_x64(True):
        assert at_least_float32(jnp.float64) == jnp.float64
