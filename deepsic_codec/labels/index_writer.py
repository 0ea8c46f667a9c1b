"""Write a label index, and put it in place of an earlier one so that a crash leaves the old or the new."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.axes import Index
from deepsic_codec.errors import LabelIndexError
from deepsic_codec.labels.index import ATTRIBUTE, FORMAT, SOURCES, Entries, IndexChunking, open_group, to_region
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import IndexLocation

CONVENTION = {
    "uuid": "2f6f7c0e-5d0b-4c53-9a6e-0d2b7c1f8e44",
    "name": "deepsic-labels",
    "description": "Semantic labels of the chunks of an image array: largest score of each class in each chunk, "
    "scores of the tiles within, and the source of each entry.",
}
NEXT = ("_next", "_next2")  # suffixes of an index that will replace another


class IndexWriter:
    """Writes an index.

    Parameters
    ----------
    location : IndexLocation
        Where the index goes; contents of that group are deleted.
    geometry : Geometry
        Of the array.
    vocabulary : Vocabulary
        Names of the labels.
    about : mapping
        Name and decoder of the array.
    """

    def __init__(
        self, location: IndexLocation, geometry: Geometry, vocabulary: Vocabulary, about: Mapping[str, Any]
    ) -> None:
        self.location, self.geometry, self.vocabulary = location, geometry, vocabulary
        self.chunking = IndexChunking.of(geometry, len(vocabulary.known))
        self._about = dict(about)
        self._counts = np.zeros(len(SOURCES), np.int64)
        attributes: dict[str, Any] = {ATTRIBUTE: {"format": FORMAT}}  # an unfinished index
        self.group = zarr.open_group(
            location.store, path=location.path, mode="w", zarr_format=_zarr_format(location), attributes=attributes
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
        self._values("label", ["label"], numbers, about)
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
        self._values("straddles", [tile_dims[y], tile_dims[x]], straddles.astype(np.uint8), about)
        about = {"long_name": "source of the labels of a chunk"}
        about |= {"flag_values": list(range(len(SOURCES))), "flag_meanings": " ".join(SOURCES)}
        self._array("source", chunk_dims, about, grid, unit)
        for name, text in {
            "crc": "CRC-32C of the header of the chunk's payload, which covers the checksums of its sections",
            "head": "first 32 bits of the identity of the semantic head, 0 for none",
            "nbytes": "bytes of the chunk's payload",
        }.items():
            self._array(name, chunk_dims, {"long_name": text}, grid, unit, "u4")

    def _starts(self, dimensions: list[str], kind: str, starts: list[NDArray[Any]]) -> None:
        for name, values in zip(dimensions, starts, strict=True):
            self._values(name, [name], values, {"long_name": f"first sample of a {kind} along {name[0]}"})

    def _values(self, name: str, dimensions: list[str], values: NDArray[Any], attributes: dict[str, Any]) -> None:
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
    ) -> zarr.Array:
        named: dict[str, Any] = {"dimension_names": dimensions}
        if self.location.zarr_format == 2:
            attributes, named = {**attributes, "_ARRAY_DIMENSIONS": dimensions}, {}
        return self.group.create_array(
            name, shape=shape, chunks=chunks, dtype=dtype, fill_value=0, attributes=attributes, **named
        )

    def write(self, entries: Entries) -> None:
        """Write the entries of a unit."""
        region = to_region(entries.start, entries.stop)
        tiles = self.geometry.tiles_of(entries.start, entries.stop)
        largest = entries.largest()
        for row, name in enumerate(self.vocabulary.known):
            # Parents have rows of their own, so that a query for one reads one row and not those of its classes.
            members = list(self.vocabulary.members(name))
            _put(self.group, "chunk_scores", (row, *region), largest[members].max(axis=0, initial=0))
            if not self.geometry.one_tile:
                _put(self.group, "tile_scores", (row, *tiles), entries.tiles[members].max(axis=0, initial=0))
        for name in ("source", "head", "crc", "nbytes"):
            _put(self.group, name, region, getattr(entries, name))
        self._counts += np.bincount(entries.source.ravel(), minlength=len(SOURCES))

    def finish(self) -> None:
        """Write the attributes that make the index valid."""
        about: dict[str, Any] = {
            "format": FORMAT,
            "array": {**self._about, **self.geometry.to_json()},
            "vocabulary": self.vocabulary.to_json(),
            "counts": dict(zip(SOURCES, self._counts.tolist(), strict=True)),
            "current": None,
        }
        attributes: Any = {"Conventions": "CF-1.11", "zarr_conventions": [CONVENTION], ATTRIBUTE: about}
        self.group.attrs.put(attributes)
        _consolidate(self.location)


def _put(group: zarr.Group, name: str, region: tuple[Any, ...], values: NDArray[Any]) -> None:
    array = group[name]
    assert isinstance(array, zarr.Array)
    array[region] = values


def _word(name: str) -> str:
    return "_".join(name.split()) or "_"  # CF separates the meanings by blanks


def _format(location: IndexLocation) -> Any:
    return location.zarr_format


def _consolidate(location: IndexLocation) -> None:
    """Put the metadata of all arrays into that of the group, where the store can: one request opens the index."""
    if not getattr(location.store, "supports_consolidated_metadata", True):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that format 3 does not specify it: readers that do not know it lose nothing
        zarr.consolidate_metadata(location.store, path=location.path, zarr_format=_zarr_format(location))


def replace(location: IndexLocation, write: Callable[[IndexLocation], None]) -> None:
    """Write an index and put it in place of an earlier one, which stays valid until the new one is complete.

    The new index is written beside the old one under another name. Then an attribute of the old group points to it,
    its contents are copied over the old ones, and it is deleted. A failure before the attribute is set leaves the old
    index; after a later failure, readers follow the attribute to the new one.

    Parameters
    ----------
    location : IndexLocation
        Where the index goes.
    write : callable
        Writes a finished index to a location.

    Raises
    ------
    LabelIndexError
        If the store cannot be written to.
    """
    try:
        old = _earlier(location)
        if old is None:
            return _write(location, write)
        if not location.store.supports_deletes or not location.path:
            reason = "cannot delete" if location.path else "is the index itself and has no location beside it"
            raise LabelIndexError(
                f"{location}: the store {reason}, so the index cannot be replaced; pass another location (index=...)"
            )
        about = _attribute(old)
        name = location.path.rpartition("/")[2]
        suffix = next(suffix for suffix in NEXT if about.get("current") != f"{name}{suffix}")
        new = location.with_suffix(suffix)
        _write(new, write)
        group = zarr.open_group(location.store, path=location.path, mode="r+", zarr_format=_zarr_format(location))
        group.attrs[ATTRIBUTE] = {**about, "current": f"{name}{suffix}"}
        _consolidate(location)
        sync(_move(location, new))
        for other in NEXT:
            sync(location.store.delete_dir(location.with_suffix(other).path))
    except (PermissionError, NotImplementedError) as error:
        raise LabelIndexError(
            f"{location}: cannot be written to ({error}); pass another location (index=...)"
        ) from error
    return None


def _earlier(location: IndexLocation) -> zarr.Group | None:
    """Return the finished index at a location, None if there is none; raises LabelIndexError for anything else."""
    try:
        group = open_group(location)
    except LabelIndexError:
        if sync(location.store.is_empty(location.path)):
            return None
        group = None
    about: Any = None if group is None else group.attrs.get(ATTRIBUTE)
    if group is not None and about is None and not len(group.attrs) and next(iter(group), None) is None:
        return None
    if not isinstance(about, Mapping):
        raise LabelIndexError(
            f"{location}: holds no label index, and is not replaced; pass another location (index=...)"
        )
    return group if "array" in about else None


def _zarr_format(location: IndexLocation) -> Any:
    return location.zarr_format  # an int, for which zarr's signatures have literals


def _attribute(group: zarr.Group) -> dict[str, Any]:
    about: Any = group.attrs[ATTRIBUTE]
    return dict(about)


def _write(location: IndexLocation, write: Callable[[IndexLocation], None]) -> None:
    try:
        write(location)
    except BaseException:
        if location.store.supports_deletes and location.path:
            sync(location.store.delete_dir(location.path))  # an unfinished index is useless
        raise


async def _move(location: IndexLocation, new: IndexLocation) -> None:
    """Replace the contents of a group with those of another group, the metadata of the group last."""
    metadata = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
    store, prototype = location.store, default_buffer_prototype()
    for key in [key async for key in store.list_prefix(f"{location.path}/")]:
        if key.removeprefix(f"{location.path}/") not in metadata:
            await store.delete(key)
    keys = [key async for key in store.list_prefix(f"{new.path}/")]
    for key in sorted(keys, key=lambda key: key.removeprefix(f"{new.path}/") in metadata):
        value = await store.get(key, prototype)
        if value is not None:
            await store.set(f"{location.path}{key.removeprefix(new.path)}", value)
