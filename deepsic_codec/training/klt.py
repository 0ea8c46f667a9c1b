"""The linear start: Karhunen-Loeve transform of 16x16 RGB blocks of the training images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.model.exact.prior import SCALE_BITS
from deepsic_codec.model.logistic import SCALES
from deepsic_codec.model.networks import Analysis, Gains, Synthesis
from deepsic_codec.model.prior import Prior
from deepsic_codec.payload.constants import LATENT_STRIDE, MAX_QUALITY, MIN_QUALITY, quality_step
from deepsic_codec.training.data import Photographs


def block_klt(photos: Photographs, latents: int, crops: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (latents, 768) in pixel-unshuffle order, and the variances (latents,)."""
    rng = np.random.default_rng(seed)
    cov = torch.zeros(3 * LATENT_STRIDE**2, 3 * LATENT_STRIDE**2, dtype=torch.float64)
    seen = 0
    edge = min(128, int(photos.pool.shortest.min()) // LATENT_STRIDE * LATENT_STRIDE)
    for _ in range(max(1, crops // 50)):
        x = photos.crops(50, edge, rng).cpu().double()
        rows = torch.nn.functional.pixel_unshuffle((x - 128) / 64, LATENT_STRIDE)
        flat = rows.permute(0, 2, 3, 1).reshape(-1, cov.shape[0])
        cov += flat.T @ flat
        seen += len(flat)
    values, vectors = torch.linalg.eigh(cov / seen)
    order = values.argsort(descending=True)[:latents]
    return vectors[:, order].T.float(), values[order].float()


def linear_start(
    photos: Photographs, analysis: Analysis, synthesis: Synthesis, gains: Gains, prior: Prior, crops: int = 2000
) -> None:
    """Set both shortcuts to the KLT, and the prior to each latent's variance."""
    basis, variances = block_klt(photos, analysis.linear.weight.shape[0], crops)
    with torch.no_grad():
        analysis.linear.weight.copy_(basis[:, :, None, None])
        synthesis.linear.weight.copy_(basis.T[:, :, None, None])
        synthesis.input_scale.copy_(variances.clamp(min=1e-4).rsqrt())
        gains.log2.table.zero_()
    start_scales(prior, variances)


@torch.no_grad()
def start_scales(prior: Prior, variances: Tensor, first: int = 0) -> None:
    """Let a prior expect of channels ``first`` and on what their variances (C,) say; the rest of it stays."""
    knots = torch.linspace(MIN_QUALITY, MAX_QUALITY, len(prior.networks[0].out_bias.table))
    # logistic scale of half the standard deviation, in quantiser steps: image
    # coefficients have heavier tails than their variance tells
    scales = 0.3 * variances.sqrt() * 64 / quality_step(knots)[:, None]  # (knots, C)
    index = np.interp(scales.log().cpu().numpy(), prior.log_scales.cpu().numpy(), np.arange(SCALES))
    start = (torch.from_numpy(index).float() - SCALES / 2) / 2**SCALE_BITS
    for net, step in zip(prior.networks, prior.steps, strict=True):
        if step.start >= first:
            own = slice(step.start - first, step.start - first + step.count)
            net.out_bias.table[:, step.count :] = start[:, own]
