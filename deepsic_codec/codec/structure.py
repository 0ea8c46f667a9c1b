"""What the samples of a chunk are: multiples of a number, or few of the values that their dtype has."""

from functools import reduce
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.structure import Levels, Structure, encode_structure

PROBE = 4096  # samples that rule out a divisor
OVERHEAD = 12  # bytes of the section and its entry in the header, about
NEIGHBOURS = 4  # levels on either side, between which gaps are measured
# A table of levels has to save this share of a bit of each sample, and its bytes this number of times.
MIN_SAVED, MIN_RATIO = 0.1, 1.5

Band = NDArray[Any]  # the samples of a band that are data


def find_structure(samples: NDArray[Any], mask: NDArray[np.bool_] | None, max_error: float | None) -> Structure | None:
    """Find what the samples of a chunk are.

    Parameters
    ----------
    samples : ndarray
        (slices, height, width, bands).
    mask : ndarray of bool, optional
        Broadcast to that shape: samples that are no data.
    max_error : float or None
        The bound on errors, in units of the samples; None if all are quantised with one step, whatever they are.

    Returns
    -------
    Structure or None
        None if samples are best coded as they are.
    """
    if samples.dtype.kind == "f":
        return None
    bands = [_data(samples, mask, number) for number in range(samples.shape[-1])]
    divisors = [_divisor(band) for band in bands]
    levels = [_lattice(band, divisor) for band, divisor in zip(bands, divisors, strict=True)]
    if max_error is not None:
        bound = int(min(max_error, 65535))
        levels = [_table(band, one) or one for band, one in zip(bands, levels, strict=True)]
        if bound and any(one.gap() <= 2 * bound for one, divisor in zip(levels, divisors, strict=True) if divisor):
            # Errors remain, in one step for all bands. It has to be as wide as without a divisor.
            common = reduce(gcd, divisors)
            levels = [_lattice(band, common if 2 * (bound % max(common, 1)) < common else 1) for band in bands]
    saved = sum(band.size * np.log2(one.gap()) / 8 for band, one in zip(bands, levels, strict=True))
    tables = any(one.table is not None for one in levels)
    structure = Structure(tuple(levels))
    return structure if tables or saved > OVERHEAD + len(encode_structure(structure)) else None


def _data(samples: NDArray[Any], mask: NDArray[np.bool_] | None, number: int) -> Band:
    band = samples[..., number]
    return band.ravel() if mask is None else band[~mask[..., number if mask.shape[-1] > 1 else 0]]


def _divisor(band: Band) -> int:
    """Return the greatest common divisor of the differences of samples; 0 if all are equal."""
    for part in (band[:: max(1, band.size // PROBE)], band):
        divisor = int(np.gcd.reduce(part - part[:1].astype(np.int32), initial=0))
        if divisor == 1:
            break
    return divisor


def _lattice(band: Band, divisor: int) -> Levels:
    return Levels(divisor, int(band[0]) % divisor) if divisor > 1 and band.size else Levels()


def _table(band: Band, lattice: Levels) -> Levels | None:
    """Return the table of the levels of a band; None if it takes more than it saves."""
    if not band.size:
        return None
    low = int(band.min())
    counts = np.bincount(band.astype(np.int32) - low)
    values = np.flatnonzero(counts)
    counts = counts[values]
    first = np.maximum(np.arange(len(values)) - NEIGHBOURS, 0)
    last = np.minimum(np.arange(len(values)) + NEIGHBOURS, len(values) - 1)
    # Values of the lattice between levels nearby. Some are missing by chance where samples are few.
    extent = np.maximum((values[last] - values[first]) // lattice.divisor, 1)
    total = np.cumsum(counts)
    expected = extent * -np.expm1((total[first] - total[last]) / extent)
    saved = float((counts * np.maximum(np.log2(expected / np.maximum(last - first, 1) + 1e-9), 0)).sum())
    if saved < MIN_SAVED * band.size:
        return None
    levels = Levels(table=values.astype(np.int64) + low)
    return levels if saved / 8 > MIN_RATIO * len(encode_structure(Structure((levels,)))) + OVERHEAD else None
