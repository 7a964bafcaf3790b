"""Dense associative memories against exact twins, their capacity formulas, and the networks they generalise."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.hopfield import binary_hopfield, hopfield
from jaxlayers.hopfield.binary_hopfield import hebbian_weights, turn_some
from jaxlayers.hopfield.dense_associative_memory import (
    absolute,
    additive,
    energy,
    error_probability,
    errorless_capacity,
    exponential,
    exponential_capacity,
    log_energy,
    log_sum_exp,
    outputs,
    polynomial,
    polynomial_capacity,
    quadratic,
    rectified_polynomial,
    retrieve,
    spherical,
    two_layer_energy,
    two_layer_trajectory,
    update_asynchronously,
    update_synchronously,
)

sweep = jax.jit(update_asynchronously, static_argnums=2)
together = jax.jit(update_synchronously, static_argnums=2)
reach = jax.jit(retrieve, static_argnums=2, static_argnames=("synchronous", "max_steps"))
energy_of = jax.jit(energy, static_argnums=2)
log_energy_of = jax.jit(log_energy, static_argnums=2)
binary_sweep = jax.jit(binary_hopfield.update_asynchronously)
binary_reach = jax.jit(binary_hopfield.retrieve, static_argnames="synchronous")
binary_energy = jax.jit(binary_hopfield.energy)
put_out = jax.jit(outputs, static_argnums=0)
LAYERS = ("feature_lagrangian", "memory_lagrangian")
follow = jax.jit(two_layer_trajectory, static_argnames=(*LAYERS, "steps", "step_size", "feature_time", "memory_time"))

layered_energy = jax.jit(two_layer_energy, static_argnames=LAYERS)


def signs(rng, *shape):
    return rng.choice([-1.0, 1.0], size=shape)


def as_jax(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


# The twin: whole numbers of any size for polynomials, so that nothing is rounded; float64 for the exponential. --------


def twin_function(name, degree):
    if name == "polynomial":
        return lambda x: int(x) ** degree
    if name == "rectified":
        return lambda x: max(int(x), 0) ** degree
    return lambda x: math.exp(x)


def twin_energy(state, patterns, function):
    return -sum(function(sum(p * s for p, s in zip(one, state, strict=True))) for one in patterns)


def twin_one(state, patterns, function, i):
    up, down = state.copy(), state.copy()
    up[i], down[i] = 1, -1
    difference = twin_energy(down, patterns, function) - twin_energy(up, patterns, function)
    tie = abs(difference) <= 1e-12 * abs(twin_energy(up, patterns, function))
    return state[i] if tie else math.copysign(1, difference)


def twin_sweep(state, patterns, function, order):
    state = state.copy()
    for i in order:
        state[i] = twin_one(state, patterns, function, i)
    return state


INTERACTIONS = {
    ("polynomial", 3): polynomial(3),
    ("polynomial", 5): polynomial(5),
    ("rectified", 3): rectified_polynomial(3),
    ("exponential", 0): exponential(),
}


@pytest.mark.parametrize("kind", INTERACTIONS, ids=lambda kind: f"{kind[0]}{kind[1]}")
def test_dynamics_equal_the_twin(rng, kind):
    states, patterns, order = signs(rng, 2, 10, 9), signs(rng, 6, 9), rng.permutation(9)
    function, interaction = twin_function(*kind), INTERACTIONS[kind]
    x, stored = as_jax(states, patterns)
    found = jax.device_get(
        {
            "energy": energy_of(x, stored, interaction),
            "sweep": sweep(x, stored, interaction, order=jnp.asarray(order)),
            "together": together(x, stored, interaction),
        }
    )
    for at in np.ndindex(2, 10):
        expected = twin_energy(states[at], patterns, function)
        np.testing.assert_allclose(found["energy"][at], float(expected), rtol=1e-5)
        np.testing.assert_array_equal(found["sweep"][at], twin_sweep(states[at], patterns, function, order))
        at_once = [twin_one(states[at], patterns, function, i) for i in range(9)]
        np.testing.assert_array_equal(found["together"][at], at_once)


@pytest.mark.parametrize("kind", [("rectified", 3), ("exponential", 0)], ids=lambda kind: kind[0])
def test_log_energy_is_minus_the_logarithm_of_minus_the_energy(rng, kind):
    x, stored = as_jax(signs(rng, 30, 9), signs(rng, 6, 9))
    found = log_energy_of(x, stored, INTERACTIONS[kind])
    np.testing.assert_allclose(found, -np.log(-np.asarray(energy_of(x, stored, INTERACTIONS[kind]))), atol=1e-5)


# Energy. --------------------------------------------------------------------------------------------------------------


def rises(state, patterns, interaction, order, measured):
    trace = [measured(state, patterns, interaction)]
    for i in order:
        state = sweep(state, patterns, interaction, order=jnp.asarray([i]))
        trace.append(measured(state, patterns, interaction))
    return np.diff(np.stack(trace), axis=0)


@pytest.mark.parametrize("kind", [("polynomial", 5), ("rectified", 3), ("exponential", 0)], ids=lambda kind: kind[0])
def test_one_neuron_after_the_other_never_raises_the_energy(rng, kind):
    state, patterns = as_jax(signs(rng, 40, 20), signs(rng, 15, 20))
    interaction, order = INTERACTIONS[kind], rng.integers(20, size=60)
    found = rises(state, patterns, interaction, order, energy_of)
    scale = np.abs(np.asarray(energy_of(state, patterns, interaction))).max()
    assert found.max() <= 1e-6 * scale
    assert found.min() < -0.01 * scale
    # Negative control: the descent of another interaction is not one of this energy.
    other = polynomial(3) if kind != ("polynomial", 3) else rectified_polynomial(2)
    foreign = rises(state, patterns, other, order, lambda s, p, _: energy_of(s, p, interaction))
    assert foreign.max() > 1e-3 * scale


def test_all_neurons_at_once_raise_the_energy_and_cycle(rng):
    state, patterns = as_jax(signs(rng, 40, 20), signs(rng, 15, 20))
    interaction = polynomial(2)
    assert np.max(energy_of(together(state, patterns, interaction), patterns, interaction) - energy_of(
        state, patterns, interaction)) > 1  # fmt: skip
    assert 2 in reach(state, patterns, interaction, synchronous=True).period
    assert set(np.unique(reach(state, patterns, interaction).period)) == {1}


# Limits. --------------------------------------------------------------------------------------------------------------


def test_degree_two_is_the_binary_hopfield_network(rng):
    state, patterns = as_jax(signs(rng, 100, 30), signs(rng, 6, 30))
    weights = hebbian_weights(patterns)
    order = jnp.asarray(rng.permutation(30))
    dense, binary = state, state
    for _ in range(4):  # the whole trajectories, neuron by neuron in the same order, ties included
        dense = sweep(dense, patterns, polynomial(2), order=order)
        binary = binary_sweep(binary, weights, order=order)
        np.testing.assert_array_equal(dense, binary)
    jax.tree.map(
        np.testing.assert_array_equal,
        reach(state, patterns, polynomial(2), synchronous=True),
        binary_reach(state, weights, synchronous=True),
    )
    # The energies differ by 2 N and by the constant of the diagonal, which the dense memory has and no flip sees.
    expected = 2 * 30 * binary_energy(state, weights) - 6 * 30
    np.testing.assert_allclose(energy_of(state, patterns, polynomial(2)), expected, rtol=1e-5)
    full = hebbian_weights(patterns, self_coupling=True)
    np.testing.assert_allclose(energy_of(state, patterns, polynomial(2)), 60 * binary_energy(state, full), rtol=1e-5)
    # Negative control: fields with the diagonal make every neuron stick to itself, another dynamics.
    assert np.any(binary_sweep(state, full, order=order) != sweep(state, patterns, polynomial(2), order=order))


def test_a_steep_exponential_retrieves_the_nearest_pattern(rng):
    state, patterns = as_jax(signs(rng, 60, 25), signs(rng, 8, 25))
    products = np.asarray(state @ patterns.T)
    nearest = np.argmax(products, axis=-1)
    clear = np.sort(products, axis=-1)[:, -1] > np.sort(products, axis=-1)[:, -2] + 2  # no neuron can change the order
    assert clear.sum() > 20
    found = np.asarray(together(state, patterns, exponential(30.0)))
    np.testing.assert_array_equal(found[clear], np.asarray(patterns)[nearest][clear])
    assert np.any(
        np.asarray(together(state, patterns, exponential(0.05)))[clear] != np.asarray(patterns)[nearest][clear]
    )


def test_steep_interactions_neither_overflow_nor_vanish(rng):
    state, patterns = as_jax(signs(rng, 40, 300), signs(rng, 40, 300))
    for interaction in (polynomial(40), exponential(3.0)):
        corrupted = turn_some(jax.random.key(0), patterns, fraction=0.2)
        np.testing.assert_array_equal(reach(corrupted, patterns, interaction).state, patterns)
        assert np.isinf(energy_of(patterns, patterns, interaction)).all()
        assert np.isfinite(log_energy_of(patterns, patterns, interaction)).all()
        begin, end = state, reach(state, patterns, interaction).state  # small overlaps do not vanish either
        assert np.all(log_energy_of(end, patterns, interaction) < log_energy_of(begin, patterns, interaction))


def test_mirror_images_are_memories_of_even_powers_only(rng):
    (patterns,) = as_jax(signs(rng, 3, 40))
    np.testing.assert_array_equal(reach(-patterns, patterns, polynomial(4)).state, -patterns)
    for interaction in (rectified_polynomial(4), exponential()):
        assert np.all(np.any(reach(-patterns, patterns, interaction).state != -patterns, axis=-1))


def test_an_empty_memory_keeps_every_state(rng):
    (state,) = as_jax(signs(rng, 10, 8))
    none = jnp.zeros((0, 8))
    for interaction in (polynomial(3), exponential()):
        found = reach(state, none, interaction)
        np.testing.assert_array_equal(found.state, state)
        np.testing.assert_array_equal(found.steps, 0)
        np.testing.assert_array_equal(energy(state, none, interaction), 0)
    assert np.all(np.isposinf(log_energy(state, none, exponential())))


def test_a_duplicate_counts_twice(rng):
    (patterns,) = as_jax(signs(rng, 2, 21))
    state = jnp.where(jnp.arange(21) < 10, patterns[0], patterns[1])
    for interaction in (rectified_polynomial(2), exponential(0.1)):
        twice = jnp.concatenate([patterns, patterns[:1]])
        np.testing.assert_allclose(
            energy(state, twice, interaction),
            energy(state, patterns, interaction) + energy(state, patterns[:1], interaction),
            rtol=1e-6,
        )


# Symmetries. ----------------------------------------------------------------------------------------------------------


def test_turning_or_renaming_neurons_everywhere_changes_nothing_else(rng):
    state, patterns, gauge = as_jax(signs(rng, 40, 20), signs(rng, 15, 20), signs(rng, 20))
    plain = reach(state, patterns, polynomial(3))
    np.testing.assert_array_equal(reach(gauge * state, gauge * patterns, polynomial(3)).state, gauge * plain.state)
    assert np.any(reach(gauge * state, patterns, polynomial(3)).state != gauge * plain.state)
    rows, shuffle = rng.permutation(15), rng.permutation(20)
    np.testing.assert_array_equal(reach(state, patterns[rows], polynomial(3)).state, plain.state)
    once = sweep(state, patterns, polynomial(3), order=jnp.asarray(shuffle))
    np.testing.assert_array_equal(sweep(state[:, shuffle], patterns[:, shuffle], polynomial(3)), once[:, shuffle])


@pytest.mark.slow
def test_leading_axes_vmap_and_single_states_agree(rng):
    state, patterns = as_jax(signs(rng, 2, 3, 20), signs(rng, 15, 20))
    whole = reach(state, patterns, polynomial(3), key=jax.random.key(0))
    mapped = jax.vmap(lambda one: retrieve(one, patterns, polynomial(3), key=jax.random.key(0)))(state)
    jax.tree.map(np.testing.assert_array_equal, mapped, whole)
    alone = reach(state[1, 2], patterns, polynomial(3), key=jax.random.key(0))
    np.testing.assert_array_equal(alone.state, whole.state[1, 2])
    assert alone.steps == whole.steps[1, 2]


def test_bfloat16_states_are_computed_in_float32(rng):
    state, patterns = as_jax(signs(rng, 2, 3, 20), signs(rng, 15, 20))
    low = reach(state.astype(jnp.bfloat16), patterns.astype(jnp.bfloat16), polynomial(3))
    assert low.state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low.state, reach(state, patterns, polynomial(3)).state)


# Capacity. ------------------------------------------------------------------------------------------------------------


def unstable(rng, neurons, count, interaction, draws=4):
    """Return which part of the neurons of stored patterns the first update turns."""
    parts = []
    for _ in range(draws):
        (patterns,) = as_jax(signs(rng, count, neurons))
        asked = patterns[:50]
        parts.append(np.mean(together(asked, patterns, interaction) != asked))
    return float(np.mean(parts))


@pytest.mark.parametrize(("degree", "neurons", "count"), [(2, 100, 25), (3, 60, 240)])
def test_measured_errors_are_those_of_the_formula(rng, degree, neurons, count):
    expected = error_probability(neurons, count, degree)
    assert 0.01 < expected < 0.1
    np.testing.assert_allclose(unstable(rng, neurons, count, polynomial(degree)), expected, rtol=0.3)
    # Negative control: the formula of the neighbouring degree is far off.
    other = error_probability(neurons, count, 5 - degree)
    assert not np.isclose(other, expected, rtol=0.6)


def test_steeper_interactions_hold_many_more_patterns_than_neurons(rng):
    (patterns,) = as_jax(signs(rng, 120, 40))  # three times as many patterns as neurons
    corrupted = turn_some(jax.random.key(0), patterns, fraction=0.05)
    kept = [
        float(np.mean(np.all(reach(corrupted, patterns, one).state == patterns, axis=-1)))
        for one in (polynomial(2), rectified_polynomial(6), exponential())
    ]
    assert kept[0] == 0
    assert min(kept[1:]) > 0.95


def test_exponential_capacity_grows_with_the_square_root_of_all_states(rng):
    # At 2^(N/2) / 8 patterns nearly all neurons are stable, at 2^(N/2) * 16 (a quarter of all states, N = 12) not.
    few, many = (unstable(rng, 12, int(factor * exponential_capacity(12)), exponential()) for factor in (1 / 8, 16))
    assert few < 0.02
    assert many > 0.08


def test_capacity_formulas_have_their_known_values():
    np.testing.assert_allclose(polynomial_capacity(1000, 2), 150.7, atol=0.1)
    np.testing.assert_allclose(polynomial_capacity(1000, 2, error=0.0036), 138, atol=0.5)  # errors at the critical load
    np.testing.assert_allclose(errorless_capacity(100, 2), 100 / (2 * math.log(100)))
    np.testing.assert_allclose(errorless_capacity(100, 2, all_patterns=True), 100 / (4 * math.log(100)))
    np.testing.assert_allclose(errorless_capacity(100, 4), 100**3 / (2 * 15 * math.log(100)))
    assert round(errorless_capacity(30, 2), 6) == 4.410212
    np.testing.assert_allclose(error_probability(500, polynomial_capacity(500, 3, error=0.02), 3), 0.02, rtol=1e-6)
    np.testing.assert_allclose(exponential_capacity(40), 2**20, rtol=1e-12)
    values = [exponential_capacity(40, fraction=rho) for rho in (0.0, 0.1, 0.3, 0.49)]
    assert np.all(np.diff(values) < 0)
    assert values[-1] < 1.01
    assert [Fraction(polynomial_capacity(2 * 50, n) / polynomial_capacity(50, n)).limit_denominator(100) for n in (2, 3, 5)] == [2, 4, 16]  # fmt: skip  # noqa: E501


# Two layers. ----------------------------------------------------------------------------------------------------------

MODEL_B = {"feature_lagrangian": quadratic, "memory_lagrangian": log_sum_exp(2.0)}
MODELS = {
    "A": {"feature_lagrangian": absolute, "memory_lagrangian": additive(rectified_polynomial(3))},
    "B": MODEL_B,
    "C": {"feature_lagrangian": spherical, "memory_lagrangian": additive(rectified_polynomial(2))},
}


def test_neurons_put_out_the_gradient_of_their_lagrangian(rng):
    (x,) = as_jax(rng.normal(size=(4, 5)))
    np.testing.assert_array_equal(put_out(quadratic, x), x)
    np.testing.assert_array_equal(put_out(absolute, x), jnp.sign(x))
    np.testing.assert_allclose(put_out(log_sum_exp(3.0), x), jax.nn.softmax(3 * x), atol=1e-6)
    np.testing.assert_allclose(put_out(spherical, x), x / jnp.linalg.norm(x, axis=-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(put_out(additive(polynomial(3)), x), 3 * x**2, rtol=1e-6)
    assert np.all(np.isfinite(put_out(spherical, jnp.zeros((2, 5)))))


def twin_two_layers(v, h, xi, beta, currents):
    """Model B with its outputs written out."""
    f = np.exp(beta * h) / np.exp(beta * h).sum()
    hidden = h @ f - np.log(np.exp(beta * h).sum()) / beta
    return (v - currents) @ v - 0.5 * v @ v + hidden - f @ xi @ v, xi.T @ f - v + currents, xi @ v - h


def test_energy_and_flow_of_two_layers_equal_the_twin(rng):
    v, h, xi, currents = rng.normal(size=(3, 4)), rng.normal(size=(3, 6)), rng.normal(size=(6, 4)), rng.normal(size=4)
    x, y, stored, inputs = as_jax(v, h, xi, currents)
    found = layered_energy(x, y, stored, inputs=inputs, **MODEL_B)
    moved = follow(x, stored, memories=y, inputs=inputs, steps=1, step_size=0.1, feature_time=2.0, memory_time=0.5,
                   **MODEL_B)  # fmt: skip
    for b in range(3):
        expected, dv, dh = twin_two_layers(v[b], h[b], xi, 2.0, currents)
        np.testing.assert_allclose(found[b], expected, atol=1e-5)
        np.testing.assert_allclose(moved.features[b], v[b] + 0.05 * dv, atol=1e-5)
        np.testing.assert_allclose(moved.memories[b], h[b] + 0.2 * dh, atol=1e-5)
        np.testing.assert_allclose(moved.energies[1][b], twin_two_layers(
            v[b] + 0.05 * dv, h[b] + 0.2 * dh, xi, 2.0, currents)[0], atol=1e-5)  # fmt: skip


def test_a_whole_step_is_the_update_of_the_modern_hopfield_network(rng):
    v, xi = as_jax(rng.normal(size=(7, 6)), rng.normal(size=(5, 6)))
    for steps in (1, 3):
        found = follow(v, xi, steps=steps, step_size=1.0, **MODEL_B)
        expected = hopfield.retrieve(v, xi, beta=2.0, update_steps=steps).state
        np.testing.assert_allclose(found.features, expected, atol=1e-6)
    np.testing.assert_array_equal(follow(v, xi, steps=1, step_size=2.0, feature_time=2.0, **MODEL_B).features,
                                  follow(v, xi, steps=1, step_size=1.0, **MODEL_B).features)  # fmt: skip
    # Negative control: half a step, or sluggish memory neurons, is another rule.
    half = follow(v, xi, steps=1, step_size=0.5, **MODEL_B)
    assert np.abs(half.features - hopfield.update(v, xi, beta=2.0)).max() > 0.1
    # And the energies agree up to a constant of the memory.
    constant = math.log(5) / 2 + 0.5 * np.max(np.sum(np.square(xi), axis=-1))
    np.testing.assert_allclose(half.energies[0] + constant, hopfield.energy(v, xi, beta=2.0), atol=1e-5)


def test_both_layers_settle_where_the_modern_hopfield_network_does(rng):
    v, xi = as_jax(rng.normal(size=(7, 6)), 2 * rng.normal(size=(5, 6)))
    fixed = hopfield.retrieve(v, xi, beta=2.0, update_steps=200, tolerance=1e-7).state
    found = follow(v, xi, steps=400, step_size=0.1, memory_time=0.2, **MODEL_B)
    np.testing.assert_allclose(found.features, fixed, atol=1e-3)


def test_model_a_is_the_dense_associative_memory(rng):
    state, patterns = as_jax(signs(rng, 30, 20), signs(rng, 8, 20))
    memory = MODELS["A"]["memory_lagrangian"]
    products = state @ patterns.T
    found = layered_energy(0.3 * state, products, patterns, feature_lagrangian=absolute, memory_lagrangian=memory)
    np.testing.assert_allclose(found, energy(state, patterns, rectified_polynomial(3)), rtol=1e-5)


@pytest.mark.parametrize(("model", "memory_time"), [("A", 0.0), ("B", 0.0), ("C", 0.0), ("B", 0.7)])
def test_energy_falls_along_small_steps(rng, model, memory_time):
    v, xi, currents = as_jax(rng.normal(size=(20, 6)), rng.normal(size=(5, 6)), 0.1 * rng.normal(size=6))
    found = follow(v, xi, steps=300, step_size=0.01, memory_time=memory_time, inputs=currents, **MODELS[model])
    change = np.diff(np.asarray(found.energies), axis=0)
    scale = np.abs(np.asarray(found.energies)).max()
    if model == "A":  # its outputs jump from -1 to 1: the energy is constant between jumps, and falls at each
        assert found.energies[-1].max() <= found.energies[0].max()
    assert change.max() <= 2e-6 * scale
    assert (found.energies[-1] - found.energies[0]).min() < -1e-3 * scale


def test_large_steps_concave_lagrangians_and_untied_weights_raise_the_energy(rng):
    v, xi, other = as_jax(rng.normal(size=(20, 6)), rng.normal(size=(5, 6)), rng.normal(size=(5, 6)))
    large = follow(v, xi, steps=20, step_size=2.5, **MODEL_B)
    assert np.diff(np.asarray(large.energies), axis=0).max() > 0.1
    concave = follow(v, xi, steps=50, step_size=0.01, feature_lagrangian=lambda x: -quadratic(x),
                     memory_lagrangian=log_sum_exp(2.0))  # fmt: skip
    assert np.diff(np.asarray(concave.energies), axis=0).max() > 0.01

    @jax.jit
    def untied(v):
        def step(v, _):
            h = v @ xi.T
            moved = v + 0.05 * (jax.nn.softmax(2.0 * h) @ other - v)  # the way back has weights of its own
            return moved, two_layer_energy(v, h, xi, **MODEL_B)

        return jax.lax.scan(step, v, length=100)[1]

    assert np.diff(np.asarray(untied(v)), axis=0).max() > 0.01


def test_trajectory_has_a_gradient(rng):
    v, xi = as_jax(rng.normal(size=(3, 6)), rng.normal(size=(5, 6)))

    @functools.partial(jax.jit, static_argnums=2)
    def loss(v, xi, memory_time):
        found = two_layer_trajectory(v, xi, steps=5, step_size=0.1, memory_time=memory_time, **MODEL_B)
        return jnp.sum(jnp.square(found.features))

    for memory_time in (0.0, 1.0):
        gradient = jax.grad(loss, 1)(v, xi, memory_time)
        direction = jnp.asarray(rng.normal(size=xi.shape), jnp.float32)
        slope = (loss(v, xi + 1e-2 * direction, memory_time) - loss(v, xi - 1e-2 * direction, memory_time)) / 2e-2
        np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-2)


@pytest.mark.usefixtures("untyped")
def test_functions_refuse_what_does_not_fit():
    x, y = jnp.ones((2, 3)), jnp.ones((4, 5))
    for function in (energy, log_energy, update_asynchronously, update_synchronously, retrieve):
        with pytest.raises(ValueError, match=r"states of shape \(2, 3\) and patterns of shape \(4, 5\) must be"):
            function(x, y, exponential())
    with pytest.raises(ValueError, match=r"interaction has negative values"):
        log_energy(x, x, polynomial(3))
    for make in (polynomial, rectified_polynomial):
        with pytest.raises(ValueError, match=r"degree=1 must be at least 2"):
            make(1)
    for make in (exponential, log_sum_exp):
        with pytest.raises(ValueError, match=r"beta=0 must be positive"):
            make(0)
    with pytest.raises(ValueError, match=r"max_steps=0 must be at least 1"):
        retrieve(x, x, polynomial(2), max_steps=0)
    with pytest.raises(ValueError, match=r"pass key=None"):
        retrieve(x, x, polynomial(2), key=jax.random.key(0), synchronous=True)
    with pytest.raises(ValueError, match=r"error=0.5 must lie between 0 and 0.5"):
        polynomial_capacity(10, 2, error=0.5)
    with pytest.raises(ValueError, match=r"neurons=1 must be at least 2"):
        errorless_capacity(1, 2)
    with pytest.raises(ValueError, match=r"patterns=0 must be at least 1"):
        error_probability(10, 0, 2)
    with pytest.raises(ValueError, match=r"neurons=0 must be at least 1"):
        error_probability(0, 3, 2)
    with pytest.raises(ValueError, match=r"fraction=0.5 must be"):
        exponential_capacity(10, fraction=0.5)
    with pytest.raises(ValueError, match=r"memories have 3 neurons and must have one for each of 2 patterns"):
        two_layer_energy(x, x, x, **MODEL_B)
    with pytest.raises(ValueError, match=r"steps=0, step_size=1.0, feature_time=1.0 and memory_time=0.0"):
        two_layer_trajectory(x, x, steps=0, step_size=1.0, **MODEL_B)
    with pytest.raises(ValueError, match=r"memories need memory_time above 0"):
        two_layer_trajectory(x, x, steps=1, step_size=1.0, memories=jnp.ones((2, 2)), **MODEL_B)
