"""The networks that are trained, and their joint loss L = R + lambda1 D + lambda2 L_sem (paper, equations 3 to 7).

Three equations are corrected here: (3) is the cross-entropy of the scores, (5) integrates over bins as wide as the
quantiser's step, and (6) has a minus sign, R = -E sum log2 P.
"""

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact.export import export_prior
from deepsic_codec.model.exact.fixed import ste_round
from deepsic_codec.model.families import family_of
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.networks import Analysis, Gains, SemanticHead, Synthesis, step_lambda
from deepsic_codec.model.prior import Prior
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE, quality_step

#: Factors of the learning rate: the linear paths are good from the start, the prior follows the transforms, and the
#: filter has few weights, each of which sees every pixel.
LINEAR_FACTOR, PRIOR_FACTOR, FILTER_FACTOR = 0.1, 2.0, 8.0


@dataclass
class Terms:
    """Terms of the loss for each of B images.

    Attributes
    ----------
    rate : Tensor (B,)
        Bits per pixel.
    distortion : Tensor (B,)
        Mean squared error.
    logits : Tensor (B,rows,columns,classes)
        Of each cell.
    """

    rate: Tensor
    distortion: Tensor
    logits: Tensor

    def slice(self, images: slice) -> "Terms":
        """Return the terms of a part of the images."""
        return Terms(self.rate[images], self.distortion[images], self.logits[images])


class Networks(nn.Module):
    """All networks that are trained."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.analysis = Analysis(arch)
        self.synthesis = Synthesis(arch)
        self.gains = Gains(arch)
        self.prior = Prior(arch)
        self.head = SemanticHead(arch)

    @property
    def stores_integers(self) -> bool:
        """Whether a model file of this architecture has transforms and head as integers."""
        return family_of(self.arch).exact

    @property
    def integer(self) -> bool:
        """Whether the transforms imitate their integer form."""
        return self.analysis.integer

    @integer.setter
    def integer(self, value: bool) -> None:
        self.analysis.integer = self.synthesis.integer = value

    @property
    def bounded(self) -> bool:
        """Whether transforms and head in floating point clip what their integer form clips."""
        return self.analysis.bounded

    @bounded.setter
    def bounded(self, value: bool) -> None:
        self.analysis.bounded = self.synthesis.bounded = self.head.bounded = value

    def terms(self, x: Tensor, quality: Tensor, bf16: bool, quantised: bool = False) -> Terms:
        """Run the whole codec on images.

        The rate is that of latents with uniform noise. The distortion and the contexts of the prior come from rounded
        latents, with straight-through gradients. The head gets float latents of every other image and rounded ones of
        the rest, so that one head serves labels that are stored and labels that are computed later.

        Parameters
        ----------
        x : Tensor (B,3,H,W)
            0 to 255.
        quality : Tensor (B,)
        bf16 : bool
            Compute in bfloat16 where that is precise enough.
        quantised : bool
            Let the prior imitate its integer form.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            y = self.analysis(x, quality)
        gain = self.gains(quality)
        scaled = y * gain
        symbols = ste_round(scaled)
        noisy = scaled + torch.rand_like(scaled) - 0.5 if self.training else symbols
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            mean, index = self.prior(symbols, quality, quantised)
        pixels = x.shape[2] * x.shape[3]
        rate = self.prior.bits(noisy, mean, index).sum((1, 2, 3)) / pixels
        rounded = symbols / gain
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            decoded = self.synthesis(rounded, quality)
            is_float = torch.arange(len(y), device=y.device)[:, None, None, None] % 2 == 0
            logits = cell_logits(self.head, torch.where(is_float, y, rounded), quality)
        distortion = (decoded - x).square().mean((1, 2, 3))
        return Terms(rate, distortion, logits.float())

    def loss(self, terms: Terms, quality: Tensor) -> Tensor:
        """Return the mean of R + lambda1 D, weighted so that all qualities contribute about equally."""
        # an orthonormal transform spends roughly 20 / step bits per pixel on photographs
        weight = quality_step(quality) / 20
        return (weight * (terms.rate + step_lambda(quality) * terms.distortion)).mean()

    def export_prior(self) -> dict[str, Tensor]:
        """Return the prior's integer tensors on the CPU, as a model file has them."""
        return export_prior(copy.deepcopy(self.prior).cpu())

    def integer_prior(self, exported: dict[str, Tensor], device: str) -> CodingPrior:
        """Return the prior that codes symbols, from exported tensors."""
        return family_of(self.arch).prior(self.arch, exported, device)

    def floating(self) -> AbstractContextManager[None]:
        """Return a context in which the analysis computes in floating point."""
        return self.analysis.floating()

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by their factor of the learning rate."""
        linear = [self.analysis.linear.weight, self.synthesis.linear.weight]
        prior, of_filter = list(self.prior.parameters()), list(self.synthesis.filter.parameters())
        special = {id(p) for p in linear + prior + of_filter}
        other = [p for p in self.parameters() if id(p) not in special]
        factors = ((other, 1.0), (linear, LINEAR_FACTOR), (prior, PRIOR_FACTOR), (of_filter, FILTER_FACTOR))
        return [{"params": params, "factor": factor} for params, factor in factors]


def cell_logits(head: nn.Module, y: Tensor, quality: Tensor) -> Tensor:
    """Return logits (B,h/4,w/4,classes) of latents (B,C,h,w), h and w multiples of 4, at qualities (B,)."""
    n = LABEL_CELL // LATENT_STRIDE
    b, _, h, w = y.shape
    qualities = quality.repeat_interleave(h // n * (w // n))
    return head(cells_of(y), qualities).reshape(b, h // n, w // n, -1)


def cells_of(y: Tensor) -> Tensor:
    """Return the cells (B*h/4*w/4,C,4,4) of latents (B,C,h,w), row by row."""
    n = LABEL_CELL // LATENT_STRIDE
    b, c, h, w = y.shape
    cells = y.reshape(b, c, h // n, n, w // n, n).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(-1, c, n, n)


def semantic(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of independent sigmoids, summed over classes, as mean over cells.

    Parameters
    ----------
    logits : Tensor (...,classes)
        The last class is *unknown*.
    targets : int64 Tensor (...,)
        Numbers of the true classes.
    """
    expected = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, expected, reduction="none").sum(-1).mean()
