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
from deepsic_codec.model.cpu.dot import (
    OUTPUTS,
    POSITIONS,
    check,
    pack_pairs,
    pack_taps,
    padded,
    row_bytes,
    row_bytes_of_pairs,
    row_sums,
)
from deepsic_codec.payload.steps import MANTISSA_BITS, MANTISSAS, PER_OCTAVE

#: Outputs, inputs and taps of the layers.
LAYERS = ((32, 4, 9), (32, 32, 1), (32, 32, 1), (4, 32, 9))
WEIGHTS = Path(__file__).parents[1] / "data" / "wavelet-filter.txt"
#: Binary places of samples in steps, and of corrections in steps.
SAMPLE_BITS, CHANGE_BITS = 5, 8
#: Shift of a sample at code 0, which has `MANTISSA_BITS` places of a factor too many and 2^-4 of a step in a sixteenth.
SAMPLE_SHIFT, CHANGE_SHIFT = MANTISSA_BITS + 4 - 8 - SAMPLE_BITS, MANTISSA_BITS + 8 - 4 + CHANGE_BITS
_LOW, _HIGH = -(1 << 15), (1 << 15) - 1
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
        Weights as `row_bytes_of_pairs`, `row_bytes` and `row_sums` read them; the inner layers follow one another.
    first_start, inner_start, last_start : int32 (hidden,POSITIONS), (layers hidden,POSITIONS), (OUTPUTS,POSITIONS)
        What sums start with.
    first_shift, inner_shift, last_shift : int32 (hidden,), (layers hidden,), (OUTPUTS,)
    """

    first: NDArray[np.int32]
    inner: NDArray[np.int32]
    last: NDArray[np.int32]
    first_start: NDArray[np.int32]
    inner_start: NDArray[np.int32]
    last_start: NDArray[np.int32]
    first_shift: NDArray[np.int32]
    inner_shift: NDArray[np.int32]
    last_shift: NDArray[np.int32]


class FilterRows(NamedTuple):
    """Memory for rows of squares of a plane: three at a time, of which row n is in place n modulo 3.

    Attributes
    ----------
    samples : int16 (6,2 pitch)
        Upper and lower samples of three rows, with one square more at both sides.
    hidden : int32 (2,groups POSITIONS)
        Hidden values of some squares, four bytes in a word, before a layer and after it.
    kept : int32 (3,groups pitch)
        Those of three rows after the last hidden layer, with one square more at both sides.
    sums : int32 (OUTPUTS,POSITIONS)
    starts_first, starts_inner, starts_last : int32 (3,18), (groups,), (3,9 groups)
        Where the words of each tap begin; of the first and the last layer, by the place of the upper one of three rows.
    """

    samples: NDArray[np.int16]
    hidden: NDArray[np.int32]
    kept: NDArray[np.int32]
    sums: NDArray[np.int32]
    starts_first: NDArray[np.int32]
    starts_inner: NDArray[np.int32]
    starts_last: NDArray[np.int32]


@lru_cache(maxsize=2)
def tables(turned: bool = False) -> FilterTables:
    """Read the layers of the filter, or those that do the same to a transposed plane."""
    check()
    data = np.frombuffer(base64.b85decode(WEIGHTS.read_text().replace("\n", "")), np.int8)
    weights: list[NDArray[np.int32]] = []
    starts, shifts = [], []
    for outputs, inputs, taps in LAYERS:
        count = outputs * inputs * taps
        weight, shift = data[:count].reshape(outputs, inputs, taps), data[count : count + outputs].astype(np.int32) & 31
        bias = data[count + outputs : count + 5 * outputs].view("<i4").astype(np.int32)
        if turned:  # rows and columns of taps change places, and so do two samples of a square
            edge = isqrt(taps)
            weight = weight.reshape(outputs, inputs, edge, edge).swapaxes(2, 3).reshape(weight.shape)
            to, of = ([0, 2, 1, 3] if size == 4 else slice(None) for size in (outputs, inputs))
            weight, shift, bias = weight[to][:, of], shift[to], bias[to]
        # taps of a group of four inputs follow one another
        groups = weight.reshape(outputs, inputs // 4, 4, taps).transpose(0, 1, 3, 2)
        # samples have 16 bits: the upper two of a square are a tap, and the lower two are the next one
        weights.append(
            pack_taps(groups.reshape(outputs, -1, 4)) if weights else pack_pairs(groups.reshape(outputs, -1, 2))
        )
        shifts.append(shift)
        starts.append(np.repeat(bias[:, None], POSITIONS, 1))
        data = data[count + 5 * outputs :]
    parts = ((part[0], np.concatenate(part[1:-1]), part[-1]) for part in (weights, starts, shifts))
    return FilterTables(*(one for three in parts for one in three))


@lru_cache(maxsize=16)
def _starts(pitch: int, groups: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Return where the words of each tap begin, as `FilterRows` has them."""
    columns, rows = np.arange(3), (np.arange(3)[:, None] + np.arange(3)) % 3
    first = 2 * pitch * rows[:, :, None, None] + columns[:, None] + np.array([0, pitch])
    last = groups * pitch * rows[:, None, :, None] + pitch * np.arange(groups)[:, None, None] + columns
    inner = POSITIONS * np.arange(groups)
    return first.reshape(3, -1).astype(np.int32), inner.astype(np.int32), last.reshape(3, -1).astype(np.int32)


def _memory(width: int, groups: int) -> FilterRows:
    """Return the memory for planes of so many columns."""
    pitch = padded(ceil_div(width, 2), POSITIONS) + 2
    return FilterRows(
        np.zeros((6, 2 * pitch), np.int16),
        np.zeros((2, groups * POSITIONS), np.int32),
        np.zeros((3, groups * pitch), np.int32),
        np.zeros((OUTPUTS, POSITIONS), np.int32),
        *_starts(pitch, groups),
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
def _sample(value, centre, factor, shift):
    scaled = ((np.int64(value) - centre) * factor + (np.int64(1) << (shift - 1))) >> shift
    return np.int16(min(max(scaled, np.int64(_LOW)), np.int64(_HIGH)))


@inner
def _enter(plane, row, numbers, memory):
    """Write the samples of a row of squares, which may lie outside of the plane."""
    height, width = plane.shape
    centre, factor, shift = numbers[0], numbers[1], numbers[2]
    for y in range(2):
        line, samples = plane[min(max(2 * row + y, 0), height - 1)], memory.samples[(row + 3) % 3 * 2 + y]
        inside = samples[2:]
        for x in range(width):
            inside[x] = _sample(line[x], centre, factor, shift)
        samples[0] = samples[1] = samples[2]
        for x in range(width, min(width + 3, inside.size)):
            inside[x] = inside[width - 1]


@inner
def _hidden_row(row, tables, memory, squares):
    """Compute the hidden values of a row of squares, of the samples of this row and of those beside it."""
    groups, layers = tables.first_shift.size // OUTPUTS, tables.inner_shift.size // tables.first_shift.size
    starts, kept = memory.starts_first[(row - 1) % 3], memory.kept[row % 3]
    pitch, size = kept.size // groups, tables.inner.size // layers
    for column in range(0, squares, POSITIONS):
        row_bytes_of_pairs(
            memory.hidden[0], POSITIONS, memory.samples[0, 2 * column :], starts, tables.first, groups, POSITIONS,
            tables.first_start, tables.first_shift,
        )  # fmt: skip
        for layer in range(layers):
            target, distance, channel = memory.hidden[(layer + 1) % 2], POSITIONS, layer * groups * OUTPUTS
            if layer == layers - 1:
                target, distance = kept[column + 1 :], pitch
            row_bytes(
                target, distance, memory.hidden[layer % 2], memory.starts_inner, tables.inner[layer * size :], groups,
                POSITIONS, tables.inner_start[channel:], tables.inner_shift[channel:],
            )  # fmt: skip
    for group in range(groups):
        start = group * pitch
        kept[start], kept[start + squares + 1] = kept[start + 1], kept[start + squares]


@inner
def _copy_hidden(memory, source, target):
    """Make the hidden values of a row those of another one, too."""
    values, copies = memory.kept[source % 3], memory.kept[target % 3]
    for i in range(values.size):
        copies[i] = values[i]


@inline
def _change(value, total, shift, factor):
    change = np.int64(min(max(total >> int32(shift & 31), -_CHANGE), _CHANGE))
    return int32(np.int64(value) + ((change * factor + (1 << (CHANGE_SHIFT - 1))) >> CHANGE_SHIFT))


@inner
def _output_row(plane, row, factor, tables, memory):
    """Correct the samples of a row of squares."""
    height, width = plane.shape
    starts = memory.starts_last[(row - 1) % 3]
    for column in range(0, (width + 1) // 2, POSITIONS):
        hidden = memory.kept[0, column:]
        row_sums(memory.sums, POSITIONS, hidden, starts, tables.last, 1, POSITIONS, tables.last_start)
        count = min(width - 2 * column, 2 * POSITIONS)
        for y in range(min(2, height - 2 * row)):
            line = plane[2 * row + y, 2 * column :]
            even, odd = memory.sums[2 * y], memory.sums[2 * y + 1]
            k0, k1 = tables.last_shift[2 * y], tables.last_shift[2 * y + 1]
            for x in range(count // 2):
                line[2 * x] = _change(line[2 * x], even[x], k0, factor)
                line[2 * x + 1] = _change(line[2 * x + 1], odd[x], k1, factor)
            if count % 2:
                line[count - 1] = _change(line[count - 1], even[count // 2], k0, factor)


@jit
def _filter(plane, numbers, tables, memory):
    """Filter a plane in place; `numbers` are its centre, factor and shift of samples, and factor of changes."""
    rows, squares = (plane.shape[0] + 1) // 2, (plane.shape[1] + 1) // 2
    for row in range(-1, rows + 1):
        _enter(plane, row, numbers, memory)
        if row > 0:
            _hidden_row(row - 1, tables, memory, squares)
        if row == 1:  # beyond the plane, hidden values are those of its first and last row
            _copy_hidden(memory, 0, -1)
        if row > 1:
            _output_row(plane, row - 2, numbers[3], tables, memory)
    _copy_hidden(memory, rows - 1, rows)
    _output_row(plane, rows - 1, numbers[3], tables, memory)
