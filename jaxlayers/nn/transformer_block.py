"""The block of a plain vision Transformer."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.nn.attention import MultiHeadAttention
from jaxlayers.nn.drop_path import DropPath
from jaxlayers.nn.feed_forward import FeedForward, add_feed_forward

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class TransformerBlock(nn.Module):
    """Mix all tokens by attention, then each token alone: the block of a plain vision Transformer.

    z = x + drop(MSA(norm(x))), out = z + drop(MLP(norm(z))), with MSA = softmax(Q K^T / sqrt(d)) V W_out for each head
    of width d.

    Symmetry:
      Without a mask exactly equivariant to permutations of the tokens.

    Attributes:
      num_heads: number of heads; must divide the features.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      use_bias: add biases to Q, K and V (all other layers have them).
      groups: logical axes of the groups of tokens, between batch and tokens, within which alone they mix, such as
        `(axes.WINDOWS,)`; names of `core.axes`.
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`.

    Cost:
      (4 + 2 mlp_ratio) n C^2 + 2 n^2 C multiply-accumulates for n tokens of width C.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.nn.transformer_block import TransformerBlock
      >>> block = TransformerBlock(num_heads=2)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 5, 8)))[0].shape
      (1, 5, 8)

    Source:
      Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, equations 2 and 3.

    Differs:
      Q, K and V come from three products instead of one cut in three.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    use_bias: bool = True
    groups: tuple[str, ...] = ()
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch tokens features"],
        mask: Bool[Array, "..."] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch tokens features"]:
        """Apply the block.

        Args:
          x: tokens.
          mask: true where a token may attend to another, see `MultiHeadAttention`; `None` = everywhere.
          deterministic: no dropped branches.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if there are no tokens, or a field does not fit the features.
        """
        if x.ndim < 2:
            raise ValueError(f"input must be [*batch, tokens, features]; got shape {x.shape}")
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=x.ndim - 2)
        y = norm(name="norm1")(x)
        y = MultiHeadAttention(self.num_heads, use_bias=self.use_bias, groups=self.groups, name="attention", **common)(
            y, mask=mask
        )
        x = axes.constrain_tokens(x + drop_path(y, deterministic=deterministic), *self.groups)
        feed_forward = functools.partial(FeedForward, int(x.shape[-1] * self.mlp_ratio), **common)
        names = (axes.BATCH, *self.groups, None if self.groups else axes.TOKENS)
        x = add_feed_forward(x, norm, feed_forward, drop_path, names=names, deterministic=deterministic)
        return axes.constrain_tokens(x, *self.groups)
