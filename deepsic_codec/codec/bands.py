"""Axes: from chunks to images and back.

Between the two stands one layout of samples, (slices, height, width, bands), where every axis but y, x and c counts
slices. Networks see images of three channels: three bands as they are, two with the second repeated, or one thrice.
Bands beside each other are worth joining only if they are alike, as colours are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.fields import FIRST_TRIPLE, PLANES, TRIPLES


def samples_of(array: NDArray[Any], axes: str) -> NDArray[Any]:
    """Arrange a chunk with these axes, of any strides, as samples (slices, height, width, bands); may be a view."""
    samples = array.transpose([axes.index(axis) for axis in _image_axes(axes)])
    if "c" not in axes:
        samples = samples[..., None]
    return samples.reshape(-1, *samples.shape[-3:])


def chunk_of(samples: NDArray[Any], shape: Sequence[int], axes: str, order: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Copy samples into a contiguous chunk of this shape, dtype and memory order "C" or "F"."""
    target = _image_axes(axes)
    chunk = samples.reshape([shape[axes.index(axis)] for axis in target])
    return np.array(chunk.transpose([target.index(axis) for axis in axes]), dtype, order="F" if order == "F" else "C")


def grouping_of(bands: int, wanted: str | None) -> int:
    """Return how so many bands are joined to images: as the parameter `bands` of the codec says, or by default."""
    if bands == 1 or (wanted == "triples") or (wanted is None and bands == 3):
        return TRIPLES
    return PLANES if wanted == "planes" or bands == 2 else FIRST_TRIPLE


def _groups(bands: int, grouping: int) -> list[tuple[int, int]]:
    """Return the first band and the number of bands in each image of a slice."""
    if grouping == TRIPLES:
        return [(first, min(3, bands - first)) for first in range(0, bands, 3)]
    start = 3 if grouping == FIRST_TRIPLE else 0
    return [(0, 3)] * (start > 0) + [(band, 1) for band in range(start, bands)]


def to_images(samples: NDArray[Any], grouping: int) -> NDArray[Any]:
    """Arrange samples (slices, height, width, bands) as contiguous images (images, height, width, 3); may be a view."""
    slices, height, width, bands = samples.shape
    groups = _groups(bands, grouping)
    if groups == [(0, 3)]:
        return np.ascontiguousarray(samples)
    if groups == [(0, 1)]:
        return np.repeat(samples, 3, axis=-1)
    images = np.empty((slices, len(groups), height, width, 3), samples.dtype)
    for number, (first, count) in enumerate(groups):
        images[:, number, ..., :count] = samples[..., first : first + count]
        images[:, number, ..., count:] = samples[..., first + count - 1, None]
    return images.reshape(-1, height, width, 3)


def from_images(images: NDArray[Any], bands: int, grouping: int) -> NDArray[Any]:
    """Take bands from images; a band that an image has several times, as the mean, rounded, halves up.

    Returns
    -------
    ndarray
        (slices, height, width, bands) of the dtype of `images`; a view where it can be.
    """
    groups = _groups(bands, grouping)
    if groups == [(0, 3)]:
        return images
    shaped = images.reshape(-1, len(groups), *images.shape[1:])
    samples = np.empty((len(shaped), *images.shape[1:3], bands), images.dtype)
    for number, (first, count) in enumerate(groups):
        copies = 4 - count
        alone = count if copies == 1 else count - 1
        samples[..., first : first + alone] = shaped[:, number, ..., :alone]
        if copies > 1:
            total = shaped[:, number, ..., alone:].sum(axis=-1, dtype=np.int32)
            samples[..., first + alone] = (2 * total + copies) // (2 * copies)
    return samples


def _image_axes(axes: str) -> str:
    """Return the axes in the order of samples: slices first, in the order that the array has them."""
    return "".join(axis for axis in axes if axis not in "yxc") + "yx" + ("c" if "c" in axes else "")
