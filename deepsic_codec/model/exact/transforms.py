"""The integer transforms of a model file on a device: images to latents, to label scores, and back."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec import config
from deepsic_codec.model.architecture import FILTER_PLACES, Architecture
from deepsic_codec.model.batch import whole_qualities
from deepsic_codec.model.device import upload
from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.formats import HUNDREDTHS, UNITS_PER_LEVEL
from deepsic_codec.model.exact.layers import Blocks, Layer, Modulation, Tensors, read, rows_of
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, SYNTHESIS, Analysed, tensors_below
from deepsic_codec.model.file import Arrays
from deepsic_codec.model.ops.select import ops_for
from deepsic_codec.model.ops.torch import scatter
from deepsic_codec.payload.constants import EMBEDDING_ZERO, LATENT_STRIDE


class IntegerGains:
    """Dequantiser steps of each channel and quality, and half steps with a trellis."""

    def __init__(self, tensors: Tensors, device: torch.device) -> None:
        self.tables = [tensors[name].to(torch.int64) for name in ("step", "half")]
        self.device = device

    def steps(self, hundredths: Tensor, trellis: bool) -> Tensor:
        """Qualities in hundredths, int64 (N,) -> steps int32 (N,C) in 2^-STEP_BITS units of latents."""
        table = self.tables[trellis]
        low = (hundredths // HUNDREDTHS).clamp(1, formats.QUALITIES - 1)
        part = (hundredths - low * HUNDREDTHS)[:, None]
        sum_ = table[low - 1] * (HUNDREDTHS - part) + table[low] * part
        return ((sum_ + HUNDREDTHS // 2) // HUNDREDTHS).to(device=self.device, dtype=torch.int32)


def dequantise(symbols: Tensor, steps: Tensor) -> Tensor:
    """Symbols (N,h,w,C) and steps int32 (N,C) -> latents int32."""
    return ops_for(symbols.device).dequantise(rows_of(symbols), steps).view(symbols.shape)


def in_steps(latents: Tensor, steps: Tensor) -> Tensor:
    """Latents int32 (N,h,w,C) in units of the quantiser's step, float32: one division, rounded alike everywhere."""
    return (latents.float() * 2.0**formats.STEP_BITS) / steps[:, None, None, :].float()


class IntegerAnalysis:
    """Analysis transform of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors, device: torch.device) -> None:
        tensors = dict(tensors)
        w8 = arch.analysis_widths[0]
        _columns(tensors, "linear", 3, LATENT_STRIDE)
        _columns(tensors, "stem", 3, 8)
        _columns(tensors, "reduce", w8, 2)
        layers = {name: Layer(tensors, name, form, device) for name, form in formats.ANALYSIS_LAYERS.items()}
        self.linear, self.stem, self.reduce, self.out = (layers[n] for n in ("linear", "stem", "reduce", "out"))
        self.mod8, self.mod16 = (
            Modulation(tensors, name, stem, device) for name, stem in (("mod8", self.stem), ("mod16", self.reduce))
        )
        self.blocks8, self.blocks16 = (
            Blocks(tensors, f"blocks{at}", n, device) for at, n in zip((8, 16), arch.analysis_blocks, strict=True)
        )

    def __call__(self, grey: Tensor, rest: Tensor | None, quality: Tensor) -> Tensor:
        """Analyse images (N,H,W,3), H and W multiples of 16, at whole qualities int64 (N,).

        `grey` are grey levels less 128, int8, and `rest` 64ths of a grey level on top, int8 -32..31. The latents are
        int32 (N,H/16,W/16,C).
        """
        n, height, width, _ = grey.shape
        h, w = height // LATENT_STRIDE, width // LATENT_STRIDE
        latents = self.linear.forward_pixels(
            _gather(grey, LATENT_STRIDE), None if rest is None else _gather(rest, LATENT_STRIDE)
        )
        stream = self.mod8(quality, _gather(grey, 8)).view(n, 2 * h, 2 * w, -1)
        stream = self.blocks8(stream, quality)
        stream = self.mod16(quality, _gather(read(stream), 2)).view(n, h, w, -1)
        stream = self.blocks16(stream, quality)
        latents.add_(self.out.forward(rows_of(read(stream)))).clamp_(-formats.WIDE_MAX, formats.WIDE_MAX)
        return latents.view(n, h, w, -1)


class IntegerFilter:
    """Filter at full resolution of a model file: 3x3 convolutions as products of gathered neighbours."""

    def __init__(self, tensors: Tensors, device: torch.device) -> None:
        tensors = dict(tensors)
        for name in formats.FILTER_LAYERS:  # inputs from (C,y,x) to (y,x,C), as they are gathered
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].permute(0, 2, 3, 1).contiguous()
        self.up, self.down = (Layer(tensors, name, form, device) for name, form in formats.FILTER_LAYERS.items())
        self.scale = tensors["filter_down.scale"].to(device=device, dtype=torch.int32)
        self.places = tensors["filter_up.places"].to(device=device, dtype=torch.int32).permute(1, 2, 0).contiguous()

    def __call__(self, pixels: Tensor, quality: Tensor) -> Tensor:
        """Pixels int16 (N,H,W,3) in 64ths of a grey level, and whole qualities (N,) -> the same, filtered."""
        n, height, width, _ = pixels.shape
        grey = ((pixels + formats.UNITS_PER_LEVEL // 2 >> formats.PIXEL_BITS) - 128).to(torch.int8)
        rows, columns = (torch.arange(-2, size + 2, device=grey.device) for size in (height, width))
        grey = grey[:, rows.clamp(0, height - 1)][:, :, columns.clamp(0, width - 1)]
        sums = self.up.products(_neighbours(grey)).view(n, height + 2, width + 2, -1)
        sums += self.up.bias[quality - 1][:, None, None]
        sums += self.places[rows[1:-1] % FILTER_PLACES][:, columns[1:-1] % FILTER_PLACES]
        hidden = (sums >> self.up.shift).clamp_(*self.up.bounds).to(torch.int8)
        change = self.down.forward(_neighbours(hidden)).view(pixels.shape)
        change = change * self.scale[quality - 1][:, None, None, None] + (1 << formats.MODULATION_BITS - 1)
        change >>= formats.MODULATION_BITS
        return (pixels + change).clamp_(0, 255 << formats.PIXEL_BITS).to(torch.int16)


def _neighbours(x: Tensor) -> Tensor:
    """Gather the 3x3 neighbours of all but the outer positions: (N,h + 2,w + 2,C) -> (N h w,9 C)."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    parts = [x[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    return torch.cat(parts, -1).view(-1, 9 * x.shape[3])


class IntegerSynthesis:
    """Synthesis transform of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors, device: torch.device) -> None:
        tensors = dict(tensors)
        w8 = arch.synthesis_widths[0]
        _outputs(tensors, "linear", 3, LATENT_STRIDE)
        _outputs(tensors, "expand", w8, 2)
        _outputs(tensors, "out", 3, 8)
        layers = {name: Layer(tensors, name, form, device) for name, form in formats.SYNTHESIS_LAYERS.items()}
        self.linear, self.stem, self.expand, self.out = (layers[n] for n in ("linear", "stem", "expand", "out"))
        self.mod8, self.mod16 = (
            Modulation(tensors, name, stem, device) for name, stem in (("mod8", self.expand), ("mod16", self.stem))
        )
        self.blocks8, self.blocks16 = (
            Blocks(tensors, f"blocks{at}", n, device) for at, n in zip((8, 16), arch.synthesis_blocks, strict=True)
        )
        # as a multiplication by a power of two, rounded, of integers below 2^15
        self.filter = IntegerFilter(tensors, device)
        exponent = tensors["normaliser"].float() + (formats.NORMAL_BITS - formats.LATENT_BITS)
        self.normaliser = torch.exp2(exponent).to(device)

    def __call__(self, latents: Tensor, quality: Tensor, q6: bool = True) -> Tensor:
        """Latents int32 (N,h,w,C) at whole qualities (N,) -> images (N,16h,16w,3).

        With `q6` int16 in 64ths of a grey level, 0..16320, otherwise uint8 in grey levels.
        """
        n, h, w, _ = latents.shape
        flat, ops = rows_of(latents), ops_for(latents.device)
        linear = self.linear.sums(*ops.digits(flat))
        stream = self.mod16(quality, *ops.digits(flat, self.normaliser)).view(n, h, w, -1)
        stream = self.blocks16(stream, quality)
        stream = self.mod8(quality, rows_of(read(stream))).view(n, h, w, -1)
        stream = self.blocks8(scatter(stream, 2), quality)
        pixels = ops.pixels(linear, self.out.sums(rows_of(read(stream))), (n, h, w))
        pixels = self.filter(pixels, quality)
        return pixels if q6 else (pixels + formats.UNITS_PER_LEVEL // 2 >> formats.PIXEL_BITS).to(torch.uint8)


class IntegerHead:
    """Semantic head of a model file."""

    def __init__(self, arch: Architecture, tensors: Tensors, device: torch.device) -> None:
        self.stem, self.hidden, self.out = (Layer(tensors, n, form, device) for n, form in formats.HEAD_LAYERS.items())
        self.mod = Modulation(tensors, "mod", self.stem, device)
        self.blocks = Blocks(tensors, "blocks", arch.head_blocks, device)
        self.classes = arch.classes
        self.compand = tensors["compand"].to(device=device, dtype=torch.int32)
        self.score = tensors["score"].to(device=device)

    def __call__(self, latents: Tensor, quality: Tensor) -> Tensor:
        """Cells of latents int32 (N,h,w,C) and whole qualities (N,) -> uint8 (N,outputs): see `family.Transforms`."""
        n, h, w, _ = latents.shape
        flat = rows_of(latents)
        digits = ops_for(flat.device).companded_digits(flat, self.compand)
        stream = self.mod(quality, *digits).clamp_(min=0)
        stream = self.blocks(stream.view(n, h, w, -1), quality)
        # the mean of integers, rounded to nearest
        total, count = stream.sum((1, 2)).to(torch.int32), h * w
        mean = (2 * total + count) // (2 * count)
        pooled = read(torch.cat([mean.float(), stream.amax((1, 2))], 1))
        hidden = self.hidden.forward(pooled).to(torch.int8)
        out = self.out.forward(hidden).to(torch.int32)
        scores = self.score[(out[:, : self.classes] + formats.LOGIT_MAX).long()]
        values = out[:, self.classes :] + (1 << formats.EMBEDDING_SHIFT >> 1) >> formats.EMBEDDING_SHIFT
        return torch.cat([scores, (values.clamp_(-127, 127) + EMBEDDING_ZERO).to(torch.uint8)], 1)


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


class IntegerTransforms:
    """Transforms in integers."""

    def __init__(self, arch: Architecture, arrays: Arrays, device: torch.device) -> None:
        self.device = device
        self._analysis = IntegerAnalysis(arch, tensors_below(arrays, ANALYSIS), device)
        self._synthesis = IntegerSynthesis(arch, tensors_below(arrays, SYNTHESIS), device)
        self._gains = IntegerGains(tensors_below(arrays, GAINS), torch.device("cpu"))
        self._head = IntegerHead(arch, tensors_below(arrays, HEAD), device)

    def analyse(self, images: Tensor, quality: NDArray[np.float64]) -> Analysed:
        whole, steps = self._qualities(quality, False)
        x = upload(images, self.device)
        rest = None
        if x.dtype == torch.int16:
            grey = (x + UNITS_PER_LEVEL // 2) >> formats.PIXEL_BITS
            rest = (x - (grey << formats.PIXEL_BITS)).to(torch.int8)
            grey = (grey - 128).to(torch.int8)
        else:
            grey = x.bitwise_xor(128).view(torch.int8)
        latents = self._analysis(grey, rest, whole)
        return Analysed(in_steps(latents, steps), latents)

    def synthesise(
        self, symbols: NDArray[np.int16] | Tensor, quality: NDArray[np.float64], q6: bool, trellis: bool
    ) -> Tensor:
        whole, steps = self._qualities(quality, trellis)
        return self._synthesis(dequantise(upload(symbols, self.device), steps), whole, q6)

    def latents(self, symbols: NDArray[np.int16], quality: NDArray[np.float64], trellis: bool) -> Tensor:
        _, steps = self._qualities(quality, trellis)
        return dequantise(upload(symbols, self.device), steps)

    def score(self, cells: Tensor, quality: NDArray[np.float64]) -> Tensor:
        return self._head(cells, upload(whole_qualities(quality)[1], self.device))

    def steps(self, quality: NDArray[np.float64], trellis: bool) -> Tensor:
        """Quantiser steps int32 (N,C), with a trellis half steps."""
        return self._qualities(quality, trellis)[1]

    def _qualities(self, quality: NDArray[np.float64], trellis: bool) -> tuple[Tensor, Tensor]:
        """Whole qualities (N,) and quantiser steps (N,C), with a trellis half steps."""
        hundredths, whole = whole_qualities(quality)
        steps = self._gains.steps(torch.from_numpy(hundredths), trellis)
        return upload(whole, self.device), upload(steps, self.device)


def analyses_in_bfloat16(device: torch.device) -> bool:
    """Whether to run a floating-point analysis in bfloat16: symbols near a tie may fall otherwise, nothing else."""
    return _bfloat16(device, "_is_amx_tile_supported")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 there."""
    return _bfloat16(device, "_is_avx512_bf16_supported")


def _bfloat16(device: torch.device, test: str) -> bool:
    """Setting of the process; `"auto"` asks the function `test` of torch.cpu, which older versions of torch lack."""
    precision = config.get().precision
    if precision == "auto":
        return device.type == "cuda" or bool(getattr(torch.cpu, test, lambda: False)())
    return precision == "bfloat16"


def grey_levels(images: Tensor) -> Tensor:
    """Images uint8 in grey levels or int16 in 64ths of them -> grey levels, float32."""
    return images.float() / (UNITS_PER_LEVEL if images.dtype == torch.int16 else 1)
