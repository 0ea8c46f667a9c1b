"""Bands to the images that networks see, and back.

Networks see images of three channels: three bands, two bands of which the second is repeated, or one band three times.
Joining bands pays only if they are alike, as colours are.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.fields import FIRST_TRIPLE, PLANES, TRIPLES


def grouping_of(bands: int, joining: str | None) -> int:
    """Return how N bands are joined to images; `joining` is the codec's parameter `bands`."""
    if bands == 1 or (joining == "triples") or (joining is None and bands == 3):
        return TRIPLES
    return PLANES if joining == "planes" or bands == 2 else FIRST_TRIPLE


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
    """Take bands from images; a band that was repeated is the mean of its copies, rounded half up.

    Returns
    -------
    ndarray
        (slices, height, width, bands) of the dtype of `images`; a view where possible.
    """
    groups = _groups(bands, grouping)
    if groups == [(0, 3)]:
        return images
    shaped = images.reshape(-1, len(groups), *images.shape[1:])
    samples = np.empty((len(shaped), *images.shape[1:3], bands), images.dtype)
    for number, (first, count) in enumerate(groups):
        copies = 4 - count
        unrepeated = count if copies == 1 else count - 1
        samples[..., first : first + unrepeated] = shaped[:, number, ..., :unrepeated]
        if copies > 1:
            total = shaped[:, number, ..., unrepeated:].sum(axis=-1, dtype=np.int32)
            samples[..., first + unrepeated] = (2 * total + copies) // (2 * copies)
    return samples
