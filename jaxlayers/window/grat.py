"""GRAT: attention whose queries, group by group, share the keys of nearby groups or of a criss-cross of groups."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, remat
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.ops.block_attention import BlockLists, block_attention, dense_attention
from jaxlayers.ops.block_attention import criss_cross as criss_cross
from jaxlayers.ops.block_attention import neighbourhood as neighbourhood
from jaxlayers.ops.patches import crop, pad_to_multiple
from jaxlayers.ops.windows import merge_windows, partition_windows, window_regions


def regroup(
    x: Float[Array, "*batch tokens heads dim"], size: Sequence[int], group: Sequence[int]
) -> Float[Array, "*batch groups group_tokens heads dim"]:
    """Return the tokens of a map of `size`, in row-major order, reordered into contiguous groups.

    A map that is not of whole groups is padded with zeros at its ends.
    """
    *batch, _, heads, dim = x.shape
    x = pad_to_multiple(x.reshape(*batch, *size, heads * dim), group)
    x = partition_windows(x, group)
    return x.reshape(*x.shape[:-1], heads, dim)


def ungroup(
    x: Float[Array, "*batch groups group_tokens heads dim"], size: Sequence[int], group: Sequence[int]
) -> Float[Array, "*batch tokens heads dim"]:
    """Return the inverse of `regroup`."""
    *batch, groups, tokens, heads, dim = x.shape
    padded = [-(-length // step) * step for length, step in zip(size, group, strict=True)]
    x = merge_windows(x.reshape(*batch, groups, tokens, heads * dim), group, padded)
    return crop(x, size).reshape(*batch, math.prod(size), heads, dim)


def grat_attention(
    query: Float[Array, "*batch tokens heads dim"],
    key: Float[Array, "*batch tokens key_heads dim"],
    value: Float[Array, "*batch tokens key_heads value_dim"],
    *,
    size: Sequence[int],
    group: Sequence[int],
    blocks: Callable[[Sequence[int]], BlockLists] = neighbourhood,
    text_mask: Bool[Array, "*batch text"] | None = None,
    scale: float | None = None,
    attend: Callable[..., Array] = dense_attention,
    groups_at_once: int | None = None,
) -> Float[Array, "*batch tokens heads value_dim"]:
    """Attend as `jax.nn.dot_product_attention` does, but only to chosen groups of a map: needs no training.

    The first `prod(size)` tokens are a map of one to three axes in row-major order, any others text. All queries of a
    group of the map share one set of keys, those of the groups that `blocks` lists and the text's; queries of the text
    see everything. Rotary positions and norms of queries and keys go before, as for full attention.

    Args:
      query: queries.
      key: keys, with as many heads or a divisor.
      value: values.
      size: size of the map along each axis.
      group: size of a group along each axis. Where it does not divide the map, groups at the end are smaller.
      blocks: which groups a group sees, from the grid of groups: `neighbourhood`, `functools.partial(neighbourhood,
        radius=2)`, `criss_cross`, or a function of your own.
      text_mask: false for tokens of the text that nobody may see, such as padding.
      scale: factor of the scores; `None` = 1 / sqrt(dim).
      attend: the product of a dense tile, called as `attend(query, key, value, mask=..., scale=...)`; for instance
        `functools.partial(jax.nn.dot_product_attention, implementation="cudnn")`.
      groups_at_once: number of groups whose keys are gathered together; `None` = all.

    Returns:
      What each query gets.

    Raises:
      ValueError: if sizes, groups, text and tokens do not fit each other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.grat import criss_cross, grat_attention
      >>> x = jnp.ones((1, 8 * 12 + 5, 2, 4))
      >>> grat_attention(x, x, x, size=(8, 12), group=(4, 4), blocks=criss_cross).shape
      (1, 101, 2, 4)
    """
    size, group = tuple(size), tuple(group)
    if len(size) != len(group) or len(size) not in axes.SPACE or min((*size, *group)) < 1:
        raise ValueError(f"size={size} and group={group} must have 1 to 3 positive entries, as many; set both")
    length = math.prod(size)
    text = query.shape[-3] - length
    if text < 0 or key.shape[-3] != query.shape[-3]:
        raise ValueError(
            f"{query.shape[-3]} queries and {key.shape[-3]} keys must be the {length} of size={size} and any text; "
            "set size"
        )
    if text_mask is not None and (not text or text_mask.shape[-1] != text):
        raise ValueError(
            f"text_mask of shape {text_mask.shape} must be of the {text} tokens of text; pass that, or None"
        )
    batch = query.shape[:-3]
    # One batch axis, which is what the functions that multiply a tile take.
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if text_mask is not None:
        text_mask = jnp.broadcast_to(text_mask, (*batch, text)).reshape(-1, text)
    grid = [-(-total // step) for total, step in zip(size, group, strict=True)]
    real = None
    if any(total % step for total, step in zip(size, group, strict=True)):
        real = window_regions(size, group, (0,) * len(size), separate_padding=True) >= 0
    shared = (key[:, length:], value[:, length:]) if text else None
    out = block_attention(
        regroup(query[:, :length], size, group),
        regroup(key[:, :length], size, group),
        regroup(value[:, :length], size, group),
        blocks(grid),
        key_mask=real,
        shared=shared,
        shared_mask=text_mask,
        scale=scale,
        attend=attend,
        blocks_at_once=groups_at_once,
    )
    out = ungroup(out, size, group)
    if text:
        mask = None
        if text_mask is not None:
            everything = jnp.ones((len(text_mask), length), bool)
            mask = jnp.concatenate([everything, text_mask], axis=-1)[:, None, None]
        told = attend(query[:, length:], key, value, mask=mask, scale=scale)
        out = jnp.concatenate([out, told], axis=1)
    return out.reshape(*batch, *out.shape[1:])


class GratAttention(nn.Module):
    """Let the tokens of a map, and of a text, attend to each other by groups.

    out = softmax(Q K_g^T / sqrt(d)) V_g W_out for each head of width d and each group of queries g, with K_g and V_g
    the keys and values of the groups that `blocks` lists for g and of the text; queries of the text see all keys.

    Symmetry:
      Exactly equivariant to permutations of the text's tokens and to those of the tokens of one group.

    Attributes:
      num_heads: number of heads; must divide the features.
      group_size: size of a group along each axis of the map, whose number it gives.
      blocks: which groups a group sees, from the grid of groups; see `grat_attention`.
      groups_at_once: number of groups whose keys are gathered together; `None` = all.
      use_bias: add biases to Q, K and V (the output always has one).
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      4 L C^2 + 2 L k n C multiply-accumulates for a map of L tokens of width C in groups of n that see k each: of the
      products of full attention the share k n / L.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import GratAttention
      >>> layer, tokens = GratAttention(num_heads=2, group_size=(4, 4)), jnp.ones((1, 8 * 12 + 5, 8))
      >>> jax.eval_shape(lambda *args: layer.init_with_output(*args, size=(8, 12)), jax.random.key(0), tokens)[0].shape
      (1, 101, 8)

    Source:
      Ren et al., Grouping First, Attending Smartly: Training-Free Acceleration for Diffusion Transformers, arXiv
      2505.14687, 2025; github.com/OliverRensu/GRAT.

    Differs:
      The paper replaces the attention of trained models; for those, `grat_attention` is the layer without weights. In
      a volume, groups see those that share any coordinate, as in the code: three planes, not three lines. Maps that
      are not of whole groups are padded and masked; the code takes whole groups only.
    """

    num_heads: int
    group_size: tuple[int, ...] = (16, 16)
    blocks: Callable[..., Any] = neighbourhood
    groups_at_once: int | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch tokens features"],
        text_mask: Bool[Array, "*batch text"] | None = None,
        *,
        size: tuple[int, ...],
    ) -> Float[Array, "*batch tokens features"]:
        """Attend.

        Args:
          x: the tokens of the map in row-major order, then those of the text, if any.
          text_mask: false for tokens of the text that nobody may see, such as padding.
          size: size of the map along each axis.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if the heads do not divide the features, or sizes, groups, text and tokens do not fit each other.
        """
        if x.ndim < 2:
            raise ValueError(f"input must be [*batch, tokens, features]; got shape {x.shape}")
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
        query, key, value = (
            _constrain(
                dense(use_bias=self.use_bias, name=name)(x).reshape(
                    *x.shape[:-1], self.num_heads, features // self.num_heads
                )
            )
            for name in ("query", "key", "value")
        )

        def attend(module: nn.Module, query: Array, key: Array, value: Array) -> Array:
            return grat_attention(
                query,
                key,
                value,
                size=size,
                group=self.group_size,
                blocks=self.blocks,
                text_mask=text_mask,
                groups_at_once=self.groups_at_once,
            )

        out = _constrain(remat.attention(attend, self, query, key, value))
        return dense(name="out")(out.reshape(*x.shape[:-1], features))


def _constrain(x: Array) -> Array:
    """Constrain what each head sees, `[*batch, tokens, heads, dim]`."""
    return axes.constrain_last(x, axes.BATCH, None, axes.HEADS, None)
