"""Context-mixing binary arithmetic coder for the symbols of a chunk.

Each symbol is coded as its difference from the prior's rounded mean: zero flag, sign,
unary magnitude bins with an Exp-Golomb escape, and, where the scale is large, some plain
low bits.  A bin's probability mixes three adaptive contexts in the logistic domain: the
prior's scale index, the neighbourhood in the same channel, and earlier channels at the
same place (paper, section III-B, with its trained classifier).  All arithmetic is on
integers, so the same bytes give the same symbols on every machine; the derivation and the
bounds are in ``docs/entropy-coder.md``.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders._numba import kernel
from deepsic_codec.payload.coders.contexts import (
    ESCAPE_BITS,
    FRACTIONS,
    INPUTS,
    NEIGHBOURS,
    PREVIOUS,
    SCALES,
    UNARY,
    CoderTables,
    Layout,
)
from deepsic_codec.payload.coders.interval import (
    CODE_BITS,
    CODE_MAX,
    begin_encoding,
    finish_decoding,
    finish_encoding,
    read_first,
)

TOP_SHIFT = CODE_BITS - 8
#: Bytes that one symbol can need at the very most: at most 16 bits for each bin.
SYMBOL_BYTES = 2 * (2 + UNARY + 2 * ESCAPE_BITS + 16)
SYMBOL_MAX = 32767

#: The logistic domain: stretched values in 1/256, up to +-12 (p = 6e-6).
STRETCH_ONE, STRETCH_MAX = 256, 3071


def _stretch_table() -> NDArray[np.int16]:
    """ln(p / (1 - p)) of p = (i + 1/2) / 16384."""
    p = (np.arange(16384) + 0.5) / 16384
    return np.clip(np.rint(np.log(p / (1 - p)) * STRETCH_ONE), -STRETCH_MAX, STRETCH_MAX).astype(np.int16)


def _squash_table() -> NDArray[np.uint16]:
    """1 / (1 + exp(-x)) in 1/65536 of x = (i - STRETCH_MAX) / 256, kept off 0 and 1."""
    x = (np.arange(2 * STRETCH_MAX + 1) - STRETCH_MAX) / STRETCH_ONE
    return np.clip(np.rint(65536 / (1 + np.exp(-x))), 16, 65520).astype(np.uint16)


def _reciprocal_table() -> NDArray[np.int32]:
    """65536 / (n + 1.5): how far the n-th observation moves a probability."""
    return np.rint(65536 / (np.arange(1024) + 1.5)).astype(np.int32)


def _neighbour_table() -> NDArray[np.uint8]:
    """Level of a weighted sum of neighbouring magnitudes, clipped at 63."""
    bounds = np.array([1, 2, 3, 4, 6, 8, 12, 20, 36])
    return np.searchsorted(bounds, np.arange(64), side="right").astype(np.uint8)


STRETCH, SQUASH, RECIPROCAL, NEIGHBOUR = _stretch_table(), _squash_table(), _reciprocal_table(), _neighbour_table()

# A context is a uint32: probability of a one in the upper 22 bits, observations in the lower 10.


@njit(inline="always")
def _adapt(contexts, i, bit, limit):  # type: ignore[no-untyped-def]
    state = contexts[i]
    count = state & 1023
    p = np.int64(state >> 10)
    target = np.int64(4194303) if bit else np.int64(0)
    p += ((target - p) * RECIPROCAL[count]) >> 16
    if count < limit:
        count += 1
    contexts[i] = np.uint32(p << 10) | np.uint32(count)


@njit(inline="always")
def _code(decoding, bit, p, low, high, value, position, data):  # type: ignore[no-untyped-def]
    """Code one bit whose probability of being one is p / 65536 (0 < p < 65536)."""
    # low <= middle < high holds whenever low < high, which normalising below restores
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
    return bit, low, high, value, position


@njit(inline="always")
def _mixed(decoding, bit, a, b, c, mixer, weights, rate, limit, contexts, low, high, value, position, data):  # type: ignore[no-untyped-def]  # noqa: E501
    """Code one bit under three contexts and train contexts and mixer on it."""
    sa = np.int64(STRETCH[contexts[a] >> 18])
    sb = np.int64(STRETCH[contexts[b] >> 18])
    sc = np.int64(STRETCH[contexts[c] >> 18])
    m = mixer * INPUTS
    dot = (weights[m] * sa + weights[m + 1] * sb + weights[m + 2] * sc + weights[m + 3] * STRETCH_ONE) >> 16
    dot = min(max(dot, -STRETCH_MAX), STRETCH_MAX)
    p = np.int64(SQUASH[dot + STRETCH_MAX])
    bit, low, high, value, position = _code(decoding, bit, p, low, high, value, position, data)
    if rate:
        error = ((np.int64(65535) if bit else np.int64(0)) - p) * rate
        weights[m] += (sa * error + 131072) >> 18
        weights[m + 1] += (sb * error + 131072) >> 18
        weights[m + 2] += (sc * error + 131072) >> 18
        weights[m + 3] += (STRETCH_ONE * error + 131072) >> 18
    _adapt(contexts, a, bit, limit)
    _adapt(contexts, b, bit, limit)
    _adapt(contexts, c, bit, limit)
    return bit, low, high, value, position


@njit(inline="always")
def _single(decoding, bit, a, limit, contexts, low, high, value, position, data):  # type: ignore[no-untyped-def]
    """Code one bit under one context."""
    p = min(max(np.int64(contexts[a] >> 16), 16), 65520)
    bit, low, high, value, position = _code(decoding, bit, p, low, high, value, position, data)
    _adapt(contexts, a, bit, limit)
    return bit, low, high, value, position


@kernel
def _code_pass(  # type: ignore[no-untyped-def]
    decoding,
    source,
    symbols,
    ys,
    xs,
    start,
    count,
    second,
    means,
    indices,
    levels,
    contexts,
    weights,
    low_bits,
    limit,
    rate,
    single,
    offsets,
    state,
    data,
    out,
    near,
    row,
):
    """Code one pass of one group over all slices, from a row of ``means`` on; returns the row that is next, or -1.

    ``symbols`` (S,h+2,w+2,C) has a border of zeros and is filled symbol by symbol in both
    directions, so that contexts never see what a decoder does not have yet; an encoder
    takes the symbols from ``source`` (S,h,w,C), and a decoder copies them to ``out``.
    ``means`` holds means in eighths and ``indices`` scale indices, whose levels are in
    ``levels`` (256,); these three are (P count,), rows of ``count`` in the order of slices
    and then positions.  It stops early where the output has no room for all that a row can need; -1:
    the stream holds an impossible symbol.  ``near`` (count,) is for the function's own use.
    """
    low, high, value, position = state[0], state[1], state[2], state[3]
    zero_scale, zero_channel, zero_previous, sign_at = offsets[:4]
    unary_scale, unary_near, unary_channel, low_at, escape_at = offsets[4:]
    latents = symbols.shape[3]
    end = start + count
    rows = symbols.shape[0] * ys.size
    while row < rows and (decoding or position + count * SYMBOL_BYTES <= data.size):
        s, n = row // ys.size, row % ys.size
        y, x = ys[n] + 1, xs[n] + 1
        # plain one-dimensional slices let the compiler turn this loop into vector code
        up, mid, down = symbols[s, y - 1], symbols[s, y], symbols[s, y + 1]
        nw, no, ne = up[x - 1, start:end], up[x, start:end], up[x + 1, start:end]
        we, here, ea = mid[x - 1, start:end], mid[x, start:end], mid[x + 1, start:end]
        sw, so, se = down[x - 1, start:end], down[x, start:end], down[x + 1, start:end]
        wanted, at, to = source[s, ys[n], xs[n], start:end], row * count, (row + 1) * count
        mean_row, index_row = means[at:to], indices[at:to]
        for c in range(count):
            sides = abs(np.int32(we[c])) + abs(np.int32(ea[c])) + abs(np.int32(no[c])) + abs(np.int32(so[c]))
            corners = abs(np.int32(nw[c])) + abs(np.int32(ne[c])) + abs(np.int32(sw[c])) + abs(np.int32(se[c]))
            near[c] = min(2 * sides + corners, 63)
        for c in range(count):
            k = start + c
            scale = np.int64(levels[index_row[c]])
            mean = np.int64(mean_row[c])
            centre = (mean + 4) >> 3
            fraction = mean - (centre << 3)  # -4..3
            flip = fraction < 0
            if flip:
                fraction = -fraction
            level = np.int64(NEIGHBOUR[near[c]])
            before = np.int64(0)
            if c > 0:
                before += 2 * min(abs(np.int64(here[c - 1])), 2)
            if c > 1:
                before += min(abs(np.int64(here[c - 2])), 1)
            off_zero = np.int64(1) if centre != 0 else np.int64(0)
            difference = np.int64(0)
            if not decoding:
                difference = np.int64(wanted[c]) - centre
                if flip:
                    difference = -difference
            a = zero_scale + (scale * FRACTIONS + fraction) * 2 + off_zero
            b = zero_channel + ((second * latents + k) * NEIGHBOURS + level) * 2 + off_zero
            c3 = zero_previous + (scale * PREVIOUS + before) * 5 + min(level >> 1, 4)
            bit = difference != 0
            if scale < single:
                bit, low, high, value, position = _single(
                    decoding, bit, c3, limit, contexts, low, high, value, position, data
                )
            else:
                bit, low, high, value, position = _mixed(
                    decoding,
                    bit,
                    a,
                    b,
                    c3,
                    scale,
                    weights,
                    rate,
                    limit,
                    contexts,
                    low,
                    high,
                    value,
                    position,
                    data,
                )
            if bit:
                negative = difference < 0
                negative, low, high, value, position = _single(
                    decoding,
                    negative,
                    sign_at + scale * FRACTIONS + fraction,
                    limit,
                    contexts,
                    low,
                    high,
                    value,
                    position,
                    data,
                )
                plain = np.int64(low_bits[scale])
                magnitude = abs(difference) - 1
                coarse = magnitude >> plain
                v = np.int64(0)
                while v < UNARY:
                    a = unary_scale + scale * UNARY + v
                    b = unary_near + ((scale >> 3) * NEIGHBOURS + level) * UNARY + v
                    c3 = unary_channel + (k * 3 + min((before + 1) >> 1, 2)) * 4 + min(v, 3)
                    bit = coarse > v
                    bit, low, high, value, position = _mixed(
                        decoding,
                        bit,
                        a,
                        b,
                        c3,
                        SCALES + min(v, 3) * 16 + (scale >> 3),
                        weights,
                        rate,
                        limit,
                        contexts,
                        low,
                        high,
                        value,
                        position,
                        data,
                    )
                    if not bit:
                        break
                    v += 1
                if v == UNARY:
                    # Exp-Golomb: length of (coarse - UNARY + 1) in unary, then its lower bits
                    rest = coarse - UNARY + 1
                    length = np.int64(0)
                    if not decoding:
                        while rest >> (length + 1):
                            length += 1
                    n_bits = np.int64(0)
                    while True:
                        bit = n_bits < length
                        bit, low, high, value, position = _single(
                            decoding,
                            bit,
                            escape_at + n_bits,
                            limit,
                            contexts,
                            low,
                            high,
                            value,
                            position,
                            data,
                        )
                        if not bit:
                            break
                        n_bits += 1
                        if n_bits == ESCAPE_BITS:
                            return -1
                    got = np.int64(1)
                    for i in range(n_bits - 1, -1, -1):
                        bit = (rest >> i) & 1 != 0
                        bit, low, high, value, position = _code(
                            decoding, bit, np.int64(32768), low, high, value, position, data
                        )
                        got = (got << 1) | np.int64(bit)
                    v = UNARY + got - 1
                for i in range(plain - 1, -1, -1):
                    bit = (magnitude >> i) & 1 != 0
                    if i == plain - 1:
                        bit, low, high, value, position = _single(
                            decoding,
                            bit,
                            low_at + scale,
                            limit,
                            contexts,
                            low,
                            high,
                            value,
                            position,
                            data,
                        )
                    else:
                        bit, low, high, value, position = _code(
                            decoding, bit, np.int64(32768), low, high, value, position, data
                        )
                    v = (v << 1) | np.int64(bit)
                if decoding:
                    difference = -(v + 1) if negative else v + 1
            symbol = centre - difference if flip else centre + difference
            if abs(symbol) > SYMBOL_MAX:
                return -1
            here[c] = symbol
            if decoding:
                out[at + c] = symbol
        row += 1
    state[0], state[1], state[2], state[3] = low, high, value, position
    return row


@kernel
def _encode_passes(  # type: ignore[no-untyped-def]
    passes,
    chunk,
    source,
    symbols,
    ys,
    xs,
    means,
    indices,
    levels,
    contexts,
    weights,
    low_bits,
    limit,
    rate,
    single,
    offsets,
    state,
    data,
    near,
    at,
):
    """Code passes from pass ``at[0]``, row ``at[1]`` on, which tell how far it came: a pass may lack room.

    ``passes`` (n,6) has first channel, channels, whether it is a second pass, first position in ``ys`` and ``xs``,
    positions, and where the pass begins in ``means`` and ``indices``, which have all chunks one after the other.
    """
    while at[0] < len(passes):
        start, count, second, first, positions, begin = passes[at[0]]
        rows = symbols.shape[0] * positions
        begin += chunk * rows * count
        row = _code_pass(
            False,
            source,
            symbols,
            ys[first : first + positions],
            xs[first : first + positions],
            start,
            count,
            second,
            means[begin : begin + rows * count],
            indices[begin : begin + rows * count],
            levels,
            contexts,
            weights,
            low_bits,
            limit,
            rate,
            single,
            offsets,
            state,
            data,
            means,
            near,
            at[1],
        )
        at[1] = row
        if row < rows:
            return
        at[0] += 1
        at[1] = 0


#: What is said of a stream that an encoder never writes.
OUT_OF_RANGE = "features: the stream holds a symbol outside the allowed range"


def first_contexts(tables: CoderTables) -> NDArray[np.uint32]:
    """Contexts of a chunk at the start."""
    p22 = tables.probabilities.astype(np.uint32) << 6
    contexts: NDArray[np.uint32] = (p22 << 10) | np.minimum(tables.confidence, tables.limit).astype(np.uint32)
    return contexts


class _Coder:
    """State of one chunk's stream, common to both directions."""

    def __init__(self, tables: CoderTables, slices: int, grid: tuple[int, int], latents: int) -> None:
        layout = Layout(latents)
        self.tables = tables
        self.symbols = np.zeros((slices, grid[0] + 2, grid[1] + 2, latents), np.int16)
        self._contexts = first_contexts(tables)
        self._weights = tables.weights.astype(np.int64).ravel()
        self._source = self.symbols
        self._offsets = (
            layout.zero_scale,
            layout.zero_channel,
            layout.zero_previous,
            layout.sign,
            layout.unary_scale,
            layout.unary_neighbours,
            layout.unary_channel,
            layout.low_bit,
            layout.escape,
        )
        self._state = begin_encoding()
        self._data = np.empty(0, np.uint8)
        self._near = np.empty(latents, np.int32)

    def _run(
        self,
        decoding: bool,
        ys: NDArray[np.int64],
        xs: NDArray[np.int64],
        start: int,
        second: bool,
        means: NDArray[np.int16],
        indices: NDArray[np.uint8],
        out: NDArray[np.int16],
    ) -> None:
        tables, row, (rows, count) = self.tables, 0, means.shape
        flat = means.reshape(-1), indices.reshape(-1), out.reshape(-1)
        while row < rows:
            row = _code_pass(
                decoding,
                self._source,
                self.symbols,
                ys,
                xs,
                start,
                count,
                int(second),
                *flat[:2],
                tables.levels,
                self._contexts,
                self._weights,
                tables.low_bits,
                tables.limit,
                tables.rate,
                tables.single,
                self._offsets,
                self._state,
                self._data,
                flat[2],
                self._near,
                row,
            )
            if row < 0:
                raise CorruptPayload(OUT_OF_RANGE)
            if row < rows:
                self._grow(count)

    def _grow(self, count: int) -> None:
        """Make room for a row of so many symbols, and double what there is."""
        self._data = np.concatenate([self._data, np.empty(self._data.size + count * SYMBOL_BYTES, np.uint8)])


class SymbolEncoder(_Coder):
    """Arithmetic encoder of one chunk.

    Parameters
    ----------
    tables : CoderTables
        Trained start.
    symbols : int16 (S,h,w,C)
        All symbols of the chunk.
    before : SymbolEncoder, optional
        Go on with what this one has learned (for training; a payload always starts anew).
    """

    def __init__(self, tables: CoderTables, symbols: NDArray[np.int16], before: SymbolEncoder | None = None) -> None:
        s, h, w, c = symbols.shape
        super().__init__(tables, s, (h, w), c)
        if before is not None:
            self._contexts, self._weights = before._contexts, before._weights
        self._source = np.ascontiguousarray(symbols, np.int16)
        self._data = np.empty(1 << 16, np.uint8)

    def encode_pass(
        self,
        ys: NDArray[np.int64],
        xs: NDArray[np.int64],
        start: int,
        second: bool,
        means: NDArray[np.int16],
        indices: NDArray[np.uint8],
    ) -> None:
        """Encode channels ``start`` on of the positions ``ys``, ``xs`` (row-major order) of all slices.

        ``means`` (P,c) in eighths and scale ``indices`` (P,c) come from the prior, rows by slice and position.
        """
        self._run(False, ys, xs, start, second, means, indices, means)

    def encode(
        self,
        passes: NDArray[np.int64],
        ys: NDArray[np.int64],
        xs: NDArray[np.int64],
        means: NDArray[np.int16],
        indices: NDArray[np.uint8],
        chunk: int = 0,
    ) -> None:
        """Encode all passes of a chunk, of several whose predictions are given, without asking Python in between.

        Parameters
        ----------
        passes : int64 (n,6)
            First channel, channels, 1 for a second pass, first of its positions and how many, first of its predictions.
        ys, xs : int64 (positions,)
            Of all passes.
        means, indices : int16, uint8 (predictions,)
            Pass by pass: of all chunks, rows by slice and position.
        chunk : int
            Which of them this is.
        """
        tables, at = self.tables, np.zeros(2, np.int64)
        while at[0] < len(passes):
            _encode_passes(
                passes,
                chunk,
                self._source,
                self.symbols,
                ys,
                xs,
                means,
                indices,
                tables.levels,
                self._contexts,
                self._weights,
                tables.low_bits,
                tables.limit,
                tables.rate,
                tables.single,
                self._offsets,
                self._state,
                self._data,
                self._near,
                at,
            )
            if at[0] < len(passes):
                self._grow(int(passes[at[0], 1]))

    def learned(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Contexts (probability in the upper 22 bits, observations below) and mixers (MIXERS, INPUTS)."""
        return self._contexts, self._weights.reshape(-1, INPUTS)

    def finish(self) -> bytes:
        """The stream: the fewest bytes that lie in the final interval when continued by zeros."""
        return finish_encoding(self._state, self._data)


class SymbolDecoder(_Coder):
    """Arithmetic decoder of one chunk.

    Parameters
    ----------
    tables : CoderTables
        Trained start.
    data : bytes
        The feature section.
    slices, grid, latents
        Size of the symbols (S,h,w,C).
    """

    def __init__(self, tables: CoderTables, data: bytes, slices: int, grid: tuple[int, int], latents: int) -> None:
        super().__init__(tables, slices, grid, latents)
        self._state, self._data = read_first(data)  # the format lets features end in a zero byte

    def decode_pass(
        self,
        ys: NDArray[np.int64],
        xs: NDArray[np.int64],
        start: int,
        second: bool,
        means: NDArray[np.int16],
        indices: NDArray[np.uint8],
        out: NDArray[np.int16] | None = None,
    ) -> None:
        """Mirror of :meth:`SymbolEncoder.encode_pass`; fills ``symbols``, and with those of this pass ``out`` (P,c)."""
        self._run(True, ys, xs, start, second, means, indices, np.empty_like(means) if out is None else out)

    def finish(self) -> NDArray[np.int16]:
        """All symbols (S,h,w,C).

        Raises
        ------
        CorruptPayload
            If bytes of the stream were left over.
        """
        finish_decoding(self._state, self._data, "features", last="symbol")
        return self.symbols[:, 1:-1, 1:-1]
