"""Open the labels of an array."""

from collections.abc import Mapping
from typing import Any, Literal

import zarr
from zarr.storage import MemoryStore, StorePath

from deepsic_codec.labels.consolidate import update_index
from deepsic_codec.labels.index import LabelIndex
from deepsic_codec.labels.query import Labels
from deepsic_codec.progress import Progress
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import Counter, IndexLocation, remote_errors


def open_labels(
    source: Any,
    name: str | None = None,
    *,
    index: Any = None,
    scan: bool = False,
    mode: Literal["r", "r+"] = "r",
    progress: Progress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Labels:
    """Open the labels of an array for queries.

    Queries need no model. When selected chunks are decoded, a model that is embedded in the archive and not installed
    is fetched, as `deepsic_codec.open_archive` does.

    Parameters
    ----------
    source
        The array or a group that has it: a URL, path or store as `zarr.open` takes, or an array or group of Zarr.
    name : str, optional
        Path of the array in the group, needed if there is more than one stored with DeepSIC.
    index : optional
        Location of the index, if it is not beside the array: a Zarr group, or an argument of `zarr.open_group`.
    scan : bool
        Read the headers of all chunks instead of an index.
    mode : {"r", "r+"}
        "r+" to write learned labels (`Labels.learn`) to the index.
    progress : callable, optional
        With `scan`, called with the number of chunks done and of all chunks.
    storage_options : dict, optional
        For fsspec, if `source` or `index` is a URL.

    Raises
    ------
    LabelIndexError
        If there is no index, or it is damaged or that of another array.
    StaleIndex
        If the array has another shape than when it was indexed, or was replaced by another.
    UnsupportedArray
        If there is no such array.
    """
    counter = Counter()
    stored = StoredArray.open(source, name, mode=mode, options=storage_options, counter=counter)
    if scan:
        location = IndexLocation(MemoryStore(), "", 3)
        update_index(stored, location, keep=False, progress=progress)
        return Labels(stored, LabelIndex(location), counter, compared=True)
    if index is not None:
        location = IndexLocation.from_user(
            index, stored.array.metadata.zarr_format, storage_options, write=mode == "r+"
        )
    else:
        location = IndexLocation.sibling_of(stored.array)
    with remote_errors(StorePath(location.store, location.path)):
        labels = LabelIndex(location, counter)
    return Labels(stored, labels, counter, fresh=isinstance(source, zarr.Array))
