"""Sparse and structured memories: energy descent, exact retrieval and where it ends, limits, stored outputs."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.hopfield import hopfield
from jaxlayers.hopfield.fenchel_young import (
    IDENTITY,
    energy,
    exact_retrieval_radius,
    exact_subset_radius,
    is_exact,
    layer_norm,
    retrieve,
    support_size,
    unit_norm,
    update,
)
from jaxlayers.hopfield.hopfield import Hopfield, association, separation
from jaxlayers.ops.entmax import entmax, norm_entropy, sparsemax, subset_entropy, tsallis_entropy

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fenchel_young_parity.npz")
SHANNON, ENTMAX15, SPARSEMAX = tsallis_entropy(1), tsallis_entropy(1.5), tsallis_entropy(2)
ENTROPIES = {
    "softmax": SHANNON,
    "entmax_1.2": tsallis_entropy(1.2),
    "entmax15": ENTMAX15,
    "sparsemax": SPARSEMAX,
    "normmax_2": norm_entropy(2),
    "subsets_3": subset_entropy(3),
}
POSTS = {"identity": IDENTITY, "unit_norm": unit_norm(), "layer_norm": layer_norm(0.5)}
# Beside another of their kind, for the extended suite.
LATER = ("entmax_1.2", "normmax_2")
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in ENTROPIES]
)


def sphere(rng, *shape, radius=1.0):
    points = rng.normal(size=shape)
    return jnp.asarray(radius * points / np.linalg.norm(points, axis=-1, keepdims=True), jnp.float32)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Energy. --------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("name", "post", "wrong"))
def descent(state, stored, *, name, post, wrong=""):
    """Energies along updates, which may be wrong: too long, or without the energy's post-transformation."""
    entropy, post = ENTROPIES[name], POSTS[post]
    other = IDENTITY if wrong == "post" else post

    def step(xi, _):
        new = update(xi, stored, beta=1.5, entropy=entropy, post=other)
        new = 2 * new - 0.5 * xi if wrong == "long" else new
        return new, energy(new, stored, beta=1.5, entropy=entropy, post=post)

    first = energy(state, stored, beta=1.5, entropy=entropy, post=post)
    return jnp.concatenate([first[None], jax.lax.scan(step, state, None, length=10)[1]])


@pytest.mark.parametrize(
    ("name", "post"),
    [*((name, "identity") for name in ENTROPIES if name not in LATER)]
    + [("entmax15", "unit_norm"), ("subsets_3", "layer_norm")]
    + [pytest.param(name, "identity", marks=pytest.mark.slow) for name in LATER]
    + [
        pytest.param(*pair, marks=pytest.mark.slow) for pair in (("entmax15", "layer_norm"), ("subsets_3", "unit_norm"))
    ],
)
def test_energy_never_rises_along_updates(name, post, rng):
    state = POSTS[post].apply(2 * normal(rng, 100, 6))
    trace = np.asarray(descent(state, normal(rng, 12, 6), name=name, post=post))
    assert np.all(np.isfinite(trace))
    rises = np.diff(trace, axis=0)
    assert rises.max() <= 2e-6 * max(1, np.abs(trace).max())
    assert rises[0].max() < 0
    if post == "identity":
        assert trace.min() >= 0


def test_wrong_updates_raise_the_energy(rng):
    state, stored = normal(rng, 100, 6), normal(rng, 12, 6)
    for name in ENTROPIES:
        assert np.diff(descent(state, stored, name=name, post="identity", wrong="long"), axis=0).max() > 0.1
    on_ball = POSTS["unit_norm"].apply(state)
    # States outside the ball have no energy there.
    assert np.isinf(descent(on_ball, stored, name="subsets_3", post="unit_norm", wrong="post")).any()


@every
def test_energy_gradient_is_the_state_minus_its_update(name, rng):
    state, stored = normal(rng, 50, 6), normal(rng, 12, 6)
    arguments = {"beta": 0.7, "entropy": ENTROPIES[name]}
    gradient = jax.jit(jax.grad(lambda xi: jnp.sum(energy(xi, stored, **arguments))))(state)
    np.testing.assert_allclose(gradient, state - update(state, stored, **arguments), atol=1e-5)


@pytest.mark.parametrize("beta", [0.3, 4.0])
def test_shannon_energy_and_update_are_those_of_the_dense_memory(beta, rng):
    state, stored = normal(rng, 2, 5, 6), normal(rng, 2, 9, 6)
    mask = jnp.asarray(rng.random((2, 5, 9)) < 0.6).at[1, 2].set(False)
    for kwargs in ({}, {"mask": mask}):
        found = energy(state, stored, beta=beta, entropy=SHANNON, **kwargs)
        np.testing.assert_allclose(found, hopfield.energy(state, stored, beta=beta, **kwargs), rtol=1e-5, atol=1e-5)
        found = update(state, stored, beta=beta, entropy=SHANNON, **kwargs)
        np.testing.assert_allclose(found, hopfield.update(state, stored, beta=beta, **kwargs), atol=1e-6)


def test_alpha_towards_one_gives_the_dense_memory(rng):
    state, stored = normal(rng, 20, 6), normal(rng, 9, 6)

    @jax.jit
    def both(alpha):
        entropy = tsallis_entropy(alpha)
        arguments = {"beta": 1.0, "entropy": entropy}
        return energy(state, stored, **arguments), retrieve(state, stored, update_steps=5, **arguments).state

    dense = hopfield.energy(state, stored, beta=1.0), hopfield.retrieve(state, stored, beta=1.0, update_steps=5).state
    errors = [[float(jnp.abs(a - b).max()) for a, b in zip(both(1 + x), dense, strict=True)] for x in (0.1, 0.01, 1e-4)]
    assert errors[0][0] > errors[1][0] > errors[2][0]
    assert max(errors[2]) < 2e-3
    np.testing.assert_allclose(both(1.0)[1], dense[1], atol=1e-5)


# Exact retrieval. -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beta"), [("entmax15", 8.0), pytest.param("sparsemax", 4.0, marks=pytest.mark.slow), ("normmax_2", 4.0)]
)
def test_queries_inside_the_radius_are_exact_and_the_nearest_outside_are_not(name, beta, rng):
    entropy, stored = ENTROPIES[name], sphere(rng, 40, 8) * jnp.asarray(rng.uniform(0.8, 1.2, (40, 1)), jnp.float32)
    radius = np.asarray(exact_retrieval_radius(stored, beta=beta, entropy=entropy))
    # Feasible and infeasible patterns both.
    assert 5 < np.sum(radius > 0) < 40
    np.testing.assert_array_equal(radius >= 0, separation(stored) >= entropy.margin / beta)
    largest = float(jnp.max(jnp.linalg.norm(stored, axis=-1)))
    assert np.all(radius[radius > 0] >= ((separation(stored) - entropy.margin / beta) / (2 * largest))[radius > 0])
    weights = association(stored, stored, beta=beta, association_fn=entropy.transform)
    np.testing.assert_array_equal(is_exact(weights) & (jnp.argmax(weights, axis=-1) == jnp.arange(40)), radius >= 0)
    good = np.flatnonzero(radius > 1e-3)
    directions = np.asarray(sphere(rng, len(good), 50, 8))
    queries = np.asarray(stored)[good, None] + 0.999 * radius[good, None, None] * directions
    found = retrieve(jnp.asarray(queries), stored, beta=beta, entropy=entropy)
    assert np.all(is_exact(found.association))
    np.testing.assert_array_equal(found.state, np.broadcast_to(np.asarray(stored)[good, None], queries.shape))
    # Towards the pattern that limits the radius, one step further.
    x = np.asarray(stored, np.float64)
    away = x[:, None] - x[None]
    norms = np.linalg.norm(away, axis=-1) + np.eye(40)
    ratio = (np.einsum("id,ijd->ij", x, away) - entropy.margin / beta) / norms + np.where(np.eye(40) > 0, np.inf, 0)
    limit = np.argmin(ratio, axis=-1)
    worst = -(away / norms[..., None])[good, limit[good]]
    for factor, exact in ((0.999, True), (1.01, False)):
        queries = jnp.asarray(x[good] + factor * radius[good, None] * worst, jnp.float32)
        assert np.all(is_exact(association(queries, stored, beta=beta, association_fn=entropy.transform)) == exact)


def test_no_pattern_is_exact_under_shannon_entropy_and_one_alone_always_is(rng):
    stored = sphere(rng, 5, 8, radius=3.0)
    assert np.all(exact_retrieval_radius(stored, beta=1.0, entropy=SHANNON) == -np.inf)
    assert not np.any(is_exact(association(stored, stored, beta=1.0)))
    assert exact_retrieval_radius(stored[:1], beta=1.0, entropy=SPARSEMAX) == np.inf


@functools.partial(jax.jit, static_argnames=("name", "update_steps"))
def recall(query, stored, *, beta, name, update_steps=1):
    return retrieve(query, stored, beta=beta, entropy=ENTROPIES[name], update_steps=update_steps)


@pytest.mark.parametrize(
    ("name", "patterns", "beta", "least", "most"),
    [
        ("softmax", 256, 2.0, 0, 0),
        ("softmax", 256, 8.0, 0, 0),
        ("entmax15", 256, 2.0, 0, 0.01),
        ("entmax15", 256, 8.0, 1, 1),
        ("sparsemax", 4096, 2.0, 0.8, 0.99),
        ("sparsemax", 4096, 8.0, 1, 1),
    ],
)
def test_phases_of_exact_retrieval(name, patterns, beta, least, most, rng):
    # Unit patterns of width 64; queries 0.3 away from a pattern.
    stored = sphere(rng, patterns, 64)
    query = stored[:200] + sphere(rng, 200, 64, radius=0.3)
    for update_steps in (1, 10):
        state = recall(query, stored, beta=beta, name=name, update_steps=update_steps).state
        assert least <= float(jnp.mean(jnp.all(state == stored[:200], axis=-1))) <= most


def test_softmax_comes_near_at_a_larger_beta_but_is_never_exact(rng):
    stored = sphere(rng, 256, 64)
    query = stored[:200] + sphere(rng, 200, 64, radius=0.3)
    state = recall(query, stored, beta=16.0, name="softmax").state
    assert jnp.max(jnp.linalg.norm(state - stored[:200], axis=-1)) < 0.01
    assert not jnp.any(jnp.all(state == stored[:200], axis=-1))


def test_equal_patterns_share_and_are_not_told_apart(rng):
    stored = sphere(rng, 6, 8).at[1].set(jnp.eye(8)[0]).at[4].set(jnp.eye(8)[0])
    for entropy in (ENTMAX15, SPARSEMAX, norm_entropy(2)):
        found = retrieve(stored[1:2], stored, beta=20.0, entropy=entropy)
        np.testing.assert_array_equal(found.association[0], [0, 0.5, 0, 0, 0.5, 0])
        np.testing.assert_array_equal(found.state[0], stored[1])
        assert not is_exact(found.association)[0]
        assert support_size(found.association)[0] == 2
        radius = exact_retrieval_radius(stored, beta=20.0, entropy=entropy)
        np.testing.assert_array_equal(radius < 0, [False, True, False, False, True, False])
    both = retrieve(stored[1:2], stored, beta=20.0, entropy=subset_entropy(2))
    np.testing.assert_array_equal(both.association[0], [0, 1, 0, 0, 1, 0])


# Subsets. -------------------------------------------------------------------------------------------------------------


def test_subsets_are_retrieved_at_once_inside_their_radius_and_not_outside(rng):
    stored, entropy, beta = sphere(rng, 12, 32), subset_entropy(3), 4.0
    members = np.zeros((20, 12), bool)
    for row in members:
        row[rng.choice(12, 3, replace=False)] = True
    radius = np.asarray(exact_subset_radius(stored, jnp.asarray(members), beta=beta, entropy=entropy))
    sums = jnp.asarray(members, jnp.float32) @ stored
    weights = association(sums, stored, beta=beta, association_fn=entropy.transform)
    right = np.all(np.asarray(weights) == members, axis=-1)
    np.testing.assert_array_equal(right, radius >= 0)
    good = np.flatnonzero(radius > 1e-3)
    assert 3 < len(good) < 20
    x, s = np.asarray(stored, np.float64), np.asarray(sums, np.float64)
    for row in good:
        pairs = [(i, j) for i in np.flatnonzero(members[row]) for j in np.flatnonzero(~members[row])]
        reach = [(s[row] @ (x[i] - x[j]) - 1 / beta) / np.linalg.norm(x[i] - x[j]) for i, j in pairs]
        np.testing.assert_allclose(radius[row], min(reach), atol=1e-5)
        i, j = pairs[int(np.argmin(reach))]
        worst = (x[j] - x[i]) / np.linalg.norm(x[i] - x[j])
        queries = jnp.asarray(s[row] + np.asarray([[0.99], [1.01]]) * radius[row] * worst, jnp.float32)
        weights = np.asarray(association(queries, stored, beta=beta, association_fn=entropy.transform))
        np.testing.assert_array_equal(weights[0], members[row])
        assert np.any(weights[1] != members[row])


def test_subsets_of_one_are_the_sparsemax_memory(rng):
    state, stored = normal(rng, 20, 6), normal(rng, 9, 6)
    one = subset_entropy(1)
    found = retrieve(state, stored, beta=0.5, entropy=one, update_steps=4).state
    np.testing.assert_allclose(
        found, retrieve(state, stored, beta=0.5, entropy=SPARSEMAX, update_steps=4).state, atol=1e-5
    )
    np.testing.assert_allclose(
        energy(state, stored, beta=0.5, entropy=one), energy(state, stored, beta=0.5, entropy=SPARSEMAX), atol=1e-5
    )
    members = jnp.eye(9, dtype=bool)
    np.testing.assert_allclose(
        exact_subset_radius(stored, members, beta=2.0, entropy=one),
        exact_retrieval_radius(stored, beta=2.0, entropy=SPARSEMAX),
        atol=1e-5,
    )


# Layers, gradients, degenerate input. ---------------------------------------------------------------------------------


def test_layers_run_these_memories(rng):
    x = normal(rng, 2, 5, 8)
    layer = Hopfield(num_heads=2, beta=30.0, update_steps=2, association_fn=sparsemax)
    output, variables = layer.init_with_output(jax.random.key(0), x)
    _, state = layer.apply(variables, x, mutable="intermediates")
    weights = state["intermediates"]["association"][0]
    assert output.shape == x.shape
    assert np.mean(weights == 0) > 0.3
    gradient = jax.grad(lambda v: jnp.sum(jnp.square(layer.apply(v, x))))(variables)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_gradients_of_a_fixed_point_reach_alpha(rng):
    state, stored = normal(rng, 4, 6), normal(rng, 9, 6)

    @jax.jit
    def settled(alpha):
        fn = functools.partial(entmax, alpha=alpha)
        found = hopfield.retrieve(state, stored, beta=0.2, update_steps=200, tolerance=1e-7, association_fn=fn)
        return jnp.sum(found.state[:, 0])

    slope = jax.grad(settled)(1.3)
    difference = (settled(1.32) - settled(1.28)) / 0.04
    np.testing.assert_allclose(slope, difference, rtol=2e-2)
    assert abs(slope) > 1e-2


@every
def test_masked_patterns_count_as_absent_and_states_that_may_retrieve_nothing_are_zero(name, rng):
    entropy, state, stored = ENTROPIES[name], normal(rng, 3, 6), normal(rng, 5, 6)
    mask = jnp.asarray([[True] * 5, [False] * 5, [True, False, True, True, True]])
    fn = jax.jit(
        lambda xi: (
            energy(xi, stored, beta=2.0, entropy=entropy, mask=mask),
            update(xi, stored, beta=2.0, entropy=entropy, mask=mask),
        )
    )
    energies, updated = fn(state)
    kept = np.asarray([0, 2, 3, 4])
    expected = energy(state[2:], stored[kept], beta=2.0, entropy=entropy)
    np.testing.assert_allclose(energies[2:], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(energies[1], 0.5 * jnp.sum(state[1] ** 2), rtol=1e-6)
    assert np.all(updated[1] == 0)
    gradient = jax.jit(jax.grad(lambda xi: jnp.sum(fn(xi)[0]) + jnp.sum(fn(xi)[1])))(state)
    assert np.all(np.isfinite(gradient))


@every
def test_beta_zero_averages_all_patterns(name, rng):
    entropy, state, stored = ENTROPIES[name], normal(rng, 3, 6), normal(rng, 5, 6)
    found = update(state, stored, beta=0, entropy=entropy)
    expected = entropy.total * jnp.broadcast_to(stored.mean(axis=0), (3, 6))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_post_transformations(rng):
    x = normal(rng, 4, 6).at[3].set(0)
    np.testing.assert_allclose(jnp.linalg.norm(unit_norm(2.0).apply(x), axis=-1), [2, 2, 2, 0], rtol=1e-6)
    normed = layer_norm(2.0).apply(x)
    np.testing.assert_allclose(normed.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(normed.std(axis=-1), [2, 2, 2, 0], rtol=1e-5)
    assert np.all(layer_norm(2.0).potential(normed) == 0)
    assert np.all(layer_norm(1.9).potential(normed[:3]) == np.inf)
    assert np.all(unit_norm(2.0).potential(unit_norm(2.0).apply(x)) == 0)
    found = retrieve(x, x[:3], beta=2.0, entropy=SPARSEMAX, post=unit_norm(), update_steps=3)
    assert np.all(found.steps == 3)
    np.testing.assert_allclose(jnp.linalg.norm(found.state, axis=-1), 1, atol=1e-6)


def test_half_precision_memories_are_finite(rng):
    state, stored = normal(rng, 4, 6).astype(jnp.bfloat16), 50 * normal(rng, 5, 6).astype(jnp.bfloat16)
    for entropy in ENTROPIES.values():
        found = energy(state, stored, beta=2.0, entropy=entropy)
        assert found.dtype == jnp.float32
        assert np.all(np.isfinite(found))
        assert np.all(np.isfinite(retrieve(state, stored, beta=2.0, entropy=entropy, update_steps=3).state))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda q, x: energy(q, x[:, :3], beta=1.0, entropy=SPARSEMAX), "6 features and stored patterns 3"),
        (lambda q, x: energy(q, x[:0], beta=1.0, entropy=SPARSEMAX), "patterns=0 must be at least 1"),
        (lambda q, x: update(q, x[:0], beta=1.0, entropy=SPARSEMAX), "patterns=0 must be at least 1"),
        (lambda q, x: energy(q, x, beta=0, entropy=SPARSEMAX), "beta=0 must be positive"),
        (lambda q, x: update(q, x, beta=-1.0, entropy=SPARSEMAX), "beta=-1.0 must be .*at least 0"),
        (lambda q, x: exact_retrieval_radius(x, beta=-2.0, entropy=SPARSEMAX), "beta=-2.0 must be positive"),
        (lambda q, x: exact_retrieval_radius(x, beta=1.0, entropy=subset_entropy(2)), "entropy.total=2 must be 1"),
        (
            lambda q, x: exact_subset_radius(x, jnp.ones((1, 4), bool), beta=1.0, entropy=subset_entropy(4)),
            "members for 4 patterns must be for the 5 stored",
        ),
        (
            lambda q, x: retrieve(q, x, beta=1.0, entropy=SPARSEMAX, post=unit_norm(), tolerance=0.1),
            "tolerance=0.1 must be None",
        ),
        (
            lambda q, x: retrieve(q, x, beta=1.0, entropy=SPARSEMAX, post=unit_norm(), update_steps=0),
            "update_steps=0 must be at least 1",
        ),
        (lambda q, x: retrieve(q, x, beta=1.0, entropy=SPARSEMAX, update_steps=0), "update_steps=0 must be at least 1"),
        (lambda q, x: unit_norm(0.0), "radius=0.0 must be positive"),
        (lambda q, x: layer_norm(-1.0), "scale=-1.0 must be positive"),
    ],
)
def test_wrong_arguments_are_refused(call, match, untyped):
    with pytest.raises(ValueError, match=match):
        call(jnp.ones((2, 6)), jnp.ones((5, 6)))


# Stored outputs of the reference code. --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entropy"), [("1", SHANNON), ("1.5", ENTMAX15), ("2", SPARSEMAX), ("norm_2", norm_entropy(2))]
)
def test_parity_of_the_energy_with_the_reference(name, entropy):
    found = energy(jnp.asarray(GOLDEN["state"]), jnp.asarray(GOLDEN["stored"]), beta=0.7, entropy=entropy)
    np.testing.assert_allclose(found, GOLDEN[f"energy_{name}"], rtol=1e-5, atol=1e-5)


def test_parity_of_the_energy_on_a_ball_with_the_reference():
    state = 0.5 * unit_norm().apply(jnp.asarray(GOLDEN["state"]))
    found = energy(state, jnp.asarray(GOLDEN["stored"]), beta=0.7, entropy=ENTMAX15, post=unit_norm())
    np.testing.assert_allclose(found, GOLDEN["energy_ball_1.5"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("psi", "post"), [("none", IDENTITY), ("normalization", unit_norm()), ("layer_normalization", layer_norm())]
)
@pytest.mark.parametrize(("omega", "entropy"), [("entmax", ENTMAX15), ("normmax", norm_entropy(2))])
def test_parity_of_six_updates_with_the_reference(omega, entropy, psi, post):
    state, stored = post.apply(jnp.asarray(GOLDEN["state"])), post.apply(jnp.asarray(GOLDEN["stored"]))
    found = retrieve(state, stored, beta=0.7, entropy=entropy, post=post, update_steps=6).state
    # The reference's layer normalisation has an epsilon of 1e-5, on variances of at least 0.1.
    np.testing.assert_allclose(found, GOLDEN[f"retrieved_{omega}_{psi}"], atol=2e-4 if "layer" in psi else 1e-5)
