"""Transformer in Transformer: attention among the words of each patch, and among the patches."""

import functools
import math
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
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import drop_path_rates
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.transformer_block import TransformerBlock
from jaxlayers.ops.patches import pad_to_multiple, split_shape, to_blocks
from jaxlayers.ops.resample import resample

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)


class TNTBlock(nn.Module):
    """Mix the words of each patch, tell each patch of its words, then mix the patches.

    Y' = Inner(Y) for the words Y `[m, c]` of each patch alone; Z' = Outer(Z + h) with h = norm(norm(vec(Y')) W) for
    each patch's token of Z `[n, d]` and zero for the class token; Inner and Outer are `TransformerBlock`s.

    Symmetry:
      Exactly equivariant to permutations of the patches (their words with them); words of different patches never mix.

    Attributes:
      num_heads: number of heads of the inner and of the outer transformer; each must divide its width.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      legacy: h = vec(norm(Y')) W + b, the projection of timm's first port, in place of the official one.
      drop_path_rate: probability of dropping a residual branch, of a patch (inner) or a sample (outer), in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`.

    Cost:
      That of a `TransformerBlock` on n + 1 tokens, of n on m words, and n m c d multiply-accumulates between them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import TNTBlock
      >>> block = TNTBlock(num_heads=(2, 3))
      >>> words, patches = jnp.ones((1, 9, 4, 8)), jnp.ones((1, 10, 12))
      >>> [one.shape for one in jax.eval_shape(block.init_with_output, jax.random.key(0), words, patches)[0]]
      [(1, 9, 4, 8), (1, 10, 12)]

    Source:
      Han et al., Transformer in Transformer, NeurIPS 2021, equations 5 to 8; github.com/huawei-noah/CV-Backbones.

    Differs:
      The paper writes h = vec(Y') W + b; the norms are those of the official code.
    """

    num_heads: tuple[int, ...]
    mlp_ratio: float = 4.0
    legacy: bool = False
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        words: Float[Array, "*batch patches words inner"],
        patches: Float[Array, "*batch tokens features"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "*batch patches words inner"], Float[Array, "*batch tokens features"]]:
        """Apply the block.

        Args:
          words: the words of each patch.
          patches: the class token, then a token for each patch.
          deterministic: no dropped branches.

        Returns:
          Words and patches like the inputs.

        Raises:
          ValueError: if the two do not have the same batch and patches, or a field does not fit the features.
        """
        if len(self.num_heads) != 2:
            raise ValueError(f"num_heads={self.num_heads} must be (inner, outer); set num_heads")
        if words.ndim < 3 or patches.shape[:-1] != (*words.shape[:-3], words.shape[-3] + 1):
            raise ValueError(
                f"words [*batch, n, m, c] and patches [*batch, n + 1, d] must agree; got {words.shape} and "
                f"{patches.shape}"
            )
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        block = functools.partial(
            TransformerBlock,
            mlp_ratio=self.mlp_ratio,
            use_bias=False,
            drop_path_rate=self.drop_path_rate,
            norm=self.norm,
            **common,
        )
        words = block(self.num_heads[0], groups=(axes.TOKENS,), name="inner")(words, deterministic=deterministic)
        project = nn.Dense(patches.shape[-1], use_bias=self.legacy, name="project", **common)
        if self.legacy:
            told = project(_flatten(norm(name="project_norm")(words)))
        else:
            told = norm(name="post_norm")(project(norm(name="project_norm")(_flatten(words))))
        told = told.astype(patches.dtype)
        patches = jnp.concatenate([patches[..., :1, :], patches[..., 1:, :] + told], axis=-2)
        return words, block(self.num_heads[1], name="outer")(patches, deterministic=deterministic)


class TNT(nn.Module):
    """Classify images by a transformer over patches with a small transformer inside each patch.

    A convolution of 7 x 7 makes the words of each patch, a projection of them its first token; `depth` `TNTBlock`s
    follow, and the class token's norm is mapped to logits. Words and patches have learned positions.

    Symmetry:
      None exactly: the tables of positions are learned. Words of a patch depend on no pixel outside it (under `legacy`
      on none further than 3 away), whatever the depth, for nothing flows from patches to words.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the normed class token.
      image_size: size of the images, an int or (height, width); see `resize` for another.
      patch_size: side of a patch; images that are not multiples of it are padded with zeros at their ends.
      word_stride: side of a word, the stride of the convolution; must divide the patch.
      embed_dim: width of a word and of a patch.
      depth: number of blocks.
      num_heads: number of heads of the inner and of the outer transformers.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      legacy: timm's first port: the convolution looks across patches, and see `TNTBlock`.
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except that of the convolution.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      Linear in pixels inside, quadratic in patches outside. TNT-S at 224 x 224: 5.2 G multiply-accumulates, 23.8 M
      parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import TNT
      >>> model = TNT(num_classes=10, image_size=32, embed_dim=(8, 16), depth=2, num_heads=(2, 4))
      >>> images = jnp.ones((1, 32, 32, 3))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> logits.shape, jax.eval_shape(nn.apply(TNT.features, model), variables, images)[0].array.shape
      ((1, 10), (1, 2, 2, 16))

    Source:
      Han et al., Transformer in Transformer, NeurIPS 2021; github.com/huawei-noah/CV-Backbones.

    Differs:
      As `TNTBlock`; words come from the convolution of the official code, not from a linear layer on 4 x 4 pixels.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, ...] = 224
    patch_size: int = 16
    word_stride: int = 4
    embed_dim: tuple[int, ...] = (24, 384)
    depth: int = 12
    num_heads: tuple[int, ...] = (4, 6)
    mlp_ratio: float = 4.0
    legacy: bool = False
    drop_path_rate: float = 0.1
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        if self.depth < 1 or self.num_classes < 0:
            raise ValueError(
                f"depth={self.depth} must be positive and num_classes={self.num_classes} not negative; set them "
                "(num_classes=0 for no head)"
            )
        if self.word_stride < 1 or self.patch_size < 1 or self.patch_size % self.word_stride:
            raise ValueError(
                f"patch_size={self.patch_size} must be divisible by word_stride={self.word_stride}; set either"
            )
        if len(self.embed_dim) != 2 or min(self.embed_dim) < 1:
            raise ValueError(f"embed_dim={self.embed_dim} must be (inner, outer) and positive; set embed_dim")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inner, outer = self.embed_dim
        grid = _grid(self)
        side = self.patch_size // self.word_stride
        self.word_embed = nn.Conv(
            inner,
            (7, 7),
            strides=self.word_stride,
            padding=3,
            kernel_init=lecun_normal(),
            bias_init=self.bias_init,
            **dtypes,
        )
        self.word_position = self.param("word_position", truncated_normal(), (side**2, inner), self.param_dtype)
        self.project_norm, self.post_norm, self.final_norm = (self.norm(**dtypes) for _ in range(3))
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init, **dtypes)
        self.project = dense(outer)
        self.class_token = self.param("class_token", truncated_normal(), (outer,), self.param_dtype)
        self.position_embedding = learned_table(
            self,
            "position_embedding",
            truncated_normal(),
            (1 + grid[0] * grid[1], outer),
            self.param_dtype,
            size=f"image_size={self.image_size}",
        )
        self.blocks = [
            TNTBlock(
                self.num_heads,
                mlp_ratio=self.mlp_ratio,
                legacy=self.legacy,
                drop_path_rate=rate,
                norm=self.norm,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                **dtypes,
            )
            for rate in drop_path_rates(self.drop_path_rate, self.depth)
        ]
        self.head = dense(self.num_classes) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images of `image_size`, channels last, scaled as the weights want them.
          deterministic: no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the normed class token.

        Raises:
          ValueError: if `x` is not of `image_size` or not of floating point, or a field does not fit.
        """
        _, patches = self.tokens(x, deterministic=deterministic)
        x = self.final_norm(patches[..., 0, :])
        return x if self.head is None else self.head(x)

    def features(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map of the patches after the last block, without norm: a pyramid of one level.

        Args:
          x: images of `image_size`, channels last.
          deterministic: no dropped branches.

        Returns:
          One level, of stride `patch_size`.
        """
        _, patches = self.tokens(x, deterministic=deterministic)
        grid = patches[..., 1:, :].reshape(*patches.shape[:-2], *_grid(self), patches.shape[-1])
        return (Level(grid, (self.patch_size,) * 2),)

    def tokens(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "*batch patches words inner"], Float[Array, "*batch tokens outer"]]:
        """Return the words of each patch, and class token and patches, after the last block.

        Args:
          x: images of `image_size`, channels last.
          deterministic: no dropped branches.

        Returns:
          Words and patches in row-major order.
        """
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        batch, size, _ = split_shape(x.shape, 2)
        if size != _image_size(self):
            raise ValueError(
                f"spatial size {size} must be image_size={_image_size(self)}; resize the images, or the parameters by "
                "tnt.resize"
            )
        words = self._words(pad_to_multiple(x, (self.patch_size,) * 2))
        words = words + self.word_position.astype(words.dtype)
        patches = self.post_norm(self.project(self.project_norm(_flatten(words))))
        token = jnp.broadcast_to(self.class_token.astype(patches.dtype), (*batch, 1, patches.shape[-1]))
        patches = jnp.concatenate([token, patches], axis=-2) + self.position_embedding.astype(patches.dtype)

        def call(block: nn.Module, words: Array, patches: Array) -> tuple[Array, Array]:
            return block(words, patches, deterministic=deterministic)

        words = axes.constrain_last(words, axes.BATCH, axes.TOKENS, None, None)
        patches = axes.constrain_tokens(patches)
        for block in self.blocks:
            words, patches = remat.remat_block(call, self.remat)(block, words, patches)
        return words, patches

    def _words(self, x: Array) -> Array:
        """Return words `[*batch, patches, words, inner]` of an image of whole patches."""
        side = self.patch_size // self.word_stride
        if self.legacy:
            x = to_blocks(self.word_embed(x), (side, side))
        else:
            # Each patch is convolved alone, with zeros around it.
            x = self.word_embed(to_blocks(x, (self.patch_size,) * 2))
        *batch, rows, columns, _, _, inner = x.shape
        return x.reshape(*batch, rows * columns, side * side, inner)


def _flatten(words: Array) -> Array:
    return words.reshape(*words.shape[:-2], -1)


def _image_size(model: TNT) -> tuple[int, int]:
    size = (model.image_size,) * 2 if isinstance(model.image_size, int) else tuple(model.image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size={model.image_size} must be a positive int or (height, width); set image_size")
    return size


def _grid(model: TNT) -> tuple[int, int]:
    """Return the number of patches along either axis."""
    height, width = _image_size(model)
    return -(-height // model.patch_size), -(-width // model.patch_size)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: TNT) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, for layer-wise learning rates.

    Embedding, positions and class token are layer 0, block k is layer k + 1, final norm and head are `depth` + 1.
    """

    def layer(path: tuple[str, ...], leaf: Any) -> int:
        if path[0].startswith("blocks_"):
            return 1 + int(path[0].removeprefix("blocks_"))
        return model.depth + 1 if path[0] in ("final_norm", "head") else 0

    return label(params, layer)


def resize(params: Params, from_model: TNT, to_model: TNT) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image size of `to_model`.

    The positions of the patches are resampled bicubically with antialiasing, the class token's row aside; those of the
    words, and all else, stay.

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
        "word_stride",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "legacy",
        "num_classes",
    ):
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    grid, new_grid = _grid(from_model), _grid(to_model)
    if grid == new_grid:
        return dict(params)
    first, rest = jnp.split(jnp.asarray(params["position_embedding"]), [1])
    rest = resample(rest.reshape(*grid, -1), new_grid, antialias=True).reshape(-1, rest.shape[-1])
    return {**params, "position_embedding": jnp.concatenate([first, rest])}


# Reference checkpoints ------------------------------------------------------------------------------------------------

_BLOCK = "blocks.{block}"
_TIMM = {
    "word_embed": "pixel_embed.proj",
    "word_position": "pixel_pos",
    "position_embedding": "patch_pos",
    "class_token": "cls_token",
    "project_norm": "norm1_proj",
    "project": "proj",
    "post_norm": "norm2_proj",
    "blocks/project_norm": f"{_BLOCK}.norm1_proj",
    "blocks/project": f"{_BLOCK}.proj",
    "blocks/post_norm": f"{_BLOCK}.norm2_proj",
    **{
        f"blocks/{ours}/{part}": f"{_BLOCK}.{name}"
        for ours, end, mlp in (("inner", "in", "mlp_in"), ("outer", "out", "mlp"))
        for part, name in (
            ("norm1", f"norm_{end}"),
            ("norm2", f"norm_{mlp}"),
            ("attention/query", f"attn_{end}.query"),
            ("attention/key", f"attn_{end}.key"),
            ("attention/value", f"attn_{end}.v"),
            ("attention/out", f"attn_{end}.proj"),
            ("feed_forward/up", f"{mlp}.fc1"),
            ("feed_forward/down", f"{mlp}.fc2"),
        )
    },
    "final_norm": "norm",
    "head": "head",
}
_OFFICIAL = {
    **_TIMM,
    "word_embed": "patch_embed.proj",
    "word_position": "inner_pos",
    "position_embedding": "outer_pos",
    "project_norm": "proj_norm1",
    "post_norm": "proj_norm2",
    "blocks/project_norm": f"{_BLOCK}.proj_norm1",
    "blocks/post_norm": f"{_BLOCK}.proj_norm2",
    **{
        f"blocks/{ours}/{part}": f"{_BLOCK}.{ours}_{name}"
        for ours in ("inner", "outer")
        for part, name in (
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("attention/query", "attn.query"),
            ("attention/key", "attn.key"),
            ("attention/value", "attn.v"),
            ("attention/out", "attn.proj"),
            ("feed_forward/up", "mlp.fc1"),
            ("feed_forward/down", "mlp.fc2"),
        )
    },
}
# See `jaxlayers.core.reference`; the fused `qk` is first cut in two.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {"timm": _TIMM, "official": _OFFICIAL}


def from_reference(tensors: Mapping[str, Any], model: TNT, *, source: str) -> dict[str, Any]:
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
    table, channels = reference.choose_table(REFERENCE_NAMES, source, tensors, "word_embed/kernel")
    image = jax.ShapeDtypeStruct((1, *_image_size(model), channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))["params"]
    split = reference.split_fused(tensors, "qk", ("query", "key"))
    words = table["word_position"]
    if words in split and np.ndim(split[words]) == 4:
        # A map of channels first.
        split[words] = np.moveaxis(np.asarray(split[words])[0], 0, -1).reshape(-1, np.shape(split[words])[1])
    # The official files keep the places of the patches' first tokens.
    return reference.read_reference(split, wanted, table, ignored=("outer_tokens",))


def reference_inputs(model: TNT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *_image_size(model), 3), jnp.float32),)


def _their_words(model: TNT, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Return timm's shape of the words' positions, a map of channels first."""
    side = math.isqrt(ours[0])
    return (1, ours[1], side, side)


# Name: where such files come from, marks, words' positions.
_MARKS: Mapping[str, tuple[str, tuple[str, ...], Any]] = {
    "timm": ("timm", (r"^pixel_pos$", r"^blocks\.0\.attn_in\.qk\."), _their_words),
    "official": (
        "github.com/huawei-noah/Efficient-AI-Backbones",
        (r"^inner_pos$", r"^blocks\.0\.inner_attn\.qk\."),
        dialects.with_ones(before=1),
    ),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=TNT,
        read=dialects.from_params(from_reference, source=name),
        marks=marks,
        ignored={r"^outer_tokens$": "zeros that the patches' tokens start from"},
        layout=dialects.table_layout(
            REFERENCE_NAMES[name],
            shapes={
                "word_position": words,
                "class_token": dialects.with_ones(before=2),
                "position_embedding": dialects.with_ones(before=1),
            },
            fused={"query": "qk", "key": "qk"},
        ),
        head="head.weight",
        stem=f"{REFERENCE_NAMES[name]['word_embed']}.weight",
    )
    for name, (origin, marks, words) in _MARKS.items()
)


def _variant(embed_dim: tuple[int, int], outer_heads: int, *, legacy: bool = False) -> dict[str, Any]:
    return {
        "module": TNT,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
        "embed_dim": embed_dim,
        "num_heads": (4, outer_heads),
        "legacy": legacy,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "tnt_small": _variant((24, 384), 6),
    "tnt_small_legacy": _variant((24, 384), 6, legacy=True),
    "tnt_base": _variant((40, 640), 10),
}
