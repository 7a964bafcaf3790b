"""Parameters of layers that a kernel computes together with others, named as the layers alone would have them."""

import flax.linen as nn
from jaxtyping import Array

from jaxlayers.core.types import Dtype, Initializer


def dense_weights(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    param_dtype: Dtype,
    kernel_init: Initializer,
    bias_init: Initializer = nn.initializers.zeros,
    name: str,
) -> tuple[Array, Array | None]:
    """Return kernel `[in, out]` and bias `[out]` of the `flax.linen.Dense` of that name, in a compact method.

    Args:
      in_features: width of its input.
      out_features: width of its output.
      use_bias: whether it has a bias; else `None` is returned for it.
      param_dtype: dtype of both.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      name: of the layer.
    """
    bias = {"bias": (bias_init, (out_features,))} if use_bias else {}
    found = _Layer({"kernel": (kernel_init, (in_features, out_features)), **bias}, param_dtype, name=name)()
    return found["kernel"], found.get("bias")


def norm_weights(
    features: int,
    *,
    param_dtype: Dtype,
    scale_init: Initializer = nn.initializers.ones,
    bias_init: Initializer = nn.initializers.zeros,
    name: str,
) -> tuple[Array, Array]:
    """Return scale and bias `[features]` of the `flax.linen.LayerNorm` of that name, in a compact method.

    Args:
      features: width of its input.
      param_dtype: dtype of both.
      scale_init: initialiser of the scale.
      bias_init: initialiser of the bias.
      name: of the layer.
    """
    found = _Layer({"scale": (scale_init, (features,)), "bias": (bias_init, (features,))}, param_dtype, name=name)()
    return found["scale"], found["bias"]


class _Layer(nn.Module):
    """Return parameters: the initialiser and shape of each by its name."""

    parameters: dict[str, tuple[Initializer, tuple[int, ...]]]
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        return {
            name: self.param(name, initializer, shape, self.param_dtype)
            for name, (initializer, shape) in self.parameters.items()
        }
