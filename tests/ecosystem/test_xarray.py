"""xarray writes and reads arrays of both formats with the codec as encoding, as its documentation says."""

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, DeepSICCodec, create_array
from deepsic_codec.stored.array import StoredArray
from examples.migrate import migrate
from tests.common import photograph

xr = pytest.importorskip("xarray")
pytestmark = pytest.mark.usefixtures("stub")

IMAGE = photograph(3, 70, 45, 3)


def dataset(values=IMAGE):
    coordinates = {"time": np.arange(len(values)), "y": np.arange(70) * -10.0, "x": np.arange(45) * 10.0}
    return xr.Dataset({"image": (("time", "y", "x", "band"), values, {"long_name": "reflectance"})}, coordinates)


def encoding(zarr_format):
    if zarr_format == 2:  # "compressors" in either format; "compressor" is an error of xarray's
        return {"compressors": DeepSIC(axes="tyxc"), "chunks": (1, 32, 32, 3)}
    return {"serializer": DeepSICCodec(axes="tyxc"), "compressors": None, "chunks": (1, 32, 32, 3)}


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_to_zarr_and_open_zarr(tmp_path, zarr_format):
    url = tmp_path / "archive.zarr"
    options = {"zarr_format": zarr_format, "consolidated": zarr_format == 2}
    dataset().to_zarr(url, encoding={"image": encoding(zarr_format)}, **options)
    stored = zarr.open_group(url, mode="r")["image"]
    assert StoredArray(stored).axes == "tyxc" and stored.chunks == (1, 32, 32, 3)
    for chunks in (None, {}):
        opened = xr.open_zarr(url, consolidated=zarr_format == 2, chunks=chunks)
        assert opened["image"].dtype == np.uint8 and opened["image"].attrs["long_name"] == "reflectance"
        np.testing.assert_array_equal(opened["image"], IMAGE)
        np.testing.assert_array_equal(opened["image"].sel(x=20.0, y=-30.0, time=1), IMAGE[1, 3, 2])
        opened.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_append_keeps_the_codec(tmp_path, zarr_format):
    url = tmp_path / "archive.zarr"
    options = {"zarr_format": zarr_format, "consolidated": False}
    dataset(IMAGE[:2]).to_zarr(url, encoding={"image": encoding(zarr_format)}, **options)
    before = zarr.open_group(url, mode="r")["image"][...]
    dataset(IMAGE[2:]).to_zarr(url, append_dim="time", **options)
    after = zarr.open_group(url, mode="r")["image"]
    np.testing.assert_array_equal(after[:2], before)
    np.testing.assert_array_equal(after[2], IMAGE[2])
    assert StoredArray(after).axes == "tyxc"


def test_another_format_needs_the_encoding_dropped(tmp_path):
    dataset().to_zarr(tmp_path / "two.zarr", encoding={"image": encoding(2)}, zarr_format=2, consolidated=False)
    opened = xr.open_zarr(tmp_path / "two.zarr", consolidated=False, chunks=None)
    with pytest.raises((TypeError, ValueError)):
        opened.to_zarr(tmp_path / "refused.zarr", zarr_format=3, consolidated=False)
    plain = opened.drop_encoding()
    plain.to_zarr(tmp_path / "three.zarr", encoding={"image": encoding(3)}, zarr_format=3, consolidated=False)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "three.zarr", mode="r")["image"][...], IMAGE)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_we_create_xarray_opens(tmp_path, zarr_format):
    create_array(
        tmp_path / "ours.zarr",
        name="image",
        data=IMAGE,
        chunks=(1, 32, 32, 3),
        codec=DeepSIC(axes="tyxc"),
        zarr_format=zarr_format,
        dimension_names=["time", "y", "x", "band"],
    )
    opened = xr.open_zarr(tmp_path / "ours.zarr", consolidated=False, chunks=None)["image"]
    assert opened.dims == ("time", "y", "x", "band") and opened.dtype == np.uint8
    np.testing.assert_array_equal(opened, IMAGE)


def test_migrated_archives_have_the_same_dimensions(tmp_path):
    dataset().to_zarr(tmp_path / "old.zarr", encoding={"image": encoding(2)}, zarr_format=2)
    before = xr.open_zarr(tmp_path / "old.zarr", chunks=None).load()
    migrate(tmp_path / "old.zarr", remove=True)
    after = xr.open_zarr(tmp_path / "old.zarr", chunks=None).load()
    assert zarr.open_group(tmp_path / "old.zarr", mode="r").metadata.zarr_format == 3
    xr.testing.assert_identical(before, after)
