"""Swin UNETR: a pyramid of shifted-window attention whose every level feeds a convolutional decoder, in 2-D or 3-D."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import ActivationFn, Dtype, Initializer
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.nn.window_maps import cut_windows, join_windows
from jaxlayers.ops.halo import map_split, window_mask, window_names
from jaxlayers.ops.patches import crop, from_patches, pad_to_multiple, split_shape, to_blocks
from jaxlayers.ops.windows import fit_window
from jaxlayers.window import swin
from jaxlayers.window.swin import SwinBlock, WindowAttention

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)
leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.01)

# Which entries of each 2 x 2 x 2 neighbourhood a merging puts into the features, in their order. Until version 1.4
# MONAI took two of them twice and left out two others, and the published weights are trained so; since 1.5 it takes all
# eight, and its "mergingv2" the same in row-major order.
_REPEATED = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
_COMPLETE = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
MERGINGS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "repeated": _REPEATED,
    "complete": _COMPLETE,
    "ordered": tuple(itertools.product(range(2), repeat=3)),
}
"""Entries of a 3-D neighbourhood by the name that `SwinUNETR.merging` takes. In 2-D all have Swin's order."""
_CORNERS_2D = ((0, 0), (1, 0), (0, 1), (1, 1))


def instance_norm(
    x: Float[Array, "*axes features"], rank: int, *, epsilon: float = 1e-5
) -> Float[Array, "*axes features"]:
    """Return each feature map of each sample with mean 0 and variance 1 over its `rank` spatial axes.

    Statistics are in float32 or better; there are no parameters.

    Raises:
      ValueError: if `x` has too few axes or its map has a single entry, of which nothing would be left.
    """
    _, size, _ = split_shape(x.shape, rank)
    if math.prod(size) < 2:
        raise ValueError(
            f"a map of spatial size {size} must have two entries at least for its instance norm to leave anything; "
            "pass a larger input or take fewer stages"
        )
    wide = x.astype(at_least_float32(x.dtype))
    space = tuple(range(-1 - rank, -1))
    centred = wide - jnp.mean(wide, space, keepdims=True)
    variance = jnp.mean(jnp.square(centred), space, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


class UNetResBlock(nn.Module):
    """Convolve a map twice, with instance norms, and add it to the result.

    out = act(IN(K_2 * act(IN(K_1 * x))) + skip(x)), with skip(x) = x, or IN(x W) where the width changes. IN norms each
    feature map of a sample over space, without parameters; no convolution has a bias.

    Symmetry:
      Exactly equivariant to translations, but for the zeros around the map and the statistics over all of it; exactly
      unchanged by an affine change of all of a sample's input with positive factor, if the width changes and nothing
      is near the border.

    Attributes:
      features: width of the output.
      kernel_size: size of both kernels; its length says how many spatial axes there are (1 to 3).
      activation_fn: the nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters. Statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.

    Cost:
      pixels(kernel) (C_in + C) C multiply-accumulates an entry, and C_in C where the width changes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.swin_unetr import UNetResBlock
      >>> block = UNetResBlock(features=4, kernel_size=(3, 3, 3))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 6, 5, 4, 2)))[0].shape
      (1, 6, 5, 4, 4)

    Source:
      Hatamizadeh et al., Swin UNETR, BrainLes 2021, section 3.2; Isensee et al., Automated Design of Deep Learning
      Methods for Biomedical Image Segmentation, 2019; github.com/Project-MONAI/MONAI (`UnetResBlock`).

    Differs:
      none from MONAI's, whose names the parameters could bear but for the matrix of the skip.
    """

    features: int
    kernel_size: tuple[int, ...] = (3, 3, 3)
    activation_fn: ActivationFn = leaky_relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*axes channels"]) -> Float[Array, "*axes features"]:
        """Apply the block.

        Args:
          x: map `[*batch, *space, channels]`.

        Returns:
          A map of the same size.

        Raises:
          ValueError: if a field does not fit, `x` has too few axes, or its map has a single entry.
        """
        rank = len(self.kernel_size)
        if self.features < 1 or rank not in axes.SPACE or min(self.kernel_size) < 1:
            raise ValueError(
                f"features={self.features} and the 1 to 3 entries of kernel_size={self.kernel_size} must be positive; "
                "set them"
            )
        split_shape(x.shape, rank)
        common: dict[str, Any] = {
            "use_bias": False,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }
        y = nn.Conv(self.features, self.kernel_size, name="convolution1", **common)(x)
        y = axes.constrain_map(self.activation_fn(instance_norm(y, rank)), rank)
        y = instance_norm(nn.Conv(self.features, self.kernel_size, name="convolution2", **common)(y), rank)
        if x.shape[-1] != self.features:
            x = instance_norm(nn.Dense(self.features, name="shortcut", **common)(x), rank)
        return axes.constrain_map(self.activation_fn(y + x), rank)


class SwinUNETR(nn.Module):
    """Label every voxel of a volume, or pixel of an image: windowed attention at five resolutions, a U-Net's decoder.

    h_0 = embed(x), and h_s = merge(blocks(h_(s-1))) has half the size and twice the width, every second block with its
    windows shifted by half. What leaves the encoder is LN(h_s), without parameters. The input and all levels but the
    last two pass a `UNetResBlock`, the last one as well; the decoder then goes up level by level: a transposed
    convolution whose stride is its kernel, the skip beside it, a `UNetResBlock`. A linear layer gives the logits.

    Symmetry:
      None exactly: patches, windows, padding and the instance norms' statistics are tied to the grid and its border.

    Attributes:
      num_classes: number of logits of a voxel; 0 leaves the last layer out. Regions that overlap (nested tumours) are
        logits of their own for a sigmoid.
      patch_size: size of a patch, an int or one entry for each spatial axis.
      embed_dim: width C of the first level; level s has C 2^s.
      depths: number of blocks of each stage; any number of stages, and one level more.
      num_heads: number of heads of each stage.
      window_size: size of the windows; its length says how many spatial axes there are (2 or 3).
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      merging: which entries of a neighbourhood are merged, a name of `MERGINGS`. Published weights want "repeated",
        those trained with MONAI 1.5 or newer "complete", and "ordered" is MONAI's "mergingv2".
      stage_convolutions: a `UNetResBlock` before the blocks of each stage, as in Swin UNETR version 2.
      table_prefix: where a window is clipped to a small map, number its tokens as if they were the first ones of a
        whole window when reading the position bias. That gives offsets which are not those between the tokens, but it
        is what MONAI does and so what its weights are trained with; False reads true offsets, as `SwinBlock` does.
      dropout_rate: dropout after the patch embedding, the attention and in the MLPs, in [0, 1).
      attention_dropout_rate: dropout of the attention weights, in [0, 1).
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      mask_padding: keep tokens from attending to padding, on maps that are not multiples of the window.
      remat: what the backward pass computes anew, a name of `core.remat.POLICIES`: "attention" the scores and softmax,
        "full" (or True) each attention and each convolution block, "none" (or False) nothing.
      norm: makes a norm of the encoder, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the encoder's kernels; convolutions and patch embedding start with variance
        1 / fan-in.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0. One parameter tree serves every size.

    Cost:
      Linear in the number of voxels. C = 48 at 96^3: 62.2 M parameters; the decoder's and the skips' convolutions are
      most of the multiply-accumulates. There the backward pass keeps 7.7 GiB in float32, 0.84 GiB with blocks
      recomputed ("full"), and besides what one block needs; docs/plan.md has what a TPU needs.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window.swin_unetr import SwinUNETR
      >>> model = SwinUNETR(num_classes=3, embed_dim=12, depths=(2, 2), num_heads=(3, 6), window_size=(4, 4, 4))
      >>> x = jnp.ones((1, 20, 16, 18, 1))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
      >>> levels = jax.eval_shape(nn.apply(SwinUNETR.features, model), variables, x)
      >>> logits.shape, [level.array.shape[1:] for level in levels]
      ((1, 20, 16, 18, 3), [(10, 8, 9, 12), (5, 4, 5, 24), (3, 2, 3, 48)])

    Source:
      Hatamizadeh et al., Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images,
      BrainLes 2021; He et al., SwinUNETR-V2, MICCAI 2023 (`stage_convolutions`); github.com/Project-MONAI/MONAI, whose
      code was read, the papers were not.

    Differs:
      Any size: each level is padded with zeros at its ends to a multiple of two and the decoder's maps are cropped to
      the skips' size; MONAI refuses sizes that are not multiples of the coarsest stride (for multiples nothing is
      padded). An input whose coarsest map would have a single entry is refused, as there. Any number of stages instead
      of four. A transposed convolution is a matrix product, its kernel stored as a matrix. Masked logits are excluded
      exactly instead of lowered by 100.
    """

    num_classes: int = 14
    patch_size: int | tuple[int, ...] = 2
    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: tuple[int, ...] = (7, 7, 7)
    mlp_ratio: float = 4.0
    merging: str = "repeated"
    stage_convolutions: bool = False
    table_prefix: bool = True
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    mask_padding: bool = False
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        rank, levels = len(self.window_size), len(self.depths)
        if rank not in (2, 3):
            raise ValueError(f"window_size={self.window_size} must have 2 or 3 entries; set window_size")
        if levels != len(self.num_heads) or not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths={self.depths} and num_heads={self.num_heads} must have one positive entry a stage; set both"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no logits)")
        if self.merging not in MERGINGS:
            raise ValueError(f"merging={self.merging!r} must be one of {list(MERGINGS)}; set merging")
        patch = _tuple(self.patch_size, rank)
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        convolve = functools.partial(UNetResBlock, kernel_size=(3,) * rank, **dtypes)
        self.patch_embed = PatchEmbed(self.embed_dim, patch_size=patch, bias_init=self.bias_init, **dtypes)
        self.dropout = nn.Dropout(self.dropout_rate)
        self.level_norm = nn.LayerNorm(epsilon=1e-5, use_bias=False, use_scale=False, **dtypes)
        self.stages = [
            _Stage(
                convolution=functools.partial(convolve, self.embed_dim * 2**stage) if self.stage_convolutions else None,
                block=functools.partial(
                    _make_block,
                    window_size=tuple(self.window_size),
                    num_heads=heads,
                    mlp_ratio=self.mlp_ratio,
                    dropout_rate=self.dropout_rate,
                    attention_dropout_rate=self.attention_dropout_rate,
                    mask_padding=self.mask_padding,
                    norm=self.norm,
                    **dtypes,
                    **init,
                ),
                merge=functools.partial(
                    _Merging,
                    corners=_CORNERS_2D if rank == 2 else MERGINGS[self.merging],
                    norm=self.norm,
                    kernel_init=self.kernel_init,
                    **dtypes,
                ),
                rates=rates[sum(self.depths[:stage]) :][:depth],
                prefixed=tuple(self.window_size) if self.table_prefix else (),
                remat=self.remat,
            )
            for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True))
        ]
        # The input is a level before those of the encoder; the last but one reaches the decoder as it is.
        widths = [self.embed_dim, *(self.embed_dim * 2**level for level in range(levels + 1))]
        self.skips = [convolve(width) for width in widths[:levels]]
        self.bottleneck = convolve(widths[-1])
        self.ups = [
            _Up(block=functools.partial(convolve, width), stride=(2,) * rank if level else patch, remat=self.remat)
            for level, width in enumerate(widths[:-1])
        ]
        self.head = nn.Dense(self.num_classes, bias_init=self.bias_init, **dtypes) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*axes channels"], *, deterministic: bool = True
    ) -> Float[Array, "*axes classes"]:
        """Label every voxel.

        Args:
          x: volumes `[*batch, depth, height, width, channels]`, or images, of any size of which the coarsest level has
            two entries at least, scaled as the weights want them.
          deterministic: no dropout, no dropped branches.

        Returns:
          Logits `[*batch, *space, num_classes]`, or with `num_classes=0` the decoder's features.

        Raises:
          ValueError: if `x` has too few axes, too small a size, other channels than the parameters, or is not of
            floating point, or a field does not fit.
        """
        levels = [level.array for level in self.features(x, deterministic=deterministic)]

        def convolve(block: nn.Module, x: Array) -> Array:
            return block(x)

        # "attention" has nothing to do in a convolution.
        convolve = remat.remat_block(convolve, self.remat)
        skips = [convolve(block, array) for block, array in zip(self.skips, (x, *levels), strict=False)]
        y = convolve(self.bottleneck, levels[-1])
        for up, skip in zip(reversed(self.ups), reversed((*skips, levels[-2])), strict=True):
            y = up(y, skip)
        return y if self.head is None else self.head(y)

    def features(self, x: Float[Array, "*axes channels"], *, deterministic: bool = True) -> tuple[Level, ...]:
        """Return the normed maps that leave the encoder, finest first: the embedded patches, then each stage's.

        Args:
          x: volumes or images, see `__call__`.
          deterministic: no dropout, no dropped branches.

        Returns:
          One level more than stages, of stride `patch_size * 2**level` and width `embed_dim * 2**level`.
        """
        rank = len(self.window_size)
        patch = _tuple(self.patch_size, rank)
        self._check_input(x, patch)
        y = axes.constrain_map(self.dropout(self.patch_embed(x), deterministic=deterministic), rank)
        levels = [Level(self.level_norm(y), patch)]
        for stage in self.stages:
            y = stage(y, deterministic=deterministic)
            levels.append(Level(self.level_norm(y), tuple(2 * length for length in levels[-1].stride)))
        return tuple(levels)

    def _check_input(self, x: Array, patch: tuple[int, ...]) -> None:
        """Refuse what would fail far inside, or leave nothing of the coarsest level."""
        _, size, channels = split_shape(x.shape, len(patch))
        stride = tuple(length * 2 ** len(self.depths) for length in patch)
        if all(length <= step for length, step in zip(size, stride, strict=True)):
            raise ValueError(
                f"input of spatial size {size} must be longer than the coarsest stride {stride} along one axis at "
                "least; pad it, or set fewer depths"
            )
        held = self.variables.get("params", {}).get("patch_embed", {}).get("projection", {}).get("kernel")
        if held is not None and held.shape[0] != math.prod(patch) * channels:
            raise ValueError(
                f"input with {channels} channels must have the {held.shape[0] // math.prod(patch)} of the parameters; "
                "pass such an input or initialise anew"
            )


class _Stage(nn.Module):
    """A convolution block if wanted, a chain of blocks of which every second is shifted, and a merging.

    Attributes:
      convolution: makes the convolution block; `None` = none.
      block: makes a block, see `_make_block`.
      merge: makes the merging.
      rates: drop-path rate of each block.
      prefixed: the window whose clipped forms take the first rows of the position table; empty = none do.
      remat: what of each block is recomputed in the backward pass.
    """

    convolution: Callable[..., nn.Module] | None
    block: Callable[..., nn.Module]
    merge: Callable[..., nn.Module]
    rates: tuple[float, ...]
    prefixed: tuple[int, ...]
    remat: str | bool

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        def convolve(block: nn.Module, x: Array) -> Array:
            return block(x)

        def attend(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        if self.convolution is not None:
            x = remat.remat_block(convolve, self.remat)(self.convolution(name="convolution"), x)
        _, size, _ = split_shape(x.shape, len(self.prefixed))
        clipped = any(length < step for length, step in zip(size, self.prefixed, strict=True))
        for index, rate in enumerate(self.rates):
            block = self.block(clipped=clipped, shifted=index % 2 == 1, drop_path_rate=rate, name=f"blocks_{index}")
            x = remat.remat_block(attend, self.remat)(block, x)
        return self.merge(name="merge")(x)


def _make_block(*, window_size: tuple[int, ...], shifted: bool, clipped: bool, **fields: Any) -> nn.Module:
    """Return a block with its window shifted by half or not, one that reads tables as MONAI does where clipped."""
    shift = tuple(length // 2 if shifted else 0 for length in window_size)
    return (_PrefixBlock if clipped else SwinBlock)(window_size=window_size, shift_size=shift, **fields)


class _PrefixBlock(nn.Module):
    """A `SwinBlock`, with its fields and parameters, whose clipped window reads the position table as MONAI does.

    Token k of a clipped window takes the place of token k of the whole one. So what is attended within is the smallest
    box of the window's first rows that has as many tokens; those that are left over at its end are masked.
    """

    num_heads: int
    window_size: tuple[int, ...]
    shift_size: tuple[int, ...]
    mlp_ratio: float
    dropout_rate: float
    attention_dropout_rate: float
    drop_path_rate: float
    mask_padding: bool
    norm: Callable[..., Any]
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        rank = len(self.window_size)
        batch, size, features = split_shape(x.shape, rank)
        window, amount = fit_window(size, self.window_size, self.shift_size)
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=len(batch))
        tokens, row = math.prod(window), math.prod(self.window_size[1:])
        box = (-(-tokens // row), *self.window_size[1:])
        idle = math.prod(box) - tokens

        split = map_split(x.shape, window)
        y = cut_windows(norm(name="norm1")(x), window, amount, split)
        mask = window_mask(size, window, amount, split, mask_padding=self.mask_padding)
        if idle:
            y = jnp.pad(y, [(0, 0)] * (y.ndim - 2) + [(0, idle), (0, 0)])
            mask = jnp.ones((tokens, tokens), bool) if mask is None else mask
            mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(0, idle), (0, 0)], constant_values=True)
            mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, idle)])
        y = WindowAttention(
            self.num_heads,
            window_size=self.window_size,
            attention_dropout_rate=self.attention_dropout_rate,
            name="attention",
            **common,
        )(y, mask, window=box, names=window_names(split), deterministic=deterministic)
        y = join_windows(y[..., :tokens, :], size, window, amount, split)
        y = nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)
        x = axes.constrain_map(x + drop_path(y, deterministic=deterministic), rank)

        y = FeedForward(int(features * self.mlp_ratio), dropout_rate=self.dropout_rate, name="feed_forward", **common)(
            norm(name="norm2")(x), deterministic=deterministic
        )
        return axes.constrain_map(x + drop_path(y, deterministic=deterministic), rank)


class _Merging(nn.Module):
    """Halve a map: put entries of each neighbourhood into the features, norm them, and reduce them linearly to twice.

    Attributes:
      corners: which entries, in their order.
      norm: makes the norm.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the reduction.
    """

    corners: tuple[tuple[int, ...], ...]
    norm: Callable[..., Any]
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rank, features = len(self.corners[0]), x.shape[-1]
        x = to_blocks(pad_to_multiple(x, (2,) * rank), (2,) * rank)
        x = jnp.concatenate([x[(..., *corner, slice(None))] for corner in self.corners], axis=-1)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = self.norm(name="pre_norm", **dtypes)(x)
        x = nn.Dense(2 * features, use_bias=False, kernel_init=self.kernel_init, name="reduction", **dtypes)(x)
        return axes.constrain_map(x, rank)


class _Up(nn.Module):
    """Enlarge a map by a transposed convolution whose stride is its kernel, put the skip beside it, and convolve.

    Attributes:
      block: makes the convolution block.
      stride: of the transposed convolution.
      remat: whether the block is recomputed in the backward pass.
    """

    block: Callable[..., UNetResBlock]
    stride: tuple[int, ...]
    remat: str | bool

    @nn.compact
    def __call__(self, x: Array, skip: Array) -> Array:
        block = self.block(name="block")

        def convolve(block: nn.Module, *parts: Array) -> Array:
            return block(jnp.concatenate(parts, axis=-1))

        x = nn.Dense(
            math.prod(self.stride) * block.features,
            use_bias=False,
            dtype=block.dtype,
            param_dtype=block.param_dtype,
            kernel_init=block.kernel_init,
            name="upsample",
        )(x)
        x = crop(from_patches(x, self.stride), skip.shape[-1 - len(self.stride) : -1])
        return remat.remat_block(convolve, self.remat)(block, x, skip)


def _tuple(size: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    found = (size,) * rank if isinstance(size, int) else tuple(size)
    if len(found) != rank:
        raise ValueError(f"patch_size={size} must be an int or have the {rank} entries of window_size; set patch_size")
    return found


# Reference checkpoints ------------------------------------------------------------------------------------------------


def _convolutions(ours: str, theirs: str) -> dict[str, str]:
    """Return the names of a block of convolutions."""
    names = {"convolution1": "conv1", "convolution2": "conv2", "shortcut": "conv3"}
    return {f"{ours}/{mine}": f"{theirs}.{name}.conv" for mine, name in names.items()}


_STAGE = "swinViT.layers.{stage}"
# See `jaxlayers.core.reference`; numbers as `from_reference` has counted them down.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "monai": {
        "patch_embed/projection": "swinViT.patch_embed.proj",
        **_convolutions("stages/convolution", _STAGE + "c.0.layer"),
        **{
            f"stages/blocks/{mine}": f"{_STAGE}.0.blocks.{{block}}.{name}"
            for mine, name in {
                "norm1": "norm1",
                "attention": "attn",
                "attention/query": "attn.query",
                "attention/key": "attn.key",
                "attention/value": "attn.value",
                "attention/out": "attn.proj",
                "norm2": "norm2",
                "feed_forward/up": "mlp.linear1",
                "feed_forward/down": "mlp.linear2",
            }.items()
        },
        "stages/merge/pre_norm": f"{_STAGE}.0.downsample.norm",
        "stages/merge/reduction": f"{_STAGE}.0.downsample.reduction",
        **_convolutions("skips", "encoder.{skip}.layer"),
        **_convolutions("bottleneck", "encoder10.layer"),
        "ups/upsample": "decoder.{up}.transp_conv.conv",
        **_convolutions("ups/block", "decoder.{up}.conv_block"),
        "head": "out.conv.conv",
    }
}
# MONAI counts these from 1 and has no dot before the number.
_COUNTED = re.compile(r"^(swinViT\.layers|encoder|decoder)([1-9])(?!\d)")


def from_reference(tensors: Mapping[str, Any], model: SwinUNETR, *, source: str = "monai") -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for, of four stages.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    ours = {}
    for name, tensor in reference.split_fused(tensors).items():
        counted = _COUNTED.sub(lambda found: f"{found[1]}.{int(found[2]) - 1}", name)
        ours[counted] = _as_matrix(np.asarray(tensor)) if ".transp_conv." in name else tensor
    table, channels = reference.choose_table(REFERENCE_NAMES, source, ours, "patch_embed/projection/kernel")
    stride = [length * 2 ** len(model.depths) for length in _tuple(model.patch_size, len(model.window_size))]
    volume = jax.ShapeDtypeStruct((1, *(2 * length for length in stride), channels), jnp.float32)
    wanted = dialects.shapes_of(model, (volume,))["params"]
    return reference.read_reference(ours, wanted, table, ignored=("relative_position_index",))


def _as_matrix(kernel: np.ndarray) -> np.ndarray:
    """Return a transposed convolution's kernel [in, out, *stride] as that of a linear layer [stride x out, in]."""
    return np.moveaxis(kernel, (0, 1), (-1, -2)).reshape(-1, len(kernel))


def reference_inputs(model: SwinUNETR) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    stride = [length * 2 ** len(model.depths) for length in _tuple(model.patch_size, len(model.window_size))]
    return (jax.ShapeDtypeStruct((1, *(2 * length for length in stride), 1), jnp.float32),)


def _their_point(model: SwinUNETR, ours: tuple[int, ...]) -> tuple[int, ...]:
    return dialects.pointwise(len(model.window_size))(model, ours)


def _their_patches(model: SwinUNETR, ours: tuple[int, ...]) -> tuple[int, ...]:
    return dialects.patches(rank=len(model.window_size))(model, ours)


def _their_upsampling(model: SwinUNETR, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a transposed convolution [in, out, *stride], whose stride is always 2 there."""
    stride = (2,) * len(model.window_size)
    return (ours[0], ours[1] // math.prod(stride), *stride)


DIALECTS = (
    dialects.Dialect(
        name="monai",
        origin="MONAI",
        module=SwinUNETR,
        read=dialects.from_params(from_reference, source="monai"),
        marks=(r"^swinViT\.layers1\.0\.blocks\.0\.attn\.qkv\.", r"^decoder1\.transp_conv\.conv\.weight$"),
        ignored=swin.COMPUTED,
        layout=dialects.table_layout(
            REFERENCE_NAMES["monai"],
            shapes={
                "patch_embed/projection/kernel": _their_patches,
                "shortcut/kernel": _their_point,
                "head/kernel": _their_point,
                "upsample/kernel": _their_upsampling,
            },
            fused=dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
            rename=lambda name: re.sub(
                r"^(swinViT\.layers|encoder|decoder)\.(\d)", lambda found: f"{found[1]}{int(found[2]) + 1}", name
            ),
        ),
        # No first kernel is named, since three of them meet the volume.
        head="out.conv.conv.weight",
    ),
)


def _variant(size: int, channels: int, num_classes: int, rank: int = 3, **fields: Any) -> dict[str, Any]:
    return {
        "module": SwinUNETR,
        "inputs": (jax.ShapeDtypeStruct((1, *(size,) * rank, channels), jnp.float32),),
        "num_classes": num_classes,
        "window_size": (7,) * rank,
        **fields,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "swin_unetr_btcv": _variant(96, 1, 14),
    "swin_unetr_brats": _variant(128, 4, 3),
    "swin_unetr_small": _variant(96, 1, 14, embed_dim=24),
    "swin_unetr_v2": _variant(96, 1, 14, stage_convolutions=True),
    "swin_unetr_2d": _variant(96, 1, 14, rank=2, embed_dim=24),
}
