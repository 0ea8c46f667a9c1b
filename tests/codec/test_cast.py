"""Samples of bool, of 32 and of 64 bits come back in their dtype, exact or within the bound, or are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, create_array
from deepsic_codec import dask as deepsic_dask
from deepsic_codec.errors import ConfigurationError, UnsupportedArray
from deepsic_codec.payload.header import read_header

INTEGERS = ("?", "<i4", ">i4", "<u4", "<i8", ">u8")


@given(
    st.sampled_from(INTEGERS),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([1, 200, 255, 256, 60000, 65534, 65535, 65536, 10**6, 2**24, 2**26]),
    st.sampled_from([None, "inside", "end", "far"]),
    st.sampled_from([0, 1, 7]),
    st.integers(0, 99),
)
def test_integers_keep_the_bound_and_what_has_no_data(dtype, low, span, nodata, max_error, seed):
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    least, most = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    low = min(max(low, least), most)
    high = min(low + span, most)
    max_error = 0 if dtype.kind == "b" else max_error
    steps = rng.integers(0, high - low, (9, 14), endpoint=True).astype("u8")
    array = (steps + np.array(low % 2**64, "u8")).astype(dtype)
    values = {"inside": (low + high) // 2, "end": high, "far": least if low > least else most}
    value = values.get(nodata)
    if value is not None:
        array[2:5, 3:9] = value
    codec = DeepSIC(axes="yx", semantics="none", max_error=max_error, nodata=value)
    try:
        read = codec.decode(codec.encode(array))
    except UnsupportedArray as error:
        assert span > 2**23 and "max_error" in str(error)
        return
    assert read.dtype == array.dtype
    difference = read.astype(object) - array.astype(object) if dtype.kind != "b" else read ^ array
    assert abs(difference).max() <= max_error
    if value is not None:
        np.testing.assert_array_equal(read == value, array == value)


@pytest.mark.parametrize("nodata", [None, float("nan"), -9999, 0.1, -1.7976931348623157e308])
@pytest.mark.parametrize("target", [{"quality": 150}, {"max_error": 0.01}, {"rmse": 0.01}], ids=str)
def test_float64_has_the_precision_of_float32(target, nodata):
    array = np.random.default_rng(0).random((40, 50)) + np.linspace(0, 100, 50)
    if nodata is not None:
        array[:9, 5:20] = nodata
    missing = np.isnan(array) if nodata is None or nodata != nodata else array == nodata
    codec = DeepSIC(axes="yx", semantics="none", nodata=nodata, **target)
    for zarr_format in (2, 3):
        read = create_array({}, data=array, codec=codec, zarr_format=zarr_format)[...]
        assert read.dtype == array.dtype
        assert np.abs(read - array)[~missing].max() <= target.get("max_error", 0.2)
        np.testing.assert_array_equal(np.isnan(read) if np.isnan(array).any() else read == nodata, missing)


@pytest.mark.parametrize(
    "array,target,advice",
    [
        (np.full((40, 50), 1e300), {"max_error": 1}, "larger max_error"),
        (np.random.default_rng(0).random((40, 50)) + 5e9, {"rmse": 1}, "subtract an offset"),
        (np.random.default_rng(0).random((40, 50)) + 1e5, {"max_error": 1e-4}, "larger max_error"),
        (np.arange(2000).reshape(40, 50) << 40, {"max_error": 0}, "larger max_error"),
    ],
    ids=["overflow", "offset", "bound", "span"],
)
def test_values_that_do_not_fit_are_refused_with_what_to_do(array, target, advice):
    with pytest.raises(UnsupportedArray, match=f"{advice}.*zarr.create_array"):
        create_array({}, data=array, codec=DeepSIC(axes="yx", semantics="none", **target))


@pytest.mark.parametrize("dtype", ["?", "i4", "u8"])
@pytest.mark.parametrize("target", [{}, {"quality": 90}, {"rmse": 1}], ids=str)
def test_masks_and_counts_are_never_stored_without_a_bound(dtype, target):
    with pytest.raises(ConfigurationError, match="max_error=0"):
        create_array({}, shape=(40, 50), dtype=dtype, codec=DeepSIC(axes="yx", **target))


@pytest.mark.parametrize("dtype", ["?", "i4", "u8"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_masks_and_counts_are_lossless_without_labels_by_default(dtype, zarr_format):
    array = (np.arange(70 * 90).reshape(70, 90) // 1000 % 5 * 100_000).astype(dtype)
    created = create_array({}, data=array, zarr_format=zarr_format)
    np.testing.assert_array_equal(created[...], array)
    stored = deepsic_dask.store(array, {}, name="a", chunks=(40, 40), zarr_format=zarr_format).array  # ragged edges
    np.testing.assert_array_equal(stored[...], array)
    assert created.dtype == stored.dtype == array.dtype


def test_resume_knows_chunks_of_other_dtypes():
    group, array = {}, np.arange(70 * 90).reshape(70, 90)
    first = deepsic_dask.store(array, group, name="a", chunks=(40, 40))
    assert deepsic_dask.store(array, group, name="a", chunks=(40, 40), resume=True).skipped == first.written == 6


def test_previews_have_the_dtype_of_the_chunk():
    array = np.add.outer(np.arange(64.0), np.arange(80.0)) + 1e5
    array[:8, :8] = -1e300
    codec = DeepSIC(axes="yx", semantics="none", value_range=(1e5, 1.002e5), quality=150, nodata=-1e300)
    preview = codec.decode_preview(codec.encode(array), 8)
    assert preview.dtype == array.dtype and preview[0, 0] == -1e300
    np.testing.assert_allclose(preview[1:, 1:], array.reshape(8, 8, 10, 8).mean(axis=(1, 3))[1:, 1:], atol=8)
    payload = DeepSIC(axes="yx", semantics="none", max_error=0).encode(array[8:, 8:].astype("i8"))
    assert DeepSIC().decode_preview(payload).dtype == np.int64
    assert read_header(payload).dtype == np.uint8  # less an offset
