"""Generate 64-pixel crops of photographs: a StyleSwin against a wavelet discriminator, both small.

Command:  python -m train configs/styleswin_crops.py
Expected: Frechet distance 386 of 1,991 untrained, after 1,500 steps, some minutes of processor time on one core of a
          CPU: colours and textures, no things. The power spectrum has no peak at the windows' period, but seams still
          show, 18 times as strong as in training pictures (35 times where tables and kernels begin as published); see
          docs/generation.md.

The pictures are crops at random places of the fourteen training photographs that scikit-image and scikit-learn ship.
"""

import flax.linen as nn
import jax
import numpy as np

from jaxlayers.core.initializers import truncated_normal, xavier_uniform
from jaxlayers.ops.windows import local_position_table
from jaxlayers.window.styleswin import StyleSwin
from jaxlayers.window.styleswin_discriminator import WaveletDiscriminator
from train.config import Config, Optim
from train.photographs import photographs
from train.tasks import adversarial

LATENT = 64
SIZE = 64


class Players(nn.Module):
    """A generator of pictures and a discriminator of them; outside pixels lie in [0, 1], inside in [-1, 1].

    With a `reach` the generator's tables of positions begin as Gaussian blurs of that many pixels, and its kernels by
    Xavier's rule: as published, narrow layers begin with the mean of each window, whose borders stay to be seen.
    """

    features: tuple[int, ...] = (32, 32, 32, 16, 16)
    num_heads: tuple[int, ...] = (4, 4, 4, 2, 2)
    depth: int = 1
    shift_size: int | None = None
    reach: float | None = None
    seen_features: tuple[int, ...] = (16, 32, 32, 32)
    stddev_group: int = 4
    remat: str | bool = False

    def setup(self) -> None:
        """Make the players."""
        self.generator = StyleSwin(
            self.features,
            self.num_heads,
            style_features=LATENT,
            mapping_depth=4,
            depth=self.depth,
            shift_size=self.shift_size,
            mlp_ratio=2.0,
            remat=self.remat,
            kernel_init=truncated_normal() if self.reach is None else xavier_uniform(),
            table_init=truncated_normal() if self.reach is None else local_position_table(self.reach),
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
    test = images("test", 64)
    return Config(
        title="Generated crops of photographs",
        model=Players(reach=1.5),
        task=adversarial(LATENT, r1_gamma=1.0, reference=test),
        train_data=photographs("train", SIZE, count=4000),
        test_data=photographs("test", SIZE, count=64, seed=1),
        steps=4 if smoke else 1500,
        batch_size=8,
        eval_batch_size=64,
        # No momentum; the discriminator learns at four times the generator's rate.
        optim=Optim(
            learning_rate=4e-4,
            schedule="linear",
            final_fraction=0.1,
            warmup_steps=2,
            weight_decay=0.0,
            clip_norm=None,
            b1=0.0,
            b2=0.99,
            rates=((r"^discriminator/", 4.0),),
        ),
        ema_decay=0.9 if smoke else 0.995,
        log_every=2 if smoke else 25,
        eval_every=2 if smoke else 250,
        keep_every=2 if smoke else 250,
        metric="sliced_wasserstein",
        mode="min",
    )


def images(split: str, count: int) -> np.ndarray:
    """Return crops of a split, `[count, 64, 64, 3]`."""
    source = photographs("train" if split == "train" else "test", SIZE, count=count, seed=1)
    return np.stack([source[index]["image"] for index in range(len(source))])
