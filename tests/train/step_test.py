"""One step is the same function on any mesh: same seed, same losses, dropout and running statistics included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import shared_cache
from tests.train.config_test import TINY
from train import mesh as meshes
from train.config import MeshShape, load
from train.loop import prepare
from train.state import KEYS, BoundModel
from train.step import abstract, compile_step

STEPS = 6
REST = MeshShape()


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with shared_cache.used():
        yield


def plan_for(shape=REST, devices=8):
    config = dataclasses.replace(load(TINY), test_data=None, metric=None, mesh=shape)
    return prepare(config, jax.devices()[:devices])


def first_state(plan):
    with meshes.use(plan.mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
        return jax.jit(plan.create, out_shardings=places)(plan.example)


def curve(plan, state, batches=None):
    """Return the losses of the first steps from `state` on, and the last state, gathered."""
    places = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
    state = jax.device_put(state, places)
    step = compile_step(
        plan.train_step, plan.abstract, abstract(plan.example, meshes.batch_sharding(plan.mesh)), plan.mesh
    )
    losses = []
    batches = batches or plan.train_batches(0)
    for _ in range(STEPS):
        state, metrics = step(state, meshes.put_batch(next(batches), plan.mesh))
        losses.append(float(metrics["loss"]))
    batches.close()
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
    return np.asarray(losses), meshes.gather(state, plan.mesh)


@pytest.fixture(scope="module")
def start():
    plan = plan_for(devices=1)
    return plan, meshes.gather(first_state(plan), plan.mesh)


@pytest.fixture(scope="module")
def alone(start):
    return curve(*start)


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(data=8),
        MeshShape(data=1, fsdp=8),
        MeshShape(data=4, tensor=2),
        MeshShape(data=2, fsdp=2, tensor=2),
        MeshShape(data=2, sequence=2, tensor=2),
    ],
    ids=["data", "fsdp", "tensor", "data-fsdp-tensor", "data-sequence-tensor"],
)
def test_eight_devices_give_the_loss_curve_of_one(start, alone, shape):
    losses, state = curve(plan_for(shape), start[1])
    np.testing.assert_allclose(losses, alone[0], rtol=0, atol=2e-5)
    assert state.step == STEPS
    statistics = state.collections["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(statistics, alone[1].collections["batch_stats"]["norm"]["mean"], atol=1e-4)


def test_eight_devices_start_from_the_parameters_of_one(start):
    plan = plan_for(MeshShape(2, 2, 1, 2))
    made = first_state(plan)
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, made) == jax.tree.map(
        lambda leaf: leaf.sharding.spec, plan.abstract
    )
    for leaf, other in zip(jax.tree.leaves(meshes.gather(made, plan.mesh)), jax.tree.leaves(start[1]), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7)


def test_the_curve_sees_another_dropout_mask_and_other_data(start, alone):
    # Negative control: what the comparison of meshes must not overlook.
    plan, state = start
    other_key = jax.random.key_data(jax.random.key(5, impl=KEYS))
    masked = curve(plan, dataclasses.replace(state, rng=np.asarray(other_key)))[0]
    shifted = curve(plan, state, plan.train_batches(1))[0]
    assert np.max(np.abs(masked - alone[0])) > 1e-3
    assert np.max(np.abs(shifted - alone[0])) > 1e-2


def test_a_step_moves_everything_that_it_should(start, alone):
    before, after = start[1], alone[1]
    leaves = jax.tree_util.tree_flatten_with_path(before.params)[0]
    for (path, leaf), other in zip(leaves, jax.tree.leaves(after.params), strict=True):
        if "key/bias" not in jax.tree_util.keystr(path, simple=True, separator="/"):  # softmax ignores it
            assert np.any(leaf != other), path
    np.testing.assert_array_equal(before.rng, after.rng)
    old, new = (state.collections["batch_stats"]["norm"]["mean"] for state in (before, after))
    assert np.any(old != new)


def test_loss_and_gradient_norm_equal_a_step_by_hand(start):
    plan, state = start
    step = compile_step(
        plan.train_step, plan.abstract, abstract(plan.example, meshes.batch_sharding(plan.mesh)), plan.mesh
    )
    metrics = step(jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)), plan.example)[1]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=KEYS), 0)

    def objective(params, example):
        apply = BoundModel(plan.config.model, params, state.collections, jax.random.split(key)[0])
        target = 0.9 * jax.nn.one_hot(example["label"], 4) + 0.1 / 4
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(apply(example["tokens"])), axis=-1))

    loss, gradient = jax.jit(jax.value_and_grad(objective))(state.params, jax.device_get(plan.example))
    norm = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient)) ** 0.5
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["learning_rate"], 0.5e-2, rtol=1e-6)
