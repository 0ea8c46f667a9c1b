"""The fixed filter of the residual coder: its taps, and how an encoder chooses the weights of a chunk.

The taps are part of the format (`docs/residual.md`). The choice of weights is not: any weights decode. Here they are a
least-squares fit, weighted by the inverse square of the local activity, which comes near the fewest bits. It runs on
exact integers up to a Cholesky solution in a fixed order of IEEE double operations, so that equal chunks become equal
bytes on every machine.
"""

import math

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.coders.numba_jit import array_jit, jit

_CROSS = ((0, -1), (-1, 0), (0, 1), (1, 0))
_AROUND = (*_CROSS, (-1, -1), (-1, 1), (1, -1), (1, 1))

# Taps (plane, dy, dx). Planes 0, 1, 2 are the residuals of this band, the band before, and the band before that; planes
# 3, 4, 5 the decoded samples of the same bands, less the sample at the same pixel.
TAPS = np.array(
    [(0, *o) for o in ((0, -1), (0, -2), (-1, 0), (-1, -1), (-1, 1), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1))]
    + [(3, *o) for o in _AROUND]
    + [(1, *o) for o in ((0, 0), *_AROUND)]
    + [(4, *o) for o in _AROUND]
    + [(2, *o) for o in ((0, 0), *_CROSS)]
    + [(5, *o) for o in _AROUND],
    np.int64,
)
# Taps of the first, the second, and any later band: none reaches before the first band.
USED = (18, 35, 48)
# Weights are in 1/256, within +-WEIGHT_MAX.
WEIGHT_SHIFT, WEIGHT_MAX = 8, 2047

# Index after the weights of a band: how far slopes are shifted down before they count as local size.
SLOPE_SHIFT, SLOPE_SHIFT_BITS = len(TAPS), 4
SLOPES = 6  # mean slope over mean error after the shift, at most

SAMPLES = 4096  # that a fit of a band uses: more gain 0.1 % and take as long as the coding
THINNING = 4  # a fit uses every fourth sample of a small chunk, down to SAMPLES / THINNING
ROUNDS = 2  # of the fit; from the second on, large errors count less
INPUT_BITS = 12  # inputs are halved until they are below this, so that sums of products are exact in a double
WEIGHT_COST = 6  # bits of a weight
MIN_SAMPLES = 256  # fewer are not worth a fit


@jit
def _inputs(residual, context, taps, band, where, out):
    """Fill `out` (N, taps + 1) with the inputs of the taps and, last, the residual, at the samples `where` (N, 3)."""
    height, width = residual.shape[1], residual.shape[2]
    for n in range(len(where)):
        s, y, x = where[n, 0], where[n, 1], where[n, 2]
        for t in range(len(taps)):
            plane, ty, tx = taps[t, 0], y + taps[t, 1], x + taps[t, 2]
            if plane < 3:
                within = 0 <= ty < height and 0 <= tx < width
                out[n, t] = residual[s, ty, tx, band - plane] if within else 0
            else:
                ty, tx = min(max(ty, 0), height - 1), min(max(tx, 0), width - 1)
                b = band - plane + 3
                out[n, t] = np.int64(context[s, ty, tx, b]) - np.int64(context[s, y, x, b])
        out[n, len(taps)] = residual[s, y, x, band]


@jit
def _sum_products(values, confidence, matrix, right):
    """Add products of inputs with one another to `matrix`, and with the residual, the last column, to `right`.

    A library would do the same, but its threads spin for a while after so small a product.
    """
    taps = len(right)
    for n in range(len(values)):
        row = values[n]
        for i in range(taps):
            scaled, matrix_row = row[i] * confidence[n], matrix[i]
            right[i] += scaled * row[taps]
            for j in range(taps):
                matrix_row[j] += scaled * row[j]


@array_jit
def _solve(matrix, right):
    """Solve a positive definite system, by Cholesky's method in a fixed order of operations."""
    n = len(right)
    lower = np.zeros((n, n))
    z = np.zeros(n)
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
    return z


def _confidence(activity: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return integers 1..1024 that fall with the square of the activity."""
    quiet = int(np.sort(activity)[len(activity) // 8])
    ratio = np.minimum(quiet / activity, 1.0)
    return 1 + np.floor(1023 * ratio * ratio)


def fit(residual: NDArray[np.int32], context: NDArray[np.int32]) -> NDArray[np.int64]:
    """Choose the weights of the fixed filter for a chunk, from the arguments of the coder.

    Returns int64 (C, taps + 1), the last column being slope shifts. A band without gain repeats the weights of the one
    before.
    """
    slices, height, width, bands = residual.shape
    total = slices * height * width
    weights = np.zeros((bands, SLOPE_SHIFT + 1), np.int64)
    samples = min(max(total // THINNING, SAMPLES // THINNING), SAMPLES, total)
    row, column = np.divmod(np.arange(samples) * total // samples, width)
    if samples < total:  # a step that divides the width must not choose the same columns in each row
        column = (column + 7 * row) % width
    where = np.stack([*np.divmod(row, height), column], axis=1)
    for band in range(bands):
        if band:
            weights[band] = weights[band - 1]
        used = USED[min(band, 2)]
        values = np.empty((len(where), used + 1), np.int64)
        _inputs(residual, context, TAPS[:used], band, where, values)
        values >>= max(0, int(np.abs(values).max()).bit_length() - INPUT_BITS)
        fitted = _fit_band(values, band > 0) if total >= MIN_SAMPLES else weights[band, :used]
        inherited_loss, fitted_loss = (_loss(values, w) for w in (weights[band, :used], fitted))
        # a Laplacian's bits follow the logarithm of its mean error
        if total * math.log2(inherited_loss / fitted_loss) > used * WEIGHT_COST:
            weights[band, :used] = fitted
        weights[band, SLOPE_SHIFT] = _slope_shift(values, weights[band, :used])
    return weights


def _slope_shift(values: NDArray[np.int64], weights: NDArray[np.int64]) -> int:
    """Return the shift that brings slopes near the size of errors: residuals may count steps of any size."""
    slopes, errors = 32 * int(np.abs(values[:, 10:14]).sum()), int(_errors(values, weights).sum()) + 1
    shift = 0
    while slopes > SLOPES * errors << shift and shift < (1 << SLOPE_SHIFT_BITS) - 1:
        shift += 1
    return shift


def _activity(values: NDArray[np.int64], inter: bool) -> NDArray[np.int64]:
    """Return the local size of residuals and slopes, in 1/32, at least 16."""
    size = np.abs(values)
    result = size[:, :6] @ np.array([4, 1, 4, 2, 2, 2])
    if inter:
        result += size[:, 18:23] @ np.array([8, 2, 2, 2, 2])
        result //= 2
    return 2 * result + 2 * size[:, 10:14].sum(1) + 16


def _errors(values: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the absolute errors of the filter, in 1/32."""
    predicted = values[:, :-1] @ weights >> (WEIGHT_SHIFT - 5)
    return np.abs((values[:, -1] << 5) - predicted)


def _loss(values: NDArray[np.int64], weights: NDArray[np.int64]) -> float:
    """Return the mean error in units of the local activity."""
    activity = _activity(values, values.shape[1] > USED[0] + 1)
    return float(np.floor(_errors(values, weights) * 1024 / activity).sum()) + 1


def _fit_band(values: NDArray[np.int64], inter: bool) -> NDArray[np.int64]:
    """Fit the weights of one band from samples (N, taps + 1)."""
    activity = _activity(values, inter)
    confidence = _confidence(activity)
    exact = values.astype(np.float64)
    taps = exact.shape[1] - 1
    weights = np.zeros(taps, np.int64)
    for _ in range(ROUNDS):
        # integers below 2^53 throughout: the same in whatever order they are added
        matrix, right = np.zeros((taps, taps)), np.zeros(taps)
        _sum_products(exact, confidence, matrix, right)
        matrix[np.diag_indices_from(matrix)] += np.floor(confidence.sum() / 64) + 1
        weights = np.floor(_solve(matrix, right) * (1 << WEIGHT_SHIFT) + 0.5)
        weights = np.clip(weights, -WEIGHT_MAX, WEIGHT_MAX).astype(np.int64)
        confidence = _confidence(activity + _errors(values, weights))
    return weights
