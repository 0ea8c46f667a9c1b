"""The joint loss L = R + lambda1 D + lambda2 L_sem (paper, equations 3 to 7).

As printed the equations have slips that are put right here: (3) is the cross-entropy of
the scores, (5) integrates over bins as wide as the quantiser's step, and (6) has a minus
sign, R = -E sum log2 P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.model.networks import (
    LABEL_CELL,
    STRIDE,
    Analysis,
    Architecture,
    Gains,
    SemanticHead,
    Synthesis,
    quality_step,
    step_lambda,
)
from deepsic_codec.model.prior import Prior, ste_round


class Networks(nn.Module):
    """Everything that is trained."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.analysis = Analysis(arch)
        self.synthesis = Synthesis(arch)
        self.gains = Gains(arch)
        self.prior = Prior(arch)
        self.head = SemanticHead(arch)


@dataclass
class Terms:
    """Per-image terms of the loss, each (B,): bits per pixel, mean squared error; cell logits."""

    rate: Tensor
    distortion: Tensor
    logits: Tensor


def forward_terms(nets: Networks, x: Tensor, quality: Tensor, bf16: bool) -> Terms:
    """Run the whole codec on images (B,3,H,W) in 0..255 at qualities (B,).

    The rate is measured on latents with uniform noise, the distortion and the contexts of
    the prior on rounded ones (straight-through).  The head sees the float latents of half
    of the images and the rounded ones of the other half, so that one head serves both the
    pre-semantic and the post-semantic architecture.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = nets.analysis(x, quality)
    gain = nets.gains(quality)
    scaled = y * gain
    symbols = ste_round(scaled)
    noisy = scaled + torch.rand_like(scaled) - 0.5 if nets.training else symbols
    mean, index = nets.prior(symbols, quality)
    pixels = x.shape[2] * x.shape[3]
    rate = nets.prior.bits(noisy, mean, index).sum((1, 2, 3)) / pixels
    decoded = symbols / gain
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        xhat = nets.synthesis(decoded, quality)
        pre = torch.arange(len(y), device=y.device)[:, None, None, None] % 2 == 0
        logits = cell_logits(nets.head, torch.where(pre, y, decoded), quality)
    distortion = (xhat - x).square().mean((1, 2, 3))
    return Terms(rate, distortion, logits.float())


def cell_logits(head: SemanticHead, y: Tensor, quality: Tensor) -> Tensor:
    """Latents (B,C,h,w), h and w multiples of 4 -> logits (B,h/4,w/4,classes), cell by cell."""
    n = LABEL_CELL // STRIDE
    b, _, h, w = y.shape
    per_cell = quality.repeat_interleave(h // n * (w // n))
    return head(cells_of(y), per_cell).reshape(b, h // n, w // n, -1)


def cells_of(y: Tensor) -> Tensor:
    """Latents (B,C,h,w) -> cells (B h/4 w/4, C, 4, 4), row-major."""
    n = LABEL_CELL // STRIDE
    b, c, h, w = y.shape
    cells = y.reshape(b, c, h // n, n, w // n, n).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(-1, c, n, n)


def rate_distortion(terms: Terms, quality: Tensor) -> Tensor:
    """R + lambda1 D, weighted so that every quality contributes about equally."""
    # an orthonormal transform spends roughly 20 / step bits per pixel on photographs
    weight = quality_step(quality) / 20
    return (weight * (terms.rate + step_lambda(quality) * terms.distortion)).mean()


def semantic(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of independent sigmoids, summed over classes, mean over cells.

    ``targets`` (...,) holds class numbers; the last class is *unknown*.
    """
    wanted = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1).mean()
