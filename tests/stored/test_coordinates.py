"""Coordinates and attributes of a place: what follows from what, parts, and conflicts in a group."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore, StorePath

from deepsic_codec.axes import Axes
from deepsic_codec.stored import coordinates
from deepsic_codec.stored.coordinates import Coordinate, describe, part, to_json

NAMES = ("y", "x", "band")
NORTH_UP = [10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0]
TURNED = [2.0, 3.0, 500.0, 5.0, -7.0, 900.0]


def described(attributes, given_coordinates=None, shape=(6, 5, 3)):
    return describe(attributes, given_coordinates or {}, Axes("yxc"), NAMES, shape)


def test_coordinates_are_those_of_the_centres_of_pixels():
    attributes, beside = described({"crs": "EPSG:32632", "transform": NORTH_UP})
    np.testing.assert_array_equal(beside["x"].values, 500005 + 10.0 * np.arange(5))
    np.testing.assert_array_equal(beside["y"].values, 4999995 - 10.0 * np.arange(6))
    np.testing.assert_array_equal(beside["band"].values, [1, 2, 3])
    assert beside["spatial_ref"].attributes["GeoTransform"] == "500000.0 10.0 0.0 5000000.0 0.0 -10.0"
    assert attributes["proj:code"] == "EPSG:32632" and attributes["spatial:transform"] == NORTH_UP
    assert attributes["spatial:dimensions"] == ["y", "x"]
    assert [item["name"] for item in attributes["zarr_conventions"]] == ["proj:", "spatial:"]


def test_turned_images_have_no_coordinates_of_rows_and_columns():
    attributes, beside = described({"transform": TURNED})
    assert not {"x", "y"} & beside.keys() and attributes["transform"] == TURNED
    assert beside["spatial_ref"].attributes["GeoTransform"] == "500.0 2.0 3.0 900.0 5.0 -7.0"


def test_without_a_place_nothing_is_added():
    assert described({"source": "a.png"}) == ({"source": "a.png"}, {})


@given(
    st.sampled_from([1 / 3, 10.0, -0.1, 0.00027777777777]), st.floats(-1e6, 1e6), st.integers(0, 3), st.integers(1, 4)
)
def test_coordinates_of_a_part_win_over_the_transform_of_the_whole(step, start, first, count):
    whole = [step, 0.0, start, 0.0, -step, -start]
    _, beside = described({"transform": whole})
    region = (slice(first, first + count), slice(first, first + count), slice(0, 3))
    attributes, cut = part({}, beside, Axes("yxc"), NAMES, region)
    attributes, again = described(attributes | {"transform": whole}, cut, shape=(count, count, 3))
    shape = cut["x"].values.shape
    assert shape == (min(count, 5 - first),) or count == shape[0]
    np.testing.assert_allclose(attributes["transform"], coordinates.shifted(whole, first, first), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(again["x"].values, cut["x"].values)


def test_points_and_lists_of_bands_move_with_a_part():
    point = {"type": "Feature", "properties": {"row": 5.5, "col": 2}, "geometry": {"coordinates": [1, 2]}}
    attributes = {
        "gcps": {"features": [point]},
        "rpcs": {"line_off": 5, "samp_off": 7, "line_scale": 3},
        "scales": [1, 2, 3],
        "long_name": "reflectance",
        "spatial:transform": NORTH_UP,
    }
    region = (slice(4, 6), slice(1, 5), slice(1, 3))
    result, _ = part(attributes, {}, Axes("yxc"), NAMES, region)
    assert result["gcps"]["features"][0]["properties"] == {"row": 1.5, "col": 1}
    assert result["rpcs"] == {"line_off": 1, "samp_off": 6, "line_scale": 3}
    assert result["scales"] == [2, 3] and result["long_name"] == "reflectance"
    assert result["transform"] == [10.0, 0.0, 500010.0, 0.0, -10.0, 4999960.0]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_other_coordinates_of_a_group_stay(zarr_format):
    store = MemoryStore()
    zarr.open_group(store, mode="a", zarr_format=zarr_format)
    place = StorePath(store, "a")
    values = Coordinate(("x",), np.arange(4.0), {"units": "m"})
    assert coordinates.can_write(place, {"x": values}, zarr_format)
    coordinates.write(place, {"x": values}, zarr_format)
    assert coordinates.can_write(StorePath(store, "b"), {"x": values}, zarr_format)
    other = values._replace(values=np.arange(5.0))
    with pytest.warns(UserWarning, match="group of its own"):
        assert not coordinates.can_write(StorePath(store, "b"), {"x": other}, zarr_format)
    assert coordinates.can_write(place, {"x": other}, zarr_format, replace=True)
    named = {"dimension_names": ["x"]} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": ["x"]}}
    zarr.create_array(store, name="c", shape=(4,), dtype="u1", zarr_format=zarr_format, **named)
    with pytest.warns(UserWarning, match="group of its own"):
        assert not coordinates.can_write(place, {"x": other}, zarr_format, replace=True)
    np.testing.assert_array_equal(zarr.open_group(store, mode="r")["x"][...], np.arange(4.0))


@pytest.mark.parametrize(
    "attributes", [{"grid_mapping": "../up"}, {"coordinates": "a/b .. ."}, {"grid_mapping": 5}], ids=str
)
def test_names_in_attributes_lead_nowhere_else(attributes):
    array = zarr.create_array(
        MemoryStore(), name="g/a", shape=(4,), dtype="u1", attributes=attributes, dimension_names=["x"]
    )
    assert coordinates.read(array, ["x"]) == {}


def test_attributes_are_what_json_can_hold():
    """Dates, tuples and numpy's scalars, at any depth: xarray has them all."""
    day = datetime.date(2020, 1, 2)
    attributes = {
        "scalar": np.float32(1.5),
        "day": day,
        "nested": {"count": np.int64(3), 5: (np.datetime64("2020-01-02"), [np.array([1, 2])])},
        "times": np.array(["2020-01-01"], "M8[D]"),
        "object": Path("a"),
        "none": None,
    }
    assert json.loads(json.dumps(to_json(attributes))) == {
        "scalar": 1.5,
        "day": "2020-01-02",
        "nested": {"count": 3, "5": ["2020-01-02", [[1, 2]]]},
        "times": ["2020-01-01"],
        "object": "a",
        "none": None,
    }


@pytest.mark.parametrize(
    ("values", "about", "times"),
    [
        ([0, 60], {"units": "minutes since 2024-01-01 12:00"}, ["2024-01-01T12:00:00", "2024-01-01T13:00:00"]),
        ([1.0, 2.5], {"units": "days since 1970-01-01T00:00:00Z"}, ["1970-01-02T00:00:00", "1970-01-03T12:00:00"]),
        (np.array([5], "M8[ns]"), {}, ["1970-01-01T00:00:00"]),
        (["2024-06-30"], {}, ["2024-06-30T00:00:00"]),
        (["June"], {}, None),
        ([1], {"units": "months since 1970-01-01"}, None),
        ([1], {"units": "days since 1970-01-01", "calendar": "360_day"}, None),
        ([1], {"units": "days since 1970-01-01; rm -rf"}, None),
        ([1], {}, None),
        ([[1]], {"units": "days since 1970-01-01"}, None),
    ],
    ids=str,
)
def test_times(values, about, times):
    result = coordinates.times_of(coordinates.Coordinate(("t",), np.array(values), about))
    assert (result if result is None else result.astype(str).tolist()) == times
