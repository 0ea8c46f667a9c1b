"""What :class:`deepsic_codec.model.ops.tensor_ops.Tensors` says, as kernels for CUDA (Triton).

Operation by operation, a GPU reads and writes every value a dozen times between two products
of matrices, and is told to do so by some thousand calls from Python. Here a function is one
kernel, and a whole residual block or a whole pass of the prior is one, products included.

All of it is integers, or integers in float32 below 2^24, so results are the same bit by bit;
:mod:`deepsic_codec.model.ops.select` tries that on the device at hand before anything relies on it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepsic_codec.model.exact import fixed
from deepsic_codec.model.ops.tensor_ops import Contexts, PassTensors, Residual, Sums, Tensors

#: Values that a program of an elementwise kernel takes.
BLOCK = 1024
#: Positions that a program of a kernel with products takes, and hidden values or features at a time.
POSITIONS, HIDDEN = 64, 64
#: Of these programs: with less, registers run out.
WARPS = 8

# Triton wants constants as such, and its interpreter does no arithmetic with them.
STREAM_MAX, WIDE_MAX, PIXEL_MAX = (tl.constexpr(int(v)) for v in (fixed.STREAM_MAX, fixed.WIDE_MAX, fixed.PIXEL_MAX))
READ_LOW, READ_HIGH = tl.constexpr(int(fixed.READ_LOW)), tl.constexpr(int(fixed.READ_HIGH))
MODULATION_UNIT = tl.constexpr(2.0**-fixed.MODULATION_BITS)
STEP_BITS, STEP_HALF = tl.constexpr(fixed.STEP_BITS), tl.constexpr(1 << (fixed.STEP_BITS - 1))
STEP_MOST = tl.constexpr(1 << (15 + fixed.STEP_BITS))
PIXEL_BITS, PIXEL_HALF = tl.constexpr(fixed.PIXEL_BITS), tl.constexpr(1 << (fixed.PIXEL_BITS - 1))
GREY, WHITE = tl.constexpr(128 << fixed.PIXEL_BITS), tl.constexpr(255 << fixed.PIXEL_BITS)


@triton.jit
def _clip(x, low, high):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _places(size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of a program's values, and which of them there are."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return at, at < size


@triton.jit
def _narrow(total, bias, shift, out, size, per, low, high, n: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501
    at, there = _places(size, block)
    row, column = at // n, at % n
    value = tl.load(total + at, there, 0) + tl.load(bias + row // per * n + column, there, 0)
    value = value >> tl.load(shift + column, there, 0)
    tl.store(out + at, _clip(value, low, high).to(tl.int8), there)


@triton.jit
def _add(stream, total, bias, shift, size, n: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at, there = _places(size, block)
    column = at % n
    moved = (tl.load(total + at, there, 0) + tl.load(bias + column, there, 0)) >> tl.load(shift + column, there, 0)
    value = tl.load(stream + at, there, 0.0) + moved.to(tl.float32)
    tl.store(stream + at, _clip(value, -STREAM_MAX, STREAM_MAX), there)


@triton.jit
def _read(values, out, size, unit, half, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at, there = _places(size, block)
    value = tl.floor(tl.load(values + at, there, 0.0) * unit + half)
    tl.store(out + at, _clip(value, READ_LOW, READ_HIGH).to(tl.int8), there)


@triton.jit
def _modulate(total, bias, shift, scale, offset, out, size, per, most, n: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501
    at, there = _places(size, block)
    row, column = at // n, at % n
    value = (tl.load(total + at, there, 0) + tl.load(bias + column, there, 0)) >> tl.load(shift + column, there, 0)
    value = _clip(value, -most, most).to(tl.float32)
    image = row // per * n + column
    # integers below 2^24, in whatever way they are multiplied and added
    found = value * tl.load(scale + image, there, 0.0) + tl.load(offset + image, there, 0.0)
    found = tl.floor(found * MODULATION_UNIT)
    tl.store(out + at, _clip(found, -STREAM_MAX, STREAM_MAX), there)


@triton.jit
def _contexts(symbols, companded, linear, magnitude, size, most, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at, there = _places(size, block)
    value = tl.load(symbols + at, there, 0).to(tl.int32)
    tl.store(linear + at, _clip(value, -most, most).to(tl.int8), there)
    tl.store(magnitude + at, tl.load(companded + tl.abs(value), there, 0), there)


@triton.jit
def _expected(  # type: ignore[no-untyped-def]
    total,
    bias,
    mean_shift,
    index_shift,
    mean,
    index,
    size,
    per,
    mean_max,
    index_max,
    n: tl.constexpr,
    block: tl.constexpr,
):
    at, there = _places(size, block)
    row, column = at // n, at % n
    own, its = row * (2 * n) + column, row // per * (2 * n) + column
    value = tl.load(total + own, there, 0) + tl.load(bias + its, there, 0)
    value = value >> tl.load(mean_shift + column, there, 0)
    tl.store(mean + at, _clip(value, -mean_max, mean_max).to(tl.int16), there)
    value = tl.load(total + own + n, there, 0) + tl.load(bias + its + n, there, 0)
    value = (value >> tl.load(index_shift + column, there, 0)) + (index_max + 4) // 2
    tl.store(index + at, _clip(value, 0, index_max).to(tl.uint8), there)


@triton.jit
def _dequantise(symbols, steps, out, size, per, n: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at, there = _places(size, block)
    step = tl.load(steps + at // n // per * n + at % n, there, 0).to(tl.int64)
    product = tl.load(symbols + at, there, 0).to(tl.int64) * step
    # beyond half of this every product ends in the same clamp
    value = (_clip(product, -STEP_MOST, STEP_MOST).to(tl.int32) + STEP_HALF) >> STEP_BITS
    tl.store(out + at, _clip(value, -WIDE_MAX, WIDE_MAX), there)


@triton.jit
def _digits(values, unit, high, low, size, n: tl.constexpr, scaled: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501
    at, there = _places(size, block)
    value = tl.load(values + at, there, 0)
    if scaled:
        real = tl.floor(value.to(tl.float32) * tl.load(unit + at % n, there, 0.0) + 0.5)
        value = _clip(real, -WIDE_MAX, WIDE_MAX).to(tl.int32)
    digit = (value + 64) >> 7
    tl.store(high + at, digit.to(tl.int8), there)
    tl.store(low + at, (value - (digit << 7)).to(tl.int8), there)


@triton.jit
def _pixels(  # type: ignore[no-untyped-def]
    linear,
    bias,
    shift,
    rest,
    rest_bias,
    rest_shift,
    out,
    size,
    height,
    width,
    fine: tl.constexpr,
    block: tl.constexpr,
):
    """``height`` and ``width`` count blocks of 16x16 pixels; sample by sample of the images."""
    at, there = _places(size, block)
    colour, x, row = at % 3, at // 3 % (16 * width), at // 3 // (16 * width)
    y, image = row % (16 * height), row // (16 * height)
    column = (y % 16 * 16 + x % 16) * 3 + colour
    place = ((image * height + y // 16) * width + x // 16) * 768 + column
    value = tl.load(linear + place, there, 0) + tl.load(bias + column, there, 0)
    sum_ = _clip(value >> tl.load(shift + column, there, 0), -PIXEL_MAX, PIXEL_MAX)
    column = (y % 8 * 8 + x % 8) * 3 + colour
    place = ((image * (2 * height) + y // 8) * (2 * width) + x // 8) * 192 + column
    value = tl.load(rest + place, there, 0) + tl.load(rest_bias + column, there, 0)
    sum_ += _clip(value >> tl.load(rest_shift + column, there, 0), -PIXEL_MAX, PIXEL_MAX)
    value = _clip(sum_ + GREY, 0, WHITE)
    if fine:
        tl.store(out + at, value.to(tl.int16), there)
    else:
        tl.store(out + at, ((value + PIXEL_HALF) >> PIXEL_BITS).to(tl.uint8), there)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    source,
    target,
    weight,
    weight_bias,
    up,
    up_bias,
    up_shift,
    down,
    down_bias,
    down_shift,
    rows,
    height,
    width,
    per,
    low,
    high,
    c: tl.constexpr,
    hidden: tl.constexpr,
    channels: tl.constexpr,
    part: tl.constexpr,
    positions: tl.constexpr,
):
    """A residual block on streams (P,c): 3x3 by channel, c -> hidden -> c, and the sum.

    ``weight`` is (9,c), ``up`` (hidden,c), ``down`` (c,hidden); ``channels`` is c brought up to a power
    of two, ``part`` how many hidden values are there at a time, ``per`` how many rows share biases.
    """
    p, inside = _places(rows, positions)
    y, x = p // width % height, p % width
    channel = tl.arange(0, channels)
    real = channel < c
    own = inside[:, None] & real[None, :]
    begun = tl.load(weight_bias + channel, real, 0.0)
    spatial = tl.zeros((positions, channels), tl.float32) + begun[None, :]
    for tap in tl.static_range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        seen = inside & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        place = (p + dy * width + dx)[:, None] * c + channel[None, :]
        value = tl.load(source + place, seen[:, None] & real[None, :], 0.0)
        spatial += value * tl.load(weight + tap * c + channel, real, 0.0)[None, :]
    narrow = _clip(tl.floor(spatial), READ_LOW, READ_HIGH).to(tl.int8)
    sums = tl.zeros((positions, channels), tl.int32)
    image = p // per
    for first in range(0, hidden, part):
        inner = first + tl.arange(0, part)
        known = inner < hidden
        both = real[:, None] & known[None, :]
        total = tl.dot(narrow, tl.load(up + inner[None, :] * c + channel[:, None], both, 0), out_dtype=tl.int32)
        total += tl.load(up_bias + image[:, None] * hidden + inner[None, :], inside[:, None] & known[None, :], 0)
        total = total >> tl.load(up_shift + inner, known, 0)[None, :]
        between = _clip(total, low, high).to(tl.int8)
        matrix = tl.load(down + channel[None, :] * hidden + inner[:, None], known[:, None] & real[None, :], 0)
        sums += tl.dot(between, matrix, out_dtype=tl.int32)
    moved = (sums + tl.load(down_bias + channel, real, 0)[None, :]) >> tl.load(down_shift + channel, real, 0)[None, :]
    place = p[:, None] * c + channel[None, :]
    value = tl.load(source + place, own, 0.0) + moved.to(tl.float32)
    tl.store(target + place, _clip(value, -STREAM_MAX, STREAM_MAX), own)


@triton.jit
def _layer(x, matrix, bias, shift, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """Hidden values int8 (positions,wide) of such, by a square matrix, one bias for all rows."""
    column = tl.arange(0, wide)
    total = tl.dot(x, tl.load(matrix + column[None, :] * wide + column[:, None]), out_dtype=tl.int32)
    total = (total + tl.load(bias + column)[None, :]) >> tl.load(shift + column)[None, :]
    return _clip(total, -128, 127).to(tl.int8)


@triton.jit
def _predict(  # type: ignore[no-untyped-def]
    seen,
    plane,
    kinds,
    offsets,
    rows,
    quality,
    first,
    first_bias,
    first_shift,
    second,
    second_bias,
    second_shift,
    out,
    out_bias,
    mean_shift,
    index_shift,
    direct,
    around,
    direct_shift,
    mean,
    index,
    size,
    latents,
    start,
    same,
    mean_max,
    index_max,
    features: tl.constexpr,
    wide: tl.constexpr,
    n: tl.constexpr,
    outputs: tl.constexpr,
    others: tl.constexpr,
    part: tl.constexpr,
    positions: tl.constexpr,
):
    """A pass of the prior: its features gathered, three layers, means and scale indices (P,n).

    ``seen`` (2,plane) holds magnitudes and linear features; feature k of a row is at kinds[k] plane +
    row latents + offsets[k].  ``outputs`` is n brought up to a power of two, ``others`` how many
    neighbours predict directly, at ``around``.  ``same`` is the quality of all rows, or 0.
    """
    p, inside = _places(size, positions)
    column = tl.arange(0, outputs)
    real = column < n
    own = inside[:, None] & real[None, :]
    row = tl.load(rows + p, inside, 0) * latents
    which = same - 1 + tl.zeros((positions,), tl.int64)
    if same == 0:
        which = tl.load(quality + p, inside, 1) - 1
    means = tl.load(out_bias + which[:, None] * (2 * n) + column[None, :], own, 0)
    indices = tl.load(out_bias + which[:, None] * (2 * n) + n + column[None, :], own, 0)
    if features > 0:
        inner = tl.arange(0, wide)
        hidden = tl.zeros((positions, wide), tl.int32)
        for begin in range(0, features, part):
            k = begin + tl.arange(0, part)
            known = k < features
            place = tl.load(kinds + k, known, 0).to(tl.int64) * plane + tl.load(offsets + k, known, 0)
            x = tl.load(seen + row[:, None] + place[None, :], inside[:, None] & known[None, :], 0)
            matrix = tl.load(first + inner[None, :] * features + k[:, None], known[:, None], 0)
            hidden += tl.dot(x, matrix, out_dtype=tl.int32)
        hidden += tl.load(first_bias + which[:, None] * wide + inner[None, :])
        narrow = _clip(hidden >> tl.load(first_shift + inner)[None, :], -128, 127).to(tl.int8)
        narrow = _layer(narrow, second, second_bias, second_shift, wide)
        place = column[None, :] * wide + inner[:, None]
        means += tl.dot(narrow, tl.load(out + place, real[None, :], 0), out_dtype=tl.int32)
        indices += tl.dot(narrow, tl.load(out + n * wide + place, real[None, :], 0), out_dtype=tl.int32)
    if others > 0:
        told = tl.zeros((positions, outputs), tl.int32)
        for i in tl.static_range(others):
            place = row + plane + tl.load(around + i) + start
            value = tl.load(seen + place[:, None] + column[None, :], own, 0).to(tl.int32)
            told += value * tl.load(direct + i * n + column, real, 0)[None, :]
        means += told << tl.load(direct_shift + column, real, 0)[None, :]
    at = p[:, None] * n + column[None, :]
    means = means >> tl.load(mean_shift + column, real, 0)[None, :]
    tl.store(mean + at, _clip(means, -mean_max, mean_max).to(tl.int16), own)
    indices = (indices >> tl.load(index_shift + column, real, 0)[None, :]) + (index_max + 4) // 2
    tl.store(index + at, _clip(indices, 0, index_max).to(tl.uint8), own)


@triton.jit
def _enter(
    symbols, companded, linear, magnitude, rows, size, latents, start, most, n: tl.constexpr, block: tl.constexpr
):  # type: ignore[no-untyped-def]  # noqa: E501
    at, there = _places(size, block)
    value = tl.load(symbols + at, there, 0).to(tl.int32)
    place = tl.load(rows + at // n, there, 0) * latents + start + at % n
    tl.store(linear + place, _clip(value, -most, most).to(tl.int8), there)
    tl.store(magnitude + place, tl.load(companded + tl.abs(value), there, 0), there)


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    chosen,
    exact,
    mean,
    index,
    flat,
    saved,
    price,
    quality,
    out,
    size,
    latents,
    start,
    same,
    distances,
    n: tl.constexpr,
    levels: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
):
    at, there = _places(size, block)
    p, column = at // n, at % n
    place = tl.load(flat + p, there, 0) * latents + start + column
    symbol = tl.load(chosen + place, there, 0)
    away = symbol * levels - tl.load(mean + at, there, 0).to(tl.int32)
    which = same - 1 + tl.zeros((block,), tl.int64)
    if same == 0:
        which = tl.load(quality + p, there, 1) - 1
    error = tl.floor((symbol.to(tl.float32) - tl.load(exact + place, there, 0.0)) * (1 << bits) + 0.5).to(tl.int32)
    towards = tl.where(away > 0, -1, 1)
    cost = tl.load(price + which * latents + start + column, there, 0)
    cost = (cost * ((1 << bits) + 2 * towards * error)) >> bits
    entry = tl.load(index + at, there, 0).to(tl.int64) * distances + tl.minimum(tl.abs(away), distances - 1)
    worth = (tl.load(saved + entry, there, 0) > cost) & (tl.abs(away) > levels // 2)
    symbol += tl.where(worth, towards, 0)
    tl.store(chosen + place, symbol, there & worth)
    tl.store(out + at, symbol, there)


def _grid(size: int, block: int = BLOCK) -> tuple[int]:
    return (max(1, triton.cdiv(size, block)),)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


class Fused(Tensors):
    """Of tensors on CUDA. Everything that is given is contiguous."""

    @staticmethod
    def narrow(total: Tensor, bias: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
        """See :meth:`Tensors.narrow`."""
        out, n = torch.empty(total.shape, dtype=torch.int8, device=total.device), total.shape[1]
        with _on(total):
            _narrow[_grid(total.numel())](
                total, bias, shift, out, total.numel(), _per(total, bias), low, high, n=n, block=BLOCK
            )
        return out

    @staticmethod
    def add(stream: Tensor, total: Tensor, bias: Tensor, shift: Tensor) -> None:
        """See :meth:`Tensors.add`."""
        with _on(total):
            _add[_grid(total.numel())](stream, total, bias, shift, total.numel(), n=total.shape[1], block=BLOCK)

    @staticmethod
    def read(values: Tensor, bits: int) -> Tensor:
        """See :meth:`Tensors.read`."""
        values = values.contiguous()
        out = torch.empty(values.shape, dtype=torch.int8, device=values.device)
        with _on(values):
            _read[_grid(out.numel())](values, out, out.numel(), 2.0**-bits, 0.5 if bits else 0.0, block=BLOCK)
        return out

    @staticmethod
    def modulate(total: Tensor, bias: Tensor, shift: Tensor, most: int, scale: Tensor, offset: Tensor) -> Tensor:
        """See :meth:`Tensors.modulate`."""
        out = torch.empty(total.shape, dtype=torch.float32, device=total.device)
        with _on(total):
            _modulate[_grid(out.numel())](
                total,
                bias,
                shift,
                scale,
                offset,
                out,
                out.numel(),
                _per(total, scale),
                most,
                n=total.shape[1],
                block=BLOCK,
            )
        return out

    @staticmethod
    def contexts(symbols: Tensor, companded: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Tensors.contexts`."""
        symbols = symbols.contiguous()
        linear, magnitude = (torch.empty(symbols.shape, dtype=torch.int8, device=symbols.device) for _ in range(2))
        with _on(symbols):
            _contexts[_grid(symbols.numel())](symbols, companded, linear, magnitude, symbols.numel(), most, block=BLOCK)
        return linear, magnitude

    @staticmethod
    def expected(
        total: Tensor, bias: Tensor, mean_shift: Tensor, index_shift: Tensor, mean_max: int, index_max: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Tensors.expected`."""
        shape, n = (len(total), total.shape[1] // 2), total.shape[1] // 2
        mean = torch.empty(shape, dtype=torch.int16, device=total.device)
        index = torch.empty(shape, dtype=torch.uint8, device=total.device)
        with _on(total):
            _expected[_grid(mean.numel())](
                total,
                bias,
                mean_shift,
                index_shift,
                mean,
                index,
                mean.numel(),
                _per(total, bias),
                mean_max,
                index_max,
                n=n,
                block=BLOCK,
            )
        return mean, index

    @staticmethod
    def dequantise(symbols: Tensor, steps: Tensor) -> Tensor:
        """See :meth:`Tensors.dequantise`."""
        symbols = symbols.contiguous()
        out = torch.empty(symbols.shape, dtype=torch.int32, device=symbols.device)
        with _on(symbols):
            _dequantise[_grid(out.numel())](
                symbols, steps, out, out.numel(), _per(symbols, steps), n=symbols.shape[1], block=BLOCK
            )
        return out

    @staticmethod
    def digits(values: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Tensors.digits`."""
        high, low = (torch.empty(values.shape, dtype=torch.int8, device=values.device) for _ in range(2))
        with _on(values):
            _digits[_grid(values.numel())](
                values,
                values if unit is None else unit,
                high,
                low,
                values.numel(),
                n=values.shape[1],
                scaled=unit is not None,
                block=BLOCK,
            )
        return high, low

    @staticmethod
    def pixels(linear: Sums, rest: Sums, grid: tuple[int, int, int], fine: bool) -> Tensor:
        """See :meth:`Tensors.pixels`."""
        n, h, w = grid
        kind, device = torch.int16 if fine else torch.uint8, linear.total.device
        out = torch.empty((n, 16 * h, 16 * w, 3), dtype=kind, device=device)
        with _on(out):
            _pixels[_grid(out.numel())](*linear, *rest, out, out.numel(), h, w, fine=fine, block=BLOCK)
        return out

    @staticmethod
    def block(stream: Tensor, parts: Residual, image: Tensor | None) -> Tensor:
        """Run a residual block: 3x3 by channel, c -> hidden -> c, and the sum.

        Parameters
        ----------
        stream : Tensor
            Integers in float32 (N,h,w,c); not changed.
        parts : Residual
            Of the block.
        image : Tensor, optional
            int64 (N,), each image's row of the biases before hidden values, if they depend on quality.

        Returns
        -------
        Tensor
            As the stream.
        """
        images, height, width, c = stream.shape
        out, rows = torch.empty_like(stream), images * height * width
        bias = parts.up_bias if image is None else parts.up_bias[image]
        hidden = parts.up.shape[0]
        positions = POSITIONS if c <= 128 else POSITIONS // 2
        with _on(stream):
            _block[_grid(rows, positions)](
                stream,
                out,
                parts.taps,
                parts.spatial_bias,
                parts.up,
                bias,
                parts.up_shift,
                parts.down,
                parts.down_bias,
                parts.down_shift,
                rows,
                height,
                width,
                height * width if bias.ndim > 1 else rows,
                *parts.bounds,
                c=c,
                hidden=hidden,
                channels=_power(c, 32),
                part=HIDDEN,
                positions=positions,
                num_warps=WARPS,
            )
        return out

    @staticmethod
    def predict(
        seen: Tensor,
        rows: Tensor,
        own: tuple[int, int],
        at: Contexts,
        part: PassTensors,
        quality: Tensor | int,
        mean_max: int,
        index_max: int,
    ) -> tuple[Tensor, Tensor]:
        """A pass of the prior: means int16 and scale indices uint8 (P,count).

        Parameters
        ----------
        seen : Tensor
            Features int8 (2,rows,C): magnitudes, then linear ones.
        rows : Tensor
            int64 (P,), which of them are the positions of the pass.
        own : tuple of int
            First channel, and how many.
        at, part : Contexts, PassTensors
            Of the pass.
        quality : Tensor or int
            Whole qualities of the positions, int64 (P,), or that of all.
        mean_max, index_max : int
            Bounds of what is returned.
        """
        (start, count), size, latents = own, len(rows), seen.shape[2]
        mean = torch.empty((size, count), dtype=torch.int16, device=seen.device)
        index = torch.empty((size, count), dtype=torch.uint8, device=seen.device)
        nothing = part.out_bias
        given = [nothing if t is None else t for t in part]
        same, of_rows = (quality, rows) if isinstance(quality, int) else (0, quality)
        with _on(seen):
            _predict[_grid(size, POSITIONS)](
                seen,
                seen[0].numel(),
                at.kinds,
                at.offsets,
                rows,
                of_rows,
                *given[:8],
                *given[8:11],
                at.around,
                given[11],
                mean,
                index,
                size,
                latents,
                start,
                same,
                mean_max,
                index_max,
                features=len(at.kinds),
                wide=128 if part.second is None else part.second.shape[0],
                n=count,
                outputs=_power(count),
                others=len(at.around),
                part=HIDDEN,
                positions=POSITIONS,
                num_warps=WARPS,
            )
        return mean, index

    @staticmethod
    def enter(
        symbols: Tensor, companded: Tensor, linear: Tensor, magnitude: Tensor, rows: Tensor, start: int, most: int
    ) -> None:
        """See :meth:`Tensors.enter`."""
        with _on(symbols):
            _enter[_grid(symbols.numel())](
                symbols,
                companded,
                linear,
                magnitude,
                rows,
                symbols.numel(),
                linear.shape[1],
                start,
                most,
                n=symbols.shape[1],
                block=BLOCK,
            )

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
        """See :meth:`Tensors.move`."""
        mean, index = predicted
        same, of_rows = (quality, flat) if isinstance(quality, int) else (0, quality)
        out = torch.empty(mean.shape, dtype=torch.int32, device=mean.device)
        with _on(chosen):
            _move[_grid(out.numel())](
                chosen,
                exact,
                mean,
                index,
                flat,
                saved,
                price,
                of_rows,
                out,
                out.numel(),
                chosen.shape[1],
                start,
                same,
                saved.shape[1],
                n=mean.shape[1],
                levels=levels,
                bits=bits,
                block=BLOCK,
            )
        return out


def _per(total: Tensor, rows: Tensor) -> int:
    """How many rows share one of (B,N)."""
    return len(total) // len(rows) if rows.ndim > 1 else max(1, len(total))
