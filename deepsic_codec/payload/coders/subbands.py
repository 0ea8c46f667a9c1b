"""Context-mixing coder for the quantised bands of wavelet-transformed planes.

Bands are coded from the coarsest to the finest, each for all planes in turn. The size of a coefficient is expected from
its neighbours, from the coefficients of the next coarser level at its place, from the other detail of its level, and
from the plane before. Its magnitude is binarised in units that follow the expectation; each bin mixes four adaptive
contexts in the logistic domain. A trellis of eight states chooses between two quantisers; an encoder takes the path
of the least error and rate. All arithmetic is on integers. `docs/wavelet.md` is normative.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.kernels import constant, inline, inner, jit
from deepsic_codec.payload.coders.band_contexts import (
    AT,
    COARSE,
    ESCAPE_BITS,
    LEVELS,
    NEAREST,
    PATTERN_MIXERS,
    UNARY,
    initial,
)
from deepsic_codec.payload.coders.binary import (
    EVEN,
    MIN_P,
    SQUASH,
    STRETCH,
    STRETCH_MAX,
    STRETCH_ONE,
    adapt,
    code_bit,
    code_single,
    grown,
)
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, check_end, finish_encoding, read_first
from deepsic_codec.payload.coders.trellis import BEFORE, NEXT, add_value, add_zero, best_state, start_costs
from deepsic_codec.payload.coders.wavelet import (
    DIAGONAL,
    HORIZONTAL,
    LOW,
    NORM_BITS,
    VERTICAL,
    Band,
    bands_of,
)
from deepsic_codec.payload.quality_map import SPACING, QualityMap
from deepsic_codec.payload.steps import FRACTION_BITS, MANTISSA_BITS, MANTISSAS, PER_OCTAVE, STEPS, UNIT

STRIP, SMALL = 1 << 16, 1 << 12  # coefficients of a band that are coded at a time, about, and of a small band
_STEP_BITS = 16  # binary places of the step of a band

(EXPECTED, PATTERN, LATER, KIND, PLANE, ODD, SIGN, LOW_BIT, ESCAPE, QUIET, EMPTY, CONTEXTS) = AT
MAGNITUDE_MAX = (1 << 26) - 1
LIMIT, RATE, HALF = 127, 3, 1 << 17  # observations that a context counts; rate of mixers, and half a unit of changes
COEFFICIENT_BYTES = 2 * (2 + UNARY + 2 * ESCAPE_BITS + 26)  # limit for one coefficient: 16 bits for each bin

# Weight of the rate against the squared error, in 256ths of a squared step for a bit.
LAMBDA = 16
# Magnitudes up to this many 256ths of a step become 0, and those of a band that has none above `FILLED`.
ZERO, FILLED = 64, 112
SQUARED_MAX = 1 << 24  # larger errors count as this one, whose square leaves room for sums
INT16_MAX = (1 << 15) - 1
NO_LIMIT = 1 << 60  # position that no decoder reaches


def _log_table() -> NDArray[np.uint8]:
    """Return floor(4 log2(n)) + 1 of n = 1..4095, and 0 of 0."""
    return np.array([0] + [(n**4).bit_length() for n in range(1, 4096)], np.uint8)


def _cost_table() -> NDArray[np.int64]:
    """Return the bits of an event of probability n / 4096 in 1/256, n = 0..4096; the first entry is that of 1."""
    return np.rint(-256 * np.log2(np.maximum(np.arange(4097), 1) / 4096)).astype(np.int64)


def _offset_table() -> NDArray[np.int64]:
    """Return how far mean magnitudes lie below their numbers, in 256ths of a step.

    By quantiser, expected size, and magnitude: 1, 2, larger. Where small coefficients are expected, most lie near the
    lower end of an interval. Measured on scenes of many kinds.
    """
    first = 16  # levels beyond the ends have the offsets of these
    whole = [35, 35, 34, 32, 30, 27, 25, 22, 18, 14, 11, 8, 5, 3, 0, -1, -3, -8, -9, -10]
    whole += [-9, -13, -14, -13, -13, -17, -16, -14, -13, -15]
    half = [-19, -19, -19, -19, -19, -20, -20, -21, -22, -24, -26, -27, -29, -33, -35, -35, -35, -44, -45, -44]
    half += [-44, -51, -50, -50, -47, -54, -55, -52, -54, -57]
    two = [34, 33, 32, 31, 30, 27, 25, 22, 18, 13, 8, 5, 3, 7, 6, 3, 0, -2, -5, -7]
    two += [-9, -10, -11, -11, -11, -13, -14, -15, -11, -14]
    more = [32, 28, 30, 28, 27, 24, 23, 22, 18, 14, 11, 8, 6, 12, 11, 8, 5, 2, -1, -3]
    more += [-4, -6, -7, -8, -9, -10, -10, -11, -12, -12]
    table = np.array([[whole, two, more], [half, two, more]], np.int64).transpose(0, 2, 1)
    return np.ascontiguousarray(table[:, np.arange(LEVELS).clip(first, first + len(whole) - 1) - first])


LOG, OFFSET = _log_table(), _offset_table()
# What a magnitude nearby says of one in a band, by kind: left, upper, upper left, upper right, second to the left,
# second above, upper after the right; of the coarser level at the place, below it and on its right; of the horizontal
# detail at the place and below it; of the vertical detail at the place and on its right; of the plane before. In 64ths,
# as fitted to scenes of many kinds.
WEIGHTS = np.array(
    [
        [20, 20, 8, 8, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [15, 15, 4, 7, 4, 5, 3, 2, 2, 0, 0, 0, 0, 0, 2],
        [16, 11, 4, 6, 5, 2, 3, 2, 0, 2, 4, 4, 0, 0, 2],
        [10, 10, 5, 6, 3, 2, 2, 1, 0, 0, 3, 3, 3, 3, 1],
    ],
    np.int64,
)
SHORT_STRETCH = np.ascontiguousarray(STRETCH[2::4])  # by the upper 12 bits of a probability; fits the nearest cache
# 2^32 / n, rounded up: the floor of m / n is that of m INVERSE[n] / 2^32 for m up to 2^28, as m (n INVERSE[n] - 2^32)
# is less than 2^32.
INVERSE = np.array([0] + [-((-1 << 32) // n) for n in range(1, 8)], np.int64)
# Where steps differ, sizes are compared in sixteenths of the finest one: factors of eighths of an octave, and their
# inverses, in 2^-15, and the largest size.
COARSER = np.array(MANTISSAS[:: PER_OCTAVE // 8], np.int64)
FINER = np.rint(2.0 ** (15 - np.arange(8) / 8)).astype(np.int64)
LARGEST = (1 << 31) - 1
COST: Any = _cost_table()
_NOTHING: NDArray[np.int32] = np.zeros((1, 1), np.int32)


def band_step(code: int, band: Band) -> int:
    """Return the step of a band in 2^-16 of a coefficient's unit."""
    octave, rest = divmod(code, PER_OCTAVE)
    shift = octave + FRACTION_BITS + NORM_BITS + _STEP_BITS - MANTISSA_BITS - (UNIT.bit_length() - 1)
    return (MANTISSAS[rest] << shift) // band.norm


def band_steps(code: int, band: Band, count: int = 1) -> NDArray[np.int64]:
    """Return the steps of a band by the values of a map, 0 to `count`; that of 0 is larger than any coefficient."""
    codes = [min(code + SPACING * n, STEPS - 1) for n in range(count)]
    return np.array([1 << 52, *(band_step(one, band) for one in codes)], np.int64)


@inline
def _level(n):
    """Return floor(4 log2(n)) + 1 of n >= 0, from its upper 9 to 12 bits; 0 of 0; at most LEVELS - 1."""
    steps = np.int64(0)
    while n >= 4096:
        n >>= 4
        steps += 16
    return min(np.int64(LOG[np.uint64(n)]) + steps, LEVELS - 1)


@inline
def _magnitude(x, row, column):
    return abs(np.int64(x[row, column]))


@inline
def _around(x, row, column):
    """Return 16 times the mean magnitude at a place, which has half the weight, and at its four neighbours."""
    sides = _magnitude(x, row, column - 1) + _magnitude(x, row, column + 1)
    sides += _magnitude(x, row - 1, column) + _magnitude(x, row + 1, column)
    return 8 * _magnitude(x, row, column) + 2 * sides


@inline
def _common(halves, value):
    """Return a size in halves of the step of a value of the map, in sixteenths of halves of the finest step."""
    eighths = value - 1
    return min((((halves * COARSER[eighths & 7]) << (eighths >> 3)) + (1 << 10)) >> 11, LARGEST)


@inline
def _rescaled(size, value):
    """Undo `_common`."""
    eighths = value - 1
    places = 19 + (eighths >> 3)
    return (size * FINER[eighths & 7] + (np.int64(1) << (places - 1))) >> places


@inner
def _add_around(x, row, width, sums, total):
    """Set sums to what `_around` gives for the columns of a row, and add them to the total."""
    for column in range(width):
        around = _around(x, row + 2, column + 2)
        sums[column] = around
        total[column] += around


@inner
def _surroundings(symbols, near, present, kind, row, width, sums):
    """Sum up the sizes around the coefficients of a row, but for those in the row itself, in halves of a step there.

    `sums` get the magnitudes of the row above, from the column before on; the sums of all; what the coarser level, the
    other detail and the plane before have; and sums with `WEIGHTS`. Compilers make these loops ones over vectors.
    """
    upper, total, coarser, other, previous, weighted = sums
    w = WEIGHTS[kind]
    parent, first, second, before = near
    y = row + 2
    for column in range(width + 3):
        upper[column] = _magnitude(symbols, y - 1, column + 1)
    for column in range(width):
        second_above = _magnitude(symbols, y - 2, column + 2)
        size = 5 * upper[column + 1] + 2 * (upper[column] + upper[column + 2]) + second_above
        weighted[column] = w[1] * upper[column + 1] + w[2] * upper[column] + w[3] * upper[column + 2]
        weighted[column] += w[5] * second_above + w[6] * upper[column + 3]
        total[column] = 2 * size
        coarser[column] = other[column] = previous[column] = 0
    if present[0]:
        place = (row >> 1) + 2
        for half in range((width + 1) >> 1):
            around = _around(parent, place, half + 2)
            one = w[7] * _magnitude(parent, place, half + 2) + w[8] * _magnitude(parent, place + 1, half + 2)
            one += w[9] * _magnitude(parent, place, half + 3)
            for column in range(2 * half, 2 * half + 2):  # rows of working memory have room for an even number
                coarser[column] = around
                weighted[column] += one
                total[column] += around
    if present[2]:
        _add_around(second, row, width, previous, total)
        _add_around(first, row, width, other, total)
        for column in range(width):
            other[column] = (other[column] + previous[column]) >> 1
            previous[column] = 0
            weighted[column] += w[12] * _magnitude(second, y, column + 2) + w[13] * _magnitude(second, y, column + 3)
    elif present[1]:
        _add_around(first, row, width, other, total)
    if present[1]:
        for column in range(width):
            weighted[column] += w[10] * _magnitude(first, y, column + 2) + w[11] * _magnitude(first, y + 1, column + 2)
    if present[3]:
        _add_around(before, row, width, previous, total)
        for column in range(width):
            weighted[column] += w[14] * _magnitude(before, y, column + 2)


@inline
def _shares(present):
    """Return the weight of all that is around a coefficient, by which the total is divided."""
    shares = np.int64(2)
    if present[0]:
        shares += 2
    for n in range(1, 4):
        if present[n]:
            shares += 1
    return shares


@inline
def _mean(total, shares, value):
    """Return the mean size around a coefficient in 32nds of a step, its own if it has a value of a map."""
    if value > 0:
        total = _rescaled(total, value)
    # A multiplication does the same in a fraction of the time; it is exact for so small totals.
    return (total * INVERSE[shares]) >> 32 if total < 1 << 28 else total // shares


@inline
def _expected(kind, left, far_left, sums, column, value):
    """Return the size that is expected of a coefficient in 128ths of a step, its own if it has a value of a map."""
    size = sums[5][column] + WEIGHTS[kind, 0] * left + WEIGHTS[kind, 4] * far_left
    return _rescaled(size, value) if value > 0 else size


@inline
def _expectation(expected, mean, left, far_left, sums, column, value):
    """Return what is expected of a coefficient, from the size that is expected and the mean size around.

    Returns
    -------
    tuple of int
        Levels of the size that is expected, of the mean, and a coarse one of the plane before; binary places of the
        unit of magnitudes; patterns of bin 0, and of later bins.
    """
    corner, upper, right = sums[0][column], sums[0][column + 1], sums[0][column + 2]
    coarser, other, previous = sums[2][column], sums[3][column], sums[4][column]
    if value > 0:
        coarser, other, previous = _rescaled(coarser, value), _rescaled(other, value), _rescaled(previous, value)
        left, upper = _rescaled(left, value), _rescaled(upper, value)
        corner, right = _rescaled(corner, value), _rescaled(right, value)
    shift = np.int64(0)
    while expected >> (shift + 8) > 0:
        shift += 1
    half = shift + 1  # sizes around are in halves of a step; they are rounded up, means to the nearest
    left, upper = (left + 1 >> 1) >> shift, (upper + 1 >> 1) >> shift
    corner, right = (corner + 1 >> 1) >> shift, (right + 1 >> 1) >> shift
    parent, detail = min((coarser >> half) + 7 >> 4, 2), min((other >> half) + 7 >> 4, 2)
    pattern = ((min(left, 2) * 3 + min(upper, 2)) * 3 + min(corner, 2)) * 3 + min(right, 2)
    pattern = ((pattern * 3 + parent) * 3 + detail) * 3 + min((previous >> half) + 7 >> 4, 2)
    nearest = (min(left, 5) * 6 + min(upper, 5)) * 3 + parent
    return _level(expected >> 1), _level(2 * mean), _level(previous) // 3, shift, pattern, nearest


@inline
def _input(contexts, index):
    """Return the probability of a one under a context, in the logistic domain."""
    return np.int64(SHORT_STRETCH[contexts[np.uint64(index)] >> 20])


@inline
def _predict(unary, quantiser, band, expectation, memory):
    """Return the probability of a one of a bin, its contexts, the inputs from them, and the place of their mixer."""
    rank, mean, previous, _, pattern, nearest = expectation
    contexts, w, _ = memory
    first, bin3 = quantiser * ODD, min(unary, 2)
    at0 = first + EXPECTED + rank * UNARY + unary
    at1 = first + (PATTERN + pattern if unary == 0 else LATER + nearest * UNARY + unary)
    at2 = first + KIND + (band * (LEVELS // 2) + (mean >> 1)) * 3 + bin3
    at3 = first + PLANE + (rank * COARSE + previous) * 3 + bin3
    in0, in1, in2, in3 = (
        _input(contexts, at0), _input(contexts, at1), _input(contexts, at2), _input(contexts, at3),
    )  # fmt: skip
    m = np.uint64((quantiser * 4 + min(unary, 3)) * NEAREST + nearest)
    n = np.uint64(PATTERN_MIXERS + 2 * band + min(unary, 1))
    dot = (w[m, 0] + w[n, 0]) * in0 + (w[m, 1] + w[n, 1]) * in1 + (w[m, 2] + w[n, 2]) * in2
    dot += (w[m, 3] + w[n, 3]) * in3 + (w[m, 4] + w[n, 4]) * STRETCH_ONE
    dot = min(max(dot >> 16, -STRETCH_MAX), STRETCH_MAX)
    return np.int64(SQUASH[dot + STRETCH_MAX]), (at0, at1, at2, at3), (in0, in1, in2, in3), (m, n)


@inline
def _learn(bit, p, at, inputs, mixers, contexts, w):
    """Move the contexts of a bin towards its bit, and the weights of its mixers to where they predict it better."""
    error = ((np.int64(65535) if bit else np.int64(0)) - p) * RATE
    in0, in1, in2, in3 = inputs
    change0, change1, change2 = (in0 * error + HALF) >> 18, (in1 * error + HALF) >> 18, (in2 * error + HALF) >> 18
    change3, change4 = (in3 * error + HALF) >> 18, (STRETCH_ONE * error + HALF) >> 18
    for n in mixers:
        w[n, 0] += change0
        w[n, 1] += change1
        w[n, 2] += change2
        w[n, 3] += change3
        w[n, 4] += change4
    adapt(contexts, at[0], bit, LIMIT)
    adapt(contexts, at[1], bit, LIMIT)
    adapt(contexts, at[2], bit, LIMIT)
    adapt(contexts, at[3], bit, LIMIT)


@inline
def _chance(contexts, index):
    """Return the probability of a one under a context in 1/4096."""
    return max(np.int64(contexts[np.uint64(index)]) >> 20, 1)


@inline
def _zero_cost(exact, quantiser, band, rank, quiet, contexts):
    """Return the cost of a magnitude of 0 in 2^-16 of a squared step; `exact` is the size in 256ths of a step."""
    index = QUIET + 2 * band + quantiser if quiet else quantiser * ODD + EXPECTED + rank * UNARY
    return exact * exact + LAMBDA * COST[4096 - _chance(contexts, index)]


@inline
def _costs(exact, quantiser, band, quiet, expectation, memory):
    """Return the costs of the best even and odd magnitude, and the magnitudes."""
    contexts = memory[0]
    rank, shift = expectation[0], expectation[3]
    entry = quantiser * ODD + EXPECTED + rank * UNARY
    low = (exact + 128 * quantiser) >> 8
    if quiet:
        p = _chance(contexts, QUIET + 2 * band + quantiser)
    elif low > 1:  # far from 0: the rate of its bin hardly matters
        p = _chance(contexts, entry)
    else:
        p = _predict(np.int64(0), quantiser, band, expectation, memory)[0] >> 4  # 1 to 4095
    zero = min(exact, SQUARED_MAX) ** 2 + LAMBDA * COST[4096 - p]
    rate = COST[p] + 256  # of more than 0, with its sign
    if shift == 0:
        for u in range(1, min(low, UNARY)):
            rate += COST[_chance(contexts, entry + u)]
    first, second = zero, zero
    for n in range(2):
        magnitude = low + n
        if magnitude == 0:
            continue
        end = np.int64(0)  # of larger units, the rates of two magnitudes that follow one another hardly differ
        if shift == 0:
            if n == 1 and 1 < magnitude <= UNARY:
                rate += COST[_chance(contexts, entry + magnitude - 1)]
            if magnitude < UNARY:
                end = COST[4096 - _chance(contexts, entry + magnitude)]
        distance = exact - (256 * magnitude - 128 * quantiser - OFFSET[quantiser, rank, min(magnitude, 3) - 1])
        cost = distance * distance + LAMBDA * (rate + end)
        if n == 0:
            first = cost
        else:
            second = cost
    if low & 1:
        return (zero, first, np.int64(0), low) if zero < second else (second, first, low + 1, low)
    return (zero, second, np.int64(0), low + 1) if zero < first else (first, second, low, low + 1)


@inner
def _choose_row(coefficients, cells, settings, shares, memory, work, row):
    """Choose the magnitudes of a row, by the Viterbi algorithm.

    Magnitudes to the left are not known yet: expectations take the coefficients in their place. `memory` has the state
    in front of the row. `work` has the sums of `_surroundings`, and gets the magnitudes.
    """
    steps, kind, level = settings
    sizes, halves, magnitudes, options, ways, sums = work
    width, band = coefficients.shape[1], 4 * level + kind
    scale, value = 2.0**24 / steps[1], np.int64(0)
    largest = np.int64(0)
    for column in range(width):
        exact = np.int64(abs(np.int64(coefficients[row, column])) * scale)
        if cells is not None:
            value = np.int64(cells[row, column])
            halves[column + 2] = min(exact >> 3, LARGEST)
            exact = np.int64(abs(np.int64(coefficients[row, column])) * (2.0**24 / steps[value]))
        sizes[column + 2] = exact
        largest = max(largest, exact)
    if largest <= ZERO:
        magnitudes[:width] = 0
        return
    state = memory[2][0]
    costs = start_costs(state)
    for column in range(width):
        exact = sizes[column + 2]
        left, far_left = sizes[column + 1] >> 7, sizes[column] >> 7
        if cells is not None:
            value = np.int64(cells[row, column])
            if value == 0:
                options[column, 0] = -1  # no part of the path
                continue
            left, far_left = halves[column + 1], halves[column]
        total = sums[1][column] + 10 * left + 2 * far_left
        quiet = total == 0
        expected = _expected(kind, left, far_left, sums, column, value)
        if exact <= ZERO:
            rank = _level(expected >> 1)
            a0 = _zero_cost(exact, np.int64(0), band, rank, quiet, memory[0])
            b0 = _zero_cost(exact, np.int64(1), band, rank, quiet, memory[0])
            costs = add_zero(costs, a0, b0)
            ways[column] = options[column, 0] = options[column, 2] = 0
            continue
        expectation = _expectation(expected, _mean(total, shares, value), left, far_left, sums, column, value)
        a0, a1, even, odd = _costs(exact, np.int64(0), band, quiet, expectation, memory)
        options[column, 0], options[column, 1] = even, odd
        b0, b1, even, odd = _costs(exact, np.int64(1), band, quiet, expectation, memory)
        options[column, 2], options[column, 3] = even, odd
        costs, ways[column] = add_value(costs, a0, a1, b0, b1)
    state = best_state(costs)
    for column in range(width - 1, -1, -1):
        if cells is not None and options[column, 0] < 0:
            magnitudes[column] = 0
            continue
        odd = (ways[column] >> state) & 1
        state = BEFORE[state, odd]
        magnitudes[column] = options[column, 2 * (state & 1) + odd]


@inline
def _predicted(values, row, column):
    """Return the median of left, upper, and left + upper - diagonal; rows and columns begin at 2."""
    left, upper = np.int64(values[row, column - 1]), np.int64(values[row - 1, column])
    if row == 2:
        return left
    if column == 2:
        return upper
    diagonal = np.int64(values[row - 1, column - 1])
    if diagonal >= max(left, upper):
        return min(left, upper)
    if diagonal <= min(left, upper):
        return max(left, upper)
    return left + upper - diagonal


@jit
def _code_rows(
    decoding, coefficients, symbols, values, near, present, cells, settings, memory, work, state, data, limit, row
):
    """Code rows of one band of one plane.

    Parameters
    ----------
    decoding : bool
        Whether to decode.
    coefficients : int32 (height, width)
        An encoder's coefficients; both directions leave dequantised ones there.
    symbols, values : int32 (height + 4, width + 4)
        Coded coefficients in halves of a step and, of a low band, the quantised ones; with a border of zeros.
    near : four of int32 (rows, columns)
        Symbols of the coarser level, of the first and second detail of the level, and of the plane before, with
        borders of zeros.
    present : four of bool
        Which of these there are.
    cells : uint8 (height, width) or None
        Values of a map. The code without a map is compiled by itself, without a trace of it.
    settings : tuple
        Steps of the band by values of a map, of which 1 has that of the payload (int64); kind and level of the band.
    memory : tuple
        Contexts uint32 (CONTEXTS,), mixers int32 (n, inputs) and the state of the trellis int64 (1,).
    work : tuple
        Working memory.
    state, data : int64 (4,), uint8 (n,)
        The stream.
    limit : int
        A decoder stops after the row that reads beyond this position; an encoder writes up to it.
    row : int
        The first row to code.

    Returns
    -------
    int
        The next row. It is not the last if `data` may be too short for a row, or at the limit. -1 less the row in which
        the stream holds an impossible symbol.
    """
    stream = (state[0], state[1], state[2], state[3])
    height, width = coefficients.shape
    before = near[3]
    steps, kind, level = settings
    contexts, mixers, trellis = memory
    node = trellis[0]
    magnitudes, sums, shares = work[2], work[5], _shares(present)
    step, value = steps[1], np.int64(0)
    low, band = kind == LOW, 4 * level + kind
    while row < height and (stream[3] if decoding else stream[3] + width * COEFFICIENT_BYTES) <= limit:
        y = row + 2
        _surroundings(symbols, near, present, kind, row, width, sums)
        if not decoding and not low:
            _choose_row(coefficients, cells, settings, shares, memory, work, row)
        left, size = np.int64(0), np.int64(0)
        for column in range(width):
            x = column + 2
            far_left, left, size = left, size, np.int64(0)
            quantiser = node & 1
            if cells is not None:
                value = np.int64(cells[row, column])
                if value == 0:
                    coefficients[row, column] = 0
                    continue
                step = steps[value]
            total = sums[1][column] + 10 * left + 2 * far_left
            magnitude: Any = np.int64(0)
            negative: Any = False
            centre = _predicted(values, y, x) if low else np.int64(0)
            if not decoding:
                coefficient = np.int64(coefficients[row, column])
                if low:
                    magnitude = (((abs(coefficient) << 24) // step) + 128) >> 8
                    difference = (-magnitude if coefficient < 0 else magnitude) - centre
                    negative, magnitude = difference < 0, abs(difference)
                else:
                    negative, magnitude = coefficient < 0, magnitudes[column]
            unary: Any = np.int64(0)
            if total == 0 and not low:  # so for most coefficients: speed matters more here than the last bit
                bit = magnitude > 0
                quiet = QUIET + 2 * band + quantiser
                bit, stream = code_single(decoding, bit, quiet, MIN_P, LIMIT, contexts, stream, data)
                if not bit:
                    coefficients[row, column] = 0
                    node = NEXT[node, 0]
                    continue
                unary += 1
            expected = _expected(kind, left, far_left, sums, column, value)
            expectation = _expectation(expected, _mean(total, shares, value), left, far_left, sums, column, value)
            rank, shift = expectation[0], expectation[3]
            while unary < UNARY:
                p, at, inputs, mixer = _predict(unary, quantiser, band, expectation, memory)
                bit = (magnitude >> shift) > unary
                bit, stream = code_bit(decoding, bit, p, stream, data)
                _learn(bit, p, at, inputs, mixer, contexts, mixers)
                if not bit:
                    break
                unary += 1
            if unary == UNARY:
                # Exp-Golomb code of the rest + 1: its length in unary, then its lower bits.
                rest = (magnitude >> shift) - UNARY + 1
                length: Any = np.int64(0)
                while True:
                    bit = (rest >> (length + 1)) > 0
                    bit, stream = code_single(
                        decoding, bit, ESCAPE + min(length, ESCAPE_BITS), MIN_P, LIMIT, contexts, stream, data
                    )
                    if not bit:
                        break
                    length += 1
                    if length > ESCAPE_BITS:
                        state[3] = stream[3]
                        return -1 - row
                number = np.int64(1)
                for n in range(length - 1, -1, -1):
                    bit = (rest >> n) & 1 == 1
                    bit, stream = code_bit(decoding, bit, EVEN, stream, data)
                    number = 2 * number + (1 if bit else 0)
                unary = number + UNARY - 1
            lower = np.int64(0)
            for n in range(shift - 1, -1, -1):
                bit = (magnitude >> n) & 1 == 1
                if shift - n <= 2:
                    which = (3 if unary == 0 else 0) if n == shift - 1 else 1 + (lower & 1)
                    bit, stream = code_single(
                        decoding, bit, LOW_BIT + rank * 4 + which, MIN_P, LIMIT, contexts, stream, data
                    )
                else:
                    bit, stream = code_bit(decoding, bit, EVEN, stream, data)
                lower = 2 * lower + (1 if bit else 0)
            magnitude = (unary << shift) + lower
            if magnitude > MAGNITUDE_MAX:
                state[3] = stream[3]
                return -1 - row
            if magnitude > 0:
                signs = (np.sign(symbols[y, x - 1]) + 1) * 9 + (np.sign(symbols[y - 1, x]) + 1) * 3 + 1
                if present[3]:
                    signs += np.sign(before[y, x])
                negative, stream = code_single(
                    decoding, negative, SIGN + 27 * kind + signs, MIN_P, LIMIT, contexts, stream, data
                )
            if low:
                symbol, size = (-magnitude if negative else magnitude), 2 * magnitude
                symbols[y, x] = 2 * symbol
                values[y, x] = symbol + centre  # 32 bits
                coefficients[row, column] = (np.int64(values[y, x]) * step + 32768) >> 16
                continue
            restored = np.int64(0)
            if magnitude > 0:
                symbol = 2 * magnitude - quantiser
                size = _common(symbol, value) if value > 0 else symbol
                symbols[y, x] = -size if negative else size
                restored = 128 * symbol - OFFSET[quantiser, rank, min(magnitude, 3) - 1]
                restored = (restored * step + (1 << 23)) >> 24
            coefficients[row, column] = -restored if negative else restored
            node = NEXT[node, magnitude & 1]
        row += 1
        trellis[0] = node
    state[0], state[1], state[2], state[3] = stream
    return row


@jit
def _code_flag(decoding, flag, index, contexts, state, data):
    """Code a flag under one context."""
    stream = (state[0], state[1], state[2], state[3])
    flag, stream = code_single(decoding, flag, index, MIN_P, LIMIT, contexts, stream, data)
    state[0], state[1], state[2], state[3] = stream
    return flag


class _Symbols:
    """Coded coefficients of a band, in halves of a step: of a large band in as few bytes as they fit."""

    def __init__(self, height: int, width: int) -> None:
        self._shape, self._small = (height, width), height * width <= SMALL
        self._values: NDArray[Any] | None = None  # none: zeros; of a small band with a border of 2

    def set(self, top: int, around: NDArray[np.int32]) -> None:
        """Set rows from row `top` on to those in a border of 2; a small band keeps the array."""
        if self._small:
            self._values = around
            return
        values = around[2:-2, 2:-2]
        largest = max(int(values.max()), -int(values.min()))
        if self._values is None:
            if not largest:
                return
            self._values = np.zeros(self._shape, np.int8)
        if largest > np.iinfo(self._values.dtype).max:
            self._values = self._values.astype(np.int16 if largest <= np.iinfo(np.int16).max else np.int32)
        self._values[top : top + len(values)] = values

    def any(self) -> bool:
        """Whether one is not 0."""
        return self._values is not None and (not self._small or bool(self._values.any()))

    def rows(self, top: int, height: int, width: int) -> NDArray[np.int32]:
        """Return `height` rows of a width from row `top` on, with what is within 2 around; zeros beyond the band."""
        if self._small:  # as a whole
            if self._values is None:
                self._values = np.zeros((self._shape[0] + 4, self._shape[1] + 4), np.int32)
            missing = max(0, height - self._shape[0]), max(0, width - self._shape[1])
            return np.pad(self._values, [(0, n) for n in missing]) if any(missing) else self._values
        out = np.zeros((height + 4, width + 4), np.int32)
        if self._values is not None:
            first = max(0, top - 2)
            part = self._values[first : top + height + 2, : width + 2]
            start = first - top + 2
            out[start : start + part.shape[0], 2 : 2 + part.shape[1]] = part
        return out


class _Coder:
    """The state of an encoder or decoder of planes, int16 or int32 (slices, components, height, width).

    Attributes
    ----------
    planes : ndarray
        These planes, which become int32 where int16 is too narrow for what is decoded.
    lengths : list of int
        Positions in the stream in front of each level.
    contexts, mixers : ndarray
        As they are now; they begin with `start`, or as the format says.
    """

    def __init__(
        self,
        planes: NDArray[Any],
        code: int,
        quality_map: QualityMap | None,
        numbers: Sequence[int] | None = None,
        keep: bool = True,
        start: tuple[NDArray[np.uint32], NDArray[np.int32]] | None = None,
    ) -> None:
        self.planes, self._code, self._map, self._keep = planes, code, quality_map, keep
        self._numbers = range(planes.shape[1]) if numbers is None else numbers
        contexts, mixers = start or initial()
        self.contexts, self.mixers = contexts.copy(), mixers.copy()
        self._trellis = np.zeros(1, np.int64)
        self.lengths: list[int] = []
        self._memory = constant((self.contexts, self.mixers, self._trellis))
        row, sums = np.zeros((3, planes.shape[3] + 2), np.int64), np.zeros((6, planes.shape[3] + 3), np.int64)
        options, ways = np.zeros((planes.shape[3], 4), np.int64), np.zeros(planes.shape[3], np.int64)
        self._work = constant((*row, options, ways, (*sums,)))

    def run(
        self,
        decoding: bool,
        state: NDArray[np.int64],
        data: NDArray[np.uint8],
        halvings: int = 0,
        limit: int = NO_LIMIT,
    ) -> NDArray[np.uint8]:
        """Code the bands of all planes, but for details of the `halvings` finest levels.

        A decoder leaves out the first row that reads beyond position `limit`, and all that follows.

        Returns `data`, grown where an encoder needed more.
        """
        slices, _, height, width = self.planes.shape
        components = len(self._numbers)
        coded: dict[tuple[int, int, int], _Symbols] = {}
        cells: NDArray[np.uint8] | None = None
        for band in bands_of(height, width):
            if band.kind != LOW and band.level <= halvings:
                break
            if band.kind == HORIZONTAL:
                self.lengths.append(int(state[3]))
            if self._map is not None and band.kind != LOW:
                cells = self._map.of_band(band.level, band.kind, band.height, band.width)
            steps = band_steps(self._code, band, 1 if cells is None else int(cells.max(initial=1)))
            finest = band.level == halvings + 1  # no level has contexts in it
            for number in range(slices * components):
                s, component = divmod(number, components)
                before = coded.get((band.level, band.kind, number - 1)) if component else None
                near = [
                    coded.pop((band.level + 1, band.kind, number), None),
                    coded.get((band.level, 1, number)) if band.kind > 1 else None,
                    coded.get((band.level, 2, number)) if band.kind == DIAGONAL else None,
                    before,
                ]
                plane = s, self._numbers[component]
                coded[band.level, band.kind, number], data = self._code_band(
                    decoding, band, steps, plane, None if cells is None else cells[s], near, state, data, limit
                )
                if decoding and state[3] > limit:
                    return data
                if finest and band.kind == DIAGONAL:
                    for kind, last in ((HORIZONTAL, number), (VERTICAL, number), (DIAGONAL, number - 1)):
                        coded.pop((band.level, kind, last), None)
        return data

    def _code_band(
        self,
        decoding: bool,
        band: Band,
        steps: NDArray[np.int64],
        plane: tuple[int, int],
        cells: NDArray[np.uint8] | None,
        near: list[_Symbols | None],
        state: NDArray[np.int64],
        data: NDArray[np.uint8],
        limit: int,
    ) -> tuple[_Symbols, NDArray[np.uint8]]:
        symbols = _Symbols(band.height, band.width)
        index = EMPTY + 2 * band.kind + int(near[3] is not None and near[3].any())
        room = 64 + band.width * COEFFICIENT_BYTES
        # Neighbours of a strip lie in strips of the same place; the low band, which is small, is one strip.
        rows = band.height if band.kind == LOW else min(band.height, max(2, STRIP // band.width & ~1))
        strips = [(top, min(rows, band.height - top)) for top in range(0, band.height, rows)]
        filled = False
        if not decoding:
            data = grown(data, int(state[3]), room)
            share = 128 if band.kind == LOW else FILLED
            for top, height in strips:
                step: Any = int(steps[1]) if cells is None else steps[cells[top : top + height]]
                threshold = (share * step) >> 24
                filled = filled or _reaches(self._part(plane, band, top, height), threshold)
        if not _code_flag(decoding, filled, index, self.contexts, state, data) or (decoding and state[3] > limit):
            if self._keep and not decoding:  # a decoder's planes hold zeros
                self._part(plane, band, 0, band.height)[...] = 0
            return symbols, data
        present = tuple(one is not None for one in near)
        settings = steps, band.kind, band.level
        self._trellis[0] = 0
        above: NDArray[np.int32] | None = None  # the last two rows of the strip before
        for top, height in strips:
            if decoding:  # which fills all
                coefficients = np.empty((height, band.width), np.int32)
            else:
                coefficients = self._part(plane, band, top, height).astype(np.int32, order="C")
            around = np.zeros((height + 4, band.width + 4), np.int32)
            if above is not None:
                around[:2] = above
            values = np.zeros_like(around) if band.kind == LOW else _NOTHING
            parts = [_NOTHING if one is None else one.rows(top, height, band.width) for one in near[1:]]
            parent = near[0]
            if parent is not None:
                half = (height + 1) // 2, (band.width + 1) // 2
            others = (_NOTHING if parent is None else parent.rows(top // 2, *half), *parts)
            values_of = None if cells is None else cells[top : top + height]
            row = 0
            while row < height:
                row = _code_rows(
                    decoding,
                    coefficients,
                    around,
                    values,
                    others,
                    present,
                    values_of,
                    settings,
                    self._memory,
                    self._work,
                    state,
                    data,
                    limit if decoding else data.size,
                    row,
                )
                if decoding and state[3] > limit:
                    break
                if row < 0:
                    raise CorruptPayload("wavelet: the stream holds a coefficient outside the allowed range")
                if row < height:
                    data = grown(data, int(state[3]), room)
            ended = decoding and state[3] > limit
            if ended:
                coefficients[(row - 1 if row > 0 else -1 - row) :] = 0
            if self._keep:
                self._set(plane, band, top, coefficients)
            if ended:
                break
            symbols.set(top, around)
            above = around[height : height + 2]
        return symbols, data

    def _part(self, plane: tuple[int, int], band: Band, top: int, height: int) -> NDArray[Any]:
        """Return rows of a band, a view."""
        rows = slice(band.y + top, band.y + min(top + height, band.height))
        return self.planes[plane][rows, band.x : band.x + band.width]

    def _set(self, plane: tuple[int, int], band: Band, top: int, coefficients: NDArray[np.int32]) -> None:
        """Set rows of a band."""
        if self.planes.dtype == np.int16 and not fits_int16(coefficients):
            self.planes = self.planes.astype(np.int32)
        self._part(plane, band, top, len(coefficients))[...] = coefficients


def _reaches(values: NDArray[Any], threshold: Any) -> bool:
    """Tell whether a magnitude is at least that of a threshold for all, or at least its own."""
    if isinstance(threshold, int):
        return bool(values.max() >= threshold or values.min() <= -threshold)
    return bool((np.abs(values) >= threshold).any())


def fits_int16(values: NDArray[np.int32]) -> bool:
    """Tell whether integers and their magnitudes fit 16 bits."""
    return not values.size or bool(values.min() >= -INT16_MAX and values.max() <= INT16_MAX)


def encode_planes(
    planes: NDArray[Any],
    code: int,
    quality_map: QualityMap | None = None,
    *,
    numbers: Sequence[int] | None = None,
    keep: bool = False,
) -> tuple[bytes, list[int], NDArray[Any]]:
    """Quantise and encode transformed planes.

    Parameters
    ----------
    planes : ndarray
        int16 or int32 (slices, components, height, width), C order.
    code : int
        Code of the step.
    quality_map : QualityMap, optional
        Coarser steps by cells.
    numbers : sequence of int, optional
        Components to encode; by default all.
    keep : bool
        Whether to overwrite what is encoded by the coefficients that decoding gives.

    Returns
    -------
    bytes
        The stream.
    list of int
        Bytes from the start that are enough to decode all that is in front of each level of detail, coarsest first.
    ndarray
        The planes; int32 ones, if they are overwritten and int16 is too narrow for that.
    """
    state, data = begin_encoding(), np.empty(1 << 12, np.uint8)
    coder = _Coder(planes, code, quality_map, numbers, keep)
    data = coder.run(False, state, data)
    stream = finish_encoding(state, data)
    # A decoder has read so many bytes beyond those that an encoder has written for the same symbols.
    ahead = int(begin_decoding(b"", "wavelet")[0][3])
    return stream, [min(length + ahead, len(stream)) for length in coder.lengths], coder.planes


def learn(
    planes: NDArray[Any], code: int, start: tuple[NDArray[np.uint32], NDArray[np.int32]]
) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Return what contexts and mixers that start as given are after planes, as `encode_planes` takes them."""
    coder = _Coder(planes, code, None, keep=False, start=start)
    coder.run(False, begin_encoding(), np.empty(1 << 12, np.uint8))
    return coder.contexts, coder.mixers


def decode_planes(
    data: bytes,
    shape: tuple[int, int, int, int],
    code: int,
    halvings: int = 0,
    quality_map: QualityMap | None = None,
    whole: bool = True,
    dtype: Any = np.int32,
) -> NDArray[Any]:
    """Decode transformed planes (slices, components, height, width), int32, or int16 where that is `dtype` and fits.

    With `halvings`, details of so many of the finest levels are left out, and what is at their places is 0. If `data`
    is not the whole stream but a start of it, coefficients of rows that it does not hold are 0.

    Raises
    ------
    CorruptPayload
        If the stream holds an impossible coefficient, or bytes that no coefficient needs.
    """
    planes = np.zeros(shape, dtype)
    state, stream = begin_decoding(data, "wavelet") if whole else read_first(data)
    limit = NO_LIMIT if whole else stream.size
    coder = _Coder(planes, code, quality_map)
    coder.run(True, state, stream, halvings, limit)
    if whole and not halvings:
        check_end(int(state[3]), stream.size, "wavelet", unit="coefficient")
    return coder.planes
