"""What users say of axes on a command line: `t=3`, `y=0:512`, by letter or by the name of the dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import zarr

from deepsic_codec.axes import Region
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.labels.query import dimension_names


def parse_parts(texts: Sequence[str]) -> dict[str, slice | int]:
    """Read `axis=number` and `axis=start:stop`.

    Raises
    ------
    ValueError
        For anything else.
    """
    parts: dict[str, slice | int] = {}
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


def to_region(array: zarr.Array, axes: str, parts: Mapping[str, slice | int]) -> Region:
    """Turn parts by axis into one slice for each axis of an array, whole where nothing is said.

    Raises
    ------
    ConfigurationError
        For an axis that there is not, or a part that lies outside of it or is empty.
    """
    names = dimension_names(array, axes)
    region = [slice(0, size) for size in array.shape]
    for name, part in parts.items():
        number = axis_of(name, axes, names)
        size = array.shape[number]
        if isinstance(part, slice):
            start, stop, _ = part.indices(size)
        else:
            start = part + size if part < 0 else part
            stop = start + 1
        if not 0 <= start < stop <= size:
            shown = f"{part.start}:{part.stop}" if isinstance(part, slice) else part
            raise ConfigurationError(f"{name}={shown}: axis {name} has {size}, from 0 to {size - 1}")
        region[number] = slice(start, stop)
    return tuple(region)


def axis_of(name: str, axes: str, names: Sequence[str]) -> int:
    """Return the number of an axis by its letter or name; raises ConfigurationError if there is none."""
    if name in names:
        return list(names).index(name)
    if len(name) == 1 and name in axes:
        return axes.index(name)
    known = ", ".join(names)
    raise ConfigurationError(f"no axis {name!r}; this array has {known}")


def moved(values: Any, axes: str) -> Any:
    """Bring an array with these axes into the order of images: other axes, y, x, and c last, made if there is none."""
    order = [k for k, axis in enumerate(axes) if axis not in "yxc"]
    order += [axes.index(axis) for axis in "yxc" if axis in axes]
    values = values.transpose(order)
    return values if "c" in axes else values[..., None]
