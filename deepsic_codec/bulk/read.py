"""Read a region of many chunks and decode them as one batch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index, Region, chunks_covering, iter_grid
from deepsic_codec.codec.batching import in_halves
from deepsic_codec.codec.decode import PayloadToDecode, decode_payloads
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.reader import PayloadReader

Decode = Callable[[list[PayloadToDecode]], list[Any]]


def read_region(stored: StoredArray, region: Region, batch_size: int) -> NDArray[Any]:
    """Read a region, the fill value where chunks are missing.

    Parameters
    ----------
    stored : StoredArray
        The array.
    region : tuple of slice
        One for each axis, with start and stop within the array and step 1.
    batch_size : int
        Chunks that are fetched, and decoded in one call; bounds memory.

    Raises
    ------
    CorruptPayload, UnsupportedPayload
        If a chunk cannot be decoded. The message names the chunk.
    """
    result = np.full([part.stop - part.start for part in region], stored.fill_value, stored.array.dtype)
    reader, decode = stored.reader, in_halves(decode_payloads)
    indices = list(iter_grid(*chunks_covering(region, stored.chunks)))
    for k in range(0, len(indices), batch_size):
        jobs: dict[Index, PayloadToDecode] = {}
        for index, payload in reader.payloads(indices[k : k + batch_size]):
            if payload is not None:
                with reader.error_context(index):
                    jobs[index] = stored.parse(payload)
        for index, values in _decoded(jobs, decode, reader):
            copy_overlap(result, region, index, values)
    return result


def _decoded(
    jobs: dict[Index, PayloadToDecode], decode: Decode, reader: PayloadReader
) -> Iterator[tuple[Index, NDArray[Any]]]:
    by_model: dict[str, list[Index]] = {}
    for index, job in jobs.items():  # an array can have chunks of several models
        by_model.setdefault(job.key, []).append(index)
    for indices in by_model.values():
        try:
            yield from zip(indices, decode([jobs[index] for index in indices]), strict=True)
        except ValueError:  # decoding one by one tells which chunk it is
            for index in indices:
                with reader.error_context(index):
                    yield index, decode([jobs[index]])[0]


def copy_overlap(result: NDArray[Any], region: Region, index: Index, chunk: NDArray[Any]) -> None:
    """Copy the part of a chunk that lies in a region into the values of that region."""
    target, source = [], []
    for part, i, size in zip(region, index, chunk.shape, strict=True):
        start, stop = max(part.start, i * size), min(part.stop, (i + 1) * size)
        target.append(slice(start - part.start, stop - part.start))
        source.append(slice(start - i * size, stop - i * size))
    result[tuple(target)] = chunk[tuple(source)]


class BatchedArray:
    """An array for Dask to slice. The chunks of each slice are decoded as one batch, of up to `batch_size` chunks."""

    def __init__(self, stored: StoredArray, batch_size: int) -> None:
        self.stored, self.batch_size = stored, batch_size
        self.shape, self.dtype, self.ndim = stored.shape, stored.array.dtype, stored.array.ndim

    def __getitem__(self, key: Any) -> NDArray[Any]:
        parts = list(key) if isinstance(key, tuple) else [key]
        parts += [slice(None)] * (self.ndim - len(parts))
        region: list[slice] = []
        inner: list[Any] = []  # what the key selects of the region
        for part, size in zip(parts, self.shape, strict=True):
            if isinstance(part, slice):
                numbers: Any = range(*part.indices(size))
            elif np.ndim(part) == 0:  # Dask joins indices with the slice of the block
                numbers = [range(size)[int(part)]]
            else:
                part = np.asarray(part)
                numbers = np.flatnonzero(part) if part.dtype == bool else np.where(part < 0, part + size, part)
            low, high = (int(min(numbers)), int(max(numbers)) + 1) if len(numbers) else (0, 0)
            region.append(slice(low, high))
            if isinstance(part, slice):
                inner.append(_shifted(numbers, low))
            else:
                inner.append(0 if np.ndim(part) == 0 else np.asarray(numbers, int) - low)
        if any(part.start == part.stop for part in region):
            return np.empty([part.stop - part.start for part in region], self.dtype)[tuple(inner)]
        return self._read(tuple(region))[tuple(inner)]

    def _read(self, region: Region) -> NDArray[Any]:
        return read_region(self.stored, region, self.batch_size)


def _shifted(numbers: range, low: int) -> slice:
    stop = numbers.stop - low
    return slice(numbers.start - low, stop if stop >= 0 else None, numbers.step)
