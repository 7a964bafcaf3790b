"""CrossViT: two vision Transformers on patches of two sizes, which meet in their class tokens."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import label
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.attention import MultiHeadAttention
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import exact_gelu
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.nn.transformer_block import TransformerBlock, layer_norm
from jaxlayers.ops.patches import split_shape
from jaxlayers.ops.resample import resample

_BRANCHES = ("small", "large")


class CrossFusion(nn.Module):
    """Let the class token of one branch attend to the patch tokens of another, and leave all else as it is.

    y = f(c) + drop(MCA(norm([f(c), p']))), out = [g(y), p], for a branch [c, p] of width C and another [c', p'] of
    width D; f: C to D and g: D to C are a norm, GELU and a linear layer, and in MCA the first token alone asks.

    Symmetry:
      Exactly invariant to permutations of the other branch's patch tokens and to its class token; equivariant to those
      of the own patch tokens, which pass untouched.

    Attributes:
      num_heads: number of heads; must divide the width D of the other branch.
      drop_path_rate: probability of dropping the attention's residual branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`.

    Cost:
      2 (m + 1) D^2 + 2 C D + 2 D^2 + 2 (m + 1) D multiply-accumulates for m tokens p': linear in tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import CrossFusion
      >>> inputs = jnp.ones((1, 10, 8)), jnp.ones((1, 5, 12))
      >>> jax.eval_shape(CrossFusion(num_heads=3).init_with_output, jax.random.key(0), *inputs)[0].shape
      (1, 10, 8)

    Source:
      Chen et al., CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification, ICCV 2021,
      equations 3 to 5; github.com/IBM/CrossViT.

    Differs:
      f and g are a norm, GELU and a linear layer as in the reference code; the paper calls them projections.
    """

    num_heads: int
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch tokens features"],
        other: Float[Array, "*batch other_tokens other_features"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch tokens features"]:
        """Renew the class token.

        Args:
          x: tokens of the branch, its class token first.
          other: tokens of the other branch, its class token first; of the same batch.
          deterministic: no dropped branch.

        Returns:
          Tokens like `x`, equal to it but for the first.

        Raises:
          ValueError: if the two do not have the same batch and at least one token each, or the heads do not divide.
        """
        if x.ndim < 2 or x.shape[:-2] != other.shape[:-2] or 0 in (x.shape[-2], other.shape[-2]):
            raise ValueError(
                f"both inputs must be [*batch, tokens, features] of one batch, class token first; got shapes {x.shape} "
                f"and {other.shape}"
            )
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }

        def project(token: Array, features: int, name: str) -> Array:
            return nn.Dense(features, name=name, **common)(exact_gelu(norm(name=f"{name}_norm")(token)))

        token = project(x[..., :1, :], other.shape[-1], "project")
        joined = norm(name="joined_norm")(jnp.concatenate([token, other[..., 1:, :].astype(token.dtype)], axis=-2))
        y = MultiHeadAttention(self.num_heads, use_bias=True, name="attention", **common)(joined[..., :1, :], joined)
        token = token + DropPath(self.drop_path_rate, batch_ndim=x.ndim - 2)(y, deterministic=deterministic)
        token = project(token, x.shape[-1], "revert").astype(x.dtype)
        return axes.constrain_tokens(jnp.concatenate([token, x[..., 1:, :]], axis=-2))


class CrossViT(nn.Module):
    """Classify images by two vision Transformers on small and large patches, joined through their class tokens.

    Each of `num_encoders` multi-scale encoders runs `depths` blocks in each branch, then a `CrossFusion` each way; the
    logits are the mean of those of the two class tokens.

    Symmetry:
      None exactly: the tables of positions are learned.

    Attributes:
      num_classes: number of logits; 0 leaves the heads out, and the output is the two class tokens, one after the
        other.
      image_size: size that the tables of positions are for, an int or (height, width); see `resize`.
      image_scale: size of each branch's image, in multiples of `image_size`; rounded to whole patches.
      patch_size: side of the patches of each branch.
      embed_dim: width of each branch.
      depths: number of blocks of each branch in an encoder.
      num_encoders: number of multi-scale encoders.
      num_heads: number of heads of each branch.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      conv_embed: embed patches by three convolutions, for patches of 12 and 16 (the models called dagger).
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except those of the patch embeddings.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      Quadratic in each branch's tokens, linear in the fusion. CrossViT-15 at 240 x 240: 5.8 G multiply-accumulates,
      27.5 M parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import CrossViT
      >>> model = CrossViT(num_classes=10, image_size=48, embed_dim=(8, 16), depths=(1, 2), num_heads=(2, 2))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 50, 60, 3)))[0].shape
      (1, 10)

    Source:
      Chen et al., CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification, ICCV 2021;
      github.com/IBM/CrossViT.

    Differs:
      A branch's image has the nearest whole number of patches, so that any `image_size` fits; the reference and timm
      cut it and count its patches otherwise than they make them (timm refuses 224). Images of another size are
      resampled bicubically, as there.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, ...] = 240
    image_scale: tuple[float, ...] = (1.0, 224 / 240)
    patch_size: tuple[int, ...] = (12, 16)
    embed_dim: tuple[int, ...] = (192, 384)
    depths: tuple[int, ...] = (1, 5)
    num_encoders: int = 3
    num_heads: tuple[int, ...] = (6, 6)
    mlp_ratio: float = 3.0
    conv_embed: bool = False
    drop_path_rate: float = 0.1
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        pairs = {
            field: getattr(self, field) for field in ("image_scale", "patch_size", "embed_dim", "depths", "num_heads")
        }
        if any(len(pair) != 2 or min(pair) <= 0 for pair in pairs.values()):
            raise ValueError(f"{pairs} must each have one positive entry for either branch; set them")
        if self.num_encoders < 1 or self.num_classes < 0:
            raise ValueError(
                f"num_encoders={self.num_encoders} must be positive and num_classes={self.num_classes} not negative; "
                "set them (num_classes=0 for no head)"
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        block = functools.partial(TransformerBlock, mlp_ratio=self.mlp_ratio, norm=self.norm, **common)
        fusion = functools.partial(CrossFusion, norm=self.norm, **common)
        per_encoder = max(self.depths)
        rates = drop_path_rates(self.drop_path_rate, self.num_encoders * per_encoder)
        self.small, self.large = (
            _Branch(
                grid=grid,
                patch_size=patch,
                features=features,
                conv_embed=self.conv_embed,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                bias_init=self.bias_init,
            )
            for grid, patch, features in zip(_grids(self), self.patch_size, self.embed_dim, strict=True)
        )
        self.encoders = [
            _Encoder(
                block=block,
                fusion=fusion,
                depths=self.depths,
                num_heads=self.num_heads,
                rates=rates[first : first + per_encoder],
                remat=self.remat,
            )
            for first in range(0, len(rates), per_encoder)
        ]
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.small_norm, self.large_norm = self.norm(**dtypes), self.norm(**dtypes)
        if self.num_classes:
            self.small_head, self.large_head = (nn.Dense(self.num_classes, **common) for _ in _BRANCHES)

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images, channels last, scaled as the weights want them; resampled where they are not of `image_size`.
          deterministic: no dropped branches.

        Returns:
          Logits, or with `num_classes=0` both class tokens.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        small, large = self.tokens(x, deterministic=deterministic)
        small, large = self.small_norm(small[..., 0, :]), self.large_norm(large[..., 0, :])
        if not self.num_classes:
            return jnp.concatenate([small, large], axis=-1)
        return 0.5 * (self.small_head(small) + self.large_head(large))

    def tokens(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "*batch tokens features"], Float[Array, "*batch other_tokens other_features"]]:
        """Return the tokens of the small-patch and the large-patch branch, class tokens first, without norms.

        Args:
          x: images, channels last.
          deterministic: no dropped branches.

        Returns:
          Tokens in row-major order; the two branches have patches of different sizes and different widths.
        """
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        split_shape(x.shape, 2)
        branches = self.small(x), self.large(x)
        for encoder in self.encoders:
            branches = encoder(*branches, deterministic=deterministic)
        return branches


class _Branch(nn.Module):
    """Resample an image to whole patches and make its tokens, with class token and positions.

    Attributes:
      grid: number of patches along either axis.
      patch_size: side of a patch.
      features: width of a token.
      conv_embed: embed by three convolutions.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      bias_init: initialiser of the biases.
    """

    grid: tuple[int, int]
    patch_size: int
    features: int
    conv_embed: bool
    dtype: Dtype | None
    param_dtype: Dtype
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = resample(x, [self.patch_size * length for length in self.grid])
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "bias_init": self.bias_init}
        if self.conv_embed:
            x = _ConvEmbed(self.features, self.patch_size, name="embed", **dtypes)(x)
        else:
            x = PatchEmbed(self.features, (self.patch_size,) * 2, name="embed", **dtypes)(x)
        batch = x.shape[:-3]
        x = x.reshape(*batch, -1, self.features)
        token = self.param("class_token", truncated_normal(), (self.features,), self.param_dtype)
        shape = (1 + self.grid[0] * self.grid[1], self.features)
        size = f"image_size={tuple(self.patch_size * length for length in self.grid)}"
        positions = learned_table(self, "position_embedding", truncated_normal(), shape, self.param_dtype, size=size)
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (*batch, 1, self.features)), x], axis=-2)
        return axes.constrain_tokens(x + positions.astype(x.dtype))


# Kernel, stride and padding of the three convolutions, by the patch that they amount to.
_CONVOLUTIONS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}


class _ConvEmbed(nn.Module):
    """Embed patches by three convolutions of growing width, with ReLU between them."""

    features: int
    patch_size: int
    dtype: Dtype | None
    param_dtype: Dtype
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.patch_size not in _CONVOLUTIONS or self.features % 4:
            raise ValueError(
                f"patch_size={self.patch_size} must be one of {sorted(_CONVOLUTIONS)} and embed_dim={self.features} a "
                "multiple of 4 under conv_embed; set them or conv_embed=False"
            )
        widths = (self.features // 4, self.features // 2, self.features)
        layers = zip(("first", "second", "third"), widths, _CONVOLUTIONS[self.patch_size], strict=True)
        for name, width, (kernel, stride, padding) in layers:
            x = x if name == "first" else nn.relu(x)
            x = nn.Conv(
                width,
                (kernel, kernel),
                strides=stride,
                padding=padding,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=lecun_normal(),
                bias_init=self.bias_init,
                name=name,
            )(x)
        return x


class _Encoder(nn.Module):
    """Blocks in each branch, then a fusion each way.

    Attributes:
      block: makes a block.
      fusion: makes a fusion.
      depths: number of blocks of each branch.
      num_heads: number of heads of each branch.
      rates: drop-path rate of block k of either branch; the fusions have the last.
      remat: what of each block is recomputed in the backward pass.
    """

    block: Callable[..., nn.Module]
    fusion: Callable[..., nn.Module]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    rates: tuple[float, ...]
    remat: str | bool

    @nn.compact
    def __call__(self, small: Array, large: Array, *, deterministic: bool) -> tuple[Array, Array]:
        def call(block: nn.Module, *arrays: Array) -> Array:
            return block(*arrays, deterministic=deterministic)

        run = remat.remat_block(call, self.remat)
        branches = [small, large]
        for branch, name in enumerate(_BRANCHES):
            for index in range(self.depths[branch]):
                block = self.block(
                    self.num_heads[branch], drop_path_rate=self.rates[index], name=f"{name}_blocks_{index}"
                )
                branches[branch] = run(block, branches[branch])
        small, large = branches
        # The heads are those of the branch that is asked; both fusions read the branches as they were.
        heads = self.num_heads[::-1]
        to_small, to_large = (
            self.fusion(num, drop_path_rate=self.rates[-1], name=f"{name}_fusion")
            for num, name in zip(heads, _BRANCHES, strict=True)
        )
        return run(to_small, small, large), run(to_large, large, small)


def _grids(model: CrossViT) -> tuple[tuple[int, int], ...]:
    """Return the number of patches of each branch along either axis."""
    size = (model.image_size,) * 2 if isinstance(model.image_size, int) else tuple(model.image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size={model.image_size} must be a positive int or (height, width); set image_size")
    first, second = (
        (max(1, round(size[0] * scale / patch)), max(1, round(size[1] * scale / patch)))
        for scale, patch in zip(model.image_scale, model.patch_size, strict=True)
    )
    return first, second


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: CrossViT) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, for layer-wise learning rates.

    Embeddings, class tokens and positions are layer 0; with D = max(depths), block k of encoder e is layer
    e D + k + 1 in either branch, a fusion belongs to its encoder's last layer, and final norms and heads are layer
    `num_encoders` D + 1.
    """
    depth = max(model.depths)

    def layer(path: tuple[str, ...], leaf: Any) -> int:
        if path[0] in _BRANCHES:
            return 0
        if not path[0].startswith("encoders_"):
            return model.num_encoders * depth + 1
        before = depth * int(path[0].removeprefix("encoders_"))
        return before + (depth if path[1].endswith("_fusion") else 1 + int(path[1].rpartition("_")[2]))

    return label(params, layer)


def resize(params: Params, from_model: CrossViT, to_model: CrossViT) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image size of `to_model`.

    The tables of positions are resampled bicubically with antialiasing, the class token's row aside; all else stays.

    Args:
      params: parameters of `from_model`.
      from_model: the model that the parameters are of.
      to_model: the model that they are wanted for.

    Returns:
      Parameters of `to_model`.

    Raises:
      ValueError: if the models differ in a field that no resampling bridges.
    """
    for field in (
        "patch_size",
        "embed_dim",
        "depths",
        "num_encoders",
        "num_heads",
        "mlp_ratio",
        "conv_embed",
        "num_classes",
    ):
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    resized = dict(params)
    for name, grid, new_grid in zip(_BRANCHES, _grids(from_model), _grids(to_model), strict=True):
        if grid != new_grid:
            first, rest = jnp.split(jnp.asarray(params[name]["position_embedding"]), [1])
            rest = resample(rest.reshape(*grid, -1), new_grid, antialias=True).reshape(-1, rest.shape[-1])
            resized[name] = {**params[name], "position_embedding": jnp.concatenate([first, rest])}
    return resized


# Reference checkpoints ------------------------------------------------------------------------------------------------


def _names(place: str) -> dict[str, str]:
    """Return timm's names; `place` says how it writes the number of a branch at class token and positions."""
    table: dict[str, str] = {}
    for branch, name in enumerate(_BRANCHES):
        block = f"blocks.{{encoder}}.blocks.{branch}.{{{name}_block}}"
        fusion = f"blocks.{{encoder}}.fusion.{branch}"
        table |= {
            f"{name}/embed/projection": f"patch_embed.{branch}.proj",
            f"{name}/embed/first": f"patch_embed.{branch}.proj.0",
            f"{name}/embed/second": f"patch_embed.{branch}.proj.2",
            f"{name}/embed/third": f"patch_embed.{branch}.proj.4",
            f"{name}/class_token": f"cls_token{place}{branch}",
            f"{name}/position_embedding": f"pos_embed{place}{branch}",
            f"encoders/{name}_blocks/norm1": f"{block}.norm1",
            f"encoders/{name}_blocks/norm2": f"{block}.norm2",
            f"encoders/{name}_blocks/attention/query": f"{block}.attn.query",
            f"encoders/{name}_blocks/attention/key": f"{block}.attn.key",
            f"encoders/{name}_blocks/attention/value": f"{block}.attn.value",
            f"encoders/{name}_blocks/attention/out": f"{block}.attn.proj",
            f"encoders/{name}_blocks/feed_forward/up": f"{block}.mlp.fc1",
            f"encoders/{name}_blocks/feed_forward/down": f"{block}.mlp.fc2",
            f"encoders/{name}_fusion/project_norm": f"blocks.{{encoder}}.projs.{branch}.0",
            f"encoders/{name}_fusion/project": f"blocks.{{encoder}}.projs.{branch}.2",
            f"encoders/{name}_fusion/joined_norm": f"{fusion}.norm1",
            f"encoders/{name}_fusion/attention/query": f"{fusion}.attn.wq",
            f"encoders/{name}_fusion/attention/key": f"{fusion}.attn.wk",
            f"encoders/{name}_fusion/attention/value": f"{fusion}.attn.wv",
            f"encoders/{name}_fusion/attention/out": f"{fusion}.attn.proj",
            f"encoders/{name}_fusion/revert_norm": f"blocks.{{encoder}}.revert_projs.{branch}.0",
            f"encoders/{name}_fusion/revert": f"blocks.{{encoder}}.revert_projs.{branch}.2",
            f"{name}_norm": f"norm.{branch}",
            f"{name}_head": f"head.{branch}",
        }
    return table


# See `jaxlayers.core.reference`; fused projections are first cut into `attn.query`, `attn.key` and `attn.value`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {"timm": _names("_"), "official": _names(".")}


def from_reference(tensors: Mapping[str, Any], model: CrossViT, *, source: str) -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for; of another `image_size`, `resize` the result.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    if source not in REFERENCE_NAMES:
        raise ValueError(f"source={source!r} must be one of {sorted(REFERENCE_NAMES)}; pass one of them")
    table = REFERENCE_NAMES[source]
    if table["small/class_token"] not in tensors:
        raise ValueError(
            f"a checkpoint of source={source!r} must hold {table['small/class_token']!r}; pass the source it comes from"
        )
    stem = "patch_embed.0.proj.0.weight" if model.conv_embed else "patch_embed.0.proj.weight"
    if stem not in tensors:
        raise ValueError(f"the checkpoint must hold {stem!r}; set conv_embed as it has it, not {model.conv_embed}")
    channels = np.shape(tensors[stem])[1]
    image = jax.ShapeDtypeStruct((1, 16, 16, channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))["params"]
    return reference.read_reference(reference.split_fused(tensors), wanted, table)


def reference_inputs(model: CrossViT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32),)


def _patches(branch: int) -> Callable[[CrossViT, tuple[int, ...]], tuple[int, ...]]:
    def shape(model: CrossViT, ours: tuple[int, ...]) -> tuple[int, ...]:
        length = model.patch_size[branch]
        return (ours[1], ours[0] // length**2, length, length)

    return shape


# Classifier and first kernel are not named, since there are two of each.
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=CrossViT,
        read=dialects.from_params(from_reference, source=name),
        marks=(rf"^cls_token{place}0$", r"^blocks\.0\.revert_projs\."),
        layout=dialects.table_layout(
            REFERENCE_NAMES[name],
            shapes={
                **{f"{branch}/embed/projection/kernel": _patches(index) for index, branch in enumerate(_BRANCHES)},
                "class_token": dialects.with_ones(before=2),
                "position_embedding": dialects.with_ones(before=1),
            },
            fused=dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
        ),
        head=("head.0.weight", "head.1.weight"),
        # One convolution, or the first of several.
        stem=tuple(f"patch_embed.{branch}.proj{place}weight" for branch in (0, 1) for place in (".", ".0.")),
    )
    for name, origin, place in (("timm", "timm", "_"), ("official", "github.com/IBM/CrossViT", r"\."))
)


def _variant(
    embed_dim: tuple[int, int], depth: int, heads: int, mlp_ratio: float, *, size: int = 240, conv_embed: bool = False
) -> dict[str, Any]:
    return {
        "module": CrossViT,
        "inputs": (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),),
        "image_size": size,
        # The large patches see 224 or 384 pixels, the sizes of ViT.
        "image_scale": (1.0, {240: 224, 408: 384}[size] / size),
        "embed_dim": embed_dim,
        "depths": (1, depth),
        "num_heads": (heads, heads),
        "mlp_ratio": mlp_ratio,
        "conv_embed": conv_embed,
    }


_SHAPES: Mapping[str, tuple[tuple[int, int], int, int, float]] = {
    "tiny": ((96, 192), 4, 3, 4.0),
    "small": ((192, 384), 4, 6, 4.0),
    "base": ((384, 768), 4, 12, 4.0),
    "9": ((128, 256), 3, 4, 3.0),
    "15": ((192, 384), 5, 6, 3.0),
    "18": ((224, 448), 6, 7, 3.0),
}

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"crossvit_{name}_240": _variant(*shape) for name, shape in _SHAPES.items()},
    **{f"crossvit_{name}_dagger_240": _variant(*_SHAPES[name], conv_embed=True) for name in ("9", "15", "18")},
    **{f"crossvit_{name}_dagger_408": _variant(*_SHAPES[name], size=408, conv_embed=True) for name in ("15", "18")},
}
