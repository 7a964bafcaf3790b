"""Evaluation over a whole set is exact: it does not depend on the batch size, the padding or the mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.testing import Cyclic, Symmetry
from train import evaluate, state, step, tasks
from train import mesh as meshes
from train.config import MeshShape
from train.data import arrays, evaluation_batches

COUNT, CLASSES = 37, 3
REST = MeshShape()


class Linear(nn.Module):
    features: int = CLASSES

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)


@pytest.fixture(scope="module")
def columns():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(COUNT, 5)).astype(np.float32),
        "label": rng.integers(CLASSES, size=COUNT).astype(np.int32),
        "target": rng.normal(size=(COUNT, 2)).astype(np.float32),
    }


def run(model, task, columns, *, batch_size, shape=REST, devices=None, poison=None, stop=lambda: 0):
    mesh = meshes.build(shape, devices)
    params = model.init(jax.random.key(0), jnp.asarray(columns["x"]))["params"]
    places = jax.tree.map(lambda _: meshes.replicated(mesh), params)
    params = jax.device_put(params, places)
    function = evaluate.compile_evaluation(evaluate.evaluation_step(model, task), params, {}, mesh)
    batches = evaluation_batches(arrays(**columns), batch_size=batch_size)
    if poison is not None:
        batches = (
            {**batch, "x": np.where(batch["weight"][:, None] > 0, batch["x"], np.float32(poison))} for batch in batches
        )
    result = evaluate.evaluate(function, params, {}, batches, task=task, mesh=mesh, stop=stop)
    return params, result


CLASSIFY = tasks.classification(CLASSES, inputs=("x",), label_smoothing=0.3)


@pytest.mark.parametrize(
    ("batch_size", "shape", "count"),
    [(37, REST, 1), (8, REST, 8), (16, MeshShape(2, 2, 1, 2), 8), (64, MeshShape(-1, 2), 8)],
)
def test_metrics_and_confusion_equal_numpy_for_any_batch_size_and_mesh(columns, batch_size, shape, count):
    params, result = run(Linear(), CLASSIFY, columns, batch_size=batch_size, shape=shape, devices=jax.devices()[:count])
    kernel, bias = (np.asarray(params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    logits = columns["x"] @ kernel + bias
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    label = columns["label"]
    assert result.examples == COUNT
    assert result.metrics["accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == label), abs=1e-12)
    # The test loss is the plain one: smoothing belongs to training.
    assert result.metrics["loss"] == pytest.approx(-log_probability[np.arange(COUNT), label].mean(), abs=1e-5)
    wanted = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(wanted, (label, logits.argmax(-1)), 1)
    np.testing.assert_array_equal(result.confusion, wanted)


@pytest.mark.parametrize("poison", [1e30, np.nan])
def test_padding_counts_for_nothing_whatever_it_holds(columns, poison):
    clean = run(Linear(), CLASSIFY, columns, batch_size=16)[1]
    dirty = run(Linear(), CLASSIFY, columns, batch_size=16, poison=poison)[1]
    assert dirty.metrics == clean.metrics
    np.testing.assert_array_equal(dirty.confusion, clean.confusion)


def test_regression_measures_errors_and_explained_variance(columns):
    task = tasks.regression(inputs=("x",))
    params, result = run(Linear(2), task, columns, batch_size=8)
    kernel, bias = (np.asarray(params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    error = columns["x"] @ kernel + bias - columns["target"]
    mse = np.mean(error**2)
    wanted = {
        "loss": mse,
        "mse": mse,
        "mae": np.mean(np.abs(error)),
        "rmse": mse**0.5,
        "r2": 1 - mse / np.var(columns["target"]),
    }
    assert result.metrics == pytest.approx(wanted, abs=1e-5)
    assert result.confusion is None


def test_evaluation_is_broken_off_between_batches(columns):
    asked = iter([0, 0, 15])
    assert run(Linear(), CLASSIFY, columns, batch_size=8, stop=lambda: next(asked))[1] is None
    assert next(asked, "all were used") == "all were used"


def test_names_of_metrics_are_known_before_anything_is_computed(columns):
    model, task = Linear(2), tasks.regression(inputs=("x",))
    params = model.init(jax.random.key(0), jnp.asarray(columns["x"]))["params"]
    batch = next(evaluation_batches(arrays(**columns), batch_size=8))
    names = evaluate.metric_names(evaluate.evaluation_step(model, task), params, {}, batch, task)
    assert names == ["loss", "mae", "mse", "r2", "rmse"]


def test_logits_of_the_wrong_width_are_refused(columns):
    with pytest.raises(ValueError, match=r"logits have shape \(8, 2\), which must be \(8, 3\) for num_classes=3"):
        run(Linear(2), CLASSIFY, columns, batch_size=8)
    with pytest.raises(ValueError, match=r"prediction has shape \(8, 3\), which must be that of 'target', \(8, 2\)"):
        run(Linear(3), tasks.regression(inputs=("x",)), columns, batch_size=8)
    with pytest.raises(ValueError, match=r"no field 'image'; set .* to some of \['label', 'target', 'x'\]"):
        run(Linear(3), tasks.classification(3), columns, batch_size=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.classification(1), "num_classes=1 must be at least 2"),
        (lambda: tasks.classification(3, label_smoothing=1.0), r"label_smoothing=1.0 must lie in \[0, 1\)"),
    ],
)
def test_tasks_refuse_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_smoothing_moves_the_target_towards_uniform():
    logits = jnp.asarray([[2.0, 0.0, -1.0]])
    plain, uniform = tasks.cross_entropy(logits, jnp.asarray([0])), -jnp.mean(jax.nn.log_softmax(logits))
    half = tasks.cross_entropy(logits, jnp.asarray([0]), smoothing=0.5)
    np.testing.assert_allclose(half, 0.5 * plain + 0.5 * uniform, rtol=1e-6)


class Pooled(nn.Module):
    use_mean: bool

    @nn.compact
    def __call__(self, image, *, mask=None, deterministic=True):
        x = nn.Dense(4)(image)
        return jnp.mean(x, axis=(-3, -2)) if self.use_mean else x[..., 0, 0, :]


@pytest.mark.parametrize("use_mean", [True, False])
def test_symmetry_curves_tell_an_invariant_model_from_one_that_is_not(use_mean):
    image = np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype(np.float32)
    batch = evaluate.first_examples({"image": image, "weight": np.asarray([1, 1, 1, 0], np.float32)}, count=2)
    assert batch["image"].shape == (2, 6, 6, 2)
    model = Pooled(use_mean)
    params = model.init(jax.random.key(0), image)["params"]
    symmetry = Symmetry(group=Cyclic(4), inputs=("image",), output="scalar")
    curves = evaluate.symmetry_curves(model, tasks.classification(4), params, {}, [symmetry], batch)
    (curve,) = curves.values()
    assert list(curves) == [symmetry.group.name]
    assert (np.max(curve.errors) < 1e-5) == use_mean


def test_bound_model_draws_from_its_key_only_in_training():
    model = nn.Sequential([nn.Dropout(0.5, deterministic=False)])
    x = jnp.ones((4, 8))
    draws = [np.asarray(state.BoundModel(model, {}, {}, jax.random.key(seed))(x)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])
    # Two calls within one step draw differently.
    apply = state.BoundModel(model, {}, {}, jax.random.key(0))
    assert np.any(np.asarray(apply(x)) != np.asarray(apply(x)))


def test_abstract_takes_one_sharding_or_a_tree():
    mesh = meshes.build(MeshShape())
    tree = {"a": jnp.zeros((8, 2)), "b": jnp.zeros(8, jnp.int32)}
    one = step.abstract(tree, meshes.batch_sharding(mesh))
    many = step.abstract(tree, {"a": meshes.replicated(mesh), "b": meshes.batch_sharding(mesh)})
    assert one["a"].sharding == one["b"].sharding == many["b"].sharding == meshes.batch_sharding(mesh)
    assert many["a"].sharding == meshes.replicated(mesh)
    assert one["b"].dtype == jnp.int32
