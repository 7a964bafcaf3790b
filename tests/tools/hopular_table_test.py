"""The comparison uses the same splits for all models, and its table says what was measured."""

import json

import numpy as np
import pytest
from sklearn.base import clone

from tools import hopular_table
from tools.hopular_table import MODELS, TABLES, Scores


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_tested_once_by_a_model_that_did_not_see_it(name):
    table = TABLES[name]
    columns, target = table.load()
    folds = hopular_table.splits(table, target)
    assert len(folds) == table.folds
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in folds])), np.arange(len(columns)))
    for train, test in folds:
        assert len(train) + len(test) == len(np.union1d(train, test)) == len(target)
        if not table.is_regression:  # each class is as frequent as in the whole
            shares = np.bincount(target[test]) / len(test)
            np.testing.assert_allclose(shares, np.bincount(target) / len(target), atol=2 / len(test))
    again = hopular_table.splits(table, target)
    for one, other in zip(folds, again, strict=True):
        assert all(map(np.array_equal, one, other))


@pytest.mark.parametrize("is_regression", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_fresh_and_seeded(name, is_regression):
    one = hopular_table.model(name, is_regression=is_regression)
    assert repr(clone(one)) == repr(one)
    seeds = [value for key, value in one.get_params().items() if key.endswith("random_state")]
    assert name in ("linear", "svm") or seeds == [0]


def test_table_says_means_and_deviations():
    found = {
        "wine": {"linear": Scores([0.9, 1.0], 1.0), "hopular": Scores([0.8, 0.8], 20.4)},
        "iris": {"linear": Scores([0.5, 0.5], 1.0), "hopular": Scores([0.75, 0.25], 3.0)},
    }
    assert hopular_table.markdown(found).splitlines() == [
        "| table | logistic or ridge regression | Hopular |",
        "| --- | --- | --- |",
        "| wine | **0.950** ± 0.050 | 0.800 ± 0.000 |",
        "| iris | **0.500** ± 0.000 | **0.500** ± 0.250 |",
        "| processor time, all folds | 2 s | 23 s |",
    ]


def test_command_compares_on_chosen_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hopular_table, "HOPULAR", {"features": 2, "depth": 1, "num_heads": 1, "steps": 2})
    path = tmp_path / "scores.json"
    text = hopular_table.main(["--tables", "iris", "--models", "linear", "hopular", "--json", str(path)])
    assert capsys.readouterr().out == text + "\n"
    scores = json.loads(path.read_text())["iris"]
    assert all(len(one["test"]) == 5 for one in scores.values())
    assert f"{np.mean(scores['linear']['test']):.3f}" in text
    assert np.mean(scores["linear"]["test"]) > 0.9
    assert np.mean(scores["hopular"]["test"]) <= 1
