"""The kernels for windows against their jnp twin: interpreted on CPU in value and gradient, and compiled for a TPU."""

import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlayers.core import axes
from jaxlayers.kernels import dispatch
from jaxlayers.kernels.pallas_window import window_attention
from jaxlayers.window import CosineWindowAttention, Swin, SwinBlock, SwinV2, WindowAttention
from train.collectives import collectives


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(query, key, value, bias, mask=None, scale=None, shifts=None):
    """Return the attention as it is written in a paper, in float32."""
    heads = len(bias)
    if shifts is not None:
        dtype = query.dtype
        query, key, value = (x + shift.astype(dtype) for x, shift in zip((query, key, value), shifts, strict=True))

    def split(x):
        return jnp.swapaxes(x.reshape(*x.shape[:-1], heads, -1), -2, -3).astype(jnp.float32)

    scores = split(query) @ jnp.swapaxes(split(key), -1, -2)
    scores = (scores if scale is None else scores * scale[:, None, None]) + bias
    scores = scores if mask is None else jnp.where(mask[..., None, :, :], scores, -jnp.inf)
    context = jax.nn.softmax(scores, axis=-1) @ split(value)
    return jnp.swapaxes(context, -2, -3).reshape(query.shape).astype(value.dtype)


def differentiated(function, mask=None):
    """Return a function of the operands, mask excepted, that gives the result and the gradients of a sum of it."""

    def total(query, key, value, bias, scale, shifts):
        out = function(query, key, value, bias, mask, scale=scale, shifts=shifts)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    def both(*operands):
        given = tuple(place for place, x in enumerate(operands) if x is not None)
        (_, out), gradients = jax.value_and_grad(total, argnums=given, has_aux=True)(*operands)
        return out, *gradients

    return jax.jit(both)


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


def problem(batch, windows, tokens, heads, dim, *, masked, scaled, dtype=jnp.float32):
    """Return operands and a mask that leaves each query itself."""
    shape = (*batch, windows, tokens, heads * dim)
    operands = [draw(seed, *shape, dtype=dtype) for seed in range(3)]
    operands += [draw(3, heads, tokens, tokens), 0.5 + jnp.abs(draw(4, heads)) if scaled else None]
    operands += [draw(6, 3, heads * dim) if masked else None]
    mask = draw(5, windows, tokens, tokens) > 0 if masked else None
    return operands, None if mask is None else mask | jnp.eye(tokens, dtype=bool)


PROBLEMS = {
    # Two heads lie side by side in a tile, and the third alone; tokens do not fill a tile's rows.
    "heads-in-uneven-groups": problem((), 4, 49, 3, 8, masked=True, scaled=False),
    "tokens-that-fill-tiles-scaled-by-head": problem((), 3, 64, 2, 16, masked=True, scaled=True),
    # Blocks of heads: 128 lanes hold four, and there are eight.
    "blocks-of-heads": problem((1,), 2, 9, 8, 32, masked=False, scaled=True),
    "windows-larger-than-a-tile": problem((), 2, 144, 2, 16, masked=True, scaled=False),
    # Tokens, scores of all heads and masks have one shape each: 16 x 16, and 2 windows share a block.
    "bias-and-masks-shaped-like-tokens": problem((3,), 2, 16, 1, 16, masked=True, scaled=False),
    "many-windows-a-block": problem((3, 2), 2, 4, 1, 12, masked=True, scaled=True),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_equal_plain_attention_in_value_and_gradient(name):
    operands, mask = PROBLEMS[name]
    found = differentiated(window_attention, mask)(*operands)
    expected = differentiated(plain, mask)(*operands)
    assert_equal(found, expected)
    # The control: a bias that differs in one entry is seen.
    *rest, bias, scale, shifts = operands
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(differentiated(window_attention, mask)(*rest, bias.at[-1, 0, 0].add(0.1), scale, shifts), expected)


def test_bfloat16_is_as_near_to_float32_as_the_plain_form():
    operands, mask = problem((), 4, 49, 4, 32, masked=True, scaled=True, dtype=jnp.bfloat16)
    exact = differentiated(plain, mask)(*(x.astype(jnp.float32) for x in operands))

    def rounded(query, key, value, bias, mask, scale, shifts):
        # Weights and values meet in bfloat16, as on a TPU.
        return jax.lax.reduce_precision(plain(query, key, value, bias, mask, scale, shifts), 8, 7)

    for found, other, wanted in zip(
        differentiated(window_attention, mask)(*operands),
        differentiated(rounded, mask)(*operands),
        exact,
        strict=True,
    ):
        scale = np.abs(np.asarray(wanted)).max()
        error, usual = (np.abs(np.asarray(x, np.float32) - np.asarray(wanted)).max() / scale for x in (found, other))
        assert found.dtype == other.dtype
        assert error < max(0.02, 3 * usual), (error, usual)


def test_no_token_meets_another_window_or_what_is_blocked():
    (query, key, value, bias, *_), mask = PROBLEMS["heads-in-uneven-groups"]
    apply = jax.jit(window_attention)
    before = apply(query, key, value, bias, mask)
    changed = apply(query, key.at[1, 7].add(3.0), value.at[1, 7].add(3.0), bias, mask)
    moved = np.abs(np.asarray(changed - before)).max(axis=-1) > 0
    assert not moved[[0, 2, 3]].any()
    np.testing.assert_array_equal(moved[1], np.asarray(mask[1, :, 7]))


MODELS = {
    "swin": Swin(num_classes=2, embed_dim=4, depths=(2,), num_heads=(2,), window_size=3, patch_size=2),
    "swin-v2": SwinV2(num_classes=2, embed_dim=4, depths=(2,), num_heads=(2,), window_size=3, patch_size=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_same_by_either_kernel(name):
    # 5 x 4 tokens: padding, and shifted windows with masks.
    model, x = MODELS[name].clone(drop_path_rate=0.0), draw(0, 1, 10, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss(kernel, variables):
        with dispatch.use(kernel):
            logits: Any = model.apply(variables, x, deterministic=False)
        return jnp.sum(jnp.sin(3 * logits))

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, one)))(variables) for one in ("pallas", "jnp")
    )
    assert_equal(found, expected, tolerance=2e-5)


@pytest.mark.parametrize("layer", [WindowAttention, CosineWindowAttention])
def test_what_the_kernel_does_not_serve_is_refused_or_left_to_jnp(layer):
    x = jnp.ones((1, 2, 9, 4))
    keywords = {"num_heads": 2, "window_size": (3, 3)}
    cases = {
        "attention_dropout_rate=0.1 must be 0": (layer(**keywords, attention_dropout_rate=0.1), x),
        "must be float32 or bfloat16": (layer(**keywords, dtype=jnp.float16), x),
        "windows of 289 tokens must have at most 256": (layer(2, (17, 17)), jnp.ones((1, 1, 289, 4))),
    }
    for message, (module, x) in cases.items():
        init = functools.partial(module.init, {"params": jax.random.key(0), "dropout": jax.random.key(1)})
        with dispatch.use("pallas"), pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(init, deterministic=False), x)
        with dispatch.use("table", platform="tpu"):
            jax.eval_shape(functools.partial(init, deterministic=False), x)


def test_the_table_takes_the_kernel_on_tpu_alone():
    def kernel(choice, platform, tokens=49, dim=32, dtype=jnp.bfloat16):
        with dispatch.use(choice, platform=platform):
            return dispatch.window_kernel(tokens, dim, dtype, 0.0)

    assert dispatch.window_kernel(49, 32, jnp.bfloat16, 0.0) == "jnp"
    assert kernel("table", "tpu") == kernel("table", "tpu", dtype="bfloat16") == "pallas"
    assert kernel("table", "tpu", tokens=4) == "jnp"
    assert kernel("table", "tpu", dim=64) == "jnp"  # nothing was measured there
    assert kernel("table", "cpu") == kernel("table", "gpu") == kernel("jnp", "tpu") == "jnp"
    assert kernel("pallas", "cpu", tokens=4, dim=4) == "pallas"
    with pytest.raises(ValueError, match="platform 'gpu' must be TPU"):
        kernel("pallas", "gpu")
    with pytest.raises(ValueError, match="kernels='mosaic' must be one of"):
        kernel("mosaic", "tpu")
    assert dispatch.using(lambda: dispatch.window_kernel(49, 32, jnp.float32, 0.0), "pallas")() == "pallas"


def test_operands_that_do_not_fit_are_refused():
    x = jnp.ones((2, 4, 6))
    with pytest.raises(ValueError, match="features=6 must be divisible by the 4 heads"):
        window_attention(x, x, x, jnp.zeros((4, 4, 4)))
    with pytest.raises(ValueError, match=r"mask of shape \(3, 4, 4\) must be \(2, 4, 4\)"):
        window_attention(x, x, x, jnp.zeros((2, 4, 4)), jnp.ones((3, 4, 4), bool))


def test_windows_may_share_a_mask():
    (query, key, value, bias, *_), mask = PROBLEMS["heads-in-uneven-groups"]
    shared = jax.jit(window_attention)(query, key, value, bias, mask[:1])
    each = jax.jit(window_attention)(query, key, value, bias, jnp.broadcast_to(mask[:1], mask.shape))
    np.testing.assert_array_equal(shared, each)


RULES = ((axes.BATCH, "data"), (axes.HEADS, "tensor"))


def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_sharded_over_batch_and_heads_equals_unsharded_and_sends_the_gradient_of_the_bias_alone():
    operands, mask = problem((4,), 3, 9, 4, 8, masked=True, scaled=True)
    expected = differentiated(window_attention, mask)(*operands)
    specs = [PartitionSpec("data", None, None, "tensor")] * 3 + [PartitionSpec("tensor")] * 2
    specs += [PartitionSpec(None, "tensor")]
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        placed = [jax.device_put(x, NamedSharding(mesh(), spec)) for x, spec in zip(operands, specs, strict=True)]
        compiled = differentiated(window_attention, mask).lower(*placed).compile()
        found = compiled(*placed)
    assert_equal(found, expected)
    assert found[1].sharding.spec == specs[0]
    sent = collectives(compiled.as_text(), mesh())
    assert {each.kind for each in sent} == {"all-reduce"}
    # Two heads' bias, scale and shifts, and the loss.
    assert sum(each.bytes for each in sent) <= 4 * (2 * 81 + 2 + 3 * 16 + 2)


def test_blocks_on_maps_split_over_devices_equal_unsplit_ones():
    block = SwinBlock(num_heads=2, window_size=4, shift_size=2)
    x = draw(0, 2, 8, 4, 4)
    variables = block.init(jax.random.key(0), x)
    expected = block.apply(variables, x)
    rules = ((axes.BATCH, "data"), (axes.HEIGHT, "tensor"))
    with jax.set_mesh(mesh()), nn.logical_axis_rules(rules), dispatch.use("pallas"):
        placed = jax.device_put(x, NamedSharding(mesh(), PartitionSpec("data", "tensor")))
        found = jax.jit(block.apply)(variables, placed)
    assert_equal(found, expected)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("heads", "tokens", "masked", "scaled"),
    [(3, 49, True, False), (24, 49, False, False), (4, 64, True, True), (6, 144, True, False), (32, 64, False, True)],
)
def test_kernels_compile_for_tpu(heads, tokens, masked, scaled):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    operands, mask = problem((2,), 16, tokens, heads, 32, masked=masked, scaled=scaled, dtype=jnp.bfloat16)
    place = SingleDeviceSharding(topology.devices[0])
    shapes = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in operands]
    text = differentiated(window_attention, mask).lower(*shapes).compile().as_text()
    assert "tpu_custom_call" in text
    assert os.environ.get("JAX_PLATFORMS") == "cpu"
