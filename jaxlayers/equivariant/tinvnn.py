"""TinvNN: multidimensional scaling as a front end that makes any network of points blind to Euclidean motions."""

import dataclasses
import inspect
import math
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.safe import safe_divide, safe_norm, safe_sqrt
from jaxlayers.core.types import Dtype
from jaxlayers.equivariant.frame_averaging import FrameAveraging, PointNet
from jaxlayers.geometry.frames import stable_eigh

Signs = Literal["moments", "average", "none"]
Source = Literal["points", "distances"]

# Relative differences under which a number counts as rounding.
_NOISE = 64
# A third moment below this share of its largest possible size leaves the sign of an axis to the other statistics.
_MIN_MARGIN = 0.01
# How many of the leading axes take part in statistics that tie the sign of an axis to those before it.
_MIXED = 3


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What multidimensional scaling found, with how sure it is.

    Attributes:
      coordinates: `[*batch, n, k]`, centred, along axes of falling variance; zero where padded.
      eigenvalues: `[*batch, k]`, of the centred Gram matrix, falling: sums of squared coordinates.
      gap: `[*batch]`, the smallest difference of neighbouring eigenvalues (the one cut off included) over their sum. At
        0 the axes of an eigenspace are arbitrary, and so are the coordinates but for a rotation within it.
      sign_margin: `[*batch, k]` in [0, 1], how far the statistic that fixed the sign of an axis is from zero; at 0 the
        sign is arbitrary. 1 for axes without extent.
    """

    coordinates: jax.Array
    eigenvalues: jax.Array
    gap: jax.Array
    sign_margin: jax.Array


jax.tree_util.register_dataclass(
    Embedding, data_fields=["coordinates", "eigenvalues", "gap", "sign_margin"], meta_fields=[]
)


def multidimensional_scaling(
    points: Float[Array, "*batch n d"] | None = None,
    *,
    distances: Float[Array, "*batch n n"] | None = None,
    features: int | None = None,
    mask: Bool[Array, "*batch n"] | None = None,
    scale: bool = False,
    signs: Literal["moments", "none"] = "moments",
) -> Embedding:
    """Return coordinates of points that depend on their distances alone.

    B = -1/2 J D^2 J with the squared distances D^2 `[n, n]` and J = I - 1 1^T / n; B = U diag(lambda) U^T; coordinates
    y = U sqrt(lambda), the largest eigenvalues first. Distances between the rows of y are those given, if they are
    those of points in k dimensions; what does not fit into k dimensions, and negative eigenvalues (of distances that
    are no Euclidean ones), is left out, which gives the best Gram matrix of that rank. Given points, B is never made:
    y are the centred points along the eigenvectors of their d x d second moments, which are the same numbers.

    An eigenvector has no sign of its own. Each is turned such that sum_i y_ij^3 > 0. Where that third moment is below
    a hundredth of sum_i |y_ij|^3, the largest of further statistics takes its place that change sign with the axis
    and do not depend on the order of the points: sum_i y_ij w_i with w = r^2, r^4, r^6 and, for those of the first
    three axes that come before it, y_m r^2, y_m r^4, y_m y_j^2 and y_l y_m.

    Args:
      points: positions in any unit; or
      distances: between points, symmetric with zero diagonal (as `graph_distances` gives for a graph).
      features: k, number of coordinates; `None` takes d, and is needed with distances. Zeros fill up what n or d lack.
      mask: True = a point, False = padding.
      scale: divide by the root mean square distance from the centroid; a single point stays at zero.
      signs: `"none"` leaves them as the decomposition happens to give them.

    Returns:
      The embedding, in float32 or better. Its derivative is finite everywhere; where eigenvalues meet, the part that
      would rotate within their eigenspace is dropped (`stable_eigh`). NaN gives NaN.

    Raises:
      ValueError: unless exactly one of points and distances is given, or on a wrong shape, dtype or number of features.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant.tinvnn import multidimensional_scaling
      >>> square = jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
      >>> y = multidimensional_scaling(square).coordinates
      >>> jnp.linalg.norm(y[:, None] - y, axis=-1).round(4).tolist()
      [[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]
    """
    if (points is None) == (distances is None):
        raise ValueError("exactly one of points and distances must be given; pass one of them")
    if signs not in ("moments", "none"):
        raise ValueError(f"signs={signs!r} is unknown; use 'moments' or 'none'")
    if points is not None:
        _check(points, mask, "points", square=False)
        features = points.shape[-1] if features is None else features
    else:
        assert distances is not None
        _check(distances, mask, "distances", square=True)
        if features is None:
            raise ValueError("features=None needs points to take the dimension from; set the number of coordinates")
    if features < 1:
        raise ValueError(f"features={features} must be positive; set the number of coordinates")
    if points is not None:
        y, eigenvalues = _from_points(points, mask, features)
    else:
        assert distances is not None
        y, eigenvalues = _from_distances(distances, mask, features)
    total = jnp.sum(eigenvalues, axis=-1)
    if scale:
        number = jnp.asarray(y.shape[-2], y.dtype) if mask is None else jnp.sum(mask, axis=-1).astype(y.dtype)
        y = safe_divide(y, safe_sqrt(safe_divide(total, number))[..., None, None])
    # The first eigenvalue left out counts too: the coordinates would change if it took the place of the last.
    gap = jnp.min(safe_divide(-jnp.diff(eigenvalues, axis=-1), total[..., None])[..., :features], axis=-1, initial=1.0)
    eigenvalues = _resize(eigenvalues, features)
    margin = jnp.zeros_like(eigenvalues)
    if signs == "moments":
        y, margin = _orient(y)
    return Embedding(y, eigenvalues, gap, margin)


def graph_distances(
    adjacency: Float[Array, "*batch n n"], *, mask: Bool[Array, "*batch n"] | None = None
) -> Float[Array, "*batch n n"]:
    """Return the lengths of the shortest paths between the nodes of a graph, for `multidimensional_scaling`.

    Args:
      adjacency: lengths of the edges, zero where there is none; edges count in both directions, by the shorter one.
      mask: True = a node, False = padding.

    Returns:
      Distances; those between parts that are not connected are twice the largest finite one (1 if there is none), and
      those of padded nodes are zero.

    Raises:
      ValueError: on a wrong shape or dtype.
    """
    _check(adjacency, mask, "adjacency", square=True)
    n = adjacency.shape[-1]
    length = adjacency.astype(at_least_float32(adjacency.dtype))
    length = jnp.where(length > 0, length, jnp.inf)
    length = jnp.minimum(length, jnp.swapaxes(length, -1, -2))
    real = jnp.ones(adjacency.shape[:-1], bool) if mask is None else mask
    pairs = real[..., :, None] & real[..., None, :]
    length = jnp.where(pairs, length, jnp.inf)
    length = jnp.where(jnp.eye(n, dtype=bool), 0, length)
    # Paths of up to 2, 4, 8, ... edges.
    for _ in range(max(1, math.ceil(math.log2(max(2, n))))):
        length = jnp.min(length[..., :, :, None] + length[..., None, :, :], axis=-2)
    finite = jnp.isfinite(length)
    largest = jnp.max(jnp.where(finite, length, 0), axis=(-2, -1), keepdims=True)
    length = jnp.where(finite, length, jnp.where(largest > 0, 2 * largest, 1))
    return jnp.where(pairs, length, 0)


def _check(x: jax.Array, mask: jax.Array | None, name: str, *, square: bool) -> None:
    wrong = x.ndim < 2 or 0 in x.shape[-2:] or not jnp.issubdtype(x.dtype, jnp.floating)
    if wrong or (square and x.shape[-1] != x.shape[-2]):
        raise ValueError(
            f"{name} of shape {x.shape} and dtype {x.dtype} must be floating [*batch, n, {'n' if square else 'd'}] "
            "with at least one point; reshape or convert"
        )
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask of shape {mask.shape} and dtype {mask.dtype} must be boolean of shape {x.shape[:-1]}; pass True for "
            "points and False for padding"
        )


def _weights(mask: jax.Array | None, like: jax.Array) -> jax.Array:
    """Return weights of a mean over the points, `[*batch, n]`; all zero where everything is padding."""
    if mask is None:
        return jnp.full(like.shape[:-1], 1 / like.shape[-2], like.dtype)
    real = mask.astype(like.dtype)
    return safe_divide(real, jnp.sum(real, axis=-1, keepdims=True))


def _from_points(points: jax.Array, mask: jax.Array | None, features: int) -> tuple[jax.Array, jax.Array]:
    """Return coordinates along the principal axes, and all eigenvalues in falling order."""
    x = points.astype(at_least_float32(points.dtype))
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x - jnp.sum(_weights(mask, x)[..., None] * x, axis=-2, keepdims=True)
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    # A cloud no larger than the rounding of its coordinates is a single point: its shape is noise. (NaN stays NaN.)
    x = jnp.where(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) <= _NOISE * jnp.finfo(x.dtype).eps * largest, 0, x)
    values, vectors = stable_eigh(_matmul(jnp.swapaxes(x, -1, -2), x))
    y = _matmul(x, vectors)[..., ::-1]
    return _resize(y, features), jnp.maximum(values[..., ::-1], 0)


def _from_distances(distances: jax.Array, mask: jax.Array | None, features: int) -> tuple[jax.Array, jax.Array]:
    """Return coordinates by classical scaling, and all eigenvalues in falling order, negative ones as zero."""
    distances = distances.astype(at_least_float32(distances.dtype))
    weights = _weights(mask, distances)
    real = weights > 0
    squared = jnp.where(real[..., :, None] & real[..., None, :], jnp.square(distances), 0)
    rows = jnp.sum(squared * weights[..., None, :], axis=-1, keepdims=True)
    columns = jnp.sum(squared * weights[..., :, None], axis=-2, keepdims=True)
    mean = jnp.sum(rows * weights[..., :, None], axis=-2, keepdims=True)
    gram = -0.5 * (squared - rows - columns + mean)
    gram = jnp.where(real[..., :, None] & real[..., None, :], gram, 0)
    # The derivative of eigenvectors that are not used does not matter, so that only used gaps must be resolved.
    values, vectors = stable_eigh((gram + jnp.swapaxes(gram, -1, -2)) / 2)
    noise = _NOISE * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    values = jnp.where(values > noise, values, 0)[..., ::-1]
    y = vectors[..., ::-1] * safe_sqrt(values)[..., None, :]
    return _resize(y, features), values


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _resize(x: jax.Array, features: int) -> jax.Array:
    """Cut or fill the last axis with zeros."""
    missing = features - x.shape[-1]
    return x[..., :features] if missing <= 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def _orient(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turn every axis to the side that odd statistics of the points prefer; also return by how much they do."""
    z = jax.lax.stop_gradient(y)
    size = jnp.max(safe_norm(z), axis=-1)[..., None, None]
    z = safe_divide(z, size)
    radius = jnp.sum(jnp.square(z), axis=-1)
    flat = jnp.max(jnp.abs(z), axis=-2) <= _NOISE * jnp.finfo(z.dtype).eps
    z = jnp.where(flat[..., None, :], 0, z)
    powers = jnp.stack([radius, radius**2, radius**3], axis=-1)
    before = jnp.zeros((*z.shape[:-1], 0), z.dtype)
    signs, margins = [], []
    for index in range(z.shape[-1]):
        axis = z[..., index, None]
        products = [before[..., m, None] * before[..., m:] for m in range(before.shape[-1])]
        weights = jnp.concatenate(
            [axis**2, powers, before * powers[..., :1], before * powers[..., 1:2], before * axis**2, *products], axis=-1
        )
        value = jnp.sum(axis * weights, axis=-2)
        margin = safe_divide(jnp.abs(value), jnp.sum(jnp.abs(axis * weights), axis=-2))
        # The third moment stands first.
        best = jnp.where(margin[..., 0] >= _MIN_MARGIN, 0, jnp.argmax(margin, axis=-1))[..., None]
        sign = jnp.where(jnp.take_along_axis(value, best, axis=-1) < 0, -1, 1).astype(y.dtype)
        margins.append(jnp.where(flat[..., index, None], 1, jnp.take_along_axis(margin, best, axis=-1)))
        signs.append(sign)
        if index < _MIXED:
            before = jnp.concatenate([before, axis * sign[..., None, :]], axis=-1)
    return y * jnp.concatenate(signs, axis=-1)[..., None, :], jnp.concatenate(margins, axis=-1)


class TinvNN(nn.Module):
    """Run any network of points on coordinates that depend on the distances between the points alone.

    out = backbone(y), y `[*batch, n, k]` the multidimensional scaling of the points (`multidimensional_scaling`):
    centred, along their principal axes, with signs fixed by third moments. The front end has no parameters.

    Symmetry:
      Invariant to translations, rotations and reflections (so that mirror images are the same), and with `scale` to
      scaling: exact, to rounding. y is equivariant to permutations of the points: a backbone that is invariant or
      equivariant to them stays so, whatever the number of points.
      Where it breaks: with repeated eigenvalues (a cube, a square: `Embedding.gap` 0) or an axis along which every
      statistic of its sign vanishes (`Embedding.sign_margin` 0) y is arbitrary, and rounding grows as 1 / gap near the
      former. Where only signs are open because the cloud is its own mirror image, y is the same set of points either
      way, so that a permutation-invariant backbone stays exact. `signs="average"` averages the backbone over a frame
      instead, which is exact for every cloud. Value and derivative are finite in every case.

    Attributes:
      backbone: any module of points `[*batch, n, k]`; keywords `mask` and `deterministic` are handed on if its call
        takes them. With `signs="average"` it must treat leading axes as batch.
      features: k, number of coordinates; `None` takes the dimension of the points, and is needed with distances.
      scale: divide by the root mean square distance from the centroid.
      signs: `"moments"`; `"average"` for the mean of the outputs over all signs and, at repeated eigenvalues, over a
        weighted frame (`FrameAveraging` with output `"scalar"`; needs points and their own dimension); or `"none"`, for
        backbones that see no signs.
      source: what the input is: `"points"` `[*batch, n, d]` or `"distances"` `[*batch, n, n]` (then it is classical
        scaling of whatever they are distances of; see `graph_distances`).

    Collections:
      The RNG stream `frame`, with `signs="average"` when `deterministic=False`.

    Cost:
      n d^2 multiply-accumulates and a d x d eigendecomposition for points, n^3 for distances; the backbone once, or
      2^d times with `signs="average"`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import TinvNN
      >>> model = TinvNN(backbone=nn.Dense(4))
      >>> points = jax.random.normal(jax.random.key(0), (2, 5, 3))
      >>> out, variables = model.init_with_output(jax.random.key(1), points)
      >>> bool(jnp.allclose(out, model.apply(variables, 3 - points[..., ::-1]), atol=1e-5))
      True

    Source:
      Zhang, Wang, Zhang, Cui, Zhu, Revisiting Transformation Invariant Geometric Deep Learning: Are Initial
      Representations All You Need?, arXiv 2112.12345, 2021 (TPAMI 2026 as "An Initial Representation Perspective");
      classical scaling: Torgerson, Psychometrika 1952.

    Differs:
      Written from the abstract, which says that scaling is modified but not how, and checked against classical
      scaling: no reference code is public. Signs by moments, margins, the average and padding are ours. Points go
      through their d x d second moments, which gives the same coordinates as their n x n distances.
    """

    backbone: nn.Module
    features: int | None = None
    scale: bool = False
    signs: Signs = "moments"
    source: Source = "points"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch n columns"],
        *,
        mask: Bool[Array, "*batch n"] | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Embed the points and run the backbone.

        Args:
          x: points in any unit, or distances.
          mask: True = a point, False = padding, which reaches the backbone as zeros.
          deterministic: handed on to the backbone; with `signs="average"` one element of the frame is drawn otherwise.

        Returns:
          What the backbone returns.

        Raises:
          ValueError: on an unknown field, or inputs that do not fit.
        """
        if self.signs not in get_args(Signs) or self.source not in get_args(Source):
            raise ValueError(
                f"signs={self.signs!r} and source={self.source!r} must be of {get_args(Signs)} and {get_args(Source)}; "
                "set them"
            )
        if self.signs == "average":
            return self._average(x, mask, deterministic=deterministic)
        given = {"points": x} if self.source == "points" else {"points": None, "distances": x}
        embedding = multidimensional_scaling(
            **given, features=self.features, mask=mask, scale=self.scale, signs=self.signs
        )
        self.sow("intermediates", "gap", embedding.gap)
        self.sow("intermediates", "sign_margin", embedding.sign_margin)
        taken = inspect.signature(type(self.backbone).__call__).parameters
        keywords = {"mask": mask, "deterministic": deterministic}
        keywords = {name: value for name, value in keywords.items() if name in taken and value is not None}
        y = embedding.coordinates
        return self.backbone(axes.constrain(y, axes.BATCH, *(None,) * (y.ndim - 1)) if y.ndim > 2 else y, **keywords)

    def _average(self, x: jax.Array, mask: jax.Array | None, *, deterministic: bool) -> Any:
        if self.source != "points" or self.features not in (None, x.shape[-1]):
            raise ValueError(
                f"signs='average' needs points and all of their coordinates; got source={self.source!r} and features="
                f"{self.features} for an input of shape {x.shape}; use signs='moments'"
            )
        _check(x, mask, "points", square=False)
        if self.scale:
            x = x.astype(at_least_float32(x.dtype))
            weights = _weights(mask, x)[..., None]
            x = x if mask is None else jnp.where(mask[..., None], x, 0)
            centred = x - jnp.sum(weights * x, axis=-2, keepdims=True)
            square = jnp.sum(weights * jnp.square(centred), axis=(-2, -1), keepdims=True)
            x = safe_divide(centred, safe_sqrt(square))
        averaged = FrameAveraging(backbone=self.backbone, group="E(d)", name="average")
        return averaged(x, mask=mask, deterministic=deterministic)


def tinvnn_pointnet(
    num_classes: int = 40,
    features: tuple[int, ...] = (64, 128, 256),
    hidden_features: tuple[int, ...] = (128,),
    scale: bool = False,
    signs: Signs = "moments",
    dropout_rate: float = 0.0,
    dtype: Dtype | None = None,
) -> TinvNN:
    """Return a PointNet behind multidimensional scaling: point clouds `[*batch, n, d]` to invariant logits.

    Args:
      num_classes: number of logits.
      features: widths of the perceptron of every point.
      hidden_features: widths of the perceptron after the maximum.
      scale: see `TinvNN`.
      signs: see `TinvNN`.
      dropout_rate: dropout before the head.
      dtype: compute dtype of the PointNet; the scaling is in float32 or better.

    Returns:
      An unbound `TinvNN` module.
    """
    backbone = PointNet(num_classes, tuple(features), tuple(hidden_features), dropout_rate=dropout_rate, dtype=dtype)
    return TinvNN(backbone=backbone, scale=scale, signs=signs)


VARIANTS: dict[str, dict[str, Any]] = {
    "tinvnn_pointnet": {
        "module": tinvnn_pointnet,
        "inputs": (jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32),),
        "num_classes": 40,
    }
}
