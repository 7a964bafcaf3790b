"""Convolution over a Lie group, for points anywhere: a kernel of the logarithm of the step between lifted points.

Longer than most files, since lifting for seven groups, the layer, its block and the network belong to one paper.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxlayers.core import axes, dialects
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.safe import safe_norm, safe_normalize
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory
from jaxlayers.geometry import lie

#: Group: (dimension it acts on, angles, other coordinates, orbit coordinates); 0 takes any, -1 is as many as those.
_GROUPS = {
    "trivial": (0, 0, 0, -1),
    "T(d)": (0, 0, -1, 0),
    "SO(2)": (2, 1, 0, 1),
    "R x SO(2)": (2, 1, 1, 0),
    "SE(2)": (2, 1, 2, 0),
    "SO(3)": (3, 3, 0, 1),
    "SE(3)": (3, 3, 3, 0),
}
GROUPS = tuple(_GROUPS)

#: Groups whose elements are not told by the point alone, so that a point lifts to several.
STABILISED = ("SE(2)", "SO(3)", "SE(3)")

#: Numbers of rotations of the finite groups that `lift` takes for SE(3): halves, tetrahedron, cube, icosahedron.
_ROTATIONS = (1, 4, 12, 24, 60)

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


# Lifting ------------------------------------------------------------------------------------------------------------


class Elements(NamedTuple):
    """Group elements that carry an origin to points, and the orbits that the points lie in.

    Attributes:
      linear: `[*batch, m, d, d]` rotations, for R x SO(2) times the radius; `None` for groups without.
      translation: `[*batch, m, d]`, or `None`.
      orbit: `[*batch, m, q]` what tells orbits apart, or `None` where there is but one.
    """

    linear: jax.Array | None = None
    translation: jax.Array | None = None
    orbit: jax.Array | None = None


def lift(
    points: Float[Array, "*batch n d"], group: str, *, samples: int = 1, key: PRNGKeyArray | None = None
) -> Elements:
    """Return group elements u with u o = x for every point x, and the orbit of the point.

    The origin o is 0, or the first unit vector for SO(2), R x SO(2) and SO(3). Elements of one point differ by the
    rotations that leave o alone. With a `key` these are drawn from the Haar measure, for every point anew (SE(2): even
    steps from an angle drawn). Without, they are the same for all points: even steps of angles, and for SE(3) the
    rotations of a solid. SE(2) and SE(3) then commute with these rotations exactly. For SO(3) the first element of a
    point turns the first axis towards it by the shortest way (by way of the opposite axis in the other half space).

    Points at the centre of SO(2) and R x SO(2), which no rotation moves, lift to the zero matrix;
    `relative_coordinates` sees every step to or from them as zero, which keeps the symmetry. At the centre SO(3) takes
    the first axis for the direction, and the symmetry is lost for that point.

    Args:
      points: coordinates.
      group: one of `GROUPS`.
      samples: elements a point, for `STABILISED` groups; 1, 4, 12, 24 or 60 for SE(3) without a key.
      key: draws the elements.

    Returns:
      Elements with m = n samples, those of a point next to each other; in float32 or better.

    Raises:
      ValueError: on an unknown group, points of another dimension, or a number of samples that the group cannot give.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant.lie_conv import lift
      >>> lift(jnp.ones((5, 2)), "SE(2)", samples=4).linear.shape
      (20, 2, 2)
    """
    d = _dimension(group, points)
    if samples < 1 or (samples > 1 and group not in STABILISED):
        raise ValueError(
            f"samples={samples} must be {'at least 1' if samples < 1 else f'1 for group={group!r}'}; only "
            f"{STABILISED} lift a point to several elements; set samples"
        )
    if group == "SE(3)" and key is None and samples not in _ROTATIONS:
        raise ValueError(
            f"samples={samples} of group='SE(3)' must be one of {_ROTATIONS} where none are drawn; set samples"
        )
    points = points.astype(at_least_float32(compute_dtype(points)))
    shape, dtype = points.shape[:-1], points.dtype
    if group == "trivial":
        return Elements(orbit=points)
    if group == "T(d)":
        return Elements(translation=points)
    if d == 2 and group != "SE(2)":
        x = points if group == "R x SO(2)" else safe_normalize(points)
        linear = jnp.stack([x, jnp.stack([-x[..., 1], x[..., 0]], axis=-1)], axis=-1)
        return Elements(linear, None, None if group == "R x SO(2)" else safe_norm(points, keepdims=True))

    if group == "SE(3)":
        if key is None:
            turns = jnp.asarray(_rotation_group(samples), dtype)
        else:
            turns = _random_rotations(key, (*shape, samples), dtype)
    else:
        angles = 2 * jnp.pi * jnp.arange(samples, dtype=dtype) / samples
        if key is not None:
            angles = angles + jax.random.uniform(key, (*shape, 1), dtype, maxval=2 * jnp.pi)
        turns = lie.so2_exp(angles) if d == 2 else lie.so3_exp(angles[..., None] * jnp.eye(3, dtype=dtype)[0])
    if group == "SO(3)":
        turns = _einsum("...ij,...sjk->...sik", _towards(points), jnp.broadcast_to(turns, (*shape, samples, d, d)))
    turns = jnp.broadcast_to(turns, (*shape, samples, d, d)).reshape(*shape[:-1], -1, d, d)
    repeated = jnp.repeat(points, samples, axis=-2)
    if group == "SO(3)":
        return Elements(turns, None, safe_norm(repeated, keepdims=True))
    return Elements(turns, repeated, None)


def relative_coordinates(elements: Elements, group: str) -> Float[Array, "*batch m m coordinates"]:
    """Return log(v^-1 u) for the elements u (first axis) and v (second), then the orbits of u and of v.

    The logarithm is that of the group: angles first (see `jaxlayers.geometry.lie` for half turns), then what
    translates or scales. Nothing changes when all elements are multiplied from the left by one of the group.

    Args:
      elements: from `lift`.
      group: one of `GROUPS`.

    Returns:
      Coordinates of every pair.

    Raises:
      ValueError: on an unknown group.
    """
    _known(group)
    parts = []
    if group in ("SO(2)", "R x SO(2)", "SO(3)"):
        assert elements.linear is not None
        turn = _einsum("...vji,...ujk->...uvik", elements.linear, elements.linear)
        parts = [lie.so3_log(turn) if group == "SO(3)" else lie.so2_log(turn)[..., None]]
        if group == "R x SO(2)":
            square = jnp.sum(jnp.square(elements.linear[..., 0]), axis=-1)
            logarithm = jnp.log(jnp.where(square > 0, square, 1)) / 2
            away = (square[..., :, None] > 0) & (square[..., None, :] > 0)
            parts.append(jnp.where(away, logarithm[..., :, None] - logarithm[..., None, :], 0)[..., None])
    elif group != "trivial":
        assert elements.translation is not None
        step = elements.translation[..., :, None, :] - elements.translation[..., None, :, :]
        if group == "T(d)":
            parts = [step]
        else:
            assert elements.linear is not None
            turn = _einsum("...vji,...ujk->...uvik", elements.linear, elements.linear)
            motion = lie.rigid_matrix(turn, _einsum("...vji,...uvj->...uvi", elements.linear, step))
            parts = [lie.se2_log(motion) if group == "SE(2)" else lie.se3_log(motion)]
    if elements.orbit is not None:
        q = elements.orbit
        pairs = (*q.shape[:-1], q.shape[-2], q.shape[-1])
        parts += [jnp.broadcast_to(q[..., :, None, :], pairs), jnp.broadcast_to(q[..., None, :, :], pairs)]
    return jnp.concatenate(parts, axis=-1)


def group_distance(
    pairs: Float[Array, "*batch coordinates"], group: str, *, alpha: float = 0.2
) -> Float[Array, "*batch"]:
    """Return the distance of lifted points: alpha |angles| + (1 - alpha) (|other coordinates| + |step between orbits|).

    Groups without angles have the plain distance. It is the same from both sides and unchanged by the group.

    Args:
      pairs: from `relative_coordinates`.
      group: one of `GROUPS`.
      alpha: weight of angles in radians against lengths, in [0, 1].

    Returns:
      The distances, in float32 or better.

    Raises:
      ValueError: on an unknown group, or pairs that do not fit it.
    """
    angles, others, orbits = _split(pairs.astype(at_least_float32(pairs.dtype)), group)
    rest = safe_norm(others) + safe_norm(orbits[..., : orbits.shape[-1] // 2] - orbits[..., orbits.shape[-1] // 2 :])
    return alpha * safe_norm(angles) + (1 - alpha) * rest if angles.shape[-1] else rest


def ball_radius(
    points: Float[Array, "*batch n d"],
    group: str,
    fill: float,
    *,
    samples: int = 1,
    alpha: float = 0.2,
    mask: Bool[Array, "*batch n"] | None = None,
) -> Float[Array, ""]:
    """Return the radius within which a share `fill` of all pairs of lifted points lies.

    Args:
      points: some typical clouds.
      group: one of `GROUPS`.
      fill: the share, in (0, 1].
      samples: elements a point.
      alpha: see `group_distance`.
      mask: True = a point, False = padding.

    Returns:
      The radius, for `LieConv.radius`.

    Raises:
      ValueError: if `fill` is not in (0, 1], and as `lift`.
    """
    if not 0 < fill <= 1:
        raise ValueError(f"fill={fill} must lie in (0, 1]; set the share of pairs within the radius")
    distances = group_distance(relative_coordinates(lift(points, group, samples=samples), group), group, alpha=alpha)
    if mask is not None:
        mask = jnp.repeat(mask, samples, axis=-1)
        distances = jnp.where(mask[..., :, None] & mask[..., None, :], distances, jnp.nan)
    return jnp.nanquantile(distances, fill)


def _known(group: str) -> None:
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is unknown; use one of {GROUPS}")


def _dimension(group: str, points: jax.Array) -> int:
    _known(group)
    wanted = _GROUPS[group][0]
    if points.ndim < 2 or 0 in points.shape[-2:] or wanted not in (0, points.shape[-1]):
        raise ValueError(
            f"points of shape {points.shape} must be [*batch, n, {wanted or 'd'}] for group={group!r}; put the "
            "coordinates last"
        )
    return points.shape[-1]


def _split(pairs: jax.Array, group: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return angles, other coordinates and orbits of pairs."""
    _known(group)
    width = pairs.shape[-1]
    _, angles, others, orbits = _GROUPS[group]
    if group in ("trivial", "T(d)"):
        others, orbits = (0, width) if group == "trivial" else (width, 0)
        fits = width > 0 and (group == "T(d)" or width % 2 == 0)
    else:
        fits = width == angles + others + 2 * orbits
    if not fits:
        raise ValueError(
            f"pairs of shape {pairs.shape} must end in the coordinates of group={group!r}; make them by "
            "relative_coordinates"
        )
    return pairs[..., :angles], pairs[..., angles : angles + others], pairs[..., angles + others :]


@functools.cache
def _rotation_group(size: int) -> np.ndarray:
    """Return the rotations of the identity, the half turns, the tetrahedron, the cube or the icosahedron."""
    third = np.roll(np.eye(3), 1, axis=0)
    quarter = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    # A fifth of a turn about a corner of the icosahedron.
    axis, angle = np.array([0.0, 1.0, (1 + 5**0.5) / 2]), 2 * np.pi / 5
    axis /= np.linalg.norm(axis)
    cross = np.cross(np.eye(3), axis).T * -1.0
    fifth = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    halves = [np.diag([1.0, -1.0, -1.0]), np.diag([-1.0, -1.0, 1.0])]
    generators = {1: [], 4: halves, 12: [*halves, third], 24: [quarter, third], 60: [*halves, third, fifth]}[size]
    found = [np.eye(3)]
    for element in found:
        for generator in generators:
            product = generator @ element
            if not any(np.allclose(product, other, atol=1e-6) for other in found):
                found.append(product)
    assert len(found) == size
    return np.stack(found)


def _random_rotations(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw rotations from the Haar measure, by unit quaternions."""
    quaternion = jax.random.normal(key, (*shape, 4), dtype)
    quaternion = quaternion / jnp.linalg.norm(quaternion, axis=-1, keepdims=True)
    once = 2 * lie.cross_matrix(quaternion[..., 1:])
    return jnp.eye(3, dtype=dtype) + quaternion[..., :1, None] * once + _einsum("...ij,...jk->...ik", once, once) / 2


def _towards(points: jax.Array) -> jax.Array:
    """Return rotations that carry the first axis to the directions of the points."""
    first = jnp.eye(3, dtype=points.dtype)[0]
    centre = jnp.sum(jnp.square(points), axis=-1, keepdims=True) == 0
    direction = safe_normalize(jnp.where(centre, first, points))
    behind = direction[..., :1] < 0
    start = jnp.where(behind, -first, first)
    generator = lie.cross_matrix(jnp.cross(start, direction))
    twice = _einsum("...ij,...jk->...ik", generator, generator)
    turn = jnp.eye(3, dtype=points.dtype) + generator + twice / (1 + jnp.abs(direction[..., :1, None]))
    half = jnp.where(behind[..., None], jnp.asarray([-1.0, -1.0, 1.0], points.dtype), 1)
    return turn * half


# Layers -------------------------------------------------------------------------------------------------------------


class LieConv(nn.Module):
    """Convolve features on group elements with a learned function of the step between two elements.

    out_u = W [mean_{v in nbhd(u)} phi(log(v^-1 u), q_u, q_v) (x) f_v] + b, with elements u, v of the group, features f
    `[m, features]`, orbits q, a perceptron phi into `[basis]` with the nonlinearity after every layer, and W
    `[features x basis, out]`. That is a mean of k(log(v^-1 u)) f_v with the matrix-valued kernel k = W phi, which is
    never formed.

    Symmetry:
      Exact, to rounding, under any element of the group that multiplies all elements from the left: the coordinates of
      pairs do not change, so neither do the features that the elements carry. Exactly equivariant to permutations of
      the elements. Breaks where a distance is the radius, or two are tied for the last of the neighbours, to rounding.

    Attributes:
      features: width of the output.
      group: one of `GROUPS`.
      radius: of the neighbourhood, by `group_distance`; `None` for no bound. See `ball_radius`.
      neighbours: number of nearest elements in the neighbourhood, itself included; `None` for all.
      alpha: weight of angles in the distance, in [0, 1].
      kernel_features: widths of the perceptron; the last is the basis.
      activation_fn: its nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      For each of m^2 pairs (m x neighbours, if set) the perceptron and features x basis multiply-accumulates; for each
      of m elements features x basis x out. Coordinates of all pairs are held in memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.lie_conv import LieConv, lift, relative_coordinates
      >>> pairs = relative_coordinates(lift(jnp.ones((2, 5, 3)), "SE(3)", samples=4), "SE(3)")
      >>> layer = LieConv(features=8, group="SE(3)")
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), pairs, jnp.ones((2, 20, 6)))[0].shape
      (2, 20, 8)

    Source:
      Finzi, Stanton, Izmailov, Wilson, Generalizing Convolutional Neural Networks for Equivariance to Lie Groups on
      Arbitrary Continuous Data, ICML 2020; reference code mfinzi/LieConv, commit
      93affb18.

    Differs:
      The whole neighbourhood, or its nearest elements, instead of a random part of it; a fixed radius instead of one
      that follows the fill of the neighbourhoods during training. The bias is added after the mean, not divided with
      it. Orbits of SO(2) differ by their plain distance.
    """

    features: int
    group: str = "SE(3)"
    radius: float | None = None
    neighbours: int | None = None
    alpha: float = 0.2
    kernel_features: Sequence[int] = (32, 32, 16)
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        pairs: Float[Array, "*batch m m coordinates"],
        values: Float[Array, "*batch m in_features"],
        *,
        mask: Bool[Array, "*batch m"] | None = None,
    ) -> Float[Array, "*batch m features"]:
        """Convolve.

        Args:
          pairs: from `relative_coordinates`.
          values: features of the elements.
          mask: True = an element, False = padding, which gives nothing to others and comes out as zeros.

        Returns:
          Features of the elements. An element alone in its neighbourhood sees itself only. NaN spreads to all elements
          whose neighbourhood it may be in.

        Raises:
          ValueError: on an unknown group, pairs or a mask that do not fit, or fields out of their range.
        """
        if self.features < 1 or not self.kernel_features or min(self.kernel_features) < 1:
            raise ValueError(
                f"features={self.features} and kernel_features={tuple(self.kernel_features)} must be positive; set them"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]; set the weight of angles")
        if (self.radius is not None and self.radius < 0) or (self.neighbours is not None and self.neighbours < 1):
            raise ValueError(
                f"radius={self.radius} must not be negative and neighbours={self.neighbours} must be positive; set "
                "them, or None for no bound"
            )
        m = values.shape[-2] if values.ndim > 1 else 0
        if pairs.ndim < 3 or pairs.shape[-3:-1] != (m, m) or m == 0:
            raise ValueError(
                f"pairs of shape {pairs.shape} must be [*batch, m, m, coordinates] for values of shape "
                f"{values.shape}; make both from the same points"
            )
        if mask is not None and mask.shape != values.shape[:-1]:
            raise ValueError(f"mask of shape {mask.shape} must be that of the elements, {values.shape[:-1]}; repeat it")
        distances = group_distance(pairs, self.group, alpha=self.alpha)
        # NaN is near to all: what is no number must not be left out in silence.
        near = jnp.ones(distances.shape, bool) if self.radius is None else ~(distances > self.radius)
        if mask is not None:
            near = near & mask[..., :, None] & mask[..., None, :]
        sources = values[..., None, :, :]
        if self.neighbours is not None and self.neighbours < m:
            order = jnp.where(near, -distances, -jnp.inf)
            index = jax.lax.top_k(jax.lax.stop_gradient(order), self.neighbours)[1]
            near = jnp.take_along_axis(near, index, axis=-1)
            pairs = jnp.take_along_axis(pairs, index[..., None], axis=-2)
            sources = jnp.take_along_axis(sources, index[..., None], axis=-2)

        dtype = compute_dtype(values, pairs, dtype=self.dtype)
        # Padding may hold anything: neither its value nor its derivative may reach the others.
        weights = jnp.where(near[..., None], pairs, 0).astype(dtype)
        for layer, width in enumerate(self.kernel_features):
            weights = self.activation_fn(self._dense(width, f"kernel_{layer}")(weights))
        weights = jnp.where(near[..., None], weights, 0)
        if mask is not None:
            values = jnp.where(mask[..., None], values, 0)
            sources = jnp.where(near[..., None], sources, 0)
        sources = sources.astype(weights.dtype)
        if sources.shape[-3] == 1:
            moments = jnp.einsum("...uvb,...vc->...ucb", weights, sources[..., 0, :, :])
        else:
            moments = jnp.einsum("...uvb,...uvc->...ucb", weights, sources)
        count = jnp.maximum(jnp.sum(near, axis=-1), 1)
        moments = moments / count[..., None, None].astype(moments.dtype)
        out = self._dense(self.features, "out")(moments.reshape(*moments.shape[:-2], -1))
        return out if mask is None else jnp.where(mask[..., None], out, 0)

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(
            width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name=name,
        )


class LieBlock(nn.Module):
    """Add a convolution of fewer features to the input: the residual bottleneck of the paper.

    out = x + W_up act(norm(conv(act(norm(W_down act(norm(x))))))), with x `[m, in_features]` padded by zeros to the
    width of the output.

    Symmetry:
      That of the convolution.

    Attributes:
      features: width of the output, at least that of the input.
      hidden_features: width of the input of the convolution.
      conv: the convolution, called as `conv(pairs, values, mask=mask)`.
      norm: makes the normalisation of each element's features, or `None` for none.
      activation_fn: the nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      That of the convolution, and (in_features + features) x hidden_features multiply-accumulates an element.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.lie_conv import LieBlock, LieConv
      >>> block = LieBlock(features=8, hidden_features=2, conv=LieConv(features=2, group="T(d)"))
      >>> pairs, values = jnp.ones((5, 5, 3)), jnp.ones((5, 8))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), pairs, values)[0].shape
      (5, 8)

    Source:
      Finzi et al., ICML 2020, figure 5; reference code mfinzi/LieConv, `BottleBlock`.

    Differs:
      Layer instead of batch normalisation by default, so that a cloud does not depend on its batch.
    """

    features: int
    hidden_features: int
    conv: nn.Module
    norm: ModuleFactory | None = nn.LayerNorm
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        pairs: Float[Array, "*batch m m coordinates"],
        values: Float[Array, "*batch m in_features"],
        *,
        mask: Bool[Array, "*batch m"] | None = None,
    ) -> Float[Array, "*batch m features"]:
        """Apply the block.

        Args:
          pairs: from `relative_coordinates`.
          values: features of the elements.
          mask: True = an element, False = padding.

        Returns:
          Features of the elements; those of padding mean nothing.

        Raises:
          ValueError: if the output is narrower than the input, or the convolution raises it.
        """
        if self.features < values.shape[-1] or self.hidden_features < 1:
            raise ValueError(
                f"features={self.features} must be at least the {values.shape[-1]} of the input and "
                f"hidden_features={self.hidden_features} positive; set them"
            )

        def activate(x: jax.Array, name: str) -> jax.Array:
            if self.norm is not None:
                x = self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)
            return self.activation_fn(x)

        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        x = dense(self.hidden_features, name="reduce")(activate(values, "norm_in"))
        x = self.conv(pairs, activate(x, "norm_hidden"), mask=mask)
        x = dense(self.features, name="expand")(activate(x, "norm_out"))
        widened = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, self.features - values.shape[-1])])
        return axes.constrain_last(x + widened.astype(x.dtype), axes.BATCH, axes.NODES, axes.FEATURES)


class LieResNet(nn.Module):
    """Classify clouds of points with features, or every point, by convolutions over a Lie group.

    Points lift to group elements, their features with them; then come a linear embedding, residual blocks, norm and
    nonlinearity, a mean over the elements (of the cloud, or of each point) and a linear head.

    Symmetry:
      The output is invariant to `group` acting on the points: exact, to rounding, for T(d), SO(2) and R x SO(2), whose
      elements are told by the points. For SE(2), SE(3) and SO(3), with several elements a point, translations are
      exact and rotations exact in the limit of many samples: the error falls as samples^-1/2 for those drawn. SE(2)
      with `deterministic=True` is exact for turns by 2 pi / samples, SE(3) for the `samples` rotations of the solid.
      Untrained, on three points, the output changed under random rotations by 3.9e-3, 1.3e-3 and 5.6e-4 of its size
      with 2, 8 and 32 drawn elements of SE(3), and by 8.0e-3, 2.2e-4, 3.7e-5 and 4.6e-6 with 1, 12, 24 and 60 fixed.
      Exactly invariant (`pool`) or equivariant to permutations of the points. For where it breaks see `lift` and
      `LieConv`.

    Attributes:
      num_classes: number of outputs; 0 gives the features before the head.
      group: one of `GROUPS`.
      features: widths: of the embedding, then of each block; none below the one before, each divisible by 4.
      samples: elements a point, for `STABILISED` groups; see `lift`.
      radius: of the neighbourhoods, one for all blocks or one for each; `None` for no bound.
      neighbours: number of nearest elements in a neighbourhood; `None` for all.
      alpha: weight of angles in the distance, in [0, 1].
      kernel_features: widths of the perceptrons that are the kernels.
      pool: one output for the cloud; otherwise one for every point.
      norm: makes the normalisation of each element's features, or `None` for none.
      activation_fn: the nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters. Coordinates are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `lift`, when `deterministic=False` and the group is one of `STABILISED`.

    Cost:
      For each block and pair of the n samples elements (or n samples neighbours): see `LieConv`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.lie_conv import LieResNet
      >>> model = LieResNet(num_classes=3, group="SE(3)", features=(8, 8, 16), samples=4)
      >>> inputs = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)[0].shape
      (2, 3)

    Source:
      Finzi, Stanton, Izmailov, Wilson, ICML 2020; reference code mfinzi/LieConv, commit
      93affb18, `LieResNet`.

    Differs:
      As `LieConv` and `LieBlock`. No subsampling of points. Elements of a point are fixed when `deterministic`, so that
      the output is one function of the cloud. Half turns have a logarithm of fixed sign.
    """

    num_classes: int = 1
    group: str = "SE(3)"
    features: Sequence[int] = (64,) * 7
    samples: int = 1
    radius: float | Sequence[float] | None = None
    neighbours: int | None = None
    alpha: float = 0.2
    kernel_features: Sequence[int] = (32, 32, 16)
    pool: bool = True
    norm: ModuleFactory | None = nn.LayerNorm
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        points: Float[Array, "*batch n d"],
        values: Float[Array, "*batch n in_features"],
        *,
        mask: Bool[Array, "*batch n"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch outputs"] | Float[Array, "*batch n outputs"]:
        """Apply the network.

        Args:
          points: coordinates, in a unit in which neighbours are about 1 apart.
          values: features of the points; ones where there are none.
          mask: True = a point, False = padding.
          deterministic: lift each point to fixed elements; otherwise draw them.

        Returns:
          `[*batch, outputs]`, or `[*batch, n, outputs]` without `pool`, zeros where there is padding. A cloud of
          padding alone gives the bias of the head. NaN in a point comes out as NaN for its cloud.

        Raises:
          ValueError: on an unknown group, inputs of another shape, widths that do not fit, or as `lift`.
        """
        widths = tuple(self.features)
        if not widths or min(widths) < 4 or any(w % 4 for w in widths) or list(widths) != sorted(widths):
            raise ValueError(f"features={widths} must be multiples of 4 that do not fall; set them")
        if points.shape[:-1] != values.shape[:-1] or (mask is not None and mask.shape != points.shape[:-1]):
            raise ValueError(
                f"points {points.shape}, values {values.shape} and mask {None if mask is None else mask.shape} must "
                "agree in all axes but the coordinates and features; pass one row of values a point"
            )
        depth = len(widths) - 1
        radii = (self.radius,) * depth if isinstance(self.radius, (int, float, type(None))) else tuple(self.radius)
        if len(radii) != depth:
            raise ValueError(f"radius={self.radius} must be one number or {depth}, one for each block; set it")
        if mask is not None:
            points, values = (jnp.where(mask[..., None], x, 0) for x in (points, values))
        key = None if deterministic or self.group not in STABILISED else self.make_rng("lift")
        pairs = relative_coordinates(lift(points, self.group, samples=self.samples, key=key), self.group)
        lifted = None if mask is None else jnp.repeat(mask, self.samples, axis=-1)

        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        x = nn.Dense(widths[0], name="embed", **common)(jnp.repeat(values, self.samples, axis=-2))
        for index, (width, radius) in enumerate(zip(widths[1:], radii, strict=True)):
            conv = LieConv(
                width // 4,
                self.group,
                radius,
                self.neighbours,
                self.alpha,
                self.kernel_features,
                self.activation_fn,
                parent=None,
                **common,
            )
            x = LieBlock(
                width,
                x.shape[-1] // 4,
                conv,
                norm=self.norm,
                activation_fn=self.activation_fn,
                name=f"blocks_{index}",
                **common,
            )(pairs, x, mask=lifted)
        if self.norm is not None:
            x = self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm_out")(x)
        x = self.activation_fn(x)
        x = jnp.mean(x.reshape(*points.shape[:-1], self.samples, x.shape[-1]), axis=-2)
        if self.pool:
            if mask is None:
                x = jnp.mean(x, axis=-2)
            else:
                count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(x.dtype)
                x = jnp.sum(jnp.where(mask[..., None], x, 0), axis=-2) / count
        if self.num_classes:
            x = nn.Dense(self.num_classes, name="head", **common)(x)
        if mask is not None and not self.pool:
            x = jnp.where(mask[..., None], x, 0)
        return axes.constrain(x, axes.BATCH, *(None,) * (x.ndim - 1)) if x.ndim > 1 else x


def from_reference(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of `LieResNet` from the state dict of the reference's, both without normalisation.

    Biases of the convolutions, which the reference divides by the number of neighbours, must be zero there.

    Args:
      tensors: arrays by the reference's names.

    Returns:
      A parameter tree.

    Raises:
      ValueError: if names are missing, or a convolution has a bias.
    """
    places = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("net.")})

    def dense(name: str) -> dict[str, jax.Array]:
        if f"{name}.weight" not in tensors or f"{name}.bias" not in tensors:
            raise ValueError(f"the state dict must hold {name}.weight and {name}.bias; pass that of a LieResNet")
        return {
            "kernel": jnp.asarray(np.asarray(tensors[f"{name}.weight"]).T),
            "bias": jnp.asarray(tensors[f"{name}.bias"]),
        }

    params: dict[str, Any] = {"embed": dense("net.0.module"), "head": dense(f"net.{places[-1]}.module")}
    for index, place in enumerate(places[1:-1]):
        conv = f"net.{place}.conv"
        if np.any(np.asarray(tensors.get(f"{conv}.linear.bias", 0))):
            raise ValueError(f"{conv}.linear.bias must be zero, since the reference divides it; subtract it first")
        params[f"blocks_{index}"] = {
            "reduce": dense(f"net.{place}.net.2.module"),
            "conv": {
                "out": dense(f"{conv}.linear"),
                **{f"kernel_{layer}": dense(f"{conv}.weightnet.{3 * layer}.module") for layer in range(3)},
            },
            "expand": dense(f"net.{place}.net.8.module"),
        }
    return params


def _layout(model: LieResNet, variables: Mapping[str, Any]) -> dialects.Layout:
    # The reference counts the embedding, the blocks, a norm, a nonlinearity and the head.
    table = {"embed": "net.0.module", "head": f"net.{len(model.features) + 2}.module"}
    table |= {f"blocks/{ours}": f"{{block}}.{theirs}" for ours, theirs in _BLOCK.items()}
    counted = dialects.table_layout(
        table, rename=lambda name: re.sub(r"^\d+", lambda place: f"net.{int(place[0]) + 1}", name)
    )
    return counted(model, variables)


_BLOCK = {
    "reduce": "net.2.module",
    "expand": "net.8.module",
    "conv/out": "conv.linear",
    **{f"conv/kernel_{layer}": f"conv.weightnet.{3 * layer}.module" for layer in range(3)},
}
DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/mfinzi/LieConv, without normalisation",
        module=LieResNet,
        read=lambda tensors, model, inputs: {"params": from_reference(tensors)},
        marks=(r"^net\.0\.module\.weight$", r"^net\.1\.conv\.weightnet\.0\.module\.weight$"),
        layout=_layout,
        one_way="the reference divides biases of convolutions by the number of neighbours; they must be zero",
    ),
)


def _cloud(n: int, d: int, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((1, n, width), jnp.float32) for width in (d, channels))


VARIANTS: dict[str, dict[str, Any]] = {
    "lie_resnet_se3": {
        "module": LieResNet,
        "inputs": _cloud(18, 3, 15),
        "group": "SE(3)",
        "features": (256,) * 7,
        "samples": 4,
    },
    "lie_resnet_t3": {"module": LieResNet, "inputs": _cloud(18, 3, 15), "group": "T(d)", "features": (256,) * 7},
    "lie_resnet_se2": {
        "module": LieResNet,
        "inputs": _cloud(100, 2, 1),
        "num_classes": 10,
        "group": "SE(2)",
        "features": (128,) * 7,
        "samples": 4,
        "neighbours": 32,
    },
    "lie_resnet_r_so2": {
        "module": LieResNet,
        "inputs": _cloud(100, 2, 1),
        "num_classes": 10,
        "group": "R x SO(2)",
        "features": (128,) * 7,
        "neighbours": 32,
    },
}
