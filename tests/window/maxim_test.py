"""MAXIM: parity with stored outputs of the official code, reach of its two branches, limits, cost, sharding, memory.

`golden/maxim_parity.npz` was written by running google-research/maxim 3c82651 (`maxim/models/maxim.py`, Linen, JAX
0.10.2) on weights that `drawn` makes of each parameter's official path, and on standard normal inputs of
`RandomState(0)`: outputs of the blocks (`ResidualSplitHeadMultiAxisGmlpLayer`, `RCAB`, `RDCAB`, `CrossGatingBlock`,
`SAM`) with windows 2 x 4 and grids 3 x 2, those of `MAXIM` with the fields of `TINY`, and under `names` all parameters
of it with three stages and two blocks a level.
"""

import dataclasses
import functools
import zlib
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlayers.core import axes
from jaxlayers.core.reference import reference_name
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import maxim
from jaxlayers.window.maxim import Maxim
from jaxlayers.window.maxim_blocks import (
    CrossGating,
    MultiAxisGatedMlp,
    ResidualChannelAttention,
    SupervisedAttention,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "maxim_parity.npz"
TINY = Maxim(features=4, window_size=(4, 2), grid_size=(4, 2), num_stages=2, num_scales=2, depth=1, bottleneck_depth=1)
# Shared, since it takes long to compile.
run_tiny = jax.jit(TINY.apply)
# One level, since every block takes long to compile; larger kernels than usual, so that each gradient is more than
# rounding.
SMALL = TINY.clone(
    window_size=(2,), grid_size=(2,), num_scales=1, squeeze_ratio=1.0, mlp_init=nn.initializers.normal(0.2)
)

CASES = (
    Case(
        name="maxim",
        module=SMALL,
        inputs=lambda rng: (rng.normal(size=(2, 6, 3, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match="needs at least 3 axes", inputs=lambda rng: (np.ones((8, 8)),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
            BadInput(match="features=0 must be positive", module=SMALL.clone(features=0)),
            BadInput(match="num_stages=0 must be positive", module=SMALL.clone(num_stages=0)),
            BadInput(match="depth=0 must be positive", module=SMALL.clone(depth=0)),
            BadInput(match=r"window_size=\(2, 2\) and grid_size=\(2,\) must", module=SMALL.clone(window_size=(2, 2))),
            BadInput(match="one positive entry a level", module=SMALL.clone(window_size=(0,))),
            BadInput(match="num_scales=2 must be from 1 to the 1 levels", module=SMALL.clone(num_scales=2)),
            BadInput(match="remat='half' must be one of", module=SMALL.clone(remat="half")),
            BadInput(
                match=r"leave something of a picture of size \(1, 1\)",
                module=TINY.clone(window_size=(2, 2, 2), grid_size=(2, 2, 2), num_scales=3),
                inputs=lambda rng: (np.ones((1, 1, 1, 3)),),
            ),
        ),
    ),
)


def random_variables(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


@pytest.fixture(scope="module")
def tiny():
    """Variables of a small model of two stages and levels, a picture, and the outputs."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 16, 24, 3)), jnp.float32)
    variables = random_variables(TINY, x)
    variables = jax.tree.map(lambda leaf: 0.5 * leaf, variables)
    return variables, x, run_tiny(variables, x)


def flatten(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def with_zeros(variables, *endings):
    """Return the variables with parameters whose path has one of the endings set to zero."""
    flat = flatten(variables)
    found = {path: 0 * leaf if path.endswith(endings) else leaf for path, leaf in flat.items()}
    assert any(path.endswith(endings) for path in flat)
    return flax.traverse_util.unflatten_dict(found, sep="/")


# Parity ----------------------------------------------------------------------------------------------------------


def drawn(name, shape):
    """Make a parameter of its official path alone."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rpartition("/")[2]
    if leaf == "kernel":
        values = 0.5 * values / np.sqrt(np.prod(shape[:-1]))
    else:
        values = 1 + 0.2 * values if leaf == "scale" else 0.1 * values
    return values.astype(np.float32)


def drawn_inputs(*shapes):
    random = np.random.RandomState(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def official_path(path, table, levels=0):
    """Return the official path of one of our parameters."""
    name, _, _ = reference_name(path, table).rpartition(".")
    parts = name.split("_")
    if name.endswith(".Conv_0") and parts[2] in ("encoded", "skip"):
        stage, level, other = int(parts[1]), int(parts[3]), int(parts[4].removesuffix(".Conv"))
        is_skip = parts[2] == "skip"
        order = levels - 1 - other if is_skip else other
        number = 2 * levels**2 * stage + levels**2 * is_skip + levels * (levels - 1 - level) + order
        name = f"UpSampleRatio_{number}.Conv_0"
    return f"{name.replace('.', '/')}/{path.rpartition('/')[2]}"


def to_official(params, table, levels=0):
    """Write our parameters as the official code stores them, by path."""
    found = {}
    for path, leaf in flatten(params).items():
        name = official_path(path, table, levels)
        convolution = "Conv_" in name or name.endswith("input_proj/kernel")
        as_map = name.endswith("kernel") and convolution and leaf.ndim == 2
        found[name] = np.asarray(leaf)[None, None] if as_map else np.asarray(leaf)
    return found


def drawn_params(module, table, *inputs, levels=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    flat = {path: drawn(official_path(path, table, levels), leaf.shape) for path, leaf in flatten(shapes).items()}
    return {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}


PARTS = {"window_size": (2, 4), "grid_size": (3, 2)}
BLOCKS = {
    "mix": (MultiAxisGatedMlp(**PARTS), maxim._MIX, [(2, 6, 8, 4)]),
    "attend": (ResidualChannelAttention(), maxim._ATTEND, [(2, 5, 4, 8)]),
    "attend_dense": (ResidualChannelAttention(dense=True), maxim._ATTEND_DENSE, [(2, 5, 4, 8)]),
    "cross": (CrossGating(4, **PARTS), maxim._CROSS, [(1, 6, 8, 3), (1, 6, 8, 5)]),
    "cross_upsample": (CrossGating(4, **PARTS, upsample=True), maxim._CROSS, [(1, 6, 8, 3), (1, 3, 4, 5)]),
    "supervise": (SupervisedAttention(), maxim._SUPERVISE, [(1, 5, 4, 4), (1, 5, 4, 3)]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_the_official_ones(name):
    module, table, shapes = BLOCKS[name]
    inputs = drawn_inputs(*shapes)
    variables = drawn_params(module, table, *inputs)
    found = jax.tree.leaves(jax.jit(module.apply)(variables, *inputs))
    with np.load(GOLDEN) as golden:
        expected = [golden[f"{name}_{index}"] for index in range(len(found))]
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-5)
        # What enters is not what comes out.
        assert wanted.shape[-1] != inputs[0].shape[-1] or np.abs(wanted - inputs[0]).max() > 0.1


def test_model_equals_the_official_one():
    (x,) = drawn_inputs((1, 16, 24, 3))
    variables = drawn_params(TINY, maxim.REFERENCE_NAMES["official"], x, levels=2)
    outputs = run_tiny(variables, x)
    with np.load(GOLDEN) as golden:
        # Officially the finest scale comes last.
        expected = [[golden["model_1"], golden["model_0"]], [golden["model_3"], golden["model_2"]]]
    for stage, wanted in zip(outputs, expected, strict=True):
        for picture, one, given in zip(stage, wanted, maxim.picture_scales(x, 2), strict=True):
            np.testing.assert_allclose(picture, one, atol=1e-4)
            assert np.abs(one - given).max() > 0.1
    restored = jax.eval_shape(functools.partial(TINY.apply, method="restore"), variables, x)
    assert (restored.shape, restored.dtype) == (x.shape, x.dtype)


def test_reference_names_are_those_of_the_official_parameters():
    model = TINY.clone(num_stages=3, depth=2, bottleneck_depth=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = to_official(params, maxim.REFERENCE_NAMES["official"], levels=2)
    found = sorted(f"{name} {'x'.join(map(str, leaf.shape))}" for name, leaf in tensors.items())
    with np.load(GOLDEN) as golden:
        assert found == golden["names"].tolist()


def test_official_checkpoints_are_read_and_those_that_do_not_fit_refused(tiny):
    variables = tiny[0]
    tensors = to_official(variables["params"], maxim.REFERENCE_NAMES["official"], levels=2)
    jax.tree.map(np.testing.assert_array_equal, maxim.from_reference(tensors, TINY), variables)
    stored = {f"opt/target/{name}": value for name, value in tensors.items()}
    found = maxim.from_reference({**stored, "opt/state/step": np.zeros(())}, TINY)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    with pytest.raises(ValueError, match="source='torch' must be one of"):
        maxim.from_reference(tensors, TINY, source="torch")
    with pytest.raises(ValueError, match=r"missing \['stage_1_output_conv_0.bias'\]"):
        maxim.from_reference({name: tensors[name] for name in tensors if name != "stage_1_output_conv_0/bias"}, TINY)
    with pytest.raises(ValueError, match="must give .* its shape"):
        maxim.from_reference(tensors, TINY.clone(window_size=(2, 2)))
    with pytest.raises(ValueError, match="pictures of 1 channels must have the 3 that the parameters are for"):
        TINY.apply(variables, tiny[1][..., :1])


@pytest.mark.parametrize(
    ("name", "parameters"), [("maxim_s1", 6_139_561), ("maxim_s2", 14_176_178), ("maxim_s3", 22_212_795)]
)
def test_variants_have_the_official_number_of_parameters(name, parameters):
    fields = {key: value for key, value in maxim.VARIANTS[name].items() if key not in ("module", "inputs")}
    model = maxim.VARIANTS[name]["module"](**fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert model.multiple == 64
    if name == "maxim_s1":
        # Officially 93.16 G floating-point operations, half as many multiply-accumulates; maps are enlarged there
        # before they are projected.
        found = count_macs(model.apply, shapes, *maxim.VARIANTS[name]["inputs"])
        assert found == pytest.approx(42.4e9, rel=1e-3)
        assert found < 93.163716608e9 / 2


# Reach -----------------------------------------------------------------------------------------------------------


# Limits ----------------------------------------------------------------------------------------------------------


def test_zero_heads_give_back_the_picture_at_every_stage_and_scale(tiny):
    variables, x, outputs = tiny
    heads = ("heads_0/kernel", "heads_0/bias", "heads_1/kernel", "heads_1/bias", "picture/kernel", "picture/bias")
    found = run_tiny(with_zeros(variables, *heads), x)
    for stage, changed in zip(found, outputs, strict=True):
        for picture, other, given in zip(stage, changed, maxim.picture_scales(x, 2), strict=True):
            np.testing.assert_array_equal(picture, given)
            assert np.abs(other - given).max() > 1e-2


# Sizes -----------------------------------------------------------------------------------------------------------


def test_one_tree_serves_every_size(tiny):
    shapes = jax.tree.map(jnp.shape, tiny[0])
    for size in [(8, 8), (3, 30), (17, 40)]:
        pictures = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        assert jax.tree.map(jnp.shape, jax.eval_shape(TINY.init, jax.random.key(0), pictures)) == shapes
        for stage in jax.eval_shape(TINY.apply, tiny[0], pictures):
            assert [picture.shape for picture in stage] == [(2, *size, 3), (2, size[0] // 2, size[1] // 2, 3)]


def test_other_sizes_are_continued_by_their_mirror_image_and_cropped():
    model = SMALL.clone(num_stages=1)
    assert (model.multiple, TINY.multiple) == (4, 8)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 6, 3)), jnp.float32)
    variables = jax.tree.map(lambda leaf: 0.5 * leaf, random_variables(model, x))
    run = jax.jit(model.apply)
    found, space = run(variables, x)[0][0], ((0, 0), (0, 3), (0, 2), (0, 0))
    whole = run(variables, jnp.pad(x, space, mode="symmetric"))[0][0]
    np.testing.assert_allclose(found, whole[:, :5, :6], atol=1e-5)
    # Negative control: zeros around it are heard.
    assert np.abs(run(variables, jnp.pad(x, space))[0][0][:, :5, :6] - found).max() > 1e-3


@pytest.mark.parametrize("power", [-2, -1, 0, 1, 2])
def test_resizing_is_that_of_jax_image(power, rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 12, 3)), jnp.float32)
    shape = (2, int(8 * 2.0**power), int(12 * 2.0**power), 3)
    expected = jax.image.resize(x, shape, "bilinear")
    np.testing.assert_allclose(maxim.resize_by_two_powers(x, power), expected, atol=1e-5)
    assert power == 0 or np.abs(jax.image.resize(x, shape, "nearest") - expected).max() > 0.1
    nearest = maxim.picture_scales(x, 3)[2]
    np.testing.assert_array_equal(nearest, jax.image.resize(x, (2, 2, 3, 3), "nearest"))
    with pytest.raises(ValueError, match="length 6 must be a multiple of 4; pad"):
        maxim.resize_by_two_powers(x[:, :6], -2)


def test_cost_is_linear_in_the_pixels():
    def cost(apply, variables, side):
        return count_macs(apply, variables, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))

    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    costs = [cost(TINY.apply, shapes, side) for side in (32, 64, 128)]
    assert costs[1] / costs[0] == pytest.approx(4, rel=0.01)
    assert costs[2] / costs[0] == pytest.approx(16, rel=0.01)

    # Negative control: the resizing of JAX, which the official code has.
    def doubled(_, x):
        return jax.image.resize(x, (1, 2 * x.shape[1], 2 * x.shape[2], 3), "bilinear")

    assert cost(doubled, {}, 64) / cost(doubled, {}, 32) > 7


# Losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_what_numpy_computes(rng):
    x, y = (jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32) for _ in range(2))
    difference = np.asarray(x, np.float64) - np.asarray(y, np.float64)
    root = np.sqrt(difference**2 + 0.1**2).mean((1, 2, 3))
    spectrum = np.abs(np.fft.fft2(difference, axes=(1, 2), norm="ortho")).mean((1, 2, 3))
    np.testing.assert_allclose(maxim.charbonnier(x, y, epsilon=0.1), root, rtol=1e-5)
    np.testing.assert_allclose(maxim.frequency_distance(x, y), spectrum, rtol=1e-5)
    assert np.all(spectrum < np.sqrt((difference**2).mean((1, 2, 3))))
    outputs = ((x, x[:, 1::2, 1::2]), (y, y[:, 1::2, 1::2]))
    half = np.abs(np.fft.fft2(difference[:, 1::2, 1::2], axes=(1, 2), norm="ortho")).mean((1, 2, 3))
    half_root = np.sqrt(difference[:, 1::2, 1::2] ** 2 + 0.1**2).mean((1, 2, 3))
    found = maxim.restoration_loss(outputs, y, epsilon=0.1, frequency_weight=0.5)
    np.testing.assert_allclose(found, root + half_root + 2 * 0.1 + 0.5 * (spectrum + half), rtol=1e-5)
    # Where a picture is perfect: least, and with a finite gradient.
    gradient = jax.grad(lambda x: jnp.sum(maxim.restoration_loss(((x,),), y)))(y)
    assert np.all(np.isfinite(gradient))
    with pytest.raises(ValueError, match="num_scales=0 must be at least 1"):
        maxim.picture_scales(x, 0)


# Devices and memory ----------------------------------------------------------------------------------------------


def test_pictures_split_over_the_sequence_axis_give_the_same():
    model = TINY.clone(num_stages=1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 16, 3)), jnp.float32)
    variables = jax.tree.map(lambda leaf: 0.5 * leaf, random_variables(model, x))
    run = jax.jit(model.apply)
    expected = run(variables, x)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec("data", "sequence")
    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.BATCH, "data"), (axes.HEIGHT, "sequence"))):
        found = jax.jit(lambda v, x: model.apply(v, x))(variables, jax.device_put(x, NamedSharding(mesh, spec)))
    for one, wanted in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
        assert one.sharding.spec[:2] == ("data", "sequence")
    # The devices have to exchange something: the first one's rows hear the last one's.
    other = run(variables, x.at[:, 24:].set(0))
    assert np.abs(other[0][0] - expected[0][0])[:, :8].max() > 1e-3


def test_remat_changes_neither_pictures_nor_gradients():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 4, 1)), jnp.float32)
    variables = jax.tree.map(lambda leaf: 0.5 * leaf, random_variables(SMALL, x))

    def run(policy):
        model = SMALL.clone(remat=policy)
        return jax.value_and_grad(lambda v: jnp.sum(maxim.restoration_loss(model.apply(v, x), 0.5 * x)))

    plain, found = (jax.jit(run(policy))(variables) for policy in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())), found, plain)
    assert "remat" in str(jax.make_jaxpr(run("full"))(variables))
    assert "remat" not in str(jax.make_jaxpr(run("none"))(variables))


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (Maxim, MultiAxisGatedMlp, ResidualChannelAttention, CrossGating, SupervisedAttention):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13
