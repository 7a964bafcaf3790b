"""StyleSwin: a generator whose Swin blocks attend in regular and shifted windows at once, led by a style."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.nn.window_maps import cut_windows, join_windows
from jaxlayers.ops import upfirdn
from jaxlayers.ops.halo import map_split, window_mask, window_names
from jaxlayers.ops.patches import split_shape
from jaxlayers.ops.windows import fit_window, relative_position_bias

_TABLE = "relative_position_bias_table"


def scaled_leaky_relu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return sqrt(2) leaky_relu(x) of slope 0.2, which about keeps the variance of a standard normal."""
    return nn.leaky_relu(x, 0.2) * math.sqrt(2)


def sinusoidal_grid(height: int, width: int, features: int) -> np.ndarray:
    """Return sines and cosines of the place of each pixel, `[height, width, features]`.

    The first half of the features tells the column, the other the row; in each first sines, then cosines of
    n 10000^(-i / (F - 1)), for places n from 1 on and i from 0 to F - 1, with F = features / 4.

    Raises:
      ValueError: if 4 does not divide the features.
    """
    if features % 4 or features < 4:
        raise ValueError(f"features={features} must be a multiple of 4, sines and cosines along two axes; set features")
    rates = 10000.0 ** (-np.arange(features // 4) / max(1, features // 4 - 1))
    rows, columns = (np.arange(1, length + 1)[:, None] * rates for length in (height, width))
    rows, columns = (np.concatenate([np.sin(one), np.cos(one)], axis=-1) for one in (rows, columns))
    shape = (height, width, features // 2)
    return np.concatenate([np.broadcast_to(columns, shape), np.broadcast_to(rows[:, None], shape)], axis=-1)


class EqualizedDense(nn.Module):
    """Map linearly by weights that are stored at unit variance and scaled when used, so that all learn at one rate.

    out = act((rate / sqrt(n)) x W + rate b), with x `[*batch, n]`, W `[n, features]` standard normal over `rate` at the
    start. An optimiser that moves each entry alike, such as Adam, then changes the map `rate` times as fast as one of
    rate 1.

    Attributes:
      features: width of the output.
      rate: learning rate of this layer relative to others.
      activation_fn: the nonlinearity; `None` = none.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W, then divided by `rate`.
      bias_init: initialiser of b.

    Cost:
      n x features multiply-accumulates a vector.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import EqualizedDense
      >>> layer = EqualizedDense(features=5, rate=0.01)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 3)))[0].shape
      (2, 5)

    Source:
      Karras et al., Progressive Growing of GANs for Improved Quality, Stability, and Variation, ICLR 2018, section 4.1;
      github.com/microsoft/StyleSwin.

    Differs:
      none.
    """

    features: int
    rate: float = 1.0
    activation_fn: ActivationFn | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(1.0)
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch features"]:
        """Apply the layer.

        Args:
          x: vectors.

        Returns:
          Vectors of width `features`.

        Raises:
          ValueError: if a field is not positive.
        """
        if self.features < 1 or self.rate <= 0:
            raise ValueError(f"features={self.features} and rate={self.rate} must be positive; set them")

        def kernel_init(*args: Any) -> Array:
            return self.kernel_init(*args) / self.rate

        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = x @ (kernel * (self.rate / math.sqrt(x.shape[-1]))) + bias * self.rate
        return y if self.activation_fn is None else self.activation_fn(y)


class AdaptiveInstanceNorm(nn.Module):
    """Norm each feature of a map over space, then give it the scale and the mean that a style wants.

    out = gamma(s) (x - mean) / sqrt(var + epsilon) + beta(s), mean and (biased) var over the places of one map,
    [gamma, beta] = an `EqualizedDense` of the style s `[*batch, styles]`.

    Symmetry:
      Exactly equivariant to permutations of the places; invariant (but for epsilon) to scaling a feature and adding a
      constant to it.

    Attributes:
      epsilon: added to the variance.
      dtype: compute dtype; `None` infers it from input and parameters. Statistics are in float32 or better.
      param_dtype: dtype of the parameters.

    Cost:
      2 x styles x features multiply-accumulates a map.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import AdaptiveInstanceNorm
      >>> norm, x, style = AdaptiveInstanceNorm(), jnp.ones((2, 4, 4, 6)), jnp.ones((2, 5))
      >>> jax.eval_shape(norm.init_with_output, jax.random.key(0), x, style)[0].shape
      (2, 4, 4, 6)

    Source:
      Huang and Belongie, Arbitrary Style Transfer in Real-Time with Adaptive Instance Normalization, ICCV 2017,
      equation 8; Zhang et al., StyleSwin, CVPR 2022, section 3.2; github.com/microsoft/StyleSwin.

    Differs:
      none.
    """

    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], style: Float[Array, "*batch styles"]
    ) -> Float[Array, "*batch height width features"]:
        """Apply the norm.

        Args:
          x: map, channels last.
          style: one vector a map.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes, or there is not one style a map.
        """
        batch, _, features = split_shape(x.shape, 2)
        if style.shape[:-1] != batch:
            raise ValueError(f"style of shape {style.shape} must be {(*batch, 'styles')}; pass one style a map")
        wanted = EqualizedDense(2 * features, dtype=self.dtype, param_dtype=self.param_dtype, name="style")(style)
        gamma, beta = jnp.split(wanted[..., None, None, :], 2, axis=-1)
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - jnp.mean(wide, axis=(-3, -2), keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=(-3, -2), keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + self.epsilon)).astype(wanted.dtype)
        return gamma * normed + beta


class DoubleWindowAttention(nn.Module):
    """Attend within windows of a map, some heads in regular windows and the others in shifted ones, in one layer.

    Head h: softmax(Q_h K_h^T / sqrt(d) + B_h) V_h over the tokens of a window; the first heads have windows that begin
    at the map's corner, the last `shifted_heads` ones such that begin `shift_size` further. The outputs of all heads
    are concatenated and mapped linearly. B_h is read from a table of relative positions.

    A shifted window that holds entries from both ends of an axis is masked, so that they do not meet.

    Symmetry:
      Without shifted heads exactly equivariant to cyclic translations by whole windows, if the map is a multiple of
      them; with such heads only away from the border, where the masks are.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: side of the square window; along an axis not longer than it, it is clipped and nothing is shifted.
      shift_size: the shift; `None` = half the window.
      shifted_heads: number of heads with shifted windows; `None` = half of them (rounded down).
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
      table_init: initialiser of the table of relative positions, such as `ops.windows.local_position_table`.

    Cost:
      4 C^2 + 2 M^2 C multiply-accumulates a token of width C, with M^2 tokens a window: that of one window attention.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import DoubleWindowAttention
      >>> layer = DoubleWindowAttention(num_heads=4, window_size=4)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 8)))[0].shape
      (1, 8, 8, 8)

    Source:
      Zhang et al., StyleSwin: Transformer-based GAN for High-resolution Image Generation, CVPR 2022, section 3.2 (read
      from the code, github.com/microsoft/StyleSwin).

    Differs:
      Q, K and V come from three products instead of one cut in three, and both halves share one table with a column a
      head (`from_reference` cuts and joins). Masked logits are excluded exactly instead of lowered by 100. A map that
      is no multiple of the window is padded, and no token attends to padding; the official code refuses it.
    """

    num_heads: int
    window_size: int = 8
    shift_size: int | None = None
    shifted_heads: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()
    table_init: Initializer = truncated_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch height width features"]:
        """Attend.

        Args:
          x: map, channels last.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes, the heads do not divide the features, or shift or number of
            shifted heads are out of range.
        """
        _, size, features = split_shape(x.shape, 2)
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        shifted_heads = self.num_heads // 2 if self.shifted_heads is None else self.shifted_heads
        if not 0 <= shifted_heads <= self.num_heads:
            raise ValueError(
                f"shifted_heads={shifted_heads} must lie in [0, num_heads={self.num_heads}]; set shifted_heads"
            )
        full = (self.window_size,) * 2
        window, shift = fit_window(size, full, (self._shift(),) * 2)
        split = map_split(x.shape, window)
        names = window_names(split)
        dense = functools.partial(
            nn.Dense,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        projected = [dense(name=name)(x) for name in ("query", "key", "value")]
        rows = (2 * self.window_size - 1) ** 2
        table = learned_table(
            self,
            _TABLE,
            self.table_init,
            (rows, self.num_heads),
            self.param_dtype,
            size=f"window_size={self.window_size}",
        )
        bias = relative_position_bias(table, window, full).astype(at_least_float32(projected[0].dtype))
        bias = axes.constrain(bias, axes.HEADS, None, None)
        scale = (features // self.num_heads) ** -0.5

        def attend(heads: slice, amount: tuple[int, ...]) -> Array:
            count = len(range(*heads.indices(self.num_heads)))
            part = slice(*(index * features // self.num_heads for index in (heads.start, heads.stop)))
            query, key, value = (
                axes.constrain_heads(split_heads(cut_windows(one[..., part], window, amount, split), count), *names)
                for one in projected
            )
            mask = window_mask(size, window, amount, split, mask_padding=True)
            blocked = None if mask is None else jnp.where(mask[..., None, :, :], 0.0, 0.5 * jnp.finfo(query.dtype).min)

            def core(module: nn.Module, query: Array, key: Array, value: Array, bias: Array) -> Array:
                logits = jnp.matmul(query * scale, jnp.swapaxes(key, -1, -2))
                logits = logits if blocked is None else logits + blocked.astype(logits.dtype)
                return jnp.matmul(attention_weights(logits, bias=bias), value)

            context = remat.attention(core, self, query, key, value, bias[heads])
            return join_windows(merge_heads(axes.constrain_heads(context, *names)), size, window, amount, split)

        regular = self.num_heads - shifted_heads
        groups = [(slice(0, regular), (0, 0)), (slice(regular, self.num_heads), shift)]
        mixed = [attend(heads, amount) for heads, amount in groups if heads.start < heads.stop]
        return axes.constrain_map(dense(name="out")(jnp.concatenate(mixed, axis=-1)))

    def _shift(self) -> int:
        return self.window_size // 2 if self.shift_size is None else self.shift_size


class StyleSwinBlock(nn.Module):
    """Mix tokens within regular and shifted windows, then each token alone, both led by a style.

    z = x + A(AdaIN(x, s)), out = z + MLP(AdaIN(z, s)), with A a `DoubleWindowAttention` and s the style.

    Symmetry:
      As `DoubleWindowAttention`.

    Attributes:
      num_heads: number of heads; must divide the features.
      window_size: side of the window.
      shift_size: shift of half of the heads; `None` = half the window.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, but for those that read the style.
      bias_init: initialiser of the biases, but for the same.
      table_init: initialiser of the attention's table of relative positions.

    Cost:
      (4 + 2 mlp_ratio) C^2 + 2 M^2 C multiply-accumulates a token of width C, with M^2 tokens a window.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import StyleSwinBlock
      >>> block, x, style = StyleSwinBlock(num_heads=2, window_size=4), jnp.ones((1, 8, 8, 8)), jnp.ones((1, 5))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), x, style)[0].shape
      (1, 8, 8, 8)

    Source:
      Zhang et al., StyleSwin: Transformer-based GAN for High-resolution Image Generation, CVPR 2022, section 3.2 (read
      from the code, github.com/microsoft/StyleSwin).

    Differs:
      As `DoubleWindowAttention`. No dropout: the reference has rates, and leaves them zero.
    """

    num_heads: int
    window_size: int = 8
    shift_size: int | None = None
    mlp_ratio: float = 4.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()
    table_init: Initializer = truncated_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], style: Float[Array, "*batch styles"]
    ) -> Float[Array, "*batch height width features"]:
        """Apply the block.

        Args:
          x: map, channels last.
          style: one vector a map.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes, or a field does not fit the features or the window.
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        attention = DoubleWindowAttention(
            self.num_heads,
            self.window_size,
            shift_size=self.shift_size,
            table_init=self.table_init,
            name="attention",
            **common,
        )
        x = axes.constrain_map(x + attention(AdaptiveInstanceNorm(name="norm1", **dtypes)(x, style)))
        hidden = FeedForward(int(x.shape[-1] * self.mlp_ratio), name="feed_forward", **common)
        return axes.constrain_map(x + hidden(AdaptiveInstanceNorm(name="norm2", **dtypes)(x, style)))


class StyleSwin(nn.Module):
    """Generate pictures from latent vectors, from 4 x 4 pixels up to the whole size.

    w = f(z / rms(z)), f a perceptron; x_0 a learned constant `[4, 4, features[0]]`. Stage i: x = blocks(x, w), where
    the last stage is not left, x = norm(bilinear(x)) W + alpha P with sines and cosines P of the place, which doubles
    the map. Each stage adds a linear image of its x to the picture so far, which a binomial filter doubles.

    Symmetry:
      None: constant, windows and positions are tied to the map.

    Attributes:
      features: width of each stage, coarsest first; pictures have 4 * 2**(stages - 1) pixels along an axis.
      num_heads: number of heads of each stage.
      out_features: channels of the pictures.
      style_features: width of w and of the layers of f.
      mapping_depth: number of layers of f.
      mapping_rate: learning rate of f relative to all else.
      depth: blocks of each stage.
      window_size: side of the window; at most the map.
      shift_size: shift of half of the heads; `None` = half the window, 0 = windows that never shift.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels of attentions, MLPs and upsampling.
      bias_init: initialiser of the biases.
      table_init: initialiser of the tables of relative positions.

    Cost:
      Linear in the number of pixels. At 256 x 256 with the widths of `styleswin_256_x2` 95.6 G multiply-accumulates and
      48.9 M parameters. The backward pass of `styleswin_1024` keeps 13.6 GiB a picture in float32, 1.3 GiB with blocks
      recomputed ("full"), and besides what one block needs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import StyleSwin
      >>> model = StyleSwin(features=(8, 8, 8), num_heads=(2, 2, 2), style_features=8, mapping_depth=2)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 8)))[0].shape
      (2, 16, 16, 3)

    Source:
      Zhang et al., StyleSwin: Transformer-based GAN for High-resolution Image Generation, CVPR 2022 (read from the
      code, github.com/microsoft/StyleSwin).

    Differs:
      As `DoubleWindowAttention`. The latent vector may have another length than w. Truncation is the user's:
      `synthesize(mean + psi * (map_latent(z) - mean))`. Spectral normalisation of the discriminator, which the
      published recipes use beside R1, is not there, see `WaveletDiscriminator`.
    """

    features: tuple[int, ...] = (512, 512, 512, 512, 256, 128, 64)
    num_heads: tuple[int, ...] = (16, 16, 16, 16, 8, 4, 4)
    out_features: int = 3
    style_features: int = 512
    mapping_depth: int = 8
    mapping_rate: float = 0.01
    depth: int = 2
    window_size: int = 8
    shift_size: int | None = None
    mlp_ratio: float = 4.0
    remat: str | bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()
    table_init: Initializer = truncated_normal()

    def setup(self) -> None:
        """Make the parts."""
        if len(self.features) != len(self.num_heads) or not self.features:
            raise ValueError(
                f"features={self.features} and num_heads={self.num_heads} must have one entry a stage; set both"
            )
        if self.mapping_depth < 1 or self.depth < 1:
            raise ValueError(f"mapping_depth={self.mapping_depth} and depth={self.depth} must be positive; set them")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.mapping_layers = [
            EqualizedDense(self.style_features, rate=self.mapping_rate, activation_fn=scaled_leaky_relu, **dtypes)
            for _ in range(self.mapping_depth)
        ]
        self.constant = self.param("constant", nn.initializers.normal(1.0), (4, 4, self.features[0]), self.param_dtype)
        stages, to_rgbs = [], []
        for index, heads in enumerate(self.num_heads):
            last = index == len(self.features) - 1
            block = functools.partial(
                StyleSwinBlock,
                heads,
                window_size=min(self.window_size, 4 * 2**index),
                shift_size=None if self.shift_size is None else min(self.shift_size, 2 * 2**index),
                mlp_ratio=self.mlp_ratio,
                table_init=self.table_init,
                **common,
            )
            wider = None if last else self.features[index + 1]
            stages.append(_Stage(block, self.depth, wider, self.remat, **dtypes, kernel_init=self.kernel_init))
            to_rgbs.append(_ToRGB(self.out_features, **dtypes, bias_init=self.bias_init))
        self.stages, self.to_rgbs = stages, to_rgbs

    def __call__(self, latent: Float[Array, "*batch latent"]) -> Float[Array, "*batch height width channels"]:
        """Generate.

        Args:
          latent: standard normal vectors.

        Returns:
          Pictures, channels last, not confined to any range.

        Raises:
          ValueError: if a field does not fit.
        """
        return self.synthesize(self.map_latent(latent))

    def map_latent(self, latent: Float[Array, "*batch latent"]) -> Float[Array, "*batch styles"]:
        """Return the style w of each latent vector."""
        wide = latent.astype(at_least_float32(latent.dtype))
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-8)
        x = (wide * rms).astype(latent.dtype)
        for layer in self.mapping_layers:
            x = layer(x)
        return x

    def synthesize(
        self, style: Float[Array, "*batch styles"], mixed: Mapping[int, Float[Array, "*batch styles"]] | None = None
    ) -> Float[Array, "*batch height width channels"]:
        """Return the picture of a style.

        Args:
          style: w for every block.
          mixed: other styles by the number of the block, counted from 0 through all stages.
        """
        styles = [(mixed or {}).get(index, style) for index in range(self.depth * len(self.features))]
        constant = self.constant.astype(style.dtype if self.dtype is None else self.dtype)
        x = axes.constrain_map(jnp.broadcast_to(constant, (*style.shape[:-1], *constant.shape)))
        picture = None
        for index, (stage, to_rgb) in enumerate(zip(self.stages, self.to_rgbs, strict=True)):
            x = stage(x, styles[self.depth * index :][: self.depth])
            shown = to_rgb(x)
            if picture is not None and picture.shape != shown.shape:
                picture = upfirdn.upsample(picture)
            picture = axes.constrain_map(shown if picture is None else picture + shown)
        assert picture is not None  # there is at least one stage
        return picture


class _Stage(nn.Module):
    """A chain of blocks, then twice the size unless it is the last.

    Attributes:
      block: makes a block.
      depth: number of blocks.
      out_features: width after upsampling; `None` = no upsampling.
      remat: what of each block is recomputed in the backward pass.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the reduction.
    """

    block: Any
    depth: int
    out_features: int | None
    remat: str | bool
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array, styles: list[Array]) -> Array:
        def call(block: nn.Module, x: Array, style: Array) -> Array:
            return block(x, style)

        for index, style in enumerate(styles):
            x = remat.remat_block(call, self.remat)(self.block(name=f"blocks_{index}"), x, style)
        if self.out_features is None:
            return x
        return _Upsample(self.out_features, self.dtype, self.param_dtype, self.kernel_init, name="upsample")(x)


class _Upsample(nn.Module):
    """Double a map bilinearly, norm and reduce it, and add what tells the place.

    Attributes:
      out_features: width of the output.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the reduction.
    """

    out_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.LayerNorm(epsilon=1e-5, name="norm", **dtypes)(upfirdn.upsample_bilinear(x))
        x = nn.Dense(self.out_features, use_bias=False, kernel_init=self.kernel_init, name="reduction", **dtypes)(x)
        alpha = self.param("alpha", zeros(), (), self.param_dtype)
        places = sinusoidal_grid(x.shape[-3], x.shape[-2], self.out_features)
        return axes.constrain_map(x + (jnp.asarray(places, x.dtype) * alpha.astype(x.dtype)))


class _ToRGB(nn.Module):
    """Map features to the colours of a picture.

    Attributes:
      out_features: number of colours.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      bias_init: initialiser of the biases.
    """

    out_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # A normal of 0.02 sqrt(2 / (in + out)), so that the first pictures are all but black.
        small = nn.initializers.variance_scaling(0.02**2, "fan_avg", "normal")
        x = nn.Dense(
            self.out_features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=small,
            bias_init=self.bias_init,
            name="projection",
        )(x)
        # The reference has two biases here.
        return x + self.param("bias", self.bias_init, (self.out_features,), self.param_dtype).astype(x.dtype)


# Parameter trees ------------------------------------------------------------------------------------------------------

REFERENCE_NAMES: Mapping[str, str] = {
    "mapping_layers": "mapping.{mapping_layer}",
    "constant": "constant",
    "stages/blocks/norm1/style": "layers.{stage}.blocks.{block}.norm1.style",
    "stages/blocks/norm2/style": "layers.{stage}.blocks.{block}.norm2.style",
    **{
        f"stages/blocks/attention/{part}": f"layers.{{stage}}.blocks.{{block}}.{part}"
        for part in ("query", "key", "value")
    },
    "stages/blocks/attention/out": "layers.{stage}.blocks.{block}.proj",
    f"stages/blocks/attention/{_TABLE}": f"layers.{{stage}}.blocks.{{block}}.{_TABLE}",
    "stages/blocks/feed_forward/up": "layers.{stage}.blocks.{block}.mlp.fc1",
    "stages/blocks/feed_forward/down": "layers.{stage}.blocks.{block}.mlp.fc2",
    "stages/upsample/norm": "layers.{stage}.upsample.norm",
    "stages/upsample/reduction": "layers.{stage}.upsample.reduction",
    "stages/upsample/alpha": "layers.{stage}.upsample.alpha",
    "to_rgbs/projection": "to_rgbs.{to_rgb}.conv",
    "to_rgbs/bias": "to_rgbs.{to_rgb}.bias",
}
"""Our modules, and where the official checkpoint keeps them once `from_reference` has renamed and cut some of it."""

_COMPUTED = ("attn_mask1", "attn_mask2", "relative_position_index", "_float_tensor", ".kernel")


def from_reference(tensors: Mapping[str, Any], model: StyleSwin) -> dict[str, Any]:
    """Return the parameters of `model` from the state dict of an official generator, converted to NumPy.

    Args:
      tensors: arrays by name, such as `g_ema` of a published checkpoint.
      model: a module with the fields of that checkpoint.

    Returns:
      The parameter tree.

    Raises:
      ValueError: if names or shapes are not those of the model.
    """
    renamed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        parts = name.split(".")
        if parts[0] == "style" and len(parts) == 3:  # entry 0 is the norm of the latent vector
            renamed[f"mapping.{int(parts[1]) - 1}.{parts[2]}"] = array
        elif name == "input.input":
            renamed["constant"] = np.moveaxis(array[0], 0, -1)
        elif parts[-1] == _TABLE:  # of the regular heads, then of the shifted ones
            if parts[-2] == "0":
                shifted = np.asarray(tensors[name.replace(".attn.0.", ".attn.1.")])
                renamed[name.replace(".attn.0.", ".")] = np.concatenate([array, shifted], axis=1)
        else:
            renamed[name] = array
    width = renamed["mapping.0.weight"].shape[1] if "mapping.0.weight" in renamed else model.style_features
    wanted = dialects.shapes_of(model, (jax.ShapeDtypeStruct((1, width), jnp.float32),))["params"]
    return reference.read_reference(reference.split_fused(renamed), wanted, REFERENCE_NAMES, ignored=_COMPUTED)


def reference_inputs(model: StyleSwin) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, model.style_features), jnp.float32),)


def _named_their_way(name: str) -> str:
    name = "input.input" if name == "constant" else name
    return re.sub(r"^mapping\.(\d+)", lambda found: f"style.{int(found[1]) + 1}", name)


_whole_layout = dialects.table_layout(
    REFERENCE_NAMES,
    shapes={
        "constant": lambda model, ours: (1, ours[2], *ours[:2]),
        "upsample/alpha": dialects.with_ones(after=1),
        "to_rgbs/projection/kernel": dialects.pointwise(),
        "to_rgbs/bias": lambda model, ours: (1, *ours, 1, 1),
    },
    fused=dict.fromkeys(("query", "key", "value"), "qkv"),
    rename=_named_their_way,
)


def _layout(model: StyleSwin, variables: Mapping[str, Any]) -> dialects.Layout:
    """Return shape by name, with a table each for the regular and the shifted heads."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in _whole_layout(model, variables).items():
        if name.endswith(_TABLE):
            for half in range(2):
                found[name.replace(_TABLE, f"attn.{half}.{_TABLE}")] = (shape[0], shape[1] // 2)
        else:
            found[name] = shape
    return found


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/microsoft/StyleSwin, `g_ema` of its files",
        module=StyleSwin,
        read=dialects.from_params(from_reference),
        marks=(r"^input\.input$", r"^to_rgbs\.0\.conv\.weight$", r"^layers\.0\.blocks\.0\.attn\.0\."),
        ignored={
            r"attn_mask[12]$": "a mask that follows from the size of the map",
            r"relative_position_index$": "an index that follows from the window",
            r"_float_tensor$": "an empty tensor that tells the device",
            r"\.kernel$": "the filter of an upsampling, which is not learned",
        },
        layout=_layout,
    ),
)


def _variant(size: int, multiplier: int) -> dict[str, Any]:
    """Return a published model; widths of the coarse stages are alike, those of the fine ones fall."""
    stages = int(math.log2(size)) - 1
    widths = (512, 512, 512, 512, *(width * multiplier for width in (256, 128, 64, 32, 16)))[:stages]
    return {
        "module": StyleSwin,
        "features": widths,
        "num_heads": tuple(max(width // 32, 4) for width in widths),
        "inputs": (jax.ShapeDtypeStruct((1, 512), jnp.float32),),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "styleswin_256": _variant(256, 1),
    "styleswin_256_x2": _variant(256, 2),
    "styleswin_1024": _variant(1024, 1),
}
