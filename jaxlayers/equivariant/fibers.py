"""Fibers: features of every degree, the edges and equivariant kernels between points, and layers over edges in chunks.

A *fiber* is a dictionary from a degree l to features `[*batch, points, channels, 2 l + 1]` that a rotation R turns by
the Wigner matrix D_l(R): degree 0 holds scalars, degree 1 vectors (x, y, z). How many channels it has is written as a
tuple, one entry for each degree from 0 on; 0 leaves a degree out, so `(0, 2)` is two vectors.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.safe import safe_norm
from jaxlayers.core.types import Dtype
from jaxlayers.geometry.harmonics import clebsch_gordan, spherical_harmonics, wigner_d
from jaxlayers.kernels import dispatch
from jaxlayers.ops.neighbours import Neighbours, displacements

Fiber = Mapping[int, Shaped[Array, "..."]]
Pairs = Mapping[tuple[int, int], Shaped[Array, "..."]]


class Edges(NamedTuple):
    """What layers know of the pairs of neighbours; made by `edges_of`.

    Attributes:
      neighbours: the lists.
      vectors: `[*batch, points, k, 3]`, x_j - x_i, zero where there is no neighbour.
      directions: the vectors whose harmonics make the kernels: the same, or without a gradient.
      features: `[*batch, points, k, features]`, more invariants of each pair for the radial functions, or `None`.
      basis: the kernels of `kernel_basis` for all degrees there will be, or `None`: each layer makes its own.
    """

    neighbours: Neighbours
    vectors: Shaped[Array, "..."]
    directions: Shaped[Array, "..."]
    features: Shaped[Array, "..."] | None = None
    basis: Pairs | None = None


class Factors(NamedTuple):
    """What `tensor_products` multiplies, for a kernel that does so where messages are made; see `products_along`.

    Attributes:
      sources: features of the neighbours.
      basis: from `kernel_basis`.
    """

    sources: Fiber
    basis: Pairs


def edges_of(
    positions: Float[Array, "*batch points 3"],
    neighbours: Neighbours,
    features: Float[Array, "*batch points k features"] | None = None,
    *,
    max_degree: int | None = None,
    basis_gradient: bool = True,
) -> Edges:
    """Return the edges of points.

    Args:
      positions: in any unit; the vectors are in float32 or better.
      neighbours: lists, see `jaxlayers.ops.neighbours`.
      features: invariants of each pair, besides its distance.
      max_degree: make the basis of all kernels between degrees up to this here, once for all layers; `None` leaves it
        to the layers, which is what layers that work in chunks need.
      basis_gradient: whether gradients with respect to positions run through the harmonics; those through distances
        always do.

    Raises:
      ValueError: if features and lists do not fit.
    """
    if positions.ndim < 2 or positions.shape[-1] != 3:
        raise ValueError(f"positions of shape {positions.shape} must be [*batch, points, 3]; reshape them")
    if features is not None and features.shape[:-1] != neighbours.indices.shape:
        raise ValueError(
            f"edge features of shape {features.shape} must be [*batch, points, k, features] along the lists of shape "
            f"{neighbours.indices.shape}; see pair_features"
        )
    vectors = displacements(positions.astype(at_least_float32(positions.dtype)), neighbours)
    directions = vectors if basis_gradient else jax.lax.stop_gradient(vectors)
    basis = None
    if max_degree is not None:
        degrees = range(max_degree + 1)
        basis = kernel_basis(directions, degrees, degrees)
    return Edges(neighbours, vectors, directions, features, basis)


def pair_features(
    matrix: Float[Array, "*batch points points features"], neighbours: Neighbours
) -> Float[Array, "*batch points k features"]:
    """Return the features of the pairs in the lists, from those of all pairs; entry (i, j) is of j as seen from i."""
    flat = jnp.broadcast_to(neighbours.indices, (*matrix.shape[:-2], neighbours.indices.shape[-1]))
    return jnp.take_along_axis(matrix, flat[..., None], axis=-2)


# Functions of fibers -------------------------------------------------------------------------------------------------


def channels_of(nodes: Fiber) -> tuple[int, ...]:
    """Return the channels of each degree of a fiber, from 0 to its highest."""
    return tuple(nodes[degree].shape[-2] if degree in nodes else 0 for degree in range(max(nodes, default=-1) + 1))


def rotate_fiber(
    nodes: Fiber, rotation: Float[Array, "3 3"], *, axial: bool = False
) -> dict[int, Shaped[Array, "..."]]:
    """Return the fiber turned by an orthogonal matrix: D_l(R) on each degree.

    Args:
      nodes: the features.
      rotation: R; for an improper one the features count as polar (vectors), or, all of them, as `axial`.
      axial: multiply by the determinant.
    """
    sign = jnp.sign(jnp.linalg.det(rotation)) if axial else 1
    return {
        degree: sign * jnp.einsum("ij,...j->...i", wigner_d(degree, rotation), x, precision="highest")
        for degree, x in nodes.items()
    }


def pool_fiber(nodes: Fiber, mask: Bool[Array, "*batch points"] | None = None) -> dict[int, Shaped[Array, "..."]]:
    """Return the mean over the points, `[*batch, channels, 2 l + 1]`; the mean of no points is zero."""
    if mask is None:
        return {degree: jnp.mean(x, axis=-3) for degree, x in nodes.items()}
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)[..., None, None]
    chosen = mask[..., None, None]
    return {degree: jnp.sum(jnp.where(chosen, x, 0), axis=-3) / count.astype(x.dtype) for degree, x in nodes.items()}


def fiber_invariants(nodes: Fiber) -> Shaped[Array, "..."]:
    """Return the scalars and the norms of all other channels, one after the other, `[*batch, channels]`."""
    parts = [x[..., 0] if degree == 0 else safe_norm(x) for degree, x in sorted(nodes.items())]
    return jnp.concatenate(parts, axis=-1)


def kernel_basis(
    directions: Float[Array, "*batch 3"], in_degrees: Sequence[int], out_degrees: Sequence[int]
) -> dict[tuple[int, int], Float[Array, "*batch paths out in"]]:
    """Return the equivariant kernels K_J between degrees, for J = |k - l| ... k + l: K(R x) = D_l(R) K(x) D_k(R)^T.

    K_J(x)[a, b] = sqrt(2 l + 1) sum_m C[a, b, m] Y_Jm(x / |x|) with the Clebsch-Gordan coupling C of (l, k, J). Applied
    to features of variance one each K_J gives variance one. A zero vector has J = 0 only.

    Args:
      directions: vectors of any length.
      in_degrees: degrees k.
      out_degrees: degrees l.

    Returns:
      (k, l) to kernels `[*batch, 2 min(k, l) + 1, 2 l + 1, 2 k + 1]`.
    """
    return _kernel_basis(directions, tuple(in_degrees), tuple(out_degrees))


# Compiled as one even in op-by-op code, where its many small operations would be slow.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _kernel_basis(directions: jax.Array, in_degrees: tuple[int, ...], out_degrees: tuple[int, ...]) -> Any:
    harmonics = spherical_harmonics(directions, max(in_degrees, default=0) + max(out_degrees, default=0))
    found = {}
    for k in in_degrees:
        for degree in out_degrees:
            parts = []
            for path in range(abs(k - degree), k + degree + 1):
                coupling = np.sqrt(2 * degree + 1) * clebsch_gordan(degree, k, path)
                coupling = jnp.asarray(coupling, harmonics[path].dtype)
                parts.append(jnp.einsum("...m,abm->...ab", harmonics[path], coupling, precision="highest"))
            found[k, degree] = jnp.stack(parts, axis=-3)
    return found


def tensor_products(
    sources: Fiber, basis: Pairs, out_degrees: Sequence[int]
) -> dict[tuple[int, int], Shaped[Array, "..."]]:
    """Return K_J f for each channel: what the radial functions of every kernel then mix.

    Features meet the basis before the radial functions, so that no kernel `[edges, out channels, in channels, 2 l + 1,
    2 k + 1]` is ever made, and keys and values share the products.

    Args:
      sources: features of the neighbours, degree k to `[*edges, channels, 2 k + 1]`.
      basis: from `kernel_basis`.
      out_degrees: degrees l.

    Returns:
      (k, l) to `[*edges, channels, paths, 2 l + 1]`.
    """
    return {
        (k, degree): jnp.einsum("...jab,...cb->...cja", basis[k, degree].astype(x.dtype), x)
        for k, x in sorted(sources.items())
        for degree in out_degrees
    }


# Parts of layers over edges ------------------------------------------------------------------------------------------


def over_chunks(
    body: nn.Module, nodes: Fiber, edges: Edges, here: Fiber, chunk: int | None
) -> dict[int, Shaped[Array, "..."]]:
    """Return `body(nodes, edges, here)`, for all points at once or for `chunk` of them after another.

    In chunks the kernels, keys and values of one chunk are all there is at a time, and the backward pass computes them
    anew (`nn.remat` inside `nn.scan`): beyond the lists themselves memory does not grow with the number of edges. A
    chunk takes points spread evenly over the cloud, so that points that are split over devices stay where they are.

    Args:
      body: a Linen module that returns a fiber for the points of `edges` and `here`, given all nodes.
      nodes: features of all points.
      edges: lists of all points.
      here: features that are cut like the lists.
      chunk: points at a time, positive; `None` = all.

    Raises:
      ValueError: if `chunk` is not positive.
    """
    if chunk is None:
        return body(nodes, edges, here)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be positive, or None for all points at once; set chunk")
    axis = edges.vectors.ndim - 3
    points = edges.vectors.shape[axis]
    chunks = -(-points // min(chunk, points))
    size = -(-points // chunks)

    def cut(x: jax.Array) -> jax.Array:
        # Points of padding have no neighbours.
        x = jnp.pad(x, [(0, size * chunks - points if at == axis else 0) for at in range(x.ndim)])
        return x.reshape(*x.shape[:axis], size, chunks, *x.shape[axis + 1 :])

    def step(body: nn.Module, carry: tuple[()], part: tuple[Edges, Fiber]) -> tuple[tuple[()], Any]:
        return carry, body(nodes, *part)

    # prevent_cse is not needed inside a scan.
    scan = nn.scan(
        nn.remat(step, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=axis + 1,
        out_axes=axis + 1,
    )
    _, out = scan(body, (), jax.tree.map(cut, (edges._replace(basis=None), dict(here))))

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:axis], size * chunks, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, points, axis=axis)

    return jax.tree.map(join, out)


def products_along(
    sources: Fiber, edges: Edges, features: Sequence[int], dtype: Dtype
) -> dict[tuple[int, int], Shaped[Array, "..."]] | Factors:
    """Return the `tensor_products` of neighbours' features towards the degrees of `features`.

    Args:
      sources: features of the neighbours.
      edges: their edges.
      features: channels of each degree of the messages that a `RadialKernel` will make of the products.
      dtype: that it computes in.

    Returns:
      The products, or the factors where the scope chooses a kernel that multiplies them itself; see `dispatch`.

    Raises:
      ValueError: if that kernel was chosen and does not serve this.
    """
    wanted = dict(present(features))
    basis = edges.basis
    if basis is None or any((k, degree) not in basis for k in sources for degree in wanted):
        basis = kernel_basis(edges.directions, sorted(sources), sorted(wanted))
    pairs = [(k, degree) for k in sorted(sources) for degree in wanted]
    outputs = sum(sources[k].shape[-2] * wanted[degree] * (2 * min(k, degree) + 1) for k, degree in pairs)
    if dispatch.edge_kernel(outputs, max(max(pair) for pair in pairs), dtype) == "pallas":
        return Factors(dict(sources), {pair: basis[pair] for pair in pairs})
    return tensor_products(sources, basis, list(wanted))


def radial_inputs(edges: Edges) -> Float[Array, "*edges inputs"]:
    """Return what radial functions are functions of: the distance and the features of each edge."""
    distance = safe_norm(edges.vectors, keepdims=True)
    if edges.features is None:
        return distance
    return jnp.concatenate([edges.features.astype(distance.dtype), distance], axis=-1)


def constrain_fiber(nodes: Fiber) -> dict[int, Shaped[Array, "..."]]:
    """Tell the partitioner which axes are batch and points."""
    return {degree: axes.constrain_last(x, axes.BATCH, axes.NODES, None, None) for degree, x in sorted(nodes.items())}


def present(features: Sequence[int]) -> list[tuple[int, int]]:
    """Return (degree, channels) of the degrees that are there."""
    return [(degree, count) for degree, count in enumerate(features) if count]


def check_channels(name: str, features: Sequence[int]) -> None:
    """Raise ValueError unless `features` are channels of degrees."""
    if not any(features) or any(count < 0 for count in features):
        raise ValueError(
            f"{name}={tuple(features)} must be the channels of degrees 0, 1, ..., not negative and not all zero; "
            "set it to (8, 4) for eight scalars and four vectors"
        )


def check_fiber(nodes: Fiber, edges: Edges | None = None) -> None:
    """Raise ValueError unless `nodes` is a fiber, of the points of `edges`."""
    if not isinstance(nodes, Mapping) or not nodes:
        raise ValueError(f"features must be a dictionary of degrees and not empty; got {type(nodes).__name__}")
    for degree, x in nodes.items():
        if not isinstance(degree, int) or degree < 0 or x.ndim < 2 or x.shape[-1] != 2 * degree + 1:
            raise ValueError(
                f"features of degree {degree} of shape {x.shape} must be [*batch, points, channels, 2 degree + 1] with "
                "a whole degree, not negative; reshape them"
            )
        if edges is not None and x.shape[:-2] != edges.neighbours.indices.shape[:-1]:
            raise ValueError(
                f"features of degree {degree} of shape {x.shape} must be [*batch, points, channels, {2 * degree + 1}] "
                f"of the points of lists {edges.neighbours.indices.shape}; reshape them"
            )
