"""Convolutional vision Transformer: a pyramid whose tokens and attention projections come from convolutions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, Params
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.ops.depthwise import as_general_conv
from jaxlayers.ops.patches import pad_to_multiple, split_shape

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)


def quick_gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Return x sigmoid(1.702 x), the approximation of GELU that the published weights are trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


class ConvTokenEmbed(nn.Module):
    """Embed overlapping patches: a strided convolution, then a norm of each token.

    out = norm(W * x + b), with x `[*batch, height, width, channels]`, W `[k, k, channels, features]` and * the
    convolution of stride s. A map whose size is not a multiple of s is first padded with zeros at its ends; then
    floor((k - s + 1) / 2) entries are added on each side, so that the output has size / s entries.

    Symmetry:
      With `circular=True` exactly equivariant to cyclic translations by s, if the map is a multiple of s; with zeros
      beyond the border only away from it.

    Attributes:
      features: width of a token.
      kernel_size: side k of a patch.
      stride: distance s of two patches.
      circular: continue the map by itself beyond its border, in place of zeros.
      norm: makes the norm of the tokens, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W.
      bias_init: initialiser of b.

    Cost:
      k^2 channels features / s^2 multiply-accumulates an entry of the input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ConvTokenEmbed
      >>> layer = ConvTokenEmbed(features=8, kernel_size=7, stride=4)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 32, 30, 3)))[0].shape
      (1, 8, 8, 8)

    Source:
      Wu et al., CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, section 3.1; github.com/microsoft/CvT.

    Differs:
      Sizes that are not multiples of the stride are rounded up, where the reference drops the last pixels of some.
    """

    features: int
    kernel_size: int = 3
    stride: int = 2
    circular: bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch new_height new_width features"]:
        """Embed the patches.

        Args:
          x: map, channels last.

        Returns:
          One token for each stride, size `ceil(size / stride)`.

        Raises:
          ValueError: if `x` has too few axes or is not of floating point, or a field is not positive.
        """
        if self.features < 1:
            raise ValueError(f"features={self.features} must be positive; set features")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        x = nn.Conv(
            self.features,
            (self.kernel_size,) * 2,
            strides=self.stride,
            padding="VALID",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="projection",
        )(_surround(x, self.kernel_size, self.stride, circular=self.circular))
        x = self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name="post_norm")(x)
        return axes.constrain_map(x)


class ConvProjection(nn.Module):
    """Mix each feature with its neighbours in space: a depthwise convolution, then a batch norm.

    out[c] = (w_c * x[c] - mean[c]) / sqrt(var[c] + epsilon) gamma[c] + beta[c] for each feature c, with
    x `[*batch, height, width, features]` and w_c `[k, k]`; mean and var are those of the batch while training, else
    running ones. The border is treated as in `ConvTokenEmbed`.

    Symmetry:
      With `circular=True` exactly equivariant to cyclic translations by the stride, if the map is a multiple of it.

    Attributes:
      kernel_size: side k of the neighbourhood.
      stride: stride of the convolution; 2 leaves a quarter of the tokens.
      circular: continue the map by itself beyond its border, in place of zeros.
      dtype: compute dtype; `None` infers it from input and parameters. Statistics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of w.

    Collections:
      `batch_stats` with the running mean and var (decay 0.9), which `deterministic=False` updates.

    Cost:
      k^2 multiply-accumulates an entry of the output.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ConvProjection
      >>> layer = ConvProjection(stride=2)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 7, 6, 8)))[0].shape
      (1, 4, 3, 8)

    Source:
      Wu et al., CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, section 3.2; github.com/microsoft/CvT.

    Differs:
      The pointwise half of the separable convolution is the linear layer of `ConvAttention`, which the class token
      passes as well. The running var averages the biased variance of the batches, as Flax does; PyTorch the unbiased.
    """

    kernel_size: int = 3
    stride: int = 1
    circular: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch new_height new_width features"]:
        """Apply convolution and norm.

        Args:
          x: map, channels last.
          deterministic: norm by the running statistics, not by those of the batch.

        Returns:
          A map of size `ceil(size / stride)`.

        Raises:
          ValueError: if `x` has too few axes or a field is not positive.
        """
        features = x.shape[-1]
        x = nn.Conv(
            features,
            (self.kernel_size,) * 2,
            strides=self.stride,
            padding="VALID",
            feature_group_count=features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            conv_general_dilated=as_general_conv,
            name="convolution",
        )(_surround(x, self.kernel_size, self.stride, circular=self.circular))
        return nn.BatchNorm(
            use_running_average=deterministic,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="norm",
        )(x)


class ConvAttention(nn.Module):
    """Attend over all tokens of a map, with queries, keys and values made by convolutions.

    out = softmax(Q K^T / sqrt(C)) V W_out for each head, with Q = [c, P_q(x)] W_q + b_q of all tokens and
    K = [c, P_k(x)] W_k + b_k, V likewise of the tokens that the stride leaves; P are `ConvProjection`s, C is the width,
    and c the class token, if there is one, which no convolution sees.

    Symmetry:
      With `circular=True` exactly equivariant to cyclic translations of the map by `kv_stride`, if it is a multiple of
      it; the class token is invariant.

    Attributes:
      num_heads: number of heads; must divide the features.
      kernel_size: side of the neighbourhood that a projection sees; 1 with `kv_stride=1` is plain attention.
      kv_stride: stride of the projections of keys and values; that of queries is 1.
      circular: continue the map by itself beyond its border, in place of zeros.
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels; those of the convolutions have variance 1 / fan-in.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats`, see `ConvProjection`. The weights are sown as `attention_weights` in `intermediates`.

    Cost:
      n tokens with m = n / kv_stride^2 keys: 2 (n + m) C^2 + 2 n m C + k^2 (n + 2 m) C multiply-accumulates.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ConvAttention
      >>> layer = ConvAttention(num_heads=2)
      >>> run = lambda x: layer.init_with_output(jax.random.key(0), x, size=(4, 6))
      >>> jax.eval_shape(run, jnp.ones((1, 25, 8)))[0].shape
      (1, 25, 8)

    Source:
      Wu et al., CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, equation 2; github.com/microsoft/CvT.

    Differs:
      none. The logits are divided by the root of the whole width, not of a head's, as in the reference code and
      weights (the paper states neither).
    """

    num_heads: int
    kernel_size: int = 3
    kv_stride: int = 2
    circular: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch tokens features"], *, size: tuple[int, int], deterministic: bool = True
    ) -> Float[Array, "*batch tokens features"]:
        """Attend.

        Args:
          x: tokens of the map in row-major order, after the class token if there is one.
          size: height and width of the map.
          deterministic: norm by the running statistics.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if the heads do not divide the features, or the tokens do not fill the map.
        """
        features = x.shape[-1]
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        tokens = size[0] * size[1]
        if x.ndim < 2 or x.shape[-2] not in (tokens, tokens + 1):
            raise ValueError(
                f"input must have the {tokens} tokens of size={tuple(size)}, or one more; got shape {x.shape}; set size"
            )
        first, rest = _split_token(x, tokens)
        grid = rest.reshape(*x.shape[:-2], *size, features)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, features, kernel_init=self.kernel_init, bias_init=self.bias_init, **dtypes)

        def project(name: str, stride: int) -> Array:
            local = ConvProjection(
                self.kernel_size, stride=stride, circular=self.circular, name=f"{name}_projection", **dtypes
            )(grid, deterministic=deterministic)
            local = local.reshape(*x.shape[:-2], -1, features)
            joined = local if first is None else jnp.concatenate([first.astype(local.dtype), local], axis=-2)
            return axes.constrain_heads(split_heads(dense(name=name)(joined), self.num_heads))

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            weights = attention_weights(jnp.matmul(query * features**-0.5, jnp.swapaxes(key, -1, -2)))
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights, value)

        query, key, value = project("query", 1), project("key", self.kv_stride), project("value", self.kv_stride)
        return dense(name="out")(merge_heads(axes.constrain_heads(remat.attention(attend, self, query, key, value))))


class CvtBlock(nn.Module):
    """Mix the tokens of a map by convolutional attention, then each token alone.

    z = x + drop(ConvAttention(norm(x))), out = z + drop(MLP(norm(z))).

    Symmetry:
      As `ConvAttention`.

    Attributes:
      num_heads: number of heads; must divide the features.
      kernel_size: side of the neighbourhood that a projection sees.
      kv_stride: stride of the projections of keys and values.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      circular: continue the map by itself beyond its border, in place of zeros.
      activation_fn: the MLP's nonlinearity.
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats`, see `ConvProjection`; the RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of `ConvAttention` and 2 mlp_ratio C^2 multiply-accumulates a token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import CvtBlock
      >>> block = CvtBlock(num_heads=2)
      >>> run = lambda x: block.init_with_output(jax.random.key(0), x, size=(4, 6))
      >>> jax.eval_shape(run, jnp.ones((1, 24, 8)))[0].shape
      (1, 24, 8)

    Source:
      Wu et al., CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, figure 2; github.com/microsoft/CvT.

    Differs:
      none.
    """

    num_heads: int
    kernel_size: int = 3
    kv_stride: int = 2
    mlp_ratio: float = 4.0
    circular: bool = False
    activation_fn: ActivationFn = quick_gelu
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch tokens features"], *, size: tuple[int, int], deterministic: bool = True
    ) -> Float[Array, "*batch tokens features"]:
        """Apply the block.

        Args:
          x: tokens of the map in row-major order, after the class token if there is one.
          size: height and width of the map.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: as `ConvAttention`, or if `mlp_ratio` leaves no hidden features.
        """
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop_path = DropPath(self.drop_path_rate, batch_ndim=x.ndim - 2)
        y = ConvAttention(
            self.num_heads,
            kernel_size=self.kernel_size,
            kv_stride=self.kv_stride,
            circular=self.circular,
            name="attention",
            **common,
        )(norm(name="norm1")(x), size=size, deterministic=deterministic)
        x = axes.constrain_tokens(x + drop_path(y, deterministic=deterministic))
        y = FeedForward(
            int(x.shape[-1] * self.mlp_ratio), activation_fn=self.activation_fn, name="feed_forward", **common
        )(norm(name="norm2")(x), deterministic=deterministic)
        return axes.constrain_tokens(x + drop_path(y, deterministic=deterministic))


class Cvt(nn.Module):
    """Classify images, or give their feature pyramid, by attention over convolutional tokens, without positions.

    Stage s is a `ConvTokenEmbed` and `depths[s]` blocks; in the last stage a class token joins, and its norm is mapped
    to logits. Nothing in it says where a token is but the zeros beyond the border.

    Symmetry:
      With `circular=True` the last stage's map is exactly equivariant to cyclic translations by the product of the
      strides times `kv_stride`, and the logits are invariant, for images that are multiples of it; with zeros beyond
      the border only about so. The map of an earlier stage is so to the translations of its own strides.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the normed class token.
      patch_size: side of the patches that each stage embeds.
      strides: their distance, one a stage.
      embed_dim: width of each stage.
      depths: number of blocks of each stage.
      num_heads: number of heads of each stage.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      kv_stride: stride of the projections of keys and values.
      circular: continue maps by themselves beyond their border, in place of zeros.
      activation_fn: the MLPs' nonlinearity.
      drop_path_rate: probability of dropping a residual branch of the last block of each stage; grows linearly from 0
        at the stage's first.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels; those of the convolutions have variance 1 / fan-in.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats`, see `ConvProjection`; the RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      Quadratic in the number of tokens of each stage, divided by `kv_stride`^2. CvT-13 at 224 x 224: 4.6 G
      multiply-accumulates, 20.0 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import Cvt
      >>> model = Cvt(num_classes=10, embed_dim=(8, 16, 16), depths=(1, 1, 2), num_heads=(1, 2, 2))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(Cvt.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels][-1]
      ((1, 10), ((1, 4, 4, 16), (16, 16)))

    Source:
      Wu et al., CvT: Introducing Convolutions to Vision Transformers, ICCV 2021; github.com/microsoft/CvT.

    Differs:
      As `ConvTokenEmbed` and `ConvProjection`. Transformers' Cvt uses the exact GELU, where the official code and
      weights have the quick one, and gives all blocks of a stage one drop rate.
    """

    num_classes: int = 1000
    patch_size: tuple[int, ...] = (7, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2)
    embed_dim: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    num_heads: tuple[int, ...] = (1, 3, 6)
    mlp_ratio: float = 4.0
    kv_stride: int = 2
    circular: bool = False
    activation_fn: ActivationFn = quick_gelu
    drop_path_rate: tuple[float, ...] = (0.0, 0.0, 0.1)
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        by_stage = {
            field: getattr(self, field)
            for field in ("patch_size", "strides", "embed_dim", "depths", "num_heads", "drop_path_rate")
        }
        if len({len(entries) for entries in by_stage.values()}) != 1 or not self.depths or min(self.depths) < 1:
            raise ValueError(f"{by_stage} must have one entry a stage, and positive depths; set them")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        stages = []
        for stage, depth in enumerate(self.depths):
            embed = functools.partial(
                ConvTokenEmbed,
                self.embed_dim[stage],
                kernel_size=self.patch_size[stage],
                stride=self.strides[stage],
                circular=self.circular,
                norm=self.norm,
                bias_init=self.bias_init,
                **dtypes,
            )
            block = functools.partial(
                CvtBlock,
                self.num_heads[stage],
                kv_stride=self.kv_stride,
                mlp_ratio=self.mlp_ratio,
                circular=self.circular,
                activation_fn=self.activation_fn,
                norm=self.norm,
                **dtypes,
                **init,
            )
            stages.append(
                _Stage(
                    embed=embed,
                    block=block,
                    rates=drop_path_rates(self.drop_path_rate[stage], depth),
                    class_token=stage == len(self.depths) - 1,
                    remat=self.remat,
                    param_dtype=self.param_dtype,
                )
            )
        self.stages = stages
        self.final_norm = self.norm(**dtypes)
        self.head = nn.Dense(self.num_classes, **dtypes, **init) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images of any size, channels last, scaled as the weights want them.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the normed class token.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        token = None
        for stage in self.stages:
            x, token = stage(x, deterministic=deterministic)
        x = self.final_norm(token)[..., 0, :]
        return x if self.head is None else self.head(x)

    def features(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map after each stage, finest first, without the class token and without norms.

        Args:
          x: images of any size, channels last.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          One level a stage, whose stride is the product of the strides up to it.
        """
        levels = []
        stride = 1
        for stage, step in zip(self.stages, self.strides, strict=True):
            x, _ = stage(x, deterministic=deterministic)
            stride *= step
            levels.append(Level(x, (stride, stride)))
        return tuple(levels)


class _Stage(nn.Module):
    """An embedding and a chain of blocks, with or without a class token.

    Attributes:
      embed: makes the embedding.
      block: makes a block.
      rates: drop-path rate of each block.
      class_token: put a class token before the others.
      remat: what of each block is recomputed in the backward pass.
      param_dtype: dtype of the class token.
    """

    embed: Callable[..., nn.Module]
    block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    class_token: bool
    remat: str | bool
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> tuple[Array, Array | None]:
        grid = self.embed(name="embed")(x)
        *batch, height, width, features = grid.shape
        x = grid.reshape(*batch, height * width, features)
        if self.class_token:
            token = self.param("class_token", truncated_normal(), (features,), self.param_dtype)
            x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (*batch, 1, features)), x], axis=-2)

        def call(block: nn.Module, x: Array) -> Array:
            return block(x, size=(height, width), deterministic=deterministic)

        for index, rate in enumerate(self.rates):
            block = self.block(drop_path_rate=rate, name=f"blocks_{index}")
            x = remat.remat_block(call, self.remat)(block, x)
        first, x = _split_token(x, height * width)
        return axes.constrain_map(x.reshape(grid.shape)), first


def _split_token(x: Array, tokens: int) -> tuple[Array | None, Array]:
    """Return the class token, if there is one before the tokens of the map, and these."""
    return (x[..., :1, :], x[..., 1:, :]) if x.shape[-2] > tokens else (None, x)


def _surround(x: Array, kernel: int, stride: int, *, circular: bool) -> Array:
    """Pad a map so that a convolution without padding has `ceil(size / stride)` outputs, centred."""
    if kernel < 1 or stride < 1:
        raise ValueError(f"kernel_size={kernel} and stride={stride} must be positive; set them")
    x = pad_to_multiple(x, (stride, stride))
    batch, _, _ = split_shape(x.shape, 2)
    # As much as torch's symmetric padding, less what its last step would not reach.
    before = max(0, (kernel - stride + 1) // 2)
    after = max(0, kernel - stride - before)
    ends = [(0, 0)] * len(batch) + [(before, after)] * 2 + [(0, 0)]
    return jnp.pad(x, ends, mode="wrap") if circular else jnp.pad(x, ends)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: Cvt) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


# Reference checkpoints ------------------------------------------------------------------------------------------------

_STAGE = "cvt.encoder.stages.{stage}"
_LAYER = f"{_STAGE}.layers.{{block}}"


def _projections(linear: str, local: str, convolution: str, norm: str) -> dict[str, str]:
    """Return the names of the three projections and of their statistics; {name} and {initial} say which."""
    table = {}
    for name in ("query", "key", "value"):
        ours = f"stages/blocks/attention/{name}"
        mine, theirs = (text.replace("{name}", name).replace("{initial}", name[0]) for text in (linear, local))
        table[ours] = mine
        table[f"{ours}_projection/convolution"] = f"{theirs}.{convolution}"
        table[f"{ours}_projection/norm"] = f"{theirs}.{norm}"
        table[f"{ours}_projection/norm/mean"] = f"{theirs}.{norm}.running_mean"
        table[f"{ours}_projection/norm/var"] = f"{theirs}.{norm}.running_var"
    return table


_HUGGINGFACE = {
    "stages/embed/projection": f"{_STAGE}.embedding.convolution_embeddings.projection",
    "stages/embed/post_norm": f"{_STAGE}.embedding.convolution_embeddings.normalization",
    "stages/class_token": f"{_STAGE}.cls_token",
    "stages/blocks/norm1": f"{_LAYER}.layernorm_before",
    "stages/blocks/norm2": f"{_LAYER}.layernorm_after",
    **_projections(
        f"{_LAYER}.attention.attention.projection_{{name}}",
        f"{_LAYER}.attention.attention.convolution_projection_{{name}}.convolution_projection",
        "convolution",
        "normalization",
    ),
    "stages/blocks/attention/out": f"{_LAYER}.attention.output.dense",
    "stages/blocks/feed_forward/up": f"{_LAYER}.intermediate.dense",
    "stages/blocks/feed_forward/down": f"{_LAYER}.output.dense",
    "final_norm": "layernorm",
    "head": "classifier",
}
_BLOCK = "stage{stage}.blocks.{block}"
_OFFICIAL = {
    "stages/embed/projection": "stage{stage}.patch_embed.proj",
    "stages/embed/post_norm": "stage{stage}.patch_embed.norm",
    "stages/class_token": "stage{stage}.cls_token",
    "stages/blocks/norm1": f"{_BLOCK}.norm1",
    "stages/blocks/norm2": f"{_BLOCK}.norm2",
    **_projections(f"{_BLOCK}.attn.proj_{{initial}}", f"{_BLOCK}.attn.conv_proj_{{initial}}", "conv", "bn"),
    "stages/blocks/attention/out": f"{_BLOCK}.attn.proj",
    "stages/blocks/feed_forward/up": f"{_BLOCK}.mlp.fc1",
    "stages/blocks/feed_forward/down": f"{_BLOCK}.mlp.fc2",
    "final_norm": "norm",
    "head": "head",
}
# See `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {"huggingface": _HUGGINGFACE, "official": _OFFICIAL}


def from_reference(tensors: Mapping[str, Any], model: Cvt, *, source: str) -> dict[str, Any]:
    """Return variables of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for.
      source: a key of `REFERENCE_NAMES`. The published weights of both want `quick_gelu`, which transformers does not
        apply.

    Returns:
      The collections `params` and `batch_stats`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    table, channels = reference.choose_table(REFERENCE_NAMES, source, tensors, "stages_0/embed/projection/kernel")
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))
    return reference.read_variables(tensors, wanted, table)


def reference_inputs(model: Cvt) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)


# Name: where such files come from, marks.
_MARKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "huggingface": ("Hugging Face transformers", (r"^cvt\.encoder\.stages\.0\.embedding\.",)),
    "official": ("github.com/microsoft/CvT", (r"^stage0\.patch_embed\.proj\.weight$", r"\.conv_proj_q\.bn\.weight$")),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=Cvt,
        read=dialects.from_variables(from_reference, source=name),
        marks=marks,
        ignored=dialects.COUNTED,
        layout=dialects.table_layout(REFERENCE_NAMES[name], shapes={"class_token": dialects.with_ones(before=2)}),
        head=f"{REFERENCE_NAMES[name]['head']}.weight",
        stem=f"{REFERENCE_NAMES[name]['stages/embed/projection'].format(stage=0)}.weight",
    )
    for name, (origin, marks) in _MARKS.items()
)


def _variant(
    embed_dim: tuple[int, ...], depths: tuple[int, ...], num_heads: tuple[int, ...], drop_path_rate: float, size: int
) -> dict[str, Any]:
    return {
        "module": Cvt,
        "inputs": (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),),
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "drop_path_rate": (0.0, 0.0, drop_path_rate),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    f"cvt_{name}{suffix}": _variant(*shape, size)
    for name, shape in {
        "13": ((64, 192, 384), (1, 2, 10), (1, 3, 6), 0.1),
        "21": ((64, 192, 384), (1, 4, 16), (1, 3, 6), 0.1),
        "w24": ((192, 768, 1024), (2, 2, 20), (3, 12, 16), 0.3),
    }.items()
    for suffix, size in (("", 224), ("_384", 384))
}


def _from_huggingface(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    alike = {key: set(config.get(key, (default,))) for key, default in (("mlp_ratio", 4.0), ("stride_kv", 2))}
    if any(len(values) > 1 for values in alike.values()):
        raise ValueError(f"config.json has {alike}, which must be alike in all stages; it is another model")
    labels = config.get("id2label")
    return "cvt_13", {
        "num_classes": len(labels) if labels is not None else int(config.get("num_labels", 2)),
        "patch_size": tuple(config.get("patch_sizes", (7, 3, 3))),
        "strides": tuple(config.get("patch_stride", (4, 2, 2))),
        "embed_dim": tuple(config.get("embed_dim", (64, 192, 384))),
        "depths": tuple(config.get("depth", (1, 2, 10))),
        "num_heads": tuple(config.get("num_heads", (1, 3, 6))),
        "drop_path_rate": tuple(config.get("drop_path_rate", (0.0, 0.0, 0.1))),
        "mlp_ratio": alike["mlp_ratio"].pop(),
        "kv_stride": alike["stride_kv"].pop(),
    }


HUGGINGFACE = {"cvt": _from_huggingface}
