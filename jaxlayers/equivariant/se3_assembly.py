"""SE(3)-equivariant assembly: the pose of each fragment of a broken shape, from all fragments."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.reference import read_variables
from jaxlayers.core.safe import safe_divide, safe_norm, safe_sqrt
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.equivariant.learned_canonicalization import gram_schmidt
from jaxlayers.equivariant.vector_neurons import (
    VNLeakyReLU,
    VNLinear,
    VNStdFeature,
    check_positions,
    vector_mean_pool,
)
from jaxlayers.equivariant.vn_dgcnn import COUNTED, VNDGCNNEncoder, block_names

# Coordinates of poses and points are never multiplied in the reduced precision of accelerators.
_HIGHEST = jax.lax.Precision.HIGHEST


class Poses(NamedTuple):
    """Where each part goes: a point x of it to R (x - c) + t.

    Attributes:
      rotations: R, of determinant 1; the identity for parts that are padding.
      translations: t, where the part's centroid goes; zero for padding.
      centroids: c, of the part as it was given.
      margins: how far from parallel the two vectors are that R was made of, in [0, 1]: rounding and gradients of R grow
        as its inverse. `None` where R was made otherwise.
      vectors: these two vectors, of any length. Losses of R itself have gradients as steep as the margins are small;
        to learn from, compare them with the first two rows of R as it should be (`frame_loss`). `None` as above.
    """

    rotations: Float[Array, "*batch parts 3 3"]
    translations: Float[Array, "*batch parts 3"]
    centroids: Float[Array, "*batch parts 3"]
    margins: Float[Array, "*batch parts"] | None = None
    vectors: Float[Array, "*batch parts 2 3"] | None = None


# The mathematics ----------------------------------------------------------------------------------------------------


def correlate(
    vectors: Float[Array, "*batch parts channels d"],
    shapes: Float[Array, "*batch parts channels channels"],
    *,
    mask: Bool[Array, "*batch parts"] | None = None,
) -> Float[Array, "*batch parts channels d"]:
    """Return H_i = mean_j G_j F_i over the parts j that are there.

    It turns with part i, as F_i does, and with no other part, since the matrices G_j are invariant.

    Args:
      vectors: F, one row of vectors for each part.
      shapes: G.
      mask: True = a part, False = padding, which is left out of the mean and gets zeros.
    """
    if mask is None:
        return jnp.einsum("...ab,...pbd->...pad", jnp.mean(shapes, axis=-3), vectors, precision=_HIGHEST)
    real = mask[..., None, None]
    number = jnp.sum(mask, axis=-1).astype(shapes.dtype)[..., None, None]
    mean = safe_divide(jnp.sum(jnp.where(real, shapes, 0), axis=-3), number)
    return jnp.einsum("...ab,...pbd->...pad", mean, jnp.where(real, vectors, 0), precision=_HIGHEST)


def rotation_from_vectors(
    vectors: Float[Array, "*batch 2 3"],
) -> tuple[Float[Array, "*batch 3 3"], Float[Array, "*batch"]]:
    """Return the rotation that takes the Gram-Schmidt axes of two vectors to the coordinate axes, and their margin.

    Turning the vectors by Q gives R Q^T: a part that was turned is turned back. The margin is that of `gram_schmidt`
    relative to the longer vector; see there for parallel vectors, whose margin is zero.
    """
    columns, margin = gram_schmidt(vectors, proper=True)
    longest = jnp.max(safe_norm(jax.lax.stop_gradient(vectors.astype(columns.dtype))), axis=-1)
    return jnp.swapaxes(columns, -1, -2), safe_divide(margin, longest)


def place(parts: Float[Array, "*batch parts points 3"], poses: Poses) -> Float[Array, "*batch parts points 3"]:
    """Return the points where the poses put them: R (x - c) + t."""
    x = parts - poses.centroids[..., None, :]
    turned = jnp.einsum("...ij,...nj->...ni", poses.rotations, x, precision=_HIGHEST)
    return turned + poses.translations[..., None, :]


def relative_to(poses: Poses, anchor: int = 0) -> Poses:
    """Return the poses in the frame of one part as it was given: g_a^-1 g_i, which leaves that part where it is.

    An assembly is the same wherever it stands, so that poses of the whole can only be compared in the frame of a part.
    """
    rotation = poses.rotations[..., anchor, :, :]
    back = jnp.swapaxes(rotation, -1, -2)[..., None, :, :]
    offsets = poses.translations - poses.translations[..., anchor : anchor + 1, :]
    return Poses(
        jnp.matmul(back, poses.rotations, precision=_HIGHEST),
        jnp.matmul(back, offsets[..., None], precision=_HIGHEST)[..., 0] + poses.centroids[..., anchor : anchor + 1, :],
        poses.centroids,
        poses.margins,
        poses.vectors,
    )


# Losses and measures ------------------------------------------------------------------------------------------------


def rotation_angle(first: Float[Array, "*batch 3 3"], second: Float[Array, "*batch 3 3"]) -> Float[Array, "*batch"]:
    """Return the angle between rotations in radians, [0, pi]; its gradient is finite everywhere, zero at 0 and pi."""
    between = jnp.matmul(jnp.swapaxes(first, -1, -2), second, precision=_HIGHEST)
    skew = between - jnp.swapaxes(between, -1, -2)
    sine = safe_norm(jnp.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], axis=-1)) / 2
    cosine = (jnp.trace(between, axis1=-2, axis2=-1) - 1) / 2
    # Where both vanish for lack of a rotation, atan2 has no gradient.
    nothing = (sine == 0) & (cosine == 0)
    return jnp.where(nothing, 0, jnp.arctan2(sine, jnp.where(nothing, 1, cosine)))


def translation_loss(
    found: Float[Array, "*batch parts 3"],
    wanted: Float[Array, "*batch parts 3"],
    *,
    mask: Bool[Array, "*batch parts"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the mean over the parts of the squared distance between two translations."""
    return _mean(jnp.sum(jnp.square(found - wanted), axis=-1), mask)


def rotation_loss(
    found: Float[Array, "*batch parts 3 3"],
    wanted: Float[Array, "*batch parts 3 3"],
    *,
    mask: Bool[Array, "*batch parts"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the mean over the parts of the angle between two rotations, in radians."""
    return _mean(rotation_angle(found, wanted), mask)


def frame_loss(
    vectors: Float[Array, "*batch parts 2 3"],
    wanted: Float[Array, "*batch parts 3 3"],
    *,
    mask: Bool[Array, "*batch parts"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the mean squared distance of the vectors that rotations are made of from the rows of the rotations.

    Its gradient is bounded where the vectors are parallel or vanish, and vectors that are not certain become short.
    """
    return _mean(jnp.sum(jnp.square(vectors - wanted[..., :2, :]), axis=(-2, -1)), mask)


def point_loss(
    found: Float[Array, "*batch parts points 3"],
    wanted: Float[Array, "*batch parts points 3"],
    *,
    mask: Bool[Array, "*batch parts points"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the mean squared distance of each point from where it belongs: over a part's points, then the parts."""
    squared = jnp.sum(jnp.square(found - wanted), axis=-1)
    return _mean(_mean(squared, mask), None if mask is None else jnp.any(mask, axis=-1))


def chamfer_distance(
    first: Float[Array, "*batch n 3"],
    second: Float[Array, "*batch m 3"],
    *,
    masks: tuple[Bool[Array, "*batch n"], Bool[Array, "*batch m"]] | None = None,
) -> Float[Array, "*batch"]:
    """Return mean_i min_j |x_i - y_j|^2 + mean_j min_i |x_i - y_j|^2; zero where either cloud is empty."""
    squared = jnp.sum(jnp.square(first[..., :, None, :] - second[..., None, :, :]), axis=-1)
    if masks is None:
        return jnp.mean(_least(squared, -1), axis=-1) + jnp.mean(_least(squared, -2), axis=-1)
    there = masks[0][..., :, None] & masks[1][..., None, :]
    squared = jnp.where(there, squared, jnp.inf)
    rows, columns = jnp.any(there, axis=-1), jnp.any(there, axis=-2)
    forth = _mean(jnp.where(rows, _least(squared, -1), 0), rows)
    return forth + _mean(jnp.where(columns, _least(squared, -2), 0), columns)


def part_accuracy(
    found: Float[Array, "*batch parts points 3"],
    wanted: Float[Array, "*batch parts points 3"],
    *,
    threshold: float = 0.01,
    mask: Bool[Array, "*batch parts points"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the share of the parts whose Chamfer distance from where they belong is below a threshold."""
    distance = chamfer_distance(found, wanted, masks=None if mask is None else (mask, mask))
    return _mean((distance < threshold).astype(distance.dtype), None if mask is None else jnp.any(mask, axis=-1))


def embedding_loss(
    parts: Float[Array, "*batch parts channels d"],
    whole: Float[Array, "*batch channels d"],
    *,
    mask: Bool[Array, "*batch parts"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the mean size of the entries of sum_i F_i - F, where F are the vectors of the whole shape."""
    parts = parts if mask is None else jnp.where(mask[..., None, None], parts, 0)
    return jnp.mean(jnp.abs(jnp.sum(parts, axis=-3) - whole), axis=(-2, -1))


def _least(x: jax.Array, axis: int) -> jax.Array:
    """Return the minimum; of ties the first gets the gradient."""
    index = jnp.argmin(jax.lax.stop_gradient(x), axis=axis, keepdims=True)
    return jnp.squeeze(jnp.take_along_axis(x, index, axis=axis), axis)


def _mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return jnp.mean(values, axis=-1)
    return safe_divide(jnp.sum(jnp.where(mask, values, 0), axis=-1), jnp.sum(mask, axis=-1).astype(values.dtype))


def _unit_size(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `[..., channels, k]` with mean square 1, or zeros, and what it was divided by, `[..., 1]`."""
    wide = x.astype(at_least_float32(x.dtype))
    size = safe_sqrt(jnp.mean(jnp.square(wide), axis=(-2, -1)))
    return safe_divide(wide, size[..., None, None]).astype(x.dtype), size[..., None]


# The network --------------------------------------------------------------------------------------------------------


class SE3Assembly(nn.Module):
    """Predict the pose of each fragment of a broken shape from the points of all of them.

    F_i = mean over the points of the vectors of part i, `[channels, 3]`, that an encoder gives; G_i = S_i W + b,
    `[channels, channels]`, with S_i `[channels, 3]` the invariant numbers of F_i (`VNStdFeature`);
    H_i = mean_j G_j F_i; V_i = linear and leaky ReLU layers of F_i and H_i. R_i takes the Gram-Schmidt axes of two
    vectors that are linear in V_i to the coordinate axes, and t_i is linear in the invariant numbers of V_i.

    With `stable` F_i is first divided by s_i, the root of its mean square, S_i by that of its own, and H_i by the root
    of the number of channels, so that F_i and H_i are of one size; t_i is told s_i and V_i R_i^T, without which the
    left and the right half of a mirror-symmetric shape, whose invariant numbers are the same, would go to one place.
    Without `stable` V_i sees H_i alone, as published. That is badly conditioned: F is small, as the mean of vectors
    about a centroid, S and G are quadratic in it, and G has rank 4 at most, with F's spread of singular values in it
    once more. The vectors of H_i are then nearly parallel and very short (1e-5 in small networks): poses lose one to
    three digits to rounding, gradients are as much too large, and t_i is next to constant.

    Symmetry:
      SE(3) acts on each part for itself, exactly: a motion (Q, s) of part i as it is given turns F_i and H_i by Q and
      changes no G and no other part's H; its rotation becomes R_i Q^T, its translation stays and its centroid moves
      along, so that the assembled shape (`place`) does not change at all. Equivariant to permutations of the parts and
      invariant to those of the points.
      Reflections: F and H turn with O(3), G does not change; rotations stay proper, so that the pose of a mirrored part
      is not the mirrored pose. The first two rows of R_i are made of vectors that turn with reflections too: of a kind
      of shapes with a mirror plane they can only learn axes within that plane. Lay its normal along z.
      Where it breaks: where the two vectors are parallel or vanish, see `gram_schmidt`, as they do on symmetric parts;
      and as `VNDGCNNEncoder`.

    Attributes:
      encoder: gives each point vectors: called as `VNDGCNNEncoder`, whose second output is used; it must centre.
      hidden_features: widths of V's layers.
      correlation: whether V_i sees H_i; otherwise F_i alone, each part for itself.
      stable: whether V_i sees F_i beside H_i, both of unit size; `False` is the published form.
      negative_slope: of the leaky ReLUs.
      dtype: compute dtype of all but the encoder; `None` infers it from input and parameters. Poses are in float32 or
        better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats`, see `VNBatchNorm`. F is sown as `vectors` in `intermediates`, and G as `shapes`.

    Cost:
      The encoder for each part, channels^2 x 3 for each part to correlate, and channels x hidden_features x 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import SE3Assembly, VNDGCNNEncoder
      >>> encoder = VNDGCNNEncoder(stages=((4,), (6,)), embed_features=8, num_neighbors=5)
      >>> model = SE3Assembly(encoder=encoder, hidden_features=(8,))
      >>> poses = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 3, 9, 3)))[0]
      >>> poses.rotations.shape, poses.translations.shape
      ((2, 3, 3, 3), (2, 3, 3))

    Source:
      Wu, Tie, Du, Zhao, Dong, Leveraging SE(3) Equivariance for Learning 3D Geometric Shape Assembly, ICCV 2023;
      reference code crtie/Leveraging-SE-3-Equivariance-for-Learning-3D-Geometric-Shape-Assembly at 7061d09,
      `BreakingBad/multi_part_assembly/models/vnn`.

    Differs:
      The reference sums G over the parts where this takes the mean, and then computes its poses from F all the same
      (`correlation=False`); its default pose regressor is a plain perceptron, which turns with nothing, and its
      equivariant one is what is built here. Translations are where centroids go, because parts are centred here. The
      losses that need further networks (reconstruction, adversarial) are left out; the others are functions here.
    """

    encoder: nn.Module
    hidden_features: Sequence[int] = (1024, 512)
    correlation: bool = True
    stable: bool = True
    negative_slope: float = 0.2
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        parts: Float[Array, "*batch parts points 3"],
        *,
        mask: Bool[Array, "*batch parts points"] | None = None,
        deterministic: bool = True,
    ) -> Poses:
        """Predict the poses.

        Args:
          parts: the points of each part, wherever it lies; in any unit, the reference has shapes of about unit size.
          mask: True = a point, False = padding; a part without points is padding as a whole.
          deterministic: use the running statistics, and do not update them.

        Returns:
          The pose of each part. A NaN coordinate makes the poses of all parts of its shape NaN.

        Raises:
          ValueError: on parts or a mask of a wrong shape or dtype, or fields out of range.
        """
        if parts.ndim < 3:
            raise ValueError(f"parts of shape {parts.shape} must be [*batch, parts, points, 3]; add an axis")
        check_positions(parts, mask)
        if not self.hidden_features or min(self.hidden_features) < 4:
            raise ValueError(
                f"hidden_features={tuple(self.hidden_features)} must not be empty and at least 4; set hidden_features"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init}
        present = None if mask is None else jnp.any(mask, axis=-1)

        def invariant(x: jax.Array, name: str) -> jax.Array:
            layer = VNStdFeature(negative_slope=self.negative_slope, name=name, **common)
            return layer(x, mask=present, deterministic=deterministic)[0]

        _, embedded = self.encoder(parts, mask=mask, deterministic=deterministic)
        vectors = vector_mean_pool(embedded, mask=mask)
        dense = functools.partial(nn.Dense, bias_init=self.bias_init, precision=_HIGHEST, **common)
        self.sow("intermediates", "vectors", vectors)
        size = None
        if self.stable:
            vectors, size = _unit_size(vectors)
        numbers = invariant(vectors, "invariant")
        if self.stable:
            numbers, _ = _unit_size(numbers)
        shapes = dense(vectors.shape[-2], name="shape")(numbers)
        self.sow("intermediates", "shapes", shapes)
        x = vectors
        if self.correlation:
            x = correlate(vectors, shapes, mask=present)
            if self.stable:
                x = jnp.concatenate([vectors.astype(x.dtype), x / vectors.shape[-2] ** 0.5], axis=-2)
        for index, width in enumerate(self.hidden_features):
            x = VNLinear(width, name=f"linear{index + 1}", **common)(x)
            x = VNLeakyReLU(self.negative_slope, name=f"gate{index + 1}", **common)(x)
        dtype = at_least_float32(parts.dtype)
        pair = VNLinear(2, name="rotation", **common)(x).astype(dtype)
        rotations, margin = rotation_from_vectors(pair)
        numbers = invariant(x, "place_invariant")
        numbers = numbers.reshape(*numbers.shape[:-2], -1)
        if size is not None:
            # Inner products do not see reflections; coordinates in the axes of R do. R learns nothing from them: its
            # gradient is as steep as the margin is small.
            axes_found = jnp.swapaxes(jax.lax.stop_gradient(rotations), -1, -2)
            seen = jnp.matmul(x.astype(dtype), axes_found, precision=_HIGHEST)
            seen = seen.reshape(*seen.shape[:-2], -1)
            numbers = jnp.concatenate([y.astype(numbers.dtype) for y in (numbers, size, seen)], axis=-1)
        translations = dense(3, name="translation")(numbers).astype(dtype)
        centroids = vector_mean_pool(parts.astype(dtype)[..., None, :], mask=mask)[..., 0, :]
        if present is not None:
            rotations = jnp.where(present[..., None, None], rotations, jnp.eye(3, dtype=dtype))
            translations = jnp.where(present[..., None], translations, 0)
            margin = jnp.where(present, margin, 0)
            pair = jnp.where(present[..., None, None], pair, 0)
        # NaN has no Gram-Schmidt axes to come out of: what is compared there is false.
        rotations = rotations + 0 * jnp.sum(x.astype(dtype), axis=(-2, -1))[..., None, None]
        names = (axes.BATCH, None, None, None)
        return Poses(
            axes.constrain_last(rotations, *names),
            axes.constrain_last(translations, *names[:3]),
            axes.constrain_last(centroids, *names[:3]),
            axes.constrain_last(margin, *names[:2]),
            axes.constrain_last(pair, *names),
        )


def se3_assembly(
    embed_features: int = 256,
    hidden_features: Sequence[int] = (1024, 512),
    stages: Sequence[Sequence[int]] = ((21, 21), (21, 21), (21,)),
    num_neighbors: int = 20,
    correlation: bool = True,
    stable: bool = True,
    dtype: Dtype | None = None,
) -> SE3Assembly:
    """Return the network with the encoder of the reference: parts `[*batch, parts, points, 3]` to `Poses`.

    Args:
      embed_features: see `VNDGCNNEncoder`; there are twice as many channels.
      hidden_features: see `SE3Assembly`.
      stages: see `VNDGCNNEncoder`.
      num_neighbors: see there.
      correlation: see `SE3Assembly`.
      stable: see there.
      dtype: compute dtype.

    Returns:
      An unbound `SE3Assembly` module.
    """
    encoder = VNDGCNNEncoder(stages, embed_features, num_neighbors, dtype=dtype)
    return SE3Assembly(encoder, hidden_features, correlation, stable, dtype=dtype)


# Our paths and the reference's names: its encoder (`VN_DGCNN`) and its equivariant regressor (`VN_Regressor`).
REFERENCE_NAMES: Mapping[str, str] = {
    **{
        ours: theirs
        for number in range(1, 7)
        for ours, theirs in block_names(f"encoder/conv{number}", f"encoder.conv{number}").items()
    },
    **block_names("invariant/block1", "encoder.VnInv.vn1"),
    **block_names("invariant/block2", "encoder.VnInv.vn2"),
    "invariant/frame": "encoder.VnInv.vn_lin",
    "shape": "encoder.linear0",
    # Their sequence alternates linear maps and ReLUs.
    "linear1": "pose_predictor.fc_layers.0.map_to_feat",
    "gate1/direction": "pose_predictor.fc_layers.1.map_to_dir",
    "linear2": "pose_predictor.fc_layers.2.map_to_feat",
    "gate2/direction": "pose_predictor.fc_layers.3.map_to_dir",
    "rotation": "pose_predictor.rot_head.map_to_feat",
    **block_names("place_invariant/block1", "pose_predictor.VnInv.vn1"),
    **block_names("place_invariant/block2", "pose_predictor.VnInv.vn2"),
    "place_invariant/frame": "pose_predictor.VnInv.vn_lin",
    "translation": "pose_predictor.trans_head",
}


def from_reference(tensors: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of `SE3Assembly` from a checkpoint of the reference with its equivariant regressor.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      variables: of our model (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      The collections `params` and `batch_stats`.

    Raises:
      ValueError: if names or shapes are not those of the model.
    """
    return read_variables(tensors, variables, REFERENCE_NAMES)


def reference_inputs(model: SE3Assembly) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 2, 32, 3), jnp.float32),)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/crtie/Leveraging-SE-3-Equivariance-for-Learning-3D-Geometric-Shape-Assembly",
        module=SE3Assembly,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=(r"^encoder\.VnInv\.vn_lin\.weight$", r"^pose_predictor\.rot_head\.map_to_feat\.weight$"),
        ignored=COUNTED,
        layout=dialects.table_layout(REFERENCE_NAMES),
    ),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "se3_assembly": {
        "module": se3_assembly,
        "inputs": (jax.ShapeDtypeStruct((1, 4, 256, 3), jnp.float32),),
        "embed_features": 256,
    },
}
