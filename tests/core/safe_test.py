import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core.safe import safe_divide, safe_norm, safe_normalize, safe_sqrt

SAFE = {"norm": lambda x: safe_norm(x), "normalize": lambda x: safe_normalize(x)[0], "sqrt": lambda x: safe_sqrt(x)[0]}


@pytest.mark.parametrize("name", SAFE)
def test_value_and_gradient_are_finite_at_zero(name):
    value, gradient = jax.value_and_grad(SAFE[name])(jnp.zeros(3))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_the_plain_norm_has_no_finite_gradient_at_zero():
    # Negative control: what the safe ones are for.
    assert not np.all(np.isfinite(jax.grad(jnp.linalg.norm)(jnp.zeros(3))))


def test_away_from_zero_they_are_the_plain_functions(rng):
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    np.testing.assert_allclose(safe_norm(x), np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(safe_normalize(x), x / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(safe_sqrt(x**2), np.abs(x), rtol=1e-6)


def test_division_by_zero_gives_the_stated_value_and_no_gradient():
    gradient = jax.grad(lambda d: safe_divide(jnp.asarray(1.0), d, otherwise=7.0))(0.0)
    assert safe_divide(jnp.asarray(1.0), jnp.asarray(0.0), otherwise=7.0) == 7.0
    assert gradient == 0.0
    assert safe_divide(jnp.asarray(3.0), jnp.asarray(2.0)) == 1.5
