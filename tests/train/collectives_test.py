"""What compiled steps send between devices is what the mesh calls for, counted by formula from shapes alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.window import Swin
from tests.train import plain
from tests.train.config_test import TINY
from train import mesh as meshes
from train.collectives import Collective, collectives, totals
from train.config import MeshShape, load
from train.loop import prepare
from train.step import abstract, compile_step

FLOAT = 4
BATCH, TOKENS, FEATURES, HEADS = 8, 16, 32, 4
MODEL = plain.Plain(num_heads=HEADS)
SCALAR = FLOAT  # the loss


@pytest.fixture(scope="module")
def shapes():
    x = plain.example(BATCH, TOKENS, FEATURES)
    return jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]


@functools.cache
def step(shape, *, sequence_parallel=False, rules=(), model=MODEL):
    """Return mesh and collectives of loss and gradient, compiled once for all tests."""
    mesh = meshes.build(shape)
    x = plain.example(BATCH, TOKENS, FEATURES)
    compiled, _ = plain.gradients(model, mesh, x, sequence_parallel=sequence_parallel, rules=rules)
    return mesh, collectives(compiled, mesh)


def shard_bytes(shapes, mesh, rules=()):
    """Return the bytes of all parameters on one device, and of those that `fsdp` splits, once it is gathered."""
    total = gathered = 0
    for leaf, place in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(meshes.shardings(shapes, mesh, rules)), strict=True
    ):
        held = FLOAT * int(np.prod(place.shard_shape(leaf.shape)))
        parts = mesh.shape["fsdp"] if "fsdp" in place.spec else 1
        total += held * parts
        gathered += held * parts * (parts > 1)
    return total, gathered


def activation(mesh, features=FEATURES):
    """Return the bytes of one device's `[batch, tokens, features]`."""
    return FLOAT * BATCH // (mesh.shape["data"] * mesh.shape["fsdp"]) * TOKENS * features


# On meshes ------------------------------------------------------------------------------------------------------------


def test_data_parallel_sends_the_gradients_and_nothing_else(shapes):
    _, found = step(MeshShape(data=8))
    parameters = sum(FLOAT * leaf.size for leaf in jax.tree.leaves(shapes))
    assert totals(found) == {("all-reduce", ("data",)): parameters + SCALAR}
    assert all(each.group_size == 8 and each.count == 1 for each in found)


def test_fsdp_gathers_each_split_parameter_and_reduces_each_gradient(shapes):
    mesh, found = step(MeshShape(data=1, fsdp=8))
    total, gathered = shard_bytes(shapes, mesh)
    assert 0 < gathered < total
    # The compiler for CPUs reduces whole gradients and cuts its part, where others reduce and scatter.
    assert totals(found) == {("all-gather", ("fsdp",)): gathered, ("all-reduce", ("fsdp",)): total + SCALAR}


def test_tensor_parallel_reduces_once_a_pair_of_products_forwards_and_backwards(shapes):
    mesh, found = step(MeshShape(data=4, tensor=2))
    tensor = [each for each in found if each.mesh_axes == ("tensor",)]
    assert {each.kind for each in tensor} == {"all-reduce"}
    assert [each.op_name.partition("block_0/")[2] for each in tensor[:3]] == [
        "out/dot_general",
        "feed_forward/down/dot_general",
        "feed_forward/up/dot_general",
    ]
    assert len(tensor) == 4
    # Backwards through queries, keys and values it is three sums in one, which compilers for TPU and GPU add up first.
    assert [len(each.shapes) for each in tensor] == [1, 1, 1, 3]
    assert sum(each.bytes for each in tensor) == (2 + 1 + 3) * activation(mesh)
    total, _ = shard_bytes(shapes, mesh)
    assert totals(found)["all-reduce", ("data",)] == total + SCALAR
    assert len(totals(found)) == 2


def test_all_three_together_send_what_each_of_them_sends(shapes):
    mesh, found = step(MeshShape(data=2, fsdp=2, tensor=2))
    sent = totals(found)
    total, gathered = shard_bytes(shapes, mesh)
    assert sent.pop(("all-reduce", ("tensor",))) == 6 * activation(mesh)
    # Kernels are gathered forwards, and again backwards where their gathered form is not kept.
    gathers = [each for each in found if each.kind == "all-gather"]
    assert all(each.mesh_axes == ("fsdp",) for each in gathers)
    forwards = sum(each.bytes for each in gathers if "transpose(" not in each.op_name)
    assert forwards == gathered
    assert gathered <= sent.pop(("all-gather", ("fsdp",))) <= 2 * gathered
    # A gradient is summed over fsdp whole, then over data in parts; what is not split over both at once.
    assert sent.pop(("all-reduce", ("fsdp",))) == gathered
    assert sent.pop(("all-reduce", ("data",))) == gathered // 2
    assert sent.pop(("all-reduce", ("data", "fsdp"))) == total - gathered + SCALAR
    assert not sent


def test_sequence_gathers_keys_and_values_only(shapes):
    mesh, found = step(MeshShape(data=4, sequence=2))
    gathers = [each for each in found if each.kind == "all-gather"]
    assert [each.bytes for each in gathers] == 2 * [activation(mesh)]
    sent = totals(found)
    total, _ = shard_bytes(shapes, mesh)
    # Backwards: gradients, those of keys and values, and forwards the mean over the tokens.
    mean = FLOAT * BATCH // 4 * FEATURES
    assert sent["all-reduce", ("sequence",)] == total + 2 * activation(mesh) + mean
    assert sent["all-reduce", ("data",)] == total + SCALAR
    assert len(sent) == 3


def test_sequence_parallel_gathers_before_each_pair_and_keeps_the_sums(shapes):
    mesh, found = step(MeshShape(data=4, tensor=2), sequence_parallel=True)
    gathers = [each for each in found if each.kind == "all-gather"]
    assert [(each.mesh_axes, each.bytes) for each in gathers] == 4 * [(("tensor",), activation(mesh))]
    names = [re.sub(r".*block_0/", "", each.op_name) for each in gathers]
    assert names == [
        "query/dot_general",
        "feed_forward/up/dot_general",
        "feed_forward/down/dot_general",
        "out/dot_general",
    ]
    sums = [shape for each in found if each.kind == "all-reduce" for shape in each.shapes if len(shape[1]) == 3]
    assert sums == 6 * [("f32", (BATCH // 4, TOKENS, FEATURES))]
    # Norms and the biases after a pair see half of the tokens each: their gradients are summed over tensor as well.
    rest = totals(found)["all-reduce", ("tensor",)] - 6 * activation(mesh)
    mean = FLOAT * BATCH // 4 * FEATURES
    assert rest == 6 * FLOAT * FEATURES + mean


def test_without_its_rule_a_pair_of_products_is_not_split(shapes):
    # Negative control. The hidden features still are, so their gradients have to be put together over tensor.
    rules = ((r"(up|down)/kernel$", ("fsdp", None)), (r"up/bias$", (None,)))
    _, found = step(MeshShape(data=4, tensor=2), rules=rules)
    _, right = step(MeshShape(data=4, tensor=2))
    assert ("all-gather", ("tensor",)) not in totals(right)
    network = shapes["block_0"]["feed_forward"]
    whole = (network["up"]["kernel"], network["up"]["bias"], network["down"]["kernel"])
    assert totals(found)["all-gather", ("tensor",)] == sum(FLOAT * leaf.size for leaf in whole)


def test_windows_and_their_shifts_send_nothing_but_what_the_pairs_need():
    model = Swin(
        num_classes=8, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, drop_path_rate=0.0
    )
    images = jnp.ones((BATCH, 16, 16, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def found(shape, **use):
        mesh = meshes.build(shape)
        places = meshes.shardings(shapes, mesh)
        with meshes.use(mesh, **use):
            jitted = jax.jit(
                jax.grad(lambda params, x: jnp.sum(jnp.square(model.apply({"params": params}, x)))),
                in_shardings=(places, meshes.batch_sharding(mesh)),
                out_shardings=places,
            )
            return mesh, collectives(jitted.lower(shapes, images).compile(), mesh)

    # A map of 8 x 8 patches in two blocks; their biases are summed before they are added up in the table.
    block = FLOAT * BATCH // 4 * 64 * 16
    bias, table = FLOAT * 2 * 16 * 16, FLOAT * 2 * 49
    parameters = sum(FLOAT * leaf.size for leaf in jax.tree.leaves(shapes))
    _, data = found(MeshShape(data=8))
    assert totals(data) == {("all-reduce", ("data",)): parameters + 2 * (bias - table)}
    mesh, tensor = found(MeshShape(data=4, tensor=2))
    total, _ = shard_bytes(shapes, mesh)
    assert totals(tensor) == {
        ("all-reduce", ("tensor",)): 2 * 6 * block,
        ("all-reduce", ("data",)): total + 2 * (bias - table) // 2,
    }
    # Split along the height, a shift sends the two rows that change sides, and so do undoing it and their transposes.
    _, height = found(MeshShape(data=4, tensor=2), sequence_parallel=True)
    sent = totals(height)
    assert sent["all-gather", ("tensor",)] == 2 * 4 * block
    assert sent["collective-permute", ("tensor",)] == 2 * 2 * 2 * block // 8
    assert set(sent) == {*totals(tensor), ("all-gather", ("tensor",)), ("collective-permute", ("tensor",))}


# The trainer's own step -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """The trainer's step for the tiny transformer on all axes: its plan, text, and bytes that it reuses."""
    config = dataclasses.replace(load(TINY), test_data=None, metric=None, mesh=MeshShape(2, 2, 1, 2))
    plan = prepare(config, jax.devices())
    rows = abstract(plan.example, meshes.batch_sharding(plan.mesh))
    compiled = compile_step(plan.train_step, plan.abstract, rows, plan.mesh)
    return plan, compiled


def test_every_buffer_of_the_state_is_donated(trained):
    plan, compiled = trained
    leaves = jax.tree.leaves(plan.abstract)
    header = compiled.as_text().partition("\n")[0]
    aliased = {(int(i), int(o)) for o, i in re.findall(r"\{(\d+)\}: \((\d+), \{\}, \w+-alias\)", header)}
    # Outputs begin with the new state, inputs with the old one, in the same order.
    assert {(i, i) for i in range(len(leaves))} == aliased
    assert compiled.memory_analysis().alias_size_in_bytes == meshes.bytes_per_device(plan.abstract)


def test_the_trainer_gathers_parameters_in_their_own_dtype(trained):
    plan, compiled = trained
    gathers = [each for each in collectives(compiled, plan.mesh) if each.kind == "all-gather"]
    assert gathers
    assert {dtype for each in gathers for dtype, _ in each.shapes} == {"f32"}


# Reading the text -----------------------------------------------------------------------------------------------------


def read(line, *, before="", mesh=None):
    text = f"HloModule m\n\n{before}\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
    return collectives(text, mesh or meshes.build(MeshShape(data=2, fsdp=2, tensor=2)))


@pytest.mark.parametrize(
    ("groups", "mesh_axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",), 2),
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor"), 4),
        ("{}", ("data", "fsdp", "tensor"), 8),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor"), 8),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_1'}", ("tensor",), 2),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}", ("data", "tensor"), 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",), 2),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp"), 4),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", ("data",), 2),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", ("fsdp",), 2),
    ],
)
def test_replica_groups_in_every_spelling_become_mesh_axes(groups, mesh_axes, size):
    line = f"%ar = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    assert read(line) == [Collective("all-reduce", mesh_axes, 128, 1, size, (("f32", (4, 8)),), "ar", "")]


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        (
            "%x = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}",
            "all-gather",
            64,
        ),
        (
            "%x = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
            "all-gather",
            256,
        ),
        ("%x = f32[4,8]{1,0} all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add", "all-reduce", 128),
        ("%x = (f32[4]{0}, bf16[6]{0}) all-reduce(%p, %q), replica_groups=[4,2]<=[8]", "all-reduce", 28),
        ("%x = f32[2,8]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}", "reduce-scatter", 128),
        ("%x = (s8[8]{0}, s8[8]{0}) all-to-all(%p, %q), replica_groups=[4,2]<=[8]", "all-to-all", 16),
        ("%x = pred[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", 8),
        (
            "%x = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}",
            "collective-permute",
            32,
        ),
    ],
)
def test_bytes_are_those_of_the_whole_array_in_every_form(line, kind, size):
    (found,) = read(line)
    assert (found.kind, found.bytes, found.mesh_axes) == (kind, size, ("tensor",))


def test_what_moves_nothing_is_left_out():
    assert not read("%x = f32[8]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add")
    assert not read("%x = f32[8]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}")
    assert not read("%x = f32[8]{0} all-gather-done(%y)")


def test_a_ring_is_as_long_as_its_axis():
    pairs = ",".join(f"{{{i},{(i + 2) % 8}}}" for i in range(8))
    (found,) = read(f"%x = f32[8]{{0}} collective-permute(%p), source_target_pairs={{{pairs}}}")
    assert (found.mesh_axes, found.group_size) == (("data", "fsdp"), 4)


BODY = """%body (p: f32[8]) -> f32[8] {
  ROOT %ar = f32[8]{0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add, metadata={op_name="jit(f)/g"}
}"""


@pytest.mark.parametrize(
    ("config", "count"), [(', backend_config={"known_trip_count":{"n":"5"},"other":{"a":[1]}}', 5), ("", None)]
)
def test_loops_multiply_where_their_turns_are_known(config, count):
    (found,) = read(f"%w = f32[8]{{0}} while(%p), condition=%c, body=%body{config}", before=BODY)
    assert (found.count, found.op_name) == (count, "jit(f)/g")
    assert totals([found]) == {("all-reduce", ("tensor",)): 32 * (count or 1)}


def test_branches_fusions_and_asynchronous_calls_are_entered():
    for line in (
        "%w = f32[8]{0} conditional(%i, %p, %p), branch_computations={%body, %other}",
        "%w = f32[8]{0} fusion(%p), kind=kCustom, calls=%body",
        "%w = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%body",
    ):
        assert [each.name for each in read(line, before=BODY)] == ["ar"]
    assert not read("%w = f32[8]{0} async-done(%p), calls=%body", before=BODY)


def test_a_fused_reduce_scatter_of_a_tpu_has_the_name_of_its_caller():
    before = BODY.replace("%body", "%all-reduce-scatter.1").replace(', metadata={op_name="jit(f)/g"}', "")
    line = '%f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/down"}'
    (found,) = read(line, before=before)
    assert (found.kind, found.bytes, found.op_name) == ("reduce-scatter", 32, "jit(f)/down")


def test_one_asynchronous_gather_in_several_fusions_counts_once():
    gather = (
        '%g = f32[8]{0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}'
    )
    other = gather.replace("%g", "%h").replace('"3"', '"4"')
    assert [each.name for each in read(f"{gather}\n  {gather}\n  {other}")] == ["g", "h"]


def test_text_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("module @jit_f {}", meshes.build(MeshShape(data=8)))
    with pytest.raises(ValueError, match="spelt in an unknown way"):
        read("%x = f32[8]{0} all-reduce(%p), replica_groups=#groups, to_apply=%add")


def test_a_scan_over_split_weights_counts_its_turns():
    mesh = meshes.build(MeshShape(data=1, fsdp=8))
    kernels = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def layers(kernels, x):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    places = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    rows = meshes.batch_sharding(mesh)
    jitted = jax.jit(layers, in_shardings=(places, rows), out_shardings=rows)
    found = collectives(jitted.lower(kernels, jax.ShapeDtypeStruct((8, 16), jnp.float32)).compile(), mesh)
    assert totals(found) == {("all-gather", ("fsdp",)): 5 * 16 * 16 * FLOAT}
