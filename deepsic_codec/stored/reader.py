"""Read payloads, or as little of them as a question needs: many at a time, in both Zarr formats and in shards."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store

from deepsic_codec._compat import default_buffer_prototype, read_part, sync
from deepsic_codec.axes import Index
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.embedding import Embedding
from deepsic_codec.payload.fields import PREFIX, Header, SectionEntry
from deepsic_codec.payload.header import header_size, read_header, read_section, verified
from deepsic_codec.payload.labels import LabelBlock
from deepsic_codec.payload.sections import EMBEDDING, FEATURES, LABELS, QUALITY_MAP, RESIDUAL, STRUCTURE, WAVELET
from deepsic_codec.payload.structure import grid_qualities, has_wavelets, table_length
from deepsic_codec.stored.layout import PayloadLocation, StoredLayout

FIRST_READ = 256  # bytes: header and labels of any chunk with up to 16 label tiles lie within
FIRST_PREVIEW = 1024  # bytes: header, labels and checkpoints of usual chunks, and the smallest sizes of small ones
CONCURRENCY = 256  # reads in flight: at 40 ms each, 6,400 a second
BATCH = 4096  # chunks read before any is handed on; bounds memory

T = TypeVar("T")


@dataclass(frozen=True)
class PayloadStart:
    """The header of a payload and its first bytes, at least to the end of its labels.

    `vectors` is the embedding section, which lies behind the samples, where it was read.
    """

    header: Header
    data: bytes
    vectors: bytes | None = None

    @classmethod
    def of(cls, data: bytes) -> "PayloadStart":
        """Parse the start of a payload, or all of it."""
        header = read_header(data)
        entry = header.entry(EMBEDDING.kind)
        whole = entry is not None and len(data) >= entry.offset + entry.length
        return cls(header, data, data[entry.offset : entry.offset + entry.length] if entry and whole else None)

    @classmethod
    def of_trimmed(cls, data: bytes) -> "PayloadStart":
        """Parse what `trim` returned."""
        header = read_header(data)
        end = label_end(header)
        return cls(header, data[:end], data[end:] or None)

    @property
    def crc(self) -> int:
        """Checksum of the header. It covers the checksums of all sections, so payloads of equal `crc` are equal."""
        return int.from_bytes(self.data[8:PREFIX], "little")

    @property
    def head_id(self) -> int:
        """The first 32 bits of the identity of the semantic head, 0 for none."""
        return int.from_bytes(self.header.head, "big")

    def trim(self) -> bytes:
        """Return the bytes up to the end of the labels and, after them, the embedding section."""
        return self.data[: label_end(self.header)] + (self.vectors or b"")

    def labels(self) -> LabelBlock | None:
        """Decode the stored labels, None if there are none."""
        return read_section(self.data, self.header, LABELS)

    def embedding(self) -> Embedding | None:
        """Decode the stored embeddings, None if there are none, or if they were not read."""
        entry = self.header.entry(EMBEDDING.kind)
        if entry is None or self.vectors is None:
            return None
        return EMBEDDING.decode(verified(self.vectors, entry), self.header)

    @property
    def quantised(self) -> bool:
        """Whether samples are features or wavelets, which have a quality; False if data do not reach to `map_end`."""
        if any(self.header.entry(section.kind) for section in (FEATURES, WAVELET)):
            return True
        grids = _grids(self.header)
        if grids is None or map_end(self.header, self.data) > len(self.data):
            return False
        return has_wavelets(self.data[grids.offset :], self.header)

    def qualities(self) -> NDArray[np.float64] | None:
        """Decode the qualities of cells; None without a map, or if the data do not reach to `map_end`."""
        if map_end(self.header, self.data) > len(self.data):
            return None
        grids = _grids(self.header)
        if grids is not None:
            return grid_qualities(self.data[grids.offset :], self.header)
        quality_map = read_section(self.data, self.header, QUALITY_MAP)
        return None if quality_map is None else quality_map.qualities(self.header.quality)


def label_end(header: Header, data: bytes = b"") -> int:
    """Return the number of bytes up to the end of a payload's header and labels; `data` is not needed for that."""
    labels = header.entry(LABELS.kind)
    return header.size if labels is None else labels.offset + labels.length


def map_end(header: Header, data: bytes) -> int:
    """Return the number of bytes up to the end of a payload's header, labels and quality map.

    Those of grids are in a table, whose length its bytes say. If `data`, the start of the payload, does not reach to
    its end, more bytes than these are returned.
    """
    entry, end = header.entry(QUALITY_MAP.kind), label_end(header)
    if entry is not None:
        return entry.offset + entry.length
    grids = _grids(header)
    if grids is None:
        return end
    return max(end, grids.offset + table_length(data[grids.offset :], header, grids.length))


def _grids(header: Header) -> SectionEntry | None:
    """Return the entry of the section that holds samples of grids."""
    if any(header.entry(section.kind) for section in (FEATURES, RESIDUAL, WAVELET)):
        return None
    return header.entry(STRUCTURE.kind)


class PayloadReader:
    """Reads chunks of an array concurrently. Chunks of a shard share one read of its index."""

    def __init__(self, store: Store, layout: StoredLayout, concurrency: int = CONCURRENCY) -> None:
        self.store, self.layout = store, layout
        self._concurrency = concurrency

    def start(self, index: Sequence[int]) -> PayloadStart | None:
        """Read the start of one payload, None for a missing chunk."""
        ((_, start),) = self.starts([index])
        return start

    def payload(self, index: Sequence[int]) -> bytes | None:
        """Read one payload, None for a missing chunk."""
        ((_, payload),) = self.payloads([index])
        return payload

    def starts(
        self,
        indices: Iterable[Sequence[int]],
        end: Callable[[Header, bytes], int] = label_end,
        *,
        vectors: bool = False,
    ) -> Iterator[tuple[Index, PayloadStart | None]]:
        """Yield position and start of payloads in the order of `indices`, None for a missing chunk.

        Takes one request of 256 bytes for a chunk; another one as often as `end` says, of the header and these bytes,
        that more are needed: by default for header and labels; and one for the embedding section, with `vectors`.

        Raises
        ------
        IndexError
            If the array has no such chunk.
        CorruptPayload, UnsupportedPayload
            If a payload cannot be read. The message names the chunk.
        """
        return self.map(indices, partial(self.read_start, end=end, vectors=vectors))

    def payloads(self, indices: Iterable[Sequence[int]]) -> Iterator[tuple[Index, bytes | None]]:
        """Yield position and payload of chunks in the order of `indices`, None for a missing chunk.

        Raises the errors of `starts`.
        """
        return self.map(indices, self.read_payload)

    def map(
        self,
        indices: Iterable[Sequence[int]],
        read: Callable[[PayloadLocation], Awaitable[T]],
        ignore: tuple[type[Exception], ...] = (),
    ) -> Iterator[tuple[Index, T | None]]:
        """Locate chunks, run a coroutine for each, many at a time, and yield positions and results in their order.

        `read` gets the location of a payload; where there are no shards, the payload may be missing. The result is
        None for a chunk that its shard does not have, and after the errors `ignore`, also of the shard index.
        """
        remaining = (tuple(int(i) for i in index) for index in indices)
        while batch := list(islice(remaining, BATCH)):
            yield from zip(batch, sync(self._gather(batch, read, ignore)), strict=True)

    async def _gather(
        self, batch: list[Index], read: Callable[[PayloadLocation], Awaitable[T]], ignore: tuple[type[Exception], ...]
    ) -> list[T | None]:
        limit = asyncio.Semaphore(self._concurrency)
        tables: dict[Index, asyncio.Task[NDArray[np.uint64] | None]] = {}

        async def table(shard: Index) -> NDArray[np.uint64] | None:
            async with limit:
                return await self.read_shard_index(shard)

        async def one(index: Index) -> T | None:
            self.layout.check_index(index)
            shard_index = None
            with self.error_context(index), suppress(*ignore):
                if self.layout.shard_grid is not None:
                    shard = self.layout.shard_of(index)
                    if shard not in tables:
                        tables[shard] = asyncio.ensure_future(table(shard))
                    shard_index = await tables[shard]
                location = self.layout.locate(index, shard_index)
                if location is None:
                    return None
                async with limit:
                    return await read(location)
            return None

        tasks = [asyncio.ensure_future(one(index)) for index in batch]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in (*tasks, *tables.values()):
                task.cancel()
            raise

    async def read_shard_index(self, shard: Index) -> NDArray[np.uint64] | None:
        """Read the index of a shard, as `StoredLayout.parse_shard_index` returns it; None for a missing shard."""
        data = await self._get(self.layout.key(shard), self.layout.shard_index_range())
        return None if data is None else self.layout.parse_shard_index(data, shard)

    async def read_start(
        self, location: PayloadLocation, end: Callable[[Header, bytes], int] = label_end, vectors: bool = False
    ) -> PayloadStart | None:
        """Read the start of a payload, None if it is missing."""
        data = await self._read(location, FIRST_READ)
        if data is None:
            return None
        size = header_size(data)
        if size > len(data):
            data = await self._read(location, size) or b""
        header = read_header(data)
        chunks = self.layout.chunks
        if header.shape != chunks:
            raise CorruptPayload(f"header: chunk shape {header.shape}, expected {chunks}")
        while (size := end(header, data)) > len(data):
            known, data = len(data), await self._read(location, size) or b""
            if len(data) <= known:
                break  # it ends here
        entry = header.entry(EMBEDDING.kind) if vectors else None
        if entry is None:
            return PayloadStart(header, data)
        return PayloadStart(header, data, await self._read(location, entry.length, entry.offset) or b"")

    async def read_as_needed(self, location: PayloadLocation, needed: Callable[[bytes, Header], int]) -> bytes | None:
        """Read as much of the start of a payload as `needed` says of its first bytes and header.

        Takes one request, and another one as often as more is needed. Returns None if the payload is missing.
        """
        data: bytes | None = None
        size = FIRST_PREVIEW
        while data is None or len(data) < size:
            known, data = data, await self._read(location, size)
            if data is None or (known is not None and len(data) <= len(known)):
                return data  # missing, or it ends here
            size = header_size(data)
            if size <= len(data):
                header = read_header(data)
                data = data[: header.nbytes]  # without the checksums that follow it
                size = needed(data, header)
        return data

    async def read_payload(self, location: PayloadLocation) -> bytes | None:
        """Read a payload without the checksums that follow it, None if it is missing."""
        data = await self._read(location, location.length)
        return None if data is None else data[: read_header(data).nbytes]

    async def stored_length(self, location: PayloadLocation) -> int:
        """Return the number of bytes stored of a payload, checksums included."""
        return await self.store.getsize(location.key) if location.length is None else location.length

    async def _read(self, location: PayloadLocation, size: int | None, start: int = 0) -> bytes | None:
        """Read bytes of a payload from a start on, to its end if `size` is None."""
        first = location.offset + start
        if size is None:
            return await self._get(location.key, OffsetByteRequest(first))
        size = size if location.length is None else max(0, min(size, location.length - start))
        return await self._get(location.key, RangeByteRequest(first, first + size))

    async def _get(self, key: str, part: ByteRequest) -> bytes | None:
        # Not get_partial_values: stores differ in how they treat a missing key.
        data = await read_part(self.store, key, default_buffer_prototype(), part)
        return None if data is None else data.to_bytes()

    @contextmanager
    def error_context(self, index: Sequence[int]) -> Iterator[None]:
        """Put the chunk in front of messages of CorruptPayload and UnsupportedPayload that are raised within."""
        try:
            yield
        except (CorruptPayload, UnsupportedPayload) as error:
            if str(error).startswith("chunk ("):
                raise
            raise type(error)(f"chunk {tuple(index)} of {self.layout.name}: {error}") from error
