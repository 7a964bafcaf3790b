"""The diagnostics against NumPy twins, the theorems they measure, and variants that must fail."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.hopfield.capacity import (
    basin_radius,
    proven_radius,
)
from jaxlayers.hopfield.diagnostics import (
    Kind,
    analyse_heads,
    association_type,
    energy_along,
    fixed_point_type,
    operating_class,
    patterns_for_mass,
    retrieval_errors,
    update_slope,
)
from jaxlayers.hopfield.hopfield import Hopfield, HopfieldClassifier, HopfieldLayer, association, retrieve, update

# Compiled once for all tests of a shape; beta is traced.
along = jax.jit(energy_along, static_argnames="steps")
rest_of = jax.jit(fixed_point_type, static_argnames=("update_steps", "tolerance", "mass"))
type_of = jax.jit(association_type, static_argnames="mass")
settle = jax.jit(functools.partial(retrieve, update_steps=60))


def sphere(rng, *shape, radius=1.0, dtype=jnp.float32):
    points = rng.normal(size=shape)
    return jnp.asarray(radius * points / np.linalg.norm(points, axis=-1, keepdims=True), dtype)


# Energy. --------------------------------------------------------------------------------------------------------------


def twin_energy(xi, stored, beta):
    lse = np.log(np.sum(np.exp(beta * stored @ xi))) / beta
    return -lse + 0.5 * xi @ xi + np.log(len(stored)) / beta + 0.5 * max(x @ x for x in stored)


def twin_update(xi, stored, beta):
    weights = np.exp(beta * stored @ xi)
    return stored.T @ weights / weights.sum()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_energies_and_states_equal_the_twin_and_never_rise(rng, dtype):
    state, stored = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
    mask = np.ones((2, 3, 5), bool)
    mask[1, 2, 3:] = False
    mask[0, 1] = False
    with jax.enable_x64(dtype == jnp.float64):
        found = along(jnp.asarray(state, dtype), jnp.asarray(stored, dtype), beta=1.3, steps=6, mask=jnp.asarray(mask))
        assert found.energies.dtype == dtype
        found = jax.device_get(found)
    tight = 1e-5 if dtype == jnp.float32 else 1e-12
    assert found.states.shape == (7, 2, 3, 4)
    for b, s in ((0, 0), (0, 2), (1, 0), (1, 2)):
        xi, left = state[b, s], stored[b][mask[b, s]]
        for step in range(7):
            np.testing.assert_allclose(found.states[step, b, s], xi, atol=tight)
            np.testing.assert_allclose(found.energies[step, b, s], twin_energy(xi, left, 1.3), atol=tight)
            xi = twin_update(xi, left, 1.3)
    assert np.diff(found.energies, axis=0).max() <= tight
    assert np.diff(found.energies, axis=0).min() < -0.1
    assert not np.any(found.states[1:, 0, 1])  # a state that may retrieve nothing goes to zero


def test_energy_rises_under_another_update(rng):
    state, stored = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 4), (2, 5, 4)))
    trace = functools.partial(along, stored=stored, beta=1.3, steps=6, mask=jnp.ones((2, 3, 5), bool))
    right = trace(state)
    wrong = trace(2 * right.states[1] - 2 * state)
    assert np.all(right.energies[1] < right.energies[0])
    assert np.any(wrong.energies[0] > right.energies[0] + 0.1)


# The type of an association. ------------------------------------------------------------------------------------------


def twin_type(p, allowed, mass=0.9):
    """Every average of m of the patterns is built and its distance from p taken."""
    order = np.argsort(-np.where(allowed, p, -1))
    count = int(allowed.sum())
    distances = []
    for m in range(1, count + 1):
        ideal = np.zeros(len(p))
        ideal[order[:m]] = 1 / m
        distances.append(np.sum((p - ideal) ** 2))
    size = int(np.argmin(np.round(distances, 12))) + 1
    kind = Kind.SINGLE if size == 1 else Kind.GLOBAL if size == count else Kind.METASTABLE
    positive = p[p > 0]
    k = next(k for k in range(1, len(p) + 1) if p[order[:k]].sum() >= mass * (1 - 1e-6))
    return kind, size, np.exp(-np.sum(positive * np.log(positive))), k, count


def test_types_equal_the_twin(rng):
    weights = np.concatenate([rng.dirichlet(np.full(9, a), size=40) for a in (0.05, 0.3, 2.0, 50.0)])
    mask = rng.random(weights.shape) < 0.8
    mask[:, 0] = True
    weights = np.where(mask, weights, 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    with jax.enable_x64(True):
        found = jax.device_get(type_of(jnp.asarray(weights), mask=jnp.asarray(mask)))
        half = jax.device_get(patterns_for_mass(jnp.asarray(weights), mass=0.5))
    for i, (p, allowed) in enumerate(zip(weights, mask, strict=True)):
        expected = twin_type(p, allowed)
        assert (found.kind[i], found.size[i], found.patterns[i], found.available[i]) == (
            expected[0],
            expected[1],
            expected[3],
            expected[4],
        )
        np.testing.assert_allclose(found.support[i], expected[2], rtol=1e-9)
        assert half[i] == twin_type(p, allowed, mass=0.5)[3]
    assert set(found.kind) == {Kind.SINGLE, Kind.METASTABLE, Kind.GLOBAL}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_an_average_of_m_patterns_has_size_m(size):
    weights = jnp.zeros((2, 1, 10)).at[..., :size].set(1 / size)
    found = type_of(weights)
    assert np.all(found.size == size)
    np.testing.assert_allclose(found.support, size, rtol=1e-5)
    assert np.all(found.patterns == math.ceil(0.9 * size))
    assert np.all(found.kind == {1: Kind.SINGLE, 10: Kind.GLOBAL}.get(size, Kind.METASTABLE))


def test_masks_say_how_many_are_all():
    weights = jnp.asarray([[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    mask = jnp.asarray([[True, True, True, False, False], [False] * 5, [False, False, True, False, False]])
    found = type_of(weights, mask=mask)
    np.testing.assert_array_equal(found.kind, [Kind.GLOBAL, Kind.NONE, Kind.SINGLE])
    np.testing.assert_array_equal(found.available, [3, 0, 1])
    np.testing.assert_array_equal(found.size, [3, 0, 1])
    np.testing.assert_array_equal(found.patterns, [3, 0, 1])
    np.testing.assert_array_equal(found.support[1], 0)
    # Without the mask three of five are not all.
    np.testing.assert_array_equal(type_of(weights).kind, [Kind.METASTABLE, Kind.NONE, Kind.SINGLE])


def clusters(rng, groups=4, members=5, features=8, radius=3.0):
    points = (np.eye(groups, features)[:, None] + 0.1 * rng.normal(size=(groups, members, features))).reshape(
        -1, features
    )
    return jnp.asarray(radius * points / np.linalg.norm(points, axis=-1, keepdims=True), jnp.float32)


@pytest.mark.slow
def test_beta_decides_the_type_of_the_fixed_point(rng):
    stored = clusters(rng)
    reach = functools.partial(rest_of, stored, stored)
    for beta, kind, size in ((0.02, Kind.GLOBAL, 20), (1.0, Kind.METASTABLE, 5), (1000.0, Kind.SINGLE, 1)):
        found = reach(beta=beta)
        assert np.all(found.type.kind == kind), beta
        assert np.all(found.type.size == size)
        assert np.all(found.settled)
        assert np.all(found.slope < 1)  # all of them are minima
        np.testing.assert_allclose(update(found.state, stored, beta=beta), found.state, atol=1e-4)
    # Negative control: the same states before they are at rest are of another type.
    assert not np.all(type_of(association(0.05 * stored, stored, beta=1.0)).size == 5)


def test_heads_and_batches_are_classified_apart(rng):
    stored = jnp.stack([clusters(rng)] * 3)[None]
    mask = jnp.ones((1, 3, 20, 20), bool).at[:, 1, :, 10:].set(False)
    found = rest_of(stored, stored, beta=jnp.asarray([[0.02, 0.02, 1000.0]]), mask=mask)
    np.testing.assert_array_equal(found.type.size[0, :, 0], [20, 10, 1])
    np.testing.assert_array_equal(found.type.kind[0, :, 0], [Kind.GLOBAL, Kind.GLOBAL, Kind.SINGLE])


def test_equal_patterns_share_a_metastable_state_at_any_beta(rng):
    points = sphere(rng, 19, 8, radius=3.0)
    stored = jnp.concatenate([points, points[:1]])
    for beta in (10.0, 1e3, 1e6):
        found = rest_of(stored, stored, beta=beta)
        np.testing.assert_array_equal(found.type.size, [2, *[1] * 18, 2])
        np.testing.assert_array_equal(found.type.kind[0], Kind.METASTABLE)
        np.testing.assert_allclose(found.state, stored, atol=1e-3)


def test_a_state_between_two_patterns_rests_on_a_saddle():
    stored = jnp.asarray([[2.0, 0.0], [-2.0, 0.0], [0.0, 9.0]])
    found = rest_of(
        jnp.asarray([[0.0, 0.0], [1e-3, 0.0]]), stored, beta=1.0, mask=jnp.asarray([[True, True, False]] * 2)
    )
    assert found.slope[0] == pytest.approx(4.0, abs=1e-4)  # beta times the variance of +-2
    assert found.type.kind[0] == Kind.GLOBAL
    # A thousandth beside it leads away, to a minimum.
    assert found.slope[1] < 1
    assert found.type.kind[1] == Kind.SINGLE


def test_a_fully_masked_state_is_of_no_type(rng):
    state, stored = sphere(rng, 2, 2), sphere(rng, 3, 2, radius=0.5)
    found = rest_of(state, stored, beta=1.0, mask=jnp.asarray([[True] * 3, [False] * 3]))
    np.testing.assert_array_equal(found.type.kind, [Kind.GLOBAL, Kind.NONE])
    assert found.energy[1] == 0
    assert found.slope[1] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_slope_is_that_of_the_jacobian_and_below_its_bound(rng):
    stored, beta = np.asarray(sphere(rng, 3, 6, 4, radius=4.0), np.float64), 0.7
    query = stored + 0.1 * rng.normal(size=stored.shape)
    with jax.enable_x64(True):
        weights = association(jnp.asarray(query), jnp.asarray(stored), beta=beta)
        slopes = update_slope(weights, jnp.asarray(stored), beta=beta)
        jacobians = jax.vmap(
            jax.vmap(jax.jacobian(lambda xi, x: update(xi[None], x, beta=beta)[0]), (0, None)), (0, 0)
        )(jnp.asarray(query), jnp.asarray(stored))
        np.testing.assert_allclose(slopes, np.linalg.norm(jacobians, 2, axis=(-2, -1)), rtol=1e-9)
        found = jax.device_get(retrieval_errors(jnp.asarray(query), jnp.asarray(stored), beta=beta))
        slopes = np.asarray(slopes)
    # Eq. 7 is Eq. 8 times beta N M.
    assert np.all(slopes <= beta * 6 * 4.0 * found.bound)


# Errors of one update. ------------------------------------------------------------------------------------------------


def test_measured_errors_equal_the_twin_and_stay_below_the_bound(rng):
    stored = np.asarray(sphere(rng, 2, 40, 6, radius=5.0))
    query = stored + np.asarray(sphere(rng, 2, 40, 6, radius=0.1))
    found = jax.device_get(retrieval_errors(jnp.asarray(query), jnp.asarray(stored), beta=1.0))
    for b in range(2):
        for i in range(40):
            others = np.delete(stored[b], i, axis=0)
            np.testing.assert_allclose(
                found.separation[b, i], (stored[b, i] @ (stored[b, i] - others).T).min(), rtol=1e-3
            )
            error = np.linalg.norm(twin_update(query[b, i], stored[b].astype(np.float64), 1.0) - stored[b, i])
            np.testing.assert_allclose(found.error[b, i], error, atol=1e-4)
    np.testing.assert_allclose(found.distance, 0.1, rtol=1e-3)
    assert np.all(found.error <= found.bound + 1e-5)
    assert np.any(found.bound < 5.0)  # and the bound says something
    # The error falls with the separation, as the bound does; with shuffled patterns both are of another pattern.
    order = np.corrcoef(found.separation.ravel(), np.log(found.error.ravel()))[0, 1]
    assert order < -0.8
    shuffled = retrieval_errors(jnp.asarray(np.roll(query, 1, axis=1)), jnp.asarray(stored), beta=1.0)
    assert np.all(shuffled.error.mean() > 20 * found.error.mean())


def test_the_bound_needs_the_distance_of_the_query():
    pair = jnp.asarray([[2.0, 0.0], [-2.0, 0.0]])
    query = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
    found = retrieval_errors(query, pair, beta=1.0)
    assert np.all(found.error <= found.bound)
    assert np.all(found.error > retrieval_errors(pair, pair, beta=1.0).bound)


# Heads. ---------------------------------------------------------------------------------------------------------------


def sown(*heads, steps=None):
    """Return intermediates of a layer whose heads have the given associations `[batch, states, patterns]`."""
    layer = {"association": (jnp.stack([jnp.asarray(h, jnp.float32) for h in heads], axis=1),)}
    if steps is not None:
        layer["steps"] = (jnp.broadcast_to(steps, layer["association"][0].shape[:-1]),)
    return {"block": {"memory": layer}}


def test_uniform_paired_and_one_hot_heads_are_told_apart():
    uniform = np.full((3, 4, 64), 1 / 64)
    one_hot = np.broadcast_to(np.eye(64)[:4], (3, 4, 64))
    pair = (one_hot + np.roll(one_hot, 1, axis=-1)) / 2
    table = analyse_heads({"intermediates": sown(uniform, pair, one_hot, steps=3)})
    assert [row.layer for row in table] == ["block/memory"] * 3
    assert [row.head for row in table] == [0, 1, 2]
    assert [row.patterns for row in table] == [58, 2, 1]
    assert [row.operating_class for row in table] == ["I", "IV", "IV"]
    assert [row.average for row in table] == [1, 0, 0]
    assert [row.metastable for row in table] == [0, 1, 0]
    assert [row.single for row in table] == [0, 0, 1]
    np.testing.assert_allclose([row.entropy for row in table], np.log([64, 2, 1]), atol=1e-5)
    assert {row.steps for row in table} == {3.0}
    assert {row.states for row in table} == {12}


@pytest.mark.parametrize(
    ("patterns", "available", "expected"),
    [
        *((257, 512, "I"), (256, 512, "II"), (65, 512, "II"), (64, 512, "III"), (17, 512, "III"), (16, 512, "IV")),
        *((1, 8, "IV"), (2, 16, "III"), (1, 1, "IV"), (9, 16, "I")),
    ],
)
def test_classes_are_those_of_the_paper(patterns, available, expected):
    assert operating_class(patterns, available) == expected


def test_quartiles_and_medians_are_those_of_the_twin(rng):
    weights = rng.dirichlet(np.full(40, 0.2), size=(5, 2, 7))
    for head, row in enumerate(analyse_heads(sown(weights[:, 0], weights[:, 1]))):
        sizes = [twin_type(p, np.ones(40, bool))[3] for p in weights[:, head].reshape(-1, 40)]
        assert (*row.quartiles, row.patterns) == tuple(np.quantile(sizes, (0.25, 0.75, 0.5)))
        assert row.share == pytest.approx(np.median(sizes) / 40)


def test_padding_counts_neither_as_pattern_nor_as_state():
    weights = np.zeros((2, 3, 8))
    weights[0, :, :4] = 1 / 4
    weights[1] = 1 / 8
    weights[1, 2] = np.eye(8)[0]
    keys = jnp.arange(8) < jnp.asarray([[4], [8]])
    states = jnp.asarray([[True] * 3, [True, True, False]])
    (row,) = analyse_heads(sown(weights), key_mask=keys, state_mask=states)
    assert (row.average, row.states, row.available) == (1, 5, 4)
    assert row.operating_class == "I"
    assert analyse_heads(sown(weights), key_mask={"block/memory": keys}, state_mask=states) == (row,)
    # Negative control: unmasked, four of eight patterns are a metastable state and the padded state counts.
    (wrong,) = analyse_heads(sown(weights))
    assert wrong.states == 6
    assert wrong.average < 0.5
    (nothing,) = analyse_heads(sown(np.zeros((2, 3, 8))))
    assert (nothing.states, nothing.operating_class) == (0, "")


class Twice(nn.Module):
    """Two layers, of which one is called twice."""

    @nn.compact
    def __call__(self, x):
        memory = Hopfield(num_heads=2, update_steps=4, beta=0.0, name="memory")
        return HopfieldClassifier(2, 8, HopfieldLayer(Hopfield(num_heads=4), 5), depth=1)(memory(memory(x))[..., 0, :])


def test_every_layer_of_a_model_is_found(rng):
    x = jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32)
    model = Twice()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    _, updates = jax.jit(functools.partial(model.apply, mutable="intermediates"))({"params": params}, x)
    table = analyse_heads(updates)
    assert [(row.layer, row.call, row.head) for row in table] == [
        *(("HopfieldClassifier_0/memory_0/hopfield", 0, head) for head in range(4)),
        *(("memory", call, head) for call in range(2) for head in range(2)),
    ]
    for row in table[4:]:  # beta = 0 averages all
        assert (row.average, row.operating_class, row.steps, row.available) == (1.0, "I", 4.0, 6.0)
    assert {row.available for row in table[:4]} == {5.0}


# What is refused. -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
def test_what_does_not_fit_is_refused(rng):
    x, empty = jnp.ones((3, 4)), jnp.ones((0, 4))
    calls = {
        energy_along: {"steps": 2},
        fixed_point_type: {},
    }
    for function, keywords in calls.items():
        with pytest.raises(ValueError, match=r"patterns=0 must be at least 1, since an empty memory has no energy"):
            function(x, empty, beta=1.0, **keywords)
        for beta in (0.0, -1, math.inf, math.nan):
            with pytest.raises(ValueError, match=r"beta=.* must be positive and finite; set beta"):
                function(x, x, beta=beta, **keywords)
        with pytest.raises(ValueError, match=r"4 features and stored patterns 5, which must be equal"):
            function(x, jnp.ones((3, 5)), beta=1.0, **keywords)
    for function in (proven_radius, basin_radius, functools.partial(retrieval_errors, x)):
        with pytest.raises(ValueError, match=r"beta=0 must be positive"):
            function(x, beta=0)
    for function in (proven_radius, basin_radius):
        with pytest.raises(ValueError, match=r"patterns=1 must be at least 2"):
            function(x[:1], beta=1.0)
    with pytest.raises(ValueError, match=r"steps=-1 must be at least 0"):
        energy_along(x, x, beta=1.0, steps=-1)
    with pytest.raises(ValueError, match=r"query of shape \(2, 4\) must be that of the patterns, \(3, 4\)"):
        retrieval_errors(x[:2], x, beta=1.0)
    with pytest.raises(ValueError, match=r"mass=1.5 must be in \(0, 1\]"):
        association_type(x, mass=1.5)
    with pytest.raises(ValueError, match=r"patterns=0 must be at least 1; store"):
        association_type(jnp.ones((3, 0)))
    with pytest.raises(ValueError, match=r"directions=0 must be at least 1; set directions"):
        basin_radius(x, beta=1.0, directions=0)


@pytest.mark.usefixtures("untyped")
def test_heads_refuse_what_is_out_of_range():
    with pytest.raises(ValueError, match=r"patterns=5 must be positive and at most available=4"):
        operating_class(5, 4)
    with pytest.raises(ValueError, match=r"no association was sown"):
        analyse_heads({"intermediates": {"dense": {"kernel": jnp.ones(2)}}})
    with pytest.raises(ValueError, match=r"key_mask names 'memory', which must be one of \['block/memory'\]"):
        analyse_heads(sown(np.full((2, 3, 4), 0.25)), key_mask={"memory": jnp.ones((2, 4), bool)})
    with pytest.raises(ValueError, match=r"key_mask of shape \(2, 5\) must fit the association \(2, 1, 3, 4\)"):
        analyse_heads(sown(np.full((2, 3, 4), 0.25)), key_mask=jnp.ones((2, 5), bool))
    with pytest.raises(ValueError, match=r"state_mask of dtype float32 must be bool"):
        analyse_heads(sown(np.full((2, 3, 4), 0.25)), state_mask=jnp.ones((2, 3)))
