"""Binary Hopfield networks against a NumPy twin, the energy, the mean-field theory and simulated capacities."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.hopfield.binary_hopfield import (
    capacity_curve,
    critical_load,
    energy,
    fixed_fraction,
    hebbian_weights,
    mean_field_overlap,
    overlaps,
    pseudo_inverse_weights,
    retrieve,
    settle,
    turn_some,
    update_asynchronously,
    update_synchronously,
)

sweep, together, energy_of = jax.jit(update_asynchronously), jax.jit(update_synchronously), jax.jit(energy)
reach = jax.jit(retrieve, static_argnames=("synchronous", "max_steps"))
hebbian = jax.jit(hebbian_weights, static_argnames="self_coupling")
projection = jax.jit(pseudo_inverse_weights, static_argnames=("self_coupling", "tolerance"))
kept = jax.jit(fixed_fraction)
simulate = jax.jit(capacity_curve, static_argnames=("neurons", "loads", "queries", "fraction", "max_steps"))


def signs(rng, *shape):
    return rng.choice([-1.0, 1.0], size=shape)


def as_jax(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def symmetric(rng, neurons):
    w = rng.normal(size=(neurons, neurons))
    w = w + w.T
    np.fill_diagonal(w, 0)
    return w


# The twin: one state and one neuron at a time, in float64. ------------------------------------------------------------


def twin_field(state, weights, bias, i):
    return sum(weights[i, j] * state[j] for j in range(len(state))) + bias[i]


def twin_sign(field, old):
    return old if abs(field) < 1e-9 else math.copysign(1, field)


def twin_sweep(state, weights, bias, order):
    state = state.copy()
    for i in order:
        state[i] = twin_sign(twin_field(state, weights, bias, i), state[i])
    return state


def twin_together(state, weights, bias):
    return np.array([twin_sign(twin_field(state, weights, bias, i), state[i]) for i in range(len(state))])


def twin_settle(update, state, max_steps):
    path = [state]
    for step in range(max_steps):
        new = update(path[-1])
        if np.array_equal(new, path[-1]):
            return path[-1], step, 1
        if len(path) > 1 and np.array_equal(new, path[-2]):
            return path[-1], step - 1, 2
        path.append(new)
    return path[-1], max_steps, 0


def twin_energy(state, weights, bias):
    n = len(state)
    pairs = sum(weights[i, j] * state[i] * state[j] for i in range(n) for j in range(n))
    return -0.5 * pairs - sum(bias[i] * state[i] for i in range(n))


@pytest.mark.parametrize("self_coupling", [False, True])
def test_hebbian_weights_equal_the_sum_over_patterns(rng, self_coupling):
    patterns = signs(rng, 5, 9)
    expected = sum(np.outer(one, one) for one in patterns) / 9
    if not self_coupling:
        np.fill_diagonal(expected, 0)
    found = hebbian(*as_jax(patterns), self_coupling=self_coupling)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_dynamics_equal_the_twin(rng, with_bias, tied):
    # Hebbian weights of an even number of patterns have fields of exactly zero, which leave the neuron as it is.
    patterns = signs(rng, 4, 9)
    weights = np.array(hebbian(*as_jax(patterns)), np.float64) if tied else symmetric(rng, 9)
    bias = rng.normal(size=9) if with_bias else np.zeros(9)
    states, order = signs(rng, 2, 30, 9), rng.permutation(9)
    given = {"bias": jnp.asarray(bias, jnp.float32)} if with_bias else {}
    x, w = as_jax(states, weights)
    found = {
        "energy": energy_of(x, w, **given),
        "sweep": sweep(x, w, order=jnp.asarray(order), **given),
        "together": together(x, w, **given),
        "one": reach(x, w, **given),
        "all": reach(x, w, synchronous=True, **given),
    }
    found = jax.device_get(found)
    ties = 0
    for at in np.ndindex(2, 30):
        state = states[at]
        ties += sum(abs(twin_field(state, weights, bias, i)) < 1e-6 for i in range(9))
        np.testing.assert_allclose(found["energy"][at], twin_energy(state, weights, bias), atol=2e-5)
        np.testing.assert_array_equal(found["sweep"][at], twin_sweep(state, weights, bias, order))
        np.testing.assert_array_equal(found["together"][at], twin_together(state, weights, bias))
        one_by_one = functools.partial(twin_sweep, weights=weights, bias=bias, order=range(9))
        at_once = functools.partial(twin_together, weights=weights, bias=bias)
        for name, update in (("one", one_by_one), ("all", at_once)):
            reached, steps, period = twin_settle(update, state, 100)
            np.testing.assert_array_equal(found[name].state[at], reached)
            assert (found[name].steps[at], found[name].period[at]) == (steps, period)
    assert (ties > 0) == (tied and not with_bias)


def test_a_neuron_without_a_field_stays(rng):
    # Two opposite patterns' fields cancel where they differ, also at widths where 1/N is rounded.
    (patterns,) = as_jax(signs(rng, 2, 99))
    weights = hebbian(patterns)
    (state,) = as_jax(signs(rng, 50, 99))
    exact = np.round(np.asarray(99 * weights)) @ np.asarray(state).T
    new = np.asarray(together(state, weights)).T
    assert (exact == 0).sum() > 50
    np.testing.assert_array_equal(new, np.where(exact == 0, np.asarray(state).T, np.sign(exact)))


# Energy. --------------------------------------------------------------------------------------------------------------


def rises(state, weights, updates):
    """Return the change of energy in each update of one neuron after the other, in a given order of neurons."""
    trace = [energy_of(state, weights)]
    for i in updates:
        state = sweep(state, weights, order=jnp.asarray([i]))
        trace.append(energy_of(state, weights))
    return np.diff(np.stack(trace), axis=0)


def test_one_neuron_after_the_other_never_raises_the_energy(rng):
    (state,) = as_jax(signs(rng, 100, 20))
    order = rng.integers(20, size=100)
    for weights in (symmetric(rng, 20), symmetric(rng, 20) + np.diag(rng.random(20))):
        found = rises(state, *as_jax(weights), order)
        assert found.max() <= 1e-4  # float32 rounding of energies up to 100
        assert found.min() < -1


def test_asymmetric_weights_and_negative_self_coupling_raise_the_energy(rng):
    (state,) = as_jax(signs(rng, 100, 20))
    order = rng.integers(20, size=100)
    for weights in (rng.normal(size=(20, 20)), symmetric(rng, 20) - 5 * np.eye(20)):
        assert rises(state, *as_jax(weights), order).max() > 1


def test_all_neurons_at_once_raise_the_energy_and_cycle(rng):
    state, weights = as_jax(signs(rng, 100, 20), symmetric(rng, 20))
    assert np.max(energy_of(together(state, weights), weights) - energy_of(state, weights)) > 1
    assert set(np.unique(reach(state, weights, synchronous=True).period)) == {1, 2}
    assert set(np.unique(reach(state, weights).period)) == {1}
    # What does fall when all neurons move at once is the energy between a state and the next.
    before, now = state, together(state, weights)
    for _ in range(5):
        after = together(now, weights)
        pair = [-np.einsum("si,ij,sj->s", *map(np.asarray, (a, weights, b))) for a, b in ((before, now), (now, after))]
        assert np.max(pair[1] - pair[0]) <= 1e-3  # rounding of some hundred
        before, now = now, after


def test_two_neurons_at_once_exchange_their_states_for_ever():
    weights, state = jnp.asarray([[0.0, 1.0], [1.0, 0.0]]), jnp.asarray([1.0, -1.0])
    found = reach(state, weights, synchronous=True)
    assert (int(found.steps), int(found.period)) == (0, 2)
    found = reach(state, weights)
    assert (int(found.steps), int(found.period)) == (1, 1)
    np.testing.assert_array_equal(found.state, [-1, -1])


def test_positive_semidefinite_weights_never_cycle(rng):
    state, patterns = as_jax(signs(rng, 100, 20), signs(rng, 6, 20))
    weights = projection(patterns)
    assert np.max(energy_of(together(state, weights), weights) - energy_of(state, weights)) <= 1e-5
    assert set(np.unique(reach(state, weights, synchronous=True).period)) == {1}
    # Without its diagonal the same memory does cycle.
    bare = projection(patterns, self_coupling=False)
    assert 2 in reach(state, bare, synchronous=True).period


def test_a_settled_state_is_a_minimum_among_its_neighbours(rng):
    state, weights = as_jax(signs(rng, 100, 20), symmetric(rng, 20))
    found = reach(state, weights, key=jax.random.key(0))
    neighbours = found.state[:, None] * (1 - 2 * jnp.eye(20))
    assert np.min(energy_of(neighbours, weights) - energy_of(found.state, weights)[:, None]) > 0
    assert np.min(energy_of(state[:, None] * (1 - 2 * jnp.eye(20)), weights) - energy_of(state, weights)[:, None]) < -1


def test_a_retrieval_cut_short_says_so(rng):
    state, weights = as_jax(signs(rng, 100, 20), symmetric(rng, 20))
    short, whole = reach(state, weights, max_steps=1), reach(state, weights)
    assert 0 in short.period
    np.testing.assert_array_equal(short.period == 1, whole.steps == 0)
    np.testing.assert_array_equal(short.steps[short.period == 0], 1)


def test_random_order_is_set_by_its_key(rng):
    state, weights = as_jax(signs(rng, 100, 20), symmetric(rng, 20))
    first, again, other = (reach(state, weights, key=jax.random.key(seed)).state for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_a_state_settles_the_same_alone_and_in_a_batch(rng):
    state, weights = as_jax(signs(rng, 5, 20), symmetric(rng, 20))
    for options in ({"synchronous": True}, {"key": jax.random.key(3)}):
        together_ = jax.device_get(reach(state, weights, **options))
        for index, one in enumerate(state):
            alone = jax.device_get(reach(one, weights, **options))
            jax.tree.map(np.testing.assert_array_equal, alone, type(alone)(*(leaf[index] for leaf in together_)))


# Symmetries. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [hebbian, projection])
def test_turning_neurons_everywhere_changes_nothing_else(rng, rule):
    patterns, state, gauge = as_jax(signs(rng, 5, 24), signs(rng, 40, 24), signs(rng, 24))
    plain, turned = reach(state, rule(patterns)), reach(gauge * state, rule(gauge * patterns))
    np.testing.assert_array_equal(turned.state, gauge * plain.state)
    np.testing.assert_array_equal(turned.steps, plain.steps)
    # A pattern and its mirror image are the same memory; turning the states alone is another question.
    np.testing.assert_allclose(rule(patterns), rule(patterns * jnp.asarray([[1], [-1], [1], [-1], [1]])), atol=1e-6)
    np.testing.assert_array_equal(reach(-state, rule(patterns)).state, -plain.state)
    assert np.any(reach(gauge * state, rule(patterns)).state != gauge * plain.state)


def test_renaming_neurons_renames_the_result(rng):
    patterns, state = as_jax(signs(rng, 3, 24), signs(rng, 40, 24))
    shuffle = rng.permutation(24)
    plain = sweep(state, hebbian(patterns), order=jnp.asarray(shuffle))
    renamed = sweep(state[:, shuffle], hebbian(patterns[:, shuffle]))
    np.testing.assert_array_equal(renamed, plain[:, shuffle])


# Memories. ------------------------------------------------------------------------------------------------------------


def test_few_patterns_are_fixed_and_many_are_not(rng):
    (patterns,) = as_jax(signs(rng, 100, 200))
    few = int(200 / (4 * math.log(200)))  # below this all random patterns are fixed, for large N
    fractions = [kept(patterns[:count], hebbian(patterns[:count])) for count in (few, 20, 30, 100)]
    assert fractions[0] == 1
    assert np.all(np.diff(fractions) < 0)
    assert fractions[-1] == 0


def test_corrupted_patterns_are_restored(rng):
    (patterns,) = as_jax(signs(rng, 10, 300))
    weights = hebbian(patterns)
    corrupted = turn_some(jax.random.key(0), patterns, fraction=0.2)
    np.testing.assert_array_equal(jnp.sum(corrupted != patterns, axis=-1), 60)
    found = reach(corrupted, weights)
    np.testing.assert_array_equal(found.state, patterns)
    np.testing.assert_array_equal(np.diag(overlaps(found.state, patterns)), 1)
    np.testing.assert_allclose(np.diag(overlaps(corrupted, patterns)), 0.6, atol=1e-6)


def test_pseudo_inverse_equals_the_projection_of_numpy(rng):
    patterns = signs(rng, 6, 20)
    patterns = np.concatenate([patterns, patterns[:2], -patterns[2:3]])  # duplicates and a mirror image
    expected = np.linalg.pinv(patterns) @ patterns
    np.testing.assert_allclose(projection(*as_jax(patterns)), expected, atol=1e-5)
    np.testing.assert_allclose(projection(*as_jax(patterns[:6])), expected, atol=1e-5)
    bare = projection(*as_jax(patterns), self_coupling=False)
    np.testing.assert_allclose(bare, expected - np.diag(np.diag(expected)), atol=1e-5)


def test_linearly_dependent_patterns_are_all_kept(rng):
    first, second = signs(rng, 2, 24)
    left = np.arange(24) % 2 == 0
    patterns = np.stack([first, second, np.where(left, first, second), np.where(left, second, first)])
    np.testing.assert_array_equal(patterns[0] + patterns[1], patterns[2] + patterns[3])
    assert np.linalg.matrix_rank(patterns) == 3
    (stored,) = as_jax(patterns)
    weights = projection(stored)
    np.testing.assert_allclose(np.trace(weights), 3, atol=1e-5)
    assert kept(stored, weights) == 1
    # Negative control: a tolerance too large loses a direction, and with it patterns.
    assert kept(stored, projection(stored, tolerance=0.9)) < 1


@pytest.mark.parametrize("self_coupling", [True, False])
def test_pseudo_inverse_stores_one_less_than_its_neurons_where_hebbian_stores_none(rng, self_coupling):
    (patterns,) = as_jax(signs(rng, 31, 32))
    assert np.linalg.matrix_rank(patterns) == 31
    assert kept(patterns, projection(patterns, self_coupling=self_coupling)) == 1
    assert kept(patterns, hebbian(patterns)) == 0


def test_pseudo_inverse_stores_correlated_patterns_where_hebbian_does_not(rng):
    patterns = np.where(rng.random((12, 100)) < 0.8, 1.0, -1.0)  # a common mean of 0.6
    (stored,) = as_jax(patterns)
    assert kept(stored, projection(stored)) == 1
    assert kept(stored, hebbian(stored)) < 0.1


def test_patterns_that_span_everything_make_every_state_a_memory(rng):
    (patterns,) = as_jax(signs(rng, 30, 16))
    weights = projection(patterns)
    np.testing.assert_allclose(weights, np.eye(16), atol=1e-5)
    assert kept(*as_jax(signs(rng, 100, 16)), weights) == 1


def test_an_empty_memory_keeps_every_state(rng):
    (state,) = as_jax(signs(rng, 10, 8))
    none = jnp.zeros((0, 8))
    for rule in (hebbian, projection):
        found = reach(state, rule(none))
        np.testing.assert_array_equal(found.state, state)
        np.testing.assert_array_equal(found.steps, 0)
        np.testing.assert_array_equal(energy_of(state, rule(none)), 0)
    assert kept(none, jnp.zeros((8, 8))) == 1


def test_duplicates_strengthen_a_hebbian_memory_and_not_the_pseudo_inverse(rng):
    (patterns,) = as_jax(signs(rng, 2, 50))
    twice = jnp.concatenate([patterns, patterns[:1]])
    mixture = jnp.where(patterns[0] == patterns[1], patterns[0], 1.0)
    assert overlaps(reach(mixture, hebbian(twice)).state, patterns)[0] == 1
    np.testing.assert_allclose(projection(twice), projection(patterns), atol=1e-6)


# Capacity. ------------------------------------------------------------------------------------------------------------


def twin_mean_field(load):
    """Iterate the three equations as they stand, from the perfect overlap."""
    m, r = 1.0, 1.0
    for _ in range(20000):
        spread = math.sqrt(2 * load * r)
        c = math.sqrt(2 / (math.pi * load * r)) * math.exp(-((m / spread) ** 2))
        m, r = math.erf(m / spread), 1 / (1 - c) ** 2
    return m


def solutions(load):
    """Count the overlaps in 0.8 to 1 that solve the equations: the first gives r, which then must obey the others."""
    errors = []
    for m in np.linspace(0.8, 0.99999, 5000):
        inverse = statistics.NormalDist().inv_cdf((m + 1) / 2) / math.sqrt(2)  # erf(inverse) = m
        r = (m / inverse) ** 2 / (2 * load)
        c = math.sqrt(2 / (math.pi * load * r)) * math.exp(-(inverse**2))
        errors.append(r * (1 - c) ** 2 - 1)
    return int(np.sum(np.diff(np.sign(errors)) != 0))


@pytest.mark.parametrize("load", [0.02, 0.05, 0.1, 0.13, 0.137])
def test_overlap_solves_the_three_mean_field_equations(load):
    np.testing.assert_allclose(mean_field_overlap(load), twin_mean_field(load), atol=1e-9)


def test_critical_load_is_0_138():
    found = critical_load()
    assert round(found.load, 3) == 0.138
    np.testing.assert_allclose(found, (0.137906, 0.967417), atol=1e-6)
    # The equations themselves have a solution on one side of it and none on the other.
    assert [solutions(load) for load in (0.13, 0.1378, 0.138, 0.15)] == [2, 2, 0, 0]
    assert mean_field_overlap(0.13790) > 0.967
    assert mean_field_overlap(0.13791) == 0


def test_overlap_falls_with_the_load_and_jumps():
    found = [mean_field_overlap(load) for load in (0.0, 0.03, 0.05, 0.1, 0.12, 0.137)]
    assert found[0] == 1
    assert np.all(np.diff(found) < 0)
    assert found[-1] > 0.96


def test_simulated_capacity_brackets_the_critical_load():
    loads = (0.08, 0.12, 0.25, 0.4)
    found = np.asarray(simulate(jax.random.key(0), 500, loads))
    assert found.shape == (4, 32)
    mean = found.mean(axis=1)
    np.testing.assert_allclose(mean[:2], [mean_field_overlap(load) for load in loads[:2]], atol=0.02)
    # Beyond the critical load a remnant of the pattern is left, far from the 0.967 of retrieval.
    assert np.all(mean[2:] < 0.6)


@pytest.mark.slow
def test_simulated_capacity_brackets_the_critical_load_closely():
    loads = (0.10, 0.12, 0.13, 0.16, 0.18, 0.2)
    found = np.asarray(simulate(jax.random.key(0), 2000, loads, queries=64))
    np.testing.assert_allclose(found[:3].mean(axis=1), [mean_field_overlap(load) for load in loads[:3]], atol=0.01)
    retrieved = np.mean(found > 0.9, axis=1)
    assert np.all(retrieved[:3] > 0.95)
    assert np.all(retrieved[3:] < (0.5, 0.2, 0.05))
    # A finite network loses patterns over a range of loads above the critical one, which narrows as N grows.
    small = np.mean(np.asarray(simulate(jax.random.key(0), 250, loads, queries=64)) > 0.9, axis=1)
    assert np.all(small[3:] > retrieved[3:] + 0.2)


def test_pseudo_inverse_keeps_its_patterns_where_hebbian_lost_them():
    rule = jax.jit(
        lambda key, loads: capacity_curve(key, 100, loads, weights_fn=pseudo_inverse_weights), static_argnums=1
    )
    np.testing.assert_array_equal(rule(jax.random.key(0), (0.2, 0.5, 0.9)), 1)


def test_basins_of_attraction_shrink_with_the_load():
    loads = (0.02, 0.06, 0.1, 0.13)
    back = np.stack(
        [np.mean(simulate(jax.random.key(1), 200, loads, fraction=f) > 0.9, axis=1) for f in (0.0, 0.3, 0.4)]
    )
    assert np.all(np.diff(back.sum(axis=0)) < 0)  # with the load
    assert np.all(np.diff(back.sum(axis=1)) < 0)  # with the corruption
    assert back[1, 0] > 0.9
    assert back[2, 3] < 0.2


def test_basins_grow_without_self_coupling(rng):
    (patterns,) = as_jax(signs(rng, 50, 100))
    state = turn_some(jax.random.key(2), patterns, fraction=0.08)
    back = [
        np.mean(np.all(reach(state, projection(patterns, self_coupling=diagonal)).state == patterns, axis=-1))
        for diagonal in (True, False)
    ]
    assert back[1] > back[0] + 0.3


# Forms. ---------------------------------------------------------------------------------------------------------------


def test_bfloat16_states_are_computed_in_float32(rng):
    state, patterns = (jnp.asarray(signs(rng, n, 200), jnp.bfloat16) for n in (20, 8))
    weights = hebbian(patterns)
    assert weights.dtype == jnp.float32
    found = reach(state, weights)
    assert found.state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.state, reach(state.astype(jnp.float32), weights).state)


def test_leading_axes_and_vmap_agree(rng):
    state, weights = as_jax(signs(rng, 2, 3, 4, 10), symmetric(rng, 10))
    whole = reach(state, weights, synchronous=True)
    assert whole.steps.shape == (2, 3, 4)
    mapped = jax.vmap(lambda one: retrieve(one, weights, synchronous=True))(state)
    jax.tree.map(np.testing.assert_array_equal, mapped, whole)


@pytest.mark.usefixtures("untyped")
def test_functions_refuse_what_does_not_fit():
    x, w = jnp.ones((2, 3)), jnp.ones((4, 4))
    for function in (energy, update_asynchronously, update_synchronously, retrieve):
        with pytest.raises(ValueError, match=r"weights of shape \(4, 4\) must be \(3, 3\), as the states"):
            function(x, w)
        with pytest.raises(ValueError, match=r"bias of shape \(4,\) must be \(3,\), as the states"):
            function(x, jnp.ones((3, 3)), bias=jnp.ones(4))
    with pytest.raises(ValueError, match=r"patterns have shape \(3,\) and must be \[patterns, neurons\]"):
        hebbian_weights(jnp.ones(3))
    with pytest.raises(ValueError, match=r"patterns have shape \(3, 0\)"):
        pseudo_inverse_weights(jnp.ones((3, 0)))
    with pytest.raises(ValueError, match=r"tolerance=-1 must be at least 0"):
        pseudo_inverse_weights(x, tolerance=-1)
    with pytest.raises(ValueError, match=r"states have 3 neurons and patterns 4, which must be equal"):
        overlaps(x, w)
    with pytest.raises(ValueError, match=r"max_steps=0 must be at least 1"):
        settle(lambda s, _: s, x, max_steps=0)
    with pytest.raises(ValueError, match=r"synchronous=True has no order; pass key=None"):
        retrieve(x, jnp.ones((3, 3)), key=jax.random.key(0), synchronous=True)
    with pytest.raises(ValueError, match=r"fraction=1.5 must lie in 0 to 1"):
        turn_some(jax.random.key(0), x, fraction=1.5)
    with pytest.raises(ValueError, match=r"load=-0.1 must be at least 0"):
        mean_field_overlap(-0.1)
    with pytest.raises(ValueError, match=r"neurons=1, queries=32 and loads=\(0.1,\)"):
        capacity_curve(jax.random.key(0), 1, (0.1,))
