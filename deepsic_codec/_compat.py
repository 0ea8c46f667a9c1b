"""The only place that knows zarr's private modules and the differences between its versions."""

from typing import Any

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, NDBuffer, default_buffer_prototype  # public as zarr.buffer since zarr 3.1
from zarr.core.sync import sync
from zarr.storage._common import make_store_path

__all__ = [
    "Buffer",
    "NDBuffer",
    "array_config",
    "default_buffer_prototype",
    "make_store_path",
    "native_dtype",
    "read_part",
    "read_points",
    "setting",
    "sync",
    "write_empty_chunks",
]


def native_dtype(dtype: Any) -> np.dtype:
    """Return the NumPy dtype of a zarr data type, which is a class of its own since zarr 3.1."""
    return np.dtype(dtype.to_native_dtype() if hasattr(dtype, "to_native_dtype") else dtype)


async def read_part(store: Any, key: str, prototype: Any, part: ByteRequest | None) -> Buffer | None:
    """Read a byte range of a value, or as much as the value has of it; None for a missing key.

    The stores of zarr clip a range beyond the end; Icechunk refuses it since version 2. An OSError of a store names the
    key.
    """
    try:
        return await store.get(key, prototype, part)
    except Exception as error:
        if not isinstance(part, RangeByteRequest) or "out of bounds" not in str(error):
            if isinstance(error, OSError):
                _name_key(error, key)
            raise
    return await store.get(key, prototype, OffsetByteRequest(part.start))


def _name_key(error: OSError, key: str) -> None:
    """Put the key into the message of an error, as the name of its file if it has none."""
    if key not in str(error) and error.filename is None and error.errno is not None:
        error.filename = key
    if key not in str(error):
        error.args = (f"{key}: {error}",)


async def read_points(array: Any, points: tuple[Any, ...]) -> Any:
    """Read single elements of an AsyncArray, given an array of indices for each axis."""
    if hasattr(array, "get_coordinate_selection"):
        return await array.get_coordinate_selection(points)
    from zarr.core.indexing import CoordinateIndexer  # zarr 3.0

    indexer = CoordinateIndexer(points, array.shape, array.metadata.chunk_grid)
    values = await array._get_selection(indexer, prototype=default_buffer_prototype())
    return np.asarray(values).reshape(indexer.sel_shape)


def setting(value: Any) -> str:
    """Return a codec's setting such as "little" or "start" as text; before zarr 3.4 it is an enum."""
    return str(getattr(value, "value", value))


def array_config(array: Any) -> Any:
    """Return the runtime configuration of an array, such as whether it stores empty chunks."""
    config = getattr(array.async_array if hasattr(array, "async_array") else array._async_array, "config", None)
    return config if config is not None else array._async_array._config  # before zarr 3.1


def write_empty_chunks(array: Any) -> bool:
    """Tell whether an array stores chunks that are the fill value everywhere."""
    return bool(array_config(array).write_empty_chunks)
