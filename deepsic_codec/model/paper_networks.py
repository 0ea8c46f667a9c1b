"""Networks as the paper published them (sections III and IV), for comparison.

    x (B,3,H,W) - 7x7, 128 / s1 - BN - 5x5, 128 / s2 -(+)- BN - 3x3, 128 / s3 -(+)- BN - 3x3, 128 / s4 -(+)- BN - f(x)
                                   '-- average pooling -'   '-- average pooling -'   '-- average pooling -'

    Q(f) = ceil(32 f) / 32 (equation 1, B = 6, f in (-1, 1])

    Q(f) - 3x3 transposed / s4 - 3x3 / s3 - 5x5 / s2 - 7x7 / s1 - x'
         '------ interpolation ------(+)------(+)-----(+)-----(+)

    Q(f) or f - 3x3 - 3x3 - mean - fully connected - fully connected

Where the paper leaves a choice open, these networks have: PReLU after each batch normalisation but the last (without it
the stages would be one linear map); the nearest value as interpolation; strides 4, 2, 2, 1 for the lowest rate and
4, 2, 1, 1 for the others; independent sigmoids in place of the softmax, so that a cell can be *unknown*; and a lambda1
for each rate. Feature maps at 1/8 are folded to 1/16 (2x2 positions become channels), so that payloads have the usual
grid.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from deepsic_codec.errors import UnsupportedPayload
from deepsic_codec.model.device import upload
from deepsic_codec.model.exact.formats import UNITS_PER_LEVEL
from deepsic_codec.model.exact.transforms import analyses_in_bfloat16, grey_levels
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, SYNTHESIS, Analysed, tensors_below
from deepsic_codec.model.file import Arrays
from deepsic_codec.model.likelihood import log_scales, logistic_bits, scale_of
from deepsic_codec.model.logistic import INDEX_LEVELS, MEAN_LEVELS, SCALES
from deepsic_codec.model.neighbours import Neighbours
from deepsic_codec.model.ops.protocol import RateTables, SymbolState
from deepsic_codec.model.schedule import CROSS, Step

if TYPE_CHECKING:
    from deepsic_codec.model.paper import PaperArchitecture

#: Equation 1: the quantiser's bits.
BITS = 6


def rectified(x: Tensor, slopes: Tensor) -> Tensor:
    """PReLU, several times as fast in training as `F.prelu`: (B,C,h,w), with the slopes (C,) of negative values."""
    return torch.lerp(F.relu(x), x, slopes[:, None, None].to(x.dtype))


class Analysis(nn.Module):
    """Feature extraction (paper, III-A)."""

    integer = bounded = False  # there is no integer form

    def __init__(self, arch: "PaperArchitecture") -> None:
        super().__init__()
        n = arch.filters
        self.strides, self.fold = arch.strides, arch.fold
        self.convs = nn.ModuleList(nn.Conv2d(i, n, k, s, k // 2, bias=False) for i, k, s in arch.convolutions)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for _ in arch.convolutions)
        self.slopes = nn.ParameterList(torch.ones(n) for _ in range(3))

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """(B,3,H,W) in 0..255 -> (B,C,H/16,W/16), half a step above f(x): rounding then is the paper's ceiling."""
        h = (x - 128) / 64
        before: Tensor | None = None
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = conv(h)
            if before is not None:
                h = h + F.avg_pool2d(before, self.strides[i])  # short path
            before = norm(h)
            h = rectified(before, self.slopes[i]) if i < 3 else before
        half = 0.5 / 2 ** (BITS - 1)
        f = h.float().clamp(half - 1, 1)  # 2^B values of the ceiling, -31..32
        return F.pixel_unshuffle(f, self.fold) + half


class Synthesis(nn.Module):
    """Reconstruction from features (paper, III-C): transposed convolutions beside interpolation."""

    integer = bounded = False

    def __init__(self, arch: "PaperArchitecture") -> None:
        super().__init__()
        n = arch.filters
        self.strides, self.fold = arch.strides[::-1], arch.fold
        self.convs = nn.ModuleList()
        for o, k, s in arch.convolutions[::-1]:
            p = (k - s + 1) // 2
            self.convs.append(nn.ConvTranspose2d(n, o, k, s, p, output_padding=s - k + 2 * p))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for _ in range(3))
        self.slopes = nn.ParameterList(torch.ones(n) for _ in range(3))
        self.last_path = nn.Conv2d(n, 3, 1)

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        """Dequantised (B,C,h,w) -> (B,3,16h,16w), nominally in 0..255, not clamped."""
        h = F.pixel_shuffle(y, self.fold)
        for i, (conv, stride) in enumerate(zip(self.convs, self.strides, strict=True)):
            path = h if i < 3 else self.last_path(h)
            if stride > 1:
                path = F.interpolate(path, scale_factor=stride, mode="nearest")
            h = conv(h)
            h = h + path.to(h.dtype)  # that of autocast, which path need not have
            h = rectified(self.norms[i](h), self.slopes[i]) if i < 3 else h
        return h.float() * 64 + 128


class Gains(nn.Module):
    """Equation 1: 2^(B-1) steps per unit, whatever the quality."""

    def __init__(self, arch: "PaperArchitecture") -> None:
        super().__init__()
        self.latents = arch.latents

    def forward(self, quality: Tensor) -> Tensor:
        """(B,) -> (B,C,1,1)."""
        return quality.new_full((len(quality), self.latents, 1, 1), 2.0 ** (BITS - 1))


class SemanticHead(nn.Module):
    """Semantic analysis (paper, III-D): convolutions and two fully connected layers."""

    integer = bounded = False

    def __init__(self, arch: "PaperArchitecture") -> None:
        super().__init__()
        w = arch.head_width
        self.first, self.second = nn.Conv2d(arch.latents, w, 3, padding=1), nn.Conv2d(w, w, 3, padding=1)
        self.hidden, self.out = nn.Linear(w, w), nn.Linear(w, arch.classes)

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        """(N,C,h,w) cells -> (N,classes) logits."""
        h = F.relu(self.second(F.relu(self.first(y * 4))))
        return self.out(F.relu(self.hidden(h.mean((2, 3)))))


class ChannelPrior(nn.Module):
    """Estimate of the rate in training: a logistic density per channel (equations 5 and 6).

    While transforms are trained, its scales follow the magnitudes around a symbol, as the contexts of the coder do.
    """

    def __init__(self, arch: "PaperArchitecture") -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(arch.latents))
        self.index, self.base = (nn.Parameter(torch.full((arch.latents,), 40.0)) for _ in range(2))
        self.context = nn.Parameter(torch.zeros(2, arch.latents))
        self.register_buffer("log_scales", log_scales(), persistent=False)
        self.log_scales: Tensor

    def forward(self, symbols: Tensor, quality: Tensor, quantised: bool = False) -> tuple[Tensor, Tensor]:
        """Symbols (B,C,h,w) -> mean and scale index of each, same shape."""
        mean, index = (v[None, :, None, None].expand_as(symbols) for v in (self.mean, self.index))
        if not quantised:
            size = symbols.abs()
            neighbours = (9 * F.avg_pool2d(size, 3, 1, 1) - size) / 8
            totals = F.pad(size.cumsum(1), (0, 0, 0, 0, 9, 0))
            channels = (totals[:, 8:-1] - totals[:, :-9]) / 8  # the eight before
            of_neighbours, of_channels = self.context[:, :, None, None]
            index = self.base[:, None, None] + of_neighbours * (neighbours + 0.05).log()
            index = index + of_channels * (channels + 0.05).log()
        return mean, index.clamp(0, SCALES - 1)

    def bits(self, values: Tensor, mean: Tensor, index: Tensor) -> Tensor:
        """-log2 of the logistic mass in unit bins around `values`; same shape."""
        return logistic_bits((values - mean).abs(), scale_of(index, self.log_scales))

    def export(self) -> dict[str, Tensor]:
        """Integers for `StaticPrior`."""
        mean, index = torch.round(self.mean * MEAN_LEVELS), torch.round(self.index * INDEX_LEVELS)
        return {
            "mean": mean.detach().to(torch.int16),
            "index": index.detach().clamp(0, (SCALES - 1) * INDEX_LEVELS).to(torch.uint8),
        }


class StaticPrior:
    """Prior with the same mean and scale everywhere: only the adaptive coder has contexts, as in the paper (III-B).

    Its tensors are those that `ChannelPrior.export` returns.
    """

    def __init__(self, arch: "PaperArchitecture", tensors: Mapping[str, Tensor], device: str = "cpu") -> None:
        self.latents, self.device = arch.latents, device
        # the second step has neighbours on all four sides
        self.steps = [Step(0, self.latents, "1", (), 0), Step(0, self.latents, "2", CROSS, 0)]
        self.mean, self.index = tensors["mean"].to(device), tensors["index"].to(device)
        if self.mean.shape != (self.latents,) or self.index.shape != (self.latents,):
            raise ValueError("the prior has other channels than the architecture")
        self.log_scales = log_scales(device)

    def neighbours(self, symbols: Tensor, trellis: bool = False) -> Neighbours:
        nothing = symbols[..., :1]  # only positions matter: no prediction depends on symbols
        return Neighbours(nothing, nothing)

    def no_neighbours(self, images: int, grid: tuple[int, int], trellis: bool = False) -> Neighbours:
        return self.neighbours(torch.zeros(images, *grid, 1, dtype=torch.int8, device=self.device))

    def update(self, neighbours: Neighbours, step: Step, rows: Tensor, symbols: Tensor) -> None:
        pass

    def move_symbols(
        self,
        state: SymbolState,
        step: Step,
        rows: tuple[Tensor, Tensor],
        predicted: tuple[Tensor, Tensor],
        tables: RateTables,
        quality: Tensor | int,
    ) -> None:
        pass  # the paper's quantiser takes the nearest symbols

    def run(self, number: int, neighbours: Neighbours, rows: Tensor, quality: Tensor | int) -> tuple[Tensor, Tensor]:
        mean, index = (v.expand(len(rows), -1).contiguous() for v in (self.mean, self.index))
        return mean, index


class PaperTransforms(nn.Module):
    """The paper's networks in floating point, which rounds differently on different machines."""

    analysis: nn.Module
    gains: nn.Module
    synthesis: nn.Module
    head: nn.Module

    def __init__(self, networks: Mapping[str, nn.Module], arrays: Arrays, device: torch.device) -> None:
        super().__init__()
        self.device = device
        for name, prefix in (("analysis", ANALYSIS), ("gains", GAINS), ("synthesis", SYNTHESIS), ("head", HEAD)):
            network = networks[name]
            network.float().load_state_dict({k: v.float() for k, v in tensors_below(arrays, prefix).items()})
            self.add_module(name, network)
        self.requires_grad_(False).eval().to(device)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def analyse(self, images: Tensor, quality: NDArray[np.float64]) -> Analysed:
        q = self._quality(quality)
        x = grey_levels(upload(images, self.device)).permute(0, 3, 1, 2)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=analyses_in_bfloat16(self.device)):
            y = self.analysis(x, q).float().nan_to_num()  # weights may be so large that sums overflow
        gain = self.gains(q)
        return Analysed((y * gain).permute(0, 2, 3, 1), y.permute(0, 2, 3, 1))

    def synthesise(
        self, symbols: NDArray[np.int16] | Tensor, quality: NDArray[np.float64], q6: bool, trellis: bool
    ) -> Tensor:
        _refuse(trellis)
        q, unit = self._quality(quality), UNITS_PER_LEVEL if q6 else 1
        y = upload(symbols, self.device).permute(0, 3, 1, 2).float() / self.gains(q)
        x = self.synthesis(y, q)
        x = (x * unit + 0.5).nan_to_num_().clamp_(0, 255 * unit)  # truncation after + 1/2 rounds
        return x.to(torch.int16 if q6 else torch.uint8).permute(0, 2, 3, 1)

    def latents(self, symbols: NDArray[np.int16], quality: NDArray[np.float64], trellis: bool) -> Tensor:
        _refuse(trellis)
        gain = self.gains(self._quality(quality)).permute(0, 2, 3, 1)
        return upload(symbols, self.device).float() / gain

    def score(self, cells: Tensor, quality: NDArray[np.float64]) -> Tensor:
        logits = self.head(cells.permute(0, 3, 1, 2), self._quality(quality))
        return torch.round(torch.sigmoid(logits.nan_to_num()) * 255).to(torch.uint8)

    def _quality(self, quality: NDArray[np.float64]) -> Tensor:
        return upload(torch.tensor(quality, dtype=torch.float32), self.device)


def _refuse(trellis: bool) -> None:
    if trellis:
        raise UnsupportedPayload("header: a trellis, which models of the family 'paper' do not have")


def make_networks(arch: "PaperArchitecture") -> dict[str, nn.Module]:
    """Return the networks that are trained and stored."""
    return {
        "analysis": Analysis(arch),
        "gains": Gains(arch),
        "synthesis": Synthesis(arch),
        "head": SemanticHead(arch),
    }
