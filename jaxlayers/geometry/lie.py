"""Exponential and logarithm of rotations, rigid motions and stretches, with finite values and gradients everywhere.

Matrices act on column vectors. What a map divides by an angle is written as a function of the squared angle, with a
power series near zero. Computed in float32 or better; the result has the dtype of the input.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core.dtypes import widen

#: Half turns sit where logarithms jump, and rounding would choose their sign. So the jump lies this far beyond them, as
#: an angle in the plane, and as the cosine of half the angle in space.
CUT = 1e-3

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


# Rotations and motions of the plane ---------------------------------------------------------------------------------


def so2_exp(angle: Float[Array, "*batch"]) -> Float[Array, "*batch 2 2"]:
    """Return the matrix that turns by an angle in radians, from the first axis towards the second."""
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cosine, -sine], axis=-1), jnp.stack([sine, cosine], axis=-1)], axis=-2)


def so2_log(matrix: Float[Array, "*batch 2 2"]) -> Float[Array, "*batch"]:
    """Return the angle in (CUT - pi, CUT + pi] of the rotation nearest to a matrix; zero, with gradient zero, for none.

    A multiple of a rotation gives the angle of the rotation.
    """
    matrix, dtype = widen(matrix)
    sine = matrix[..., 1, 0] - matrix[..., 0, 1]
    cosine = matrix[..., 0, 0] + matrix[..., 1, 1]
    defined = (sine != 0) | (cosine != 0)
    angle = jnp.arctan2(jnp.where(defined, sine, 0), jnp.where(defined, cosine, 1))
    return jnp.where(angle <= CUT - jnp.pi, angle + 2 * jnp.pi, angle).astype(dtype)


def se2_exp(vector: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3 3"]:
    """Return the rigid motion of the plane with the coordinates (angle, two of the translation)."""
    vector, dtype = widen(vector)
    angle, u = vector[..., 0], vector[..., 1:]
    square = jnp.square(angle)
    along, across = _sinc(square)[..., None], (angle * _cosc(square))[..., None]
    return rigid_matrix(so2_exp(angle), along * u + across * _quarter_turn(u)).astype(dtype)


def se2_log(matrix: Float[Array, "*batch 3 3"]) -> Float[Array, "*batch 3"]:
    """Return the coordinates (angle, two of the translation) of a rigid motion; the angle as `so2_log` gives it."""
    matrix, dtype = widen(matrix)
    angle, t = so2_log(matrix[..., :2, :2]), matrix[..., :2, 2]
    square = jnp.square(angle)
    u = (1 - square * _half_cotangent(square))[..., None] * t - (angle / 2)[..., None] * _quarter_turn(t)
    return jnp.concatenate([angle[..., None], u], axis=-1).astype(dtype)


# Rotations and motions of space -------------------------------------------------------------------------------------


def so3_exp(vector: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3 3"]:
    """Return the rotation about a vector by its length in radians (Rodrigues)."""
    vector, dtype = widen(vector)
    square = jnp.sum(jnp.square(vector), axis=-1)[..., None, None]
    generator = cross_matrix(vector)
    twice = _einsum("...ij,...jk->...ik", generator, generator)
    return (jnp.eye(3, dtype=vector.dtype) + _sinc(square) * generator + _cosc(square) * twice).astype(dtype)


def so3_log(matrix: Float[Array, "*batch 3 3"]) -> Float[Array, "*batch 3"]:
    """Return the rotation vector: the axis times the angle in radians.

    The angle is at most pi, but for rotations within 2 `CUT` of half a turn: of their two axes they get the one whose
    first component of size above 0.1 is positive, so that rounding does not choose, and an angle up to pi + 2 `CUT`.
    """
    matrix, dtype = widen(matrix)
    m = [[matrix[..., i, j] for j in range(3)] for i in range(3)]
    trace = m[0][0] + m[1][1] + m[2][2]
    diagonal = [1 + trace, *(1 - trace + 2 * m[i][i] for i in range(3))]
    turn = [m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]]
    # Four times the outer product of the unit quaternion with itself; the row of its largest entry has no cancellation.
    rows = [
        [diagonal[0], *turn],
        [turn[0], diagonal[1], m[0][1] + m[1][0], m[0][2] + m[2][0]],
        [turn[1], m[0][1] + m[1][0], diagonal[2], m[1][2] + m[2][1]],
        [turn[2], m[0][2] + m[2][0], m[1][2] + m[2][1], diagonal[3]],
    ]
    outer = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    largest = jnp.argmax(jnp.stack(diagonal, axis=-1), axis=-1)
    row = jnp.take_along_axis(outer, largest[..., None, None], axis=-2)[..., 0, :]
    quaternion = row * jax.lax.rsqrt(jnp.sum(jnp.square(row), axis=-1, keepdims=True))
    cosine, axis = quaternion[..., 0], quaternion[..., 1:]
    leading = jnp.take_along_axis(axis, jnp.argmax(jnp.abs(axis) > 0.1, axis=-1)[..., None], axis=-1)[..., 0]
    sign = jnp.where(jnp.where(jnp.abs(cosine) < CUT, leading, cosine) < 0, -1, 1).astype(matrix.dtype)
    cosine, axis = sign * cosine, sign[..., None] * axis
    return (2 * _arc(jnp.sum(jnp.square(axis), axis=-1), cosine)[..., None] * axis).astype(dtype)


def se3_exp(vector: Float[Array, "*batch 6"]) -> Float[Array, "*batch 4 4"]:
    """Return the rigid motion of space with the coordinates (rotation vector, three of the translation)."""
    vector, dtype = widen(vector)
    w, u = vector[..., :3], vector[..., 3:]
    square = jnp.sum(jnp.square(w), axis=-1, keepdims=True)
    once = jnp.cross(w, u)
    t = u + _cosc(square) * once + _sincc(square) * jnp.cross(w, once)
    return rigid_matrix(so3_exp(w), t).astype(dtype)


def se3_log(matrix: Float[Array, "*batch 4 4"]) -> Float[Array, "*batch 6"]:
    """Return the coordinates (rotation vector, three of the translation) of a rigid motion, as for `so3_log`."""
    matrix, dtype = widen(matrix)
    w, t = so3_log(matrix[..., :3, :3]), matrix[..., :3, 3]
    square = jnp.sum(jnp.square(w), axis=-1, keepdims=True)
    once = jnp.cross(w, t)
    u = t - once / 2 + _half_cotangent(square) * jnp.cross(w, once)
    return jnp.concatenate([w, u], axis=-1).astype(dtype)


def cross_matrix(vector: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3 3"]:
    """Return the matrix of the cross product with a vector from the left."""
    x, y, z = (vector[..., i] for i in range(3))
    zero = jnp.zeros_like(x)
    rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


# Stretches and the polar decomposition ------------------------------------------------------------------------------


def symmetric_exp(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Return the exponential of symmetric matrices; the derivative is exact at repeated eigenvalues too."""
    matrix, dtype = widen(matrix)
    return _spectral(matrix, False).astype(dtype)


def symmetric_log(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Return the logarithm of symmetric positive matrices; the derivative is exact at repeated eigenvalues too."""
    matrix, dtype = widen(matrix)
    return _spectral(matrix, True).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _spectral(matrix: jax.Array, logarithm: bool) -> jax.Array:
    values, vectors = jnp.linalg.eigh(matrix)
    return _einsum("...ij,...j,...kj->...ik", vectors, jnp.log(values) if logarithm else jnp.exp(values), vectors)


@_spectral.defjvp
def _spectral_jvp(logarithm: bool, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    values, vectors = jnp.linalg.eigh(primals[0])
    change = (tangents[0] + jnp.swapaxes(tangents[0], -1, -2)) / 2
    change = _einsum("...ji,...jk,...kl->...il", vectors, change, vectors)
    gaps = values[..., :, None] - values[..., None, :]
    sums = values[..., :, None] + values[..., None, :]
    # The divided differences of Daleckii and Krein, in forms without cancellation.
    if logarithm:
        quotients, mapped = 2 * _arctanhc(jnp.square(gaps / sums)) / sums, jnp.log(values)
    else:
        quotients, mapped = jnp.exp(sums / 2) * _sinhc(jnp.square(gaps / 2)), jnp.exp(values)
    out = _einsum("...ij,...j,...kj->...ik", vectors, mapped, vectors)
    return out, _einsum("...ij,...jk,...lk->...il", vectors, quotients * change, vectors)


def polar(matrix: Float[Array, "*batch n n"]) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    """Return the rotation R and the symmetric S of matrices R exp(S) with positive determinant.

    Both depend smoothly on the matrix, also where singular values are equal. With a negative determinant R comes out
    improper for n above 2; for n = 2 the result is NaN. In the plane both are in closed form; else S by way of the
    square of the matrix, which doubles the logarithm of its condition.

    Raises:
      ValueError: if the matrices are not square.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix of shape {matrix.shape} must be [*batch, n, n]; pass square matrices")
    matrix, dtype = widen(matrix)
    if matrix.shape[-1] == 2:
        rotation = so2_exp(so2_log(matrix))
        stretch = _einsum("...ji,...jk->...ik", rotation, matrix)
        mean = (stretch[..., 0, 0] + stretch[..., 1, 1]) / 2
        difference = (stretch[..., 0, 0] - stretch[..., 1, 1]) / 2
        shear = (stretch[..., 0, 1] + stretch[..., 1, 0]) / 2
        determinant = matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]
        slope = _arctanhc((jnp.square(difference) + jnp.square(shear)) / jnp.square(mean)) / mean
        centre = jnp.log(determinant) / 2
        rows = [[centre + slope * difference, slope * shear], [slope * shear, centre - slope * difference]]
        logarithm = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    else:
        logarithm = symmetric_log(_einsum("...ji,...jk->...ik", matrix, matrix)) / 2
        rotation = _einsum("...ij,...jk->...ik", matrix, symmetric_exp(-logarithm))
    return rotation.astype(dtype), logarithm.astype(dtype)


def log_haar_density(stretch: Float[Array, "*batch n n"]) -> Float[Array, "*batch"]:
    """Return the logarithm of the density of the Haar measure of GL+(n) or SL(n) in polar coordinates.

    dg = dR  prod_{i<j} sinh(s_i - s_j) / (s_i - s_j)  dS for g = R exp(S) or exp(S) R, with s the eigenvalues of S, dR
    the Haar measure of the rotations and dS the Lebesgue measure of the symmetric (for SL(n), traceless) matrices. The
    measure is the same from both sides. The density is 1 at S = 0, where it has its minimum.
    """
    stretch, dtype = widen(stretch)
    if stretch.shape[-1] == 2:
        squares = jnp.square(stretch[..., 0, 0] - stretch[..., 1, 1]) + 4 * jnp.square(stretch[..., 0, 1])
        return _log_sinhc(squares).astype(dtype)
    values = jnp.linalg.eigvalsh(stretch)
    upper, lower = jnp.triu_indices(stretch.shape[-1], 1)
    return jnp.sum(_log_sinhc(jnp.square(values[..., upper] - values[..., lower])), axis=-1).astype(dtype)


# Functions of a square ----------------------------------------------------------------------------------------------


def _series(square: jax.Array, coefficients: Sequence[float]) -> jax.Array:
    total = jnp.full_like(square, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * square + coefficient
    return total


def _near(square: jax.Array, threshold: float, coefficients: Sequence[float]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return whether the square is small, the series where it is, and a root that is safe where it is."""
    small = square < threshold
    return small, _series(jnp.where(small, square, 0), coefficients), jnp.sqrt(jnp.where(small, 1, square))


def _sinc(square: jax.Array) -> jax.Array:
    """sin(x) / x."""
    small, series, x = _near(square, 0.05, (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800))
    return jnp.where(small, series, jnp.sin(x) / x)


def _cosc(square: jax.Array) -> jax.Array:
    """(1 - cos(x)) / x^2."""
    return jnp.square(_sinc(square / 4)) / 2


def _sincc(square: jax.Array) -> jax.Array:
    """(x - sin(x)) / x^3."""
    coefficients = (1 / 6, -1 / 120, 1 / 5040, -1 / 362880, 1 / 39916800, -1 / 6227020800, 1 / 1307674368000)
    small, series, x = _near(square, 0.5, coefficients)
    return jnp.where(small, series, (x - jnp.sin(x)) / x**3)


def _half_cotangent(square: jax.Array) -> jax.Array:
    """(1 - (x / 2) cot(x / 2)) / x^2, for x below 2 pi."""
    coefficients = (1 / 12, 1 / 720, 1 / 30240, 1 / 1209600, 1 / 47900160, 691 / 1307674368000, 1 / 74724249600)
    small, series, x = _near(square, 0.5, coefficients)
    return jnp.where(small, series, (1 - x / 2 * jnp.cos(x / 2) / jnp.sin(x / 2)) / x**2)


def _arc(square: jax.Array, cosine: jax.Array) -> jax.Array:
    """a / sin(a), for the angle a with that squared sine and cosine."""
    coefficients = (1.0, 1 / 6, 3 / 40, 5 / 112, 35 / 1152, 63 / 2816, 231 / 13312)
    small, series, sine = _near(square, 0.01, coefficients)
    return jnp.where(small, series, jnp.arctan2(sine, cosine) / sine)


def _arctanhc(square: jax.Array) -> jax.Array:
    """artanh(x) / x."""
    small, series, x = _near(square, 0.01, tuple(1 / (2 * k + 1) for k in range(8)))
    return jnp.where(small, series, jnp.arctanh(x * jnp.where(small, 0.5, 1)) / x)


def _sinhc(square: jax.Array) -> jax.Array:
    """sinh(x) / x."""
    small, series, x = _near(square, 0.05, (1.0, 1 / 6, 1 / 120, 1 / 5040, 1 / 362880, 1 / 39916800))
    return jnp.where(small, series, jnp.sinh(x) / x)


def _log_sinhc(square: jax.Array) -> jax.Array:
    """log(sinh(x) / x), without overflow."""
    small, series, x = _near(square, 0.05, (0.0, 1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250))
    return jnp.where(small, series, x + jnp.log1p(-jnp.exp(-2 * x)) - jnp.log(2 * x))


def _quarter_turn(vector: jax.Array) -> jax.Array:
    return jnp.stack([-vector[..., 1], vector[..., 0]], axis=-1)


def rigid_matrix(
    rotation: Float[Array, "*batch d d"], translation: Float[Array, "*batch d"]
) -> Float[Array, "*batch e e"]:
    """Return the matrices, of one row and column more, that turn and then move."""
    top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    last = jnp.zeros_like(top[..., :1, :]).at[..., 0, -1].set(1)
    return jnp.concatenate([top, last], axis=-2)
