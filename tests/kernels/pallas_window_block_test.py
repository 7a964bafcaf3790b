"""The kernels for a block's attention half against their jnp twin: interpreted on CPU, and compiled for a TPU."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlayers.core import axes
from jaxlayers.core.safe import safe_normalize
from jaxlayers.kernels import dispatch
from jaxlayers.kernels.pallas_window_block import window_block
from jaxlayers.window import CosineWindowAttention, SwinBlock, SwinV2Block, WindowAttention
from jaxlayers.window.swin import layer_norm
from train.collectives import collectives


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(
    x,
    projections,
    shifts,
    out,
    out_shift,
    bias,
    mask=None,
    *,
    scale=None,
    norm=None,
    norm_first=True,
    epsilon=1e-5,
    residual=False,
    factor=None,
):
    """Return the attention half as it is written in a paper, in float32."""

    def normed(x):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + epsilon)
        return (x - mean) / deviation * norm[0] + norm[1]

    dtype, whole = x.dtype, x.astype(jnp.float32)
    x = whole
    x = normed(x) if norm is not None and norm_first else x
    heads = len(bias)

    def split(part):
        y = x @ projections[part] + (0 if shifts is None else shifts[part])
        return jnp.swapaxes(y.reshape(*y.shape[:-1], heads, -1), -2, -3)

    query, key, value = (split(part) for part in range(3))
    if scale is None:
        query = query / np.sqrt(query.shape[-1])
    else:
        query, key = (safe_normalize(each) for each in (query, key))
        query = query * scale[:, None, None]
    scores = query @ jnp.swapaxes(key, -1, -2) + bias
    scores = scores if mask is None else jnp.where(mask[..., None, :, :], scores, -jnp.inf)
    context = jnp.swapaxes(jax.nn.softmax(scores, axis=-1) @ value, -2, -3)
    y = context.reshape(*context.shape[:-2], -1) @ out + out_shift
    y = normed(y) if norm is not None and not norm_first else y
    y = y if factor is None else y * factor.reshape(factor.shape + (1,) * (y.ndim - factor.ndim))
    return (whole + y if residual else y).astype(dtype)


def differentiated(function, mask=None, **options):
    """Return a function of the operands, mask excepted, that gives the result and the gradients of a sum of it."""

    def total(x, projections, shifts, out, out_shift, bias, norm, scale=None):
        found = function(x, projections, shifts, out, out_shift, bias, mask, norm=norm, scale=scale, **options)
        return jnp.sum(jnp.sin(found.astype(jnp.float32))), found

    def both(*operands):
        given = tuple(place for place, x in enumerate(operands) if x is not None)
        (_, found), gradients = jax.value_and_grad(total, argnums=given, has_aux=True)(*operands)
        return found, *gradients

    return jax.jit(both)


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


def problem(leading, tokens, heads, dim, *, masked, normed, shifted=True, dtype=jnp.float32):
    """Return operands and a mask that leaves each query itself."""
    width = heads * dim
    operands = [draw(0, *leading, tokens, width, dtype=dtype), draw(1, 3, width, width) / width**0.5]
    operands += [draw(2, 3, width) if shifted else None, draw(3, width, width) / width**0.5, draw(4, width)]
    operands += [draw(5, heads, tokens, tokens), (1 + 0.1 * draw(6, width), draw(7, width)) if normed else None]
    mask = draw(8, leading[-1], tokens, tokens) > 0 if masked else None
    return operands, None if mask is None else mask | jnp.eye(tokens, dtype=bool)


PROBLEMS = {
    "tokens-that-do-not-fill-a-side": problem((4,), 49, 3, 8, masked=True, normed=True),
    "tokens-that-fill-a-side-not-normed": problem((2,), 64, 2, 8, masked=True, normed=False, shifted=False),
    # A window is added, and the masks come twice before a pair has the same ones again.
    "an-odd-number-of-windows": problem((1, 3), 9, 1, 16, masked=True, normed=True, shifted=False),
    # Five pairs of heads of two windows: more masks than a block has pairs, and fewer.
    "more-windows-than-masks": problem((4, 2), 4, 2, 8, masked=True, normed=False),
    "odd-masks-of-an-even-number-of-windows": problem((2, 3), 4, 2, 8, masked=True, normed=True),
    # 7 heads of 10 pairs of windows are cut into cells, and 6 pairs would not divide them.
    "blocks-of-several-cells": problem((20,), 4, 7, 8, masked=False, normed=True),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_equal_the_plain_block_in_value_and_gradient(name):
    operands, mask = PROBLEMS[name]
    found = differentiated(window_block, mask)(*operands)
    expected = differentiated(plain, mask)(*operands)
    assert_equal(found, expected)
    # The control: a bias that differs in one entry would be seen.
    *rest, bias, norm = operands
    changed = differentiated(plain, mask)(*rest, bias.at[-1, 0, 0].add(0.1), norm)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(found, changed)


def cosine_problem(leading, tokens, heads, dim, *, masked, normed=True, dtype=jnp.float32):
    """Return operands with a scale of each head; keys have no bias, and some tokens are padding."""
    operands, mask = problem(leading, tokens, heads, dim, masked=masked, normed=normed, dtype=dtype)
    x, projections, shifts, *rest = operands
    x = x.at[..., -1, -1, :].set(0)
    return [x, projections, shifts.at[1].set(0), *rest, 4 + 2 * draw(9, heads)], mask


COSINES = {
    "last-norm": (cosine_problem((4,), 49, 3, 8, masked=True), {"norm_first": False}),
    "last-norm-in-several-cells": (cosine_problem((20,), 4, 7, 8, masked=False), {"norm_first": False}),
    "no-norm": (cosine_problem((1, 3), 9, 2, 16, masked=True, normed=False), {}),
    "first-norm": (cosine_problem((2, 2), 4, 2, 8, masked=False), {}),
    "products-and-a-last-norm": (problem((4,), 16, 2, 8, masked=True, normed=True), {"norm_first": False}),
}


@pytest.mark.parametrize("name", COSINES)
def test_blocks_of_cosines_and_last_norms_equal_the_plain_ones_in_value_and_gradient(name):
    (operands, mask), options = COSINES[name]
    found = differentiated(window_block, mask, **options)(*operands)
    expected = differentiated(plain, mask, **options)(*operands)
    assert_equal(found, expected, tolerance=2e-5)
    # The control: another scale, or another offset of the norm, would be seen.
    *rest, norm, last = operands if len(operands) == 8 else (*operands, None)
    changed = (norm, last.at[-1].add(0.1)) if last is not None else ((norm[0], norm[1] + 0.01), None)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(found, differentiated(plain, mask, **options)(*rest, *changed))


FACTORS = jnp.asarray([0.0, 1.25, 0.5])

RESIDUALS = {
    "first-norm": (problem((3, 2), 9, 2, 8, masked=True, normed=True), {"factor": FACTORS}),
    # A window is added, which is of no example.
    "last-norm-of-an-odd-number-of-windows": (
        cosine_problem((3, 3), 4, 2, 8, masked=True),
        {"factor": FACTORS, "norm_first": False},
    ),
    # Blocks of pairs that hold two examples, and pairs of which each window is of another.
    "windows-alone-in-their-example": (problem((3, 1), 4, 1, 8, masked=False, normed=False), {"factor": FACTORS}),
    "two-axes-of-examples": (
        problem((1, 3, 2), 4, 2, 8, masked=False, normed=True),
        {"factor": FACTORS[None]},
    ),
    "no-factor": (problem((2, 2), 4, 2, 8, masked=False, normed=True), {}),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_branches_equal_plain_ones_in_value_and_gradient(name):
    (operands, mask), options = RESIDUALS[name]
    found = differentiated(window_block, mask, residual=True, **options)(*operands)
    expected = differentiated(plain, mask, residual=True, **options)(*operands)
    assert_equal(found, expected, tolerance=2e-5)
    # The control: without the sum, or with another factor, it would be seen.
    factor = {"factor": options["factor"] + 0.1} if "factor" in options else {"residual": False}
    changed = differentiated(plain, mask, **{"residual": True, **options, **factor})(*operands)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(found, changed)


@pytest.mark.parametrize(("make", "norm_first"), [(problem, True), (cosine_problem, False)])
def test_bfloat16_blocks_stay_near_to_float32(make, norm_first):
    operands, mask = make((4,), 49, 3, 32, masked=True, normed=True, dtype=jnp.bfloat16)
    exact = differentiated(plain, mask, norm_first=norm_first)(operands[0].astype(jnp.float32), *operands[1:])
    found = differentiated(window_block, mask, norm_first=norm_first)(*operands)
    assert [x.dtype for x in found[:3]] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        error = np.asarray(one, np.float32) - np.asarray(wanted)
        # Eight bits of each factor: 2^-8 of the largest entry, and a few roundings on the way.
        assert np.abs(error).max() < 0.03 * np.abs(np.asarray(wanted)).max()
        assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(np.asarray(wanted) ** 2))


def test_no_token_of_a_block_meets_another_window_or_what_is_blocked():
    (x, *rest, norm), mask = PROBLEMS["tokens-that-do-not-fill-a-side"]
    apply = jax.jit(functools.partial(window_block, norm=norm))
    moved = np.abs(np.asarray(apply(x.at[1, 7, 0].add(3.0), *rest, mask) - apply(x, *rest, mask))).max(axis=-1) > 0
    assert not moved[[0, 2, 3]].any()
    np.testing.assert_array_equal(moved[1], np.asarray(mask[1, :, 7]))


def test_windows_of_blocks_may_share_a_mask():
    (x, *rest, norm), mask = PROBLEMS["tokens-that-do-not-fill-a-side"]
    apply = jax.jit(functools.partial(window_block, norm=norm))
    each = jnp.broadcast_to(mask[:1], mask.shape)
    np.testing.assert_array_equal(apply(x, *rest, mask[:1]), apply(x, *rest, each))


def test_blocks_that_do_not_fit_are_refused():
    operands, _ = problem((2,), 4, 2, 8, masked=False, normed=False)
    x, projections, shifts, out, out_shift, bias, _ = operands
    with pytest.raises(ValueError, match="inner features=16 must be divisible by the 3 heads"):
        window_block(x, projections, shifts, out, out_shift, jnp.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match=r"mask of shape \(3, 4, 4\) must be \(2, 4, 4\)"):
        window_block(x, projections, shifts, out, out_shift, bias, jnp.ones((3, 4, 4), bool))
    with pytest.raises(ValueError, match="windows of 65 tokens must have at most 64"):
        window_block(jnp.ones((2, 65, 16)), projections, shifts, out, out_shift, jnp.zeros((2, 65, 65)))
    for factor, residual in ((jnp.ones(2), True), (jnp.ones(()), False)):
        with pytest.raises(ValueError, match=r"must be \(\), one for each example of a residual branch"):
            window_block(x, projections, shifts, out, out_shift, bias, residual=residual, factor=factor)


BLOCKS = {
    "regular": (SwinBlock(2, 4), (2, 8, 8, 16)),
    "shifted": (SwinBlock(3, 4, 2), (1, 8, 12, 24)),
    "padded": (SwinBlock(2, 4, 2), (1, 6, 7, 16)),
    "with-another-epsilon": (SwinBlock(2, 4, norm=functools.partial(nn.LayerNorm, epsilon=0.1)), (1, 4, 8, 16)),
    "second-version": (SwinV2Block(2, 4), (2, 8, 8, 16)),
    "second-version-shifted-and-padded": (SwinV2Block(3, 4, 2), (1, 6, 11, 24)),
    "first-version-with-branches-dropped": (SwinBlock(2, 4, 2, drop_path_rate=0.5), (4, 8, 8, 16)),
    "second-version-with-branches-dropped": (SwinV2Block(2, 4, drop_path_rate=0.5), (4, 8, 8, 16)),
    "sums-in-a-wider-dtype": (SwinBlock(2, 4, dtype=jnp.bfloat16), (1, 8, 8, 16)),
    "second-version-normed-otherwise": (SwinV2Block(2, 4, norm=nn.RMSNorm), (1, 8, 8, 16)),
}


def value_and_gradients(kernel, block, x):
    """Return a block's parameters at the start, its output, and the gradients of a sum of it."""

    def total(variables, x):
        dropped = block.drop_path_rate > 0
        out: Any = block.apply(
            variables, x, deterministic=not dropped, rngs={"dropout": jax.random.key(2)} if dropped else {}
        )
        return jnp.sum(jnp.sin(out)), out

    with dispatch.use(kernel):
        variables = jax.jit(block.init)(jax.random.key(0), x)
        # Away from zero, where no bias and no offset does anything.
        moved = jax.tree.map(lambda each: each + 0.1 * draw(each.size, *each.shape), variables)
        step = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        return variables, step(moved, x), step.lower(moved, x).as_text()


@pytest.mark.parametrize("name", BLOCKS)
def test_swin_blocks_are_the_same_by_either_kernel(name):
    block, shape = BLOCKS[name]
    x = draw(0, *shape)
    *found, text = value_and_gradients("pallas", block, x)
    *expected, other = value_and_gradients("jnp", block, x)
    assert jax.tree.map(jnp.shape, found[0]) == jax.tree.map(jnp.shape, expected[0])
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    assert_equal(found[1], expected[1], tolerance=0.05 if block.dtype else 2e-5)
    assert text != other


def norms_before(block, shape):
    """Return how many norms are left to XLA: those that a `LayerNorm` module computes."""
    seen = []

    def watch(call, arguments, keywords, context):
        seen.extend([context.module.name] if isinstance(context.module, nn.LayerNorm) else [])
        return call(*arguments, **keywords)

    with dispatch.use("pallas"), nn.intercept_methods(watch):
        jax.eval_shape(block.init, jax.random.key(0), jnp.ones(shape))
    return seen


def test_only_plain_norms_of_whole_windows_are_computed_by_the_kernel():
    # The second norm is in the kernel of the perceptron.
    assert norms_before(SwinBlock(2, 4, 2), (1, 8, 8, 16)) == []
    assert norms_before(SwinBlock(2, 4, 2), (1, 6, 8, 16)) == ["norm1"]
    # The result of a padded window is normed with it.
    assert norms_before(SwinV2Block(2, 4, 2), (1, 6, 8, 16)) == []
    assert norms_before(SwinBlock(2, 4, norm=layer_norm, dtype=jnp.bfloat16), (1, 8, 8, 16)) == ["norm1", "norm2"]
    for layer in (WindowAttention, CosineWindowAttention):
        attention: Any = layer(num_heads=2, window_size=(2, 2))
        with pytest.raises(ValueError, match="where dispatch takes no kernel that computes them"):
            attention.init(jax.random.key(0), jnp.ones((1, 1, 4, 16)), norm=(jnp.ones(16), jnp.zeros(16), 1e-6))
        with pytest.raises(ValueError, match="residual=True must be False where dispatch takes no kernel"):
            attention.init(jax.random.key(0), jnp.ones((1, 1, 4, 16)), residual=True)


def test_the_table_takes_the_block_on_tpu_alone_and_refuses_nothing():
    def kernel(choice, platform="tpu", tokens=49, heads=3, features=96, dtype=jnp.bfloat16, dropout_rate=0.0, **kind):
        with dispatch.use(choice, platform=platform):
            return dispatch.block_kernel(tokens, heads, features, dtype, dropout_rate, **kind)

    assert dispatch.block_kernel(49, 3, 96, jnp.bfloat16, 0.0) == "jnp"
    assert kernel("table") == kernel("pallas") == kernel("pallas", "cpu", tokens=4) == "pallas"
    assert kernel("table", "cpu") == kernel("table", dtype=jnp.float32) == kernel("table", tokens=4) == "jnp"
    assert kernel("table", features=768, heads=24) == kernel("pallas", features=1024, heads=32) == "jnp"
    assert kernel("table", features=768, heads=24, cosine=True) == kernel("pallas", features=768, heads=24) == "pallas"
    assert kernel("pallas", tokens=144) == kernel("pallas", dropout_rate=0.1) == kernel("pallas", "gpu") == "jnp"
    assert kernel("pallas", heads=0) == kernel("pallas", heads=5) == kernel("pallas", heads=24) == "jnp"
    with jax.set_mesh(mesh()), nn.logical_axis_rules(((axes.HEADS, "model"),)):
        assert kernel("pallas", heads=3) == "pallas"  # three heads are not split over two devices
        assert kernel("pallas", heads=2, features=64) == "jnp"
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(one), nn.logical_axis_rules(((axes.HEADS, "model"),)):
        assert kernel("pallas", heads=2, features=64) == "pallas"  # a mesh axis of one device splits nothing


def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_blocks_split_over_batch_and_windows_equal_unsplit_ones_and_send_gradients_of_parameters_alone():
    operands, mask = problem((2, 4), 9, 2, 8, masked=True, normed=True)
    block = functools.partial(window_block, residual=True, factor=jnp.asarray([0.5, 2.0]))
    expected = differentiated(block, mask)(*operands)
    rules = ((axes.BATCH, "data"), (axes.WINDOWS, "model"))
    with jax.set_mesh(mesh()), nn.logical_axis_rules(rules):
        tokens = PartitionSpec("data", "model")
        placed = jax.device_put(operands[0], NamedSharding(mesh(), tokens))
        compiled = differentiated(block, mask).lower(placed, *operands[1:]).compile()
        found = compiled(placed, *operands[1:])
    assert_equal(found, expected)
    assert found[1].sharding.spec == tokens
    sent = collectives(compiled.as_text(), mesh())
    assert {each.kind for each in sent} == {"all-reduce"}
    # Four projections, their biases, that of two heads' scores, and the loss.
    assert sum(each.bytes for each in sent) <= 4 * (4 * 256 + 4 * 16 + 2 * 81 + 1)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("heads", "tokens", "masked", "normed", "make", "norm_first"),
    [
        (3, 49, True, True, problem, True),
        (12, 49, False, True, problem, True),
        (4, 64, True, False, problem, True),
        (3, 64, True, True, cosine_problem, False),
        (16, 64, False, True, cosine_problem, False),
        (24, 64, False, True, cosine_problem, False),
        (2, 16, False, False, cosine_problem, True),
    ],
)
def test_blocks_compile_for_tpu(heads, tokens, masked, normed, make, norm_first):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    operands, mask = make((2, 4), tokens, heads, 32, masked=masked, normed=normed, dtype=jnp.bfloat16)
    place = SingleDeviceSharding(topology.devices[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), operands)
    options = {"norm_first": norm_first, "residual": masked, "factor": jnp.asarray([0.0, 2.0]) if masked else None}
    text = differentiated(window_block, mask, **options).lower(*shapes).compile().as_text()
    assert "tpu_custom_call" in text
