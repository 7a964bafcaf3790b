import functools
import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers import summarize
from jaxlayers.conv import ConvNeXt, ConvNeXtBlock, GlobalResponseNorm, convnext
from jaxlayers.conv.convnext import global_response_norm
from jaxlayers.testing import BadInput, Case, Dihedral, Symmetry, Translation


def first_row_norm(x):
    """The norm with a statistic of one place only, as a control."""
    response = jnp.linalg.norm(x[:, :1], axis=(1, 2), keepdims=True)
    return x + x * response / jnp.mean(response, axis=-1, keepdims=True)


CASES = (
    Case(
        name="global_response_norm",
        within="convnext_v2",
        module=GlobalResponseNorm(),
        inputs=lambda rng: (rng.normal(size=(2, 5, 5, 6)),),
        leading_axes=True,
        symmetries=tuple(
            Symmetry(group, ("image",), "image", control=first_row_norm)
            for group in (Translation(2, cyclic=True), Dihedral(4))
        ),
        bad_inputs=(
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 6)),)),
            BadInput(match=r"spatial size \(0, 4\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 4, 6)),)),
        ),
    ),
    Case(
        name="convnext_block",
        within="convnext",
        module=ConvNeXtBlock(kernel_size=3, mlp_ratio=2.0, layer_scale=0.5),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 6)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="kernel_size=4 must be odd and positive", module=ConvNeXtBlock(kernel_size=4)),
            BadInput(match="mlp_ratio=0.0 must leave 6 features some", module=ConvNeXtBlock(mlp_ratio=0.0)),
            BadInput(
                match=r"drop_path_rate=1.5|rate=1.5 must lie in \[0, 1\)", module=ConvNeXtBlock(drop_path_rate=1.5)
            ),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 6)),)),
        ),
    ),
    Case(
        name="convnext_v2_block_masked",
        within="convnext_v2",
        module=ConvNeXtBlock(kernel_size=5, mlp_ratio=2.0, layer_scale=None, response_norm=GlobalResponseNorm),
        inputs=lambda rng: (rng.normal(size=(2, 4, 5, 6)), rng.random((2, 4, 5)) < 0.6),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"mask must have the shape \(2, 4, 5\) of the map's pixels; got \(2, 4, 4\)",
                inputs=lambda rng: (np.ones((2, 4, 5, 6)), np.ones((2, 4, 4), bool)),
            ),
        ),
    ),
    Case(
        name="convnext",
        module=ConvNeXt(num_classes=3, patch_size=2, depths=(1, 2), widths=(6, 8), kernel_size=3, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 10, 9, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"depths=\(2,\) and widths=\(4, 8\) must have", module=ConvNeXt(depths=(2,), widths=(4, 8))),
            BadInput(match=r"depths=\(0,\) and widths=\(4,\) must have", module=ConvNeXt(depths=(0,), widths=(4,))),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=ConvNeXt(drop_path_rate=1.0)),
            BadInput(match=r"patch_size=\(2, 2, 2\) must be an int or", module=ConvNeXt(patch_size=(2, 2, 2))),
            BadInput(match="num_classes=-1 must not be negative", module=ConvNeXt(num_classes=-1)),
            BadInput(match="remat='ful' must be one of", module=ConvNeXt(remat="ful")),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
    Case(
        name="convnext_v2",
        module=ConvNeXt(
            num_classes=0,
            patch_size=1,
            depths=(1, 1),
            widths=(4, 6),
            kernel_size=3,
            mlp_ratio=2.0,
            layer_scale=None,
            response_norm=GlobalResponseNorm,
        ),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 2)),),
        bad_inputs=(BadInput(match="2 spatial axes needs", inputs=lambda rng: (np.ones((4, 4)),)),),
    ),
)

V1 = ConvNeXt(num_classes=3, patch_size=2, depths=(2, 1), widths=(4, 6), kernel_size=3, layer_scale=1.0)
V2 = V1.clone(layer_scale=None, response_norm=GlobalResponseNorm)


def random_params(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), dtype), shapes)


def image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# The block -------------------------------------------------------------------------------------------------------


def twin_grn(x, scale, bias):
    """Global response normalisation, feature by feature."""
    norms = [math.sqrt(sum(value**2 for value in x[..., c].ravel())) for c in range(x.shape[-1])]
    mean = sum(norms) / len(norms)
    out = np.empty_like(x)
    for c, norm in enumerate(norms):
        out[..., c] = scale[c] * (x[..., c] * (norm / (mean + 1e-6))) + bias[c] + x[..., c]
    return out


def twin_block(params, x, *, kernel_size):
    """One block on one map [height, width, features], pixel by pixel."""
    height, width, features = x.shape
    half, kernel = kernel_size // 2, params["depthwise"]["kernel"]
    y = np.zeros_like(x)
    for i, j, c in np.ndindex(height, width, features):
        y[i, j, c] = params["depthwise"]["bias"][c] + sum(
            x[i + a - half, j + b - half, c] * kernel[a, b, 0, c]
            for a, b in np.ndindex(kernel_size, kernel_size)
            if 0 <= i + a - half < height and 0 <= j + b - half < width
        )
    norm = params["pre_norm"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    y = y @ params["up"]["kernel"] + params["up"]["bias"]
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    if "hidden_norm" in params:
        y = twin_grn(y, params["hidden_norm"]["scale"], params["hidden_norm"]["bias"])
    y = y @ params["down"]["kernel"] + params["down"]["bias"]
    return x + params.get("scale", 1.0) * y


@pytest.mark.parametrize(("kernel_size", "grn"), [(7, False), (5, True)])
def test_block_equals_a_loop_over_pixels(kernel_size, grn):
    fields = {"layer_scale": None, "response_norm": GlobalResponseNorm} if grn else {}
    block = ConvNeXtBlock(kernel_size=kernel_size, mlp_ratio=2.0, **fields)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 9, 3)))
        params = random_params(block, x, dtype=np.float64)
        found = jax.jit(block.apply)({"params": params}, x)
        assert found.dtype == jnp.float64
    tree = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(found[0], twin_block(tree, np.asarray(x)[0], kernel_size=kernel_size), atol=1e-12)


def test_layer_scale_starts_at_its_value_and_holds_the_branch_back():
    x = image(1, 5, 5, 4)
    y, variables = jax.jit(ConvNeXtBlock(kernel_size=3).init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["params"]["scale"], np.full(4, 1e-6, np.float32))
    np.testing.assert_allclose(y, x, atol=1e-6)
    assert "scale" not in jax.eval_shape(ConvNeXtBlock(layer_scale=None).init, jax.random.key(0), x)["params"]


# Global response normalisation -----------------------------------------------------------------------------------


def test_response_norm_equals_a_loop_over_features(rng):
    x, scale, bias = rng.normal(size=(4, 5, 6)), rng.normal(size=6), rng.normal(size=6)
    with jax.enable_x64(True):
        found = global_response_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias))
    np.testing.assert_allclose(found, twin_grn(x, scale, bias), atol=1e-12)


def test_response_norm_widens_differences_between_features():
    # The competition that the paper is after: with a positive scale a strong feature gains on a weak one.
    x = image(1, 6, 6, 8) * jnp.linspace(0.2, 2.0, 8)
    out = global_response_norm(x, jnp.ones(8), jnp.zeros(8))

    def spread(x):
        norms = jnp.linalg.norm(x, axis=(1, 2))[0]
        return float(jnp.std(norms) / jnp.mean(norms))

    assert spread(out) > 1.3 * spread(x)
    # Negative control: a negative scale lets the weak ones catch up.
    assert spread(global_response_norm(x, jnp.full(8, -0.3), jnp.zeros(8))) < 0.9 * spread(x)


def cosine_distance(x):
    """Mean cosine distance between the maps of all pairs of features, as the paper measures collapse."""
    maps = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    maps = maps / np.linalg.norm(maps, axis=0)
    return np.mean((1 - maps.T @ maps) / 2)


def test_response_norm_alone_leaves_the_angles_between_features_as_they_are():
    # It scales each map by a positive number, so the diversity that the paper reports must come from training with it.
    x = image(1, 6, 6, 8) + 2.0
    scaled = global_response_norm(x, jnp.full(8, 0.7), jnp.zeros(8))
    np.testing.assert_allclose(cosine_distance(scaled), cosine_distance(x), atol=1e-6)
    assert np.abs(np.asarray(scaled - x)).max() > 0.1


def test_gradient_at_a_silent_feature_is_finite():
    x = image(1, 4, 4, 3).at[..., 1].set(0.0)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(global_response_norm(x, jnp.ones(3), jnp.ones(3)))))(x)
    assert np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(lambda x: jnp.sum(global_response_norm(x, jnp.ones(3), jnp.ones(3))))(0 * x)).all()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradients_of_scales_survive_bfloat16(version):
    # Sums over 16,384 pixels: kept in bfloat16 they would stop growing at 256 equal summands.
    fields = {"layer_scale": 1.0} if version == "v1" else {"layer_scale": None, "response_norm": GlobalResponseNorm}
    x = jnp.ones((4, 64, 64, 2)) + 0.1 * image(4, 64, 64, 2)
    params = random_params(ConvNeXtBlock(kernel_size=1, mlp_ratio=1.0, **fields), x)

    def gradient(dtype):
        block = ConvNeXtBlock(kernel_size=1, mlp_ratio=1.0, dtype=dtype, **fields)
        step = jax.grad(lambda params, x: jnp.sum(block.apply({"params": params}, x).astype(jnp.float32)))
        found = jax.jit(step)(params, x.astype(dtype))
        return found["scale"] if version == "v1" else found["hidden_norm"]["scale"]

    expected = gradient(jnp.float32)
    np.testing.assert_allclose(gradient(jnp.bfloat16), expected, atol=0.05 * float(jnp.abs(expected).max()))


# Translations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [V1, V2], ids=["v1", "v2"])
def test_translation_by_the_total_stride_moves_the_maps_and_keeps_the_logits(model):
    # A picture in the middle of a black frame, wide enough that its surroundings never feel the border.
    with jax.enable_x64(True):
        x = jnp.zeros((1, 64, 64, 3)).at[:, 28:36, 28:36].set(np.random.default_rng(0).normal(size=(1, 8, 8, 3)))
        params = random_params(model, x, dtype=np.float64)

        @jax.jit
        def run(x):
            levels = nn.apply(ConvNeXt.features, model)({"params": params}, x)
            return model.apply({"params": params}, x), [level.array for level in levels]

        logits, maps = run(x)
        for by in [(4, 0), (-8, 4)]:  # the total stride is 4
            moved_logits, moved = run(jnp.roll(x, by, (1, 2)))
            np.testing.assert_allclose(moved_logits, logits, atol=1e-12)
            for index, (found, expected) in enumerate(zip(moved, maps, strict=True)):
                step = tuple(one // (2 * 2**index) for one in by)
                inside = (slice(None), slice(8, -8), slice(8, -8)) if index == 0 else np.s_[:, 4:-4, 4:-4]
                np.testing.assert_allclose(found[inside], jnp.roll(expected, step, (1, 2))[inside], atol=1e-12)
                assert np.std(expected[inside]) > 0.05
        # Negative controls: other shifts, of which the first still moves the finer map by whole entries.
        for by in [(2, 0), (1, 1)]:
            assert np.abs(run(jnp.roll(x, by, (1, 2)))[0] - logits).max() > 1e-6


# Masks -----------------------------------------------------------------------------------------------------------


def visible_features(model, params, x, mask):
    return jax.jit(lambda x, mask: nn.apply(ConvNeXt.features, model)({"params": params}, x, mask))(x, mask)


def test_hidden_pixels_influence_nothing_and_stay_zero():
    x, mask = image(2, 15, 18, 3), np.random.default_rng(1).random((2, 4, 5)) < 0.5
    params = random_params(V2, x)
    pixels = np.repeat(np.repeat(mask, 4, axis=1), 4, axis=2)[:, :15, :18, None]
    levels = visible_features(V2, params, x, jnp.asarray(mask))
    other = visible_features(V2, params, jnp.where(pixels, x, 7.0), jnp.asarray(mask))
    for level, again in zip(levels, other, strict=True):
        np.testing.assert_array_equal(level.array, again.array)
        hidden = ~pixels[:, :: level.stride[0], :: level.stride[1], 0]
        assert not np.any(level.array[hidden])
        assert np.all(np.any(level.array[~hidden] != 0, axis=-1))
    # Negative control: a visible pixel does tell.
    changed = visible_features(V2, params, jnp.where(pixels, x + 1.0, x), jnp.asarray(mask))
    assert np.abs(changed[-1].array - levels[-1].array).max() > 0.1


def test_a_mask_that_shows_everything_changes_nothing():
    x = image(2, 15, 18, 3)
    params = random_params(V2, x)
    for level, plain in zip(
        visible_features(V2, params, x, jnp.ones((2, 4, 5), bool)), visible_features(V2, params, x, None), strict=True
    ):
        np.testing.assert_allclose(level.array, plain.array, atol=1e-6)


def test_a_masked_block_equals_the_visible_part_alone():
    # Only a rectangle is visible: then hiding the rest is cutting it off.
    block = ConvNeXtBlock(kernel_size=5, mlp_ratio=2.0, layer_scale=None, response_norm=GlobalResponseNorm)
    x = image(1, 8, 9, 3)
    params = random_params(block, x)
    mask = np.zeros((1, 8, 9), bool)
    mask[:, 2:6, 3:9] = True
    apply = jax.jit(functools.partial(block.apply, {"params": params}))
    found = apply(x, jnp.asarray(mask))
    np.testing.assert_allclose(found[:, 2:6, 3:9], apply(x[:, 2:6, 3:9]), atol=1e-5)


def test_a_mask_of_another_shape_is_refused(untyped):
    x = jax.ShapeDtypeStruct((2, 15, 18, 3), jnp.float32)
    params = jax.eval_shape(V2.init, jax.random.key(0), x)
    mask = jax.ShapeDtypeStruct((2, 8, 9), bool)
    with pytest.raises(ValueError, match=r"mask must have the shape \(2, 4, 5\) of the last map's entries"):
        jax.eval_shape(nn.apply(ConvNeXt.features, V2), params, x, mask)


# The model -------------------------------------------------------------------------------------------------------


# Parameters, and multiply-accumulates at 224 x 224 in millions, both counted in timm 1.0.31.
PUBLISHED = {
    "convnext_atto": (3_695_520, 547.3),
    "convnext_femto": (5_217_784, 779.6),
    "convnext_pico": (9_045_672, 1367.1),
    "convnext_nano": (15_593_560, 2445.5),
    "convnext_tiny": (28_589_128, 4455.5),
    "convnext_small": (50_223_688, 8683.7),
    "convnext_base": (88_591_464, 15354.7),
    "convnext_large": (197_767_336, 34361.4),
    "convnext_xlarge": (350_196_968, 60921.0),
    "convnext_xxlarge": (846_471_016, 151570.2),
    "convnextv2_atto": (3_708_400, 547.3),
    "convnextv2_femto": (5_233_240, 779.6),
    "convnextv2_pico": (9_066_280, 1367.1),
    "convnextv2_nano": (15_623_800, 2445.5),
    "convnextv2_tiny": (28_635_496, 4455.5),
    "convnextv2_small": (50_318_440, 8683.7),
    "convnextv2_base": (88_717_800, 15354.7),
    "convnextv2_large": (197_956_840, 34361.4),
    "convnextv2_huge": (660_289_640, 114922.1),
}


def build(name):
    variant = convnext.VARIANTS[name]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    return variant["module"](**fields), variant["inputs"]


def test_every_variant_has_a_published_count():
    assert set(PUBLISHED) == set(convnext.VARIANTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_have_the_published_number_of_parameters(name):
    model, inputs = build(name)
    # All blocks of a stage are alike: count one and multiply, which traces twelve times less.
    depths = model.depths
    shapes = jax.eval_shape(model.clone(depths=(1,) * len(depths)).init, jax.random.key(0), *inputs)["params"]
    sizes = {path: leaf.size for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    times = {f"stages_{stage}": depth for stage, depth in enumerate(depths)}
    total = sum(size * (times[path[0]] if path[1] == "blocks_0" else 1) for path, size in sizes.items())
    assert total == PUBLISHED[name][0]


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_multiply_accumulates_are_the_published_ones(name):
    model, inputs = build(name)
    summary = summarize(model, *inputs)
    assert summary.parameters == PUBLISHED[name][0]
    np.testing.assert_allclose(summary.macs / 1e6, PUBLISHED[name][1], rtol=2e-2)


def test_features_are_a_pyramid_of_every_stage():
    model = V1.clone(patch_size=(2, 3))
    x = jax.ShapeDtypeStruct((2, 17, 22, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    levels = jax.eval_shape(nn.apply(ConvNeXt.features, model), shapes, x)
    assert [level.array.shape for level in levels] == [(2, 9, 8, 4), (2, 5, 4, 6)]
    assert [level.stride for level in levels] == [(2, 3), (4, 6)]
    assert [level.channels for level in levels] == [4, 6]


def test_one_parameter_tree_serves_every_size():
    x = jax.ShapeDtypeStruct((2, 17, 22, 3), jnp.float32)
    variables = jax.eval_shape(V2.init, jax.random.key(0), x)
    assert set(variables) == {"params"}
    for size in [(8, 8), (1, 50), (64, 31)]:
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        assert jax.eval_shape(V2.init, jax.random.key(0), images) == variables
        assert jax.eval_shape(V2.apply, variables, images).shape == (1, 3)


def test_logits_are_the_head_on_the_normed_mean_of_the_last_level():
    x = image(2, 10, 12, 3)
    params = random_params(V2, x)
    logits, levels = jax.jit(lambda v, x: (V2.apply(v, x), nn.apply(ConvNeXt.features, V2)(v, x)))(
        {"params": params}, x
    )
    pooled = np.mean(levels[-1].array, axis=(1, 2))
    normed = nn.LayerNorm(epsilon=1e-6).apply({"params": params["final_norm"]}, pooled)
    np.testing.assert_allclose(normed @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-4)
    headless = {name: value for name, value in params.items() if name != "head"}
    np.testing.assert_allclose(jax.jit(V2.clone(num_classes=0).apply)({"params": headless}, x), normed, atol=1e-5)


def test_recomputation_changes_no_gradient_and_is_in_the_program():
    model = ConvNeXt(num_classes=2, patch_size=2, depths=(2,), widths=(4,), kernel_size=3, layer_scale=1.0)
    x = image(2, 6, 6, 3)
    params = random_params(model, x)

    def gradient(name):
        return jax.grad(lambda p: jnp.sum(jnp.sin(model.clone(remat=name).apply({"params": p}, x))))

    expected = jax.jit(gradient(False))(params)
    found = jax.jit(gradient("full"))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    programs = {name: str(jax.make_jaxpr(gradient(name))(params)) for name in (False, True, "dots", "full")}
    assert [name for name, text in programs.items() if "checkpoint" in text or "remat" in text] == [
        True,
        "dots",
        "full",
    ]


def test_drop_path_rates_grow_with_depth():
    model = ConvNeXt(
        num_classes=2, patch_size=1, depths=(2, 3), widths=(2, 2), kernel_size=1, drop_path_rate=0.8, layer_scale=1.0
    )
    x = jnp.ones((400, 1, 1, 1))
    captured = jax.jit(
        lambda params, key: model.apply(
            {"params": params},
            x,
            deterministic=False,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: type(module).__name__ == "DropPath",
        )[1]["intermediates"]
    )(random_params(model, x), jax.random.key(3))
    flat = flax.traverse_util.flatten_dict(captured)
    dropped = [float(np.mean(np.all(np.asarray(flat[path][0]) == 0, axis=(1, 2, 3)))) for path in sorted(flat)]
    assert dropped[0] == 0.0
    np.testing.assert_allclose(dropped, [0.0, 0.2, 0.4, 0.6, 0.8], atol=0.08)


# Parameter trees -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees():
    x = image(1, 8, 8, 3)
    return {"v1": (V1, random_params(V1, x)), "v2": (V2, random_params(V2, x))}


def test_no_decay_marks_all_but_the_kernels(trees):
    for _, params in trees.values():
        flat = flax.traverse_util.flatten_dict(convnext.no_decay(params), sep="/")
        assert {path.split("/")[-1] for path, without in flat.items() if not without} == {"kernel"}
        assert {path.split("/")[-1] for path, without in flat.items() if without} == {"bias", "scale"}


def test_layer_ids_count_blocks_from_the_patches_to_the_head(trees):
    model, params = trees["v2"]
    ids = convnext.layer_ids(params, model)

    def of(tree):
        return set(jax.tree.leaves(tree))

    assert of(ids["patch_embed"]) == {0}
    assert [of(ids["stages_0"][f"blocks_{index}"]) for index in range(2)] == [{1}, {2}]
    assert of(ids["stages_1"]["pre_norm"]) == of(ids["stages_1"]["downsample"]) == {2}
    assert of(ids["stages_1"]["blocks_0"]) == {3}
    assert of(ids["final_norm"]) == of(ids["head"]) == {4}


def to_reference(params, source):
    """Write our parameters the way a reference stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        if path.endswith("kernel"):
            if "projection" in path:
                leaf = leaf.reshape(2, 2, -1, leaf.shape[-1])
            leaf = np.moveaxis(leaf, (-1, -2), (0, 1))
        elif path.endswith(("blocks_0/scale", "blocks_1/scale")) and source == "torchvision":
            leaf = leaf[:, None, None]
        elif "hidden_norm" in path and source != "timm":
            leaf = leaf[None, None, None]
        tensors[convnext.reference.reference_name(path, convnext.REFERENCE_NAMES[source])] = leaf
    return tensors


@pytest.mark.parametrize(
    ("version", "source"),
    [
        ("v1", "timm"),
        ("v1", "official"),
        ("v1", "torchvision"),
        ("v1", "huggingface"),
        ("v2", "timm"),
        ("v2", "official"),
        ("v2", "huggingface_v2"),
    ],
)
def test_reference_names_cover_every_parameter(trees, version, source):
    model, params = trees[version]
    found = convnext.from_reference(to_reference(params, source), model, source=source)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_reference_checkpoints_that_do_not_fit_are_refused(trees):
    model, params = trees["v1"]
    tensors = to_reference(params, "timm")
    with pytest.raises(ValueError, match="source='tim' must be one of"):
        convnext.from_reference(tensors, model, source="tim")
    with pytest.raises(ValueError, match=r"source='torchvision' must hold 'features.0.0.weight'"):
        convnext.from_reference(tensors, model, source="torchvision")
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['head.norm.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "head.norm.bias"}
        convnext.from_reference({**incomplete, "extra": np.zeros(1)}, model, source="timm")
    with pytest.raises(ValueError, match=r"must give .* its shape \(5, 5, 1, 4\), not \(3, 3, 1, 4\); set the fields"):
        convnext.from_reference(tensors, model.clone(kernel_size=5), source="timm")
    with pytest.raises(ValueError, match="no counterpart of stages_0/blocks_0/hidden_norm/"):
        convnext.from_reference(to_reference(params, "torchvision"), trees["v2"][0], source="torchvision")
