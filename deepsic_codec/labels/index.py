"""The label index of an array: ordinary Zarr arrays in a group beside it. ``docs/labels.md`` has the layout."""

import asyncio
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store

from deepsic_codec._compat import default_buffer_prototype, read_points, sync
from deepsic_codec.axes import Axes, Index, Region, grid_shape
from deepsic_codec.errors import LabelIndexError, StaleIndex
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import Counter, CountingStore, IndexLocation, counting_array

ATTRIBUTE = "deepsic_labels"  # of the group
FORMAT = 1
CONVENTION = {
    "uuid": "2f6f7c0e-5d0b-4c53-9a6e-0d2b7c1f8e44",
    "name": "deepsic-labels",
    "description": "Semantic labels of the chunks of an image array: largest score of each class in each chunk, "
    "scores of the tiles within, and what each entry was made from.",
    "spec_url": "https://pypi.org/project/deepsic-codec/",
}
MISSING, HEADER, FEATURES, UNLABELLED = range(4)
SOURCES = ("missing", "header", "features", "unlabelled")
UNIT = 1 << 18  # chunks of the archive in a chunk of the index: four reads for a class of a million chunks
TILES = 1 << 21  # the same for tiles, which are read only where the chunks leave a question open
BUFFER = 1 << 28  # bytes of tile scores held in memory while an index is written
NEXT = ("_next", "_next2")  # names of an index on its way to replace another


@dataclass(frozen=True)
class Layout:
    """How the arrays of an index are chunked, in chunks of the archive.

    `unit` is for arrays of one number per chunk, `tile_unit` for those of tiles. The first is a multiple of the
    second, or all there is.
    """

    unit: Index
    tile_unit: Index

    @classmethod
    def of(cls, geometry: Geometry, classes: int) -> "Layout":
        """Return the layout for an array."""
        tiles = prod(geometry.per_chunk)
        unit = _block(geometry.grid, max(1, min(UNIT, BUFFER // (classes * tiles))))
        return cls(unit, _block(unit, max(1, TILES // tiles)))

    def units(self, grid: Index) -> Iterator[tuple[Index, Index]]:
        """Iterate over units of a grid, each with its first chunk and one past its last."""
        return _blocks(grid, self.unit)


def _block(grid: Sequence[int], limit: int) -> Index:
    """Return the block that is left when the longest side of a grid is halved until it has at most `limit` cells."""
    sides = [1 << max(0, n - 1).bit_length() for n in grid]
    while prod(sides) > limit:
        longest = max(range(len(sides)), key=sides.__getitem__)
        sides[longest] //= 2
    return tuple(max(1, min(side, n)) for side, n in zip(sides, grid, strict=True))


def _blocks(grid: Sequence[int], block: Sequence[int]) -> Iterator[tuple[Index, Index]]:
    for place in np.ndindex(*grid_shape(grid, block)):
        start = tuple(i * side for i, side in zip(place, block, strict=True))
        yield start, tuple(min(a + side, n) for a, side, n in zip(start, block, grid, strict=True))


def _region(start: Sequence[int], stop: Sequence[int]) -> Region:
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


class Entries:
    """Entries of a block of chunks, to be written to an index.

    Attributes
    ----------
    tiles : ndarray
        uint8 (classes, tiles of the block along each axis), without parents.
    source, head, crc, nbytes : ndarray
        uint8 and uint32 (chunks of the block along each axis).
    """

    def __init__(self, geometry: Geometry, classes: int, start: Index, stop: Index) -> None:
        self.geometry, self.start, self.stop = geometry, start, stop
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        self._tiles = geometry.tiles_of(start, stop)
        self.tiles = np.zeros((classes, *(part.stop - part.start for part in self._tiles)), np.uint8)
        self.source = np.zeros(shape, np.uint8)
        self.head, self.crc, self.nbytes = (np.zeros(shape, np.uint32) for _ in range(3))

    def within(self, index: Index) -> Region:
        """Return where the tiles of a chunk are in `tiles`, without the axis of classes."""
        inside = self.geometry.tiles_of(index, [i + 1 for i in index])
        return tuple(
            slice(part.start - whole.start, part.stop - whole.start)
            for part, whole in zip(inside, self._tiles, strict=True)
        )

    def set(self, index: Index, scores: NDArray[np.uint8] | None, **entry: int) -> None:
        """Set the entry of a chunk; `scores` as from `Geometry.arrange`."""
        place = tuple(i - a for i, a in zip(index, self.start, strict=True))
        for name, value in entry.items():
            getattr(self, name)[place] = value
        if scores is not None:
            self.tiles[(slice(None), *self.within(index))] = scores

    def largest(self) -> NDArray[np.uint8]:
        """Return the largest score of each class in each chunk."""
        scores = self.tiles
        for axis, per in enumerate(self.geometry.per_chunk, start=1):
            if per > 1:
                scores = np.maximum.reduceat(scores, np.arange(0, scores.shape[axis], per), axis=axis)
        return scores


class Writer:
    """Writes an index into an empty place.

    Parameters
    ----------
    place : IndexLocation
        Where to; what is there is replaced.
    geometry : Geometry
        Of the array.
    vocabulary : Vocabulary
        What the labels can name.
    about : mapping
        Name and decoder of the array.
    """

    def __init__(
        self, place: IndexLocation, geometry: Geometry, vocabulary: Vocabulary, about: Mapping[str, Any]
    ) -> None:
        self.place, self.geometry, self.vocabulary = place, geometry, vocabulary
        self.layout = Layout.of(geometry, len(vocabulary.known))
        self._about = dict(about)
        self._counts = np.zeros(len(SOURCES), np.int64)
        attributes: dict[str, Any] = {ATTRIBUTE: {"format": FORMAT}}  # ours, and not finished
        self.group = zarr.open_group(
            place.store, path=place.path, mode="w", zarr_format=_format(place), attributes=attributes
        )
        self._make()

    def _make(self) -> None:
        geometry, names = self.geometry, self.vocabulary.known
        grid, unit = geometry.grid, self.layout.unit
        chunk_dims = [f"{axis}_chunk" for axis in geometry.axes]
        tile_dims = chunk_dims if geometry.one_tile else [f"{axis}_tile" for axis in geometry.axes]
        tile_unit = tuple(n * per for n, per in zip(self.layout.tile_unit, geometry.per_chunk, strict=True))
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
        about = {"long_name": "what the labels of a chunk were made from"}
        about |= {"flag_values": list(range(len(SOURCES))), "flag_meanings": " ".join(SOURCES)}
        self._array("source", chunk_dims, about, grid, unit)
        for name, text in {
            "crc": "CRC-32C of the header of the chunk's payload, which covers the checksums of its sections",
            "head": "first 32 bits of the identity of the semantic head, 0 for none",
            "nbytes": "bytes of the chunk's payload",
        }.items():
            self._array(name, chunk_dims, {"long_name": text}, grid, unit, "u4")

    def _starts(self, dimensions: list[str], what: str, starts: list[NDArray[Any]]) -> None:
        for name, values in zip(dimensions, starts, strict=True):
            self._values(name, [name], values, {"long_name": f"first sample of a {what} along {name[0]}"})

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
        if self.place.zarr_format == 2:
            attributes, named = {**attributes, "_ARRAY_DIMENSIONS": dimensions}, {}
        return self.group.create_array(
            name, shape=shape, chunks=chunks, dtype=dtype, fill_value=0, attributes=attributes, **named
        )

    def write(self, entries: Entries) -> None:
        """Write the entries of a unit."""
        region = _region(entries.start, entries.stop)
        tiles = self.geometry.tiles_of(entries.start, entries.stop)
        largest = entries.largest()
        for row, name in enumerate(self.vocabulary.known):
            # Parents have rows of their own: to ask for one then reads one, not as many as it has classes.
            members = list(self.vocabulary.members(name))
            _put(self.group, "chunk_scores", (row, *region), largest[members].max(axis=0, initial=0))
            if not self.geometry.one_tile:
                _put(self.group, "tile_scores", (row, *tiles), entries.tiles[members].max(axis=0, initial=0))
        for name in ("source", "head", "crc", "nbytes"):
            _put(self.group, name, region, getattr(entries, name))
        self._counts += np.bincount(entries.source.ravel(), minlength=len(SOURCES))

    def finish(self) -> None:
        """Make the index valid: until here, nobody takes it for one."""
        about: dict[str, Any] = {
            "format": FORMAT,
            "array": {**self._about, **self.geometry.to_json()},
            "vocabulary": self.vocabulary.to_json(),
            "counts": dict(zip(SOURCES, self._counts.tolist(), strict=True)),
            "current": None,
        }
        attributes: Any = {"Conventions": "CF-1.11", "zarr_conventions": [CONVENTION], ATTRIBUTE: about}
        self.group.attrs.put(attributes)
        _consolidate(self.place)


def _put(group: zarr.Group, name: str, region: tuple[Any, ...], values: NDArray[Any]) -> None:
    array = group[name]
    assert isinstance(array, zarr.Array)
    array[region] = values


def _word(name: str) -> str:
    return "_".join(name.split()) or "_"  # CF separates the meanings by blanks


def _format(place: IndexLocation) -> Any:
    return place.zarr_format


def _consolidate(place: IndexLocation) -> None:
    """Put the metadata of all arrays into that of the group, where the store can: one request opens the index."""
    if not getattr(place.store, "supports_consolidated_metadata", True):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that format 3 does not specify it: readers that do not know it lose nothing
        zarr.consolidate_metadata(place.store, path=place.path, zarr_format=_format(place))


class LabelIndex:
    """An index, open for reading.

    Parameters
    ----------
    place : IndexLocation
        Where it is.
    counter : Counter, optional
        Counts what opening it reads.

    Raises
    ------
    LabelIndexError
        If there is none, or it is no index of this version.
    """

    def __init__(self, place: IndexLocation, counter: Counter | None = None) -> None:
        group = _open(place, counter)
        about: Any = group.attrs.get(ATTRIBUTE)
        if isinstance(about, Mapping) and about.get("current"):
            # It is being replaced: what it points to is whole, what lies here may not be.
            group = _open(
                IndexLocation(place.store, _sibling(place.path, str(about["current"])), place.zarr_format), counter
            )
            about = group.attrs.get(ATTRIBUTE)
        if not isinstance(about, Mapping) or "array" not in about:
            raise LabelIndexError(f"{place}: no label index, or one that was never finished; run consolidate_labels")
        if about.get("format") != FORMAT:
            raise LabelIndexError(f"{place}: label index of format {about.get('format')}, this version reads {FORMAT}")
        self.place, self.group = place, group
        self.vocabulary = Vocabulary.from_json(about.get("vocabulary"))
        self.about: Mapping[str, Any] = about["array"]
        self.counts: Mapping[str, int] = about.get("counts", {})
        try:
            self.geometry = Geometry(
                Axes(self.about["axes"]),
                tuple(map(int, self.about["shape"])),
                tuple(map(int, self.about["chunks"])),
                (int(self.about["tile_shape"][0]), int(self.about["tile_shape"][1])),
            )
            self.scores: zarr.Array = self._member("chunk_scores")
            self.tile_scores: zarr.Array = self.scores if self.geometry.one_tile else self._member("tile_scores")
            self.source: zarr.Array = self._member("source")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise LabelIndexError(f"{place}: damaged label index ({type(error).__name__}: {error})") from None
        expected = (len(self.vocabulary.known), *self.geometry.grid)
        if self.scores.shape != expected or self.tile_scores.shape[1:] != self.geometry.tile_grid:
            raise LabelIndexError(f"{place}: damaged label index: scores {self.scores.shape}, expected {expected}")

    def _member(self, name: str) -> zarr.Array:
        array = self.group[name]
        if not isinstance(array, zarr.Array):
            raise KeyError(name)
        return array

    def check(self, name: str, decoder: str, geometry: Geometry) -> None:
        """Raise unless the index is of an array of this name, decoder and geometry."""
        for what, expected in {"name": name, "decoder": decoder}.items():
            found = str(self.about.get(what, ""))
            if found and expected and found != expected:
                raise LabelIndexError(f"{self.place}: index of another array: {what} {found!r}, not {expected!r}")
        # Shape last: only if all else fits, it is the same array grown or cut.
        for what, given in sorted(geometry.to_json().items(), key=lambda item: item[0] == "shape"):
            if self.about[what] != given:
                kind = StaleIndex if what == "shape" else LabelIndexError
                raise kind(
                    f"{self.place}: index of an array with {what} {self.about[what]}, but it has {given}; "
                    "run consolidate_labels"
                )

    @property
    def tile_unit(self) -> Index:
        """Chunks of the archive in a chunk of the tiles' scores, along each axis."""
        sizes = self.tile_scores.chunks[1:]
        return tuple(max(1, n // per) for n, per in zip(sizes, self.geometry.per_chunk, strict=True))

    def read(
        self, wanted: Sequence[tuple[zarr.Array, tuple[Any, ...]]], counter: Counter | None = None
    ) -> list[NDArray[Any]]:
        """Read parts of arrays of the index, all at once."""
        counter = counter or Counter()

        async def gather() -> list[Any]:
            return await asyncio.gather(*(counting_array(array, counter).getitem(part) for array, part in wanted))

        return [np.asarray(values) for values in sync(gather())]

    def entries(self, indices: NDArray[np.int64], counter: Counter | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return source and CRC of chunks (n, axes)."""
        if not len(indices):
            return np.zeros(0, np.uint8), np.zeros(0, np.uint32)
        parts = tuple(indices.T)
        arrays = (self.source, self._member("crc"))
        counter = counter or Counter()

        async def gather() -> list[Any]:
            chosen = (counting_array(array, counter) for array in arrays)
            return await asyncio.gather(*(read_points(array, parts) for array in chosen))

        source, crc = sync(gather())
        return np.asarray(source), np.asarray(crc)

    def block(self, start: Index, stop: Index) -> Entries:
        """Read the entries of a block of chunks."""
        entries = Entries(self.geometry, len(self.vocabulary.names), start, stop)
        region = _region(start, stop)
        names = ("source", "head", "crc", "nbytes")
        tiles = (slice(len(self.vocabulary.names)), *self.geometry.tiles_of(start, stop))
        wanted: list[tuple[zarr.Array, tuple[Any, ...]]] = [(self._member(name), region) for name in names]
        *values, entries.tiles = self.read([*wanted, (self.tile_scores, tiles)])
        entries.source, entries.head, entries.crc, entries.nbytes = values
        return entries


def _open(place: IndexLocation, counter: Counter | None) -> zarr.Group:
    store: Store = place.store
    if counter is not None:
        store = CountingStore(store, counter)
    try:
        # Mode "r" would reopen a store that can write, which a zip file being written cannot bear.
        mode: Any = "r" if store.read_only else "r+"
        return zarr.open_group(store, path=place.path, mode=mode, zarr_format=_format(place))
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise LabelIndexError(
            f"{place}: no label index; make one with consolidate_labels(array) or `deepsic index URL`, or read all "
            "headers with open_labels(array, scan=True)"
        ) from error


def _sibling(path: str, name: str) -> str:
    parent, _, _ = path.rpartition("/")
    return f"{parent}/{name}" if parent else name


def replace(place: IndexLocation, write: Any) -> None:
    """Write an index and put it in place of an earlier one, which stays whole and in use until the new one is.

    The new index is written beside the old under another name. Then an attribute of the old group points to it, its
    contents are copied over, and it is removed. A failure before the attribute is set changes nothing that is read;
    after it, readers follow the attribute.

    Parameters
    ----------
    place : IndexLocation
        Where the index is to be.
    write : callable
        Writes an index into a IndexLocation and finishes it.

    Raises
    ------
    LabelIndexError
        If the store cannot be written to.
    """
    try:
        old = _earlier(place)
        if old is None:
            return _write(place, write)
        if not place.store.supports_deletes or not place.path:
            what = "cannot delete" if place.path else "is the index itself, with no room beside it"
            raise LabelIndexError(f"{place}: the store {what}, so its index cannot be replaced; write it elsewhere")
        about = dict(old.attrs[ATTRIBUTE])  # type: ignore[call-overload, arg-type]
        name = place.path.rpartition("/")[2]
        suffix = next(suffix for suffix in NEXT if about.get("current") != f"{name}{suffix}")
        new = place.with_suffix(suffix)
        _write(new, write)
        group = zarr.open_group(place.store, path=place.path, mode="r+", zarr_format=_format(place))
        group.attrs[ATTRIBUTE] = {**about, "current": f"{name}{suffix}"}
        _consolidate(place)
        sync(_move(place, new))
        for other in NEXT:
            sync(place.store.delete_dir(place.with_suffix(other).path))
    except (PermissionError, NotImplementedError) as error:
        raise LabelIndexError(f"{place}: cannot be written to ({error}); give the index another place") from error
    return None


def _earlier(place: IndexLocation) -> zarr.Group | None:
    """Return the index that is there, finished or not pointed past; raises LabelIndexError for anything else."""
    try:
        group = _open(place, None)
    except LabelIndexError:
        if sync(place.store.is_empty(place.path)):
            return None
        group = None
    about: Any = None if group is None else group.attrs.get(ATTRIBUTE)
    if group is not None and about is None and not len(group.attrs) and next(iter(group), None) is None:
        return None
    if not isinstance(about, Mapping):
        raise LabelIndexError(f"{place}: something that is no label index is in its place; give it another")
    return group if "array" in about else None


def _write(place: IndexLocation, write: Any) -> None:
    try:
        write(place)
    except BaseException:
        if place.store.supports_deletes and place.path:
            sync(place.store.delete_dir(place.path))  # half an index is of no use to anybody
        raise


async def _move(place: IndexLocation, new: IndexLocation) -> None:
    """Copy what is in a group over another, its metadata last."""
    metadata = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
    store, prototype = place.store, default_buffer_prototype()
    for key in [key async for key in store.list_prefix(f"{place.path}/")]:
        if key.removeprefix(f"{place.path}/") not in metadata:
            await store.delete(key)
    keys = [key async for key in store.list_prefix(f"{new.path}/")]
    for key in sorted(keys, key=lambda key: key.removeprefix(f"{new.path}/") in metadata):
        value = await store.get(key, prototype)
        if value is not None:
            await store.set(f"{place.path}{key.removeprefix(new.path)}", value)
