"""Tell malignant from benign tumours by what a sample retrieves from learned prototypes.

Command:  python -m train configs/hopfield_breast_cancer.py --devices 2
Expected: accuracy 0.979 on 190 held-out samples (seed 0), half a minute on two CPU cores. Beside it on the same rows:
          logistic regression 0.979, support vector machine 0.974, the same network without its memory 0.974.

The data are the 569 samples of 30 measurements that scikit-learn ships (Breast Cancer Wisconsin, diagnostic). A fixed
third of each class is held out; columns are standardised by the training rows. The settings were chosen by five-fold
cross-validation within the training rows (0.975 there; logistic regression 0.984, support vector machine 0.974).

The table is nearly linear, and no network here is reliably better than logistic regression: over seeds 0 to 4 the
accuracy is 0.979, 0.974, 0.953, 0.968 and 0.979 (mean 0.971), without the memory 0.974 to 0.984 (mean 0.977); one
sample is 0.005.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import numpy as np

from jaxlayers.hopfield import Hopfield, HopfieldClassifier, HopfieldLayer
from train.config import Config, Optim
from train.data import Source, arrays
from train.tasks import classification


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in seconds that everything works."""
    lecun = nn.initializers.lecun_normal()
    association = Hopfield(num_heads=4, learn_beta=True, dropout_rate=0.5, kernel_init=lecun)
    memory = HopfieldLayer(association, num_patterns=64, value_features=32, patterns_init=nn.initializers.normal(0.5))
    model = HopfieldClassifier(num_classes=2, features=32, memory=memory, depth=1)
    return Config(
        title="Hopfield prototypes on breast cancer",
        model=model,
        task=classification(2, inputs=("columns",), label="label", label_smoothing=0.1),
        train_data=breast_cancer("train"),
        test_data=breast_cancer("test"),
        steps=40 if smoke else 400,
        batch_size=64,
        eval_batch_size=190,
        optim=Optim(learning_rate=1e-3, warmup_steps=10 if smoke else 40, weight_decay=0.5),
        log_every=20,
        eval_every=20 if smoke else 100,
        metric="accuracy",
        labels=("malignant", "benign"),
        baselines=baselines,
        # The same network without its memory: what the lookup is worth.
        rivals={"without memory": model.clone(depth=0)},
    )


@functools.cache
def columns_and_labels(split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Return standardised columns `[rows, 30]` and labels of the training rows or of the held-out third."""
    from sklearn.datasets import load_breast_cancer

    columns, labels = load_breast_cancer(return_X_y=True)
    # RandomState, unlike Generator, promises the same stream in every NumPy release.
    order = np.random.RandomState(0).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in (0, 1):
        members = order[labels[order] == label]
        held_out[members[: round(len(members) / 3)]] = True
    train = columns[~held_out]
    chosen = held_out if split == "test" else ~held_out
    standardised = (columns[chosen] - train.mean(axis=0)) / train.std(axis=0)
    return standardised.astype(np.float32), labels[chosen].astype(np.int32)


def breast_cancer(split: Literal["train", "test"]) -> Source:
    """Return a source of records `{"columns": float32 [30], "label": int32}`."""
    columns, labels = columns_and_labels(split)
    return arrays(columns=columns, label=labels)


def baselines() -> Mapping[str, float]:
    """Return the test accuracy of scikit-learn's classifiers on the same rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    models = {"logistic regression": LogisticRegression(max_iter=2000), "support vector machine": SVC()}
    train, test = columns_and_labels("train"), columns_and_labels("test")
    return {f"{name} accuracy": float(model.fit(*train).score(*test)) for name, model in models.items()}
