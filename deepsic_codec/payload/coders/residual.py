"""Lossless coding of the integers of a residual section.

Each band in turn, a fixed filter predicts each integer, here called a sample, from the samples already decoded in this
band and in earlier ones, and from the slopes of the decoded picture. The section holds the weights of that filter. An
adaptive filter corrects the prediction. The error is binarised in units that follow its local size, and coded under
adaptive contexts. Nothing is trained; all arithmetic is on integers. `docs/residual.md` is normative and derives the
bounds.
"""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders.binary import MIN_P, code_mixed, code_single, grown
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, check_end, finish_encoding
from deepsic_codec.payload.coders.numba_jit import array_jit, inline, jit
from deepsic_codec.payload.coders.residual_filter import SLOPE_SHIFT, SLOPE_SHIFT_BITS, TAPS, USED, WEIGHT_SHIFT, fit
from deepsic_codec.payload.varint import read_varint, write_varint

RESIDUAL_MAX = (1 << 20) - 1  # of either sign; differences of 16-bit samples need 65535
MU_MAX = RESIDUAL_MAX << 4  # predictions and errors are in sixteenths
# The adaptive filter: taps, limit of a weight in 1/65536, and the exponent of the step, 2**-7.
ADAPTIVE_TAPS, ADAPTIVE_MAX, STEP = 8, 1 << 20, 7
# Levels of local size, in quarters of an octave, and the highest that is coded in units of 1.
LEVELS, UNIT_LEVEL = 100, 25
# Unary bins before the escape, of which the first two mix three contexts; bits of the longest escape and weight.
UNARY, MIXED, ESCAPE_BITS, WEIGHT_BITS = 20, 2, 22, 11
# Observations that a context counts; rate and inputs of the mixers, and their weights at the start.
LIMIT, RATE, INPUTS = 255, 8, 3
MIXERS = np.tile(np.array([30000, 18000, 18000], np.int64), LEVELS * MIXED)
SAMPLE_BYTES = 2 * (4 + UNARY + ESCAPE_BITS)  # limit for the coded bits of a sample: 16 bits for each bin
PLAIN_BYTES = 8  # limit for its plain bits: 22 of an escape and 18 of a unit

# Where each family of contexts starts in their array.
_SIZES = (LEVELS * 9 * MIXED, 32 * 16 * MIXED, 32 * 16 * MIXED, LEVELS * UNARY, LEVELS * 9, LEVELS * 2, ESCAPE_BITS)
ZERO, NEAR, OTHER, HIGH, SIGN, LOW, ESCAPE = (sum(_SIZES[:i]) for i in range(len(_SIZES)))
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
    zero = start[ZERO:NEAR].reshape(LEVELS, 9, MIXED)
    zero[:, :, 0], zero[:, :, 1:] = first[:, None], later[:, None, None]
    start[HIGH:SIGN].reshape(LEVELS, UNARY)[:] = later[:, None]
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
    """Code `n` <= 22 bits as they are, low ones first; past the end a decoder reads zeros."""
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


@array_jit
def _code_weights(decoding, filters, contexts, state, data, plain):
    """Code the fixed filter of every band.

    Returns (status, data, plain); status 1: the stream holds an impossible weight.
    """
    stream, plain_state = (state[0], state[1], state[2], state[3]), (state[4], state[5], state[6])
    for band in range(filters.shape[0]):
        used = USED[min(band, 2)]
        if not decoding:
            data = grown(data, stream[3], 64 + used * 4 * (2 + WEIGHT_BITS))
            plain = grown(plain, plain_state[2], 64 + used * PLAIN_BYTES)
        new_filter = False
        if not decoding:
            for t in range(len(TAPS)):
                inherited = filters[band - 1, t] if band else 0
                new_filter = new_filter or filters[band, t] != inherited
        slope_shift, plain_state = _code_plain(
            decoding, filters[band, SLOPE_SHIFT], SLOPE_SHIFT_BITS, plain_state, plain
        )
        new_filter, stream = code_single(decoding, new_filter, NEW_FILTER, MIN_P, LIMIT, contexts, stream, data)
        if not new_filter:
            if decoding and band:
                filters[band] = filters[band - 1]
            filters[band, SLOPE_SHIFT] = slope_shift
            continue
        filters[band, SLOPE_SHIFT] = slope_shift
        last = np.int64(1)
        for t in range(used):
            weight = filters[band, t]
            bit, stream = code_single(decoding, weight != 0, NONZERO + last, MIN_P, LIMIT, contexts, stream, data)
            last = np.int64(bit)
            if not bit:
                filters[band, t] = 0
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
                    return 1, data, plain
            # the bits after the first, and the sign
            bits = ((size & ((1 << n) - 1)) << 1) | np.int64(weight < 0)
            bits, plain_state = _code_plain(decoding, bits, n + 1, plain_state, plain)
            size = (1 << n) | (bits >> 1)
            filters[band, t] = -size if bits & 1 else size
    state[0], state[1], state[2], state[3] = stream
    state[4], state[5], state[6] = plain_state
    return 0, data, plain


@array_jit
def _fill(plane, samples):
    """Copy (H, W) into the middle of (H + 4, W + 4), and the nearest samples into its border."""
    height, width = samples.shape
    for y in range(height):
        row = plane[y + 2]
        for x in range(width):
            row[x + 2] = samples[y, x]
        row[:2] = row[2]
        row[width + 2 :] = row[width + 1]
    plane[:2] = plane[2]
    plane[height + 2 :] = plane[height + 1]


@array_jit
def _predict_row(filters, used, planes, order, y, out):
    """Sum into `out` all products of the fixed filter but the first two, whose inputs lie in the row itself."""
    width = out.size
    out[:] = 0
    for t in range(2, used):
        weight = filters[t]
        if weight != 0:
            plane = planes[order[TAPS[t, 0]]]
            first = 2 + TAPS[t, 2]
            row = plane[y + TAPS[t, 1]][first : first + width]
            for x in range(width):
                out[x] += weight * np.int64(row[x])
            if TAPS[t, 0] > 2:
                row = plane[y][2 : 2 + width]
                for x in range(width):
                    out[x] -= weight * np.int64(row[x])


@jit
def _code_row(decoding, samples, prepared, band_rows, other_rows, weights, memory, state, data, plain):
    """Code a row of samples of one band; returns 0, or 1 if the stream holds an impossible sample."""
    stream, plain_state = (state[0], state[1], state[2], state[3]), (state[4], state[5], state[6])
    fixed, activity, near, other = prepared
    row, size_row, base_row = band_rows
    base_n, base_pn, base_ph = other_rows
    west1, west2, north_weight = weights
    adaptive_c, inputs, mixers, contexts = memory
    width = samples.size
    r1, r2, size1, size2 = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for x in range(width):
        i = x + 2
        base = (fixed[x] + west1 * r1 + west2 * r2) >> (WEIGHT_SHIFT - 4)
        base = min(max(base, -MU_MAX), MU_MAX)
        inputs[0], inputs[1], inputs[2], inputs[3] = (base_row[i - 1], base_n[i], base_n[i - 1], base_n[i + 1])
        inputs[4], inputs[5], inputs[6], inputs[7] = base_row[i - 2], base_pn[i], base_ph[i], base_ph[i - 1]
        total, power = np.int64(0), np.int64(4096)
        for t in range(ADAPTIVE_TAPS):
            total += np.int64(adaptive_c[t]) * np.int64(inputs[t])
            power += np.int64(inputs[t]) * np.int64(inputs[t])
        mu = min(max(base + (total >> 16), -MU_MAX), MU_MAX)
        centre = (mu + 8) >> 4
        fraction = mu - (centre << 4)  # -8..7
        flip = fraction < 0
        if flip:
            fraction = -fraction
        level = min(_level((activity[x] + north_weight * (2 * size1 + size2)) >> 3), LEVELS - 1)
        k = max(np.int64(0), (level - UNIT_LEVEL + 3) >> 2)
        difference = np.int64(0)
        if not decoding:
            difference = samples[x] - centre
            if flip:
                difference = -difference
        negative = difference < 0
        magnitude = abs(difference)
        sign_at = SIGN + level * 9 + fraction
        if k > 0:  # few samples are 0: the sign comes first, and that of 0 is positive
            negative, stream = code_single(decoding, negative, sign_at, MIN_P, LIMIT, contexts, stream, data)
            magnitude -= np.int64(negative)
        coarse = magnitude >> k
        a = ZERO + (level * 9 + fraction) * MIXED
        b = near[x] + min(_level(size1) >> 2, 15) * MIXED
        v = np.int64(0)
        while v < UNARY:
            bit = coarse > v
            if v < MIXED:
                _, bit, stream = code_mixed(
                    decoding,
                    bit,
                    a + v,
                    b + v,
                    other[x] + v,
                    (level * MIXED + v) * INPUTS,
                    0,
                    mixers,
                    RATE,
                    LIMIT,
                    contexts,
                    stream,
                    data,
                )
            else:
                bit, stream = code_single(decoding, bit, HIGH + level * UNARY + v, MIN_P, LIMIT, contexts, stream, data)
            if not bit:
                break
            if v == 0 and k == 0:
                negative, stream = code_single(decoding, negative, sign_at, MIN_P, LIMIT, contexts, stream, data)
            v += 1
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
        difference = -v if negative else v
        r = centre - difference if flip else centre + difference
        if abs(r) > RESIDUAL_MAX:
            return 1
        samples[x] = r
        row[i] = r
        r2, r1 = r1, r
        error = (r << 4) - mu
        size2, size1 = size1, abs(error)
        size_row[i] = size1
        base_row[i] = (r << 4) - base
        # normalised least mean squares: the step is divided by the power of the inputs
        gain = (error << (22 - STEP)) // power
        for t in range(ADAPTIVE_TAPS):
            moved = np.int64(adaptive_c[t]) + ((gain * np.int64(inputs[t]) + 32) >> 6)
            adaptive_c[t] = min(max(moved, -ADAPTIVE_MAX), ADAPTIVE_MAX)
    state[0], state[1], state[2], state[3] = stream
    state[4], state[5], state[6] = plain_state
    return 0


@array_jit
def _code_bands(decoding, residual, context, filters, contexts, state, data, plain):
    """Code all samples; returns (status, data, plain).

    A decoder fills `residual` (S, H, W, C). Status 0: done; 1: the stream holds an impossible sample.
    """
    slices, height, width, bands = residual.shape
    # planes with a border of 2: samples of this band and the two before it, then decoded samples of the same bands
    planes = np.zeros((6, height + 4, width + 4), np.int32)
    order = np.arange(6)
    # in sixteenths, of this band and the one before: absolute errors of the prediction, errors of the fixed filter
    magnitudes = np.zeros((2, height + 4, width + 4), np.int32)
    base_errors = np.zeros((2, height + 4, width + 4), np.int32)
    adaptive = np.zeros((bands, ADAPTIVE_TAPS), np.int32)
    inputs = np.zeros(ADAPTIVE_TAPS, np.int32)
    mixers = MIXERS.copy()
    fixed, activity = np.empty(width, np.int64), np.empty(width, np.int64)
    near, other, samples = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)
    prepared = (fixed, activity, near, other)
    for s in range(slices):
        for c in range(bands):
            for p in (0, 3):
                order[p], order[p + 1], order[p + 2] = order[p + 2], order[p], order[p + 1]
            res, dec = planes[order[0]], planes[order[3]]
            size, base_error = magnitudes[c & 1], base_errors[c & 1]
            size_p, base_error_p = magnitudes[1 - (c & 1)], base_errors[1 - (c & 1)]
            res[:], size[:], base_error[:] = 0, 0, 0
            if c == 0:
                base_error_p[:] = 0
            _fill(dec, context[s, :, :, c])
            if s == 0 and c > 1:
                adaptive[c] = adaptive[c - 1]
            adaptive_c, weights = adaptive[c], filters[c]
            west1, west2, slope_shift = weights[0], weights[1], weights[SLOPE_SHIFT]
            used = USED[min(c, 2)]
            memory = (adaptive_c, inputs, mixers, contexts)
            # the first band has no `previous`, whose part it takes
            north_weight = np.int64(2) if c else np.int64(3)
            for y in range(height):
                if not decoding:
                    data = grown(data, state[3], width * SAMPLE_BYTES + 64)
                    plain = grown(plain, state[6], width * PLAIN_BYTES + 64)
                _predict_row(weights, used, planes, order, y + 2, fixed)
                row, size_row, size_n, size_nn = res[y + 2], size[y + 2], size[y + 1], size[y]
                size_pn, size_ph, size_ps = size_p[y + 1], size_p[y + 2], size_p[y + 3]
                base_row, base_n = base_error[y + 2], base_error[y + 1]
                base_pn, base_ph = base_error_p[y + 1], base_error_p[y + 2]
                dec_n, dec_h, dec_s = dec[y + 1], dec[y + 2], dec[y + 3]
                for x in range(width):
                    i = x + 2
                    north = 2 * np.int64(size_n[i]) + np.int64(size_n[i - 1]) + np.int64(size_n[i + 1])
                    north += np.int64(size_nn[i])
                    previous = np.int64(0)
                    if c:
                        previous = 2 * np.int64(size_ph[i]) + np.int64(size_ph[i - 1]) + np.int64(size_ph[i + 1])
                        previous = ((previous + np.int64(size_pn[i]) + np.int64(size_ps[i])) * 5) >> 5
                    value = np.int64(dec_h[i])
                    slope = abs(dec_h[i - 1] - value) + abs(dec_h[i + 1] - value)
                    slope += abs(dec_n[i] - value) + abs(dec_s[i] - value)
                    activity[x] = north_weight * north + 8 * previous + ((16 * slope) >> slope_shift)
                    near[x] = NEAR + min(_level(north + 2 * previous) >> 1, 31) * 16 * MIXED
                    other[x] = OTHER + (min(_level(previous) >> 1, 31) * 16 + min(_level(slope) >> 1, 15)) * MIXED
                    if not decoding:
                        samples[x] = residual[s, y, x, c]
                band_rows, other_rows = (row, size_row, base_row), (base_n, base_pn, base_ph)
                taps = (west1, west2, north_weight)
                if _code_row(decoding, samples, prepared, band_rows, other_rows, taps, memory, state, data, plain):
                    return 1, data, plain
                if decoding:
                    for x in range(width):
                        residual[s, y, x, c] = samples[x]
    return 0, data, plain


def encode_integers(residual: NDArray[np.int32], context: NDArray[np.int32]) -> bytes:
    """Encode the integers of a residual section, int32 (S, H, W, C), with decoded samples of that shape as context.

    Raises ValueError if an integer is beyond +-RESIDUAL_MAX, or shapes differ.
    """
    residual, context = np.ascontiguousarray(residual, np.int32), np.ascontiguousarray(context, np.int32)
    if residual.shape != context.shape or residual.ndim != 4 or not residual.size:
        raise ValueError(f"residual {residual.shape} and context {context.shape} must have one shape (S, H, W, C)")
    if int(residual.min()) < -RESIDUAL_MAX or int(residual.max()) > RESIDUAL_MAX:
        raise ValueError(f"residuals must be within +-{RESIDUAL_MAX}, got {residual.min()} to {residual.max()}")
    filters, contexts = fit(residual, context), START.copy()
    state = np.concatenate([begin_encoding(), np.zeros(3, np.int64)])
    data, plain = np.empty(1 << 12, np.uint8), np.empty(1 << 12, np.uint8)
    _, data, plain = _code_weights(False, filters, contexts, state, data, plain)
    _, data, plain = _code_bands(False, residual, context, filters, contexts, state, data, plain)
    coded = finish_encoding(state[:4], data)
    buffer, buffered, plain_position = (int(v) for v in state[4:])
    tail = bytes([buffer]) if buffered else b""
    return write_varint(len(coded)) + coded + plain[:plain_position].tobytes() + tail


def decode_integers(data: bytes, context: NDArray[np.int32]) -> NDArray[np.int32]:
    """Decode the integers of a residual section.

    `context` is int32 (S, H, W, C), equal to the encoder's.

    Raises
    ------
    CorruptPayload
        If the section holds an impossible sample or weight, ends early, or goes on after the last sample.
    """
    context = np.ascontiguousarray(context, np.int32)
    try:
        length, start = read_varint(data, 0, "residual section")
    except IndexError:
        length, start = 0, len(data) + 1
    if start + length > len(data):
        raise CorruptPayload("residual section: truncated")
    start_state, stream = begin_decoding(data[start : start + length], "residual section")
    plain = np.frombuffer(data[start + length :], np.uint8).copy()
    state, contexts = np.concatenate([start_state, np.zeros(3, np.int64)]), START.copy()
    residual, filters = np.zeros_like(context), np.zeros((context.shape[3], SLOPE_SHIFT + 1), np.int64)
    status, _, _ = _code_weights(True, filters, contexts, state, stream, plain)
    if status:
        raise CorruptPayload("residual section: a weight is outside the allowed range")
    status, _, _ = _code_bands(True, residual, context, filters, contexts, state, stream, plain)
    if status:
        raise CorruptPayload("residual section: a sample is outside the allowed range")
    check_end(int(state[3]), stream.size, "residual section")
    if int(state[6]) != plain.size or state[4]:
        raise CorruptPayload("residual section: plain bits are missing, or left over after the last sample")
    return residual
