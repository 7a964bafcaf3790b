"""Hiera: a pyramid of plain blocks that attend in mask units first, everywhere later, and pool their queries.

Longer than most files, since images and videos, kept units, resizing and three dialects of names belong to one paper.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import Dtype, Initializer, Params, PRNGKey
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.ops.patches import crop, pad_to_multiple, split_shape, to_blocks
from jaxlayers.ops.resample import resample
from jaxlayers.ops.windows import merge_windows, partition_windows, window_regions

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)

# Pools a map by a stride.
Pool = Callable[[Array, tuple[int, ...]], Array]


def max_pool(x: Float[Array, "*axes features"], stride: Sequence[int]) -> Float[Array, "*pooled features"]:
    """Return the largest entry of each block of `stride`; a block at the end counts what the map holds of it."""
    _, size, _ = split_shape(x.shape, len(stride))
    ends = [(0, 0)] * (x.ndim - 1 - len(size)) + [
        (0, -length % step) for length, step in zip(size, stride, strict=True)
    ]
    blocks = to_blocks(jnp.pad(x, [*ends, (0, 0)], constant_values=-jnp.inf), stride)
    return jnp.max(blocks, axis=_block_axes(blocks, len(stride)))


def average_pool(x: Float[Array, "*axes features"], stride: Sequence[int]) -> Float[Array, "*pooled features"]:
    """Return the mean entry of each block of `stride`; a block at the end counts what the map holds of it."""
    _, size, _ = split_shape(x.shape, len(stride))
    blocks = to_blocks(pad_to_multiple(x, stride), stride)
    counts = np.ones((1,) * len(size))
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        held = np.minimum(length - step * np.arange(-(-length // step)), step)
        counts = counts * held.reshape([-1 if other == axis else 1 for other in range(len(size))])
    return jnp.sum(blocks, axis=_block_axes(blocks, len(stride))) / jnp.asarray(counts[..., None], x.dtype)


def _block_axes(blocks: Array, rank: int) -> tuple[int, ...]:
    return tuple(range(blocks.ndim - 1 - rank, blocks.ndim - 1))


class MaskUnitAttention(nn.Module):
    """Attend within each mask unit, a block of the map, or everywhere; the queries may be pooled.

    out = softmax(P(Q) K^T / sqrt(d)) V W_out for each unit and head; Q, K, V `[tokens, d]` are linear in the unit's
    tokens, and P pools them by `q_stride`, so that the output has a query for each block of tokens.

    Symmetry:
      Units never mix: exactly equivariant to permutations of the units. Without pooling also to permutations of the
      tokens in a unit.

    Attributes:
      num_heads: number of heads; must divide the features of the output.
      features: width of the output; `None` keeps that of the input.
      unit_size: size of a unit on the input, one entry for each spatial axis (1 to 3 of them); an int means a square
        of two axes, `None` attends everywhere.
      q_stride: how many tokens along each axis share a pooled query, like `unit_size`, which it must divide; 1 pools
        nothing.
      pool: P, called with a map and the stride; `max_pool` or `average_pool`.
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The weights are sown as `attention_weights` in `intermediates`.

    Cost:
      For n tokens of width D in units of m, pooled by s in all, to width C: n C (3 D + C / s + 2 m / s)
      multiply-accumulates.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import MaskUnitAttention
      >>> layer = MaskUnitAttention(num_heads=2, features=16, unit_size=4, q_stride=2)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 5, 3, 16)

    Source:
      Ryali et al., Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles, ICML 2023, section 3;
      github.com/facebookresearch/hiera.

    Differs:
      Works on maps, where the reference reorders tokens once so that units and pooled blocks are strided slices. Any
      map size: a unit at the end holds only the tokens that there are; the reference takes whole units. Q, K and V
      come from three products instead of one cut in three.
    """

    num_heads: int
    features: int | None = None
    unit_size: int | tuple[int, ...] | None = None
    q_stride: int | tuple[int, ...] = 1
    pool: Pool = max_pool
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*axes features"]) -> Float[Array, "*new_axes out"]:
        """Attend.

        Args:
          x: map `[*batch, *space, features]`.

        Returns:
          A map of spatial size `ceil(size / q_stride)`.

        Raises:
          ValueError: if `x` has too few axes, the heads do not divide the features or the stride not the unit.
        """
        unit, stride = _unit_and_stride(self.unit_size, self.q_stride)
        batch, size, _ = split_shape(x.shape, len(stride))
        features = x.shape[-1] if self.features is None else self.features
        if self.num_heads < 1 or features < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        dense = functools.partial(
            nn.Dense,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        query, key, value = (dense(name=name)(x) for name in ("query", "key", "value"))
        query = self.pool(query, stride) if max(stride) > 1 else query
        pooled = query.shape[len(batch) : -1]
        if unit is None:
            asking, answering = pooled, size
        else:
            asking, answering = tuple(a // b for a, b in zip(unit, stride, strict=True)), unit
        # Tokens that pad the last units answer nothing.
        true = window_regions(size, answering, (0,) * len(size), separate_padding=True) >= 0
        mask = None if true.all() else jnp.asarray(true[:, None, None])

        def split(x: Array, window: tuple[int, ...]) -> Array:
            windows = partition_windows(pad_to_multiple(x, window), window)
            return axes.constrain_heads(split_heads(windows, self.num_heads), axes.WINDOWS)

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            logits = jnp.matmul(query * (features // self.num_heads) ** -0.5, jnp.swapaxes(key, -1, -2))
            weights = attention_weights(logits, mask=mask)
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights, value)

        y = remat.attention(attend, self, split(query, asking), split(key, answering), split(value, answering))
        y = merge_heads(axes.constrain_heads(y, axes.WINDOWS))
        padded = [-(-length // step) * step for length, step in zip(pooled, asking, strict=True)]
        return dense(name="out")(crop(merge_windows(y, asking, padded), pooled))


class HieraBlock(nn.Module):
    """Mix the tokens of each mask unit, or all, then each token alone; may pool the map and change its width.

    z = S(x) + drop(MSA(norm(x))), out = z + drop(MLP(norm(z))), with MSA a `MaskUnitAttention`. S is the identity, or,
    where the map's size or width changes, S(x) = P(norm(x) W + b) with the same pooling P as the queries have.

    Symmetry:
      As `MaskUnitAttention`.

    Attributes:
      num_heads: number of heads; must divide the features of the output.
      features: width of the output; `None` keeps that of the input.
      unit_size: size of a mask unit on the input, see `MaskUnitAttention`; `None` attends everywhere.
      q_stride: how many tokens along each axis share a pooled query; 1 keeps the size.
      pool: P, called with a map and the stride; `max_pool` or `average_pool`.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the output's features.
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of `MaskUnitAttention`, and 2 mlp_ratio C^2 multiply-accumulates a token of the output of width C.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import HieraBlock
      >>> block = HieraBlock(num_heads=2, features=16, unit_size=4, q_stride=2)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 5, 3, 16)

    Source:
      Ryali et al., Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles, ICML 2023, section 3;
      github.com/facebookresearch/hiera.

    Differs:
      As `MaskUnitAttention`.
    """

    num_heads: int
    features: int | None = None
    unit_size: int | tuple[int, ...] | None = None
    q_stride: int | tuple[int, ...] = 1
    pool: Pool = max_pool
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*axes features"], *, deterministic: bool = True
    ) -> Float[Array, "*new_axes out"]:
        """Apply the block.

        Args:
          x: map `[*batch, *space, features]`.
          deterministic: no dropped branches.

        Returns:
          A map of spatial size `ceil(size / q_stride)`.

        Raises:
          ValueError: if `x` has too few axes, or a field does not fit the features or another field.
        """
        _, stride = _unit_and_stride(self.unit_size, self.q_stride)
        batch, _, width = split_shape(x.shape, len(stride))
        features = width if self.features is None else self.features
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=len(batch))
        y = norm(name="norm1")(x)
        attended = MaskUnitAttention(
            self.num_heads,
            features=features,
            unit_size=self.unit_size,
            q_stride=self.q_stride,
            pool=self.pool,
            name="attention",
            **common,
        )(y)
        if features != width or max(stride) > 1:
            x = nn.Dense(features, name="skip", **common)(y)
            x = self.pool(x, stride) if max(stride) > 1 else x
        x = axes.constrain_map(x + drop_path(attended, deterministic=deterministic), len(stride))
        y = FeedForward(int(features * self.mlp_ratio), name="feed_forward", **common)(
            norm(name="norm2")(x), deterministic=deterministic
        )
        return axes.constrain_map(x + drop_path(y, deterministic=deterministic), len(stride))


class HieraStage(nn.Module):
    """Chain `HieraBlock`s, the first of which may pool the map and change its width.

    Attributes:
      features: width of the stage.
      num_heads: number of heads of every block.
      drop_path_rates: probability of dropping a residual branch, in [0, 1), one for each block.
      unit_size: size of a mask unit on the stage's map, see `MaskUnitAttention`; `None` attends everywhere.
      first_unit_size: the same for the first block, on the map that comes in.
      q_stride: how many tokens along each axis share a pooled query in the first block; 1 keeps the size.
      pool: pools by it, called with a map and the stride; `max_pool` or `average_pool`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import HieraStage
      >>> stage = HieraStage(16, num_heads=2, drop_path_rates=(0.0, 0.1), first_unit_size=4, q_stride=2)
      >>> jax.eval_shape(stage.init_with_output, jax.random.key(0), jnp.ones((1, 9, 6, 8)))[0].shape
      (1, 5, 3, 16)

    Source:
      Ryali et al., Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles, ICML 2023, section 3;
      github.com/facebookresearch/hiera, where a stage's first block still attends as the stage before it does.

    Differs:
      As `MaskUnitAttention`.
    """

    features: int
    num_heads: int
    drop_path_rates: tuple[float, ...]
    unit_size: int | tuple[int, ...] | None = None
    first_unit_size: int | tuple[int, ...] | None = None
    q_stride: int | tuple[int, ...] = 1
    pool: Pool = max_pool
    mlp_ratio: float = 4.0
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*axes features"], *, deterministic: bool = True
    ) -> Float[Array, "*new_axes out"]:
        """Apply the blocks.

        Args:
          x: map `[*batch, *space, features]`.
          deterministic: no dropped branches.

        Returns:
          A map of spatial size `ceil(size / q_stride)`.

        Raises:
          ValueError: if `x` has too few axes, or a field does not fit the features or another field.
        """
        if not self.drop_path_rates:
            raise ValueError("drop_path_rates=() must have one rate for each block; set drop_path_rates")
        _, stride = _unit_and_stride(self.first_unit_size, self.q_stride)

        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        for index, rate in enumerate(self.drop_path_rates):
            block = HieraBlock(
                self.num_heads,
                features=self.features,
                unit_size=self.unit_size if index else self.first_unit_size,
                q_stride=(1,) * len(stride) if index else stride,
                pool=self.pool,
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=rate,
                norm=self.norm,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=f"blocks_{index}",
            )
            x = remat.remat_block(call, self.remat)(block, x)
        return x


class HieraEmbed(nn.Module):
    """Embed overlapping patches of an image or a video by a strided convolution, and add learned positions.

    out[p] = (W * x + b)[p] + E[p], with W `[*patch, channels, features]` and E `[tokens, features]`; for a video
    E[t, p] = T[t] + S[p] with one table for frames and one for places.

    Symmetry:
      None: the tables are learned.

    Attributes:
      features: width of a token.
      image_size: size of the input, an int or (height, width), or (frames, height, width) for videos.
      patch_size: size of a patch, an int or one entry for each axis.
      patch_stride: distance of two patches, likewise.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W; the tables start as truncated normals of 0.02.
      bias_init: initialiser of b.

    Cost:
      pixels of a patch x channels x features multiply-accumulates a token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import HieraEmbed
      >>> layer = HieraEmbed(features=8, image_size=(30, 32))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 30, 32, 3)))[0].shape
      (1, 8, 8, 8)

    Source:
      Ryali et al., Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles, ICML 2023, section 3;
      github.com/facebookresearch/hiera.

    Differs:
      Sizes that are not multiples of the stride are rounded up; the reference takes multiples.
    """

    features: int
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 7
    patch_stride: int | tuple[int, ...] = 4
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*axes channels"]) -> Float[Array, "*grid features"]:
        """Embed.

        Args:
          x: images or videos of `image_size`, channels last.

        Returns:
          A map of spatial size `ceil(size / patch_stride)`.

        Raises:
          ValueError: if `x` is not of `image_size` or not of floating point, or a field does not fit.
        """
        image = _per_axis("image_size", self.image_size, len(_image(self.image_size)))
        patch = _per_axis("patch_size", self.patch_size, len(image))
        stride = _per_axis("patch_stride", self.patch_stride, len(image))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        _, size, _ = split_shape(x.shape, len(image))
        if size != image:
            raise ValueError(
                f"spatial size {size} must be image_size={image}; resize the input, or the parameters by hiera.resize"
            )
        x = nn.Conv(
            self.features,
            patch,
            strides=stride,
            padding=[((length - 1) // 2, length // 2) for length in patch],
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="projection",
        )(x)
        for name, grid in position_tables(image, stride).items():
            table_shape = (math.prod(grid), self.features)
            size_of = f"image_size={image}"
            table = learned_table(self, name, truncated_normal(), table_shape, self.param_dtype, size=size_of)
            # The table of frames has no places, that of places no frames.
            shape = (*grid, 1, 1) if name.startswith("temporal") else grid
            x = x + table.reshape(*shape, self.features).astype(x.dtype)
        return axes.constrain_map(x, len(image))


def position_tables(image: Sequence[int], stride: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the names of the tables of positions of `HieraEmbed`, and the grid whose places their rows are."""
    grid = tuple(-(-length // step) for length, step in zip(image, stride, strict=True))
    if len(grid) == 2:
        return {"position_embedding": grid}
    return {"temporal_position_embedding": grid[:1], "spatial_position_embedding": grid[1:]}


class Hiera(nn.Module):
    """Classify images or videos, or give their feature pyramid, by plain blocks within mask units and later everywhere.

    `HieraEmbed`, then stages of `HieraBlock`s; each stage from the second on begins with a block that pools 2 x 2
    queries into one and doubles the width. A mask unit always covers the same part of the image, so that it has a
    quarter of the tokens at the next stage. The last map is averaged, normed and mapped to logits. Whole mask units may
    be left out (`kept`), which saves their cost: for pretraining as a masked autoencoder.

    Symmetry:
      None exactly: the tables of positions are learned. In the first `local_stages` stages a token depends on no token
      outside its mask unit.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the normed average.
      image_size: size of the images, an int or (height, width), or (frames, height, width) for videos; see `resize`
        for another.
      patch_size: size of a patch, an int or one entry for each axis.
      patch_stride: distance of two patches, likewise.
      embed_dim: width C of the first stage; stage s has C 2^s.
      depths: number of blocks of each stage; any number of stages.
      num_heads: number of heads of the first stage; doubles with each.
      mask_unit_size: size of a mask unit in tokens of the first stage, an int or one entry for each axis; what is
        pooled within units must divide it.
      local_stages: how many of the first stages attend within mask units; the others attend everywhere.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
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
      Linear in pixels in the first stages, then quadratic in tokens of 16 x 16 pixels. Hiera-T at 224 x 224: 4.9 G
      multiply-accumulates, 27.9 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import Hiera
      >>> model = Hiera(num_classes=10, image_size=(64, 96), embed_dim=8, depths=(1, 1, 2), num_heads=1)
      >>> images = jnp.ones((1, 64, 96, 3))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> levels = jax.eval_shape(nn.apply(Hiera.features, model), variables, images)
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels][-1]
      ((1, 10), ((1, 4, 6, 32), (16, 16)))

    Source:
      Ryali et al., Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles, ICML 2023;
      github.com/facebookresearch/hiera.

    Differs:
      As `MaskUnitAttention` and `HieraEmbed`: images need not be multiples of a mask unit (32 pixels), except to leave
      units out. Which units stay is said by their indices, so that their number is static. Biases start at 0, not at
      0.02, the head not at a thousandth of its scale, and deep kernels not lowered by their depth. No decoder of the
      masked autoencoder, and not the windowed absolute positions of a later paper.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 7
    patch_stride: int | tuple[int, ...] = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 3, 16, 3)
    num_heads: int = 1
    mask_unit_size: int | tuple[int, ...] = 8
    local_stages: int = 2
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
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} must have one positive entry a stage; set depths")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        if not 0 <= self.local_stages <= len(self.depths):
            raise ValueError(
                f"local_stages={self.local_stages} must lie in [0, {len(self.depths)}], the number of stages; set "
                "local_stages"
            )
        pooled = min(self.local_stages, len(self.depths) - 1)
        self._check_unit(pooled)
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = HieraEmbed(
            self.embed_dim,
            image_size=self.image_size,
            patch_size=self.patch_size,
            patch_stride=self.patch_stride,
            bias_init=self.bias_init,
            **dtypes,
        )
        units = [self._unit(stage) if stage < self.local_stages else None for stage in range(len(self.depths))]
        self.stages = [
            HieraStage(
                self.embed_dim * 2**stage,
                num_heads=self.num_heads * 2**stage,
                drop_path_rates=rates[sum(self.depths[:stage]) :][:depth],
                unit_size=units[stage],
                # Queries are pooled within the units of the stage before.
                first_unit_size=units[max(stage - 1, 0)],
                q_stride=self._pooling if stage else (1,) * len(self._pooling),
                mlp_ratio=self.mlp_ratio,
                remat=self.remat,
                norm=self.norm,
                **dtypes,
                **init,
            )
            for stage, depth in enumerate(self.depths)
        ]
        self.final_norm = self.norm(**dtypes)
        self.head = nn.Dense(self.num_classes, **dtypes, **init) if self.num_classes else None

    @property
    def _pooling(self) -> tuple[int, ...]:
        """The stride of pooled queries: 2 in space; frames stay apart."""
        return (1,) * (len(_image(self.image_size)) - 2) + (2, 2)

    def _unit(self, stage: int) -> tuple[int, ...]:
        """Return the size of a mask unit at a stage."""
        unit = _per_axis("mask_unit_size", self.mask_unit_size, len(self._pooling))
        return tuple(length // step**stage for length, step in zip(unit, self._pooling, strict=True))

    def _check_unit(self, poolings: int) -> None:
        unit = self._unit(0)
        if any(length % step**poolings for length, step in zip(unit, self._pooling, strict=True)):
            raise ValueError(
                f"mask_unit_size={unit} must be divisible by what is pooled within a unit, 2 x 2 tokens {poolings} "
                "times; set mask_unit_size or local_stages"
            )

    def __call__(
        self,
        x: Float[Array, "*axes channels"],
        kept: Int[Array, "*batch kept"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images or videos of `image_size`, channels last, scaled as the weights want them.
          kept: indices of the mask units to look at, in row-major order, each at most once, as `random_units` draws
            them; the others are left out, and nothing depends on their pixels. `None` keeps all.
          deterministic: no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the normed average.

        Raises:
          ValueError: if `x` is not of `image_size` or not of floating point, `kept` does not fit it, or a field does
            not fit.
        """
        x = self._maps(x, kept, deterministic)[-1]
        x = self.final_norm(jnp.mean(x, axis=tuple(range(-1 - len(self._pooling), -1))))
        return x if self.head is None else self.head(x)

    def features(self, x: Float[Array, "*axes channels"], *, deterministic: bool = True) -> tuple[Level, ...]:
        """Return the map after each stage, finest first, without norms.

        Args:
          x: images or videos of `image_size`, channels last.
          deterministic: no dropped branches.

        Returns:
          One level a stage, of stride `patch_stride * 2**stage`; frames keep the stride of the patches.
        """
        first = _per_axis("patch_stride", self.patch_stride, len(self._pooling))
        return tuple(
            Level(array, tuple(length * step**stage for length, step in zip(first, self._pooling, strict=True)))
            for stage, array in enumerate(self._maps(x, None, deterministic))
        )

    def units(
        self, x: Float[Array, "*axes channels"], kept: Int[Array, "*batch kept"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "*shape features"], ...]:
        """Return the kept mask units after each stage, finest first, without norms: what a decoder starts from.

        Args:
          x: images or videos of `image_size`, channels last.
          kept: indices of the mask units to look at, see `__call__`.
          deterministic: no dropped branches.

        Returns:
          For each stage `[*batch, kept, *unit, features]`.
        """
        return tuple(
            array.reshape(*kept.shape, *self._unit(stage), array.shape[-1])
            for stage, array in enumerate(self._maps(x, kept, deterministic))
        )

    def _maps(self, x: Array, kept: Array | None, deterministic: bool) -> list[Array]:
        """Return the map after each stage; what is kept of it lies one unit below the other."""
        if kept is not None:
            x = self._hide(x, kept)
        x = self.patch_embed(x)
        if kept is not None:
            unit = self._unit(0)
            blocks = to_blocks(x, unit)
            chosen = jnp.take_along_axis(
                blocks.reshape(*kept.shape[:-1], -1, math.prod(unit) * x.shape[-1]), kept[..., None], axis=-2
            )
            # Units below one another make a map in which units, pooling and attention everywhere mean what they did.
            shape = (kept.shape[-1] * unit[0], *unit[1:], x.shape[-1])
            x = axes.constrain_map(chosen.reshape(*kept.shape[:-1], *shape), len(unit))
        maps = []
        for stage in self.stages:
            x = stage(x, deterministic=deterministic)
            maps.append(x)
        return maps

    def _hide(self, x: Array, kept: Array) -> Array:
        """Return `x` with zeros under the units that are not kept: patches of kept ones look across their border."""
        self._check_unit(len(self.depths) - 1)
        size, pixels = _image(self.image_size), self._unit_pixels
        batch, _, _ = split_shape(x.shape, len(size))
        if any(length % step for length, step in zip(size, pixels, strict=True)):
            raise ValueError(
                f"image_size={size} must be a multiple of a mask unit's {pixels} pixels to leave units out; set "
                "image_size or mask_unit_size"
            )
        if not jnp.issubdtype(kept.dtype, jnp.integer) or kept.shape[:-1] != batch or not kept.size:
            raise ValueError(
                f"kept must be indices of mask units, of shape {(*batch, 'kept')}; it is {kept.dtype} of shape "
                f"{kept.shape}; make it with random_units"
            )
        grid = [length // step for length, step in zip(size, pixels, strict=True)]
        visible = jnp.any(kept[..., None] == jnp.arange(math.prod(grid)), axis=-2).reshape(*batch, *grid)
        for axis, step in enumerate(pixels):
            visible = jnp.repeat(visible, step, axis=len(batch) + axis)
        return jnp.where(visible[..., None], x, jnp.zeros((), x.dtype))

    @property
    def _unit_pixels(self) -> tuple[int, ...]:
        stride = _per_axis("patch_stride", self.patch_stride, len(self._pooling))
        return tuple(length * step for length, step in zip(self._unit(0), stride, strict=True))


def random_units(
    rng: PRNGKey, batch: Sequence[int], model: Hiera, *, mask_ratio: float = 0.6
) -> Int[Array, "*batch kept"]:
    """Return which mask units of `model` stay when `mask_ratio` of them are left out at random.

    Args:
      rng: the key.
      batch: leading axes; every entry gets a draw of its own.
      model: the model they are for.
      mask_ratio: share of the units that is left out, in [0, 1).

    Returns:
      Ascending indices, `int(units (1 - mask_ratio))` of them.

    Raises:
      ValueError: if the ratio leaves no unit.

    Example:
      >>> import jax
      >>> from jaxlayers.window.hiera import Hiera, random_units
      >>> random_units(jax.random.key(0), (2,), Hiera(image_size=224)).shape  # 7 x 7 units of 32 x 32 pixels
      (2, 19)
    """
    count = math.prod(-(-a // b) for a, b in zip(_image(model.image_size), model._unit_pixels, strict=True))
    # Rounded first: 0.9 of 10 units are 9.000000000000002 in binary.
    keep = int(round(count * (1 - mask_ratio), 6))
    if not 0 < keep <= count:
        raise ValueError(f"mask_ratio={mask_ratio} must leave some of the {count} mask units; set mask_ratio")
    order = jnp.argsort(jax.random.uniform(rng, (*batch, count)), axis=-1)
    return jnp.sort(order[..., :keep], axis=-1)


def _image(image_size: int | tuple[int, ...]) -> tuple[int, ...]:
    size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(
            f"image_size={image_size} must be a positive int, (height, width) or (frames, height, width); set it"
        )
    return size


def _per_axis(field: str, value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    entries = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(entries) != rank or min(entries) < 1:
        raise ValueError(f"{field}={value} must be a positive int or {rank} of them, one for each axis; set {field}")
    return entries


def _unit_and_stride(
    unit_size: int | tuple[int, ...] | None, q_stride: int | tuple[int, ...]
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Return both with one entry for each spatial axis."""
    rank = next((len(one) for one in (unit_size, q_stride) if isinstance(one, tuple)), 2)
    if rank not in axes.SPACE:
        raise ValueError(f"unit_size={unit_size} and q_stride={q_stride} must name 1 to 3 axes; set both")
    stride = _per_axis("q_stride", q_stride, rank)
    if unit_size is None:
        return None, stride
    unit = _per_axis("unit_size", unit_size, rank)
    if any(length % step for length, step in zip(unit, stride, strict=True)):
        raise ValueError(f"unit_size={unit} must be divisible by q_stride={stride}; set unit_size or q_stride")
    return unit, stride


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: Hiera) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


def resize(params: Params, from_model: Hiera, to_model: Hiera) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image size of `to_model`.

    The tables of positions are resampled bicubically with antialiasing; all else stays.

    Args:
      params: parameters of `from_model`.
      from_model: the model that the parameters are of.
      to_model: the model that they are wanted for.

    Returns:
      Parameters of `to_model`.

    Raises:
      ValueError: if the models differ in a field that no resampling bridges.
    """
    for field in ("num_classes", "patch_size", "patch_stride", "embed_dim", "depths", "mlp_ratio"):
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    return {
        **params,
        "patch_embed": resize_positions(
            params["patch_embed"], from_model.image_size, to_model.image_size, from_model.patch_stride
        ),
    }


def resize_positions(
    params: Params,
    image_size: int | tuple[int, ...],
    new_image_size: int | tuple[int, ...],
    patch_stride: int | tuple[int, ...] = 4,
) -> dict[str, Any]:
    """Return the parameters of a `HieraEmbed` with its tables of positions resampled for another image size.

    Args:
      params: its parameters.
      image_size: the image size they are for.
      new_image_size: the image size wanted, with as many axes.
      patch_stride: its distance of two patches.

    Returns:
      A new tree that shares the other leaves.

    Raises:
      ValueError: if one is for images and the other for videos.
    """
    size, new_size = _image(image_size), _image(new_image_size)
    if len(size) != len(new_size):
        raise ValueError(f"image_size={new_size} must have as many axes as the parameters' image_size={size}; set it")
    stride = _per_axis("patch_stride", patch_stride, len(size))
    new_grids = position_tables(new_size, stride)
    fitted = dict(params)
    for name, grid in position_tables(size, stride).items():
        if grid != new_grids[name]:
            table = jnp.asarray(params[name]).reshape(*grid, -1)
            fitted[name] = resample(table, new_grids[name], antialias=True).reshape(-1, table.shape[-1])
    return fitted


# Reference checkpoints ------------------------------------------------------------------------------------------------


def _names(block: str, **others: str) -> dict[str, str]:
    return {
        "patch_embed/projection": "patch_embed.proj",
        "patch_embed/position_embedding": "pos_embed",
        "patch_embed/temporal_position_embedding": "pos_embed_temporal",
        "patch_embed/spatial_position_embedding": "pos_embed_spatial",
        "stages/blocks/norm1": f"{block}.norm1",
        "stages/blocks/norm2": f"{block}.norm2",
        "stages/blocks/skip": f"{block}.proj",
        "stages/blocks/attention/query": f"{block}.attn.query",
        "stages/blocks/attention/key": f"{block}.attn.key",
        "stages/blocks/attention/value": f"{block}.attn.value",
        "stages/blocks/attention/out": f"{block}.attn.proj",
        "stages/blocks/feed_forward/up": f"{block}.mlp.fc1",
        "stages/blocks/feed_forward/down": f"{block}.mlp.fc2",
        **others,
    }


_LAYER = "hiera.encoder.stages.{stage}.layers.{block}"
# See `jaxlayers.core.reference`; the fused `qkv` is first cut in three, and the blocks that timm and the official code
# number through get a stage: `blocks.3` may be `blocks.2.0`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "timm": _names("blocks.{stage}.{block}", final_norm="head.norm", head="head.fc"),
    "official": _names("blocks.{stage}.{block}", final_norm="norm", head="head.projection"),
    "huggingface": {
        **_names(_LAYER, final_norm="hiera.pooler.layernorm", head="classifier"),
        "patch_embed/projection": "hiera.embeddings.patch_embeddings.projection",
        "patch_embed/position_embedding": "hiera.embeddings.position_embeddings",
        "stages/blocks/norm1": f"{_LAYER}.layernorm_before",
        "stages/blocks/norm2": f"{_LAYER}.layernorm_after",
    },
}


def from_reference(tensors: Mapping[str, Any], model: nn.Module, *, source: str) -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the `Hiera` they are for, or another model of its parts under the same names (`TurboViT`); of another
        `image_size`, `resize` the result.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    table, channels = reference.choose_table(REFERENCE_NAMES, source, tensors, "patch_embed/projection/kernel")
    fields: Any = model
    image = jax.ShapeDtypeStruct((1, *_image(fields.image_size), channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))["params"]
    places = [(stage, block) for stage, depth in enumerate(fields.depths) for block in range(depth)]

    def renumber(match: re.Match[str]) -> str:
        number = int(match[1])
        return "blocks.{}.{}.".format(*places[number]) if number < len(places) else match[0]

    renamed = {}
    for name, tensor in tensors.items():
        renamed[re.sub(r"^blocks\.(\d+)\.", renumber, name)] = tensor
    return reference.read_reference(reference.split_fused(renamed), wanted, table)


def reference_inputs(model: Hiera) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *_image(model.image_size), 3), jnp.float32),)


def _layout(source: str) -> Callable[[Hiera, Mapping[str, Any]], dialects.Layout]:
    """Return the function of a source that tells its layout, with blocks numbered through."""
    staged = dialects.table_layout(
        REFERENCE_NAMES[source],
        shapes={f"{of}position_embedding": dialects.with_ones(before=1) for of in ("", "temporal_", "spatial_")},
        fused=dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
    )

    def layout(model: Hiera, variables: Mapping[str, Any]) -> dialects.Layout:
        def number(match: re.Match[str]) -> str:
            return f"blocks.{sum(model.depths[: int(match[1])]) + int(match[2])}."

        shapes = staged(model, variables)
        return {re.sub(r"^blocks\.(\d+)\.(\d+)\.", number, name): shape for name, shape in shapes.items()}

    return layout


# Name: where such files come from, marks, foreign names.
_NUMBERED = (r"^patch_embed\.proj\.weight$", r"^blocks\.0\.attn\.qkv\.", r"^blocks\.\d+\.proj\.weight$")
_MARKS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "timm": ("timm", (*_NUMBERED, r"^head\.norm\."), ()),
    "official": ("github.com/facebookresearch/hiera", (*_NUMBERED, r"^norm\.weight$"), (r"^decoder_",)),
    "huggingface": ("Hugging Face transformers", (r"^hiera\.encoder\.",), (r"^decoder\.",)),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=Hiera,
        read=dialects.from_params(from_reference, source=name),
        marks=marks,
        foreign=foreign,
        layout=_layout(name),
        head=f"{REFERENCE_NAMES[name]['head']}.weight",
        stem=f"{REFERENCE_NAMES[name]['patch_embed/projection']}.weight",
    )
    for name, (origin, marks, foreign) in _MARKS.items()
)


def _variant(embed_dim: int, num_heads: int, depths: tuple[int, ...], *, video: bool = False) -> dict[str, Any]:
    frames: dict[str, Any] = {
        "num_classes": 400,
        "image_size": (16, 224, 224),
        "patch_size": (3, 7, 7),
        "patch_stride": (2, 4, 4),
        "mask_unit_size": (1, 8, 8),
    }
    shape = (1, *frames["image_size"], 3) if video else (1, 224, 224, 3)
    return {
        "module": Hiera,
        "inputs": (jax.ShapeDtypeStruct(shape, jnp.float32),),
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "depths": depths,
        **(frames if video else {}),
    }


_SHAPES = {
    "tiny": (96, 1, (1, 2, 7, 2)),
    "small": (96, 1, (1, 2, 11, 2)),
    "base": (96, 1, (2, 3, 16, 3)),
    "base_plus": (112, 2, (2, 3, 16, 3)),
    "large": (144, 2, (2, 6, 36, 4)),
    "huge": (256, 4, (2, 6, 36, 4)),
}
# The last four are for videos of 16 frames and the 400 classes of Kinetics.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"hiera_{name}": _variant(*shape) for name, shape in _SHAPES.items()},
    **{f"hiera_{name}_16x224": _variant(*_SHAPES[name], video=True) for name in ("base", "base_plus", "large", "huge")},
}


def _from_huggingface(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    labels, attention = config.get("id2label"), config.get("masked_unit_attention", (True, True, False, False))
    local = sum(bool(one) for one in attention)
    if not all(attention[:local]):
        raise ValueError(f"config.json has masked_unit_attention={attention}, which must begin with all that are true")
    return "hiera_base", {
        "num_classes": len(labels) if labels is not None else int(config.get("num_labels", 2)),
        "image_size": tuple(config.get("image_size", (224, 224))),
        "patch_size": tuple(config.get("patch_size", (7, 7))),
        "patch_stride": tuple(config.get("patch_stride", (4, 4))),
        "embed_dim": config.get("embed_dim", 96),
        "depths": tuple(config.get("depths", (2, 3, 16, 3))),
        "num_heads": config.get("num_heads", (1, 2, 4, 8))[0],
        "mask_unit_size": tuple(config.get("masked_unit_size", (8, 8))),
        "local_stages": local,
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "drop_path_rate": config.get("drop_path_rate", 0.0),
    }


HUGGINGFACE = {"hiera": _from_huggingface}
