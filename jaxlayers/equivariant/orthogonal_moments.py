"""Orthogonal moments on the disc: coefficients that a rotation only turns in phase, and the invariants made of them."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.safe import safe_divide
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory

KINDS = ("zernike", "pseudo_zernike", "fourier_mellin")
DISKS = ("inscribed", "circumscribed")
INVARIANTS = ("magnitudes", "products", "chiral")


# The basis, in NumPy and float64 -------------------------------------------------------------------------------------


def moment_indices(order: int, kind: str = "zernike") -> tuple[tuple[int, int], ...]:
    """Return the pairs (n, m) of degree n and angular frequency m >= 0 up to an order, sorted.

    Of a real image the moment of -m is the complex conjugate of that of m, so m >= 0 says all.

    Args:
      order: largest n; at least 0.
      kind: `"zernike"` (m <= n, n - m even), `"pseudo_zernike"` (m <= n) or `"fourier_mellin"` (m <= order).

    Returns:
      The pairs.

    Raises:
      ValueError: on an unknown kind or a negative order.

    Example:
      >>> moment_indices(2, "zernike")
      ((0, 0), (1, 1), (2, 0), (2, 2))
    """
    _check(order, kind)
    pairs = [(n, m) for n in range(order + 1) for m in range(order + 1)]
    if kind == "zernike":
        pairs = [(n, m) for n, m in pairs if m <= n and (n - m) % 2 == 0]
    elif kind == "pseudo_zernike":
        pairs = [(n, m) for n, m in pairs if m <= n]
    return tuple(pairs)


def radial_polynomial(n: int, m: int, radius: np.ndarray, kind: str = "zernike") -> np.ndarray:
    """Return R_nm(r) in float64, by the three-term recurrence of the Jacobi polynomials P_k^(0,b).

    Zernike: r^m P_{(n-m)/2}^(0,m)(2 r^2 - 1). Pseudo-Zernike: r^m P_{n-m}^(0,2m+1)(2 r - 1). Fourier-Mellin:
    P_n^(0,1)(2 r - 1), whatever m. All have R(1) = 1 and the integral of R_nm R_n'm r over [0, 1] is
    1 / (2 (n + 1)) for n = n', else 0. The sums of factorials that the papers print cancel: in float64 they lose all
    digits near n = 50, the recurrence none.

    Args:
      n: degree.
      m: angular frequency; its sign is ignored.
      radius: any shape, within [0, 1].
      kind: see `moment_indices`.

    Returns:
      An array of the shape of `radius`.

    Raises:
      ValueError: if there is no such polynomial.
    """
    _check(n, kind)
    r, m = np.asarray(radius, np.float64), abs(m)
    if kind != "fourier_mellin" and (m > n or (kind == "zernike" and (n - m) % 2)):
        even = " and n - m even" if kind == "zernike" else ""
        raise ValueError(f"n={n}, m={m} is no {kind} moment, which needs |m| <= n{even}; see moment_indices")
    if kind == "zernike":
        return r**m * _jacobi((n - m) // 2, m, 2 * r * r - 1)
    if kind == "pseudo_zernike":
        return r**m * _jacobi(n - m, 2 * m + 1, 2 * r - 1)
    return _jacobi(n, 1, 2 * r - 1)


def _jacobi(degree: int, b: int, x: np.ndarray) -> np.ndarray:
    """Return P_degree^(0,b)(x), divided by nothing: its value at -1 is +-binomial(degree + b, b), at 1 it is 1."""
    before, value = np.zeros_like(x), np.ones_like(x)
    for k in range(1, degree + 1):
        c = 2 * k + b
        # k (k + b) (c - 2) P_k = (c - 1)/2 (c (c - 2) x - b^2) P_{k-1} - (k - 1)(k + b - 1) c P_{k-2}; for k = 1 and
        # b = 0 both sides vanish, and P_1 is x.
        if k == 1:
            after = ((b + 2) * x - b) / 2
        else:
            after = ((c - 1) * (c * (c - 2) * x - b * b) * value - 2 * (k - 1) * (k + b - 1) * c * before) / (
                2 * k * (k + b) * (c - 2)
            )
        before, value = value, after
    return value


@functools.lru_cache(maxsize=64)
def moment_basis(
    height: int,
    width: int,
    order: int,
    kind: str = "zernike",
    disk: str = "inscribed",
    quadrature: int = 4,
) -> np.ndarray:
    """Return what `orthogonal_moments` multiplies the pixels with: the integral of conj(V_nm) over each pixel.

    V_nm = R_nm(r) exp(i m theta). The pixels are squares that fill the image; each is cut into `quadrature` x
    `quadrature` parts, and the parts whose centre lies in the disc count with their area, so a pixel on the rim counts
    by the share of it that is inside.

    Args:
      height: rows.
      width: columns.
      order: largest n.
      kind: see `moment_indices`.
      disk: `"inscribed"`, the disc that touches the nearer edges of the image: what is outside is not seen.
        `"circumscribed"`, the disc through the corners: everything is seen, but the disc is not filled.
      quadrature: parts of a pixel in each direction.

    Returns:
      complex128 `[moments, height, width]`, read-only, in the order of `moment_indices`; the factor (n + 1) / pi is
      part of it.

    Raises:
      ValueError: on an unknown name, or a size that is not positive.
    """
    pairs = moment_indices(order, kind)
    values, weight = _functions(height, width, pairs, kind, disk, quadrature)
    basis = np.stack([(n + 1) / np.pi * np.conj(value) for (n, _), value in zip(pairs, values, strict=True)]) * weight
    basis = basis.reshape(len(pairs), height, quadrature, width, quadrature).sum(axis=(2, 4))
    basis.setflags(write=False)
    return basis


def _functions(
    height: int, width: int, pairs: Sequence[tuple[int, int]], kind: str, disk: str, quadrature: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return V_nm at the centres of the parts of the pixels, and the area of each part that lies in the disc."""
    if disk not in DISKS:
        raise ValueError(f"disk={disk!r} is unknown; use one of {DISKS}")
    if min(height, width, quadrature) < 1:
        raise ValueError(
            f"an image of {height} x {width} pixels and quadrature={quadrature} must be positive; set them"
        )
    scale = 2 / (min(height, width) if disk == "inscribed" else math.hypot(height, width)) / quadrature

    def centred(size: int) -> np.ndarray:
        return (np.arange(size * quadrature) - (size * quadrature - 1) / 2) * scale

    # Rows run downwards, and angles counterclockwise from the right.
    y, x = -centred(height)[:, None], centred(width)[None, :]
    radius = np.hypot(x, y)
    inside = radius <= 1 + 1e-12
    # Cosine and sine by division, so that a quarter turn of the grid exchanges them to the last bit.
    unit = (x + 1j * y) / np.where(radius > 0, radius, 1)
    inner = np.where(inside, radius, 0)
    values, radial = [], {}
    for n, m in pairs:
        key = (n, 0 if kind == "fourier_mellin" else m)
        if key not in radial:
            radial[key] = radial_polynomial(*key, inner, kind)
        # The angle has no value at the centre, where every angular mean is that of m = 0.
        values.append(radial[key] * (unit**m if m == 0 else np.where(radius > 0, unit**m, 0)))
    return values, inside * scale**2


# Moments of images ---------------------------------------------------------------------------------------------------


def orthogonal_moments(
    image: Float[Array, "*batch height width channels"],
    order: int,
    kind: str = "zernike",
    *,
    disk: str = "inscribed",
    quadrature: int = 4,
) -> Complex[Array, "*batch channels moments"]:
    """Return Z_nm = (n + 1) / pi times the integral of f(r, theta) R_nm(r) exp(-i m theta) over the unit disc.

    Turning the image counterclockwise by a multiplies Z_nm by exp(-i m a); mirroring left and right gives
    (-1)^m conj(Z_nm). Quarter turns and mirrorings of a square image are exact, other angles hold up to sampling.

    Args:
      image: real. NaN anywhere in the disc makes all moments of its channel NaN.
      order: largest n.
      kind: see `moment_indices`.
      disk: see `moment_basis`.
      quadrature: see `moment_basis`.

    Returns:
      Complex moments in the order of `moment_indices`, in complex64, or complex128 for a float64 image.

    Raises:
      ValueError: on an image of a wrong rank or without pixels, or an unknown name.

    Example:
      >>> import jax.numpy as jnp
      >>> moments = orthogonal_moments(jnp.ones((8, 8, 1)), 2)
      >>> [round(float(abs(z)), 2) for z in moments[0]]
      [1.01, 0.0, 0.03, 0.0]
    """
    real, imaginary = _moment_parts(image, order, kind, disk, quadrature)
    return jax.lax.complex(real, imaginary)


def _moment_parts(image: jax.Array, order: int, kind: str, disk: str, quadrature: int) -> tuple[jax.Array, jax.Array]:
    """Return real and imaginary parts of the moments, `[*batch, channels, moments]`, in float32 or better."""
    if image.ndim < 3:
        raise ValueError(f"an image of shape {image.shape} must be [*batch, height, width, channels]; add axes")
    if jnp.issubdtype(image.dtype, jnp.complexfloating):
        raise ValueError(f"an image of {image.dtype} must be real; pass its real and imaginary parts as two channels")
    dtype = at_least_float32(compute_dtype(image))
    basis = moment_basis(*image.shape[-3:-1], order, kind, disk, quadrature)
    real, imaginary = (
        jnp.einsum("...hwc,khw->...ck", image.astype(dtype), jnp.asarray(part, dtype), precision="highest")
        for part in (basis.real, basis.imag)
    )
    return real, imaginary


def reconstruct(
    moments: Complex[Array, "*batch channels moments"],
    shape: tuple[int, int],
    order: int,
    kind: str = "zernike",
    *,
    disk: str = "inscribed",
    quadrature: int = 4,
) -> Float[Array, "*batch height width channels"]:
    """Return sum_nm Z_nm V_nm over m of either sign: the image that the moments up to an order say.

    Each pixel is the mean over its parts inside the disc, and zero outside. The sum is the best approximation in the
    mean square over the disc, so the error falls with the order, until it is so high that the pixels no longer resolve
    the basis (n of about half the pixels across).

    Args:
      moments: of `orthogonal_moments`.
      shape: height and width.
      order: largest n, as for the moments.
      kind: as for the moments.
      disk: as for the moments.
      quadrature: as for the moments.

    Returns:
      Real images.

    Raises:
      ValueError: if the number of moments is not that of the order, or on an unknown name.
    """
    pairs = moment_indices(order, kind)
    if moments.shape[-1] != len(pairs):
        raise ValueError(
            f"{moments.shape[-1]} moments must be the {len(pairs)} of kind={kind!r} up to order={order}; pass the "
            "order and kind that they were computed with"
        )
    values, weight = _functions(*shape, pairs, kind, disk, quadrature)

    def pixels(x: np.ndarray) -> np.ndarray:
        return x.reshape(shape[0], quadrature, shape[1], quadrature).sum(axis=(1, 3))

    area = pixels(weight)
    # A moment with m > 0 stands for that with -m too, its conjugate.
    synthesis = np.stack(
        [
            (1 if m == 0 else 2) * pixels(value * weight) / np.where(area > 0, area, 1)
            for (_, m), value in zip(pairs, values, strict=True)
        ]
    )
    real, imaginary = jnp.real(moments), jnp.imag(moments)
    total = jnp.einsum("...ck,khw->...hwc", real, jnp.asarray(synthesis.real, real.dtype), precision="highest")
    return total - jnp.einsum(
        "...ck,khw->...hwc", imaginary, jnp.asarray(synthesis.imag, real.dtype), precision="highest"
    )


# Layers --------------------------------------------------------------------------------------------------------------


class MomentInvariants(nn.Module):
    """Turn maps into numbers that no rotation changes: the magnitudes of their orthogonal moments on the disc.

    Z_nm = (n + 1) / pi sum_pixels f(r, theta) R_nm(r) exp(-i m theta) dA, out = |Z_nm| for every channel and every
    (n, m) with m >= 0. Two moments of one m turn by the same phase, so Z_nm conj(Z_n'm) is invariant as well: with
    `"products"` the numbers Re(Z_nm conj(Z_n'm)) / sqrt(|Z_nm|^2 + |Z_n'm|^2) of neighbours n' < n are added, with
    `"chiral"` the imaginary parts too. The layer has no parameters; it stands between an equivariant map and a dense
    head, where others pool globally.

    Symmetry:
      D4, the quarter turns and mirrorings of square images, exactly; C4 alone with `"chiral"`, whose imaginary parts
      change sign with a mirroring. Other rotations up to sampling: for a smooth picture that vanishes towards the rim,
      turned by 0.7 rad, the |Z| up to order 8 changed by 7.5e-5, 3.9e-6 and 6.1e-7 of the largest at 16, 32 and 64
      pixels across (Zernike; 1.1e-2, 5.6e-5 and 1.4e-6 for pseudo-Zernike). Fourier-Mellin functions jump at the
      centre, and gave 1.0e-1, 5.1e-2 and 1.7e-2, which falls with `quadrature` too. For a picture that goes on beyond
      the rim, whose pixels are cut there, the figures are 9e-3, 1e-3 and 3e-3 for Zernike.
      Translations are not covered. The channels must be scalars: a rotation that permutes channels too (a regular
      field of a group convolution) permutes the magnitudes, so pool the axis of the group first.
      Where it breaks: on images that are not square only half turns and mirrorings are exact, since a quarter turn
      exchanges their sides.

    Attributes:
      order: largest degree n; at least 0. Beyond about half the pixels across the basis is no longer resolved.
      kind: `"zernike"`, `"pseudo_zernike"` (twice as many of one order) or `"fourier_mellin"` (four times).
      invariants: `"magnitudes"`, `"products"` (with the relative phases) or `"chiral"` (with their handedness).
      disk: `"inscribed"`, which ignores the corners of the image, or `"circumscribed"`.
      quadrature: parts in each direction that a pixel is cut into, to integrate the basis over it.
      dtype: dtype of the output; `None` keeps that of the input. Moments are computed in float32 or better.

    Cost:
      2 x moments x height x width multiply-accumulates for each channel; about order^2 / 4 moments for Zernike.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import MomentInvariants
      >>> image = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
      >>> layer = MomentInvariants(order=4)
      >>> features = layer.apply({}, image)
      >>> features.shape, bool(jnp.allclose(features, layer.apply({}, jnp.rot90(image, axes=(1, 2))), atol=1e-5))
      ((1, 27), True)

    Source:
      Singh, Singh, Rana, Learning Invariant Representations for Equivariant Neural Networks Using Orthogonal Moments,
      IJCNN 2022. Polynomials: Zernike, Physica 1934; Bhatia and Wolf, 1954 (pseudo-Zernike); Sheng and Shen, JOSA A
      1994 (Fourier-Mellin).

    Differs:
      The basis is integrated over each pixel, in place of its value at the centre, and by a recurrence, in place of
      factorials. Relative phases are an addition. No code of the authors was found; the values are held to the
      factorial formula in exact arithmetic and to mahotas.
    """

    order: int = 8
    kind: str = "zernike"
    invariants: str = "magnitudes"
    disk: str = "inscribed"
    quadrature: int = 4
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch outputs"]:
        """Compute the invariants.

        Args:
          inputs: real maps of scalar channels. A map that vanishes gives zeros, with zero gradient; one NaN in the
            disc makes the invariants of its channel NaN.

        Returns:
          For every channel in turn the magnitudes in the order of `moment_indices`, then the real and the imaginary
          products. Their number does not depend on the size of the maps.

        Raises:
          ValueError: if the inputs are no real maps, or a name or size is not valid.
        """
        if self.invariants not in INVARIANTS:
            raise ValueError(f"invariants={self.invariants!r} is unknown; use one of {INVARIANTS}")
        real, imaginary = _moment_parts(inputs, self.order, self.kind, self.disk, self.quadrature)
        parts = jnp.stack([real, imaginary], axis=-1)
        magnitudes = _norm(parts)
        found = [magnitudes]
        pairs = _neighbours(self.order, self.kind)
        if self.invariants != "magnitudes" and pairs:
            later, earlier = (np.array(index) for index in zip(*pairs, strict=True))
            a, b = parts[..., later, :], parts[..., earlier, :]
            # The root keeps the invariant of degree one in the image, like the magnitudes, with a bounded slope.
            size = _norm(jnp.stack([magnitudes[..., later], magnitudes[..., earlier]], axis=-1))
            found.append(safe_divide(jnp.sum(a * b, axis=-1), size))
            if self.invariants == "chiral":
                # Where m = 0 both are real.
                turning = np.array([moment_indices(self.order, self.kind)[i][1] > 0 for i in later])
                cross = a[..., 1] * b[..., 0] - a[..., 0] * b[..., 1]
                found.append(safe_divide(cross, size)[..., turning])
        out = jnp.concatenate(found, axis=-1)
        out = out.reshape(*out.shape[:-2], -1).astype(compute_dtype(inputs, dtype=self.dtype))
        return axes.constrain_last(out, axes.BATCH, axes.FEATURES)


def _norm(x: jax.Array) -> jax.Array:
    """Return the norm along the last axis, with gradient zero at a zero vector; NaN stays NaN."""
    squared = jnp.sum(jnp.square(x), axis=-1)
    vanishes = squared == 0
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, squared)))


def _neighbours(order: int, kind: str) -> list[tuple[int, int]]:
    """Return the places of each (n, m) and of the next lower n of the same m, where there is one."""
    last: dict[int, int] = {}
    pairs = []
    for place, (_, m) in enumerate(moment_indices(order, kind)):
        if m in last:
            pairs.append((place, last[m]))
        last[m] = place
    return pairs


class MomentNet(nn.Module):
    """Classify images by the moment invariants of the maps of an equivariant body.

    logits = W_head act(W_i ... norm(invariants(body(x)))), with maps body(x) `[*batch, height, width, channels]`.

    Symmetry:
      Invariant to those rotations and mirrorings that the body is equivariant to, as a map of scalar fields, and that
      `invariants` covers. A body of ordinary convolutions knows none; one whose kernels are symmetric, or a group
      convolution pooled over its group, knows D4 or C4 exactly if its strides and paddings do.

    Attributes:
      body: module from images to maps; the identity if `None`, which gives the classical moment classifier.
      invariants: module from maps to features, such as `MomentInvariants` or, as a control, one that flattens.
      num_classes: number of logits; 0 gives the features before the head.
      hidden_features: widths of the dense layers between; may be empty.
      activation_fn: the nonlinearity after each of them.
      norm: makes the normalisation of the invariants, whose sizes differ much, or `None` for none.
      dropout_rate: dropout before the head, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of the body and of the invariants, and a dense layer of channels x moments inputs.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import MomentNet
      >>> model = MomentNet(body=nn.Conv(4, (3, 3)), num_classes=10)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 12, 12, 1)))[0].shape
      (2, 10)

    Source:
      Singh, Singh, Rana, Learning Invariant Representations for Equivariant Neural Networks Using Orthogonal Moments,
      IJCNN 2022.

    Differs:
      The body is a part that is handed in; layer normalisation in front of the dense layers.
    """

    body: nn.Module | None = None
    invariants: nn.Module = MomentInvariants()
    num_classes: int = 10
    hidden_features: Sequence[int] = ()
    activation_fn: ActivationFn = nn.relu
    norm: ModuleFactory | None = nn.LayerNorm
    dropout_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch outputs"]:
        """Classify images.

        Args:
          inputs: real images.
          deterministic: no dropout.

        Returns:
          Logits, or features if `num_classes` is 0.

        Raises:
          ValueError: if the inputs or the body's outputs are no maps, or a width is not positive.
        """
        if inputs.ndim < 3:
            raise ValueError(f"an image of shape {inputs.shape} must be [*batch, height, width, channels]; add axes")
        if self.num_classes < 0 or min(self.hidden_features, default=1) < 1:
            raise ValueError(
                f"num_classes={self.num_classes} must not be negative and hidden_features="
                f"{tuple(self.hidden_features)} must be positive; set them"
            )
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init, **common)
        x = self.invariants(inputs if self.body is None else self.body(inputs))
        if self.norm is not None:
            x = self.norm(name="invariants_norm", **common)(x)
        for index, width in enumerate(self.hidden_features):
            x = self.activation_fn(dense(width, name=f"hidden_{index}")(x))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = dense(self.num_classes, name="head")(x) if self.num_classes else x
        return axes.constrain_last(x, axes.BATCH, axes.FEATURES)


def _check(order: int, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {KINDS}")
    if order < 0:
        raise ValueError(f"order={order} must not be negative; set order")


def moment_net(
    num_classes: int = 10,
    features: Sequence[int] = (16, 32),
    order: int = 8,
    kind: str = "zernike",
    dtype: Dtype | None = None,
) -> MomentNet:
    """Return a `MomentNet` over a body of plain 3 x 3 convolutions, which is the baseline for bodies that turn.

    Args:
      num_classes: number of logits.
      features: widths of the convolutions.
      order: largest degree of the moments.
      kind: of the moments, see `moment_indices`.
      dtype: compute dtype.

    Returns:
      An unbound module.
    """
    layers: list[Any] = []
    for width in features:
        layers += [nn.Conv(width, (3, 3), dtype=dtype), nn.relu]
    return MomentNet(nn.Sequential(layers), MomentInvariants(order, kind), num_classes, dtype=dtype)


VARIANTS: dict[str, dict[str, Any]] = {
    f"moment_net_{kind}": {
        "module": moment_net,
        "inputs": (jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32),),
        "kind": kind,
    }
    for kind in KINDS
}
