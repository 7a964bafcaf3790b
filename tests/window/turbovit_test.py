import dataclasses
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers import summarize
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import turbovit
from jaxlayers.window.hiera import Hiera, average_pool
from jaxlayers.window.turbovit import TurboViT
from tests.window.hiera_test import random_params, twin_block

KEY_BIAS = {"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}

# Maps of 8 x 4 and 4 x 2 tokens, in units of 4 and everywhere.
TINY = TurboViT(
    num_classes=3,
    image_size=(32, 16),
    stem_features=6,
    embed_dim=(4, 6),
    depths=(1, 2),
    num_heads=(2, 3),
    unit_size=(4, None),
    mlp_ratio=2.0,
)

CASES = (
    Case(
        name="turbovit",
        module=TINY.clone(image_size=(20, 12), depths=(1, 1), embed_dim=(4, 8), num_heads=(2, 2), pool=average_pool),
        inputs=lambda rng: (rng.normal(size=(2, 20, 12, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"'depths': \(1,\).* must have one entry a stage", module=TINY.clone(depths=(1,))),
            BadInput(match="and positive depths", module=TINY.clone(depths=(1, 0))),
            BadInput(match="num_classes=-1 must not be negative", module=TINY.clone(num_classes=-1)),
            BadInput(
                match=r"image_size=\(3, 20, 12\) must be an int or \(height, width\)",
                module=TINY.clone(image_size=(3, 20, 12)),
            ),
            BadInput(
                match=r"unit_size=\(5, 5\) must be divisible by q_stride=\(2, 2\)",
                module=TINY.clone(unit_size=(5, None), image_size=(20, 12)),
            ),
            BadInput(
                match="features=6 must be divisible by num_heads=4",
                module=TINY.clone(num_heads=(2, 4)),
                inputs=lambda rng: (np.ones((1, 32, 16, 3)),),
            ),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=TINY.clone(drop_path_rate=1.0)),
            BadInput(
                match=r"spatial size \(16, 12\) must be image_size=\(20, 12\)",
                inputs=lambda rng: (np.ones((1, 16, 12, 3)),),
            ),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 20, 12, 3), int),)),
        ),
    ),
)


@pytest.fixture(scope="module")
def tiny():
    """A small model, its parameters, images of its size, logits and maps."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 16, 3)), jnp.float32)
    params = random_params(TINY, x)
    return params, x, *run(TINY, params, x)


def run(model, params, x):
    @jax.jit
    def both(params, x):
        return model.apply({"params": params}, x), nn.apply(type(model).features, model)({"params": params}, x)

    logits, levels = both(params, x)
    return logits, [level.array for level in levels]


# An independent twin: NumPy, patch by patch and token by token -----------------------------------------------------


def twin(params, image, *, pool):
    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    embed = params["patch_embed"]
    height, width, _ = image.shape
    padded = np.pad(image, [(3, 3), (3, 3), (0, 0)])
    x = np.zeros((height // 4, width // 4, embed["projection"]["bias"].size))
    for row, column in np.ndindex(*x.shape[:2]):
        patch = padded[4 * row : 4 * row + 7, 4 * column : 4 * column + 7]
        x[row, column] = np.einsum("hwc,hwcf->f", patch, embed["projection"]["kernel"]) + embed["projection"]["bias"]
    x += embed["position_embedding"].reshape(x.shape)
    blocks = (("0", "0", 2, (4, 4), (1, 1)), ("1", "0", 3, (4, 4), (2, 2)), ("1", "1", 3, None, (1, 1)))
    for stage, block, heads, unit, stride in blocks:
        p = params[f"stages_{stage}"][f"blocks_{block}"]
        x = twin_block(p, x, num_heads=heads, unit=unit, stride=stride, how=pool)
    x = x.mean((0, 1))
    norm = params["final_norm"]
    return dense(params["head"], (x - x.mean()) / np.sqrt(x.var() + 1e-6) * norm["scale"] + norm["bias"])


def test_model_equals_a_loop_over_patches_and_tokens(tiny):
    params, x, logits, _ = tiny
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = [twin(wide, np.asarray(image, np.float64), pool=np.max) for image in x]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    # Negative control: the other pooling is another model, which the field chooses.
    other = jax.jit(TINY.clone(pool=average_pool).apply)({"params": params}, x)
    assert np.abs(other - logits).max() > 0.01
    np.testing.assert_allclose(other[0], twin(wide, np.asarray(x[0], np.float64), pool=np.mean), atol=1e-5)


def test_stem_narrows_in_the_first_block_without_pooling(tiny):
    params, _, _, maps = tiny
    assert params["patch_embed"]["projection"]["bias"].shape == (6,)
    assert params["stages_0"]["blocks_0"]["skip"]["kernel"].shape == (6, 4)
    assert maps[0].shape == (2, 8, 4, 4)


# What the design patterns claim ------------------------------------------------------------------------------------


def test_each_pooling_leaves_a_quarter_of_the_tokens(tiny):
    _, _, _, maps = tiny
    assert [one.shape[1] * one.shape[2] for one in maps] == [32, 8]
    levels = jax.eval_shape(
        lambda x: TurboViT().init_with_output(jax.random.key(0), x, method="features")[0],
        jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )
    assert [level.array.shape[1:] for level in levels] == [(56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512)]
    assert [level.stride for level in levels] == [(4, 4), (8, 8), (16, 16), (32, 32)]


def test_units_are_local_first_and_everything_is_heard_later(tiny):
    params, x, _, maps = tiny
    # The pixels of the upper unit that no patch of the lower one looks at.
    _, moved = run(TINY, params, x.at[:, :13].add(jnp.asarray(np.random.default_rng(2).normal(size=(2, 13, 16, 3)))))
    heard = [np.any(one != other, axis=(0, 2, 3)) for one, other in zip(moved, maps, strict=True)]
    np.testing.assert_array_equal(heard[0], [True] * 4 + [False] * 4)
    assert heard[1].all()


def test_units_that_cover_the_map_equal_dense_attention(tiny):
    params, x, _, _ = tiny
    dense = TINY.clone(unit_size=(None, None))
    covering = TINY.clone(unit_size=(8, 6))
    expected, _ = run(dense, params, x)
    np.testing.assert_allclose(run(covering, params, x)[0], expected, atol=1e-5)
    # Negative control: smaller units are not dense attention.
    assert np.abs(jax.jit(TINY.apply)({"params": params}, x) - expected).max() > 1e-3


def test_with_doubling_widths_it_is_hiera_to_the_bit():
    shape = {"num_classes": 3, "image_size": (32, 16), "depths": (1, 1), "mlp_ratio": 2.0}
    ours = TurboViT(**shape, stem_features=4, embed_dim=(4, 8), num_heads=(1, 2), unit_size=(4, None))
    hiera = Hiera(**shape, embed_dim=4, num_heads=1, mask_unit_size=4, local_stages=1)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 16, 3)), jnp.float32)
    params = random_params(ours, x)
    np.testing.assert_array_equal(
        jax.jit(ours.apply)({"params": params}, x), jax.jit(hiera.apply)({"params": params}, x)
    )


# The variant -------------------------------------------------------------------------------------------------------


def test_variant_has_the_size_of_the_later_public_code():
    variant = turbovit.VARIANTS["turbovit_2427"]
    summary = summarize(variant["module"](), *variant["inputs"])
    # Counted with timm's Hiera, its stem and first block replaced as that code has them. The paper's own numbers are
    # not known: its abstract allows 12.7 M parameters and 2.2 G multiply-accumulates at most.
    assert summary.parameters == 13_567_016
    np.testing.assert_allclose(summary.macs, 2_473.1e6, rtol=2e-2)


# Parameter trees ---------------------------------------------------------------------------------------------------


def test_resize_fits_the_positions_and_leaves_the_rest(tiny):
    params = tiny[0]
    target = TINY.clone(image_size=24, unit_size=(None, None))
    resized = turbovit.resize(params, TINY, target)
    shapes = jax.eval_shape(target.init, jax.random.key(0), jnp.ones((1, 24, 24, 3)))["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)
    assert [name for name in params if resized[name] is not params[name]] == ["patch_embed"]
    with pytest.raises(ValueError, match=re.escape("stem_features=4 must equal the stem_features=6")):
        turbovit.resize(params, TINY, TINY.clone(stem_features=4))


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(turbovit.no_decay(tiny[0]))
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}
    assert {path[-1] for path, without in flat.items() if without} == {"bias", "scale", "position_embedding"}


def test_layer_ids_count_blocks_from_the_patches_to_the_head(tiny):
    ids = turbovit.layer_ids(tiny[0], TINY)
    found = {name: sorted(set(jax.tree.leaves(tree))) for name, tree in ids.items()}
    assert found == {"patch_embed": [0], "stages_0": [1], "stages_1": [2, 3], "final_norm": [4], "head": [4]}


def test_drop_path_rates_grow_with_depth():
    stages = TINY.clone(drop_path_rate=0.6).bind({}).stages
    np.testing.assert_allclose(sum((stage.drop_path_rates for stage in stages), ()), [0.0, 0.3, 0.6])


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    assert len({field.name for field in dataclasses.fields(TurboViT)} - others) <= 13
