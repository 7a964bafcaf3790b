"""Compress photographs: one point of the curve of rate against distortion, by a small S2LIC.

Command:  python -m train configs/s2lic_photographs.py
Expected: PSNR 30.2 dB at 0.547 bits a pixel (the estimate of the model) on 64 test crops of 64 x 64 pixels, after
          9,000 steps, three quarters of an hour on one core of a busy CPU. As files of whole photographs it has a
          higher PSNR than JPEG of equal size for seven of nine; see docs/compression.md.

The loss is bits a pixel + 0.02 x 255^2 x mean squared error; training crops are of other pictures than the test crops.
`python -m tools.compression_table` trains further weights from this one and compares files with JPEG.
A network half as wide, with a third of the latent features, had 24.8 dB at 0.302 bits a pixel after 700 steps at twice
the learning rate, far below JPEG.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxlayers.window.s2lic import S2LIC
from train.config import Apply, Batch, Config, Evaluated, Optim, StartFrom, Task
from train.photographs import photographs

STEPS = 9000
TUNING_STEPS = 2500
SIZE = 64


def model() -> S2LIC:
    """Return the network, small enough for a CPU."""
    return S2LIC(
        features=48,
        latent_features=96,
        num_slices=2,
        depths=(1, 1, 1),
        num_heads=(3, 3, 3),
        window_size=4,
        mlp_ratio=2.0,
        enhance_features=8,
        head_dim=16,
        drop_path_rate=0.0,
    )


def compression(weight: float) -> Task:
    """Return the task of few bits a pixel and a small error: rate + weight 255^2 MSE.

    It measures `loss`, `bits_per_pixel` and `psnr` (of the mean squared error of the whole test set).
    """

    def parts(out: Any, image: Any) -> tuple[Any, Any]:
        rate = out.bits / math.prod(image.shape[1:3])
        return rate, jnp.mean((out.picture - image) ** 2, axis=(1, 2, 3))

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        rate, error = parts(apply(batch["image"]), batch["image"])
        return rate + weight * 255**2 * error, {"bits_per_pixel": rate, "squared_error": error}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        out = apply(batch["image"])
        rate, error = parts(out._replace(picture=jnp.clip(out.picture, 0, 1)), batch["image"])
        return Evaluated({"loss": rate + weight * 255**2 * error, "bits_per_pixel": rate, "squared_error": error})

    return Task(
        inputs=lambda batch: (batch["image"],),
        loss=loss,
        evaluate=evaluate,
        finish=lambda means: {**means, "psnr": -10 * math.log10(max(means["squared_error"], 1e-12))},
    )


def config(smoke: bool = False) -> Config:
    """Return the run at the highest rate; the small one shows in a minute that everything works."""
    small = model().clone(features=8, latent_features=8, depths=(1,), num_heads=(2,), enhance_features=0, head_dim=4)
    return Config(
        title="Compressed photographs",
        model=small if smoke else model(),
        task=compression(0.02),
        train_data=photographs("train", 16 if smoke else SIZE, count=64 if smoke else 20_000),
        test_data=photographs("test", 16 if smoke else SIZE, count=16 if smoke else 64),
        steps=4 if smoke else STEPS,
        batch_size=8,
        eval_batch_size=8,
        optim=Optim(learning_rate=1e-3, schedule="cosine", warmup_steps=2 if smoke else 200, weight_decay=0.0),
        log_every=2 if smoke else 250,
        metric="loss",
        mode="min",
    )


def tuned(base: Config, start: str) -> Config:
    """Return the run that begins with the weights of another one's directory, at half the learning rate."""
    optim = dataclasses.replace(base.optim, learning_rate=base.optim.learning_rate / 2)
    return dataclasses.replace(base, optim=optim, start_from=StartFrom(start))
