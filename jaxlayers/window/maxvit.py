"""MaxViT: a pyramid whose blocks convolve, attend within windows, and attend across the map along a dilated grid."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, Params
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.ops.depthwise import as_general_conv
from jaxlayers.ops.patches import crop, pad_to_multiple, split_shape, to_blocks
from jaxlayers.ops.resample import resample_relative_table
from jaxlayers.ops.windows import (
    fit_window,
    grid_mask,
    merge_grid,
    merge_windows,
    partition_grid,
    partition_windows,
    shift_mask,
)
from jaxlayers.window.swin import WindowAttention

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)
batch_norm = functools.partial(nn.BatchNorm, momentum=0.99, epsilon=1e-3)
tanh_gelu = functools.partial(nn.gelu, approximate=True)

_TABLE = "relative_position_bias_table"


class MBConv(nn.Module):
    """Mix neighbours by a depthwise convolution between two linear layers, and weigh features by what the map holds.

    y = act(BN(D * act(BN(BN(x) W_up)))), out = skip(x) + drop((y sigmoid(MLP(mean(y)))) W_down + b), with D a depthwise
    3 x 3 convolution of stride s, mean over space, and skip(x) the mean of each s x s neighbourhood, times a matrix
    where the width changes.

    Symmetry:
      None exactly: what a translation by s moves over the border is lost to the convolution and to the mean over space.

    Attributes:
      features: width of the output.
      stride: s; 2 leaves a quarter of the entries, of sizes rounded up.
      expand_ratio: width between the linear layers, in multiples of `features`.
      squeeze_ratio: width of the hidden layer that weighs features, in multiples of `features` (at least 1 feature).
      activation_fn: the nonlinearity after the first two convolutions; the weighing MLP has SiLU.
      drop_path_rate: probability of dropping the branch for a sample, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters. Norms' statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats` with the running mean and var (decay 0.99), which `deterministic=False` updates; then also the RNG
      stream `dropout`, when the rate is not 0.

    Cost:
      With e = expand_ratio: e C_in C + (9 e C + e C^2) / s^2 multiply-accumulates an entry of the input, without the
      skip's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import MBConv
      >>> layer = MBConv(features=16, stride=2)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 5, 3, 16)

    Source:
      Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022, section 3.3; Sandler et al., MobileNetV2, CVPR
      2018; Hu et al., Squeeze-and-Excitation Networks, CVPR 2018; github.com/google-research/maxvit.

    Differs:
      Where an odd size is pooled, the zeros beyond the end count in the mean, as in timm; the official code leaves them
      out. The running var averages the biased variance of the batches, as Flax and TensorFlow do; PyTorch the unbiased.
    """

    features: int
    stride: int = 1
    expand_ratio: float = 4.0
    squeeze_ratio: float = 0.25
    activation_fn: ActivationFn = tanh_gelu
    drop_path_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch new_height new_width features"]:
        """Apply the block.

        Args:
          x: map, channels last.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          A map of size `ceil(size / stride)`.

        Raises:
          ValueError: if `x` has fewer than three axes or a field is not positive.
        """
        batch, _, channels = split_shape(x.shape, 2)
        hidden = int(self.features * self.expand_ratio)
        if self.features < 1 or self.stride < 1 or hidden < 1:
            raise ValueError(
                f"features={self.features}, stride={self.stride} and expand_ratio={self.expand_ratio} must be positive "
                "and leave hidden features; set them"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        norm = functools.partial(batch_norm, use_running_average=deterministic, **dtypes)
        steps = (self.stride, self.stride)

        skip = x if self.stride == 1 else jnp.mean(to_blocks(pad_to_multiple(x, steps), steps), axis=(-3, -2))
        if channels != self.features:
            skip = nn.Dense(self.features, name="shortcut", **common)(skip)
        y = nn.Dense(hidden, use_bias=False, name="up", **common)(norm(name="pre_norm")(x))
        y = axes.constrain(self.activation_fn(norm(name="norm1")(y)), axes.HIDDEN)
        y = nn.Conv(
            hidden,
            (3, 3),
            strides=self.stride,
            padding="VALID",
            feature_group_count=hidden,
            use_bias=False,
            conv_general_dilated=as_general_conv,
            name="depthwise",
            **common,
        )(_pad_same(y, 3, self.stride))
        y = axes.constrain(self.activation_fn(norm(name="norm2")(y)), axes.HIDDEN)
        weigh = FeedForward(
            max(1, int(self.features * self.squeeze_ratio)), activation_fn=nn.silu, name="squeeze", **common
        )
        y = y * nn.sigmoid(weigh(jnp.mean(y, axis=(-3, -2))))[..., None, None, :]
        y = nn.Dense(self.features, name="down", **common)(y)
        y = DropPath(self.drop_path_rate, batch_ndim=len(batch))(y, deterministic=deterministic)
        return axes.constrain_map(skip + y)


class PartitionAttention(nn.Module):
    """Mix the tokens of each part of a map, a window or a dilated grid, then each token alone.

    z = x + drop(A(norm(x))), out = z + drop(MLP(norm(z))), with A the attention with relative-position bias within each
    part. A part is a window of P x P neighbours (block attention); with `grid=True` it is what a grid of G x G cells
    laid over the whole map has at one place of every cell: the tokens congruent modulo size / G (grid attention).

    Symmetry:
      Block: exactly equivariant to cyclic translations by whole windows, if the map is a multiple of the window. Grid:
      exactly equivariant to permutations of the places within a cell, done alike in all cells.

    Attributes:
      num_heads: number of heads; must divide the features.
      partition_size: P or G, one entry for each spatial axis (1 to 3 of them); an int means a square of two axes. Along
        an axis that is not longer, it is clipped to the map, which then is one part.
      grid: parts are spread over the map instead of contiguous.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      activation_fn: the MLP's nonlinearity.
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      (4 + 2 mlp_ratio) C^2 + 2 n C multiply-accumulates a token of width C, with n = P^2 or G^2: linear in the number
      of tokens both ways.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import PartitionAttention
      >>> layer = PartitionAttention(num_heads=2, partition_size=4, grid=True)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 9, 6, 8)

    Source:
      Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022, sections 3.1 and 3.2;
      github.com/google-research/maxvit.

    Differs:
      Any map size: the map is padded at its ends to a multiple of P or G, and no token attends to padding; the official
      code, timm and torchvision refuse such maps. Q, K and V come from three products, as in the official code; the
      rows of the bias table count offsets query - key, of which timm and the official code have the negative.
    """

    num_heads: int
    partition_size: int | tuple[int, ...] = 7
    grid: bool = False
    mlp_ratio: float = 4.0
    activation_fn: ActivationFn = tanh_gelu
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*axes features"], *, deterministic: bool = True
    ) -> Float[Array, "*axes features"]:
        """Apply the block.

        Args:
          x: map `[*batch, *space, features]`.
          deterministic: no dropped branches.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has too few axes, or a field does not fit the features.
        """
        full = (self.partition_size,) * 2 if isinstance(self.partition_size, int) else tuple(self.partition_size)
        if len(full) not in axes.SPACE or min(full) < 1:
            raise ValueError(
                f"partition_size={self.partition_size} must have 1 to 3 positive entries; set partition_size"
            )
        unshifted = (0,) * len(full)
        batch, size, features = split_shape(x.shape, len(full))
        part, _ = fit_window(size, full, unshifted)
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=len(batch))

        y = pad_to_multiple(norm(name="norm1")(x), part)
        padded = y.shape[len(batch) : -1]
        if self.grid:
            parts, mask = partition_grid(y, part), grid_mask(size, part)
        else:
            parts, mask = partition_windows(y, part), shift_mask(size, part, unshifted, mask_padding=True)
        y = WindowAttention(self.num_heads, window_size=full, name="attention", **common)(
            parts, None if mask is None else jnp.asarray(mask), window=part, deterministic=deterministic
        )
        y = crop((merge_grid if self.grid else merge_windows)(y, part, padded), size)
        x = axes.constrain_map(x + drop_path(y, deterministic=deterministic), len(full))

        y = FeedForward(
            int(features * self.mlp_ratio), activation_fn=self.activation_fn, name="feed_forward", **common
        )(norm(name="norm2")(x), deterministic=deterministic)
        return axes.constrain_map(x + drop_path(y, deterministic=deterministic), len(full))


class MaxViTBlock(nn.Module):
    """Mix neighbours, then tokens of a window, then tokens all over the map.

    out = GridAttention(BlockAttention(MBConv(x))), each with its residual branches, see `MBConv` and
    `PartitionAttention`. Two attentions of linear cost let every token hear every other, if a window is at least as
    large as a cell of the grid.

    Symmetry:
      None exactly: windows and grid are tied to the map.

    Attributes:
      features: width of the output.
      stride: stride of the convolution.
      head_dim: width of a head; must divide the features.
      window_size: window of the block attention, an int or (height, width).
      grid_size: number of cells of the grid attention, an int or (height, width).
      expand_ratio: width between the linear layers of the convolution, in multiples of `features`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      activation_fn: the nonlinearity of convolution and MLPs.
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      norm: makes a norm of the attentions, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats`, see `MBConv`; the RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of its three parts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import MaxViTBlock
      >>> block = MaxViTBlock(features=8, stride=2, head_dim=4, window_size=2, grid_size=3)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 4)))[0].shape
      (1, 5, 3, 8)

    Source:
      Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022, section 3.3; github.com/google-research/maxvit.

    Differs:
      As its parts.
    """

    features: int
    stride: int = 1
    head_dim: int = 32
    window_size: int | tuple[int, ...] = 7
    grid_size: int | tuple[int, ...] = 7
    expand_ratio: float = 4.0
    mlp_ratio: float = 4.0
    activation_fn: ActivationFn = tanh_gelu
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch new_height new_width features"]:
        """Apply the block.

        Args:
          x: map, channels last.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          A map of size `ceil(size / stride)`.

        Raises:
          ValueError: if `x` has fewer than three axes or a field does not fit.
        """
        if self.head_dim < 1 or self.features % self.head_dim:
            raise ValueError(
                f"features={self.features} must be divisible by head_dim={self.head_dim}; set head_dim or features"
            )
        common: dict[str, Any] = {
            "activation_fn": self.activation_fn,
            "drop_path_rate": self.drop_path_rate,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        attend = functools.partial(
            PartitionAttention, self.features // self.head_dim, mlp_ratio=self.mlp_ratio, norm=self.norm, **common
        )
        x = MBConv(self.features, stride=self.stride, expand_ratio=self.expand_ratio, name="convolution", **common)(
            x, deterministic=deterministic
        )
        x = attend(partition_size=_pair(self.window_size, "window_size"), name="block_attention")(
            x, deterministic=deterministic
        )
        return attend(partition_size=_pair(self.grid_size, "grid_size"), grid=True, name="grid_attention")(
            x, deterministic=deterministic
        )


class MaxViT(nn.Module):
    """Classify images, or give their feature pyramid, by convolution, block attention and grid attention in each block.

    The stem is two 3 x 3 convolutions, the first of stride 2; stage s is `depths[s]` blocks of width `embed_dim[s]`,
    the first of which halves the map; the last map is averaged over space, normed, mapped to features with tanh, and
    mapped to logits.

    Symmetry:
      None exactly: windows and grid are tied to the map.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the features before it.
      stem_features: width of the stem.
      embed_dim: width of each stage; any number of stages.
      depths: number of blocks of each stage.
      head_dim: width of a head; must divide every width.
      window_size: window of the block attentions, an int or (height, width).
      grid_size: number of cells of the grid attentions, an int or (height, width).
      expand_ratio: width between the linear layers of the convolutions, in multiples of their output's.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      activation_fn: the nonlinearity of stem, convolutions and MLPs.
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm of the attentions and the last one, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats`, see `MBConv`; the RNG stream `dropout`, when `deterministic=False` and the rate is not 0. One tree
      serves every input size; `resize` is for another `window_size` or `grid_size`.

    Cost:
      Linear in the number of pixels. MaxViT-T at 224 x 224: 5.6 G multiply-accumulates, 30.9 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import MaxViT
      >>> model = MaxViT(num_classes=10, stem_features=8, embed_dim=(8, 16), depths=(1, 1), head_dim=8)
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(MaxViT.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels]
      ((1, 10), [((1, 16, 16, 8), (4, 4)), ((1, 8, 8, 16), (8, 8))])

    Source:
      Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022; github.com/google-research/maxvit.

    Differs:
      As `MBConv` and `PartitionAttention`. Drop rates reach `drop_path_rate` at the last block, as in timm; in the
      official code one block later; that of XL is L's, since no public configuration gives it. torchvision's
      `maxvit_t` is another network (other padding, exact GELU, other biases).
    """

    num_classes: int = 1000
    stem_features: int = 64
    embed_dim: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 5, 2)
    head_dim: int = 32
    window_size: int | tuple[int, ...] = 7
    grid_size: int | tuple[int, ...] = 7
    expand_ratio: float = 4.0
    mlp_ratio: float = 4.0
    activation_fn: ActivationFn = tanh_gelu
    drop_path_rate: float = 0.2
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        if len(self.embed_dim) != len(self.depths) or not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"embed_dim={self.embed_dim} and depths={self.depths} must have one positive entry a stage; set both"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = _Stem(self.stem_features, activation_fn=self.activation_fn, **common)
        stages = []
        for stage, (width, depth) in enumerate(zip(self.embed_dim, self.depths, strict=True)):
            block = functools.partial(
                MaxViTBlock,
                width,
                head_dim=self.head_dim,
                window_size=self.window_size,
                grid_size=self.grid_size,
                expand_ratio=self.expand_ratio,
                mlp_ratio=self.mlp_ratio,
                activation_fn=self.activation_fn,
                norm=self.norm,
                **common,
            )
            stages.append(_Stage(block=block, rates=rates[sum(self.depths[:stage]) :][:depth], remat=self.remat))
        self.stages = stages
        self.final_norm = self.norm(**dtypes)
        self.pre_logits = nn.Dense(self.embed_dim[-1], **common)
        self.head = nn.Dense(self.num_classes, **common) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images of any size, channels last, scaled as the weights want them.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the features before the head.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        x = jnp.mean(self.features(x, deterministic=deterministic)[-1].array, axis=(-3, -2))
        x = nn.tanh(self.pre_logits(self.final_norm(x)))
        return x if self.head is None else self.head(x)

    def features(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map after each stage, finest first, without norms.

        Args:
          x: images of any size, channels last.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          One level a stage, of stride `4 * 2**stage`.
        """
        x = self.patch_embed(x, deterministic=deterministic)
        levels = []
        for index, stage in enumerate(self.stages):
            x = stage(x, deterministic=deterministic)
            levels.append(Level(x, (4 * 2**index,) * 2))
        return tuple(levels)


class _Stem(nn.Module):
    """Two 3 x 3 convolutions, the first of stride 2, with a batch norm and a nonlinearity between them.

    Attributes:
      width: width of both.
      activation_fn: the nonlinearity.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
    """

    width: int
    activation_fn: ActivationFn
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        if self.width < 1:
            raise ValueError(f"stem_features={self.width} must be positive; set stem_features")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        split_shape(x.shape, 2)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        convolve = functools.partial(
            nn.Conv,
            self.width,
            (3, 3),
            padding="VALID",
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            **dtypes,
        )
        x = convolve(strides=2, name="convolution1")(_pad_same(x, 3, 2))
        x = self.activation_fn(batch_norm(use_running_average=deterministic, name="norm1", **dtypes)(x))
        return axes.constrain_map(convolve(name="convolution2")(_pad_same(x, 3, 1)))


class _Stage(nn.Module):
    """A chain of blocks, the first of which halves the map.

    Attributes:
      block: makes a block.
      rates: drop-path rate of each block.
      remat: what of each block is recomputed in the backward pass.
    """

    block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    remat: str | bool

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        for index, rate in enumerate(self.rates):
            block = self.block(stride=1 if index else 2, drop_path_rate=rate, name=f"blocks_{index}")
            x = remat.remat_block(call, self.remat)(block, x)
        return x


def _pad_same(x: Array, kernel: int, stride: int) -> Array:
    """Pad a map so that a convolution without padding has `ceil(size / stride)` outputs, the odd zero at the end."""
    batch, size, _ = split_shape(x.shape, 2)
    missing = (max(0, (-(-length // stride) - 1) * stride + kernel - length) for length in size)
    return jnp.pad(x, [(0, 0)] * len(batch) + [(total // 2, total - total // 2) for total in missing] + [(0, 0)])


def _pair(size: int | tuple[int, ...], field: str) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{field}={size} must be a positive int or (height, width); set {field}")
    return pair


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: MaxViT) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


def resize(params: Params, from_model: MaxViT, to_model: MaxViT) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the window and the grid of `to_model`.

    Relative-position tables are resampled bicubically; all else stays, `batch_stats` as well. Another image size alone
    needs nothing: one tree serves every size.

    Args:
      params: parameters of `from_model`.
      from_model: the model that the parameters are of.
      to_model: the model that they are wanted for.

    Returns:
      Parameters of `to_model`.

    Raises:
      ValueError: if the models differ in a field that no resampling bridges.
    """
    for field in ("num_classes", "stem_features", "embed_dim", "depths", "head_dim", "expand_ratio", "mlp_ratio"):
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    sizes = {
        f"{part}_attention": [_pair(getattr(model, field), field) for model in (from_model, to_model)]
        for part, field in (("block", "window_size"), ("grid", "grid_size"))
    }

    def fit(path: tuple[str, ...], leaf: Any) -> Any:
        if path[-1] != _TABLE:
            return leaf
        old, new = next(pair for name, pair in sizes.items() if name in path)
        return leaf if old == new else resample_relative_table(jnp.asarray(leaf), old, new)

    flat = flax.traverse_util.flatten_dict(dict(params))
    return flax.traverse_util.unflatten_dict({path: fit(path, leaf) for path, leaf in flat.items()})


# Reference checkpoints ------------------------------------------------------------------------------------------------

_BLOCK = "stages.{stage}.blocks.{block}"


def _batch_norm(ours: str, theirs: str) -> dict[str, str]:
    """Return the names of a batch norm and of its statistics."""
    return {ours: theirs, f"{ours}/mean": f"{theirs}.running_mean", f"{ours}/var": f"{theirs}.running_var"}


def _attention(ours: str, theirs: str) -> dict[str, str]:
    """Return the names of one attention with its MLP; the fused `qkv` is first cut in three."""
    return {
        f"stages/blocks/{ours}/{mine}": f"{_BLOCK}.{theirs}.{name}"
        for mine, name in {
            "norm1": "norm1",
            "attention": "attn.rel_pos",
            "attention/query": "attn.query",
            "attention/key": "attn.key",
            "attention/value": "attn.value",
            "attention/out": "attn.proj",
            "norm2": "norm2",
            "feed_forward/up": "mlp.fc1",
            "feed_forward/down": "mlp.fc2",
        }.items()
    }


_CONV = "stages/blocks/convolution"
# See `jaxlayers.core.reference`; `timm` are its `maxvit_*_tf_*` models, the converted official weights.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "timm": {
        "patch_embed/convolution1": "stem.conv1",
        **_batch_norm("patch_embed/norm1", "stem.norm1"),
        "patch_embed/convolution2": "stem.conv2",
        f"{_CONV}/shortcut": f"{_BLOCK}.conv.shortcut.expand",
        **_batch_norm(f"{_CONV}/pre_norm", f"{_BLOCK}.conv.pre_norm"),
        f"{_CONV}/up": f"{_BLOCK}.conv.conv1_1x1",
        **_batch_norm(f"{_CONV}/norm1", f"{_BLOCK}.conv.norm1"),
        f"{_CONV}/depthwise": f"{_BLOCK}.conv.conv2_kxk",
        **_batch_norm(f"{_CONV}/norm2", f"{_BLOCK}.conv.norm2"),
        f"{_CONV}/squeeze/up": f"{_BLOCK}.conv.se.fc1",
        f"{_CONV}/squeeze/down": f"{_BLOCK}.conv.se.fc2",
        f"{_CONV}/down": f"{_BLOCK}.conv.conv3_1x1",
        **_attention("block_attention", "attn_block"),
        **_attention("grid_attention", "attn_grid"),
        "final_norm": "head.norm",
        "pre_logits": "head.pre_logits.fc",
        "head": "head.fc",
    }
}


def from_reference(tensors: Mapping[str, Any], model: MaxViT, *, source: str = "timm") -> dict[str, Any]:
    """Return variables of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      The collections `params` and `batch_stats`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    table, channels = reference.choose_table(REFERENCE_NAMES, source, tensors, "patch_embed/convolution1/kernel")
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))
    ours = {name: _turned(tensor) if name.endswith(_TABLE) else tensor for name, tensor in tensors.items()}
    return reference.read_variables(reference.split_fused(ours), wanted, table)


def _turned(table: Any) -> np.ndarray:
    """Return a table of offsets key - query, heads first, as one of offsets query - key, heads last."""
    return np.asarray(table)[:, ::-1, ::-1].reshape(len(table), -1).T


def reference_inputs(model: MaxViT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)


def _their_table(size: str) -> Callable[[MaxViT, tuple[int, ...]], tuple[int, ...]]:
    """Return the rule of a table of offsets that is [heads, rows, columns] there; `size` names the model's field."""

    def shape(model: MaxViT, ours: tuple[int, ...]) -> tuple[int, ...]:
        height, width = _pair(getattr(model, size), size)
        return (ours[1], 2 * height - 1, 2 * width - 1)

    return shape


DIALECTS = (
    dialects.Dialect(
        name="timm",
        origin="timm, `maxvit_*_tf_*`",
        module=MaxViT,
        read=dialects.from_variables(from_reference, source="timm"),
        marks=(r"^stages\.0\.blocks\.0\.attn_grid\.attn\.rel_pos\.relative_position_bias_table$", r"^stem\.conv1\."),
        ignored=dialects.COUNTED,
        layout=dialects.table_layout(
            REFERENCE_NAMES["timm"],
            shapes={
                f"block_attention/attention/{_TABLE}": _their_table("window_size"),
                f"grid_attention/attention/{_TABLE}": _their_table("grid_size"),
                **{
                    f"convolution/{part}/kernel": dialects.pointwise()
                    for part in ("shortcut", "up", "down", "squeeze/up", "squeeze/down")
                },
            },
            fused=dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
        ),
        head="head.fc.weight",
        stem="stem.conv1.weight",
    ),
)


def _variant(
    stem_features: int, embed_dim: int, depths: tuple[int, ...], drop_path_rate: float, size: int, window: int
) -> dict[str, Any]:
    return {
        "module": MaxViT,
        "inputs": (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),),
        "stem_features": stem_features,
        "embed_dim": tuple(embed_dim * 2**stage for stage in range(len(depths))),
        "depths": depths,
        "window_size": window,
        "grid_size": window,
        "drop_path_rate": drop_path_rate,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    f"maxvit_{name}{suffix}": _variant(*shape, size, window)
    for name, shape in {
        "tiny": (64, 64, (2, 2, 5, 2), 0.2),
        "small": (64, 96, (2, 2, 5, 2), 0.3),
        "base": (64, 96, (2, 6, 14, 2), 0.4),
        "large": (128, 128, (2, 6, 14, 2), 0.6),
        "xlarge": (192, 192, (2, 6, 14, 2), 0.6),
    }.items()
    for suffix, size, window in (("", 224, 7), ("_384", 384, 12), ("_512", 512, 16))
}
