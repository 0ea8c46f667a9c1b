"""Find label tiles that showed one thing at a date and another at a later one, from the index alone."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError, LabelIndexError, UnsupportedArray
from deepsic_codec.labels.expression import Described, Expression
from deepsic_codec.labels.index import FEATURES, HEADER
from deepsic_codec.labels.selection import TileSelection
from deepsic_codec.labels.table import times_along
from deepsic_codec.payload.limits import check_memory
from deepsic_codec.stored.location import Counter

if TYPE_CHECKING:
    from deepsic_codec.labels.query import Labels

BYTES = 8  # of memory that finding changes takes for a tile of all dates, about
LISTED = 10  # dates that a message names


def find_changes(labels: "Labels", before: Expression, after: Expression, between: Any) -> TileSelection:
    """Return the tiles that `Labels.changes` describes."""
    geometry, index, stored = labels.geometry, labels.index, labels.stored
    if "t" not in geometry.axes:
        raise UnsupportedArray(f"array {stored.path!r} has no axis t, along which labels could change")
    axis = geometry.axes.index("t")
    times = times_along(stored)
    order = np.arange(geometry.shape[axis])
    if times is not None and not np.isnat(times).any():
        order = np.argsort(times, kind="stable")
    if between is not None:
        order = _positions(between, times, order)
    names = list(dict.fromkeys([*before.check(index.vocabulary), *after.check(index.vocabulary)]))
    shape = geometry.tile_grid
    check_memory((len(names) + BYTES) * int(np.prod(shape)), "finding changes", LabelIndexError)
    counter = Counter()
    parts: list[Any] = [(index.tile_scores, (index.vocabulary.row(name),)) for name in names]
    *columns, source = index.read([*parts, (index.source, (...,))], counter)
    labelled = np.moveaxis(geometry.spread((source == HEADER) | (source == FEATURES)), axis, 0)
    scores = {name: np.moveaxis(column, axis, 0) for name, column in zip(names, columns, strict=True)}
    # When a tile was last labelled, and whether it showed `before` then.
    previous = np.full(labelled.shape[1:], -1)
    showed = np.zeros(labelled.shape[1:], np.bool_)
    tiles, earlier = [], []
    for position in order.tolist():
        plane = {name: values[position] for name, values in scores.items()}
        now = labelled[position]
        changed = np.argwhere(now & showed & after.tiles(plane.__getitem__))
        tiles.append(np.insert(changed, axis, position, axis=1))
        earlier.append(previous[tuple(changed.T)])
        showed = np.where(now, before.tiles(plane.__getitem__), showed)
        previous = np.where(now, position, previous)
    details: dict[str, NDArray[Any]] = {"t_before": np.concatenate(earlier)}
    if times is not None:
        details["date_before"] = times[details["t_before"]]
    text = Described(f"{before}, then {after}", (before, after))
    return TileSelection.of(stored, index, text, np.concatenate(tiles), details, counter, compared=labels.compared)


def _positions(between: Any, times: NDArray[np.datetime64] | None, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return two positions along axis t, the earlier one first."""
    try:
        first, last = between
    except (TypeError, ValueError):
        raise ConfigurationError(f"between: expected two dates or positions along axis t, got {between!r}") from None
    result = []
    for text, which in ((first, 0), (last, -1)):
        if isinstance(text, int | np.integer) and not isinstance(text, bool):
            if not -len(order) <= text < len(order):
                raise ConfigurationError(f"between: positions along axis t are 0 to {len(order) - 1}, got {text}")
            result.append(int(np.arange(len(order))[text]))
            continue
        if times is None:
            raise ConfigurationError("between: the array has no coordinate of times; pass two positions along axis t")
        date = text.isoformat() if hasattr(text, "isoformat") else str(text)
        matching = [position for position in order.tolist() if str(times[position]).startswith(date)]
        if not matching:
            dates = ", ".join(str(times[position]) for position in order[:LISTED].tolist())
            more = ", ..." if len(order) > LISTED else ""
            raise ConfigurationError(f"between: no date begins with {date!r}; the array has {dates}{more}")
        result.append(matching[which])
    rank = {position: number for number, position in enumerate(order.tolist())}
    if rank[result[0]] >= rank[result[1]]:
        raise ConfigurationError(f"between: expected the earlier date first, got {first!r} and {last!r}")
    return np.array(result)
