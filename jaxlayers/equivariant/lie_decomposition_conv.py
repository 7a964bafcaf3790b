"""Convolutions over GL+(2) and SL(2) with translations, in polar coordinates: rotations times stretches."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory
from jaxlayers.geometry import lie
from jaxlayers.ops.grid_sample import centred_grid

GROUPS = ("GL+(2)", "SL(2)")

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


# The group ----------------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Elements of a group, and the weights with which they integrate over it.

    mean_j weights_j f(elements_j) is an unbiased estimate of the integral of f over the part of the group that they are
    drawn from, by a Haar measure, divided by the volume of that part in polar coordinates.

    Attributes:
      elements: `[g, 2, 2]` matrices of positive determinant.
      weights: `[g]`, the density of the Haar measure against that of the draw; 1 for rotations.
    """

    elements: jax.Array
    weights: jax.Array


def stretch_matrix(coordinates: Float[Array, "*batch c"], group: str) -> Float[Array, "*batch 2 2"]:
    """Return the symmetric matrix S with the given orthonormal coordinates: three for GL+(2), two for SL(2).

    Raises:
      ValueError: on an unknown group.
    """
    _known(group)
    root = math.sqrt(0.5)
    if group == "SL(2)":
        difference, shear = root * coordinates[..., 0], root * coordinates[..., 1]
        rows = [[difference, shear], [shear, -difference]]
    else:
        shear = root * coordinates[..., 1]
        rows = [[coordinates[..., 0], shear], [shear, coordinates[..., 2]]]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def sample_group(
    key: PRNGKeyArray, group: str, count: int, *, stretch: float = 0.5, dtype: Dtype = jnp.float32
) -> Samples:
    """Draw elements R exp(S): R from the Haar measure of the rotations, S evenly from the ball |S| <= `stretch`.

    The weights are the density of the Haar measure, `jaxlayers.geometry.lie.log_haar_density`, so that integrals of
    functions that vanish outside the ball come out without bias, from either side of the group.

    Args:
      key: draws the elements.
      group: one of `GROUPS`.
      count: number of elements.
      stretch: largest root of the summed squares of the logarithms of the singular values.
      dtype: of the samples, float32 or better.

    Returns:
      The samples.

    Raises:
      ValueError: on an unknown group, a count below 1 or a negative stretch.

    Example:
      >>> import jax
      >>> from jaxlayers.equivariant.lie_decomposition_conv import sample_group
      >>> sample_group(jax.random.key(0), "SL(2)", 16).elements.shape
      (16, 2, 2)
    """
    _check(group, count, stretch)
    angle, ball = jax.random.split(key)
    angles = jax.random.uniform(angle, (count,), dtype, maxval=2 * jnp.pi)
    return _assemble(lie.so2_exp(angles), _ball(ball, group, count, stretch, dtype), group)


def product_samples(
    group: str, rotations: int, stretches: int, *, stretch: float = 0.5, dtype: Dtype = jnp.float32
) -> Samples:
    """Return R exp(S) for evenly spaced rotations R and fixed stretches S in the ball, of which the first is zero.

    Turns by 2 pi / `rotations` from the left map the elements onto themselves.

    Args:
      group: one of `GROUPS`.
      rotations: number of rotations.
      stretches: number of stretches.
      stretch: see `sample_group`.
      dtype: of the samples, float32 or better.

    Returns:
      The samples, those of one rotation next to each other.

    Raises:
      ValueError: as `sample_group`.
    """
    _check(group, min(rotations, stretches), stretch)
    # Not what the dtype draws: float32 and float64 must be the same elements.
    drawn = _ball(jax.random.key(0), group, stretches, stretch, jnp.float32).astype(dtype).at[0].set(0)
    turns = lie.so2_exp(2 * jnp.pi * jnp.arange(rotations, dtype=dtype) / rotations)
    return _assemble(jnp.repeat(turns, stretches, axis=0), jnp.tile(drawn, (rotations, 1)), group)


def polar_coordinates(matrix: Float[Array, "*batch 2 2"], group: str) -> Float[Array, "*batch c"]:
    """Return (cos, sin) of the rotation and the coordinates of S, for matrices R exp(S).

    They are smooth functions of the matrix, also where singular values are equal and at half turns.

    Args:
      matrix: of positive determinant; NaN comes out otherwise.
      group: one of `GROUPS`; the part of S that SL(2) lacks is left out.

    Returns:
      Five coordinates for GL+(2), four for SL(2).

    Raises:
      ValueError: on an unknown group.
    """
    _known(group)
    rotation, s = lie.polar(matrix)
    root = math.sqrt(2.0)
    if group == "SL(2)":
        parts = [(s[..., 0, 0] - s[..., 1, 1]) / root, root * s[..., 0, 1]]
    else:
        parts = [s[..., 0, 0], root * s[..., 0, 1], s[..., 1, 1]]
    return jnp.stack([rotation[..., 0, 0], rotation[..., 1, 0], *parts], axis=-1)


def inverse(matrix: Float[Array, "*batch 2 2"]) -> Float[Array, "*batch 2 2"]:
    """Return the inverse of matrices of the plane."""
    a, b, c, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
    adjugate = jnp.stack([jnp.stack([d, -b], axis=-1), jnp.stack([-c, a], axis=-1)], axis=-2)
    return adjugate / (a * d - b * c)[..., None, None]


def _known(group: str) -> None:
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is unknown; use one of {GROUPS}")


def _check(group: str, count: int, stretch: float) -> None:
    _known(group)
    if count < 1 or stretch < 0:
        raise ValueError(f"count={count} must be positive and stretch={stretch} not negative; set them")


def _ball(key: jax.Array, group: str, count: int, stretch: float, dtype: Dtype) -> jax.Array:
    size = 2 if group == "SL(2)" else 3
    direction, radius = jax.random.split(key)
    x = jax.random.normal(direction, (count, size), dtype)
    length = stretch * jax.random.uniform(radius, (count, 1), dtype) ** (1 / size)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True) * length


def _assemble(rotations: jax.Array, coordinates: jax.Array, group: str) -> Samples:
    s = stretch_matrix(coordinates, group)
    elements = _einsum("gij,gjk->gik", rotations, lie.symmetric_exp(s))
    return Samples(elements, jnp.exp(lie.log_haar_density(s)))


def _check_elements(elements: jax.Array) -> None:
    if elements.ndim != 3 or elements.shape[-2:] != (2, 2):
        raise ValueError(f"elements of shape {elements.shape} must be [g, 2, 2]; pass those of Samples")


# Layers -------------------------------------------------------------------------------------------------------------


class _KernelNet(nn.Module):
    """A perceptron from coordinates to the entries of a kernel."""

    hidden_features: Sequence[int]
    shape: tuple[int, int]
    activation_fn: ActivationFn
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        for index, width in enumerate(self.hidden_features):
            x = self.activation_fn(dense(width, name=f"hidden_{index}")(x))
        x = dense(self.shape[0] * self.shape[1], name="entries")(x)
        return x.reshape(*x.shape[:-1], *self.shape) / math.sqrt(self.shape[0])


def _window(square: jax.Array) -> jax.Array:
    """(1 - r^2)^2 within the unit ball, as smooth as to integrate well on a grid."""
    return jnp.square(jnp.maximum(1 - square, 0))


def _stencil(elements: jax.Array, size: int, extent: float) -> tuple[jax.Array, jax.Array]:
    """Return h^-1 p / extent for pixel offsets p, and the window there over |det h|, of unit integral."""
    offsets = centred_grid((size, size), elements.dtype) / extent
    z = _einsum("gij,rcj->grci", inverse(elements), offsets)
    determinant = elements[:, 0, 0] * elements[:, 1, 1] - elements[:, 0, 1] * elements[:, 1, 0]
    share = 3 / (math.pi * extent**2) / determinant
    return z, _window(jnp.sum(jnp.square(z), axis=-1)) * share[:, None, None]


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlate `[*batch, h, w, in]` with `[size, size, in, out]`, keeping the size."""
    flat = x.reshape(-1, *x.shape[-3:])
    out = jax.lax.conv_general_dilated(flat, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


class LieLifting(nn.Module):
    """Lift an image to a function on translations and matrices, by one kernel seen through every matrix.

    out(x, h) = integral f(y) k(h^-1 (y - x)) dy / |det h| + b, for pixels x, elements h `[2, 2]` and images f; the
    integral is a sum over pixels y, the kernel k a perceptron on the plane times the window (1 - |z|^2)^2 of radius
    `extent`.

    Symmetry:
      Moving the image by x -> a x + t moves the output to (a x + t, a h). Exact for what pixels allow, translations by
      whole pixels and quarter turns, when the elements turn too; for other matrices exact in the limit of fine pixels,
      within the `kernel_size` and the image's border.

    Attributes:
      features: width of the output.
      kernel_size: pixels along a side of the kernel, odd; a stretched kernel is cut off there.
      extent: radius of the kernel of h = 1 in pixels; `None` takes a quarter of `kernel_size` plus 0.5.
      hidden_features: widths of the perceptron.
      activation_fn: its nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters. Coordinates are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels of the perceptron.
      bias_init: initialiser of the biases.

    Cost:
      kernel_size^2 x in_features x g x features multiply-accumulates a pixel, and the perceptron at g x kernel_size^2
      places.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.lie_decomposition_conv import LieLifting, product_samples
      >>> elements = product_samples("SL(2)", 4, 2).elements
      >>> layer = LieLifting(features=6)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 9, 9, 1)), elements)[0].shape
      (2, 9, 9, 8, 6)

    Source:
      Mironenco, Forre, Lie Group Decompositions for Equivariant Neural Networks, ICLR 2024; reference code
      mirceamironenco/rgenn, commit df54466a, `LiftGConv2d`.

    Differs:
      A smooth window for every group; a perceptron with any nonlinearity instead of sine networks.
    """

    features: int
    kernel_size: int = 7
    extent: float | None = None
    hidden_features: Sequence[int] = (32, 32)
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, image: Float[Array, "*batch height width channels"], elements: Float[Array, "g 2 2"]
    ) -> Float[Array, "*batch height width g features"]:
        """Lift images.

        Args:
          image: any leading axes.
          elements: matrices of positive determinant on (row, column).

        Returns:
          Features of every pixel and element. NaN in a pixel spreads over the kernel.

        Raises:
          ValueError: if ranks do not fit, or fields are out of their range.
        """
        extent = _check_fields(self.features, self.kernel_size, self.extent)
        _check_elements(elements)
        if image.ndim < 3:
            raise ValueError(f"image of shape {image.shape} must be [*batch, height, width, channels]; add axes")
        elements = elements.astype(at_least_float32(jnp.promote_types(elements.dtype, compute_dtype(image))))
        dtype = compute_dtype(image, dtype=self.dtype)
        z, window = _stencil(elements, self.kernel_size, extent)
        net = _kernel_net(self, (image.shape[-1], self.features), "kernel_net")
        kernel = net(z.astype(dtype)) * window[..., None, None].astype(dtype)
        kernel = jnp.einsum("grcio->rcigo", kernel)
        out = _convolve(image.astype(kernel.dtype), kernel.reshape(*kernel.shape[:3], -1))
        out = out.reshape(*out.shape[:-1], elements.shape[0], self.features)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return out + bias.astype(out.dtype)


class LieDecompositionConv(nn.Module):
    """Convolve a function on translations and matrices, by Monte Carlo integration in polar coordinates.

    out(x, h) = mean_j w_j integral F(y, h_j) k(h^-1 (y - x), xi(h^-1 h_j)) dy / |det h| + b, for samples h_j `[2, 2]`
    with weights w_j of the Haar measure and xi the polar coordinates: (cos, sin) of the rotation R and the symmetric S
    of R exp(S). The kernel k is a perceptron times the windows of radius `extent` in space and `bandwidth` in |S|.

    Symmetry:
      Moving F by (t, a), F'(a x + t, a h) = F(x, h), moves the output alike. Exact, to rounding, when all elements are
      multiplied by a from the left and pixels allow it (`kernel_size=1`, or quarter turns and whole pixels). With
      samples drawn anew the error falls as their number^-1/2, for functions that vanish within `bandwidth` of the
      border of what was sampled; pixels add theirs.

    Attributes:
      features: width of the output.
      group: one of `GROUPS`.
      kernel_size: pixels along a side of the kernel, odd; 1 for one that joins elements only.
      extent: radius of the kernel of h = 1 in pixels; `None` takes a quarter of `kernel_size` plus 0.5.
      bandwidth: radius of the kernel in |S|.
      hidden_features: widths of the perceptron.
      activation_fn: its nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters. Coordinates are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels of the perceptron.
      bias_init: initialiser of the biases.

    Cost:
      kernel_size^2 x s x in_features x g x features multiply-accumulates a pixel, for s samples and g targets, and the
      perceptron at g x s x kernel_size^2 places.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.lie_decomposition_conv import LieDecompositionConv, product_samples
      >>> samples = product_samples("GL+(2)", 4, 2)
      >>> layer = LieDecompositionConv(features=6, kernel_size=3)
      >>> inputs = jnp.ones((2, 9, 9, 8, 3)), samples.elements, samples.weights
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), *inputs)[0].shape
      (2, 9, 9, 8, 6)

    Source:
      Mironenco, Forre, Lie Group Decompositions for Equivariant Neural Networks, ICLR 2024; reference code
      mirceamironenco/rgenn, commit df54466a, `GConv2d`. The density of the Haar
      measure is the Jacobian of polar coordinates, see `jaxlayers.geometry.lie.log_haar_density`.

    Differs:
      Samples carry the weights of the Haar measure; the reference averages log-normal draws without. The kernel is zero
      beyond a bandwidth, so that the integral over the group, which is not compact, exists. The rotation enters by
      cosine and sine, so that the kernel does not jump at half turns. 1 / |det| is that of the target's h: the
      reference's, of the source, is the same up to a factor of the kernel.
    """

    features: int
    group: str = "GL+(2)"
    kernel_size: int = 5
    extent: float | None = None
    bandwidth: float = 1.0
    hidden_features: Sequence[int] = (32, 32)
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        values: Float[Array, "*batch height width s channels"],
        elements: Float[Array, "s 2 2"],
        weights: Float[Array, " s"],
        *,
        targets: Float[Array, "g 2 2"] | None = None,
    ) -> Float[Array, "*batch height width g features"]:
        """Convolve.

        Args:
          values: features of every pixel and sample.
          elements: the samples.
          weights: theirs.
          targets: where the output is wanted; `None` takes the samples.

        Returns:
          Features of every pixel and target. NaN in a pixel spreads over the kernel.

        Raises:
          ValueError: on an unknown group, ranks or numbers that do not fit, or fields out of their range.
        """
        _known(self.group)
        extent = _check_fields(self.features, self.kernel_size, self.extent)
        if self.bandwidth <= 0:
            raise ValueError(f"bandwidth={self.bandwidth} must be positive; set the radius of the kernel in |S|")
        targets = elements if targets is None else targets
        _check_elements(elements)
        _check_elements(targets)
        if values.ndim < 4 or values.shape[-2] != elements.shape[0] or weights.shape != elements.shape[:1]:
            raise ValueError(
                f"values of shape {values.shape} and weights of shape {weights.shape} must be [*batch, height, width, "
                f"s, channels] and [s] for {elements.shape[0]} elements; pass those they were computed with"
            )
        geometry = at_least_float32(jnp.promote_types(elements.dtype, compute_dtype(values)))
        elements, targets, weights = (x.astype(geometry) for x in (elements, targets, weights))
        dtype = compute_dtype(values, dtype=self.dtype)
        steps = polar_coordinates(_einsum("gij,sjk->gsik", inverse(targets), elements), self.group)
        z, window = _stencil(targets, self.kernel_size, extent)
        near = _window(jnp.sum(jnp.square(steps[..., 2:] / self.bandwidth), axis=-1)) * weights / elements.shape[0]
        shape = (*z.shape[:3], elements.shape[0])
        places = jnp.concatenate(
            [
                jnp.broadcast_to(z[:, :, :, None, :], (*shape, 2)),
                jnp.broadcast_to(steps[:, None, None], (*shape, steps.shape[-1])),
            ],
            axis=-1,
        )
        kernel = _kernel_net(self, (values.shape[-1], self.features), "kernel_net")(places.astype(dtype))
        factor = window[..., None] * near[:, None, None, :]
        kernel = jnp.einsum("grcsio->rcsigo", kernel * factor[..., None, None].astype(dtype))
        size = self.kernel_size
        flat = values.reshape(*values.shape[:-2], -1).astype(kernel.dtype)
        out = _convolve(flat, kernel.reshape(size, size, flat.shape[-1], -1))
        out = out.reshape(*out.shape[:-1], targets.shape[0], self.features)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return out + bias.astype(out.dtype)


def _check_fields(features: int, kernel_size: int, extent: float | None) -> float:
    if features < 1 or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"features={features} must be positive and kernel_size={kernel_size} odd; set them")
    extent = kernel_size / 4 + 0.5 if extent is None else extent
    if extent <= 0:
        raise ValueError(f"extent={extent} must be positive; set the radius of the kernel in pixels")
    return extent


def _kernel_net(layer: Any, shape: tuple[int, int], name: str) -> _KernelNet:
    return _KernelNet(
        tuple(layer.hidden_features),
        shape,
        layer.activation_fn,
        layer.dtype,
        layer.param_dtype,
        layer.kernel_init,
        layer.bias_init,
        name=name,
    )


class LieDecompositionNet(nn.Module):
    """Classify images by convolutions over translations and GL+(2) or SL(2).

    An image is lifted to the samples; blocks x + conv(act(norm(x))) follow; the output is linear in the mean over the
    pixels and then the largest over the samples of act(norm(x)).

    Symmetry:
      Invariant to quarter turns of the image, exactly, if `deterministic` and `rotations` is a multiple of 4. To other
      rotations as `rotations` and the resolution grow. To stretches approximately: the largest over the group is
      invariant where it is attained among the samples, and no mean over a group that is not compact is. To
      translations up to the border, where zeros are read.

    Attributes:
      num_classes: number of logits; 0 gives the features before the head.
      group: one of `GROUPS`.
      features: width of all layers.
      depth: number of blocks.
      rotations: number of rotations among the samples.
      stretches: number of stretches of each.
      stretch: largest |S| of a sample, see `sample_group`.
      lifting_size: `kernel_size` of the lifting.
      kernel_size: of the blocks.
      bandwidth: of the blocks, in |S|.
      hidden_features: widths of the perceptrons that are the kernels.
      norm: makes the normalisation of the features of each pixel and sample, or `None` for none.
      activation_fn: the nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters. Coordinates are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `group`, when `deterministic=False`.

    Cost:
      depth x kernel_size^2 x (rotations x stretches x features)^2 multiply-accumulates a pixel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.lie_decomposition_conv import LieDecompositionNet
      >>> model = LieDecompositionNet(num_classes=3, features=4, depth=1, rotations=4, stretches=2)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 9, 9, 1)))[0].shape
      (2, 3)

    Source:
      Mironenco, Forre, Lie Group Decompositions for Equivariant Neural Networks, ICLR 2024, section 5; reference code
      mirceamironenco/rgenn, commit df54466a.

    Differs:
      As the layers. Samples are fixed when `deterministic`; no pooling between blocks; layer normalisation.
    """

    num_classes: int = 10
    group: str = "GL+(2)"
    features: int = 16
    depth: int = 2
    rotations: int = 8
    stretches: int = 4
    stretch: float = 0.5
    lifting_size: int = 7
    kernel_size: int = 5
    bandwidth: float = 1.0
    hidden_features: Sequence[int] = (32, 32)
    norm: ModuleFactory | None = nn.LayerNorm
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, image: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch outputs"]:
        """Classify images.

        Args:
          image: any leading axes.
          deterministic: use `product_samples`; otherwise draw as many for the whole batch.

        Returns:
          Logits, or features if `num_classes` is 0.

        Raises:
          ValueError: as the layers, and if `depth` is negative.
        """
        if self.depth < 0 or self.rotations < 1 or self.stretches < 1:
            raise ValueError(
                f"depth={self.depth} must not be negative, rotations={self.rotations} and stretches={self.stretches} "
                "must be positive; set them"
            )
        if image.ndim < 3:
            raise ValueError(f"image of shape {image.shape} must be [*batch, height, width, channels]; add axes")
        dtype = at_least_float32(compute_dtype(image))
        if deterministic:
            samples = product_samples(self.group, self.rotations, self.stretches, stretch=self.stretch, dtype=dtype)
        else:
            count = self.rotations * self.stretches
            samples = sample_group(self.make_rng("group"), self.group, count, stretch=self.stretch, dtype=dtype)
        common: dict[str, Any] = {
            "hidden_features": tuple(self.hidden_features),
            "activation_fn": self.activation_fn,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }

        def activate(x: jax.Array, name: str) -> jax.Array:
            if self.norm is not None:
                x = self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)
            return self.activation_fn(x)

        x = LieLifting(self.features, self.lifting_size, name="lifting", **common)(image, samples.elements)
        for index in range(self.depth):
            conv = LieDecompositionConv(
                self.features,
                self.group,
                self.kernel_size,
                bandwidth=self.bandwidth,
                name=f"conv_{index}",
                **common,
            )
            x = x + conv(activate(x, f"norm_{index}"), samples.elements, samples.weights)
            x = axes.constrain_last(x, axes.BATCH, axes.HEIGHT, axes.WIDTH, None, axes.FEATURES)
        x = jnp.max(jnp.mean(activate(x, "norm_out"), axis=(-4, -3)), axis=-2)
        if self.num_classes:
            x = nn.Dense(
                self.num_classes,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name="head",
            )(x)
        return axes.constrain(x, axes.BATCH, *(None,) * (x.ndim - 1)) if x.ndim > 1 else x


_DIGIT = (jax.ShapeDtypeStruct((1, 40, 40, 1), jnp.float32),)

VARIANTS: dict[str, dict[str, Any]] = {
    "lie_decomposition_gl2": {"module": LieDecompositionNet, "inputs": _DIGIT, "group": "GL+(2)"},
    "lie_decomposition_sl2": {"module": LieDecompositionNet, "inputs": _DIGIT, "group": "SL(2)"},
}
