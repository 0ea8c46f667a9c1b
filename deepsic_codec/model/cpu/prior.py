"""The integer prior and the entropy coder, a step of the coding order at a time (`docs/entropy-coder.md`).

For a few positions at a time, one compiled loop gathers what the prior knows, computes means and scale indices, moves
symbols if asked, and codes them. Nothing but streams and symbols leaves it.
"""

import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.kernels import constant, inner, int32, jit
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.cpu.dot import BLOCK, ROWS, STEP, sparse_tile, tile
from deepsic_codec.model.cpu.layers import Dense, Tensors, dense, list_steps, narrow_rows, shifted
from deepsic_codec.model.cpu.trellis import (
    UNIT,
    ExpectGrid,
    PathWork,
    TrellisRates,
    choose_path,
    expected_symbols,
    make_rates,
    path_work,
)
from deepsic_codec.model.exact.formats import STEP_BITS
from deepsic_codec.model.exact.prior_formats import DIRECT_BITS, HIDDEN_BITS, INPUT_BITS, LINEAR_MAX, SCALE_BITS
from deepsic_codec.model.family import below
from deepsic_codec.model.logistic import INDEX_LEVELS, INDEX_MAX, INDEX_MIDDLE, MEAN_LEVELS, MEAN_MAX, RATE_BITS
from deepsic_codec.model.schedule import LINEAR, Step, schedule
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import (
    OUT_OF_RANGE,
    SYMBOL_BYTES,
    SYMBOL_MAX,
    SymbolDecoder,
    SymbolEncoder,
    code_pass,
    number_of,
)

#: Positions that are predicted before they are coded.
POSITIONS = 32
#: What a step does with its symbols besides predicting them.
DECODE, ENCODE, CHOOSE, TRELLIS = 1, 2, 4, 8
_MEAN, _INDEX, _MIDDLE, _LINEAR = int32(MEAN_MAX), int32(INDEX_MAX), int32(INDEX_MIDDLE), int32(LINEAR_MAX)
_NOTHING = np.zeros((0, 0), np.int32)


class StepTables(NamedTuple):
    """Tensors of a step; biases have a row for each whole quality.

    `direct` int32 (neighbours,count) predicts means from the signs of neighbours, with `direct_shift`.
    """

    first: Dense
    second: Dense
    out: Dense
    mean_shift: NDArray[np.int32]
    index_shift: NDArray[np.int32]
    direct: NDArray[np.int32]
    direct_shift: NDArray[np.int32]


class RateTables(NamedTuple):
    """Saving and price of a moved symbol, int32, in 2^-RATE_BITS bits (`quantise.make_tables`)."""

    saved: NDArray[np.int32]
    price: NDArray[np.int32]


class ChoiceRates(NamedTuple):
    """Rates of both optimised quantisers."""

    scalar: RateTables
    trellis: TrellisRates


class Grid(NamedTuple):
    """Symbols of a chunk, and what the prior and the coder know of them.

    Attributes
    ----------
    source : int16 (S,h,w,C)
        An encoder's symbols, which `CHOOSE` changes.
    latents : int32 (S,h,w,C)
        Latents of which `CHOOSE` makes symbols, or of no elements.
    steps : float32 (C,)
        Quantiser steps of the latents, with a trellis half of them.
    path : int64 (1,)
        State of the trellis where `CHOOSE` goes on.
    price : int32 (C,)
        Squared error of a half step in 2^-RATE_BITS bits, for the trellis.
    weights : int32 (S,h,w)
        Weights of errors in 1/256, or of no elements.
    magnitude : uint8 (S,h + 2,w + 2,C)
        Companded magnitudes of the symbols that are known, with a border of zeros.
    linear : uint8 (S,h + 2,w + 2,D)
        The first D symbols themselves, clipped to +-127, plus 128.
    compand : uint8 (32769,)
        Table of companded magnitudes of the symbols.
    """

    source: NDArray[np.int16]
    latents: NDArray[np.int32]
    steps: NDArray[np.float32]
    path: NDArray[np.int64]
    price: NDArray[np.int32]
    weights: NDArray[np.int32]
    magnitude: NDArray[np.uint8]
    linear: NDArray[np.uint8]
    compand: NDArray[np.uint8]


class Work(NamedTuple):
    """Memory of a thread for some positions; `rows` and `row_bytes`, `compact` and `compact_bytes` share theirs."""

    rows: NDArray[np.int32]
    row_bytes: NDArray[np.uint8]
    compact: NDArray[np.int32]
    compact_bytes: NDArray[np.uint8]
    indices: NDArray[np.int32]
    row_sums: NDArray[np.int32]
    first: NDArray[np.uint8]
    second: NDArray[np.uint8]
    totals: NDArray[np.int32]
    sums: NDArray[np.int32]
    means: NDArray[np.int16]
    scale_indices: NDArray[np.uint8]
    symbols: NDArray[np.int16]
    path: PathWork


@inner
def _predict(position, count_of_positions, s, quality, shape, parts, net, positions, grid, work):
    """Write means and scale indices of some positions, `work.means` and `work.scale_indices`, (positions,count)."""
    ys, xs = positions
    start, count, second, signed, offsets = shape
    width, outputs, inputs = net.first.shift.size, net.out.shift.size, net.first.steps
    totals, sums = work.totals, work.sums
    if len(parts):
        pitch = inputs * STEP
        for i in range(count_of_positions):
            y, x, at = ys[position + i] + 1, xs[position + i] + 1, i * pitch
            for part in parts:
                kind, dy, dx, first, stop = part[0], part[1], part[2], part[3], part[4]
                to = work.row_bytes[at : at + stop - first]
                if kind == LINEAR:
                    source = grid.linear[s, y + dy, x + dx, first:stop]
                else:
                    source = grid.magnitude[s, y + dy, x + dx, first:stop]
                for c in range(to.size):
                    to[c] = source[c]
                at += stop - first
        bias, shift = net.first.bias[quality], net.first.shift
        for p in range(0, count_of_positions, ROWS):
            left = list_steps(work.rows, p, inputs, work.row_sums, work.indices, work.compact)
            for block in range(width // BLOCK):
                first = block * BLOCK
                b, k = bias[first : first + BLOCK], shift[first : first + BLOCK]
                sparse_tile(
                    sums, work.compact_bytes, 0, left * STEP, net.first.weight, block, inputs, work.indices, left
                )
                for i in range(ROWS):
                    to, t = work.first[(p + i) * width + first :], sums[i * BLOCK : (i + 1) * BLOCK]
                    for j in range(BLOCK):
                        to[j] = min(max(shifted(t[j], b[j], k[j]), int32(0)), int32(255))
        narrow_rows(
            work.first, count_of_positions, width, net.second.weight, net.second.bias[0], net.second.shift,
            net.second.steps, work.second, sums,
        )  # fmt: skip
        for block in range(outputs // BLOCK):
            for p in range(0, count_of_positions, ROWS):
                tile(sums, work.second, p * width, width, net.out.weight, block, net.out.steps)
                for i in range(ROWS):
                    to, t = totals[(p + i) * outputs + block * BLOCK :], sums[i * BLOCK : (i + 1) * BLOCK]
                    for j in range(BLOCK):
                        to[j] = t[j]
    else:
        for i in range(count_of_positions * outputs):
            totals[i] = 0
    if signed:
        for i in range(count_of_positions):
            y, x = ys[position + i] + 1, xs[position + i] + 1
            total = totals[i * outputs : i * outputs + count]
            for c in range(count):
                added = int32(0)
                for n in range(len(offsets)):
                    symbol = int32(grid.linear[s, y + offsets[n, 0], x + offsets[n, 1], start + c]) - int32(128)
                    added += int32(symbol * net.direct[n, c])
                total[c] += int32(added << int32(net.direct_shift[c] & 31))
    bias = net.out.bias[quality]
    for i in range(count_of_positions):
        total = totals[i * outputs : (i + 1) * outputs]
        mean, index = work.means[i * count : (i + 1) * count], work.scale_indices[i * count : (i + 1) * count]
        for c in range(count):
            mean[c] = min(max(shifted(total[c], bias[c], net.mean_shift[c]), -_MEAN), _MEAN)
        for c in range(count):
            value = shifted(total[count + c], bias[count + c], net.index_shift[c]) + _MIDDLE
            index[c] = min(max(value, int32(0)), _INDEX)


@inner
def _choose(position, count_of_positions, s, quality, start, positions, grid, work, rates):
    """Move symbols a step towards their means where the bits that this saves outweigh the error."""
    ys, xs = positions
    one, half, limit = np.float32(1 << RATE_BITS), np.float32(0.5), np.float32(SYMBOL_MAX)
    unit, count = np.float32(1 << STEP_BITS), work.means.size // POSITIONS
    for i in range(count_of_positions):
        y, x = ys[position + i], xs[position + i]
        for c in range(count):
            k, symbol = start + c, np.int64(grid.source[s, y, x, start + c])
            away = symbol * MEAN_LEVELS - work.means[i * count + c]
            if abs(away) <= MEAN_LEVELS // 2:
                continue
            # in single precision, as elsewhere
            scaled = np.float32(grid.latents[s, y, x, k]) * unit / grid.steps[k]
            error = np.int64(np.floor((np.float32(symbol) - min(max(scaled, -limit), limit)) * one + half))
            towards = -1 if away > 0 else 1
            cost = (rates.price[quality, k] * ((1 << RATE_BITS) + 2 * towards * error)) >> RATE_BITS
            saved = rates.saved[work.scale_indices[i * count + c]]
            if saved[min(abs(away), saved.size - 1)] > cost:
                grid.source[s, y, x, k] = symbol + towards


@jit
def _run_step(mode, begin, quality, shape, parts, net, positions, grid, work, rates, coder, data):
    """Run a step of the coding order over a chunk.

    Parameters
    ----------
    mode : int
        `DECODE`, `ENCODE`, `CHOOSE`, or the sum of the last two; plus `TRELLIS` for symbols of a path through it.
    begin : int
        Number of the first position, over all slices.
    quality : int
        Row of the tables.
    shape : (int, int, int, int, int64 (n,2))
        First channel, channels, whether it is the second pass of its group, whether signs of neighbours predict means,
        and offsets of the neighbours.
    parts : int64 (n,5)
        Kind, offset, first and last channel of the features that are gathered.
    coder : tuple
        Symbols, tables, memory, offsets and state of a `SymbolEncoder` or `SymbolDecoder`.
    data : uint8 (n,)
        Its stream.

    Returns
    -------
    int
        Number of the position to go on from: not the last where `data` is too short. -1 if the stream is damaged.
    """
    ys, xs = positions
    start, count, second = shape[0], shape[1], shape[2]
    symbols, tables, memory, layout, state = coder
    number_of_positions, halving = ys.size, int32(1 if mode & TRELLIS else 0)
    for s in range(begin // number_of_positions, grid.magnitude.shape[0]):
        first = begin - s * number_of_positions if s == begin // number_of_positions else 0
        for p in range(first, number_of_positions, POSITIONS):
            n = min(POSITIONS, number_of_positions - p)
            if mode & ENCODE and state[3] + n * count * SYMBOL_BYTES > data.size:
                return s * number_of_positions + p
            _predict(p, n, s, quality, shape, parts, net, positions, grid, work)
            if mode & CHOOSE and mode & TRELLIS:
                grid.path[0] = choose_path(
                    grid.path[0], p, n, s, start, count, positions, grid, work.means, work.scale_indices,
                    rates.trellis, work.path,
                )  # fmt: skip
            elif mode & CHOOSE:
                _choose(p, n, s, quality, start, positions, grid, work, rates.scalar)
            if mode & (DECODE | ENCODE):
                done = code_pass(
                    (mode & DECODE) != 0, grid.source[s : s + 1], symbols[s : s + 1], (ys[p : p + n], xs[p : p + n]),
                    (start, count, second), (work.means[: n * count], work.scale_indices[: n * count]), tables, memory,
                    layout, state, data, work.symbols[: n * count], 0,
                )  # fmt: skip
                if done < 0:
                    return -1
            for i in range(n):
                y, x = ys[p + i], xs[p + i]
                if mode & DECODE:
                    row = symbols[s, y + 1, x + 1, start : start + count]
                else:
                    row = grid.source[s, y, x, start : start + count]
                magnitude = grid.magnitude[s, y + 1, x + 1, start : start + count]
                for c in range(count):
                    magnitude[c] = grid.compand[abs(int32(row[c]))]
                linear = grid.linear[s, y + 1, x + 1]
                for c in range(min(count, linear.size - start)):
                    number = number_of(int32(row[c]), halving)
                    linear[start + c] = min(max(number, -_LINEAR), _LINEAR) + int32(128)
    return grid.magnitude.shape[0] * number_of_positions


@jit
def _nearest(latents, steps, source):
    """Write the symbols (P,C) that are nearest to latents (P,C)."""
    unit, limit = np.float32(1 << STEP_BITS), np.float32(SYMBOL_MAX)
    for p in range(latents.shape[0]):
        row, to = latents[p], source[p]
        for c in range(row.size):
            to[c] = int32(np.rint(min(max(np.float32(row[c]) * unit / steps[c], -limit), limit)))


class Prior:
    """Prior, optimised quantiser and entropy coder of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors, rdo: Tensors, gains: Tensors, coder: CoderTables) -> None:
        self.steps = schedule(arch.prior_groups, arch.prior_detail)
        self.latents, self.coder_tables = arch.latents, coder
        self._signed = min(
            arch.latents, max([arch.prior_detail, *(step.start + step.count for step in self.steps if step.signed)])
        )
        self._companded = [np.ascontiguousarray(tensors[name], np.uint8) for name in ("compand", "compand_half")]
        self._nets = [_step_tables(step, below(tensors, str(i))) for i, step in enumerate(self.steps)]
        tables = (rdo[name].astype(np.int32) for name in RateTables._fields) if rdo else (_NOTHING, _NOTHING)
        scalar = RateTables(*tables)
        step, half = gains["step"], gains["half"]
        trellis = make_rates(coder, arch.latents, scalar.price if rdo else np.zeros(step.shape, np.int32), step, half)
        self._rates: ChoiceRates = constant(ChoiceRates(scalar, trellis))
        self._local = threading.local()

    def encode(self, symbols: NDArray[np.int16], quality: int, trellis: bool = False) -> bytes:
        """Encode the symbols (S,h,w,C) of a chunk at a whole quality."""
        coder = SymbolEncoder(self.coder_tables, symbols, trellis)
        self._run(ENCODE + TRELLIS * trellis, quality, np.ascontiguousarray(symbols), coder)
        return coder.finish()

    def choose(
        self,
        latents: NDArray[np.int32],
        steps: NDArray[np.int32],
        quality: int,
        optimise: bool,
        encode: bool,
        trellis: bool = False,
        prices: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    ) -> tuple[NDArray[np.int16], bytes | None]:
        """Choose the symbols of a chunk, and encode them if asked.

        Parameters
        ----------
        latents : int32 (S,h,w,C)
        steps : int32 (C,)
            Quantiser steps, with `trellis` half of them.
        quality : int
            Whole quality, 1 to 100.
        optimise : bool
            Whether to move symbols where the bits that this saves outweigh the error.
        encode : bool
            Whether to encode them.
        trellis : bool
            Whether to choose a path through the trellis; `optimise` is then not looked at.
        prices : two of ndarray, optional
            With `trellis`: `Grid.price` and `Grid.weights`, instead of those of the model file.
        """
        symbols, single = np.empty(latents.shape, np.int16), steps.astype(np.float32)
        if trellis:
            coder = SymbolEncoder(self.coder_tables, symbols if encode else symbols[:1, :1, :1], trellis)
            self._run(ENCODE * encode + CHOOSE + TRELLIS, quality, symbols, coder, latents, single, prices)
            return symbols, coder.finish() if encode else None
        _nearest(latents.reshape(-1, self.latents), single, symbols.reshape(-1, self.latents))
        optimise = optimise and len(self._rates.scalar.price) > 0
        if not (optimise or encode):
            return symbols, None
        coder = SymbolEncoder(self.coder_tables, symbols if encode else symbols[:1, :1, :1])
        self._run(ENCODE * encode + CHOOSE * optimise, quality, symbols, coder, latents, single)
        return symbols, coder.finish() if encode else None

    def expect(
        self,
        targets: NDArray[np.float32],
        means: NDArray[np.float32],
        indices: NDArray[np.float32],
        prices: tuple[NDArray[np.int32], NDArray[np.int32]],
        temperature: float,
    ) -> NDArray[np.float32]:
        """Return the expected symbols (S,h,w,C) over all paths through the trellis.

        Parameters
        ----------
        targets : float32 (S,h,w,C)
            Symbols of the least cost apart from their own bits, in half steps.
        means, indices : float32 (S,h,w,C)
            What the prior predicts: means of numbers, and scale indices.
        prices : two of ndarray
            As of `choose`.
        temperature : float
            In bits.
        """
        units = np.floor(targets * UNIT + 0.5).clip(-SYMBOL_MAX * UNIT, SYMBOL_MAX * UNIT).astype(np.int32)
        eighths = np.floor(means * MEAN_LEVELS + 0.5).clip(-_MEAN, _MEAN).astype(np.int16)
        quarters = np.floor(indices * INDEX_LEVELS + 0.5).clip(0, _INDEX).astype(np.uint8)
        grid = ExpectGrid(np.empty(targets.shape, np.float32), units, eighths, quarters, *prices)
        return expected_symbols(self.steps, grid, self._rates.trellis, temperature)

    def decode(
        self, features: bytes, slices: int, grid: tuple[int, int], quality: int, trellis: bool = False
    ) -> NDArray[np.int16]:
        """Decode a feature section to symbols (S,h,w,C).

        Raises
        ------
        CorruptPayload
            If the stream holds an impossible symbol, or bytes that no symbol needs.
        """
        coder = SymbolDecoder(self.coder_tables, features, slices, grid, self.latents, trellis)
        self._run(DECODE + TRELLIS * trellis, quality, np.empty((slices, *grid, 0), np.int16), coder)
        return coder.finish()

    def _run(
        self,
        mode: int,
        quality: int,
        source: NDArray[np.int16],
        coder: SymbolEncoder | SymbolDecoder,
        latents: NDArray[np.int32] | None = None,
        steps: NDArray[np.float32] | None = None,
        prices: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    ) -> None:
        s, h, w, _ = source.shape
        price, weights = prices or (self._rates.trellis.price[quality - 1], np.empty((0, 0, 0), np.int32))
        grid = constant(
            Grid(
                source,
                np.empty((0, 0, 0, 0), np.int32) if latents is None else latents,
                np.empty(0, np.float32) if steps is None else steps,
                np.zeros(1, np.int64),
                price,
                weights,
                np.zeros((s, h + 2, w + 2, self.latents), np.uint8),
                np.full((s, h + 2, w + 2, self._signed), 128, np.uint8),
                self._companded[1 if mode & TRELLIS else 0],
            )
        )
        of_coder = constant(coder.arguments())
        works = vars(self._local).get("works")
        if works is None:
            works = self._local.works = [_work(*pair) for pair in zip(self.steps, self._nets, strict=True)]
        for step, (parts, offsets, net), work in zip(self.steps, self._nets, works, strict=True):
            positions = step.positions(h, w)
            total, progress = s * len(positions[0]), 0
            grid.path[0] = 0
            coder.start_pass()
            shape = (step.start, step.count, int(step.second), int(step.signed), offsets)
            while progress < total:
                progress = _run_step(
                    mode, progress, quality - 1, shape, parts, net, positions, grid, work, self._rates, of_coder,
                    coder.data,
                )  # fmt: skip
                if progress < 0:
                    raise CorruptPayload(OUT_OF_RANGE)
                if progress < total:
                    coder.grow(POSITIONS * step.count)


def _step_tables(step: Step, tensors: Tensors) -> tuple[NDArray[np.int64], NDArray[np.int64], Any]:
    """Return the features of a step as `_run_step` gathers them, the offsets of its own neighbours, and its tensors."""
    parts = [(i.kind, dy, dx, i.first, i.stop) for i in step.inputs for dy, dx in i.offsets]
    mean, index = np.split(tensors["out_shift"].astype(np.int32), 2)
    # means in eighths, indices in quarters
    mean_shift, index_shift = mean + (HIDDEN_BITS - 3), index + (HIDDEN_BITS - SCALE_BITS - 2)
    out_bias = tensors["out_bias"] + np.concatenate([_half(mean_shift), _half(index_shift)])
    outputs = 2 * step.count
    if step.input_count:
        first = tensors["first"].astype(np.int64)
        # symbols with their signs are stored plus 128
        offset = np.array([128 * (kind == LINEAR) for kind, *_ in step.input_names()])
        shift = tensors["first_shift"].astype(np.int32) + (INPUT_BITS - HIDDEN_BITS)
        layers = [
            dense(first, tensors["first_bias"] + _half(shift) - first @ offset, shift),
            dense(
                tensors["second"].astype(np.int64),
                tensors["second_bias"] + _half(tensors["second_shift"]),
                tensors["second_shift"],
            ),
            dense(tensors["out"].astype(np.int64), out_bias, np.zeros(outputs)),
        ]
    else:
        one = np.zeros((1, 1), np.int64)
        layers = [dense(one, np.zeros(1), np.zeros(1))] * 2
        layers.append(dense(np.zeros((outputs, 1), np.int64), out_bias, np.zeros(outputs)))
    direct, direct_shift = np.zeros((0, 0), np.int32), np.zeros(0, np.int32)
    if step.signed:
        direct, direct_shift = tensors["direct"].astype(np.int32), mean - (DIRECT_BITS - HIDDEN_BITS)
    net = constant(StepTables(layers[0], layers[1], layers[2], mean_shift, index_shift, direct, direct_shift))
    return np.array(parts, np.int64).reshape(-1, 5), np.array(step.offsets, np.int64).reshape(-1, 2), net


def _half(shift: NDArray[Any]) -> NDArray[np.int32]:
    """Return the addend with which a shift to the right rounds to nearest: 2^(shift - 1), or 0 for no shift."""
    return (np.int32(1) << shift.astype(np.int32)) >> np.int32(1)


def _work(step: Step, tables: tuple[Any, Any, Any]) -> Any:
    net = tables[2]
    inputs, width, outputs = net.first.steps, net.first.shift.size, net.out.shift.size
    rows, compact = np.zeros((1, POSITIONS, inputs), np.int32), np.zeros((1, ROWS * inputs), np.int32)
    return constant(
        Work(
            rows,
            rows.view(np.uint8).reshape(-1),
            compact,
            compact.view(np.uint8).reshape(-1),
            np.zeros(inputs + 1, np.int32),
            np.zeros((1, ROWS), np.int32),
            np.zeros(POSITIONS * width, np.uint8),
            np.zeros(POSITIONS * width, np.uint8),
            np.zeros(POSITIONS * outputs, np.int32),
            np.zeros(ROWS * BLOCK, np.int32),
            np.zeros(POSITIONS * step.count, np.int16),
            np.zeros(POSITIONS * step.count, np.uint8),
            np.zeros(POSITIONS * step.count, np.int16),
            path_work(POSITIONS * step.count),
        )
    )
