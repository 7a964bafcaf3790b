import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.nn.transformer_block import TransformerBlock
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry

KEY_BIAS = {"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}

CASES = (
    Case(
        name="transformer_block",
        module=TransformerBlock(num_heads=2, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 5, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        symmetries=(
            Symmetry(
                Symmetric(5), ("set",), output="set", control=lambda x: x * jnp.arange(5.0, dtype=x.dtype)[:, None]
            ),
        ),
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=TransformerBlock(3)),
            BadInput(match=r"input must be \[\*batch, tokens, features\]", inputs=lambda rng: (np.ones(8),)),
            BadInput(match=r"rate=-0.1 must lie in \[0, 1\)", module=TransformerBlock(2, drop_path_rate=-0.1)),
        ),
    ),
)


def test_without_the_branches_a_token_passes_untouched(rng):
    block = TransformerBlock(num_heads=2)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    variables = block.init(jax.random.key(0), x)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if {"out", "down"} & {key.key for key in path} else leaf, variables["params"]
    )
    np.testing.assert_array_equal(block.apply({"params": params}, x), x)
    assert np.abs(block.apply(variables, x) - x).max() > 1e-4


def test_its_parts_in_order_are_the_block(rng):
    block = TransformerBlock(num_heads=2)
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    variables = block.init(jax.random.key(0), x)
    out, state = block.apply(variables, x, capture_intermediates=True)
    parts = state["intermediates"]
    after = x + parts["attention"]["__call__"][0]
    np.testing.assert_allclose(parts["norm2"]["__call__"][0].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(out, after + parts["feed_forward"]["__call__"][0], atol=1e-6)
