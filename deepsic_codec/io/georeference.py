"""Where on Earth an image lies: the attributes `crs`, `transform` and `nodata`, and raster files that have them.

`crs` is a coordinate reference system as text, such as "EPSG:32632". `transform` is a list [a, b, c, d, e, f] of an
affine map from pixels to coordinates: x = a * column + b * row + c, y = d * column + e * row + f, at the upper left
corner of a pixel. `nodata` is the value of samples without data, "NaN" for NaN.
"""

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepsic_codec.io.require import require

Transform = list[float]
TAGS = {"GeoKeyDirectoryTag", "ModelTransformationTag", "ModelPixelScaleTag", "ModelTiepointTag", "GDAL_NODATA"}
WORLD_FILES = (".tfw", ".tifw", ".tiffw", ".wld")  # text files with a transform, beside an image


def is_georeferenced(path: Path, tags: Collection[str]) -> bool:
    """Tell whether a TIFF file, or a file beside it, says where it lies or which samples have no data.

    Parameters
    ----------
    path : Path
        The file.
    tags : collection of str
        Names of its tags.
    """
    sidecars = [path.with_suffix(suffix) for suffix in WORLD_FILES] + [path.with_name(f"{path.name}.aux.xml")]
    return not TAGS.isdisjoint(tags) or any(sidecar.is_file() for sidecar in sidecars)


@contextlib.contextmanager
def open_raster(path: Path, mode: str = "r") -> Iterator[Any]:
    """Open a file with rasterio, as a context manager; raises MissingPackage without rasterio."""
    require("images", "rasterio")
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, mode) as file:
            yield file


def attributes(file: Any) -> dict[str, Any]:
    """Return `crs`, `transform` and `nodata` of an open raster file, as far as it has them."""
    result: dict[str, Any] = {}
    if file.crs:
        result["crs"] = file.crs.to_string()
    if not file.transform.is_identity:
        result["transform"] = list(file.transform)[:6]
    if file.nodata is not None:
        result["nodata"] = "NaN" if np.isnan(file.nodata) else file.nodata
    return result


def write(path: Path, attributes: Mapping[str, Any]) -> None:
    """Add `crs`, `transform` and `nodata` to a TIFF file.

    A reference system that is unknown to rasterio is left out, and so is a NoData value that the samples cannot have.
    Without any of the three, nothing happens and rasterio is not needed.
    """
    transform, crs = transform_of(attributes), attributes.get("crs")
    nodata = number(attributes.get("nodata"))
    if transform is None and not crs and nodata is None:
        return
    with open_raster(path, "r+") as file:
        from rasterio.crs import CRS
        from rasterio.errors import CRSError
        from rasterio.transform import Affine

        if transform is not None:
            file.transform = Affine(*transform)
        if crs:
            with contextlib.suppress(CRSError, TypeError):
                file.crs = CRS.from_user_input(crs)
        if nodata is not None and fits(nodata, np.dtype(file.dtypes[0])):
            file.nodata = nodata


def transform_of(attributes: Mapping[str, Any]) -> Transform | None:
    """Return the attribute `transform`, None if there is none or it is no list of six numbers."""
    values = attributes.get("transform")
    if not isinstance(values, list | tuple) or len(values) != 6:
        return None
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return None


def shifted(transform: Transform, row: int, column: int) -> Transform:
    """Return the transform of a part of an image that begins at a row and a column."""
    a, b, c, d, e, f = transform
    return [a, b, c + a * column + b * row, d, e, f + d * column + e * row]


def scaled(transform: Transform, factor: int) -> Transform:
    """Return the transform of an image that was reduced by a factor along rows and columns."""
    a, b, c, d, e, f = transform
    return [a * factor, b * factor, c, d * factor, e * factor, f]


def number(value: Any) -> float | None:
    """Return an attribute as a number, None if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Tell whether samples of a dtype can have a value."""
    if dtype.kind == "f":
        return True
    info = np.iinfo(dtype)
    return bool(info.min <= value <= info.max) and value == int(value)
