"""The estimators of Hopular keep scikit-learn's contract, learn, and never look at a row's own target."""

import functools
import importlib.util
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from jaxlayers.hopfield import hopular_estimator
from jaxlayers.hopfield.hopular_estimator import HopularClassifier, HopularRegressor, column_groups, lamb
from jaxlayers.hopfield.tabular import CategoricalColumn, ContinuousColumn, TableSchema

GOLDEN = Path(__file__).parents[1] / "golden" / "hopular_lamb_parity.npz"
TINY = {"features": 4, "depth": 1, "num_heads": 1, "steps": 40, "batch_size": 64, "learning_rate": 3e-2}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """Run the same programs, compiled with less optimisation: to compile takes nearly all of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_initial", "_train", "_predict"):
            program = getattr(hopular_estimator, name).__wrapped__
            patch.setattr(hopular_estimator, name, jax.jit(program, static_argnums=0, compiler_options=QUICK))
        yield


@pytest.fixture
def two_columns(rng):
    X = rng.normal(size=(60, 2))
    return X, np.where(X[:, 0] > 0, "yes", "no")


@pytest.fixture(scope="module")
def fitted():
    X = np.random.default_rng(0).normal(size=(60, 2))
    return HopularClassifier(**TINY, random_state=0).fit(X, np.where(X[:, 0] > 0, "yes", "no")), X


# The optimiser. -------------------------------------------------------------------------------------------------------


def test_lamb_equals_the_reference():
    stored = dict(np.load(GOLDEN))
    names = ("large", "small", "zero")
    optimiser = lamb(1e-2, weight_decay=0.1, groups={"large": np.arange(2)})
    plain, other = lamb(1e-2, weight_decay=0.1), optax.lamb(1e-2, weight_decay=0.1)

    def walk(optimiser):
        def step(carry, gradients):
            params, state = carry
            updates, state = optimiser.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.concatenate([params[name].reshape(-1) for name in names])

        start = {name: jnp.asarray(stored[f"start/{name}"]) for name in names}
        gradients = {name: jnp.asarray(stored[f"gradients/{name}"]) for name in names}
        return jax.lax.scan(step, (start, optimiser.init(start)), gradients)[1]

    np.testing.assert_allclose(walk(optimiser), stored["path"], rtol=1e-5, atol=1e-6)
    for wrong in (plain, other):  # without its groups, and optax's
        assert np.abs(walk(wrong) - stored["path"]).max() > 1e-2


def test_groups_are_the_tensors_of_the_columns():
    schema = TableSchema((ContinuousColumn(), CategoricalColumn(3), ContinuousColumn()))
    groups = column_groups(schema)
    np.testing.assert_array_equal(groups["embed/value_embedding"], [0, 0, 1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(groups["embed/kernel"], [0, 1, 2])
    plan = HopularClassifier(**TINY).set_params()
    plan.schema_ = schema
    shapes = hopular_estimator._shapes(plan._plan)
    members = hopular_estimator._members(plan._plan)
    assert members.size == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert np.all(np.isin(np.diff(members), (0, 1)))
    # One tensor for each array, but three for those of the columns.
    assert members[-1] + 1 == len(jax.tree.leaves(shapes)) + 2 * len(groups)
    tree = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape), shapes)
    found = hopular_estimator._tree(plan._plan, hopular_estimator._vector(tree))
    jax.tree.map(np.testing.assert_array_equal, found, tree)


# scikit-learn's contract. ---------------------------------------------------------------------------------------------

OF_ONE_SHAPE = (
    "check_estimator_cloneable",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimators_unfitted",
    "check_mixin_order",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HopularClassifier, HopularRegressor])
def test_estimators_pass_all_checks_of_scikit_learn(kind, untyped):
    found = check_estimator(kind(**TINY | {"steps": 150}), on_skip=None)
    assert sum(one["status"] == "passed" for one in found) > 40
    assert {one["status"] for one in found} <= {"passed", "skipped"}


@pytest.mark.parametrize("kind", [HopularClassifier, HopularRegressor])
def test_estimators_pass_the_checks_that_compile_little(kind, untyped):
    from sklearn.utils.estimator_checks import estimator_checks_generator

    run = set()
    for estimator, check in estimator_checks_generator(kind(**TINY | {"steps": 2})):
        name = check.func.__name__ if isinstance(check, functools.partial) else check.__name__
        if name in OF_ONE_SHAPE:
            check(estimator)
            run.add(name)
    assert len(run) >= 7


def test_labels_are_those_of_y(fitted):
    model, X = fitted
    assert model.classes_.tolist() == ["no", "yes"]
    probabilities = model.predict_proba(X)
    assert probabilities.shape == (60, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(model.predict(X), model.classes_[probabilities.argmax(axis=1)])
    assert model.score(X, np.where(X[:, 0] > 0, "yes", "no")) > 0.85
    # The second column is the probability of "yes".
    assert np.corrcoef(probabilities[:, 1], X[:, 0])[0, 1] > 0.5
    assert model.n_features_in_ == 2


def test_one_row_is_predicted_as_among_others(fitted):
    model, X = fitted
    whole = model.predict_proba(X)
    for rows in ([3], [59, 0], np.arange(60)[::-1]):
        np.testing.assert_allclose(model.predict_proba(X[rows]), whole[rows], rtol=1e-5)
    # More rows than a batch has.
    np.testing.assert_allclose(model.predict_proba(np.tile(X, (3, 1))), np.tile(whole, (3, 1)), rtol=1e-5)


def test_equal_seeds_give_equal_results_and_others_do_not(fitted):
    model, X = fitted
    y = np.where(X[:, 0] > 0, "yes", "no")
    found = clone(model).fit(X, y)
    np.testing.assert_array_equal(found.predict_proba(X), model.predict_proba(X))
    assert found.loss_curve_ == model.loss_curve_
    other = clone(model).set_params(random_state=1).fit(X, y)
    assert np.abs(other.predict_proba(X) - model.predict_proba(X)).max() > 1e-3


def test_fitted_estimators_can_be_pickled(fitted):
    model, X = fitted
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(model.params_))
    found = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(found.predict_proba(X), model.predict_proba(X))


def test_searches_over_numbers_compile_nothing(fitted, two_columns):
    _, X = fitted
    compiled = hopular_estimator._train._cache_size()
    pipeline = make_pipeline(StandardScaler(), HopularClassifier(**TINY, random_state=0))
    grid = {"hopularclassifier__learning_rate": [1e-6, 3e-2], "hopularclassifier__steps": [20, 40]}
    found = GridSearchCV(pipeline, grid, cv=2).fit(X, X[:, 0] > 0)
    assert found.best_params_["hopularclassifier__learning_rate"] == 3e-2
    assert found.best_score_ > 0.8
    assert hopular_estimator._train._cache_size() == compiled


def test_unfitted_estimators_say_so():
    with pytest.raises(NotFittedError):
        HopularClassifier().predict(np.ones((2, 2)))
    with pytest.raises(NotFittedError):
        HopularRegressor().leave_one_out()


def test_one_class_is_predicted_without_training():
    model = HopularClassifier(**TINY).fit(np.ones((3, 2)), ["only"] * 3)
    assert model.predict(np.zeros((2, 2))).tolist() == ["only", "only"]
    np.testing.assert_array_equal(model.leave_one_out(), np.ones((3, 1)))


def test_bad_parameters_are_refused(untyped, two_columns):
    for parameters, message in (
        ({"features": 5, "num_heads": 2}, r"features=5 must be divisible by num_heads=2; set num_heads or features"),
        ({"steps": 0}, r"steps=0 must be an integer of at least 1"),
        ({"batch_size": 2.5}, r"batch_size=2.5 must be an integer"),
        ({"memory_size": 0}, r"memory_size=0 must be an integer"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0 must be positive"),
        ({"clip_norm": -1.0}, r"clip_norm=-1.0 must be positive"),
        ({"lookup_dropout_rate": 1.0}, r"lookup_dropout_rate=1.0 must lie in \[0, 1\)"),
        ({"average_rate": 0.0}, r"average_rate=0.0 must lie in \(0, 1\]"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0 must be at least 0"),
        ({"mask_rate": 2.0}, r"mask_rate=2.0 must lie in \[0, 1\]"),
        ({"categorical_features": "all"}, r"categorical_features='all' must be \"auto\""),
        ({"categorical_features": [2]}, r"names 2, but there are 2 columns"),
        ({"categorical_features": ["age"]}, r"names 'age', but the columns are unnamed"),
        ({"categorical_features": [True]}, r"has shape \(1,\) and must be \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            HopularClassifier(**TINY | parameters).fit(*two_columns)


def test_without_scikit_learn_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    spec = importlib.util.spec_from_file_location("without_sklearn", hopular_estimator.__file__)
    with pytest.raises(ImportError, match=r'pip install "jaxlayers\[train\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Columns. -------------------------------------------------------------------------------------------------------------


def test_columns_are_read_as_what_they_hold(untyped):
    X = np.asarray(
        [[1.0, "red", 1, None], [None, "blue", 2, "b"], [np.nan, np.nan, 1.0, "a"], [4, "red", 3, 7]], dtype=object
    )
    model = HopularClassifier(**TINY | {"steps": 1}, categorical_features=[1, 2, -1]).fit(X, [0, 1, 0, 1])
    assert model.categories_ == [None, ["blue", "red"], [1.0, 2.0, 3.0], [7.0, "a", "b"]]
    nan = np.nan
    expected = [[1, 1, 0, nan, nan], [nan, 0, 1, 2, nan], [nan, nan, 0, 1, nan], [4, 1, 2, 0, nan]]
    np.testing.assert_array_equal(model._rows(X), expected)
    # A category that is new counts as missing; a text where numbers were is an error.
    new = np.asarray([[1.0, "green", 2, "a"], [1.0, None, 2, "a"]], dtype=object)
    found = model.predict_proba(new)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    with pytest.raises(ValueError, match="column 0 holds 'x', but is one of numbers; name it in categorical_features"):
        model.predict(np.asarray([["x", "red", 2, "a"]], dtype=object))


def test_columns_are_chosen_by_mask_name_and_type():
    read = hopular_estimator._categorical
    numbers = np.ones((2, 3))
    np.testing.assert_array_equal(read(np.asarray([True, False, True]), numbers, numbers, None), [1, 0, 1])
    np.testing.assert_array_equal(read(["b"], numbers, numbers, np.asarray(["a", "b", "c"])), [0, 1, 0])
    np.testing.assert_array_equal(read(None, numbers.astype(str), numbers, None), [0, 0, 0])
    np.testing.assert_array_equal(read("auto", numbers.astype(str), numbers, None), [1, 1, 1])
    mixed = np.asarray([[1.0, "red", None], [None, np.nan, 2]], dtype=object)
    np.testing.assert_array_equal(read("auto", mixed, mixed, None), [0, 1, 0])

    class Frame:
        dtypes = ("float64", "category", "int64")

    np.testing.assert_array_equal(read("auto", numbers, Frame(), None), [0, 1, 0])


def test_missing_entries_are_learned_from_and_predicted(rng):
    X = rng.normal(size=(60, 2))
    y = X[:, 0] > 0
    X[rng.random(X.shape) < 0.2] = np.nan
    X[:5] = np.nan
    model = HopularClassifier(**TINY, random_state=0).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()
    seen = np.isfinite(X[:, 0])
    assert model.score(X[seen], y[seen]) > 0.8
    with pytest.raises(ValueError, match="infinity"):
        model.predict([[np.inf, 0.0]])


# What is learned. -----------------------------------------------------------------------------------------------------


def test_no_row_sees_its_own_target(fitted):
    model, X = fitted
    alone, among = model.leave_one_out(), model.predict_proba(X)
    changed = pickle.loads(pickle.dumps(model))
    values = np.array(changed.memory_.values)
    values[7, -1] = 1 - values[7, -1]
    changed.memory_ = changed.memory_._replace(values=values)
    np.testing.assert_array_equal(changed.leave_one_out()[7], alone[7])
    assert np.abs(changed.predict_proba(X)[7] - among[7]).max() > 1e-5


@pytest.mark.slow
def test_shuffled_labels_are_predicted_by_chance(rng):
    X = rng.normal(size=(320, 2))
    y = rng.permutation(np.arange(320) % 2)
    model = HopularClassifier(**TINY | {"steps": 100}, random_state=0).fit(X, y)
    left_out = np.mean(model.leave_one_out().argmax(axis=1) == y)
    assert abs(left_out - 0.5) < 0.12
    fresh = rng.normal(size=(320, 2))
    assert abs(model.score(fresh, y) - 0.5) < 0.1
    # Control: of labels with a rule far more are right.
    rule = X[:, 0] > 0
    ruled = clone(model).fit(X, rule)
    assert np.mean(ruled.leave_one_out().argmax(axis=1) == rule) > 0.85


@pytest.mark.slow
def test_an_exclusive_or_is_learned_where_a_linear_model_fails(rng):
    X = rng.uniform(-1, 1, size=(320, 2))
    y = X[:, 0] * X[:, 1] > 0
    model = HopularClassifier(**TINY | {"features": 8, "depth": 2, "steps": 300}, random_state=0)
    model.fit(X[:200], y[:200])
    assert model.score(X[200:], y[200:]) > 0.85
    assert LogisticRegression().fit(X[:200], y[:200]).score(X[200:], y[200:]) < 0.7


def test_predictions_follow_the_unit_of_the_target(rng):
    X = rng.normal(size=(60, 2))
    y = X[:, 0] - 0.5 * X[:, 1]
    model = HopularRegressor(**TINY | {"steps": 150}, random_state=0).fit(X, y)
    assert model.score(X, y) > 0.7
    scaled = clone(model).fit(X, 1e4 * y + 1e6)
    np.testing.assert_allclose(scaled.predict(X), 1e4 * model.predict(X) + 1e6, atol=30)
    assert scaled.leave_one_out().shape == (60,)


# Ways to fit. ---------------------------------------------------------------------------------------------------------


def test_validation_keeps_the_best_step_and_patience_ends(two_columns, capsys):
    common = TINY | {"validation_fraction": 0.25, "validate_every": 4, "random_state": 0}
    model = HopularClassifier(**common, verbose=True).fit(*two_columns)
    steps, scores = zip(*model.validation_curve_, strict=True)
    assert steps == tuple(range(4, 41, 4))
    assert model.best_step_ == steps[int(np.argmax(scores))]  # the first of the best
    assert len(model.memory_.values) == 45
    assert model.n_steps_ == 40
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 10
    assert printed[0].startswith("step 4: loss ")
    # The weights kept are those of that step: a run that ends there has the same.
    ended = clone(model).set_params(verbose=False, patience=4).fit(*two_columns)
    assert ended.n_steps_ == ended.validation_curve_[-1][0] <= 40
    if ended.best_step_ == model.best_step_:
        jax.tree.map(np.testing.assert_array_equal, ended.params_, model.params_)


def test_memory_in_chunks_gives_the_same(fitted):
    model, X = fitted
    chunked = pickle.loads(pickle.dumps(model)).set_params(chunk_size=16)
    np.testing.assert_allclose(chunked.predict_proba(X), model.predict_proba(X), atol=1e-5)
    np.testing.assert_allclose(chunked.leave_one_out(), model.leave_one_out(), atol=1e-5)


def test_drawn_memories_train_too(two_columns):
    X, y = two_columns
    model = HopularClassifier(**TINY, memory_size=24, random_state=0).fit(X, y)
    assert len(model.memory_.values) == 60
    assert model.score(X, y) > 0.8
