"""RMT: a pyramid whose attention fades with the Manhattan distance of two tokens, in full or axis by axis."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import DropPath, drop_path_rates
from jaxlayers.nn.feed_forward import exact_gelu
from jaxlayers.nn.multi_head import attention_weights
from jaxlayers.ops.depthwise import as_general_conv
from jaxlayers.ops.patches import split_shape

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-6)
batch_norm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


# Manhattan attention as pure functions ---------------------------------------------------------------------------


def log_gammas(num_heads: int, decay: tuple[float, float]) -> tuple[float, ...]:
    """Return log gamma_h = log(1 - 2^-(a + r h / H)) for each head h of H, with `decay` = (a, r).

    Args:
      num_heads: number H of heads.
      decay: a and r. Larger a + r h / H means that head h looks further.

    Returns:
      One negative number a head.

    Raises:
      ValueError: if a gamma would not be positive.
    """
    exponents = decay[0] + decay[1] * np.arange(num_heads) / num_heads
    if not np.all(exponents > 0):
        raise ValueError(f"decay={tuple(decay)} must give every head a positive a + r h / num_heads; set decay")
    return tuple(float(one) for one in np.log1p(-(2.0**-exponents)))


def manhattan_log_decay(
    size: Sequence[int], log_gamma: Sequence[float], *, dtype: Dtype = jnp.float32
) -> Float[Array, "heads tokens tokens"]:
    """Return log D_nm = log(gamma) (|x_n - x_m| + |y_n - y_m| + ...) between all tokens of a grid.

    D of a grid is the Kronecker product of those of its axes.

    Args:
      size: length of each axis of the grid; tokens are in row-major order.
      log_gamma: one number a head.
      dtype: of the result.

    Returns:
      Numbers to add to the logits of each head.
    """
    grid = jnp.meshgrid(*(jnp.arange(length) for length in size), indexing="ij")
    distance = sum(jnp.abs(jnp.subtract.outer(places.ravel(), places.ravel())) for places in grid)
    return jnp.asarray(log_gamma, dtype)[:, None, None] * jnp.asarray(distance, dtype)


def rotate_by_index(x: Float[Array, "*batch height width heads dim"]) -> Float[Array, "*batch height width heads dim"]:
    """Turn feature pair k of the token with row-major index i by the angle i / 10000^(k / (dim / 2 - 1)).

    Products of two turned tokens depend on the difference of their indices. Computed in float32 or better.

    Args:
      x: queries or keys of a map.

    Returns:
      An array like `x`.

    Raises:
      ValueError: if `dim` is odd.
    """
    *_, height, width, _, dim = x.shape
    if dim % 2:
        raise ValueError(f"features / num_heads = {dim} must be even, to be turned in pairs; set num_heads")
    # The index is row * width + column. The angle of a large index would lose its digits in float32: tables for rows
    # and for columns are exact, and joined by the addition theorem.
    frequencies = 10000.0 ** -np.linspace(0.0, 1.0, dim // 2)
    by_row = np.outer(np.arange(height) * width, frequencies)[:, None, None]
    by_column = np.outer(np.arange(width), frequencies)[:, None]
    wide = at_least_float32(x.dtype)
    row_cos, row_sin, column_cos, column_sin = (
        jnp.asarray(table, wide) for angle in (by_row, by_column) for table in (np.cos(angle), np.sin(angle))
    )
    cos = row_cos * column_cos - row_sin * column_sin
    sin = row_sin * column_cos + row_cos * column_sin
    pairs = x.astype(wide).reshape(*x.shape[:-1], dim // 2, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def decayed_attention(
    query: Float[Array, "*batch queries heads dim"],
    key: Float[Array, "*batch keys heads dim"],
    value: Float[Array, "*batch keys heads out_dim"],
    log_decay: Float[Array, "heads queries keys"],
    *,
    after_softmax: bool = False,
) -> tuple[Float[Array, "*batch queries heads out_dim"], Float[Array, "*batch heads queries keys"]]:
    """Attend with weights softmax(Q K^T + log D), or softmax(Q K^T) D.

    Args:
      query: queries, scaled.
      key: keys.
      value: values.
      log_decay: log D.
      after_softmax: multiply the softmax by D; its rows then add up to less than one.

    Returns:
      The weighted values, and the weights.
    """
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key)
    if after_softmax:
        weights = attention_weights(logits) * jnp.exp(log_decay).astype(logits.dtype)
    else:
        weights = attention_weights(logits, bias=log_decay)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value), weights


# Layers ----------------------------------------------------------------------------------------------------------


class ManhattanAttention(nn.Module):
    """Attend over a map with a weight that fades with the Manhattan distance, and add a convolution of the values.

    In full, for each head: out = (A V + LCE(V)) W_out, A = softmax(Q K^T / sqrt(d) + log D),
    D_nm = gamma^(|x_n - x_m| + |y_n - y_m|). Decomposed: A^row (within each row, log D over x alone) mixes the values
    first, then A^column (within each column, over y alone) mixes the result, with the same Q and K. Q, K, V are linear
    in x `[*batch, height, width, features]`, Q and K turned by `rotate_by_index`; LCE is a depthwise convolution; head
    h of H has gamma = 1 - 2^-(a + r h / H), which is not learned.

    Symmetry:
      None exactly. D alone is invariant under flips of the map, but the rotation of queries and keys tells directions
      apart, and the softmax ends at the border.

    Attributes:
      num_heads: number H of heads; must divide the features, into parts of even width.
      decomposed: attend along rows, then along columns, in place of all tokens at once.
      decay: (a, r) of the heads' gammas.
      decay_after_softmax: multiply the softmax by D, in place of adding log D to the logits.
      kernel_size: side of the depthwise kernel on the values; odd.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax, decay and rotation are in float32 or
        better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels; that of the convolution has variance 1 / fan-in.
      bias_init: initialiser of the biases.

    Collections:
      The weights are sown in `intermediates`, as `attention_weights`, or `row_weights` and `column_weights`.

    Cost:
      4 n C^2 + kernel_size^2 n C multiply-accumulates for n = height width tokens of width C, and 2 n^2 C in full or
      2 n (height + width) C decomposed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import ManhattanAttention
      >>> layer = ManhattanAttention(num_heads=2, decomposed=True)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 5, 6, 8)))[0].shape
      (1, 5, 6, 8)

    Source:
      Fan et al., RMT: Retentive Networks Meet Vision Transformers, CVPR 2024, section 3.2; github.com/qhfan/RMT.

    Differs:
      None from the authors' code and weights, which add log D to the logits and turn queries and keys as RetNet does.
      The paper's equations have no rotation and multiply the softmax by D (`decay_after_softmax`).
    """

    num_heads: int
    decomposed: bool = False
    decay: tuple[float, float] = (2.0, 4.0)
    decay_after_softmax: bool = False
    kernel_size: int = 5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width features"]) -> Float[Array, "*batch height width features"]:
        """Attend.

        Args:
          x: a map; more than three axes count as batch.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has fewer than three axes or a field does not fit.
        """
        batch, size, features = split_shape(x.shape, 2)
        if self.num_heads < 1 or features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        log_gamma = log_gammas(self.num_heads, self.decay)
        common = _common(self)
        dense = functools.partial(nn.Dense, features, **common)
        query, key, value = (dense(name=name)(x) for name in ("query", "key", "value"))
        local = _depthwise(value, self.kernel_size, "local_context", self)

        def split(x: Array) -> Array:
            x = x.reshape(*batch, *size, self.num_heads, features // self.num_heads)
            return axes.constrain_last(x, axes.BATCH, axes.HEIGHT, None, axes.HEADS, None)

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            def mix(name: str, lengths: Sequence[int], query: Array, key: Array, value: Array) -> Array:
                log_decay = manhattan_log_decay(lengths, log_gamma, dtype=at_least_float32(query.dtype))
                out, weights = decayed_attention(query, key, value, log_decay, after_softmax=self.decay_after_softmax)
                module.sow("intermediates", name, weights)
                return out

            height, width = size
            if not self.decomposed:
                shape = (*batch, height * width, *value.shape[-2:])
                tokens = [one.reshape(shape) for one in (query, key, value)]
                return mix("attention_weights", size, *tokens).reshape(value.shape)
            value = mix("row_weights", (width,), query, key, value)
            columns = [jnp.swapaxes(one, -4, -3) for one in (query, key, value)]
            return jnp.swapaxes(mix("column_weights", (height,), *columns), -4, -3)

        query = rotate_by_index(split(query * (features // self.num_heads) ** -0.5))
        out = remat.attention(attend, self, query, rotate_by_index(split(key)), split(value))
        return dense(name="out")(split(out).reshape(x.shape) + local)


class RMTBlock(nn.Module):
    """Add a position-dependent convolution, then Manhattan attention, then an MLP with a convolution inside.

    y = x + CPE(x), z = y + drop(s1 MaSA(norm(y))), out = z + drop(s2 FFN(norm(z))), with a 3 x 3 depthwise convolution
    CPE (the zeros beyond the border tell positions) and FFN(u) = (a + DWConv(a)) W_down + b, a = gelu(u W_up + b),
    again 3 x 3; s1 and s2 `[features]` are learned if `layer_scale` is given, else one.

    Symmetry:
      As `ManhattanAttention`.

    Attributes:
      num_heads: number of heads; must divide the features, into parts of even width.
      decomposed: attend along rows, then along columns, in place of all tokens at once.
      decay: (a, r) of the heads' gammas, see `ManhattanAttention`.
      decay_after_softmax: multiply the softmax by D, in place of adding log D to the logits.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      layer_scale: initial value of s1 and s2; `None` leaves them out.
      drop_path_rate: probability of dropping a residual branch for a sample, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels; those of the convolutions have variance 1 / fan-in.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of `ManhattanAttention` and 2 mlp_ratio C^2 + 9 (mlp_ratio + 1) C multiply-accumulates a token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import RMTBlock
      >>> block = RMTBlock(num_heads=2)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 5, 6, 8)))[0].shape
      (1, 5, 6, 8)

    Source:
      Fan et al., RMT: Retentive Networks Meet Vision Transformers, CVPR 2024, figure 3; github.com/qhfan/RMT.

    Differs:
      As `ManhattanAttention`.
    """

    num_heads: int
    decomposed: bool = False
    decay: tuple[float, float] = (2.0, 4.0)
    decay_after_softmax: bool = False
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    drop_path_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
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
          deterministic: no dropped branches.

        Returns:
          A map like `x`.

        Raises:
          ValueError: as `ManhattanAttention`, or if `mlp_ratio` leaves no hidden features.
        """
        batch, _, features = split_shape(x.shape, 2)
        hidden_features = int(features * self.mlp_ratio)
        if hidden_features < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must leave {features} features some; set mlp_ratio higher")
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        drop_path = DropPath(self.drop_path_rate, batch_ndim=len(batch))

        def branch(y: Array, name: str) -> Array:
            if self.layer_scale is not None:
                scale = self.param(name, nn.initializers.constant(self.layer_scale), (features,), self.param_dtype)
                y = (y.astype(at_least_float32(y.dtype)) * scale).astype(y.dtype)
            return drop_path(y, deterministic=deterministic)

        x = x + _depthwise(x, 3, "position", self)
        y = ManhattanAttention(
            self.num_heads,
            decomposed=self.decomposed,
            decay=self.decay,
            decay_after_softmax=self.decay_after_softmax,
            name="attention",
            **_common(self),
        )(norm(name="norm1")(x))
        x = axes.constrain_map(x + branch(y, "layer_scale1"))
        y = _FeedForward(hidden_features, name="feed_forward", **_common(self))(norm(name="norm2")(x))
        return axes.constrain_map(x + branch(y, "layer_scale2"))


class _FeedForward(nn.Module):
    """A two-layer perceptron on every token, whose hidden layer also gets a convolution of itself.

    Attributes:
      hidden_features: width of the hidden layer.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels.
      bias_init: initialiser of the biases.
    """

    hidden_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common = _common(self)
        hidden = exact_gelu(nn.Dense(self.hidden_features, name="up", **common)(x))
        hidden = axes.constrain(hidden, axes.HIDDEN)
        hidden = axes.constrain(hidden + _depthwise(hidden, 3, "depthwise", self), axes.HIDDEN)
        return nn.Dense(x.shape[-1], name="down", **common)(hidden)


class RMT(nn.Module):
    """Classify images, or give their feature pyramid, with attention that fades with the Manhattan distance.

    Four 3 x 3 convolutions with batch norms, two of them of stride 2, make the tokens. Stage s is (from the second on)
    a 3 x 3 convolution of stride 2 and a batch norm, then `depths[s]` `RMTBlock`s of width `embed_dim[s]`. Each token
    of the last map is widened to `head_features`, batch-normed and passed through x sigmoid(x); their mean is mapped to
    logits.

    Symmetry:
      None exactly, see `ManhattanAttention`.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the averaged features.
      embed_dim: width of each stage.
      depths: number of blocks of each stage.
      num_heads: number of heads of each stage.
      mlp_ratio: width of the MLPs' hidden layers of each stage, in multiples of the features.
      decomposed: for each stage, attend along rows and then along columns, in place of all tokens at once.
      decays: (a, r) of each stage, of which the gammas are made, see `ManhattanAttention`.
      decay_after_softmax: multiply the softmax by D, in place of adding log D to the logits.
      layer_scale: for each stage, initial value of what scales the blocks' branches; `None` leaves it out.
      head_features: width before the head.
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm of the blocks, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the linear kernels; those of the convolutions have variance 1 / fan-in.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats` with the running mean and var of the batch norms (decay 0.9), which `deterministic=False` updates;
      the RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      A decomposed stage grows as height width (height + width), a full one as (height width)^2. RMT-S at
      224 x 224: 4.8 G multiply-accumulates, 27.0 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import RMT
      >>> fields = dict(depths=(1, 2), num_heads=(1, 2), mlp_ratio=(2.0, 2.0), decomposed=(True, False))
      >>> model = RMT(10, (8, 16), decays=((2.0, 4.0), (2.0, 6.0)), layer_scale=(None, 1e-6), **fields)
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 30, 40, 3)))
      >>> levels = jax.eval_shape(nn.apply(RMT.features, model), variables, jnp.ones((1, 64, 64, 3)))
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels]
      ((1, 10), [((1, 16, 16, 8), (4, 4)), ((1, 8, 8, 16), (8, 8))])

    Source:
      Fan et al., RMT: Retentive Networks Meet Vision Transformers, CVPR 2024, table 1; github.com/qhfan/RMT.

    Differs:
      As `ManhattanAttention`. The second head that the token-labelling models (RMT-S*, B*, L*) add to the tokens of the
      last map is left out. RMT-T attends in full in its third stage, as in the code. The running var averages the
      biased variance of the batches, as Flax does; PyTorch the unbiased.
    """

    num_classes: int = 1000
    embed_dim: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    num_heads: tuple[int, ...] = (4, 4, 8, 16)
    mlp_ratio: tuple[float, ...] = (3.0, 3.0, 3.0, 3.0)
    decomposed: tuple[bool, ...] = (True, True, False, False)
    decays: tuple[tuple[float, float], ...] = ((2.0, 4.0), (2.0, 4.0), (2.0, 6.0), (2.0, 6.0))
    decay_after_softmax: bool = False
    layer_scale: tuple[float | None, ...] = (None, None, None, None)
    head_features: int = 1024
    drop_path_rate: float = 0.1
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
            for field in ("embed_dim", "depths", "num_heads", "mlp_ratio", "decomposed", "decays", "layer_scale")
        }
        if len({len(entries) for entries in by_stage.values()}) != 1 or not self.depths or min(self.depths) < 1:
            raise ValueError(f"{by_stage} must have one entry a stage, and positive depths; set them")
        if min(self.embed_dim) < 2 or self.head_features < 1:
            raise ValueError(
                f"embed_dim={self.embed_dim} must be at least 2 in each stage and head_features={self.head_features} "
                "positive; set them"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        common = _common(self)
        plain = {name: value for name, value in common.items() if name != "kernel_init"}
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        self.patch_embed = _ConvStem(self.embed_dim[0], **plain)
        stages = []
        for stage, depth in enumerate(self.depths):
            block = functools.partial(
                RMTBlock,
                self.num_heads[stage],
                decomposed=self.decomposed[stage],
                decay=self.decays[stage],
                decay_after_softmax=self.decay_after_softmax,
                mlp_ratio=self.mlp_ratio[stage],
                layer_scale=self.layer_scale[stage],
                norm=self.norm,
                **common,
            )
            stages.append(
                _Stage(
                    reduce=functools.partial(_Downsample, self.embed_dim[stage], **plain) if stage else None,
                    block=block,
                    rates=rates[sum(self.depths[:stage]) :][:depth],
                    remat=self.remat,
                )
            )
        self.stages = stages
        self.projection = nn.Dense(self.head_features, **common)
        self.final_norm = batch_norm(dtype=self.dtype, param_dtype=self.param_dtype)
        self.head = nn.Dense(self.num_classes, **common) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images of any size, channels last, scaled as the weights want them.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the averaged features.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        x = self.features(x, deterministic=deterministic)[-1].array
        x = self.final_norm(self.projection(x), use_running_average=deterministic)
        x = jnp.mean(jax.nn.silu(x), axis=(-3, -2))
        return x if self.head is None else self.head(x)

    def features(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map after each stage (before the next one's downsampling), finest first, without norms.

        Args:
          x: images of any size, channels last.
          deterministic: norm by the running statistics; no dropped branches.

        Returns:
          One level a stage, of stride `4 * 2**stage`.
        """
        split_shape(x.shape, 2)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; scale it and convert to float32")
        x = self.patch_embed(x, deterministic=deterministic)
        levels = []
        for index, stage in enumerate(self.stages):
            x = stage(x, deterministic=deterministic)
            levels.append(Level(x, (4 * 2**index,) * 2))
        return tuple(levels)


class _ConvStem(nn.Module):
    """Four convolutions with batch norms and GELUs between them, which make a map of a quarter of the size.

    Attributes:
      features: width of a token.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      bias_init: initialiser of the biases.
    """

    features: int
    dtype: Dtype | None
    param_dtype: Dtype
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        half = self.features // 2
        for index, (features, stride) in enumerate([(half, 2), (half, 1), (self.features, 2), (self.features, 1)]):
            x = exact_gelu(x) if index else x
            x = _conv(features, stride, self, f"conv{index + 1}")(x)
            x = batch_norm(
                use_running_average=deterministic,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"norm{index + 1}",
            )(x)
        return axes.constrain_map(x)


class _Downsample(nn.Module):
    """A convolution of stride 2 and a batch norm.

    Attributes:
      features: width of the new map.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      bias_init: initialiser of the biases.
    """

    features: int
    dtype: Dtype | None
    param_dtype: Dtype
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        x = _conv(self.features, 2, self, "reduce")(x)
        norm = batch_norm(
            use_running_average=deterministic, dtype=self.dtype, param_dtype=self.param_dtype, name="norm"
        )
        return axes.constrain_map(norm(x))


class _Stage(nn.Module):
    """A downsampling and a chain of blocks.

    Attributes:
      reduce: makes the downsampling; `None` for the first stage.
      block: makes a block.
      rates: drop-path rate of each block.
      remat: what blocks compute anew in the backward pass.
    """

    reduce: Callable[..., nn.Module] | None
    block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    remat: str | bool

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        if self.reduce is not None:
            x = self.reduce(name="downsample")(x, deterministic=deterministic)

        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        for index, rate in enumerate(self.rates):
            x = remat.remat_block(call, self.remat)(self.block(drop_path_rate=rate, name=f"blocks_{index}"), x)
        return x


def _common(module: Any) -> dict[str, Any]:
    """Return what a module hands down to the layers it is made of."""
    return {name: getattr(module, name) for name in ("dtype", "param_dtype", "kernel_init", "bias_init")}


def _conv(features: int, stride: int, module: Any, name: str) -> nn.Conv:
    """Return a 3 x 3 convolution whose output has `ceil(size / stride)` places, centred on every `stride`-th pixel."""
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=lecun_normal(),
        bias_init=module.bias_init,
        name=name,
    )


def _depthwise(x: Array, kernel_size: int, name: str, module: Any) -> Array:
    """Convolve each feature of a map with a kernel of its own, with zeros beyond the border."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd and positive; set kernel_size")
    return nn.Conv(
        x.shape[-1],
        (kernel_size,) * 2,
        feature_group_count=x.shape[-1],
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=lecun_normal(),
        bias_init=module.bias_init,
        conv_general_dilated=as_general_conv,
        name=name,
    )(x)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: RMT) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


# Reference checkpoints ------------------------------------------------------------------------------------------------


def _batch_norm_names(ours: str, theirs: str) -> dict[str, str]:
    """Return the names of a batch norm and of its statistics."""
    return {ours: theirs, f"{ours}/mean": f"{theirs}.running_mean", f"{ours}/var": f"{theirs}.running_var"}


_BLOCK = "layers.{stage}.blocks.{block}"
_OFFICIAL = {
    **{f"patch_embed/conv{index + 1}": f"patch_embed.proj.{3 * index}" for index in range(4)},
    **{
        ours: theirs
        for index in range(4)
        for ours, theirs in _batch_norm_names(
            f"patch_embed/norm{index + 1}", f"patch_embed.proj.{3 * index + 1}"
        ).items()
    },
    "stages/downsample/reduce": "layers.{before}.downsample.reduction",
    **_batch_norm_names("stages/downsample/norm", "layers.{before}.downsample.norm"),
    "stages/blocks/position": f"{_BLOCK}.pos.conv",
    "stages/blocks/norm1": f"{_BLOCK}.retention_layer_norm",
    "stages/blocks/attention/query": f"{_BLOCK}.retention.q_proj",
    "stages/blocks/attention/key": f"{_BLOCK}.retention.k_proj",
    "stages/blocks/attention/value": f"{_BLOCK}.retention.v_proj",
    "stages/blocks/attention/local_context": f"{_BLOCK}.retention.lepe.conv",
    "stages/blocks/attention/out": f"{_BLOCK}.retention.out_proj",
    "stages/blocks/layer_scale1": f"{_BLOCK}.gamma_1",
    "stages/blocks/norm2": f"{_BLOCK}.final_layer_norm",
    "stages/blocks/feed_forward/up": f"{_BLOCK}.ffn.fc1",
    "stages/blocks/feed_forward/depthwise": f"{_BLOCK}.ffn.dwconv.conv",
    "stages/blocks/feed_forward/down": f"{_BLOCK}.ffn.fc2",
    "stages/blocks/layer_scale2": f"{_BLOCK}.gamma_2",
    "projection": "proj",
    **_batch_norm_names("final_norm", "norm"),
    "head": "head",
}
# See `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {"official": _OFFICIAL}


def from_reference(tensors: Mapping[str, Any], model: RMT, *, source: str = "official") -> dict[str, Any]:
    """Return variables of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      The collections `params` and `batch_stats`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    table, channels = reference.choose_table(REFERENCE_NAMES, source, tensors, "patch_embed/conv1/kernel")
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    wanted = dialects.shapes_of(model, (image,))
    # The reference stores the gammas and the angles, which follow from the fields.
    return reference.read_variables(tensors, wanted, table, ignored=("Relpos.angle", "Relpos.decay"))


def reference_inputs(model: RMT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/qhfan/RMT",
        module=RMT,
        read=dialects.from_variables(from_reference, source="official"),
        marks=(r"^layers\.0\.blocks\.0\.retention\.q_proj\.weight$",),
        ignored={
            **dialects.COUNTED,
            r"Relpos\.angle$": "angles that follow from the width of a head",
            r"Relpos\.decay$": "decays that follow from the fields",
        },
        layout=dialects.table_layout(
            REFERENCE_NAMES["official"],
            shapes={
                "layer_scale1": dialects.with_ones(before=3),
                "layer_scale2": dialects.with_ones(before=3),
            },
        ),
        head="head.weight",
        stem="patch_embed.proj.0.weight",
    ),
)


def _variant(depths: tuple[int, ...], drop_path_rate: float, **fields: Any) -> dict[str, Any]:
    return {
        "module": RMT,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
        "depths": depths,
        "drop_path_rate": drop_path_rate,
        **fields,
    }


_BEYOND_TINY = {"mlp_ratio": (4.0, 4.0, 3.0, 3.0), "decomposed": (True, True, True, False)}
_BEYOND_SMALL = {**_BEYOND_TINY, "layer_scale": (None, None, 1e-6, 1e-6)}
VARIANTS: dict[str, dict[str, Any]] = {
    "rmt_tiny": _variant((2, 2, 8, 2), 0.1),
    "rmt_small": _variant((3, 4, 18, 4), 0.15, **_BEYOND_TINY),
    "rmt_base": _variant(
        (4, 8, 25, 8),
        0.4,
        embed_dim=(80, 160, 320, 512),
        num_heads=(5, 5, 10, 16),
        decays=((2.0, 5.0), (2.0, 5.0), (2.0, 6.0), (2.0, 6.0)),
        **_BEYOND_SMALL,
    ),
    "rmt_large": _variant(
        (4, 8, 25, 8),
        0.5,
        embed_dim=(112, 224, 448, 640),
        num_heads=(7, 7, 14, 20),
        decays=((2.0, 6.0),) * 4,
        **_BEYOND_SMALL,
    ),
}
