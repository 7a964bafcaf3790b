import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.testing import BadInput, Case

CASES = (
    Case(
        name="drop_path",
        module=DropPath(rate=0.5),
        inputs=lambda rng: (rng.normal(size=(4, 3, 2)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"rate=1.0 must lie in \[0, 1\); set rate", module=DropPath(rate=1.0)),
            BadInput(match=r"batch_ndim=4 must lie in \[0, 3\]", module=DropPath(batch_ndim=4)),
        ),
    ),
)


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw(module, x, rate=None, seed=0):
    return module.apply({}, x, rate, deterministic=False, rngs={"dropout": jax.random.key(seed)})


def test_whole_samples_are_dropped_or_scaled():
    y = np.asarray(draw(DropPath(rate=0.25, batch_ndim=2), jnp.ones((50, 40, 3, 2))))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.all(y == y[:, :, :1, :1])
    assert abs(np.mean(y == 0) - 0.25) < 0.04
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.05)


def test_a_traced_rate_draws_what_the_field_draws():
    x = jnp.ones((64, 2))
    np.testing.assert_array_equal(draw(DropPath(), x, jnp.asarray(0.3)), draw(DropPath(rate=0.3), x))
    np.testing.assert_array_equal(draw(DropPath(rate=0.3), x, jnp.asarray(0.0)), x)


def test_the_factor_is_what_a_call_in_its_place_multiplies_by():
    module, x = DropPath(rate=0.25, batch_ndim=2), jnp.ones((16, 4, 3, 2))
    rngs = {"dropout": jax.random.key(0)}
    factor = module.apply({}, (16, 4), deterministic=False, rngs=rngs, method="factor")
    np.testing.assert_array_equal(jnp.broadcast_to(factor[..., None, None], x.shape), draw(module, x))
    assert len(set(np.asarray(factor).ravel())) == 2
    other = module.apply({}, (16, 4), jnp.asarray(0.5), deterministic=False, rngs=rngs, method="factor")
    assert np.asarray(other).max() == 2
    assert module.apply({}, (16, 4), method="factor") is None
    assert DropPath().apply({}, (16, 4), deterministic=False, method="factor") is None


def test_deterministic_and_rate_zero_need_no_random_numbers():
    x = jnp.ones((2, 3))
    assert DropPath(rate=0.5).apply({}, x) is x
    assert DropPath().apply({}, x, deterministic=False) is x


def test_rates_grow_linearly_from_zero():
    np.testing.assert_allclose(drop_path_rates(0.3, 4), [0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == (0.0,)
    assert drop_path_rates(0.3, 0) == ()
    with pytest.raises(ValueError, match=r"drop_path_rate=1.0 must lie in \[0, 1\)"):
        drop_path_rates(1.0, 4)
    with pytest.raises(ValueError, match="depth=-1 must not be negative"):
        drop_path_rates(0.1, -1)
