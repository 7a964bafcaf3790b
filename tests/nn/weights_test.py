"""Parameters read without their layers are those of the layers: names, shapes, dtypes, draws and gradients' places."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxlayers.nn.weights import dense_weights, norm_weights

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
        scale, offset = norm_weights(x.shape[-1], scale_init=BIAS, **init, name="norm")
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
