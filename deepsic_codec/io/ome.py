"""Image pyramids as OME-Zarr has them (OME-NGFF 0.5): levels of half the size each, in a group that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from deepsic_codec.errors import UnsupportedArray

if TYPE_CHECKING:
    import dask.array as da

    from deepsic_codec.io.images import ImageSource

VERSION = "0.5"  # the one for Zarr format 3
ORDER = "tczyx"  # of axes, as OME-NGFF wants them
TYPES = {"t": "time", "c": "channel"}  # all others are "space"
RGB = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
SMALLEST = 512  # pixels: an image within that needs no smaller one


def pyramid(source: ImageSource, smallest: int | None = None, nodata: Any = None) -> list[ImageSource]:
    """Return an image and its reductions, each half as wide and high as the one before, as sources of their own.

    Parameters
    ----------
    source : ImageSource
        Axes y, x and any of t, c, z, in any order.
    smallest : int, optional
        Edge in pixels, 512 by default; the last level lies within it.
    nodata : number or "NaN", optional
        Value of samples that hold no data; NaN does in any case.

    Returns
    -------
    list of ImageSource
        Named `<name>/0`, `<name>/1`, ...; axes in the order of OME-NGFF. A pixel is the mean of 2 x 2 of the level
        before (rounded, if samples are integers), of those that hold data. All levels are made from the source, never
        from pixels that were stored, and each reads it again.

    Raises
    ------
    UnsupportedArray
        For an axis that OME-NGFF does not have.
    """
    unknown = sorted(set(source.axes) - set(ORDER))
    if unknown:
        raise UnsupportedArray(f"{source.name}: OME-NGFF has no axis {', '.join(unknown)}; its axes are t, c, z, y, x")
    axes = "".join(axis for axis in ORDER if axis in source.axes)
    values = source.values.transpose([source.axes.index(axis) for axis in axes])
    smallest = SMALLEST if smallest is None else max(1, smallest)
    levels = [replace(source, name=f"{source.name}/0", values=values, axes=axes)]
    while max(values.shape[-2:]) > smallest:
        values = _halved(values, nodata)
        attributes = _scaled(source.attributes, 2 ** len(levels))
        name = f"{source.name}/{len(levels)}"
        levels.append(replace(source, name=name, values=values, axes=axes, attributes=attributes))
    return levels


def describe(name: str, levels: Sequence[Any], axes: str) -> dict[str, Any]:
    """Return the attributes of a group with a pyramid, its arrays being called 0, 1, ...

    Parameters
    ----------
    name : str
        What to call the image.
    levels : sequence of arrays
        With `shape` and `dtype`; level k has been halved k times along y and x.
    axes : str
        Of the arrays, in the order of OME-NGFF.
    """
    datasets = []
    for number in range(len(levels)):
        factor = 2.0**number
        # The centre of the first pixel lies between those of the pixels that it is the mean of.
        scale = [factor if axis in "yx" else 1.0 for axis in axes]
        shift = [(factor - 1) / 2 if axis in "yx" else 0.0 for axis in axes]
        transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if number:
            transformations.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
    image: dict[str, Any] = {
        "name": name,
        "axes": [{"name": axis, "type": TYPES.get(axis, "space")} for axis in axes],
        "datasets": datasets,
        "type": "mean",
        "metadata": {"description": "mean of 2 x 2 pixels", "method": "deepsic_codec.io.ome.pyramid"},
    }
    ome: dict[str, Any] = {"version": VERSION, "multiscales": [image]}
    first = levels[0]
    if "c" in axes and first.shape[axes.index("c")] == 3 and first.dtype == np.uint8:
        window = {"min": 0, "max": 255, "start": 0, "end": 255}
        channels = [{"label": label, "color": color, "active": True, "window": window} for label, color in RGB]
        ome["omero"] = {"channels": channels, "rdefs": {"model": "color"}}
    return {"ome": ome}


def open_group(url: Any, name: str) -> zarr.Group:
    """Open the group that a pyramid goes into, made if needed; raises UnsupportedArray if something else is there."""
    try:
        return zarr.open_group(url, path=name, mode="a", zarr_format=3)
    except Exception as error:  # zarr's errors differ between versions and stores
        raise UnsupportedArray(f"{url}: {name!r} cannot be a group for an OME-Zarr pyramid: {error}") from error


def _scaled(attributes: dict[str, Any], factor: int) -> dict[str, Any]:
    """Attributes of a level: pixels are larger, their upper left corner stays."""
    if "transform" not in attributes:
        return attributes
    a, b, c, d, e, f = attributes["transform"]
    return {**attributes, "transform": [a * factor, b * factor, c, d * factor, e * factor, f]}


def _halved(values: da.Array, nodata: Any) -> da.Array:
    import dask.array as da

    for axis in (values.ndim - 2, values.ndim - 1):
        if values.shape[axis] % 2:  # the last row or column stands for the one that is not there
            last = da.take(values, [values.shape[axis] - 1], axis=axis)
            values = da.concatenate([values, last], axis=axis)
        sizes = values.chunks[axis]
        if any(size % 2 for size in sizes):
            values = values.rechunk({axis: max(2, max(sizes) // 2 * 2)})
    chunks = (*values.chunks[:-2], *(tuple(n // 2 for n in sizes) for sizes in values.chunks[-2:]))
    return da.map_blocks(partial(_mean, nodata=nodata), values, dtype=values.dtype, chunks=chunks)


def _mean(block: np.ndarray, nodata: Any) -> np.ndarray:
    """Mean of 2 x 2 pixels along the last two axes, of those that have data."""
    *outer, height, width = block.shape
    cells = block.reshape(*outer, height // 2, 2, width // 2, 2).astype(np.float64)
    empty = np.isnan(cells)
    if nodata is not None:
        empty |= cells == float(nodata)
    count = (~empty).sum(axis=(-3, -1))
    total = np.where(empty, 0.0, cells).sum(axis=(-3, -1))
    mean = total / np.maximum(count, 1)
    if np.issubdtype(block.dtype, np.integer):
        mean = np.floor(mean + 0.5)
    gap = float(nodata) if nodata is not None else np.nan if block.dtype.kind == "f" else 0.0
    return np.where(count > 0, mean, gap).astype(block.dtype)
