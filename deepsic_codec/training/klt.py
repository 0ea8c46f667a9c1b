"""The linear start: Karhunen-Loeve transform of 16x16 RGB blocks of the training images."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepsic_codec.model.exact.prior_formats import SCALE_BITS
from deepsic_codec.model.logistic import SCALES
from deepsic_codec.model.prior import Prior, StepNetwork
from deepsic_codec.payload.constants import LATENT_STRIDE, MAX_QUALITY, MIN_QUALITY, quality_step
from deepsic_codec.training.data import Photographs
from deepsic_codec.training.loss import Networks

#: Values of a block.
BLOCK = 3 * LATENT_STRIDE**2


def block_rows(x: Tensor) -> Tensor:
    """Return the blocks float64 (N,768), in pixel-unshuffle order, of images (B,3,H,W), on the CPU."""
    return F.pixel_unshuffle(x, LATENT_STRIDE).permute(0, 2, 3, 1).reshape(-1, BLOCK).cpu().double()


def block_covariance(photos: Photographs, crops: int) -> Tensor:
    """Return the covariance float64 (768,768) of blocks of random crops, in units of 64 grey levels."""
    rng = np.random.default_rng(0)
    covariance = torch.zeros(BLOCK, BLOCK, dtype=torch.float64)
    count = 0
    edge = min(128, int(photos.pool.shortest.min()) // LATENT_STRIDE * LATENT_STRIDE)
    for _ in range(max(1, crops // 50)):
        rows = block_rows((photos.crops(50, edge, rng) - 128) / 64)
        covariance += rows.T @ rows
        count += len(rows)
    return covariance / count


def klt(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` main components, orthonormal rows, of a covariance, and their variances."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors.flip(1)[:, :count].T, values.flip(0)[:count]


@torch.no_grad()
def linear_start(nets: Networks, photos: Photographs, crops: int) -> None:
    """Set the linear paths of both transforms to the KLT, and the prior to the variance of each latent."""
    covariance = block_covariance(photos, crops)
    basis, variances = (part.float() for part in klt(covariance, nets.arch.latents))
    nets.analysis.linear.weight.copy_(basis[:, :, None, None])
    nets.synthesis.linear.weight.copy_(basis.T[:, :, None, None])
    nets.synthesis.input_scale.copy_(variances.clamp(min=1e-4).rsqrt())
    nets.gains.log2.table.zero_()
    start_scales(nets.prior, variances)


def scale_index(scales: Tensor, log_scales: Tensor) -> Tensor:
    """Return the real-valued indices of logistic scales."""
    index = np.interp(scales.log().cpu().numpy(), log_scales.cpu().numpy(), np.arange(SCALES))
    return torch.from_numpy(index).float()


@torch.no_grad()
def start_scales(prior: Prior, variances: Tensor, first: int = 0) -> None:
    """Set the scales that a prior predicts, without context, for the channels from `first` on.

    Parameters
    ----------
    prior : Prior
    variances : Tensor (C,)
        Of these channels, in units of 64 grey levels.
    first : int
    """
    networks = [network for network in prior.networks if isinstance(network, StepNetwork)]
    knots = torch.linspace(MIN_QUALITY, MAX_QUALITY, len(networks[0].out_bias.table))
    # logistic scale of half the standard deviation, in quantiser steps: image
    # coefficients have heavier tails than their variance tells
    scales = 0.3 * variances.sqrt() * 64 / quality_step(knots)[:, None]  # (knots,C)
    start = (scale_index(scales, prior.log_scales) - SCALES / 2) / 2**SCALE_BITS
    for network, step in zip(networks, prior.steps, strict=True):
        if step.start >= first:
            network.out_bias.table[:, step.count :] = start[:, step.start - first : step.start - first + step.count]
