"""The range of values of a whole array, measured before its first chunk is written, so that all chunks have one scale.

Samples of 16 bits and floats seldom use the values of their dtype, and `quality` and `psnr` are shares of a range.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Axes
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.scaled import (
    FLOAT_MAX,
    MEASURED,
    NARROW,
    WIDE,
    extremes,
    needs_range,
    nodata_mask,
    without_outliers,
)


def is_measured(params: CodecParams, dtype: np.dtype[Any]) -> bool:
    """Tell whether the range of an array has to be measured: samples are wide, and no range is passed or to be checked.

    A range that is passed is compared with the data if `quality` or `psnr` refer to it.
    """
    native = np.dtype(dtype).newbyteorder("=")
    if params.value_range is None:
        return native in WIDE
    return isinstance(params.value_range, tuple) and native in WIDE and needs_range(params)


def thinned(part: NDArray[Any], params: CodecParams) -> NDArray[np.float64]:
    """Return some samples of a part of an array, (samples, bands), its extremes among them; NaN stands for no data."""
    axes = Axes(params.axes)
    if not part.size:
        return np.empty((0, axes.bands(part.shape)))
    samples = axes.to_samples(part)
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    mask = nodata_mask(samples, params)
    if samples.dtype.kind == "f":
        mask = ~np.isfinite(samples) if mask is None else mask | ~np.isfinite(samples)
    low, high = (end.astype(np.float64) for end in extremes(samples, mask))
    low, high = (np.where(low > high, np.nan, end) for end in (low, high))  # a band without data
    step = max(1, int(np.sqrt(samples[..., 0].size / MEASURED)))
    rows = samples[:, ::step, ::step].astype(np.float64)
    if mask is not None:
        rows[mask[:, ::step, ::step]] = np.nan
    return np.concatenate([low[None], high[None], rows.reshape(-1, samples.shape[-1])])


def with_range(
    params: CodecParams, parts: Iterable[NDArray[np.float64]], dtype: np.dtype[Any], joint: bool
) -> CodecParams:
    """Return parameters with the range of an array, if they have none; otherwise warn if it is far too wide.

    Parameters
    ----------
    params : CodecParams
        Parameters for which `is_measured` holds.
    parts : iterable of float64 array (samples, bands)
        What `thinned` returns for parts of the array.
    dtype : numpy.dtype
        Of the array.
    joint : bool
        Measure one range for all bands, not one for each: chunks have only some of the bands.
    """
    rows = np.concatenate(list(parts))
    bands = [band[~np.isnan(band)] for band in rows.T]
    native = np.dtype(dtype).newbyteorder("=")
    pairs = [_range(band, native, params.transform == "features") for band in bands if band.size]
    if not pairs:  # no sample is data: any range serves
        return params.changed(value_range=(0, 1)) if params.value_range is None and native.kind == "f" else params
    if isinstance(params.value_range, tuple):
        _check_use(params.value_range, pairs)
        return params
    everything = min(low for low, _ in pairs), max(high for _, high in pairs)
    if joint:
        return params.changed(value_range=everything)
    measured = iter(pairs)
    each = [next(measured) if band.size else everything for band in bands]
    return params.changed(value_range=each[0] if len(set(each)) == 1 else each)


def _range(band: NDArray[np.float64], dtype: np.dtype[Any], features: bool) -> tuple[float, float]:
    """Return the range of the samples of a band: without outliers, unless features would clip them."""
    low, high = float(band.min()), float(band.max())
    if not features:
        low, high = without_outliers(band, low, high)
    if low == high:  # a range of a constant has to have two ends
        step = 1.0 if dtype.kind != "f" else max(1.0, abs(low) / 256)
        top = FLOAT_MAX if dtype.kind == "f" else np.iinfo(dtype).max
        low, high = (low, low + step) if low + step <= top else (low - step, low)
    return (low, high) if dtype.kind == "f" else (int(low), int(high))


def _check_use(ranges: tuple[tuple[float, float], ...], used: list[tuple[float, float]]) -> None:
    """Warn if values use under a quarter of a range that they have been said to have."""
    widest, extent = max(high - low for low, high in ranges), max(high - low for low, high in used)
    if extent * NARROW < widest:
        low, high = min(low for low, _ in used), max(high for _, high in used)
        warnings.warn(
            f"value_range: values lie between {low:g} and {high:g}, which is {extent / widest:.1%} of the range, so "
            f"quality and psnr allow errors that are large for them; pass value_range=({low:g}, {high:g}), leave it "
            "out to have it measured, or pass rmse= or max_error=",
            stacklevel=5,
        )
