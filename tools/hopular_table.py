"""Compare Hopular with scikit-learn's own models on the tables that it ships, by cross-validation over equal splits.

Command:  python -m tools.hopular_table [--tables iris wine] [--models hopular ...] [--json scores.json]

Prints a Markdown table of means and standard deviations over the folds (accuracy, or R^2 of diabetes), and every
fold's score as JSON. All models have fixed settings: scikit-learn's defaults on standardised columns, and for Hopular
one set for all tables (`HOPULAR`). Nothing is tuned on test rows. The figures of a run are in docs/hopular.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn import datasets
from sklearn.base import BaseEstimator
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from jaxlayers.hopfield.hopular_estimator import HopularClassifier, HopularRegressor

SEED = 0
HOPULAR: Mapping[str, Any] = {
    "features": 8,
    "depth": 2,
    "num_heads": 2,
    "steps": 300,
    "learning_rate": 1e-2,
    "batch_size": 128,
    "memory_size": 256,
}


class Table(NamedTuple):
    """A table to predict the last column of.

    Attributes:
      load: returns columns and target.
      folds: of the cross-validation.
      is_regression: the target is a number, else a class.
    """

    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    folds: int = 5
    is_regression: bool = False


TABLES: dict[str, Table] = {
    "breast_cancer": Table(lambda: datasets.load_breast_cancer(return_X_y=True)),
    "wine": Table(lambda: datasets.load_wine(return_X_y=True)),
    "iris": Table(lambda: datasets.load_iris(return_X_y=True)),
    "digits": Table(lambda: datasets.load_digits(return_X_y=True), folds=3),
    "diabetes": Table(lambda: datasets.load_diabetes(return_X_y=True), is_regression=True),
}

MODELS = {
    "linear": "logistic or ridge regression",
    "forest": "random forest",
    "boosting": "gradient boosting",
    "svm": "support vector machine",
    "hopular": "Hopular",
}


class Scores(NamedTuple):
    """What one model reaches on one table.

    Attributes:
      test: score of each fold's test rows.
      seconds: of processor time, to compile, fit and predict, of all folds.
    """

    test: list[float]
    seconds: float


def model(name: str, *, is_regression: bool) -> BaseEstimator:
    """Return an unfitted model by its name in `MODELS`."""
    seed: dict[str, Any] = {"random_state": SEED}
    makers: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "linear": (
            lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
            lambda: make_pipeline(StandardScaler(), Ridge()),
        ),
        "forest": (lambda: RandomForestClassifier(**seed), lambda: RandomForestRegressor(**seed)),
        "boosting": (lambda: HistGradientBoostingClassifier(**seed), lambda: HistGradientBoostingRegressor(**seed)),
        "svm": (
            lambda: make_pipeline(StandardScaler(), SVC()),
            # SVR's margin and penalty are in the target's units, which are not those of a standardised one.
            lambda: make_pipeline(StandardScaler(), _standardised_target(SVR())),
        ),
        "hopular": (lambda: HopularClassifier(**HOPULAR, **seed), lambda: HopularRegressor(**HOPULAR, **seed)),
    }
    return makers[name][is_regression]()


def _standardised_target(regressor: BaseEstimator) -> BaseEstimator:
    from sklearn.compose import TransformedTargetRegressor

    return TransformedTargetRegressor(regressor, transformer=StandardScaler())


def splits(table: Table, target: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the training and test rows of each fold, the same for all models."""
    kind = KFold if table.is_regression else StratifiedKFold
    return list(kind(table.folds, shuffle=True, random_state=SEED).split(np.zeros(len(target)), target))


def compare(tables: Sequence[str], models: Sequence[str]) -> dict[str, dict[str, Scores]]:
    """Return the scores of each model on each table; progress goes to standard error."""
    found: dict[str, dict[str, Scores]] = {}
    for name in tables:
        table = TABLES[name]
        columns, target = table.load()
        folds = splits(table, target)
        for one in models:
            start = time.process_time()
            fitted = model(one, is_regression=table.is_regression)
            result = cross_validate(fitted, columns, target, cv=folds, error_score="raise")
            scores = Scores([float(score) for score in result["test_score"]], time.process_time() - start)
            found.setdefault(name, {})[one] = scores
            print(f"{name} {one}: {np.mean(scores.test):.4f} in {scores.seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def markdown(found: Mapping[str, Mapping[str, Scores]]) -> str:
    """Return the table, the best mean of each row in bold."""
    models = list(next(iter(found.values())))
    lines = [
        "| table | " + " | ".join(MODELS[one] for one in models) + " |",
        "| --- |" + " --- |" * len(models),
    ]
    for name, row in found.items():
        means = {one: round(float(np.mean(scores.test)), 3) for one, scores in row.items()}
        cells = []
        for one, scores in row.items():
            mean = f"{means[one]:.3f}"
            mean = f"**{mean}**" if means[one] == max(means.values()) else mean
            cells.append(f"{mean} ± {np.std(scores.test):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seconds = (f"{sum(row[one].seconds for row in found.values()):.0f} s" for one in models)
    return "\n".join([*lines, "| processor time, all folds | " + " | ".join(seconds) + " |"])


def main(arguments: Sequence[str] | None = None) -> str:
    """Compare, print and return the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.hopular_table", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--json", type=Path, help="file for the scores, instead of standard output")
    options = parser.parse_args(arguments)
    found = compare(options.tables, options.models)
    text = markdown(found)
    print(text)
    scores = json.dumps({name: {one: row[one]._asdict() for one in row} for name, row in found.items()})
    if options.json is None:
        print(scores)
    else:
        options.json.write_text(scores + "\n")
    return text


if __name__ == "__main__":
    main()
