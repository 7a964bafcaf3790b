"""One step is the same function on any mesh: same seed, same losses, dropout and running statistics included."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.train import shared_cache
from tests.train.config_test import TINY
from train import mesh as meshes
from train import program
from train.config import MeshShape, Optim, Task, load
from train.data import CORRUPT
from train.loop import first_state, prepare
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


def compiled(plan):
    example = abstract(plan.example, meshes.batch_sharding(plan.mesh))
    parallel = plan.config.mesh.sequence_parallel
    return compile_step(plan.train_step, plan.abstract, example, plan.mesh, sequence_parallel=parallel)


def curve(plan, state, batches=None):
    """Return the losses of the first steps from `state` on, and the last state, gathered."""
    places = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
    state = jax.device_put(state, places)
    step = compiled(plan)
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
        MeshShape(data=4, tensor=2, sequence_parallel=True),
        MeshShape(data=4, fsdp=2, slices=4),
    ],
    ids=["data", "fsdp", "tensor", "data-fsdp-tensor", "data-sequence-tensor", "sequence-parallel", "slices"],
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
    step = compiled(plan)
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


def run_plan(config, *, steps=3, devices=8, state=None, batches=None):
    """Return the gathered states and the metrics of the first steps of a config."""
    plan = prepare(config, jax.devices()[:devices])
    places = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
    state = first_state(plan) if state is None else jax.device_put(state, places)
    step = compiled(plan)
    given = batches or plan.train_batches(0)
    states, metrics = [meshes.gather(state, plan.mesh)], []
    for _ in range(steps):
        state, found = step(state, meshes.put_batch(next(given), plan.mesh))
        states.append(meshes.gather(state, plan.mesh))
        metrics.append(jax.device_get(found))
    if batches is None:
        given.close()
    return states, metrics


def plain(**changes):
    """Return the tiny run without dropout, statistics and evaluation."""
    config = load(TINY)
    return dataclasses.replace(config, **{"model": PlainModel(16), "test_data": None, "metric": None, **changes})


class PlainModel(nn.Module):
    """A perceptron per token, its mean, and a head."""

    features: int

    @nn.compact
    def __call__(self, tokens, *, deterministic=True):
        x = nn.gelu(nn.Dense(self.features, name="embed")(tokens))
        return nn.Dense(4, name="head")(jnp.mean(x, axis=-2))


def difference(one, other):
    return max(float(np.max(np.abs(a - b))) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"])
def test_pieces_of_a_batch_give_the_step_of_the_whole_batch(mesh):
    # Plain descent: Adam would turn rounding in a gradient near zero into a whole step.
    optim = Optim(name="sgd", learning_rate=0.1, schedule="constant")
    whole, metrics = run_plan(plain(optim=optim, mesh=mesh), devices=4 if mesh == MeshShape() else 8)
    pieces, found = run_plan(plain(optim=optim, mesh=mesh, accumulate=4), devices=4 if mesh == MeshShape() else 8)
    assert difference(whole[-1].params, pieces[-1].params) < 1e-6
    assert difference(whole[0].params, whole[-1].params) > 1e-2
    for one, other in zip(metrics, found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)


def test_no_row_travels_to_be_in_another_piece():
    plan = prepare(plain(mesh=MeshShape(data=4), accumulate=2), jax.devices()[:4])
    example = abstract(plan.example, meshes.batch_sharding(plan.mesh))
    text = compile_step(plan.train_step, plan.abstract, example, plan.mesh).as_text()
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    assert "all-gather" not in text
    assert "all-reduce" in text


def test_running_statistics_go_from_piece_to_piece():
    config = dataclasses.replace(load(TINY), test_data=None, metric=None, accumulate=2)
    states, _ = run_plan(config, steps=1, devices=1)
    once, _ = run_plan(dataclasses.replace(config, accumulate=1), steps=1, devices=1)
    before, after, single = (
        state.collections["batch_stats"]["norm"]["var"] for state in (states[0], states[1], once[1])
    )
    # Two updates keep 0.9 ** 2 of the first value where one keeps 0.9.
    moved, moved_once = np.mean(np.abs(after - before)), np.mean(np.abs(single - before))
    assert 1.5 < moved / moved_once < 2.3


def test_the_average_follows_the_parameters_as_written():
    states, _ = run_plan(plain(ema_decay=0.5), steps=8, devices=2)
    average = states[0].params
    for done, state in enumerate(states[1:]):
        keep = min(0.5, (1 + done) / (10 + done))
        average = jax.tree.map(lambda a, p, keep=keep: keep * a + (1 - keep) * p, average, state.params)
        assert difference(average, state.ema) < 1e-6
    assert difference(states[-1].ema, states[-1].params) > 1e-4
    assert states[-1].evaluated is states[-1].ema


def test_the_average_lies_where_the_parameters_lie():
    plan = prepare(plain(ema_decay=0.9, mesh=MeshShape(fsdp=4, tensor=2, data=1), model=PlainModel(features=512)))
    specs = [jax.tree.map(lambda leaf: leaf.sharding.spec, tree) for tree in (plan.abstract.params, plan.abstract.ema)]
    assert specs[0] == specs[1]
    assert any(spec for spec in jax.tree.leaves(specs[0], is_leaf=lambda x: isinstance(x, PartitionSpec)))


def spoiled(config, bad):
    """Yield the batches of a config with an infinity in those of the numbers `bad`."""
    for number, batch in zip(range(9), prepare(config, jax.devices()[:2]).train_batches(0), strict=False):
        if number in bad:
            batch = {**batch, "tokens": np.full_like(batch["tokens"], np.inf)}
        yield batch


def test_a_skipped_step_changes_nothing_and_the_next_goes_on():
    config = plain(on_nonfinite="skip", ema_decay=0.9)
    states, metrics = run_plan(config, steps=4, devices=2, batches=spoiled(config, {1}))
    assert [float(found["skipped"]) for found in metrics] == [0, 1, 0, 0]
    assert not np.isfinite(metrics[1]["loss"])
    kept = [dataclasses.replace(state, step=0) for state in states]
    assert difference(kept[1], kept[2]) == 0
    assert difference(kept[2], kept[3]) > 0
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states[-1]))
    # Without it the same batch spoils everything.
    config = plain()
    states, _ = run_plan(config, steps=4, devices=2, batches=spoiled(config, {1}))
    assert not np.any(np.isfinite(states[-1].params["head"]["kernel"]))


def test_a_batch_transform_sees_the_whole_batch_on_any_mesh():
    def shuffled_in(batch, key):
        share = jax.random.uniform(key)
        return {**batch, "tokens": share * batch["tokens"] + (1 - share) * batch["tokens"][::-1]}

    mixed, _ = run_plan(plain(batch_transform=shuffled_in), devices=1)
    spread, _ = run_plan(plain(batch_transform=shuffled_in, mesh=MeshShape(data=4, tensor=2)))
    without, _ = run_plan(plain(), devices=1)
    assert difference(mixed[-1].params, spread[-1].params) < 1e-4
    assert difference(mixed[-1].params, without[-1].params) > 1e-3


def test_frozen_parameters_stay_and_their_gradient_is_not_computed():
    frozen = Optim(learning_rate=1e-2, freeze=("^embed/",))
    states, metrics = run_plan(plain(optim=frozen), devices=2)
    assert difference(states[0].params["embed"], states[-1].params["embed"]) == 0
    assert difference(states[0].params["head"], states[-1].params["head"]) > 0
    _, free = run_plan(plain(optim=Optim(learning_rate=1e-2)), devices=2)
    assert metrics[0]["loss"] == free[0]["loss"]
    assert metrics[0]["gradient_norm"] < free[0]["gradient_norm"]


class Duel(nn.Module):
    """Two numbers that two players move."""

    @nn.compact
    def __call__(self, x):
        return Number(name="left")(), Number(name="right")()


class Number(nn.Module):
    """A trainable number."""

    @nn.compact
    def __call__(self):
        return self.param("value", nn.initializers.constant(1.0), ())


def duel(**changes):
    def left(apply, batch, key):
        left, right = apply(batch["tokens"])
        return jnp.full(len(batch["tokens"]), left * right), {"left_value": jnp.full(len(batch["tokens"]), left)}

    def right(apply, batch, key):
        left, right = apply(batch["tokens"])
        return jnp.full(len(batch["tokens"]), -left * right), {}

    task = Task(inputs=lambda batch: (batch["tokens"],), loss={"left": left, "right": right}, evaluate=None)
    optim = Optim(name="sgd", b1=0.0, learning_rate=0.1, schedule="constant", weight_decay=0.0, clip_norm=None)
    return plain(task=task, optim=optim, **changes)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_player_of_a_game_descends_its_own_loss(accumulate):
    states, metrics = run_plan(duel(model=Duel(), accumulate=accumulate), steps=5, devices=2)
    left = right = 1.0
    for state, found in zip(states[1:], metrics, strict=True):
        np.testing.assert_allclose(found["left_loss"], left * right, rtol=1e-5)
        np.testing.assert_allclose(found["right_loss"], -left * right, rtol=1e-5)
        np.testing.assert_allclose(found["left_value"], left, rtol=1e-5)
        left, right = left - 0.1 * right, right + 0.1 * left  # the rotation of a bilinear game
        np.testing.assert_allclose(state.params["left"]["value"], left, rtol=1e-5)
        np.testing.assert_allclose(state.params["right"]["value"], right, rtol=1e-5)


def test_players_must_be_the_parameters():
    with pytest.raises(ValueError, match=r"losses of a game, \['left', 'right'\], must be those of the parameters"):
        prepare(duel(), jax.devices()[:1])


def test_corrupt_records_are_counted_over_the_batch():
    config = plain()

    def marked():
        for number, batch in zip(range(9), prepare(config, jax.devices()[:2]).train_batches(0), strict=False):
            yield {**batch, CORRUPT: (np.arange(16) < number).astype(np.int32)}

    plan = prepare(config, jax.devices()[:2])
    example = {**plan.example, **meshes.put_batch({CORRUPT: np.zeros(16, np.int32)}, plan.mesh)}
    step = compile_step(plan.train_step, plan.abstract, abstract(example, meshes.batch_sharding(plan.mesh)), plan.mesh)
    state, counts = first_state(plan), []
    for batch, _ in zip(marked(), range(3), strict=False):
        state, metrics = step(state, meshes.put_batch(batch, plan.mesh))
        counts.append(int(metrics["corrupt_records"]))
    assert counts == [0, 1, 2]


def test_sequence_parallel_steps_hold_other_collectives():
    # The plain and the parallel program differ, so the equal curves above are of two programs.
    texts = [
        compiled(plan_for(MeshShape(data=4, tensor=2, sequence_parallel=parallel))).as_text()
        for parallel in (False, True)
    ]
    assert texts[1].count("all-gather") > texts[0].count("all-gather")


@pytest.mark.parametrize("name", ["attention", "dots", "full"])
def test_recomputation_changes_no_step(start, alone, name):
    config = dataclasses.replace(load(TINY), test_data=None, metric=None, remat=name)
    losses, _ = curve(prepare(config, jax.devices()[:1]), start[1])
    np.testing.assert_allclose(losses, alone[0], rtol=0, atol=2e-5)


def test_a_step_has_the_kernels_of_its_config():
    def found(kernels):
        config = dataclasses.replace(load("configs/swin_digits.py", smoke=True), kernels=kernels)
        mesh = meshes.build(config.mesh, jax.devices())
        batch = {"image": jnp.zeros((8, 8, 8, 1)), "label": jnp.zeros(8, jnp.int32)}
        built = program.build(config, mesh, batch)
        with meshes.use(mesh):
            return str(jax.make_jaxpr(built.train_step)(built.abstract, batch)).count("pallas_call")

    assert found("jnp") == found("table") == 0
    assert found("pallas") > 0
    with pytest.raises(ValueError, match="kernels='mosaic' must be one of"):
        plain(kernels="mosaic")


def test_an_unknown_recomputation_is_refused():
    with pytest.raises(ValueError, match="remat='most' must be one of"):
        prepare(plain(remat="most"), jax.devices()[:1])
