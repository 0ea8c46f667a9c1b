"""Ask an array what it shows: `open_labels`, queries, and what they select."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from deepsic_codec.axes import Index, Region, ceil_div
from deepsic_codec.codec.batching import raise_first
from deepsic_codec.codec.decode import DECODER, parse_payload
from deepsic_codec.errors import ConfigurationError, StaleIndex
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.expression import Expression, Name, parse
from deepsic_codec.labels.index import FEATURES, HEADER, MISSING, SOURCES, LabelIndex
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.geometry import Geometry, any_of
from deepsic_codec.stored.location import Counter, IndexLocation, parent_and_name
from deepsic_codec.stored.reader import PayloadStart

if TYPE_CHECKING:
    import dask.array
    import xarray

Verify = Literal["fetched", "all"]
Grid = NDArray[np.bool_]
LARGE = 0.5  # score from which a summary counts a chunk as showing a class
FETCH = 32  # chunks fetched and decoded together
BLOCKS = 16  # blocks of tile scores in memory at a time


class StaleIndexWarning(UserWarning):
    """A chunk was written again since it was indexed, and no longer shows what was asked for."""


class Match(NamedTuple):
    """A chunk that a query found, decoded."""

    chunk: Index
    region: Region
    array: NDArray[Any]


class Labels:
    """The labels of an array, and how to ask for them. Made by `open_labels`.

    ``labels.where("Forest > 0.6 & ~Water")`` selects chunks, as does
    ``labels.where((labels["Forest"] > 0.6) & ~labels["Water"])``.

    Attributes
    ----------
    array : zarr.Array
        The array.
    index : LabelIndex
        Its index, in memory after a scan.
    vocabulary : Vocabulary
        Names that expressions can use.
    bytes_read, requests : int
        What it took to open the index, or to scan the headers.
    """

    def __init__(self, stored: StoredArray, index: LabelIndex, counter: Counter | None = None) -> None:
        # The tile comes from the index: it was made from what the chunks say, which is what the codec was told.
        geometry = Geometry.of(stored.array, stored.axes, index.geometry.tile)
        index.check(parent_and_name(stored.array.store_path)[1], stored.decoder, geometry)
        self.stored, self.array, self.index = stored, stored.array, index
        self.vocabulary = index.vocabulary
        self.geometry = index.geometry
        self._opened = counter or Counter()

    @property
    def bytes_read(self) -> int:
        """Bytes read to open the index, or to scan the headers."""
        return self._opened.bytes

    @property
    def requests(self) -> int:
        """Requests made for them."""
        return self._opened.requests

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in self.index.counts.items() if number)
        return (
            f"<Labels of {self.array.store_path}: chunks {self.geometry.grid} ({counts}), tiles of "
            f"{self.geometry.tile[0]}x{self.geometry.tile[1]}, {', '.join(self.vocabulary.known)}>"
        )

    def __getitem__(self, name: str) -> Name:
        """Return the score of a class or parent, to be compared and combined with `&`, `|`, `~`."""
        self.vocabulary.members(name)
        return Name(name)

    def where(
        self, expression: str | Expression, *, tiles: bool = False, verify: Verify | None = "fetched"
    ) -> "Selection":
        """Select the chunks of which one tile at least satisfies an expression. Nothing is decoded.

        Parameters
        ----------
        expression : str or Expression
            For instance ``"Forest > 0.6 & ~Water"``; a name alone means a score of at least 0.5. `docs/labels.md` has
            the grammar.
        tiles : bool
            Whether `regions` are to be those of the tiles instead of the chunks.
        verify : {"fetched", "all", None}
            What to compare with the chunks' headers: those that are fetched, when they are; all, now, which also finds
            chunks that a stale index missed; or none.

        Raises
        ------
        ExpressionError
            If the expression cannot be read or names a class that there is not.
        StaleIndex
            With `verify="all"`, if a chunk was written again and its new labels are not in its header.
        """
        if verify not in (None, "fetched", "all"):
            raise ConfigurationError(f"verify: expected None, 'fetched' or 'all', got {verify!r}")
        text = expression if isinstance(expression, str) else None
        parsed = expression if isinstance(expression, Expression) else parse(expression)
        names = parsed.check(self.vocabulary, text)
        counter = Counter()
        mask = self._evaluate(parsed, names, counter)
        fresh = self._rescan(parsed, mask, counter) if verify == "all" else {}
        return Selection(self, parsed, mask, counter, tiles, verify, fresh)

    def _columns(self, names: Sequence[str], counter: Counter) -> tuple[dict[str, NDArray[np.uint8]], Grid]:
        """Read the largest scores of names in all chunks, and which of these have labels."""
        wanted: list[Any] = [(self.index.scores, (self.vocabulary.row(name),)) for name in names]
        *columns, source = self.index.read([*wanted, (self.index.source, (...,))], counter)
        return dict(zip(names, columns, strict=True)), (source == HEADER) | (source == FEATURES)

    def _evaluate(self, expression: Expression, names: list[str], counter: Counter) -> Grid:
        largest, labelled = self._columns(names, counter)
        if self.geometry.one_tile:
            return expression.tiles(largest.__getitem__) & labelled
        verdict = expression.chunks(largest.__getitem__)
        hits = verdict.any_tile & labelled
        undecided = verdict.possible & labelled & ~hits
        if undecided.any():
            for start, stop, found in self._tiles(expression, largest, undecided, counter):
                region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
                hits[region] |= self.geometry.any_tile(found) & undecided[region]
        return hits

    def _tiles(
        self, expression: Expression, largest: Mapping[str, NDArray[np.uint8]], chunks: Grid, counter: Counter
    ) -> Iterator[tuple[Index, Index, Grid]]:
        """Evaluate the tiles of blocks that have one of `chunks`: first chunk, one past the last, tiles."""
        unit = self.index.tile_unit
        rows = np.argwhere(any_of(chunks, unit))
        for group in np.array_split(rows, ceil_div(len(rows), BLOCKS)):
            blocks, wanted = [], []
            for row in group.tolist():
                start = tuple(i * n for i, n in zip(row, unit, strict=True))
                stop = tuple(min(a + n, size) for a, n, size in zip(start, unit, chunks.shape, strict=True))
                region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
                # A class that none of the chunks in question has scores 0 in all their tiles: not worth a request.
                present = [name for name, column in largest.items() if column[region][chunks[region]].any()]
                tiles = self.geometry.tiles_of(start, stop)
                blocks.append((start, stop, present, tuple(part.stop - part.start for part in tiles)))
                wanted += [(self.index.tile_scores, (self.vocabulary.row(name), *tiles)) for name in present]
            values = iter(self.index.read(wanted, counter) if wanted else [])
            for start, stop, present, shape in blocks:
                scores = dict.fromkeys(largest, np.zeros(shape, np.uint8))
                scores |= {name: next(values) for name in present}
                found = expression.tiles(scores.__getitem__)
                yield start, stop, found

    def _rescan(self, expression: Expression, mask: Grid, counter: Counter) -> dict[Index, Grid]:
        """Correct `mask` for chunks that were written again; returns which of their tiles satisfy the expression."""
        everything = np.argwhere(np.ones(mask.shape, np.bool_))
        source, crc = self.index.entries(everything, counter)
        attributes = Attributes(self.stored.counting(counter))
        fresh: dict[Index, Grid] = {}
        entries = zip(source.tolist(), crc.tolist(), strict=True)
        for (index, head), entry in zip(attributes.stored.reader.starts(self.stored.indices()), entries, strict=True):
            if is_current(head, *entry):
                continue
            fresh[index] = self._judge(attributes, expression, index, head)
            mask[index] = fresh[index].any()
        return fresh

    def _judge(self, attributes: Attributes, expression: Expression, index: Index, head: PayloadStart | None) -> Grid:
        """Evaluate the tiles of a chunk that was written again, from its header."""
        inside = self.geometry.tiles_of(index, [i + 1 for i in index])
        if head is None:
            return np.zeros(tuple(part.stop - part.start for part in inside), np.bool_)
        with attributes.stored.reader.error_context(index):
            block = head.labels()
        names = self.vocabulary.names
        if block is None or block.tile != self.geometry.tile or attributes.vocabulary(head.header).names != names:
            raise StaleIndex(
                f"chunk {index} of array {self.array.path!r} was written again since it was indexed, and its labels "
                "are not in its header; run consolidate_labels, or relabel if labels come from features"
            )
        scores = self.geometry.arrange(block.dense(len(names)), index)
        return expression.tiles(lambda name: self.vocabulary.score(name, scores.__getitem__))

    def summary(self) -> dict[str, Any]:
        """Count what the archive shows, from the index.

        Returns
        -------
        dict
            `chunks`, their number; `missing`, `header`, `features`, `unlabelled`, how many of them have no data,
            labels from their header, labels from features, data without labels; `classes`, for each class and parent
            the number of chunks in which a tile scores 0.5 at least.
        """
        names = self.vocabulary.known
        wanted: list[Any] = [(self.index.scores, (row,)) for row in range(len(names))]
        *columns, source = self.index.read([*wanted, (self.index.source, (...,))])
        labelled = (source == HEADER) | (source == FEATURES)
        least = -int(-LARGE * 255 // 1)
        shown = {name: int(((s >= least) & labelled).sum()) for name, s in zip(names, columns, strict=True)}
        counts = np.bincount(source.ravel(), minlength=len(SOURCES)).tolist()
        return {"chunks": int(source.size), **dict(zip(SOURCES, counts, strict=True)), "classes": shown}

    def map(self, name: str) -> NDArray[np.float32]:
        """Return the score of a class or parent in every label tile.

        Returns
        -------
        ndarray
            float32, one value from 0 to 1 per tile along each axis of the array, NaN where there is no label; without
            the axis of channels, unless chunks part it.
        """
        self.vocabulary.members(name)  # or it says what is near
        wanted: list[Any] = [(self.index.tile_scores, (self.vocabulary.row(name),)), (self.index.source, (...,))]
        scores, source = self.index.read(wanted)
        labelled = self.geometry.spread((source == HEADER) | (source == FEATURES))
        values = np.where(labelled, scores / np.float32(255), np.float32(np.nan)).astype(np.float32)
        channel = self.geometry.axes.c
        return values.squeeze(channel) if channel is not None and values.shape[channel] == 1 else values


def is_current(head: PayloadStart | None, source: int, crc: int) -> bool:
    """Tell whether an entry of the index was made from the chunk as it is now."""
    return source == MISSING if head is None else source != MISSING and head.crc == crc


@dataclass(repr=False, eq=False)
class Selection:
    """What a query found. Pixels are fetched and decoded only when they are asked for.

    Attributes
    ----------
    labels : Labels
        What was asked.
    expression : Expression
        The question.
    mask : ndarray
        bool, the grid of chunks.
    """

    labels: Labels
    expression: Expression
    mask: Grid
    _counter: Counter
    _tiles: bool = False
    _verify: Verify | None = "fetched"
    _fresh: dict[Index, Grid] = field(default_factory=dict)

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
        geometry = self.labels.geometry
        if self._tiles:
            return [geometry.tile_region(tile) for tile in self.tiles.tolist()]
        return [geometry.chunk_region(chunk) for chunk in self.chunks]

    @cached_property
    def tiles(self) -> NDArray[np.int64]:
        """Positions in the grid of label tiles of those that satisfy the expression, int64 (tiles, axes)."""
        if not self.count:
            return np.zeros((0, self.mask.ndim), np.int64)
        labels, geometry = self.labels, self.labels.geometry
        if geometry.one_tile:
            return self.indices
        largest, _ = labels._columns(self.expression.check(labels.vocabulary), self._counter)
        found = np.zeros(geometry.tile_grid, np.bool_)
        for start, stop, tiles in labels._tiles(self.expression, largest, self.mask, self._counter):
            found[geometry.tiles_of(start, stop)] = tiles
        for index, tiles in self._fresh.items():
            found[geometry.tiles_of(index, [i + 1 for i in index])] = tiles
        return np.argwhere(found & geometry.spread(self.mask))

    @property
    def straddling(self) -> Grid:
        """Whether the array ends within the tile, bool, for each of `tiles`: padding had a say in its scores."""
        geometry, tiles = self.labels.geometry, self.tiles
        result = np.zeros(len(tiles), np.bool_)
        for number in (geometry.axes.y, geometry.axes.x):
            result |= geometry.straddles(number)[tiles[:, number]]
        return result

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return (
            f"<Selection {self.expression}: {self.count} of {self.mask.size} chunks, found by reading "
            f"{self.bytes_read:,} bytes in {self.requests} requests>"
        )

    def iter_arrays(self) -> Iterator[Match]:
        """Fetch and decode the chunks, a few at a time.

        Yields
        ------
        Match
            `chunk`, its position; `region`, slices of the array; `array`, the pixels in it. Chunks that were
            written again since they were indexed are judged anew (unless `verify=None`) and left out, with a
            StaleIndexWarning, if they no longer satisfy the expression.

        Raises
        ------
        CorruptPayload
            If a chunk is damaged.
        StaleIndex
            If a chunk was written again and its new labels are not in its header.
        """
        for start in range(0, self.count, FETCH):
            yield from self._fetch(self.indices[start : start + FETCH])

    def _fetch(self, indices: NDArray[np.int64], keep: bool = False) -> Iterator[Match]:
        """Fetch, verify and decode; a chunk that no longer matches is left out, or with `keep` an error."""
        labels = self.labels
        embedded.use_embedded(labels.array)  # not before: a query needs no model, and one is megabytes
        attributes, reader = Attributes(labels.stored), labels.stored.reader
        payloads = dict(reader.payloads(indices.tolist()))
        if self._verify is not None:
            self._verify_payloads(attributes, payloads, indices, keep)
        jobs = []
        for index, payload in payloads.items():
            with reader.error_context(index):
                jobs.append(parse_payload(payload, labels.geometry.chunks))
        for (index, _), array in zip(payloads.items(), DECODER.submit(jobs), strict=True):
            with reader.error_context(index):
                raise_first([array])
            region = labels.geometry.chunk_region(index)
            yield Match(index, region, array[tuple(slice(part.stop - part.start) for part in region)])

    def _verify_payloads(
        self, attributes: Attributes, payloads: dict[Index, Any], indices: NDArray[np.int64], keep: bool
    ) -> None:
        source, crc = self.labels.index.entries(indices)
        for index, *entry in zip(list(payloads), source.tolist(), crc.tolist(), strict=True):
            payload, head = payloads[index], None
            if payload is not None:
                with attributes.stored.reader.error_context(index):
                    head = PayloadStart.of(payload)
            if is_current(head, *entry):
                continue
            if not self.labels._judge(attributes, self.expression, index, head).any():
                message = f"chunk {index} was written again since it was indexed, and no longer shows {self.expression}"
                if keep:
                    raise StaleIndex(f"{message}; run consolidate_labels and query again")
                warnings.warn(message, StaleIndexWarning, stacklevel=4)
                del payloads[index]

    def to_dask(self) -> "dask.array.Array":
        """Return the chunks as a Dask array (chunks found, *shape of a chunk), decoded when it is computed.

        What lies outside of the array, in chunks at its edge, holds the fill value. A chunk that was written again
        and no longer satisfies the expression raises StaleIndex when it is computed (unless `verify=None`).
        """
        import dask.array

        source = _Stack(self)
        chunks = ((1,) * self.count or (0,), *((size,) for size in self.labels.geometry.chunks))
        meta = np.zeros((), source.dtype)
        return dask.array.from_array(source, chunks=chunks, asarray=False, lock=False, name=False, meta=meta)

    def to_xarray(self) -> "xarray.DataArray":
        """Return `to_dask` with names: dimension "match" and those of the array; coordinates say where chunks start."""
        import xarray

        names = self.labels.stored.dimension_names
        starts = self.indices * np.array(self.labels.geometry.chunks)
        coordinates = {f"{name}_start": ("match", starts[:, axis]) for axis, name in enumerate(names)}
        return xarray.DataArray(
            self.to_dask(), dims=("match", *names), coords=coordinates, attrs={"expression": str(self.expression)}
        )


class _Stack:
    """The chunks found as an array of which Dask takes parts."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.shape = (selection.count, *selection.labels.geometry.chunks)
        self.ndim, self.dtype = len(self.shape), selection.labels.array.dtype

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        first, *rest = key
        single = isinstance(first, int | np.integer)  # Dask merges a slice of the result into this one
        indices = self._selection.indices[[first] if single else first]
        fill = self._selection.labels.stored.fill_value
        stack = np.full((len(indices), *self.shape[1:]), fill, self.dtype)
        for place, match in zip(stack, self._selection._fetch(indices, keep=True), strict=True):
            place[tuple(slice(n) for n in match.array.shape)] = match.array
        return stack[(0 if single else slice(None), *rest)]


def open_labels(
    source: Any,
    name: str | None = None,
    *,
    index: Any = None,
    scan: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Labels:
    """Open the labels of an array, to ask what it shows.

    A model that is not installed here and is embedded in the archive is fetched when chunks that a query found are
    decoded, as `deepsic_codec.open_archive` fetches it: queries themselves need none.

    Parameters
    ----------
    source
        The array or a group that has it: a URL, path or store as `zarr.open` takes, or an array or group of Zarr.
    name : str, optional
        Path of the array in the group, needed if there is more than one stored with DeepSIC.
    index : optional
        Where the index is, if not beside the array: a group of Zarr, or what `zarr.open_group` takes.
    scan : bool
        Read the headers of all chunks instead of an index.
    storage_options : dict, optional
        For fsspec, if `source` or `index` is a URL.

    Raises
    ------
    LabelIndexError
        If there is no index, or it is damaged or that of another array.
    StaleIndex
        If the array has another shape than when it was indexed.
    UnsupportedArray
        If there is no such array.
    """
    counter = Counter()
    stored = StoredArray.open(source, name, options=storage_options, counter=counter)
    if scan:
        from deepsic_codec.labels.index_writer import write_index

        location = IndexLocation(MemoryStore(), "", 3)
        write_index(stored, location)
        return Labels(stored, LabelIndex(location), counter)
    if index is not None:
        location = IndexLocation.from_user(index, stored.array.metadata.zarr_format, storage_options)
    else:
        location = IndexLocation.sibling_of(stored.array)
    return Labels(stored, LabelIndex(location, counter), counter)
