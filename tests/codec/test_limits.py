"""Payloads that announce far more than their bytes: refused before anything is allocated for the chunk."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from deepsic_codec import DeepSIC, config
from deepsic_codec.codec.decode import parse_payload
from deepsic_codec.errors import ConfigurationError, UnsupportedArray, UnsupportedPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.limits import COLUMN_BYTES, ROW_BYTES, check_size
from deepsic_codec.payload.sections import FEATURES
from tests.common import check_rejects, photograph, run_python


def announcing(shape, axes="tyxc"):
    """A sound payload of a hundred bytes."""
    sizes = dict(zip(axes, shape, strict=True))
    grid = -(-sizes["y"] // 16), -(-sizes["x"] // 16)
    return h.pack(
        dtype="u1",
        shape=shape,
        order="C",
        axes=axes,
        decoder=bytes(8),
        head=bytes(4),
        quality=50,
        grid=grid,
        sections={FEATURES: b"features"},
    )


@pytest.mark.parametrize(
    "shape",
    [(1, 26000, 26000, 3), (1 << 29, 1, 1, 3), (1 << 20, 2, 2, 3), (1, 1, 1 << 29, 3), (100, 5000, 1400, 3)],
    ids=str,
)
@pytest.mark.parametrize("known", [False, True])
def test_a_huge_chunk_in_a_hundred_bytes(shape, known):
    payload = announcing(shape)
    assert len(payload) < 100
    tracemalloc.start()
    try:
        message = check_rejects(UnsupportedPayload, "max_pixels", parse_payload, payload, shape if known else None)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert "26000" in message or shape[1] != 26000
    check_rejects(UnsupportedPayload, "max_pixels", DeepSIC(axes="tyxc").decode, payload)


def test_the_limit_can_be_changed():
    array = photograph(100, 80, 3)
    codec = DeepSIC()
    payload = codec.encode(array)
    with config.set(max_pixels=100 * 80):  # the border counts
        check_rejects(UnsupportedPayload, "8000 pixels", codec.decode, payload)
        check_rejects(UnsupportedArray, "8000 pixels", codec.encode, array)
    with config.set(max_pixels=9 * 7 * 256):
        assert np.array_equal(codec.decode(codec.encode(array)), codec.decode(payload))
    with pytest.raises(ConfigurationError, match="max_pixels"):
        config.set(max_pixels=0)


@pytest.mark.parametrize(
    "axes,shape,images", [("tyxc", (5, 100, 80, 3), 5), ("yxc", (100, 80, 9), 3), ("zcyx", (2, 7, 100, 80), 6)]
)
def test_every_slice_and_every_image_of_a_slice_counts(axes, shape, images):
    """A chunk that is written can be read with the same limit."""
    codec, array = DeepSIC(axes=axes), np.zeros(shape, "u1")
    with config.set(max_pixels=images * 9 * 7 * 256 - 1):
        check_rejects(UnsupportedArray, "max_pixels", codec.encode, array)
    with config.set(max_pixels=images * 9 * 7 * 256):
        assert codec.decode(codec.encode(array)).shape == shape


@pytest.mark.parametrize("shape", [(1, 16000, 16000, 1), (1, 512, 512, 3), (1000, 64, 64, 3), (8000, 64, 64, 3)])
def test_chunks_of_any_sensible_size_are_within(shape):
    check_size(shape[0], shape[1], shape[2], UnsupportedArray)


@pytest.mark.parametrize(
    "options, dtype, cost, edges",
    [
        ({"quality": 40}, "u1", 44, 0),
        ({"quality": 120}, "u1", 28, 1),
        ({"max_error": 0}, "u2", 48, 1),
        ({"max_error": 1}, "f4", 80, 1),
        ({"max_error": 0}, "i4", 28 + 2 * 12, 1),
    ],
    ids=str,
)
def test_a_chunk_that_takes_too_much_memory_is_refused_beforehand(options, dtype, cost, edges):
    codec, array = DeepSIC(**options), photograph(100, 80, 3).astype(dtype)
    payload = codec.encode(array)
    nbytes = 100 * 80 * cost + edges * (100 * ROW_BYTES + 80 * COLUMN_BYTES)
    with config.set(max_memory=nbytes):
        codec.decode(payload)
    with config.set(max_memory=nbytes - 1):
        message = check_rejects(UnsupportedPayload, "max_memory", codec.decode, payload)
    assert "decoding a chunk of shape (100, 80, 3)" in message


@pytest.mark.parametrize("shape", [(8, 20_000, 3), (1, 50_000, 1), (100_000, 1, 1)], ids=str)
@pytest.mark.parametrize("options", [{"max_error": 0}, {"quality": 60}, {"quality": 60, "filtered": True}], ids=str)
def test_narrow_chunks_take_no_more_memory_than_is_estimated(shape, options, monkeypatch):
    """Their edges take more of it than the samples."""
    options = dict(options)
    filtered = options.pop("filtered", False)
    monkeypatch.setattr("deepsic_codec.codec.wavelet._Part.filter_gains", lambda *_: filtered)
    codec = DeepSIC(axes="yxc", semantics="none", transform="wavelet", **options)
    payload = codec.encode(np.random.default_rng(0).integers(0, 200, shape).astype("u1"))
    codec.decode(payload)  # allocates what stays
    tracemalloc.start()
    try:
        codec.decode(payload)
        assert tracemalloc.get_traced_memory()[1] < parse_payload(payload).nbytes
    finally:
        tracemalloc.stop()


def test_a_chunk_without_data_takes_the_memory_of_its_samples():
    codec = DeepSIC(nodata=0, quality=120)
    payload = codec.encode(np.zeros((1000, 1000, 3), "u2"))
    with config.set(max_memory=6_000_000):
        assert not codec.decode(payload).any()
    with config.set(max_memory=5_999_999):
        check_rejects(UnsupportedPayload, "max_memory", codec.decode, payload)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit needs the size of the process")
def test_a_chunk_beyond_the_limit_of_the_address_space_is_a_typed_error():
    """Of less than what is compared with the memory beforehand; afterwards, everything works."""
    run_python("""
        import resource
        import numpy as np
        from deepsic_codec import DeepSIC
        from deepsic_codec.errors import OutOfMemory

        codec = DeepSIC(max_error=0, axes="yx", semantics="none")
        payloads = [codec.encode(np.arange(n * n, dtype="u2").reshape(n, n) & 1023) for n in (64, 2048)]
        codec.decode(payloads[0])
        large = np.arange(9 << 20, dtype="u2").reshape(3072, 3072)
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), unlimited[1]))
        for call in (lambda: codec.decode(payloads[1]), lambda: codec.encode(large)):
            try:
                call()
            except OutOfMemory as error:
                assert "memory" in str(error)
            else:
                raise AssertionError("done in too little memory")
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        assert codec.decode(payloads[0]).max() == codec.decode(payloads[1]).max() == 1023
    """)
