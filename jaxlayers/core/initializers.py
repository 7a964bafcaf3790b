"""Initialisers that several papers share, under the names Flax uses."""

import jax.numpy as jnp
from flax.linen import initializers

from jaxlayers.core.types import Initializer

lecun_normal = initializers.lecun_normal
xavier_uniform = initializers.xavier_uniform
zeros = initializers.zeros_init
ones = initializers.ones_init


def truncated_normal(stddev: float = 0.02) -> Initializer:
    """Return a normal of standard deviation `stddev` cut at two standard deviations, as vision transformers use.

    The sample is *not* rescaled for the cut (so its standard deviation is 0.88 `stddev`), as in the reference
    implementations of ViT and Swin.
    """
    return initializers.truncated_normal(stddev=stddev, dtype=jnp.float32)
