"""The fixed filters of the residual coder: their taps, and how an encoder chooses the weights of a chunk.

The taps are part of the format (`docs/residual.md`). The choice of weights is not: any weights decode. Here they are a
least-squares fit, weighted by the inverse square of the local activity, which comes near the fewest bits. It runs on
exact integers up to a Cholesky solution in a fixed order of IEEE double operations, so that equal chunks become equal
bytes on every machine.
"""

import math

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inner, jit

_AROUND = ((0, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))

# Taps (plane, dy, dx). Plane 0 is the band itself, planes 1 and 2 its references, plane 3 the mean of the rows above.
# An input is the sample there, less the sample of the same plane at (-1, 0); a mean, less the sample of plane 0 there.
TAPS = np.array(
    [(0, 0, -1), (0, 0, -2), (0, 0, -3)]
    + [(0, -1, dx) for dx in (-3, -2, -1, 1, 2, 3)]
    + [(0, -2, dx) for dx in (-3, -2, -1, 0, 1, 2, 3)]
    + [(0, -3, 0), (3, 0, 0)]
    + [(plane, *offset) for plane in (1, 2) for offset in _AROUND],
    np.int64,
)
WEST = 3  # the first taps, in the row that is being decoded
# Taps of a band without references, with one, and with two.
USED = (18, 26, 34)
# Weights are in 1/1024, within +-WEIGHT_MAX.
WEIGHT_SHIFT, WEIGHT_MAX = 10, 4095

SAMPLES = 8192  # that a fit of a band uses
THINNING = 4  # a fit uses every fourth sample of a small chunk, down to SAMPLES / THINNING
ROUNDS = 3  # of the fit; from the second on, large errors count less
INPUT_BITS = 13  # inputs are halved until most are below this; then sums of products are exact in a double
WEIGHT_COST = 7  # bits of a weight
MIN_SAMPLES = 256  # fewer are not worth a fit

# Means of the rows above: a box of 2 MEAN_REACH + 1 samples, and how fast they follow, 2**-MEAN_SHIFT a row.
MEAN_REACH, MEAN_SHIFT, MEAN_SCALE = 8, 3, 4


@inner
def add_row(means, row, first):
    """Let the means, int64 (W) in 1/16, follow a row of samples with a border of 3."""
    width = means.size
    total = np.int64(0)
    for x in range(-MEAN_REACH, MEAN_REACH + 1):
        total += np.int64(row[3 + min(max(x, 0), width - 1)])
    for x in range(width):
        box = (total << MEAN_SCALE) // (2 * MEAN_REACH + 1)
        means[x] = box if first else means[x] + ((box - means[x]) >> MEAN_SHIFT)
        total += np.int64(row[3 + min(x + 1 + MEAN_REACH, width - 1)]) - np.int64(row[3 + max(x - MEAN_REACH, 0)])


@jit
def _means(plane, top, ys, xs, means, out):
    """Fill `out` with the means that the filter sees at samples (ys, xs), in row-major order, of rows of a band.

    `plane` has these rows, from row `top` of the band on, with a border. `means` int64 (W,) are of the rows above.
    """
    n = 0
    for y in range(top, top + plane.shape[0] - 4):
        while n < len(ys) and ys[n] == y:
            out[n] = means[xs[n]] >> MEAN_SCALE
            n += 1
        add_row(means, plane[3 + y - top], y == 0)


@jit
def _inputs(planes, taps, top, ys, xs, means, out):
    """Fill `out` (N, taps + 1) with the inputs of the taps and, last, what they predict, at the samples (ys, xs).

    `planes` have rows from row `top` on.
    """
    for n in range(len(ys)):
        y, x = ys[n] - top + 3, xs[n] + 3
        north = planes[0, y - 1, x]
        for t in range(len(taps)):
            plane, ty, tx = taps[t, 0], y + taps[t, 1], x + taps[t, 2]
            if plane < 3:
                out[n, t] = np.int64(planes[plane, ty, tx]) - np.int64(planes[plane, y - 1, x])
            else:
                out[n, t] = means[n] - north
        out[n, len(taps)] = np.int64(planes[0, y, x]) - north


@jit
def _sum_products(values, confidence, matrix, right):
    """Add products of inputs with one another to the lower half of `matrix`, and with the last column to `right`.

    A library would do the same, but its threads spin for a while after so small a product.
    """
    taps = len(right)
    for n in range(len(values)):
        row = values[n]
        for i in range(taps):
            scaled, matrix_row = row[i] * confidence[n], matrix[i]
            right[i] += scaled * row[taps]
            for j in range(i + 1):
                matrix_row[j] += scaled * row[j]


@jit
def _solve(matrix, right, lower, z):
    """Solve a positive definite system, of which the lower half counts, by Cholesky's method in a fixed order.

    `z` becomes the solution; `lower` float64 (n, n) is memory.
    """
    n = len(right)
    for i in range(n):
        for j in range(i + 1):
            total = matrix[i, j]
            for k in range(j):
                total -= lower[i, k] * lower[j, k]
            lower[i, j] = math.sqrt(max(total, 1e-9)) if i == j else total / lower[j, j]
    for i in range(n):
        total = right[i]
        for k in range(i):
            total -= lower[i, k] * z[k]
        z[i] = total / lower[i, i]
    for i in range(n - 1, -1, -1):
        total = z[i]
        for k in range(i + 1, n):
            total -= lower[k, i] * z[k]
        z[i] = total / lower[i, i]


def _confidence(activity: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return integers 1..1024 that fall with the square of the activity."""
    quiet = int(np.sort(activity)[len(activity) // 8])
    ratio = np.minimum(quiet / activity, 1.0)
    return 1 + np.floor(1023 * ratio * ratio)


class Sampled:
    """Samples of a band that a fit uses: none of a small band.

    Parameters
    ----------
    height, width : int
        Of the band.
    """

    def __init__(self, height: int, width: int) -> None:
        total = height * width
        count = min(max(total // THINNING, SAMPLES // THINNING), SAMPLES, total) if total >= MIN_SAMPLES else 0
        rows, columns = np.divmod(np.arange(count) * total // max(count, 1), width)
        if count < total:  # a step that divides the width must not choose the same columns in each row
            columns = (columns + 7 * rows) % width
        self._rows, self._columns = rows[rows > 0], columns[rows > 0]
        self._means, self._above = np.empty(len(self._rows), np.int64), np.zeros(width, np.int64)

    def __len__(self) -> int:
        """Return their number."""
        return len(self._rows)

    def follow(self, plane: NDArray[np.int32], top: int) -> slice:
        """Follow the means of rows from row `top` on, strip by strip.

        Parameters
        ----------
        plane : ndarray
            int32 (rows + 4, W + 6): the rows with a border of 3, but one row below.

        Returns
        -------
        slice
            Of the samples in these rows.
        """
        part = slice(*np.searchsorted(self._rows, (top, top + len(plane) - 4)).tolist())
        _means(plane, top, self._rows[part], self._columns[part], self._above, self._means[part])
        return part

    def inputs(self, planes: NDArray[np.int32], top: int, part: slice, out: NDArray[np.int64]) -> None:
        """Fill a part of `out` int64 (samples, taps + 1) with the inputs of the taps and, last, what they predict.

        `planes` int32 (3, rows + 4, W + 6) has the rows of the part, and those of references.
        """
        taps = TAPS[: out.shape[1] - 1]
        _inputs(planes, taps, top, self._rows[part], self._columns[part], self._means[part], out[part])


def fit(values: NDArray[np.int64], total: int, inherited: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
    """Choose the weights of the filter of a band.

    Parameters
    ----------
    values : ndarray
        int64 (samples, taps + 1), from `Sampled.inputs`.
    total : int
        Samples of the band.
    inherited : ndarray
        int64 (taps): weights that cost nothing.

    Returns
    -------
    (ndarray, float)
        int64 (taps), and about how many bits they save.
    """
    used = values.shape[1] - 1
    weights = inherited.copy()
    weights[used:] = 0
    values = values[values.any(axis=1)]  # nothing is learned where all is constant
    if not len(values):
        return weights, 0.0
    largest = np.abs(values).max(axis=1)
    values >>= max(0, 1 + int(np.sort(largest)[len(largest) * 15 // 16]).bit_length() - INPUT_BITS)
    values = values[np.abs(values).max(axis=1) < 1 << INPUT_BITS]
    fitted = _fit_band(values)
    inherited_loss, fitted_loss, none = (_loss(values, w) for w in (weights[:used], fitted, np.zeros_like(fitted)))
    # a Laplacian's bits follow the logarithm of its mean error
    saved = total * math.log2(inherited_loss / fitted_loss)
    if saved > used * WEIGHT_COST:
        weights[:used] = fitted
        return weights, total * math.log2(none / fitted_loss) - used * WEIGHT_COST
    return weights, total * math.log2(none / inherited_loss)


def _activity(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the local size of differences between samples of the band, in 1/32, at least 16."""
    return 8 * np.abs(values[:, [0, 1, 5, 6, 7, 12]]).sum(1) + 128


def _errors(values: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the absolute errors of the filter, in 1/32."""
    predicted = values[:, :-1] @ weights >> (WEIGHT_SHIFT - 5)
    return np.abs((values[:, -1] << 5) - predicted)


def _loss(values: NDArray[np.int64], weights: NDArray[np.int64]) -> float:
    """Return the mean error in units of the local activity."""
    return float(np.floor(_errors(values, weights) * 1024 / _activity(values)).sum()) + 1


def _fit_band(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fit the weights of one band from samples (N, taps + 1)."""
    activity = _activity(values)
    confidence = _confidence(activity)
    exact = values.astype(np.float64)
    taps = exact.shape[1] - 1
    weights = np.zeros(taps, np.int64)
    for _ in range(ROUNDS):
        # integers below 2^53 throughout: the same in whatever order they are added
        matrix, right = np.zeros((taps, taps)), np.zeros(taps)
        _sum_products(exact, confidence, matrix, right)
        matrix[np.diag_indices_from(matrix)] += np.floor(confidence.sum() / 64) + 1
        solution = np.zeros(taps)
        _solve(matrix, right, np.zeros((taps, taps)), solution)
        weights = np.floor(solution * (1 << WEIGHT_SHIFT) + 0.5)
        weights = np.clip(weights, -WEIGHT_MAX, WEIGHT_MAX).astype(np.int64)
        confidence = _confidence(activity // 4 + 2 * _errors(values, weights))
    return weights
