"""The kernels of a block's second half against their jnp twin: interpreted on CPU, and compiled for a TPU."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlayers.core import axes
from jaxlayers.kernels import dispatch
from jaxlayers.kernels.pallas_feed_forward import _Layout, _twice, residual_feed_forward
from jaxlayers.nn.transformer_block import TransformerBlock
from jaxlayers.window import SwinBlock, SwinV2Block
from train.collectives import collectives


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(x, scale, offset, up, up_bias, down, down_bias, factor=None, epsilon=1e-6, norm_first=True):
    """Return the half of a block as it is written in a paper, in float32."""

    def norm(x):
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon) * scale + offset

    wide = x.astype(jnp.float32)
    y = norm(wide) if norm_first else wide
    y = jax.nn.gelu(y @ up + up_bias, approximate=False) @ down + down_bias
    y = y if norm_first else norm(y)
    y = y if factor is None else y * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
    return (wide + y).astype(x.dtype)


def problem(shape, hidden, batch_ndim=0, dtype=jnp.float32):
    """Return the operands; tokens off zero, and a factor of each example of which the first is dropped."""
    features = shape[-1]
    x = (1 + 2 * draw(0, *shape)).astype(dtype)
    weights = [1 + draw(1, features) / 3, draw(2, features)]
    weights += [draw(3, features, hidden) / features**0.5, draw(4, hidden)]
    weights += [draw(5, hidden, features) / hidden**0.5, draw(6, features)]
    factor = jnp.abs(draw(7, *shape[:batch_ndim])).at[0].set(0) if batch_ndim else None
    return x, *weights, factor


def differentiated(function):
    """Return a function of the operands that gives the result and the gradients of a sum of it, but for the factor."""

    def total(*operands):
        out = function(*operands)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    def both(*operands):
        (_, out), gradients = jax.value_and_grad(total, argnums=tuple(range(7)), has_aux=True)(*operands)
        return out, *gradients

    return jax.jit(both)


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


PROBLEMS = {
    # Rows of seven tokens are filled up to tiles; three examples share a block.
    "maps-with-rows-that-fill-no-tile": problem((3, 3, 7, 12), 24, 1),
    "tokens-that-fill-tiles": problem((3, 16, 12), 20, 1),
    # Seven rows of 100 tokens lie in two blocks of four, and what follows the last may be anything.
    "blocks-that-do-not-divide": problem((7, 100, 12), 24, 1),
    "one-axis-of-tokens-in-two-chunks": problem((640, 8), 16),
    "examples-on-two-axes": problem((2, 2, 8, 6), 16, 2),
}


@pytest.mark.parametrize("norm_first", [True, False], ids=["norm-first", "norm-last"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_half_a_block_equals_the_plain_one_in_value_and_gradient(name, norm_first):
    *operands, factor = PROBLEMS[name]
    function, twin = (
        differentiated(functools.partial(each, norm_first=norm_first)) for each in (residual_feed_forward, plain)
    )
    expected = twin(*operands, factor)
    assert_equal(function(*operands, factor), expected)
    # The control: one weight that differs is seen.
    operands[3] = operands[3].at[-1, 0].add(0.1)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(function(*operands, factor), expected)


def test_blocks_hold_whole_rows_and_some_do_not_divide():
    x, *_, factor = PROBLEMS["blocks-that-do-not-divide"]
    layout = _Layout.of(x, factor, 24)
    assert (layout.slabs, layout.slab_block, layout.blocks) == (7, 4, 2)
    swin = _Layout.of(jax.ShapeDtypeStruct((8, 56, 56, 96), jnp.bfloat16), jnp.ones(8), 384)
    assert (swin.tokens, swin.slab_block, swin.blocks) == (448, 1, 56)


@pytest.mark.parametrize("norm_first", [True, False], ids=["norm-first", "norm-last"])
def test_half_a_block_in_bfloat16_is_as_near_to_float32_as_the_jnp_form(norm_first):
    *operands, factor = problem((4, 8, 7, 32), 128, 1, jnp.bfloat16)
    kernel, twin = (functools.partial(each, norm_first=norm_first) for each in (residual_feed_forward, plain))
    exact = differentiated(twin)(operands[0].astype(jnp.float32), *operands[1:], factor)

    def rounded(x, scale, offset, up, up_bias, down, down_bias, factor):
        half = [each.astype(jnp.bfloat16) for each in (up, up_bias, down, down_bias)]
        variables = {"params": {"scale": scale, "bias": offset}}
        norm = functools.partial(nn.LayerNorm(dtype=jnp.bfloat16).apply, variables)
        y = norm(x) if norm_first else x
        y = nn.gelu(y @ half[0] + half[1], approximate=False) @ half[2] + half[3]
        y = y if norm_first else norm(y)
        return x + y * factor.astype(jnp.bfloat16)[:, None, None, None]

    found, usual = (differentiated(one)(*operands, factor) for one in (kernel, rounded))
    for one, other, wanted in zip(found, usual, exact, strict=True):
        assert one.dtype == other.dtype
        scale = np.abs(np.asarray(wanted)).max()
        error, common = (np.abs(np.asarray(x, np.float32) - np.asarray(wanted)).max() / scale for x in (one, other))
        assert error < max(0.01, 1.5 * common), (error, common)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 6e-5)])
def test_the_normal_distribution_is_met_in_value_and_slope(dtype, tolerance):
    h = jnp.concatenate([jnp.linspace(-9, 9, 4001), jnp.asarray([-1e4, -50.0, 50.0, 1e4])])
    value, slope = _twice(h, dtype)
    expected, gradient = jax.vmap(jax.value_and_grad(functools.partial(jax.nn.gelu, approximate=False)))(h)
    np.testing.assert_allclose(h * value / 2, expected, rtol=1e-6, atol=tolerance)
    np.testing.assert_allclose((value + h * slope) / 2, gradient, rtol=0, atol=tolerance)
    # The control: the usual approximation is further off.
    assert np.abs(np.asarray(jax.nn.gelu(h) - expected)).max() > 2 * tolerance


def test_tokens_and_examples_stay_alone():
    *operands, factor = PROBLEMS["maps-with-rows-that-fill-no-tile"]
    apply = jax.jit(residual_feed_forward)
    before = apply(*operands, factor)
    np.testing.assert_array_equal(before[0], operands[0][0])  # its branch is dropped
    changed = apply(operands[0].at[1, 2, 6].add(1.0), *operands[1:], factor)
    moved = np.abs(np.asarray(changed - before)).max(axis=-1) > 0
    assert moved.sum() == 1
    assert moved[1, 2, 6]


def test_no_gradient_flows_to_the_factor():
    *operands, factor = PROBLEMS["tokens-that-fill-tiles"]
    found = jax.grad(lambda factor: jnp.sum(residual_feed_forward(*operands, factor)))(factor)
    assert not np.any(np.asarray(found))


BLOCKS: dict[str, tuple[Any, Any]] = {
    "swin": (SwinBlock(num_heads=2, window_size=3, shift_size=1, drop_path_rate=0.4), draw(0, 6, 5, 4, 8)),
    "swin-v2": (SwinV2Block(num_heads=2, window_size=3, shift_size=1, drop_path_rate=0.4), draw(0, 6, 5, 4, 8)),
    "transformer": (TransformerBlock(num_heads=2, drop_path_rate=0.4), draw(0, 6, 5, 8)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_same_with_either_half(name, monkeypatch):
    # The kernels for windows have tests of their own.
    monkeypatch.setattr(dispatch, "window_kernel", lambda *_: "jnp")
    monkeypatch.setattr(dispatch, "cut_kernel", lambda *_: "jnp")
    block, x = BLOCKS[name]

    def loss(variables):
        out: Any = block.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
        return jnp.sum(jnp.sin(3 * out))

    results = {}
    for kernels in ("jnp", "pallas"):
        with dispatch.use(kernels):
            variables = jax.jit(block.init)(jax.random.key(0), x)
            # Off their initial values, at which scales and biases do little.
            changed = jax.tree.map(
                lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), variables
            )
            assert ("residual_feed_forward" in str(jax.make_jaxpr(loss)(changed))) == (kernels == "pallas")
            results[kernels] = variables, *jax.jit(jax.value_and_grad(loss))(changed)
    initial, *expected = results["jnp"]
    assert jax.tree.structure(results["pallas"][0]) == jax.tree.structure(initial)
    assert_equal(results["pallas"][0], initial, tolerance=0)
    assert_equal(results["pallas"][1:], expected, tolerance=2e-5)


def test_what_the_kernel_does_not_compute_is_left_to_jnp():
    swin, x = BLOCKS["swin"]
    cases = {
        "itself": (swin, x, True),
        "itself in bfloat16": (swin.clone(dtype=jnp.bfloat16), x.astype(jnp.bfloat16), True),
        "another norm": (swin.clone(norm=nn.RMSNorm), x, False),
        "a norm without bias": (swin.clone(norm=functools.partial(nn.LayerNorm, use_bias=False)), x, False),
        "dropout": (swin.clone(dropout_rate=0.1), x, False),
        "another dtype than that of the tokens": (swin.clone(dtype=jnp.bfloat16), x, False),
        "a dtype that is not served": (swin.clone(dtype=jnp.float16), x.astype(jnp.float16), False),
    }
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    for what, (block, tokens, taken) in cases.items():
        with dispatch.use("pallas"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "window_kernel", lambda *_: "jnp")
            text = str(jax.make_jaxpr(functools.partial(block.init, deterministic=False))(rngs, tokens))
        assert ("residual_feed_forward" in text) == taken, what


def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_the_table_takes_the_half_block_on_tpu_alone():
    def kernel(choice, platform, tokens=56, features=96, hidden=384, dtype=jnp.bfloat16):
        with dispatch.use(choice, platform=platform):
            return dispatch.feed_forward_kernel(tokens, features, hidden, dtype)

    assert dispatch.feed_forward_kernel(56, 96, 384, jnp.bfloat16) == "jnp"
    assert kernel("table", "tpu") == kernel("pallas", "tpu") == kernel("pallas", "cpu") == "pallas"
    assert kernel("table", "cpu") == kernel("table", "gpu") == kernel("pallas", "gpu") == kernel("jnp", "tpu") == "jnp"
    # Nothing was weighed there.
    assert kernel("table", "tpu", features=64) == kernel("table", "tpu", dtype=jnp.float32) == "jnp"
    assert kernel("table", "tpu", hidden=400) == kernel("table", "tpu", features=520) == "jnp"
    assert kernel("pallas", "tpu", features=64, hidden=999) == kernel("pallas", "tpu", dtype=jnp.float32) == "pallas"
    # Nor does the kernel serve these.
    assert kernel("pallas", "tpu", features=768, hidden=3072) == kernel("pallas", "tpu", tokens=1025) == "jnp"
    assert kernel("pallas", "tpu", tokens=3136) == "pallas"
    # Nor where tensor parallelism has cut the weights.
    rules = ((axes.BATCH, "data"), (axes.HIDDEN, "tensor"))
    with jax.set_mesh(mesh()):
        with nn.logical_axis_rules(rules):
            assert kernel("pallas", "cpu") == "jnp"
        with nn.logical_axis_rules(rules[:1]):
            assert kernel("pallas", "cpu") == "pallas"


def test_tokens_and_weights_that_do_not_fit_are_refused():
    x, *weights, _ = problem((4, 6), 8)
    with pytest.raises(ValueError, match="dtype=float16 of the tokens must be float32 or bfloat16"):
        residual_feed_forward(x.astype(jnp.float16), *weights)
    with pytest.raises(ValueError, match=r"tokens of shape \(6,\) must be \[\*tokens, features\]"):
        residual_feed_forward(x[0], *weights)
    with pytest.raises(ValueError, match=r"factor of shape \(3,\) must have the leading axes of the tokens \(4, 6\)"):
        residual_feed_forward(x, *weights, jnp.ones(3))
    with pytest.raises(ValueError, match="tokens=1025 at most 1024 or a multiple of 8"):
        residual_feed_forward(jnp.ones((1025, 6)), *weights)


@pytest.mark.parametrize("norm_first", [True, False], ids=["norm-first", "norm-last"])
def test_sharded_over_batch_and_rows_equals_unsharded_and_sends_the_gradients_of_weights_alone(norm_first):
    *operands, factor = problem((4, 6, 5, 8), 16, 1)
    names = (axes.BATCH, axes.HEIGHT, axes.WIDTH)
    function = differentiated(functools.partial(residual_feed_forward, norm_first=norm_first, names=names))
    expected = function(*operands, factor)
    rules = ((axes.BATCH, "data"), (axes.HEIGHT, "tensor"))
    specs = [PartitionSpec("data", "tensor"), *(PartitionSpec(),) * 6, PartitionSpec("data")]
    with jax.set_mesh(mesh()), nn.logical_axis_rules(rules):
        places = (NamedSharding(mesh(), spec) for spec in specs)
        placed = [jax.device_put(x, place) for x, place in zip((*operands, factor), places, strict=True)]
        compiled = function.lower(*placed).compile()
        found = compiled(*placed)
    assert_equal(found, expected)
    assert found[1].sharding.spec == specs[0]
    sent = collectives(compiled.as_text(), mesh())
    assert {each.kind for each in sent} == {"all-reduce"}
    # Those of both projections and their biases, scale and offset of the last norm, and the loss.
    affine = 0 if norm_first else 2 * 8
    assert sum(each.bytes for each in sent) <= 4 * (2 * 8 * 16 + 16 + 8 + affine + 1)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("shape", "hidden", "batch_ndim", "dtype", "norm_first"),
    [
        ((2, 56, 56, 96), 384, 1, jnp.bfloat16, True),
        ((2, 14, 14, 384), 1536, 1, jnp.bfloat16, True),
        ((5, 197, 192), 768, 1, jnp.bfloat16, True),
        ((2, 8, 8, 128), 256, 0, jnp.float32, True),
        ((2, 7, 7, 512), 2048, 1, jnp.bfloat16, True),
        ((2, 64, 64, 96), 384, 1, jnp.bfloat16, False),
        ((2, 7, 7, 512), 2048, 1, jnp.bfloat16, False),
        ((2, 8, 8, 128), 256, 0, jnp.float32, False),
    ],
    ids=str,
)
def test_half_blocks_compile_for_tpu(shape, hidden, batch_ndim, dtype, norm_first):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    place = SingleDeviceSharding(topology.devices[0])
    shapes = [
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for x in problem(shape, hidden, batch_ndim, dtype)
    ]
    half = functools.partial(residual_feed_forward, norm_first=norm_first)
    text = differentiated(half).lower(*shapes).compile().as_text()
    assert text.count("tpu_custom_call") >= 2
