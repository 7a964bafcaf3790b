"""Modern Hopfield networks against the paper's theorems, a NumPy twin, attention and the stored reference outputs."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlayers.hopfield.hopfield import (
    Hopfield,
    HopfieldBagClassifier,
    HopfieldClassifier,
    HopfieldLayer,
    HopfieldPooling,
    association,
    energy,
    from_reference,
    retrieval_error_bound,
    retrieve,
    separation,
    storage_capacity,
    update,
)
from jaxlayers.testing import BadInput, Case, Orthogonal, Symmetric, Symmetry

# Compiled once for all tests of a shape; beta is traced.
associate, advance, energy_of = jax.jit(association), jax.jit(update), jax.jit(energy)
settle = jax.jit(retrieve, static_argnames=("update_steps", "tolerance"))

GOLDEN = Path(__file__).parents[1] / "golden" / "hopfield_parity.npz"
NO_NORMS = {"state_norm": None, "stored_norm": None, "value_norm": None}
MEMORY = {"projections": (), **NO_NORMS}


def sets(*shapes):
    return lambda rng: tuple(rng.normal(size=shape) for shape in shapes)


def running_sum(x, *_):
    """Order matters to it: the control of every claim about permutations."""
    return jnp.cumsum(x, axis=-2)


def running_mean(x):
    return jnp.mean(jnp.cumsum(x, axis=-2), axis=-2)


SHIFT_OF_LOGITS = "one constant added to all logits of a state leaves their softmax as it is"
CASES = (
    Case(
        name="hopfield_self",
        module=Hopfield(num_heads=2, update_steps=3, learn_beta=True),
        inputs=sets((2, 5, 8)),
        symmetries=(Symmetry(Symmetric(5), ("set",), "set", control=running_sum),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"features=8 must be divisible by num_heads=3; set", module=Hopfield(num_heads=3)),
            BadInput(match=r"update_steps=0 must be at least 1", module=Hopfield(update_steps=0)),
            BadInput(match=r"tolerance=-0.1 must be at least 0", module=Hopfield(update_steps=2, tolerance=-0.1)),
            BadInput(match=r"update_steps=1 must be at least 2 with a tolerance", module=Hopfield(tolerance=0.1)),
            BadInput(match=r"beta=-1.0 must be finite and at least 0", module=Hopfield(beta=-1.0)),
            BadInput(match=r"beta=\(1.0,\) must have one entry", module=Hopfield(num_heads=2, beta=(1.0,))),
            BadInput(match=r"beta=0 must be positive to be learned", module=Hopfield(beta=0, learn_beta=True)),
            BadInput(match=r"num_heads=0 must be at least 1", module=Hopfield(num_heads=0)),
            BadInput(match=r"head_dim=0 must be at least 1", module=Hopfield(head_dim=0)),
            BadInput(match=r"inputs_q has shape \(8,\) and must be", inputs=sets((8,))),
            BadInput(match=r"'keys', which must be one of", module=Hopfield(projections=("keys",))),
        ),
    ),
    Case(
        name="hopfield_attention",
        module=Hopfield(num_heads=2, head_dim=3, value_dim=5, out_features=4),
        inputs=sets((2, 4, 8), (2, 5, 6), (2, 5, 7)),
        symmetries=(
            Symmetry(Symmetric(5), (None, "set", "set"), "scalar", control=lambda q, k, v: running_mean(k)),
            Symmetry(Symmetric(4), ("set", None, None), "set", control=running_sum),
        ),
        leading_axes=True,
        zero_gradients={"^key/bias": SHIFT_OF_LOGITS, "^norm_stored/bias": SHIFT_OF_LOGITS},
        bad_inputs=(
            BadInput(
                match=r"inputs_v has 4 values and inputs_k 5 stored patterns",
                inputs=sets((2, 4, 8), (2, 5, 6), (2, 4, 7)),
            ),
        ),
    ),
    Case(
        name="hopfield_settled",
        module=Hopfield(num_heads=2, update_steps=50, tolerance=1e-6, beta=(0.3, 0.6)),
        inputs=sets((2, 4, 8), (2, 5, 8)),
        symmetries=(Symmetry(Symmetric(5), (None, "set"), "scalar", control=lambda q, k: running_mean(k)),),
        leading_axes=True,
        zero_gradients={"^(query|norm_state)/": "a fixed point does not depend on the state it was reached from"},
        bad_inputs=(
            BadInput(match="update_steps=1 must be at least 2", module=Hopfield(update_steps=1, tolerance=0.0)),
        ),
    ),
    Case(
        name="hopfield_memory",
        within="hopfield_self",
        module=Hopfield(beta=2.0, update_steps=20, tolerance=1e-6, **MEMORY),
        inputs=sets((2, 3, 6), (2, 5, 6)),
        symmetries=(
            Symmetry(
                Orthogonal(6),
                ("vectors", "vectors"),
                "vectors",
                control=lambda q, k: q * jax.nn.softmax(q),
                tolerance64=1e-9,
            ),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"unprojected key patterns have 5 features and must have", inputs=sets((2, 3, 6), (2, 5, 5))
            ),
            BadInput(match=r"value_dim=3 must be the 6 features", module=Hopfield(value_dim=3, **MEMORY)),
            BadInput(
                match=r"out_features=3 must be num_heads \* value_dim=6", module=Hopfield(out_features=3, **MEMORY)
            ),
        ),
    ),
    Case(
        name="hopfield_pooling",
        within="hopfield_bag_classifier",
        module=HopfieldPooling(Hopfield(num_heads=2), num_states=3),
        inputs=sets((2, 5, 8)),
        symmetries=(Symmetry(Symmetric(5), ("set",), "scalar", control=running_mean),),
        leading_axes=True,
        zero_gradients={"key/bias": SHIFT_OF_LOGITS, "norm_stored/bias": SHIFT_OF_LOGITS},
        bad_inputs=(
            BadInput(match="num_states=0 must be at least 1; set num_states", module=HopfieldPooling(Hopfield(), 0)),
            BadInput(
                match="features=8 must be divisible by num_heads=5", module=HopfieldPooling(Hopfield(num_heads=5))
            ),
        ),
    ),
    Case(
        name="hopfield_layer",
        within="hopfield_classifier",
        module=HopfieldLayer(Hopfield(num_heads=2, head_dim=3), num_patterns=5, value_features=3),
        inputs=sets((2, 4, 8)),
        symmetries=(Symmetry(Symmetric(4), ("set",), "set", control=running_sum),),
        leading_axes=True,
        zero_gradients={"key/bias": SHIFT_OF_LOGITS, "norm_stored/bias": SHIFT_OF_LOGITS},
        bad_inputs=(BadInput(match="num_patterns=0 must be at least 1", module=HopfieldLayer(Hopfield(), 0)),),
    ),
    Case(
        name="hopfield_classifier",
        module=HopfieldClassifier(
            3, 8, HopfieldLayer(Hopfield(num_heads=2, learn_beta=True), num_patterns=5, value_features=4)
        ),
        inputs=sets((2, 6)),
        leading_axes=True,
        zero_gradients={"key/bias": SHIFT_OF_LOGITS, "norm_stored/bias": SHIFT_OF_LOGITS},
        bad_inputs=(
            BadInput(
                match="depth=-1 must be at least 0",
                module=HopfieldClassifier(3, 8, HopfieldLayer(Hopfield(), 5), depth=-1),
            ),
            BadInput(
                match="num_classes=-1 must be at least 0",
                module=HopfieldClassifier(-1, 8, HopfieldLayer(Hopfield(), 5)),
            ),
        ),
    ),
    Case(
        name="hopfield_bag_classifier",
        module=HopfieldBagClassifier(3, 8, HopfieldPooling(Hopfield(num_heads=2, update_steps=2), num_states=2)),
        inputs=sets((2, 5, 6)),
        symmetries=(Symmetry(Symmetric(5), ("set",), "scalar", control=running_mean),),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match="features=8 must be divisible by num_heads=3",
                module=HopfieldBagClassifier(3, 8, HopfieldPooling(Hopfield(num_heads=3))),
            ),
        ),
    ),
)


def sphere(rng, *shape, radius=1.0):
    points = rng.normal(size=shape)
    return jnp.asarray(radius * points / np.linalg.norm(points, axis=-1, keepdims=True), jnp.float32)


# The twin: one state at a time, in float64. ---------------------------------------------------------------------------


def twin_association(xi, stored, beta, allowed):
    if not allowed.any():
        return np.zeros(len(stored))
    logits = np.where(allowed, beta * stored @ xi, -np.inf)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def twin_retrieve(xi, stored, beta, allowed, update_steps, tolerance=None):
    weights, count = twin_association(xi, stored, beta, allowed), 1
    while count < update_steps:
        new = twin_association(stored.T @ weights, stored, beta, allowed)
        moved, weights, count = np.linalg.norm(new - weights), new, count + 1
        if tolerance is not None and moved <= tolerance:
            break
    return weights, count


def twin_energy(xi, stored, beta, allowed):
    left = stored[allowed]
    if not len(left):
        return 0.5 * xi @ xi
    lse = np.log(np.sum(np.exp(beta * left @ xi))) / beta
    return -lse + 0.5 * xi @ xi + np.log(len(left)) / beta + 0.5 * max(x @ x for x in left)


@pytest.fixture
def problem(rng):
    """Two batch elements, three states, five patterns; one state may retrieve nothing."""
    state, stored = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
    mask = rng.random(size=(2, 3, 5)) < 0.7
    mask[1, 2] = False
    return state, stored, mask


def as_jax(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) if a.dtype.kind == "f" else jnp.asarray(a) for a in arrays)


@pytest.mark.parametrize("beta", [0.2, 1.0, 4.0])
def test_functions_equal_the_twin(problem, beta):
    state, stored, mask = problem
    found = {
        "association": associate(*as_jax(state, stored), beta=beta, mask=jnp.asarray(mask)),
        "update": advance(*as_jax(state, stored), beta=beta, mask=jnp.asarray(mask)),
        "energy": energy_of(*as_jax(state, stored), beta=beta, mask=jnp.asarray(mask)),
        "separation": separation(*as_jax(stored)),
    }
    found = {name: np.asarray(value) for name, value in found.items()}
    for b in range(2):
        for s in range(3):
            weights = twin_association(state[b, s], stored[b], beta, mask[b, s])
            np.testing.assert_allclose(found["association"][b, s], weights, atol=1e-6)
            np.testing.assert_allclose(found["update"][b, s], stored[b].T @ weights, atol=2e-6)
            expected = twin_energy(state[b, s], stored[b], beta, mask[b, s])
            np.testing.assert_allclose(found["energy"][b, s], expected, rtol=1e-5, atol=1e-5)
        for i in range(5):
            gap = min(stored[b, i] @ (stored[b, i] - stored[b, j]) for j in range(5) if j != i)
            np.testing.assert_allclose(found["separation"][b, i], gap, atol=1e-5)


@pytest.mark.parametrize(("update_steps", "tolerance"), [(1, None), (4, None), (40, 1e-3), (3, 1e-3)])
def test_retrieval_equals_the_twin(problem, update_steps, tolerance):
    state, stored, mask = problem
    steps = {"update_steps": update_steps, "tolerance": tolerance}
    found = jax.device_get(settle(*as_jax(state, stored), beta=0.8, mask=jnp.asarray(mask), **steps))
    for b in range(2):
        for s in range(3):
            weights, count = twin_retrieve(state[b, s], stored[b], 0.8, mask[b, s], **steps)
            np.testing.assert_allclose(found.association[b, s], weights, atol=1e-5)
            np.testing.assert_allclose(found.state[b, s], stored[b].T @ weights, atol=1e-5)
            assert found.steps[b, s] == count


def test_beta_may_differ_between_batch_elements(problem):
    state, stored, _ = as_jax(*problem)
    found = associate(state, stored, beta=jnp.asarray([0.5, 3.0]))
    for index, beta in enumerate((0.5, 3.0)):
        np.testing.assert_allclose(found[index], associate(state, stored, beta=beta)[index], atol=1e-6)


# The theorems. --------------------------------------------------------------------------------------------------------


def energies_along(step, state, stored, beta, steps=12):
    trace = [energy_of(state, stored, beta=beta)]
    for _ in range(steps):
        state = step(state)
        trace.append(energy_of(state, stored, beta=beta))
    return np.diff(np.stack(trace), axis=0)


@pytest.mark.parametrize("beta", [0.1, 1.0, 8.0])
def test_energy_never_rises_along_updates(rng, beta):
    state, stored = jnp.asarray(3 * rng.normal(size=(200, 8))), jnp.asarray(rng.normal(size=(20, 8)))
    rises = energies_along(lambda xi: advance(xi, stored, beta=beta), state, stored, beta)
    assert rises.max() <= 2e-5  # float32 rounding of energies up to 100
    assert rises[0].max() < 0


def test_wrong_updates_raise_the_energy(rng):
    state, stored = jnp.asarray(rng.normal(size=(200, 8))), jnp.asarray(rng.normal(size=(20, 8)))
    twice = energies_along(lambda xi: 2 * advance(xi, stored, beta=1.0) - 0.5 * xi, state, stored, 1.0)
    colder = energies_along(lambda xi: advance(xi, stored, beta=8.0), state, stored, 1.0)
    assert twice.max() > 0.1
    assert colder.max() > 0.1


def test_energy_gradient_is_the_state_minus_its_update(rng):
    state, stored = jnp.asarray(rng.normal(size=(200, 8))), jnp.asarray(rng.normal(size=(20, 8)))
    gradient = jax.jit(jax.grad(lambda xi: jnp.sum(energy(xi, stored, beta=0.7))))(state)
    np.testing.assert_allclose(gradient, state - advance(state, stored, beta=0.7), atol=1e-5)


def test_energy_lies_between_zero_and_twice_the_largest_square(rng):
    stored = jnp.asarray(rng.normal(size=(20, 8)))
    mixtures = jnp.asarray(rng.dirichlet(np.full(20, 0.2), size=200)) @ stored
    found = np.asarray(energy_of(mixtures, stored, beta=0.7))
    largest = float(jnp.max(jnp.sum(stored**2, axis=-1)))
    assert found.min() >= 0
    assert found.max() <= 2 * largest
    assert energy_of(10 * mixtures, stored, beta=0.7).max() > 2 * largest  # not so outside the hull


def noisy_retrieval(rng, *, radius, beta, noise, count=400, width=8):
    """Return errors ||f(xi) - x_i||, distances ||xi - x_i|| and patterns, with one noisy query for each pattern."""
    stored = sphere(rng, count, width, radius=radius)
    query = stored + sphere(rng, count, width, radius=noise)
    error = jnp.linalg.norm(advance(query, stored, beta=beta) - stored, axis=-1)
    return error, jnp.linalg.norm(query - stored, axis=-1), stored


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("beta", "radius"), [(1.0, 2.0), (8.0, 2.0), (1.0, 8.0), (2.0, 12.0)])
def test_retrieval_error_never_exceeds_the_bound_of_theorem_5(rng, beta, radius, noise):
    error, distance, stored = noisy_retrieval(rng, radius=radius, beta=beta, noise=noise)
    fixed = settle(stored, stored, beta=beta, update_steps=30, tolerance=1e-6).state
    for reach in (distance, jnp.maximum(distance, jnp.linalg.norm(fixed - stored, axis=-1))):
        bound = retrieval_error_bound(stored, reach, beta=beta)
        assert int(jnp.sum(error > bound * (1 + 1e-5) + 1e-6 * radius)) == 0


def test_bound_of_theorem_5_promises_something(rng):
    error, distance, stored = noisy_retrieval(rng, radius=12.0, beta=2.0, noise=0.05)
    bound = retrieval_error_bound(stored, distance, beta=2.0)
    assert jnp.mean(bound < 0.01 * 12.0) > 0.5  # more than half of the patterns to within a hundredth of their length
    assert jnp.all(error[bound < 0.01 * 12.0] < 0.01 * 12.0)


def test_smaller_bounds_are_violated(rng):
    # Two opposite patterns come as near to the constant 2 as one likes, so that a smaller one is false.
    pair = np.asarray([[2.0, 0.0], [-2.0, 0.0]], np.float32)
    error = np.linalg.norm(advance(pair, pair, beta=1.0) - pair, axis=-1)
    bound = np.asarray(retrieval_error_bound(jnp.asarray(pair), jnp.zeros(2), beta=1.0))
    assert np.all(error <= bound)
    assert np.all(error > 0.99 * bound)
    # One pattern opposite to all others needs their number: the same error for each, N - 1 times.
    crowd = np.concatenate([pair[:1], np.tile(pair[1:], (99, 1))])
    error = np.linalg.norm(advance(crowd[:1], crowd, beta=1.0) - crowd[:1])
    bound = 2 * 2.0 * np.exp(-1.0 * (4.0 - -4.0))  # the bound without N - 1
    assert error > 50 * bound
    assert error <= 99 * bound


def test_query_near_a_pattern_needs_its_distance_in_the_bound():
    pair = jnp.asarray([[2.0, 0.0], [-2.0, 0.0]])
    query = pair + jnp.asarray([[-1.0, 0.0], [1.0, 0.0]])
    error = jnp.linalg.norm(update(query, pair, beta=1.0) - pair, axis=-1)
    assert jnp.all(error <= retrieval_error_bound(pair, jnp.ones(2), beta=1.0))
    assert jnp.all(error > retrieval_error_bound(pair, jnp.zeros(2), beta=1.0))


@pytest.mark.parametrize(("features", "radius_factor", "constant"), [(20, 3.0, 3.1546), (75, 1.0, 1.3719)])
def test_storage_constants_of_theorem_3(features, radius_factor, constant):
    found = storage_capacity(features, beta=1.0, radius_factor=radius_factor, failure_probability=0.001)
    assert found.constant == pytest.approx(constant, abs=5e-5)
    assert found.patterns == pytest.approx(0.001**0.5 * found.constant ** ((features - 1) / 4))


def test_storage_grows_exponentially_with_the_width():
    counts = [
        storage_capacity(d, beta=1.0, radius_factor=3.0, failure_probability=0.001).patterns for d in (20, 40, 80, 160)
    ]
    ratios = np.diff(np.log(counts)) / np.diff([20, 40, 80, 160])
    assert ratios.min() > 0.25
    # The theorem is far from tight: a hundred times as many random patterns are retrieved in one update.
    rng = np.random.default_rng(0)
    stored = sphere(rng, 1000, 20, radius=3 * 19**0.5)
    np.testing.assert_allclose(advance(stored, stored, beta=1.0), stored, atol=1e-3)


def test_storage_theorem_refuses_what_it_does_not_cover():
    with pytest.raises(ValueError, match=r"failure_probability=2.0 must be"):
        storage_capacity(20, beta=1.0, radius_factor=3.0, failure_probability=2.0)
    with pytest.raises(ValueError, match=r"needs c=.* of at least"):
        storage_capacity(5, beta=1.0, radius_factor=1.0, failure_probability=0.001)


def test_beta_chooses_between_mean_metastable_state_and_single_pattern(rng):
    # Four well separated clusters of five patterns each.
    points = (np.eye(4, 8)[:, None] + 0.1 * rng.normal(size=(4, 5, 8))).reshape(20, 8)
    stored = jnp.asarray(3 * points / np.linalg.norm(points, axis=-1, keepdims=True), jnp.float32)
    reach = functools.partial(settle, stored, stored, update_steps=1000, tolerance=1e-7)
    mean = reach(beta=0.02)
    np.testing.assert_allclose(mean.state, jnp.broadcast_to(stored.mean(axis=0), (20, 8)), atol=0.1)
    np.testing.assert_allclose(mean.association, jnp.full((20, 20), 1 / 20), atol=0.01)
    subset = reach(beta=1.0)
    own = jnp.repeat(stored.reshape(4, 5, 8).mean(axis=1), 5, axis=0)
    np.testing.assert_allclose(subset.state, own, atol=0.1)
    members = jnp.kron(jnp.eye(4), jnp.ones((5, 5)))
    np.testing.assert_allclose(jnp.sum(subset.association * members, axis=-1), 1.0, atol=0.01)
    assert subset.association.max() < 0.5
    single = reach(beta=1000.0)
    np.testing.assert_allclose(single.state, stored, atol=1e-3)


def test_large_beta_gives_the_most_similar_pattern(rng):
    state, stored = jnp.asarray(rng.normal(size=(50, 8))), sphere(rng, 20, 8)
    nearest = stored[jnp.argmax(state @ stored.T, axis=-1)]
    np.testing.assert_allclose(advance(state, stored, beta=1e5), nearest, atol=1e-5)
    assert jnp.abs(advance(state, stored, beta=1.0) - nearest).max() > 0.1


# Iteration. -----------------------------------------------------------------------------------------------------------


def test_a_state_settles_alone():
    rng = np.random.default_rng(3)
    state, stored = rng.normal(size=(6, 4, 8)), rng.normal(size=(6, 9, 8))
    alone = functools.partial(settle, beta=0.6, update_steps=100, tolerance=0.05)
    together = alone(*as_jax(state, stored))
    assert len(np.unique(together.steps)) > 2  # they do take different times
    for b in range(6):
        for s in range(4):
            single = alone(*as_jax(state[b : b + 1, s : s + 1], stored[b : b + 1]))
            assert single.steps[0, 0] == together.steps[b, s]
            np.testing.assert_allclose(single.state[0, 0], together.state[b, s], atol=1e-6)

    # Negative control: a loop that goes on for all until the slowest has settled, as the reference code does.
    def coupled(state, stored):
        def associated(xi):
            return np.asarray(
                [[twin_association(x, y, 0.6, np.ones(9, bool)) for x in xs] for xs, y in zip(xi, stored, strict=True)]
            )

        weights, moved = associated(state), np.inf
        while moved > 0.05:
            new = associated(weights @ stored)
            moved, weights = np.max(np.linalg.norm(new - weights, axis=-1)), new
        return weights @ stored

    all_six = coupled(state, stored)
    differences = [np.abs(coupled(state[b : b + 1], stored[b : b + 1])[0] - all_six[b]).max() for b in range(6)]
    assert max(differences) > 1e-2


def test_a_looser_tolerance_takes_fewer_steps_and_zero_waits_for_rest(problem):
    state, stored, _ = as_jax(*problem)
    reach = functools.partial(settle, state, stored, beta=1.0, update_steps=500)
    counts = [reach(tolerance=tolerance).steps.sum() for tolerance in (1e-1, 1e-5)]
    assert counts[0] < counts[1]
    rest = reach(tolerance=0.0)
    np.testing.assert_allclose(advance(rest.state, stored, beta=1.0), rest.state, atol=1e-6)


def test_fixed_number_of_updates_is_differentiable():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        state, stored = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 3), (4, 3)))
        fixed = jax.jit(lambda *arrays: retrieve(*arrays, beta=0.9, update_steps=4).state)
        check_grads(fixed, (state, stored), order=1, modes=["rev"])


def test_settled_gradient_is_that_of_a_hundred_unrolled_updates():
    # Through `lax.while_loop` itself reverse mode is an error; through the fixed point it is exact.
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        state, stored, weights = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 3, 4), (2, 6, 4), (2, 3, 4)))
        mask = jnp.asarray(rng.random((2, 3, 6)) < 0.8)

        def loss(state, stored, beta, **steps):
            return jnp.sum(weights * jnp.sin(retrieve(state, stored, beta=beta, mask=mask, **steps).state))

        settled = functools.partial(loss, update_steps=400, tolerance=1e-13)

        @jax.jit
        def gradients(*arguments):
            return (
                jax.grad(settled, (0, 1, 2))(*arguments),
                jax.grad(functools.partial(loss, update_steps=100), (0, 1, 2))(*arguments),
                jax.grad(functools.partial(loss, update_steps=2), 1)(*arguments),
                jax.jvp(lambda beta: settled(*arguments[:2], beta), arguments[2:], (1.0,))[1],
            )

        found, expected, early, forward = gradients(state, stored, 2.0)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-8)
        assert float(jnp.abs(found[1]).max()) > 0.1
        assert not np.any(found[0])  # the fixed point does not know where the state began
        np.testing.assert_allclose(forward, found[2], atol=1e-8)
        # Negative control: few updates are not settled, and their gradient is another.
        assert float(jnp.abs(early - expected[1]).max()) > 1e-3


def test_settled_gradient_reaches_parameters_through_jit_and_vmap(rng):
    layer = Hopfield(num_heads=2, update_steps=200, tolerance=1e-6, learn_beta=True)
    unrolled = layer.clone(update_steps=150, tolerance=None)
    (x,) = as_jax(rng.normal(size=(3, 5, 8)))
    params = draw_params(rng, layer, x[0], scale=0.3)

    @jax.jit
    def gradients(params, x):
        losses = [lambda params, x, m=m: jnp.sum(jnp.sin(m.apply({"params": params}, x))) for m in (layer, unrolled)]
        return [jax.vmap(jax.grad(loss), (None, 0))(params, x) for loss in losses]

    settled, expected = jax.device_get(gradients(params, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), settled, expected)
    assert np.abs(settled["log_beta"]).max() > 1e-3


def draw_params(rng, module, *inputs, scale=0.5):
    """Return random parameters; shapes alone are traced, which is quicker than running initialisers."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def weights_of(module, params, *inputs, **keywords):
    """Return the sown association."""
    return module.apply({"params": params}, *inputs, **keywords, mutable="intermediates")[1]["intermediates"][
        "association"
    ][0]


# Masks. ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [{}, {"update_steps": 3}, {"update_steps": 9, "tolerance": 1e-3}], ids=str)
def test_padding_has_no_influence_and_gets_no_gradient(rng, steps):
    layer = Hopfield(num_heads=2, **steps)
    states, members = as_jax(rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 5, 8)))
    key_mask = jnp.asarray([[True] * 5, [True, True, True, False, False]])
    params = draw_params(rng, layer, states, members)

    @jax.jit
    def outputs(members):
        def masked(members):
            output = layer.apply({"params": params}, states, members, key_mask=key_mask)
            return jnp.sum(jnp.sin(output)), output

        (_, output), gradient = jax.value_and_grad(masked, has_aux=True)(members)
        alone = layer.apply({"params": params}, states[1:], members[1:, :3])
        return output, gradient, alone, layer.apply({"params": params}, states, members)

    output, gradient, alone, unmasked = jax.device_get(outputs(members))
    other, _, _, unmasked_other = jax.device_get(outputs(members.at[1, 3:].set(1e3)))
    np.testing.assert_array_equal(output, other)
    np.testing.assert_allclose(output[1:], alone, atol=1e-5)
    assert not np.any(gradient[1, 3:])
    assert np.all(np.any(gradient[0], axis=-1))
    assert np.abs(unmasked - unmasked_other).max() > 1e-2  # negative control: without the mask the padding counts


@pytest.mark.parametrize("steps", [{}, {"update_steps": 3}, {"update_steps": 9, "tolerance": 1e-3}], ids=str)
def test_a_state_that_may_retrieve_nothing_gives_the_output_bias_and_finite_gradients(rng, steps):
    layer = Hopfield(num_heads=2, **steps)
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    params = draw_params(rng, layer, x)

    def loss(params, x):
        output = layer.apply({"params": params}, x, key_mask=jnp.asarray([[True] * 5, [False] * 5]))
        return jnp.sum(jnp.sin(output)), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(output[1], np.broadcast_to(params["out"]["bias"], (5, 8)), atol=1e-6)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_energy_of_a_fully_masked_state_has_a_finite_gradient(problem):
    state, stored, mask = as_jax(*problem)
    gradients = jax.jit(jax.grad(lambda *a: jnp.sum(energy(*a, beta=1.0, mask=mask)), (0, 1)))(state, stored)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_mask_can_differ_between_heads(rng):
    layer = Hopfield(num_heads=2)
    (x,) = as_jax(rng.normal(size=(2, 5, 8)))
    mask = np.stack([np.eye(5, dtype=bool), np.tri(5, dtype=bool)])
    weights = np.asarray(weights_of(layer, draw_params(rng, layer, x), x, mask=jnp.asarray(mask)))
    np.testing.assert_allclose(weights[:, 0], np.broadcast_to(np.eye(5), (2, 5, 5)), atol=1e-6)
    np.testing.assert_array_equal(weights[:, 1] > 0, np.broadcast_to(mask[1], (2, 5, 5)))


# The layers. ----------------------------------------------------------------------------------------------------------


def test_one_update_with_default_beta_is_attention(rng):
    layer = Hopfield(num_heads=4, **NO_NORMS)
    attention = nn.MultiHeadDotProductAttention(num_heads=4)
    q, k, v = as_jax(*(rng.normal(size=(2, n, 16)) for n in (5, 7, 7)))
    allowed = rng.random((2, 1, 5, 7)) < 0.7
    allowed[..., 0] = True
    mask = jnp.asarray(allowed)
    params = draw_params(rng, layer, q, k, v, scale=0.3)
    shapes = jax.eval_shape(attention.init, jax.random.key(0), q, k, v)["params"]
    split = jax.tree.map(lambda leaf, shape: leaf.reshape(shape.shape), params, shapes)
    # Negative controls: another beta, and a second update, are not attention.
    modules = (layer, layer.clone(beta=0.25), layer.clone(update_steps=2))

    @jax.jit
    def outputs(q, k, v):
        return attention.apply({"params": split}, q, k, v, mask=mask), *(
            module.apply({"params": params}, q, k, v, mask=mask) for module in modules
        )

    expected, found, *others = jax.device_get(outputs(q, k, v))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-6)
    for other in others:
        assert np.abs(other - expected).max() > 1e-2 * scale


def test_each_head_has_its_own_beta(rng):
    (x,) = as_jax(rng.normal(size=(2, 6, 8)))
    layer = Hopfield(num_heads=2, beta=(3.0, 0.0))
    params = draw_params(rng, layer, x, scale=1.0)
    found = np.asarray(weights_of(layer, params, x))
    np.testing.assert_allclose(found[:, 1], np.full((2, 6, 6), 1 / 6), atol=1e-6)
    np.testing.assert_allclose(found[:, 0], weights_of(layer.clone(beta=3.0), params, x)[:, 0], atol=1e-6)
    assert np.abs(found[:, 0] - 1 / 6).max() > 0.5


def test_learned_betas_begin_at_beta_and_stay_positive(rng):
    (x,) = as_jax(rng.normal(size=(2, 6, 8)))
    fixed = Hopfield(num_heads=2, beta=(3.0, 0.5))
    learned = fixed.clone(learn_beta=True)
    params = dict(draw_params(rng, fixed, x))
    begin = learned.init(jax.random.key(0), x)["params"]["log_beta"]
    np.testing.assert_allclose(np.exp(begin), [3.0, 0.5], rtol=1e-6)
    apply = jax.jit(lambda log_beta: learned.apply({"params": {**params, "log_beta": log_beta}}, x))
    np.testing.assert_allclose(apply(begin), fixed.apply({"params": params}, x), atol=1e-5)
    uniform = fixed.clone(beta=0.0).apply({"params": params}, x)
    np.testing.assert_allclose(apply(begin - 50.0), uniform, atol=1e-5)


def test_static_heads_hold_one_beta_each_and_keep_samples_apart(rng):
    states, stored = as_jax(rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 5, 4)))
    layer = Hopfield(num_heads=2, beta=(0.0, 50.0), **MEMORY)
    assert jax.eval_shape(layer.init, jax.random.key(0), states, stored) == {}
    apply = jax.jit(functools.partial(layer.apply, {}))
    found = np.asarray(apply(states, stored))
    np.testing.assert_allclose(found[..., :4], np.broadcast_to(np.mean(stored, 1, keepdims=True), (3, 2, 4)), atol=1e-6)
    np.testing.assert_allclose(found[..., 4:], advance(states, stored, beta=50.0), atol=1e-5)
    for b in range(3):
        np.testing.assert_allclose(apply(states[b], stored[b]), found[b], atol=1e-6)


def test_values_can_be_labels_of_stored_training_data(rng):
    points, labels = sphere(rng, 40, 8), jnp.asarray(np.eye(3, dtype=np.float32)[rng.integers(3, size=40)])
    found = Hopfield(beta=1e4, **MEMORY).apply({}, points + 0.01 * sphere(rng, 40, 8), points, labels)
    np.testing.assert_allclose(found, labels, atol=1e-4)


def test_memory_can_begin_as_data(rng):
    points = sphere(rng, 10, 8)
    memory = HopfieldLayer(
        Hopfield(beta=1e4, **MEMORY), 10, patterns_init=lambda key, shape, dtype: points.astype(dtype)
    )
    queries = points + 0.01 * sphere(rng, 10, 8)
    found, variables = jax.jit(memory.init_with_output)(jax.random.key(0), queries)
    np.testing.assert_allclose(found, points, atol=1e-3)
    np.testing.assert_array_equal(variables["params"]["stored_patterns"], points)


def test_unprojected_learned_patterns_live_in_the_association_space():
    without_key, without_query = ("query", "value", "out"), ("key", "value", "out")
    layer = HopfieldLayer(Hopfield(num_heads=2, head_dim=3, projections=without_key, **NO_NORMS), 5)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 4, 8)))["params"]
    assert params["stored_patterns"].shape == (5, 3)
    pooling = HopfieldPooling(Hopfield(num_heads=2, head_dim=3, projections=without_query, **NO_NORMS))
    params = jax.eval_shape(pooling.init, jax.random.key(0), jnp.ones((2, 4, 8)))["params"]
    assert params["state_patterns"].shape == (1, 3)


def test_layers_of_the_classifier_have_memories_of_their_own():
    model = HopfieldClassifier(3, 8, HopfieldLayer(Hopfield(num_heads=2), num_patterns=5), depth=2)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 6)))["params"]
    assert sorted(params) == ["embed", "final_norm", "head", "memory_0", "memory_1"]
    assert jax.tree.structure(params["memory_0"]) == jax.tree.structure(params["memory_1"])
    assert set(params["memory_0"]) == {"hopfield", "stored_patterns"}


def test_dropout_acts_on_associations_only_in_training(rng):
    layer = Hopfield(dropout_rate=0.5)
    (x,) = as_jax(rng.normal(size=(2, 6, 8)))
    params = draw_params(rng, layer, x)
    train = jax.jit(lambda key: layer.apply({"params": params}, x, deterministic=False, rngs={"dropout": key}))
    np.testing.assert_array_equal(layer.apply({"params": params}, x), Hopfield().apply({"params": params}, x))
    assert np.abs(np.subtract(*jax.device_get([train(jax.random.key(i)) for i in range(2)]))).max() > 1e-2


def test_steps_and_association_are_sown(rng):
    layer = Hopfield(num_heads=2, update_steps=20, tolerance=1e-2)
    (x,) = as_jax(rng.normal(size=(2, 6, 8)))
    apply = jax.jit(functools.partial(layer.apply, mutable="intermediates"))
    sown = apply({"params": draw_params(rng, layer, x)}, x)[1]["intermediates"]
    np.testing.assert_allclose(np.sum(sown["association"][0], -1), np.ones((2, 2, 6)), atol=1e-6)
    steps = np.asarray(sown["steps"][0])
    assert steps.shape == (2, 2, 6)
    assert 2 <= steps.min() < steps.max() <= 20


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_bfloat16_iterates_in_float32(rng, tolerance):
    state, stored = (jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16) for _ in range(2))
    reach = functools.partial(settle, beta=1.0, update_steps=8, tolerance=tolerance)
    found, expected = reach(state, stored), reach(state.astype(jnp.float32), stored.astype(jnp.float32))
    assert found.state.dtype == jnp.float32
    np.testing.assert_allclose(found.state, expected.state, atol=1e-6)
    layer = Hopfield(update_steps=8, tolerance=tolerance, dtype=jnp.bfloat16)
    assert jax.eval_shape(layer.init_with_output, jax.random.key(0), state)[0].dtype == jnp.bfloat16


@pytest.mark.usefixtures("untyped")
def test_functions_refuse_what_does_not_fit():
    x, y = jnp.ones((2, 3)), jnp.ones((4, 5))
    with pytest.raises(ValueError, match="state patterns have 3 features and stored patterns 5, which must be equal"):
        association(x, y, beta=1.0)
    with pytest.raises(ValueError, match=r"beta=-1.0 must be finite and at least 0; set beta"):
        update(x, x, beta=-1.0)
    with pytest.raises(ValueError, match=r"beta=0.0 must be positive for an energy"):
        energy(x, x, beta=0.0)
    with pytest.raises(ValueError, match=r"beta=0 must be positive; set beta"):
        retrieval_error_bound(x, jnp.ones(2), beta=0)
    with pytest.raises(ValueError, match="patterns=1 must be at least 2"):
        separation(x[:1])
    with pytest.raises(ValueError, match=r"tolerance=-1 must be at least 0"):
        retrieve(x, x, beta=1.0, update_steps=2, tolerance=-1)
    with pytest.raises(ValueError, match=r"update_steps=0 must be at least 1"):
        retrieve(x, x, beta=1.0, update_steps=0)
    with pytest.raises(ValueError, match=r"mask of dtype float32 must be bool"):
        association(x, x, beta=1.0, mask=jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) must broadcast to \(2, 2\)"):
        energy(x, x, beta=1.0, mask=jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) must broadcast to \(2,\)"):
        jax.eval_shape(lambda: Hopfield().init(jax.random.key(0), x, key_mask=jnp.ones(3, bool)))


# The reference code, whose outputs are stored. ------------------------------------------------------------------------

# Our module, and the arguments that the reference was given.
PARITY = {
    "self": Hopfield(num_heads=2),  # input_size=8, num_heads=2
    "no_norm": Hopfield(num_heads=2, use_bias=False, **NO_NORMS),  # and no normalisation, input_bias=False
    # input_size=8, hidden_size=3, pattern_size=5, output_size=4, stored_pattern_size=6, pattern_projection_size=7
    "dimensions": Hopfield(num_heads=2, head_dim=3, value_dim=5, out_features=4),
    # hidden_size=6, scaling=0.5, update_steps_max=2, update_steps_eps=1e-30
    "three_updates": Hopfield(num_heads=2, head_dim=6, beta=0.5, update_steps=3),
    # scaling=1.5, update_steps_max=2, everything static, no normalisation, no output projection
    "static": Hopfield(beta=1.5, update_steps=3, **MEMORY),
    "static_state": Hopfield(projections=("key", "value", "out")),  # hidden_size=4, state_pattern_as_static=True
    "masks": Hopfield(num_heads=2, update_steps=2),  # update_steps_max=1
    # hidden_size=6, scaling=0.3, update_steps_max=None, update_steps_eps=1e-2; one sample of one state stops alone
    "tolerance": Hopfield(num_heads=2, head_dim=6, beta=0.3, update_steps=1000, tolerance=1e-2),
    "pooling": HopfieldPooling(Hopfield(num_heads=2, update_steps=2), num_states=3),  # quantity=3, update_steps_max=1
    "lookup": HopfieldLayer(Hopfield(num_heads=2), num_patterns=5),  # quantity=5
    # hidden_size=6, lookup_weights_as_separated=True, pattern_projection_size=3, scaling=0.7
    "lookup_values": HopfieldLayer(Hopfield(num_heads=2, head_dim=6, beta=0.7), 5, value_features=3),
}


def stored_case(name):
    with np.load(GOLDEN) as stored:
        own = {key.removeprefix(f"{name}/"): stored[key] for key in stored.files if key.startswith(f"{name}/")}
    tensors = {key.removeprefix("parameter/"): value for key, value in own.items() if key.startswith("parameter/")}
    inputs = [own[key] for key in sorted(own) if key.startswith("input/")]
    if len(inputs) == 3:  # stored, state, projection there; state, stored, value here
        inputs = [inputs[1], inputs[0], inputs[2]]
    masks = {}
    if "stored_pattern_padding_mask" in own:
        masks["key_mask"] = jnp.asarray(~own["stored_pattern_padding_mask"])
    if "association_mask" in own:
        masks["mask"] = jnp.asarray(~own["association_mask"])[None]
    return tensors, [jnp.asarray(x) for x in inputs], masks, own["output"], own["association"]


@pytest.mark.parametrize("name", PARITY)
def test_equals_the_reference_on_its_parameters(name):
    tensors, inputs, masks, output, expected_weights = stored_case(name)
    module = PARITY[name]
    shapes = jax.eval_shape(functools.partial(module.init, **masks), jax.random.key(0), *inputs)
    params = from_reference(tensors, shapes.get("params", {}))
    apply = jax.jit(functools.partial(module.apply, **masks, mutable="intermediates"))
    found, sown = apply({"params": params}, *inputs)
    sown = sown["intermediates"].get("hopfield", sown["intermediates"])
    np.testing.assert_allclose(sown["association"][0], expected_weights, atol=1e-5)
    scale = np.abs(output).max()
    np.testing.assert_allclose(found.reshape(output.shape) / scale, output / scale, atol=1e-5)


def test_reference_parity_sees_a_wrong_parameter():
    tensors, inputs, _, output, _ = stored_case("self")
    module = PARITY["self"]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    tensors["association_core.in_proj_weight"] = np.roll(tensors["association_core.in_proj_weight"], 8, axis=0)
    found = module.apply({"params": from_reference(tensors, shapes)}, *inputs)
    assert np.abs(found - output).max() > 0.1


def test_conversion_refuses_what_does_not_fit():
    tensors, inputs, _, _, _ = stored_case("self")
    shapes = jax.eval_shape(Hopfield(num_heads=2).init, jax.random.key(0), *inputs)["params"]
    with pytest.raises(ValueError, match=r"unknown \['p_norm_weight'\]"):
        from_reference({**tensors, "p_norm_weight": np.ones(4)}, shapes)
    with pytest.raises(ValueError, match=r"missing \['norm_state/bias'\]"):
        from_reference({name: t for name, t in tensors.items() if name != "norm_state_pattern.bias"}, shapes)
    with pytest.raises(ValueError, match=r"out_proj.weight must give out/kernel its shape"):
        from_reference({**tensors, "association_core.out_proj.weight": np.ones((3, 8))}, shapes)
    wider = jax.eval_shape(Hopfield(num_heads=2, head_dim=2).init, jax.random.key(0), *inputs)["params"]
    with pytest.raises(ValueError, match="set its fields|set the module's fields"):
        from_reference(tensors, wider)
