"""The joint loss L = R + lambda1 D + lambda2 L_sem (paper, equations 3 to 7).

As printed the equations have slips that are put right here: (3) is the cross-entropy of
the scores, (5) integrates over bins as wide as the quantiser's step, and (6) has a minus
sign, R = -E sum log2 P.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.exact.export import export_prior
from deepsic_codec.model.exact.fixed import ste_round
from deepsic_codec.model.families import family_of
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.networks import Analysis, Gains, SemanticHead, Synthesis, step_lambda
from deepsic_codec.model.paper import ChannelPrior, PaperArchitecture
from deepsic_codec.model.prior import Prior
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE, quality_step

#: Factors of the learning rate: of the linear paths, whose entries are small and good from the start, and of the prior,
#: which follows the transforms.
LINEAR_FACTOR, PRIOR_FACTOR = 0.1, 2.0


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
    def can_be_recorded(self) -> bool:
        """Whether their loss is the same operations at every step, so that a CUDA graph can hold it."""
        return True

    @property
    def can_be_shared(self) -> bool:
        """Whether processes can share out the images of a step."""
        return True

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
        """See :func:`forward_terms`."""
        return forward_terms(self, x, quality, bf16, quantised)

    def loss(self, terms: Terms, quality: Tensor) -> Tensor:
        """See :func:`rate_distortion`."""
        return rate_distortion(terms, quality)

    def export_prior(self) -> dict[str, Tensor]:
        """Integer tensors of the prior, on the CPU, as a model file has them."""
        return export_prior(copy.deepcopy(self.prior).cpu())

    def integer_prior(self, exported: dict[str, Tensor], device: str) -> CodingPrior:
        """What codes symbols with such tensors."""
        return family_of(self.arch).prior(self.arch, exported, device)

    def floating(self) -> AbstractContextManager[None]:
        """Return a context in which the analysis computes in floating point."""
        return self.analysis.floating()

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by their factor of the learning rate."""
        linear = [self.analysis.linear.weight, self.synthesis.linear.weight]
        prior = list(self.prior.parameters())
        special = {id(p) for p in linear + prior}
        other = [p for p in self.parameters() if id(p) not in special]
        factors = ((other, 1.0), (linear, LINEAR_FACTOR), (prior, PRIOR_FACTOR))
        return [{"params": params, "factor": factor} for params, factor in factors]


class PaperNetworks(Networks):
    """The paper's own networks, trained for one rate."""

    can_be_recorded = False  # normalisation changes on the way
    can_be_shared = False  # and needs statistics of whole batches

    #: Batches that are normalised by their own statistics.
    NORMALISED = 1000
    #: Bounds of ln lambda1: what suits 0.1 and 3 bits per pixel, so that a bad start does not carry it away.
    LOG_LAMBDA = (math.log(0.001), math.log(0.8))

    def __init__(self, arch: PaperArchitecture) -> None:
        nn.Module.__init__(self)
        self.arch = arch
        for name, network in family_of(arch).networks(arch).items():
            self.add_module(name, network)
        self.prior = ChannelPrior(arch)
        # lambda1 of equation 4 is steered, so that the estimated rate comes to what is asked for
        self.register_buffer("log_lambda", torch.tensor(math.log(0.02)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def terms(self, x: Tensor, quality: Tensor, bf16: bool, quantised: bool = False) -> Terms:
        """See :func:`forward_terms`.

        Photographs and tiles differ in their statistics, and a stored model has one set for
        both: after some batches the normalisation is an affine map that training goes on with.
        """
        if self.training:
            self.seen += 1
            if int(self.seen) > self.NORMALISED:
                for module in self.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
        return forward_terms(self, x, quality, bf16, quantised)

    def loss(self, terms: Terms, quality: Tensor) -> Tensor:
        """R + lambda1 D (equation 4); each call in training moves lambda1 towards the wanted rate."""
        if self.training:
            off = math.log(self.arch.rate) - torch.log(terms.rate.detach().mean().clamp(min=1e-3))
            self.log_lambda.add_(0.005 * off.clamp(-1, 1)).clamp_(*self.LOG_LAMBDA)
        weight = torch.exp(self.log_lambda)
        return ((terms.rate + weight * terms.distortion) / (1 + 50 * weight)).mean()

    def export_prior(self) -> dict[str, Tensor]:
        """Integer mean and scale index of each channel, on the CPU."""
        return copy.deepcopy(self.prior).cpu().export()

    def floating(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing: these networks have no other form."""
        return nullcontext()

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by their factor of the learning rate; scale indices move by whole steps."""
        prior = list(self.prior.parameters())
        other = [p for p in self.parameters() if all(p is not q for q in prior)]
        return [{"params": other, "factor": 1.0}, {"params": prior, "factor": 20 * PRIOR_FACTOR}]


#: Networks to be trained, by family.
TRAINED: dict[str, type[Networks]] = {Architecture.family: Networks, PaperArchitecture.family: PaperNetworks}


def make_networks(arch: Sizes) -> Networks:
    """Networks to be trained of an architecture."""
    return TRAINED[arch.family](arch)


@dataclass
class Terms:
    """Per-image terms of the loss, each (B,): bits per pixel, mean squared error; cell logits."""

    rate: Tensor
    distortion: Tensor
    logits: Tensor

    def slice(self, images: slice) -> Terms:
        """Return the terms of a part of the images."""
        return Terms(self.rate[images], self.distortion[images], self.logits[images])


def forward_terms(nets: Networks, x: Tensor, quality: Tensor, bf16: bool, quantised: bool = False) -> Terms:
    """Run the whole codec on images (B,3,H,W) in 0..255 at qualities (B,).

    The rate is measured on latents with uniform noise, the distortion and the contexts of
    the prior on rounded ones (straight-through).  The head sees the float latents of half
    of the images and the rounded ones of the other half, so that one head serves both the
    pre-semantic and the post-semantic architecture.  ``quantised`` asks for the prior's
    integer form.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        y = nets.analysis(x, quality)
    gain = nets.gains(quality)
    scaled = y * gain
    symbols = ste_round(scaled)
    noisy = scaled + torch.rand_like(scaled) - 0.5 if nets.training else symbols
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        mean, index = nets.prior(symbols, quality, quantised)
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
    n = LABEL_CELL // LATENT_STRIDE
    b, _, h, w = y.shape
    per_cell = quality.repeat_interleave(h // n * (w // n))
    return head(cells_of(y), per_cell).reshape(b, h // n, w // n, -1)


def cells_of(y: Tensor) -> Tensor:
    """Latents (B,C,h,w) -> cells (B h/4 w/4, C, 4, 4), row-major."""
    n = LABEL_CELL // LATENT_STRIDE
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

    ``targets`` (...,) holds class numbers, the last class being *unknown*.
    """
    wanted = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1).mean()
