import dataclasses
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
from jaxlayers.nn.transformer_block import TransformerBlock
from jaxlayers.ops.resample import resample
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import CrossFusion, CrossViT, crossvit

KEY_BIAS = {"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
TINY = CrossViT(
    num_classes=3,
    image_size=12,
    image_scale=(1.0, 1.0),
    patch_size=(3, 4),
    embed_dim=(4, 8),
    depths=(1, 2),
    num_encoders=2,
    num_heads=(2, 2),
    mlp_ratio=2.0,
    drop_path_rate=0.0,
)

CASES = (
    Case(
        name="cross_fusion",
        within="crossvit",
        module=CrossFusion(num_heads=3),
        inputs=lambda rng: (rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 6, 12))),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=12 must be divisible by num_heads=5", module=CrossFusion(5)),
            BadInput(
                match="of one batch, class token first; got shapes",
                inputs=lambda rng: (np.ones((2, 4, 8)), np.ones((1, 6, 12))),
            ),
            BadInput(match="of one batch", inputs=lambda rng: (np.ones((2, 0, 8)), np.ones((2, 6, 12)))),
        ),
    ),
    Case(
        name="crossvit",
        module=TINY.clone(num_encoders=1, depths=(1, 1)),
        inputs=lambda rng: (rng.normal(size=(2, 13, 10, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="must each have one positive entry for either", module=TINY.clone(depths=(1, 0))),
            BadInput(match="must each have one positive entry for either", module=TINY.clone(embed_dim=(4, 8, 8))),
            BadInput(match="num_encoders=0 must be positive", module=TINY.clone(num_encoders=0)),
            BadInput(match="num_classes=-1 not negative", module=TINY.clone(num_classes=-1)),
            BadInput(match="image_size=0 must be a positive int or", module=TINY.clone(image_size=0)),
            BadInput(match=r"patch_size=3 must be one of \[12, 16\]", module=TINY.clone(conv_embed=True)),
            BadInput(match="features=4 must be divisible by num_heads=3", module=TINY.clone(num_heads=(3, 2))),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
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
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 12, 3)), jnp.float32)
    params = random_params(TINY, x)
    return params, x, jax.jit(TINY.apply)({"params": params}, x)


# An independent twin: NumPy, in the words of the paper ------------------------------------------------------------


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def twin_attention(p, queries, tokens, num_heads):
    query, key, value = dense(p["query"], queries), dense(p["key"], tokens), dense(p["value"], tokens)
    dim = query.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * dim, (head + 1) * dim)
        weights = np.exp(query[:, part] @ key[:, part].T / math.sqrt(dim))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
    return dense(p["out"], np.concatenate(heads, -1))


def twin_block(p, x, num_heads):
    y = norm(p["norm1"], x)
    x = x + twin_attention(p["attention"], y, y, num_heads)
    return x + dense(p["feed_forward"]["down"], gelu(dense(p["feed_forward"]["up"], norm(p["norm2"], x))))


def twin_fusion(p, x, other, num_heads):
    token = dense(p["project"], gelu(norm(p["project_norm"], x[:1])))
    joined = norm(p["joined_norm"], np.concatenate([token, other[1:]]))
    token = token + twin_attention(p["attention"], joined[:1], joined, num_heads)
    return np.concatenate([dense(p["revert"], gelu(norm(p["revert_norm"], token))), x[1:]])


def test_model_equals_the_paper_written_in_numpy(tiny):
    params, x, _ = tiny
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(x, np.float64))
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        found = jax.jit(TINY.apply)({"params": params}, x)
        assert found.dtype == jnp.float64
    p, image = jax.tree.map(np.asarray, params), np.asarray(x)[0]
    branches = []
    for name, patch in (("small", 3), ("large", 4)):
        steps = range(0, 12, patch)
        patches = np.stack([image[i : i + patch, j : j + patch].reshape(-1) for i in steps for j in steps])
        tokens = np.concatenate([p[name]["class_token"][None], dense(p[name]["embed"]["projection"], patches)])
        branches.append(tokens + p[name]["position_embedding"])
    for encoder in (p["encoders_0"], p["encoders_1"]):
        branches[0] = twin_block(encoder["small_blocks_0"], branches[0], 2)
        for index in range(2):
            branches[1] = twin_block(encoder[f"large_blocks_{index}"], branches[1], 2)
        small, large = branches
        branches = [
            twin_fusion(encoder["small_fusion"], small, large, 2),
            twin_fusion(encoder["large_fusion"], large, small, 2),
        ]
    small, large = (
        norm(p[f"{name}_norm"], tokens[0]) for name, tokens in zip(("small", "large"), branches, strict=True)
    )
    expected = (dense(p["small_head"], small) + dense(p["large_head"], large)) / 2
    np.testing.assert_allclose(found[0], expected, atol=1e-10)


# What fusion does --------------------------------------------------------------------------------------------------


@pytest.fixture
def fusion(rng):
    layer = CrossFusion(num_heads=3)
    x, other = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(2, 7, 8), (2, 10, 12)])
    params = random_params(layer, x, other)
    return jax.jit(lambda x, other: layer.apply({"params": params}, x, other)), x, other


def test_fusion_touches_the_class_token_alone(fusion):
    apply, x, other = fusion
    out = apply(x, other)
    np.testing.assert_array_equal(out[:, 1:], x[:, 1:])
    assert np.abs(out[:, 0] - x[:, 0]).max() > 0.1
    # It hears every patch token of the other branch, but neither its class token nor the own patch tokens.
    for token in range(10):
        changed = np.abs(apply(x, other.at[:, token].multiply(-1.5))[:, 0] - out[:, 0]).max() > 1e-5
        assert changed == (token > 0)
    np.testing.assert_array_equal(apply(x.at[:, 1:].multiply(-2), other)[:, 0], out[:, 0])


def test_fusion_is_invariant_to_the_order_of_the_other_branch(fusion, rng):
    apply, x, other = fusion
    out = apply(x, other)
    order = np.concatenate([[0], 1 + rng.permutation(9)])
    np.testing.assert_allclose(apply(x, other[:, order]), out, atol=1e-5)
    # Control: the order of the own patch tokens is kept as it is, so another order is another output.
    own = np.concatenate([[0], 1 + np.roll(np.arange(6), 1)])
    moved = apply(x[:, own], other)
    assert np.abs(moved - out).max() > 0.1
    np.testing.assert_allclose(moved, out[:, own], atol=1e-5)


def test_fusion_costs_linearly_in_tokens_and_a_block_does_not():
    def cost(layer, *tokens):
        inputs = [jax.ShapeDtypeStruct((1, n, 8), jnp.float32) for n in tokens]
        shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
        return count_macs(layer.apply, shapes, *inputs)

    layer = CrossFusion(num_heads=2)
    first, second, third = (cost(layer, 5, 1 + n) for n in (100, 200, 300))
    assert third - second == second - first > 0
    assert cost(layer, 500, 101) == first
    block = TransformerBlock(num_heads=2)
    first, second, third = (cost(block, n) for n in (100, 200, 300))
    assert third - second > second - first


def test_branches_without_fusion_are_two_independent_transformers(tiny):
    params, x, logits = tiny

    def skip(call, args, kwargs, context):
        return args[0] if isinstance(context.module, CrossFusion) else call(*args, **kwargs)

    def without(x):
        with nn.intercept_methods(skip):
            return TINY.apply({"params": params}, x)

    class ViT(nn.Module):
        """A plain vision Transformer."""

        name_: str
        patch: int
        depth: int

        @nn.compact
        def __call__(self, x):
            embed = params[self.name_]
            kernel = embed["embed"]["projection"]["kernel"]
            kernel = kernel.reshape(self.patch, self.patch, 3, -1)
            x = jax.lax.conv_general_dilated(
                x, kernel, (self.patch,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = (x + embed["embed"]["projection"]["bias"]).reshape(len(x), -1, x.shape[-1])
            token = jnp.broadcast_to(embed["class_token"], (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([token, x], 1) + embed["position_embedding"]
            for index in range(self.depth):
                x = TransformerBlock(2, mlp_ratio=2.0, name=f"blocks_{index}")(x)
            x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
            return nn.Dense(3, name="head")(x[:, 0])

    expected = []
    for name, patch, depth in (("small", 3, 1), ("large", 4, 2)):
        blocks = [params[f"encoders_{e}"][f"{name}_blocks_{i}"] for e in range(2) for i in range(depth)]
        tree = {f"blocks_{index}": block for index, block in enumerate(blocks)}
        tree |= {"norm": params[f"{name}_norm"], "head": params[f"{name}_head"]}
        expected.append(jax.jit(ViT(name, patch, len(blocks)).apply)({"params": tree}, x))
    found = jax.jit(without)(x)
    np.testing.assert_allclose(found, (expected[0] + expected[1]) / 2, atol=1e-5)
    assert np.abs(found - logits).max() > 0.05


# The model -------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "crossvit_tiny_240": 7_014_800,
    "crossvit_small_240": 26_856_272,
    "crossvit_base_240": 105_025_232,
    "crossvit_9_240": 8_553_296,
    "crossvit_15_240": 27_528_464,
    "crossvit_18_240": 43_271_408,
    "crossvit_9_dagger_240": 8_776_592,
    "crossvit_15_dagger_240": 28_209_008,
    "crossvit_18_dagger_240": 44_266_976,
    "crossvit_15_dagger_408": 28_500_080,
    "crossvit_18_dagger_408": 44_606_560,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_have_the_published_number_of_parameters(name):
    variant = crossvit.VARIANTS[name]
    model = variant["module"](**{key: value for key, value in variant.items() if key not in ("module", "inputs")})
    shapes = jax.eval_shape(model.init, jax.random.key(0), *variant["inputs"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


def test_every_variant_is_published():
    assert set(crossvit.VARIANTS) == set(PUBLISHED)


def test_crossvit_15_has_the_published_cost():
    # 5.8 G in the paper; 5.791 G counted in an independent implementation, which does not count the resampling.
    variant = crossvit.VARIANTS["crossvit_15_240"]
    resampling = count_macs(lambda x: resample(x, (224, 224)), *variant["inputs"])
    assert abs((summarize(CrossViT(), *variant["inputs"]).macs - resampling) / 5.791e9 - 1) < 0.02


@pytest.mark.parametrize(("image_size", "grids"), [(224, (19, 13)), (240, (20, 14)), (256, (21, 15)), (30, (2, 2))])
def test_any_image_size_makes_whole_patches(image_size, grids):
    model = CrossViT(image_size=image_size, embed_dim=(4, 4), depths=(1, 1), num_encoders=1, num_heads=(1, 1))
    x = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    small, large = jax.eval_shape(nn.apply(CrossViT.tokens, model), shapes, x)
    assert (small.shape[1], large.shape[1]) == (1 + grids[0] ** 2, 1 + grids[1] ** 2)


def test_images_of_another_size_are_resampled(tiny):
    params, _, _ = tiny
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 17, 9, 3)), jnp.float32)

    def embedded(x):
        def skip(call, args, kwargs, context):
            return args if type(context.module).__name__ == "_Encoder" else call(*args, **kwargs)

        with nn.intercept_methods(skip):
            return nn.apply(CrossViT.tokens, TINY)({"params": params}, x)

    for found, expected in zip(embedded(x), embedded(resample(x, (12, 12))), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_conv_embed_makes_the_same_grid():
    model = TINY.clone(image_size=48, patch_size=(12, 16), conv_embed=True)
    x = jnp.ones((1, 48, 48, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    small, large = jax.eval_shape(nn.apply(CrossViT.tokens, model), shapes, x)
    assert (small.shape, large.shape) == ((1, 17, 4), (1, 10, 8))


def test_without_head_the_output_is_both_class_tokens(tiny):
    params, x, logits = tiny
    kept = {name: value for name, value in params.items() if not name.endswith("_head")}
    both = jax.jit(TINY.clone(num_classes=0).apply)({"params": kept}, x)
    heads = [nn.Dense(3).apply({"params": params[f"{name}_head"]}, part) for name, part in
             (("small", both[:, :4]), ("large", both[:, 4:]))]  # fmt: skip
    np.testing.assert_allclose((heads[0] + heads[1]) / 2, logits, atol=1e-5)


@pytest.mark.slow
def test_drop_path_rates_grow_over_encoders():
    model = TINY.clone(drop_path_rate=0.9, image_size=(3, 4))
    x = jnp.ones((300, 3, 4, 3))
    params = random_params(model, x)
    state = jax.jit(
        lambda key: model.apply(
            {"params": params},
            x,
            deterministic=False,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: type(module).__name__ == "DropPath",
        )[1]["intermediates"]
    )(jax.random.key(0))
    lost = {}
    for path, outputs in flax.traverse_util.flatten_dict(state).items():
        if path[-1] == "__call__":
            lost["/".join(path[:2])] = np.mean([np.all(np.asarray(out) == 0, axis=(1, 2)) for out in outputs])
    rates = {"small_blocks_0": 0, "large_blocks_0": 0, "large_blocks_1": 1, "small_fusion": 1, "large_fusion": 1}
    for encoder in range(2):
        for name, step in rates.items():
            assert abs(lost[f"encoders_{encoder}/{name}"] - 0.3 * (2 * encoder + step)) < 0.08, name


@pytest.mark.slow
def test_remat_changes_neither_logits_nor_gradients():
    model = TINY.clone(num_encoders=1, depths=(1, 1), embed_dim=(2, 2), num_heads=(1, 1), mlp_ratio=1.0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 12, 12, 1)), jnp.float32)
    params = random_params(model, x)

    def run(policy):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.clone(remat=policy).apply({"params": p}, x))))

    plain, found = jax.jit(run("none"))(params), jax.jit(run("full"))(params)
    assert "remat" in str(jax.make_jaxpr(run("full"))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), found, plain)


def test_softmax_and_norm_statistics_stay_in_float32_under_bfloat16():
    layer = CrossFusion(num_heads=2, dtype=jnp.bfloat16)
    x = jnp.ones((1, 3, 4), jnp.bfloat16)
    program = str(jax.make_jaxpr(layer.apply)({"params": random_params(layer, x, x)}, x, x))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    assert not re.search(r":f32\[[\d,]*\] = dot_general", program)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_resize_fits_the_positions_and_leaves_the_rest(tiny):
    params, _, _ = tiny
    target = TINY.clone(image_size=(24, 12), drop_path_rate=0.5)
    resized = crossvit.resize(params, TINY, target)
    shapes = jax.eval_shape(target.init, jax.random.key(0), jnp.ones((1, 24, 12, 3)))["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)
    before, after = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params, resized))
    changed = {path for path in before if after[path] is not before[path]}
    assert changed == {"small/position_embedding", "large/position_embedding"}
    table, new = before["small/position_embedding"], after["small/position_embedding"]
    np.testing.assert_array_equal(new[0], table[0])
    # Bicubic resampling keeps a constant and the mean over a doubled axis away from the border.
    flat = crossvit.resize(jax.tree.map(jnp.ones_like, params), TINY, target)
    np.testing.assert_allclose(flat["small"]["position_embedding"], 1.0, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, crossvit.resize(params, TINY, TINY), params)


@pytest.mark.parametrize("change", [{"patch_size": (3, 6)}, {"num_encoders": 3}, {"num_classes": 2}])
def test_resize_refuses_what_it_cannot_bridge(tiny, change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{field}={value} must equal the {field}={getattr(TINY, field)}")):
        crossvit.resize(tiny[0], TINY, TINY.clone(**change))


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(crossvit.no_decay(tiny[0]))
    assert {path[-1] for path, without in flat.items() if without} == {
        "bias",
        "scale",
        "class_token",
        "position_embedding",
    }
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks_over_encoders(tiny):
    ids = crossvit.layer_ids(tiny[0], TINY)

    def only(tree):
        return set(jax.tree.leaves(tree))

    assert only(ids["small"]) == only(ids["large"]) == {0}
    names = ("small_blocks_0", "large_blocks_0", "large_blocks_1", "small_fusion", "large_fusion")
    assert [only(ids["encoders_0"][name]) for name in names] == [{1}, {1}, {2}, {2}, {2}]
    assert [only(ids["encoders_1"][name]) for name in names] == [{3}, {3}, {4}, {4}, {4}]
    assert only(ids["large_norm"]) == only(ids["small_head"]) == {5}


def to_reference(params, source, patches=None):
    """Write our parameters the way a reference stores them."""
    table, tensors = crossvit.REFERENCE_NAMES[source], {}
    patches = patches or {"small": 3, "large": 4}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        if path.endswith("embed/projection/kernel"):
            side = patches[path.partition("/")[0]]
            leaf = leaf.reshape(side, side, -1, leaf.shape[-1]).transpose(3, 2, 0, 1)
        elif path.endswith("kernel"):
            leaf = leaf.T
        elif path.endswith("class_token"):
            leaf = leaf[None, None]
        elif path.endswith("position_embedding"):
            leaf = leaf[None]
        tensors[reference_name(path, table)] = leaf
    fused = {}
    for name, leaf in tensors.items():
        module, _, kind = name.rpartition(".")
        stem, _, part = module.rpartition(".")
        fused.setdefault(f"{stem}.qkv.{kind}" if part in ("query", "key", "value") else name, []).append((part, leaf))
    order = {"query": 0, "key": 1, "value": 2}
    return {
        name: np.concatenate([leaf for _, leaf in sorted(parts, key=lambda one: order[one[0]])])
        if len(parts) == 3
        else parts[0][1]
        for name, parts in fused.items()
    }


@pytest.mark.parametrize("source", crossvit.REFERENCE_NAMES)
def test_reference_names_cover_every_parameter(tiny, source):
    params, _, _ = tiny
    tensors = to_reference(params, source)
    assert any(name.endswith("qkv.weight") for name in tensors)
    jax.tree.map(np.testing.assert_array_equal, crossvit.from_reference(tensors, TINY, source=source), params)


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0], "timm")
    with pytest.raises(ValueError, match="source='tim' must be one of"):
        crossvit.from_reference(tensors, TINY, source="tim")
    with pytest.raises(ValueError, match=r"source='official' must hold 'cls_token.0'"):
        crossvit.from_reference(tensors, TINY, source="official")
    with pytest.raises(ValueError, match=r"missing \['norm.0.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "norm.0.bias"}
        crossvit.from_reference(incomplete, TINY, source="timm")
    with pytest.raises(ValueError, match=r"pos_embed_\d must give .* its shape \(\d+, \d\), not \(1, \d+, \d\)"):
        crossvit.from_reference(tensors, TINY.clone(image_size=24), source="timm")


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (CrossViT, CrossFusion):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13
