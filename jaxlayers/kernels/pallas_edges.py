"""Messages of SE(3)-equivariant edges as Pallas kernels for TPU: radial functions and tensor products in fast memory.

A message is sum over (k, c, J) of R_J^{kl}[d, c] (K_J f_c), with radial functions R that are the last layer of a
perceptron. XLA writes R, a number for each edge, pair of channels and path, and K_J f to main memory, reads them back,
and does so again for the gradient. Here both exist for 128 edges at a time, and the gradient computes them anew.

Edges lie along the lanes. Of each pair of degrees the matrix unit gives R for all input channels, paths and, innermost,
output channels; an input channel and path of it are a column of output channels, which K_J f, a row, multiplies. So
messages need no sums over sublanes. The gradient of K_J f does: partial sums of eight channels are laid down one after
another and added by strided reads, eight rows at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from jaxlayers.core import axes

_LANES = 128
# Input channels that are written down together; the rest is a loop.
_TOGETHER = 4

Pairs = Mapping[tuple[int, int], Shaped[Array, "..."]]


def edge_messages(
    hidden: Float[Array, "*edges pairs hidden"],
    kernel: Float[Array, "hidden outputs"],
    bias: Float[Array, "outputs"],
    basis: Pairs,
    sources: Mapping[int, Shaped[Array, "..."]],
    features: Mapping[int, int],
) -> dict[int, Shaped[Array, "..."]]:
    """Return the sums over k, c and J of R_J^{kl}[d, c] (K_J f_c) of every edge, with R = hidden kernel + bias.

    Differentiable once, in reverse mode, with respect to all arrays; in float32, products in the precision that a TPU
    takes for these by default. On CPU the kernels are interpreted, which is slow and meant for tests. With a mesh in
    scope each device runs them on the edges of the batch and of the points that the logical rules give it.

    Args:
      hidden: last hidden activations of the perceptrons of all pairs of degrees (k, l), in the order of their sorting;
        the last of the axes of edges is that of neighbours, before it are points, and batches.
      kernel: their last layers side by side, each `[hidden, features_l x channels_k x paths]`.
      bias: of the last layers.
      basis: (k, l) to kernels K_J, `[*edges, paths, 2 l + 1, 2 k + 1]`.
      sources: k to features of the neighbours, `[*edges, channels_k, 2 k + 1]`.
      features: l to the channels of the messages.

    Returns:
      l to messages `[*edges, features_l, 2 l + 1]`, in the dtype of the hidden activations.

    Raises:
      ValueError: if the arrays do not fit.
    """
    pairs = sorted(basis)
    channels = {k: sources[k].shape[-2] for k, _ in pairs}
    layout = _Layout.of(pairs, channels, {degree: features[degree] for _, degree in pairs}, hidden.shape[-1])
    layout.check(hidden, kernel, bias, basis, sources)
    operands = (hidden, kernel, bias, tuple(basis[pair] for pair in pairs), tuple(sources[k] for k in layout.sources))
    return dict(zip(layout.degrees, _messages(layout, operands), strict=True))


# Forward and backward, on all devices ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _messages(layout: "_Layout", operands: Any) -> Any:
    return _keep(layout, operands)[0]


def _keep(layout: "_Layout", operands: Any) -> tuple[Any, Any]:
    split = _Split.of(operands[0].shape[:-2])
    return split.on_devices(functools.partial(_forward, layout), (split.operands,), split.edges)(operands), operands


def _return(layout: "_Layout", operands: Any, gradients: Any) -> tuple[Any]:
    split = _Split.of(operands[0].shape[:-2])

    def local(operands: Any, gradients: Any) -> Any:
        hidden, *weights, basis, sources = _backward(layout, operands, gradients)
        # Each device has those of what all edges share from its own edges.
        weights = jax.lax.psum(weights, split.names) if split.names else weights
        return hidden, *weights, basis, sources

    return (split.on_devices(local, (split.operands, split.edges), split.operands)(operands, gradients),)


_messages.defvjp(_keep, _return)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How edges are split over the mesh in scope.

    Attributes:
      leading: the mesh axes of each axis of the edges.
      free: all that are in scope.
    """

    leading: tuple[tuple[str, ...], ...]
    free: frozenset[str]

    @classmethod
    def of(cls, shape: Sequence[int]) -> "_Split":
        """Return what the logical rules say of edges of that shape."""
        mesh = jax.sharding.get_abstract_mesh()
        free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
        known = (axes.BATCH, axes.NODES, None)[-len(shape) :] if shape else ()
        found = (tuple(name for name in each if name in free) for each in axes.split(shape, *known))
        return cls((*((),) * (len(shape) - len(known)), *found), free)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for each in self.leading for name in each)

    @property
    def edges(self) -> PartitionSpec:
        return PartitionSpec(*(each or None for each in self.leading))

    @property
    def operands(self) -> tuple[PartitionSpec, ...]:
        """Those of hidden activations, kernel, bias, basis and sources."""
        return self.edges, PartitionSpec(), PartitionSpec(), self.edges, self.edges

    def on_devices(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Return `local` run by each device on its part of the operands."""
        if not self.free:
            return local
        # The results of a kernel bear no types that say over which axes they vary.
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.free), check_vma=False)


# On one device --------------------------------------------------------------------------------------------------------


def _up(number: int) -> int:
    """Return the rows of whole tiles."""
    return -(-number // 8) * 8


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A pair of degrees, and where its rows begin.

    Attributes:
      source: degree k.
      degree: degree l.
      channels: of the source.
      features: of the message.
      rows_of_hidden: where its hidden activations begin.
      rows_of_basis: where its kernels K_J begin: path by path, component by component of the message, of the source.
      rows_of_source: where its source begins: component by component, channels up to a whole tile.
      rows_of_message: where its message begins, likewise.
      first: whether no pair before it has the source.
    """

    source: int
    degree: int
    channels: int
    features: int
    rows_of_hidden: int = 0
    rows_of_basis: int = 0
    rows_of_source: int = 0
    rows_of_message: int = 0
    first: bool = True

    @property
    def paths(self) -> int:
        return 2 * min(self.source, self.degree) + 1

    @property
    def products(self) -> int:
        """Paths and components of K_J f of a channel."""
        return self.paths * (2 * self.degree + 1)

    @property
    def kernels(self) -> int:
        """Rows of the basis."""
        return self.products * (2 * self.source + 1)

    @property
    def outputs(self) -> int:
        """Outputs of the radial function."""
        return self.features * self.channels * self.paths

    @property
    def radial(self) -> int:
        """Rows of the radial function: path by path, input channel by input channel, output channels."""
        return self.paths * self.channels * _up(self.features)

    def source_rows(self, component: int) -> slice:
        start = self.rows_of_source + component * _up(self.channels)
        return slice(start, start + _up(self.channels))

    def message_rows(self, component: int) -> slice:
        start = self.rows_of_message + component * _up(self.features)
        return slice(start, start + _up(self.features))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the operands of a call lie as rows, with edges along the lanes.

    Attributes:
      pairs: all of them, sorted.
      hidden: width of the hidden activations.
    """

    pairs: tuple[_Pair, ...]
    hidden: int

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[int, int]], channels: Mapping[int, int], features: Mapping[int, int], hidden: int
    ) -> "_Layout":
        """Return the layout for pairs (k, l), from the channels of k and of l."""
        source_rows, message_rows = (
            dict(zip(sorted(of), _starts(_up(of[degree]) * (2 * degree + 1) for degree in sorted(of)), strict=False))
            for of in (channels, features)
        )
        found: list[_Pair] = []
        kernels = 0
        for k, degree in sorted(pairs):
            first = all(pair.source != k for pair in found)
            places = (len(found) * _up(hidden + 1), kernels, source_rows[k], message_rows[degree])
            found.append(_Pair(k, degree, channels[k], features[degree], *places, first))
            kernels += found[-1].kernels
        return cls(tuple(found), hidden)

    @property
    def sources(self) -> tuple[int, ...]:
        return tuple(sorted({pair.source for pair in self.pairs}))

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(sorted({pair.degree for pair in self.pairs}))

    @property
    def depth(self) -> int:
        """Rows of the hidden activations of a pair, with one for the bias."""
        return _up(self.hidden + 1)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Rows of hidden activations, basis, sources and messages."""
        sources = {pair.source: (2 * pair.source + 1) * _up(pair.channels) for pair in self.pairs}
        messages = {pair.degree: (2 * pair.degree + 1) * _up(pair.features) for pair in self.pairs}
        kernels = sum(pair.kernels for pair in self.pairs)
        return len(self.pairs) * self.depth, kernels, sum(sources.values()), sum(messages.values())

    @property
    def scratch(self) -> tuple[int, int, int]:
        """Rows of K_J f, of a radial function, and of the partial sums of the gradient of K_J f."""
        products = max(pair.products * _up(pair.channels) for pair in self.pairs)
        return products, max(pair.radial for pair in self.pairs), 8 * products

    @property
    def held(self) -> int:
        """Bytes of fast memory that the backward pass holds."""
        edges = 2 * sum(self.widths[:3]) + self.widths[3]
        # Two of each block; of a weight rows of 128 lanes and, twice with its gradient, of all outputs.
        weights = sum(pair.radial * _LANES + 2 * self.depth * (pair.radial + _LANES) for pair in self.pairs)
        return 4 * (2 * _LANES * edges + 2 * weights + _LANES * sum(self.scratch))

    def check(self, hidden: Any, kernel: Any, bias: Any, basis: Pairs, sources: Mapping[int, Any]) -> None:
        """Raise ValueError unless the operands fit."""
        edges, outputs = hidden.shape[:-2], sum(pair.outputs for pair in self.pairs)
        wanted = {
            "hidden": (hidden, (*edges, len(self.pairs), self.hidden)),
            "kernel": (kernel, (self.hidden, outputs)),
            "bias": (bias, (outputs,)),
        }
        for pair in self.pairs:
            k, degree = pair.source, pair.degree
            shape = (*edges, pair.paths, 2 * degree + 1, 2 * k + 1)
            wanted[f"basis of {(k, degree)}"] = (basis[k, degree], shape)
            wanted[f"sources of {k}"] = (sources[k], (*edges, pair.channels, 2 * k + 1))
        for name, (x, shape) in wanted.items():
            if x.shape != shape:
                raise ValueError(f"{name} of shape {x.shape} must be {shape} for edges {edges}; pass such")

    def pack(self, hidden: Any, kernel: Any, bias: Any, basis: Any, sources: Any) -> tuple[Any, ...]:
        """Return rows of hidden activations, basis and sources, and the weights `[depth, rows]` of each pair."""
        edges = math.prod(hidden.shape[:-2])
        rows = jnp.moveaxis(hidden.astype(jnp.float32).reshape(edges, len(self.pairs), self.hidden), 0, -1)
        one = jnp.ones((len(self.pairs), 1, edges), jnp.float32)
        rows = jnp.concatenate([rows, one], axis=1)
        rows = jnp.pad(rows, ((0, 0), (0, self.depth - self.hidden - 1), (0, 0)))
        kernels = [x.astype(jnp.float32).reshape(edges, math.prod(x.shape[-3:])).T for x in basis]
        packed = [rows.reshape(self.widths[0], edges), jnp.concatenate(kernels), _features(sources, edges)]
        weights = []
        whole = jnp.concatenate([kernel, bias[None]]).astype(jnp.float32)
        whole = jnp.pad(whole, ((0, self.depth - self.hidden - 1), (0, 0)))
        ends = _starts(pair.outputs for pair in self.pairs)
        for pair, start in zip(self.pairs, ends, strict=False):
            part = whole[:, start : start + pair.outputs]
            part = part.reshape(self.depth, pair.features, pair.channels, pair.paths).transpose(0, 3, 2, 1)
            part = jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, _up(pair.features) - pair.features)))
            weights.append(part.reshape(self.depth, -1))
        # At least one block, so that the gradients of the weights are written.
        missing = max(_LANES, -(-edges // _LANES) * _LANES) - edges
        return *(jnp.pad(x, ((0, 0), (0, missing))) for x in packed), tuple(weights)

    def unpack(self, messages: Any, edges: Sequence[int], dtype: Any) -> tuple[Any, ...]:
        """Return the messages of each degree from their rows."""
        found = {}
        for pair in self.pairs:
            components, count = 2 * pair.degree + 1, math.prod(edges)
            start, end = pair.message_rows(0).start, pair.message_rows(components - 1).stop
            part = messages[start:end, :count].reshape(components, _up(pair.features), count)[:, : pair.features]
            found[pair.degree] = part.transpose(2, 1, 0).reshape(*edges, pair.features, components).astype(dtype)
        return tuple(part for _, part in sorted(found.items()))


def _starts(sizes: Any) -> list[int]:
    """Return where each of several parts begins, and where the last one ends."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


def _features(parts: Sequence[Any], edges: int) -> Any:
    """Return rows of several `[*edges, channels, components]`, one after the other."""
    rows = []
    for part in parts:
        channels, components = part.shape[-2:]
        part = part.astype(jnp.float32).reshape(edges, channels, components).transpose(2, 1, 0)
        part = jnp.pad(part, ((0, 0), (0, _up(channels) - channels), (0, 0)))
        rows.append(part.reshape(components * _up(channels), edges))
    return jnp.concatenate(rows)


def _forward(layout: _Layout, operands: Any) -> Any:
    hidden, basis, sources, weights = layout.pack(*operands)

    def kernel(hidden: Any, basis: Any, sources: Any, *rest: Any) -> None:
        *weights, out, products, radial = rest
        out[...] = jnp.zeros_like(out)
        for pair, weight in zip(layout.pairs, weights, strict=True):
            _recompute(layout, pair, hidden, weight, basis, sources, products, radial)
            components = range(2 * pair.degree + 1)
            total = [out[pair.message_rows(component), :] for component in components]
            for path in range(pair.paths):

                def add(channel: Any, total: Any, pair: _Pair = pair, path: int = path) -> Any:
                    column = radial[_radial_rows(pair, path, channel), :]
                    rows = (products[_product_row(pair, path, m, channel), :] for m in range(2 * pair.degree + 1))
                    return [each + column * row for each, row in zip(total, rows, strict=True)]

                total = _each(pair.channels, add, total)
            for component in components:
                out[pair.message_rows(component), :] = total[component]

    across = [x.T for x in weights]
    (out,) = _call(
        layout, kernel, "edge_messages", (hidden, basis, sources), across, [layout.widths[3]], products=2
    )  # fmt: skip
    return layout.unpack(out, operands[0].shape[:-2], operands[0].dtype)


def _backward(layout: _Layout, operands: Any, gradients: Any) -> Any:
    """Return the gradients of all operands."""
    (hidden, basis, sources, weights), unpack = jax.vjp(layout.pack, *operands)
    gradient = _features(gradients, math.prod(operands[0].shape[:-2]))
    gradient = jnp.pad(gradient, ((0, 0), (0, hidden.shape[1] - gradient.shape[1])))
    count = len(layout.pairs)

    def kernel(hidden: Any, basis: Any, sources: Any, gradient: Any, *rest: Any) -> None:
        weights, across, rest = rest[:count], rest[count : 2 * count], rest[2 * count :]
        by_hidden, by_basis, by_sources, *by_weights, products, radial, partial = rest

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            for each in by_weights:
                each[...] = jnp.zeros_like(each)

        for index, pair in enumerate(layout.pairs):
            _recompute(layout, pair, hidden, weights[index], basis, sources, products, radial)
            _differentiate(pair, gradient, products, radial, partial)
            rows = slice(pair.rows_of_hidden, pair.rows_of_hidden + layout.depth)
            by_radial = radial[: pair.radial, :]
            by_weights[index][...] += _dot(hidden[rows, :], by_radial, 1)
            by_hidden[rows, :] = _dot(across[index][...], by_radial, 0)
            _differentiate_products(pair, basis, sources, partial, by_basis, by_sources)

    by_hidden, by_basis, by_sources, *by_weights = _call(
        layout, kernel, "edge_messages_backward", (hidden, basis, sources, gradient),
        [*(x.T for x in weights), *weights], layout.widths[:3], weights, products=5,
    )  # fmt: skip
    return unpack((by_hidden, by_basis, by_sources, tuple(by_weights)))


def _call(
    layout: _Layout,
    kernel: Callable[..., None],
    name: str,
    edges: Sequence[Any],
    weights: Sequence[Any],
    results: Sequence[int],
    by_weights: Sequence[Any] = (),
    *,
    products: int,
) -> Any:
    """Run a kernel over all blocks of edges.

    Args:
      layout: of the operands.
      kernel: takes references to the operands, to the results and to scratch memory (the last of which, for the
        gradient of K_J f, it has if there are gradients of weights).
      name: of the kernel.
      edges: rows for edges.
      weights: what all edges share.
      results: how many rows for edges each result has.
      by_weights: arrays like results which all edges add to.
      products: how often each entry of a radial function is computed or used, for the estimate of costs.
    """
    count = edges[0].shape[1]

    def of_edges(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, _LANES), lambda block: (0, block))

    def of_all(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda block: (0, 0))

    out = [jax.ShapeDtypeStruct((rows, count), jnp.float32) for rows in results]
    out += [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in by_weights]
    moved = sum(4 * math.prod(x.shape) for x in (*edges, *weights, *out))
    entries = sum(pair.radial * (layout.depth + 2 * pair.degree + 1) for pair in layout.pairs)
    run = functools.partial(
        pl.pallas_call,
        kernel,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(count // _LANES,),
            in_specs=[of_edges(len(x)) for x in edges] + [of_all(x) for x in weights],
            out_specs=[of_edges(rows) for rows in results] + [of_all(x) for x in by_weights],
            scratch_shapes=[
                pltpu.VMEM((rows, _LANES), jnp.float32) for rows in layout.scratch[: 3 if by_weights else 2]
            ],
        ),
        cost_estimate=pl.CostEstimate(flops=2 * products * entries * count, bytes_accessed=moved, transcendentals=0),
        name=name,
    )
    # Weights of many channels do not fit what is given unasked.
    limit = max(2 * layout.held, 16 * 2**20)
    # Which of the two is lowered is known only then: code for a TPU may be compiled where there is none.
    return jax.lax.platform_dependent(
        *edges,
        *weights,
        cpu=run(interpret=True),
        tpu=run(compiler_params=pltpu.CompilerParams(vmem_limit_bytes=limit)),
    )


# In a kernel ----------------------------------------------------------------------------------------------------------


def _dot(x: Any, y: Any, other: int) -> Any:
    """Return the product over the last axis of `x` and that axis of `y`, summed in float32."""
    return jax.lax.dot_general(x, y, (((1,), (other,)), ((), ())), preferred_element_type=jnp.float32)


def _each(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Return the carry after `body(index, carry)` for each index, some of them written down together."""

    def several(start: Any, number: int, carry: Any) -> Any:
        for index in range(number):
            carry = body(start + index, carry)
        return carry

    turns, left = divmod(count, _TOGETHER)
    carry = jax.lax.fori_loop(0, turns, lambda turn, carry: several(turn * _TOGETHER, _TOGETHER, carry), carry)
    return several(turns * _TOGETHER, left, carry)


def _radial_rows(pair: _Pair, path: int, channel: Any) -> Any:
    """Return the rows of a radial function that a path of an input channel has: all output channels."""
    rows = _up(pair.features)
    return pl.ds(pl.multiple_of((path * pair.channels + channel) * rows, 8), rows)


def _product_row(pair: _Pair, path: int, component: int, channel: Any) -> Any:
    """Return the row of K_J f of a path, a component and a channel."""
    return pl.ds((path * (2 * pair.degree + 1) + component) * _up(pair.channels) + channel, 1)


def _recompute(
    layout: _Layout, pair: _Pair, hidden: Any, weight: Any, basis: Any, sources: Any, products: Any, radial: Any
) -> None:
    """Write K_J f and the radial function of a pair."""
    radial[: pair.radial, :] = _dot(weight[...], hidden[pair.rows_of_hidden : pair.rows_of_hidden + layout.depth, :], 0)
    components = range(2 * pair.source + 1)
    source = [sources[pair.source_rows(component), :] for component in components]
    rows = _up(pair.channels)
    for product in range(pair.products):
        start = pair.rows_of_basis + product * len(components)
        terms = (basis[start + component : start + component + 1, :] * source[component] for component in components)
        products[product * rows : (product + 1) * rows, :] = functools.reduce(jnp.add, terms)


def _differentiate(pair: _Pair, gradient: Any, products: Any, radial: Any, partial: Any) -> None:
    """Write the gradient of a radial function over it, and partial sums of that of K_J f, eight rows for each row."""
    components = range(2 * pair.degree + 1)
    of_messages = [gradient[pair.message_rows(component), :] for component in components]
    rows, missing = _up(pair.channels), _up(pair.channels) - pair.channels
    for product in range(pair.products if missing else 0):
        end = 8 * (product + 1) * rows
        partial[end - 8 * missing : end, :] = jnp.zeros((8 * missing, _LANES), jnp.float32)
    for path in range(pair.paths):

        def one(channel: Any, carry: Any, path: int = path) -> Any:
            place = _radial_rows(pair, path, channel)
            column = radial[place, :]
            found = []
            for component, of_message in zip(components, of_messages, strict=True):
                row = _product_row(pair, path, component, channel)
                found.append(of_message * products[row, :])
                terms = column * of_message
                terms = functools.reduce(jnp.add, (terms[start : start + 8] for start in range(0, len(terms), 8)))
                partial[pl.ds(pl.multiple_of(8 * row.start, 8), 8), :] = terms
            radial[place, :] = functools.reduce(jnp.add, found)
            return carry

        _each(pair.channels, one, 0)


def _differentiate_products(
    pair: _Pair, basis: Any, sources: Any, partial: Any, by_basis: Any, by_sources: Any
) -> None:
    """Write the gradients of basis and source from those of K_J f, partial sums of which are given."""
    components = range(2 * pair.source + 1)
    source = [sources[pair.source_rows(component), :] for component in components]
    total = [jnp.zeros_like(x) if pair.first else by_sources[pair.source_rows(m), :] for m, x in enumerate(source)]
    rows = _up(pair.channels)
    for product in range(pair.products):
        parts = (partial[pl.ds(8 * product * rows + place, rows, stride=8), :] for place in range(8))
        by_product = functools.reduce(jnp.add, parts)
        for component in components:
            place = pair.rows_of_basis + product * len(components) + component
            by_basis[place : place + 1, :] = jnp.sum(by_product * source[component], axis=0, keepdims=True)
            total[component] += by_product * basis[place : place + 1, :]
    for component in components:
        by_sources[pair.source_rows(component), :] = total[component]
