import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core import axes
from jaxlayers.ops.patches import pad_to_multiple
from jaxlayers.ops.windows import merge_windows, partition_windows
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import SwinBlock, swin_unetr
from jaxlayers.window.swin_unetr import MERGINGS, SwinUNETR, UNetResBlock, instance_norm
from tests.window.spatial_test import differentiated, error, mesh_of, on_mesh, random_params
from tests.window.swin_test import KEY_BIAS

TINY = SwinUNETR(num_classes=2, embed_dim=4, depths=(1,), num_heads=(2,), window_size=(2, 2, 2))
FLAT = TINY.clone(embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=(4, 3))
SHORT = FLAT.clone(depths=(2,), num_heads=(2,))

CASES = (
    Case(
        name="unet_res_block",
        within="swin_unetr",
        module=UNetResBlock(features=3, kernel_size=(3, 3, 3)),
        inputs=lambda rng: (rng.normal(size=(2, 3, 5, 4, 2)),),
        leading_axes=True,
        bfloat16_tolerance=0.1,
        bad_inputs=(
            BadInput(match="features=0 and the 1 to 3 entries", module=UNetResBlock(features=0)),
            BadInput(match=r"kernel_size=\(3, 3, 3, 3\) must be", module=UNetResBlock(2, kernel_size=(3,) * 4)),
            BadInput(match="3 spatial axes needs at least 4 axes", inputs=lambda rng: (np.ones((4, 4, 2)),)),
            BadInput(match=r"size \(1, 1, 1\) must have two entries", inputs=lambda rng: (np.ones((2, 1, 1, 1, 2)),)),
        ),
    ),
    Case(
        name="swin_unetr",
        module=TINY.clone(stage_convolutions=True),
        inputs=lambda rng: (rng.normal(size=(2, 9, 8, 7, 2)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        # Instance norms over a dozen entries enlarge what rounding does to small variances.
        bfloat16_tolerance=0.15,
        bad_inputs=(
            BadInput(
                match=r"depths=\(2,\) and num_heads=\(1, 2\) must have",
                module=TINY.clone(num_heads=(1, 2), depths=(2,)),
            ),
            BadInput(match=r"window_size=\(7,\) must have 2 or 3", module=TINY.clone(window_size=(7,))),
            BadInput(match=r"patch_size=\(2, 2\) must be an int or", module=TINY.clone(patch_size=(2, 2))),
            BadInput(match="num_classes=-1 must not be negative", module=TINY.clone(num_classes=-1)),
            BadInput(match="merging='v3' must be one of", module=TINY.clone(merging="v3")),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=TINY.clone(drop_path_rate=1.0)),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 8, 1), int),)),
            BadInput(match="3 spatial axes needs at least 4 axes", inputs=lambda rng: (np.ones((8, 8, 1)),)),
            BadInput(
                match=r"size \(4, 3, 4\) must be longer than the coarsest stride \(4, 4, 4\)",
                inputs=lambda rng: (np.ones((1, 4, 3, 4, 2)),),
            ),
        ),
    ),
)


def example(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def flat():
    """A small model of images, its parameters, images that are no multiples of anything, and the logits."""
    x = example(2, 22, 29, 1)
    params = random_params(FLAT, x)
    return params, x, jax.jit(FLAT.apply)({"params": params}, x)


# Figures --------------------------------------------------------------------------------------------------------------

COUNTS = {
    "1 in 14 out": (62_187_296, 1, {}),
    "4 in 3 out": (62_191_941, 4, {"num_classes": 3}),
    "1 in 2 out": (62_186_708, 1, {"num_classes": 2}),
    "C = 24": (15_703_304, 1, {"embed_dim": 24}),
    "version 2": (72_762_656, 1, {"stage_convolutions": True}),
    "2-D, C = 24": (6_302_528, 1, {"embed_dim": 24, "window_size": (7, 7)}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters_is_monai_s(name):
    expected, channels, fields = COUNTS[name]
    model = SwinUNETR(**fields)
    x = jax.ShapeDtypeStruct((1, *(64,) * len(model.window_size), channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert set(shapes) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_cost_at_96_is_what_was_measured_of_monai():
    model = SwinUNETR(table_prefix=False)
    x = jax.ShapeDtypeStruct((1, 96, 96, 96, 1), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert round(count_macs(model.apply, shapes, x) / 1e9, 3) == 318.525


def test_variants_give_a_pyramid_of_five_resolutions():
    for name in ("swin_unetr_brats", "swin_unetr_2d"):
        fields = swin_unetr.VARIANTS[name]
        inputs = fields["inputs"]
        model = SwinUNETR(**{name: value for name, value in fields.items() if name not in ("module", "inputs")})
        levels = jax.eval_shape(
            lambda x, model=model: model.init_with_output(jax.random.key(0), x, method="features")[0], *inputs
        )
        side, rank = inputs[0].shape[1], len(model.window_size)
        assert [level.stride for level in levels] == [(2 * 2**index,) * rank for index in range(5)]
        assert [level.array.shape for level in levels] == [
            (1, *(side // 2 ** (index + 1),) * rank, model.embed_dim * 2**index) for index in range(5)
        ]


# Windows --------------------------------------------------------------------------------------------------------------


def test_windows_of_a_volume_are_put_together_again():
    x = example(2, 4, 6, 10, 3)
    windows = partition_windows(x, (2, 3, 5))
    assert windows.shape == (2, 8, 30, 3)
    np.testing.assert_array_equal(merge_windows(windows, (2, 3, 5), (4, 6, 10)), x)
    np.testing.assert_array_equal(windows[1, 7].reshape(2, 3, 5, 3), x[1, 2:, 3:, 5:])


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_window_as_large_as_the_volume_equals_dense_attention(prefixed):
    # `prefixed` clips a larger window, whose tokens then have the places of its first ones.
    size, window = (3, 2, 4), (3, 3, 5) if prefixed else (3, 2, 4)
    block = swin_unetr._make_block(
        window_size=window,
        shifted=True,
        clipped=prefixed,
        num_heads=2,
        mlp_ratio=1.0,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        drop_path_rate=0.0,
        mask_padding=False,
        norm=swin_unetr.layer_norm,
        dtype=None,
        param_dtype=jnp.float32,
        kernel_init=nn.initializers.normal(),
        bias_init=nn.initializers.zeros,
    )
    x = example(1, *size, 8)
    call = functools.partial(block.apply, deterministic=True)
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, deterministic=True), x)["params"]
    params = jax.tree.map(lambda leaf: example(*leaf.shape), shapes)
    found = jax.jit(call)({"params": params}, x)

    places = list(itertools.product(*map(range, window if prefixed else size)))[:24]
    offsets = [[tuple(a - b for a, b in zip(p, q, strict=True)) for q in places] for p in places]
    lengths = [2 * step - 1 for step in window]
    rows = np.array(
        [
            [np.ravel_multi_index([o + s - 1 for o, s in zip(one, window, strict=True)], lengths) for one in r]
            for r in offsets
        ]
    )
    bias = jnp.moveaxis(params["attention"]["relative_position_bias_table"][rows], -1, 0)
    tokens = nn.LayerNorm(epsilon=1e-5).apply({"params": params["norm1"]}, x).reshape(1, 24, 8)

    def heads(name):
        return nn.Dense(8).apply({"params": params["attention"][name]}, tokens).reshape(1, 24, 2, 4)

    dense = nn.dot_product_attention(heads("query"), heads("key"), heads("value"), bias=bias).reshape(1, *size, 8)
    z = x + nn.Dense(8).apply({"params": params["attention"]["out"]}, dense)
    hidden = nn.Dense(8).apply(
        {"params": params["feed_forward"]["up"]}, nn.LayerNorm(epsilon=1e-5).apply({"params": params["norm2"]}, z)
    )
    expected = z + nn.Dense(8).apply({"params": params["feed_forward"]["down"]}, nn.gelu(hidden, approximate=False))
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))
    # Negative control: the other way to read the table.
    if prefixed:
        other = SwinBlock(2, window_size=window, shift_size=(1, 1, 2), mlp_ratio=1.0).apply({"params": params}, x)
        assert float(jnp.abs(other - found).max()) > 1e-2


# The model ------------------------------------------------------------------------------------------------------------


def test_instance_norm_is_a_mean_and_a_variance_over_space_and_keeps_its_statistics_in_float32():
    x = 1000 + example(2, 8, 8, 3)
    found = instance_norm(x, 2)
    np.testing.assert_allclose(jnp.mean(found, (1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(jnp.std(found, (1, 2)), 1, atol=1e-3)
    assert instance_norm(x.astype(jnp.bfloat16), 2).dtype == jnp.bfloat16
    # The mean of 64 entries near 1000 would be lost in half precision.
    coarse = instance_norm((example(1, 64, 64, 1) * 8 + 256).astype(jnp.bfloat16), 2)
    assert abs(float(jnp.mean(coarse.astype(jnp.float32)))) < 0.01


def test_sizes_that_are_no_multiples_keep_their_size_and_multiples_are_not_padded(flat, monkeypatch):
    params, x, logits = flat
    assert logits.shape == (2, 22, 29, 2)
    for size in [(16, 9), (9, 40), (33, 8)]:
        assert jax.eval_shape(FLAT.apply, {"params": params}, jnp.ones((*size, 1))).shape == (*size, 2)
    padded = []
    monkeypatch.setattr(
        swin_unetr, "pad_to_multiple", lambda x, step: padded.append(x.shape) or pad_to_multiple(x, step)
    )
    jax.eval_shape(FLAT.apply, {"params": params}, x)
    assert [shape[1:3] for shape in padded] == [(11, 15), (6, 8)]
    assert all(length % 2 == 0 for shape in padded[1:] for length in shape[1:3])


def test_what_lies_beyond_the_border_counts_as_zeros_not_as_a_larger_input(flat):
    # The maps are padded level by level, so a zero row of the input is not the same as no row.
    params, x, logits = flat
    whole = jax.jit(FLAT.apply)({"params": params}, jnp.pad(x, [(0, 0), (0, 2), (0, 3), (0, 0)]))
    assert whole.shape == (2, 24, 32, 2)
    assert float(jnp.abs(whole[:, :22, :29] - logits).max()) > 1e-3


def test_other_channels_than_the_parameters_are_refused(flat):
    params, x, _ = flat
    with pytest.raises(ValueError, match="input with 3 channels must have the 1 of the parameters"):
        FLAT.apply({"params": params}, jnp.concatenate([x, x, x], axis=-1))


def test_merging_takes_the_entries_that_its_name_says():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2, 1)
    fields = {"norm": lambda name, dtype, param_dtype: lambda x: x, "dtype": None, "param_dtype": jnp.float32}
    expected = {
        "repeated": [0, 4, 2, 1, 5, 2, 1, 7],
        "complete": [0, 4, 2, 1, 6, 5, 3, 7],
        "ordered": list(range(8)),
    }
    assert set(expected) == set(MERGINGS)
    for name, order in expected.items():
        layer = swin_unetr._Merging(corners=MERGINGS[name], kernel_init=nn.initializers.ones, **fields)
        kernel = jnp.stack([8.0 ** jnp.arange(8), jnp.ones(8)], axis=-1)
        out = layer.apply({"params": {"reduction": {"kernel": kernel}}}, x)
        assert float(out[0, 0, 0, 0, 0]) == sum(8.0**place * entry for place, entry in enumerate(order))


@pytest.mark.parametrize("policy", [pytest.param("attention", marks=pytest.mark.slow), "full"])
def test_recomputing_changes_nothing(policy):
    x = example(1, 9, 9, 1)
    params = random_params(SHORT, x)
    expected = jax.jit(differentiated(SHORT))(params, x)
    assert error(jax.jit(differentiated(SHORT.clone(remat=policy)))(params, x), expected) < 1e-4


def test_dropping_is_off_unless_it_is_asked_for():
    x = example(2, 9, 9, 1)
    params = random_params(SHORT, x)
    model = SHORT.clone(drop_path_rate=0.5, dropout_rate=0.3, attention_dropout_rate=0.2)
    found = (jax.jit(each.apply)({"params": params}, x) for each in (model, SHORT))
    np.testing.assert_allclose(*found, atol=1e-5)
    run = functools.partial(jax.jit(functools.partial(model.apply, deterministic=False)), {"params": params}, x)
    one, two = (run(rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert float(jnp.abs(one - two).max()) > 1e-3


# Split over devices ---------------------------------------------------------------------------------------------------

D, H, W = axes.SPACE[3]


@pytest.mark.slow
def test_a_volume_split_over_eight_devices_equals_one_device():
    # Windows fetch their halo themselves, see tests/window/spatial_test.py; that of the convolutions is XLA's.
    model = TINY.clone(depths=(2,))
    x = example(2, 16, 16, 8, 1)
    params = random_params(model, x)
    found, sent = on_mesh(model, params, x, mesh_of(4, 2), ((D, "a"), (H, "b")))
    assert error(found, jax.jit(differentiated(model))(params, x)) < 1e-4
    assert "collective-permute" in {each.kind for each in sent}


class Encoder(nn.Module):
    """The coarsest level of a model's encoder.

    Attributes:
      model: the model.
    """

    model: SwinUNETR

    @nn.compact
    def __call__(self, x):
        return self.model.features(x)[-1].array


def test_the_encoder_split_in_space_gathers_no_map():
    # A regular and a shifted block on 8 x 2 rows a device, and a merging.
    model = Encoder(TINY.clone(depths=(2,)))
    x = example(2, 32, 16, 8, 1)
    params = random_params(model, x)
    found, sent = on_mesh(model, params, x, mesh_of(2, 4), ((D, "a"), (H, "b")))
    assert error(found, jax.jit(differentiated(model))(params, x)) < 1e-4
    assert {each.kind for each in sent} == {"all-reduce", "collective-permute"}
