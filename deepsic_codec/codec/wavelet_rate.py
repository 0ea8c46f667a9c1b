"""Estimates of the bytes and of the error of quantised coefficients, in integers."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import jit
from deepsic_codec.payload.coders.subbands import band_step
from deepsic_codec.payload.coders.wavelet import bands_of
from deepsic_codec.payload.steps import step_of

TRELLIS = 0.86  # error with the trellis, as a share of that without
ROUND_UP = 141  # magnitudes are rounded up from this many 256ths of a step on
BLOCK = 4  # rows and columns of coefficients whose sizes are taken to be alike
TABLE = 1 << 12


def _bits_table() -> NDArray[np.int64]:
    """Return the bits in 1/256 of a coefficient, without its sign, by the mean magnitude in 1/16.

    They are the entropy of a geometric distribution.
    """
    mean = np.arange(1, TABLE) / 16
    bits = np.log2(1 + mean) + mean * np.log2(1 + 1 / mean)
    return np.concatenate([[0], np.rint(256 * bits)]).astype(np.int64)


BITS: Any = _bits_table()


@jit
def _bits(coefficients, bands, steps):
    """Return estimated bits in 1/256 of coefficients (planes, height, width).

    `bands` int64 (n, 4) has the first row and column, height and width of each band, `steps` int64 (n,) its step.
    """
    total = np.int64(0)
    for plane in range(coefficients.shape[0]):
        for n in range(len(steps)):
            top, left, height, width = bands[n, 0], bands[n, 1], bands[n, 2], bands[n, 3]
            for y in range(0, height, BLOCK):
                for x in range(0, width, BLOCK):
                    size, count, signs = np.int64(0), np.int64(0), np.int64(0)
                    for row in range(y, min(y + BLOCK, height)):
                        for column in range(x, min(x + BLOCK, width)):
                            exact = (abs(np.int64(coefficients[plane, top + row, left + column])) << 24) // steps[n]
                            magnitude = (exact + 256 - ROUND_UP) >> 8
                            size += magnitude
                            count += 1
                            signs += magnitude > 0
                    mean, octaves = 16 * size // count, np.int64(0)
                    while mean >= TABLE:
                        mean >>= 1
                        octaves += 256
                    total += count * (BITS[mean] + octaves) + 256 * signs
    return total


@jit
def _error(coefficients, bands, steps):
    """Return the sum of squared errors in 2^-16 of a squared step of the band; arguments as for `_bits`."""
    total = np.int64(0)
    for plane in range(coefficients.shape[0]):
        for n in range(len(steps)):
            top, left, height, width = bands[n, 0], bands[n, 1], bands[n, 2], bands[n, 3]
            for row in range(top, top + height):
                for column in range(left, left + width):
                    exact = (abs(np.int64(coefficients[plane, row, column])) << 24) // steps[n]
                    difference = exact - (((exact + 256 - ROUND_UP) >> 8) << 8)
                    total += difference * difference
    return total


@lru_cache(maxsize=256)
def _bands(height: int, width: int) -> NDArray[np.int64]:
    return np.array([(band.y, band.x, band.height, band.width) for band in bands_of(height, width)], np.int64)


@lru_cache(maxsize=256)
def _steps(code: int, height: int, width: int) -> NDArray[np.int64]:
    return np.array([max(1, band_step(code, band)) for band in bands_of(height, width)], np.int64)


def _total(count: Callable[..., int], coefficients: NDArray[Any], code: int) -> int:
    """Add up what a kernel counts in each plane."""
    height, width = coefficients.shape[2:]
    bands, steps = _bands(height, width), _steps(code, height, width)
    planes = coefficients.reshape(-1, 1, height, width)
    return sum(int(count(np.ascontiguousarray(plane, np.int32), bands, steps)) for plane in planes)


def estimated_bytes(coefficients: NDArray[Any], code: int) -> float:
    """Return about how many bytes coefficients (slices, components, height, width) take with the step of a code."""
    return _total(_bits, coefficients, code) / (8 * 256)


def estimated_error(coefficients: NDArray[Any], code: int) -> float:
    """Return about which root mean square error the step of a code leaves, in units of the components."""
    total = _total(_error, coefficients, code)
    return TRELLIS * step_of(code) * (total / coefficients.size) ** 0.5 / (1 << 8)
