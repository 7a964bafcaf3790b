"""Group convolutions on volumes, for the 24 rotations of the cube: exact, by moving the voxels of filters."""

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import array_namespace, at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, ones, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, PrecisionLike
from jaxlayers.equivariant.field_layers import group_maximum, pool_axis
from jaxlayers.geometry.planar_fields import GridReport, check_grid, matching_kernel, resolve_padding

#: number of rotations of the cube, the channels of a regular field
ROTATIONS = 24

FIELDS = ("trivial", "regular")


@functools.cache
def cube_rotations() -> np.ndarray:
    """Return the rotations of the cube as integer matrices `[24, 3, 3]` on (depth, height, width); the first is 1."""
    found = []
    for permutation in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            matrix = np.zeros((3, 3), dtype=np.int64)
            matrix[permutation, range(3)] = signs
            if round(np.linalg.det(matrix)) == 1:
                found.append(matrix)
    return np.stack(found)


@functools.cache
def cube_products() -> np.ndarray:
    """Return the number of g h for the rotations numbered g and h, `[24, 24]`."""
    matrices = cube_rotations()
    products = np.einsum("gij,hjk->ghik", matrices, matrices)
    return np.argmax(np.all(products[:, :, None] == matrices, axis=(-2, -1)), axis=-1)


def rotate_volume(x: Any, index: int) -> Any:
    """Return a volume turned about its middle: (g x)(p) = x(g^-1 p), without the channels.

    Args:
      x: `[*batch, depth, height, width, channels]`, NumPy or JAX.
      index: number of the rotation g in `cube_rotations`.

    Returns:
      The volume, of the kind of `x`; its sides change places with the axes.

    Example:
      >>> rotate_volume(np.arange(8.0).reshape(2, 2, 2, 1), 1)[..., 0].tolist()
      [[[3.0, 2.0], [1.0, 0.0]], [[7.0, 6.0], [5.0, 4.0]]]
    """
    numpy = array_namespace(x)
    matrix = cube_rotations()[index]
    first = x.ndim - 4
    # Axis a of the result is the input's axis that g sends there, reversed where the sign is -1.
    sources = np.argmax(matrix != 0, axis=1)
    moved = numpy.transpose(x, [*range(first), *(first + int(axis) for axis in sources), x.ndim - 1])
    reversed_axes = tuple(first + int(axis) for axis in range(3) if matrix[axis].sum() < 0)
    return numpy.flip(moved, reversed_axes) if reversed_axes else moved


def rotate_fields(x: Any, index: int, *, regular: bool) -> Any:
    """Return the field g x: the volume is turned, and of regular fields the channels permuted by e_h -> e_gh.

    Args:
      x: `[*batch, depth, height, width, channels]`, NumPy or JAX.
      index: number of the rotation g in `cube_rotations`.
      regular: whether the channels are regular fields, 24 each; otherwise they are numbers.

    Returns:
      The field, of the kind of `x`.
    """
    moved = rotate_volume(x, index)
    if not regular:
        return moved
    split = moved.reshape(*moved.shape[:-1], -1, ROTATIONS)
    # Channel g h of the result is channel h of the input.
    order = np.argsort(cube_products()[index])
    return array_namespace(x).take(split, order, axis=-1).reshape(moved.shape)


@functools.cache
def _moved_taps(size: int) -> np.ndarray:
    """Return for each rotation h and tap x the number of the tap h^-1 x, `[24, size^3]`."""
    numbers = np.arange(size**3).reshape(size, size, size, 1)
    return np.stack([rotate_volume(numbers, index).ravel() for index in range(ROTATIONS)])


@functools.cache
def _orbits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the orbit of each tap under the rotations, and the size of each orbit."""
    lowest = np.min(_moved_taps(size), axis=0)
    _, numbers, counts = np.unique(lowest, return_inverse=True, return_counts=True)
    return numbers, counts


def _check_volume(x: Any, fields: str, name: str) -> None:
    if fields not in FIELDS:
        raise ValueError(f"{name}={fields!r} must be one of {FIELDS}; set {name}")
    if x.ndim < 4 or not all(x.shape[-4:]) or (fields == "regular" and x.shape[-1] % ROTATIONS):
        raise ValueError(
            f"a volume of shape {x.shape} must be [*batch, depth, height, width, channels], with a multiple of "
            f"{ROTATIONS} channels if {name}='regular'; lift it by an OctahedralConv, or reshape it"
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"a volume must be of floating point; got {x.dtype}; convert it")


class OctahedralConv(nn.Module):
    """Convolve volumes so that the rotations of the cube pass through, between numbers and regular fields.

    out(x) = sum_d K(d) f(x + d) + b, over a cube of taps d, with K(g d) = rho_out(g) K(d) rho_in(g)^-1. To regular
    fields, K(d)[h, j] = k(h^-1 d)[h^-1 j] for any filter k `[taps, inputs, 24 or 1, features]`: the lifting and the
    group convolution. From regular fields to numbers, K(d)[h] = k(h^-1 d); between numbers, K is the same on all taps
    that the rotations exchange.

    Symmetry:
      (g f)(x) = rho(g) f(g^-1 x) goes to the same of the output for the 24 rotations of the cube: exactly, filters are
      made by moving weights alone, on the sizes that `grid_report` calls exact (see `SteerableConv`). Not for
      reflections.

    Attributes:
      features: number of fields of the output; 24 channels each where they are regular.
      inputs: `"trivial"` (numbers, as in a scan) or `"regular"`.
      outputs: `"trivial"` or `"regular"`.
      kernel_size: taps along each axis.
      stride: voxels from one output to the next.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"` or a number of voxels on each side.
      use_bias: adds a number to each field.
      precision: of the convolution.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the weights `[taps, inputs, features]`; `lecun_normal()` keeps the variance.
      bias_init: initialiser of the biases.

    Cost:
      A convolution of as many channels, with a 24th of its parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import OctahedralConv
      >>> lift = OctahedralConv(features=2, inputs="trivial")
      >>> lift.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 5, 1)))[0].shape
      (1, 5, 5, 5, 48)

    Source:
      Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, equations 10 and 11; Worrall and Brostow,
      CubeNet: Equivariance to 3D Rotation and Translation, ECCV 2018; Winkels and Cohen, 3D G-CNNs for Pulmonary Nodule
      Detection, MIDL 2018.

    Differs:
      Filters between numbers are shared by orbits of taps, where the papers always lift.
    """

    features: int
    inputs: str = "regular"
    outputs: str = "regular"
    kernel_size: int = 3
    stride: int = 1
    padding: str | int = "SAME"
    use_bias: bool = True
    precision: PrecisionLike = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch depth height width channels"]
    ) -> Float[Array, "*batch planes rows columns channels_out"]:
        """Convolve.

        Args:
          x: volumes of numbers or regular fields. NaN spreads as in any convolution.

        Returns:
          Volumes of numbers or regular fields.

        Raises:
          ValueError: if the volume does not fit its fields or the kernel, or a field of the layer is wrong.
        """
        _check_volume(x, self.inputs, "inputs")
        if self.outputs not in FIELDS:
            raise ValueError(f"outputs={self.outputs!r} must be one of {FIELDS}; set outputs")
        if self.features < 1:
            raise ValueError(f"features={self.features} must be positive; set features")
        *batch, depth, height, width, channels = x.shape
        sides = [
            resolve_padding(length, self.kernel_size, self.stride, self.padding)[:2]
            for length in (depth, height, width)
        ]
        kernel = self._filters(channels)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        dtype = compute_dtype(x, kernel, dtype=self.dtype)
        x = x.astype(dtype).reshape(math.prod(batch), depth, height, width, channels)
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, [(0, 0), *sides, (0, 0)], mode="wrap")
            sides = [(0, 0)] * 3
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(dtype),
            (self.stride,) * 3,
            sides,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=self.precision,
        )
        if bias is not None:
            y = y + jnp.repeat(bias.astype(dtype), y.shape[-1] // self.features)
        return axes.constrain_map(y.reshape(*batch, *y.shape[1:]), 3)

    def _filters(self, channels: int) -> jax.Array:
        """Return the kernel of the plain convolution, `[size, size, size, channels, channels_out]`."""
        size, taps = self.kernel_size, self.kernel_size**3
        moved = _moved_taps(size)
        fields = channels // ROTATIONS if self.inputs == "regular" else channels

        def moved_weights(rows: int, places: np.ndarray) -> jax.Array:
            """Return one parameter, `[rows, fields, features]`, with its rows put where `places` says."""
            kernel = self.param("kernel", self.kernel_init, (rows, fields, self.features), self.param_dtype)
            # Indices of one dtype, whatever the default: all are in bounds.
            return jnp.take(kernel, jnp.asarray(places, jnp.int32), axis=0, mode="clip")

        if self.outputs == "regular" and self.inputs == "regular":
            relative = cube_products()[np.argmax(cube_products() == 0, axis=1)]  # h^-1 j
            places = moved[:, :, None] * ROTATIONS + relative[:, None, :]
            # [h, tap, j, fields, features] -> [tap, fields, j, features, h]
            kernel = jnp.transpose(moved_weights(taps * ROTATIONS, places), (1, 3, 2, 4, 0))
        elif self.outputs == "regular":
            kernel = jnp.transpose(moved_weights(taps, moved), (1, 2, 3, 0))
        elif self.inputs == "regular":
            kernel = jnp.transpose(moved_weights(taps, moved), (1, 2, 0, 3)) / math.sqrt(ROTATIONS)
        else:
            numbers, counts = _orbits(size)
            kernel = moved_weights(len(counts), numbers)
            kernel = kernel / jnp.asarray(np.sqrt(counts[numbers]), kernel.dtype)[:, None, None]
        return kernel.reshape(size, size, size, channels, -1)

    @nn.nowrap
    def grid_report(self, size: int) -> GridReport:
        """Say whether the rotations are exact on cubes of a size, and by how much they displace otherwise.

        Args:
          size: voxels along each axis.

        Returns:
          The report, of two of the three equal axes.

        Raises:
          ValueError: if the kernel does not fit.
        """
        return check_grid(size, self.kernel_size, self.stride, self.padding, layer=self.name or "OctahedralConv")


class OctahedralNorm(nn.Module):
    """Norm each regular field over its 24 channels and the volume.

    out = scale (x - mean) / sqrt(variance + epsilon) + bias, all of one field: `[depth, height, width, 24]`.

    Symmetry:
      Exactly equivariant to the rotations of the cube.

    Attributes:
      epsilon: added to the variance.
      dtype: compute dtype; `None` infers it from input and parameters. Statistics are in float32 or better.
      param_dtype: dtype of the parameters.

    Cost:
      A few operations a channel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import OctahedralNorm
      >>> bool((OctahedralNorm().init_with_output(jax.random.key(0), jnp.ones((2, 2, 2, 24)))[0] == 0).all())
      True

    Source:
      Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, section 6 (norms shared over the group).

    Differs:
      Statistics of each volume rather than of the batch. A constant volume gives the bias.
    """

    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch depth height width channels"]
    ) -> Float[Array, "*batch depth height width channels"]:
        """Norm.

        Args:
          x: volumes of regular fields.

        Returns:
          Volumes of regular fields.

        Raises:
          ValueError: if the channels are not regular fields.
        """
        _check_volume(x, "regular", "fields")
        fields = x.shape[-1] // ROTATIONS
        scale = self.param("scale", ones(), (fields,), self.param_dtype)
        bias = self.param("bias", zeros(), (fields,), self.param_dtype)
        dtype = compute_dtype(x, scale, bias, dtype=self.dtype)
        wide = x.astype(at_least_float32(dtype)).reshape(*x.shape[:-1], fields, ROTATIONS)
        places = (-5, -4, -3, -1)
        wide = wide - jnp.mean(wide, places, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), places, keepdims=True) + self.epsilon)
        wide = wide * scale.astype(wide.dtype)[:, None] + bias.astype(wide.dtype)[:, None]
        return wide.reshape(x.shape).astype(dtype)


class OctahedralPool(nn.Module):
    """Pool each regular field to one number that the rotations of the cube leave alone.

    out_c(x) = max_h f_c(x)[h], or the mean over the 24 rotations h.

    Symmetry:
      out(g f)(x) = out(f)(g^-1 x), exactly.

    Attributes:
      mode: `"max"` or `"mean"`.

    Cost:
      One operation a channel.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant import OctahedralPool
      >>> OctahedralPool().apply({}, jnp.ones((3, 3, 3, 48))).shape
      (3, 3, 3, 2)

    Source:
      Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, section 6.3.

    Differs:
      None.
    """

    mode: str = "max"

    def __call__(
        self, x: Float[Array, "*batch depth height width channels"]
    ) -> Float[Array, "*batch depth height width fields"]:
        """Pool.

        Args:
          x: volumes of regular fields.

        Returns:
          Volumes of numbers.

        Raises:
          ValueError: if the channels are not regular fields, or the mode is unknown.
        """
        if self.mode not in ("max", "mean"):
            raise ValueError(f"mode={self.mode!r} must be 'max' or 'mean'; set mode")
        _check_volume(x, "regular", "fields")
        split = x.reshape(*x.shape[:-1], -1, ROTATIONS)
        return group_maximum(split) if self.mode == "max" else jnp.mean(split, axis=-1)


class OctahedralCNN(nn.Module):
    """Classify volumes by group convolutions, with logits that the 24 rotations of the cube do not change.

    A lifting convolution and `depths[0] - 1` group convolutions of `widths[0]` regular fields, each normed and
    rectified; every further stage begins with blurring to half the resolution. The last volume is pooled over the
    group, then its maximum over space is mapped to logits.

    Symmetry:
      Invariant to the rotations of the cube, exactly and for every size: windows have the parity that the size needs.
      Not to reflections, so that a hand is told from its mirror image.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the invariant features.
      widths: regular fields of each stage.
      depths: convolutions of each stage.
      kernel_size: taps of the convolutions along each axis; odd.
      pool: over the group, `"max"` or `"mean"`.
      dropout_rate: dropout before the head.
      activation_fn: nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the weights.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of a plain network of 24 times as many channels as fields.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import OctahedralCNN
      >>> model = OctahedralCNN(num_classes=3, widths=(1, 3), depths=(1, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 8, 1)))[0].shape
      (1, 3)

    Source:
      Worrall and Brostow, CubeNet, ECCV 2018; Winkels and Cohen, 3D G-CNNs for Pulmonary Nodule Detection, MIDL 2018.

    Differs:
      A plain chain instead of the papers' networks, blurring instead of strides, no statistics of the batch.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (2, 4, 8)
    depths: tuple[int, ...] = (2, 2, 2)
    kernel_size: int = 3
    pool: str = "max"
    dropout_rate: float = 0.0
    activation_fn: ActivationFn = nn.relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch depth height width colours"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: volumes, channels last.
          deterministic: no dropout.

        Returns:
          Logits, or with `num_classes=0` the features.

        Raises:
          ValueError: if `x` has fewer than four axes or is not of floating point, or a field does not fit.
        """
        if len(self.widths) != len(self.depths) or not self.widths or min(*self.widths, *self.depths) < 1:
            raise ValueError(
                f"widths={self.widths} and depths={self.depths} must have one positive entry a stage; set both"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd; set kernel_size")
        _check_volume(x, "trivial", "inputs")
        norms: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**norms, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        fields = "trivial"
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if stage:
                for axis in range(x.ndim - 4, x.ndim - 1):
                    x = pool_axis(x, axis, matching_kernel(x.shape[axis], 3, 2), 2, "blur")
            for index in range(depth):
                name = f"stages_{stage}_convs_{index}"
                x = OctahedralConv(width, fields, kernel_size=self.kernel_size, use_bias=False, name=name, **common)(x)
                x = self.activation_fn(OctahedralNorm(name=f"{name}_norm", **norms)(x))
                fields = "regular"
        x = OctahedralPool(self.pool, name="group_pool")(x)
        # Not the mean, which norms over the volume leave almost the same for all inputs.
        x = group_maximum(jnp.moveaxis(x.reshape(*x.shape[:-4], -1, x.shape[-1]), -2, -1))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.Dense(self.num_classes, name="head", **common)(x) if self.num_classes else x


VARIANTS: dict[str, dict[str, Any]] = {
    "octahedral_cnn_32": {
        "module": OctahedralCNN,
        "inputs": (jax.ShapeDtypeStruct((1, 32, 32, 32, 1), jnp.float32),),
        "num_classes": 10,
    }
}
