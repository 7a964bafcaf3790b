"""Att-SwinU-Net: a U of shifted-window blocks that labels pixels, with attention where encoder and decoder meet.

Longer than most files, since the kinds of skips, the decoder and the names of the public code belong to one paper.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.nn.window_maps import cut_windows, join_windows
from jaxlayers.ops.halo import map_split, window_mask, window_names
from jaxlayers.ops.patches import crop, from_patches, split_shape
from jaxlayers.ops.windows import fit_window, relative_position_bias
from jaxlayers.window import swin
from jaxlayers.window.swin import PatchMerging, SwinBlock

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)

SKIPS: Mapping[str, str] = {
    "concatenation": "maps of encoder and decoder are concatenated and reduced linearly, as in Swin-UNet",
    "spatial": "besides, blocks of the decoder add the attention weights of the encoder's to their own",
    "cross_contextual": "besides, each map first learns from a summary token what the other holds",
    "both": "spatial and cross_contextual",
}
"""What `AttSwinUNet.skip` may be, in words."""


class PatchExpanding(nn.Module):
    """Enlarge a map: widen it linearly, lay the features out as pixels, and norm them.

    out[f i + a, f j + b] = norm((x[i, j] W)[a, b]), with W `[C, f f out]` without bias and 0 <= a, b < f: the pixels
    that a token becomes stand in W row by row. The counterpart of `PatchMerging`, whose size and width it inverts.

    Symmetry:
      Exactly equivariant: a translation of the input by one entry moves the output by f.

    Attributes:
      features: width of the output; `None` halves that of the input.
      factor: f, an int or one for (height, width).
      norm: makes the norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. The norm's statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W.

    Cost:
      C x f^2 x out multiply-accumulates an entry of the input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.att_swin_unet import PatchExpanding
      >>> jax.eval_shape(PatchExpanding().init_with_output, jax.random.key(0), jnp.ones((1, 3, 5, 8)))[0].shape
      (1, 6, 10, 4)

    Source:
      Cao et al., Swin-Unet: Unet-like Pure Transformer for Medical Image Segmentation, ECCV 2022 workshops;
      github.com/NITR098/AttSwinUNet, whose order of the pixels it keeps. The code was read, not the paper.

    Differs:
      One layer for what the code has as two, `PatchExpand` (factor 2) and `FinalPatchExpand_X4` (factor 4, as wide).
    """

    features: int | None = None
    factor: int | tuple[int, ...] = 2
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"]
    ) -> Float[Array, "*batch new_height new_width out"]:
        """Enlarge the map.

        Args:
          x: map with two spatial axes; further ones count as batch.

        Returns:
          The map, `factor` times as high and wide.

        Raises:
          ValueError: if `x` has fewer than three axes, its features cannot be halved, or a field is not positive.
        """
        _, _, width = split_shape(x.shape, 2)
        factor = _pair(self.factor, "factor")
        if self.features is None and width % 2:
            raise ValueError(f"features={width} of the input must be even to be halved; set features")
        features = width // 2 if self.features is None else self.features
        if features < 1:
            raise ValueError(f"features={self.features} must be positive; set features or leave it None")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = nn.Dense(
            math.prod(factor) * features, use_bias=False, kernel_init=self.kernel_init, name="expand", **dtypes
        )
        x = from_patches(dense(x), factor)
        return axes.constrain_map(self.norm(name="post_norm", **dtypes)(x), 2)


class CrossContextualAttention(nn.Module):
    """Let two maps learn from each other what they hold in all, by one summary token each.

    With c = mean(x), and likewise c' = mean(y): c <- c + MHA(norm(c); [norm(c), y]) and
    c' <- c' + MHA'(norm(c'); [norm(c'), x]), `depth` times; out = x + (c - mean(x)), y + (c' - mean(y)). A summary
    asks, itself and all tokens of the other map answer, and what it has learnt is added to every token of its own map.

    Symmetry:
      Exactly equivariant to permutations of the tokens of each map.

    Attributes:
      num_heads: number of heads.
      head_dim: width of a head; heads times this need not be the width of the maps.
      depth: number of times that the summaries ask.
      first_token: the summary takes the place of the map's first token instead, which then does not answer either: what
        the public code does.
      dropout_rate: dropout of the attention's weights and output, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`.

    Cost:
      With I = num_heads head_dim, for each direction and time 2 n C I + 2 n I + 4 C I multiply-accumulates for maps of
      n tokens of width C: linear in tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.att_swin_unet import CrossContextualAttention
      >>> layer, maps = CrossContextualAttention(num_heads=2, head_dim=4), (jnp.ones((1, 5, 4, 6)),) * 2
      >>> [each.shape for each in jax.eval_shape(layer.init_with_output, jax.random.key(0), *maps)[0]]
      [(1, 5, 4, 6), (1, 5, 4, 6)]

    Source:
      Aghdam et al., Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion Segmentation, ISBI
      2023; github.com/NITR098/AttSwinUNet. The code and the figure in its repository were read, not the paper. The
      exchange is that of Chen et al., CrossViT, ICCV 2021, without its projections and class tokens.

    Differs:
      The figure shows the summaries beside the tokens and a summation; the code overwrites the token in the upper left
      corner with the summary (`first_token=True`), so that corner is lost to the skip path. Here every token gets what
      the summary has learnt, by which a layer that has learnt nothing changes nothing.
    """

    num_heads: int = 8
    head_dim: int = 64
    depth: int = 2
    first_token: bool = False
    dropout_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch height width features"],
        y: Float[Array, "*batch height width features"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "*batch height width features"], Float[Array, "*batch height width features"]]:
        """Exchange summaries.

        Args:
          x: map of the decoder.
          y: map of the encoder, of the same shape.
          deterministic: no dropout.

        Returns:
          Maps like `x` and `y`.

        Raises:
          ValueError: if the shapes differ, or a field is not positive.
        """
        batch, size, features = split_shape(x.shape, 2)
        if x.shape != y.shape:
            raise ValueError(f"maps of decoder and encoder must have one shape; got {x.shape} and {y.shape}; crop one")
        if min(self.num_heads, self.head_dim, self.depth) < 1:
            raise ValueError(
                f"num_heads={self.num_heads}, head_dim={self.head_dim}, depth={self.depth} must be positive; set them"
            )
        maps = {"decoder": x, "encoder": y}
        tokens = {name: each.reshape(*batch, math.prod(size), features) for name, each in maps.items()}
        first = {name: jnp.mean(each, axis=-2, keepdims=True) for name, each in tokens.items()}
        answering = {name: each[..., 1:, :] if self.first_token else each for name, each in tokens.items()}
        found = {}
        for name, other in (("decoder", "encoder"), ("encoder", "decoder")):
            summary = first[name]
            for index in range(self.depth):
                summary = summary + _SummaryAttention(
                    self.num_heads,
                    self.head_dim,
                    dropout_rate=self.dropout_rate,
                    norm=self.norm,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    kernel_init=self.kernel_init,
                    bias_init=self.bias_init,
                    name=f"{name}s_{index}",
                )(summary, answering[other], deterministic=deterministic)
            if self.first_token:
                joined = jnp.concatenate([summary, answering[name].astype(summary.dtype)], axis=-2)
                found[name] = joined.reshape(*batch, *size, features)
            else:
                found[name] = maps[name] + (summary - first[name])[..., None, :]
        return axes.constrain_map(found["decoder"], 2), axes.constrain_map(found["encoder"], 2)


class _SummaryAttention(nn.Module):
    """Let one token ask itself and others, in heads whose joint width is free; only the asking token is normed."""

    num_heads: int
    head_dim: int
    dropout_rate: float
    norm: Callable[..., Any]
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, summary: Array, others: Array, *, deterministic: bool) -> Array:
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        asking = self.norm(name="pre_norm", **dtypes)(summary)
        context = jnp.concatenate([asking, others.astype(asking.dtype)], axis=-2)
        query, key, value = (
            axes.constrain_heads(
                split_heads(
                    nn.Dense(
                        self.num_heads * self.head_dim,
                        use_bias=False,
                        kernel_init=self.kernel_init,
                        name=name,
                        **dtypes,
                    )(each),
                    self.num_heads,
                )
            )
            for name, each in (("query", asking), ("key", context), ("value", context))
        )

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            weights = attention_weights(jnp.matmul(query * self.head_dim**-0.5, jnp.swapaxes(key, -1, -2)))
            module.sow("intermediates", "attention_weights", weights)
            weights = nn.Dropout(self.dropout_rate)(weights, deterministic=deterministic)
            return jnp.matmul(weights, value)

        out = merge_heads(remat.attention(attend, self, query, key, value))
        out = nn.Dense(summary.shape[-1], kernel_init=self.kernel_init, bias_init=self.bias_init, name="out", **dtypes)(
            out
        )
        return nn.Dropout(self.dropout_rate)(out, deterministic=deterministic)


class SharedAttentionBlock(nn.Module):
    """Mix tokens as a Swin block does, with attention weights that another block hands on added to its own.

    z = x + drop(((softmax(Q K^T / sqrt(d) + B) + A) V) W_out), out = z + drop(MLP(norm(z))) for each window and head of
    norm(x), with A the weights of the other block, `[windows, heads, tokens, tokens]` (0 where there is none). It has
    the parameters of `SwinBlock`, and without A computes the same.

    Symmetry:
      As `SwinBlock`, if A comes from a block with the same window and shift: tokens of different windows never mix.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: the window, one entry for each spatial axis (1 to 3 of them); an int means a square of two axes.
      shift_size: the shift, like `window_size`.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      dropout_rate: dropout after the attention and in the MLP, in [0, 1).
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      mask_padding: also keep true tokens from attending to padding.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      As `SwinBlock`; the weights that are handed on are kept, heads x M^2 numbers a token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.att_swin_unet import SharedAttentionBlock
      >>> block = SharedAttentionBlock(num_heads=2, window_size=4)
      >>> x, weights = jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 8, 6, 8)))[0]
      >>> x.shape, weights.shape
      ((1, 8, 6, 8), (1, 4, 2, 16, 16))

    Source:
      Aghdam et al., Attention Swin U-Net, ISBI 2023, as drawn in the figure of github.com/NITR098/AttSwinUNet. The code
      and the figure were read, not the paper.

    Differs:
      In the code the sum is made after the weights were used and its result is thrown away, so its outputs are those of
      plain blocks, to the bit; here it weighs the values, as the figure shows (each row then sums to two).
    """

    num_heads: int
    window_size: int | tuple[int, ...] = 7
    shift_size: int | tuple[int, ...] = 0
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    mask_padding: bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*axes features"],
        shared: Float[Array, "..."] | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "*axes features"], Float[Array, "..."]]:
        """Apply the block.

        Args:
          x: map `[*batch, *space, features]`.
          shared: A, what a block of the same heads, window and shift returned for a map of the same size.
          deterministic: no dropout, no dropped branches.

        Returns:
          A map like `x`, and the block's own weights, without A.

        Raises:
          ValueError: if `x` has too few axes, a field does not fit the features or the window, or A has another shape
            than the block's own weights.
        """
        full = (self.window_size,) * 2 if isinstance(self.window_size, int) else tuple(self.window_size)
        amount = (self.shift_size,) * len(full) if isinstance(self.shift_size, int) else tuple(self.shift_size)
        if len(full) not in axes.SPACE or len(amount) != len(full):
            raise ValueError(
                f"window_size={self.window_size} and shift_size={self.shift_size} must name 1 to 3 axes, equally many; "
                "set both"
            )
        batch, size, features = split_shape(x.shape, len(full))
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        window, amount = fit_window(size, full, amount)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        drop_path = DropPath(self.drop_path_rate, batch_ndim=len(batch))

        split = map_split(x.shape, window)
        y = cut_windows(self.norm(name="norm1", **dtypes)(x), window, amount, split)
        mask = window_mask(size, window, amount, split, mask_padding=self.mask_padding)
        y, weights = _SharedWindowAttention(self.num_heads, full, name="attention", **common)(
            y, mask, shared, window=window, names=window_names(split)
        )
        y = nn.Dropout(self.dropout_rate)(join_windows(y, size, window, amount, split), deterministic=deterministic)
        x = axes.constrain_map(x + drop_path(y, deterministic=deterministic), len(full))
        y = FeedForward(int(features * self.mlp_ratio), dropout_rate=self.dropout_rate, name="feed_forward", **common)(
            self.norm(name="norm2", **dtypes)(x), deterministic=deterministic
        )
        return axes.constrain_map(x + drop_path(y, deterministic=deterministic), len(full)), weights


class _SharedWindowAttention(nn.Module):
    """`WindowAttention` that adds weights to its own before they weigh the values, and returns its own."""

    num_heads: int
    window_size: tuple[int, ...]
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, shared: Array | None, *, window: tuple[int, ...], names: tuple[str, ...]
    ) -> tuple[Array, Array]:
        features = x.shape[-1]
        dense = functools.partial(
            nn.Dense,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        query, key, value = (
            axes.constrain_heads(split_heads(dense(name=name)(x), self.num_heads), *names)
            for name in ("query", "key", "value")
        )
        rows = math.prod(2 * length - 1 for length in self.window_size)
        shape, size = (rows, self.num_heads), f"window_size={self.window_size}"
        table = learned_table(
            self, "relative_position_bias_table", truncated_normal(), shape, self.param_dtype, size=size
        )
        bias = relative_position_bias(table, window, self.window_size).astype(at_least_float32(query.dtype))
        bias = axes.constrain(bias, axes.HEADS, None, None)
        expected = (*query.shape[:-1], query.shape[-2])
        if shared is not None and shared.shape != expected:
            raise ValueError(
                f"shared weights of shape {shared.shape} must have the block's own, {expected}; pass those of a block "
                "with the same heads and window, for a map of the same size"
            )

        def attend(
            module: nn.Module, query: Array, key: Array, value: Array, bias: Array, shared: Array | None
        ) -> tuple[Array, Array]:
            logits = jnp.matmul(query * (features // self.num_heads) ** -0.5, jnp.swapaxes(key, -1, -2))
            if mask is not None:
                # As `WindowAttention`: half the lowest number cannot overflow in the sum.
                logits = logits + jnp.where(mask[..., None, :, :], 0.0, 0.5 * jnp.finfo(query.dtype).min).astype(
                    logits.dtype
                )
            weights = attention_weights(logits, bias=bias)
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights if shared is None else weights + shared.astype(weights.dtype), value), weights

        context, weights = remat.attention(attend, self, query, key, value, bias, shared)
        return dense(name="out")(merge_heads(axes.constrain_heads(context, *names))), weights


class AttSwinUNet(nn.Module):
    """Label every pixel by a U of shifted-window blocks whose two sides meet by attention.

    Encoder: patches are embedded, stage s has `depths[s]` Swin blocks on maps of width C 2^s, with `PatchMerging`
    between stages; its last map is normed. Decoder, from the last stage up: `PatchExpanding`, then with the map x of
    the decoder and y that the encoder had before stage s, x <- [x', y'] W + b, where (x', y') is
    `CrossContextualAttention` of the two, and `depths[s]` `SharedAttentionBlock`s, which add the attention weights of
    stage s of the encoder to their own. At the end the map is expanded to pixels and mapped to logits. `skip` says
    which of the two attentions there are; without any this is Swin-UNet.

    Symmetry:
      None exactly: patches, windows and padding are tied to the grid.

    Attributes:
      num_classes: number of logits of a pixel.
      patch_size: size of a patch, an int or (height, width).
      embed_dim: width C of the first stage.
      depths: number of blocks of each stage, at least two stages; the decoder has as many, without the last stage's.
      num_heads: number of heads of each stage.
      window_size: the window, an int or (height, width). Clipped where a map is smaller, see `SwinBlock`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      skip: how the two sides meet, a name of `SKIPS`.
      cross_attention: makes the exchange of two maps, called as `cross_attention(dropout_rate=..., norm=..., dtype=...,
        param_dtype=..., kernel_init=..., bias_init=..., name=...)`.
      dropout_rate: dropout after the patch embedding, the attentions and in the MLPs, in [0, 1).
      drop_path_rate: probability of dropping a residual branch of the last stage's last block; grows linearly from 0 at
        the encoder's first, and the decoder's stages have the rates of the encoder's.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except that of the patch embedding.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      Linear in the number of pixels. With the default fields and 9 classes, 46.9 M parameters (41.4 M without
      cross-contextual attention).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.att_swin_unet import AttSwinUNet
      >>> model = AttSwinUNet(num_classes=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 41, 3)))[0].shape
      (1, 30, 41, 2)

    Source:
      Aghdam et al., Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion Segmentation, ISBI 2023;
      github.com/NITR098/AttSwinUNet; Cao et al., Swin-Unet, ECCV 2022 workshops. Code and figure were read, not the
      papers.

    Differs:
      The default is the figure's model, with both attentions at all skips (as the code's published commands ask for).
      What the code computes under these commands is `skip="cross_contextual"` with
      `cross_attention=partial(CrossContextualAttention, first_token=True)`: see the parts for why. Its mode "swin" with
      spatial attention concatenates the encoder's map twice, by the same weights; here once. A block of the decoder
      gets the weights of the encoder's last block with the same shift, so that windows agree; the code hands those of
      the last block to all. Images of any size: what is padded is masked in attention and cropped from the logits; the
      code takes one size. Parameters that the code makes and never uses (a patch embedding, a norm) are left out.
    """

    num_classes: int = 2
    patch_size: int | tuple[int, ...] = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, ...] = 7
    mlp_ratio: float = 4.0
    skip: str = "both"
    cross_attention: Callable[..., Any] = CrossContextualAttention
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.1
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch height width classes"]:
        """Label the pixels.

        Args:
          x: images of any size, channels last.
          deterministic: no dropout, no dropped branches.

        Returns:
          Logits of each pixel.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        stages = len(self.depths)
        if stages < 2 or len(self.num_heads) != stages or min(self.depths) < 1:
            raise ValueError(
                f"depths={self.depths} and num_heads={self.num_heads} must have one positive entry for each stage, "
                "and at least two stages; set both"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be positive; set num_classes")
        if self.skip not in SKIPS:
            raise ValueError(f"skip={self.skip!r} must be one of {list(SKIPS)}; set skip")
        _, size, _ = split_shape(x.shape, 2)
        patch, window = _pair(self.patch_size, "patch_size"), _pair(self.window_size, "window_size")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        expand = functools.partial(PatchExpanding, norm=self.norm, kernel_init=self.kernel_init, **dtypes)

        def blocks(stage: int, name: str) -> _Blocks:
            first = sum(self.depths[:stage])
            make = SharedAttentionBlock if self.skip in ("spatial", "both") and stage < stages - 1 else SwinBlock
            block = functools.partial(
                make,
                self.num_heads[stage],
                window_size=window,
                mlp_ratio=self.mlp_ratio,
                dropout_rate=self.dropout_rate,
                mask_padding=True,
                norm=self.norm,
                **dtypes,
                **init,
            )
            shifted = functools.partial(block, shift_size=tuple(length // 2 for length in window))
            return _Blocks(
                (block, shifted),
                rates[first : first + self.depths[stage]],
                make is not SwinBlock,
                self.remat,
                name=name,
            )

        embed = PatchEmbed(
            self.embed_dim, patch_size=patch, norm=self.norm, bias_init=self.bias_init, name="patch_embed", **dtypes
        )
        x = axes.constrain_map(nn.Dropout(self.dropout_rate)(embed(x), deterministic=deterministic), 2)
        maps, weights = [], []
        for stage in range(stages):
            if stage:
                merge = PatchMerging(norm=self.norm, kernel_init=self.kernel_init, name=f"merges_{stage - 1}", **dtypes)
                x = merge(x)
            maps.append(x)
            x, handed_on = blocks(stage, f"stages_{stage}")(x, (None, None), deterministic=deterministic)
            weights.append(handed_on)
        x = self.norm(name="encoder_norm", **dtypes)(x)

        for stage in reversed(range(stages - 1)):
            y = maps[stage]
            x = crop(expand(name=f"expands_{stage}")(x), y.shape[-3:-1])
            if self.skip in ("cross_contextual", "both"):
                cross = self.cross_attention(
                    dropout_rate=self.dropout_rate, norm=self.norm, name=f"exchanges_{stage}", **dtypes, **init
                )
                x, y = cross(x, y, deterministic=deterministic)
            joined = jnp.concatenate([x, y.astype(x.dtype)], axis=-1)
            x = nn.Dense(maps[stage].shape[-1], name=f"reductions_{stage}", **dtypes, **init)(joined)
            x, _ = blocks(stage, f"ups_{stage}")(axes.constrain_map(x, 2), weights[stage], deterministic=deterministic)
        x = self.norm(name="decoder_norm", **dtypes)(x)
        x = crop(expand(self.embed_dim, factor=patch, name="to_pixels")(x), size)
        head = nn.Dense(self.num_classes, use_bias=False, kernel_init=self.kernel_init, name="head", **dtypes)
        return axes.constrain_map(head(x), 2)


class _Blocks(nn.Module):
    """A chain of blocks, of which every second is shifted.

    Attributes:
      blocks: makes an unshifted and a shifted block.
      rates: drop-path rate of each block.
      shares: the blocks take and return attention weights.
      remat: what of each block is recomputed in the backward pass.
    """

    blocks: tuple[Callable[..., nn.Module], Callable[..., nn.Module]]
    rates: tuple[float, ...]
    shares: bool
    remat: str | bool

    @nn.compact
    def __call__(
        self, x: Array, shared: tuple[Array | None, Array | None], *, deterministic: bool
    ) -> tuple[Array, tuple[Array | None, Array | None]]:
        """Return the map, and the weights of the last unshifted and of the last shifted block."""
        last: list[Array | None] = [None, None]
        for index, rate in enumerate(self.rates):
            block = self.blocks[index % 2](drop_path_rate=rate, name=f"blocks_{index}")

            def call(block: nn.Module, x: Array, weights: Array | None) -> Any:
                if self.shares:
                    return block(x, weights, deterministic=deterministic)
                return block(x, deterministic=deterministic), None

            x, last[index % 2] = remat.remat_block(call, self.remat)(block, x, shared[index % 2])
        return x, (last[0], last[1])


def _pair(value: int | tuple[int, ...], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}={value} must be a positive int or two, (height, width); set {name}")
    return pair


# Reference checkpoints ------------------------------------------------------------------------------------------------


_PUBLISHED = {
    "patch_embed/projection": "encoder.patch_embed.proj",
    "patch_embed/post_norm": "encoder.patch_embed.norm",
    **{
        f"{ours}/blocks{our_part}": f"{theirs}.blocks.{{block}}.{their_part}"
        for ours, theirs in (("stages", "encoder.layers.{stage}"), ("ups", "decoder.level.{up}"))
        for our_part, their_part in {
            "/norm1": "norm1",
            "/norm2": "norm2",
            "/attention": "attn",
            "/attention/query": "attn.query",
            "/attention/key": "attn.key",
            "/attention/value": "attn.value",
            "/attention/out": "attn.proj",
            "/feed_forward/up": "mlp.fc1",
            "/feed_forward/down": "mlp.fc2",
        }.items()
    },
    "merges/pre_norm": "encoder.layers.{merge}.downsample.norm",
    "merges/reduction": "encoder.layers.{merge}.downsample.reduction",
    "encoder_norm": "encoder.norm",
    **{
        f"exchanges/{side}s{part}": f"decoder.Crossvit_layer.{{exchange}}.layers.{{{side}}}.{index}.fn.{theirs}"
        for index, side in enumerate(("decoder", "encoder"))
        for part, theirs in {
            "/pre_norm": "norm",
            "/query": "fn.to_q",
            "/key": "fn.key",
            "/value": "fn.value",
            "/out": "fn.to_out.0",
        }.items()
    },
    "expands/expand": "decoder.level.{expand}.expand",
    "expands/post_norm": "decoder.level.{expand}.norm",
    "reductions": "decoder.level.{reduction}.concat",
    "decoder_norm": "decoder.norm_up",
    "to_pixels/expand": "decoder.up.expand",
    "to_pixels/post_norm": "decoder.up.norm",
    "head": "decoder.output",
}
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {"published": _PUBLISHED}

# They count the decoder's layers from the coarsest, and end a layer with the expanding to the next level: what their
# names are changed to before the table applies, `level` = number of stages - the second entry - their number.
_LEVELS = (
    (re.compile(r"decoder\.layers_up\.(\d+)\.(?:upsample\.)?(?=expand|norm)"), 2, "decoder.level.{}."),
    (re.compile(r"decoder\.layers_up\.(\d+)\.(?=blocks)"), 1, "decoder.level.{}."),
    (re.compile(r"decoder\.concat_back_dim\.(\d+)\."), 1, "decoder.level.{}.concat."),
)
# Made by the public code and never used, or made by us from the shape.
_UNUSED = ("patch_embed.", "decoder.norm.")
_IGNORED = ("relative_position_index", "attn_mask")


def from_reference(tensors: Mapping[str, Any], model: AttSwinUNet, *, source: str = "published") -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    table, channels = reference.choose_table(REFERENCE_NAMES, source, tensors, "patch_embed/projection/kernel")
    image = jax.ShapeDtypeStruct((1, *_pair(model.patch_size, "patch_size"), channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))["params"]
    named = {
        _by_level(name, len(model.depths)): tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED)
    }
    named = reference.split_fused(reference.split_fused(named), "to_kv", ("key", "value"))
    return reference.read_reference(named, wanted, table, ignored=_IGNORED)


def _by_level(name: str, stages: int) -> str:
    for pattern, less, level in _LEVELS:
        if match := pattern.match(name):
            return level.format(stages - less - int(match[1])) + name[match.end() :]
    return name


def reference_inputs(model: AttSwinUNet) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the least size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *_pair(model.patch_size, "patch_size"), 3), jnp.float32),)


_level_layout = dialects.table_layout(
    _PUBLISHED,
    shapes={"patch_embed/projection/kernel": dialects.patches(), "head/kernel": dialects.pointwise()},
    fused={
        **dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
        **dict.fromkeys(("fn.key", "fn.value"), "fn.to_kv"),
    },
)


def _layout(model: AttSwinUNet, variables: Mapping[str, Any]) -> dialects.Layout:
    """Return shape by name, with the decoder's layers counted from the coarsest."""
    stages = len(model.depths)

    def counted(match: re.Match[str]) -> str:
        level, part = int(match[1]), match[2]
        if part == "concat":
            return f"decoder.concat_back_dim.{stages - 1 - level}"
        if part == "blocks":
            return f"decoder.layers_up.{stages - 1 - level}.blocks"
        # The coarsest expanding is a layer of its own.
        number = stages - 2 - level
        return f"decoder.layers_up.{number}.{'upsample.' if number else ''}{part}"

    shapes = _level_layout(model, variables)
    return {re.sub(r"^decoder\.level\.(\d+)\.(\w+)", counted, name): shape for name, shape in shapes.items()}


DIALECTS = (
    dialects.Dialect(
        name="published",
        origin="github.com/NITR098/AttSwinUNet",
        module=AttSwinUNet,
        read=dialects.from_params(from_reference, source="published"),
        marks=(
            r"^encoder\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table$",
            r"^decoder\.layers_up\.0\.expand\.weight$",
        ),
        ignored={
            **swin.COMPUTED,
            r"^patch_embed\.": "made by the public code and never called; the encoder has its own",
            r"^decoder\.norm\.": "made by the public code and never called",
        },
        layout=_layout,
        head="decoder.output.weight",
        stem="encoder.patch_embed.proj.weight",
    ),
)


def _variant(**fields: Any) -> dict[str, Any]:
    return {
        "module": AttSwinUNet,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
        "num_classes": 9,
        **fields,
    }


# The public code's configuration, as the figure has it and as the code computes it.
VARIANTS: dict[str, dict[str, Any]] = {
    "att_swin_unet": _variant(),
    "att_swin_unet_published": _variant(
        skip="cross_contextual", cross_attention=functools.partial(CrossContextualAttention, first_token=True)
    ),
}
