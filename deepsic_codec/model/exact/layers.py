"""Layers of the integer transforms: integers in, integers out (`docs/integer-transforms.md`).

Images and latents lie channels last, (N,h,w,C), so that a 1x1 convolution is one matrix product.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.matrix import Matrix
from deepsic_codec.model.ops.protocol import BlockTensors, Sums
from deepsic_codec.model.ops.select import ops_for
from deepsic_codec.model.ops.torch import shifted

Tensors = Mapping[str, Tensor]


class Layer:
    """A 1x1 convolution as matrix product, with the bias, shift and clamp that follow it.

    Its tensors in a model file are `<name>.weight`, `<name>.bias` and `<name>.shift`. Hidden values 0..255 are stored
    as -128..127.
    """

    def __init__(self, tensors: Tensors, name: str, form: formats.Format, device: torch.device) -> None:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"].to(torch.int32)
        weight = weight.reshape(weight.shape[0], -1).to(torch.int32)
        shift = tensors[f"{name}.shift"].to(torch.int32)
        self.form = form
        low, high = int(form.low), int(form.high)
        if form.high == formats.HIDDEN_HIGH:  # writes hidden values
            bias = bias + (formats.READ_LOW << shift)
            low, high = low + formats.READ_LOW, high + formats.READ_LOW
        self.bounds = low, high
        if form.in_max == formats.HIDDEN_HIGH:  # reads hidden values
            bias = bias - formats.READ_LOW * weight.sum(1, dtype=torch.int32)
        if form.wide_weight:
            high_digits = (weight + formats.DIGIT // 2) >> 7
            low_digits = weight - (high_digits << 7)
            self.high = Matrix(high_digits, device)
            if form.wide_input:
                # without the product of both low digits, in units of 128
                self.both = Matrix(torch.cat([low_digits, high_digits], 1), device)
                shift, bias = shift - 7, bias >> 7
            else:
                self.both = Matrix(torch.cat([high_digits, low_digits], 0), device)
        else:
            self.matrix = Matrix(weight, device)
        self.bias, self.shift = bias.to(device), shift.to(device)

    def forward(self, rows: Tensor) -> Tensor:
        """int8 (P,K) -> int32 (P,N) in the range of the format."""
        return self._finish(self.matrix.matmul(rows))

    def forward_pixels(self, grey: Tensor, rest: Tensor | None) -> Tensor:
        """Grey levels less 128 and, if given, 64ths, int8 (P,K) each -> int32 (P,N); needs wide weights."""
        n = self.bias.shape[0]
        both = self.both.matmul(grey)
        total = both[:, :n].mul(formats.DIGIT).add_(both[:, n:])
        if rest is not None:
            total.add_(self.high.matmul(rest), alpha=formats.DIGIT >> formats.PIXEL_BITS)
        return self._finish(total)

    def products(self, high: Tensor, low: Tensor | None = None) -> Tensor:
        """Sums of products int32 (P,N) of int8 (P,K), or of their high and low digits; without bias."""
        if low is None:
            return self.matrix.matmul(high)
        rest = self.both.matmul(torch.cat([high, low], 1)) if self.form.wide_weight else self.matrix.matmul(low)
        matrix = self.high if self.form.wide_weight else self.matrix
        return matrix.matmul(high).mul_(formats.DIGIT).add_(rest)

    def sums(self, high: Tensor, low: Tensor | None = None) -> Sums:
        """`products` with the bias and shift that follow."""
        return Sums(self.products(high, low), self.bias, self.shift)

    def _finish(self, total: Tensor) -> Tensor:
        return shifted(total, self.bias, self.shift).clamp_(*self.bounds)


class Blocks:
    """The residual blocks `<name>.0`, `<name>.1`, ... of a stream."""

    def __init__(self, tensors: Tensors, name: str, count: int, device: torch.device) -> None:
        self.ops = ops_for(device)
        self.blocks: list[BlockTensors] = []
        for i in range(count):
            at = f"{name}.{i}"
            # a weight's unit is a power of two, and so are the units of the sums: float32 holds both exactly
            weight, bias, shift = (
                tensors[f"{at}.spatial.{part}"].to(torch.int32) for part in ("weight", "bias", "shift")
            )
            unit = torch.exp2(-shift.float())
            weight = (weight.float() * unit[:, None, None, None]).to(device)
            bias = (bias.float() * unit).to(device)
            up, down = (Layer(tensors, f"{at}.{n}", formats.BLOCK_LAYERS[n], device) for n in ("up", "down"))
            taps = weight.flatten(1).t().contiguous()
            matrices = (up.matrix, up.bias, up.shift, down.matrix, down.bias, down.shift)
            self.blocks.append(BlockTensors(weight, taps, bias, *matrices, up.bounds))

    def __call__(self, stream: Tensor, quality: Tensor) -> Tensor:
        """Stream (N,h,w,C), integers in float32, which may be changed in place; whole qualities (N,)."""
        return self.ops.blocks(stream, self.blocks, quality)


class Modulation:
    """Factor and offset per channel and whole quality, `<name>.scale` and `<name>.offset`; begins a stream.

    A pixel shuffle follows the stem, the layer before it, if the stem has more outputs than there are factors.
    """

    def __init__(self, tensors: Tensors, name: str, stem: Layer, device: torch.device) -> None:
        self.stem, self.ops = stem, ops_for(device)
        scale, offset = (tensors[f"{name}.{part}"].float().to(device) for part in ("scale", "offset"))
        repeats = stem.bias.shape[0] // scale.shape[1]
        self.scale, self.offset = scale.repeat(1, repeats), offset.repeat(1, repeats)

    def __call__(self, quality: Tensor, high: Tensor, low: Tensor | None = None) -> Tensor:
        """Input of the stem, int8 (P,K) or its digits, at whole qualities (images,) -> stream (P,N)."""
        row = quality - 1
        return self.ops.modulate(*self.stem.sums(high, low), self.scale[row], self.offset[row])


def read(stream: Tensor) -> Tensor:
    """The stream (..., C) in the 8 bits that 1x1 convolutions read."""
    rows = ops_for(stream.device).read(rows_of(stream), formats.STREAM_BITS - formats.READ_BITS)
    return rows.view(stream.shape)


def rows_of(x: Tensor) -> Tensor:
    """(..., C) -> (P,C)."""
    return x.reshape(-1, x.shape[-1])
