"""Rate-distortion optimised quantisation: symbols that cost more bits than their error is worth are moved.

A symbol moves one step towards the prior's mean where that lowers D + R / lambda. The bit stream and the decoder do not
depend on it: it is the encoder's first level of effort (latent refinement in the sense of Nonlinear Transform Coding,
in its cheapest form). The saving of a move and the price of an error are tables of integers in the model file, so that
equal images give equal payloads on every machine.
"""

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.model.exact.formats import LATENT_BITS, QUALITIES, STEP_BITS
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.likelihood import logistic_bits, scale_of
from deepsic_codec.model.logistic import DISTANCES, INDEX_LEVELS, INDEX_MAX, MEAN_LEVELS, PRICE_MAX, RATE_BITS
from deepsic_codec.model.neighbours import Predictions, iter_steps
from deepsic_codec.model.networks import step_lambda
from deepsic_codec.model.ops.protocol import RateTables, SymbolState

#: Weight of the distortion against lambda of the nominal step, by quality. Symbols that move also inform later symbols
#: less; 1.2 to 2.5 were tried on photographs.
TRADE_QUALITIES, TRADE = (15.0, 45.0), (1.2, 2.1)
#: Grey levels of one unit of a latent.
UNIT = 64.0


def load_tables(tensors: dict[str, Tensor], device: torch.device | str) -> RateTables:
    """Tables of a model file on a device, from its tensors below `family.RDO`."""
    return RateTables(*(tensors[name].to(device=device, dtype=torch.int32) for name in RateTables._fields))


@torch.no_grad()
def make_tables(log_scales: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """Tables of a model file, `saved` int16 (scale indices, DISTANCES) and `price` int32 (100,C), as in `RateTables`.

    They are made from the logarithms of the prior's scales (SCALES,) and the dequantiser steps int32 (100,C).
    """
    index = torch.arange(INDEX_MAX + 1, dtype=torch.float64) / INDEX_LEVELS
    scale = scale_of(index, log_scales.cpu().double())[:, None]
    distance = torch.arange(DISTANCES, dtype=torch.float64) / MEAN_LEVELS
    saved = logistic_bits(distance, scale) - logistic_bits((distance - 1).abs(), scale)
    quality = torch.arange(1, QUALITIES + 1, dtype=torch.float64)
    step = steps.cpu().double() * 2.0 ** -(LATENT_BITS + STEP_BITS) * UNIT  # in grey levels
    # three samples share a pixel's bits
    trade = torch.from_numpy(np.interp(quality.numpy(), TRADE_QUALITIES, TRADE))
    price = (trade * step_lambda(quality))[:, None] / 3 * step**2
    return {
        "saved": torch.floor(saved * 2**RATE_BITS + 0.5).clamp(-(2**15), 2**15 - 1).to(torch.int16),
        "price": torch.floor(price * 2**RATE_BITS + 0.5).clamp(0, PRICE_MAX).to(torch.int32),
    }


def quantise(
    prior: CodingPrior, tables: RateTables | None, scaled: Tensor, quality: Tensor | int
) -> tuple[Tensor, Predictions | None]:
    """Choose the symbols of a batch of images, step by step in coding order.

    The prior's predictions of a symbol follow from symbols that are already chosen, so that coding can use them again.

    Parameters
    ----------
    prior : CodingPrior
        Codes the symbols.
    tables : RateTables, optional
        On the prior's device; without them every symbol is the nearest, and there are no predictions.
    scaled : Tensor
        Latents in units of the quantiser's step, float32 (N,h,w,C).
    quality : Tensor or int
        Whole qualities 1..100, int64 (N,), or one for all images.

    Returns
    -------
    symbols : Tensor
        int32 (N,h,w,C).
    predictions : Predictions or None
    """
    nearest = torch.round(scaled).to(torch.int32)
    if tables is None:
        return nearest, None
    state = SymbolState(scaled.flatten(0, 2), nearest.flatten(0, 2), prior.neighbours(nearest))
    predictions: Predictions = []
    for number, step, padded, flat, image in iter_steps(prior, state.neighbours):
        row_quality = quality if isinstance(quality, int) else quality[image]
        predicted = prior.run(number, state.neighbours, padded, row_quality)
        prior.move_symbols(state, step, (padded, flat), predicted, tables, row_quality)
        predictions.append(predicted)
    return state.symbols.reshape(scaled.shape), predictions
