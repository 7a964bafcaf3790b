import dataclasses
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

from jaxlayers import summarize
from jaxlayers.core.reference import reference_name
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import hiera
from jaxlayers.window.hiera import (
    Hiera,
    HieraBlock,
    HieraEmbed,
    HieraStage,
    MaskUnitAttention,
    average_pool,
    max_pool,
    random_units,
)

KEY_BIAS = {"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}

# Maps of 8 x 4, 4 x 2 and 2 x 1 tokens in mask units of 4, 2 and 1: two units, one below the other.
TINY = Hiera(num_classes=3, image_size=(32, 16), embed_dim=4, depths=(1, 2, 1), num_heads=1, mask_unit_size=4)

CASES = (
    Case(
        name="mask_unit_attention",
        within="hiera",
        module=MaskUnitAttention(num_heads=2, features=8, unit_size=(4, 2), q_stride=2),
        inputs=lambda rng: (rng.normal(size=(2, 6, 5, 6)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=6 must be divisible by num_heads=4", module=MaskUnitAttention(4)),
            BadInput(
                match=r"unit_size=\(3, 3\) must be divisible by q_stride=\(2, 2\)",
                module=MaskUnitAttention(2, unit_size=3, q_stride=2),
            ),
            BadInput(match="q_stride=0 must be a positive int", module=MaskUnitAttention(2, q_stride=0)),
            BadInput(match="must name 1 to 3 axes", module=MaskUnitAttention(2, unit_size=(2,) * 4)),
            BadInput(
                match=r"q_stride=\(1, 1, 1\) must be a positive int or 2 of them, one for each axis",
                module=MaskUnitAttention(2, unit_size=(4, 4), q_stride=(1, 1, 1)),
            ),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 8)),)),
        ),
    ),
    Case(
        name="hiera_block",
        within="hiera",
        module=HieraBlock(num_heads=2, features=8, unit_size=4, q_stride=2, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 5, 6, 4)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"rate=1.5 must lie in \[0, 1\)", module=HieraBlock(2, drop_path_rate=1.5)),
            BadInput(match="features=4 must be divisible by num_heads=3", module=HieraBlock(3)),
            BadInput(match="must be divisible by q_stride", module=HieraBlock(2, unit_size=3, q_stride=2)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 8)),)),
        ),
    ),
    Case(
        name="hiera_stage",
        within="hiera",
        module=HieraStage(8, num_heads=2, drop_path_rates=(0.0, 0.0), first_unit_size=2, q_stride=2, mlp_ratio=1.0),
        inputs=lambda rng: (rng.normal(size=(2, 4, 3, 4)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(
                match="features=8 must be divisible by num_heads=3",
                module=HieraStage(8, num_heads=3, drop_path_rates=(0.0,)),
            ),
            BadInput(
                match=r"drop_path_rates=\(\) must have one rate for each block",
                module=HieraStage(8, num_heads=2, drop_path_rates=()),
            ),
            BadInput(
                match="remat='ful' must be one of",
                module=HieraStage(8, num_heads=2, drop_path_rates=(0.0,), remat="ful"),
            ),
        ),
    ),
    Case(
        name="hiera_embed",
        within="hiera",
        module=HieraEmbed(4, image_size=(3, 8, 9), patch_size=(3, 5, 5), patch_stride=(2, 4, 4)),
        inputs=lambda rng: (rng.normal(size=(2, 3, 8, 9, 2)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"image_size=\(8,\) must be a positive int", module=HieraEmbed(4, image_size=(8,))),
            BadInput(match=r"patch_size=\(3, 3\) must be .* or 3 of them", module=HieraEmbed(4, (8,) * 3, (3, 3))),
            BadInput(match="patch_stride=0 must be a positive int", module=HieraEmbed(4, 8, patch_stride=0)),
            BadInput(
                match=r"spatial size \(3, 8, 8\) must be image_size=\(3, 8, 9\); resize the input, or the parameters",
                inputs=lambda rng: (np.ones((1, 3, 8, 8, 2)),),
            ),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 3, 8, 9, 2), int),)),
        ),
    ),
    Case(
        name="hiera",
        module=Hiera(
            num_classes=3,
            image_size=(20, 24),
            patch_size=5,
            embed_dim=4,
            depths=(1, 1),
            num_heads=2,
            mask_unit_size=4,
            local_stages=1,
            mlp_ratio=2.0,
        ),
        inputs=lambda rng: (rng.normal(size=(2, 20, 24, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"depths=\(2, 0\) must have one positive entry", module=Hiera(depths=(2, 0))),
            BadInput(match="num_classes=-1 must not be negative", module=Hiera(num_classes=-1)),
            BadInput(match=r"local_stages=5 must lie in \[0, 4\]", module=Hiera(local_stages=5)),
            BadInput(match=r"mask_unit_size=\(6, 6\) must be divisible by .* 2 times", module=Hiera(mask_unit_size=6)),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=Hiera(drop_path_rate=1.0)),
            BadInput(match=r"image_size=\(0, 4\) must be a positive int", module=Hiera(image_size=(0, 4))),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((20, 24)),)),
            BadInput(match="must be image_size=", inputs=lambda rng: (np.ones((1, 24, 24, 3)),)),
            BadInput(
                match=r"image_size=\(20, 24\) must be a multiple of a mask unit's \(16, 16\) pixels to leave units out",
                inputs=lambda rng: (np.ones((1, 20, 24, 3)), np.zeros((1, 1), np.int32)),
            ),
            BadInput(
                match=r"kept must be indices of mask units, of shape \(1, 'kept'\); it is bool of shape \(1, 2\)",
                module=TINY,
                inputs=lambda rng: (np.ones((1, 32, 16, 3)), np.ones((1, 2), bool)),
            ),
            BadInput(
                match=r"kept must be indices .* of shape \(2, 1\)",
                module=TINY,
                inputs=lambda rng: (np.ones((1, 32, 16, 3)), np.zeros((2, 1), np.int32)),
            ),
            BadInput(
                match=r"mask_unit_size=\(2, 2\) must be divisible by .* 2 times",
                module=TINY.clone(mask_unit_size=2, local_stages=1),
                inputs=lambda rng: (np.ones((1, 32, 16, 3)), np.zeros((1, 1), np.int32)),
            ),
        ),
    ),
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
    """A small model, its parameters, images of its size, and the logits."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 16, 3)), jnp.float32)
    params = random_params(TINY, x)
    return params, x, jax.jit(TINY.apply)({"params": params}, x)


@pytest.fixture(scope="module")
def kept_run(tiny):
    """The logits of some units of an image, and the units after each stage."""
    params, _, _ = tiny

    @jax.jit
    def run(x, kept):
        return TINY.apply({"params": params}, x, kept), nn.apply(Hiera.units, TINY)({"params": params}, x, kept)

    return run


# An independent twin: NumPy, token by token -----------------------------------------------------------------------


def block_of(place, stride, size):
    """The tokens that a pooled one stands for, as many as the map holds."""
    ranges = [range(p * step, min((p + 1) * step, length)) for p, step, length in zip(place, stride, size, strict=True)]
    return list(itertools.product(*ranges))


def twin_pool(x, stride, how):
    size = x.shape[:-1]
    out = np.zeros([-(-length // step) for length, step in zip(size, stride, strict=True)] + [x.shape[-1]])
    for place in np.ndindex(*out.shape[:-1]):
        out[place] = how([x[token] for token in block_of(place, stride, size)], axis=0)
    return out


def unit_of(place, unit):
    return () if unit is None else tuple(p // step for p, step in zip(place, unit, strict=True))


def twin_block(params, x, *, num_heads, unit, stride, how):
    """One block on one map [*size, features], in the words of the paper."""

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    y = norm(params["norm1"], x)
    attention = params["attention"]
    query, key, value = (dense(attention[name], y) for name in ("query", "key", "value"))
    query = twin_pool(query, stride, how)
    dim = query.shape[-1] // num_heads
    out = np.zeros_like(query)
    for place in np.ndindex(*query.shape[:-1]):
        home = unit_of([p * step for p, step in zip(place, stride, strict=True)], unit)
        others = [other for other in np.ndindex(*x.shape[:-1]) if unit_of(other, unit) == home]
        for head in range(num_heads):
            part = slice(head * dim, (head + 1) * dim)
            weights = np.exp([query[place][part] @ key[other][part] / math.sqrt(dim) for other in others])
            out[place][part] = weights / weights.sum() @ [value[other][part] for other in others]
    x = twin_pool(dense(params["skip"], y), stride, how) if "skip" in params else x
    z = x + dense(attention["out"], out)
    hidden = dense(params["feed_forward"]["up"], norm(params["norm2"], z))
    gelu = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return z + dense(params["feed_forward"]["down"], gelu)


@pytest.mark.parametrize(
    ("size", "unit", "stride", "features", "pool"),
    [
        ((6, 7), (4, 2), (2, 2), 6, max_pool),
        ((5, 7), (2, 3), (1, 1), None, max_pool),
        ((5,), (4,), (2,), None, average_pool),
        ((2, 5, 4), (1, 4, 2), (1, 2, 2), 6, average_pool),
        ((5, 4), None, (2, 2), 6, max_pool),
    ],
)
def test_block_equals_a_loop_over_tokens(size, unit, stride, features, pool):
    block = HieraBlock(2, features=features, unit_size=unit, q_stride=stride, pool=pool, mlp_ratio=2.0)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)))
        params = random_params(block, x, dtype=np.float64)
        found = jax.jit(block.apply)({"params": params}, x)
        assert found.dtype == jnp.float64
    arguments = {"num_heads": 2, "unit": unit, "stride": stride}
    params = jax.tree.map(np.asarray, params)
    how, other = (np.max, np.mean) if pool is max_pool else (np.mean, np.max)
    expected = twin_block(params, np.asarray(x)[0], how=how, **arguments)
    np.testing.assert_allclose(found[0], expected, atol=1e-11)
    assert found.shape[1:-1] == tuple(-(-length // step) for length, step in zip(size, stride, strict=True))
    if max(stride) > 1:
        # The two ways to pool differ, so the comparison tells them apart.
        assert np.abs(twin_block(params, np.asarray(x)[0], how=other, **arguments) - expected).max() > 1e-3


def test_pooled_queries_are_a_quarter_of_the_tokens():
    layer = MaskUnitAttention(num_heads=2, unit_size=4, q_stride=2)
    x = jnp.ones((1, 8, 12, 4))
    out, state = jax.eval_shape(
        lambda x: layer.apply({"params": random_params(layer, x)}, x, mutable=["intermediates"]), x
    )
    assert out.shape == (1, 4, 6, 4)
    # Six units, two heads, 4 queries of 16 tokens.
    assert state["intermediates"]["attention_weights"][0].shape == (1, 6, 2, 4, 16)


# Locality ----------------------------------------------------------------------------------------------------------


def heard(block, size, features=4):
    """Return booleans [tokens out, tokens in]: has the Jacobian an entry between the two that is not zero?"""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(*size, features)))
        params = random_params(block, x[None], dtype=np.float64)
        jacobian = np.asarray(jax.jit(jax.jacrev(lambda x: block.apply({"params": params}, x[None])[0]))(x))
    return np.any(jacobian.reshape(-1, jacobian.shape[len(size)], math.prod(size), features) != 0, axis=(1, 3))


@pytest.mark.parametrize("stride", [1, 2])
def test_jacobian_is_exactly_block_diagonal_and_reaches_all_of_a_unit(stride):
    size, unit = (5, 7), (4, 4)
    block = HieraBlock(2, features=6, unit_size=4, q_stride=stride, mlp_ratio=1.0)
    pooled = [-(-length // stride) for length in size]
    asking = [unit_of([p * stride for p in place], unit) for place in np.ndindex(*pooled)]
    answering = [unit_of(place, unit) for place in np.ndindex(*size)]
    same = np.array([[one == other for other in answering] for one in asking])
    np.testing.assert_array_equal(heard(block, size), same)
    assert len(set(asking)) == 4


def test_without_units_all_tokens_reach_all():
    # The control of the test above: its zeros are not the probe's.
    assert heard(HieraBlock(2, features=6, q_stride=2, mlp_ratio=1.0), (5, 7)).all()


def test_units_change_places_with_their_outputs():
    block = HieraBlock(2, unit_size=(2, 3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 4)), jnp.float32)
    apply = jax.jit(functools.partial(block.apply, {"params": random_params(block, x)}))
    out = np.asarray(apply(x))
    np.testing.assert_allclose(apply(jnp.roll(x, (2, 3), (1, 2))), np.roll(out, (2, 3), (1, 2)), atol=1e-4)
    # Negative control: translations by less tear units apart.
    assert np.abs(np.asarray(apply(jnp.roll(x, (1, 0), (1, 2)))) - np.roll(out, (1, 0), (1, 2))).max() > 0.05


# Limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_size", [4, None])
def test_a_unit_that_covers_the_map_equals_dense_attention(rng, unit_size):
    # The unit is larger than the map: what pads it must not be heard.
    layer = MaskUnitAttention(num_heads=2, features=6, unit_size=unit_size)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    params = random_params(layer, x)

    def heads(name):
        return nn.Dense(6).apply({"params": params[name]}, x).reshape(2, 12, 2, 3)

    dense = nn.dot_product_attention(heads("query"), heads("key"), heads("value")).reshape(2, 3, 4, 6)
    expected = nn.Dense(6).apply({"params": params["out"]}, dense)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)


def test_units_of_one_token_hand_on_values():
    layer = MaskUnitAttention(num_heads=2, unit_size=1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 8)), jnp.float32)
    params = random_params(layer, x)
    values = nn.Dense(8).apply({"params": params["value"]}, x)
    expected = nn.Dense(8).apply({"params": params["out"]}, values)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)


def test_pooling_a_constant_gives_the_constant():
    x = jnp.full((5, 3, 2), 1.5)
    for pool in (max_pool, average_pool):
        np.testing.assert_array_equal(pool(x, (2, 2)), np.full((3, 2, 2), 1.5))


# The model ---------------------------------------------------------------------------------------------------------

# Parameters and millions of multiply-accumulates of timm's models, which the paper's table 8 rounds to 28M and 5G, 35M
# and 6G, 52M and 9G, 70M and 13G, 214M and 40G, 673M and 125G; for videos to 102G, 133G, 413G and 1159G.
PUBLISHED = {
    "hiera_tiny": (27_910_216, 4_900.8),
    "hiera_small": (35_008_072, 6_406.1),
    "hiera_base": (51_524_968, 9_375.2),
    "hiera_base_plus": (69_896_616, 12_640.5),
    "hiera_large": (213_739_912, 40_271.0),
    "hiera_huge": (672_779_752, 124_733.0),
    "hiera_base_16x224": (51_092_560, 101_725.9),
    "hiera_base_plus_16x224": (69_392_240, 132_302.4),
    "hiera_large_16x224": (213_091_600, 412_130.5),
    "hiera_huge_16x224": (671_627_664, 1_157_796.4),
}


def build(name):
    variant = hiera.VARIANTS[name]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    return variant["module"](**fields), variant["inputs"]


@pytest.mark.parametrize("name", hiera.VARIANTS)
def test_variants_have_the_published_number_of_parameters(name):
    model, inputs = build(name)
    # All blocks of a stage after its first are alike: count one and multiply.
    short = model.clone(depths=tuple(min(depth, 2) for depth in model.depths))
    params = jax.eval_shape(short.init, jax.random.key(0), *inputs)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for stage, depth in enumerate(model.depths):
        if depth > 2:
            count += (depth - 2) * sum(leaf.size for leaf in jax.tree.leaves(params[f"stages_{stage}"]["blocks_1"]))
    assert count == PUBLISHED[name][0]


@pytest.mark.parametrize("name", ["hiera_tiny", "hiera_base_plus", "hiera_huge", "hiera_base_16x224"])
def test_variants_have_the_published_multiply_accumulates(name):
    model, inputs = build(name)
    summary = summarize(model.clone(depths=tuple(min(depth, 2) for depth in model.depths)), *inputs)
    rows = {row.path: row for row in summary.rows}
    alike = [
        (depth - 2) * rows[f"stages_{stage}", "blocks_1"].macs for stage, depth in enumerate(model.depths) if depth > 2
    ]
    np.testing.assert_allclose((summary.macs + sum(alike)) / 1e6, PUBLISHED[name][1], rtol=2e-2)


def test_features_are_a_pyramid_of_every_stage():
    model = TINY.clone(image_size=(30, 50), patch_stride=(2, 4))
    x = jax.ShapeDtypeStruct((2, 30, 50, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    levels = jax.eval_shape(nn.apply(Hiera.features, model), shapes, x)
    assert [level.array.shape for level in levels] == [(2, 15, 13, 4), (2, 8, 7, 8), (2, 4, 4, 16)]
    assert [level.stride for level in levels] == [(2, 4), (4, 8), (8, 16)]
    video = TINY.clone(image_size=(3, 16, 16), patch_size=(3, 7, 7), patch_stride=(2, 4, 4), mask_unit_size=(1, 4, 4))
    x = jax.ShapeDtypeStruct((2, 3, 16, 16, 3), jnp.float32)
    levels = jax.eval_shape(lambda x: video.init_with_output(jax.random.key(0), x, method="features")[0], x)
    assert [(level.array.shape[1:-1], level.stride) for level in levels] == [
        ((2, 4, 4), (2, 4, 4)),
        ((2, 2, 2), (2, 8, 8)),
        ((2, 1, 1), (2, 16, 16)),
    ]


def test_without_head_the_output_is_what_the_head_takes(tiny):
    params, x, logits = tiny
    kept = {name: value for name, value in params.items() if name != "head"}
    found = jax.jit(TINY.clone(num_classes=0).apply)({"params": kept}, x)
    np.testing.assert_allclose(nn.Dense(3).apply({"params": params["head"]}, found), logits, atol=1e-5)


def test_drop_path_rates_grow_with_depth():
    stages = TINY.clone(drop_path_rate=0.6).bind({}).stages
    np.testing.assert_allclose(sum((stage.drop_path_rates for stage in stages), ()), [0.0, 0.2, 0.4, 0.6])


def test_drop_path_drops_whole_samples():
    block = HieraBlock(1, unit_size=2, drop_path_rate=0.5, mlp_ratio=1.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 2, 2, 2)), jnp.float32)
    state = jax.jit(
        lambda key: block.apply(
            {"params": random_params(block, x)},
            x,
            deterministic=False,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: type(module).__name__ == "DropPath",
        )[1]["intermediates"]
    )(jax.random.key(0))
    outputs = state["DropPath_0"]["__call__"]
    lost = [np.all(np.asarray(out) == 0, axis=(1, 2, 3)) for out in outputs]
    assert len(lost) == 2
    assert np.any(lost[0] != lost[1])
    assert all(0.4 < np.mean(one) < 0.6 for one in lost)


# Leaving mask units out --------------------------------------------------------------------------------------------


def test_keeping_all_units_in_any_order_changes_nothing(tiny, kept_run):
    params, x, logits = tiny
    found, units = kept_run(x, jnp.array([[0, 1], [1, 0]]))
    np.testing.assert_allclose(found, logits, atol=1e-5)
    levels = jax.jit(lambda x: nn.apply(Hiera.features, TINY)({"params": params}, x))(x)
    for unit, level in zip(units, levels, strict=True):
        # The two units lie one below the other in the map.
        halves = np.stack(np.split(np.asarray(level.array), 2, axis=1), axis=1)
        halves[1] = halves[1, ::-1]
        np.testing.assert_allclose(unit, halves, atol=1e-5)


def test_kept_units_are_all_that_is_seen_and_all_of_them_are(tiny, kept_run):
    _, x, _ = tiny
    kept = jnp.array([[1], [0]])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(kept_run(x, kept)[0]))))(x)
    seen = np.any(np.asarray(gradient) != 0, axis=-1)
    expected = np.zeros((2, 32, 16), bool)
    expected[0, 16:] = expected[1, :16] = True
    np.testing.assert_array_equal(seen, expected)
    # What is hidden need not even be a number.
    hidden = jnp.where(expected[..., None], x, jnp.nan)
    np.testing.assert_array_equal(kept_run(hidden, kept)[0], kept_run(x, kept)[0])


def test_leaving_units_out_equals_a_model_of_the_kept_part_alone(tiny, kept_run):
    params, x, logits = tiny
    rows = params["patch_embed"]["position_embedding"].reshape(8, 4, 4)
    small = jax.jit(TINY.clone(image_size=16).apply)
    for unit in (0, 1):
        embed = {**params["patch_embed"], "position_embedding": rows[4 * unit : 4 * unit + 4].reshape(16, 4)}
        expected = small({"params": {**params, "patch_embed": embed}}, x[:, 16 * unit : 16 * unit + 16])
        found, _ = kept_run(x, jnp.full((2, 1), unit))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(found - logits).max() > 0.01


def test_leaving_units_out_saves_their_cost():
    model = TINY.clone(image_size=128)
    x = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    whole = summarize(model, x)
    part = summarize(model, x, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    blocks = [{row.path: row for row in one.rows}[("stages_0",)].macs for one in (whole, part)]
    assert blocks[0] == 4 * blocks[1]  # 64 units against 16
    assert part.parameters == whole.parameters


def test_random_units_are_sorted_distinct_and_differ():
    model = Hiera(image_size=(64, 160))
    found = np.asarray(random_units(jax.random.key(0), (3, 20), model, mask_ratio=0.6))
    assert found.shape == (3, 20, 4)
    assert np.all(np.diff(found, axis=-1) > 0)
    assert found.min() == 0
    assert found.max() == 9
    assert len({tuple(row) for row in found.reshape(-1, 4)}) > 30
    draw = functools.partial(random_units, batch=(), model=model, mask_ratio=0.9)
    assert jax.eval_shape(draw, jax.random.key(0)).shape == (1,)
    with pytest.raises(ValueError, match="mask_ratio=0.95 must leave some of the 10 mask units"):
        random_units(jax.random.key(0), (), model, mask_ratio=0.95)


# Precision and memory ----------------------------------------------------------------------------------------------


def test_softmax_and_norm_statistics_stay_in_float32_under_bfloat16():
    block = HieraBlock(2, unit_size=2, dtype=jnp.bfloat16)
    x = jnp.ones((1, 5, 4, 8), jnp.bfloat16)
    program = str(jax.make_jaxpr(block.apply)({"params": random_params(block, x)}, x))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    assert not re.search(r":f32\[[\d,]*\] = dot_general", program)


def test_remat_changes_neither_outputs_nor_gradients():
    stage = HieraStage(4, num_heads=2, drop_path_rates=(0.0,), first_unit_size=2, q_stride=2, mlp_ratio=1.0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 4, 2)), jnp.float32)
    params = random_params(stage, x)

    def run(policy):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(stage.clone(remat=policy).apply({"params": p}, x))))

    plain, found = jax.jit(run("none"))(params), jax.jit(run("attention"))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), found, plain)
    programs = {policy: str(jax.make_jaxpr(run(policy))(params)) for policy in ("none", "attention", "full")}
    assert [policy for policy, text in programs.items() if "remat" in text] == ["attention", "full"]


# Parameter trees ---------------------------------------------------------------------------------------------------


def test_resize_fits_the_positions_and_leaves_the_rest(tiny):
    params, _, _ = tiny
    target = TINY.clone(image_size=(16, 48), drop_path_rate=0.5)
    resized = hiera.resize(params, TINY, target)
    shapes = jax.eval_shape(target.init, jax.random.key(0), jnp.ones((1, 16, 48, 3)))["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)
    assert [name for name in params if resized[name] is not params[name]] == ["patch_embed"]
    assert resized["patch_embed"]["projection"] is params["patch_embed"]["projection"]
    flat = hiera.resize_positions({"position_embedding": jnp.ones((32, 4))}, (32, 16), 24)
    np.testing.assert_allclose(flat["position_embedding"], np.ones((36, 4)), atol=1e-6)
    # A size of as many tokens needs nothing.
    jax.tree.map(np.testing.assert_array_equal, hiera.resize(params, TINY, TINY.clone(image_size=(30, 13))), params)


def test_resize_of_a_video_fits_frames_and_places_apart():
    rng = np.random.default_rng(0)
    tables = {"temporal_position_embedding": rng.normal(size=(4, 2)), "spatial_position_embedding": np.ones((6, 2))}
    found = hiera.resize_positions(tables, (8, 8, 12), (4, 8, 16), (2, 4, 4))
    assert {name: table.shape for name, table in found.items()} == {
        "temporal_position_embedding": (2, 2),
        "spatial_position_embedding": (8, 2),
    }
    np.testing.assert_allclose(found["spatial_position_embedding"], 1.0, atol=1e-6)
    with pytest.raises(ValueError, match=r"image_size=\(8, 8\) must have as many axes"):
        hiera.resize_positions(tables, (8, 8, 12), 8, (2, 4, 4))


@pytest.mark.parametrize("change", [{"patch_stride": 8}, {"embed_dim": 8}, {"num_classes": 2}])
def test_resize_refuses_what_it_cannot_bridge(tiny, change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{field}={value} must equal the {field}={getattr(TINY, field)}")):
        hiera.resize(tiny[0], TINY, TINY.clone(**change))


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(hiera.no_decay(tiny[0]))
    assert {path[-1] for path, without in flat.items() if without} == {"bias", "scale", "position_embedding"}
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks_from_the_patches_to_the_head(tiny):
    ids = hiera.layer_ids(tiny[0], TINY)

    def of(tree):
        return set(jax.tree.leaves(tree))

    assert of(ids["patch_embed"]) == {0}
    assert of(ids["stages_0"]["blocks_0"]) == {1}
    assert [of(ids["stages_1"][f"blocks_{index}"]) for index in range(2)] == [{2}, {3}]
    assert of(ids["stages_2"]["blocks_0"]) == {4}
    assert of(ids["final_norm"]) == of(ids["head"]) == {5}


def to_reference(params, source):
    """Write our parameters the way a reference stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        if path.endswith("kernel"):
            leaf = np.moveaxis(leaf, (-1, -2), (0, 1))
        elif path.endswith("position_embedding"):
            leaf = leaf[None]
        name = reference_name(path, hiera.REFERENCE_NAMES[source])
        if source != "huggingface":
            # Three stages of one, two and one blocks, numbered through.
            for number, place in enumerate(("0.0", "1.0", "1.1", "2.0")):
                name = re.sub(rf"^blocks\.{re.escape(place)}\.", f"blocks.{number}.", name)
        tensors[name] = leaf
    for name in [name for name in tensors if ".attn.query." in name]:
        parts = [tensors.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        tensors[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    return tensors


@pytest.mark.parametrize("source", hiera.REFERENCE_NAMES)
def test_reference_names_cover_every_parameter(tiny, source):
    params, _, _ = tiny
    tensors = to_reference(params, source)
    assert sum(".qkv.weight" in name for name in tensors) == 4
    jax.tree.map(np.testing.assert_array_equal, hiera.from_reference(tensors, TINY, source=source), params)


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0], "timm")
    with pytest.raises(ValueError, match="source='tim' must be one of"):
        hiera.from_reference(tensors, TINY, source="tim")
    with pytest.raises(ValueError, match=r"source='huggingface' must hold 'hiera.embeddings.patch_embeddings"):
        hiera.from_reference(tensors, TINY, source="huggingface")
    with pytest.raises(ValueError, match=r"unknown \['blocks.3"):
        hiera.from_reference(tensors, TINY.clone(depths=(1, 2)), source="timm")
    with pytest.raises(ValueError, match=r"pos_embed must give .* its shape \(16, 4\), not \(1, 32, 4\)"):
        hiera.from_reference(tensors, TINY.clone(image_size=16), source="timm")


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (Hiera, HieraStage, HieraBlock, MaskUnitAttention, HieraEmbed):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13
