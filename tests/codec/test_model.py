"""The codecs with the packaged model: what the lossless stand-in cannot show."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, DeepSICCodec, chunk_attrs, create_array
from deepsic_codec.errors import UnsupportedPayload
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload.sections import LABELS, RESIDUAL
from tests.codec.test_entry_points import installed  # noqa: F401  # a fixture
from tests.common import (
    check_config,
    check_lazy,
    check_rejects,
    check_repr,
    check_roundtrip,
    photograph,
    psnr,
    run_python,
)

DECIBELS = 30  # at quality 50 on smooth content; scrambled pixels give less than 15


@pytest.mark.parametrize(
    "axes,shape",
    [
        ("yxc", (1, 1, 3)),
        ("yxc", (64, 64, 3)),
        ("yxc", (130, 77, 3)),
        ("cyx", (3, 40, 65)),
        ("yx", (63, 129)),
        ("xyc", (33, 16, 1)),
        ("tyxc", (3, 50, 40, 3)),
        ("yzxct", (40, 2, 50, 3, 2)),
    ],
)
@pytest.mark.parametrize("order", "CF")
def test_roundtrip(axes, shape, order):
    check_roundtrip(DeepSIC(axes=axes), np.array(photograph(*shape), order=order), decibels=DECIBELS)


def test_codec():
    for codec in (DeepSIC(), DeepSIC(quality=12.5, semantics="post")):
        check_config(codec.resolved())
        check_repr(codec)


def test_quality():
    array = photograph(128, 128, 3)
    payloads = DeepSIC(quality=10).encode(array), DeepSIC(quality=50).encode(array), DeepSIC(quality=90).encode(array)
    assert sorted(payloads, key=len) == list(payloads)
    results = [psnr(DeepSIC().decode(payload), array) for payload in payloads]
    assert sorted(results) == results


def test_grey_comes_back_grey():
    array = photograph(64, 64)
    colour = np.repeat(array[..., None], 3, axis=-1)
    decoded = DeepSIC().decode(DeepSIC(axes="yx", transform="features").encode(array))
    triple = DeepSIC().decode(DeepSIC(transform="features").encode(colour)).astype(int)
    np.testing.assert_array_equal(decoded, np.floor(triple.mean(axis=-1) + 0.5))


@pytest.mark.parametrize("axes,array", [("yxc", photograph(96, 80, 3)), ("yx", photograph(70, 33))])
def test_formats_write_the_same_bytes(axes, array):
    expected = DeepSIC(axes=axes).encode(array)
    for zarr_format in (2, 3):
        store = {}
        z = create_array(store, data=array, chunks=array.shape, codec=DeepSIC(axes=axes), zarr_format=zarr_format)
        key = z.metadata.encode_chunk_key((0,) * array.ndim)
        assert store[key].to_bytes() == expected
        np.testing.assert_array_equal(z[...], DeepSIC().decode(expected))


def test_alone_or_among_others():
    arrays = [photograph(128, 100, 3, seed=i) for i in range(16)] + [photograph(64, 64, 3, seed=i) for i in range(3)]
    together = DeepSIC().encode_batch(arrays)
    for array, payload, decoded in zip(arrays, together, DeepSIC().decode_batch(together), strict=True):
        assert psnr(decoded, array) >= DECIBELS
        alone = DeepSIC().encode(array)
        assert psnr(DeepSIC().decode(alone), decoded) > 40
        np.testing.assert_allclose(_scores(alone), _scores(payload), atol=1 / 255 + 1e-6)


def _scores(payload):
    """Class scores by name, unsorted: faint ones may be stored in one payload and just not in the other."""
    header = payload_header.read_header(payload)
    block = payload_header.read_section(payload, header, LABELS)
    dense = block.dense(255) / 255
    return np.where(dense < 0.05, 0, dense)


@pytest.mark.parametrize("arguments", [{"zarr_format": 2}, {}, {"shards": (128, 128, 3)}], ids=str)
def test_sixteen_threads(arguments):
    array = photograph(256, 256, 3)
    z = create_array({}, shape=array.shape, dtype="u1", chunks=(64, 64, 3), **arguments)
    step = 128 if "shards" in arguments else 64  # one writer for each shard
    parts = [np.s_[y : y + step, x : x + step] for y in range(0, 256, step) for x in range(0, 256, step)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda part: z.__setitem__(part, array[part]), parts, timeout=120))
        read = np.empty_like(array)
        list(pool.map(lambda part: read.__setitem__(part, z[part]), parts, timeout=120))
    assert psnr(read, array) >= DECIBELS
    assert min(psnr(read[part], array[part]) for part in parts) >= DECIBELS


def test_labels_now_or_later():
    array = photograph(128, 192, 3)
    now = create_array({}, data=array, chunks=(128, 192, 3))
    later = create_array({}, data=array, chunks=(128, 192, 3), codec=DeepSIC(semantics="post"))
    first, second = chunk_attrs(now, (0, 0, 0)), chunk_attrs(later, (0, 0, 0))
    assert first["tile_shape"] == second["tile_shape"] == [64, 64]
    names = {*now.attrs["deepsic"]["vocabulary"]["classes"], "unknown"}
    for attrs in (first, second):
        assert len(attrs["labels"]) == 6
        for tile in attrs["labels"]:
            assert tile and set(tile) <= names
            assert list(tile.values()) == sorted(tile.values(), reverse=True)
    assert second["nbytes"] < first["nbytes"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_process_that_never_imported_the_package(installed, tmp_path, zarr_format):  # noqa: F811
    array = photograph(70, 45, 3)
    z = create_array(tmp_path / "a.zarr", data=array, chunks=(32, 32, 3), zarr_format=zarr_format)
    code = f"import zarr; print(zarr.open({str(tmp_path / 'a.zarr')!r}, mode='r')[...].sum(dtype='i8'))"
    assert run_python(code, installed).strip() == str(z[...].sum(dtype="i8"))
    code = (
        f"from deepsic_codec import chunk_attrs, open_archive; z = open_archive({str(tmp_path / 'a.zarr')!r})\n"
        "print(chunk_attrs(z, (1, 0, 0)))"
    )
    assert check_lazy(code, installed).strip() == str(chunk_attrs(z, (1, 0, 0)))


def test_creating_is_light(installed):  # noqa: F811
    check_lazy("from deepsic_codec import create_array; create_array({}, shape=(8, 8, 3), dtype='u1')", installed)


def test_plain_zarr_functions():
    array = photograph(70, 45, 3)
    two = zarr.open(
        {}, mode="w", zarr_format=2, compressor=DeepSIC(), shape=array.shape, chunks=(32, 32, 3), dtype="u1"
    )
    three = zarr.create_array(
        {}, shape=array.shape, chunks=(32, 32, 3), dtype="u1", serializer=DeepSICCodec(), compressors=None
    )
    for z in (two, three):
        z[...] = array
        assert psnr(z[...], array) >= DECIBELS
        assert chunk_attrs(z, (0, 1, 0))["labels"]


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f4"])
@pytest.mark.parametrize("bound", [0, 2])
def test_error_is_bounded(dtype, bound):
    grey = photograph(70, 90, 4).astype("f8")
    array = (grey / 2 if dtype == "i1" else grey if dtype == "u1" else grey * 50 - 300 * (dtype == "i2")).astype(dtype)
    array[10:30, 10:30] = 7
    array[60:, :, 2] = 7
    bound = bound or (1e-4 if dtype == "f4" else 0)
    codec = DeepSIC(value_range="chunk", max_error=bound, nodata=7)
    payload = check_roundtrip(codec, array, -np.inf)
    decoded = codec.decode(payload)
    assert np.abs(decoded.astype("f8") - array.astype("f8")).max() <= bound
    np.testing.assert_array_equal(decoded == 7, array == 7)
    assert len(payload) < array.nbytes


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_rate_is_found(dtype):
    unit, ranges = (1, None) if dtype == "u1" else (100, (0, 25500))
    array = photograph(130, 150, 3).astype(dtype) * np.array(unit, dtype)

    def decibels(payload):
        return psnr(DeepSIC().decode(payload) / unit, array / unit)

    least, most = (DeepSIC(value_range=ranges, quality=quality).encode(array) for quality in (10, 90))
    for nbytes in np.geomspace(1.1 * len(least), 0.9 * len(most), 4):
        payload = DeepSIC(value_range=ranges, bpp=8 * nbytes / (130 * 150)).encode(array)
        assert abs(len(payload) - nbytes) <= max(0.06 * nbytes, 16)  # noise comes and goes with the step
    for wanted in np.linspace(decibels(least) + 0.3, decibels(most) - 0.3, 3):
        assert abs(decibels(DeepSIC(value_range=ranges, psnr=wanted).encode(array)) - wanted) <= 0.2


def test_rates_beyond_those_of_features():
    """Noise, where samples in steps take fewer bytes than wavelets; steps of integers may be better than the target."""
    array = np.random.default_rng(5).integers(0, 256, (70, 90, 3)).astype("u1") // 2 + photograph(70, 90, 3) // 2
    kinds = set()
    for wanted in (38, 50, 60):
        payload = DeepSIC(psnr=wanted).encode(array)
        kinds.add(bool(payload_header.read_header(payload).entry(RESIDUAL.kind)))
        reached = psnr(DeepSIC().decode(payload), array)
        assert reached >= wanted - 0.2
        if reached < 70:  # those have the least errors that steps of integers can have
            assert len(payload) <= len(DeepSIC(psnr=reached, transform="wavelet").encode(array)) * 1.1
    for bpp in (8, 14):
        assert 8 * len(DeepSIC(bpp=bpp).encode(array)) / (70 * 90) / bpp <= 1.03
    for dtype in ("u2", "f4"):
        deep = array.astype(dtype) * np.array(100, dtype)
        decoded = DeepSIC().decode(DeepSIC(psnr=44, value_range=(0, 25500)).encode(deep))
        assert abs(psnr(decoded / 100, array) - 44) <= 0.2
    assert kinds == {False, True}, "wavelets at low targets, samples in steps at high ones"


@pytest.mark.parametrize("options", [{"max_error": 0}, {"transform": "wavelet"}], ids=str)
def test_chunks_without_features_say_so(options):
    payload = DeepSIC(**options).encode(photograph(70, 80, 3))
    check_rejects(UnsupportedPayload, "features", DeepSIC().decode_features, payload)
