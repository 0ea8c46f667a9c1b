"""Estimates of the bytes and of the error of quantised coefficients, in integers."""

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
def _bits(coefficients, step):
    """Return estimated bits in 1/256 of a band of coefficients (height, width)."""
    height, width = coefficients.shape
    total = np.int64(0)
    for y in range(0, height, BLOCK):
        for x in range(0, width, BLOCK):
            size, count, signs = np.int64(0), np.int64(0), np.int64(0)
            for row in range(y, min(y + BLOCK, height)):
                for column in range(x, min(x + BLOCK, width)):
                    exact = (abs(np.int64(coefficients[row, column])) << 24) // step
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
def _error(coefficients, step):
    """Return the sum of squared errors of a band of coefficients in 2^-16 of a squared step."""
    total = np.int64(0)
    for row in range(coefficients.shape[0]):
        for column in range(coefficients.shape[1]):
            exact = (abs(np.int64(coefficients[row, column])) << 24) // step
            difference = exact - (((exact + 256 - ROUND_UP) >> 8) << 8)
            total += difference * difference
    return total


def estimated_bytes(coefficients: NDArray[np.int32], code: int) -> float:
    """Return about how many bytes coefficients (slices, components, height, width) take with the step of a code."""
    bits = 0
    for planes in coefficients:
        for plane in planes:
            for band in bands_of(*plane.shape):
                part = plane[band.y : band.y + band.height, band.x : band.x + band.width]
                bits += int(_bits(part, max(1, band_step(code, band))))
    return bits / (8 * 256)


def estimated_error(coefficients: NDArray[np.int32], code: int) -> float:
    """Return about which root mean square error the step of a code leaves, in units of the components."""
    total, size = 0, 0
    for planes in coefficients:
        for plane in planes:
            for band in bands_of(*plane.shape):
                part = plane[band.y : band.y + band.height, band.x : band.x + band.width]
                total += int(_error(part, max(1, band_step(code, band))))
                size += part.size
    return TRELLIS * step_of(code) * (total / size) ** 0.5 / (1 << 8)
