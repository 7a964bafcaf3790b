"""Pretrain a shifted-window transformer without labels: predict the hidden patches of handwritten digits (SimMIM).

Command:  python -m train configs/simmim_digits.py
Expected: mean error 0.110 of a hidden pixel of the 599 held-out images, with pixels in [0, 1] (median image 0.184,
          conditional mean 0.139, nearest training image 0.119); a minute and a half of processor time on two CPU cores.

Ten of the sixteen patches of an image of 8 x 8 pixels are replaced by a learned token. The baselines see the same
masks: the median training image, the training image that is nearest on the visible pixels, and the conditional mean of
a normal distribution with the training images' mean and covariance (the best linear prediction).

`configs/swin_finetune.py` starts from the encoder that this run leaves.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from jaxlayers.window import SimMIM, Swin
from train.config import Config, Optim, Task
from train.data import digits
from train.tasks import masked_image_modelling


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    xavier = nn.initializers.xavier_uniform()
    encoder = Swin(
        num_classes=0,
        patch_size=2,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(4, 8),
        window_size=4,
        drop_path_rate=0.0,
        kernel_init=xavier,
    )
    return Config(
        title="SimMIM on handwritten digits",
        model=SimMIM(encoder, kernel_init=xavier),
        task=task(),
        train_data=digits("train"),
        test_data=digits("test"),
        steps=60 if smoke else 3000,
        batch_size=64,
        eval_batch_size=200,
        optim=Optim(learning_rate=3e-3, warmup_steps=20 if smoke else 200, weight_decay=0.05),
        log_every=20,
        eval_every=30 if smoke else 500,
        metric="loss",
        mode="min",
        baselines=baselines,
    )


def task() -> Task:
    """Return the task: single patches of 2 x 2 pixels are hidden."""
    return masked_image_modelling(patch_size=2, mask_patch_size=2, mask_ratio=0.6)


def baselines() -> Mapping[str, float]:
    """Return the mean error over the hidden pixels of the test images of predictors that need no network."""
    train, test = (np.stack([source[index]["image"] for index in range(len(source))]) for source in SPLITS)
    rows = train.reshape(len(train), -1)
    mean, covariance = rows.mean(axis=0), np.cov(rows.T) + 1e-3 * np.eye(rows.shape[1])

    def nearest(seen: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        return rows[np.argmin(np.square(rows - seen)[:, ~hidden].sum(axis=-1))]

    def conditional(seen: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        found = mean.copy()
        known = np.linalg.solve(covariance[np.ix_(~hidden, ~hidden)], (seen - mean)[~hidden])
        found[hidden] += covariance[np.ix_(hidden, ~hidden)] @ known
        return found

    predictors = {
        "median image": lambda seen, hidden: np.median(rows, axis=0),
        "nearest training image": nearest,
        "conditional mean": conditional,
    }
    return {f"{name} loss": measured(predict, test) for name, predict in predictors.items()}


SPLITS = (digits("train"), digits("test"))


def measured(predict: Any, images: np.ndarray) -> float:
    """Return the task's own measure of a function of the visible pixels of one image and of where they are not."""

    def apply(given: Any, masked: Any) -> Any:
        hidden = np.repeat(np.repeat(np.asarray(masked), 2, axis=-2), 2, axis=-1).reshape(len(given), -1)
        seen = np.where(hidden, 0, np.asarray(given).reshape(len(given), -1))
        found = [predict(one, where) for one, where in zip(seen, hidden, strict=True)]
        return np.stack(found).reshape(given.shape).astype(np.float32)

    return float(np.mean(task().evaluate(apply, {"image": images}).metrics["loss"]))
