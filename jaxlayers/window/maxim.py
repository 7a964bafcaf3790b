"""MAXIM: a U-Net that restores pictures by gated perceptrons over windows and over a dilated grid."""

import dataclasses
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
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.ops.patches import crop, split_shape
from jaxlayers.window.maxim_blocks import (
    CrossGating,
    MultiAxisGatedMlp,
    ResidualChannelAttention,
    SupervisedAttention,
    small_normal,
)

# Pure functions -------------------------------------------------------------------------------------------------------


def picture_scales(
    x: Float[Array, "*batch height width channels"], num_scales: int
) -> tuple[Float[Array, "*batch _ _ channels"], ...]:
    """Return a picture at full size, half, a quarter and so on: what `Maxim` reads, and is supervised by.

    Of each 2^s x 2^s pixels the one at (2^(s-1), 2^(s-1)) is taken (the nearest one, not a mean), so that a network
    that adds nothing gives back just these.

    Args:
      x: a picture, channels last.
      num_scales: how many.

    Returns:
      The pictures, largest first.

    Raises:
      ValueError: if `num_scales` is not positive or leaves nothing of the picture.
    """
    _, size, _ = split_shape(x.shape, 2)
    if num_scales < 1 or min(size) <= 2 ** (num_scales - 1) // 2:
        raise ValueError(
            f"num_scales={num_scales} must be at least 1 and leave something of a picture of size {size}; set "
            "num_scales or pass a larger picture"
        )
    return tuple(x[..., 2**s // 2 :: 2**s, 2**s // 2 :: 2**s, :] for s in range(num_scales))


def charbonnier(
    x: Float[Array, "*batch height width channels"],
    y: Float[Array, "*batch height width channels"],
    *,
    epsilon: float = 1e-3,
) -> Float[Array, "*batch"]:
    """Return the mean of sqrt((x - y)^2 + epsilon^2), a smooth absolute difference; equal pictures have epsilon."""
    difference = (x - y).astype(at_least_float32(x.dtype))
    return jnp.mean(jnp.sqrt(jnp.square(difference) + epsilon**2), axis=(-3, -2, -1))


def frequency_distance(
    x: Float[Array, "*batch height width channels"], y: Float[Array, "*batch height width channels"]
) -> Float[Array, "*batch"]:
    """Return the mean of |F(x - y)|, with F the orthonormal Fourier transform over space.

    By Parseval it is at most the root of the mean square of `x - y`, and for white noise of any picture size the same
    multiple of it.
    """
    difference = (x - y).astype(at_least_float32(x.dtype))
    spectrum = jnp.fft.fft2(difference, axes=(-3, -2), norm="ortho")
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # The root has no finite derivative at zero, where equal pictures are.
    return jnp.mean(jnp.sqrt(power + jnp.finfo(power.dtype).tiny), axis=(-3, -2, -1))


def restoration_loss(
    outputs: Sequence[Sequence[Float[Array, "*batch _ _ channels"]]],
    target: Float[Array, "*batch height width channels"],
    *,
    epsilon: float = 1e-3,
    frequency_weight: float = 0.1,
) -> Float[Array, "*batch"]:
    """Return the sum of `charbonnier` and weighted `frequency_distance` over all stages and scales.

    Args:
      outputs: of each stage the picture at each scale, as `Maxim` gives them.
      target: the clean picture; it is brought to the scales by `picture_scales`.
      epsilon: of `charbonnier`.
      frequency_weight: factor of `frequency_distance`.

    Returns:
      A number for each picture.
    """
    total = jnp.zeros(target.shape[:-3], at_least_float32(target.dtype))
    for stage in outputs:
        for found, wanted in zip(stage, picture_scales(target, len(stage)), strict=True):
            total = total + charbonnier(found, wanted, epsilon=epsilon)
            total = total + frequency_weight * frequency_distance(found, wanted)
    return total


def resize_by_two_powers(
    x: Float[Array, "*batch height width channels"], power: int
) -> Float[Array, "*batch new_height new_width channels"]:
    """Resize a map bilinearly by 2^power both ways, as `jax.image.resize` does, at a cost linear in its pixels.

    A smaller map is made with the antialiasing triangle, 2^(1 - power) pixels wide. (`jax.image.resize` multiplies by
    a matrix as long as the map, a cost that grows faster than the map.)

    Raises:
      ValueError: if a map is to become smaller and its size is not a multiple of the factor.
    """
    return _resize_axis(_resize_axis(x, power, x.ndim - 3), power, x.ndim - 2)


def _resize_axis(x: Array, power: int, axis: int) -> Array:
    if power == 0:
        return x
    factor, length = 2 ** abs(power), x.shape[axis]
    # Offset of each fine pixel of a cell from the cell's middle, in cells; what it shares with the cell before, the
    # cell itself, and the one behind.
    offset = (np.arange(factor) + 0.5) / factor - 0.5
    shares = np.stack([np.maximum(-offset, 0), 1 - np.abs(offset), np.maximum(offset, 0)])
    wide = x.astype(at_least_float32(x.dtype))

    def weigh(shares: np.ndarray, parts: Sequence[Array]) -> Array:
        products = [float(share) * part for share, part in zip(shares, parts, strict=True) if share]
        return functools.reduce(jnp.add, products)

    # Sums of slices, where features stay the last axis: for products with a matrix of 3 rows a TPU turns the map.
    if power > 0:
        around = jnp.pad(wide, [(int(each == axis),) * 2 for each in range(x.ndim)], mode="edge")
        near = [jax.lax.slice_in_dim(around, start, start + length, axis=axis) for start in range(3)]
        fine = jnp.stack([weigh(column, near) for column in shares.T], axis=axis + 1)
        return fine.reshape(*x.shape[:axis], factor * length, *x.shape[axis + 1 :]).astype(x.dtype)
    if length % factor:
        raise ValueError(f"length {length} must be a multiple of {factor}; pad the map first")
    count = length // factor
    cells = wide.reshape(*x.shape[:axis], count, factor, *x.shape[axis + 1 :])
    before, own, behind = (
        weigh(row, [jax.lax.index_in_dim(cells, place, axis=axis + 1, keepdims=False) for place in range(factor)])
        for row in shares
    )
    # A cell hears the fine pixels of the cell before it that lean to its side, and of the one behind.
    none = jnp.zeros_like(jax.lax.slice_in_dim(own, 0, 1, axis=axis))
    heard = (
        own
        + jnp.concatenate([none, jax.lax.slice_in_dim(behind, 0, count - 1, axis=axis)], axis=axis)
        + jnp.concatenate([jax.lax.slice_in_dim(before, 1, count, axis=axis), none], axis=axis)
    )
    weight = np.full(count, shares.sum())
    weight[0] -= shares[2].sum()
    weight[-1] -= shares[0].sum()
    weight = weight.reshape(-1, *(1,) * (x.ndim - axis - 1))
    return (heard / jnp.asarray(weight, wide.dtype)).astype(x.dtype)


# Model ----------------------------------------------------------------------------------------------------------------


class Maxim(nn.Module):
    """Restore a picture by one or more U-Nets of gated perceptrons, at several scales.

    Each stage reads the picture at the first scales of `picture_scales`, encodes level by level (`MultiAxisGatedMlp`
    then `ResidualChannelAttention`, then half the size), goes through bottleneck blocks, lets what it found there gate
    the skips of every level, coarsest first (`CrossGating`), and decodes; at every scale it adds what its head shows to
    the given picture. Later stages start from features weighed by the picture of the stage before
    (`SupervisedAttention`), and gate their encoders by that stage's maps.

    Symmetry:
      None exactly: windows and grids are tied to the picture. With heads of zeros all pictures of all stages are the
      given ones, exactly.

    Attributes:
      features: width of the finest level; each coarser one has twice that of the one before.
      window_size: windows of each level, finest first, one entry a level; the last one serves the bottleneck too.
      grid_size: cells of the grid of each level, likewise.
      num_stages: number of U-Nets.
      num_scales: scales that are read and supervised, at most as many as levels.
      depth: blocks of each level, in encoder, decoder and each part of the bottleneck.
      bottleneck_depth: parts of the bottleneck, each with its own skip.
      expand_ratio: width of the two halves of a block together, in multiples of the level's.
      mlp_ratio: width before a block's gates, in multiples of that of a half.
      squeeze_ratio: width of the MLPs that weigh features, in multiples of the level's.
      remat: what of each block is recomputed in the backward pass, a name of `jaxlayers.core.remat.POLICIES`: "full"
        (or True) keeps its inputs alone, "none" (or False) everything.
      dtype: compute dtype; `None` infers it from input and parameters. The norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of convolutions and of cross-gating's kernels over features.
      mlp_init: initialiser of the kernels of gated perceptrons and of all matrices over space.
      bias_init: initialiser of the biases.

    Cost:
      Linear in the number of pixels. S-1 at 256 x 256: 42.4 G multiply-accumulates, of 46.6 G that the official code
      states, which enlarges maps before it projects them. At 1,024 x 1,024 the backward pass of S-1 keeps 75 GiB in
      float32, 4.7 GiB with blocks recomputed ("full"), and besides what one block needs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.maxim import Maxim
      >>> model = Maxim(features=4, window_size=(2, 2), grid_size=(2, 2), num_stages=2, num_scales=2, depth=1)
      >>> outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 15, 10, 3)))
      >>> [[picture.shape for picture in stage] for stage in outputs]
      [[(1, 15, 10, 3), (1, 7, 5, 3)], [(1, 15, 10, 3), (1, 7, 5, 3)]]

    Source:
      Tu et al., MAXIM: Multi-Axis MLP for Image Processing, CVPR 2022; github.com/google-research/maxim, of which
      abstract and code were read.

    Differs:
      A picture of any size: it is continued by its mirror image at the ends up to the multiple that all levels need
      (64 in the variants), and results are cropped; the official evaluation pads at both ends, its model takes
      multiples alone. Scales come finest first, officially last. A map is projected before it is enlarged for another
      level, which is the same and cheaper. Officially the grid of the coarse levels has the windows' size, here a field
      of its own; the variants have both equal. Left out: dropout (rate 0 in all variants), the forms without biases,
      without gated perceptrons or without cross-gating, and numbers of output channels other than the input's.
    """

    features: int = 32
    window_size: tuple[int, ...] = (16, 16, 8)
    grid_size: tuple[int, ...] = (16, 16, 8)
    num_stages: int = 1
    num_scales: int = 3
    depth: int = 2
    bottleneck_depth: int = 2
    expand_ratio: float = 2.0
    mlp_ratio: float = 2.0
    squeeze_ratio: float = 0.25
    remat: str | bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    mlp_init: Initializer = small_normal
    bias_init: Initializer = zeros()

    @property
    def multiple(self) -> int:
        """What height and width are padded to a multiple of."""
        sizes = [*zip(self.window_size, self.grid_size, strict=True)]
        return math.lcm(*(2**level * side for level, pair in enumerate([*sizes, sizes[-1]]) for side in pair))

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"]
    ) -> tuple[tuple[Float[Array, "*batch _ _ channels"], ...], ...]:
        """Restore.

        Args:
          x: pictures of any size, channels last, usually in [0, 1].

        Returns:
          Of each stage the picture at each scale, largest first; the result is `outputs[-1][0]`.

        Raises:
          ValueError: if `x` has fewer than three axes, is not of floating point or has another number of channels than
            the parameters are for, or a field does not fit.
        """
        self._check(x)
        given = picture_scales(x, self.num_scales)
        parts = self._parts()
        padded = picture_scales(_mirror_to_multiple(x, self.multiple), self.num_scales)
        outputs, carried = [], None
        for number in range(self.num_stages):
            last = number == self.num_stages - 1
            pictures, carried = _Stage(parts, last=last, name=f"stages_{number}")(padded, carried)
            outputs.append(tuple(crop(one, like.shape[-3:-1]) for one, like in zip(pictures, given, strict=True)))
        return tuple(outputs)

    def restore(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height width channels"]:
        """Return the last stage's picture at full size alone: `model.apply(variables, x, method="restore")`."""
        return self(x)[-1][0]

    def _check(self, x: Array) -> None:
        _, _, channels = split_shape(x.shape, 2)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        counts = {name: getattr(self, name) for name in ("features", "num_stages", "depth", "bottleneck_depth")}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be positive; set {name}")
        levels = len(self.window_size)
        if not levels or levels != len(self.grid_size) or min(*self.window_size, *self.grid_size) < 1:
            raise ValueError(
                f"window_size={self.window_size} and grid_size={self.grid_size} must have one positive entry a level; "
                "set both"
            )
        if not 1 <= self.num_scales <= levels:
            raise ValueError(
                f"num_scales={self.num_scales} must be from 1 to the {levels} levels of window_size; set num_scales"
            )
        stored: Any = self.variables.get("params", {})
        for name in ("stages_0", "inputs_0", "kernel"):
            stored = stored.get(name, {})
        if len(stored) and stored.shape[-2] != channels:
            raise ValueError(
                f"pictures of {channels} channels must have the {stored.shape[-2]} that the parameters are for; pass "
                "such pictures or initialise anew"
            )

    def _parts(self) -> "_Parts":
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "bias_init": self.bias_init,
        }
        kernels = {**common, "kernel_init": self.kernel_init}
        return _Parts(
            features=self.features,
            sizes=tuple(zip(self.window_size, self.grid_size, strict=True)),
            depth=self.depth,
            bottleneck_depth=self.bottleneck_depth,
            remat=self.remat,
            mix=functools.partial(
                MultiAxisGatedMlp,
                expand_ratio=self.expand_ratio,
                mlp_ratio=self.mlp_ratio,
                kernel_init=self.mlp_init,
                **common,
            ),
            attend=functools.partial(ResidualChannelAttention, squeeze_ratio=self.squeeze_ratio, **kernels),
            cross=functools.partial(CrossGating, mix_init=self.mlp_init, **kernels),
            supervise=functools.partial(SupervisedAttention, **kernels),
            dense=functools.partial(nn.Dense, **kernels),
            convolve=functools.partial(nn.Conv, **kernels),
            enlarge=functools.partial(nn.ConvTranspose, kernel_size=(2, 2), strides=(2, 2), **kernels),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """What all stages are made of: sizes, and makers of modules.

    Attributes:
      features: width of the finest level.
      sizes: window and grid of each level.
      depth: blocks of a level.
      bottleneck_depth: parts of the bottleneck.
      remat: what of each block is recomputed.
      mix: makes a multi-axis block.
      attend: makes a channel attention.
      cross: makes a cross-gating.
      supervise: makes a supervised attention.
      dense: makes a linear layer.
      convolve: makes a convolution.
      enlarge: makes a transposed convolution that doubles a map.
    """

    features: int
    sizes: tuple[tuple[int, int], ...]
    depth: int
    bottleneck_depth: int
    remat: str | bool
    mix: Callable[..., Any]
    attend: Callable[..., Any]
    cross: Callable[..., Any]
    supervise: Callable[..., Any]
    dense: Callable[..., Any]
    convolve: Callable[..., Any]
    enlarge: Callable[..., Any]

    def width(self, level: int) -> int:
        """Return the features of a level."""
        return 2**level * self.features

    def call(self, block: nn.Module, *arrays: Any) -> Any:
        """Apply a block, of which the backward pass recomputes what `remat` says."""
        return remat.remat_block(lambda block, *arrays: block(*arrays), self.remat)(block, *arrays)


class _Stage(nn.Module):
    """One U-Net.

    Attributes:
      parts: what it is made of.
      last: its heads are convolutions; else `SupervisedAttention` prepares the next stage.
    """

    parts: _Parts
    last: bool

    @nn.compact
    def __call__(self, pictures: Sequence[Array], carried: Any) -> tuple[tuple[Array, ...], Any]:
        """Return the pictures of all scales, and features, encoded and decoded maps for the next stage."""
        parts = self.parts
        levels = range(len(parts.sizes))

        def cross(level: int, name: str, x: Array, y: Array, *, upsample: bool = False) -> tuple[Array, Array]:
            window, grid = parts.sizes[level]
            width = parts.width(level)
            return parts.call(
                parts.cross(width, window_size=window, grid_size=grid, upsample=upsample, name=f"{name}_{level}"), x, y
            )

        read = []
        for scale, picture in enumerate(pictures):
            x = axes.constrain_map(
                parts.convolve(parts.width(scale), (3, 3), name=f"inputs_{scale}")(axes.constrain_map(picture))
            )
            read.append(x if carried is None else cross(scale, "input_gatings", x, carried[0][scale])[0])

        x, encoded = read[0], []
        for level in levels:
            # The finest picture enters the first level twice, as in the official code.
            entering = [x, read[level]] if level < len(read) else [x]
            x = _Level(parts, level, name=f"encoders_{level}")(jnp.concatenate(entering, axis=-1))
            if carried is not None:
                x = cross(level, "encoder_gatings", x, carried[1][level] + carried[2][level])[0]
            encoded.append(x)
            x = axes.constrain_map(parts.convolve(parts.width(level), (4, 4), strides=2, name=f"reductions_{level}")(x))
        for number in range(parts.bottleneck_depth):
            x = _Level(parts, levels[-1], dense=True, name=f"bottlenecks_{number}")(x)

        gating, skips = x, {}
        for level in reversed(levels):
            signal = _Join(parts, level, name=f"encoded_joins_{level}")(dict(enumerate(encoded)))
            skips[level], gating = cross(level, "skip_gatings", signal, gating, upsample=True)

        decoded, shown, weighed = {}, {}, {}
        for level in reversed(levels):
            x = axes.constrain_map(parts.enlarge(parts.width(level), name=f"enlargements_{level}")(x))
            signal = _Join(parts, level, name=f"skip_joins_{level}")(skips)
            x = _Level(parts, level, name=f"decoders_{level}")(jnp.concatenate([x, signal], axis=-1))
            decoded[level] = x
            if level < len(pictures):
                picture = pictures[level]
                if self.last:
                    head = parts.convolve(picture.shape[-1], (3, 3), name=f"heads_{level}")
                    shown[level] = axes.constrain_map(picture + head(x))
                else:
                    supervise = parts.supervise(name=f"supervisors_{level}")
                    weighed[level], shown[level] = parts.call(supervise, x, picture)
        return tuple(shown[scale] for scale in range(len(pictures))), (weighed, encoded, decoded)


class _Join(nn.Module):
    """Maps of all levels, each projected and brought to the size of one, side by side.

    Attributes:
      parts: what it is made of.
      level: whose size and width.
    """

    parts: _Parts
    level: int

    @nn.compact
    def __call__(self, maps: Mapping[int, Array]) -> Array:
        found = []
        for source, x in maps.items():
            project = self.parts.dense(self.parts.width(self.level), name=f"sources_{source}")
            # Resizing and projecting commute, since the weights of each resized pixel add up to one: the small map is
            # projected.
            power = source - self.level
            x = resize_by_two_powers(project(x), power) if power > 0 else project(resize_by_two_powers(x, power))
            found.append(axes.constrain_map(x))
        return jnp.concatenate(found, axis=-1)


class _Level(nn.Module):
    """Blocks of one level, each a multi-axis block and a channel attention, after a projection and beside a skip.

    Attributes:
      parts: what it is made of.
      level: which one.
      dense: the channel attentions mix features alone, as in the bottleneck.
    """

    parts: _Parts
    level: int
    dense: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        parts = self.parts
        window, grid = parts.sizes[self.level]
        x = skip = axes.constrain_map(parts.dense(parts.width(self.level), name="project")(x))
        for number in range(parts.depth):
            x = parts.call(parts.mix(window_size=window, grid_size=grid, name=f"blocks_{number}"), x)
            x = parts.call(parts.attend(dense=self.dense, name=f"attentions_{number}"), x)
        return x + skip


def _mirror_to_multiple(x: Array, multiple: int) -> Array:
    """Continue a picture by its mirror image at the ends of height and width, up to multiples."""
    ends = [(0, -length % multiple) for length in x.shape[-3:-1]]
    if not any(end for _, end in ends):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + ends + [(0, 0)], mode="symmetric")


# Reference checkpoints ------------------------------------------------------------------------------------------------


def _below(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the parts of a module."""
    return {f"{ours}/{mine}": f"{theirs}.{name}" for mine, name in names.items()}


_MIX = {
    "norm": "LayerNorm_in",
    "up": "in_project",
    **{
        f"{ours}/{mine}": f"{theirs}GmlpLayer.{name.format(theirs)}"
        for ours, theirs in (("grid", "Grid"), ("block", "Block"))
        for mine, name in {
            "norm": "LayerNorm",
            "up": "in_project",
            "gate/norm": "{}GatingUnit.intermediate_layernorm",
            "gate/mix": "{}GatingUnit.Dense_0",
            "down": "out_project",
        }.items()
    },
    "down": "out_project",
}
_WEIGH = {"norm": "LayerNorm", "squeeze": "channel_attention.Conv_0", "excite": "channel_attention.Conv_1"}
_ATTEND = {**_WEIGH, "convolution1": "conv1", "convolution2": "conv2"}
_ATTEND_DENSE = {**_WEIGH, "up": "channel_mixing.Dense_0", "down": "channel_mixing.Dense_1"}
_CROSS = {
    "enlarge": "ConvTranspose_0",
    "project_x": "Conv_0",
    "project_y": "Conv_1",
    **{
        f"{mine}_{map_}": f"{name}_{map_}"
        for map_ in "xy"
        for mine, name in {"norm": "LayerNorm", "in": "in_project", "out": "out_project"}.items()
    },
    **{
        f"gate_{map_}/{mine}": f"SplitHeadMultiAxisGating_{map_}.{name}"
        for map_ in "xy"
        for mine, name in {
            "norm": "LayerNorm_in",
            "up": "in_project",
            "grid": "Dense_0",
            "block": "Dense_1",
            "down": "out_project",
        }.items()
    },
}
_SUPERVISE = {"features": "Conv_0", "picture": "Conv_1", "attention": "Conv_2"}


def _level(ours: str, theirs: str, project: str, attend: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the blocks of a level."""
    return {
        f"stages/{ours}/project": f"{theirs}.{project}",
        **_below(f"stages/{ours}/blocks", f"{theirs}.SplitHeadMultiAxisGmlpLayer_{{block}}", _MIX),
        **_below(f"stages/{ours}/attentions", f"{theirs}.{attend}{{attention}}", names),
    }


_ENCODER, _DECODER = "stage_{stage}_encoder_block", "stage_{stage}_decoder_block_{decoder}"
# See `jaxlayers.core.reference`; `official` are the files of google-research/maxim. Joins are called there by a running
# number, see `_named_joins`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "official": {
        "stages/inputs": "stage_{stage}_input_conv_{input}",
        **_below("stages/input_gatings", "stage_{stage}_input_fuse_sam_{input_gating}", _CROSS),
        **_level("encoders", f"{_ENCODER}_{{encoder}}", "Conv_0", "channel_attention_block_1", _ATTEND),
        **_below("stages/encoder_gatings", f"{_ENCODER}_{{encoder_gating}}.cross_gating_block", _CROSS),
        "stages/reductions": f"{_ENCODER}_{{reduction}}.Conv_1",
        **_level(
            "bottlenecks",
            "stage_{stage}_global_block_{bottleneck}",
            "input_proj",
            "channel_attention_block_1_",
            _ATTEND_DENSE,
        ),
        "stages/encoded_joins/sources": "stage_{stage}_encoded_{encoded_join}_{source}.Conv_0",
        **_below("stages/skip_gatings", "stage_{stage}_cross_gating_block_{skip_gating}", _CROSS),
        "stages/skip_joins/sources": "stage_{stage}_skip_{skip_join}_{source}.Conv_0",
        "stages/enlargements": "stage_{stage}_decoder_block_{enlargement}.ConvTranspose_0",
        **_level("decoders", f"{_DECODER}.UNetEncoderBlock_0", "Conv_0", "channel_attention_block_1", _ATTEND),
        **_below("stages/supervisors", "stage_{stage}_supervised_attention_module_{supervisor}", _SUPERVISE),
        "stages/heads": "stage_{stage}_output_conv_{head}",
    }
}


def from_reference(tensors: Mapping[str, Any], model: Maxim, *, source: str = "official") -> dict[str, Any]:
    """Return variables of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by their path, joined by `/` as in the official `.npz` files (the parameters stand below
        `opt/target` there, what else is in the file is left out), or a flattened tree of parameters alone.
      model: the model they are for.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      The collection `params`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    below = "opt/target/"
    if any(name.startswith(below) for name in tensors):
        tensors = {name.removeprefix(below): value for name, value in tensors.items() if name.startswith(below)}
    levels = len(model.window_size)
    # Named and turned as PyTorch has them, which is what the reader takes.
    renamed = {}
    for name, value in tensors.items():
        module, _, leaf = _named_joins(name, levels).rpartition("/")
        is_kernel = leaf == "kernel"
        leaf = "weight" if leaf in ("kernel", "scale") else leaf
        renamed[f"{module.replace('/', '.')}.{leaf}"] = np.moveaxis(value, (-1, -2), (0, 1)) if is_kernel else value
    table, channels = reference.choose_table(REFERENCE_NAMES, source, renamed, "stages_0/inputs_0/kernel")
    image = jax.ShapeDtypeStruct((1, model.multiple, model.multiple, channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))["params"]
    return {"params": reference.read_reference(renamed, wanted, table)}


def _named_joins(name: str, levels: int) -> str:
    """Return a name with `UpSampleRatio_<running number>` replaced by stage, kind, level and source of the join."""

    def named(match: re.Match[str]) -> str:
        stage, number = divmod(int(match[1]), 2 * levels**2)
        is_skip, number = divmod(number, levels**2)
        above, order = divmod(number, levels)
        # Levels are visited coarsest first; skips too are listed in that order.
        level, other = levels - 1 - above, levels - 1 - order if is_skip else order
        return f"stage_{stage}_{'skip' if is_skip else 'encoded'}_{level}_{other}"

    return re.sub(r"^UpSampleRatio_(\d+)", named, name)


def reference_inputs(model: Maxim) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the least size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, model.multiple, model.multiple, 3), jnp.float32),)


def _layout(below: str) -> Callable[[Maxim, Mapping[str, Any]], dialects.Layout]:
    """Return the function that tells a layout; `below` stands before every name."""

    def layout(model: Maxim, variables: Mapping[str, Any]) -> dialects.Layout:
        levels = len(model.window_size)

        def counted(match: re.Match[str]) -> str:
            stage, level, other = (int(match[place]) for place in (1, 3, 4))
            is_skip = match[2] == "skip"
            order = levels - 1 - other if is_skip else other
            return f"UpSampleRatio_{levels * (levels * (2 * stage + is_skip) + levels - 1 - level) + order}/"

        found = {}
        for path, leaf in flax.traverse_util.flatten_dict(dict(variables["params"]), sep="/").items():
            name = reference.reference_name(path, REFERENCE_NAMES["official"]).rpartition(".")[0].replace(".", "/")
            name = re.sub(r"^stage_(\d+)_(encoded|skip)_(\d+)_(\d+)/", counted, name)
            # Ours are matrices where theirs are convolutions of size one.
            is_point = len(leaf.shape) == 2 and re.search("Conv|input_proj$", name.rpartition("/")[2])
            found[f"{below}{name}/{path.rpartition('/')[2]}"] = (1, 1, *leaf.shape) if is_point else tuple(leaf.shape)
        return found

    return layout


DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=Maxim,
        read=dialects.from_variables(from_reference, source="official"),
        marks=(rf"^{below}stage_0_input_conv_0/kernel$", rf"^{below}UpSampleRatio_0/Conv_0/kernel$"),
        ignored={r"^opt/(?!target/)": "the state of a training"},
        layout=_layout(below),
    )
    for name, origin, below in (
        ("official", "files of github.com/google-research/maxim", "opt/target/"),
        ("official_tree", "parameters of google-research/maxim alone, their path joined by `/`", ""),
    )
)


VARIANTS: dict[str, dict[str, Any]] = {
    f"maxim_s{stages}": {
        "module": Maxim,
        "inputs": (jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32),),
        "num_stages": stages,
    }
    for stages in (1, 2, 3)
}
