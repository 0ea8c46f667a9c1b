"""The chunks that a query selects: positions, regions, and pixels when they are used."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index, Region
from deepsic_codec.codec.batching import raise_first
from deepsic_codec.codec.decode import DECODER
from deepsic_codec.errors import LabelIndexError, StaleIndex, counted
from deepsic_codec.labels import html, table
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.evaluation import Grid, is_current, judge_chunk, matching_tiles, read_largest
from deepsic_codec.labels.expression import Expression
from deepsic_codec.labels.index import LabelIndex
from deepsic_codec.labels.thumbnails import COUNT, sheet, thumbnails
from deepsic_codec.payload.limits import check_memory
from deepsic_codec.require import require
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.embedded import use_embedded
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import Counter
from deepsic_codec.stored.reader import PayloadStart

if TYPE_CHECKING:
    import dask.array
    import pandas
    import xarray

Verify = Literal["fetched", "all"]
TILE_BYTES = 32  # of memory that positions of tiles take for a tile, at most
FETCH = 32  # chunks fetched and decoded together
NOT_COMPARED = "the index was not compared with the chunks"
THUMBNAILS = "deepsic_codec.io.mosaic.mosaic(selection) draws more"
QUERY_AGAIN = "run consolidate_labels and query again"


class StaleIndexWarning(UserWarning):
    """Chunks were written after they were indexed; one of them may no longer satisfy the expression of a query."""


class Match(NamedTuple):
    """A chunk that a query selected, decoded: position, slices of the array, pixels."""

    chunk: Index
    region: Region
    array: NDArray[Any]


@dataclass(repr=False, eq=False)
class Selection:
    """The result of a query. Pixels are fetched and decoded only when they are used.

    Attributes
    ----------
    stored : StoredArray
        The array.
    index : LabelIndex
        Its label index.
    expression : Expression
        The condition.
    mask : ndarray
        bool, the grid of chunks: True for a chunk that has a tile that satisfies the condition.
    compared : bool
        Whether the headers of all chunks were compared with the index. If not, chunks that were written again since may
        be missing; `where(..., verify="all")` compares.
    """

    stored: StoredArray
    index: LabelIndex
    expression: Expression
    mask: Grid
    _counter: Counter
    _by_tiles: bool = False
    _verify: Verify | None = "fetched"
    _rewritten: dict[Index, Grid] = field(default_factory=dict)
    compared: bool = False

    @property
    def geometry(self) -> Geometry:
        """Chunks and label tiles of the array."""
        return self.index.geometry

    @property
    def bytes_read(self) -> int:
        """Bytes read to answer the query (opening the index not counted)."""
        return self._counter.bytes

    @property
    def requests(self) -> int:
        """Requests made for them."""
        return self._counter.requests

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """Positions of the chunks, int64 (chunks, axes)."""
        return np.argwhere(self.mask)

    @cached_property
    def count(self) -> int:
        """Number of chunks."""
        return int(np.count_nonzero(self.mask))

    @property
    def chunks(self) -> list[Index]:
        """Positions of the chunks in the grid of chunks."""
        # Column by column: a million tuples at once, not one by one.
        return list(zip(*self.indices.T.tolist(), strict=True))

    @property
    def regions(self) -> list[Region]:
        """Slices of the array that the chunks cover, or with `tiles=True` the tiles that satisfy the expression."""
        geometry = self.geometry
        if self._by_tiles:
            return [geometry.tile_region(tile) for tile in self.tiles.tolist()]
        return [geometry.chunk_region(chunk) for chunk in self.chunks]

    @cached_property
    def tiles(self) -> NDArray[np.int64]:
        """Positions in the grid of label tiles of those that satisfy the expression, int64 (tiles, axes)."""
        if not self.count:
            return np.zeros((0, self.mask.ndim), np.int64)
        geometry = self.geometry
        if geometry.one_tile:
            return self.indices
        check_memory(TILE_BYTES * prod(geometry.tile_grid), "the tiles of a selection", LabelIndexError)
        largest, _ = read_largest(self.index, self.expression.check(self.index.vocabulary), self._counter)
        hits = np.zeros(geometry.tile_grid, np.bool_)
        for start, stop, tiles in matching_tiles(self.index, self.expression, largest, self.mask, self._counter):
            hits[geometry.tiles_of(start, stop)] = tiles
        for chunk, tiles in self._rewritten.items():
            hits[geometry.tiles_of(chunk, [i + 1 for i in chunk])] = tiles
        return np.argwhere(hits & geometry.spread(self.mask))

    @property
    def straddling(self) -> Grid:
        """Whether the array ends within the tile, bool, for each of `tiles`: padding influenced its scores."""
        geometry, tiles = self.geometry, self.tiles
        result = np.zeros(len(tiles), np.bool_)
        check_memory(TILE_BYTES * sum(geometry.tile_grid), "where tiles start", LabelIndexError)
        for number in (geometry.axes.y, geometry.axes.x):
            result |= geometry.straddles(number)[tiles[:, number]]
        return result

    @property
    def by_tiles(self) -> bool:
        """Whether `regions` and tables are of the label tiles that satisfy the expression, not of the chunks."""
        return self._by_tiles

    @property
    def details(self) -> dict[str, NDArray[Any]]:
        """More columns of `to_table`: what led to the selection of each region."""
        return {}

    @property
    def rewritten(self) -> list[Index]:
        """Positions of chunks that were written again after they were indexed, and were judged by their headers."""
        return list(self._rewritten)

    @property
    def cells(self) -> NDArray[np.int64]:
        """Positions of `regions`: `tiles` if `by_tiles`, otherwise `indices`."""
        return self.tiles if self._by_tiles else self.indices

    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Return the scores of the names in the expression, 0 to 1, float32 (regions,).

        Those of a chunk are the largest of its tiles. They come from the index; NaN means that the chunk was written
        again after it was indexed.
        """
        return table.scores(self)

    def to_table(self) -> dict[str, NDArray[Any]]:
        """Return a table of the regions: an array for each column, in the order of `regions`.

        Returns
        -------
        dict of str to ndarray
            `chunk`: position such as "0.3.0", text. `y_start`, `y_stop` and so on, for each dimension by its name:
            samples that the region covers, int64. `date`, where the array has a coordinate of times: that of the first
            slice, datetime64[s]. `label`: the class with the largest score, text, "" for none. `score_Forest` and so
            on: `scores`.
        """
        return table.columns(self) | self.details

    def to_pandas(self) -> "pandas.DataFrame":
        """Return `to_table` as a DataFrame of pandas; its method `to_xarray` makes a Dataset of xarray of it."""
        require("xarray", "pandas")
        import pandas

        return pandas.DataFrame(self.to_table())

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return (
            f"<Selection {self.expression}: {self.count} of {counted(self.mask.size, 'chunk')}, selected by reading "
            f"{self.bytes_read:,} bytes in {counted(self.requests, 'request')}"
            f"{'' if self.compared else ', ' + NOT_COMPARED}>"
        )

    def _repr_html_(self) -> str:
        axes = self.geometry.axes
        others = tuple(axis for axis in range(self.mask.ndim) if axis not in (axes.y, axes.x))
        chunks = self.mask.any(axis=others)  # along y and x
        chunks = chunks if axes.y < axes.x else chunks.T
        picture = html.enlarged(np.where(chunks, 255, 60).astype(np.uint8))
        count = f"{self.count:,} of {counted(self.mask.size, 'chunk')}{'' if self.compared else '; ' + NOT_COMPARED}"
        read = f"{self.bytes_read:,} bytes in {counted(self.requests, 'request')}"
        rows = {"selection": self.expression, "selected": count, "read": read, "thumbnails": THUMBNAILS}
        cells = self.cells[:COUNT]
        positions = cells // np.array(self.geometry.per_chunk) if self._by_tiles else cells
        indices = [*map(tuple, positions.tolist())]
        region_of = self.geometry.tile_region if self._by_tiles else self.geometry.chunk_region
        pictures = thumbnails(self.stored, indices, [region_of(cell) for cell in cells.tolist()])
        if unread := dict.fromkeys(chunk for chunk, one in zip(indices, pictures, strict=False) if one is None):
            names = ", ".join(".".join(map(str, chunk)) for chunk in unread)
            rows["not shown"] = f"{names}: missing, damaged, or of a model that is not installed"
        return html.table({**rows, **html.about(self.stored)}, picture, sheet=sheet(pictures))

    def iter_arrays(self) -> Iterator[Match]:
        """Fetch and decode the chunks, a few at a time.

        Yields
        ------
        Match
            `chunk`, its position; `region`, slices of the array; `array`, the pixels in it. Chunks that were
            written again after they were indexed are judged anew (unless `verify=None`) and left out, with a
            StaleIndexWarning, if they no longer satisfy the expression.

        Raises
        ------
        CorruptPayload
            If a chunk is damaged.
        StaleIndex
            If a chunk was written again and its new labels are not in its header.
        """
        for start in range(0, self.count, FETCH):
            yield from self.fetch(self.indices[start : start + FETCH])

    def fetch(self, indices: NDArray[np.int64], keep_all: bool = False) -> Iterator[Match]:
        """Fetch, verify and decode some of the chunks.

        Parameters
        ----------
        indices : ndarray
            Positions of the chunks, int64 (chunks, axes).
        keep_all : bool
            Raise StaleIndex for a chunk that no longer satisfies the expression, instead of leaving it out.
        """
        use_embedded(self.stored.array)  # not before: a query needs no model, and a model is megabytes
        reader = self.stored.reader
        payloads = dict(reader.payloads(indices.tolist()))
        if self._verify is not None:
            payloads = self._verified(payloads, indices, keep_all)
        to_decode = []
        for chunk, payload in payloads.items():
            if payload is None:
                raise StaleIndex(f"chunk {chunk} was deleted after it was indexed; {QUERY_AGAIN}")
            with reader.error_context(chunk):
                to_decode.append(self.stored.parse(payload))
        for (chunk, _), array in zip(payloads.items(), DECODER.submit(to_decode), strict=True):
            with reader.error_context(chunk):
                raise_first([array])
            region = self.geometry.chunk_region(chunk)
            yield Match(chunk, region, array[tuple(slice(part.stop - part.start) for part in region)])

    def _verified(
        self, payloads: dict[Index, bytes | None], indices: NDArray[np.int64], keep_all: bool
    ) -> dict[Index, bytes | None]:
        """Return the payloads of chunks that satisfy the expression as they are now."""
        attributes = Attributes(self.stored)
        matching: dict[Index, bytes | None] = {}
        source, crc = self.index.entries(indices)
        for (chunk, payload), *entry in zip(payloads.items(), source.tolist(), crc.tolist(), strict=True):
            start = None
            if payload is not None:
                with self.stored.reader.error_context(chunk):
                    start = PayloadStart.of(payload)
            if is_current(start, *entry) or self._still_matches(attributes, chunk, start):
                matching[chunk] = payload
                continue
            message = f"chunk {chunk} was written again after it was indexed, and {self._lost}"
            if keep_all:
                raise StaleIndex(f"{message}; {QUERY_AGAIN}")
            warnings.warn(message, StaleIndexWarning, stacklevel=4)
        return matching

    def _still_matches(self, attributes: Attributes, chunk: Index, start: PayloadStart | None) -> bool:
        """Tell whether a chunk that was written again satisfies the expression."""
        return bool(judge_chunk(attributes, self.index, self.expression, chunk, start).any())

    @property
    def _lost(self) -> str:
        """What to say of a chunk that does not."""
        return f"no longer shows {self.expression}"

    def to_dask(self) -> "dask.array.Array":
        """Return the chunks as a Dask array (number of chunks, *shape of a chunk), decoded when it is computed.

        Samples of an edge chunk that lie outside of the array hold the fill value. A chunk that was written again
        and no longer satisfies the expression raises StaleIndex when it is computed (unless `verify=None`).
        """
        require("dask", "dask")
        import dask.array

        source = _Stack(self)
        chunks = ((1,) * self.count or (0,), *((size,) for size in self.geometry.chunks))
        meta = np.zeros((), source.dtype)
        return dask.array.from_array(source, chunks=chunks, asarray=False, lock=False, name=False, meta=meta)

    def to_xarray(self) -> "xarray.DataArray":
        """Return `to_dask` with names: dimension "match" and those of the array; coordinates say where chunks start."""
        require("xarray", "xarray", "dask")
        import xarray

        names = self.stored.dimension_names
        starts = self.indices * np.array(self.geometry.chunks)
        coordinates = {f"{name}_start": ("match", starts[:, axis]) for axis, name in enumerate(names)}
        return xarray.DataArray(
            self.to_dask(), dims=("match", *names), coords=coordinates, attrs={"expression": str(self.expression)}
        )


class _Stack:
    """The selected chunks as an array that Dask slices."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.shape = (selection.count, *selection.geometry.chunks)
        self.ndim, self.dtype = len(self.shape), selection.stored.array.dtype

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        first, *rest = key
        single = isinstance(first, int | np.integer)  # Dask merges a slice of the result into this one
        indices = self._selection.indices[[first] if single else first]
        fill = self._selection.stored.fill_value
        stack = np.full((len(indices), *self.shape[1:]), fill, self.dtype)
        for chunk, match in zip(stack, self._selection.fetch(indices, keep_all=True), strict=True):
            chunk[tuple(slice(n) for n in match.array.shape)] = match.array
        return stack[(0 if single else slice(None), *rest)]


@dataclass(repr=False, eq=False)
class TileSelection(Selection):
    """A selection of label tiles that no condition on the scores of a tile describes: changes, tiles like another.

    It has what a `Selection` has. `iter_arrays` leaves out a chunk that was written again after it was indexed, with a
    StaleIndexWarning, unless `verify=None`.

    Attributes
    ----------
    tiles : ndarray
        Positions of the tiles, int64 (tiles, axes), the best ones first where they have an order.
    details : dict of str to ndarray
        Columns of `to_table`: what led to the selection of each tile.
    """

    _picked: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    _details: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        stored: StoredArray,
        index: LabelIndex,
        expression: Expression,
        tiles: NDArray[np.int64],
        details: Mapping[str, NDArray[Any]],
        counter: Counter,
        verify: Verify | None = "fetched",
        compared: bool = False,
    ) -> "TileSelection":
        """Return the selection of tiles at these positions."""
        mask = np.zeros(index.geometry.grid, np.bool_)
        mask[tuple((tiles // np.array(index.geometry.per_chunk)).T)] = True
        common = (stored, index, expression, mask, counter, True, verify)
        return cls(*common, compared=compared, _picked=tiles, _details=dict(details))

    @property
    def tiles(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Positions of the tiles, int64 (tiles, axes)."""
        return self._picked

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """Positions of the chunks that have them, int64 (chunks, axes), in the order of their first tiles."""
        chunks = self._picked // np.array(self.geometry.per_chunk)
        _, first = np.unique(chunks, axis=0, return_index=True)
        return chunks[np.sort(first)]

    @property
    def details(self) -> dict[str, NDArray[Any]]:
        """Columns of `to_table`: what led to the selection of each tile."""
        return self._details

    def _still_matches(self, attributes: Attributes, chunk: Index, start: PayloadStart | None) -> bool:
        return False

    @property
    def _lost(self) -> str:
        return f"may no longer show {self.expression}"
