"""Axial-ResNet: residual bottlenecks whose convolution is position-sensitive attention along columns, then rows."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.remat import attention as remat_attention
from jaxlayers.core.remat import remat_block
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.ops.patches import pad_to_multiple, split_shape, to_blocks
from jaxlayers.ops.resample import resample_relative_table

# Momentum and epsilon of the reference (which counts the momentum from the other end).
batch_norm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
fan_out_normal = functools.partial(jax.nn.initializers.variance_scaling, 2.0, "fan_out", "normal")


def average_pool(
    x: Float[Array, "*batch height width features"], stride: int
) -> Float[Array, "*batch new_height new_width features"]:
    """Return the means over squares of side `stride`, those at the ends over as much as there is of them."""
    _, size, _ = split_shape(x.shape, 2)
    sums = jnp.sum(to_blocks(pad_to_multiple(x, (stride,) * 2), (stride,) * 2), axis=(-3, -2))
    rows, columns = (np.minimum(stride, length - np.arange(0, length, stride)) for length in size)
    return sums / jnp.asarray(rows[:, None, None] * columns[:, None], sums.dtype)


class PositionSensitiveAttention(nn.Module):
    """Let each entry attend along one axis, with learned relative positions in queries, keys and values.

    out_i = BN(sum_j w_ij v_j) + BN(sum_j w_ij s_(i-j)),
    w_ij = softmax_j(BN(q_i k_j) + BN(q_i a_(i-j)) + BN(k_j b_(j-i))),

    for each head of width d, with q, k of width d / 2 and v of width d batch norms of linear maps of x
    `[*batch, height, width, features]`; i and j run along the axis, the other one counts as batch; a, b
    `[offsets, d / 2]` and s `[offsets, d]` are tables shared by the heads, whose middle row is offset 0.

    Symmetry:
      Exactly equivariant to permutations of the lines. Along them it knows offsets only, but no border continues them,
      so translations along the line are no symmetry.

    Attributes:
      num_heads: number of heads; must divide the features into an even width.
      max_length: length of the longest line; the tables have 2 max_length - 1 rows. Shorter lines read the middle ones.
      axis: "height" to attend along columns, "width" along rows.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.

    Collections:
      `batch_stats` with the running means and variances (decay 0.9), which `deterministic=False` updates.

    Cost:
      N entries of width C in lines of n: 2 N C^2 + 3.5 N n C multiply-accumulates.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import PositionSensitiveAttention
      >>> layer = PositionSensitiveAttention(num_heads=2, max_length=7, axis="width")
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 5, 4, 8)))[0].shape
      (1, 5, 4, 8)

    Source:
      Wang et al., Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation, ECCV 2020, equation 4;
      github.com/csrhddlam/axial-deeplab.

    Differs:
      Batch norms as in the code, not in the equation, where also the sum over s has no norm of its own. The running
      variance averages the biased variance of the batches, as Flax does; PyTorch the unbiased.
    """

    num_heads: int
    max_length: int
    axis: str = axes.HEIGHT
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch height width features"]:
        """Attend.

        Args:
          x: a map; more than three axes count as batch.
          deterministic: norm by the running statistics, not by those of the batch.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has too few axes, its lines are too long, or a field does not fit.
        """
        _, size, features = split_shape(x.shape, 2)
        if self.axis not in axes.SPACE[2]:
            raise ValueError(f"axis={self.axis!r} must be one of {axes.SPACE[2]}; set axis")
        if self.num_heads < 1 or features % (2 * self.num_heads):
            raise ValueError(
                f"features={features} must be divisible by twice num_heads={self.num_heads}; set num_heads or features"
            )
        place = axes.SPACE[2].index(self.axis)
        length, other = size[place], axes.SPACE[2][1 - place]
        if length > self.max_length:
            raise ValueError(
                f"length {length} along {self.axis} must not exceed max_length={self.max_length} of the position "
                "tables; resize the parameters to a larger image_size"
            )
        dim = features // self.num_heads
        norm = functools.partial(
            batch_norm, use_running_average=deterministic, dtype=self.dtype, param_dtype=self.param_dtype
        )
        x = jnp.moveaxis(x, place - 3, -2)

        def project(name: str, width: int) -> Array:
            y = nn.Dense(
                width,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=name,
            )(x)
            return axes.constrain_heads(split_heads(norm(name=f"{name}_norm")(y), self.num_heads), other)

        def positions(name: str, width: int) -> Array:
            init = nn.initializers.normal(dim**-0.5)
            shape, size = (2 * self.max_length - 1, width), f"max_length={self.max_length}"
            table = learned_table(self, f"{name}_position", init, shape, self.param_dtype, size=size)
            middle = table[self.max_length - length : self.max_length + length - 1]
            offsets = np.arange(length)[:, None] - np.arange(length) + length - 1
            return middle[offsets]

        parts = [("query", features // 2), ("key", features // 2), ("value", features)]
        query, key, value = (project(name, width) for name, width in parts)
        tables = [positions(name, width // self.num_heads).astype(query.dtype) for name, width in parts]

        def attend(module: nn.Module, query: Array, key: Array, value: Array, *tables: Array) -> tuple[Array, Array]:
            scores = [
                jnp.matmul(query, jnp.swapaxes(key, -1, -2)),
                jnp.einsum("...id,ijd->...ij", query, tables[0]),
                # Offsets as the key sees them.
                jnp.einsum("...jd,jid->...ij", key, tables[1]),
            ]
            normed = norm(axis=-3, parent=module, name="similarity_norm")(jnp.concatenate(scores, axis=-3))
            by_content, by_query, by_key = jnp.split(normed, 3, axis=-3)
            weights = attention_weights(by_content + by_query + by_key)
            return jnp.matmul(weights, value), jnp.einsum("...ij,ijd->...id", weights, tables[2])

        content, position = (
            merge_heads(axes.constrain_heads(part, other))
            for part in remat_attention(attend, self, query, key, value, *tables)
        )
        out = norm(name="content_norm")(content) + norm(name="position_norm")(position)
        return jnp.moveaxis(out, -2, place - 3)


class AxialBottleneck(nn.Module):
    """Narrow a map, attend along its columns and then its rows, widen it, and add it to the input.

    z = ReLU(BN(x W_reduce)), z = ReLU(pool(A_width(A_height(z)))), out = ReLU(BN(z W_expand) + skip(x)), with A as
    `PositionSensitiveAttention`, pool the average over `stride` x `stride` entries, and skip(x) =
    BN(x[::stride] W_skip), or x itself where the shapes agree.

    Symmetry:
      None exactly, see `PositionSensitiveAttention`.

    Attributes:
      features: width of the bottleneck; the output has `expansion` times as many.
      num_heads: number of heads; must divide the features into an even width.
      map_size: (height, width) of the largest map, which the position tables are for.
      stride: 2 halves the map (an odd size is rounded up), 1 keeps it.
      expansion: width of the output, in multiples of the bottleneck's.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels outside attention; those in it have variance 1 / fan-in.

    Collections:
      `batch_stats`, see `PositionSensitiveAttention`.

    Cost:
      N entries of width D, bottleneck C, map n x n: N C (D + 4 C + 7 n) before the stride, then expand and skip.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import AxialBottleneck
      >>> block = AxialBottleneck(features=8, num_heads=2, map_size=(7, 7), stride=2)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 7, 6, 12)))[0].shape
      (1, 4, 3, 16)

    Source:
      Wang et al., Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation, ECCV 2020, figure 3;
      github.com/csrhddlam/axial-deeplab.

    Differs:
      Odd sizes are rounded up, the last average being over what is there; the code fails on them.
    """

    features: int
    num_heads: int
    map_size: tuple[int, int]
    stride: int = 1
    expansion: int = 2
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = fan_out_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch new_height new_width new_features"]:
        """Apply the block.

        Args:
          x: a map; more than three axes count as batch.
          deterministic: norm by the running statistics, not by those of the batch.

        Returns:
          A map of size `ceil(size / stride)`.

        Raises:
          ValueError: if `x` has too few axes, is larger than `map_size`, or a field does not fit.
        """
        split_shape(x.shape, 2)
        if self.features < 1 or self.expansion < 1 or self.stride < 1:
            raise ValueError(
                f"features={self.features}, expansion={self.expansion} and stride={self.stride} must be positive; "
                "set them"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, use_bias=False, kernel_init=self.kernel_init, **dtypes)
        norm = functools.partial(batch_norm, use_running_average=deterministic, **dtypes)
        y = nn.relu(norm(name="norm1")(dense(self.features, name="reduce")(x)))
        for axis, length in zip(axes.SPACE[2], self.map_size, strict=True):
            attention = PositionSensitiveAttention(self.num_heads, length, axis, name=f"{axis}_attention", **dtypes)
            y = attention(y, deterministic=deterministic)
        if self.stride > 1:
            y = average_pool(y, self.stride)
        # The last norm starts at zero, so that the block starts as its skip connection.
        last = norm(scale_init=zeros(), name="norm2")
        y = last(dense(self.features * self.expansion, name="expand")(nn.relu(y)))
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            x = norm(name="skip_norm")(dense(y.shape[-1], name="skip")(x[..., :: self.stride, :: self.stride, :]))
        return axes.constrain_map(nn.relu(y + x))


class AxialResNet(nn.Module):
    """Classify images, or give their feature pyramid, by a residual network with axial attention for convolutions.

    A 7 x 7 convolution of stride 2 and a 3 x 3 maximum of stride 2 to width `embed_dim`; stage s has `depths[s]`
    `AxialBottleneck`s of width 2^(s + 1) `embed_dim` and output width 2^(s + 2) `embed_dim`, the first of stride 2 (1
    in the first stage); the last map is averaged over space and mapped to logits.

    Symmetry:
      None exactly, see `PositionSensitiveAttention`.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the averaged features.
      image_size: int or (height, width) of the largest image, which the position tables are for; see `resize`.
      embed_dim: width of the stem.
      depths: number of blocks of each stage.
      num_heads: number of heads of all blocks.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels outside attention; those in it have variance 1 / fan-in.
      head_init: initialiser of the head's kernel.

    Collections:
      `batch_stats`, see `PositionSensitiveAttention`.

    Cost:
      O(N sqrt(N)) in the number N of pixels. Axial-ResNet-26-S at 224 x 224: 1.8 G multiply-accumulates, 5.9 M
      parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import AxialResNet
      >>> model = AxialResNet(num_classes=10, image_size=64, embed_dim=4, depths=(1, 2), num_heads=2)
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(AxialResNet.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels]
      ((1, 10), [((1, 16, 16, 16), (4, 4)), ((1, 8, 8, 32), (8, 8))])

    Source:
      Wang et al., Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation, ECCV 2020, section 3.3;
      github.com/csrhddlam/axial-deeplab (Conv-Stem + Axial-Attention).

    Differs:
      As `PositionSensitiveAttention` and `AxialBottleneck`. Images smaller than `image_size` are taken as they are,
      where the code takes one size only.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    embed_dim: int = 32
    depths: tuple[int, ...] = (1, 2, 4, 1)
    num_heads: int = 8
    remat: str | bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = fan_out_normal()
    head_init: Initializer = truncated_normal()

    def setup(self) -> None:
        """Make the parts."""
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} must have one positive entry a stage; set depths")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim={self.embed_dim} must be positive; set embed_dim")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embed = _Stem(self.embed_dim, kernel_init=self.kernel_init, **dtypes)
        self.stages = [
            _Stage(
                tuple(
                    functools.partial(
                        AxialBottleneck,
                        2 ** (stage + 1) * self.embed_dim,
                        self.num_heads,
                        map_size,
                        stride=2 if stage and index == 0 else 1,
                        kernel_init=self.kernel_init,
                        **dtypes,
                    )
                    for index, map_size in enumerate(map_sizes)
                ),
                remat=self.remat,
            )
            for stage, map_sizes in enumerate(block_maps(self))
        ]
        self.head = nn.Dense(self.num_classes, kernel_init=self.head_init, **dtypes) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images up to `image_size`, channels last, scaled as the weights want them.
          deterministic: norm by the running statistics, not by those of the batch.

        Returns:
          Logits, or with `num_classes=0` the averaged features.

        Raises:
          ValueError: if `x` has too few axes, is larger than `image_size` or not of floating point, or a field does not
            fit.
        """
        x = jnp.mean(self.features(x, deterministic=deterministic)[-1].array, axis=(-3, -2))
        return x if self.head is None else self.head(x)

    def features(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map after each stage, finest first.

        Args:
          x: images up to `image_size`, channels last.
          deterministic: norm by the running statistics, not by those of the batch.

        Returns:
          One level a stage, of stride `4 * 2**stage`.
        """
        split_shape(x.shape, 2)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        x = self.patch_embed(x, deterministic=deterministic)
        levels = []
        for index, stage in enumerate(self.stages):
            x = stage(x, deterministic=deterministic)
            levels.append(Level(x, (4 * 2**index,) * 2))
        return tuple(levels)


def block_maps(model: AxialResNet) -> list[list[tuple[int, int]]]:
    """Return, for each block of each stage, the largest map that its attentions see.

    The first block of a later stage attends at the size of the stage before, and then halves the map.
    """
    size = (model.image_size,) * 2 if isinstance(model.image_size, int) else tuple(model.image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size={model.image_size} must be positive, an int or (height, width); set image_size")
    maps = []
    for stage, depth in enumerate(model.depths):
        before, now = (tuple(-(-length // (4 * 2**level)) for length in size) for level in (max(stage - 1, 0), stage))
        maps.append([before, *[now] * (depth - 1)])
    return maps


class _Stem(nn.Module):
    """A strided convolution, a norm and a strided maximum.

    Attributes:
      width: number of features.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernel.
    """

    width: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        convolution = nn.Conv(
            self.width,
            (7, 7),
            2,
            [(3, 3)] * 2,
            use_bias=False,
            kernel_init=self.kernel_init,
            name="projection",
            **dtypes,
        )
        x = batch_norm(use_running_average=deterministic, name="norm", **dtypes)(convolution(x))
        # Nothing is below the zeros that surround the map.
        x = jnp.pad(nn.relu(x), [(0, 0)] * (x.ndim - 3) + [(1, 1)] * 2 + [(0, 0)])
        return axes.constrain_map(nn.max_pool(x, (3, 3), (2, 2)))


class _Stage(nn.Module):
    """A chain of blocks.

    Attributes:
      makers: make the blocks.
      remat: what of each block is recomputed in the backward pass.
    """

    makers: tuple[Callable[..., nn.Module], ...]
    remat: str | bool

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        for index, make in enumerate(self.makers):
            x = remat_block(call, self.remat)(make(name=f"blocks_{index}"), x)
        return x


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: AxialResNet) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


def resize(params: Params, from_model: AxialResNet, to_model: AxialResNet) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image size of `to_model`, tables resampled bicubically.

    A smaller image needs nothing: it reads the middle of the tables. Running statistics stay as they are.

    Raises:
      ValueError: if the models differ in another field that the shapes of parameters depend on.
    """
    for field in ("num_classes", "embed_dim", "depths", "num_heads"):
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    old_maps, new_maps = block_maps(from_model), block_maps(to_model)

    def fit(path: tuple[str, ...], leaf: Any) -> Any:
        if not path[-1].endswith("_position"):
            return leaf
        stage, block = (int(part.rpartition("_")[2]) for part in path[:2])
        axis = axes.SPACE[2].index(path[2].removesuffix("_attention"))
        old, new = (maps[stage][block][axis] for maps in (old_maps, new_maps))
        return leaf if old == new else resample_relative_table(jnp.asarray(leaf), (old,), (new,))

    flat = flax.traverse_util.flatten_dict(dict(params))
    return flax.traverse_util.unflatten_dict({path: fit(path, leaf) for path, leaf in flat.items()})


# Reference checkpoints ------------------------------------------------------------------------------------------------

_BLOCK = "stages.{stage}.{block}"


def _names() -> dict[str, str]:
    layers = {
        "patch_embed/projection": "conv1",
        "head": "fc",
        "stages/blocks/reduce": f"{_BLOCK}.conv_down",
        "stages/blocks/expand": f"{_BLOCK}.conv_up",
        "stages/blocks/skip": f"{_BLOCK}.downsample.0",
    }
    norms = {
        "patch_embed/norm": "bn1",
        "stages/blocks/norm1": f"{_BLOCK}.bn1",
        "stages/blocks/norm2": f"{_BLOCK}.bn2",
        "stages/blocks/skip_norm": f"{_BLOCK}.downsample.1",
    }
    for ours, theirs in (("height", "hight_block"), ("width", "width_block")):
        ours, theirs = f"stages/blocks/{ours}_attention", f"{_BLOCK}.{theirs}"
        for part in ("query", "key", "value"):
            layers[f"{ours}/{part}"] = f"{theirs}.{part}"
            layers[f"{ours}/{part}_position"] = f"{theirs}.{part}_position"
            norms[f"{ours}/{part}_norm"] = f"{theirs}.{part}_norm"
        for part in ("content_norm", "position_norm"):
            norms[f"{ours}/{part}"] = f"{theirs}.{part}"
        norms[f"{ours}/similarity_norm"] = f"{theirs}.bn_similarity"
    for ours, theirs in norms.items():
        layers |= {ours: theirs, f"{ours}/mean": f"{theirs}.running_mean", f"{ours}/var": f"{theirs}.running_var"}
    return layers


# See `jaxlayers.core.reference`; what the reference keeps in one tensor is first cut by `split_reference`, and its
# layer1 to layer4 are called stages.0 to stages.3.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {"official": _names()}


def split_reference(tensors: Mapping[str, Any], num_heads: int) -> dict[str, np.ndarray]:
    """Return a checkpoint's tensors with those cut that hold several of ours.

    `qkv_transform` and `bn_qkv` hold q, k, v head by head, `relative` the three tables with offsets last, `bn_output`
    the norms of the two sums in turn.

    Args:
      tensors: arrays by the reference's names.
      num_heads: the model's.
    """
    found = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^layer(\d+)", lambda match: f"stages.{int(match[1]) - 1}", name.removeprefix("module."))
        tensor = np.asarray(tensor)
        module, _, leaf = name.rpartition(".")
        stem, _, part = module.rpartition(".")
        prefix = f"{stem}." if stem else ""
        if leaf == "relative":
            rows = tensor.T
            dim = rows.shape[-1] // 4
            for kind, piece in zip(("query", "key", "value"), np.split(rows, (dim, 2 * dim), axis=-1), strict=True):
                found[f"{module}.{kind}_position" if module else f"{kind}_position"] = piece
        elif part in ("qkv_transform", "bn_qkv") and tensor.ndim:
            heads = tensor.reshape(num_heads, -1, *tensor.shape[1:])
            dim = heads.shape[1] // 4
            suffix = "" if part == "qkv_transform" else "_norm"
            for kind, piece in zip(("query", "key", "value"), np.split(heads, (dim, 2 * dim), axis=1), strict=True):
                found[f"{prefix}{kind}{suffix}.{leaf}"] = piece.reshape(-1, *tensor.shape[1:])
        elif part == "bn_output" and tensor.ndim:
            found[f"{prefix}content_norm.{leaf}"], found[f"{prefix}position_norm.{leaf}"] = tensor[::2], tensor[1::2]
        else:
            found[name] = tensor
    return found


def from_reference(tensors: Mapping[str, Any], model: AxialResNet, *, source: str = "official") -> dict[str, Any]:
    """Return variables of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for; the reference's image size is 224.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      The collections `params` and `batch_stats`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    split = split_reference(tensors, model.num_heads)
    table, channels = reference.choose_table(REFERENCE_NAMES, source, split, "patch_embed/projection/kernel")
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))
    return reference.read_variables(split, wanted, table, ignored=("flatten_index",))


def reference_inputs(model: AxialResNet) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)


def _joined(name: str) -> str:
    """Return the reference's name of what `split_reference` has cut."""
    name = re.sub(r"^stages\.(\d+)", lambda match: f"layer{int(match[1]) + 1}", name)
    return re.sub(r"\.(query|key|value)_position$", ".relative", name)


_PARTS = ("query", "key", "value")
DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/csrhddlam/axial-deeplab",
        module=AxialResNet,
        read=dialects.from_variables(from_reference, source="official"),
        marks=(r"^layer1\.0\.hight_block\.qkv_transform\.weight$", r"^conv1\.weight$"),
        ignored={**dialects.COUNTED, r"flatten_index$": "an index that follows from the size of the map"},
        layout=dialects.table_layout(
            REFERENCE_NAMES["official"],
            shapes={
                **{f"blocks/{part}/kernel": dialects.pointwise() for part in ("reduce", "expand", "skip")},
                **{f"{part}/kernel": dialects.pointwise(1) for part in _PARTS},
                **{f"{part}_position": lambda model, ours: ours[::-1] for part in _PARTS},
            },
            fused={
                **dict.fromkeys(_PARTS, "qkv_transform"),
                **{f"{part}_norm": "bn_qkv" for part in _PARTS},
                **dict.fromkeys(("content_norm", "position_norm"), "bn_output"),
            },
            rename=_joined,
        ),
        head="fc.weight",
        stem="conv1.weight",
    ),
)


def _variant(embed_dim: int, depths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "module": AxialResNet,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
        "embed_dim": embed_dim,
        "depths": depths,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "axial_resnet26_small": _variant(32, (1, 2, 4, 1)),
    "axial_resnet50_small": _variant(32, (3, 4, 6, 3)),
    "axial_resnet50_medium": _variant(48, (3, 4, 6, 3)),
    "axial_resnet50_large": _variant(64, (3, 4, 6, 3)),
}
