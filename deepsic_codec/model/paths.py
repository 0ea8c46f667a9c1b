"""Paths through the trellis of one chunk, as refinement asks for them; tensors are on the host."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.model.cpu.prior import Prior
from deepsic_codec.model.exact.formats import STEP_BITS, WIDE_MAX
from deepsic_codec.model.logistic import PRICE_MAX, RATE_BITS

Prices = tuple[Tensor, Tensor]
"""Price of the squared error of a half step in bits (C,), and weights of errors (S,h,w)."""


class ChunkPaths:
    """Chooses paths. Symbols are in half steps.

    Parameters
    ----------
    prior : Prior
        Of the model.
    half : ndarray
        Half steps int32 (C,) in 2^-STEP_BITS units of integer latents.
    quality : int
        Whole quality.
    """

    def __init__(self, prior: Prior, half: NDArray[np.int32], quality: int) -> None:
        self._prior, self.half, self.quality = prior, half, quality
        self._unit = torch.from_numpy(half.astype(np.float32) * 2.0**-STEP_BITS)

    def first(self, latents: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Return integer latents (S,h,w,C) in half steps, and the path that lower efforts take, both float32."""
        symbols, _ = self._prior.choose(latents, self.half, self.quality, True, False, True)
        return torch.from_numpy(latents.astype(np.float32)) / self._unit, torch.from_numpy(symbols).float()

    def choose(self, targets: Tensor, prices: Prices) -> Tensor:
        """Return the path of the least cost, float32 (S,h,w,C).

        Parameters
        ----------
        targets : Tensor
            Symbols that would cost least apart from their bits, float32 (S,h,w,C).
        prices : (Tensor, Tensor)
        """
        latents = torch.floor(targets * self._unit + 0.5).clamp(-WIDE_MAX, WIDE_MAX).to(torch.int32)
        symbols, _ = self._prior.choose(
            latents.contiguous().numpy(), self.half, self.quality, True, False, True, _integers(prices)
        )
        return torch.from_numpy(symbols).float()

    def expect(self, targets: Tensor, predictions: tuple[Tensor, Tensor], prices: Prices, temperature: float) -> Tensor:
        """Return the expected symbols over all paths, whose probabilities are exp(-cost / temperature).

        Parameters
        ----------
        targets : Tensor
            As of `choose`.
        predictions : (Tensor, Tensor)
            Means of numbers and scale indices, float32 (S,h,w,C).
        prices : (Tensor, Tensor)
        temperature : float
            In bits.
        """
        units, means, indices = (t.contiguous().numpy() for t in (targets, *predictions))
        return torch.from_numpy(self._prior.expect(units, means, indices, _integers(prices), temperature))

    def bits(self, symbols: Tensor) -> int:
        """Return the bits that the symbols (S,h,w,C) of a path take."""
        return 8 * len(self._prior.encode(symbols.to(torch.int16).contiguous().numpy(), self.quality, True))


def _integers(prices: Prices) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    scales = 2.0**RATE_BITS, 256.0
    parts = (torch.floor(t * scale + 0.5).clamp(0, PRICE_MAX) for t, scale in zip(prices, scales, strict=True))
    price, weights = (t.to(torch.int32).contiguous().numpy() for t in parts)
    return price, weights
