"""Lossless coding of a value for each cell of 16 x 16 pixels, of which most equal a neighbour.

Each value is that of the cell to the left, above, or in the slice before, or else it is spelled out bit by bit.
`docs/format.md` is normative.
"""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inline, jit
from deepsic_codec.payload.coders.binary import code_single
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, check_end, finish_encoding

VALUE_BITS = 7
LIMIT = 255  # observations that a context counts
# Contexts: the three flags by which neighbours are equal, and the nodes of the tree of a value.
FLAGS, CONTEXTS = 16, 3 * 16 + (1 << VALUE_BITS)
CELL_BYTES = 2 * (3 + VALUE_BITS)  # limit for one cell: 16 bits for each bin


@inline
def _code(decoding, bit, index, contexts, stream, data):
    return code_single(decoding, bit, index, 16, LIMIT, contexts, stream, data)


@jit
def _code_cells(decoding, cells, contexts, state, data):
    """Code `cells` uint8 (slices, rows, columns), which a decoder fills."""
    stream = (state[0], state[1], state[2], state[3])
    slices, rows, columns = cells.shape
    for s in range(slices):
        for y in range(rows):
            for x in range(columns):
                before = cells[s - 1, y, x] if s > 0 else cells[s, 0, 0] if y + x > 0 else np.uint8(0)
                above = cells[s, y - 1, x] if y > 0 else before
                left = cells[s, y, x - 1] if x > 0 else above
                corner = cells[s, y - 1, x - 1] if y > 0 and x > 0 else left
                value = cells[s, y, x]
                at = (left == above) + 2 * (above == corner) + 4 * (left == corner) + 8 * (before == left)
                same, stream = _code(decoding, value == left, at, contexts, stream, data)
                if same:
                    cells[s, y, x] = left
                    continue
                if above != left:
                    same, stream = _code(decoding, value == above, FLAGS + at, contexts, stream, data)
                    if same:
                        cells[s, y, x] = above
                        continue
                if before != left and before != above:
                    same, stream = _code(decoding, value == before, 2 * FLAGS + at, contexts, stream, data)
                    if same:
                        cells[s, y, x] = before
                        continue
                node = np.int64(1)
                for n in range(VALUE_BITS - 1, -1, -1):
                    bit = (value >> n) & 1 == 1
                    bit, stream = _code(decoding, bit, 3 * FLAGS + node, contexts, stream, data)
                    node = 2 * node + (1 if bit else 0)
                cells[s, y, x] = node - (1 << VALUE_BITS)
    state[0], state[1], state[2], state[3] = stream


def encode_cells(cells: NDArray[np.uint8]) -> bytes:
    """Encode values uint8 (slices, rows, columns) below 128."""
    state, data = begin_encoding(), np.empty(cells.size * CELL_BYTES + 64, np.uint8)
    _code_cells(False, np.array(cells), np.full(CONTEXTS, 1 << 31, np.uint32), state, data)
    return finish_encoding(state, data)


def decode_cells(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Decode values of a shape; raises CorruptPayload if the stream does not end with the last one."""
    state, stream = begin_decoding(data, "quality map")
    cells = np.zeros(shape, np.uint8)
    _code_cells(True, cells, np.full(CONTEXTS, 1 << 31, np.uint32), state, stream)
    check_end(int(state[3]), stream.size, "quality map", unit="cell")
    return cells
