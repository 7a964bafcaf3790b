"""ShiftViT: a pyramid of blocks that mix tokens by moving some of their features one place, at no cost."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.remat import remat_block
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.ops.patches import split_shape

# One mean and one variance for all tokens and features of a map (a group norm with one group), then a scale and a bias
# for each feature.
map_norm = functools.partial(nn.LayerNorm, epsilon=1e-5, reduction_axes=(-3, -2, -1))

# The axis and the direction that each of the four moved groups takes, in their order: left, right, up, down.
_MOVES = ((-2, -1), (-2, 1), (-3, -1), (-3, 1))


def shift_features(
    x: Float[Array, "*batch height width features"], group: int, distance: int = 1
) -> Float[Array, "*batch height width features"]:
    """Move four groups of features left, right, up and down; what enters at the border is zero.

    Args:
      x: a map. Its first `group` features move left, the next right, up, down; the others stay.
      group: how many features each direction moves.
      distance: by how many places; 0 returns `x`.

    Returns:
      A map like `x`.

    Raises:
      ValueError: if four groups exceed the features, or a number is negative.
    """
    _, size, features = split_shape(x.shape, 2)
    if group < 0 or distance < 0 or 4 * group > features:
        raise ValueError(
            f"group={group} and distance={distance} must not be negative, and 4 * group not exceed the {features} "
            "features; set divisions to 4 or more"
        )
    if group == 0 or distance == 0:
        return x
    parts = [x[..., index * group : (index + 1) * group] for index in range(4)]
    return jnp.concatenate(
        [_move(part, *move, min(distance, size[move[0] + 3])) for part, move in zip(parts, _MOVES, strict=True)]
        + [x[..., 4 * group :]],
        axis=-1,
    )


def _move(x: Array, axis: int, sign: int, distance: int) -> Array:
    """Move along an axis of height (-3) or width (-2), forwards (1) or backwards (-1), and fill with zeros."""
    length = x.shape[axis]
    kept = jax.lax.slice_in_dim(x, *((0, length - distance) if sign > 0 else (distance, length)), axis=x.ndim + axis)
    ends = [(0, 0)] * x.ndim
    ends[x.ndim + axis] = (distance, 0) if sign > 0 else (0, distance)
    return jnp.pad(kept, ends)


class ShiftViTBlock(nn.Module):
    """Move some features of all tokens one place, then mix the features of each token.

    z = shift(x), out = z + drop(MLP(norm(z))). The shift moves the first features // divisions features one place
    left, as many right, up and down, and leaves the others; it has no parameters and no arithmetic.

    Symmetry:
      Equivariant to translations as far as what leaves the map at one side is equal to what enters at the other. The
      shift alone is exactly so away from the border.

    Attributes:
      divisions: how many groups the features are cut into, of which four move; at least 4. Fewer features than groups
        all stay.
      distance: by how many places features move; 0 turns the mixing of tokens off.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      dropout_rate: dropout in the MLP, in [0, 1).
      drop_path_rate: probability of dropping the MLP's branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Norms' statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      2 mlp_ratio C^2 multiply-accumulates a token of width C, all of them the MLP's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ShiftViTBlock
      >>> jax.eval_shape(ShiftViTBlock().init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 12)))[0].shape
      (1, 9, 6, 12)

    Source:
      Wang et al., When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention
      Mechanism, AAAI 2022, section 3; github.com/microsoft/SPACH.

    Differs:
      None from the code, whose residual branch starts after the shift, so that the skip connection is shifted too.
    """

    divisions: int = 12
    distance: int = 1
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = map_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch height width features"]:
        """Apply the block.

        Args:
          x: a map; more than three axes count as batch.
          deterministic: no dropout, no dropped branches.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes or a field does not fit.
        """
        batch, _, features = split_shape(x.shape, 2)
        if self.divisions < 4:
            raise ValueError(f"divisions={self.divisions} must be at least 4, one for each direction; set divisions")
        x = shift_features(x, features // self.divisions, self.distance)
        y = self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name="pre_norm")(x)
        y = FeedForward(
            int(features * self.mlp_ratio),
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="feed_forward",
        )(y, deterministic=deterministic)
        y = DropPath(self.drop_path_rate, batch_ndim=len(batch))(y, deterministic=deterministic)
        return axes.constrain_map(x + y)


class ShiftViT(nn.Module):
    """Classify images, or give their feature pyramid, with shifts of features in the place of attention.

    Patches are embedded and normed; stage s is (from the second on) a norm and a 2 x 2 convolution of stride 2 without
    bias, and `depths[s]` blocks of width `embed_dim` 2^s; the last map is normed, averaged over space and mapped to
    logits. Norms have one mean and variance for the whole map.

    Symmetry:
      None exactly: maps follow translations by multiples of their stride only as far as what leaves the image at one
      side is equal to what enters at the other.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the averaged features.
      patch_size: size of a patch, an int or (height, width).
      embed_dim: width C of the first stage; stage s has C 2^s.
      depths: number of blocks of each stage; any number of stages.
      divisions: how many groups features are cut into, of which four move, see `ShiftViTBlock`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      dropout_rate: dropout after the patch embedding and in the MLPs, in [0, 1).
      drop_path_rate: probability of dropping the branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass of each block computes anew, a name of `jaxlayers.core.remat.POLICIES`; true means
        all of it.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Norms' statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      Linear in the number of pixels. Shift-T at 224 x 224: 4.6 G multiply-accumulates, 28.6 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import ShiftViT
      >>> model = ShiftViT(num_classes=10, embed_dim=12, depths=(1, 2))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(ShiftViT.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels]
      ((1, 10), [((1, 16, 16, 12), (4, 4)), ((1, 8, 8, 24), (8, 8))])

    Source:
      Wang et al., When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention
      Mechanism, AAAI 2022; github.com/microsoft/SPACH.

    Differs:
      As `ShiftViTBlock`. Maps whose size does not divide by a stride are padded with zeros at their ends, where the
      code drops the last rows and columns.
    """

    num_classes: int = 1000
    patch_size: int | tuple[int, ...] = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (6, 8, 18, 6)
    divisions: int = 12
    mlp_ratio: float = 2.0
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.2
    remat: bool | str = False
    norm: Callable[..., Any] = map_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} must have one positive entry a stage; set depths")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        norms: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**norms, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = PatchEmbed(self.embed_dim, patch_size=self._patch, norm=self.norm, **common)
        self.dropout = nn.Dropout(self.dropout_rate)
        block = functools.partial(
            ShiftViTBlock,
            divisions=self.divisions,
            mlp_ratio=self.mlp_ratio,
            dropout_rate=self.dropout_rate,
            norm=self.norm,
            **common,
        )
        stages = []
        for stage, depth in enumerate(self.depths):
            width = self.embed_dim * 2**stage
            reduce = functools.partial(PatchEmbed, width, patch_size=(2, 2), use_bias=False, **common)
            stages.append(
                _Stage(
                    norm=functools.partial(self.norm, **norms) if stage else None,
                    reduce=reduce if stage else None,
                    block=block,
                    rates=rates[sum(self.depths[:stage]) :][:depth],
                    remat=self.remat,
                )
            )
        self.stages = stages
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
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map after each stage (before the next one's downsampling), finest first, without norms.

        Args:
          x: images of any size, channels last.
          deterministic: no dropout, no dropped branches.

        Returns:
          One level a stage, of stride `patch_size * 2**stage`.
        """
        split_shape(x.shape, 2)
        x = axes.constrain_map(self.dropout(self.patch_embed(x), deterministic=deterministic))
        levels = []
        for index, stage in enumerate(self.stages):
            x = stage(x, deterministic=deterministic)
            levels.append(Level(x, tuple(length * 2**index for length in self._patch)))
        return tuple(levels)


class _Stage(nn.Module):
    """A downsampling and a chain of blocks.

    Attributes:
      norm: makes the norm before the downsampling; `None` for the first stage.
      reduce: makes the downsampling; `None` for the first stage.
      block: makes a block.
      rates: drop-path rate of each block.
      remat: what blocks compute anew in the backward pass.
    """

    norm: Callable[..., nn.Module] | None
    reduce: Callable[..., nn.Module] | None
    block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    remat: bool | str

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        if self.norm is not None and self.reduce is not None:
            x = axes.constrain_map(self.reduce(name="downsample")(self.norm(name="pre_norm")(x)))

        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        for index, rate in enumerate(self.rates):
            x = remat_block(call, self.remat)(self.block(drop_path_rate=rate, name=f"blocks_{index}"), x)
        return x


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: ShiftViT) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


# Reference checkpoints ------------------------------------------------------------------------------------------------

# See `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "official": {
        "patch_embed/projection": "patch_embed.proj",
        "patch_embed/post_norm": "patch_embed.norm",
        "stages/pre_norm": "layers.{before}.downsample.norm",
        "stages/downsample/projection": "layers.{before}.downsample.reduction",
        "stages/blocks/pre_norm": "layers.{stage}.blocks.{block}.norm2",
        "stages/blocks/feed_forward/up": "layers.{stage}.blocks.{block}.mlp.fc1",
        "stages/blocks/feed_forward/down": "layers.{stage}.blocks.{block}.mlp.fc2",
        "final_norm": "norm",
        "head": "head",
    }
}


def from_reference(tensors: Mapping[str, Any], model: ShiftViT, *, source: str = "official") -> dict[str, Any]:
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
    wanted = dialects.shapes_of(model, (image,))["params"]
    return reference.read_reference(tensors, wanted, table)


def reference_inputs(model: ShiftViT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/microsoft/SPACH",
        module=ShiftViT,
        read=dialects.from_params(from_reference, source="official"),
        marks=(r"^patch_embed\.proj\.weight$", r"^layers\.0\.blocks\.0\.norm2\.", r"^layers\.0\.blocks\.0\.mlp\.fc1\."),
        foreign=(r"^layers\.0\.blocks\.0\.(attn|norm1)\.",),
        layout=dialects.table_layout(
            REFERENCE_NAMES["official"],
            shapes={
                "patch_embed/projection/kernel": dialects.patches(),
                "downsample/projection/kernel": lambda model, ours: (ours[1], ours[0] // 4, 2, 2),
                "feed_forward/up/kernel": dialects.pointwise(),
                "feed_forward/down/kernel": dialects.pointwise(),
            },
        ),
        head="head.weight",
        stem="patch_embed.proj.weight",
    ),
)


def _variant(depths: tuple[int, ...], mlp_ratio: float, drop_path_rate: float, *, base: bool = False) -> dict[str, Any]:
    return {
        "module": ShiftViT,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
        "embed_dim": 128 if base else 96,
        "divisions": 16 if base else 12,
        "depths": depths,
        "mlp_ratio": mlp_ratio,
        "drop_path_rate": drop_path_rate,
    }


# `light` has Swin's depths; the others spend the attention's share on depth, at an MLP ratio of 2 (the paper's choice)
# or 4 (`r4`).
VARIANTS: dict[str, dict[str, Any]] = {
    "shiftvit_tiny": _variant((6, 8, 18, 6), 2.0, 0.2),
    "shiftvit_tiny_r4": _variant((2, 2, 12, 3), 4.0, 0.2),
    "shiftvit_tiny_light": _variant((2, 2, 6, 2), 4.0, 0.2),
    "shiftvit_small": _variant((10, 18, 36, 10), 2.0, 0.4),
    "shiftvit_small_r4": _variant((2, 6, 24, 4), 4.0, 0.4),
    "shiftvit_small_light": _variant((2, 2, 18, 2), 4.0, 0.4),
    "shiftvit_base": _variant((10, 18, 36, 10), 2.0, 0.6, base=True),
    "shiftvit_base_r4": _variant((4, 6, 22, 4), 4.0, 0.5, base=True),
    "shiftvit_base_light": _variant((2, 2, 18, 2), 4.0, 0.5, base=True),
}
