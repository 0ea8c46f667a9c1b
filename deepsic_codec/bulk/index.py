"""The label index of what was just written: from the headers in memory, and those in the store for all other chunks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import zarr

from deepsic_codec.axes import Index
from deepsic_codec.errors import LabelIndexError
from deepsic_codec.labels import index_writer as consolidate
from deepsic_codec.labels.attributes import Attributes, Head, Reader
from deepsic_codec.labels.index import replace
from deepsic_codec.labels.vocabulary import of_head
from deepsic_codec.payload.header import read_header
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import Place


def index_place(array: zarr.Array, index: Any) -> Place | None:
    """Return where the index of an array goes, None for nowhere.

    Parameters
    ----------
    array : zarr.Array
        The array.
    index : bool, "auto" or location
        False for none; "auto" for a place beside the array if there can be one; True insists on that.

    Raises
    ------
    LabelIndexError
        If there is no such place, or it cannot be written to.
    """
    if index is False:
        return None
    try:
        return consolidate.place_for(array, None if index in (True, "auto") else index, None)
    except LabelIndexError:
        if isinstance(index, str) and index == "auto":
            return None
        raise


def write_index(array: zarr.Array, place: Place, heads: Mapping[Index, bytes]) -> None:
    """Write the index of an array, equal to the one that `consolidate_labels` makes.

    Parameters
    ----------
    array : zarr.Array
        The array.
    place : Place
        Where the index goes; one that is there stays valid until the new one is.
    heads : mapping of tuple of int to bytes
        Starts of the payloads, to the end of their labels, for chunks just written. Those of other chunks are read.
    """
    attributes = Attributes(array)
    attributes.reader = _Known(array, heads)
    config = attributes.reader.config
    geometry = Geometry.of(array, config.axes, config.label_tile)
    old = consolidate._old_index(place, True)
    if old is not None and (old.geometry.axes, old.geometry.chunks, old.geometry.tile) != (
        geometry.axes,
        geometry.chunks,
        geometry.tile,
    ):
        old = None
    vocabulary = of_head(array, *config.identity()) if old is None else old.vocabulary
    fill = consolidate._FromHeaders(attributes, geometry, vocabulary, old)
    replace(place, lambda to: consolidate.fill_index(array, to, geometry, vocabulary, fill))


class _Known(Reader):
    """A reader that does not go to the store for what is known."""

    def __init__(self, array: zarr.Array, heads: Mapping[Index, bytes]) -> None:
        super().__init__(array)
        self._known = heads

    def heads(self, indices: Iterable[Sequence[int]]) -> Iterator[tuple[Index, Head | None]]:
        places = [tuple(index) for index in indices]
        read = super().heads(place for place in places if place not in self._known)
        for place in places:
            data = self._known.get(place)
            yield next(read) if data is None else (place, Head(read_header(data), data))
