"""ConvNeXt: a pyramid of convolutional blocks in the shape of a transformer's, and V2 with global response norm."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, reference
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.remat import remat_block
from jaxlayers.core.safe import safe_norm
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import exact_gelu
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.ops.depthwise import as_general_conv
from jaxlayers.ops.patches import split_shape

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)


def global_response_norm(
    x: Float[Array, "*batch height width features"],
    scale: Float[Array, " features"],
    bias: Float[Array, " features"],
    *,
    mask: Bool[Array, "*batch height width"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, "*batch height width features"]:
    """Return `scale * x * g / mean(g) + bias + x`, with g the norm over space of each feature.

    Args:
      x: a map.
      scale: strength of the response of each feature; at zero the map only gets the bias.
      bias: added to each feature.
      mask: which pixels count for g; `None` = all.
      epsilon: added to mean(g).

    Returns:
      A map like `x`, computed in float32 or better.
    """
    # All of it in float32: the gradients of scale and bias are sums over pixels, which bfloat16 would not survive.
    wide = x.astype(at_least_float32(x.dtype))
    response = safe_norm(_hide(wide, mask), axis=(-3, -2), keepdims=True)
    relative = response / (jnp.mean(response, axis=-1, keepdims=True) + epsilon)
    return (wide * (1 + scale * relative) + bias).astype(x.dtype)


class GlobalResponseNorm(nn.Module):
    """Let features compete: amplify each by its norm over the map, relative to the other features' norms.

    out_c = scale_c x_c n_c + bias_c + x_c, n_c = g_c / mean_k(g_k), g_c = ||x_c|| over height and width, with x_c
    `[height, width]`, scale and bias `[features]`, both zero at the start, where the layer is the identity.

    Symmetry:
      Exactly equivariant to any permutation of the pixels (translations with wrap-around, flips, rotations by 90
      degrees): the only statistic is a norm over all of them. With bias 0 also to scaling x by a number.

    Attributes:
      epsilon: added to the mean of the norms.
      dtype: compute dtype; `None` infers it from input and parameters. The norms are computed in float32 or better.
      param_dtype: dtype of the parameters.

    Cost:
      A few operations an entry, and one reduction over the map.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.conv import GlobalResponseNorm
      >>> x = jnp.ones((1, 4, 4, 3))
      >>> y, variables = GlobalResponseNorm().init_with_output(jax.random.key(0), x)
      >>> bool((x == y).all())
      True

    Source:
      Woo et al., ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders, CVPR 2023, section 3.2 and
      algorithm 1; github.com/facebookresearch/ConvNeXt-V2.

    Differs:
      The gradient of the norm is 0 where a feature is 0 everywhere, where PyTorch gives the same subgradient. With a
      mask the norm is taken for each image; the sparse reference takes it over all images of the batch at once.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch height width features"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch height width features"]:
        """Apply the norm.

        Args:
          x: a map; more than three axes count as batch.
          mask: true for the pixels that the norms are taken over; `None` = all.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes or is empty.
        """
        _, _, features = split_shape(x.shape, 2)
        scale = self.param("scale", nn.initializers.zeros_init(), (features,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (features,), self.param_dtype)
        x = x.astype(compute_dtype(x, scale, bias, dtype=self.dtype))
        return global_response_norm(x, scale, bias, mask=mask, epsilon=self.epsilon)


class ConvNeXtBlock(nn.Module):
    """Mix pixels by a large depthwise convolution, then the features of each by an inverted bottleneck.

    out = x + drop(layer_scale * down(grn(gelu(up(norm(depthwise(x)))))), with a convolution of each feature by its own
    `kernel_size` x `kernel_size` kernel and zeros outside the map, up to `mlp_ratio` times the features and down again.
    The first version has layer_scale `[features]`, the second grn instead.

    Symmetry:
      Equivariant to translations away from the border, where the zeros are: exactly without `response_norm`; with it
      as far as what leaves the map at one side is equal to what enters at the other.

    Attributes:
      kernel_size: size of the depthwise kernels; odd, so that a kernel has a middle.
      mlp_ratio: width of the bottleneck's hidden layer, in multiples of the features.
      layer_scale: initial value of layer_scale (the parameter `scale`); `None` leaves it out.
      response_norm: makes the norm of the hidden layer, called as `response_norm(dtype=..., param_dtype=...,
        name=...)` and then with map and mask; `None` leaves it out.
      drop_path_rate: probability of dropping the branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Norms' statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      2 mlp_ratio C^2 + kernel_size^2 C multiply-accumulates a pixel of width C.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.conv import ConvNeXtBlock
      >>> jax.eval_shape(ConvNeXtBlock().init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 9, 6, 8)

    Source:
      Liu et al., A ConvNet for the 2020s, CVPR 2022, section 2.6 and figure 4; Woo et al., ConvNeXt V2, CVPR 2023,
      figure 5; github.com/facebookresearch/ConvNeXt and ConvNeXt-V2.

    Differs:
      With a mask, hidden pixels are zeros of a dense map, which gives what the sparse convolutions of the reference
      give at the visible ones.
    """

    kernel_size: int = 7
    mlp_ratio: float = 4.0
    layer_scale: float | None = 1e-6
    response_norm: Callable[..., Any] | None = None
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch height width features"],
        mask: Bool[Array, "*batch height width"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch height width features"]:
        """Apply the block.

        Args:
          x: a map; more than three axes count as batch.
          mask: true for visible pixels. Hidden ones are read as zero and zero in the output. `None` = all visible.
          deterministic: no dropped branches.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes, the mask is not of its shape, or a field does not fit.
        """
        batch, _, features = split_shape(x.shape, 2)
        hidden_features = int(features * self.mlp_ratio)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd and positive; set kernel_size")
        if hidden_features < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must leave {features} features some; set mlp_ratio higher")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask must have the shape {x.shape[:-1]} of the map's pixels; got {mask.shape}")
        norms: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**norms, "kernel_init": self.kernel_init, "bias_init": self.bias_init}

        x = _hide(x, mask)
        y = nn.Conv(
            features,
            (self.kernel_size,) * 2,
            feature_group_count=features,
            conv_general_dilated=as_general_conv,
            name="depthwise",
            **common,
        )(x)
        y = exact_gelu(nn.Dense(hidden_features, name="up", **common)(self.norm(name="pre_norm", **norms)(y)))
        if self.response_norm is not None:
            y = self.response_norm(name="hidden_norm", **norms)(y, mask)
        y = nn.Dense(features, name="down", **common)(y)
        if self.layer_scale is not None:
            scale = self.param("scale", nn.initializers.constant(self.layer_scale), (features,), self.param_dtype)
            y = (y.astype(at_least_float32(y.dtype)) * scale).astype(y.dtype)
        y = DropPath(self.drop_path_rate, batch_ndim=len(batch))(_hide(y, mask), deterministic=deterministic)
        return axes.constrain_map(x + y)


class ConvNeXt(nn.Module):
    """Classify images, or give their feature pyramid, by large depthwise convolutions.

    Patches are embedded and normed; stage s is (from the second on) a norm and a 2 x 2 convolution of stride 2, and
    `depths[s]` blocks of width `widths[s]`; the last map is averaged over space, normed and mapped to logits.

    Symmetry:
      Maps are equivariant to translations by multiples of their stride, away from the border (see `ConvNeXtBlock`).

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the normed average.
      patch_size: size of a patch, an int or (height, width).
      depths: number of blocks of each stage; any number of stages.
      widths: number of features of each stage.
      kernel_size: size of the depthwise kernels; odd.
      mlp_ratio: width of the bottlenecks' hidden layers, in multiples of the features.
      layer_scale: initial value of the blocks' layer scale; `None` leaves it out, as V2 does.
      response_norm: makes the norm of the hidden layers, see `ConvNeXtBlock`; V2 has `GlobalResponseNorm`.
      drop_path_rate: probability of dropping the branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass of each block computes anew, a name of `jaxlayers.core.remat.POLICIES`; true means
        all of it.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Norms' statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      Linear in the number of pixels. ConvNeXt-T at 224 x 224: 4.5 G multiply-accumulates, 28.6 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.conv import ConvNeXt
      >>> model = ConvNeXt(num_classes=10, depths=(1, 1), widths=(8, 12))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(ConvNeXt.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels]
      ((1, 10), [((1, 16, 16, 8), (4, 4)), ((1, 8, 8, 12), (8, 8))])

    Source:
      Liu et al., A ConvNet for the 2020s, CVPR 2022; Woo et al., ConvNeXt V2: Co-designing and Scaling ConvNets with
      Masked Autoencoders, CVPR 2023; github.com/facebookresearch/ConvNeXt and ConvNeXt-V2. The sizes below tiny of
      the first version are timm's.

    Differs:
      Maps whose size does not divide by a stride are padded with zeros at their ends, where the references drop the
      last rows and columns. Hugging Face's last norm has epsilon 1e-12 instead of 1e-6.
    """

    num_classes: int = 1000
    patch_size: int | tuple[int, ...] = 4
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int = 7
    mlp_ratio: float = 4.0
    layer_scale: float | None = 1e-6
    response_norm: Callable[..., Any] | None = None
    drop_path_rate: float = 0.1
    remat: bool | str = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        if len(self.depths) != len(self.widths) or not self.depths or min(*self.depths, *self.widths) < 1:
            raise ValueError(
                f"depths={self.depths} and widths={self.widths} must have one positive entry a stage; set both"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        norms: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**norms, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = PatchEmbed(self.widths[0], patch_size=self._patch, norm=self.norm, **common)
        block = functools.partial(
            ConvNeXtBlock,
            kernel_size=self.kernel_size,
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            response_norm=self.response_norm,
            norm=self.norm,
            **common,
        )
        self.stages = [
            _Stage(
                norm=functools.partial(self.norm, **norms) if stage else None,
                reduce=functools.partial(PatchEmbed, width, patch_size=(2, 2), **common) if stage else None,
                block=block,
                rates=rates[sum(self.depths[:stage]) :][:depth],
                coarser=2 ** (len(self.depths) - 1 - stage),
                remat=self.remat,
            )
            for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True))
        ]
        self.final_norm = self.norm(**norms)
        self.head = nn.Dense(self.num_classes, **common) if self.num_classes else None

    @property
    def _patch(self) -> tuple[int, int]:
        pair = (self.patch_size,) * 2 if isinstance(self.patch_size, int) else tuple(self.patch_size)
        if len(pair) != 2:
            raise ValueError(f"patch_size={self.patch_size} must be an int or (height, width); set patch_size")
        return pair

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images of any size, channels last, scaled as the weights want them.
          deterministic: no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the normed average of the last map.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        x = jnp.mean(self.features(x, deterministic=deterministic)[-1].array, axis=(-3, -2))
        x = self.final_norm(x)
        return x if self.head is None else self.head(x)

    def features(
        self,
        x: Float[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch rows columns"] | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Level, ...]:
        """Return the map after each stage (before the next one's downsampling), finest first, without norms.

        Args:
          x: images of any size, channels last.
          mask: true for the visible entries of the *last* level's map; the image under the others is hidden, as for
            training as a masked autoencoder: maps are zero there, and the rest does not depend on it. `None` = all.
          deterministic: no dropped branches.

        Returns:
          One level a stage, of stride `patch_size * 2**stage`.

        Raises:
          ValueError: if the mask does not have the shape of the last level.
        """
        batch, size, _ = split_shape(x.shape, 2)
        coarse = 2 ** (len(self.depths) - 1)
        last = tuple(-(-length // (step * coarse)) for length, step in zip(size, self._patch, strict=True))
        if mask is not None and mask.shape != (*batch, *last):
            raise ValueError(f"mask must have the shape {(*batch, *last)} of the last map's entries; got {mask.shape}")
        x = axes.constrain_map(self.patch_embed(x))
        levels = []
        for index, stage in enumerate(self.stages):
            x = stage(x, mask, deterministic=deterministic)
            levels.append(Level(x, tuple(length * 2**index for length in self._patch)))
        return tuple(levels)


class _Stage(nn.Module):
    """A downsampling and a chain of blocks.

    Attributes:
      norm: makes the norm before the downsampling; `None` for the first stage.
      reduce: makes the downsampling; `None` for the first stage.
      block: makes a block.
      rates: drop-path rate of each block.
      coarser: how many of its pixels are one of the last stage's, along each axis.
      remat: what blocks compute anew in the backward pass.
    """

    norm: Callable[..., nn.Module] | None
    reduce: Callable[..., nn.Module] | None
    block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    coarser: int
    remat: bool | str

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, *, deterministic: bool) -> Array:
        if self.norm is not None and self.reduce is not None:
            x = axes.constrain_map(self.reduce(name="downsample")(self.norm(name="pre_norm")(x)))
        mask = None if mask is None else _fine_mask(mask, self.coarser, x.shape[-3:-1])

        def call(block: nn.Module, x: Array, mask: Array | None) -> Array:
            return block(x, mask, deterministic=deterministic)

        for index, rate in enumerate(self.rates):
            block = self.block(drop_path_rate=rate, name=f"blocks_{index}")
            x = remat_block(call, self.remat)(block, x, mask)
        return x


def _fine_mask(mask: Array, times: int, size: tuple[int, ...]) -> Array:
    """Repeat the entries of the coarsest map's mask for a finer map, which ends where the image does."""
    for axis, length in zip((-2, -1), size, strict=True):
        mask = jax.lax.slice_in_dim(jnp.repeat(mask, times, axis=axis), 0, length, axis=axis)
    return mask


def _hide(x: Array, mask: Array | None) -> Array:
    return x if mask is None else jnp.where(mask[..., None], x, 0)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: ConvNeXt) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


# Reference checkpoints ------------------------------------------------------------------------------------------------

_TIMM = {
    "patch_embed/projection": "stem.0",
    "patch_embed/post_norm": "stem.1",
    "stages/pre_norm": "stages.{stage}.downsample.0",
    "stages/downsample/projection": "stages.{stage}.downsample.1",
    "stages/blocks/depthwise": "stages.{stage}.blocks.{block}.conv_dw",
    "stages/blocks/pre_norm": "stages.{stage}.blocks.{block}.norm",
    "stages/blocks/up": "stages.{stage}.blocks.{block}.mlp.fc1",
    "stages/blocks/hidden_norm": "stages.{stage}.blocks.{block}.mlp.grn",
    "stages/blocks/down": "stages.{stage}.blocks.{block}.mlp.fc2",
    "stages/blocks/scale": "stages.{stage}.blocks.{block}.gamma",
    "final_norm": "head.norm",
    "head": "head.fc",
}
_OFFICIAL = {
    "patch_embed/projection": "downsample_layers.0.0",
    "patch_embed/post_norm": "downsample_layers.0.1",
    "stages/pre_norm": "downsample_layers.{stage}.0",
    "stages/downsample/projection": "downsample_layers.{stage}.1",
    "stages/blocks/depthwise": "stages.{stage}.{block}.dwconv",
    "stages/blocks/pre_norm": "stages.{stage}.{block}.norm",
    "stages/blocks/up": "stages.{stage}.{block}.pwconv1",
    "stages/blocks/hidden_norm/scale": "stages.{stage}.{block}.grn.gamma",
    "stages/blocks/hidden_norm/bias": "stages.{stage}.{block}.grn.beta",
    "stages/blocks/down": "stages.{stage}.{block}.pwconv2",
    "stages/blocks/scale": "stages.{stage}.{block}.gamma",
    "final_norm": "norm",
    "head": "head",
}
_TORCHVISION = {
    "patch_embed/projection": "features.0.0",
    "patch_embed/post_norm": "features.0.1",
    "stages/pre_norm": "features.{even}.0",
    "stages/downsample/projection": "features.{even}.1",
    "stages/blocks/depthwise": "features.{odd}.{block}.block.0",
    "stages/blocks/pre_norm": "features.{odd}.{block}.block.2",
    "stages/blocks/up": "features.{odd}.{block}.block.3",
    "stages/blocks/down": "features.{odd}.{block}.block.5",
    "stages/blocks/scale": "features.{odd}.{block}.layer_scale",
    "final_norm": "classifier.0",
    "head": "classifier.2",
}


def _huggingface(name: str) -> dict[str, str]:
    layer = name + ".encoder.stages.{stage}.layers.{block}"
    return {
        "patch_embed/projection": f"{name}.embeddings.patch_embeddings",
        "patch_embed/post_norm": f"{name}.embeddings.layernorm",
        "stages/pre_norm": name + ".encoder.stages.{stage}.downsampling_layer.0",
        "stages/downsample/projection": name + ".encoder.stages.{stage}.downsampling_layer.1",
        "stages/blocks/depthwise": f"{layer}.dwconv",
        "stages/blocks/pre_norm": f"{layer}.layernorm",
        "stages/blocks/up": f"{layer}.pwconv1",
        "stages/blocks/hidden_norm": f"{layer}.grn",
        "stages/blocks/down": f"{layer}.pwconv2",
        "stages/blocks/scale": f"{layer}.layer_scale_parameter",
        "final_norm": f"{name}.layernorm",
        "head": "classifier",
    }


# See `jaxlayers.core.reference`. Hugging Face has a class for each version.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "timm": _TIMM,
    "official": _OFFICIAL,
    "torchvision": _TORCHVISION,
    "huggingface": _huggingface("convnext"),
    "huggingface_v2": _huggingface("convnextv2"),
}


def from_reference(tensors: Mapping[str, Any], model: ConvNeXt, *, source: str) -> dict[str, Any]:
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
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return reference.read_reference(tensors, wanted, table)


def reference_inputs(model: ConvNeXt) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)


def _downsampled(model: ConvNeXt, ours: tuple[int, ...]) -> tuple[int, ...]:
    return (ours[1], ours[0] // 4, 2, 2)


_MARKS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "timm": ("timm", (r"^stem\.0\.weight$", r"^stages\.0\.blocks\.0\.conv_dw\."), ()),
    "official": (
        "github.com/facebookresearch/ConvNeXt and ConvNeXt-V2",
        (r"^downsample_layers\.0\.0\.weight$", r"^stages\.0\.0\.dwconv\."),
        (),
    ),
    "torchvision": ("torchvision", (r"^features\.1\.0\.layer_scale$",), ()),
    "huggingface": ("Hugging Face transformers", (r"^convnext\.encoder\.",), ()),
    "huggingface_v2": ("Hugging Face transformers", (r"^convnextv2\.encoder\.",), ()),
}
_ONES: Mapping[str, Mapping[str, Any]] = {
    "torchvision": {"stages/blocks/scale": dialects.with_ones(after=2)},
    "official": {"hidden_norm/scale": dialects.with_ones(before=3), "hidden_norm/bias": dialects.with_ones(before=3)},
    "huggingface_v2": {
        "hidden_norm/scale": dialects.with_ones(before=3),
        "hidden_norm/bias": dialects.with_ones(before=3),
    },
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=ConvNeXt,
        read=dialects.from_params(from_reference, source=name),
        marks=marks,
        foreign=foreign,
        layout=dialects.table_layout(
            REFERENCE_NAMES[name],
            shapes={
                "patch_embed/projection/kernel": dialects.patches(),
                "downsample/projection/kernel": _downsampled,
                **_ONES.get(name, {}),
            },
        ),
        head=f"{REFERENCE_NAMES[name]['head']}.weight",
        stem=f"{REFERENCE_NAMES[name]['patch_embed/projection']}.weight",
    )
    for name, (origin, marks, foreign) in _MARKS.items()
)

_WIDTHS = {
    "atto": (40, 80, 160, 320),
    "femto": (48, 96, 192, 384),
    "pico": (64, 128, 256, 512),
    "nano": (80, 160, 320, 640),
    "tiny": (96, 192, 384, 768),
    "small": (96, 192, 384, 768),
    "base": (128, 256, 512, 1024),
    "large": (192, 384, 768, 1536),
    "xlarge": (256, 512, 1024, 2048),
    "xxlarge": (384, 768, 1536, 3072),
    "huge": (352, 704, 1408, 2816),
}
_DEPTHS = {
    **dict.fromkeys(("atto", "femto", "pico"), (2, 2, 6, 2)),
    "nano": (2, 2, 8, 2),
    "tiny": (3, 3, 9, 3),
    **dict.fromkeys(("small", "base", "large", "xlarge", "huge"), (3, 3, 27, 3)),
    "xxlarge": (3, 4, 30, 3),
}


def _variant(name: str, drop_path_rate: float, **fields: Any) -> dict[str, Any]:
    return {
        "module": ConvNeXt,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
        "depths": _DEPTHS[name],
        "widths": _WIDTHS[name],
        "drop_path_rate": drop_path_rate,
        **fields,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"convnext_{name}": _variant(name, rate)
        for name, rate in {
            **dict.fromkeys(("atto", "femto", "pico", "nano", "tiny"), 0.1),
            "small": 0.4,
            **dict.fromkeys(("base", "large", "xlarge"), 0.5),
        }.items()
    },
    # The size that OpenCLIP added, with an epsilon of its own.
    "convnext_xxlarge": _variant("xxlarge", 0.5, norm=functools.partial(nn.LayerNorm, epsilon=1e-5)),
    **{
        f"convnextv2_{name}": _variant(name, rate, layer_scale=None, response_norm=GlobalResponseNorm)
        for name, rate in {
            **dict.fromkeys(("atto", "femto", "pico", "nano"), 0.1),
            "tiny": 0.2,
            "small": 0.2,
            "base": 0.1,
            "large": 0.2,
            "huge": 0.3,
        }.items()
    },
}


def _from_huggingface(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    labels = config.get("id2label")
    fields = {
        "num_classes": len(labels) if labels is not None else int(config.get("num_labels", 2)),
        "depths": tuple(config.get("depths") or (3, 3, 9, 3)),
        "widths": tuple(config.get("hidden_sizes") or (96, 192, 384, 768)),
        "drop_path_rate": config.get("drop_path_rate", 0.0),
    }
    return ("convnext_tiny" if config["model_type"] == "convnext" else "convnextv2_tiny"), fields


HUGGINGFACE = {"convnext": _from_huggingface, "convnextv2": _from_huggingface}
