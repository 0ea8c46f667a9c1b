"""Query the labels of an array."""

import warnings
from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError, LabelIndexError
from deepsic_codec.labels import html, learned
from deepsic_codec.labels.changes import find_changes
from deepsic_codec.labels.colours import Colour, colours
from deepsic_codec.labels.embeddings import read_embeddings
from deepsic_codec.labels.evaluation import compared, matching_chunks, rescan
from deepsic_codec.labels.expression import Expression, Name, parse
from deepsic_codec.labels.index import BUFFER, FEATURES, HEADER, SOURCES, LabelIndex
from deepsic_codec.labels.learned_label import LearnedLabel
from deepsic_codec.labels.selection import Selection, StaleIndexWarning, TileSelection, Verify
from deepsic_codec.labels.similarity import find_similar
from deepsic_codec.labels.thumbnails import COUNT, thumbnails
from deepsic_codec.labels.vectors import TileVectors
from deepsic_codec.payload.limits import check_memory
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import Counter, parent_and_name, url_of

MAP_BYTES = 16  # of memory that a map takes for a tile, at most
MAX_SUMMARY = 1 << 20  # scores that a notebook reads to show labels
MAX_ROWS = 12  # classes that it lists
SUMMARY_SCORE = 0.5  # score from which on a summary counts a chunk for a class


class Labels:
    """The labels of an array. Made by `open_labels`.

    `labels.where("Forest > 0.6 & ~Water")` selects chunks, and so does
    `labels.where((labels["Forest"] > 0.6) & ~labels["Water"])`.

    Attributes
    ----------
    array : zarr.Array
        The array.
    index : LabelIndex
        Its label index, in memory after a scan.
    vocabulary : Vocabulary
        Names that expressions can use.
    compared : bool
        Whether the entries were just made from the headers of all chunks. Those of an index describe chunks as they
        were when they were indexed; `rewritten` compares them.
    bytes_read, requests : int
        Bytes and requests of opening the index, or of scanning the headers.
    """

    def __init__(
        self,
        stored: StoredArray,
        index: LabelIndex,
        counter: Counter | None = None,
        *,
        fresh: bool = False,
        compared: bool = False,
    ) -> None:
        # The tile size comes from the index, which was made from the labels in the chunks.
        geometry = Geometry.of(stored.array, stored.axes, index.geometry.tile)
        name = parent_and_name(stored.array.store_path)[1]
        # An array object that the caller has may be older than the array: `fresh` reads its metadata again.
        index.check(name, stored.decoder, geometry, stored.fingerprint(fresh=fresh))
        self.stored, self.array, self.index, self.compared = stored, stored.array, index, compared
        if index.outdated:
            warnings.warn(
                f"{index.location}: chunks were written since the index was made; run consolidate_labels, or query "
                "with verify='all'",
                StaleIndexWarning,
                stacklevel=3,
            )
        self.vocabulary = index.vocabulary
        self.geometry = index.geometry
        self._opened = counter or Counter()
        self._vectors: TileVectors | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes that were read to open the index, or to scan the headers."""
        return self._opened.bytes

    @property
    def requests(self) -> int:
        """Requests that were made to open the index, or to scan the headers."""
        return self._opened.requests

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in self.index.counts.items() if number)
        return (
            f"<Labels of {url_of(self.array.store_path)}: chunks {self.geometry.grid} ({counts}), tiles of "
            f"{self.geometry.tile[0]}x{self.geometry.tile[1]}, {', '.join(self.vocabulary.known)}>"
        )

    def _repr_html_(self) -> str:
        sources = ", ".join(f"{number:,} {name}" for name, number in self.index.counts.items() if number)
        tile = "{} x {} pixels".format(*self.geometry.tile)
        rows = {
            "labels": ", ".join(self.vocabulary.known),
            "of chunks": sources,
            "tiles": tile,
            **html.about(self.stored),
        }
        if len(self.vocabulary.known) * self.geometry.count > MAX_SUMMARY:
            return html.table(rows | {"chunks of each label": "summary() counts them"})
        classes = {name: number for name, number in self.summary()["classes"].items() if number}
        largest = sorted(classes, key=lambda name: -classes[name])[:MAX_ROWS]
        palette = colours(self.vocabulary.known)
        counts = {name: (classes[name], palette[name]) for name in largest}
        return html.table(rows, html.enlarged(self._class_map(palette)), counts, self._examples(largest[:COUNT]))

    def _examples(self, names: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
        """Return a picture of the chunk that scores best for each name."""
        if not names:
            return {}
        parts: list[Any] = [(self.index.scores, (self.vocabulary.row(name),)) for name in names]
        *columns, source = self.index.read([*parts, (self.index.source, (...,))])
        labelled = (source == HEADER) | (source == FEATURES)
        best = [np.unravel_index(int((scores * labelled).argmax()), source.shape) for scores in columns]
        chunks = [tuple(map(int, position)) for position in best]
        pictures = thumbnails(self.stored, chunks, [self.geometry.chunk_region(chunk) for chunk in chunks])
        return {name: one for name, one in zip(names, pictures, strict=False) if one is not None}

    def _class_map(self, palette: Mapping[str, Colour]) -> NDArray[np.uint8]:
        """Return the colour of the best class of each chunk along y and x, uint8 (rows, columns, 3), black without."""
        axes, names = self.geometry.axes, self.vocabulary.names
        at = tuple(slice(None) if axis in (axes.y, axes.x) else slice(1) for axis in range(len(axes)))
        scores, source = self.index.read([(self.index.scores, (slice(len(names)), *at)), (self.index.source, at)])
        best = np.where((source == HEADER) | (source == FEATURES), scores.argmax(axis=0), len(names))
        best[~scores.any(axis=0)] = len(names)
        best = best.squeeze(tuple(axis for axis in range(best.ndim) if axis not in (axes.y, axes.x)))
        result: NDArray[np.uint8] = np.array([*(palette[name] for name in names), (0, 0, 0)], np.uint8)[best]
        return result if axes.y < axes.x else result.swapaxes(0, 1)

    def __getitem__(self, name: str) -> Name:
        """Return the score of a class or parent, for comparisons that `&`, `|` and `~` combine."""
        self.vocabulary.members(name)
        return Name(name)

    def where(
        self, expression: str | Expression, *, tiles: bool = False, verify: Verify | None = "fetched"
    ) -> Selection:
        """Select the chunks with at least one tile that satisfies an expression. No chunk is decoded.

        Parameters
        ----------
        expression : str or Expression
            For instance `"Forest > 0.6 & ~Water"`. A name alone means a score of at least 0.5. `docs/labels.md` has
            the grammar.
        tiles : bool
            Make `regions` of the result those of the tiles instead of the chunks.
        verify : {"fetched", "all", None}
            Entries of the index to compare with the headers of the chunks: "fetched", those of chunks that are
            fetched; "all", now, which also selects chunks that a stale index misses; or none.

        Raises
        ------
        ExpressionError
            If the text is no expression or has the name of no class.
        StaleIndex
            With `verify="all"`, if a chunk was written again and its new labels are not in its header.
        """
        if verify not in (None, "fetched", "all"):
            raise ConfigurationError(f"verify: expected None, 'fetched' or 'all', got {verify!r}")
        parsed = self._parsed(expression)
        counter = Counter()
        mask = matching_chunks(self.index, parsed, counter)
        rewritten = rescan(self.stored, self.index, parsed, mask, counter) if verify == "all" else {}
        is_compared = self.compared or verify == "all"
        return Selection(self.stored, self.index, parsed, mask, counter, tiles, verify, rewritten, is_compared)

    def _parsed(self, expression: str | Expression) -> Expression:
        """Return an expression whose names all exist."""
        text = expression if isinstance(expression, str) else None
        parsed = expression if isinstance(expression, Expression) else parse(expression)
        parsed.check(self.vocabulary, text)
        return parsed

    def changes(
        self, before: str | Expression, after: str | Expression, *, between: tuple[Any, Any] | None = None
    ) -> TileSelection:
        """Find label tiles that showed one thing at a date and another at a later one. No chunk is decoded.

        Parameters
        ----------
        before, after : str or Expression
            Conditions on a tile at the earlier and at the later date, such as `"Forest"` and `"~Forest & ~unknown"`.
        between : (date, date), optional
            The earlier and the later date: positions along axis t, or the beginnings of dates in ISO 8601, such as
            "2019" and "2024-06" (the first date that begins so, and the last). By default, each date is compared with
            the last one before it at which the tile has labels.

        Returns
        -------
        TileSelection
            The tiles at the later dates. Its table has `t_before`, the position of the earlier date along axis t, and
            `date_before` if the array has a coordinate of times.

        Raises
        ------
        UnsupportedArray
            If the array has no axis t.
        ExpressionError
            If one of the conditions is no expression.
        ConfigurationError
            If there are no such dates.
        """
        return find_changes(self, self._parsed(before), self._parsed(after), between)

    def embeddings(self, *, compute: bool = False) -> NDArray[np.int8]:
        """Return the embeddings of all label tiles; takes the arguments of `read_embeddings`, and raises its errors."""
        return read_embeddings(self, compute=compute)

    def similar(
        self, to: Any, k: int = 100, *, where: str | Expression | None = None, compute: bool = False
    ) -> TileSelection:
        """Find the label tiles that show about the same as something else, by their embeddings. No chunk is decoded.

        The first call reads the embeddings of all tiles into memory, which the object keeps.

        Parameters
        ----------
        to
            What to look for: a chunk of the array, as its position (integers); a region, as slices, such as one of
            `regions` of a selection; a selection; or an image that is in no archive, uint8 (height, width, 1 or 3), for
            which the model has to be installed. Of several tiles, the mean of their directions counts.
        k : int
            Maximum number of tiles.
        where : str or Expression, optional
            Condition that they have to satisfy, too.
        compute : bool
            If the index has no embeddings and chunks store none, compute them from features or pixels, for this object.

        Returns
        -------
        TileSelection
            The most similar tiles, the best ones first, without those of `to`. Its table has `similarity`, the cosine
            of the angle between embeddings, -1 to 1.

        Raises
        ------
        LabelIndexError
            If there are no embeddings.
        ConfigurationError
            If `to` is none of these, outside of the array, of another array, or shows no data; if `k` is below 1.
        ModelNotFound
            If `to` is an image and the model with the head of the labels is not installed.
        """
        return find_similar(self, self.tile_vectors(compute), to, k, where)

    def tile_vectors(self, compute: bool = False) -> TileVectors:
        """Return the embeddings of all label tiles, which the object keeps in memory from now on."""
        if self._vectors is None:
            self._vectors = TileVectors(read_embeddings(self, compute=compute))
        return self._vectors

    def learn(self, name: str, like: Any, unlike: Any = (), *, around: int | None = None) -> LearnedLabel:
        """Learn a label from a few examples, and write it to the index. No chunk is decoded.

        From then on, expressions can use the name. The score of a tile is that of a logistic regression on the
        direction of its embedding, or on the mean direction of the tiles around it. What the label is not are the
        tiles of `unlike`, and tiles of the array drawn at random. Indexes that `consolidate_labels` makes later have
        the label, too, with the scores of new chunks.

        Parameters
        ----------
        name : str
            Name of the label: none of the vocabulary. One that was learned before is replaced.
        like, unlike : list
            Examples of it and of what it is not, each as `to` of `similar`. All tiles of a chunk or region are
            examples.
        around : int, optional
            Distance in tiles, along y and along x, up to which tiles of the same chunk count: 0 judges a tile alone,
            for things that are not larger; 1 judges it with the eight tiles around it, for places such as a harbour,
            which are larger than a tile. By default 0, 1 or 2, whichever does best in cross-validation; 0 if the
            examples are of fewer than four chunks.

        Returns
        -------
        LearnedLabel
            The label, with precision and recall by cross-validation.

        Raises
        ------
        LabelIndexError
            If the index has no embeddings, or cannot be written to.
        StaleIndex
            If the index was replaced since it was opened.
        ConfigurationError
            If examples are too few, contradict one another, are of another array or show no data, or for a name of the
            vocabulary.
        """
        return learned.learn(self, name, like, unlike, around)

    def forget(self, name: str) -> None:
        """Take a learned label out of the index; raises the errors of `learn`, and ExpressionError for another name."""
        learned.forget(self, name)

    def suggest(self, name: str, k: int = 20, *, where: str | Expression | None = None) -> TileSelection:
        """Return the tiles of which a learned label is least sure: the best examples to add, one way or the other.

        Parameters
        ----------
        name : str
            A learned label.
        k : int
            Maximum number of tiles.
        where : str or Expression, optional
            Condition that they have to satisfy, too.

        Returns
        -------
        TileSelection
            The tiles whose score is closest to 0.5 first, without examples. Its table has `score`.

        Raises
        ------
        ExpressionError
            If no label of this name was learned.
        ConfigurationError
            If `k` is below 1.
        """
        return learned.suggest(self, name, k, where)

    def use_index(self, index: LabelIndex) -> None:
        """Go on with another version of the index."""
        self.index, self.vocabulary, self.geometry = index, index.vocabulary, index.geometry

    def rewritten(self) -> NDArray[np.bool_]:
        """Read the headers of all chunks and compare them with the index.

        Returns
        -------
        ndarray
            bool, the grid of chunks: True for a chunk that is not the one that was indexed.
        """
        changed = np.zeros(self.stored.grid, np.bool_)
        for position, _, current in compared(self.stored, self.index):
            changed[position] = not current
        return changed

    def summary(self) -> dict[str, Any]:
        """Count the chunks of each class, from the index.

        Returns
        -------
        dict
            `chunks`: number of chunks. `missing`, `header`, `features`, `unlabelled`: numbers of chunks without data,
            with labels from their header, with labels from features, and with data but no labels. `classes`: for each
            class and parent the number of chunks in which a tile scores at least 0.5.
        """
        names, threshold = self.vocabulary.known, ceil(SUMMARY_SCORE * 255)
        rows = max(1, BUFFER // max(1, self.geometry.count))  # in memory at a time
        classes: dict[str, int] = {}
        source = labelled = np.zeros(0, np.uint8)
        for first in range(0, len(names), rows):
            parts: list[Any] = [(self.index.scores, (row,)) for row in range(first, min(first + rows, len(names)))]
            if first == 0:
                *columns, source = self.index.read([*parts, (self.index.source, (...,))])
                labelled = (source == HEADER) | (source == FEATURES)
            else:
                columns = self.index.read(parts)
            counts = (int(((scores >= threshold) & labelled).sum()) for scores in columns)
            classes |= zip(names[first : first + rows], counts, strict=True)
        sources = np.bincount(source.ravel(), minlength=len(SOURCES)).tolist()
        return {"chunks": int(source.size), **dict(zip(SOURCES, sources, strict=True)), "classes": classes}

    def map(self, name: str) -> NDArray[np.float32]:
        """Return the score of a class or parent in every label tile.

        Returns
        -------
        ndarray
            float32, one value from 0 to 1 per tile along each axis of the array, NaN where there is no label; without
            the axis of channels, unless chunks part it.
        """
        self.vocabulary.members(name)  # raises for an unknown name
        check_memory(MAP_BYTES * prod(self.geometry.tile_grid), f"a map of {name!r}", LabelIndexError)
        parts: list[Any] = [(self.index.tile_scores, (self.vocabulary.row(name),)), (self.index.source, (...,))]
        scores, source = self.index.read(parts)
        labelled = self.geometry.spread((source == HEADER) | (source == FEATURES))
        values = np.where(labelled, scores / np.float32(255), np.float32(np.nan)).astype(np.float32)
        channel = self.geometry.axes.c
        return values.squeeze(channel) if channel is not None and values.shape[channel] == 1 else values
