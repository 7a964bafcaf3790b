"""The two-layer perceptron of transformer blocks."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer

exact_gelu = functools.partial(nn.gelu, approximate=False)


class FeedForward(nn.Module):
    """Apply the same two-layer perceptron to every token.

    out = act(x W_up + b_up) W_down + b_down, with x `[*batch, features]`, W_up `[features, hidden]`,
    W_down `[hidden, out]`.

    Symmetry:
      Exactly equivariant to permutations of the tokens: each is treated alone.

    Attributes:
      hidden_features: width of the hidden layer.
      out_features: width of the output; `None` keeps that of the input.
      activation_fn: the nonlinearity; exact (error function) GELU by default.
      dropout_rate: dropout after the activation and after the output, in [0, 1).
      use_bias: add b_up and b_down.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W_up and W_down.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      2 x features x hidden multiply-accumulates a token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.nn.feed_forward import FeedForward
      >>> layer = FeedForward(hidden_features=8, out_features=5)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 3, 4)))[0].shape
      (2, 3, 5)

    Source:
      Vaswani et al., Attention Is All You Need, NeurIPS 2017, equation 2; with GELU as in
      Dosovitskiy et al., ICLR 2021.

    Differs:
      none.
    """

    hidden_features: int
    out_features: int | None = None
    activation_fn: ActivationFn = exact_gelu
    dropout_rate: float = 0.0
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch out_features"]:
        """Apply the perceptron.

        Args:
          x: tokens.
          deterministic: no dropout.

        Returns:
          Tokens of width `out_features`.

        Raises:
          ValueError: if a width is not positive.
        """
        out_features = x.shape[-1] if self.out_features is None else self.out_features
        if self.hidden_features < 1 or out_features < 1:
            raise ValueError(
                f"hidden_features={self.hidden_features} and out_features={out_features} must be positive; set them"
            )
        dense = functools.partial(
            nn.Dense,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        x = axes.constrain(self.activation_fn(dense(self.hidden_features, name="up")(x)), axes.HIDDEN)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = dense(out_features, name="down")(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
