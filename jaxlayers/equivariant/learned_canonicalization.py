"""Learned canonicalization: a small equivariant network chooses the pose in which any backbone sees its input.

Longer than most files, since the poses of point clouds and of images, their networks and their losses belong to one
paper.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.safe import safe_divide, safe_norm, safe_normalize
from jaxlayers.core.types import ActivationFn, Dtype, Initializer
from jaxlayers.equivariant.frame_averaging import ParticleGNN, PointNet
from jaxlayers.geometry.frames import EUCLIDEAN_GROUPS, Frame, FrameFunction, average, pull, push, select
from jaxlayers.geometry.groups import Cyclic, Dihedral, Turn
from jaxlayers.ops.grid_sample import affine_coordinates, grid_sample

# How the output of `DiscreteCanonicalization` may turn with the image.
IMAGE_REPRESENTATIONS = ("scalar", "image", "vector", "vectors", "matrix", "regular")

# Relative differences under which a number counts as rounding.
_NOISE = 64
# A pose whose axes are known worse than this is reported as not exact.
_MIN_MARGIN = 1e-3

# Distances from the centre, relative to the mean one, at which the network looks for an imbalance of the points.
_SHELLS = (0.4, 0.9, 1.4)
_SHELL_WIDTH = 0.4

# A branch that only degenerate inputs take must not add to what every call records.
_RECORDS = DenyList(("intermediates", "losses"))


# Rotations from vectors ---------------------------------------------------------------------------------------------


def gram_schmidt(
    vectors: Float[Array, "*batch k d"], *, proper: bool = False
) -> tuple[Float[Array, "*batch d d"], Float[Array, "*batch"]]:
    """Return the orthogonal matrix whose columns are the Gram-Schmidt axes of the vectors, and their margin.

    r_i = v_i - sum_{j < i} e_j <e_j, v_i>, e_i = r_i / |r_i|, margin = min_i |r_i|. Turning all vectors by an
    orthogonal matrix turns the axes by it. With `proper` only the first d - 1 vectors count: the last axis is the one
    orthogonal to the others that makes the determinant 1, which turns with rotations but not with reflections.

    Where r_i vanishes (vectors that are zero, parallel or in one plane; more precisely, not longer than rounding of
    the longest vector) some unit vector orthogonal to the axes before takes the place of e_i. Value and derivative are
    finite, but the axis does not turn with the vectors, which a margin of about zero tells.

    Args:
      vectors: at least d of them, or d - 1 with `proper`; further ones are ignored.
      proper: make the determinant 1.

    Returns:
      Axes as columns, in float32 or better, and the margin in the unit of the vectors.

    Raises:
      ValueError: on too few vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant.learned_canonicalization import gram_schmidt
      >>> axes, margin = gram_schmidt(jnp.array([[0.0, 2.0], [1.0, 1.0]]))
      >>> axes.tolist(), float(margin)
      ([[0.0, 1.0], [1.0, 0.0]], 1.0)
    """
    if vectors.ndim < 2 or vectors.shape[-2] < vectors.shape[-1] - proper:
        raise ValueError(
            f"vectors of shape {vectors.shape} must be [*batch, k, d] with k at least d{' - 1' if proper else ''}; "
            "let the canonicalizer return more vectors"
        )
    vectors = vectors.astype(at_least_float32(vectors.dtype))
    return _orthonormal(vectors[..., : vectors.shape[-1] - proper, :], proper=proper)


# Compiled as one even in op-by-op code, where its many small operations would be slow.
@functools.partial(jax.jit, static_argnames="proper")
def _orthonormal(vectors: jax.Array, *, proper: bool) -> tuple[jax.Array, jax.Array]:
    """Return the axes and the margin of exactly as many vectors as count."""
    d = vectors.shape[-1]
    longest = jnp.max(safe_norm(jax.lax.stop_gradient(vectors)), axis=-1, initial=0.0)
    nothing = _NOISE * jnp.finfo(vectors.dtype).eps * longest
    columns = jnp.zeros((*vectors.shape[:-2], d, 0), vectors.dtype)
    margin = jnp.full(vectors.shape[:-2], jnp.inf, vectors.dtype)
    for index in range(d - proper):
        rest = _across(vectors[..., index, :], columns)
        length = safe_norm(rest)
        flat = (length <= nothing)[..., None]
        axis = jnp.where(flat, _completion(columns), safe_normalize(jnp.where(flat, 1.0, rest), epsilon=0.0))
        # Projected again: the first projection leaves rounding errors along the axes before, large for short rests.
        axis = safe_normalize(_across(axis, columns))
        columns = jnp.concatenate([columns, axis[..., None]], axis=-1)
        margin = jnp.minimum(margin, length)
    if proper:
        last = _completion(columns)[..., None]
        determinant = jnp.linalg.det(jax.lax.stop_gradient(jnp.concatenate([columns, last], axis=-1)))
        sign = jnp.where(determinant < 0, -1, 1).astype(last.dtype)
        columns = jnp.concatenate([columns, last * sign[..., None, None]], axis=-1)
    return columns, jnp.where(jnp.isinf(margin), 1, margin)


def _across(x: jax.Array, columns: jax.Array) -> jax.Array:
    """Return the part of vectors `[*batch, d]` across orthonormal columns `[*batch, d, s]`."""
    along = jnp.sum(x[..., None] * columns, axis=-2, keepdims=True)
    return x - jnp.sum(columns * along, axis=-1)


def _completion(columns: jax.Array) -> jax.Array:
    """Return some unit vector `[*batch, d]` orthogonal to orthonormal columns `[*batch, d, s]` with s < d."""
    d = columns.shape[-2]
    projector = jnp.eye(d, dtype=columns.dtype) - jnp.sum(columns[..., :, None, :] * columns[..., None, :, :], axis=-1)
    largest = jnp.argmax(jnp.diagonal(projector, axis1=-2, axis2=-1), axis=-1)
    row = jnp.take_along_axis(projector, largest[..., None, None], axis=-2)[..., 0, :]
    return safe_normalize(row)


# Losses -------------------------------------------------------------------------------------------------------------


def rotation_prior_loss(rotations: Float[Array, "*batch d d"]) -> Float[Array, "*batch"]:
    """Return the mean squared entry of R - I, that is |R - I|^2 / d^2: zero where the given pose is canonical already.

    Added to the loss with a small weight it keeps a canonicaliser from turning inputs that a pretrained backbone
    already knows the right way up (Mondal et al., NeurIPS 2023).

    Args:
      rotations: of `Frame.rotations`, one for each input.

    Returns:
      One number for each input, in [0, 4 / d].
    """
    rotations = rotations.astype(at_least_float32(rotations.dtype))
    return jnp.mean(jnp.square(rotations - jnp.eye(rotations.shape[-1], dtype=rotations.dtype)), axis=(-2, -1))


def discrete_prior_loss(
    logits: Float[Array, "*batch order"], prior: Float[Array, " order"] | None = None
) -> Float[Array, "*batch"]:
    """Return KL(prior || softmax(logits)), the divergence of the canonicaliser's distribution from a prior.

    Args:
      logits: one for each group element.
      prior: probabilities of the poses in which the data come, in the order of `group_elements`; `None` is certainty
        that they come in the canonical pose, for which the divergence is -log softmax(logits)_0.

    Returns:
      One number for each input, non-negative.

    Raises:
      ValueError: if the prior has another length than the logits.
    """
    order = logits.shape[-1]
    if prior is None:
        prior = jnp.zeros(order).at[0].set(1)
    if prior.shape != (order,):
        raise ValueError(f"prior of shape {prior.shape} must be ({order},), one probability for each element; reshape")
    log_probabilities = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)), axis=-1)
    entropy = jnp.sum(jnp.where(prior > 0, prior * jnp.log(jnp.where(prior > 0, prior, 1)), 0))
    return entropy - jnp.sum(jnp.where(prior > 0, prior * log_probabilities, 0), axis=-1)


def copy_contrast_loss(vectors: Float[Array, "*batch order features"]) -> Float[Array, "*batch"]:
    """Return the mean size of the inner products between the vectors of different copies of an input.

    (1 / order^2) sum_{k != l} |<v_k, v_l>|. Driving it down makes the copies of an input distinguishable, so that the
    best of them is chosen for a reason; used with a `CopyCanonicalizer` whose network has several outputs.

    Args:
      vectors: outputs of its network for every copy, sown as `vectors` in `intermediates`.

    Returns:
      One number for each input, non-negative.
    """
    order = vectors.shape[-2]
    vectors = vectors.astype(at_least_float32(vectors.dtype))
    products = jnp.einsum("...kf,...lf->...kl", vectors, vectors, precision=jax.lax.Precision.HIGHEST)
    return jnp.mean(jnp.abs(products) * (1 - jnp.eye(order, dtype=products.dtype)), axis=(-2, -1))


# Point clouds -------------------------------------------------------------------------------------------------------


class VectorCanonicalizer(nn.Module):
    """Read a few vectors off a point cloud that turn with it: deep sets whose channels are vectors.

    Channels of a point are vectors, h_i `[features, d]`, at first the inputs x_i and x_i exp(-((|x_i| / mean_j |x_j| -
    s) / 0.4)^2), shells s = 0.4, 0.9, 1.4. Each layer mixes them by matrices and lets no direction pass that points
    against a learned one: u_i = W h_i + V mean_j h_j, k_i = K u_i, h_i <- u_i - (1 - slope)
    min(<u_i, k_i / |k_i|>, 0) k_i / |k_i|. Output v = mean_i O h_i / mean_i |O h_i|, so that 1 is the length of
    vectors that agree at all points and 0 that of vectors that cancel.

    Symmetry:
      Turns exactly with rotations and reflections of all inputs; invariant to permutations of the points and to the
      scale of all inputs together.
      Where it breaks: nowhere, but vectors vanish that a symmetry of the cloud does not leave a direction for: all of
      them on a cube, all but one direction on a line.

    Attributes:
      features: number of vector channels; positive.
      depth: number of layers; at least 1.
      num_vectors: number of output vectors; `None` gives as many as the dimension of space.
      negative_slope: what is kept of the part against the learned direction, in [0, 1); 1 would be linear.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the matrices.

    Cost:
      About 3 depth x features^2 x d multiply-accumulates a point, in float32 or better whatever the inputs: the pose
      decides on everything that follows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.learned_canonicalization import VectorCanonicalizer
      >>> points = jax.random.normal(jax.random.key(0), (2, 5, 3))
      >>> vectors, _ = VectorCanonicalizer(features=4).init_with_output(jax.random.key(1), points)
      >>> vectors.shape
      (2, 3, 3)

    Source:
      Kaba, Mondal, Zhang, Bengio, Ravanbakhsh, Equivariance with Learned Canonicalization Functions, ICML 2023,
      section 4.2 (deep sets of vector neurons); vector neurons: Deng et al., ICCV 2021, equations 2 and 6. Reference
      code arnab39/equiadapt at 657ee6f, `nbody/canonicalization_networks`.

    Differs:
      No biases: the reference's linear layers add one to every coordinate of a channel, which does not turn with the
      input. The shells are new: without them a network that is given positions alone is linear, and its means
      vanish. Means instead of sums over the points, outputs relative to their mean length, and no residual connections,
      which made the margin of an untrained pose smaller (median 0.06 with, 0.11 without, for O(3) and clouds of five
      normally distributed points).
    """

    features: int = 16
    depth: int = 2
    num_vectors: int | None = None
    negative_slope: float = 0.0
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self,
        points: Float[Array, "*batch n d"],
        vectors: Sequence[Float[Array, "*batch n d"]] = (),
        scalars: Float[Array, "*batch n scalars"] | None = None,
        *,
        mask: Bool[Array, "*batch n"] | None = None,
    ) -> Float[Array, "*batch vectors d"]:
        """Read the vectors off.

        Args:
          points: positions, centred for groups with translations, in any unit.
          vectors: further vectors of each point, such as velocities.
          scalars: invariant numbers of each point, such as charges: each gives a channel of weighted positions.
          mask: True = a point, False = padding.

        Returns:
          Vectors of length 0 to 1, in float32 or better; zero where they cancel up to rounding.

        Raises:
          ValueError: on points, vectors or scalars of shapes that do not fit, or fields out of range.
        """
        _check_cloud(points, mask)
        if min(self.features, self.depth) < 1 or not 0 <= self.negative_slope < 1:
            raise ValueError(
                f"features={self.features} and depth={self.depth} must be positive and negative_slope="
                f"{self.negative_slope} in [0, 1); set them"
            )
        given = [x.shape for x in vectors] + ([] if scalars is None else [(*scalars.shape[:-1], points.shape[-1])])
        if any(shape != points.shape for shape in given):
            raise ValueError(
                f"vectors {[x.shape for x in vectors]} and scalars {None if scalars is None else scalars.shape} must "
                f"belong to the points {points.shape}; pass [*batch, n, d] and [*batch, n, scalars]"
            )
        dtype = at_least_float32(points.dtype)
        channels = [x.astype(dtype)[..., None] for x in (points, *vectors)]
        if scalars is not None:
            channels.append(channels[0] * scalars.astype(dtype)[..., None, :])
        x = jnp.concatenate(channels, axis=-1)
        weights = _weights(points, mask, dtype)[..., None]
        if mask is not None:
            x = jnp.where(mask[..., None, None], x, 0)
        # Channels that are all parallel to the position stay linear in it, and average to nothing.
        length = safe_norm(x, axis=-2, keepdims=True)
        length = safe_divide(length, jnp.sum(weights * length, axis=-3, keepdims=True))
        x = jnp.concatenate([x, *(x * jnp.exp(-jnp.square((length - shell) / _SHELL_WIDTH)) for shell in _SHELLS)], -1)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=False,
                dtype=dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                precision=jax.lax.Precision.HIGHEST,
                name=name,
            )

        for index in range(self.depth):
            pooled = jnp.sum(weights * x, axis=-3, keepdims=True)
            u = dense(self.features, f"own_{index}")(x) + dense(self.features, f"pooled_{index}")(pooled)
            direction = safe_normalize(dense(self.features, f"direction_{index}")(u), axis=-2)
            against = jnp.minimum(jnp.sum(u * direction, axis=-2, keepdims=True), 0)
            u = u - (1 - self.negative_slope) * against * direction
            x = u
        x = dense(points.shape[-1] if self.num_vectors is None else self.num_vectors, "out")(x)
        length = jnp.sum(weights[..., 0, :] * safe_norm(x, axis=-2), axis=-2)
        vector = jnp.swapaxes(safe_divide(jnp.sum(weights * x, axis=-3), length[..., None, :]), -1, -2)
        cancelled = safe_norm(vector, keepdims=True) <= _NOISE * jnp.finfo(dtype).eps
        return jnp.where(cancelled, 0, vector)


class LearnedCanonicalization(nn.Module):
    """Make any module invariant or equivariant by showing it its input in a pose that a small network chooses.

    out = g backbone(g^-1 inputs), where g = (R, t): the columns of R `[d, d]` are the Gram-Schmidt axes of vectors
    that the canonicaliser reads off the inputs, t `[d]` is the centroid of the points, and g^-1 x = (x - t) R for
    points. With output `"scalar"` the outer g drops out and `out` is invariant. It is a frame of one element, learned.

    Symmetry:
      `group` acts on the inputs by `representations` and on the output by `output`: exact, to rounding, for any
      backbone. Proper groups give rotations, of determinant 1, so that the backbone can tell left from right; O(d) and
      E(d) give reflections too, so that it cannot. The pose ignores the order of the points: a permutation-equivariant
      backbone stays so.
      Where it breaks: no single pose turns with a cloud that a rotation maps to itself, whatever network chooses it.
      Rounding grows as 1 / margin (see `gram_schmidt`) near such clouds. At collinear and coincident points, and at
      planar ones for O(d) and E(d), the canonical cloud is still unique, so that invariant outputs stay exact;
      equivariant ones are arbitrary across the line or plane. Where vectors cancel although the points span space
      (cube, tetrahedron), nothing holds. Value and gradient are finite in every case. `fallback=weighted_frame` makes
      all of these exact: below a margin of `margin_range[1]` the learned pose is blended with the average over that
      frame, which alone counts below `margin_range[0]`.

    Attributes:
      backbone: any module; it sees the shapes it would see alone. With a fallback it must treat leading axes as batch
        as well. Keywords `mask` and `deterministic` are handed on if its call takes them.
      canonicalizer: called as `canonicalizer(points, vectors, scalars, mask=mask)` with all inputs of representation
        `"points"`, `"vectors"` and `"set"` (points centred if the group translates), such as
        `VectorCanonicalizer()`; returns at least d vectors
        `[*batch, k, d]` (d - 1 for proper groups) that turn with the inputs, of lengths up to about 1.
      group: `"E(d)"`, `"SE(d)"`, `"O(d)"` or `"SO(d)"`.
      output: representation of the backbone's output, or a tree of them: `"scalar"` (invariant), `"points"`,
        `"vectors"`, `"point"`, `"vector"`, `"matrix"`, `"set"`.
      representations: the same for each input; the first of `"points"` gives the centroid. `None` hands an input on.
      fallback: frame to fall back on where the pose is known badly, such as `weighted_frame` of
        `jaxlayers.geometry.frames`; `None` for none.
      margin_range: margins below which the fallback alone counts and above which it does not.

    Cost:
      One evaluation of the backbone and one of the canonicaliser; with a fallback that of its whole frame besides, if
      an input of the batch has a margin below `margin_range[1]`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import LearnedCanonicalization, VectorCanonicalizer
      >>> layer = LearnedCanonicalization(nn.Dense(3), VectorCanonicalizer(), group="SE(d)", output="points")
      >>> points = jax.random.normal(jax.random.key(0), (2, 5, 3))
      >>> moved, variables = layer.init_with_output(jax.random.key(1), points)
      >>> (canonical,), pose = layer.apply(variables, points, method="canonicalize")
      >>> canonical.shape, pose.rotations.shape
      ((2, 5, 3), (1, 2, 3, 3))

    Source:
      Kaba, Mondal, Zhang, Bengio, Ravanbakhsh, Equivariance with Learned Canonicalization Functions, ICML 2023,
      equation 3 and section 4.2; prior: Mondal, Panigrahi, Kaba, Rajeswar, Ravanbakhsh, Equivariant Adaptation of
      Large Pretrained Models, NeurIPS 2023. Reference code arnab39/equiadapt at 657ee6f.

    Differs:
      Gram-Schmidt has a value and a gradient for dependent vectors, the last axis of a proper group is fixed by the
      handedness (the reference orthogonalises a third vector, whose matrix may be a reflection), and degenerate clouds
      have an exact fallback. Translations are by the centroid alone.
    """

    backbone: nn.Module
    canonicalizer: nn.Module
    group: str = "E(d)"
    output: Any = "scalar"
    representations: tuple[str | None, ...] = ("points",)
    fallback: FrameFunction | None = None
    margin_range: tuple[float, float] = (0.02, 0.1)

    def __call__(self, *inputs: Any, mask: Bool[Array, "*batch n"] | None = None, deterministic: bool = True) -> Any:
        """Run the backbone in the canonical pose.

        Args:
          inputs: arrays, one for each of `representations`, with common leading axes `*batch`.
          mask: True = a point, False = padding. Padded points and vectors reach the backbone as zeros.
          deterministic: handed on to the backbone, and to the canonicaliser if its call takes it.

        Returns:
          What the backbone returns, turned back. NaN coordinates come out as NaN everywhere.

        Raises:
          ValueError: on an unknown group or representation, or inputs of a wrong shape, dtype or number.
        """
        frame = self.pose(*inputs, mask=mask, deterministic=deterministic)
        taken = inspect.signature(type(self.backbone).__call__).parameters
        keywords: dict[str, Any] = {"deterministic": deterministic} if "deterministic" in taken else {}

        def evaluate(backbone: Any, part: Frame, *, single: bool) -> Any:
            moved = [
                x if name is None else _first(pull(part, x, name, mask=mask), single)
                for x, name in zip(inputs, self.representations, strict=True)
            ]
            masks = {}
            if mask is not None and "mask" in taken:
                masks = {"mask": mask if single else jnp.broadcast_to(mask, (part.size, *mask.shape))}
            outputs = backbone(*moved, **masks, **keywords)
            outputs = jax.tree.map(lambda leaf: leaf[None], outputs) if single else outputs
            return jax.tree.map(
                lambda name, branch: jax.tree.map(lambda leaf: average(part, leaf, name), branch), self.output, outputs
            )

        result = evaluate(self.backbone, select(frame, 0, 1), single=True)
        if frame.size > 1:
            rest = select(frame, 1, frame.size)
            result = nn.cond(
                jnp.any(rest.weights > 0),
                lambda backbone, result: jax.tree.map(jnp.add, result, evaluate(backbone, rest, single=False)),
                lambda backbone, result: result,
                self.backbone,
                result,
                variables=_RECORDS,
            )
        return jax.tree.map(_split_batch, result)

    def canonicalize(self, *inputs: Any, mask: Bool[Array, "*batch n"] | None = None) -> tuple[tuple[Any, ...], Frame]:
        """Return the inputs in the learned pose, and that pose as a frame of size one, for `invert`."""
        frame = select(self.pose(*inputs, mask=mask), 0, 1)
        moved = (
            x if name is None else pull(frame, x, name, mask=mask)[0]
            for x, name in zip(inputs, self.representations, strict=True)
        )
        return tuple(moved), frame

    def pose(self, *inputs: Any, mask: Bool[Array, "*batch n"] | None = None, deterministic: bool = True) -> Frame:
        """Return the learned pose and, behind it, the elements of the fallback; rotations and margin are sown."""
        if self.group not in EUCLIDEAN_GROUPS:
            raise ValueError(f"group={self.group!r} is not a group of point clouds; use one of {EUCLIDEAN_GROUPS}")
        if len(inputs) != len(self.representations):
            raise ValueError(
                f"{len(inputs)} inputs need as many representations; got representations={self.representations}"
            )
        low, high = self.margin_range
        if not 0 <= low < high:
            raise ValueError(f"margin_range={self.margin_range} must rise from 0 on; set two margins such as 0.02, 0.1")
        by_name: dict[str | None, list[Any]] = {"points": [], "vectors": [], "set": []}
        for x, name in zip(inputs, self.representations, strict=True):
            by_name.setdefault(name, []).append(x)
        if not by_name["points"]:
            raise ValueError(
                "the pose needs an input of representation 'points'; got representations="
                f"{self.representations}; name one"
            )
        points, proper = by_name["points"][0], "S" in self.group
        centred, translation = _centre(points, mask, translates="E" in self.group)
        others = [x if translation is None else x - translation[..., None, :] for x in by_name["points"][1:]]
        scalars = jnp.concatenate(by_name["set"], axis=-1) if by_name["set"] else None
        taken = inspect.signature(type(self.canonicalizer).__call__).parameters
        keywords = {"deterministic": deterministic} if "deterministic" in taken else {}
        vectors = self.canonicalizer(centred, (*others, *by_name["vectors"]), scalars, mask=mask, **keywords)
        rotation, margin = gram_schmidt(vectors, proper=proper)
        self.sow("intermediates", "rotation", rotation)
        self.sow("intermediates", "margin", margin)
        one = jnp.ones((1, *margin.shape), margin.dtype)
        frame = Frame(one, rotation[None], translation, None, margin > _MIN_MARGIN, 1)
        if self.fallback is None:
            return frame
        rest = self.fallback(points, self.group, mask=mask)
        assert rest.rotations is not None
        share = jnp.clip((margin - low) / (high - low), 0, 1)
        share = share * share * (3 - 2 * share)
        return Frame(
            weights=jnp.concatenate([share[None], (1 - share) * rest.weights]),
            rotations=jnp.concatenate([rotation[None], rest.rotations]),
            translation=translation,
            orders=None,
            exact=rest.exact | (share == 1),
            principal=1,
        )


def invert(pose: Frame, outputs: Any, output: Any = "points") -> Any:
    """Return values of the canonical pose in the pose of the input: the inverse of `canonicalize`.

    Args:
      pose: as `canonicalize` returns it.
      outputs: array, or a tree of arrays.
      output: representation, or a tree of them that is a prefix of `outputs`.

    Returns:
      The values, turned and moved back.
    """
    return jax.tree.map(
        lambda name, branch: jax.tree.map(lambda leaf: push(pose, leaf[None], name)[0], branch), output, outputs
    )


def _first(x: jax.Array, single: bool) -> jax.Array:
    return x[0] if single else x


def _split_batch(x: jax.Array) -> jax.Array:
    """Name the first of several axes as the batch."""
    return axes.constrain(x, axes.BATCH, *(None,) * (x.ndim - 1)) if x.ndim > 1 else x


def _check_cloud(points: jax.Array, mask: jax.Array | None) -> None:
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


def _weights(points: jax.Array, mask: jax.Array | None, dtype: Any) -> jax.Array:
    """Return the weight of each point in a mean, `[*batch, n, 1]`; all zero for a cloud of padding alone."""
    if mask is None:
        return jnp.full((*points.shape[:-1], 1), 1 / points.shape[-2], dtype)
    real = mask.astype(dtype)[..., None]
    return safe_divide(real, jnp.sum(real, axis=-2, keepdims=True))


def _centre(points: jax.Array, mask: jax.Array | None, *, translates: bool) -> tuple[jax.Array, jax.Array | None]:
    """Return the points about their centroid (or as they are), zero where padded, and the centroid (or `None`)."""
    _check_cloud(points, mask)
    points = points.astype(at_least_float32(points.dtype))
    if mask is not None:
        points = jnp.where(mask[..., None], points, 0)
    if not translates:
        return points, None
    centroid = jnp.sum(_weights(points, mask, points.dtype) * points, axis=-2)
    x = points - centroid[..., None, :]
    x = x if mask is None else jnp.where(mask[..., None], x, 0)
    # A cloud no larger than the rounding of its coordinates is a single point: its shape is noise. (NaN stays NaN.)
    noise = _NOISE * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(points), axis=(-2, -1), keepdims=True)
    return jnp.where(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) <= noise, 0, x), centroid


# Images -------------------------------------------------------------------------------------------------------------


def group_elements(group: Cyclic | Dihedral) -> list[Any]:
    """Return all elements of a finite group of the plane; the first is the identity.

    Turns come in steps of 2 pi / n, and for D_n the n reflections behind the n turns.

    Raises:
      ValueError: on another group.

    Example:
      >>> from jaxlayers.equivariant.learned_canonicalization import group_elements
      >>> from jaxlayers.geometry.groups import Cyclic
      >>> [int(g) for g in group_elements(Cyclic(4))]
      [0, 1, 2, 3]
    """
    if isinstance(group, Cyclic):
        return [np.asarray(step) for step in range(group.order)]
    if isinstance(group, Dihedral):
        return [Turn(np.asarray(step), np.asarray(flip)) for flip in (0, 1) for step in range(group.order)]
    raise ValueError(f"group={group!r} has no finite list of elements that act on images; use Cyclic(n) or Dihedral(n)")


def act_on_image(
    group: Cyclic | Dihedral, g: Any, image: Float[Array, "*batch height width channels"]
) -> Float[Array, "*batch height width channels"]:
    """Return the picture moved by one element, about the centre of the image.

    Quarter turns and reflections move pixels, to the bit; other angles interpolate bilinearly, with zeros from outside.

    Raises:
      ValueError: if the image is not `[*batch, height, width, channels]`, or not square under a group that turns its
        axes into each other.
    """
    _check_image(group, image)
    matrix = _matrix(group, g)
    if np.all(matrix == np.round(matrix)):
        return group.act(g, image, "image")
    reading = jnp.asarray(np.pad(np.linalg.inv(matrix), ((0, 0), (0, 1))), at_least_float32(image.dtype))
    return grid_sample(image, affine_coordinates(reading, (image.shape[-3], image.shape[-2])))


def transformed_copies(
    image: Float[Array, "*batch height width channels"], group: Cyclic | Dihedral
) -> Float[Array, "order *batch height width channels"]:
    """Return g^-1 image for every element g of the group, in the order of `group_elements`."""
    return jnp.stack([act_on_image(group, group.inverse(g), image) for g in group_elements(group)])


def straight_through(
    logits: Float[Array, "*batch order"], values: Float[Array, "order ..."], *, beta: float = 1.0
) -> Float[Array, "..."]:
    """Return the value of the largest logit, with the gradient of the softmax mixture.

    Value: values[argmax_k logits_k], exactly. Derivative: that of sum_k w_k values_k, where w is the one-hot vector of
    the argmax but changes as softmax(beta logits) does: sum_k w_k d values_k + d softmax_k values_k. Of tied logits the
    first counts. A NaN among the logits gives NaN.

    Args:
      logits: one for each candidate.
      values: the candidates.
      beta: inverse temperature of the softmax, positive.

    Returns:
      The chosen candidate of each input.

    Raises:
      ValueError: if `values` does not begin with the axes `[order, *batch]`.
    """
    *batch, order = logits.shape
    if values.shape[: logits.ndim] != (order, *batch):
        raise ValueError(
            f"values of shape {values.shape} must begin with {(order, *batch)}, the candidates and the batch of the "
            f"logits {logits.shape}; put the axis of candidates first"
        )
    index = jnp.argmax(logits, axis=-1)
    trailing = (1,) * (values.ndim - logits.ndim)
    chosen = jnp.take_along_axis(values, index.reshape(1, *batch, *trailing), axis=0)[0]
    soft = jax.nn.softmax(beta * logits.astype(at_least_float32(logits.dtype)), axis=-1)
    # Zero, but not its derivative: the value stays that of the chosen candidate to the bit.
    change = jnp.moveaxis(soft - jax.lax.stop_gradient(soft), -1, 0).reshape(order, *batch, *trailing)
    return chosen + jnp.sum(change * jax.lax.stop_gradient(values), axis=0).astype(values.dtype)


class ImageEnergy(nn.Module):
    """Give an image one number (or several) by a small convolutional network that knows no symmetry.

    out = W mean_pixels act(conv(act(conv(image)))).

    Symmetry:
      None on purpose: an energy that ignored rotations could not tell copies apart.

    Attributes:
      features: channels of both convolutions; positive.
      out_features: numbers an image; positive.
      kernel_size: side of the filters, in pixels.
      activation_fn: the nonlinearity.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      kernel_size^2 x features x (channels + features) multiply-accumulates a pixel, in float32 or better: the energy
      decides on the pose.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.learned_canonicalization import ImageEnergy
      >>> energy, _ = ImageEnergy(features=4).init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
      >>> energy.shape
      (2, 1)

    Source:
      The canonicalisation network of the optimised variant in arnab39/equiadapt at 657ee6f,
      `images/canonicalization_networks/custom_nonequivariant_networks.py`.

    Differs:
      Two convolutions and a mean, where the reference has several strided ones with batch statistics, which would let
      the images of a batch influence each other's poses.
    """

    features: int = 8
    out_features: int = 1
    kernel_size: int = 5
    activation_fn: ActivationFn = nn.gelu
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, image: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch out_features"]:
        """Compute the energy.

        Args:
          image: pixels of about unit size.

        Returns:
          The numbers, in float32 or better.

        Raises:
          ValueError: on an image without pixels or fields that are not positive.
        """
        if image.ndim < 3 or 0 in image.shape[-3:]:
            raise ValueError(f"image of shape {image.shape} must be [*batch, height, width, channels]; add axes")
        if min(self.features, self.out_features, self.kernel_size) < 1:
            raise ValueError(
                f"features={self.features}, out_features={self.out_features} and kernel_size={self.kernel_size} must "
                "be positive; set them"
            )
        dtype = at_least_float32(image.dtype)
        common: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
            "precision": jax.lax.Precision.HIGHEST,
        }
        x = image
        for index in range(2):
            x = nn.Conv(self.features, (self.kernel_size,) * 2, name=f"conv_{index}", **common)(x)
            x = self.activation_fn(x)
        return nn.Dense(self.out_features, name="out", **common)(jnp.mean(x, axis=(-3, -2)))


class CopyCanonicalizer(nn.Module):
    """Score every pose of an image by one shared network that sees the image moved into it.

    logits_k = -E(g_k^-1 image) for every element g_k of the group, where E is the network's one output: the least
    energy wins. A network of several outputs v_k gives logits_k = <v_k, r> / (|v_k| |r|) with a learned reference r.

    Symmetry:
      logits(h image)_k = logits(image)_l with g_l = h^-1 g_k: the group permutes the logits as its own elements, by
      construction and for any network. Exact for quarter turns and reflections of square images; for other angles up
      to the interpolation of the image, an error that falls with the size of its pixels.

    Attributes:
      network: any module that maps images `[*batch, height, width, channels]` to `[*batch, outputs]`.
      group: `Cyclic(n)` or `Dihedral(n)`.
      param_dtype: dtype of the reference.
      reference_init: initialiser of the reference.

    Collections:
      `intermediates/vectors`, the network's outputs `[*batch, order, outputs]`, for `copy_contrast_loss`.

    Cost:
      As many evaluations of the network as the group has elements.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.learned_canonicalization import CopyCanonicalizer, ImageEnergy
      >>> logits, _ = CopyCanonicalizer(ImageEnergy()).init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
      >>> logits.shape
      (2, 4)

    Source:
      Kaba et al., ICML 2023, section 3.2 (canonicalisation by minimising an energy over the group); Mondal et al.,
      NeurIPS 2023, and `OptimizedGroupEquivariantImageCanonicalization` of arnab39/equiadapt at 657ee6f (the
      reference vector).

    Differs:
      Copies are made of the whole image; the reference crops, pads and resizes before and drops what it sees at the
      corners.
    """

    network: nn.Module
    group: Cyclic | Dihedral = Cyclic(4)
    param_dtype: Dtype = jnp.float32
    reference_init: Initializer = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self, image: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch order"]:
        """Score the poses.

        Args:
          image: the image.

        Returns:
          One logit for each of `group_elements`, in float32 or better.

        Raises:
          ValueError: on a group that does not act on the image, or a network that drops leading axes.
        """
        copies = transformed_copies(image, self.group)
        vectors = self.network(copies)
        if vectors.shape[:-1] != copies.shape[:-3]:
            raise ValueError(
                f"the network returned shape {vectors.shape} for copies {copies.shape}; it must keep the leading axes "
                f"{copies.shape[:-3]} and end in one axis of outputs"
            )
        vectors = jnp.moveaxis(vectors.astype(at_least_float32(vectors.dtype)), 0, -2)
        self.sow("intermediates", "vectors", vectors)
        if vectors.shape[-1] == 1:
            return _split_batch(-vectors[..., 0])
        reference = self.param("reference", self.reference_init, (vectors.shape[-1],), self.param_dtype)
        return _split_batch(jnp.sum(safe_normalize(vectors) * safe_normalize(reference.astype(vectors.dtype)), axis=-1))


class DiscreteCanonicalization(nn.Module):
    """Make any image network invariant or equivariant to turns and flips, by showing it the image in a learned pose.

    out = g_k backbone(g_k^-1 image) with k = argmax_k logits_k of the canonicaliser and g_k all elements of the group.
    The choice is hard; the canonicaliser learns from the gradient of the softmax mixture (`straight_through`).

    Symmetry:
      `group` acts on the image and on the output by `output`. For C_1, C_2, C_4, D_1, D_2 and D_4: exact, for any
      backbone. For other n pictures are interpolated and the error falls with the size of their pixels; keep them
      inside the inscribed disk.
      Where it breaks: nowhere for symmetric images. Poses that give the very same canonical image, such as all of them
      for a constant image, are tied: an invariant output does not depend on which is taken, and an equivariant one is
      averaged over them. Equal logits of different canonical images are an accident that rounding decides.

    Attributes:
      backbone: any module that takes the image; the keyword `deterministic` is handed on if its call takes it.
      canonicalizer: maps the image to logits `[*batch, order]` in the order of `group_elements`, that the group
        permutes as its own elements: `CopyCanonicalizer` of the same group, or a group convolution network with a
        regular output.
      group: `Cyclic(n)` or `Dihedral(n)`.
      output: representation of the backbone's output, or a tree of them: `"scalar"` (invariant), `"image"`,
        `"vector"` `[*batch, 2]` and `"vectors"` `[*batch, n, 2]` in coordinates (row, column), `"matrix"`
        `[*batch, 2, 2]`, `"regular"` `[*batch, order]`.
      beta: inverse temperature of the softmax that gives the gradient, positive.

    Cost:
      One evaluation of the backbone, and the canonicaliser; a copy of the image for each element is held in memory,
      and of the output unless it is invariant.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import CopyCanonicalizer, DiscreteCanonicalization, ImageEnergy
      >>> backbone = nn.Sequential([nn.Conv(4, (3, 3)), nn.gelu, lambda x: jnp.sum(x, axis=(-3, -2))])
      >>> layer = DiscreteCanonicalization(backbone, CopyCanonicalizer(ImageEnergy()))
      >>> image = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> out, variables = layer.init_with_output(jax.random.key(1), image)
      >>> bool(jnp.allclose(out, layer.apply(variables, jnp.rot90(image, axes=(1, 2))), atol=1e-5))
      True

    Source:
      Kaba, Mondal, Zhang, Bengio, Ravanbakhsh, Equivariance with Learned Canonicalization Functions, ICML 2023,
      equation 3 and section 4.1; Mondal et al., NeurIPS 2023. Reference code arnab39/equiadapt at 657ee6f.

    Differs:
      The gradient mixes the moved images; the reference mixes the angles (and reflection indicators) and goes through
      the interpolation of one image, which has no meaning between elements of a group. Softmax and argmax are the
      same, in training as in evaluation. Ties of symmetric images are averaged.
    """

    backbone: nn.Module
    canonicalizer: nn.Module
    group: Cyclic | Dihedral = Cyclic(4)
    output: Any = "scalar"
    beta: float = 1.0

    def __call__(self, image: Float[Array, "*batch height width channels"], *, deterministic: bool = True) -> Any:
        """Run the backbone in the canonical pose.

        Args:
          image: the image; square if the group turns its axes into each other.
          deterministic: handed on to the backbone.

        Returns:
          What the backbone returns, turned back.

        Raises:
          ValueError: on a group that does not act on the image, logits of another number, an unknown representation or
            an output that does not fit it.
        """
        copies = transformed_copies(image, self.group)
        logits = self._logits(image)
        canonical = straight_through(logits, copies, beta=self.beta)
        taken = inspect.signature(type(self.backbone).__call__).parameters
        keywords: dict[str, Any] = {"deterministic": deterministic} if "deterministic" in taken else {}
        outputs = self.backbone(canonical, **keywords)
        tied = _tied(copies, canonical)

        def restore(name: str | None, leaf: jax.Array) -> jax.Array:
            if name in (None, "scalar"):
                return leaf
            values = act_on_output(self.group, leaf, name)
            return _averaged(logits, values, tied, self.beta)

        result = jax.tree.map(
            lambda name, branch: jax.tree.map(lambda leaf: restore(name, leaf), branch), self.output, outputs
        )
        return jax.tree.map(_split_batch, result)

    def canonicalize(
        self, image: Float[Array, "*batch height width channels"]
    ) -> tuple[Float[Array, "*batch height width channels"], Int[Array, "*batch"]]:
        """Return the image in the learned pose, and which of `group_elements` it is, for `invert_discrete`."""
        logits = self._logits(image)
        canonical = straight_through(logits, transformed_copies(image, self.group), beta=self.beta)
        return canonical, jnp.argmax(logits, axis=-1)

    def _logits(self, image: jax.Array) -> jax.Array:
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be positive; set the inverse temperature of the softmax")
        logits = self.canonicalizer(image)
        expected = (*image.shape[:-3], len(group_elements(self.group)))
        if logits.shape != expected:
            raise ValueError(
                f"the canonicalizer returned logits {logits.shape} which must be {expected} for {self.group.name}; "
                "give it the same group"
            )
        self.sow("intermediates", "logits", logits)
        return logits


def invert_discrete(
    group: Cyclic | Dihedral, index: Int[Array, "*batch"], outputs: Float[Array, "..."], output: str = "image"
) -> Float[Array, "..."]:
    """Return values of the canonical pose in the pose of the image: the inverse of `canonicalize`.

    Args:
      group: the group.
      index: which element the pose is, as `canonicalize` returns it.
      outputs: values of representation `output`.
      output: one of `IMAGE_REPRESENTATIONS`.

    Returns:
      The values, turned back.
    """
    if output == "scalar":
        return outputs
    values = act_on_output(group, outputs, output)
    index = index.reshape(1, *index.shape, *(1,) * (outputs.ndim - index.ndim))
    return jnp.take_along_axis(values, index, axis=0)[0]


def act_on_output(group: Cyclic | Dihedral, outputs: jax.Array, output: str) -> jax.Array:
    """Return g outputs for every element g of the group, `[order, *batch, ...]`, in the order of `group_elements`.

    Raises:
      ValueError: on an unknown representation, or outputs of a shape that does not fit it.
    """
    elements = group_elements(group)
    if output not in IMAGE_REPRESENTATIONS:
        raise ValueError(f"output={output!r} is unknown; use one of {IMAGE_REPRESENTATIONS}")
    if output == "image":
        return jnp.stack([act_on_image(group, g, outputs) for g in elements])
    if output == "regular":
        if outputs.shape[-1:] != (len(elements),):
            raise ValueError(
                f"output of shape {outputs.shape} must end in {len(elements)} entries for the regular representation "
                f"of {group.name}; give the backbone that many outputs"
            )
        names = [_name(g) for g in elements]
        # (g y)(h) = y(g^-1 h)
        order = [[names.index(_name(group.compose(group.inverse(g), h))) for h in elements] for g in elements]
        return jnp.stack([outputs[..., np.array(row)] for row in order])
    if output != "scalar":
        return jnp.stack([group.act(g, outputs, output) for g in elements])
    return jnp.broadcast_to(outputs, (len(elements), *outputs.shape))


def _name(g: Any) -> tuple[int, ...]:
    return tuple(int(leaf) for leaf in jax.tree.leaves(g))


def _matrix(group: Cyclic | Dihedral, g: Any) -> np.ndarray:
    """Return the matrix of an element on coordinates (row, column)."""
    return np.asarray(group.act(g, np.eye(2), "vectors")).T


def _check_image(group: Cyclic | Dihedral, image: jax.Array) -> None:
    if image.ndim < 3 or 0 in image.shape[-3:] or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image of shape {image.shape} and dtype {image.dtype} must be floating [*batch, height, width, channels]; "
            "add axes or convert it"
        )
    if not isinstance(group, Cyclic | Dihedral):
        raise ValueError(f"group={group!r} does not act on images by a finite list of elements; use Cyclic or Dihedral")
    if image.shape[-3] != image.shape[-2] and group.order not in (1, 2):
        raise ValueError(
            f"{group.name} exchanges rows and columns of images, so that they must be square; got shape {image.shape}; "
            "crop or pad, or use C2, D1 or D2"
        )


def _tied(copies: jax.Array, canonical: jax.Array) -> jax.Array:
    """Return, as `[order, *batch]`, which copies are the canonical image up to rounding."""
    copies, canonical = jax.lax.stop_gradient((copies, canonical))
    difference = jnp.max(jnp.abs(copies - canonical), axis=(-3, -2, -1))
    size = jnp.max(jnp.abs(canonical), axis=(-3, -2, -1))
    return difference <= 4 * jnp.finfo(copies.dtype).eps * size


def _averaged(logits: jax.Array, values: jax.Array, tied: jax.Array, beta: float) -> jax.Array:
    """Return the straight-through choice among the values, as the mean over the tied ones."""
    chosen = straight_through(logits, values, beta=beta)
    weights = tied.astype(at_least_float32(values.dtype)).reshape(*tied.shape, *(1,) * (values.ndim - tied.ndim))
    number = jnp.sum(weights, axis=0)
    mean = (jnp.sum(weights * values, axis=0) / jnp.maximum(number, 1)).astype(values.dtype)
    return jnp.where(number > 1, mean, chosen)


# Models -------------------------------------------------------------------------------------------------------------


def canonical_pointnet(
    num_classes: int = 40,
    features: Sequence[int] = (64, 128, 256),
    hidden_features: Sequence[int] = (128,),
    group: str = "SE(d)",
    fallback: FrameFunction | None = None,
    dropout_rate: float = 0.0,
    dtype: Dtype | None = None,
) -> LearnedCanonicalization:
    """Return a PointNet behind a learned pose: point clouds `[*batch, n, d]` to invariant logits.

    Args:
      num_classes: number of logits.
      features: widths of the perceptron of every point.
      hidden_features: widths of the perceptron after the maximum.
      group: `"E(d)"`, `"SE(d)"`, `"O(d)"` or `"SO(d)"`.
      fallback: see `LearnedCanonicalization`.
      dropout_rate: dropout before the head.
      dtype: compute dtype of the PointNet; poses are in float32 or better.

    Returns:
      An unbound `LearnedCanonicalization` module.
    """
    backbone = PointNet(num_classes, tuple(features), tuple(hidden_features), dropout_rate=dropout_rate, dtype=dtype)
    return LearnedCanonicalization(backbone, VectorCanonicalizer(), group=group, fallback=fallback)


_CLOUD = jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)
_PARTICLES = tuple(jax.ShapeDtypeStruct((1, 5, width), jnp.float32) for width in (3, 3, 1))

VARIANTS: dict[str, dict[str, Any]] = {
    "canonical_pointnet": {"module": canonical_pointnet, "inputs": (_CLOUD,), "num_classes": 40},
    "canonical_gnn": {
        "module": LearnedCanonicalization,
        "inputs": _PARTICLES,
        "backbone": ParticleGNN(features=32, depth=4),
        "canonicalizer": VectorCanonicalizer(features=32, depth=4),
        "output": "points",
        "representations": ("points", "vectors", "set"),
    },
}
