"""Evaluate an expression: on the label index, and on the headers of chunks that were written again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index, ceil_div
from deepsic_codec.errors import LabelIndexError, StaleIndex
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.expression import Expression
from deepsic_codec.labels.index import FEATURES, HEADER, MISSING, LabelIndex, to_region
from deepsic_codec.payload.limits import check_count
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.geometry import any_of
from deepsic_codec.stored.location import Counter
from deepsic_codec.stored.reader import PayloadStart

Grid = NDArray[np.bool_]
COMPARED = 1 << 16  # chunks that are compared with the index at a time
BLOCKS = 16  # blocks of tile scores in memory at a time


def read_largest(
    index: LabelIndex, names: Sequence[str], counter: Counter | None = None
) -> tuple[dict[str, NDArray[np.uint8]], Grid]:
    """Read the largest scores of names in all chunks, and which chunks have labels."""
    parts: list[Any] = [(index.scores, (index.vocabulary.row(name),)) for name in names]
    *columns, source = index.read([*parts, (index.source, (...,))], counter)
    return dict(zip(names, columns, strict=True)), (source == HEADER) | (source == FEATURES)


def matching_chunks(index: LabelIndex, expression: Expression, counter: Counter) -> Grid:
    """Return which chunks have a tile that satisfies an expression, bool of the grid of chunks."""
    geometry = index.geometry
    largest, labelled = read_largest(index, expression.check(index.vocabulary), counter)
    if geometry.one_tile:
        return expression.tiles(largest.__getitem__) & labelled
    verdict = expression.chunks(largest.__getitem__)
    hits = verdict.any_tile & labelled
    undecided = verdict.possible & labelled & ~hits
    if undecided.any():
        for start, stop, tiles in matching_tiles(index, expression, largest, undecided, counter):
            region = to_region(start, stop)
            hits[region] |= geometry.any_tile(tiles) & undecided[region]
    return hits


def matching_tiles(
    index: LabelIndex,
    expression: Expression,
    largest: Mapping[str, NDArray[np.uint8]],
    chunks: Grid,
    counter: Counter,
) -> Iterator[tuple[Index, Index, Grid]]:
    """Evaluate the tiles of those blocks of the index that have one of some chunks.

    Parameters
    ----------
    index : LabelIndex
        The index.
    expression : Expression
        The condition.
    largest : mapping of str to ndarray
        Largest scores of its names, from `read_largest`.
    chunks : ndarray
        bool, the grid of chunks: True for the chunks in question.
    counter : Counter
        Counts reads.

    Yields
    ------
    (tuple of int, tuple of int, ndarray)
        First chunk of a block, one past its last, and which of its tiles satisfy the expression.
    """
    unit = index.tile_unit
    rows = np.argwhere(any_of(chunks, unit))
    for group in np.array_split(rows, ceil_div(len(rows), BLOCKS)):
        blocks, parts = [], []
        for row in group.tolist():
            start = tuple(i * n for i, n in zip(row, unit, strict=True))
            stop = tuple(min(a + n, size) for a, n, size in zip(start, unit, chunks.shape, strict=True))
            region = to_region(start, stop)
            # A class that none of the chunks in question has scores 0 in all their tiles: not worth a request.
            present = [name for name, column in largest.items() if column[region][chunks[region]].any()]
            tiles = index.geometry.tiles_of(start, stop)
            blocks.append((start, stop, present, tuple(part.stop - part.start for part in tiles)))
            parts += [(index.tile_scores, (index.vocabulary.row(name), *tiles)) for name in present]
        values = iter(index.read(parts, counter) if parts else [])
        for start, stop, present, shape in blocks:
            scores = dict.fromkeys(largest, np.zeros(shape, np.uint8))
            scores |= {name: next(values) for name in present}
            yield start, stop, expression.tiles(scores.__getitem__)


def judge_chunk(
    attributes: Attributes, index: LabelIndex, expression: Expression, position: Index, start: PayloadStart | None
) -> Grid:
    """Evaluate the tiles of a chunk that was written again after it was indexed, from its header.

    Parameters
    ----------
    attributes : Attributes
        Reads vocabularies of the array.
    index : LabelIndex
        The index.
    expression : Expression
        The condition.
    position : tuple of int
        Position of the chunk.
    start : PayloadStart or None
        Start of its payload, None for a missing chunk.

    Returns
    -------
    ndarray
        bool, the tiles of the chunk.

    Raises
    ------
    StaleIndex
        If the labels of the chunk are not in its header.
    """
    geometry, names, stored = index.geometry, index.vocabulary.names, attributes.stored
    if start is None:
        tiles = geometry.tiles_of(position, [i + 1 for i in position])
        return np.zeros(tuple(part.stop - part.start for part in tiles), np.bool_)
    with stored.reader.error_context(position):
        block = start.labels()
    has_learned = not {name for name, _ in expression.names()}.isdisjoint(index.vocabulary.learned)
    is_other = block is None or block.tile != geometry.tile or attributes.vocabulary(start.header).names != names
    if block is None or is_other or has_learned:
        raise StaleIndex(
            f"chunk {position} of array {stored.path!r} was written again after it was indexed, and its labels "
            "are not in its header; run consolidate_labels, or relabel if labels come from features"
        )
    scores = geometry.arrange(block.dense(len(names)), position)
    return expression.tiles(lambda name: index.vocabulary.score(name, scores.__getitem__))


def compared(
    stored: StoredArray, index: LabelIndex, counter: Counter | None = None
) -> Iterator[tuple[Index, PayloadStart | None, bool]]:
    """Read all headers, a piece of the array at a time, and compare them with the index.

    Yields
    ------
    (tuple of int, PayloadStart or None, bool)
        Position and start of a chunk, and whether its entry was made from it.
    """
    grid, count = stored.grid, stored.geometry.count
    check_count(count, "comparing an index with the headers of all chunks", LabelIndexError)
    for first in range(0, count, COMPARED):
        numbers = np.arange(first, min(first + COMPARED, count))
        positions = np.stack(np.unravel_index(numbers, grid), axis=-1)
        source, crc = index.entries(positions, counter)
        starts = stored.reader.starts(map(tuple, positions.tolist()))
        for (position, start), *entry in zip(starts, source.tolist(), crc.tolist(), strict=True):
            yield position, start, is_current(start, *entry)


def rescan(
    stored: StoredArray, index: LabelIndex, expression: Expression, mask: Grid, counter: Counter
) -> dict[Index, Grid]:
    """Read all headers and correct `mask` for chunks that were written again.

    Returns
    -------
    dict of tuple of int to ndarray
        Which tiles of these chunks satisfy the expression, bool.
    """
    attributes = Attributes(stored.counting(counter))
    rewritten: dict[Index, Grid] = {}
    for position, start, current in compared(attributes.stored, index, counter):
        if not current:
            rewritten[position] = judge_chunk(attributes, index, expression, position, start)
            mask[position] = rewritten[position].any()
    return rewritten


def is_current(start: PayloadStart | None, source: int, crc: int) -> bool:
    """Tell whether an entry of the index was made from the chunk as it is now."""
    return source == MISSING if start is None else source != MISSING and start.crc == crc
