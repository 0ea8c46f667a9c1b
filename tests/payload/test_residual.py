"""The residual coder: round trips, a second decoder, pinned bytes, hostile sections."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders import residual as residual_coder
from deepsic_codec.payload.coders import residual_filter
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding
from deepsic_codec.payload.coders.residual import RESIDUAL_MAX, START, _code_weights, decode_integers, encode_integers
from deepsic_codec.payload.coders.residual_filter import SLOPE_SHIFT
from tests.common import guarded
from tests.payload import reference_residual


def roundtrip(residual, context):
    data = encode_integers(residual, context)
    decoded = decode_integers(data, context)
    np.testing.assert_array_equal(decoded, residual)
    assert decoded.dtype == np.int32
    return data


def picture(shape, seed=0, noise=3.0):
    """A smooth picture with an edge as context, and a residual that is larger at the edge and alike in all bands."""
    rng = np.random.default_rng(seed)
    s, h, w, c = shape
    y, x = np.mgrid[:h, :w]
    base = 100 + 40 * np.sin(x / 9) + 60 * (y > x)
    context = np.rint(base[None, :, :, None] + 10 * np.arange(c) + rng.normal(0, 1, (s, 1, 1, 1)))
    size = noise * (0.3 + np.abs(np.diff(base, axis=1, prepend=base[:, :1])))
    shared = rng.laplace(0, 1, (s, h, w, 1))
    shared += 0.7 * np.roll(shared, 1, 2) + 0.5 * np.roll(shared, 1, 1)
    residual = np.rint(size[None, :, :, None] * (shared + 0.3 * rng.laplace(0, 1, shape)))
    return np.clip(residual, -RESIDUAL_MAX, RESIDUAL_MAX).astype(np.int32), context.astype(np.int32)


@st.composite
def chunks(draw):
    shape = tuple(draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0, 0.2, 2, 50, 3000, RESIDUAL_MAX]))
    kind = draw(st.sampled_from(["noise", "constant", "extremes", "picture"]))
    if kind == "picture":
        return picture(shape, draw(st.integers(0, 99)), min(spread, 3000))
    if kind == "extremes":
        residual = rng.choice([-RESIDUAL_MAX, 0, RESIDUAL_MAX], shape)
    elif kind == "constant":
        residual = np.full(shape, int(spread))
    else:
        residual = np.clip(np.rint(rng.laplace(0, 1, shape) * spread), -RESIDUAL_MAX, RESIDUAL_MAX)
    limit = draw(st.sampled_from([0, 255, 65535, 2**31 - 1]))
    context = rng.integers(-limit - 1, limit, shape, endpoint=True)
    return residual.astype(np.int32), context.astype(np.int32)


@settings(deadline=None, max_examples=80)
@given(chunks())
def test_roundtrip(chunk):
    roundtrip(*chunk)


@settings(deadline=None, max_examples=15)
@given(chunks())
def test_second_decoder_agrees(chunk):
    residual, context = chunk[0][:2, :12, :12], chunk[1][:2, :12, :12]
    data = encode_integers(residual, context)
    found = reference_residual.decode_residual(data, residual.shape, context.tolist())
    assert all(found[place] == residual[place] for place in np.ndindex(residual.shape))
    assert len(found) == residual.size


@pytest.mark.parametrize(("noise", "bands", "fades"), [(1.0, 3, False), (400.0, 3, False), (0.02, 0, True)])
def test_second_decoder_agrees_on_what_the_encoder_chose(noise, bands, fades):
    """Large enough for weights, which three of four bands have, or slopes far above the residuals."""
    residual, context = picture((1, 24, 30, 4), noise=noise)
    weights = residual_filter.fit(residual, context)
    assert weights[:, : residual_filter.SLOPE_SHIFT].any(axis=1).sum() == bands
    assert weights[:, residual_filter.SLOPE_SHIFT].any() == fades
    found = reference_residual.decode_residual(roundtrip(residual, context), residual.shape, context.tolist())
    assert all(found[place] == residual[place] for place in np.ndindex(residual.shape))


def test_stream_is_pinned():
    """These bytes are the format, and the encoder's weights: a change here breaks stored archives, or equal bytes."""
    data = b"".join(roundtrip(*picture((2, 40, 33, 3), seed, noise)) for seed, noise in ((1, 1.0), (2, 300.0)))
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == PINNED


PINNED = (15942, "0dd0beb141a0bce8")


def test_zeros_cost_almost_nothing():
    shape = (1, 64, 64, 3)
    assert len(roundtrip(np.zeros(shape, np.int32), picture(shape)[1])) < 40


def test_coder_finds_what_bands_share():
    """Three equal bands cost little more than one."""
    rng = np.random.default_rng(0)
    band = np.rint(rng.laplace(0, 6, (1, 64, 64, 1))).astype(np.int32)
    zero = np.zeros_like(band)
    one, three = (roundtrip(np.repeat(band, n, 3), np.repeat(zero, n, 3)) for n in (1, 3))
    assert len(three) < 1.15 * len(one)


def test_local_size_is_followed():
    """Half of the picture quiet, half loud: near the entropy of each half."""
    rng = np.random.default_rng(0)
    quiet, loud = np.rint(rng.laplace(0, 0.5, (64, 64))), np.rint(rng.laplace(0, 30, (64, 64)))
    residual = np.concatenate([quiet, loud], 1).astype(np.int32)[None, :, :, None]
    bits = 8 * len(roundtrip(residual, np.zeros_like(residual)))
    ideal = sum(
        -(p * np.log2(p)).sum() * half.size
        for half in (quiet, loud)
        for p in [np.unique(half, return_counts=True)[1] / half.size]
    )
    assert bits < 1.08 * ideal


def test_range_and_shape_are_checked():
    residual, context = picture((1, 4, 4, 3))
    residual[0, 0, 0, 0] = RESIDUAL_MAX + 1
    with pytest.raises(ValueError, match="within"):
        encode_integers(residual, context)
    with pytest.raises(ValueError, match="one shape"):
        encode_integers(residual[:, :3], context)


def decodes_or_refuses(data, shape, context):
    try:
        found = decode_integers(data, context)
    except CorruptPayload:
        return
    assert found.shape == shape and np.abs(found).max() <= RESIDUAL_MAX


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_bytes_decode_or_are_refused(data, which):
    shape = ((1, 5, 7, 3), (3, 1, 9, 1), (1, 8, 1, 5), (2, 2, 2, 2))[which]
    decodes_or_refuses(data, shape, picture(shape)[1])
    decodes_or_refuses(bytes([min(len(data), 127)]) + data, shape, picture(shape)[1])


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_flipped_bits_decode_or_are_refused(at, bit):
    shape = (1, 20, 20, 3)
    residual, context = picture(shape, noise=30)
    data = bytearray(encode_integers(residual, context))
    data[at % len(data)] ^= 1 << bit
    decodes_or_refuses(bytes(data), shape, context)


def test_cut_sections_decode_or_are_refused():
    shape = (1, 12, 12, 3)
    residual, context = picture(shape, noise=30)
    data = encode_integers(residual, context)
    for end in range(len(data)):
        with pytest.raises(CorruptPayload):
            decode_integers(data[:end], context)


@pytest.mark.parametrize("noise", [1, 30])
def test_bytes_left_over_are_refused(noise):
    shape = (1, 12, 12, 3)
    residual, context = picture(shape, noise=noise)
    data = encode_integers(residual, context)
    for more in (b"\0", b"\1", b"12345678"):
        with pytest.raises(CorruptPayload):
            decode_integers(data + more, context)


def test_impossible_samples_are_refused():
    """A stream of ones asks for weights and escapes without end."""
    zero = np.zeros((1, 3, 3, 2), np.int32)
    with pytest.raises(CorruptPayload, match="outside the allowed range"):
        decode_integers(b"\x00" + bytes(4000), zero)


def test_impossible_weights_have_no_context_beyond_the_last_one():
    memory, beyond = guarded(START.nbytes)
    contexts = memory.view(np.uint32)
    contexts[:] = START
    start, stream = begin_decoding(b"", "")
    state, filters = np.concatenate([start, np.zeros(3, np.int64)]), np.zeros((1, SLOPE_SHIFT + 1), np.int64)
    status, _, _ = _code_weights(True, filters, contexts, state, stream, stream)
    assert status == 1 and (beyond == 165).all()


def test_start_is_pinned():
    assert hashlib.sha256(START.astype("<u4").tobytes()).hexdigest()[:16] == "6f651019afae2a74"


@pytest.mark.parametrize("sizes", [(0, 0), (64, 2000), (2000, 64), (2500, 2500), (3100, 1700)])
@pytest.mark.parametrize("spread", [20, 3000, RESIDUAL_MAX])
def test_nothing_is_written_beyond_the_outputs(spread, sizes):
    """Neither of coded nor of plain bits, while weights are written and while samples are."""
    rng = np.random.default_rng(spread)
    shape = (1, 4, 500, 3)
    residual = np.clip(np.rint(rng.laplace(0, 1, shape) * spread), -RESIDUAL_MAX, RESIDUAL_MAX).astype(np.int32)
    context = np.roll(residual, 1, axis=2) * 3 % 65536
    (data, beyond), (plain, beyond_plain) = (guarded(size) for size in sizes)
    static, contexts = residual_filter.fit(residual, context), START.copy()
    state = np.concatenate([begin_encoding(), np.zeros(3, np.int64)])
    _, data, plain = residual_coder._code_weights(False, static, contexts, state, data, plain)
    residual_coder._code_bands(False, residual, context, static, contexts, state, data, plain)
    assert (beyond == 165).all() and (beyond_plain == 165).all(), "written beyond the end of an output"
    assert len(roundtrip(residual, context)) > 1000
