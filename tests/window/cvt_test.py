import dataclasses
import functools
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
from jaxlayers.window import ConvAttention, ConvProjection, ConvTokenEmbed, Cvt, CvtBlock, cvt

KEY_BIAS = {r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
KEY_SHIFT = {
    **KEY_BIAS,
    r"key_projection/norm/bias$": "without a class token it adds the same vector to every key",
}
TINY = Cvt(
    num_classes=3,
    patch_size=(7, 3),
    strides=(4, 2),
    embed_dim=(4, 8),
    depths=(1, 2),
    num_heads=(1, 2),
    mlp_ratio=2.0,
    drop_path_rate=(0.0, 0.0),
)

CASES = (
    Case(
        name="conv_token_embed",
        within="cvt",
        module=ConvTokenEmbed(features=6, kernel_size=7, stride=4),
        inputs=lambda rng: (rng.normal(size=(2, 9, 8, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=0 must be positive", module=ConvTokenEmbed(features=0)),
            BadInput(match="kernel_size=0 and stride=2 must be", module=ConvTokenEmbed(4, kernel_size=0)),
            BadInput(match="kernel_size=3 and stride=0 must be", module=ConvTokenEmbed(4, stride=0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((9, 8)),)),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
        ),
    ),
    Case(
        name="conv_projection",
        within="cvt",
        module=ConvProjection(stride=2),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 6)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="kernel_size=3 and stride=-1 must be positive", module=ConvProjection(stride=-1)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 6)),)),
        ),
    ),
    Case(
        name="conv_attention",
        within="cvt",
        module=ConvAttention(num_heads=2),
        inputs=lambda rng: (rng.normal(size=(2, 13, 8)),),
        keywords={"size": (3, 4)},
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=ConvAttention(3)),
            BadInput(match="features=8 must be divisible by num_heads=0", module=ConvAttention(0)),
            BadInput(match=r"the 12 tokens of size=\(3, 4\), or one more", inputs=lambda rng: (np.ones((2, 14, 8)),)),
        ),
    ),
    Case(
        name="cvt_block",
        within="cvt",
        module=CvtBlock(num_heads=2, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 12, 8)),),
        keywords={"size": (4, 3)},
        leading_axes=True,
        zero_gradients=KEY_SHIFT,
        bad_inputs=(
            BadInput(match=r"the 12 tokens of size=\(4, 3\), or one more", inputs=lambda rng: (np.ones((2, 11, 8)),)),
            BadInput(match="hidden_features=0 .* must be positive", module=CvtBlock(2, mlp_ratio=0.0)),
            BadInput(match=r"rate=1.0 must lie in \[0, 1\)", module=CvtBlock(2, drop_path_rate=1.0)),
        ),
    ),
    Case(
        name="cvt",
        module=TINY.clone(depths=(1, 1)),
        inputs=lambda rng: (rng.normal(size=(2, 18, 15, 3)),),
        leading_axes=True,
        zero_gradients={
            **KEY_BIAS,
            "stages_0/blocks_0/attention/key_projection/norm/bias": KEY_SHIFT[r"key_projection/norm/bias$"],
            "stages_1/blocks_0/attention/query_projection": "the head reads the last block's class token alone",
        },
        bad_inputs=(
            BadInput(match="must have one entry a stage", module=TINY.clone(depths=(1, 2, 3))),
            BadInput(match="positive depths", module=TINY.clone(depths=(1, 0))),
            BadInput(match="num_classes=-1 must not be negative", module=TINY.clone(num_classes=-1)),
            BadInput(match=r"drop_path_rate=1.0 must lie in", module=TINY.clone(drop_path_rate=(0.0, 1.0))),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
)


def random_variables(module, *inputs, seed=0, dtype=np.float32, **keywords):
    """Random parameters and running statistics in the shape of `module`'s, so that everything shows."""
    shapes = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **keywords), *inputs)
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        name = path[-1].key
        value = 0.4 * rng.normal(size=leaf.shape) + (name == "scale")
        return jnp.asarray(np.exp(value) if name == "var" else value, dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


@pytest.fixture(scope="module")
def tiny():
    """A small model, its variables, images that fit no stride, and the logits."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 17, 22, 3)), jnp.float32)
    variables = random_variables(TINY, x)
    return variables, x, jax.jit(TINY.apply)(variables, x)


# An independent twin: NumPy, one output at a time ----------------------------------------------------------------


def twin_convolution(x, kernel, stride, circular):
    """Convolve a map [height, width, features] depthwise; output i looks at stride * i + offset."""
    k, size = kernel.shape[0], x.shape[:2]
    before = max(0, (k - stride + 1) // 2)
    out = np.zeros((-(-size[0] // stride), -(-size[1] // stride), x.shape[-1]))
    for place in np.ndindex(*out.shape[:2]):
        for tap in np.ndindex(k, k):
            at = [stride * p + t - before for p, t in zip(place, tap, strict=True)]
            if circular:
                at = [one % length for one, length in zip(at, size, strict=True)]
            if all(0 <= one < length for one, length in zip(at, size, strict=True)):
                out[place] += kernel[(*tap, 0)] * x[tuple(at)]
    return out


def twin_attention(variables, x, size, *, num_heads, kv_stride, circular):
    """Convolutional attention on the tokens [n, features] of one map, in the words of the paper."""
    params, statistics = variables["params"], variables["batch_stats"]
    features = x.shape[-1]
    extra = len(x) - size[0] * size[1]
    projected = {}
    for name, stride in (("query", 1), ("key", kv_stride), ("value", kv_stride)):
        part, running = params[f"{name}_projection"], statistics[f"{name}_projection"]["norm"]
        y = twin_convolution(x[extra:].reshape(*size, features), part["convolution"]["kernel"], stride, circular)
        y = (y - running["mean"]) / np.sqrt(running["var"] + 1e-5) * part["norm"]["scale"] + part["norm"]["bias"]
        tokens = np.concatenate([x[:extra], y.reshape(-1, features)])
        projected[name] = tokens @ params[name]["kernel"] + params[name]["bias"]
    out = np.zeros_like(x)
    for head in range(num_heads):
        part = slice(head * features // num_heads, (head + 1) * features // num_heads)
        query, key, value = (projected[name][:, part] for name in ("query", "key", "value"))
        for index, one in enumerate(query):
            weights = np.exp(key @ one / np.sqrt(features))
            out[index, part] = weights @ value / weights.sum()
    return out @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "circular"),
    [((4, 6), 3, 2, True), ((5, 3), 3, 2, False), ((4, 4), 5, 1, True), ((3, 4), 2, 3, False)],
)
def test_attention_equals_a_loop_over_tokens(size, kernel, stride, circular, extra):
    layer = ConvAttention(num_heads=2, kernel_size=kernel, kv_stride=stride, circular=circular)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, size[0] * size[1] + extra, 4)))
        variables = random_variables(layer, x, size=size, dtype=np.float64)
        found = jax.jit(functools.partial(layer.apply, size=size))(variables, x)
        assert found.dtype == jnp.float64
    expected = twin_attention(
        jax.tree.map(np.asarray, variables), np.asarray(x)[0], size, num_heads=2, kv_stride=stride, circular=circular
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-11)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(7, 4, (8, 12)), (7, 4, (9, 6)), (3, 2, (6, 5)), (4, 4, (8, 9)), (2, 1, (3, 4))]
)
@pytest.mark.parametrize("circular", [False, True])
def test_embedding_equals_a_loop_over_patches(kernel, stride, size, circular, rng):
    layer = ConvTokenEmbed(5, kernel_size=kernel, stride=stride, circular=circular)
    x = jnp.asarray(rng.normal(size=(1, *size, 2)), jnp.float32)
    params = random_variables(layer, x)["params"]
    padded = np.zeros((*(-(-length // stride) * stride for length in size), 2))
    padded[: size[0], : size[1]] = x[0]
    weights = np.asarray(params["projection"]["kernel"])
    # A full convolution is a sum of depthwise ones, input by input.
    sums = [
        sum(
            twin_convolution(padded[..., i : i + 1], weights[:, :, i, o][..., None, None], stride, circular)[..., 0]
            for i in range(2)
        )
        for o in range(5)
    ]
    out = np.stack(sums, -1) + params["projection"]["bias"]
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
    out = out * params["post_norm"]["scale"] + params["post_norm"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x)[0], out, atol=1e-4)


# Limits and symmetries -------------------------------------------------------------------------------------------


def test_projections_of_one_pixel_and_stride_one_are_plain_attention(rng):
    layer = ConvAttention(num_heads=2, kernel_size=1, kv_stride=1)
    x = jnp.asarray(rng.normal(size=(2, 13, 8)), jnp.float32)
    variables = random_variables(layer, x[:, 1:], size=(3, 4))
    params, statistics = variables["params"], variables["batch_stats"]

    def fold(name):
        """Put what the projection does to each feature into the linear layer: out = (a x + b) W + c."""
        part, running = params[f"{name}_projection"], statistics[f"{name}_projection"]["norm"]
        factor = part["norm"]["scale"] / jnp.sqrt(running["var"] + 1e-5)
        shift = part["norm"]["bias"] - factor * running["mean"]
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        return {
            "kernel": (part["convolution"]["kernel"].reshape(-1) * factor)[:, None] * kernel,
            "bias": bias + shift @ kernel,
        }

    def plain(x):
        def heads(name):
            return nn.Dense(8).apply({"params": fold(name)}, x).reshape(2, 12, 2, 4)

        # The reference scales by the whole width: heads of 4 features in 8.
        out = nn.dot_product_attention(heads("query") * 0.5**0.5, heads("key"), heads("value")).reshape(2, 12, 8)
        return nn.Dense(8).apply({"params": params["out"]}, out)

    x = x[:, 1:]
    np.testing.assert_allclose(layer.apply(variables, x, size=(3, 4)), plain(x), atol=1e-5)
    # As plain attention it knows no positions; control: a kernel of 3 does.
    order = np.random.default_rng(3).permutation(12)
    out = layer.apply(variables, x, size=(3, 4))
    np.testing.assert_allclose(layer.apply(variables, x[:, order], size=(3, 4)), out[:, order], atol=1e-5)
    wide = layer.clone(kernel_size=3)
    variables = random_variables(wide, x, size=(3, 4))
    out = wide.apply(variables, x, size=(3, 4))
    assert np.abs(wide.apply(variables, x[:, order], size=(3, 4)) - out[:, order]).max() > 0.05


def test_circular_model_commutes_with_shifts_by_total_stride_times_kv_stride():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 32, 48, 3)))
        variables = random_variables(TINY, x, dtype=np.float64)

        def run(x, circular):
            level = nn.apply(Cvt.features, TINY.clone(circular=circular))(variables, x)[-1]
            return level.array, TINY.clone(circular=circular).apply(variables, x)

        run = jax.jit(run, static_argnames="circular")

        def moved(shift, circular=True):
            """Return how far last map and logits are from those of the image, when it is rolled by `shift`."""
            (level, logits), (rolled, rolled_logits) = (run(one, circular) for one in (x, jnp.roll(x, shift, (1, 2))))
            errors = rolled - jnp.roll(level, [by // 8 for by in shift], (1, 2)), rolled_logits - logits
            return [float(jnp.max(jnp.abs(error))) for error in errors]

        for shift in [(16, 0), (0, 16), (16, -32)]:
            assert max(moved(shift)) < 1e-12
        # Negative controls: half of it tears the keys' grid, less the tokens', and zeros at the border break it.
        for shift in [(8, 0), (4, 4), (0, 1)]:
            assert min(moved(shift)) > 1e-4
        assert min(moved((16, 0), circular=False)) > 1e-4


def test_finer_maps_commute_with_smaller_shifts():
    model = TINY.clone(circular=True)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 16, 16, 3)), jnp.float32)
    variables = random_variables(model, x)
    run = jax.jit(nn.apply(Cvt.features, model))
    first, rolled = (run(variables, one)[0].array for one in (x, jnp.roll(x, 8, 1)))
    np.testing.assert_allclose(rolled, jnp.roll(first, 2, 1), atol=1e-5)


def test_one_tree_serves_every_size(tiny):
    variables, _, _ = tiny
    shapes = jax.tree.map(jnp.shape, variables)
    assert not [path for path in flax.traverse_util.flatten_dict(variables, sep="/") if "position" in path]
    for size in [(8, 8), (1, 50), (64, 31)]:
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        assert jax.tree.map(jnp.shape, jax.eval_shape(TINY.init, jax.random.key(0), images)) == shapes
        assert jax.eval_shape(TINY.apply, variables, images).shape == (1, 3)


# The model -------------------------------------------------------------------------------------------------------

PUBLISHED = {"cvt_13": 19_997_480, "cvt_21": 31_622_696, "cvt_w24_384": 277_196_392}


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_have_the_published_number_of_parameters(name):
    fields = {key: value for key, value in cvt.VARIANTS[name].items() if key not in ("module", "inputs")}
    model = cvt.VARIANTS[name]["module"](**fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PUBLISHED[name]


def test_cvt_13_has_the_published_cost():
    summary = summarize(Cvt(), *cvt.VARIANTS["cvt_13"]["inputs"])
    # 4.5 G in the paper; 4.566 G counted in an independent implementation.
    assert abs(summary.macs / 4.566e9 - 1) < 0.02
    assert summary.parameters == PUBLISHED["cvt_13"]


def test_features_are_a_pyramid_of_every_stage(tiny):
    variables, x, _ = tiny
    levels = jax.eval_shape(nn.apply(Cvt.features, TINY), variables, x)
    assert [level.array.shape for level in levels] == [(2, 5, 6, 4), (2, 3, 3, 8)]
    assert [level.stride for level in levels] == [(4, 4), (8, 8)]


def test_logits_are_the_head_on_the_normed_class_token(tiny):
    variables, x, logits = tiny
    params = variables["params"]
    headless = {**variables, "params": {name: value for name, value in params.items() if name != "head"}}
    model = TINY.clone(num_classes=0)

    @jax.jit
    def run(variables, x):
        token, state = model.apply(
            variables, x, capture_intermediates=lambda module, _: module.name == "blocks_1", mutable=["intermediates"]
        )
        tokens = state["intermediates"]["stages_1"]["blocks_1"]["__call__"][0]
        return token, tokens, nn.apply(Cvt.features, model)(variables, x)[-1]

    token, tokens, level = run(headless, x)
    np.testing.assert_allclose(token @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-5)
    normed = nn.LayerNorm(epsilon=1e-5).apply({"params": params["final_norm"]}, tokens[:, 0])
    np.testing.assert_allclose(normed, token, atol=1e-5)
    np.testing.assert_allclose(tokens[:, 1:].reshape(level.array.shape), level.array, atol=1e-5)


def test_training_norms_by_the_batch_and_moves_the_running_statistics():
    layer = ConvProjection(stride=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4, 2)), jnp.float32)
    variables = random_variables(layer, x)
    out, state = layer.apply(variables, x, deterministic=False, mutable=["batch_stats"])
    part = jax.tree.map(np.asarray, variables["params"])
    convolved = np.stack([twin_convolution(np.asarray(one), part["convolution"]["kernel"], 2, False) for one in x])
    mean, var = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
    expected = (convolved - mean) / np.sqrt(var + 1e-5) * part["norm"]["scale"] + part["norm"]["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    before, after = variables["batch_stats"]["norm"], state["batch_stats"]["norm"]
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * var, atol=1e-6)


def test_training_updates_every_statistic_and_drops_whole_samples():
    model = TINY.clone(drop_path_rate=(0.0, 0.9))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16, 16, 3)), jnp.float32)
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
            fraction = [np.mean(np.all(np.asarray(out) == 0, axis=(-2, -1))) for out in outputs]
            dropped.setdefault(path[:2], []).extend(fraction)
    assert set(dropped) == {("stages_0", "blocks_0"), ("stages_1", "blocks_0"), ("stages_1", "blocks_1")}
    assert max(dropped["stages_0", "blocks_0"] + dropped["stages_1", "blocks_0"]) == 0
    assert np.mean(dropped["stages_1", "blocks_1"]) > 0.5


@pytest.mark.slow
def test_remat_changes_neither_logits_nor_gradients_nor_statistics():
    model = TINY.clone(patch_size=(3,), strides=(4,), embed_dim=(4,), depths=(1,), num_heads=(2,), mlp_ratio=1.0)
    model = model.clone(drop_path_rate=(0.0,))
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
        found = jax.jit(run(policy))(variables["params"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), found, plain)


def test_softmax_and_norm_statistics_stay_in_float32_under_bfloat16():
    block = CvtBlock(num_heads=1, dtype=jnp.bfloat16)
    x = jnp.ones((1, 16, 4), jnp.bfloat16)
    variables = random_variables(block, x, size=(4, 4))
    program = str(jax.make_jaxpr(functools.partial(block.apply, size=(4, 4)))(variables, x))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    assert not re.search(r":f32\[[\d,]*\] = (dot_general|conv_general_dilated)", program)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(cvt.no_decay(tiny[0]["params"]))
    assert {path[-1] for path, without in flat.items() if without} == {"bias", "scale", "class_token"}
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks_from_the_first_embedding_to_the_head(tiny):
    ids = cvt.layer_ids(tiny[0]["params"], TINY)

    def only(tree):
        return set(jax.tree.leaves(tree))

    assert only(ids["stages_0"]["embed"]) == {0}
    assert only(ids["stages_0"]["blocks_0"]) == {1}
    assert only(ids["stages_1"]["embed"]) == {ids["stages_1"]["class_token"]} == {1}
    assert [only(ids["stages_1"][f"blocks_{index}"]) for index in range(2)] == [{2}, {3}]
    assert only(ids["final_norm"]) == only(ids["head"]) == {4}


def to_reference(variables, source):
    """Write our variables the way a reference stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(variables, sep="/").items():
        leaf = np.asarray(leaf)
        if path.endswith("kernel"):
            leaf = leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
        if path.endswith("class_token"):
            leaf = leaf[None, None]
        tensors[reference_name(path.partition("/")[2], cvt.REFERENCE_NAMES[source])] = leaf
    return tensors


@pytest.mark.parametrize("source", cvt.REFERENCE_NAMES)
def test_reference_names_cover_every_variable(tiny, source):
    tensors = to_reference(tiny[0], source)
    assert len(tensors) == len(jax.tree.leaves(tiny[0]))
    tensors["stage0.blocks.0.attn.conv_proj_q.bn.num_batches_tracked"] = np.zeros(())
    jax.tree.map(np.testing.assert_array_equal, cvt.from_reference(tensors, TINY, source=source), tiny[0])


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0], "official")
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        cvt.from_reference(tensors, TINY, source="timm")
    with pytest.raises(ValueError, match=r"source='huggingface' must hold 'cvt.encoder.stages.0"):
        cvt.from_reference(tensors, TINY, source="huggingface")
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['norm.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "norm.bias"}
        cvt.from_reference({**incomplete, "extra": np.zeros(1)}, TINY, source="official")
    with pytest.raises(ValueError, match=r"must give .* its shape \(3, 3, 3, 4\), not \(7, 7, 3, 4\)"):
        cvt.from_reference(tensors, TINY.clone(patch_size=(3, 3)), source="official")


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (Cvt, CvtBlock, ConvAttention, ConvProjection, ConvTokenEmbed):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13


def test_gradient_of_the_projection_is_right_on_a_mesh_with_a_tensor_axis():
    layer = ConvProjection(stride=2)
    x = np.random.default_rng(0).normal(size=(8, 7, 6, 4)).astype(np.float32)
    variables = layer.init(jax.random.key(0), jnp.asarray(x))

    @jax.jit
    def gradient(params, x):
        def loss(params):
            return jnp.sum(jnp.sin(layer.apply({**variables, "params": params}, x)))

        return jax.grad(loss)(params)

    expected = gradient(variables["params"], x)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = gradient(jax.device_put(variables["params"], whole), jax.device_put(x, spread))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
