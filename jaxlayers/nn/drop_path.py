"""Stochastic depth: dropping a whole residual branch, sample by sample."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def drop_path_rates(rate: float, depth: int) -> tuple[float, ...]:
    """Return the rates of `depth` consecutive blocks, growing linearly from 0 to `rate`.

    Raises:
      ValueError: if the rate is not in [0, 1) or the depth is negative.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path_rate={rate} must lie in [0, 1); set drop_path_rate")
    if depth < 0:
        raise ValueError(f"depth={depth} must not be negative; set depth")
    return tuple(float(one) for one in np.linspace(0.0, rate, depth))


class DropPath(nn.Module):
    """Drop the input of whole samples at random, and scale up the kept ones.

    out = x b / (1 - rate), with b in {0, 1} drawn once a sample with P(b = 1) = 1 - rate, so that E[out] = x.

    Symmetry:
      Equivariant to anything that acts within a sample: b is shared by all its positions and features.

    Attributes:
      rate: probability of dropping a sample, in [0, 1).
      batch_ndim: how many leading axes count samples; the others share one draw.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.nn.drop_path import DropPath
      >>> x = jnp.ones((4, 2))
      >>> y = DropPath(rate=0.5).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]

    Source:
      Huang et al., Deep Networks with Stochastic Depth, ECCV 2016; drawn by sample as in Larsson et al., FractalNet,
      ICLR 2017.

    Differs:
      Scales kept branches up while training instead of down at inference, which is the same in expectation.
    """

    rate: float = 0.0
    batch_ndim: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*axes"],
        rate: Float[Array, ""] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*axes"]:
        """Apply the layer.

        Args:
          x: output of a residual branch.
          rate: replaces the field; may be traced, which lets one scanned block run at many rates.
          deterministic: return `x` as it is.

        Returns:
          An array like `x`.

        Raises:
          ValueError: if the field `rate` is not in [0, 1) or there are fewer axes than `batch_ndim`.
        """
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"rate={self.rate} must lie in [0, 1); set rate")
        if not 0 <= self.batch_ndim <= x.ndim:
            raise ValueError(
                f"batch_ndim={self.batch_ndim} must lie in [0, {x.ndim}] for shape {x.shape}; set batch_ndim"
            )
        if deterministic or (rate is None and self.rate == 0.0):
            return x
        kept, keep = _draw(self.make_rng("dropout"), self.rate if rate is None else rate, x.shape[: self.batch_ndim])
        kept = kept.reshape(kept.shape + (1,) * (x.ndim - self.batch_ndim))
        return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))

    def factor(
        self, batch: tuple[int, ...], rate: Float[Array, ""] | None = None, *, deterministic: bool = True
    ) -> Float[Array, "*batch"] | None:
        """Return b / (1 - rate) of each sample, which a call in its place would draw; `None` if it drops nothing.

        Args:
          batch: shape of the samples.
          rate: as of a call.
          deterministic: as of a call.
        """
        if deterministic or (rate is None and self.rate == 0.0):
            return None
        kept, keep = _draw(self.make_rng("dropout"), self.rate if rate is None else rate, batch)
        return jnp.where(kept, 1 / keep, 0.0)


def _draw(key: Array, rate: Array | float, batch: tuple[int, ...]) -> tuple[Array, Array]:
    """Return which samples are kept, and with what probability; a method would enter a capture of intermediates."""
    keep = jnp.asarray(1.0 - rate, jnp.float32)
    return jax.random.bernoulli(key, keep, batch), keep
