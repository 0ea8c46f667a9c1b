"""Parts of arrays, named by the letter of an axis or the name of its dimension, or selected by their labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import zarr

from deepsic_codec.axes import Region
from deepsic_codec.errors import ConfigurationError, LabelIndexError
from deepsic_codec.labels.open import open_labels
from deepsic_codec.labels.query import Labels
from deepsic_codec.labels.selection import Selection
from deepsic_codec.stored.array import dimension_names

Part = slice | int


def to_region(array: zarr.Array, axes: str, parts: Mapping[str, Part]) -> Region:
    """Return a slice for each axis of an array, the whole axis where `parts` does not name it.

    Raises
    ------
    ConfigurationError
        For an unknown axis, or a part that is empty or not within the array.
    """
    names = dimension_names(array, axes)
    region = [slice(0, size) for size in array.shape]
    for name, part in parts.items():
        axis = axis_number(name, axes, names)
        size = array.shape[axis]
        if isinstance(part, slice):
            start, stop, _ = part.indices(size)
        else:
            start = part + size if part < 0 else part
            stop = start + 1
        if not 0 <= start < stop <= size:
            text = f"{part.start}:{part.stop}" if isinstance(part, slice) else part
            raise ConfigurationError(f"{name}={text}: positions along axis {name} are 0 to {size - 1}")
        region[axis] = slice(start, stop)
    return tuple(region)


def axis_number(name: str, axes: str, names: Sequence[str]) -> int:
    """Return the number of an axis by its letter or name; raises ConfigurationError for an unknown one."""
    if name in names:
        return list(names).index(name)
    if len(name) == 1 and name in axes:
        return axes.index(name)
    raise ConfigurationError(f"no axis {name!r}; the axes of this array are {', '.join(names)}")


def open_index(array: zarr.Array, index: Any = None) -> Labels | None:
    """Open the label index of an array; without one beside the array, return None.

    Raises
    ------
    LabelIndexError
        If `index` is given and is no index of this array.
    """
    try:
        return open_labels(array, index=index)
    except LabelIndexError:
        if index is not None:
            raise
        return None


def select_chunks(array: zarr.Array, labels: Labels | None, where: str) -> Selection:
    """Return the chunks that satisfy an expression; without an index, read the headers of all chunks."""
    return (labels or open_labels(array, scan=True)).where(where)
