"""The transforms as the format defines them: integers in, integers out (``docs/model.md``).

Images and latents lie channels last, (N,h,w,C), so that a 1x1 convolution is one matrix
product.  Weights of layers beside a pixel shuffle are reordered once, when a model is
loaded, so that shuffling moves whole runs of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deepsic_codec.model.exact import fixed
from deepsic_codec.model.exact.matrix import Matrix, depthwise_on
from deepsic_codec.model.networks import Analysis, Architecture, Block, Gains, Modulate, SemanticHead, Synthesis
from deepsic_codec.model.ops.select import fused_on, passes_on
from deepsic_codec.model.ops.tensor_ops import Residual, Sums, scatter, shifted
from deepsic_codec.payload.constants import LATENT_STRIDE

Tensors = Mapping[str, Tensor]
#: Formats of the layers that are no part of a block.
ANALYSIS_FORMATS = {"linear": fixed.LINEAR_IN, "stem": fixed.STEM, "reduce": fixed.INNER, "out": fixed.TO_LATENT}
SYNTHESIS_FORMATS = {
    "linear": fixed.LINEAR_OUT,
    "stem": fixed.LATENT_STEM,
    "expand": fixed.INNER,
    "out": fixed.TO_PIXEL,
}
HEAD_FORMATS = {"stem": fixed.COMPANDED_STEM, "hidden": fixed.UP, "out": fixed.TO_LOGIT}
BLOCK_FORMATS = {"spatial": fixed.SPATIAL, "up": fixed.UP, "down": fixed.DOWN}
QUALITIES = 100
#: Quality is given in hundredths.
HUNDREDTHS = 100
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
        self._passes = passes_on(device)

    def of(self, rows: Tensor) -> Tensor:
        """int8 (P,K) -> int32 (P,N) in the range of the format; hidden values less 128."""
        return self._finish(self.matrix.of(rows))

    def hidden(self, rows: Tensor, quality: Tensor) -> Tensor:
        """int8 (P,K) of images of one size -> int8 (P,N), with the biases of their whole qualities (images,)."""
        bias = self.bias if self.bias.ndim == 1 else self.bias[quality - 1]
        return self._passes.narrow(self.matrix.of(rows), bias, self.shift, *self.bounds)

    def add(self, rows: Tensor, stream: Tensor) -> None:
        """Add what int8 (P,K) give to a stream (P,N), integers in float32, in place."""
        self._passes.add(stream, self.matrix.of(rows), self.bias, self.shift)

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
    shapes = [weight.shape[:1], (QUALITIES, weight.shape[0])] if form is fixed.UP else [weight.shape[:1]]
    if not sound or bias.shape not in shapes or shift.shape != weight.shape[:1]:
        raise ValueError(f"{name}: weights, biases or shifts out of the range in which sums are exact")


class Blocks:
    """The residual blocks of a stream; whether their hidden biases depend on quality, the architecture says."""

    def __init__(
        self, tensors: Tensors, name: str, count: int, device: torch.device, conditioned: bool = False
    ) -> None:
        self.parts = []
        self._passes, self._fused = passes_on(device), fused_on(device)
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
            up, down = (Layer(tensors, f"{at}.{n}", BLOCK_FORMATS[n], device) for n in ("up", "down"))
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
            spatial = self._passes.read(_rows(depthwise(stream, weight, bias)), 0)
            down.add(up.hidden(spatial, quality), rows)
        return stream


class Modulation:
    """Factor and offset per channel and whole quality; begins a stream."""

    def __init__(self, tensors: Tensors, name: str, stem: Layer, device: torch.device) -> None:
        """``stem`` is what it follows, with a pixel shuffle between if it has more outputs."""
        self.stem, self._passes = stem, passes_on(device)
        scale, offset = (tensors[f"{name}.{part}"].float().to(device) for part in ("scale", "offset"))
        repeats = stem.bias.shape[0] // scale.shape[1]
        self.scale, self.offset = scale.repeat(1, repeats), offset.repeat(1, repeats)

    def __call__(self, total: Tensor, quality: Tensor) -> Tensor:
        """Sums of the stem int32 (P,N), whole qualities (images,) -> float32 integers (P,N)."""
        stem, which = self.stem, quality - 1
        most = stem.bounds[1]
        return self._passes.modulate(total, stem.bias, stem.shift, most, self.scale[which], self.offset[which])


def read(stream: Tensor) -> Tensor:
    """The stream (..., C) in the 8 bits that 1x1 convolutions read."""
    rows = passes_on(stream.device).read(_rows(stream), fixed.STREAM_BITS - fixed.READ_BITS)
    return rows.view(stream.shape)


class IntegerGains:
    """Dequantiser steps of each channel and quality."""

    def __init__(self, tensors: Tensors, device: torch.device) -> None:
        self.table = tensors["step"].to(torch.int64)
        self.device = device

    def steps(self, hundredths: Tensor) -> Tensor:
        """Qualities in hundredths, int64 (N,) -> steps int32 (N,C) in 2^-STEP_BITS units of latents."""
        low = (hundredths // HUNDREDTHS).clamp(1, QUALITIES - 1)
        part = (hundredths - low * HUNDREDTHS)[:, None]
        sum_ = self.table[low - 1] * (HUNDREDTHS - part) + self.table[low] * part
        return ((sum_ + HUNDREDTHS // 2) // HUNDREDTHS).to(device=self.device, dtype=torch.int32)


def dequantise(symbols: Tensor, steps: Tensor) -> Tensor:
    """Symbols (N,h,w,C) and steps int32 (N,C) -> latents int32."""
    return passes_on(symbols.device).dequantise(_rows(symbols), steps).view(symbols.shape)


def in_steps(latents: Tensor, steps: Tensor) -> Tensor:
    """Latents int32 (N,h,w,C) in units of the quantiser's step, float32: one division, rounded alike everywhere."""
    return (latents.float() * 2.0**fixed.STEP_BITS) / steps[:, None, None, :].float()


class IntegerAnalysis:
    """Analysis transform of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors, device: torch.device) -> None:
        tensors = dict(tensors)
        w8 = arch.analysis_widths[0]
        _columns(tensors, "linear", 3, LATENT_STRIDE)
        _columns(tensors, "stem", 3, 8)
        _columns(tensors, "reduce", w8, 2)
        layers = {name: Layer(tensors, name, form, device) for name, form in ANALYSIS_FORMATS.items()}
        self.linear, self.stem, self.reduce, self.out = (layers[n] for n in ("linear", "stem", "reduce", "out"))
        self.mod8, self.mod16 = (
            Modulation(tensors, name, stem, device) for name, stem in (("mod8", self.stem), ("mod16", self.reduce))
        )
        self.blocks8, self.blocks16 = (
            Blocks(tensors, f"blocks{at}", n, device, arch.conditioned)
            for at, n in zip((8, 16), arch.analysis_blocks, strict=True)
        )

    def __call__(self, grey: Tensor, rest: Tensor | None, quality: Tensor) -> Tensor:
        """Analyse images.

        Parameters
        ----------
        grey : int8 (N,H,W,3)
            Grey levels less 128, H and W multiples of 16.
        rest : int8 (N,H,W,3) or None
            64ths of a grey level, -32..31, on top.
        quality : int64 (N,)
            Whole qualities, 1..100.

        Returns
        -------
        Tensor
            Latents int32 (N,H/16,W/16,C).
        """
        n, height, width, _ = grey.shape
        h, w = height // LATENT_STRIDE, width // LATENT_STRIDE
        latents = self.linear.of_pixels(
            _gather(grey, LATENT_STRIDE), None if rest is None else _gather(rest, LATENT_STRIDE)
        )
        stream = self.mod8(self.stem.sums(_gather(grey, 8)), quality).view(n, 2 * h, 2 * w, -1)
        stream = self.blocks8(stream, quality)
        stream = self.mod16(self.reduce.sums(_gather(read(stream), 2)), quality).view(n, h, w, -1)
        stream = self.blocks16(stream, quality)
        latents.add_(self.out.of(_rows(read(stream)))).clamp_(-fixed.WIDE_MAX, fixed.WIDE_MAX)
        return latents.view(n, h, w, -1)


class IntegerSynthesis:
    """Synthesis transform of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors, device: torch.device) -> None:
        tensors = dict(tensors)
        w8 = arch.synthesis_widths[0]
        _outputs(tensors, "linear", 3, LATENT_STRIDE)
        _outputs(tensors, "expand", w8, 2)
        _outputs(tensors, "out", 3, 8)
        layers = {name: Layer(tensors, name, form, device) for name, form in SYNTHESIS_FORMATS.items()}
        self.linear, self.stem, self.expand, self.out = (layers[n] for n in ("linear", "stem", "expand", "out"))
        self.mod8, self.mod16 = (
            Modulation(tensors, name, stem, device) for name, stem in (("mod8", self.expand), ("mod16", self.stem))
        )
        self.blocks8, self.blocks16 = (
            Blocks(tensors, f"blocks{at}", n, device, arch.conditioned)
            for at, n in zip((8, 16), arch.synthesis_blocks, strict=True)
        )
        # as a multiplication by a power of two, rounded, of integers below 2^15
        exponent = tensors["normaliser"].float() + (fixed.NORMAL_BITS - fixed.LATENT_BITS)
        self.normaliser = torch.exp2(exponent).to(device)

    def __call__(self, latents: Tensor, quality: Tensor, fine: bool = True) -> Tensor:
        """Latents int32 (N,h,w,C), whole qualities (N,) -> int16 (N,16h,16w,3), 64ths of a grey level, 0..16320.

        Without ``fine`` in grey levels, uint8.
        """
        n, h, w, _ = latents.shape
        flat, passes = _rows(latents), passes_on(latents.device)
        linear = self.linear.sums(*passes.digits(flat))
        stream = self.mod16(self.stem.sums(*passes.digits(flat, self.normaliser)), quality).view(n, h, w, -1)
        stream = self.blocks16(stream, quality)
        stream = self.mod8(self.expand.sums(_rows(read(stream))), quality).view(n, h, w, -1)
        stream = self.blocks8(scatter(stream, 2), quality)
        rest = self.out.sums(_rows(read(stream)))
        return passes.pixels(self.linear.of_sums(linear), self.out.of_sums(rest), (n, h, w), fine)


class IntegerHead:
    """Semantic head of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors, device: torch.device) -> None:
        self.stem, self.hidden, self.out = (Layer(tensors, n, form, device) for n, form in HEAD_FORMATS.items())
        self.mod = Modulation(tensors, "mod", self.stem, device)
        self.blocks = Blocks(tensors, "blocks", arch.head_blocks, device)
        self.compand = tensors["compand"].to(device=device, dtype=torch.int32)
        self.score = tensors["score"].to(device=device)
        if self.compand.shape != (fixed.WIDE_MAX + 1,) or self.score.shape != (2 * fixed.LOGIT_MAX + 1,):
            raise ValueError("the head's tables have other sizes")
        if int(self.compand.abs().max()) > fixed.WIDE_MAX:
            raise ValueError("the head's table of companded latents is out of range")

    def __call__(self, latents: Tensor, quality: Tensor) -> Tensor:
        """Cells of latents int32 (N,h,w,C) and whole qualities (N,) -> scores uint8 (N,classes) in 1/255."""
        n, h, w, _ = latents.shape
        flat = _rows(latents)
        digits = passes_on(flat.device).companded(flat, self.compand)
        stream = self.mod(self.stem.sums(*digits), quality).clamp_(min=0)
        stream = self.blocks(stream.view(n, h, w, -1), quality)
        # the mean of integers, rounded to nearest
        total, count = stream.sum((1, 2)).to(torch.int32), h * w
        mean = (2 * total + count) // (2 * count)
        pooled = read(torch.cat([mean.float(), stream.amax((1, 2))], 1))
        hidden = self.hidden.of(pooled).to(torch.int8)
        return self.score[(self.out.of(hidden) + fixed.LOGIT_MAX).long()]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gather(x: Tensor, edge: int) -> Tensor:
    """(N,H,W,C) -> rows of squares (N H/edge W/edge, edge edge C)."""
    n, h, w, c = x.shape
    squares = x.view(n, h // edge, edge, w // edge, edge * c).permute(0, 1, 3, 2, 4)
    return squares.reshape(-1, edge * edge * c)


def _columns(tensors: dict[str, Tensor], name: str, channels: int, edge: int) -> None:
    """Reorder the inputs of a layer that follows a pixel-unshuffle: from (C,y,x) to (y,x,C)."""
    weight = tensors[f"{name}.weight"]
    weight = weight.reshape(weight.shape[0], channels, edge, edge).permute(0, 2, 3, 1)
    tensors[f"{name}.weight"] = weight.reshape(weight.shape[0], -1)


def _outputs(tensors: dict[str, Tensor], name: str, channels: int, edge: int) -> None:
    """Reorder the outputs of a layer that a pixel-shuffle follows."""
    order = torch.arange(channels * edge * edge).reshape(channels, edge, edge).permute(1, 2, 0).reshape(-1)
    for part in ("weight", "bias", "shift"):
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][order]


def _export_blocks(blocks: Iterable[Block], name: str) -> dict[str, Tensor]:
    out = {}
    for i, block in enumerate(blocks):
        for part, form in BLOCK_FORMATS.items():
            conv = getattr(block, part)
            bias = conv.bias
            if part == "up" and block.condition.offset is not None:
                bias = bias + block.condition.offset(_qualities(bias.device))
            out |= {f"{name}.{i}.{part}.{k}": v for k, v in fixed.export_layer(conv.weight, bias, form).items()}
    return out


def _qualities(device: torch.device) -> Tensor:
    return torch.arange(1, QUALITIES + 1, dtype=torch.float32, device=device)


def _export_modulation(modulate: Modulate, name: str) -> dict[str, Tensor]:
    quality = _qualities(modulate.scale.table.device)
    bits, most = fixed.MODULATION_BITS, fixed.MODULATION_MAX
    scale = torch.floor((1 + modulate.scale(quality)) * 2**bits + 0.5).clamp(-most, most)
    offset = torch.floor(modulate.offset(quality) * 2 ** (fixed.STREAM_BITS + bits) + 0.5)
    offset = offset.clamp(-fixed.BIAS_MAX, fixed.BIAS_MAX) + 2 ** (bits - 1)
    return {f"{name}.scale": scale.to(torch.int16).cpu(), f"{name}.offset": offset.to(torch.int32).cpu()}


@torch.no_grad()
def export_transform(network: Analysis | Synthesis) -> dict[str, Tensor]:
    """Integer tensors of a transform in its integer form (``network.integer``)."""
    formats = ANALYSIS_FORMATS if isinstance(network, Analysis) else SYNTHESIS_FORMATS
    out: dict[str, Tensor] = {}
    for name, form in formats.items():
        conv = getattr(network, name)
        out |= {f"{name}.{k}": v for k, v in fixed.export_layer(conv.weight, conv.bias, form).items()}
    for at in (8, 16):
        out |= _export_blocks(getattr(network, f"blocks{at}"), f"blocks{at}")
        out |= _export_modulation(getattr(network, f"mod{at}"), f"mod{at}")
    if isinstance(network, Synthesis):
        out["normaliser"] = torch.log2(network.normaliser()).to(torch.int8).cpu()
    return out


@torch.no_grad()
def export_head(head: SemanticHead) -> dict[str, Tensor]:
    """Integer tensors of a head in its integer form, with its tables of companded latents and of scores."""
    out = _export_blocks(head.blocks, "blocks") | _export_modulation(head.mod, "mod")
    for name, form in HEAD_FORMATS.items():
        layer = getattr(head, name)
        out |= {f"{name}.{k}": v for k, v in fixed.export_layer(layer.weight, layer.bias, form).items()}
    latents = torch.arange(fixed.WIDE_MAX + 1, dtype=torch.float64) * 2.0**-fixed.LATENT_BITS
    out["compand"] = torch.floor(torch.asinh(2 * latents) * 2**fixed.COMPAND_BITS + 0.5).to(torch.int16)
    logits = torch.arange(-fixed.LOGIT_MAX, fixed.LOGIT_MAX + 1, dtype=torch.float64) * 2.0**-fixed.LOGIT_BITS
    out["score"] = torch.floor(torch.sigmoid(logits) * 255 + 0.5).to(torch.uint8)
    return out


@torch.no_grad()
def export_gains(gains: Gains) -> dict[str, Tensor]:
    """Steps int32 (100,C) in 2^-STEP_BITS units of latents."""
    quality = _qualities(gains.log2.table.device)
    step = 2.0 ** (fixed.LATENT_BITS + fixed.STEP_BITS) / gains(quality)[:, :, 0, 0].double()
    return {"step": torch.floor(step + 0.5).clamp(1, 2.0**22).to(torch.int32).cpu()}
