"""Exponentials and logarithms: equal to those of SciPy, value and gradient finite where formulas divide by 0."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxlayers.geometry import lie

#: How well code is optimised is not what is checked.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

AXES = np.array([a for a in itertools.product((-1.0, 0.0, 1.0), repeat=3) if any(a)])
AXES = AXES / np.linalg.norm(AXES, axis=-1, keepdims=True)
ANGLES = (0.0, 1e-9, 1e-4, 0.22, 0.23, 0.7, 0.71, 3.0, np.pi - 1e-6, np.pi, np.pi + 1e-6)


def skew(w):
    return np.array([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]])


def generators(name, vector):
    """The matrix of coordinates, written out."""
    if name == "se2":
        a, x, y = vector
        return np.array([[0, -a, x], [a, 0, y], [0, 0, 0]])
    w = skew(vector[:3])
    return w if name == "so3" else np.block([[w, vector[3:, None]], [np.zeros((1, 4))]])


def coordinates(name, rng):
    if name == "se2":
        return np.array([[s * a, *rng.normal(size=2)] for a in ANGLES for s in (-1, 1)])
    w = np.concatenate([a * AXES for a in ANGLES])
    return w if name == "so3" else np.concatenate([w, rng.normal(size=w.shape)], axis=-1)


@pytest.mark.parametrize("name", ["so3", "se2", "se3"])
def test_exponential_equals_that_of_scipy_and_logarithm_inverts_it(name, rng):
    exp, log = fast(getattr(lie, f"{name}_exp")), fast(getattr(lie, f"{name}_log"))
    vectors = coordinates(name, rng)
    expected = np.stack([scipy.linalg.expm(generators(name, vector)) for vector in vectors])
    with jax.enable_x64(True):
        found = exp(jnp.asarray(vectors))
        np.testing.assert_allclose(found, expected, atol=1e-13)
        logarithms = log(found)
        np.testing.assert_allclose(exp(logarithms), found, atol=1e-12)
        # Away from half a turn the logarithm is unique.
        turn = np.abs(vectors[:, 0]) if name == "se2" else np.linalg.norm(vectors[:, :3], axis=-1)
        unique = turn < 3.1
        np.testing.assert_allclose(logarithms[unique], vectors[unique], atol=1e-11)
        for index in np.flatnonzero(unique)[::7]:
            np.testing.assert_allclose(
                generators(name, np.asarray(logarithms[index])), scipy.linalg.logm(expected[index]), atol=1e-6
            )
    single = exp(jnp.asarray(vectors, jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(exp(log(single)), single, atol=4e-6)


@pytest.mark.parametrize("name", ["so3", "se2", "se3"])
def test_gradients_are_finite_at_zero_and_half_turns_and_equal_differences(name, rng):
    exp, log = getattr(lie, f"{name}_exp"), getattr(lie, f"{name}_log")
    vectors = coordinates(name, rng)
    with jax.enable_x64(True):
        weights = jnp.asarray(rng.normal(size=exp(jnp.asarray(vectors)).shape[-2:]))

        def round_trip(vector):
            return jnp.sum(exp(log(exp(vector))) * weights)

        def plain(vector):
            return jnp.sum(exp(vector) * weights)

        found = fast(jax.vmap(jax.grad(round_trip)))(jnp.asarray(vectors))
        assert np.all(np.isfinite(found))
        step = 1e-6 * np.eye(vectors.shape[-1])
        evaluate = fast(jax.vmap(plain))
        numeric = np.stack([(evaluate(vectors + s) - evaluate(vectors - s)) / 2e-6 for s in step], axis=-1)
        np.testing.assert_allclose(found, numeric, atol=1e-6)
    found = fast(jax.vmap(jax.grad(lambda x: jnp.sum(log(exp(x))))))(jnp.asarray(vectors, jnp.float32))
    assert np.all(np.isfinite(found))


def test_rounding_does_not_choose_the_sign_of_a_half_turn(rng):
    exact = [np.diag(signs) for signs in ([1.0, -1, -1], [-1, 1, -1], [-1, -1, 1])]
    turns = np.stack([q @ e @ q.T for e in exact for q in np.linalg.qr(rng.normal(size=(5, 3, 3)))[0]] + exact)
    log = fast(lie.so3_log)
    noisy = turns + 3e-7 * rng.normal(size=turns.shape)
    np.testing.assert_allclose(log(jnp.asarray(noisy, jnp.float32)), log(jnp.asarray(turns, jnp.float32)), atol=1e-5)
    for sign in (-1e-7, 1e-7):
        half = jnp.asarray([[-1.0, -sign], [sign, -1.0]])
        np.testing.assert_allclose(lie.so2_log(half), np.pi, atol=1e-6)


def test_angle_of_nothing_is_zero_with_gradient_zero():
    value, gradient = fast(jax.value_and_grad(lie.so2_log))(jnp.zeros((2, 2)))
    assert float(value) == 0
    assert not np.any(gradient)


# Stretches ----------------------------------------------------------------------------------------------------------


def symmetric(rng, n):
    """Symmetric matrices, of which some have repeated or nearly repeated eigenvalues."""
    x = rng.normal(size=(6, n, n))
    x = (x + np.swapaxes(x, 1, 2)) / 2
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    repeated = (q * np.array([0.3, 0.3, -0.5][:n])) @ q.T
    near = (q * np.array([0.3, 0.3 + 1e-9, -0.5][:n])) @ q.T
    return np.concatenate([x, [repeated, near, np.zeros((n, n)), 0.7 * np.eye(n)]])


@pytest.mark.parametrize("n", [2, 3])
def test_stretches_equal_those_of_scipy_with_exact_derivatives(n, rng):
    matrices = symmetric(rng, n)
    direction = rng.normal(size=(n, n))
    direction = (direction + direction.T) / 2
    with jax.enable_x64(True):
        directions = jnp.broadcast_to(jnp.asarray(direction), matrices.shape)
        found, change = fast(lambda x, d: jax.jvp(lie.symmetric_exp, (x,), (d,)))(jnp.asarray(matrices), directions)
        back, undone = fast(lambda x, d: jax.jvp(lie.symmetric_log, (x,), (d,)))(found, change)
        for index, matrix in enumerate(matrices):
            expected, derivative = scipy.linalg.expm_frechet(matrix, direction)
            np.testing.assert_allclose(found[index], expected, atol=1e-12)
            np.testing.assert_allclose(change[index], derivative, atol=1e-12)
        np.testing.assert_allclose(back, matrices, atol=1e-12)
        np.testing.assert_allclose(undone, np.broadcast_to(direction, matrices.shape), atol=1e-10)


@pytest.mark.parametrize("n", [2, 3])
def test_polar_decomposition_equals_that_of_scipy_with_finite_gradients(n, rng):
    q = np.linalg.qr(rng.normal(size=(10, n, n)))[0]
    q[:, :, 0] *= np.linalg.det(q)[:, None]
    matrices = q @ np.stack([scipy.linalg.expm(s) for s in symmetric(rng, n)])
    with jax.enable_x64(True):
        rotation, stretch = fast(lie.polar)(jnp.asarray(matrices))
        for index, matrix in enumerate(matrices):
            u, p = scipy.linalg.polar(matrix)
            np.testing.assert_allclose(rotation[index], u, atol=1e-12)
            np.testing.assert_allclose(stretch[index], np.real(scipy.linalg.logm(p)), atol=1e-10)
        weights = jnp.asarray(rng.normal(size=(2, n, n)))

        def value(x):
            rotation, stretch = lie.polar(x)
            return jnp.sum(rotation * weights[0]) + jnp.sum(stretch * weights[1])

        found = fast(jax.vmap(jax.grad(value)))(jnp.asarray(matrices))
        evaluate = fast(jax.vmap(value))
        for i, j in itertools.product(range(n), repeat=2):
            step = np.zeros((n, n))
            step[i, j] = 1e-5
            numeric = (evaluate(matrices + step) - evaluate(matrices - step)) / 2e-5
            np.testing.assert_allclose(found[:, i, j], numeric, atol=1e-6)
    single = fast(jax.vmap(jax.grad(lambda x: jnp.sum(lie.polar(x)[1]))))(jnp.asarray(matrices, jnp.float32))
    assert np.all(np.isfinite(single))


def test_polar_decomposition_refuses_what_is_not_square(untyped):
    with pytest.raises(ValueError, match=r"matrix of shape \(2, 3\) must be \[\*batch, n, n\]"):
        lie.polar(jnp.ones((2, 3)))


@pytest.mark.parametrize("n", [2, 3])
def test_haar_density_is_the_jacobian_of_polar_coordinates(n, rng):
    """|det g|^-n dg is the Haar measure of GL(n): its density in (R, S) comes out by finite differences."""
    pairs = list(itertools.combinations(range(n), 2))
    step = 1e-5

    def element(stretch, turn):
        """exp(turn) exp(stretch), both by their coordinates."""
        w, s = np.zeros((n, n)), np.zeros((n, n))
        for value, (i, j) in zip(turn, pairs, strict=True):
            w[i, j], w[j, i] = value, -value
        for value, (i, j) in zip(stretch, [(i, i) for i in range(n)] + pairs, strict=True):
            s[i, j] = s[j, i] = value
        return scipy.linalg.expm(w) @ scipy.linalg.expm(s), s

    def density(stretch):
        zero = np.zeros(len(pairs))
        columns = []
        for k in range(n + len(pairs)):
            d = step * np.eye(n + len(pairs))[k]
            columns.append((element(stretch + d, zero)[0] - element(stretch - d, zero)[0]).ravel() / (2 * step))
        for k in range(len(pairs)):
            d = step * np.eye(len(pairs))[k]
            columns.append((element(stretch, zero + d)[0] - element(stretch, zero - d)[0]).ravel() / (2 * step))
        g, s = element(stretch, zero)
        return abs(np.linalg.det(np.stack(columns))) / abs(np.linalg.det(g)) ** n, s

    log_density = fast(lie.log_haar_density)
    origin = density(np.zeros(n + len(pairs)))[0]
    with jax.enable_x64(True):
        for _ in range(5):
            expected, s = density(rng.normal(size=n + len(pairs)))
            np.testing.assert_allclose(log_density(jnp.asarray(s)), np.log(expected / origin), atol=1e-7)
        # The measure that leaves the density out is another one.
        assert abs(np.log(expected / origin)) > 0.1
        gradient = fast(jax.grad(lie.log_haar_density))(jnp.eye(n))
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
        assert np.isfinite(log_density(jnp.diag(jnp.arange(n) * 2000.0)))
