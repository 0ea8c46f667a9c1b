"""Adaptive binary arithmetic coding: one bit under one context, or under three contexts that a mixer weighs.

A context is a uint32: the probability of a one in the upper 22 bits, a number of observations in the lower 10. All
functions are inlined into the coders of symbols, residuals and masks. `docs/entropy-coder.md` is normative.

Their common parameters are whether to decode, the bit (ignored if decoding), `data`, and the state of its stream: low
and high end of the interval, the decoder's value, the position in `data`. They return the bit and the new state.
"""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inline
from deepsic_codec.payload.coders.interval import CODE_BITS, CODE_MAX

TOP_SHIFT = CODE_BITS - 8
EVEN = 32768  # probability of bits that are coded without a context
MIN_P = 16  # of 65536: probabilities stay between this and 65536 less this, unless a coder says otherwise

# The logistic domain: stretched probabilities in 1/256, up to +-12 (p = 6e-6).
STRETCH_ONE, STRETCH_MAX = 256, 3071


def _stretch_table() -> NDArray[np.int16]:
    """Return ln(p / (1 - p)) of p = (i + 1/2) / 16384."""
    p = (np.arange(16384) + 0.5) / 16384
    return np.clip(np.rint(np.log(p / (1 - p)) * STRETCH_ONE), -STRETCH_MAX, STRETCH_MAX).astype(np.int16)


def _squash_table() -> NDArray[np.uint16]:
    """Return 1 / (1 + exp(-x)) in 1/65536 of x = (i - STRETCH_MAX) / 256, kept off 0 and 1."""
    x = (np.arange(2 * STRETCH_MAX + 1) - STRETCH_MAX) / STRETCH_ONE
    return np.clip(np.rint(65536 / (1 + np.exp(-x))), MIN_P, 65536 - MIN_P).astype(np.uint16)


def _reciprocal_table() -> NDArray[np.int32]:
    """Return 65536 / (n + 1.5): how far the n-th observation moves a probability."""
    return np.rint(65536 / (np.arange(1024) + 1.5)).astype(np.int32)


STRETCH, SQUASH, RECIPROCAL = _stretch_table(), _squash_table(), _reciprocal_table()


@inline
def adapt(contexts, index, bit, limit):
    """Move a context towards a bit; its observations are counted up to `limit`."""
    index = np.uint64(index)  # numba tests signed indices for being negative
    state = np.int64(contexts[index])
    count = state & 1023
    target = np.int64(4194303) if bit else np.int64(0)
    change = ((target - (state >> 10)) * RECIPROCAL[count]) >> 16
    contexts[index] = np.uint32(state + (change << 10) + (1 if count < limit else 0))


@inline
def code_bit(decoding, bit, p, stream, data):
    """Code a bit whose probability of being one is p / 65536 (0 < p < 65536)."""
    low, high, value, position = stream
    # low <= middle < high holds whenever low < high, and the loop below restores low < high
    middle = low + ((high - low) >> 16) * p
    if decoding:
        bit = value <= middle
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> TOP_SHIFT == 0:
        if decoding:
            byte = np.int64(data[position]) if position < data.size else np.int64(0)
            value = ((value << 8) & CODE_MAX) | byte
        else:
            data[position] = low >> TOP_SHIFT
        position += 1
        low = (low << 8) & CODE_MAX
        high = ((high << 8) & CODE_MAX) | 255
    return bit, (low, high, value, position)


@inline
def code_single(decoding, bit, index, min_p, limit, contexts, stream, data):
    """Code a bit under one context, whose probability is clipped to `min_p` and 65536 - `min_p`."""
    p = min(max(np.int64(contexts[np.uint64(index)] >> 16), min_p), 65536 - min_p)
    bit, stream = code_bit(decoding, bit, p, stream, data)
    adapt(contexts, index, bit, limit)
    return bit, stream


@inline
def code_mixed(decoding, bit, a, b, c, mixer, bias, weights, rate, limit, contexts, stream, data):
    """Code a bit under the contexts a, b, c and train them and the mixer on it.

    The mixer's three weights start at `weights[mixer]`. `bias` is added to the weighted sum. The first of the values
    returned is the error times `rate`, which trains a weight of the bias.
    """
    sa = np.int64(STRETCH[contexts[a] >> 18])
    sb = np.int64(STRETCH[contexts[b] >> 18])
    sc = np.int64(STRETCH[contexts[c] >> 18])
    dot = (weights[mixer] * sa + weights[mixer + 1] * sb + weights[mixer + 2] * sc + bias) >> 16
    dot = min(max(dot, -STRETCH_MAX), STRETCH_MAX)
    p = np.int64(SQUASH[dot + STRETCH_MAX])
    bit, stream = code_bit(decoding, bit, p, stream, data)
    error = ((np.int64(65535) if bit else np.int64(0)) - p) * rate
    weights[mixer] += (sa * error + 131072) >> 18
    weights[mixer + 1] += (sb * error + 131072) >> 18
    weights[mixer + 2] += (sc * error + 131072) >> 18
    adapt(contexts, a, bit, limit)
    adapt(contexts, b, bit, limit)
    adapt(contexts, c, bit, limit)
    return error, bit, stream


LARGE = 1 << 20  # bytes of an output from which on it grows in smaller steps


def grown(data: NDArray[np.uint8], used: int, room: int) -> NDArray[np.uint8]:
    """Return an output of which `used` bytes are written, with room for `room` more bytes."""
    if used + room <= data.size:
        return data
    size = data.size + (data.size if data.size < LARGE else data.size >> 2) + room
    if data.flags.owndata and data.size >= LARGE:  # without a copy, where the system can; all of it is written to
        data.resize(size, refcheck=False)
        return data
    larger = np.empty(size, np.uint8)
    larger[:used] = data[:used]
    return larger
