"""Basins and capacity against NumPy twins, the theorems they measure, and variants that must fail."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.hopfield.capacity import (
    basin_radius,
    capacity_exponent,
    classical_capacity,
    fit_growth,
    mean_field_capacity,
    measure_capacity,
    proven_radius,
)
from jaxlayers.hopfield.diagnostics import retrieval_errors
from jaxlayers.hopfield.hopfield import association, retrieve

settle = jax.jit(functools.partial(retrieve, update_steps=60))


def sphere(rng, *shape, radius=1.0, dtype=jnp.float32):
    points = rng.normal(size=shape)
    return jnp.asarray(radius * points / np.linalg.norm(points, axis=-1, keepdims=True), dtype)


# Basins. --------------------------------------------------------------------------------------------------------------


def settles_there(stored, index, start, beta):
    end = settle(start, stored, beta=beta).state
    weights = np.asarray(association(end, stored, beta=beta))
    return np.all(np.argmax(weights, axis=-1) == index) and np.all(weights.max(axis=-1) > 0.75)


def test_states_inside_the_proven_radius_always_retrieve_and_outside_of_the_measured_one_not(rng):
    stored, beta = sphere(rng, 12, 6, radius=4.0), 2.0
    proven = jax.device_get(proven_radius(stored, beta=beta))
    basin = jax.device_get(basin_radius(stored, beta=beta))
    distance = np.linalg.norm(np.asarray(stored)[:, None] - np.asarray(stored), axis=-1) + 1e9 * np.eye(12)
    sure = np.flatnonzero(proven.sphere)
    assert len(sure) >= 6
    for i in sure:
        for radius in (proven.sphere[i], 0.999 * proven.widest[i]):
            assert settles_there(stored, i, stored[i] + sphere(rng, 100, 6, radius=float(radius)), beta)
        # Negative control: a little more than halfway to the nearest other pattern it is another that is reached.
        nearest = int(np.argmin(distance[i]))
        assert not settles_there(stored, i, 0.48 * stored[i : i + 1] + 0.52 * stored[nearest], beta)
        assert basin.smallest[i] < 0.52 * distance[i, nearest]
    assert np.all(proven.sphere <= proven.widest)
    assert np.all(proven.widest[sure] < basin.smallest[sure])
    assert np.all(proven.widest <= basin.smallest)
    assert np.all(basin.smallest <= basin.median)


def test_basin_of_a_pair_ends_halfway():
    # By symmetry the edge lies halfway between two patterns of equal length, and no direction comes nearer to it.
    stored = jnp.asarray([[3.0, 0.0], [0.0, 3.0]])
    found = basin_radius(stored, beta=2.0, bisections=16)
    np.testing.assert_allclose(found.smallest, 3 / math.sqrt(2), rtol=1e-3)
    assert np.all(proven_radius(stored, beta=2.0).widest < found.smallest)


def test_proven_radius_solves_its_equation(rng):
    with jax.enable_x64(True):
        stored, beta = sphere(rng, 2, 10, 8, radius=5.0, dtype=jnp.float64), 1.5
        found = jax.device_get(proven_radius(stored, beta=beta))
        gaps = np.asarray(retrieval_errors(stored, stored, beta=beta).separation)
    some = found.widest > 0
    assert some.any()
    reached = 2 * 9 * 5.0 * np.exp(-beta * (gaps - 2 * 5.0 * found.widest))  # h(r) = r, at its upper solution
    np.testing.assert_allclose(reached[some], found.widest[some], rtol=1e-9)
    assert np.all(found.widest[some] > 1 / (2 * beta * 5.0))
    assert np.all(found.widest < gaps / (2 * 5.0))
    assert np.all((beta * gaps > 1 + np.log(4 * 9 * beta * 25))[some])
    np.testing.assert_allclose(found.sphere[found.sphere > 0], 1 / (beta * 10 * 5.0))


def test_nothing_is_proved_of_patterns_that_share_a_fixed_point(rng):
    points = sphere(rng, 5, 8, radius=3.0)
    doubled = jnp.concatenate([points, points[:1]])
    for array in jax.tree.leaves((proven_radius(doubled, beta=4.0), basin_radius(doubled, beta=4.0))):
        np.testing.assert_array_equal(np.asarray(array)[[0, 5]], 0)
    # At a tiny beta all states are near the mean; spheres as large as everything would not be about single patterns.
    for array in jax.tree.leaves((proven_radius(points, beta=1e-3), basin_radius(points, beta=1e-3))):
        np.testing.assert_array_equal(array, 0)


def test_basins_of_a_batch_are_those_of_its_elements(rng):
    stored = jnp.stack([sphere(rng, 4, 3, radius=2.0), sphere(rng, 4, 3, radius=5.0)])
    both = basin_radius(stored, beta=2.0, directions=1)
    for b in range(2):
        # One direction: that to the nearest other pattern, nothing random.
        alone = basin_radius(stored[b], beta=2.0, directions=1)
        np.testing.assert_allclose(both.smallest[b], alone.smallest, atol=1e-5)


# Capacity. ------------------------------------------------------------------------------------------------------------

SMALL = {"beta": 1.0, "radius_factor": 1.0, "queries": 64, "chunk": 512}


def twin_fraction(patterns, error):
    """The share of patterns that one update brings to within `error` times their length, all sums at once."""
    logits = patterns @ patterns.T
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    recalled = weights @ patterns / weights.sum(axis=-1, keepdims=True)
    return np.mean(np.linalg.norm(recalled - patterns, axis=-1) <= error * np.linalg.norm(patterns[0]))


@pytest.fixture(scope="module")
def capacities():
    return {d: measure_capacity(d, draws=3, seed=1, **SMALL) for d in (6, 8, 10, 12, 14)}


def test_capacity_is_where_other_random_patterns_begin_to_fail(rng, capacities):
    # Independent patterns, drawn and summed by NumPy: half as many pass, twice as many do not.
    for d in (8, 12):
        count = int(np.median(capacities[d].patterns))
        radius = math.sqrt(d - 1)
        shares = [
            np.mean([twin_fraction(np.asarray(sphere(rng, n, d, radius=radius), np.float64), 0.1) for _ in range(8)])
            for n in (max(2, count // 2), 2 * count)
        ]
        assert shares[0] > 0.5 > shares[1]


def test_capacity_grows_exponentially_and_the_classical_one_linearly(capacities):
    widths = list(capacities)
    found = fit_growth(widths, [np.exp(np.mean(np.log(c.patterns))) for c in capacities.values()])
    assert found.exponential_residual < 0.15
    assert found.exponential_residual < 0.5 * found.power_residual
    assert found.exponential_residual < 0.1 * found.linear_residual
    assert found.slope > 10 * found.slope_error
    assert 0.8 < found.slope / capacity_exponent(beta=1.0, radius_factor=1.0) < 1.25
    control = fit_growth(widths, [10 * classical_capacity(d) for d in widths])
    assert control.linear_residual < 1e-9 < 0.02 < control.exponential_residual


def test_mean_field_capacity_is_met_by_measurements(capacities):
    for d, found in capacities.items():
        assert not found.limited
        expected = mean_field_capacity(d, beta=1.0, radius_factor=1.0)
        assert 0.4 < np.median(found.patterns) / expected < 1.3
    ratio = mean_field_capacity(401, beta=1.0, radius_factor=1.0) / mean_field_capacity(
        400, beta=1.0, radius_factor=1.0
    )
    assert math.log(ratio) == pytest.approx(capacity_exponent(beta=1.0, radius_factor=1.0), rel=0.01)
    assert mean_field_capacity(20, beta=1e6, radius_factor=1.0) == math.inf  # others like the pattern do no harm


def test_capacity_falls_with_noise_and_with_the_proofs_condition(capacities):
    noisy = measure_capacity(12, draws=1, seed=1, noise=0.5, **SMALL)
    assert noisy.patterns[0] < 0.7 * capacities[12].patterns[0]
    strict = measure_capacity(12, draws=1, seed=1, criterion="separated", **SMALL)
    assert 1 <= strict.patterns[0] < 0.2 * capacities[12].patterns[0]


def test_more_can_be_stored_than_theorem_3_proves():
    # At d = 20 the theorem proves 7 patterns with probability 0.999; the proof's own condition holds for more.
    setting = {"radius_factor": 3.0, "beta": 1.0, "draws": 1, "queries": 64, "chunk": 512, "max_patterns": 1024}
    separated = measure_capacity(20, criterion="separated", fraction=1.0, **setting)
    assert separated.proven == pytest.approx(7.4, abs=0.05)
    assert separated.patterns[0] > 2 * separated.proven
    retrieved = measure_capacity(20, **setting)
    assert retrieved.limited
    assert retrieved.patterns == (1024,)


def test_chunks_of_patterns_add_up(capacities):
    # The draw is another, as chunks have their own keys; the number is the same to within its scatter.
    other = measure_capacity(12, draws=3, seed=2, **{**SMALL, "chunk": 64})
    assert abs(np.log(np.mean(other.patterns) / np.mean(capacities[12].patterns))) < 0.2


def test_slope_and_its_error_are_those_of_least_squares(rng):
    widths = np.arange(4.0, 16)
    counts = np.exp(0.7 * widths + 1 + 0.1 * rng.normal(size=12))
    found = fit_growth(widths.tolist(), counts.tolist())
    (slope, intercept), covariance = np.polyfit(widths, np.log(counts), 1, cov=True)
    np.testing.assert_allclose([found.slope, found.intercept], [slope, intercept], rtol=1e-9)
    assert found.slope_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-6)


# What is refused. ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"features": 1}, "features=1 must be at least 2"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"radius_factor": -1.0}, "radius_factor=-1.0 must be positive"),
        ({"error": 1.0}, r"error=1.0 must be in \(0, 1\)"),
        ({"fraction": 0.0}, r"fraction=0.0 must be in \(0, 1\]"),
        ({"noise": -0.1}, "noise=-0.1 must be at least 0"),
        ({"queries": 9, "chunk": 8}, "queries=9 must be in 1 to chunk=8"),
        ({"draws": 0}, "draws=0 must be at least 1"),
        ({"max_patterns": 1}, "max_patterns=1 must be at least 2"),
        ({"resolution": 0.0}, "resolution=0.0 must be positive"),
        ({"criterion": "kept"}, "criterion='kept' must be 'retrieved' or 'separated'"),
    ],
)
def test_capacity_refuses_what_is_out_of_range(keywords, match):
    with pytest.raises(ValueError, match=match):
        measure_capacity(**{"features": 4, "beta": 1.0, "radius_factor": 1.0, **keywords})


@pytest.mark.usefixtures("untyped")
def test_theory_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match="error=2.0 must be"):
        mean_field_capacity(4, beta=1.0, radius_factor=1.0, error=2.0)
    with pytest.raises(ValueError, match=r"beta=1.0 and radius_factor=0.0 must be positive"):
        capacity_exponent(beta=1.0, radius_factor=0.0)
    with pytest.raises(ValueError, match=r"features=0 must be at least 1"):
        classical_capacity(0)
    with pytest.raises(ValueError, match=r"2 widths and 2 capacities must be at least 3 pairs"):
        fit_growth([1, 2], [3, 4])
    with pytest.raises(ValueError, match=r"must be at least 1; leave others out"):
        fit_growth([1, 2, 3], [3, 4, 0])
