"""Selections as tables: a row for each chunk or label tile, a column for each thing that the index says of it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import LabelIndexError
from deepsic_codec.payload.limits import check_memory
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.coordinates import times_of

if TYPE_CHECKING:
    from deepsic_codec.labels.selection import Selection

ROW_BYTES = 200  # of memory that a table takes for a row, about


def columns(selection: "Selection") -> dict[str, NDArray[Any]]:
    """Return the columns that `Selection.to_table` describes."""
    geometry, cells, stored = selection.geometry, selection.cells, selection.stored
    check_memory(ROW_BYTES * len(cells), "a table of a selection", LabelIndexError)
    chunks = chunks_of(selection)
    result: dict[str, NDArray[Any]] = {"chunk": np.array([".".join(map(str, row)) for row in chunks.tolist()], np.str_)}
    starts, stops = geometry.bounds(cells, tiles=selection.by_tiles)
    for axis, name in enumerate(stored.dimension_names):
        result[f"{name}_start"], result[f"{name}_stop"] = starts[:, axis], stops[:, axis]
    times = times_along(stored)
    if times is not None:
        result["date"] = times[starts[:, geometry.axes.index("t")]]
    result["label"] = best_labels(selection)
    return result | {f"score_{name}": values for name, values in selection.scores().items()}


def chunks_of(selection: "Selection") -> NDArray[np.int64]:
    """Return the chunk of each region, int64 (regions, axes)."""
    cells = selection.cells
    return cells // np.array(selection.geometry.per_chunk) if selection.by_tiles else cells


def times_along(stored: StoredArray) -> NDArray[np.datetime64] | None:
    """Return the time of each sample along axis t, datetime64[s]; None without a coordinate of times."""
    if "t" not in stored.axes:
        return None
    _, coordinates = stored.described
    return times_of(coordinates.get(stored.dimension_names[stored.axes.index("t")]))


def scores(selection: "Selection") -> dict[str, NDArray[np.float32]]:
    """Return the scores that `Selection.scores` describes."""
    names = selection.expression.check(selection.index.vocabulary)
    current = is_indexed(selection)
    return {
        name: np.where(current, values / np.float32(255), np.float32(np.nan))
        for name, values in zip(names, read_scores(selection, names), strict=True)
    }


def is_indexed(selection: "Selection") -> NDArray[np.bool_]:
    """Tell of each region whether the index describes its chunk as it was when it was selected, bool (regions,)."""
    chunks = chunks_of(selection)
    if not selection.rewritten:
        return np.ones(len(chunks), np.bool_)
    mask = np.ones(selection.mask.shape, np.bool_)
    mask[tuple(np.array(selection.rewritten).T)] = False
    return mask[tuple(chunks.T)]


def best_labels(selection: "Selection") -> NDArray[np.str_]:
    """Return the class with the largest score of each region, "" without labels."""
    names = selection.index.vocabulary.names
    best = np.zeros(len(selection.cells), np.uint8)
    number = np.full(len(best), len(names))
    for row, values in enumerate(read_scores(selection, names)):
        is_better = values > best
        best[is_better], number[is_better] = values[is_better], row
    number[~is_indexed(selection)] = len(names)
    return np.array([*names, ""])[number]


def read_scores(selection: "Selection", names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
    """Yield the scores of names in the regions, uint8 (regions,), one name after the other."""
    index, cells = selection.index, selection.cells
    array = index.tile_scores if selection.by_tiles else index.scores
    for name in names:
        yield index.values_at(array, (index.vocabulary.row(name),), cells)
