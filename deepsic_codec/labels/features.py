"""Read the features of an array, quantised latents, without reconstructing pixels: training data for other networks."""

from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec.axes import Index, ceil_div, grid_shape, iter_grid
from deepsic_codec.codec.bands import default_grouping
from deepsic_codec.codec.decode import decode_latents, decode_symbols
from deepsic_codec.codec.params import NO_SPECTRAL
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.payload.fields import COLOURS
from deepsic_codec.require import require
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.embedded import use_embedded

if TYPE_CHECKING:
    import dask.array


def decode_features(array: zarr.Array, *, dequantise: bool = False) -> "dask.array.Array":
    """Return the features of an array as a Dask array, decoded when it is computed.

    Parameters
    ----------
    array : zarr.Array
        Stored with DeepSIC.
    dequantise : bool
        Multiply the symbols by the quantiser steps of the model at the quality of each chunk, rounded to integers. The
        networks work on this scale, which does not depend on the quality.

    Returns
    -------
    dask.array.Array
        int16, or float32 with `dequantise`: (slice axes of the array, latents, rows, columns). Symbols of chunks with a
        trellis are in halves of a step. A block is a chunk, or
        a shard if there are shards. If the bands make several images, their latents follow one another. A row or
        column covers 16 pixels. Chunks at the edge of the array are complete, and missing chunks are 0.

    Raises
    ------
    UnsupportedPayload
        If the array is not stored with DeepSIC.
    ConfigurationError
        If several chunks share the bands of a pixel: each chunk has its own features.
    """
    require("dask", "dask")
    import dask
    import dask.array

    from deepsic_codec.model.families import architecture_from  # late, as all of models
    from deepsic_codec.model.zoo import find_model

    stored = StoredArray(array)
    stored.layout.check_first()
    use_embedded(array)
    axes, grid = stored.axes, stored.grid
    if axes.bands(grid) > 1:
        raise ConfigurationError(
            "chunks: the bands of a pixel are in several chunks, each with features of its own; features need "
            "chunks of all bands"
        )
    bands = axes.bands(stored.chunks)
    together = default_grouping(bands) == COLOURS and (bands == 1 or stored.params.spectral != NO_SPECTRAL)
    images = 1 if together else bands
    latents = images * architecture_from(find_model(stored.decoder).architecture).latents
    order = [axes.index(axis) for axis in axes.slice_axes + "yx"]
    # A task for each shard reads the index of the shard once.
    per_block = grid_shape(array.shards or array.chunks, array.chunks)
    read = dask.delayed(_read_block, pure=True)

    blocks = np.empty([ceil_div(grid[axis], per_block[axis]) for axis in order], object)
    for position in np.ndindex(*blocks.shape):
        start, stop = [0] * len(axes), [1] * len(axes)
        for axis, number in zip(order, position, strict=True):
            start[axis] = number * per_block[axis]
            stop[axis] = min(start[axis] + per_block[axis], grid[axis])
        shape = _block_shape(stored, start, stop, latents)
        block = read(array, tuple(start), tuple(stop), shape, dequantise)
        blocks[position] = dask.array.from_delayed(block, shape, np.float32 if dequantise else np.int16)
    # An axis of one block for the latents, between the slices and the image.
    return dask.array.block(np.expand_dims(blocks, len(axes.slice_axes)).tolist())


def _chunk_shape(stored: StoredArray, latents: int) -> Index:
    """Return the shape of the features of a chunk."""
    axes, chunks = stored.axes, stored.chunks
    rows, columns = (ceil_div(size, LATENT_STRIDE) for size in (axes.height(chunks), axes.width(chunks)))
    return (*axes.slice_shape(chunks), latents, rows, columns)


def _block_shape(stored: StoredArray, start: list[int], stop: list[int], latents: int) -> Index:
    """Return the shape of the features of a block of chunks."""
    chunk = _chunk_shape(stored, latents)
    counts = [stop[axis] - start[axis] for axis in map(stored.axes.index, stored.axes.slice_axes + "yx")]
    counts.insert(-2, 1)
    return tuple(size * count for size, count in zip(chunk, counts, strict=True))


def _read_block(array: zarr.Array, start: Index, stop: Index, shape: Index, dequantise: bool) -> NDArray[Any]:
    """Decode the features of a block of chunks."""
    use_embedded(array)  # where this runs, which may be another machine
    stored = StoredArray(array)
    axes = stored.axes
    chunk = _chunk_shape(stored, shape[-3])
    features = np.zeros(shape, np.float32 if dequantise else np.int16)
    for index, payload in stored.reader.payloads(iter_grid(start, stop)):
        if payload is None:
            continue
        with stored.reader.error_context(index):
            parsed = stored.parse(payload)
            decoded: Any = decode_latents(parsed) if dequantise else decode_symbols(parsed)
        position = [index[axis] - start[axis] for axis in map(axes.index, axes.slice_axes + "yx")]
        position.insert(-2, 0)
        region = tuple(slice(i * size, (i + 1) * size) for i, size in zip(position, chunk, strict=True))
        features[region] = decoded.reshape(chunk)
    return features
