"""Pictures and volumes split along their spatial axes over devices: the same numbers, and only halos travel.

What a compiled program sends is read from its text and compared with formulas made of the shapes alone.
"""

import functools
import math
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayers.core import axes
from jaxlayers.ops import halo
from jaxlayers.window import FIT, Swin, SwinBlock, SwinV2, SwinV2Block, swin
from train import mesh as meshes
from train.collectives import collectives, totals
from train.config import MeshShape

FLOAT = 4
BATCH, FEATURES, HEADS = 2, 8, 2
H, W, D, T, B = axes.HEIGHT, axes.WIDTH, axes.DEPTH, axes.TOKENS, axes.BATCH


# What is sent does not depend on how well the code of one device is optimised.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("a", "b", "c")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def random_params(module, x):
    """Random parameters, larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)

    def make(path, leaf):
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape) + ("scale" in str(path[-1])), jnp.float32)

    return jax.tree_util.tree_map_with_path(make, shapes)


def differentiated(module):
    """Return `(params, x) -> ((loss, output), gradients)`."""

    def loss(params, x):
        out = module.apply({"params": params}, x)
        weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(weight * out) / out.size, out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def on_mesh(module, params, x, mesh, rules, *, run=True):
    """Return the results with maps split as the rules say, and the collectives of the program."""
    rank = x.ndim - 2
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        spec = axes.split(x.shape, B, *axes.SPACE[rank], None)
        places = NamedSharding(mesh, P()), NamedSharding(mesh, P(*(names or None for names in spec)))
        out = (None, (places[0], places[1]))
        # Gradients stay where their parameters and inputs are.
        compiled = jit(differentiated(module), in_shardings=places, out_shardings=out).lower(params, x).compile()
        found = compiled(jax.device_put(params, places[0]), jax.device_put(x, places[1])) if run else None
    return jax.device_get(found), collectives(compiled, mesh)


def error(found, expected):
    """Return the largest difference, relative to the largest entry of each array or, if that is small, of all.

    The gradient of the keys' bias is zero but for rounding.
    """
    floor = 1e-2 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max()) / max(float(np.abs(b).max()), floor) for a, b in pairs)


def example(size, features=FEATURES):
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, *size, features)), jnp.float32)


def kinds(found):
    return {each.kind for each in found}


V1, V2 = functools.partial(SwinBlock, HEADS), functools.partial(SwinV2Block, HEADS)
# Block, size of the map, sizes of the mesh axes a, b and c, rules. Here each device has whole windows.
ALIGNED = {
    "height 2 x width 4": (V1(4, 2), (8, 16), (2, 4), ((H, "a"), (W, "b"))),
    "height 8": (V2((2, 3), (1, 2)), (16, 6), (8,), ((H, "a"),)),
    "volume 2 x 2 x 2": (V1((2, 1, 3), (1, 0, 2)), (4, 2, 6), (2, 2, 2), ((D, "b"), (H, "c"), (W, "a"))),
}
OTHERS = {
    "height 2 x width 4": (V2((3, 4), (2, 1)), (10, 20), (2, 4), ((H, "a"), (W, "b"))),
    "data 2 x height 4": (V1(3, 1, mask_padding=True), (16, 7), (2, 4), ((B, "a"), (H, "b"))),
    "tokens 8": (V1((3,), (2,), mask_padding=True), (40,), (8,), ((T, "a"),)),
}
VOLUME = (V2((2, 3, 2), (1, 2, 1)), (6, 12, 5), (2, 4), ((D, "a"), (H, "b")))
MORE = {
    f"{cls.__name__}, {'keys masked, ' if masked else ''}{size}": (
        cls(HEADS, block.window_size, block.shift_size, mask_padding=masked),
        size,
        *rest,
    )
    for cls in (SwinBlock, SwinV2Block)
    for masked in (False, True)
    for block, size, *rest in (*ALIGNED.values(), *OTHERS.values(), VOLUME)
}


def check_equal_without_gathers(block, size, sizes, rules):
    """Assert that values and gradients are those of one device, and that nothing is gathered; return what is sent."""
    x = example(size)
    params = random_params(block, x)
    found, sent = on_mesh(block, params, x, mesh_of(*sizes), rules)
    expected = jit(differentiated(block))(params, x)
    assert error(found, expected) < 1e-5
    assert kinds(sent) == {"all-reduce", "collective-permute"}
    assert all(each.count == 1 for each in sent)
    # What is reduced are gradients of parameters and of the position bias, and the loss.
    tokens = math.prod((block.window_size,) * 2 if isinstance(block.window_size, int) else block.window_size)
    reduced = sum(leaf.size for leaf in jax.tree.leaves(params)) + HEADS * tokens**2 + 1
    for axis in ("a", "b", "c"):
        total = sum(each.bytes for each in sent if each.kind == "all-reduce" and axis in each.mesh_axes)
        assert total <= FLOAT * reduced
    return sent


def parts_of(size, sizes, rules, rank):
    """Return the number of parts of batch and spatial axes."""
    lengths = dict(zip("abc", sizes, strict=False))
    of = {name: lengths.get(axis, 1) for name, axis in rules}
    return of.get(B, 1), [of.get(name, 1) for name in axes.SPACE[rank]]


@pytest.mark.parametrize("name", ALIGNED)
def test_a_shifted_block_on_whole_windows_sends_the_shift_and_gets_it_back(name):
    block, size, sizes, rules = ALIGNED[name]
    sent = check_equal_without_gathers(block, size, sizes, rules)
    batch_parts, parts = parts_of(size, sizes, rules, len(size))
    local = [length // count for length, count in zip(size, parts, strict=True)]
    amount = (block.shift_size,) * 2 if isinstance(block.shift_size, int) else block.shift_size
    expected = []
    for axis, (by, count) in enumerate(zip(amount, parts, strict=True)):
        if by and count > 1:
            shape = (BATCH // batch_parts, *local[:axis], by, *local[axis + 1 :], FEATURES)
            # There and back, forwards and in the gradient.
            expected += 4 * [(("f32", shape),)]
    assert sorted(each.shapes for each in sent if each.kind == "collective-permute") == sorted(expected)


@pytest.mark.parametrize("name", OTHERS)
def test_a_block_on_parts_of_windows_sends_less_than_a_window(name):
    block, size, sizes, rules = OTHERS[name]
    sent = check_equal_without_gathers(block, size, sizes, rules)
    batch_parts, parts = parts_of(size, sizes, rules, len(size))
    window = (block.window_size,) * 2 if isinstance(block.window_size, int) else block.window_size
    # Rounded up to whole windows, of which a device may begin one more than it holds.
    upper = [(length // count // step + 2) * step for length, count, step in zip(size, parts, window, strict=True)]
    bound = sum(
        4 * FLOAT * BATCH // batch_parts * FEATURES * (step - 1) * math.prod(upper[:axis] + upper[axis + 1 :])
        for axis, (step, count) in enumerate(zip(window, parts, strict=True))
        if count > 1
    )
    permuted = [each for each in sent if each.kind == "collective-permute"]
    assert 0 < sum(each.bytes for each in permuted) <= bound
    assert len(permuted) == 4 * sum(count > 1 for count in parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_block_on_every_mesh_is_equal_without_gathers(name):
    check_equal_without_gathers(*MORE[name])


@pytest.mark.parametrize("cls", [SwinBlock, pytest.param(SwinV2Block, marks=pytest.mark.slow)])
def test_regular_windows_send_only_gradients_of_parameters(cls):
    block = cls(HEADS, 4)
    x = example((8, 16))
    params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    _, sent = on_mesh(block, params, x, mesh_of(2, 4), ((H, "a"), (W, "b")), run=False)
    assert kinds(sent) == {"all-reduce"}


def test_without_this_the_partitioner_gathers_maps(monkeypatch):
    # Negative control: the same rules, and windows cut as on one device.
    monkeypatch.setattr(swin, "map_split", lambda shape, window: ((),) * len(window))
    block, _, sizes, rules = ALIGNED["height 2 x width 4"]
    x = example((12, 24))
    params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    _, sent = on_mesh(block, params, x, mesh_of(*sizes), (*rules, (axes.WINDOWS, ("a", "b"))), run=False)
    assert sum(each.bytes for each in sent if each.kind == "all-gather") > FLOAT * x.size


def test_the_comparison_sees_a_halo_that_does_not_come(monkeypatch):
    # Negative control: each device takes its own entries for those of the next.
    monkeypatch.setattr(halo, "_neighbour", lambda x, names, step: x)
    block, size, sizes, rules = ALIGNED["height 8"]
    x = example(size)
    params = random_params(block, x)
    found, _ = on_mesh(block, params, x, mesh_of(*sizes), rules)
    assert error(found[0][1], jit(block.apply)({"params": params}, x)) > 1e-2


@pytest.mark.parametrize(
    ("size", "rules"),
    [
        pytest.param((9, 8), ((H, "b"),), id="does not divide", marks=pytest.mark.slow),
        pytest.param((8, 8), ((H, "b"), (axes.WINDOWS, "b")), id="less than a window", marks=pytest.mark.slow),
        pytest.param((16, 4), ((H, "b"), (W, "a")), id="one axis is split, the other too short"),
        pytest.param((16, 3), ((H, "b"), (W, "a")), id="clipped", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_split_is_whole_and_equal(size, rules):
    block = SwinBlock(HEADS, 4, 2)
    x = example(size)
    params = random_params(block, x)
    found, _ = on_mesh(block, params, x, mesh_of(2, 4), rules)
    assert error(found, jit(differentiated(block))(params, x)) < 1e-5


# Models, by the trainer's rules ---------------------------------------------------------------------------------------

MODEL = Swin(
    num_classes=3, patch_size=2, embed_dim=FEATURES, depths=(2, 1), num_heads=(1, 2), window_size=2, drop_path_rate=0.0
)


def model_halo_bytes(model, batch, width):
    """Return what the shifted block of each stage with two blocks sends, of pictures whose rows are split."""
    # Maps of half and a quarter of the picture; a shift of one row; there and back, forwards and in the gradient.
    sent = [4 * FLOAT * batch * (width // stride) * FEATURES * stride // 2 for stride in (2, 4)]
    return sum(each for each, depth in zip(sent, model.depths, strict=True) if depth == 2)


def of_model(model, x, shape, **keywords):
    mesh = meshes.build(shape)
    params = random_params(model, x)
    with meshes.use(mesh, **keywords):
        names = axes.split(x.shape, B, H, W, None)
        places = meshes.shardings(params, mesh), NamedSharding(mesh, P(*(each or None for each in names)))
        program = jit(differentiated(model), in_shardings=places, out_shardings=(None, places))
        compiled = program.lower(params, x).compile()
        found = compiled(jax.device_put(params, places[0]), jax.device_put(x, places[1]))
    return params, jax.device_get(found), collectives(compiled, mesh)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"depths": (2, 2), "scan": True, "remat": True}, id="scan and remat", marks=pytest.mark.slow),
    ],
)
def test_a_model_with_pictures_split_over_the_sequence_axis_sends_halos_only(changes):
    model = MODEL.clone(**changes)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 32, 8, 3)), jnp.float32)
    params, found, sent = of_model(model, x, MeshShape(data=2, sequence=4))
    expected = jit(differentiated(model))(params, x)
    assert error(found, expected) < 1e-5
    # Embedding and merging send nothing, and the mean over the picture is a sum.
    assert kinds(sent) == {"all-reduce", "collective-permute"}
    permuted = totals(sent)["collective-permute", ("sequence",)]
    once = model_halo_bytes(model, BATCH // 2, 8)
    # Recomputing a block fetches its halo again; what comes back is not needed for the gradient.
    assert once <= permuted <= (1.5 if model.remat else 1) * once


@pytest.mark.slow
def test_swin_v2_with_pictures_split_over_the_sequence_axis_sends_halos_only():
    fields = {name: getattr(MODEL, name) for name in ("num_classes", "patch_size", "embed_dim", "depths", "num_heads")}
    model = SwinV2(**fields, window_size=2, drop_path_rate=0.0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 32, 8, 3)), jnp.float32)
    params, found, sent = of_model(model, x, MeshShape(data=2, sequence=4))
    assert error(found, jit(differentiated(model))(params, x)) < 1e-5
    assert kinds(sent) == {"all-reduce", "collective-permute"}
    assert totals(sent)["collective-permute", ("sequence",)] == model_halo_bytes(model, BATCH // 2, 8)


@pytest.mark.tpu
def test_on_a_tpu_a_shifted_block_sends_the_shift_and_gathers_nothing():
    pytest.importorskip("libtpu")
    assert "TPU_WORKER_HOSTNAMES" in os.environ, "run `make test-tpu-all`: libtpu needs its environment"
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    block = SwinBlock(4, 8, 4, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 64, 128, 128), jnp.bfloat16)
    params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    _, sent = on_mesh(block, params, x, mesh, ((H, "a"), (W, "b")), run=False)
    assert kinds(sent) == {"all-reduce", "collective-permute"}
    rows, columns = 2 * 4 * 32 * 128, 2 * 32 * 4 * 128
    assert totals(sent)["collective-permute", ("a",)] == 4 * rows
    assert totals(sent)["collective-permute", ("b",)] == 4 * columns


def test_groups_of_a_split_picture_send_their_latents_alone():
    fields = {"num_classes": 3, "image_size": (64, 8), "patch_size": 2, "group_size": 4, "latents_per_group": 2}
    groups, width = 8, 8
    model = FIT(**fields, embed_dim=(16, width), num_heads=(2, 2), layers="(1)1(1)")
    local = model.clone(layers="(1)")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 64, 8, 3)), jnp.float32)
    rules = ((H, "a"), (axes.WINDOWS, "a"))
    params = random_params(model, x)
    found, sent = on_mesh(model, params, x, mesh_of(8), rules)
    assert error(found, jit(differentiated(model))(params, x)) < 1e-5
    assert kinds(sent) == {"all-gather", "all-reduce"}
    latents = FLOAT * BATCH * groups * model.latents_per_group * width
    assert max(each.bytes for each in sent if each.kind == "all-gather") == latents
    # Without global layers nothing but gradients travels; without a place for groups the map is gathered.
    params = random_params(local, x)
    assert kinds(on_mesh(local, params, x, mesh_of(8), rules, run=False)[1]) == {"all-reduce"}
    tokens = FLOAT * BATCH * 32 * 4 * 16
    control = on_mesh(local, params, x, mesh_of(8), rules[:1], run=False)[1]
    assert sum(each.bytes for each in control if each.kind == "all-gather") >= tokens
