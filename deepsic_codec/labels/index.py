"""The label index of an array: ordinary Zarr arrays in a group beside it. `docs/labels.md` has the layout."""

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.storage import StorePath

from deepsic_codec._compat import read_points, sync
from deepsic_codec.axes import Axes, Index, Region, grid_shape
from deepsic_codec.errors import LabelIndexError, StaleIndex
from deepsic_codec.labels.learned_label import LearnedLabel
from deepsic_codec.model.vocabulary import MAX_CLASSES, Vocabulary
from deepsic_codec.payload.fields import MAX_VALUES
from deepsic_codec.payload.limits import check_count, check_memory
from deepsic_codec.stored.allowed import check_codecs
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import (
    DAMAGED,
    Counter,
    CountingStore,
    IndexLocation,
    counting_array,
    metadata_errors,
    remote_errors,
)

ATTRIBUTE = "deepsic_labels"  # of the group
FORMAT = 1
MISSING, HEADER, FEATURES, UNLABELLED = range(4)
SOURCES = ("missing", "header", "features", "unlabelled")
REMOVED = 255  # fill value of `source`, which is always stored: what reads as this was deleted
VERSION = re.compile("[0-9a-f]{32}")  # name of the group of a version
UNIT_CHUNKS = 1 << 18  # chunks of the archive in a chunk of the index: four reads for a class of a million chunks
UNIT_VECTORS = 1 << 17  # tiles of the archive in a chunk of their embeddings
UNIT_TILES = 1 << 21  # the same for tiles, which are read only where the scores of chunks do not decide
DAMAGED_INDEX = "damaged label index: "
UNFINISHED = "no label index, or one that was never finished; run consolidate_labels"
BUFFER = 1 << 28  # bytes of tile scores held in memory while an index is written
DTYPES = {
    "chunk_scores": "u1",
    "tile_scores": "u1",
    "embeddings": "i1",
    "source": "u1",
    "head": "u4",
    "crc": "u4",
    "nbytes": "u4",
}
SPARSE = 64  # times as many values in a row as are needed: these are then read one by one
MAX_PART = 1 << 29  # bytes of a chunk of an array of the index; this version writes at most 64 MB


@dataclass(frozen=True)
class IndexChunking:
    """How the arrays of an index are chunked, in chunks of the archive.

    Attributes
    ----------
    unit : tuple of int
        Of arrays with one number per chunk.
    tile_unit : tuple of int
        Of arrays with one number per tile; it divides `unit`, except at the edges of the grid.
    vector_unit : tuple of int
        Of embeddings, in the same way.
    """

    unit: Index
    tile_unit: Index
    vector_unit: Index

    @classmethod
    def of(cls, geometry: Geometry, classes: int) -> "IndexChunking":
        """Return the chunking for an array and a number of classes."""
        tiles = prod(geometry.per_chunk)
        unit = _block(geometry.grid, max(1, min(UNIT_CHUNKS, BUFFER // (classes * tiles))))
        return cls(unit, *(_block(unit, max(1, limit // tiles)) for limit in (UNIT_TILES, UNIT_VECTORS)))

    def units(self, grid: Index) -> Iterator[tuple[Index, Index]]:
        """Iterate over the units of a grid: the first chunk of each, and one past its last."""
        return _blocks(grid, self.unit)


def _block(grid: Sequence[int], limit: int) -> Index:
    """Halve the longest side of a grid until it has at most `limit` cells, and return the block that is left."""
    sides = [1 << max(0, n - 1).bit_length() for n in grid]
    while prod(sides) > limit:
        longest = max(range(len(sides)), key=sides.__getitem__)
        sides[longest] //= 2
    return tuple(max(1, min(side, n)) for side, n in zip(sides, grid, strict=True))


def _blocks(grid: Sequence[int], block: Sequence[int]) -> Iterator[tuple[Index, Index]]:
    for position in np.ndindex(*grid_shape(grid, block)):
        start = tuple(i * side for i, side in zip(position, block, strict=True))
        yield start, tuple(min(a + side, n) for a, side, n in zip(start, block, grid, strict=True))


def to_region(start: Sequence[int], stop: Sequence[int]) -> Region:
    """Return the slices from `start` to `stop`, along each axis."""
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


class Entries:
    """Entries of a block of chunks.

    Parameters
    ----------
    geometry : Geometry
        Chunks and tiles of the array.
    classes : int
        Number of classes, "unknown" included.
    start, stop : tuple of int
        First chunk of the block, and one past its last.

    Attributes
    ----------
    tiles : ndarray
        uint8 (classes, tiles of the block along each axis), without parents.
    source, head, crc, nbytes : ndarray
        uint8 and uint32 (chunks of the block along each axis).
    embeddings : ndarray or None
        int8 (tiles of the block along each axis, values), 0 where a tile has none; None if no tile has any.
    """

    def __init__(self, geometry: Geometry, classes: int, start: Index, stop: Index) -> None:
        self.geometry, self.start, self.stop = geometry, start, stop
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        self._tiles = geometry.tiles_of(start, stop)
        self.tiles = np.zeros((classes, *(part.stop - part.start for part in self._tiles)), np.uint8)
        self.source = np.zeros(shape, np.uint8)
        self.head, self.crc, self.nbytes = (np.zeros(shape, np.uint32) for _ in range(3))
        self.embeddings: NDArray[np.int8] | None = None

    def tile_region(self, index: Index) -> Region:
        """Return the slices of `tiles` for a chunk, without the axis of classes."""
        inside = self.geometry.tiles_of(index, [i + 1 for i in index])
        return tuple(
            slice(part.start - whole.start, part.stop - whole.start)
            for part, whole in zip(inside, self._tiles, strict=True)
        )

    def set(
        self, index: Index, scores: NDArray[np.uint8] | None, vectors: NDArray[np.int8] | None = None, **entry: int
    ) -> None:
        """Set the entry of a chunk; `scores` and `vectors` as from `Geometry.arrange`.

        Raises
        ------
        LabelIndexError
            If embeddings have another number of values than those before.
        """
        position = tuple(i - a for i, a in zip(index, self.start, strict=True))
        for name, value in entry.items():
            getattr(self, name)[position] = value
        if scores is not None:
            self.tiles[(slice(None), *self.tile_region(index))] = scores
        if vectors is not None and len(vectors):
            if self.embeddings is None:
                self.embeddings = np.zeros((*self.tiles.shape[1:], len(vectors)), np.int8)
            if len(vectors) != self.embeddings.shape[-1]:
                raise LabelIndexError(
                    f"chunk {index} has embeddings of {len(vectors)} values, others of {self.embeddings.shape[-1]}; "
                    "write the chunk again, or relabel the array"
                )
            self.embeddings[self.tile_region(index)] = np.moveaxis(vectors, 0, -1)

    def largest(self) -> NDArray[np.uint8]:
        """Return the largest score of each class in each chunk."""
        return largest_of(self.tiles, (1, *self.geometry.per_chunk))


def largest_of(scores: NDArray[np.uint8], block: Sequence[int]) -> NDArray[np.uint8]:
    """Reduce an array to blocks of this shape, the last ones perhaps smaller: the largest score of each."""
    for axis, per in enumerate(block):
        if per > 1:
            scores = np.maximum.reduceat(scores, np.arange(0, scores.shape[axis], per), axis=axis)
    return scores


class LabelIndex:
    """A label index, open for reading.

    Parameters
    ----------
    location : IndexLocation
        Where the index is.
    counter : Counter, optional
        Counts bytes and requests of opening it.

    Attributes
    ----------
    group : zarr.Group
        The group that has its arrays.
    vocabulary : Vocabulary
        Names of the labels.
    geometry : Geometry
        Chunks and tiles of the array.
    scores, tile_scores, source : zarr.Array
        Largest scores by chunk, scores by tile, and the source of each entry.
    values : int
        Values of the embedding of a tile; 0 if the index has no array `embeddings`.
    learned : tuple of LearnedLabel
        Labels that were learned from examples.
    counts : mapping of str to int
        Number of chunks by source.
    outdated : bool
        Whether a bulk write began since the index was made, and did not update it.

    Raises
    ------
    LabelIndexError
        If there is no index, or it is damaged or of another version.
    RefusedCodec
        If an array of the index has a codec that is not read of any archive.
    """

    def __init__(self, location: IndexLocation, counter: Counter | None = None) -> None:
        self.location = location
        self.group, self._documents, self.outdated = _current_version(location, counter)
        self._members: dict[str, zarr.Array] = {}
        about: Any = self.group.attrs.get(ATTRIBUTE)
        if not isinstance(about, Mapping) or "array" not in about:
            raise LabelIndexError(f"{location}: {UNFINISHED}")
        self.vocabulary = Vocabulary.from_json(about.get("vocabulary"))
        with self._errors():
            self.about: Mapping[str, Any] = dict(about["array"])
            self.counts: Mapping[str, int] = {str(name): int(n) for name, n in about.get("counts", {}).items()}
            self.geometry = Geometry(
                Axes(self.about["axes"]),
                tuple(map(int, self.about["shape"])),
                tuple(map(int, self.about["chunks"])),
                (int(self.about["tile_shape"][0]), int(self.about["tile_shape"][1])),
            )
            check_count(self.geometry.count, f"{location}: the label index", LabelIndexError)
            self.values = int(self.about.get("embedding_values", 0))
            if not 0 <= self.values <= MAX_VALUES:
                raise ValueError(f"embeddings of {self.values} values")
            learned = about.get("learned", [])
            cells = prod(self.geometry.tile_grid)
            self.learned = tuple(LearnedLabel.from_json(one, cells) for one in learned[: MAX_CLASSES + 1])
            self.vocabulary = self.vocabulary.with_learned(one.name for one in self.learned)
            if len(self.learned) > MAX_CLASSES or len(self.vocabulary.learned) != len({*self.vocabulary.learned}):
                raise ValueError("learned labels: too many, or two of one name")
            if len(self.vocabulary.learned) != len(self.learned):
                raise ValueError("learned labels: one has the name of a class")
            self.scores: zarr.Array = self.member("chunk_scores")
            self.tile_scores: zarr.Array = self.scores if self.geometry.one_tile else self.member("tile_scores")
            self.source: zarr.Array = self.member("source")

    def _errors(self) -> AbstractContextManager[None]:
        """Raise LabelIndexError for what damage leads to."""
        return metadata_errors(self.location, LabelIndexError, DAMAGED_INDEX)

    def member(self, name: str) -> zarr.Array:
        """Return an array of the index; LabelIndexError if it is none of an index, RefusedCodec for its codec."""
        if name not in self._members:
            self._members[name] = self._open_member(name)
        return self._members[name]

    def _open_member(self, name: str) -> zarr.Array:
        with self._errors():
            # Queries read three of the arrays: the metadata of others is not parsed.
            array: Any = (
                self.group[name]
                if self._documents is None
                else zarr.Array(zarr.AsyncArray(self._documents[name], self.group.store_path / name))
            )
        if not isinstance(array, zarr.Array):
            raise LabelIndexError(f"{self.location}: {DAMAGED_INDEX}{name} is not an array; run consolidate_labels")
        check_codecs(array)
        classes = len(self.vocabulary.known)
        shapes = {"chunk_scores": (classes, *self.geometry.grid), "tile_scores": (classes, *self.geometry.tile_grid)}
        shapes["embeddings"] = (*self.geometry.tile_grid, self.values)
        shape, dtype = shapes.get(name, self.geometry.grid), np.dtype(DTYPES[name])
        if array.shape != shape or array.dtype.newbyteorder("=") != dtype:
            raise LabelIndexError(
                f"{self.location}: {DAMAGED_INDEX}{name} is {array.dtype} {array.shape}, expected {dtype} {shape}; run "
                "consolidate_labels"
            )
        nbytes = prod(array.shards or array.chunks) * array.dtype.itemsize
        if nbytes > MAX_PART:
            raise LabelIndexError(
                f"{self.location}: {DAMAGED_INDEX}{name} has chunks of {nbytes:,} bytes, expected at most "
                f"{MAX_PART:,}; run consolidate_labels"
            )
        return array

    def check(self, name: str, decoder: str, geometry: Geometry, fingerprint: str) -> None:
        """Check that the index belongs to an array.

        Raises
        ------
        LabelIndexError
            If name, decoder, axes, chunks or tiles are others.
        StaleIndex
            If the array has another shape now, or was replaced by another.
        """
        for key, expected in {"name": name, "decoder": decoder}.items():
            indexed = str(self.about.get(key, ""))
            if indexed and expected and indexed != expected:
                raise LabelIndexError(
                    f"{self.location}: index of another array, with {key} {indexed!r} instead of {expected!r}; run "
                    "consolidate_labels"
                )
        # Check the shape last: a mismatch in shape alone means that the array was resized.
        for key, value in sorted(geometry.to_json().items(), key=lambda item: item[0] == "shape"):
            if self.about[key] != value:
                error = StaleIndex if key == "shape" else LabelIndexError
                raise error(
                    f"{self.location}: the index was made for {key} {self.about[key]}, but the array has {value}; run "
                    "consolidate_labels"
                )
        if self.about.get("fingerprint") != fingerprint:
            raise StaleIndex(
                f"{self.location}: the array was replaced by another, or its codec changed, after it was indexed; run "
                "consolidate_labels"
            )

    @property
    def tile_unit(self) -> Index:
        """Chunks of the archive in a chunk of the tiles' scores, along each axis."""
        sizes = self.tile_scores.chunks[1:]
        return tuple(max(1, n // per) for n, per in zip(sizes, self.geometry.per_chunk, strict=True))

    def read(
        self, parts: Sequence[tuple[zarr.Array, tuple[Any, ...]]], counter: Counter | None = None
    ) -> list[NDArray[Any]]:
        """Read selections of arrays of the index concurrently; StaleIndex if the index was removed meanwhile."""
        counter = counter or Counter()

        async def gather() -> list[Any]:
            return await asyncio.gather(*(counting_array(array, counter).getitem(part) for array, part in parts))

        with self._errors():
            results = [np.asarray(values) for values in sync(gather())]
        for (array, _), values in zip(parts, results, strict=True):
            if array is self.source:
                self._check_source(values)
        return results

    def _check_source(self, source: NDArray[Any]) -> None:
        largest = source.max(initial=0)
        if largest == REMOVED:
            raise StaleIndex(f"{self.location}: the index was replaced since it was opened; open the labels again")
        if largest >= len(SOURCES):
            raise LabelIndexError(
                f"{self.location}: {DAMAGED_INDEX}source {largest}, expected less than {len(SOURCES)}; run "
                "consolidate_labels"
            )

    def values_at(
        self, array: zarr.Array, first: tuple[int, ...], cells: NDArray[np.int64], counter: Counter | None = None
    ) -> NDArray[Any]:
        """Return the values of an array of the index at positions (n, axes); `first` are its indices before those."""
        if not len(cells):
            return np.zeros(0, array.dtype)
        if SPARSE * len(cells) > prod(array.shape[len(first) :]):
            check_memory(
                prod(array.shape[len(first) :]) * array.dtype.itemsize, f"a row of {array.path}", LabelIndexError
            )
            return self.read([(array, first)], counter)[0][tuple(cells.T)]
        points = (*(np.full(len(cells), number) for number in first), *cells.T)
        with metadata_errors(f"{self.location}: damaged label index", LabelIndexError):
            return np.asarray(sync(read_points(counting_array(array, counter or Counter()), points)))

    def entries(self, indices: NDArray[np.int64], counter: Counter | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return source, uint8 (n,), and checksum, uint32 (n,), of the chunks at positions (n, axes)."""
        if not len(indices):
            return np.zeros(0, np.uint8), np.zeros(0, np.uint32)
        points = tuple(indices.T)
        arrays = (self.source, self.member("crc"))
        counter = counter or Counter()

        async def gather() -> list[Any]:
            return await asyncio.gather(*(read_points(counting_array(array, counter), points) for array in arrays))

        with self._errors():
            source, crc = map(np.asarray, sync(gather()))
        self._check_source(source)
        return source, crc

    def block(self, start: Index, stop: Index) -> Entries:
        """Read the entries of a block of chunks."""
        entries = Entries(self.geometry, len(self.vocabulary.names), start, stop)
        region = to_region(start, stop)
        names = ("source", "head", "crc", "nbytes")
        tiles = (slice(len(self.vocabulary.names)), *self.geometry.tiles_of(start, stop))
        arrays = [self.source, *map(self.member, names[1:])]
        parts: list[tuple[zarr.Array, tuple[Any, ...]]] = [(array, region) for array in arrays]
        *values, entries.tiles = self.read([*parts, (self.tile_scores, tiles)])
        entries.source, entries.head, entries.crc, entries.nbytes = values
        if self.values:
            (entries.embeddings,) = self.read([(self.member("embeddings"), tiles[1:])])
        return entries


def _current_version(
    location: IndexLocation, counter: Counter | None
) -> tuple[zarr.Group, Mapping[str, Any] | None, bool]:
    """Open the group of the current version of an index.

    Also return the metadata of its arrays by name, None if it is to be read, and whether chunks were written since.
    """
    index = open_group(location, counter)
    about: Any = index.attrs.get(ATTRIBUTE)
    about = about if isinstance(about, Mapping) else {"format": FORMAT}
    if about.get("format") != FORMAT:
        raise LabelIndexError(
            f"{location}: the label index has format {about.get('format')}, but this deepsic_codec reads {FORMAT}; run "
            "consolidate_labels"
        )
    name = about.get("current")
    if not isinstance(name, str) or not VERSION.fullmatch(name):
        raise LabelIndexError(f"{location}: {UNFINISHED}")
    version, metadata = location.child(name), about.get("metadata")
    if metadata is None:
        return open_group(version, counter), None, bool(about.get("written"))
    with metadata_errors(location, LabelIndexError, DAMAGED_INDEX):
        # One request for the name of the version and its metadata.
        documents: Mapping[str, Any] = dict(metadata["consolidated_metadata"]["metadata"])
        about_group = type(index.metadata).from_dict({**metadata, "consolidated_metadata": None})
    group = zarr.Group(zarr.AsyncGroup(about_group, StorePath(index.store, version.path)))
    return group, documents, bool(about.get("written"))


def open_group(location: IndexLocation, counter: Counter | None = None) -> zarr.Group:
    """Open the group of an index; raises LabelIndexError if there is none."""
    store: Store = location.store
    if counter is not None:
        store = CountingStore(store, counter)
    zarr_format: Any = location.zarr_format
    try:
        # Mode "r" would reopen a store that can write, which a zip file being written cannot bear.
        mode: Any = "r" if store.read_only else "r+"
        with remote_errors(StorePath(location.store, location.path)):
            return zarr.open_group(store, path=location.path, mode=mode, zarr_format=zarr_format)
    except (FileNotFoundError, *DAMAGED) as error:
        raise LabelIndexError(
            f"{location}: no label index; make one with consolidate_labels(array) or `deepsic index URL`, or read all "
            "headers with open_labels(array, scan=True)"
        ) from error
