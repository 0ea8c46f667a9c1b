"""Triton kernels for CUDA.

In torch operations a GPU reads and writes every value a dozen times between two matrix products, in some thousand calls
from Python. Here each method is one kernel, and a whole residual block or a whole step of the prior is one, products
included.

All of it is integers, or integers in float32 below 2^24, so that results are the same bit by bit; `select` compares
them on the device before they are used.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.prior_formats import LINEAR_MAX
from deepsic_codec.model.logistic import INDEX_MAX, INDEX_MIDDLE, MEAN_LEVELS, MEAN_MAX, RATE_BITS
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops.protocol import BlockTensors, RateTables, StepTensors, Sums, SymbolState
from deepsic_codec.model.ops.torch import TorchOps, rows_per_entry
from deepsic_codec.model.schedule import Step

#: Values that a program of an element-wise kernel takes.
BLOCK = 1024
#: Positions that a program of a kernel with products takes, and hidden values or features that it takes at a time.
POSITIONS, HIDDEN = 64, 64
#: Warps of a program with products; with fewer, registers run out.
WARPS = 8
#: Widest blocks and hidden layers of the prior for which registers suffice.
MAX_BLOCK_CHANNELS, STEP_WIDTHS = 256, (32, 64, 128)

# Triton reads globals only as constexpr, and its interpreter does no arithmetic with them.
STREAM_MAX, STEM_MAX = tl.constexpr(int(formats.STREAM_MAX)), tl.constexpr(int(formats.STEM_MAX))
WIDE_MAX, PIXEL_MAX = tl.constexpr(int(formats.WIDE_MAX)), tl.constexpr(int(formats.PIXEL_MAX))
READ_LOW, READ_HIGH = tl.constexpr(int(formats.READ_LOW)), tl.constexpr(int(formats.READ_HIGH))
MODULATION_UNIT = tl.constexpr(2.0**-formats.MODULATION_BITS)
STEP_BITS, STEP_HALF = tl.constexpr(formats.STEP_BITS), tl.constexpr(1 << (formats.STEP_BITS - 1))
PRODUCT_MAX = tl.constexpr(1 << (15 + formats.STEP_BITS))
FEATURE_MAX, TOP_MEAN = tl.constexpr(LINEAR_MAX), tl.constexpr(MEAN_MAX)
TOP_INDEX, MIDDLE_INDEX = tl.constexpr(INDEX_MAX), tl.constexpr(INDEX_MIDDLE)
LEVELS, BITS = tl.constexpr(MEAN_LEVELS), tl.constexpr(RATE_BITS)
HALF_STEP, ONE = tl.constexpr(MEAN_LEVELS // 2), tl.constexpr(1 << RATE_BITS)
GREY, WHITE = tl.constexpr(128 << formats.PIXEL_BITS), tl.constexpr(255 << formats.PIXEL_BITS)


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _indices(size, block: tl.constexpr):
    """Numbers of a program's values, and a mask of those that exist."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return at, at < size


@triton.jit
def _narrow(total, bias, shift, out, size, per, low, high, n: tl.constexpr, block: tl.constexpr):
    at, valid = _indices(size, block)
    row, column = at // n, at % n
    value = tl.load(total + at, valid, 0) + tl.load(bias + row // per * n + column, valid, 0)
    value = value >> tl.load(shift + column, valid, 0)
    tl.store(out + at, _clip(value, low, high).to(tl.int8), valid)


@triton.jit
def _add(stream, total, bias, shift, size, n: tl.constexpr, block: tl.constexpr):
    at, valid = _indices(size, block)
    column = at % n
    moved = (tl.load(total + at, valid, 0) + tl.load(bias + column, valid, 0)) >> tl.load(shift + column, valid, 0)
    value = tl.load(stream + at, valid, 0.0) + moved.to(tl.float32)
    tl.store(stream + at, _clip(value, -STREAM_MAX, STREAM_MAX), valid)


@triton.jit
def _read(values, out, size, unit, half, block: tl.constexpr):
    at, valid = _indices(size, block)
    value = tl.floor(tl.load(values + at, valid, 0.0) * unit + half)
    tl.store(out + at, _clip(value, READ_LOW, READ_HIGH).to(tl.int8), valid)


@triton.jit
def _modulate(total, bias, shift, scale, offset, out, size, per, n: tl.constexpr, block: tl.constexpr):
    at, valid = _indices(size, block)
    row, column = at // n, at % n
    value = (tl.load(total + at, valid, 0) + tl.load(bias + column, valid, 0)) >> tl.load(shift + column, valid, 0)
    value = _clip(value, -STEM_MAX, STEM_MAX).to(tl.float32)
    image = row // per * n + column
    # integers below 2^24, in whatever way they are multiplied and added
    product = value * tl.load(scale + image, valid, 0.0) + tl.load(offset + image, valid, 0.0)
    result = tl.floor(product * MODULATION_UNIT)
    tl.store(out + at, _clip(result, -STREAM_MAX, STREAM_MAX), valid)


@triton.jit
def _number(symbol, halving: tl.constexpr):
    return (symbol + tl.where(symbol > 0, halving, 0)) >> halving


@triton.jit
def _features(symbols, companded, linear, magnitude, size, halving: tl.constexpr, block: tl.constexpr):
    at, valid = _indices(size, block)
    value = tl.load(symbols + at, valid, 0).to(tl.int32)
    tl.store(linear + at, _clip(_number(value, halving), -FEATURE_MAX, FEATURE_MAX).to(tl.int8), valid)
    tl.store(magnitude + at, tl.load(companded + tl.abs(value), valid, 0), valid)


@triton.jit
def _means_and_indices(
    total,
    bias,
    mean_shift,
    index_shift,
    mean,
    index,
    size,
    per,
    n: tl.constexpr,
    block: tl.constexpr,
):
    at, valid = _indices(size, block)
    row, column = at // n, at % n
    source, entry = row * (2 * n) + column, row // per * (2 * n) + column
    value = tl.load(total + source, valid, 0) + tl.load(bias + entry, valid, 0)
    value = value >> tl.load(mean_shift + column, valid, 0)
    tl.store(mean + at, _clip(value, -TOP_MEAN, TOP_MEAN).to(tl.int16), valid)
    value = tl.load(total + source + n, valid, 0) + tl.load(bias + entry + n, valid, 0)
    value = (value >> tl.load(index_shift + column, valid, 0)) + MIDDLE_INDEX
    tl.store(index + at, _clip(value, 0, TOP_INDEX).to(tl.uint8), valid)


@triton.jit
def _dequantise(symbols, steps, out, size, per, n: tl.constexpr, block: tl.constexpr):
    at, valid = _indices(size, block)
    step = tl.load(steps + at // n // per * n + at % n, valid, 0).to(tl.int64)
    product = tl.load(symbols + at, valid, 0).to(tl.int64) * step
    # beyond half of this every product ends in the same clamp
    value = (_clip(product, -PRODUCT_MAX, PRODUCT_MAX).to(tl.int32) + STEP_HALF) >> STEP_BITS
    tl.store(out + at, _clip(value, -WIDE_MAX, WIDE_MAX), valid)


@triton.jit
def _digits(values, unit, high, low, size, n: tl.constexpr, scaled: tl.constexpr, block: tl.constexpr):
    at, valid = _indices(size, block)
    value = tl.load(values + at, valid, 0)
    if scaled:
        real = tl.floor(value.to(tl.float32) * tl.load(unit + at % n, valid, 0.0) + 0.5)
        value = _clip(real, -WIDE_MAX, WIDE_MAX).to(tl.int32)
    digit = (value + 64) >> 7
    tl.store(high + at, digit.to(tl.int8), valid)
    tl.store(low + at, (value - (digit << 7)).to(tl.int8), valid)


@triton.jit
def _pixels(
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
    block: tl.constexpr,
):
    """`height` and `width` count blocks of 16x16 pixels; sample by sample of the images."""
    at, valid = _indices(size, block)
    colour, x, row = at % 3, at // 3 % (16 * width), at // 3 // (16 * width)
    y, image = row % (16 * height), row // (16 * height)
    column = (y % 16 * 16 + x % 16) * 3 + colour
    place = ((image * height + y // 16) * width + x // 16) * 768 + column
    value = tl.load(linear + place, valid, 0) + tl.load(bias + column, valid, 0)
    sum_ = _clip(value >> tl.load(shift + column, valid, 0), -PIXEL_MAX, PIXEL_MAX)
    column = (y % 8 * 8 + x % 8) * 3 + colour
    place = ((image * (2 * height) + y // 8) * (2 * width) + x // 8) * 192 + column
    value = tl.load(rest + place, valid, 0) + tl.load(rest_bias + column, valid, 0)
    sum_ += _clip(value >> tl.load(rest_shift + column, valid, 0), -PIXEL_MAX, PIXEL_MAX)
    tl.store(out + at, _clip(sum_ + GREY, 0, WHITE).to(tl.int16), valid)


@triton.jit
def _block(
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

    `weight` is (9,c), `up` (hidden,c), `down` (c,hidden). `channels` is c rounded up to a power of two,
    `part` the number of hidden values at a time, `per` the number of rows that share biases.
    """
    p, inside = _indices(rows, positions)
    y, x = p // width % height, p % width
    channel = tl.arange(0, channels)
    exists = channel < c
    stored = inside[:, None] & exists[None, :]
    begun = tl.load(weight_bias + channel, exists, 0.0)
    spatial = tl.zeros((positions, channels), tl.float32) + begun[None, :]
    for tap in tl.static_range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        in_image = inside & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        place = (p + dy * width + dx)[:, None] * c + channel[None, :]
        value = tl.load(source + place, in_image[:, None] & exists[None, :], 0.0)
        spatial += value * tl.load(weight + tap * c + channel, exists, 0.0)[None, :]
    narrow = _clip(tl.floor(spatial), READ_LOW, READ_HIGH).to(tl.int8)
    sums = tl.zeros((positions, channels), tl.int32)
    image = p // per
    for first in range(0, hidden, part):
        inner = first + tl.arange(0, part)
        valid = inner < hidden
        both = exists[:, None] & valid[None, :]
        total = tl.dot(narrow, tl.load(up + inner[None, :] * c + channel[:, None], both, 0), out_dtype=tl.int32)
        total += tl.load(up_bias + image[:, None] * hidden + inner[None, :], inside[:, None] & valid[None, :], 0)
        total = total >> tl.load(up_shift + inner, valid, 0)[None, :]
        between = _clip(total, low, high).to(tl.int8)
        matrix = tl.load(down + channel[None, :] * hidden + inner[:, None], valid[:, None] & exists[None, :], 0)
        sums += tl.dot(between, matrix, out_dtype=tl.int32)
    moved = (sums + tl.load(down_bias + channel, exists, 0)[None, :]) >> tl.load(down_shift + channel, exists, 0)[
        None, :
    ]
    place = p[:, None] * c + channel[None, :]
    value = tl.load(source + place, stored, 0.0) + moved.to(tl.float32)
    tl.store(target + place, _clip(value, -STREAM_MAX, STREAM_MAX), stored)


@triton.jit
def _layer(x, matrix, bias, shift, wide: tl.constexpr):
    """Hidden values int8 (positions,wide) through a square matrix, with one bias for all rows."""
    column = tl.arange(0, wide)
    total = tl.dot(x, tl.load(matrix + column[None, :] * wide + column[:, None]), out_dtype=tl.int32)
    total = (total + tl.load(bias + column)[None, :]) >> tl.load(shift + column)[None, :]
    return _clip(total, -128, 127).to(tl.int8)


@triton.jit
def _predict(
    source,
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
    direct_offsets,
    direct_shift,
    mean,
    index,
    size,
    latents,
    start,
    same,
    features: tl.constexpr,
    wide: tl.constexpr,
    n: tl.constexpr,
    outputs: tl.constexpr,
    neighbours: tl.constexpr,
    part: tl.constexpr,
    positions: tl.constexpr,
):
    """A step of the prior: its features gathered, three layers, means and scale indices (P,n).

    `source` (2,plane) holds magnitudes and linear features; feature k of a row is at kinds[k] plane + row latents +
    offsets[k]. `outputs` is n rounded up to a power of two, `neighbours` the number of positions that predict directly,
    at `direct_offsets`. `same` is the quality of all rows, or 0.
    """
    p, inside = _indices(size, positions)
    column = tl.arange(0, outputs)
    exists = column < n
    stored = inside[:, None] & exists[None, :]
    row = tl.load(rows + p, inside, 0) * latents
    which = same - 1 + tl.zeros((positions,), tl.int64)
    if same == 0:
        which = tl.load(quality + p, inside, 1) - 1
    means = tl.load(out_bias + which[:, None] * (2 * n) + column[None, :], stored, 0)
    indices = tl.load(out_bias + which[:, None] * (2 * n) + n + column[None, :], stored, 0)
    if features > 0:
        inner = tl.arange(0, wide)
        hidden = tl.zeros((positions, wide), tl.int32)
        for begin in range(0, features, part):
            k = begin + tl.arange(0, part)
            valid = k < features
            place = tl.load(kinds + k, valid, 0).to(tl.int64) * plane + tl.load(offsets + k, valid, 0)
            x = tl.load(source + row[:, None] + place[None, :], inside[:, None] & valid[None, :], 0)
            matrix = tl.load(first + inner[None, :] * features + k[:, None], valid[:, None], 0)
            hidden += tl.dot(x, matrix, out_dtype=tl.int32)
        hidden += tl.load(first_bias + which[:, None] * wide + inner[None, :])
        narrow = _clip(hidden >> tl.load(first_shift + inner)[None, :], -128, 127).to(tl.int8)
        narrow = _layer(narrow, second, second_bias, second_shift, wide)
        place = column[None, :] * wide + inner[:, None]
        means += tl.dot(narrow, tl.load(out + place, exists[None, :], 0), out_dtype=tl.int32)
        indices += tl.dot(narrow, tl.load(out + n * wide + place, exists[None, :], 0), out_dtype=tl.int32)
    if neighbours > 0:
        direct_sum = tl.zeros((positions, outputs), tl.int32)
        for i in tl.static_range(neighbours):
            place = row + plane + tl.load(direct_offsets + i) + start
            value = tl.load(source + place[:, None] + column[None, :], stored, 0).to(tl.int32)
            direct_sum += value * tl.load(direct + i * n + column, exists, 0)[None, :]
        means += direct_sum << tl.load(direct_shift + column, exists, 0)[None, :]
    at = p[:, None] * n + column[None, :]
    means = means >> tl.load(mean_shift + column, exists, 0)[None, :]
    tl.store(mean + at, _clip(means, -TOP_MEAN, TOP_MEAN).to(tl.int16), stored)
    indices = (indices >> tl.load(index_shift + column, exists, 0)[None, :]) + MIDDLE_INDEX
    tl.store(index + at, _clip(indices, 0, TOP_INDEX).to(tl.uint8), stored)


@triton.jit
def _enter(
    symbols,
    companded,
    linear,
    magnitude,
    rows,
    size,
    latents,
    start,
    halving: tl.constexpr,
    n: tl.constexpr,
    block: tl.constexpr,
):
    at, valid = _indices(size, block)
    value = tl.load(symbols + at, valid, 0).to(tl.int32)
    place = tl.load(rows + at // n, valid, 0) * latents + start + at % n
    tl.store(linear + place, _clip(_number(value, halving), -FEATURE_MAX, FEATURE_MAX).to(tl.int8), valid)
    tl.store(magnitude + place, tl.load(companded + tl.abs(value), valid, 0), valid)


@triton.jit
def _move_symbols(
    symbols,
    latents,
    mean,
    index,
    flat,
    saved,
    price,
    quality,
    out,
    size,
    channels,
    start,
    same,
    distances,
    n: tl.constexpr,
    block: tl.constexpr,
):
    at, valid = _indices(size, block)
    p, column = at // n, at % n
    place = tl.load(flat + p, valid, 0) * channels + start + column
    symbol = tl.load(symbols + place, valid, 0)
    away = symbol * LEVELS - tl.load(mean + at, valid, 0).to(tl.int32)
    which = same - 1 + tl.zeros((block,), tl.int64)
    if same == 0:
        which = tl.load(quality + p, valid, 1) - 1
    error = tl.floor((symbol.to(tl.float32) - tl.load(latents + place, valid, 0.0)) * ONE + 0.5).to(tl.int32)
    towards = tl.where(away > 0, -1, 1)
    cost = tl.load(price + which * channels + start + column, valid, 0)
    cost = (cost * (ONE + 2 * towards * error)) >> BITS
    entry = tl.load(index + at, valid, 0).to(tl.int64) * distances + tl.minimum(tl.abs(away), distances - 1)
    moves = (tl.load(saved + entry, valid, 0) > cost) & (tl.abs(away) > HALF_STEP)
    symbol += tl.where(moves, towards, 0)
    tl.store(symbols + place, symbol, valid & moves)
    tl.store(out + at, symbol, valid)


def _grid(size: int, block: int = BLOCK) -> tuple[int]:
    return (max(1, triton.cdiv(size, block)),)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _power(n: int, minimum: int = 16) -> int:
    return max(minimum, triton.next_power_of_2(n))


class TritonOps(TorchOps):
    """See `protocol.Ops`; tensors are contiguous."""

    def narrow(self, total: Tensor, bias: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
        """See `Ops.narrow`."""
        out, n = torch.empty(total.shape, dtype=torch.int8, device=total.device), total.shape[1]
        per = rows_per_entry(total, bias)
        with _on(total):
            _narrow[_grid(total.numel())](total, bias, shift, out, total.numel(), per, low, high, n=n, block=BLOCK)
        return out

    def add(self, stream: Tensor, total: Tensor, bias: Tensor, shift: Tensor) -> None:
        """See `Ops.add`."""
        with _on(total):
            _add[_grid(total.numel())](stream, total, bias, shift, total.numel(), n=total.shape[1], block=BLOCK)

    def read(self, values: Tensor, bits: int) -> Tensor:
        """See `Ops.read`."""
        values = values.contiguous()
        out = torch.empty(values.shape, dtype=torch.int8, device=values.device)
        with _on(values):
            _read[_grid(out.numel())](values, out, out.numel(), 2.0**-bits, 0.5 if bits else 0.0, block=BLOCK)
        return out

    def modulate(self, total: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """See `Ops.modulate`."""
        out = torch.empty(total.shape, dtype=torch.float32, device=total.device)
        tensors = total, bias, shift, scale, offset, out
        per, n = rows_per_entry(total, scale), total.shape[1]
        with _on(total):
            _modulate[_grid(out.numel())](*tensors, out.numel(), per, n=n, block=BLOCK)
        return out

    def blocks(self, stream: Tensor, blocks: list[BlockTensors], quality: Tensor) -> Tensor:
        """See `Ops.blocks`."""
        if stream.shape[3] > MAX_BLOCK_CHANNELS:
            return super().blocks(stream, blocks, quality)
        for block in blocks:
            stream = self._block(stream, block, quality)
        return stream

    def _block(self, stream: Tensor, block: BlockTensors, quality: Tensor) -> Tensor:
        images, height, width, c = stream.shape
        out, rows = torch.empty_like(stream), images * height * width
        bias = block.up_bias if block.up_bias.ndim == 1 else block.up_bias[quality - 1]
        positions = POSITIONS if c <= 128 else POSITIONS // 2
        with _on(stream):
            _block[_grid(rows, positions)](
                stream,
                out,
                block.taps,
                block.spatial_bias,
                block.up.int8,
                bias,
                block.up_shift,
                block.down.int8,
                block.down_bias,
                block.down_shift,
                rows,
                height,
                width,
                height * width if bias.ndim > 1 else rows,
                *block.bounds,
                c=c,
                hidden=block.up.int8.shape[0],
                channels=_power(c, 32),
                part=HIDDEN,
                positions=positions,
                num_warps=WARPS,
            )
        return out

    def features(self, symbols: Tensor, companded: Tensor, halving: int) -> tuple[Tensor, Tensor]:
        """See `Ops.features`."""
        symbols = symbols.contiguous()
        linear, magnitude = (torch.empty(symbols.shape, dtype=torch.int8, device=symbols.device) for _ in range(2))
        with _on(symbols):
            _features[_grid(symbols.numel())](
                symbols, companded, linear, magnitude, symbols.numel(), halving=halving, block=BLOCK
            )
        return linear, magnitude

    def enter(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor, companded: Tensor) -> None:
        """See `Ops.enter`."""
        linear, magnitude = neighbours.linear, neighbours.magnitude
        size, n = symbols.numel(), symbols.shape[1]
        with _on(symbols):
            _enter[_grid(size)](
                symbols,
                companded,
                linear,
                magnitude,
                rows,
                size,
                linear.shape[1],
                step.start,
                halving=neighbours.halving,
                n=n,
                block=BLOCK,
            )

    def predict(
        self, neighbours: Neighbours, step: Step, rows: Tensor, tensors: StepTensors, quality: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.predict`."""
        hidden, direct, unused = tensors.hidden, tensors.direct, tensors.out_bias
        width = 128 if hidden is None else hidden.second.int8.shape[0]
        if width not in STEP_WIDTHS:
            return super().predict(neighbours, step, rows, tensors, quality)
        layers = [unused] * 7 if hidden is None else [t if isinstance(t, Tensor) else t.int8 for t in hidden]
        weight, shift = (unused, unused) if direct is None else direct
        at, both = neighbours.context_offsets(step), neighbours.both
        size, count = len(rows), step.count
        mean = torch.empty((size, count), dtype=torch.int16, device=both.device)
        index = torch.empty((size, count), dtype=torch.uint8, device=both.device)
        same, qualities = (quality, rows) if isinstance(quality, int) else (0, quality)
        with _on(both):
            _predict[_grid(size, POSITIONS)](
                both,
                both[0].numel(),
                at.kinds,
                at.offsets,
                rows,
                qualities,
                *layers,
                tensors.out_bias,
                tensors.mean_shift,
                tensors.index_shift,
                weight,
                at.direct,
                shift,
                mean,
                index,
                size,
                both.shape[2],
                step.start,
                same,
                features=len(at.kinds),
                wide=width,
                n=count,
                outputs=_power(count),
                neighbours=len(at.direct),
                part=HIDDEN,
                positions=POSITIONS,
                num_warps=WARPS,
            )
        return mean, index

    def means_and_indices(
        self, total: Tensor, bias: Tensor, mean_shift: Tensor, index_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TorchOps.means_and_indices`."""
        n = total.shape[1] // 2
        mean = torch.empty((len(total), n), dtype=torch.int16, device=total.device)
        index = torch.empty((len(total), n), dtype=torch.uint8, device=total.device)
        tensors, per = (total, bias, mean_shift, index_shift, mean, index), rows_per_entry(total, bias)
        with _on(total):
            _means_and_indices[_grid(mean.numel())](*tensors, mean.numel(), per, n=n, block=BLOCK)
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
        """See `Ops.move_symbols`."""
        padded, flat = rows
        mean, index = predicted
        same, qualities = (quality, flat) if isinstance(quality, int) else (0, quality)
        out = torch.empty(mean.shape, dtype=torch.int32, device=mean.device)
        with _on(out):
            _move_symbols[_grid(out.numel())](
                state.symbols,
                state.latents,
                mean,
                index,
                flat,
                tables.saved,
                tables.price,
                qualities,
                out,
                out.numel(),
                state.symbols.shape[1],
                step.start,
                same,
                tables.saved.shape[1],
                n=mean.shape[1],
                block=BLOCK,
            )
        self.enter(state.neighbours, step, padded, out, companded)

    def dequantise(self, symbols: Tensor, steps: Tensor) -> Tensor:
        """See `Ops.dequantise`."""
        symbols = symbols.contiguous()
        out = torch.empty(symbols.shape, dtype=torch.int32, device=symbols.device)
        per, n = rows_per_entry(symbols, steps), symbols.shape[1]
        with _on(symbols):
            _dequantise[_grid(out.numel())](symbols, steps, out, out.numel(), per, n=n, block=BLOCK)
        return out

    def digits(self, values: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Ops.digits`."""
        high, low = (torch.empty(values.shape, dtype=torch.int8, device=values.device) for _ in range(2))
        size, n, scaled = values.numel(), values.shape[1], unit is not None
        with _on(values):
            _digits[_grid(size)](
                values, values if unit is None else unit, high, low, size, n=n, scaled=scaled, block=BLOCK
            )
        return high, low

    def pixels(self, linear: Sums, rest: Sums, grid: tuple[int, int, int]) -> Tensor:
        """See `Ops.pixels`."""
        n, h, w = grid
        out = torch.empty((n, 16 * h, 16 * w, 3), dtype=torch.int16, device=linear.total.device)
        with _on(out):
            _pixels[_grid(out.numel())](*linear, *rest, out, out.numel(), h, w, block=BLOCK)
        return out
