"""Parameters read without their layers are those of the layers: names, shapes, dtypes, draws and gradients' places."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxlayers.nn.weights import dense_weights, norm_weights, plain_norm

KERNEL, BIAS = nn.initializers.normal(0.3), nn.initializers.normal(0.1)


class Layers(nn.Module):
    """A norm and a projection, called, or computed from their weights."""

    called: bool
    use_bias: bool
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        init: dict[str, Any] = {"param_dtype": self.param_dtype, "bias_init": BIAS}
        if self.called:
            y = nn.LayerNorm(scale_init=BIAS, **init, name="norm")(x)
            return nn.Dense(5, use_bias=self.use_bias, kernel_init=KERNEL, **init, name="project")(y)
        norm = plain_norm(functools.partial(nn.LayerNorm, scale_init=BIAS, **init), x.astype(jnp.float32))
        assert norm is not None
        scale, offset = norm_weights(x.shape[-1], norm, name="norm")
        kernel, bias = dense_weights(x.shape[-1], 5, use_bias=self.use_bias, kernel_init=KERNEL, **init, name="project")
        assert (bias is None) == (not self.use_bias)
        y = jax.nn.standardize(x, epsilon=1e-6) * scale + offset
        return y @ kernel + (0 if bias is None else bias)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_weights_are_those_of_the_layers(use_bias, param_dtype):
    x = jax.random.normal(jax.random.key(1), (3, 4))
    layers, weights = (Layers(called, use_bias, param_dtype) for called in (True, False))
    variables = layers.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(weights.init(jax.random.key(0), x), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}
    chex.assert_trees_all_close(weights.apply(variables, x), layers.apply(variables, x), atol=1e-5, rtol=1e-5)
    # The control: another key is another draw.
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(weights.init(jax.random.key(2), x), variables)


def test_only_a_plain_layer_norm_is_left_to_kernels():
    x = jnp.ones((2, 3))
    make = functools.partial(nn.LayerNorm, epsilon=1e-3)
    found = plain_norm(functools.partial(make, param_dtype=jnp.float32), x)
    assert found is not None
    assert found.epsilon == 1e-3
    others: list[Any] = [
        nn.LayerNorm,
        functools.partial(nn.RMSNorm),
        functools.partial(make, use_bias=False),
        functools.partial(make, use_scale=False),
        functools.partial(make, reduction_axes=(0,)),
        functools.partial(make, dtype=jnp.bfloat16),
    ]
    assert [plain_norm(norm, x) for norm in others] == [None] * len(others)
