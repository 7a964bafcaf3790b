"""VN-DGCNN: networks over neighbours in feature space whose channels are vectors, for shapes in any pose."""

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
    VNLinearLeakyReLU,
    VNMaxPool,
    VNStdFeature,
    centred,
    check_positions,
    edge_vectors,
    vector_mean_pool,
)
from jaxlayers.ops.neighbours import k_nearest
from jaxlayers.ops.pooling import masked_max

# Of the reference: one list of widths for every graph; the outputs of all graphs are joined.
CLASSIFICATION_STAGES = ((21,), (21,), (42,), (85,))
SEGMENTATION_STAGES = ((21, 21), (21, 21), (21,))


class VNDGCNNEncoder(nn.Module):
    """Give each point vectors that turn with the cloud, from its neighbours in space and then in feature space.

    For every stage: neighbours j of i are the k nearest in the channels so far, e_ij = block(... block(x_j - x_i,
    x_i)), x_i <- pool_j e_ij. All stages' channels are joined, `local` `[points, channels, 3]`, and mixed by one more
    block with a shared direction, f_i; `embedded` is f_i and mean_i f_i, `[points, 2 x embed_features, 3]`.

    Symmetry:
      Exactly equivariant to O(3), proper and improper, acting on positions as points and on the outputs as vectors;
      equivariant to permutations of the points; with `centre` invariant to translations.
      Where it breaks: neighbours that are equally far are taken by index: on symmetric clouds the choice among them,
      and with `pooling="max"` among points that reach equally far, follows rounding and order.

    Attributes:
      stages: widths of the blocks of each stage.
      embed_features: width of the last block, without the mean; positive.
      num_neighbors: k, the point itself included; clouds of fewer points take all.
      pooling: over the neighbours, `"mean"` or `"max"` (see `VNMaxPool`).
      centre: subtract the centroid first.
      negative_slope: of the blocks.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the matrices.

    Collections:
      `batch_stats`, see `VNBatchNorm`.

    Cost:
      For each stage points^2 x channels x 3 for the neighbours and points x k x (2 channels) x features x 3 x 2 for the
      first block.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import VNDGCNNEncoder
      >>> encoder = VNDGCNNEncoder(stages=((4,), (6,)), embed_features=8, num_neighbors=5)
      >>> local, embedded = jax.eval_shape(encoder.init_with_output, jax.random.key(0), jnp.ones((2, 9, 3)))[0]
      >>> local.shape, embedded.shape
      ((2, 9, 10, 3), (2, 9, 16, 3))

    Source:
      Deng, Litany, Duan, Poulenard, Tagliasacchi, Guibas, Vector Neurons: A General Framework for SO(3)-Equivariant
      Networks, ICCV 2021, section 4; Wang et al., Dynamic Graph CNN for Learning on Point Clouds, TOG 2019. Reference
      code FlyingGiraffe/vnn at f3197e2, `models/vn_dgcnn_cls.py` and `models/vn_dgcnn_partseg.py`.

    Differs:
      Points are centred here, not in the data. Masks. Neighbours by the squared differences themselves, which rounds
      less than the expanded square.
    """

    stages: Sequence[Sequence[int]] = SEGMENTATION_STAGES
    embed_features: int = 341
    num_neighbors: int = 20
    pooling: Literal["mean", "max"] = "mean"
    centre: bool = True
    negative_slope: float = 0.2
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        *,
        mask: Bool[Array, "*batch points"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "*batch points local 3"], Float[Array, "*batch points embedded 3"]]:
        """Encode the cloud.

        Args:
          positions: in any unit; the reference has clouds within the unit sphere.
          mask: True = a point, False = padding.
          deterministic: use the running statistics, and do not update them.

        Returns:
          The vectors `local` and `embedded` of each point; zero where padded. A NaN coordinate makes those of its cloud
          NaN.

        Raises:
          ValueError: on positions or a mask of a wrong shape or dtype, or fields out of range.
        """
        check_positions(positions, mask)
        widths = [width for stage in self.stages for width in stage]
        if not self.stages or not all(self.stages) or min(*widths, self.embed_features, self.num_neighbors) < 1:
            raise ValueError(
                f"stages={tuple(self.stages)} must not be empty, and with embed_features={self.embed_features} and "
                f"num_neighbors={self.num_neighbors} be positive; set them"
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }
        block = functools.partial(VNLinearLeakyReLU, negative_slope=self.negative_slope, **common)
        x = (centred(positions, mask=mask) if self.centre else positions)[..., None, :]
        x = x if mask is None else jnp.where(mask[..., None, None], x, 0)
        outputs, number = [], 0
        for index, stage in enumerate(self.stages):
            flat = x.reshape(*x.shape[:-2], -1)
            neighbours = k_nearest(flat, min(self.num_neighbors, x.shape[-3]), mask=mask, include_self=True)
            edges = None if mask is None else neighbours.mask
            x = edge_vectors(x, neighbours)
            for features in stage:
                number += 1
                x = block(features, name=f"conv{number}")(x, mask=edges, deterministic=deterministic)
            x = pool_vectors(x, self.pooling, mask=edges, name=f"pool{index + 1}", **common)
            x = constrain_vectors(x)
            outputs.append(x)
        local = jnp.concatenate(outputs, axis=-2)
        last = block(self.embed_features, share_direction=True, name=f"conv{number + 1}")
        x = last(local, mask=mask, deterministic=deterministic)
        return local, constrain_vectors(with_mean(x, mask))


def with_mean(
    x: Float[Array, "*batch points channels 3"], mask: Bool[Array, "*batch points"] | None
) -> Float[Array, "*batch points both 3"]:
    """Return the channels of each point and their mean over the cloud, zero where padded."""
    mean = jnp.broadcast_to(vector_mean_pool(x, mask=mask)[..., None, :, :], x.shape)
    x = jnp.concatenate([x, mean], axis=-2)
    return x if mask is None else jnp.where(mask[..., None, None], x, 0)


def constrain_vectors(x: jax.Array) -> jax.Array:
    """Name the axes of vectors `[batch, points, channels, 3]` for the partitioner."""
    return axes.constrain_last(x, axes.BATCH, axes.NODES, None, None)


def pool_vectors(
    x: Float[Array, "*batch points channels 3"],
    pooling: str,
    *,
    mask: Bool[Array, "*batch points"] | None,
    name: str,
    dtype: Dtype | None,
    param_dtype: Dtype,
    kernel_init: Initializer,
) -> Float[Array, "*batch channels 3"]:
    """Pool over the points, inside a compact module: by `vector_mean_pool`, or by a `VNMaxPool` of the given name."""
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling={pooling!r} must be 'mean' or 'max'; set pooling")
    if pooling == "mean":
        return vector_mean_pool(x, mask=mask)
    return VNMaxPool(dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, name=name)(x, mask=mask)


def perceptron(
    x: Float[Array, "*batch f"],
    features: Sequence[int],
    name: str,
    *,
    negative_slope: float,
    deterministic: bool,
    mask: Bool[Array, "*batch"] | None = None,
    dropout_rate: float = 0.0,
    dropped: int | None = None,
    dtype: Dtype | None,
    param_dtype: Dtype,
    kernel_init: Initializer,
    bias_init: Initializer | None = None,
    use_bias: bool = True,
) -> Float[Array, "*batch g"]:
    """Apply dense layers, each with a batch norm and a leaky ReLU, inside a compact module.

    Dropout comes after the first `dropped` of them (`None` = all). Layers are called `<name>1`, norms `<name>_norm1`.
    """
    for index, width in enumerate(features):
        norm = nn.BatchNorm(
            use_running_average=deterministic,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=param_dtype,
            name=f"{name}_norm{index + 1}",
        )
        dense = nn.Dense(
            width,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init or zeros(),
            use_bias=use_bias,
            name=f"{name}{index + 1}",
        )
        x = norm(dense(x), mask=None if mask is None else mask[..., None])
        x = nn.leaky_relu(x, negative_slope)
        if dropped is None or index < dropped:
            x = nn.Dropout(dropout_rate)(x, deterministic=deterministic)
    return x


class VNDGCNN(nn.Module):
    """Classify shapes in any pose: VN-DGCNN.

    logits = head(perceptron(max_i s_i, mean_i s_i)), with s_i `[2 x embed_features x 3]` the invariant numbers
    (`VNStdFeature`) of the embedded vectors of `VNDGCNNEncoder`.

    Symmetry:
      Exactly invariant to O(3), permutations of the points and, with the encoder's `centre`, translations. It cannot
      tell a shape from its mirror image; with `normalize_frame` the group is SO(3), and it can.
      Where it breaks: as `VNDGCNNEncoder`.

    Attributes:
      num_classes: number of logits; 0 gives the features before the head.
      encoder: what gives the vectors; called as `VNDGCNNEncoder`.
      hidden_features: widths of the perceptron.
      normalize_frame: see `VNStdFeature`.
      negative_slope: of the invariant layer and the perceptron.
      dropout_rate: dropout after each layer of the perceptron, in [0, 1).
      dtype: compute dtype of invariant layer and perceptron; `None` infers it from input and parameters.
      param_dtype: dtype of their parameters.
      kernel_init: initialiser of their kernels.
      bias_init: initialiser of their biases.

    Collections:
      `batch_stats` of all norms (decay 0.9), which `deterministic=False` updates; the RNG stream `dropout`, when
      `deterministic=False` and the rate is not 0.

    Cost:
      As the encoder; the reference's size has 2.9 million parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import VNDGCNN, VNDGCNNEncoder
      >>> encoder = VNDGCNNEncoder(stages=((4,), (6,)), embed_features=8, num_neighbors=5)
      >>> model = VNDGCNN(num_classes=3, encoder=encoder, hidden_features=(16,))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 9, 3)))[0].shape
      (2, 3)

    Source:
      Deng et al., Vector Neurons, ICCV 2021, section 4; reference code FlyingGiraffe/vnn at f3197e2,
      `models/vn_dgcnn_cls.py`.

    Differs:
      As `VNDGCNNEncoder`.
    """

    num_classes: int
    encoder: nn.Module
    hidden_features: Sequence[int] = (512, 256)
    normalize_frame: bool = False
    negative_slope: float = 0.2
    dropout_rate: float = 0.5
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
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        _, x = self.encoder(positions, mask=mask, deterministic=deterministic)
        invariant = VNStdFeature(
            self.normalize_frame, self.negative_slope, kernel_init=self.kernel_init, name="invariant", **dtypes
        )
        numbers, _ = invariant(x, mask=mask, deterministic=deterministic)
        numbers = numbers.reshape(*numbers.shape[:-2], -1)
        pooled = [masked_max(numbers, mask), vector_mean_pool(numbers[..., None], mask=mask)[..., 0]]
        x = perceptron(
            jnp.concatenate(pooled, axis=-1),
            self.hidden_features,
            "perceptron",
            negative_slope=self.negative_slope,
            deterministic=deterministic,
            dropout_rate=self.dropout_rate,
            **dense,
        )
        x = nn.Dense(self.num_classes, name="head", **dense)(x) if self.num_classes else x
        return axes.constrain_last(x, axes.BATCH, None)


class VNDGCNNSegmentation(nn.Module):
    """Label each point of a shape in any pose: VN-DGCNN for part segmentation.

    logits_i = head(perceptron(max_i s_i, category, local_i z_i^T)), with s_i the invariant numbers and z_i the frames
    (`VNStdFeature`) of the embedded vectors of `VNDGCNNEncoder`, and local_i its local ones.

    Symmetry:
      Exactly invariant to O(3) and, with the encoder's `centre`, translations; equivariant to permutations of the
      points. Mirror images get the same labels; with `normalize_frame` the group is SO(3), and they need not.
      Where it breaks: as `VNDGCNNEncoder`.

    Attributes:
      num_classes: number of logits of each point.
      encoder: what gives the vectors; called as `VNDGCNNEncoder`.
      hidden_features: widths of the perceptron of each point.
      category_features: width that the category is embedded in.
      normalize_frame: see `VNStdFeature`.
      negative_slope: of the invariant layer and the perceptron.
      dropout_rate: dropout after all but the last layer of the perceptron, in [0, 1).
      dtype: compute dtype of invariant layer and perceptron; `None` infers it from input and parameters.
      param_dtype: dtype of their parameters.
      kernel_init: initialiser of their kernels.

    Collections:
      `batch_stats` of all norms (decay 0.9), which `deterministic=False` updates; the RNG stream `dropout`, when
      `deterministic=False` and the rate is not 0.

    Cost:
      As the encoder, and the perceptron for each point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import VNDGCNNEncoder, VNDGCNNSegmentation
      >>> encoder = VNDGCNNEncoder(stages=((4,), (6,)), embed_features=8, num_neighbors=5)
      >>> model = VNDGCNNSegmentation(num_classes=3, encoder=encoder, hidden_features=(16,))
      >>> inputs = jnp.ones((2, 9, 3)), jnp.ones((2, 4))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)[0].shape
      (2, 9, 3)

    Source:
      Deng et al., Vector Neurons, ICCV 2021, section 4; reference code FlyingGiraffe/vnn at f3197e2,
      `models/vn_dgcnn_partseg.py`.

    Differs:
      As `VNDGCNNEncoder`. The category may be left out.
    """

    num_classes: int
    encoder: nn.Module
    hidden_features: Sequence[int] = (256, 256, 128)
    category_features: int = 64
    normalize_frame: bool = False
    negative_slope: float = 0.2
    dropout_rate: float = 0.5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

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
          deterministic: use the running statistics, and no dropout.

        Returns:
          Logits; meaningless where padded, NaN where a coordinate of the cloud is NaN.

        Raises:
          ValueError: on inputs of a wrong shape or dtype, or fields out of range.
        """
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be positive; set num_classes")
        if category is not None and category.shape[:-1] != positions.shape[:-2]:
            raise ValueError(
                f"category of shape {category.shape} must be [*batch, categories] for positions {positions.shape}; "
                "give one row for each cloud"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "use_bias": False}
        layers = functools.partial(perceptron, negative_slope=self.negative_slope, deterministic=deterministic, **dense)
        local, x = self.encoder(positions, mask=mask, deterministic=deterministic)
        invariant = VNStdFeature(
            self.normalize_frame, self.negative_slope, kernel_init=self.kernel_init, name="invariant", **dtypes
        )
        numbers, frame = invariant(x, mask=mask, deterministic=deterministic)
        shape = [masked_max(numbers.reshape(*numbers.shape[:-2], -1), mask)]
        if category is not None:
            shape.append(layers(category.astype(numbers.dtype), (self.category_features,), "category"))
        whole = jnp.concatenate(shape, axis=-1)[..., None, :]
        own = jnp.einsum("...cd,...kd->...ck", local.astype(frame.dtype), frame, precision=jax.lax.Precision.HIGHEST)
        own = own.reshape(*own.shape[:-2], -1)
        x = jnp.concatenate([jnp.broadcast_to(whole, (*own.shape[:-1], whole.shape[-1])), own], axis=-1)
        x = layers(
            x,
            self.hidden_features,
            "perceptron",
            mask=mask,
            dropout_rate=self.dropout_rate,
            dropped=len(self.hidden_features) - 1,
        )
        x = nn.Dense(self.num_classes, name="head", **dense)(x)
        return axes.constrain_last(x, axes.BATCH, axes.NODES, None)


def vn_dgcnn(
    num_classes: int = 40,
    stages: Sequence[Sequence[int]] = CLASSIFICATION_STAGES,
    embed_features: int = 341,
    hidden_features: Sequence[int] = (512, 256),
    num_neighbors: int = 20,
    pooling: Literal["mean", "max"] = "mean",
    dtype: Dtype | None = None,
) -> VNDGCNN:
    """Return the classifier with the encoder of the reference: clouds `[*batch, points, 3]` to logits.

    Args:
      num_classes: number of logits.
      stages: see `VNDGCNNEncoder`.
      embed_features: see there.
      hidden_features: widths of the perceptron.
      num_neighbors: see `VNDGCNNEncoder`.
      pooling: see there.
      dtype: compute dtype.

    Returns:
      An unbound `VNDGCNN` module.
    """
    encoder = VNDGCNNEncoder(stages, embed_features, num_neighbors, pooling, dtype=dtype)
    return VNDGCNN(num_classes, encoder, hidden_features, dtype=dtype)


def vn_dgcnn_segmentation(
    num_classes: int = 50,
    stages: Sequence[Sequence[int]] = SEGMENTATION_STAGES,
    embed_features: int = 341,
    hidden_features: Sequence[int] = (256, 256, 128),
    num_neighbors: int = 40,
    pooling: Literal["mean", "max"] = "mean",
    dtype: Dtype | None = None,
) -> VNDGCNNSegmentation:
    """Return the part segmentation network with the encoder of the reference: clouds to logits of each point.

    Args:
      num_classes: number of parts, of all categories together.
      stages: see `VNDGCNNEncoder`.
      embed_features: see there.
      hidden_features: widths of the perceptron.
      num_neighbors: see `VNDGCNNEncoder`.
      pooling: see there.
      dtype: compute dtype.

    Returns:
      An unbound `VNDGCNNSegmentation` module.
    """
    encoder = VNDGCNNEncoder(stages, embed_features, num_neighbors, pooling, dtype=dtype)
    return VNDGCNNSegmentation(num_classes, encoder, hidden_features, dtype=dtype)


# The reference code -------------------------------------------------------------------------------------------------


def block_names(ours: str, theirs: str) -> dict[str, str]:
    """Return the reference's names of a `VNLinearLeakyReLU`."""
    return {
        f"{ours}/linear": f"{theirs}.map_to_feat",
        f"{ours}/direction": f"{theirs}.map_to_dir",
        **norm_names(f"{ours}/norm/norm", f"{theirs}.batchnorm.bn"),
    }


def norm_names(ours: str, theirs: str) -> dict[str, str]:
    """Return the reference's names of a batch norm."""
    return {ours: theirs, f"{ours}/mean": f"{theirs}.running_mean", f"{ours}/var": f"{theirs}.running_var"}


def invariant_names() -> dict[str, str]:
    """Return the reference's names of the `VNStdFeature` of a model."""
    return {
        **block_names("invariant/block1", "std_feature.vn1"),
        **block_names("invariant/block2", "std_feature.vn2"),
        "invariant/frame": "std_feature.vn_lin",
    }


_ENCODER_NAMES = {
    name: theirs
    for number in range(1, 10)
    for name, theirs in (
        *block_names(f"encoder/conv{number}", f"conv{number}").items(),
        (f"encoder/pool{number}/direction", f"pool{number}.map_to_dir"),
    )
} | invariant_names()

# Our paths and the reference's names, for `VNDGCNN` and `VNDGCNNSegmentation`.
CLASSIFIER_NAMES: Mapping[str, str] = {
    **_ENCODER_NAMES,
    "perceptron1": "linear1",
    "perceptron2": "linear2",
    **norm_names("perceptron_norm1", "bn1"),
    **norm_names("perceptron_norm2", "bn2"),
    "head": "linear3",
}
SEGMENTATION_NAMES: Mapping[str, str] = {
    **_ENCODER_NAMES,
    "category1": "conv7.0",
    **norm_names("category_norm1", "conv7.1"),
    **{f"perceptron{number}": f"conv{number + 7}.0" for number in (1, 2, 3)},
    **{
        name: theirs
        for number in (1, 2, 3)
        for name, theirs in norm_names(f"perceptron_norm{number}", f"conv{number + 7}.1").items()
    },
    "head": "conv11",
}


def from_reference(tensors: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of `VNDGCNN` or `VNDGCNNSegmentation` from a checkpoint of the reference.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      variables: of our model (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      The collections `params` and `batch_stats`.

    Raises:
      ValueError: if names or shapes are not those of the model.
    """
    if "conv11.weight" not in tensors:
        return read_variables(tensors, variables, CLASSIFIER_NAMES)
    # The norms of its perceptron are registered there a second time, under names of their own.
    twice = [name for name in tensors if name.startswith("bn")]
    return read_variables(tensors, variables, SEGMENTATION_NAMES, ignored=twice)


def reference_inputs(model: VNDGCNN | VNDGCNNSegmentation) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return small inputs, which show the shapes of a model's parameters."""
    cloud = jax.ShapeDtypeStruct((1, 32, 3), jnp.float32)
    return (cloud,) if isinstance(model, VNDGCNN) else (cloud, _CATEGORY)


COUNTED: Mapping[str, str] = {r"num_batches_tracked$": "a count of the batches that were seen in training"}
_REPOSITORY = "github.com/FlyingGiraffe/vnn"
_SHARED = (r"^conv1\.map_to_feat\.weight$", r"^std_feature\.vn_lin\.weight$")
_POINTWISE = ("category1/kernel", "perceptron1/kernel", "perceptron2/kernel", "perceptron3/kernel", "head/kernel")
DIALECTS = (
    dialects.Dialect(
        name="official",
        origin=_REPOSITORY,
        module=VNDGCNN,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=(*_SHARED, r"^linear3\.weight$"),
        ignored=COUNTED,
        layout=dialects.table_layout(CLASSIFIER_NAMES),
        head="linear3.weight",
    ),
    dialects.Dialect(
        name="official",
        origin=_REPOSITORY,
        module=VNDGCNNSegmentation,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=(*_SHARED, r"^conv11\.weight$"),
        ignored={**COUNTED, r"^bn\d+\.": "a norm of the perceptron, stored a second time as conv*.1"},
        layout=dialects.table_layout(SEGMENTATION_NAMES, shapes=dict.fromkeys(_POINTWISE, dialects.pointwise(1))),
        head="conv11.weight",
    ),
)

_CLOUD = jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)
_CATEGORY = jax.ShapeDtypeStruct((1, 16), jnp.float32)

VARIANTS: dict[str, dict[str, Any]] = {
    "vn_dgcnn": {"module": vn_dgcnn, "inputs": (_CLOUD,), "num_classes": 40},
    "vn_dgcnn_segmentation": {
        "module": vn_dgcnn_segmentation,
        "inputs": (jax.ShapeDtypeStruct((1, 2048, 3), jnp.float32), _CATEGORY),
        "num_classes": 50,
    },
}
