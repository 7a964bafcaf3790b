"""A projection and the norm of what it gives, as Pallas kernels for TPU: the tokens of an image's patches.

XLA passes over all tokens twice forwards (the statistics, then what is normed) and three times backwards, each time
with all of the norm's gradient made anew. Here each token is read once and written once. The mean of what is projected
is taken out of the weights beforehand, the gradient computes the product again, and the sums for the parameters stay in
fast memory while the grid runs over the tokens. The gradient of the tokens is made only where one is asked for: images
have none.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.kernels.dispatch import MOST_PROJECTION
from jaxlayers.kernels.pallas_feed_forward import _TILE, _dot, _mean, _Split, _summed, _total, _unit, _wide

# Entries of a block of tokens and of what they are projected to, in rows of whole tiles of 128; and rows of what is
# written down together.
_MOST_ENTRIES = 2048 * 256
_CHUNK = 256


def project_and_norm(
    x: Float[Array, "*tokens in"],
    kernel: Float[Array, "in out"],
    bias: Float[Array, "out"] | None,
    scale: Float[Array, "out"],
    offset: Float[Array, "out"],
    *,
    epsilon: float = 1e-6,
    names: tuple[str | None, ...] = (axes.BATCH, axes.TOKENS),
) -> Float[Array, "*tokens out"]:
    """Return norm(x W + b) of every token.

    norm(y) = s (y - mean) / sqrt(variance + epsilon) + o over the features. Differentiable once, in reverse mode; sums
    and the norm are in float32. On CPU the kernels are interpreted, which is slow and meant for tests. With a mesh in
    scope each device runs them on the tokens that the logical rules give it.

    Args:
      x: tokens, float32 or bfloat16, a multiple of 8 along their last axis.
      kernel: W.
      bias: b; `None` = 0.
      scale: s.
      offset: o.
      epsilon: added to the variance.
      names: logical axes of the tokens, batch included, counted from the right.

    Returns:
      Tokens in the dtype of `x`.

    Raises:
      ValueError: if the kernels do not serve that dtype, that number of tokens or so many weights.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype={x.dtype} of the tokens must be float32 or bfloat16; pass such")
    if x.ndim < 2 or x.shape[-2] % _TILE:
        raise ValueError(f"tokens of shape {x.shape} must be [*tokens, features], a multiple of {_TILE}; pass such")
    if kernel.size > MOST_PROJECTION:
        raise ValueError(
            f"kernel of shape {kernel.shape} must have at most {MOST_PROJECTION} weights; use the jnp kernel"
        )
    row = jnp.zeros(kernel.shape[1:], jnp.float32) if bias is None else bias
    kernel, row = (_wide(each) - jnp.mean(_wide(each), axis=-1, keepdims=True) for each in (kernel, row))
    return _project(names, epsilon, x, kernel, row[None], jnp.stack([_wide(scale), _wide(offset)]))


# Forward and backward, on all devices ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(names: tuple[str | None, ...], epsilon: float, *operands: Any) -> Any:
    x, *weights = operands
    split = _Split.of(names, x.shape)
    everywhere = (PartitionSpec(),) * len(weights)
    return split.on_devices(functools.partial(_forward, epsilon), (split.tokens, *everywhere), split.tokens)(*operands)


def _keep(names: tuple[str | None, ...], epsilon: float, *operands: Any) -> tuple[Any, Any]:
    values = tuple(each.value for each in operands)
    return _project(names, epsilon, *values), (values, operands[0].perturbed)


def _return(names: tuple[str | None, ...], epsilon: float, kept: Any, gradient: Any) -> tuple[Any, ...]:
    (x, *weights), of_tokens = kept
    if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
        return tuple(jnp.zeros_like(each) for each in (x, *weights))
    split = _Split.of(names, x.shape)

    def local(*operands: Any) -> tuple[Any, ...]:
        found = _backward(epsilon, of_tokens, *operands)
        shared = found[len(found) - len(weights) :]
        # Each device has those of the weights from its own tokens.
        over = tuple(name for each in split.leading for name in each)
        return *found[: len(found) - len(weights)], *(jax.lax.psum(shared, over) if over else shared)

    everywhere = (PartitionSpec(),) * len(weights)
    results = (split.tokens,) * of_tokens + everywhere
    found = split.on_devices(local, (split.tokens, *everywhere, split.tokens), results)(
        x, *weights, gradient.astype(x.dtype)
    )
    return found if of_tokens else (jnp.zeros_like(x), *found)


_project.defvjp(_keep, _return, symbolic_zeros=True)


# On one device --------------------------------------------------------------------------------------------------------


def _rows(count: int, *features: int) -> int:
    """Return the rows of a block: whole tiles that divide all, fewer where tokens have many features."""
    most = max(_TILE, _MOST_ENTRIES // sum(-(-each // 128) * 128 for each in features))
    return max(size for size in range(_TILE, min(most, count) + 1, _TILE) if count % size == 0)


def _chunks(ref: Any) -> list[Any]:
    """Return the rows of a block, some at a time."""
    return [ref[first : first + _CHUNK] for first in range(0, ref.shape[0], _CHUNK)]


def _call(
    kernel: Any,
    name: str,
    tokens: Sequence[Any],
    weights: Sequence[Any],
    results: Sequence[tuple[int, Any]],
    gradients: Sequence[Any],
    *,
    products: int,
) -> Any:
    """Run a kernel over all blocks.

    Args:
      kernel: takes references to tokens, weights, results and gradients.
      name: of the kernel.
      tokens: arrays `[tokens, features]`.
      weights: what every block reads; the first is W.
      results: features and dtype of arrays like the tokens.
      gradients: arrays like those which all blocks add to, in float32.
      products: products with W, for the estimate of costs.
    """
    count = len(tokens[0])
    rows = _rows(count, *weights[0].shape)
    operands = (*tokens, *weights)
    out = [jax.ShapeDtypeStruct((count, features), dtype) for features, dtype in results]
    out += [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in gradients]

    def of_tokens(features: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, features), lambda block: (block, 0))

    def of_all(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda block: (0, 0))

    run = functools.partial(
        pl.pallas_call,
        kernel,
        out_shape=out,
        grid=(count // rows,),
        in_specs=[of_tokens(x.shape[1]) for x in tokens] + [of_all(x) for x in weights],
        out_specs=[of_tokens(features) for features, _ in results] + [of_all(x) for x in gradients],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=32 * 2**20),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * count * math.prod(weights[0].shape),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out)),
            transcendentals=count,
        ),
        name=name,
    )
    # Which of the two is lowered is known only then: code for a TPU may be compiled where there is none.
    return jax.lax.platform_dependent(*operands, cpu=run(interpret=True), tpu=run())


def _forward(epsilon: float, x: Any, kernel: Any, bias: Any, affine: Any) -> Any:
    def run(x: Any, kernel: Any, bias: Any, affine: Any, out: Any) -> None:
        projected = [_dot(rows, kernel[...], 1, 0) + bias[...] for rows in _chunks(x)]
        normed = [_unit(rows, epsilon)[0] for rows in projected]
        for index, rows in enumerate(normed):
            out[index * _CHUNK : index * _CHUNK + len(rows)] = (rows * affine[:1] + affine[1:]).astype(out.dtype)

    features = kernel.shape[1]
    weights = (kernel.astype(x.dtype), bias, affine)
    flat = x.reshape(-1, x.shape[-1])
    (out,) = _call(run, "project_and_norm", (flat,), weights, [(features, x.dtype)], (), products=1)
    return out.reshape(*x.shape[:-1], features)


def _backward(
    epsilon: float, of_tokens: bool, x: Any, kernel: Any, bias: Any, affine: Any, gradient: Any
) -> tuple[Any, ...]:
    """Return the gradients of the tokens, where they are asked for, and of the weights."""
    dtype = x.dtype

    def run(x: Any, gradient: Any, kernel: Any, bias: Any, affine: Any, *results: Any) -> None:
        *by_tokens, by_kernel, by_bias, by_affine = results

        @pl.when(pl.program_id(0) == 0)
        def start() -> None:
            for ref in (by_kernel, by_bias, by_affine):
                ref[...] = jnp.zeros_like(ref)

        tokens = _chunks(x)
        projected = [_dot(rows, kernel[...], 1, 0) + bias[...] for rows in tokens]
        normed, inverses = zip(*(_unit(rows, epsilon) for rows in projected), strict=True)
        received = [_wide(rows) for rows in _chunks(gradient)]
        by_scale = _total([by * rows for by, rows in zip(received, normed, strict=True)])
        by_affine[...] += jnp.concatenate([by_scale, _total(received)], axis=0)
        by_normed = [by * affine[:1] for by in received]
        by_projected = [
            inverse * (by - rows * _mean(by * rows))
            for by, rows, inverse in zip(by_normed, normed, inverses, strict=True)
        ]
        by_bias[...] += _total(by_projected)
        rounded = [rows.astype(dtype) for rows in by_projected]
        by_kernel[...] += _summed(_dot(one, other, 0, 0) for one, other in zip(tokens, rounded, strict=True))
        for ref in by_tokens:
            for index, rows in enumerate(rounded):
                ref[index * _CHUNK : index * _CHUNK + len(rows)] = _dot(rows, kernel[...], 1, 1).astype(dtype)

    weights = (kernel.astype(dtype), bias, affine)
    flat = tuple(each.reshape(-1, each.shape[-1]) for each in (x, gradient))
    results = [(x.shape[-1], dtype)] * of_tokens
    name, gradients = "project_and_norm_backward", (kernel, bias, affine)
    found = _call(run, name, flat, weights, results, gradients, products=2 + of_tokens)
    return (found[0].reshape(x.shape), *found[1:]) if of_tokens else tuple(found)
