"""Context-mixing binary arithmetic coder for the symbols of a chunk.

Each symbol is a number, which is coded as its difference from the prior's rounded mean: zero flag, sign, unary
magnitude bins with an Exp-Golomb escape, and, where the scale is large, some low bits as they are. With a trellis,
symbols are in halves of a step: twice the number in even states, half a step less in odd ones, which have contexts of
their own. A bin's probability mixes three adaptive contexts in the logistic domain: the prior's scale index, the
neighbourhood in the same channel, and earlier channels at the same position (paper, section III-B, with its trained
classifier). All arithmetic is on integers, so the same bytes give the same symbols on every machine.
`docs/entropy-coder.md` is normative and has the bounds.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.kernels import inline, jit
from deepsic_codec.payload.coders.binary import EVEN, MIN_P, STRETCH_ONE, code_bit, code_mixed, code_single
from deepsic_codec.payload.coders.contexts import (
    ESCAPE_BITS,
    FRACTIONS,
    INPUTS,
    NEIGHBOURS,
    PREVIOUS,
    SCALES,
    UNARY,
    CoderTables,
    ContextLayout,
)
from deepsic_codec.payload.coders.interval import begin_encoding, check_end, finish_encoding, read_first
from deepsic_codec.payload.coders.trellis import NEXT

SYMBOL_BYTES = 2 * (2 + UNARY + 2 * ESCAPE_BITS + 16)  # limit for one symbol: 16 bits for each bin
SYMBOL_MAX = 32767
OUT_OF_RANGE = "features: the stream holds a symbol outside the allowed range"

Positions = tuple[NDArray[np.int64], NDArray[np.int64]]  # y and x


def _neighbour_table() -> NDArray[np.uint8]:
    """Return the level of each weighted sum of neighbouring magnitudes, which are clipped at 63."""
    bounds = np.array([1, 2, 3, 4, 6, 8, 12, 20, 36])
    return np.searchsorted(bounds, np.arange(64), side="right").astype(np.uint8)


NEIGHBOUR = _neighbour_table()


@inline
def _code_mixed(decoding, bit, a, b, c, mixer, weights, rate, limit, contexts, stream, data):
    """Code a bit under three contexts and a bias, which has a weight as well."""
    m = mixer * INPUTS
    bias = weights[m + 3] * STRETCH_ONE
    error, bit, stream = code_mixed(decoding, bit, a, b, c, m, bias, weights, rate, limit, contexts, stream, data)
    weights[m + 3] += (STRETCH_ONE * error + 131072) >> 18
    return bit, stream


@inline
def _magnitude(symbol, trellis):
    """Return the magnitude of the number of a symbol."""
    return np.int32(np.int32(abs(np.int32(symbol)) + trellis) >> trellis)


@inline
def number_of(symbol, trellis):
    """Return the number that stands for a symbol: with a trellis (1), half of it, rounded away from 0."""
    return (symbol + (trellis if symbol > 0 else 0)) >> trellis


@inline
def odd_mean(mean):
    """Return the mean of a number in an odd state of the trellis, from that in an even one, in eighths."""
    return mean + min(max(mean, -4), 4)


@jit
def code_pass(
    decoding, source, symbols, positions, channels, predictions, tables, memory, offsets, state, data, out, row
):
    """Code one pass of one group over all slices, from a row of the predictions on.

    Parameters
    ----------
    decoding : bool
        Whether to decode.
    source : int16 (S, h, w, C)
        The symbols of an encoder, with a trellis those of a path through it.
    symbols : int16 (S, h + 2, w + 2, C)
        Symbols coded so far, with a border of zeros. Both directions fill it symbol by symbol, so that contexts never
        depend on anything that a decoder does not have yet.
    positions : two of int64 (positions,)
        y and x of the pass, in row-major order.
    channels : (int, int, int)
        First channel, channels, and 1 for a second pass of a group.
    predictions : int16, uint8 (P channels,)
        Means in eighths and scale indices: rows of all channels, in the order of slices and then positions.
    tables : tuple
        `levels`, `low_bits`, `limit`, `rate` and `single` of `CoderTables`.
    memory : tuple
        Contexts, mixers, working memory int32 (C,), and int64 (2,): the state of the trellis, and whether there is one.
    offsets : tuple of int
        `ContextLayout` of the contexts.
    state, data : int64 (4,), uint8 (n,)
        The stream.
    out : int16 (P channels,)
        A decoder's symbols, arranged like the predictions.
    row : int
        The first row to code.

    Returns
    -------
    int
        The next row. It is not the last if `data` may be too short for a row. -1 if the stream holds an impossible
        symbol, or if those of an encoder are no path.
    """
    stream = (state[0], state[1], state[2], state[3])
    (ys, xs), (start, count, second), (means, indices) = positions, channels, predictions
    levels, low_bits, limit, rate, single = tables
    contexts, weights, neighbourhood, path = memory
    node, trellis = path[0], path[1]
    halving = np.int32(trellis)
    zero_scale, zero_previous, unary_scale, unary_near, unary_channel = (
        offsets[0], offsets[1], offsets[2], offsets[3], offsets[4],
    )  # fmt: skip
    odd, zero_channel, sign_at, low_at, escape_at = offsets[5], offsets[6], offsets[7], offsets[8], offsets[9]
    latents = symbols.shape[3]
    end = start + count
    rows = symbols.shape[0] * ys.size
    while row < rows and (decoding or stream[3] + count * SYMBOL_BYTES <= data.size):
        s, n = row // ys.size, row % ys.size
        y, x = ys[n] + 1, xs[n] + 1
        # one-dimensional slices let the compiler turn this loop into vector code
        up, mid, down = symbols[s, y - 1], symbols[s, y], symbols[s, y + 1]
        nw, no, ne = up[x - 1, start:end], up[x, start:end], up[x + 1, start:end]
        we, current, ea = mid[x - 1, start:end], mid[x, start:end], mid[x + 1, start:end]
        sw, so, se = down[x - 1, start:end], down[x, start:end], down[x + 1, start:end]
        target, first = source[s, ys[n], xs[n], start:end], row * count
        mean_row, index_row = means[first : first + count], indices[first : first + count]
        for c in range(count):
            sides = abs(np.int32(we[c])) + abs(np.int32(ea[c])) + abs(np.int32(no[c])) + abs(np.int32(so[c]))
            corners = abs(np.int32(nw[c])) + abs(np.int32(ne[c])) + abs(np.int32(sw[c])) + abs(np.int32(se[c]))
            neighbourhood[c] = min((2 * sides + corners) >> halving, 63)
        for c in range(count):
            k = start + c
            scale = np.int64(levels[index_row[c]])
            mean: Any = np.int64(mean_row[c])
            quantiser = node & 1
            set_at = odd if quantiser else np.int64(0)
            if quantiser:
                mean = odd_mean(mean)
            centre = (mean + 4) >> 3
            fraction = mean - (centre << 3)  # -4..3
            flip = fraction < 0
            if flip:
                fraction = -fraction
            level = np.int64(NEIGHBOUR[neighbourhood[c]])
            previous: Any = np.int64(0)
            if c > 0:
                left: Any = np.int64(_magnitude(current[c - 1], halving))
                previous += 2 * min(left, 2)
            if c > 1:
                previous += min(np.int64(_magnitude(current[c - 2], halving)), 1)
            nonzero_mean = np.int64(1) if centre != 0 else np.int64(0)
            difference = np.int64(0)
            if not decoding:
                difference = number_of(np.int64(target[c]), trellis) - centre
                if flip:
                    difference = -difference
            a = set_at + zero_scale + (scale * FRACTIONS + fraction) * 2 + nonzero_mean
            b = zero_channel + ((second * latents + k) * NEIGHBOURS + level) * 2 + nonzero_mean
            c3 = set_at + zero_previous + (scale * PREVIOUS + previous) * 5 + min(level >> 1, 4)
            bit = difference != 0
            if scale < single:
                bit, stream = code_single(decoding, bit, c3, MIN_P, limit, contexts, stream, data)
            else:
                bit, stream = _code_mixed(decoding, bit, a, b, c3, scale, weights, rate, limit, contexts, stream, data)
            if bit:
                negative = difference < 0
                negative, stream = code_single(
                    decoding, negative, sign_at + scale * FRACTIONS + fraction, MIN_P, limit, contexts, stream, data
                )
                low_count = np.int64(low_bits[scale])
                magnitude = abs(difference) - 1
                coarse = magnitude >> low_count
                v: Any = np.int64(0)
                while v < UNARY:
                    a = set_at + unary_scale + scale * UNARY + v
                    b = set_at + unary_near + ((scale >> 3) * NEIGHBOURS + level) * UNARY + v
                    c3 = set_at + unary_channel + (k * 3 + min((previous + 1) >> 1, 2)) * 4 + min(v, 3)
                    bit = coarse > v
                    bit, stream = _code_mixed(
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
                        stream,
                        data,
                    )
                    if not bit:
                        break
                    v += 1
                if v == UNARY:
                    # Exp-Golomb code of coarse - UNARY + 1: its length in unary, then its lower bits
                    rest = coarse - UNARY + 1
                    length = np.int64(0)
                    if not decoding:
                        while rest >> (length + 1):
                            length += 1
                    suffix_bits = np.int64(0)
                    while True:
                        bit = suffix_bits < length
                        bit, stream = code_single(
                            decoding, bit, escape_at + suffix_bits, MIN_P, limit, contexts, stream, data
                        )
                        if not bit:
                            break
                        suffix_bits += 1
                        if suffix_bits == ESCAPE_BITS:
                            return -1
                    suffix = np.int64(1)
                    for i in range(suffix_bits - 1, -1, -1):
                        bit, stream = code_bit(decoding, (rest >> i) & 1 != 0, EVEN, stream, data)
                        suffix = (suffix << 1) | np.int64(bit)
                    v = UNARY + suffix - 1
                for i in range(low_count - 1, -1, -1):
                    bit = (magnitude >> i) & 1 != 0
                    if i == low_count - 1:
                        bit, stream = code_single(decoding, bit, low_at + scale, MIN_P, limit, contexts, stream, data)
                    else:
                        bit, stream = code_bit(decoding, bit, EVEN, stream, data)
                    v = (v << 1) | np.int64(bit)
                if decoding:
                    difference = -(v + 1) if negative else v + 1
            number = centre - difference if flip else centre + difference
            symbol: Any = number
            if trellis:
                symbol = 2 * number
                if quantiser and number != 0:
                    symbol -= 1 if number > 0 else -1
                if not decoding and symbol != target[c]:
                    return -1
                node = NEXT[node, number & 1]
            if abs(symbol) > SYMBOL_MAX:
                return -1
            current[c] = symbol
            if decoding:
                out[first + c] = symbol
        row += 1
    path[0] = node
    state[0], state[1], state[2], state[3] = stream
    return row


@jit
def _encode_passes(
    passes, chunk, source, symbols, positions, predictions, tables, memory, offsets, state, data, progress
):
    """Encode passes of a chunk, from pass `progress[0]`, row `progress[1]` on, and update `progress`.

    `passes`, `positions`, `predictions` and `chunk` are those of `SymbolEncoder.encode`. The function returns before
    the last pass if `data` may be too short for a row.
    """
    (ys, xs), (means, indices) = positions, predictions
    while progress[0] < len(passes):
        start, count, second, first, places, begin = passes[progress[0]]
        end, rows = first + places, symbols.shape[0] * places
        begin += chunk * rows * count
        stop = begin + rows * count
        if progress[1] == 0:
            memory[3][0] = 0
        row = code_pass(
            False,
            source,
            symbols,
            (ys[first:end], xs[first:end]),
            (start, count, second),
            (means[begin:stop], indices[begin:stop]),
            tables,
            memory,
            offsets,
            state,
            data,
            means,
            progress[1],
        )
        progress[1] = row
        if row < rows:
            return
        progress[0] += 1
        progress[1] = 0


def initial_contexts(tables: CoderTables) -> NDArray[np.uint32]:
    """Return the contexts at the start of a chunk."""
    p22 = tables.probabilities.astype(np.uint32) << np.uint32(6)
    return (p22 << np.uint32(10)) | np.minimum(tables.confidence, tables.limit).astype(np.uint32)


class _Coder:
    """State of the stream of a chunk, for either direction."""

    def __init__(self, tables: CoderTables, slices: int, grid: tuple[int, int], latents: int, trellis: bool) -> None:
        self.symbols = np.zeros((slices, grid[0] + 2, grid[1] + 2, latents), np.int16)
        self._source = self.symbols
        self._tables = tables.levels, tables.low_bits, tables.limit, tables.rate, tables.single
        weights = tables.weights.astype(np.int64).ravel()
        path = np.array([0, trellis], np.int64)
        self._memory = initial_contexts(tables), weights, np.empty(latents, np.int32), path
        self._offsets = tuple(ContextLayout.of(latents))[:-1]
        self._state = begin_encoding()
        self._data = np.empty(0, np.uint8)

    def _run(
        self,
        decoding: bool,
        positions: Positions,
        start: int,
        second: bool,
        means: NDArray[np.int16],
        indices: NDArray[np.uint8],
        out: NDArray[np.int16],
    ) -> None:
        row, (rows, count) = 0, means.shape
        self.start_pass()
        while row < rows:
            row = code_pass(
                decoding,
                self._source,
                self.symbols,
                positions,
                (start, count, int(second)),
                (means.reshape(-1), indices.reshape(-1)),
                self._tables,
                self._memory,
                self._offsets,
                self._state,
                self._data,
                out.reshape(-1),
                row,
            )
            if row < 0:
                raise CorruptPayload(OUT_OF_RANGE)
            if row < rows:
                self.grow(count)

    def start_pass(self) -> None:
        """Set the trellis to its first state, as at the start of every pass."""
        self._memory[3][0] = 0

    def arguments(self) -> tuple[Any, ...]:
        """Return the state as loops that call `code_pass` take it; all of it changes in place but `data`."""
        return self.symbols, self._tables, self._memory, self._offsets, self._state

    @property
    def data(self) -> NDArray[np.uint8]:
        """The stream, which `grow` replaces."""
        return self._data

    def grow(self, count: int) -> None:
        """Double the output, and make room for `count` symbols."""
        self._data = np.concatenate([self._data, np.empty(self._data.size + count * SYMBOL_BYTES, np.uint8)])


class SymbolEncoder(_Coder):
    """Arithmetic encoder of all symbols of a chunk, int16 (S, h, w, C); with `trellis`, those of a path through it.

    With `continued` it starts with the contexts and mixers of that encoder, for training. A payload never does.
    """

    def __init__(
        self,
        tables: CoderTables,
        symbols: NDArray[np.int16],
        trellis: bool = False,
        continued: "SymbolEncoder | None" = None,
    ) -> None:
        s, h, w, c = symbols.shape
        super().__init__(tables, s, (h, w), c, trellis)
        if continued is not None:
            self._memory = *continued._memory[:3], self._memory[3]
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
        """Encode a pass: some channels of some positions of all slices.

        Parameters
        ----------
        ys, xs : int64 (positions,)
            In row-major order.
        start : int
            The first channel.
        second : bool
            Whether it is a second pass of its channels.
        means, indices : int16, uint8 (P, channels)
            Means in eighths and scale indices of the prior, rows by slice and position.
        """
        self._run(False, (ys, xs), start, second, means, indices, means)

    def encode(
        self,
        passes: NDArray[np.int64],
        ys: NDArray[np.int64],
        xs: NDArray[np.int64],
        means: NDArray[np.int16],
        indices: NDArray[np.uint8],
        chunk: int = 0,
    ) -> None:
        """Encode all passes of a chunk in one call of compiled code.

        Parameters
        ----------
        passes : int64 (n,6)
            First channel, channels, 1 for a second pass, its first position, positions, its first prediction.
        ys, xs : int64 (positions,)
            Positions of all passes.
        means, indices : int16, uint8 (predictions,)
            Predictions of a batch of chunks: pass by pass, in each pass chunk by chunk, rows by slice and position.
        chunk : int
            Number of this chunk in the batch.
        """
        progress = np.zeros(2, np.int64)
        while progress[0] < len(passes):
            _encode_passes(
                passes,
                chunk,
                self._source,
                self.symbols,
                (ys, xs),
                (means, indices),
                self._tables,
                self._memory,
                self._offsets,
                self._state,
                self._data,
                progress,
            )
            if progress[1] < 0:
                raise ValueError("symbols that are out of range, or no path through the trellis")
            if progress[0] < len(passes):
                self.grow(int(passes[progress[0], 1]))

    def adaptive_state(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the contexts (probability in the upper 22 bits, observations below) and mixers (MIXERS, INPUTS)."""
        contexts, weights, *_ = self._memory
        return contexts, weights.reshape(-1, INPUTS)

    def finish(self) -> bytes:
        """Return the stream: the fewest bytes that lie in the final interval when continued by zeros."""
        return finish_encoding(self._state, self._data)


class SymbolDecoder(_Coder):
    """Arithmetic decoder of the feature section of a chunk with symbols (S, h, w, C): slices, grid and latents."""

    def __init__(
        self,
        tables: CoderTables,
        data: bytes,
        slices: int,
        grid: tuple[int, int],
        latents: int,
        trellis: bool = False,
    ) -> None:
        super().__init__(tables, slices, grid, latents, trellis)
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
        """Decode a pass, as `SymbolEncoder.encode_pass` encodes it, to `symbols` and, if given, `out` (P, channels)."""
        self._run(True, (ys, xs), start, second, means, indices, np.empty_like(means) if out is None else out)

    def finish(self) -> NDArray[np.int16]:
        """Return all symbols (S, h, w, C).

        Raises
        ------
        CorruptPayload
            If bytes of the stream are left over.
        """
        check_end(int(self._state[3]), self._data.size, "features", unit="symbol")
        return self.symbols[:, 1:-1, 1:-1]
