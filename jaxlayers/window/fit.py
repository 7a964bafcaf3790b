"""FIT: transformer layers within groups of tokens, interleaved with layers over a few latents of every group.

Longer than most files: encoder, denoiser and causal decoder are three models on one block.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import label
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.attention import MultiHeadAttention
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.nn.transformer_block import TransformerBlock
from jaxlayers.ops.patches import crop, from_patches, pad_to_multiple, split_shape
from jaxlayers.ops.resample import resample
from jaxlayers.ops.windows import merge_windows, partition_windows

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)


# Groups lie where windows do, and a group's tokens stay together: a layer that mixes tokens of one group needs no other
# device.
_GROUPS = (axes.WINDOWS,)


# Pure parts -----------------------------------------------------------------------------------------------------------


def parse_layers(layers: str) -> tuple[tuple[int, int], ...]:
    """Return (local layers, global layers) of each block, from the paper's notation.

    Args:
      layers: local layers in parentheses, then global ones: "(2)4(2)" is two local, four global, two local. Only the
        last number may be left out or 0.

    Raises:
      ValueError: if the string is not of that form.

    Example:
      >>> from jaxlayers.window.fit import parse_layers
      >>> parse_layers("(2)4(2)"), parse_layers("(1)8")
      (((2, 4), (2, 0)), ((1, 8),))
    """
    blocks = tuple((int(local), int(wide or 0)) for local, wide in re.findall(r"\((\d+)\)(\d*)", layers))
    if not re.fullmatch(r"(\(\d+\)\d*)+", layers) or any(not wide for _, wide in blocks[:-1]):
        raise ValueError(
            f"layers={layers!r} must be like '(2)4(2)', local layers in parentheses and then global ones, of which "
            "only the last may be left out; set layers"
        )
    return blocks


def causal_mask(length: int, chunk: int = 1) -> Bool[Array, "length length"]:
    """Return which of `length` tokens may attend to which: to their own and earlier chunks of `chunk` tokens.

    Args:
      length: number of tokens.
      chunk: tokens that see each other whatever their order; 1 is the usual causal mask.

    Returns:
      Booleans, queries first.
    """
    place = jnp.arange(length) // chunk
    return place[:, None] >= place[None, :]


def shift_right(tokens: Int[Array, "*batch length"], start: int = 0) -> Int[Array, "*batch length"]:
    """Return `start` and all tokens but the last: what a causal decoder reads to predict `tokens`."""
    first = jnp.full_like(tokens[..., :1], start)
    return jnp.concatenate([first, tokens[..., :-1]], axis=-1)


def noise_embedding(level: Float[Array, "*batch"], features: int) -> Float[Array, "*batch features"]:
    """Return sines and cosines of 1000 times a noise level, with mean 0 and variance 1 over the features.

    Entry 2i is taken to the sine and entry 2i + 1 to the cosine of 1000 level / 10000^(2i / features); all sines come
    first.

    Args:
      level: time or noise level, usually in [0, 1].
      features: width, at least 2.
    """
    exponent = 2 * (jnp.arange(features) // 2) / features
    angle = level[..., None].astype(at_least_float32(level.dtype)) * 1000.0 * 10000.0**-exponent
    angle = angle.astype(at_least_float32(level.dtype))
    code = jnp.concatenate([jnp.sin(angle[..., 0::2]), jnp.cos(angle[..., 1::2])], axis=-1)
    mean, variance = jnp.mean(code, -1, keepdims=True), jnp.var(code, -1, keepdims=True)
    return ((code - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(level.dtype)


# Layers ---------------------------------------------------------------------------------------------------------------


class _CrossAttention(nn.Module):
    """x + attention(norm(x), norm(context)): how latents read, data are written, and latents see conditions."""

    num_heads: int
    groups: tuple[str, ...]
    norm: Callable[..., Any]
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        attention = MultiHeadAttention(self.num_heads, groups=self.groups, name="attention", **_common(self))
        return x + attention(norm(name="query_norm")(x), norm(name="context_norm")(context))


class FITBlock(nn.Module):
    """Mix tokens within groups, then groups through their latents.

    For the tokens x_g `[tokens, features]` and the latents z_g `[slots, latent_features]` of each group g of
    `[groups]`: x_g = Local(x_g); z_g = z_g + CA(norm(z_g), norm(x_g)) (read); z = Global(z) over the latents of all
    groups together; x_g = x_g + CA(norm(x_g), norm(z_g)) (write). Local and Global are chains of `TransformerBlock`s,
    CA(q, c) is `MultiHeadAttention` of q to c. If causal, Local is masked to earlier tokens, Global to the own and
    earlier groups, and group g is written from z_(g-1), the first from zeros.

    Symmetry:
      Exactly equivariant to permutations of the groups (their latents with them) and, but for the order of the tokens
      within the output, of the tokens of a group; neither if causal.

    Attributes:
      depths: number of local and of global layers; without global ones there is neither read nor write.
      num_heads: number of heads of local and of global layers; read and write have the lesser.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      causal: let no token see a later one, in the order of groups, then tokens.
      writes: write latents back to the tokens.
      drop_path_rate: probability of dropping a residual branch of a local or global layer, in [0, 1).
      remat: what the backward pass computes anew in each layer, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole layer, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The weights are sown as
      `attention_weights` in `intermediates`.

    Cost:
      For L tokens in groups of n with m latents each, the attention of a local layer takes 2 L n C multiply-accumulates
      and that of a global one 2 (L m / n)^2 D: O(L^(4/3)) together when n = L^(1/3).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import FITBlock
      >>> block = FITBlock(depths=(1, 1), num_heads=(2, 2))
      >>> inputs = jnp.ones((1, 4, 9, 8)), jnp.ones((1, 4, 2, 16))
      >>> [one.shape for one in jax.eval_shape(block.init_with_output, jax.random.key(0), *inputs)[0]]
      [(1, 4, 9, 8), (1, 4, 2, 16)]

    Source:
      Chen and Li, FIT: Far-reaching Interleaved Transformers, arXiv 2305.12689, 2023;
      github.com/google-research/pix2seq, architectures/transformers.py.

    Differs:
      Queries, keys and values of a read have the latents' width; in the code that of the narrower of the two.
    """

    depths: tuple[int, ...] = (2, 4)
    num_heads: tuple[int, ...] = (8, 8)
    mlp_ratio: float = 4.0
    causal: bool = False
    writes: bool = True
    drop_path_rate: float = 0.0
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch groups tokens features"],
        latents: Float[Array, "*batch groups slots latent_features"] | None = None,
        conditions: Float[Array, "*batch conditions condition_features"] | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[
        Float[Array, "*batch groups tokens features"], Float[Array, "*batch groups slots latent_features"] | None
    ]:
        """Apply the block.

        Args:
          x: the tokens of each group.
          latents: the latents of each group; `None` only without global layers, which leave them alone.
          conditions: tokens that all latents attend to before the global layers; `None` = none.
          deterministic: no dropped branches.

        Returns:
          Tokens and latents like the inputs.

        Raises:
          ValueError: if the two do not have the same batch and groups, or a field does not fit the features.
        """
        if len(self.depths) != 2 or len(self.num_heads) != 2 or min(self.depths) < 0:
            raise ValueError(
                f"depths={self.depths} and num_heads={self.num_heads} must be (local, global), depths not negative; "
                "set both"
            )
        local_depth, global_depth = self.depths
        if (
            x.ndim < 3
            or (latents is None and global_depth)
            or (latents is not None and (latents.ndim != x.ndim or latents.shape[:-2] != x.shape[:-2]))
        ):
            raise ValueError(
                "tokens must be [*batch, groups, tokens, features] and latents, which global layers need, of the same "
                f"batch and groups; got shapes {x.shape} and {None if latents is None else latents.shape}"
            )
        norm_and_types: dict[str, Any] = {"norm": self.norm, **_common(self)}
        shared: dict[str, Any] = {
            "mlp_ratio": self.mlp_ratio,
            "drop_path_rate": self.drop_path_rate,
            **norm_and_types,
        }

        def apply(block: nn.Module, *arrays: Array) -> Array:
            return remat.remat_block(lambda block, *arrays: block(*arrays), self.remat)(block, *arrays)

        def chain(x: Array, depth: int, num_heads: int, name: str, chunk: int, groups: tuple[str, ...]) -> Array:
            def call(block: nn.Module, x: Array) -> Array:
                mask = causal_mask(x.shape[-2], chunk) if self.causal else None
                return block(x, mask, deterministic=deterministic)

            for index in range(depth):
                block = TransformerBlock(num_heads, groups=groups, name=f"{name}_{index}", **shared)
                x = remat.remat_block(call, self.remat)(block, x)
            return x

        cross_heads = min(self.num_heads)
        x = axes.constrain_tokens(x, *_GROUPS)
        x = chain(x, local_depth, self.num_heads[0], "local", 1, _GROUPS)
        x = axes.constrain_tokens(x, *_GROUPS)
        if latents is None or not global_depth:
            return x, latents
        latents = apply(_CrossAttention(cross_heads, _GROUPS, name="read", **norm_and_types), latents, x)
        latents = axes.constrain_tokens(latents, *_GROUPS)
        *batch, groups, slots, width = latents.shape
        merged = axes.constrain_tokens(latents.reshape(*batch, groups * slots, width))
        if conditions is not None:
            conditioned = _CrossAttention(self.num_heads[1], (), name="condition", **norm_and_types)
            merged = apply(conditioned, merged, conditions)
        merged = chain(merged, global_depth, self.num_heads[1], "global", slots, ())
        latents = axes.constrain_tokens(merged.reshape(latents.shape), *_GROUPS)
        if self.writes:
            seen = latents
            if self.causal:
                # A token may be in the latents of its own group together with later ones: it is told of those before.
                seen = jnp.concatenate([jnp.zeros_like(latents[..., :1, :, :]), latents[..., :-1, :, :]], axis=-3)
                seen = axes.constrain_tokens(seen, *_GROUPS)
            x = apply(_CrossAttention(cross_heads, _GROUPS, name="write", **norm_and_types), x, seen)
            x = axes.constrain_tokens(x, *_GROUPS)
        return x, latents


# Models ---------------------------------------------------------------------------------------------------------------


class FIT(nn.Module):
    """Classify images, signals or volumes by a FIT encoder.

    The map of patches is cut into groups of `group_size`; a chain of `FITBlock`s follows, the last of which writes
    nothing back. The mean of what it ends with, the normed latents after global layers and else the normed tokens, is
    mapped to logits. Places within a group have learned positions that all groups share, and each group has latents of
    its own, which are learned too.

    Symmetry:
      None exactly: the tables are learned.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the mean.
      image_size: size of the inputs, an int or one entry for each spatial axis; see `resize` for another.
      patch_size: size of a patch, an int or one entry for each spatial axis.
      group_size: tokens of a group along each spatial axis, whose number it gives; an int means two axes. Inputs that
        are not of whole groups are padded with zeros at their ends.
      latents_per_group: number of latents of a group.
      embed_dim: width of tokens and of latents.
      num_heads: number of heads of local and of global layers.
      layers: the paper's notation, such as "(2)4(2)"; see `parse_layers`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      drop_path_rate: probability of dropping a residual branch, in [0, 1), the same in all layers.
      remat: what the backward pass computes anew in each layer, a name of `core.remat.POLICIES`.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except that of the patch embedding.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of its `FITBlock`s.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import FIT
      >>> fields = dict(num_classes=10, image_size=32, patch_size=4, group_size=4, latents_per_group=2)
      >>> model = FIT(**fields, embed_dim=(8, 16), num_heads=(2, 2), layers="(1)1(1)")
      >>> x = jnp.ones((1, 32, 32, 3))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
      >>> logits.shape, jax.eval_shape(nn.apply(FIT.features, model), variables, x)[0].array.shape
      ((1, 10), (1, 8, 8, 8))

    Source:
      Chen and Li, FIT: Far-reaching Interleaved Transformers, arXiv 2305.12689, 2023; class FIT of
      github.com/google-research/pix2seq, architectures/transformers.py.

    Differs:
      As `FITBlock`. The code ends with tokens or latents for another decoder; the head on their mean is added here, and
      so is the padding. Tables are learned; the code can also fill them with sines and cosines.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, ...] = 256
    patch_size: int | tuple[int, ...] = 8
    group_size: int | tuple[int, ...] = 8
    latents_per_group: int = 16
    embed_dim: tuple[int, ...] = (512, 768)
    num_heads: tuple[int, ...] = (8, 8)
    layers: str = "(2)4(2)"
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patch, group, grid = _places(self)
        blocks = _check_widths(self)
        self.patch_embed = PatchEmbed(
            self.embed_dim[0], patch_size=patch, norm=self.norm, bias_init=self.bias_init, **dtypes
        )
        self.position_embedding = learned_table(
            self,
            "position_embedding",
            truncated_normal(),
            (math.prod(group), self.embed_dim[0]),
            self.param_dtype,
            size=f"group_size={self.group_size}",
        )
        self.latents = (
            learned_table(
                self,
                "latents",
                truncated_normal(),
                (math.prod(grid), self.latents_per_group, self.embed_dim[1]),
                self.param_dtype,
                size=f"image_size={self.image_size}",
            )
            if blocks[0][1]
            else None
        )
        self.stages = _make_stages(self, blocks)
        self.final_norm = self.norm(**dtypes)
        self.head = (
            nn.Dense(self.num_classes, kernel_init=self.kernel_init, bias_init=self.bias_init, **dtypes)
            if self.num_classes
            else None
        )

    def __call__(self, x: Float[Array, "*axes channels"], *, deterministic: bool = True) -> Float[Array, "*batch out"]:
        """Classify.

        Args:
          x: inputs of `image_size`, channels last, scaled as the weights want them.
          deterministic: no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the mean.

        Raises:
          ValueError: if `x` is not of `image_size` or not of floating point, or a field does not fit.
        """
        x, latents = self.tokens(x, deterministic=deterministic)
        ends_with_latents = parse_layers(self.layers)[-1][1] > 0
        x = jnp.mean(self.final_norm(latents if ends_with_latents else x), axis=(-3, -2))
        return x if self.head is None else self.head(x)

    def features(self, x: Float[Array, "*axes channels"], *, deterministic: bool = True) -> tuple[Level, ...]:
        """Return the map of the tokens after the last block, without norm: a pyramid of one level.

        Args:
          x: inputs of `image_size`, channels last.
          deterministic: no dropped branches.

        Returns:
          One level, of stride `patch_size`.
        """
        patch, group, grid = _places(self)
        x, _ = self.tokens(x, deterministic=deterministic)
        x = merge_windows(x, group, [count * step for count, step in zip(grid, group, strict=True)])
        size = [-(-length // step) for length, step in zip(_image_size(self), patch, strict=True)]
        return (Level(axes.constrain_map(crop(x, size), len(patch)), patch),)

    def tokens(
        self, x: Float[Array, "*axes channels"], *, deterministic: bool = True
    ) -> tuple[
        Float[Array, "*batch groups tokens features"], Float[Array, "*batch groups slots latent_features"] | None
    ]:
        """Return the tokens and the latents of each group after the last block.

        Args:
          x: inputs of `image_size`, channels last.
          deterministic: no dropped branches.

        Returns:
          Tokens, and latents or `None` without global layers; groups and tokens in row-major order.
        """
        _, group, _ = _places(self)
        batch, x = _pad_to_groups(self, x)
        x = partition_windows(self.patch_embed(x), group)
        x = axes.constrain_tokens(x + self.position_embedding.astype(x.dtype), *_GROUPS)
        latents = None
        if self.latents is not None:
            latents = jnp.broadcast_to(self.latents.astype(x.dtype), (*batch, *self.latents.shape))
        for stage in self.stages:
            x, latents = stage(x, latents, deterministic=deterministic)
        return x, latents


class FITDenoiser(nn.Module):
    """Denoise images, signals or volumes by a FIT conditioned on the noise level.

    As `FIT` from patches to tokens and latents; before the global layers of each block all latents attend to a token
    of the noise level t, Dense(silu(Dense(code(t)))) with the code of `noise_embedding`, and to the conditions. The
    normed tokens are mapped linearly to the pixels of their patches.

    Symmetry:
      None exactly: the tables are learned. Invariant to the order of the conditions.

    Attributes:
      image_size: size of the inputs, an int or one entry for each spatial axis; see `resize` for another.
      patch_size: size of a patch, an int or one entry for each spatial axis.
      group_size: tokens of a group along each spatial axis, whose number it gives; an int means two axes. Inputs that
        are not of whole groups are padded with zeros at their ends.
      latents_per_group: number of latents of a group.
      embed_dim: width of tokens and of latents; the latter a multiple of 4, at least 16.
      num_heads: number of heads of local and of global layers.
      layers: the paper's notation, such as "(2)4(2)"; see `parse_layers`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      self_condition: start from latents of an earlier call, added through an MLP whose norm's scale starts at zero.
      drop_path_rate: probability of dropping a residual branch, in [0, 1), the same in all layers.
      remat: what the backward pass computes anew in each layer, a name of `core.remat.POLICIES`.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except those of the embeddings of patches and noise level.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of its `FITBlock`s.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import FITDenoiser
      >>> fields = dict(image_size=16, patch_size=2, group_size=4, latents_per_group=2)
      >>> model = FITDenoiser(**fields, embed_dim=(8, 16), num_heads=(2, 2), layers="(1)1(1)")
      >>> images, latents = jax.eval_shape(
      ...     model.init_with_output, jax.random.key(0), jnp.ones((1, 16, 16, 3)), jnp.ones((1,)))[0]
      >>> images.shape, latents.shape
      ((1, 16, 16, 3), (1, 4, 2, 16))

    Source:
      Chen and Li, FIT: Far-reaching Interleaved Transformers, arXiv 2305.12689, 2023; class FITDenoiser of
      github.com/google-research/pix2seq, architectures/transformers.py.

    Differs:
      As `FITBlock` and `FIT`; the code of the noise level is normalised with an epsilon of 1e-6. The code's switches to
      leave out the attention of local layers, or to add MLPs to reads and writes, are left out.
    """

    image_size: int | tuple[int, ...] = 64
    patch_size: int | tuple[int, ...] = 4
    group_size: int | tuple[int, ...] = 8
    latents_per_group: int = 16
    embed_dim: tuple[int, ...] = (256, 512)
    num_heads: tuple[int, ...] = (8, 8)
    layers: str = "(2)4(2)"
    mlp_ratio: float = 4.0
    self_condition: bool = False
    drop_path_rate: float = 0.0
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*axes channels"],
        time: Float[Array, "*batch"],
        conditions: Float[Array, "*batch conditions condition_features"] | None = None,
        latents: Float[Array, "*batch groups slots latent_features"] | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "*axes channels"], Float[Array, "*batch groups slots latent_features"] | None]:
        """Denoise.

        Args:
          x: noisy inputs of `image_size`, channels last.
          time: time or noise level of each, usually in [0, 1].
          conditions: tokens to attend to, such as an embedded class or text; `None` = none.
          latents: the latents that an earlier call returned, for `self_condition`; `None` = zeros.
          deterministic: no dropped branches.

        Returns:
          What the tokens say of the noise or the clean input, like `x`, and the latents.

        Raises:
          ValueError: if an input or a field does not fit.
        """
        patch, group, grid = _places(self)
        blocks = _check_widths(self)
        width = self.embed_dim[1]
        # Two features of mean 0 and variance 1 have only a sign left to say.
        if not blocks[0][1] or width % 4 or width < 16:
            raise ValueError(
                f"layers={self.layers!r} must have global layers, which hear of the noise level, and embed_dim="
                f"{self.embed_dim} latents of a multiple of 4, at least 16; set them"
            )
        channels = x.shape[-1]
        batch, x = _pad_to_groups(self, x)
        if time.shape != batch or (conditions is not None and conditions.shape[:-2] != batch):
            raise ValueError(
                f"time and conditions must be of the batch {batch} of x; got shapes {time.shape} and "
                f"{None if conditions is None else conditions.shape}"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init, **dtypes)
        embed = PatchEmbed(
            self.embed_dim[0],
            patch_size=patch,
            norm=self.norm,
            bias_init=self.bias_init,
            name="patch_embed",
            **dtypes,
        )
        x = partition_windows(embed(x), group)
        tokens = (math.prod(group), self.embed_dim[0])
        table = self.param("position_embedding", truncated_normal(), tokens, self.param_dtype)
        x = axes.constrain_tokens(x + table.astype(x.dtype), *_GROUPS)

        shape = (math.prod(grid), self.latents_per_group, width)
        own = self.param("latents", truncated_normal(), shape, self.param_dtype)
        start = jnp.broadcast_to(own.astype(x.dtype), (*batch, *shape))
        if self.self_condition:
            previous = jnp.zeros((*batch, *shape), x.dtype) if latents is None else latents.astype(x.dtype)
            if previous.shape != start.shape:
                raise ValueError(f"latents of an earlier call must have shape {start.shape}; got {previous.shape}")
            start = start + _Previous(self.mlp_ratio, self.norm, name="previous", **_common(self))(previous)
        elif latents is not None:
            raise ValueError("latents of an earlier call need self_condition=True; set it, or pass no latents")

        code = nn.Dense(width, kernel_init=lecun_normal(), name="time_up", **dtypes)(
            noise_embedding(time.astype(at_least_float32(time.dtype)), width // 4).astype(x.dtype)
        )
        token = nn.Dense(width, kernel_init=lecun_normal(), name="time_down", **dtypes)(nn.silu(code))[..., None, :]
        if conditions is not None:
            projected = dense(width, name="condition_projection")(conditions)
            token = jnp.concatenate([token, projected.astype(token.dtype)], axis=-2)
        state: Array | None = start
        for stage in _make_stages(self, blocks, named=True):
            x, state = stage(x, state, token, deterministic=deterministic)
        x = self.norm(name="final_norm", **dtypes)(x)
        x = dense(math.prod(patch) * channels, name="head")(x)
        x = merge_windows(x, group, [count * step for count, step in zip(grid, group, strict=True)])
        x = crop(from_patches(x, patch), _image_size(self))
        return axes.constrain_map(x, len(patch)), state


class _Previous(nn.Module):
    """norm(z + MLP(norm(z))), which a scale that starts at zero silences at first."""

    mlp_ratio: float
    norm: Callable[..., Any]
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        y = self.norm(name="mlp_norm", dtype=self.dtype, param_dtype=self.param_dtype)(latents)
        hidden = int(latents.shape[-1] * self.mlp_ratio)
        y = latents + FeedForward(hidden, name="feed_forward", **_common(self))(y)
        last = nn.LayerNorm(
            epsilon=1e-6, scale_init=zeros(), dtype=self.dtype, param_dtype=self.param_dtype, name="post_norm"
        )
        return last(y)


class FITAR(nn.Module):
    """Predict each token from those before it by a causal FIT.

    The sequence is cut into groups of `group_size` consecutive tokens, and causal `FITBlock`s follow: a token sees the
    earlier tokens of its group by local layers, and earlier groups by their latents. Logits are the products of the
    normed tokens with the embeddings of the vocabulary, plus a bias.

    Symmetry:
      None. Logits depend on no later token: exactly.

    Attributes:
      vocab_size: number of different tokens.
      group_size: tokens of a group.
      num_groups: groups of the longest sequence; a shorter one takes the first ones.
      latents_per_group: number of latents of a group.
      embed_dim: width of tokens and of latents.
      num_heads: number of heads of local and of global layers.
      layers: the paper's notation, ending with local layers, such as "(2)4(2)"; see `parse_layers`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      shared_embedding: logits are products with the embeddings; else with a kernel of their own.
      drop_path_rate: probability of dropping a residual branch, in [0, 1), the same in all layers.
      remat: what the backward pass computes anew in each layer, a name of `core.remat.POLICIES`.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of its `FITBlock`s, and C vocab_size multiply-accumulates a token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import FITAR, fit
      >>> fields = dict(vocab_size=10, group_size=4, num_groups=3, latents_per_group=2)
      >>> model = FITAR(**fields, embed_dim=(8, 16), num_heads=(2, 2), layers="(1)1(1)")
      >>> tokens = jnp.arange(9)[None]
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), fit.shift_right(tokens))[0].shape
      (1, 9, 10)

    Source:
      Chen and Li, FIT: Far-reaching Interleaved Transformers, arXiv 2305.12689, 2023; class FITAR of
      github.com/google-research/pix2seq, architectures/transformers.py.

    Differs:
      As `FITBlock`. The code takes sequences of the full length only.
    """

    vocab_size: int = 256
    group_size: int = 192
    num_groups: int = 64
    latents_per_group: int = 16
    embed_dim: tuple[int, ...] = (512, 768)
    num_heads: tuple[int, ...] = (8, 8)
    layers: str = "(2)4(2)"
    mlp_ratio: float = 4.0
    shared_embedding: bool = True
    drop_path_rate: float = 0.0
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        for name in ("vocab_size", "group_size", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive; set {name}")
        blocks = _check_widths(self)
        if blocks[-1][1]:
            raise ValueError(
                f"layers={self.layers!r} must end with local layers, since logits are made of tokens; set layers"
            )
        width, latent_width = self.embed_dim
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.token_embed = nn.Embed(self.vocab_size, width, embedding_init=truncated_normal(), **dtypes)
        self.position_embedding = self.param(
            "position_embedding", truncated_normal(), (self.group_size, width), self.param_dtype
        )
        self.latents = (
            self.param(
                "latents",
                truncated_normal(),
                (self.num_groups, self.latents_per_group, latent_width),
                self.param_dtype,
            )
            if blocks[0][1]
            else None
        )
        self.stages = _make_stages(self, blocks, causal=True)
        self.final_norm = self.norm(**dtypes)
        if self.shared_embedding:
            self.logit_bias = self.param("logit_bias", self.bias_init, (self.vocab_size,), self.param_dtype)
        else:
            self.head = nn.Dense(self.vocab_size, kernel_init=self.kernel_init, bias_init=self.bias_init, **dtypes)

    def __call__(
        self, tokens: Int[Array, "*batch length"], *, deterministic: bool = True
    ) -> Float[Array, "*batch length vocab"]:
        """Predict.

        Args:
          tokens: what the model reads, whole numbers below `vocab_size`; `shift_right` of what it shall predict.
          deterministic: no dropped branches.

        Returns:
          Logits; those at a place depend on the tokens up to and with that place.

        Raises:
          ValueError: if the sequence is empty, too long, or not of integers, or a field does not fit.
        """
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens of dtype {tokens.dtype} must be integers; pass indices below {self.vocab_size}")
        return self.decode(self.token_embed(tokens), deterministic=deterministic)

    def decode(
        self, x: Float[Array, "*batch length features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch length vocab"]:
        """Return the logits of embedded tokens.

        Args:
          x: embeddings, without positions.
          deterministic: no dropped branches.
        """
        *batch, length, width = x.shape
        groups = -(-length // self.group_size)
        if not 1 <= groups <= self.num_groups:
            raise ValueError(
                f"a sequence of length {length} must hold 1 to {self.num_groups * self.group_size} tokens, "
                f"num_groups={self.num_groups} of group_size={self.group_size}; set num_groups or cut it"
            )
        # Nothing looks ahead, so what fills the last group is seen by nobody.
        x = pad_to_multiple(x, (self.group_size,)).reshape(*batch, groups, self.group_size, width)
        x = axes.constrain_tokens(x + self.position_embedding.astype(x.dtype), *_GROUPS)
        latents = None
        if self.latents is not None:
            own = self.latents[:groups].astype(x.dtype)
            latents = jnp.broadcast_to(own, (*batch, *own.shape))
        for stage in self.stages:
            x, latents = stage(x, latents, deterministic=deterministic)
        x = self.final_norm(x).reshape(*batch, groups * self.group_size, width)[..., :length, :]
        if not self.shared_embedding:
            return self.head(x)
        logits = self.token_embed.attend(x)
        return logits + self.logit_bias.astype(logits.dtype)


# What the models share ------------------------------------------------------------------------------------------------


def _common(module: nn.Module) -> dict[str, Any]:
    """Return dtypes and initialisers of a module, for its parts."""
    return {name: getattr(module, name) for name in ("dtype", "param_dtype", "kernel_init", "bias_init")}


def _make_stages(
    model: Any, blocks: tuple[tuple[int, int], ...], *, causal: bool = False, named: bool = False
) -> list[FITBlock]:
    """Return the blocks; `named` where there is no `setup` that names them after its attribute."""
    return [
        FITBlock(
            depths,
            model.num_heads,
            mlp_ratio=model.mlp_ratio,
            causal=causal,
            writes=index < len(blocks) - 1,
            drop_path_rate=model.drop_path_rate,
            remat=model.remat,
            norm=model.norm,
            name=f"stages_{index}" if named else None,
            **_common(model),
        )
        for index, depths in enumerate(blocks)
    ]


def _check_widths(model: Any) -> tuple[tuple[int, int], ...]:
    """Return the layers of each block, and refuse widths and heads that are not pairs of positive numbers."""
    for name in ("embed_dim", "num_heads"):
        pair = getattr(model, name)
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{name}={pair} must be one positive number for tokens and one for latents; set {name}")
    if model.latents_per_group < 1:
        raise ValueError(f"latents_per_group={model.latents_per_group} must be positive; set latents_per_group")
    return parse_layers(model.layers)


def _spread(model: Any, name: str, rank: int) -> tuple[int, ...]:
    value = getattr(model, name)
    sizes = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(sizes) != rank or rank not in axes.SPACE or min(sizes) < 1:
        raise ValueError(
            f"{name}={value} must be a positive int or have one positive entry for each of the {rank} axes of "
            f"group_size={model.group_size}, which are 1 to 3; set {name}"
        )
    return sizes


def _rank(model: Any) -> int:
    return 2 if isinstance(model.group_size, int) else len(model.group_size)


def _image_size(model: Any) -> tuple[int, ...]:
    return _spread(model, "image_size", _rank(model))


def _places(model: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return patch, group (in tokens) and grid of groups along each axis."""
    rank = _rank(model)
    group, patch = _spread(model, "group_size", rank), _spread(model, "patch_size", rank)
    sizes = zip(_image_size(model), patch, group, strict=True)
    return patch, group, tuple(-(-length // (step * count)) for length, step, count in sizes)


def _pad_to_groups(model: Any, x: Array) -> tuple[tuple[int, ...], Array]:
    """Return the leading axes, and the input padded to whole groups of patches."""
    patch, group, _ = _places(model)
    batch, size, _ = split_shape(x.shape, len(patch))
    if size != _image_size(model):
        raise ValueError(
            f"spatial size {size} must be image_size={_image_size(model)}; resize the inputs, or the parameters by "
            "fit.resize"
        )
    return batch, pad_to_multiple(x, [step * count for step, count in zip(patch, group, strict=True)])


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: FIT | FITDenoiser | FITAR) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, for layer-wise learning rates.

    Embeddings, positions, latents and what conditions them are layer 0; local and global layers count on from 1 in
    their order; reads, writes and conditions belong to the layer before them; final norm and head come last.

    Args:
      params: parameters of the model.
      model: the model that they are of.
    """
    blocks = parse_layers(model.layers)
    total = sum(map(sum, blocks))

    def layer(path: tuple[str, ...], leaf: Any) -> int:
        if not path[0].startswith("stages_"):
            return total + 1 if path[0] in ("final_norm", "head", "logit_bias") else 0
        stage = int(path[0].removeprefix("stages_"))
        before, (local, wide) = sum(map(sum, blocks[:stage])), blocks[stage]
        kind, _, index = path[1].partition("_")
        if kind in ("read", "condition"):
            return before + local
        if kind == "write":
            return before + local + wide
        return before + (local if kind == "global" else 0) + int(index) + 1

    return label(params, layer)


def resize(params: Params, from_model: FIT | FITDenoiser, to_model: FIT | FITDenoiser) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image and group size of `to_model`.

    Latents are resampled bicubically, with antialiasing, over the grid of groups, positions over the tokens of a group;
    all else stays.

    Args:
      params: parameters of `from_model`.
      from_model: the model that the parameters are of.
      to_model: the model that they are wanted for.

    Returns:
      Parameters of `to_model`.

    Raises:
      ValueError: if the models differ in a field that no resampling bridges.
    """
    bridged = {"image_size", "group_size", "drop_path_rate", "remat", "norm", *_common(from_model), "parent", "name"}
    if type(from_model) is not type(to_model):
        raise ValueError(f"{type(to_model).__name__} must be a {type(from_model).__name__}; pass a model of that class")
    for field in sorted(set(type(from_model).__dataclass_fields__) - bridged):
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    (_, group, grid), (_, new_group, new_grid) = _places(from_model), _places(to_model)
    if len(group) != len(new_group):
        raise ValueError(
            f"group_size={to_model.group_size} must have as many axes as group_size={from_model.group_size}; set it"
        )
    fitted = dict(params)
    for name, old, new in (("latents", grid, new_grid), ("position_embedding", group, new_group)):
        if name in params and old != new:
            table = jnp.asarray(params[name])
            flat = resample(table.reshape(*old, -1), new, antialias=True)
            fitted[name] = flat.reshape(math.prod(new), *table.shape[1:])
    return fitted


# Variants -------------------------------------------------------------------------------------------------------------

# Widths and depths are of this library's choice. The sizes of `fit_6400` are those of the paper's 160 thousand tokens,
# the sequence of `fit_ar_64` is that of its 64 x 64 images in patches of 8 x 8 x 3 bytes.
VARIANTS: dict[str, dict[str, Any]] = {
    "fit_640": {
        "module": FIT,
        "inputs": (jax.ShapeDtypeStruct((1, 640, 640, 3), jnp.float32),),
        "image_size": 640,
        "patch_size": 16,
    },
    "fit_6400": {
        "module": FIT,
        "inputs": (jax.ShapeDtypeStruct((1, 6400, 6400, 3), jnp.float32),),
        "image_size": 6400,
        "patch_size": 16,
        "group_size": 20,
        "remat": "full",
    },
    "fit_denoiser_64": {
        "module": FITDenoiser,
        "inputs": (
            jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        ),
    },
    "fit_ar_64": {
        "module": FITAR,
        "inputs": (jax.ShapeDtypeStruct((1, 12288), jnp.int32),),
    },
}
