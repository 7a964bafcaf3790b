"""GTA: attention in which every query sees keys and values as its own camera would see them."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.geometry.cameras import Views, check_views, inverse_pose
from jaxlayers.geometry.harmonics import wigner_d
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads

Form = Literal["forward", "inverse", "transpose"]
SIMILARITIES = ("dot", "euclidean")

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class PoseBlocks(NamedTuple):
    """How many features of each head every block of the representation rho acts on, in this order.

    Attributes:
      trivial: features that no pose touches.
      se3: read as 4-vectors, on which the camera's pose E acts as a matrix; a multiple of 4. With the euclidean
        similarity read as points of space, that E moves; a multiple of 3.
      so3: read as features of degree 1 to `max_degree` in turn, on which the camera's rotation acts by Wigner matrices;
        a multiple of (max_degree + 1)^2 - 1.
      so2: read as planes, f for the row and f for the column of the token, turned by 2 pi turns position 2^-i for
        i = f-1 ... 0, as rotary position encodings do; a multiple of 4.
      t2: read as homogeneous points (a, b, c), that the token's position moves; a multiple of 3.
      max_degree: the highest degree of `so3`.
      turns: of the fastest plane of `so2` across the image.
    """

    trivial: int = 0
    se3: int = 0
    so3: int = 0
    so2: int = 0
    t2: int = 0
    max_degree: int = 2
    turns: float = 1.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features of each block."""
        return self[:5]

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return sum(self.sizes)


def check_blocks(blocks: PoseBlocks, *, euclidean: bool = False) -> None:
    """Check the sizes of the blocks.

    Raises:
      ValueError: if there are no features, a size is negative or not the multiple that its block needs, or `t2`, which
        does not keep distances, is to be used with the euclidean similarity.
    """
    if blocks.max_degree < 1 or min(blocks.sizes) < 0 or blocks.head_dim < 1:
        raise ValueError(f"blocks={tuple(blocks)} must have features, none negative, and max_degree of 1 or more")
    units = {"se3": 3 if euclidean else 4, "so3": (blocks.max_degree + 1) ** 2 - 1, "so2": 4, "t2": 3}
    for name, unit in units.items():
        if getattr(blocks, name) % unit:
            raise ValueError(f"{name}={getattr(blocks, name)} of the blocks must be a multiple of {unit}; set {name}")
    if euclidean and blocks.t2:
        raise ValueError(f"t2={blocks.t2} does not keep distances; set t2=0 or similarity='dot'")


def transform(
    x: Float[Array, "*batch heads tokens head_dim"],
    views: Views,
    blocks: PoseBlocks,
    form: Form,
    *,
    translation_scale: Any = 1.0,
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, "*batch heads tokens head_dim"]:
    """Return rho x, rho^-1 x or rho^T x for the representation rho of each token's pose and position.

    Args:
      x: features of each head.
      views: poses and positions of the tokens.
      blocks: what rho is made of.
      form: "forward" (rho), "inverse" or "transpose".
      translation_scale: multiplies the translations of poses.
      weight: `None` reads the `se3` features as 4-vectors; else they are points, and this, which broadcasts against
        `[*batch, heads, tokens]`, is their fourth coordinate.

    Returns:
      Features like `x`, in float32 or better: far from the origin they are large beside what matters of them.
    """
    wide = at_least_float32(jnp.result_type(x, views.extrinsics))
    trivial, se3, so3, so2, t2 = jnp.split(x.astype(wide), _borders(blocks), axis=-1)
    parts = [trivial]
    if blocks.se3:
        poses = views.extrinsics.astype(wide)
        scaled = poses[..., :3, 3:] * jnp.asarray(translation_scale, wide)
        top = jnp.concatenate([poses[..., :3, :3], scaled], axis=-1)
        poses = jnp.concatenate([top, poses[..., 3:, :]], axis=-2)
        poses = {"forward": lambda: poses, "inverse": lambda: inverse_pose(poses)}.get(
            form, lambda: jnp.swapaxes(poses, -1, -2)
        )()
        if weight is None:
            parts.append(_by_view(poses, se3, 4))
        else:
            points = _by_view(poses[..., :3, :3], se3, 3)
            shift = _by_view(poses[..., :3, 3:], jnp.broadcast_to(weight, se3.shape[:-1])[..., None], 1)
            parts.append(points + jnp.tile(shift, se3.shape[-1] // 3))
    if blocks.so3:
        rotation = views.extrinsics[..., :3, :3].astype(wide)
        rotation = rotation if form == "forward" else jnp.swapaxes(rotation, -1, -2)
        degrees = range(1, blocks.max_degree + 1)
        multiplets = so3.reshape(*so3.shape[:-1], -1, (blocks.max_degree + 1) ** 2 - 1)
        turned = [
            _by_view(
                rotation if degree == 1 else wigner_d(degree, rotation),
                multiplets[..., degree**2 - 1 : (degree + 1) ** 2 - 1],
                2 * degree + 1,
            )
            for degree in degrees
        ]
        parts.append(jnp.concatenate(turned, axis=-1).reshape(so3.shape))
    if blocks.so2 or blocks.t2:
        assert views.positions is not None
        positions = views.positions.astype(wide)[..., None, :, :]
    if blocks.so2:
        count = blocks.so2 // 4
        frequencies = 2 * jnp.pi * blocks.turns * 2.0 ** jnp.arange(1 - count, 1, dtype=wide)
        angles = (frequencies[:, None] * positions[..., None, :]).reshape(*positions.shape[:-1], 2 * count)
        cosine, sine = jnp.cos(angles), jnp.sin(angles) * (-1 if form == "forward" else 1)
        first, second = so2[..., 0::2], so2[..., 1::2]
        pairs = jnp.stack([cosine * first - sine * second, sine * first + cosine * second], axis=-1)
        parts.append(pairs.reshape(so2.shape))
    if blocks.t2:
        point = t2.reshape(*t2.shape[:-1], -1, 3)
        ends, last = point[..., :2], point[..., 2:]
        positions = positions[..., None, :]
        if form == "transpose":
            ends = ends - positions * last
        else:
            moved = jnp.sum(positions * ends, axis=-1, keepdims=True)
            last = last - moved if form == "forward" else last + moved
        parts.append(jnp.concatenate([ends, last], axis=-1).reshape(t2.shape))
    return jnp.concatenate(parts, axis=-1)


def _borders(blocks: PoseBlocks) -> list[int]:
    return [sum(blocks.sizes[:end]) for end in range(1, 5)]


def _by_view(matrices: Array, x: Array, width: int) -> Array:
    """Return x with each run of `width` of its features multiplied by the matrix of its token's view.

    Matrices are `[*batch, views, rows, width]`, x `[*batch, heads, tokens, ...]`; what is returned has the
    shape of x if rows = width.
    """
    *batch, heads, tokens = x.shape[: matrices.ndim - 3 + 2]
    views = matrices.shape[-3]
    split = x.reshape(*batch, heads, views, tokens // views, -1, width)
    found = _einsum("...vij,...hvtcj->...hvtci", matrices, split)
    if matrices.shape[-2] == width:
        return found.reshape(x.shape)
    return found.reshape(*batch, heads, tokens, -1)


def geometric_transform_attention(
    query: Float[Array, "*batch heads tokens head_dim"],
    key: Float[Array, "*batch heads context_tokens head_dim"],
    value: Float[Array, "*batch heads context_tokens head_dim"],
    views: Views,
    context_views: Views,
    blocks: PoseBlocks,
    *,
    similarity: str = "dot",
    transform_values: bool = True,
    translation_scale: Any = 1.0,
    mask: Bool[Array, "..."] | None = None,
) -> tuple[Array, Array]:
    """Return the attended values and the weights; see `GTA`, whose projections are left out here.

    Args:
      query: of the tokens that ask.
      key: of the tokens that answer.
      value: of the same.
      views: poses and positions of the tokens that ask.
      context_views: of those that answer.
      blocks: what the representation is made of.
      similarity: "dot" or "euclidean".
      transform_values: see `GTA`.
      translation_scale: multiplies the translations of poses.
      mask: true where a token may attend to another; broadcasts against the weights.

    Returns:
      `[*batch, heads, tokens, head_dim]` in the dtype of `value`, and `[*batch, heads, tokens, context_tokens]` in
      float32 or better, as all between.
    """
    euclidean = similarity == "euclidean"
    move = functools.partial(transform, blocks=blocks, translation_scale=translation_scale)
    one = jnp.ones(()) if euclidean else None
    values = move(value, context_views, form="inverse", weight=one) if transform_values else value
    query = move(query, views, form="inverse" if euclidean else "transpose", weight=one)
    key = move(key, context_views, form="inverse", weight=one)
    scores = _einsum("...qd,...kd->...qk", query, key)
    if euclidean:
        # The half square of the query is the same for all keys, which the softmax does not see.
        scores = scores - jnp.sum(jnp.square(key), axis=-1)[..., None, :] / 2
    weights = attention_weights(scores * blocks.head_dim**-0.5, mask=mask)
    out = _einsum("...qk,...kd->...qd", weights, values.astype(weights.dtype))
    if transform_values:
        # A point is moved by the weight that it was made of: one, or zero where there was nothing to attend to.
        total = one
        if euclidean and mask is not None:
            total = jnp.any(jnp.broadcast_to(mask, weights.shape), axis=-1).astype(weights.dtype)
        out = move(out, views, form="forward", weight=total)
    return out.astype(value.dtype), weights


class GTA(nn.Module):
    """Attend to tokens of posed views, each of which the query sees in its own camera's frame.

    out_i = sum_j softmax_j(q_i^T rho(g_i g_j^-1) k_j / sqrt(d)) rho(g_i g_j^-1) v_j, for each head of width d, with
    g_i the pose of token i's camera and its place in the image, and rho a matrix `[d, d]` of blocks: the pose itself,
    Wigner matrices of its rotation, rotations of planes by multiples of the position. It is computed as plain attention
    of rho(g_i)^T q_i, rho(g_j)^-1 k_j and rho(g_j)^-1 v_j, whose output is multiplied by rho(g_i). The euclidean
    similarity puts -|rho(g_i)^-1 q_i - rho(g_j)^-1 k_j|^2 / 2 in place of the product, with SE(3) acting on points.

    Symmetry:
      Exactly invariant to a change of the world frame (every pose E becomes E g^-1), and, for the blocks `so2` and
      `t2`, to a common shift of all positions. Equivariant to permutations of tokens with their views, and invariant
      to those of a separate context. All to rounding, which grows with the distance of cameras from the origin.

    Attributes:
      num_heads: number of heads.
      blocks: features of a head that each block of rho acts on; their sum is the width of a head.
      similarity: "dot" or "euclidean".
      transform_values: apply rho to the values too; else it acts on the attention weights alone.
      translation_scale: initial value of the learned factor of all translations, which there is with `blocks.se3`.
      use_bias: add biases to Q, K and V (the output always has one).
      dtype: compute dtype; `None` infers it from input and parameters. What is between the projections is computed in
        float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The weights are sown as `attention_weights` in `intermediates`.

    Cost:
      That of attention, and 16 multiply-accumulates for each 4 features of queries, keys, values and output.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.gta import GTA, PoseBlocks
      >>> from jaxlayers.geometry.cameras import Views
      >>> layer, x = GTA(num_heads=2, blocks=PoseBlocks(se3=8, so2=8)), jnp.ones((1, 6, 12))
      >>> views = Views(jnp.broadcast_to(jnp.eye(4), (1, 2, 4, 4)), positions=jnp.ones((1, 6, 2)))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x, views)[0].shape
      (1, 6, 12)

    Source:
      Miyato, Jaeger, Welling, Geiger, GTA: A Geometry-Aware Attention Mechanism for Multi-View Transformers, ICLR 2024,
      equations 6 and 7; reference code autonomousvision/gta, `source/utils/gta.py`.

    Differs:
      Q, K and V come from three products. Wigner matrices are in the basis of `jaxlayers.geometry.harmonics`. A token
      that may attend to nothing gets zeros before W_out. With the euclidean similarity `t2` is refused, and the half
      square of the query, which the softmax cancels, is left out.
    """

    num_heads: int
    blocks: PoseBlocks
    similarity: str = "dot"
    transform_values: bool = True
    translation_scale: float = 0.01
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch tokens features"],
        views: Views,
        context: Float[Array, "*batch context_tokens context_features"] | None = None,
        context_views: Views | None = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "*batch tokens features"]:
        """Attend.

        Args:
          x: tokens that ask.
          views: their poses, and their positions where `so2` or `t2` need them.
          context: tokens that answer, of the same batch; `None` = x.
          context_views: the same for these; given with the context.
          mask: true where a token of x may attend to one of the context; broadcasts against
            `[*batch, heads, tokens, context_tokens]`. NaN poses give NaN wherever they are attended to or ask.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if a field is wrong, shapes do not fit, positions are missing, or known poses are not rigid.
        """
        if self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads} must be positive; set num_heads")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity={self.similarity!r} must be one of {SIMILARITIES}; set similarity")
        check_blocks(self.blocks, euclidean=self.similarity == "euclidean")
        context, context_views = with_context(x, views, context, context_views)
        needed = self.blocks.so2 > 0 or self.blocks.t2 > 0
        check_views(views, x.shape[:-1], positions=needed)
        check_views(context_views, context.shape[:-1], positions=needed)
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        width = self.num_heads * self.blocks.head_dim
        heads = [
            axes.constrain_heads(split_heads(dense(width, use_bias=self.use_bias, name=name)(tokens), self.num_heads))
            for name, tokens in (("query", x), ("key", context), ("value", context))
        ]
        scale: Any = 1.0
        if self.blocks.se3:
            scale = self.param("scale", nn.initializers.constant(self.translation_scale), (), self.param_dtype)

        def attend(module: nn.Module, query: Array, key: Array, value: Array, scale: Any) -> Array:
            out, weights = geometric_transform_attention(
                query,
                key,
                value,
                views,
                context_views,
                self.blocks,
                similarity=self.similarity,
                transform_values=self.transform_values,
                translation_scale=scale,
                mask=mask,
            )
            module.sow("intermediates", "attention_weights", weights)
            return out

        out = remat.attention(attend, self, *heads, scale)
        return dense(x.shape[-1], name="out")(merge_heads(axes.constrain_heads(out)))


def with_context(x: Array, views: Views, context: Array | None, context_views: Views | None) -> tuple[Array, Views]:
    """Return what is attended to: the context with its views, or the tokens themselves.

    Raises:
      ValueError: if only one of the two is given, or they are not tokens of one batch.
    """
    if (context is None) != (context_views is None):
        raise ValueError("context and context_views must be given together; pass both or neither")
    if context is None or context_views is None:
        context, context_views = x, views
    if x.ndim < 2 or x.shape[:-2] != context.shape[:-2]:
        raise ValueError(
            f"input must be [*batch, tokens, features], context of the same batch; got {x.shape}, {context.shape}"
        )
    return context, context_views


# The reference code ---------------------------------------------------------------------------------------------------

# Our parameters of `GTA` and those of the reference's `Attention`, once its fused projections are split.
REFERENCE_NAMES: Mapping[str, str] = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "scale": "trans_coeff",
}


def from_reference(tensors: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Return parameters of `GTA` from the state dict of the reference's `Attention`.

    Args:
      tensors: arrays by the reference's names.
      params: parameters of our module (or their shapes, from `jax.eval_shape`), which say what is wanted. The features
        of `so3` blocks of the reference are in another basis, which this does not change.

    Returns:
      A parameter tree like `params`.

    Raises:
      ValueError: if names or shapes are not those of `params`.
    """
    named = {f".{name}": tensor for name, tensor in tensors.items()}
    named = reference.split_fused(named, "to_qkv", ("to_q", "to_k", "to_v"))
    named = reference.split_fused(named, "to_kv", ("to_k", "to_v"))
    return reference.read_reference(
        {name.removeprefix("."): tensor for name, tensor in named.items()}, params, REFERENCE_NAMES
    )


def _read(tensors: Mapping[str, Any], model: GTA, inputs: Any) -> dict[str, Any]:
    if model.blocks.so3:
        raise ValueError(
            f"blocks.so3={model.blocks.so3} must be 0 here, since the reference has these features in another basis; "
            "turn the weights and use from_reference"
        )
    return {"params": from_reference(tensors, dialects.shapes_of(model, inputs)["params"])}


# A layer whose context is another set has one projection of the queries, another of keys and values.
_OTHERS = r"^(?!to_|trans_coeff$)"
_FUSED: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "official": ((r"^to_qkv\.weight$",), dict.fromkeys(("to_q", "to_k", "to_v"), "to_qkv")),
    "official_cross": ((r"^to_q\.weight$", r"^to_kv\.weight$"), dict.fromkeys(("to_k", "to_v"), "to_kv")),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin="github.com/autonomousvision/gta, source/layers.py, one Attention",
        module=GTA,
        read=_read,
        marks=(*marks, r"^to_out\.0\.weight$"),
        foreign=(_OTHERS,),
        layout=dialects.table_layout(REFERENCE_NAMES, shapes={"scale": dialects.with_ones(before=1)}, fused=fused),
    )
    for name, (marks, fused) in _FUSED.items()
)
