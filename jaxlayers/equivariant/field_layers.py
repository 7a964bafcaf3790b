"""Layers between group convolutions: nonlinearities, norms and poolings of maps of fields of C_n or D_n."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import ones, zeros
from jaxlayers.core.safe import safe_divide, safe_norm
from jaxlayers.core.types import ActivationFn, Dtype, Initializer
from jaxlayers.geometry.planar_fields import (
    PERMUTATIONS,
    FieldType,
    GridReport,
    Run,
    check_grid,
    matching_kernel,
    resolve_padding,
)


def check_map(x: Any, fields: FieldType) -> None:
    """Raise the `ValueError` of what is no map of that type."""
    if x.ndim < 3 or x.shape[-1] != fields.channels:
        raise ValueError(
            f"a map of shape {x.shape} must be [*batch, height, width, {fields.channels}] for fields={fields.fields} "
            f"of {fields.group.name}; set the field type, or lift images by a SteerableConv"
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"a map must be of floating point; got {x.dtype}; convert it")


def split_runs(x: jax.Array, fields: FieldType) -> list[tuple[Run, jax.Array]]:
    """Return each run of fields as `[*batch, height, width, count, dimension]`."""
    return [
        (run, x[..., run.start : run.stop].reshape(*x.shape[:-1], run.multiplicity, run.dimension))
        for run in fields.runs
    ]


def join_runs(parts: list[jax.Array]) -> jax.Array:
    """Return the map of runs as `split_runs` gives them."""
    return jnp.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)


class _ScaleBias(nn.Module):
    """Own a number for each field, to multiply with, and one to add or nothing."""

    count: int
    use_scale: bool
    use_bias: bool
    param_dtype: Dtype
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self) -> tuple[jax.Array | None, jax.Array | None]:
        scale = self.param("scale", ones(), (self.count,), self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, (self.count,), self.param_dtype) if self.use_bias else None
        return scale, bias


class PointwiseNonlinearity(nn.Module):
    """Apply a function to each channel, which is allowed for trivial and regular fields only.

    out_c = activation_fn(x_c). The group permutes the channels of regular fields, so any function commutes with it.

    Symmetry:
      Exactly equivariant. Refused for irreducible fields, whose coordinates mix: there use `NormNonlinearity` or
      `GatedNonlinearity`.

    Attributes:
      fields: field type of the map; trivial and regular fields.
      activation_fn: the function.

    Cost:
      One function value a channel.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant import PointwiseNonlinearity
      >>> from jaxlayers.geometry.groups import Cyclic
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> PointwiseNonlinearity(FieldType.regular(Cyclic(4), 1)).apply({}, jnp.full((1, 1, 4), -1.0)).sum().item()
      0.0

    Source:
      Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, section 6.2.

    Differs:
      None.
    """

    fields: FieldType
    activation_fn: ActivationFn = nn.relu

    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height width channels"]:
        """Apply the function.

        Args:
          x: a map of type `fields`.

        Returns:
          A map of type `fields`.

        Raises:
          ValueError: if a field is neither trivial nor regular, or the map is not of type `fields`.
        """
        if not self.fields.pointwise:
            raise ValueError(
                f"fields={self.fields.fields} must be trivial or regular for a pointwise function; use "
                "NormNonlinearity or GatedNonlinearity"
            )
        check_map(x, self.fields)
        return self.activation_fn(x)


class NormNonlinearity(nn.Module):
    """Change the length of each field but not its direction.

    out = activation_fn(|x| + b) x / |x| for each field x `[dimension]` with its bias b; 0 where x is 0.

    Symmetry:
      Exactly equivariant for every field type: the representations are orthogonal, so that lengths are invariant.

    Attributes:
      fields: field type of the map.
      activation_fn: function of the length.
      epsilon: lengths below it give 0, with gradient 0.
      dtype: compute dtype; `None` infers it from input and parameters. Lengths are computed in float32 or better.
      param_dtype: dtype of the parameters.
      bias_init: initialiser of the biases, one a field.

    Cost:
      A few operations a channel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import NormNonlinearity
      >>> from jaxlayers.geometry.groups import Cyclic
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> layer = NormNonlinearity(FieldType(Cyclic(8), (("irrep_1", 3),)))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 5, 6)))[0].shape
      (2, 5, 5, 6)

    Source:
      Worrall et al., Harmonic Networks, CVPR 2017, section 4.2; Weiler and Cesa, NeurIPS 2019, section 2.6.

    Differs:
      Defined, with a finite gradient, at 0.
    """

    fields: FieldType
    activation_fn: ActivationFn = nn.relu
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height width channels"]:
        """Apply the nonlinearity.

        Args:
          x: a map of type `fields`.

        Returns:
          A map of type `fields`.

        Raises:
          ValueError: if the map is not of type `fields`.
        """
        check_map(x, self.fields)
        dtype = compute_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        parts = []
        for run, part in split_runs(x.astype(at_least_float32(dtype)), self.fields):
            _, bias = _ScaleBias(run.multiplicity, False, True, self.param_dtype, self.bias_init, name=run.name)()
            assert bias is not None
            length = safe_norm(part)
            length = jnp.where(length > self.epsilon, length, 0.0)
            factor = safe_divide(self.activation_fn(length + bias.astype(part.dtype)), length)
            parts.append(part * factor[..., None])
        return join_runs(parts).astype(dtype)


class GatedNonlinearity(nn.Module):
    """Multiply each field by a gate, a number between 0 and 1 that a trivial field of its own gives.

    out = gate_fn(s) x for each field x that is not trivial, with its trivial field s, and activation_fn(x) for the
    others. A convolution to `gated_inputs(fields)` gives fields and gates at once.

    Symmetry:
      Exactly equivariant for every field type: gates are invariant.

    Attributes:
      fields: field type of the output. That of the input is `gated_inputs(fields)`: the same with as many more trivial
        fields, behind the other trivial ones, as there are fields that are not trivial.
      activation_fn: function of trivial fields.
      gate_fn: function of the gates.

    Cost:
      A few operations a channel.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant import GatedNonlinearity, gated_inputs
      >>> from jaxlayers.geometry.groups import Dihedral
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> fields = FieldType(Dihedral(4), (("trivial", 2), ("irrep_1_1", 3)))
      >>> gated_inputs(fields).fields, GatedNonlinearity(fields).apply({}, jnp.ones((4, 4, 11))).shape
      ((('trivial', 5), ('irrep_1_1', 3)), (4, 4, 8))

    Source:
      Weiler et al., 3D Steerable CNNs, NeurIPS 2018, section 4.3; Weiler and Cesa, NeurIPS 2019, section 2.6.

    Differs:
      None.
    """

    fields: FieldType
    activation_fn: ActivationFn = nn.relu
    gate_fn: ActivationFn = nn.sigmoid

    def __call__(
        self, x: Float[Array, "*batch height width channels_and_gates"]
    ) -> Float[Array, "*batch height width channels"]:
        """Apply the gates.

        Args:
          x: a map of type `gated_inputs(fields)`.

        Returns:
          A map of type `fields`.

        Raises:
          ValueError: if the map is not of that type.
        """
        check_map(x, gated_inputs(self.fields))
        return gate_fields(x, self.fields, self.activation_fn, self.gate_fn)


def gate_fields(x: jax.Array, fields: FieldType, activation_fn: ActivationFn, gate_fn: ActivationFn) -> jax.Array:
    """Return the fields of `gated_inputs(fields)` multiplied by their gates."""
    plain = dict(fields.fields).get("trivial", 0)
    found = {run.name: part for run, part in split_runs(x, gated_inputs(fields))}
    gates = gate_fn(found["trivial"][..., plain:, :])
    parts, start = [], 0
    for run in fields.runs:
        if run.name == "trivial":
            parts.append(activation_fn(found["trivial"][..., :plain, :]))
        else:
            parts.append(found[run.name] * gates[..., start : start + run.multiplicity, :])
            start += run.multiplicity
    return join_runs(parts)


def gated_inputs(fields: FieldType) -> FieldType:
    """Return what `GatedNonlinearity(fields)` takes: `fields`, and a trivial field for each that is not trivial."""
    gates = sum(count for name, count in fields.fields if name != "trivial")
    return fields + FieldType.trivial(fields.group, gates) if gates else fields


class FieldNorm(nn.Module):
    """Norm fields by statistics that the group leaves alone.

    out = scale (x - mean) / sqrt(variance + epsilon) + bias, with one scale and bias a field. Over `"map"` the
    statistics are of each field, taken over its channels and the map (as instance norm does); over `"pixel"` they are
    of all channels of one pixel (as layer norm does). The mean is over trivial and regular fields only, and 0 for
    others, which also have no bias.

    Symmetry:
      Exactly equivariant for every field type: representations are orthogonal, and means are over what they permute.
      A norm of each channel alone (`nn.GroupNorm`, `nn.BatchNorm`) is not.

    Attributes:
      fields: field type of the map.
      over: `"map"` or `"pixel"`.
      epsilon: added to the variance.
      use_bias: whether trivial and regular fields have a bias.
      use_scale: whether fields have a scale.
      dtype: compute dtype; `None` infers it from input and parameters. Statistics are in float32 or better.
      param_dtype: dtype of the parameters.

    Cost:
      A few operations a channel, and reductions over the map or the channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import FieldNorm
      >>> from jaxlayers.geometry.groups import Cyclic
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> layer = FieldNorm(FieldType.regular(Cyclic(4), 2))
      >>> bool((layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 3, 8)))[0] == 0).all())
      True

    Source:
      Weiler and Cesa, NeurIPS 2019, section 2.6 (norms by field); Ba, Kiros, Hinton, Layer Normalization, 2016;
      Ulyanov, Vedaldi, Lempitsky, Instance Normalization, 2016.

    Differs:
      No statistics over the batch and none stored, so that training and evaluation are the same function. A constant
      map gives its bias over `"map"`; values and gradients stay finite.
    """

    fields: FieldType
    over: str = "map"
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height width channels"]:
        """Norm.

        Args:
          x: a map of type `fields`.

        Returns:
          A map of type `fields`.

        Raises:
          ValueError: if the map is not of type `fields`, or `over` is unknown.
        """
        if self.over not in ("map", "pixel"):
            raise ValueError(f"over={self.over!r} must be 'map' or 'pixel'; set over")
        check_map(x, self.fields)
        dtype = compute_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        parts = [part for _, part in split_runs(x.astype(at_least_float32(dtype)), self.fields)]
        permuted = [run.name in PERMUTATIONS for run in self.fields.runs]
        if self.over == "map":
            places = (-4, -3, -1)
            means = [jnp.mean(part, places, keepdims=True) for part in parts]
            parts = [part - mean if moved else part for part, mean, moved in zip(parts, means, permuted, strict=True)]
            variances = [jnp.mean(jnp.square(part), places, keepdims=True) for part in parts]
        else:
            if any(permuted):
                mean = _mean([part for part, moved in zip(parts, permuted, strict=True) if moved])
                parts = [part - mean if moved else part for part, moved in zip(parts, permuted, strict=True)]
            variances = [_mean([jnp.square(part) for part in parts])] * len(parts)
        results = []
        for run, part, variance in zip(self.fields.runs, parts, variances, strict=True):
            has_bias = self.use_bias and run.name in PERMUTATIONS
            part = part * jax.lax.rsqrt(variance + self.epsilon)
            if self.use_scale or has_bias:
                scale, bias = _ScaleBias(run.multiplicity, self.use_scale, has_bias, self.param_dtype, name=run.name)()
                part = part if scale is None else part * scale.astype(part.dtype)[:, None]
                part = part if bias is None else part + bias.astype(part.dtype)[:, None]
            results.append(part)
        return join_runs(results).astype(dtype)


def _mean(parts: list[jax.Array]) -> jax.Array:
    """Return the mean over all channels of a pixel."""
    total = sum(jnp.sum(part, axis=(-2, -1), keepdims=True) for part in parts)
    return jnp.asarray(total) / sum(part.shape[-2] * part.shape[-1] for part in parts)


class GroupPool(nn.Module):
    """Pool each field to one number that the group leaves alone.

    Maximum or mean over the channels of a regular field, the length |x| of an irreducible one, and trivial fields as
    they are. The output has one trivial field for each field, in their order.

    Symmetry:
      out(g f)(x) = out(f)(g^-1 x), exactly: what is left is a map of numbers, like an image.

    Attributes:
      fields: field type of the map.
      mode: `"max"` or `"mean"`, for regular fields.

    Cost:
      One operation a channel.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant import GroupPool
      >>> from jaxlayers.geometry.groups import Cyclic
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> GroupPool(FieldType.regular(Cyclic(4), 1)).apply({}, jnp.arange(4.0).reshape(1, 1, 4)).tolist()
      [[[3.0]]]

    Source:
      Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, section 6.3.

    Differs:
      Lengths of irreducible fields, with gradient 0 at 0.
    """

    fields: FieldType
    mode: str = "max"

    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height width fields"]:
        """Pool.

        Args:
          x: a map of type `fields`.

        Returns:
          A map of trivial fields.

        Raises:
          ValueError: if the map is not of type `fields`, or the mode is unknown.
        """
        if self.mode not in ("max", "mean"):
            raise ValueError(f"mode={self.mode!r} must be 'max' or 'mean'; set mode")
        check_map(x, self.fields)
        parts = []
        for run, part in split_runs(x, self.fields):
            if run.name in PERMUTATIONS:
                parts.append(group_maximum(part) if self.mode == "max" else jnp.mean(part, axis=-1))
            else:
                wide = part.astype(at_least_float32(part.dtype))
                parts.append(safe_norm(wide).astype(part.dtype))
        return jnp.concatenate(parts, axis=-1)


def group_maximum(x: Float[Array, "*axes elements"]) -> Float[Array, "*axes"]:
    """Return the maximum over the last axis, by halves.

    The gradient of `jnp.max` divides by the number of entries that equal the maximum: NaN where a compiler computes
    entries and maximum apart and rounds them differently, as XLA does on a CPU without optimisation.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = jnp.concatenate([jnp.maximum(x[..., :half], x[..., half : 2 * half]), x[..., 2 * half :]], axis=-1)
    return x[..., 0]


class SpatialPool(nn.Module):
    """Make maps coarser with windows that lie symmetrically, so that turns and flips stay exact at *every* size.

    out(i) = sum_d w_d x(stride i + d) over the pixels d inside the map, with the weights of a window that sum to 1
    there. A window has `kernel_size` taps along an axis, or one more where only that keeps the middle of the map in
    place: for stride 2 odd windows belong to odd sizes and even ones to even sizes. There are ceil(size / stride)
    outputs.

    Symmetry:
      Exactly equivariant to quarter turns and flips, at any height and width. Under other angles `"blur"` loses least.
      `"max"` is refused for irreducible fields, which it does not commute with.

    Attributes:
      fields: field type of the map.
      stride: pixels from one output to the next.
      kernel_size: taps of the window, or one less, see above.
      mode: `"blur"` (binomial weights), `"mean"` (equal ones) or `"max"`.

    Cost:
      `2 kernel_size` operations a channel.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.equivariant import SpatialPool
      >>> from jaxlayers.geometry.groups import Cyclic
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> pool = SpatialPool(FieldType.regular(Cyclic(4), 1))
      >>> pool.apply({}, jnp.ones((28, 29, 4))).shape, pool.grid_report(28, 29).kernel_size, pool.grid_report(28).exact
      ((14, 15, 4), (4, 3), True)

    Source:
      Zhang, Making Convolutional Networks Shift-Invariant Again, ICML 2019 (blurring before subsampling); Mohamed,
      Cesa, Cohen, Welling, A Data and Compute Efficient Design for Limited-Resources Deep Learning, 2020 (which sizes
      keep grids symmetric).

    Differs:
      The window's parity follows from the map's size.
    """

    fields: FieldType
    stride: int = 2
    kernel_size: int = 3
    mode: str = "blur"

    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch rows columns channels"]:
        """Pool.

        Args:
          x: a map of type `fields`.

        Returns:
          A map of type `fields`.

        Raises:
          ValueError: if the map is not of type `fields`, the mode is unknown or does not suit the fields, or a size is
            not positive.
        """
        if self.mode not in ("blur", "mean", "max"):
            raise ValueError(f"mode={self.mode!r} must be 'blur', 'mean' or 'max'; set mode")
        if self.mode == "max" and not self.fields.pointwise:
            raise ValueError(
                f"fields={self.fields.fields} must be trivial or regular for mode='max'; set mode='blur' or 'mean'"
            )
        check_map(x, self.fields)
        report = self.grid_report(*x.shape[-3:-1])
        for axis, taps in zip((-3, -2), report.kernel_size, strict=True):
            x = pool_axis(x, axis + x.ndim, taps, self.stride, self.mode)
        return axes.constrain_map(x)

    @nn.nowrap
    def grid_report(self, height: int, width: int | None = None) -> GridReport:
        """Say what windows are taken on maps of a size; they are always exact.

        Args:
          height: of the map.
          width: of the map; `None` = height.

        Returns:
          The report.

        Raises:
          ValueError: if stride or kernel size are not positive.
        """
        size = (height, height if width is None else width)
        if self.stride < 1 or self.kernel_size < 1:
            raise ValueError(f"stride={self.stride} and kernel_size={self.kernel_size} must be positive; set them")
        taps = tuple(matching_kernel(length, self.kernel_size, self.stride) for length in size)
        return check_grid(size, (taps[0], taps[1]), self.stride, "SAME", layer=self.name or "SpatialPool")


def pool_axis(x: Float[Array, "*axes"], axis: int, kernel_size: int, stride: int, mode: str) -> Float[Array, "*pooled"]:
    """Pool one axis with a window whose weights sum to 1 inside the map, see `SpatialPool`.

    Args:
      x: any array.
      axis: which one, counted from 0.
      kernel_size: taps of the window.
      stride: entries from one output to the next; there are ceil(length / stride).
      mode: `"blur"` (binomial weights), `"mean"` (equal ones) or `"max"`.

    Returns:
      The pooled array. A sum of shifted slices, in pairs from both ends, so that the mirrored array gives the mirrored
      result to the last bit.
    """
    before, after, length = resolve_padding(x.shape[axis], kernel_size, stride, "SAME")
    stop = (length - 1) * stride + 1
    sides = [(before, after) if place == axis else (0, 0) for place in range(x.ndim)]
    padded = jnp.pad(x, sides, constant_values=-jnp.inf if mode == "max" else 0.0)
    slices = [jax.lax.slice_in_dim(padded, tap, tap + stop, stride, axis) for tap in range(kernel_size)]
    if mode == "max":
        return functools.reduce(jnp.maximum, slices)
    weights = [math.comb(kernel_size - 1, tap) if mode == "blur" else 1 for tap in range(kernel_size)]
    inside = np.pad(np.ones(x.shape[axis]), (before, after))
    total = sum(weight * inside[tap : tap + stop : stride] for tap, weight in enumerate(weights))
    shape = [-1 if place == axis else 1 for place in range(x.ndim)]
    pairs = [
        weights[tap] * (slices[tap] + slices[-1 - tap]) if 2 * tap != kernel_size - 1 else weights[tap] * slices[tap]
        for tap in range((kernel_size + 1) // 2)
    ]
    return functools.reduce(jnp.add, pairs) / jnp.asarray(np.reshape(total, shape), x.dtype)
