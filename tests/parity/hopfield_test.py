"""One Hopfield update against the attention of PyTorch and Flax, run live on the same numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.hopfield.hopfield import Hopfield, HopfieldPooling, retrieve

torch = pytest.importorskip("torch")
F = torch.nn.functional

NO_NORMS = {"state_norm": None, "stored_norm": None, "value_norm": None}
HEADS, WIDTH = 4, 16


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def assert_close(found, expected, tolerance=1e-6):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=tolerance)


@pytest.fixture
def problem(rng):
    """Random parameters of a four-headed layer, its inputs, and the padding of the second set."""
    names = ("query", "key", "value", "out")
    params = {name: {"kernel": draw(rng, WIDTH, WIDTH) / 4, "bias": draw(rng, WIDTH)} for name in names}
    present = np.ones((2, 7), bool)
    present[1, 4:] = False
    return params, draw(rng, 2, 5, WIDTH), draw(rng, 2, 7, WIDTH), draw(rng, 2, 7, WIDTH), present


def torch_attention(params, q, k, v, present):
    fused = np.concatenate([params[name]["kernel"].T for name in ("query", "key", "value")])
    bias = np.concatenate([params[name]["bias"] for name in ("query", "key", "value")])
    out, weights = F.multi_head_attention_forward(
        *(torch.tensor(x).transpose(0, 1) for x in (q, k, v)),
        embed_dim_to_check=WIDTH,
        num_heads=HEADS,
        in_proj_weight=torch.tensor(fused),
        in_proj_bias=torch.tensor(bias),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=torch.tensor(params["out"]["kernel"].T),
        out_proj_bias=torch.tensor(params["out"]["bias"]),
        training=False,
        key_padding_mask=torch.tensor(~present),
        average_attn_weights=False,
    )
    return out.transpose(0, 1).numpy(), weights.numpy()


def test_hopfield_is_torch_multi_head_attention(problem):
    params, *inputs, present = problem
    expected, expected_weights = torch_attention(params, *inputs, present)
    layer = Hopfield(num_heads=HEADS, **NO_NORMS)
    arrays = [jnp.asarray(x) for x in inputs]
    found, sown = layer.apply({"params": params}, *arrays, key_mask=jnp.asarray(present), mutable="intermediates")
    assert_close(found, expected)
    assert_close(sown["intermediates"]["association"][0], expected_weights)
    unmasked = layer.apply({"params": params}, *arrays)
    assert np.abs(np.asarray(unmasked) - expected).max() > 1e-2  # negative control: the padding counts when not masked


def test_hopfield_is_flax_multi_head_attention(problem):
    params, q, k, v, present = problem
    attention = nn.MultiHeadDotProductAttention(num_heads=HEADS)
    q, k, v, mask = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(present)[:, None, None, :]
    shapes = jax.eval_shape(attention.init, jax.random.key(0), q, k, v)["params"]
    split = jax.tree.map(lambda leaf, shape: leaf.reshape(shape.shape), params, shapes)
    expected = np.asarray(attention.apply({"params": split}, q, k, v, mask=mask))
    assert_close(Hopfield(num_heads=HEADS, **NO_NORMS).apply({"params": params}, q, k, v, mask=mask), expected)


def test_gradients_are_those_of_torch_attention(problem):
    params, *inputs, present = problem
    layer = Hopfield(num_heads=HEADS, **NO_NORMS)
    direction = np.random.default_rng(1).normal(size=(2, 5, WIDTH)).astype(np.float32)

    def loss(q, k, v):
        return jnp.sum(direction * layer.apply({"params": params}, q, k, v, key_mask=jnp.asarray(present)))

    found = jax.grad(loss, (0, 1, 2))(*(jnp.asarray(x) for x in inputs))
    module = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(
            torch.tensor(np.concatenate([params[n]["kernel"].T for n in ("query", "key", "value")]))
        )
        module.in_proj_bias.copy_(torch.tensor(np.concatenate([params[n]["bias"] for n in ("query", "key", "value")])))
        module.out_proj.weight.copy_(torch.tensor(params["out"]["kernel"].T))
        module.out_proj.bias.copy_(torch.tensor(params["out"]["bias"]))
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    torch.sum(torch.tensor(direction) * module(*tensors, key_padding_mask=torch.tensor(~present))[0]).backward()
    for one, tensor in zip(found, tensors, strict=True):
        assert_close(one, tensor.grad.numpy(), 1e-5)


@pytest.mark.parametrize("update_steps", [1, 3])
@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_updates_are_repeated_scaled_dot_product_attention(rng, beta, update_steps):
    state, stored = draw(rng, 2, 5, 8), draw(rng, 2, 7, 8)
    expected, keys = torch.tensor(state), torch.tensor(stored)
    for _ in range(update_steps):
        expected = F.scaled_dot_product_attention(expected, keys, keys, scale=beta)
    found = retrieve(jnp.asarray(state), jnp.asarray(stored), beta=beta, update_steps=update_steps).state
    assert_close(found, expected.numpy(), 2e-6)
    more = F.scaled_dot_product_attention(expected, keys, keys, scale=beta).numpy()
    assert np.abs(np.asarray(found) - more).max() > 1e-4  # negative control: one update more is another result


def test_pooling_is_torch_attention_with_a_learned_query(problem):
    params, _, k, _, present = problem
    state = draw(np.random.default_rng(2), 3, WIDTH)
    expected, _ = torch_attention(params, np.stack([state, state]), k, k, present)
    pooling = HopfieldPooling(Hopfield(num_heads=HEADS, **NO_NORMS), num_states=3)
    variables = {"params": {"hopfield": params, "state_patterns": jnp.asarray(state)}}
    apply = jax.jit(functools.partial(pooling.apply, variables))
    assert_close(apply(jnp.asarray(k), key_mask=jnp.asarray(present)), expected)
