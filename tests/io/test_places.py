"""Selections on a map: polygons, areas and items, against rasterio, the ellipsoid and the table of the selection."""

import json
from math import pi

import numpy as np
import pytest

from deepsic_codec import consolidate_labels, create_array, open_labels
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError, UnsupportedArray
from deepsic_codec.io import places
from deepsic_codec.stored import coordinates
from deepsic_codec.stored.coordinates import Coordinate
from tests.common import check_rejects
from tests.labels.common import archive, fill, payload, put

pytestmark = pytest.mark.usefixtures("stub")
UTM = {"crs": "EPSG:32632", "transform": [10.0, 0.0, 440_000.0, 0.0, -10.0, 5_300_000.0]}
EARTH = 510_065_621.724 * 100  # hectares of the ellipsoid of WGS84


def labelled(attributes=UTM, **kwargs):
    array = archive(**({"shape": (200, 250, 3)} | kwargs))
    array.attrs.update(attributes)
    fill(array, seed=5, missing=0.2, unlabelled=0.1)
    return consolidate_labels(array)


def degrees(attributes, y, x):
    from rasterio.warp import transform

    a, b, c, d, e, f = attributes["transform"]
    longitude, latitude = transform(attributes["crs"], "EPSG:4326", [a * x + b * y + c], [d * x + e * y + f])
    return longitude[0], latitude[0]


def ring_area(ring):
    x, y = np.array(ring).T
    return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2


@pytest.mark.parametrize("tiles", [True, False])
def test_features_are_the_regions_of_the_selection(tmp_path, tiles):
    labels = labelled()
    selection = labels.where("Visible > 0.3", tiles=tiles)
    places.write_geojson(selection, tmp_path / "a.geojson")
    document = json.loads((tmp_path / "a.geojson").read_text())
    assert document["type"] == "FeatureCollection" and len(document["features"]) == len(selection.regions) > 2
    table = selection.to_table()
    for number, (feature, (y, x, _)) in enumerate(zip(document["features"], selection.regions, strict=True)):
        (ring,) = feature["geometry"]["coordinates"]
        corners = [degrees(UTM, *at) for at in ((y.start, x.start), (y.stop, x.start), (y.stop, x.stop))]
        np.testing.assert_allclose(ring[:3], corners, atol=1e-7)
        assert ring[0] == ring[-1] and ring_area(ring) > 0
        about = feature["properties"]
        assert [about["y_start"], about["x_stop"]] == [y.start, x.stop]
        assert about["score_Visible"] == pytest.approx(table["score_Visible"][number], abs=1e-4)
        assert about["score_Visible"] > 0.3 and about["chunk"] == f"{y.start // 128}.{x.start // 128}.0"
        assert about["label"] in labels.vocabulary.names


def test_geographic_imagery_needs_no_projection(monkeypatch):
    monkeypatch.setattr("deepsic_codec.require.find_spec", lambda name: None)
    labels = labelled({"crs": "EPSG:4326", "transform": [0.01, 0.0, 179.0, 0.0, -0.01, 10.0]})
    cut = [one for one in places.polygons(labels.where("Dark >= 0", tiles=True)) if one["type"] == "MultiPolygon"]
    for one in cut:
        west, east = sorted((min(x), max(x)) for x in ([p[0] for p in part[0]] for part in one["coordinates"]))
        assert west[0] == -180 and east[1] == 180 and west[1] - west[0] + east[1] - east[0] == pytest.approx(0.64)
        assert all(ring_area(part[0]) > 0 for part in one["coordinates"])
    assert 1 <= len(cut) <= 4


def test_projected_imagery_across_the_antimeridian_and_around_a_pole():
    labels = labelled({"crs": "EPSG:32660", "transform": [500.0, 0.0, 700_000.0, 0.0, -500.0, 5_000_000.0]})
    kinds = {one["type"] for one in places.polygons(labels.where("Dark >= 0", tiles=True))}
    assert kinds == {"Polygon", "MultiPolygon"}
    labels = labelled(
        {"crs": "EPSG:3413", "transform": [1000.0, 0.0, -32_000.0, 0.0, -1000.0, 32_000.0]}, shape=(64, 64, 3)
    )
    (polar,) = places.polygons(labels.where("Dark >= 0", tiles=True))
    points = np.array(
        [point for part in polar["coordinates"] for point in part[0]]
        if polar["type"] == "MultiPolygon"
        else polar["coordinates"][0]
    )
    assert points[:, 1].max() == 90 and np.ptp(points[:, 0]) == 360 and points[:, 1].min() > 89
    assert places.tile_areas(labels)[0, 0] == pytest.approx(64**2 * 100 / 0.9698**2, rel=1e-3)  # scale at the pole


def test_what_cannot_be_projected_has_no_polygon(tmp_path):
    about = {"crs": "EPSG:3035", "transform": [10.0, 0.0, 2e7, 0.0, -10.0, 2e7]}
    selection = labelled(about).where("Dark >= 0")
    assert set(map(str, places.polygons(selection))) == {"None"}
    places.write_geoparquet(selection, tmp_path / "a.parquet")
    assert np.isnan(places.tile_areas(open_labels(selection.stored.array))).all()
    assert places.areas(open_labels(selection.stored.array))["Dark"] == 0


@pytest.mark.parametrize(
    ("rows", "north"), [(180, 90.0), (181, 90.5)], ids=["corners at the poles", "centres at the poles"]
)
def test_all_tiles_together_cover_the_ellipsoid(rows, north, monkeypatch):
    monkeypatch.setattr(places, "STEP", 100_000.0)  # parts of five times the size: quick
    whole = {"crs": "EPSG:4326", "transform": [1.0, 0.0, -180.0, 0.0, -1.0, north]}
    assert places.tile_areas(labelled(whole, shape=(rows, 360, 3))).sum() == pytest.approx(EARTH, rel=1e-4)


def test_areas_on_the_ellipsoid():
    # A degree at 60 degrees north, from the closed form of a zone of the ellipsoid.
    degree = {"crs": "EPSG:4326", "transform": [1 / 64, 0.0, 7.0, 0.0, -1 / 64, 61.0]}
    (row,) = places.tile_areas(labelled(degree, shape=(64, 128, 3)))
    assert row.tolist() == pytest.approx([zone(60, 61) / 360] * 2, rel=1e-5)
    # Near the central meridian of UTM, a map of 100 hectares shows 100 / 0.9996 ** 2.
    utm = {"crs": "EPSG:32632", "transform": [15.625, 0.0, 500_000.0, 0.0, -15.625, 5_300_000.0]}
    assert places.tile_areas(labelled(utm, shape=(64, 64, 3))).item() == pytest.approx(100 / 0.9996**2, rel=1e-6)
    # Web Mercator stretches by 1 / cos(latitude), about.
    web = {"crs": "EPSG:3857", "transform": [10.0, 0.0, 0.0, 0.0, -10.0, 8_399_737.9]}
    assert places.tile_areas(labelled(web, shape=(64, 64, 3))).item() == pytest.approx(40.96 / 4, rel=0.01)


def zone(south, north):
    """Hectares between two latitudes."""
    e = np.sqrt(places.FLATTENING * (2 - places.FLATTENING))

    def half(latitude):
        s = np.sin(np.radians(latitude))
        return s / (2 * (1 - e**2 * s**2)) + np.log((1 + e * s) / (1 - e * s)) / (4 * e)

    return 2 * pi * places.SEMIMAJOR**2 * (1 - e**2) * (half(north) - half(south)) / 1e4


def test_areas_of_classes_are_those_of_their_tiles():
    labels = labelled(shape=(3, 200, 250), chunks=(2, 128, 128), axes="tyx")
    hectares = places.areas(labels)
    each = places.tile_areas(labels)
    for name in ("Dark", "Visible"):
        expected = [np.nansum(np.where(plane >= 128 / 255 - 1e-6, each, 0)) for plane in labels.map(name)]
        assert hectares[name].tolist() == pytest.approx(expected) and sum(expected) > 0


def test_geoparquet_has_the_table_and_the_polygons(tmp_path):
    io = pytest.importorskip("arro3.io")
    labels = labelled(shape=(3, 200, 250), chunks=(2, 128, 128), axes="tyx")
    selection = labels.where("Dark", tiles=True)
    times = Coordinate(("t",), np.array([0, 31, 59]), {"units": "days since 2024-01-01"})
    coordinates.write(labels.array.store_path, {"t": times}, 3)
    places.write_geoparquet(selection, tmp_path / "a.parquet")
    table = io.read_parquet(str(tmp_path / "a.parquet")).read_all()
    about = json.loads(table.schema.metadata[b"geo"])
    assert about["primary_column"] == "geometry" and about["columns"]["geometry"]["geometry_types"] == ["Polygon"]
    polygons = places.polygons(selection)
    for data, polygon in zip(table["geometry"].to_pylist(), polygons, strict=True):
        assert data[:13] == np.array([1], "u1").tobytes() + np.array([3, 1, 5], "<u4").tobytes()
        np.testing.assert_array_equal(np.frombuffer(data[13:], "<f8").reshape(-1, 2), polygon["coordinates"][0])
    dates = {0: "2024-01-01", 1: "2024-02-01", 2: "2024-02-29"}
    assert [str(one)[:10] for one in table["date"].to_pylist()] == [dates[tile[0]] for tile in selection.tiles.tolist()]
    assert table["label"].to_pylist() == selection.to_table()["label"].tolist()
    np.testing.assert_array_equal(table["score_Dark"].to_numpy(), selection.scores()["Dark"])


def test_items_have_the_fields_of_the_label_extension():
    selection = labelled().where("Dark", tiles=True)
    check_rejects(ConfigurationError, "time|pass when", places.stac_item, selection, "a.geojson")
    check_rejects(ConfigurationError, "ISO 8601", places.stac_item, selection, "a.geojson", time="June")
    item = json.loads(json.dumps(places.stac_item(selection, "a.geojson", time="2024-06-30"), allow_nan=False))
    about = item["properties"]
    assert about["datetime"] == "2024-06-30T00:00:00Z" and about["label:type"] == "vector"
    assert about["label:classes"][0]["classes"] == ["Dark", "Dim", "Bright", "unknown"]
    counts = {one["name"]: one["count"] for one in about["label:overviews"][0]["counts"]}
    assert sum(counts.values()) == len(selection.tiles)
    west, south, east, north = item["bbox"]
    corner = degrees(UTM, 0, 0)
    assert west <= corner[0] <= east and south <= corner[1] <= north
    assert item["assets"]["labels"]["type"] == "application/geo+json" and about["proj:code"] == "EPSG:32632"


@pytest.mark.parametrize(
    ("attributes", "error", "words"),
    [
        ({}, UnsupportedArray, "crs|transform|GeoTIFF"),
        ({"crs": "EPSG:32632"}, UnsupportedArray, "transform"),
        ({**UTM, "transform": [float("nan")] * 6}, UnsupportedArray, "transform"),
        ({**UTM, "crs": "file:///etc/passwd"}, ConfigurationError, "crs"),
    ],
)
def test_arrays_without_a_place(attributes, error, words, tmp_path):
    selection = labelled(attributes).where("Dark")
    for call in (places.write_geojson, places.write_geoparquet):
        check_rejects(error, words, call, selection, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_names_of_classes_are_data(tmp_path):
    array = archive(shape=(64, 64, 3), chunks=(64, 64, 3))
    name = 'a"</script>,'
    array.attrs["deepsic"] = {**array.attrs["deepsic"], "vocabulary": {"classes": [name, "b", "c"], "head": "cd" * 32}}
    array.attrs.update(UTM)
    put(array, (0, 0, 0), payload(array, np.full((1, 1, 1, 4), 200, "u1")))
    labels = consolidate_labels(array)
    places.write_geojson(labels.where(f"'{name}'"), tmp_path / "a.geojson")
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert feature["properties"]["label"] == name and feature["properties"][f"score_{name}"] == pytest.approx(
        200 / 255, abs=1e-4
    )


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = np.full((128, 200, 3), 200, "u1")
    consolidate_labels(create_array("a.zarr", name="img", data=image, chunks=(64, 64, 3), attributes=UTM))
    options = ["--geojson", "a.geojson", "--geoparquet", "a.parquet", "--stac", "a.json", "--time", "2024-06-30"]
    assert main(["query", "a.zarr", "Bright", "--tiles", *options]) == 0
    out, err = capsys.readouterr()
    assert "6 of 8 chunks" in out and err.count("6 polygons") == 2 and "STAC item: a.json" in err
    assert json.loads((tmp_path / "a.json").read_text())["assets"]["labels"]["href"] == "a.geojson"
    assert main(["query", "a.zarr", "Bright", "--stac", "a.json"]) == 2
    assert "--geojson" in capsys.readouterr().err
    assert main(["labels", "a.zarr", "--areas"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Bright"))
    assert float(line.split()[3]) == pytest.approx(6 * 40.96, rel=0.002)
    assert main(["labels", "a.zarr", "--areas", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hectares"]["Dark"] == pytest.approx(2 * 5.12, rel=0.002)
