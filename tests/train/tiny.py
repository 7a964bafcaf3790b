"""Train an attention block on coloured noise, for the tests of the trainer.

Command:  python -m train tests/train/tiny.py --devices 8
Expected: accuracy above 0.9 after 24 steps, seconds on a CPU.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.core import axes
from train.config import Config, MeshShape, Optim
from train.data import Source, arrays
from train.tasks import classification


class Tiny(nn.Module):
    """Attend and mix over tokens, with the parameter names, dropout and statistics that the library's layers use."""

    features: int = 16
    num_heads: int = 2
    depths: tuple[int, ...] = (1,)
    num_classes: int = 4
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, tokens: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Return logits `[batch, num_classes]` of `tokens` `[batch, tokens, channels]`."""
        x = nn.Dense(self.features, name="embed")(tokens)
        for index in range(sum(self.depths)):
            x = axes.constrain(x, axes.BATCH, axes.TOKENS, axes.FEATURES)
            x = x + Block(self.num_heads, self.dropout_rate, name=f"block_{index}")(x, deterministic=deterministic)
        x = nn.BatchNorm(use_running_average=deterministic, momentum=0.9, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=-2))


class Block(nn.Module):
    """Apply attention, then a feed-forward network of four times the features."""

    num_heads: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Return an array of the shape of `x`."""
        features = x.shape[-1]
        y = nn.LayerNorm(name="attention_norm")(x)
        q, k, v = (
            nn.Dense(features, name=name)(y).reshape(*y.shape[:-1], self.num_heads, -1)
            for name in ("query", "key", "value")
        )
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5)
        y = nn.Dense(features, name="out")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        x = x + nn.Dropout(self.dropout_rate, deterministic=deterministic)(y)
        y = nn.gelu(nn.Dense(4 * features, name="up")(nn.LayerNorm(name="feed_forward_norm")(x)))
        y = nn.Dense(features, name="down")(axes.constrain(y, axes.BATCH, axes.TOKENS, axes.HIDDEN))
        return nn.Dropout(self.dropout_rate, deterministic=deterministic)(y)


def records(count: int, seed: int) -> Source:
    """Return `count` noisy copies of four patterns of six tokens."""
    patterns = np.random.default_rng(0).normal(size=(4, 6, 3))
    rng = np.random.default_rng(seed)
    label = rng.integers(4, size=count)
    tokens = patterns[label] + rng.normal(scale=0.7, size=(count, 6, 3))
    return arrays(tokens=tokens.astype(np.float32), label=label.astype(np.int32))


def config(smoke: bool = False) -> Config:
    """Return the run."""
    return Config(
        model=Tiny(),
        task=classification(4, inputs=("tokens",), label="label", label_smoothing=0.1),
        train_data=records(96, seed=1),
        test_data=records(37, seed=2),
        steps=4 if smoke else 24,
        batch_size=16,
        # A schedule that does not know the last step: runs of any length share one compiled program.
        optim=Optim(learning_rate=1e-2, warmup_steps=2, schedule="constant"),
        mesh=MeshShape(),
        log_every=1,
        eval_every=6,
        checkpoint_every=3,
        metric="accuracy",
        labels=("red", "green", "blue", "grey"),
    )
