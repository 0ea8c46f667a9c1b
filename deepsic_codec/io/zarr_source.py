"""Zarr arrays and groups as sources of images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zarr

from deepsic_codec import dask as deepsic_dask
from deepsic_codec.codec.scaled import DTYPES
from deepsic_codec.errors import SourceError, UnsupportedArray
from deepsic_codec.io.images import ImageSource, check_dtype
from deepsic_codec.stored.allowed import check_codecs
from deepsic_codec.stored.array import ATTRIBUTE, StoredArray
from deepsic_codec.stored.location import is_deepsic, members

METADATA = ("zarr.json", ".zarray", ".zgroup")
# Names of dimensions, and the axes of the codec that they mean.
DIMENSIONS = {
    **dict.fromkeys(("y", "lat", "latitude", "northing", "row", "height"), "y"),
    **dict.fromkeys(("x", "lon", "longitude", "easting", "col", "column", "width"), "x"),
    **dict.fromkeys(("c", "band", "bands", "channel", "channels", "rgb"), "c"),
    **dict.fromkeys(("t", "time"), "t"),
    **dict.fromkeys(("z", "depth"), "z"),
    **dict.fromkeys(("n", "image", "sample"), "n"),
}


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a Zarr array or group."""
    return any((path / name).is_file() for name in METADATA)


def open_zarr(location: str | Path, name: str, axes: str | None = None) -> Iterator[ImageSource]:
    """Open a Zarr array, or all arrays of a group that may be images.

    Parameters
    ----------
    location : str or Path
        Path or URL.
    name : str
        Name of the source, if it is one array. Arrays of a group are named by their paths in it.
    axes : str, optional
        Axes of arrays whose dimensions have no known names.

    Yields
    ------
    ImageSource
        One for each array. A group's arrays of float32 are left out: coordinates and masks have this dtype, too.

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
    images = [
        (path, array) for path, array in members(node) if isinstance(array, zarr.Array) and _is_image(path, array)
    ]
    if not images:
        raise SourceError(f"{location}: the group has no arrays of 8 or 16 bits with two dimensions or more")
    for path, array in images:
        yield _source(array, f"{location}/{path}", path, axes)


def _is_image(path: str, array: zarr.Array) -> bool:
    has_dtype = array.dtype.newbyteorder("=") in DTYPES and array.dtype.kind != "f"
    return has_dtype and array.ndim >= 2 and not any(part.endswith("_labels") for part in path.split("/"))


def _source(array: zarr.Array, location: str, name: str, axes: str | None) -> ImageSource:
    import dask.array as da

    check_dtype(location, array.dtype)
    check_codecs(array)
    attributes = {key: value for key, value in array.attrs.items() if key not in (ATTRIBUTE, "_ARRAY_DIMENSIONS")}
    if is_deepsic(array):
        return ImageSource(name, deepsic_dask.open(array), StoredArray(array).axes, attributes)
    dimensions: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    letters = [DIMENSIONS.get(str(dimension).lower(), "") for dimension in dimensions]
    if axes is None and len(letters) == array.ndim == len(set(letters) - {""}):
        axes = "".join(letters)
    if not axes:
        raise UnsupportedArray(
            f"{location}: the axes of the {array.ndim} dimensions are unknown (their names: "
            f"{list(dimensions) or 'none'}); give them with --axes, such as --axes yxc"
        )
    return ImageSource(name, da.from_zarr(array), axes, attributes)
