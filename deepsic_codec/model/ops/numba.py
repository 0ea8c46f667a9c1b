"""Numba loops for CPU tensors.

In torch operations each step would read and write all values once more, which takes longer than the products. Here each
method is one loop over memory. Rows are shared by as many threads as torch uses.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import int32
from torch import Tensor

from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.prior_formats import LINEAR_MAX
from deepsic_codec.model.logistic import INDEX_MAX, INDEX_MIDDLE, MEAN_LEVELS, MEAN_MAX, RATE_BITS
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops.protocol import RateTables, Sums, SymbolState
from deepsic_codec.model.ops.torch import TorchOps
from deepsic_codec.model.schedule import Step
from deepsic_codec.payload.coders.numba_jit import jit

#: Number of values from which on another thread is worth waking.
MIN_SHARED_VALUES = 1 << 18


class NumbaOps(TorchOps):
    """`protocol.Ops` in loops of Numba; methods that it does not override are fast in torch."""

    def narrow(self, total: Tensor, bias: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
        out = torch.empty(total.shape, dtype=torch.int8)
        _over_rows(_narrow, total, _with_rows(bias), rows_per_entry(total, bias), shift, low, high, out)
        return out

    def add(self, stream: Tensor, total: Tensor, bias: Tensor, shift: Tensor) -> None:
        _over_rows(_add, total, bias, shift, stream)

    def read(self, values: Tensor, bits: int) -> Tensor:
        out = torch.empty(values.shape, dtype=torch.int8)
        _over_rows(_read, values, np.float32(2.0**-bits), np.float32(0.5 if bits else 0), out)
        return out

    def modulate(self, total: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        out = torch.empty(total.shape, dtype=torch.float32)
        _over_rows(_modulate, total, bias, shift, scale, offset, rows_per_entry(total, scale), out)
        return out

    def features(self, symbols: Tensor, companded: Tensor) -> tuple[Tensor, Tensor]:
        linear, magnitude = (torch.empty(symbols.shape, dtype=torch.int8) for _ in range(2))
        _over_rows(_enter, symbols, companded, np.arange(len(symbols)), 0, linear, magnitude)
        return linear, magnitude

    def enter(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor, companded: Tensor) -> None:
        _over_rows(_enter, symbols, companded, rows, step.start, neighbours.linear, neighbours.magnitude)

    def means_and_indices(
        self, total: Tensor, bias: Tensor, mean_shift: Tensor, index_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape = len(total), total.shape[1] // 2
        mean, index = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=torch.uint8)
        shifts = torch.cat([mean_shift, index_shift])
        _over_rows(_means_and_indices, total, _with_rows(bias), rows_per_entry(total, bias), shifts, mean, index)
        return mean, index

    def move_symbols(
        self,
        state: SymbolState,
        step: Step,
        rows: tuple[Tensor, Tensor],
        predicted: tuple[Tensor, Tensor],
        tables: RateTables,
        companded: Tensor,
        quality: Tensor | int,
    ) -> None:
        features = state.neighbours.linear, state.neighbours.magnitude, companded
        tensors = (state.symbols, state.latents, *features, *rows, *predicted, *tables)
        qualities = np.full(1, quality) if isinstance(quality, int) else quality.numpy()
        _move_symbols(*(t.numpy() for t in tensors), qualities, step.start)

    def dequantise(self, symbols: Tensor, steps: Tensor) -> Tensor:
        out = torch.empty(symbols.shape, dtype=torch.int32)
        _over_rows(_dequantise, symbols, steps, rows_per_entry(symbols, steps), out)
        return out

    def digits(self, values: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        high, low = (torch.empty(values.shape, dtype=torch.int8) for _ in range(2))
        _over_rows(
            _digits, values, torch.ones(values.shape[1], dtype=torch.float32) if unit is None else unit, high, low
        )
        return high, low

    def companded_digits(self, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        high, low = (torch.empty(values.shape, dtype=torch.int8) for _ in range(2))
        _over_rows(_companded_digits, values, table, high, low)
        return high, low

    def pixels(self, linear: Sums, rest: Sums, grid: tuple[int, int, int], q6: bool) -> Tensor:
        n, h, w = grid
        out = torch.empty((n * h, 16, w * 48), dtype=torch.int16 if q6 else torch.uint8)
        _over_rows(_pixels, linear.total.view(n * h, w, -1), *linear[1:], *rest, 0 if q6 else formats.PIXEL_BITS, out)
        return out.view(n, 16 * h, 16 * w, 3)


def rows_per_entry(total: Tensor, entries: Tensor) -> int:
    """Number of rows (P,C) that share an entry of (B,C); all rows share entries (C,)."""
    return len(total) // len(entries) if entries.ndim > 1 else max(1, len(total))


def _with_rows(bias: Tensor) -> Tensor:
    return bias if bias.ndim > 1 else bias[None]


def _over_rows(loop: Callable[..., None], values: Tensor, *rest: Any) -> None:
    """Run `loop(first, last, values, *rest)` over all rows, which several threads may share."""
    arrays = [v.numpy() if isinstance(v, Tensor) else v for v in (values, *rest)]
    rows, threads = len(values), min(torch.get_num_threads(), values.numel() // MIN_SHARED_VALUES)
    if threads <= 1:
        loop(0, rows, *arrays)
        return
    ends = [rows * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = []
    for first, last in zip(ends[1:-1], ends[2:], strict=True):
        try:
            others.append(_pool(os.getpid()).submit(loop, first, last, *arrays))
        except RuntimeError:  # the interpreter is shutting down
            loop(first, last, *arrays)
    loop(0, ends[1], *arrays)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; those of a process that it was forked from do not exist here."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "deepsic-rows")


# Sums of 32 bits: numba computes in 64 bits unless told that the upper ones are not needed, at half the speed.


@jit
def _narrow(first, last, total, bias, per, shift, low, high, out):
    low_, high_ = int32(low), int32(high)
    for p in range(first, last):
        b, t, o = bias[p // per], total[p], out[p]
        for c in range(t.size):
            o[c] = min(max(int32(int32(t[c] + b[c]) >> int32(shift[c] & 31)), low_), high_)


@jit
def _add(first, last, total, bias, shift, stream):
    limit = np.float32(formats.STREAM_MAX)
    for p in range(first, last):
        t, s = total[p], stream[p]
        for c in range(t.size):
            moved = s[c] + np.float32(int32(int32(t[c] + bias[c]) >> int32(shift[c] & 31)))
            s[c] = min(max(moved, -limit), limit)


@jit
def _read(first, last, values, unit, half, out):
    low, high = np.float32(formats.READ_LOW), np.float32(formats.READ_HIGH)
    for p in range(first, last):
        v, o = values[p], out[p]
        for c in range(v.size):
            o[c] = np.int8(min(max(np.floor(v[c] * unit + half), low), high))


@jit
def _modulate(first, last, total, bias, shift, scale, offset, per, out):
    low, high = int32(-formats.STEM_MAX), int32(formats.STEM_MAX)
    end, unit = np.float32(formats.STREAM_MAX), np.float32(2.0**-formats.MODULATION_BITS)
    for p in range(first, last):
        t, o, s, f = total[p], out[p], scale[p // per], offset[p // per]
        for c in range(t.size):
            value = min(max(int32(int32(t[c] + bias[c]) >> int32(shift[c] & 31)), low), high)
            # integers below 2^24, in whatever way they are multiplied and added
            o[c] = min(max(np.floor((np.float32(value) * s[c] + f[c]) * unit), -end), end)


@jit
def _enter(first, last, symbols, companded, rows, start, linear, magnitude):
    for p in range(first, last):
        s, x, m = symbols[p], linear[rows[p], start:], magnitude[rows[p], start:]
        for c in range(s.size):
            value = int32(s[c])
            x[c] = min(max(value, -LINEAR_MAX), LINEAR_MAX)
            m[c] = companded[abs(value)]


@jit
def _means_and_indices(first, last, total, bias, per, shift, mean, index):
    end, top, middle = int32(MEAN_MAX), int32(INDEX_MAX), int32(INDEX_MIDDLE)
    for p in range(first, last):
        b, t, m, k = bias[p // per], total[p], mean[p], index[p]
        n = m.size
        for c in range(n):
            m[c] = min(max(int32(int32(t[c] + b[c]) >> int32(shift[c] & 31)), -end), end)
        for c in range(n):
            value = int32(int32(t[n + c] + b[n + c]) >> int32(shift[n + c] & 31)) + middle
            k[c] = min(max(value, int32(0)), top)


@jit
def _dequantise(first, last, symbols, steps, per, out):
    end, half, limit = int32(formats.WIDE_MAX), 1 << (formats.STEP_BITS - 1), 2 << (14 + formats.STEP_BITS)
    for p in range(first, last):
        s, t, o = symbols[p], steps[p // per], out[p]
        for c in range(s.size):
            product = int32(min(max(np.int64(s[c]) * np.int64(t[c]), -limit), limit))  # type: ignore[arg-type]
            o[c] = min(max(int32(int32(product + half) >> formats.STEP_BITS), -end), end)


@jit
def _digits(first, last, values, unit, high, low):
    end = np.float32(formats.WIDE_MAX)
    for p in range(first, last):
        v, h, k = values[p], high[p], low[p]
        for c in range(v.size):
            scaled = np.floor(np.float32(v[c]) * unit[c] + np.float32(0.5))
            value = int32(min(max(scaled, -end), end))
            digit = int32(int32(value + formats.DIGIT // 2) >> 7)
            h[c] = digit
            k[c] = value - int32(digit << 7)


@jit
def _companded_digits(first, last, values, table, high, low):
    for p in range(first, last):
        v, h, k = values[p], high[p], low[p]
        for c in range(v.size):
            value = int32(table[abs(v[c])])
            if v[c] < 0:
                value = int32(-value)
            digit = int32(int32(value + formats.DIGIT // 2) >> 7)
            h[c] = digit
            k[c] = value - int32(digit << 7)


@jit
def _pixels(first, last, linear, bias, shift, rest, rest_bias, rest_shift, bits, out):
    limit, half = int32(formats.PIXEL_MAX), int32(128 << formats.PIXEL_BITS)
    top, rounding = int32(255 << formats.PIXEL_BITS), int32((1 << bits) >> 1)
    for r in range(first, last):  # a row of the larger blocks
        for x in range(linear.shape[1]):
            a = linear[r, x]
            for y in range(16):
                for side in range(2):
                    b = rest[((2 * r + y // 8) * linear.shape[1] + x) * 2 + side]
                    i, j, at = y * 48 + side * 24, y % 8 * 24, x * 48 + side * 24
                    for k in range(24):
                        u = int32(int32(a[i + k] + bias[i + k]) >> int32(shift[i + k] & 31))
                        v = int32(int32(b[j + k] + rest_bias[j + k]) >> int32(rest_shift[j + k] & 31))
                        sum_ = int32(int32(min(max(u, -limit), limit)) + int32(min(max(v, -limit), limit)))
                        value = int32(min(max(int32(sum_ + half), int32(0)), top))
                        out[r, y, at + k] = int32(value + rounding) >> bits


@jit
def _move_symbols(
    chosen, latents, linear, magnitude, compand, padded, flat, means, indices, saved, price, quality, start
):
    """Most symbols are those that the prior expects, and stay; qualities are (P,), or (1,) for one quality."""
    one, half = np.float32(1 << RATE_BITS), np.float32(0.5)
    for p in range(len(flat)):
        row, q = flat[p], quality[p if len(quality) > 1 else 0] - 1
        for i in range(means.shape[1]):
            c = start + i
            symbol = chosen[row, c]
            away = symbol * MEAN_LEVELS - means[p, i]
            if abs(away) <= MEAN_LEVELS // 2:
                continue
            # in single precision, as elsewhere
            error = np.int64(np.floor((np.float32(symbol) - latents[row, c]) * one + half))
            towards = -1 if away > 0 else 1
            cost = (price[q, c] * ((1 << RATE_BITS) + 2 * towards * error)) >> RATE_BITS
            if saved[indices[p, i], min(abs(away), saved.shape[1] - 1)] > cost:
                symbol += towards
                chosen[row, c] = symbol
                linear[padded[p], c] = min(max(symbol, -LINEAR_MAX), LINEAR_MAX)
                magnitude[padded[p], c] = compand[abs(symbol)]
