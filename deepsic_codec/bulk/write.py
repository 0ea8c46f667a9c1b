"""Encode a block of whole chunks in batches and put the payloads under their keys, nothing read before."""

import asyncio
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from deepsic_codec._compat import default_buffer_prototype, sync, write_empty_chunks
from deepsic_codec.axes import Index, ceil_div, grid_shape, iter_grid
from deepsic_codec.bulk.layout import Layout
from deepsic_codec.codec import core
from deepsic_codec.codec.memory import in_halves
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload.sections import LABELS
from deepsic_codec.stored import layout as stored

CONCURRENCY = 32  # writes in flight per task
# Trying again does not help against these.
HOPELESS = (PermissionError, NotImplementedError, TypeError, ValueError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Options:
    """How a block is written.

    Attributes
    ----------
    batch_size : int
        Chunks in one call of the model.
    retries : int
        How often a failing write is tried again.
    backoff : float
        Seconds before the first retry; doubled for each further one, and up to doubled again at random.
    process : int
        Where the target was opened: what other processes write to a memory store nobody would ever see.
    """

    batch_size: int = 16
    retries: int = 5
    backoff: float = 0.2
    process: int = field(default_factory=os.getpid)


class Heads(Mapping[Index, bytes]):
    """Starts of payloads by position in the grid of chunks, packed: there may be millions.

    Parameters
    ----------
    counts : tuple of int
        Chunks of the array along each axis.
    numbers, starts, stops : ndarray
        int64: position of each chunk in the flattened grid, ascending, and where its head is in `data`.
    data : bytes
        All heads.
    """

    def __init__(self, counts: Index, numbers: Any = (), starts: Any = (), stops: Any = (), data: bytes = b"") -> None:
        self.counts, self.data = counts, data
        self.numbers, self.starts, self.stops = (np.asarray(values, np.int64) for values in (numbers, starts, stops))

    @classmethod
    def pack(cls, counts: Index, heads: Mapping[Index, bytes]) -> "Heads":
        """Pack heads."""
        items = sorted(heads.items())
        numbers = [np.ravel_multi_index(index, counts) for index, _ in items]
        stops = np.cumsum([0, *(len(data) for _, data in items)])
        return cls(counts, numbers, stops[:-1], stops[1:], b"".join(data for _, data in items))

    @classmethod
    def join(cls, counts: Index, parts: Sequence["Heads"]) -> "Heads":
        """Join the heads of blocks."""
        if not parts:
            return cls(counts)
        shifts = np.cumsum([0, *(len(part.data) for part in parts)])[:-1]
        numbers = np.concatenate([part.numbers for part in parts])
        starts, stops = (
            np.concatenate([getattr(part, name) + shift for part, shift in zip(parts, shifts, strict=True)])
            for name in ("starts", "stops")
        )
        order = np.argsort(numbers, kind="stable")
        return cls(counts, numbers[order], starts[order], stops[order], b"".join(part.data for part in parts))

    def __getitem__(self, index: Index) -> bytes:
        number = np.ravel_multi_index(index, self.counts)
        place = int(np.searchsorted(self.numbers, number))
        if place == len(self.numbers) or self.numbers[place] != number:
            raise KeyError(index)
        return self.data[int(self.starts[place]) : int(self.stops[place])]

    def __iter__(self) -> Iterator[Index]:
        for number in self.numbers:
            yield tuple(int(i) for i in np.unravel_index(number, self.counts))

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass
class Written:
    """What became of a block.

    Attributes
    ----------
    heads : Heads
        The start of each payload written, to the end of its labels.
    empty : int
        Chunks that are the fill value everywhere and therefore not stored.
    nbytes : int
        Bytes stored.
    samples : int
        Samples looked at.
    failed : dict of str to str
        Keys that could not be written, and why.
    """

    heads: Heads
    empty: int = 0
    nbytes: int = 0
    samples: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def write_block(block: Any, array: zarr.Array, first: Index, todo: Sequence[Index] | None, options: Options) -> Written:
    """Write a block of an array.

    Parameters
    ----------
    block : ndarray
        Values, from the first sample of a chunk (of a shard, if there are shards) to the last of one, or of the array.
    array : zarr.Array
        The array.
    first : tuple of int
        The chunk that the block begins with.
    todo : sequence of tuple of int, optional
        The chunks to encode, all by default. Others are complete; those of a shard are copied.
    options : Options
        How to write.

    Raises
    ------
    UnsupportedArray
        If the block is not what was announced. Writes that fail are returned, not raised: others may go on.
    """
    if isinstance(array.store, MemoryStore) and os.getpid() != options.process:
        raise UnsupportedArray("target: a memory store is lost with the process that writes it; use the threads of one")
    if np.ma.is_masked(block):
        raise UnsupportedArray("source: masked values, for which the codec has no value; fill them first")
    writer = _BlockWriter(array, np.asarray(block), first, options)
    whole = list(iter_grid(first, writer.last))
    result = writer.write(whole, whole if todo is None else todo)
    result.heads = Heads.pack(grid_shape(array.shape, array.chunks), writer.heads)
    return result


class _BlockWriter:
    def __init__(self, array: zarr.Array, block: np.ndarray, first: Index, options: Options) -> None:
        self.array, self.block, self.first, self.options = array, block, first, options
        self.layout = Layout(array)
        self.origin = tuple(i * chunk for i, chunk in zip(first, array.chunks, strict=True))
        stop = tuple(start + size for start, size in zip(self.origin, block.shape, strict=True))
        if any(end > size for end, size in zip(stop, array.shape, strict=True)):
            raise UnsupportedArray(f"block {block.shape} at {self.origin} goes beyond the array {array.shape}")
        self.last = tuple(ceil_div(end, chunk) for end, chunk in zip(stop, array.chunks, strict=True))
        self.skip_empty = not write_empty_chunks(array)
        # As zarr does: what stands for "no fill value" in format 2 reads as zero.
        self.fill = 0 if array.fill_value is None else array.fill_value
        self.heads: dict[Index, bytes] = {}
        self.result = Written(Heads(grid_shape(array.shape, array.chunks)))
        self.encode = in_halves(core.run_encode)

    def write(self, whole: list[Index], todo: Sequence[Index]) -> Written:
        encoded = self._encoded(todo)
        if self.array.shards is None:
            for batch in encoded:
                self._store({self.layout.key(index): self._bytes(data) for index, data in batch.items()})
                self._count(batch, {self.layout.key(index) for index in batch})
            return self.result
        payloads = {index: data for batch in encoded for index, data in batch.items()}
        new = set(todo)
        payloads |= self._complete([index for index in whole if index not in new])
        shards: dict[Index, dict[Index, bytes]] = {}
        for index in whole:
            data = payloads.get(index)
            mine = shards.setdefault(stored.shard_of(self.array, index), {})
            if data is not None:
                mine[index] = data
        for place, mine in shards.items():
            self._store({self.layout.key(place): self.layout.shard(mine) if mine else None})
            self._count({index: mine[index] for index in mine if index in new}, {self.layout.key(place)})
        self.result.empty = sum(data is None for data in payloads.values())
        return self.result

    def _encoded(self, todo: Sequence[Index]) -> Iterator[dict[Index, bytes | None]]:
        """Yield the payloads of chunks in batches, None for chunks that are the fill value everywhere."""
        for batch in _batches(todo, self.options.batch_size):
            jobs: dict[Index, core.EncodeJob] = {}
            payloads: dict[Index, bytes | None] = dict.fromkeys(batch)
            for index in batch:
                values = self._values(index)
                self.result.samples += values.size
                if not (self.skip_empty and self._is_fill(values)):
                    jobs[index] = self._job(values)
            try:
                payloads.update(zip(jobs, self.encode(list(jobs.values())) if jobs else (), strict=True))
            except Exception as error:
                error.add_note(f"while encoding chunks {', '.join(map(str, jobs))} of array {self.array.path!r}")
                raise
            yield payloads

    def _is_fill(self, values: np.ndarray) -> bool:
        if self.fill != self.fill:
            return bool(np.isnan(values).all())
        return bool((values == self.fill).all())

    def _values(self, index: Index) -> np.ndarray:
        """Return the samples of a chunk that lie within the array."""
        starts = (i * chunk - start for i, chunk, start in zip(index, self.array.chunks, self.origin, strict=True))
        return self.block[tuple(slice(a, a + n) for a, n in zip(starts, self.array.chunks, strict=True))]

    def _job(self, values: np.ndarray) -> core.EncodeJob:
        missing = [chunk - size for chunk, size in zip(self.array.chunks, values.shape, strict=True)]
        inside = values.shape if any(missing) else None
        if inside is not None:
            # The last samples repeated cost few bits, where the fill value would make an edge that shows in labels.
            values = np.pad(values, [(0, count) for count in missing], mode="edge")
        return core.encode_job(self.layout.config, values, order=self.layout.order, inside=inside)

    def _bytes(self, payload: bytes | None) -> bytes | None:
        return None if payload is None else self.layout.stored_bytes(payload)

    def _count(self, payloads: Mapping[Index, bytes | None], keys: set[str]) -> None:
        failed = keys & self.result.failed.keys()
        for index, payload in payloads.items():
            if payload is None:
                self.result.empty += 1
            elif self.array.shards is not None and failed or self.layout.key(index) in failed:
                continue
            else:
                self.heads[index] = head_of(payload)

    def _complete(self, indices: list[Index]) -> dict[Index, bytes]:
        """Read payloads that are there already."""

        async def read() -> list[bytes | None]:
            return await asyncio.gather(*(stored.read_payload(self.array, index) for index in indices))

        found = zip(indices, sync(read()), strict=True) if indices else ()
        return {index: payload for index, payload in found if payload is not None}

    def _store(self, values: Mapping[str, bytes | None]) -> None:
        store = self.array.store

        async def all_of_them() -> list[str | None]:
            limit = asyncio.Semaphore(CONCURRENCY)
            return await asyncio.gather(*(put(store, key, data, self.options, limit) for key, data in values.items()))

        for (key, data), error in zip(values.items(), sync(all_of_them()), strict=True):
            if error is not None:
                self.result.failed[key] = error
            elif data is not None:
                self.result.nbytes += len(data)


async def put(store: Any, key: str, data: bytes | None, options: Options, limit: asyncio.Semaphore) -> str | None:
    """Set a key of a store, or delete it if `data` is None; try again if that fails.

    Returns
    -------
    str or None
        Why it failed in the end, None if it did not.
    """
    for attempt in range(options.retries + 1):
        try:
            async with limit:
                if data is not None:
                    await store.set(key, default_buffer_prototype().buffer.from_bytes(data))
                elif store.supports_deletes:
                    await store.delete(key)
            return None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, HOPELESS):
                break
        if attempt < options.retries:
            await asyncio.sleep(options.backoff * 2**attempt * (1 + random.random()))
    return reason


def head_of(payload: bytes) -> bytes:
    """Return the start of a payload: its header, and its labels if it has any."""
    header = payload_header.read_header(payload)
    labels = header.entry(LABELS.kind)
    return payload[: header.size if labels is None else labels.offset + labels.length]


def _batches(items: Iterable[Index], size: int) -> Iterator[list[Index]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
