"""Where on Earth an image lies: the attributes `crs`, `transform` and `nodata`, and raster files that have them.

`crs` is a coordinate reference system as text, such as "EPSG:32632". `transform` is a list [a, b, c, d, e, f] of an
affine map from pixels to coordinates: x = a * column + b * row + c, y = d * column + e * row + f, at the upper left
corner of a pixel. `nodata` is the value of samples without data, "NaN" for NaN.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.io.require import require

Transform = list[float]
TAGS = {"GeoKeyDirectoryTag", "ModelTransformationTag", "ModelPixelScaleTag", "ModelTiepointTag", "GDAL_NODATA"}
WORLD_FILES = (".tfw", ".tifw", ".tiffw", ".wld")  # text files with a transform, beside an image
GEOTIFF = ("GTiff",)  # drivers of GDAL that read a kind of file, of which the first that is installed is used
JPEG_2000 = ("JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID")
#: Options of GDAL: the virtual file systems of the network open no file.
OFFLINE = {"CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none", "GDAL_HTTP_MAX_RETRY": "0"}
_AUTHORITY = re.compile(r"([A-Za-z]\w{1,15}):(\w{1,15})")  # EPSG:32632, ESRI:54009, OGC:CRS84


def is_georeferenced(path: Path, tags: Collection[str]) -> bool:
    """Tell whether a TIFF file, or a file beside it, says where it lies or which samples have no data.

    Parameters
    ----------
    path : Path
        The file.
    tags : collection of str
        Names of its tags.
    """
    return not TAGS.isdisjoint(tags) or any(sidecar.is_file() for sidecar in _sidecars(path))


def _sidecars(path: Path) -> list[Path]:
    """Files beside an image that GDAL may read."""
    added = [path.with_name(f"{path.name}{suffix}") for suffix in (".aux.xml", ".ovr", ".msk")]
    return [*added, *(path.with_suffix(suffix) for suffix in WORLD_FILES)]


@contextlib.contextmanager
def open_raster(path: Path, mode: str = "r", drivers: Sequence[str] = GEOTIFF) -> Iterator[Any]:
    """Open a file with rasterio, as a context manager; raises MissingPackage without rasterio.

    GDAL would take the description of a virtual dataset for an image, whatever the name of the file, and read what it
    names. So only the drivers of one kind of file are tried, the network is not used, and files beside the image are
    left alone if one of them is a symbolic link.
    """
    require("images", "rasterio")
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    options = dict(OFFLINE)
    if any(sidecar.is_symlink() for sidecar in _sidecars(path)):
        options["GDAL_DISABLE_READDIR_ON_OPEN"] = "EMPTY_DIR"
    with warnings.catch_warnings(), rasterio.Env(**options) as env:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        installed = env.drivers()
        driver = next((name for name in drivers if name in installed), drivers[0])
        # The beginning of a relative path could be a prefix that GDAL obeys, such as GTIFF_DIR:1:.
        with rasterio.open(path.absolute(), mode, driver=driver) as file:
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

    A reference system that `parse_crs` refuses is left out with a warning, and so is, without one, a NoData value that
    the samples cannot have. Without any of the three, nothing happens and rasterio is not needed.
    """
    transform, crs = transform_of(attributes), attributes.get("crs")
    nodata = number(attributes.get("nodata"))
    if transform is None and not crs and nodata is None:
        return
    with open_raster(path, "r+") as file:
        from rasterio.transform import Affine

        if transform is not None:
            file.transform = Affine(*transform)
        if crs:
            try:
                file.crs = parse_crs(crs)
            except ConfigurationError as error:
                warnings.warn(f"the file gets no reference system: {error}", stacklevel=2)
        if nodata is not None and fits(nodata, np.dtype(file.dtypes[0])):
            file.nodata = nodata


def parse_crs(crs: Any) -> Any:
    """Return an attribute `crs` as a coordinate reference system of rasterio.

    The text is parsed. GDAL would also open the file or URL that it names.

    Parameters
    ----------
    crs : str, int or dict
        The code of an authority such as "EPSG:32632", the number of an EPSG code, WKT, or PROJJSON as text or dict.

    Raises
    ------
    ConfigurationError
        If it is none of these.
    """
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    expected = f"crs: expected a code such as EPSG:32632, WKT or PROJJSON, got {str(crs)[:80]!r}"
    try:
        if isinstance(crs, str) and crs.lstrip().startswith("{"):
            crs = json.loads(crs)
        if isinstance(crs, int):
            return CRS.from_epsg(crs)
        if isinstance(crs, Mapping):  # PROJ's own dicts can name grids and files
            if "type" not in crs or {"proj", "init"} & crs.keys():
                raise ConfigurationError(expected)
            return CRS.from_dict(dict(crs))
        code = _AUTHORITY.fullmatch(str(crs).strip())
        return CRS.from_authority(*code.groups()) if code else CRS.from_wkt(str(crs))
    except (CRSError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigurationError(expected) from error


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
