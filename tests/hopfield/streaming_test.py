"""Streamed retrieval equals the plain one: functions, layers, iterated updates, gradients, and patterns on a mesh."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlayers.core import axes
from jaxlayers.hopfield.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    energy,
    retrieve,
    update,
)
from jaxlayers.hopfield.streaming import Streaming
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry
from train import mesh as meshes
from train.collectives import collectives
from train.config import MeshShape

SMALL = Streaming(chunk_size=3)


def running_mean(x):
    return jnp.mean(jnp.cumsum(x, axis=-2), axis=-2)


CASES = (
    Case(
        name="hopfield_streamed",
        module=Hopfield(num_heads=2, update_steps=3, learn_beta=True, streaming=SMALL),
        inputs=lambda rng: (rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 7, 8))),
        symmetries=(Symmetry(Symmetric(7), (None, "set"), "scalar", control=lambda q, k: running_mean(k)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="chunk_size=0 must be at least 1", module=Hopfield(streaming=Streaming(chunk_size=0))),
            BadInput(
                match="association_fn=.* must be the default softmax when streamed",
                module=Hopfield(streaming=SMALL, association_fn=lambda logits, mask: logits),
            ),
            BadInput(
                match="patterns=0 must be at least 1", inputs=lambda rng: (np.ones((2, 4, 8)), np.ones((2, 0, 8)))
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def problem():
    """Two batch elements, three states, eleven patterns; one state may retrieve nothing."""
    rng = np.random.default_rng(0)
    state, stored = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 11, 4))
    mask = rng.random(size=(2, 3, 11)) < 0.7
    mask[1, 2] = False
    return jnp.asarray(state, jnp.float32), jnp.asarray(stored, jnp.float32), jnp.asarray(mask)


def value_and_gradients(fn, *operands, argnums):
    """Return results and the gradients of a sum of their sines."""

    def total(*operands):
        found = fn(*operands)
        return jnp.sum(jnp.sin(found[0] if isinstance(found, tuple) else found)), found

    return jax.jit(jax.value_and_grad(total, argnums=argnums, has_aux=True))(*operands)


def assert_equal(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("function", "masked"), [(update, True), (energy, False), (energy, True)])
def test_functions_equal_the_plain_ones(problem, function, masked):
    state, stored, mask = problem
    mask = mask if masked else None

    def evaluate(streaming):
        return lambda *operands: function(*operands[:2], beta=operands[2], mask=mask, streaming=streaming)

    operands = (state, stored, jnp.asarray([0.5, 2.0]))
    found, expected = (value_and_gradients(evaluate(s), *operands, argnums=(0, 1, 2)) for s in (SMALL, None))
    assert_equal(found, expected)
    # The control: a pattern a little off is seen.
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(evaluate(SMALL)(state, stored.at[0, 7].add(0.05), operands[2]), expected[0][1])


@pytest.mark.parametrize(
    ("update_steps", "tolerance", "masked"),
    [(4, None, False), pytest.param(200, 1e-4, False, marks=pytest.mark.slow), (200, 1e-4, True), (3, 1e-3, True)],
    ids=["fixed", "settled", "settled, masked", "cut short, masked"],
)
def test_iterated_retrieval_equals_the_plain_one(problem, update_steps, tolerance, masked):
    state, stored, mask = problem

    def evaluate(streaming):
        def run(state, stored, beta):
            found = retrieve(
                *(state, stored),
                beta=beta,
                mask=mask if masked else None,
                update_steps=update_steps,
                tolerance=tolerance,
                streaming=streaming,
            )
            return found.state, found.steps

        return run

    operands = (state, stored, jnp.asarray([0.7, 1.5]))
    found, expected = (value_and_gradients(evaluate(s), *operands, argnums=(0, 1, 2)) for s in (SMALL, None))
    assert_equal(found, expected, 2e-5)
    if tolerance:
        assert int(expected[0][1][1].min()) < int(expected[0][1][1].max()) or update_steps == 3
        assert not jnp.any(found[1][0]), "a fixed point does not depend on where it was reached from"


def test_energy_never_rises_along_streamed_updates(problem):
    state, stored, _ = problem
    energies = []
    for _ in range(8):
        energies.append(energy(state, stored, beta=1.5, streaming=SMALL))
        state = update(state, stored, beta=1.5, streaming=SMALL)
    change = jnp.diff(jnp.stack(energies), axis=0)
    assert jnp.all(change < 1e-5)
    assert jnp.any(change < -0.1)


MODULES = {
    "hopfield": (Hopfield(num_heads=2), ((2, 4, 8), (2, 11, 8))),
    "hopfield_betas": (Hopfield(num_heads=2, beta=(0.1, 3.0), update_steps=3), ((2, 4, 8), (11, 8))),
    "hopfield_settled": (
        Hopfield(num_heads=2, beta=0.4, update_steps=60, tolerance=1e-6, learn_beta=True),
        ((2, 4, 8), (2, 11, 8)),
    ),
    "hopfield_static": (
        Hopfield(num_heads=1, projections=(), state_norm=None, stored_norm=None, value_norm=None, beta=2.0),
        ((4, 8), (11, 8)),
    ),
    "pooling": (HopfieldPooling(Hopfield(num_heads=2, update_steps=2), num_states=3), ((2, 11, 8),)),
    "layer": (HopfieldLayer(Hopfield(num_heads=2), num_patterns=11, value_features=5), ((2, 4, 8),)),
}


def streamed(module, streaming):
    """Return the module with streaming in its association."""
    if isinstance(module, Hopfield):
        return module.clone(streaming=streaming)
    return module.clone(hopfield=streamed(module.hopfield, streaming))


def run(module, params, inputs, **keywords):
    """Return outputs and gradients."""

    def total(params, inputs):
        out = module.apply({"params": params}, *inputs, **keywords)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, inputs)


def example(name, seed=0):
    module, shapes = MODULES[name]
    rng = np.random.default_rng(seed)
    inputs = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs).get("params", {})
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)
    return module, params, inputs


@pytest.mark.parametrize("name", MODULES)
def test_layers_equal_the_plain_ones(name):
    module, params, inputs = example(name)
    expected = run(module, params, inputs)
    assert_equal(run(streamed(module, SMALL), params, inputs), expected, 2e-5)


@pytest.mark.parametrize(
    ("name", "streaming"),
    [
        ("hopfield", SMALL),
        pytest.param("hopfield", None, marks=pytest.mark.slow),
        pytest.param("hopfield_betas", SMALL, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_masks_and_exclusion_reach_the_layer(name, streaming):
    module, params, inputs = example(name)
    module = module.clone(streaming=streaming)
    key_mask = jnp.arange(11) < 9
    exclude = jnp.asarray([0, 3, -1, 8])
    allowed = key_mask & (jnp.arange(11) != exclude[:, None])
    found = run(module, params, inputs, key_mask=key_mask, exclude=exclude)
    assert_equal(found, run(module.clone(streaming=None), params, inputs, mask=allowed[None]), 2e-5)
    # What nobody may retrieve has no influence, what one may not retrieve has on the others.
    changed = (inputs[0], inputs[1].at[..., 9:, :].multiply(-2.0))
    assert_equal(run(module, params, changed, key_mask=key_mask, exclude=exclude)[0], found[0])
    changed = (inputs[0], inputs[1].at[..., 3, :].multiply(-2.0))
    moved = run(module, params, changed, key_mask=key_mask, exclude=exclude)[0][1] - found[0][1]
    assert float(jnp.max(jnp.abs(moved[..., 1, :]))) < (1e-6 if module.update_steps == 1 else np.inf)
    assert float(jnp.max(jnp.abs(moved[..., 2, :]))) > 1e-3


def test_what_is_sown_gives_the_association_back():
    module, params, inputs = example("hopfield")
    _, plain = module.apply({"params": params}, *inputs, mutable="intermediates")
    _, found = streamed(module, SMALL).apply({"params": params}, *inputs, mutable="intermediates")
    assert set(found["intermediates"]) == {"log_sum_exp", "steps"}
    (weights,), (total,) = plain["intermediates"]["association"], found["intermediates"]["log_sum_exp"]
    assert total.shape == weights.shape[:-1]
    # ln p differs from the logits by the sum's logarithm alone, so that differences of logits are those of ln p.
    logits = jnp.log(weights) + total[..., None]
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), total, atol=1e-5)


def test_dropout_acts_on_streamed_associations_in_training_only():
    module, params, inputs = example("hopfield")
    module = streamed(module, SMALL).clone(dropout_rate=0.5)
    apply = jax.jit(module.apply, static_argnames="deterministic")
    one, other = (
        apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert float(jnp.max(jnp.abs(one - other))) > 1e-3
    assert_equal(apply({"params": params}, *inputs), run(module.clone(dropout_rate=0.0), params, inputs)[0][1])


# Over a mesh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hopfield_settled", "layer"])
def test_patterns_split_by_logical_rules_give_the_same(name):
    module, params, inputs = example(name)
    if name == "layer":
        module = module.clone(num_patterns=12)
        params = {
            **params,
            **{key: jnp.pad(params[key], ((0, 1), (0, 0)), constant_values=0.3) for key in params if "stored_" in key},
        }
    else:
        inputs = (*inputs[:-1], jnp.pad(inputs[-1], ((0, 0), (0, 1), (0, 0)), constant_values=0.3))
    expected = run(module, params, inputs)
    mesh = jax.make_mesh((2, 4), ("data", "memory"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.BATCH, "data"), (axes.PATTERNS, "memory"))):
        assert Streaming().on(12)["axis"] == ("memory",)
        assert Streaming().on(11)["axis"] == ()
        split = streamed(module, Streaming(chunk_size=2))
        lowered = jax.jit(split.apply).lower({"params": params}, *inputs)
        assert re.search(r"manual_computation.*memory", lowered.as_text()), (
            "the association runs where the patterns are"
        )
        found = run(split, params, inputs)
    # The gradient of a fixed point ends within the tolerance of its own iteration.
    assert_equal(found, expected, 1e-4 if name == "hopfield_settled" else 2e-5)


def test_a_named_axis_needs_no_rules(problem):
    state, stored, _ = problem
    stored = jnp.concatenate([stored, stored[:, :5] + 0.5], axis=1)
    mesh = jax.make_mesh((8,), ("memory",), axis_types=(AxisType.Auto,))
    expected = retrieve(state, stored, beta=2.0, update_steps=50, tolerance=1e-3)
    place = NamedSharding(mesh, PartitionSpec(None, "memory"))
    with jax.set_mesh(mesh):
        found = retrieve(
            state,
            jax.device_put(stored, place),
            beta=2.0,
            update_steps=50,
            tolerance=1e-3,
            streaming=Streaming(chunk_size=1, axis="memory"),
        )
    np.testing.assert_allclose(found.state, expected.state, atol=1e-5)
    np.testing.assert_array_equal(found.steps, expected.steps)
    assert found.association is None


def test_the_trainers_mesh_splits_a_learned_memory_and_gathers_none_of_it():
    shape = MeshShape(data=2, sequence=4)
    mesh = meshes.build(shape)
    layer = HopfieldLayer(Hopfield(num_heads=2), num_patterns=16384, value_features=16)
    x = jax.ShapeDtypeStruct((4, 128, 16), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]

    def sent(layer):
        def total(params, x):
            return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

        places = meshes.shardings(params, mesh)
        assert places["stored_patterns"].spec == PartitionSpec("sequence")
        jit = jax.jit(jax.grad(total), in_shardings=(places, meshes.batch_sharding(mesh)), out_shardings=places)
        with meshes.use(mesh):
            compiled = jit.lower(params, x).compile()
        return max(each.bytes for each in collectives(compiled, mesh)), compiled.memory_analysis().temp_size_in_bytes

    streamed_bytes, streamed_temporaries = sent(streamed(layer, Streaming(chunk_size=64)))
    memory = 16384 * 16 * 4
    assert streamed_bytes < memory / 16
    # The control: of the plain form the weights of all states are in memory.
    assert streamed_temporaries < sent(layer)[1] / 2
