"""The entropy coder's trained start: probabilities, confidences, mixer weights.

They are stored as integers in the model file and belong to the decoder's identity. The layout of the context array is
fixed by the format; only the numbers in it are trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

# Scale levels of the coder, and folded fractions of its mean (in eighths: 0..4).
SCALES, FRACTIONS = 128, 5
# Levels of the quantised neighbourhood and of the previous channels' magnitude.
NEIGHBOURS, PREVIOUS = 10, 6
# Unary bins of a magnitude before the Exp-Golomb escape, and bits that an escape may have.
UNARY, ESCAPE_BITS = 12, 17
# Inputs of a mixer (one per context, and a constant).
INPUTS = 4
# Mixers: one per scale level for the zero flag, and 4 x 16 for magnitude bins.
MIXERS = SCALES + 64
# The prior's scale indices come in quarters of 0..63; levels are finer where scales are large.
INDICES = 256
# Confidence has ten bits; the other limits keep sums far from overflow.
MAX_CONFIDENCE, MAX_LOW_BITS, MAX_RATE = 1023, 8, 64


class ContextLayout(NamedTuple):
    """Where each family of contexts starts in the context array, and the number of contexts."""

    # families that have a second set, for the odd states of the trellis, which follows at `odd`
    zero_scale: int  # zero flag by scale level, fraction, and whether the mean rounds to zero
    zero_previous: int  # zero flag by scale level, previous channels, and coarse neighbourhood
    unary_scale: int  # magnitude bin by scale level and bin
    unary_neighbours: int  # magnitude bin by coarse scale level, neighbourhood, and bin
    unary_channel: int  # magnitude bin by channel, previous channels (3 levels), and bin (4 levels)
    odd: int
    zero_channel: int  # zero flag by spatial pass, channel, neighbourhood, and whether the mean rounds to zero
    sign: int  # sign by scale level and fraction
    low_bit: int  # highest of the bits below a coarse magnitude, by scale level
    escape: int  # Exp-Golomb prefix, by position
    size: int

    @classmethod
    def of(cls, latents: int) -> Self:
        """Return the layout for this number of channels."""
        sizes = [SCALES * FRACTIONS * 2, SCALES * PREVIOUS * 5]
        sizes += [SCALES * UNARY, 16 * NEIGHBOURS * UNARY, latents * 3 * 4]
        sizes += [sum(sizes), 2 * latents * NEIGHBOURS * 2, SCALES * FRACTIONS, SCALES, ESCAPE_BITS]
        return cls(*accumulate(sizes, initial=0))


@dataclass(frozen=True)
class CoderTables:
    """Trained start of the entropy coder.

    Attributes
    ----------
    probabilities : uint16 (layout.size,)
        Probability of a one bit, in 1/65536, at the start of each chunk.
    confidence : uint16 (layout.size,)
        Observations that the start counts for; the first updates move by 1 / (confidence + 1.5).
    limit : int
        Confidence stops growing here, so that a context keeps following the data.
    weights : int32 (MIXERS, INPUTS)
        Mixer weights in 1/65536.
    rate : int
        Learning rate of the mixers; 0 keeps them fixed.
    low_bits : uint8 (SCALES,)
        Bits of a magnitude that are coded as they are at each scale level.
    levels : uint8 (INDICES,)
        Scale level of each of the prior's scale indices (in quarters).
    single : int
        Below this scale level the zero flag is coded under one context alone: there almost all symbols are zero, and
        speed matters more than the last bit.
    """

    probabilities: NDArray[np.uint16]
    confidence: NDArray[np.uint16]
    weights: NDArray[np.int32]
    low_bits: NDArray[np.uint8]
    levels: NDArray[np.uint8]
    limit: int
    rate: int
    single: int

    @classmethod
    def untrained(cls, latents: int, log_scales: NDArray[np.float64]) -> Self:
        """Return a neutral start: even odds, equal weights.

        Parameters
        ----------
        latents : int
            Channels.
        log_scales : ndarray
            float64 (64,), logarithms of the logistic scales at the whole indices.
        """
        size = ContextLayout.of(latents).size
        index = np.arange(INDICES) / 4
        # whole steps up to 32, halves up to 48, quarters above: 33 + 32 + 61 levels
        upper = np.where(index < 48, 32 + 2 * (index - 32), 4 * index - 128)
        levels = np.where(index < 32, np.floor(index + 0.5), upper)
        levels = np.floor(levels + 0.5)
        logs = np.interp(index, np.arange(len(log_scales)), log_scales)
        totals = np.bincount(levels.astype(int), weights=logs, minlength=SCALES)
        of_level = totals / np.maximum(1, np.bincount(levels.astype(int), minlength=SCALES))
        return cls(
            probabilities=np.full(size, 32768, np.uint16),
            confidence=np.zeros(size, np.uint16),
            weights=np.tile(np.array([22000, 22000, 22000, 0], np.int32), (MIXERS, 1)),
            low_bits=np.clip(np.floor(of_level / np.log(2)) - 1, 0, MAX_LOW_BITS).astype(np.uint8),
            levels=levels.astype(np.uint8),
            limit=255,
            rate=4,
            single=28,
        )

    def check(self, latents: int) -> Self:
        """Return self, or raise ValueError if a table does not fit: the coder itself checks no index."""
        size = ContextLayout.of(latents).size
        sound = (
            self.probabilities.shape == self.confidence.shape == (size,)
            and self.weights.shape == (MIXERS, INPUTS)
            and self.low_bits.shape == (SCALES,)
            and self.levels.shape == (INDICES,)
            and int(self.levels.max()) < SCALES
            and int(self.low_bits.max()) <= MAX_LOW_BITS
            and 0 < self.limit <= MAX_CONFIDENCE
            and 0 <= self.rate <= MAX_RATE
        )
        if not sound:
            raise ValueError("the coder tables have sizes or values that the format does not allow")
        return self

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return named arrays for the model file."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Make tables of the arrays that `arrays` returns."""
        return cls(
            probabilities=np.ascontiguousarray(arrays["probabilities"], np.uint16),
            confidence=np.ascontiguousarray(arrays["confidence"], np.uint16),
            weights=np.ascontiguousarray(arrays["weights"], np.int32),
            low_bits=np.ascontiguousarray(arrays["low_bits"], np.uint8),
            levels=np.ascontiguousarray(arrays["levels"], np.uint8),
            limit=int(arrays["limit"]),
            rate=int(arrays["rate"]),
            single=int(arrays["single"]),
        )
