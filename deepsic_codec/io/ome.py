"""Image pyramids of OME-Zarr (OME-NGFF 0.5): a group with levels, each half as wide and high as the level before."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io.images import ImageSource
from deepsic_codec.stored.coordinates import reduced
from deepsic_codec.stored.location import refuse_zip_path

if TYPE_CHECKING:
    import dask.array as da

VERSION = "0.5"  # of OME-NGFF: the version for Zarr format 3
AXES = "tczyx"  # in the order that OME-NGFF requires
TYPES = {"t": "time", "c": "channel"}  # types of axes; all others are "space"
RGB = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
SMALLEST = 512  # pixels: images with edges up to this length are not reduced


def pyramid(source: ImageSource, smallest: int | None = None, nodata: Any = None) -> list[ImageSource]:
    """Return the levels of a pyramid, beginning with the image itself.

    Each level is half as wide and high as the level before. A pixel is the mean of 2 x 2 pixels that hold data, rounded
    if the samples are integers; of classes, it is the first of the four. All levels are computed from the source, never
    from decoded pixels, and each reads the source again.

    Parameters
    ----------
    source : ImageSource
        Image with axes y, x and any of t, c, z, in any order.
    smallest : int, optional
        Edge in pixels (default: 512). The last level is at most as wide and high.
    nodata : number or "NaN", optional
        Value of samples that hold no data. NaN never counts as data.

    Returns
    -------
    list of ImageSource
        Levels with the names `<name>/0`, `<name>/1`, ... and their axes in the order of OME-NGFF.

    Raises
    ------
    UnsupportedArray
        For an axis that OME-NGFF does not have.
    """
    unknown = sorted(set(source.axes) - set(AXES))
    if unknown:
        raise UnsupportedArray(f"{source.name}: OME-NGFF has no axis {', '.join(unknown)}; its axes are t, c, z, y, x")
    axes = "".join(axis for axis in AXES if axis in source.axes)
    values = source.values.transpose([source.axes.index(axis) for axis in axes])
    smallest = SMALLEST if smallest is None else max(1, smallest)
    levels = [replace(source, name=f"{source.name}/0", values=values, axes=axes)]
    while max(values.shape[-2:]) > smallest:
        values = values[..., ::2, ::2] if source.lossless else _halve(values, nodata)
        name, attributes = f"{source.name}/{len(levels)}", reduced(source.attributes, 2 ** len(levels))
        levels.append(replace(source, name=name, values=values, axes=axes, attributes=attributes))
    return levels


def describe(name: str, levels: Sequence[Any], axes: str, *, classes: bool = False) -> dict[str, Any]:
    """Return the attributes of a group that holds a pyramid in its arrays 0, 1, ...

    Parameters
    ----------
    name : str
        Name of the image.
    levels : sequence of arrays
        Anything with `shape` and `dtype`. Level k was halved k times along y and x.
    axes : str
        Axes of the arrays, in the order of OME-NGFF.
    classes : bool
        Pixels were selected, not averaged.

    Returns
    -------
    dict
        The attribute `ome`.
    """
    datasets = []
    for number in range(len(levels)):
        factor = 2.0**number
        # The centre of the first pixel lies in the middle of the pixels of which it is the mean.
        scale = [factor if axis in "yx" else 1.0 for axis in axes]
        shift = [(factor - 1) / 2 if axis in "yx" and not classes else 0.0 for axis in axes]
        transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if number:
            transformations.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
    image: dict[str, Any] = {
        "name": name,
        "axes": [{"name": axis, "type": TYPES.get(axis, "space")} for axis in axes],
        "datasets": datasets,
        "type": "nearest" if classes else "mean",
        "metadata": {
            "description": "first of 2 x 2 pixels" if classes else "mean of 2 x 2 pixels",
            "method": "deepsic_codec.io.ome.pyramid",
        },
    }
    ome: dict[str, Any] = {"version": VERSION, "multiscales": [image]}
    first = levels[0]
    if "c" in axes and first.shape[axes.index("c")] == 3 and first.dtype == np.uint8:
        window = {"min": 0, "max": 255, "start": 0, "end": 255}
        channels = [{"label": label, "color": color, "active": True, "window": window} for label, color in RGB]
        ome["omero"] = {"channels": channels, "rdefs": {"model": "color"}}
    return {"ome": ome}


def open_group(url: Any, name: str) -> zarr.Group:
    """Open or create the group of a pyramid; raises UnsupportedArray if an array has this name."""
    refuse_zip_path(url)
    try:
        return zarr.open_group(url, path=name, mode="a", zarr_format=3)
    except Exception as error:  # zarr's errors differ between versions and stores
        raise UnsupportedArray(f"{url}: {name!r} cannot be a group for an OME-Zarr pyramid: {error}") from error


def _halve(values: "da.Array", nodata: Any) -> "da.Array":
    import dask.array as da

    odd = [(0, 0)] * (values.ndim - 2) + [(0, size % 2) for size in values.shape[-2:]]
    even = da.pad(values, odd, mode="edge")  # the last row or column is counted twice
    return da.coarsen(partial(_mean, nodata=nodata), even, {values.ndim - 2: 2, values.ndim - 1: 2})


def _mean(cells: np.ndarray, axis: tuple[int, ...] | None = None, *, nodata: Any) -> np.ndarray:
    """Return the mean along axes of the samples that hold data."""
    empty = np.isnan(cells)
    if nodata is not None:
        empty |= cells == float(nodata)
    count = (~empty).sum(axis=axis)
    mean = np.where(empty, 0, cells).sum(axis=axis, dtype=np.float64) / np.maximum(count, 1)
    if cells.dtype.kind != "f":
        mean = np.floor(mean + 0.5)
    gap = float(nodata) if nodata is not None else np.nan if cells.dtype.kind == "f" else 0.0
    return np.where(count > 0, mean, gap).astype(cells.dtype)
