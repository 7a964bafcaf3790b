"""Swin Transformer: a pyramid of transformer blocks that attend within shifted windows.

Longer than most files, since layers, model, what is done to its parameters (resizing, stacking, labels) and the names
of five reference dialects belong to one paper.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import Dtype, Initializer, Params, PRNGKey
from jaxlayers.kernels import dispatch
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward, add_feed_forward
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.nn.weights import dense_weights, norm_weights, plain_norm
from jaxlayers.nn.window_maps import add_windows, cut_windows, join_windows
from jaxlayers.ops.halo import map_split, window_mask, window_names
from jaxlayers.ops.patches import pad_to_multiple, project_normed_patches, split_shape, to_patches
from jaxlayers.ops.resample import resample_patch_kernel, resample_relative_table
from jaxlayers.ops.windows import fit_window, relative_position_bias

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)

# One pair (height, width), the same along each axis, or one pair a stage.
WindowSize = int | tuple[int, ...] | tuple[tuple[int, int], ...]

_TABLE = "relative_position_bias_table"


class _Projection(nn.Module):
    """Return s x W and s b of a `flax.linen.Dense`, with its parameters, and leave adding the second to the caller.

    A kernel that adds it to what it reads also sums its gradient, which would else be a pass over all of x W; and XLA
    writes a product that nothing follows in the order of axes in which a kernel reads it, so W and b bear the scale s.
    """

    features: int
    use_bias: bool
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        if self.scale != 1:
            kernel, bias = kernel * self.scale, None if bias is None else bias * self.scale
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel, bias


class WindowAttention(nn.Module):
    """Attend within each window, with a learned bias for the offset between two tokens.

    out = softmax(Q K^T / sqrt(d) + B) V W_out, for each window and head; Q, K, V `[tokens, d]` are linear in the
    window's tokens, B[i, j] = T[p_i - p_j] is read from the table T of relative positions.

    Symmetry:
      Exactly equivariant to permutations of the windows (with their masks); tokens of different windows never mix.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: largest window, (M_1, ..., M_n) with n from 1 to 3, that T has rows for.
      use_bias: add biases to Q, K and V (the output always has one).
      attention_dropout_rate: dropout of the attention weights, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels; T always starts as a truncated normal of 0.02.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`, but for those of a kernel (`kernels.dispatch`).

    Cost:
      4 C^2 + 2 tokens C multiply-accumulates a token of width C: linear in the number of windows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import WindowAttention
      >>> layer = WindowAttention(num_heads=2, window_size=(4, 4))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 9, 16, 8)))[0].shape
      (1, 9, 16, 8)

    Source:
      Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, equation 4;
      github.com/microsoft/Swin-Transformer.

    Differs:
      Q, K and V come from three products instead of one cut in three (`from_reference` cuts the kernels), which leaves
      no tensor with an axis of 3 to transpose. Masked logits are excluded exactly instead of lowered by 100.
    """

    num_heads: int
    window_size: tuple[int, ...]
    use_bias: bool = True
    attention_dropout_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch windows tokens features"],
        mask: Bool[Array, "*#grid tokens tokens"] | None = None,
        *,
        window: tuple[int, ...] | None = None,
        norm: tuple[Array, Array, float] | None = None,
        residual: bool = False,
        factor: Float[Array, "*batch"] | None = None,
        names: tuple[str, ...] = (axes.WINDOWS,),
        deterministic: bool = True,
    ) -> Float[Array, "*batch windows tokens features"]:
        """Attend within each window.

        Args:
          x: tokens of each window in row-major order.
          mask: true where a query (second axis) may attend to a key (last axis); each query to at least one.
          window: the window in use, at most `window_size` along each axis; `None` takes `window_size`.
          norm: scale, offset and epsilon of a layer norm of the tokens, only where `kernels.dispatch.block_kernel`
            takes the kernel that computes it too; `None` = the tokens are used as they are.
          residual: return x + factor * the result, likewise only there.
          factor: what the result of each example is multiplied by then; `None` = 1.
          names: logical axes of the windows (last), one or, where they are split over devices, one for each axis
            of the map; `mask` then has as many.
          deterministic: no dropout.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if the heads do not divide the features, or the tokens do not fill the window.
        """
        window = self.window_size if window is None else window
        if x.ndim < 3 or x.shape[-2] != math.prod(window):
            raise ValueError(
                f"input must be [*batch, windows, {math.prod(window)}, features] for window {window}; got {x.shape}"
            )
        features = x.shape[-1]
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        dense = functools.partial(
            nn.Dense,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        rows = math.prod(2 * length - 1 for length in self.window_size)
        size = f"window_size={self.window_size}"
        table = learned_table(self, _TABLE, truncated_normal(), (rows, self.num_heads), self.param_dtype, size=size)
        dtype = nn.dtypes.canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        bias = relative_position_bias(table, window, self.window_size).astype(at_least_float32(dtype))
        bias = axes.constrain(bias, axes.HEADS, None, None)
        scale = (features // self.num_heads) ** -0.5
        dropout_rate = 0.0 if deterministic else self.attention_dropout_rate
        if dispatch.block_kernel(x.shape[-2], self.num_heads, features, dtype, dropout_rate) == "pallas":
            from jaxlayers.kernels import pallas_window_block

            init: dict[str, Any] = {key: dense.keywords[key] for key in ("param_dtype", "kernel_init", "bias_init")}
            *found, (out, out_shift) = (
                dense_weights(features, features, use_bias=self.use_bias or name == "out", **init, name=name)
                for name in ("query", "key", "value", "out")
            )
            biases = [each for _, each in found if each is not None]
            return pallas_window_block.window_block(
                x.astype(dtype),
                jnp.stack([kernel for kernel, _ in found]),
                jnp.stack(biases) if biases else None,
                out,
                out_shift,
                bias,
                mask,
                norm=None if norm is None else norm[:2],
                epsilon=0.0 if norm is None else norm[2],
                residual=residual,
                factor=factor,
                names=names,
            )
        if norm is not None or residual:
            raise ValueError(
                f"norm={norm} must be None and residual={residual} must be False where dispatch takes no "
                "kernel that computes them; norm the input, add to the result"
            )
        if dispatch.window_kernel(x.shape[-2], features // self.num_heads, dtype, dropout_rate) == "pallas":
            # It takes over a second to import.
            from jaxlayers.kernels import pallas_window

            project = functools.partial(_Projection, features, self.use_bias, **dense.keywords)
            (query, of_query), (key, of_key), (value, of_value) = (
                project(scale=factor, name=name)(x) for name, factor in (("query", scale), ("key", 1.0), ("value", 1.0))
            )
            biases = [each for each in (of_query, of_key, of_value) if each is not None]
            shifts = jnp.stack(biases) if biases else None
            context = pallas_window.window_attention(query, key, value, bias, mask, shifts=shifts, names=names)
            return dense(name="out")(context)
        query, key, value = (
            axes.constrain_heads(split_heads(dense(use_bias=self.use_bias, name=name)(x), self.num_heads), *names)
            for name in ("query", "key", "value")
        )
        # Apart from the bias, whose gradient is then one sum over images and windows; half the lowest number cannot
        # overflow in the sum.
        blocked = None if mask is None else jnp.where(mask[..., None, :, :], 0.0, 0.5 * jnp.finfo(query.dtype).min)

        def attend(module: nn.Module, query: Array, key: Array, value: Array, bias: Array) -> Array:
            logits = jnp.matmul(query * scale, jnp.swapaxes(key, -1, -2))
            logits = logits if blocked is None else logits + blocked.astype(logits.dtype)
            weights = attention_weights(logits, bias=bias)
            module.sow("intermediates", "attention_weights", weights)
            weights = nn.Dropout(self.attention_dropout_rate)(weights, deterministic=deterministic)
            return jnp.matmul(weights, value)

        context = merge_heads(axes.constrain_heads(remat.attention(attend, self, query, key, value, bias), *names))
        return dense(name="out")(context)


class SwinBlock(nn.Module):
    """Mix tokens within windows, shifted or not, then each token alone.

    z = x + drop(W-MSA(norm(x))), out = z + drop(MLP(norm(z))). W-MSA pads the normalised map with zeros at its ends
    to multiples of the window, rolls it by the shift, attends within windows, rolls it back and only then crops it. A
    window that holds entries from both ends of an axis is masked, so that they do not meet.

    Symmetry:
      Without a shift exactly equivariant to cyclic translations by whole windows, if the map is a multiple of the
      window; with one only away from the border, where the masks are.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: the window, one entry for each spatial axis (1 to 3 of them); an int means a square of two axes.
        Along an axis not longer than the window, the window is clipped to it and nothing is shifted.
      shift_size: the shift, like `window_size`; the paper uses half the window.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      dropout_rate: dropout after the attention and in the MLP, in [0, 1).
      attention_dropout_rate: dropout of the attention weights, in [0, 1).
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      mask_padding: also keep true tokens from attending to padding. False is what the references do.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      (4 + 2 mlp_ratio) C^2 + 2 M^2 C multiply-accumulates a token of width C, with M^2 tokens a window.
      Where logical rules split the map's axes over a mesh, regular windows of whole parts send nothing and shifted ones
      the shift, there and back, see `ops/halo.py`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import SwinBlock
      >>> block = SwinBlock(num_heads=2, window_size=4, shift_size=2)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 9, 6, 8)

    Source:
      Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, equation 3 and
      section 3.2; github.com/microsoft/Swin-Transformer.

    Differs:
      Any map size, padded before it is rolled as torchvision and Hugging Face do (the official code takes multiples of
      the window only; timm rolls first, which lets opposite edges of such maps meet). Clipping and shift are decided
      for each axis, as in timm, but the clipped window reads the middle of the one table; torchvision pads up to the
      window instead; official code and Hugging Face stop shifting along both axes when one is short.
    """

    num_heads: int
    window_size: int | tuple[int, ...] = 7
    shift_size: int | tuple[int, ...] = 0
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
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
        *,
        drop_path_rate: Float[Array, ""] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*axes features"]:
        """Apply the block.

        Args:
          x: map `[*batch, *space, features]`.
          drop_path_rate: replaces the field; may be traced.
          deterministic: no dropout, no dropped branches.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has too few axes, or a field does not fit the features or the window.
        """
        full_window = (self.window_size,) * 2 if isinstance(self.window_size, int) else tuple(self.window_size)
        full_shift = (
            (self.shift_size,) * len(full_window) if isinstance(self.shift_size, int) else tuple(self.shift_size)
        )
        if len(full_window) not in axes.SPACE or len(full_shift) != len(full_window):
            raise ValueError(
                f"window_size={self.window_size} and shift_size={self.shift_size} must name 1 to 3 axes, equally many; "
                "set both"
            )
        batch, size, features = split_shape(x.shape, len(full_window))
        window, amount = fit_window(size, full_window, full_shift)
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=len(batch))

        split = map_split(x.shape, window)
        # The kernel norms tokens of windows, of which padding would be some.
        whole = all(length % step == 0 for length, step in zip(size, window, strict=True))
        rate = 0.0 if deterministic else self.attention_dropout_rate
        affine = plain_norm(norm, x) if whole else None
        tokens, given = math.prod(window), None
        if affine is not None and dispatch.block_kernel(tokens, self.num_heads, features, x.dtype, rate) == "pallas":
            given = (*norm_weights(features, affine, name="norm1"), affine.epsilon)
        # Dropout is between the result and the sum, which is in the dtype of the map.
        dtype = nn.dtypes.canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        residual = given is not None and dtype == x.dtype and (deterministic or not self.dropout_rate)
        factor = drop_path.factor(batch, drop_path_rate, deterministic=deterministic) if residual else None
        y = WindowAttention(
            self.num_heads,
            window_size=full_window,
            attention_dropout_rate=self.attention_dropout_rate,
            name="attention",
            **common,
        )(
            cut_windows(x if given else norm(name="norm1")(x), window, amount, split),
            window_mask(size, window, amount, split, mask_padding=self.mask_padding),
            window=window,
            norm=given,
            residual=residual,
            factor=factor,
            names=window_names(split),
            deterministic=deterministic,
        )
        if residual:
            x = join_windows(y, size, window, amount, split)
        elif deterministic or not self.dropout_rate:
            x = add_windows(x, y, window, amount, split, drop_path, drop_path_rate, deterministic=deterministic)
        else:
            y = nn.Dropout(self.dropout_rate)(join_windows(y, size, window, amount, split), deterministic=False)
            x = x + drop_path(y, drop_path_rate, deterministic=deterministic)
        x = axes.constrain_map(x, len(full_window))

        feed_forward = functools.partial(
            FeedForward, int(features * self.mlp_ratio), dropout_rate=self.dropout_rate, **common
        )
        names = (axes.BATCH, *axes.SPACE[len(full_window)])
        x = add_feed_forward(x, norm, feed_forward, drop_path, drop_path_rate, names=names, deterministic=deterministic)
        return axes.constrain_map(x, len(full_window))


class PatchMerging(nn.Module):
    """Halve a map: put each 2 x 2 neighbourhood into the features, norm it and reduce it linearly.

    out[i, j] = norm([x[2i, 2j], x[2i+1, 2j], x[2i, 2j+1], x[2i+1, 2j+1]]) W, with W `[4 C, out]` without bias. Odd
    sizes are padded with zeros at their ends.

    Symmetry:
      Exactly equivariant to translations by two entries, away from the border.

    Attributes:
      features: width of the output; `None` doubles that of the input.
      norm: makes the norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W.

    Cost:
      C x out multiply-accumulates an entry of the input. Where `kernels.dispatch` says so it is a convolution.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import PatchMerging
      >>> jax.eval_shape(PatchMerging().init_with_output, jax.random.key(0), jnp.ones((1, 5, 6, 8)))[0].shape
      (1, 3, 3, 16)

    Source:
      Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, section 3.1;
      github.com/microsoft/Swin-Transformer, whose order of the four neighbours it keeps.

    Differs:
      Pads odd sizes, as torchvision, timm and Hugging Face do; the official code refuses them.
    """

    features: int | None = None
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"]
    ) -> Float[Array, "*batch new_height new_width out"]:
        """Halve the map.

        Args:
          x: map with two spatial axes; further ones count as batch.

        Returns:
          The map of half the size, rounded up.

        Raises:
          ValueError: if `x` has fewer than three axes or `features` is not positive.
        """
        x, width = pad_to_multiple(x, (2, 2)), 4 * x.shape[-1]
        features = width // 2 if self.features is None else self.features
        if features < 1:
            raise ValueError(f"features={self.features} must be positive; set features or leave it None")
        dtype = nn.dtypes.canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        patches = x.size // width
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        affine = plain_norm(norm, x)
        if affine is not None and dispatch.convolves_patches(patches, width // 4, dtype):
            init: dict[str, Any] = {"param_dtype": self.param_dtype, "kernel_init": self.kernel_init}
            scale, offset = norm_weights(width, affine, name="pre_norm")
            kernel, _ = dense_weights(width, features, use_bias=False, **init, name="reduction")
            x = project_normed_patches(x, (2, 2), scale, offset, kernel, epsilon=affine.epsilon)
            return axes.constrain_map(x, 2)
        x = to_patches(x, (2, 2), first_axis_fastest=True)
        x = norm(name="pre_norm")(x)
        x = nn.Dense(
            features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="reduction",
        )(x)
        return axes.constrain_map(x, 2)


class Swin(nn.Module):
    """Classify images, or give their feature pyramid, by attention within shifted windows.

    Patches are embedded; stage s is a `PatchMerging` (from the second on) and `depths[s]` blocks, of which every second
    has its windows shifted by half; the last map is normed, averaged over space and mapped to logits.

    Symmetry:
      None exactly: patches, windows and padding are tied to the grid. Tokens mix only within a window, so a block's
      output at a token depends on no token outside its window.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the averaged features.
      patch_size: size of a patch, an int or (height, width).
      embed_dim: width C of the first stage; stage s has C 2^s.
      depths: number of blocks of each stage; any number of stages.
      num_heads: number of heads of each stage.
      window_size: an int, (height, width), or one pair a stage. Clipped where a map is smaller, see `SwinBlock`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      dropout_rate: dropout after the patch embedding, the attention and in the MLPs, in [0, 1).
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      mask_padding: keep tokens from attending to padding, on maps that are not multiples of the window. False is what
        the references do, so take it with their weights.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      scan: run the blocks of a stage as a loop over pairs, which compiles once a stage. The parameters are then stacked
        (see `stack` and `unstack`); outputs are the same, random draws while training differ.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except that of the patch embedding.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0. No variables besides `params`: indices
      and masks are constants made from the shape while tracing, so one parameter tree serves every input size.

    Cost:
      Linear in the number of pixels. Swin-T at 224 x 224: 4.5 G multiply-accumulates, 28.3 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import Swin
      >>> model = Swin(num_classes=10, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(Swin.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels]
      ((1, 10), [((1, 16, 16, 8), (4, 4)), ((1, 8, 8, 16), (8, 8))])

    Source:
      Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021;
      github.com/microsoft/Swin-Transformer.

    Differs:
      As `SwinBlock`, `PatchMerging` and `PatchEmbed` (whose kernel starts with variance 1 / fan-in). No absolute
      position embedding (off in every published model). Images that are not multiples of the patch are padded with
      zeros, as Hugging Face does.
    """

    num_classes: int = 1000
    patch_size: int | tuple[int, ...] = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: WindowSize = 7
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.1
    mask_padding: bool = False
    remat: str | bool = False
    scan: bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        if len(self.depths) != len(self.num_heads) or not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths={self.depths} and num_heads={self.num_heads} must have one positive entry a stage; set both"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        windows = _stage_windows(self.window_size, len(self.depths))
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = PatchEmbed(
            self.embed_dim, patch_size=_pair(self.patch_size), norm=self.norm, bias_init=self.bias_init, **dtypes
        )
        self.dropout = nn.Dropout(self.dropout_rate)
        stages = []
        for stage, (depth, heads, window) in enumerate(zip(self.depths, self.num_heads, windows, strict=True)):
            block = functools.partial(
                SwinBlock,
                heads,
                window_size=window,
                mlp_ratio=self.mlp_ratio,
                dropout_rate=self.dropout_rate,
                mask_padding=self.mask_padding,
                norm=self.norm,
                **dtypes,
                **init,
            )
            merge = functools.partial(PatchMerging, norm=self.norm, kernel_init=self.kernel_init, **dtypes)
            first = sum(self.depths[:stage])
            stages.append(
                _Stage(
                    merge=merge if stage else None,
                    blocks=(block, functools.partial(block, shift_size=tuple(length // 2 for length in window))),
                    rates=rates[first : first + depth],
                    remat=self.remat,
                    scan=self.scan,
                )
            )
        self.stages = stages
        self.final_norm = self.norm(**dtypes)
        self.head = nn.Dense(self.num_classes, **dtypes, **init) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images of any size, channels last, scaled as the weights want them.
          deterministic: no dropout, no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the averaged features.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        x = self.features(x, deterministic=deterministic)[-1].array
        x = jnp.mean(self.final_norm(x), axis=(-3, -2))
        return x if self.head is None else self.head(x)

    def features(
        self,
        x: Float[Array, "*batch height width channels"],
        *,
        replace_tokens: Callable[[Array], Array] | None = None,
        deterministic: bool = True,
    ) -> tuple[Level, ...]:
        """Return the map after each stage (before the next one's merging), finest first, without norms.

        Args:
          x: images of any size, channels last.
          replace_tokens: what is done to the embedded patches before the first stage, such as hiding some of them;
            `None` = nothing.
          deterministic: no dropout, no dropped branches.

        Returns:
          One level a stage, of stride `patch_size * 2**stage`.
        """
        return self.stage_maps(x, replace_tokens=replace_tokens, deterministic=deterministic)[1]

    def stage_maps(
        self,
        x: Float[Array, "*batch height width channels"],
        *,
        replace_tokens: Callable[[Array], Array] | None = None,
        deterministic: bool = True,
    ) -> tuple[tuple[Level, ...], tuple[Level, ...]]:
        """Return the map before the blocks of each stage (after its merging) and the one after them.

        Args:
          x: see `features`.
          replace_tokens: see `features`.
          deterministic: see `features`.

        Returns:
          Two pyramids of the same strides and channels.
        """
        x = self.patch_embed(x)
        if replace_tokens is not None:
            x = replace_tokens(x)
        x = axes.constrain_map(self.dropout(x, deterministic=deterministic), 2)
        before, after = [], []
        for index, stage in enumerate(self.stages):
            merged, x = stage(x, deterministic=deterministic)
            stride = tuple(length * 2**index for length in _pair(self.patch_size))
            before.append(Level(merged, stride))
            after.append(Level(x, stride))
        return tuple(before), tuple(after)


class _Stage(nn.Module):
    """A merging and a chain of blocks, of which every second is shifted.

    Attributes:
      merge: makes the merging; `None` for the first stage.
      blocks: makes an unshifted and a shifted block.
      rates: drop-path rate of each block.
      remat: what of each block is recomputed in the backward pass.
      scan: run pairs of blocks as a loop over stacked parameters.
    """

    merge: Callable[..., nn.Module] | None
    blocks: tuple[Callable[..., nn.Module], Callable[..., nn.Module]]
    rates: tuple[float, ...]
    remat: str | bool
    scan: bool

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> tuple[Array, Array]:
        """Return the merged map and the one after the blocks."""
        if self.merge is not None:
            x = self.merge(name="merge")(x)
        merged = x
        pairs = len(self.rates) // 2 if self.scan else 0
        if pairs:
            # A loop body has one program for all depths: the rates enter it as numbers.
            rates = (
                None if deterministic or not any(self.rates) else jnp.asarray(self.rates[: 2 * pairs]).reshape(-1, 2)
            )
            body = nn.scan(
                _Pair,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=pairs,
            )
            x, _ = body(self.blocks, remat=self.remat, deterministic=deterministic, name="pairs")(x, rates)
        for index in range(2 * pairs, len(self.rates)):
            block = self.blocks[index % 2](drop_path_rate=self.rates[index], name=f"blocks_{index}")
            x = _call_block(block, x, None, deterministic, policy=self.remat)
        return merged, x


class _Pair(nn.Module):
    """An unshifted and a shifted block, the body of a scan."""

    blocks: tuple[Callable[..., nn.Module], Callable[..., nn.Module]]
    remat: str | bool
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, rates: Array | None) -> tuple[Array, None]:
        for index, name in enumerate(("regular", "shifted")):
            rate = None if rates is None else rates[index]
            x = _call_block(self.blocks[index](name=name), x, rate, self.deterministic, policy=self.remat, in_loop=True)
        return x, None


def _call_block(
    block: nn.Module, x: Array, rate: Array | None, deterministic: bool, *, policy: str | bool, in_loop: bool = False
) -> Array:
    def call(block: nn.Module, x: Array, rate: Array | None) -> Array:
        return block(x, drop_path_rate=rate, deterministic=deterministic)

    return remat.remat_block(call, policy, in_loop=in_loop)(block, x, rate)


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"patch_size={size} must be an int or (height, width); set patch_size")
    return pair


def _stage_windows(window_size: WindowSize, num_stages: int) -> tuple[tuple[int, int], ...]:
    if isinstance(window_size, int):
        return ((window_size, window_size),) * num_stages
    pairs: Sequence[Any] = window_size if isinstance(window_size[0], tuple) else [window_size] * num_stages
    if len(pairs) != num_stages or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"window_size={window_size} must be an int, (height, width), or one such pair for each of the "
            f"{num_stages} stages; set window_size"
        )
    return tuple(_pair(pair) for pair in pairs)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: Swin) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


def stack(params: Params) -> dict[str, Any]:
    """Return the parameters of a model with `scan=False` in the form that `scan=True` has."""
    stacked = dict(params)
    for name in [name for name in params if name.startswith("stages_")]:
        stage = dict(params[name])
        depth = sum(key.startswith("blocks_") for key in stage)
        pairs = [(stage.pop(f"blocks_{i}"), stage.pop(f"blocks_{i + 1}")) for i in range(0, depth - 1, 2)]
        if pairs:
            regular, shifted = (
                jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks) for blocks in zip(*pairs, strict=True)
            )
            stage["pairs"] = {"regular": regular, "shifted": shifted}
        stacked[name] = stage
    return stacked


def unstack(params: Params) -> dict[str, Any]:
    """Return the inverse of `stack`."""
    unstacked = dict(params)
    for name in [name for name in params if name.startswith("stages_")]:
        stage = dict(params[name])
        pairs = stage.pop("pairs", {})
        for offset, kind in enumerate(pairs and ("regular", "shifted")):
            for index in range(jax.tree.leaves(pairs[kind])[0].shape[0]):
                stage[f"blocks_{2 * index + offset}"] = jax.tree.map(lambda leaf, i=index: leaf[i], pairs[kind])
        unstacked[name] = stage
    return unstacked


def reset_classifier(
    params: Params,
    rng: PRNGKey,
    num_classes: int,
) -> dict[str, Any]:
    """Return the parameters with a fresh head, for `model.clone(num_classes=num_classes)`.

    Args:
      params: parameters of a model, with or without a head.
      rng: key for the new kernel.
      num_classes: number of logits; 0 takes the head away.

    Returns:
      A new tree that shares the other leaves.

    Raises:
      ValueError: if `num_classes` is negative.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must not be negative; pass num_classes (0 for no head)")
    kept = {name: value for name, value in params.items() if name != "head"}
    if not num_classes:
        return kept
    # The width is that of the last stage, whatever the norm before the head.
    last = max(
        (name for name in params if name.startswith("stages_")), key=lambda name: int(name.removeprefix("stages_"))
    )
    flat = flax.traverse_util.flatten_dict(dict(params[last]), sep="/")
    down = next(leaf for path, leaf in flat.items() if path.endswith("feed_forward/down/kernel"))
    kernel = truncated_normal()(rng, (down.shape[-1], num_classes), down.dtype)
    return {**kept, "head": {"kernel": kernel, "bias": jnp.zeros((num_classes,), down.dtype)}}


def resize(params: Params, from_model: Swin, to_model: Swin) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the window and patch size of `to_model`.

    Relative-position tables are resampled bicubically, the patch embedding by a pseudo-inverse (FlexiViT); all else
    stays. Another image size alone needs nothing: one tree serves every size.

    Args:
      params: parameters of `from_model`.
      from_model: the model that the parameters are of.
      to_model: the model that they are wanted for.

    Returns:
      Parameters of `to_model`.

    Raises:
      ValueError: if the models differ in a field that no resampling bridges.
    """
    remedies = {
        "embed_dim": "set it alike",
        "depths": "set it alike",
        "num_heads": "set it alike",
        "mlp_ratio": "set it alike",
        "num_classes": "use reset_classifier first",
        "scan": "use stack or unstack first",
    }
    for field, remedy in remedies.items():
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; {remedy}")
    windows = [_stage_windows(model.window_size, len(model.depths)) for model in (from_model, to_model)]
    patch, new_patch = _pair(from_model.patch_size), _pair(to_model.patch_size)

    def fit(path: tuple[str, ...], leaf: Any) -> Any:
        if path[-1] == _TABLE:
            window, new_window = (each[int(path[0].removeprefix("stages_"))] for each in windows)
            return leaf if window == new_window else resample_relative_table(jnp.asarray(leaf), window, new_window)
        if path == ("patch_embed", "projection", "kernel") and patch != new_patch:
            kernel = jnp.asarray(leaf).reshape(*patch, -1, leaf.shape[-1])
            return resample_patch_kernel(kernel, new_patch).reshape(-1, leaf.shape[-1])
        return leaf

    flat = flax.traverse_util.flatten_dict(dict(params))
    return flax.traverse_util.unflatten_dict({path: fit(path, leaf) for path, leaf in flat.items()})


# Reference checkpoints ------------------------------------------------------------------------------------------------

# Our modules (numbers left out) and theirs. {stage} and {block} count as ours do; {before} = stage - 1,
# {even} = 2 stage, {odd} = 2 stage + 1.
_TIMM = {
    "patch_embed/projection": "patch_embed.proj",
    "patch_embed/post_norm": "patch_embed.norm",
    "stages/blocks/norm1": "layers.{stage}.blocks.{block}.norm1",
    "stages/blocks/norm2": "layers.{stage}.blocks.{block}.norm2",
    "stages/blocks/attention": "layers.{stage}.blocks.{block}.attn",
    "stages/blocks/attention/query": "layers.{stage}.blocks.{block}.attn.qkv",
    "stages/blocks/attention/key": "layers.{stage}.blocks.{block}.attn.qkv",
    "stages/blocks/attention/value": "layers.{stage}.blocks.{block}.attn.qkv",
    "stages/blocks/attention/out": "layers.{stage}.blocks.{block}.attn.proj",
    "stages/blocks/feed_forward/up": "layers.{stage}.blocks.{block}.mlp.fc1",
    "stages/blocks/feed_forward/down": "layers.{stage}.blocks.{block}.mlp.fc2",
    "stages/merge/pre_norm": "layers.{stage}.downsample.norm",
    "stages/merge/reduction": "layers.{stage}.downsample.reduction",
    "final_norm": "norm",
    "head": "head.fc",
}
_OFFICIAL = {
    **_TIMM,
    "stages/merge/pre_norm": "layers.{before}.downsample.norm",
    "stages/merge/reduction": "layers.{before}.downsample.reduction",
    "head": "head",
}
_TORCHVISION = {
    "patch_embed/projection": "features.0.0",
    "patch_embed/post_norm": "features.0.2",
    **{
        ours: theirs.replace("layers.{stage}.blocks", "features.{odd}")
        for ours, theirs in _TIMM.items()
        if ours.startswith("stages/blocks")
    },
    "stages/blocks/feed_forward/up": "features.{odd}.{block}.mlp.0",
    "stages/blocks/feed_forward/down": "features.{odd}.{block}.mlp.3",
    "stages/merge/pre_norm": "features.{even}.norm",
    "stages/merge/reduction": "features.{even}.reduction",
    "final_norm": "norm",
    "head": "head",
}
_LAYER = "swin.encoder.layers.{stage}.blocks.{block}"
_HUGGINGFACE = {
    "patch_embed/projection": "swin.embeddings.patch_embeddings.projection",
    "patch_embed/post_norm": "swin.embeddings.norm",
    "stages/blocks/norm1": f"{_LAYER}.layernorm_before",
    "stages/blocks/norm2": f"{_LAYER}.layernorm_after",
    "stages/blocks/attention": f"{_LAYER}.attention.self",
    "stages/blocks/attention/query": f"{_LAYER}.attention.self.query",
    "stages/blocks/attention/key": f"{_LAYER}.attention.self.key",
    "stages/blocks/attention/value": f"{_LAYER}.attention.self.value",
    "stages/blocks/attention/out": f"{_LAYER}.attention.output.dense",
    "stages/blocks/feed_forward/up": f"{_LAYER}.intermediate.dense",
    "stages/blocks/feed_forward/down": f"{_LAYER}.output.dense",
    "stages/merge/pre_norm": "swin.encoder.layers.{before}.downsample.norm",
    "stages/merge/reduction": "swin.encoder.layers.{before}.downsample.reduction",
    "final_norm": "swin.layernorm",
    "head": "classifier",
}
_HUGGINGFACE_5 = {
    **_HUGGINGFACE,
    "stages/blocks/attention": f"{_LAYER}.attention.relative_position_bias",
    "stages/blocks/attention/query": f"{_LAYER}.attention.q_proj",
    "stages/blocks/attention/key": f"{_LAYER}.attention.k_proj",
    "stages/blocks/attention/value": f"{_LAYER}.attention.v_proj",
    "stages/blocks/attention/out": f"{_LAYER}.attention.o_proj",
    "stages/blocks/feed_forward/up": f"{_LAYER}.mlp.fc1",
    "stages/blocks/feed_forward/down": f"{_LAYER}.mlp.fc2",
}

# `huggingface` are the names in the published files, `huggingface_5` those of transformers 5 in memory.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "timm": _TIMM,
    "official": _OFFICIAL,
    "torchvision": _TORCHVISION,
    "huggingface": _HUGGINGFACE,
    "huggingface_5": _HUGGINGFACE_5,
}
# Indices and masks that references store and we compute.
_IGNORED = ("relative_position_index", "attn_mask")


def reference_name(path: str, source: str) -> str:
    """Return the name that a reference gives to the parameter at `path` (`stages_0/blocks_1/norm1/scale`).

    Raises:
      ValueError: if the source is not in `REFERENCE_NAMES`.
    """
    if source not in REFERENCE_NAMES:
        raise ValueError(f"source={source!r} must be one of {sorted(REFERENCE_NAMES)}; pass one of them")
    module, _, leaf = path.rpartition("/")
    found = {part: int(number) for part, number in re.findall(r"(stages|blocks)_(\d+)", path)}
    stage, block = found.get("stages", 0), found.get("blocks", 0)
    theirs = REFERENCE_NAMES[source][re.sub(r"(stages|blocks)_\d+", r"\1", module)]
    numbers = {"stage": stage, "block": block, "before": stage - 1, "even": 2 * stage, "odd": 2 * stage + 1}
    return f"{theirs.format(**numbers)}.{'weight' if leaf in ('kernel', 'scale') else leaf}"


def from_reference(tensors: Mapping[str, Any], model: Swin, *, source: str) -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for, with `scan=False`; `stack` the result for the other.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    if model.scan:
        raise ValueError("model.scan=True must be False here; pass model.clone(scan=False) and stack the result")
    stem = reference_name("patch_embed/projection/kernel", source)
    if stem not in tensors:
        raise ValueError(f"a checkpoint of source={source!r} must hold {stem!r}; pass the source it comes from")
    image = jax.ShapeDtypeStruct((1, *_pair(model.patch_size), np.shape(tensors[stem])[1]), jnp.float32)
    wanted = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image)["params"], sep="/")
    names = {path: reference_name(path, source) for path in wanted}
    unknown = sorted(name for name in tensors if name not in names.values() and not name.endswith(_IGNORED))
    missing = sorted(name for name in names.values() if name not in tensors)
    if unknown or missing:
        raise ValueError(
            f"the checkpoint must have the model's tensors; unknown {unknown}, missing {missing}; set its fields"
        )
    times = collections.Counter(names.values())
    found = {path: _from_torch(path, np.asarray(tensors[name]), fused=times[name] == 3) for path, name in names.items()}
    for path, leaf in wanted.items():
        if found[path].shape != leaf.shape:
            raise ValueError(
                f"{names[path]} must give {path} its shape {leaf.shape}, not {found[path].shape}; set the fields "
                "or resize"
            )
    return flax.traverse_util.unflatten_dict({path: jnp.asarray(value) for path, value in found.items()}, sep="/")


def _from_torch(path: str, tensor: np.ndarray, *, fused: bool) -> np.ndarray:
    """Cut fused projections in three, and put input features before output features."""
    *_, module, leaf = path.split("/")
    if fused:
        tensor = np.split(tensor, 3)[("query", "key", "value").index(module)]
    if leaf != "kernel":
        return tensor
    return tensor.T if tensor.ndim == 2 else np.moveaxis(tensor, (1, 0), (-2, -1)).reshape(-1, tensor.shape[0])


def reference_inputs(model: Swin) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the least size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *_pair(model.patch_size), 3), jnp.float32),)


COMPUTED: Mapping[str, str] = {
    r"relative_position_index$": "an index that follows from the window",
    r"attn_mask$": "a mask that follows from the size of the map",
    r"relative_coords_table$": "distances that follow from the window",
}
_IN_BLOCK = r"blocks\.0\.attn\.relative_position_bias_table$"
# Name: where such files come from, marks, foreign names.
_MARKS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "timm": (
        "timm from 0.9 on",
        (rf"^layers\.\d+\.{_IN_BLOCK}",),
        (r"^layers\.0\.downsample\.", r"^head\.weight$", r"^layers_up\.", r"^(fam|feature|tss)\."),
    ),
    "official": (
        "github.com/microsoft/Swin-Transformer, and timm before 0.9",
        (rf"^layers\.\d+\.{_IN_BLOCK}", r"^layers\.0\.downsample\."),
        (r"^layers_up\.", r"^layers\.0\.0\.", r"^(fam|feature|tss)\.", r"^head\.fc\.", r"^conv_first\."),
    ),
    "torchvision": ("torchvision", (r"^features\.1\.0\.attn\.relative_position_bias_table$",), ()),
    "huggingface": (
        "files of Hugging Face transformers",
        (r"^swin\.encoder\..*attention\.self\.query\.",),
        (r"^decoder\.",),
    ),
    "huggingface_5": (
        "transformers from 5 on, in memory",
        (r"^swin\.encoder\..*attention\.q_proj\.",),
        (r"^decoder\.",),
    ),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=Swin,
        read=dialects.from_params(from_reference, source=name),
        marks=marks,
        foreign=foreign,
        ignored=COMPUTED,
        layout=dialects.table_layout(
            REFERENCE_NAMES[name], shapes={"patch_embed/projection/kernel": dialects.patches()}
        ),
        head=f"{REFERENCE_NAMES[name]['head']}.weight",
        stem=f"{REFERENCE_NAMES[name]['patch_embed/projection']}.weight",
    )
    for name, (origin, marks, foreign) in _MARKS.items()
)


def _variant(embed_dim: int, depths: Sequence[int], drop_path_rate: float, size: int, window: int) -> dict[str, Any]:
    return {
        "module": Swin,
        "inputs": (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),),
        "embed_dim": embed_dim,
        "depths": tuple(depths),
        "num_heads": tuple(embed_dim // 32 * 2**stage for stage in range(len(depths))),
        "window_size": window,
        "drop_path_rate": drop_path_rate,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    f"swin_{name}{suffix}": _variant(*shape, size, window)
    for name, shape in {
        "tiny": (96, (2, 2, 6, 2), 0.2),
        "small": (96, (2, 2, 18, 2), 0.3),
        "base": (128, (2, 2, 18, 2), 0.5),
        "large": (192, (2, 2, 18, 2), 0.2),
    }.items()
    for suffix, size, window in (("", 224, 7), ("_384", 384, 12))
}


def _from_huggingface(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return "swin_tiny", huggingface_fields(config)


def huggingface_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Swin or Swin V2 that a `config.json` of transformers describes; what it omits is default.

    Raises:
      ValueError: if it describes what the model does not have.
    """
    wanted = {"hidden_act": "gelu", "use_absolute_embeddings": False, "qkv_bias": True}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json has {key}={config[key]!r}, which must be {value!r}; it is another model")
    return {
        "num_classes": huggingface_classes(config),
        "patch_size": config.get("patch_size", 4),
        "embed_dim": config.get("embed_dim", 96),
        "depths": tuple(config.get("depths", (2, 2, 6, 2))),
        "num_heads": tuple(config.get("num_heads", (3, 6, 12, 24))),
        "window_size": config.get("window_size", 7),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "drop_path_rate": config.get("drop_path_rate", 0.1),
    }


def huggingface_classes(config: Mapping[str, Any]) -> int:
    """Return the number of classes of a `config.json` of transformers, which writes labels where they are not two."""
    if "id2label" in config:
        return len(config["id2label"])
    return int(config.get("num_labels", 2))


HUGGINGFACE = {"swin": _from_huggingface}
