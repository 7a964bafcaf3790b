"""Voxels in padded lists: sorting them into cells, looking them up, pooling and nearest neighbours.

A scene is a list of occupied voxels with room for more, and a mask of the true ones, so that one compiled program
serves every scene that fits. Nothing here makes a dense grid: memory is linear in the length of the list. Integer
coordinates and the place within a voxel are kept apart and only differences between voxels become floating point, so
that moving a whole scene by whole cells changes nothing, to the bit. The functions are compiled as a whole also where
the caller is not, since one by one their many small steps would be slow.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxlayers.core.dtypes import at_least_float32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["coordinates", "signals", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Voxels:
    """A padded list of voxels.

    Attributes:
      coordinates: integers `[*batch, voxels, 3]`; those of true voxels of one scene all differ.
      signals: what is known of each voxel `[*batch, voxels, signals]`; the first three are the place of its point
        within the voxel, from 0 to 1 along each axis.
      mask: true for voxels, false for padding `[*batch, voxels]`.
    """

    coordinates: Any
    signals: Any
    mask: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["order", "place", "index", "count", "largest"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cells:
    """A list sorted into the cells of a grid. Cells are numbered in the lexicographic order of their coordinates.

    Attributes:
      order: which voxel stands at each place of the sorted list, padding last `[*batch, voxels]`.
      place: at which place each voxel stands, the inverse of `order` `[*batch, voxels]`.
      index: number of each voxel's cell, -1 for padding `[*batch, voxels]`.
      count: number of cells that hold a voxel `[*batch]`.
      largest: most voxels in one cell `[*batch]`.
    """

    order: Any
    place: Any
    index: Any
    count: Any
    largest: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["voxels", "points", "index", "count"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Coarse:
    """What `downsample_voxels` returns.

    Attributes:
      voxels: one voxel a cell, sorted, in units of the cells.
      points: the fine voxel that speaks for each cell, in units of the fine grid: coordinates, signals and mask.
      index: number of the cell of each fine voxel, -1 for padding and for cells beyond the capacity.
      count: number of cells that hold a voxel, which may exceed the capacity `[*batch]`.
    """

    voxels: Voxels
    points: Voxels
    index: Any
    count: Any


def take(x: Shaped[Array, "*batch voxels features"], index: Int[Array, "*batch places"]) -> Shaped[Array, "..."]:
    """Return `x` at the given places, `[*batch, places, features]`; -1 gives the first entry."""
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=-2, mode="clip")


@jax.jit
def sort_into_cells(cells: Int[Array, "*batch voxels 3"], mask: Bool[Array, "*batch voxels"]) -> Cells:
    """Sort a list by the cells that its entries lie in.

    Args:
      cells: coordinates of the cell of each entry; the entries' own coordinates sort the list itself.
      mask: true for entries, false for padding.

    Returns:
      The sorted list. Entries of one cell keep their order.
    """
    cells = jnp.where(mask[..., None], cells, 0).astype(jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)
    keys = [(~mask).astype(jnp.int32), *(cells[..., axis] for axis in range(3))]
    *keys, order = jax.lax.sort((*keys, numbers), dimension=-1, is_stable=True, num_keys=4)
    stacked = jnp.stack(keys, axis=-1)
    changes = jnp.any(stacked[..., 1:, :] != stacked[..., :-1, :], axis=-1)
    first = jnp.concatenate([jnp.ones_like(mask[..., :1]), changes], axis=-1) & (keys[0] == 0)
    number = jnp.where(keys[0] == 0, jnp.cumsum(first.astype(jnp.int32), axis=-1) - 1, -1)
    start = jax.lax.cummax(jnp.where(first, numbers, 0), axis=mask.ndim - 1)
    sizes = jnp.where(number >= 0, numbers - start + 1, 0)
    place = jnp.argsort(order, axis=-1).astype(jnp.int32)
    return Cells(
        order=order,
        place=place,
        index=jnp.take_along_axis(number, place, axis=-1),
        count=jnp.max(number, axis=-1, initial=-1) + 1,
        largest=jnp.max(sizes, axis=-1, initial=0),
    )


def window_cells(
    coordinates: Int[Array, "*batch voxels 3"], mask: Bool[Array, "*batch voxels"], window: int, shift: int = 0
) -> Cells:
    """Sort voxels into cubic windows.

    Windows do not wrap, so a shifted window needs no mask: its voxels are all neighbours.

    Args:
      coordinates: of the voxels.
      mask: true for voxels, false for padding.
      window: length of the windows' sides, in voxels.
      shift: added to the coordinates before they are divided.

    Returns:
      The windows as cells.

    Raises:
      ValueError: if the window is not positive.
    """
    if window < 1:
        raise ValueError(f"window={window} must be positive; set window")
    return sort_into_cells(jnp.floor_divide(coordinates + shift, window), mask)


@jax.jit
def find_voxels(
    coordinates: Int[Array, "*batch voxels 3"],
    mask: Bool[Array, "*batch voxels"],
    queries: Int[Array, "*batch queries 3"],
) -> Int[Array, "*batch queries"]:
    """Return the place of each queried voxel in a sorted list, -1 where it is not in the list.

    Args:
      coordinates: of voxels in lexicographic order with the padding last, as `sort_into_cells` leaves them.
      mask: true for voxels, false for padding.
      queries: coordinates to look up.

    Returns:
      Places, found by bisection.
    """
    count = jnp.broadcast_to(jnp.sum(mask, axis=-1, dtype=jnp.int32)[..., None], queries.shape[:-1])

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        here = take(coordinates, middle)
        lower, equal = here < queries, here == queries
        before = lower[..., 0] | equal[..., 0] & (lower[..., 1] | equal[..., 1] & lower[..., 2])
        before = before & (low < high)
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

    low, _ = jax.lax.fori_loop(0, mask.shape[-1].bit_length(), halve, (jnp.zeros_like(count), count))
    found = (low < count) & jnp.all(take(coordinates, low) == queries, axis=-1)
    return jnp.where(found, low, -1)


@functools.partial(jax.jit, static_argnames=("size", "capacity"))
def voxelize(
    points: Float[Array, "*batch points 3"],
    attributes: Float[Array, "*batch points attributes"],
    size: float,
    capacity: int,
    mask: Bool[Array, "*batch points"] | None = None,
) -> tuple[Voxels, Int[Array, "*batch points"], Int[Array, "*batch"]]:
    """Gather points into voxels.

    Args:
      points: positions.
      attributes: colours, normals or anything else that may be averaged.
      size: length of a voxel's side, in the unit of the points.
      capacity: length of the list of voxels.
      mask: true for points, false for padding; `None` takes all.

    Returns:
      The voxels, sorted, whose signals are the mean place of their points within the voxel and the mean attributes;
      the number of each point's voxel, -1 for padding and beyond the capacity; and how many voxels there are, which
      exceeds the capacity where it is too small.

    Raises:
      ValueError: if size or capacity are not positive.
    """
    if size <= 0 or capacity < 1:
        raise ValueError(f"size={size} and capacity={capacity} must be positive; set both")
    mask = jnp.ones(points.shape[:-1], bool) if mask is None else mask
    scaled = points.astype(at_least_float32(points.dtype)) / size
    corner = jnp.floor(scaled)
    coordinates = corner.astype(jnp.int32)
    cells = sort_into_cells(coordinates, mask)
    index = jnp.where(cells.index < capacity, cells.index, -1)
    known = jnp.concatenate([scaled - corner, attributes.astype(scaled.dtype)], axis=-1)
    first = _pool("min", jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape), index, capacity)
    held = jnp.arange(capacity) < cells.count[..., None]
    voxels = Voxels(
        coordinates=jnp.where(held[..., None], take(coordinates, first), 0),
        signals=mean_by_cell(known, index, capacity).astype(points.dtype),
        mask=held,
    )
    return voxels, index, cells.count


def mean_by_cell(
    x: Float[Array, "*batch voxels features"], index: Int[Array, "*batch voxels"], capacity: int
) -> Float[Array, "*batch capacity features"]:
    """Return the mean of the entries with each number, zero where there is none; entries of number -1 do not count."""
    total = _pool("add", x, index, capacity)
    count = _pool("add", jnp.ones_like(index), index, capacity)
    return total / jnp.maximum(count, 1).astype(total.dtype)[..., None]


def max_by_cell(
    x: Float[Array, "*batch voxels features"], index: Int[Array, "*batch voxels"], capacity: int
) -> Float[Array, "*batch capacity features"]:
    """Return the largest of the entries with each number, zero where there is none.

    Several largest ones share the gradient equally.
    """
    largest = _pool("max", jax.lax.stop_gradient(x), index, capacity)
    # The scatter of a maximum has no derivative; the mean of the largest entries has.
    ties = (x == take(largest, index)).astype(x.dtype)
    return _pool("add", x * ties, index, capacity) / jnp.maximum(_pool("add", ties, index, capacity), 1)


def _pool(how: str, x: Array, index: Array, capacity: int) -> Array:
    """Combine the entries of `x` `[*batch, voxels, *rest]` that share a number; number -1 is left out."""
    empty = {"add": 0, "min": jnp.iinfo(jnp.int32).max, "max": -jnp.inf}[how]

    def one(x: Array, index: Array) -> Array:
        start = jnp.full((capacity, *x.shape[1:]), empty, x.dtype)
        return getattr(start.at[jnp.where(index < 0, capacity, index)], how)(x, mode="drop")

    for _ in range(index.ndim - 1):
        one = jax.vmap(one)
    return one(x, index)


@functools.partial(jax.jit, static_argnames=("stride", "capacity", "scale"))
def downsample_voxels(voxels: Voxels, stride: int, capacity: int, scale: int = 1) -> Coarse:
    """Merge the voxels of each cell of `stride`^3 into one, which keeps the signals of one of them.

    That is the voxel nearest to the mean of its cell, in position and all other signals together; of several the
    first.

    Args:
      voxels: the fine voxels, sorted.
      stride: length of a cell's side, in fine voxels.
      capacity: length of the list of cells; as many as there are fine voxels always suffice.
      scale: what a fine voxel's side weighs beside the other signals, such as its length in voxels of the input.

    Returns:
      The coarse voxels, how they hang together with the fine ones, and how many there are.

    Raises:
      ValueError: if stride or capacity are not positive.
    """
    if stride < 1 or capacity < 1:
        raise ValueError(f"stride={stride} and capacity={capacity} must be positive; set both")
    coordinates = voxels.coordinates
    corner = jnp.floor_divide(coordinates, stride)
    cells = sort_into_cells(corner, voxels.mask)
    index = jnp.where(cells.index < capacity, cells.index, -1)
    signals = voxels.signals.astype(at_least_float32(voxels.signals.dtype))
    within = (coordinates - stride * corner).astype(signals.dtype) + signals[..., :3]
    known = jnp.concatenate([within * scale, signals[..., 3:]], axis=-1)
    distance = jnp.sum(jnp.square(known - take(mean_by_cell(known, index, capacity), index)), axis=-1)
    nearest = -_pool("max", -distance, index, capacity)
    numbers = jnp.broadcast_to(jnp.arange(index.shape[-1], dtype=jnp.int32), index.shape)
    # With some room, for the two voxels of a cell are equally near but for rounding.
    chosen = distance <= take(nearest[..., None], index)[..., 0] * (1 + 1e-4)
    place = _pool("min", numbers, jnp.where(chosen, index, -1), capacity)
    held = jnp.arange(capacity) < cells.count[..., None]
    place = jnp.where(held, place, 0)
    point_signals = take(voxels.signals, place)
    coarse_signals = jnp.concatenate(
        [(take(within, place) / stride).astype(point_signals.dtype), point_signals[..., 3:]], axis=-1
    )
    return Coarse(
        voxels=Voxels(jnp.where(held[..., None], take(corner, place), 0), coarse_signals, held),
        points=Voxels(take(coordinates, place), point_signals, held),
        index=index,
        count=cells.count,
    )


@functools.partial(jax.jit, static_argnames=("neighbors", "chunk"))
def nearest_voxels(
    queries: Voxels, keys: Voxels, neighbors: int, *, chunk: int = 128
) -> tuple[Int[Array, "*batch queries neighbors"], Float[Array, "*batch queries neighbors"]]:
    """Return the nearest voxels of each queried one, by the distance of their points, nearest first.

    Exact. Keys are taken in runs of `chunk` of the sorted list, nearest bounding box first, until no box that is left
    is nearer than the farthest neighbour found, for a run of queries at a time. Memory is linear in the length of
    the lists; time is so as well where runs are compact, and quadratic at worst. No gradient runs through it.

    Args:
      queries: voxels whose neighbours are wanted, and keys:
      keys: voxels among which they are sought, both in the same unit.
      neighbors: how many.
      chunk: length of a run.

    Returns:
      Places in the list of keys, and distances. Of equally near voxels the first in the list comes first; where there
      are fewer than `neighbors`, the place is -1 and the distance infinite.

    Raises:
      ValueError: if neighbors or chunk are not positive.
    """
    if neighbors < 1 or chunk < 1:
        raise ValueError(f"neighbors={neighbors} and chunk={chunk} must be positive; set both")

    def one(queries: tuple[Array, ...], keys: tuple[Array, ...]) -> tuple[Array, Array]:
        runs = jax.tree.map(functools.partial(_cut, chunk=chunk), queries)
        key_runs = jax.tree.map(functools.partial(_cut, chunk=chunk), keys)
        search = functools.partial(_search, keys=key_runs, boxes=jax.vmap(_box)(*key_runs), neighbors=neighbors)
        found = jax.vmap(search)(runs)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, neighbors)[: queries[0].shape[0]], found)

    for _ in range(queries.mask.ndim - 1):
        one = jax.vmap(one)
    return one(_points(queries), _points(keys))


def _points(voxels: Voxels) -> tuple[Array, Array, Array]:
    within = jax.lax.stop_gradient(voxels.signals[..., :3])
    return voxels.coordinates, within.astype(at_least_float32(within.dtype)), voxels.mask


def _cut(x: Array, chunk: int) -> Array:
    """Cut the first axis into runs, the last filled up with zeros."""
    padding = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, chunk, *x.shape[1:])


def _box(coordinates: Array, within: Array, mask: Array) -> tuple[Array, ...]:
    """Return the bounds of coordinates and of places within, apart, and whether there is any voxel."""
    mask = mask[..., None]
    limits = jnp.iinfo(jnp.int32)
    return (
        jnp.min(jnp.where(mask, coordinates, limits.max), axis=0),
        jnp.max(jnp.where(mask, coordinates, limits.min), axis=0),
        jnp.min(jnp.where(mask, within, jnp.inf), axis=0),
        jnp.max(jnp.where(mask, within, -jnp.inf), axis=0),
        jnp.any(mask),
    )


def _search(
    queries: tuple[Array, ...], keys: tuple[Array, ...], boxes: tuple[Array, ...], neighbors: int
) -> tuple[Array, Array]:
    """Search the neighbours of one run of queries among the runs of keys."""
    coordinates, within, mask = queries
    dtype, (runs, chunk) = within.dtype, keys[2].shape
    low, high, low_within, high_within, any_query = _box(*queries)
    key_low, key_high, key_low_within, key_high_within, any_key = boxes
    gaps = jnp.maximum(
        (key_low - high).astype(dtype) + key_low_within - high_within,
        (low - key_high).astype(dtype) + low_within - key_high_within,
    )
    # A shade less, so that rounding never leaves a neighbour out.
    near = (1 - 1e-5) * jnp.sum(jnp.square(jnp.maximum(gaps, 0)), axis=-1)
    near = jnp.where(any_key & any_query, near, jnp.inf)
    turn = jnp.argsort(near)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        step, distance, _ = state
        box = near[turn[jnp.minimum(step, runs - 1)]]
        return (step < runs) & (box < jnp.inf) & (box <= jnp.max(jnp.where(mask, distance[:, -1], -1.0)))

    def merge(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, distance, place = state
        run = turn[step]
        key_coordinates, key_within, key_mask = (leaf[run] for leaf in keys)
        difference = (key_coordinates - coordinates[:, None]).astype(dtype) + (key_within - within[:, None])
        new = jnp.where(key_mask, jnp.sum(jnp.square(difference), axis=-1), jnp.inf)
        numbers = jnp.broadcast_to(run * chunk + jnp.arange(chunk, dtype=jnp.int32), new.shape)
        both = jnp.concatenate([distance, new], axis=-1), jnp.concatenate([place, numbers], axis=-1)
        distance, place = (leaf[:, :neighbors] for leaf in jax.lax.sort(both, dimension=-1, num_keys=2))
        return step + 1, distance, place

    start = (
        jnp.zeros((), jnp.int32),
        jnp.full((mask.shape[0], neighbors), jnp.inf, dtype),
        jnp.full((mask.shape[0], neighbors), jnp.iinfo(jnp.int32).max),
    )
    _, distance, place = jax.lax.while_loop(unfinished, merge, start)
    return jnp.where(distance < jnp.inf, place, -1), jnp.sqrt(distance)


def interpolate(
    x: Float[Array, "*batch keys features"],
    places: Int[Array, "*batch queries neighbors"],
    distances: Float[Array, "*batch queries neighbors"],
    *,
    epsilon: float = 1e-8,
) -> Float[Array, "*batch queries features"]:
    """Return the mean of each query's neighbours, weighted by 1 / (distance + epsilon); zero without neighbours.

    Args:
      x: features of the keys.
      places: places of the neighbours, -1 for none, as `nearest_voxels` returns them.
      distances: how far they are.
      epsilon: keeps the weight of a neighbour at distance zero finite.
    """
    weights = jnp.where(places < 0, 0.0, 1.0 / (distances + epsilon))
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    neighbors = places.shape[-1]
    taken = (
        take(x, places[..., neighbor]) * weights[..., neighbor, None].astype(x.dtype) for neighbor in range(neighbors)
    )
    return functools.reduce(jnp.add, taken)
