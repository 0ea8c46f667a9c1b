"""Kernels of the residual coder: a band of samples, row by row. `docs/residual.md` is normative and derives the bounds.

An adaptive filter and the mean error in the same surroundings correct the prediction of the fixed filter. The error,
divided by the step, is binarised in units that follow its local size, and coded under adaptive contexts.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inline, inner, jit
from deepsic_codec.payload.coders.binary import MIN_P, RECIPROCAL, code_mixed, code_single
from deepsic_codec.payload.coders.residual_filter import (
    MEAN_SCALE,
    TAPS,
    USED,
    WEIGHT_SHIFT,
    WEST,
    add_row,
)

# The adaptive filter: inputs, limit of a weight in 1/65536, and the exponent of the step, 2**-7.
ADAPTIVE_TAPS, ADAPTIVE_MAX, RATE_SHIFT = 12, 1 << 20, 7
# Surroundings of the mean error, by the signs of neighbours less the prediction and the local size; its first count,
# its largest, and its fraction bits.
SIGNS, BIAS_LEVELS, BIAS_START, BIAS_LIMIT, BIAS_SHIFT = 64, 25, 6, 255, 8
# Levels of local size, in quarters of an octave, and the highest that is coded in units of 1.
LEVELS, UNIT_LEVEL = 100, 25
VALUES = 80  # levels of a sample's value, of which the last is that of values below the range
# Unary bins before the escape; bits of the longest escape and weight.
UNARY, ESCAPE_BITS, WEIGHT_BITS = 20, 26, 12
# Observations that a context counts; rate and inputs of the mixers, and their weights at the start.
LIMIT, RATE, INPUTS = 255, 16, 3
MIXERS = np.tile(np.array([30000, 18000, 18000], np.int64), LEVELS * (UNARY + 1))
SAMPLE_BYTES = 2 * (4 + UNARY + ESCAPE_BITS)  # limit for the coded bits of a sample: 16 bits for each bin
PLAIN_BYTES = 8  # limit for its plain bits: 26 of an escape and 22 of a unit
MODE_BITS = 2

# Where each family of contexts starts in their array.
_SIZES = (
    LEVELS * 9 * 2,
    LEVELS * UNARY,
    32 * 16 * 2,
    32 * UNARY,
    VALUES * 3 * 16,
    LEVELS * 9,
    32 * VALUES * 2,
    SIGNS * 2,
    LEVELS * 2,
    ESCAPE_BITS,
)
ZERO, HIGH, NEAR, FAR, VALUE, SIGN, SIGN_VALUE, SIGN_AROUND, LOW, ESCAPE = (sum(_SIZES[:i]) for i in range(len(_SIZES)))
NEW_FILTER, NONZERO, LENGTH = (sum(_SIZES) + i for i in (0, 1, 3))
CONTEXTS = LENGTH + WEIGHT_BITS

# Probability in 1/256 that the first unary bin, or a later one, is one: at the start, by level.
FIRST_START = (
    2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 10, 13, 20, 29, 40, 56, 74, 91,
    109, 128, 146, 159, 170, 181, 62, 79, 97, 115,
)  # fmt: skip
LATER_START = (
    20, 20, 20, 20, 20, 20, 20, 19, 19, 19, 18, 18, 18, 17, 16, 17, 18, 19, 21, 25,
    33, 44, 57, 71, 85, 100, 48, 62, 78, 96,
)  # fmt: skip
START_COUNT = 6


def _log_table() -> NDArray[np.uint8]:
    """Return floor(4 log2(n)) + 1 of n = 1..4095, and 0 of 0."""
    return np.array([0] + [(n**4).bit_length() for n in range(1, 4096)], np.uint8)


def _start_table() -> NDArray[np.uint32]:
    """Return all contexts before the first observation."""
    start = np.full(CONTEXTS, 1 << 31, np.uint32)
    level = np.arange(LEVELS)
    # above UNIT_LEVEL the unit doubles every fourth level, and probabilities repeat
    same = np.where(level > UNIT_LEVEL, UNIT_LEVEL + 1 + (level - UNIT_LEVEL - 1) % 4, level)
    first, later = (np.array(t, np.uint32)[same] << 24 | START_COUNT for t in (FIRST_START, LATER_START))
    zero = start[ZERO:HIGH].reshape(LEVELS, 9, 2)
    zero[:, :, 0], zero[:, :, 1:] = first[:, None], later[:, None, None]
    start[HIGH:NEAR].reshape(LEVELS, UNARY)[:] = later[:, None]
    return start


LOG, START = _log_table(), _start_table()


@inline
def _level(n):
    """Return floor(4 log2(n)) + 1 of n >= 0, from its upper 9 to 12 bits; 0 of 0."""
    steps = np.int64(0)
    while n >= 4096:
        n >>= 4
        steps += 16
    return np.int64(LOG[n]) + steps


@inline
def _code_plain(decoding, bits, n, state, plain):
    """Code `n` <= 26 bits as they are, low ones first; past the end a decoder reads zeros."""
    buffer, buffered, position = state
    if decoding:
        while buffered < n:
            if position < plain.size:
                buffer |= np.int64(plain[position]) << buffered
            position += 1
            buffered += 8
        bits = buffer & ((1 << n) - 1)
        buffer >>= n
        buffered -= n
    else:
        buffer |= bits << buffered
        buffered += n
        while buffered >= 8:
            plain[position] = buffer & 255
            position += 1
            buffer >>= 8
            buffered -= 8
    return bits, (buffer, buffered, position)


@jit
def code_filter(decoding, weights, used, inherited, contexts, state, data, plain):
    """Code the weights of a band; returns 1 if the stream holds an impossible weight, else 0."""
    stream, plain_state = (state[0], state[1], state[2], state[3]), (state[4], state[5], state[6])
    new_filter = False
    if not decoding:
        for t in range(used):
            new_filter = new_filter or weights[t] != inherited[t]
    new_filter, stream = code_single(decoding, new_filter, NEW_FILTER, MIN_P, LIMIT, contexts, stream, data)
    last = np.int64(1)
    for t in range(used):
        if not new_filter:
            weights[t] = inherited[t]
            continue
        weight = weights[t]
        bit, stream = code_single(decoding, weight != 0, NONZERO + last, MIN_P, LIMIT, contexts, stream, data)
        last = np.int64(bit)
        if not bit:
            weights[t] = 0
            continue
        size = abs(weight)
        length = np.int64(0)
        if not decoding:
            while size >> (length + 1):
                length += 1
        n = np.int64(0)
        while True:
            bit, stream = code_single(decoding, n < length, LENGTH + n, MIN_P, LIMIT, contexts, stream, data)
            if not bit:
                break
            n += 1
            if n == WEIGHT_BITS:
                return 1
        # the bits after the first, and the sign
        bits = ((size & ((1 << n) - 1)) << 1) | np.int64(weight < 0)
        bits, plain_state = _code_plain(decoding, bits, n + 1, plain_state, plain)
        size = (1 << n) | (bits >> 1)
        weights[t] = -size if bits & 1 else size
    for t in range(used, weights.size):
        weights[t] = 0
    state[0], state[1], state[2], state[3] = stream
    state[4], state[5], state[6] = plain_state
    return 0


@inner
def _predict_row(weights, used, planes, y, means, north, out):
    """Sum into `out`, float64, all products of the fixed filter but those of samples in the row itself.

    Sums of integers below 2**53 are exact in doubles, and compilers make vectors of them.
    """
    width = out.size
    for x in range(width):
        out[x] = 0
    north[0], north[1], north[2] = weights[0] + weights[1] + weights[2], 0, 0
    for t in range(WEST, used):
        weight = weights[t]
        if weight == 0:
            continue
        north[TAPS[t, 0] % 3] += weight
        factor = np.float64(weight)
        if TAPS[t, 0] == 3:
            for x in range(width):
                out[x] += factor * np.float64(means[x] >> MEAN_SCALE)
        else:
            first = 3 + TAPS[t, 2]
            row = planes[TAPS[t, 0]][y + TAPS[t, 1]][first : first + width]
            for x in range(width):
                out[x] += factor * np.float64(row[x])
    for plane in range(3):
        if north[plane] != 0:
            factor = np.float64(north[plane])
            row = planes[plane][y - 1][3 : 3 + width]
            for x in range(width):
                out[x] -= factor * np.float64(row[x])


@inner
def _code_row(decoding, flat, samples, masked, prepared, rows, before, shape, memory, state, data, plain):
    """Code a row of samples of one band; returns 0, or 1 if the stream holds an impossible sample."""
    stream, plain_state = (state[0], state[1], state[2], state[3]), (state[4], state[5], state[6])
    fixed, activity, near = prepared
    row, row_n, row_nn, size_row, base_row, base_n, base_nn = rows
    base_pn, base_ph, base_ps = before
    west1, west2, west3, north_weight, top, step, zero, inverse = shape
    adaptive_c, inputs, biases, bias_counts, mixers, contexts = memory
    width = samples.size
    half = step >> 1
    size1, size2 = np.int64(0), np.int64(0)
    last = np.int64(0)
    for x in range(width):
        i, c = x + 3, x + 2
        w1, n1, ne, nw = np.int64(row[i - 1]), np.int64(row_n[i]), np.int64(row_n[i + 1]), np.int64(row_n[i - 1])
        w2, n2 = np.int64(row[i - 2]), np.int64(row_nn[i])
        if flat:  # no data above
            base = last << 4
        else:
            total = np.int64(fixed[x]) + west1 * w1 + west2 * w2 + west3 * np.int64(row[i - 3])
            base = (n1 << 4) + (total >> (WEIGHT_SHIFT - 4))
            base = min(max(base, np.int64(0)), top << 4)
        if masked[x]:
            row[i] = n1
            samples[x] = 0
            size2, size1 = size1, np.int64(0)
            size_row[c] = 0
            base_row[c] = 0
            continue
        inputs[0], inputs[1], inputs[2], inputs[3] = base_row[c - 1], base_n[c], base_n[c - 1], base_n[c + 1]
        inputs[4], inputs[5], inputs[6] = base_row[c - 2], base_nn[c], base_n[c - 2]
        inputs[7], inputs[8], inputs[9] = base_pn[c], base_ph[c], base_ph[c - 1]
        inputs[10], inputs[11] = base_ph[c + 1], base_ps[c]
        total, power = np.int64(0), np.int64(4096)
        for t in range(ADAPTIVE_TAPS):
            total += np.int64(adaptive_c[t]) * np.int64(inputs[t])
            power += np.int64(inputs[t]) * np.int64(inputs[t])
        adapted = min(max(base + (total >> 16), np.int64(0)), top << 4)
        level = min(_level((((activity[x] + north_weight * (2 * size1 + size2)) >> 3) * inverse) >> 16), LEVELS - 1)
        signs = np.int64((w1 << 4) > adapted) | np.int64((n1 << 4) > adapted) << 1 | np.int64((ne << 4) > adapted) << 2
        signs |= np.int64((nw << 4) > adapted) << 3 | np.int64(((2 * w1 - w2) << 4) > adapted) << 4
        signs |= np.int64(((2 * n1 - n2) << 4) > adapted) << 5
        around = signs * BIAS_LEVELS + (level >> 2)
        mu = min(max(adapted + (np.int64(biases[around]) >> BIAS_SHIFT), np.int64(0)), top << 4)
        centre = (mu + 8) >> 4
        fraction = mu - (centre << 4)  # -8..7
        flip = fraction < 0
        if flip:
            fraction = -fraction
        k = max(np.int64(0), (level - UNIT_LEVEL + 3) >> 2)
        difference = np.int64(0)
        if not decoding:
            difference = samples[x] - centre
            if step > 1:
                size = abs(difference)
                size = np.int64(0) if size <= zero else (size + half) // step
                difference = -size if difference < 0 else size
            if flip:
                difference = -difference
        negative = difference < 0
        magnitude = abs(difference)
        value_level = min(_level(centre), VALUES - 2)
        sign_a = SIGN + level * 9 + fraction
        sign_b = SIGN_VALUE + (min(level >> 1, 31) * VALUES + value_level) * 2 + np.int64(flip)
        sign_c = SIGN_AROUND + signs * 2 + np.int64(flip)
        sign_mixer = (level * (UNARY + 1) + UNARY) * INPUTS
        if k > 0:  # few samples are 0: the sign comes first, and that of 0 is positive
            _, negative, stream = code_mixed(
                decoding, negative, sign_a, sign_b, sign_c, sign_mixer, 0, mixers, RATE, LIMIT, contexts, stream, data
            )
            magnitude -= np.int64(negative)
        coarse = magnitude >> k
        a = ZERO + (level * 9 + fraction) * 2
        b = NEAR + (near[x] * 16 + min(_level(size1) >> 2, 15)) * 2
        unit = step << k
        if negative != flip:
            unit = -unit
        side = np.int64(negative != flip)
        position = centre
        if k == 0:
            side = np.int64(2)
        v = np.int64(0)
        while v < UNARY:
            bit = coarse > v
            at_value = VALUE + (value_level * 3 + side) * 16 + min(k, 15)
            if v == 2:
                a, b = HIGH + level * UNARY, FAR + near[x] * UNARY
            _, bit, stream = code_mixed(
                decoding,
                bit,
                a + v,
                b + v,
                at_value,
                (level * (UNARY + 1) + v) * INPUTS,
                0,
                mixers,
                RATE,
                LIMIT,
                contexts,
                stream,
                data,
            )
            if not bit:
                break
            if v == 0 and k == 0:
                _, negative, stream = code_mixed(
                    decoding,
                    negative,
                    sign_a,
                    sign_b,
                    sign_c,
                    sign_mixer,
                    0,
                    mixers,
                    RATE,
                    LIMIT,
                    contexts,
                    stream,
                    data,
                )
                side = np.int64(negative != flip)
                unit = -step if side else step
            v += 1
            position += unit
            value_level = min(_level(position), VALUES - 2) if position >= 0 else np.int64(VALUES - 1)
        if v == UNARY:
            # Exp-Golomb code of coarse - UNARY + 1: its length in unary, then its lower bits
            suffix = coarse - UNARY + 1
            length = np.int64(0)
            if not decoding:
                while suffix >> (length + 1):
                    length += 1
            n = np.int64(0)
            while True:
                bit, stream = code_single(decoding, n < length, ESCAPE + n, MIN_P, LIMIT, contexts, stream, data)
                if not bit:
                    break
                n += 1
                if n == ESCAPE_BITS:
                    return 1
            bits = suffix & ((1 << n) - 1)
            bits, plain_state = _code_plain(decoding, bits, n, plain_state, plain)
            v = UNARY + ((1 << n) | bits) - 1
        if k > 0:
            bit, stream = code_single(
                decoding,
                (magnitude >> (k - 1)) & 1 != 0,
                LOW + level * 2 + min(v, 1),
                MIN_P,
                LIMIT,
                contexts,
                stream,
                data,
            )
            v = (v << 1) | np.int64(bit)
            if k > 1:
                bits = magnitude & ((1 << (k - 1)) - 1)
                bits, plain_state = _code_plain(decoding, bits, k - 1, plain_state, plain)
                v = (v << (k - 1)) | bits
            v += np.int64(negative)
        if negative != flip:
            v = -v
        r = min(max(centre + v * step, np.int64(0)), top)
        samples[x] = r
        row[i] = r
        last = r
        error = (r << 4) - mu
        size2, size1 = size1, abs(error)
        size_row[c] = size1
        base_row[c] = (r << 4) - base
        error = (r << 4) - adapted
        count = bias_counts[around]
        moved = np.int64(biases[around])
        biases[around] = moved + ((((error << BIAS_SHIFT) - moved) * np.int64(RECIPROCAL[count])) >> 16)
        if count < BIAS_LIMIT:
            bias_counts[around] = count + 1
        # normalised least mean squares: the step is divided by the power of the inputs
        gain = (error << (22 - RATE_SHIFT)) // power
        for t in range(ADAPTIVE_TAPS):
            moved = np.int64(adaptive_c[t]) + ((gain * np.int64(inputs[t]) + 32) >> 6)
            adaptive_c[t] = min(max(moved, -ADAPTIVE_MAX), ADAPTIVE_MAX)
    state[0], state[1], state[2], state[3] = stream
    state[4], state[5], state[6] = plain_state
    return 0


@inner
def _prepare_row(size_rows, before_rows, activity, near, with_before):
    """Fill the part of the local size that the rows above and the band before give, and the level of neighbours."""
    size_n, size_nn = size_rows
    size_pn, size_ph, size_ps = before_rows
    north_weight = np.int64(2) if with_before else np.int64(3)
    for x in range(activity.size):
        c = x + 2
        north = 2 * np.int64(size_n[c]) + np.int64(size_n[c - 1]) + np.int64(size_n[c + 1]) + np.int64(size_nn[c])
        previous = 2 * np.int64(size_ph[c]) + np.int64(size_ph[c - 1]) + np.int64(size_ph[c + 1])
        previous = ((previous + np.int64(size_pn[c]) + np.int64(size_ps[c])) * 5) >> 5
        activity[x] = north_weight * north + 6 * previous
        near[x] = min(_level(north + 2 * previous) >> 1, 31)


@inner
def _fill_masked(row, masked):
    """Give samples of a row without data the nearest value to the left, else to the right; return whether any is data.

    The border of 3 on both sides continues the row.
    """
    width = masked.size
    first = np.int64(-1)
    for x in range(width):
        if masked[x]:
            if first >= 0:
                row[x + 3] = row[x + 2]
        elif first < 0:
            first = np.int64(x)
    if first < 0:
        return False
    for x in range(first):
        row[x + 3] = row[first + 3]
    for b in range(3):
        row[width + 3 + b] = row[width + 2]
    return True


class BandMemory(NamedTuple):
    """Memory for the rows of a band: four arrays (W,), then (3,) and (1,); `flat` is 1 until a row has had data."""

    fixed: NDArray[np.float64]
    means: NDArray[np.int64]
    activity: NDArray[np.int64]
    near: NDArray[np.int64]
    north: NDArray[np.int64]
    flat: NDArray[np.int64]

    @classmethod
    def of(cls, width: int) -> "BandMemory":
        """Return the memory for a band of a width, before its first row."""
        means, activity, near = np.zeros((3, width), np.int64)
        return cls(np.zeros(width), means, activity, near, np.zeros(3, np.int64), np.ones(1, np.int64))


@inline
def _fill(row, first, stop, value):
    for x in range(first, stop):
        row[x] = value


@jit
def code_band(
    decoding, samples, masked, planes, used, weights, errors, before, memory, limits, state, data, plain, work, first
):
    """Code rows of a band; returns the next row, or -1 if the stream holds an impossible sample.

    The next row is not the last where `data` or `plain` may be too short for it.

    Parameters
    ----------
    samples : int32 (H, W)
        Less the smallest of the band. A decoder fills it; an encoder replaces it by what a decoder gets.
    masked : bool (H, W)
        Samples that are not coded.
    planes : int32 (3, H + 4, W + 6)
        Becomes the band, and has its references, with a border of 3, but one row below. The first three rows of the
        band are 0.
    used, weights
        Of the fixed filter.
    errors, before : int32 (2, H + 4, W + 4)
        Become absolute errors, and errors of the fixed filter, and are 0 at first; those of the first reference.
    memory : tuple
        Weights of the adaptive filter, and what all bands share: its inputs, mean errors, mixers, contexts.
    limits : tuple
        Largest sample, step, size of errors that become 0, all less the smallest sample.
    work : BandMemory
    first : int
        The first row to code.
    """
    height, width = samples.shape
    plane, with_before = planes[0], used > USED[0]
    fixed, means, activity, near = work.fixed, work.means, work.activity, work.near
    top, step, zero = limits
    shape = weights[0], weights[1], weights[2], np.int64(2 if with_before else 3), top, step, zero, 65536 // step
    flat = work.flat[0] != 0
    for y in range(first, height):
        if not decoding and (
            state[3] + width * SAMPLE_BYTES + 64 > data.size or state[6] + width * PLAIN_BYTES + 64 > plain.size
        ):
            return y
        row, row_n, row_nn = plane[y + 3], plane[y + 2], plane[y + 1]
        _fill(row, 0, 3, row_n[3])
        if not flat:
            _predict_row(weights, used, planes, y + 3, means, work.north, fixed)
        sizes, bases = errors[0], errors[1]
        sizes_b, bases_b = before[0], before[1]
        size_rows = sizes[y + 1], sizes[y]
        _prepare_row(size_rows, (sizes_b[y + 1], sizes_b[y + 2], sizes_b[y + 3]), activity, near, with_before)
        rows = row, row_n, row_nn, sizes[y + 2], bases[y + 2], bases[y + 1], bases[y]
        rows_before = bases_b[y + 1], bases_b[y + 2], bases_b[y + 3]
        prepared = fixed, activity, near
        if _code_row(
            decoding, flat, samples[y], masked[y], prepared, rows, rows_before, shape, memory, state, data, plain
        ):
            return -1
        if _fill_masked(row, masked[y]):
            if flat:
                _fill(row, 0, 3, row[3])
                for above in range(y + 3):
                    for x in range(row.size):
                        plane[above, x] = row[x]
            add_row(means, row, flat)
            flat = False
            work.flat[0] = 0
        elif flat:
            _fill(row, 0, row.size, 0)
        else:
            _fill(row, width + 3, row.size, row[width + 2])
            add_row(means, row, flat)
    for x in range(plane.shape[1]):
        plane[height + 3, x] = plane[height + 2, x]
    return height


@jit
def code_mode(decoding, mode, state, plain):
    """Code how a band uses references."""
    mode, plain_state = _code_plain(decoding, mode, MODE_BITS, (state[4], state[5], state[6]), plain)
    state[4], state[5], state[6] = plain_state
    return mode
