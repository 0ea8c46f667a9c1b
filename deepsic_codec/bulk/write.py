"""Encode a block of whole chunks in batches and store the payloads; nothing is read before it is written."""

import asyncio
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store

from deepsic_codec._compat import default_buffer_prototype, sync, write_empty_chunks
from deepsic_codec.axes import Axes, Index, ceil_div, iter_grid
from deepsic_codec.bulk.resume import RECORD, Journal
from deepsic_codec.codec.batching import in_halves
from deepsic_codec.codec.chunk import ChunkToEncode, prepare_chunk
from deepsic_codec.codec.encode import encode_chunks
from deepsic_codec.codec.params import NAN, CodecParams
from deepsic_codec.codec.quality_map import Keep, check_mapped, check_quality, map_on
from deepsic_codec.codec.scaled import nodata_value
from deepsic_codec.errors import ConfigurationError, UnsupportedArray
from deepsic_codec.labels.expression import parse
from deepsic_codec.stored import replacement
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import is_process_bound
from deepsic_codec.stored.reader import PayloadStart

CONCURRENCY = 32  # writes in flight per task
# Errors that a retry does not help against.
PERMANENT = (PermissionError, NotImplementedError, TypeError, ValueError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class WriteOptions:
    """How a block is written."""

    batch_size: int = 16  # chunks in one call of the model
    retries: int = 5  # of a failing write
    journal: Journal | None = None  # of what is stored
    backoff: float = 0.2  # seconds before the first retry; doubled for each further one, and up to doubled at random
    process: int = field(default_factory=os.getpid)  # that opened the target
    # Qualities of the block (all axes but that of the bands), or a function of a region of the array that returns them.
    quality_map: Any = None
    keep: Keep = ()


def check_map(
    quality_map: Any, keep: Mapping[str, float] | None, params: CodecParams, shape: Sequence[int]
) -> tuple[Any, Keep]:
    """Return a quality map and qualities of labels as `WriteOptions` has them.

    Parameters
    ----------
    quality_map : array_like or callable, optional
        As for `deepsic_codec.create_array`.
    keep : mapping, optional
        Expressions of labels, and qualities.
    params : CodecParams
        Of the array.
    shape : sequence of int
        Of what is written.

    Raises
    ------
    ConfigurationError
        If they are wrong, or the parameters allow none.
    ExpressionError
        If an expression is wrong, or names a label that the model does not have.
    """
    if keep is not None and not isinstance(keep, Mapping):
        expected = "a quality for each expression, such as {'River': 80}"
        raise ConfigurationError(f"keep: expected {expected}, got {keep!r:.80}")
    if quality_map is None and not keep:
        return None, ()
    check_mapped(params)
    if quality_map is not None and not callable(quality_map):
        quality_map = map_on(quality_map, Axes(params.axes), shape, params)
    if not keep:
        return quality_map, ()
    from deepsic_codec.model.zoo import find_model  # late: only writing needs it

    decoder, head = params.identity()
    if head is None:
        raise ConfigurationError(f"keep: model {params.model!r} has no head, so there are no labels")
    vocabulary, conditions = find_model(decoder, head=head).vocabulary, []
    for text, quality in keep.items():
        expression = parse(text)
        expression.check(vocabulary, text)
        conditions.append((expression, check_quality(quality, f"keep[{text!r}]")))
    return quality_map, tuple(conditions)


class PackedStarts(Mapping[Index, bytes]):
    """Starts of payloads by position in the grid of chunks, packed into arrays: there may be millions.

    `numbers` are the positions in the flattened grid, ascending; `starts` and `stops` the bytes of each in `data`.
    """

    def __init__(self, grid: Index, numbers: Any = (), starts: Any = (), stops: Any = (), data: bytes = b"") -> None:
        self.grid, self.data = grid, data
        self.numbers, self.starts, self.stops = (np.asarray(values, np.int64) for values in (numbers, starts, stops))

    @classmethod
    def pack(cls, grid: Index, starts: Mapping[Index, bytes]) -> "PackedStarts":
        """Pack starts of payloads."""
        items = sorted(starts.items())
        numbers = [np.ravel_multi_index(index, grid) for index, _ in items]
        stops = np.cumsum([0, *(len(data) for _, data in items)])
        return cls(grid, numbers, stops[:-1], stops[1:], b"".join(data for _, data in items))

    @classmethod
    def join(cls, grid: Index, parts: Sequence["PackedStarts"]) -> "PackedStarts":
        """Join those of blocks."""
        if not parts:
            return cls(grid)
        shifts = np.cumsum([0, *(len(part.data) for part in parts)])[:-1]
        numbers = np.concatenate([part.numbers for part in parts])
        starts = np.concatenate([part.starts + shift for part, shift in zip(parts, shifts, strict=True)])
        stops = np.concatenate([part.stops + shift for part, shift in zip(parts, shifts, strict=True)])
        order = np.argsort(numbers, kind="stable")
        return cls(grid, numbers[order], starts[order], stops[order], b"".join(part.data for part in parts))

    def records(self) -> NDArray[Any]:
        """Return chunk and checksum of each, as a journal has them."""
        records = np.empty(len(self), RECORD)
        data = np.frombuffer(self.data, np.uint8)
        checksums = data[self.starts[:, None] + np.arange(8, 12)]
        records["chunk"], records["crc"] = self.numbers, np.ascontiguousarray(checksums).view("<u4")[:, 0]
        return records

    def __getitem__(self, index: Index) -> bytes:
        number = np.ravel_multi_index(index, self.grid)
        row = int(np.searchsorted(self.numbers, number))
        if row == len(self.numbers) or self.numbers[row] != number:
            raise KeyError(index)
        return self.data[int(self.starts[row]) : int(self.stops[row])]

    def __iter__(self) -> Iterator[Index]:
        for number in self.numbers:
            yield tuple(int(i) for i in np.unravel_index(number, self.grid))

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass
class BlockReport:
    """What `write_block` did."""

    starts: PackedStarts  # of each payload written, to the end of its labels
    empty: int = 0  # chunks that are the fill value everywhere and therefore not stored
    nbytes: int = 0  # stored
    samples: int = 0  # encoded or found empty
    failed: dict[str, str] = field(default_factory=dict)  # keys that could not be written, and why


def write_block(
    block: Any, stored: StoredArray, first: Index, pending: Sequence[Index] | None, options: WriteOptions
) -> BlockReport:
    """Write a block of an array.

    Parameters
    ----------
    block : ndarray
        Values, from the first sample of a chunk (of a shard, if there are shards) to the last of one, or of the array.
    stored : StoredArray
        The array.
    first : tuple of int
        The chunk that the block begins with.
    pending : sequence of tuple of int, optional
        The chunks to encode, all by default. Others are stored completely; in shards that are written they are copied.
    options : WriteOptions
        How to write.

    Returns
    -------
    BlockReport
        What was written, and which writes failed: they raise nothing, so that other blocks go on.

    Raises
    ------
    UnsupportedArray
        If the block has masked values or lies beyond the array, or what this process writes would not reach the array
        of the process that opened it.
    """
    if os.getpid() != options.process:
        _check_reaches(stored)
    if np.ma.is_masked(block):
        raise UnsupportedArray("source: the codec cannot store masked values; fill them first")
    writer = _BlockWriter(stored, np.asarray(block), first, options)
    indices = list(iter_grid(first, writer.last))
    return writer.write(indices, indices if pending is None else pending)


def _check_reaches(stored: StoredArray) -> None:
    """Raise UnsupportedArray unless this process, which did not open an array, writes to the same store."""
    store = stored.array.store
    check_process(store)
    array = replacement.target_of(stored.array)
    try:
        same = StoredArray(array).fingerprint(fresh=True) == stored.fingerprint() or array is not stored.array
    except FileNotFoundError:
        same = False
    if not same:
        raise UnsupportedArray(
            f"target: process {os.getpid()} does not find {stored.layout.name} in {store}; pass a location that means "
            "the same in all processes of Dask, or write with threads: dask.config.set(scheduler='threads')"
        )


def check_process(store: Any) -> None:
    """Raise UnsupportedArray if only the process that opened a store, which is another one, can write to it."""
    if is_process_bound(store):
        raise UnsupportedArray(
            f"target: only the process that opened {store} can write to it, and Dask runs this task in another one; "
            "write with threads, dask.config.set(scheduler='threads'), or to another store"
        )


class _BlockWriter:
    def __init__(self, stored: StoredArray, block: NDArray[Any], first: Index, options: WriteOptions) -> None:
        stored.layout.check_writable()
        self.stored, self.layout, self.block, self.options = stored, stored.layout, block, options
        self.origin = tuple(i * chunk for i, chunk in zip(first, stored.chunks, strict=True))
        stop = tuple(start + size for start, size in zip(self.origin, block.shape, strict=True))
        if any(end > size for end, size in zip(stop, stored.shape, strict=True)):
            raise UnsupportedArray(f"block {block.shape} at {self.origin} goes beyond the array {stored.shape}")
        if block.dtype.newbyteorder("=") != stored.array.dtype.newbyteorder("="):
            raise UnsupportedArray(f"block of {block.dtype} for an array of {stored.array.dtype}; convert it first")
        self.last = tuple(ceil_div(end, chunk) for end, chunk in zip(stop, stored.chunks, strict=True))
        self.skip_empty = not write_empty_chunks(stored.array)
        self.starts: dict[Index, bytes] = {}
        self.report = BlockReport(PackedStarts(stored.grid))
        self.encode = in_halves(encode_chunks)

    def write(self, indices: list[Index], pending: Sequence[Index]) -> BlockReport:
        if self.layout.shard_grid is None:
            self._write_chunks(pending)
        else:
            self._write_shards(indices, pending)
        self.report.starts = PackedStarts.pack(self.stored.grid, self.starts)
        return self.report

    def _write_chunks(self, pending: Sequence[Index]) -> None:
        for payloads in self._encoded(pending):
            keys = {index: self.layout.key(index) for index in payloads}
            values = {
                keys[index]: None if payload is None else self.layout.stored_bytes(payload)
                for index, payload in payloads.items()
            }
            self._store(values, payloads)
            self._record({i: payload for i, payload in payloads.items() if keys[i] not in self.report.failed})

    def _write_shards(self, indices: list[Index], pending: Sequence[Index]) -> None:
        encoded = {index: payload for payloads in self._encoded(pending) for index, payload in payloads.items()}
        # Payloads that are stored already; an index of a shard is read once for all of its chunks.
        complete = dict(self.stored.reader.payloads(index for index in indices if index not in encoded))
        shards: dict[Index, dict[Index, bytes]] = {}
        for index in indices:
            payload = encoded[index] if index in encoded else complete[index]
            members = shards.setdefault(self.layout.shard_of(index), {})
            if payload is not None:
                members[index] = payload
        for shard, members in shards.items():
            key = self.layout.key(shard)
            new: dict[Index, bytes | None] = {index: payload for index, payload in members.items() if index in encoded}
            self._store({key: self.layout.build_shard(members) if members else None}, new)
            if key not in self.report.failed:
                self._record(new)

    def _encoded(self, pending: Sequence[Index]) -> Iterator[dict[Index, bytes | None]]:
        """Yield the payloads of chunks in batches, None for chunks that are the fill value everywhere."""
        for batch in _batches(pending, self.options.batch_size):
            jobs: dict[Index, ChunkToEncode] = {}
            payloads: dict[Index, bytes | None] = dict.fromkeys(batch)
            for index in batch:
                values = self._values(index)
                self.report.samples += values.size
                if self.skip_empty and self._is_fill(values):
                    self.report.empty += 1
                else:
                    jobs[index] = self._job(index, values)
            try:
                payloads.update(zip(jobs, self.encode(list(jobs.values())) if jobs else (), strict=True))
            except Exception as error:
                error.add_note(f"while encoding chunks {', '.join(map(str, jobs))} of {self.layout.name}")
                raise
            yield payloads

    def _is_fill(self, values: NDArray[Any]) -> bool:
        fill = self.stored.fill_value
        return bool(np.isnan(values).all() if fill != fill else (values == fill).all())

    def _part(self, index: Index) -> tuple[slice, ...]:
        """Return the part of the block that a chunk is."""
        starts = (i * chunk - start for i, chunk, start in zip(index, self.stored.chunks, self.origin, strict=True))
        return tuple(slice(a, a + n) for a, n in zip(starts, self.stored.chunks, strict=True))

    def _values(self, index: Index) -> NDArray[Any]:
        """Return the samples of a chunk that lie within the array."""
        return self.block[self._part(index)]

    def _map(self, index: Index, values: NDArray[Any], padding: Sequence[int]) -> NDArray[np.float32] | None:
        """Return the qualities of the pixels of a chunk."""
        quality_map, axes = self.options.quality_map, self.stored.axes
        if quality_map is None:
            return None
        if callable(quality_map):
            starts = [i * chunk for i, chunk in zip(index, self.stored.chunks, strict=True)]
            qualities = quality_map(tuple(slice(a, a + n) for a, n in zip(starts, values.shape, strict=True)))
        else:
            qualities = quality_map[tuple(p for p, axis in zip(self._part(index), axes, strict=True) if axis != "c")]
        qualities = map_on(qualities, axes, values.shape, self.stored.params)
        widths = [(0, count) for count, axis in zip(padding, axes, strict=True) if axis != "c"]
        return np.pad(qualities, widths, mode="edge")

    def _job(self, index: Index, values: NDArray[Any]) -> ChunkToEncode:
        params = self.stored.params
        padding = [chunk - size for chunk, size in zip(self.stored.chunks, values.shape, strict=True)]
        valid_shape, quality_map = values.shape if any(padding) else None, self._map(index, values, padding)
        if valid_shape is not None:
            # Padding shows when the array is enlarged. So it is no data, which comes back exactly and costs few bytes;
            # the fill value as data would also make an edge that shows in labels.
            params = self.edge_params
            value = nodata_value(params, np.dtype(values.dtype.newbyteorder("=")))
            values = np.pad(values, [(0, count) for count in padding], constant_values=value)
        return prepare_chunk(params, values, self.layout.order, valid_shape, quality_map, self.options.keep)

    @cached_property
    def edge_params(self) -> CodecParams:
        """Parameters of chunks at the edge of the array, which have a NoData value in any case."""
        params = self.stored.params
        if params.nodata is not None:
            return params
        value = NAN if self.stored.array.dtype.kind == "f" else int(self.stored.fill_value)
        return type(params).from_json({**params.to_json(), "nodata": value})

    def _record(self, payloads: Mapping[Index, bytes | None]) -> None:
        """Keep the starts of payloads that were stored."""
        for index, payload in payloads.items():
            if payload is not None:
                self.starts[index] = PayloadStart.of(payload).trim()

    def _store(self, values: Mapping[str, bytes | None], payloads: Mapping[Index, bytes | None]) -> None:
        """Store values, and a record of the payloads in them at the same time."""
        store, options = self.stored.array.store, self.options
        recorded = {index: payload for index, payload in payloads.items() if payload is not None}

        async def put_all() -> list[str | None]:
            limit = asyncio.Semaphore(CONCURRENCY)
            puts = [put(store, key, data, options, limit) for key, data in values.items()]
            if options.journal is not None and recorded:
                # If this fails, as in stores that take no other keys, these chunks are written again by a next run.
                record = options.journal.record(self.stored.grid, recorded)
                puts.append(put(store, *record, replace(options, retries=0), limit))
            return (await asyncio.gather(*puts))[: len(values)]

        for (key, data), error in zip(values.items(), sync(put_all()), strict=True):
            if error is not None:
                self.report.failed[key] = error
            elif data is not None:
                self.report.nbytes += len(data)


async def put(
    store: Store, key: str, data: bytes | None, options: WriteOptions, limit: asyncio.Semaphore
) -> str | None:
    """Set a key of a store, or delete it if `data` is None; try again if that fails. Return the last error, or None."""
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
            if isinstance(error, PERMANENT):
                break
        if attempt < options.retries:
            await asyncio.sleep(options.backoff * 2**attempt * (1 + random.random()))
    return reason


def _batches(items: Iterable[Index], size: int) -> Iterator[list[Index]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
