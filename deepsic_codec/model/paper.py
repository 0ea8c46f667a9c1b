"""Networks as the paper published them (sections III and IV), for comparison.

::

    x (B,3,H,W) - 7x7, 128 / s1 - BN - 5x5, 128 / s2 -(+)- BN - 3x3, 128 / s3 -(+)- BN - 3x3, 128 / s4 -(+)- BN - f(x)
                                   '-- average pooling -'   '-- average pooling -'   '-- average pooling -'

    Q(f) = ceil(32 f) / 32 (equation 1, B = 6, f in (-1, 1])

    Q(f) - 3x3 transposed / s4 - 3x3 / s3 - 5x5 / s2 - 7x7 / s1 - x'
         '------ interpolation ------(+)------(+)-----(+)-----(+)

    Q(f) or f - 3x3 - 3x3 - mean - fully connected - fully connected

The paper leaves open, and here are: ReLU after each batch normalisation but the last (without it
the stages would be one linear map), strides 4, 2, 2, 1 for the two lower rates and 4, 2, 1, 1 for the
two higher ones, independent sigmoids in place of the softmax (so that *unknown* can be said), and lambda1,
which is steered until the estimated rate is the one asked for.  Feature maps at 1/8 are
folded to 1/16 (2x2 positions become channels), so that payloads have the usual grid.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.model.prior import (
    CROSS,
    INDEX_LEVELS,
    MEAN_LEVELS,
    SCALES,
    IntegerPrior,
    Neighbours,
    Pass,
    _scale_table,
    scale_of,
)
from deepsic_codec.payload.constants import LATENT_STRIDE

#: Equation 1: the quantiser's bits.
BITS = 6
KERNELS = (7, 5, 3, 3)
#: The rates of Table I in bits per pixel, and the strides here.
RATES = {0.25: (4, 2, 2, 1), 0.5: (4, 2, 2, 1), 1.0: (4, 2, 1, 1), 1.5: (4, 2, 1, 1)}


@dataclass(frozen=True)
class PaperArchitecture:
    """Sizes of the paper's networks for one rate; stored as JSON in the model file."""

    name: str = "paper-0.5"
    rate: float = 0.5  # bits per pixel that training aims at
    strides: tuple[int, ...] = (4, 2, 2, 1)
    filters: int = 128
    head_width: int = 128
    classes: int = 11

    def __post_init__(self) -> None:
        """Refuse sizes that no such model has."""
        sizes = (self.filters, self.head_width, self.classes)
        if not all(isinstance(n, int) and 1 <= n <= 2048 for n in sizes) or self.rate <= 0:
            raise ValueError("architecture: sizes out of range")
        if len(self.strides) != len(KERNELS) or math.prod(self.strides) not in (8, 16):
            raise ValueError("architecture: expected four strides whose product is 8 or 16")

    @property
    def fold(self) -> int:
        """Positions of the feature map per position of the symbol grid, along each axis."""
        return LATENT_STRIDE // math.prod(self.strides)

    @property
    def latents(self) -> int:
        """Channels of the symbol grid."""
        return self.filters * self.fold**2

    def kmac_per_pixel(self) -> dict[str, float]:
        """Thousands of multiply-accumulates per pixel."""
        area, stages, inputs = 1, [], 3
        for kernel, stride in zip(KERNELS, self.strides, strict=True):
            area *= stride**2
            stages.append(inputs * self.filters * kernel**2 / area / 1e3)
            inputs = self.filters
        head = (9 * self.latents * self.head_width + 9 * self.head_width**2) / 256e3
        head += self.head_width * (self.head_width + self.classes) / 4096e3
        total = sum(stages)
        return {"analysis": total, "prior": 0.0, "synthesis": total, "head": head}

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary with lists in place of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PaperArchitecture:
        """Inverse of :meth:`to_json`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)


class Analysis(nn.Module):
    """Feature extraction (paper, III-A)."""

    def __init__(self, arch: PaperArchitecture) -> None:
        super().__init__()
        n = arch.filters
        self.strides, self.fold = arch.strides, arch.fold
        inputs = (3, n, n, n)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, n, k, s, k // 2, bias=False) for i, k, s in zip(inputs, KERNELS, arch.strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for _ in KERNELS)
        # features of a few steps to begin with: wide ones would have to be unlearned at low rates
        nn.init.constant_(self.norms[-1].get_parameter("weight"), 0.05)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        """(B,3,H,W) in 0..255 -> (B,C,H/16,W/16), half a step above f(x): rounding then is the paper's ceiling."""
        h = (x - 128) / 64
        before: Tensor | None = None
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = conv(h)
            if before is not None:
                h = h + F.avg_pool2d(before, self.strides[i])  # short path
            before = norm(h)
            h = F.relu(before) if i < 3 else before
        half = 0.5 / 2 ** (BITS - 1)
        f = h.float().clamp(half - 1, 1)  # 2^B values of the ceiling, -31..32
        return F.pixel_unshuffle(f, self.fold) + half


class Synthesis(nn.Module):
    """Reconstruction from features (paper, III-C): transposed convolutions beside interpolation."""

    def __init__(self, arch: PaperArchitecture) -> None:
        super().__init__()
        n = arch.filters
        self.strides, self.fold = arch.strides[::-1], arch.fold
        outputs = (n, n, n, 3)
        self.convs = nn.ModuleList()
        for o, k, s in zip(outputs, KERNELS[::-1], self.strides, strict=True):
            p = (k - s + 1) // 2
            self.convs.append(nn.ConvTranspose2d(n, o, k, s, p, output_padding=s - k + 2 * p))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for _ in range(3))
        self.last_path = nn.Conv2d(n, 3, 1)

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        """Dequantised (B,C,h,w) -> (B,3,16h,16w), nominally in 0..255, not clamped."""
        h = F.pixel_shuffle(y, self.fold)
        for i, (conv, stride) in enumerate(zip(self.convs, self.strides, strict=True)):
            path = h if i < 3 else self.last_path(h)
            if stride > 1:
                path = F.interpolate(path, scale_factor=stride, mode="bilinear")
            h = conv(h) + path
            h = F.relu(self.norms[i](h)) if i < 3 else h
        return h.float() * 64 + 128


class Gains(nn.Module):
    """Equation 1: 2^(B-1) steps per unit, whatever the quality."""

    def __init__(self, arch: PaperArchitecture) -> None:
        super().__init__()
        self.latents = arch.latents

    def forward(self, quality: Tensor) -> Tensor:
        """(B,) -> (B,C,1,1)."""
        return quality.new_full((len(quality), self.latents, 1, 1), 2.0 ** (BITS - 1))


class SemanticHead(nn.Module):
    """Semantic analysis (paper, III-D): convolutions and two fully connected layers."""

    def __init__(self, arch: PaperArchitecture) -> None:
        super().__init__()
        w = arch.head_width
        self.first, self.second = nn.Conv2d(arch.latents, w, 3, padding=1), nn.Conv2d(w, w, 3, padding=1)
        self.hidden, self.out = nn.Linear(w, w), nn.Linear(w, arch.classes)

    def forward(self, y: Tensor, quality: Tensor) -> Tensor:
        """(N,C,h,w) cells -> (N,classes) logits."""
        h = F.relu(self.second(F.relu(self.first(y * 4))))
        return self.out(F.relu(self.hidden(h.mean((2, 3)))))


class ChannelPrior(nn.Module):
    """What training takes for the rate: a logistic density per channel (equations 5 and 6)."""

    def __init__(self, arch: PaperArchitecture) -> None:
        super().__init__()
        self.mean, self.index = (nn.Parameter(torch.full((arch.latents,), v)) for v in (0.5, 53.0))
        self.register_buffer("log_scales", torch.tensor(_scale_table(), dtype=torch.float32), persistent=False)
        self.log_scales: Tensor

    def forward(self, symbols: Tensor, quality: Tensor, quantised: bool = False) -> tuple[Tensor, Tensor]:
        """Symbols (B,C,h,w) -> mean and scale index of each, same shape."""
        mean, index = (v[None, :, None, None].expand_as(symbols) for v in (self.mean, self.index))
        return mean, index.clamp(0, SCALES - 1)

    def bits(self, values: Tensor, mean: Tensor, index: Tensor) -> Tensor:
        """-log2 of the logistic mass in unit bins around ``values``; same shape."""
        s, d = scale_of(index, self.log_scales), (values - mean).abs()
        mass = torch.sigmoid((0.5 - d) / s) - torch.sigmoid((-0.5 - d) / s)
        return -torch.log2(mass.clamp(min=1e-9))

    def export(self) -> dict[str, Tensor]:
        """Integers for :class:`StaticPrior`."""
        mean, index = torch.round(self.mean * MEAN_LEVELS), torch.round(self.index * INDEX_LEVELS)
        return {
            "mean": mean.detach().to(torch.int16),
            "index": index.detach().clamp(0, (SCALES - 1) * INDEX_LEVELS).to(torch.uint8),
        }


class StaticPrior(IntegerPrior):
    """The same mean and scale everywhere, so that all context is the adaptive coder's, as in the paper (III-B).

    Takes the place of the learned integer prior, of which it uses nothing.
    """

    optimised = False  # the quantiser is the paper's

    def __init__(self, arch: PaperArchitecture, tensors: dict[str, Tensor], device: str = "cpu") -> None:
        self.latents, self.device = arch.latents, device
        # the second pass sees neighbours on all four sides
        self.steps = [Pass(0, self.latents, "1", (), 0), Pass(0, self.latents, "2", CROSS, 0)]
        self.mean, self.index = tensors["mean"].to(device), tensors["index"].to(device)
        if self.mean.shape != (self.latents,) or self.index.shape != (self.latents,):
            raise ValueError("the prior has other channels than the architecture")
        self.log_scales = torch.tensor(_scale_table(), dtype=torch.float32, device=device)

    def neighbours(self, symbols: Tensor) -> Neighbours:
        """Places of symbols (B,h,w,C); no values are needed."""
        nothing = symbols[..., :1]
        return Neighbours(nothing, nothing)

    def no_neighbours(self, images: int, grid: tuple[int, int]) -> Neighbours:
        """The same."""
        return self.neighbours(torch.zeros(images, *grid, 1, dtype=torch.int8, device=self.device))

    def update(self, neighbours: Neighbours, step: Pass, rows: Tensor, symbols: Tensor) -> None:
        """Nothing depends on decoded symbols here."""

    def run(self, number: int, neighbours: Neighbours, rows: Tensor, quality: Tensor | int) -> tuple[Tensor, Tensor]:
        """Means in eighths (P,C) int16 and scale indices in quarters (P,C) uint8."""
        return tuple(v.expand(len(rows), -1).contiguous() for v in (self.mean, self.index))  # type: ignore[return-value]
