"""The filter at the end of wavelets: what quantisation takes from the components, as far as the rest of them tells.

A small convolutional network, the same for all imagery, looks at the surroundings of each square of 2x2 samples of a
component in steps of the quantiser, and corrects the four. `docs/wavelet.md` is normative.
"""

import base64
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.kernels import inline, inner, int32, jit
from deepsic_codec.model.cpu.dot import OUTPUTS, POSITIONS, check, pack_taps, padded, row_sums
from deepsic_codec.payload.steps import MANTISSA_BITS, MANTISSAS, PER_OCTAVE

#: Outputs, inputs and taps of the layers.
LAYERS = ((32, 4, 9), (32, 32, 1), (32, 32, 1), (4, 32, 9))
WEIGHTS = Path(__file__).parents[1] / "data" / "wavelet-filter.txt"
#: Binary places of samples in steps, and of corrections in steps.
SAMPLE_BITS, CHANGE_BITS = 5, 8
#: Shift of a sample at code 0, which has `MANTISSA_BITS` places of a factor too many and 2^-4 of a step in a sixteenth.
SAMPLE_SHIFT, CHANGE_SHIFT = MANTISSA_BITS + 4 - 8 - SAMPLE_BITS, MANTISSA_BITS + 8 - 4 + CHANGE_BITS
_LOW, _HIGH, _BYTE = -(1 << 15), (1 << 15) - 1, int32(255)
_CHANGE = int32((1 << 15) - 1)
GROUPS = LAYERS[0][0] // 4  # of hidden values
# Rows of narrow planes that are filtered at a time, and those around them that they depend on; even numbers.
TURNED_ROWS, REACH = 1 << 10, 4
#: Factors of samples by the part of an octave, in 2^-MANTISSA_BITS.
INVERSES = tuple(round(2 ** (MANTISSA_BITS - n / PER_OCTAVE)) for n in range(PER_OCTAVE))


class FilterTables(NamedTuple):
    """All layers of the filter.

    Attributes
    ----------
    first, inner, last : int32 (n,)
        Weights as `row_sums` reads them; those of the inner layers follow one another.
    first_start : int32 (hidden,POSITIONS)
        What sums start with.
    inner_start : int32 (layers hidden,POSITIONS)
    last_start, nothing : int32 (OUTPUTS,POSITIONS)
    first_shift, inner_shift, last_shift : int32 (hidden,), (layers hidden,), (OUTPUTS,)
    """

    first: NDArray[np.int32]
    inner: NDArray[np.int32]
    last: NDArray[np.int32]
    first_start: NDArray[np.int32]
    inner_start: NDArray[np.int32]
    last_start: NDArray[np.int32]
    nothing: NDArray[np.int32]
    first_shift: NDArray[np.int32]
    inner_shift: NDArray[np.int32]
    last_shift: NDArray[np.int32]


class FilterRows(NamedTuple):
    """Memory for rows of squares of a plane.

    Attributes
    ----------
    samples : int32 (2,2 pitch)
        Two rows of samples, with two more at both sides.
    low, high : int32 (3 pitch,)
        Words of the lower, and the upper bytes of the samples of squares, with one square more at both sides.
    hidden : int32 (2,groups pitch)
        Hidden values of a row, four bytes in a word, before a layer and after it.
    kept : int32 (groups 3 pitch,)
        Those after the last hidden layer of three rows, with one square more at both sides.
    sums, upper : int32 (OUTPUTS,pitch)
    starts_first, starts_inner, starts_last : int32 (9,), (groups,), (9 groups,)
        Where the words of each tap begin.
    """

    samples: NDArray[np.int32]
    low: NDArray[np.int32]
    high: NDArray[np.int32]
    hidden: NDArray[np.int32]
    kept: NDArray[np.int32]
    sums: NDArray[np.int32]
    upper: NDArray[np.int32]
    starts_first: NDArray[np.int32]
    starts_inner: NDArray[np.int32]
    starts_last: NDArray[np.int32]


@lru_cache(maxsize=2)
def tables(turned: bool = False) -> FilterTables:
    """Read the layers of the filter, or those that do the same to a transposed plane."""
    check()
    data = np.frombuffer(base64.b85decode(WEIGHTS.read_text().replace("\n", "")), np.int8)
    weights, shifts, starts = [], [], []
    for outputs, inputs, taps in LAYERS:
        count = outputs * inputs * taps
        weight, shift = data[:count].reshape(outputs, inputs, taps), data[count : count + outputs].astype(np.int32)
        bias = data[count + outputs : count + 5 * outputs].view("<i4").astype(np.int32)
        if turned:  # rows and columns of taps change places, and so do two samples of a square
            edge = isqrt(taps)
            weight = weight.reshape(outputs, inputs, edge, edge).swapaxes(2, 3).reshape(weight.shape)
            to, of = ([0, 2, 1, 3] if size == 4 else slice(None) for size in (outputs, inputs))
            weight, shift, bias = weight[to][:, of], shift[to], bias[to]
        # taps of a group of four inputs follow one another
        groups = weight.reshape(outputs, inputs // 4, 4, taps).transpose(0, 1, 3, 2)
        weights.append(pack_taps(groups.reshape(outputs, -1, 4)))
        shifts.append(shift)
        starts.append(np.repeat(bias[:, None], POSITIONS, 1))
        data = data[count + 5 * outputs :]
    return FilterTables(
        weights[0],
        np.concatenate(weights[1:-1]),
        weights[-1],
        starts[0],
        np.concatenate(starts[1:-1]),
        starts[-1],
        np.zeros((OUTPUTS, POSITIONS), np.int32),
        shifts[0],
        np.concatenate(shifts[1:-1]),
        shifts[-1],
    )


def _memory(width: int, groups: int) -> FilterRows:
    """Return the memory for planes of so many columns."""
    pitch = padded(ceil_div(width, 2), POSITIONS) + 2
    taps = [dy * pitch + dx for dy in range(3) for dx in range(3)]
    return FilterRows(
        np.zeros((2, 2 * pitch), np.int32),
        np.zeros(3 * pitch, np.int32),
        np.zeros(3 * pitch, np.int32),
        np.zeros((2, groups * pitch), np.int32),
        np.zeros(3 * groups * pitch, np.int32),
        np.zeros((OUTPUTS, pitch), np.int32),
        np.zeros((OUTPUTS, pitch), np.int32),
        np.array(taps, np.int32),
        np.array([group * pitch for group in range(groups)], np.int32),
        np.array([3 * group * pitch + tap for group in range(groups) for tap in taps], np.int32),
    )


def filter_plane(plane: NDArray[np.int32], code: int) -> NDArray[np.int32]:
    """Filter a plane int32 (height,width) in sixteenths, in C order, in place; return it.

    Parameters
    ----------
    plane : ndarray
    code : int
        Of the step that it was quantised with.
    """
    if plane.size:
        octave, part = divmod(code, PER_OCTAVE)
        centre = (int(plane.min()) + int(plane.max())) >> 1
        numbers = np.array([centre, INVERSES[part], SAMPLE_SHIFT + octave, MANTISSAS[part] << octave], np.int64)
        if plane.shape[1] < POSITIONS and plane.shape[0] >= 4 * POSITIONS:
            _filter_narrow(plane, numbers)
        else:
            _filter(plane, numbers, tables(), _memory(plane.shape[1], GROUPS))
    return plane


def _filter_narrow(plane: NDArray[np.int32], numbers: NDArray[np.int64]) -> None:
    """Filter a plane with short rows, which leave most positions of sums empty, with rows and columns exchanged."""
    height = plane.shape[0]
    memory = _memory(min(height, TURNED_ROWS + 2 * REACH), GROUPS)
    before = plane[:0]
    for top in range(0, height, TURNED_ROWS):
        end, start = min(height, top + TURNED_ROWS), len(before)
        turned = np.ascontiguousarray(np.concatenate([before, plane[top : end + REACH]]).T)
        before = plane[end - REACH : end].copy()
        _filter(turned, numbers, tables(turned=True), memory)
        plane[top:end] = turned[:, start : start + end - top].T


@inline
def _sample(value, numbers):
    shift = numbers[2]
    scaled = ((np.int64(value) - numbers[0]) * numbers[1] + (np.int64(1) << (shift - 1))) >> shift
    return int32(min(max(scaled, np.int64(_LOW)), np.int64(_HIGH)) - np.int64(_LOW))


@inline
def _word(a, b, c, d):
    return int32(a | int32(b << int32(8))) | int32(int32(c << int32(16)) | int32(d << int32(24)))


@inner
def _enter(plane, row, numbers, memory):
    """Write the words of a row of squares, which may lie outside of the plane, as the last of three rows."""
    height, width = plane.shape
    pitch, last = memory.sums.shape[1], height - 1
    for i in range(2 * pitch):
        memory.low[i], memory.high[i] = memory.low[i + pitch], memory.high[i + pitch]
    for y in range(2):
        line, samples = plane[min(max(2 * row + y, 0), last)], memory.samples[y]
        for x in range(width):
            samples[x + 2] = _sample(line[x], numbers)
        samples[0] = samples[1] = samples[2]
        for x in range(width + 2, min(width + 5, samples.size)):
            samples[x] = samples[width + 1]
    upper, lower = memory.samples[0], memory.samples[1]
    low, high = memory.low[2 * pitch :], memory.high[2 * pitch :]
    for x in range((width + 1) // 2 + 2):
        a, b, c, d = upper[2 * x], upper[2 * x + 1], lower[2 * x], lower[2 * x + 1]
        low[x] = _word(a & _BYTE, b & _BYTE, c & _BYTE, d & _BYTE)
        high[x] = _word(a >> int32(8), b >> int32(8), c >> int32(8), d >> int32(8))


@inline
def _value(total, shift):
    return min(max(total >> int32(shift & 31), int32(0)), _BYTE)


@inner
def _store(sums, shifts, at, count, words):
    """Write hidden values of four channels, four bytes in a word."""
    k0, k1, k2, k3 = shifts[at], shifts[at + 1], shifts[at + 2], shifts[at + 3]
    s0, s1, s2, s3 = sums[0], sums[1], sums[2], sums[3]
    for x in range(count):
        h0, h1, h2, h3 = _value(s0[x], k0), _value(s1[x], k1), _value(s2[x], k2), _value(s3[x], k3)
        words[x] = _word(h0, h1, h2, h3)


@inner
def _move_hidden(memory, groups):
    """Make the last two rows of hidden values the first two."""
    pitch = memory.sums.shape[1]
    for group in range(groups):
        rows = memory.kept[3 * group * pitch : 3 * (group + 1) * pitch]
        for i in range(2 * pitch):
            rows[i] = rows[i + pitch]


@inner
def _hidden_row(tables, memory, count, squares):
    """Compute the hidden values of a row of squares, as the last of three rows."""
    pitch = memory.sums.shape[1]
    groups = tables.first_shift.size // OUTPUTS
    size, layers = tables.first.size // groups, tables.inner_shift.size // tables.first_shift.size
    for group in range(groups):
        row_sums(
            memory.sums, pitch, memory.low, memory.starts_first, 9, tables.first, group * size, count,
            tables.first_start, group * OUTPUTS,
        )  # fmt: skip
        row_sums(
            memory.upper, pitch, memory.high, memory.starts_first, 9, tables.first, group * size, count,
            tables.nothing, 0,
        )  # fmt: skip
        for k in range(OUTPUTS):
            for x in range(count):
                memory.sums[k, x] += int32(memory.upper[k, x] << int32(8))
        _store(memory.sums, tables.first_shift, group * OUTPUTS, count, memory.hidden[0, group * pitch :])
    size = tables.inner.size // (layers * groups)
    for layer in range(layers):
        source, target = memory.hidden[layer % 2], memory.hidden[(layer + 1) % 2]
        for group in range(groups):
            number = layer * groups + group
            row_sums(
                memory.sums, pitch, source, memory.starts_inner, groups, tables.inner, number * size, count,
                tables.inner_start, number * OUTPUTS,
            )  # fmt: skip
            if layer == layers - 1:
                row = memory.kept[(3 * group + 2) * pitch :]
                _store(memory.sums, tables.inner_shift, number * OUTPUTS, squares, row[1:])
                row[0], row[squares + 1] = row[1], row[squares]
            else:
                _store(memory.sums, tables.inner_shift, number * OUTPUTS, count, target[group * pitch :])


@inline
def _change(value, total, shift, factor):
    change = np.int64(min(max(total >> int32(shift & 31), -_CHANGE), _CHANGE))
    return int32(np.int64(value) + ((change * factor + (1 << (CHANGE_SHIFT - 1))) >> CHANGE_SHIFT))


@inner
def _output_row(plane, row, factor, tables, memory, count):
    """Correct the samples of a row of squares."""
    height, width = plane.shape
    pitch = memory.sums.shape[1]
    row_sums(
        memory.sums, pitch, memory.kept, memory.starts_last, memory.starts_last.size, tables.last, 0, count,
        tables.last_start, 0,
    )  # fmt: skip
    for y in range(min(2, height - 2 * row)):
        line = plane[2 * row + y]
        even, odd = memory.sums[2 * y], memory.sums[2 * y + 1]
        k0, k1 = tables.last_shift[2 * y], tables.last_shift[2 * y + 1]
        for x in range(width // 2):
            line[2 * x] = _change(line[2 * x], even[x], k0, factor)
            line[2 * x + 1] = _change(line[2 * x + 1], odd[x], k1, factor)
        if width % 2:
            line[width - 1] = _change(line[width - 1], even[width // 2], k0, factor)


@jit
def _filter(plane, numbers, tables, memory):
    """Filter a plane in place; `numbers` are its centre, factor and shift of samples, and factor of changes."""
    rows, squares = (plane.shape[0] + 1) // 2, (plane.shape[1] + 1) // 2
    count, groups = memory.sums.shape[1] - 2, tables.first_shift.size // OUTPUTS
    for row in range(-1, rows + 2):
        if row <= rows:
            _enter(plane, row, numbers, memory)
        if row > 0:
            _move_hidden(memory, groups)
        if 0 < row <= rows:  # beyond the plane, hidden values are those of its first and last row
            _hidden_row(tables, memory, count, squares)
        if row == 1:
            _move_hidden(memory, groups)
        if row > 1:
            _output_row(plane, row - 2, numbers[3], tables, memory, count)
