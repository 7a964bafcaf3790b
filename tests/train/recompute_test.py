"""Sequence parallelism and recomputation: the same numbers from less memory, with the collectives that the paper has.

Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, MLSys 2023.
"""

import collections
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core import remat
from jaxlayers.window import Swin
from tests.train import plain
from train import mesh as meshes
from train.collectives import collectives
from train.config import MeshShape


def relative_error(found, expected):
    """Return the largest difference, relative to the largest entry of each array.

    An array a thousand times below the largest is measured by that: the gradient of the keys' bias is zero but for
    rounding.
    """
    floor = 1e-3 * max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(a - b))) / max(float(np.max(np.abs(b))), floor) for a, b in pairs)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """Loss and gradients of the model with dropout, on one device, with nothing recomputed."""
    model, x = plain.Plain(dropout_rate=0.2), plain.example()
    params = plain.parameters(model, x)
    with jax.threefry_partitionable(True):
        return params, jax.jit(jax.value_and_grad(functools.partial(plain.loss, model)))(params, x)


def on_mesh(shape, params, name, **keywords):
    mesh, x = meshes.build(shape), plain.example()
    model = plain.Plain(dropout_rate=0.2, remat=name)
    compiled, places = plain.gradients(model, mesh, x, **keywords)
    return compiled(jax.device_put(params, places), jax.device_put(x, meshes.batch_sharding(mesh)))


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (MeshShape(data=4, tensor=2), "none"),
        (MeshShape(data=2, tensor=4), "attention"),
        (MeshShape(data=1, fsdp=2, sequence=2, tensor=2), "full"),
    ],
    ids=["tensor-2", "tensor-4-attention", "fsdp-sequence-tensor-full"],
)
def test_sequence_parallel_and_recomputed_equals_one_device_with_nothing_recomputed(alone, shape, name):
    params, expected = alone
    error = relative_error(jax.device_get(on_mesh(shape, params, name, sequence_parallel=True)), expected)
    assert error < 2e-5


def test_the_comparison_sees_another_dropout_mask(alone):
    # Negative control.
    params, expected = alone
    model, x = plain.Plain(dropout_rate=0.2), plain.example()

    def loss(params):
        rngs = {"dropout": jax.random.key(4, impl="threefry2x32")}
        return jnp.mean(jnp.square(model.apply({"params": params}, x, deterministic=False, rngs=rngs)))

    with jax.threefry_partitionable(True):
        assert relative_error(jax.jit(jax.value_and_grad(loss))(params), expected) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "names"), [(False, ("attention",)), (True, ("attention", "dots"))])
def test_swin_gives_the_same_under_every_policy(scan, names):
    def model(name):
        return Swin(4, 2, 8, (2,), (2,), 4, dropout_rate=0.3, drop_path_rate=0.3, remat=name, scan=scan)

    images = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    params = jax.jit(model(False).init)(jax.random.key(1), images)["params"]

    def loss(params, name):
        rngs = {"dropout": jax.random.key(2)}
        return jnp.sum(jnp.square(model(name).apply({"params": params}, images, deterministic=False, rngs=rngs)))

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = run(params, "none")
    for name in names:
        assert relative_error(run(params, name), expected) < 1e-5, name


# Memory ---------------------------------------------------------------------------------------------------------------

B, S, H, A = 2, 64, 64, 4  # batch, tokens, features and heads, with the paper's letters


def kept(name):
    """Return the bytes that a block in bfloat16, with dropout, keeps for its backward pass, by dtype and shape."""
    block, x = plain.Block(A, 0.1, jnp.bfloat16), plain.example(B, S, H, jnp.bfloat16)
    params = jax.jit(block.init)(jax.random.key(0), x)
    rngs = {"dropout": jax.random.key(1)}
    run = remat.remat(lambda params, x: block.apply(params, x, deterministic=False, rngs=rngs), name)
    _, pullback = jax.vjp(run, params, x)
    given = {id(leaf) for leaf in jax.tree.leaves((params, x))}
    found = collections.Counter()
    for leaf in jax.tree.leaves(pullback):
        if getattr(leaf, "shape", ()) and id(leaf) not in given:  # not the key of the dropout
            found[(leaf.dtype.name, leaf.shape)] += leaf.nbytes
    return found


def of_scores(found):
    return {dtype: size for (dtype, shape), size in found.items() if shape == (B, A, S, S)}


def test_a_block_keeps_the_attention_terms_of_the_formula():
    # sbh(34 + 5as/h): of the 5 as^2 b, two bytes each are the softmax and what dropout left of it, one is dropout's
    # mask. The softmax is in float32 here, and kept as that besides: another 4 as^2 b, which is spared as well.
    unit = A * S * S * B
    assert of_scores(kept("none")) == {"bfloat16": 4 * unit, "bool": unit, "float32": 4 * unit}


def test_selective_recomputation_spares_the_attention_terms_and_little_else():
    everything, selective = kept("none"), kept("attention")
    assert of_scores(selective) == {}
    # What is left does not depend on the number of heads or, per token, on the number of tokens; queries, keys, values
    # and the output may be kept in another layout.
    left = sum(everything.values()) - sum(of_scores(everything).values())
    assert abs(sum(selective.values()) - left) <= 2 * 2 * S * B * H
    # The paper's 34 sbh, and no less: norms and GELU keep float32 and the steps of their formulas here.
    assert 34 * S * B * H < sum(selective.values()) < 100 * S * B * H
    assert not kept("full")
    assert sum(kept("dots").values()) <= 34 * S * B * H


@functools.cache
def temporary(name, *, sequence_parallel=None):
    """Return the bytes of temporary memory that loss and gradient of four blocks in a loop take on one device."""
    shape, devices = (MeshShape(data=1), 1) if sequence_parallel is None else (MeshShape(data=2, tensor=4), 8)
    mesh = meshes.build(shape, jax.devices()[:devices])
    model = plain.Plain(depth=4, remat=name, scan=True)
    compiled, _ = plain.gradients(model, mesh, plain.example(2, 64, 32), sequence_parallel=bool(sequence_parallel))
    return compiled.memory_analysis().temp_size_in_bytes


def test_compiled_programs_take_less_memory_in_the_order_of_the_policies():
    none, attention, full = (temporary(name) for name in ("none", "attention", "full"))
    assert none > attention > full
    # Four blocks' softmax alone: heads x tokens x tokens of each image, in float32.
    assert none - attention >= 4 * 4 * (2 * 4 * 64 * 64)


def test_sequence_parallelism_takes_less_memory_on_each_device():
    whole, split = temporary("attention", sequence_parallel=False), temporary("attention", sequence_parallel=True)
    # Each block keeps at least its input and the one between its halves: three quarters of both are spared.
    activation = 4 * (2 // 2) * 64 * 32
    assert whole - split >= 4 * 2 * 3 / 4 * activation


# Collectives on a TPU -------------------------------------------------------------------------------------------------


def compiled_for_tpu(*, sequence_parallel):
    pytest.importorskip("libtpu")
    assert "TPU_WORKER_HOSTNAMES" in os.environ, "run `make test-tpu-all`: libtpu needs its environment"
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = meshes.build(MeshShape(data=4, tensor=2), devices)
    x = jax.ShapeDtypeStruct((8, 256, 512), jnp.bfloat16)
    model = plain.Plain(depth=2, dtype=jnp.bfloat16)
    return mesh, plain.gradients(model, mesh, x, sequence_parallel=sequence_parallel)[0]


@pytest.mark.tpu
def test_on_a_tpu_each_reduction_after_a_pair_becomes_a_scatter_and_a_gather():
    for sequence_parallel in (False, True):
        mesh, compiled = compiled_for_tpu(sequence_parallel=sequence_parallel)
        activations = [
            each
            for each in collectives(compiled, mesh)
            if each.mesh_axes == ("tensor",) and any(shape == (2, 256, 512) for _, shape in each.shapes)
        ]
        kinds = collections.Counter(each.kind for each in activations)
        if not sequence_parallel:
            # Two pairs in each of two blocks, forwards and backwards.
            assert set(kinds) == {"all-reduce"}
            assert kinds["all-reduce"] == 2 * 2 * 2
        else:
            assert kinds["reduce-scatter"] == 2 * 2 * 2
            # As many gathers, and those of inputs that a backward pass takes again rather than to keep them.
            assert kinds["all-gather"] >= 2 * 2 * 2
            assert "all-reduce" not in kinds
            forwards = [
                re.sub(r".*/(block_\d/)", r"\1", e.op_name) for e in activations if "transpose(" not in e.op_name
            ]
            assert sum("query" in name or "up" in name for name in forwards) == 4
