"""Enlarge photographs by two with a small DRCT, which learns what bicubic enlargement leaves out.

Command:  python -m train configs/drct_super_resolution.py
Expected: 32.43 dB on the luma of three held-out photographs at x2 (bicubic 30.70) and 27.60 at x4 (bicubic 26.49),
          after 2,000 steps and five minutes of processor time each on one core of an AMD EPYC; see
          docs/super_resolution.md.

Low resolution is made by antialiased bicubic shrinking and rounding to 8 bits, as in the field. The reference has no
path around the network; here the network's output is added to the picture enlarged bicubically, so that minutes of
training go into detail instead of colour. `python -m tools.super_resolution_table` trains this, its rival without dense
connections and the factor of four, and measures whole pictures.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.nn.drop_path import DropPath
from jaxlayers.ops.image_quality import luma, ssim
from jaxlayers.ops.resample import cubic_matrix, resample
from jaxlayers.window.drct import DRCT, ResidualDenseGroup, torch_uniform
from jaxlayers.window.swin import SwinBlock
from train.config import Apply, Batch, Config, Evaluated, Optim, Task
from train.photographs import photographs

# Pixels of low resolution: the side of a crop, and what is shrunk with it on each side and then cut off, so that
# the shrinking never meets the edge of a crop.
CROP, MARGIN = 16, 4
COLOURS = 3
STEPS = 2000


class OverBicubic(nn.Module):
    """Add what a network finds to the picture enlarged bicubically.

    Attributes:
      network: enlarges pictures by a whole factor, its field `scale`.
    """

    network: DRCT

    def __call__(self, low: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Return the enlarged pictures, not clipped."""
        return enlarged(low, self.network.scale) + self.network(low, deterministic=deterministic)


class PlainGroup(nn.Module):
    """Add to a map what a chain of Swin blocks and a convolution find: SwinIR's group, without dense connections.

    Attributes:
      num_heads: number of heads.
      window_size: the window.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      drop_path_rate: probability of dropping a residual branch for a sample.
      depth: number of blocks; every second is shifted.
      remat: unused; a small network needs none.
      norm: makes a norm.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
    """

    num_heads: int
    window_size: int
    mlp_ratio: float
    drop_path_rate: float
    depth: int = 5
    remat: str | bool = False
    norm: Callable[..., Any] = nn.LayerNorm
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Return a map like `x`."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = x
        for index in range(self.depth):
            y = SwinBlock(
                self.num_heads,
                self.window_size,
                shift_size=self.window_size // 2 * (index % 2),
                mlp_ratio=self.mlp_ratio,
                norm=self.norm,
                kernel_init=self.kernel_init,
                name=f"blocks_{index}",
                **dtypes,
            )(y)
        y = nn.Conv(x.shape[-1], (3, 3), name="convolution", **dtypes)(y)
        return x + DropPath(self.drop_path_rate)(y, deterministic=deterministic)


def from_bicubic(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Return a convolution's kernel: zeros for the one that makes the picture, so that training starts at bicubic.

    Started at random, a network of width 24 was 0.00 dB above bicubic after 150 steps at x2, started so 0.56 dB.
    """
    return jnp.zeros(shape, dtype) if shape[-1] == COLOURS else torch_uniform(key, shape, dtype)


def network(scale: int, *, dense: bool = True) -> OverBicubic:
    """Return the small DRCT, or a network of as many parameters whose groups have no dense connections."""
    # The wider plain network makes up for the dense one's wider blocks.
    width, group = (18, functools.partial(ResidualDenseGroup, growth=6)) if dense else (27, PlainGroup)
    return OverBicubic(
        DRCT(
            scale=scale,
            embed_dim=width,
            num_groups=2,
            num_heads=3,
            window_size=4,
            drop_path_rate=0.0,
            upsampling_features=24,
            pixel_mean=None,
            group=group,
            conv_init=from_bicubic,
            kernel_init=nn.initializers.lecun_normal(),
        )
    )


def config(smoke: bool = False) -> Config:
    """Return the run; the small one shows in a minute that everything works."""
    return experiment(2, smoke=smoke)


def experiment(scale: int, *, dense: bool = True, steps: int = STEPS, smoke: bool = False) -> Config:
    """Return the run for a factor, with dense connections or without."""
    side = scale * (CROP + 2 * MARGIN)
    test = photographs("test", side, count=16 if smoke else 64)
    return Config(
        title=f"Super-resolution of photographs by {scale}",
        model=network(scale, dense=dense),
        task=super_resolution(scale),
        train_data=photographs("train", side, count=64 if smoke else 4000),
        test_data=test,
        train_transform=functools.partial(shrunk, scale=scale, turn=True),
        test_transform=functools.partial(shrunk, scale=scale, turn=False),
        steps=4 if smoke else steps,
        batch_size=8,
        eval_batch_size=16,
        optim=Optim(learning_rate=2e-3, warmup_steps=2 if smoke else 50, weight_decay=0.0),
        log_every=2 if smoke else 50,
        metric="psnr",
        baselines=None if smoke else functools.partial(baselines, test, scale),
    )


def super_resolution(scale: int) -> Task:
    """Return the task of mapping `low` to `high`: least absolute error; measured on luma, inside of a border."""

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        error = jnp.abs(apply(batch["low"]) - batch["high"])
        return jnp.mean(error, axis=(1, 2, 3)), {}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        return Evaluated(measured(apply(batch["low"]), batch["high"], scale))

    return Task(inputs=lambda batch: (batch["low"],), loss=loss, evaluate=evaluate, finish=finished)


def measured(found: Any, truth: Any, scale: int) -> dict[str, jax.Array]:
    """Return squared error and SSIM on luma, without a border of as many pixels as the scale, as papers report them."""
    found, truth = luma(rounded(found)), luma(jnp.asarray(truth))
    inside = (..., slice(scale, -scale), slice(scale, -scale), slice(None))
    error = jnp.mean(jnp.square(found - truth)[inside], axis=(-3, -2, -1))
    return {"mse": error, "ssim": ssim(found, truth, border=scale)}


def finished(means: Mapping[str, float]) -> Mapping[str, float]:
    """Return the PSNR of the mean error: small crops may be flat, and one without any error would make the mean."""
    return {"psnr": -10 * math.log10(max(means["mse"], 1e-12)), "ssim": means["ssim"]}


def rounded(image: Any) -> jax.Array:
    """Return a picture as a file of 8 bits would keep it, in [0, 1]."""
    return jnp.round(jnp.clip(jnp.asarray(image), 0, 1) * 255) / 255


def reduced(image: np.ndarray, scale: int) -> np.ndarray:
    """Return a picture shrunk bicubically, antialiased, and rounded to 8 bits."""
    rows, columns = (cubic_matrix(length, length // scale, antialias=True) for length in image.shape[:2])
    small = np.einsum("yh,hwc->ywc", rows, np.einsum("xw,hwc->hxc", columns, image.astype(np.float64), optimize=True))
    return (np.round(np.clip(small, 0, 1) * 255) / 255).astype(np.float32)


def enlarged(low: jax.Array, scale: int) -> jax.Array:
    """Return pictures enlarged bicubically."""
    return resample(low, [scale * length for length in low.shape[-3:-1]], antialias=True)


def shrunk(
    record: dict[str, np.ndarray], generator: np.random.Generator, *, scale: int, turn: bool
) -> dict[str, np.ndarray]:
    """Return the middle of a crop at both resolutions, under one of the eight symmetries of a square if asked."""
    high = record["image"]
    if turn:
        high = np.rot90(high, int(generator.integers(4)))
        high = high[:, ::-1] if generator.integers(2) else high
    low, inside = reduced(high, scale), slice(MARGIN, -MARGIN)
    wide = slice(scale * MARGIN, -scale * MARGIN)
    return {"low": np.ascontiguousarray(low[inside, inside]), "high": np.ascontiguousarray(high[wide, wide])}


def baselines(source: Any, scale: int) -> Mapping[str, float]:
    """Return what enlarging bicubically reaches on the same crops."""
    none = np.random.default_rng(0)
    records = [shrunk(source[index], none, scale=scale, turn=False) for index in range(len(source))]
    low, high = (jnp.stack([record[name] for record in records]) for name in ("low", "high"))
    found = jax.jit(functools.partial(measured, scale=scale))(enlarged(low, scale), high)
    means = {name: float(jnp.mean(values)) for name, values in found.items()}
    return {f"bicubic {name}": value for name, value in finished(means).items()}
