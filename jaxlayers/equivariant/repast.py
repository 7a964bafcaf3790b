"""RePAST: attention whose queries and keys carry their rays, written in the frame of one of the two cameras."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.equivariant.gta import with_context
from jaxlayers.geometry.cameras import Views, check_views, relative_pose
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads

FRAMES = ("key", "query")


def fourier_features(
    x: Float[Array, "*batch dimensions"], first_octave: int, octaves: int
) -> Float[Array, "*batch encoded"]:
    """Return the sines, then the cosines, of pi 2^o x for `octaves` octaves o from `first_octave` on.

    Args:
      x: numbers; of each, all its octaves stand together.
      first_octave: of the slowest wave, whose length is 2^(1 - first_octave).
      octaves: number of waves.

    Returns:
      `[*batch, 2 * dimensions * octaves]`, in float32 or better.
    """
    x = x.astype(at_least_float32(x.dtype))
    phases = x[..., None] * (jnp.pi * 2.0 ** jnp.arange(first_octave, first_octave + octaves)).astype(x.dtype)
    phases = phases.reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)


def rays_from(
    frame: Float[Array, "*batch 4 4"], views: Views
) -> tuple[Float[Array, "*batch views 3"], Float[Array, "*batch tokens 3"]]:
    """Return the rays of all tokens as a camera sees them.

    Args:
      frame: the pose of that camera.
      views: poses of the tokens' cameras, and their rays, each in the frame of its own camera.

    Returns:
      The origin of each view and the direction of each token, in the camera's frame, in float32 or better.
    """
    assert views.rays is not None
    wide = at_least_float32(jnp.result_type(frame, views.extrinsics, views.rays))
    relative = relative_pose(frame.astype(wide)[..., None, :, :], views.extrinsics.astype(wide))
    *batch, tokens, _ = views.rays.shape
    rays = views.rays.astype(wide).reshape(*batch, relative.shape[-3], -1, 3)
    turned = jnp.einsum("...vij,...vtj->...vti", relative[..., :3, :3], rays, precision=jax.lax.Precision.HIGHEST)
    return relative[..., :3, 3], turned.reshape(*batch, tokens, 3)


class _Kernel(nn.Module):
    """Own a kernel, which a loop outside uses many times."""

    shape: tuple[int, int]
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)


class RePAST(nn.Module):
    """Attend to tokens of posed views by their features and by how their rays run past each other.

    out_i = sum_j softmax_j(q_ij^T k_ij / sqrt(d)) v_j W_out for each head of width d, with q_ij = W_q x_i +
    U_q e_ij(r_i), k_ij = W_k z_j + U_k e_ij(r_j) and v_j = W_v z_j, where e_ij(r) are the Fourier features of the
    origin and the direction of ray r, written in the frame of token j's camera (or of token i's, see `frame`).

    Symmetry:
      Exactly invariant to a change of the world frame (every pose E becomes E g^-1). Equivariant to permutations of
      tokens with their views, and invariant to those of a separate context. To rounding, which the fastest wave
      multiplies by pi 2^octave: 4 octaves from 0 leave six digits of float32, 15 octaves two.

    Attributes:
      num_heads: number of heads.
      head_dim: width of a head; `None` = features of x / num_heads.
      frame: "key": rays are written in the frame of the camera that is attended to; "query": in that of the one that
        asks.
      pose_values: give the values their rays too, v_ij = W_v z_j + U_v e_ij(r_j).
      origin_octaves: first octave and number of octaves of the origins.
      direction_octaves: the same of the directions.
      use_bias: add biases to Q, K and V (the output always has one).
      dtype: compute dtype; `None` infers it from input and parameters. Poses, rays, their waves and the softmax are in
        float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W.
      rays_init: initialiser of U.
      bias_init: initialiser of the biases.

    Collections:
      The weights are sown as `attention_weights` in `intermediates`.

    Cost:
      That of attention, and V n D C multiply-accumulates for n tokens on the side whose rays change with the view, V
      views on the other, D = 6 octaves, width C. Rays are encoded for one view at a time, and again in the backward
      pass, so that memory does not grow by V n D.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.repast import RePAST
      >>> from jaxlayers.geometry.cameras import Views
      >>> layer, x = RePAST(num_heads=2), jnp.ones((1, 6, 12))
      >>> views = Views(jnp.broadcast_to(jnp.eye(4), (1, 2, 4, 4)), rays=jnp.ones((1, 6, 3)))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), x, views)[0].shape
      (1, 6, 12)

    Source:
      Safin, Duckworth, Sajjadi, RePAST: Relative Pose Attention Scene Representation Transformer, 2023,
      arXiv:2304.00947. Its authors published no code; frame, encoding and projections are those of the
      reimplementation in autonomousvision/gta, `source/layers.py` and `source/encoder.py`.

    Differs:
      Scores are divided by sqrt(d), which the reimplementation leaves out by default. `frame="query"` is the mirror
      image of what it does. Projections of features and of rays are kernels of their own, which are added: the same as
      one kernel on both. A token that may attend to nothing gets zeros before W_out.
    """

    num_heads: int
    head_dim: int | None = None
    frame: str = "key"
    pose_values: bool = False
    origin_octaves: tuple[int, int] = (-5, 15)
    direction_octaves: tuple[int, int] = (0, 15)
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    rays_init: Initializer = lecun_normal()
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
          views: their poses and rays.
          context: tokens that answer, of the same batch; `None` = x.
          context_views: the same for these; given with the context.
          mask: true where a token of x may attend to one of the context; broadcasts against
            `[*batch, heads, tokens, context_tokens]`. NaN poses give NaN wherever they are attended to or ask.

        Returns:
          Tokens like `x`.

        Raises:
          ValueError: if a field is wrong, shapes do not fit, rays are missing, or known poses are not rigid.
        """
        context, context_views = with_context(x, views, context, context_views)
        head_dim = self._head_dim(x.shape[-1])
        check_views(views, x.shape[:-1], rays=True)
        check_views(context_views, context.shape[:-1], rays=True)
        width = self.num_heads * head_dim
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        query, key, value = (
            dense(width, use_bias=self.use_bias, name=name)(tokens)
            for name, tokens in (("query", x), ("key", context), ("value", context))
        )
        names = ("query", "key", "value") if self.pose_values else ("query", "key")
        sizes = {"origin": 6 * self.origin_octaves[1], "direction": 6 * self.direction_octaves[1]}
        kernels = {
            f"{name}_{part}": _Kernel((size, width), self.param_dtype, self.rays_init, name=f"{name}_{part}")()
            for name in names
            for part, size in sizes.items()
        }

        def attend(module: nn.Module, query: Array, key: Array, value: Array, kernels: dict[str, Array]) -> Array:
            out, weights = self._attend(query, key, value, views, context_views, kernels, mask)
            module.sow("intermediates", "attention_weights", weights)
            return out

        out = remat.attention(attend, self, query, key, value, kernels)
        return dense(x.shape[-1], name="out")(merge_heads(axes.constrain_heads(out)))

    def _head_dim(self, features: int) -> int:
        if self.num_heads < 1 or (self.head_dim or 1) < 1:
            raise ValueError(f"num_heads={self.num_heads} and head_dim={self.head_dim} must be positive; set them")
        if self.head_dim is None and features % self.num_heads:
            raise ValueError(
                f"features={features} must be divisible by num_heads={self.num_heads}; set head_dim or num_heads"
            )
        if self.frame not in FRAMES:
            raise ValueError(f"frame={self.frame!r} must be one of {FRAMES}; set frame")
        if min(self.origin_octaves[1], self.direction_octaves[1]) < 1:
            raise ValueError(
                f"origin_octaves={self.origin_octaves} and direction_octaves={self.direction_octaves} must each name "
                "one octave or more; set their second number"
            )
        return self.head_dim or features // self.num_heads

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        views: Views,
        context_views: Views,
        kernels: Mapping[str, Array],
        mask: Array | None,
    ) -> tuple[Array, Array]:
        """Return what the heads find, `[*batch, heads, tokens, head_dim]`, and the weights."""
        dtype = compute_dtype(query, dtype=self.dtype)

        def rays(name: str, frame: Array, views: Views) -> Array:
            """Return U e(r) for the rays of all tokens of the views, `[*batch, tokens, width]`."""
            origins, directions = rays_from(frame, views)
            found = fourier_features(directions, *self.direction_octaves).astype(dtype)
            found = jnp.matmul(found, kernels[f"{name}_direction"].astype(dtype))
            shared = fourier_features(origins, *self.origin_octaves).astype(dtype)
            shared = jnp.matmul(shared, kernels[f"{name}_origin"].astype(dtype))
            return found + jnp.repeat(shared, found.shape[-2] // shared.shape[-2], axis=-2)

        def own(name: str, views: Views) -> Array:
            """Return the same with each token's ray in the frame of its own camera."""
            assert views.rays is not None
            batch = views.rays.shape[:-2]
            single = Views(
                jnp.broadcast_to(jnp.eye(4, dtype=views.extrinsics.dtype), (*batch, 1, 4, 4)), None, views.rays
            )
            return rays(name, single.extrinsics[..., 0, :, :], single)

        heads = functools.partial(split_heads, num_heads=self.num_heads)
        frames = context_views if self.frame == "key" else views
        fixed_name, moving_name = ("key", "query") if self.frame == "key" else ("query", "key")
        fixed, fixed_views = (key, context_views) if self.frame == "key" else (query, views)
        moving, moving_views = (query, views) if self.frame == "key" else (key, context_views)
        count = frames.extrinsics.shape[-3]
        fixed = axes.constrain_heads(heads(fixed + own(fixed_name, fixed_views)))
        poses = jnp.moveaxis(frames.extrinsics, -3, 0)

        def scores_of_view(arguments: tuple[Array, Array]) -> Array:
            pose, one = arguments
            other = axes.constrain_heads(heads(moving + rays(moving_name, pose, moving_views)))
            return jnp.einsum("...nd,...md->...nm", one, other)

        # [views, *batch, heads, tokens of a view, tokens of the other side]
        scores = _map_views(scores_of_view, (poses, _split_views(fixed, count)))
        scores = jnp.moveaxis(scores, 0, -3)
        scores = scores.reshape(*scores.shape[:-3], -1, scores.shape[-1])
        if self.frame == "key":
            scores = jnp.swapaxes(scores, -1, -2)
        wide = scores.astype(at_least_float32(scores.dtype)) * fixed.shape[-1] ** -0.5
        weights = attention_weights(wide, mask=mask).astype(dtype)
        if not self.pose_values:
            return jnp.matmul(weights, axes.constrain_heads(heads(value))), weights
        if self.frame == "key":
            return jnp.matmul(weights, axes.constrain_heads(heads(value + own("value", context_views)))), weights

        def values_of_view(arguments: tuple[Array, Array]) -> Array:
            pose, rows = arguments
            return jnp.matmul(rows, axes.constrain_heads(heads(value + rays("value", pose, context_views))))

        out = jnp.moveaxis(_map_views(values_of_view, (poses, _split_views(weights, count))), 0, -3)
        return out.reshape(*out.shape[:-3], -1, out.shape[-1]), weights


def _split_views(x: Array, views: int) -> Array:
    """Return `[*batch, heads, tokens, width]` as `[views, *batch, heads, tokens of a view, width]`."""
    *batch, tokens, width = x.shape
    return jnp.moveaxis(x.reshape(*batch, views, tokens // views, width), -3, 0)


def _map_views(fn: Callable[[Any], Array], arguments: Any) -> Array:
    """Return `fn` of one view after the other; the backward pass computes it anew."""
    return jax.lax.map(jax.checkpoint(fn, prevent_cse=False), arguments)


# The reimplementation in autonomousvision/gta -------------------------------------------------------------------------


def from_reference(tensors: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Return parameters of `RePAST` from the state dict of the reimplementation's `Attention`.

    Args:
      tensors: arrays by its names.
      params: parameters of our module (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      A parameter tree like `params`.

    Raises:
      ValueError: if names or shapes are not those of `params`.
    """
    tensors, table = dict(tensors), {"out": "to_out.0"}
    for name in ("query", "key", "value"):
        # One kernel on features, origins and directions, in this order.
        parts = [name, *(f"{name}_{part}" for part in ("origin", "direction") if f"{name}_{part}" in params)]
        table.update((part, part) for part in parts)
        for leaf in ("weight", "bias"):
            tensor = tensors.pop(f"to_{name[0]}.{leaf}", None)
            if tensor is None:
                continue
            # A bias belongs to the features alone.
            sizes = [np.shape(params[part]["kernel"])[0] for part in parts] if leaf == "weight" else []
            pieces = np.split(np.asarray(tensor), np.cumsum(sizes)[:-1].tolist(), axis=-1)
            tensors.update((f"{part}.{leaf}", piece) for part, piece in zip(parts, pieces, strict=leaf == "weight"))
    return reference.read_reference(tensors, params, table)


def _layout(model: RePAST, variables: Mapping[str, Any]) -> dialects.Layout:
    found: dict[str, tuple[int, ...]] = {}
    for name, leaves in variables["params"].items():
        part = name.partition("_")[0]
        theirs = "to_out.0" if part == "out" else f"to_{part[0]}"
        rows, columns = leaves["kernel"].shape[::-1]
        # Kernels on features, origins and directions stand side by side.
        found[f"{theirs}.weight"] = (rows, columns + found.get(f"{theirs}.weight", (0, 0))[1])
        if "bias" in leaves:
            found[f"{theirs}.bias"] = tuple(leaves["bias"].shape)
    return found


DIALECTS = (
    dialects.Dialect(
        name="reimplementation",
        origin="github.com/autonomousvision/gta, source/layers.py, one Attention with method repast",
        module=RePAST,
        read=dialects.from_shapes(from_reference),
        marks=(r"^to_q\.weight$", r"^to_k\.weight$", r"^to_v\.weight$", r"^to_out\.0\.weight$"),
        foreign=(r"^(?!to_(q|k|v|out\.0)\.)",),
        layout=_layout,
    ),
)
