"""The spectral transform of few bands: compiled loops over rows of pixels, which stay in the cache.

They are exact, as the products of matrices in `spectral` are: sums of integers below 2^53, here in any order, too.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import row_blocks
from deepsic_codec.kernels import float_jit, inner, int32, jit

MIN_PART = 64  # products of differences that 32 bits have to hold, to be added in 32 bits


@inner
def _take_apart(line, rows):
    """Copy pixels (width, bands) to rows (bands, width)."""
    width, bands = line.shape
    if bands == 3:
        first, second, third = rows[0], rows[1], rows[2]
        for x in range(width):
            first[x] = line[x, 0]
            second[x] = line[x, 1]
            third[x] = line[x, 2]
    else:
        for x in range(width):
            for n in range(bands):
                rows[n, x] = line[x, n]


@inner
def _put_together(line, rows):
    """Undo `_take_apart`."""
    width, bands = line.shape
    if bands == 3:
        first, second, third = rows[0], rows[1], rows[2]
        for x in range(width):
            line[x, 0] = first[x]
            line[x, 1] = second[x]
            line[x, 2] = third[x]
    else:
        for x in range(width):
            for n in range(bands):
                line[x, n] = rows[n, x]


@float_jit
def _add_up(total, rows, factors, half):
    """Make `total` (width,) one half and the sum of rows times factors."""
    count = len(factors)
    for x in range(total.size):
        total[x] = half
    if count % 2:
        row, factor = rows[count - 1], factors[count - 1]
        for x in range(total.size):
            total[x] += factor * row[x]
    for n in range(0, count - 1, 2):
        row, factor, other, weight = rows[n], factors[n], rows[n + 1], factors[n + 1]
        for x in range(total.size):
            total[x] += factor * row[x] + weight * other[x]


@jit
def _forward(values, factors, bits, rows, total, components, number, top):
    """Write components of pixels (height, width, bands) to (slices, components, height, width), from row `top` on.

    `factors` float64 (components, bands) are in units of 2^-bits; `rows` float64 (bands, width) and `total` are memory.
    """
    half, unit = 0.5 * (1 << bits), 1.0 / (1 << bits)
    for y in range(values.shape[0]):
        _take_apart(values[y], rows)
        for n in range(len(factors)):
            _add_up(total, rows, factors[n], half)
            out = components[number, n, top + y]
            for x in range(total.size):
                out[x] = int32(np.floor(total[x] * unit))


@jit
def _inverse(components, number, top, max_component, factors, bits, rows, total, bands, values, low, high):
    """Undo `_forward` with the transposed `factors`; values are clipped to a range, `bands` is memory for them."""
    half, unit = 0.5 * (1 << bits), 1.0 / (1 << bits)
    limit, smallest, largest = int32(max_component), float(low), float(high)
    for y in range(values.shape[0]):
        for n in range(len(rows)):
            line, row = components[number, n, top + y], rows[n]
            for x in range(row.size):
                row[x] = min(max(int32(line[x]), int32(-limit)), limit)
        for n in range(len(factors)):
            _add_up(total, rows, factors[n], half)
            band = bands[n]
            for x in range(total.size):
                band[x] = int32(min(max(np.floor(total[x] * unit), smallest), largest))
        _put_together(values[y], bands)


@inner
def _product(one, other, part):
    """Return the sum of products of integers; those of so many numbers fit 32 bits, unless `part` is 0."""
    total = np.int64(0)
    if part == 0:
        for x in range(one.size):
            total += np.int64(one[x]) * np.int64(other[x])
    else:
        for start in range(0, one.size, part):
            first, second = one[start : start + part], other[start : start + part]
            short = int32(0)
            for x in range(first.size):
                short += int32(first[x] * second[x])
            total += short
    return total


@jit
def _differences(values, count, part, rows, differences, products, sums):
    """Add up products of differences of pixels, and the pixels of the first `count` rows.

    Parameters
    ----------
    values : ndarray
        (height, width, bands); rows from `count` on have no horizontal differences.
    part : int
        Products that 32 bits can hold, or 0.
    rows, differences : ndarray
        Memory int32 (2, bands, width), (2, bands, width).
    products, sums : ndarray
        int64 (bands, bands), of which half is written, and (bands,).
    """
    bands = values.shape[2]
    for y in range(values.shape[0]):
        _take_apart(values[y], rows[y & 1])
        for n in range(bands):
            row, above, beside = rows[y & 1, n], rows[1 - (y & 1), n], rows[y & 1, n][1:]
            horizontal, vertical, total = differences[0, n], differences[1, n], np.int64(0)
            if y < count:
                for x in range(beside.size):
                    horizontal[x] = beside[x] - row[x]
                for x in range(row.size):
                    total += row[x]
                sums[n] += total
            if y > 0:
                for x in range(row.size):
                    vertical[x] = row[x] - above[x]
            for m in range(n + 1):
                if y < count:
                    products[m, n] += _product(differences[0, m][: beside.size], horizontal, part)
                if y > 0:
                    products[m, n] += _product(differences[1, m], vertical, part)


def forward(
    values: NDArray[Any], factors: NDArray[np.int64], bits: int, components: NDArray[Any], number: int, top: int
) -> None:
    """Write components int16 or int32 (slices, components, height, width) of values, from a row of a slice on."""
    bands, width = factors.shape[1], values.shape[1]
    rows, total = np.empty((bands, width)), np.empty(width)
    _forward(_of_pixels(values), factors.astype(np.float64), bits, rows, total, components, number, top)


def inverse(
    components: NDArray[Any],
    number: int,
    rows: slice,
    max_component: int,
    factors: NDArray[np.int64],
    bits: int,
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """Return the values (rows, width, bands) of some rows of a slice: uint8, if that is the dtype, or int32."""
    (count, bands), width = factors.shape, components.shape[3]
    values = np.empty((rows.stop - rows.start, width, bands), np.uint8 if dtype == np.uint8 else np.int32)
    info, by_band = np.iinfo(values.dtype), np.ascontiguousarray(factors.T, np.float64)
    memory = np.empty((count, width)), np.empty(width), np.empty((bands, width), np.int32)
    low, high = int(info.min), int(info.max)
    _inverse(components, number, rows.start, max_component, by_band, bits, *memory, values, low, high)
    return values


def difference_products(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the products of differences of values (slices, height, width, bands), and the sums of bands."""
    _, height, width, bands = values.shape
    part = ((1 << 31) - 1) // max(1, int(values.max()) - int(values.min())) ** 2
    memory = np.empty((2, bands, width), np.int32), np.empty((2, bands, width), np.int32)
    products, sums = np.zeros((bands, bands), np.int64), np.zeros(bands, np.int64)
    for number, rows in row_blocks(values.shape):
        block = _of_pixels(values[number, rows.start : rows.stop + 1])  # and the row below
        count = rows.stop - rows.start
        _differences(block, count, part if part >= MIN_PART else 0, *memory, products, sums)
    return products + np.triu(products, 1).T, sums


def _of_pixels(values: NDArray[Any]) -> NDArray[Any]:
    """Return values in C order, uint8 or int32."""
    return np.ascontiguousarray(values, np.uint8 if values.dtype == np.uint8 else np.int32)
