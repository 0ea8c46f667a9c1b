"""Eigenvectors of symmetric matrices by Jacobi's method, in single operations of IEEE 754: equal on every machine."""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inner, jit

SWEEPS = 12  # what 256 rows need; the eigenvectors are orthonormal after any number
PRECISION = 2.0**-36  # of the largest element on the diagonal: what counts as 0 elsewhere


@inner
def _rotate_rows(a, ring, cosine, sine):
    """Rotate pairs of rows of a matrix, in place."""
    for n in range(len(ring) // 2):
        p, q = min(ring[n], ring[len(ring) - 1 - n]), max(ring[n], ring[len(ring) - 1 - n])
        if q < len(a):
            for j in range(a.shape[1]):
                first, second = a[p, j], a[q, j]
                a[p, j] = cosine[n] * first - sine[n] * second
                a[q, j] = sine[n] * first + cosine[n] * second


@jit
def _rotate(a, transposed, axes, ring, cosine, sine, sweeps):
    """Rotate a symmetric matrix (n, n) until all elements off its diagonal are about 0, and `axes` with it.

    A round rotates disjoint pairs of rows, and a sweep pairs each row with every other. `ring` int64 has the numbers of
    the rows, and one more if n is odd; `transposed` (n, n), `cosine` and `sine` (pairs,) are memory.
    """
    size, half, limit = len(a), len(ring) // 2, 0.0
    for i in range(size):
        limit = max(limit, abs(a[i, i]) * PRECISION)
    for _ in range(sweeps):
        largest = 0.0
        for i in range(size):
            for j in range(size):
                if i != j:
                    largest = max(largest, abs(a[i, j]))
        if not largest > limit:
            break
        for _ in range(len(ring) - 1):
            for n in range(half):
                p, q = min(ring[n], ring[len(ring) - 1 - n]), max(ring[n], ring[len(ring) - 1 - n])
                tangent = 0.0
                if q < size and a[p, q] != 0:
                    theta = (a[q, q] - a[p, p]) / (2 * a[p, q])
                    tangent = (-1.0 if theta < 0 else 1.0) / (abs(theta) + np.sqrt(theta * theta + 1))
                cosine[n] = 1 / np.sqrt(tangent * tangent + 1)
                sine[n] = tangent * cosine[n]
            _rotate_rows(a, ring, cosine, sine)
            for i in range(size):
                for j in range(size):
                    transposed[i, j] = a[j, i]
            _rotate_rows(transposed, ring, cosine, sine)
            for i in range(size):
                for j in range(size):
                    a[i, j] = transposed[i, j]
            _rotate_rows(axes, ring, cosine, sine)
            last = ring[len(ring) - 1]
            for n in range(len(ring) - 1, 1, -1):
                ring[n] = ring[n - 1]
            ring[1] = last


def eigenvectors(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the eigenvectors of a symmetric matrix (n, n) as rows, by falling eigenvalue."""
    size = len(matrix)
    a, axes, ring = np.array(matrix, np.float64), np.eye(size), np.arange(size + size % 2)
    pairs = len(ring) // 2
    _rotate(a, np.empty_like(a), axes, ring, np.empty(pairs), np.empty(pairs), SWEEPS)
    return axes[np.argsort(-np.diagonal(a), kind="stable")]
