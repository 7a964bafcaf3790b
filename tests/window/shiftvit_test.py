import functools
import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers import summarize
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import ShiftViT, ShiftViTBlock, shiftvit
from jaxlayers.window.shiftvit import shift_features

CASES = (
    Case(
        name="shiftvit_block",
        within="shiftvit",
        module=ShiftViTBlock(divisions=4, mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 6)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="divisions=3 must be at least 4", module=ShiftViTBlock(divisions=3)),
            BadInput(match="group=1 and distance=-1 must not be negative", module=ShiftViTBlock(4, distance=-1)),
            BadInput(match=r"rate=1.5 must lie in \[0, 1\)", module=ShiftViTBlock(drop_path_rate=1.5)),
            BadInput(match="hidden_features=0 and", module=ShiftViTBlock(mlp_ratio=0.0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 6)),)),
        ),
    ),
    Case(
        name="shiftvit",
        module=ShiftViT(num_classes=3, patch_size=2, embed_dim=5, depths=(1, 2), divisions=5),
        inputs=lambda rng: (rng.normal(size=(2, 10, 9, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"depths=\(2, 0\) must have one positive entry", module=ShiftViT(depths=(2, 0))),
            BadInput(match=r"depths=\(\) must have one positive entry", module=ShiftViT(depths=())),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=ShiftViT(drop_path_rate=1.0)),
            BadInput(match=r"patch_size=\(2, 2, 2\) must be an int or", module=ShiftViT(patch_size=(2, 2, 2))),
            BadInput(match="num_classes=-1 must not be negative", module=ShiftViT(num_classes=-1)),
            BadInput(match="remat='ful' must be one of", module=ShiftViT(remat="ful")),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
)

TINY = ShiftViT(num_classes=3, patch_size=2, embed_dim=5, depths=(2, 1), divisions=5, drop_path_rate=0.0)


def random_params(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), dtype), shapes)


def image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# The shift -------------------------------------------------------------------------------------------------------


def roll_and_zero(x, group, distance):
    """The shift in other words: roll with wrap-around, then erase what came in from the other side."""
    out = np.array(x)
    _, height, width, _ = x.shape
    for index, (axis, by) in enumerate([(2, -distance), (2, distance), (1, -distance), (1, distance)]):
        part = np.roll(x[..., index * group : (index + 1) * group], by, axis)
        length = (height, width)[axis - 1]
        entered = range(length - distance, length) if by < 0 else range(distance)
        for place in entered:
            part[(slice(None),) * axis + (place % length,)] = 0
        out[..., index * group : (index + 1) * group] = part
    return out


@pytest.mark.parametrize(("group", "distance"), [(2, 1), (1, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("size", [(5, 7), (4, 4)])
def test_shift_equals_rolling_and_erasing_to_the_bit(rng, group, distance, size):
    x = rng.normal(size=(2, *size, 13)).astype(np.float32)
    found = np.asarray(shift_features(jnp.asarray(x), group, distance))
    np.testing.assert_array_equal(found, roll_and_zero(x, group, distance))
    assert not np.array_equal(found, x)
    np.testing.assert_array_equal(found[..., 4 * group :], x[..., 4 * group :])


def test_directions_are_left_right_up_down():
    x = np.zeros((1, 3, 3, 5), np.float32)
    x[0, 1, 1] = 1.0
    found = np.asarray(shift_features(jnp.asarray(x), 1))
    places = [tuple(int(one) for one in np.argwhere(found[0, ..., c])[0]) for c in range(5)]
    assert places == [(1, 0), (1, 2), (0, 1), (2, 1), (1, 1)]


def test_shift_by_nothing_is_the_identity():
    x = image(1, 4, 5, 8)
    assert shift_features(x, 2, 0) is x
    assert shift_features(x, 0, 1) is x
    # Fewer features than divisions: none moves, and tokens do not meet.
    block = ShiftViTBlock(divisions=12, norm=functools.partial(nn.LayerNorm))
    params = random_params(block, x)
    changed = block.apply({"params": params}, x.at[0, 0, 0].add(1.0)) - block.apply({"params": params}, x)
    assert np.any(changed[0, 0, 0])
    assert not np.any(changed.at[0, 0, 0].set(0.0))


def test_shift_moves_out_of_a_map_that_is_smaller():
    found = np.asarray(shift_features(jnp.ones((1, 1, 3, 5)), 1, distance=3))
    assert not found[..., :4].any()
    assert found[..., 4].all()


def test_shift_commutes_with_translations_inside_the_border(rng):
    x = rng.normal(size=(1, 9, 10, 9)).astype(np.float32)
    by = (2, -3)
    moved = np.roll(x, by, (1, 2))
    found, expected = (np.asarray(shift_features(jnp.asarray(one), 2)) for one in (moved, x))
    expected = np.roll(expected, by, (1, 2))
    inside = np.s_[:, 3:-1, 1:-4]
    np.testing.assert_array_equal(found[inside], expected[inside])
    # At the border it does not: the zeros stay where they are.
    assert not np.array_equal(found, expected)
    # Negative control: a mirror is no translation, and exchanges left and right.
    mirrored = np.asarray(shift_features(jnp.asarray(x[:, :, ::-1]), 2))[:, :, ::-1]
    assert not np.array_equal(mirrored[inside], np.asarray(shift_features(jnp.asarray(x), 2))[inside])


def test_shift_has_neither_parameters_nor_arithmetic():
    x = jax.ShapeDtypeStruct((1, 8, 8, 24), jnp.float32)
    program = jax.make_jaxpr(lambda x: shift_features(x, 2))(x)
    # The moves are slices, pads and a concatenation.
    assert {equation.primitive.name for equation in program.jaxpr.eqns} <= {
        "slice",
        "pad",
        "concatenate",
        "jit",
        "pjit",
    }
    with_shift, without = (ShiftViTBlock(divisions=4, distance=distance) for distance in (1, 0))
    counts = [summarize(block, x) for block in (with_shift, without)]
    assert counts[0].parameters == counts[1].parameters
    assert counts[0].macs == counts[1].macs == 64 * 2 * 24 * 96


def test_shift_refuses_more_than_all_features(untyped):
    with pytest.raises(ValueError, match="4 \\* group not exceed the 7 features; set divisions"):
        shift_features(jnp.ones((1, 3, 3, 7)), 2)


# The block -------------------------------------------------------------------------------------------------------


def twin_block(params, x, *, divisions):
    """One block on one map [height, width, features] in float64 NumPy."""
    x = roll_and_zero(x[None], x.shape[-1] // divisions, 1)[0]
    y = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * params["pre_norm"]["scale"] + params["pre_norm"]["bias"]
    up, down = params["feed_forward"]["up"], params["feed_forward"]["down"]
    y = y @ up["kernel"] + up["bias"]
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    return x + y @ down["kernel"] + down["bias"]


def test_block_equals_its_twin():
    block = ShiftViTBlock(divisions=5, mlp_ratio=2.0)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 4, 11)))
        params = random_params(block, x, dtype=np.float64)
        found = jax.jit(block.apply)({"params": params}, x)
        assert found.dtype == jnp.float64
    expected = twin_block(jax.tree.map(np.asarray, params), np.asarray(x)[0], divisions=5)
    np.testing.assert_allclose(found[0], expected, atol=1e-11)


def test_blocks_reach_one_place_further_each_along_the_axes():
    # With a norm of each token alone, only the shift lets tokens meet: k blocks reach the diamond of radius k.
    token_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)
    block = ShiftViTBlock(divisions=4, norm=token_norm)
    x = image(1, 7, 7, 8)
    params = random_params(block, x)
    apply = jax.jit(functools.partial(block.apply, {"params": params}))
    step = np.random.default_rng(1).normal(size=8).astype(np.float32)
    plain, changed = x, x.at[0, 3, 3].add(step)
    distance = np.abs(np.arange(7) - 3)
    for reach in (1, 2, 3):
        plain, changed = apply(plain), apply(changed)
        heard = np.any(np.asarray(plain != changed)[0], axis=-1)
        expected = distance[:, None] + distance[None] <= reach
        # Features of one group leave the middle at the first step: all four are moved, none stays.
        parity = (distance[:, None] + distance[None]) % 2 == reach % 2
        np.testing.assert_array_equal(heard, expected & parity)


# The model -------------------------------------------------------------------------------------------------------

# Parameters, and millions of multiply-accumulates at 224 x 224, counted in the authors' code. Their table says 20M and
# 3.0G for tiny_light, 29M and 4.5G for tiny, 34M and 5.7G for small_light, 50M and 8.8G for small.
PUBLISHED = {
    "shiftvit_tiny_light": (19_608_328, 2963.2),
    "shiftvit_tiny_r4": (31_426_312, 4581.6),
    "shiftvit_tiny": (28_566_664, 4581.6),
    "shiftvit_small_light": (33_796_360, 5737.7),
    "shiftvit_small_r4": (51_523_336, 8512.2),
    "shiftvit_small": (50_304_136, 8743.4),
    "shiftvit_base_light": (59_708_776, 10193.6),
    "shiftvit_base_r4": (87_271_528, 15126.1),
    "shiftvit_base": (89_026_408, 15537.1),
}


def build(name):
    variant = shiftvit.VARIANTS[name]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    return variant["module"](**fields), variant["inputs"]


@pytest.mark.parametrize("name", shiftvit.VARIANTS)
def test_variants_have_the_published_parameters_and_multiply_accumulates(name):
    model, inputs = build(name)
    # All blocks of a stage are alike: count one and multiply.
    summary = summarize(model.clone(depths=(1,) * len(model.depths)), *inputs)
    extra = [
        (depth - 1, row)
        for stage, depth in enumerate(model.depths)
        for row in summary.rows
        if row.path == (f"stages_{stage}", "blocks_0")
    ]
    assert len(extra) == len(model.depths)
    parameters = summary.parameters + sum(times * row.parameters for times, row in extra)
    macs = summary.macs + sum(times * row.macs for times, row in extra)
    assert parameters == PUBLISHED[name][0]
    np.testing.assert_allclose(macs / 1e6, PUBLISHED[name][1], rtol=2e-2)


def test_features_are_a_pyramid_of_every_stage():
    model = TINY.clone(patch_size=(2, 3))
    x = jax.ShapeDtypeStruct((2, 17, 22, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    levels = jax.eval_shape(nn.apply(ShiftViT.features, model), shapes, x)
    assert [level.array.shape for level in levels] == [(2, 9, 8, 5), (2, 5, 4, 10)]
    assert [level.stride for level in levels] == [(2, 3), (4, 6)]


def test_one_parameter_tree_serves_every_size():
    x = jax.ShapeDtypeStruct((2, 17, 22, 3), jnp.float32)
    variables = jax.eval_shape(TINY.init, jax.random.key(0), x)
    assert set(variables) == {"params"}
    for size in [(8, 8), (1, 50), (64, 31)]:
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        assert jax.eval_shape(TINY.init, jax.random.key(0), images) == variables
        assert jax.eval_shape(TINY.apply, variables, images).shape == (1, 3)


def test_recomputation_changes_no_gradient_and_is_in_the_program():
    model = ShiftViT(num_classes=2, patch_size=2, embed_dim=5, depths=(2,), divisions=5)
    x = image(2, 6, 6, 3)
    params = random_params(model, x)

    def gradient(name):
        return jax.grad(lambda p: jnp.sum(jnp.sin(model.clone(remat=name).apply({"params": p}, x))))

    expected = jax.jit(gradient(False))(params)
    found = jax.jit(gradient("full"))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected)
    programs = {name: str(jax.make_jaxpr(gradient(name))(params)) for name in (False, True, "dots", "full")}
    assert [name for name, text in programs.items() if "checkpoint" in text or "remat" in text] == [
        True,
        "dots",
        "full",
    ]


def test_drop_path_rates_grow_with_depth():
    model = TINY.clone(depths=(2, 3), drop_path_rate=0.8)
    rates = model.bind({}).stages[0].rates + model.bind({}).stages[1].rates
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.6, 0.8])


# Parameter trees -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return random_params(TINY, image(1, 8, 8, 3))


def test_no_decay_marks_all_but_the_kernels(tiny):
    flat = flax.traverse_util.flatten_dict(shiftvit.no_decay(tiny), sep="/")
    assert {path.split("/")[-1] for path, without in flat.items() if not without} == {"kernel"}
    assert {path.split("/")[-1] for path, without in flat.items() if without} == {"bias", "scale"}


def test_layer_ids_count_blocks_from_the_patches_to_the_head(tiny):
    ids = shiftvit.layer_ids(tiny, TINY)

    def of(tree):
        return set(jax.tree.leaves(tree))

    assert of(ids["patch_embed"]) == {0}
    assert [of(ids["stages_0"][f"blocks_{index}"]) for index in range(2)] == [{1}, {2}]
    assert of(ids["stages_1"]["pre_norm"]) == of(ids["stages_1"]["downsample"]) == {2}
    assert of(ids["stages_1"]["blocks_0"]) == {3}
    assert of(ids["final_norm"]) == of(ids["head"]) == {4}


def to_reference(params):
    """Write our parameters the way the authors' code stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        if path.endswith("kernel"):
            if "projection" in path:
                leaf = leaf.reshape(2, 2, -1, leaf.shape[-1])
            leaf = np.moveaxis(leaf, (-1, -2), (0, 1))
            leaf = leaf[..., None, None] if "feed_forward" in path else leaf
        tensors[shiftvit.reference.reference_name(path, shiftvit.REFERENCE_NAMES["official"])] = leaf
    return tensors


def test_reference_names_cover_every_parameter(tiny):
    found = shiftvit.from_reference(to_reference(tiny), TINY)
    jax.tree.map(np.testing.assert_array_equal, found, tiny)


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny)
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        shiftvit.from_reference(tensors, TINY, source="timm")
    with pytest.raises(ValueError, match=r"source='official' must hold 'patch_embed.proj.weight'"):
        shiftvit.from_reference({}, TINY)
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['norm.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "norm.bias"}
        shiftvit.from_reference({**incomplete, "extra": np.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=r"must give .* its shape \(5, 5\), not \(10, 5\); set the fields"):
        shiftvit.from_reference(tensors, TINY.clone(mlp_ratio=1.0))
