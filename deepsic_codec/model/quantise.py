"""Rate-distortion optimised quantisation: symbols that cost more bits than their error is worth.

A symbol is moved a step towards the prior's mean where that lowers D + R / lambda.  The
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
from torch import Tensor

from deepsic_codec.model.exact.fixed import LATENT_BITS, STEP_BITS
from deepsic_codec.model.exact.prior import LINEAR_MAX, IntegerPrior
from deepsic_codec.model.logistic import INDEX_LEVELS, MEAN_LEVELS, SCALES, logistic_bits, scale_of
from deepsic_codec.model.neighbours import Neighbours, Predictions, iter_steps
from deepsic_codec.model.networks import step_lambda
from deepsic_codec.model.ops.tensor_ops import Compiled
from deepsic_codec.model.schedule import Step
from deepsic_codec.payload.coders._numba import kernel

#: Weight of the distortion against lambda of the nominal step, by quality. Moved symbols also tell later ones less;
#: 1.2 to 2.5 were tried on photographs.
TRADE_QUALITIES, TRADE = (15.0, 45.0), (1.2, 2.1)
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
    saved = logistic_bits(distance, scale) - logistic_bits((distance - 1).abs(), scale)
    quality = torch.arange(1, 101, dtype=torch.float64)
    step = steps.cpu().double() * 2.0 ** -(LATENT_BITS + STEP_BITS) * UNIT  # in grey levels
    # three samples share a pixel's bits
    trade = torch.from_numpy(np.interp(quality.numpy(), TRADE_QUALITIES, TRADE))
    price = (trade * step_lambda(quality))[:, None] / 3 * step**2
    return RdoTables(
        torch.floor(saved * 2**BITS + 0.5).clamp(-(2**15), 2**15 - 1).to(torch.int16),
        torch.floor(price * 2**BITS + 0.5).clamp(0, 2**21).to(torch.int32),
    )


def quantise(
    prior: IntegerPrior, tables: RdoTables | None, scaled: Tensor, quality: Tensor | int
) -> tuple[Tensor, Predictions | None]:
    """Choose the symbols of a batch of images.

    They are chosen pass by pass, in the order of coding: what the prior expects of a symbol
    follows from symbols that have been chosen for good, and need not be computed again.

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

    Returns
    -------
    symbols : Tensor
        int32 (N,h,w,C).
    predictions : Predictions or None
        What the prior expects, where it was asked.
    """
    nearest = torch.round(scaled).to(torch.int32)
    if tables is None:
        return nearest, None
    found = Symbols(scaled.flatten(0, 2), nearest.flatten(0, 2), prior.neighbours(nearest))
    move = _move_compiled if prior.ops is Compiled else _move_tensors
    predictions: Predictions = []
    for number, step, padded, flat, image in iter_steps(prior, found.neighbours):
        which = quality if isinstance(quality, int) else quality[image]
        predictions.append(prior.run(number, found.neighbours, padded, which))
        move(prior, tables, found, step, (padded, flat), predictions[-1], which)
    return found.chosen.reshape(scaled.shape), predictions


@dataclass
class Symbols:
    """Symbols that are being chosen.

    Attributes
    ----------
    latents : Tensor
        In units of the quantiser's step, float32 (positions,C).
    chosen : Tensor
        int32 (positions,C), the nearest at first; changed in place.
    neighbours : Neighbours
        What the prior sees of them, changed along.
    """

    latents: Tensor
    chosen: Tensor
    neighbours: Neighbours


def _move_tensors(
    prior: IntegerPrior,
    tables: RdoTables,
    found: Symbols,
    step: Step,
    rows: tuple[Tensor, Tensor],
    predicted: tuple[Tensor, Tensor],
    quality: Tensor | int,
) -> None:
    """Move the symbols of a pass at padded and plain ``rows``; nothing makes a GPU wait for the host."""
    there: Any = prior.ops
    symbols = there.move(
        found.chosen,
        found.latents,
        predicted,
        rows[1],
        step.start,
        tables.saved,
        tables.price,
        quality,
        MEAN_LEVELS,
        BITS,
    )
    prior.update(found.neighbours, step, rows[0], symbols)


def _move_compiled(
    prior: IntegerPrior,
    tables: RdoTables,
    found: Symbols,
    step: Step,
    rows: tuple[Tensor, Tensor],
    predicted: tuple[Tensor, Tensor],
    quality: Tensor | int,
) -> None:
    """The same on a CPU, one symbol after the other."""
    seen = found.neighbours
    tensors = [found.chosen, found.latents, seen.linear, seen.magnitude, prior.companded, *rows, *predicted]
    qualities = np.full(1, quality) if isinstance(quality, int) else quality.numpy()
    given: Any = [*(t.numpy() for t in (*tensors, tables.saved, tables.price)), qualities, step.start]
    _move(*given)


@kernel
def _move(  # type: ignore[no-untyped-def]
    chosen, latents, linear, magnitude, compand, padded, flat, means, indices, saved, price, quality, start
):
    """Most symbols are what the prior expects, and are left at a glance; qualities are (P,), or (1,) if it is one."""
    one, half = np.float32(1 << BITS), np.float32(0.5)
    for p in range(len(flat)):
        row, q = flat[p], quality[p if len(quality) > 1 else 0] - 1
        for i in range(means.shape[1]):
            c = start + i
            symbol = chosen[row, c]
            away = symbol * MEAN_LEVELS - means[p, i]
            if abs(away) <= MEAN_LEVELS // 2:
                continue
            # in single precision, as elsewhere
            error = np.int64(np.floor((np.float32(symbol) - latents[row, c]) * one + half))
            towards = -1 if away > 0 else 1
            cost = (price[q, c] * ((1 << BITS) + 2 * towards * error)) >> BITS
            if saved[indices[p, i], min(abs(away), DISTANCES - 1)] > cost:
                symbol += towards
                chosen[row, c] = symbol
                linear[padded[p], c] = min(max(symbol, -LINEAR_MAX), LINEAR_MAX)
                magnitude[padded[p], c] = compand[abs(symbol)]
