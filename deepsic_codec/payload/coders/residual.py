"""Lossless coding of what a lossy decode leaves over: the residual section.

Band by band, a fixed filter, whose weights the section holds, predicts each sample from the residuals
already decoded, in this band and in earlier ones, and from the slopes of the decoded picture; a second
one corrects it, learning as it goes.  What remains is binarised in units that follow its
local size and coded under adaptive contexts.  Nothing is trained; all arithmetic is
on integers.  ``docs/residual.md`` is normative, and derives the bounds.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders._numba import kernel
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, finish_decoding, finish_encoding
from deepsic_codec.payload.coders.residual_filter import FADE, FADE_BITS, TAPS, USED, WEIGHT_SHIFT, fit
from deepsic_codec.payload.coders.symbols import SQUASH, STRETCH, STRETCH_MAX, _adapt, _code, _single
from deepsic_codec.payload.varint import read_varint, write_varint

#: Residuals lie within +-RESIDUAL_MAX: differences of 16-bit samples need 65535.
RESIDUAL_MAX = (1 << 20) - 1
#: Predictions and errors are in sixteenths.
MU_MAX = RESIDUAL_MAX << 4
#: The adaptive filter: taps, their limit in 1/65536, and two to minus the step.
LEARNED, LEARNED_MAX, STEP = 8, 1 << 20, 7
#: Levels of local size, in quarters of an octave, and the highest that is coded in units of 1.
LEVELS, UNIT_LEVEL = 100, 25
#: Unary bins before the escape; the first few mix three contexts; bits of the longest escape and weight.
UNARY, MIXED, ESCAPE_BITS, WEIGHT_BITS = 20, 2, 22, 11
#: Adaptation: observations after which a probability stops slowing down, and the mixers' rate and start.
LIMIT, RATE, INPUTS = 255, 8, 3
MIXERS = np.tile(np.array([30000, 18000, 18000], np.int64), LEVELS * MIXED)
#: Bytes that a sample can need at the very most: 16 bits for each bin.
SAMPLE_BYTES = 2 * (4 + UNARY + ESCAPE_BITS)
#: Plain bits of a sample at most: 22 of an escape and 18 of a unit, 22 at a time.
PLAIN_BYTES = 8

# Contexts: families one after the other.
_SIZES = (LEVELS * 9 * MIXED, 32 * 16 * MIXED, 32 * 16 * MIXED, LEVELS * UNARY, LEVELS * 9, LEVELS * 2, ESCAPE_BITS)
ZERO, NEAR, OTHER, HIGH, SIGN, LOW, ESCAPE = (sum(_SIZES[:i]) for i in range(len(_SIZES)))
OWN, NOT_ZERO, LENGTH = (sum(_SIZES) + i for i in (0, 1, 3))
CONTEXTS = LENGTH + WEIGHT_BITS

#: Where bins start, by level: chance in 1/256 that the first, or a later unary bin is one.
FIRST_START = (
    2,
    3,
    3,
    3,
    3,
    4,
    4,
    4,
    5,
    5,
    6,
    7,
    10,
    13,
    20,
    29,
    40,
    56,
    74,
    91,
    109,
    128,
    146,
    159,
    170,
    181,
    62,
    79,
    97,
    115,
)
LATER_START = (
    20,
    20,
    20,
    20,
    20,
    20,
    20,
    19,
    19,
    19,
    18,
    18,
    18,
    17,
    16,
    17,
    18,
    19,
    21,
    25,
    33,
    44,
    57,
    71,
    85,
    100,
    48,
    62,
    78,
    96,
)
START_COUNT = 6


def _log_table() -> NDArray[np.uint8]:
    """floor(4 log2(n)) + 1 of n = 1..4095, and 0 of 0."""
    return np.array([0] + [(n**4).bit_length() for n in range(1, 4096)], np.uint8)


def _start_table() -> NDArray[np.uint32]:
    """All contexts before the first observation."""
    start = np.full(CONTEXTS, 1 << 31, np.uint32)
    level = np.arange(LEVELS)
    # above UNIT_LEVEL the unit doubles every fourth level, and chances repeat
    same = np.where(level > UNIT_LEVEL, UNIT_LEVEL + 1 + (level - UNIT_LEVEL - 1) % 4, level)
    first, later = (np.array(t, np.uint32)[same] << 24 | START_COUNT for t in (FIRST_START, LATER_START))
    zero = start[ZERO:NEAR].reshape(LEVELS, 9, MIXED)
    zero[:, :, 0], zero[:, :, 1:] = first[:, None], later[:, None, None]
    start[HIGH:SIGN].reshape(LEVELS, UNARY)[:] = later[:, None]
    return start


LOG, START = _log_table(), _start_table()


@njit(inline="always")
def _level(n):  # type: ignore[no-untyped-def]
    """floor(4 log2(n)) + 1 of n >= 0, from its upper 9 to 12 bits; 0 of 0."""
    steps = np.int64(0)
    while n >= 4096:
        n >>= 4
        steps += 16
    return np.int64(LOG[n]) + steps


@njit(inline="always")
def _mixed(decoding, bit, a, b, c, m, weights, contexts, low, high, value, position, data):  # type: ignore[no-untyped-def]
    """Code one bit under three contexts and train contexts and mixer on it."""
    sa = np.int64(STRETCH[contexts[a] >> 18])
    sb = np.int64(STRETCH[contexts[b] >> 18])
    sc = np.int64(STRETCH[contexts[c] >> 18])
    dot = (weights[m] * sa + weights[m + 1] * sb + weights[m + 2] * sc) >> 16
    dot = min(max(dot, -STRETCH_MAX), STRETCH_MAX)
    p = np.int64(SQUASH[dot + STRETCH_MAX])
    bit, low, high, value, position = _code(decoding, bit, p, low, high, value, position, data)
    error = ((np.int64(65535) if bit else np.int64(0)) - p) * RATE
    weights[m] += (sa * error + 131072) >> 18
    weights[m + 1] += (sb * error + 131072) >> 18
    weights[m + 2] += (sc * error + 131072) >> 18
    _adapt(contexts, a, bit, LIMIT)
    _adapt(contexts, b, bit, LIMIT)
    _adapt(contexts, c, bit, LIMIT)
    return bit, low, high, value, position


@njit(inline="always")
def _plain(decoding, bits, n, hold, filled, at, plain):  # type: ignore[no-untyped-def]
    """Put or get ``n`` <= 22 bits as they are, low ones first; past the end a decoder gets zeros."""
    if decoding:
        while filled < n:
            if at < plain.size:
                hold |= np.int64(plain[at]) << filled
            at += 1
            filled += 8
        bits = hold & ((1 << n) - 1)
        hold >>= n
        filled -= n
    else:
        hold |= bits << filled
        filled += n
        while filled >= 8:
            plain[at] = hold & 255
            at += 1
            hold >>= 8
            filled -= 8
    return bits, hold, filled, at


@njit
def _grown(data, used, room):  # type: ignore[no-untyped-def]
    """The output, with room for more bytes."""
    if used + room <= data.size:
        return data
    grown = np.empty(2 * data.size + room, np.uint8)
    grown[:used] = data[:used]
    return grown


@njit(nogil=True, cache=True)
def _code_weights(decoding, static, contexts, state, data, plain):  # type: ignore[no-untyped-def]
    """Code the fixed filter of every band; returns (status, data, plain)."""
    low, high, value, position = state[0], state[1], state[2], state[3]
    hold, filled, at = state[4], state[5], state[6]
    for band in range(static.shape[0]):
        used = USED[min(band, 2)]
        if not decoding:
            data = _grown(data, position, 64 + used * 4 * (2 + WEIGHT_BITS))
            plain = _grown(plain, at, 64 + used * PLAIN_BYTES)
        own = False
        if not decoding:
            for t in range(len(TAPS)):
                before = static[band - 1, t] if band else 0
                own = own or static[band, t] != before
        fade, hold, filled, at = _plain(decoding, static[band, FADE], FADE_BITS, hold, filled, at, plain)
        own, low, high, value, position = _single(decoding, own, OWN, LIMIT, contexts, low, high, value, position, data)
        if not own:
            if decoding and band:
                static[band] = static[band - 1]
            static[band, FADE] = fade
            continue
        static[band, FADE] = fade
        last = np.int64(1)
        for t in range(used):
            weight = static[band, t]
            bit = weight != 0
            bit, low, high, value, position = _single(
                decoding, bit, NOT_ZERO + last, LIMIT, contexts, low, high, value, position, data
            )
            last = np.int64(bit)
            if not bit:
                static[band, t] = 0
                continue
            size = abs(weight)
            length = np.int64(0)
            if not decoding:
                while size >> (length + 1):
                    length += 1
            n = np.int64(0)
            while True:
                bit = n < length
                bit, low, high, value, position = _single(
                    decoding, bit, LENGTH + n, LIMIT, contexts, low, high, value, position, data
                )
                if not bit:
                    break
                n += 1
                if n == WEIGHT_BITS:
                    return 1, data, plain
            # the bits after the first, and the sign
            bits = ((size & ((1 << n) - 1)) << 1) | np.int64(weight < 0)
            bits, hold, filled, at = _plain(decoding, bits, n + 1, hold, filled, at, plain)
            size = (1 << n) | (bits >> 1)
            static[band, t] = -size if bits & 1 else size
    state[0], state[1], state[2], state[3] = low, high, value, position
    state[4], state[5], state[6] = hold, filled, at
    return 0, data, plain


@njit(nogil=True, cache=True)
def _fill(plane, samples):  # type: ignore[no-untyped-def]
    """Copy (H,W) into the middle of (H+4,W+4), whose border takes the nearest samples."""
    height, width = samples.shape
    for y in range(height):
        row = plane[y + 2]
        for x in range(width):
            row[x + 2] = samples[y, x]
        row[:2] = row[2]
        row[width + 2 :] = row[width + 1]
    plane[:2] = plane[2]
    plane[height + 2 :] = plane[height + 1]


@njit(nogil=True, cache=True)
def _predict_row(static, used, planes, order, y, out):  # type: ignore[no-untyped-def]
    """Sum into ``out`` all products of the fixed filter but the first two, which wait for the row itself."""
    width = out.size
    out[:] = 0
    for t in range(2, used):
        weight = static[t]
        if weight != 0:
            plane = planes[order[TAPS[t, 0]]]
            first = 2 + TAPS[t, 2]
            row = plane[y + TAPS[t, 1]][first : first + width]
            for x in range(width):
                out[x] += weight * np.int64(row[x])
            if TAPS[t, 0] > 2:
                here = plane[y][2 : 2 + width]
                for x in range(width):
                    out[x] -= weight * np.int64(here[x])


@kernel
def _code_row(  # type: ignore[no-untyped-def]
    decoding, samples, prepared, own, known, shares, filter_c, inputs, mixers, contexts, state, data, plain
):
    """Code a row of samples of one band; returns 0, or 1 if the stream holds an impossible sample."""
    low, high, value, position = state[0], state[1], state[2], state[3]
    hold, filled, at = state[4], state[5], state[6]
    fixed, activity, near, other = prepared
    row, size_row, rest_row = own
    rest_n, rest_pn, rest_ph = known
    west1, west2, own_share = shares
    width = samples.size
    r1, r2, size1, size2 = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for x in range(width):
        i = x + 2
        base = (fixed[x] + west1 * r1 + west2 * r2) >> (WEIGHT_SHIFT - 4)
        base = min(max(base, -MU_MAX), MU_MAX)
        inputs[0], inputs[1], inputs[2], inputs[3] = (
            rest_row[i - 1],
            rest_n[i],
            rest_n[i - 1],
            rest_n[i + 1],
        )
        inputs[4], inputs[5], inputs[6], inputs[7] = rest_row[i - 2], rest_pn[i], rest_ph[i], rest_ph[i - 1]
        total, power = np.int64(0), np.int64(4096)
        for t in range(LEARNED):
            total += np.int64(filter_c[t]) * np.int64(inputs[t])
            power += np.int64(inputs[t]) * np.int64(inputs[t])
        mu = min(max(base + (total >> 16), -MU_MAX), MU_MAX)
        centre = (mu + 8) >> 4
        fraction = mu - (centre << 4)  # -8..7
        flip = fraction < 0
        if flip:
            fraction = -fraction
        level = min(_level((activity[x] + own_share * (2 * size1 + size2)) >> 3), LEVELS - 1)
        k = max(np.int64(0), (level - UNIT_LEVEL + 3) >> 2)
        difference = np.int64(0)
        if not decoding:
            difference = samples[x] - centre
            if flip:
                difference = -difference
        negative = difference < 0
        magnitude = abs(difference)
        sign_at = SIGN + level * 9 + fraction
        if k > 0:  # few are 0: the sign first, and 0 is positive
            negative, low, high, value, position = _single(
                decoding, negative, sign_at, LIMIT, contexts, low, high, value, position, data
            )
            magnitude -= np.int64(negative)
        coarse = magnitude >> k
        a = ZERO + (level * 9 + fraction) * MIXED
        b = near[x] + min(_level(size1) >> 2, 15) * MIXED
        v = np.int64(0)
        while v < UNARY:
            bit = coarse > v
            if v < MIXED:
                bit, low, high, value, position = _mixed(
                    decoding,
                    bit,
                    a + v,
                    b + v,
                    other[x] + v,
                    (level * MIXED + v) * INPUTS,
                    mixers,
                    contexts,
                    low,
                    high,
                    value,
                    position,
                    data,
                )
            else:
                bit, low, high, value, position = _single(
                    decoding,
                    bit,
                    HIGH + level * UNARY + v,
                    LIMIT,
                    contexts,
                    low,
                    high,
                    value,
                    position,
                    data,
                )
            if not bit:
                break
            if v == 0 and k == 0:
                negative, low, high, value, position = _single(
                    decoding, negative, sign_at, LIMIT, contexts, low, high, value, position, data
                )
            v += 1
        if v == UNARY:
            # Exp-Golomb: length of (coarse - UNARY + 1) in unary, then its lower bits
            over = coarse - UNARY + 1
            length = np.int64(0)
            if not decoding:
                while over >> (length + 1):
                    length += 1
            n = np.int64(0)
            while True:
                bit = n < length
                bit, low, high, value, position = _single(
                    decoding, bit, ESCAPE + n, LIMIT, contexts, low, high, value, position, data
                )
                if not bit:
                    break
                n += 1
                if n == ESCAPE_BITS:
                    return 1
            bits = over & ((1 << n) - 1)
            bits, hold, filled, at = _plain(decoding, bits, n, hold, filled, at, plain)
            v = UNARY + ((1 << n) | bits) - 1
        if k > 0:
            bit = (magnitude >> (k - 1)) & 1 != 0
            bit, low, high, value, position = _single(
                decoding,
                bit,
                LOW + level * 2 + min(v, 1),
                LIMIT,
                contexts,
                low,
                high,
                value,
                position,
                data,
            )
            v = (v << 1) | np.int64(bit)
            if k > 1:
                bits = magnitude & ((1 << (k - 1)) - 1)
                bits, hold, filled, at = _plain(decoding, bits, k - 1, hold, filled, at, plain)
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
        rest_row[i] = (r << 4) - base
        # normalised least mean squares: against the error, by a step over the power of the inputs
        gain = (error << (22 - STEP)) // power
        for t in range(LEARNED):
            moved = np.int64(filter_c[t]) + ((gain * np.int64(inputs[t]) + 32) >> 6)
            filter_c[t] = min(max(moved, -LEARNED_MAX), LEARNED_MAX)
    state[0], state[1], state[2], state[3] = low, high, value, position
    state[4], state[5], state[6] = hold, filled, at
    return 0


@njit(nogil=True, cache=True)
def _code_bands(decoding, residual, context, static, contexts, state, data, plain):  # type: ignore[no-untyped-def]
    """Code all samples; returns (status, data, plain).

    ``residual`` (S,H,W,C) is filled by a decoder.  Status 0: done, 1: the stream holds an impossible sample.
    """
    slices, height, width, bands = residual.shape
    # planes with a border of 2: residuals of this band, the one before and before that; decoded samples of the same
    planes = np.zeros((6, height + 4, width + 4), np.int32)
    order = np.arange(6)
    # errors of the whole prediction (absolute) and of the fixed filter, in sixteenths, of this band and the one before
    sizes = np.zeros((2, height + 4, width + 4), np.int32)
    rests = np.zeros((2, height + 4, width + 4), np.int32)
    learned = np.zeros((bands, LEARNED), np.int32)
    inputs = np.zeros(LEARNED, np.int32)
    mixers = MIXERS.copy()
    fixed, activity = np.empty(width, np.int64), np.empty(width, np.int64)
    near, other, samples = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)
    for s in range(slices):
        for c in range(bands):
            for p in (0, 3):
                order[p], order[p + 1], order[p + 2] = order[p + 2], order[p], order[p + 1]
            res, dec = planes[order[0]], planes[order[3]]
            size, size_p, rest, rest_p = sizes[c & 1], sizes[1 - (c & 1)], rests[c & 1], rests[1 - (c & 1)]
            res[:], size[:], rest[:] = 0, 0, 0
            if c == 0:
                rest_p[:] = 0
            _fill(dec, context[s, :, :, c])
            if s == 0 and c > 1:
                learned[c] = learned[c - 1]
            filter_c, weights = learned[c], static[c]
            west1, west2, fade = weights[0], weights[1], weights[FADE]
            used = USED[min(c, 2)]
            # what the band before would have added
            own_share = np.int64(2) if c else np.int64(3)
            for y in range(height):
                if not decoding:
                    data = _grown(data, state[3], width * SAMPLE_BYTES + 64)
                    plain = _grown(plain, state[6], width * PLAIN_BYTES + 64)
                _predict_row(weights, used, planes, order, y + 2, fixed)
                row, size_row, size_n, size_nn = res[y + 2], size[y + 2], size[y + 1], size[y]
                size_pn, size_ph, size_ps = size_p[y + 1], size_p[y + 2], size_p[y + 3]
                rest_row, rest_n, rest_pn, rest_ph = rest[y + 2], rest[y + 1], rest_p[y + 1], rest_p[y + 2]
                dec_n, dec_h, dec_s = dec[y + 1], dec[y + 2], dec[y + 3]
                for x in range(width):
                    i = x + 2
                    north = 2 * np.int64(size_n[i]) + np.int64(size_n[i - 1]) + np.int64(size_n[i + 1])
                    north += np.int64(size_nn[i])
                    before = np.int64(0)
                    if c:
                        before = 2 * np.int64(size_ph[i]) + np.int64(size_ph[i - 1]) + np.int64(size_ph[i + 1])
                        before = ((before + np.int64(size_pn[i]) + np.int64(size_ps[i])) * 5) >> 5
                    here = np.int64(dec_h[i])
                    slope = abs(dec_h[i - 1] - here) + abs(dec_h[i + 1] - here)
                    slope += abs(dec_n[i] - here) + abs(dec_s[i] - here)
                    activity[x] = own_share * north + 8 * before + ((16 * slope) >> fade)
                    near[x] = NEAR + min(_level(north + 2 * before) >> 1, 31) * 16 * MIXED
                    other[x] = OTHER + (min(_level(before) >> 1, 31) * 16 + min(_level(slope) >> 1, 15)) * MIXED
                    if not decoding:
                        samples[x] = residual[s, y, x, c]
                if _code_row(
                    decoding,
                    samples,
                    (fixed, activity, near, other),
                    (row, size_row, rest_row),
                    (rest_n, rest_pn, rest_ph),
                    (west1, west2, own_share),
                    filter_c,
                    inputs,
                    mixers,
                    contexts,
                    state,
                    data,
                    plain,
                ):
                    return 1, data, plain
                if decoding:
                    for x in range(width):
                        residual[s, y, x, c] = samples[x]
    return 0, data, plain


def encode_integers(residual: NDArray[np.int32], context: NDArray[np.int32]) -> bytes:
    """Encode residuals.

    Parameters
    ----------
    residual : int32 (S, H, W, C)
        Original less decoded samples, or steps of them; within +-RESIDUAL_MAX.
    context : int32 (S, H, W, C)
        The decoded samples.

    Raises
    ------
    ValueError
        If a residual is out of range, or shapes differ.
    """
    residual, context = np.ascontiguousarray(residual, np.int32), np.ascontiguousarray(context, np.int32)
    if residual.shape != context.shape or residual.ndim != 4 or not residual.size:
        raise ValueError(f"residual {residual.shape} and context {context.shape} must have one shape (S, H, W, C)")
    if int(residual.min()) < -RESIDUAL_MAX or int(residual.max()) > RESIDUAL_MAX:
        raise ValueError(f"residuals must be within +-{RESIDUAL_MAX}, got {residual.min()} to {residual.max()}")
    static, contexts = fit(residual, context), START.copy()
    state = np.concatenate([begin_encoding(), np.zeros(3, np.int64)])
    data, plain = np.empty(1 << 12, np.uint8), np.empty(1 << 12, np.uint8)
    _, data, plain = _code_weights(False, static, contexts, state, data, plain)
    _, data, plain = _code_bands(False, residual, context, static, contexts, state, data, plain)
    coded = finish_encoding(state[:4], data)
    hold, filled, at = (int(v) for v in state[4:])
    tail = bytes([hold]) if filled else b""
    return write_varint(len(coded)) + coded + plain[:at].tobytes() + tail


def decode_integers(data: bytes, shape: tuple[int, int, int, int], context: NDArray[np.int32]) -> NDArray[np.int32]:
    """Decode residuals of the given (S, H, W, C), with the decoded samples that they were encoded with.

    Raises
    ------
    CorruptPayload
        If the section holds an impossible sample or weight, ends early, or goes on after the last sample.
    """
    context = np.ascontiguousarray(context, np.int32)
    if context.shape != tuple(shape):
        raise ValueError(f"a context of shape {context.shape} for residuals of shape {tuple(shape)}")
    data = bytes(data)
    try:
        length, start = read_varint(data, 0, "residual")
    except IndexError:
        length, start = 0, len(data) + 1
    if start + length > len(data):
        raise CorruptPayload("residual: the section ends early")
    begun, stream = begin_decoding(data[start : start + length], "residual")
    plain = np.frombuffer(data[start + length :], np.uint8).copy()
    state, contexts = np.concatenate([begun, np.zeros(3, np.int64)]), START.copy()
    residual, static = np.zeros(shape, np.int32), np.zeros((shape[3], FADE + 1), np.int64)
    status, _, _ = _code_weights(True, static, contexts, state, stream, plain)
    if status:
        raise CorruptPayload("residual: a weight outside the allowed range")
    status, _, _ = _code_bands(True, residual, context, static, contexts, state, stream, plain)
    if status:
        raise CorruptPayload("residual: a sample outside the allowed range")
    finish_decoding(state[:4], stream, "residual")
    if int(state[6]) != plain.size or state[4]:
        raise CorruptPayload("residual: plain bits missing or left over after the last sample")
    return residual
