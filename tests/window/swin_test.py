import dataclasses
import functools
import itertools
import math
import re

import chex
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayers.core import axes
from jaxlayers.kernels import dispatch
from jaxlayers.ops.windows import merge_windows, partition_windows, shift_mask
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import PatchMerging, PatchMergingV2, Swin, SwinBlock, WindowAttention, swin

KEY_BIAS = {"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}

CASES = (
    Case(
        name="window_attention",
        within="swin",
        module=WindowAttention(num_heads=2, window_size=(2, 3)),
        inputs=lambda rng: (rng.normal(size=(2, 2, 6, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=9 must be divisible by num_heads=2", inputs=lambda rng: (np.ones((2, 2, 6, 9)),)),
            BadInput(match=r"must be \[\*batch, windows, 6, features\]", inputs=lambda rng: (np.ones((2, 2, 4, 8)),)),
        ),
    ),
    Case(
        name="swin_block",
        within="swin",
        module=SwinBlock(num_heads=2, window_size=(3, 2), shift_size=1, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"shift_size=\(3, 3\) must lie in", module=SwinBlock(2, window_size=3, shift_size=3)),
            BadInput(match=r"window_size=\(0, 2\) must be positive", module=SwinBlock(2, window_size=(0, 2))),
            BadInput(match="must name 1 to 3 axes, equally many", module=SwinBlock(2, window_size=(2,) * 4)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 8)),)),
            BadInput(match="features=8 must be divisible by num_heads=3", module=SwinBlock(3, window_size=2)),
        ),
    ),
    Case(
        name="patch_merging",
        within="swin",
        module=PatchMerging(),
        inputs=lambda rng: (rng.normal(size=(2, 3, 4, 6)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=0 must be positive", module=PatchMerging(features=0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((3, 6)),)),
        ),
    ),
    Case(
        name="swin",
        module=Swin(num_classes=3, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=3),
        inputs=lambda rng: (rng.normal(size=(2, 10, 9, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(
                match=r"depths=\(2,\) and num_heads=\(1, 2\) must have", module=Swin(depths=(2,), num_heads=(1, 2))
            ),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=Swin(drop_path_rate=1.0)),
            BadInput(match=r"patch_size=\(2, 2, 2\) must be an int or", module=Swin(patch_size=(2, 2, 2))),
            BadInput(match="num_classes=-1 must not be negative", module=Swin(num_classes=-1)),
            BadInput(match=r"window_size=\(7, 7, 7\) must be an int", module=Swin(window_size=(7, 7, 7))),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
    Case(
        name="swin_scan",
        module=Swin(num_classes=2, patch_size=1, embed_dim=4, depths=(2,), num_heads=(2,), window_size=2, scan=True),
        inputs=lambda rng: (rng.normal(size=(2, 4, 4, 1)),),
        zero_gradients=KEY_BIAS,
        bad_inputs=(BadInput(match="2 spatial axes needs", inputs=lambda rng: (np.ones((4, 4)),)),),
    ),
)

TINY = Swin(
    num_classes=3, patch_size=2, embed_dim=8, depths=(3, 2), num_heads=(2, 4), window_size=(4, 3), drop_path_rate=0.0
)


def random_params(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape) + ("scale" in str(path[-1])), dtype)

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


def twin_block(params, x, *, num_heads, window, shift, mask_padding):
    """One Swin block on one map [*size, features], in the words of the paper."""

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    size, features = x.shape[:-1], x.shape[-1]
    head_dim = features // num_heads
    group = groups(size, window, shift)
    padded = np.zeros((*group.shape[:-1], features))
    padded[tuple(map(slice, size))] = norm(params["norm1"], x)
    attention = params["attention"]
    table = attention["relative_position_bias_table"].reshape(*(2 * step - 1 for step in window), num_heads)
    query, key, value = (dense(attention[name], padded) for name in ("query", "key", "value"))
    out = np.zeros_like(x)
    for place in np.ndindex(*size):
        others = [
            other
            for other in np.ndindex(*group.shape[:-1])
            if (group[other] == group[place]).all()
            and (not mask_padding or all(o < length for o, length in zip(other, size, strict=True)))
        ]
        for head in range(num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            logits = [
                query[place][part] @ key[other][part] / math.sqrt(head_dim)
                + table[(*(a - b + step - 1 for a, b, step in zip(place, other, window, strict=True)), head)]
                for other in others
            ]
            weights = np.exp(logits - np.max(logits))
            out[place][part] = weights / weights.sum() @ [value[other][part] for other in others]
    z = x + dense(attention["out"], out)
    hidden = dense(params["feed_forward"]["up"], norm(params["norm2"], z))
    gelu = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return z + dense(params["feed_forward"]["down"], gelu)


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((8, 7), (3, 4), (1, 2)), ((2, 9), (4, 4), (2, 2)), ((5,), (3,), (1,)), ((2, 4, 5), (2, 2, 3), (1, 1, 1))],
)
def test_block_equals_a_loop_over_tokens(size, window, shift, mask_padding):
    block = SwinBlock(num_heads=2, window_size=window, shift_size=shift, mlp_ratio=2.0, mask_padding=mask_padding)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)))
        params = random_params(block, x, dtype=np.float64)
        found = jax.jit(block.apply)({"params": params}, x)
        assert found.dtype == jnp.float64
    arguments = {"num_heads": 2, "window": window, "shift": shift, "mask_padding": mask_padding}
    expected = twin_block(jax.tree.map(np.asarray, params), np.asarray(x)[0], **arguments)
    np.testing.assert_allclose(found[0], expected, atol=1e-11)
    if any(length % step and length > step for length, step in zip(size, window, strict=True)):
        # The two ways to treat padding differ, so the comparison tells them apart.
        other = twin_block(
            jax.tree.map(np.asarray, params), np.asarray(x)[0], **{**arguments, "mask_padding": not mask_padding}
        )
        assert np.abs(other - expected).max() > 1e-3


# Locality --------------------------------------------------------------------------------------------------------


def roll_then_pad(params, x, *, num_heads, window, shift):
    """The wrong order, as a control: the map is rolled first and padded after, with the usual mask."""
    size = x.shape[1:-1]
    y = nn.LayerNorm(epsilon=1e-5).apply({"params": params["norm1"]}, x)
    space = tuple(range(1, x.ndim - 1))
    y = jnp.roll(y, [-by for by in shift], space)
    ends = [(0, -length % step) for length, step in zip(size, window, strict=True)]
    y = jnp.pad(y, [(0, 0), *ends, (0, 0)])
    attention = WindowAttention(num_heads, window_size=window)
    windows = attention.apply(
        {"params": params["attention"]}, partition_windows(y, window), jnp.asarray(shift_mask(size, window, shift))
    )
    y = merge_windows(windows, window, y.shape[1:-1])[:, *(slice(length) for length in size)]
    return x + jnp.roll(y, shift, space)


def who_hears_whom(apply, size, features):
    """Return booleans [tokens, tokens]: does perturbing the first, in a random direction, change the second?"""
    rng = np.random.default_rng(0)
    tokens = math.prod(size)
    base = rng.normal(size=(tokens, features))
    # A constant step in all features would vanish in the norm.
    batch = np.tile(base, (tokens + 1, 1, 1))
    batch[np.arange(tokens), np.arange(tokens)] += rng.normal(size=(tokens, features))
    out = np.asarray(apply(jnp.asarray(batch.reshape(-1, *size, features)))).reshape(tokens + 1, tokens, -1)
    return np.any(out[:-1] != out[-1], axis=-1)


@pytest.mark.parametrize("size", [(8, 8), (10, 7), (9, 11), (5, 6), (3, 4, 7), (5, 7, 4)], ids=str)
def test_shifted_window_never_mixes_wrapped_regions_and_reaches_all_its_own(size):
    window, shift = ((4, 4), (2, 2)) if len(size) == 2 else ((2, 3, 3), (1, 2, 1))
    block = SwinBlock(num_heads=1, window_size=window, shift_size=shift, mlp_ratio=1.0)
    with jax.enable_x64(True):
        params = random_params(block, jnp.ones((1, *size, 4)), dtype=np.float64)
        hears = who_hears_whom(jax.jit(lambda x: block.apply({"params": params}, x)), size, 4)
        leaky = functools.partial(roll_then_pad, params, num_heads=1, window=window, shift=shift)
        leaks = who_hears_whom(jax.jit(leaky), size, 4)
    group = groups(size, window, shift)[tuple(slice(length) for length in size)].reshape(-1, len(size))
    same = (group[:, None] == group[None]).all(-1)
    assert not np.any(hears & ~same), "a token outside the window is heard"
    assert np.all(hears[same]), "a token inside the window is not heard"
    # Negative control: the probe sees the leak of the wrong order, wherever padding is at work.
    assert np.any(leaks & ~same) == any(length % step for length, step in zip(size, window, strict=True))


def test_unshifted_block_commutes_with_translations_by_whole_windows():
    block = SwinBlock(num_heads=2, window_size=(2, 3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 4)), jnp.float32)
    apply = jax.jit(functools.partial(block.apply, {"params": random_params(block, x)}))
    out = np.asarray(apply(x))
    np.testing.assert_allclose(apply(jnp.roll(x, (2, 3), (1, 2))), np.roll(out, (2, 3), (1, 2)), atol=1e-4)
    # Negative control: translations by less tear windows apart.
    assert np.abs(np.asarray(apply(jnp.roll(x, (1, 0), (1, 2)))) - np.roll(out, (1, 0), (1, 2))).max() > 0.1


# Limits ----------------------------------------------------------------------------------------------------------


def test_window_as_large_as_the_map_equals_dense_attention(rng):
    layer = WindowAttention(num_heads=2, window_size=(3, 4))
    x = jnp.asarray(rng.normal(size=(2, 1, 12, 8)), jnp.float32)
    params = random_params(layer, x)
    found = layer.apply({"params": params}, x)
    rows = {offset: row for row, offset in enumerate(itertools.product(range(-2, 3), range(-3, 4)))}
    places = list(itertools.product(range(3), range(4)))
    index = [[rows[p[0] - q[0], p[1] - q[1]] for q in places] for p in places]
    bias = jnp.moveaxis(params["relative_position_bias_table"][np.array(index)], -1, 0)

    def heads(name):
        return nn.Dense(8).apply({"params": params[name]}, x[:, 0]).reshape(2, 12, 2, 4)

    dense = nn.dot_product_attention(heads("query"), heads("key"), heads("value"), bias=bias).reshape(2, 12, 8)
    np.testing.assert_allclose(found[:, 0], nn.Dense(8).apply({"params": params["out"]}, dense), atol=1e-5)


def test_a_window_larger_than_the_map_sees_all_of_it_and_no_padding():
    size = (3, 2)
    large = SwinBlock(num_heads=2, window_size=4, shift_size=2, mlp_ratio=1.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)), jnp.float32)
    params = random_params(large, x)
    exact = SwinBlock(num_heads=2, window_size=size, mlp_ratio=1.0)
    table = params["attention"]["relative_position_bias_table"].reshape(7, 7, 2)[1:6, 2:5].reshape(15, 2)
    small = {**params, "attention": {**params["attention"], "relative_position_bias_table": table}}
    found = jax.jit(large.apply)({"params": params}, x)
    np.testing.assert_allclose(found, jax.jit(exact.apply)({"params": small}, x), atol=1e-6)


def test_one_parameter_tree_serves_every_size(tiny):
    params, x, _ = tiny
    assert set(jax.eval_shape(TINY.init, jax.random.key(0), x)) == {"params"}
    shapes = jax.tree.map(jnp.shape, params)
    for size in [(8, 8), (1, 50), (64, 31)]:
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        found = jax.eval_shape(TINY.init, jax.random.key(0), images)["params"]
        assert jax.tree.map(jnp.shape, found) == shapes
        assert jax.eval_shape(TINY.apply, {"params": params}, images).shape == (1, 3)


def test_a_window_of_each_stage_may_differ():
    model = Swin(
        num_classes=0, patch_size=1, embed_dim=4, depths=(1, 1), num_heads=(1, 1), window_size=((4, 2), (1, 3))
    )
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))["params"]
    tables = [params[f"stages_{s}"]["blocks_0"]["attention"]["relative_position_bias_table"].shape[0] for s in (0, 1)]
    assert tables == [7 * 3, 1 * 5]


# The model -------------------------------------------------------------------------------------------------------


PUBLISHED = {
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
    "swin_large": 196_532_476,
    "swin_base_384": 87_903_584,
    "swin_large_384": 196_735_516,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_have_the_published_number_of_parameters(name):
    fields = {key: value for key, value in swin.VARIANTS[name].items() if key not in ("module", "inputs")}
    # Stacked parameters are as many, and trace faster.
    model = swin.VARIANTS[name]["module"](**fields, scan=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *swin.VARIANTS[name]["inputs"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


def test_features_are_a_pyramid_of_every_stage(tiny):
    _, x, _ = tiny
    model = TINY.clone(patch_size=(2, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    levels = jax.eval_shape(nn.apply(Swin.features, model), shapes, x)
    assert [level.array.shape for level in levels] == [(2, 9, 8, 8), (2, 5, 4, 16)]
    assert [level.stride for level in levels] == [(2, 3), (4, 6)]
    assert [level.channels for level in levels] == [8, 16]


def test_logits_are_the_head_on_the_mean_of_the_normed_last_level(tiny):
    params, x, logits = tiny
    variables = {"params": {name: value for name, value in params.items() if name != "head"}}
    headless = TINY.clone(num_classes=0)
    # One program for both: the shared part is compiled once.
    pooled, levels = jax.jit(lambda v, x: (headless.apply(v, x), nn.apply(Swin.features, headless)(v, x)))(variables, x)
    np.testing.assert_allclose(pooled @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-5)
    last = levels[-1].array
    normed = nn.LayerNorm(epsilon=1e-5).apply({"params": params["final_norm"]}, last)
    np.testing.assert_allclose(np.mean(normed, axis=(1, 2)), pooled, atol=1e-5)


SMALL = Swin(num_classes=2, patch_size=1, embed_dim=4, depths=(3,), num_heads=(2,), window_size=(2, 3), mlp_ratio=1.0)


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


def test_remat_and_scan_change_neither_logits_nor_gradients(small):
    params, x, ((_, logits), gradient) = small
    both = SMALL.clone(remat=True, scan=True)
    stacked = swin.stack(params)
    shapes = jax.eval_shape(both.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    (_, found), found_gradient = loss_and_gradient(both, stacked, x)
    np.testing.assert_allclose(found, logits, atol=1e-6)
    assert_trees_close(swin.unstack(found_gradient), gradient, 2e-5)


def assert_trees_close(found, expected, tolerance):
    found, expected = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (found, expected))
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        scale = max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(found[path], leaf, atol=tolerance * scale, err_msg=path)


def test_remat_and_scan_really_are_in_the_program(small):
    params, x, _ = small
    programs = {
        name: str(jax.make_jaxpr(jax.grad(lambda p, model=model: model.apply({"params": p}, x).sum()))(tree))
        for name, model, tree in [
            ("plain", SMALL, params),
            ("remat", SMALL.clone(remat=True), params),
            ("scan", SMALL.clone(scan=True), swin.stack(params)),
        ]
    }
    assert [name for name, text in programs.items() if "remat" in text or "checkpoint" in text] == ["remat"]
    assert [name for name, text in programs.items() if re.search(r"\bscan\[", text)] == ["scan"]


def test_stack_and_unstack_are_inverse(tiny):
    params, _, _ = tiny
    back = swin.unstack(swin.stack(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert set(swin.stack(params)["stages_0"]) == {"pairs", "blocks_2"}


def dropped_fractions(model, params, x):
    """Run in training mode and return how many samples each block's branches lost, in order of depth."""

    @jax.jit
    def run(key):
        return model.apply(
            {"params": params},
            x,
            deterministic=False,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: type(module).__name__ == "DropPath",
        )[1]["intermediates"]

    fractions = {}
    captured = flax.traverse_util.flatten_dict(run(jax.random.key(3)))
    for path, outputs in ((path, outputs) for path, outputs in captured.items() if path[-1] == "__call__"):
        for out in outputs:
            fraction = np.mean(np.all(np.asarray(out) == 0, axis=(-3, -2, -1)), axis=-1)
            for index, one in enumerate(np.ravel(fraction)):
                depth = int(path[1][7:]) if path[1] != "pairs" else 2 * index + (path[2] == "shifted")
                fractions.setdefault(depth, []).append(one)
    return np.array([np.mean(fractions[depth]) for depth in sorted(fractions)])


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_rates_grow_with_depth(scan):
    model = Swin(
        num_classes=2,
        patch_size=1,
        embed_dim=2,
        depths=(5,),
        num_heads=(1,),
        window_size=1,
        drop_path_rate=0.8,
        scan=scan,
    )
    x = jnp.ones((400, 1, 1, 1))
    fractions = dropped_fractions(model, random_params(model, x), x)
    assert fractions[0] == 0.0
    np.testing.assert_allclose(fractions, [0.0, 0.2, 0.4, 0.6, 0.8], atol=0.08)
    # A constant rate, the usual mistake, would fail this.
    assert np.all(np.diff(fractions) > 0.08)


def test_softmax_and_norm_statistics_stay_in_float32_under_bfloat16():
    block = SwinBlock(num_heads=1, window_size=2, dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 4), jnp.bfloat16)
    params = random_params(block, x)
    program = str(jax.make_jaxpr(block.apply)({"params": params}, x))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    assert not re.search(r":f32\[[\d,]*\] = dot_general", program)


def test_sharded_over_data_fsdp_and_tensor_equals_unsharded(small):
    params, x, ((_, logits), gradient) = small
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def place(path, leaf):
        name = "/".join(path)
        if re.search(r"(query|key|value|up)/kernel", name):
            return P("fsdp", "tensor")
        return P("tensor", "fsdp") if re.search(r"(out|down)/kernel", name) else P()

    flat = flax.traverse_util.flatten_dict(params)
    flat = {path: jax.device_put(leaf, NamedSharding(mesh, place(path, leaf))) for path, leaf in flat.items()}
    sharded = flax.traverse_util.unflatten_dict(flat)
    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.BATCH, ("data", "fsdp")),)):
        images = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
        (_, found), found_gradient = loss_and_gradient(SMALL, sharded, images)
    assert found.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert_trees_close(found_gradient, gradient, 1e-4)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_no_decay_marks_biases_norms_and_tables(tiny):
    params, _, _ = tiny
    flat = flax.traverse_util.flatten_dict(swin.no_decay(params), sep="/")
    kept = {path.split("/")[-1] for path, without in flat.items() if without}
    assert kept == {"bias", "scale", "relative_position_bias_table"}
    assert {path.split("/")[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks_from_the_patches_to_the_head(tiny):
    params, _, _ = tiny
    ids = swin.layer_ids(params, TINY)

    def first(tree):
        return {np.unique(leaf).item() for leaf in jax.tree.leaves(tree)}

    assert first(ids["patch_embed"]) == {0}
    assert [first(ids["stages_0"][f"blocks_{index}"]) for index in range(3)] == [{1}, {2}, {3}]
    assert first(ids["stages_1"]["merge"]) == {3}
    assert [first(ids["stages_1"][f"blocks_{index}"]) for index in range(2)] == [{4}, {5}]
    assert first(ids["final_norm"]) == first(ids["head"]) == {6}


def test_stacked_layer_ids_broadcast_to_the_same(tiny):
    params, _, _ = tiny
    plain = jax.tree.map(lambda leaf, index: np.full(leaf.shape, index), params, swin.layer_ids(params, TINY))
    stacked = swin.stack(params)
    ids = swin.layer_ids(stacked, TINY.clone(scan=True))
    wide = jax.tree.map(lambda leaf, index: np.broadcast_to(index, leaf.shape), stacked, ids)
    jax.tree.map(np.testing.assert_array_equal, swin.unstack(wide), plain)


def test_reset_classifier_replaces_the_head_alone(tiny):
    params, x, _ = tiny
    reset = swin.reset_classifier(params, jax.random.key(0), 7)
    assert reset["head"]["kernel"].shape == (16, 7)
    assert 0.01 < float(jnp.std(reset["head"]["kernel"])) < 0.03
    assert not np.any(reset["head"]["bias"])
    assert all(reset[name] is params[name] for name in params if name != "head")
    assert set(swin.reset_classifier(params, jax.random.key(0), 0)) == set(params) - {"head"}
    headless = swin.reset_classifier(swin.stack(params), jax.random.key(1), 0)
    from_stacked = swin.reset_classifier(headless, jax.random.key(0), 7)
    np.testing.assert_array_equal(from_stacked["head"]["kernel"], reset["head"]["kernel"])
    model = TINY.clone(num_classes=7)
    jax.tree.map(lambda a, b: None, reset, jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    with pytest.raises(ValueError, match="num_classes=-1 must not be negative"):
        swin.reset_classifier(params, jax.random.key(0), -1)


def test_resize_to_the_same_model_changes_nothing(tiny):
    params, _, _ = tiny
    jax.tree.map(np.testing.assert_array_equal, swin.resize(params, TINY, TINY.clone(drop_path_rate=0.3)), params)


def test_resize_fits_window_and_patch_and_leaves_the_rest(tiny):
    params, x, _ = tiny
    target = TINY.clone(window_size=((6, 5), (2, 3)), patch_size=(4, 3))
    resized = swin.resize(params, TINY, target)
    shapes = jax.eval_shape(target.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)
    before, after = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params, resized))
    changed = {path.split("/")[-1] for path in before if after[path] is not before[path]}
    assert changed == {"kernel", "relative_position_bias_table"}
    assert after["stages_0/blocks_0/attention/query/kernel"] is before["stages_0/blocks_0/attention/query/kernel"]
    stacked = swin.resize(swin.stack(params), TINY.clone(scan=True), target.clone(scan=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), swin.unstack(stacked), resized)


def test_resize_keeps_a_smooth_bias_smooth(tiny):
    # A bias that falls with distance keeps its values at the same relative distance.
    params, _, _ = tiny
    rows = np.linspace(-1, 1, 7)[:, None] ** 2 + np.linspace(-1, 1, 5)[None] ** 2
    table = jnp.asarray(np.repeat(rows.reshape(-1, 1), 2, axis=1), jnp.float32)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: table if leaf.shape == table.shape and "table" in str(path[-1]) else leaf, params
    )
    target = TINY.clone(window_size=(8, 6))
    resized = swin.resize({**params}, TINY.clone(window_size=((4, 3), (4, 3))), target)
    found = np.asarray(resized["stages_0"]["blocks_0"]["attention"]["relative_position_bias_table"])[:, 0].reshape(
        15, 11
    )
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-5)
    np.testing.assert_allclose([found[7, 5], found[0, 5]], [0.0, 1.0], atol=0.12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 16}, "embed_dim=16 must equal the embed_dim=8 of the parameters; set it alike"),
        ({"num_classes": 5}, "num_classes=5 must equal .*; use reset_classifier first"),
        ({"scan": True}, "scan=True must equal .*; use stack or unstack first"),
    ],
)
def test_resize_refuses_what_it_cannot_bridge(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        swin.resize(tiny[0], TINY, TINY.clone(**change))


def to_reference(params, source, patch=(2, 2)):
    """Write our parameters the way a reference stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        if path == "patch_embed/projection/kernel":
            leaf = leaf.reshape(*patch, -1, leaf.shape[-1]).transpose(3, 2, 0, 1)
        elif path.endswith("kernel"):
            leaf = leaf.T
        tensors.setdefault(swin.reference_name(path, source), {})[path.split("/")[-2]] = leaf
    # Fused projections: query, key and value rows one after the other.
    return {
        name: np.concatenate([parts[one] for one in ("query", "key", "value") if one in parts] or list(parts.values()))
        for name, parts in tensors.items()
    }


@pytest.mark.parametrize("source", swin.REFERENCE_NAMES)
def test_reference_names_cover_every_parameter(tiny, source):
    params, _, _ = tiny
    tensors = {**to_reference(params, source), "stage.0.relative_position_index": np.zeros(3)}
    jax.tree.map(np.testing.assert_array_equal, swin.from_reference(tensors, TINY, source=source), params)


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0], "timm")
    with pytest.raises(ValueError, match="source='tim' must be one of"):
        swin.from_reference(tensors, TINY, source="tim")
    with pytest.raises(ValueError, match=r"source='torchvision' must hold 'features.0.0.weight'"):
        swin.from_reference(tensors, TINY, source="torchvision")
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['norm.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "norm.bias"}
        swin.from_reference({**incomplete, "extra": np.zeros(1)}, TINY, source="timm")
    with pytest.raises(ValueError, match=r"bias_table must give .* its shape \(25, 2\), not \(35, 2\); set the fields"):
        swin.from_reference(tensors, TINY.clone(window_size=3), source="timm")
    with pytest.raises(ValueError, match="scan=True must be False"):
        swin.from_reference(tensors, TINY.clone(scan=True), source="timm")


@pytest.mark.parametrize("merge", [PatchMerging(), PatchMergingV2()], ids=["first", "second"])
def test_merging_by_a_convolution_has_the_same_parameters_and_values(merge, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 8)), jnp.float32)
    found = {}
    for choice in ("jnp", "pallas"):
        with dispatch.use(choice):
            params = merge.init(jax.random.key(0), x)
            gradient = jax.grad(lambda params: jnp.sum(jnp.sin(merge.apply(params, x))))
            found[choice] = params, merge.apply(params, x), gradient(params)
            text = str(jax.make_jaxpr(merge.apply)(params, x))
            assert ("conv_general_dilated" in text) == (choice == "pallas")
    with dispatch.use("table", platform="tpu"):
        assert dispatch.convolves_patches(1568, 96, "bfloat16")
        assert not dispatch.convolves_patches(392, 96, "bfloat16")
        assert not dispatch.convolves_patches(1568, 96, jnp.float32)
        assert not dispatch.convolves_patches(1568, 768, jnp.bfloat16)
    chex.assert_trees_all_equal(found["jnp"][0], found["pallas"][0])
    chex.assert_trees_all_close(found["jnp"][1:], found["pallas"][1:], atol=2e-5, rtol=1e-5)


def test_own_fields_stay_few():
    linen = {"parent", "name"}
    shared = {"dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (Swin, SwinBlock, WindowAttention, PatchMerging):
        assert len({field.name for field in dataclasses.fields(cls)} - linen - shared) <= 13
