"""Zarr groups come in whole: values without data, coordinates, arrays that the codec cannot store, attributes."""

import base64
import json
import struct

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, create_array
from deepsic_codec.cli.main import main
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io.ingest import declared_nodata
from deepsic_codec.io.sources import open_sources, stack
from deepsic_codec.io.zarr_source import missing_values
from tests.common import check_rejects, photograph

da = pytest.importorskip("dask.array")
pytestmark = pytest.mark.usefixtures("stub")


def hole(dtype="i2", nodata=-9999):
    values = photograph(70, 90).astype(dtype) * 10
    values[10:30, 20:60] = nodata
    return values


def ingest(*args):
    return main(["ingest", *map(str, args)])


WAYS = {  # arguments of create_array: format, dtype, fill value, attributes; what means no data
    "_FillValue": (3, "i2", 0, {"_FillValue": -9999}, [-9999]),
    "_FillValue, format 2": (2, "i2", None, {"_FillValue": -9999}, [-9999]),
    "fill value, format 2": (2, "i2", -9999, {}, [-9999]),
    "fill value, format 3": (3, "i2", -9999, {}, [-9999]),
    "missing_value": (3, "i2", 0, {"missing_value": -9999}, [-9999]),
    "two values": (3, "i2", 0, {"_FillValue": -9999, "missing_value": [-9999, -1]}, [-9999, -1]),
    "nodata": (3, "i2", 0, {"nodata": -9999.0}, [-9999]),
    "nodatavals": (3, "i2", 0, {"nodatavals": [-9999, -9999]}, [-9999]),
    "text": (3, "i2", 0, {"_FillValue": "-9999"}, [-9999]),
    "float in base 64": (3, "f4", 0, {"_FillValue": base64.b64encode(struct.pack("<d", -9999)).decode()}, [-9999]),
    "float of format 2": (2, "f4", -9999.0, {}, [-9999]),
    "NaN and a number": (3, "f4", float("nan"), {"missing_value": -9999}, [-9999, "NaN"]),
    "a value of another dtype": (3, "u1", 0, {"_FillValue": -9999}, []),
    "nothing": (3, "i2", 0, {}, []),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_zarr_to_say_no_data(tmp_path, way):
    zarr_format, dtype, fill_value, attributes, expected = WAYS[way]
    values = hole(dtype, expected[0] if expected else 7)
    if expected[1:]:
        values[40, 40] = float(expected[1])
    group = zarr.open_group(tmp_path / "in.zarr", mode="w", zarr_format=zarr_format)
    options = {"dimension_names": ["y", "x"]} if zarr_format == 3 else {}
    if zarr_format == 2:
        attributes = {**attributes, "_ARRAY_DIMENSIONS": ["y", "x"]}
    array = group.create_array(
        "red", shape=values.shape, dtype=dtype, fill_value=fill_value, attributes=attributes, **options
    )
    array[...] = values
    assert ["NaN" if value != value else value for value in missing_values(array)] == expected
    (source,) = open_sources([tmp_path / "in.zarr"])
    assert declared_nodata(source) == (expected[0] if expected else None)
    result = source.values.compute()
    missing = np.isnan(values)
    for value in expected:
        missing |= values == float(value)
    if expected:
        np.testing.assert_array_equal(result == expected[0], missing)
    np.testing.assert_array_equal(result[~missing], values[~missing])
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr", "--max-error", "1") == 0
    stored = zarr.open_array(tmp_path / "out.zarr", path="red", mode="r")
    if expected:
        np.testing.assert_array_equal(stored[...] == expected[0], missing)


def test_nodata_of_an_archive_survives(tmp_path):
    create_array(tmp_path / "in.zarr", name="red", data=hole(), codec=DeepSIC(axes="yx", nodata=-9999))
    (source,) = open_sources([tmp_path / "in.zarr"])
    assert declared_nodata(source) == -9999


def test_nan_beside_a_nodata_value_becomes_that_value(tmp_path, capsys):
    values = hole("f4")
    values[50, 60], values[51, 60] = np.nan, np.inf
    zarr.create_array(tmp_path / "in.zarr", data=values, dimension_names=["y", "x"], attributes={"_FillValue": -9999})
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr", "--name", "red", "--max-error", 1) == 0
    stored = zarr.open_array(tmp_path / "out.zarr", path="red", mode="r")[...]
    np.testing.assert_array_equal(stored == -9999, (values == -9999) | ~np.isfinite(values))
    assert ingest(tmp_path / "in.zarr", tmp_path / "two.zarr", "--nodata", "nan", "--max-error", 1) == 2
    assert "-9999" in capsys.readouterr().err and not (tmp_path / "two.zarr").exists()


@pytest.fixture
def cube(tmp_path):
    """A group as xarray writes them."""
    xr = pytest.importorskip("xarray")
    band = photograph(64, 80)
    variables = {
        "red": (("time", "y", "x"), np.stack([band] * 2).astype("u2") * 40, {"grid_mapping": "spatial_ref"}),
        "ndvi": (("time", "y", "x"), np.stack([band] * 2).astype("f4") / 255),
        "elevation": (("y", "x"), band.astype("f8") * 1.1),
        "cloud_labels": (("y", "x"), band // 30),
        "time_bounds": (("time", "nv"), np.arange(4.0).reshape(2, 2)),
    }
    coordinates = {
        "time": np.array(["2020-01-01", "2020-01-11"], "M8[ns]"),
        "y": np.arange(64) * -10.0,
        "x": np.arange(80) * 10.0,
        "spatial_ref": ((), 0, {"crs_wkt": "EPSG:32632"}),
    }
    return xr.Dataset(variables, coordinates, {"title": "a cube"})


@pytest.mark.parametrize("formats", [(2, 2), (2, 3), (3, 2), (3, 3)], ids=str)
def test_a_group_of_xarray_comes_in_whole(cube, tmp_path, capsys, formats):
    xr = pytest.importorskip("xarray")
    cube.to_zarr(tmp_path / "in.zarr", zarr_format=formats[0], consolidated=False)
    options = ["--max-error", "0.001", "--format", formats[1], "--json", "--value-range", "chunk"]
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr", *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert {array["name"] for array in result["arrays"]} == {"red", "ndvi", "elevation", "cloud_labels-zarr"}
    assert {*result["copied"]} == {"time_bounds", "time", "y", "x", "spatial_ref"} and not result["skipped"]
    out = xr.open_zarr(tmp_path / "out.zarr", consolidated=False)
    assert dict(out["red"].sizes) == {"time": 2, "y": 64, "x": 80} and out.attrs["title"] == "a cube"
    for name in ("time", "y", "x", "time_bounds", "red"):
        np.testing.assert_array_equal(out[name].values, cube[name].values)
    for name in ("ndvi", "elevation"):
        np.testing.assert_allclose(out[name].values, cube[name].values, atol=0.0011)
        assert out[name].dtype == cube[name].dtype
    assert out["spatial_ref"].attrs["crs_wkt"] == "EPSG:32632"


def test_what_stands_in_the_way_of_a_copy_is_named(cube, tmp_path, capsys):
    cube.to_zarr(tmp_path / "in.zarr", zarr_format=3, consolidated=False)
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr", "--value-range", "chunk") == 0
    zarr.open_group(tmp_path / "in.zarr")["y"][3] = 7
    capsys.readouterr()
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr", "--value-range", "chunk", "--overwrite") == 3
    assert "skipped: y: is not copied, because the archive has another y" in capsys.readouterr().out
    left = []
    list(open_sources([tmp_path / "in.zarr"], left_out=left.append))
    assert len(left) == 5, "without a copy, all is named"


def test_stacks_of_unlike_images_are_refused(tmp_path):
    from deepsic_codec.io.images import ImageSource

    values = da.zeros((20, 30), "u1")
    first = ImageSource("a", values, "yx", {"source": "a.tif", "crs": "EPSG:1", "nodata": 0, "time": 1})
    for changes, words in (
        ({"values": values.astype("u2")}, "uint16|one dtype"),
        ({"attributes": {"nodata": 9}}, "NoData"),
        ({"attributes": {}}, "NoData"),
        ({"attributes": {"nodata": 0, "color_table": [[1, 2, 3]]}}, "color_table"),
    ):
        other = ImageSource("b", changes.get("values", values), "yx", changes.get("attributes", first.attributes))
        check_rejects(UnsupportedArray, words, stack, [first, other], "all")
    other = ImageSource("b", values, "yx", {"source": "b.tif", "crs": "EPSG:1", "nodata": 0, "time": 2})
    attributes = stack([first, other], "all").attributes
    assert (attributes["crs"], attributes["nodata"], attributes["sources"]) == ("EPSG:1", 0, ["a.tif", "b.tif"])
    assert [image["time"] for image in attributes["images"]] == [1, 2]


def test_no_source_is_replaced_before_it_is_read(tmp_path, capsys):
    for name, seed in (("one.zarr", 1), ("two.zarr", 2)):
        create_array(tmp_path / name, name="a", data=photograph(40, 50, seed=seed), codec=DeepSIC(axes="yx"))
    two = tmp_path / "two.zarr"
    assert ingest(tmp_path / "one.zarr", two, two, "--overwrite") == 2
    assert "would replace before" in capsys.readouterr().err
    np.testing.assert_array_equal(zarr.open_array(two, path="a", mode="r")[...], photograph(40, 50, seed=2))
    assert ingest(two, tmp_path / "one.zarr", two, "--overwrite") == 0
    group = zarr.open_group(two, mode="r")
    np.testing.assert_array_equal(group["a"][...], photograph(40, 50, seed=2))
    np.testing.assert_array_equal(group["a-zarr"][...], photograph(40, 50, seed=1))
