"""The second half of a Transformer block as Pallas kernels for TPU: norm, perceptron and residual sum in one pass.

XLA reads and writes every token's hidden layer several times, forwards and backwards, and takes tens of operations for
each entry of an exact GELU. Here a block of tokens is read once; its norm and its hidden layer exist in fast memory
only, and the gradient computes them anew. The weights stay there over all blocks, and so do the sums of their
gradients. Each step is written down for some 200 rows at a time before the next one: fewer leave the matrix units
waiting, and the compiler keeps to the order of the program.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.kernels.dispatch import MOST_TOKENS, MOST_WEIGHTS

# Rows of a tile of fast memory.
_TILE = 8
# Of a block: rows, and entries of the hidden layer; and rows of what is written down together.
_MOST_ROWS = 512
_MOST_HIDDEN = 512 * 768
_CHUNK = 256

# p of 2 Phi(h) = 1 + tanh(h p(h^2)) with the least greatest error, 4e-5: a hundredth of what rounding to bfloat16 may
# change. From the square on at which the tangent is 1, p stays as it is, since it would fall.
_CUBIC = (0.7977178, 0.036798268, -0.00031580944)
_SATURATED = 40.0


def residual_feed_forward(
    x: Float[Array, "*tokens features"],
    scale: Float[Array, "features"],
    offset: Float[Array, "features"],
    up: Float[Array, "features hidden"],
    up_bias: Float[Array, "hidden"],
    down: Float[Array, "hidden features"],
    down_bias: Float[Array, "features"],
    factor: Float[Array, "*batch"] | None = None,
    *,
    epsilon: float = 1e-6,
    norm_first: bool = True,
    names: tuple[str | None, ...] = (axes.BATCH, axes.TOKENS),
) -> Float[Array, "*tokens features"]:
    """Return x + f (gelu(norm(x) W_up + b_up) W_down + b_down), or the norm at the end of the branch; GELU is exact.

    norm(x) = s (x - mean) / sqrt(variance + epsilon) + o over the features. Differentiable once, in reverse mode, with
    respect to all but f; the norm, the hidden layer and all sums are in float32. A first norm's s and o are multiplied
    into W_up and b_up, the mean of a last one is taken out of W_down and b_down, in float32, before these are rounded
    to the dtype of `x`. In bfloat16 the GELU is within 6e-5. On CPU the kernels are interpreted, which is slow and
    meant for tests. With a mesh in scope each device runs them on the tokens that the logical rules give it.

    Args:
      x: tokens, float32 or bfloat16.
      scale: s.
      offset: o.
      up: W_up.
      up_bias: b_up.
      down: W_down.
      down_bias: b_down.
      factor: f of each example, such as the factor of stochastic depth; its axes lead those of `x`; `None` = 1.
      epsilon: added to the variance.
      norm_first: norm what enters the perceptron; False norms what leaves it, x + f norm(gelu(x W_up + b_up) W_down +
        b_down).
      names: logical axes of the tokens, batch included, counted from the right.

    Returns:
      An array like `x`.

    Raises:
      ValueError: if the kernels do not serve that dtype or those sizes, or the factor is not one for each example.
    """
    features, hidden = up.shape
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype={x.dtype} of the tokens must be float32 or bfloat16; pass such")
    if x.ndim < 2:
        raise ValueError(f"tokens of shape {x.shape} must be [*tokens, features]; pass such")
    if features * hidden > MOST_WEIGHTS or (x.shape[-2] > MOST_TOKENS and x.shape[-2] % _TILE):
        raise ValueError(
            f"{features} x {hidden} weights must be at most {MOST_WEIGHTS}, and tokens={x.shape[-2]} at most "
            f"{MOST_TOKENS} or a multiple of {_TILE}; use the jnp kernel"
        )
    if factor is not None and (factor.ndim >= x.ndim or factor.shape != x.shape[: factor.ndim]):
        raise ValueError(
            f"factor of shape {factor.shape} must have the leading axes of the tokens {x.shape}; pass such"
        )
    scale, offset, up, up_bias, down, down_bias = (
        each.astype(jnp.float32) for each in (scale, offset, up, up_bias, down, down_bias)
    )
    if norm_first:
        shift = jnp.sum(offset[:, None] * up, axis=0)
        return _add(names, epsilon, x, factor, scale[:, None] * up, up_bias + shift, down, down_bias)
    down, down_bias = (each - jnp.mean(each, axis=-1, keepdims=True) for each in (down, down_bias))
    # Twice, as a kernel multiplies by half the factor.
    return _add(names, epsilon, x, factor, up, up_bias, down, down_bias, 2 * jnp.stack([scale, offset]))


# Forward and backward, on all devices ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _add(names: tuple[str | None, ...], epsilon: float, *operands: Any) -> Any:
    return _keep(names, epsilon, *operands)[0]


def _keep(names: tuple[str | None, ...], epsilon: float, *operands: Any) -> tuple[Any, Any]:
    split = _Split.of(names, operands[0].shape)
    forward = functools.partial(_forward, epsilon)
    return split.on_devices(forward, split.operands(*operands), split.tokens)(*operands), operands


def _return(names: tuple[str | None, ...], epsilon: float, kept: Any, gradient: Any) -> tuple[Any, ...]:
    x, factor, *_ = kept
    split = _Split.of(names, x.shape)

    def local(*operands: Any) -> tuple[Any, ...]:
        of_x, *others = _backward(epsilon, *operands)
        # Each device has those of the weights from its own tokens.
        over = tuple(name for each in split.leading for name in each)
        return of_x, *(jax.lax.psum(others, over) if over else others)

    specs = split.operands(*kept)
    of_x, *others = split.on_devices(local, (*specs, split.tokens), (specs[0], *specs[2:]))(
        *kept, gradient.astype(x.dtype)
    )
    return of_x, None if factor is None else jnp.zeros_like(factor), *others


_add.defvjp(_keep, _return)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How tokens are split over the mesh in scope.

    Attributes:
      leading: the mesh axes of each axis of the tokens, batch included.
      names: all that are in scope.
    """

    leading: tuple[tuple[str, ...], ...]
    names: frozenset[str]

    @classmethod
    def of(cls, names: tuple[str | None, ...], shape: Sequence[int]) -> "_Split":
        """Return what the logical rules say of an array of that shape, features last."""
        mesh = jax.sharding.get_abstract_mesh()
        free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
        known = names[-(len(shape) - 1) :]
        found = axes.split(shape[:-1], *known)
        found = tuple(tuple(name for name in each if name in free) for each in found)
        return cls(((),) * (len(shape) - 1 - len(known)) + found, free)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(*(each or None for each in self.leading))

    def operands(self, x: Any, factor: Any, *weights: Any) -> tuple[Any, ...]:
        """Those of tokens, factor, and weights, which every device has whole."""
        of_factor = None if factor is None else PartitionSpec(*self.tokens[: factor.ndim])
        return self.tokens, of_factor, *(PartitionSpec(),) * len(weights)

    def on_devices(self, local: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any) -> Callable[..., Any]:
        """Return `local` run by each device on its part of the operands."""
        if not self.names:
            return local
        # The results of a kernel bear no types that say over which axes they vary.
        return jax.shard_map(
            local, in_specs=tuple(in_specs), out_specs=out_specs, axis_names=set(self.names), check_vma=False
        )


# On one device --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How tokens lie in blocks: as slabs of one example each, a number of them in a block.

    A slab is what XLA keeps in whole tiles: a row of a map, padded up to them, or, where no padding lies between rows,
    as many tokens as fit a block.

    Attributes:
      slabs: number of slabs.
      tokens: tokens of a slab.
      features: features of a token.
      hidden: width of the hidden layer.
      slab_block: slabs of a block.
      examples: number of factors.
    """

    slabs: int
    tokens: int
    features: int
    hidden: int
    slab_block: int
    examples: int

    @classmethod
    def of(cls, x: Any, factor: Any, hidden: int) -> "_Layout":
        """Return the layout for tokens `[*tokens, features]` and factors of their leading axes."""
        *leading, tokens, features = x.shape
        count = math.prod(leading) * tokens
        examples = 1 if factor is None else factor.size
        most = min(_MOST_ROWS, max(_TILE, _MOST_HIDDEN // hidden))
        if tokens % _TILE == 0:
            rows = count // examples
            tokens = max(size for size in range(_TILE, max(_TILE, most) + 1, _TILE) if rows % size == 0)
        slabs = count // tokens
        fit = max(1, min(slabs, most // _filled(tokens)))
        # Should only few divide, the last block has fewer slabs.
        slab_block = next((size for size in range(fit, fit // 2, -1) if slabs % size == 0), fit)
        return cls(slabs, tokens, features, hidden, slab_block, examples)

    @property
    def blocks(self) -> int:
        return -(-self.slabs // self.slab_block)

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.slab_block * _filled(self.tokens)

    def places(self) -> list[Any]:
        """Return the number of each slab of a block, within a kernel."""
        return [pl.program_id(0) * self.slab_block + index for index in range(self.slab_block)]

    def factors(self, factor: Any) -> list[Any]:
        """Return half the factor of each slab of a block, within a kernel."""
        each, last = self.slabs // self.examples, self.examples - 1
        return [0.5 * factor[jnp.minimum(jax.lax.div(place, each), last)] for place in self.places()]

    def read(self, ref: Any, factors: Sequence[Any] | None = None) -> list[Any]:
        """Return the rows of a block, times the factors of their slabs, in float32 and in chunks; all filled with 0."""
        slabs = [_wide(ref[index]) for index in range(self.slab_block)]
        if self.slabs % self.slab_block:
            # What follows the last slab may be anything.
            slabs = [jnp.where(place < self.slabs, x, 0.0) for place, x in zip(self.places(), slabs, strict=True)]
        if factors is not None:
            slabs = [x * factor for x, factor in zip(slabs, factors, strict=True)]
        missing = _filled(self.tokens) - self.tokens
        fill = [jnp.zeros((missing, self.features), jnp.float32)] if missing else []
        rows = jnp.concatenate([part for x in slabs for part in (x, *fill)], axis=0)
        size = _filled(-(-self.rows // -(-self.rows // _CHUNK)))
        return [rows[first : first + size] for first in range(0, self.rows, size)]

    def slabs_of(self, chunks: Sequence[Any]) -> list[Any]:
        """Return the inverse of `read`."""
        rows, step = jnp.concatenate(chunks, axis=0), _filled(self.tokens)
        return [rows[index * step : index * step + self.tokens] for index in range(self.slab_block)]

    def call(
        self,
        kernel: Callable[..., None],
        name: str,
        tokens: Sequence[Any],
        factor: Any,
        weights: Sequence[Any],
        *,
        gradients: bool,
        products: int,
    ) -> Any:
        """Run a kernel over all blocks.

        Args:
          kernel: takes references to the factors, tokens and weights, to results like the first tokens and the weights,
            and to an array like the first weights that all blocks share.
          name: of the kernel.
          tokens: arrays like `x`.
          factor: one for each example, or `None`.
          weights: both projections, each with its bias, and scale and offset of a last norm if there is one.
          gradients: results like the weights, in float32, follow, which all blocks add to, and the shared array.
          products: products with either projection, for the estimate of costs.
        """
        factor = jnp.ones(1, jnp.float32) if factor is None else factor.astype(jnp.float32).reshape(-1)
        up, up_bias, down, down_bias, *affine = weights
        dtype, shape = tokens[0].dtype, tokens[0].shape
        weights = (up.astype(dtype), up_bias[None], down.astype(dtype), down_bias[None], *affine)
        operands = (factor, *(x.reshape(self.slabs, self.tokens, self.features) for x in tokens), *weights)
        of_tokens = pl.BlockSpec((self.slab_block, self.tokens, self.features), lambda block: (block, 0, 0))
        of_weights = [pl.BlockSpec(x.shape, lambda block: (0, 0)) for x in weights]
        out = [jax.ShapeDtypeStruct(operands[1].shape, dtype)]
        out += [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in weights] if gradients else []
        count = self.features * self.hidden
        run = functools.partial(
            pl.pallas_call,
            kernel,
            out_shape=out,
            grid=(self.blocks,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] + [of_tokens] * len(tokens) + of_weights,
            out_specs=[of_tokens] + (of_weights if gradients else []),
            scratch_shapes=[pltpu.VMEM(up.shape, jnp.float32)] if gradients else [],
            # Two copies each of weights and gradients, and the hidden layer's values and gradients.
            compiler_params=pltpu.CompilerParams(
                vmem_limit_bytes=max(16 * 2**20, 32 * count + 64 * self.rows * self.hidden)
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * self.slabs * self.tokens * count,
                bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out)),
                transcendentals=self.slabs * self.tokens * self.hidden,
            ),
            name=name,
        )
        # Which of the two is lowered is known only then: code for a TPU may be compiled where there is none.
        first, *others = jax.lax.platform_dependent(*operands, cpu=run(interpret=True), tpu=run())
        return first.reshape(shape), *others


def _forward(epsilon: float, x: Any, factor: Any, *weights: Any) -> Any:
    layout = _Layout.of(x, factor, weights[0].shape[1])
    dtype = x.dtype

    def kernel(factor: Any, x: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, *refs: Any) -> None:
        *affine, out = refs
        entering = layout.read(x) if affine else [_norm(rows, epsilon)[0] for rows in layout.read(x)]
        hidden = [_dot(rows.astype(dtype), up[...], 1, 0) + up_bias[...] for rows in entering]
        active = [(rows * _twice(rows, dtype)[0]).astype(dtype) for rows in hidden]
        doubled = [_dot(rows, down[...], 1, 0) + 2 * down_bias[...] for rows in active]
        if affine:
            scale, offset = affine[0][:1], affine[0][1:]
            doubled = [_unit(rows, 4 * epsilon)[0] * scale + offset for rows in doubled]
        found = layout.slabs_of(doubled)
        for index, (half, rows) in enumerate(zip(layout.factors(factor), found, strict=True)):
            out[index] = (_wide(x[index]) + half * rows).astype(dtype)

    return layout.call(kernel, "residual_feed_forward", (x,), factor, weights, gradients=False, products=2)[0]


def _backward(epsilon: float, x: Any, factor: Any, *weights_and_gradient: Any) -> tuple[Any, ...]:
    """Return the gradients of tokens, both projections and their biases, and a last norm's scale and offset."""
    *weights, gradient = weights_and_gradient
    layout = _Layout.of(x, factor, weights[0].shape[1])
    dtype, norms_last = x.dtype, len(weights) > 4

    def kernel(
        factor: Any, x: Any, gradient: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, *results: Any
    ) -> None:
        affine, results = results[:norms_last], results[norms_last:]
        by_x, by_up, by_up_bias, by_down, by_down_bias, *by_affine, by_down_turned = results

        @pl.when(pl.program_id(0) == 0)
        def start() -> None:
            for ref in (by_up, by_up_bias, by_down_turned, by_down_bias, *by_affine):
                ref[...] = jnp.zeros_like(ref)

        def activated() -> tuple[Any, Any, Any]:
            values, slopes = zip(*(_twice(rows, dtype) for rows in hidden), strict=True)
            return values, slopes, [(rows * value).astype(dtype) for rows, value in zip(hidden, values, strict=True)]

        entering: Sequence[Any] = layout.read(x)
        if not norms_last:
            entering, deviations = zip(*(_norm(rows, epsilon) for rows in entering), strict=True)
        rounded = [rows.astype(dtype) for rows in entering]
        # Of twice what the perceptron gives.
        halves = layout.read(gradient, layout.factors(factor))
        hidden = [_dot(rows, up[...], 1, 0) + up_bias[...] for rows in rounded]
        if norms_last:
            values, slopes, active = activated()
            doubled = [_dot(rows, down[...], 1, 0) + 2 * down_bias[...] for rows in active]
            normed, inverses = zip(*(_unit(rows, 4 * epsilon) for rows in doubled), strict=True)
            by_scale = _total([by * rows for by, rows in zip(halves, normed, strict=True)])
            by_affine[0][...] += jnp.concatenate([by_scale, _total(halves)], axis=0)
            by_normed = [by * affine[0][:1] for by in halves]
            halves = [
                inverse * (by - rows * _mean(by * rows))
                for by, rows, inverse in zip(by_normed, normed, inverses, strict=True)
            ]
        by_down_bias[...] += 2 * _total(halves)
        halves = [rows.astype(dtype) for rows in halves]
        by_active = [_dot(rows, down[...], 1, 1) for rows in halves]
        if not norms_last:
            values, slopes, active = activated()
        by_hidden = [
            by * (value + rows * slope)
            for by, rows, value, slope in zip(by_active, hidden, values, slopes, strict=True)
        ]
        by_up_bias[...] += _total(by_hidden)
        by_hidden = [rows.astype(dtype) for rows in by_hidden]
        found = [_dot(rows, up[...], 1, 1) for rows in by_hidden]
        # The narrow one of the two is turned, and the sum once at the end.
        by_up[...] += _summed(_dot(one, other, 0, 0) for one, other in zip(rounded, by_hidden, strict=True))
        by_down_turned[...] += _summed(_dot(one, other, 0, 0) for one, other in zip(halves, active, strict=True))
        if not norms_last:
            found = [
                deviation * (by - _mean(by) - rows * _mean(by * rows))
                for by, rows, deviation in zip(found, entering, deviations, strict=True)
            ]
        for index, rows in enumerate(layout.slabs_of(found)):
            by_x[index] = (_wide(gradient[index]) + rows).astype(dtype)

        @pl.when(pl.program_id(0) == layout.blocks - 1)
        def end() -> None:
            by_down[...] = by_down_turned[...].T

    name = "residual_feed_forward_backward"
    products = 6 if norms_last else 5
    of_x, of_up, of_up_bias, of_down, of_down_bias, *of_affine = layout.call(
        kernel, name, (x, gradient), factor, weights, gradients=True, products=products
    )
    return of_x, of_up, of_up_bias[0], of_down, of_down_bias[0], *of_affine


# In a kernel ----------------------------------------------------------------------------------------------------------


def _dot(x: Any, y: Any, axis: int, other: int) -> Any:
    """Return the product over these axes, summed in float32."""
    return jax.lax.dot_general(x, y, (((axis,), (other,)), ((), ())), preferred_element_type=jnp.float32)


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32)


def _filled(rows: int) -> int:
    """Return that many rows with those that fill up a tile."""
    return -(-rows // _TILE) * _TILE


def _summed(parts: Any) -> Any:
    return functools.reduce(jnp.add, parts)


def _total(chunks: Sequence[Any]) -> Any:
    """Return the sum of all rows."""
    return _summed(jnp.sum(rows, axis=0, keepdims=True) for rows in chunks)


def _mean(x: Any) -> Any:
    return jnp.sum(x, axis=-1, keepdims=True) * (1 / x.shape[-1])


def _norm(x: Any, epsilon: float) -> tuple[Any, Any]:
    """Return the rows with mean 0 and variance 1, and what they were multiplied by."""
    centred = x - _mean(x)
    inverse = jax.lax.rsqrt(_mean(centred * centred) + epsilon)
    return centred * inverse, inverse


def _unit(x: Any, epsilon: float) -> tuple[Any, Any]:
    """Return the rows, whose mean is 0, with variance 1, and what they were multiplied by."""
    inverse = jax.lax.rsqrt(_mean(x * x) + epsilon)
    return x * inverse, inverse


def _twice(hidden: Any, dtype: Any) -> tuple[Any, Any]:
    """Return 2 Phi(h) and its derivative, of the normal distribution Phi: gelu(h) = h Phi(h).

    Twice, since the half can be left to the factor. The error function takes forty operations an entry, and those of a
    hidden layer are most of all; in bfloat16 a hyperbolic tangent of a polynomial serves, which has a unit of its own.
    """
    square = hidden * hidden
    if dtype == jnp.float32:
        twice = 1 + jax.lax.erf(hidden * math.sqrt(0.5))
    else:
        square = jnp.minimum(square, _SATURATED)
        first, second, third = _CUBIC
        twice = 1 + jnp.tanh(hidden * (first + square * (second + square * third)))
    return twice, math.sqrt(2 / math.pi) * jnp.exp2(square * (-0.5 / math.log(2)))
