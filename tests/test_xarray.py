"""The accessor: labels of whole variables, and of nothing else."""

import warnings

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, consolidate_labels
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.stored.array import StoredArray
from tests.common import check_rejects, photograph
from tests.labels.common import archive

xarray = pytest.importorskip("xarray")
pytest.importorskip("deepsic_codec.xarray")


def test_accessor(stub, tmp_path):
    folder = tmp_path / "archive.zarr"
    archive(zarr.storage.LocalStore(folder), shape=(128, 200, 3), chunks=(64, 64, 3))[:] = 200
    consolidate_labels(folder)
    for options in ({}, {"chunks": None}):
        image = xarray.open_zarr(folder, consolidated=False, **options)["img"]
        found = image.deepsic.where("Bright & ~Dark", verify=None)
        assert found.count == 6 and image.deepsic.labels.where("Bright").chunks == found.chunks
        assert (found.to_xarray() == 200).all()
        assert image.deepsic.open_labels(scan=True).where("Bright").count == 6
        check_rejects(UnsupportedArray, "'img'", lambda image=image: image[:64].deepsic.labels)
        check_rejects(UnsupportedArray, "'img'", lambda image=image: (image + 1).deepsic.labels)
    check_rejects(UnsupportedArray, "None", lambda: xarray.DataArray(np.zeros(3)).deepsic.labels)


def test_a_notebook_shows_variables(stub, tmp_path):
    folder = tmp_path / "archive.zarr"
    archive(zarr.storage.LocalStore(folder), shape=(128, 200, 3), chunks=(64, 64, 3))[:] = 200
    image = xarray.open_zarr(folder, consolidated=False)["img"]
    text = image.deepsic._repr_html_()
    assert "128 x 200 x 3" in text and "no index" in text and text.count("<img") == 1
    consolidate_labels(folder)
    text = image.deepsic._repr_html_()
    assert "Bright" in text and "no index" not in text and text.count("<img") >= 2, "a map, and chunks of classes"


TRANSFORM = [10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0]
WKT = 'PROJCRS["WGS 84 / UTM zone 32N",BASEGEOGCRS["WGS 84"],ID["EPSG",32632]]'


def scene(dtype="u2", **attributes):
    """A DataArray as rioxarray opens a GeoTIFF."""
    values = (photograph(3, 90, 70).astype(dtype) + 100).astype(dtype)
    values[:, :20, :30] = 0
    coordinates = {
        "band": [1, 2, 3],
        "y": 4999995 - 10.0 * np.arange(90),
        "x": 500005 + 10.0 * np.arange(70),
        "spatial_ref": ((), 0, {"crs_wkt": WKT, "GeoTransform": "500000.0 10.0 0.0 5000000.0 0.0 -10.0"}),
        "time": np.datetime64("2020-02-03T04:05:06", "ns"),
        "platform": "S2A",
    }
    return xarray.DataArray(values, coordinates, ("band", "y", "x"), attrs={"_FillValue": np.uint16(0), **attributes})


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_scene_comes_back_in_its_place(stub, tmp_path, zarr_format):
    image = scene(scale_factor=0.0001, long_name=("B02", "B03", "B04"))
    part = image.isel(y=slice(40, 80), x=slice(10, 60))
    dask = pytest.importorskip("deepsic_codec.dask")
    options = {"chunks": (3, 32, 32), "codec": DeepSIC(axes="cyx", max_error=0), "zarr_format": zarr_format}
    array = dask.store(part, tmp_path / "a.zarr", name="a", **options).array
    assert array.attrs["crs"] == "EPSG:32632" and array.attrs["transform"] == [10, 0, 500100, 0, -10, 4999600]
    assert array.fill_value == 0 and array.attrs["long_name"] == ["B02", "B03", "B04"]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if zarr_format == 2 else "ignore")  # format 2 has consolidated metadata
        raw = xarray.open_zarr(tmp_path / "a.zarr", mask_and_scale=False)["a"]
        decoded = xarray.open_zarr(tmp_path / "a.zarr")["a"]
    np.testing.assert_array_equal(raw, part)
    for name in ("y", "x", "band", "time", "platform"):
        np.testing.assert_array_equal(raw[name], part[name], name)
    about = raw.coords["spatial_ref"].attrs
    assert about["crs_wkt"] == WKT and about["GeoTransform"] == "500100.0 10.0 0.0 4999600.0 0.0 -10.0"
    np.testing.assert_array_equal(np.isnan(decoded), part == 0)
    np.testing.assert_allclose(
        decoded.sel(x=500305, y=4999495, band=2), image.sel(x=500305, y=4999495, band=2) * 0.0001
    )


@pytest.mark.parametrize("dtype, declared", [("u2", 0), ("i2", -9999), ("f4", -9999.0), ("f4", np.nan)])
def test_missing_values_of_a_data_array_are_missing_in_the_archive(stub, tmp_path, dtype, declared):
    values = photograph(70, 90).astype(dtype)
    values[:20, :30] = declared
    image = xarray.DataArray(values, dims=("lat", "lon"), attrs={"_FillValue": declared})
    dask = pytest.importorskip("deepsic_codec.dask")
    codec = DeepSIC(axes="yx", max_error=1)
    array = dask.store(image, tmp_path / "a.zarr", name="a", chunks=(64, 64), codec=codec).array
    np.testing.assert_array_equal(array[:20, :30], np.full((20, 30), declared, dtype))
    decoded = xarray.open_zarr(tmp_path / "a.zarr", consolidated=False)["a"]
    np.testing.assert_array_equal(np.isnan(decoded)[:20, :30], True)
    assert not np.isnan(decoded[20:]).any()


def test_axes_follow_from_the_names_of_dimensions(stub, tmp_path):
    dask = pytest.importorskip("deepsic_codec.dask")
    image = scene()
    for dims, axes in {
        ("band", "y", "x"): "cyx",
        ("Channel", "lat", "lon"): "cyx",
        ("time", "row", "column"): "tyx",
        ("z", "latitude", "longitude"): "zyx",
        ("a", "b", "c"): "yxc",
    }.items():
        values = (
            xarray.DataArray(image.values, dims=dims) if axes != "yxc" else xarray.DataArray(image.values.T, dims=dims)
        )
        array = dask.store(values, zarr.storage.MemoryStore(), name="a").array
        assert StoredArray(array).axes == axes
    words = "band, y, x|axes='cyx'"
    check_rejects(UnsupportedArray, words, dask.store, image, tmp_path / "a.zarr", name="a", codec=DeepSIC())
    unnamed = photograph(3, 256, 256)
    check_rejects(
        UnsupportedArray, "axes='cyx'", dask.store, unnamed, tmp_path / "a.zarr", name="a", chunks=(3, 64, 64)
    )
    assert not list(tmp_path.rglob("*.json"))


def test_implausible_axes_are_named_where_xarray_makes_the_array(tmp_path):
    encoding = {"im": {"compressors": DeepSIC(axes="yxc", semantics="none"), "chunks": (3, 64, 64)}}
    image = xarray.DataArray(photograph(3, 64, 64), dims=("band", "y", "x")).to_dataset(name="im")
    with pytest.warns(UserWarning, match="axes='cyx'"):
        image.to_zarr(tmp_path / "a.zarr", encoding=encoding, zarr_format=2)


def test_consolidated_metadata_of_a_group_are_kept_current(stub, tmp_path):
    dask = pytest.importorskip("deepsic_codec.dask")
    plain = xarray.Dataset({"one": (("y", "x", "band"), photograph(64, 64, 3))})
    for zarr_format in (2, 3):
        url = tmp_path / f"{zarr_format}.zarr"
        plain.to_zarr(url, zarr_format=zarr_format, consolidated=True)
        dask.store(photograph(64, 64, 3), url, name="two", dimension_names=("y", "x", "band"), zarr_format=zarr_format)
        assert set(xarray.open_zarr(url, consolidated=True)) == {"one", "two"}
