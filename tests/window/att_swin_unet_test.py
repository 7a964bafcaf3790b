"""Att-SwinU-Net: parts, limits and the public code's numbers.

`golden/att_swin_unet_parity.npz` holds what github.com/NITR098/AttSwinUNet at commit 4b14f37 computes on the weights of
`seeded` and `image`: logits (every third row, fifth column) of a model with patches of 4, width 8, depths (1, 2, 1, 1),
heads (1, 2, 4, 4), windows of 2 and MLPs of ratio 2 on two images of 64 x 64, one layer of its cross attention and one
of its expanding, and the shapes of all its parameters. To make it run at all, the attribute `isxvit` that its decoder
lacks was set, `torch.load` of a checkpoint that it does not use was left out, and the size 224, which its last layer
assumes, was changed to 64. Computed in PyTorch, with its spatial attention switched on and off: to the bit the same.
"""

import functools
import json
import re
import zlib
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.patches import to_patches
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import PatchMerging, SwinBlock, att_swin_unet
from jaxlayers.window.att_swin_unet import (
    SKIPS,
    AttSwinUNet,
    CrossContextualAttention,
    PatchExpanding,
    SharedAttentionBlock,
    from_reference,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "att_swin_unet_parity.npz"
KEY_BIAS = {r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
CROSS = functools.partial(CrossContextualAttention, num_heads=2, head_dim=3, depth=1)
TINY = AttSwinUNet(
    num_classes=2,
    patch_size=2,
    embed_dim=4,
    depths=(2, 1),
    num_heads=(1, 2),
    window_size=(3, 2),
    mlp_ratio=1.0,
    cross_attention=CROSS,
    drop_path_rate=0.0,
    kernel_init=nn.initializers.lecun_normal(),
)

CASES = (
    Case(
        name="patch_expanding",
        within="att_swin_unet",
        module=PatchExpanding(factor=(2, 3)),
        inputs=lambda rng: (rng.normal(size=(2, 3, 2, 6)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=5 of the input must be even", inputs=lambda rng: (np.ones((1, 2, 2, 5)),)),
            BadInput(match="features=0 must be positive; set features", module=PatchExpanding(0)),
            BadInput(match="factor=0 must be a positive int or two", module=PatchExpanding(factor=0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 4)),)),
        ),
    ),
    Case(
        name="cross_contextual_attention",
        within="att_swin_unet",
        module=CROSS(kernel_init=nn.initializers.lecun_normal()),
        inputs=lambda rng: (rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(2, 3, 4, 6))),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="num_heads=0, head_dim=3, depth=1 must be positive", module=CROSS(num_heads=0)),
            BadInput(match="depth=0 must be positive; set them", module=CROSS(depth=0)),
            BadInput(
                match=r"must have one shape; got \(1, 3, 4, 6\) and \(1, 3, 5, 6\)",
                inputs=lambda rng: (np.ones((1, 3, 4, 6)), np.ones((1, 3, 5, 6))),
            ),
            BadInput(
                match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 6)), np.ones((4, 6)))
            ),
        ),
    ),
    Case(
        name="shared_attention_block",
        within="att_swin_unet",
        module=SharedAttentionBlock(num_heads=2, window_size=(2, 3), shift_size=1, mlp_ratio=1.0),
        # Five windows' worth of a map that fits no window: six windows of six tokens.
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 8)), rng.uniform(size=(2, 6, 2, 6, 6))),
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=SharedAttentionBlock(3)),
            BadInput(match="must name 1 to 3 axes, equally many", module=SharedAttentionBlock(2, (2, 2), (1,))),
            BadInput(match=r"of shape \(2, 6, 2, 6, 6\) must have .* \(2, 4, 2, 9", module=SharedAttentionBlock(2, 3)),
            BadInput(
                match=r"rate=1.0 must lie in \[0, 1\)", module=SharedAttentionBlock(2, (2, 3), drop_path_rate=1.0)
            ),
        ),
    ),
    Case(
        name="att_swin_unet",
        module=TINY,
        inputs=lambda rng: (rng.normal(size=(2, 11, 9, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"depths=\(2,\) and num_heads=\(1, 2\) must have one", module=TINY.clone(depths=(2,))),
            BadInput(match="and at least two stages", module=TINY.clone(depths=(2,), num_heads=(1,))),
            BadInput(match="one positive entry for each stage", module=TINY.clone(depths=(2, 0))),
            BadInput(match="num_classes=0 must be positive", module=TINY.clone(num_classes=0)),
            BadInput(match="skip='add' must be one of .*'concatenation'", module=TINY.clone(skip="add")),
            BadInput(match="window_size=0 must be a positive int or two", module=TINY.clone(window_size=0)),
            BadInput(match=r"patch_size=\(2, 2, 2\) must be a positive", module=TINY.clone(patch_size=(2, 2, 2))),
            BadInput(match="features=4 must be divisible by num_heads=3", module=TINY.clone(num_heads=(3, 2))),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=TINY.clone(drop_path_rate=1.0)),
            BadInput(match="remat='ful' must be one of", module=TINY.clone(remat="ful")),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((8, 3)),)),
        ),
    ),
)


def random_params(module, *inputs, seed=0):
    """Random parameters in the shape of `module`'s, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def run(module, params, *inputs):
    return jax.jit(module.apply)({"params": params}, *inputs)


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Expanding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (2, 2)])
def test_expanding_is_the_shape_inverse_of_merging(size):
    x = jax.ShapeDtypeStruct((2, *size, 6), jnp.float32)
    merged, _ = jax.eval_shape(PatchMerging().init_with_output, jax.random.key(0), x)
    back, _ = jax.eval_shape(PatchExpanding().init_with_output, jax.random.key(0), merged)
    assert merged.shape == (2, size[0] // 2, size[1] // 2, 12)
    assert back.shape == x.shape


def test_expanding_with_matching_weights_undoes_the_rearrangement_of_merging():
    # Without norms merging moves pixels into features, first axis fastest; expanding lays them out again, if its
    # kernel puts the four neighbours in its own order.
    class Nothing(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x

    x = array(2, 4, 6, 3)
    merged = PatchMerging(12, norm=lambda **_: Nothing()).apply({"params": {"reduction": {"kernel": jnp.eye(12)}}}, x)
    np.testing.assert_array_equal(merged, to_patches(x, (2, 2), first_axis_fastest=True))
    expand = PatchExpanding(3, norm=lambda **_: Nothing())
    order = np.arange(12).reshape(4, 3)[[0, 2, 1, 3]].ravel()
    kernel = np.eye(12, dtype=np.float32)[:, order]
    np.testing.assert_array_equal(expand.apply({"params": {"expand": {"kernel": kernel}}}, merged), x)
    # Negative control: the identity leaves two of four pixels exchanged.
    wrong = expand.apply({"params": {"expand": {"kernel": jnp.eye(12)}}}, merged)
    np.testing.assert_array_equal(wrong[:, ::2, ::2], x[:, ::2, ::2])
    np.testing.assert_array_equal(wrong[:, 1::2, ::2], x[:, ::2, 1::2])
    assert not np.array_equal(wrong, x)


# Cross-contextual attention ---------------------------------------------------------------------------------------


def layer_norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def twin_exchange(params, x, y, *, heads, dim, depth, first_token):
    """One map [tokens, features] after learning from another, in NumPy."""
    start = summary = x.mean(0)
    for index in range(depth):
        p = params[f"decoders_{index}"]
        asking = layer_norm(p["pre_norm"], summary)
        context = np.vstack([asking, y[1:] if first_token else y])
        out = []
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            query, key, value = (
                asking @ p["query"]["kernel"][:, part],
                *(context @ p[name]["kernel"][:, part] for name in ("key", "value")),
            )
            weights = np.exp(key @ query / np.sqrt(dim))
            out.append(weights / weights.sum() @ value)
        summary = summary + np.concatenate(out) @ p["out"]["kernel"] + p["out"]["bias"]
    return np.vstack([summary, x[1:]]) if first_token else x + summary - start


@pytest.mark.parametrize("first_token", [False, True])
def test_exchange_equals_its_twin(first_token):
    layer = CrossContextualAttention(num_heads=2, head_dim=3, depth=2, first_token=first_token)
    x, y = array(3, 4, 5), array(3, 4, 5, seed=1)
    params = random_params(layer, x, y)
    found, _ = run(layer, params, x, y)
    flat = (np.asarray(each, np.float64).reshape(12, 5) for each in (x, y))
    expected = twin_exchange(jax.tree.map(np.asarray, params), *flat, heads=2, dim=3, depth=2, first_token=first_token)
    np.testing.assert_allclose(found.reshape(12, 5), expected, atol=2e-5)


def test_both_maps_learn_from_each_other_alike():
    layer = CROSS()
    x, y = array(3, 4, 5), array(3, 4, 5, seed=1)
    params = random_params(layer, x, y)
    swapped = {"decoders_0": params["encoders_0"], "encoders_0": params["decoders_0"]}
    found, back = run(layer, params, x, y), run(layer, swapped, y, x)
    np.testing.assert_allclose(found[0], back[1], atol=1e-6)
    np.testing.assert_allclose(found[1], back[0], atol=1e-6)
    assert np.abs(found[0] - run(layer, params, y, x)[1]).max() > 0.1


def test_exchange_is_equivariant_to_permutations_but_not_where_a_token_is_overwritten():
    x, y = array(1, 3, 4, 5), array(1, 3, 4, 5, seed=1)
    order = np.random.default_rng(2).permutation(12)

    def permuted(map_):
        return map_.reshape(1, 12, 5)[:, order].reshape(map_.shape)

    for first_token in (False, True):
        layer = CROSS(first_token=first_token)
        params = random_params(layer, x, y)
        found = run(layer, params, permuted(x), y)[0]
        error = np.abs(found - permuted(run(layer, params, x, y)[0])).max()
        assert (error < 1e-5) == (not first_token)


# Shared weights ---------------------------------------------------------------------------------------------------

BLOCK = {"num_heads": 2, "window_size": 4, "shift_size": 2, "mlp_ratio": 2.0, "mask_padding": True}


def test_block_without_shared_weights_is_a_swin_block():
    x = array(2, 7, 10, 8)
    swin, shared = SwinBlock(**BLOCK), SharedAttentionBlock(**BLOCK)
    params = random_params(swin, x)
    assert jax.tree.map(jnp.shape, random_params(shared, x)) == jax.tree.map(jnp.shape, params)
    expected = run(swin, params, x)
    found, weights = run(shared, params, x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert weights.shape == (2, 6, 2, 16, 16)
    np.testing.assert_allclose(np.sum(weights, -1), 1.0, atol=1e-5)
    # Weights of nothing change nothing; uniform ones do.
    same, _ = run(shared, params, x, jnp.zeros_like(weights))
    np.testing.assert_allclose(same, expected, atol=1e-6)
    other, _ = run(shared, params, x, jnp.full_like(weights, 1 / 16))
    assert np.abs(other - expected).max() > 0.1


def test_own_weights_shared_double_what_attention_gives():
    x = array(1, 4, 4, 8)
    block = SharedAttentionBlock(num_heads=2, window_size=4, mlp_ratio=1.0)
    params = random_params(block, x)
    params["attention"]["out"]["bias"] = jnp.zeros(8)
    # An MLP of nothing leaves x + A V W_out.
    params["feed_forward"]["down"] = jax.tree.map(jnp.zeros_like, params["feed_forward"]["down"])
    once, weights = run(block, params, x)
    twice, returned = run(block, params, x, weights)
    np.testing.assert_allclose(twice - x, 2 * (once - x), atol=1e-5)
    # What is handed on are the block's own weights, without those it was handed.
    np.testing.assert_array_equal(returned, weights)


def test_shared_weights_never_join_what_the_shift_wraps():
    # Weights of a block with the same shift are 0 across the seam, so corners stay apart; of one without they are not.
    x = array(1, 8, 8, 8)
    block = SharedAttentionBlock(**BLOCK)
    params = random_params(block, x)
    apply = jax.jit(block.apply)
    shifted, plain = apply({"params": params}, x)[1], run(block.clone(shift_size=0), params, x)[1]
    moved = x.at[0, 0, 0].add(np.random.default_rng(1).normal(size=8).astype(np.float32))
    for weights, is_apart in ((shifted, True), (plain, False)):
        change = np.abs(apply({"params": params}, moved, weights)[0] - apply({"params": params}, x, weights)[0])
        assert (change[0, 6:, 6:].max() == 0) == is_apart


# The model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A small model, its parameters, images that fit no patch or window, and logits."""
    x = array(2, 11, 14, 3, seed=1)
    params = random_params(TINY, x)
    return params, x, run(TINY, params, x)


def without_exchange(params):
    """The parameters with exchanges that add nothing: W_out and its bias are zero."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    flat = {
        path: jnp.zeros_like(leaf) if re.match(r"exchanges_\d+/.*/out/", path) else leaf for path, leaf in flat.items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def plain_part(params):
    return {name: value for name, value in params.items() if not name.startswith("exchanges_")}


def test_cross_attention_that_adds_nothing_is_the_concatenation_of_swin_unet(tiny):
    params, x, _ = tiny
    plain = run(TINY.clone(skip="concatenation"), plain_part(params), x)
    cross = jax.jit(TINY.clone(skip="cross_contextual").apply)
    np.testing.assert_allclose(cross({"params": without_exchange(params)}, x), plain, atol=1e-6)
    assert np.abs(cross({"params": params}, x) - plain).max() > 1e-2
    # Where the summary overwrites a token, even an exchange of nothing loses that token.
    overwriting = TINY.clone(skip="cross_contextual", cross_attention=functools.partial(CROSS, first_token=True))
    assert np.abs(run(overwriting, without_exchange(params), x) - plain).max() > 1e-2


def test_the_four_skips_are_four_models_and_sharing_weights_takes_no_parameters(tiny):
    params, x, _ = tiny
    logits = {}
    for skip in SKIPS:
        model = TINY.clone(skip=skip)
        own = params if skip in ("both", "cross_contextual") else plain_part(params)
        assert jax.tree.structure(own) == jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
        logits[skip] = run(model, own, x)
    names = list(SKIPS)
    for index, one in enumerate(names):
        for other in names[:index]:
            assert np.abs(logits[one] - logits[other]).max() > 1e-2


def test_attention_is_dense_when_the_window_is_the_map():
    # The whole map in one window: a token far away is heard by the block; in windows of two it is not.
    x = array(1, 6, 6, 8)
    far = x.at[0, 5, 5].add(np.random.default_rng(1).normal(size=8).astype(np.float32))
    for window, heard in ((6, True), (2, False)):
        block = SharedAttentionBlock(num_heads=2, window_size=window, mlp_ratio=1.0)
        params = random_params(block, x)
        change = np.abs(run(block, params, far)[0] - run(block, params, x)[0])
        assert (change[0, 0, 0].max() > 0) == heard
    # And it is the softmax over all tokens that the equation says.
    block = SharedAttentionBlock(num_heads=1, window_size=6, mlp_ratio=1.0)
    params = random_params(block, x)
    params["attention"]["relative_position_bias_table"] = jnp.zeros((121, 1))
    _, weights = run(block, params, x)
    p = jax.tree.map(np.asarray, params)
    tokens = layer_norm(p["norm1"], np.asarray(x, np.float64)).reshape(36, 8)
    query, key = (tokens @ p["attention"][name]["kernel"] + p["attention"][name]["bias"] for name in ("query", "key"))
    scores = np.exp(query @ key.T / np.sqrt(8))
    np.testing.assert_allclose(weights[0, 0, 0], scores / scores.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 12), (13, 30)])
def test_logits_have_the_size_of_the_image(size):
    model = TINY.clone(depths=(2, 2, 1), num_heads=(1, 2, 2), patch_size=(3, 2))
    image = jax.ShapeDtypeStruct((2, *size, 1), jnp.float32)
    found, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert found.shape == (2, *size, 2)


def test_padding_to_a_whole_patch_by_hand_changes_nothing_that_is_kept(tiny):
    params, x, logits = tiny
    padded = jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)])
    np.testing.assert_allclose(run(TINY, params, padded)[:, :11], logits, atol=1e-5)
    # A whole further row of tokens is heard through the windows.
    more = jnp.pad(x, [(0, 0), (0, 3), (0, 0), (0, 0)])
    assert np.abs(run(TINY, params, more)[:, :11] - logits).max() > 1e-3


def gradient(model, params, x):
    return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, x)))))(params)


def test_remat_changes_no_gradient_and_is_in_the_program():
    model = TINY.clone(depths=(1, 1))
    x = array(1, 6, 6, 3)
    params = random_params(model, x)
    expected = jax.tree.leaves(gradient(model, params, x))
    for policy in ("attention", "full"):
        other = model.clone(remat=policy)
        for found, one in zip(jax.tree.leaves(gradient(other, params, x)), expected, strict=True):
            np.testing.assert_allclose(found, one, atol=1e-4 * max(1.0, float(np.abs(one).max())))
        program = str(jax.make_jaxpr(jax.grad(lambda p, m=other: jnp.sum(m.apply({"params": p}, x))))(params))
        assert "remat" in program or "checkpoint" in program


# The public code --------------------------------------------------------------------------------------------------

PUBLIC = AttSwinUNet(
    num_classes=9,
    embed_dim=8,
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 4, 4),
    window_size=2,
    mlp_ratio=2.0,
    skip="cross_contextual",
    cross_attention=functools.partial(CrossContextualAttention, first_token=True),
)


def seeded(name, shape):
    """The weights that the public code was run with."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = rng.normal(size=shape).astype(np.float32)
    if len(shape) > 1 and "table" not in name:
        return value * np.float32(1.5 / np.sqrt(np.prod(shape[1:])))
    return value * np.float32(0.3) + np.float32(".norm" in name and name.endswith("weight"))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        found = dict(arrays)
    shapes = json.loads(found.pop("shapes").tobytes())
    return found, {name: seeded(name, shape) for name, shape in shapes.items()}


def without_cross(tensors):
    return {name: tensor for name, tensor in tensors.items() if "Crossvit" not in name}


@pytest.mark.parametrize("skip", ["cross_contextual", "concatenation"])
def test_logits_equal_those_of_the_public_code(golden, skip):
    arrays, tensors = golden
    model = PUBLIC.clone(skip=skip)
    params = from_reference(tensors if skip == "cross_contextual" else without_cross(tensors), model)
    found = run(model, params, array(2, 64, 64, 3))[:, ::3, ::5]
    expected = arrays[f"logits/{skip}"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_parts_equal_those_of_the_public_code(golden):
    arrays, tensors = golden
    params = from_reference(tensors, PUBLIC)
    maps = (arrays[f"cross/{side}_in"].reshape(2, 3, 4, 16) for side in ("decoder", "encoder"))
    found = run(CrossContextualAttention(first_token=True), params["exchanges_1"], *maps)
    for side, one in zip(("decoder", "encoder"), found, strict=True):
        np.testing.assert_allclose(one.reshape(2, 12, 16), arrays[f"cross/{side}_out"], atol=1e-5)
    x = arrays["expand/in"].reshape(2, 4, 4, 32)
    found = run(PatchExpanding(), params["expands_1"], x)
    np.testing.assert_allclose(found.reshape(2, 64, 16), arrays["expand/out"], atol=1e-5)


def test_checkpoints_that_do_not_fit_are_refused(golden):
    _, tensors = golden
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        from_reference(tensors, PUBLIC, source="timm")
    with pytest.raises(ValueError, match=r"unknown \['decoder.Crossvit_layer"):
        from_reference(tensors, PUBLIC.clone(skip="concatenation"))
    with pytest.raises(ValueError, match=r"missing \[.*'decoder.Crossvit_layer"):
        from_reference(without_cross(tensors), PUBLIC)
    with pytest.raises(ValueError, match="must give .* its shape"):
        from_reference(tensors, PUBLIC.clone(window_size=3))


# Parameters of the public code's configuration, counted there: 46,901,892 (41,388,804 without its cross attention), of
# which 7,968 belong to a second patch embedding and a norm that it makes and never uses.
COUNTED = {"both": 46_893_924, "concatenation": 41_380_836}


def build(name, **changes):
    fields = {
        key: value for key, value in att_swin_unet.VARIANTS[name].items() if key not in ("module", "inputs")
    } | changes
    return AttSwinUNet(**fields), att_swin_unet.VARIANTS[name]["inputs"]


@pytest.mark.parametrize("skip", COUNTED)
def test_variants_have_the_parameters_of_the_public_code(skip):
    model, inputs = build("att_swin_unet", skip=skip)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    assert logits.shape == (1, 224, 224, 9)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == COUNTED[skip]


def test_published_variant_is_what_the_public_code_computes():
    model, _ = build("att_swin_unet_published")
    assert model.skip == "cross_contextual"
    assert model.cross_attention().first_token
    assert not build("att_swin_unet")[0].cross_attention().first_token
