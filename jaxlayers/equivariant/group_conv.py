"""Group convolutions on images: maps whose channels turn and flip with the picture, for C_n and D_n.

Longer than most files, since the convolution, its norms, nonlinearities and poolings, and the network belong together.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, ones, zeros
from jaxlayers.core.safe import safe_divide, safe_norm
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, PrecisionLike
from jaxlayers.geometry.groups import Cyclic, Dihedral
from jaxlayers.geometry.planar_fields import (
    PERMUTATIONS,
    FieldType,
    GridReport,
    PlanarGroup,
    Run,
    check_grid,
    expand_filters,
    filter_factors,
    matching_kernel,
    resolve_padding,
)


def _check_map(x: Any, fields: FieldType) -> None:
    if x.ndim < 3 or x.shape[-1] != fields.channels:
        raise ValueError(
            f"a map of shape {x.shape} must be [*batch, height, width, {fields.channels}] for fields={fields.fields} "
            f"of {fields.group.name}; set the field type, or lift images by a SteerableConv"
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"a map must be of floating point; got {x.dtype}; convert it")


def _split(x: jax.Array, fields: FieldType) -> list[tuple[Run, jax.Array]]:
    """Return each run of fields as `[*batch, height, width, count, dimension]`."""
    return [
        (run, x[..., run.start : run.stop].reshape(*x.shape[:-1], run.multiplicity, run.dimension))
        for run in fields.runs
    ]


def _join(parts: list[jax.Array]) -> jax.Array:
    """Return the map of runs as `_split` gives them."""
    return jnp.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)


class _Weights(nn.Module):
    """Own the weights of the filters to one representation, and its bias."""

    shape: tuple[int, int]
    use_bias: bool
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, self.shape[-1:], self.param_dtype) if self.use_bias else None
        return kernel, bias


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


class SteerableConv(nn.Module):
    """Convolve fields of C_n or D_n by steerable filters, the most general linear layer that turns with the picture.

    out(x) = sum_d K(d) f(x + d) + b, over the offsets d of a square of taps, with K(d) `[channels_out, channels_in]`
    such that K(g d) = rho_out(g) K(d) rho_in(g)^-1 for every g. K is a sum of circular harmonics on Gaussian rings with
    learned weights, expanded by one small einsum at each call, so that one plain convolution remains. From trivial
    fields to regular ones this is the lifting convolution, between regular ones the group convolution.

    Symmetry:
      (g f)(x) = rho(g) f(g^-1 x) goes to the same of the output, for quarter turns and flips in the group exactly on
      the sizes that `grid_report` calls exact: always with stride 1 and odd kernels, and there with odd sizes for
      stride 2 (or even sizes and an even kernel). Otherwise the layer sees the turned image displaced by the pixels
      that the report gives. Other angles (C8, C16, D8) are approximate, and the error on smooth images falls with the
      square of the resolution: two layers of C8 with 5 x 5 taps and a GELU between them are off by 1.9, 0.47 and 0.12
      percent on pictures of 31, 61 and 121 pixels, where plain convolutions are off by 69, 40 and 20. Zeros from
      outside the picture add to it, unless the content lies within the inscribed disk.

    Attributes:
      inputs: field type of the input; images are `FieldType.trivial(group, colours)`.
      outputs: field type of the output, of the same group.
      kernel_size: taps along each axis.
      stride: pixels from one output to the next; for exactness at every size use 1 and `SpatialPool`.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"` or a number of pixels on each side, see
        `jaxlayers.geometry.planar_fields.resolve_padding`.
      use_bias: adds a number to each trivial and to each regular field (the same for all its channels); fields of
        other representations cannot have one.
      max_frequency: band limit of the filters, see `jaxlayers.geometry.planar_fields.harmonics`.
      ring_width: width of the Gaussian rings in pixels.
      precision: of the convolution; the filters are always built in full precision.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the weights `[inputs x basis, fields]`; `lecun_normal()` keeps the variance.
      bias_init: initialiser of the biases.

    Cost:
      One plain convolution of `channels_in x channels_out` filters, which are built once a call, whatever the batch.
      Regular fields of C4 have a quarter of the parameters of a plain convolution of as many channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import SteerableConv
      >>> from jaxlayers.geometry.groups import Cyclic
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> lift = SteerableConv(FieldType.trivial(Cyclic(8), 1), FieldType.regular(Cyclic(8), 4), kernel_size=5)
      >>> lift.init_with_output(jax.random.key(0), jnp.ones((2, 9, 9, 1)))[0].shape
      (2, 9, 9, 32)

    Source:
      Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, equations 10 and 11, and Steerable CNNs,
      ICLR 2017; Weiler and Cesa, General E(2)-Equivariant Steerable CNNs, NeurIPS 2019, equation 2 and appendix C;
      conventions of irreducible representations as in QUVA-Lab/escnn at 9ad44cc.

    Differs:
      Filters to and from regular fields are parametrised directly rather than through irreducible representations; the
      span is the same for one band limit. Moments that only the pixel grid brings into a harmonic are removed, without
      which the error of 5 x 5 and larger filters at other angles stays at 5 to 50 percent however fine the image. Maps
      are channels last.
    """

    inputs: FieldType
    outputs: FieldType
    kernel_size: int = 3
    stride: int = 1
    padding: str | int = "SAME"
    use_bias: bool = True
    max_frequency: int | None = None
    ring_width: float = 0.6
    precision: PrecisionLike = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns channels_out"]:
        """Convolve.

        Args:
          x: a map of type `inputs`. NaN spreads as in any convolution.

        Returns:
          A map of type `outputs`.

        Raises:
          ValueError: if the map is not of type `inputs` or is smaller than the kernel, the groups differ, or no filter
            of this size leads to one of the outputs.
        """
        if self.inputs.group != self.outputs.group:
            raise ValueError(
                f"inputs of {self.inputs.group.name} and outputs of {self.outputs.group.name} must have one group; set "
                "both field types"
            )
        _check_map(x, self.inputs)
        kernel, bias = self._filters(x)
        dtype = compute_dtype(x, kernel, dtype=self.dtype)
        *batch, height, width, channels = x.shape
        sides = [resolve_padding(length, self.kernel_size, self.stride, self.padding)[:2] for length in (height, width)]
        x = x.astype(dtype).reshape(math.prod(batch), height, width, channels)
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, [(0, 0), *sides, (0, 0)], mode="wrap")
            sides = [(0, 0), (0, 0)]
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(dtype),
            (self.stride, self.stride),
            sides,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )
        if bias is not None:
            y = y + bias.astype(dtype)
        return axes.constrain_map(y.reshape(*batch, *y.shape[1:]))

    def _filters(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return the kernel of the plain convolution, in float32 or better, and the bias of its channels."""
        group, options = self.inputs.group, (self.kernel_size, self.max_frequency, self.ring_width)
        kernels, biases = [], []
        for target in self.outputs.runs:
            sizes = [
                math.prod(filter_factors(group, source.name, target.name, *options).shape)
                for source in self.inputs.runs
            ]
            total = sum(source.multiplicity * size for source, size in zip(self.inputs.runs, sizes, strict=True))
            if total == 0:
                raise ValueError(
                    f"kernel_size={self.kernel_size} and max_frequency={self.max_frequency} leave no filter from "
                    f"{self.inputs.fields} to {target.name!r}; set a larger kernel_size or max_frequency"
                )
            has_bias = self.use_bias and target.name in PERMUTATIONS
            weights, bias = _Weights(
                (total, target.multiplicity),
                has_bias,
                self.param_dtype,
                self.kernel_init,
                self.bias_init,
                name=target.name,
            )()
            weights = weights.astype(at_least_float32(compute_dtype(x, weights, dtype=self.dtype)))
            parts, start = [], 0
            for source, size in zip(self.inputs.runs, sizes, strict=True):
                stop = start + source.multiplicity * size
                part = weights[start:stop].reshape(source.multiplicity, size, target.multiplicity)
                parts.append(expand_filters(part, group, source.name, target.name, *options))
                start = stop
            kernels.append(jnp.concatenate(parts, axis=2))
            channels = target.multiplicity * target.dimension
            biases.append(
                jnp.zeros(channels, weights.dtype)
                if bias is None
                else jnp.repeat(bias.astype(weights.dtype), target.dimension, total_repeat_length=channels)
            )
        any_bias = self.use_bias and any(run.name in PERMUTATIONS for run in self.outputs.runs)
        return jnp.concatenate(kernels, axis=3), jnp.concatenate(biases) if any_bias else None

    @nn.nowrap
    def grid_report(self, height: int, width: int | None = None) -> GridReport:
        """Say whether quarter turns and flips are exact on maps of a size, and what happens otherwise.

        Args:
          height: of the map.
          width: of the map; `None` = height.

        Returns:
          The report; its text is one line.

        Raises:
          ValueError: if the kernel does not fit.
        """
        size = (height, height if width is None else width)
        return check_grid(size, self.kernel_size, self.stride, self.padding, layer=self.name or "SteerableConv")


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
        _check_map(x, self.fields)
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
        _check_map(x, self.fields)
        dtype = compute_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        parts = []
        for run, part in _split(x.astype(at_least_float32(dtype)), self.fields):
            _, bias = _ScaleBias(run.multiplicity, False, True, self.param_dtype, self.bias_init, name=run.name)()
            assert bias is not None
            length = safe_norm(part)
            length = jnp.where(length > self.epsilon, length, 0.0)
            factor = safe_divide(self.activation_fn(length + bias.astype(part.dtype)), length)
            parts.append(part * factor[..., None])
        return _join(parts).astype(dtype)


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
        _check_map(x, gated_inputs(self.fields))
        return _gate(x, self.fields, self.activation_fn, self.gate_fn)


def _gate(x: jax.Array, fields: FieldType, activation_fn: ActivationFn, gate_fn: ActivationFn) -> jax.Array:
    """Return the fields of `gated_inputs(fields)` multiplied by their gates."""
    plain = dict(fields.fields).get("trivial", 0)
    found = {run.name: part for run, part in _split(x, gated_inputs(fields))}
    gates = gate_fn(found["trivial"][..., plain:, :])
    parts, start = [], 0
    for run in fields.runs:
        if run.name == "trivial":
            parts.append(activation_fn(found["trivial"][..., :plain, :]))
        else:
            parts.append(found[run.name] * gates[..., start : start + run.multiplicity, :])
            start += run.multiplicity
    return _join(parts)


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
        _check_map(x, self.fields)
        dtype = compute_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        parts = [part for _, part in _split(x.astype(at_least_float32(dtype)), self.fields)]
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
        return _join(results).astype(dtype)


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
        _check_map(x, self.fields)
        parts = []
        for run, part in _split(x, self.fields):
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
        _check_map(x, self.fields)
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


class GroupCNNBlock(nn.Module):
    """Add to fields what two steerable convolutions make of them.

    out = act(skip(x) + norm(conv2(act(norm(conv1(x)))))), with a 1 x 1 steerable convolution for skip where the field
    types differ. act is pointwise for trivial and regular fields, and gated otherwise (conv1 and conv2 then give the
    gates too).

    Symmetry:
      Exactly equivariant to quarter turns and flips at every size, approximately to other angles, see `SteerableConv`.

    Attributes:
      inputs: field type of the input.
      outputs: field type of the output.
      kernel_size: taps of the convolutions along each axis; odd.
      stride: of the first convolution (and of skip); more than 1 is exact for odd sizes only.
      max_frequency: band limit of the filters.
      activation_fn: nonlinearity.
      norm: makes a norm, called as `norm(fields, dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the weights.
      bias_init: initialiser of the biases.

    Cost:
      Two convolutions of its channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import GroupCNNBlock
      >>> from jaxlayers.geometry.groups import Dihedral
      >>> from jaxlayers.geometry.planar_fields import FieldType
      >>> block = GroupCNNBlock(*[FieldType.regular(Dihedral(4), count) for count in (1, 2)])
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 6, 6, 8)))[0].shape
      (1, 6, 6, 16)

    Source:
      Weiler and Cesa, General E(2)-Equivariant Steerable CNNs, NeurIPS 2019, section 3.4 (residual networks of regular
      fields); He et al., Deep Residual Learning, CVPR 2016.

    Differs:
      Norms without statistics of the batch.
    """

    inputs: FieldType
    outputs: FieldType
    kernel_size: int = 3
    stride: int = 1
    max_frequency: int | None = None
    activation_fn: ActivationFn = nn.relu
    norm: Callable[..., Any] = FieldNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns channels_out"]:
        """Apply the block.

        Args:
          x: a map of type `inputs`.

        Returns:
          A map of type `outputs`.

        Raises:
          ValueError: as `SteerableConv`, or if the kernel size is even.
        """
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd; set kernel_size")
        wide = self.outputs if self.outputs.pointwise else gated_inputs(self.outputs)
        norms: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(
            SteerableConv,
            max_frequency=self.max_frequency,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            **norms,
        )

        def act(x: jax.Array) -> jax.Array:
            if self.outputs.pointwise:
                return self.activation_fn(x)
            return _gate(x, self.outputs, self.activation_fn, nn.sigmoid)

        # Equal padding on both sides leaves the two branches aligned also where the stride breaks the symmetry.
        margin = self.kernel_size // 2
        y = conv(self.inputs, wide, self.kernel_size, self.stride, margin, use_bias=False, name="conv1")(x)
        y = act(self.norm(wide, name="norm1", **norms)(y))
        y = conv(self.outputs, wide, self.kernel_size, use_bias=False, name="conv2")(y)
        y = self.norm(wide, name="norm2", **norms)(y)
        if self.inputs != wide or self.stride != 1:
            x = conv(self.inputs, wide, 1, self.stride, 0, use_bias=False, name="skip")(x)
        return axes.constrain_map(act(x + y))

    @nn.nowrap
    def grid_report(self, height: int, width: int | None = None) -> GridReport:
        """Say whether quarter turns and flips are exact on maps of a size, as `SteerableConv.grid_report` does."""
        size = (height, height if width is None else width)
        return check_grid(
            size, self.kernel_size, self.stride, self.kernel_size // 2, layer=self.name or "GroupCNNBlock"
        )


class GroupCNN(nn.Module):
    """Classify images by a residual network of group convolutions, with logits that turns and flips do not change.

    A steerable convolution lifts the image to fields; stage s has `depths[s]` blocks of `widths[s]` fields of each
    representation, at half the resolution of the stage before; the last map is pooled over the group, then its
    maximum over space is mapped to logits.

    Symmetry:
      Invariant. Exactly to the quarter turns and flips in the group, on the sizes that `grid_report` calls exact: with
      `downsample="pool"` all of them, with `"stride"` only those that are 1 more than a multiple of the whole stride.
      In an untrained network of C4 with three stages, a quarter turn of smooth 28 x 28 images moves the logits by
      4e-6 of their spread over images with `"pool"`, and by 0.75 with `"stride"` (3e-6 at 29 x 29). Approximately to
      other angles: turned by 45 degrees, logits of C8 with two stages move by 0.7, 0.4 and 0.2 of their spread on
      images of 28, 56 and 112 pixels, those of C4 by 1.6, 1.3 and 0.7.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the invariant features.
      group: `Cyclic(n)` or `Dihedral(n)`.
      widths: fields of each representation in each stage.
      depths: blocks of each stage.
      representation: `"regular"`, or `"irreps"` for the irreducible representations up to frequency 2 that a filter of
        this size can lift an image to, with gates.
      kernel_size: taps of the convolutions along each axis; odd.
      max_frequency: band limit of the filters.
      downsample: `"pool"` (blurring with windows of matching parity) or `"stride"` (strided convolutions).
      pool: over the group, `"max"` or `"mean"`.
      dropout_rate: dropout before the head.
      activation_fn: nonlinearity.
      norm: makes a norm, called as `norm(fields, dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the weights.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of a plain residual network with as many channels, `widths` times the size of the group.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import GroupCNN
      >>> from jaxlayers.geometry.groups import Dihedral
      >>> model = GroupCNN(num_classes=10, group=Dihedral(4), widths=(2, 4), depths=(1, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 28, 28, 1)))[0].shape
      (1, 10)
      >>> all(report.exact for report in model.grid_report(28))
      True

    Source:
      Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, section 8; Weiler and Cesa, General
      E(2)-Equivariant Steerable CNNs, NeurIPS 2019, section 3.

    Differs:
      Downsampling with windows of matching parity instead of strides, so that no size breaks the symmetry, and norms
      without statistics of the batch.
    """

    num_classes: int = 10
    group: PlanarGroup = Dihedral(4)
    widths: tuple[int, ...] = (8, 16, 32)
    depths: tuple[int, ...] = (1, 1, 1)
    representation: str = "regular"
    kernel_size: int = 3
    max_frequency: int | None = None
    downsample: str = "pool"
    pool: str = "max"
    dropout_rate: float = 0.0
    activation_fn: ActivationFn = nn.relu
    norm: Callable[..., Any] = FieldNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    def _check(self) -> None:
        if len(self.widths) != len(self.depths) or not self.widths or min(*self.widths, *self.depths) < 1:
            raise ValueError(
                f"widths={self.widths} and depths={self.depths} must have one positive entry a stage; set both"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd; set kernel_size")
        if self.representation not in ("regular", "irreps"):
            raise ValueError(f"representation={self.representation!r} must be 'regular' or 'irreps'; set it")
        if self.downsample not in ("pool", "stride"):
            raise ValueError(f"downsample={self.downsample!r} must be 'pool' or 'stride'; set downsample")

    @nn.nowrap
    def stage_fields(self) -> tuple[FieldType, ...]:
        """Return the field type of each stage."""
        if self.representation == "regular":
            return tuple(FieldType.regular(self.group, width) for width in self.widths)
        options = (self.kernel_size, self.max_frequency)
        names = [
            name
            for name, _ in FieldType.irreps(self.group, 1, max_frequency=2).fields
            if math.prod(filter_factors(self.group, "trivial", name, *options).shape)
        ]
        return tuple(FieldType(self.group, tuple((name, width) for name in names)) for width in self.widths)

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch height width colours"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images, channels last; more than three axes count as batch.
          deterministic: no dropout.

        Returns:
          Logits, or with `num_classes=0` the features.

        Raises:
          ValueError: if `x` has fewer than three axes or is not of floating point, or a field does not fit.
        """
        self._check()
        if x.ndim < 3 or not all(x.shape[-3:]):
            raise ValueError(f"images of shape {x.shape} must be [*batch, height, width, colours]; add axes")
        _check_map(x, colours := FieldType.trivial(self.group, x.shape[-1]))
        norms: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**norms, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        stages = self.stage_fields()
        fields = stages[0]
        wide = fields if fields.pointwise else gated_inputs(fields)
        x = SteerableConv(
            colours,
            wide,
            self.kernel_size,
            use_bias=False,
            max_frequency=self.max_frequency,
            name="lift",
            **common,
        )(x)
        x = self.norm(wide, name="lift_norm", **norms)(x)
        if fields.pointwise:
            x = PointwiseNonlinearity(fields, self.activation_fn, name="lift_act")(x)
        else:
            x = GatedNonlinearity(fields, self.activation_fn, name="lift_act")(x)
        for stage, (target, depth) in enumerate(zip(stages, self.depths, strict=True)):
            if stage and self.downsample == "pool":
                x = SpatialPool(fields, name=f"pools_{stage}")(x)
            for index in range(depth):
                x = GroupCNNBlock(
                    fields,
                    target,
                    self.kernel_size,
                    stride=2 if stage and not index and self.downsample == "stride" else 1,
                    max_frequency=self.max_frequency,
                    activation_fn=self.activation_fn,
                    norm=self.norm,
                    name=f"stages_{stage}_blocks_{index}",
                    **common,
                )(x)
                fields = target
        x = GroupPool(fields, self.pool, name="group_pool")(x)
        # Not the mean: norms over the map leave it almost the same for all images, and training is slow to amplify it.
        x = group_maximum(jnp.moveaxis(x.reshape(*x.shape[:-3], -1, x.shape[-1]), -2, -1))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.Dense(self.num_classes, name="head", **common)(x) if self.num_classes else x

    @nn.nowrap
    def grid_report(self, height: int, width: int | None = None) -> tuple[GridReport, ...]:
        """Say which layers keep quarter turns and flips exact for images of a size, and what happens in the others.

        Args:
          height: of the images.
          width: of the images; `None` = height.

        Returns:
          A report for each layer that has a grid, in order; the model is exact if all are.

        Raises:
          ValueError: if a field does not fit.
        """
        self._check()
        size = (height, height if width is None else width)
        reports = [check_grid(size, self.kernel_size, layer="lift")]
        fields = self.stage_fields()[0]
        for stage, depth in enumerate(self.depths):
            if stage and self.downsample == "pool":
                pool = SpatialPool(fields, name=f"pools_{stage}", parent=None)
                reports.append(pool.grid_report(*reports[-1].out_size))
            for index in range(depth):
                stride = 2 if stage and not index and self.downsample == "stride" else 1
                name = f"stages_{stage}_blocks_{index}"
                margin = self.kernel_size // 2
                reports.append(check_grid(reports[-1].out_size, self.kernel_size, stride, margin, layer=name))
        return tuple(reports)


_DIGITS = (jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32),)
_PICTURES = (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)

VARIANTS: dict[str, dict[str, Any]] = {
    "group_cnn_c4": {
        "module": GroupCNN,
        "inputs": _PICTURES,
        "group": Cyclic(4),
        "widths": (16, 32, 64),
        "depths": (2, 2, 2),
    },
    "group_cnn_d4": {
        "module": GroupCNN,
        "inputs": _PICTURES,
        "group": Dihedral(4),
        "widths": (12, 24, 48),
        "depths": (2, 2, 2),
    },
    "group_cnn_c8_digits": {"module": GroupCNN, "inputs": _DIGITS, "group": Cyclic(8), "kernel_size": 5},
    "group_cnn_d8_digits": {"module": GroupCNN, "inputs": _DIGITS, "group": Dihedral(8), "widths": (6, 12, 24)},
    "group_cnn_d8_irreps_digits": {
        "module": GroupCNN,
        "inputs": _DIGITS,
        "group": Dihedral(8),
        "representation": "irreps",
        "widths": (8, 16, 32),
    },
}
