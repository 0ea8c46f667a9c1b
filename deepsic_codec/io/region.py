"""Parts of arrays in the words of users: `t=3`, `y=0:512`, by the letter of an axis or the name of its dimension."""

from collections.abc import Mapping, Sequence

import zarr

from deepsic_codec.axes import Region
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.stored.array import dimension_names

Part = slice | int


def parse_parts(texts: Sequence[str]) -> dict[str, Part]:
    """Parse texts such as "axis=number" and "axis=start:stop".

    Returns
    -------
    dict of str to slice or int
        Parts by axis.

    Raises
    ------
    ValueError
        For any other text, or an axis that occurs twice.
    """
    parts: dict[str, Part] = {}
    for text in texts:
        axis, _, value = text.partition("=")
        try:
            if not axis or axis in parts:
                raise ValueError
            if ":" in value:
                start, stop = (int(end) if end.strip() else None for end in value.split(":"))
                parts[axis] = slice(start, stop)
            else:
                parts[axis] = int(value)
        except ValueError:
            raise ValueError(f"expected axis=number or axis=start:stop, each axis once, got {text!r}") from None
    return parts


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
    raise ConfigurationError(f"no axis {name!r}: the axes of this array are {', '.join(names)}")
