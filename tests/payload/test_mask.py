"""The mask coder: round trips, a second decoder, sizes, hostile sections."""

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec import reference
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders import mask as mask_coder
from deepsic_codec.payload.coders.interval import begin_encoding, finish_encoding
from deepsic_codec.payload.coders.mask import decode_mask, encode_mask
from tests.common import guarded


def roundtrip(mask):
    data = encode_mask(mask)
    decoded = decode_mask(data, mask.shape)
    np.testing.assert_array_equal(decoded, mask)
    assert decoded.dtype == bool
    return data


def edge(size=256, slices=1):
    """A scene that lies askew in its raster."""
    y, x = np.mgrid[:size, :size]
    return np.repeat((y + 0.3 * x > 0.6 * size)[None], slices, 0)


@st.composite
def masks(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = rng.random(shape) < draw(st.sampled_from([0, 0.02, 0.5, 1]))
    if draw(st.booleans()):
        mask |= edge(20, shape[0])[:, : shape[1], : shape[2]]
    for s in range(1, shape[0]):
        kind = draw(st.integers(0, 3))
        if kind == 0:
            mask[s] = mask[s - 1]
        elif kind == 1:
            mask[s] = draw(st.booleans())
    return mask


@settings(deadline=None, max_examples=100)
@given(masks())
def test_roundtrip_and_second_decoder(mask):
    data = roundtrip(mask)
    np.testing.assert_array_equal(reference.decode_mask(data, mask.shape, "mask"), mask)


def test_stream_is_pinned():
    rng = np.random.default_rng(5)
    mask = edge(64, 3)
    mask[1] ^= rng.random((64, 64)) < 0.05
    data = roundtrip(mask)
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == PINNED


PINNED = (230, "293b1982e45abf76")


@pytest.mark.parametrize("value", [False, True])
def test_uniform_masks_take_a_byte_or_two(value):
    assert len(roundtrip(np.full((5, 512, 512), value))) <= 2


def test_edges_are_cheap_and_repeats_free():
    one, eight = roundtrip(edge(256)), roundtrip(edge(256, 8))
    assert len(one) < 160
    assert len(eight) <= len(one) + 2


@pytest.mark.parametrize("shape", [(1, 40, 2000), (40, 1, 2000), (1, 300, 300)])
def test_noise_beyond_the_first_buffer_comes_back(shape):
    assert len(roundtrip(np.random.default_rng(3).random(shape) < 0.5)) > 2 * 4096


@pytest.mark.parametrize("size", [0, 64, 500, 1000, 3000, 4096, 6100])
@pytest.mark.parametrize("shape", [(1, 30, 2000), (30, 1, 2000), (3, 200, 60), (30000, 1, 1)])
def test_nothing_is_written_beyond_the_output(shape, size):
    mask = np.random.default_rng(4).random(shape) < 0.5
    buffer, beyond = guarded(size)
    state = begin_encoding()
    data = mask_coder._code_mask(False, mask.view(np.uint8), state, buffer)
    assert (beyond == 165).all(), "written beyond the end of the output"
    assert finish_encoding(state, data) == encode_mask(mask)


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="bool"):
        encode_mask(np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="bool"):
        encode_mask(np.zeros((2, 2), bool))


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200), st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)))
def test_any_bytes_decode_or_are_refused(data, shape):
    with contextlib.suppress(CorruptPayload):
        assert decode_mask(data, shape).shape == shape


def test_bytes_left_over_are_refused():
    data = encode_mask(edge(40))
    with pytest.raises(CorruptPayload, match="left over"):
        decode_mask(data + b"12345678", (1, 40, 40))
    with pytest.raises(CorruptPayload, match="zero byte"):
        decode_mask(data + b"\0", (1, 40, 40))


def test_cut_sections_decode_or_are_refused():
    data = encode_mask(edge(40))
    for end in range(len(data)):
        with contextlib.suppress(CorruptPayload):
            assert decode_mask(data[:end], (1, 40, 40)).shape == (1, 40, 40)
