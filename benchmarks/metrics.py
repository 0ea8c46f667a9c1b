"""Rate-distortion curves: reading them at a rate, and the BD-rate between two of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

BPP_RANGE = (0.15, 1.5)  # where codecs are compared, in bits per pixel


class Curve:
    """Quality (dB) over rate (bpp), by monotone cubic interpolation over log rate.

    Parameters
    ----------
    bpp, quality : sequence of float
        At least two points in any order; points that do not rise in both (a setting that spends more for less) are
        left out, since a user would not choose them.
    """

    def __init__(self, bpp: ArrayLike, quality: ArrayLike) -> None:
        rate, value = _rising(np.log(np.asarray(bpp, float)), np.asarray(quality, float))
        if len(rate) < 2:
            raise ValueError("a curve needs two points of rising rate and quality")
        self.low, self.high = float(np.exp(rate[0])), float(np.exp(rate[-1]))  # bpp
        self._quality = PchipInterpolator(rate, value)
        self._rate = PchipInterpolator(value, rate)

    def quality_at(self, bpp: float) -> float:
        """Quality in dB at a rate; NaN outside the measured range."""
        return float(self._quality(np.log(bpp))) if self.low <= bpp <= self.high else float("nan")

    def mean_log_rate(self, low: float, high: float) -> float:
        """Mean of ln(bpp) over an interval of qualities (dB)."""
        return float(self._rate.integrate(low, high)) / (high - low)

    def interval(self, bpp_range: tuple[float, float]) -> tuple[float, float]:
        """Qualities (dB) at both ends of a rate range, or of the measured part of it."""
        low, high = max(bpp_range[0], self.low), min(bpp_range[1], self.high)
        return float(self._quality(np.log(low))), float(self._quality(np.log(high)))


def bd_rate(anchor: Curve, test: Curve, bpp_range: tuple[float, float] = BPP_RANGE) -> float:
    """Mean difference in rate at equal quality (Bjontegaard), in percent; negative where `test` needs less.

    Averaged over the interval of qualities that both curves reach within `bpp_range`; NaN where there is none.
    """
    (low_a, high_a), (low_t, high_t) = anchor.interval(bpp_range), test.interval(bpp_range)
    low, high = max(low_a, low_t), min(high_a, high_t)
    if not low < high:
        return float("nan")
    return 100 * float(np.exp(test.mean_log_rate(low, high) - anchor.mean_log_rate(low, high)) - 1)


def _rising(rate: NDArray[np.float64], value: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    order = np.argsort(rate)
    kept = [order[0]]
    for i in order[1:]:
        if rate[i] > rate[kept[-1]] and value[i] > value[kept[-1]]:
            kept.append(i)
    return rate[kept], value[kept]
