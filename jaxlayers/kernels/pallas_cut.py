"""Cutting a map into shifted windows, and joining them, as Pallas kernels for TPU.

A window of 7 x 7 lies in seven pieces of 7 places, none of which begins where a tile does. XLA copies the whole map
once for each axis that is rolled, and then up to three times to bring tokens together. Here a row of windows is in fast
memory, and each piece is read and written once at its place.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from jaxlayers.core import axes


def cut(
    x: Shaped[Array, "*batch height width features"],
    window: tuple[int, int],
    amount: tuple[int, int],
    factor: Float[Array, "*batch"] | None = None,
) -> Shaped[Array, "*batch windows tokens features"]:
    """Roll a map by minus `amount` and cut it into windows, row by row; both sides must be multiples of the window.

    Args:
      x: the map.
      window: size of a window.
      amount: the shift, less than the window.
      factor: what each example is multiplied by; no gradient goes to it. `None` = 1.
    """
    return _cut(window, amount, x, factor)


def cut_and_keep(
    x: Shaped[Array, "*batch height width features"], window: tuple[int, int], amount: tuple[int, int]
) -> tuple[Shaped[Array, "*batch windows tokens features"], Shaped[Array, "*batch height width features"]]:
    """Return `cut` of a map and the map itself, whose gradients are added while windows are joined, in one pass."""
    return _cut_and_keep(window, amount, x)


def join(
    windows: Shaped[Array, "*batch windows tokens features"],
    size: tuple[int, int],
    window: tuple[int, int],
    amount: tuple[int, int],
    *,
    onto: Shaped[Array, "*batch height width features"] | None = None,
    factor: Float[Array, "*batch"] | None = None,
) -> Shaped[Array, "*batch height width features"]:
    """Return the inverse of `cut` for a map of that size, times `factor`, and added to a map in one pass.

    Args:
      windows: what `cut` returns.
      size: of the map.
      window: as of `cut`.
      amount: as of `cut`.
      onto: a map of the dtype of the windows; `None` = 0.
      factor: of each example; no gradient goes to it. `None` = 1.
    """
    return _join(size, window, amount, windows, onto, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cut(window: tuple[int, int], amount: tuple[int, int], x: Any, factor: Any) -> Any:
    return _on_devices(functools.partial(_cut_here, window, amount), x.ndim - 3, x, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cut_and_keep(window: tuple[int, int], amount: tuple[int, int], x: Any) -> Any:
    return _cut(window, amount, x, None), x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _join(
    size: tuple[int, int], window: tuple[int, int], amount: tuple[int, int], windows: Any, onto: Any, factor: Any
) -> Any:
    local = functools.partial(_join_here, size, window, amount)
    return _on_devices(local, windows.ndim - 3, windows, onto, factor)


def _of_factor(factor: Any) -> Any:
    return None if factor is None else jnp.zeros_like(factor)


# Both only move entries, so that each is the other's transpose.
_cut.defvjp(
    lambda window, amount, x, factor: (_cut(window, amount, x, factor), (x.shape[-3:-1], factor)),
    lambda window, amount, kept, gradient: (
        _join(kept[0], window, amount, gradient, None, kept[1]),
        _of_factor(kept[1]),
    ),
)
_cut_and_keep.defvjp(
    lambda window, amount, x: (_cut_and_keep(window, amount, x), x.shape[-3:-1]),
    lambda window, amount, size, gradients: (_join(size, window, amount, *gradients, None),),
)
_join.defvjp(
    lambda size, window, amount, windows, onto, factor: (
        _join(size, window, amount, windows, onto, factor),
        (onto is None, factor),
    ),
    lambda size, window, amount, kept, gradient: (
        _cut(window, amount, gradient, kept[1]),
        None if kept[0] else gradient,
        _of_factor(kept[1]),
    ),
)


def _on_devices(local: Callable[..., Any], batch_ndim: int, *operands: Any) -> Any:
    """Return `local(*operands)` run by each device on its part of the batch, by the logical rules in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if not free:
        return local(*operands)
    found = axes.split(operands[0].shape[:1], axes.BATCH) if batch_ndim else ()
    spec = PartitionSpec(*(tuple(name for name in each if name in free) or None for each in found))
    # The results of a kernel bear no types that say over which axes they vary.
    return jax.shard_map(local, in_specs=spec, out_specs=spec, axis_names=free, check_vma=False)(*operands)


def _pieces(columns: int, width: int, shift: int) -> list[list[tuple[int, int, int]]]:
    """Return, of each window of a row, where its pieces begin in the map, in the window, and how long they are."""
    length = columns * width
    found = []
    for window in range(columns):
        start = (window * width + shift) % length
        first = min(width, length - start)
        found.append([(start, 0, first)] + ([(0, first, width - first)] if first < width else []))
    return found


def _cut_here(window: tuple[int, int], amount: tuple[int, int], x: Any, factor: Any) -> Any:
    *batch, height, width, features = x.shape
    rows, columns = height // window[0], width // window[1]
    flat = x.reshape(-1, height, width, features)
    tokens = math.prod(window)

    def kernel(*refs: Any) -> None:
        scale, (*maps, out, scratch) = _scale(refs, factor)
        for number, pieces in enumerate(_pieces(columns, window[1], amount[1])):
            for row in range(window[0]):
                below, place = divmod(row + amount[0], window[0])
                for start, at, length in pieces:
                    first = row * window[1] + at
                    piece = maps[below][0, place, start : start + length, :]
                    scratch[first : first + length, :] = piece.astype(jnp.float32)
            out[0, number] = scale(scratch[:tokens, :]).astype(out.dtype)

    def block(below: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, window[0], width, features), lambda image, row, *_: (image, (row + below) % rows, 0, 0))

    maps = [flat] * (2 if amount[0] else 1)
    out = _call(
        kernel,
        "cut_windows",
        maps,
        [block(below) for below in range(len(maps))],
        jax.ShapeDtypeStruct((len(flat), rows * columns, tokens, features), x.dtype),
        pl.BlockSpec((1, columns, tokens, features), lambda image, row, *_: (image, row, 0, 0)),
        (len(flat), rows),
        [pltpu.VMEM((-(-tokens // 8) * 8, features), jnp.float32)],
        factor,
    )
    return out.reshape(*batch, rows * columns, tokens, features)


def _join_here(
    size: tuple[int, int], window: tuple[int, int], amount: tuple[int, int], windows: Any, onto: Any, factor: Any
) -> Any:
    *batch, _, tokens, features = windows.shape
    rows, columns = size[0] // window[0], size[1] // window[1]
    flat = windows.reshape(-1, rows * columns, tokens, features)

    def kernel(*refs: Any) -> None:
        scale, (*cut, out, scratch) = _scale(refs, factor)
        for row in range(window[0]):
            # The first rows of a part of the map are the last ones of the windows above.
            above = row < amount[0]
            place = (row - amount[0]) % window[0]
            for number, pieces in enumerate(_pieces(columns, window[1], amount[1])):
                for start, at, length in pieces:
                    first = place * window[1] + at
                    piece = cut[int(above)][0, number, first : first + length, :]
                    scratch[start : start + length, :] = piece.astype(jnp.float32)
            joined = scale(scratch[: size[1], :])
            joined = joined if onto is None else joined + cut[-1][0, row].astype(jnp.float32)
            out[0, row] = joined.astype(out.dtype)

    def block(above: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, columns, tokens, features), lambda image, row, *_: (image, (row - above) % rows, 0, 0))

    whole = pl.BlockSpec((1, window[0], size[1], features), lambda image, row, *_: (image, row, 0, 0))
    cuts = [flat] * (2 if amount[0] else 1)
    maps = [] if onto is None else [onto.reshape(-1, *size, features)]
    out = _call(
        kernel,
        "join_windows",
        cuts + maps,
        [block(above) for above in range(len(cuts))] + [whole] * len(maps),
        jax.ShapeDtypeStruct((len(flat), *size, features), windows.dtype),
        whole,
        (len(flat), rows),
        [pltpu.VMEM((-(-size[1] // 8) * 8, features), jnp.float32)],
        factor,
    )
    return out.reshape(*batch, *size, features)


def _scale(refs: Sequence[Any], factor: Any) -> tuple[Callable[[Any], Any], Sequence[Any]]:
    """Return what multiplies by the factor of the example in work, and the references that are not to factors."""
    if factor is None:
        return lambda x: x, refs
    example = refs[0][pl.program_id(0)]
    return lambda x: x * example, refs[1:]


def _call(
    kernel: Callable[..., None],
    name: str,
    operands: Sequence[Any],
    in_specs: Sequence[pl.BlockSpec],
    result: Any,
    out_spec: pl.BlockSpec,
    grid: tuple[int, int],
    scratch: Sequence[Any],
    factor: Any,
) -> Any:
    scalars = [] if factor is None else [factor.reshape(-1).astype(jnp.float32)]
    moved = 2 * math.prod(result.shape) * result.dtype.itemsize
    run = functools.partial(
        pl.pallas_call,
        kernel,
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=list(in_specs),
            out_specs=out_spec,
            scratch_shapes=list(scratch),
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        name=name,
    )
    # Which of the two is lowered is known only then: code for a TPU may be compiled where there is none.
    return jax.lax.platform_dependent(*scalars, *operands, cpu=run(interpret=True), tpu=run())
