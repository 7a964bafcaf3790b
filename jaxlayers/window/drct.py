"""DRCT: super-resolution by Swin blocks that see the outputs of all earlier blocks of their group."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.nn.drop_path import drop_path_rates
from jaxlayers.ops.patches import crop, from_blocks, split_shape
from jaxlayers.window import swin
from jaxlayers.window.swin import SwinBlock, layer_norm

# Means of red, green and blue in the DIV2K photographs, which the reference subtracts.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
# What PyTorch starts a convolution with: uniform, of variance 1 / (3 fan-in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_BLOCKS = 5


class ResidualDenseGroup(nn.Module):
    """Add to a map what five Swin blocks find, each of which sees the map and what all earlier ones found.

        z_i = leaky(A_i(Swin_i([x, z_1, ..., z_{i-1}]))),  i = 1..4,    out = x + s A_5(Swin_5([x, z_1, ..., z_4])),

    with x `[*batch, height, width, C]`, A_i linear in the features of a token, to G of them (A_5: to C), s = 0.2,
    leaky of slope 0.2, and [.] joining features: block i has C + (i - 1) G. Blocks 2 and 4 have shifted windows.

    Symmetry:
      None exactly: windows are tied to the map. With `window_size` at least the map, tokens may be permuted but for
      the relative positions.

    Attributes:
      num_heads: number of heads h of a block whose width W it divides; others have h - (W mod h), which must.
      growth: features G that each block but the last adds.
      window_size: the window, an int or (height, width); the shift is half of it.
      mlp_ratio: width of the MLPs' hidden layers of the first three blocks, in multiples of the block's width; that of
        the last two is 1.
      residual_scale: s.
      drop_path_rate: probability of dropping a residual branch of any of the blocks for a sample, in [0, 1).
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels in the blocks.
      conv_init: initialiser of the A_i.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      Sum over the blocks, of width W, of (4 + 2 mlp_ratio) W^2 + 2 M^2 W + W G multiply-accumulates a token, with M^2
      tokens a window.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.drct import ResidualDenseGroup
      >>> group = ResidualDenseGroup(num_heads=2, growth=4, window_size=4)
      >>> jax.eval_shape(group.init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 8)))[0].shape
      (1, 8, 8, 8)

    Source:
      Hsu, Lee & Chou, DRCT: Saving Image Super-resolution away from Information Bottleneck, CVPR Workshops 2024;
      written from the code at github.com/ming053l/DRCT (c0a8b51).

    Differs:
      As `SwinBlock`. In particular a map no longer than the window along an axis is one window there, and nothing is
      shifted; the reference, which decides that by the size it was built for, masks such a window into halves.
    """

    num_heads: int
    growth: int = 32
    window_size: int | tuple[int, ...] = 16
    mlp_ratio: float = 2.0
    residual_scale: float = 0.2
    drop_path_rate: float = 0.0
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    conv_init: Initializer = torch_uniform
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch height width features"]:
        """Apply the group.

        Args:
          x: map, channels last.
          deterministic: no dropped branches.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes, or a field does not fit the features.
        """
        _, _, features = split_shape(x.shape, 2)
        if self.growth < 1 or self.num_heads < 1:
            raise ValueError(f"growth={self.growth} and num_heads={self.num_heads} must be positive; set both")
        window = _pair(self.window_size)
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "bias_init": self.bias_init}

        def call(block: SwinBlock, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        found = [x]
        for index in range(_BLOCKS):
            last = index == _BLOCKS - 1
            width = features + index * self.growth
            block = SwinBlock(
                _heads(width, self.num_heads),
                window_size=window,
                shift_size=tuple(length // 2 for length in window) if index % 2 else (0, 0),
                mlp_ratio=self.mlp_ratio if index < 3 else 1.0,
                drop_path_rate=self.drop_path_rate,
                norm=self.norm,
                kernel_init=self.kernel_init,
                name=f"blocks_{index}",
                **common,
            )
            y = remat.remat_block(call, self.remat)(block, jnp.concatenate(found, axis=-1))
            y = nn.Dense(
                features if last else self.growth, kernel_init=self.conv_init, name=f"reductions_{index}", **common
            )(y)
            found.append(y if last else nn.leaky_relu(y, 0.2))
        return axes.constrain_map(x + self.residual_scale * found[-1])


class DRCT(nn.Module):
    """Enlarge pictures by a whole factor with groups of densely connected Swin blocks.

    The picture less its mean is convolved to C features f; g = f + conv(norm(groups(norm(f)))); then comes a
    convolution to `upsampling_features` with a leaky ReLU (slope 0.01), for each factor of the scale a convolution
    whose outputs are spread over the pixels that one becomes, and a last convolution to the picture's channels, to
    which the mean is added. All are 3 x 3.

    Symmetry:
      None exactly: windows are tied to the picture.

    Attributes:
      scale: the factor; 3 or a power of two.
      embed_dim: width C.
      num_groups: number of groups.
      num_heads: heads of the groups, see `ResidualDenseGroup`.
      window_size: window of the attentions, an int or (height, width). Pictures are continued by reflection to
        multiples of it.
      mlp_ratio: width of the MLPs' hidden layers, see `ResidualDenseGroup`.
      drop_path_rate: probability of dropping a residual branch, growing linearly with the group, from 0.
      upsampling_features: width of the maps between the groups and the picture.
      pixel_mean: mean of each channel, subtracted and added again; `None` = zeros.
      remat: what the backward pass computes anew in each block, see `ResidualDenseGroup`.
      group: makes a group, called with the fields `num_heads` and from `window_size` on that `ResidualDenseGroup` has
        but `residual_scale` and `conv_init`, and `name`. `functools.partial(ResidualDenseGroup, growth=8)` sets more.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels in the blocks.
      conv_init: initialiser of the convolutions outside the groups.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. One parameter tree serves every size.

    Cost:
      Linear in the number of pixels. `drct_x4` at 64 x 64: 74.3 G multiply-accumulates, 14.1 M parameters. From 256 x
      256 to 1,024 x 1,024 its backward pass keeps 51 GiB in float32, 4.3 GiB with blocks recomputed ("full"), and
      besides what one block needs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.drct import DRCT
      >>> model = DRCT(scale=2, embed_dim=16, num_groups=1, num_heads=2, window_size=4)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 3)))[0].shape
      (1, 18, 12, 3)

    Source:
      Hsu, Lee & Chou, DRCT: Saving Image Super-resolution away from Information Bottleneck, CVPR Workshops 2024;
      written from the code at github.com/ming053l/DRCT (c0a8b51), whose README gives a ninth of the multiply-
      accumulates that the code has.

    Differs:
      As `ResidualDenseGroup`. Padding by reflection is part of the model, not of the program around it, and reflects
      again where a picture is shorter than what is missing. Biases of convolutions start at zero.
    """

    scale: int = 4
    embed_dim: int = 180
    num_groups: int = 6
    num_heads: int = 6
    window_size: int | tuple[int, ...] = 16
    mlp_ratio: float = 2.0
    drop_path_rate: float = 0.1
    upsampling_features: int = 64
    pixel_mean: tuple[float, ...] | None = DIV2K_MEAN
    remat: str | bool = False
    group: Callable[..., nn.Module] = ResidualDenseGroup
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    conv_init: Initializer = torch_uniform
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch new_height new_width channels"]:
        """Enlarge.

        Args:
          x: pictures of any size, channels last, in [0, 1].
          deterministic: no dropped branches.

        Returns:
          Pictures of `scale` times the size, not clipped to [0, 1]. The map that enters the groups and the one after
          each of them are sown as `group_maps` in `intermediates`, cropped to the picture.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit it.
        """
        _, size, channels = split_shape(x.shape, 2)
        mean = (0.0,) * channels if self.pixel_mean is None else self.pixel_mean
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it to [0, 1] and convert it")
        if len(mean) != channels:
            raise ValueError(
                f"pixel_mean={self.pixel_mean} must have one entry for each of {channels} channels; set it"
            )
        if min(self.num_groups, self.embed_dim, self.upsampling_features) < 1:
            raise ValueError(
                f"num_groups={self.num_groups}, embed_dim={self.embed_dim} and "
                f"upsampling_features={self.upsampling_features} must be positive; set them"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {**dtypes, "bias_init": self.bias_init}

        def convolve(features: int, name: str, x: Array) -> Array:
            convolution = nn.Conv(features, (3, 3), kernel_init=self.conv_init, name=name, **common)
            return axes.constrain_map(convolution(x))

        centre = jnp.asarray(mean, x.dtype)
        shallow = convolve(self.embed_dim, "shallow", reflect_to_multiple(x - centre, _pair(self.window_size)))
        y = self.norm(name="patch_norm", **dtypes)(shallow)
        self.sow("intermediates", "group_maps", crop(y, size))
        for index, rate in enumerate(self._rates()):
            y = self.group(
                num_heads=self.num_heads,
                window_size=self.window_size,
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=rate,
                remat=self.remat,
                norm=self.norm,
                kernel_init=self.kernel_init,
                name=f"groups_{index}",
                **common,
            )(y, deterministic=deterministic)
            self.sow("intermediates", "group_maps", crop(y, size))
        y = shallow + convolve(self.embed_dim, "after_groups", self.norm(name="final_norm", **dtypes)(y))
        y = nn.leaky_relu(convolve(self.upsampling_features, "before_upsampling", y), 0.01)
        for index, step in enumerate(_steps(self.scale)):
            y = axes.constrain_map(
                spread(convolve(self.upsampling_features * step**2, f"upsamplings_{index}", y), step)
            )
        y = convolve(channels, "last", y)
        return crop(y, tuple(self.scale * length for length in size)) + centre.astype(y.dtype)

    def _rates(self) -> Sequence[float]:
        # The reference spreads the rates over six blocks a group and takes the first of each six.
        return drop_path_rates(self.drop_path_rate, 6 * self.num_groups)[::6]


def reflect_to_multiple(
    x: Float[Array, "*batch height width channels"], multiple: Sequence[int]
) -> Float[Array, "*batch padded_height padded_width channels"]:
    """Continue a map at its ends by reflection about the last pixel, up to multiples."""
    _, size, _ = split_shape(x.shape, 2)
    ends = [(0, -length % step) for length, step in zip(size, multiple, strict=True)]
    if not any(end for _, end in ends):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + ends + [(0, 0)], mode="reflect")


def spread(
    x: Float[Array, "*batch height width features"], step: int
) -> Float[Array, "*batch new_height new_width new_features"]:
    """Spread the features of each place over `step` x `step` places (pixel shuffle).

    Feature (c step + i) step + j goes to feature c of the place (i, j), PyTorch's order.

    Raises:
      ValueError: if the features do not divide by the number of places.
    """
    if x.shape[-1] % step**2:
        raise ValueError(f"features={x.shape[-1]} must be divisible by step**2={step**2}; set the features or step")
    return from_blocks(jnp.moveaxis(x.reshape(*x.shape[:-1], -1, step, step), -3, -1), 2)


def feature_intensity(
    model: DRCT, variables: Mapping[str, Any], x: Float[Array, "*batch height width channels"]
) -> Float[Array, "maps"]:
    """Return how strong the feature maps are along the network: the paper's sign of an information bottleneck.

    Args:
      model: the model, with any kind of group.
      variables: its variables.
      x: pictures.

    Returns:
      Mean absolute value of the map that enters the groups, then of the one after each group. The paper finds that in
      plain residual networks it rises with depth and falls sharply at the end.

    Differs:
      The paper plots intensities without a formula, and its code shows single maps; the mean absolute value is ours.
    """
    _, state = model.apply(variables, x, mutable=["intermediates"])
    return jnp.stack([jnp.mean(jnp.abs(each.astype(jnp.float32))) for each in state["intermediates"]["group_maps"]])


def _heads(width: int, num_heads: int) -> int:
    heads = num_heads - width % num_heads
    if width % heads:
        raise ValueError(
            f"a block of width {width} must be divisible by its {heads} heads, num_heads={num_heads} less the "
            "remainder; set num_heads, growth or embed_dim"
        )
    return heads


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"window_size={size} must be a positive int or (height, width); set window_size")
    return pair


def _steps(scale: int) -> tuple[int, ...]:
    if scale == 3:
        return (3,)
    if scale < 1 or scale & (scale - 1):
        raise ValueError(f"scale={scale} must be 3 or a power of two; set scale")
    return (2,) * int(math.log2(scale))


# Reference checkpoints ------------------------------------------------------------------------------------------------

_BLOCK = "layers.{group}.swin.{block}"
# See `jaxlayers.core.reference`. `from_reference` first counts their blocks and convolutions as ours are counted.
REFERENCE_NAMES: Mapping[str, str] = {
    "shallow": "conv_first",
    "patch_norm": "patch_embed.norm",
    "groups/blocks/norm1": f"{_BLOCK}.norm1",
    "groups/blocks/norm2": f"{_BLOCK}.norm2",
    "groups/blocks/attention/relative_position_bias_table": f"{_BLOCK}.attn.relative_position_bias_table",
    **{f"groups/blocks/attention/{part}": f"{_BLOCK}.attn.{part}" for part in ("query", "key", "value")},
    "groups/blocks/attention/out": f"{_BLOCK}.attn.proj",
    "groups/blocks/feed_forward/up": f"{_BLOCK}.mlp.fc1",
    "groups/blocks/feed_forward/down": f"{_BLOCK}.mlp.fc2",
    "groups/reductions": "layers.{group}.adjust.{reduction}",
    "final_norm": "norm",
    "after_groups": "conv_after_body",
    "before_upsampling": "conv_before_upsample.0",
    "upsamplings": "upsample.{upsampling}",
    "last": "conv_last",
}


def from_reference(tensors: Mapping[str, Any], model: DRCT) -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a checkpoint of ming053l/DRCT.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if names or shapes of the tensors are not those of the model.
    """

    def counted(name: str) -> str:
        name = re.sub(r"\.(swin|adjust)(\d)\.", lambda found: f".{found[1]}.{int(found[2]) - 1}.", name)
        # Every other entry of theirs is the spreading.
        return re.sub(r"^upsample\.(\d)", lambda found: f"upsample.{int(found[1]) // 2}", name)

    if "conv_first.weight" not in tensors:
        raise ValueError("a checkpoint of DRCT must hold 'conv_first.weight'; pass the network's own tensors")
    image = jax.ShapeDtypeStruct((1, *_pair(model.window_size), tensors["conv_first.weight"].shape[1]), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))["params"]
    theirs = reference.split_fused({counted(name): tensor for name, tensor in tensors.items()})
    return reference.read_reference(theirs, wanted, REFERENCE_NAMES, ignored=("relative_position_index", "attn_mask"))


def reference_inputs(model: DRCT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *_pair(model.window_size), 3), jnp.float32),)


def _counted_their_way(name: str) -> str:
    name = re.sub(r"\.(swin|adjust)\.(\d+)\.", lambda found: f".{found[1]}{int(found[2]) + 1}.", name)
    return re.sub(r"^upsample\.(\d+)", lambda found: f"upsample.{2 * int(found[1])}", name)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/ming053l/DRCT",
        module=DRCT,
        read=dialects.from_params(from_reference),
        marks=(r"^conv_first\.weight$", r"^layers\.0\.swin1\.attn\.relative_position_bias_table$"),
        ignored=swin.COMPUTED,
        layout=dialects.table_layout(
            REFERENCE_NAMES,
            shapes={"reductions/kernel": dialects.pointwise()},
            fused=dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
            rename=_counted_their_way,
        ),
    ),
)


VARIANTS: dict[str, dict[str, Any]] = {
    f"drct{suffix}_x{scale}": {
        "module": DRCT,
        "inputs": (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),),
        "scale": scale,
        "num_groups": groups,
    }
    for suffix, groups in (("", 6), ("_l", 12))
    for scale in (2, 3, 4)
}
