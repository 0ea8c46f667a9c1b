"""Samples without data, and data that hits the value which says so."""

import numpy as np
import pytest

from deepsic_codec.axes import Axes
from deepsic_codec.payload import nodata as payload_nodata
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.nodata import NoData, next_value

DTYPES = ["u1", "i1", "u2", "i2", "f4"]


def header_of(dtype, slices, height, width, bands):
    return Header(
        dtype=np.dtype(dtype),
        shape=(slices, height, width, bands),
        order="C",
        axes=Axes("tyxc"),
        decoder=bytes(8),
        head=bytes(4),
        quality=50,
        grid=(1, 1),
        sections=(),
        size=0,
        version=1,
    )


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_data_never_reads_as_the_value(dtype, masked, down):
    """With a mask or without one: the value stands for no data in every chunk of the array."""
    value = np.dtype(dtype).type(7)
    samples = np.full((1, 2, 3, 2), value)
    samples[0, 0, 0] = 9
    mask = None
    if masked:
        mask = np.zeros((1, 2, 3, 1), bool)
        mask[0, 1, 2] = True
    nodata = NoData(value, down, mask)
    nodata.apply(samples)
    neighbour = next_value(value, down)
    expected = np.full((1, 2, 3, 2), neighbour)
    expected[0, 0, 0] = 9
    if masked:
        expected[0, 1, 2] = value
    np.testing.assert_array_equal(samples, expected)
    assert neighbour != value and (neighbour < value) == down


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_neighbour_is_the_next_number(dtype):
    one = np.dtype(dtype).type(1)
    if dtype == "f4":
        assert payload_nodata.next_value(one, False) == np.nextafter(one, np.float32(2))
        assert payload_nodata.next_value(one, True) == np.nextafter(one, np.float32(0))
        assert payload_nodata.next_value(np.float32(np.nan), False) is None
        with np.errstate(over="ignore"):
            assert payload_nodata.next_value(np.finfo("f4").max, False) is None
        assert 0 < payload_nodata.next_value(np.float32(-0.0), False) < 1e-44
        return
    assert (payload_nodata.next_value(one, False), payload_nodata.next_value(one, True)) == (2, 0)
    info = np.iinfo(dtype)
    assert payload_nodata.next_value(np.dtype(dtype).type(info.max), False) is None
    assert payload_nodata.next_value(np.dtype(dtype).type(info.min), True) is None
    assert payload_nodata.next_value(np.dtype(dtype).type(info.max), True) == info.max - 1


def test_nan_changes_nothing_but_what_the_mask_covers():
    samples = np.array([[[[1.0], [2.0]]]], "f4")
    NoData(np.float32(np.nan), False, np.array([[[[False], [True]]]])).apply(samples)
    np.testing.assert_array_equal(samples.ravel(), np.array([1, np.nan], "f4"))


MASKS = {
    "none": lambda shape: None,
    "empty": lambda shape: np.zeros(shape, bool),
    "all": lambda shape: np.ones(shape, bool),
    "pixels": lambda shape: np.repeat(np.random.default_rng(0).random((*shape[:3], 1)) < 0.3, shape[3], axis=3),
    "samples": lambda shape: np.random.default_rng(1).random(shape) < 0.3,
}


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i2", "<f4"])
def test_section_comes_back(dtype, name, down):
    shape = (3, 5, 4, 2)
    mask, value = MASKS[name](shape), np.dtype(dtype).newbyteorder("=").type(5)
    data = payload_nodata.encode_nodata(NoData(value, down, mask))
    found = payload_nodata.decode_nodata(data, header_of(dtype, *shape))
    assert found.value == value and found.value.dtype == value.dtype and found.down == down
    assert payload_nodata.is_empty(data, header_of(dtype, *shape)) == (name == "all")
    if name in ("none", "empty"):
        assert found.mask is None
    else:
        np.testing.assert_array_equal(np.broadcast_to(found.mask, shape), mask)
        assert found.mask.shape[-1] == (2 if name == "samples" else 1)
