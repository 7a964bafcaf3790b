"""Multi-head attention, of tokens to themselves or to others."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, remat
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads


class MultiHeadAttention(nn.Module):
    """Let tokens attend to themselves or to others, in several heads.

    out = softmax(Q K^T / sqrt(d)) V W_out for each head of width d, with Q linear in x `[*batch, tokens, features]`,
    K and V linear in the context `[*batch, context_tokens, context_features]`.

    Symmetry:
      Without a mask exactly equivariant to permutations of the tokens, and invariant to those of a separate context.

    Attributes:
      num_heads: number of heads; must divide the features of x.
      use_bias: add biases to Q, K and V (the output always has one).
      groups: logical axes of the groups of tokens, between batch and tokens, within which alone they mix, such as
        `(axes.WINDOWS,)`; names of `core.axes`.
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The weights are sown as `attention_weights` in `intermediates`.

    Cost:
      2 n C^2 + 2 m D C + 2 n m C multiply-accumulates for n tokens of width C and a context of m tokens of width D.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.nn.attention import MultiHeadAttention
      >>> layer, inputs = MultiHeadAttention(num_heads=2), (jnp.ones((1, 5, 8)), jnp.ones((1, 9, 6)))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), *inputs)[0].shape
      (1, 5, 8)

    Source:
      Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2.2.

    Differs:
      A token that may attend to nothing gets zeros before W_out.
    """

    num_heads: int
    use_bias: bool = True
    groups: tuple[str, ...] = ()
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch tokens features"],
        context: Float[Array, "*batch context_tokens context_features"] | None = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "*batch tokens features"]:
        """Attend.

        Args:
          x: tokens that ask.
          context: tokens that answer, of the same batch; `None` = x.
          mask: true where a token of x may attend to one of the context; broadcasts against
            `[*batch, heads, tokens, context_tokens]`.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if the heads do not divide the features, or x and context are not tokens of one batch.
        """
        context = x if context is None else context
        if x.ndim < 2 or x.shape[:-2] != context.shape[:-2]:
            raise ValueError(
                f"input must be [*batch, tokens, features], context of the same batch; got {x.shape}, {context.shape}"
            )
        features = x.shape[-1]
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        dense = functools.partial(
            nn.Dense,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )

        def constrain(heads: Array) -> Array:
            return axes.constrain_heads(heads, *self.groups)

        query, key, value = (
            constrain(split_heads(dense(use_bias=self.use_bias, name=name)(tokens), self.num_heads))
            for name, tokens in (("query", x), ("key", context), ("value", context))
        )

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            scale = (features // self.num_heads) ** -0.5
            weights = attention_weights(jnp.matmul(query * scale, jnp.swapaxes(key, -1, -2)), mask=mask)
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights, value)

        return dense(name="out")(merge_heads(constrain(remat.attention(attend, self, query, key, value))))
