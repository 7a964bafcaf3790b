"""The two-layer perceptron of transformer blocks, alone and as the second half of one."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer
from jaxlayers.kernels import dispatch
from jaxlayers.nn.drop_path import DropPath
from jaxlayers.nn.weights import dense_weights, norm_weights, plain_norm

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


def add_feed_forward(
    x: Float[Array, "*tokens features"],
    norm: Callable[..., Any],
    feed_forward: Callable[..., FeedForward],
    drop_path: DropPath,
    drop_path_rate: Float[Array, ""] | None = None,
    *,
    norm_first: bool = True,
    names: tuple[str | None, ...],
    deterministic: bool = True,
) -> Float[Array, "*tokens features"]:
    """Return x + drop(MLP(norm(x))), the second half of a block, in whose compact method this is called.

    With `norm_first=False` it is x + drop(norm(MLP(x))).

    Its submodules there are `norm2` and `feed_forward`. One Pallas kernel computes all of it where the scope chooses so
    (`kernels.dispatch`): with a `flax.linen.LayerNorm`, an exact GELU and no dropout, in the dtype of `x`. Parameters
    and random draws are the same; the intermediates of the submodules are then not captured.

    Args:
      x: tokens, batch first.
      norm: makes the norm, called as `norm(name=...)`.
      feed_forward: makes the perceptron, called alike.
      drop_path: of the branch.
      drop_path_rate: replaces its field; may be traced.
      norm_first: see above.
      names: logical axes of the tokens, batch included, counted from the right.
      deterministic: no dropout, no dropped branches.

    Returns:
      Tokens like `x`.
    """
    affine = plain_norm(norm, x)
    if affine is not None and _serves(x, feed_forward, deterministic):
        # It takes over a second to import.
        from jaxlayers.kernels import pallas_feed_forward

        fields = feed_forward(parent=None)
        scale, offset = norm_weights(x.shape[-1], affine, name="norm2")
        weights: tuple[Any, Any, Any, Any] = _FeedForward(
            fields.hidden_features, fields.param_dtype, fields.kernel_init, fields.bias_init, name="feed_forward"
        )(x)
        factor = drop_path.factor(x.shape[: drop_path.batch_ndim], drop_path_rate, deterministic=deterministic)
        return pallas_feed_forward.residual_feed_forward(
            x, scale, offset, *weights, factor, epsilon=affine.epsilon, norm_first=norm_first, names=names
        )
    y = norm(name="norm2")(x) if norm_first else x
    y = feed_forward(name="feed_forward")(y, deterministic=deterministic)
    y = y if norm_first else norm(name="norm2")(y)
    return x + drop_path(y, drop_path_rate, deterministic=deterministic)


def _serves(x: Array, feed_forward: Callable[..., FeedForward], deterministic: bool) -> bool:
    """Return whether the scope chooses the kernel, and it computes the perceptron that is made."""
    fields = feed_forward(parent=None)
    return (
        nn.dtypes.canonicalize_dtype(x, jnp.zeros((), fields.param_dtype), dtype=fields.dtype) == x.dtype
        and fields.use_bias
        and fields.hidden_features > 0
        and fields.activation_fn is exact_gelu
        and fields.out_features in (None, x.shape[-1])
        and (deterministic or not fields.dropout_rate)
        and dispatch.feed_forward_kernel(x.shape[-2], x.shape[-1], fields.hidden_features, x.dtype) == "pallas"
    )


class _FeedForward(nn.Module):
    """Return the weights of a `FeedForward`: each projection and its bias."""

    hidden_features: int
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> tuple[Any, Any, Any, Any]:
        weights = functools.partial(
            dense_weights, param_dtype=self.param_dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        features = x.shape[-1]
        return *weights(features, self.hidden_features, name="up"), *weights(
            self.hidden_features, features, name="down"
        )
