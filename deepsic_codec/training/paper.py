"""Training of the paper's networks, each for one rate."""

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from deepsic_codec.model.families import family_of
from deepsic_codec.model.paper import PaperArchitecture
from deepsic_codec.model.paper_networks import ChannelPrior
from deepsic_codec.training.loss import PRIOR_FACTOR, Networks, Terms

#: Batches that are normalised by their statistics.
NORMALISED_BATCHES = 1000
#: Bounds of ln lambda1: its values for about 0.1 and 3 bits per pixel. A bad start cannot move it further.
LOG_LAMBDA = (math.log(0.001), math.log(0.8))


class PaperNetworks(Networks):
    """The paper's networks. Training steers lambda1 so that the estimated rate becomes that of the architecture."""

    uses_batch_statistics = True
    arch: PaperArchitecture  # type: ignore[assignment]
    prior: ChannelPrior  # type: ignore[assignment]

    def __init__(self, arch: PaperArchitecture) -> None:
        nn.Module.__init__(self)
        self.arch = arch
        for name, network in family_of(arch).networks(arch).items():
            self.add_module(name, network)
        self.prior = ChannelPrior(arch)
        self.register_buffer("log_lambda", torch.tensor(math.log(0.02)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.log_lambda: Tensor
        self.batches: Tensor

    def terms(self, x: Tensor, quality: Tensor, bf16: bool, quantised: bool = False) -> Terms:
        """Run the whole codec on images, as `Networks.terms`.

        Photographs and tiles differ in their statistics, and a stored model has one set for both. After some batches,
        the normalisation therefore stays as it is.
        """
        if self.training:
            self.batches += 1
            if int(self.batches) > NORMALISED_BATCHES:
                for module in self.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
        return super().terms(x, quality, bf16, quantised)

    def loss(self, terms: Terms, quality: Tensor) -> Tensor:
        """Return R + lambda1 D (equation 4). In training, each call moves lambda1 towards the rate to reach."""
        if self.training:
            error = math.log(self.arch.rate) - torch.log(terms.rate.detach().mean().clamp(min=1e-3))
            self.log_lambda.add_(0.005 * error.clamp(-1, 1)).clamp_(*LOG_LAMBDA)
        weight = torch.exp(self.log_lambda)
        return ((terms.rate + weight * terms.distortion) / (1 + 50 * weight)).mean()

    def export_prior(self) -> dict[str, Tensor]:
        """Return the integer mean and scale index of each channel, on the CPU."""
        return copy.deepcopy(self.prior).cpu().export()

    def floating(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing: these networks have no integer form."""
        return nullcontext()

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by their factor of the learning rate; scale indices move by whole steps."""
        prior = list(self.prior.parameters())
        other = [p for p in self.parameters() if all(p is not q for q in prior)]
        return [{"params": other, "factor": 1.0}, {"params": prior, "factor": 20 * PRIOR_FACTOR}]
