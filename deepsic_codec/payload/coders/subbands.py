"""Context-mixing coder for the quantised bands of wavelet-transformed planes.

Bands are coded from the coarsest to the finest, each for all planes in turn. The size of a coefficient is expected from
its neighbours, from the coefficients of the next coarser level at its place, from the other detail of its level, and
from the plane before. Its magnitude is binarised in units that follow the expectation; each bin mixes six adaptive
contexts in the logistic domain. Nothing is trained; all arithmetic is on integers. `docs/wavelet.md` is normative.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
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
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, check_end, finish_encoding
from deepsic_codec.payload.coders.numba_jit import inline, jit
from deepsic_codec.payload.coders.wavelet import DIAGONAL, FRACTION_BITS, LOW, MAX_LEVELS, NORM_BITS, Band, bands_of
from deepsic_codec.payload.steps import MANTISSA_BITS, MANTISSAS, PER_OCTAVE, UNIT

_STEP_BITS = 16  # binary places of the step of a band

# Levels of expected sizes, in quarters of an octave, and coarse ones.
LEVELS, COARSE = 96, 32
# Unary bins of a magnitude before the Exp-Golomb escape, bits of the longest escape, and the largest magnitude.
UNARY, ESCAPE_BITS, MAGNITUDE_MAX = 14, 26, (1 << 26) - 1
# Observations that a context counts; rate and inputs of the mixers, and their weights at the start.
LIMIT, RATE, INPUTS = 255, 5, 7
MIXERS = np.tile(np.array([22000, 14000, 14000, 12000, 12000, 12000, 0], np.int32), (4 * COARSE, 1))
KINDS = 4 * (MAX_LEVELS + 1)  # classes of bands, by level and kind
COEFFICIENT_BYTES = 2 * (2 + UNARY + 2 * ESCAPE_BITS + 26)  # limit for one coefficient: 16 bits for each bin

# Quantising: a magnitude is rounded up from this many 256ths of a step on, of a low band from a half on.
ROUND_UP, ROUND_UP_LOW = 141, 128
# Weight of the rate against the squared error, in 256ths of a squared step for a bit, where a one may become a zero.
LAMBDA = 22


class _Contexts(NamedTuple):
    """Where each family of contexts starts in their array, and the number of contexts."""

    expected: int  # magnitude bin by expected size and bin
    parent: int  # by coarse sizes of neighbours and of the coarser level
    sibling: int  # by coarse sizes of the other detail and of neighbours
    pattern: int  # first bin by each neighbour's size: zero, one unit, more
    later: int  # later bins by the two nearest neighbours
    kind: int  # by class of band and expected size
    plane: int  # by expected size and the coarse size in the plane before
    sign: int  # sign by kind and the signs of three neighbours
    low_bit: int  # the two highest bits below the unit, by expected size
    escape: int  # Exp-Golomb prefix, by position
    quiet: int  # first bin where everything around is 0, by class of band
    empty: int  # whether a band has a coefficient that is not 0, by kind and by the plane before
    size: int


def _layout() -> _Contexts:
    pairs = COARSE * COARSE * 3
    sizes = [LEVELS * UNARY, pairs, pairs, 3**7, 36 * 3 * UNARY, KINDS * (LEVELS // 2) * 3, LEVELS * COARSE * 3]
    sizes += [4 * 27, LEVELS * 4, ESCAPE_BITS + 1, KINDS, 8]
    return _Contexts(*accumulate(sizes, initial=0))


AT = _layout()
(EXPECTED, PARENT, SIBLING, PATTERN, LATER, KIND, PLANE, SIGN, LOW_BIT, ESCAPE, QUIET, EMPTY, CONTEXTS) = AT


def _log_table() -> NDArray[np.uint8]:
    """Return floor(4 log2(n)) + 1 of n = 1..4095, and 0 of 0."""
    return np.array([0] + [(n**4).bit_length() for n in range(1, 4096)], np.uint8)


def _cost_table() -> NDArray[np.int64]:
    """Return the bits of an event of probability n / 4096 in 1/256, n = 0..4096; the first entry is that of 1."""
    return np.rint(-256 * np.log2(np.maximum(np.arange(4097), 1) / 4096)).astype(np.int64)


def _offset_table() -> NDArray[np.int64]:
    """Return how far the mean magnitude lies below 1, 2 and larger numbers, in 256ths of a step, by expected size.

    Where small coefficients are expected, most lie near the lower end of an interval. Measured on scenes of many kinds.
    """
    first, last = 18, 44  # beyond these levels the offsets are those of the ends
    one = (19, 18, 16, 15, 14, 12, 9, 6, 4, 2, -1, -2, -3, -4, -6, -7, -8, -8, -9) + (-10,) * 8
    two = (35, 32, 30, 27, 24, 20, 16, 11, 7, 4, 1, 0, -2, -4, -5, -6, -8, -8, -9, -10, -10, -10) + (-11,) * 5
    more = (
        (20, 20, 19, 18, 18, 15, 12, 10, 7, 4, 2, 0, -3, -4, -5, -6, -7, -8, -9, -9)
        + (-10,) * 3
        + (-11,) * 2
        + (-12,) * 2
    )
    return np.array([one, two, more], np.int64).T[np.arange(LEVELS).clip(first, last) - first]


LOG, COST, OFFSET = _log_table(), _cost_table(), _offset_table()
_NOTHING: NDArray[np.int32] = np.zeros((1, 1), np.int32)


def band_step(code: int, band: Band) -> int:
    """Return the step of a band in 2^-16 of a coefficient's unit."""
    octave, rest = divmod(code, PER_OCTAVE)
    shift = octave + FRACTION_BITS + NORM_BITS + _STEP_BITS - MANTISSA_BITS - (UNIT.bit_length() - 1)
    return (MANTISSAS[rest] << shift) // band.norm


@inline
def _level(n):
    """Return floor(4 log2(n)) + 1 of n >= 0, from its upper 9 to 12 bits; 0 of 0; at most LEVELS - 1."""
    steps = np.int64(0)
    while n >= 4096:
        n >>= 4
        steps += 16
    return min(np.int64(LOG[n]) + steps, LEVELS - 1)


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
def _zero_or_one(p, exact, weight):
    """Return 0 instead of 1 where it saves more bits than it costs.

    `p` is the probability of a one in 1/65536, `exact` the magnitude in 256ths of a step, `weight` LAMBDA or 0.
    """
    # A one costs its sign and, at the usual odds, the end of its magnitude, too.
    bits = COST[max(p >> 4, 1)] - COST[max((65536 - p) >> 4, 1)] + 356
    return np.int64(0) if (2 * exact - 256) * 256 < weight * bits else np.int64(1)


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
def _code_rows(decoding, coefficients, symbols, values, near, present, settings, memory, work, state, data, row):
    """Code rows of one band of one plane.

    Parameters
    ----------
    decoding : bool
        Whether to decode.
    coefficients : int32 (height, width)
        An encoder's coefficients; both directions leave dequantised ones there.
    symbols, values : int32 (height + 4, width + 4)
        Coded integers and, of a low band, the quantised coefficients that they predict; with a border of zeros.
    near : four of int32 (rows, columns)
        Symbols of the coarser level, of the first and second detail of the level, and of the plane before, with
        borders of zeros.
    present : four of bool
        Which of these there are.
    settings : tuple of int
        Step, kind and level of the band, LAMBDA or 0.
    memory : tuple
        Contexts uint32 (CONTEXTS,) and mixers int32 (n,).
    work : two of int64 (INPUTS,)
        Working memory.
    state, data : int64 (4,), uint8 (n,)
        The stream.
    row : int
        The first row to code.

    Returns
    -------
    int
        The next row. It is not the last if `data` may be too short for a row. -1 if the stream holds an impossible
        symbol.
    """
    stream = (state[0], state[1], state[2], state[3])
    height, width = coefficients.shape
    (parent, first, second, before), (step, kind, level, weight) = near, settings
    contexts, mixers = memory
    at, stretched = work
    low, band = kind == LOW, 4 * level + kind
    while row < height and (decoding or stream[3] + width * COEFFICIENT_BYTES <= data.size):
        y = row + 2
        for column in range(width):
            x = column + 2
            left, upper = _magnitude(symbols, y, x - 1), _magnitude(symbols, y - 1, x)
            corner, right = _magnitude(symbols, y - 1, x - 1), _magnitude(symbols, y - 1, x + 1)
            far = _magnitude(symbols, y, x - 2) + _magnitude(symbols, y - 2, x)
            size = 5 * (left + upper) + 2 * (corner + right) + far
            total, shares = 2 * size, np.int64(2)
            coarser, other, previous = np.int64(0), np.int64(0), np.int64(0)
            if present[0]:
                coarser = _around(parent, (row >> 1) + 2, (column >> 1) + 2)
                total, shares = total + coarser, shares + 2
            if present[1]:
                other = _around(first, y, x)
                total, shares = total + other, shares + 1
                if present[2]:
                    more = _around(second, y, x)
                    total, shares = total + more, shares + 1
                    other = (other + more) >> 1
            if present[3]:
                previous = _around(before, y, x)
                total, shares = total + previous, shares + 1
            magnitude, exact = np.int64(0), np.int64(0)
            negative: Any = False
            centre = _predicted(values, y, x) if low else np.int64(0)
            if not decoding:
                coefficient = np.int64(coefficients[row, column])
                exact = (abs(coefficient) << 24) // step  # in 256ths of a step
                magnitude = (exact + 256 - (ROUND_UP_LOW if low else ROUND_UP)) >> 8
                if low:
                    difference = (-magnitude if coefficient < 0 else magnitude) - centre
                    negative, magnitude = difference < 0, abs(difference)
                else:
                    negative = coefficient < 0
            unary: Any = np.int64(0)
            if total == 0 and not low:  # so for most coefficients: speed matters more here than the last bit
                if weight > 0 and magnitude == 1 and not decoding:
                    magnitude = _zero_or_one(np.int64(contexts[QUIET + band] >> 16), exact, weight)
                bit = magnitude > 0
                bit, stream = code_single(decoding, bit, QUIET + band, MIN_P, LIMIT, contexts, stream, data)
                if not bit:
                    coefficients[row, column] = 0
                    continue
                unary += 1
            expected = total // shares
            expected_level = _level(4 * expected)
            size_level, other_level = _level(size) // 3, _level(other) // 3
            coarser_level, previous_level = _level(coarser) // 3, _level(previous) // 3
            shift = np.int64(0)  # magnitudes are coded in units of 2^shift
            while expected >> (shift + 5) > 0:
                shift += 1
            pattern = ((min(left >> shift, 2) * 3 + min(upper >> shift, 2)) * 3 + min(corner >> shift, 2)) * 3
            pattern = ((pattern + min(right >> shift, 2)) * 3 + min(((coarser >> shift) + 7) >> 4, 2)) * 3
            pattern = (pattern + min(((other >> shift) + 7) >> 4, 2)) * 3 + min(((previous >> shift) + 7) >> 4, 2)
            nearest = (min(left >> shift, 5) * 6 + min(upper >> shift, 5)) * 3 + min(((coarser >> shift) + 7) >> 4, 2)

            while unary < UNARY:
                bin3 = min(unary, 2)
                at[0] = EXPECTED + expected_level * UNARY + unary
                at[1] = PARENT + (size_level * COARSE + coarser_level) * 3 + bin3
                at[2] = SIBLING + (other_level * COARSE + size_level) * 3 + bin3
                at[3] = PATTERN + pattern if unary == 0 else LATER + nearest * UNARY + unary
                at[4] = KIND + (band * (LEVELS // 2) + (expected_level >> 1)) * 3 + bin3
                at[5] = PLANE + (expected_level * COARSE + previous_level) * 3 + bin3
                mixer = (min(unary, 3) * COARSE + expected_level // 3) * INPUTS
                dot: Any = np.int64(mixers[mixer + INPUTS - 1]) * STRETCH_ONE
                for n in range(INPUTS - 1):
                    stretched[n] = STRETCH[contexts[at[n]] >> 18]
                    dot += np.int64(mixers[mixer + n]) * stretched[n]
                dot = min(max(dot >> 16, -STRETCH_MAX), STRETCH_MAX)
                p = np.int64(SQUASH[dot + STRETCH_MAX])
                if weight > 0 and unary == 0 and magnitude == 1 and shift == 0 and not decoding:
                    magnitude = _zero_or_one(p, exact, weight)
                bit = (magnitude >> shift) > unary
                bit, stream = code_bit(decoding, bit, p, stream, data)
                error = ((np.int64(65535) if bit else np.int64(0)) - p) * RATE
                for n in range(INPUTS - 1):
                    mixers[mixer + n] += (stretched[n] * error + 131072) >> 18
                    adapt(contexts, at[n], bit, LIMIT)
                mixers[mixer + INPUTS - 1] += (STRETCH_ONE * error + 131072) >> 18
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
                        return -1
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
                        decoding, bit, LOW_BIT + expected_level * 4 + which, MIN_P, LIMIT, contexts, stream, data
                    )
                else:
                    bit, stream = code_bit(decoding, bit, EVEN, stream, data)
                lower = 2 * lower + (1 if bit else 0)
            magnitude = (unary << shift) + lower
            if magnitude > MAGNITUDE_MAX:
                return -1
            if magnitude > 0:
                signs = (np.sign(symbols[y, x - 1]) + 1) * 9 + (np.sign(symbols[y - 1, x]) + 1) * 3 + 1
                if present[3]:
                    signs += np.sign(before[y, x])
                negative, stream = code_single(
                    decoding, negative, SIGN + 27 * kind + signs, MIN_P, LIMIT, contexts, stream, data
                )
            symbol = -magnitude if negative else magnitude
            symbols[y, x] = symbol
            if low:
                values[y, x] = symbol + centre  # 32 bits
                coefficients[row, column] = (np.int64(values[y, x]) * step + 32768) >> 16
            elif symbol != 0:
                restored = ((magnitude * 256 - OFFSET[expected_level, min(magnitude, 3) - 1]) * step + (1 << 23)) >> 24
                coefficients[row, column] = -restored if negative else restored
            else:
                coefficients[row, column] = 0
        row += 1
    state[0], state[1], state[2], state[3] = stream
    return row


@jit
def _code_flag(decoding, flag, index, contexts, state, data):
    """Code a flag under one context."""
    stream = (state[0], state[1], state[2], state[3])
    flag, stream = code_single(decoding, flag, index, MIN_P, LIMIT, contexts, stream, data)
    state[0], state[1], state[2], state[3] = stream
    return flag


class _Coder:
    """The state of an encoder or decoder of planes int32 (slices, components, height, width)."""

    def __init__(self, planes: NDArray[np.int32], code: int, weight: int) -> None:
        self._planes, self._code, self._weight = planes, code, weight
        self._contexts = np.full(CONTEXTS, 1 << 31, np.uint32)
        self._memory = self._contexts, MIXERS.ravel().copy()
        self._work = np.zeros(INPUTS, np.int64), np.zeros(INPUTS, np.int64)

    def run(self, decoding: bool, state: NDArray[np.int64], data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Code all bands of all planes; return `data`, grown where an encoder needed more."""
        slices, components, height, width = self._planes.shape
        level = -1
        coded: dict[tuple[int, int, int], NDArray[np.int32]] = {}
        for band in bands_of(height, width):
            if not band.height * band.width:
                continue
            if band.level != level:  # contexts reach to the next coarser level
                level, coded = band.level, {k: v for k, v in coded.items() if k[0] == band.level + 1}
            for number in range(slices * components):
                plane = divmod(number, components)
                before = coded.get((band.level, band.kind, number - 1)) if plane[1] else None
                near = [
                    coded.get((band.level + 1, band.kind, number)),
                    coded.get((band.level, 1, number)) if band.kind > 1 else None,
                    coded.get((band.level, 2, number)) if band.kind == DIAGONAL else None,
                    before,
                ]
                symbols, data = self._code_band(decoding, band, plane, near, state, data)
                coded[band.level, band.kind, number] = symbols
        return data

    def _code_band(
        self,
        decoding: bool,
        band: Band,
        plane: tuple[int, int],
        near: list[NDArray[np.int32] | None],
        state: NDArray[np.int64],
        data: NDArray[np.uint8],
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        part = self._planes[plane][band.y : band.y + band.height, band.x : band.x + band.width]
        step = band_step(self._code, band)
        symbols = np.zeros((band.height + 4, band.width + 4), np.int32)
        before = near[3]
        index = EMPTY + 2 * band.kind + int(before is not None and bool(before.any()))
        room = 64 + band.width * COEFFICIENT_BYTES
        coefficients = np.ascontiguousarray(part)
        filled = False
        if not decoding:
            data = grown(data, int(state[3]), room)
            threshold = ((ROUND_UP_LOW if band.kind == LOW else ROUND_UP) * step) >> 24
            filled = bool(np.abs(coefficients).max() >= threshold)
        if not _code_flag(decoding, filled, index, self._contexts, state, data):
            part[...] = 0
            return symbols, data
        values = np.zeros_like(symbols) if band.kind == LOW else _NOTHING
        present = tuple(one is not None for one in near)
        others = tuple(_NOTHING if one is None else _fitted(one, band, n == 0) for n, one in enumerate(near))
        settings = step, band.kind, band.level, 0 if band.kind == LOW else self._weight
        row = 0
        while row < band.height:
            row = _code_rows(
                decoding,
                coefficients,
                symbols,
                values,
                others,
                present,
                settings,
                self._memory,
                self._work,
                state,
                data,
                row,
            )
            if row < 0:
                raise CorruptPayload("wavelet: the stream holds a coefficient outside the allowed range")
            if row < band.height:
                data = grown(data, int(state[3]), room)
        part[...] = coefficients
        return symbols, data


def _fitted(symbols: NDArray[np.int32], band: Band, parent: bool) -> NDArray[np.int32]:
    """Return symbols with a border of zeros of at least two around every place of a band."""
    height, width = ((band.height + 1) // 2, (band.width + 1) // 2) if parent else (band.height, band.width)
    missing = max(0, height + 4 - symbols.shape[0]), max(0, width + 4 - symbols.shape[1])
    return np.pad(symbols, [(0, n) for n in missing]) if any(missing) else symbols


def encode_planes(planes: NDArray[np.int32], code: int, optimise: bool = True) -> bytes:
    """Quantise and encode transformed planes.

    Parameters
    ----------
    planes : ndarray
        int32 (slices, components, height, width), C order; overwritten by the coefficients that decoding gives.
    code : int
        Code of the step.
    optimise : bool
        Whether coefficients become zero where that saves more bits than it costs.
    """
    state, data = begin_encoding(), np.empty(1 << 12, np.uint8)
    data = _Coder(planes, code, LAMBDA if optimise else 0).run(False, state, data)
    return finish_encoding(state, data)


def decode_planes(data: bytes, shape: tuple[int, int, int, int], code: int) -> NDArray[np.int32]:
    """Decode transformed planes int32 (slices, components, height, width).

    Raises
    ------
    CorruptPayload
        If the stream holds an impossible coefficient, or bytes that no coefficient needs.
    """
    planes = np.zeros(shape, np.int32)
    state, stream = begin_decoding(data, "wavelet")
    _Coder(planes, code, 0).run(True, state, stream)
    check_end(int(state[3]), stream.size, "wavelet", unit="coefficient")
    return planes
