"""Selections on a map: polygons in GeoJSON and GeoParquet, items of STAC, and areas on the ground."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError, LabelIndexError, UnsupportedArray
from deepsic_codec.io import georeference
from deepsic_codec.io.temporary import complete_only
from deepsic_codec.labels.index import FEATURES, HEADER
from deepsic_codec.labels.query import SUMMARY_SCORE, Labels
from deepsic_codec.labels.selection import Selection
from deepsic_codec.payload.limits import check_memory
from deepsic_codec.require import require
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.coordinates import transform_of
from deepsic_codec.stored.location import url_of

Numbers = NDArray[np.float64]

LONGITUDE_LATITUDE = ("EPSG:4326", "OGC:CRS84")  # reference systems with the coordinates of GeoJSON
SEMIMAJOR, FLATTENING = 6378137.0, 1 / 298.257223563  # of the ellipsoid of WGS84; metres
DEGREE = 111_320.0  # metres, at the equator
STEP = 20_000.0  # metres: larger tiles are divided before their area is measured
MAX_DIVISIONS = 1024  # of a tile along an axis
POINTS = 1 << 20  # transformed at a time
DECIMALS = 7  # of coordinates in degrees: a centimetre
NODE_BYTES = 100  # of memory that a corner of a tile takes
HECTARE = 10_000.0  # square metres
LABEL_EXTENSION = "https://stac-extensions.github.io/label/v1.0.1/schema.json"
PROJECTION_EXTENSION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
STAC_VERSION = "1.1.0"


@dataclass(frozen=True)
class Georeference:
    """The map from pixels of an array to longitude and latitude on the ellipsoid of WGS84.

    Attributes
    ----------
    transform : list of float
        Affine map from pixels to the reference system, as `deepsic_codec.io.georeference` describes it.
    crs : Any
        The reference system: one of `LONGITUDE_LATITUDE`, or an object of rasterio.
    code : str
        The reference system as the attributes of the array have it.
    """

    transform: list[float]
    crs: Any
    code: str

    @property
    def is_geographic(self) -> bool:
        """Whether coordinates of the reference system are longitude and latitude of WGS84."""
        return self.crs in LONGITUDE_LATITUDE

    @classmethod
    def of(cls, stored: StoredArray) -> "Georeference":
        """Return the georeference of an array.

        Raises
        ------
        UnsupportedArray
            If the array has no reference system or no transform.
        ConfigurationError
            If its reference system is none.
        MissingPackage
            If rasterio is needed and not installed.
        """
        attributes, _ = stored.described
        transform, code = transform_of(attributes), attributes.get("crs")
        if transform is None or not code or not np.isfinite(transform).all():
            raise UnsupportedArray(
                f"array {url_of(stored.array.store_path)} does not say where it lies; ingest a GeoTIFF, or set its "
                'attributes crs (such as "EPSG:32632") and transform ([a, b, c, d, e, f])'
            )
        if code in LONGITUDE_LATITUDE:
            return cls(transform, code, code)
        require("geo", "rasterio", purpose=f"reprojecting {str(code)[:80]!r}")
        return cls(transform, georeference.parse_crs(code), str(code))

    def degrees(self, rows: Numbers, columns: Numbers) -> Numbers:
        """Return longitudes and latitudes of corners of pixels, float64 (..., 2); NaN where there are none."""
        a, b, c, d, e, f = self.transform
        x, y = a * columns + b * rows + c, d * columns + e * rows + f
        if self.is_geographic:  # pixels whose centres are poles reach beyond them
            return np.stack([x, np.clip(y, -90, 90)], axis=-1)
        result = np.full((*x.shape, 2), np.nan)
        flat, xs, ys = result.reshape(-1, 2), x.ravel(), y.ravel()
        for start in range(0, len(xs), POINTS):
            self._project(xs, ys, flat, start, min(start + POINTS, len(xs)))
        result[~np.isfinite(result).all(axis=-1)] = np.nan
        return result

    def _project(self, x: Numbers, y: Numbers, degrees: Numbers, start: int, stop: int) -> None:
        """Set a part of `degrees` to longitudes and latitudes; points that cannot be projected stay as they are."""
        from rasterio.warp import transform

        try:
            degrees[start:stop] = np.array(transform(self.crs, "OGC:CRS84", x[start:stop], y[start:stop])).T
        except Exception:  # of GDAL, of a private module of rasterio: one point fails all
            if stop - start > 1:
                middle = (start + stop) // 2
                self._project(x, y, degrees, start, middle)
                self._project(x, y, degrees, middle, stop)


def polygons(selection: Selection) -> list[dict[str, Any] | None]:
    """Return where the regions of a selection lie.

    Parameters
    ----------
    selection : Selection
        Of an array with a reference system and a transform.

    Returns
    -------
    list of (dict or None)
        Geometries of GeoJSON, in the order of `selection.regions`: longitude and latitude of WGS84, counterclockwise.
        A region across the antimeridian is cut there. None for a region outside of what the reference system can
        project.

    Raises
    ------
    UnsupportedArray, ConfigurationError, MissingPackage
        As `Georeference.of`.
    """
    return _polygons(selection, Georeference.of(selection.stored))


def _polygons(selection: Selection, place: Georeference) -> list[dict[str, Any] | None]:
    axes = selection.geometry.axes
    starts, stops = selection.geometry.bounds(selection.cells, tiles=selection.by_tiles)
    check_memory(NODE_BYTES * 4 * len(starts), "polygons of a selection", LabelIndexError)
    top, left, bottom, right = starts[:, axes.y], starts[:, axes.x], stops[:, axes.y], stops[:, axes.x]
    rows, columns = np.stack([top, bottom, bottom, top], axis=1), np.stack([left, left, right, right], axis=1)
    # Regions that share a place, as those of several dates do, share its geometry.
    _, first, number = np.unique(
        np.concatenate([rows, columns], axis=1), axis=0, return_index=True, return_inverse=True
    )
    geometries = _geometries(place, rows[first], columns[first])
    return [geometries[i] for i in number.ravel().tolist()]


def _geometries(place: Georeference, rows: NDArray[Any], columns: NDArray[Any]) -> list[dict[str, Any] | None]:
    """Return the geometries of regions, of whose corners these are the rows and columns, (regions, 4)."""
    rings = place.degrees(rows.astype(np.float64), columns.astype(np.float64))
    return [_geometry(ring if place.is_geographic else _unwound(ring)) for ring in rings]


def _unwound(ring: Numbers) -> Numbers:
    """Return a ring (points, 2) in degrees whose points follow one another around the Earth.

    Longitudes go beyond 180 where the ring crosses the antimeridian. A ring around a pole gets the pole, too.
    """
    longitude, latitude = ring.T
    steps = (np.diff(longitude, append=longitude[0]) + 180) % 360 - 180
    ring = np.stack([longitude[0] + np.cumsum([0, *steps[:-1]]), latitude], axis=-1)
    turn = steps.sum()
    if not abs(turn) > 1:
        return ring
    pole, (x, y) = np.sign(latitude.mean()) * 90, ring[0]
    return np.array([*ring, [x + turn, y], [x + turn, pole], [x, pole]])


def _geometry(ring: Numbers) -> dict[str, Any] | None:
    """Return the geometry of a ring (points, 2) in degrees, cut at the antimeridian; None if it has points nowhere."""
    if not np.isfinite(ring).all():
        return None
    if _signed_area(ring) < 0:
        ring = ring[::-1]
    parts = []
    for shift in (-360.0, 0.0, 360.0):
        part = _clipped(_clipped(ring + [shift, 0], 180.0), -180.0)
        if len(part) >= 3 and abs(_signed_area(part)) > 0:
            points = np.round(part, DECIMALS).tolist()
            parts.append([[*points, points[0]]])
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts} if parts else None


def _signed_area(ring: Numbers) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def _clipped(ring: Numbers, meridian: float) -> Numbers:
    """Return the part of a ring on this side of the meridian 180 or -180."""
    points: list[Any] = []
    side = np.sign(meridian) * (meridian - ring[:, 0]) if len(ring) else ring[:, :0]
    for k in range(len(ring)):
        previous, current = ring[k - 1], ring[k]
        if side[k - 1] * side[k] < 0:
            points.append(previous + (current - previous) * side[k - 1] / (side[k - 1] - side[k]))
        if side[k] >= 0:
            points.append(current)
    return np.array(points).reshape(-1, 2)


def tile_areas(labels: Labels) -> Numbers:
    """Return the area on the ground of each label tile, as far as it lies within the array.

    Parameters
    ----------
    labels : Labels
        Of an array with a reference system and a transform.

    Returns
    -------
    ndarray
        Hectares on the ellipsoid of WGS84, float64 (tiles along y, tiles along x), whatever the reference system. NaN
        for a tile outside of what the reference system can project.

    Raises
    ------
    UnsupportedArray, ConfigurationError, MissingPackage
        As `Georeference.of`.
    """
    geometry, place = labels.geometry, Georeference.of(labels.stored)
    edges = []
    for axis in (geometry.axes.y, geometry.axes.x):
        edges.append(np.append(geometry.starts(axis), geometry.shape[axis]).astype(np.float64))
    rows, columns = edges
    check_memory(NODE_BYTES * len(rows) * len(columns), "areas of all tiles", LabelIndexError)
    corners = _earth_centred(place.degrees(rows[:, None] + 0 * columns, columns + 0 * rows[:, None]))
    result = _quadrilaterals(corners)
    # A large tile is curved: its parts are measured.
    longest = np.linalg.norm(corners[1:, 1:] - corners[:-1, :-1], axis=-1)
    if place.is_geographic:  # where one may go around the Earth
        longest = np.full_like(longest, DEGREE * max(np.abs(place.transform)[[0, 1, 3, 4]]) * max(geometry.tile))
    for row, column in np.argwhere(~(longest <= STEP)).tolist():
        size = longest[row, column]
        count = min(MAX_DIVISIONS, ceil(size / STEP)) if np.isfinite(size) else 1
        y = np.linspace(rows[row], rows[row + 1], count + 1)
        x = np.linspace(columns[column], columns[column + 1], count + 1)
        inner = _earth_centred(place.degrees(y[:, None] + 0 * x, x + 0 * y[:, None]))
        result[row, column] = _quadrilaterals(inner).sum()
    return result / HECTARE


def _earth_centred(degrees: Numbers) -> Numbers:
    """Return points on the ellipsoid as coordinates in metres from the centre of the Earth, (..., 3)."""
    longitude, latitude = np.moveaxis(np.radians(degrees), -1, 0)
    squared = FLATTENING * (2 - FLATTENING)
    normal = SEMIMAJOR / np.sqrt(1 - squared * np.sin(latitude) ** 2)
    flat = normal * np.cos(latitude)
    z = normal * (1 - squared) * np.sin(latitude)
    return np.stack([flat * np.cos(longitude), flat * np.sin(longitude), z], axis=-1)


def _quadrilaterals(corners: Numbers) -> Numbers:
    """Return the areas of the cells of a grid of points (rows, columns, 3)."""
    down, up = corners[1:, 1:] - corners[:-1, :-1], corners[:-1, 1:] - corners[1:, :-1]
    return np.linalg.norm(np.cross(down, up), axis=-1) / 2


def areas(labels: Labels) -> dict[str, Numbers]:
    """Return the area that each class and parent covers: that of the label tiles in which it scores at least 0.5.

    Areas of classes overlap where a tile has several of them. Pixels without data count with their tile.

    Parameters
    ----------
    labels : Labels
        Of an array with a reference system and a transform.

    Returns
    -------
    dict of str to ndarray
        Hectares, float64 (slice axes of the array): a single number without such axes, one for each date with axis t.

    Raises
    ------
    UnsupportedArray, ConfigurationError, MissingPackage
        As `Georeference.of`.
    """
    geometry = labels.geometry
    axes = geometry.axes
    hectares = np.nan_to_num(tile_areas(labels))
    order = [axes.index(axis) for axis in axes.slice_axes + "yx"]
    bands = tuple(axis for axis in range(len(axes)) if axis not in order)
    (source,) = labels.index.read([(labels.index.source, (...,))])
    labelled = geometry.spread((source == HEADER) | (source == FEATURES))
    threshold = ceil(SUMMARY_SCORE * 255)
    result = {}
    for row, name in enumerate(labels.vocabulary.known):
        (scores,) = labels.index.read([(labels.index.tile_scores, (row,))])
        hits = ((scores >= threshold) & labelled).transpose(*order, *bands)
        hits = hits.any(axis=tuple(range(len(order), hits.ndim)))
        result[name] = np.einsum("...yx,yx->...", hits, hectares)
    return result


def _properties(selection: Selection) -> Iterator[dict[str, Any]]:
    """Yield the properties of each region: the row of its table."""
    table = selection.to_table()
    for values in zip(*(_plain(column) for column in table.values()), strict=True):
        yield dict(zip(table, values, strict=True))


def _plain(column: NDArray[Any]) -> list[Any]:
    """Return the values of a column as JSON has them."""
    if column.dtype.kind == "M":
        return [None if np.isnat(time) else f"{time}Z" for time in column]
    if column.dtype.kind == "f":
        return [None if np.isnan(value) else round(float(value), 4) for value in column]
    return column.tolist()


def write_geojson(selection: Selection, path: Any) -> None:
    """Write the regions of a selection as a GeoJSON file: polygons in longitude and latitude of WGS84 (RFC 7946).

    Each feature has the row of `Selection.to_table` as its properties.

    Parameters
    ----------
    selection : Selection
        Of an array with a reference system and a transform. `tiles=True` makes features of label tiles.
    path : path
        The file; it is replaced when the new one is complete.

    Raises
    ------
    UnsupportedArray, ConfigurationError, MissingPackage
        As `Georeference.of`.
    """
    geometries = polygons(selection)
    with complete_only(Path(path), "file") as partial, partial.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, (geometry, properties) in enumerate(zip(geometries, _properties(selection), strict=True)):
            feature = {"type": "Feature", "geometry": geometry, "properties": properties}
            file.write(f"{',' if number else ''}\n{json.dumps(feature, allow_nan=False)}")
        file.write("\n]}\n")


def write_geoparquet(selection: Selection, path: Any) -> None:
    """Write the regions of a selection as a GeoParquet file: polygons in longitude and latitude of WGS84.

    Columns are those of `Selection.to_table`, and `geometry`. Takes the arguments of `write_geojson`, and raises its
    errors; also MissingPackage without arro3.
    """
    require("geo", "arro3.core", "arro3.io")
    import arro3.io
    from arro3.core import Array, DataType, Table

    geometries = polygons(selection)
    columns: dict[str, Any] = {}
    for name, values in selection.to_table().items():
        if values.dtype.kind == "M":
            numbers = Array.from_numpy(values.astype("M8[us]").astype(np.int64))
            columns[name] = numbers.cast(DataType.timestamp("us", tz="UTC"))
        elif values.dtype.kind == "U":
            columns[name] = Array(values.tolist(), DataType.string())
        else:
            columns[name] = Array.from_numpy(values)
    columns["geometry"] = Array([_wkb(one) for one in geometries], DataType.binary())
    about: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({one["type"] for one in geometries if one}),
        "orientation": "counterclockwise",
    }
    box = _box(geometries)
    if box is not None:
        about["bbox"] = box
    document = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": about}}
    with complete_only(Path(path), "file") as partial:
        metadata = {"geo": json.dumps(document)}
        arro3.io.write_parquet(Table.from_pydict(columns), str(partial), key_value_metadata=metadata)


def _wkb(geometry: Mapping[str, Any] | None) -> bytes | None:
    """Return a polygon or several as well-known binary."""
    if geometry is None:
        return None

    def polygon(rings: Sequence[Any]) -> bytes:
        parts = [np.array([3, len(rings)], "<u4").tobytes()]
        for ring in rings:
            parts += [np.array([len(ring)], "<u4").tobytes(), np.array(ring, "<f8").tobytes()]
        return b"\1" + b"".join(parts)

    if geometry["type"] == "Polygon":
        return polygon(geometry["coordinates"])
    several = geometry["coordinates"]
    return b"\1" + np.array([6, len(several)], "<u4").tobytes() + b"".join(map(polygon, several))


def _box(geometries: Sequence[Mapping[str, Any] | None]) -> list[float] | None:
    """Return west, south, east and north of geometries; None of none."""
    points = [
        point
        for one in geometries
        if one is not None
        for part in (one["coordinates"] if one["type"] == "MultiPolygon" else [one["coordinates"]])
        for point in part[0]
    ]
    return [*np.min(points, axis=0).tolist(), *np.max(points, axis=0).tolist()] if points else None


def stac_item(selection: Selection, href: str, *, name: str | None = None, time: str | None = None) -> dict[str, Any]:
    """Return a STAC item that describes the labels of a selection, with the fields of the label extension.

    Parameters
    ----------
    selection : Selection
        Of an array with a reference system and a transform.
    href : str
        Where the file of `write_geojson` or `write_geoparquet` is or will be.
    name : str, optional
        Identifier of the item; by default the name of the array and the expression.
    time : str, optional
        When the imagery was taken, in ISO 8601; by default the first and last time of the selection along axis t.

    Returns
    -------
    dict
        The item, in JSON types.

    Raises
    ------
    ConfigurationError
        Without a time, or for one that is not in ISO 8601.
    UnsupportedArray, ConfigurationError, MissingPackage
        As `Georeference.of`.
    """
    stored, place = selection.stored, Georeference.of(selection.stored)
    axes, shape = stored.axes, stored.shape
    height, width = shape[axes.y], shape[axes.x]
    rows, columns = np.array([[0, height, height, 0]]), np.array([[0, 0, width, width]])
    (footprint,) = _geometries(place, rows, columns)
    table = selection.to_table()
    text = f"chunks and label tiles that show {selection.expression}"
    counts = {label: int(count) for label, count in zip(*np.unique(table["label"], return_counts=True), strict=True)}
    properties: dict[str, Any] = {
        **_times(time, table.get("date")),
        "label:properties": ["label"],
        "label:classes": [{"name": "label", "classes": list(selection.index.vocabulary.names)}],
        "label:description": text,
        "label:type": "vector",
        "label:tasks": ["classification"],
        "label:methods": ["automated"],
        "label:overviews": [
            {"property_key": "label", "counts": [{"name": str(k), "count": n} for k, n in counts.items() if k]}
        ],
        "proj:shape": [height, width],
        "proj:transform": [*place.transform, 0.0, 0.0, 1.0],
    }
    if ":" in place.code and len(place.code) < 32:
        properties["proj:code"] = place.code
    is_parquet = href.lower().endswith((".parquet", ".geoparquet"))
    media = "application/vnd.apache.parquet" if is_parquet else "application/geo+json"
    url = url_of(stored.array.store_path)
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [LABEL_EXTENSION, PROJECTION_EXTENSION],
        "id": name or f"{stored.array.basename or 'array'}: {selection.expression}",
        "geometry": footprint,
        **({"bbox": _box([footprint])} if footprint is not None else {}),
        "properties": properties,
        "links": [],
        "assets": {
            "labels": {"href": href, "type": media, "title": text, "roles": ["data"]},
            "imagery": {"href": url, "type": "application/vnd+zarr", "title": "labelled array", "roles": ["source"]},
        },
    }


def _times(time: str | None, dates: NDArray[np.datetime64] | None) -> dict[str, Any]:
    """Return the properties of an item that say when."""
    if time is not None:
        try:
            moment = datetime.fromisoformat(time)
        except ValueError:
            raise ConfigurationError(f"time: expected ISO 8601 such as 2024-06-30, got {time!r}") from None
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        return {"datetime": moment.isoformat().replace("+00:00", "Z")}
    known = np.zeros(0, "M8[s]") if dates is None else dates[~np.isnat(dates)]
    if not len(known):
        raise ConfigurationError("time: the array has no coordinate of times; pass when the imagery was taken")
    first, last = f"{known.min()}Z", f"{known.max()}Z"
    return {"datetime": first if first == last else None, "start_datetime": first, "end_datetime": last}
