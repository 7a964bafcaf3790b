"""The theorem on point-wise activations against brute force, over many representations and activations."""

import itertools

import jax
import numpy as np
import pytest

from jaxlayers.equivariant.pointwise_activations import (
    allows_pointwise,
    classify_activation,
    classify_representation,
    equivariance_gap,
    output_matrices,
)

# No module is in this file: it is a statement about others.
CASES = ()


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def permutation(order):
    return np.eye(len(order))[:, list(order)].T


def closure(*generators):
    """All products of some matrices."""
    elements, new = [np.eye(len(generators[0]))], [np.eye(len(generators[0]))]
    while new:
        products = [g @ h for g in generators for h in new]
        new = []
        for product in products:
            if not any(np.allclose(product, known, atol=1e-9) for known in elements):
                elements.append(product)
                new.append(product)
    return np.array(elements)


def cyclic(n):
    return np.array([permutation([(i + k) % n for i in range(n)]) for k in range(n)])


def symmetric(n):
    return np.array([permutation(order) for order in itertools.permutations(range(n))])


S3 = symmetric(3)
FLIP = np.diag([1.0, -1.0])
BASIS = np.array([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
BASIS = BASIS / np.linalg.norm(BASIS, axis=1, keepdims=True)
HALVES = np.diag([2.0, 0.5])
REPRESENTATIONS = {
    "trivial": np.array([np.eye(3)]),
    "C4 regular": cyclic(4),
    "C5 regular": cyclic(5),
    "C3 irreducible": np.array([rotation(2 * np.pi * k / 3) for k in range(3)]),
    "C4 irreducible": np.array([rotation(np.pi * k / 2) for k in range(4)]),
    "C6 irreducible": np.array([rotation(np.pi * k / 3) for k in range(6)]),
    "sign": np.array([[[1.0]], [[-1.0]]]),
    "D3 standard": closure(rotation(2 * np.pi / 3), FLIP),
    "D4 standard": closure(rotation(np.pi / 2), FLIP),
    "D4 turned basis": closure(rotation(np.pi / 2), rotation(0.3) @ FLIP @ rotation(-0.3)),
    "S3 permutation": S3,
    "S3 permutation times sign": np.array([m * np.linalg.det(m) for m in S3]),
    "S3 standard": np.array([BASIS @ m @ BASIS.T for m in S3]),
    "S3 on edges": np.array([np.kron(m, m) for m in S3]),
    "C3 irreducible squared": np.array([np.kron(*(rotation(2 * np.pi * k / 3),) * 2) for k in range(3)]),
    "octahedral": closure(np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]), np.diag([-1.0, 1, 1])),
    "stretched swap": closure(np.array([[0.0, 2.0], [0.5, 0.0]])),
    "stretched swap with sign": closure(np.array([[0.0, 2.0], [-0.5, 0.0]])),
    "swap and more": closure(np.array([[1.0, 0.0], [1.0, -1.0]])),
    "row sums 1": closure(np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 1.0, 1.0]]) @ np.eye(3)),
}
# Generators of infinite groups.
INFINITE = {
    "SO(2)": np.array([rotation(0.7)]),
    "SO(3)": np.array(
        [np.pad(rotation(0.7), (0, 1)) + np.diag([0, 0, 1.0]), np.pad(rotation(1.1), (1, 0)) + np.diag([1.0, 0, 0])]
    ),
    "SO(2) squared": np.array([np.kron(rotation(0.7), rotation(0.7))]),
    "scaling by 2": np.array([2.0 * np.eye(2)]),
    "scaling by -2": np.array([-2.0 * np.eye(2)]),
    "2 and 1/2": np.array([HALVES]),
    "shear": np.array([[[1.0, 1.0], [0.0, 1.0]]]),
}


def log_periodic(x):
    """f(2 x) = 2 f(x), and nothing more: the exotic kind."""
    size = np.maximum(np.abs(x), 1e-300)
    return np.where(x == 0, 0.0, np.maximum(x, 0) * (2 + np.sin(2 * np.pi * np.log2(size))))


ACTIVATIONS = {
    "relu": (jax.nn.relu, "positively homogeneous"),
    "leaky relu": (jax.nn.leaky_relu, "positively homogeneous"),
    "abs": (np.abs, "positively homogeneous"),
    "tanh": (jax.nn.tanh, "odd"),
    "soft sign": (jax.nn.soft_sign, "odd"),
    "sine": (np.sin, "odd"),
    "cube": (lambda x: x**3, "odd"),
    "square": (np.square, "even"),
    "cosine": (np.cos, "even"),
    "gelu": (jax.nn.gelu, "general"),
    "sigmoid": (jax.nn.sigmoid, "general"),
    "softplus": (jax.nn.softplus, "general"),
    "exponential": (np.exp, "general"),
    "step": (lambda x: np.asarray(x > 0, float), "general"),
    "sign": (np.sign, "odd"),
    "log-periodic": (log_periodic, "general"),
    "identity": (lambda x: x, "linear"),
    "minus three": (lambda x: -3 * x, "linear"),
    "affine": (lambda x: 2 * x + 1, "affine"),
    "one": (np.ones_like, "constant"),
    "zero": (np.zeros_like, "constant"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_classified(name):
    activation, expected = ACTIVATIONS[name]
    assert classify_activation(activation).name == expected


def test_bounded_activations_are_known():
    bounded = {name for name, (f, _) in ACTIVATIONS.items() if classify_activation(f).bounded}
    assert bounded == {"tanh", "soft sign", "sine", "cosine", "sigmoid", "step", "sign", "one", "zero"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_verdict_agrees_with_brute_force(activation):
    function, _ = ACTIVATIONS[activation]
    allowed = {}
    for name, matrices in {**REPRESENTATIONS, **INFINITE}.items():
        kind = "group" if name in REPRESENTATIONS else "generators"
        verdict = allows_pointwise(function, matrices, kind=kind)
        # JAX's activations are computed in float32 here.
        gap = equivariance_gap(function, matrices)
        assert verdict.allowed == (gap < 1e-5), (name, gap, verdict)
        assert bool(verdict) == verdict.allowed
        assert (verdict.element is None) == verdict.allowed
        if not verdict:
            assert equivariance_gap(function, matrices[verdict.element : verdict.element + 1]) > 1e-5
        allowed[name] = verdict.allowed
    # The check is awake: every activation but the linear ones is refused somewhere, and all pass on permutations.
    assert all(allowed[name] for name in ("trivial", "C4 regular", "S3 permutation", "S3 on edges"))
    assert all(allowed.values()) == (activation in ("identity", "minus three", "zero"))


@pytest.mark.parametrize(
    ("activation", "passes"),
    [
        ("relu", ("stretched swap", "2 and 1/2", "scaling by 2")),
        ("tanh", ("sign", "C4 irreducible", "D4 standard", "octahedral", "S3 permutation times sign")),
        ("log-periodic", ("scaling by 2", "2 and 1/2", "stretched swap")),
        ("affine", ("row sums 1",)),
        ("gelu", ()),
    ],
)
def test_what_passes_besides_permutations(activation, passes):
    function, _ = ACTIVATIONS[activation]
    found = {
        name
        for name, matrices in {**REPRESENTATIONS, **INFINITE}.items()
        if classify_representation(matrices) not in ("trivial", "permutation")
        and allows_pointwise(function, matrices, kind="generators")
    }
    assert found == set(passes)


def test_a_class_gives_the_verdict_of_its_function():
    """All but the exotic function, which is more than its class says."""
    for name, (function, _) in ACTIVATIONS.items():
        for representation, matrices in {**REPRESENTATIONS, **INFINITE}.items():
            if name == "log-periodic" or (name == "zero" and representation):
                continue
            known = allows_pointwise(classify_activation(function), matrices, kind="generators")
            assert known.allowed == allows_pointwise(function, matrices, kind="generators").allowed, (
                name,
                representation,
            )


# Connected groups ---------------------------------------------------------------------------------------------------

TURN = np.array([[0.0, -1.0], [1.0, 0.0]])
ALGEBRAS = {
    "trivial": np.zeros((1, 2, 2)),
    "so(2)": TURN[None],
    "so(3)": np.array([np.cross(np.eye(3), axis) for axis in np.eye(3)]),
    "so(2) squared": (np.kron(TURN, np.eye(2)) + np.kron(np.eye(2), TURN))[None],
    "scaling": np.eye(2)[None],
    "stretches": np.array([np.diag([1.0, 0.0]), np.diag([0.0, -2.0])]),
    "shear": np.array([[[0.0, 1.0], [0.0, 0.0]]]),
    "row sums 0": np.array([[[1.0, -1.0], [0.5, -0.5]]]),
}


def exponential(matrix):
    """The matrix exponential by its series, after halving."""
    small, result, term = matrix / 1024, np.eye(len(matrix)), np.eye(len(matrix))
    for k in range(1, 12):
        term = term @ small / k
        result = result + term
    return np.linalg.matrix_power(result, 1024)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "log-periodic"])
def test_verdict_on_generators_agrees_with_brute_force_on_the_group(activation):
    function, _ = ACTIVATIONS[activation]
    for name, algebra in ALGEBRAS.items():
        elements = np.array([exponential(t * matrix) for matrix in algebra for t in (-0.9, 0.37, 1.3)])
        verdict = allows_pointwise(function, generators=algebra)
        assert verdict.allowed == (equivariance_gap(function, elements) < 1e-5), (name, verdict)


def test_rotations_allow_nothing_but_linear_activations_unless_trivial():
    """The corollary for connected compact groups, on tensor powers of SO(3)."""
    for power in (1, 2):
        algebra = []
        for axis in np.eye(3):
            a = np.cross(np.eye(3), axis)
            algebra.append(a if power == 1 else np.kron(a, np.eye(3)) + np.kron(np.eye(3), a))
        passed = {name for name, (f, _) in ACTIVATIONS.items() if allows_pointwise(f, generators=np.array(algebra))}
        assert passed == {"identity", "minus three", "zero"}
    assert all(allows_pointwise(f, generators=np.zeros((3, 2, 2))) for f, _ in ACTIVATIONS.values())


def test_group_with_several_components_needs_both_parts():
    """O(2) on a scalar with a sign: the connected part is trivial, the reflections are not."""
    sign, none = np.array([[[1.0]], [[-1.0]]]), np.zeros((1, 1, 1))
    assert allows_pointwise(jax.nn.relu, generators=none)
    assert not allows_pointwise(jax.nn.relu, sign, generators=none)
    assert allows_pointwise(jax.nn.tanh, sign, generators=none)


# Other representations at the output --------------------------------------------------------------------------------


def test_output_representation_is_found_where_there_is_one(rng):
    matrices = REPRESENTATIONS["octahedral"]
    x = rng.normal(size=(5, 3))
    for function, power in ((np.abs, 1), (np.square, 2), (np.cos, 1), (np.tanh, None)):
        outputs = output_matrices(function, matrices)
        for matrix, output in zip(matrices, outputs, strict=True):
            np.testing.assert_allclose(function(x @ matrix.T), function(x) @ output.T, atol=1e-12)
        expected = matrices if power is None else np.abs(matrices) ** power
        np.testing.assert_allclose(outputs, expected, atol=1e-12)
    np.testing.assert_allclose(output_matrices(np.square, 3 * np.eye(2)[None]), 9 * np.eye(2)[None], atol=1e-12)
    assert output_matrices(np.exp, matrices) is None
    assert output_matrices(np.square, REPRESENTATIONS["C3 irreducible"]) is None
    assert output_matrices(lambda x: x + 1, REPRESENTATIONS["sign"]) is None


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrices", "keywords", "message"),
    [
        (None, {}, r"a representation needs matrices or generators"),
        (np.ones((2, 3)), {}, r"matrices of shape \(2, 3\) must be square"),
        (np.ones((1, 2, 3)), {}, r"matrices of shape \(1, 2, 3\) must be square"),
        ([np.eye(2), np.eye(3)], {}, r"matrices must all have the same shape"),
        (np.full((1, 2, 2), np.nan), {}, r"matrices must be finite; matrix 0 is not"),
        (1j * np.eye(2)[None], {}, r"matrices must be real"),
        (np.array([np.eye(2), np.ones((2, 2))]), {"kind": "generators"}, r"must be invertible; matrix 1 is not"),
        (cyclic(4)[1:], {}, r"must contain the identity"),
        (cyclic(4)[:2], {}, r"must be closed under products to be a group: that of 1 and 1 is missing"),
        (np.array([np.eye(2), rotation(0.3)]), {}, r"must be closed under products"),
        (cyclic(4), {"kind": "cosets"}, r"kind='cosets' is unknown"),
        (cyclic(4), {"generators": TURN[None]}, r"must have the same size"),
    ],
)
def test_what_is_no_representation_is_refused(matrices, keywords, message, untyped):
    with pytest.raises(ValueError, match=message):
        allows_pointwise(jax.nn.relu, matrices, **keywords)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (np.log, r"the activation is not finite at -7.61"),
        (lambda x: np.sum(x), r"maps shape \(21,\) to \(\); it must act on each coordinate alone"),
        (lambda x: x + 1j, r"the activation returned complex128; it must be real"),
    ],
)
def test_what_is_no_activation_is_refused(activation, message):
    with pytest.raises(ValueError, match=message):
        classify_activation(activation)
