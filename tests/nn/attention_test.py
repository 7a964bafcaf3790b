import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.nn.attention import MultiHeadAttention
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry

KEY_BIAS = {"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}


def by_place(x, *rest):
    """Baseline that treats each token by its place: outside the claim."""
    return x * jnp.arange(1.0, 1.0 + x.shape[-2], dtype=x.dtype)[:, None]


CASES = (
    Case(
        name="self_attention",
        module=MultiHeadAttention(num_heads=2),
        inputs=lambda rng: (rng.normal(size=(2, 5, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        symmetries=(Symmetry(Symmetric(5), ("set",), output="set", control=by_place),),
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=MultiHeadAttention(3)),
            BadInput(match=r"input must be \[\*batch, tokens, features\]", inputs=lambda rng: (np.ones(8),)),
        ),
    ),
    Case(
        name="cross_attention",
        module=MultiHeadAttention(num_heads=2, use_bias=False),
        inputs=lambda rng: (rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 5, 6))),
        leading_axes=True,
        symmetries=(
            # The order of the context does not matter; of x it does to a baseline.
            Symmetry(
                Symmetric(5),
                (None, "set"),
                output="scalar",
                control=lambda x, context: x + by_place(context)[..., :3, :1],
            ),
        ),
        bad_inputs=(
            BadInput(
                match=r"context of the same batch; got \(2, 3, 8\), \(1, 5, 6\)",
                inputs=lambda rng: (np.ones((2, 3, 8)), np.ones((1, 5, 6))),
            ),
        ),
    ),
)


def test_equals_numpy_head_by_head(rng):
    layer = MultiHeadAttention(num_heads=2)
    x, context = rng.normal(size=(3, 4)), rng.normal(size=(5, 6))
    params = {
        name: {"kernel": rng.normal(size=(width, 4)), "bias": rng.normal(size=4)}
        for name, width in (("query", 4), ("key", 6), ("value", 6), ("out", 4))
    }
    query, key, value = (
        tokens @ params[name]["kernel"] + params[name]["bias"]
        for name, tokens in (("query", x), ("key", context), ("value", context))
    )
    mask = rng.random((3, 5)) < 0.6
    mask[0] = False
    heads = []
    for part in (slice(0, 2), slice(2, 4)):
        weights = np.where(mask, np.exp(query[:, part] @ key[:, part].T / np.sqrt(2)), 0)
        heads.append(weights / np.maximum(weights.sum(1, keepdims=True), 1e-30) @ value[:, part])
    expected = np.concatenate(heads, 1) @ params["out"]["kernel"] + params["out"]["bias"]
    x, context, params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (x, context, params))
    found = layer.apply({"params": params}, x, context, jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[0], params["out"]["bias"], atol=1e-6)


def test_a_mask_hides_exactly_what_it_says(rng):
    layer = MultiHeadAttention(num_heads=2)
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    mask = jnp.tril(jnp.ones((4, 4), bool))
    variables = layer.init(jax.random.key(0), x)
    jacobian = jax.jacobian(lambda x: layer.apply(variables, x, mask=mask))(x)
    reached = np.asarray(jnp.abs(jacobian).max(axis=(1, 3)) > 0)
    np.testing.assert_array_equal(reached, np.asarray(mask))
