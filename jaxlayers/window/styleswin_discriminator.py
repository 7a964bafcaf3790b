"""The wavelet discriminator of StyleSwin: it looks at the Haar bands of a picture and of its reduced copies."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.ops import upfirdn
from jaxlayers.ops.patches import split_shape
from jaxlayers.ops.wavelets import haar, inverse_haar
from jaxlayers.window.styleswin import EqualizedDense, scaled_leaky_relu


class WaveletDiscriminator(nn.Module):
    """Score pictures as real or made, from the Haar bands of each resolution.

    With h_0 the Haar bands of the picture and h_i those of the picture halved i times by a binomial filter, level i
    adds act(h_i W_i + b_i) to its map and halves it by two 3 x 3 convolutions, the second of stride 2 after a filter.
    The last map, 4 x 4, gets one more feature, how much the maps of a group differ, and goes through a convolution and
    two linear layers.

    That feature is m(sqrt(var + 1e-8)), var over the pictures of a group and m the mean over places and features, the
    same number at every place of the group's maps: it tells a generator that always makes the same picture. It couples
    the scores of a batch. The gradient of the sum of all scores by one picture, of which R1 takes the square, then
    holds what that picture does to the scores of its group as well; this is so in the published code too. With
    `stddev_group=0` every score is of its own picture alone, and so is R1.

    Symmetry:
      Exactly invariant to permutations within a group of the other pictures (with `stddev_group=0`: of all others).

    Attributes:
      features: width of the first map, then after each level's convolutions; pictures must have 8 * 2**levels pixels
        along an axis.
      stddev_group: pictures in a group, or all where there are fewer; must divide their number. Members are strided,
        `b` with all congruent to it modulo the number of groups. 0 = every picture alone: the feature is a constant.
      remat: what the backward pass computes anew in each level, a name of `core.remat.POLICIES`.
      dtype: compute dtype; `None` infers it from input and parameters. The group's statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, which are scaled when used (see `EqualizedDense`).
      bias_init: initialiser of the biases.

    Cost:
      Of level i at width C_i and side n_i of its map: 9 n_i^2 C_i^2 + 9 n_i^2 C_i C_(i+1) / 4 multiply-accumulates.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import WaveletDiscriminator
      >>> model = WaveletDiscriminator(features=(8, 16))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((4, 16, 16, 3)))[0].shape
      (4,)

    Source:
      Zhang et al., StyleSwin: Transformer-based GAN for High-resolution Image Generation, CVPR 2022, section 3.4 (read
      from the code, github.com/microsoft/StyleSwin); Gal et al., SWAGAN: A Style-based Wavelet-driven Generative Model,
      2021; Karras et al., Progressive Growing of GANs, ICLR 2018, section 3.

    Differs:
      Without spectral normalisation, an option of the official code that its published recipes use. Any number of
      channels.
    """

    features: tuple[int, ...] = (128, 512, 512, 512, 512, 512)
    stddev_group: int = 4
    remat: str | bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(1.0)
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch"]:
        """Score.

        Args:
          x: pictures, channels last.

        Returns:
          A number a picture; high = looks real.

        Raises:
          ValueError: if the size of `x` is not that of the fields, or the group does not divide the batch.
        """
        levels = len(self.features) - 1
        batch, size, _ = split_shape(x.shape, 2)
        if levels < 1 or size != (8 * 2**levels,) * 2:
            raise ValueError(
                f"pictures of size {size} must have 8 * 2**(len(features) - 1) = {8 * 2**levels} pixels along each "
                f"axis, at least 16, for features={self.features}; set features"
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }

        bands = haar(x)
        y: Array | None = None
        for level, width in enumerate(self.features):
            if level:
                bands = haar(upfirdn.downsample(inverse_haar(bands)))
            seen = _Conv(width, 1, name=f"from_rgbs_{level}", **common)(bands)
            y = axes.constrain_map(seen if y is None else y + seen)
            if level < levels:
                pair = _Halve(width, self.features[level + 1], name=f"convs_{level}", **common)
                y = remat.remat_block(_call, self.remat)(pair, y)
        assert y is not None  # there is at least one level
        y = jnp.concatenate([y, _group_deviation(y, math.prod(batch), self.stddev_group)], axis=-1)
        y = _Conv(self.features[-1], 3, name="final_conv", **common)(y)
        y = y.reshape(*batch, -1)
        y = EqualizedDense(self.features[-1], activation_fn=scaled_leaky_relu, name="hidden", **common)(y)
        return EqualizedDense(1, name="score", **common)(y)[..., 0]


class _Conv(nn.Module):
    """Convolve with weights that are scaled when used, add a bias and apply the nonlinearity.

    Attributes:
      features: width of the output.
      kernel_size: side of the kernel; a border of zeros keeps the size.
      stride: 2 halves the map: a filter goes before, whose border of two pixels is all the padding there is.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(1.0)
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = kernel / math.sqrt(math.prod(shape[:3]))
        if self.kernel_size == 1:
            return scaled_leaky_relu(x @ kernel[0, 0] + bias)
        batch = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        if self.stride > 1:
            x = upfirdn.upfirdn(x, upfirdn.BINOMIAL, padding=(2, 2))
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride,) * 2,
            "SAME" if self.stride == 1 else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return scaled_leaky_relu(y.reshape(*batch, *y.shape[1:]) + bias)


class _Halve(nn.Module):
    """Two convolutions, the second of which halves the map.

    Attributes:
      features: width of the first.
      out_features: width of the second.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
    """

    features: int
    out_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        x = _Conv(self.features, 3, name="convolution1", **common)(x)
        return _Conv(self.out_features, 3, stride=2, name="convolution2", **common)(x)


def _call(module: nn.Module, x: Array) -> Array:
    return module(x)


def _group_deviation(x: Array, count: int, group: int) -> Array:
    """Return how much the maps of a group differ, as a map of one feature, see `WaveletDiscriminator`."""
    if group < 0 or (group and count % min(group, count)):
        raise ValueError(
            f"stddev_group={group} must divide the {count} pictures, or be 0 for every picture alone; set stddev_group"
        )
    members = min(group, count) if group else 1
    wide = x.astype(at_least_float32(x.dtype)).reshape(members, count // members, *x.shape[-3:])
    deviation = jnp.mean(jnp.sqrt(jnp.var(wide, axis=0) + 1e-8), axis=(-3, -2, -1))
    every = jnp.tile(deviation, members).reshape(*x.shape[:-3], 1, 1, 1)
    return jnp.broadcast_to(every, (*x.shape[:-1], 1)).astype(x.dtype)


# Parameter trees ------------------------------------------------------------------------------------------------------

REFERENCE_NAMES: Mapping[str, str] = {
    "from_rgbs/kernel": "from_rgbs.{from_rgb}.conv.0.weight",
    "from_rgbs/bias": "from_rgbs.{from_rgb}.conv.1.bias",
    "convs/convolution1/kernel": "convs.{conv}.conv1.0.weight",
    "convs/convolution1/bias": "convs.{conv}.conv1.1.bias",
    "convs/convolution2/kernel": "convs.{conv}.conv2.1.weight",
    "convs/convolution2/bias": "convs.{conv}.conv2.2.bias",
    "final_conv/kernel": "final_conv.0.weight",
    "final_conv/bias": "final_conv.1.bias",
    "hidden": "final_linear.0",
    "score": "final_linear.1",
}
"""Our modules, and where the official checkpoint keeps them."""

_COMPUTED = (".ll", ".lh", ".hl", ".hh", ".kernel")


def from_reference(tensors: Mapping[str, Any], model: WaveletDiscriminator) -> dict[str, Any]:
    """Return the parameters of `model` from the state dict of an official discriminator, converted to NumPy.

    Args:
      tensors: arrays by name, of a discriminator without spectral normalisation.
      model: a module with the fields of that checkpoint.

    Returns:
      The parameter tree.

    Raises:
      ValueError: if names or shapes are not those of the model.
    """
    renamed = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    name = "final_linear.0.weight"
    if name in renamed:  # it reads the last map channels first
        flat = renamed[name]
        renamed[name] = np.moveaxis(flat.reshape(len(flat), -1, 4, 4), 1, -1).reshape(flat.shape)
    side = 8 * 2 ** (len(model.features) - 1)
    channels = renamed["from_rgbs.0.conv.0.weight"].shape[1] // 4 if "from_rgbs.0.conv.0.weight" in renamed else 3
    picture = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    wanted = dialects.shapes_of(model, (picture,))["params"]
    return reference.read_reference(renamed, wanted, REFERENCE_NAMES, ignored=_COMPUTED)


def reference_inputs(model: WaveletDiscriminator) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs, which show the shapes of a model's parameters."""
    side = 8 * 2 ** (len(model.features) - 1)
    return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/microsoft/StyleSwin, `d` of its files",
        module=WaveletDiscriminator,
        read=dialects.from_params(from_reference),
        marks=(r"^from_rgbs\.0\.conv\.0\.weight$", r"^final_linear\.1\.weight$"),
        ignored={
            r"\.(ll|lh|hl|hh)$": "a filter of Haar's wavelets, which is not learned",
            r"\.kernel$": "the filter of a downsampling, which is not learned",
        },
        layout=dialects.table_layout(REFERENCE_NAMES),
    ),
)


def _variant(size: int, multiplier: int) -> dict[str, Any]:
    """Return a published model; the second width is that of a quarter of the size, as in the official code."""
    width = {2**power: min(512, 2 ** (14 - power) * multiplier) for power in range(2, 11)}
    return {
        "module": WaveletDiscriminator,
        "features": (width[size], *(width[2**power] for power in range(int(math.log2(size)) - 2, 1, -1))),
        "inputs": (jax.ShapeDtypeStruct((4, size, size, 3), jnp.float32),),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "styleswin_discriminator_256": _variant(256, 2),
    "styleswin_discriminator_1024": _variant(1024, 2),
}
