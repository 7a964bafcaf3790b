"""The blocks of MAXIM: gated perceptrons over windows and grids, cross-gating, channel and supervised attention."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.initializers import lecun_normal, ones, zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.ops.patches import split_shape
from jaxlayers.ops.windows import merge_grid, merge_windows, partition_grid, partition_windows

small_normal = nn.initializers.normal(0.02)
_layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)
_tanh_gelu = functools.partial(nn.gelu, approximate=True)


class SpatialGatingUnit(nn.Module):
    """Gate half of the features by a linear map, over the tokens of a part, of the other half.

    out[t] = u[t] * (1 + b[t] + sum_s M[s, t] norm(v)[s]), with u and v the first and the second half of the features,
    and M `[tokens, tokens]`, b `[tokens]` the same for all features and all parts.

    Symmetry:
      Exactly equivariant to permutations of the parts. With M = b = 0 the first half passes unchanged.

    Attributes:
      dtype: compute dtype; `None` infers it from input and parameters. The norm's statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of M; small, so that gates start near one.
      bias_init: initialiser of b.

    Cost:
      tokens x features / 2 multiply-accumulates a token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.maxim_blocks import SpatialGatingUnit
      >>> jax.eval_shape(SpatialGatingUnit().init_with_output, jax.random.key(0), jnp.ones((1, 6, 16, 8)))[0].shape
      (1, 6, 16, 4)

    Source:
      Tu et al., MAXIM: Multi-Axis MLP for Image Processing, CVPR 2022; Liu et al., Pay Attention to MLPs, NeurIPS
      2021; github.com/google-research/maxim, of which abstract and code were read.

    Differs:
      none.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = small_normal
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch tokens features"]) -> Float[Array, "*batch tokens half"]:
        """Gate.

        Args:
          x: tokens of each part.

        Returns:
          Tokens of half the width.

        Raises:
          ValueError: if the number of features is odd.
        """
        if x.shape[-1] % 2:
            raise ValueError(f"features={x.shape[-1]} must be even, one half gates the other; set an even width")
        u, v = jnp.split(x, 2, axis=-1)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        v = _layer_norm(name="norm", **dtypes)(v)
        v = _MixTokens(kernel_init=self.kernel_init, bias_init=self.bias_init, name="mix", **dtypes)(v)
        return u * (v + 1)


class MultiAxisGatedMlp(nn.Module):
    """Mix half of the features within windows, the other half across a grid over the whole map, by gated perceptrons.

    (u, v) = act(norm(x) W_up + b_up), out = x + [G(u), B(v)] W_down + b_down, where G and B are
    y = z + gate(act(norm(z) W_in)) W_out within parts: B's are windows of P x P neighbours, G's what a grid of G x G
    cells laid over the map has at one place of every cell; `gate` is `SpatialGatingUnit`, act GELU (tanh form). The
    matrices over space have the size of a part, not of the map, so the block takes any map whose size is a multiple of
    both.

    Symmetry:
      B is exactly equivariant to cyclic translations by whole windows, G to permutations of the places within a cell,
      done alike in all cells; the block to neither. With W_down = b_down = 0 it is the identity.

    Attributes:
      window_size: P, an int or (height, width).
      grid_size: G, the number of cells, an int or (height, width).
      expand_ratio: width of u and v together, in multiples of the features.
      mlp_ratio: width within G and B before the gate, in multiples of that of u.
      dtype: compute dtype; `None` infers it from input and parameters. The norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of all kernels.
      bias_init: initialiser of the biases.

    Cost:
      With width C, e = expand_ratio and m = mlp_ratio: e C^2 (2 + 3 e m / 4) + e m C (P^2 + G^2) / 4
      multiply-accumulates a pixel: linear in the pixels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.maxim_blocks import MultiAxisGatedMlp
      >>> layer = MultiAxisGatedMlp(window_size=4, grid_size=2)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 8, 12, 6)))[0].shape
      (1, 8, 12, 6)

    Source:
      Tu et al., MAXIM: Multi-Axis MLP for Image Processing, CVPR 2022; github.com/google-research/maxim, of which
      abstract and code were read.

    Differs:
      No dropout, whose rate is 0 in all official variants.
    """

    window_size: int | tuple[int, int] = 16
    grid_size: int | tuple[int, int] = 16
    expand_ratio: float = 2.0
    mlp_ratio: float = 2.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = small_normal
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch height width features"]:
        """Mix.

        Args:
          x: map, channels last; height and width multiples of `window_size` and `grid_size`.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if the map is not such a multiple, or a ratio leaves no features to split.
        """
        features = x.shape[-1]
        width = _check_parts(x.shape, self.window_size, self.grid_size, int(features * self.expand_ratio))
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        y = _layer_norm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x)
        y = _tanh_gelu(nn.Dense(width, name="up", **common)(y))
        u, v = jnp.split(y, 2, axis=-1)
        u = _over_parts(_GatedMlp(self.mlp_ratio, name="grid", **common), u, self.grid_size, grid=True)
        v = _over_parts(_GatedMlp(self.mlp_ratio, name="block", **common), v, self.window_size, grid=False)
        y = nn.Dense(features, name="down", **common)(jnp.concatenate([u, v], axis=-1))
        return axes.constrain_map(x + y)


class ResidualChannelAttention(nn.Module):
    """Mix features, or neighbours, and weigh the features of the result by what the whole map holds.

    out = x + y sigmoid(MLP(mean(y))), y = M(norm(x)), mean over space, the MLP with ReLU. M is two 3 x 3 convolutions
    with a leaky ReLU (slope 0.2) between them, or, with `dense=True`, a perceptron of each pixel with GELU.

    Symmetry:
      `dense`: exactly equivariant to permutations of the pixels. Else none exactly: zeros lie outside the map.

    Attributes:
      dense: mix features alone, not neighbours.
      squeeze_ratio: width of the MLP that weighs, in multiples of the features (at least 1 feature).
      dtype: compute dtype; `None` infers it from input and parameters. The norm's statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      18 C^2 multiply-accumulates a pixel of width C, or 2 C^2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.maxim_blocks import ResidualChannelAttention
      >>> layer = ResidualChannelAttention()
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 5, 7, 8)))[0].shape
      (1, 5, 7, 8)

    Source:
      Zhang et al., Image Super-Resolution Using Very Deep Residual Channel Attention Networks, ECCV 2018; as built in
      github.com/google-research/maxim (`RCAB` and `RDCAB`).

    Differs:
      No dropout, whose rate is 0 in all official variants. `dense` starts from the same initialiser as the rest;
      officially from a normal of deviation 0.02.
    """

    dense: bool = False
    squeeze_ratio: float = 0.25
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch height width features"]:
        """Apply the block.

        Args:
          x: map of any size, channels last.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes.
        """
        _, _, features = split_shape(x.shape, 2)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        y = _layer_norm(name="norm", **dtypes)(x)
        if self.dense:
            y = nn.Dense(features, name="down", **common)(_tanh_gelu(nn.Dense(features, name="up", **common)(y)))
        else:
            y = nn.leaky_relu(nn.Conv(features, (3, 3), name="convolution1", **common)(y), 0.2)
            y = nn.Conv(features, (3, 3), name="convolution2", **common)(y)
        hidden = max(1, int(features * self.squeeze_ratio))
        weight = nn.relu(nn.Dense(hidden, name="squeeze", **common)(jnp.mean(y, axis=(-3, -2), keepdims=True)))
        weight = nn.sigmoid(nn.Dense(features, name="excite", **common)(weight))
        return axes.constrain_map(x + y * weight)


class CrossGating(nn.Module):
    """Let two maps gate each other by what their windows and grids hold.

    x' = x W_x, y' = y W_y (both with bias, of equal width); a = act(norm(x') A_x), b = act(norm(y') A_y);
    y_out = y' + (b g_x(a)) B_y, x_out = x' + y_out + (a g_y(b)) B_x, where g splits the features of act(norm(a) W) in
    half, applies one matrix over each grid's tokens and one over each window's, and projects both back, see
    `MultiAxisGatedMlp`.

    Symmetry:
      None exactly: windows and grid are tied to the map.

    Attributes:
      features: width of both outputs.
      window_size: P, an int or (height, width).
      grid_size: number of cells of the grid, an int or (height, width).
      upsample: `y` has half the size of `x`, and is first doubled by a transposed convolution.
      dtype: compute dtype; `None` infers it from input and parameters. The norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels over features.
      mix_init: initialiser of the matrices over space, whose biases start at one: gates start open.
      bias_init: initialiser of the other biases.

    Cost:
      With width C and inputs of C_x and C_y: 12 C^2 + 2 C (P^2 + G^2) + C (C_x + C_y) multiply-accumulates a pixel, and
      C (C + C_y) in place of C C_y with `upsample`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.maxim_blocks import CrossGating
      >>> layer = CrossGating(8, window_size=2, grid_size=2, upsample=True)
      >>> x, y = jnp.ones((1, 4, 8, 3)), jnp.ones((1, 2, 4, 6))
      >>> [out.shape for out in jax.eval_shape(layer.init_with_output, jax.random.key(0), x, y)[0]]
      [(1, 4, 8, 8), (1, 4, 8, 8)]

    Source:
      Tu et al., MAXIM: Multi-Axis MLP for Image Processing, CVPR 2022; github.com/google-research/maxim, of which
      abstract and code were read.

    Differs:
      No dropout, whose rate is 0 in all official variants.
    """

    features: int
    window_size: int | tuple[int, int] = 16
    grid_size: int | tuple[int, int] = 16
    upsample: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    mix_init: Initializer = small_normal
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        y: Float[Array, "*batch other_height other_width other_channels"],
    ) -> tuple[Float[Array, "*batch height width features"], Float[Array, "*batch height width features"]]:
        """Gate.

        Args:
          x: map, channels last; height and width multiples of `window_size` and `grid_size`.
          y: map of the same size, or of half of it with `upsample`.

        Returns:
          Both maps, gated; the first one holds the second too.

        Raises:
          ValueError: if the sizes do not fit.
        """
        if self.features < 1:
            raise ValueError(f"features={self.features} must be positive; set features")
        factor = 2 if self.upsample else 1
        size = tuple(factor * length for length in split_shape(y.shape, 2)[1])
        if size != split_shape(x.shape, 2)[1]:
            raise ValueError(
                f"a map of shape {y.shape} must have {'half ' if self.upsample else ''}the size of that of shape "
                f"{x.shape}; set upsample or pass other maps"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        dense = functools.partial(nn.Dense, self.features, **common)
        if self.upsample:
            y = nn.ConvTranspose(self.features, (2, 2), (2, 2), name="enlarge", **common)(y)
        x, y = dense(name="project_x")(x), dense(name="project_y")(y)
        opened = {
            name: _tanh_gelu(dense(name=f"in_{name}")(_layer_norm(name=f"norm_{name}", **dtypes)(z)))
            for name, z in (("x", x), ("y", y))
        }
        gates = {
            name: _AxisGates(self.window_size, self.grid_size, mix_init=self.mix_init, name=f"gate_{name}", **common)(z)
            for name, z in opened.items()
        }
        y = y + dense(name="out_y")(opened["y"] * gates["x"])
        x = x + y + dense(name="out_x")(opened["x"] * gates["y"])
        return axes.constrain_map(x), axes.constrain_map(y)


class SupervisedAttention(nn.Module):
    """Make a picture of features, and weigh the features by what the picture shows, for the next stage.

    picture = given + conv(x), out = x + conv(x) sigmoid(conv(picture)), with 3 x 3 convolutions.

    Symmetry:
      Equivariant to translations but for the border, outside of which are zeros.

    Attributes:
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      9 C (C + 2 c) multiply-accumulates a pixel, with features of width C and a picture of c channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.maxim_blocks import SupervisedAttention
      >>> layer = SupervisedAttention()
      >>> x, picture = jnp.ones((1, 4, 8, 6)), jnp.ones((1, 4, 8, 3))
      >>> [out.shape for out in jax.eval_shape(layer.init_with_output, jax.random.key(0), x, picture)[0]]
      [(1, 4, 8, 6), (1, 4, 8, 3)]

    Source:
      Zamir et al., Multi-Stage Progressive Image Restoration, CVPR 2021; as built in github.com/google-research/maxim.

    Differs:
      The given picture is added whatever its number of channels; officially of three channels only.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], picture: Float[Array, "*batch height width channels"]
    ) -> tuple[Float[Array, "*batch height width features"], Float[Array, "*batch height width channels"]]:
        """Apply the module.

        Args:
          x: features.
          picture: the given picture, of the same size.

        Returns:
          The weighed features, and the new picture.

        Raises:
          ValueError: if the sizes differ.
        """
        if split_shape(x.shape, 2)[:2] != split_shape(picture.shape, 2)[:2]:
            raise ValueError(f"a picture of shape {picture.shape} must have the size of features of shape {x.shape}")
        convolve = functools.partial(
            nn.Conv,
            kernel_size=(3, 3),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        # Without being told here, XLA's partitioner counts this kernel's gradient twice where the batch is split.
        shown = axes.constrain_map(picture + convolve(picture.shape[-1], name="picture")(x))
        weight = nn.sigmoid(convolve(x.shape[-1], name="attention")(shown))
        return axes.constrain_map(x + convolve(x.shape[-1], name="features")(x) * weight), shown


class _GatedMlp(nn.Module):
    """Perceptron with a gate over the tokens of each part, and a skip.

    Attributes:
      mlp_ratio: width before the gate, in multiples of the features.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
    """

    mlp_ratio: float
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        hidden = int(x.shape[-1] * self.mlp_ratio)
        if hidden < 2:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must leave two halves of {x.shape[-1]} features; set it")
        y = _tanh_gelu(nn.Dense(hidden, name="up", **common)(_layer_norm(name="norm", **dtypes)(x)))
        y = SpatialGatingUnit(name="gate", **common)(y)
        return x + nn.Dense(x.shape[-1], name="down", **common)(y)


class _AxisGates(nn.Module):
    """Gates of one map: half of the features mixed over a grid's tokens, half over windows'.

    Attributes:
      window_size: windows.
      grid_size: cells of the grid.
      mix_init: initialiser of the matrices over space.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases of the projections.
    """

    window_size: int | tuple[int, int]
    grid_size: int | tuple[int, int]
    mix_init: Initializer
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        width = _check_parts(x.shape, self.window_size, self.grid_size, 2 * features)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        y = _tanh_gelu(nn.Dense(width, name="up", **common)(_layer_norm(name="norm", **dtypes)(x)))
        u, v = jnp.split(y, 2, axis=-1)
        mix = functools.partial(_MixTokens, kernel_init=self.mix_init, bias_init=ones(), **dtypes)
        u = _over_parts(mix(name="grid"), u, self.grid_size, grid=True)
        v = _over_parts(mix(name="block"), v, self.window_size, grid=False)
        return nn.Dense(features, name="down", **common)(jnp.concatenate([u, v], axis=-1))


class _MixTokens(nn.Module):
    """Linear map over tokens, the same for all features.

    Attributes:
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the matrix.
      bias_init: initialiser of the bias.
    """

    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        tokens = x.shape[-2]
        kernel = self.param("kernel", self.kernel_init, (tokens, tokens), self.param_dtype)
        bias = self.param("bias", self.bias_init, (tokens,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return jnp.einsum("...sc,st->...tc", x, kernel) + bias[:, None]


def _over_parts(module: nn.Module, x: Array, size: int | tuple[int, int], *, grid: bool) -> Array:
    """Apply a module to the windows of a map, or to the groups that a grid makes of it."""
    shape, part = x.shape[-3:-1], _pair(size)
    tokens = partition_grid(x, part) if grid else partition_windows(x, part)
    y: Any = module(tokens)
    return axes.constrain_map(merge_grid(y, part, shape) if grid else merge_windows(y, part, shape))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _check_parts(shape: Sequence[int], window: int | tuple[int, int], grid: int | tuple[int, int], width: int) -> int:
    """Return `width` if it has two halves, and the map is a multiple of window and grid."""
    _, size, _ = split_shape(shape, 2)
    for name, value in (("window_size", window), ("grid_size", grid)):
        pair = _pair(value)
        if len(pair) != 2 or min(pair) < 1 or any(length % step for length, step in zip(size, pair, strict=True)):
            raise ValueError(f"a map of size {size} must be a multiple of {name}={value}; pad the map or set {name}")
    if width < 2 or width % 2:
        raise ValueError(f"the two halves of {width} features must be equal; set expand_ratio or an even width")
    return width
