"""Chunk attributes, read from the start of each payload: one chunk, or many at once."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import zarr

from deepsic_codec._compat import sync
from deepsic_codec.axes import Index, grid_shape
from deepsic_codec.codec import core
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.errors import CorruptPayload, DeepSICError, UnsupportedPayload
from deepsic_codec.labels.vocabulary import Vocabulary, of_head
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload import labels as payload_labels
from deepsic_codec.payload.fields import PREFIX, Header
from deepsic_codec.payload.sections import LABELS
from deepsic_codec.stored import embedded as embed
from deepsic_codec.stored import layout as stored

CONCURRENCY = 256  # reads in flight: at 40 ms each, 6,400 a second
BATCH = 4096  # chunks read before any is handed on; bounds memory
TOGETHER = 64  # whole chunks read and labelled together,
TOGETHER_PIXELS = 1 << 26  # unless they have more pixels than this: their symbols take 1.5 bytes for each


@dataclass(frozen=True)
class Head:
    """What was read of a chunk: its header, and the bytes up to the end of its labels."""

    header: Header
    data: bytes

    @property
    def crc(self) -> int:
        """The header's checksum; the header has those of all sections, so that it tells any payload from another."""
        return int.from_bytes(self.data[8:PREFIX], "little")

    @property
    def head(self) -> int:
        """The first 32 bits of the identity of the semantic head, 0 for none."""
        return int.from_bytes(self.header.head, "big")

    def labels(self) -> payload_labels.LabelBlock | None:
        """Decode the stored labels, None if there are none."""
        return payload_header.read_section(self.data, self.header, LABELS)


class Reader:
    """Reads many chunks of an array concurrently.

    Parameters
    ----------
    array : zarr.Array or zarr.AsyncArray
        Stored with DeepSIC; raises UnsupportedPayload for any other.
    concurrency : int
        Reads in flight.
    """

    def __init__(self, array: Any, concurrency: int = CONCURRENCY) -> None:
        self.array = array
        self.config: CodecParams = stored.codec_of(array)
        self._concurrency = concurrency

    @property
    def together(self) -> int:
        """How many chunks to read whole and to label in one call."""
        sizes = dict(zip(self.config.axes, self.array.chunks, strict=True))
        pixels = prod(size for axis, size in sizes.items() if axis != "c")
        return max(1, min(TOGETHER, TOGETHER_PIXELS // pixels))

    def heads(self, indices: Iterable[Sequence[int]]) -> Iterator[tuple[Index, Head | None]]:
        """Yield the heads of chunks in the order given, None for a missing chunk; errors name the chunk."""
        return self._read(indices, self._head)

    def payloads(self, indices: Iterable[Sequence[int]]) -> Iterator[tuple[Index, bytes | None]]:
        """Yield whole payloads in the order given, None for a missing chunk."""
        return self._read(indices, self._payload)

    def _read(self, indices: Iterable[Sequence[int]], read: Any) -> Iterator[tuple[Index, Any]]:
        remaining = (tuple(int(i) for i in index) for index in indices)
        while batch := list(islice(remaining, BATCH)):
            yield from zip(batch, sync(self._gather(batch, read)), strict=True)

    async def _gather(self, batch: list[Index], read: Any) -> list[Any]:
        limit = asyncio.Semaphore(self._concurrency)
        tables: dict[Index, asyncio.Task[Any]] = {}

        async def table(shard: Index) -> Any:
            async with limit:
                return await stored.read_shard_index(self.array, shard)

        async def one(index: Index) -> Any:
            place = None
            with self.named(index):
                stored.check_index(self.array, index)
                if self.array.shards is not None:
                    shard = stored.shard_of(self.array, index)
                    if shard not in tables:  # chunks of a shard share one read of its index
                        tables[shard] = asyncio.ensure_future(table(shard))
                    found = await tables[shard]
                    place = None if found is None else stored.locate_in(self.array, index, found)
                    if place is None:
                        return None
                async with limit:
                    return await read(index, place)

        tasks = [asyncio.ensure_future(one(index)) for index in batch]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in (*tasks, *tables.values()):
                task.cancel()
            raise

    async def _head(self, index: Index, place: stored.Location | None) -> Head | None:
        found = await stored.read_head(self.array, index, place)
        if found is None:
            return None
        self._check(found[0])
        return Head(*found)

    async def _payload(self, index: Index, place: stored.Location | None) -> bytes | None:
        return await stored.read_payload(self.array, index, place)

    def _check(self, header: Header) -> None:
        chunks = tuple(self.array.chunks)
        if header.shape != chunks:
            raise CorruptPayload(f"header: payload of a chunk {header.shape} in an array of chunks {chunks}")

    def named(self, index: Sequence[int]) -> "_Named":
        """Return a context in which errors about a payload get the chunk that it is of in front."""
        return _Named(index, self.array.path)


class _Named:
    def __init__(self, index: Sequence[int], path: str) -> None:
        self._place = f"chunk {tuple(index)} of array {path!r}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> None:
        if isinstance(error, CorruptPayload | UnsupportedPayload) and not str(error).startswith("chunk ("):
            raise type(error)(f"{self._place}: {error}") from error


class Attributes:
    """Makes chunk attributes of what was read.

    Parameters
    ----------
    array : zarr.Array
        The array; its attributes have the vocabulary.
    """

    def __init__(self, array: zarr.Array, concurrency: int = CONCURRENCY) -> None:
        self.array = array
        self.reader = Reader(array, concurrency)
        self._vocabularies: dict[tuple[bytes, bytes], Vocabulary] = {}
        self._blocks: dict[Index, payload_labels.LabelBlock] = {}

    @cached_property
    def _fields(self) -> dict[str, None]:
        return dict.fromkeys(("tile_shape", "model", "quality", "nbytes", "bpp", "format_version"))

    def of(self, index: Index, head: Head | None) -> dict[str, Any]:
        """Return the attributes of a chunk as `deepsic_codec.chunk_attrs` describes them."""
        if head is None:
            return {"labels": [], **self._fields}
        header, config = head.header, self.reader.config
        with self.reader.named(index):
            block = head.labels()
            if block is None and self._is_post(header):
                block = self._blocks.pop(index, None) or self._computed(index)
            labels = None if block is None else self._tiles(index, header, block)
        return {
            "labels": labels,
            "tile_shape": None if block is None else [int(size) for size in block.tile],
            "model": config.model if config.identity()[0].startswith(header.decoder.hex()) else header.decoder.hex(),
            "quality": header.quality,
            "nbytes": header.nbytes,
            "bpp": 8 * header.nbytes / (header.slices * header.height * header.width),
            "format_version": header.version,
        }

    def vocabulary(self, header: Header) -> Vocabulary:
        """Return what the labels of a chunk can name."""
        key = header.decoder, header.head
        if key not in self._vocabularies:
            self._vocabularies[key] = of_head(self.array, *(identity.hex() for identity in key))
        return self._vocabularies[key]

    def prepare(self, heads: Iterable[tuple[Index, Head | None]]) -> None:
        """Compute the labels of those of these chunks that store none in one call; `of` then takes them from there.

        Whatever is wrong with one of them, `of` comes upon again, and says of which chunk.
        """
        self._blocks.clear()
        with suppress(DeepSICError):
            wanted = [i for i, head in heads if head is not None and self._is_post(head.header) and not head.labels()]
            if len(wanted) < 2:
                return
            embed.use_embedded(self.array)
            jobs = {i: core.decode_job(payload) for i, payload in self.reader.payloads(wanted) if payload is not None}
            groups: dict[tuple[str, str], list[Index]] = {}
            for i, job in jobs.items():
                groups.setdefault((job.key.hex(), job.header.head.hex()), []).append(i)
            for key, members in groups.items():
                self._blocks |= self._labelled({i: jobs[i] for i in members}, *key)

    def _labelled(self, jobs: dict[Index, core.DecodeJob], decoder: str, head: str) -> dict[Index, Any]:
        from deepsic_codec.model.scheduler import get_scheduler  # with torch
        from deepsic_codec.model.zoo import find_model

        info = find_model(decoder, head=head)
        cells = core.label_cells(list(jobs.values()), info, get_scheduler(info))
        blocks = [_block(job.header, one, self.reader.config) for job, one in zip(jobs.values(), cells, strict=True)]
        return dict(zip(jobs, blocks, strict=True))

    def _is_post(self, header: Header) -> bool:
        return self.reader.config.semantics == "post" and any(header.head)

    def _computed(self, index: Index) -> payload_labels.LabelBlock | None:
        embed.use_embedded(self.array)
        ((_, payload),) = self.reader.payloads([index])
        if payload is None:  # deleted since its header was read
            return None
        return core.compute_labels(core.decode_job(payload), self.reader.config.label_tile)

    def _tiles(self, index: Index, header: Header, block: payload_labels.LabelBlock) -> list[dict[str, float]]:
        names = self.vocabulary(header).names
        # Pixels of the chunk that lie within the array; an edge chunk is padded beyond them.
        sizes = [size - i * chunk for size, i, chunk in zip(self.array.shape, index, header.shape, strict=True)]
        inside = dict(zip(header.axes, sizes, strict=True))
        slices = [axis for axis in header.axes if axis not in "yxc"]
        grid = [header.shape[header.axes.index(axis)] for axis in slices]
        tiles = []
        for place in np.ndindex(*block.classes.shape[:3]):
            start = {"y": place[1] * block.tile[0], "x": place[2] * block.tile[1]}
            if slices:
                start |= dict(zip(slices, (int(i) for i in np.unravel_index(place[0], grid)), strict=True))
            scores: dict[str, float] = {}
            if all(start[axis] < inside[axis] for axis in start):
                for number, score in zip(block.classes[place].tolist(), block.scores[place].tolist(), strict=True):
                    if number == payload_labels.NO_CLASS:
                        continue
                    if number >= len(names):
                        raise CorruptPayload(f"labels: class {number}, but the vocabulary has {len(names)}")
                    scores[names[number]] = round(score / 255, 4)
            tiles.append(scores)
        return tiles


def _block(header: Header, cells: Any, config: CodecParams) -> payload_labels.LabelBlock:
    """Make the scores of label cells what labels in headers are."""
    tile = config.label_tile or payload_labels.default_tile(header.height, header.width)
    return payload_labels.best_labels(payload_labels.tile_scores(cells, tile), tile)


def chunk_attrs(array: zarr.Array, index: Sequence[int]) -> dict[str, Any]:
    """Return the attributes of one chunk; `deepsic_codec.chunk_attrs` has the description."""
    attributes = Attributes(array)
    ((place, head),) = attributes.reader.heads([index])
    return attributes.of(place, head)


def iter_chunk_attrs(
    array: zarr.Array, indices: Iterable[Sequence[int]] | None = None, *, concurrency: int = CONCURRENCY
) -> Iterator[tuple[Index, dict[str, Any]]]:
    """Yield the attributes of many chunks, read concurrently.

    Parameters
    ----------
    array : zarr.Array
        An array stored with DeepSIC.
    indices : iterable of sequences of int, optional
        Positions in the grid of chunks (those within shards, if there are shards); all by default.
    concurrency : int
        Reads in flight. S3 through fsspec also has a limit of its own, `max_pool_connections`, that is 10 unless
        `storage_options={"config_kwargs": {"max_pool_connections": ...}}` raises it.

    Yields
    ------
    (tuple of int, dict)
        Position and attributes as from `chunk_attrs`, in the order of `indices`.

    Raises
    ------
    UnsupportedPayload, CorruptPayload, IndexError, ModelNotFound
        As `chunk_attrs`.
    """
    attributes = Attributes(array, concurrency)
    heads = attributes.reader.heads(all_chunks(array) if indices is None else indices)
    while part := list(islice(heads, attributes.reader.together)):
        attributes.prepare(part)
        for index, head in part:
            yield index, attributes.of(index, head)


def all_chunks(array: Any) -> Iterator[Index]:
    """Iterate over all positions in the grid of chunks."""
    return np.ndindex(*grid_shape(array.shape, array.chunks))
