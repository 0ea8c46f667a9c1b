"""Analysis, synthesis and semantic head of a model file, on NumPy arrays (`docs/integer-transforms.md`)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.kernels import constant, inline, inner, int32, jit
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.cpu.dot import BLOCK, ROWS, STEP, WEIGHT_OFFSET, pack, padded, signed_tile, tile
from deepsic_codec.model.cpu.filter import REACH, Filter, copy_row, enter_row, filter_strip
from deepsic_codec.model.cpu.layers import (
    Tensors,
    blocks,
    buffers,
    dense,
    layer,
    list_steps,
    matrix,
    modulated,
    modulation,
    read,
    run_blocks,
    shifted,
    split,
)
from deepsic_codec.model.exact.formats import (
    EMBEDDING_SHIFT,
    LATENT_BITS,
    LOGIT_MAX,
    NORMAL_BITS,
    PIXEL_BITS,
    PIXEL_MAX,
    READ_LOW,
    STEP_BITS,
    WIDE_MAX,
)
from deepsic_codec.payload.constants import EMBEDDING_ZERO, LABEL_CELL, LATENT_STRIDE

_WIDE, _PIXEL = int32(WIDE_MAX), int32(PIXEL_MAX)
_LOGIT = int32(LOGIT_MAX)
_HALF, _TOP = int32(128 << PIXEL_BITS), int32(255 << PIXEL_BITS)

# Latents of a part of a large image that is analysed at a time, about, and its least rows, in those of a halo.
PART, PART_HALOS = 1 << 15, 16

Latents = NDArray[np.int32]
Symbols = NDArray[np.int16]


class Wide(NamedTuple):
    """The linear shortcut of the synthesis: high and low digits of its weights, for rows of signed bytes."""

    high: NDArray[Any]
    low: NDArray[Any]
    bias: NDArray[np.int32]
    shift: NDArray[np.int32]


class RowBuffers(NamedTuple):
    """Memory of a thread for one row of latents; the first two share theirs, as bytes and as groups of four.

    Attributes
    ----------
    digits : int8 (4,rows,inputs)
        High and low digits of latents, and of normalised latents.
    steps : int32 (4,rows,inputs / 4)
    compact, compact_bytes : int32 (tiles,4,ROWS steps), int8 (tiles,4,ROWS inputs)
        Both share their memory: the steps that are not zero, by tile.
    indices : int32 (tiles,steps + 1)
        Their numbers, by tile; the last is how many there are.
    totals : int32 (tiles,4,ROWS)
        Sums of the digits, by tile.
    linear : int16 (rows,768)
    rest : int16 (2,rows,2,192)
        Both parts of the pixels.
    reads : uint8 (rows inputs,)
    sums : int32 (3,ROWS BLOCK)
    """

    digits: NDArray[np.int8]
    steps: NDArray[np.int32]
    compact: NDArray[np.int32]
    compact_bytes: NDArray[np.int8]
    indices: NDArray[np.int32]
    totals: NDArray[np.int32]
    linear: NDArray[np.int16]
    rest: NDArray[np.int16]
    reads: NDArray[np.uint8]
    sums: NDArray[np.int32]


def _row_buffers(width: int, latents: int, w8: int, w16: int) -> RowBuffers:
    rows, inputs = padded(width, ROWS), padded(latents, STEP)
    steps = np.zeros((4, rows, inputs // STEP), np.int32)
    compact = np.zeros((rows // ROWS, 4, ROWS * inputs // STEP), np.int32)
    memory: RowBuffers = constant(
        RowBuffers(
            steps.view(np.int8),
            steps,
            compact,
            compact.view(np.int8),
            np.zeros((rows // ROWS, inputs // STEP + 1), np.int32),
            np.zeros((rows // ROWS, 4, ROWS), np.int32),
            np.zeros((rows, 3 * LATENT_STRIDE**2), np.int16),
            np.zeros((2, padded(2 * width, ROWS), 3 * 64), np.int16),
            np.zeros(padded(2 * width, ROWS) * max(padded(w8, STEP), padded(w16, STEP)), np.uint8),
            np.zeros((3, ROWS * BLOCK), np.int32),
        )
    )
    return memory


@inline
def _latent(symbol, step):
    """Return the latent of a symbol."""
    limit, half = np.int64(2 << (14 + STEP_BITS)), int32(1 << (STEP_BITS - 1))
    product = int32(min(max(np.int64(symbol) * np.int64(step), -limit), limit))
    return min(max(int32(int32(product + half) >> int32(STEP_BITS)), -_WIDE), _WIDE)


@jit
def dequantise(symbols, steps, latents):
    """Write the latents int32 (P,C) of symbols int16 (P,C) with quantiser steps int32 (C,)."""
    for p in range(symbols.shape[0]):
        row, to = symbols[p], latents[p]
        for c in range(row.size):
            to[c] = _latent(row[c], steps[c])


@inner
def _write_digits(symbols, steps, unit, digits):
    """Write the digits of a row of latents, symbols (w,C), and of the normalised latents."""
    wide = np.float32(WIDE_MAX)
    for p in range(symbols.shape[0]):
        row = symbols[p]
        high, low, high_z, low_z = digits[0, p], digits[1, p], digits[2, p], digits[3, p]
        for c in range(row.size):
            latent = _latent(row[c], steps[c])
            h, k = split(latent)
            high[c], low[c] = h, k
            scaled = np.floor(np.float32(latent) * unit[c] + np.float32(0.5))
            h, k = split(int32(min(max(scaled, -wide), wide)))
            high_z[c], low_z[c] = h, k


@inner
def _list_row(width, memory):
    """List the steps of a row of latents that are not zero, tile by tile."""
    steps = memory.steps.shape[2]
    for t in range((width + ROWS - 1) // ROWS):
        count = list_steps(memory.steps, t * ROWS, steps, memory.totals[t], memory.indices[t], memory.compact[t])
        memory.indices[t, steps] = count


@inner
def _stem_row(width, stem, mod, quality, memory, stream):
    """Write a row (w + 2, C) of the stream of normalised latents."""
    steps, channels, offset = stem.steps, stream.shape[1], int32(WEIGHT_OFFSET)
    scale, shift_to = mod.scale[quality], mod.offset[quality]
    high, low = memory.sums[0], memory.sums[1]
    for block in range(stem.shift.size // BLOCK):
        first = block * BLOCK
        b, s, size = (
            stem.bias[0, first : first + BLOCK],
            stem.shift[first : first + BLOCK],
            min(BLOCK, channels - first),
        )
        for t in range((width + ROWS - 1) // ROWS):
            indices, rows, totals = memory.indices[t], memory.compact_bytes[t], memory.totals[t]
            count = indices[steps]
            signed_tile(high, rows[2], 0, count * STEP, stem.weight, block, steps, indices, count)
            signed_tile(low, rows[3], 0, count * STEP, stem.weight, block, steps, indices, count)
            for i in range(min(ROWS, width - t * ROWS)):
                to = stream[t * ROWS + i + 1, first : first + size]
                h, k = high[i * BLOCK : (i + 1) * BLOCK], low[i * BLOCK : (i + 1) * BLOCK]
                less = int32(offset * int32(int32(128) * totals[2, i] + totals[3, i]))
                for j in range(size):
                    total = int32(int32(int32(int32(128) * h[j]) + k[j]) - less)
                    to[j] = modulated(total, b[j], s[j], scale[first + j], shift_to[first + j])


@inner
def _linear_row(width, linear, memory):
    """Write the part of the pixels of a row of latents that is linear in them."""
    steps, offset = memory.steps.shape[2], int32(WEIGHT_OFFSET)
    one, two, three = memory.sums[0], memory.sums[1], memory.sums[2]
    for block in range(linear.shift.size // BLOCK):
        first = block * BLOCK
        b, s = linear.bias[first : first + BLOCK], linear.shift[first : first + BLOCK]
        for t in range((width + ROWS - 1) // ROWS):
            indices, rows, totals = memory.indices[t], memory.compact_bytes[t], memory.totals[t]
            count = indices[steps]
            signed_tile(one, rows[0], 0, count * STEP, linear.high, block, steps, indices, count)
            signed_tile(two, rows[0], 0, count * STEP, linear.low, block, steps, indices, count)
            signed_tile(three, rows[1], 0, count * STEP, linear.high, block, steps, indices, count)
            for i in range(ROWS):
                to = memory.linear[t * ROWS + i, first : first + BLOCK]
                u, v, w = (
                    one[i * BLOCK : (i + 1) * BLOCK],
                    two[i * BLOCK : (i + 1) * BLOCK],
                    three[i * BLOCK : (i + 1) * BLOCK],
                )
                less = int32(offset * int32(int32(129) * totals[0, i] + totals[1, i]))
                for j in range(to.size):
                    total = int32(int32(int32(int32(128) * u[j]) + v[j]) + w[j])
                    to[j] = min(max(shifted(int32(total - less), b[j], s[j]), -_PIXEL), _PIXEL)


@inner
def _read_row(row, reads, pitch):
    """Read a row (w + 2, C) of a stream."""
    for x in range(row.shape[0] - 2):
        from_, to = row[x + 1], reads[x * pitch : (x + 1) * pitch]
        for k in range(from_.size):
            to[k] = read(int32(from_[k]))


@inner
def _expand_row(row, expand, mod, quality, memory, stream):
    """Turn a row (w + 2, C) of a stream into two rows (2, 2 w + 2, C / 4) of the stream of twice the resolution."""
    width, pitch, channels = row.shape[0] - 2, expand.steps * STEP, stream.shape[2]
    _read_row(row, memory.reads, pitch)
    scale, offset, sums = mod.scale[quality], mod.offset[quality], memory.sums[0]
    for block in range(expand.shift.size // BLOCK):
        first = block * BLOCK
        size = min(BLOCK, expand.outputs - first)
        b, s = expand.bias[0, first : first + BLOCK], expand.shift[first : first + BLOCK]
        m, f = scale[first : first + size], offset[first : first + size]
        for p in range(0, width, ROWS):
            tile(sums, memory.reads, p * pitch, pitch, expand.weight, block, expand.steps)
            for i in range(min(ROWS, width - p)):
                t, done = sums[i * BLOCK : (i + 1) * BLOCK], 0
                while done < size:  # up to the end of a position of the larger image
                    corner, channel = (first + done) // channels, (first + done) % channels
                    length = min(size - done, channels - channel)
                    to = stream[corner // 2, 2 * (p + i) + corner % 2 + 1, channel : channel + length]
                    for j in range(length):
                        k = done + j
                        to[j] = modulated(t[k], b[k], s[k], m[k], f[k])
                    done += length


@inner
def _rest_row(rows, out, memory):
    """Write the part of the pixels of a row of latents that comes from two rows (2, 2 w + 2, C) of a stream."""
    width, pitch, sums = rows.shape[1] - 2, out.steps * STEP, memory.sums[0]
    for half in range(2):
        _read_row(rows[half], memory.reads, pitch)
        for block in range(out.shift.size // BLOCK):
            first = block * BLOCK
            size = min(BLOCK, out.outputs - first)
            b, s = out.bias[0, first : first + BLOCK], out.shift[first : first + BLOCK]
            for p in range(0, width, ROWS):
                tile(sums, memory.reads, p * pitch, pitch, out.weight, block, out.steps)
                for i in range(ROWS):
                    to, t = memory.rest[half, p + i, first : first + size], sums[i * BLOCK : (i + 1) * BLOCK]
                    for j in range(size):
                        to[j] = min(max(shifted(t[j], b[j], s[j]), -_PIXEL), _PIXEL)


@inner
def _pixel_rows(memory, first, count, filtered, to_row):
    """Add both parts of the pixels of rows of a row of latents, and enter them in the memory of the filter."""
    for n in range(count):
        y, row = first + n, filtered.pixels[to_row + n]
        half, i, j = y // 8, y * 48, y % 8 * 24
        for x in range(row.size // 24):
            a = memory.linear[x // 2, i + x % 2 * 24 : i + x % 2 * 24 + 24]
            b, to = memory.rest[half, x, j : j + 24], row[x * 24 : x * 24 + 24]
            for k in range(24):
                to[k] = min(max(int32(int32(int32(a[k]) + int32(b[k])) + _HALF), int32(0)), _TOP)
        enter_row(to_row + n, filtered)


class Synthesis:
    """Synthesis transform of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors) -> None:
        parts = dict(tensors)
        (w8, w16), (n8, n16) = arch.synthesis_widths, arch.synthesis_blocks
        _outputs(parts, "linear", 3, LATENT_STRIDE)
        _outputs(parts, "expand", w8, 2)
        _outputs(parts, "out", 3, 8)
        wide = matrix(parts, "linear")
        high = (wide + 64) >> 7
        # without the product of both low digits, in units of 128
        whole = dense(wide, parts["linear.bias"].astype(np.int64) >> 7, parts["linear.shift"].astype(np.int64) - 7)
        low = wide - (high << 7)
        self._linear: Wide = constant(Wide(pack(high, True), pack(low, True), whole.bias[0], whole.shift))
        self._stem = layer(parts, "stem", signed=True)
        self._expand, self._out = (layer(parts, name, -READ_LOW) for name in ("expand", "out"))
        self._mod16, self._mod8 = modulation(parts, "mod16", self._stem), modulation(parts, "mod8", self._expand)
        self._blocks16, self._blocks8 = blocks(parts, "blocks16", n16, w16), blocks(parts, "blocks8", n8, w8)
        exponent = parts["normaliser"].astype(np.int64) + (NORMAL_BITS - LATENT_BITS)
        self._unit = (2.0**exponent).astype(np.float32)
        self._widths, self._latents = (w8, w16), arch.latents
        self._filter = Filter(parts)
        #: Rows of latents around a part of an image that its pixels depend on. The filter reads from one more at 1/8.
        self.halo = n16 + ceil_div(n8 + 1, 2)

    def __call__(
        self,
        symbols: Symbols,
        steps: NDArray[np.int32],
        quality: int,
        out: NDArray[Any],
        above: int = 0,
        below: int = 0,
    ) -> None:
        """Reconstruct an image, or a part of it.

        Parameters
        ----------
        symbols : int16 (h,w,C)
        steps : int32 (C,)
            Dequantiser steps.
        quality : int
            Whole quality, 1 to 100.
        out : uint8 or int16 (H,W,3)
            Grey levels, or 64ths of a grey level: the pixels of all symbols but those of the halo, cut off at the lower
            and right border.
        above, below : int
            Rows of symbols that belong to the halo: 0, or `halo`, where the image goes on.
        """
        h, w, _ = symbols.shape
        (w8, w16), row = self._widths, quality - 1
        memory = _row_buffers(w, self._latents, w8, w16)
        stream16 = np.zeros((h + 2, w + 2, w16), np.int16)
        _synthesise16(symbols, steps, self._unit, self._stem, self._mod16, row, memory, stream16)
        run_blocks(stream16, self._blocks16, row, int(above > 0), int(below > 0), buffers(self._blocks16, w))
        stream8 = np.zeros((2 * h + 2, 2 * w + 2, w8), np.int16)
        _synthesise8(stream16, self._expand, self._mod8, row, memory, stream8)
        del stream16
        run_blocks(stream8, self._blocks8, row, int(above > 0), int(below > 0), buffers(self._blocks8, 2 * w))
        bits, filtered = 0 if out.dtype == np.int16 else PIXEL_BITS, self._filter.rows(w * LATENT_STRIDE)
        _synthesise(
            symbols, steps, self._unit, self._linear, self._out, stream8, memory, self._filter.tables(row), filtered,
            bits, above, below, out.reshape(len(out), -1),
        )  # fmt: skip


@jit
def _synthesise16(symbols, steps, unit, stem, mod, quality, memory, stream):
    for y in range(symbols.shape[0]):
        _write_digits(symbols[y], steps, unit, memory.digits)
        _list_row(symbols.shape[1], memory)
        _stem_row(symbols.shape[1], stem, mod, quality, memory, stream[y + 1])


@jit
def _synthesise8(stream16, expand, mod, quality, memory, stream8):
    for y in range(stream16.shape[0] - 2):
        _expand_row(stream16[y + 1], expand, mod, quality, memory, stream8[2 * y + 1 : 2 * y + 3])


@jit
def _synthesise(symbols, steps, unit, linear, out, stream8, memory, tables, filtered, bits, above, below, pixels):
    height, width = symbols.shape[0], symbols.shape[1]
    begin, end = max(above - 1, 0), height - max(below - 1, 0)
    for y in range(begin, end):
        _write_digits(symbols[y], steps, unit, memory.digits)
        _list_row(width, memory)
        _linear_row(width, linear, memory)
        _rest_row(stream8[2 * y + 1 : 2 * y + 3], out, memory)
        first = (y - above) * LATENT_STRIDE - REACH
        if y < above:  # of the halo, the filter reads the nearest rows
            _pixel_rows(memory, LATENT_STRIDE - REACH, REACH, filtered, 0)
        elif y < height - below:
            _pixel_rows(memory, 0, LATENT_STRIDE, filtered, REACH)
            if y == 0:
                for row in range(REACH):
                    copy_row(filtered, REACH, row)
            skip = REACH if y == above else 0
            filter_strip(LATENT_STRIDE, skip, tables, filtered, bits, first, pixels)
        else:
            _pixel_rows(memory, 0, REACH, filtered, REACH)
            filter_strip(REACH, 0, tables, filtered, bits, first, pixels)
    if not below:
        for row in range(REACH):
            copy_row(filtered, REACH - 1, REACH + row)
        first = (height - above) * LATENT_STRIDE - REACH
        filter_strip(REACH, 0, tables, filtered, bits, first, pixels)


class Analysis:
    """Analysis transform of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors) -> None:
        parts = dict(tensors)
        (w8, w16), (n8, n16) = arch.analysis_widths, arch.analysis_blocks
        _columns(parts, "linear", 3, LATENT_STRIDE)
        _columns(parts, "stem", 3, 8)
        _columns(parts, "reduce", w8, 2)
        wide, bias, shift = matrix(parts, "linear"), parts["linear.bias"], parts["linear.shift"]
        high = (wide + 64) >> 7
        # grey levels are stored plus 128
        taken = bias.astype(np.int64) - 128 * wide.sum(1)
        self._high, self._low = dense(high, taken, shift), dense(wide - (high << 7), taken, shift)
        self._signed_high = pack(high, True)
        self._stem, self._reduce, self._out = (layer(parts, name, 128) for name in ("stem", "reduce", "out"))
        self._mod8, self._mod16 = modulation(parts, "mod8", self._stem), modulation(parts, "mod16", self._reduce)
        self._blocks8, self._blocks16 = blocks(parts, "blocks8", n8, w8), blocks(parts, "blocks16", n16, w16)
        self._widths, self._latents = (w8, w16), arch.latents
        #: Rows of latents around a part of an image that its latents depend on.
        self.halo = n16 + ceil_div(n8, 2)

    def __call__(
        self,
        grey: NDArray[np.uint8],
        rest: NDArray[np.int8] | None,
        quality: int,
        latents: Latents,
        above: int = 0,
        below: int = 0,
    ) -> None:
        """Analyse an image (H,W,3), or a part of it, H and W multiples of 16.

        Parameters
        ----------
        grey : uint8 (H,W,3)
            Grey levels.
        rest : int8 (H,W,3), optional
            64ths of a grey level on top, -32 to 31.
        quality : int
            Whole quality, 1 to 100.
        latents : int32 (h,w,C)
            Output, without the rows of the halo.
        above, below : int
            Rows of latents that belong to the halo: 0, or `halo`, where the image goes on.
        """
        height, width, _ = grey.shape
        h, w, row = height // LATENT_STRIDE, width // LATENT_STRIDE, quality - 1
        parts = len(latents) // max(1, PART_HALOS * self.halo, PART // w)
        if parts > 1:
            ends = [len(latents) * n // parts for n in range(parts + 1)]
            for first, last in zip(ends[:-1], ends[1:], strict=True):
                up, down = self.halo if first else above, self.halo if last < len(latents) else below
                pixels = slice(LATENT_STRIDE * (above + first - up), LATENT_STRIDE * (above + last + down))
                fractions = None if rest is None else rest[pixels]
                self(grey[pixels], fractions, quality, latents[first:last], up, down)
            return
        grey = grey.reshape(height, -1)
        w8, w16 = self._widths
        inputs = max(layer.steps for layer in (self._high, self._stem, self._reduce, self._out)) * STEP
        reads, sums = np.zeros(padded(2 * w, ROWS) * inputs, np.uint8), np.zeros((3, ROWS * BLOCK), np.int32)
        stream8 = np.zeros((2 * h + 2, 2 * w + 2, w8), np.int16)
        _analyse8(grey, LATENT_STRIDE // 2, self._stem, self._mod8, row, reads, sums, stream8)
        run_blocks(stream8, self._blocks8, row, int(above > 0), int(below > 0), buffers(self._blocks8, 2 * w))
        stream16 = np.zeros((h + 2, w + 2, w16), np.int16)
        _analyse16(stream8, self._reduce, self._mod16, row, reads, sums, stream16)
        del stream8
        run_blocks(stream16, self._blocks16, row, int(above > 0), int(below > 0), buffers(self._blocks16, w))
        # as bytes, like the grey levels: another type would compile another function
        low_bits = np.zeros((0, 0), np.uint8) if rest is None else rest.view(np.uint8).reshape(height, -1)
        linear = self._high, self._low, self._signed_high, np.arange(self._high.steps, dtype=np.int32)
        signed_reads = reads.view(np.int8)
        _analyse(grey, low_bits, LATENT_STRIDE, linear, self._out, stream16, reads, signed_reads, sums, above, latents)


@inner
def _gather(image, y, edge, reads, pitch):
    """Copy a row of squares of an image (H,3 W) to rows of bytes."""
    size = 3 * edge
    for x in range(image.shape[1] // size):
        for i in range(edge):
            first = x * pitch + i * size
            row, to = image[y * edge + i, x * size : (x + 1) * size], reads[first : first + size]
            for j in range(size):
                to[j] = row[j]


@inner
def _modulate_rows(reads, width, dense, mod, quality, sums, row):
    """Apply a layer and its modulation to rows of bytes, and write a row (w + 2, C) of a stream."""
    pitch, scale, offset = dense.steps * STEP, mod.scale[quality], mod.offset[quality]
    for block in range(dense.shift.size // BLOCK):
        first = block * BLOCK
        size = min(BLOCK, dense.outputs - first)
        b, s = dense.bias[0, first : first + BLOCK], dense.shift[first : first + BLOCK]
        m, f = scale[first : first + size], offset[first : first + size]
        for p in range(0, width, ROWS):
            tile(sums, reads, p * pitch, pitch, dense.weight, block, dense.steps)
            for i in range(min(ROWS, width - p)):
                to, t = row[p + i + 1, first : first + size], sums[i * BLOCK : (i + 1) * BLOCK]
                for j in range(size):
                    to[j] = modulated(t[j], b[j], s[j], m[j], f[j])


@jit
def _analyse8(grey, edge, stem, mod, quality, reads, sums, stream):
    for y in range(stream.shape[0] - 2):
        _gather(grey, y, edge, reads, stem.steps * STEP)
        _modulate_rows(reads, stream.shape[1] - 2, stem, mod, quality, sums[0], stream[y + 1])


@jit
def _analyse16(stream8, reduce, mod, quality, reads, sums, stream16):
    channels, pitch = stream8.shape[2], reduce.steps * STEP
    for y in range(stream16.shape[0] - 2):
        for i in range(2):
            for x in range(stream8.shape[1] - 2):
                from_ = stream8[2 * y + i + 1, x + 1]
                first = x // 2 * pitch + (2 * i + x % 2) * channels
                to = reads[first : first + channels]
                for k in range(channels):
                    to[k] = read(int32(from_[k]))
        _modulate_rows(reads, stream16.shape[1] - 2, reduce, mod, quality, sums[0], stream16[y + 1])


@jit
def _analyse(grey, rest, edge, linear, out, stream, reads, signed_reads, sums, above, latents):
    high, low, signed, indices = linear
    width, limit, offset = latents.shape[1], int32(1 << 20), int32(WEIGHT_OFFSET)
    for y in range(latents.shape[0]):
        pitch = high.steps * STEP
        _gather(grey, y + above, edge, reads, pitch)
        for block in range(high.shift.size // BLOCK):
            first = block * BLOCK
            size = min(BLOCK, high.outputs - first)
            for p in range(0, width, ROWS):
                tile(sums[0], reads, p * pitch, pitch, high.weight, block, high.steps)
                tile(sums[1], reads, p * pitch, pitch, low.weight, block, high.steps)
                for i in range(min(ROWS, width - p)):
                    to = latents[y, p + i, first : first + size]
                    for j in range(size):
                        to[j] = int32(int32(128) * sums[0, i * BLOCK + j]) + sums[1, i * BLOCK + j]
        if rest.size:
            _gather(rest, y + above, edge, reads, pitch)
            for block in range(high.shift.size // BLOCK):
                first = block * BLOCK
                size = min(BLOCK, high.outputs - first)
                for p in range(0, width, ROWS):
                    signed_tile(sums[0], signed_reads, p * pitch, pitch, signed, block, high.steps, indices, high.steps)
                    for i in range(min(ROWS, width - p)):
                        total = int32(0)
                        for k in range(pitch):
                            total += int32(signed_reads[(p + i) * pitch + k])
                        to = latents[y, p + i, first : first + size]
                        for j in range(size):
                            to[j] += int32(2) * int32(sums[0, i * BLOCK + j] - offset * total)
        pitch = out.steps * STEP
        _read_row(stream[y + above + 1], reads, pitch)
        for block in range(out.shift.size // BLOCK):
            first = block * BLOCK
            size = min(BLOCK, out.outputs - first)
            b, s = out.bias[0, first : first + BLOCK], out.shift[first : first + BLOCK]
            bias, shift = high.bias[0, first : first + BLOCK], high.shift[first : first + BLOCK]
            for p in range(0, width, ROWS):
                tile(sums[0], reads, p * pitch, pitch, out.weight, block, out.steps)
                for i in range(min(ROWS, width - p)):
                    to = latents[y, p + i, first : first + size]
                    for j in range(size):
                        line = min(max(shifted(to[j], bias[j], shift[j]), -limit), limit)
                        curve = min(max(shifted(sums[0, i * BLOCK + j], b[j], s[j]), -_WIDE), _WIDE)
                        to[j] = min(max(int32(line + curve), -_WIDE), _WIDE)


class Head:
    """Semantic head of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors) -> None:
        self._width, self._classes = arch.head_width, arch.classes
        self._stem, self._hidden = layer(tensors, "stem", signed=True), layer(tensors, "hidden", 128)
        self._out, self._mod = layer(tensors, "out"), modulation(tensors, "mod", self._stem)
        self._blocks = blocks(tensors, "blocks", arch.head_blocks, arch.head_width)
        self._compand, self._score = tensors["compand"].astype(np.int32), tensors["score"]

    def __call__(self, latents: Latents, quality: int, scores: NDArray[np.uint8]) -> None:
        """Score the label cells of an image.

        Parameters
        ----------
        latents : int32 (h,w,C)
        quality : int
            Whole quality, 1 to 100.
        scores : uint8 (rows,columns,outputs)
            Output, as `family.Transforms.score` has it. Cells are 4 x 4 latents, smaller at the lower and right border.
        """
        edge = LABEL_CELL // LATENT_STRIDE
        h, w, channels = latents.shape
        for height, rows in _equal_cells(h, edge):
            for width, columns in _equal_cells(w, edge):
                stream = np.zeros((height + 2, width + 2, self._width), np.int16)
                memory = _row_buffers(width, channels, self._width, self._width)
                work = np.zeros(padded(max(self._hidden.steps * STEP, self._out.steps * STEP), 4) * ROWS, np.uint8)
                _score(
                    latents, edge, rows, columns, quality - 1, 0, self._stem, self._mod, self._blocks, self._hidden,
                    self._out, self._compand, self._score, stream, memory, buffers(self._blocks, width), work,
                    np.zeros(ROWS * self._hidden.shift.size, np.uint8), self._classes, scores,
                )  # fmt: skip


def _equal_cells(size: int, edge: int) -> list[tuple[int, tuple[int, int]]]:
    """Return the height of cells along an axis, with the first and one after the last of this height."""
    whole = size // edge
    parts = [(edge, (0, whole)), (size % edge, (whole, whole + 1))]
    return [(height, cells) for height, cells in parts if height and cells[1] > cells[0]]


@jit
def _score(
    latents, edge, rows, columns, quality, nothing, stem, mod, parts, hidden, out, compand, table, stream, memory,
    blocks_memory, pooled, between, classes, scores,
):  # fmt: skip
    # `nothing` is 0: literal numbers would make numba compile the blocks once more
    height, width, channels = stream.shape[0] - 2, stream.shape[1] - 2, stream.shape[2]
    count, sums = int32(height * width), memory.sums[0]
    for row in range(rows[0], rows[1]):
        for column in range(columns[0], columns[1]):
            for y in range(height):
                for x in range(width):
                    latent = latents[row * edge + y, column * edge + x]
                    high, low = memory.digits[2, x], memory.digits[3, x]
                    for c in range(latent.size):
                        value = compand[abs(latent[c])]
                        h, k = split(int32(-value) if latent[c] < 0 else value)
                        high[c], low[c] = h, k
                _list_row(width, memory)
                _stem_row(width, stem, mod, quality, memory, stream[y + 1])
                for x in range(width):
                    for k in range(channels):
                        stream[y + 1, x + 1, k] = max(stream[y + 1, x + 1, k], 0)
            run_blocks(stream, parts, nothing, nothing, nothing, blocks_memory)
            for k in range(channels):
                total, peak = int32(0), int32(-32768)
                for y in range(height):
                    for x in range(width):
                        value = int32(stream[y + 1, x + 1, k])
                        total += value
                        peak = max(peak, value)
                mean = int32(int32(2 * total + count) // int32(2 * count))
                pooled[k], pooled[channels + k] = read(mean), read(peak)
            for block in range(hidden.shift.size // BLOCK):
                tile(sums, pooled, 0, 0, hidden.weight, block, hidden.steps)
                for j in range(BLOCK):
                    n = block * BLOCK + j
                    value = shifted(sums[j], hidden.bias[0, n], hidden.shift[n])
                    between[n] = min(max(value, int32(0)), int32(255))
            for block in range(out.shift.size // BLOCK):
                tile(sums, between, 0, 0, out.weight, block, out.steps)
                for j in range(min(BLOCK, out.outputs - block * BLOCK)):
                    n = block * BLOCK + j
                    value = shifted(sums[j], out.bias[0, n], out.shift[n])
                    value = min(max(value, -_LOGIT), _LOGIT)
                    if n < classes:
                        scores[row, column, n] = table[value + _LOGIT]
                    else:
                        value = int32(value + (1 << EMBEDDING_SHIFT >> 1)) >> EMBEDDING_SHIFT
                        scores[row, column, n] = min(max(value, -127), 127) + EMBEDDING_ZERO


def _columns(tensors: dict[str, NDArray[Any]], name: str, channels: int, edge: int) -> None:
    """Reorder the inputs of a layer that follows a pixel-unshuffle: from (C,y,x) to (y,x,C)."""
    weight = tensors[f"{name}.weight"]
    weight = weight.reshape(len(weight), channels, edge, edge).transpose(0, 2, 3, 1)
    tensors[f"{name}.weight"] = weight.reshape(len(weight), -1)


def _outputs(tensors: dict[str, NDArray[Any]], name: str, channels: int, edge: int) -> None:
    """Reorder the outputs of a layer that a pixel-shuffle follows."""
    order = np.arange(channels * edge * edge).reshape(channels, edge, edge).transpose(1, 2, 0).reshape(-1)
    for part in ("weight", "bias", "shift"):
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][order]
