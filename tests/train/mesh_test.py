"""The mesh, and where parameters, optimiser state, activations and batches lie on it, read from `.sharding.spec`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlayers.core import axes
from tests.train.config_test import TINY
from train import mesh as meshes
from train import optim, state, step
from train.config import MeshShape, Optim, load


@pytest.fixture(scope="module")
def mesh():
    return meshes.build(MeshShape(data=-1, fsdp=2, tensor=2))


def test_minus_one_takes_the_rest(mesh):
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert meshes.build(MeshShape(data=2, sequence=-1)).shape["sequence"] == 4
    assert meshes.build(MeshShape(), jax.devices()[:1]).size == 1
    assert meshes.describe(mesh) == "data=2, fsdp=2, sequence=1, tensor=2 on 8 cpu devices"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(3, 2, 1, 2), "data=3, fsdp=2, sequence=1, tensor=2 needs 12 devices and there are 8; these sizes "
         "would fit: data=2, fsdp=2, sequence=1, tensor=2; data=4, fsdp=1, sequence=1, tensor=2; "),
        (MeshShape(2, 2), "needs 4 devices and there are 8; these sizes would fit: "),
        (MeshShape(-1, 3), "needs a multiple of 3 devices and there are 8; these sizes would fit: "),
        (MeshShape(-1, -1), "at most one -1 .*; set mesh.fsdp"),
        (MeshShape(0), "must have positive sizes.*; set mesh.data"),
        (MeshShape(-1, 1, 1, -2), "set mesh.tensor"),
    ],
)  # fmt: skip
def test_mesh_that_does_not_fit_is_refused_with_sizes_that_would(shape, message):
    with pytest.raises(ValueError, match=message):
        meshes.build(shape)


def test_every_proposed_size_fits():
    with pytest.raises(ValueError, match="would fit") as error:
        meshes.build(MeshShape(5, 1, 1, 3))
    proposals = str(error.value).partition("would fit: ")[2].partition("; or start")[0].split("; ")
    assert len(proposals) == 3
    for proposal in proposals:
        sizes = {name: int(size) for name, size in (pair.split("=") for pair in proposal.split(", "))}
        assert meshes.build(MeshShape(**sizes)).size == 8


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("block/query/kernel", (16, 32), P("fsdp", "tensor")),
        ("key/kernel", (16, 32), P("fsdp", "tensor")),
        ("block/value/bias", (32,), P("tensor")),
        ("stack/up/kernel", (3, 16, 64), P(None, "fsdp", "tensor")),
        ("stack/up/bias", (3, 64), P(None, "tensor")),
        ("block/out/kernel", (32, 16), P("tensor", "fsdp")),
        ("block/down/kernel", (64, 16), P("tensor", "fsdp")),
        ("block/out/bias", (16,), P()),
        ("block/query/kernel", (15, 32), P(None, "tensor")),
        ("block/query/kernel", (16, 33), P("fsdp")),
        ("block/lookup/kernel", (16, 64), P(None, "fsdp")),
        ("conv/kernel", (3, 3, 65, 128), P(None, None, None, "fsdp")),
        ("conv/kernel", (4, 3, 65, 129), P("fsdp")),
        ("odd/kernel", (33, 65), P()),
        ("norm/scale", (64,), P()),
        ("step", (), P()),
    ],
)
def test_parameters_are_split_by_name_else_along_the_largest_axis_that_divides(mesh, path, shape, spec):
    assert meshes.parameter_spec(path, shape, mesh) == spec
    # A moment of the optimiser has the parameter's path at the end of its own.
    assert meshes.parameter_spec(f"opt_state/1/mu/{path}", shape, mesh) == spec


def test_own_rules_come_first_and_must_name_a_mesh_axis(mesh):
    rules = ((r"query/kernel$", ("tensor", None)),)
    assert meshes.parameter_spec("query/kernel", (16, 32), mesh, rules) == P("tensor")
    assert meshes.parameter_spec("key/kernel", (16, 32), mesh, rules) == P("fsdp", "tensor")
    with pytest.raises(ValueError, match="names axis 'model'; a mesh axis is one of"):
        meshes.parameter_spec("query/kernel", (16, 32), mesh, ((r"query", ("model", None)),))


def test_the_state_is_made_in_place_and_the_optimiser_lies_with_its_parameters(mesh):
    config = load(TINY)
    transform, _ = optim.build(Optim(warmup_steps=2), 10)
    create = state.creator(config.model, config.task, transform, seed=0)
    batch = meshes.put_batch({"tokens": np.zeros((8, 6, 3), np.float32), "label": np.zeros(8, np.int32)}, mesh)
    with meshes.use(mesh):
        shapes = jax.eval_shape(create, batch)
        places = meshes.shardings(shapes, mesh)
        made = jax.jit(create, out_shardings=places)(batch)
    assert jax.tree.map(lambda leaf: leaf.sharding, made) == places
    moments = made.opt_state[1].mu
    for params in (made.params, moments):
        block = params["block_0"]
        assert block["query"]["kernel"].sharding.spec == P("fsdp", "tensor")
        assert block["query"]["bias"].sharding.spec == P("tensor")
        assert block["out"]["kernel"].sharding.spec == P("tensor", "fsdp")
        assert block["up"]["kernel"].sharding.spec == P("fsdp", "tensor")
        assert block["down"]["kernel"].sharding.spec == P("tensor", "fsdp")
        assert block["query"]["kernel"].addressable_shards[0].data.shape == (8, 8)
    assert made.step.sharding.spec == P()
    assert len(made.step.sharding.device_set) == 8
    assert made.collections["batch_stats"]["norm"]["mean"].sharding.spec == P()
    abstract = step.abstract(shapes, places)
    assert abstract.params["block_0"]["query"]["kernel"].sharding.spec == P("fsdp", "tensor")


def test_logical_axes_reach_the_partitioner_only_inside_use():
    mesh = meshes.build(MeshShape(data=1, fsdp=2, sequence=2, tensor=2))

    def layer(x):
        return axes.constrain(x * 2, axes.BATCH, axes.TOKENS, axes.HIDDEN)

    x = jnp.ones((8, 4, 6))
    with meshes.use(mesh):
        assert jax.jit(layer)(x).sharding.spec == P("fsdp", "sequence", "tensor")
    # Negative control: the old context manager leaves the constraint without effect.
    with mesh:
        assert jax.jit(layer)(x).sharding.is_fully_replicated


def test_every_logical_axis_has_a_rule():
    assert {name for name, _ in meshes.LOGICAL_RULES} == axes.NAMES


def test_batches_lie_over_data_and_fsdp(mesh):
    rows = np.arange(24, dtype=np.float64).reshape(8, 3)
    batch = meshes.put_batch({"x": rows, "label": np.arange(8)}, mesh)
    assert batch["x"].sharding.spec == P(("data", "fsdp"))
    assert batch["x"].addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(batch["x"], rows)
    assert batch["label"].dtype == jnp.int32
    assert meshes.process_rows(mesh, 8) == (0, 1)


def test_batch_that_does_not_divide_is_refused(mesh):
    meshes.check_batch_size("batch_size", 12, mesh)
    with pytest.raises(
        ValueError, match="batch_size=30 must be divisible by data.fsdp=4 .*; set batch_size to 28 or 32"
    ):
        meshes.check_batch_size("batch_size", 30, mesh)
    with pytest.raises(ValueError, match="set eval_batch_size to 4$"):
        meshes.check_batch_size("eval_batch_size", 3, mesh)


def test_gather_gives_whole_arrays(mesh):
    placed = jax.device_put(np.arange(16.0).reshape(4, 4), jax.NamedSharding(mesh, P("fsdp", "tensor")))
    np.testing.assert_array_equal(meshes.gather({"x": placed}, mesh)["x"], np.arange(16.0).reshape(4, 4))
