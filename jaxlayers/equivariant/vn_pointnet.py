"""VN-PointNet: PointNet whose channels are vectors, for shapes in any pose."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.reference import read_variables
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.equivariant.vector_neurons import (
    VNBatchNorm,
    VNLinear,
    VNLinearLeakyReLU,
    VNStdFeature,
    centred,
    check_positions,
    edge_vectors,
)
from jaxlayers.equivariant.vn_dgcnn import (
    COUNTED,
    block_names,
    constrain_vectors,
    invariant_names,
    norm_names,
    perceptron,
    pool_vectors,
    with_mean,
)
from jaxlayers.ops.neighbours import k_nearest
from jaxlayers.ops.pooling import masked_max


class _Cloud(nn.Module):
    """Give each point vectors from its nearest neighbours, then join what a small network says of the whole cloud.

    `conv_pos`, pooling over the neighbours, blocks of `features`, then the transform: blocks of `transform_features`
    of each point, pooling over the points, blocks of `transform_hidden`, a linear map, whose result is joined to all
    points. Returned are the outputs of all blocks and the joined vectors.
    """

    features: Sequence[int]
    transform_features: Sequence[int]
    transform_hidden: Sequence[int]
    num_neighbors: int
    pooling: Literal["mean", "max"]
    cross: bool
    centre: bool
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(
        self, positions: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> tuple[list[jax.Array], jax.Array]:
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }
        block = functools.partial(VNLinearLeakyReLU, negative_slope=0.0, **common)
        x = centred(positions, mask=mask) if self.centre else positions
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        neighbours = k_nearest(x, min(self.num_neighbors, x.shape[-2]), mask=mask, include_self=True)
        edges = None if mask is None else neighbours.mask
        x = edge_vectors(x[..., None, :], neighbours, cross=self.cross)
        x = block(self.features[0], name="conv_pos")(x, mask=edges, deterministic=deterministic)
        x = pool_vectors(x, self.pooling, mask=edges, name="pool", **common)
        outputs = []
        for index, features in enumerate(self.features[1:]):
            x = block(features, name=f"conv{index + 1}")(x, mask=mask, deterministic=deterministic)
            outputs.append(constrain_vectors(x))
        whole = x
        for index, features in enumerate(self.transform_features):
            whole = block(features, name=f"transform_conv{index + 1}")(whole, mask=mask, deterministic=deterministic)
        whole = pool_vectors(whole, self.pooling, mask=mask, name="transform_pool", **common)
        for index, features in enumerate(self.transform_hidden):
            whole = block(features, name=f"transform_dense{index + 1}")(whole, deterministic=deterministic)
        whole = VNLinear(x.shape[-2], name="transform_out", **common)(whole)
        joined = jnp.concatenate([x, jnp.broadcast_to(whole[..., None, :, :], x.shape)], axis=-2)
        return outputs, constrain_vectors(joined)


def _check(positions: jax.Array, mask: jax.Array | None, widths: Sequence[int]) -> None:
    check_positions(positions, mask)
    if min(widths) < 1:
        raise ValueError(f"features, embed_features and num_neighbors {tuple(widths)} must be positive; set them")


class VNPointNet(nn.Module):
    """Classify shapes in any pose: VN-PointNet.

    x_i = mean_j block(x_j - x_i, x_i, x_j x x_i) over the nearest neighbours j; blocks on each point; a vector summary
    of the cloud joined to each point; blocks; s_i the invariant numbers (`VNStdFeature`) of f_i and mean_i f_i;
    logits = head(perceptron(max_i s_i)).

    Symmetry:
      Exactly invariant to rotations of SO(3), permutations of the points and, with `centre`, translations. The cross
      products keep their sign under reflections, so it is not invariant to them, and can tell left from right. With
      `cross=False` the group is O(3), and it cannot.
      Where it breaks: neighbours that are equally far are taken by index, see `VNDGCNNEncoder`.

    Attributes:
      num_classes: number of logits; 0 gives the features before the head.
      features: widths of the blocks: over the neighbours, before and after the summary is joined.
      embed_features: width of f.
      transform_features: widths of the summary's blocks before its pooling.
      transform_hidden: widths of those after it.
      hidden_features: widths of the perceptron.
      num_neighbors: of each point, itself included; clouds of fewer points take all.
      pooling: `"mean"` or `"max"` (see `VNMaxPool`).
      cross: see cross products.
      centre: subtract the centroid first.
      dropout_rate: dropout after each layer of the perceptron, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the matrices.
      bias_init: initialiser of the biases of the perceptron.

    Collections:
      `batch_stats` of all norms (decay 0.9), which `deterministic=False` updates; the RNG stream `dropout`, when
      `deterministic=False` and the rate is not 0.

    Cost:
      points^2 x 3 for the neighbours; dominated by embed_features^2 x 15 multiply-accumulates for each point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import VNPointNet
      >>> widths = dict(features=(4, 4, 6), embed_features=8, transform_features=(4, 6), transform_hidden=(4,))
      >>> model = VNPointNet(num_classes=3, hidden_features=(16,), num_neighbors=5, **widths)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 9, 3)))[0].shape
      (2, 3)

    Source:
      Deng, Litany, Duan, Poulenard, Tagliasacchi, Guibas, Vector Neurons: A General Framework for SO(3)-Equivariant
      Networks, ICCV 2021, section 4; reference code FlyingGiraffe/vnn at f3197e2, `models/vn_pointnet_cls.py`.

    Differs:
      Logits instead of log-probabilities. Dropout after both layers of the perceptron. Points are centred here, not in
      the data; masks.
    """

    num_classes: int
    features: Sequence[int] = (21, 21, 42)
    embed_features: int = 341
    transform_features: Sequence[int] = (21, 42, 341)
    transform_hidden: Sequence[int] = (170, 85)
    hidden_features: Sequence[int] = (512, 256)
    num_neighbors: int = 20
    pooling: Literal["mean", "max"] = "mean"
    cross: bool = True
    centre: bool = True
    dropout_rate: float = 0.4
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
        deterministic: bool = True,
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          positions: in any unit; the reference has clouds within the unit sphere.
          mask: True = a point, False = padding.
          deterministic: use the running statistics, and no dropout.

        Returns:
          Logits, or features without a head. NaN where a coordinate of the cloud is NaN.

        Raises:
          ValueError: on positions or a mask of a wrong shape or dtype, or fields out of range.
        """
        if self.num_classes < 0 or len(self.features) != 3:
            raise ValueError(
                f"num_classes={self.num_classes} must not be negative and features={tuple(self.features)} be three; "
                "set them"
            )
        _check(positions, mask, (*self.features, self.embed_features, self.num_neighbors))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init}
        _, x = _Cloud(
            self.features[:2],
            self.transform_features,
            self.transform_hidden,
            self.num_neighbors,
            self.pooling,
            self.cross,
            self.centre,
            name="cloud",
            **common,
        )(positions, mask, deterministic)
        last = VNLinearLeakyReLU(self.features[2], negative_slope=0.0, name="conv2", **common)
        x = VNLinear(self.embed_features, name="embed", **common)(last(x, mask=mask, deterministic=deterministic))
        x = VNBatchNorm(name="embed_norm", **dtypes)(x, mask=mask, deterministic=deterministic)
        invariant = VNStdFeature(negative_slope=0.0, name="invariant", **common)
        numbers, _ = invariant(with_mean(x, mask), mask=mask, deterministic=deterministic)
        x = perceptron(
            masked_max(numbers.reshape(*numbers.shape[:-2], -1), mask),
            self.hidden_features,
            "perceptron",
            negative_slope=0.0,
            deterministic=deterministic,
            dropout_rate=self.dropout_rate,
            bias_init=self.bias_init,
            **common,
        )
        if self.num_classes:
            x = nn.Dense(self.num_classes, bias_init=self.bias_init, name="head", **common)(x)
        return axes.constrain_last(x, axes.BATCH, None)


class VNPointNetSegmentation(nn.Module):
    """Label each point of a shape in any pose: VN-PointNet for part segmentation.

    As `VNPointNet`, with logits_i = head(perceptron(max_i s_i, category, local_i z_i^T, s_i)), where local_i are the
    vectors of all blocks before f and z_i the frame of `VNStdFeature`.

    Symmetry:
      Exactly invariant to rotations of SO(3) and, with `centre`, translations; equivariant to permutations of the
      points. Not invariant to reflections, but with `cross=False` the group is O(3).
      Where it breaks: neighbours that are equally far are taken by index, see `VNDGCNNEncoder`.

    Attributes:
      num_classes: number of logits of each point.
      features: widths of the blocks: over the neighbours, before (any number) and after the summary is joined.
      embed_features: width of f.
      transform_features: widths of the summary's blocks before its pooling.
      transform_hidden: widths of those after it.
      hidden_features: widths of the perceptron of each point.
      num_neighbors: of each point, itself included; clouds of fewer points take all.
      pooling: `"mean"` or `"max"` (see `VNMaxPool`).
      cross: see cross products.
      centre: subtract the centroid first.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the matrices.
      bias_init: initialiser of the biases of the perceptron.

    Collections:
      `batch_stats` of all norms (decay 0.9), which `deterministic=False` updates.

    Cost:
      points^2 x 3 for the neighbours; dominated by embed_features^2 x 15 multiply-accumulates for each point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import VNPointNetSegmentation
      >>> widths = dict(features=(4, 4, 6), embed_features=8, transform_features=(4, 6), transform_hidden=(4,))
      >>> model = VNPointNetSegmentation(num_classes=3, hidden_features=(16,), num_neighbors=5, **widths)
      >>> inputs = jnp.ones((2, 9, 3)), jnp.ones((2, 4))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)[0].shape
      (2, 9, 3)

    Source:
      Deng et al., Vector Neurons, ICCV 2021, section 4; reference code FlyingGiraffe/vnn at f3197e2,
      `models/vn_pointnet_partseg.py`.

    Differs:
      Logits instead of log-probabilities. The category may be left out. Points are centred here, not in the data;
      masks.
    """

    num_classes: int
    features: Sequence[int] = (21, 21, 42, 42, 170)
    embed_features: int = 682
    transform_features: Sequence[int] = (21, 42, 341)
    transform_hidden: Sequence[int] = (170, 85)
    hidden_features: Sequence[int] = (256, 256, 128)
    num_neighbors: int = 20
    pooling: Literal["mean", "max"] = "mean"
    cross: bool = True
    centre: bool = True
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
        deterministic: bool = True,
    ) -> Float[Array, "*batch points classes"]:
        """Label the points.

        Args:
          positions: in any unit; the reference has clouds within the unit sphere.
          category: what the shape is, a probability for each category; `None` where there is one kind only.
          mask: True = a point, False = padding.
          deterministic: use the running statistics, and do not update them.

        Returns:
          Logits; meaningless where padded, NaN where a coordinate of the cloud is NaN.

        Raises:
          ValueError: on inputs of a wrong shape or dtype, or fields out of range.
        """
        if self.num_classes < 1 or len(self.features) < 3:
            raise ValueError(
                f"num_classes={self.num_classes} must be positive and features={tuple(self.features)} at least three; "
                "set them"
            )
        _check(positions, mask, (*self.features, self.embed_features, self.num_neighbors))
        if category is not None and category.shape[:-1] != positions.shape[:-2]:
            raise ValueError(
                f"category of shape {category.shape} must be [*batch, categories] for positions {positions.shape}; "
                "give one row for each cloud"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init}
        outputs, x = _Cloud(
            self.features[:-1],
            self.transform_features,
            self.transform_hidden,
            self.num_neighbors,
            self.pooling,
            self.cross,
            self.centre,
            name="cloud",
            **common,
        )(positions, mask, deterministic)
        last = VNLinearLeakyReLU(self.features[-1], negative_slope=0.0, name=f"conv{len(self.features) - 1}", **common)
        outputs.append(last(x, mask=mask, deterministic=deterministic))
        x = VNLinear(self.embed_features, name="embed", **common)(outputs[-1])
        x = VNBatchNorm(name="embed_norm", **dtypes)(x, mask=mask, deterministic=deterministic)
        invariant = VNStdFeature(negative_slope=0.0, name="invariant", **common)
        numbers, frame = invariant(with_mean(x, mask), mask=mask, deterministic=deterministic)
        numbers = numbers.reshape(*numbers.shape[:-2], -1)
        shape = [masked_max(numbers, mask)]
        if category is not None:
            shape.append(category.astype(numbers.dtype))
        whole = jnp.concatenate(shape, axis=-1)[..., None, :]
        local = jnp.concatenate(outputs, axis=-2).astype(frame.dtype)
        own = jnp.einsum("...cd,...kd->...ck", local, frame, precision=jax.lax.Precision.HIGHEST)
        own = own.reshape(*own.shape[:-2], -1)
        x = jnp.concatenate([jnp.broadcast_to(whole, (*own.shape[:-1], whole.shape[-1])), own, numbers], axis=-1)
        x = perceptron(
            x,
            self.hidden_features,
            "perceptron",
            negative_slope=0.0,
            deterministic=deterministic,
            mask=mask,
            bias_init=self.bias_init,
            **common,
        )
        x = nn.Dense(self.num_classes, bias_init=self.bias_init, name="head", **common)(x)
        return axes.constrain_last(x, axes.BATCH, axes.NODES, None)


# The reference code -------------------------------------------------------------------------------------------------


def _names(convolutions: Sequence[str], embed: int) -> dict[str, str]:
    """Return the names of what both models have: `convolutions` are the reference's, in order, from the second on."""
    names = block_names("cloud/conv_pos", "conv_pos") | invariant_names()
    for index, theirs in enumerate(convolutions):
        ours = "" if index == len(convolutions) - 1 else "cloud/"
        names |= block_names(f"{ours}conv{index + 1}", theirs)
    for number in (1, 2, 3):
        names |= block_names(f"cloud/transform_conv{number}", f"fstn.conv{number}")
        names |= block_names(f"cloud/transform_dense{number}", f"fstn.fc{number}")
    return names | {
        "cloud/pool/direction": "pool.map_to_dir",
        "cloud/transform_pool/direction": "fstn.pool.map_to_dir",
        "cloud/transform_out": "fstn.fc3.map_to_feat",
        "embed": f"conv{embed}.map_to_feat",
        **norm_names("embed_norm/norm", f"bn{embed}.bn"),
    }


CLASSIFIER_NAMES: Mapping[str, str] = {
    # The reference's classifier has its trunk in a module of its own.
    **{ours: f"feat.{theirs}" for ours, theirs in _names(("conv1", "conv2"), 3).items()},
    "perceptron1": "fc1",
    "perceptron2": "fc2",
    **norm_names("perceptron_norm1", "bn1"),
    **norm_names("perceptron_norm2", "bn2"),
    "head": "fc3",
}
SEGMENTATION_NAMES: Mapping[str, str] = {
    **_names(("conv1", "conv2", "conv3", "conv4"), 5),
    **{f"perceptron{number}": f"convs{number}" for number in (1, 2, 3)},
    **{
        ours: theirs
        for number in (1, 2, 3)
        for ours, theirs in norm_names(f"perceptron_norm{number}", f"bns{number}").items()
    },
    "head": "convs4",
}


def from_reference(tensors: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of `VNPointNet` or `VNPointNetSegmentation` from a checkpoint of the reference.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      variables: of our model (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      The collections `params` and `batch_stats`.

    Raises:
      ValueError: if names or shapes are not those of the model.
    """
    table = SEGMENTATION_NAMES if "convs4.weight" in tensors else CLASSIFIER_NAMES
    return read_variables(tensors, variables, table)


def reference_inputs(model: VNPointNet | VNPointNetSegmentation) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return small inputs, which show the shapes of a model's parameters."""
    cloud = jax.ShapeDtypeStruct((1, 48, 3), jnp.float32)
    return (cloud,) if isinstance(model, VNPointNet) else (cloud, _CATEGORY)


_REPOSITORY = "github.com/FlyingGiraffe/vnn"
_POINTWISE = ("perceptron1/kernel", "perceptron2/kernel", "perceptron3/kernel", "head/kernel")
DIALECTS = (
    dialects.Dialect(
        name="official",
        origin=_REPOSITORY,
        module=VNPointNet,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=(r"^feat\.conv_pos\.map_to_feat\.weight$", r"^fc3\.weight$"),
        ignored=COUNTED,
        layout=dialects.table_layout(CLASSIFIER_NAMES),
        head="fc3.weight",
    ),
    dialects.Dialect(
        name="official",
        origin=_REPOSITORY,
        module=VNPointNetSegmentation,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=(r"^conv_pos\.map_to_feat\.weight$", r"^convs4\.weight$"),
        ignored=COUNTED,
        layout=dialects.table_layout(SEGMENTATION_NAMES, shapes=dict.fromkeys(_POINTWISE, dialects.pointwise(1))),
        head="convs4.weight",
    ),
)

_CLOUD = jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)
_CATEGORY = jax.ShapeDtypeStruct((1, 16), jnp.float32)

VARIANTS: dict[str, dict[str, Any]] = {
    "vn_pointnet": {"module": VNPointNet, "inputs": (_CLOUD,), "num_classes": 40},
    "vn_pointnet_segmentation": {
        "module": VNPointNetSegmentation,
        "inputs": (jax.ShapeDtypeStruct((1, 2048, 3), jnp.float32), _CATEGORY),
        "num_classes": 50,
        "num_neighbors": 40,
    },
}
