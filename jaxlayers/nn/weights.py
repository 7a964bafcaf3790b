"""Parameters of layers that a kernel computes together with others, named as the layers alone would have them."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
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


def plain_norm(norm: Callable[..., Any], x: Array) -> nn.LayerNorm | None:
    """Return the `flax.linen.LayerNorm` that a maker of norms makes, for a kernel that computes it.

    Args:
      norm: makes the norm.
      x: what is normed.

    Returns:
      The norm if it has scale and bias, norms the features of `x` in its dtype and does nothing else; else `None`.
    """
    if not isinstance(norm, functools.partial) or norm.func is not nn.LayerNorm:
        return None
    found: nn.LayerNorm = norm(parent=None)
    plain = nn.LayerNorm(
        epsilon=found.epsilon,
        dtype=found.dtype,
        param_dtype=found.param_dtype,
        scale_init=found.scale_init,
        bias_init=found.bias_init,
        parent=None,
    )
    dtype = nn.dtypes.canonicalize_dtype(x, jnp.zeros((), found.param_dtype), dtype=found.dtype)
    return found if found == plain and dtype == x.dtype else None


def norm_weights(features: int, norm: nn.LayerNorm, *, name: str) -> tuple[Array, Array]:
    """Return scale and bias `[features]` of a `plain_norm` of that name, in a compact method.

    Args:
      features: width of its input.
      norm: the norm; it has no name and no parent.
      name: of the layer.
    """
    parameters: dict[str, Any] = {"scale": (norm.scale_init, (features,)), "bias": (norm.bias_init, (features,))}
    found = _Layer(parameters, norm.param_dtype, name=name)()
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
