"""Neighbours of points as dense lists of a static size: nearest, within a radius, periodic, everyone.

Lists are found once and hold indices, so nothing is differentiated through the choice: gradients flow through
`gather` and `displacements` only. A point with a NaN coordinate counts as a neighbour of every point and has every
point for a neighbour, first in the lists, so that NaN comes out of whatever is computed from them.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxlayers.core.dtypes import at_least_float32

# Rounding of fractional coordinates that may move a point to the next image.
_SLACK = 1e-3


class Neighbours(NamedTuple):
    """Lists of neighbours, padded to `k` entries.

    Attributes:
      indices: of the neighbours among the points; 0 where there is none.
      mask: True = a neighbour, False = padding.
      shifts: in a periodic cell the lattice vector from the point to the image that is meant; 0 where there is none.
    """

    indices: Int[Array, "*batch points k"]
    mask: Bool[Array, "*batch points k"]
    shifts: Float[Array, "*batch points k d"] | None = None


def k_nearest(
    positions: Float[Array, "*batch points d"],
    k: int,
    *,
    mask: Bool[Array, "*batch points"] | None = None,
    queries: Float[Array, "*batch queries d"] | None = None,
    include_self: bool = False,
    chunk: int | None = None,
) -> Neighbours:
    """Return the k nearest points of every point, nearest first.

    Of points at equal distance the one of lower index comes first. Distances are compared as computed: rounding may
    order points differently after a motion of the cloud where they are equal up to rounding.

    Args:
      positions: the points.
      k: size of the lists, positive; entries beyond the number of points there are stay masked.
      mask: True = a point, False = padding, which is nobody's neighbour and has none.
      queries: other points to find the neighbours of; a list each. None of the points is left out then.
      include_self: count a point itself, as the first of its list.
      chunk: points whose lists are found at a time, so that memory grows with `chunk` times the points and not with
        their square; `None` = all. They are spread evenly over the cloud: such as are split over devices stay there.

    Returns:
      Lists `[*batch, points, k]` (`[*batch, queries, k]`).

    Raises:
      ValueError: on a k or a chunk that is not positive, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.ops.neighbours import k_nearest
      >>> k_nearest(jnp.array([[0.0], [1.0], [3.0]]), 2).indices.tolist()
      [[1, 2], [0, 2], [1, 0]]
    """
    if k < 1:
        raise ValueError(f"k={k} must be positive; ask for at least one neighbour")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be positive, or None for all points at once; set chunk")
    _check(positions, mask)
    if queries is not None and (
        queries.ndim != positions.ndim
        or (*queries.shape[:-2], queries.shape[-1]) != (*positions.shape[:-2], positions.shape[-1])
    ):
        raise ValueError(
            f"queries of shape {queries.shape} must share batch axes and dimension with positions {positions.shape}; "
            "reshape them"
        )
    return _k_nearest(positions, k, mask, queries, include_self, chunk)


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _k_nearest(
    positions: jax.Array,
    k: int,
    mask: jax.Array | None,
    queries: jax.Array | None,
    include_self: bool,
    chunk: int | None,
) -> Neighbours:
    points = jax.lax.stop_gradient(positions)
    centres = points if queries is None else jax.lax.stop_gradient(queries)
    axis, count = centres.ndim - 2, centres.shape[-2]

    def lists(centres: jax.Array, places: jax.Array, asked: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        rank = _rank(centres[..., :, None, :], points[..., None, :, :])
        if queries is None:
            itself = places[:, None] == jnp.arange(points.shape[-2])
            rank = jnp.where(itself, -2 if include_self else jnp.inf, rank)
            rank = _only(rank, asked)
        if mask is not None:
            rank = jnp.where(mask[..., None, :], rank, jnp.inf)
        return _smallest(rank, k)

    every = centres, jnp.arange(count), mask
    if chunk is None or chunk >= count:
        return Neighbours(*lists(*every))
    chunks = -(-count // chunk)
    size = -(-count // chunks)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.pad(x, [(0, size * chunks - count if at == axis else 0) for at in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], size, chunks, *x.shape[axis + 1 :]), axis + 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis + 1)
        x = x.reshape(*x.shape[:axis], size * chunks, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, count, axis=axis)

    # The mask is one of the points asked for only where these are the points.
    parts = (cut(centres, axis), cut(every[1], 0), None if mask is None or queries is not None else cut(mask, axis))
    return Neighbours(*(join(x) for x in jax.lax.map(lambda part: lists(*part), parts)))


def within_radius(
    positions: Float[Array, "*batch points d"],
    radius: float,
    capacity: int,
    *,
    mask: Bool[Array, "*batch points"] | None = None,
    cell: Float[Array, "*cells d d"] | Float[np.ndarray, "*cells d d"] | None = None,
    images: int | None = None,
) -> Neighbours:
    """Return the points at a distance of at most `radius`, nearest first, without the point itself.

    In a periodic cell every image within the radius is an entry of its own, images of the point itself included.
    Entries beyond the capacity are left out, the farthest ones: `count_within_radius` tells how many there were. Ties
    as in `k_nearest`; images of one point at equal distance in the order of their lattice coordinates.

    Args:
      positions: the points, in the cell or out of it.
      radius: in the unit of the positions, positive.
      capacity: size of the lists, positive.
      mask: True = a point, False = padding, which is nobody's neighbour and has none.
      cell: lattice vectors as rows, of any angles; `None` is open space.
      images: how many cells to look in each way beyond the nearest image of a point; `None` takes what `cell` and
        `radius` need, see `images_within`. To be given where the cell is traced.

    Returns:
      Lists `[*batch, points, capacity]`. Their shifts can be differentiated with respect to the cell.

    Raises:
      ValueError: on a radius or capacity that is not positive, shapes that do not fit, a flat cell, or a traced cell
        without `images`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.ops.neighbours import within_radius
      >>> found = within_radius(jnp.array([[0.0], [0.9]]), 0.5, capacity=1, cell=jnp.eye(1))
      >>> found.indices.tolist(), found.shifts.tolist()
      ([[1], [0]], [[[-1.0]], [[1.0]]])
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be positive; ask for at least one neighbour")
    cell, images = _check_radius(positions, radius, mask, cell, images)
    return _within_radius(positions, float(radius), capacity, mask, cell, images)


@functools.partial(jax.jit, static_argnums=(1, 2, 5))
def _within_radius(
    positions: jax.Array, radius: float, capacity: int, mask: jax.Array | None, cell: jax.Array | None, images: int
) -> Neighbours:
    rank, offsets = _ranks_within(positions, radius, mask, cell, images)
    indices, found = _smallest(rank, capacity)
    if cell is None or offsets is None:
        return Neighbours(indices, found)
    per_point = offsets.shape[-2] // positions.shape[-2]
    chosen = jnp.take_along_axis(offsets, indices[..., None], axis=-2)
    chosen = jnp.where(found[..., None], chosen, 0)
    dtype = at_least_float32(positions.dtype)
    shifts = jnp.einsum("...pki,...id->...pkd", chosen.astype(dtype), cell.astype(dtype), precision="highest")
    return Neighbours(indices // per_point, found, shifts.astype(positions.dtype))


def count_within_radius(
    positions: Float[Array, "*batch points d"],
    radius: float,
    *,
    mask: Bool[Array, "*batch points"] | None = None,
    cell: Float[Array, "*cells d d"] | Float[np.ndarray, "*cells d d"] | None = None,
    images: int | None = None,
) -> Int[Array, "*batch points"]:
    """Return how many neighbours `within_radius` would find with room for all.

    `count - capacity`, where positive, is the number of neighbours that did not fit; the largest count of the data is
    the capacity to choose.

    Args:
      positions: as there.
      radius: as there.
      mask: as there.
      cell: as there.
      images: as there.

    Returns:
      A number for each point; 0 for padding.

    Raises:
      ValueError: as there.
    """
    cell, images = _check_radius(positions, radius, mask, cell, images)
    return _count(positions, float(radius), mask, cell, images)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _count(
    positions: jax.Array, radius: float, mask: jax.Array | None, cell: jax.Array | None, images: int
) -> jax.Array:
    rank, _ = _ranks_within(positions, radius, mask, cell, images)
    return jnp.sum(rank < jnp.inf, axis=-1)


def images_within(cell: Float[Array, "*cells d d"] | Float[np.ndarray, "*cells d d"], radius: float) -> int:
    """Return how many cells beyond the nearest image have to be looked at each way: 0 up to half the least height.

    The nearest image along each lattice vector is at most half a cell away, so floor(radius / height + 1 / 2) further
    ones each way hold all points within the radius, where a height is the distance between two opposite faces.

    Args:
      cell: lattice vectors as rows, concrete.
      radius: in the same unit.

    Returns:
      The number, the largest that any cell of the batch needs along any of its vectors.

    Raises:
      ValueError: on a traced or flat cell.
    """
    if isinstance(cell, jax.core.Tracer):
        raise ValueError(
            f"cell {cell.aval} is traced, so how many images lie within radius={radius} is unknown; "
            "pass images=images_within(cell, radius) of the concrete cell"
        )
    rows = np.asarray(cell, np.float64)
    volume = np.abs(np.linalg.det(rows))
    size = np.prod(np.linalg.norm(rows, axis=-1), axis=-1)
    if not np.all(volume > 1e-9 * size):
        raise ValueError(f"cell={rows.tolist()} must have independent rows; give a lattice vector for each dimension")
    heights = 1 / np.linalg.norm(np.linalg.inv(rows), axis=-2)
    return math.floor(radius / float(np.min(heights, initial=math.inf)) + 0.5 + _SLACK)


def _ranks_within(
    positions: jax.Array, radius: float, mask: jax.Array | None, cell: jax.Array | None, images: int
) -> tuple[jax.Array, jax.Array | None]:
    """Return ranks `[*batch, points, points x images]`, infinite where no neighbour, and lattice offsets of each."""
    points = jax.lax.stop_gradient(positions)
    points = points.astype(at_least_float32(points.dtype))
    count, d = points.shape[-2:]
    itself = jnp.eye(count, dtype=bool)
    if cell is None:
        rank = _rank(points[..., :, None, :], points[..., None, :, :])
        offsets = None
    else:
        rows = jax.lax.stop_gradient(cell).astype(points.dtype)
        difference = points[..., None, :, :] - points[..., :, None, :]
        fractions = jnp.einsum("...qpd,...di->...qpi", difference, jnp.linalg.inv(rows), precision="highest")
        nearest = -jnp.round(fractions)
        steps = np.array(list(itertools.product(range(-images, images + 1), repeat=d)), np.float64)
        offsets = nearest[..., None, :] + jnp.asarray(steps, points.dtype)
        vectors = jnp.einsum("...qpmi,...id->...qpmd", offsets, rows, precision="highest")
        rank = _rank(difference[..., None, :], -vectors)
        itself = itself[:, :, None] & jnp.all(offsets == 0, axis=-1)
    rank = jnp.where((rank <= radius * radius) & ~itself, rank, jnp.inf)
    if offsets is not None:
        if mask is not None:
            rank = jnp.where(mask[..., None, :, None], rank, jnp.inf)
        rank = rank.reshape(*rank.shape[:-2], -1)
        offsets = jnp.nan_to_num(offsets).reshape(*rank.shape, d)
    elif mask is not None:
        rank = jnp.where(mask[..., None, :], rank, jnp.inf)
    return _only(rank, mask), offsets


def _rank(centres: jax.Array, points: jax.Array) -> jax.Array:
    """Return squared distances, and -1 for NaN: such points come first."""
    dtype = at_least_float32(points.dtype)
    squared = jnp.sum(jnp.square(points.astype(dtype) - centres.astype(dtype)), axis=-1)
    return jnp.where(jnp.isnan(squared), -1, squared)


def _only(rank: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Leave the lists of padding empty."""
    return rank if mask is None else jnp.where(mask[..., :, None], rank, jnp.inf)


def _smallest(rank: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the indices of the k smallest ranks in rising order, and which of them are finite."""
    kept = min(k, rank.shape[-1])
    values, indices = jax.lax.top_k(-rank, kept)  # Of equal values the first comes first.
    found = values > -jnp.inf
    missing = [(0, 0)] * (rank.ndim - 1) + [(0, k - kept)]
    return jnp.pad(jnp.where(found, indices, 0), missing), jnp.pad(found, missing)


def everyone(points: Bool[Array, "*batch points"] | int) -> Neighbours:
    """Return all other points as neighbours, by index.

    Args:
      points: mask of the points (True = a point, False = padding), or their number.

    Returns:
      Lists `[*batch, points, points - 1]`.

    Raises:
      ValueError: on a number that is not positive or a mask without an axis.

    Example:
      >>> from jaxlayers.ops.neighbours import everyone
      >>> everyone(3).indices.tolist()
      [[1, 2], [0, 2], [0, 1]]
    """
    if isinstance(points, int):
        if points < 1:
            raise ValueError(f"points={points} must be positive; give the number of points or their mask")
        mask = jnp.ones(points, bool)
    else:
        mask = points
    if mask.ndim < 1:
        raise ValueError(f"mask of shape {mask.shape} must be [*batch, points]; add an axis")
    count = mask.shape[-1]
    others = jnp.arange(count - 1)
    indices = others + (others >= jnp.arange(count)[:, None])
    found = mask[..., indices] & mask[..., :, None]
    return Neighbours(jnp.where(found, indices, 0), found)


def gather(values: Shaped[Array, "..."], indices: Int[Array, "*batch queries k"]) -> Shaped[Array, "..."]:
    """Return what each neighbour has, `values[b, indices[b, i, j]]`.

    Args:
      values: `[*batch, points, *features]` with the batch axes of the indices.
      indices: of `Neighbours`. What masked entries give is that of point 0: mask it.

    Returns:
      `[*batch, queries, k, *features]`.

    Raises:
      ValueError: if the values do not begin with the batch axes of the indices and an axis of points.
    """
    batch = indices.ndim - 2
    if batch < 0 or values.ndim < batch + 1 or values.shape[:batch] != indices.shape[:batch]:
        raise ValueError(
            f"values of shape {values.shape} must begin with the batch axes of indices {indices.shape} and an axis of "
            "points; reshape or broadcast one of them"
        )
    if values.shape[batch] == 0:
        raise ValueError(f"values of shape {values.shape} have no points to take from; pad them to at least one")
    take = lambda x, index: x[index]  # noqa: E731
    for _ in range(batch):
        take = jax.vmap(take)
    return take(values, indices)


def displacements(
    positions: Float[Array, "*batch points d"],
    neighbours: Neighbours,
    *,
    queries: Float[Array, "*batch queries d"] | None = None,
) -> Float[Array, "*batch queries k d"]:
    """Return x_j + shift - x_i for each neighbour j of each point i; zero for masked entries.

    Args:
      positions: the points.
      neighbours: their lists.
      queries: the points x_i that the lists belong to; `None` for the positions themselves.

    Returns:
      The vectors, in the dtype of the positions.

    Raises:
      ValueError: if lists and points do not fit.
    """
    centres = positions if queries is None else queries
    if neighbours.indices.shape[:-1] != centres.shape[:-1]:
        raise ValueError(
            f"neighbours of shape {neighbours.indices.shape} must be lists [*batch, points, k] of the points "
            f"{centres.shape}; find them for these points"
        )
    vectors = gather(positions, neighbours.indices) - centres[..., :, None, :]
    if neighbours.shifts is not None:
        vectors = vectors + neighbours.shifts.astype(vectors.dtype)
    return jnp.where(neighbours.mask[..., None], vectors, 0)


def farthest_points(
    positions: Float[Array, "*batch points d"],
    count: int,
    *,
    mask: Bool[Array, "*batch points"] | None = None,
) -> Int[Array, "*batch count"]:
    """Return a spread-out choice of points, each the farthest from those chosen before it.

    The first is the farthest from the centroid, so the choice moves with the cloud and its order does not matter, but
    for ties, which the lower index wins (regular polyhedra are all ties). Where points run out, they come again.

    Args:
      positions: the points.
      count: how many, positive.
      mask: True = a point, False = padding, which is chosen only where there is no point at all.

    Returns:
      Indices of the chosen ones, in the order of choice.

    Raises:
      ValueError: on a count that is not positive, no points, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.ops.neighbours import farthest_points
      >>> farthest_points(jnp.array([[0.0], [1.0], [2.0], [9.0]]), 3).tolist()
      [3, 0, 2]
    """
    _check(positions, mask)
    if count < 1 or positions.shape[-2] < 1:
        raise ValueError(f"count={count} must be positive and positions {positions.shape} hold a point; set them")
    return _farthest_points(positions, count, mask)


@functools.partial(jax.jit, static_argnums=1)
def _farthest_points(positions: jax.Array, count: int, mask: jax.Array | None) -> jax.Array:
    points = jax.lax.stop_gradient(positions)
    points = points.astype(at_least_float32(points.dtype))
    present = jnp.ones(points.shape[:-1], bool) if mask is None else mask
    points = jnp.where(present[..., None], points, 0)
    total = jnp.sum(present, axis=-1, keepdims=True)[..., None]
    centroid = jnp.sum(points, axis=-2, keepdims=True) / jnp.maximum(total, 1)

    def distances(centre: jax.Array) -> jax.Array:
        squared = jnp.sum(jnp.square(points - centre), axis=-1)
        return jnp.where(present, squared, -jnp.inf)

    def step(nearest: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.argmax(nearest, axis=-1)
        centre = jnp.take_along_axis(points, chosen[..., None, None], axis=-2)
        return jnp.minimum(nearest, distances(centre)), chosen

    first = jnp.argmax(distances(centroid), axis=-1)
    nearest = distances(jnp.take_along_axis(points, first[..., None, None], axis=-2))
    _, rest = jax.lax.scan(step, nearest, None, length=count - 1)
    return jnp.concatenate([first[..., None], jnp.moveaxis(rest, 0, -1)], axis=-1)


def _check(positions: jax.Array, mask: jax.Array | None) -> None:
    if positions.ndim < 2:
        raise ValueError(f"positions of shape {positions.shape} must be [*batch, points, d]; add an axis")
    if mask is not None and mask.shape != positions.shape[:-1]:
        raise ValueError(
            f"mask of shape {mask.shape} must be {positions.shape[:-1]}, one entry for each of the positions "
            f"{positions.shape}; reshape it"
        )


def _check_radius(
    positions: jax.Array,
    radius: float,
    mask: jax.Array | None,
    cell: jax.Array | np.ndarray | None,
    images: int | None,
) -> tuple[jax.Array | None, int]:
    """Refuse what does not fit; return the cell as a JAX array and how many images to look at."""
    _check(positions, mask)
    if not 0 < radius < math.inf:
        raise ValueError(f"radius={radius} must be positive and finite; set it in the unit of the positions")
    if cell is None:
        return None, 0
    d = positions.shape[-1]
    if cell.shape not in ((d, d), (*positions.shape[:-2], d, d)):
        raise ValueError(
            f"cell of shape {cell.shape} must be {(*positions.shape[:-2], d, d)}, a lattice vector in each row, for "
            f"positions {positions.shape}; reshape it"
        )
    images = images_within(cell, radius) if images is None else images
    if images < 0:
        raise ValueError(f"images={images} must not be negative; leave it out to let the cell decide")
    rows = jnp.asarray(cell)
    return jnp.broadcast_to(rows, (*positions.shape[:-2], d, d)), images
