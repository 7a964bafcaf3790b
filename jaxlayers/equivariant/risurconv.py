"""RISurConv: convolutions on point clouds that see angles and lengths of the triangles around a point, not coordinates.

Longer than most files, since the layer, two networks and the reference's names belong to one paper. The geometry is in
`jaxlayers.geometry.surfaces`.
"""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory, Params
from jaxlayers.equivariant.offset_attention import OffsetAttention
from jaxlayers.geometry.surfaces import least_axis, surface_order, surface_properties
from jaxlayers.ops.neighbours import Neighbours, displacements, farthest_points, gather, k_nearest
from jaxlayers.ops.pooling import masked_max

# Fields of all modules that have activations.
_BLOCKS = ("activation_fn", "norm")


class Centres(NamedTuple):
    """Points that a convolution is evaluated at.

    Attributes:
      positions: of each, in the unit of the cloud.
      normals: unit vectors.
      mask: True = a point; `None` = all.
    """

    positions: Float[Array, "*batch centres 3"]
    normals: Float[Array, "*batch centres 3"]
    mask: Bool[Array, "*batch centres"] | None = None


class Level(NamedTuple):
    """One convolution on the way down.

    Attributes:
      points: how many are kept, the farthest from one another.
      neighbours: size of their neighbourhoods, the point itself included.
      features: width of the result.
      shift: how many places apart in the ring the corners of a triangle are.
    """

    points: int
    neighbours: int
    features: int
    shift: int = 1


class Rise(NamedTuple):
    """One convolution on the way up, from the points of one level to those of the finer one.

    Attributes:
      neighbours: size of the neighbourhoods among the coarser points.
      features: width of the convolution.
      merged: width after joining what the finer level had; 0 leaves the two side by side.
      shift: as in `Level`.
    """

    neighbours: int
    features: int
    merged: int
    shift: int = 1


# Geometry -------------------------------------------------------------------------------------------------------------


def estimate_normals(
    positions: Float[Array, "*batch points 3"],
    count: int = 16,
    *,
    mask: Bool[Array, "*batch points"] | None = None,
) -> Float[Array, "*batch points 3"]:
    """Return unit normals, by principal components of the neighbourhoods, pointing away from the cloud's centroid.

    n_i is the eigenvector of the least eigenvalue of sum_j w_j (x_j - x_i)(x_j - x_i)^T, with w_j falling linearly
    from the nearest neighbour to zero at the farthest. An eigenvector has no sign: the one with <n_i, x_i - centroid>
    >= 0 is taken, which turns with the cloud. Where the tangent plane goes through the centroid that sign is left to
    rounding, and on a line or at a lone point no direction is preferred: there the result is some unit vector (zero,
    if all neighbours coincide) that does not turn with the cloud. Value and derivative are finite.

    Args:
      positions: in any unit.
      count: size of the neighbourhoods, at least 1.
      mask: True = a point, False = padding.

    Returns:
      Normals, in float32 or better; zero where padded.

    Raises:
      ValueError: on positions or mask of a wrong shape, or a count that is not positive.
    """
    _check_points(positions, None, mask)
    positions = positions.astype(at_least_float32(positions.dtype))
    lists = k_nearest(positions, count, mask=mask)
    axis = least_axis(displacements(positions, lists), lists.mask)
    outward = jnp.sum(axis * (positions - _centroid(positions, mask)), axis=-1, keepdims=True)
    axis = jnp.where(outward < 0, -axis, axis)
    return axis if mask is None else jnp.where(mask[..., None], axis, 0)


def _centroid(positions: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the mean `[*batch, 1, 3]` of the real points."""
    if mask is None:
        return jnp.mean(positions, axis=-2, keepdims=True)
    total = jnp.sum(jnp.where(mask[..., None], positions, 0), axis=-2, keepdims=True)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)[..., None, None]


def _check_points(positions: jax.Array, normals: jax.Array | None, mask: jax.Array | None) -> None:
    if positions.ndim < 2 or positions.shape[-1] != 3 or positions.shape[-2] < 1:
        raise ValueError(f"positions of shape {positions.shape} must be [*batch, points, 3]; put the coordinates last")
    if normals is not None and normals.shape != positions.shape:
        raise ValueError(
            f"normals of shape {normals.shape} must have that of the positions, {positions.shape}; pass one for each "
            "point, or None to estimate them"
        )
    if mask is not None and mask.shape != positions.shape[:-1]:
        raise ValueError(
            f"mask of shape {mask.shape} must be {positions.shape[:-1]}, one entry for each of the points; reshape it"
        )


# Layers ---------------------------------------------------------------------------------------------------------------


def _dense(module: Any, features: int, name: str, *, use_bias: bool = True) -> nn.Dense:
    """Return a dense layer with the settings of a module."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=module.kernel_init,
        bias_init=module.bias_init,
        name=name,
    )


def _normalised(module: Any, x: jax.Array, name: str) -> jax.Array:
    """Return `x` normalised by a layer of that name, if the module has a norm."""
    if module.norm is None:
        return x
    return module.norm(dtype=module.dtype, param_dtype=module.param_dtype, name=name)(x)


def _block(module: Any, x: jax.Array, width: int, name: str) -> jax.Array:
    """Return a dense layer of `x`, normalised and activated."""
    return module.activation_fn(_normalised(module, _dense(module, width, name)(x), f"{name}_norm"))


def _settings(module: Any, *further: str) -> dict[str, Any]:
    """Return the fields that all modules of this file share."""
    names = (*further, "dtype", "param_dtype", "kernel_init", "bias_init")
    return {name: getattr(module, name) for name in names}


class RISurConv(nn.Module):
    """Convolve features of oriented points with the shape of the surface around each, seen through invariants alone.

    For a centre with neighbours j: p_j = `surface_properties` `[14]`; s = attention over the neighbours of
    act(embed(p)); h_j = act(norm(W (s_j, f_j) + b)) with f_j what neighbour j has; max over j; attention over the
    centres.

    Symmetry:
      Exactly invariant to rotations and translations of positions and normals together; equivariant to permutations of
      the centres, invariant to those of the neighbours.
      Not to reflections, which reverse the order of each ring, nor to turning the normals alone.
      Where it breaks: neighbours whose projections along the normal lie in one direction to rounding may change places.

    Attributes:
      features: width of the result, at least 4.
      num_neighbours: size of the neighbourhoods, the point itself included; `None` takes the whole cloud about its
        centroid, once with each sign of its thinnest axis, and gives one token, the larger of the two.
      embed_features: widths of the embedding of the properties, two of them, the last at least 4.
      shift: places between the corners of a triangle in the ring; the reference uses 2 from 1,024 centres on.
      couple_groups: see `OffsetAttention`; for the reference's weights.
      activation_fn: the nonlinearity.
      norm: makes the normalisation after every dense layer, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters. The geometry is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      For each of centres x neighbours about 14 E + 3.5 E^2 + (E + C) features + neighbours x E multiply-accumulates,
      with E the embedding's and C the input's width, and centres^2 x features for the attention over the centres.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.risurconv import RISurConv
      >>> x = jax.random.normal(jax.random.key(0), (2, 9, 3))
      >>> layer = RISurConv(features=8, num_neighbours=4)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x, x)[0].shape
      (2, 9, 8)

    Source:
      Zhang, Yang, Xiang, RISurConv: Rotation Invariant Surface Attention-Augmented Convolutions for 3D Point Cloud
      Classification and Segmentation, ECCV 2024, sections 3.1 and 3.2; reference code cszyzhang/RISurConv at 27c48dd,
      `models/risurconv_utils.py`.

    Differs:
      The ring begins with the farthest projected neighbour, as in the paper; the code moves that one to the opposite
      side unless it is the first of its list. The centre itself is a neighbour that brings its features, but no corner
      of a triangle. For the whole cloud the code leaves the offsets in world coordinates and the sign of the axis to
      the eigensolver: here they are from the centroid, and both signs count. Neighbour attention: see
      `OffsetAttention`. Layer instead of batch normalisation, so that a cloud does not depend on its batch;
      `norm=functools.partial(flax.linen.BatchNorm, use_running_average=True)` takes the reference's statistics. Masks.
    """

    features: int
    num_neighbours: int | None = 16
    embed_features: tuple[int, int] = (32, 64)
    shift: int = 1
    couple_groups: bool = False
    activation_fn: ActivationFn = nn.relu
    norm: ModuleFactory | None = nn.LayerNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        normals: Float[Array, "*batch points 3"],
        features: Float[Array, "*batch points features"] | None = None,
        *,
        centres: Centres | None = None,
        mask: Bool[Array, "*batch points"] | None = None,
        neighbours: Neighbours | None = None,
    ) -> Float[Array, "*batch centres out_features"]:
        """Convolve.

        Args:
          positions: of the points, in any unit; about 1 suits the initialisation.
          normals: unit vectors.
          features: of the points; `None` = they have none yet.
          centres: where to evaluate; `None` = at the points themselves.
          mask: True = a point, False = padding.
          neighbours: of the centres among the points; `None` = the `num_neighbours` nearest.

        Returns:
          Features of the centres; zero where padded, and where a centre has no neighbour.

        Raises:
          ValueError: on shapes that do not fit, sizes out of range, or centres for a whole cloud.
        """
        _check_points(positions, normals, mask)
        if min(self.features, *self.embed_features) < 4 or self.shift < 1:
            raise ValueError(
                f"features={self.features} and embed_features={self.embed_features} must be at least 4 and "
                f"shift={self.shift} positive; set them"
            )
        if features is not None and features.shape[:-1] != positions.shape[:-1]:
            raise ValueError(
                f"features of shape {features.shape} must belong to the points {positions.shape}; pass [*batch, "
                "points, features]"
            )
        dtype = at_least_float32(positions.dtype)
        positions, normals = positions.astype(dtype), normals.astype(dtype)
        whole = self.num_neighbours is None
        if whole:
            if centres is not None or neighbours is not None:
                raise ValueError("num_neighbours=None convolves the whole cloud at once; pass no centres or neighbours")
            centres, neighbours = _whole(positions, mask)
        elif centres is None:
            centres = Centres(positions, normals, mask)
        if neighbours is None:
            assert self.num_neighbours is not None
            neighbours = k_nearest(positions, self.num_neighbours, mask=mask, queries=centres.positions)
        lists = neighbours.mask if centres.mask is None else neighbours.mask & centres.mask[..., None]
        offsets = displacements(positions, neighbours, queries=centres.positions.astype(dtype))
        centre_normals = centres.normals.astype(dtype)
        order, ring = surface_order(offsets, centre_normals, lists)

        def ordered(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, order[..., None], axis=-2)

        lists = jnp.take_along_axis(lists, order, axis=-1)
        around = jnp.where(lists[..., None], ordered(gather(normals, neighbours.indices)), 0)
        x = surface_properties(ordered(offsets), around, centre_normals, ring, shift=self.shift)

        for index, width in enumerate(self.embed_features):
            x = _normalised(self, _dense(self, width, f"embed_{index}", use_bias=False)(x), f"embed_{index}_norm")
        x = self.activation_fn(x)
        attend = functools.partial(OffsetAttention, **_settings(self, *_BLOCKS))
        # The two signs of a whole cloud's axis are sets of their own.
        sets = (x[..., None, :, :], lists[..., None, :]) if whole else (x, lists)
        x = attend(self.couple_groups, name="neighbour_attention")(sets[0], mask=sets[1]).reshape(x.shape)
        if features is not None:
            gathered = jnp.where(lists[..., None], ordered(gather(features, neighbours.indices)), 0)
            x = jnp.concatenate([x, gathered.astype(x.dtype)], axis=-1)
        x = _block(self, x, self.features, "mix")
        x, present = masked_max(x, lists), jnp.any(lists, axis=-1)
        if whole:
            x = jnp.maximum(*jnp.split(x, 2, axis=-2))
            present = jnp.any(present, axis=-1, keepdims=True)
        x = attend(name="centre_attention")(x, mask=present)
        return axes.constrain_last(jnp.where(present[..., None], x, 0), axes.BATCH, axes.NODES, None)


def _whole(positions: jax.Array, mask: jax.Array | None) -> tuple[Centres, Neighbours]:
    """Return the centroid with both signs of the thinnest axis, and everyone as their neighbours."""
    centroid = _centroid(positions, mask)
    present = jnp.ones(positions.shape[:-1], bool) if mask is None else mask
    axis = least_axis(positions - centroid, present)
    indices = jnp.broadcast_to(jnp.arange(positions.shape[-2]), present.shape)
    both = (*present.shape[:-1], 2, present.shape[-1])
    lists = Neighbours(
        jnp.broadcast_to(jnp.where(present, indices, 0)[..., None, :], both),
        jnp.broadcast_to(present[..., None, :], both),
    )
    normals = jnp.stack([axis, -axis], axis=-2)
    return Centres(jnp.broadcast_to(centroid, normals.shape), normals), lists


# Networks -------------------------------------------------------------------------------------------------------------


def _oriented(
    positions: jax.Array, normals: jax.Array | None, mask: jax.Array | None, normal_neighbours: int
) -> Centres:
    """Return the points of a cloud with their normals, given or estimated."""
    _check_points(positions, normals, mask)
    positions = positions.astype(at_least_float32(positions.dtype))
    if normals is None:
        normals = estimate_normals(positions, normal_neighbours, mask=mask)
    return Centres(positions, normals.astype(positions.dtype), mask)


def _sample(points: Centres, count: int) -> Centres:
    """Return the `count` points farthest from one another."""
    available = points.positions.shape[-2]
    chosen = farthest_points(points.positions, count, mask=points.mask)

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, chosen[..., None], axis=-2)

    mask = None
    if points.mask is not None or count > available:
        present = jnp.full(chosen.shape[:-1], available) if points.mask is None else jnp.sum(points.mask, axis=-1)
        mask = jnp.arange(count) < present[..., None]
    return Centres(take(points.positions), take(points.normals), mask)


def _descend(module: Any, points: Centres, name: str) -> tuple[list[Centres], list[jax.Array]]:
    """Return the points of every level and their features."""
    found: list[Centres] = [points]
    features: list[jax.Array] = []
    for index, level in enumerate(module.levels):
        count, neighbours, width, shift = level
        coarser = _sample(found[-1], count)
        conv = RISurConv(
            width,
            neighbours,
            shift=shift,
            couple_groups=module.couple_groups,
            name=f"{name}_{index}",
            **_settings(module, *_BLOCKS),
        )
        at = found[-1]
        features.append(
            conv(at.positions, at.normals, features[-1] if features else None, centres=coarser, mask=at.mask)
        )
        found.append(coarser)
    return found, features


def _check_levels(module: Any) -> None:
    if not module.levels or min(min(level) for level in module.levels) < 1:
        raise ValueError(f"levels={module.levels} must hold at least one Level of positive sizes; set levels")


class _Token(nn.Module):
    """Apply a post-norm transformer layer to lone tokens, whose attention is to themselves."""

    hidden_features: int
    dropout_rate: float
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        features = x.shape[-1]
        dropout = functools.partial(nn.Dropout(self.dropout_rate), deterministic=deterministic)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype)
        y = _dense(self, features, "out")(_dense(self, features, "value")(x))
        x = norm(name="norm_0")(x + dropout(y))
        y = dropout(nn.relu(_dense(self, self.hidden_features, "up")(x)))
        return norm(name="norm_1")(x + dropout(_dense(self, features, "down")(y)))


class RISurConvClassifier(nn.Module):
    """Classify clouds of oriented points in any pose, by surface convolutions of fewer and fewer points.

    Levels of `RISurConv` at ever fewer farthest points, one convolution of all that are left about their centroid,
    transformer layers on that one token, and a perceptron.

    Symmetry:
      Exactly invariant to rotations and translations of positions and normals together, and to permutations of the
      points. Not to reflections: mirror images can be told apart.
      Where it breaks: where rounding decides on neighbours, farthest points, the order of a ring or the thinnest axis
      of the coarsest level, as for symmetric clouds; see `estimate_normals` for what estimated normals add.

    Attributes:
      num_classes: number of logits; 0 gives the features before the head.
      levels: `Level(points, neighbours, features, shift)` of each convolution, in order.
      out_features: width of the convolution of the whole cloud, at least 4.
      depth: number of transformer layers on the cloud's token.
      mlp_ratio: width of their hidden layer over that of the token.
      hidden_features: widths of the perceptron before the head.
      normal_neighbours: size of the neighbourhoods that normals are estimated from where none are given.
      couple_groups: see `OffsetAttention`; for the reference's weights.
      token_dropout_rate: dropout in the transformer layers, in [0, 1).
      dropout_rate: dropout after every hidden layer of the perceptron, in [0, 1).
      activation_fn: the nonlinearity.
      norm: makes the normalisation after every dense layer but the head, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters. The geometry is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      That of its convolutions, see `RISurConv`, and points^2 distances a level.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.risurconv import Level, RISurConvClassifier
      >>> model = RISurConvClassifier(num_classes=5, levels=(Level(4, 3, 8),), out_features=8, depth=1)
      >>> x = jax.random.normal(jax.random.key(0), (2, 9, 3))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
      (2, 5)

    Source:
      Zhang, Yang, Xiang, RISurConv, ECCV 2024, section 3.3; reference code cszyzhang/RISurConv at 27c48dd,
      `models/risurconv_cls.py`.

    Differs:
      See `RISurConv`. In the code the transformer takes the batch for its sequence, so that clouds attend to each
      other; here each cloud is alone, where attention is its value and output projections, which are all that is kept
      of it. Farthest points start at the one farthest from the centroid instead of the first. Logits instead of their
      log softmax. Normals can be estimated.
    """

    num_classes: int = 40
    levels: Sequence[Level] = (
        Level(1024, 8, 32, 2),
        Level(512, 16, 64),
        Level(256, 32, 128),
        Level(128, 64, 256),
    )
    out_features: int = 512
    depth: int = 3
    mlp_ratio: float = 4.0
    hidden_features: Sequence[int] = (256, 128)
    normal_neighbours: int = 16
    couple_groups: bool = False
    token_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    activation_fn: ActivationFn = nn.relu
    norm: ModuleFactory | None = nn.LayerNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        normals: Float[Array, "*batch points 3"] | None = None,
        *,
        mask: Bool[Array, "*batch points"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch outputs"]:
        """Classify clouds.

        Args:
          positions: of the points; in the unit ball suits the initialisation.
          normals: unit vectors; `None` = estimate them, see `estimate_normals`.
          mask: True = a point, False = padding.
          deterministic: no dropout.

        Returns:
          Logits, or features if `num_classes` is 0. NaN, for a cloud with a NaN coordinate.

        Raises:
          ValueError: on shapes that do not fit or sizes out of range.
        """
        _check_levels(self)
        points, features = _descend(self, _oriented(positions, normals, mask, self.normal_neighbours), "level")
        last = points[-1]
        whole = RISurConv(
            self.out_features, None, couple_groups=self.couple_groups, name="whole", **_settings(self, *_BLOCKS)
        )
        x = whole(last.positions, last.normals, features[-1], mask=last.mask)[..., 0, :]
        for index in range(self.depth):
            width = int(self.mlp_ratio * self.out_features)
            token = _Token(width, self.token_dropout_rate, name=f"token_{index}", **_settings(self))
            x = token(x, deterministic=deterministic)
        for index, width in enumerate(self.hidden_features):
            x = _block(self, x, width, f"cloud_{index}")
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = axes.constrain_last(x, axes.BATCH, None)
        return _dense(self, self.num_classes, "head")(x) if self.num_classes else x


class RISurConvSegmenter(nn.Module):
    """Label every point of a cloud in any pose, by surface convolutions of fewer points and back.

    Levels of `RISurConv` down, and as many up: each evaluates at the points of the finer level from those of the
    coarser, and is joined with what the finer level had. Then a perceptron of every point.

    Symmetry:
      Exactly invariant to rotations and translations of positions and normals together; equivariant to permutations of
      the points. Not to reflections. It breaks where `RISurConvClassifier` does.

    Attributes:
      num_classes: number of logits of each point; 0 gives the features before the head.
      levels: `Level(points, neighbours, features, shift)` of each convolution down, in order.
      rises: `Rise(neighbours, features, merged, shift)` of each convolution up, as many, from the coarsest.
      hidden_features: widths of the perceptron of every point.
      normal_neighbours: size of the neighbourhoods that normals are estimated from where none are given.
      couple_groups: see `OffsetAttention`; for the reference's weights.
      dropout_rate: dropout before the head, in [0, 1).
      activation_fn: the nonlinearity.
      norm: makes the normalisation after every dense layer but the head, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters. The geometry is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of its convolutions, see `RISurConv`; the last attends over all points, points^2 x features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.risurconv import Level, Rise, RISurConvSegmenter
      >>> model = RISurConvSegmenter(num_classes=5, levels=(Level(4, 3, 8),), rises=(Rise(2, 8, 0),))
      >>> x = jax.random.normal(jax.random.key(0), (2, 9, 3))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
      (2, 9, 5)

    Source:
      Zhang, Yang, Xiang, RISurConv, ECCV 2024, section 3.3; reference code cszyzhang/RISurConv at 27c48dd,
      `models/risurconv_part_seg.py`.

    Differs:
      As `RISurConvClassifier`. The category of the whole cloud is optional.
    """

    num_classes: int = 50
    levels: Sequence[Level] = (Level(512, 8, 64), Level(256, 16, 128), Level(128, 32, 256), Level(64, 64, 512))
    rises: Sequence[Rise] = (Rise(64, 512, 512), Rise(32, 512, 256), Rise(32, 256, 128), Rise(32, 128, 0, 2))
    hidden_features: Sequence[int] = (128,)
    normal_neighbours: int = 16
    couple_groups: bool = False
    dropout_rate: float = 0.0
    activation_fn: ActivationFn = nn.relu
    norm: ModuleFactory | None = nn.LayerNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        normals: Float[Array, "*batch points 3"] | None = None,
        category: Float[Array, "*batch categories"] | None = None,
        *,
        mask: Bool[Array, "*batch points"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch points outputs"]:
        """Label points.

        Args:
          positions: of the points; in the unit ball suits the initialisation.
          normals: unit vectors; `None` = estimate them, see `estimate_normals`.
          category: what is known of the whole cloud, such as its class as one-hot vector.
          mask: True = a point, False = padding.
          deterministic: no dropout.

        Returns:
          Logits of each point, or features if `num_classes` is 0; meaningless where padded. NaN, for a cloud with a NaN
          coordinate.

        Raises:
          ValueError: on shapes that do not fit, sizes out of range, or unequal numbers of levels and rises.
        """
        _check_levels(self)
        if len(self.rises) != len(self.levels):
            raise ValueError(f"rises={self.rises} must be as many as levels={self.levels}; set one for each level")
        if category is not None and category.shape[:-1] != positions.shape[:-2]:
            raise ValueError(
                f"category of shape {category.shape} must be [*batch, categories], of the batch of positions "
                f"{positions.shape}; reshape it"
            )
        points, features = _descend(self, _oriented(positions, normals, mask, self.normal_neighbours), "level")
        first = None
        if category is not None:
            first = jnp.broadcast_to(category[..., None, :], (*positions.shape[:-1], category.shape[-1]))
        skips: list[jax.Array | None] = [first, *features[:-1]]
        x = features[-1]
        for index, (rise, skip) in enumerate(zip(self.rises, reversed(skips), strict=True)):
            coarse, fine = points[-1 - index], points[-2 - index]
            conv = RISurConv(
                rise.features,
                rise.neighbours,
                shift=rise.shift,
                couple_groups=self.couple_groups,
                name=f"rise_{index}",
                **_settings(self, *_BLOCKS),
            )
            x = conv(coarse.positions, coarse.normals, x, centres=fine, mask=coarse.mask)
            if skip is not None:
                x = jnp.concatenate([x, skip.astype(x.dtype)], axis=-1)
            if rise.merged:
                x = _block(self, x, rise.merged, f"merge_{index}")
        for index, width in enumerate(self.hidden_features):
            x = _block(self, x, width, f"point_{index}")
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = axes.constrain_last(x, axes.BATCH, axes.NODES, None)
        return _dense(self, self.num_classes, "head")(x) if self.num_classes else x


# The reference code ---------------------------------------------------------------------------------------------------

# Paths of our modules and names of the reference's, by regular expressions applied in turn. The reference says `sc`
# (classification) or `sa` for `level`, and counts what rises from the finest.
REFERENCE_NAMES: tuple[tuple[str, str], ...] = (
    (r"^merge_(\d+)$", r"rise_\1.mlp_convs.0"),
    (r"^merge_(\d+)_norm$", r"rise_\1.mlp_bns.0"),
    (r"^token_(\d+)/value$", r"transformer_encoder.layers.\1.self_attn.in_proj"),
    (r"^token_(\d+)/out$", r"transformer_encoder.layers.\1.self_attn.out_proj"),
    (r"^token_(\d+)/up$", r"transformer_encoder.layers.\1.linear1"),
    (r"^token_(\d+)/down$", r"transformer_encoder.layers.\1.linear2"),
    (r"^token_(\d+)/norm_0$", r"transformer_encoder.layers.\1.norm1"),
    (r"^token_(\d+)/norm_1$", r"transformer_encoder.layers.\1.norm2"),
    (r"^cloud_0(_norm)?$", r"fc1\1"),
    (r"^cloud_1(_norm)?$", r"fc2\1"),
    (r"^point_0(_norm)?$", r"conv1\1"),
    (r"^(fc|conv)(\d)_norm$", r"bn\2"),
    (r"/embed_0$", ".embedding.0"),
    (r"/embed_0_norm$", ".embedding.1"),
    (r"/embed_1$", ".embedding.2"),
    (r"/embed_1_norm$", ".embedding.3"),
    (r"/mix$", ".risurconv.0"),
    (r"/mix_norm$", ".risurconv.1"),
    (r"/neighbour_attention/", ".self_attention_0."),
    (r"/centre_attention/", ".self_attention_1."),
    (r"(attention_\d)\.([qkv])\w+$", r"\1.\2_conv"),
    (r"(attention_\d)\.out$", r"\1.trans_conv"),
    (r"(attention_\d)\.norm$", r"\1.after_norm"),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def from_reference(tensors: Mapping[str, Any], variables: Params) -> dict[str, Any]:
    """Return variables of `RISurConvClassifier` or `RISurConvSegmenter` from the state dict of the reference's network.

    The reference normalises by batch: our module must be made with `couple_groups=True` and
    `norm=functools.partial(flax.linen.BatchNorm, use_running_average=True, epsilon=1e-5)` to say what the reference
    says in evaluation, up to what `RISurConv` lists under Differs.

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
        name, leaf = names[path], path.rpartition("/")[2]
        if name not in tensors:
            raise ValueError(f"the state dict has no {name}, wanted for {path}; set the module's fields to fit")
        tensor = np.asarray(tensors[name])
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            tensor = tensor[2 * len(tensor) // 3 :]  # Queries and keys of a lone token do not matter.
        tensor = tensor.reshape(tensor.shape[:2]).T if leaf == "kernel" else tensor
        if tensor.shape != wanted.shape:
            raise ValueError(f"{name} must give {path} its shape {wanted.shape}, not {tensor.shape}; set the fields")
        found[path] = jnp.asarray(tensor)
    return flax.traverse_util.unflatten_dict(found, sep="/")


def _reference_names(paths: Collection[str]) -> dict[str, str]:
    """Return the reference's name for each path of our variables, which must be those of a whole model."""
    names = {}
    levels, rises = (len({path.split("/")[1] for path in paths if f"/{part}_" in path}) for part in ("level", "rise"))
    down = "sa" if rises else "sc"
    for path in paths:
        _, module, leaf = re.match(r"([^/]+)/(.*)/([^/]+)$", path).groups()  # type: ignore[union-attr]
        name = module
        for ours, theirs in REFERENCE_NAMES:
            name = re.sub(ours, theirs, name)
        name = re.sub(r"^level_", down, name)
        name = re.sub(r"^whole", f"{down}{levels}", name)
        name = re.sub(r"^rise_(\d+)", lambda match: f"fp{rises - 1 - int(match[1])}", name)
        name = re.sub(r"^head$", "conv2" if rises else "fc3", name)
        names[path] = f"{name}{'_' if name.endswith('in_proj') else '.'}{_LEAVES[leaf]}"
    return names


def _layout(model: Any, variables: Mapping[str, Any]) -> dialects.Layout:
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    found = {}
    for path, name in _reference_names(flat).items():
        shape = tuple(flat[path].shape)
        if path.endswith("kernel"):
            # Dense layers of neighbours or points are convolutions of size one there.
            axes_of_one = next((count for part, count in _CONVOLUTIONS.items() if re.search(part, name)), 0)
            shape = (*shape[::-1], *(1,) * axes_of_one)
        found[name] = (3 * shape[0], *shape[1:]) if ".in_proj_" in name else shape
    return found


_CONVOLUTIONS = {r"\.(embedding|risurconv|self_attention_0)\.": 2, r"\.(self_attention_1|mlp_convs)\.|^conv\d\.": 1}
# Norms must be those of a batch, see `from_reference`. The queries and keys of the encoder, which a lone token does not
# need, are written as zeros.
DIALECTS = tuple(
    dialects.Dialect(
        name="official",
        origin="github.com/cszyzhang/RISurConv",
        module=module,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=marks,
        ignored={r"num_batches_tracked$": "a count of the batches that were seen in training"},
        layout=_layout,
        head=head,
    )
    for module, marks, head in (
        (RISurConvClassifier, (r"^sc0\.risurconv\.0\.weight$", r"^fc3\.weight$"), "fc3.weight"),
        (RISurConvSegmenter, (r"^sa0\.risurconv\.0\.weight$", r"^fp0\.risurconv\.0\."), "conv2.weight"),
    )
)

_CLOUD = jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)

VARIANTS: dict[str, dict[str, Any]] = {
    "risurconv_modelnet40": {"module": RISurConvClassifier, "inputs": (_CLOUD, _CLOUD), "dropout_rate": 0.4},
    "risurconv_shapenet_parts": {
        "module": RISurConvSegmenter,
        "inputs": (*(jax.ShapeDtypeStruct((1, 2048, 3), jnp.float32),) * 2, jax.ShapeDtypeStruct((1, 16), jnp.float32)),
        "dropout_rate": 0.4,
    },
}
