"""Lossless coding of the NoData mask of a chunk: binary images under contexts of decoded neighbours.

A slice that is empty, full, or equal to the one before costs a small part of a bit. In any other slice, each pixel is
coded under an adaptive probability chosen by ten neighbours, as in JBIG, and by the same pixel of the slice before.
`docs/residual.md` is normative.
"""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inline, jit
from deepsic_codec.payload.coders.binary import code_single, grown
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, check_end, finish_encoding

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


@jit
def _code_slice(decoding, target, previous, plane, kind, contexts, state, data, first):
    """Code a slice from a row on, and return the next row; not the last where `data` may be too short.

    Parameters
    ----------
    decoding : bool
        Whether to decode.
    target : uint8 (H, W)
        The mask, which a decoder fills.
    previous, plane : uint8 (H + 2, W + 4)
        The slice before, and this one, which both directions fill. Two rows above and two columns on either side are 0.
    kind : int64 (3,)
        Whether the slice equals the one before, else whether it is constant, and its value then: coded before row 0.
    state, data : int64 (4,), uint8 (n,)
        The stream.
    first : int
        The first row to code.
    """
    stream = (state[0], state[1], state[2], state[3])
    height, width = target.shape
    if first == 0:
        same, constant, value = True, True, target[0, 0] != 0
        if not decoding:
            for y in range(height):
                for x in range(width):
                    same = same and target[y, x] == previous[y + 2, x + 2]
                    constant = constant and target[y, x] == target[0, 0]
        same, stream = _code(decoding, same, SAME, contexts, stream, data)
        if not same:
            constant, stream = _code(decoding, constant, CONSTANT, contexts, stream, data)
            if constant:
                value, stream = _code(decoding, value, VALUE, contexts, stream, data)
        kind[0], kind[1], kind[2] = same, constant, value
    y = first
    while y < height and (decoding or stream[3] + width * BIT_BYTES + 64 <= data.size):
        row, up, upper, previous_row, to = plane[y + 2], plane[y + 1], plane[y], previous[y + 2], target[y]
        if kind[0]:
            for x in range(2, width + 2):
                row[x] = previous_row[x]
        elif kind[1]:
            for x in range(2, width + 2):
                row[x] = kind[2]
        else:
            a = np.int64(upper[2])
            b = np.int64(up[2]) << 1 | np.int64(up[3])
            c = np.int64(0)
            for x in range(width):
                a = (a << 1 | np.int64(upper[x + 3])) & 7
                b = (b << 1 | np.int64(up[x + 4])) & 31
                i = np.int64(previous_row[x + 2]) << 10 | a << 7 | b << 2 | c
                bit = to[x] != 0
                bit, stream = _code(decoding, bit, i, contexts, stream, data)
                row[x + 2] = bit
                c = (c << 1 | np.int64(bit)) & 3
        if decoding:
            for x in range(width):
                to[x] = row[x + 2]
        y += 1
    state[0], state[1], state[2], state[3] = stream
    return y


def _code_mask(
    decoding: bool, mask: NDArray[np.uint8], state: NDArray[np.int64], data: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Code a mask (S, H, W), which a decoder fills, and return the stream."""
    _, height, width = mask.shape
    contexts, kind = START.copy(), np.zeros(3, np.int64)
    previous, plane = np.zeros((2, height + 2, width + 4), np.uint8)
    for target in mask:
        row = 0
        while row < height:
            if not decoding:
                data = grown(data, int(state[3]), width * BIT_BYTES + 128)
            row = _code_slice(decoding, target, previous, plane, kind, contexts, state, data, row)
        previous, plane = plane, previous
    return data


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Encode a mask bool (S, H, W), True where there is no data."""
    if mask.dtype != bool or mask.ndim != 3 or not mask.size:
        raise ValueError(f"expected a bool array (S, H, W) with pixels, got {mask.dtype} {mask.shape}")
    state = begin_encoding()
    data = _code_mask(False, np.ascontiguousarray(mask).view(np.uint8), state, np.empty(4096, np.uint8))
    return finish_encoding(state, data)


def decode_mask(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Decode a mask of shape (S, H, W); raises CorruptPayload if the stream does not end with the last pixel."""
    state, stream = begin_decoding(data, "nodata")
    mask = np.zeros(shape, np.uint8)
    _code_mask(True, mask, state, stream)
    check_end(int(state[3]), stream.size, "nodata")
    return mask.view(np.bool_)
