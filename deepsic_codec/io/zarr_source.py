"""Zarr arrays and groups as sources of images."""

import base64
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from deepsic_codec import dask as deepsic_dask
from deepsic_codec.axes import DIMENSIONS, axes_of_names
from deepsic_codec.codec.scaled import DTYPES
from deepsic_codec.errors import SourceError, UnsupportedArray
from deepsic_codec.io import georeference, validity
from deepsic_codec.io.images import ImageSource, check_dtype
from deepsic_codec.labels.index import ATTRIBUTE as INDEX
from deepsic_codec.stored.allowed import check_codecs
from deepsic_codec.stored.array import ATTRIBUTE, StoredArray
from deepsic_codec.stored.embedded import PREFIX as MODEL
from deepsic_codec.stored.location import is_deepsic, members

METADATA = ("zarr.json", ".zarray", ".zgroup")


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a Zarr array or group."""
    return any((path / name).is_file() for name in METADATA)


@dataclass(frozen=True)
class PlainNode:
    """An array that is copied as it is, or a group whose attributes are; `path` is that in the group of the source."""

    path: str
    node: Any

    @property
    def is_array(self) -> bool:
        """Whether it is an array."""
        return isinstance(self.node, zarr.Array)


def open_zarr(
    location: str | Path,
    name: str,
    axes: str | None = None,
    *,
    plain: Callable[[PlainNode], None] | None = None,
) -> Iterator[ImageSource]:
    """Open a Zarr array, or all arrays of a group that may be images.

    Parameters
    ----------
    location : str or Path
        Path or URL.
    name : str
        Name of the source, if it is one array. Arrays of a group are named by their paths in it.
    axes : str, optional
        Axes of arrays whose dimensions have no known names.

    plain : callable, optional
        Called with each other array of a group, and with each group that has attributes: coordinates, text. Label
        indexes and embedded models, which are made anew, are left out.

    Yields
    ------
    ImageSource
        One for each array of numbers with axes y and x that is no coordinate of others.

    Raises
    ------
    SourceError
        If there is no array.
    UnsupportedArray
        If the codec cannot store the array, or its axes are unknown.
    """
    try:
        node = zarr.open(str(location), mode="r")
    except Exception as error:  # each store has errors of its own
        raise SourceError(f"{location}: neither an image file of a known kind nor a Zarr array: {error}") from error
    if isinstance(node, zarr.Array):
        yield _source(node, str(location), name, axes)
        return
    nodes = [("", node), *members(node)]
    indexes = [path for path, group in nodes if isinstance(group, zarr.Group) and INDEX in group.attrs and path]
    described = " ".join(str(member.attrs.get("coordinates", "")) for _, member in nodes).split()
    images = []
    for path, member in nodes:
        parts = path.split("/")
        if any(path == index or path.startswith(f"{index}/") for index in indexes) or parts[-1].startswith(MODEL):
            continue
        if isinstance(member, zarr.Array) and parts[-1] not in described and _is_image(member, axes):
            images.append((path, member))
        elif plain is not None and (isinstance(member, zarr.Array) or dict(member.attrs)):
            plain(PlainNode(path, member))
    if not images:
        raise SourceError(f"{location}: the group has no arrays of numbers with two dimensions or more that are axes")
    for path, array in images:
        yield _source(array, f"{location}/{path}", path, axes)


def _is_image(array: zarr.Array, axes: str | None) -> bool:
    if array.dtype.newbyteorder("=") not in DTYPES or array.ndim < 2 or not array.size:
        return False
    names = _dimension_names(array)
    letters = {DIMENSIONS.get(name.lower(), "") for name in names}
    if is_deepsic(array) or {"y", "x"} <= letters:
        return True
    return not names if axes is None else len(axes) == array.ndim


def _dimension_names(array: zarr.Array) -> list[str]:
    """Return the names of the dimensions of an array, empty if it has none."""
    names: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    return [str(name) for name in names] if all(name is not None for name in names) else []


def missing_values(array: zarr.Array) -> list[float]:
    """Return the values of an array that mean no data, by the conventions of Zarr, xarray, CF and GDAL.

    These are `_FillValue`, `missing_value` and `nodata` of its attributes, and its fill value, if that says more than
    that chunks are missing: in format 2 for arrays with names of dimensions, as xarray reads them, in format 3 if it
    is not 0. NaN comes first. Values that the samples cannot have are left out.
    """
    attributes, fill_value = array.attrs.asdict(), array.fill_value
    values: list[Any] = [attributes.get("_FillValue")]
    is_two = array.metadata.zarr_format == 2
    if is_two and "_ARRAY_DIMENSIONS" in attributes:
        values.append(fill_value)
    for key in ("missing_value", "nodata", "nodatavals"):
        value = attributes.get(key)
        values += value if isinstance(value, list | tuple) else [value]
    if not is_two and fill_value != 0:
        values.append(fill_value)
    numbers = [number for number in map(as_number, values) if number is not None and _fits(number, array.dtype)]
    return sorted({number: None for number in numbers if number == number}, key=numbers.index) + (
        [float("nan")] if any(number != number for number in numbers) else []
    )


def as_number(value: Any) -> float | None:
    """Return an attribute as a number; xarray writes those of float arrays of format 3 in base 64."""
    number = georeference.number(value)
    if number is None and isinstance(value, str):
        try:
            (number,) = struct.unpack("<d", base64.b64decode(value, validate=True))
        except (ValueError, struct.error):
            return None
    return number


def _fits(number: float, dtype: np.dtype[Any]) -> bool:
    if number != number or np.isinf(number):
        return dtype.kind == "f"
    return georeference.fits(number, dtype)


def _source(array: zarr.Array, location: str, name: str, axes: str | None) -> ImageSource:
    import dask.array as da

    check_dtype(location, array.dtype)
    check_codecs(array)
    attributes = {key: value for key, value in array.attrs.items() if key not in (ATTRIBUTE, "_ARRAY_DIMENSIONS")}
    names = _dimension_names(array)
    dimensions = tuple(names) or None
    reads = (location_of(array.store_path),)
    if is_deepsic(array):
        stored = StoredArray(array)
        if stored.params.nodata is not None:
            attributes["nodata"] = stored.params.nodata
        values = deepsic_dask.open(array)
        return ImageSource(name, values, stored.axes, attributes, dimensions=dimensions, reads=reads)
    if axes is None and len(names) == array.ndim:
        axes = axes_of_names(names)
    if not axes:
        raise UnsupportedArray(
            f"{location}: the axes of the {array.ndim} dimensions are unknown (their names: "
            f"{names or 'none'}); give them with --axes, such as --axes yxc"
        )
    values = da.from_zarr(array)
    missing = missing_values(array)
    if missing:
        nodata = next((value for value in missing if np.isfinite(value)), float("nan"))
        others = [value for value in missing if value != nodata]
        if others:
            values = validity.join_values(values, others, nodata)
        attributes["nodata"] = "NaN" if nodata != nodata else nodata
    return ImageSource(name, values, axes, attributes, dimensions=dimensions, reads=reads)


def location_of(path: Any) -> str:
    """Return where a node is, in the same words whatever path leads to it."""
    if isinstance(path.store, LocalStore):
        return str((path.store.root / path.path).resolve())
    return str(path).rstrip("/")
