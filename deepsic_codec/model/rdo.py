"""Rate-distortion optimised quantisation: symbols that cost more bits than their error is worth.

A symbol is moved one step towards the prior's mean where that lowers D + R / lambda.  The
bit stream and the decoder know nothing of it; it is the encoder's first level of effort
(latent refinement in the sense of Nonlinear Transform Coding, in its cheapest form).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepsic_codec.model.networks import step_lambda
from deepsic_codec.model.prior import INDEX_LEVELS, MEAN_LEVELS, IntegerPrior, passes, scale_of

#: Weight of the distortion against lambda of the nominal step.  Moving a symbol also spoils
#: the contexts of others' means; 1 to 2.2 were tried on photographs, 1.5 was best.
TRADE = 1.5
#: Grey levels that one unit of a latent stands for.
UNIT = 64.0


def quantise(prior: IntegerPrior, scaled: Tensor, gain: Tensor, quality: Tensor, effort: int) -> Tensor:
    """Choose the symbols of a batch of images.

    Parameters
    ----------
    prior : IntegerPrior
        What will code them.
    scaled : Tensor
        Latents in units of the quantiser's step, float (N,h,w,C).
    gain : Tensor
        Steps per latent unit, (N,C).
    quality : Tensor
        1..100, (N,).
    effort : int
        Rounds of optimisation; 0 rounds to the nearest integer and stops.

    Returns
    -------
    Tensor
        Integers held in float32, (N,h,w,C).
    """
    nearest = torch.round(scaled)
    symbols = nearest
    which = torch.floor(quality + 0.5).clamp(1, 100).long()
    # squared grey levels per squared step, in bits: three samples share a pixel's bits
    price = TRADE * step_lambda(quality)[:, None] / 3 * (UNIT / gain) ** 2  # (N,C)
    for _ in range(effort):
        neighbours = prior.neighbours(symbols)
        flat_nearest, flat_scaled = nearest.flatten(0, 2), scaled.flatten(0, 2)
        chosen = nearest.flatten(0, 2).clone()
        for number, step, rows, flat, image in passes(prior, neighbours):
            means, indices = prior.run(number, neighbours, rows, which[image])
            own = slice(step.start, step.start + step.count)
            q = flat_nearest[flat, own]
            mean = means.float() / MEAN_LEVELS
            # most symbols are what the prior expects, and stay
            p, c = torch.nonzero((q - mean).abs() > 0.5, as_tuple=True)
            q, mean = q[p, c], mean[p, c]
            scale = scale_of(indices[p, c].float() / INDEX_LEVELS, prior.log_scales)
            moved = q + torch.sign(mean - q)
            wanted, weight = flat_scaled[flat[p], own.start + c], price[image[p], own.start + c]
            saved = _bits(q - mean, scale) - _bits(moved - mean, scale)
            error = weight * ((moved - wanted) ** 2 - (q - wanted) ** 2)
            chosen[flat[p], own.start + c] = torch.where(saved > error, moved, q)
        symbols = chosen.reshape(scaled.shape)
    return symbols


def _bits(distance: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the logistic mass of a unit bin at a distance from the mean."""
    d = distance.abs()
    mass = torch.sigmoid((0.5 - d) / scale) - torch.sigmoid((-0.5 - d) / scale)
    return -torch.log2(mass.clamp(min=1e-9))
