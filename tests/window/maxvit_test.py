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

from jaxlayers.core.reference import reference_name
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import maxvit
from jaxlayers.window.maxvit import MaxViT, MaxViTBlock, MBConv, PartitionAttention

KEY_BIAS = {r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
TINY = MaxViT(
    num_classes=3,
    stem_features=4,
    embed_dim=(4, 8),
    depths=(2, 1),
    head_dim=4,
    window_size=(2, 3),
    grid_size=(3, 2),
    expand_ratio=2.0,
    mlp_ratio=1.0,
    drop_path_rate=0.0,
)

CASES = (
    Case(
        name="mbconv",
        within="maxvit",
        # Larger kernels than usual, so that the gradient of the weighing is more than rounding.
        module=MBConv(features=6, stride=2, expand_ratio=2.0, kernel_init=nn.initializers.lecun_normal()),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 4)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=0, stride=1 and", module=MBConv(0)),
            BadInput(match="stride=0 and expand_ratio=4.0 must be positive", module=MBConv(4, stride=0)),
            BadInput(match="leave hidden features; set them", module=MBConv(4, expand_ratio=0.1)),
            BadInput(match=r"rate=1.0 must lie in \[0, 1\)", module=MBConv(4, drop_path_rate=1.0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 4)),)),
        ),
    ),
    Case(
        name="partition_attention",
        within="maxvit",
        module=PartitionAttention(num_heads=2, partition_size=(3, 2), grid=True, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=PartitionAttention(3)),
            BadInput(match=r"partition_size=\(0, 2\) must have 1 to 3", module=PartitionAttention(2, (0, 2))),
            BadInput(match="1 to 3 positive entries; set", module=PartitionAttention(2, (2, 2, 2, 2))),
            BadInput(match="hidden_features=0 .* must be positive", module=PartitionAttention(2, 2, mlp_ratio=0.0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 8)),)),
        ),
    ),
    Case(
        name="maxvit_block",
        within="maxvit",
        module=MaxViTBlock(8, head_dim=4, window_size=2, grid_size=3, expand_ratio=2.0, mlp_ratio=1.0),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 4)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=8 must be divisible by head_dim=3", module=MaxViTBlock(8, head_dim=3)),
            BadInput(match="features=8 must be divisible by head_dim=0", module=MaxViTBlock(8, head_dim=0)),
            BadInput(match="window_size=0 must be a positive int", module=MaxViTBlock(8, head_dim=4, window_size=0)),
            BadInput(
                match=r"grid_size=\(2, 2, 2\) must be a positive int or",
                module=MaxViTBlock(8, head_dim=4, grid_size=(2, 2, 2)),
            ),
        ),
    ),
    Case(
        name="maxvit",
        # One stage, since a block takes long to compile; kernels as in the first case.
        module=TINY.clone(embed_dim=(8,), depths=(1,), kernel_init=nn.initializers.lecun_normal()),
        inputs=lambda rng: (rng.normal(size=(2, 18, 15, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"embed_dim=\(4, 8\) and depths=\(1,\) must have", module=TINY.clone(depths=(1,))),
            BadInput(match="must have one positive entry a stage", module=TINY.clone(depths=(1, 0))),
            BadInput(match="num_classes=-1 must not be negative", module=TINY.clone(num_classes=-1)),
            BadInput(match="stem_features=0 must be positive", module=TINY.clone(stem_features=0)),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=TINY.clone(drop_path_rate=1.0)),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
)


def random_variables(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters and running statistics in the shape of `module`'s, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        name = path[-1].key
        value = 0.4 * rng.normal(size=leaf.shape) + (name == "scale")
        return jnp.asarray(np.exp(value) if name == "var" else value, dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


@pytest.fixture(scope="module")
def tiny():
    """A small model, its variables, images that fit no stride, window or grid, and logits and maps of each stage."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 17, 22, 3)), jnp.float32)
    variables = random_variables(TINY, x)
    run = jax.jit(lambda v, x: (TINY.apply(v, x), nn.apply(MaxViT.features, TINY)(v, x)))
    return variables, x, *run(variables, x)


# Independent twins: NumPy, one token at a time -------------------------------------------------------------------


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def layer_norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def part_of(place, size, partition, grid):
    """Return what two tokens of one part have alike: the window's number, or the place modulo the grid's stride."""
    found = []
    for at, length, step in zip(place, size, partition, strict=True):
        step = min(step, length)
        stride = math.ceil(length / step)
        found.append(at % stride if grid else at // step)
    return tuple(found)


def cell_of(place, size, partition, grid):
    """Return a token's place in its part, in which offsets of the bias are counted."""
    strides = [math.ceil(length / min(step, length)) for length, step in zip(size, partition, strict=True)]
    return tuple(at // stride if grid else at for at, stride in zip(place, strides, strict=True))


def twin_attention(params, x, *, num_heads, partition, grid):
    """One block of attention on one map [*size, features], in the words of the paper."""
    size, head_dim = x.shape[:-1], x.shape[-1] // num_heads
    attention = params["attention"]
    table = attention["relative_position_bias_table"].reshape(*(2 * step - 1 for step in partition), num_heads)
    normed = layer_norm(params["norm1"], x)
    query, key, value = (dense(attention[name], normed) for name in ("query", "key", "value"))
    out = np.zeros_like(x)
    places = list(np.ndindex(*size))
    for place in places:
        part, cell = part_of(place, size, partition, grid), cell_of(place, size, partition, grid)
        others = [other for other in places if part_of(other, size, partition, grid) == part]
        for head in range(num_heads):
            features = slice(head * head_dim, (head + 1) * head_dim)
            logits = []
            for other in others:
                offset = zip(cell, cell_of(other, size, partition, grid), partition, strict=True)
                row = tuple(a - b + step - 1 for a, b, step in offset)
                logits.append(query[place][features] @ key[other][features] / math.sqrt(head_dim) + table[(*row, head)])
            weights = np.exp(logits - np.max(logits))
            out[place][features] = weights / weights.sum() @ [value[other][features] for other in others]
    z = x + dense(attention["out"], out)
    return z + dense(
        params["feed_forward"]["down"], gelu(dense(params["feed_forward"]["up"], layer_norm(params["norm2"], z)))
    )


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(
    ("size", "partition"), [((8, 7), (3, 4)), ((2, 9), (4, 4)), ((11,), (3,)), ((6,), (2,)), ((2, 4, 5), (2, 2, 3))]
)
def test_attention_equals_a_loop_over_tokens(size, partition, grid):
    block = PartitionAttention(num_heads=2, partition_size=partition, grid=grid, mlp_ratio=2.0)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)))
        variables = random_variables(block, x, dtype=np.float64)
        found = jax.jit(block.apply)(variables, x)
        assert found.dtype == jnp.float64
    params, one = jax.tree.map(np.asarray, variables["params"]), np.asarray(x)[0]
    expected = twin_attention(params, one, num_heads=2, partition=partition, grid=grid)
    np.testing.assert_allclose(found[0], expected, atol=1e-11)
    if max(length - step for length, step in zip(size, partition, strict=True)) > 2:
        # The two kinds differ, so the comparison tells them apart.
        other = twin_attention(params, one, num_heads=2, partition=partition, grid=not grid)
        assert np.abs(other - expected).max() > 1e-3


def twin_mbconv(variables, x, *, features, stride):
    """MBConv on one map, place by place."""
    params, statistics = variables["params"], variables["batch_stats"]

    def norm(name, x):
        p, running = params[name], statistics[name]
        return (x - running["mean"]) / np.sqrt(running["var"] + 1e-3) * p["scale"] + p["bias"]

    y = gelu(norm("norm1", dense(params["up"], norm("pre_norm", x))))
    size = x.shape[:2]
    new_size = [math.ceil(length / stride) for length in size]
    # TensorFlow's "SAME": as many zeros as are missing, of an odd number the larger half at the end.
    before = [max(0, (new - 1) * stride + 3 - length) // 2 for new, length in zip(new_size, size, strict=True)]
    out, skip = np.zeros((*new_size, y.shape[-1])), np.zeros((*new_size, x.shape[-1]))
    for place in np.ndindex(*new_size):
        for tap in np.ndindex(3, 3):
            at = tuple(stride * p + t - b for p, t, b in zip(place, tap, before, strict=True))
            if all(0 <= one < length for one, length in zip(at, size, strict=True)):
                out[place] += params["depthwise"]["kernel"][(*tap, 0)] * y[at]
        for tap in np.ndindex(stride, stride):
            at = tuple(stride * p + t for p, t in zip(place, tap, strict=True))
            if all(one < length for one, length in zip(at, size, strict=True)):
                skip[place] += x[at] / stride**2
    out = gelu(norm("norm2", out))
    hidden = dense(params["squeeze"]["up"], out.mean((0, 1)))
    gate = 1 / (1 + np.exp(-dense(params["squeeze"]["down"], hidden / (1 + np.exp(-hidden)))))
    skip = dense(params["shortcut"], skip) if x.shape[-1] != features else skip
    return skip + dense(params["down"], out * gate)


@pytest.mark.parametrize(
    ("size", "features", "stride"), [((5, 4), 4, 1), ((5, 4), 8, 2), ((6, 3), 4, 2), ((1, 7), 8, 3)]
)
def test_convolution_equals_a_loop_over_places(size, features, stride):
    layer = MBConv(features, stride=stride, expand_ratio=2.0)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)))
        variables = random_variables(layer, x, dtype=np.float64)
        found = jax.jit(layer.apply)(variables, x)
    expected = twin_mbconv(jax.tree.map(np.asarray, variables), np.asarray(x)[0], features=features, stride=stride)
    np.testing.assert_allclose(found[0], expected, atol=1e-11)


# Reach -----------------------------------------------------------------------------------------------------------


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


def same_part(size, partition, grid):
    parts = np.array([part_of(place, size, partition, grid) for place in np.ndindex(*size)])
    return (parts[:, None] == parts[None]).all(-1)


def attend(partition, grid, x):
    """Return a block of attention as a function of the map, with random parameters."""
    block = PartitionAttention(num_heads=1, partition_size=partition, grid=grid, mlp_ratio=1.0)
    variables = random_variables(block, x, seed=int(grid), dtype=np.float64)
    return lambda x: block.apply(variables, x)


@pytest.mark.parametrize("size", [(8, 8), (10, 7), (9, 11), (3, 6)])
def test_block_branch_is_a_window_and_grid_branch_all_that_is_congruent(size):
    partition = (4, 4)
    with jax.enable_x64(True):
        hears = {}
        for grid in (False, True):
            apply = attend(partition, grid, jnp.ones((1, *size, 4)))
            hears[grid] = who_hears_whom(jax.jit(apply), size, 4)
            same = same_part(size, partition, grid)
            assert not np.any(hears[grid] & ~same), "a token of another part is heard"
            assert np.all(hears[grid][same]), "a token of the part is not heard"
    # Negative control: the probe tells the two apart, unless one part is the whole map.
    assert np.any(hears[True] != hears[False])
    # The grid spans the map: the first token hears one of every cell, the last ones as well.
    stride = [math.ceil(length / min(4, length)) for length in size]
    reached = hears[True].reshape(*size, *size)[:, :, 0, 0]
    assert reached.sum() == math.prod(math.ceil(length / step) for length, step in zip(size, stride, strict=True))


@pytest.mark.parametrize(
    ("size", "window", "cells", "everything"),
    [((9, 6), 3, 3, True), ((8, 8), 4, 2, True), ((9, 6), 2, 3, False), ((8, 8), 2, 2, False)],
)
def test_both_branches_together_reach_everything_if_a_window_fills_a_cell(size, window, cells, everything):
    with jax.enable_x64(True):
        x = jnp.ones((1, *size, 4))
        local, spread = attend((window,) * 2, False, x), attend((cells,) * 2, True, x)
        hears = who_hears_whom(jax.jit(lambda x: spread(local(x))), size, 4)
        assert not who_hears_whom(jax.jit(spread), size, 4).all()
    assert hears.all() == everything


def test_padding_is_never_heard():
    # What a part at the map's end gives is what it gives as a map of its own, which needs no padding.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 7, 4)), jnp.float32)
    blocks = {grid: PartitionAttention(1, partition_size=4, grid=grid, mlp_ratio=1.0) for grid in (False, True)}
    variables = random_variables(blocks[False], x)
    local, spread = (jax.jit(functools.partial(block.apply, variables)) for block in blocks.values())
    found = local(x)
    np.testing.assert_allclose(found[:, 4:, 4:], local(x[:, 4:, 4:]), atol=1e-5)
    # The grid's strides are 2 and 2; there are 2 x 3 odd places, and 3 x 4 even ones.
    for first in (0, 1):
        alone = spread(x[:, first::2, first::2])
        np.testing.assert_allclose(spread(x)[:, first::2, first::2], alone, atol=1e-5)
    # Control: zeros in the map, which look like padding, are heard.
    padded = jnp.pad(x, [(0, 0), (0, 3), (0, 1), (0, 0)])
    assert np.abs(local(padded)[:, 4:5, 4:7] - found[:, 4:, 4:]).max() > 1e-2


# Limits and symmetries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [False, True])
def test_a_part_as_large_as_the_map_is_dense_attention(grid, rng):
    block = PartitionAttention(num_heads=2, partition_size=(3, 4), grid=grid, mlp_ratio=1.0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    variables = random_variables(block, x)
    params = variables["params"]
    rows = {offset: row for row, offset in enumerate(itertools.product(range(-2, 3), range(-3, 4)))}
    places = list(itertools.product(range(3), range(4)))
    index = np.array([[rows[p[0] - q[0], p[1] - q[1]] for q in places] for p in places])
    bias = jnp.moveaxis(params["attention"]["relative_position_bias_table"][index], -1, 0)

    @jax.jit
    def twin(x):
        context = nn.dot_product_attention(*(heads(x, name) for name in ("query", "key", "value")), bias=bias)
        z = x + linear("attention/out", context.reshape(2, 12, 8)).reshape(x.shape)
        return z + linear("feed_forward/down", nn.gelu(linear("feed_forward/up", norm("norm2", z))))

    def linear(name, x):
        p = functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
        return x @ p["kernel"] + p["bias"]

    def norm(name, x):
        return nn.LayerNorm(epsilon=1e-5).apply({"params": params[name]}, x)

    def heads(x, name):
        return linear(f"attention/{name}", norm("norm1", x).reshape(2, 12, 8)).reshape(2, 12, 2, 4)

    np.testing.assert_allclose(jax.jit(block.apply)(variables, x), twin(x), atol=2e-5)


def test_a_part_of_one_token_mixes_nothing(rng):
    x = jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32)
    order = rng.permutation(16)

    def shuffled(x):
        return x.reshape(1, 16, 4)[:, order].reshape(x.shape)

    for grid in (False, True):
        block = PartitionAttention(num_heads=1, partition_size=1, grid=grid, mlp_ratio=1.0)
        variables = random_variables(block, x)
        apply = jax.jit(functools.partial(block.apply, variables))
        np.testing.assert_allclose(apply(shuffled(x)), shuffled(apply(x)), atol=1e-5)


def test_block_branch_commutes_with_translations_by_windows_and_grid_branch_with_permutations_within_cells(rng):
    size, part = (6, 8), (3, 2)
    x = jnp.asarray(rng.normal(size=(1, *size, 4)), jnp.float32)
    runs = {}
    for grid in (False, True):
        block = PartitionAttention(num_heads=2, partition_size=part, grid=grid, mlp_ratio=1.0)
        runs[grid] = jax.jit(functools.partial(block.apply, random_variables(block, x)))

    def by_windows(x):
        return jnp.roll(x, part, (1, 2))

    order = np.array([3, 0, 2, 1])

    def within_cells(x):
        # Cells of 2 x 4: rows change places, and columns are shuffled, in all alike.
        cells = x.reshape(1, 3, 2, 2, 4, 4)[:, :, ::-1][:, :, :, :, order]
        return cells.reshape(x.shape)

    def error(grid, act):
        return float(jnp.abs(runs[grid](act(x)) - act(runs[grid](x))).max())

    assert error(False, by_windows) < 1e-5
    assert error(True, within_cells) < 1e-5
    # Negative controls: each breaks the other's symmetry, and translations by one break both.
    assert error(True, by_windows) > 0.05
    assert error(False, within_cells) > 0.05
    for grid in (False, True):
        assert error(grid, lambda x: jnp.roll(x, 1, 1)) > 0.05


def test_cost_is_linear_in_the_pixels():
    def cost(module, *size):
        x = jax.ShapeDtypeStruct((1, *size), jnp.float32)
        return count_macs(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)

    for grid in (False, True):
        block = PartitionAttention(num_heads=2, partition_size=4, grid=grid)
        once = cost(block, 8, 8, 8)
        assert once == 64 * (12 * 8**2 + 2 * 16 * 8)
        assert [cost(block, 16, 8, 8), cost(block, 32, 32, 8)] == [2 * once, 16 * once]
        # Negative control: attention over the whole map is not.
        dense = [cost(block.clone(partition_size=side), side, side, 8) for side in (8, 16)]
        assert dense[1] > 6 * dense[0]
    small, large = (cost(TINY.clone(num_classes=0, window_size=2, grid_size=2), side, side, 3) for side in (32, 64))
    # But for the weighing of features and the last layer, which do not grow.
    assert 3.99 < large / small < 4


def test_one_tree_serves_every_size(tiny):
    variables = tiny[0]
    shapes = jax.tree.map(jnp.shape, variables)
    for size in [(8, 8), (1, 50), (64, 31)]:
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        assert jax.tree.map(jnp.shape, jax.eval_shape(TINY.init, jax.random.key(0), images)) == shapes
        assert jax.eval_shape(TINY.apply, variables, images).shape == (1, 3)


# The model -------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "maxvit_tiny": 30_916_528,
    "maxvit_tiny_384": 30_977_008,
    "maxvit_tiny_512": 31_049_584,
    "maxvit_small": 68_927_956,
    "maxvit_small_384": 69_018_676,
    "maxvit_small_512": 69_127_540,
    "maxvit_base": 119_467_708,
    "maxvit_base_384": 119_653_468,
    "maxvit_base_512": 119_876_380,
    "maxvit_large": 211_785_560,
    "maxvit_large_384": 212_033_240,
    "maxvit_large_512": 212_330_456,
    # Published with the 21,843 classes of ImageNet-21k: 506,987,643.
    "maxvit_xlarge": 506_987_643 - (21_843 - 1_000) * (1_536 + 1),
    "maxvit_xlarge_384": 475_323_472,
    "maxvit_xlarge_512": 475_769_296,
}
FAST = {"maxvit_tiny", "maxvit_tiny_384", "maxvit_tiny_512", "maxvit_small", "maxvit_base", "maxvit_xlarge"}


def build(name):
    fields = {key: value for key, value in maxvit.VARIANTS[name].items() if key not in ("module", "inputs")}
    model = maxvit.VARIANTS[name]["module"](**fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return model, shapes


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_variants_have_the_published_number_of_parameters(name):
    assert sum(leaf.size for leaf in jax.tree.leaves(build(name)[1]["params"])) == PUBLISHED[name]


def test_every_variant_is_counted():
    assert set(PUBLISHED) == set(maxvit.VARIANTS)


# Counted in timm's models with PyTorch's counter.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"), [("maxvit_tiny", 5.552e9), ("maxvit_small", 11.589e9), ("maxvit_tiny_384", 17.393e9)]
)
def test_variants_have_the_published_cost(name, expected):
    model, shapes = build(name)
    assert abs(count_macs(model.apply, shapes, *maxvit.VARIANTS[name]["inputs"]) / expected - 1) < 0.02


def test_features_are_a_pyramid_of_every_stage(tiny):
    levels = tiny[3]
    assert [level.array.shape for level in levels] == [(2, 5, 6, 4), (2, 3, 3, 8)]
    assert [level.stride for level in levels] == [(4, 4), (8, 8)]
    assert [level.channels for level in levels] == [4, 8]


def test_logits_are_the_head_on_tanh_of_the_normed_mean_of_the_last_level(tiny):
    variables, _, logits, levels = tiny
    params = variables["params"]
    mean = jnp.mean(levels[-1].array, axis=(1, 2))
    normed = nn.LayerNorm(epsilon=1e-5).apply({"params": params["final_norm"]}, mean)
    features = jnp.tanh(normed @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"])
    np.testing.assert_allclose(features @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-5)
    headless = {**variables, "params": {name: value for name, value in params.items() if name != "head"}}
    assert jax.eval_shape(TINY.clone(num_classes=0).apply, headless, tiny[1]).shape == (2, 8)


def test_stem_pads_with_the_odd_zero_at_the_end():
    # One image, all zero but for the last row and column: whether the first output sees the first pixel tells where
    # the padding is.
    model = TINY.clone(num_classes=0, embed_dim=(4,), depths=(1,))
    x = jnp.zeros((1, 8, 8, 3))
    stem = lambda m, x: m.patch_embed(x, deterministic=True)  # noqa: E731
    variables = random_variables(model, x)
    kernel = variables["params"]["patch_embed"]["convolution1"]["kernel"]
    run = jax.jit(
        lambda x: model.apply(
            variables,
            x,
            method=stem,
            capture_intermediates=lambda module, _: module.name == "convolution1",
            mutable=["intermediates"],
        )[1]["intermediates"]["patch_embed"]["convolution1"]["__call__"][0]
    )
    step = run(x.at[0, 0, 0, 0].set(1.0)) - run(x)
    # With zeros before it the first pixel would meet the kernel's middle.
    np.testing.assert_allclose(step[0, 0, 0], kernel[0, 0, 0], atol=1e-5)


def test_drop_path_rates_grow_with_depth_and_training_updates_every_statistic():
    model = TINY.clone(depths=(1, 2), drop_path_rate=0.8)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 4, 4, 3)), jnp.float32)
    variables = random_variables(model, x)

    @jax.jit
    def train(key):
        return model.apply(
            variables,
            x,
            deterministic=False,
            rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: type(module).__name__ == "DropPath",
        )[1]

    state = train(jax.random.key(0))
    moved = jax.tree.map(lambda old, new: bool(np.all(old != new)), variables["batch_stats"], state["batch_stats"])
    assert all(jax.tree.leaves(moved))
    dropped = {}
    for path, outputs in flax.traverse_util.flatten_dict(state["intermediates"]).items():
        if path[-1] == "__call__":
            fraction = [np.mean(np.all(np.asarray(out) == 0, axis=(1, 2, 3))) for out in outputs]
            dropped.setdefault(path[:2], []).extend(fraction)
    # Five branches a block: the convolution, and two of each attention.
    assert [len(fractions) for fractions in dropped.values()] == [5, 5, 5]
    rates = [np.mean(dropped[block]) for block in sorted(dropped)]
    np.testing.assert_allclose(rates, [0.0, 0.4, 0.8], atol=0.12)


def test_training_norms_by_the_batch_and_moves_the_running_statistics():
    layer = MBConv(4, expand_ratio=1.0)
    x = jnp.asarray(np.random.default_rng(0).normal(1.0, 2.0, size=(3, 5, 4, 4)), jnp.float32)
    variables = random_variables(layer, x)
    _, state = jax.jit(lambda v, x: layer.apply(v, x, deterministic=False, mutable=["batch_stats"]))(variables, x)
    before, after = variables["batch_stats"]["pre_norm"], state["batch_stats"]["pre_norm"]
    np.testing.assert_allclose(after["mean"], 0.99 * before["mean"] + 0.01 * x.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(after["var"], 0.99 * before["var"] + 0.01 * x.var((0, 1, 2)), atol=1e-6)


@pytest.mark.slow
def test_remat_changes_neither_logits_nor_gradients_nor_statistics():
    model = TINY.clone(embed_dim=(4,), depths=(1,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 1)), jnp.float32)
    variables = random_variables(model, x)

    def run(policy):
        def loss(params):
            out, state = model.clone(remat=policy).apply(
                {**variables, "params": params}, x, deterministic=False, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(out)), (out, state)

        return jax.value_and_grad(loss, has_aux=True)

    plain = jax.jit(run("none"))(variables["params"])
    for policy in ("full", "attention"):
        assert "remat" in str(jax.make_jaxpr(run(policy))(variables["params"]))
    found = jax.jit(run("full"))(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())), found, plain)
    assert "remat" not in str(jax.make_jaxpr(run("none"))(variables["params"]))


def test_softmax_and_norm_statistics_stay_in_float32_under_bfloat16():
    block = MaxViTBlock(4, head_dim=4, window_size=2, grid_size=2, dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 4), jnp.bfloat16)
    program = str(jax.make_jaxpr(block.apply)(random_variables(block, x), x))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    assert not re.search(r":f32\[[\d,]*\] = (dot_general|conv_general_dilated)", program)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(maxvit.no_decay(tiny[0]["params"]))
    assert {path[-1] for path, without in flat.items() if without} == {"bias", "scale", "relative_position_bias_table"}
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks_from_the_stem_to_the_head(tiny):
    ids = maxvit.layer_ids(tiny[0]["params"], TINY)

    def only(tree):
        return set(jax.tree.leaves(tree))

    assert only(ids["patch_embed"]) == {0}
    assert [only(ids["stages_0"][f"blocks_{index}"]) for index in range(2)] == [{1}, {2}]
    assert only(ids["stages_1"]["blocks_0"]) == {3}
    assert only(ids["final_norm"]) == only(ids["pre_logits"]) == only(ids["head"]) == {4}


def test_resize_fits_the_tables_of_window_and_grid_and_leaves_the_rest(tiny):
    params = tiny[0]["params"]
    assert all(
        new is old
        for new, old in zip(jax.tree.leaves(maxvit.resize(params, TINY, TINY)), jax.tree.leaves(params), strict=True)
    )
    target = TINY.clone(window_size=(4, 3), grid_size=5)
    resized = maxvit.resize(params, TINY, target)
    shapes = jax.eval_shape(target.init, jax.random.key(0), tiny[1])["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)
    before, after = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params, resized))
    changed = {path for path in before if after[path] is not before[path]}
    assert changed == {path for path in before if path.endswith("relative_position_bias_table")}
    with pytest.raises(ValueError, match=r"embed_dim=\(8, 8\) must equal the embed_dim=\(4, 8\) of the parameters"):
        maxvit.resize(params, TINY, TINY.clone(embed_dim=(8, 8)))


def test_resize_keeps_a_smooth_bias_smooth(tiny):
    # A bias that falls with distance keeps its values at the same relative distance.
    rows = np.linspace(-1, 1, 3)[:, None] ** 2 + np.linspace(-1, 1, 5)[None] ** 2
    model = TINY.clone(window_size=(2, 3), grid_size=(2, 3))
    table = jnp.asarray(rows.reshape(-1, 1), jnp.float32)
    flat = {
        ("stages_0", "blocks_0", f"{part}_attention", "attention", maxvit._TABLE): table for part in ("block", "grid")
    }
    resized = maxvit.resize(
        flax.traverse_util.unflatten_dict(flat), model, model.clone(window_size=(4, 6), grid_size=(2, 6))
    )["stages_0"]["blocks_0"]
    block = np.asarray(resized["block_attention"]["attention"][maxvit._TABLE]).reshape(7, 11)
    np.testing.assert_allclose(block, block[::-1, ::-1], atol=1e-5)
    np.testing.assert_allclose([block[3, 5], block[0, 5]], [0.0, 1.0], atol=0.25)
    assert resized["grid_attention"]["attention"][maxvit._TABLE].shape == (3 * 11, 1)


def to_reference(variables):
    """Write our variables the way timm stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(variables, sep="/").items():
        leaf = np.asarray(leaf)
        name = reference_name(path.partition("/")[2], maxvit.REFERENCE_NAMES["timm"])
        if path.endswith("kernel"):
            leaf = leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
            if ".conv." in name and leaf.ndim == 2:
                leaf = leaf[:, :, None, None]
        if name.endswith("bias_table"):
            window = TINY.window_size if "block_attention" in path else TINY.grid_size
            leaf = leaf.T.reshape(-1, *(2 * length - 1 for length in window))[:, ::-1, ::-1]
        fused = re.sub(r"\.attn\.(query|key|value)\.", ".attn.qkv.", name)
        tensors.setdefault(fused, {})[name] = leaf
    order = ("query", "key", "value")
    return {
        fused: np.concatenate([parts[fused.replace("qkv", one)] for one in order]) if "qkv" in fused else parts[fused]
        for fused, parts in tensors.items()
    }


def test_reference_names_cover_every_variable(tiny):
    tensors = to_reference(tiny[0])
    tensors["stem.norm1.num_batches_tracked"] = np.zeros(())
    jax.tree.map(np.testing.assert_array_equal, maxvit.from_reference(tensors, TINY), tiny[0])


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0])
    with pytest.raises(ValueError, match="source='torchvision' must be one of"):
        maxvit.from_reference(tensors, TINY, source="torchvision")
    with pytest.raises(ValueError, match=r"source='timm' must hold 'stem.conv1.weight'"):
        maxvit.from_reference({"stem.0.0.weight": np.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['head.norm.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "head.norm.bias"}
        maxvit.from_reference({**incomplete, "extra": np.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=r"bias_table must give .* its shape \(25, 1\), not \(15, 1\)"):
        maxvit.from_reference(tensors, TINY.clone(window_size=3))


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (MaxViT, MaxViTBlock, PartitionAttention, MBConv):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13
