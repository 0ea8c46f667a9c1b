"""Bands to the images that networks see, and back.

Networks see images of three channels, and were trained on colours. An image holds three bands that are alike, or one
band three times.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.codec.scaled import FLOAT_MAX, MEASURED, WIDE, fill_nodata, grey_levels
from deepsic_codec.payload.fields import COLOURS, PLANES
from deepsic_codec.payload.value_range import Ranges, full_range

# Share of samples that images for labels clip at either end, and least part of the range of values that they show.
CLIPPED, MIN_STRETCH = 1 / 200, 1 / 32


def default_grouping(bands: int) -> int:
    """Return how N bands are joined to images, unless planes are asked for."""
    return COLOURS if bands in (1, 3) else PLANES


def to_images(samples: NDArray[Any], grouping: int) -> NDArray[Any]:
    """Arrange samples (slices, height, width, bands) as contiguous images (images, height, width, 3); may be a view."""
    slices, height, width, bands = samples.shape
    if grouping == COLOURS and bands == 3:
        return np.ascontiguousarray(samples)
    planes = np.moveaxis(samples, -1, 1).reshape(slices * bands, height, width)
    return np.repeat(planes[..., None], 3, axis=-1)


def from_images(images: NDArray[Any], bands: int, grouping: int) -> NDArray[Any]:
    """Take bands from images; a band that was repeated is the mean of its copies, rounded half up.

    Returns
    -------
    ndarray
        (slices, height, width, bands) of the dtype of `images`; a view where possible.
    """
    if grouping == COLOURS and bands == 3:
        return images
    means = (2 * images.sum(axis=-1, dtype=np.int32) + 3) // 6
    planes = means.astype(images.dtype).reshape(-1, bands, *images.shape[1:3])
    return np.ascontiguousarray(np.moveaxis(planes, 1, -1))


def label_images(
    samples: NDArray[Any],
    ranges: Ranges | None,
    mask: NDArray[np.bool_] | None,
    chosen: Sequence[int] | None = None,
) -> NDArray[Any]:
    """Return the images (slices, height, width, 3) that labels are scored on.

    They show the chosen bands, or the first three, or the first of two. Samples of 16 bits and float32 are stretched
    between their percentiles, all bands alike, so that neither a few bright ones nor an unused part of their range
    makes an image dark.
    """
    count = samples.shape[-1]
    numbers = list(range(3 if count >= 3 else 1) if chosen is None else chosen)
    visible = samples if numbers == list(range(count)) else samples[..., numbers]
    hidden = None if mask is None else np.broadcast_to(mask, samples.shape)[..., numbers]
    if hidden is not None and visible.dtype.kind == "f":
        visible = np.where(hidden, np.float32(0), visible)  # NaN cannot be scaled
    if ranges is not None:
        ranges = ranges[numbers]
        ranges = _stretch(visible, ranges, hidden) if samples.dtype in WIDE else ranges
    levels = grey_levels(visible, ranges)
    return to_images(levels if hidden is None else fill_nodata(levels, hidden), COLOURS)


def _stretch(samples: NDArray[Any], ranges: Ranges, mask: NDArray[np.bool_] | None) -> Ranges:
    """Return the range between percentiles of samples, at least a part of their ranges: noise is not stretched."""
    data = samples.ravel() if mask is None else samples[~mask]
    if not data.size:
        return ranges
    data = data[:: max(1, data.size // MEASURED)]
    tail = int(data.size * CLIPPED)
    low, high = (float(np.partition(data, k)[k]) for k in (tail, data.size - 1 - tail))
    ends = ranges.astype(np.float64)
    extent = max(high - low, float((ends[:, 1] - ends[:, 0]).max()) * MIN_STRETCH)
    limits = (-FLOAT_MAX, FLOAT_MAX) if samples.dtype.kind == "f" else full_range(samples.dtype)
    low = max(limits[0], min((low + high - extent) / 2, limits[1] - extent))
    pair = np.array([low, min(low + extent, limits[1])])
    if samples.dtype.kind != "f":
        pair = np.rint(pair)
    return np.broadcast_to(pair.astype(samples.dtype), ranges.shape)
