"""Lossless coding of the NoData mask of a chunk: binary images under contexts of decoded neighbours.

A slice that is empty, full, or equal to the one before costs a small part of a bit. In any other slice, each pixel is
coded under an adaptive probability chosen by ten neighbours, as in JBIG, and by the same pixel of the slice before.
`docs/residual.md` is normative.
"""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.coders.binary import code_single, grown
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, check_end, finish_encoding
from deepsic_codec.payload.coders.numba_jit import array_jit, inline

LIMIT = 255  # observations that a context counts
# Contexts of pixels: the same pixel of the slice before, 3 + 5 + 2 neighbours. Three more code the kind of a slice.
PIXEL_CONTEXTS = 1 << 11
SAME, CONSTANT, VALUE = PIXEL_CONTEXTS, PIXEL_CONTEXTS + 1, PIXEL_CONTEXTS + 2
BIT_BYTES = 3  # limit for one bit


def _start_table() -> NDArray[np.uint32]:
    """Return probabilities before the first observation: the nearest neighbours vote, none is certain."""
    index = np.arange(PIXEL_CONTEXTS)
    west, north, north_west, north_east = index & 1, index >> 4 & 1, index >> 5 & 1, index >> 3 & 1
    votes = 2 * west + 2 * north + north_west + north_east
    p = (1 + 10 * votes) << 16  # of 4194304: 1/64 to 61/64
    return np.concatenate([p << 10, np.full(3, 1 << 31)]).astype(np.uint32)


START = _start_table()


@inline
def _code(decoding, bit, index, contexts, stream, data):
    """Code a bit under one context; a pixel may cost as little as 1/45000 bit."""
    return code_single(decoding, bit, index, 1, LIMIT, contexts, stream, data)


@array_jit
def _code_mask(decoding, mask, contexts, state, data):
    """Code `mask` uint8 (S, H, W), which a decoder fills; returns the stream."""
    stream = (state[0], state[1], state[2], state[3])
    slices, height, width = mask.shape
    # two rows above and two columns on either side are 0
    previous = np.zeros((height + 2, width + 4), np.uint8)
    plane = np.zeros((height + 2, width + 4), np.uint8)
    for s in range(slices):
        if not decoding:
            data = grown(data, stream[3], 64)
        same, constant, kind = True, True, mask[s, 0, 0] != 0
        if not decoding:
            for y in range(height):
                for x in range(width):
                    same = same and mask[s, y, x] == previous[y + 2, x + 2]
                    constant = constant and mask[s, y, x] == mask[s, 0, 0]
        same, stream = _code(decoding, same, SAME, contexts, stream, data)
        if not same:
            constant, stream = _code(decoding, constant, CONSTANT, contexts, stream, data)
            if constant:
                kind, stream = _code(decoding, kind, VALUE, contexts, stream, data)
        for y in range(height):
            row, up, upper, previous_row = plane[y + 2], plane[y + 1], plane[y], previous[y + 2]
            if same:
                row[:] = previous_row
            elif constant:
                row[2 : width + 2] = kind
            else:
                if not decoding:
                    data = grown(data, stream[3], width * BIT_BYTES + 64)
                a = np.int64(upper[2])
                b = np.int64(up[2]) << 1 | np.int64(up[3])
                c = np.int64(0)
                target = mask[s, y]
                for x in range(width):
                    a = (a << 1 | np.int64(upper[x + 3])) & 7
                    b = (b << 1 | np.int64(up[x + 4])) & 31
                    i = np.int64(previous_row[x + 2]) << 10 | a << 7 | b << 2 | c
                    bit = target[x] != 0
                    bit, stream = _code(decoding, bit, i, contexts, stream, data)
                    row[x + 2] = bit
                    c = (c << 1 | np.int64(bit)) & 3
            if decoding:
                mask[s, y] = row[2 : width + 2]
        previous, plane = plane, previous
    state[0], state[1], state[2], state[3] = stream
    return data


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Encode a mask bool (S, H, W), True where there is no data."""
    if mask.dtype != bool or mask.ndim != 3 or not mask.size:
        raise ValueError(f"expected a bool array (S, H, W) with pixels, got {mask.dtype} {mask.shape}")
    state = begin_encoding()
    data = _code_mask(False, np.ascontiguousarray(mask).view(np.uint8), START.copy(), state, np.empty(4096, np.uint8))
    return finish_encoding(state, data)


def decode_mask(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Decode a mask of shape (S, H, W); raises CorruptPayload if the stream does not end with the last pixel."""
    state, stream = begin_decoding(data, "nodata")
    mask = np.zeros(shape, np.uint8)
    _code_mask(True, mask, START.copy(), state, stream)
    check_end(int(state[3]), stream.size, "nodata")
    return mask.view(np.bool_)
