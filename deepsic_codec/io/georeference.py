"""Where on Earth an image lies and what its samples mean, in attributes and in raster files.

`crs` is a coordinate reference system as text, such as "EPSG:32632". `transform` is a list [a, b, c, d, e, f] of an
affine map from pixels to coordinates: x = a * column + b * row + c, y = d * column + e * row + f, at the upper left
corner of a pixel. `nodata` is the value of samples without data, "NaN" for NaN.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.payload.value_range import full_range
from deepsic_codec.require import require

TAGS = {
    "GeoKeyDirectoryTag",
    "ModelTransformationTag",
    "ModelPixelScaleTag",
    "ModelTiepointTag",
    "GDAL_NODATA",
    "GDAL_METADATA",
    "RPCCoefficientTag",
}
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
    """Return what an open raster file says of its place and of the meaning of its samples.

    Returns
    -------
    dict
        As far as the file has them: `crs`, also as `crs_wkt`;
        `transform`, `nodata`; `gcps`, ground control points as GeoJSON, with `row`
        and `col`; `rpcs`, coefficients of a rational polynomial; `scale_factor` and `add_offset`, or `scales` and
        `offsets` of bands that differ; `units` and `long_name` (description), lists for bands that differ;
        `colorinterp` of bands that are not grey or red, green and blue; `tags`, and `band_tags`, a list.
    """
    result: dict[str, Any] = {}
    points, points_crs = file.gcps
    crs = file.crs or (points_crs if points else None)
    if crs:
        result["crs"], result["crs_wkt"] = crs.to_string(), crs.to_wkt(version="WKT2_2019")
    if not file.transform.is_identity:
        result["transform"] = list(file.transform)[:6]
    if file.nodata is not None:
        result["nodata"] = "NaN" if np.isnan(file.nodata) else file.nodata
    if points:
        result["gcps"] = {"type": "FeatureCollection", "features": [_feature(point) for point in points]}
    if file.rpcs is not None:
        result["rpcs"] = {key: value for key, value in file.rpcs.to_dict().items() if value is not None}
    for key, keys, values, default in (
        ("scale_factor", "scales", file.scales, 1.0),
        ("add_offset", "offsets", file.offsets, 0.0),
        ("units", "units", file.units, None),
        ("long_name", "long_name", file.descriptions, None),
    ):
        if any(value not in (default, "") for value in values):
            same = len(set(values)) == 1
            result[key if same else keys] = values[0] if same else list(values)
    interpretations = [item.name for item in file.colorinterp]
    usual = (["gray"] + ["undefined"] * (file.count - 1), ["red", "green", "blue"], ["undefined"] * file.count)
    if interpretations not in usual:
        result["colorinterp"] = interpretations
    tags = _tags(file.tags())
    tags.pop("AREA_OR_POINT", None) if tags.get("AREA_OR_POINT") == "Area" else None
    band_tags = [_tags(file.tags(band)) for band in file.indexes]
    return result | ({"tags": tags} if tags else {}) | ({"band_tags": band_tags} if any(band_tags) else {})


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags that stay true of other samples."""
    return {key: value for key, value in tags.items() if not key.startswith("STATISTICS_")}


def _feature(point: Any) -> dict[str, Any]:
    place = [point.x, point.y, *([] if point.z is None else [point.z])]
    properties = {"id": point.id, "info": point.info, "row": point.row, "col": point.col}
    return {"type": "Feature", "properties": properties, "geometry": {"type": "Point", "coordinates": place}}


def write(path: Path, attributes: Mapping[str, Any]) -> None:
    """Add to a TIFF file what `attributes` returns of a raster file.

    A reference system that `parse_crs` refuses is left out with a warning, and so is, without one, a NoData value that
    the samples cannot have. Without any attribute, nothing happens and rasterio is not needed.
    """
    from deepsic_codec.stored.coordinates import transform_of  # zarr, which reading images does not need

    transform, crs = transform_of(attributes), attributes.get("crs")
    nodata = number(attributes.get("nodata"))
    if transform is None and not crs and nodata is None and not _MEANING & attributes.keys():
        return
    with open_raster(path, "r+") as file:
        from rasterio.transform import Affine

        system = None
        if crs:
            try:
                system = parse_crs(crs)
            except ConfigurationError as error:
                warnings.warn(f"the file gets no reference system: {error}", stacklevel=2)
        points = _points(attributes.get("gcps"))
        if points and transform is None:
            file.gcps = (points, system)
        elif system is not None:
            file.crs = system
        if transform is not None:
            file.transform = Affine(*transform)
        if nodata is not None and fits(nodata, np.dtype(file.dtypes[0])):
            if abs(nodata) < 1 << 53 or file.dtypes[0] not in ("int64", "uint64"):
                file.nodata = nodata
            else:  # GDAL would read another number
                warnings.warn(f"the file gets no NoData value: {nodata} has more than 53 bits", stacklevel=2)
        _write_meaning(file, attributes)


_TAG = re.compile(r"[A-Za-z]\w*")  # attributes of an array that become tags, unless they mean something else here
_OF_ARRAYS = {"crs", "transform", "nodata", "source", "coordinates", "grid_mapping"}
_MEANING = {
    *("gcps", "rpcs", "scale_factor", "add_offset", "scales", "offsets", "units", "long_name"),
    *("colorinterp", "tags", "band_tags"),
}


def _points(collection: Any) -> list[Any]:
    """Return ground control points; those that are not as `attributes` writes them are left out."""
    from rasterio.control import GroundControlPoint

    points = []
    for feature in collection.get("features", []) if isinstance(collection, Mapping) else []:
        try:
            about, (x, y, *z) = feature["properties"], feature["geometry"]["coordinates"]
            place = {"row": float(about["row"]), "col": float(about["col"]), "x": float(x), "y": float(y)}
            points.append(
                GroundControlPoint(**place, z=float(z[0]) if z else None, id=about.get("id"), info=about.get("info"))
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue
    return points


def _write_meaning(file: Any, attributes: Mapping[str, Any]) -> None:
    """Add scales, offsets, units, descriptions, interpretations, RPCs and tags, as far as they fit the bands."""
    from rasterio.enums import ColorInterp
    from rasterio.rpc import RPC

    def of_bands(*keys: str) -> list[Any] | None:
        value = next((attributes[key] for key in keys if key in attributes), None)
        values = value if isinstance(value, list) else [value] * file.count
        return values if value is not None and len(values) == file.count else None

    for name, keys, kind in (
        ("scales", ("scales", "scale_factor"), float),
        ("offsets", ("offsets", "add_offset"), float),
        ("units", ("units",), str),
        ("descriptions", ("long_name",), str),
    ):
        values = of_bands(*keys)
        try:
            if values is not None:
                setattr(file, name, tuple(kind(value) if value is not None else None for value in values))
        except (TypeError, ValueError):
            warnings.warn(f"the file gets no {name}: {values!r:.80} are none", stacklevel=3)
    interpretations = of_bands("colorinterp")
    if interpretations is not None and all(str(name) in ColorInterp.__members__ for name in interpretations):
        file.colorinterp = [ColorInterp[str(name)] for name in interpretations]
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        if "rpcs" in attributes:
            file.rpcs = RPC(**attributes["rpcs"])
    tags = attributes.get("tags")
    plain = {key: value for key, value in attributes.items() if isinstance(value, str | int | float)}
    tags = {key: plain[key] for key in plain if _TAG.fullmatch(key)} | (dict(tags) if isinstance(tags, Mapping) else {})
    file.update_tags(**{str(key): str(value) for key, value in tags.items() if key not in _OF_ARRAYS | _MEANING})
    for band, tags in zip(file.indexes, of_bands("band_tags") or (), strict=False):
        if isinstance(tags, Mapping) and tags:
            file.update_tags(band, **{str(key): str(value) for key, value in tags.items()})


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


def number(value: Any) -> float | None:
    """Return an attribute as a number, None if it is none."""
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except (TypeError, ValueError):
        return None


def fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Tell whether samples of a dtype can have a value."""
    if dtype.kind == "f":
        return True
    low, high = (0, 1) if dtype.kind == "b" else full_range(dtype)
    return low <= value <= high and value == int(value)
