"""Read an array at a reduced size, from the starts of its payloads where these are enough."""

from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.codec.reduced import check_scale, decode_reduced, needed_length, parse_start
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.model.threads import parallel_map
from deepsic_codec.payload.limits import check_count, check_memory
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import Counter

BATCH = 64  # chunks that are read and decoded at a time


def read_preview(
    store: Any,
    name: str | None = None,
    *,
    scale: int = 8,
    storage_options: Mapping[str, Any] | None = None,
    counter: Counter | None = None,
    **kwargs: Any,
) -> NDArray[Any]:
    """Read an array with a part of its rows and columns: means of blocks of pixels, about.

    Chunks that are coded as wavelets have the reduced sizes at their start, so a part of each is read: at 1/8 a few
    percent. Others (features, a bound on the error, small chunks) are read and decoded as a whole, and averaged.

    Parameters
    ----------
    store, name, storage_options, **kwargs
        The array, as for `open_archive`.
    scale : {8, 1, 2, 4, 16}
        Rows and columns of the array in one of the result.
    counter : Counter, optional
        Counts requests and bytes (`deepsic_codec.stored.location.Counter`).

    Returns
    -------
    ndarray
        The axes and dtype of the array; rows and columns divided by `scale` and rounded up. Rounded down where the last
        chunk is filled up beyond the array. Pixels of which no sample is data have the NoData value; missing
        chunks have the fill value.

    Raises
    ------
    ConfigurationError
        For another scale.
    UnsupportedArray
        If rows or columns of a chunk are no multiple of `scale`.
    CorruptPayload, UnsupportedPayload
        If a chunk cannot be decoded. The message names the chunk.
    """
    check_scale(scale)
    stored = StoredArray.open(store, name, counter=counter, mode="r", options=storage_options, **kwargs)
    embedded.use_embedded(stored.array)
    sizes, chunks = list(stored.shape), list(stored.chunks)
    for axis in (stored.axes.y, stored.axes.x):
        size, chunk = sizes[axis], chunks[axis]
        if chunk % scale and size > chunk:
            raise UnsupportedArray(f"scale: {scale} does not divide chunks of {stored.chunks}; pass a smaller one")
        sizes[axis] = max(min(size, 1), size // scale if size % chunk else ceil_div(size, scale))
        chunks[axis] = ceil_div(chunk, scale)
    count = int(np.prod(stored.grid, dtype=object))
    check_count(count, "a preview", UnsupportedArray)
    check_memory(int(np.prod(sizes, dtype=object)) * stored.array.dtype.itemsize, "a preview", UnsupportedArray)
    result = np.full(sizes, stored.fill_value, stored.array.dtype)
    reader = stored.reader
    remaining = stored.indices()
    while indices := list(islice(remaining, BATCH)):
        read = partial(reader.read_as_needed, needed=partial(needed_length, scale=scale))
        starts = [(index, start) for index, start in reader.map(indices, read) if start is not None]
        payloads = []
        for index, start in starts:
            with reader.error_context(index):
                payloads.append(parse_start(start, scale, stored.chunks, stored.array.dtype, stored.params))

        def decode(number: int, starts: Any = starts, payloads: Any = payloads) -> NDArray[Any]:
            with reader.error_context(starts[number][0]):
                return decode_reduced(payloads[number], scale)

        for (index, _), values in zip(starts, parallel_map(decode, range(len(starts))), strict=True):
            first = [i * size for i, size in zip(index, chunks, strict=True)]
            target = tuple(slice(start, start + size) for start, size in zip(first, chunks, strict=True))
            result[target] = values[tuple(slice(0, size) for size in result[target].shape)]
    return result
