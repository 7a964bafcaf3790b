import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads


def test_merge_is_the_inverse_of_split(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 12)), jnp.float32)
    assert split_heads(x, 4).shape == (2, 3, 4, 5, 3)
    np.testing.assert_array_equal(merge_heads(split_heads(x, 4)), x)


def test_heads_are_consecutive_features():
    np.testing.assert_array_equal(split_heads(jnp.arange(6.0)[None], 2)[:, 0], [[0, 1, 2], [3, 4, 5]])


def test_features_must_divide_by_heads():
    with pytest.raises(ValueError, match="features=30 must be divisible by num_heads=4"):
        split_heads(jnp.ones((2, 30)), 4)


def test_weights_equal_a_loop(rng):
    logits, bias = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    mask = rng.random((2, 3, 4)) < 0.6
    mask[0, 0] = False
    found = attention_weights(jnp.asarray(logits), bias=jnp.asarray(bias), mask=jnp.asarray(mask))
    for index in np.ndindex(2, 3):
        exponent = np.where(mask[index], np.exp((logits + bias)[index]), 0.0)
        np.testing.assert_allclose(found[index], exponent / max(exponent.sum(), 1e-9), rtol=1e-5)


def test_a_fully_masked_query_gets_zeros_and_a_finite_gradient():
    def total(logits):
        return jnp.sum(attention_weights(logits, mask=jnp.zeros((2, 3), bool)) ** 2)

    assert total(jnp.ones((2, 3))) == 0.0
    assert np.all(np.isfinite(jax.grad(total)(jnp.ones((2, 3)))))


def test_bfloat16_weights_are_computed_in_float32(rng):
    logits = jnp.asarray(8 * rng.normal(size=(1, 1, 512)), jnp.bfloat16)
    exact = jax.nn.softmax(logits.astype(jnp.float32))
    np.testing.assert_allclose(attention_weights(logits).astype(jnp.float32), exact, rtol=5e-3)
    # Negative control: the same softmax summed in bfloat16 is off by more.
    coarse = jnp.exp(logits - logits.max())
    coarse = coarse / jax.lax.reduce(coarse, jnp.bfloat16(0), jax.lax.add, (2,))[..., None]
    assert np.abs(coarse.astype(jnp.float32) / exact - 1).max() > 5e-3
