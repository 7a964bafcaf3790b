"""Golden arrays: tests/golden/drct_parity.npz holds what the network of github.com/ming053l/DRCT (c0a8b51) makes of a
random picture, in PyTorch 2.13 on a CPU, with the weights that `golden_weights` draws: upscale=4, embed_dim=8, gc=3,
depths=[6], num_heads=[2], mlp_ratio=2, window_size=4, img_size=8; `padded` with the reflection of its drct_model.py.
"""

import functools
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import drct, swin
from jaxlayers.window.drct import DRCT, ResidualDenseGroup, feature_intensity, reflect_to_multiple, spread
from train import mesh as meshes
from train.collectives import collectives
from train.config import MeshShape

GOLDEN = Path(__file__).parents[1] / "golden" / "drct_parity.npz"
KEY_BIAS = {r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
# Blocks of width 4, 6, 8, 10 and 12 with 2 heads each.
GROUP = ResidualDenseGroup(num_heads=2, growth=2, window_size=(2, 4), mlp_ratio=1.0)
TINY = DRCT(
    scale=2,
    embed_dim=4,
    num_groups=1,
    num_heads=2,
    window_size=(2, 4),
    mlp_ratio=1.0,
    upsampling_features=4,
    drop_path_rate=0.0,
    group=functools.partial(ResidualDenseGroup, growth=2),
    kernel_init=nn.initializers.lecun_normal(),
)

CASES = (
    Case(
        name="residual_dense_group",
        within="drct",
        module=GROUP.clone(kernel_init=nn.initializers.lecun_normal()),
        inputs=lambda rng: (rng.normal(size=(2, 5, 8, 4)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="growth=0 and num_heads=2 must be positive", module=GROUP.clone(growth=0)),
            BadInput(match="width 13 must be divisible by its 3 heads, num_heads=4", module=ResidualDenseGroup(4, 3)),
            BadInput(match=r"window_size=\(2, 2, 2\) must be a positive", module=GROUP.clone(window_size=(2, 2, 2))),
            BadInput(match=r"rate=1.0 must lie in \[0, 1\)", module=GROUP.clone(drop_path_rate=1.0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((5, 4)),)),
        ),
    ),
    Case(
        name="drct",
        module=TINY,
        inputs=lambda rng: (rng.uniform(size=(2, 3, 8, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="scale=6 must be 3 or a power of two", module=TINY.clone(scale=6)),
            BadInput(match="scale=0 must be 3 or a power of two", module=TINY.clone(scale=0)),
            BadInput(match="num_groups=0, embed_dim=4 and", module=TINY.clone(num_groups=0)),
            BadInput(match="upsampling_features=0 must be positive", module=TINY.clone(upsampling_features=0)),
            BadInput(match=r"drop_path_rate=1.0 must lie in \[0, 1\)", module=TINY.clone(drop_path_rate=1.0)),
            BadInput(match="one entry for each of 1 channels", inputs=lambda rng: (np.ones((1, 4, 4, 1)),)),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 4, 4, 3), int),)),
            BadInput(match="window_size=0 must be a positive int", module=TINY.clone(window_size=0)),
        ),
    ),
)


def random_params(module, x, scale=0.4):
    """Random parameters, larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)

    def make(path, leaf):
        return jnp.asarray(scale * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(make, shapes)


# The public code -------------------------------------------------------------------------------------------------


def golden_weights(stored):
    """The weights that the golden arrays were made with: each from a generator of its number."""
    found = {}
    for number, (name, shape) in enumerate(zip(stored["names"], stored["shapes"], strict=True)):
        shape = [int(length) for length in str(shape).split(",")]
        value = np.random.RandomState(number).standard_normal(shape) * (0.05 if len(shape) == 4 else 0.2)
        found[str(name)] = (value + ("norm" in str(name) and str(name).endswith("weight"))).astype(np.float32)
    return found


def test_equals_the_public_code():
    stored = np.load(GOLDEN)
    model = DRCT(
        scale=4,
        embed_dim=8,
        num_groups=1,
        num_heads=2,
        window_size=4,
        group=functools.partial(ResidualDenseGroup, growth=3),
    )
    tensors = golden_weights(stored)
    # What their checkpoints hold besides.
    tensors["layers.0.swin2.attn_mask"] = tensors["layers.0.swin1.attn.relative_position_index"] = np.zeros(1)
    params = drct.from_reference(tensors, model)
    x = jnp.asarray(np.random.RandomState(99).random_sample((1, 8, 12, 3)), jnp.float32)
    apply = jax.jit(model.apply)
    found = apply({"params": params}, x)
    np.testing.assert_allclose(found, stored["out"], atol=1e-5 * np.abs(stored["out"]).max())
    # Of other sizes, which their program continues by reflection.
    padded = apply({"params": params}, x[:, :7, :10])
    np.testing.assert_allclose(padded, stored["padded"], atol=1e-5 * np.abs(stored["padded"]).max())
    # Negative control: continued by what is there, not by reflection, it is another picture.
    assert np.abs(found[:, :28, :40] - stored["padded"]).max() > 1e-2 * np.abs(stored["padded"]).max()


def test_a_checkpoint_of_another_network_is_refused():
    tensors = golden_weights(np.load(GOLDEN))
    model = TINY.clone(scale=4, embed_dim=8, window_size=4, upsampling_features=64)
    model = model.clone(group=functools.partial(ResidualDenseGroup, growth=3))
    with pytest.raises(ValueError, match="must give groups_0/blocks_0/feed_forward"):
        drct.from_reference(tensors, model)
    with pytest.raises(ValueError, match=r"missing \['layers.1.adjust"):
        drct.from_reference(tensors, model.clone(num_groups=2))
    with pytest.raises(ValueError, match="must hold 'conv_first.weight'"):
        drct.from_reference({f"params.{name}": value for name, value in tensors.items()}, model)


# Counted in the public code; its README's 7.92 G multiply-accumulates for x4 are not those of its program.
PUBLISHED = {
    "drct_x2": 13_991_867,
    "drct_x3": 14_176_507,
    "drct_x4": 14_139_579,
    "drct_l_x2": 27_433_007,
    "drct_l_x3": 27_617_647,
    "drct_l_x4": 27_580_719,
}


def build(name):
    fields = {key: value for key, value in drct.VARIANTS[name].items() if key not in ("module", "inputs")}
    model = drct.VARIANTS[name]["module"](**fields)
    return model, jax.eval_shape(model.init, jax.random.key(0), *drct.VARIANTS[name]["inputs"])


@pytest.mark.parametrize(
    "name", [name if name == "drct_x3" else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_variants_have_the_parameters_of_the_public_code(name):
    assert sum(leaf.size for leaf in jax.tree.leaves(build(name)[1])) == PUBLISHED[name]


def test_every_variant_is_counted():
    assert set(PUBLISHED) == set(drct.VARIANTS)


def test_the_cost_and_the_parameters_are_those_of_the_public_code():
    model, shapes = build("drct_x4")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED["drct_x4"]
    assert abs(count_macs(model.apply, shapes, *drct.VARIANTS["drct_x4"]["inputs"]) / 74.336e9 - 1) < 1e-3


# Groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [2, 6])
def test_each_block_is_wider_by_the_growth(growth):
    group = GROUP.clone(growth=growth)
    params = jax.eval_shape(group.init, jax.random.key(0), jnp.ones((1, 2, 4, 4)))["params"]
    widths = [params[f"blocks_{index}"]["norm1"]["scale"].shape[0] for index in range(5)]
    assert widths == [4 + index * growth for index in range(5)]
    kernels = [params[f"reductions_{index}"]["kernel"].shape for index in range(5)]
    assert kernels == [(width, growth) for width in widths[:-1]] + [(widths[-1], 4)]
    hidden = [params[f"blocks_{index}"]["feed_forward"]["up"]["kernel"].shape[1] for index in range(5)]
    assert hidden == widths


def test_the_last_block_sees_every_earlier_output():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 4, 4)), jnp.float32)
    params = random_params(GROUP, x)
    apply = jax.jit(GROUP.apply)

    def without(*blocks):
        silent = {
            f"reductions_{index}": jax.tree.map(jnp.zeros_like, params[f"reductions_{index}"]) for index in blocks
        }
        return apply({"params": {**params, **silent}}, x)

    for index in range(4):
        # With all blocks between them silent, what this one finds reaches the last directly or not at all.
        between = range(index + 1, 4)
        assert np.abs(without(*between) - without(index, *between)).max() > 1e-3
    # Control: once the last is silent too, nothing is left of any.
    np.testing.assert_array_equal(without(0, 4), without(4))


def test_with_its_last_reduction_zero_a_group_is_the_identity():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 8, 4)), jnp.float32)
    params = random_params(GROUP, x)
    apply = jax.jit(GROUP.apply)
    last = jax.tree.map(jnp.zeros_like, params["reductions_4"])
    np.testing.assert_array_equal(apply({"params": {**params, "reductions_4": last}}, x), x)
    other = jax.tree.map(jnp.zeros_like, params["reductions_3"])
    assert np.abs(apply({"params": {**params, "reductions_3": other}}, x) - x).max() > 0.1


def test_a_window_as_large_as_the_map_is_dense_attention():
    """Without relative positions, tokens may then be permuted; with smaller windows they may not."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 4, 4)), jnp.float32)
    order = np.random.default_rng(2).permutation(16)

    def permuted(x):
        return x.reshape(1, 16, 4)[:, order].reshape(x.shape)

    for window, equal in ((4, True), (2, False)):
        group = GROUP.clone(window_size=window)
        flat = flax.traverse_util.flatten_dict(random_params(group, x))
        flat = {path: jnp.zeros_like(leaf) if "table" in path[-1] else leaf for path, leaf in flat.items()}
        apply = jax.jit(functools.partial(group.apply, {"params": flax.traverse_util.unflatten_dict(flat)}))
        difference = np.abs(apply(permuted(x)) - permuted(apply(x))).max()
        assert difference < 1e-5 if equal else difference > 1e-2


@pytest.mark.parametrize("rows", [16, 15])
def test_opposite_edges_never_meet(rows, monkeypatch):
    """Five blocks carry a token at most 11 rows down; row 12 and on would hear the first only around the edge."""

    def change():
        group = GROUP.clone(window_size=4)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(1, rows, 4, 4)), jnp.float32)
        params = random_params(group, x)
        moved = x.at[:, 0].add(jnp.asarray(np.random.default_rng(2).normal(size=(4, 4)), jnp.float32))
        both = jax.jit(lambda x: group.apply({"params": params}, x))(jnp.concatenate([x, moved]))
        return np.abs(both[1] - both[0]).max((1, 2))

    found = change()
    assert np.all(found[12:] == 0)
    assert np.all(found[:12] > 0)
    # Negative control: without masks they do.
    monkeypatch.setattr(swin, "window_mask", lambda *arguments, **keywords: None)
    assert np.any(change()[12:] > 0)


# The model -------------------------------------------------------------------------------------------------------


def identity_params(model, x):
    """Kernels of which each passes on what it is given: the picture comes out enlarged by nearest neighbour."""
    flat = flax.traverse_util.flatten_dict(random_params(model, x), sep="/")
    for path, leaf in flat.items():
        if path.split("/")[0] in ("shallow", "after_groups", "before_upsampling", "last") or "upsamplings" in path:
            flat[path] = jnp.zeros_like(leaf)
    middle = (1, 1)
    for channel in range(3):
        # Features 0 to 2 are the picture, 3 to 5 its negative, of which the leaky ReLU leaves a hundredth.
        flat["shallow/kernel"] = flat["shallow/kernel"].at[(*middle, channel, channel)].set(1)
        flat["shallow/kernel"] = flat["shallow/kernel"].at[(*middle, channel, channel + 3)].set(-1)
        for feature, sign in ((channel, 1), (channel + 3, -1)):
            flat["before_upsampling/kernel"] = flat["before_upsampling/kernel"].at[(*middle, feature, feature)].set(1)
            flat["last/kernel"] = flat["last/kernel"].at[(*middle, feature, channel)].set(sign / 1.01)
    for index in range(sum("upsamplings" in path and path.endswith("kernel") for path in flat)):
        kernel = flat[f"upsamplings_{index}/kernel"]
        copies = kernel.shape[-1] // 6
        for feature in range(6):
            kernel = kernel.at[(*middle, feature, slice(copies * feature, copies * (feature + 1)))].set(1)
        flat[f"upsamplings_{index}/kernel"] = kernel
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("scale", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_identity_kernels_enlarge_by_nearest_neighbour(scale):
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(1, 3, 8, 3)), jnp.float32)
    model = TINY.clone(scale=scale, embed_dim=6, upsampling_features=6)
    params = identity_params(model, x)
    apply = jax.jit(model.apply)
    expected = np.repeat(np.repeat(x, scale, 1), scale, 2)
    np.testing.assert_allclose(apply({"params": params}, x), expected, atol=1e-6)
    # Negative control: with a convolution after them, the groups show.
    params["after_groups"]["kernel"] += 0.1
    assert np.abs(apply({"params": params}, x) - expected).max() > 1e-2


@pytest.mark.parametrize("size", [(4, 8), (5, 8), (6, 9), (1, 8), (3, 2)])
def test_pictures_are_continued_by_reflection(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 1))
    ends = [(0, -length % 4) for length in size]
    expected = np.pad(x, [(0, 0), *ends, (0, 0)], mode="reflect")
    np.testing.assert_allclose(reflect_to_multiple(jnp.asarray(x, jnp.float32), (4, 4)), expected, rtol=1e-6)


def test_features_are_spread_in_the_order_of_pytorch():
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 12)).astype(np.float32)
    found = spread(jnp.asarray(x), 2)
    for row, column, feature in np.ndindex(6, 4, 3):
        source = (feature * 2 + row % 2) * 2 + column % 2
        np.testing.assert_array_equal(found[:, row, column, feature], x[:, row // 2, column // 2, source])
    with pytest.raises(ValueError, match=r"features=12 must be divisible by step\*\*2=25"):
        spread(jnp.asarray(x), 5)


def test_drop_rates_grow_with_the_group_as_in_the_public_code():
    # They spread 36 rates from 0 to 0.1 and give every block of a group the first of its six.
    assert TINY.clone(num_groups=6, drop_path_rate=0.1)._rates() == pytest.approx(np.arange(0, 36, 6) / 350)


class Halving(nn.Module):
    """A group that halves its map."""

    num_heads: int
    window_size: int
    mlp_ratio: float
    drop_path_rate: float
    remat: bool
    norm: object
    kernel_init: object
    bias_init: object
    dtype: object
    param_dtype: object

    def __call__(self, x, *, deterministic):
        return x / 2


def test_the_feature_intensity_shows_where_maps_lose_strength():
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(1, 3, 8, 3)), jnp.float32)
    model = TINY.clone(num_groups=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params["patch_norm"]["bias"] = jnp.array([1.0, -2, 3, -4])
    np.testing.assert_allclose(feature_intensity(model, {"params": params}, x), 2.5 * np.ones(4), rtol=1e-6)
    falling = model.clone(group=Halving)
    kept = {name: leaf for name, leaf in params.items() if "groups_" not in name}
    np.testing.assert_allclose(
        feature_intensity(falling, {"params": kept}, x), 2.5 * np.array([1, 0.5, 0.25, 0.125]), rtol=1e-6
    )


# Devices and memory ----------------------------------------------------------------------------------------------


def test_a_picture_split_over_devices_gives_the_same_and_only_halos_travel():
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 32, 4, 3)), jnp.float32)
    model = TINY.clone(window_size=4)
    params = random_params(model, x)
    expected = jax.jit(model.apply)({"params": params}, x)
    mesh = meshes.build(MeshShape(data=2, sequence=4))
    with meshes.use(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), "sequence"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        compiled = (
            jax.jit(lambda params, x: model.apply({"params": params}, x), in_shardings=(whole, place))
            .lower(params, x)
            .compile()
        )
        found = compiled(jax.device_put(params, whole), jax.device_put(x, place))
    assert found.sharding.spec[:2] == ("data", "sequence")
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert {each.kind for each in collectives(compiled, mesh)} == {"collective-permute"}


def gradient(model, x):
    """Return the gradient of a loss as a function of the parameters."""

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)))

    return jax.grad(loss)


def test_remat_changes_no_gradient():
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(1, 2, 4, 3)), jnp.float32)
    params = random_params(TINY, x)
    plain = jax.jit(gradient(TINY, x))(params)
    for policy in ("full", "attention"):
        assert "remat" in str(jax.make_jaxpr(gradient(TINY.clone(remat=policy), x))(params))
    assert "remat" not in str(jax.make_jaxpr(gradient(TINY, x))(params))
    found = jax.jit(gradient(TINY.clone(remat="full"), x))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())), found, plain)
