import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry


def by_place(x):
    """Baseline that treats each token by its place: outside the claim."""
    return x * jnp.arange(1.0, 1.0 + x.shape[-2])[:, None]


CASES = (
    Case(
        name="feed_forward",
        module=FeedForward(hidden_features=6, out_features=4),
        inputs=lambda rng: (rng.normal(size=(2, 5, 3)),),
        symmetries=(Symmetry(group=Symmetric(5), inputs=("set",), output="set", control=by_place),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="hidden_features=0 and out_features=3 must be positive", module=FeedForward(0)),
            BadInput(match="hidden_features=2 and out_features=-1 must be", module=FeedForward(2, out_features=-1)),
        ),
    ),
)


def test_equals_numpy(rng):
    layer = FeedForward(hidden_features=6, activation_fn=functools.partial(jax.nn.gelu, approximate=False))
    x = rng.normal(size=(5, 3))
    up, down = rng.normal(size=(3, 6)), rng.normal(size=(6, 3))
    up_bias, down_bias = rng.normal(size=6), rng.normal(size=3)
    hidden = x @ up + up_bias
    expected = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) @ down + down_bias
    params = {"up": {"kernel": up, "bias": up_bias}, "down": {"kernel": down, "bias": down_bias}}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    found = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_default_activation_is_the_exact_gelu():
    x = jnp.asarray([-1.5, 0.3, 2.0])
    expected = 0.5 * np.asarray(x) * (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2)))
    np.testing.assert_allclose(FeedForward(1).activation_fn(x), expected, atol=1e-6)


def test_dropout_acts_in_training_only():
    layer = FeedForward(hidden_features=64, dropout_rate=0.5)
    x = jnp.ones((8, 32))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    plain = layer.apply(variables, x)
    dropped = layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert abs(np.mean(np.asarray(dropped) == 0) - 0.5) < 0.15
    assert np.all(np.asarray(plain) != 0)
