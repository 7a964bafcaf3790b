"""The kernel that projects patches and norms them against its jnp twin: interpreted on CPU, and compiled for a TPU."""

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
from jaxlayers.kernels.pallas_project import _rows, project_and_norm
from jaxlayers.nn.patch_embed import PatchEmbed
from train.collectives import collectives


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(x, kernel, bias, scale, offset, epsilon=1e-6):
    y = x.astype(jnp.float32) @ kernel + (0 if bias is None else bias)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + epsilon)
    return (y * scale + offset).astype(x.dtype)


def problem(*shape, out, dtype=jnp.float32, biased=True):
    """Return the operands; what is projected lies off zero."""
    bias = 1 + draw(2, out) if biased else None
    return draw(0, *shape, dtype=dtype), draw(1, shape[-1], out), bias, 1 + draw(3, out) / 3, draw(4, out)


def differentiated(function, *, of_tokens=True):
    """Return a function of the operands that gives the result and the gradients of a sum of it."""

    def total(*operands):
        out = function(*operands)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    def both(*operands):
        given = tuple(place for place, x in enumerate(operands) if x is not None and (place or of_tokens))
        (_, out), gradients = jax.value_and_grad(total, argnums=given, has_aux=True)(*operands)
        return out, *gradients

    return jax.jit(both)


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


PROBLEMS = {
    "a-map": problem(2, 3, 8, 12, out=10),
    "without-bias": problem(2, 16, 5, out=8, biased=False),
    # 5,432 tokens are seven blocks of 776 rows, of which the last chunk has eight.
    "chunks-that-do-not-divide": problem(7, 776, 4, out=6),
}


@pytest.mark.parametrize("of_tokens", [True, False], ids=["with-tokens", "weights-alone"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_equals_the_plain_form_in_value_and_gradient(name, of_tokens):
    operands = PROBLEMS[name]
    function = differentiated(project_and_norm, of_tokens=of_tokens)
    expected = differentiated(plain, of_tokens=of_tokens)(*operands)
    assert_equal(function(*operands), expected, tolerance=2e-5)
    # The control: one weight that differs is seen.
    x, kernel, *rest = operands
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(function(x, kernel.at[0, 0].add(0.1), *rest), expected, tolerance=2e-5)


def results_of(program, name):
    """Yield the number of results of every Pallas kernel of that name in a program, and in those within it."""
    for step in getattr(program, "jaxpr", program).eqns:
        if step.primitive.name == "pallas_call" and str(step.params["name"]) == name:
            yield len(step.outvars)
        for inner in jax.tree.leaves(list(step.params.values()), is_leaf=lambda each: hasattr(each, "eqns")):
            if hasattr(inner, "eqns"):
                yield from results_of(inner, name)


def test_the_gradient_of_tokens_is_made_only_where_it_is_asked_for():
    operands = PROBLEMS["a-map"]
    found = {}
    for of_tokens in (True, False):
        program = jax.make_jaxpr(differentiated(project_and_norm, of_tokens=of_tokens))(*operands)
        found[of_tokens] = set(results_of(program, "project_and_norm_backward"))
    assert found == {True: {4}, False: {3}}


def test_bfloat16_is_as_near_to_float32_as_the_jnp_form():
    x, *rest = problem(4, 8, 8, 48, out=32, dtype=jnp.bfloat16)
    exact = differentiated(plain)(x.astype(jnp.float32), *rest)

    def rounded(x, kernel, bias, scale, offset):
        y = x @ kernel.astype(jnp.bfloat16) + bias.astype(jnp.bfloat16)
        return nn.LayerNorm(dtype=jnp.bfloat16).apply({"params": {"scale": scale, "bias": offset}}, y)

    found, usual = (differentiated(one)(x, *rest) for one in (project_and_norm, rounded))
    for one, other, wanted in zip(found, usual, exact, strict=True):
        assert one.dtype == other.dtype
        scale = np.abs(np.asarray(wanted)).max()
        error, common = (np.abs(np.asarray(y, np.float32) - np.asarray(wanted)).max() / scale for y in (one, other))
        assert error < max(0.01, 1.5 * common), (error, common)


LAYER_NORM = functools.partial(nn.LayerNorm, epsilon=0.1)


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (PatchEmbed(8, (2, 2), norm=LAYER_NORM), True),
        (PatchEmbed(8, (2, 2), norm=LAYER_NORM, use_bias=False), True),
        (PatchEmbed(8, (2, 2)), False),
        (PatchEmbed(8, (2, 2), norm=nn.RMSNorm), False),
        (PatchEmbed(8, (2, 3), norm=LAYER_NORM), False),  # six tokens a row
    ],
    ids=["norm", "no-bias", "no-norm", "another-norm", "rows-that-fill-no-tile"],
)
def test_patches_are_embedded_alike_by_either(layer, taken):
    x = draw(0, 2, 6, 16, 3)

    def loss(params):
        return jnp.sum(jnp.sin(layer.apply(params, x)))

    found = {}
    for kernels in ("jnp", "pallas"):
        with dispatch.use(kernels):
            params = jax.jit(layer.init)(jax.random.key(0), x)
            changed = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
            found[kernels] = params, *jax.jit(jax.value_and_grad(loss))(changed)
            text = str(jax.make_jaxpr(loss)(changed))
            assert ("project_and_norm" in text) == (taken and kernels == "pallas")
    assert_equal(found["pallas"][0], found["jnp"][0], tolerance=0)
    assert_equal(found["pallas"][1:], found["jnp"][1:], tolerance=2e-5)


def test_the_table_takes_what_was_weighed():
    def kernel(choice, platform="tpu", tokens=56, features=48, out=96, dtype=jnp.bfloat16):
        with dispatch.use(choice, platform=platform):
            return dispatch.project_kernel(tokens, features, out, dtype)

    assert dispatch.project_kernel(56, 48, 96, jnp.bfloat16) == "jnp"
    assert kernel("table") == kernel("table", out=128) == kernel("pallas", "cpu", features=3) == "pallas"
    assert kernel("table", "cpu") == kernel("table", dtype=jnp.float32) == kernel("table", features=49) == "jnp"
    assert kernel("pallas", "gpu") == kernel("pallas", tokens=55) == kernel("pallas", dtype=jnp.float16) == "jnp"
    assert kernel("pallas", features=768, out=1024) == "jnp"


def test_blocks_of_wide_tokens_have_fewer_rows():
    assert _rows(8 * 56 * 56, 48, 96) == 1792
    assert _rows(5432, 4, 6) == 776
    assert _rows(4096, 8192, 16) * (8192 + 128) <= 2048 * 256


def test_what_does_not_fit_is_refused():
    x, *weights = problem(8, 4, out=3)
    with pytest.raises(ValueError, match="dtype=float16 of the tokens must be float32 or bfloat16"):
        project_and_norm(x.astype(jnp.float16), *weights)
    with pytest.raises(ValueError, match=r"tokens of shape \(7, 4\) must be .*, a multiple of 8"):
        project_and_norm(x[:7], *weights)
    with pytest.raises(ValueError, match=r"kernel of shape \(512, 129\) must have at most 65536 weights"):
        project_and_norm(*problem(8, 512, out=129))


def test_split_tokens_equal_unsplit_ones_and_send_the_gradients_of_weights_alone():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    operands = problem(4, 6, 8, 5, out=7)
    function = differentiated(functools.partial(project_and_norm, names=(axes.BATCH, axes.HEIGHT, axes.WIDTH)))
    expected = function(*operands)
    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.BATCH, "data"), (axes.HEIGHT, "model"))):
        placed: Any = jax.device_put(operands[0], NamedSharding(mesh, PartitionSpec("data", "model")))
        compiled = function.lower(placed, *operands[1:]).compile()
        found = compiled(placed, *operands[1:])
    assert_equal(found, expected)
    sent = collectives(compiled.as_text(), mesh)
    assert {each.kind for each in sent} == {"all-reduce"}
    assert sum(each.bytes for each in sent) <= 4 * (5 * 7 + 3 * 7 + 1)


@pytest.mark.tpu
@pytest.mark.parametrize("of_tokens", [True, False])
@pytest.mark.parametrize(("tokens", "out", "dtype"), [(56, 96, jnp.bfloat16), (64, 128, jnp.float32)], ids=str)
def test_projections_compile_for_tpu(tokens, out, dtype, of_tokens):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    place = SingleDeviceSharding(topology.devices[0])
    operands = problem(2, tokens, tokens, 48, out=out, dtype=dtype)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in operands if x is not None]
    text = differentiated(project_and_norm, of_tokens=of_tokens).lower(*shapes).compile().as_text()
    assert text.count("tpu_custom_call") >= 2
