"""The entropy model of S2LIC: slices of channels in checkerboard order, each told by all that is decoded before it.

What a decoder repeats is computed in float32 or better whatever the transforms compute in, step by step, by
`ACGCEntropyModel.parameters` and `refine`; training runs the same steps.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.ops.depthwise import as_general_conv
from jaxlayers.ops.grid_sample import grid_sample
from jaxlayers.ops.range_coder import CodingTables, coding_tables

SCALES = tuple(float(one) for one in np.geomspace(0.11, 256.0, 64))
"""The standard deviations that have a coding table; a smaller one is taken for the first."""

uniform_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's initialiser, uniform up to the inverse root of the fan-in, that the public code's convolutions have."""

_LOG_2 = math.log(2.0)


# Rates ---------------------------------------------------------------------------------------------------------------


def gaussian_bits(distance: Float[Array, "*#shape"], scale: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Return -log2 of the probability of the unit interval about `distance`, under a normal of that scale about 0.

    Exact far out in the tails too, and with a gradient there.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.window.s2lic_entropy import gaussian_bits
      >>> [round(float(bits)) for bits in gaussian_bits(jnp.array([0.0, 40.0]), jnp.array([0.11, 1.0]))]
      [0, 1132]
    """
    # Both ends in the lower tail, where the logarithms are exact.
    ends = (-jnp.abs(distance) + jnp.array([0.5, -0.5], distance.dtype).reshape(2, *[1] * distance.ndim)) / scale
    upper, lower = _log_normal_cdf(ends)
    return _interval_bits(upper, lower)


def _log_normal_cdf(x: Array) -> Array:
    """Return log Phi(x). `jax.scipy.special.log_ndtr` is the same, but takes several times as long to compile."""
    near = jnp.log(0.5 * jax.lax.erfc(-jnp.maximum(x, -10.0) * math.sqrt(0.5)))
    far = jnp.minimum(x, -10.0)
    inverse = 1 / (far * far)
    tail = -0.5 * far * far - jnp.log(-far * math.sqrt(2 * math.pi)) + jnp.log1p(inverse * (3 * inverse - 1))
    return jnp.where(x > -10.0, near, tail)


def _interval_bits(upper: Array, lower: Array) -> Array:
    """Return -log2(exp(upper) - exp(lower)); they may lie so close together that nothing is left in this precision."""
    return -(upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-6)))) / _LOG_2


def scale_index(scale: Array) -> Array:
    """Return the number of the entry of `SCALES` whose logarithm is nearest."""
    step = math.log(SCALES[-1] / SCALES[0]) / (len(SCALES) - 1)
    return jnp.clip(jnp.round(jnp.log(scale / SCALES[0]) / step), 0, len(SCALES) - 1).astype(jnp.int32)


@functools.cache
def gaussian_tables() -> CodingTables:
    """Return the coding tables of normals of the standard deviations `SCALES`, about 0."""
    # Beyond, an escape is as likely as the table can say.
    reaches = [math.ceil(4.5 * scale) for scale in SCALES]
    probabilities = []
    for scale, reach in zip(SCALES, reaches, strict=True):
        below = [0.5 * math.erfc((0.5 + k) / (scale * math.sqrt(2))) for k in range(-1, reach + 1)]
        # The interval about k is that about -k; the one about 0 is what the others leave.
        half = [below[k] - below[k + 1] for k in range(1, reach + 1)]
        probabilities.append(np.array([*half[::-1], 1 - 2 * below[1], *half]))
    return coding_tables(probabilities, [-reach for reach in reaches])


def round_through(x: Array) -> Array:
    """Return whole numbers, with the gradient of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


class FactorizedPrior(nn.Module):
    """Tell how many bits a number costs, by one learned distribution for each feature.

    bits = -log2(c(x + 1/2) - c(x - 1/2)), c = sigmoid(f_K(... f_1(x))), f_k(u) = g_k(softplus(H_k) u + b_k),
    g_k(u) = u + tanh(a_k) tanh(u) (the last g is the identity): c grows from 0 to 1 whatever the parameters are.

    Symmetry:
      Equivariant to permutations of everything but the features.

    Attributes:
      hidden_features: widths between the K layers.
      init_scale: spread of the distribution that training starts from.
      param_dtype: dtype of the parameters; all is computed in float32 or better.

    Cost:
      Some 50 multiply-accumulates a number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.s2lic_entropy import FactorizedPrior
      >>> jax.eval_shape(FactorizedPrior().init_with_output, jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
      (2, 5, 8)

    Source:
      Ballé et al., Variational Image Compression with a Scale Hyperprior, ICLR 2018, appendix 6.1;
      github.com/InterDigitalInc/CompressAI, `EntropyBottleneck`.

    Differs:
      Medians are not learned by a loss of their own: numbers are rounded to whole ones, and the distribution moves to
      where they are.
    """

    hidden_features: tuple[int, ...] = (3, 3, 3, 3)
    init_scale: float = 10.0
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Compute the bits.

        Args:
          x: the numbers, whole or not.

        Returns:
          What each costs.

        Raises:
          ValueError: if `x` is a scalar, or a field is not positive.
        """
        if x.ndim < 1:
            raise ValueError(f"input must be [*batch, features]; got shape {x.shape}")
        if self.init_scale <= 0 or min(self.hidden_features, default=1) < 1:
            raise ValueError(
                f"hidden_features={self.hidden_features} and init_scale={self.init_scale} must be positive; set them"
            )
        dtype = at_least_float32(jnp.promote_types(x.dtype, self.param_dtype))
        widths = (1, *self.hidden_features, 1)
        scale = self.init_scale ** (1 / (len(widths) - 1))
        ends = jnp.stack([x + 0.5, x - 0.5]).astype(dtype)[..., None]
        for layer, (before, after) in enumerate(itertools.pairwise(widths)):
            start = nn.initializers.constant(math.log(math.expm1(1 / (scale * after))))
            uniform = _symmetric_uniform(0.5)
            kernel, bias = (
                self.param(f"{name}_{layer}", init, (x.shape[-1], *shape), self.param_dtype).astype(dtype)
                for name, init, shape in (("kernel", start, (before, after)), ("bias", uniform, (after,)))
            )
            # Sums of three products; as matrix products accelerators would round them.
            ends = jnp.sum(ends[..., :, None] * jax.nn.softplus(kernel), axis=-2) + bias
            if layer < len(widths) - 2:
                factor = self.param(f"factor_{layer}", zeros(), (x.shape[-1], after), self.param_dtype)
                ends = ends + jnp.tanh(factor.astype(dtype)) * jnp.tanh(ends)
        upper, lower = ends[0, ..., 0], ends[1, ..., 0]
        # Seen from the nearer side, so that both ends lie in the lower tail.
        turn = upper + lower > 0
        upper, lower = jnp.where(turn, -lower, upper), jnp.where(turn, -upper, lower)
        return _interval_bits(jax.nn.log_sigmoid(upper), jax.nn.log_sigmoid(lower))


def _symmetric_uniform(size: float) -> Initializer:
    def init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -size, size)

    return init


# Contexts ------------------------------------------------------------------------------------------------------------


def _convolution(features: int, kernel: int, common: Any, name: str) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), padding="SAME", name=name, **common)


def _depthwise(x: Array, features: int, common: Any) -> Array:
    """Apply a depthwise 3 x 3 convolution, and a product that gives it the width of the branch beside it."""
    x = nn.Conv(
        x.shape[-1],
        (3, 3),
        feature_group_count=x.shape[-1],
        padding="SAME",
        conv_general_dilated=as_general_conv,
        name="depthwise",
        **common,
    )(x)
    return nn.Dense(features, name="pointwise", **common)(nn.gelu(x, approximate=False))


def _channel_map(x: Array, common: Any) -> Array:
    """Return a number in (0, 1) for each channel, from the mean over the map."""
    x = jnp.mean(x, axis=(-3, -2), keepdims=True)
    hidden = nn.gelu(nn.Dense(max(4, x.shape[-1] // 8), name="channel_up", **common)(x), approximate=False)
    return nn.sigmoid(nn.Dense(x.shape[-1], name="channel_down", **common)(hidden))


def _spatial_map(x: Array, common: Any) -> Array:
    """Return a number in (0, 1) for each place."""
    hidden = nn.gelu(nn.Dense(max(4, x.shape[-1] // 16), name="spatial_up", **common)(x), approximate=False)
    return nn.sigmoid(nn.Dense(1, name="spatial_down", **common)(hidden))


def _check_map(x: Array, **widths: int) -> None:
    if x.ndim < 3 or 0 in x.shape[-3:]:
        raise ValueError(f"input must be a map [*batch, height, width, features] with entries; got shape {x.shape}")
    if min(widths.values()) < 1:
        raise ValueError(
            f"{' and '.join(f'{name}={value}' for name, value in widths.items())} must be positive; set it"
        )


class ChannelwiseContext(nn.Module):
    """Sum up decoded channels by convolutions, in two branches that weigh each other.

    out = a s(d) + d c(a): a is two 3 x 3 convolutions, each with a GELU, d a depthwise one with a product to the same
    width, s(d) a number in (0, 1) for each place and c(a) one for each channel, from the mean over the map.

    Symmetry:
      Equivariant to translations away from the border, but for that mean.

    Attributes:
      features: width of the output.
      hidden_features: width between the convolutions.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      9 hidden (C + out) + 9 C + C out multiply-accumulates a place of width C.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.s2lic_entropy import ChannelwiseContext
      >>> layer = ChannelwiseContext(8, hidden_features=12)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 4, 6, 16)))[0].shape
      (1, 4, 6, 8)

    Source:
      Wang et al., S2LIC: Learned Image Compression with the SwinV2 Block, Adaptive Channel-wise and Global-inter
      Attention Context, arXiv 2403.14471, figure of the ACGC; the interaction of the branches is that of Chen et al.,
      Dual Aggregation Transformer, ICCV 2023.

    Differs:
      Written after the figure, since the module is not in the public code, which only tells its widths. Without the
      batch norms of the two maps: what they compute once trained, the products beside them can hold.
    """

    features: int
    hidden_features: int = 192
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = uniform_kernel
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch height width out"]:
        """Compute the context.

        Args:
          x: what is decoded.

        Returns:
          A map of the same size.

        Raises:
          ValueError: if `x` is no map, or a width is not positive.
        """
        _check_map(x, features=self.features, hidden_features=self.hidden_features)
        common = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        y = nn.gelu(_convolution(self.hidden_features, 3, common, "convolution1")(x), approximate=False)
        attended = nn.gelu(_convolution(self.features, 3, common, "convolution2")(y), approximate=False)
        local = _depthwise(x, self.features, common)
        return attended * _spatial_map(local, common) + local * _channel_map(attended, common)


class GlobalInterContext(nn.Module):
    """Attend from every place to places of the whole map that the data choose, beside a depthwise convolution.

    out = a c(d) + d s(a), d and the weights c and s as in `ChannelwiseContext`; a is a 5 x 5 convolution of
    softmax(Q K^T / sqrt(dim)) V for each head, Q = x W_q, [K, V] = x(p + r tanh(theta(Q))) [W_k, W_v]: keys and values
    are read, bilinearly, about the centres p of cells of r x r places, moved by at most r; theta is a depthwise
    convolution of stride r, GELU and a product.

    Symmetry:
      None exactly: the cells are tied to the grid.

    Attributes:
      features: width of the output.
      head_dim: width of a head; must divide the features of the input.
      reference_stride: the side r of a cell; each gives one key.
      dtype: compute dtype; `None` infers it from input and parameters. Places, logits and softmax are in float32 or
        better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The weights are sown as `attention_weights` in `intermediates`.

    Cost:
      2 H W C / r^2 multiply-accumulates a place of a map of H x W places, besides 2 C^2 + 25 C out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.s2lic_entropy import GlobalInterContext
      >>> layer = GlobalInterContext(8, head_dim=4)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 4, 6, 16)))[0].shape
      (1, 4, 6, 8)

    Source:
      Wang et al., S2LIC, arXiv 2403.14471, figures of the ACGC and of the global inter-slice context; the attention is
      that of Xia et al., Vision Transformer with Deformable Attention, CVPR 2022, equations 4 to 8.

    Differs:
      Written after the figures, as `ChannelwiseContext`. One set of places serves all heads; without a position bias,
      which the figure does not show; the stride is not published.
    """

    features: int
    head_dim: int = 32
    reference_stride: int = 2
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = uniform_kernel
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch height width out"]:
        """Compute the context.

        Args:
          x: what is decoded.

        Returns:
          A map of the same size.

        Raises:
          ValueError: if `x` is no map, or a width does not fit.
        """
        _check_map(x, features=self.features, head_dim=self.head_dim, reference_stride=self.reference_stride)
        width, stride = x.shape[-1], self.reference_stride
        if width % self.head_dim:
            raise ValueError(
                f"features={width} must be divisible by head_dim={self.head_dim}; set head_dim or the features"
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        query = nn.Dense(width, name="query", **common)(x)
        kernel = 2 * stride + 1
        # As "SAME" pads, which the depthwise convolution does without a stride alone.
        missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-3:-1]]
        ends = [(0, 0)] * (x.ndim - 3) + [(total // 2, total - total // 2) for total in missing] + [(0, 0)]
        moved = nn.Conv(
            width,
            (kernel, kernel),
            strides=stride,
            padding="VALID",
            feature_group_count=width,
            conv_general_dilated=as_general_conv,
            name="offset_depthwise",
            **common,
        )(jnp.pad(query, ends))
        offsets = nn.Dense(2, name="offset", **common)(nn.gelu(moved, approximate=False))
        wide = at_least_float32(offsets.dtype)
        centres = (
            # The last cell of an axis may stick out.
            jnp.minimum(jnp.arange(cells) * stride + (stride - 1) / 2, size - 1).astype(wide)
            for cells, size in zip(offsets.shape[-3:-1], x.shape[-3:-1], strict=True)
        )
        places = jnp.stack(jnp.meshgrid(*centres, indexing="ij"), axis=-1) + stride * jnp.tanh(offsets.astype(wide))
        read = grid_sample(x, places, padding="edge")
        batch = x.shape[:-3]
        read = read.reshape(*batch, -1, width)
        heads = width // self.head_dim
        key, value = (split_heads(nn.Dense(width, name=name, **common)(read), heads) for name in ("key", "value"))
        query = split_heads(query.reshape(*batch, -1, width), heads)

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            logits = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=wide)
            weights = attention_weights(logits / math.sqrt(self.head_dim)).astype(value.dtype)
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights, value)

        context = merge_heads(remat.attention(attend, self, query, key, value)).reshape(x.shape)
        attended = _convolution(self.features, 5, common, "out")(context)
        local = _depthwise(x, self.features, common)
        return attended * _channel_map(local, common) + local * _spatial_map(attended, common)


# The model -----------------------------------------------------------------------------------------------------------


def checkerboard(size: Sequence[int]) -> np.ndarray:
    """Return a truth value for each place of a map `[height, width]`: true at the anchors, which are decoded first.

    Example:
      >>> from jaxlayers.window.s2lic_entropy import checkerboard
      >>> checkerboard((2, 3)).astype(int).tolist()
      [[0, 1, 0], [1, 0, 1]]
    """
    return (np.indices(size).sum(axis=0) % 2).astype(bool)


class ACGCEntropyModel(nn.Module):
    """Tell how many bits a latent map costs, slice by slice of its channels and anchors of a checkerboard first.

    Each entry y is coded as the whole number q = round(y - mu), at -log2(Phi((q + 1/2) / sigma) - Phi((q - 1/2) /
    sigma)) bits. (mu, sigma) of the anchors of slice i come from 1 x 1 convolutions of the hyperprior and of two
    contexts, `ChannelwiseContext` and `GlobalInterContext`, of the slices before it; those of its other entries see
    its anchors as well. What is decoded is mu + q + tanh(r) / 2, with r a convolution of what is known then (latent
    residual prediction).

    Symmetry:
      Causal, exactly: an entry depends on no entry of the same step, of a later slice, or, if it is an anchor, of the
      others of its slice.

    Attributes:
      features: width M of the latent map.
      num_slices: how many slices it is cut into; must divide the features.
      head_dim: width of the heads of the global contexts; must divide a slice.
      reference_stride: see `GlobalInterContext`.
      anchor_context: entries that are no anchors see the anchors of their slice.
      param_dtype: dtype of the parameters; all is computed in float32 or better.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `noise`, when `deterministic=False`.

    Cost:
      Some 20 M^2 multiply-accumulates a place for each of the two steps of a slice, besides the global attention,
      which is quadratic in the number of places.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.s2lic_entropy import ACGCEntropyModel
      >>> model = ACGCEntropyModel(features=8, num_slices=2, head_dim=4)
      >>> maps = jnp.ones((1, 4, 6, 8)), jnp.ones((1, 4, 6, 16))
      >>> [one.shape for one in jax.eval_shape(model.init_with_output, jax.random.key(0), *maps)[0]]
      [(1, 4, 6, 8), (1, 4, 6, 8)]

    Source:
      Wang et al., S2LIC, arXiv 2403.14471, abstract and figures; github.com/wyq2021/S2LIC (fcae7fb, one file, whose
      own layers are not public); checkerboard: He et al., CVPR 2021; slices and latent residual prediction: Minnen and
      Singh, ICIP 2020; widths of the convolutions: github.com/JiangWeibeta/MLIC.

    Differs:
      The figure lets an entry that is no anchor see its slice's anchors, the public code does not:
      `anchor_context=False` is the code. Scales are 0.11 + softplus, where the code cuts at 0.11. Hidden widths are
      the same fractions of M as the published ones at M = 320.
    """

    features: int = 320
    num_slices: int = 10
    head_dim: int = 32
    reference_stride: int = 2
    anchor_context: bool = True
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = uniform_kernel
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts of every step."""
        if self.num_slices < 1 or self.features < 1 or self.features % self.num_slices:
            raise ValueError(f"features={self.features} must be divisible by num_slices={self.num_slices}; set either")
        width, total = self.features // self.num_slices, self.features
        if self.head_dim < 1 or width % self.head_dim:
            raise ValueError(
                f"a slice of {width} features must be divisible by head_dim={self.head_dim}; set head_dim or num_slices"
            )
        # A field `dtype` would be lowered with that of the transforms.
        common: dict[str, Any] = {
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        channelwise = functools.partial(ChannelwiseContext, 2 * width, hidden_features=max(1, 3 * total // 5), **common)
        globally = functools.partial(
            GlobalInterContext, width, head_dim=self.head_dim, reference_stride=self.reference_stride, **common
        )
        hidden = tuple(max(1, share * total // 10) for share in (10, 8, 4))
        gaussian = functools.partial(_Convolutions, (*hidden, 2 * width), kernel=1, common=common)
        residual = functools.partial(
            _Convolutions, (hidden[0] * 7 // 10 or 1, hidden[2], width), kernel=3, common=common
        )
        steps = range(2 * self.num_slices)
        self.channelwise = [channelwise() if self._sees(step) else None for step in steps]
        self.globally = [globally() if self._sees(step) else None for step in steps]
        self.gaussian = [gaussian() for _ in steps]
        self.residual = [residual() for _ in steps]

    def _sees(self, step: int) -> int:
        """Return how many channels of what is decoded the contexts of a step see."""
        seen = step // 2 + (step % 2 if self.anchor_context else 0)
        return seen * (self.features // self.num_slices)

    def channels(self, step: int) -> slice:
        """Return the channels that a step decodes: steps 2 i and 2 i + 1 are anchors and others of slice i."""
        width = self.features // self.num_slices
        return slice(step // 2 * width, (step // 2 + 1) * width)

    def parameters(
        self,
        hyper: Float[Array, "*batch height width doubled"],
        decoded: Float[Array, "*batch height width features"],
        step: int,
    ) -> tuple[Float[Array, "*batch height width slice"], Float[Array, "*batch height width slice"]]:
        """Return means and scales of the slice of a step; only those at the step's places of the board count.

        Args:
          hyper: what the hyperprior tells.
          decoded: what is decoded; zeros, or anything in later slices, elsewhere.
          step: see `channels`.
        """
        parts = [hyper]
        if self._sees(step):
            known = decoded[..., : self._sees(step)]
            if step % 2 and self.anchor_context:
                here = jnp.asarray(checkerboard(decoded.shape[-3:-1]))[..., None]
                later = jnp.arange(known.shape[-1]) >= self.channels(step).start
                known = jnp.where(later & ~here, 0, known)
            parts = [self.channelwise[step](known), self.globally[step](known), hyper]
        raw, means = jnp.split(self.gaussian[step](jnp.concatenate(parts, axis=-1)), 2, axis=-1)
        return means, SCALES[0] + nn.softplus(raw)

    def refine(
        self,
        hyper: Float[Array, "*batch height width doubled"],
        decoded: Float[Array, "*batch height width features"],
        values: Float[Array, "*batch height width slice"],
        step: int,
    ) -> Float[Array, "*batch height width features"]:
        """Return what is decoded after a step.

        Args:
          hyper: what the hyperprior tells.
          decoded: what was decoded before the step.
          values: mean plus whole number at the step's places; anything elsewhere.
          step: see `channels`.
        """
        here = jnp.asarray(checkerboard(decoded.shape[-3:-1]) == (step % 2 == 0))[..., None]
        channels = self.channels(step)
        # Anchors that are decoded stay, and the others' places are zero until it is their turn.
        other = decoded[..., channels] if step % 2 else jnp.zeros_like(values)
        values = jnp.where(here, values, other)
        known = jnp.concatenate([hyper[..., self.features :], decoded[..., : channels.start], values], axis=-1)
        values = jnp.where(here, values + 0.5 * jnp.tanh(self.residual[step](known)), values)
        return decoded.at[..., channels].set(values)

    def __call__(
        self,
        y: Float[Array, "*batch height width features"],
        hyper: Float[Array, "*batch height width doubled"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "*batch height width features"], Float[Array, "*batch height width features"]]:
        """Round a latent map, and count its bits.

        Args:
          y: the map.
          hyper: what the hyperprior tells of it, of twice its width: the second half of the features goes into the
            latent residual prediction.
          deterministic: count the bits of the whole numbers; else of y with uniform noise, which has a gradient
            wherever it lies. What is decoded is rounded either way, and its gradient goes through unchanged.

        Returns:
          What is decoded, and the bits of each entry.

        Raises:
          ValueError: if the maps are of the wrong rank or width, or a field does not fit.
        """
        if y.ndim < 3 or hyper.shape != (*y.shape[:-1], 2 * self.features) or y.shape[-1] != self.features:
            raise ValueError(
                f"y {y.shape} and hyper {hyper.shape} must be [*batch, height, width, {self.features}] and twice as "
                f"wide; set features={self.features} or pass other maps"
            )
        dtype = at_least_float32(jnp.promote_types(y.dtype, self.param_dtype))
        y, hyper = y.astype(dtype), hyper.astype(dtype)
        noisy = y if deterministic else y + jax.random.uniform(self.make_rng("noise"), y.shape, dtype, -0.5, 0.5)
        decoded = jnp.zeros_like(y)
        told: list[tuple[Array, Array]] = []
        for step in range(2 * self.num_slices):
            means, scales = self.parameters(hyper, decoded, step)
            channels = self.channels(step)
            rounded = round_through(y[..., channels] - means)
            decoded = self.refine(hyper, decoded, means + rounded, step)
            told.append((rounded if deterministic else noisy[..., channels] - means, scales))
        # Each slice's anchors from its first step, the others from its second; all bits at once.
        here = jnp.asarray(checkerboard(y.shape[-3:-1]))[..., None]
        distance, scale = (
            jnp.concatenate(
                [jnp.where(here, one[kind], two[kind]) for one, two in zip(told[::2], told[1::2], strict=True)], axis=-1
            )
            for kind in (0, 1)
        )
        return decoded, gaussian_bits(distance, scale)


class _Convolutions(nn.Module):
    """Convolutions with a GELU between each two.

    Attributes:
      widths: of the outputs.
      kernel: side of the kernels.
      common: dtypes and initialisers.
    """

    widths: tuple[int, ...]
    kernel: int
    common: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index, width in enumerate(self.widths):
            x = nn.gelu(x, approximate=False) if index else x
            x = _convolution(width, self.kernel, dict(self.common), f"convolution{index + 1}")(x)
        return x
