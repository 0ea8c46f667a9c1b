"""Read the features of an array, quantised latents, without reconstructing pixels: for those who train on them."""

from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec.axes import Index, ceil_div
from deepsic_codec.codec.bands import grouping_of
from deepsic_codec.codec.decode import decode_symbols, parse_payload
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.payload.fields import image_count
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray

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

    stored = StoredArray(array)
    stored.layout.check_first()
    embedded.use_embedded(array)
    axes, chunks, grid = stored.axes, stored.chunks, stored.grid
    if axes.bands(grid) > 1:
        raise ConfigurationError("chunks part the channels of the array: there are features for each of the parts")
    bands = axes.bands(chunks)
    images = image_count(bands, grouping_of(bands, stored.params.bands))
    latents = images * int(find_model(stored.decoder).architecture["latents"])
    rows, columns = (ceil_div(size, LATENT_STRIDE) for size in (axes.height(chunks), axes.width(chunks)))
    shape = (*axes.slice_shape(chunks), latents, rows, columns)
    order = [axes.index(axis) for axis in axes.slice_axes + "yx"]
    read = dask.delayed(_read, pure=True)

    blocks = np.empty([grid[axis] for axis in order], object)
    for place in np.ndindex(*blocks.shape):
        index = [0] * len(axes)
        for axis, number in zip(order, place, strict=True):
            index[axis] = number
        blocks[place] = dask.array.from_delayed(read(array, tuple(index), shape), shape, np.int16)
    # An axis of one block for the latents, between the slices and the image.
    return dask.array.block(np.expand_dims(blocks, len(axes.slice_axes)).tolist())


def _read(array: zarr.Array, index: Index, shape: Index) -> NDArray[np.int16]:
    embedded.use_embedded(array)  # where this runs, which may be another machine
    stored = StoredArray(array)
    payload = stored.reader.payload(index)
    if payload is None:
        return np.zeros(shape, np.int16)
    with stored.reader.error_context(index):
        job = parse_payload(payload, stored.chunks)
        features: Any = decode_symbols(job)
    return features.reshape(shape)
