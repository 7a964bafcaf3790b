import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.core import axes
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


def test_a_mask_hides_later_tokens_and_a_full_one_nothing(rng):
    block = TransformerBlock(num_heads=2)
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    variables = block.init(jax.random.key(0), x)
    run = jax.jit(lambda x, mask: block.apply(variables, x, mask))
    np.testing.assert_allclose(run(x, jnp.ones((4, 4), bool)), block.apply(variables, x), atol=1e-6)
    moved = run(x.at[2].add(rng.normal(size=8)), jnp.tri(4, dtype=bool)) - run(x, jnp.tri(4, dtype=bool))
    np.testing.assert_array_equal(np.asarray(jnp.abs(moved).max(-1) > 0), [False, False, True, True])


def test_tokens_of_a_group_stay_on_one_device(rng):
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(rng.normal(size=(1, 8, 4, 8)), jnp.float32)
    rules = (("windows", "sequence"), ("tokens", "sequence"))
    where = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))

    def collectives(block):
        variables = block.init(jax.random.key(0), x)
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            program = jax.jit(lambda x: block.apply(variables, x)).lower(jax.device_put(x, where)).compile()
        return [name for name in ("all-gather", "all-to-all", "collective-permute") if name in program.as_text()]

    assert collectives(TransformerBlock(num_heads=2, groups=(axes.WINDOWS,))) == []
    # Control: without the name, tokens are split, and attention must gather them.
    assert collectives(TransformerBlock(num_heads=2)) != []
