"""The spectral transform: bands that resemble one another become components of which few hold most of the detail.

It is the Karhunen-Loève transform of the differences between neighbouring samples, so that edges decide, and of their
means with a small weight. All arithmetic is exact, or is done by single operations of IEEE 754, so equal samples have
equal matrices on every machine.
Products of matrices are sums of integers below 2^53, which float64 adds exactly in any order.

Matrices are int16 (components, bands) in units of 1/16384, with orthonormal rows. Values are integers
(slices, height, width, bands), components have FRACTION_BITS binary places.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div, row_blocks
from deepsic_codec.payload.spectral import MATRIX_BITS, UNIT, Matrix
from deepsic_codec.payload.steps import FRACTION_BITS

# Binary places of the matrix that samples are multiplied by: rows of 14 are not orthonormal enough for 16 bits.
PRECISE_BITS = 20
# With these limits all sums of products are exact. Damaged payloads may have larger components.
MAX_VALUE, MAX_COMPONENT = 1 << 22, (1 << 28) - 1

# Multiplications that a fit may take: it skips rows of images with many bands.
FIT_PRODUCTS = 1 << 31
BLOCK = 1 << 16  # differences, or pixels, at a time
FEW_BANDS = 16  # up to which compiled loops over rows are faster than products of matrices
MEAN_PIXELS = 1 << 12  # pixels of a block, whose mean counts as one difference
# Differences are fitted without bits beyond these, so that the sums of their products are exact.
FIT_BITS = 16

# Bits that the transform has to save in each sample, by the estimate of `_saving`.
MIN_SAVING = 1 / 16
# Differences below this share of the step count for nothing there: those between blocks of pixels are larger.
DETAIL = 1 / 16


def largest(values: NDArray[Any]) -> int:
    """Return the largest magnitude of integers."""
    return max(int(values.max()), -int(values.min()))


def forward(values: NDArray[Any], matrix: Matrix) -> NDArray[np.int32]:
    """Return the components int32 of values of at most MAX_VALUE: matrix times values, rounded half up."""
    return _product(values, refined(matrix).T, PRECISE_BITS - FRACTION_BITS)


def inverse(components: NDArray[Any], matrix: Matrix) -> NDArray[np.int32]:
    """Undo `forward`, but for rounding: transposed matrix times components, rounded half up, int32."""
    components = np.clip(components, -MAX_COMPONENT, MAX_COMPONENT)
    return _product(components, refined(matrix), PRECISE_BITS + FRACTION_BITS)


def forward_planes(values: NDArray[Any], matrix: Matrix, components: NDArray[Any]) -> None:
    """Write what `forward` gives for values (slices, height, width, bands) to (slices, components, height, width).

    Components are int32, or int16 where they fit.
    """
    by_pixel, factors = np.moveaxis(components, 1, -1), refined(matrix)
    for number, rows in row_blocks(values.shape):
        if values.shape[-1] > FEW_BANDS:
            by_pixel[number, rows] = forward(values[number, rows], matrix)
        else:
            from deepsic_codec.codec import spectral_rows  # compiled code, which reading labels does not need

            bits = PRECISE_BITS - FRACTION_BITS
            spectral_rows.forward(values[number, rows], factors, bits, components, number, rows.start)


def inverse_planes(components: NDArray[Any], matrix: Matrix, number: int, rows: slice, dtype: Any) -> NDArray[Any]:
    """Return what `inverse` gives for some rows of a slice of components (slices, components, height, width).

    Values (rows, width, bands) may be uint8 if that is the dtype, clipped to it.
    """
    if matrix.shape[1] > FEW_BANDS:
        return inverse(np.moveaxis(components, 1, -1)[number, rows], matrix)
    from deepsic_codec.codec import spectral_rows

    bits = PRECISE_BITS + FRACTION_BITS
    return spectral_rows.inverse(components, number, rows, MAX_COMPONENT, refined(matrix), bits, dtype)


def refined(matrix: Matrix) -> NDArray[np.int64]:
    """Return the matrix in units of 2^-PRECISE_BITS, with rows that are orthonormal to about its last bits.

    One step of Newton's method, (3 I - M M^T) M / 2, squares the deviation that rounding to 14 bits left.
    """
    rows = matrix.astype(np.int64)
    correction = 3 * np.eye(len(rows), dtype=np.int64) * UNIT**2 - rows @ rows.T
    shift = 3 * MATRIX_BITS + 1 - PRECISE_BITS
    return (correction @ rows + (1 << shift - 1)) >> shift


def _product(values: NDArray[Any], matrix: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Multiply values (..., n) by a matrix (n, m) in units of 2^-bits."""
    factors = matrix.astype(np.float64)
    flat = values.reshape(-1, values.shape[-1])
    out = np.empty((len(flat), matrix.shape[1]), np.int32)
    for start in range(0, len(flat), BLOCK):
        total = flat[start : start + BLOCK].astype(np.float64) @ factors
        total += 1 << bits - 1
        total /= 1 << bits
        np.floor(total, out=total)
        out[start : start + BLOCK] = total
    return out.reshape(*values.shape[:-1], -1)


def _differences(values: NDArray[Any], mask: NDArray[np.bool_] | None) -> Iterator[NDArray[np.float64]]:
    """Yield differences (pairs, bands) of horizontal and vertical neighbours, 0 where either is no data."""
    slices, height, width, bands = values.shape
    lines = values.reshape(-1, width, bands)
    holes = None if mask is None else np.broadcast_to(mask, values.shape).reshape(-1, width, bands)
    numbers = np.arange(0, len(lines), _line_step(values))
    count = max(1, BLOCK // width)
    for start in range(0, len(numbers), count):
        block = numbers[start : start + count]
        upper = block[block % height != height - 1]
        for first, second in (((block, slice(None, -1)), (block, slice(1, None))), ((upper,), (upper + 1,))):
            difference = lines[second].astype(np.float64) - lines[first]
            if holes is not None:
                difference[holes[first] | holes[second]] = 0
            yield difference.reshape(-1, bands)


def _line_step(values: NDArray[Any]) -> int:
    return max(1, ceil_div(2 * values.size * values.shape[-1], FIT_PRODUCTS))


def _difference_products(
    values: NDArray[Any], mask: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int64], int, NDArray[np.int64]]:
    """Return the sums of products of differences (bands, bands), the number of pairs, and the sums of bands, int64."""
    slices, height, width, bands = values.shape
    if mask is None and bands <= FEW_BANDS and _line_step(values) == 1:
        from deepsic_codec.codec.spectral_rows import difference_products

        total, sums = difference_products(values)
        return total, slices * (height * (width - 1) + (height - 1) * width), sums
    total, pairs = np.zeros((bands, bands), np.int64), 0
    for difference in _differences(values, mask):
        total += (difference.T @ difference).astype(np.int64)
        pairs += len(difference)
    sums = np.array([band.sum(dtype=np.int64) for band in np.moveaxis(values, -1, 0)])  # faster than all bands at once
    return total, pairs, sums


def _mean_products(means: NDArray[np.int64], pairs: int) -> NDArray[np.int64]:
    """Return the products of means, as many as there are blocks of pixels.

    Differences do not see the means. Without these products, components of mere noise share them, and none can be left
    out.
    """
    return np.outer(means, means) * pairs // MEAN_PIXELS


def _principal_axes(products: NDArray[np.int64]) -> Matrix:
    """Return the eigenvectors of a symmetric matrix as rows, by falling eigenvalue."""
    from deepsic_codec.codec.jacobi import eigenvectors  # compiled code, which reading labels does not need

    rows = fixed_point(eigenvectors(products.astype(np.float64)))
    sums = rows.sum(axis=1, dtype=np.int64)
    return np.where((sums < 0)[:, None], -rows, rows).astype(np.int16)


def fixed_point(matrix: NDArray[np.float64]) -> Matrix:
    """Round a matrix to units of 1/16384."""
    return np.floor(matrix * UNIT + 0.5).astype(np.int16)


def choose(
    values: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    step: float,
    matrix: NDArray[np.float64] | None = None,
) -> Matrix | None:
    """Choose the transform of a chunk.

    Parameters
    ----------
    values : ndarray
        Integers (slices, height, width, bands) of at most MAX_VALUE, samples without data filled.
    mask : ndarray or None
        bool of the same shape, true where a sample is no data.
    step : float
        Step of the quantiser, in units of the values, or a guess. Detail far below it costs no bits.
    matrix : ndarray, optional
        The caller's, float64 (bands, bands), orthonormal. By default it is fitted.

    Returns
    -------
    Matrix or None
        None if bands coded without a transform take fewer bits, by an estimate.
    """
    shift = max(0, largest(values).bit_length() - FIT_BITS)
    narrow = values >> shift if shift else values
    products, pairs, sums = _difference_products(narrow, mask)
    means = sums // (narrow.size // narrow.shape[-1])
    rows = _principal_axes(products + _mean_products(means, pairs)) if matrix is None else fixed_point(matrix)
    energies = _energies(products, rows)
    least = max(1, pairs * round((step * DETAIL) ** 2 * 4.0**-shift))  # energy of differences that costs no bits
    if matrix is None:
        saving = _saving(np.diagonal(products), energies, least)
        if saving < MIN_SAVING * len(rows) or saving * values[..., 0].size < 16 * rows.size:
            return None
    return rows[np.argsort(-energies, kind="stable")]


def root_mean_squares(components: NDArray[Any]) -> NDArray[np.float64]:
    """Return the root mean square of each component (..., components) in units, the same on every machine."""
    squares = []
    for number in range(components.shape[-1]):
        part = components[..., number].astype(np.int64)
        shift = max(0, largest(part).bit_length() - 16)  # so that the sum fits 64 bits
        squares.append((int(np.square(part >> shift).sum()) << 2 * shift) / part.size)
    return np.sqrt(squares) / (1 << FRACTION_BITS)


def _energies(products: NDArray[np.int64], rows: Matrix) -> NDArray[np.int64]:
    """Return the sums of squared differences of components, from the sums of products of differences of bands."""
    shift = max(0, int(np.diagonal(products).max()).bit_length() - 22)  # so that sums fit 64 bits
    wide = rows.astype(np.int64)
    total = (wide @ (products >> shift) * wide).sum(axis=1)
    return np.maximum(total >> 2 * MATRIX_BITS, 0) << shift


def _saving(bands: NDArray[np.int64], components: NDArray[np.int64], least: int) -> float:
    """Estimate the bits that components save in each pixel: half the logarithm of the ratio of their energies.

    Integers make it the same on every machine, as logarithms in floating point might not be.
    """
    before, after = 1, 1
    for band, component in zip(bands.tolist(), components.tolist(), strict=True):
        before *= band + least
        after *= component + least
    return ((before**16).bit_length() - (after**16).bit_length()) / 32
