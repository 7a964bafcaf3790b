"""Energy Transformer: the gradient written out, the descent of the energy, masks, and the stored reference outputs."""

import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.hopfield.energy_transformer import (
    VARIANTS,
    EnergyAttention,
    EnergyLayerNorm,
    EnergyTransformerBlock,
    from_reference,
    memory_energy,
)
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry

GOLDEN = Path(__file__).parents[1] / "golden" / "energy_transformer_parity.npz"


def sets(*shapes):
    return lambda rng: tuple(rng.normal(size=shape) for shape in shapes)


def running_sum(x):
    """Order matters to it: the control of every claim about permutations."""
    return jnp.cumsum(x, axis=-2)


EQUIVARIANT = Symmetry(Symmetric(5), ("set",), "set", control=running_sum)
CASES = (
    Case(
        name="energy_layer_norm",
        within="energy_transformer_block",
        module=EnergyLayerNorm(),
        inputs=sets((2, 5, 8)),
        symmetries=(EQUIVARIANT,),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"epsilon=-1.0 must be at least 0; set epsilon", module=EnergyLayerNorm(epsilon=-1.0)),
            BadInput(match=r"inputs have shape \(2, 0\) and must be", inputs=sets((2, 0))),
        ),
    ),
    Case(
        name="energy_attention",
        within="energy_transformer_block",
        module=EnergyAttention(num_heads=2, head_dim=3, self_attention=False),
        inputs=sets((2, 5, 8)),
        symmetries=(EQUIVARIANT,),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"num_heads=0 must be at least 1; set num_heads", module=EnergyAttention(num_heads=0)),
            BadInput(match=r"head_dim=0 must be at least 1; set head_dim", module=EnergyAttention(head_dim=0)),
            BadInput(match=r"beta=0.0 must be positive and finite", module=EnergyAttention(beta=0.0)),
            BadInput(match=r"inputs have shape \(8,\) and must be", inputs=sets((8,))),
        ),
    ),
    Case(
        name="energy_transformer_block",
        module=EnergyTransformerBlock(num_heads=2, head_dim=3, mlp_ratio=1.5, num_steps=3),
        inputs=sets((2, 5, 8)),
        symmetries=(EQUIVARIANT,),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"num_steps=0 must be at least 1", module=EnergyTransformerBlock(num_steps=0)),
            BadInput(match=r"step_size=-0.1 must be at least 0", module=EnergyTransformerBlock(step_size=-0.1)),
            BadInput(match=r"mlp_ratio=-1.0 must be at least 0", module=EnergyTransformerBlock(mlp_ratio=-1.0)),
            BadInput(match=r"head_dim=0 must be at least 1", module=EnergyTransformerBlock(head_dim=0)),
            BadInput(match=r"inputs have shape \(8,\) and must be", inputs=sets((8,))),
        ),
    ),
)

BLOCK = EnergyTransformerBlock(num_heads=2, head_dim=3, mlp_ratio=1.5, num_steps=6)
ATTENTION = EnergyAttention(num_heads=2, head_dim=3, beta=0.7)


def as_jax(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def draw_params(rng, module, *inputs, scale=0.5):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    drawn = jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    norm = drawn.get("norm", drawn)
    if "scale" in norm:
        norm["scale"] = jnp.asarray(0.9)
    return drawn


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(module, params, x, method=None, **keywords):
    return module.apply({"params": params}, x, method=method, **keywords)


@functools.partial(jax.jit, static_argnums=0)
def trace(module, params, x, **keywords):
    """Return the output and the energies along the steps."""
    y, sown = module.apply({"params": params}, x, mutable="intermediates", **keywords)
    return y, sown["intermediates"]["energy"][0]


# The twin: tokens one by one, and gradients written out, in float64. --------------------------------------------------


def twin_norm(x, scale, bias, epsilon=1e-5):
    return np.stack([scale * (t - t.mean()) / math.sqrt(t.var() + epsilon) + bias for t in x])


def twin_attention(g, query, key, heads, beta, allowed):
    """Return the energy and its gradient by the closed form; `allowed[h, c, b]` = c sees b."""
    total, gradient = 0.0, np.zeros_like(g)
    width = query.shape[1] // heads
    for h in range(heads):
        wq, wk = (w[:, h * width : (h + 1) * width] for w in (query, key))
        q, k = g @ wq, g @ wk
        for c in range(len(g)):
            seen = [b for b in range(len(g)) if allowed[h, c, b]]
            if not seen:
                continue
            logits = np.array([beta * k[b] @ q[c] for b in seen])
            total -= math.log(np.sum(np.exp(logits))) / beta
            p = np.exp(logits) / np.sum(np.exp(logits))
            for weight, b in zip(p, seen, strict=True):
                gradient[c] -= weight * wq @ k[b]
                gradient[b] -= weight * wk @ q[c]
    return total, gradient


def twin_memory(g, xi, tokens):
    hidden = np.maximum(g @ xi, 0) * tokens[:, None]
    return -0.5 * np.sum(hidden**2), -hidden @ xi.T


def twin_block(x, params, allowed, tokens, *, steps, alpha=0.1, beta):
    energies = []
    for step in range(steps + 1):
        g = twin_norm(x, params["norm"]["scale"], params["norm"]["bias"])
        kernels = (params["attention"][name]["kernel"] for name in ("query", "key"))
        (e1, d1), (e2, d2) = (
            twin_attention(g, *kernels, 2, beta, allowed),
            twin_memory(g, params["up"]["kernel"], tokens),
        )
        energies.append(e1 + e2)
        x = x - alpha * (d1 + d2) if step < steps else x
    return x, energies


@pytest.fixture
def problem(rng):
    """Tokens of two samples, a mask in which one query sees nothing, and padding at the end of the second sample."""
    x = rng.normal(size=(2, 5, 8))
    mask = rng.random((2, 2, 5, 5)) < 0.7
    mask[0, :, 1] = False
    tokens = np.ones((2, 5), bool)
    tokens[1, 3:] = False
    return x, mask, tokens


def pairs_of(mask, tokens, self_attention=True):
    pairs = mask & tokens[:, None, :, None] & tokens[:, None, None, :]
    return pairs if self_attention else pairs & ~np.eye(5, dtype=bool)


@pytest.mark.parametrize("self_attention", [True, False])
def test_attention_equals_its_gradient_written_out(rng, problem, self_attention):
    x, mask, tokens = problem
    layer = ATTENTION.clone(self_attention=self_attention)
    (inputs,) = as_jax(x)
    params = draw_params(rng, layer, inputs)
    keywords = {"mask": jnp.asarray(mask), "token_mask": jnp.asarray(tokens)}
    step, energies = run(layer, params, inputs, **keywords), run(layer, params, inputs, method="energy", **keywords)
    kernels = [np.asarray(params[name]["kernel"], np.float64) for name in ("query", "key")]
    allowed = pairs_of(mask, tokens, self_attention)
    for b in range(2):
        energy, gradient = twin_attention(x[b], *kernels, 2, 0.7, allowed[b])
        np.testing.assert_allclose(energies[b], energy, rtol=1e-5)
        np.testing.assert_allclose(step[b], -gradient, atol=1e-5)


def test_block_equals_the_twin(rng, problem):
    x, mask, tokens = problem
    (inputs,) = as_jax(x)
    params = draw_params(rng, BLOCK, inputs)
    y, energies = trace(BLOCK, params, inputs, mask=jnp.asarray(mask), token_mask=jnp.asarray(tokens))
    doubles = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for b in range(2):
        expected, path = twin_block(x[b], doubles, pairs_of(mask, tokens)[b], tokens[b], steps=6, beta=1 / math.sqrt(3))
        np.testing.assert_allclose(y[b], expected, atol=2e-5)
        np.testing.assert_allclose(energies[:, b], path, rtol=1e-5)
    found = run(BLOCK, params, inputs, method="energy", mask=jnp.asarray(mask), token_mask=jnp.asarray(tokens))
    np.testing.assert_allclose(found, energies[0], rtol=1e-6)


def test_normalisation_is_the_gradient_of_its_lagrangian(rng):
    (x,) = as_jax(3 * rng.normal(size=(4, 8)) + 2)
    layer = EnergyLayerNorm()
    params = draw_params(rng, layer, x)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer.apply({"params": params}, x, method="lagrangian"))))(x)
    g = run(layer, params, x)
    np.testing.assert_allclose(gradient, g, atol=1e-5)
    np.testing.assert_allclose(g, twin_norm(np.asarray(x), 0.9, np.asarray(params["bias"])), atol=1e-5)
    expected = np.sum(np.asarray(g) * np.asarray(x), -1) - run(layer, params, x, method="lagrangian")
    np.testing.assert_allclose(run(layer, params, x, method="energy"), expected, atol=1e-4)
    # With a scale for each feature, as a plain layer normalisation has, it is the gradient of nothing.
    uneven = jax.jacobian(lambda x: jnp.arange(1.0, 9.0) * run(layer, params, x))(x[0])
    even = jax.jacobian(lambda x: run(layer, params, x))(x[0])
    np.testing.assert_allclose(even, even.T, atol=1e-6)
    assert np.abs(uneven - uneven.T).max() > 0.1


def test_normalisation_is_flax_layer_norm_with_one_scale(rng):
    (x,) = as_jax(rng.normal(size=(4, 8)))
    params = draw_params(rng, EnergyLayerNorm(), x)
    flax_params = {"params": {"scale": jnp.full(8, params["scale"]), "bias": params["bias"]}}
    expected = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply(flax_params, x)
    np.testing.assert_allclose(run(EnergyLayerNorm(), params, x), expected, atol=1e-6)


def test_the_hessian_of_the_lagrangian_has_no_negative_direction_unless_the_scale_is_negative(rng):
    (x,) = as_jax(rng.normal(size=8))
    params = draw_params(rng, EnergyLayerNorm(), x)
    hessian = jax.jit(lambda params: jax.jacobian(lambda x: EnergyLayerNorm().apply({"params": params}, x))(x))
    assert np.linalg.eigvalsh(hessian(params)).min() > -1e-6
    assert np.linalg.eigvalsh(hessian({**params, "scale": jnp.asarray(-0.9)})).min() < -0.1


# The descent. ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("step_size",))
def descent(params, x, *, step_size):
    return trace(BLOCK.clone(step_size=step_size, num_steps=40), params, x)[1]


def changes(params, x, *, step_size=0.02):
    """Return the change of energy in each step, and the size of the energies."""
    energies = np.asarray(descent(params, x, step_size=step_size))
    return np.diff(energies, axis=0), np.abs(energies).max()


@pytest.fixture
def many(rng):
    (x,) = as_jax(rng.normal(size=(10, 5, 8)))
    return draw_params(rng, BLOCK, x), x


def test_energy_never_rises_along_small_steps(many):
    change, size = changes(*many)
    assert change.max() <= 1e-6 * size
    assert change[0].max() < -1e-3 * size


def test_a_negative_scale_climbs(many):
    params, x = many
    params["norm"]["scale"] = -params["norm"]["scale"]  # the Lagrangian is then not convex
    change, size = changes(params, x)
    assert change[0].min() > 1e-3 * size


def test_large_steps_may_climb_in_attention_and_never_in_memory(many):
    params, x = many
    kernels = params["attention"]
    # With keys opposite to the queries tokens repel each other, and long steps overshoot.
    repelling = {
        "attention": {"query": kernels["query"], "key": {"kernel": -kernels["query"]["kernel"]}},
        "up": {"kernel": jnp.zeros_like(params["up"]["kernel"])},
        "norm": params["norm"],
    }
    change, size = changes(repelling, x)
    assert change.max() <= 1e-6 * size
    change, size = changes(repelling, x, step_size=30.0)
    assert change.max() > 0.1 * size
    # The memory's energy is concave in g, and a gradient step through a convex Lagrangian then descends at any size.
    memory = {**params, "attention": jax.tree.map(jnp.zeros_like, kernels)}
    change, size = changes(memory, x, step_size=30.0)
    assert change.max() <= 1e-6 * size
    assert change[0].max() < -0.1 * size


def test_one_step_is_the_gradient_of_the_energy(rng):
    block = BLOCK.clone(num_steps=1, step_size=0.25)
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    params = draw_params(rng, block, x)
    g = run(EnergyLayerNorm(), params["norm"], x)
    attention = EnergyAttention(num_heads=2, head_dim=3)
    xi = params["up"]["kernel"]
    memory = -jax.grad(lambda g: jnp.sum(memory_energy(g, xi)))(g)
    expected = x + 0.25 * (run(attention, params["attention"], g) + memory)
    np.testing.assert_allclose(run(block, params, x), expected, atol=1e-5)
    np.testing.assert_allclose(memory, jax.nn.relu(g @ xi) @ xi.T, atol=1e-5)


def test_steps_compose(rng):
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    params = draw_params(rng, BLOCK, x)
    twice = run(BLOCK.clone(num_steps=3), params, run(BLOCK.clone(num_steps=3), params, x))
    np.testing.assert_allclose(run(BLOCK, params, x), twice, atol=1e-5)


# Masks. ---------------------------------------------------------------------------------------------------------------


def test_padding_has_no_influence_and_stays(rng):
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    params = draw_params(rng, BLOCK, x)
    tokens = jnp.asarray(np.arange(5) < 3)[None].repeat(2, axis=0)
    other = x.at[:, 3:].set(7.0)
    y, energies = trace(BLOCK, params, x, token_mask=tokens)
    for found in (trace(BLOCK, params, other, token_mask=tokens), trace(BLOCK, params, x[:, :3])):
        np.testing.assert_allclose(found[0][:, :3], y[:, :3], atol=1e-6)
        np.testing.assert_allclose(found[1], energies, rtol=1e-6)
    np.testing.assert_array_equal(y[:, 3:], x[:, 3:])
    # Negative control: hidden as keys alone, padding still draws the tokens towards itself, as it attends to them.
    keys = jnp.broadcast_to(tokens[:, None, None, :], (2, 1, 5, 5))
    assert np.abs(trace(BLOCK, params, x, mask=keys)[0] - trace(BLOCK, params, other, mask=keys)[0])[:, :3].max() > 1e-3


def test_a_fully_masked_attention_has_no_energy_and_finite_gradients(rng):
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    params = draw_params(rng, BLOCK, x)
    nothing = jnp.zeros((2, 1, 5, 5), bool)
    np.testing.assert_array_equal(run(ATTENTION, params["attention"], x, method="energy", mask=nothing), 0)
    np.testing.assert_array_equal(run(ATTENTION, params["attention"], x, mask=nothing), 0)
    padded = jnp.zeros((2, 5), bool)
    np.testing.assert_array_equal(run(BLOCK, params, x, token_mask=padded), x)
    loss = jax.jit(jax.grad(lambda params: jnp.sum(run(BLOCK, params, x, mask=nothing) ** 2)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(loss(params)))


def test_without_self_attention_one_token_alone_has_no_attention_energy(rng):
    (x,) = as_jax(rng.normal(size=(2, 1, 8)))
    layer = ATTENTION.clone(self_attention=False)
    params = draw_params(rng, layer, x)
    np.testing.assert_array_equal(run(layer, params, x, method="energy"), 0)
    assert np.all(run(ATTENTION, params, x, method="energy") != 0)


def test_equal_tokens_stay_equal_and_constant_features_stay_finite(rng):
    params = draw_params(rng, BLOCK, jnp.ones((2, 5, 8)))
    x = jnp.broadcast_to(jnp.asarray(rng.normal(size=8), jnp.float32), (2, 5, 8))
    y = np.asarray(run(BLOCK, params, x))
    np.testing.assert_allclose(y, np.broadcast_to(y[:1, :1], y.shape), atol=1e-6)
    assert np.all(np.isfinite(run(BLOCK, params, jnp.ones((2, 5, 8)))))


def test_bfloat16_stays_finite_with_energies_in_float32(rng):
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    params = draw_params(rng, BLOCK, x)
    y, energies = trace(BLOCK.clone(dtype=jnp.bfloat16), params, x)
    assert y.dtype == jnp.bfloat16
    assert energies.dtype == jnp.float32
    np.testing.assert_allclose(energies, trace(BLOCK, params, x)[1], rtol=3e-2)


@pytest.mark.usefixtures("untyped")
def test_masks_that_do_not_fit_are_refused(rng):
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    for module in (BLOCK, ATTENTION):
        with pytest.raises(
            ValueError, match=r"mask of shape \(2, 1, 4, 4\) must broadcast to \[\*batch, heads, 5, 5\]"
        ):
            jax.eval_shape(lambda m=module: m.init(jax.random.key(0), x, mask=jnp.ones((2, 1, 4, 4), bool)))
        with pytest.raises(ValueError, match=r"token_mask has 4 entries for 5 tokens"):
            jax.eval_shape(lambda m=module: m.init(jax.random.key(0), x, token_mask=jnp.ones((2, 4), bool)))


# Variant and reference. -----------------------------------------------------------------------------------------------


def test_base_has_the_parameters_of_the_paper():
    fields = dict(VARIANTS["energy_transformer_base"])
    block, inputs = fields.pop("module"), fields.pop("inputs")
    y, variables = jax.eval_shape(block(**fields).init_with_output, jax.random.key(0), *inputs)
    assert y.shape == (1, 197, 768)
    # Wq and Wk of 12 heads of 64, 3072 memories, one scale and 768 biases.
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(variables)) == 2 * 12 * 64 * 768 + 3072 * 768 + 1 + 768 == 3_539_713
    )


def reference():
    with np.load(GOLDEN) as stored:
        arrays = {name: stored[name] for name in stored.files}
    tensors = {name.removeprefix("parameter/"): leaf for name, leaf in arrays.items() if name.startswith("parameter/")}
    return arrays, tensors


REFERENCE_BLOCK = EnergyTransformerBlock(num_heads=3, head_dim=4, mlp_ratio=2.5)


def reference_params(tensors):
    shapes = jax.eval_shape(REFERENCE_BLOCK.init, jax.random.key(0), jnp.ones((1, 7, 12)))["params"]
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), from_reference(tensors, shapes))


def test_equals_the_reference_on_its_parameters():
    arrays, tensors = reference()
    assert "bhoov/energy-transformer-jax" in str(arrays["provenance"])
    params = reference_params(tensors)
    (x, g) = as_jax(arrays["input"], arrays["normalised"])
    np.testing.assert_allclose(run(EnergyLayerNorm(), params["norm"], x), g, atol=1e-5)
    for name, expected in (("lagrangian", "lagrangian"), ("energy", "norm_energy")):
        np.testing.assert_allclose(run(EnergyLayerNorm(), params["norm"], x, method=name), arrays[expected], atol=2e-5)
    attention = EnergyAttention(num_heads=3, head_dim=4)
    found = run(attention, params["attention"], g, method="energy")
    np.testing.assert_allclose(found, arrays["attention_energy"], rtol=1e-5)
    np.testing.assert_allclose(run(attention, params["attention"], g), -arrays["attention_gradient"], atol=1e-5)
    np.testing.assert_allclose(memory_energy(g, params["up"]["kernel"]), arrays["memory_energy"], rtol=1e-5)
    y, energies = trace(REFERENCE_BLOCK, params, x)
    np.testing.assert_allclose(energies, arrays["energies"], rtol=1e-5)
    np.testing.assert_allclose(
        y / np.abs(arrays["output"]).max(), arrays["output"] / np.abs(arrays["output"]).max(), atol=1e-5
    )


def test_reference_parity_sees_exchanged_queries_and_keys():
    arrays, tensors = reference()
    tensors["Wq"], tensors["Wk"] = tensors["Wk"], tensors["Wq"]
    y = run(REFERENCE_BLOCK, reference_params(tensors), *as_jax(arrays["input"]))
    assert np.abs(y - arrays["output"]).max() > 0.1


def test_conversion_refuses_what_does_not_fit():
    _, tensors = reference()
    with pytest.raises(ValueError, match=r"must hold \['Xi'\]"):
        reference_params({name: leaf for name, leaf in tensors.items() if name != "Xi"})
    with pytest.raises(ValueError, match=r"Xi must give up/kernel its shape \(12, 30\), not \(12, 4\)"):
        reference_params({**tensors, "Xi": np.ones((12, 4))})
    assert reference_params({**tensors, "Wenc": np.ones((3, 3))}).keys() == {"attention", "norm", "up"}
