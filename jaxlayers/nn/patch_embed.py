"""Turning an image, a signal or a volume into a grid of tokens."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.kernels import dispatch
from jaxlayers.nn.weights import dense_weights, norm_weights, plain_norm
from jaxlayers.ops.patches import pad_to_multiple, split_shape, to_patches


class PatchEmbed(nn.Module):
    """Embed non-overlapping patches linearly: a convolution whose stride is its kernel.

    out[g] = norm(vec(x[patch g]) W + b), with x `[*batch, *space, channels]`, W `[pixels channels, features]` and the
    pixels of a patch in row-major order. Sizes that are not multiples of the patch are padded with zeros at their ends.

    Symmetry:
      Exactly equivariant to translations by whole patches, away from the border.

    Attributes:
      features: width of a token.
      patch_size: size of a patch along each spatial axis; its length says how many spatial axes there are.
      norm: makes the norm of the tokens, called as `norm(dtype=..., param_dtype=..., name=...)`; `None` leaves it out.
      use_bias: add b.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W.
      bias_init: initialiser of b.

    Cost:
      pixels x channels x features multiply-accumulates. Where `kernels.dispatch` says so one kernel computes the norm
      too, and intermediates are not captured.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.nn.patch_embed import PatchEmbed
      >>> layer = PatchEmbed(features=8, patch_size=(4, 4))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 10, 8, 3)))[0].shape
      (1, 3, 2, 8)

    Source:
      Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, equation 1; norm and padding as in Swin, ICCV 2021.

    Differs:
      The kernel is stored as a matrix, not as a convolution kernel, and the product is a matrix product.
    """

    features: int
    patch_size: tuple[int, ...]
    norm: Callable[..., Any] | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*axes channels"]) -> Float[Array, "*grid features"]:
        """Embed the patches.

        Args:
          x: channels-last input.

        Returns:
          One token a patch, channels last, spatial size `ceil(size / patch_size)`.

        Raises:
          ValueError: if the input has too few axes, is empty or not of floating point, or a field is not positive.
        """
        if self.features < 1 or any(length < 1 for length in self.patch_size):
            raise ValueError(f"features={self.features} and patch_size={self.patch_size} must be positive; set them")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        split_shape(x.shape, len(self.patch_size))
        x = to_patches(pad_to_multiple(x, self.patch_size), self.patch_size)
        init: dict[str, Any] = {
            "use_bias": self.use_bias,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
            "name": "projection",
        }
        if self.norm is None:
            return nn.Dense(self.features, dtype=self.dtype, **init)(x)
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        dtype = nn.dtypes.canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        affine = plain_norm(norm, x.astype(dtype))
        served = dispatch.project_kernel(x.shape[-2], x.shape[-1], self.features, dtype) == "pallas"
        if affine is None or not served:
            return norm(name="post_norm")(nn.Dense(self.features, dtype=self.dtype, **init)(x))
        # It takes over a second to import.
        from jaxlayers.kernels import pallas_project

        kernel, bias = dense_weights(x.shape[-1], self.features, **init)
        scale, offset = norm_weights(self.features, affine, name="post_norm")
        names = (axes.BATCH, *axes.SPACE[len(self.patch_size)]) if len(self.patch_size) in axes.SPACE else ()
        return pallas_project.project_and_norm(
            x.astype(dtype), kernel, bias, scale, offset, epsilon=affine.epsilon, names=names
        )
