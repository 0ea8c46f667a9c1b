"""The images that labels are scored on."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deepsic_codec import DeepSIC, create_array
from deepsic_codec import dask as deepsic_dask
from deepsic_codec.codec.bands import label_images
from deepsic_codec.codec.decode import compute_labels, parse_payload
from deepsic_codec.codec.labels import cells_with_data
from deepsic_codec.codec.scaled import scale_chunk
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.payload.value_range import Q6
from tests.common import check_rejects, photograph


def seen(array, **parameters):
    codec = DeepSIC(**parameters)
    scaled = scale_chunk(array[None], codec)
    return label_images(scaled.samples, scaled.ranges, scaled.mask, codec.label_bands)[0]


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
def test_bright_outliers_do_not_darken_what_labels_see(dtype):
    grey = photograph(128, 128, 3)
    deep = (grey * 11.0 + 100).astype(dtype)
    clouds = deep.copy()
    clouds[:6, :6] = 20000
    for value_range in ((0, 20000), "chunk"):
        plain, cloudy = (seen(one, value_range=value_range).astype("f8") / Q6 for one in (deep, clouds))
        assert np.abs(cloudy - plain)[6:].mean() < 12
        assert np.corrcoef(plain.ravel(), grey.ravel())[0, 1] > 0.98
        assert plain.max() - plain.min() > 200


def test_noise_is_not_stretched():
    water = np.random.default_rng(0).integers(100, 104, (64, 64, 3), "u2")
    assert np.ptp(seen(water, value_range=(0, 10000)).astype("f8") / Q6) < 5


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_labels_are_scored_on_chosen_bands(dtype):
    array = photograph(64, 64, 5).astype(dtype)
    codec = {"value_range": (0, 255)}
    for bands, same in (((3, 2, 1), array[..., [3, 2, 1]]), (4, array[..., [4]])):
        np.testing.assert_array_equal(seen(array, label_bands=bands, **codec), seen(same, **codec))


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("semantics", ["pre", "post"])
def test_stored_labels_are_those_of_chosen_bands(semantics):
    array = np.stack([np.full((64, 64), level, "u1") for level in (20, 120, 240, 20)], axis=-1)
    for band, expected in ((0, "Dark"), (2, "Bright")):
        codec = DeepSIC(label_bands=band, semantics=semantics, quality=100, transform="wavelet")
        payload = codec.encode(array)
        block = compute_labels(parse_payload(payload, params=codec.resolved()))
        names = ["Dark", "Dim", "Bright"]
        assert names[int(block.dense(4)[0, 0, 0, :3].argmax())] == expected


def test_wrong_bands_are_refused():
    for value in ((1, 2), -1, 256, (0, 1, 1.5), True, ()):
        check_rejects(ConfigurationError, "label_bands", DeepSIC, label_bands=value)
    check_rejects(ConfigurationError, "label_bands|wavelet", DeepSIC, label_bands=0, transform="features")
    for band, words in (("red", "label_bands|'red'"), (3, "label_bands|3 bands")):
        check_rejects(ConfigurationError, words, DeepSIC(label_bands=band).encode, np.zeros((64, 64, 3), "u1"))


def test_bands_have_the_names_of_an_array():
    array, names = photograph(64, 64, 4), ["blue", "green", "Red", "nir"]
    codec = DeepSIC(label_bands=("red", 1, "BLUE"), max_error=0)
    created = create_array({}, data=array, codec=codec, attributes={"long_name": names})
    assert created.metadata.codecs[0].label_bands == (2, 1, 0)
    check_rejects(ConfigurationError, "'red'|without names", create_array, {}, data=array, codec=codec)
    xr = pytest.importorskip("xarray")
    named = xr.DataArray(array, dims=("y", "x", "band"), coords={"band": names})
    for source, attributes in ((named, {}), (array, {"attributes": {"long_name": names}})):
        stored = deepsic_dask.store(source, {}, name="a", codec=codec, **attributes).array
        assert stored.metadata.codecs[0].label_bands == (2, 1, 0)
    codec = DeepSIC(label_bands="reed", max_error=0)
    check_rejects(ConfigurationError, "'reed'|blue, green, Red, nir", deepsic_dask.store, named, {}, codec=codec)


@given(arrays("f4", (8, 8, 2), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_samples_can_be_seen(array):
    assert seen(array, value_range="chunk").shape == (8, 8, 3)


def test_cells_that_mostly_hold_no_data_score_nothing():
    mask = np.zeros((1, 100, 128, 1), bool)
    mask[0, :40, :64] = True  # 40 of 64 rows
    mask[0, :20, 64:] = True
    mask[0, 64:80, :64] = True  # 16 of 36 rows
    cells = cells_with_data(np.full((1, 2, 2, 1), 9, "u1"), mask)
    np.testing.assert_array_equal(cells[0, ..., 0], [[0, 9], [9, 9]])


def classes(kind):
    blocks = np.random.default_rng(0).integers(0, 7, (40, 40)).repeat(6, 0).repeat(6, 1)
    y, x = np.mgrid[:64, :64]
    return {
        "mask": (y > x).astype("u1"),
        "mask of 255": (y > x).astype("u1") * 255,
        "land cover": np.array([11, 21, 42, 82, 95, 31, 52], "u2")[blocks],
        "photograph": photograph(64, 64),
        "gradient": (y // 8).astype("u1"),
        "noise": np.random.default_rng(0).integers(20, 25, (64, 64), "u1"),
        "constant": np.full((64, 64), 7, "u1"),
    }[kind]


@pytest.mark.parametrize("kind", ["mask", "mask of 255", "land cover", "photograph", "gradient", "noise", "constant"])
@pytest.mark.parametrize("parameters", [{"quality": 50}, {"psnr": 15}, {"max_error": 0}], ids=str)
def test_only_classes_that_are_stored_with_loss_give_a_warning(kind, parameters):
    codec, array = DeepSIC(axes="yx", semantics="none", value_range="chunk", **parameters), classes(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        payload = codec.encode(array)
    lossy = not np.array_equal(np.asarray(codec.decode(payload)).reshape(array.shape), array)
    assert lossy or "psnr" not in parameters or kind != "land cover"
    expected = lossy and kind in ("mask", "mask of 255", "land cover")
    assert ["max_error=0" in str(one.message) for one in caught] == [True] * expected
