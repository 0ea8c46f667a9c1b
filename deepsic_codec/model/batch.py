"""Batches of chunks, as schedulers take and return them; needs no torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.model.exact.formats import HUNDREDTHS, QUALITIES
from deepsic_codec.payload.constants import LATENT_STRIDE

DEFAULT_EFFORT = 1
DEFAULT_TUNE = "mse"

Pixels = NDArray[np.uint8] | NDArray[np.int16]
Shape = tuple[int, int, int]
"""Slices, height and width of a chunk, in pixels."""
Qualities = NDArray[np.float64]
"""Quality of each image of a batch, 1 to 100."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One encoded chunk; results that were not requested are None.

    Attributes
    ----------
    grid : (int, int)
        Rows and columns of the symbols.
    features : bytes or None
        The arithmetic-coded symbols.
    cells : ndarray or None
        uint8 (S, ceil(H/64), ceil(W/64), classes + 1): scores of each 64x64 pixel cell in 1/255; the last is *unknown*.
    symbols : ndarray or None
        int16 (S,h,w,C).
    pixels : ndarray or None
        (S,H,W,3) of the dtype of the images: the pixels that decoding the features gives.
    """

    grid: tuple[int, int]
    features: bytes | None = None
    cells: NDArray[np.uint8] | None = None
    symbols: NDArray[np.int16] | None = None
    pixels: Pixels | None = None


def grid_of(shape: Shape) -> tuple[int, int]:
    """Return rows and columns of the symbols of a chunk."""
    return ceil_div(shape[1], LATENT_STRIDE), ceil_div(shape[2], LATENT_STRIDE)


def whole_qualities(quality: Qualities) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return qualities as hundredths, as payloads have them, and rounded to whole ones, (N,) each."""
    hundredths = np.floor(np.asarray(quality, np.float64) * HUNDREDTHS + 0.5).astype(np.int64)
    return hundredths, np.clip((hundredths + HUNDREDTHS // 2) // HUNDREDTHS, 1, QUALITIES)
