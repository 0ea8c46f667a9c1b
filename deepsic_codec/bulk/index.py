"""The label index of an array that was just written, from payload starts in memory and in the store."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from deepsic_codec.axes import Index
from deepsic_codec.errors import LabelIndexError
from deepsic_codec.labels import index_writer
from deepsic_codec.labels.consolidate import location_for, update_index
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import IndexLocation
from deepsic_codec.stored.reader import PayloadStart


def index_location(stored: StoredArray, index: Any) -> IndexLocation | None:
    """Return where the index of an array goes, None for nowhere; `index` is that of `deepsic_codec.dask.store`.

    Raises
    ------
    LabelIndexError
        If there is no such location, or it cannot be written to.
    """
    if index is False:
        return None
    try:
        return location_for(stored.array, None if index in (True, "auto") else index, None)
    except LabelIndexError:
        if isinstance(index, str) and index == "auto":
            return None
        raise


def mark_outdated(stored: StoredArray, location: IndexLocation | None) -> None:
    """Note in the index at a location, None for beside the array, that chunks are being written."""
    with suppress(LabelIndexError):  # for an array that can have none beside it
        index_writer.mark_outdated(location or IndexLocation.sibling_of(stored.array))


def write_index(stored: StoredArray, location: IndexLocation, starts: Mapping[Index, bytes]) -> None:
    """Write the index of an array, equal to the one that `consolidate_labels` makes.

    `starts` are those of payloads just written, as `PayloadStart.trim` has them. Those of other chunks are read. An
    earlier index stays valid until the new one is.
    """

    def all_starts(indices: Iterable[Sequence[int]]) -> Iterator[tuple[Index, PayloadStart | None]]:
        positions = [tuple(index) for index in indices]
        missing = (index for index in positions if index not in starts)
        read = stored.reader.starts(missing, vectors=stored.params.embedding)
        for index in positions:
            data = starts.get(index)
            yield next(read) if data is None else (index, PayloadStart.of_trimmed(data))

    update_index(stored, location, starts=all_starts)
