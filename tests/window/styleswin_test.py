"""StyleSwin's generator.

`tests/golden/styleswin_parity.npz` holds outputs of the public code (github.com/microsoft/StyleSwin, commit a7c28b3,
with its two CUDA operations replaced by plain PyTorch, its widths 512, 256, ... replaced by 16) on the parameters and
inputs that this file makes: `to_reference` wrote them into its modules by `load_state_dict(strict=False)`, what was
missing being buffers only.
"""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core.reference import reference_name
from jaxlayers.ops import upfirdn
from jaxlayers.ops.windows import local_position_table
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import styleswin
from jaxlayers.window.styleswin import (
    AdaptiveInstanceNorm,
    DoubleWindowAttention,
    EqualizedDense,
    StyleSwin,
    StyleSwinBlock,
    sinusoidal_grid,
)
from jaxlayers.window.swin import WindowAttention

GOLDEN = Path(__file__).parents[1] / "golden" / "styleswin_parity.npz"
KEY_BIAS = {r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
# The last stage has windows of 8 in a map of 16.
TINY = StyleSwin(features=(16,) * 3, num_heads=(4,) * 3, style_features=16, mapping_depth=3)
# Two stages, windows of 2 and 4 in maps of 4 and 8: the second one shifts.
SMALL = StyleSwin(
    features=(8, 4), num_heads=(2, 2), style_features=6, mapping_depth=2, depth=1, window_size=4, mlp_ratio=2.0
)

CASES = (
    Case(
        name="equalized_dense",
        within="styleswin",
        module=EqualizedDense(4, rate=0.5, activation_fn=styleswin.scaled_leaky_relu),
        inputs=lambda rng: (rng.normal(size=(2, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=0 and rate=1.0 must be positive", module=EqualizedDense(0)),
            BadInput(match="rate=0.0 must be positive; set them", module=EqualizedDense(2, rate=0.0)),
        ),
    ),
    Case(
        name="adaptive_instance_norm",
        within="styleswin",
        module=AdaptiveInstanceNorm(),
        inputs=lambda rng: (rng.normal(size=(2, 4, 3, 6)), rng.normal(size=(2, 5))),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"style of shape \(3, 5\) must be \(2, 'styles'\)",
                inputs=lambda rng: (np.ones((2, 4, 3, 6)), np.ones((3, 5))),
            ),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 6)), np.ones(5))),
        ),
    ),
    Case(
        name="double_window_attention",
        within="styleswin",
        module=DoubleWindowAttention(num_heads=4, window_size=4),
        # No multiple of the window along one axis.
        inputs=lambda rng: (rng.normal(size=(2, 8, 7, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=DoubleWindowAttention(3)),
            BadInput(match=r"shifted_heads=5 must lie in \[0, num_heads=4\]", module=DoubleWindowAttention(4, 4, 2, 5)),
            BadInput(match=r"shift_size=\(4, 4\) must lie in \[0, window", module=DoubleWindowAttention(4, 4, 4)),
            BadInput(match=r"window_size=\(0, 0\) must be positive", module=DoubleWindowAttention(4, 0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 8)),)),
        ),
    ),
    Case(
        name="styleswin_block",
        within="styleswin",
        module=StyleSwinBlock(num_heads=2, window_size=4, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 8, 8, 4)), rng.normal(size=(2, 5))),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=4 must be divisible by num_heads=3", module=StyleSwinBlock(3)),
            BadInput(match="hidden_features=0 and", module=StyleSwinBlock(2, mlp_ratio=0.0)),
        ),
    ),
    Case(
        name="styleswin",
        module=SMALL,
        inputs=lambda rng: (rng.normal(size=(2, 5)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"num_heads=\(2,\) must have one entry a stage", module=SMALL.clone(num_heads=(2,))),
            BadInput(match="mapping_depth=0 and depth=1 must be positive", module=SMALL.clone(mapping_depth=0)),
            BadInput(match="features=6 must be a multiple of 4", module=SMALL.clone(features=(8, 6))),
            BadInput(match="remat='ful' must be one of", module=SMALL.clone(remat="ful")),
        ),
    ),
)


def random_params(module, *inputs, seed=0, dtype=np.float32):
    """Parameters of the size that keeps every signal near 1, so that everything shows and nothing is chaotic."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    found = {}
    for path, leaf in sorted(flax.traverse_util.flatten_dict(shapes, sep="/").items()):
        size = 0.2
        if path.startswith("mapping"):
            size = 100.0 if path.endswith("kernel") else 20.0
        elif path == "constant":
            size = 1.0
        elif path.endswith("style/kernel"):
            size = 0.3
        elif path.endswith("kernel"):
            size = leaf.shape[0] ** -0.5
        found[path] = jnp.asarray(size * rng.normal(size=leaf.shape) + path.endswith("scale"), dtype)
    return flax.traverse_util.unflatten_dict(found, sep="/")


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def to_reference(params):
    """Write our parameters the way the official code stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        name, leaf = reference_name(path, styleswin.REFERENCE_NAMES), np.asarray(leaf)
        if path == "constant":
            tensors["input.input"] = np.moveaxis(leaf, -1, 0)[None]
        elif path.startswith("mapping"):
            number, kind = name.removeprefix("mapping.").split(".")
            tensors[f"style.{int(number) + 1}.{kind}"] = leaf.T
        elif name.endswith(styleswin._TABLE):
            for half, part in enumerate(np.split(leaf, 2, axis=1)):
                tensors[name.replace(styleswin._TABLE, f"attn.{half}.{styleswin._TABLE}")] = part
        elif name.endswith("conv.weight"):
            tensors[name] = leaf.T[:, :, None, None]
        elif path.startswith("to_rgbs") and name.count(".") == 2:
            tensors[name] = leaf[None, :, None, None]
        else:
            tensors[name] = leaf.reshape(1) if name.endswith("alpha") else leaf.T
    for name in [name for name in tensors if ".query." in name]:
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        tensors[name.replace("query", "qkv")] = np.concatenate(parts)
    return tensors


# The public code -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def test_generator_equals_the_public_one(golden):
    params = random_params(TINY, noise(1, 16))
    latent = noise(3, 16, seed=1)
    found, style = jax.jit(
        lambda p, z: (TINY.apply({"params": p}, z), TINY.apply({"params": p}, z, method="map_latent"))
    )(params, latent)
    np.testing.assert_allclose(style, golden["style"], atol=1e-5)
    assert np.abs(golden["picture"]).max() > 1
    np.testing.assert_allclose(found, golden["picture"], atol=1e-4)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_block_equals_the_public_one(size, golden):
    block = StyleSwinBlock(4, min(8, size))
    x, style = noise(2, size, size, 16, seed=2), noise(2, 16, seed=3)
    params = random_params(block, x, style)
    np.testing.assert_allclose(jax.jit(block.apply)({"params": params}, x, style), golden[f"block{size}"], atol=2e-5)


def test_parameters_go_to_the_public_names_and_back():
    params = random_params(TINY, noise(1, 16))
    tensors = to_reference(params)
    tensors["layers.2.blocks.0.attn_mask2"] = np.zeros(())
    tensors["to_rgbs.1.upsample.kernel"] = np.zeros(())
    jax.tree.map(np.testing.assert_array_equal, styleswin.from_reference(tensors, TINY), params)
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['layers.0.blocks.0.proj.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "layers.0.blocks.0.proj.bias"}
        styleswin.from_reference({**incomplete, "extra": np.zeros(1)}, TINY)


# Parameters and G multiply-accumulates of one picture, counted in the public code.
PUBLISHED = {
    "styleswin_256": (40_628_048, None),
    "styleswin_256_x2": (48_929_512, 95.607),
    "styleswin_1024": (40_862_990, 52.466),
}


def build(name):
    variant = styleswin.VARIANTS[name]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    return variant["module"](**fields), variant["inputs"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_have_the_published_sizes(name):
    model, inputs = build(name)
    parameters, macs = PUBLISHED[name]
    picture, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    assert picture.shape == (1, int(name.split("_")[1]), int(name.split("_")[1]), 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    if macs:
        assert count_macs(model.apply, variables, *inputs) / 1e9 == pytest.approx(macs, abs=1e-3)


# Double attention ------------------------------------------------------------------------------------------------


def apply_attention(x, **fields):
    layer = DoubleWindowAttention(num_heads=4, window_size=4, **fields)
    params = random_params(layer, x)
    return layer.apply({"params": params}, x), params


def test_without_shifted_heads_it_is_window_attention():
    x = noise(2, 8, 12, 8)
    found, params = apply_attention(x, shifted_heads=0)
    windows = x.reshape(2, 2, 4, 3, 4, 8).swapaxes(2, 3).reshape(2, 6, 16, 8)
    plain = WindowAttention(4, window_size=(4, 4)).apply({"params": params}, windows)
    expected = plain.reshape(2, 2, 3, 4, 4, 8).swapaxes(2, 3).reshape(2, 8, 12, 8)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Negative control: with half of the heads shifted, the same weights give something else.
    assert np.abs(apply_attention(x)[0] - expected).max() > 0.1


def test_borders_of_windows_show_less_where_tables_begin_local():
    x = noise(4, 16, 16, 8)

    def border(**fields):
        """Return how much larger the steps across a border are than those within a window."""
        layer = DoubleWindowAttention(num_heads=4, window_size=8, shifted_heads=0, **fields)
        steps = np.abs(np.diff(layer.apply(layer.init(jax.random.key(1), x), x), axis=1)).mean(axis=(0, 2, 3))
        return steps[7] / np.delete(steps, 7).mean()

    local = border(table_init=local_position_table(1.0))
    assert local < 4
    # Negative control: by the plain table every token of a window begins as about the mean of it.
    assert border() > 10 * local


def test_a_window_as_large_as_the_map_is_dense_attention():
    x = noise(2, 4, 4, 8)
    found, p = apply_attention(x)
    tokens = np.asarray(x, np.float64).reshape(2, 16, 8)
    query, key, value = (
        (tokens @ p[name]["kernel"] + p[name]["bias"]).reshape(2, 16, 4, 2) for name in ("query", "key", "value")
    )
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(2)
    places = np.stack(np.divmod(np.arange(16), 4), axis=-1)
    offsets = places[:, None] - places[None] + 3
    logits += np.moveaxis(np.asarray(p[styleswin._TABLE])[offsets[..., 0] * 7 + offsets[..., 1]], -1, 0)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    dense = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 16, 8) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(found.reshape(2, 16, 8), dense, atol=1e-5)
    # Negative control: without its bias it is not.
    other = DoubleWindowAttention(4, 4).apply({"params": {**p, styleswin._TABLE: 0 * p[styleswin._TABLE]}}, x)
    assert np.abs(other.reshape(2, 16, 8) - dense).max() > 1e-2


def hears(size, shifted_heads):
    """Return booleans [tokens, tokens]: does the second token hear the first?"""
    layer = DoubleWindowAttention(num_heads=2, window_size=4, shifted_heads=shifted_heads)
    x = noise(1, *size, 4)
    params = random_params(layer, x)
    tokens = size[0] * size[1]
    batch = np.tile(np.asarray(x).reshape(1, tokens, 4), (tokens + 1, 1, 1))
    batch[np.arange(tokens), np.arange(tokens)] += 1.0
    out = np.asarray(jax.jit(layer.apply)({"params": params}, jnp.asarray(batch.reshape(-1, *size, 4))))
    out = out.reshape(tokens + 1, tokens, 4)
    return np.any(out[:-1] != out[-1], axis=-1)


def in_one_window(size, shift, *, wraps=False):
    """Return which tokens share a window that begins at `shift`; the ends of an axis are apart unless it wraps."""
    names = []
    for length in size:
        window = (np.arange(length) - shift) // 4
        names.append(window % (length // 4) if wraps else window)
    labels = np.stack(np.meshgrid(*names, indexing="ij"), axis=-1).reshape(-1, 2)
    return (labels[:, None] == labels[None]).all(-1)


def test_regular_and_shifted_heads_hear_their_windows_and_nothing_across_the_border():
    size = (8, 12)
    np.testing.assert_array_equal(hears(size, 0), in_one_window(size, 0))
    np.testing.assert_array_equal(hears(size, 2), in_one_window(size, 2))
    np.testing.assert_array_equal(hears(size, 1), in_one_window(size, 0) | in_one_window(size, 2))
    # Negative control: a roll without masks would join opposite borders.
    assert (in_one_window(size, 2, wraps=True) & ~hears(size, 2)).sum() > 100


def test_padding_is_never_heard():
    layer = DoubleWindowAttention(num_heads=1, window_size=4, shifted_heads=0)
    x = noise(1, 6, 8, 4)
    params = random_params(layer, x)
    # The tokens of the cut window are a map of their own.
    alone = layer.apply({"params": params}, x[:, 4:])
    np.testing.assert_allclose(layer.apply({"params": params}, x)[:, 4:], alone, atol=1e-6)


# Styles ----------------------------------------------------------------------------------------------------------


def test_norm_gives_each_map_the_statistics_its_style_wants():
    norm = AdaptiveInstanceNorm()
    x, style = 3 + 2 * noise(2, 16, 16, 4), noise(2, 5, seed=1)
    params = random_params(norm, x, style)
    found = norm.apply({"params": params}, x, style)
    wanted = np.asarray(style) @ np.asarray(params["style"]["kernel"]) / np.sqrt(5) + params["style"]["bias"]
    np.testing.assert_allclose(found.mean((1, 2)), wanted[:, 4:], atol=1e-5)
    np.testing.assert_allclose(found.std((1, 2)), np.abs(wanted[:, :4]), rtol=1e-4)
    # Per map and feature: what another map holds, or a feature's offset and scale, is not seen.
    np.testing.assert_allclose(norm.apply({"params": params}, 5 * x + 1, style), found, atol=1e-4)
    assert np.abs(norm.apply({"params": params}, x, style[::-1]) - found).max() > 0.1


def test_another_latent_gives_another_picture_and_the_same_one_the_same():
    params = random_params(SMALL, noise(1, 6))
    run = jax.jit(lambda z: SMALL.apply({"params": params}, z))
    latent = jax.random.normal(jax.random.key(7), (1, 6))
    first, other = run(latent), run(jax.random.normal(jax.random.key(8), (1, 6)))
    np.testing.assert_array_equal(first, run(jax.random.normal(jax.random.key(7), (1, 6))))
    assert np.abs(first - other).max() > 0.1
    # Only its direction counts.
    np.testing.assert_allclose(run(3 * latent), first, atol=1e-4)


def test_each_block_obeys_its_own_style():
    params = {"params": random_params(SMALL, noise(1, 6))}
    one, two = noise(1, 6, seed=1), noise(1, 6, seed=2)

    @jax.jit
    def run(mixed):
        return SMALL.apply(params, one, mixed, method="synthesize")

    plain = run({})
    np.testing.assert_allclose(run({0: one, 1: one}), plain, atol=1e-5)
    pictures = [plain, run({0: two}), run({1: two}), run({0: two, 1: two})]
    assert min(np.abs(a - b).max() for i, a in enumerate(pictures) for b in pictures[:i]) > 1e-2


def test_places_are_told_by_sines_and_cosines():
    grid = sinusoidal_grid(3, 5, 8)
    # Column first, then row; rates 1 and 1 / 10000, places from 1 on.
    np.testing.assert_allclose(grid[2, 4, 0], np.sin(5))
    np.testing.assert_allclose(grid[2, 4, 3], np.cos(5e-4))
    np.testing.assert_allclose(grid[2, 4, 4], np.sin(3))
    np.testing.assert_allclose(grid[2, 4, 7], np.cos(3e-4))
    assert len(np.unique(grid.reshape(15, 8).round(6), axis=0)) == 15


def test_pictures_are_the_sum_of_what_every_stage_shows():
    params = random_params(SMALL, noise(1, 6))
    silent = {**params, "to_rgbs_0": jax.tree.map(jnp.zeros_like, params["to_rgbs_0"])}
    heads = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("to_rgbs_0", "to_rgbs_1")}
    heads["to_rgbs_0"]["bias"] = jnp.ones(3)
    apply = jax.jit(lambda p: SMALL.apply({"params": p}, noise(1, 6)))
    # The first picture is as large as the second stage's map: nothing is left to double.
    np.testing.assert_allclose(apply({**params, **heads}), 1.0)
    first = apply({**params, "to_rgbs_1": heads["to_rgbs_1"]})
    np.testing.assert_allclose(apply(silent) + first, apply(params), atol=1e-5)
    assert np.abs(upfirdn.upsample(first)).max() > 0.1


# Memory ----------------------------------------------------------------------------------------------------------


def test_recomputation_changes_no_gradient():
    model = SMALL.clone(features=(4,), num_heads=(2,))
    params = random_params(model, noise(1, 6))

    def gradient(name):
        loss = lambda p: jnp.sum(model.clone(remat=name).apply({"params": p}, noise(2, 6)) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, recomputed = gradient("none"), gradient("full")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5 * largest), recomputed, plain)


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init", "table_init"}
    for cls in (StyleSwin, StyleSwinBlock, DoubleWindowAttention):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 12
    assert issubclass(StyleSwin, nn.Module)
