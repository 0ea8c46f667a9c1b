"""Where the samples of an array lie: arrays of coordinates beside it, and attributes, as the conventions name them.

CF and xarray: arrays `x`, `y`, `band`, `time` of the same group, and a scalar `spatial_ref` with the reference system.
GeoZarr: the conventions `proj:` and `spatial:` among the attributes of the array. The attributes `crs` and `transform`
say the same where nothing can be beside the array.
"""

import json
import re
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from struct import pack
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import StorePath

from deepsic_codec.axes import Axes, Region
from deepsic_codec.stored.allowed import check_codecs
from deepsic_codec.stored.location import is_in_group, parent_and_name, url_of

GRID_MAPPING = "spatial_ref"
MAX_VALUES = 1 << 26  # of an array of coordinates that is read
ROUNDING = 1e-3  # pixels by which coordinates may leave a regular grid
PROJ = {
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/geo-proj/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/geo-proj/blob/v1/README.md",
    "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
    "name": "proj:",
    "description": "Coordinate reference system information for geospatial data",
}
SPATIAL = {
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
    "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
    "name": "spatial:",
    "description": "Spatial coordinate information",
}
_CODE = re.compile(r'(?:ID|AUTHORITY)\["(\w+)",\s*"?(\w+)"?\]\s*\]\s*$')  # the last words of WKT
_WKT = re.compile(r"[A-Za-z_]+\s*\[")
_UNIT = re.compile(r'LENGTHUNIT\["(\w+)"')
_WKT_2 = ("PROJCRS", "GEOGCRS", "GEODCRS", "BOUNDCRS", "COMPOUNDCRS", "ENGCRS", "VERTCRS")
_GEOGRAPHIC = ("GEOGCS", "GEOGCRS", "GEODCRS")

Transform = list[float]


class Coordinate(NamedTuple):
    """Values along some dimensions of an array, as an array beside it."""

    dimensions: tuple[str, ...]
    values: NDArray[Any]
    attributes: dict[str, Any]


Coordinates = dict[str, Coordinate]


def to_json(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return attributes as JSON can hold them: numpy's scalars and arrays as numbers and lists, dates as ISO 8601.

    Other objects become text.
    """
    return {str(key): _plain(value) for key, value in attributes.items()}


def _plain(value: Any) -> Any:
    if getattr(getattr(value, "dtype", None), "kind", None) in ("M", "m"):
        value = np.asarray(value).astype(str)
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return to_json(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def of_data_array(source: Any) -> tuple[dict[str, Any], Coordinates]:
    """Return attributes and coordinates of an xarray.DataArray."""
    coordinates = {}
    for name, values in source.coords.items():
        attributes = {**to_json(values.attrs)}
        encoded = _encoded(np.asarray(values.values), attributes)
        if encoded is None:
            warnings.warn(f"coordinate {name!r} of dtype {values.dtype} cannot be stored and is left out", stacklevel=4)
        else:
            coordinates[str(name)] = Coordinate(tuple(map(str, values.dims)), encoded, attributes)
    attributes = to_json(source.attrs)
    grid_mapping = source.encoding.get("grid_mapping")
    return attributes | ({} if grid_mapping is None else {"grid_mapping": grid_mapping}), coordinates


def _encoded(values: NDArray[Any], attributes: dict[str, Any]) -> NDArray[Any] | None:
    """Return values of a dtype that Zarr has, and add what CF says of them; None for other objects."""
    if values.dtype.kind in "Mm":
        unit = (
            "seconds" if not (values.astype(f"{values.dtype.kind}8[ns]").astype("i8") % 10**9).any() else "nanoseconds"
        )
        attributes["units"] = unit
        if values.dtype.kind == "M":
            attributes |= {"units": f"{unit} since 1970-01-01", "calendar": "proleptic_gregorian"}
        return values.astype(f"{values.dtype.kind}8[{'s' if unit == 'seconds' else 'ns'}]").astype("i8")
    if values.dtype.kind in "OT":
        return np.asarray(values, str) if all(isinstance(value, str) for value in values.ravel()) else None
    return values if values.dtype.kind in "biufU" else None


_SINCE = re.compile(
    r"(day|hour|minute|(?:milli|micro|nano)?second)s? since (\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?)(?:\.0+)?\s*"
    r"(?:Z|UTC|[+-]00:?00)?"
)
_SECONDS = {
    "day": 86400,
    "hour": 3600,
    "minute": 60,
    "second": 1,
    "millisecond": 1e-3,
    "microsecond": 1e-6,
    "nanosecond": 1e-9,
}
_CALENDARS = ("standard", "gregorian", "proleptic_gregorian")


def times_of(coordinate: Coordinate | None) -> NDArray[np.datetime64] | None:
    """Return the values of a coordinate as times, datetime64[s], NaT where there is none; None if it has no times.

    Times are datetime64, text in ISO 8601, or numbers with CF's attribute `units`, in the Gregorian calendar.
    """
    if coordinate is None or coordinate.values.ndim != 1:
        return None
    values, about = coordinate.values, coordinate.attributes
    try:
        if values.dtype.kind in "MUT":
            return values.astype("M8[s]")
        match = _SINCE.fullmatch(str(about.get("units", "")))
        if match is None or values.dtype.kind not in "iuf" or about.get("calendar", "standard") not in _CALENDARS:
            return None
        numbers = values.astype(np.float64) * _SECONDS[match[1]]
        seconds = np.where(np.isfinite(numbers), numbers, 0).round().astype(np.int64)
        times = np.datetime64(match[2].replace(" ", "T"), "s") + seconds
        return np.where(np.isfinite(numbers), times, np.datetime64("NaT"))
    except (OverflowError, TypeError, ValueError):
        return None


def describe(
    attributes: Mapping[str, Any], coordinates: Coordinates, axes: Axes, names: Sequence[str], shape: Sequence[int]
) -> tuple[dict[str, Any], Coordinates]:
    """Complete attributes and coordinates of an array by one another.

    Where coordinates and the attribute `transform` differ, as after slicing, the coordinates are right.

    Parameters
    ----------
    attributes, coordinates
        Those of the source. The attribute `crs_wkt` says `crs` in WKT, for `spatial_ref`; `times`, in ISO 8601, become
        the coordinate of axis t.
    axes, names, shape
        Of the array: axes, names of its dimensions, and sizes.

    Returns
    -------
    attributes : dict
        With `crs`, `transform` and those of `proj:` and `spatial:`, as far as they are known.
    coordinates : dict
        With `spatial_ref`, coordinates of bands and, for pixels along the axes of the reference system, of rows and
        columns.
    """
    result, coordinates = dict(attributes), dict(coordinates)
    y, x = names[axes.y], names[axes.x]
    times = result.pop("times", None)
    if "t" in axes and isinstance(times, list) and len(times) == shape[axes.index("t")]:
        time, encoding = names[axes.index("t")], {"standard_name": "time"}
        seconds = np.asarray(_encoded(np.array(times, "M8[s]"), encoding))
        coordinates.setdefault(time, Coordinate((time,), seconds, encoding))
    mapping = _grid_mapping(result, coordinates)
    about = dict(coordinates[mapping].attributes) if mapping in coordinates else {}
    if wkt := result.pop("crs_wkt", None):
        about["crs_wkt"] = wkt
    transform = _of_coordinates(coordinates, y, x, about) or transform_of(result) or _geo_transform(about)
    crs = result.get("crs") or (_short(_wkt_of(about)) if _wkt_of(about) else None)
    if transform is None and not crs and "gcps" not in result:
        return result, coordinates
    about |= _crs_attributes(crs, about)
    for key in ("crs", "transform"):
        result.pop(key, None)
    if crs:
        result["crs"] = crs
    about.pop("GeoTransform", None)
    if transform is not None:
        result["transform"] = transform
        a, b, c, d, e, f = transform
        about["GeoTransform"] = " ".join(map(repr, (c, a, b, f, d, e)))
        if b == d == 0 and shape[axes.y] and shape[axes.x]:
            is_geographic = str(about.get("crs_wkt", "")).lstrip().startswith(_GEOGRAPHIC)
            unit = about.pop("_units", None)
            for name, axis, step, start in ((y, "y", e, f), (x, "x", a, c)):
                values = start + step * (np.arange(shape[axes.index(axis)]) + 0.5)
                coordinates.setdefault(name, Coordinate((name,), values, _axis_attributes(axis, is_geographic, unit)))
    about.pop("_units", None)
    if "gcps" in result:
        about["gcps"] = json.dumps(result["gcps"])
    coordinates[mapping] = Coordinate((), np.zeros((), "i8"), about)
    if axes.c is not None:
        bands = Coordinate((names[axes.c],), np.arange(1, shape[axes.c] + 1), {"long_name": "band"})
        coordinates.setdefault(names[axes.c], bands)
    return result | conventions(result, about, (y, x)), coordinates


def conventions(attributes: Mapping[str, Any], about: Mapping[str, Any], dimensions: Sequence[str]) -> dict[str, Any]:
    """Return the attributes of the conventions `proj:` and `spatial:`, and `zarr_conventions` with both."""
    result: dict[str, Any] = {}
    used = []
    wkt = str(about.get("crs_wkt", "")).lstrip()
    if re.fullmatch(r"[A-Z]+:[0-9]+", str(attributes.get("crs"))):
        result["proj:code"] = attributes["crs"]
    elif wkt.startswith(_WKT_2):
        result["proj:wkt2"] = wkt
    if result:
        used.append(PROJ)
    if "transform" in attributes:
        result |= {"spatial:dimensions": list(dimensions), "spatial:transform": attributes["transform"]}
        used.append(SPATIAL)
    listed = attributes.get("zarr_conventions")
    others = [item for item in listed if isinstance(item, Mapping)] if isinstance(listed, list) else []
    uuids = {item["uuid"] for item in used}
    listed = [*(item for item in others if item.get("uuid") not in uuids), *used]
    return result | ({"zarr_conventions": listed} if listed else {})


def _grid_mapping(attributes: dict[str, Any], coordinates: Coordinates) -> str:
    """Return the name of the scalar that has the reference system, and take what refers to it from the attributes."""
    name = str(attributes.pop("grid_mapping", ""))
    attributes.pop("coordinates", None)
    if name in coordinates:
        return name
    keys = {"crs_wkt", "spatial_ref", "GeoTransform", "gcps"}
    return next((key for key, item in coordinates.items() if keys & item.attributes.keys()), GRID_MAPPING)


def _wkt_of(about: Mapping[str, Any]) -> str:
    return str(about.get("crs_wkt") or about.get("spatial_ref") or "")


def _short(wkt: str) -> str:
    """Return the code that WKT ends with, or WKT without one."""
    match = _CODE.search(wkt)
    return f"{match[1]}:{match[2]}" if match else wkt


def _crs_attributes(crs: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a reference system in a grid mapping; `_units` is the unit along its axes."""
    if not crs:
        return {}
    wkt = next((text for text in (_wkt_of(about), str(crs)) if _WKT.match(text) and crs in (text, _short(text))), None)
    if wkt is None:
        return {"spatial_ref": crs} if isinstance(crs, str) else {}
    names = {"grid_mapping_name": "latitude_longitude"} if wkt.lstrip().startswith(_GEOGRAPHIC) else {}
    units = _UNIT.findall(wkt)
    return {"crs_wkt": wkt, "spatial_ref": wkt, **names, **({"_units": units[-1]} if units and not names else {})}


def _axis_attributes(axis: str, is_geographic: bool, unit: str | None) -> dict[str, Any]:
    if is_geographic:
        name = {"y": "latitude", "x": "longitude"}[axis]
        return {"axis": axis.upper(), "standard_name": name, "units": f"degrees_{'north' if axis == 'y' else 'east'}"}
    result = {"axis": axis.upper(), "standard_name": f"projection_{axis}_coordinate"}
    return result | ({"units": unit} if unit else {})


def _of_coordinates(coordinates: Coordinates, y: str, x: str, about: Mapping[str, Any]) -> Transform | None:
    """Return the transform of pixels whose centres have regular coordinates; None if they have none."""
    stated = _geo_transform(about)
    result = []
    for name, number in ((x, 0), (y, 4)):
        item = coordinates.get(name)
        if item is None or item.dimensions != (name,) or item.values.dtype.kind not in "iuf" or not item.values.size:
            return None
        values = item.values.astype(np.float64)
        if values.size == 1 and stated is None:
            return None
        step = (values[-1] - values[0]) / (values.size - 1) if values.size > 1 else stated[number] if stated else 0.0
        regular = values[0] + step * np.arange(values.size)
        if not step or not np.abs(values - regular).max() <= ROUNDING * abs(step):
            return None
        result.append((float(step), float(values[0] - step / 2), values.size))
    (a, c, columns), (e, f, rows) = result
    if stated is not None and not (stated[1] or stated[3]):
        # Coordinates are rounded: the stated transform, moved by whole pixels, is exact.
        column, row = round((c - stated[2]) / stated[0]), round((f - stated[5]) / stated[4])
        exact = [stated[0], 0.0, stated[2] + stated[0] * column, 0.0, stated[4], stated[5] + stated[4] * row]
        corners = [(exact[2] - c) / a, (exact[5] - f) / e]
        ends = [(exact[0] / a - 1) * columns, (exact[4] / e - 1) * rows]
        if max(map(abs, corners + ends)) <= ROUNDING:
            return exact
    return [a, 0.0, c, 0.0, e, f]


def transform_of(attributes: Mapping[str, Any]) -> Transform | None:
    """Return the attribute `transform`, None if there is none or it is no list of six numbers."""
    values = attributes.get("transform", attributes.get("spatial:transform"))
    if not isinstance(values, list | tuple) or len(values) != 6:
        return None
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return None


def _geo_transform(about: Mapping[str, Any]) -> Transform | None:
    text = about.get("GeoTransform")
    try:
        c, a, b, f, d, e = map(float, text.split() if isinstance(text, str) else text or ())
    except (TypeError, ValueError):
        return None
    return [a, b, c, d, e, f]


def shifted(transform: Transform, row: int, column: int) -> Transform:
    """Return the transform of a part of an image that begins at a row and a column."""
    a, b, c, d, e, f = transform
    return [a, b, c + a * column + b * row, d, e, f + d * column + e * row]


def reduced(attributes: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Return the attributes of an image that was reduced by a factor along rows and columns."""
    result = {key: value for key, value in attributes.items() if key not in ("rpcs", "gcps")}
    transform = transform_of(attributes)
    if transform is not None:
        a, b, c, d, e, f = transform
        result["transform"] = [a * factor, b * factor, c, d * factor, e * factor, f]
    return result


def part(
    attributes: Mapping[str, Any], coordinates: Coordinates, axes: Axes, names: Sequence[str], region: Region
) -> tuple[dict[str, Any], Coordinates]:
    """Return attributes and coordinates of a part of an array."""
    row, column = region[axes.y].start, region[axes.x].start
    result = dict(attributes)
    transform = transform_of(attributes)
    if transform is not None:
        result["transform"] = shifted(transform, row, column)
    if axes.c is not None:
        for key in BAND_LISTS & result.keys():
            if isinstance(result[key], list):
                result[key] = result[key][region[axes.c]]
    with_points = result.get("gcps")
    if isinstance(with_points, Mapping) and isinstance(with_points.get("features"), list):
        result["gcps"] = {**with_points, "features": [_moved(item, row, column) for item in with_points["features"]]}
    rpcs = result.get("rpcs")
    if isinstance(rpcs, Mapping):
        shifts = {"line_off": row, "samp_off": column}
        result["rpcs"] = {
            key: value - shifts.get(key, 0) if isinstance(value, int | float) else value for key, value in rpcs.items()
        }
    regions = dict(zip(names, region, strict=True))
    cut = {
        name: item._replace(values=item.values[tuple(regions.get(dim, slice(None)) for dim in item.dimensions)])
        for name, item in coordinates.items()
    }
    return result, cut


#: Attributes that are lists with an entry for each band.
BAND_LISTS = {"scales", "offsets", "long_name", "units", "band_tags", "colorinterp"}


def _moved(feature: Any, row: int, column: int) -> Any:
    """Return a ground control point of a part that begins at a row and a column."""
    if not isinstance(feature, Mapping) or not isinstance(feature.get("properties"), Mapping):
        return feature
    shifts = {"row": row, "col": column}
    properties = {
        key: value - shifts.get(key, 0) if isinstance(value, int | float) else value
        for key, value in feature["properties"].items()
    }
    return {**feature, "properties": properties}


def read(array: zarr.Array, names: Sequence[str]) -> Coordinates:
    """Return the coordinates beside an array; those that cannot be read are left out, with a warning."""
    parent, _ = parent_and_name(array.store_path)
    if parent is None:
        return {}
    texts = (array.attrs.get("coordinates"), array.attrs.get("grid_mapping"))
    listed = [name for text in texts if isinstance(text, str) for name in text.split()]
    result = {}
    for name in dict.fromkeys([*names, *listed]):
        try:
            item = _open(parent, name, array.metadata.zarr_format)
            if item is None:
                continue
            check_codecs(item)
            dimensions = _dimensions(item)
            sizes = dict(zip(names, array.shape, strict=True))
            if [sizes.get(name) for name in dimensions] != list(item.shape) or item.size > MAX_VALUES:
                continue  # something else of this name
            attributes = {key: value for key, value in item.attrs.asdict().items() if key != "_ARRAY_DIMENSIONS"}
            result[name] = Coordinate(dimensions, np.asarray(item[...]), attributes)
        except Exception as error:  # of a stranger's archive: pixels are read without
            warnings.warn(f"coordinate {name!r} beside {url_of(array.store_path)} is left out: {error}", stacklevel=3)
    return result


def _dimensions(array: Any) -> tuple[str, ...]:
    names: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    return tuple(map(str, names))


def _open(parent: StorePath, name: str, zarr_format: int) -> zarr.Array | None:
    if not name or "/" in name or "\\" in name or not name.strip("."):
        return None
    mode: Any = "r" if parent.store.read_only else "r+"  # "r" would reopen a store that can write
    try:
        return zarr.open_array(parent / name, mode=mode, zarr_format=zarr_format)  # type: ignore[arg-type]
    except FileNotFoundError:
        return None


def set_fill_value(attributes: dict[str, Any], nodata: Any, dtype: Any, zarr_format: int) -> None:
    """Set the attribute `_FillValue` as xarray writes it, so that it masks samples without data."""
    attributes.pop("_FillValue", None)
    if nodata is None or nodata == "NaN" or zarr_format == 2:  # there it is the fill value of the array
        return
    is_float = np.dtype(dtype).kind == "f"
    attributes["_FillValue"] = b64encode(pack("<d", nodata)).decode() if is_float else int(nodata)


def can_write(path: StorePath, coordinates: Coordinates, zarr_format: int, *, replace: bool = False) -> bool:
    """Tell whether coordinates can be beside an array.

    They cannot if the array is in no group, or others of these names are there. With `replace`, those may stay from an
    array that was replaced: they give way unless another array of the group has their dimensions.
    """
    parent, name = parent_and_name(path)
    if parent is None or not (path.path or is_in_group(path, zarr_format)):
        return False
    different = [key for key, item in coordinates.items() if _differs(parent, key, item, zarr_format)]
    if different and replace:
        mode: Any = "r" if parent.store.read_only else "r+"
        others: dict[str, Any] = dict(zarr.open_group(parent, mode=mode, zarr_format=zarr_format).arrays())  # type: ignore[arg-type]
        used: set[str] = set()
        for other, array in others.items():
            if other != name and other not in coordinates:
                used.update(
                    getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS", ())
                )
                used.update(str(array.attrs.get("coordinates", "")).split())
        different = [key for key in different if key in used]
    if different:
        warnings.warn(
            f"group {parent} has other coordinates {', '.join(different)}, of another image: array {name!r} has its "
            "place in its attributes only; store each scene in a group of its own, for coordinates beside it",
            stacklevel=4,
        )
    return not different


def _differs(parent: StorePath, name: str, item: Coordinate, zarr_format: int) -> bool:
    existing = _open(parent, name, zarr_format)
    if existing is None:
        return False
    if existing.shape != item.values.shape:
        return True
    keys = ("crs_wkt", "spatial_ref", "GeoTransform", "gcps", "units")
    same = all(existing.attrs.get(key) == item.attributes.get(key) for key in keys)
    return not same or not np.array_equal(np.asarray(existing[...]), item.values)


def references(coordinates: Coordinates, names: Sequence[str]) -> dict[str, Any]:
    """Return the attributes of an array that lead to coordinates beside it: `coordinates` and `grid_mapping`."""
    keys = {"crs_wkt", "spatial_ref", "GeoTransform", "gcps"}
    mapping = [name for name, item in coordinates.items() if keys & item.attributes.keys()]
    listed = [name for name in coordinates if name not in names]
    result = {"coordinates": " ".join(listed)} if listed else {}
    return result | ({"grid_mapping": mapping[0]} if mapping else {})


def write(path: StorePath, coordinates: Coordinates, zarr_format: int) -> None:
    """Write coordinates beside an array, where `can_write` allows it."""
    parent, _ = parent_and_name(path)
    if parent is None:
        return
    for name, item in coordinates.items():
        if _open(parent, name, zarr_format) is not None and not _differs(parent, name, item, zarr_format):
            continue
        dimensions: dict[str, Any] = {"dimension_names": list(item.dimensions)}
        if zarr_format == 2:
            dimensions = {"_ARRAY_DIMENSIONS": list(item.dimensions)}
        options: dict[str, Any] = {
            "name": f"{parent.path}/{name}" if parent.path else name,
            "shape": item.values.shape,
            "dtype": item.values.dtype,
            "chunks": tuple(max(1, size) for size in item.values.shape),
            "fill_value": None,  # xarray takes any other of format 2 for missing values
            "zarr_format": zarr_format,
            "overwrite": True,
            "attributes": dict(item.attributes) | (dimensions if zarr_format == 2 else {}),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that format 3 specifies no strings yet
            array = zarr.create_array(parent.store, **options, **({} if zarr_format == 2 else dimensions))
            array[...] = item.values
