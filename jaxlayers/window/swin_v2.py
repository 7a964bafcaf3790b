"""Swin Transformer V2: cosine attention within shifted windows, norms after the branches, a continuous position bias.

Longer than most files, since layers, model, the labels of its parameters and the names of four reference dialects
belong to one paper.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import constant
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, labels, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.pyramid import Level
from jaxlayers.core.safe import safe_normalize
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.kernels import dispatch
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward, add_feed_forward
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.nn.weights import dense_weights, norm_weights, plain_norm
from jaxlayers.nn.window_maps import add_windows, cut_and_keep, cut_windows, join_windows
from jaxlayers.ops.halo import map_split, window_mask, window_names
from jaxlayers.ops.patches import pad_to_multiple, project_patches, split_shape, to_patches
from jaxlayers.ops.windows import fit_window, relative_position_bias
from jaxlayers.window import swin
from jaxlayers.window.swin import WindowSize, layer_norm
from jaxlayers.window.swin import reset_classifier as reset_classifier
from jaxlayers.window.swin import stack as stack
from jaxlayers.window.swin import unstack as unstack

# A branch that ends in it adds nothing at first.
zero_layer_norm = functools.partial(layer_norm, scale_init=zeros())

# Cosines are scaled by at most 1 / 0.01.
_MAX_LOGIT_SCALE = math.log(100.0)


def relative_offsets(window: Sequence[int], pretrained_window: Sequence[int] | None = None) -> np.ndarray:
    """Return every offset between two tokens of a window, as a fraction of the largest one.

    Args:
      window: size of the window along each axis.
      pretrained_window: the window whose largest offset counts as 1; `None` means `window`. In a larger window the
        same offset in tokens then has the same value, and longer ones go beyond 1.

    Returns:
      Float64 numbers `[offsets, axes]`, query - key from `-(window - 1)` to `window - 1`, in the row-major order of
      `relative_position_index`.

    Raises:
      ValueError: if the windows differ in their number of axes, or one is not positive.

    Example:
      >>> from jaxlayers.window.swin_v2 import relative_offsets
      >>> relative_offsets((3,), (2,)).ravel().tolist()
      [-2.0, -1.0, 0.0, 1.0, 2.0]
    """
    unit = tuple(window if pretrained_window is None else pretrained_window)
    if len(unit) != len(window) or any(length < 1 for length in (*unit, *window)):
        raise ValueError(
            f"pretrained_window_size={unit} must be positive along each axis of window_size={tuple(window)}; set both"
        )
    steps = [range(1 - length, length) for length in window]
    offsets = np.array(list(itertools.product(*steps)), np.float64).reshape(-1, len(window))
    return offsets / np.maximum(np.array(unit) - 1, 1)


class ContinuousPositionBias(nn.Module):
    """Turn relative offsets into an attention bias, by a small network on their logarithms.

    out = 16 sigmoid(relu(s W_up + b_up) W_down), s = sign(r) log2(1 + 8 |r|) / log2(8), with r `[*batch, axes]` the
    offset between two tokens as a fraction of the largest in the window of pre-training, W_up `[axes, hidden]`,
    W_down `[hidden, heads]`. The logarithm brings the offsets of a larger window close to those it was trained on.

    Symmetry:
      None. The values lie in (0, 16) for any offset.

    Attributes:
      num_heads: number of biases for each offset.
      hidden_features: width of the hidden layer.
      param_dtype: dtype of the parameters; the network is computed in float32 or better.
      kernel_init: initialiser of W_up and W_down.
      bias_init: initialiser of b_up.

    Cost:
      (axes + heads) x hidden multiply-accumulates an offset, once for all windows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ContinuousPositionBias
      >>> layer = ContinuousPositionBias(num_heads=3)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((9, 2)))[0].shape
      (9, 3)

    Source:
      Liu et al., Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022, equations 3 and 4;
      github.com/microsoft/Swin-Transformer, whose factors 8, 1 / log2(8) and 16 sigmoid the paper does not give.

    Differs:
      none.
    """

    num_heads: int
    hidden_features: int = 512
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, offsets: Float[Array, "*batch axes"]) -> Float[Array, "*batch heads"]:
        """Compute the bias.

        Args:
          offsets: see `relative_offsets`.

        Returns:
          A number in (0, 16) for each offset and head.

        Raises:
          ValueError: if a width is not positive or `offsets` is a scalar.
        """
        if self.num_heads < 1 or self.hidden_features < 1:
            raise ValueError(
                f"num_heads={self.num_heads} and hidden_features={self.hidden_features} must be positive; set them"
            )
        if offsets.ndim < 1:
            raise ValueError(f"offsets must be [*batch, axes]; got shape {offsets.shape}")
        dtype = at_least_float32(jnp.promote_types(offsets.dtype, self.param_dtype))
        dense = functools.partial(
            nn.Dense, dtype=dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        offsets = offsets.astype(dtype)
        spaced = jnp.sign(offsets) * jnp.log2(1.0 + 8.0 * jnp.abs(offsets)) / 3.0
        hidden = nn.relu(dense(self.hidden_features, name="up")(spaced))
        return 16.0 * nn.sigmoid(dense(self.num_heads, use_bias=False, name="down")(hidden))


class CosineWindowAttention(nn.Module):
    """Attend within each window by the cosine between queries and keys.

    out = softmax(t cos(Q, K) + B) V W_out, for each window and head; Q, K, V `[tokens, d]` are linear in the window's
    tokens (K without bias), t = exp(min(tau, log 100)) with a learned tau for each head, and B[i, j] is the
    `ContinuousPositionBias` of the offset p_i - p_j. No logit exceeds t + 16.

    Symmetry:
      Exactly equivariant to permutations of the windows (with their masks); tokens of different windows never mix.
      The weights do not change when a head's queries or keys are scaled by positive numbers.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: the window, (M_1, ..., M_n) with n from 1 to 3. No parameter depends on its size.
      pretrained_window_size: the window whose largest offset the bias sees as 1; `None` takes `window_size`. Keep it
        at the size of pre-training when the window grows.
      use_bias: add biases to Q and V (the output always has one, K never).
      attention_dropout_rate: dropout of the attention weights, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters. Norms of Q and K, logits, softmax and position
        bias are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`, but for those of a kernel (`kernels.dispatch`).

    Cost:
      4 C^2 + 2 tokens C multiply-accumulates a token of width C: linear in the number of windows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import CosineWindowAttention
      >>> layer = CosineWindowAttention(num_heads=2, window_size=(4, 4))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 9, 16, 8)))[0].shape
      (1, 9, 16, 8)

    Source:
      Liu et al., Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022, equation 2;
      github.com/microsoft/Swin-Transformer.

    Differs:
      Q, K and V come from three products instead of one cut in three. Masked logits are excluded exactly instead of
      lowered by 100, which a scale of 100 and a bias of 16 could overcome.
    """

    num_heads: int
    window_size: tuple[int, ...]
    pretrained_window_size: tuple[int, ...] | None = None
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
          norm: scale, offset and epsilon of a layer norm of the result, only where `kernels.dispatch.block_kernel`
            takes the kernel that computes it too; `None` = the result stays as it is.
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
        window = tuple(self.window_size)
        if x.ndim < 3 or x.shape[-2] != math.prod(window):
            raise ValueError(
                f"input must be [*batch, windows, {math.prod(window)}, features] for window {window}; got {x.shape}"
            )
        features = x.shape[-1]
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        init: dict[str, Any] = {
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        dense = functools.partial(nn.Dense, features, dtype=self.dtype, **init)
        dtype = nn.dtypes.canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        wide = at_least_float32(dtype)
        offsets = jnp.asarray(relative_offsets(window, self.pretrained_window_size), wide)
        table = ContinuousPositionBias(self.num_heads, name="position_bias", **init)(offsets)
        bias = axes.constrain(relative_position_bias(table, window).astype(wide), axes.HEADS, None, None)
        tau = self.param("logit_scale", constant(math.log(10.0)), (self.num_heads,), self.param_dtype)
        scale = jnp.exp(jnp.minimum(tau.astype(wide), _MAX_LOGIT_SCALE))
        dropout_rate = 0.0 if deterministic else self.attention_dropout_rate
        if dispatch.block_kernel(x.shape[-2], self.num_heads, features, dtype, dropout_rate, cosine=True) == "pallas":
            # It takes over a second to import.
            from jaxlayers.kernels import pallas_window_block

            has_bias = {"query": self.use_bias, "key": False, "value": self.use_bias, "out": True}
            *found, (out, out_shift) = (
                dense_weights(features, features, use_bias=given, **init, name=name) for name, given in has_bias.items()
            )
            rows = [jnp.zeros(features, self.param_dtype) if row is None else row for _, row in found]
            return pallas_window_block.window_block(
                x.astype(dtype),
                jnp.stack([kernel for kernel, _ in found]),
                jnp.stack(rows),
                out,
                out_shift,
                bias,
                mask,
                scale=scale,
                norm=None if norm is None else norm[:2],
                norm_first=False,
                epsilon=0.0 if norm is None else norm[2],
                residual=residual,
                factor=factor,
                names=names,
            )
        if norm is not None or residual:
            raise ValueError(
                f"norm={norm} must be None and residual={residual} must be False where dispatch takes no "
                "kernel that computes them; norm the result and add to it"
            )
        query, key = (
            dense(use_bias=with_bias, name=name)(x) for name, with_bias in (("query", self.use_bias), ("key", False))
        )

        def normed(x: Array) -> Array:
            # Padding is zero, and so is its key: a norm with a gradient there is needed.
            return safe_normalize(x.astype(wide)).astype(x.dtype)

        if dispatch.window_kernel(x.shape[-2], features // self.num_heads, query.dtype, dropout_rate) == "pallas":
            # It takes over a second to import.
            from jaxlayers.kernels import pallas_window

            query, key = (
                normed(one.reshape(*one.shape[:-1], self.num_heads, -1)).reshape(one.shape) for one in (query, key)
            )
            value, of_value = swin._Projection(features, self.use_bias, self.dtype, **init, name="value")(x)
            shifts = None if of_value is None else jnp.stack([jnp.zeros_like(of_value)] * 2 + [of_value])
            context = pallas_window.window_attention(
                query, key, value, bias, mask, scale=scale, shifts=shifts, names=names
            )
            return dense(name="out")(context)
        value = dense(use_bias=self.use_bias, name="value")(x)
        query, key, value = (
            axes.constrain_heads(split_heads(each, self.num_heads), *names) for each in (query, key, value)
        )
        query, key = normed(query), normed(key)
        # Half the lowest number cannot overflow in the sum.
        blocked = None if mask is None else jnp.where(mask[..., None, :, :], 0.0, 0.5 * jnp.finfo(wide).min)

        def attend(module: nn.Module, query: Array, key: Array, value: Array, bias: Array, scale: Array) -> Array:
            # A cosine rounded to bfloat16 and scaled by up to 100 would be off by 0.2.
            cosine = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=wide)
            logits = cosine * scale[:, None, None]
            logits = logits if blocked is None else logits + blocked.astype(wide)
            weights = attention_weights(logits, bias=bias).astype(value.dtype)
            module.sow("intermediates", "attention_weights", weights)
            weights = nn.Dropout(self.attention_dropout_rate)(weights, deterministic=deterministic)
            return jnp.matmul(weights, value)

        context = remat.attention(attend, self, query, key, value, bias, scale)
        return dense(name="out")(merge_heads(axes.constrain_heads(context, *names)))


class SwinV2Block(nn.Module):
    """Mix tokens within windows by cosine attention, then each token alone, with norms at the ends of the branches.

    z = x + drop(norm(W-MSA(x))), out = z + drop(norm(MLP(z))). W-MSA pads the map with zeros at its ends to multiples
    of the window, rolls it by the shift, attends within windows, rolls it back and only then crops it. A window that
    holds entries from both ends of an axis is masked, so that they do not meet. A branch adds at most the norm's scale
    to the size of a token, whatever its kernels are, so activations do not blow up with depth.

    Symmetry:
      Without a shift exactly equivariant to cyclic translations by whole windows, if the map is a multiple of the
      window; with one only away from the border, where the masks are.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: the window, one entry for each spatial axis (1 to 3 of them); an int means a square of two axes.
        Along an axis not longer than the window, the window is clipped to it and nothing is shifted.
      shift_size: the shift, like `window_size`; the paper uses half the window.
      pretrained_window_size: the window that the position bias was trained for, like `window_size`; `None` measures
        offsets against the window in use, after clipping.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      dropout_rate: dropout after the attention and in the MLP, in [0, 1).
      attention_dropout_rate: dropout of the attention weights, in [0, 1).
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      mask_padding: also keep true tokens from attending to padding. False is what the references do.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`. Its scale starts at zero by default,
        so that a new block is the identity.
      dtype: compute dtype; `None` infers it from input and parameters. Logits, softmax and norms' statistics are in
        float32.
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
      >>> from jaxlayers.window import SwinV2Block
      >>> block = SwinV2Block(num_heads=2, window_size=4, shift_size=2)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 9, 6, 8)

    Source:
      Liu et al., Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022, section 3.2 and figure 1;
      github.com/microsoft/Swin-Transformer.

    Differs:
      Any map size, padded before it is rolled as torchvision and Hugging Face do (the official code takes multiples of
      the window only; timm rolls first, which lets opposite edges of such maps meet). Clipping and shift are decided
      for each axis, as in timm; torchvision pads up to the window instead; official code and Hugging Face stop
      shifting along both axes when one is short. The norm on the main branch after every sixth block, which the paper
      adds for its two largest models (no code or weights of theirs are public), is left out.
    """

    num_heads: int
    window_size: int | tuple[int, ...] = 8
    shift_size: int | tuple[int, ...] = 0
    pretrained_window_size: int | tuple[int, ...] | None = None
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    mask_padding: bool = False
    norm: Callable[..., Any] = zero_layer_norm
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
        rank = len(full_window)
        full_shift, pretrained = (
            (size,) * rank if isinstance(size, int) else size for size in (self.shift_size, self.pretrained_window_size)
        )
        if rank not in axes.SPACE or any(size is not None and len(size) != rank for size in (full_shift, pretrained)):
            raise ValueError(
                f"window_size={self.window_size}, shift_size={self.shift_size} and pretrained_window_size="
                f"{self.pretrained_window_size} must name 1 to 3 axes, equally many; set them"
            )
        batch, size, features = split_shape(x.shape, rank)
        window, amount = fit_window(size, full_window, tuple(full_shift or ()))
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=len(batch))

        split = map_split(x.shape, window)
        rate = 0.0 if deterministic else self.attention_dropout_rate
        # What is dropped out of the result is so before the norm.
        affine = plain_norm(norm, x) if deterministic or not self.dropout_rate else None
        tokens, given = math.prod(window), None
        kernel = dispatch.block_kernel(tokens, self.num_heads, features, x.dtype, rate, cosine=True)
        if affine is not None and kernel == "pallas":
            given = (*norm_weights(features, affine, name="norm1"), affine.epsilon)
        # The sum is in the dtype of the map.
        dtype = nn.dtypes.canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        residual = given is not None and dtype == x.dtype
        factor = drop_path.factor(batch, drop_path_rate, deterministic=deterministic) if residual else None
        y, x = (cut_windows(x, window, amount, split), x) if residual else cut_and_keep(x, window, amount, split)
        y = CosineWindowAttention(
            self.num_heads,
            window_size=window,
            pretrained_window_size=pretrained,
            attention_dropout_rate=self.attention_dropout_rate,
            name="attention",
            **common,
        )(
            y,
            window_mask(size, window, amount, split, mask_padding=self.mask_padding),
            norm=given,
            residual=residual,
            factor=factor,
            names=window_names(split),
            deterministic=deterministic,
        )
        if residual:
            x = join_windows(y, size, window, amount, split)
        elif given is None:
            y = nn.Dropout(self.dropout_rate)(join_windows(y, size, window, amount, split), deterministic=deterministic)
            x = x + drop_path(norm(name="norm1")(y), drop_path_rate, deterministic=deterministic)
        else:
            x = add_windows(x, y, window, amount, split, drop_path, drop_path_rate, deterministic=deterministic)
        x = axes.constrain_map(x, rank)

        feed_forward = functools.partial(
            FeedForward, int(features * self.mlp_ratio), dropout_rate=self.dropout_rate, **common
        )
        x = add_feed_forward(
            x,
            norm,
            feed_forward,
            drop_path,
            drop_path_rate,
            norm_first=False,
            names=(axes.BATCH, *axes.SPACE[rank]),
            deterministic=deterministic,
        )
        return axes.constrain_map(x, rank)


class PatchMergingV2(nn.Module):
    """Halve a map: put each 2 x 2 neighbourhood into the features, reduce it linearly and norm it.

    out[i, j] = norm([x[2i, 2j], x[2i+1, 2j], x[2i, 2j+1], x[2i+1, 2j+1]] W), with W `[4 C, out]` without bias. Odd
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
      >>> from jaxlayers.window import PatchMergingV2
      >>> jax.eval_shape(PatchMergingV2().init_with_output, jax.random.key(0), jnp.ones((1, 5, 6, 8)))[0].shape
      (1, 3, 3, 16)

    Source:
      Liu et al., Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022; the paper does not speak of it,
      github.com/microsoft/Swin-Transformer has it, with its order of the four neighbours.

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
        init: dict[str, Any] = {"param_dtype": self.param_dtype, "kernel_init": self.kernel_init, "name": "reduction"}
        if dispatch.convolves_patches(x.size // width, width // 4, dtype):
            kernel, _ = dense_weights(width, features, use_bias=False, **init)
            x = project_patches(x.astype(dtype), (2, 2), kernel.astype(dtype))
        else:
            x = to_patches(x, (2, 2), first_axis_fastest=True)
            x = nn.Dense(features, use_bias=False, dtype=self.dtype, **init)(x)
        return axes.constrain_map(self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name="post_norm")(x), 2)


class SwinV2(nn.Module):
    """Classify images, or give their feature pyramid, by cosine attention within shifted windows.

    Patches are embedded; stage s is a `PatchMergingV2` (from the second on) and `depths[s]` blocks, of which every
    second has its windows shifted by half; the last map is normed, averaged over space and mapped to logits.

    Symmetry:
      None exactly: patches, windows and padding are tied to the grid. Tokens mix only within a window, so a block's
      output at a token depends on no token outside its window.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the averaged features.
      patch_size: size of a patch, an int or (height, width).
      embed_dim: width C of the first stage; stage s has C 2^s.
      depths: number of blocks of each stage; any number of stages.
      num_heads: number of heads of each stage.
      window_size: an int, (height, width), or one pair a stage. Clipped where a map is smaller, see `SwinV2Block`. May
        be changed without touching a parameter.
      pretrained_window_size: the window that the position bias was trained for, like `window_size`; `None` measures
        offsets against the window in use. Give the old size when a trained model gets a larger window.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      dropout_rate: dropout after the patch embedding, the attention and in the MLPs, in [0, 1).
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      mask_padding: keep tokens from attending to padding, on maps that are not multiples of the window. False is what
        the references do, so take it with their weights.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      scan: run the blocks of a stage as a loop over pairs, which compiles once a stage. The parameters are then stacked
        (see `stack` and `unstack`); outputs are the same, random draws while training differ.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`; those that end a branch with
        `scale_init=` too, so that they start at zero.
      dtype: compute dtype; `None` infers it from input and parameters. Logits, softmax and norms' statistics are in
        float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except that of the patch embedding.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0. No variables besides `params`: indices,
      offsets and masks are constants made from the shape while tracing, so one parameter tree serves every input size
      and every window.

    Cost:
      Linear in the number of pixels. SwinV2-T at 256 x 256: 5.9 G multiply-accumulates with windows of 8, 6.6 G with
      16, and 28.3 M parameters with either.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import SwinV2
      >>> model = SwinV2(num_classes=10, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(SwinV2.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels]
      ((1, 10), [((1, 16, 16, 8), (4, 4)), ((1, 8, 8, 16), (8, 8))])

    Source:
      Liu et al., Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022;
      github.com/microsoft/Swin-Transformer.

    Differs:
      As `SwinV2Block`, `PatchMergingV2` and `PatchEmbed` (whose kernel starts with variance 1 / fan-in). No absolute
      position embedding (off in every published model). Images that are not multiples of the patch are padded with
      zeros, as Hugging Face does.
    """

    num_classes: int = 1000
    patch_size: int | tuple[int, ...] = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: WindowSize = 8
    pretrained_window_size: WindowSize | None = None
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
        num_stages = len(self.depths)
        windows = _per_stage(self.window_size, num_stages, "window_size")
        pretrained: Sequence[tuple[int, int] | None] = (None,) * num_stages
        if self.pretrained_window_size is not None:
            pretrained = _per_stage(self.pretrained_window_size, num_stages, "pretrained_window_size")
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = PatchEmbed(
            self.embed_dim, patch_size=swin._pair(self.patch_size), norm=self.norm, bias_init=self.bias_init, **dtypes
        )
        self.dropout = nn.Dropout(self.dropout_rate)
        stages = []
        for stage, (depth, heads, window) in enumerate(zip(self.depths, self.num_heads, windows, strict=True)):
            block = functools.partial(
                SwinV2Block,
                heads,
                window_size=window,
                pretrained_window_size=pretrained[stage],
                mlp_ratio=self.mlp_ratio,
                dropout_rate=self.dropout_rate,
                mask_padding=self.mask_padding,
                norm=functools.partial(self.norm, scale_init=zeros()),
                **dtypes,
                **init,
            )
            merge = functools.partial(PatchMergingV2, norm=self.norm, kernel_init=self.kernel_init, **dtypes)
            first = sum(self.depths[:stage])
            stages.append(
                swin._Stage(
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
        x = self.patch_embed(x)
        if replace_tokens is not None:
            x = replace_tokens(x)
        x = axes.constrain_map(self.dropout(x, deterministic=deterministic), 2)
        levels = []
        for index, stage in enumerate(self.stages):
            _, x = stage(x, deterministic=deterministic)
            levels.append(Level(x, tuple(length * 2**index for length in swin._pair(self.patch_size))))
        return tuple(levels)


def _per_stage(size: WindowSize, num_stages: int, field: str) -> tuple[tuple[int, int], ...]:
    """Return (height, width) for each stage."""
    if isinstance(size, int):
        return ((size, size),) * num_stages
    pairs: Sequence[Any] = size if isinstance(size[0], tuple) else [size] * num_stages
    if len(pairs) != num_stages or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"{field}={size} must be an int, (height, width), or one such pair for each of the {num_stages} stages; "
            f"set {field}"
        )
    return tuple((height, width) for height, width in pairs)


# Parameter trees ------------------------------------------------------------------------------------------------------


def no_decay(params: Params) -> dict[str, Any]:
    """Return a tree of booleans, true for parameters without weight decay.

    They are biases, norms, the scales of the cosines and all of the position biases' networks.
    """
    return labels.label(params, lambda path, leaf: path[-1] != "kernel" or "position_bias" in path)


def layer_ids(params: Params, model: SwinV2) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `core.labels.pyramid_layer_ids`."""
    return labels.pyramid_layer_ids(params, model.depths)


# Reference checkpoints ------------------------------------------------------------------------------------------------

# Fused projections, whose parts `_split` names.
_TIMM = {
    "patch_embed/projection": "patch_embed.proj",
    "patch_embed/post_norm": "patch_embed.norm",
    "stages/blocks/norm1": "layers.{stage}.blocks.{block}.norm1",
    "stages/blocks/norm2": "layers.{stage}.blocks.{block}.norm2",
    "stages/blocks/attention": "layers.{stage}.blocks.{block}.attn",
    "stages/blocks/attention/query": "layers.{stage}.blocks.{block}.attn.qkv.query",
    "stages/blocks/attention/query/bias": "layers.{stage}.blocks.{block}.attn.q_bias",
    "stages/blocks/attention/key": "layers.{stage}.blocks.{block}.attn.qkv.key",
    "stages/blocks/attention/value": "layers.{stage}.blocks.{block}.attn.qkv.value",
    "stages/blocks/attention/value/bias": "layers.{stage}.blocks.{block}.attn.v_bias",
    "stages/blocks/attention/out": "layers.{stage}.blocks.{block}.attn.proj",
    "stages/blocks/attention/position_bias/up": "layers.{stage}.blocks.{block}.attn.cpb_mlp.0",
    "stages/blocks/attention/position_bias/down": "layers.{stage}.blocks.{block}.attn.cpb_mlp.2",
    "stages/blocks/feed_forward/up": "layers.{stage}.blocks.{block}.mlp.fc1",
    "stages/blocks/feed_forward/down": "layers.{stage}.blocks.{block}.mlp.fc2",
    "stages/merge/reduction": "layers.{stage}.downsample.reduction",
    "stages/merge/post_norm": "layers.{stage}.downsample.norm",
    "final_norm": "norm",
    "head": "head.fc",
}
_OFFICIAL = {
    **_TIMM,
    "stages/merge/reduction": "layers.{before}.downsample.reduction",
    "stages/merge/post_norm": "layers.{before}.downsample.norm",
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
    "stages/blocks/attention/query/bias": "features.{odd}.{block}.attn.qkv.query.bias",
    "stages/blocks/attention/value/bias": "features.{odd}.{block}.attn.qkv.value.bias",
    "stages/blocks/feed_forward/up": "features.{odd}.{block}.mlp.0",
    "stages/blocks/feed_forward/down": "features.{odd}.{block}.mlp.3",
    "stages/merge/reduction": "features.{even}.reduction",
    "stages/merge/post_norm": "features.{even}.norm",
    "final_norm": "norm",
    "head": "head",
}
_LAYER = "swinv2.encoder.layers.{stage}.blocks.{block}"
_HUGGINGFACE = {
    "patch_embed/projection": "swinv2.embeddings.patch_embeddings.projection",
    "patch_embed/post_norm": "swinv2.embeddings.norm",
    "stages/blocks/norm1": f"{_LAYER}.layernorm_before",
    "stages/blocks/norm2": f"{_LAYER}.layernorm_after",
    "stages/blocks/attention": f"{_LAYER}.attention.self",
    "stages/blocks/attention/query": f"{_LAYER}.attention.self.query",
    "stages/blocks/attention/key": f"{_LAYER}.attention.self.key",
    "stages/blocks/attention/value": f"{_LAYER}.attention.self.value",
    "stages/blocks/attention/out": f"{_LAYER}.attention.output.dense",
    "stages/blocks/attention/position_bias/up": f"{_LAYER}.attention.self.continuous_position_bias_mlp.0",
    "stages/blocks/attention/position_bias/down": f"{_LAYER}.attention.self.continuous_position_bias_mlp.2",
    "stages/blocks/feed_forward/up": f"{_LAYER}.intermediate.dense",
    "stages/blocks/feed_forward/down": f"{_LAYER}.output.dense",
    "stages/merge/reduction": "swinv2.encoder.layers.{before}.downsample.reduction",
    "stages/merge/post_norm": "swinv2.encoder.layers.{before}.downsample.norm",
    "final_norm": "swinv2.layernorm",
    "head": "classifier",
}

REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "timm": _TIMM,
    "official": _OFFICIAL,
    "torchvision": _TORCHVISION,
    "huggingface": _HUGGINGFACE,
}
# What references store and we compute; a bias of the keys, which torchvision stores, is zeroed where it is used.
_IGNORED = ("relative_position_index", "relative_coords_table", "attn_mask", "qkv.key.bias")


def from_reference(tensors: Mapping[str, Any], model: SwinV2, *, source: str) -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a reference checkpoint.

    They say nothing of windows: `model.pretrained_window_size` must be what the reference was built with.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for, with `scan=False`; `stack` the result for the other.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    if source not in REFERENCE_NAMES:
        raise ValueError(f"source={source!r} must be one of {sorted(REFERENCE_NAMES)}; pass one of them")
    if model.scan:
        raise ValueError("model.scan=True must be False here; pass model.clone(scan=False) and stack the result")
    stem = f"{REFERENCE_NAMES[source]['patch_embed/projection']}.weight"
    if stem not in tensors:
        raise ValueError(f"a checkpoint of source={source!r} must hold {stem!r}; pass the source it comes from")
    image = jax.ShapeDtypeStruct((1, *swin._pair(model.patch_size), np.shape(tensors[stem])[1]), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return reference.read_reference(_split(tensors), wanted, REFERENCE_NAMES[source], ignored=_IGNORED)


def _split(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Cut fused projections in three, `qkv.weight` into `qkv.query.weight` and so on, and flatten the scales."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith("qkv"):
            for part, rows in zip(("query", "key", "value"), np.split(np.asarray(tensor), 3), strict=True):
                found[f"{module}.{part}.{leaf}"] = rows
        else:
            found[name] = np.reshape(tensor, -1) if leaf == "logit_scale" else np.asarray(tensor)
    return found


def reference_inputs(model: SwinV2) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the least size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *swin._pair(model.patch_size), 3), jnp.float32),)


def _with_key_bias(model: SwinV2, variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the fused biases of torchvision, which have a part for the keys that is zeroed where it is used."""
    return {
        f"features.{2 * stage + 1}.{block}.attn.qkv.bias": (3 * model.embed_dim * 2**stage,)
        for stage, depth in enumerate(model.depths)
        for block in range(depth)
    }


_SCALE = r"attn\.logit_scale$"
# Name: where such files come from, marks, foreign names, fused projections, what else there is.
_MARKS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...], bool, Any]] = {
    "timm": (
        "timm from 0.9 on",
        (rf"^layers\.\d+\.blocks\.0\.{_SCALE}",),
        (r"^layers\.0\.downsample\.", r"^head\.weight$"),
        True,
        None,
    ),
    "official": (
        "github.com/microsoft/Swin-Transformer, and timm before 0.9",
        (rf"^layers\.\d+\.blocks\.0\.{_SCALE}", r"^layers\.0\.downsample\."),
        (r"^head\.fc\.",),
        True,
        None,
    ),
    "torchvision": ("torchvision", (rf"^features\.1\.0\.{_SCALE}",), (), True, _with_key_bias),
    "huggingface": (
        "Hugging Face transformers",
        (r"^swinv2\.encoder\..*attention\.self\.query\.",),
        (r"^decoder\.",),
        False,
        None,
    ),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=SwinV2,
        read=dialects.from_params(from_reference, source=name),
        marks=marks,
        foreign=foreign,
        ignored=swin.COMPUTED,
        layout=dialects.table_layout(
            REFERENCE_NAMES[name],
            shapes={
                "patch_embed/projection/kernel": dialects.patches(),
                "attention/logit_scale": dialects.with_ones(after=2),
            },
            fused=dict.fromkeys(("qkv.query", "qkv.key", "qkv.value"), "qkv") if fused else None,
            extra=extra,
        ),
        head=f"{REFERENCE_NAMES[name]['head']}.weight",
        stem=f"{REFERENCE_NAMES[name]['patch_embed/projection']}.weight",
    )
    for name, (origin, marks, foreign, fused, extra) in _MARKS.items()
)


def _variant(
    embed_dim: int,
    depths: tuple[int, ...],
    drop_path_rate: float,
    size: int,
    window: int,
    *,
    pretrained: tuple[tuple[int, int], ...] | None = None,
    num_classes: int = 1000,
) -> dict[str, Any]:
    return {
        "module": SwinV2,
        "inputs": (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),),
        "num_classes": num_classes,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": tuple(embed_dim // 32 * 2**stage for stage in range(len(depths))),
        "window_size": window,
        "pretrained_window_size": pretrained,
        "drop_path_rate": drop_path_rate,
    }


# Maps of 48, 24, 12 and 6 tokens in pre-training, at 192 pixels: the last window was clipped.
_FROM_192 = ((12, 12), (12, 12), (12, 12), (6, 6))

VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"swin_v2_{name}_window{window}_256": _variant(*shape, 256, window)
        for name, shape in {
            "tiny": (96, (2, 2, 6, 2), 0.2),
            "small": (96, (2, 2, 18, 2), 0.3),
            "base": (128, (2, 2, 18, 2), 0.5),
        }.items()
        for window in (8, 16)
    },
    **{
        f"swin_v2_{name}_{suffix}": _variant(embed_dim, (2, 2, 18, 2), 0.2, size, window, **rest)
        for name, embed_dim in {"base": 128, "large": 192}.items()
        for suffix, size, window, rest in (
            ("window12_192", 192, 12, {"num_classes": 21841}),
            ("window12to16_192to256", 256, 16, {"pretrained": _FROM_192}),
            ("window12to24_192to384", 384, 24, {"pretrained": _FROM_192}),
        )
    },
}


def _from_huggingface(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    fields = swin.huggingface_fields(config)
    windows = tuple(config.get("pretrained_window_sizes", (0,) * len(fields["depths"])))
    # Zero stands for "as the window".
    return "swin_v2_tiny_window8_256", {
        **fields,
        "pretrained_window_size": tuple((size, size) for size in windows) if all(windows) else None,
    }


HUGGINGFACE = {"swinv2": _from_huggingface}
