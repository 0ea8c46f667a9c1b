"""The filter at the end of the synthesis, row by row at full resolution (`docs/integer-transforms.md`)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inline, inner, int32
from deepsic_codec.model.architecture import FILTER_PLACES
from deepsic_codec.model.cpu.dot import OUTPUTS, POSITIONS, pack_taps, padded, row_bytes, row_sums
from deepsic_codec.model.cpu.layers import Tensors
from deepsic_codec.model.exact.formats import MODULATION_BITS, PIXEL_BITS, PIXEL_MAX
from deepsic_codec.payload.constants import LATENT_STRIDE

_PIXEL = int32(PIXEL_MAX)
_TOP, _HALF = int32(255 << PIXEL_BITS), int32(1 << (PIXEL_BITS - 1))
_SCALE, _HALF_SCALE = int32(MODULATION_BITS), int32(1 << (MODULATION_BITS - 1))
_BITS = int32(PIXEL_BITS)
#: Rows above and below a row whose pixels the filter reads for it, and rows that wait for those below them.
REACH = 2


class FilterTables(NamedTuple):
    """Both layers of a filter at a quality.

    Attributes
    ----------
    up, down : int32 (n,)
        Weights as `dot.row_bytes` and `dot.row_sums` read them.
    up_start : int32 (8 hidden,POSITIONS)
        What the sums of hidden values start with, for each row of a square of 8x8 pixels.
    down_start : int32 (OUTPUTS,POSITIONS)
    up_shift, down_shift : int32 (hidden,), (3,)
    scale : int32 (1,)
        Of what is added to the pixels.
    """

    up: NDArray[np.int32]
    up_start: NDArray[np.int32]
    up_shift: NDArray[np.int32]
    down: NDArray[np.int32]
    down_start: NDArray[np.int32]
    down_shift: NDArray[np.int32]
    scale: NDArray[np.int32]


class FilterRows(NamedTuple):
    """Memory of a thread: 16 rows of an image after two that came before them.

    Attributes
    ----------
    pixels : int16 (18,3 width)
        64ths of a grey level, before the filter.
    words : int32 (18 pitch,)
        Their grey levels, one byte each, with two columns more at both sides.
    hidden : int32 (groups 18 pitch,)
        Hidden values, one byte each, with a column more at both sides; a row below `words`.
    sums : int32 (OUTPUTS,pitch)
    starts_up, starts_down : int32 (9,), (9 groups,)
        Where a row begins, for each tap.
    """

    pixels: NDArray[np.int16]
    words: NDArray[np.int32]
    hidden: NDArray[np.int32]
    sums: NDArray[np.int32]
    starts_up: NDArray[np.int32]
    starts_down: NDArray[np.int32]


class Filter:
    """Filter of a model file."""

    def __init__(self, tensors: Tensors) -> None:
        up, down = (tensors[f"filter_{name}.weight"].astype(np.int64) for name in ("up", "down"))
        self._hidden = len(up)
        words = np.zeros((self._hidden, 9, 4), np.int64)
        words[..., :3] = up.reshape(self._hidden, 3, 9).transpose(0, 2, 1)
        # taps of a group of four hidden channels follow one another
        groups = down.reshape(3, self._hidden // 4, 4, 9).transpose(0, 1, 3, 2).reshape(3, -1, 4)
        self._weights = pack_taps(words), pack_taps(groups)
        # grey levels are stored plus 128
        self._bias = tensors["filter_up.bias"].astype(np.int64) - 128 * up.sum((1, 2, 3))
        # the first column of hidden values is left of the image
        places = np.roll(tensors["filter_up.places"].astype(np.int64), 1, 2).transpose(1, 0, 2)
        self._places = np.tile(places, (1, 1, POSITIONS // FILTER_PLACES))
        self._down_start = np.zeros((OUTPUTS, POSITIONS), np.int32)
        self._down_start[:3] = tensors["filter_down.bias"].astype(np.int32)[:, None]
        self._shifts = [tensors[f"filter_{name}.shift"].astype(np.int32) & 31 for name in ("up", "down")]
        self._scale = tensors["filter_down.scale"].astype(np.int32)

    def tables(self, quality: int) -> FilterTables:
        """Return the filter at a row of the tables over quality."""
        start = (self._places + self._bias[quality][:, None]).astype(np.int32).reshape(-1, POSITIONS)
        (up, down), (up_shift, down_shift) = self._weights, self._shifts
        return FilterTables(
            up, start, up_shift, down, self._down_start, down_shift, np.ascontiguousarray(self._scale[quality, None])
        )

    def rows(self, width: int) -> FilterRows:
        """Return the memory for rows of `width` pixels."""
        rows, groups = LATENT_STRIDE + REACH, self._hidden // 4
        pitch = padded(width + REACH, POSITIONS) + 2 * REACH
        taps = [dy * pitch + dx for dy in range(3) for dx in range(3)]
        return FilterRows(
            np.zeros((rows, 3 * width), np.int16),
            np.zeros(rows * pitch, np.int32),
            np.zeros(groups * rows * pitch, np.int32),
            np.zeros((OUTPUTS, pitch), np.int32),
            np.array(taps, np.int32),
            np.array([group * rows * pitch + tap for group in range(groups) for tap in taps], np.int32),
        )


@inner
def enter_row(row, memory):
    """Write the words of a row, from 2 on, whose pixels are in `memory`."""
    pitch, pixels = memory.sums.shape[1], memory.pixels[row]
    width = pixels.size // 3
    words = memory.words[row * pitch : (row + 1) * pitch]
    for x in range(width):
        red = int32(int32(pixels[3 * x]) + _HALF) >> _BITS
        green = int32(int32(pixels[3 * x + 1]) + _HALF) >> _BITS
        blue = int32(int32(pixels[3 * x + 2]) + _HALF) >> _BITS
        words[x + REACH] = int32(red | int32(green << int32(8))) | int32(blue << int32(16))
    for i in range(REACH):
        words[i], words[REACH + width + i] = words[REACH], words[REACH + width - 1]


@inner
def copy_row(memory, source, target):
    """Copy the words of a row to another one."""
    pitch = memory.sums.shape[1]
    for i in range(pitch):
        memory.words[target * pitch + i] = memory.words[source * pitch + i]


@inner
def _hidden_row(row, tables, memory):
    """Write a row of hidden values, of the words of this row and of the two before it."""
    pitch, groups = memory.sums.shape[1], memory.starts_down.size // 9
    place = (row + FILTER_PLACES - 3) % FILTER_PLACES * tables.up_shift.size
    row_bytes(
        memory.hidden[row * pitch :], memory.words.size, memory.words[(row - 2) * pitch :], memory.starts_up, tables.up,
        groups, pitch - 2 * REACH, tables.up_start[place:], tables.up_shift,
    )  # fmt: skip


@inline
def _filtered(pixel, total, shift, scale, rounding, bits):
    change = min(max(total >> int32(shift & 31), -_PIXEL), _PIXEL)
    change = int32(int32(change * scale) + _HALF_SCALE) >> _SCALE
    value = min(max(int32(int32(pixel) + change), int32(0)), _TOP)
    return int32(value + rounding) >> int32(bits)


@inner
def _output_row(row, tables, memory, bits, out):
    """Write a row of the image, of its pixels and of three rows of hidden values."""
    pitch, rounding, scale = memory.sums.shape[1], int32((1 << bits) >> 1), tables.scale[0]
    pixels = memory.pixels[row]
    width = pixels.size // 3
    count = (width + POSITIONS - 1) // POSITIONS * POSITIONS
    hidden = memory.hidden[row * pitch :]
    row_sums(memory.sums, pitch, hidden, memory.starts_down, tables.down, 1, count, tables.down_start)
    red, green, blue = memory.sums[0], memory.sums[1], memory.sums[2]
    k0, k1, k2 = tables.down_shift[0], tables.down_shift[1], tables.down_shift[2]
    for x in range(out.size // 3):
        out[3 * x] = _filtered(pixels[3 * x], red[x], k0, scale, rounding, bits)
        out[3 * x + 1] = _filtered(pixels[3 * x + 1], green[x], k1, scale, rounding, bits)
        out[3 * x + 2] = _filtered(pixels[3 * x + 2], blue[x], k2, scale, rounding, bits)


@inner
def filter_strip(count, skip, tables, memory, bits, first, out):
    """Filter rows of an image, after `count` rows of words were entered.

    Parameters
    ----------
    count, skip : int
        Rows that were entered, and rows that are not written: the first ones, which begin two above those entered.
    bits : int
        `out` is in units of 2^bits / 64 grey levels.
    first : int
        Row of `out` that the first row is; `out` (rows,3 columns) may have fewer rows and columns.
    """
    for row in range(REACH, count + REACH):
        _hidden_row(row, tables, memory)
    for row in range(skip, count):
        if first + row < out.shape[0]:
            _output_row(row, tables, memory, bits, out[first + row])
    pitch = memory.sums.shape[1]
    for row in range(REACH):
        copy_row(memory, count + row, row)
        from_, to = memory.pixels[count + row], memory.pixels[row]
        for i in range(to.size):
            to[i] = from_[i]
        for group in range(memory.starts_down.size // 9):
            hidden = memory.hidden[group * memory.words.size : (group + 1) * memory.words.size]
            for i in range(pitch):
                hidden[row * pitch + i] = hidden[(count + row) * pitch + i]
