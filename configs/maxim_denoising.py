"""Take Gaussian noise off photographs: a small MAXIM beside a plain convolutional network of the same cost.

Command:  python -m train configs/maxim_denoising.py
Expected: PSNR 28.8 dB on held-out crops under noise of 25 / 255 (noisy 20.7). On whole pictures 28.3 dB and SSIM 0.761,
          where non-local means have 29.2 and 0.738: see docs/denoising.md. Minutes of processor time on a CPU.

The pictures are those inside scikit-image and scikit-learn: crops of fourteen train, crops of three others test. In
training each crop gets noise of a random strength, so that one network serves all; the measure is the PSNR on the
held-out crops under noise of standard deviation 25 / 255. Beside it stand the noisy crops and non-local means, which is
told the noise. `python -m tools.denoising_table` measures whole pictures at three strengths.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.ops.image_quality import psnr
from jaxlayers.window.maxim import Maxim, restoration_loss
from train.config import Apply, Batch, Config, Evaluated, Optim, Task
from train.photographs import photographs

SIZE = 48
SIGMA = 25 / 255
WEAKEST, STRONGEST = 5 / 255, 60 / 255

Record = dict[str, np.ndarray]


class PlainDenoiser(nn.Module):
    """Subtract what a chain of 3 x 3 convolutions with batch norms takes for noise, as DnCNN does.

    Attributes:
      features: width.
      depth: number of convolutions.
    """

    features: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> tuple[tuple[jax.Array, ...], ...]:
        """Return one stage of one scale."""
        y = nn.relu(nn.Conv(self.features, (3, 3))(x))
        for _ in range(self.depth - 2):
            y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
            y = nn.relu(nn.BatchNorm(use_running_average=deterministic, momentum=0.95)(y))
        return ((x - nn.Conv(x.shape[-1], (3, 3))(y),),)

    def restore(self, x: jax.Array) -> jax.Array:
        """Return the restored picture alone."""
        return self(x)[-1][0]


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in seconds that everything works."""
    return Config(
        title="Denoised photographs",
        model=maxim(),
        task=restoration(),
        train_data=photographs("train", SIZE, count=64 if smoke else 4000),
        test_data=photographs("test", SIZE, count=16 if smoke else None),
        train_transform=functools.partial(degraded, strength=None),
        test_transform=functools.partial(degraded, strength=SIGMA),
        steps=4 if smoke else 1600,
        batch_size=4,
        eval_batch_size=8 if smoke else 127,
        optim=Optim(learning_rate=3e-3, warmup_steps=2 if smoke else 100, weight_decay=1e-4),
        log_every=2 if smoke else 50,
        eval_every=2 if smoke else 400,
        metric="psnr",
        rivals={} if smoke else {"plain convolutions": plain()},
        baselines=None if smoke else baselines,
    )


def maxim() -> Maxim:
    """Return the network."""
    return Maxim(features=8, window_size=(8, 4), grid_size=(8, 4), num_scales=2, depth=1, bottleneck_depth=1)


def plain() -> PlainDenoiser:
    """Return the rival, of as many multiply-accumulates a pixel."""
    return PlainDenoiser(features=20, depth=7)


def restoration() -> Task:
    """Return the task of making "image" of "noisy"; it measures PSNR at full size."""

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        outputs = apply(batch["noisy"])
        return restoration_loss(outputs, batch["image"]), {"psnr": quality(outputs, batch)}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        outputs = apply(batch["noisy"])
        found = {"loss": restoration_loss(outputs, batch["image"]), "psnr": quality(outputs, batch)}
        return Evaluated({**found, "noisy_psnr": psnr(jnp.clip(batch["noisy"], 0, 1), batch["image"])})

    def quality(outputs: Any, batch: Batch) -> jax.Array:
        return psnr(jnp.clip(outputs[-1][0], 0, 1), batch["image"])

    return Task(inputs=lambda batch: (batch["noisy"],), loss=loss, evaluate=evaluate, logits=lambda found: found[-1][0])


def degraded(record: Record, generator: np.random.Generator, *, strength: float | None) -> Record:
    """Return a crop with noise; in training (`strength=None`) of random strength, turned and mirrored."""
    image = record["image"]
    if strength is None:
        image = np.rot90(image, int(generator.integers(4)))
        image = image[:, ::-1] if generator.integers(2) else image
        strength = float(generator.uniform(WEAKEST, STRONGEST))
    image = np.ascontiguousarray(image)
    return {"image": image, "noisy": noisy(image, strength, generator.standard_normal)}


def noisy(image: np.ndarray, strength: float, draw: Callable[[tuple[int, ...]], np.ndarray]) -> np.ndarray:
    """Return a picture in [0, 1] with Gaussian noise; a grey one gets one noise for all channels."""
    noise = draw(image.shape)
    grey = bool(np.all(image == image[..., :1]))
    return image + np.float32(strength) * (noise[..., :1] if grey else noise).astype(np.float32)


def non_local_means(image: np.ndarray, strength: float) -> np.ndarray:
    """Return a picture denoised by scikit-image's non-local means, as its documentation sets it for known noise."""
    from skimage.restoration import denoise_nl_means

    return denoise_nl_means(
        image,
        patch_size=5,
        patch_distance=6,
        h=0.6 * strength,
        sigma=strength,
        fast_mode=False,
        channel_axis=-1,
    )


def baselines() -> Mapping[str, float]:
    """Return the PSNR of non-local means on the held-out crops."""
    source, random = photographs("test", SIZE), np.random.RandomState(0)
    found = []
    for index in range(len(source)):
        clean = source[index]["image"]
        given = noisy(clean, SIGMA, lambda shape: random.standard_normal(shape))
        found.append(float(psnr(jnp.clip(non_local_means(given, SIGMA), 0, 1), jnp.asarray(clean))))
    return {"non-local means psnr": float(np.mean(found))}
