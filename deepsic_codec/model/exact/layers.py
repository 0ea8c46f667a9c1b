"""The transforms as the format defines them: integers in, integers out (``docs/model.md``).

Images and latents lie channels last, (N,h,w,C), so that a 1x1 convolution is one matrix
product.  Weights of layers beside a pixel shuffle are reordered once, when a model is
loaded, so that shuffling moves whole runs of memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepsic_codec.model.exact import fixed
from deepsic_codec.model.exact.matrix import Matrix, depthwise_on
from deepsic_codec.model.ops.select import fused_on, passes_on
from deepsic_codec.model.ops.tensor_ops import Residual, Sums, shifted

Tensors = Mapping[str, Tensor]
#: Channels of the largest blocks that there is a kernel for.
FUSED_CHANNELS = 256


class Layer:
    """A 1x1 convolution as matrix product, with what follows it."""

    def __init__(self, tensors: Tensors, name: str, form: fixed.Format, device: torch.device) -> None:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"].to(torch.int32)
        weight = weight.reshape(weight.shape[0], -1).to(torch.int32)
        shift = tensors[f"{name}.shift"].to(torch.int32)
        check_sums(name, weight, bias, shift, form)
        self.form = form
        low, high = int(form.low), int(form.high)
        if form.high == fixed.HIDDEN_HIGH:  # writes 0..255 as -128..127
            bias = bias + (fixed.READ_LOW << shift)
            low, high = low + fixed.READ_LOW, high + fixed.READ_LOW
        self.bounds = low, high
        if form.in_max == fixed.HIDDEN_HIGH:  # reads 0..255 as -128..127
            bias = bias - fixed.READ_LOW * weight.sum(1, dtype=torch.int32)
        if form.wide_weight:
            high = (weight + fixed.DIGIT // 2) >> 7
            low = weight - (high << 7)
            if form.wide_input:
                # without the product of both low digits, in units of 128
                self.high, self.both = Matrix(high, device), Matrix(torch.cat([low, high], 1), device)
                shift, bias = shift - 7, bias >> 7
            else:
                self.high, self.both = Matrix(high, device), Matrix(torch.cat([high, low], 0), device)
        else:
            self.matrix = Matrix(weight, device)
        self.bias, self.shift = bias.to(device), shift.to(device)
        self._ops = passes_on(device)

    def of(self, rows: Tensor) -> Tensor:
        """int8 (P,K) -> int32 (P,N) in the range of the format; hidden values less 128."""
        return self._finish(self.matrix.of(rows))

    def hidden(self, rows: Tensor, quality: Tensor) -> Tensor:
        """int8 (P,K) of images of one size -> int8 (P,N), with the biases of their whole qualities (images,)."""
        bias = self.bias if self.bias.ndim == 1 else self.bias[quality - 1]
        return self._ops.narrow(self.matrix.of(rows), bias, self.shift, *self.bounds)

    def add(self, rows: Tensor, stream: Tensor) -> None:
        """Add what int8 (P,K) give to a stream (P,N), integers in float32, in place."""
        self._ops.add(stream, self.matrix.of(rows), self.bias, self.shift)

    def sums(self, high: Tensor, low: Tensor | None = None) -> Tensor:
        """Sums of products int32 (P,N) of int8 (P,K), or of their high and low digits; without bias."""
        if low is None:
            return self.matrix.of(high)
        rest = self.both.of(torch.cat([high, low], 1)) if self.form.wide_weight else self.matrix.of(low)
        return (self.high if self.form.wide_weight else self.matrix).of(high).mul_(fixed.DIGIT).add_(rest)

    def of_sums(self, total: Tensor) -> Sums:
        """Sums with what makes integers of the format of them."""
        return Sums(total, self.bias, self.shift)

    def of_pixels(self, grey: Tensor, rest: Tensor | None) -> Tensor:
        """Wide weights on whole grey levels less 128 and, where there are any, 64ths, int8 (P,K) each."""
        n = self.bias.shape[0]
        both = self.both.of(grey)
        total = both[:, :n].mul(fixed.DIGIT).add_(both[:, n:])
        if rest is not None:
            total.add_(self.high.of(rest), alpha=fixed.DIGIT >> fixed.PIXEL_BITS)
        return self._finish(total)

    def _finish(self, total: Tensor) -> Tensor:
        return shifted(total, self.bias, self.shift).clamp_(*self.bounds)


def check_sums(name: str, weight: Tensor, bias: Tensor, shift: Tensor, form: fixed.Format) -> None:
    """Raise ValueError if the sums of a stored layer could be inexact, or its integers are out of range."""
    flat = weight.long().flatten(1)
    parts = [flat]
    if form.wide_weight:
        high = (flat + fixed.DIGIT // 2) >> 7
        parts = [high, flat - (high << 7)]
    most = fixed.DIGIT if form.wide_input else form.in_max
    limit = 2**20 if form.spatial else 2**24
    # wide layers add their bias to sums that are put together in 32 bits
    extra = 0 if form.wide_input or form.wide_weight else bias.long().abs().reshape(-1, len(flat)).amax(0)
    sums = sum(part.abs().sum(1) for part in parts) if form.wide_input else torch.stack([p.abs().sum(1) for p in parts])
    low, high = (8, 31) if form.wide_input and form.wide_weight else (0, 24)
    sound = bool((sums * most + extra < limit).all()) and int(flat.abs().max()) <= form.weight_max
    sound = sound and bool((bias.long().abs() < 2**27).all()) and bool(((shift >= low) & (shift <= high)).all())
    shapes = [weight.shape[:1], (fixed.QUALITIES, weight.shape[0])] if form is fixed.UP else [weight.shape[:1]]
    if not sound or bias.shape not in shapes or shift.shape != weight.shape[:1]:
        raise ValueError(f"{name}: weights, biases or shifts out of the range in which sums are exact")


class Blocks:
    """The residual blocks of a stream; whether their hidden biases depend on quality, the architecture says."""

    def __init__(
        self, tensors: Tensors, name: str, count: int, device: torch.device, conditioned: bool = False
    ) -> None:
        self.parts = []
        self._ops, self._fused = passes_on(device), fused_on(device)
        self._residuals: list[Residual] = []
        for i in range(count):
            at = f"{name}.{i}"
            if tensors[f"{at}.up.bias"].ndim != 1 + conditioned:
                raise ValueError(f"{at}.up: biases for {'one' if conditioned else 'each'} quality, unlike described")
            # a weight's unit is a power of two, and so are the units of the sums: float32 holds both exactly
            spatial = [tensors[f"{at}.spatial.{part}"].to(torch.int32) for part in ("weight", "bias", "shift")]
            check_sums(f"{at}.spatial", *spatial, fixed.SPATIAL)
            unit = torch.exp2(-tensors[f"{at}.spatial.shift"].float())
            weight = (tensors[f"{at}.spatial.weight"].float() * unit[:, None, None, None]).to(device)
            bias = (tensors[f"{at}.spatial.bias"].float() * unit).to(device)
            up, down = (Layer(tensors, f"{at}.{n}", fixed.BLOCK_LAYERS[n], device) for n in ("up", "down"))
            self.parts.append((weight, bias, up, down))
            if self._fused is not None and weight.shape[0] <= FUSED_CHANNELS:
                taps = weight.flatten(1).t().contiguous()
                matrices = (up.matrix.int8, up.bias, up.shift, down.matrix.int8, down.bias, down.shift)
                self._residuals.append(Residual(taps, bias, *matrices, up.bounds))

    def __call__(self, stream: Tensor, quality: Tensor) -> Tensor:
        """Stream (N,h,w,C), integers in float32, which may be changed in place; whole qualities (N,)."""
        c = stream.shape[3]
        for residual in self._residuals:
            stream = self._fused.block(stream, residual, quality - 1 if residual.up_bias.ndim > 1 else None)
        if self._residuals:
            return stream
        rows, depthwise = stream.view(-1, c), depthwise_on(stream.device)
        for weight, bias, up, down in self.parts:
            spatial = self._ops.read(rows_of(depthwise(stream, weight, bias)), 0)
            down.add(up.hidden(spatial, quality), rows)
        return stream


class Modulation:
    """Factor and offset per channel and whole quality; begins a stream."""

    def __init__(self, tensors: Tensors, name: str, stem: Layer, device: torch.device) -> None:
        """``stem`` is what it follows, with a pixel shuffle between if it has more outputs."""
        self.stem, self._ops = stem, passes_on(device)
        scale, offset = (tensors[f"{name}.{part}"].float().to(device) for part in ("scale", "offset"))
        repeats = stem.bias.shape[0] // scale.shape[1]
        self.scale, self.offset = scale.repeat(1, repeats), offset.repeat(1, repeats)

    def __call__(self, total: Tensor, quality: Tensor) -> Tensor:
        """Sums of the stem int32 (P,N), whole qualities (images,) -> float32 integers (P,N)."""
        stem, which = self.stem, quality - 1
        most = stem.bounds[1]
        return self._ops.modulate(total, stem.bias, stem.shift, most, self.scale[which], self.offset[which])


def read(stream: Tensor) -> Tensor:
    """The stream (..., C) in the 8 bits that 1x1 convolutions read."""
    rows = passes_on(stream.device).read(rows_of(stream), fixed.STREAM_BITS - fixed.READ_BITS)
    return rows.view(stream.shape)


def rows_of(x: Tensor) -> Tensor:
    """(..., C) -> (P,C)."""
    return x.reshape(-1, x.shape[-1])
