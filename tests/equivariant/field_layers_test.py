"""Nonlinearities, norms and poolings of fields: they turn with the picture, and their plain forms do not."""

import functools
import itertools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.field_layers import (
    FieldNorm,
    GatedNonlinearity,
    GroupPool,
    NormNonlinearity,
    PointwiseNonlinearity,
    SpatialPool,
    gated_inputs,
)
from jaxlayers.geometry.groups import Turn
from jaxlayers.geometry.planar_fields import (
    FieldType,
)
from jaxlayers.testing import BadInput, Case, assert_equivariant
from tests.equivariant.group_conv_test import (
    C4,
    D4,
    MIXED,
    REGULAR,
    TURNING,
    WRONG_CHANNELS,
    Fields,
    claim,
    elements,
    maps,
    plain,
    quick,
)

CASES = (
    Case(
        name="pointwise_nonlinearity",
        within="group_cnn",
        module=PointwiseNonlinearity(REGULAR, nn.gelu),
        inputs=maps(8),
        symmetries=(claim(REGULAR, REGULAR, lambda x: jnp.tanh(x * jnp.arange(8))),),
        leading_axes=True,
        bad_inputs=(
            WRONG_CHANNELS,
            BadInput(
                match=r"fields=\(\('trivial', 1\), \('irrep_1', 2\)\) must be trivial or regular",
                module=PointwiseNonlinearity(TURNING),
                inputs=maps(5),
            ),
        ),
    ),
    Case(
        name="norm_nonlinearity",
        module=NormNonlinearity(MIXED),
        inputs=maps(MIXED.channels),
        symmetries=(claim(MIXED, MIXED, lambda x: jnp.maximum(x - 0.3, 0)),),
        leading_axes=True,
        bad_inputs=(WRONG_CHANNELS,),
    ),
    Case(
        name="gated_nonlinearity",
        module=GatedNonlinearity(MIXED),
        inputs=maps(MIXED.channels + 2),
        symmetries=(claim(gated_inputs(MIXED), MIXED, lambda x: nn.sigmoid(x[..., :11]) * x[..., 2:]),),
        leading_axes=True,
        bad_inputs=(WRONG_CHANNELS,),
    ),
    Case(
        name="field_norm",
        within="group_cnn",
        module=FieldNorm(MIXED),
        inputs=maps(MIXED.channels),
        symmetries=(claim(MIXED, MIXED, functools.partial(plain, nn.GroupNorm(11))),),
        leading_axes=True,
        bad_inputs=(
            WRONG_CHANNELS,
            BadInput(match=r"over='batch' must be 'map' or 'pixel'", module=FieldNorm(MIXED, over="batch")),
        ),
    ),
    Case(
        name="field_norm_pixel",
        within="group_cnn",
        module=FieldNorm(MIXED, over="pixel"),
        inputs=maps(MIXED.channels),
        symmetries=(claim(MIXED, MIXED, functools.partial(plain, nn.LayerNorm())),),
        leading_axes=True,
        bad_inputs=(WRONG_CHANNELS,),
    ),
    Case(
        name="group_pool",
        within="group_cnn",
        module=GroupPool(MIXED),
        inputs=maps(MIXED.channels),
        symmetries=(claim(MIXED, FieldType.trivial(D4, 3), lambda x: x[..., :3]),),
        leading_axes=True,
        bad_inputs=(
            WRONG_CHANNELS,
            BadInput(match=r"mode='min' must be 'max' or 'mean'", module=GroupPool(MIXED, "min")),
        ),
    ),
    Case(
        name="spatial_pool",
        within="group_cnn",
        module=SpatialPool(MIXED),
        inputs=maps(MIXED.channels, 6),
        symmetries=(claim(MIXED, MIXED, lambda x: nn.avg_pool(jnp.asarray(x), (3, 3), (2, 2), "SAME")),),
        leading_axes=True,
        bad_inputs=(
            WRONG_CHANNELS,
            BadInput(match=r"mode='min' must be 'blur', 'mean' or 'max'", module=SpatialPool(MIXED, mode="min")),
            BadInput(
                match=r"fields=.* must be trivial or regular for mode='max'", module=SpatialPool(MIXED, mode="max")
            ),
            BadInput(match=r"stride=0 and kernel_size=3 must be positive", module=SpatialPool(MIXED, stride=0)),
        ),
    ),
)


def test_pointwise_functions_break_irreducible_fields_and_a_bias_too(rng):
    x = rng.normal(size=(5, 5, 5)).astype(np.float32)
    check = functools.partial(assert_equivariant, representations=["image"], output="image")
    check(lambda x: GatedNonlinearity(TURNING).apply({}, jnp.concatenate([x[..., :1]] * 3 + [x[..., 1:]], -1)),
          Fields(TURNING), x)  # fmt: skip
    for wrong in (nn.relu, lambda x: jnp.asarray(x) + 1):
        with pytest.raises(AssertionError):
            check(wrong, Fields(TURNING), x)


@pytest.mark.parametrize("mode", ["blur", "mean", "max"])
def test_spatial_pooling_is_exact_at_any_height_and_width(mode, rng):
    fields = FieldType.regular(D4, 1)
    for shape, stride in (((6, 7), 2), ((5, 8), 3), ((1, 2), 2)):
        pool = SpatialPool(fields, stride=stride, mode=mode)
        apply = quick(functools.partial(pool.apply, {}))
        x = rng.normal(size=(*shape, 8)).astype(np.float32)
        y = np.asarray(apply(jnp.asarray(x)))
        assert y.shape == (*pool.grid_report(*shape).out_size, 8)
        for steps, flip in elements(D4):
            g = Turn(np.asarray(steps), np.asarray(flip))
            moved = apply(jnp.asarray(fields.act(g, x)))
            np.testing.assert_allclose(moved, fields.act(g, y), atol=1e-6)


def test_pooling_a_constant_map_keeps_it_up_to_the_border():
    fields = FieldType.trivial(C4, 1)
    for mode, size in itertools.product(("blur", "mean", "max"), (5, 6)):
        np.testing.assert_allclose(
            quick(SpatialPool(fields, mode=mode).apply)({}, jnp.full((size, size, 1), 2.0)), 2.0, rtol=1e-6
        )


def test_norms_of_fields_are_one_and_mean_zero(rng):
    x = jnp.asarray(3 + 2 * rng.normal(size=(2, 6, 6, MIXED.channels)), jnp.float32)
    for over, places in (("map", (1, 2)), ("pixel", ())):
        norm = FieldNorm(MIXED, over=over, use_bias=False, use_scale=False)
        y = np.asarray(quick(norm.apply)({}, x))
        if over == "map":
            for run in MIXED.runs:
                part = y[..., run.start : run.stop]
                np.testing.assert_allclose(np.mean(part**2, axis=(*places, 3)), 1, rtol=1e-3)
                if run.name != "irrep_1_1":
                    np.testing.assert_allclose(np.mean(part, axis=(*places, 3)), 0, atol=1e-5)
        else:
            np.testing.assert_allclose(np.mean(y**2, axis=-1), 1, rtol=1e-3)


def test_group_pool_takes_maximum_mean_or_length(rng):
    x = rng.normal(size=(3, 3, MIXED.channels)).astype(np.float32)
    for mode, fn in (("max", np.max), ("mean", np.mean)):
        found = quick(GroupPool(MIXED, mode).apply)({}, jnp.asarray(x))
        expected = np.stack([x[..., 0], fn(x[..., 1:9], axis=-1), np.linalg.norm(x[..., 9:], axis=-1)], axis=-1)
        np.testing.assert_allclose(found, expected, atol=1e-6)
