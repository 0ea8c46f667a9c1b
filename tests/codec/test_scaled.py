"""A chunk as the networks see it: the PSNR that a search aims at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, create_array
from deepsic_codec.codec.scaled import scale_chunk
from deepsic_codec.errors import ConfigurationError, UnsupportedArray
from tests.common import check_rejects, photograph


@pytest.mark.parametrize("value_range,peaks", [(None, (255, 255)), ([(0, 100), (0, 200)], (100, 200))])
def test_psnr_is_that_of_the_samples_that_hold_data(value_range, peaks):
    samples = np.full((2, 4, 5, 2), 60, "u1")
    samples[0, :2] = 7  # no data
    samples[1, 3, 4, 1] = 7
    decoded = samples.copy()
    decoded[..., 0] += 3
    decoded[..., 1] += 5
    decoded[samples == 7] = 200  # whatever the features bring back there
    chunk = scale_chunk(samples, DeepSIC(axes="tyxc", nodata=7, value_range=value_range))
    counts = 80 // 2 - 10, 80 // 2 - 11
    squares = [count * (error / peak) ** 2 for count, error, peak in zip(counts, (3, 5), peaks, strict=True)]
    assert chunk.psnr(decoded) == pytest.approx(-10 * np.log10(sum(squares) / sum(counts)))
    decoded[samples != 7] = 60
    assert chunk.psnr(decoded) == float("inf")


RANGE = -0.1, 1.0
TARGETS = [{"quality": 60}, {"quality": 150}, {"psnr": 60}, {"rmse": 0.003}, {"bpp": 3}]


def reflectance():
    """Values from -0.05 to 0.9, float32 (64, 80, 3)."""
    return (photograph(64, 80, 3).astype("f4") / 270 - 0.05).astype("f4")


def others_error(array, usual, **parameters):
    """The number of bytes, the root mean square error of all samples but outliers, and the outliers as decoded."""
    codec = DeepSIC(semantics="none", transform="wavelet", **parameters)
    payload = codec.encode(array)
    decoded = codec.decode(payload)
    error = np.square(decoded.astype("f8") - array)[usual].mean() ** 0.5
    return len(payload), error, decoded[~usual]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("value_range", [RANGE, "chunk"], ids=str)
@pytest.mark.parametrize("outliers", [(1.6,), (-40,), (150, -33), (-9999,), (3.4e38,), (1e30, 7e8, -3e38)], ids=str)
def test_outliers_of_float32_come_back_and_cost_others_nothing(target, value_range, outliers):
    parameters = {"value_range": value_range, **target}
    array, usual = reflectance(), np.ones((64, 80, 3), bool)
    usual[[10, 30, 50][: len(outliers)], 20, 1] = False
    _, before, _ = others_error(array, usual, **parameters)
    array[~usual] = outliers
    if "bpp" in target and len(outliers) == 3:
        check_rejects(UnsupportedArray, "bpp: |NoData value", others_error, array, usual, **parameters)
        return
    _, after, decoded = others_error(array, usual, **parameters)
    assert after < 1.2 * before + 1e-4
    assert (np.abs(decoded - outliers) <= 12 * before + np.spacing(np.float32(np.abs(outliers)))).all()


@pytest.mark.parametrize("target", [{"rmse": 0.01}, {"bpp": 2}, {"max_error": 0.02}], ids=str)
def test_targets_in_data_units_or_bits_need_no_range(target):
    array = reflectance()
    nbytes, error, _ = others_error(array, np.ones(array.shape, bool), **target)
    assert error < 0.03 and nbytes < array.nbytes / 6
    for other in ({"quality": 60}, {"psnr": 40}):
        check_rejects(ConfigurationError, "value_range|rmse", DeepSIC(**other).encode, array)


@pytest.mark.parametrize(
    "target", [{"quality": 60, "value_range": RANGE}, {"rmse": 0.01}, {"max_error": 0.01}], ids=str
)
def test_nan_is_no_data_unless_another_value_is(target):
    array = reflectance()
    array[20:30, 40:60] = np.nan
    array[3, 4, 1] = np.nan
    payload = DeepSIC(semantics="none", transform="wavelet", **target).encode(array)
    assert payload == DeepSIC(semantics="none", transform="wavelet", nodata=np.nan, **target).encode(array)
    decoded = DeepSIC().decode(payload)
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(array))
    assert np.nanmax(np.abs(decoded - array)) < 0.2
    check_rejects(UnsupportedArray, "NaN or infinite|NoData value -1", DeepSIC(nodata=-1, **target).encode, array)
    array[0, 0, 0] = -np.inf
    check_rejects(UnsupportedArray, "1 infinite sample|NaN if", DeepSIC(**target).encode, array)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [33000, -3.4e38, 700, 2**20, np.finfo("f4").max.item()], ids=str)
@pytest.mark.parametrize("nodata", [None, "value", 7], ids=str)
@pytest.mark.parametrize("bound", [2e-3, 1e-4])
def test_bounds_hold_whatever_the_outliers_and_cost_little(value, nodata, bound):
    array = reflectance()
    plain = len(DeepSIC(semantics="none", max_error=bound).encode(array))
    array[12, 13, 2] = value
    codec = DeepSIC(semantics="none", max_error=bound, nodata=value if nodata == "value" else nodata)
    payload = codec.encode(array)
    assert np.abs(codec.decode(payload).astype("f8") - array.astype("f8")).max() <= bound
    if nodata != 7 or abs(value) < 2**24 * bound:  # as many steps as there can be
        assert len(payload) < 1.6 * plain + 60


def test_an_outlier_of_one_band_leaves_the_bands_their_ranges():
    array = reflectance() * np.float32([1, 100, 10000])
    ranges, usual = [(-0.1, 1), (-10, 100), (-1000, 10000)], np.ones(array.shape, bool)
    codec = DeepSIC(semantics="none", transform="wavelet", value_range=ranges, quality=100)
    before = np.abs(codec.decode(codec.encode(array)) - array)
    array[5, 6, 1], usual[5, 6] = 5000, False
    after = np.abs(codec.decode(codec.encode(array)) - array)
    for band in range(3):
        assert after[..., band][usual[..., 0]].mean() < 1.2 * before[..., band][usual[..., 0]].mean()


@pytest.mark.parametrize("target", [{"rmse": 0.003}, {"bpp": 3}, {"max_error": 0.01}], ids=str)
@pytest.mark.parametrize("value_range", [(0, 1e6), (-3e38, 3e38)], ids=str)
def test_ranges_far_too_wide_cost_nothing(target, value_range):
    array, usual = reflectance(), np.ones((64, 80, 3), bool)
    nbytes, error, _ = others_error(array, usual, **target)
    wide_nbytes, wide_error, _ = others_error(array, usual, value_range=value_range, **target)
    assert wide_nbytes < 1.1 * nbytes and wide_error < 1.1 * error


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=4),
    st.sampled_from([(0, 1), (-1e-30, 1e-30), (-3e38, 3e38), "chunk"]),
    st.sampled_from([{"quality": 180}, {"rmse": 0.01}, {"psnr": 55}, {"max_error": 0.01}]),
    st.sampled_from([None, -9999, float("nan")]),
    st.booleans(),
    st.integers(0, 99),
)
def test_targets_are_met_whatever_the_values(outliers, value_range, target, nodata, repeated, seed):
    rng = np.random.default_rng(seed)
    array = (rng.random((12, 17, 2)) * 0.3 + np.linspace(0, 0.6, 17)[:, None]).astype("f4")
    for value in outliers:
        array[rng.integers(12), rng.integers(17), rng.integers(2)] = value
    if repeated:
        array = np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)
    codec = DeepSIC(semantics="none", transform="wavelet", value_range=value_range, nodata=nodata, **target)
    error = np.abs(codec.decode(codec.encode(array)).astype("f8") - array.astype("f8"))
    extent = 1 if value_range == "chunk" else float(np.ptp(np.float32(value_range).astype("f8")))
    if "max_error" in target:
        assert error.max() <= 0.01
    elif "rmse" in target:
        assert np.sqrt(np.square(error).mean()) <= 0.014
    elif value_range != "chunk":
        assert np.sqrt(np.square(error).mean()) <= extent * (0.0025 if "psnr" in target else 0.0002)


@pytest.mark.parametrize("dtype", ["f2", "c8", "U3"])
def test_refusals_of_dtypes_name_a_way(dtype):
    with pytest.raises(UnsupportedArray, match=r"data\.astype|zarr\.create_array"):
        create_array({}, shape=(40, 50), dtype=dtype, codec=DeepSIC(axes="yx"))


def test_fewest_bytes_are_far_below_those_of_photographs_and_below_those_of_drawings():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (1, 64, 64, 3), np.uint8)
    even = np.zeros_like(noise)
    even[:, 20:40, 10:50] = 9
    dithered = (rng.random((1, 64, 64, 1)) < 0.5).astype(np.uint8)
    for samples, low, high in ((noise, 2500, 9500), (even, 0, 5), (dithered, 0, 512)):
        codec = DeepSIC(max_error=0, axes="tyxc", semantics="none")
        exact, least = codec.encode(samples), scale_chunk(samples, codec).least_bytes
        assert low <= least <= high and least <= len(exact)
