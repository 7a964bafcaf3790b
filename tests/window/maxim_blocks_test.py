"""The blocks of MAXIM: what their two branches reach, the limits in which they pass maps on, and their cost.

That they equal the official ones is shown in `maxim_test.py`.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import maxim_blocks
from jaxlayers.window.maxim_blocks import (
    CrossGating,
    MultiAxisGatedMlp,
    ResidualChannelAttention,
    SpatialGatingUnit,
    SupervisedAttention,
)
from tests.window.maxim_test import random_variables, with_zeros

CASES = (
    Case(
        name="spatial_gating_unit",
        within="maxim",
        module=SpatialGatingUnit(kernel_init=nn.initializers.normal(0.5)),
        inputs=lambda rng: (rng.normal(size=(2, 3, 4, 6)),),
        leading_axes=True,
        bad_inputs=(BadInput(match="features=5 must be even", inputs=lambda rng: (np.ones((2, 3, 5)),)),),
    ),
    Case(
        name="multi_axis_gated_mlp",
        within="maxim",
        module=MultiAxisGatedMlp(window_size=(2, 3), grid_size=2, kernel_init=nn.initializers.normal(0.3)),
        inputs=lambda rng: (rng.normal(size=(2, 4, 6, 4)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"size \(4, 6\) must be a multiple of window_size=5", module=MultiAxisGatedMlp(5, 2)),
            BadInput(match=r"must be a multiple of grid_size=\(4, 4\)", module=MultiAxisGatedMlp(2, (4, 4))),
            BadInput(match="must be a multiple of window_size=0", module=MultiAxisGatedMlp(0, 2)),
            BadInput(match="halves of 5 features must be equal", module=MultiAxisGatedMlp(2, 2, expand_ratio=1.25)),
            BadInput(match="mlp_ratio=0.2 must leave two", module=MultiAxisGatedMlp(2, 2, mlp_ratio=0.2)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 6)),)),
        ),
    ),
    Case(
        name="residual_channel_attention",
        within="maxim",
        module=ResidualChannelAttention(),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 6)),),
        leading_axes=True,
        bad_inputs=(BadInput(match="needs at least 3 axes", inputs=lambda rng: (np.ones((5, 4)),)),),
    ),
    Case(
        name="cross_gating",
        within="maxim",
        module=CrossGating(4, window_size=2, grid_size=(2, 3), upsample=True),
        inputs=lambda rng: (rng.normal(size=(2, 4, 6, 3)), rng.normal(size=(2, 2, 3, 5))),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="must have the size of that of shape", module=CrossGating(4, 2, 2)),
            BadInput(
                match="must have half the size", inputs=lambda rng: (np.ones((1, 4, 6, 3)), np.ones((1, 4, 6, 5)))
            ),
            BadInput(match="features=0 must be positive", module=CrossGating(0, 2, 2, upsample=True)),
            BadInput(match="multiple of grid_size=5", module=CrossGating(4, 2, 5, upsample=True)),
        ),
    ),
    Case(
        name="supervised_attention",
        within="maxim",
        module=SupervisedAttention(),
        inputs=lambda rng: (rng.normal(size=(2, 4, 5, 4)), rng.normal(size=(2, 4, 5, 3))),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="must have the size", inputs=lambda rng: (np.ones((1, 4, 5, 4)), np.ones((1, 8, 5, 3)))),
        ),
    ),
)


# Reach ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 8), (12, 4)])
def test_parts_are_cut_and_put_together_exactly(size):
    class Same(nn.Module):
        def __call__(self, x):
            return x

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)), jnp.float32)
    for grid in (False, True):
        np.testing.assert_array_equal(maxim_blocks._over_parts(Same(), x, (3, 2), grid=grid), x)
    # Negative control: what was dealt out to a grid is not put together as windows.
    mixed = maxim_blocks.merge_windows(maxim_blocks.partition_grid(x, (3, 2)), (3, 2), size)
    assert np.any(mixed != x)


@pytest.mark.parametrize(("size", "window", "cells"), [((8, 8), 4, 2), ((6, 8), 2, 2), ((6, 6), 3, 3)])
def test_block_branch_is_local_and_grid_branch_reaches_all_that_is_congruent(size, window, cells):
    module = MultiAxisGatedMlp(window_size=window, grid_size=cells)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*size, 2)), jnp.float32)
    variables = random_variables(module, x)
    # The grid's half enters the last product first.
    kernel = variables["params"]["down"]["kernel"]
    halves = {"grid": kernel.at[2:].set(0), "block": kernel.at[:2].set(0), "both": kernel}

    @jax.jit
    def hears(kernel):
        params = {**variables["params"], "down": {**variables["params"]["down"], "kernel": kernel}}
        return jnp.abs(jax.jacobian(lambda x: module.apply({"params": params}, x))(x)).sum((2, 5)) > 0

    found = {name: np.asarray(hears(one)).reshape(math.prod(size), -1) for name, one in halves.items()}
    places = list(itertools.product(*map(range, size)))
    strides = [length // cells for length in size]

    def alike(of):
        return np.array([[of(p) == of(q) for q in places] for p in places])

    same_window = alike(lambda p: tuple(at // window for at in p))
    same_group = alike(lambda p: tuple(at % stride for at, stride in zip(p, strides, strict=True)))
    np.testing.assert_array_equal(found["block"], same_window)
    np.testing.assert_array_equal(found["grid"], same_group)
    # Negative controls: each is not the other, and both together are neither.
    assert np.any(same_window != same_group)
    np.testing.assert_array_equal(found["both"], same_window | same_group)
    # The grid's reach spans the map, from the first cell to the last one.
    assert same_group[0].sum() == cells**2
    assert same_group[0, places.index(tuple(length - stride for length, stride in zip(size, strides, strict=True)))]


# Limits and cost -----------------------------------------------------------------------------------------------------


def test_gates_without_weights_pass_one_half_and_blocks_without_output_pass_everything(rng):
    x = jnp.asarray(rng.normal(size=(1, 4, 6, 4)), jnp.float32)
    gate = SpatialGatingUnit()
    variables = random_variables(gate, x)
    np.testing.assert_array_equal(gate.apply(with_zeros(variables, "mix/kernel", "mix/bias"), x), x[..., :2])
    assert np.abs(gate.apply(variables, x) - x[..., :2]).max() > 0.1
    mix = MultiAxisGatedMlp(window_size=2, grid_size=2)
    variables = random_variables(mix, x)
    closed = with_zeros(variables, "params/down/kernel", "params/down/bias")
    np.testing.assert_array_equal(mix.apply(closed, x), x)
    assert np.abs(mix.apply(variables, x) - x).max() > 0.1
    for dense in (False, True):
        attend = ResidualChannelAttention(dense=dense)
        variables = random_variables(attend, x)
        ends = ("down/kernel", "down/bias") if dense else ("convolution2/kernel", "convolution2/bias")
        np.testing.assert_array_equal(attend.apply(with_zeros(variables, *ends), x), x)
        assert np.abs(attend.apply(variables, x) - x).max() > 0.1


def test_a_gate_that_hears_nothing_leaves_the_other_map_alone(rng):
    # With y's features closed (in_y = 0) its gates are constant: x no longer hears y but by the sum.
    module = CrossGating(4, window_size=2, grid_size=2)
    x, y, z = (jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32) for _ in range(3))
    variables = random_variables(module, x, y)
    closed = with_zeros(variables, "in_y/kernel", "in_y/bias", "project_y/kernel")
    apply = jax.jit(module.apply)
    np.testing.assert_array_equal(apply(closed, x, y)[0], apply(closed, x, z)[0])
    assert np.abs(apply(variables, x, y)[0] - apply(variables, x, z)[0]).max() > 0.1


@pytest.mark.parametrize("window", [2, (4, 2)])
def test_cost_of_the_blocks_is_the_stated_one(window):
    p = math.prod(window) if isinstance(window, tuple) else window**2
    x, y = (jax.ShapeDtypeStruct((1, 8, 8, width), jnp.float32) for width in (4, 6))

    def cost(module, *inputs):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return count_macs(module.apply, shapes, *inputs) / 64

    mix = MultiAxisGatedMlp(window, 2, expand_ratio=3.0, mlp_ratio=4.0)
    assert cost(mix, x) == 3 * 16 * (2 + 3 * 3 * 4 / 4) + 3 * 4 * 4 * (p + 4) / 4
    assert cost(CrossGating(8, window, 2), x, y) == 12 * 64 + 2 * 8 * (p + 4) + 8 * (4 + 6)


def test_norm_statistics_stay_in_float32_under_bfloat16():
    block = MultiAxisGatedMlp(window_size=2, grid_size=2, dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 4), jnp.bfloat16)
    program = str(jax.make_jaxpr(functools.partial(block.apply, random_variables(block, x)))(x))
    assert "bf16[1,4,4,1] = rsqrt" not in program
    assert "f32[1,4,4,1] = rsqrt" in program
