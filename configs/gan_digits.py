"""Generate handwritten digits: a generator against a discriminator, with the R1 penalty and two time scales.

Command:  python -m train configs/gan_digits.py
Expected: sliced Wasserstein distance 0.248 (training images 0.207, a normal distribution 0.292, the mean image 2.228);
          a minute and a quarter of processor time on two CPU cores.

The measure is the sliced Wasserstein distance between generated images and the 599 held-out ones, over fixed directions
and latents, of the averaged parameters. Beside it stand what the training images themselves reach (the distance of two
samples of the same source) and a normal distribution with the training images' mean and covariance.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from train.config import Config, Optim
from train.data import digits
from train.tasks import adversarial, sliced_wasserstein

LATENT = 16


class Perceptron(nn.Module):
    """Map vectors to vectors through hidden layers; the output is as the last layer gives it."""

    features: tuple[int, ...]
    out_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[batch, out_features]`."""
        for features in self.features:
            x = nn.leaky_relu(nn.Dense(features)(x), 0.2)
        return nn.Dense(self.out_features)(x)


class Players(nn.Module):
    """A generator of small images and a discriminator of them."""

    size: tuple[int, ...] = (8, 8, 1)
    features: tuple[int, ...] = (128, 128)

    def setup(self) -> None:
        """Make the players."""
        self.generator = Perceptron(self.features, int(np.prod(self.size)))
        self.discriminator = Perceptron(self.features, 1)

    def __call__(self, x: jax.Array, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the scores of real images and of those made from the latents."""
        return self.discriminate(x), self.discriminate(self.generate(latent))

    def generate(self, latent: jax.Array) -> jax.Array:
        """Return images with pixels in (0, 1)."""
        return nn.sigmoid(self.generator(latent)).reshape(-1, *self.size)

    def discriminate(self, x: jax.Array) -> jax.Array:
        """Return a score for each image; high = looks real."""
        return self.discriminator(2 * x.reshape(len(x), -1) - 1)


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in seconds that everything works."""
    return Config(
        title="Generated digits",
        model=Players(),
        task=adversarial(LATENT, r1_gamma=0.5, reference=images("test")),
        train_data=digits("train"),
        test_data=digits("test"),
        steps=100 if smoke else 10000,
        batch_size=128,
        eval_batch_size=200,
        # No momentum, as is usual for games; the discriminator learns at four times the generator's rate.
        optim=Optim(
            learning_rate=5e-4,
            schedule="linear",
            final_fraction=0.1,
            warmup_steps=10,
            weight_decay=0.0,
            clip_norm=None,
            b1=0.0,
            b2=0.99,
            rates=((r"^discriminator/", 4.0),),
        ),
        ema_decay=0.999,
        log_every=20 if smoke else 100,
        eval_every=50 if smoke else 1000,
        metric="sliced_wasserstein",
        mode="min",
        baselines=baselines,
    )


def images(split: str) -> np.ndarray:
    """Return all images of a split, `[images, 8, 8, 1]`."""
    source = digits("train" if split == "train" else "test")
    return np.stack([source[index]["image"] for index in range(len(source))])


def baselines() -> Mapping[str, float]:
    """Return the distance of other samples to the held-out images, measured in the same way."""
    train, test = images("train"), images("test")
    rows = train.reshape(len(train), -1)
    rng = np.random.RandomState(0)
    normal = rng.multivariate_normal(rows.mean(axis=0), np.cov(rows.T), size=len(test)).reshape(test.shape)
    samples = {
        "training images": train[rng.permutation(len(train))[: len(test)]],
        "normal distribution": normal,
        "mean image": np.broadcast_to(train.mean(axis=0), test.shape),
    }
    return {
        f"{name} sliced_wasserstein": float(sliced_wasserstein(jnp.asarray(one, jnp.float32), jnp.asarray(test)))
        for name, one in samples.items()
    }
