"""Swin3D: a pyramid of transformer blocks on sparse voxels, with windows over the occupied voxels only.

Longer than most files, since attention, model, decoder and the names of the reference belong to one paper; what is not
learned (sorting, merging, neighbours) lies in `jaxlayers.ops.voxels`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.multi_head import merge_heads, split_heads
from jaxlayers.ops.voxels import (
    Cells,
    Coarse,
    Voxels,
    downsample_voxels,
    find_voxels,
    interpolate,
    max_by_cell,
    nearest_voxels,
    sort_into_cells,
    take,
    window_cells,
)

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)

# Position within the window, colour, normal: the reference's names of their tables.
_SIGNALS = ("xyz", "rgb", "norm")

# Colours and normals lie in [-1, 1]; the position's range is the window.
_RANGE = 2

# The relative places of a voxel and its 26 neighbours, the first axis fastest.
_KERNEL = np.stack(np.unravel_index(np.arange(27), (3, 3, 3), order="F"), axis=-1) - 1


# Attention ------------------------------------------------------------------------------------------------------------


def quantize_differences(
    queries: Float[Array, "*batch components queries"],
    keys: Float[Array, "*batch components keys"],
    rows: tuple[int, ...],
) -> Int[Array, "*batch components queries keys"]:
    """Return the row that each difference query - key has in a table in which those of the components lie in turn.

    That is floor(difference) + rows / 2 in the component's own rows, or the first or last of them.

    Args:
      queries: components of signals of each query, in quantisation steps.
      keys: the same of each key.
      rows: how many rows each component has.

    Returns:
      Rows of the whole table.
    """
    count = np.array(rows)[:, None, None]
    difference = jnp.floor(queries[..., :, None] - keys[..., None, :]).astype(jnp.int32)
    return jnp.clip(difference + count // 2, 0, count - 1) + (np.cumsum(rows) - rows)[:, None, None]


@functools.partial(jax.jit, static_argnames=("rows", "largest", "chunk_size"))
def cell_attention(
    query: Float[Array, "*batch heads voxels dim"],
    key: Float[Array, "*batch heads voxels dim"],
    value: Float[Array, "*batch heads voxels dim"],
    cell: Int[Array, "*batch voxels"],
    signals: Float[Array, "*batch voxels components"],
    tables: tuple[Float[Array, "rows heads dim"], Float[Array, "rows heads dim"], Float[Array, "rows heads dim"]],
    rows: tuple[int, ...],
    *,
    largest: int,
    chunk_size: int = 64,
) -> Float[Array, "*batch heads voxels dim"]:
    """Attend among the voxels of the same cell, with contextual relative signal encoding.

    e_ij = q_i . (k_j + sum_n T^q[r_n]) + k_j . sum_n T^k[r_n] and out_i = sum_j softmax_j(e_ij) (v_j + sum_n T^v[r_n]),
    where r_n is the row for the quantised difference between i and j of component n of the signals.

    The list is cut into chunks, and each chunk meets the chunks at distance -D ... D around it, with D chunks enough
    for the largest cell; a distance at which no two chunks share a cell is skipped while running. What is summed is
    exp(e - max) and exp(e - max) v, and their quotient is taken at the end, as in the paper, so that no more than the
    logits of each chunk with one other are held at a time, in the backward pass as well: memory is linear in the
    number of voxels. Tables are never spread over pairs of voxels: for the logits, each query and key is multiplied
    with all rows first and the products are picked; for the values, weights are summed by row first.

    Args:
      query: scaled queries, the voxels sorted by cell.
      key: keys in the same order.
      value: values in the same order.
      cell: number of the cell, -1 for padding, which attends to nothing and gets zeros.
      signals: components of the signals, in quantisation steps.
      tables: those of queries, keys and values, each with the rows of all components in turn.
      rows: how many rows each component has.
      largest: no cell has more voxels.
      chunk_size: length of a chunk.

    Returns:
      What each voxel gathers.
    """
    voxels = cell.shape[-1]
    chunk = max(1, min(chunk_size, voxels))
    chunks = -(-voxels // chunk)
    reach = min(chunks - 1, -(-(min(largest, voxels) - 1) // chunk))
    precise = at_least_float32(query.dtype)

    def cut(x: Array, axis: int, fill: int = 0) -> Array:
        axis += x.ndim
        x = jnp.pad(x, _along(x, axis, (0, chunks * chunk - voxels)), constant_values=fill)
        return x.reshape(*x.shape[:axis], chunks, chunk, *x.shape[axis + 1 :])

    def around(x: Array, axis: int, distance: Array, fill: int = 0) -> Array:
        """Return for each chunk of `x` the one at a distance, counted from `reach` chunks before it."""
        axis += x.ndim
        x = jnp.pad(x, _along(x, axis, (reach, reach)), constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(x, distance, chunks, axis=axis)

    cells, steps = cut(cell, -1, -1), jnp.swapaxes(cut(signals, -2), -1, -2)

    def scores(operands: Any, distance: Array) -> tuple[Array, Array, Array]:
        """Return the logits of each chunk with the one at a distance, which of them count, and the rows of tables."""
        query, key, _, (query_table, key_table, _) = operands
        key = around(key, -3, distance)
        row = quantize_differences(steps, around(steps, -3, distance), rows)
        dot = functools.partial(jnp.einsum, preferred_element_type=precise)
        by_query = _pick(dot("...hcid,rhd->...hcir", query, query_table), jnp.moveaxis(row, -2, -3))
        by_key = _pick(dot("...hcjd,rhd->...hcjr", key, key_table), jnp.moveaxis(row, -1, -3))
        logits = dot("...hcid,...hcjd->...hcij", query, key) + by_query + jnp.swapaxes(by_key, -1, -2)
        others = around(cells, -2, distance, -1)
        meet = (cells[..., :, None] == others[..., None, :]) & (cells >= 0)[..., None]
        return logits, meet[..., None, :, :, :], row

    def where_met(fn: Callable[[], Any], distance: Array) -> Any:
        """Return `fn()`, or zeros without computing it where no two chunks at that distance share a cell."""
        if reach == 0:
            return fn()
        others = around(cells, -2, distance, -1)
        none = jnp.iinfo(cells.dtype).max
        low, other_low = (jnp.min(jnp.where(one < 0, none, one), axis=-1) for one in (cells, others))
        high, other_high = jnp.max(cells, axis=-1), jnp.max(others, axis=-1)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn))
        met = jnp.any((low <= other_high) & (other_low <= high))
        return jax.lax.cond(met, fn, lambda: nothing)

    def peaks(operands: Any, distance: Array) -> Array:
        def largest_scores() -> tuple[Array, Array]:
            logits, meet, _ = scores(operands, distance)
            # Which rows met anything stands beside, for the zeros of a skipped distance are no scores.
            meet = jnp.broadcast_to(meet, logits.shape)
            return jnp.max(logits, axis=-1, where=meet, initial=-jnp.inf), jnp.any(meet, axis=-1)

        peak, met = where_met(largest_scores, distance)
        return jnp.where(met, peak, -jnp.inf)

    @jax.checkpoint
    def sums(operands: Any, peak: Array, distance: Array) -> tuple[Array, Array]:
        _, _, value, (_, _, table) = operands

        def weigh() -> tuple[Array, Array]:
            logits, meet, row = scores(operands, distance)
            weights = jnp.where(meet, jnp.exp(jnp.where(meet, logits - peak[..., None], 0)), 0)
            dot = functools.partial(jnp.einsum, preferred_element_type=precise)
            total = dot("...hcij,...hcjd->...hcid", weights.astype(value.dtype), around(value, -3, distance))
            by_row = _unpick(weights, jnp.moveaxis(row, -2, -3), sum(rows))
            return total + dot("...hcir,rhd->...hcid", by_row.astype(table.dtype), table), jnp.sum(weights, axis=-1)

        return where_met(weigh, distance)

    operands = (cut(query, -2), cut(key, -2), cut(value, -2), tables)
    # The result does not depend on what is subtracted, so nothing is lost by leaving it out of the gradient.
    frozen = jax.lax.stop_gradient(operands)
    distances = jnp.arange(2 * reach + 1)
    shape = operands[0].shape
    if reach == 0:
        peak = peaks(frozen, distances[0])
    else:
        peak = jnp.full(shape[:-1], -jnp.inf, precise)
        peak, _ = jax.lax.scan(lambda peak, d: (jnp.maximum(peak, peaks(frozen, d)), None), peak, distances)
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    if reach == 0:
        weighted, weight = sums(operands, peak, distances[0])
    else:
        total = jnp.zeros(shape, precise), jnp.zeros(shape[:-1], precise)
        (weighted, weight), _ = jax.lax.scan(
            lambda total, d: (jax.tree.map(jnp.add, total, sums(operands, peak, d)), None), total, distances
        )
    out = weighted / jnp.where(weight > 0, weight, 1)[..., None]
    return out.reshape(*out.shape[:-3], chunks * chunk, out.shape[-1])[..., :voxels, :].astype(value.dtype)


def _along(x: Array, axis: int, padding: tuple[int, int]) -> list[tuple[int, int]]:
    return [padding if index == axis else (0, 0) for index in range(x.ndim)]


def _pick(products: Array, row: Array) -> Array:
    """Return for i and j the sum over components of `products` `[*batch, heads, chunks, i, rows]` in their rows.

    The rows are `[*batch, chunks, i, components, j]`, the result `[*batch, heads, chunks, i, j]`.
    """
    *_, components, others = row.shape
    index = row.reshape(*row.shape[:-2], components * others)[..., None, :, :, :]
    picked = jnp.take_along_axis(products, index, axis=-1, mode="promise_in_bounds")
    return jnp.sum(picked.reshape(*picked.shape[:-1], components, others), axis=-2)


def _unpick(weights: Array, row: Array, rows: int) -> Array:
    """Return the sums of weights by rows, the transpose of `_pick`."""
    products = jax.ShapeDtypeStruct((*weights.shape[:-1], rows), weights.dtype)
    return jax.linear_transpose(functools.partial(_pick, row=row), products)(weights)[0]


class SparseWindowAttention(nn.Module):
    """Attend among the occupied voxels of each cubic window, with contextual relative signal encoding.

    e_ij = q_i . k_j + q_i . t^q_ij + k_j . t^k_ij and out_i = (sum_j softmax_j(e_ij) (v_j + t^v_ij)) W_out over the
    voxels j in the window of i, for each head, with q `[dim]` scaled by 1 / sqrt(dim). t_ij = sum_n T_n[floor(s_n,i -
    s_n,j)] sums over the components n of all signals: position in the window, colour, normal, each in quantisation
    steps; tables T `[3, rows, heads, dim]` are learned, apart for q, k and v.

    Symmetry:
      Exactly equivariant to permutations of the list and to translations by whole windows (which leave the features
      alone); voxels of different windows never mix, and padding changes nothing.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: length M of a window's side, in voxels.
      shift_size: added to the coordinates before they are cut into windows; the paper uses M // 2.
      quant_sizes: quantisation steps a unit, for position (unit: a voxel), colour and normal (which lie in [-1, 1]);
        one to three entries, as many as there are kinds of signals.
      chunk_size: how many voxels of the sorted list are treated at a time; changes speed and memory, not the result.
      use_bias: add biases to queries, keys and values (the output always has one).
      dtype: compute dtype; `None` infers it from input and parameters. Signals and softmax are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels; tables always start as a truncated normal of 0.02.
      bias_init: initialiser of the biases.

    Cost:
      4 C^2 multiply-accumulates a voxel of width C, and for each distance between chunks in use (1 to 2 D + 1 of them,
      D = ceil((M^3 - 1) / chunk_size)) 3 (chunk_size + rows of the tables) C, of which the logits' share is computed
      twice. Memory is linear in the number of voxels, forward and backward. Static shapes have their price: in a
      simulated room of 134 thousand voxels with M = 7 (86 voxels in the mean voxel's window, 233 in the fullest) chunks
      of 64 use 9 of 13 distances, 6.7 times the logits of the windows themselves; chunks of 32 take 5.6 times in 15
      steps, of 128 7.4 times in 5.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import SparseWindowAttention
      >>> layer = SparseWindowAttention(num_heads=2, window_size=3, quant_sizes=(4,))
      >>> inputs = jnp.ones((1, 9, 8)), jnp.zeros((1, 9, 3), int), jnp.zeros((1, 9, 3)), jnp.ones((1, 9), bool)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), *inputs)[0].shape
      (1, 9, 8)

    Source:
      Yang et al., Swin3D: A Pretrained Transformer Backbone for 3D Indoor Scene Understanding, 2023 (arXiv
      2304.06906), section 3; github.com/microsoft/Swin3D.

    Differs:
      Q, K and V come from three products instead of one cut in three (`from_reference` cuts the kernels). Differences
      beyond a table take its last row; the code reads on into the next table there (at a colour difference of exactly
      2, which its data loaders avoid by dividing by 1.001). Windows are runs of one sorted list, where the code builds
      a list of all pairs.
    """

    num_heads: int
    window_size: int = 7
    shift_size: int = 0
    quant_sizes: tuple[int, ...] = (4, 8, 8)
    chunk_size: int = 64
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch voxels features"],
        coordinates: Int[Array, "*batch voxels 3"],
        signals: Float[Array, "*batch voxels signals"],
        mask: Bool[Array, "*batch voxels"],
        cells: Cells | None = None,
    ) -> Float[Array, "*batch voxels features"]:
        """Attend within each window.

        Args:
          x: features of each voxel.
          coordinates: of each voxel; those of true voxels of a scene all differ.
          signals: three entries for each of `quant_sizes`: place within the voxel from 0 to 1, colour, normal.
          mask: true for voxels, false for padding.
          cells: the windows, if they are known already, as `window_cells` returns them.

        Returns:
          Features like `x`, zero at padding. A scene in which a window holds more than M^3 voxels, which takes
          repeated coordinates, gives NaN rather than a number that leaves some out.

        Raises:
          ValueError: if shapes or fields do not fit.
        """
        features = x.shape[-1]
        _check_voxels(x, coordinates, signals, mask, self.quant_sizes)
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        if self.window_size < 1 or self.chunk_size < 1:
            raise ValueError(
                f"window_size={self.window_size} and chunk_size={self.chunk_size} must be positive; set both"
            )
        if cells is None:
            cells = window_cells(coordinates, mask, self.window_size, self.shift_size)
        dense = functools.partial(
            nn.Dense,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        ordered = take(x, cells.order)
        query, key, value = (
            axes.constrain_heads(split_heads(dense(use_bias=self.use_bias, name=name)(ordered), self.num_heads))
            for name in ("query", "key", "value")
        )
        dim = features // self.num_heads
        precise = at_least_float32(signals.dtype)
        within = jnp.mod(coordinates + self.shift_size, self.window_size).astype(precise) + signals[..., :3]
        kinds = [within, *jnp.split(signals.astype(precise), len(self.quant_sizes), axis=-1)[1:]]
        sizes = zip(kinds, self.quant_sizes, strict=True)
        steps = jnp.concatenate([jax.lax.stop_gradient(kind) * size for kind, size in sizes], axis=-1)
        steps = take(steps, cells.order)
        rows: tuple[int, ...] = ()
        tables: dict[str, list[Array]] = {"query": [], "key": [], "value": []}
        for index, (name, size) in enumerate(zip(_SIGNALS, self.quant_sizes, strict=False)):
            length = 2 * size * (_RANGE if index else self.window_size)
            rows += (length,) * 3
            for of, parts in tables.items():
                table = self.param(
                    f"{of}_{name}_table", truncated_normal(), (3, length, self.num_heads, dim), self.param_dtype
                )
                parts.append(table.reshape(3 * length, self.num_heads, dim).astype(query.dtype))
        whole = tuple(axes.constrain(jnp.concatenate(parts), axes.HEADS, None) for parts in tables.values())
        cell = jnp.take_along_axis(cells.index, cells.order, axis=-1)

        def attend(module: nn.Module, query: Array, key: Array, value: Array, tables: Any) -> Array:
            query = query * dim**-0.5
            largest = self.window_size**3
            return cell_attention(
                query, key, value, cell, steps, tables, rows, largest=largest, chunk_size=self.chunk_size
            )

        context = axes.constrain_heads(remat.attention(attend, self, query, key, value, whole))
        out = take(dense(name="out")(merge_heads(context)), cells.place)
        out = jnp.where(mask[..., None], out, 0)
        overfull = cells.largest > self.window_size**3
        return axes.constrain_tokens(jnp.where(overfull[..., None, None], jnp.nan, out))


def _check_voxels(x: Any, coordinates: Any, signals: Any, mask: Any, quant_sizes: tuple[int, ...]) -> None:
    if not 1 <= len(quant_sizes) <= len(_SIGNALS) or min(quant_sizes) < 1:
        raise ValueError(
            f"quant_sizes={quant_sizes} must have one to three positive entries, for position, colour and normal; "
            "set quant_sizes"
        )
    wanted = {"coordinates": (coordinates, (3,)), "signals": (signals, (3 * len(quant_sizes),)), "mask": (mask, ())}
    for name, (array, last) in wanted.items():
        if x.ndim < 2 or array.shape != (*x.shape[:-1], *last):
            raise ValueError(
                f"{name} must have shape {(*x.shape[:-1], *last)} beside x of shape [*batch, voxels, features] and "
                f"quant_sizes={quant_sizes}; got x {x.shape} and {name} {array.shape}"
            )


class Swin3DBlock(nn.Module):
    """Mix voxels within windows, shifted or not, then each voxel alone.

    z = x + drop(attention(norm(x))), out = z + drop(MLP(norm(z))), with the attention over the occupied voxels of each
    window. Shifted windows are windows of shifted coordinates: nothing wraps around, and no mask is needed.

    Symmetry:
      As `SparseWindowAttention`.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: length M of a window's side, in voxels.
      shift_size: added to the coordinates before they are cut into windows.
      quant_sizes: quantisation steps a unit of position, colour and normal.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      drop_path_rate: probability of dropping a residual branch, for each voxel on its own, in [0, 1).
      chunk_size: how many voxels of the sorted list the attention treats at a time.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      2 mlp_ratio C^2 multiply-accumulates a voxel more than `SparseWindowAttention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import Swin3DBlock
      >>> block = Swin3DBlock(num_heads=2, window_size=3, shift_size=1, quant_sizes=(4,))
      >>> inputs = jnp.ones((1, 9, 8)), jnp.zeros((1, 9, 3), int), jnp.zeros((1, 9, 3)), jnp.ones((1, 9), bool)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), *inputs)[0].shape
      (1, 9, 8)

    Source:
      Yang et al., Swin3D: A Pretrained Transformer Backbone for 3D Indoor Scene Understanding, 2023, section 3;
      github.com/microsoft/Swin3D.

    Differs:
      As `SparseWindowAttention`.
    """

    num_heads: int
    window_size: int = 7
    shift_size: int = 0
    quant_sizes: tuple[int, ...] = (4, 8, 8)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    chunk_size: int = 64
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch voxels features"],
        coordinates: Int[Array, "*batch voxels 3"],
        signals: Float[Array, "*batch voxels signals"],
        mask: Bool[Array, "*batch voxels"],
        cells: Cells | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch voxels features"]:
        """Apply the block.

        Args:
          x: features of each voxel.
          coordinates: of each voxel; those of true voxels of a scene all differ.
          signals: three entries for each of `quant_sizes`: place within the voxel from 0 to 1, colour, normal.
          mask: true for voxels, false for padding.
          cells: the windows, if they are known already, as `window_cells` returns them.
          deterministic: no dropped branches.

        Returns:
          Features like `x`, zero at padding.

        Raises:
          ValueError: if shapes or fields do not fit.
        """
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=x.ndim - 1)
        y = SparseWindowAttention(
            self.num_heads,
            window_size=self.window_size,
            shift_size=self.shift_size,
            quant_sizes=self.quant_sizes,
            chunk_size=self.chunk_size,
            name="attention",
            **common,
        )(norm(name="norm1")(x), coordinates, signals, mask, cells)
        x = axes.constrain_tokens(x + drop_path(y, deterministic=deterministic))
        y = FeedForward(int(x.shape[-1] * self.mlp_ratio), name="feed_forward", **common)(norm(name="norm2")(x))
        x = x + drop_path(y, deterministic=deterministic)
        return axes.constrain_tokens(jnp.where(mask[..., None], x, 0))


# Model ----------------------------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array", "coordinates", "mask"], meta_fields=["stride"]
)
@dataclasses.dataclass(frozen=True)
class VoxelLevel:
    """One level of a pyramid of sparse voxels: `jaxlayers.core.pyramid.Level` with the voxels' coordinates.

    Attributes:
      array: features `[*batch, voxels, channels]`, zero at padding.
      coordinates: integers `[*batch, voxels, 3]`, in voxels of this level.
      mask: true for voxels, false for padding.
      stride: input voxels to one of this level, along each axis.
    """

    array: Any
    coordinates: Any
    mask: Any
    stride: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of features, the length of the last axis."""
        return self.array.shape[-1]


class Swin3D(nn.Module):
    """Label each voxel of a sparse scene, or give the pyramid of its features.

    A sparse 3 x 3 x 3 convolution, batch norm and ReLU embed the voxels. Stage s merges cells of `strides[s - 1]`^3
    voxels (from the second on: norm, projection, maximum over the nearest voxels), then applies `depths[s]` blocks with
    windows of `window_sizes[s]`, each second one shifted by half a window. The decoder goes back up: projection of the
    finer stage plus the projected coarser one, interpolated among its nearest voxels, and one more block. A perceptron
    of two layers gives the logits.

    Symmetry:
      Exactly equivariant to permutations of the list of voxels, and invariant to translations by multiples of `period`
      along each axis (of the coordinates; features are the caller's). Padding changes nothing.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the decoder's features.
      embed_dim: width of each stage; any number of stages.
      depths: number of blocks of each stage.
      num_heads: number of heads of each stage.
      window_sizes: length of a window's side in each stage, in its voxels.
      strides: length of a cell's side at each of the mergings between the stages.
      quant_sizes: quantisation steps a unit, for position (unit: a voxel), colour and normal, see
        `SparseWindowAttention`; one to three entries, three signals each.
      down_neighbors: how many nearest voxels a merged one takes the maximum over; 0 takes those of its cell.
      up_neighbors: how many nearest voxels a feature of the decoder is interpolated among.
      up_attention: end each step of the decoder with a block.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      drop_path_rate: probability of dropping a branch of the encoder's last block for a voxel; grows linearly from 0.
      up_drop_path_rate: the same for the blocks of the decoder, constant.
      keep_ratio: places for voxels in a stage, as a fraction of those in the stage before; one for all or one a
        merging. 1 always suffices; a scene that needs more places than there are gives NaN.
      chunk_size: how many voxels the attention treats at a time; changes speed and memory, not the result.
      remat: what the backward pass of each block computes anew, a name of `jaxlayers.core.remat.POLICIES`; true means
        all of it. Attention computes its logits anew in any case.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Signals, softmax and norms' statistics are in
        float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, apart from the convolution's, which is Lecun's normal.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats` with the running mean and var (decay 0.9) of the true voxels, which `deterministic=False` updates;
      the RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      Memory linear in the number of voxels, forward and backward; so are multiply-accumulates. Neighbours are searched
      with bounding boxes, in linear time as far as scenes are spread out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import Swin3D
      >>> model = Swin3D(num_classes=5, embed_dim=(8, 16), depths=(2, 2), num_heads=(2, 4), window_sizes=(3, 3),
      ...                strides=(2,), quant_sizes=(4, 8))
      >>> scene = jnp.ones((1, 50, 6)), jnp.zeros((1, 50, 3), int), jnp.zeros((1, 50, 6)), jnp.ones((1, 50), bool)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), *scene)[0].shape
      (1, 50, 5)

    Source:
      Yang et al., Swin3D: A Pretrained Transformer Backbone for 3D Indoor Scene Understanding, 2023 (arXiv
      2304.06906); github.com/microsoft/Swin3D, whose `Swin3DUNet` with `stem_transformer` it is.

    Differs:
      As `SparseWindowAttention`. Of several voxels equally near to the mean of their cell the first in lexicographic
      order speaks for it, and of equally near neighbours the first is taken; in the code it depends on the order of the
      list. Scenes with fewer voxels than neighbours use those there are, where the code reads on. The running var
      averages the biased variance of the batches, as Flax does; PyTorch the unbiased.
    """

    num_classes: int = 20
    embed_dim: tuple[int, ...] = (48, 96, 192, 384, 384)
    depths: tuple[int, ...] = (2, 4, 9, 4, 4)
    num_heads: tuple[int, ...] = (6, 6, 12, 24, 24)
    window_sizes: tuple[int, ...] = (5, 7, 7, 7, 7)
    strides: tuple[int, ...] = (3, 2, 2, 2)
    quant_sizes: tuple[int, ...] = (4, 8, 8)
    down_neighbors: int = 16
    up_neighbors: int = 3
    up_attention: bool = True
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.3
    up_drop_path_rate: float = 0.1
    keep_ratio: float | tuple[float, ...] = 1.0
    chunk_size: int = 64
    remat: bool | str = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        stages = len(self.embed_dim)
        for name in ("depths", "num_heads", "window_sizes"):
            entries = getattr(self, name)
            if len(entries) != stages or not stages or min(entries) < 1:
                raise ValueError(f"{name}={entries} must have {stages} positive entries, as embed_dim has; set {name}")
        if len(self.strides) != stages - 1 or any(stride < 2 for stride in self.strides):
            raise ValueError(f"strides={self.strides} must have {stages - 1} entries of 2 or more; set strides")
        if self.num_classes < 0 or self.down_neighbors < 0 or self.up_neighbors < 1:
            raise ValueError(
                f"num_classes={self.num_classes} and down_neighbors={self.down_neighbors} must not be negative, and "
                f"up_neighbors={self.up_neighbors} be positive; set them"
            )
        ratios = self._ratios
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        norms: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**norms, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        batch_norm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, **norms)
        self.patch_embed = _SparseConv(self.embed_dim[0], norm=batch_norm, **norms)
        blocks = [
            functools.partial(
                Swin3DBlock,
                self.num_heads[stage],
                window_size=self.window_sizes[stage],
                quant_sizes=self.quant_sizes,
                mlp_ratio=self.mlp_ratio,
                chunk_size=self.chunk_size,
                norm=self.norm,
                **common,
            )
            for stage in range(stages)
        ]
        norm = functools.partial(self.norm, **norms)
        dense = functools.partial(nn.Dense, **common)
        downsamples = [
            functools.partial(
                _Downsample, self.embed_dim[stage], self.strides[stage - 1], ratios[stage - 1], self.down_neighbors,
                norm, dense,
            )
            for stage in range(1, stages)
        ]  # fmt: skip
        self.stages = [
            _Stage(
                downsample=downsamples[stage - 1] if stage else None,
                block=blocks[stage],
                window_size=self.window_sizes[stage],
                rates=rates[sum(self.depths[:stage]) :][: self.depths[stage]],
                remat=self.remat,
            )
            for stage in range(stages)
        ]
        self.upsamples = [
            _Upsample(
                features=self.embed_dim[stage],
                neighbors=self.up_neighbors,
                block=functools.partial(blocks[stage], drop_path_rate=self.up_drop_path_rate)
                if self.up_attention
                else None,
                norm=norm,
                dense=dense,
                remat=self.remat,
            )
            for stage in range(stages - 2, -1, -1)
        ]
        if self.num_classes:
            self.head_hidden = dense(self.embed_dim[0])
            self.head_norm = batch_norm()
            self.head = dense(self.num_classes)

    @property
    def _ratios(self) -> tuple[float, ...]:
        mergings = len(self.embed_dim) - 1
        ratios = self.keep_ratio if isinstance(self.keep_ratio, tuple) else (self.keep_ratio,) * mergings
        if len(ratios) != mergings or any(not 0.0 < ratio <= 1.0 for ratio in ratios):
            raise ValueError(
                f"keep_ratio={self.keep_ratio} must be one number in (0, 1] or {mergings} of them; set keep_ratio"
            )
        return ratios

    @property
    def period(self) -> int:
        """The least translation, in voxels of the input, that moves the windows of all stages onto themselves."""
        reach = [math.prod(self.strides[:stage]) for stage in range(len(self.embed_dim))]
        return math.lcm(*(window * stride for window, stride in zip(self.window_sizes, reach, strict=True)))

    def __call__(
        self,
        x: Float[Array, "*batch voxels channels"],
        coordinates: Int[Array, "*batch voxels 3"],
        signals: Float[Array, "*batch voxels signals"],
        mask: Bool[Array, "*batch voxels"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch voxels classes"]:
        """Label each voxel.

        Args:
          x: what is known of each voxel, such as colour, normal and place within the voxel; any numbers at padding.
          coordinates: integers, in voxels; those of true voxels of a scene all differ.
          signals: three entries for each of `quant_sizes`: place within the voxel from 0 to 1, colour and normal from
            -1 to 1.
          mask: true for voxels, false for padding.
          deterministic: no dropped branches, and batch norms by the running statistics.

        Returns:
          Logits, or with `num_classes=0` features of the width of the first stage; zero at padding.

        Raises:
          ValueError: if shapes or fields do not fit.
        """
        scene = self._encode(x, coordinates, signals, mask, deterministic)
        y = scene.maps[-1]
        for upsample, stage in zip(self.upsamples, range(len(self.stages) - 2, -1, -1), strict=True):
            y = upsample(
                y,
                scene.maps[stage],
                scene.voxels[stage],
                scene.merged[stage],
                scale=math.prod(self.strides[:stage]),
                deterministic=deterministic,
            )
        if self.num_classes:
            y = self.head_hidden(y)
            y = self.head_norm(y, use_running_average=deterministic, mask=scene.voxels[0].mask[..., None])
            y = self.head(nn.relu(y))
        y = take(y, scene.cells.place)
        y = jnp.where(scene.overflow[..., None, None], jnp.nan, y)
        return axes.constrain_tokens(jnp.where(mask[..., None], y, 0))

    def features(
        self,
        x: Float[Array, "*batch voxels channels"],
        coordinates: Int[Array, "*batch voxels 3"],
        signals: Float[Array, "*batch voxels signals"],
        mask: Bool[Array, "*batch voxels"],
        *,
        deterministic: bool = True,
    ) -> tuple[VoxelLevel, ...]:
        """Return the encoder's voxels after each stage, finest first; the arguments are those of a call.

        Initialised by this method, the model has the parameters of the encoder alone.

        Returns:
          One level a stage. The first has the order of the input, the others that of their sorted coordinates.
        """
        scene = self._encode(x, coordinates, signals, mask, deterministic)
        levels = [VoxelLevel(take(scene.maps[0], scene.cells.place), coordinates, mask, (1,) * 3)]
        levels += [
            VoxelLevel(y, voxels.coordinates, voxels.mask, (math.prod(self.strides[:stage]),) * 3)
            for stage, (y, voxels) in enumerate(zip(scene.maps[1:], scene.voxels[1:], strict=True), start=1)
        ]

        def finish(level: VoxelLevel) -> VoxelLevel:
            array = jnp.where(scene.overflow[..., None, None], jnp.nan, level.array)
            return dataclasses.replace(level, array=jnp.where(level.mask[..., None], array, 0))

        return tuple(finish(level) for level in levels)

    def _encode(self, x: Array, coordinates: Array, signals: Array, mask: Array, deterministic: bool) -> "_Scene":
        _check_voxels(x, coordinates, signals, mask, self.quant_sizes)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x of dtype {x.dtype} must be of floating point; convert it")
        cells = sort_into_cells(coordinates, mask)
        sorted_mask = jnp.arange(mask.shape[-1]) < cells.count[..., None]
        clean = [jnp.where(mask[..., None], one, 0) for one in (x, coordinates, signals)]
        x, coordinates, signals = (take(one, cells.order) for one in clean)
        voxels = Voxels(coordinates, signals, sorted_mask)
        x = self.patch_embed(x, coordinates, sorted_mask, deterministic=deterministic)
        scene = _Scene(cells, [], [], [], jnp.zeros(mask.shape[:-1], bool))
        for index, stage in enumerate(self.stages):
            scale = math.prod(self.strides[: max(index - 1, 0)])
            x, voxels, merged = stage(x, voxels, scale=scale, deterministic=deterministic)
            scene.maps.append(x)
            scene.voxels.append(voxels)
            if merged is not None:
                scene.merged.append(merged)
                scene.overflow = scene.overflow | (merged.count > voxels.mask.shape[-1])
        return scene


@dataclasses.dataclass
class _Scene:
    """What the encoder leaves behind: the order of the list, and maps, voxels and mergings of the stages."""

    cells: Cells
    maps: list[Array]
    voxels: list[Voxels]
    merged: list[Coarse]
    overflow: Array


class _SparseConv(nn.Module):
    """A 3 x 3 x 3 convolution at the occupied voxels, a batch norm over them, and ReLU.

    Attributes:
      features: width of the output.
      norm: makes the batch norm.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    features: int
    norm: Callable[..., Any]
    dtype: Dtype | None
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, coordinates: Array, mask: Array, *, deterministic: bool) -> Array:
        *batch, voxels, channels = x.shape
        kernel = self.param("kernel", lecun_normal(), (len(_KERNEL), channels, self.features), self.param_dtype)
        dtype = compute_dtype(x, kernel, dtype=self.dtype)
        around = coordinates[..., None, :] + _KERNEL.astype(np.int32)
        places = find_voxels(coordinates, mask, around.reshape(*batch, -1, 3))
        near = jnp.where(places[..., None] < 0, 0, take(x.astype(dtype), places))
        x = near.reshape(*batch, voxels, -1) @ kernel.astype(dtype).reshape(-1, self.features)
        x = self.norm(name="norm")(x, use_running_average=deterministic, mask=mask[..., None])
        return axes.constrain_tokens(jnp.where(mask[..., None], nn.relu(x), 0))


class _Downsample(nn.Module):
    """Merge the voxels of each cell; features are the maximum over the nearest voxels.

    Attributes:
      features: width of the output.
      stride: length of a cell's side.
      ratio: places for cells, as a fraction of those for voxels.
      neighbors: how many nearest voxels; 0 for those in the cell.
      norm: makes a norm.
      dense: makes a linear layer.
    """

    features: int
    stride: int
    ratio: float
    neighbors: int
    norm: Callable[..., Any]
    dense: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Array, voxels: Voxels, *, scale: int) -> tuple[Array, Coarse]:
        capacity = max(1, math.ceil(voxels.mask.shape[-1] * self.ratio))
        merged = downsample_voxels(voxels, self.stride, capacity, scale)
        # Norm and projection of a voxel are the same for all that take it: once before, not once for each.
        x = self.dense(self.features, use_bias=False, name="projection")(self.norm(name="norm")(x))
        if self.neighbors:
            places, _ = nearest_voxels(merged.points, voxels, self.neighbors)
            near = take(x, places.reshape(*places.shape[:-2], -1)).reshape(*places.shape, self.features)
            x = jnp.max(near, axis=-2, where=places[..., None] >= 0, initial=-jnp.inf)
        else:
            x = max_by_cell(x, merged.index, capacity)
        return axes.constrain_tokens(jnp.where(merged.voxels.mask[..., None], x, 0)), merged


class _Upsample(nn.Module):
    """Add the coarser features, interpolated, to the finer ones, and attend once.

    Attributes:
      features: width of the output.
      neighbors: how many coarse voxels each fine one is interpolated among.
      block: makes the block; `None` for no attention.
      norm: makes a norm.
      dense: makes a linear layer.
      remat: what the block computes anew in the backward pass.
    """

    features: int
    neighbors: int
    block: Callable[..., nn.Module] | None
    norm: Callable[..., Any]
    dense: Callable[..., Any]
    remat: bool | str

    @nn.compact
    def __call__(
        self, coarse: Array, fine: Array, voxels: Voxels, merged: Coarse, *, scale: int, deterministic: bool
    ) -> Array:
        coarse = self.dense(self.features, name="projection")(self.norm(name="norm")(coarse))
        fine = self.dense(self.features, name="skip_projection")(self.norm(name="skip_norm")(fine))
        places, distances = nearest_voxels(voxels, merged.points, self.neighbors)
        fine = fine + interpolate(coarse, places, distances * scale)
        fine = axes.constrain_tokens(jnp.where(voxels.mask[..., None], fine, 0))
        if self.block is None:
            return fine
        call = functools.partial(_call_block, deterministic=deterministic)
        return remat.remat_block(call, self.remat)(self.block(name="block"), fine, voxels, None)


class _Stage(nn.Module):
    """A merging of voxels and a chain of blocks, each second one with shifted windows.

    Attributes:
      downsample: makes the merging; `None` for the first stage.
      block: makes a block.
      window_size: length of a window's side.
      rates: drop-path rate of each block.
      remat: what blocks compute anew in the backward pass.
    """

    downsample: Callable[..., nn.Module] | None
    block: Callable[..., nn.Module]
    window_size: int
    rates: tuple[float, ...]
    remat: bool | str

    @nn.compact
    def __call__(
        self, x: Array, voxels: Voxels, *, scale: int, deterministic: bool
    ) -> tuple[Array, Voxels, Coarse | None]:
        merged = None
        if self.downsample is not None:
            x, merged = self.downsample(name="downsample")(x, voxels, scale=scale)
            voxels = merged.voxels
        # Two sorts serve all blocks.
        shifts = (0, self.window_size // 2)
        cells = [window_cells(voxels.coordinates, voxels.mask, self.window_size, shift) for shift in shifts]
        call = functools.partial(_call_block, deterministic=deterministic)
        for index, rate in enumerate(self.rates):
            block = self.block(drop_path_rate=rate, shift_size=shifts[index % 2], name=f"blocks_{index}")
            x = remat.remat_block(call, self.remat)(block, x, voxels, cells[index % 2])
        return x, voxels, merged


def _call_block(block: nn.Module, x: Array, voxels: Voxels, cells: Cells | None, *, deterministic: bool) -> Array:
    return block(x, voxels.coordinates, voxels.signals, voxels.mask, cells, deterministic=deterministic)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: Swin3D) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`; the decoder is the last."""
    return pyramid_layer_ids(params, model.depths)


# Variants -------------------------------------------------------------------------------------------------------------


def _variant(width: int, head_dim: int, kinds: int, **fields: Any) -> dict[str, Any]:
    scene = (
        jax.ShapeDtypeStruct((1, 4096, 3 * kinds), jnp.float32),
        jax.ShapeDtypeStruct((1, 4096, 3), jnp.int32),
        jax.ShapeDtypeStruct((1, 4096, 3 * kinds), jnp.float32),
        jax.ShapeDtypeStruct((1, 4096), jnp.bool_),
    )
    widths = tuple(width * times for times in (1, 2, 4, 8, 8))
    return {
        "module": Swin3D,
        "inputs": scene,
        "embed_dim": widths,
        "num_heads": (width // head_dim, *(one // (2 * head_dim) for one in widths[1:])),
        "quant_sizes": (4, 8, 8)[:kinds],
        **fields,
    }


# As configured for ScanNet, with colours and normals, and for S3DIS, with colours.
VARIANTS: dict[str, dict[str, Any]] = {
    "swin3d_small": _variant(48, 8, 3),
    "swin3d_large": _variant(80, 8, 3),
    "swin3d_small_rgb": _variant(48, 8, 2, num_classes=13, strides=(2, 2, 2, 2)),
    "swin3d_large_rgb": _variant(80, 8, 2, num_classes=13, strides=(2, 2, 2, 2)),
}


# Reference checkpoints ------------------------------------------------------------------------------------------------

_BLOCK = {
    "norm1": "norm1",
    "attention/query": "attn.qkv.query",
    "attention/key": "attn.qkv.key",
    "attention/value": "attn.qkv.value",
    "attention/out": "attn.proj",
    "norm2": "norm2",
    "feed_forward/up": "mlp.fc1",
    "feed_forward/down": "mlp.fc2",
    **{
        f"attention/{of}_{name}_table": f"attn.{of}_{name}_table"
        for of in ("query", "key", "value")
        for name in _SIGNALS
    },
}

# See `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "official": {
        "patch_embed/kernel": "stem_layer.conv_layers.0.kernel",
        "patch_embed/norm": "stem_layer.conv_layers.1.bn",
        "patch_embed/norm/mean": "stem_layer.conv_layers.1.bn.running_mean",
        "patch_embed/norm/var": "stem_layer.conv_layers.1.bn.running_var",
        "stages/downsample/norm": "layers.{before}.downsample.norm",
        "stages/downsample/projection": "layers.{before}.downsample.linear",
        **{f"stages/blocks/{ours}": f"layers.{{stage}}.blocks.{{block}}.{theirs}" for ours, theirs in _BLOCK.items()},
        "upsamples/skip_norm": "upsamples.{upsample}.linear1.0",
        "upsamples/skip_projection": "upsamples.{upsample}.linear1.1",
        "upsamples/norm": "upsamples.{upsample}.linear2.0",
        "upsamples/projection": "upsamples.{upsample}.linear2.1",
        **{f"upsamples/block/{ours}": f"upsamples.{{upsample}}.block.blocks.0.{t}" for ours, t in _BLOCK.items()},
        "head_hidden": "classifier.0",
        "head_norm": "classifier.1",
        "head_norm/mean": "classifier.1.running_mean",
        "head_norm/var": "classifier.1.running_var",
        "head": "classifier.3",
    }
}


def from_reference(tensors: Mapping[str, Any], model: Swin3D, *, source: str = "official") -> dict[str, Any]:
    """Return variables of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for.
      source: a key of `REFERENCE_NAMES`: "official" for github.com/microsoft/Swin3D.

    Returns:
      The collections `params` and `batch_stats`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    if source not in REFERENCE_NAMES:
        raise ValueError(f"source={source!r} must be one of {sorted(REFERENCE_NAMES)}; pass one of them")
    table = REFERENCE_NAMES[source]
    stem = table["patch_embed/kernel"]
    if stem not in tensors:
        raise ValueError(f"a checkpoint of source={source!r} must hold {stem!r}; pass the source it comes from")
    plain: dict[str, Any] = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith("attn.qkv"):
            parts = zip(("query", "key", "value"), np.split(np.asarray(value), 3), strict=True)
            plain.update({f"{module}.{part}.{leaf}": rows for part, rows in parts})
        else:
            # MinkowskiEngine stores [places, in, out]; PyTorch's layout is what is read below.
            plain[name] = np.asarray(value).transpose(2, 1, 0) if name == stem else value
    scene = scene_inputs(model, np.shape(tensors[stem])[1])
    wanted = flax.traverse_util.flatten_dict(dialects.shapes_of(model, scene))
    # A norm's statistics have names beside those of its parameters, so the collections are read as one tree.
    joined = flax.traverse_util.unflatten_dict({path[1:]: leaf for path, leaf in wanted.items()})
    # PyTorch's batch norms also count their batches.
    read = reference.read_reference(plain, joined, table, ignored=("num_batches_tracked",))
    found = flax.traverse_util.flatten_dict(read)
    return flax.traverse_util.unflatten_dict({path: found[path[1:]] for path in wanted})


def scene_inputs(model: Swin3D, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return a small scene of voxels with so many features each."""
    return (
        jax.ShapeDtypeStruct((1, 8, channels), jnp.float32),
        jax.ShapeDtypeStruct((1, 8, 3), jnp.int32),
        jax.ShapeDtypeStruct((1, 8, 3 * len(model.quant_sizes)), jnp.float32),
        jax.ShapeDtypeStruct((1, 8), jnp.bool_),
    )


def reference_inputs(model: Swin3D) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return scene_inputs(model, 3 * len(model.quant_sizes))


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/microsoft/Swin3D",
        module=Swin3D,
        read=dialects.from_variables(from_reference, source="official"),
        marks=(r"^stem_layer\.conv_layers\.0\.kernel$", r"^layers\.0\.blocks\.0\.attn\.query_xyz_table$"),
        ignored=dialects.COUNTED,
        layout=dialects.table_layout(
            REFERENCE_NAMES["official"],
            shapes={"patch_embed/kernel": lambda model, ours: ours},
            fused=dict.fromkeys(("qkv.query", "qkv.key", "qkv.value"), "qkv"),
        ),
        head="classifier.3.weight",
    ),
)
