"""Axial Transformer: attention along one axis at a time, and an exact autoregressive model of images made of it.

Longer than most files: four modules and the cached sampling that must agree with them.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.labels import label
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.remat import attention as remat_attention
from jaxlayers.core.remat import remat_block
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, Params, PRNGKey
from jaxlayers.nn.feed_forward import FeedForward, exact_gelu
from jaxlayers.nn.learned_table import learned_table
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from jaxlayers.ops.patches import split_shape
from jaxlayers.ops.resample import resample

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)

# Keys and values of the positions of one axis, `[*batch, *other axes, heads, length, dim]` each.
Cache = tuple[Array, Array]


def axis_number(axis: str, rank: int) -> int:
    """Return where the named axis of a map `[*batch, *space, features]` stands, counted from the right (negative).

    Args:
      axis: a name of `jaxlayers.core.axes.SPACE[rank]`: `tokens`; or `height`, `width`; or `depth` before these.
      rank: number of spatial axes.

    Raises:
      ValueError: if the rank is not 1, 2 or 3, or the map has no such axis.
    """
    if rank not in axes.SPACE:
        raise ValueError(f"rank={rank} must be one of {sorted(axes.SPACE)}; set rank to the number of spatial axes")
    if axis not in axes.SPACE[rank]:
        raise ValueError(f"axis={axis!r} must be one of {axes.SPACE[rank]} where rank={rank}; set axis or rank")
    return axes.SPACE[rank].index(axis) - rank - 1


def shift(x: Float[Array, "*axes"], axis: int, distance: int = 1) -> Float[Array, "*axes"]:
    """Move `x` along an axis towards its end; what enters at the start is zero, and what leaves is lost.

    In an autoregressive model it makes a position see what is strictly before it.

    Args:
      x: any array.
      axis: which axis moves.
      distance: by how many places; negative towards the start.

    Returns:
      An array like `x`.
    """
    axis %= x.ndim
    length = x.shape[axis]
    by = min(abs(distance), length)
    kept = jax.lax.slice_in_dim(x, *((0, length - by) if distance > 0 else (by, length)), axis=axis)
    return jnp.pad(kept, [((by, 0) if distance > 0 else (0, by)) if one == axis else (0, 0) for one in range(x.ndim)])


class AxialAttention(nn.Module):
    """Let each entry of a map attend to those of its own line along one axis.

    out[.., i, ..] = sum_j softmax_j(q[.., i, ..] k[.., j, ..] / sqrt(d)) v[.., j, ..] W_out for each head of width d,
    with q, k, v linear in x `[*batch, *space, features]`; i and j run along the axis, all other axes count as batch.
    Causal attention takes j <= i only.

    Symmetry:
      Exactly equivariant to permutations of the entries along each axis, of the attended one only if not causal.

    Attributes:
      num_heads: number of heads; must divide the features.
      axis: the axis to attend along, a name of `core.axes.SPACE[rank]` such as "width" (then rows are mixed) or
        "height" (columns).
      rank: number of spatial axes, 1 to 3.
      causal: attend to the entry itself and those before it only.
      use_bias: add biases to Q, K and V (the output always has one).
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The weights are sown as `attention_weights` in `intermediates`.

    Cost:
      N entries of width C in lines of n: 4 N C^2 + 2 N n C multiply-accumulates, where dense attention has 2 N^2 C for
      the second term.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import AxialAttention
      >>> layer = AxialAttention(num_heads=2, axis="depth", rank=3, causal=True)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 5, 4, 3, 8)))[0].shape
      (1, 5, 4, 3, 8)

    Source:
      Ho et al., Axial Attention in Multidimensional Transformers, arXiv 2019, section 3;
      github.com/google-research/google-research/tree/master/axial.

    Differs:
      none. With the other axes of size 1 it is `nn.attention.MultiHeadAttention`, whose parameter names it has.
    """

    num_heads: int
    axis: str = axes.WIDTH
    rank: int = 2
    causal: bool = False
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def __call__(self, x: Float[Array, "*axes features"]) -> Float[Array, "*axes features"]:
        """Attend.

        Args:
          x: a map; more axes than `rank` and the features count as batch.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if there is no such axis, `x` has too few axes, or the heads do not divide the features.
        """
        place = axis_number(self.axis, self.rank)
        split_shape(x.shape, self.rank)
        others = [name for name in axes.SPACE[self.rank] if name != self.axis]
        length = x.shape[place]
        mask = jnp.tri(length, dtype=bool) if self.causal else None
        out, _ = self._attend(jnp.moveaxis(x, place, -2), mask, None, None, others)
        return jnp.moveaxis(out, -2, place)

    def step(self, x: Float[Array, "*axes features"], cache: Cache, index: Any) -> tuple[Array, Cache]:
        """Attend from the entry at `index` of each line to those before it, whose keys and values the cache holds.

        Args:
          x: the entries at `index`: a map without the attended axis.
          cache: keys and values of the earlier entries, first from `empty_cache`.
          index: place along the axis; may be traced.

        Returns:
          What the whole attention gives at `index`, and the cache with the entry's own key and value.

        Raises:
          ValueError: if the attention is not causal.
        """
        if not self.causal:
            raise ValueError(f"causal={self.causal} must be true to attend entry by entry; set causal")
        mask = (jnp.arange(cache[0].shape[-2]) <= index)[None]
        out, cache = self._attend(x[..., None, :], mask, cache, index, None)
        return out[..., 0, :], cache

    @nn.compact
    def _attend(
        self, x: Array, mask: Array | None, cache: Cache | None, index: Any, others: list[str] | None
    ) -> tuple[Array, Any]:
        """Attend along the axis before the features; with a cache, `x` has one entry there, else `others` names."""
        features = x.shape[-1]
        if self.num_heads < 1 or features % self.num_heads:
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

        def constrain(heads: Array) -> Array:
            return heads if others is None else axes.constrain_heads(heads, *others)

        query, key, value = (
            constrain(split_heads(dense(use_bias=self.use_bias, name=name)(x), self.num_heads))
            for name in ("query", "key", "value")
        )
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=-2)
                for old, new in zip(cache, (key, value), strict=True)
            )
            cache = key, value

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            scale = (features // self.num_heads) ** -0.5
            weights = attention_weights(jnp.matmul(query * scale, jnp.swapaxes(key, -1, -2)), mask=mask)
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights, value)

        out = remat_attention(attend, self, query, key, value)
        return dense(name="out")(merge_heads(constrain(out))), cache


def empty_cache(shape: tuple[int, ...], length: int, num_heads: int, dtype: Dtype = jnp.float32) -> Cache:
    """Return keys and values of no entry yet, for `AxialAttention.step`.

    Args:
      shape: that of the input of a step, `[*batch, *other axes, features]`.
      length: of the attended axis.
      num_heads: as the attention has them.
      dtype: of keys and values.
    """
    empty = jnp.zeros((*shape[:-1], num_heads, length, shape[-1] // max(num_heads, 1)), dtype)
    return empty, empty


class AxialBlock(nn.Module):
    """Mix a map along one axis by attention, then each entry alone: a Transformer block along one axis.

    z = x + drop(attention(norm(x))), out = z + drop(MLP(norm(z))), with `AxialAttention`.

    Symmetry:
      Exactly equivariant to permutations of the entries along each axis, of the attended one only if not causal.

    Attributes:
      num_heads: number of heads; must divide the features.
      axis: the axis to attend along, see `AxialAttention`.
      rank: number of spatial axes, 1 to 3.
      causal: attend to the entry itself and those before it only.
      mlp_ratio: width of the MLP's hidden layer, in multiples of the features.
      activation_fn: the MLP's nonlinearity.
      dropout_rate: dropout of both branches, in [0, 1).
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      N entries of width C in lines of n: (4 + 2 mlp_ratio) N C^2 + 2 N n C multiply-accumulates.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import AxialBlock
      >>> block = AxialBlock(num_heads=2, axis="height")
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 5, 4, 8)))[0].shape
      (1, 5, 4, 8)

    Source:
      Ho et al., Axial Attention in Multidimensional Transformers, arXiv 2019, section 3;
      github.com/google-research/google-research/tree/master/axial.

    Differs:
      GELU is exact and the branches' last kernels start as the others, where the code has x sigmoid(1.702 x) and starts
      those near zero.
    """

    num_heads: int
    axis: str = axes.WIDTH
    rank: int = 2
    causal: bool = False
    mlp_ratio: float = 1.0
    activation_fn: ActivationFn = exact_gelu
    dropout_rate: float = 0.0
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def __call__(
        self, x: Float[Array, "*axes features"], *, deterministic: bool = True
    ) -> Float[Array, "*axes features"]:
        """Apply the block.

        Args:
          x: a map; more axes than `rank` and the features count as batch.
          deterministic: no dropout.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if there is no such axis, `x` has too few axes, or a field does not fit.
        """
        return axes.constrain_map(self._run(x, None, None, deterministic)[0], self.rank)

    def step(self, x: Float[Array, "*axes features"], cache: Cache, index: Any) -> tuple[Array, Cache]:
        """Apply a causal block to the entries at `index` of each line, see `AxialAttention.step`."""
        return self._run(x, cache, index, True)

    @nn.compact
    def _run(self, x: Array, cache: Cache | None, index: Any, deterministic: bool) -> tuple[Array, Any]:
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate={self.dropout_rate} must lie in [0, 1); set dropout_rate")
        norm = functools.partial(self.norm, dtype=self.dtype, param_dtype=self.param_dtype)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        attention = AxialAttention(self.num_heads, self.axis, self.rank, self.causal, name="attention", **common)
        y = norm(name="norm1")(x)
        y, cache = (attention(y), None) if cache is None else attention.step(y, cache, index)
        x = x + dropout(y)
        y = FeedForward(
            int(x.shape[-1] * self.mlp_ratio), activation_fn=self.activation_fn, name="feed_forward", **common
        )(norm(name="norm2")(x))
        return x + dropout(y), cache


class AxialEncoder(nn.Module):
    """Mix a map of one to three axes by blocks along one axis after another, the last axis first.

    x <- block_k(x) for k = 0 .. depth - 1, with `AxialBlock`s along width, height, depth, width, ... Any number of
    blocks that is a multiple of `rank` lets every entry see every other.

    Symmetry:
      Exactly equivariant to permutations along each axis by itself, cyclic translations among them: it knows no
      positions but what is added to its input. Exchanging two axes is no symmetry.

    Attributes:
      num_heads: number of heads; must divide the features.
      depth: number of blocks.
      rank: number of spatial axes, 1 to 3.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      activation_fn: the MLPs' nonlinearity.
      dropout_rate: dropout of the blocks' branches, in [0, 1).
      remat: what the backward pass of each block computes anew, a name of `jaxlayers.core.remat.POLICIES`; true means
        all of it.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      N entries of width C in a map of n along each axis: (4 + 2 mlp_ratio) N C^2 + 2 N n C multiply-accumulates a
      block; with d axes n = N^(1/d).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import AxialEncoder
      >>> encoder = AxialEncoder(num_heads=2, depth=3, rank=3)
      >>> jax.eval_shape(encoder.init_with_output, jax.random.key(0), jnp.ones((1, 5, 4, 3, 8)))[0].shape
      (1, 5, 4, 3, 8)

    Source:
      Ho et al., Axial Attention in Multidimensional Transformers, arXiv 2019, section 3;
      github.com/google-research/google-research/tree/master/axial.

    Differs:
      As `AxialBlock`.
    """

    num_heads: int
    depth: int = 2
    rank: int = 2
    mlp_ratio: float = 1.0
    activation_fn: ActivationFn = exact_gelu
    dropout_rate: float = 0.0
    remat: bool | str = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*axes features"], *, deterministic: bool = True
    ) -> Float[Array, "*axes features"]:
        """Apply the blocks.

        Args:
          x: a map; more axes than `rank` and the features count as batch.
          deterministic: no dropout.

        Returns:
          A map like `x`.

        Raises:
          ValueError: if `x` has too few axes or a field does not fit.
        """
        if self.depth < 1 or self.rank not in axes.SPACE:
            raise ValueError(
                f"depth={self.depth} must be positive and rank={self.rank} one of {sorted(axes.SPACE)}; set them"
            )

        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        for index in range(self.depth):
            block = AxialBlock(
                self.num_heads,
                axes.SPACE[self.rank][-1 - index % self.rank],
                self.rank,
                mlp_ratio=self.mlp_ratio,
                activation_fn=self.activation_fn,
                dropout_rate=self.dropout_rate,
                norm=self.norm,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=f"blocks_{index}",
            )
            x = remat_block(call, self.remat)(block, x)
        return x


class AxialTransformer(nn.Module):
    """Give the exact distribution of every value of an image, given all values before it.

    p(x) = prod_(c, i, j) p(x_cij | earlier values), channel after channel, each in raster order. Of channel c with
    values embedded as h, places embedded as p, and the encoder's output e:

    e = encoder(conv(the channels before c)), u = outer(h + p + e), logits = W norm(inner(right(h) + down(u) + p + e)),

    where the encoder has row and column blocks, the outer decoder row blocks and causal column blocks in turn, the
    inner decoder causal row blocks, and right and down shift by one place, see `shift`. So u, after its shift, knows
    all rows above, and the inner decoder what stands to the left in the row.

    Symmetry:
      None. The logits of a value have exactly zero derivative by it and by all later ones, and depend on all earlier.

    Attributes:
      image_size: (height, width); the tables of places have this size, see `resize`.
      channels: number of channels, drawn one after the other; with 1 there is no encoder.
      num_values: number of values that a channel of a pixel takes, 0 to num_values - 1.
      features: width of all layers.
      num_heads: number of heads; must divide the features.
      encoder_depth: number of blocks over the channels before, even: half along rows, half along columns.
      outer_depth: number of blocks over the rows above, even likewise.
      inner_depth: number of blocks along the row itself, at least 1.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      activation_fn: the MLPs' nonlinearity.
      dropout_rate: dropout of the blocks' branches, in [0, 1).
      remat: what the backward pass of each block computes anew, a name of `jaxlayers.core.remat.POLICIES`; true means
        all of it.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from the parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      For each channel of a square image of N pixels and L blocks of width C, about
      L ((4 + 2 mlp_ratio) N C^2 + 2 N sqrt(N) C) multiply-accumulates. `sample` costs no more than that.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from jaxlayers.window import AxialTransformer, axial_transformer
      >>> model = AxialTransformer((4, 5), channels=2, num_values=8, features=8, num_heads=2)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 5, 2), jnp.int32))
      >>> draw = jax.jit(functools.partial(axial_transformer.sample, model, batch_size=3))
      >>> images = jax.eval_shape(draw, variables, jax.random.key(1))
      >>> images.shape, jax.eval_shape(model.apply, variables, images).shape
      ((3, 4, 5, 2), (3, 4, 5, 2, 8))

    Source:
      Ho et al., Axial Attention in Multidimensional Transformers, arXiv 2019, section 4;
      github.com/google-research/google-research/tree/master/axial.

    Differs:
      As `AxialBlock`; the last kernel starts as the others, not at zero. The inner decoder's keys and values and those
      of the outer decoder's columns are kept while sampling, where the code computes all rows anew for each row and the
      whole row for each pixel. Videos are not modelled; `AxialEncoder` takes them.
    """

    image_size: tuple[int, int]
    channels: int = 3
    num_values: int = 256
    features: int = 512
    num_heads: int = 8
    encoder_depth: int = 2
    outer_depth: int = 2
    inner_depth: int = 2
    mlp_ratio: float = 1.0
    activation_fn: ActivationFn = exact_gelu
    dropout_rate: float = 0.0
    remat: bool | str = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size} must be (height, width), both positive; set image_size")
        for field in ("encoder_depth", "outer_depth"):
            depth = getattr(self, field)
            if depth < 2 or depth % 2:
                raise ValueError(f"{field}={depth} must be even and at least 2, for rows and columns; set {field}")
        for field in ("channels", "num_values", "features", "inner_depth"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1; set {field}")
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        every: dict[str, Any] = {
            "mlp_ratio": self.mlp_ratio,
            "activation_fn": self.activation_fn,
            "dropout_rate": self.dropout_rate,
            "norm": self.norm,
            **dtypes,
            **init,
        }
        places = functools.partial(_Places, self.image_size, self.features, self.param_dtype)
        self.token_embed = nn.Embed(self.num_values, self.features, embedding_init=_embedding_init, **dtypes)
        self.places = places()
        if self.channels > 1:
            self.channel_embed = nn.Conv(self.features, (3, 3), **dtypes, **init)
            self.channel_places = places()
            self.encoder = AxialEncoder(self.num_heads, self.encoder_depth, remat=self.remat, **every)
        self.outer_blocks = [
            # A row block, then a column block of the row itself and those above.
            AxialBlock(self.num_heads, (axes.WIDTH, axes.HEIGHT)[index % 2], causal=bool(index % 2), **every)
            for index in range(self.outer_depth)
        ]
        self.inner_blocks = [
            AxialBlock(self.num_heads, axes.WIDTH, causal=True, **every) for _ in range(self.inner_depth)
        ]
        self.final_norm = self.norm(**dtypes)
        self.head = nn.Dense(self.num_values, **dtypes, **init)

    def __call__(
        self,
        x: Int[Array, "*batch height width channels"],
        chosen: Int[Array, " chosen"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch height width chosen values"]:
        """Give the logits of every value, all in parallel.

        Args:
          x: images of integers from 0 to num_values - 1; the values that are not before a place do not touch its
            logits.
          chosen: the channels whose logits are wanted, `None` for all in their order. Training on one channel drawn at
            random a step is unbiased and cheaper.
          deterministic: no dropout.

        Returns:
          Logits of the distribution of each value, given those before it.

        Raises:
          ValueError: if `x` is not of integers or not of the size and channels of the fields, or a field does not fit.
        """
        split_shape(x.shape, 2)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"input of dtype {x.dtype} must be of integers, 0 to {self.num_values - 1}; convert it")
        if x.shape[-3:] != (*self.image_size, self.channels):
            raise ValueError(
                f"input of shape {x.shape} must end in image_size={self.image_size} and channels={self.channels}; "
                "set them, and resize the parameters"
            )
        chosen = jnp.arange(self.channels) if chosen is None else chosen
        # Channels stand before the batch, so that sharding constraints find the batch where they look for it.
        h = self.token_embed(jnp.moveaxis(jnp.take(x, chosen, axis=-1), -1, 0))
        base = self._base(x, chosen, deterministic)

        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        u = h + base
        for block in self.outer_blocks:
            u = remat_block(call, self.remat)(block, u)
        r = shift(h, -2) + shift(u, -3) + base
        for block in self.inner_blocks:
            r = remat_block(call, self.remat)(block, r)
        return jnp.moveaxis(self._logits(axes.constrain_map(r)), 0, -2)

    def _base(self, x: Array, chosen: Array, deterministic: bool) -> Array:
        """Return places and what the earlier channels say, `[chosen, *batch, height, width, features]`."""
        base = self.places()
        if self.channels == 1:
            return jnp.broadcast_to(base, (len(chosen), *x.shape[:-1], base.shape[-1]))
        numbers = jnp.arange(self.channels)
        spread = (len(chosen), *(1,) * (x.ndim - 1), self.channels)
        earlier, current = (compare(numbers, chosen[:, None]).reshape(spread) for compare in (jnp.less, jnp.equal))
        seen = jnp.where(earlier, x / max(self.num_values - 1, 1), 0.0)
        seen = jnp.concatenate([seen, jnp.broadcast_to(current, seen.shape).astype(seen.dtype)], axis=-1)
        h = self.channel_embed(seen) + self.channel_places()
        return base + self.encoder(axes.constrain_map(h), deterministic=deterministic)

    def _logits(self, r: Array) -> Array:
        return self.head(self.final_norm(r))

    def _next_row(self, values: Array, base: Array, caches: list[Cache], row: Any) -> tuple[Array, list[Cache]]:
        """Apply the outer decoder to one row of values `[*batch, width]`; `base` is that row's of `_base`."""
        u = self.token_embed(values) + base
        caches = list(caches)
        for index, block in enumerate(self.outer_blocks):
            if index % 2:
                u, caches[index // 2] = block.step(u, caches[index // 2], row)
            else:
                u = block(u[..., None, :, :])[..., 0, :, :]
        return u, caches

    def _next_pixel(
        self, value: Array, known: Any, context: Array, caches: list[Cache], column: Any
    ) -> tuple[Array, list[Cache]]:
        """Return the logits of one pixel, from the value left of it (if known) and the sum of the row's contexts."""
        r = jnp.where(known, self.token_embed(value), 0) + context
        caches = list(caches)
        for index, block in enumerate(self.inner_blocks):
            r, caches[index] = block.step(r, caches[index], column)
        return self._logits(r), caches


def _embedding_init(key: PRNGKey, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    # The code's scale: a vector of length about 5, whatever its width.
    return 5.0 * shape[-1] ** -0.5 * jax.random.normal(key, shape, dtype)


class _Places(nn.Module):
    """The sum of a vector for each row and one for each column.

    Attributes:
      size: height and width.
      features: width of the vectors.
      param_dtype: dtype of the parameters.
    """

    size: tuple[int, int]
    features: int
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> Array:
        rows, columns = (
            learned_table(
                self, name, _embedding_init, (length, self.features), self.param_dtype, size=f"image_size={self.size}"
            )
            for name, length in zip(("rows", "columns"), self.size, strict=True)
        )
        return rows[:, None] + columns


# Likelihood and sampling ----------------------------------------------------------------------------------------------


def bits_per_dimension(logits: Float[Array, "*axes values"], x: Int[Array, "*axes"]) -> Float[Array, ""]:
    """Return the mean over all places of -log2 p(x), the loss of the model, in bits.

    Args:
      logits: as the model gives them; computed in float32 or better.
      x: the values at the same places.
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jnp.take_along_axis(jax.nn.log_softmax(wide), x[..., None], axis=-1)
    return -jnp.mean(log_p) / jnp.log(2.0).astype(wide.dtype)


def sample(
    model: AxialTransformer,
    variables: Params,
    key: PRNGKey,
    *,
    batch_size: int = 1,
    temperature: float = 1.0,
    given: Int[Array, "batch height width channels"] | None = None,
    known: Bool[Array, "height width channels"] | None = None,
) -> Int[Array, "batch height width channels"]:
    """Draw images, or complete given ones.

    The encoder runs once a channel, the outer decoder once a row (on that row alone: its columns keep keys and values
    of the rows above), the inner decoder once a pixel (which keeps those of the pixels to the left). All in all that
    is the arithmetic of one parallel pass. It is a pure function: wrap it in `jax.jit`.

    Args:
      model: the model.
      variables: its variables.
      key: random key; unused where the temperature is 0.
      batch_size: how many images to draw at once.
      temperature: divides the logits; 0 takes the likeliest value. A Python number.
      given: images whose known values are kept instead of drawn.
      known: true where values are kept, and alike for all images; `None` with `given` keeps all of them.

    Returns:
      Images of the model's size, int32.

    Raises:
      ValueError: if the batch size is not positive, the temperature is negative, or the given images do not fit.
    """
    return decode(model, variables, key, batch_size=batch_size, temperature=temperature, given=given, known=known)[0]


def decode(
    model: AxialTransformer,
    variables: Params,
    key: PRNGKey,
    *,
    batch_size: int = 1,
    temperature: float = 1.0,
    given: Int[Array, "batch height width channels"] | None = None,
    known: Bool[Array, "height width channels"] | None = None,
) -> tuple[Int[Array, "batch height width channels"], Float[Array, "batch height width channels values"]]:
    """Do as `sample`, and return the images with the logits that each value was drawn from."""
    (height, width), channels = model.image_size, model.channels
    shape = (batch_size, height, width, channels)
    if batch_size < 1 or temperature < 0:
        raise ValueError(
            f"batch_size={batch_size} must be positive and temperature={temperature} not negative; pass such numbers"
        )
    if given is None:
        given, known = jnp.zeros(shape, jnp.int32), jnp.zeros(shape[1:], bool)
    known = jnp.ones(shape[1:], bool) if known is None else known
    if given.shape != shape or known.shape != shape[1:]:
        raise ValueError(
            f"given images must have shape {shape} and known places {shape[1:]}; got {given.shape} and {known.shape}; "
            "pass batch_size and images of the model's size"
        )
    given = given.astype(jnp.int32)
    images = jax.ShapeDtypeStruct(shape, jnp.int32)
    # What all layers compute in.
    dtype = jax.eval_shape(model.apply, variables, images).dtype
    run = functools.partial(model.apply, variables)
    keys = jax.random.split(key, (channels, height, width))

    def next_pixel(carry: Any, at: Any) -> Any:
        value, caches = carry
        column, context, fixed, is_fixed, key = at
        logits, caches = run(value, column > 0, context, caches, column, method="_next_pixel")
        drawn = (
            jax.random.categorical(key, logits / temperature) if temperature else jnp.argmax(logits, axis=-1)
        ).astype(jnp.int32)
        value = jnp.where(is_fixed, fixed, drawn)
        return (value, caches), (value, logits)

    def next_row(carry: Any, at: Any) -> Any:
        above, caches = carry
        row, base, fixed, is_fixed, keys = at
        pixels = [empty_cache((batch_size, model.features), width, model.num_heads, dtype)] * model.inner_depth
        contexts = jnp.moveaxis(above + base, 1, 0)
        start = (jnp.zeros((batch_size,), jnp.int32), pixels)
        _, (values, logits) = jax.lax.scan(
            next_pixel, start, (jnp.arange(width), contexts, jnp.moveaxis(fixed, 1, 0), is_fixed, keys)
        )
        values = jnp.moveaxis(values, 0, 1)
        above, caches = run(values, base, caches, row, method="_next_row")
        return (above.astype(dtype), caches), (values, jnp.moveaxis(logits, 0, 1))

    def next_channel(x: Array, at: Any) -> Any:
        channel, is_fixed, keys = at
        base = run(x, channel[None], True, method="_base")[0].astype(dtype)
        line = (batch_size, width, model.features)
        start = (jnp.zeros(line, dtype), [empty_cache(line, height, model.num_heads, dtype)] * (model.outer_depth // 2))
        fixed = jnp.take(given, channel, axis=-1)
        steps = (jnp.arange(height), jnp.moveaxis(base, 1, 0), jnp.moveaxis(fixed, 1, 0), is_fixed, keys)
        _, (values, logits) = jax.lax.scan(next_row, start, steps)
        x = jnp.where(jnp.arange(channels) == channel, jnp.moveaxis(values, 0, 1)[..., None], x)
        return x, jnp.moveaxis(logits, 0, 1)

    steps = (jnp.arange(channels), jnp.moveaxis(known, -1, 0), keys)
    x, logits = jax.lax.scan(next_channel, jnp.zeros(shape, jnp.int32), steps)
    return x, jnp.moveaxis(logits, 0, -2)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: AxialTransformer) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, for layer-wise learning rates.

    Embeddings and places are layer 0, then come the encoder's blocks, the outer and the inner decoder's; final norm and
    head are the last layer.
    """
    encoder = model.encoder_depth if model.channels > 1 else 0
    first = {"encoder": 1, "outer": 1 + encoder, "inner": 1 + encoder + model.outer_depth}

    def layer(path: tuple[str, ...], leaf: Any) -> int:
        if path[0] in ("final_norm", "head"):
            return 1 + encoder + model.outer_depth + model.inner_depth
        part = path[1] if path[0] == "encoder" else path[0]
        before, _, number = part.rpartition("blocks_")
        return first[before.rstrip("_") or "encoder"] + int(number) if number.isdigit() else 0

    return label(params, layer)


def resize(params: Params, from_model: AxialTransformer, to_model: AxialTransformer) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image size of `to_model`, places resampled bicubically.

    Raises:
      ValueError: if the models differ in another field that the shapes of parameters depend on.
    """
    for field in (
        "channels", "num_values", "features", "num_heads", "encoder_depth", "outer_depth", "inner_depth", "mlp_ratio",
    ):  # fmt: skip
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    lengths = dict(zip(("rows", "columns"), to_model.image_size, strict=True))

    def fit(path: tuple[str, ...], leaf: Any) -> Any:
        if path[-1] in lengths and len(leaf) != lengths[path[-1]]:
            return resample(jnp.asarray(leaf), (lengths[path[-1]],))
        return leaf

    flat = flax.traverse_util.flatten_dict(dict(params))
    return flax.traverse_util.unflatten_dict({path: fit(path, leaf) for path, leaf in flat.items()})


def _variant(size: int, features: int, dropout_rate: float) -> dict[str, Any]:
    return {
        "module": AxialTransformer,
        "inputs": (jax.ShapeDtypeStruct((1, size, size, 3), jnp.int32),),
        "image_size": (size, size),
        "features": features,
        "num_heads": 16,
        "encoder_depth": 8,
        "outer_depth": 8,
        "inner_depth": 8,
        "dropout_rate": dropout_rate,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "axial_transformer_imagenet32": _variant(32, 1536, 0.04),
    "axial_transformer_imagenet64": _variant(64, 2048, 0.0),
}
