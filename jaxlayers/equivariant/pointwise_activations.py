"""Which point-wise activations commute with which representations: the theorem as a function."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Activation = Callable[..., Any]

# Relative difference under which two numbers count as equal.
TOLERANCE = 1e-6
# Most elements that the closure of a set of matrices is followed to.
_MAX_ELEMENTS = 10_000
# Where activations are probed: both signs, small and large, and no ratio of two of them a round number.
_PROBES = np.array([0.0137, 0.0711, 0.233, 0.517, 0.893, 1.31, 1.97, 2.89, 4.43, 7.61])
_PROBES = np.concatenate([-_PROBES[::-1], [0.0], _PROBES])
_FACTORS = np.array([0.137, 0.61, 1.73, 3.41])


@dataclasses.dataclass(frozen=True)
class ActivationClass:
    """What kind of function a point-wise activation is, which is all that the theorem asks.

    Attributes:
      constant: f(x) = c.
      affine: f(x) = a x + c, constants included.
      vanishes: f(0) = 0.
      odd: f(-x) = -f(x).
      even: f(-x) = f(x).
      homogeneous: f(s x) = s f(x) for all s > 0, as ReLU and leaky ReLU.
      bounded: stays below a bound on both sides, as far as probed.
    """

    constant: bool
    affine: bool
    vanishes: bool
    odd: bool
    even: bool
    homogeneous: bool
    bounded: bool

    @property
    def name(self) -> str:
        """The smallest class of the theorem that holds it."""
        if self.affine:
            return "constant" if self.constant else "linear" if self.vanishes else "affine"
        if self.homogeneous:
            return "odd and positively homogeneous" if self.odd else "positively homogeneous"
        return "odd" if self.odd else "even" if self.even else "general"

    @property
    def admits(self) -> str:
        """The groups of matrices that it commutes with."""
        return {
            "constant": "matrices whose rows sum to 1 (all, if the constant is 0)",
            "linear": "all matrices",
            "affine": "matrices whose rows sum to 1",
            "odd and positively homogeneous": "monomial matrices",
            "positively homogeneous": "monomial matrices without negative entries",
            "odd": "signed permutation matrices",
        }.get(self.name, "permutation matrices")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an activation may be used with a representation, and why.

    Attributes:
      allowed: whether it commutes with every element.
      activation: class of the activation.
      representation: class of the matrices: `"trivial"`, `"permutation"`, `"signed permutation"`, `"non-negative
        monomial"`, `"monomial"`, `"row sums 1"` or `"general"`.
      reason: one sentence.
      element: index of a matrix or generator that it does not commute with; `None` if allowed.
    """

    allowed: bool
    activation: ActivationClass
    representation: str
    reason: str
    element: int | None = None

    def __bool__(self) -> bool:
        return self.allowed


def classify_activation(activation: Activation) -> ActivationClass:
    """Return the class of an activation, found by probing it at 21 numbers (and at some multiples of them).

    A probe cannot prove: a function that is odd there and not elsewhere is taken for odd. No activation in use is.

    Args:
      activation: an element-wise function of arrays, as `jax.nn.relu` or `numpy.tanh`.

    Returns:
      The class.

    Raises:
      ValueError: if it is not element-wise, not real, or not finite where it is probed.

    Example:
      >>> import jax
      >>> from jaxlayers.equivariant.pointwise_activations import classify_activation
      >>> [classify_activation(f).name for f in (jax.nn.relu, jax.nn.tanh, jax.nn.gelu, lambda x: 2 * x)]
      ['positively homogeneous', 'odd', 'general', 'linear']
    """
    x = _PROBES
    y = _evaluate(activation, x)
    scale = max(float(np.max(np.abs(y))), 1e-30)
    # Least squares line through all probes.
    slope, intercept = np.polyfit(x, y, 1)
    constant = _equal(y, np.full_like(y, y[0]), scale)
    affine = constant or _equal(y, slope * x + intercept, scale)
    homogeneous = all(_commutes(activation, s, s) for s in _FACTORS)
    far = _evaluate(activation, np.array([-80.0, -40.0, -20.0, 20.0, 40.0, 80.0]), finite=False)
    grows = np.abs(far[[0, 5]]) > 1.5 * np.maximum(np.abs(far[[1, 4]]), np.max(np.abs(y)))
    return ActivationClass(
        constant=constant,
        affine=affine,
        vanishes=_equal(_evaluate(activation, np.zeros(1)), np.zeros(1), scale),
        odd=_equal(y, -y[::-1], scale),
        even=_equal(y, y[::-1], scale),
        homogeneous=homogeneous,
        bounded=bool(np.all(np.isfinite(far)) and not np.any(grows)),
    )


def classify_representation(matrices: Float[np.ndarray, "elements n n"] | Sequence[np.ndarray]) -> str:
    """Return the smallest class of the theorem that holds all of the matrices; see `Verdict.representation`."""
    stack = _stacked(matrices, "matrices")
    n = stack.shape[-1]
    if _near(stack, np.eye(n)):
        return "trivial"
    if np.all(_monomial(stack)):
        entries = np.sum(stack, axis=-1)
        signs, sizes = bool(np.all(entries > 0)), _near(np.abs(entries), 1.0)
        return {
            (True, True): "permutation",
            (False, True): "signed permutation",
            (True, False): "non-negative monomial",
            (False, False): "monomial",
        }[signs, sizes]
    return "row sums 1" if _near(np.sum(stack, axis=-1), 1.0) else "general"


def allows_pointwise(
    activation: Activation | ActivationClass,
    matrices: Float[np.ndarray, "elements n n"] | Sequence[np.ndarray] | None = None,
    *,
    generators: Float[np.ndarray, "generators n n"] | Sequence[np.ndarray] | None = None,
    kind: Literal["group", "generators"] = "group",
) -> Verdict:
    """Return whether f(M x) = M f(x) for all x and all M of a representation, f being applied to each coordinate.

    Theorem, for continuous (or just measurable) f that is the same for all coordinates. If some row of some M has two
    non-zero entries a and b, then f(a s + b t) = a f(s) + b f(t) + const, whose only solutions are affine: f(x) =
    l x + c, which commutes if and only if c = 0 or all rows sum to 1. Otherwise each M is monomial, and f commutes if
    and only if f(m x) = m f(x) for every non-zero entry m. These m form a closed subgroup of the multiplicative reals:
    {1} for general f (permutations), {1, -1} for odd f (signed permutations), the positive numbers for positively
    homogeneous f (non-negative monomials), all for homogeneous odd f, or the powers of one number q for the exotic f
    with f(q x) = q f(x) alone, which are found here too since entries are tested as they are.

    A connected group of matrices exp(t A) is monomial only if every A is diagonal, and then f(e^(ta) x) = e^(ta) f(x)
    for its entries a. Compact ones have none but 0: a network that is equivariant to rotations can have point-wise
    activations, other than affine ones, only on trivial representations.

    The matrices hold for one choice of coordinates; the same representation in another basis is another question, with
    another answer.

    Args:
      activation: an element-wise function, or its class (then exotic functions are not known).
      matrices: `[elements, n, n]`, real: all elements of a finite group, or with `kind="generators"` some that generate
        the group, finite or not (what commutes with these commutes with all).
      generators: instead of or besides matrices, a basis of the Lie algebra of the connected part, `[generators, n,
        n]`.
      kind: what the matrices are.

    Returns:
      The verdict, which is true or false as it stands.

    Raises:
      ValueError: on matrices that are not square, finite, real and invertible, or are no group.

    Example:
      >>> import jax, numpy as np
      >>> from jaxlayers.equivariant.pointwise_activations import allows_pointwise
      >>> flip = np.array([np.eye(2), np.diag([1.0, -1.0])])
      >>> bool(allows_pointwise(jax.nn.tanh, flip)), bool(allows_pointwise(jax.nn.relu, flip))
      (True, False)
      >>> allows_pointwise(jax.nn.relu, generators=np.array([[[0.0, -1.0], [1.0, 0.0]]])).allowed
      False

    Source:
      Pacini, Dong, Lepri, Santin, A Characterization Theorem for Equivariant Networks with Point-wise Activations, ICLR
      2024 (arXiv 2401.09235); for finite groups Wood, Shawe-Taylor, Representation theory and invariant neural
      networks, Discrete Applied Mathematics 1996.

    Differs:
      The theorem is derived as stated above rather than quoted: the paper's abstract was available, its tables were
      not. Input and output have the same representation; for f(M x) = N f(x) with another N see `output_matrices`.
    """
    if matrices is None and generators is None:
        raise ValueError("a representation needs matrices or generators; pass the elements of a group or a Lie algebra")
    found = activation if isinstance(activation, ActivationClass) else classify_activation(activation)
    function = None if isinstance(activation, ActivationClass) else activation
    name = "trivial"
    if matrices is not None:
        stack = _stacked(matrices, "matrices")
        if kind == "group":
            _check_group(stack)
        elif kind != "generators":
            raise ValueError(f"kind={kind!r} is unknown; use 'group' or 'generators'")
        _check_invertible(stack)
        name = classify_representation(stack)
        for index, matrix in enumerate(stack):
            reason = _refuses(found, function, matrix)
            if reason:
                return Verdict(False, found, name, f"{reason} (element {index})", index)
    if generators is not None:
        algebra = _stacked(generators, "generators")
        if matrices is not None and algebra.shape[-1] != _stacked(matrices, "matrices").shape[-1]:
            raise ValueError(
                f"generators of shape {algebra.shape} and matrices must have the same size; pass one representation"
            )
        name = _classify_algebra(algebra) if matrices is None or _near(algebra, 0.0) is False else name
        for index, matrix in enumerate(algebra):
            reason = _refuses_generator(found, function, matrix)
            if reason:
                return Verdict(False, found, name, f"{reason} (generator {index})", index)
    return Verdict(True, found, name, f"activations that are {found.name} commute with {found.admits}; this is {name}")


def output_matrices(
    activation: Activation, matrices: Float[np.ndarray, "elements n n"] | Sequence[np.ndarray]
) -> Float[np.ndarray, "elements n n"] | None:
    """Return the matrices N with f(M x) = N f(x), or `None` where there are none: the representation of the output.

    For a monomial M with entries m the only candidate has the entries n with f(m x) = n f(x) in the same places: |x|
    turns signed permutations into permutations, x^2 squares every entry. For affine f it is M itself. Closed under
    products as M is, but not necessarily faithful.

    Args:
      activation: an element-wise function.
      matrices: elements or generators of a group.

    Returns:
      `[elements, n, n]`, or `None`.

    Raises:
      ValueError: as `allows_pointwise`.

    Example:
      >>> import numpy as np
      >>> from jaxlayers.equivariant.pointwise_activations import output_matrices
      >>> output_matrices(np.abs, [np.diag([1.0, -1.0])])[0].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    stack = _stacked(matrices, "matrices")
    _check_invertible(stack)
    found = classify_activation(activation)
    if found.affine:
        return stack if all(not _refuses(found, activation, matrix) for matrix in stack) else None
    if not np.all(_monomial(stack)):
        return None
    outputs = np.zeros_like(stack)
    values = _evaluate(activation, _PROBES)
    anchor = int(np.argmax(np.abs(values)))
    for matrix, output in zip(stack, outputs, strict=True):
        for row, column in zip(*np.nonzero(np.abs(matrix) > TOLERANCE), strict=True):
            m = matrix[row, column]
            n = float(_evaluate(activation, m * _PROBES[anchor : anchor + 1])[0] / values[anchor])
            if not _commutes(activation, m, n):
                return None
            output[row, column] = n
    return outputs


def equivariance_gap(
    activation: Activation,
    matrices: Float[np.ndarray, "elements n n"] | Sequence[np.ndarray],
    *,
    samples: int = 64,
    seed: int = 0,
) -> float:
    """Return the largest |f(M x) - M f(x)| over random x and all M, relative to the largest |f|: the brute force.

    Args:
      activation: an element-wise function.
      matrices: of the representation.
      samples: number of vectors x.
      seed: of the vectors.

    Returns:
      About machine epsilon where the activation commutes with the matrices.
    """
    stack = _stacked(matrices, "matrices")
    x = np.random.default_rng(seed).normal(scale=2.0, size=(samples, stack.shape[-1]))
    moved = _evaluate(activation, np.einsum("eij,sj->esi", stack, x))
    expected = np.einsum("eij,sj->esi", stack, _evaluate(activation, x))
    scale = max(float(np.max(np.abs(moved))), float(np.max(np.abs(expected))), 1e-30)
    return float(np.max(np.abs(moved - expected)) / scale)


def _refuses(found: ActivationClass, function: Activation | None, matrix: np.ndarray) -> str:
    """Return why an activation does not commute with a matrix, or nothing."""
    if found.affine:
        if found.vanishes or _near(np.sum(matrix, axis=-1), 1.0):
            return ""
        return f"a {found.name} activation adds a constant, which a matrix with rows that do not sum to 1 moves"
    if not _monomial(matrix):
        return (
            f"a row of the matrix has several non-zero entries, which mixes coordinates: only affine activations "
            f"commute with that, and this one is {found.name}"
        )
    for m in matrix[np.abs(matrix) > TOLERANCE]:
        if not _allows_factor(found, function, float(m)):
            return (
                f"f({m:.4g} x) differs from {m:.4g} f(x), and {m:.4g} is an entry of the matrix; activations that are "
                f"{found.name} commute with {found.admits}"
            )
    return ""


def _refuses_generator(found: ActivationClass, function: Activation | None, matrix: np.ndarray) -> str:
    """Return why an activation does not commute with exp(t A) for all t, or nothing."""
    if found.affine:
        if found.vanishes or _near(np.sum(matrix, axis=-1), 0.0):
            return ""
        return f"a {found.name} activation adds a constant, which a generator with rows that do not sum to 0 moves"
    if not _near(matrix, np.diag(np.diagonal(matrix))):
        return (
            f"the generator mixes coordinates continuously: only affine activations commute with that, and this one is "
            f"{found.name}"
        )
    if _near(matrix, 0.0) or found.homogeneous:
        return ""
    return f"the generator stretches coordinates: the activation must be positively homogeneous, and is {found.name}"


def _allows_factor(found: ActivationClass, function: Activation | None, m: float) -> bool:
    """Return whether f(m x) = m f(x)."""
    if function is not None:
        return _commutes(function, m, m)
    return (m > 0 or found.odd) and (abs(abs(m) - 1) < TOLERANCE or found.homogeneous)


def _commutes(activation: Activation, m: float, n: float) -> bool:
    """Return whether f(m x) = n f(x) at all probes."""
    left, right = _evaluate(activation, m * _PROBES), n * _evaluate(activation, _PROBES)
    return _equal(left, right, max(float(np.max(np.abs(left))), float(np.max(np.abs(right))), 1e-30))


def _evaluate(activation: Activation, x: np.ndarray, *, finite: bool = True) -> np.ndarray:
    """Return the activation at float64 numbers; JAX computes in float32 unless told otherwise."""
    with np.errstate(all="ignore"):
        y = np.asarray(activation(x))
    if y.shape != x.shape:
        raise ValueError(f"the activation maps shape {x.shape} to {y.shape}; it must act on each coordinate alone")
    if np.iscomplexobj(y):
        raise ValueError(f"the activation returned {y.dtype}; it must be real")
    y = y.astype(np.float64)
    if finite and not np.all(np.isfinite(y)):
        bad = float(x[~np.isfinite(y)].ravel()[0])
        raise ValueError(f"the activation is not finite at {bad:.4g}; pass one that is defined on all real numbers")
    return y


def _equal(a: np.ndarray, b: np.ndarray, scale: float) -> bool:
    # Functions in float32 are known to about 1e-7 of themselves, and their differences no better.
    return bool(np.all(np.abs(a - b) <= TOLERANCE * np.maximum(np.maximum(np.abs(a), np.abs(b)), 1e-1 * scale)))


def _near(a: np.ndarray, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=0.0, atol=TOLERANCE * max(1.0, float(np.max(np.abs(a), initial=0.0)))))


def _monomial(matrix: np.ndarray) -> Any:
    """Return whether matrices `[..., n, n]` have one non-zero entry in every row and column."""
    filled = np.abs(matrix) > TOLERANCE
    return np.all(filled.sum(axis=-1) == 1, axis=-1) & np.all(filled.sum(axis=-2) == 1, axis=-1)


def _classify_algebra(algebra: np.ndarray) -> str:
    if _near(algebra, 0.0):
        return "trivial"
    if all(_near(matrix, np.diag(np.diagonal(matrix))) for matrix in algebra):
        return "non-negative monomial"
    return "row sums 1" if _near(np.sum(algebra, axis=-1), 0.0) else "general"


def _stacked(matrices: Any, name: str) -> np.ndarray:
    """Return matrices as a float64 `[elements, n, n]` array that has been checked."""
    try:
        stack = np.asarray(matrices)
    except ValueError as error:
        raise ValueError(f"{name} must all have the same shape; pass one representation") from error
    if stack.ndim != 3 or stack.shape[-1] != stack.shape[-2] or 0 in stack.shape:
        raise ValueError(f"{name} of shape {stack.shape} must be square, [elements, n, n]; stack them along axis 0")
    if np.iscomplexobj(stack):
        if np.max(np.abs(stack.imag)) > TOLERANCE:
            raise ValueError(f"{name} must be real; got {stack.dtype}; take a real form of the representation")
        stack = stack.real
    stack = stack.astype(np.float64)
    if not np.all(np.isfinite(stack)):
        raise ValueError(f"{name} must be finite; matrix {int(np.argmin(np.isfinite(stack).all(axis=(1, 2))))} is not")
    return stack


def _check_invertible(stack: np.ndarray) -> None:
    smallest = np.linalg.svd(stack, compute_uv=False)
    singular = smallest[:, -1] <= TOLERANCE * np.maximum(smallest[:, 0], TOLERANCE)
    if np.any(singular):
        raise ValueError(f"matrices must be invertible; matrix {int(np.argmax(singular))} is not; check the group")


def _check_group(stack: np.ndarray) -> None:
    """Refuse matrices that are not closed under products."""
    if len(stack) > _MAX_ELEMENTS:
        raise ValueError(f"{len(stack)} matrices are too many to check; pass generators with kind='generators'")
    n = stack.shape[-1]
    flat = stack.reshape(len(stack), -1)
    # A random projection tells matrices apart but for an accident, which the comparison behind it excludes.
    direction = np.random.default_rng(0).normal(size=flat.shape[-1])
    order = np.argsort(flat @ direction)
    keys, tolerance = (flat @ direction)[order], 1e-5 * max(1.0, float(np.max(np.abs(flat))) ** 2) * n

    def known(matrix: np.ndarray) -> bool:
        key = matrix.ravel() @ direction
        low, high = np.searchsorted(keys, (key - tolerance * n, key + tolerance * n))
        return bool(np.any(np.all(np.abs(flat[order[low:high]] - matrix.ravel()) <= tolerance, axis=-1)))

    if not known(np.eye(n)):
        raise ValueError("matrices must contain the identity to be a group; add it, or pass kind='generators'")
    for i, a in enumerate(stack):
        for j, product in enumerate(a @ stack):
            if not known(product):
                raise ValueError(
                    f"matrices must be closed under products to be a group: that of {i} and {j} is missing; add the "
                    "rest, or pass kind='generators'"
                )
