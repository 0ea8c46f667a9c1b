"""Layers of the integer networks, as compiled loops (`docs/integer-transforms.md`).

Images lie channels last. A stream is int16 (h + 2, w + 2, C) with a border of zeros, so that a 3x3 convolution needs no
case for the border. A row of positions is a matrix of bytes, (w rounded up to tiles, inputs), and stays in the cache
from one layer to the next.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import constant, float_jit, inline, inner, int32, jit
from deepsic_codec.model.cpu.dot import BLOCK, ROWS, STEP, pack, padded, tile
from deepsic_codec.model.exact.formats import (
    MODULATION_BITS,
    READ_BITS,
    READ_HIGH,
    READ_LOW,
    STEM_MAX,
    STREAM_BITS,
    STREAM_MAX,
)

Tensors = Mapping[str, NDArray[Any]]

# As numba's loops take them: Python's integers would make 64-bit arithmetic of them.
_READ_LOW, _READ_HIGH, _READ_SHIFT = int32(READ_LOW), int32(READ_HIGH), int32(STREAM_BITS - READ_BITS)
_STREAM, _STEM, _MODULATION = int32(STREAM_MAX), int32(STEM_MAX), int32(MODULATION_BITS)
_LOW, _HIGH = np.float32(READ_LOW), np.float32(READ_HIGH)


class Dense(NamedTuple):
    """A 1x1 layer: packed weights, biases int32 (qualities or 1, outputs), shifts int32 (outputs,), and sizes.

    Biases and shifts have zeros up to a multiple of `BLOCK`. `steps` counts steps of `STEP` inputs.
    """

    weight: NDArray[Any]
    bias: NDArray[np.int32]
    shift: NDArray[np.int32]
    steps: int
    outputs: int


class Blocks(NamedTuple):
    """Residual blocks, one after another; see `Dense` for `up` and `down`.

    `spatial` float32 (n,9,C) and `spatial_bias` float32 (n,C) are in units of the result. Biases of `up` are
    (n,qualities or 1,hidden).
    """

    spatial: NDArray[np.float32]
    spatial_bias: NDArray[np.float32]
    up: NDArray[Any]
    up_bias: NDArray[np.int32]
    up_shift: NDArray[np.int32]
    down: NDArray[Any]
    down_bias: NDArray[np.int32]
    down_shift: NDArray[np.int32]
    up_steps: int
    down_steps: int


class Modulation(NamedTuple):
    """Factors and offsets, int32 (qualities,outputs of the layer before it)."""

    scale: NDArray[np.int32]
    offset: NDArray[np.int32]


def matrix(tensors: Tensors, name: str) -> NDArray[np.int64]:
    """Return the weights of a layer, (outputs,inputs)."""
    weight = tensors[f"{name}.weight"]
    return weight.reshape(len(weight), -1).astype(np.int64)


def dense(
    weight: NDArray[np.int64], bias: NDArray[Any], shift: NDArray[Any], offset: int = 0, signed: bool = False
) -> Dense:
    """Return a layer whose inputs have an offset added, which the biases take back."""
    width = padded(len(weight), BLOCK)
    biases = np.zeros((bias.size // len(weight), width), np.int32)
    shifts = np.zeros(width, np.int32)
    total = bias.reshape(-1, len(weight)).astype(np.int64) - offset * weight.sum(1)
    biases[:, : len(weight)] = total.astype(np.int32)  # modulo 2^32, as all sums are
    shifts[: len(weight)] = shift
    steps = padded(weight.shape[1], STEP) // STEP
    layer: Dense = constant(Dense(pack(weight, signed), biases, shifts, steps, len(weight)))
    return layer


def layer(tensors: Tensors, name: str, offset: int = 0, signed: bool = False) -> Dense:
    """Return a layer of a model file."""
    return dense(matrix(tensors, name), tensors[f"{name}.bias"], tensors[f"{name}.shift"], offset, signed)


def blocks(tensors: Tensors, name: str, count: int, channels: int) -> Blocks:
    """Return the residual blocks `<name>.0`, `<name>.1`, ... of a model file."""
    spatial, spatial_bias = np.zeros((count, 9, channels), np.float32), np.zeros((count, channels), np.float32)
    ups, downs = [], []
    for i in range(count):
        at = f"{name}.{i}"
        unit = 2.0 ** -tensors[f"{at}.spatial.shift"].astype(np.float64)
        spatial[i] = (matrix(tensors, f"{at}.spatial") * unit[:, None]).T
        spatial_bias[i] = tensors[f"{at}.spatial.bias"] * unit
        ups.append(layer(tensors, f"{at}.up", -READ_LOW))
        downs.append(layer(tensors, f"{at}.down"))
    if not count:  # of the right number of dimensions
        empty = dense(np.zeros((1, 1), np.int64), np.zeros(1, np.int32), np.zeros(1, np.int32))
        ups, downs = [empty], [empty]
    up, down = ([np.stack([one[part] for one in layers]) for part in range(3)] for layers in (ups, downs))
    sizes = ups[0].steps, downs[0].steps
    down_bias = np.ascontiguousarray(down[1][:, 0])
    whole = Blocks(spatial, spatial_bias, up[0], up[1], up[2], down[0], down_bias, down[2], *sizes)
    result: Blocks = constant(whole)
    return result


def modulation(tensors: Tensors, name: str, stem: Dense) -> Modulation:
    """Return a modulation; a pixel shuffle follows the stem if it has more outputs than there are factors."""
    parts = (tensors[f"{name}.{part}"].astype(np.int32) for part in ("scale", "offset"))
    tiled = (np.tile(part, (1, stem.outputs // part.shape[1])) for part in parts)
    result: Modulation = constant(Modulation(*tiled))
    return result


class Buffers(NamedTuple):
    """Memory of a thread for blocks on rows of positions: see `run_blocks`."""

    previous: NDArray[np.int16]
    reads: NDArray[np.uint8]
    hidden: NDArray[np.uint8]
    sums: NDArray[np.int32]


def buffers(parts: Blocks, width: int) -> Buffers:
    """Return the memory that blocks need for rows of some positions."""
    count, _, channels = parts.spatial.shape
    rows = padded(width, ROWS)
    return Buffers(
        np.zeros((count, width + 2, channels), np.int16),
        np.zeros(rows * parts.up_steps * STEP, np.uint8),
        np.zeros(rows * parts.up_shift.shape[1], np.uint8),
        np.zeros(ROWS * BLOCK, np.int32),
    )


@inline
def shifted(total, bias, shift):
    """Return `(sum + bias) >> shift` in 32 bits."""
    return int32(int32(total + bias) >> int32(shift & 31))


@inline
def modulated(total, bias, shift, scale, offset):
    """Return a stream's value of the sum of a stem."""
    value = min(max(shifted(total, bias, shift), -_STEM), _STEM)
    return min(max(int32(int32(value * scale + offset) >> _MODULATION), -_STREAM), _STREAM)


@inline
def read(value):
    """Return a stream's value as 1x1 layers read it, plus 128."""
    rounded = int32(int32(value + int32(8)) >> _READ_SHIFT)
    return min(max(rounded, _READ_LOW), _READ_HIGH) - _READ_LOW


@float_jit
def _spatial(above, row, below, weight, bias, reads, pitch):
    """Convolve a row (w + 2, C) with its neighbours by channel, and write it as unsigned bytes."""
    for x in range(row.shape[0] - 2):
        a, b, c = above[x], above[x + 1], above[x + 2]
        d, e, f = row[x], row[x + 1], row[x + 2]
        g, h, i = below[x], below[x + 1], below[x + 2]
        out = reads[x * pitch : x * pitch + bias.size]
        for k in range(bias.size):
            value = bias[k]
            value += weight[0, k] * np.float32(a[k])
            value += weight[1, k] * np.float32(b[k])
            value += weight[2, k] * np.float32(c[k])
            value += weight[3, k] * np.float32(d[k])
            value += weight[4, k] * np.float32(e[k])
            value += weight[5, k] * np.float32(f[k])
            value += weight[6, k] * np.float32(g[k])
            value += weight[7, k] * np.float32(h[k])
            value += weight[8, k] * np.float32(i[k])
            out[k] = int32(min(max(np.floor(value), _LOW), _HIGH)) - _READ_LOW


@inner
def narrow_rows(rows, count, pitch, weight, bias, shift, steps, out, sums):
    """Apply a layer to rows of bytes: `clip((sum + bias) >> shift, 0, 255)`; `out` has a pitch of all outputs."""
    width, low, high = shift.size, int32(0), int32(255)
    for block in range(width // BLOCK):
        b, s = bias[block * BLOCK : (block + 1) * BLOCK], shift[block * BLOCK : (block + 1) * BLOCK]
        for p in range(0, count, ROWS):
            tile(sums, rows, p * pitch, pitch, weight, block, steps)
            for i in range(ROWS):
                to = out[(p + i) * width + block * BLOCK : (p + i) * width + (block + 1) * BLOCK]
                t = sums[i * BLOCK : (i + 1) * BLOCK]
                for j in range(BLOCK):
                    to[j] = min(max(shifted(t[j], b[j], s[j]), low), high)


@inner
def _add_rows(rows, count, pitch, weight, bias, shift, steps, stream, sums):
    """Apply a layer to rows of bytes, add the results to a row (w + 2, C) of a stream and clip them."""
    channels = stream.shape[1]
    for block in range(shift.size // BLOCK):
        first = block * BLOCK
        b, s, size = bias[first : first + BLOCK], shift[first : first + BLOCK], min(BLOCK, channels - first)
        for p in range(0, count, ROWS):
            tile(sums, rows, p * pitch, pitch, weight, block, steps)
            for i in range(min(ROWS, count - p)):
                to, t = stream[p + i + 1, first : first + size], sums[i * BLOCK : (i + 1) * BLOCK]
                for j in range(size):
                    to[j] = min(max(int32(to[j] + shifted(t[j], b[j], s[j])), -_STREAM), _STREAM)


@inline
def _copy(source, target):
    for x in range(source.shape[0]):
        from_, to = source[x], target[x]
        for k in range(from_.size):
            to[k] = from_[k]


@jit
def run_blocks(stream, parts, quality, above, below, memory):
    """Run residual blocks on a stream, in place.

    Each block follows the one before it by a row, so that rows are still in the cache. `above` and `below` say whether
    the stream is a part of an image that continues there: each block then leaves out one more row at this end.

    Parameters
    ----------
    stream : int16 (h + 2, w + 2, C)
    parts : Blocks
    quality : int
        Row of the biases.
    above, below : int
        0 or 1.
    memory : Buffers
    """
    number, height, width = parts.spatial.shape[0], stream.shape[0] - 2, stream.shape[1] - 2
    pitch = parts.up_steps * STEP
    for time in range(height + number - 1):
        for n in range(number):
            y, first, last = time - n, above * (n + 1), height - below * (n + 1)
            if y < first or y >= last:
                continue
            row, previous = stream[y + 1], memory.previous[n]
            if y == first:
                _copy(stream[y], previous)
            _spatial(previous, row, stream[y + 2], parts.spatial[n], parts.spatial_bias[n], memory.reads, pitch)
            _copy(row, previous)
            up, down = parts.up_bias[n, quality], parts.down_bias[n]
            narrow_rows(
                memory.reads,
                width,
                pitch,
                parts.up[n],
                up,
                parts.up_shift[n],
                parts.up_steps,
                memory.hidden,
                memory.sums,
            )
            _add_rows(
                memory.hidden, width, parts.up_shift.shape[1], parts.down[n], down, parts.down_shift[n],
                parts.down_steps, row, memory.sums,
            )  # fmt: skip


@inline
def split(value):
    """Return the high and low digits to the base 128."""
    high = int32(int32(value + int32(64)) >> int32(7))
    return high, int32(value - int32(high << int32(7)))


@inner
def list_steps(rows, first, steps, sums, indices, compact):
    """Leave out the steps of a tile that are zero in all rows of all matrices.

    Parameters
    ----------
    rows : int32 (matrices,rows,steps)
        Rows of bytes, four to an integer. The tile starts at row `first`.
    sums : int32 (matrices,ROWS)
        Output: sums of the signed bytes of each row.
    indices : int32 (steps,)
        Output: the steps that are left.
    compact : int32 (matrices,ROWS steps)
        Output: their bytes, row after row without a gap.

    Returns
    -------
    int
        How many are left.
    """
    count = 0
    matrices = rows.shape[0]
    for k in range(steps):
        anything = int32(0)
        for m in range(matrices):
            for i in range(ROWS):
                anything |= rows[m, first + i, k]
        indices[count] = k
        count += anything != 0
    for m in range(matrices):
        for i in range(ROWS):
            row, to, total = rows[m, first + i], compact[m, i * count : (i + 1) * count], int32(0)
            for n in range(count):
                four = row[indices[n]]
                to[n] = four
                total += (int32(four << int32(24)) >> int32(24)) + (int32(four << int32(16)) >> int32(24))
                total += (int32(four << int32(8)) >> int32(24)) + (four >> int32(24))
            sums[m, i] = total
    return count
