"""The spectral transform section: what is written is read, and what is wrong is refused."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import reference
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.sections import SPECTRAL
from deepsic_codec.payload.spectral import UNIT, decode_spectral, deviation, encode_spectral
from tests.common import check_rejects
from tests.payload import crafted


def header(bands):
    return h.read_header(crafted.write(shape=(20, 30, bands), grid=(2, 2), sections=[]))


def orthonormal(components, bands, seed=0):
    """Rows in units of 1/16384, rounded."""
    rows = np.linalg.qr(np.random.default_rng(seed).normal(size=(bands, bands)))[0][:components]
    return np.floor(rows * UNIT + 0.5).astype(np.int16)


@st.composite
def matrices(draw):
    bands = draw(st.sampled_from([1, 2, 3, 7, 40, 256]))
    components = draw(st.integers(1, bands))
    if draw(st.booleans()):
        return orthonormal(components, bands, draw(st.integers(0, 99)))
    rows = np.random.default_rng(draw(st.integers(0, 99))).permutation(np.eye(bands))[:components]
    return (rows * draw(st.sampled_from([UNIT, -UNIT]))).astype(np.int16)


@given(matrices())
def test_what_was_written_is_read(matrix):
    data = encode_spectral(matrix)
    decoded = decode_spectral(data, header(matrix.shape[1]))
    assert decoded.dtype == np.int16 and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, matrix)
    assert encode_spectral(decoded) == data
    np.testing.assert_array_equal(reference.read_spectral(data, matrix.shape[1]), matrix)
    assert deviation(matrix) < 2e-3


def section(*rows):
    return bytes([len(rows) - 1]) + b"".join(struct.pack(f"<{len(row)}h", *row) for row in rows)


FIRST, SECOND = (UNIT, 0, 0, 0), (0, UNIT, 0, 0)
WRONG = {
    "empty": (b"", "0 bytes, 0 components and 4 bands"),
    "no rows": (b"\1", "1 bytes, 2 components and 4 bands"),
    "more components than bands": (section(*[FIRST] * 5), "5 components and 4 bands"),
    "256 components": (b"\xff" + section(FIRST, SECOND)[1:], "256 components"),
    "a byte short": (section(FIRST, SECOND)[:-1], "16 bytes, 2 components"),
    "a byte long": (section(FIRST, SECOND) + b"\0", "18 bytes, 2 components"),
    "a row short": (b"\1" + section(FIRST)[1:], "9 bytes, 2 components"),
    "zeros": (section((0, 0, 0, 0)), "not orthonormal"),
    "twice a row": (section(FIRST, FIRST), "not orthonormal"),
    "a row and its opposite": (section(FIRST, (-UNIT, 0, 0, 0)), "not orthonormal"),
    "a long row": (section((UNIT, UNIT // 4, 0, 0)), "not orthonormal"),
    "a short row": (section((UNIT * 7 // 8, 0, 0, 0)), "not orthonormal"),
    "a slightly long row": (section((UNIT, UNIT // 15, 0, 0)), "not orthonormal"),
    "least numbers": (section((-32768,) * 4), "not orthonormal"),
    "largest numbers": (section((32767,) * 4, (32767, -32768, 32767, -32768)), "not orthonormal"),
}


@pytest.mark.parametrize("name", WRONG)
def test_crafted_sections(name):
    data, words = WRONG[name]
    assert decode_spectral(section(FIRST, SECOND), header(4)).shape == (2, 4)
    check_rejects(CorruptPayload, f"spectral transform section|{words}", decode_spectral, data, header(4))
    payload = crafted.write(shape=(20, 30, 4), grid=(2, 2), sections=[(5, data)])
    check_rejects(CorruptPayload, f"spectral transform section|{words}", h.unpack(payload).read, SPECTRAL)
    with pytest.raises(reference.Damaged):
        reference.read_spectral(data, 4)


@given(st.binary(max_size=40), st.integers(1, 4))
def test_any_bytes_are_a_matrix_or_are_refused(data, bands):
    try:
        matrix = decode_spectral(data, header(bands))
    except CorruptPayload:
        return
    assert encode_spectral(matrix) == data and deviation(matrix) <= 1 / 256
