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
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import TNT, TNTBlock, tnt

TINY = TNT(
    num_classes=3,
    image_size=(10, 8),
    patch_size=4,
    word_stride=2,
    embed_dim=(4, 6),
    depth=2,
    num_heads=(2, 3),
    mlp_ratio=2.0,
    drop_path_rate=0.0,
)
BLOCK = TNTBlock(num_heads=(2, 3), mlp_ratio=2.0)

CASES = (
    Case(
        name="tnt_block",
        within="tnt",
        module=BLOCK,
        inputs=lambda rng: (rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 6, 6))),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"num_heads=\(2, 3, 4\) must be \(inner, outer\)", module=TNTBlock((2, 3, 4))),
            BadInput(match="features=4 must be divisible by num_heads=3", module=TNTBlock((3, 3))),
            BadInput(match="features=6 must be divisible by num_heads=4", module=TNTBlock((2, 4))),
            BadInput(
                match=r"must agree; got \(2, 5, 3, 4\) and \(2, 5, 6\)",
                inputs=lambda rng: (np.ones((2, 5, 3, 4)), np.ones((2, 5, 6))),
            ),
        ),
    ),
    Case(
        name="tnt",
        module=TINY.clone(depth=1),
        inputs=lambda rng: (rng.normal(size=(2, 10, 8, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="depth=0 must be positive", module=TINY.clone(depth=0)),
            BadInput(match="num_classes=-1 not negative", module=TINY.clone(num_classes=-1)),
            BadInput(match="patch_size=4 must be divisible by word_stride=3", module=TINY.clone(word_stride=3)),
            BadInput(match=r"embed_dim=\(4,\) must be \(inner, outer\)", module=TINY.clone(embed_dim=(4,))),
            BadInput(match=r"image_size=\(8,\) must be a positive int or", module=TINY.clone(image_size=(8,))),
            BadInput(match=r"rate=1.5 must lie in", module=TINY.clone(drop_path_rate=1.5)),
            BadInput(
                match=r"spatial size \(8, 8\) must be image_size=\(10, 8\); resize the images, or the parameters",
                inputs=lambda rng: (np.ones((1, 8, 8, 3)),),
            ),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 10, 8, 3), int),)),
        ),
    ),
    Case(
        name="tnt_legacy",
        module=TINY.clone(depth=1, legacy=True, embed_dim=(4, 4), num_heads=(1, 1)),
        inputs=lambda rng: (rng.normal(size=(2, 10, 8, 1)),),
        bad_inputs=(BadInput(match="2 spatial axes needs at least 3", inputs=lambda rng: (np.ones((10, 8)),)),),
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
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, 8, 3)), jnp.float32)
    params = random_params(TINY, x)
    return params, x, jax.jit(TINY.apply)({"params": params}, x)


@pytest.fixture
def tokens(rng):
    """Words of five patches, and class token and patches."""
    return jnp.asarray(rng.normal(size=(2, 5, 3, 4)), jnp.float32), jnp.asarray(rng.normal(size=(2, 6, 6)), jnp.float32)


# An independent twin: NumPy, patch by patch ------------------------------------------------------------------------


def norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def twin_transformer(p, x, num_heads):
    y = norm(p["norm1"], x)
    query, key, value = (y @ p["attention"][name]["kernel"] for name in ("query", "key", "value"))
    dim = x.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * dim, (head + 1) * dim)
        weights = np.exp(query[:, part] @ key[:, part].T / math.sqrt(dim))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
    x = x + np.concatenate(heads, -1) @ p["attention"]["out"]["kernel"] + p["attention"]["out"]["bias"]
    hidden = norm(p["norm2"], x) @ p["feed_forward"]["up"]["kernel"] + p["feed_forward"]["up"]["bias"]
    hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + hidden @ p["feed_forward"]["down"]["kernel"] + p["feed_forward"]["down"]["bias"]


def twin_block(p, words, patches, *, legacy):
    words = np.stack([twin_transformer(p["inner"], one, 2) for one in words])
    patches = patches.copy()
    for index, one in enumerate(words):
        if legacy:
            told = norm(p["project_norm"], one).reshape(-1) @ p["project"]["kernel"] + p["project"]["bias"]
        else:
            told = norm(p["post_norm"], norm(p["project_norm"], one.reshape(-1)) @ p["project"]["kernel"])
        patches[index + 1] += told
    return words, twin_transformer(p["outer"], patches, 3)


@pytest.mark.parametrize("legacy", [False, True])
def test_block_equals_a_loop_over_patches(legacy, tokens):
    block = BLOCK.clone(legacy=legacy)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(np.asarray(one, np.float64)) for one in tokens]
        params = random_params(block, *inputs, dtype=np.float64)
        found = jax.jit(block.apply)({"params": params}, *inputs)
    expected = twin_block(jax.tree.map(np.asarray, params), *(np.asarray(one)[0] for one in inputs), legacy=legacy)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[0], other, atol=1e-11)


# What the paper claims ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pixel_stays_in_the_words_of_its_patch_and_reaches_all_patches(legacy):
    # Patches of 8 pixels, words of 2; the image has 3 x 2 of them, the last row of which is half padding.
    model = TINY.clone(image_size=(20, 16), patch_size=8, legacy=legacy)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 20, 16, 3)), jnp.float32)
    params = random_params(model, x)
    run = jax.jit(lambda x: nn.apply(TNT.tokens, model)({"params": params}, x))
    words, patches = run(x)
    assert (words.shape, patches.shape) == ((1, 6, 16, 4), (1, 7, 6))
    rng = np.random.default_rng(3)
    leaked = set()
    for row, column in [(0, 0), (4, 3), (7, 4), (3, 7), (8, 8), (15, 15), (18, 2), (7, 7)]:
        # A random direction: the same step in all channels could hide.
        moved_words, moved_patches = run(x.at[0, row, column].add(jnp.asarray(5 * rng.normal(size=3), jnp.float32)))
        home = (row // 8) * 2 + column // 8
        changed = np.any(moved_words != words, axis=(0, -1))
        assert np.all(changed[home]), "attention inside the patch must reach each of its words"
        leaked |= {int(patch) - home for patch in np.flatnonzero(changed.any(-1))} - {0}
        assert np.all(np.any(moved_patches != patches, axis=(0, -1))), "the outer block must reach every patch"
    # Negative control: the convolution over the whole image looks up to three pixels across the border.
    assert leaked == ({-3, -2, -1, 1, 2, 3} if legacy else set())


def test_block_without_word_projection_is_a_plain_transformer_block(tokens):
    words, patches = tokens
    params = random_params(BLOCK, *tokens)
    silent = {
        **params,
        "project": {"kernel": jnp.zeros_like(params["project"]["kernel"])},
        "post_norm": {**params["post_norm"], "bias": jnp.zeros_like(params["post_norm"]["bias"])},
    }
    plain = TransformerBlock(3, mlp_ratio=2.0, use_bias=False, norm=tnt.layer_norm)
    expected = jax.jit(plain.apply)({"params": params["outer"]}, patches)
    run = jax.jit(BLOCK.apply)
    np.testing.assert_allclose(run({"params": silent}, words, patches)[1], expected, atol=1e-6)
    assert np.abs(run({"params": params}, words, patches)[1] - expected).max() > 0.1


def test_silent_words_make_the_model_a_plain_transformer(tiny):
    params, x, logits = tiny
    silent = dict(params)
    for name in ("blocks_0", "blocks_1"):
        silent[name] = {
            **params[name],
            "project": jax.tree.map(jnp.zeros_like, params[name]["project"]),
            "post_norm": {**params[name]["post_norm"], "bias": jnp.zeros(6)},
        }

    @jax.jit
    def vit(x):
        # The first tokens still come from the words.
        def skip(call, args, kwargs, context):
            return args if isinstance(context.module, TNTBlock) else call(*args, **kwargs)

        with nn.intercept_methods(skip):
            _, tokens = nn.apply(TNT.tokens, TINY)({"params": params}, x)
        block = TransformerBlock(3, mlp_ratio=2.0, use_bias=False, norm=tnt.layer_norm)
        for name in ("blocks_0", "blocks_1"):
            tokens = block.apply({"params": params[name]["outer"]}, tokens)
        token = tnt.layer_norm().apply({"params": params["final_norm"]}, tokens[:, 0])
        return nn.Dense(3).apply({"params": params["head"]}, token)

    found = jax.jit(TINY.apply)({"params": silent}, x)
    np.testing.assert_allclose(found, vit(x), atol=1e-5)
    assert np.abs(found - logits).max() > 0.05


def test_block_commutes_with_permutations_of_the_patches(tokens, rng):
    words, patches = tokens
    params = random_params(BLOCK, *tokens)
    run = jax.jit(lambda *inputs: BLOCK.apply({"params": params}, *inputs))
    new_words, new_patches = run(words, patches)
    order = rng.permutation(5)
    with_class = np.concatenate([[0], 1 + order])
    found = run(words[:, order], patches[:, with_class])
    np.testing.assert_allclose(found[0], new_words[:, order], atol=1e-5)
    np.testing.assert_allclose(found[1], new_patches[:, with_class], atol=1e-5)
    # Negative control: the words must go with their patches.
    assert np.abs(run(words, patches[:, with_class])[1] - new_patches[:, with_class]).max() > 0.05


# The model -------------------------------------------------------------------------------------------------------

PUBLISHED = {"tnt_small": 23_768_584, "tnt_small_legacy": 23_755_336, "tnt_base": 65_428_680}


@pytest.mark.parametrize("name", tnt.VARIANTS)
def test_variants_have_the_published_number_of_parameters(name):
    variant = tnt.VARIANTS[name]
    model = variant["module"](**{key: value for key, value in variant.items() if key not in ("module", "inputs")})
    shapes = jax.eval_shape(model.init, jax.random.key(0), *variant["inputs"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


def test_tnt_small_has_the_published_cost():
    # 5.2 G in the paper; 5.217 G counted in an independent implementation.
    assert abs(summarize(TNT(legacy=True), *tnt.VARIANTS["tnt_small"]["inputs"]).macs / 5.217e9 - 1) < 0.02


def test_features_are_one_level_of_the_patches(tiny):
    params, x, _ = tiny

    @jax.jit
    def run(x):
        return nn.apply(TNT.features, TINY)({"params": params}, x), nn.apply(TNT.tokens, TINY)({"params": params}, x)

    (level,), (_, patches) = run(x)
    assert (level.array.shape, level.stride) == ((2, 3, 2, 6), (4, 4))
    np.testing.assert_array_equal(level.array.reshape(2, 6, 6), patches[:, 1:])


def test_without_head_the_output_is_the_normed_class_token(tiny):
    params, x, logits = tiny
    kept = {name: value for name, value in params.items() if name != "head"}
    token = jax.jit(TINY.clone(num_classes=0).apply)({"params": kept}, x)
    np.testing.assert_allclose(nn.Dense(3).apply({"params": params["head"]}, token), logits, atol=1e-5)


def test_drop_path_drops_patches_inside_and_samples_outside():
    model = TINY.clone(depth=3, drop_path_rate=0.8, image_size=8)
    x = jnp.ones((100, 8, 8, 3))
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
    for path, outputs in flax.traverse_util.flatten_dict(state).items():
        if path[-1] == "__call__":
            assert outputs[0].shape[:-2] == ((100, 4) if path[1] == "inner" else (100,))
            lost = np.mean([np.all(np.asarray(out) == 0, axis=(-2, -1)) for out in outputs])
            assert abs(lost - 0.4 * int(path[0].removeprefix("blocks_"))) < 0.1, path


def test_remat_changes_neither_logits_nor_gradients():
    model = TINY.clone(depth=1, embed_dim=(2, 2), num_heads=(1, 1), mlp_ratio=1.0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 10, 8, 1)), jnp.float32)
    params = random_params(model, x)

    def run(policy):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.clone(remat=policy).apply({"params": p}, x))))

    plain, found = jax.jit(run("none"))(params), jax.jit(run("full"))(params)
    assert "remat" in str(jax.make_jaxpr(run("full"))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), found, plain)


def test_softmax_and_norm_statistics_stay_in_float32_under_bfloat16(tokens):
    block = BLOCK.clone(dtype=jnp.bfloat16)
    inputs = [one.astype(jnp.bfloat16) for one in tokens]
    program = str(jax.make_jaxpr(block.apply)({"params": random_params(block, *inputs)}, *inputs))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    assert not re.search(r":f32\[[\d,]*\] = dot_general", program)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_resize_fits_the_positions_and_leaves_the_rest(tiny):
    params, _, _ = tiny
    target = TINY.clone(image_size=(16, 20), drop_path_rate=0.5)
    resized = tnt.resize(params, TINY, target)
    shapes = jax.eval_shape(target.init, jax.random.key(0), jnp.ones((1, 16, 20, 3)))["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)
    assert [name for name in params if resized[name] is not params[name]] == ["position_embedding"]
    np.testing.assert_array_equal(resized["position_embedding"][0], params["position_embedding"][0])
    flat = tnt.resize({**params, "position_embedding": jnp.ones((7, 6))}, TINY, target)
    np.testing.assert_allclose(flat["position_embedding"], 1.0, atol=1e-6)
    # A size of as many patches needs nothing.
    jax.tree.map(np.testing.assert_array_equal, tnt.resize(params, TINY, TINY.clone(image_size=(12, 7))), params)


@pytest.mark.parametrize("change", [{"patch_size": 8}, {"legacy": True}, {"num_classes": 2}])
def test_resize_refuses_what_it_cannot_bridge(tiny, change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{field}={value} must equal the {field}={getattr(TINY, field)}")):
        tnt.resize(tiny[0], TINY, TINY.clone(**change))


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(tnt.no_decay(tiny[0]))
    spared = {"bias", "scale", "class_token", "position_embedding", "word_position"}
    assert {path[-1] for path, without in flat.items() if without} == spared
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks(tiny):
    ids = tnt.layer_ids(tiny[0], TINY)
    found = {name: set(jax.tree.leaves(tree)) for name, tree in ids.items()}
    stem = ("word_embed", "word_position", "project_norm", "project", "post_norm", "class_token", "position_embedding")
    assert found == {
        **{name: {0} for name in stem},
        "blocks_0": {1},
        "blocks_1": {2},
        "final_norm": {3},
        "head": {3},
    }


def to_reference(params, source):
    """Write our parameters the way a reference stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        if path.endswith("kernel"):
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        elif path == "word_position":
            # timm keeps a map, the official code a list.
            leaf = leaf.T.reshape(1, 4, 2, 2) if source == "timm" else leaf[None]
        elif path in ("position_embedding", "class_token"):
            leaf = leaf.reshape(1, -1, leaf.shape[-1])
        tensors[reference_name(path, tnt.REFERENCE_NAMES[source])] = leaf
    for name in [name for name in tensors if name.endswith(".query.weight")]:
        stem = name.removesuffix("query.weight")
        tensors[f"{stem}qk.weight"] = np.concatenate([tensors.pop(f"{stem}{part}.weight") for part in ("query", "key")])
    return tensors


@pytest.mark.parametrize("source", tnt.REFERENCE_NAMES)
def test_reference_names_cover_every_parameter(tiny, source):
    params, _, _ = tiny
    tensors = {**to_reference(params, source), "outer_tokens": np.zeros((1, 6, 6))}
    jax.tree.map(np.testing.assert_array_equal, tnt.from_reference(tensors, TINY, source=source), params)


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0], "timm")
    with pytest.raises(ValueError, match="source='tim' must be one of"):
        tnt.from_reference(tensors, TINY, source="tim")
    with pytest.raises(ValueError, match=r"source='official' must hold 'patch_embed.proj.weight'"):
        tnt.from_reference(tensors, TINY, source="official")
    with pytest.raises(ValueError, match=r"unknown \['blocks.0.norm2_proj.bias'"):
        tnt.from_reference(tensors, TINY.clone(legacy=True), source="timm")
    with pytest.raises(
        ValueError, match=r"patch_pos must give position_embedding its shape \(10, 6\), not \(1, 7, 6\)"
    ):
        tnt.from_reference(tensors, TINY.clone(image_size=12), source="timm")


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (TNT, TNTBlock):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13
