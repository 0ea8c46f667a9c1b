"""Write a label index to a place of its own, then make it the current one with a single write."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.axes import Index, Region
from deepsic_codec.errors import LabelIndexError
from deepsic_codec.labels.index import (
    ATTRIBUTE,
    FORMAT,
    REMOVED,
    SOURCES,
    VERSION,
    Entries,
    IndexChunking,
    largest_of,
    open_group,
    to_region,
)
from deepsic_codec.labels.learned_label import LearnedLabel
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload.limits import check_count, check_memory
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import IndexLocation

CONVENTION = {
    "uuid": "2f6f7c0e-5d0b-4c53-9a6e-0d2b7c1f8e44",
    "name": "deepsic-labels",
    "description": "Semantic labels of the chunks of an image array: largest score of each class in each chunk, "
    "scores of the tiles within, and the source of each entry.",
}
# How long a version stays after another became current, for programs that have it open, and after it was last seen
# unfinished, for its writer.
KEEP_FINISHED, KEEP_UNFINISHED = timedelta(days=1), timedelta(days=7)


# Memory that coordinates take for a tile along an axis, and for a tile of an image.
STARTS_BYTES, STRADDLES_BYTES = 32, 3
ROWS_BYTES = 1 << 24  # of scores that are written at once


class IndexWriter:
    """Writes a version of an index.

    Parameters
    ----------
    location : IndexLocation
        Where the version goes; nothing may be there.
    geometry : Geometry
        Of the array.
    vocabulary : Vocabulary
        Names of the labels.
    about : mapping
        Name and decoder of the array.
    learned : sequence of LearnedLabel
        Labels whose scores follow from embeddings; `vocabulary` has their names.
    """

    def __init__(
        self,
        location: IndexLocation,
        geometry: Geometry,
        vocabulary: Vocabulary,
        about: Mapping[str, Any],
        learned: Sequence[LearnedLabel] = (),
    ) -> None:
        self.location, self.geometry, self.vocabulary = location, geometry, vocabulary
        tiles, y, x = geometry.tile_grid, geometry.axes.y, geometry.axes.x
        check_count(max(tiles, default=0), f"{location}: a label index", LabelIndexError, "tiles along an axis")
        nbytes = STARTS_BYTES * sum(tiles) + STRADDLES_BYTES * tiles[y] * tiles[x]
        check_memory(nbytes, f"{location}: a label index with its coordinates", LabelIndexError)
        self.chunking = IndexChunking.of(geometry, len(vocabulary.known))
        self._about = dict(about)
        self._learned = {one.name: one for one in learned}
        self._counts = np.zeros(len(SOURCES), np.int64)
        self._values = 0  # of embeddings, once there are any
        attributes: dict[str, Any] = {ATTRIBUTE: {"format": FORMAT}}  # an unfinished index
        self._arrays: dict[str, zarr.Array] = {}
        self._group = zarr.open_group(
            location.store, path=location.path, mode="w-", zarr_format=_zarr_format(location), attributes=attributes
        )
        self._make()

    def _make(self) -> None:
        geometry, names = self.geometry, self.vocabulary.known
        grid, unit = geometry.grid, self.chunking.unit
        chunk_dims = [f"{axis}_chunk" for axis in geometry.axes]
        tile_dims = chunk_dims if geometry.one_tile else [f"{axis}_tile" for axis in geometry.axes]
        tile_unit = tuple(n * per for n, per in zip(self.chunking.tile_unit, geometry.per_chunk, strict=True))
        numbers = np.arange(len(names), dtype=np.min_scalar_type(len(names)))
        about: dict[str, Any] = {
            "long_name": "semantic class",
            "flag_values": numbers.tolist(),
            "flag_meanings": " ".join(map(_word, names)),
        }
        if self.vocabulary.descriptions:
            about["descriptions"] = dict(self.vocabulary.descriptions)
        self._coordinate("label", ["label"], numbers, about)
        self._starts(chunk_dims, "chunk", [np.arange(n) * size for n, size in zip(grid, geometry.chunks, strict=True)])
        score = {"scale_factor": 1 / 255, "units": "1", "valid_range": [0, 255]}
        about = {"long_name": "largest score of a class in a chunk", **score}
        self._array("chunk_scores", ["label", *chunk_dims], about, (len(names), *grid), (1, *unit))
        if not geometry.one_tile:
            self._starts(tile_dims, "tile", [geometry.starts(axis) for axis in range(len(grid))])
            about = {"long_name": "score of a class in a label tile", **score}
            shape = len(names), *geometry.tile_grid
            self._array("tile_scores", ["label", *tile_dims], about, shape, (1, *tile_unit))
        y, x = geometry.axes.y, geometry.axes.x
        straddles = geometry.straddles(y)[:, None] | geometry.straddles(x)
        about = {"long_name": "whether the array ends within the tile"}
        about |= {"flag_values": [0, 1], "flag_meanings": "inside straddles"}
        self._coordinate("straddles", [tile_dims[y], tile_dims[x]], straddles.astype(np.uint8), about)
        about = {"long_name": "source of the labels of a chunk"}
        about |= {"flag_values": list(range(len(SOURCES))), "flag_meanings": " ".join(SOURCES)}
        self._array("source", chunk_dims, about, grid, unit, fill_value=REMOVED)
        for name, text in {
            "crc": "CRC-32C of the header of the chunk's payload, which covers the checksums of its sections",
            "head": "first 32 bits of the identity of the semantic head, 0 for none",
            "nbytes": "bytes of the chunk's payload",
        }.items():
            self._array(name, chunk_dims, {"long_name": text}, grid, unit, "u4")

    def _make_embeddings(self, values: int) -> None:
        geometry, unit = self.geometry, self.chunking.vector_unit
        chunks = tuple(n * per for n, per in zip(unit, geometry.per_chunk, strict=True))
        dims = [f"{axis}_{'chunk' if geometry.one_tile else 'tile'}" for axis in geometry.axes]
        about = {"long_name": "embedding of a label tile: its direction counts; 0 where there is none"}
        self._array("embeddings", [*dims, "value"], about, (*geometry.tile_grid, values), (*chunks, values), "i1")
        self._values = values

    def _starts(self, dimensions: list[str], kind: str, starts: list[NDArray[Any]]) -> None:
        for name, values in zip(dimensions, starts, strict=True):
            self._coordinate(name, [name], values, {"long_name": f"first sample of a {kind} along {name[0]}"})

    def _coordinate(self, name: str, dimensions: list[str], values: NDArray[Any], attributes: dict[str, Any]) -> None:
        chunks = tuple(max(1, n) for n in values.shape)
        array = self._array(name, dimensions, attributes, values.shape, chunks, values.dtype.str)
        if values.size:
            array[...] = values

    def _array(
        self,
        name: str,
        dimensions: list[str],
        attributes: dict[str, Any],
        shape: Index,
        chunks: Index,
        dtype: str = "u1",
        fill_value: int = 0,
    ) -> zarr.Array:
        named: dict[str, Any] = {"dimension_names": dimensions}
        if self.location.zarr_format == 2:
            attributes, named = {**attributes, "_ARRAY_DIMENSIONS": dimensions}, {}
        array = self._arrays[name] = self._group.create_array(
            name, shape=shape, chunks=chunks, dtype=dtype, fill_value=fill_value, attributes=attributes, **named
        )
        return array

    def write(self, entries: Entries) -> None:
        """Write the entries of a unit."""
        region = to_region(entries.start, entries.stop)
        tiles = self.geometry.tiles_of(entries.start, entries.stop)
        self._write_scores("chunk_scores", entries.largest(), region)
        if not self.geometry.one_tile:
            self._write_scores("tile_scores", entries.tiles, tiles)
        for name in self._learned:
            row: Any = self.vocabulary.row(name)
            scores = self._learned_scores(name, entries)
            self._arrays["chunk_scores"][(row, *region)] = largest_of(scores, self.geometry.per_chunk)
            if not self.geometry.one_tile:
                self._arrays["tile_scores"][(row, *tiles)] = scores
        for name in ("source", "head", "crc", "nbytes"):
            self._arrays[name][region] = getattr(entries, name)
        if entries.embeddings is not None:
            values = entries.embeddings.shape[-1]
            if not self._values:
                self._make_embeddings(values)
            if values != self._values:
                raise LabelIndexError(
                    f"chunks have embeddings of {self._values} values, others of {values}; relabel the array"
                )
            self._arrays["embeddings"][tiles] = entries.embeddings
        self._counts += np.bincount(entries.source.ravel(), minlength=len(SOURCES))

    def _write_scores(self, name: str, scores: NDArray[np.uint8], region: Region) -> None:
        """Write the scores of classes, (classes, ...), to a region, with those of parents.

        Parents have rows of their own, so that a query for one reads one row and not those of its classes.
        """
        members = [list(self.vocabulary.members(name)) for name in self.vocabulary.known if name not in self._learned]
        step = max(1, ROWS_BYTES // max(1, scores[0].size))
        for first in range(0, len(members), step):
            rows = [scores[classes].max(axis=0, initial=0) for classes in members[first : first + step]]
            self._arrays[name][(slice(first, first + len(rows)), *region)] = np.stack(rows)

    def _learned_scores(self, name: str, entries: Entries) -> NDArray[np.uint8]:
        """Return the scores of a learned label in the tiles of a unit, uint8 (tiles along each axis)."""
        vectors, learned = entries.embeddings, self._learned[name]
        if vectors is None or vectors.shape[-1] != len(learned.weights):
            return np.zeros(entries.tiles.shape[1:], np.uint8)
        return learned.scores(vectors, self.geometry)

    def finish(self) -> None:
        """Write the attributes that make the version a finished one."""
        about: dict[str, Any] = {
            "format": FORMAT,
            "array": {**self._about, **self.geometry.to_json(), "embedding_values": self._values},
            "vocabulary": self.vocabulary.to_json(),
            "counts": dict(zip(SOURCES, self._counts.tolist(), strict=True)),
        }
        if self._learned:
            about["learned"] = [one.to_json() for one in self._learned.values()]
        attributes: Any = {"Conventions": "CF-1.11", "zarr_conventions": [CONVENTION], ATTRIBUTE: about}
        self._group.attrs.put(attributes)
        _consolidate(self.location)


def _word(name: str) -> str:
    return "_".join(name.split()) or "_"  # CF separates the meanings by blanks


def _consolidate(location: IndexLocation) -> None:
    """Put the metadata of all arrays into that of the group, where the store can: one request opens the index."""
    if not getattr(location.store, "supports_consolidated_metadata", True):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that format 3 does not specify it: readers that do not know it lose nothing
        zarr.consolidate_metadata(location.store, path=location.path, zarr_format=_zarr_format(location))


def replace(location: IndexLocation, write: Callable[[IndexLocation], None]) -> None:
    """Write an index; an earlier one stays valid until the new one is complete.

    Each version of an index is a group of its own, under a name that nobody else has, in the group at `location`. One
    write of the metadata of that group makes a version the current one, so that readers see the old or the new, and of
    two writers the last. Old versions, and what killed writers left, are deleted by later calls.

    Parameters
    ----------
    location : IndexLocation
        Where the index goes.
    write : callable
        Writes a finished version to a location.

    Raises
    ------
    LabelIndexError
        If the store cannot be written to, or something else is at the location.
    """
    try:
        earlier = _attributes(location)
        if earlier.get(ATTRIBUTE, {}).get("current") and not location.store.supports_deletes:
            raise LabelIndexError(
                f"{location}: the store cannot delete, so the index cannot be replaced; pass another location "
                "(index=...)"
            )
        _claim(location)
        version = location.child(uuid4().hex)
        try:
            write(version)
        except BaseException:
            if location.store.supports_deletes:
                with suppress(Exception):  # the first error says what is wrong; later calls delete what stays
                    sync(location.store.delete_dir(version.path))
            raise
        # After an error here, the version stays: the store may have made it the current one, and lost the answer.
        _make_current(version, location)
    except (PermissionError, NotImplementedError) as error:
        raise LabelIndexError(
            f"{location}: cannot be written to ({error}); pass another location (index=...)"
        ) from error
    with suppress(Exception):  # what stays is in nobody's way
        _remove_old(location)


def mark_outdated(location: IndexLocation) -> None:
    """Note in an index, if there is one, that chunks are being written that it does not have; the next one has no note.

    If another index becomes current at this moment, the one before it may stay current, with the note.
    """
    with suppress(LabelIndexError, PermissionError, NotImplementedError):
        attributes = _attributes(location)
        about = attributes.get(ATTRIBUTE, {})
        if about.get("current") and not about.get("written") and location.store.supports_deletes:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            _write_attributes(location, {**attributes, ATTRIBUTE: {**about, "written": time}})


def _attributes(location: IndexLocation) -> dict[str, Any]:
    """Return the attributes of an index, empty if nothing is there; raises LabelIndexError for anything else."""
    try:
        group = open_group(location)
    except LabelIndexError:
        if sync(location.store.is_empty(location.path)):
            return {}
        group = None
    attributes = {} if group is None else dict(group.attrs)
    if isinstance(attributes.get(ATTRIBUTE), Mapping):
        return attributes
    if group is not None and not attributes and all(VERSION.fullmatch(name) for name in group):
        return {}
    raise LabelIndexError(f"{location}: holds no label index, and is not replaced; pass another location (index=...)")


def _versions(location: IndexLocation) -> list[str]:
    """List the versions of an index, finished or not."""

    async def names() -> list[str]:
        return [name.rstrip("/").rpartition("/")[2] async for name in location.store.list_dir(location.path)]

    return sorted(filter(VERSION.fullmatch, sync(names())))


def _claim(location: IndexLocation) -> None:
    """Make the group of an index unless there is one; raises LabelIndexError if something else is there by now."""
    if location.zarr_format == 2:
        _set(location, ".zgroup", {"zarr_format": 2}, if_missing=True)
    _write_attributes(location, {ATTRIBUTE: {"format": FORMAT}}, if_missing=True)
    if ATTRIBUTE not in _attributes(location):  # an empty group
        _write_attributes(location, {ATTRIBUTE: {"format": FORMAT}})


def _write_attributes(location: IndexLocation, attributes: Mapping[str, Any], *, if_missing: bool = False) -> None:
    """Write the attributes of the group of an index, in one write of one document."""
    if location.zarr_format == 2:
        _set(location, ".zattrs", attributes, if_missing)
    else:
        document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        _set(location, "zarr.json", document, if_missing)


def _set(location: IndexLocation, name: str, document: Mapping[str, Any], if_missing: bool = False) -> None:
    value = default_buffer_prototype().buffer.from_bytes(json.dumps(document, indent=2).encode())
    store = location.store
    sync((store.set_if_not_exists if if_missing else store.set)(location.key(name), value))


def _make_current(version: IndexLocation, location: IndexLocation) -> None:
    """Make a version the current one."""
    name = version.path.rpartition("/")[2]
    metadata = _metadata(version)
    attributes = _attributes(location)
    times = attributes.get(ATTRIBUTE, {}).get("superseded")
    times, now = times if isinstance(times, Mapping) else {}, datetime.now(UTC)
    superseded = {old: _since(times.get(old), now) for old in _versions(location) if old != name}
    about = {
        "format": FORMAT,
        "current": name,
        "superseded": {old: time.isoformat(timespec="seconds") for old, time in superseded.items()},
        "metadata": metadata,
    }
    _write_attributes(location, {**attributes, "zarr_conventions": [CONVENTION], ATTRIBUTE: about})


def _metadata(version: IndexLocation) -> Any:
    """Return the metadata of a version and all of its arrays, None where they are no single document."""
    if version.zarr_format == 2:
        return None
    data = sync(version.store.get(version.key("zarr.json"), default_buffer_prototype()))
    if data is None:
        raise LabelIndexError(f"{version}: was deleted while it was written; run consolidate_labels again")
    document = json.loads(data.to_bytes())
    return document if "consolidated_metadata" in document else None


def _since(text: Any, now: datetime) -> datetime:
    """Return since when a version has not been current: the time in the index, or now if that has none."""
    try:
        time = datetime.fromisoformat(text)
        return time if time.tzinfo is not None else now
    except (TypeError, ValueError):
        return now


def _remove_old(location: IndexLocation) -> None:
    """Delete versions that have long been superseded, and those that their writers left long ago."""
    about = _attributes(location).get(ATTRIBUTE, {})
    now = datetime.now(UTC)
    for name, text in about.get("superseded", {}).items():
        age = now - _since(text, now)
        if not VERSION.fullmatch(name) or name == about.get("current") or age < KEEP_FINISHED:
            continue
        version = location.child(name)
        try:
            written: Any = open_group(version).attrs.get(ATTRIBUTE)
        except LabelIndexError:
            continue
        if not isinstance(written, Mapping) or age < (KEEP_FINISHED if "array" in written else KEEP_UNFINISHED):
            continue
        # `source` first: a program that has this version open finds it missing, and does not take zeros for scores.
        sync(location.store.delete_dir(f"{version.path}/source"))
        sync(location.store.delete_dir(version.path))


def _zarr_format(location: IndexLocation) -> Any:
    return location.zarr_format  # an int, for which zarr's signatures have literals
