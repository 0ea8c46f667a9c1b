"""The residual coder: round trips, a second decoder, pinned bytes, hostile sections."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders import residual as residual_coder
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding
from deepsic_codec.payload.coders.residual import RANGE_MAX, decode_integers, encode_integers
from deepsic_codec.payload.coders.residual_band import START, code_filter
from deepsic_codec.payload.coders.residual_filter import TAPS
from deepsic_codec.reference import ResidualDecoder
from tests.common import guarded


def roundtrip(values, mask=None, step=1):
    data, restored = encode_integers(values, mask, step)
    decoded = decode_integers(data, values.shape, mask, step)
    np.testing.assert_array_equal(decoded, restored)
    assert decoded.dtype == np.int32
    error = np.abs(decoded.astype(np.int64) - values)
    assert error.max(where=True if mask is None else ~mask, initial=0) <= step // 2
    return data


def picture(shape, seed=0, noise=3.0):
    """A smooth picture with an edge, and noise that is larger at the edge and alike in all bands."""
    rng = np.random.default_rng(seed)
    s, h, w, c = shape
    y, x = np.mgrid[:h, :w]
    base = 100 + 40 * np.sin(x / 9) + 60 * (y > x)
    level = base[None, :, :, None] + 10 * np.arange(c) + rng.normal(0, 1, (s, 1, 1, 1))
    size = noise * (0.3 + np.abs(np.diff(base, axis=1, prepend=base[:, :1])))
    shared = rng.laplace(0, 1, (s, h, w, 1))
    shared += 0.7 * np.roll(shared, 1, 2) + 0.5 * np.roll(shared, 1, 1)
    noisy = np.rint(level + size[None, :, :, None] * (shared + 0.3 * rng.laplace(0, 1, shape)))
    return np.clip(noisy, -RANGE_MAX // 2, RANGE_MAX // 2).astype(np.int32)


@st.composite
def chunks(draw):
    """Integers, a mask or None, and a step."""
    shape = tuple(draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    half = RANGE_MAX // 2
    spread = draw(st.sampled_from([0, 0.2, 2, 50, 3000, half]))
    kind = draw(st.sampled_from(["noise", "constant", "extremes", "picture"]))
    if kind == "picture":
        values = picture(shape, draw(st.integers(0, 99)), min(spread, 3000))
    elif kind == "extremes":
        values = rng.choice([-half, 0, half], shape)
    elif kind == "constant":
        values = np.full(shape, int(spread))
    else:
        values = np.clip(np.rint(rng.laplace(0, 1, shape) * spread), -half, half)
    offset = draw(st.sampled_from([0, -(2**31) + half, 2**31 - 1 - half]))
    share = draw(st.sampled_from([None, 0.1, 0.9, 1]))
    mask = None if share is None else rng.random(shape) < share
    if mask is not None and draw(st.booleans()):
        mask[:, : shape[1] // 2] = True
    values = np.clip(values.astype(np.int64), -half, half) + offset
    return values.astype(np.int32), mask, draw(st.sampled_from([1, 2, 3, 9, 131071]))


@settings(deadline=None, max_examples=80)
@given(chunks())
def test_roundtrip(chunk):
    roundtrip(*chunk)


@settings(deadline=None, max_examples=15)
@given(chunks())
def test_second_decoder_agrees(chunk):
    values, mask, step = chunk
    values, mask = values[:2, :12, :12], None if mask is None else mask[:2, :12, :12]
    data, restored = encode_integers(values, mask, step)
    decoded = ResidualDecoder(data, values.shape, step, mask).decode()
    np.testing.assert_array_equal(decoded, decode_integers(data, values.shape, mask, step))
    assert mask is not None or np.array_equal(decoded, restored)


@pytest.mark.parametrize(("noise", "step"), [(1.0, 1), (400.0, 1), (5.0, 7)])
def test_second_decoder_agrees_on_what_the_encoder_chose(noise, step):
    """Large enough for weights, and for references of both kinds."""
    values = picture((2, 24, 30, 4), noise=noise)
    data, restored = encode_integers(values, None, step)
    np.testing.assert_array_equal(ResidualDecoder(data, values.shape, step, None).decode(), restored)


def test_stream_is_pinned():
    """These bytes are the format, and the encoder's choices: a change here breaks stored archives, or equal bytes."""
    pictures = (((1, 1.0), 1), ((2, 300.0), 1), ((3, 10.0), 5))
    data = b"".join(roundtrip(picture((2, 40, 33, 3), *arguments), None, step) for arguments, step in pictures)
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == PINNED


PINNED = (21589, "38156712b012dacd")


@pytest.mark.parametrize(("strip", "rows"), [(1, 1), (66, 2), (200, 5)])
@pytest.mark.parametrize("share", [None, 0.02, 0.6])
def test_strips_change_nothing(monkeypatch, strip, rows, share):
    """Rows are coded strip by strip; with a mask, some have no data, among them the first ones."""
    values = picture((2, 37, 33, 3), noise=3.0)
    mask = None if share is None else np.random.default_rng(3).random(values.shape) < share
    if mask is not None:
        mask[0, :11], mask[1, 20:29], mask[1, :, :, 2] = True, True, True
    for step in (1, 5):
        expected, restored = encode_integers(values, mask, step)
        with monkeypatch.context() as context:
            context.setattr(residual_coder, "STRIP", strip)
            context.setattr(residual_coder, "MIN_ROWS", rows)
            data, restored_too = encode_integers(values, mask, step)
            decoded = decode_integers(data, values.shape, mask, step)
        assert data == expected
        np.testing.assert_array_equal(restored_too, restored)
        np.testing.assert_array_equal(decoded, restored)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("step", [1, 3])
def test_integers_of_any_dtype_have_the_same_bytes(dtype, step):
    values = picture((1, 20, 30, 3)).clip(0, 255)
    expected, restored = encode_integers(values, None, step)
    data, narrow = encode_integers(values.astype(dtype), None, step)
    decoded = decode_integers(data, values.shape, None, step, dtype)
    assert data == expected
    assert narrow.dtype == decoded.dtype == dtype
    np.testing.assert_array_equal(narrow, restored)
    np.testing.assert_array_equal(decoded, restored)


@pytest.mark.parametrize("step", [1, 3])
def test_integers_are_not_written_to(step):
    values = picture((1, 20, 30, 3))
    values.flags.writeable = False
    roundtrip(values, None, step)
    assert encode_integers(values, None, 1)[1] is values


def test_integers_beyond_the_dtype_are_wider():
    values = picture((1, 20, 30, 1)) - 300
    data, _ = encode_integers(values)
    decoded = decode_integers(data, values.shape, dtype=np.uint8)
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, values)


def test_constants_cost_almost_nothing():
    assert len(roundtrip(np.full((1, 64, 64, 3), 700, np.int32))) < 20


def test_samples_under_the_mask_cost_nothing():
    """They lie far off, and would be most of the bytes."""
    values = picture((1, 64, 64, 1))
    mask = np.zeros(values.shape, bool)
    mask[:, 10:40, 20:50] = True
    holed = np.where(mask, 40000, values).astype(np.int32)
    assert len(roundtrip(holed, mask)) < 0.9 * len(roundtrip(values))


def test_coder_uses_what_bands_share():
    """Three equal bands cost little more than one."""
    rng = np.random.default_rng(0)
    band = np.rint(rng.laplace(0, 6, (1, 64, 64, 1))).astype(np.int32)
    one, three = (roundtrip(np.repeat(band, n, 3)) for n in (1, 3))
    assert len(three) < 1.5 * len(one)


def test_coder_uses_the_slice_before():
    rng = np.random.default_rng(0)
    plane = np.rint(rng.laplace(0, 6, (1, 64, 64, 1))).astype(np.int32)
    one, two = (roundtrip(np.repeat(plane, n, 0)) for n in (1, 2))
    assert len(two) < 1.4 * len(one)


def test_bands_that_share_nothing_are_coded_alone():
    """A loud band before does not blur the local size of a quiet one."""
    rng = np.random.default_rng(0)
    loud, quiet = np.rint(rng.laplace(0, 900, (1, 64, 64, 1))), np.rint(rng.laplace(0, 2, (1, 64, 64, 1)))
    both = np.concatenate([loud, quiet], axis=3).astype(np.int32)
    alone = sum(len(roundtrip(band.astype(np.int32))) for band in (loud, quiet))
    assert len(roundtrip(both)) < 1.02 * alone


def test_values_are_learned():
    """A dark sensor: most samples have one value, at random places, others are larger. A Laplacian takes 4 bits."""
    rng = np.random.default_rng(0)
    shape = (1, 128, 128, 1)
    values = np.where(rng.random(shape) < 0.8, 5, rng.integers(10, 25, shape)).astype(np.int32)
    assert 8 * len(roundtrip(values)) < 3.2 * values.size


def test_local_size_is_followed():
    """Half of the picture quiet, half loud: near the entropy of each half."""
    rng = np.random.default_rng(0)
    quiet, loud = np.rint(rng.laplace(0, 0.5, (64, 64))), np.rint(rng.laplace(0, 30, (64, 64)))
    values = np.concatenate([quiet, loud], 1).astype(np.int32)[None, :, :, None]
    ideal = sum(
        -(p * np.log2(p)).sum() * half.size
        for half in (quiet, loud)
        for p in [np.unique(half, return_counts=True)[1] / half.size]
    )
    assert 8 * len(roundtrip(values)) < 1.1 * ideal


def test_steps_make_streams_smaller():
    values = picture((1, 64, 64, 2), noise=20)
    sizes = [len(roundtrip(values, None, step)) for step in (1, 3, 9, 33)]
    assert all(8 * (a - b) > values.size for a, b in zip(sizes, sizes[1:], strict=False))


def test_range_and_shape_are_checked():
    values = picture((1, 4, 4, 3))
    values[0, 0, 0, 0], values[0, 1, 1, 0] = 0, RANGE_MAX + 1
    with pytest.raises(ValueError, match="apart"):
        encode_integers(values)
    with pytest.raises(ValueError, match="expected"):
        encode_integers(values[0])


def decodes_or_refuses(data, shape, mask=None, step=1):
    try:
        decoded = decode_integers(data, shape, mask, step)
    except CorruptPayload:
        return
    assert decoded.shape == shape


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300), st.integers(0, 3), st.sampled_from([1, 9, 131071]))
def test_any_bytes_decode_or_are_refused(data, which, step):
    shape = ((1, 5, 7, 3), (3, 1, 9, 1), (1, 8, 1, 5), (2, 2, 2, 2))[which]
    decodes_or_refuses(data, shape, None, step)
    ranges = b"\x07\xff\xff\xff\x07" * shape[3]
    decodes_or_refuses(ranges + bytes([min(len(data), 127)]) + data, shape, None, step)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_flipped_bits_decode_or_are_refused(at, bit):
    shape = (1, 20, 20, 3)
    data = bytearray(encode_integers(picture(shape, noise=30))[0])
    data[at % len(data)] ^= 1 << bit
    decodes_or_refuses(bytes(data), shape)


def test_cut_sections_are_refused():
    shape = (1, 12, 12, 3)
    data, _ = encode_integers(picture(shape, noise=30))
    for end in range(len(data)):
        with pytest.raises(CorruptPayload):
            decode_integers(data[:end], shape)


@pytest.mark.parametrize("noise", [1, 30])
def test_bytes_left_over_are_refused(noise):
    shape = (1, 12, 12, 3)
    data, _ = encode_integers(picture(shape, noise=noise))
    for more in (b"\0", b"\1", b"12345678"):
        with pytest.raises(CorruptPayload):
            decode_integers(data + more, shape)


def test_impossible_content_is_refused():
    """A stream of ones asks for weights without end; modes need earlier bands; ranges have a limit."""
    shape = (1, 3, 3, 1)
    with pytest.raises(CorruptPayload, match="weight is outside"):
        decode_integers(b"\x00\x05\x00" + bytes(4000), shape)
    for mode in (1, 2, 3):
        with pytest.raises(CorruptPayload, match="references"):
            decode_integers(b"\x00\x05\x00" + bytes([mode]), shape)
    for start in (b"\x00\x80\x80\x80\x08", b"\xfe\xff\xff\xff\x0f\x05"):
        with pytest.raises(CorruptPayload, match="range"):
            decode_integers(start + b"\x00\x00", shape)


def test_endless_escapes_are_refused():
    """The first bit is a zero, for no new weights; all others are ones, as the value stays at the low end."""
    stream = bytes.fromhex("7fffffff8001") + bytes(40) + b"\x01"
    with pytest.raises(CorruptPayload, match="sample is outside"):
        decode_integers(b"\x00\x05" + bytes([len(stream)]) + stream, (1, 9, 9, 1))


def test_impossible_weights_have_no_context_beyond_the_last_one():
    memory, beyond = guarded(START.nbytes)
    contexts = memory.view(np.uint32)
    contexts[:] = START
    start, stream = begin_decoding(b"", "")
    state, weights = np.concatenate([start, np.zeros(3, np.int64)]), np.zeros(len(TAPS), np.int64)
    status = code_filter(True, weights, len(TAPS), weights.copy(), contexts, state, stream, stream)
    assert status == 1 and (beyond == 165).all()


def test_start_is_pinned():
    assert hashlib.sha256(START.astype("<u4").tobytes()).hexdigest()[:16] == "4caaff0bf762c1bd"


@pytest.mark.parametrize("sizes", [(0, 0), (64, 2000), (2000, 64), (2500, 2500), (3100, 1700)])
@pytest.mark.parametrize("spread", [20, 3000, RANGE_MAX // 2])
def test_nothing_is_written_beyond_the_outputs(spread, sizes):
    """Neither of coded nor of plain bits, while weights are written and while samples are."""
    rng = np.random.default_rng(spread)
    samples = np.rint(rng.laplace(0, 1, (1, 4, 500, 3)) * spread)
    samples = np.clip(samples + RANGE_MAX // 2, 0, RANGE_MAX).astype(np.int32)
    (data, beyond), (plain, beyond_plain) = (guarded(size) for size in sizes)
    coder = residual_coder._Coder(begin_encoding(), data, plain, 3)
    coder.code(samples, samples, None, np.zeros(3, np.int64), np.full(3, RANGE_MAX), 1, 0)
    assert (beyond == 165).all() and (beyond_plain == 165).all(), "written beyond the end of an output"
    assert coder.state[3] > 1000


def test_a_mask_costs_no_prediction():
    """The filter is fitted to samples that are coded, some of which vary more than others."""
    scale = np.where(np.arange(96) % 48 < 24, 2, 60)[:, None]
    smooth = np.random.default_rng(0).normal(0, 1, (96, 99)).cumsum(axis=1)
    values = 2000 + scale * (smooth[:, :-3] + smooth[:, 1:-2] + smooth[:, 2:-1] + smooth[:, 3:])
    values = values.astype(np.int32)[None, ..., None]
    wide, mask = np.zeros((1, 96, 288, 1), np.int32), np.ones((1, 96, 288, 1), bool)
    wide[:, :, 96:192], mask[:, :, 96:192] = values, False
    assert len(encode_integers(wide, mask)[0]) <= len(encode_integers(values)[0])
