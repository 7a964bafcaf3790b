"""PaRot: patches of a point cloud as invariant features and poses, put together again through relative poses.

Longer than most files, since the patch encoder, the losses that train it, two networks and the reference's names belong
to one paper.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxlayers.core import axes, dialects
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.safe import safe_norm, safe_normalize
from jaxlayers.core.types import Dtype, Initializer, ModuleFactory, Params
from jaxlayers.equivariant.learned_canonicalization import VectorCanonicalizer, gram_schmidt
from jaxlayers.ops.neighbours import displacements, farthest_points, gather, k_nearest
from jaxlayers.ops.pooling import masked_max

vector_canonicalizer: Callable[..., nn.Module] = functools.partial(VectorCanonicalizer, features=8, num_vectors=2)
"""Makes what chooses the pose of a patch: two layers of eight vector channels."""

_leaky = functools.partial(nn.leaky_relu, negative_slope=0.2)
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class PatchCode(NamedTuple):
    """What is known of each patch.

    Attributes:
      features: what does not turn with the patch.
      directions: two unit vectors that do.
    """

    features: Float[Array, "*batch patches features"]
    directions: Float[Array, "*batch patches 2 3"]


class SiameseLosses(NamedTuple):
    """What training on two turned copies of each patch minimises, each a mean over patches, `[*batch]`.

    Attributes:
      direction: squared difference of the directions after turning them back.
      orthogonality: squared cosine between the two directions.
      feature: squared difference of the features.
    """

    direction: Float[Array, "*batch"]
    orthogonality: Float[Array, "*batch"]
    feature: Float[Array, "*batch"]


# Poses ----------------------------------------------------------------------------------------------------------------


def orientation(directions: Float[Array, "*batch 2 3"]) -> Float[Array, "*batch 3 3"]:
    """Return d_1, d_2 and the unit vector along d_1 x d_2 as rows, which turn with the directions.

    It is a rotation where d_1 and d_2 are orthogonal. For parallel directions the last row is zero.
    """
    directions = directions.astype(at_least_float32(directions.dtype))
    last = safe_normalize(jnp.cross(directions[..., 0, :], directions[..., 1, :]))
    return jnp.concatenate([directions, last[..., None, :]], axis=-2)


def relative_pose(
    first: Float[Array, "*batch 3 3"], second: Float[Array, "*batch 3 3"], offset: Float[Array, "*batch 3"]
) -> Float[Array, "*batch 16"]:
    """Return the second of two poses as the first sees it, in 16 numbers that no rotation of both changes.

    second first^T (9 numbers by rows), first r, second r (3 each) and the distance, where r is the direction of the
    offset from the first to the second and the rows of `first` and `second` are the axes of each.

    Args:
      first: axes as rows, of `orientation`.
      second: the same.
      offset: from the first to the second, in any unit.

    Returns:
      Invariants, in [-1, 1] but for the distance; an offset of zero gives zeros for its direction.
    """
    turn = _einsum("...ik,...jk->...ij", second, first)
    along = safe_normalize(offset)[..., None]
    seen = (_einsum("...ij,...jk->...ik", pose, along)[..., 0] for pose in (first, second))
    return jnp.concatenate([turn.reshape(*turn.shape[:-2], 9), *seen, safe_norm(offset, keepdims=True)], axis=-1)


def random_rotations(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape 3 3"]:
    """Return uniformly distributed rotation matrices."""
    matrix = jax.random.orthogonal(key, 3, tuple(shape), dtype)
    return matrix * jnp.sign(jnp.linalg.det(matrix))[..., None, None]


def siamese_losses(
    first: PatchCode,
    second: PatchCode,
    first_rotations: Float[Array, "*batch patches 3 3"],
    second_rotations: Float[Array, "*batch patches 3 3"],
    *,
    mask: Bool[Array, "*batch patches"] | None = None,
) -> SiameseLosses:
    """Return how far the codes of two turned copies of each patch are from one shape in two poses.

    With copies R_1 x and R_2 x of a patch x: direction = mean |d_1 - R_1 R_2^T d_2|^2 / 3 over both directions,
    orthogonality = mean <d_11, d_12>^2, feature = mean |f_1 - f_2|^2 / features.

    Args:
      first: code of the patches turned by the first rotations.
      second: code of the patches turned by the second.
      first_rotations: as x -> R x.
      second_rotations: the same.
      mask: True = a patch, False = padding.

    Returns:
      The three means. The paper's code weighs them 1, 0.2 (0.1 for global patches) and 0.
    """
    restored = _einsum("...ij,...kj,...vk->...vi", first_rotations, second_rotations, second.directions)
    measured = (
        jnp.mean(jnp.square(first.directions - restored), axis=(-2, -1)),
        jnp.square(jnp.sum(first.directions[..., 0, :] * first.directions[..., 1, :], axis=-1)),
        jnp.mean(jnp.square(first.features - second.features), axis=-1),
    )
    if mask is None:
        return SiameseLosses(*(jnp.mean(values, axis=-1) for values in measured))
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return SiameseLosses(*(jnp.sum(jnp.where(mask, values, 0), axis=-1) / count for values in measured))


# Patches --------------------------------------------------------------------------------------------------------------


def _block(module: Any, x: jax.Array, width: int, name: str, activation_fn: Any = nn.relu) -> jax.Array:
    """Return a dense layer without bias, normalised and activated."""
    x = _dense(module, width, name, use_bias=module.norm is None)(x)
    if module.norm is not None:
        x = module.norm(dtype=module.dtype, param_dtype=module.param_dtype, name=f"{name}_norm")(x)
    return activation_fn(x)


def _dense(module: Any, width: int, name: str, *, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(
        width,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=module.kernel_init,
        bias_init=module.bias_init,
        name=name,
    )


def _settings(module: Any) -> dict[str, Any]:
    """Return the fields that all modules of this file share."""
    names = ("canonicalizer", "norm", "dtype", "param_dtype", "kernel_init", "bias_init")
    return {name: getattr(module, name) for name in names}


class PatchEncoder(nn.Module):
    """Split patches of points into features that do not turn with them and two directions that do.

    h = max_k perceptron(x_k), features = perceptron(h), d_a = V_a perceptron_a(h) / |..|, a = 1, 2, with x the points
    of a patch about its centre `[points, 3]`. With a canonicaliser the patch is seen as x R, where the columns of R are
    the Gram-Schmidt axes of two vectors that it reads off the patch, and the directions are turned back, R d, from a
    d_a to which the a-th axis is added before its normalisation.

    Symmetry:
      With a canonicaliser, exactly: features are invariant to rotations of a patch, directions turn with it. Both are
      invariant to permutations of its points. Not to reflections.
      Without one (the paper's way) rotations are learned: `siamese_losses` on turned copies drives the error down.
      Where it breaks: where the two vectors vanish or are parallel, see `gram_schmidt`, as for patches on a line
      through their centre and for symmetric ones, no pose turns with the patch. Value and gradient are finite.

    Attributes:
      features: width of the features.
      point_features: widths of the perceptron of every point, before a last layer of `features`.
      depth: layers of the perceptron of the features.
      direction_features: widths of the perceptrons of the directions.
      canonicalizer: makes what chooses the pose, called as `canonicalizer(points, (outward,), mask=mask)`; `None` for
        none.
      norm: makes the normalisation after every dense layer but the last of the directions, or `None` for none (then
        dense layers have biases).
      dtype: compute dtype; `None` infers it from input and parameters. Poses are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      `gram_schmidt`'s margins are sown as `margin` in `intermediates`: about 0 where a pose is arbitrary.

    Cost:
      3 p_1 + p_1 p_2 + p_2 features multiply-accumulates a point for point_features (p_1, p_2), and those of the
      canonicaliser.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.parot import PatchEncoder
      >>> patches = jax.random.normal(jax.random.key(0), (2, 4, 7, 3))
      >>> code, _ = PatchEncoder(features=8).init_with_output(jax.random.key(1), patches)
      >>> code.features.shape, code.directions.shape
      ((2, 4, 8), (2, 4, 2, 3))

    Source:
      Zhang, Yu, Zhang, Cai, PaRot: Patch-Wise Rotation-Invariant Network via Feature Disentanglement and Pose
      Restoration, AAAI 2023, section 3.1; reference code dingxin-zhang/PaRot at c0b5905, `models/model_cls.py`.

    Differs:
      The canonicaliser is ours: it makes exact what the paper learns (`canonicalizer=None` is the paper's network).
      Layer instead of batch normalisation, so that a patch does not depend on its batch; masks.
    """

    features: int = 128
    point_features: Sequence[int] = (64, 128)
    depth: int = 2
    direction_features: Sequence[int] = (64, 32)
    canonicalizer: ModuleFactory | None = vector_canonicalizer
    norm: ModuleFactory | None = nn.LayerNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "*batch patches points 3"],
        outward: Float[Array, "*batch patches 3"] | None = None,
        *,
        mask: Bool[Array, "*batch patches points"] | None = None,
    ) -> PatchCode:
        """Encode patches.

        Args:
          patches: points of each patch from its centre; about 1 suits the initialisation.
          outward: a further vector of each patch that turns with it, for the canonicaliser, such as that from the
            cloud's centroid to the patch; steadies the pose of flat patches.
          mask: True = a point, False = padding.

        Returns:
          Features and directions, the latter in float32 or better.

        Raises:
          ValueError: on shapes that do not fit or sizes that are not positive.
        """
        if patches.ndim < 3 or patches.shape[-1] != 3 or patches.shape[-2] < 1:
            raise ValueError(f"patches of shape {patches.shape} must be [*batch, patches, points, 3]; reshape them")
        if min(self.features, self.depth, *self.point_features, *self.direction_features) < 1:
            raise ValueError(
                f"features={self.features}, point_features={self.point_features}, depth={self.depth} and "
                f"direction_features={self.direction_features} must be positive; set them"
            )
        patches = patches.astype(at_least_float32(patches.dtype))
        if mask is not None:
            patches = jnp.where(mask[..., None], patches, 0)
        turn = None
        if self.canonicalizer is not None:
            further = () if outward is None else (jnp.broadcast_to(outward[..., None, :], patches.shape),)
            vectors = self.canonicalizer(name="pose")(patches, further, mask=mask)
            turn, margin = gram_schmidt(vectors, proper=True)
            self.sow("intermediates", "margin", margin)
            patches = _einsum("...ki,...ij->...kj", patches, turn)
        x = patches
        for index, width in enumerate((*self.point_features, self.features)):
            x = _block(self, x, width, f"point_{index}")
        h = masked_max(x, mask)
        features = h
        for index in range(self.depth):
            features = _block(self, features, self.features, f"invariant_{index}")
        found = []
        for head in range(2):
            x = h
            for index, width in enumerate(self.direction_features):
                x = _block(self, x, width, f"direction_{head}_{index}")
            x = _dense(self, 3, f"direction_{head}_out", use_bias=False)(x)
            x = x.astype(patches.dtype)
            # Beside an axis of the pose, so that the two are not parallel to begin with.
            found.append(safe_normalize(x if turn is None else x.at[..., head].add(1.0)))
        directions = jnp.stack(found, axis=-2)
        if turn is not None:
            directions = _einsum("...vj,...ij->...vi", directions, turn)
        return PatchCode(features, directions)


class _Patches(NamedTuple):
    """The patches of a cloud at two scales."""

    positions: jax.Array  # of their centres, from the cloud's centroid
    mask: jax.Array | None
    features: jax.Array  # local and global ones, `[*batch, patches, 2 features]`
    local_axes: jax.Array
    global_axes: jax.Array
    poses: jax.Array  # of the local patch as the global one sees it
    losses: dict[str, SiameseLosses]


class _TwoScales(nn.Module):
    """Encode the patches of a cloud at two scales, and let local patches see those around them."""

    patches: int
    patch_size: int
    global_points: int
    neighbours: int
    features: int
    pose_features: int
    canonicalizer: ModuleFactory | None
    norm: ModuleFactory | None
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, positions: jax.Array, mask: jax.Array | None, *, siamese: bool) -> _Patches:
        chosen, centre_mask = _farthest(positions, self.patches, mask)
        centres = _take(positions, chosen)
        lists = k_nearest(positions, self.patch_size, mask=mask, queries=centres)
        local = displacements(positions, lists, queries=centres)
        local_mask = lists.mask
        far, far_mask = _farthest(positions, self.global_points, mask)
        whole = _take(positions, far)[..., None, :, :] - centres[..., :, None, :]
        whole_mask = None if far_mask is None else jnp.broadcast_to(far_mask[..., None, :], whole.shape[:-1])
        encoder = functools.partial(PatchEncoder, self.features, **_settings(self))
        losses: dict[str, SiameseLosses] = {}

        def encode(name: str, patches: jax.Array, points: jax.Array | None) -> PatchCode:
            module = encoder(name=name)
            if not siamese:
                return module(patches, centres, mask=points)
            turns = random_rotations(self.make_rng("rotation"), (2, *patches.shape[:-2]), patches.dtype)
            first, second = (
                module(
                    _einsum("...ki,...ji->...kj", patches, turn),
                    _einsum("...i,...ji->...j", centres, turn),
                    mask=points,
                )
                for turn in turns
            )
            losses[name.removesuffix("_encoder")] = siamese_losses(first, second, turns[0], turns[1], mask=centre_mask)
            return PatchCode(first.features, _einsum("...vi,...ij->...vj", first.directions, turns[0]))

        near = encode("local_encoder", local, local_mask)
        wide = encode("global_encoder", whole, whole_mask)
        near_axes, wide_axes = orientation(near.directions), orientation(wide.directions)

        # Patches see those around them, themselves included, by what they hold and how they lie.
        lists = k_nearest(centres, self.neighbours, mask=centre_mask, include_self=True)
        around = gather(near.features, lists.indices)
        own = near.features[..., None, :]
        axes_around = gather(near_axes, lists.indices)
        pose = relative_pose(
            jnp.broadcast_to(near_axes[..., None, :, :], axes_around.shape), axes_around, displacements(centres, lists)
        )
        pose = _block(self, pose, self.pose_features, "pose")
        x = jnp.concatenate([around, around - own, pose.astype(around.dtype)], axis=-1)
        for index in range(3):
            x = _block(self, x, self.features, f"intra_{index}")
        x = masked_max(x, lists.mask)
        return _Patches(
            centres,
            centre_mask,
            axes.constrain_last(jnp.concatenate([x, wide.features], axis=-1), axes.BATCH, axes.NODES, None),
            near_axes,
            wide_axes,
            relative_pose(wide_axes, near_axes, centres),
            losses,
        )


def _farthest(positions: jax.Array, count: int, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Return the indices of the `count` points farthest from one another, and which of them are there."""
    available = positions.shape[-2]
    chosen = farthest_points(positions, count, mask=mask)
    if mask is None and count <= available:
        return chosen, None
    present = jnp.full(chosen.shape[:-1], available) if mask is None else jnp.sum(mask, axis=-1)
    return chosen, jnp.arange(count) < present[..., None]


def _take(x: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, indices[..., None], axis=-2)


def _centred(module: Any, positions: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Check what both networks need, and return the points from their centroid."""
    if positions.ndim < 2 or positions.shape[-1] != 3 or positions.shape[-2] < 1:
        raise ValueError(f"positions of shape {positions.shape} must be [*batch, points, 3]; put the coordinates last")
    if mask is not None and mask.shape != positions.shape[:-1]:
        raise ValueError(f"mask of shape {mask.shape} must be {positions.shape[:-1]}, one entry a point; reshape it")
    sizes = (module.patches, module.patch_size, module.global_points, module.neighbours, module.pose_features)
    if min(sizes) < 1:
        raise ValueError(
            f"patches, patch_size, global_points, neighbours and pose_features={sizes} must be positive; set them"
        )
    positions = positions.astype(at_least_float32(positions.dtype))
    if mask is None:
        return positions - jnp.mean(positions, axis=-2, keepdims=True)
    positions = jnp.where(mask[..., None], positions, 0)
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)[..., None, None]
    return jnp.where(mask[..., None], positions - jnp.sum(positions, axis=-2, keepdims=True) / count, 0)


def _settled(offsets: jax.Array, points: jax.Array) -> jax.Array:
    """Return the offsets with zeros where there is nothing but rounding, as from a centre of a patch to itself.

    Its direction would be noise, and a different one in every compilation.
    """
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(points)), axis=(-2, -1))[..., None, None, None]
    rounding = 16 * jnp.finfo(points.dtype).eps * size
    return jnp.where(jnp.any(jnp.abs(offsets) > rounding, axis=-1, keepdims=True) | jnp.isnan(offsets), offsets, 0)


def _gathered(module: Any, found: _Patches, widths: Sequence[int]) -> jax.Array:
    """Return what all patches together say of the cloud."""
    pose = _block(module, found.poses, module.pose_features, "inter_pose", _leaky)
    x = jnp.concatenate([found.features, pose.astype(found.features.dtype)], axis=-1)
    for index, width in enumerate(widths):
        x = _block(module, x, width, f"inter_{index}", _leaky)
    return masked_max(x, found.mask)


# Networks -------------------------------------------------------------------------------------------------------------


class PaRotClassifier(nn.Module):
    """Classify point clouds in any pose by what their patches are and how these lie to each other.

    Patches about farthest points are encoded at two scales (`PatchEncoder`): the nearest points of each, and a few
    points of the whole cloud as seen from it. Intra-scale: each local patch gathers its neighbours' features with their
    `relative_pose`. Inter-scale: both scales of a patch are joined with the pose of one as the other sees it; the
    maximum over the patches goes to a perceptron.

    Symmetry:
      With a canonicaliser, exactly invariant to rotations and translations, and to permutations of the points; not to
      reflections. Without one invariant to translations and permutations only, and to rotations as far as trained.
      Where it breaks: where rounding decides on neighbours or farthest points, and where `PatchEncoder` does.

    Attributes:
      num_classes: number of logits; 0 gives the features before the head.
      patches: how many, at points far from one another.
      patch_size: points of a local patch.
      global_points: points that stand for the whole cloud.
      neighbours: patches that a patch gathers from, itself included.
      features: of a patch at each scale.
      pose_features: that relative poses are embedded in.
      inter_features: widths of the perceptron of every patch before the maximum.
      hidden_features: widths of the perceptron after it.
      dropout_rate: dropout after every hidden layer, in [0, 1).
      canonicalizer: makes what chooses the pose of a patch, see `PatchEncoder`; `None` for the paper's way.
      norm: makes the normalisation after every dense layer but the head, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters. Poses are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG streams `dropout`, when `deterministic=False` and the rate is not 0, and `rotation`, when `siamese=True`.

    Cost:
      That of patches x (patch_size + global_points) points in `PatchEncoder`, about 4 features^2 multiply-accumulates
      for each of patches x neighbours pairs, and points^2 distances.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.parot import PaRotClassifier
      >>> model = PaRotClassifier(5, patches=4, patch_size=3, global_points=3, neighbours=2, features=8)
      >>> x = jax.random.normal(jax.random.key(0), (2, 9, 3))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
      (2, 5)

    Source:
      Zhang, Yu, Zhang, Cai, PaRot, AAAI 2023, sections 3.1 to 3.3; reference code dingxin-zhang/PaRot at c0b5905,
      `models/model_cls.py`.

    Differs:
      See `PatchEncoder`. Positions count from the centroid; the code's inputs are centred before. Farthest points start
      at the one farthest from the centroid, not at random. The third axis of a pose passes its gradient on.
    """

    num_classes: int = 40
    patches: int = 256
    patch_size: int = 64
    global_points: int = 32
    neighbours: int = 32
    features: int = 128
    pose_features: int = 32
    inter_features: Sequence[int] = (256, 512, 1024)
    hidden_features: Sequence[int] = (512, 256)
    dropout_rate: float = 0.0
    canonicalizer: ModuleFactory | None = vector_canonicalizer
    norm: ModuleFactory | None = nn.LayerNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        *,
        mask: Bool[Array, "*batch points"] | None = None,
        siamese: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "*batch outputs"] | tuple[Float[Array, "*batch outputs"], dict[str, SiameseLosses]]:
        """Classify clouds.

        Args:
          positions: of the points; in the unit ball suits the initialisation.
          mask: True = a point, False = padding.
          siamese: encode two randomly turned copies of every patch, go on with the first, its directions turned back,
            and return `SiameseLosses` of both scales, `{"local": ..., "global": ...}`, as well.
          deterministic: no dropout.

        Returns:
          Logits, or features if `num_classes` is 0. NaN, for a cloud with a NaN coordinate.

        Raises:
          ValueError: on shapes that do not fit or sizes that are not positive.
        """
        found = _two_scales(self, positions, mask, siamese=siamese)
        x = _gathered(self, found, self.inter_features)
        for index, width in enumerate(self.hidden_features):
            x = _block(self, x, width, f"cloud_{index}", _leaky)
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = axes.constrain_last(x, axes.BATCH, None)
        x = _dense(self, self.num_classes, "head")(x) if self.num_classes else x
        return (x, found.losses) if siamese else x


class PaRotSegmenter(nn.Module):
    """Label every point of a cloud in any pose by the patches around it and where it lies in their poses.

    Patches at two scales and their summary as in `PaRotClassifier`; the summary goes back to each patch, h_j; then
    pose-aware propagation to point i from its nearest patches, sum_j perceptron(h_j, embed(|r|, R_j r / |r|,
    S_j r / |r|)), r = x_i - c_j, with c_j the centre of a patch and R_j, S_j its local and global axes; then a
    perceptron of every point.

    Symmetry:
      As `PaRotClassifier`, and equivariant to permutations of the points.

    Attributes:
      num_classes: number of logits of each point; 0 gives the features before the head.
      patches: how many, at points far from one another.
      patch_size: points of a local patch.
      global_points: points that stand for the whole cloud.
      neighbours: patches that a patch gathers from, itself included.
      nearest_patches: patches that a point gathers from.
      features: of a patch at each scale.
      pose_features: that relative poses are embedded in.
      inter_features: widths of the perceptron of every patch before the maximum.
      patch_features: widths of the perceptron of every patch after it.
      point_features: widths of the perceptron of every pair of point and patch.
      hidden_features: widths of the perceptron of every point.
      dropout_rate: dropout before the head, in [0, 1).
      canonicalizer: makes what chooses the pose of a patch, see `PatchEncoder`; `None` for the paper's way.
      norm: makes the normalisation after every dense layer but the head, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters. Poses are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG streams `dropout`, when `deterministic=False` and the rate is not 0, and `rotation`, when `siamese=True`.

    Cost:
      That of `PaRotClassifier`, and points x nearest_patches x the perceptron of pairs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.parot import PaRotSegmenter
      >>> model = PaRotSegmenter(5, patches=4, patch_size=3, global_points=3, neighbours=2, features=8)
      >>> x = jax.random.normal(jax.random.key(0), (2, 9, 3))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
      (2, 9, 5)

    Source:
      Zhang, Yu, Zhang, Cai, PaRot, AAAI 2023, sections 3.1 to 3.4; reference code dingxin-zhang/PaRot at c0b5905,
      `models/model_seg.py` and `models/propagation.py`.

    Differs:
      As `PaRotClassifier`. The code hands the *directions* of the patches' centres to the propagation, as if they lay
      on the unit sphere; here it gets the centres. The category of the whole cloud is optional. Dropout once, not
      twice.
    """

    num_classes: int = 50
    patches: int = 256
    patch_size: int = 64
    global_points: int = 64
    neighbours: int = 16
    nearest_patches: int = 11
    features: int = 128
    pose_features: int = 32
    inter_features: Sequence[int] = (256, 512, 1024)
    patch_features: Sequence[int] = (256, 256)
    point_features: Sequence[int] = (256, 128, 128)
    hidden_features: Sequence[int] = (128, 128)
    dropout_rate: float = 0.0
    canonicalizer: ModuleFactory | None = vector_canonicalizer
    norm: ModuleFactory | None = nn.LayerNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        category: Float[Array, "*batch categories"] | None = None,
        *,
        mask: Bool[Array, "*batch points"] | None = None,
        siamese: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "*batch points outputs"] | tuple[Float[Array, "*batch points outputs"], dict[str, SiameseLosses]]:
        """Label points.

        Args:
          positions: of the points; in the unit ball suits the initialisation.
          category: what is known of the whole cloud, such as its class as one-hot vector.
          mask: True = a point, False = padding.
          siamese: as in `PaRotClassifier`.
          deterministic: no dropout.

        Returns:
          Logits of each point, or features if `num_classes` is 0; meaningless where padded. NaN, for a cloud with a NaN
          coordinate.

        Raises:
          ValueError: on shapes that do not fit or sizes that are not positive.
        """
        if self.nearest_patches < 1:
            raise ValueError(f"nearest_patches={self.nearest_patches} must be positive; set it")
        if category is not None and category.shape[:-1] != positions.shape[:-2]:
            raise ValueError(
                f"category of shape {category.shape} must be [*batch, categories], of the batch of positions "
                f"{positions.shape}; reshape it"
            )
        found = _two_scales(self, positions, mask, siamese=siamese)
        summary = _gathered(self, found, self.inter_features)[..., None, :]
        pose = _block(self, found.poses, self.pose_features, "back_pose", _leaky)
        summary = jnp.broadcast_to(summary, (*found.features.shape[:-1], summary.shape[-1]))
        x = jnp.concatenate([summary, found.features, pose.astype(summary.dtype)], axis=-1)
        for index, width in enumerate(self.patch_features):
            x = _block(self, x, width, f"back_{index}")

        points = _centred(self, positions, mask)
        lists = k_nearest(found.positions, self.nearest_patches, mask=found.mask, queries=points)
        offsets = _settled(-displacements(found.positions, lists, queries=points), points)
        along = safe_normalize(offsets)[..., None]
        seen = [
            _einsum("...ij,...jk->...ik", gather(pose, lists.indices), along)[..., 0]
            for pose in (found.local_axes, found.global_axes)
        ]
        pose = jnp.concatenate([safe_norm(offsets, keepdims=True), *seen], axis=-1)
        pose = _block(self, pose, self.pose_features, "point_pose", _leaky)
        around = gather(x, lists.indices)
        parts = [around, pose.astype(around.dtype)]
        if category is not None:
            known = category[..., None, None, :].astype(around.dtype)
            parts.append(jnp.broadcast_to(known, (*around.shape[:-1], category.shape[-1])))
        x = jnp.concatenate(parts, axis=-1)
        for index, width in enumerate(self.point_features):
            x = _block(self, x, width, f"spread_{index}")
        x = jnp.sum(jnp.where(lists.mask[..., None], x, 0), axis=-2)
        for index, width in enumerate(self.hidden_features):
            x = _block(self, x, width, f"label_{index}")
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = axes.constrain_last(x, axes.BATCH, axes.NODES, None)
        x = _dense(self, self.num_classes, "head")(x) if self.num_classes else x
        return (x, found.losses) if siamese else x


def _two_scales(module: Any, positions: jax.Array, mask: jax.Array | None, *, siamese: bool) -> _Patches:
    sizes = ("patches", "patch_size", "global_points", "neighbours", "features", "pose_features")
    part = _TwoScales(**{name: getattr(module, name) for name in sizes}, **_settings(module), name="scales")
    return part(_centred(module, positions, mask), mask, siamese=siamese)


# The reference code ---------------------------------------------------------------------------------------------------

# Paths of our modules and names of the reference's layers, by regular expressions applied in turn; of several layers in
# a row, `{1}` is the place of the dense layer with this number and its norm's is the next.
REFERENCE_NAMES: tuple[tuple[str, str], ...] = (
    (r"^scales/(local|global)_encoder/", r"\1_enc.disNet."),
    (r"^scales/", "local_enc.intra_layer."),
    (r"\.point_", ".pn_encoder."),
    (r"\.invariant_", ".inv_encoder."),
    (r"\.direction_0_", ".equi_encoder1."),
    (r"\.direction_1_", ".equi_encoder2."),
    (r"^inter_pose", "classifier.posembed.0"),
    (r"^back_pose", "classifier.pt_fp1.posembed.0"),
    (r"^point_pose", "classifier.pt_fp2.posembed.0"),
    (r"^back_(\d)$", r"classifier.pt_fp1.backbone.Conv_\1"),
    (r"^back_(\d)_norm$", r"classifier.pt_fp1.backbone.Bn_\1"),
    (r"^spread_(\d)$", r"classifier.pt_fp2.backbone.Conv_\1"),
    (r"^spread_(\d)_norm$", r"classifier.pt_fp2.backbone.Bn_\1"),
    (r"^label_0$", "classifier.convex"),
    (r"^label_0_norm$", "classifier.bnex"),
    (r"^label_1$", "classifier.conv1"),
    (r"^label_1_norm$", "classifier.bn1"),
    (r"^cloud_", "classifier.cls."),
    (r"intra_layer\.pose$", "intra_layer.pos"),
    (r"intra_layer\.pose_norm$", "intra_layer.bnpos"),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# The reference lists the inter-scale pose as distance, turn, first and second direction.
_INTER_POSE = [*range(1, 10), *range(13, 16), *range(10, 13), 0]


def from_reference(tensors: Mapping[str, Any], variables: Params) -> dict[str, Any]:
    """Return variables of `PaRotClassifier` or `PaRotSegmenter` from the state dict of the reference's network.

    The reference normalises by batch and learns its poses: our module must be made with `canonicalizer=None` and
    `norm=functools.partial(flax.linen.BatchNorm, use_running_average=True, epsilon=1e-5)`.

    Args:
      tensors: arrays by the reference's names.
      variables: of our module (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      A tree like `variables`.

    Raises:
      ValueError: if a tensor is missing or has another shape.
    """
    found: dict[str, Any] = {}
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    names = _reference_names(flat)
    for path, wanted in flat.items():
        name = names[path]
        if name not in tensors:
            raise ValueError(f"the state dict has no {name}, wanted for {path}; set the module's fields to fit")
        tensor = np.asarray(tensors[name])
        tensor = tensor.reshape(tensor.shape[:2]).T if path.endswith("/kernel") else tensor
        if tensor.shape != wanted.shape:
            raise ValueError(f"{name} must give {path} its shape {wanted.shape}, not {tensor.shape}; set the fields")
        if path.endswith(("/inter_pose/kernel", "/back_pose/kernel")):
            tensor = tensor[_INTER_POSE]
        found[path] = jnp.asarray(tensor)
    return flax.traverse_util.unflatten_dict(found, sep="/")


def _reference_names(paths: Collection[str]) -> dict[str, str]:
    """Return the reference's name for each path of our variables, which must be those of a whole model."""
    names = {}
    inter = "encoder" if any("/spread_" in path for path in paths) else "inter_layer"
    for path in paths:
        _, module, leaf = re.match(r"([^/]+)/(.*)/([^/]+)$", path).groups()  # type: ignore[union-attr]
        name = module
        for ours, theirs in REFERENCE_NAMES:
            name = re.sub(ours, theirs, name)
        name = re.sub(r"^inter_(\d)", rf"classifier.{inter}.\1", name)
        name = re.sub(r"posembed\.0_norm$", "posembed.1", name)
        name = re.sub(r"intra_layer\.intra_(\d)(_norm)?$", lambda match: _counted("intra_layer", match), name)
        # Dense, norm and activation are places of one row, in the last perceptron with a dropout.
        name = re.sub(r"(\w+)\.(\d)(_norm)?$", _placed, name) if "posembed" not in name else name
        name = re.sub(r"(equi_encoder\d)\.out$", r"\1.6", name)
        name = re.sub(r"^head$", "classifier.cls.8" if inter == "inter_layer" else "classifier.cls", name)
        names[path] = f"{name}.{_LEAVES[leaf]}"
    return names


def _layout(model: Any, variables: Mapping[str, Any]) -> dialects.Layout:
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    found = {}
    for path, name in _reference_names(flat).items():
        found[name] = tuple(flat[path].shape)
        if path.endswith("kernel"):
            # Dense layers of neighbours or points are convolutions of size one there.
            axes_of_one = next((count for part, count in _CONVOLUTIONS.items() if re.search(part, name)), 0)
            found[name] = (*found[name][::-1], *(1,) * axes_of_one)
    return found


def _counted(row: str, match: re.Match[str]) -> str:
    return f"{row}.{'bn' if match[2] else 'conv'}{int(match[1]) + 1}"


def _placed(match: re.Match[str]) -> str:
    step = 4 if match[1] == "cls" else 3
    return f"{match[1]}.{step * int(match[2]) + (1 if match[3] else 0)}"


_CONVOLUTIONS = {
    r"\.(intra_layer|pt_fp2)\.": 2,
    r"\.(pn_encoder|posembed|inter_layer|encoder|backbone|convex|conv1)\.|^classifier\.cls\.weight$": 1,
}
# Norms must be those of a batch and poses learned, see `from_reference`.
DIALECTS = tuple(
    dialects.Dialect(
        name="official",
        origin="github.com/dingxin-zhang/PaRot",
        module=module,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=(r"^local_enc\.disNet\.pn_encoder\.0\.weight$", mark),
        ignored={r"num_batches_tracked$": "a count of the batches that were seen in training"},
        layout=_layout,
        head=head,
    )
    for module, mark, head in (
        (PaRotClassifier, r"^classifier\.inter_layer\.0\.weight$", "classifier.cls.8.weight"),
        (PaRotSegmenter, r"^classifier\.encoder\.0\.weight$", "classifier.cls.weight"),
    )
)

_CLOUD = jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)

VARIANTS: dict[str, dict[str, Any]] = {
    "parot_modelnet40": {"module": PaRotClassifier, "inputs": (_CLOUD,), "dropout_rate": 0.5},
    "parot_shapenet_parts": {
        "module": PaRotSegmenter,
        "inputs": (jax.ShapeDtypeStruct((1, 2048, 3), jnp.float32), jax.ShapeDtypeStruct((1, 16), jnp.float32)),
        "dropout_rate": 0.4,
    },
}
