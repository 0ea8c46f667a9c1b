"""The cast section: round trips, and what a decoder must refuse."""

import struct

import numpy as np
import pytest

from deepsic_codec import reference
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.cast import DTYPES, LIMIT, SMALLER, Cast, decode_cast, encode_cast
from tests.common import check_rejects
from tests.payload.test_nodata import header_of


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_round_trip(dtype):
    for offset in [0] if dtype.kind in "bf" else [int(np.iinfo(dtype).min), 0, 5, int(np.iinfo(dtype).max)]:
        for nodata in [None] if dtype.kind == "b" else [None, dtype.newbyteorder("=").type(7)]:
            data = encode_cast(Cast(dtype, offset, nodata))
            read = decode_cast(data, header_of(np.dtype(SMALLER[dtype.kind][-1]), 1, 5, 7, 3))
            assert (read.dtype, read.offset, read.nodata) == (dtype, offset, nodata)


def test_samples_beyond_the_dtype_become_its_ends():
    huge = np.float32([np.nan, -np.inf, np.inf, 3e38, 2.5, 7])
    read = Cast(np.dtype("i4"), 5, np.int32(-1)).restore(huge, np.float32(7))
    assert read.tolist() == [5, -(2**31), 2**31 - 1, 2**31 - 1, 7, -1]
    assert Cast(np.dtype("u8"), 2**63).restore(huge, None).tolist()[:4] == [2**63, 2**63 - LIMIT, *[2**63 + LIMIT] * 2]
    for cast in (Cast(np.dtype("i4"), 5, np.int32(-1)), Cast(np.dtype(">u8"), 2**63), Cast(np.dtype("f8"))):
        nodata = reference.NoData(np.float32(7), None, False, None)
        dtype, samples = reference.cast(encode_cast(cast), huge, nodata)
        assert dtype == cast.dtype
        np.testing.assert_array_equal(samples, cast.restore(huge, np.float32(7)))
    assert Cast(np.dtype("?")).restore(np.uint8([0, 1, 9]), None).tolist() == [False, True, True]


@pytest.mark.parametrize(
    "data,dtype,error,words",
    [
        (b"", "u1", CorruptPayload, "empty"),
        (b"\0" + bytes(8), "u1", UnsupportedPayload, "dtype code 0"),
        (b"\x07" + bytes(8), "u1", UnsupportedPayload, "dtype code 7"),
        (b"\x81" + bytes(8), "u1", UnsupportedPayload, "dtype code 129"),
        (b"\x01" + bytes(8), "u2", CorruptPayload, "samples of uint16"),
        (b"\x02" + bytes(8), "i2", CorruptPayload, "samples of int16"),
        (b"\x06" + bytes(8), "u1", CorruptPayload, "samples of uint8"),
        (b"\x02" + bytes(7), "u2", CorruptPayload, "8 bytes"),
        (b"\x02" + bytes(11), "u2", CorruptPayload, "12 bytes"),
        (b"\x01" + bytes(9), "u1", CorruptPayload, "10 bytes"),
        (b"\x02" + struct.pack("<q", 1 << 31), "u2", CorruptPayload, "offset"),
        (b"\x03" + struct.pack("<q", -1), "u2", CorruptPayload, "offset"),
        (b"\x06" + struct.pack("<q", 1), "f4", CorruptPayload, "offset"),
        (b"\x06" + bytes(8) + struct.pack("<d", np.inf), "f4", CorruptPayload, "NoData value inf"),
        (b"\x06" + bytes(8) + struct.pack("<d", np.nan), "f4", CorruptPayload, "NoData value nan"),
    ],
)
def test_refuses(data, dtype, error, words):
    check_rejects(error, words, decode_cast, data, header_of(np.dtype(dtype), 1, 5, 7, 3))
    nodata = reference.NoData(np.float32(0), None, False, None)
    with pytest.raises(reference.Damaged if error is CorruptPayload else reference.Unsupported):
        reference.cast(data, np.zeros(3, dtype), nodata)
