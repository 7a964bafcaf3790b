"""VN-small: a few vectors that turn with a point cloud, from one graph convolution of vector neurons."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects
from jaxlayers.core.initializers import lecun_normal
from jaxlayers.core.reference import read_variables
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.equivariant.vector_neurons import (
    VNBatchNorm,
    VNLinearLeakyReLU,
    check_positions,
    edge_vectors,
    vector_mean_pool,
)
from jaxlayers.equivariant.vn_dgcnn import COUNTED, norm_names, pool_vectors
from jaxlayers.ops.neighbours import k_nearest


class VNSmall(nn.Module):
    """Read a few vectors off a point cloud that turn with it, to canonicalise the cloud by: VN-small.

    v = mean_i block(BN(block(pool_j block(x_j - x_i, x_i, x_j x x_i)))), with points x_i, their k nearest neighbours j,
    the first two blocks of `features` vectors and the last of `num_vectors`, all `VNLinearLeakyReLU`.

    As the canonicaliser of `LearnedCanonicalization` it makes any network of point clouds invariant or equivariant.

    Symmetry:
      Exactly equivariant to rotations, SO(3), acting on points and further vectors, and on the output as vectors;
      invariant to permutations of the points. Not to reflections, since the cross product keeps its sign under a point
      reflection, nor to translations: give centred points, as `LearnedCanonicalization` does for E(d) and SE(d).
      Where it breaks: neighbours that are equally far are taken by index: on symmetric clouds the choice among them,
      and with `pooling="max"` among points that reach equally far, follows rounding and order. Where all the
      neighbours of a point are taken, mean pooling breaks nowhere, but vectors vanish that a symmetry of the cloud does
      not leave a direction for.

    Attributes:
      features: vector channels; positive.
      num_vectors: output vectors; positive.
      num_neighbors: k, the point itself included; clouds of fewer points take all.
      pooling: over the neighbours, `"mean"` or `"max"` (see `VNMaxPool`).
      negative_slope: of the blocks, in [0, 1].
      dropout_rate: share of the vectors of the points that are dropped before the mean, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the matrices.

    Collections:
      `batch_stats`, see `VNBatchNorm`, which `deterministic=False` updates; the RNG stream `dropout`, when
      `deterministic=False` and the rate is not 0.

    Cost:
      points^2 x 3 for the neighbours and points x k x (3 channels) x features x 3 x 2 for the first block.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import LearnedCanonicalization, VNSmall
      >>> from jaxlayers.equivariant.frame_averaging import PointNet
      >>> model = LearnedCanonicalization(PointNet(num_classes=4), VNSmall(num_neighbors=5), group="SO(d)")
      >>> points = jax.random.normal(jax.random.key(0), (2, 9, 3))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(1), points)[0].shape
      (2, 4)

    Source:
      Deng et al., Vector Neurons, ICCV 2021, section 3; Mondal, Panigrahi, Kaba, Rajeswar, Ravanbakhsh, Equivariant
      Adaptation of Large Pretrained Models, NeurIPS 2023. Reference code arnab39/equiadapt at 657ee6f,
      `pointcloud/canonicalization_networks/equivariant_networks.py`; the layers were read there, not in the papers.

    Differs:
      All `num_vectors` vectors are returned; the reference computes four and returns three, of which Gram-Schmidt sees
      as many as it needs. Dropout drops whole vectors; the reference drops coordinates, which does not turn with the
      cloud. Further vectors, scalars and masks. See `VNBatchNorm` for running variances.
    """

    features: int = 21
    num_vectors: int = 4
    num_neighbors: int = 20
    pooling: Literal["mean", "max"] = "mean"
    negative_slope: float = 0.0
    dropout_rate: float = 0.5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self,
        points: Float[Array, "*batch n 3"],
        vectors: Sequence[Float[Array, "*batch n 3"]] = (),
        scalars: Float[Array, "*batch n scalars"] | None = None,
        *,
        mask: Bool[Array, "*batch n"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch vectors 3"]:
        """Read the vectors off.

        Args:
          points: positions, in any unit; the reference has clouds within the unit sphere. They alone say which points
            are neighbours.
          vectors: further vectors of each point, such as normals.
          scalars: invariant numbers of each point, such as charges: each gives a channel of weighted positions.
          mask: True = a point, False = padding.
          deterministic: use the running statistics, do not update them, and drop nothing.

        Returns:
          Vectors of any length; zero for a cloud of padding alone. A NaN coordinate makes those of its cloud NaN.

        Raises:
          ValueError: on points, vectors, scalars or a mask of shapes that do not fit, or fields out of range.
        """
        check_positions(points, mask)
        if min(self.features, self.num_vectors, self.num_neighbors) < 1 or not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"features={self.features}, num_vectors={self.num_vectors} and num_neighbors={self.num_neighbors} must "
                f"be positive and dropout_rate={self.dropout_rate} in [0, 1); set them"
            )
        given = [x.shape for x in vectors] + ([] if scalars is None else [(*scalars.shape[:-1], 3)])
        if any(shape != points.shape for shape in given):
            raise ValueError(
                f"vectors {[x.shape for x in vectors]} and scalars {None if scalars is None else scalars.shape} must "
                f"belong to the points {points.shape}; pass [*batch, n, 3] and [*batch, n, scalars]"
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }
        x = jnp.stack([points, *vectors], axis=-2)
        if scalars is not None:
            x = jnp.concatenate([x, points[..., None, :] * scalars[..., None]], axis=-2)
        x = x if mask is None else jnp.where(mask[..., None, None], x, 0)
        neighbours = k_nearest(points, min(self.num_neighbors, points.shape[-2]), mask=mask, include_self=True)
        edges = None if mask is None else neighbours.mask

        def block(features: int, name: str) -> VNLinearLeakyReLU:
            return VNLinearLeakyReLU(features, self.negative_slope, name=name, **common)

        x = edge_vectors(x, neighbours, cross=True)
        x = block(self.features, "conv_edges")(x, mask=edges, deterministic=deterministic)
        x = pool_vectors(x, self.pooling, mask=edges, name="pool", **common)
        x = block(self.features, "conv1")(x, mask=mask, deterministic=deterministic)
        norm = VNBatchNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm1")
        x = norm(x, mask=mask, deterministic=deterministic)
        x = block(self.num_vectors, "conv2")(x, mask=mask, deterministic=deterministic)
        x = nn.Dropout(self.dropout_rate, broadcast_dims=(-1,))(x, deterministic=deterministic)
        return axes.constrain_last(vector_mean_pool(x, mask=mask), axes.BATCH, None, None)


def _block(ours: str, theirs: str, rank: int) -> dict[str, str]:
    """Return the reference's names of a block, whose norm has the rank of its input there."""
    return {
        f"{ours}/linear": f"{theirs}.map_to_feat",
        f"{ours}/direction": f"{theirs}.map_to_dir",
        **norm_names(f"{ours}/norm/norm", f"{theirs}.batchnorm.bn{rank}d"),
    }


# Our paths and the reference's names. See `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, str] = {
    **_block("conv_edges", "conv_pos", 2),
    "pool/direction": "pool.map_to_dir",
    **_block("conv1", "conv1", 1),
    **norm_names("norm1/norm", "bn1.bn1d"),
    **_block("conv2", "conv2", 1),
}


def from_reference(tensors: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of `VNSmall` from a checkpoint of the reference.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      variables: of our model (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      The collections `params` and `batch_stats`.

    Raises:
      ValueError: if names or shapes are not those of the model.
    """
    return read_variables(tensors, variables, REFERENCE_NAMES)


def reference_inputs(model: VNSmall) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return a small cloud, which shows the shapes of the parameters."""
    return (jax.ShapeDtypeStruct((1, 32, 3), jnp.float32),)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/arnab39/equiadapt, pointcloud/canonicalization_networks",
        module=VNSmall,
        read=dialects.from_shapes(from_reference, collections=True),
        marks=(r"^conv_pos\.map_to_feat\.weight$", r"^bn1\.bn1d\.weight$"),
        ignored=COUNTED,
        layout=dialects.table_layout(REFERENCE_NAMES),
    ),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "vn_small": {"module": VNSmall, "inputs": (jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32),), "features": 21},
}
