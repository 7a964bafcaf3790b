"""Random rotations, reflections and stretches as NumPy matrices, and how far a matrix is from the identity."""

import math

import numpy as np


def haar_orthogonal(rng: np.random.Generator, dimension: int) -> np.ndarray:
    """Draw from the Haar measure of O(d): QR of a Gaussian matrix, made unique by a positive diagonal of R."""
    q, r = np.linalg.qr(rng.standard_normal((dimension, dimension)))
    return q * np.where(np.diag(r) < 0.0, -1.0, 1.0)


def haar_rotation(rng: np.random.Generator, dimension: int, scale: float) -> np.ndarray:
    """Draw a Haar rotation and multiply its plane angles by `scale`."""
    q = haar_orthogonal(rng, dimension)
    if np.linalg.det(q) < 0.0:
        q[:, 0] = -q[:, 0]
    if scale == 1.0 or dimension == 1:
        return q
    # A Haar rotation has distinct eigenvalues, so its eigenvectors are orthonormal and its power is unique.
    values, vectors = np.linalg.eig(q)
    power = (vectors * np.exp(1j * scale * np.angle(values))) @ vectors.conj().T
    left, _, right = np.linalg.svd(power.real)
    return left @ right


def near_orthogonal(rng: np.random.Generator, dimension: int, scale: float) -> np.ndarray:
    """Draw from O(d), or near the identity from SO(d)."""
    return haar_orthogonal(rng, dimension) if scale == 1.0 else haar_rotation(rng, dimension, scale)


def random_stretch(rng: np.random.Generator, logarithms: np.ndarray) -> np.ndarray:
    """Return the symmetric matrix with the given log-eigenvalues along random axes."""
    axes = haar_orthogonal(rng, len(logarithms))
    return (axes * np.exp(logarithms)) @ axes.T


def linear_magnitude(matrix: np.ndarray) -> float:
    """Return |log Q|_F / sqrt(2) and |log P|_F of the polar decomposition Q P, combined as a root of squares."""
    left, values, right = np.linalg.svd(matrix)
    angles = np.angle(np.linalg.eigvals(left @ right))
    return math.sqrt(float(np.sum(np.square(angles))) / 2.0 + float(np.sum(np.square(np.log(values)))))
