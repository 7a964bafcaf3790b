"""Take Gaussian noise off photographs: a small MAXIM beside a plain convolutional network of the same cost.

Command:  python -m train configs/maxim_denoising.py
Expected: PSNR 32.3 dB on held-out crops under noise of 25 / 255 (noisy 20.7, plain convolutions 30.8). On whole
          pictures 30.7 dB and SSIM 0.838, where non-local means have 29.2 and 0.738: see docs/denoising.md. About
          sixteen minutes of processor time for both networks on one core of an AMD EPYC that others used too.

The pictures are those inside scikit-image and scikit-learn: crops of fourteen train, crops of three others test. In
training each crop, varied in size and colours, gets noise of a random strength, so that one network serves all; the
measure is the PSNR on the held-out crops under noise of standard deviation 25 / 255. Beside it stand the noisy crops
and non-local means, which is told the noise. `python -m tools.denoising_table` measures whole pictures at three
strengths.
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
COLOURS = 3
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
        return ((x - nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(y),),)

    def restore(self, x: jax.Array) -> jax.Array:
        """Return the restored picture alone."""
        return self(x)[-1][0]


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in seconds that everything works."""
    return Config(
        title="Denoised photographs",
        model=maxim(),
        task=restoration(),
        # Of twice the size: half of them are shrunk to sharper ones, see `degraded`.
        train_data=photographs("train", 2 * SIZE, count=64 if smoke else 4000),
        test_data=photographs("test", SIZE, count=16 if smoke else None),
        train_transform=functools.partial(degraded, strength=None),
        test_transform=functools.partial(degraded, strength=SIGMA),
        steps=4 if smoke else 7200,
        batch_size=4,
        eval_batch_size=8 if smoke else 127,
        optim=Optim(learning_rate=3e-3, warmup_steps=2 if smoke else 100, weight_decay=1e-4),
        log_every=2 if smoke else 100,
        eval_every=2 if smoke else 1200,
        ema_decay=0.9 if smoke else 0.998,
        metric="psnr",
        rivals={} if smoke else {"plain convolutions": plain()},
        baselines=None if smoke else baselines,
    )


def maxim() -> Maxim:
    """Return the network."""
    return Maxim(
        features=16,
        window_size=(8, 4),
        grid_size=(8, 4),
        num_scales=2,
        depth=1,
        bottleneck_depth=1,
        # Half of the variants': gates are slow on a processor, and the same time buys wider convolutions.
        expand_ratio=1.0,
        mlp_ratio=1.0,
        kernel_init=from_given,
    )


def from_given(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Return a kernel: zeros for the convolutions that make pictures, so that training starts at the given picture."""
    makes_picture = len(shape) == 4 and shape[-1] == COLOURS
    return jnp.zeros(shape, dtype) if makes_picture else nn.initializers.lecun_normal()(key, shape, dtype)


def plain() -> PlainDenoiser:
    """Return the rival, of as many multiply-accumulates a pixel."""
    return PlainDenoiser(features=32, depth=7)


def restoration() -> Task:
    """Return the task of making "image" of "noisy"; it measures PSNR at full size."""

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        outputs = apply(batch["noisy"])
        # What is left after strong noise outweighs what weak noise leaves; for less blur there, errors count in
        # multiples of the noise.
        strength = jnp.std(batch["noisy"] - batch["image"], axis=(-3, -2, -1))
        weight = SIGMA / (strength + WEAKEST)
        return weight * restoration_loss(outputs, batch["image"]), {"psnr": quality(outputs, batch)}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        outputs = apply(batch["noisy"])
        found = {"loss": restoration_loss(outputs, batch["image"]), "psnr": quality(outputs, batch)}
        return Evaluated({**found, "noisy_psnr": psnr(jnp.clip(batch["noisy"], 0, 1), batch["image"])})

    def quality(outputs: Any, batch: Batch) -> jax.Array:
        return psnr(jnp.clip(outputs[-1][0], 0, 1), batch["image"])

    return Task(inputs=lambda batch: (batch["noisy"],), loss=loss, evaluate=evaluate, logits=lambda found: found[-1][0])


def degraded(record: Record, generator: np.random.Generator, *, strength: float | None) -> Record:
    """Return a crop with noise; in training (`strength=None`) a varied one, under noise of random strength."""
    image = record["image"]
    if strength is None:
        image = varied(image, generator)
        strength = float(generator.uniform(WEAKEST, STRONGEST))
    image = np.ascontiguousarray(image)
    return {"image": image, "noisy": noisy(image, strength, generator.standard_normal)}


def varied(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a crop of half the size, cut out or shrunk, then turned, mirrored and in other colours; grey stays grey.

    Fourteen photographs show few colours and little fine detail, and what is rare there a network takes for noise.
    """
    side = len(image) // 2
    if generator.integers(2):
        image = image.reshape(side, 2, side, 2, -1).mean((1, 3))
    else:
        top, left = generator.integers(side + 1, size=2)
        image = image[top : top + side, left : left + side]
    image = np.rot90(image, int(generator.integers(4)))
    image = image[:, ::-1] if generator.integers(2) else image
    image = image[..., generator.permutation(image.shape[-1])]
    image = 1 - image if generator.integers(2) else image
    contrast = generator.uniform(0.6, 1.4)
    return np.clip(contrast * (image - 0.5) + generator.uniform(0.3, 0.7), 0, 1).astype(np.float32)


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
