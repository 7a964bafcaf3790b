"""Generate handwritten digits with a StyleSwin against a wavelet discriminator, both small.

Command:  python -m train configs/styleswin_digits.py
Expected: sliced Wasserstein distance 0.457 (1.065 after 300 steps, 0.567 after 900; training pictures 0.326, the mean
          picture 3.343) after 1,800 steps, three minutes of processor time on one core of a CPU.

The measure is the sliced Wasserstein distance between generated digits and held-out ones, over fixed directions and
latents, of the averaged parameters; the Frechet distance of the same run is in docs/generation.md. Digits of 8 x 8 are
doubled by linear interpolation, so that the last stage has windows of 8 in a map of 16, half of them shifted.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.window.styleswin import StyleSwin
from jaxlayers.window.styleswin_discriminator import WaveletDiscriminator
from train.config import Config, Optim
from train.data import digits
from train.tasks import adversarial, sliced_wasserstein

LATENT = 32


class Players(nn.Module):
    """A generator of pictures and a discriminator of them; outside pixels lie in [0, 1], inside in [-1, 1].

    The scores of four pictures are coupled by `stddev_group`, as published: what is logged as `r1`, and minimised,
    then holds what a picture does to the scores of its group too.
    """

    features: tuple[int, ...] = (32, 32, 32)
    num_heads: tuple[int, ...] = (4, 4, 4)
    out_features: int = 1
    depth: int = 1
    shift_size: int | None = None
    seen_features: tuple[int, ...] = (32, 64)
    stddev_group: int = 4

    def setup(self) -> None:
        """Make the players."""
        self.generator = StyleSwin(
            self.features,
            self.num_heads,
            out_features=self.out_features,
            style_features=LATENT,
            mapping_depth=4,
            depth=self.depth,
            shift_size=self.shift_size,
            mlp_ratio=2.0,
        )
        self.discriminator = WaveletDiscriminator(self.seen_features, stddev_group=self.stddev_group)

    def __call__(self, x: jax.Array, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the scores of real pictures and of those made from the latents."""
        return self.discriminate(x), self.discriminate(self.generate(latent))

    def generate(self, latent: jax.Array) -> jax.Array:
        """Return pictures."""
        return (self.generator(latent) + 1) / 2

    def discriminate(self, x: jax.Array) -> jax.Array:
        """Return a score for each picture; high = looks real."""
        return self.discriminator(2 * x - 1)


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in seconds that everything works."""
    return Config(
        title="Digits by StyleSwin",
        model=Players(),
        # As many as a group of the discriminator divides.
        task=adversarial(LATENT, r1_gamma=0.5, reference=images("test")[:596]),
        train_data=digits("train"),
        test_data=digits("test"),
        train_transform=doubled,
        test_transform=doubled,
        steps=20 if smoke else 1800,
        batch_size=32,
        eval_batch_size=200,
        # No momentum; the discriminator learns at four times the generator's rate.
        optim=Optim(
            learning_rate=1e-3,
            schedule="linear",
            final_fraction=0.1,
            warmup_steps=5,
            weight_decay=0.0,
            clip_norm=None,
            b1=0.0,
            b2=0.99,
            rates=((r"^discriminator/", 4.0),),
        ),
        ema_decay=0.98,
        log_every=10 if smoke else 20,
        eval_every=10 if smoke else 300,
        keep_every=10 if smoke else 300,
        metric="sliced_wasserstein",
        mode="min",
        baselines=baselines,
    )


def doubled(record: dict[str, np.ndarray], rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """Return the record with a picture of twice the size, by linear interpolation between the centres of pixels."""
    del rng
    image = record["image"]
    for axis in (0, 1):
        ends = [(1, 1) if other == axis else (0, 0) for other in range(image.ndim)]
        padded = np.moveaxis(np.pad(image, ends, mode="edge"), axis, 0)
        pairs = np.stack([0.25 * padded[:-2] + 0.75 * padded[1:-1], 0.75 * padded[1:-1] + 0.25 * padded[2:]], axis=1)
        image = np.moveaxis(pairs.reshape(-1, *padded.shape[1:]), 0, axis)
    return {**record, "image": image.astype(np.float32)}


def images(split: str) -> np.ndarray:
    """Return all pictures of a split, `[pictures, 16, 16, 1]`."""
    source = digits("train" if split == "train" else "test")
    return np.stack([doubled(source[index])["image"] for index in range(len(source))])


def baselines() -> Mapping[str, float]:
    """Return the distance of other samples to the held-out pictures, measured in the same way."""
    train, test = images("train"), images("test")[:596]
    order = np.random.RandomState(0).permutation(len(train))[: len(test)]
    samples = {"training pictures": train[order], "mean picture": np.broadcast_to(train.mean(axis=0), test.shape)}
    return {
        f"{name} sliced_wasserstein": float(sliced_wasserstein(jnp.asarray(one, jnp.float32), jnp.asarray(test)))
        for name, one in samples.items()
    }
