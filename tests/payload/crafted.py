"""Payloads written from docs/format.md alone, each field as odd as a test asks for."""

import struct

import pytest

from deepsic_codec import reference
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.reference import crc32c


def varint(value):
    data = [value >> 7 * i & 127 for i in range(5)]
    while len(data) > 1 and data[-1] == 0:
        data.pop()
    return bytes([byte | 128 for byte in data[:-1]] + [data[-1]])


def write(
    *,
    magic=b"DSIC",
    version=1,
    flags=0,
    dtype=1,
    layout=0,
    ndim=None,
    axes=b"\x21\x03",
    shape=(70, 90, 3),
    decoder=bytes(range(8)),
    head=b"head",
    quality=5000,
    grid=(5, 6),
    sections=((0x81, b"\x40\x40\x01" + 4 * b"\x02\xc8"), (7, b"features")),
    table=None,
    count=None,
    extra=b"",
    length=None,
    rest=b"",
):
    """Write a payload field by field, checksums right, each field as odd as asked for; bytes may replace a varint."""

    def raw(values):
        return b"".join(value if isinstance(value, bytes) else varint(value) for value in values)

    body = bytes([dtype, layout, len(shape) if ndim is None else ndim]) + axes + raw(shape) + decoder + head
    body += struct.pack("<H", quality) + raw(grid)
    body += bytes([len(sections) if count is None else count])
    for kind, data in sections:
        body += bytes([kind]) + raw([len(data)]) + struct.pack("<I", crc32c(data))
    body += (table or b"") + extra
    start = struct.pack("<4sBBH", magic, version, flags, len(body) if length is None else length)
    data = b"".join(data for _, data in sections)
    return start + struct.pack("<I", crc32c(start + body)) + body + data + rest


def repair(payload):
    """Make the header's checksum right again, if there is a header."""
    end = 12 + int.from_bytes(payload[6:8], "little")
    return payload[:8] + struct.pack("<I", crc32c(payload[:8] + payload[12:end])) + payload[12:]


def check_reference_rejects(error, payload, read=reference.decode):
    """The reference decoder refuses a payload in the same way as the package, whose error this is."""
    with pytest.raises(reference.Damaged if error is CorruptPayload else reference.Unsupported):
        read(payload)
