"""Frames: small weighted sets of group elements that turn with their input, for E(d), SE(d), O(d), SO(d) and S_n.

A frame F maps an input X to group elements g_k(X) with weights w_k(X) >= 0, sum 1, such that F(h X) = h F(X) as a
weighted set. Averaging any function over `pull(frame, X)` is then exactly invariant, and `average` of the results
exactly equivariant (Puny et al., "Frame Averaging for Invariant and Equivariant Network Design", ICLR 2022).

`principal_frame` is the paper's: eigenvectors of the covariance with all signs. It is a frame only where the spectrum
is simple: on a cube or a tetrahedron the eigenvectors are arbitrary. `anchor_frame` builds its axes from the points
instead and is a frame of every cloud; `weighted_frame` blends the two by the eigengap, so that the average is
continuous in the points and costs 2^d evaluations wherever the spectrum is simple.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.safe import safe_divide, safe_norm, safe_normalize

EUCLIDEAN_GROUPS = ("E(d)", "SE(d)", "O(d)", "SO(d)")
REPRESENTATIONS = ("scalar", "points", "vectors", "point", "vector", "matrix", "set", "nodes", "adjacency", "edges")

# Relative eigengaps (of the trace) between which `weighted_frame` goes over from anchors to eigenvectors. Eigenvectors
# are known to machine epsilon over gap, so below the lower end a float32 frame would be worth less than 1e-5.
GAP_RANGE = (0.01, 0.05)
# Below this fraction of the trace an eigengap counts as none and eigenvectors get no derivative from it.
MIN_GAP = 1e-3
# An anchor must reach this fraction of the (smooth) largest squared length.
_ANCHOR_THRESHOLD = 0.75
# Squared thickness over squared radius under which a cloud counts as thin and both signs of an axis are taken.
_THIN = 0.01
# Shares of the kept weight under which the anchors cut off were as good as those kept.
_UNRESOLVED = 1e-3

# Geometry never runs in the reduced precision that accelerators use for matrix products by default.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A weighted finite set of group elements g_k for each input of a batch.

    An element maps canonical coordinates y to the world as x = y R_k^T + t, and a canonical node order to the given
    one by x[orders_k] = y. Parts that are `None` act as the identity.

    Attributes:
      weights: `[frames, *batch]`, non-negative, summing to one over the frames.
      rotations: `[frames, *batch, d, d]`, orthogonal, or `None`.
      translation: `[*batch, d]`, shared by all elements, or `None`.
      orders: `[frames, *batch, n]` integers: which given node stands at each canonical place, or `None`.
      exact: `[*batch]` booleans: whether the average over these elements is exactly equivariant for this input.
      principal: how many leading elements are always needed; the weights of all others are zero unless the input is
        (nearly) degenerate.
    """

    weights: jax.Array
    rotations: jax.Array | None
    translation: jax.Array | None
    orders: jax.Array | None
    exact: jax.Array
    principal: int

    @property
    def size(self) -> int:
        """Number of elements, those of zero weight included."""
        return self.weights.shape[0]


def _flatten_frame(frame: Frame) -> tuple[tuple[Any, ...], int]:
    return (frame.weights, frame.rotations, frame.translation, frame.orders, frame.exact), frame.principal


def _unflatten_frame(principal: int, leaves: tuple[Any, ...]) -> Frame:
    # Past `__init__`, since JAX also unflattens trees whose leaves are not arrays.
    frame = object.__new__(Frame)
    names = ("weights", "rotations", "translation", "orders", "exact")
    for name, leaf in zip((*names, "principal"), (*leaves, principal), strict=True):
        object.__setattr__(frame, name, leaf)
    return frame


jax.tree_util.register_pytree_node(Frame, _flatten_frame, _unflatten_frame)


# What computes the frame of points: called as `frame(points, group, mask=mask)`.
FrameFunction = Callable[..., Frame]


# Elements of a frame ------------------------------------------------------------------------------------------------


def select(frame: Frame, start: int, stop: int) -> Frame:
    """Return the elements `start` to `stop` with their weights as they are."""

    def cut(leaf: jax.Array | None) -> jax.Array | None:
        return None if leaf is None else leaf[start:stop]

    parts = cut(frame.weights), cut(frame.rotations), frame.translation, cut(frame.orders)
    return Frame(*parts, frame.exact, max(0, min(frame.principal, stop) - start))  # type: ignore[arg-type]


def sample(frame: Frame, key: PRNGKeyArray) -> Frame:
    """Return one random element for each input, element k with probability w_k, as a frame of size one.

    The expectation of an average over the sample is the average over the frame. The sample's weight is w_k divided by
    its own constant value, that is one, with the derivative of log w_k: gradients by the points stay unbiased too.
    """
    weights = jax.lax.stop_gradient(frame.weights)
    index = jax.random.categorical(key, jnp.log(weights), axis=0)[None]

    def pick(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        expanded = index.reshape(index.shape + (1,) * (leaf.ndim - index.ndim))
        return jnp.take_along_axis(leaf, expanded, axis=0)

    weight = pick(frame.weights)
    assert weight is not None
    one = weight / jax.lax.stop_gradient(weight)
    return Frame(one, pick(frame.rotations), frame.translation, pick(frame.orders), frame.exact, 1)


def product(euclidean: Frame, permutation: Frame) -> Frame:
    """Return the frame of S_n x G from a frame of G that ignores the order and one of S_n that ignores the pose."""
    pairs = list(itertools.product(range(euclidean.size), range(permutation.size)))
    pairs.sort(key=lambda pair: pair[0] >= euclidean.principal or pair[1] >= permutation.principal)
    first, second = np.array(pairs).T
    return Frame(
        weights=euclidean.weights[first] * permutation.weights[second],
        rotations=None if euclidean.rotations is None else euclidean.rotations[first],
        translation=euclidean.translation,
        orders=None if permutation.orders is None else permutation.orders[second],
        exact=euclidean.exact & permutation.exact,
        principal=euclidean.principal * permutation.principal,
    )


def pull(frame: Frame, x: Array, representation: str | None, *, mask: Bool[Array, "*batch n"] | None = None) -> Array:
    """Return g_k^-1 x for every element, as `[frames, *batch, ...]`; padded points and vectors come out as zero.

    Args:
      frame: elements for inputs of leading axes `*batch`.
      x: one input, `[*batch, ...]`.
      representation: how the group acts on it: `"points"` and `"vectors"` `[*batch, n, d]`, `"point"` and `"vector"`
        `[*batch, d]`, `"matrix"` `[*batch, d, d]`, `"set"` `[*batch, n, f]`, `"nodes"` `[*batch, n]`, `"adjacency"`
        `[*batch, n, n]`, `"edges"` `[*batch, n, n, f]`; `"scalar"` or `None`: not at all.
      mask: True = a point, False = padding.

    Returns:
      Canonical copies, in float32 or better where a rotation is involved.

    Raises:
      ValueError: on an unknown representation.
    """
    representation = _known(representation)
    if representation in ("points", "vectors", "point", "vector", "matrix") and frame.rotations is not None:
        x = x.astype(jnp.promote_types(x.dtype, frame.rotations.dtype))
        if representation in ("points", "point") and frame.translation is not None:
            x = x - (frame.translation[..., None, :] if representation == "points" else frame.translation)
        if representation == "matrix":
            x = _einsum("...ji,...jk,...kl->...il", frame.rotations, x[None], frame.rotations)
        elif representation in ("points", "vectors"):
            x = _einsum("...ni,...ij->...nj", x[None], frame.rotations)
        else:
            x = _einsum("...i,...ij->...j", x[None], frame.rotations)
    else:
        x = jnp.broadcast_to(x[None], (frame.size, *x.shape))
    if mask is not None and representation in ("points", "vectors"):
        x = jnp.where(mask[..., None], x, 0)
    return x if frame.orders is None else _reorder(x, frame.orders, representation)


def push(frame: Frame, y: Array, representation: str | None) -> Array:
    """Return g_k y for canonical values `y` of shape `[frames, *batch, ...]`: the inverse of `pull`."""
    representation = _known(representation)
    if frame.orders is not None:
        y = _reorder(y, jnp.argsort(frame.orders, axis=-1), representation)
    if frame.rotations is None or representation not in ("points", "vectors", "point", "vector", "matrix"):
        return y
    y = y.astype(jnp.promote_types(y.dtype, frame.rotations.dtype))
    if representation == "matrix":
        return _einsum("...ij,...jk,...lk->...il", frame.rotations, y, frame.rotations)
    if representation in ("points", "vectors"):
        y = _einsum("...nj,...ij->...ni", y, frame.rotations)
    else:
        y = _einsum("...j,...ij->...i", y, frame.rotations)
    if representation in ("points", "point") and frame.translation is not None:
        y = y + (frame.translation[..., None, :] if representation == "points" else frame.translation)
    return y


def average(frame: Frame, y: Array, representation: str | None) -> Array:
    """Return sum_k w_k g_k y_k in float32 or better; scalars come back in their own dtype.

    Raises:
      ValueError: if `y` does not begin with the axes `[frames, *batch]`, or the representation is unknown.
    """
    if y.shape[: frame.weights.ndim] != frame.weights.shape:
        raise ValueError(
            f"the averaged function returned shape {y.shape}, which must begin with the frames and batch axes "
            f"{frame.weights.shape}; make it keep its leading axes, or choose the output representation that fits"
        )
    moved = push(frame, y, representation)
    total = moved.astype(jnp.promote_types(moved.dtype, frame.weights.dtype))
    weights = frame.weights.reshape(frame.weights.shape + (1,) * (total.ndim - frame.weights.ndim))
    total = jnp.sum(weights * total, axis=0)
    return total.astype(moved.dtype) if jnp.issubdtype(moved.dtype, jnp.inexact) else total


def _known(representation: str | None) -> str:
    if representation is None:
        return "scalar"
    if representation not in REPRESENTATIONS:
        raise ValueError(f"representation={representation!r} is unknown; use one of {REPRESENTATIONS} or None")
    return representation


def _reorder(x: jax.Array, orders: jax.Array, representation: str) -> jax.Array:
    """Take the node axes of `x` in the given orders."""
    if representation == "nodes":
        return jnp.take_along_axis(x, orders, axis=-1)
    if representation in ("points", "vectors", "set"):
        return jnp.take_along_axis(x, orders[..., None], axis=-2)
    if representation == "adjacency":
        return jnp.take_along_axis(jnp.take_along_axis(x, orders[..., None], axis=-2), orders[..., None, :], axis=-1)
    if representation == "edges":
        rows = jnp.take_along_axis(x, orders[..., None, None], axis=-3)
        return jnp.take_along_axis(rows, orders[..., None, :, None], axis=-2)
    return x


# Frames of point clouds ---------------------------------------------------------------------------------------------


def principal_frame(
    points: Float[Array, "*batch n d"],
    group: str = "E(d)",
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    stop_gradient: bool = False,
) -> Frame:
    """Return the frame of covariance eigenvectors with all signs: 2^d elements, or 2^(d-1) proper ones.

    E(d) and SE(d) move the centroid to the origin; O(d) and SO(d) use second moments about the origin. The set does
    not depend on the order of the points. `exact` is False where the smallest eigengap is at most `MIN_GAP` of the
    trace: there the eigenvectors are arbitrary and the average is *not* equivariant. Derivatives stay finite, since
    those through gaps that small are dropped; with `stop_gradient` the axes count as constants (then gradients by the
    points are still equivariant but are no longer those of the average).

    Raises:
      ValueError: on an unknown group, or points or mask of a wrong shape or dtype.
    """
    centred, proper = _group(group)
    x, translation = _centre(points, mask, centred=centred)
    _, axes, gaps = _spectrum(x)
    frame = _signed(axes, translation, gaps, proper=proper)
    return _constant(frame) if stop_gradient else frame


def anchor_frame(
    points: Float[Array, "*batch n d"],
    group: str = "E(d)",
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    anchors: int = 64,
    stop_gradient: bool = False,
) -> Frame:
    """Return a weighted frame whose axes point at far points of the cloud: a frame of every cloud, symmetric or not.

    The first axis points from the centroid (or origin) at a far point, the second at a point far from that axis, and
    so on; the last is fixed by orthogonality up to its sign (both signs, or the one with determinant 1). A choice is
    scored by its squared distance, times the moments of the cloud along the point, times 1 + cosine to the axis before.
    Choices that score at least three quarters of the best get a weight, rising from zero there; of these the heaviest
    `anchors` are kept, with the weight of the next one subtracted, so that none enters or leaves abruptly. Weights
    are smooth functions of distances and angles, hence invariant, and the whole set follows the points, continuously.
    Where the cloud is thin across the axes chosen so far both signs of the next one are taken, so that a vector output
    loses the component for which a line or a single point gives no direction.

    Args:
      points: positions in any unit.
      group: `"E(d)"`, `"SE(d)"`, `"O(d)"` or `"SO(d)"`.
      mask: True = a point, False = padding.
      anchors: number of axis choices kept. Exactness needs as many as tie for the first rank, which on a symmetric
        cloud is a multiple of its rotations: 12 for the tetrahedron, 24 for cube and octahedron, 60 for the
        icosahedron, 120 for the dodecahedron; `exact` tells.
      stop_gradient: treat axes and weights as constants in derivatives.

    Returns:
      A frame of `2 * anchors` elements, or of `anchors` proper ones (fewer for very few points).

    Raises:
      ValueError: on an unknown group, a non-positive `anchors`, or points or mask of a wrong shape or dtype.
    """
    centred, proper = _group(group)
    x, translation = _centre(points, mask, centred=centred)
    frame = _anchored(x, translation, anchors, proper=proper)
    return _constant(frame) if stop_gradient else frame


def weighted_frame(
    points: Float[Array, "*batch n d"],
    group: str = "E(d)",
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    anchors: int = 64,
    gap_range: tuple[float, float] = GAP_RANGE,
    stop_gradient: bool = False,
) -> Frame:
    """Return the principal frame where the spectrum is simple, the anchor frame where it is not, a blend between.

    The principal elements weigh p = product over neighbouring eigenvalues of smoothstep(eigengap / trace, from
    `gap_range[0]` to `gap_range[1]`) and the anchors 1 - p. Both are frames and p is invariant, so the blend is a
    weighted frame; since p vanishes before the eigenvectors become arbitrary it is continuous in the points and has
    finite derivatives everywhere (a robust frame in the sense of Dym, Lawrence and Siegel, ICML 2024, who weigh all
    tuples of points). `exact` is False only for nearly degenerate clouds with more tied axis choices than `anchors`.

    Args:
      points: positions in any unit.
      group: `"E(d)"`, `"SE(d)"`, `"O(d)"` or `"SO(d)"`.
      mask: True = a point, False = padding.
      anchors: number of axis choices kept for degenerate clouds, see `anchor_frame`.
      gap_range: relative eigengaps at which eigenvectors begin to count and from which on they alone count.
      stop_gradient: treat axes and weights as constants in derivatives.

    Returns:
      A frame of 2^d + 2 `anchors` elements (half as many proper ones) whose first 2^d are the principal ones.

    Raises:
      ValueError: on an unknown group, a bad `anchors` or `gap_range`, or points or mask of a wrong shape or dtype.
    """
    low, high = gap_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"gap_range={gap_range} must rise within 0 to 1; pass two relative gaps such as {GAP_RANGE}")
    centred, proper = _group(group)
    x, translation = _centre(points, mask, centred=centred)
    _, axes, gaps = _spectrum(x)
    principal = _signed(axes, translation, gaps, proper=proper)
    anchored = _anchored(x, translation, anchors, proper=proper)
    share = jnp.prod(_smoothstep((gaps - low) / (high - low)), axis=-1)
    # Eigenvectors that are known badly are better than anchors that are not a frame.
    share = jnp.where(principal.exact & ~anchored.exact, 1, share)
    assert principal.rotations is not None
    assert anchored.rotations is not None
    frame = Frame(
        weights=jnp.concatenate([share * principal.weights, (1 - share) * anchored.weights]),
        rotations=jnp.concatenate([principal.rotations, anchored.rotations]),
        translation=translation,
        orders=None,
        exact=principal.exact & (share == 1) | anchored.exact,
        principal=principal.size,
    )
    return _constant(frame) if stop_gradient else frame


def eigengap(
    points: Float[Array, "*batch n d"], group: str = "E(d)", *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, "*batch"]:
    """Return the smallest difference of neighbouring covariance eigenvalues over their sum; 0 for a single point."""
    centred, _ = _group(group)
    x, _ = _centre(points, mask, centred=centred)
    return jnp.min(_spectrum(x)[2], axis=-1, initial=1.0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def stable_eigh(
    matrix: Float[Array, "*batch d d"], min_gap: float = MIN_GAP
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d d"]]:
    """Return ascending eigenvalues and eigenvectors (columns), with finite derivatives at repeated eigenvalues.

    The derivative of eigenvector j along eigenvector i carries 1 / (lambda_j - lambda_i). Where that gap is at most
    `min_gap` times the sum of the eigenvalues' sizes the term is dropped: the pair spans a plane in which no direction
    is preferred.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@stable_eigh.defjvp
def _stable_eigh_jvp(min_gap: float, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    values, vectors = stable_eigh(primals[0], min_gap)
    change = (tangents[0] + jnp.swapaxes(tangents[0], -1, -2)) / 2
    change = _einsum("...ji,...jk,...kl->...il", vectors, change, vectors)
    gaps = values[..., None, :] - values[..., :, None]
    # Strictly larger, so that the zero matrix has no derivative instead of an infinite one.
    distinct = jnp.abs(gaps) > min_gap * jnp.sum(jnp.abs(values), axis=-1)[..., None, None]
    inverse = jnp.where(distinct, 1 / jnp.where(distinct, gaps, 1), 0)
    return (values, vectors), (
        jnp.diagonal(change, axis1=-2, axis2=-1),
        _einsum("...ij,...jk->...ik", vectors, inverse * change),
    )


def _group(group: str) -> tuple[bool, bool]:
    """Return whether the group translates, and whether it keeps orientation."""
    if group not in EUCLIDEAN_GROUPS:
        raise ValueError(f"group={group!r} is not a group of point clouds; use one of {EUCLIDEAN_GROUPS}")
    return "E" in group, "S" in group


def _centre(points: jax.Array, mask: jax.Array | None, *, centred: bool) -> tuple[jax.Array, jax.Array | None]:
    """Return the points about their centroid (or as they are), zero where padded, and the centroid (or `None`)."""
    if points.ndim < 2 or 0 in points.shape[-2:] or not jnp.issubdtype(points.dtype, jnp.floating):
        raise ValueError(
            f"points of shape {points.shape} and dtype {points.dtype} must be floating [*batch, n, d] with n and d at "
            "least 1; put the coordinates last"
        )
    if mask is not None and (mask.shape != points.shape[:-1] or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask of shape {mask.shape} and dtype {mask.dtype} must be boolean of shape {points.shape[:-1]}; "
            "pass True for points and False for padding"
        )
    points = points.astype(at_least_float32(points.dtype))
    if mask is not None:
        points = jnp.where(mask[..., None], points, 0)
    if not centred:
        return points, None
    if mask is None:
        centroid = jnp.mean(points, axis=-2)
        x = points - centroid[..., None, :]
    else:
        centroid = safe_divide(jnp.sum(points, axis=-2), jnp.sum(mask, axis=-1, keepdims=True).astype(points.dtype))
        x = jnp.where(mask[..., None], points - centroid[..., None, :], 0)
    # A cloud no larger than the rounding of its coordinates is a single point: its shape is noise.
    noise = 64 * jnp.finfo(points.dtype).eps * jnp.max(jnp.abs(points), axis=(-2, -1), keepdims=True)
    return jnp.where(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) > noise, x, 0), centroid


@jax.jit
def _spectrum(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return eigenvalues, eigenvectors and relative eigengaps of the second moments of centred points."""
    values, vectors = stable_eigh(_einsum("...ni,...nj->...ij", x, x) / x.shape[-2])
    return values, vectors, safe_divide(jnp.diff(values, axis=-1), jnp.sum(values, axis=-1, keepdims=True))


def _signed(axes: jax.Array, translation: jax.Array | None, gaps: jax.Array, *, proper: bool) -> Frame:
    """Return the frame of `axes` (columns) with all signs, or with those of determinant one."""
    d = axes.shape[-1]
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=d)))
    if proper:
        signs = signs[np.prod(signs, axis=-1) > 0]
        axes = _oriented(axes)
    *batch, _, _ = axes.shape
    turned = axes[None] * jnp.asarray(signs, axes.dtype).reshape(len(signs), *(1,) * len(batch), 1, d)
    return Frame(
        weights=jnp.full((len(signs), *batch), 1 / len(signs), axes.dtype),
        rotations=turned,
        translation=translation,
        orders=None,
        exact=jnp.min(gaps, axis=-1, initial=1.0) > MIN_GAP,
        principal=len(signs),
    )


def _constant(frame: Frame) -> Frame:
    """Return the frame without derivatives, but for the translation."""
    return dataclasses.replace(jax.tree.map(jax.lax.stop_gradient, frame), translation=frame.translation)


def _oriented(axes: jax.Array) -> jax.Array:
    """Return orthogonal matrices with the last column turned so that the determinant is one."""
    determinant = jax.lax.stop_gradient(jnp.linalg.det(axes))
    sign = jnp.where(determinant < 0, -1.0, 1.0).astype(axes.dtype)
    return jnp.concatenate([axes[..., :-1], axes[..., -1:] * sign[..., None, None]], axis=-1)


# Compiled as one even in op-by-op code, where its many small operations would be slow.
@functools.partial(jax.jit, static_argnames=("anchors", "proper"))
def _anchored(x: jax.Array, translation: jax.Array | None, anchors: int, *, proper: bool) -> Frame:
    """Return the anchor frame of centred points."""
    if anchors < 1:
        raise ValueError(f"anchors={anchors} must be at least 1; pass the number of axis choices to keep")
    *batch, n, d = x.shape
    lengths = safe_norm(x)
    prominence = _prominence(x, lengths)[..., None, :]
    radius = _soft_max(jnp.square(lengths))[..., None, None]
    nothing = jnp.square(64 * jnp.finfo(x.dtype).eps) * radius
    axes = jnp.zeros((*batch, 1, d, 0), x.dtype)
    weights = jnp.ones((*batch, 1), x.dtype)
    exact = jnp.ones(batch, bool)
    for stage in range(d - 1):
        # What is left of each point across the axes of each choice so far: [*batch, choices, n, d].
        rest = x[..., None, :, :] - _einsum("...ni,...kis,...kjs->...knj", x, axes, axes)
        squared = jnp.sum(jnp.square(rest), axis=-1)
        score = squared * prominence
        if stage:
            # Preferring points ahead of the last axis to those behind it halves the ties of centrally symmetric clouds.
            ahead = _einsum("...ni,...ki->...kn", x, axes[..., -1])
            score = score * (1 + safe_divide(ahead, lengths[..., None, :]))
        flat = jnp.max(squared, axis=-1, keepdims=True) <= nothing
        # A flat rest has no directions of its own; one arbitrary choice, with both signs, stands for all.
        score = jnp.where(flat, jnp.arange(n) == 0, score)
        share = jnp.square(jax.nn.relu(score / _soft_max(score)[..., None] - _ANCHOR_THRESHOLD))
        share = weights[..., None] * share / jnp.sum(share, axis=-1, keepdims=True)
        thickness = jnp.where(flat, 0.0, safe_divide(squared, radius))
        mirrored = 0.5 * (1 - _smoothstep(thickness / _THIN))
        both = jnp.concatenate([share * (1 - mirrored), share * mirrored], axis=-2).reshape(*batch, -1)
        weights, index, resolved = _heaviest(both, anchors)
        exact = exact & resolved
        mirror = index >= share.shape[-2] * n
        index = jnp.where(mirror, index - share.shape[-2] * n, index)
        axes = _take(axes, jax.lax.div(index, jnp.full_like(index, n)), 2)
        chosen = _take(rest.reshape(*batch, -1, d), index, 1)
        small = jnp.sum(jnp.square(chosen), axis=-1, keepdims=True) <= nothing
        chosen = jnp.where(small, _completion(axes), safe_normalize(jnp.where(small, 1.0, chosen), epsilon=0.0))
        chosen = jnp.where(mirror[..., None], -chosen, chosen)
        # Projected again: the first projection leaves rounding errors along the axes, which matter for thin clouds.
        chosen = safe_normalize(chosen - _einsum("...j,...js,...is->...i", chosen, axes, axes))
        axes = jnp.concatenate([axes, chosen[..., None]], axis=-1)
    rotations = jnp.moveaxis(jnp.concatenate([axes, _completion(axes)[..., None]], axis=-1), -3, 0)
    weights = jnp.moveaxis(weights, -1, 0)
    if proper:
        rotations = _oriented(rotations)
    else:
        mirror = jnp.ones((d,), x.dtype).at[-1].set(-1)
        rotations = jnp.concatenate([rotations, rotations * mirror])
        weights = jnp.concatenate([weights, weights]) / 2
    return Frame(weights, rotations, translation, None, exact, weights.shape[0])


def _prominence(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return 1 + second + third moment of the cloud along each point, each relative to its mean over directions.

    It tells points of equal distance apart, as on a sphere, unless a symmetry of the cloud makes them equal.
    """
    along = safe_divide(x, lengths[..., None])
    second = _einsum("...ni,...nj->...ij", x, x)
    third = _einsum("...ni,...nj,...nk->...ijk", x, x, x)
    second = _einsum("...ni,...nj,...ij->...n", along, along, second)
    third = _einsum("...ni,...nj,...nk,...ijk->...n", along, along, along, third)
    second = safe_divide(x.shape[-1] * second, jnp.sum(jnp.square(lengths), axis=-1, keepdims=True))
    return 1 + second + safe_divide(third, jnp.sum(lengths**3, axis=-1, keepdims=True))


def _heaviest(weights: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the `count` largest weights less the next one, normalised, their places, and whether that left any."""
    count = min(count, weights.shape[-1])
    values, index = jax.lax.top_k(weights, min(count + 1, weights.shape[-1]))
    kept, index = values[..., :count], index[..., :count]
    rest = kept - values[..., count:] if values.shape[-1] > count else kept
    resolved = jnp.sum(rest, axis=-1, keepdims=True) > _UNRESOLVED * jnp.sum(kept, axis=-1, keepdims=True)
    kept = jnp.where(resolved, rest, kept)
    return kept / jnp.sum(kept, axis=-1, keepdims=True), index, resolved[..., 0]


def _take(x: jax.Array, index: jax.Array, trailing: int) -> jax.Array:
    """Return the entries `index` `[*batch, k]` of `x` `[*batch, m, ...]` with `trailing` axes after the m."""
    index = index.reshape(*index.shape, *(1,) * trailing)
    return jnp.take_along_axis(x, index, axis=-1 - trailing, mode="promise_in_bounds")


def _completion(axes: jax.Array) -> jax.Array:
    """Return some unit vector `[..., d]` orthogonal to the orthonormal columns of `axes`, `[..., d, s]` with s < d."""
    d = axes.shape[-2]
    projector = jnp.eye(d, dtype=axes.dtype) - _einsum("...is,...js->...ij", axes, axes)
    largest = jnp.argmax(jnp.diagonal(projector, axis1=-2, axis2=-1), axis=-1)
    return safe_normalize(_take(projector, largest[..., None], 1)[..., 0, :])


def _soft_max(values: jax.Array, power: int = 8) -> jax.Array:
    """Return a smooth stand-in for the maximum of non-negative values over the last axis, exact for ties."""
    scale = jax.lax.stop_gradient(jnp.max(values, axis=-1, keepdims=True))
    scaled = safe_divide(values, scale)
    return scale[..., 0] * safe_divide(jnp.sum(scaled ** (power + 1), axis=-1), jnp.sum(scaled**power, axis=-1))


def _smoothstep(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


# Frames of graphs and sets ------------------------------------------------------------------------------------------


def laplacian_keys(
    adjacency: Float[Array, "*batch n n"], *, mask: Bool[Array, "*batch n"] | None = None, tolerance: float = 1e-3
) -> Float[Array, "*batch n n"]:
    """Return, for every node and eigenvalue of the graph Laplacian, the length of the node's part in the eigenspace.

    L = diag(A 1) - A. Column j is sqrt(sum of u_ik^2 over the eigenvectors k whose eigenvalue equals the j-th): it
    depends neither on signs nor on the basis of a repeated eigenvalue. Eigenvalues closer than `tolerance` times the
    largest count as equal.
    """
    adjacency = adjacency.astype(at_least_float32(adjacency.dtype))
    if mask is not None:
        adjacency = jnp.where(mask[..., None] & mask[..., None, :], adjacency, 0)
    laplacian = jnp.sum(adjacency, axis=-1)[..., None] * jnp.eye(adjacency.shape[-1]) - adjacency
    values, vectors = jnp.linalg.eigh(laplacian)
    cluster = _clusters(values, tolerance)
    same = (cluster[..., :, None] == cluster[..., None, :]).astype(vectors.dtype)
    return jnp.sqrt(_einsum("...ik,...kj->...ij", jnp.square(vectors), same))


def distance_keys(
    points: Float[Array, "*batch n d"], *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, "*batch n n"]:
    """Return, for every point, its sorted distances to all points: unchanged by any Euclidean motion.

    Padded points count as infinitely far; their distances are given as zero, behind all others.
    """
    points = points.astype(at_least_float32(points.dtype))
    distance = safe_norm(points[..., :, None, :] - points[..., None, :, :])
    if mask is not None:
        distance = jnp.where(mask[..., None, :], distance, jnp.inf)
    distance = jnp.sort(distance, axis=-1)
    return jnp.where(jnp.isfinite(distance), distance, 0)


def permutation_frame(
    keys: Float[Array, "*batch n k"],
    *,
    mask: Bool[Array, "*batch n"] | None = None,
    max_orders: int = 24,
    tolerance: float = 1e-3,
    key: PRNGKeyArray | None = None,
) -> Frame:
    """Return the orders of the nodes in which the rows of `keys` are sorted lexicographically.

    Nodes with equal rows may stand in any order among themselves, so the frame of S_n has as many elements as the
    product of the factorials of these ties. They are enumerated up to `max_orders`, equally weighted; beyond that
    `exact` is False, since a part of the frame is not a frame. With `key`, `max_orders` elements are instead drawn
    uniformly from the whole frame, however large: the unbiased estimate for training.

    Args:
      keys: invariants of the nodes that move with them, such as features, `laplacian_keys` or `distance_keys`.
      mask: True = a node, False = padding, which is put last.
      max_orders: number of elements.
      tolerance: values of a column closer than this times its largest size (and chains of such) count as equal; two
        values just about that far apart are where the average jumps.
      key: JAX key to sample with, or `None` to enumerate.

    Returns:
      A frame with `orders`; only its first element is needed where no two nodes tie.

    Raises:
      ValueError: if `max_orders` is not positive.
    """
    if max_orders < 1:
        raise ValueError(f"max_orders={max_orders} must be at least 1; pass the number of node orders to average over")
    keys = jax.lax.stop_gradient(keys.astype(at_least_float32(keys.dtype)))
    mask = jnp.ones(keys.shape[:-1], bool) if mask is None else mask
    order, choices = _sorted(keys, mask, tolerance)
    n = keys.shape[-2]
    if key is not None:
        orders = _arranged(order, jnp.floor(jax.random.uniform(key, (max_orders, *order.shape)) * choices).astype(int))
        weights = jnp.full(orders.shape[:-1], 1 / max_orders, keys.dtype)
        return Frame(weights, None, None, orders, jnp.ones(order.shape[:-1], bool), max_orders)
    max_orders = min(max_orders, math.factorial(n))
    # Counted in floating point and cut off, far above any number of orders to enumerate, since factorials overflow.
    counts = jnp.minimum(jnp.cumprod(choices.astype(jnp.float32), axis=-1), 2.0**20)
    total = counts[..., -1]
    element = jnp.arange(max_orders).reshape(max_orders, *(1,) * total.ndim)
    stride = jnp.concatenate([jnp.ones_like(counts[..., :1]), counts[..., :-1]], axis=-1).astype(int)
    orders = _arranged(order, (element[..., None] // stride) % choices)
    weights = jnp.where(element < total, 1 / jnp.minimum(total, max_orders), 0).astype(keys.dtype)
    return Frame(weights, None, None, orders, total <= max_orders, 1)


@functools.partial(jax.jit, static_argnames="tolerance")
def _sorted(keys: jax.Array, mask: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """Return a lexicographic order of the nodes and, for each place, how many of its tie are left to stand there."""
    n = keys.shape[-2]
    columns = _clusters(jnp.swapaxes(jnp.where(mask[..., None], keys, 0), -1, -2), tolerance)
    # Padding goes last, in the order given: averaging over orders of nothing would be waste.
    columns = jnp.concatenate([jnp.where(mask, 0, 1 + jnp.arange(n))[..., None, :], columns], axis=-2)

    def refine(rank: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
        first, second = rank[..., None, :], rank[..., :, None]
        before = (first < second) | ((first == second) & (column[..., None, :] < column[..., :, None]))
        return jnp.sum(before, axis=-1), None

    rank, _ = jax.lax.scan(refine, jnp.zeros(mask.shape, int), jnp.moveaxis(columns, -2, 0))
    order = jnp.argsort(rank, axis=-1, stable=True)
    start = jnp.take_along_axis(rank, order, axis=-1)
    tied = jnp.sum(start[..., :, None] == start[..., None, :], axis=-1)
    return order, tied - (jnp.arange(n) - start)


@jax.jit
def _arranged(order: jax.Array, digits: jax.Array) -> jax.Array:
    """Return `order` after swapping, from the first place on, each with the one `digits` places behind it."""
    places = jnp.arange(order.shape[-1])

    def swap(orders: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        place, digit = step
        here, other = orders[..., place], (place + digit)[..., None]
        there = jnp.take_along_axis(orders, other, axis=-1)
        orders = jnp.where(places == place, there, jnp.where(places == other, here[..., None], orders))
        return orders, None

    orders = jnp.broadcast_to(order, digits.shape)
    return jax.lax.scan(swap, orders, (places, jnp.moveaxis(digits, -1, 0)))[0]


def _clusters(values: jax.Array, tolerance: float) -> jax.Array:
    """Return, along the last axis, the number of gaps wider than the tolerance below each value."""
    order = jnp.argsort(values, axis=-1)
    ordered = jnp.take_along_axis(values, order, axis=-1)
    wide = jnp.diff(ordered, axis=-1) > tolerance * jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    number = jnp.concatenate([jnp.zeros_like(order[..., :1]), jnp.cumsum(wide, axis=-1).astype(order.dtype)], axis=-1)
    return jnp.take_along_axis(number, jnp.argsort(order, axis=-1), axis=-1)
