"""Samples of every dtype, bands, NoData and bounded error through both codecs, over a stand-in for the model."""

import json
import warnings

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, DeepSICCodec, chunk_attrs, create_array
from deepsic_codec.codec import scaled as values
from deepsic_codec.codec.bands import default_grouping, from_images, to_images
from deepsic_codec.codec.decode import compute_labels, parse_payload
from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload import nodata as payload_nodata
from deepsic_codec.payload import value_range as scaling
from deepsic_codec.payload.fields import PLANES
from deepsic_codec.payload.labels import encode_labels
from deepsic_codec.payload.sections import LABELS, NAMES, NODATA, SECTIONS, VALUE_RANGE
from tests.common import check_rejects, check_roundtrip, photograph, raw

pytestmark = pytest.mark.usefixtures("stub")

ANY = -np.inf  # dB: what is lost is for the test to say
DTYPES = ["u1", "i1", "<u2", ">u2", "<i2", ">i2", "<f4", ">f4"]


def picture(shape, dtype, seed=0):
    """Smooth values over half of the range of an integer dtype, or 0 to 1."""
    grey = photograph(*shape, seed=seed).astype("f8") + photograph(*shape, seed=seed + 50) / 256
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return (grey / 256).astype(dtype)
    info = np.iinfo(dtype)
    return (info.min + grey / 512 * (float(info.max) - info.min)).astype(dtype)


def sections(payload):
    return [NAMES[entry.kind] for entry in h.read_header(payload).sections]


@st.composite
def chunks(draw):
    """Axes, an array of any dtype, bands and layout."""
    axes = "".join(draw(st.permutations("yx" + draw(st.sampled_from(["", "c", "c", "tc"])))))
    sizes = {"y": draw(st.integers(1, 20)), "x": draw(st.integers(1, 20)), "t": 2, "c": draw(st.integers(1, 8))}
    array = picture([sizes[axis] for axis in axes], draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    layout = draw(st.sampled_from(["C", "F", "strided", "reversed"]))
    if layout in "CF":
        return axes, np.array(array, order=layout)
    return axes, np.repeat(array, 2, axis=-1)[..., ::2] if layout == "strided" else array[::-1]


def steps(array, ranges=None):
    """How far apart what is restored may be from an array: half a step of the scaling, and rounding to the dtype."""
    low, high = (array.min(), array.max()) if ranges is None else ranges
    rounding = 0.5 if array.dtype.kind in "iu" else 1e-6 * max(abs(float(low)), abs(float(high)))
    return (float(high) - float(low)) / scaling.MAX_Q6 / 2 + rounding


@given(chunks(), st.booleans(), st.sampled_from(["auto", "none"]))
def test_any_samples_come_back(case, measured, spectral):
    axes, array = case
    measured = measured or array.dtype.kind == "f"
    codec = DeepSIC(axes=axes, value_range="chunk" if measured else None, spectral=spectral)
    payload = check_roundtrip(codec, array, ANY)
    assert ("value range" in sections(payload)) == (measured or array.dtype != np.uint8)
    ranges = None if measured else scaling.full_range(array.dtype)
    error = np.abs(codec.decode(payload).astype("f8") - array.astype("f8")).max()
    assert error <= (0 if array.dtype.itemsize == 1 else steps(array, ranges))
    assert codec.convert(DeepSICCodec).convert(DeepSIC).encode(array) == payload


@given(chunks(), st.sampled_from([0, 0.4, 1, 3, 100]), st.sampled_from([None, "chunk", "some"]), st.data())
def test_error_is_bounded(case, bound, ranges, data):
    from tests import stub_runtime

    stub_runtime.RUNTIME.lossy = True
    axes, array = case
    if array.dtype.kind == "f":
        bound, ranges = bound / 50 or 1e-3, ranges or "chunk"
    if ranges == "some":  # which clips some of the values
        ranges = (0.25, 0.5) if array.dtype.kind == "f" else (10, 50)
    nodata = None
    if data.draw(st.booleans()):
        array = array.copy(order="K")
        nodata = array.ravel()[data.draw(st.integers(0, array.size - 1))].item()
    quality = data.draw(st.integers(1, 100))
    codec = DeepSIC(axes=axes, value_range=ranges, max_error=bound, nodata=nodata, quality=quality)
    payload = check_roundtrip(codec, array, ANY)
    decoded = codec.decode(payload)
    assert np.abs(decoded.astype("f8") - array.astype("f8")).max() <= bound
    if bound == 0:
        np.testing.assert_array_equal(decoded, array)
    if nodata is not None:
        np.testing.assert_array_equal(decoded == nodata, array == nodata)


@given(chunks(), st.integers(0, 3), st.booleans(), st.data())
def test_nodata_comes_back_and_nothing_else_does(case, amount, per_pixel, data):
    from tests import stub_runtime

    stub_runtime.RUNTIME.lossy = True
    axes, array = case
    array = np.array(array)
    value = data.draw(st.sampled_from([array.min().item(), array.max().item(), array.ravel()[0].item()]))
    if array.dtype.kind == "f" and data.draw(st.booleans()):
        value = float("nan")
    rng = np.random.default_rng(amount)
    shape = [1 if axis == "c" and per_pixel else size for axis, size in zip(axes, array.shape, strict=True)]
    mask = np.broadcast_to(rng.random(shape) < amount / 3, array.shape)
    array[mask] = value
    codec = DeepSIC(axes=axes, value_range="chunk", nodata=value, quality=data.draw(st.integers(1, 100)))
    decoded = codec.decode(check_roundtrip(codec, array, ANY))
    if value != value:
        np.testing.assert_array_equal(np.isnan(decoded), np.isnan(array))
    else:
        np.testing.assert_array_equal(decoded == value, array == value)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 256])
@pytest.mark.parametrize("planes", [False, True])
def test_bands_in_images(bands, planes):
    samples = photograph(2, 3, 4, bands)
    grouping = PLANES if planes and bands > 1 else default_grouping(bands)
    images = to_images(samples, grouping)
    count = bands if grouping == PLANES else 1
    assert images.shape == (2 * count, 3, 4, 3) and images.flags.c_contiguous
    np.testing.assert_array_equal(images[::count][..., 0], samples[..., 0])
    np.testing.assert_array_equal(images[::count][..., 1], samples[..., 1 if bands == 3 and count == 1 else 0])
    np.testing.assert_array_equal(images[count - 1 :: count][..., 2], samples[..., -1])
    np.testing.assert_array_equal(from_images(images, bands, grouping), samples)
    damaged = images.copy()
    damaged[..., -1] = np.minimum(damaged[..., -1], 254) + 1  # of a band that is there thrice, one copy: a third
    assert (np.abs(from_images(damaged, bands, grouping).astype(int) - samples) <= 1).all()


def test_plain_images_are_as_they_were():
    for axes, shape in (("yxc", (20, 30, 3)), ("yx", (20, 30)), ("yxc", (20, 30, 1)), ("yxc", (20, 30, 7))):
        assert sections(DeepSIC(axes=axes).encode(photograph(*shape))) == ["labels", "features"]


def test_sections_that_are_written():
    array = picture((20, 30, 3), "u2")
    for semantics, others in (("pre", ["labels", "value range"]), ("post", ["value range"])):
        payload = DeepSIC(max_error=1, nodata=3, semantics=semantics).encode(array)
        assert sections(payload) == [*others, "nodata", "residual"]
    assert sections(DeepSIC(max_error=1, semantics="none").encode(array)) == ["value range", "residual"]
    assert len(h.unpack(DeepSIC().encode(array)).sections[VALUE_RANGE.kind]) == 5


def test_labels_come_from_the_first_triple():
    array = np.zeros((64, 64, 6), "u1")
    array[..., :3] = 250
    block = {}
    for semantics in ("pre", "post"):
        target = create_array({}, data=array, codec=DeepSIC(semantics=semantics), chunks=(64, 64, 6))
        block[semantics] = chunk_attrs(target, (0, 0, 0))["labels"]
    assert block["pre"] == block["post"] and next(iter(block["pre"][0])) == "Bright"


def test_nodata_does_not_vote():
    array = np.full((128, 128, 3), 200, "u1")
    array[:64, :64] = 0
    array[64:, 64:] = 0
    array[90:, 64:] = 200  # more than a half of this cell is data
    for semantics in ("pre", "post"):
        codec = DeepSIC(semantics=semantics, nodata=0, label_tile=64)
        target = create_array({}, shape=array.shape, dtype="u1", codec=codec, chunks=array.shape)
        target[...] = array
        labels = chunk_attrs(target, (0, 0, 0))["labels"]
        assert [bool(tile) for tile in labels] == [False, True, True, True]
        assert all("Dark" not in tile or tile["Dark"] < 0.1 for tile in labels)  # nor does what it is filled with


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_without_data_cost_little(dtype, stub):
    value = np.dtype(dtype).type(7)
    array = np.full((3, 200, 200, 4), value, dtype)
    codec = DeepSIC(axes="tyxc", nodata=7, value_range="chunk")
    payload = check_roundtrip(codec, array)
    assert len(payload) < 90 and stub.batches == []
    assert "features" not in sections(payload)
    assert (codec.decode_features(payload) == 0).all() and codec.decode_features(payload).shape == (3, 4 * 768, 13, 13)
    mixed = codec.encode_batch([array, np.full_like(array, 8), array])
    for decoded, expected in zip(codec.decode_batch(mixed), [7, 8, 7], strict=True):
        assert (decoded == expected).all()


def test_filling_is_smooth():
    y, x = np.mgrid[:200, :150]
    scene = (60 + y * 0.5 + x * 0.3)[None, ..., None].astype("u1")
    mask = ((y - 100) ** 2 + (x - 70) ** 2 < 45**2)[None, ..., None]
    holed = np.where(mask, 0, scene)
    filled = values.fill_nodata(holed, mask)
    np.testing.assert_array_equal(filled[~mask], scene[~mask])
    assert np.abs(filled.astype(int) - scene)[mask].max() <= 12
    assert np.abs(np.diff(filled[0, ..., 0].astype(int), axis=0)).max() <= 8
    assert (values.fill_nodata(holed, np.ones_like(mask)) == 128).all()


def test_constant_chunks_come_back():
    for dtype, value in (("u2", 40000), ("i2", -5), ("f4", 0.1), ("f4", -3e38)):
        array = np.full((9, 9, 3), value, dtype)
        decoded = DeepSIC(value_range="chunk").decode(DeepSIC(value_range="chunk").encode(array))
        np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2"])
def test_scaling_is_exact_for_narrow_ranges(dtype):
    info = np.iinfo(dtype)
    low, high = max(info.min, -9000), min(info.max, 7320)
    samples = np.arange(low, high + 1).astype(dtype).reshape(1, 1, -1, 1)
    for ranges in (np.array([[low, high]], dtype), np.array([[low, low + 77]], dtype)):
        fine = scaling.to_q6(samples, ranges)
        assert fine.min() == 0 and fine.max() == scaling.MAX_Q6 and (np.diff(fine.ravel()) >= 0).all()
        np.testing.assert_array_equal(scaling.from_q6(fine, ranges), np.clip(samples, *ranges[0]))


@given(st.integers(0, 65535), st.integers(0, 65535), st.integers(1, 9))
def test_scaling_by_table_and_by_arithmetic_agree(low, high, seed):
    low, high = sorted((low, high))
    samples = np.random.default_rng(seed).integers(0, 65536, (1, 260, 260, 1)).astype("u2")
    ranges = np.array([[low, high]], "u2")
    few = samples[:, :3]
    np.testing.assert_array_equal(scaling.to_q6(samples, ranges)[:, :3], scaling.to_q6(few, ranges))
    if low < high:  # by fractions, as the format says it
        exact = (2 * (np.clip(few.astype(object), low, high) - low) * scaling.MAX_Q6 + high - low) // (2 * (high - low))
        np.testing.assert_array_equal(scaling.to_q6(few, ranges), exact.astype("i2"))


@given(st.integers(0, 65535), st.integers(0, 65535), st.lists(st.integers(0, scaling.MAX_Q6), min_size=1))
def test_scaling_back_is_as_specified(low, high, fine):
    low, high = sorted((low, high))
    for dtype, shift in (("u2", 0), ("i2", 32768)):
        ranges = np.array([[low - shift, high - shift]], dtype)
        found = scaling.from_q6(np.array(fine, "i2").reshape(1, 1, -1, 1), ranges).ravel().tolist()
        assert found == [low - shift + (2 * f * (high - low) + 16320) // 32640 for f in fine]


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(FLOATS, FLOATS, st.integers(0, scaling.MAX_Q6))
def test_scaling_back_of_float32_is_as_specified(low, high, fine):
    low, high = sorted((low, high))
    found = scaling.from_q6(np.full((1, 1, 1, 1), fine, "i2"), np.array([[low, high]], "f4")).item()
    assert found == min(max(np.float32(fine * (high - low) / 16320 + low).item(), low), high)


ZEROS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45])


@given(ZEROS, ZEROS)
def test_no_zero_is_negative(low, high):
    """Versions of NumPy differ in which of two zeros `clip` returns, so that pixels may not depend on it."""
    ranges = np.array([sorted((low, high))], "f4")
    fine = np.array([0, 1, 8160, 16319, 16320], "i2").reshape(1, 1, -1, 1)
    samples = scaling.from_q6(fine, ranges)
    assert not np.signbit(samples[samples == 0]).any()


def test_the_range_of_a_chunk_does_not_depend_on_signs_of_zeros():
    codec = DeepSIC(value_range="chunk", max_error=0.01)
    array = np.abs(np.random.default_rng(0).normal(size=(16, 24, 1))).astype("f4")
    payloads = []
    for zeros in ((0.0, 0.0), (-0.0, 0.0), (0.0, -0.0), (-0.0, -0.0)):
        array[3, 4], array[9, 9] = zeros
        payloads.append(codec.encode(array))
    assert len({*payloads}) == 1


def test_ranges_per_band_and_clipping():
    array = np.stack([np.full((8, 8), v, "i2") for v in (-500, 10, 3000)], -1)
    codec = DeepSIC(value_range=[(-100, 100), (0, 20), (0, 5000)])
    with pytest.warns(UserWarning, match="clip"):
        decoded = codec.decode(codec.encode(array))
    assert decoded[0, 0].tolist() == [-100, 10, 3000]


@pytest.mark.parametrize(
    "dtype, parameters, words",
    [
        ("f4", {}, "value_range|float32"),
        ("f4", {"value_range": "chunk", "max_error": 0}, "max_error|float32"),
        ("f4", {"value_range": (0, 1e39)}, "value_range|1e+39"),
        ("f4", {"value_range": (1, 1 + 1e-12)}, "value_range|equal"),
        ("f4", {"value_range": (0, 1), "nodata": 1e300}, "nodata|1e+300"),
        ("u1", {"value_range": (0, 256)}, "value_range|256"),
        ("u2", {"value_range": (-1, 5)}, "value_range|-1"),
        ("u2", {"value_range": (0.5, 5)}, "value_range|0.5"),
        ("u1", {"value_range": [(0, 1), (0, 1)]}, "value_range|2 pairs|3"),
        ("u1", {"nodata": -1}, "nodata|-1"),
        ("u1", {"nodata": 255.5}, "nodata|255.5"),
        ("i2", {"nodata": float("nan")}, "nodata|NaN"),
        ("u1", {"spectral": np.eye(2)}, "spectral|2 x 2|3 bands"),
        ("u2", {"spectral": np.eye(4)}, "spectral|4 x 4|3 bands"),
    ],
    ids=str,
)
def test_parameters_that_do_not_fit_the_dtype(dtype, parameters, words):
    codec = DeepSIC(**parameters)
    check_rejects(ConfigurationError, words, codec.encode, np.zeros((4, 4, 3), dtype))
    for zarr_format in (2, 3):
        like = {"shape": (4, 4, 3), "dtype": dtype, "zarr_format": zarr_format}
        check_rejects(ConfigurationError, words, create_array, {}, codec=codec, **like)
    serializer = codec.convert(DeepSICCodec)
    check_rejects(
        ConfigurationError,
        words,
        zarr.create_array,
        {},
        shape=(4, 4, 3),
        chunks=(4, 4, 3),
        dtype=dtype,
        serializer=serializer,
        compressors=None,
    )


def test_numbers_that_are_none():
    array = np.zeros((4, 4, 3), "f4")
    for bad in (np.nan, np.inf, -np.inf):
        array[1, 2, 0] = bad
        codec = DeepSIC(value_range=(0, 1), nodata=-1)
        check_rejects(UnsupportedArray, "1 NaN or infinite sample|-1", codec.encode, array)
        for nodata in (None, np.nan) if np.isinf(bad) else ():
            codec = DeepSIC(value_range=(0, 1), nodata=nodata)
            check_rejects(UnsupportedArray, "1 infinite sample|NaN if", codec.encode, array)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_features_say_that_they_clip(dtype):
    array = np.full((20, 30, 3), 7, dtype)
    array[3, 4:6], array[5, 5] = 100, 2
    codec = DeepSIC(value_range=(5, 50), nodata=2)
    with pytest.warns(UserWarning, match="value_range: features clip 6 samples .* transform='wavelet'"):
        decoded = codec.decode(codec.encode(array))
    assert decoded.max() == 50 and (decoded[5, 5] == 2).all()
    array[3, 4:6] = 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.encode(array)


@pytest.mark.filterwarnings("error")
def test_the_largest_float_as_it_is_written():
    """Other software writes it in eight digits, which is more than the number."""
    array = picture((20, 30), "f4")
    array[3:9] = np.finfo("f4").min
    codec = DeepSIC(axes="yx", value_range="chunk", nodata=-3.4028235e38)
    np.testing.assert_array_equal(codec.decode(codec.encode(array)) == np.finfo("f4").min, array < 0)


def test_too_many_bands():
    codec = DeepSIC(axes="yxc")
    wide = {"shape": (4, 4, 257), "chunks": (4, 4, 257), "dtype": "u1"}
    check_rejects(UnsupportedArray, "257 bands", create_array, {}, **wide, codec=codec)
    check_rejects(
        ConfigurationError,
        "value_range|3 pairs|6 bands",
        create_array,
        {},
        shape=(4, 4, 6),
        chunks=(4, 4, 3),
        dtype="u2",
        codec=DeepSIC(value_range=[(0, 1)] * 3),
    )


def test_bounded_chunks_decode_without_a_model(monkeypatch):
    from deepsic_codec.codec import decode

    def never(*arguments):
        raise AssertionError("a model was loaded")

    arrays = [picture((20, 30, 3), "u2", seed) for seed in range(3)]
    codec = DeepSIC(max_error=0, semantics="post")
    payloads = codec.encode_batch(arrays)
    monkeypatch.setattr(decode, "load_model", never)
    for array, decoded in zip(arrays, codec.decode_batch(payloads), strict=True):
        np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("nodata", [None, 7])
def test_labels_without_features_are_computed(nodata):
    """`test_model.py` compares symbols."""
    array = picture((70, 80, 4), "u1")
    array[:10] = 7
    codec = DeepSIC(max_error=0, nodata=nodata, value_range="chunk")
    payload = codec.encode(array)
    assert "features" not in sections(payload)
    block = compute_labels(parse_payload(payload))
    assert encode_labels(block) == h.unpack(payload).sections[LABELS.kind]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_both_formats(zarr_format, dtype, tmp_path):
    array = picture((70, 50, 5), dtype)
    array[10:20, 10:20] = 0
    codec = DeepSIC(value_range="chunk", nodata=0)
    target = create_array(
        str(tmp_path / "a"), shape=array.shape, dtype=dtype, chunks=(32, 32, 5), codec=codec, zarr_format=zarr_format
    )
    target[...] = array
    again = zarr.open_array(str(tmp_path / "a"), mode="r")
    assert again.fill_value == 0 and again.dtype.newbyteorder("=") == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_allclose(again[...], array, atol=0.51 if again.dtype.kind != "f" else 1e-4, rtol=1e-4)
    np.testing.assert_array_equal(again[...] == 0, array == 0)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_nan_through_metadata(zarr_format, tmp_path):
    array = picture((70, 50), "f4")
    array[3:9] = np.nan
    codec = DeepSIC(axes="yx", value_range="chunk", nodata=np.nan, max_error=1e-3)
    target = create_array(
        str(tmp_path / "a"),
        data=array,
        chunks=(32, 32),
        codec=codec,
        zarr_format=zarr_format,
    )
    assert np.isnan(target.fill_value)
    name = ".zarray" if zarr_format == 2 else "zarr.json"
    metadata = json.loads((tmp_path / "a" / name).read_text())
    found = metadata["compressor"] if zarr_format == 2 else metadata["codecs"][0]["configuration"]
    assert found["nodata"] == "NaN" and found["value_range"] == "chunk" and found["max_error"] == 1e-3
    np.testing.assert_allclose(zarr.open_array(str(tmp_path / "a"))[...], array, atol=1e-3, rtol=0)


def test_shards():
    array = picture((64, 64, 4), ">i2")
    codec = DeepSICCodec(max_error=0, nodata=int(array[0, 0, 0]))
    target = create_array({}, data=array, chunks=(16, 32, 4), shards=(32, 64, 4), codec=codec)
    np.testing.assert_array_equal(target[...], array)


@pytest.mark.parametrize("target", [{"psnr": 38}, {"psnr": 45}, {"bpp": 4}, {"bpp": 9}])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_rate_is_found(target, dtype, stub):
    stub.lossy = True
    arrays = [picture((2, 96, 128, 3), dtype, seed) for seed in range(3)]
    codec = DeepSIC(axes="tyxc", value_range=None if dtype == "u1" else "chunk", **target)
    payloads = codec.encode_batch(arrays)
    assert len(stub.sizes("encode")) <= 15 and payloads == [codec.encode(array) for array in arrays]
    for array, payload in zip(arrays, payloads, strict=True):
        header = h.read_header(payload)
        if "residual" not in sections(payload):
            same = DeepSIC(axes="tyxc", value_range=codec.value_range, quality=header.quality).encode(array)
            assert same == payload
        if "bpp" in target:
            others = [DeepSIC(axes="tyxc", value_range=codec.value_range, quality=q) for q in (1, 25, 50, 75, 100)]
            off = [
                abs(8 * len(p) / (2 * 96 * 128) / target["bpp"] - 1)
                for p in (payload, *(c.encode(array) for c in others))
            ]
            assert off[0] <= max(0.03, min(off[1:]))
    extremes = [DeepSIC(axes="tyxc", bpp=rate).encode(arrays[0].astype("u1")) for rate in (1e-6, 1e6)]
    assert h.read_header(extremes[0]).quality == 1
    np.testing.assert_array_equal(codec.decode(extremes[1]), arrays[0].astype("u1"))


def _changed(payload, name, change):
    """The payload with other bytes in a section, all checksums right."""
    header = h.read_header(payload)
    parts = {raw(section): h.read_section(payload, header, raw(section)) for section in SECTIONS}
    (changed,) = (section for section in parts if section.name == name)
    parts[changed] = change(parts[changed])
    fields = ("dtype", "shape", "order", "axes", "decoder", "head", "quality", "grid", "grouping")
    kept = {section: data for section, data in parts.items() if data is not None}
    return h.pack(**{field: getattr(header, field) for field in fields}, sections=kept)


@pytest.mark.parametrize(
    "dtype, name, change, error, words",
    [
        ("u2", "value range", lambda data: b"", CorruptPayload, "value range|empty"),
        ("u2", "value range", lambda data: None, CorruptPayload, "value range section is missing"),
        ("u2", "value range", lambda data: b"\x02" + data[1:], UnsupportedPayload, "value range|layout 2"),
        ("u2", "value range", lambda data: data + b"\0", CorruptPayload, "value range|bytes"),
        ("u2", "value range", lambda data: b"\0" + data[1:], CorruptPayload, "value range|bytes"),
        ("u2", "value range", lambda data: b"\0\x09\0\x08\0", CorruptPayload, "ends before"),
        ("f4", "value range", lambda data: b"\0" + np.float32([0, np.nan]).tobytes(), CorruptPayload, "not finite"),
        ("u2", "nodata", lambda data: data[:2], CorruptPayload, "nodata section"),
        ("u2", "nodata", lambda data: data[:2] + b"\x08", UnsupportedPayload, "nodata section|layout"),
        ("u2", "nodata", lambda data: b"\xff\xff\0", CorruptPayload, "neighbour"),
        ("u2", "nodata", lambda data: b"\0\0\4", CorruptPayload, "neighbour"),
        ("u2", "nodata", lambda data: data[:2] + b"\0x", CorruptPayload, "without a mask"),
        ("f4", "nodata", lambda data: np.float32(np.inf).tobytes() + b"\0", CorruptPayload, "neighbour"),
        ("u2", "residual", lambda data: b"", CorruptPayload, "residual section|empty"),
        ("u2", "residual", lambda data: b"\3" + data[1:], UnsupportedPayload, "residual section|layout 3"),
        ("u2", "residual", lambda data: b"\1" + data[1:], CorruptPayload, "residual section|layout 1"),
        ("u2", "residual", lambda data: b"\0\0" + data[2:], CorruptPayload, "step 0"),
        ("u2", "residual", lambda data: b"\0", CorruptPayload, "truncated"),
        ("f4", "residual", lambda data: b"\1\1" + np.float64(-1).tobytes(), CorruptPayload, "unit -1"),
        ("f4", "residual", lambda data: b"\1\1\0", CorruptPayload, "truncated"),
    ],
)
def test_damaged_sections(dtype, name, change, error, words):
    codec = DeepSIC(value_range="chunk", nodata=1, max_error=0.01 if dtype == "f4" else 1)
    array = picture((10, 10, 3), dtype)
    array[3] = 1
    check_rejects(error, words, codec.decode, _changed(codec.encode(array), name, change))


def test_a_chunk_without_features_has_no_data():
    payload = DeepSIC(nodata=5).encode(np.full((9, 9, 3), 5, "u1"))
    unpacked = h.unpack(payload)
    assert payload_nodata.is_empty(unpacked.sections[NODATA.kind], unpacked.header)
    check_rejects(
        CorruptPayload,
        "features section",
        DeepSIC().decode,
        _changed(payload, "nodata", lambda data: b"\5\0"),
    )


def test_equal_arrays_of_both_byte_orders_differ_in_the_header_alone():
    little = picture((10, 10, 3), "<u2")
    one, other = DeepSIC().encode(little), DeepSIC().encode(little.astype(">u2"))
    header = h.read_header(one)
    assert one[header.size :] == other[header.size :] and len(one) == len(other)
    assert DeepSIC().decode(other).dtype == np.dtype(">u2")


def test_bands_in_the_place_of_rows_are_pointed_out():
    shape = {"shape": (3, 200, 200), "chunks": (3, 200, 200), "dtype": "u1"}
    check_rejects(UnsupportedArray, "axes='cyx'", create_array, {}, **shape)


def test_a_buffer_in_the_other_byte_order_gets_the_values():
    array = picture((5, 6, 3), ">i2")
    out = np.zeros(array.shape, "<i2")
    DeepSIC(max_error=0).decode(DeepSIC(max_error=0).encode(array), out=out)
    np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize("target", [{"bpp": bpp} for bpp in (0.02, 0.1, 0.2, 0.5)] + [{"quality": 10}, {"psnr": 30}])
def test_few_values_are_stored_without_loss_where_that_takes_as_few_bytes(target):
    """Whether a limit of bytes is out of reach, or far away."""
    y, x = np.mgrid[:64, :64]
    image = np.where((y - 20) ** 2 + (x - 30) ** 2 < 90, 200, 0).astype("u1")
    options = {"axes": "yx", "semantics": "none", "transform": "wavelet"}
    codec, exact = DeepSIC(**options, **target), DeepSIC(**options, max_error=0)
    payload = codec.encode(image)
    assert len(payload) <= 1.02 * len(exact.encode(image))
    np.testing.assert_array_equal(np.asarray(codec.decode(payload)).reshape(image.shape), image)
