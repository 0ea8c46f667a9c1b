"""Read the features of an array, quantised latents, without reconstructing pixels: for those who train on them."""

from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec.axes import Index
from deepsic_codec.codec import core
from deepsic_codec.codec.bands import grouping_of
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.labels.attributes import Reader
from deepsic_codec.labels.query import check_order
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.payload.fields import image_count
from deepsic_codec.stored import embedded as embed
from deepsic_codec.stored import layout as stored
from deepsic_codec.stored.geometry import Geometry

if TYPE_CHECKING:
    import dask.array


def decode_features(array: zarr.Array) -> "dask.array.Array":
    """Return the features of an array as a Dask array, decoded when it is computed.

    Parameters
    ----------
    array : zarr.Array
        Stored with DeepSIC.

    Returns
    -------
    dask.array.Array
        int16 (slice axes of the array, latents, rows, columns), a block per chunk. Where bands make several images,
        the latents of all are there, one after the other. Rows and columns are one for 16 pixels; chunks at the edge
        have all that a chunk has, and a missing chunk is 0. Divide by the gains of the
        model and quality for the scale that networks see.

    Raises
    ------
    UnsupportedPayload
        If the array is not stored with DeepSIC.
    ConfigurationError
        If chunks part the channels: there are features for each part.
    """
    import dask
    import dask.array

    from deepsic_codec.model.zoo import find_model

    check_order(array)
    config = stored.codec_of(array)
    embed.use_embedded(array)
    geometry = Geometry.of(array, config.axes, config.label_tile)
    if "c" in config.axes and geometry.grid[config.axes.index("c")] > 1:
        raise ConfigurationError("chunks part the channels of the array: there are features for each of the parts")
    bands = geometry.chunks[config.axes.index("c")] if "c" in config.axes else 1
    images = image_count(bands, grouping_of(bands, config.bands))
    latents = images * int(find_model(config.identity()[0]).architecture["latents"])
    slices = [axis for axis in config.axes if axis not in "yxc"]
    sizes = {axis: geometry.chunks[config.axes.index(axis)] for axis in (*slices, "y", "x")}
    rows, columns = (-(-sizes[axis] // LATENT_STRIDE) for axis in "yx")
    shape = (*(sizes[axis] for axis in slices), latents, rows, columns)
    order = [config.axes.index(axis) for axis in (*slices, "y", "x")]
    read = dask.delayed(_read, pure=True)

    blocks = np.empty([geometry.grid[axis] for axis in order], object)
    for place in np.ndindex(*blocks.shape):
        index = [0] * len(config.axes)
        for axis, number in zip(order, place, strict=True):
            index[axis] = number
        blocks[place] = dask.array.from_delayed(read(array, tuple(index), shape), shape, np.int16)
    # An axis of one block for the latents, between the slices and the image.
    return dask.array.block(np.expand_dims(blocks, len(slices)).tolist())


def _read(array: zarr.Array, index: Index, shape: Index) -> NDArray[np.int16]:
    embed.use_embedded(array)  # where this runs, which may be another machine
    reader = Reader(array)
    ((_, payload),) = reader.payloads([index])
    if payload is None:
        return np.zeros(shape, np.int16)
    with reader.named(index):
        job = core.decode_job(payload, tuple(array.chunks))
        features: Any = core.decode_features(job)
    return features.reshape(shape)
