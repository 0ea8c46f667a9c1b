"""What stands between products of matrices, in two forms that give the same integers.

:class:`Tensors` says what is computed, operation by operation, for any device.  On a CPU each
operation would read and write all of its values once more, which takes longer than the products;
:class:`Compiled` makes one loop over memory of each function.  Rows are shared out to as many
threads as torch uses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import int32
from torch import Tensor

from deepsic_codec.model.exact import fixed
from deepsic_codec.payload.coders._numba import kernel

#: Values below which another thread is not worth waking.
SHARED = 1 << 18


class Tensors:
    """Of tensors on any device."""

    @staticmethod
    def narrow(total: Tensor, bias: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
        """Sums int32 (P,N) -> ``clamp((sum + bias) >> shift)`` int8 (P,N).

        Biases are (N,), or (B,N) for as many rows each as there are; shifts (N,).
        """
        return shifted(total, bias, shift).clamp_(low, high).to(torch.int8)

    @staticmethod
    def add(stream: Tensor, total: Tensor, bias: Tensor, shift: Tensor) -> None:
        """Add ``(sum + bias) >> shift`` of sums int32 (P,C) to a stream, float32 (P,C), in place, and clip it."""
        stream.add_(shifted(total, bias, shift)).clamp_(-fixed.STREAM_MAX, fixed.STREAM_MAX)

    @staticmethod
    def read(values: Tensor, bits: int) -> Tensor:
        """Integers in float32 (P,C) -> int8 in units of 2^bits, to nearest; without bits rounded down."""
        out = values.floor() if bits == 0 else values.mul(2.0**-bits).add_(0.5).floor_()
        return out.clamp_(fixed.READ_LOW, fixed.READ_HIGH).to(torch.int8)

    @staticmethod
    def modulate(total: Tensor, bias: Tensor, shift: Tensor, most: int, scale: Tensor, offset: Tensor) -> Tensor:
        """Sums int32 (P,N) -> ``clamp(clamp((sum + bias) >> shift) scale + offset >> bits)``, float32 (P,N).

        Scales and offsets are (B,N), integers in float32.
        """
        values = shifted(total, bias, shift).clamp_(-most, most).float().view(len(scale), -1, total.shape[1])
        out = torch.addcmul(offset[:, None], values, scale[:, None]).mul_(2.0**-fixed.MODULATION_BITS).floor_()
        return out.clamp_(-fixed.STREAM_MAX, fixed.STREAM_MAX).view(total.shape)

    @staticmethod
    def contexts(symbols: Tensor, companded: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Symbols (P,N) -> themselves clipped to +-most, and companded magnitudes, int8 (P,N) each."""
        return symbols.clamp(-most, most).to(torch.int8), companded[symbols.abs().long()]

    @staticmethod
    def expected(
        total: Tensor, bias: Tensor, mean_shift: Tensor, index_shift: Tensor, mean_max: int, index_max: int
    ) -> tuple[Tensor, Tensor]:
        """Sums int32 (P,2N) of a prior -> means int16 and scale indices uint8 (P,N).

        ``(sum + bias) >> shift``, clipped to +-mean_max, and to 0..index_max around its middle, which
        is (index_max + 4) / 2: indices are in quarters.  Biases are (2N,) or (P,2N).
        """
        mean, index = total.add_(bias).chunk(2, 1)
        mean = (mean >> mean_shift).clamp_(-mean_max, mean_max)
        index = ((index >> index_shift) + (index_max + 4) // 2).clamp_(0, index_max)
        return mean.to(torch.int16), index.to(torch.uint8)

    @staticmethod
    def dequantise(symbols: Tensor, steps: Tensor) -> Tensor:
        """Symbols (P,C) and dequantiser steps int32 (B,C) -> latents int32 (P,C)."""
        step = steps[:, None]
        # beyond this every product ends in the same clamp
        most = (1 << (14 + fixed.STEP_BITS)) // step + 1
        values = symbols.to(torch.int32).view(len(steps), -1, symbols.shape[1])
        product = torch.minimum(torch.maximum(values, -most), most) * step
        latents = (product + (1 << fixed.STEP_BITS - 1)) >> fixed.STEP_BITS
        return latents.clamp_(-fixed.WIDE_MAX, fixed.WIDE_MAX).view(symbols.shape)

    @staticmethod
    def digits(values: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Integers within WIDE_MAX, int32 (P,C), as high and low digits to the base 128, int8.

        With powers of two ``unit``, float32 (C,), what they are times these, rounded and clipped.
        """
        if unit is not None:
            values = values.float().mul_(unit).add_(0.5).floor_().clamp_(-fixed.WIDE_MAX, fixed.WIDE_MAX)
            values = values.to(torch.int32)
        high = (values + fixed.DIGIT // 2) >> 7
        return high.to(torch.int8), (values - (high << 7)).to(torch.int8)

    @staticmethod
    def enter(
        symbols: Tensor, companded: Tensor, linear: Tensor, magnitude: Tensor, rows: Tensor, start: int, most: int
    ) -> None:
        """Enter symbols (P,N), as :meth:`contexts` has them, at ``rows`` (P,) and from a channel on, in place."""
        own = slice(start, start + symbols.shape[1])
        linear[rows, own], magnitude[rows, own] = Tensors.contexts(symbols, companded, most)

    @staticmethod
    def move(
        chosen: Tensor,
        exact: Tensor,
        predicted: tuple[Tensor, Tensor],
        flat: Tensor,
        start: int,
        saved: Tensor,
        price: Tensor,
        quality: Tensor | int,
        levels: int,
        bits: int,
    ) -> Tensor:
        """Move symbols a step towards their mean where the bits that saves outweigh the error (``rdo.py``).

        Parameters
        ----------
        chosen, exact : Tensor
            Symbols int32 (rows,C), changed in place, and what they were rounded from, float32.
        predicted : tuple of Tensor
            Means int16, in so many ``levels`` a step, and scale indices uint8, (P,N).
        flat : Tensor
            int64 (P,), the rows that these are of.
        start : int
            The first of their channels.
        saved, price : Tensor
            int32 (indices, distances) and (100,C), in 2^-bits of a bit.
        quality : Tensor or int
            Whole qualities (P,), or that of all.

        Returns
        -------
        Tensor
            What the symbols are now, int32 (P,N).
        """
        means, indices = predicted
        own = slice(start, start + means.shape[1])
        latents, symbols = exact[flat, own], chosen[flat, own]
        away = symbols * levels - means
        error = torch.floor((symbols.float() - latents) * 2**bits + 0.5).to(torch.int32)
        towards = -torch.sign(away)
        worth = saved[indices.long(), away.abs().clamp(max=saved.shape[1] - 1)]
        cost = (price[quality - 1][..., own] * ((1 << bits) + 2 * towards * error)) >> bits
        symbols = (symbols + torch.where((worth > cost) & (away.abs() > levels // 2), towards, 0)).to(torch.int32)
        chosen[:, own] = chosen[:, own].index_copy(0, flat, symbols)
        return symbols

    @staticmethod
    def companded(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Digits, as of :meth:`digits`, of integers int32 (P,C) whose magnitudes are replaced by what a table has."""
        return Tensors.digits(table[values.abs().long()] * values.sign())

    @staticmethod
    def pixels(linear: Sums, rest: Sums, grid: tuple[int, int, int], fine: bool) -> Tensor:
        """Images of what both branches of a synthesis give them.

        Parameters
        ----------
        linear : Sums
            Of blocks of 16x16 pixels, (n h w,768), channels in the order (y,x,colour).
        rest : Sums
            Of blocks of 8x8 pixels, (n 2h 2w,192), likewise.
        grid : tuple of int
            n, h, w: images, rows and columns of the larger blocks.
        fine : bool
            Whether int16 in 64ths of a grey level is wanted, 0..16320, or uint8 in grey levels.

        Returns
        -------
        Tensor
            (n,16h,16w,3).
        """
        n, h, w = grid
        branches = []
        for sums, edge, k in ((linear, 16, 1), (rest, 8, 2)):
            part = shifted(sums.total, sums.bias, sums.shift).clamp_(-fixed.PIXEL_MAX, fixed.PIXEL_MAX)
            branches.append(scatter(part.to(torch.int16).view(n, k * h, k * w, -1), edge))
        half = 128 << fixed.PIXEL_BITS
        out = branches[0].add_(branches[1]).clamp_(-half, (255 << fixed.PIXEL_BITS) - half).add_(half)
        return out if fine else (out.add_(1 << fixed.PIXEL_BITS - 1) >> fixed.PIXEL_BITS).to(torch.uint8)


class Sums(NamedTuple):
    """Sums of products int32 (P,N), and the bias and shift (N,) that make integers of a format of them."""

    total: Tensor
    bias: Tensor
    shift: Tensor


class Residual(NamedTuple):
    """Tensors of a residual block of c channels, as :meth:`Fused.block` takes them.

    Attributes
    ----------
    taps, spatial_bias : Tensor
        Of the 3x3 convolution, float32 (9,c) and (c,), in units of what it gives.
    up, down : Tensor
        int8 (hidden,c) and (c,hidden).
    up_bias, up_shift, down_bias, down_shift : Tensor
        int32; biases (hidden,), or one row for each quality.
    bounds : tuple of int
        What hidden values are clipped to.
    """

    taps: Tensor
    spatial_bias: Tensor
    up: Tensor
    up_bias: Tensor
    up_shift: Tensor
    down: Tensor
    down_bias: Tensor
    down_shift: Tensor
    bounds: tuple[int, int]


class Contexts(NamedTuple):
    """Where a pass of the prior finds its features in (2,rows,C): magnitudes, then linear ones.

    Attributes
    ----------
    kinds, offsets : Tensor
        int32 and int64 (K,): 0 or 1, and the place less that of the row's first channel.
    around : Tensor
        int64 (n,): the same of the neighbours that predict directly, without their channels.
    """

    kinds: Tensor
    offsets: Tensor
    around: Tensor


class PassTensors(NamedTuple):
    """Tensors of a pass, as :meth:`Fused.predict` takes them; None where it has no such layer.

    Matrices are int8 (outputs,inputs), all else int32; ``first_bias`` and ``out_bias`` have a row for
    each quality, ``direct`` is (n,count).
    """

    first: Tensor | None
    first_bias: Tensor | None
    first_shift: Tensor | None
    second: Tensor | None
    second_bias: Tensor | None
    second_shift: Tensor | None
    out: Tensor | None
    out_bias: Tensor
    mean_shift: Tensor
    index_shift: Tensor
    direct: Tensor | None
    direct_shift: Tensor | None


def scatter(x: Tensor, edge: int) -> Tensor:
    """Squares to their places: (N,h,w,edge edge C) -> (N,h edge,w edge,C)."""
    n, h, w, c = x.shape
    c //= edge * edge
    return x.view(n, h, w, edge, edge * c).permute(0, 1, 3, 2, 4).reshape(n, h * edge, w * edge, c)


def shifted(total: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """``(sum + bias) >> shift`` of sums (P,N), with biases (N,) or (B,N); in place."""
    if bias.ndim > 1 and len(bias) != len(total):
        total.view(len(bias), -1, total.shape[1]).add_(bias[:, None])
    else:
        total.add_(bias)
    return total.bitwise_right_shift_(shift)


class Compiled:
    """Of tensors in a CPU's memory."""

    @staticmethod
    def narrow(total: Tensor, bias: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
        """See :meth:`Tensors.narrow`."""
        out = torch.empty(total.shape, dtype=torch.int8)
        _shared(_narrow, total, _rows(bias), _per(total, bias), shift, low, high, out)
        return out

    @staticmethod
    def add(stream: Tensor, total: Tensor, bias: Tensor, shift: Tensor) -> None:
        """See :meth:`Tensors.add`."""
        _shared(_add, total, bias, shift, stream)

    @staticmethod
    def read(values: Tensor, bits: int) -> Tensor:
        """See :meth:`Tensors.read`."""
        out = torch.empty(values.shape, dtype=torch.int8)
        _shared(_read, values, np.float32(2.0**-bits), np.float32(0.5 if bits else 0), out)
        return out

    @staticmethod
    def modulate(total: Tensor, bias: Tensor, shift: Tensor, most: int, scale: Tensor, offset: Tensor) -> Tensor:
        """See :meth:`Tensors.modulate`."""
        out = torch.empty(total.shape, dtype=torch.float32)
        _shared(_modulate, total, bias, shift, most, scale, offset, _per(total, scale), out)
        return out

    @staticmethod
    def contexts(symbols: Tensor, companded: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Tensors.contexts`."""
        linear, magnitude = (torch.empty(symbols.shape, dtype=torch.int8) for _ in range(2))
        _shared(_contexts, symbols, companded, most, linear, magnitude)
        return linear, magnitude

    @staticmethod
    def expected(
        total: Tensor, bias: Tensor, mean_shift: Tensor, index_shift: Tensor, mean_max: int, index_max: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Tensors.expected`."""
        shape = len(total), total.shape[1] // 2
        mean, index = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=torch.uint8)
        shifts = torch.cat([mean_shift, index_shift])
        _shared(_expected, total, _rows(bias), _per(total, bias), shifts, mean_max, index_max, mean, index)
        return mean, index

    @staticmethod
    def enter(
        symbols: Tensor, companded: Tensor, linear: Tensor, magnitude: Tensor, rows: Tensor, start: int, most: int
    ) -> None:
        """See :meth:`Tensors.enter`."""
        _shared(_enter, symbols, companded, rows, start, most, linear, magnitude)

    @staticmethod
    def dequantise(symbols: Tensor, steps: Tensor) -> Tensor:
        """See :meth:`Tensors.dequantise`."""
        out = torch.empty(symbols.shape, dtype=torch.int32)
        _shared(_dequantise, symbols, steps, _per(symbols, steps), out)
        return out

    @staticmethod
    def digits(values: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Tensors.digits`."""
        high, low = (torch.empty(values.shape, dtype=torch.int8) for _ in range(2))
        _shared(_digits, values, torch.ones(values.shape[1]) if unit is None else unit, high, low)
        return high, low

    @staticmethod
    def companded(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Tensors.companded`."""
        high, low = (torch.empty(values.shape, dtype=torch.int8) for _ in range(2))
        _shared(_companded, values, table, high, low)
        return high, low

    @staticmethod
    def pixels(linear: Sums, rest: Sums, grid: tuple[int, int, int], fine: bool) -> Tensor:
        """See :meth:`Tensors.pixels`."""
        n, h, w = grid
        out = torch.empty((n * h, 16, w * 48), dtype=torch.int16 if fine else torch.uint8)
        _shared(_pixels, linear.total.view(n * h, w, -1), *linear[1:], *rest, 0 if fine else fixed.PIXEL_BITS, out)
        return out.view(n, 16 * h, 16 * w, 3)


def _rows(bias: Tensor) -> Tensor:
    return bias if bias.ndim > 1 else bias[None]


def _per(total: Tensor, rows: Tensor) -> int:
    """How many rows share one of (B,N)."""
    return len(total) // len(rows) if rows.ndim > 1 else max(1, len(total))


def _shared(kernel: Callable[..., None], values: Tensor, *rest: Any) -> None:
    """Run ``kernel(first, last, values, *rest)`` over all rows, which several threads may share."""
    arrays = [v.numpy() if isinstance(v, Tensor) else v for v in (values, *rest)]
    rows, threads = len(values), min(torch.get_num_threads(), values.numel() // SHARED)
    if threads <= 1:
        kernel(0, rows, *arrays)
        return
    ends = [rows * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = []
    for first, last in zip(ends[1:-1], ends[2:], strict=True):
        try:
            others.append(_pool(os.getpid()).submit(kernel, first, last, *arrays))
        except RuntimeError:  # the interpreter is ending
            kernel(first, last, *arrays)
    kernel(0, ends[1], *arrays)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of one that it was forked from do not exist here."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "deepsic-rows")


# Sums of 32 bits: numba computes in 64 unless told that the upper ones are not wanted, at half the speed.


@kernel
def _narrow(first, last, total, bias, per, shift, low, high, out):  # type: ignore[no-untyped-def]
    low_, high_ = int32(low), int32(high)
    for p in range(first, last):
        b, t, o = bias[p // per], total[p], out[p]
        for c in range(t.size):
            o[c] = min(max(int32(int32(t[c] + b[c]) >> int32(shift[c] & 31)), low_), high_)


@kernel
def _add(first, last, total, bias, shift, stream):  # type: ignore[no-untyped-def]
    most = np.float32(fixed.STREAM_MAX)
    for p in range(first, last):
        t, s = total[p], stream[p]
        for c in range(t.size):
            moved = s[c] + np.float32(int32(int32(t[c] + bias[c]) >> int32(shift[c] & 31)))
            s[c] = min(max(moved, -most), most)


@kernel
def _read(first, last, values, unit, half, out):  # type: ignore[no-untyped-def]
    low, high = np.float32(fixed.READ_LOW), np.float32(fixed.READ_HIGH)
    for p in range(first, last):
        v, o = values[p], out[p]
        for c in range(v.size):
            o[c] = np.int8(min(max(np.floor(v[c] * unit + half), low), high))


@kernel
def _modulate(first, last, total, bias, shift, most, scale, offset, per, out):  # type: ignore[no-untyped-def]
    low, high = int32(-most), int32(most)
    end, unit = np.float32(fixed.STREAM_MAX), np.float32(2.0**-fixed.MODULATION_BITS)
    for p in range(first, last):
        t, o, s, f = total[p], out[p], scale[p // per], offset[p // per]
        for c in range(t.size):
            value = min(max(int32(int32(t[c] + bias[c]) >> int32(shift[c] & 31)), low), high)
            # integers below 2^24, in whatever way they are multiplied and added
            o[c] = min(max(np.floor((np.float32(value) * s[c] + f[c]) * unit), -end), end)


@kernel
def _contexts(first, last, symbols, companded, most, linear, magnitude):  # type: ignore[no-untyped-def]
    for p in range(first, last):
        s, x, m = symbols[p], linear[p], magnitude[p]
        for c in range(s.size):
            value = int32(s[c])
            x[c] = min(max(value, -most), most)
            m[c] = companded[abs(value)]


@kernel
def _enter(first, last, symbols, companded, rows, start, most, linear, magnitude):  # type: ignore[no-untyped-def]
    for p in range(first, last):
        s, x, m = symbols[p], linear[rows[p], start:], magnitude[rows[p], start:]
        for c in range(s.size):
            value = int32(s[c])
            x[c] = min(max(value, -most), most)
            m[c] = companded[abs(value)]


@kernel
def _expected(first, last, total, bias, per, shift, mean_max, index_max, mean, index):  # type: ignore[no-untyped-def]
    end, most, middle = int32(mean_max), int32(index_max), int32((index_max + 4) // 2)
    for p in range(first, last):
        b, t, m, k = bias[p // per], total[p], mean[p], index[p]
        n = m.size
        for c in range(n):
            m[c] = min(max(int32(int32(t[c] + b[c]) >> int32(shift[c] & 31)), -end), end)
        for c in range(n):
            value = int32(int32(t[n + c] + b[n + c]) >> int32(shift[n + c] & 31)) + middle
            k[c] = min(max(value, int32(0)), most)


@kernel
def _dequantise(first, last, symbols, steps, per, out):  # type: ignore[no-untyped-def]
    end, half, most = int32(fixed.WIDE_MAX), 1 << (fixed.STEP_BITS - 1), 1 << (14 + fixed.STEP_BITS)
    for p in range(first, last):
        s, t, o = symbols[p], steps[p // per], out[p]
        for c in range(s.size):
            product = int32(min(max(np.int64(s[c]) * np.int64(t[c]), -2 * most), 2 * most))  # type: ignore[arg-type]
            o[c] = min(max(int32(int32(product + half) >> fixed.STEP_BITS), -end), end)


@kernel
def _digits(first, last, values, unit, high, low):  # type: ignore[no-untyped-def]
    end = np.float32(fixed.WIDE_MAX)
    for p in range(first, last):
        v, h, k = values[p], high[p], low[p]
        for c in range(v.size):
            scaled = np.floor(np.float32(v[c]) * unit[c] + np.float32(0.5))
            value = int32(min(max(scaled, -end), end))
            digit = int32(int32(value + fixed.DIGIT // 2) >> 7)
            h[c] = digit
            k[c] = value - int32(digit << 7)


@kernel
def _companded(first, last, values, table, high, low):  # type: ignore[no-untyped-def]
    for p in range(first, last):
        v, h, k = values[p], high[p], low[p]
        for c in range(v.size):
            value = int32(table[abs(v[c])])
            if v[c] < 0:
                value = int32(-value)
            digit = int32(int32(value + fixed.DIGIT // 2) >> 7)
            h[c] = digit
            k[c] = value - int32(digit << 7)


@kernel
def _pixels(first, last, linear, bias, shift, rest, rest_bias, rest_shift, bits, out):  # type: ignore[no-untyped-def]
    most, half = int32(fixed.PIXEL_MAX), int32(128 << fixed.PIXEL_BITS)
    top, more = int32(255 << fixed.PIXEL_BITS), int32((1 << bits) >> 1)
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
                        sum_ = int32(int32(min(max(u, -most), most)) + int32(min(max(v, -most), most)))
                        value = int32(min(max(int32(sum_ + half), int32(0)), top))
                        out[r, y, at + k] = int32(value + more) >> bits
