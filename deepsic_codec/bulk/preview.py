"""Read an array at a reduced size, from the starts of its payloads where these are enough."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from math import prod
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Region, ceil_div, chunks_covering, iter_grid
from deepsic_codec.bulk.read import BatchedArray, copy_overlap
from deepsic_codec.codec.reduced import check_scale, decode_reduced, needed_length, parse_start
from deepsic_codec.errors import ConfigurationError, DeepSICError, UnsupportedArray
from deepsic_codec.labels import html
from deepsic_codec.model.threads import parallel_map
from deepsic_codec.payload.limits import check_count, check_memory
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import Counter

BATCH = 64  # chunks that are read and decoded at a time
MAX_PICTURE = 1 << 26  # bytes of samples of an array that a notebook shows a picture of


def read_preview(
    store: Any,
    name: str | None = None,
    *,
    scale: int | None = None,
    bytes_per_chunk: int | None = None,
    groups: int | None = None,
    region: Sequence[slice] | None = None,
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
    scale : {8, 1, 2, 4, 16}, optional
        Rows and columns of the array in one of the result; 1 by default with `bytes_per_chunk` or `groups`.
    bytes_per_chunk : int, optional
        Bytes to read of each chunk at most, if the size needs more: the result has less detail. At least the bytes of
        the first checksum are read, and chunks of which no part can be verified as a whole.
    groups : int, optional
        Parts to read of each chunk at most, if the size needs more: each ends where a checksum does. A chunk with a
        start for each reduced size has up to 4 of these and, between them, 3 ends of equal parts for each 8 KiB; one
        with bands of several resolutions has 5, for 1/16 to the whole.
    region : sequence of slice, optional
        Part of the array, a slice for each of its first axes, in its pixels; rows and columns begin at a multiple of
        `scale`. The whole array by default. Only chunks of the region are read.
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
        For another scale, a number of bytes or groups below 1, or a region that does not fit the scale.
    UnsupportedArray
        If rows or columns of a chunk are no multiple of `scale`.
    CorruptPayload, UnsupportedPayload
        If a chunk cannot be decoded. The message names the chunk.
    """
    stored = StoredArray.open(store, name, counter=counter, mode="r", options=storage_options, **kwargs)
    embedded.use_embedded(stored.array)
    if scale is None:
        scale = 8 if bytes_per_chunk is None and groups is None else 1
    reduced = ReducedArray(stored, scale, bytes_per_chunk, groups)
    return reduced[()] if region is None else reduced[reduced.region_of(region)]


def thumbnail(stored: StoredArray) -> NDArray[np.uint8] | None:
    """Return a picture of the first slice of an array that is quickly read, uint8 (H, W, 3); None of others."""
    if stored.array.nbytes > MAX_PICTURE or not stored.array.size:
        return None
    with suppress(DeepSICError):
        samples = stored.axes.to_samples(read_preview(stored.array, scale=8))[0]
        return html.to_picture(samples, stored)
    return None


class ReducedArray(BatchedArray):
    """An array at a reduced size, to slice. Each slice reads the starts of its chunks.

    Parameters
    ----------
    stored : StoredArray
        The array.
    scale : int
        Rows and columns in one of this array.
    bytes_per_chunk, groups : int, optional
        Bytes, and parts with a checksum, to read at most, if the size needs more.

    Attributes
    ----------
    chunks : tuple of int
        Shape of a chunk at this size.

    Raises
    ------
    ConfigurationError, UnsupportedArray
        For a scale that there is not, or that does not divide chunks, or a number of bytes or groups below 1.
    """

    def __init__(
        self, stored: StoredArray, scale: int, bytes_per_chunk: int | None = None, groups: int | None = None
    ) -> None:
        check_scale(scale)
        for name, number in (("bytes_per_chunk", bytes_per_chunk), ("groups", groups)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
                raise ConfigurationError(f"{name}: expected a number from 1 on, got {number!r}")
        super().__init__(stored, BATCH)
        self.scale, self._limit, self._groups = scale, bytes_per_chunk, groups
        sizes, chunks = list(stored.shape), list(stored.chunks)
        for axis in (stored.axes.y, stored.axes.x):
            size, chunk = sizes[axis], chunks[axis]
            if chunk % scale and size > chunk:
                raise UnsupportedArray(f"scale: {scale} does not divide chunks of {stored.chunks}; pass a smaller one")
            sizes[axis] = max(min(size, 1), size // scale if size % chunk else ceil_div(size, scale))
            chunks[axis] = ceil_div(chunk, scale)
        self.shape, self.chunks = tuple(sizes), tuple(chunks)

    def region_of(self, region: Sequence[slice]) -> Region:
        """Return the region of this array for a region of the array at its full size."""
        axes, parts = self.stored.axes, []
        if (
            not isinstance(region, tuple | list)
            or len(region) > self.ndim
            or not all(isinstance(part, slice) for part in region)
        ):
            raise ConfigurationError(f"region: expected a slice for each of up to {self.ndim} axes, got {region!r}")
        for axis, (part, size) in enumerate(zip(region, self.stored.shape, strict=False)):
            start, stop, step = part.indices(size)
            scale = self.scale if axis in (axes.y, axes.x) else 1
            if step != 1 or start % scale:
                raise ConfigurationError(f"region: {part} has a step, or does not begin at a multiple of {scale}")
            parts.append(slice(start // scale, ceil_div(stop, scale)))
        return tuple(parts)

    def _read(self, region: Region) -> NDArray[Any]:
        stored, scale, reader = self.stored, self.scale, self.stored.reader
        first, last = chunks_covering(region, self.chunks)
        sizes = [part.stop - part.start for part in region]
        count = prod(stop - start for start, stop in zip(first, last, strict=True))
        check_count(count, "a preview", UnsupportedArray)
        check_memory(prod(sizes) * self.dtype.itemsize, "a preview", UnsupportedArray)
        result = np.full(sizes, stored.fill_value, self.dtype)
        remaining, limits = iter_grid(first, last), (self._limit, self._groups)
        needed = partial(needed_length, scale=scale, limit=self._limit, groups=self._groups)
        while indices := list(islice(remaining, BATCH)):
            read = partial(reader.read_as_needed, needed=needed)
            starts = [(index, start) for index, start in reader.map(indices, read) if start is not None]
            payloads = []
            for index, start in starts:
                with reader.error_context(index):
                    args = start, scale, stored.chunks, self.dtype, stored.params
                    payloads.append(parse_start(*args, *limits))

            def decode(number: int, starts: Any = starts, payloads: Any = payloads) -> NDArray[Any]:
                with reader.error_context(starts[number][0]):
                    return decode_reduced(payloads[number], scale)

            for (index, _), values in zip(starts, parallel_map(decode, range(len(starts))), strict=True):
                copy_overlap(result, region, index, values)
        return result
