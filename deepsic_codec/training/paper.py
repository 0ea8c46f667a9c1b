"""Training of the paper's networks, each for one rate."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from deepsic_codec.model.families import family_of
from deepsic_codec.model.networks import lambda_of_step
from deepsic_codec.model.paper import PaperArchitecture
from deepsic_codec.model.paper_networks import BITS, ChannelPrior
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.training.data import Photographs
from deepsic_codec.training.klt import block_covariance, klt, scale_index
from deepsic_codec.training.loss import Networks, Terms

#: Quantiser's steps of the linear start in grey levels. They and the lambda1 that matches them make about each rate.
STEPS = {0.25: 115.0, 0.5: 68.0, 1.0: 34.0, 1.5: 22.0}
#: Deviations of a component that the quantiser's range must hold on each side.
RANGE = 3.0
#: Smallest variance of a component, in units of 64 grey levels.
MIN_VARIANCE = 1e-4
#: Factors of the learning rate for means and scale indices of the prior; indices move by whole steps.
MEAN_FACTOR, INDEX_FACTOR = 5.0, 100.0

Stages = list[tuple[Tensor, Tensor]]


class PaperNetworks(Networks):
    """The paper's networks. The statistics of batch normalisation stay those of the linear start."""

    arch: PaperArchitecture  # type: ignore[assignment]
    prior: ChannelPrior  # type: ignore[assignment]

    def __init__(self, arch: PaperArchitecture) -> None:
        nn.Module.__init__(self)
        self.arch = arch
        for name, network in family_of(arch).networks(arch).items():
            self.add_module(name, network)
        self.prior = ChannelPrior(arch)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules but batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def loss(self, terms: Terms, quality: Tensor) -> Tensor:
        """Return the mean of R + lambda1 D (equation 4), weighted as in `Networks.loss`."""
        step = step_of(self.arch)
        return (step / 20 * (terms.rate + lambda_of_step(step) * terms.distortion)).mean()

    def export_prior(self) -> dict[str, Tensor]:
        """Return the integer mean and scale index of each channel, on the CPU."""
        return copy.deepcopy(self.prior).cpu().export()

    def floating(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing: these networks have no integer form."""
        return nullcontext()

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters by their factor of the learning rate."""
        networks = [p for name, p in self.named_parameters() if not name.startswith("prior.")]
        indices = [self.prior.index, self.prior.base, self.prior.context]
        factors = ((networks, 1.0), ([self.prior.mean], MEAN_FACTOR), (indices, INDEX_FACTOR))
        return [{"params": params, "factor": factor} for params, factor in factors]


def step_of(arch: PaperArchitecture) -> float:
    """Return the step in grey levels of the rate that is nearest to an architecture's."""
    return STEPS[min(STEPS, key=lambda rate: abs(rate - arch.rate))]


@torch.no_grad()
def paper_start(nets: PaperNetworks, photos: Photographs, crops: int) -> None:
    """Let stages of the analysis be Karhunen-Loeve transforms of the stages before, and the synthesis their inverse.

    Convolutions subtract what the short paths add.

    Parameters
    ----------
    nets : PaperNetworks
    photos : Photographs
    crops : int
        Number of crops that the transforms are computed from.
    """
    stages = _stages(block_covariance(photos, crops), nets.arch)
    _start_analysis(nets.analysis, stages, nets.arch)
    _start_synthesis(nets.synthesis, stages, nets.arch)
    deviations = stages[-1][1]
    features = deviations / _units(nets.arch, deviations)
    sizes = 4 * features.repeat_interleave(nets.arch.fold**2).clamp(min=0.02)  # of what the head's first layer sees
    nets.head.get_submodule("first").get_parameter("weight").div_(sizes[:, None, None])
    scales = 0.3 * 2 ** (BITS - 1) * features  # as in `start_scales`
    index = scale_index(scales, nets.prior.log_scales).repeat_interleave(nets.arch.fold**2)
    for parameter in (nets.prior.index, nets.prior.base):
        parameter.copy_(index)


def _stages(covariance: Tensor, arch: PaperArchitecture) -> Stages:
    """Return, for each stage, components (n,channels,stride,stride) of the stage before and their deviations (n,)."""
    stages, channels, edge = [], 3, LATENT_STRIDE
    for _, _, stride in arch.convolutions:
        n = edge // stride
        blocks = covariance.reshape(2 * (channels, n, stride, n, stride))
        mean = torch.einsum("ciyjxdiujv->cyxduv", blocks) / n**2
        size = channels * stride**2
        basis, variances = klt(mean.reshape(size, size), arch.filters)
        basis = basis.reshape(-1, channels, stride, stride)
        covariance = torch.einsum("kcyx,ciyjxdpuqv,lduv->kijlpq", basis, blocks, basis)
        channels, edge = len(basis), n
        stages.append((basis.float(), variances.clamp(min=MIN_VARIANCE).sqrt().float()))
    return stages


def _units(arch: PaperArchitecture, deviations: Tensor) -> Tensor:
    """Return what is 1 in the features of each component (n,): the quantiser's steps times their number."""
    return (RANGE * deviations).clamp(min=2 ** (BITS - 1) * step_of(arch) / 64)


def _start_analysis(analysis: nn.Module, stages: Stages, arch: PaperArchitecture) -> None:
    before = torch.ones(3)
    convs, norms = (analysis.get_submodule(name) for name in ("convs", "norms"))
    for number, (conv, norm) in enumerate(zip(convs.children(), norms.children(), strict=True)):
        (basis, deviations), (_, kernel, stride) = stages[number], arch.convolutions[number]
        count, channels = basis.shape[:2]
        first = kernel // 2
        block = slice(first, first + stride)
        weight = conv.get_parameter("weight").zero_()
        weight[:count, :channels, block, block] = basis * before[:, None, None]
        if number:
            weight.diagonal()[block, block] -= stride**-2
        else:  # channels that are left over have the components of blocks 2 pixels above
            left = weight[count:]
            left[:count, :, first - 2 : first - 2 + stride, block] = basis[: len(left)]
        norm.get_buffer("running_var")[:count] = deviations**2
        before = deviations
    norm.get_parameter("weight").copy_(deviations / _units(arch, deviations))
    norm.get_parameter("bias").fill_(-0.5 / 2 ** (BITS - 1))  # zeros lie in the middle of a step


def _start_synthesis(synthesis: nn.Module, stages: Stages, arch: PaperArchitecture) -> None:
    scales, norms = _units(arch, stages[-1][1]), synthesis.get_submodule("norms")
    for number, conv in enumerate(synthesis.get_submodule("convs").children()):
        (basis, _), (_, kernel, stride) = stages[-1 - number], arch.convolutions[-1 - number]
        count, channels = basis.shape[:2]
        first = (kernel - stride + 1) // 2
        block = slice(first, first + stride)
        weight = conv.get_parameter("weight").zero_()
        weight[:count, :channels, block, block] = basis * scales[:, None, None, None]
        conv.get_parameter("bias").zero_()
        if number < len(stages) - 1:
            weight.diagonal()[block, block] -= 1
            scales = stages[-2 - number][1]
            norms.get_submodule(str(number)).get_buffer("running_var")[: len(scales)] = scales**2
    for parameter in synthesis.get_submodule("last_path").parameters():
        parameter.zero_()
