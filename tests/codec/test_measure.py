import warnings

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, create_array, dask
from deepsic_codec.codec.measure import thinned, with_range
from deepsic_codec.codec.scaled import scale_chunk
from tests.common import photograph


def deep(height=130, width=150, bands=3, dtype="u2"):
    """A scene that uses 300 to 5400 of its dtype."""
    return (photograph(height, width, bands).astype("f8") * 20 + 300).astype(dtype)


def stored(array):
    return array.metadata.codecs[0]


def ways(values, codec, tmp_path):
    """The codecs of an array that is written at once, and of one that Dask writes block by block."""
    yield stored(create_array({}, name="a", data=values, codec=codec))
    lazy = da.from_array(values, chunks=(64, 64, 1)[: values.ndim])
    dask.store(lazy, tmp_path / "a.zarr", name="a", codec=codec)
    yield stored(zarr.open_array(tmp_path / "a.zarr", path="a"))


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
@pytest.mark.parametrize("target", [{"quality": 60}, {"psnr": 50}, {"rmse": 4}], ids=str)
def test_the_range_of_an_array_is_measured_without_outliers_and_no_data(tmp_path, dtype, target):
    values = deep(dtype=dtype)
    values[20:40, 30:60] = 0  # no data
    expected = [(int(band[band > 0].min()), int(band.max())) for band in np.moveaxis(values, -1, 0)]
    values[20, 30] = 30000  # hot
    for codec in ways(values, DeepSIC(semantics="none", nodata=0, **target), tmp_path):
        assert list(codec.value_range) == expected


def test_a_hot_pixel_costs_no_other_precision():
    values = deep()
    errors = []
    for hot in (5000, 65535):
        values[0, 0] = hot
        decoded = create_array({}, data=values, codec=DeepSIC(quality=60, semantics="none", transform="wavelet"))[...]
        errors.append(np.sqrt(np.mean((decoded.astype("f8") - values)[1:] ** 2)))
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_a_hot_pixel_is_no_part_of_the_range_of_a_chunk_unless_features_would_clip_it(dtype):
    values = deep(bands=1, dtype=dtype)[None]
    usual = (values.min(), values.max())
    values[0, 0, 0] = 30000
    codec = DeepSIC(value_range="chunk")
    assert tuple(scale_chunk(values, codec).ranges[0]) == usual
    assert scale_chunk(values, codec, features=True).ranges[0, 1] == 30000


def test_features_get_a_range_of_all_samples():
    values = deep()
    values[0, 0] = 30000
    codec = DeepSIC(transform="features")
    assert {high for _, high in with_range(codec, [thinned(values, codec)], values.dtype, False).value_range} == {30000}


def test_bands_in_chunks_of_their_own_share_one_range():
    values = deep()
    array = create_array({}, data=values, chunks=(64, 64, 1), codec=DeepSIC(semantics="none"))
    assert stored(array).value_range == ((values.min(), values.max()),)


@pytest.mark.parametrize("value", [0, 65535])
def test_constants_and_arrays_without_data_are_stored(value):
    values = np.full((64, 64), value, "u2")
    np.testing.assert_array_equal(create_array({}, data=values, codec=DeepSIC(axes="yx", semantics="none"))[...], value)
    for number in (np.nan, 3.4e38, -3.4e38):
        values = np.full((64, 64), number, "f4")
        array = create_array({}, data=values, codec=DeepSIC(axes="yx", semantics="none"))
        np.testing.assert_array_equal(array[...], values)
    empty = np.empty((0, 5, 3), "f4")
    assert create_array({}, data=empty, codec=DeepSIC(semantics="none"))[...].shape == (0, 5, 3)


@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.just(np.nan), min_size=1, max_size=40
    )
)
def test_any_values_have_a_range(values):
    array = np.array(values, "f4").reshape(1, -1)
    codec = DeepSIC(axes="yx", semantics="none")
    ((low, high),) = with_range(codec, [thinned(array, codec)], array.dtype, False).value_range
    data = array[~np.isnan(array)]
    assert np.float32(low) < np.float32(high) and (not data.size or low <= data.min() <= data.max() <= high)


def test_an_array_that_exists_keeps_its_range(tmp_path):
    values = da.from_array(deep(), chunks=(64, 64, 3), name="scene")
    dask.store(values, tmp_path / "a.zarr", name="a", codec=DeepSIC(quality=60, semantics="none"))
    again = dask.store(values, tmp_path / "a.zarr", name="a", codec=DeepSIC(quality=60, semantics="none"), resume=True)
    assert again.skipped and not again.written


@pytest.mark.parametrize("target", [{"quality": 60}, {"psnr": 60}, {"rmse": 3}, {"max_error": 3}], ids=str)
def test_data_that_use_little_of_their_range_are_noticed(target):
    refers = "quality" in target or "psnr" in target
    values = deep()

    def warned(write):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            write()
        return ["value_range" in str(one.message) for one in caught]

    codec = {"semantics": "none", **target}
    wide = DeepSIC(value_range=(0, 65535), **codec)
    assert warned(lambda: create_array({}, data=values, codec=wide)) == [True] * refers
    assert warned(lambda: dask.store(da.from_array(values), {}, codec=wide, index=False)) == [True] * refers
    assert warned(lambda: create_array({}, data=values, codec=DeepSIC(value_range=(0, 6000), **codec))) == []
    assert warned(lambda: create_array({}, data=values, codec=DeepSIC(**codec))) == []
    # Chunk by chunk, nobody has measured the range.
    array = create_array({}, shape=values.shape, dtype="u2", codec=DeepSIC(**codec))
    assert warned(lambda: array.__setitem__(..., values)) == [True] * refers
    assert warned(lambda: array.__setitem__(..., values * 12)) == []
    assert warned(lambda: array.__setitem__(..., 7)) == []
