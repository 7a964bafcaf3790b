"""The kernels that cut and join windows move the same entries as their jnp twin, forwards and backwards."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlayers.core import axes
from jaxlayers.kernels import dispatch, pallas_cut
from jaxlayers.nn import window_maps
from jaxlayers.nn.drop_path import DropPath
from jaxlayers.ops import halo
from train.collectives import collectives

WHOLE = ((), ())


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("size", "window", "amount", "dtype"),
    [
        ((14, 21), (7, 7), (3, 3), jnp.float32),
        ((8, 12), (4, 4), (0, 0), jnp.bfloat16),
        ((6, 8), (3, 4), (1, 0), jnp.float32),
        ((6, 8), (3, 4), (0, 2), jnp.bfloat16),
        ((7, 14), (7, 7), (0, 3), jnp.float32),
        ((4, 4), (4, 4), (0, 0), jnp.float32),
    ],
    ids=str,
)
def test_cut_and_join_move_the_same_entries_as_their_twin(size, window, amount, dtype):
    x = draw(2, *size, 5, dtype=dtype)
    cut = functools.partial(pallas_cut.cut, window=window, amount=amount)
    expected, back = jax.vjp(lambda x: halo.cut_windows(x, window, amount, WHOLE), x)
    found, found_back = jax.vjp(cut, x)
    np.testing.assert_array_equal(found, expected)
    joined, join_back = jax.vjp(lambda y: pallas_cut.join(y, size, window, amount), found)
    np.testing.assert_array_equal(joined, x)
    # Gradients: of the cut by a join, and the other way round.
    gradient = draw(*expected.shape, seed=1, dtype=dtype)
    np.testing.assert_array_equal(found_back(gradient)[0], back(gradient)[0])
    np.testing.assert_array_equal(join_back(x)[0], expected)
    # The control: another shift is another order.
    if max(size) > max(window):
        other = (amount[0], (amount[1] + 1) % window[1])
        assert np.any(np.asarray(pallas_cut.cut(x, window, other)) != np.asarray(expected))


@pytest.mark.parametrize("kernels", ["jnp", "pallas"])
def test_maps_that_windows_do_not_fill_are_padded_and_cropped(kernels):
    x = draw(1, 2, 9, 10, 3)
    expected = halo.cut_windows(x, (4, 4), (2, 2), WHOLE)

    def both(x):
        with dispatch.use(kernels):
            y = window_maps.cut_windows(x, (4, 4), (2, 2), WHOLE)
            return y, window_maps.join_windows(y, (9, 10), (4, 4), (2, 2), WHOLE)

    text = str(jax.make_jaxpr(both)(x))
    assert ("pallas_call" in text) == (kernels == "pallas")
    found, joined = jax.jit(both)(x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(joined, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_a_residual_sum_is_one_pass_each_way(scaled, dtype):
    size, window, amount = (6, 8), (3, 4), (1, 2)
    x, gradient = draw(3, *size, 5, dtype=dtype), draw(3, *size, 5, seed=1, dtype=dtype)
    factor = jnp.asarray([0.0, 1.25, 2.5], jnp.float32) if scaled else None

    def kernels(x):
        windows, x = pallas_cut.cut_and_keep(x, window, amount)
        return pallas_cut.join(jnp.sin(windows), size, window, amount, onto=x, factor=factor)

    def twin(x):
        # In float32, of which a kernel rounds the result once.
        x = x.astype(jnp.float32)
        y = halo.join_windows(jnp.sin(halo.cut_windows(x, window, amount, WHOLE)), size, window, amount, WHOLE)
        return x + (y if factor is None else y * factor[:, None, None, None])

    (found, back), (expected, expected_back) = jax.vjp(kernels, x), jax.vjp(twin, x)
    tolerance = 2e-6 if dtype == jnp.float32 else 1e-2
    same = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    same(np.asarray(found, np.float32), expected)
    of_x, expected_of_x = back(gradient)[0], expected_back(gradient.astype(jnp.float32))[0]
    same(np.asarray(of_x, np.float32), np.asarray(expected_of_x, np.float32))
    # The control: maps are not only joined, and the factor counts.
    assert np.abs(np.asarray(found - x, np.float32)).max() > 0.5
    if scaled:
        np.testing.assert_array_equal(found[0], x[0])
    program = jax.make_jaxpr(lambda x, gradient: jax.vjp(kernels, x)[1](gradient))(x, gradient)
    assert not {"add", "add_any"} & {step.primitive.name for step in program.eqns}


@pytest.mark.parametrize("size", [(8, 8), (9, 10)], ids=str)
def test_windows_are_added_to_a_map_with_the_draws_of_stochastic_depth(size):
    x = draw(4, *size, 3)

    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x):
            y, x = window_maps.cut_and_keep(x, (4, 4), (2, 2), WHOLE)
            return window_maps.add_windows(x, jnp.cos(y), (4, 4), (2, 2), WHOLE, DropPath(0.5), deterministic=False)

    def run(kernels, key=7):
        def loss(x):
            with dispatch.use(kernels):
                y: Any = Branch().apply({}, x, rngs={"dropout": jax.random.key(key)})
            return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(x)

    ((_, expected), slope), ((_, found), found_slope) = run("jnp"), run("pallas")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found_slope, slope, rtol=0, atol=1e-5)
    kept = np.any(np.asarray(found) != np.asarray(x), axis=(1, 2, 3))
    assert 0 < kept.sum() < 4, "choose a key that drops some of the examples"


def test_what_the_kernel_does_not_serve_is_left_to_jnp():
    def kernel(choice, platform, size=(56, 56), window=(7, 7), features=96, dtype=jnp.bfloat16):
        with dispatch.use(choice, platform=platform):
            return dispatch.cut_kernel(size, window, features, dtype)

    assert dispatch.cut_kernel((56, 56), (7, 7), 96, jnp.bfloat16) == "jnp"
    assert kernel("table", "tpu") == kernel("pallas", "tpu") == kernel("pallas", "cpu") == "pallas"
    assert kernel("table", "cpu") == kernel("table", "gpu") == kernel("pallas", "gpu") == kernel("jnp", "tpu") == "jnp"
    assert kernel("pallas", "tpu", size=(8, 8, 8), window=(4, 4, 4)) == "jnp"
    assert kernel("pallas", "tpu", dtype=jnp.float64) == "jnp"
    assert kernel("pallas", "tpu", size=(7, 7 * 65)) == "jnp"
    assert kernel("pallas", "tpu", features=1024) == "pallas"
    assert kernel("pallas", "tpu", features=3072, dtype=jnp.float32) == "jnp"


def test_each_device_cuts_its_own_maps_and_nothing_is_sent():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = draw(4, 8, 8, 3)

    def both(x):
        y = pallas_cut.cut(x, (4, 4), (2, 2))
        return y, pallas_cut.join(jnp.sin(y), (8, 8), (4, 4), (2, 2))

    expected = jax.jit(both)(x)
    place = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.BATCH, "data"),)):
        placed = jax.device_put(x, place)
        compiled = jax.jit(both).lower(placed).compile()
        found = compiled(placed)
    assert not collectives(compiled.as_text(), mesh)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        assert one.sharding.spec[0] == "data"


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("size", "window", "features", "dtype"),
    [
        ((56, 56), 7, 96, jnp.bfloat16),
        ((7, 7), 7, 768, jnp.bfloat16),
        ((64, 64), 8, 96, jnp.float32),
        ((24, 48), 12, 128, jnp.bfloat16),
        ((12, 12), 3, 20, jnp.bfloat16),
    ],
    ids=str,
)
def test_kernels_compile_for_tpu(size, window, features, dtype):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    place = SingleDeviceSharding(topology.devices[0])
    amount = (window // 2 if size[0] > window else 0,) * 2

    def branch(x, factor):
        y, x = pallas_cut.cut_and_keep(x, (window, window), amount)
        y = pallas_cut.join(2 * y, size, (window, window), amount, onto=x, factor=factor)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    x = jax.ShapeDtypeStruct((2, *size, features), dtype, sharding=place)
    factor = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=place)
    for given in (factor, None):
        text: Any = jax.jit(jax.grad(branch)).lower(x, given).compile().as_text()
        assert text.count("tpu_custom_call") >= 4
