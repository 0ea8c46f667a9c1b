"""Read a region of many chunks and decode them as one batch."""

from typing import Any

import numpy as np
import zarr

from deepsic_codec.axes import Region, chunks_covering, iter_grid
from deepsic_codec.codec import core
from deepsic_codec.codec.memory import in_halves
from deepsic_codec.labels.attributes import Reader


def read_region(array: zarr.Array, region: Region, batch_size: int) -> np.ndarray:
    """Read a region.

    Parameters
    ----------
    array : zarr.Array
        Stored with DeepSIC.
    region : tuple of slice
        One for each axis, with start and stop within the array and step 1.
    batch_size : int
        Chunks that are fetched, and decoded in one call; bounds memory.

    Returns
    -------
    ndarray
        Its values; the fill value where chunks are missing.

    Raises
    ------
    CorruptPayload, UnsupportedPayload
        Naming the chunk that cannot be decoded.
    """
    fill = 0 if array.fill_value is None else array.fill_value
    out = np.full([part.stop - part.start for part in region], fill, array.dtype)
    reader, decode = Reader(array), in_halves(core.run_decode)
    indices = list(iter_grid(*chunks_covering(region, array.chunks)))
    for k in range(0, len(indices), batch_size):
        jobs: dict[tuple[int, ...], core.DecodeJob] = {}
        for index, payload in reader.payloads(indices[k : k + batch_size]):
            if payload is not None:
                with reader.named(index):
                    jobs[index] = core.decode_job(payload, shape=tuple(array.chunks))
        for index, values in _decoded(jobs, decode, reader):
            _place(out, region, index, values)
    return out


def _decoded(jobs: dict[tuple[int, ...], core.DecodeJob], decode: Any, reader: Reader) -> Any:
    kinds: dict[bytes, list[tuple[int, ...]]] = {}
    for index, job in jobs.items():  # chunks of several models can be in one array
        kinds.setdefault(job.key, []).append(index)
    for indices in kinds.values():
        try:
            yield from zip(indices, decode([jobs[index] for index in indices]), strict=True)
        except ValueError:  # which one it is, decoding them one by one tells
            for index in indices:
                with reader.named(index):
                    yield index, decode([jobs[index]])[0]


def _place(out: np.ndarray, region: Region, index: tuple[int, ...], values: np.ndarray) -> None:
    to, of = [], []
    for part, i, size in zip(region, index, values.shape, strict=True):
        start, stop = max(part.start, i * size), min(part.stop, (i + 1) * size)
        to.append(slice(start - part.start, stop - part.start))
        of.append(slice(start - i * size, stop - i * size))
    out[tuple(to)] = values[tuple(of)]


class Source:
    """An array that Dask slices, each slice decoded as one batch.

    Parameters
    ----------
    array : zarr.Array
        Stored with DeepSIC.
    batch_size : int
        Chunks decoded in one call.
    """

    def __init__(self, array: zarr.Array, batch_size: int) -> None:
        self.array, self.batch_size = array, batch_size
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, key: Any) -> np.ndarray:
        parts = list(key) if isinstance(key, tuple) else [key]
        parts += [slice(None)] * (self.ndim - len(parts))
        region: list[slice] = []
        inner: list[Any] = []
        for part, size in zip(parts, self.shape, strict=True):
            if isinstance(part, slice):
                numbers: Any = range(*part.indices(size))
            elif np.ndim(part) == 0:  # Dask joins indices with the slice that its block is
                numbers = [range(size)[int(part)]]
            else:
                part = np.asarray(part)
                numbers = np.flatnonzero(part) if part.dtype == bool else np.where(part < 0, part + size, part)
            low, high = (int(min(numbers)), int(max(numbers)) + 1) if len(numbers) else (0, 0)
            region.append(slice(low, high))
            if isinstance(part, slice):
                inner.append(slice(*_shifted(numbers, low)))
            else:
                inner.append(0 if np.ndim(part) == 0 else np.asarray(numbers, int) - low)
        if any(part.start == part.stop for part in region):
            return np.empty([part.stop - part.start for part in region], self.dtype)[tuple(inner)]
        return read_region(self.array, tuple(region), self.batch_size)[tuple(inner)]


def _shifted(numbers: range, low: int) -> tuple[int, int | None, int]:
    stop = numbers.stop - low
    return numbers.start - low, (stop if stop >= 0 else None), numbers.step
