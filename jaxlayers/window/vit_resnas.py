"""ViT-ResNAS: a pyramid of plain transformers whose widths are searched for among the parts of a larger network.

Longer than most files: what a model's parts make of an architecture and what is cut out of its parameters for it must
agree. The search itself stands in `vit_resnas_search.py`.

An `Architecture` is the widths of a network: numbers of features, heads and hidden features. They may be Python
integers, from which `sub_network` makes a model that `slice_params` cuts out of a larger one's parameters, or integer
arrays with one entry for each image, which the larger model takes as an argument: it then masks what each image's
network does not have, so that one compiled program serves all architectures, several in a batch.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward, exact_gelu
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.nn.transformer_block import layer_norm
from jaxlayers.ops.patches import pad_to_multiple, split_shape, to_blocks
from jaxlayers.ops.resample import resample


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["embed_dim", "num_heads", "hidden_features"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Architecture:
    """The widths that are searched for: a pytree of integers, or of integer arrays with one entry for each image.

    Attributes:
      embed_dim: features of each stage.
      num_heads: heads of each block of each stage; a block of 0 heads is left out.
      hidden_features: width of the MLP of each block of each stage; 0 where the block is left out.
    """

    embed_dim: tuple[Any, ...]
    num_heads: tuple[tuple[Any, ...], ...]
    hidden_features: tuple[tuple[Any, ...], ...]


def _first(count: Array, size: int) -> Array:
    """Return true for the first `count` of `size` features of all tokens, `[*batch, 1, size]`."""
    return jnp.arange(size) < jnp.asarray(count)[..., None, None]


def _normed(norm: Any, x: Array, mask: Array | None) -> Array:
    """Norm the features of the mask by their own statistics; the others stay zero."""
    return norm(x) if mask is None else jnp.where(mask, norm(x, mask=mask), 0)


class ResidualSpatialReduction(nn.Module):
    """Halve the height and width of a map of tokens and widen them, beside a skip connection that does the same.

    patches: out = W * norm(x) + b + P + pad(pool(x)); class token: out = norm(x) V + c + pad(x). x are tokens
    `[*batch, tokens, before]`, W `[3, 3, before, features]` is a convolution of stride 2, pool the mean of 2 x 2
    tokens, P `[tokens / 4, features]` learned positions, V `[before, features]`, and pad appends zeros to the features.

    Symmetry:
      None exactly: the positions are learned.

    Attributes:
      features: width of the tokens after it, not less than before.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Norms' statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of V; W has variance 1 / fan-in, P is a truncated normal of 0.02.
      bias_init: initialiser of the biases.

    Cost:
      (9 n + 1) before features multiply-accumulates for n tokens after it and a class token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ResidualSpatialReduction
      >>> layer = ResidualSpatialReduction(features=12)
      >>> run = lambda x: layer.init_with_output(jax.random.key(0), x, size=(4, 6))
      >>> jax.eval_shape(run, jnp.ones((1, 25, 8)))[0].shape
      (1, 7, 12)

    Source:
      Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021;
      github.com/yilunliao/vit-search.

    Differs:
      The code takes even sizes; an odd one is rounded up, and the pooling's last row or column averages what is there.
    """

    features: int
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch tokens before"],
        widths: tuple[Int[Array, "..."], ...] | None = None,
        *,
        size: tuple[int, int],
    ) -> Float[Array, "*batch new_tokens features"]:
        """Reduce the map.

        Args:
          x: tokens of the map in row-major order, after those that belong to no place, if there are any.
          widths: how many features count before and after, one number or one for each entry of the batch; `None` =
            all. The others of `x` must be zero, as those of the output are.
          size: height and width of the map.

        Returns:
          Tokens of a map of `ceil(size / 2)`, after the same first ones.

        Raises:
          ValueError: if the tokens do not fill the map, `features` are fewer than before, or the stored positions are
            those of another size.
        """
        places = size[0] * size[1]
        if x.ndim < 2 or places < 1 or x.shape[-2] < places:
            raise ValueError(
                f"input must have at least the {places} tokens of size={tuple(size)}; got shape {x.shape}; set size"
            )
        batch, first, before = x.shape[:-2], x.shape[-2] - places, x.shape[-1]
        if self.features < before:
            raise ValueError(f"features={self.features} must not be less than the {before} of the input; set features")
        after = (-(-size[0] // 2), -(-size[1] // 2))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mask = None if widths is None else _first(widths[0], before)
        y = _normed(self.norm(name="pre_norm", **dtypes), x, mask)

        # An odd map is continued by zeros in the convolution and by nothing in the mean.
        grid = nn.Conv(
            self.features,
            (3, 3),
            strides=2,
            padding=1,
            kernel_init=lecun_normal(),
            bias_init=self.bias_init,
            name="reduce",
            **dtypes,
        )(y[..., first:, :].reshape(*batch, *size, before))
        pooled = _pool(x[..., first:, :].reshape(*batch, *size, before))
        stored: Any = self.get_variable("params", "position_embedding")
        if stored is not None and stored.shape[0] != after[0] * after[1]:
            raise ValueError(
                f"size={tuple(size)} leaves {after[0] * after[1]} places, but position_embedding has "
                f"{stored.shape[0]}; set size, or fit the parameters by vit_resnas.resize"
            )
        positions = self.param(
            "position_embedding", truncated_normal(), (after[0] * after[1], self.features), self.param_dtype
        )
        y_grid = grid.reshape(*batch, -1, self.features)
        y_grid = y_grid + positions.astype(y_grid.dtype)
        skip = pooled.reshape(*batch, -1, before)
        if first:
            token = nn.Dense(
                self.features, kernel_init=self.kernel_init, bias_init=self.bias_init, name="project", **dtypes
            )(y[..., :first, :])
            y_grid = jnp.concatenate([token, y_grid], axis=-2)
            skip = jnp.concatenate([x[..., :first, :], skip], axis=-2)
        out = y_grid + jnp.pad(skip, [(0, 0)] * (x.ndim - 1) + [(0, self.features - before)])
        if widths is not None:
            out = jnp.where(_first(widths[1], self.features), out, 0)
        return axes.constrain_tokens(out)


def _pool(x: Array) -> Array:
    """Return the means of 2 x 2 entries of a map, at the end of an odd axis of those that there are."""
    blocks = to_blocks(pad_to_multiple(x, (2, 2)), (2, 2))
    rows, columns = (np.minimum(2, length - np.arange(0, length, 2)) for length in x.shape[-3:-1])
    return blocks.sum(axis=(-3, -2)) / jnp.asarray((rows[:, None] * columns)[..., None], x.dtype)


class _Attention(nn.Module):
    """Multi-head attention whose heads have a width of their own.

    Attributes:
      num_heads: number of heads.
      head_dim: width of a head.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
    """

    num_heads: int
    head_dim: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, heads: Array | None) -> Array:
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        query, key, value = (
            axes.constrain_heads(
                split_heads(dense(self.num_heads * self.head_dim, name=name)(x), num_heads=self.num_heads)
            )
            for name in ("query", "key", "value")
        )

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            weights = attention_weights(jnp.matmul(query * self.head_dim**-0.5, jnp.swapaxes(key, -1, -2)))
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights, value)

        out = axes.constrain_heads(remat.attention(attend, self, query, key, value))
        if heads is not None:
            out = jnp.where(jnp.arange(self.num_heads)[:, None, None] < heads[..., None, None, None], out, 0)
        return dense(x.shape[-1], name="out")(merge_heads(out))


class ViTResNASBlock(nn.Module):
    """Mix all tokens by attention with heads of a fixed width, then each token alone; any width can be masked.

    z = x + drop(MSA(norm(x))), out = z + drop(MLP(norm(z))), with MSA = softmax(Q K^T / sqrt(d)) V W_out for each of
    h heads of width d; h d need not be the features C of x.

    Symmetry:
      Exactly equivariant to permutations of the tokens.

    Attributes:
      num_heads: number of heads h.
      head_dim: width d of a head.
      hidden_features: width of the MLP's hidden layer.
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`, whose call takes `mask`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`.

    Cost:
      (4 h d + 2 hidden) n C + 2 n^2 h d multiply-accumulates for n tokens, masked or not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ViTResNASBlock
      >>> block = ViTResNASBlock(num_heads=3, head_dim=4, hidden_features=20)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 5, 8)))[0].shape
      (1, 5, 8)

    Source:
      Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021;
      github.com/yilunliao/vit-search.

    Differs:
      Q, K and V come from three products instead of one cut in three. The masked norm's gradient is that of its
      equation, where the code writes one out by hand.
    """

    num_heads: int
    head_dim: int
    hidden_features: int
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
        widths: tuple[Int[Array, "..."], ...] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch tokens features"]:
        """Apply the block.

        Args:
          x: tokens.
          widths: how many features, heads and hidden features count, each one number or one for each entry of the
            batch; `None` = all. The other features of `x` must be zero, as those of the output are. With 0 heads the
            block does nothing.
          deterministic: no dropped branches.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if there are no tokens, or a field is not positive.
        """
        if x.ndim < 2:
            raise ValueError(f"input must be [*batch, tokens, features]; got shape {x.shape}")
        if min(self.num_heads, self.head_dim, self.hidden_features) < 1:
            raise ValueError(
                f"num_heads={self.num_heads}, head_dim={self.head_dim} and hidden_features={self.hidden_features} must "
                "be positive; set them"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        mask = kept = heads = hidden = None
        if widths is not None:
            features, heads, hidden = widths
            mask = _first(features, x.shape[-1])
            kept = mask & (heads > 0)[..., None, None]
        drop_path = DropPath(self.drop_path_rate, batch_ndim=x.ndim - 2)

        def add(x: Array, y: Array) -> Array:
            y = drop_path(y, deterministic=deterministic)
            return axes.constrain_tokens(x + (y if kept is None else jnp.where(kept, y, 0)))

        def activate(y: Array) -> Array:
            y = exact_gelu(y)
            return y if hidden is None else jnp.where(_first(hidden, y.shape[-1]), y, 0)

        y = _normed(self.norm(name="norm1", **dtypes), x, mask)
        x = add(x, _Attention(self.num_heads, self.head_dim, name="attention", **common)(y, heads))
        y = _normed(self.norm(name="norm2", **dtypes), x, mask)
        y = FeedForward(self.hidden_features, activation_fn=activate, name="feed_forward", **common)(y)
        return add(x, y)


class ViTResNAS(nn.Module):
    """Classify images, or give their feature pyramid, by global attention on three maps, each half the one before.

    Convolutions embed patches of 14 x 14 pixels, a class token stands before them, and learned positions are added;
    stage s is (from the second on) a `ResidualSpatialReduction` to `embed_dim[s]` features, and `ViTResNASBlock`s of
    heads of width `head_dim[s]`. The normed class token is mapped to logits. The defaults are ViT-ResNAS-Tiny.

    Symmetry:
      None exactly: the positions are learned.

    Attributes:
      num_classes: number of logits; 0 leaves the heads out, and the output is the normed token.
      image_size: size of the images, an int or (height, width); see `resize` for another.
      patch_size: side of a patch, even; images that are not multiples of it are padded with zeros at their ends.
      stem_features: width of the patch embedding's hidden maps, at half the images' size.
      embed_dim: features of each stage, not decreasing; its length says how many stages there are.
      head_dim: width of a head in each stage.
      num_heads: heads of each block of each stage; a block of 0 heads is left out, while those after it keep their
        names.
      hidden_features: width of the MLP of each block of each stage.
      patch_output: return also logits of each patch, by a head of their own, which the authors train with on images
        mixed patch by patch. Its weights serve a model without it too.
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`, whose call takes `mask`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels; those of the convolutions have variance 1 / fan-in.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats` of the patch embedding (decay 0.9), which `deterministic=False` updates; the RNG stream `dropout`,
      when `deterministic=False` and the rate is not 0.

    Cost:
      Quadratic in the patches. ViT-ResNAS-Tiny at 224 x 224: 1.8 G multiply-accumulates, 40.8 M parameters; see
      `multiply_accumulates`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import ViTResNAS
      >>> model = ViTResNAS(10, 112, embed_dim=(8, 16), head_dim=(4, 6), num_heads=((2, 3), (4,)),
      ...                   hidden_features=((16, 24), (32,)))
      >>> x = jnp.ones((1, 112, 112, 3))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
      >>> levels = jax.eval_shape(nn.apply(ViTResNAS.features, model), variables, x)
      >>> logits.shape, [level.array.shape for level in levels]
      ((1, 10), [(1, 8, 8, 8), (1, 4, 4, 16)])

    Source:
      Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021; github.com/yilunliao/vit-search.

    Differs:
      As its parts. The code's distillation token is left out; none of the published networks has it.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, ...] = 224
    patch_size: int = 14
    stem_features: int = 24
    embed_dim: tuple[int, ...] = (176, 352, 704)
    head_dim: tuple[int, ...] = (32, 48, 64)
    num_heads: tuple[tuple[int, ...], ...] = ((3, 3, 3, 4, 4), (10, 8, 8, 8, 10, 10), (10, 10, 10, 8, 8))
    hidden_features: tuple[tuple[int, ...], ...] = (
        (704, 576, 640, 576, 704),
        (1408, 1408, 1280, 1408, 1280, 1024),
        (2560, 1792, 2816, 2816, 2560),
    )
    patch_output: bool = False
    drop_path_rate: float = 0.2
    remat: bool | str = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        _check(self)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**dtypes, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = _ConvEmbed(
            self.embed_dim[0], self.stem_features, self.patch_size, bias_init=self.bias_init, **dtypes
        )
        rows, columns = _sizes(self)[0]
        self.class_token = self.param("class_token", truncated_normal(), (self.embed_dim[0],), self.param_dtype)
        self.position_embedding = learned_table(
            self,
            "position_embedding",
            truncated_normal(),
            (1 + rows * columns, self.embed_dim[0]),
            self.param_dtype,
            size=f"image_size={self.image_size}",
        )
        rates = iter(drop_path_rates(self.drop_path_rate, sum(map(len, self.num_heads))))
        stages = []
        for stage, heads in enumerate(self.num_heads):
            reduction = functools.partial(
                ResidualSpatialReduction, self.embed_dim[stage], norm=self.norm, name="reduction", **common
            )
            block = functools.partial(ViTResNASBlock, head_dim=self.head_dim[stage], norm=self.norm, **common)
            stages.append(
                _Stage(
                    reduction=reduction if stage else None,
                    block=block,
                    num_heads=heads,
                    hidden_features=self.hidden_features[stage],
                    rates=tuple(itertools.islice(rates, len(heads))),
                    remat=self.remat,
                )
            )
        self.stages = stages
        self.final_norm = self.norm(**dtypes)
        self.head = nn.Dense(self.num_classes, **common) if self.num_classes else None
        self.patch_head = nn.Dense(self.num_classes, **common) if self.num_classes and self.patch_output else None

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        architecture: Architecture | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch classes"] | tuple[Float[Array, "*batch classes"], Float[Array, "*batch patches classes"]]:
        """Classify.

        Args:
          x: images of `image_size`, channels last.
          architecture: widths of the sub-network to run, not more than the model's: integers, or arrays of the batch
            of `x` with the widths of each image's network; `None` = the whole model.
          deterministic: norm the patch embedding by the running statistics; no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the normed class token; with `patch_output` a pair, of these and of the same
          of the last map's patches.

        Raises:
          ValueError: if `x` is not images of the right size, the architecture is not one of the model's stages and
            blocks, or a field does not fit.
        """
        tokens, _ = self._maps(x, architecture, deterministic=deterministic)[-1]
        mask = None if architecture is None else _first(architecture.embed_dim[-1], tokens.shape[-1])
        tokens = _normed(self.final_norm, tokens if self.patch_output else tokens[..., :1, :], mask)
        token = tokens[..., 0, :]
        logits = token if self.head is None else self.head(token)
        if not self.patch_output:
            return logits
        patches = tokens[..., 1:, :]
        return logits, patches if self.patch_head is None else self.patch_head(patches)

    def features(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map after each stage (before the next one's reduction), finest first, without norms.

        Args:
          x: images of `image_size`, channels last.
          deterministic: norm the patch embedding by the running statistics; no dropped branches.

        Returns:
          One level a stage, of stride `patch_size * 2**stage`.
        """
        maps = self._maps(x, None, deterministic=deterministic)
        return tuple(
            Level(
                tokens[..., 1:, :].reshape(*tokens.shape[:-2], *size, tokens.shape[-1]),
                (self.patch_size * 2**stage,) * 2,
            )
            for stage, (tokens, size) in enumerate(maps)
        )

    def _maps(
        self, x: Array, architecture: Architecture | None, *, deterministic: bool
    ) -> list[tuple[Array, tuple[int, int]]]:
        """Return tokens after each stage, the class token first, and the size of the map."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        batch, size, _ = split_shape(x.shape, 2)
        if size != _image_size(self):
            raise ValueError(
                f"spatial size {size} must be image_size={_image_size(self)}; resize the images, or the parameters by "
                "vit_resnas.resize"
            )
        if architecture is not None:
            if jax.tree.map(lambda _: 0, architecture) != jax.tree.map(lambda _: 0, architecture_of(self)):
                raise ValueError(
                    f"architecture={architecture} must have an entry for each stage and block of "
                    f"num_heads={self.num_heads}; pass one with as many"
                )
            architecture = jax.tree.map(jnp.asarray, architecture)
        grid = self.patch_embed(pad_to_multiple(x, (self.patch_size,) * 2), deterministic=deterministic)
        tokens = grid.reshape(*batch, -1, grid.shape[-1])
        token = jnp.broadcast_to(self.class_token.astype(tokens.dtype), (*batch, 1, tokens.shape[-1]))
        tokens = jnp.concatenate([token, tokens], axis=-2) + self.position_embedding.astype(tokens.dtype)
        if architecture is not None:
            tokens = jnp.where(_first(architecture.embed_dim[0], tokens.shape[-1]), tokens, 0)
        tokens = axes.constrain_tokens(tokens)
        sizes, maps = _sizes(self), []
        for index, stage in enumerate(self.stages):
            before = max(index - 1, 0)
            widths = (
                None
                if architecture is None
                else (
                    architecture.embed_dim[before : index + 1],
                    architecture.num_heads[index],
                    architecture.hidden_features[index],
                )
            )
            tokens = stage(tokens, widths, size=sizes[before], deterministic=deterministic)
            maps.append((tokens, sizes[index]))
        return maps


class _ConvEmbed(nn.Module):
    """Embed patches by a residual stem of three 3 x 3 convolutions at half the size, then by the patches of its map.

    Attributes:
      features: width of a token.
      hidden_features: width of the stem's maps.
      patch_size: side of a patch.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      bias_init: initialiser of the biases.
    """

    features: int
    hidden_features: int
    patch_size: int
    dtype: Dtype | None
    param_dtype: Dtype
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(nn.Conv, kernel_init=lecun_normal(), bias_init=self.bias_init, **dtypes)

        def unit(x: Array, number: int, stride: int) -> Array:
            x = conv(self.hidden_features, (3, 3), strides=stride, padding=1, use_bias=False, name=f"conv{number}")(x)
            x = nn.BatchNorm(
                use_running_average=deterministic, momentum=0.9, epsilon=1e-5, name=f"norm{number}", **dtypes
            )(x)
            return nn.relu(x)

        x = unit(x, 1, 2)
        x = x + unit(unit(x, 2, 1), 3, 1)
        side = (self.patch_size // 2,) * 2
        return conv(self.features, side, strides=side, padding="VALID", name="projection")(axes.constrain_map(x))


class _Stage(nn.Module):
    """A reduction and a chain of blocks.

    Attributes:
      reduction: makes the reduction; `None` for the first stage.
      block: makes a block.
      num_heads: heads of each block.
      hidden_features: width of each block's MLP.
      rates: drop-path rate of each block.
      remat: what blocks compute anew in the backward pass.
    """

    reduction: Callable[..., nn.Module] | None
    block: Callable[..., nn.Module]
    num_heads: tuple[int, ...]
    hidden_features: tuple[int, ...]
    rates: tuple[float, ...]
    remat: bool | str

    @nn.compact
    def __call__(self, x: Array, widths: Any, *, size: tuple[int, int], deterministic: bool) -> Array:
        if self.reduction is not None:
            x = self.reduction()(x, None if widths is None else widths[0], size=size)

        def call(block: nn.Module, x: Array, widths: tuple[Array, ...] | None) -> Array:
            return block(x, widths, deterministic=deterministic)

        for index, (heads, hidden, rate) in enumerate(
            zip(self.num_heads, self.hidden_features, self.rates, strict=True)
        ):
            if heads:
                block = self.block(num_heads=heads, hidden_features=hidden, drop_path_rate=rate, name=f"blocks_{index}")
                of_block = None if widths is None else (widths[0][-1], widths[1][index], widths[2][index])
                x = remat.remat_block(call, self.remat)(block, x, of_block)
        return x


def _check(model: ViTResNAS) -> None:
    entries = (model.embed_dim, model.head_dim, model.num_heads, model.hidden_features)
    if not model.embed_dim or len(set(map(len, entries))) > 1:
        raise ValueError(
            f"embed_dim={model.embed_dim}, head_dim={model.head_dim}, num_heads={model.num_heads} and "
            f"hidden_features={model.hidden_features} must have one entry a stage; set them alike"
        )
    for heads, hidden in zip(model.num_heads, model.hidden_features, strict=True):
        if len(heads) != len(hidden) or not _positive(heads, hidden):
            raise ValueError(
                f"num_heads={model.num_heads} and hidden_features={model.hidden_features} must have one positive entry "
                "a block, or 0 heads for a block that is left out; set them alike"
            )
    if min(model.embed_dim) < 1 or list(model.embed_dim) != sorted(model.embed_dim):
        raise ValueError(f"embed_dim={model.embed_dim} must be positive and not decrease; set embed_dim")
    if model.patch_size < 2 or model.patch_size % 2 or model.stem_features < 1:
        raise ValueError(
            f"patch_size={model.patch_size} must be even and stem_features={model.stem_features} positive; set them"
        )
    if model.num_classes < 0:
        raise ValueError(f"num_classes={model.num_classes} must not be negative; set num_classes (0 for no head)")


def _positive(heads: Sequence[int], hidden: Sequence[int]) -> bool:
    return bool(heads) and all(h == 0 or min(h, width) > 0 for h, width in zip(heads, hidden, strict=True))


def _image_size(model: ViTResNAS) -> tuple[int, int]:
    size = (model.image_size,) * 2 if isinstance(model.image_size, int) else tuple(model.image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size={model.image_size} must be a positive int or (height, width); set image_size")
    return size


def _sizes(model: ViTResNAS) -> list[tuple[int, int]]:
    """Return height and width of the map of each stage."""
    height, width = _image_size(model)
    strides = [model.patch_size * 2**stage for stage in range(len(model.embed_dim))]
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def multiply_accumulates(model: ViTResNAS) -> int:
    """Return the multiply-accumulates of the model for one RGB image: what `count_macs` counts, from the fields alone.

    The search asks for thousands of them.
    """
    _check(model)
    sizes = [height * width for height, width in _sizes(model)]
    side, stem, classes = model.patch_size // 2, model.stem_features, model.num_classes
    total = sizes[0] * side**2 * (9 * stem * (3 + 2 * stem) + stem * model.embed_dim[0])
    for stage, (width, places) in enumerate(zip(model.embed_dim, sizes, strict=True)):
        if stage:
            total += (9 * places + 1) * model.embed_dim[stage - 1] * width
        tokens = places + 1
        for heads, hidden in zip(model.num_heads[stage], model.hidden_features[stage], strict=True):
            inner = heads * model.head_dim[stage]
            total += tokens * width * (4 * inner + 2 * hidden * (heads > 0)) + 2 * tokens**2 * inner
    return total + model.embed_dim[-1] * classes * (1 + sizes[-1] * model.patch_output)


# Weight sharing -------------------------------------------------------------------------------------------------------


def architecture_of(model: ViTResNAS) -> Architecture:
    """Return the widths of a model."""
    return Architecture(model.embed_dim, model.num_heads, model.hidden_features)


def sub_network(model: ViTResNAS, architecture: Architecture) -> ViTResNAS:
    """Return the model of other widths, in Python integers."""
    return model.clone(
        embed_dim=architecture.embed_dim,
        num_heads=architecture.num_heads,
        hidden_features=architecture.hidden_features,
    )


def slice_params(params: Params, super_model: ViTResNAS, sub_model: ViTResNAS) -> dict[str, Any]:
    """Return the parameters that a smaller model shares with a larger one: the first features, heads and blocks.

    A block whose `num_heads` is 0 in the smaller model is left out wherever it stands; a stage with fewer entries has
    the first blocks. The `batch_stats` of both are the same.

    Args:
      params: parameters of `super_model`.
      super_model: the larger model.
      sub_model: the smaller one, such as `sub_network(super_model, architecture)`.

    Returns:
      Parameters of `sub_model`.

    Raises:
      ValueError: if `sub_model` differs in more than widths, or has what `super_model` does not.
    """
    _check_alike(super_model, sub_model, ("image_size", *_SHAPES))
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    wanted = flax.traverse_util.flatten_dict(_wanted(sub_model, flat["patch_embed/conv1/kernel"].shape[-2]), sep="/")
    found = {}
    for path, leaf in wanted.items():
        if path not in flat or any(new > old for new, old in zip(leaf.shape, flat[path].shape, strict=True)):
            raise ValueError(
                f"{path} of shape {leaf.shape} must lie within the larger model's "
                f"{flat[path].shape if path in flat else 'parameters'}; set the fields of sub_model"
            )
        found[path] = flat[path][tuple(slice(length) for length in leaf.shape)]
    return flax.traverse_util.unflatten_dict(found, sep="/")


# What all sub-networks have in common, besides the size of the images.
_SHAPES = ("patch_size", "stem_features", "head_dim", "num_classes")


def _check_alike(old: ViTResNAS, new: ViTResNAS, fields: Sequence[str]) -> None:
    for field in fields:
        if getattr(old, field) != getattr(new, field):
            raise ValueError(
                f"{field}={getattr(new, field)} must equal the {field}={getattr(old, field)} of the parameters; set it "
                "alike"
            )


def _wanted(model: ViTResNAS, channels: int) -> Any:
    image = jax.ShapeDtypeStruct((1, *_image_size(model), channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def sort_by_importance(params: Params, model: ViTResNAS) -> dict[str, Any]:
    """Return parameters of the same function whose heads and hidden features are in order of their weight.

    The heads of each block are sorted by the sum of the absolute values of all their parameters, largest first, and
    the hidden features of its MLP likewise. Done while a super-network warms up, so that the first ones, which most
    sub-networks have, are those that matter.

    Args:
      params: parameters of `model`.
      model: the model.
    """
    found = dict(params)
    for stage, heads in enumerate(model.num_heads):
        blocks = dict(found[f"stages_{stage}"])
        for index in (index for index, number in enumerate(heads) if number):
            block = blocks[f"blocks_{index}"]
            attention, mlp = block["attention"], block["feed_forward"]
            dim = model.head_dim[stage]
            columns = sum(_weight(attention[name]) for name in ("query", "key", "value"))
            columns = columns + jnp.sum(jnp.abs(attention["out"]["kernel"]), axis=1)
            order = jnp.argsort(-columns.reshape(-1, dim).sum(axis=1))
            order = (order[:, None] * dim + jnp.arange(dim)).ravel()
            hidden = jnp.argsort(-_weight(mlp["up"]) - jnp.sum(jnp.abs(mlp["down"]["kernel"]), axis=1))
            blocks[f"blocks_{index}"] = {
                **block,
                "attention": {
                    **{name: _columns(attention[name], order) for name in ("query", "key", "value")},
                    "out": {**attention["out"], "kernel": attention["out"]["kernel"][order]},
                },
                "feed_forward": {
                    "up": _columns(mlp["up"], hidden),
                    "down": {**mlp["down"], "kernel": mlp["down"]["kernel"][hidden]},
                },
            }
        found[f"stages_{stage}"] = blocks
    return found


def _weight(dense: Params) -> Array:
    return jnp.sum(jnp.abs(dense["kernel"]), axis=0) + jnp.abs(dense["bias"])


def _columns(dense: Params, order: Array) -> dict[str, Array]:
    return {"kernel": dense["kernel"][:, order], "bias": dense["bias"][order]}


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: ViTResNAS) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`.

    Class token and positions belong to the patch embedding, a reduction to the block before it.
    """
    ids = pyramid_layer_ids(params, [len(heads) for heads in model.num_heads])
    return {**ids, "class_token": 0, "position_embedding": 0}


def resize(params: Params, from_model: ViTResNAS, to_model: ViTResNAS) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image size of `to_model`.

    The positions of the patches of each stage are resampled bicubically, the class token's row aside; all else stays.

    Args:
      params: parameters of `from_model`.
      from_model: the model that the parameters are of.
      to_model: the model that they are wanted for.

    Returns:
      Parameters of `to_model`.

    Raises:
      ValueError: if the models differ in a field that no resampling bridges.
    """
    _check_alike(from_model, to_model, (*_SHAPES, "embed_dim", "num_heads", "hidden_features", "patch_output"))
    found = dict(params)
    for stage, (old, new) in enumerate(zip(_sizes(from_model), _sizes(to_model), strict=True)):
        if old == new:
            continue
        if stage == 0:
            first, rest = jnp.split(jnp.asarray(params["position_embedding"]), [1])
            found["position_embedding"] = jnp.concatenate([first, _resampled(rest, old, new)])
        else:
            before = params[f"stages_{stage}"]
            table = _resampled(jnp.asarray(before["reduction"]["position_embedding"]), old, new)
            found[f"stages_{stage}"] = {**before, "reduction": {**before["reduction"], "position_embedding": table}}
    return found


def _resampled(table: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    return resample(table.reshape(*old, -1), new).reshape(-1, table.shape[-1])


# Reference checkpoints ------------------------------------------------------------------------------------------------

_BLOCK = "stages.{stage}.blocks.{block}"
_REDUCTION = "stages.{stage}.reduction"
# See `jaxlayers.core.reference`; the code's list of blocks is first cut into stages, its fused `qkv` into q, k and v.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "official": {
        **{f"patch_embed/conv{number}": f"patch_embed.conv{number}.conv" for number in (1, 2, 3)},
        **{f"patch_embed/norm{number}": f"patch_embed.conv{number}.bn" for number in (1, 2, 3)},
        **{
            f"patch_embed/norm{number}/{ours}": f"patch_embed.conv{number}.bn.running_{ours}"
            for number in (1, 2, 3)
            for ours in ("mean", "var")
        },
        "patch_embed/projection": "patch_embed.conv_proj",
        "class_token": "tokens",
        "position_embedding": "pos_embed",
        "stages/reduction/pre_norm": f"{_REDUCTION}.norm",
        "stages/reduction/reduce": f"{_REDUCTION}.patch_reduce",
        "stages/reduction/project": f"{_REDUCTION}.token_transform",
        "stages/reduction/position_embedding": f"{_REDUCTION}.pos_embed",
        "stages/blocks/norm1": f"{_BLOCK}.norm1",
        "stages/blocks/norm2": f"{_BLOCK}.norm2",
        "stages/blocks/attention/query": f"{_BLOCK}.attn.query",
        "stages/blocks/attention/key": f"{_BLOCK}.attn.key",
        "stages/blocks/attention/value": f"{_BLOCK}.attn.value",
        "stages/blocks/attention/out": f"{_BLOCK}.attn.proj",
        "stages/blocks/feed_forward/up": f"{_BLOCK}.mlp.fc1",
        "stages/blocks/feed_forward/down": f"{_BLOCK}.mlp.fc2",
        "final_norm": "norm",
        "head": "cls_head",
        "patch_head": "patch_head",
    }
}


def from_reference(tensors: Mapping[str, Any], model: ViTResNAS, *, source: str = "official") -> dict[str, Any]:
    """Return variables of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for; without `patch_output` the head of the patches is ignored.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      The collections `params` and `batch_stats`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    table, channels = reference.choose_table(REFERENCE_NAMES, source, tensors, "patch_embed/conv1/kernel")
    places = _places(model)
    ours: dict[str, Any] = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition(".")
        number, _, end = rest.partition(".")
        if start == "blocks" and number.isdecimal() and int(number) < len(places):
            name = f"{places[int(number)]}.{end}"
        # A table of one place must keep its axis.
        ours[name] = np.asarray(tensor)[0] if name.endswith("pos_embed") else tensor
    image = jax.ShapeDtypeStruct((1, *_image_size(model), channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))
    ignored = () if model.patch_output else _PATCH_HEAD
    return reference.read_variables(reference.split_fused(ours), wanted, table, ignored=ignored)


_PATCH_HEAD = ("patch_head.weight", "patch_head.bias")


def _places(model: ViTResNAS) -> list[str]:
    """Return where the reference's list of blocks, numbered through, has its entries with us."""
    return [
        name
        for stage, heads in enumerate(model.num_heads)
        for name in (
            *([f"stages.{stage}.reduction"] if stage else []),
            *(f"stages.{stage}.blocks.{index}" for index in range(len(heads))),
        )
    ]


def reference_inputs(model: ViTResNAS) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *_image_size(model), 3), jnp.float32),)


_staged_layout = dialects.table_layout(
    REFERENCE_NAMES["official"],
    shapes={"class_token": dialects.with_ones(before=2), "position_embedding": dialects.with_ones(before=1)},
    fused=dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
)


def _layout(model: ViTResNAS, variables: Mapping[str, Any]) -> dialects.Layout:
    """Return shape by name, with the blocks numbered through."""
    numbers = {place: number for number, place in enumerate(_places(model))}

    def numbered(name: str) -> str:
        start = re.match(r"stages\.\d+\.(?:reduction|blocks\.\d+)(?=\.)", name)
        return f"blocks.{numbers[start[0]]}{name[start.end() :]}" if start else name

    return {numbered(name): shape for name, shape in _staged_layout(model, variables).items()}


def _left_out(model: ViTResNAS) -> dict[str, str]:
    unused = {} if model.patch_output else {r"^patch_head\.": "the head of the patches; set patch_output to have it"}
    return {**dialects.COUNTED, **unused}


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/yilunliao/vit-search",
        module=ViTResNAS,
        read=dialects.from_variables(from_reference, source="official"),
        marks=(r"^patch_embed\.conv1\.conv\.weight$", r"^tokens$", r"^blocks\.\d+\.patch_reduce\."),
        ignored=_left_out,
        layout=_layout,
        head="cls_head.weight",
        stem="patch_embed.conv1.conv.weight",
    ),
)


# The networks ---------------------------------------------------------------------------------------------------------


def _variant(
    embed_dim: tuple[int, ...],
    num_heads: tuple[tuple[int, ...], ...],
    hidden_features: tuple[tuple[int, ...], ...],
    drop_path_rate: float,
    head_dim: tuple[int, ...] = (32, 48, 64),
) -> dict[str, Any]:
    return {
        "module": ViTResNAS,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
        "embed_dim": embed_dim,
        "head_dim": head_dim,
        "num_heads": num_heads,
        "hidden_features": hidden_features,
        "drop_path_rate": drop_path_rate,
    }


# `vit_res_tiny` is the hand-made network that the search starts from.
VARIANTS: dict[str, dict[str, Any]] = {
    "vit_res_tiny": _variant(
        (192, 384, 768), ((3,) * 4, (6,) * 4, (12,) * 4), ((768,) * 4, (1536,) * 4, (3072,) * 4), 0.2, (64, 64, 64)
    ),
    "vit_resnas_tiny": _variant(
        (176, 352, 704),
        ((3, 3, 3, 4, 4), (10, 8, 8, 8, 10, 10), (10, 10, 10, 8, 8)),
        (
            (704, 576, 640, 576, 704),
            (1408, 1408, 1280, 1408, 1280, 1024),
            (2560, 1792, 2816, 2816, 2560),
        ),
        0.2,
    ),
    "vit_resnas_small": _variant(
        (220, 440, 880),
        ((5, 5, 7, 5, 5, 5), (10, 10, 10, 10, 12, 12), (16, 12, 16, 12, 14)),
        (
            (880, 880, 800, 720, 720, 720),
            (1760, 1440, 1920, 1600, 1600, 1440),
            (3200, 3200, 2880, 2240, 2560),
        ),
        0.3,
    ),
    "vit_resnas_medium": _variant(
        (240, 640, 880),
        ((7, 6, 7, 8, 7, 8, 6), (10, 14, 14, 16, 14, 16, 16), (16, 10, 16, 12, 16, 14)),
        (
            (960, 960, 800, 960, 880, 880, 800),
            (1120, 1760, 1920, 1760, 1440, 1760, 1920),
            (3200, 3840, 3840, 3200, 3520, 3520),
        ),
        0.3,
    ),
}
