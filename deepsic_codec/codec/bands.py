"""Bands to the images that networks see, and back.

Networks see images of three channels, and were trained on colours. An image holds three bands that are alike, or one
band three times.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.fields import COLOURS, PLANES


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


def label_images(bands: NDArray[Any]) -> NDArray[Any]:
    """Return the images (slices, height, width, 3) that labels are scored on: the first three bands, or the first."""
    return to_images(bands[..., : 3 if bands.shape[-1] >= 3 else 1], COLOURS)
