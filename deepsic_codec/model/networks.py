"""The networks of the family `"deepsic"` as they are trained: analysis, synthesis, semantic head.

    x (B,3,H,W) ---- pixel-unshuffle 16 ---- KLT 768 -> 320 ----------------.
        |                                                                   (+)--> y (B,320,H/16,W/16)
        '-- unshuffle 8 - 1x1 - blocks - unshuffle 2 - 1x1 - blocks - 1x1 --'

    y' ----- KLT^-1 320 -> 768 ---- pixel-shuffle 16 ------------------------.
        |                                                                   (+)-- 3x3 - 3x3, added --> x'
        '-- 1x1 - blocks - 1x1, shuffle 2 - blocks - 1x1 - shuffle 8 --------'

The linear shortcut makes the codec useful before the first training step; the last layer of each non-linear branch
starts at zero. All layers work at 1/8 and 1/16 of the image's resolution with 1x1 and depth-wise 3x3 convolutions and
ReLU only, so that all of them can become integers (`docs/model.md`).

Two flags change how a network computes. With `integer` it imitates its integer form, which a model file stores. With
`bounded` it clips streams and hidden channels where the integer form does, in floating point.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.axes import ceil_div
from deepsic_codec.model.architecture import FILTER_PLACES, Architecture, BlockSizes, LayerSizes
from deepsic_codec.model.exact import fixed, formats
from deepsic_codec.model.exact.fixed import imitate
from deepsic_codec.model.exact.formats import ANALYSIS_LAYERS, HEAD_LAYERS, SYNTHESIS_LAYERS
from deepsic_codec.payload.constants import LATENT_STRIDE, MAX_QUALITY, MIN_QUALITY, quality_step

#: Largest values of streams and of hidden channels of blocks in the integer form.
STREAM_MAX, HIDDEN_MAX = formats.STREAM_MAX * 2.0**-formats.STREAM_BITS, formats.HIDDEN_HIGH * 2.0**-formats.HIDDEN_BITS


#: Black and white in units of 64 grey levels around the middle one.
_GREY = -2.0, 127 / 64


class QualityTable(nn.Module):
    """Learned vectors at a few qualities, interpolated linearly between them."""

    def __init__(self, channels: int, knots: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(knots, channels))

    def forward(self, quality: Tensor) -> Tensor:
        """(B,) qualities in 1..100 -> (B, channels)."""
        last = self.table.shape[0] - 1
        t = (quality - MIN_QUALITY) / (MAX_QUALITY - MIN_QUALITY) * last
        low = t.floor().clamp(0, last - 1).long()
        w = (t - low)[:, None]
        return self.table[low] * (1 - w) + self.table[low + 1] * w


class Modulate(nn.Module):
    """Per-channel scale and offset that depend on quality; identity at the start.

    Folds into the 1x1 convolution before it for any one quality.
    """

    def __init__(self, channels: int, knots: int) -> None:
        super().__init__()
        self.scale = QualityTable(channels, knots)
        self.offset = QualityTable(channels, knots)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """(B,C,h,w) and qualities (B,) -> (B,C,h,w)."""
        scale, offset = 1 + self.scale(quality), self.offset(quality)
        return torch.addcmul(offset[:, :, None, None].to(x.dtype), x, scale[:, :, None, None].to(x.dtype))

    def imitate(self, x: Tensor, quality: Tensor) -> Tensor:
        """`forward` in fixed point; integers have one table entry for each whole quality."""
        whole = torch.floor(quality + 0.5)
        largest = formats.MODULATION_MAX
        scale = fixed.fixed(1 + self.scale(whole), formats.MODULATION_BITS, -largest, largest)[:, :, None, None]
        out = torch.addcmul(self.offset(whole)[:, :, None, None], x, scale)
        return fixed.fixed(out, formats.STREAM_BITS, -formats.STREAM_MAX, formats.STREAM_MAX)


class Condition(nn.Module):
    """Per-channel offset that depends on quality; zero at the start.

    It stands for biases of the layer before it, one set for each quality. With 0 knots it does nothing.
    """

    def __init__(self, channels: int, knots: int) -> None:
        super().__init__()
        self.offset = QualityTable(channels, knots) if knots else None

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """(B,C,h,w) and qualities (B,) -> (B,C,h,w)."""
        return x if self.offset is None else x + self.offset(quality)[:, :, None, None].to(x.dtype)

    def at(self, quality: Tensor) -> Tensor | None:
        """Offsets (B,C) at the nearest whole qualities, as integers have them; None without a table."""
        return None if self.offset is None else self.offset(torch.floor(quality + 0.5))

    def biases(self, bias: Tensor | None) -> Tensor | None:
        """Biases (knots,C) of the layer before it at all knots, or its bias (C,) if there is no table."""
        return bias if bias is None or self.offset is None else bias + self.offset.table


class Block(nn.Module):
    """Residual block: depth-wise 3x3, 1x1 to twice the width, ReLU, 1x1 back.

    With `knots`, the biases before the ReLU depend on quality.
    """

    def __init__(self, width: int, expand: int = formats.EXPANSION, knots: int = 0) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up = nn.Conv2d(width, width * expand, 1)
        self.condition = Condition(width * expand, knots)
        self.down = nn.Conv2d(width * expand, width, 1)

    def forward(self, x: Tensor, quality: Tensor, bounded: bool = False) -> Tensor:
        """(B,width,h,w) and qualities (B,) -> the same shape; `bounded` clips as the integer form does."""
        h = self.condition(self.up(self.spatial(x)), quality)
        if not bounded:
            return x + self.down(F.relu(h))
        return F.hardtanh(x + self.down(F.hardtanh(h, 0, HIDDEN_MAX)), -STREAM_MAX, STREAM_MAX)

    def imitate(self, x: Tensor, quality: Tensor) -> Tensor:
        """`forward` in fixed point."""
        h = imitate(x, self.spatial, formats.SPATIAL)
        h = imitate(h, self.up, formats.UP, self.condition.at(quality), self.condition.biases(self.up.bias))
        return (x + imitate(h, self.down, formats.DOWN)).clamp(-STREAM_MAX, STREAM_MAX)


def _blocks(sizes: BlockSizes, knots: int = 0) -> nn.ModuleList:
    return nn.ModuleList(Block(sizes.width, knots=knots) for _ in range(sizes.number))


def _pointwise(sizes: LayerSizes, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(sizes.inputs, sizes.outputs, 1, bias=bias)


def _set_zero(layer: nn.Conv2d) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _imitated(blocks: nn.ModuleList, x: Tensor, quality: Tensor) -> Tensor:
    for block in blocks:
        assert isinstance(block, Block)
        x = block.imitate(x, quality)
    return x


def _through(blocks: nn.ModuleList, x: Tensor, quality: Tensor, bounded: bool = False) -> Tensor:
    if bounded:
        x = F.hardtanh(x, -STREAM_MAX, STREAM_MAX)
    for block in blocks:
        x = block(x, quality, bounded)
    return x


def _read(x: Tensor) -> Tensor:
    """Round a stream to the values that 1x1 convolutions read."""
    return fixed.fixed(x, formats.READ_BITS, formats.READ_LOW, formats.READ_HIGH)


class Analysis(nn.Module):
    """Analysis transform `g_a`: image to latents."""

    formats = ANALYSIS_LAYERS
    block_lists, modulations = ("blocks8", "blocks16"), ("mod8", "mod16")

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.integer = self.bounded = False
        layers, blocks, modulations = arch.analysis
        self.linear = _pointwise(layers["linear"], bias=False)
        self.stem = _pointwise(layers["stem"])
        self.mod8, self.blocks8 = Modulate(modulations["mod8"], arch.knots), _blocks(blocks["blocks8"], arch.knots)
        self.reduce = _pointwise(layers["reduce"])
        self.mod16, self.blocks16 = Modulate(modulations["mod16"], arch.knots), _blocks(blocks["blocks16"], arch.knots)
        self.out = _pointwise(layers["out"])
        _set_zero(self.out)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """(B,3,H,W) float in 0..255, H and W multiples of 16 -> (B,C,H/16,W/16)."""
        if self.integer:
            return self._imitate(x, quality)
        x = (x - 128) / 64
        linear = self.linear(F.pixel_unshuffle(x, LATENT_STRIDE))  # (B,C,H/16,W/16)
        h = self.mod8(self.stem(F.pixel_unshuffle(x, 8)), quality)  # (B,w8,H/8,W/8)
        h = F.pixel_unshuffle(_through(self.blocks8, h, quality, self.bounded), 2)
        h = self.mod16(self.reduce(h), quality)
        h = _through(self.blocks16, h, quality, self.bounded)  # (B,w16,H/16,W/16)
        return linear.float() + self.out(h).float()

    @contextmanager
    def floating(self) -> Iterator[None]:
        """Compute in floating point inside the context: faster, and equal but for the rounding of integers."""
        before = self.integer, self.bounded
        self.integer, self.bounded = False, self.bounded or self.integer
        try:
            yield
        finally:
            self.integer, self.bounded = before

    def _imitate(self, x: Tensor, quality: Tensor) -> Tensor:
        x = (torch.floor(x + 0.5).clamp(0, 255) - 128) / 64
        linear = imitate(F.pixel_unshuffle(x, LATENT_STRIDE), self.linear, formats.LINEAR_IN)
        h = self.mod8.imitate(imitate(F.pixel_unshuffle(x, 8), self.stem, formats.STEM), quality)
        h = _imitated(self.blocks8, h, quality)
        h = imitate(F.pixel_unshuffle(_read(h), 2), self.reduce, formats.INNER)
        h = self.mod16.imitate(h, quality)
        h = _imitated(self.blocks16, h, quality)
        largest = formats.WIDE_MAX * 2.0**-formats.LATENT_BITS
        return (linear + imitate(_read(h), self.out, formats.TO_LATENT)).clamp(-largest, largest)


class Filter(nn.Module):
    """Filter at full resolution: 3x3 to hidden channels, ReLU, 3x3 back, scaled by quality and added to the pixels.

    What is added before the ReLU depends on quality, and on the place of a pixel in the squares of 8x8 pixels that the
    synthesis ends with. Rows and columns beyond the image count as its last ones. The filter starts at zero.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        hidden = arch.synthesis_filter
        self.up = nn.Conv2d(3, hidden, 3)
        self.condition = Condition(hidden, arch.knots)
        self.places = nn.Parameter(torch.zeros(hidden, FILTER_PLACES, FILTER_PLACES))
        self.down = nn.Conv2d(hidden, 3, 3)
        self.scale = QualityTable(1, arch.knots)
        with torch.no_grad():  # differences between pixels
            self.up.weight.sub_(self.up.weight.mean((2, 3), keepdim=True))
        _set_zero(self.down)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """(B,3,H,W) in units of 64 grey levels around the middle one, and qualities (B,) -> what is added to it."""
        h = self.condition(self.up(_extended(x.clamp(*_GREY))), quality)
        change: Tensor = self.down(F.hardtanh(h + self._places(h), 0, HIDDEN_MAX))
        return change * (1 + self.scale(quality))[:, :, None, None]

    def imitate(self, x: Tensor, quality: Tensor) -> Tensor:
        """`forward` in fixed point."""
        form = formats.FILTER_UP
        x = _extended(fixed.fixed(x, form.in_bits, formats.READ_LOW, formats.READ_HIGH))
        biases = self.condition.biases(self.up.bias)
        weight = fixed.quantised_weight(self.up.weight, fixed.biases_of_places(biases, self.places), form)
        with torch.autocast(x.device.type, enabled=False):
            h = self.condition(F.conv2d(x.float(), weight, self.up.bias), torch.floor(quality + 0.5))
        h = fixed.fixed(h + self._places(h), form.out_bits, form.low, form.high)
        scale = 1 + self.scale(torch.floor(quality + 0.5))
        scale = fixed.fixed(scale, formats.MODULATION_BITS, 0, formats.FILTER_SCALE_MAX)[:, :, None, None]
        largest = 2 * formats.PIXEL_MAX
        return fixed.fixed(imitate(h, self.down, formats.FILTER_DOWN) * scale, formats.OUTPUT_BITS, -largest, largest)

    def _places(self, h: Tensor) -> Tensor:
        """Return what is added to the hidden values of an image, which have a row and column more at each side."""
        rows, columns = h.shape[2:]
        repeats = ceil_div(rows, FILTER_PLACES), ceil_div(columns, FILTER_PLACES)
        return self.places.roll((1, 1), (1, 2)).repeat(1, *repeats)[:, :rows, :columns]


def _extended(x: Tensor) -> Tensor:
    """Return an image with two more rows and columns at each side, copies of the outer ones."""
    return F.pad(x, (2, 2, 2, 2), "replicate")


class Synthesis(nn.Module):
    """Synthesis transform `g_s`: dequantised latents to image."""

    formats = SYNTHESIS_LAYERS
    block_lists, modulations = ("blocks8", "blocks16"), ("mod8", "mod16")

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.integer = self.bounded = False
        layers, blocks, modulations = arch.synthesis
        self.linear = _pointwise(layers["linear"], bias=False)
        self.register_buffer("input_scale", torch.ones(arch.latents))
        self.input_scale: Tensor
        self.stem = _pointwise(layers["stem"])
        self.mod16, self.blocks16 = Modulate(modulations["mod16"], arch.knots), _blocks(blocks["blocks16"], arch.knots)
        self.expand = _pointwise(layers["expand"])
        self.mod8, self.blocks8 = Modulate(modulations["mod8"], arch.knots), _blocks(blocks["blocks8"], arch.knots)
        self.out = _pointwise(layers["out"])
        self.filter = Filter(arch)
        _set_zero(self.out)

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,3,16h,16w) float, nominally in 0..255, not clamped."""
        if self.integer:
            return self._imitate(y, quality)
        linear = F.pixel_shuffle(self.linear(y), LATENT_STRIDE)
        h = self.mod16(self.stem(y * self.input_scale[:, None, None]), quality)  # (B,w16,h,w)
        h = F.pixel_shuffle(self.expand(_through(self.blocks16, h, quality, self.bounded)), 2)
        h = _through(self.blocks8, self.mod8(h, quality), quality, self.bounded)  # (B,w8,2h,2w)
        x = linear.float() + F.pixel_shuffle(self.out(h).float(), 8)
        return (x + self.filter(x, quality).float()) * 64 + 128

    def _imitate(self, y: Tensor, quality: Tensor) -> Tensor:
        largest = formats.WIDE_MAX
        y = fixed.fixed(y.float(), formats.LATENT_BITS, -largest, largest)
        linear = F.pixel_shuffle(imitate(y, self.linear, formats.LINEAR_OUT), LATENT_STRIDE)
        h = fixed.fixed(y * self.normaliser()[:, None, None], formats.NORMAL_BITS, -largest, largest)
        h = self.mod16.imitate(imitate(h, self.stem, formats.LATENT_STEM), quality)
        h = _imitated(self.blocks16, h, quality)
        h = F.pixel_shuffle(imitate(_read(h), self.expand, formats.INNER), 2)
        h = self.mod8.imitate(h, quality)
        h = _imitated(self.blocks8, h, quality)
        x = linear + F.pixel_shuffle(imitate(_read(h), self.out, formats.TO_PIXEL), 8)
        return (x + self.filter.imitate(x, quality)) * 64 + 128

    def normaliser(self) -> Tensor:
        """Powers of two (C,) that bring the latents of the integer form to a deviation of about one."""
        return torch.exp2(torch.floor(torch.log2(self.input_scale) + 0.5).clamp(-formats.STEP_BITS, formats.STEP_BITS))


class Gains(nn.Module):
    """Per-channel quantiser gains: symbols = round(y * gain(quality))."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.log2 = QualityTable(arch.latents, arch.knots)

    def forward(self, quality: Tensor) -> Tensor:
        """(B,) -> (B,C,1,1); latents are in units of 64 grey levels."""
        nominal = torch.log2(64 / quality_step(quality))[:, None]
        return torch.exp2(nominal + self.log2(quality))[:, :, None, None]


class SemanticHead(nn.Module):
    """Label scores of 64x64 pixel cells from latents, float (pre) or decoded (post).

    Its input is latents, companded so that large ones do not drown small ones, and the quality.
    """

    formats = HEAD_LAYERS
    block_lists, modulations = ("blocks",), ("mod",)

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.integer = self.bounded = False
        layers, blocks, modulations = arch.head
        hidden, out = layers["hidden"], layers["out"]
        self.stem = _pointwise(layers["stem"])
        self.mod = Modulate(modulations["mod"], arch.knots)
        self.blocks = _blocks(blocks["blocks"])
        self.hidden = nn.Linear(hidden.inputs, hidden.outputs)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(out.inputs, out.outputs)
        self.classes = arch.classes

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        """(N,C,h,w) cells of at most 4x4 latents in pixel units, same size -> (N,classes) logits."""
        return self.outputs(y, quality)[:, : self.classes]

    def outputs(self, y: Tensor, quality: Tensor) -> Tensor:
        """Return the logits and the values of the embedding in the same unit, (N,outputs), as of `forward`."""
        if self.integer:
            return self._imitate(y, quality)
        x = torch.asinh(y * 2)
        h = _through(self.blocks, F.relu(self.mod(self.stem(x), quality)), quality, self.bounded)
        pooled = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)
        hidden = self.hidden(pooled)
        return self.out(self.dropout(F.hardtanh(hidden, 0, HIDDEN_MAX) if self.bounded else F.relu(hidden)))

    def _imitate(self, y: Tensor, quality: Tensor) -> Tensor:
        x = fixed.fixed(torch.asinh(y.float() * 2), formats.COMPAND_BITS, -formats.WIDE_MAX, formats.WIDE_MAX)
        h = F.relu(self.mod.imitate(imitate(x, self.stem, formats.COMPANDED_STEM), quality))
        h = _imitated(self.blocks, h, quality)
        pooled = _read(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))
        return imitate(self.dropout(imitate(pooled, self.hidden, formats.UP)), self.out, formats.TO_LOGIT)


def make_networks(arch: Architecture) -> dict[str, nn.Module]:
    """Return the networks that are trained and stored."""
    return {
        "analysis": Analysis(arch),
        "gains": Gains(arch),
        "synthesis": Synthesis(arch),
        "head": SemanticHead(arch),
    }


def step_lambda(quality: Tensor) -> Tensor:
    """Weight of the mean squared error against bits per pixel that matches the step.

    At high rate an orthonormal transform with step d has dD/dR = -2 ln 2 d^2 / 12 per coefficient; with three samples
    per pixel, lambda = 3 * 12 / (2 ln 2 d^2).
    """
    return lambda_of_step(quality_step(quality))


def lambda_of_step(step: Any) -> Any:
    """As `step_lambda`, of a step in grey levels."""
    return 36 / (2 * math.log(2)) / step**2
