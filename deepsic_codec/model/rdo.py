"""Rate-distortion optimised quantisation: symbols that cost more bits than their error is worth.

A symbol is moved one step towards the prior's mean where that lowers D + R / lambda.  The
bit stream and the decoder know nothing of it; it is the encoder's first level of effort
(latent refinement in the sense of Nonlinear Transform Coding, in its cheapest form).  What
a move saves and what an error costs are tables of integers in the model file, so that equal
images give equal payloads on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from deepsic_codec.model.fixed import LATENT_BITS, STEP_BITS
from deepsic_codec.model.networks import step_lambda
from deepsic_codec.model.prior import INDEX_LEVELS, MEAN_LEVELS, SCALES, IntegerPrior, passes, scale_of

#: Weight of the distortion against lambda of the nominal step.  Moving a symbol also spoils
#: the contexts of others' means; 1 to 2.2 were tried on photographs, 1.5 was best.
TRADE = 1.5
#: Fraction bits of both tables' entries, which count bits, and of the rounding error of a symbol.
BITS = 8
#: Distances from the mean, in units of 1 / MEAN_LEVELS, that the table knows.
DISTANCES = 256
#: Grey levels that one unit of a latent stands for.
UNIT = 64.0


@dataclass
class RdoTables:
    """What moving a symbol is worth.

    Attributes
    ----------
    saved : Tensor
        int16 (scale indices, DISTANCES): bits that a step towards the mean saves.
    price : Tensor
        int32 (100,C): bits that the squared error of one whole step is worth, by quality.
    """

    saved: Tensor
    price: Tensor

    def to(self, device: torch.device | str) -> RdoTables:
        """The same on a device, as 32-bit integers."""
        return RdoTables(*(t.to(device=device, dtype=torch.int32) for t in (self.saved, self.price)))

    def check(self, latents: int) -> RdoTables:
        """Return itself; raises ValueError for tables of other sizes."""
        rows = (SCALES - 1) * INDEX_LEVELS + 1
        if self.saved.shape != (rows, DISTANCES) or self.price.shape != (100, latents):
            raise ValueError("tables of the optimised quantiser have other sizes")
        return self


@torch.no_grad()
def make_tables(log_scales: Tensor, steps: Tensor) -> RdoTables:
    """Tables for a prior's logarithms of scales (SCALES,) and dequantiser steps int32 (100,C)."""
    index = torch.arange((SCALES - 1) * INDEX_LEVELS + 1, dtype=torch.float64) / INDEX_LEVELS
    scale = scale_of(index, log_scales.cpu().double())[:, None]
    distance = torch.arange(DISTANCES, dtype=torch.float64) / MEAN_LEVELS
    saved = _bits(distance, scale) - _bits((distance - 1).abs(), scale)
    quality = torch.arange(1, 101, dtype=torch.float64)
    step = steps.cpu().double() * 2.0 ** -(LATENT_BITS + STEP_BITS) * UNIT  # in grey levels
    # three samples share a pixel's bits
    price = TRADE * step_lambda(quality)[:, None] / 3 * step**2
    return RdoTables(
        torch.floor(saved * 2**BITS + 0.5).clamp(-(2**15), 2**15 - 1).to(torch.int16),
        torch.floor(price * 2**BITS + 0.5).clamp(0, 2**21).to(torch.int32),
    )


def quantise(
    prior: IntegerPrior, tables: RdoTables | None, scaled: Tensor, quality: Tensor | int, effort: int
) -> Tensor:
    """Choose the symbols of a batch of images.

    Parameters
    ----------
    prior : IntegerPrior
        What will code them.
    tables : RdoTables, optional
        On the prior's device; without them every symbol is the nearest.
    scaled : Tensor
        Latents in units of the quantiser's step, float32 (N,h,w,C).
    quality : Tensor or int
        Whole qualities 1..100, int64 (N,), or that of all.
    effort : int
        Rounds of optimisation; 0 rounds to the nearest integer and stops.

    Returns
    -------
    Tensor
        int32 (N,h,w,C).
    """
    rounded = torch.round(scaled)
    nearest = rounded.to(torch.int32)
    if tables is None or not prior.optimised:
        return nearest
    compiled = _compiled(scaled.device)
    latents, whole = scaled.flatten(0, 2), nearest.flatten(0, 2)
    error = None if compiled else torch.floor((rounded - scaled) * 2**BITS + 0.5).to(torch.int32).flatten(0, 2)
    symbols = nearest
    for _ in range(effort):
        neighbours = prior.neighbours(symbols)
        chosen = whole.clone()
        for number, step, rows, flat, image in passes(prior, neighbours):
            which = quality if isinstance(quality, int) else quality[image]
            means, indices = prior.run(number, neighbours, rows, which)
            if error is None:
                _move_in_place(tables, chosen, whole, latents, flat, means, indices, which, step.start)
            else:
                own = slice(step.start, step.start + step.count)
                moves = _moves(tables, whole[flat, own] * MEAN_LEVELS - means, indices, which, error[flat, own], own)
                chosen[:, own] = chosen[:, own].index_add(0, flat, moves)
        symbols = chosen.reshape(scaled.shape)
    return symbols


def _compiled(device: torch.device) -> bool:
    """Whether a compiled loop does it there, and not tensors."""
    return device.type == "cpu"


def _move_in_place(
    tables: RdoTables, chosen: Tensor, whole: Tensor, latents: Tensor, rows: Tensor, means: Tensor, indices: Tensor,
    quality: Tensor | int, start: int,
) -> None:  # fmt: skip
    """See :func:`_move`."""
    tensors = chosen, whole, latents, rows, means, indices, tables.saved, tables.price
    qualities = np.full(1, quality) if isinstance(quality, int) else quality.numpy()
    given: Any = [*(t.numpy() for t in tensors), qualities, start]
    _move(*given)


def _moves(
    tables: RdoTables, away: Tensor, indices: Tensor, quality: Tensor | int, error: Tensor, channels: slice
) -> Tensor:
    """Steps, int32 (P,n), that symbols of n channels in a row are to be moved, at qualities (P,).

    ``away`` is how far they lie from their means, in eighths, and ``error`` by how much they were
    rounded. Nothing here makes a GPU wait for the host.
    """
    towards = -torch.sign(away)
    saved = tables.saved[indices.long(), away.abs().clamp(max=DISTANCES - 1)]
    cost = (tables.price[quality - 1][..., channels] * ((1 << BITS) + 2 * towards * error)) >> BITS
    return torch.where((saved > cost) & (away.abs() > MEAN_LEVELS // 2), towards, 0).to(torch.int32)


@njit(nogil=True, cache=True)
def _move(chosen, whole, latents, rows, means, indices, saved, price, quality, start):  # type: ignore[no-untyped-def]
    """The same on a CPU, in place: most symbols are what the prior expects, and are left at a glance.

    ``chosen`` and ``whole`` are symbols int32, ``latents`` in steps float32, all (positions,C); ``rows`` (P,) the
    positions of this pass, which starts at channel ``start``; qualities are (P,), or (1,) if it is one.
    """
    one, half = np.float32(1 << BITS), np.float32(0.5)
    for p in range(len(rows)):
        row, q = rows[p], quality[p if len(quality) > 1 else 0] - 1
        for i in range(means.shape[1]):
            c = start + i
            away = whole[row, c] * MEAN_LEVELS - means[p, i]
            if abs(away) <= MEAN_LEVELS // 2:
                continue
            # in single precision, as elsewhere
            error = np.int64(np.floor((np.float32(whole[row, c]) - latents[row, c]) * one + half))
            towards = -1 if away > 0 else 1
            cost = (price[q, c] * ((1 << BITS) + 2 * towards * error)) >> BITS
            if saved[indices[p, i], min(abs(away), DISTANCES - 1)] > cost:
                chosen[row, c] += towards


def _bits(distance: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the logistic mass of a unit bin at a distance from the mean."""
    mass = torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale)
    return -torch.log2(mass.clamp(min=1e-9))
