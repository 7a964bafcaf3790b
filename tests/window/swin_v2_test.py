import functools
import itertools
import math
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlayers
from jaxlayers import summarize
from jaxlayers.core import axes
from jaxlayers.ops.windows import merge_windows, partition_windows, shift_mask
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import (
    ContinuousPositionBias,
    CosineWindowAttention,
    PatchMergingV2,
    SwinBlock,
    SwinV2,
    SwinV2Block,
    WindowAttention,
    swin_v2,
)
from jaxlayers.window.swin import layer_norm

CASES = (
    Case(
        name="continuous_position_bias",
        within="swin_v2",
        module=ContinuousPositionBias(num_heads=2, hidden_features=8),
        inputs=lambda rng: (rng.uniform(-2, 2, size=(2, 5, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="num_heads=0 and hidden_features=512 must be", module=ContinuousPositionBias(0)),
            BadInput(match=r"must be \[\*batch, axes\]; got shape \(\)", inputs=lambda rng: (np.float32(1),)),
        ),
    ),
    Case(
        name="cosine_window_attention",
        within="swin_v2",
        module=CosineWindowAttention(num_heads=2, window_size=(2, 3)),
        inputs=lambda rng: (rng.normal(size=(2, 2, 6, 8)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=9 must be divisible by num_heads=2", inputs=lambda rng: (np.ones((2, 2, 6, 9)),)),
            BadInput(match=r"must be \[\*batch, windows, 6, features\]", inputs=lambda rng: (np.ones((2, 2, 4, 8)),)),
            BadInput(
                match=r"pretrained_window_size=\(0, 3\) must be positive",
                module=CosineWindowAttention(2, (2, 3), pretrained_window_size=(0, 3)),
            ),
        ),
    ),
    Case(
        name="swin_v2_block",
        within="swin_v2",
        module=SwinV2Block(num_heads=2, window_size=(3, 2), shift_size=1, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 8)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"shift_size=\(3, 3\) must lie in", module=SwinV2Block(2, window_size=3, shift_size=3)),
            BadInput(match=r"window_size=\(0, 2\) must be positive", module=SwinV2Block(2, window_size=(0, 2))),
            BadInput(match="must name 1 to 3 axes, equally many", module=SwinV2Block(2, window_size=(2,) * 4)),
            BadInput(
                match=r"pretrained_window_size=\(4,\) must name", module=SwinV2Block(2, pretrained_window_size=(4,))
            ),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 8)),)),
            BadInput(match="features=8 must be divisible by num_heads=3", module=SwinV2Block(3, window_size=2)),
        ),
    ),
    Case(
        name="patch_merging_v2",
        within="swin_v2",
        module=PatchMergingV2(),
        inputs=lambda rng: (rng.normal(size=(2, 3, 4, 6)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=0 must be positive", module=PatchMergingV2(features=0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((3, 6)),)),
        ),
    ),
    Case(
        name="swin_v2",
        module=SwinV2(num_classes=3, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=3),
        inputs=lambda rng: (rng.normal(size=(2, 10, 9, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"depths=\(2,\) and num_heads=\(1, 2\) must have", module=SwinV2(depths=(2,), num_heads=(1, 2))
            ),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=SwinV2(drop_path_rate=1.0)),
            BadInput(match=r"patch_size=\(2, 2, 2\) must be an int or", module=SwinV2(patch_size=(2, 2, 2))),
            BadInput(match="num_classes=-1 must not be negative", module=SwinV2(num_classes=-1)),
            BadInput(match=r"^window_size=\(7, 7, 7\) must be an int", module=SwinV2(window_size=(7, 7, 7))),
            BadInput(
                match=r"pretrained_window_size=\(\(8, 8\),\) must be .* each of the 4 stages",
                module=SwinV2(pretrained_window_size=((8, 8),)),
            ),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
    Case(
        name="swin_v2_scan",
        module=SwinV2(num_classes=2, patch_size=1, embed_dim=8, depths=(2,), num_heads=(2,), window_size=2, scan=True),
        inputs=lambda rng: (rng.normal(size=(2, 4, 4, 1)),),
        bad_inputs=(BadInput(match="2 spatial axes needs", inputs=lambda rng: (np.ones((4, 4)),)),),
    ),
)

TINY = SwinV2(
    num_classes=3, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(2, 4), window_size=(4, 3), drop_path_rate=0.0
)


def random_params(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape) + (path[-1].key in ("scale", "logit_scale")), dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


@pytest.fixture(scope="module")
def tiny():
    """A small model, its parameters, images that fit neither patch nor window, and the logits."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 17, 22, 3)), jnp.float32)
    params = random_params(TINY, x)
    return params, x, jax.jit(TINY.apply)({"params": params}, x)


# An independent twin: NumPy, token by token, without rolling -----------------------------------------------------


def groups(size, window, shift):
    """Which window each entry of the padded map is in: an axis is cut at shift, shift + window, and so on."""
    places = []
    for length, step, by in zip(size, window, shift, strict=True):
        step, by = (length, 0) if length <= step else (step, by)
        places.append((np.arange(-(-length // step) * step) - by) // step)
    return np.stack(np.meshgrid(*places, indexing="ij"), axis=-1)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def bias_of(p, offset, units):
    """The bias of every head for an offset in tokens, of which `units` count as one."""
    spaced = [math.copysign(math.log(1 + 8 * abs(by) / unit, 8), by) for by, unit in zip(offset, units, strict=True)]
    return 16 / (1 + np.exp(-np.maximum(dense(p["up"], np.array(spaced)), 0) @ p["down"]["kernel"]))


def twin_block(params, x, *, num_heads, window, shift, pretrained, mask_padding):
    """One block on one map [*size, features], in the words of the paper."""

    def norm(p, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    size, features = x.shape[:-1], x.shape[-1]
    head_dim = features // num_heads
    group = groups(size, window, shift)
    padded = np.zeros((*group.shape[:-1], features))
    padded[tuple(map(slice, size))] = x
    attention = params["attention"]
    units = pretrained or [min(step, length) for step, length in zip(window, size, strict=True)]
    units = [max(unit - 1, 1) for unit in units]
    query, key, value = (dense(attention[name], padded) for name in ("query", "key", "value"))
    out = np.zeros_like(x)
    for place in np.ndindex(*size):
        others = [
            other
            for other in np.ndindex(*group.shape[:-1])
            if (group[other] == group[place]).all()
            and (not mask_padding or all(o < length for o, length in zip(other, size, strict=True)))
        ]
        biases = [bias_of(attention["position_bias"], np.subtract(place, other).tolist(), units) for other in others]
        for head in range(num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            scale = math.exp(min(attention["logit_scale"][head], math.log(100)))
            logits = []
            for other, bias in zip(others, biases, strict=True):
                q, k = query[place][part], key[other][part]
                length = np.linalg.norm(q) * np.linalg.norm(k)
                logits.append(scale * (q @ k / length if length else 0.0) + bias[head])
            weights = np.exp(logits - np.max(logits))
            out[place][part] = weights / weights.sum() @ [value[other][part] for other in others]
    z = x + norm(params["norm1"], dense(attention["out"], out))
    hidden = dense(params["feed_forward"]["up"], z)
    gelu = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return z + norm(params["norm2"], dense(params["feed_forward"]["down"], gelu))


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "shift", "pretrained"),
    [
        ((8, 7), (3, 4), (1, 2), None),
        ((2, 9), (4, 4), (2, 2), (3, 2)),
        ((5,), (3,), (1,), None),
        ((2, 4, 5), (2, 2, 3), (1, 1, 1), (2, 3, 2)),
    ],
)
def test_block_equals_a_loop_over_tokens(size, window, shift, pretrained, mask_padding):
    block = SwinV2Block(2, window, shift, pretrained, mlp_ratio=2.0, mask_padding=mask_padding)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)))
        params = random_params(block, x, dtype=np.float64)
        found = jax.jit(block.apply)({"params": params}, x)
        assert found.dtype == jnp.float64
    arguments = {
        "num_heads": 2,
        "window": window,
        "shift": shift,
        "pretrained": pretrained,
        "mask_padding": mask_padding,
    }
    numpy_params = jax.tree.map(np.asarray, params)
    expected = twin_block(numpy_params, np.asarray(x)[0], **arguments)
    np.testing.assert_allclose(found[0], expected, atol=1e-11)
    if any(length % step and length > step for length, step in zip(size, window, strict=True)):
        # The two ways to treat padding differ, so the comparison tells them apart.
        other = twin_block(numpy_params, np.asarray(x)[0], **{**arguments, "mask_padding": not mask_padding})
        assert np.abs(other - expected).max() > 1e-3


# Locality --------------------------------------------------------------------------------------------------------


def roll_then_pad(params, x, *, num_heads, window, shift):
    """The wrong order, as a control: the map is rolled first and padded after, with the usual mask."""
    size = x.shape[1:-1]
    y = jnp.roll(x, [-by for by in shift], (1, 2))
    ends = [(0, -length % step) for length, step in zip(size, window, strict=True)]
    y = jnp.pad(y, [(0, 0), *ends, (0, 0)])
    windows = CosineWindowAttention(num_heads, window_size=window).apply(
        {"params": params["attention"]}, partition_windows(y, window), jnp.asarray(shift_mask(size, window, shift))
    )
    y = merge_windows(windows, window, y.shape[1:-1])[:, : size[0], : size[1]]
    return x + jnp.roll(y, shift, (1, 2))


def who_hears_whom(apply, size, features):
    """Return booleans [tokens, tokens]: does perturbing the first, in a random direction, change the second?"""
    rng = np.random.default_rng(0)
    tokens = math.prod(size)
    base = rng.normal(size=(tokens, features))
    batch = np.tile(base, (tokens + 1, 1, 1))
    batch[np.arange(tokens), np.arange(tokens)] += rng.normal(size=(tokens, features))
    out = np.asarray(apply(jnp.asarray(batch.reshape(-1, *size, features)))).reshape(tokens + 1, tokens, -1)
    return np.any(out[:-1] != out[-1], axis=-1)


@pytest.mark.parametrize("size", [(8, 8), (10, 7), (9, 11), (5, 6)])
def test_shifted_window_never_mixes_wrapped_regions_and_reaches_all_its_own(size):
    window, shift = (4, 4), (2, 2)
    block = SwinV2Block(num_heads=1, window_size=4, shift_size=2, mlp_ratio=1.0)
    with jax.enable_x64(True):
        params = random_params(block, jnp.ones((1, *size, 4)), dtype=np.float64)
        # Sharp attention would round far neighbours away.
        params["attention"]["position_bias"]["down"] = {"kernel": jnp.zeros((512, 1))}
        hears = who_hears_whom(jax.jit(lambda x: block.apply({"params": params}, x)), size, 4)
        leaky = functools.partial(roll_then_pad, params, num_heads=1, window=window, shift=shift)
        leaks = who_hears_whom(jax.jit(leaky), size, 4)
    group = groups(size, window, shift)[: size[0], : size[1]].reshape(-1, 2)
    same = (group[:, None] == group[None]).all(-1)
    assert not np.any(hears & ~same), "a token outside the window is heard"
    assert np.all(hears[same]), "a token inside the window is not heard"
    # Negative control: the probe sees the leak of the wrong order, wherever padding is at work.
    assert np.any(leaks & ~same) == any(length % 4 for length in size)


def test_unshifted_block_commutes_with_translations_by_whole_windows():
    block = SwinV2Block(num_heads=2, window_size=(2, 3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 4)), jnp.float32)
    apply = jax.jit(functools.partial(block.apply, {"params": random_params(block, x)}))
    out = np.asarray(apply(x))
    np.testing.assert_allclose(apply(jnp.roll(x, (2, 3), (1, 2))), np.roll(out, (2, 3), (1, 2)), atol=1e-4)
    # Negative control: translations by less tear windows apart.
    assert np.abs(np.asarray(apply(jnp.roll(x, (1, 0), (1, 2)))) - np.roll(out, (1, 0), (1, 2))).max() > 0.1


# Cosine attention ------------------------------------------------------------------------------------------------


def test_window_as_large_as_the_map_equals_dense_cosine_attention(rng):
    layer = CosineWindowAttention(num_heads=2, window_size=(3, 4))
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 1, 12, 8)))
        params = random_params(layer, x, dtype=np.float64)
        found = layer.apply({"params": params}, x)
    p = jax.tree.map(np.asarray, params)
    query, key, value = (dense(p[name], np.asarray(x[:, 0])).reshape(2, 12, 2, 4) for name in ("query", "key", "value"))
    cosine = np.einsum("bqhd,bkhd->bhqk", query, key)
    cosine /= np.linalg.norm(query, axis=-1).transpose(0, 2, 1)[..., None]
    cosine /= np.linalg.norm(key, axis=-1).transpose(0, 2, 1)[..., None, :]
    places = list(itertools.product(range(3), range(4)))
    bias = [[bias_of(p["position_bias"], (a[0] - b[0], a[1] - b[1]), (2, 3)) for b in places] for a in places]
    logits = np.exp(p["logit_scale"])[:, None, None] * cosine + np.moveaxis(bias, -1, 0)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = dense(p["out"], np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 12, 8))
    np.testing.assert_allclose(found[:, 0], out, atol=1e-12)


def attention_of(layer, params, x):
    _, state = layer.apply({"params": params}, x, mutable="intermediates")
    return state["intermediates"]["attention_weights"][0]


def test_weights_do_not_depend_on_the_size_of_queries_and_keys(rng):
    x = jnp.asarray(rng.normal(size=(1, 1, 6, 8)), jnp.float32)
    errors = []
    for layer in (CosineWindowAttention(2, window_size=(2, 3)), WindowAttention(2, window_size=(2, 3))):
        params = random_params(layer, x)
        grown = {
            **params,
            "query": jax.tree.map(lambda leaf: 7.0 * leaf, params["query"]),
            "key": jax.tree.map(lambda leaf: 0.01 * leaf, params["key"]),
        }
        weights = jax.jit(functools.partial(attention_of, layer))
        errors.append(np.abs(weights(grown, x) - weights(params, x)).max())
    assert errors[0] < 1e-5
    # Negative control: the first version's scaled products do.
    assert errors[1] > 0.1


def test_scale_is_clamped_at_a_hundred(rng):
    layer = CosineWindowAttention(2, window_size=(2, 3))
    x = jnp.asarray(rng.normal(size=(1, 1, 6, 8)), jnp.float32)
    params = random_params(layer, x)

    def at(tau):
        return layer.apply({"params": {**params, "logit_scale": jnp.full((2,), tau)}}, x)

    limit = math.log(100)
    np.testing.assert_array_equal(at(limit + 5), at(limit))
    slope = jax.grad(lambda tau: jnp.sum(jnp.sin(at(tau))))
    assert float(slope(limit + 0.1)) == 0.0
    # Negative controls: below the limit the scale acts and learns.
    assert np.abs(at(limit) - at(limit - 1)).max() > 1e-3
    assert abs(float(slope(limit - 1.0))) > 1e-3


def test_scale_starts_at_ten():
    layer = CosineWindowAttention(3, window_size=(2, 2))
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 1, 4, 6)))
    np.testing.assert_allclose(np.exp(variables["params"]["logit_scale"]), [10.0] * 3, rtol=1e-6)
    assert "bias" not in variables["params"]["key"]
    assert "bias" in variables["params"]["query"]


def test_masked_keys_get_no_weight_even_at_the_largest_scale():
    layer = CosineWindowAttention(1, window_size=(4,), use_bias=False)
    x = jnp.asarray([[[[1.0, 2.0], [-1.0, -2.0], [-1.0, -2.0], [1.0, 2.0]]]])
    mask = jnp.asarray([[[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]], bool)
    params = random_params(layer, x)
    params |= {"query": {"kernel": jnp.eye(2)}, "key": {"kernel": jnp.eye(2)}, "logit_scale": jnp.full((1,), 9.0)}
    params["position_bias"]["down"] = {"kernel": jnp.zeros((512, 1))}
    _, state = layer.apply({"params": params}, x, mask, mutable="intermediates")
    weights = state["intermediates"]["attention_weights"][0][0, 0, 0, 0]
    np.testing.assert_allclose(weights, [0.0, 0.5, 0.5, 0.0], atol=1e-6)
    # Negative control: the first query's cosines are 1, -1, -1, 1, and masked logits lowered by 100 would still win.
    lowered = jax.nn.softmax(100 * jnp.array([1.0, -1.0, -1.0, 1.0]) - 100 * jnp.array([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(lowered, [0.5, 0.0, 0.0, 0.5], atol=1e-6)


def test_gradients_stay_finite_where_padding_has_keys_of_length_zero():
    block = SwinV2Block(num_heads=2, window_size=4, shift_size=2)
    x = jnp.zeros((1, 5, 7, 4)).at[:, :2].set(jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 7, 4))))
    params = random_params(block, x)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, x):
        return jnp.sum(jnp.sin(block.apply({"params": params}, x)))

    gradients = gradient(params, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_logits_softmax_and_norm_statistics_stay_in_float32_under_bfloat16():
    block = SwinV2Block(num_heads=1, window_size=2, dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 4), jnp.bfloat16)
    params = random_params(block, x)
    program = str(jax.make_jaxpr(block.apply)({"params": params}, x))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|sqrt|logistic|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    # Cosines and the two layers of the position bias.
    assert len(re.findall(r":f32\[[\d,]*\] = dot_general", program)) == 3


# Position bias ---------------------------------------------------------------------------------------------------


def table_of(window, pretrained, *, num_heads=2):
    """The bias of one fixed network for every offset of a window, [*offsets, heads]."""
    layer = ContinuousPositionBias(num_heads, hidden_features=16)
    params = random_params(layer, jnp.ones((1, len(window))))
    offsets = jnp.asarray(swin_v2.relative_offsets(window, pretrained), jnp.float32)
    return np.asarray(layer.apply({"params": params}, offsets)).reshape(*(2 * step - 1 for step in window), num_heads)


def test_bias_lies_between_0_and_16_also_far_outside_the_window():
    table = table_of((64, 48), (8, 8))
    assert table.min() > 0.0
    assert table.max() < 16.0
    assert np.ptp(table) > 1.0


def test_a_larger_window_keeps_the_bias_of_every_offset_it_was_trained_on():
    trained, larger = table_of((4, 3), None), table_of((9, 7), (4, 3))
    np.testing.assert_allclose(larger[5:12, 4:9], trained, atol=1e-5)
    # Negative control: measured against the window in use, the same offset in tokens gets another bias ...
    stretched = table_of((9, 7), None)
    assert np.abs(stretched[5:12, 4:9] - trained).max() > 0.1
    # ... and the same fraction of the window the same one.
    np.testing.assert_allclose(table_of((7, 5), None)[::2, ::2], trained, atol=1e-5)


def test_log_spacing_extrapolates_over_a_third_instead_of_more_than_the_whole_range():
    def spaced(offset):
        return np.log2(1 + 8 * np.abs(offset)) / 3

    # From windows of 8 to 16 tokens, the paper's example.
    furthest = np.abs(swin_v2.relative_offsets((16, 16), (8, 8))).max()
    np.testing.assert_allclose(furthest - 1, 1.14, atol=0.01)
    np.testing.assert_allclose(spaced(furthest) / spaced(1.0) - 1, 0.33, atol=0.02)


def test_a_window_change_needs_no_parameter_change(tiny):
    params, x, logits = tiny
    shapes = jax.tree.map(jnp.shape, params)
    for window in (2, (6, 5), ((8, 8), (2, 3))):
        model = TINY.clone(window_size=window, pretrained_window_size=(4, 3))
        found = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        assert jax.tree.map(jnp.shape, found) == shapes
    wider = TINY.clone(window_size=(6, 5))
    kept, measured = (
        np.asarray(jax.jit(model.apply)({"params": params}, x))
        for model in (wider.clone(pretrained_window_size=(4, 3)), wider)
    )
    assert np.all(np.isfinite(kept))
    assert np.abs(kept - logits).max() > 1e-3, "the window must matter"
    assert np.abs(kept - measured).max() > 1e-3, "the window of pre-training must matter"


def test_naming_the_window_in_use_changes_nothing(tiny):
    params, x, logits = tiny
    found = jax.jit(TINY.clone(pretrained_window_size=(4, 3)).apply)({"params": params}, x)
    np.testing.assert_allclose(found, logits, atol=1e-6)


def test_one_parameter_tree_serves_every_size(tiny):
    params, x, _ = tiny
    assert set(jax.eval_shape(TINY.init, jax.random.key(0), x)) == {"params"}
    shapes = jax.tree.map(jnp.shape, params)
    for size in [(8, 8), (1, 50), (64, 31)]:
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        found = jax.eval_shape(TINY.init, jax.random.key(0), images)["params"]
        assert jax.tree.map(jnp.shape, found) == shapes
        assert jax.eval_shape(TINY.apply, {"params": params}, images).shape == (1, 3)


# Norms after the branches ----------------------------------------------------------------------------------------


def amplitudes(make, x, depth=12):
    """Return the root mean square of the map before and after each of `depth` fresh blocks."""
    fresh = [jax.jit(make(shift_size=by).init_with_output) for by in (0, 2)]
    maps = [x]
    for index in range(depth):
        maps.append(fresh[index % 2](jax.random.key(index), maps[-1])[0])
    return np.sqrt(np.mean(np.square(maps), axis=(1, 2, 3, 4)))


@pytest.mark.slow
def test_residual_post_norm_grows_mildly_whatever_the_kernels():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 16)), jnp.float32)
    # Kernels four times as large as those that keep the variance.
    init = nn.initializers.variance_scaling(16.0, "fan_in", "normal")
    common = {"num_heads": 2, "window_size": 4, "kernel_init": init, "norm": layer_norm}
    after = amplitudes(functools.partial(SwinV2Block, **common), x)
    before = amplitudes(functools.partial(SwinBlock, **common), x)
    # Two branches a block, each of unit size: linear at the very most, and as uncorrelated steps the square root.
    bound = after[0] + 2 * np.arange(13)
    assert np.all(after <= bound + 1e-4)
    assert after[-1] < 1.5 * np.sqrt(after[0] ** 2 + 24)
    # Negative control: with the norm before the branch their size follows the kernels.
    assert before[-1] > 5 * after[-1]
    assert np.any(before > bound)


def test_a_new_block_is_the_identity():
    block = SwinV2Block(num_heads=2, window_size=4, shift_size=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 6, 8)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(block.init_with_output)(jax.random.key(0), x)[0], x)
    # Negative control, and the model's own blocks.
    plain = block.clone(norm=layer_norm)
    assert np.abs(jax.jit(plain.init_with_output)(jax.random.key(0), x)[0] - x).max() > 0.1
    model = SwinV2(patch_size=1, embed_dim=2, depths=(1, 1), num_heads=(1, 1), kernel_init=nn.initializers.zeros)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2, 2, 1)))["params"]
    assert not np.any(params["stages_0"]["blocks_0"]["norm2"]["scale"])
    assert np.all(params["final_norm"]["scale"] == 1)
    assert np.all(params["stages_1"]["merge"]["post_norm"]["scale"] == 1)


# The model -------------------------------------------------------------------------------------------------------


PUBLISHED = {
    "swin_v2_tiny_window8_256": 28_347_154,
    "swin_v2_tiny_window16_256": 28_347_154,
    "swin_v2_small_window8_256": 49_728_418,
    "swin_v2_base_window8_256": 87_918_816,
    "swin_v2_base_window12to24_192to384": 87_918_816,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_have_the_published_number_of_parameters(name):
    # Stacked parameters are as many, and trace faster.
    model = jaxlayers.create_model(name, scan=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *jaxlayers.abstract_inputs(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("swin_v2_tiny_window8_256", 5.940),
        ("swin_v2_tiny_window16_256", 6.661),
        ("swin_v2_small_window8_256", 11.5),
        ("swin_v2_base_window8_256", 20.3),
    ],
)
def test_variants_have_the_counted_multiply_accumulates(name, giga):
    found = summarize(jaxlayers.create_model(name, scan=True), *jaxlayers.abstract_inputs(name)).macs
    np.testing.assert_allclose(found / 1e9, giga, rtol=0.02)


def test_features_are_a_pyramid_of_every_stage(tiny):
    _, x, _ = tiny
    model = TINY.clone(patch_size=(2, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    levels = jax.eval_shape(nn.apply(SwinV2.features, model), shapes, x)
    assert [level.array.shape for level in levels] == [(2, 9, 8, 8), (2, 5, 4, 16)]
    assert [level.stride for level in levels] == [(2, 3), (4, 6)]
    assert [level.channels for level in levels] == [8, 16]


def test_logits_are_the_head_on_the_mean_of_the_normed_last_level(tiny):
    params, x, logits = tiny
    variables = {"params": {name: value for name, value in params.items() if name != "head"}}
    headless = TINY.clone(num_classes=0)
    # One program for both: the shared part is compiled once.
    pooled, levels = jax.jit(lambda v, x: (headless.apply(v, x), nn.apply(SwinV2.features, headless)(v, x)))(
        variables, x
    )
    np.testing.assert_allclose(pooled @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-5)
    normed = nn.LayerNorm(epsilon=1e-5).apply({"params": params["final_norm"]}, levels[-1].array)
    np.testing.assert_allclose(np.mean(normed, axis=(1, 2)), pooled, atol=1e-5)


def test_replaced_tokens_are_what_the_first_stage_sees(tiny):
    params, x, _ = tiny
    features = functools.partial(nn.apply(SwinV2.features, TINY), {"params": params})
    hide = functools.partial(features, replace_tokens=jnp.zeros_like)
    plain, hidden, doubled = (
        np.asarray(levels[0].array) for levels in jax.jit(lambda x: (features(x), hide(x), hide(2 * x)))(x)
    )
    np.testing.assert_allclose(hidden, doubled, atol=1e-6)
    assert np.abs(hidden - plain).max() > 0.1


SMALL = SwinV2(num_classes=2, patch_size=1, embed_dim=4, depths=(3,), num_heads=(2,), window_size=(2, 3), mlp_ratio=1.0)


def loss_and_gradient(model, params, x):
    def loss(params):
        logits = model.apply({"params": params}, x)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def small():
    """A smaller model still, with logits and gradient."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 4, 1)), jnp.float32)
    params = random_params(SMALL, x)
    return params, x, loss_and_gradient(SMALL, params, x)


def assert_trees_close(found, expected, tolerance):
    found, expected = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (found, expected))
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        scale = max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(found[path], leaf, atol=tolerance * scale, err_msg=path)


@pytest.mark.slow
def test_remat_and_scan_change_neither_logits_nor_gradients(small):
    params, x, ((_, logits), gradient) = small
    both = SMALL.clone(remat="full", scan=True)
    stacked = swin_v2.stack(params)
    shapes = jax.eval_shape(both.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    (_, found), found_gradient = loss_and_gradient(both, stacked, x)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert_trees_close(swin_v2.unstack(found_gradient), gradient, 5e-5)


def test_remat_and_scan_really_are_in_the_program(small):
    params, x, _ = small
    programs = {
        name: str(jax.make_jaxpr(jax.grad(lambda p, model=model: model.apply({"params": p}, x).sum()))(tree))
        for name, model, tree in [
            ("plain", SMALL, params),
            ("full", SMALL.clone(remat="full"), params),
            ("attention", SMALL.clone(remat="attention"), params),
            ("scan", SMALL.clone(scan=True), swin_v2.stack(params)),
        ]
    }
    recomputing = [name for name, text in programs.items() if "remat" in text or "checkpoint" in text]
    assert recomputing == ["full", "attention"]
    assert [name for name, text in programs.items() if re.search(r"\bscan\[", text)] == ["scan"]


def test_drop_path_and_dropout_act_in_training(small):
    params, x, ((_, logits), _) = small
    model = SMALL.clone(drop_path_rate=0.5, dropout_rate=0.1)
    train = jax.jit(lambda key: model.apply({"params": params}, x, deterministic=False, rngs={"dropout": key}))
    one, two = train(jax.random.key(0)), train(jax.random.key(1))
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one - logits).max() > 1e-3


def test_sharded_over_data_fsdp_and_tensor_equals_unsharded(small):
    params, x, ((_, logits), gradient) = small
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def place(path, leaf):
        name = "/".join(path)
        if re.search(r"(query|key|value|up)/kernel", name) and "position_bias" not in name:
            return P("fsdp", "tensor")
        return P("tensor", "fsdp") if re.search(r"(out|down)/kernel", name) else P()

    flat = flax.traverse_util.flatten_dict(params)
    flat = {path: jax.device_put(leaf, NamedSharding(mesh, place(path, leaf))) for path, leaf in flat.items()}
    sharded = flax.traverse_util.unflatten_dict(flat)
    rules = ((axes.BATCH, ("data", "fsdp")), (axes.HEADS, "tensor"), (axes.HIDDEN, "tensor"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        images = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
        (_, found), found_gradient = loss_and_gradient(SMALL, sharded, images)
    assert found.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert_trees_close(found_gradient, gradient, 1e-4)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_no_decay_leaves_the_kernels_alone_but_not_those_of_the_position_bias(tiny):
    flat = flax.traverse_util.flatten_dict(swin_v2.no_decay(tiny[0]), sep="/")
    decayed = {path for path, without in flat.items() if not without}
    assert {path.split("/")[-1] for path in decayed} == {"kernel"}
    assert not any("position_bias" in path or "logit_scale" in path for path in decayed)
    assert {path for path in flat if path.endswith("kernel")} - decayed == {
        path for path in flat if path.endswith("kernel") and "position_bias" in path
    }


def test_layer_ids_count_blocks_from_the_patches_to_the_head(tiny):
    params, _, _ = tiny
    ids = swin_v2.layer_ids(params, TINY)

    def all_of(tree):
        return {np.unique(leaf).item() for leaf in jax.tree.leaves(tree)}

    assert all_of(ids["patch_embed"]) == {0}
    assert [all_of(ids["stages_0"][f"blocks_{index}"]) for index in range(2)] == [{1}, {2}]
    assert all_of(ids["stages_1"]["merge"]) == {2}
    assert all_of(ids["stages_1"]["blocks_0"]) == {3}
    assert all_of(ids["final_norm"]) == all_of(ids["head"]) == {4}
    stacked = swin_v2.stack(params)
    wide = jax.tree.map(
        lambda leaf, index: np.broadcast_to(index, leaf.shape),
        stacked,
        swin_v2.layer_ids(stacked, TINY.clone(scan=True)),
    )
    plain = jax.tree.map(lambda leaf, index: np.full(leaf.shape, index), params, ids)
    jax.tree.map(np.testing.assert_array_equal, swin_v2.unstack(wide), plain)


def test_reset_classifier_replaces_the_head_alone(tiny):
    params, x, _ = tiny
    reset = swin_v2.reset_classifier(params, jax.random.key(0), 7)
    assert all(reset[name] is params[name] for name in params if name != "head")
    shapes = jax.eval_shape(TINY.clone(num_classes=7).init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, reset) == jax.tree.map(jnp.shape, shapes)


def to_reference(params, source, patch=(2, 2)):
    """Write our parameters the way a reference stores them."""
    parts = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        if path == "patch_embed/projection/kernel":
            leaf = leaf.reshape(*patch, -1, leaf.shape[-1]).transpose(3, 2, 0, 1)
        elif path.endswith("kernel"):
            leaf = leaf.T
        elif path.endswith("logit_scale"):
            leaf = leaf[:, None, None]
        parts[swin_v2.reference.reference_name(path, swin_v2.REFERENCE_NAMES[source])] = leaf
    tensors = {name: leaf for name, leaf in parts.items() if ".qkv." not in name}
    for name in [name for name in parts if ".qkv.query." in name]:
        # A bias of the keys is stored, and zeroed where it is used.
        key = parts.get(name.replace("query", "key"), np.full_like(parts[name], 9.0))
        fused = [parts[name], key, parts[name.replace("query", "value")]]
        tensors[name.replace("query.", "")] = np.concatenate(fused)
    return tensors


@pytest.mark.parametrize("source", swin_v2.REFERENCE_NAMES)
def test_reference_names_cover_every_parameter(tiny, source):
    params, _, _ = tiny
    tensors = to_reference(params, source)
    tensors |= {f"stage.0.{name}": np.zeros(3) for name in ("relative_position_index", "relative_coords_table")}
    jax.tree.map(np.testing.assert_array_equal, swin_v2.from_reference(tensors, TINY, source=source), params)


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0], "timm")
    with pytest.raises(ValueError, match="source='tim' must be one of"):
        swin_v2.from_reference(tensors, TINY, source="tim")
    with pytest.raises(ValueError, match=r"source='torchvision' must hold 'features.0.0.weight'"):
        swin_v2.from_reference(tensors, TINY, source="torchvision")
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['norm.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "norm.bias"}
        swin_v2.from_reference({**incomplete, "extra": np.zeros(1)}, TINY, source="timm")
    with pytest.raises(
        ValueError, match=r"logit_scale must give .* its shape \(1,\), not \(2,\)|down/kernel its shape"
    ):
        swin_v2.from_reference(tensors, TINY.clone(num_heads=(1, 4)), source="timm")
    with pytest.raises(ValueError, match="scan=True must be False"):
        swin_v2.from_reference(tensors, TINY.clone(scan=True), source="timm")
