import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers import summarize
from jaxlayers.nn.transformer_block import TransformerBlock
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry
from jaxlayers.window import vit_resnas
from jaxlayers.window.vit_resnas import (
    Architecture,
    ResidualSpatialReduction,
    ViTResNAS,
    ViTResNASBlock,
)

SUPER = ViTResNAS(
    num_classes=3,
    image_size=(10, 8),
    patch_size=4,
    stem_features=3,
    embed_dim=(6, 10),
    head_dim=(2, 3),
    num_heads=((3, 3), (2,)),
    hidden_features=((12, 12), (10,)),
    patch_output=True,
    drop_path_rate=0.0,
)
# One stage of one block.
SMALL = SUPER.clone(embed_dim=(6,), head_dim=(2,), num_heads=((3,),), hidden_features=((12,),), patch_output=False)
# One for each of four images: the whole, the least, without the last blocks, and without the first stage's alone.
ARCHITECTURES = (
    Architecture((6, 10), ((3, 3), (2,)), ((12, 12), (10,))),
    Architecture((4, 8), ((1, 1), (1,)), ((6, 6), (5,))),
    Architecture((4, 10), ((2, 0), (0,)), ((9, 0), (0,))),
    Architecture((6, 8), ((3, 0), (2,)), ((6, 0), (5,))),
)


def stack(architectures):
    return jax.tree.map(lambda *widths: jnp.array(widths), *architectures)


def pair(rng):
    """Two images, each with an architecture of its own."""
    return rng.normal(size=(2, 10, 8, 3)), stack((ARCHITECTURES[0], ARCHITECTURES[3]))


CASES = (
    Case(
        name="residual_spatial_reduction",
        within="vit_resnas",
        module=ResidualSpatialReduction(features=6),
        inputs=lambda rng: (rng.normal(size=(2, 13, 4)),),
        keywords={"size": (3, 4)},
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=3 must not be less than the 4 of the input", module=ResidualSpatialReduction(3)),
            BadInput(match=r"at least the 12 tokens of size=\(3, 4\)", inputs=lambda rng: (np.ones((2, 11, 4)),)),
            BadInput(match=r"got shape \(4,\); set size", inputs=lambda rng: (np.ones((4,)),)),
        ),
    ),
    Case(
        name="vit_resnas_block",
        within="vit_resnas",
        module=ViTResNASBlock(num_heads=3, head_dim=2, hidden_features=7),
        inputs=lambda rng: (rng.normal(size=(2, 5, 8)), (np.array([8, 8]), np.array([3, 1]), np.array([4, 7]))),
        symmetries=(
            Symmetry(
                Symmetric(5), inputs=("set", None), output="set", control=lambda x, widths: jnp.cumsum(x, axis=-2)
            ),
        ),
        leading_axes=True,
        zero_gradients={"key/bias": "adds the same to all scores of a query"},
        bad_inputs=(
            BadInput(match="num_heads=0, head_dim=2 and hidden_features=7 must be", module=ViTResNASBlock(0, 2, 7)),
            BadInput(match="head_dim=-1 and", module=ViTResNASBlock(3, -1, 7)),
            BadInput(match=r"rate=1.5 must lie in \[0, 1\)", module=ViTResNASBlock(3, 2, 7, drop_path_rate=1.5)),
            BadInput(match=r"must be \[\*batch, tokens, features\]", inputs=lambda rng: (np.ones((8,)),)),
        ),
    ),
    Case(
        name="vit_resnas",
        module=SUPER,
        inputs=pair,
        leading_axes=True,
        zero_gradients={"key/bias": "adds the same to all scores of a query"},
        bad_inputs=(
            BadInput(match=r"head_dim=\(2,\), .* must have one entry a stage", module=SUPER.clone(head_dim=(2,))),
            BadInput(match=r"must have one positive entry a block", module=SUPER.clone(num_heads=((3,), (2,)))),
            BadInput(match=r"must have one positive entry", module=SUPER.clone(hidden_features=((12, 0), (10,)))),
            BadInput(match=r"embed_dim=\(10, 6\) must be positive and not", module=SUPER.clone(embed_dim=(10, 6))),
            BadInput(match="patch_size=5 must be even", module=SUPER.clone(patch_size=5)),
            BadInput(match="stem_features=0 positive", module=SUPER.clone(stem_features=0)),
            BadInput(match="num_classes=-1 must not be", module=SUPER.clone(num_classes=-1)),
            BadInput(match=r"image_size=\(8,\) must be a positive int or", module=SUPER.clone(image_size=(8,))),
            BadInput(match=r"drop_path_rate=1.5 must lie in", module=SUPER.clone(drop_path_rate=1.5)),
            BadInput(match="remat='ful' must be one of", module=SUPER.clone(remat="ful")),
            BadInput(
                match=r"must have an entry for each stage and block",
                inputs=lambda rng: (np.ones((1, 10, 8, 3)), Architecture((6, 10), ((3,), (2,)), ((12,), (10,)))),
            ),
            BadInput(
                match=r"spatial size \(8, 8\) must be image_size=\(10, 8\); resize the images, or the parameters",
                inputs=lambda rng: (np.ones((1, 8, 8, 3)),),
            ),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 10, 8, 3), int),)),
        ),
    ),
)


def random_variables(module, *inputs, seed=0, **keywords):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(functools.partial(module.init, **keywords), jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    # Variances must be positive.
    return jax.tree.map(lambda leaf: jnp.asarray(np.abs(0.5 * rng.normal(size=leaf.shape)), jnp.float32), shapes) | {
        "params": jax.tree.map(
            lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), shapes["params"]
        )
    }


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


IMAGES = normal(4, 10, 8, 3)


@pytest.fixture(scope="module")
def variables():
    return random_variables(SUPER, IMAGES)


@pytest.fixture(scope="module")
def forward():
    """The whole model and the masked ones, compiled once for all tests; and how often they were traced."""
    traced = []

    @jax.jit
    def run(variables, x, architecture):
        traced.append(architecture)
        return SUPER.apply(variables, x, architecture)

    return run, traced


# The reduction --------------------------------------------------------------------------------------------------------


def means(grid):
    """Means of 2 x 2 entries, of those that there are."""
    height, width = grid.shape[:2]
    return np.array(
        [
            [grid[row : row + 2, column : column + 2].mean(axis=(0, 1)) for column in range(0, width, 2)]
            for row in range(0, height, 2)
        ]
    )


@pytest.mark.parametrize(("size", "first"), [((4, 6), 1), ((3, 4), 2), ((5, 1), 0), ((1, 1), 1)])
def test_without_its_branch_the_reduction_is_the_pooled_skip(size, first):
    layer = ResidualSpatialReduction(features=7)
    x = normal(2, first + size[0] * size[1], 5)
    shapes = jax.eval_shape(functools.partial(layer.init, size=size), jax.random.key(0), x)
    # No convolution, no projection, no positions.
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    found = np.asarray(layer.apply(zero, x, size=size))
    # Height and width are halved, rounded up.
    assert found.shape == (2, first + -(-size[0] // 2) * -(-size[1] // 2), 7)
    np.testing.assert_array_equal(found[..., 5:], 0)
    np.testing.assert_array_equal(found[:, :first, :5], x[:, :first])
    for one, out in zip(np.asarray(x), found, strict=True):
        expected = means(one[first:].reshape(*size, 5))
        np.testing.assert_allclose(out[first:, :5], expected.reshape(-1, 5), atol=1e-6)


def test_reduction_equals_its_twin():
    layer, size = ResidualSpatialReduction(features=4), (5, 4)
    x = normal(1, 21, 3)
    params = random_variables(layer, x, size=size)["params"]
    found = layer.apply({"params": params}, x, size=size)[0]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens = np.asarray(x[0], np.float64)
    y = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    y = y * params["pre_norm"]["scale"] + params["pre_norm"]["bias"]
    padded = np.zeros((7, 6, 3))
    padded[1:6, 1:5] = y[1:].reshape(5, 4, 3)
    kernel = params["reduce"]["kernel"]
    branch = [
        np.einsum("rci,rcio->o", padded[2 * row : 2 * row + 3, 2 * column : 2 * column + 3], kernel)
        for row in range(3)
        for column in range(2)
    ]
    branch = np.array(branch) + params["reduce"]["bias"] + params["position_embedding"]
    skip = np.pad(means(tokens[1:].reshape(5, 4, 3)).reshape(6, 3), ((0, 0), (0, 1)))
    token = y[0] @ params["project"]["kernel"] + params["project"]["bias"] + np.pad(tokens[0], (0, 1))
    np.testing.assert_allclose(found, np.concatenate([token[None], branch + skip]), atol=1e-5)


def test_reduction_sees_three_by_three_places_and_the_token_itself_alone():
    layer, size = ResidualSpatialReduction(features=4), (7, 5)
    x = normal(36, 3)
    params = random_variables(layer, x, size=size)
    run = jax.jit(jax.vmap(lambda x: layer.apply(params, x, size=size)))
    places = [(row, column) for row in range(7) for column in range(5)]
    changed = jnp.stack([x.at[1 + index].add(normal(3, seed=1)) for index in range(35)])
    # What is not heard may still be rounded otherwise at another place in the batch.
    heard = np.any(np.abs(np.asarray(run(changed) - run(x[None]))) > 1e-4, axis=-1)
    assert not heard[:, 0].any()
    for (row, column), found in zip(places, heard[:, 1:].reshape(35, 4, 3), strict=True):
        near = [[abs(row - 2 * i) <= 1 and abs(column - 2 * j) <= 1 for j in range(3)] for i in range(4)]
        np.testing.assert_array_equal(found, near)
    # The class token reaches itself, and no place.
    heard = np.any(np.abs(np.asarray(run(x[None].at[0, 0].add(normal(3))) - run(x[None]))) > 1e-4, axis=-1)[0]
    assert heard.tolist() == [True] + [False] * 12


def test_reduction_refuses_positions_of_another_size(untyped):
    layer = ResidualSpatialReduction(features=4)
    params = random_variables(layer, normal(1, 16, 3), size=(4, 4))
    with pytest.raises(ValueError, match=r"size=\(6, 6\) leaves 9 places, but position_embedding has 4; set size"):
        layer.apply(params, normal(1, 36, 3), size=(6, 6))


# The block ------------------------------------------------------------------------------------------------------------


def test_heads_that_divide_the_features_are_a_plain_transformer_block():
    x = normal(2, 5, 6)
    plain = TransformerBlock(num_heads=3, mlp_ratio=2.0)
    block = ViTResNASBlock(num_heads=3, head_dim=2, hidden_features=12)
    params = random_variables(plain, x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_variables(block, x))
    np.testing.assert_allclose(block.apply(params, x), plain.apply(params, x), atol=1e-5)


def test_masked_block_is_the_smaller_block_of_each_entry():
    block = ViTResNASBlock(num_heads=3, head_dim=2, hidden_features=12)
    widths = np.array([[8, 3, 12], [5, 2, 7], [6, 0, 0]])
    x = jnp.where(jnp.arange(8) < widths[:, :1, None], normal(3, 5, 8), 0)
    params = random_variables(block, x)
    run = jax.jit(lambda block, x, widths=None: block.apply(params, x, widths), static_argnums=0)
    found = run(block, x, tuple(jnp.asarray(widths.T)))
    for (features, heads, hidden), before, after in zip(widths[:2], x, found, strict=False):
        small = ViTResNASBlock(num_heads=int(heads), head_dim=2, hidden_features=int(hidden))
        shapes = jax.eval_shape(small.init, jax.random.key(0), before[:, :features])
        cut = jax.tree.map(lambda big, leaf: big[tuple(map(slice, leaf.shape))], params, shapes)
        expected = jax.jit(small.apply)(cut, before[:, :features])
        np.testing.assert_allclose(after[:, :features], expected, atol=1e-5)
        np.testing.assert_array_equal(after[:, features:], 0)
    # Without heads there is no block.
    np.testing.assert_array_equal(found[2], x[2])
    # Negative control: a norm with the statistics of all features, masked ones too, is another function.
    whole = run(block.clone(norm=_BlindNorm), x, tuple(jnp.asarray(widths.T)))
    np.testing.assert_allclose(whole[0], found[0], atol=1e-5)
    assert np.abs(whole[1] - found[1]).max() > 0.1


class _BlindNorm(nn.LayerNorm):
    epsilon: float = 1e-6

    def __call__(self, x, *, mask=None):
        return super().__call__(x)


# The model ------------------------------------------------------------------------------------------------------------

# Parameters without and with the head of the patches, as the authors count them (41 M, 65 M and 97 M), and millions of
# multiply-accumulates, all counted in their code.
PUBLISHED = {
    "vit_res_tiny": (42_012_736, 42_781_736, 1794.378),
    "vit_resnas_tiny": (40_793_552, 41_498_552, 1782.630),
    "vit_resnas_small": (63_724_108, 64_605_108, 2845.502),
    "vit_resnas_medium": (96_442_672, 97_323_672, 4513.136),
}


def build(name):
    variant = vit_resnas.VARIANTS[name]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    return variant["module"](**fields), variant["inputs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", vit_resnas.VARIANTS)
def test_variants_have_the_published_parameters_and_multiply_accumulates(name):
    model, inputs = build(name)
    parameters, with_patches, macs = PUBLISHED[name]
    if name == "vit_resnas_tiny":
        summary = summarize(model, *inputs)
        found = summary.parameters
        assert vit_resnas.multiply_accumulates(model) == summary.macs
    else:
        # Multiply-accumulates from the fields are those of the program, see above and below.
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        found = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found == parameters
    assert found + (model.embed_dim[-1] + 1) * 1000 == with_patches
    np.testing.assert_allclose(vit_resnas.multiply_accumulates(model) / 1e6, macs, rtol=1e-5)


def test_features_are_a_pyramid_of_every_stage_at_any_size(variables):
    for size, grids in [((10, 8), [(3, 2), (2, 1)]), ((64, 31), [(16, 8), (8, 4)]), ((3, 50), [(1, 13), (1, 7)])]:
        model = SUPER.clone(image_size=size)
        x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        params = jax.eval_shape(lambda p, model=model: vit_resnas.resize(p, SUPER, model), variables["params"])
        fitted = {**variables, "params": params}
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, shapes)
        levels = jax.eval_shape(nn.apply(ViTResNAS.features, model), fitted, x)
        assert [level.array.shape for level in levels] == [
            (2, *grid, width) for grid, width in zip(grids, (6, 10), strict=True)
        ]
        assert [level.stride for level in levels] == [(4, 4), (8, 8)]


def test_every_pixel_reaches_the_logits_and_every_place(variables):
    # Also those of a size that is no multiple of patch or reduction.
    def total(x, place):
        logits, patches = SUPER.apply(variables, x)
        weights = jnp.arange(1.0, 4.0)
        return jnp.sum(jnp.where(place < 0, logits, patches[:, place]) @ weights)

    gradient = jax.jit(jax.grad(total))
    for place in (-1, 0, 1):
        # For some image: a pixel may be where the stem's rectifiers are shut.
        assert np.all(np.any(np.asarray(gradient(IMAGES, place)), axis=(0, -1)))


def test_resize_fits_the_positions_and_leaves_the_rest(variables):
    params = variables["params"]
    target = SUPER.clone(image_size=(32, 24), drop_path_rate=0.5)
    resized = flax.traverse_util.flatten_dict(vit_resnas.resize(params, SUPER, target), sep="/")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tables = ["position_embedding", "stages_1/reduction/position_embedding"]
    assert sorted(path for path in flat if resized[path] is not flat[path]) == tables
    np.testing.assert_array_equal(resized["position_embedding"][0], params["position_embedding"][0])
    ones = jax.tree.map(jnp.ones_like, params)
    for leaf in jax.tree.leaves(vit_resnas.resize(ones, SUPER, target)):
        np.testing.assert_allclose(leaf, 1.0, atol=1e-6)
    # A size of as many patches needs nothing.
    same = vit_resnas.resize(params, SUPER, SUPER.clone(image_size=(12, 7)))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with pytest.raises(ValueError, match=r"stem_features=4 must equal the stem_features=3 of the parameters"):
        vit_resnas.resize(params, SUPER, SUPER.clone(stem_features=4))


@pytest.mark.slow
def test_recomputation_changes_no_gradient_and_is_in_the_program(variables):
    small = SMALL.clone(num_classes=0)
    part = {
        "params": {name: variables["params"][name] for name in ("patch_embed", "class_token", "position_embedding")}
    }
    part["params"] |= {
        "stages_0": {"blocks_0": variables["params"]["stages_0"]["blocks_0"]},
        "final_norm": jax.tree.map(lambda leaf: leaf[:6], variables["params"]["final_norm"]),
    }
    widths = Architecture((jnp.array([6, 4, 5, 6]),), ((jnp.array([3, 1, 2, 0]),),), ((jnp.array([12, 5, 7, 0]),),))

    def gradient(name):
        def loss(params):
            model = small.clone(remat=name)
            return jnp.sum(jnp.sin(model.apply({**variables, "params": params}, IMAGES, widths)))

        return jax.grad(loss)

    expected, found = (jax.jit(gradient(name))(part["params"]) for name in (False, "full"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)
    programs = {name: str(jax.make_jaxpr(gradient(name))(part["params"])) for name in (False, "full", "attention")}
    assert [name for name, text in programs.items() if "checkpoint" in text or "remat" in text] == ["full", "attention"]


def test_drop_path_rates_grow_with_depth_and_pass_over_missing_blocks():
    model = SUPER.clone(num_heads=((3, 0), (2,)), drop_path_rate=0.8)
    rates = {}

    def record(call, args, keywords, context):
        if isinstance(context.module, ViTResNASBlock):
            rates["/".join(context.module.path)] = context.module.drop_path_rate
        return call(*args, **keywords)

    with nn.intercept_methods(record):
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    assert rates == {"stages_0/blocks_0": 0.0, "stages_1/blocks_0": 0.8}
    assert sorted(shapes["stages_0"]) == ["blocks_0"]


# Weight sharing -------------------------------------------------------------------------------------------------------


def cut(params, architecture):
    """The first columns and rows by hand: an independent twin of `slice_params`, for `SUPER`."""
    widths, found = architecture.embed_dim, {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        stage = int(path[7]) if path.startswith("stages_") else (0 if "position" in path or "token" in path else 1)
        width = widths[stage]
        if path.startswith("patch_embed"):
            leaf = leaf[..., : widths[0]] if "projection" in path else leaf
        elif "head" in path:
            leaf = leaf[:width] if path.endswith("kernel") else leaf
        elif "/blocks_" in path:
            block = int(path.split("/")[1].removeprefix("blocks_"))
            heads, hidden = architecture.num_heads[stage][block], architecture.hidden_features[stage][block]
            if not heads:
                continue
            inner = heads * SUPER.head_dim[stage]
            ends = {"query": inner, "key": inner, "value": inner, "up": hidden}
            starts = {"out": inner, "down": hidden}
            name = path.split("/")[-2]
            leaf = leaf[..., : ends.get(name, width)]
            leaf = leaf[: starts.get(name, width)] if path.endswith("kernel") else leaf
        else:
            leaf = leaf[..., :width]
            if path.endswith("kernel"):
                leaf = leaf[..., : widths[0], :]
            elif "pre_norm" in path:
                leaf = leaf[: widths[0]]
        found[path] = leaf
    return found


@pytest.mark.parametrize("number", range(4))
def test_sub_network_is_the_standalone_model_of_the_sliced_parameters(variables, number):
    sub = vit_resnas.sub_network(SUPER, ARCHITECTURES[number])
    found = vit_resnas.slice_params(variables["params"], SUPER, sub)
    # What the architecture, built alone, has; and just the numbers that it should have.
    shapes = jax.eval_shape(sub.init, jax.random.key(0), IMAGES)["params"]
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, shapes)
    expected = cut(variables["params"], ARCHITECTURES[number])
    found = flax.traverse_util.flatten_dict(found, sep="/")
    assert set(found) == set(expected)
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.slow
def test_masked_network_is_the_sub_network_of_each_image(variables, forward):
    run, traced = forward
    logits, patches = run(variables, IMAGES, stack(ARCHITECTURES))
    programs = len(traced)
    for number in (1, 3):
        sub = vit_resnas.sub_network(SUPER, ARCHITECTURES[number])
        params = vit_resnas.slice_params(variables["params"], SUPER, sub)
        out = jax.jit(sub.apply)({**variables, "params": params}, IMAGES[number : number + 1])
        np.testing.assert_allclose(logits[number], out[0][0], atol=1e-5 * np.abs(out[0]).max())
        np.testing.assert_allclose(patches[number], out[1][0], atol=1e-5 * np.abs(out[1]).max())
    # The sub-networks differ: nothing of this is empty.
    whole, _ = run(variables, IMAGES, stack([ARCHITECTURES[0]] * 4))
    np.testing.assert_allclose(whole[0], logits[0], atol=1e-5)
    assert min(np.abs(whole[number] - logits[number]).max() for number in (1, 2, 3)) > 0.05
    plain, _ = jax.jit(SUPER.apply)(variables, IMAGES)
    np.testing.assert_allclose(whole, plain, atol=1e-5)
    # Other architectures of the images run in the same program.
    again, _ = run(variables, IMAGES[::-1], stack(ARCHITECTURES[::-1]))
    np.testing.assert_allclose(again[::-1], logits, atol=1e-5)
    assert len(traced) == programs


@pytest.mark.slow
def test_one_backward_pass_sums_the_gradients_of_the_sub_networks(variables):
    # Two images, of networks that lack features, heads, hidden features and blocks.
    chosen, x = ARCHITECTURES[2:], IMAGES[:2]

    def loss(model, params, x, *architecture):
        logits, patches = model.apply({**variables, "params": params}, x, *architecture)
        return jnp.sum(jnp.sin(logits)) + jnp.sum(patches**2)

    def alone(params):
        subs = [vit_resnas.sub_network(SUPER, one) for one in chosen]
        return sum(
            loss(sub, vit_resnas.slice_params(params, SUPER, sub), image[None])
            for sub, image in zip(subs, x, strict=True)
        )

    def masked(params):
        return loss(SUPER, params, x, stack(chosen))

    found, expected = (jax.jit(jax.grad(function))(variables["params"]) for function in (masked, alone))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest), found, expected)
    # What neither has gets no gradient.
    for name in ("blocks_1", "blocks_0"):
        heads = found["stages_0"][name]["attention"]["value"]["kernel"]
        assert np.any(heads) == (name == "blocks_0")


def test_a_stage_with_fewer_entries_has_the_first_blocks(variables):
    short = SUPER.clone(num_heads=((3,), (2,)), hidden_features=((12,), (10,)))
    found = vit_resnas.slice_params(variables["params"], SUPER, short)
    assert sorted(found["stages_0"]) == ["blocks_0"]
    jax.tree.map(
        np.testing.assert_array_equal, found["stages_0"]["blocks_0"], variables["params"]["stages_0"]["blocks_0"]
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"head_dim": (1, 3)}, r"head_dim=\(1, 3\) must equal the head_dim=\(2, 3\)"),
        ({"image_size": 8}, r"image_size=8 must equal"),
        ({"embed_dim": (7, 10)}, r"must lie within the larger model's \(6,\); set the fields"),
        ({"num_heads": ((3, 3), (3,))}, r"attention/.* must lie within the larger"),
        ({"num_heads": ((3, 3, 3), (2,)), "hidden_features": ((12,) * 3, (10,))}, "blocks_2.* model's parameters"),
    ],
)
def test_slicing_refuses_what_the_larger_model_does_not_have(variables, change, match):
    with pytest.raises(ValueError, match=match):
        vit_resnas.slice_params(variables["params"], SUPER, SUPER.clone(**change))


def test_order_of_importance_keeps_the_function(variables, forward):
    run, _ = forward
    whole = stack([ARCHITECTURES[0]] * 4)
    found = vit_resnas.sort_by_importance(variables["params"], SUPER)
    expected, _ = run(variables, IMAGES, whole)
    np.testing.assert_allclose(run({**variables, "params": found}, IMAGES, whole)[0], expected, atol=1e-4)
    # Scaling a head makes it the first.
    attention = variables["params"]["stages_0"]["blocks_1"]["attention"]
    attention = {
        **attention,
        "value": {**attention["value"], "kernel": attention["value"]["kernel"].at[:, 4:].mul(99.0)},
    }
    scaled = {**variables["params"], "stages_0": {**variables["params"]["stages_0"]}}
    scaled["stages_0"]["blocks_1"] = {**scaled["stages_0"]["blocks_1"], "attention": attention}
    moved = vit_resnas.sort_by_importance(scaled, SUPER)["stages_0"]["blocks_1"]["attention"]
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(moved[name]["kernel"][:, :2], attention[name]["kernel"][:, 4:])
    np.testing.assert_array_equal(moved["out"]["kernel"][:2], attention["out"]["kernel"][4:])


# Parameter trees ------------------------------------------------------------------------------------------------------


def test_no_decay_marks_all_but_the_kernels(variables):
    flat = flax.traverse_util.flatten_dict(vit_resnas.no_decay(variables["params"]), sep="/")
    assert {path.split("/")[-1] for path, without in flat.items() if not without} == {"kernel"}
    assert {"class_token", "position_embedding"} <= {path for path, without in flat.items() if without}


def test_layer_ids_count_blocks_from_the_patches_to_the_head(variables):
    ids = vit_resnas.layer_ids(variables["params"], SUPER)
    assert jax.tree.structure(ids) == jax.tree.structure(variables["params"])

    def of(tree):
        return set(jax.tree.leaves(tree))

    assert of([ids["patch_embed"], ids["class_token"], ids["position_embedding"]]) == {0}
    assert [of(ids["stages_0"][f"blocks_{index}"]) for index in range(2)] == [{1}, {2}]
    assert of(ids["stages_1"]["reduction"]) == {2}
    assert of(ids["stages_1"]["blocks_0"]) == {3}
    assert of([ids[name] for name in ("final_norm", "head", "patch_head")]) == {4}


def to_reference(variables):
    """Write our variables the way the authors' code stores them."""
    tensors = {}
    joined = {}
    for tree in variables.values():
        joined |= flax.traverse_util.flatten_dict(tree, sep="/")
    for path, leaf in joined.items():
        leaf = np.asarray(leaf)
        if path.endswith("kernel"):
            leaf = np.moveaxis(leaf, (-1, -2), (0, 1))
        elif path.endswith("position_embedding"):
            leaf = leaf[None]
        elif path == "class_token":
            leaf = leaf[None, None]
        name = vit_resnas.reference.reference_name(path, vit_resnas.REFERENCE_NAMES["official"])
        for number, place in enumerate(("0.blocks.0", "0.blocks.1", "1.reduction", "1.blocks.0")):
            name = name.replace(f"stages.{place}", f"blocks.{number}")
        tensors[name] = leaf
    for name in [name for name in tensors if ".attn.query." in name]:
        parts = [tensors.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        tensors[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    return tensors


def test_reference_names_cover_every_variable(variables):
    tensors = {**to_reference(variables), "patch_embed.conv1.bn.num_batches_tracked": np.zeros(())}
    found = vit_resnas.from_reference(tensors, SUPER)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_reference_checkpoints_that_do_not_fit_are_refused(variables):
    tensors = to_reference(variables)
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        vit_resnas.from_reference(tensors, SUPER, source="timm")
    with pytest.raises(ValueError, match="source='official' must hold 'patch_embed.conv1.conv.weight'"):
        vit_resnas.from_reference({}, SUPER)
    with pytest.raises(ValueError, match=r"unknown \['blocks.9.extra'\], missing \['norm.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "norm.bias"}
        vit_resnas.from_reference({**incomplete, "blocks.9.extra": np.zeros(1)}, SUPER)
    with pytest.raises(ValueError, match=r"must give .* its shape .*; set the fields"):
        vit_resnas.from_reference(tensors, SUPER.clone(hidden_features=((12, 11), (10,))))
