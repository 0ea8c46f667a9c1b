"""Damaged, truncated, foreign and crafted payloads: the right error, naming the place, and little memory on the way."""

import contextlib
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec import config, reference
from deepsic_codec.errors import CorruptPayload, DeepSICError, UnsupportedPayload
from deepsic_codec.payload import header as h
from deepsic_codec.payload.fields import MAX_BODY, MAX_TILES, OPTIONAL
from deepsic_codec.payload.labels import decode_labels
from deepsic_codec.payload.sections import FEATURES, LABELS, SECTIONS, section_name
from tests.common import check_rejects, raw
from tests.payload import crafted

LATER = 0x80 | 100  # a kind of a later version, which readers may skip
PAYLOAD = crafted.write(sections=((0x81, b"\x40\x40\x01" + 4 * b"\x02\xc8"), (7, b"features"), (LATER, b"later")))
HEADER = h.read_header(PAYLOAD)


def read_all(data):
    """All that a reader does with a payload short of decoding features."""
    header = h.read_header(data)
    h.read_section(data, header, LABELS)
    return h.unpack(data).header


def test_the_payload_that_is_damaged_here_is_sound():
    assert read_all(PAYLOAD) == HEADER


@pytest.mark.parametrize("end", range(len(PAYLOAD)))
def test_cut_at_every_byte(end):
    data = PAYLOAD[:end]
    check_rejects(CorruptPayload, "truncated", h.unpack, data)
    if end < HEADER.size:
        check_rejects(CorruptPayload, "header|truncated", h.read_header, data)
    else:
        assert h.read_header(data) == HEADER
        for section in (LABELS, FEATURES):
            entry, section = HEADER.entry(section.kind), raw(section)
            if end < entry.offset + entry.length:
                words = f"{section.name} section|truncated"
                check_rejects(CorruptPayload, words, h.read_section, data, HEADER, section)
            else:
                assert len(h.read_section(data, HEADER, section)) == entry.length


@pytest.mark.parametrize("place", range(len(PAYLOAD)))
def test_flip_every_bit(place):
    for bit in range(8):
        data = bytearray(PAYLOAD)
        data[place] ^= 1 << bit
        if place < 5:
            check_rejects(UnsupportedPayload, "starts with" if place < 4 else "format version", h.read_header, data)
        elif place < HEADER.size:
            check_rejects(CorruptPayload, "header", h.read_header, data)
        else:
            name = next(section_name(s.kind) for s in reversed(HEADER.sections) if place >= s.offset)
            check_rejects(CorruptPayload, f"{name}|checksum", h.unpack, data)


@pytest.mark.parametrize("tail", [b"\0", b"DSIC", PAYLOAD, bytes(1000)])
def test_append_bytes(tail):
    check_rejects(CorruptPayload, f"{len(tail)} bytes after", h.unpack, PAYLOAD + tail)
    assert h.read_header(PAYLOAD + tail) == HEADER  # a prefix is all it looks at


@pytest.mark.parametrize("data", [b"\0" * 300, b"\x89PNG\r\n\x1a\n" + bytes(90), b"dsic" + PAYLOAD[4:], b"DSI\0", b"?"])
def test_foreign_bytes(data):
    check_rejects(UnsupportedPayload, "not a payload of DeepSIC", h.read_header, data)
    check_rejects(UnsupportedPayload, "not a payload of DeepSIC", h.header_size, data)


def table(*rows):
    """Entries of a section table, with or without the sections."""
    return b"".join(bytes([kind]) + crafted.varint(length) + struct.pack("<I", 0) for kind, length in rows)


MANY = [(0x90 + i, b"") for i in range(17)]
CRAFTED = {
    "newer version": ({"version": 2}, UnsupportedPayload, "format version 2|upgrade"),
    "version 0": ({"version": 0}, UnsupportedPayload, "format version 0|upgrade"),
    "flags": ({"flags": 0x80}, UnsupportedPayload, "flags 0x80"),
    "dtype 0": ({"dtype": 0}, UnsupportedPayload, "dtype code 0"),
    "dtype 6": ({"dtype": 6}, UnsupportedPayload, "dtype code 6"),
    "byte order of bytes": ({"layout": 1}, UnsupportedPayload, "layout 0x01"),
    "reserved layout bit": ({"layout": 32}, UnsupportedPayload, "layout 0x20"),
    "a trellis without features": ({"layout": 16, "sections": ()}, CorruptPayload, "a trellis without"),
    "reserved grouping": ({"layout": 8}, UnsupportedPayload, "layout 0x08"),
    "planes of one band": ({"layout": 4, "shape": (70, 90, 1)}, CorruptPayload, "grouping 1"),
    "last layout bit": ({"layout": 0x80}, UnsupportedPayload, "layout 0x80"),
    "one axis": ({"ndim": 1, "axes": b"\x01", "shape": (70,)}, CorruptPayload, "header: 1 axes"),
    "no axes": ({"ndim": 0, "axes": b"", "shape": ()}, CorruptPayload, "header: 0 axes"),
    "nine axes": ({"ndim": 9, "axes": b"\x21\x43\x65\x65\x05"}, CorruptPayload, "header: 9 axes"),
    "255 axes": ({"ndim": 255}, CorruptPayload, "header: 255 axes"),
    "axis code 0": ({"axes": b"\x20\x03"}, UnsupportedPayload, "axis codes [0, 2, 3]"),
    "axis code 7": ({"axes": b"\x21\x07"}, UnsupportedPayload, "axis codes [1, 2, 7]"),
    "an axis twice": ({"axes": b"\x21\x02"}, CorruptPayload, "axes 'yxx'"),
    "no x": ({"axes": b"\x41\x03"}, CorruptPayload, "axes 'ytc'"),
    "padding of axes": ({"axes": b"\x21\x13"}, CorruptPayload, "padding"),
    "zero size": ({"shape": (70, 0, 3)}, CorruptPayload, "header: chunk shape"),
    "one sample too many": ({"shape": ((1 << 31) + 1, 1, 1)}, CorruptPayload, "header: chunk shape"),
    "huge shape": ({"shape": (0xFFFFFFFF,) * 3}, CorruptPayload, "header: chunk shape"),
    "long varint": ({"shape": (70, b"\xda\x00", 3)}, CorruptPayload, "header: chunk shape|more bytes"),
    "33-bit varint": ({"shape": (70, b"\xff\xff\xff\xff\x1f", 3)}, CorruptPayload, "header: chunk shape|at most"),
    "endless varint": ({"shape": (70, b"\xff" * 40, 3)}, CorruptPayload, "header: chunk shape|5 bytes"),
    "quality 0": ({"quality": 0}, CorruptPayload, "header: quality 0.0"),
    "quality 0.99": ({"quality": 99}, CorruptPayload, "header: quality 0.99"),
    "quality 200.01": ({"quality": 20001}, CorruptPayload, "header: quality 200.01"),
    "no rows": ({"grid": (0, 6)}, CorruptPayload, "header: grid of 0 x 6"),
    "more columns than pixels": ({"grid": (5, 91)}, CorruptPayload, "header: grid of 5 x 91"),
    "huge grid": ({"grid": (0xFFFFFFFF, 0xFFFFFFFF)}, CorruptPayload, "header: grid"),
    "long varint of grid": ({"grid": (b"\x85\x00", 6)}, CorruptPayload, "header: grid|more bytes"),
    "17 sections": ({"sections": MANY}, CorruptPayload, "section table: 17 sections"),
    "255 sections": ({"count": 255}, CorruptPayload, "section table: 255 sections"),
    "more sections than there are": ({"count": 3}, CorruptPayload, "header: a field goes beyond"),
    "fewer sections than there are": ({"count": 1}, CorruptPayload, "header: 6 bytes after"),
    "half an entry": (
        {"count": 3, "table": b"\xe4\x05\0\0\0"},
        CorruptPayload,
        "header: a field goes beyond",
    ),
    "bytes after the table": ({"extra": b"\0"}, CorruptPayload, "header: 1 bytes after"),
    **{
        f"{section.name} twice": (
            {"sections": [(section.kind, b"")] * 2},
            CorruptPayload,
            f"{section.name} section occurs twice",
        )
        for section in SECTIONS
    },
    "unknown twice": ({"sections": [(LATER, b"")] * 2}, CorruptPayload, "section of kind 100 occurs twice"),
    "labels second": ({"sections": [(7, b""), (0x81, b"")]}, CorruptPayload, "labels section is not the first"),
    **{
        f"{section.name} with the other bit": (
            {"sections": [(section.kind ^ OPTIONAL, b"")]},
            CorruptPayload,
            f"{section.name} section is not marked as {'required' if section.required else 'optional'}",
        )
        for section in SECTIONS
    },
    "kind 0": ({"sections": [(0, b"")]}, CorruptPayload, "kind 0"),
    "optional kind 0": ({"sections": [(0x80, b"")]}, CorruptPayload, "kind 0"),
    "unknown required": ({"sections": [(100, b"")]}, UnsupportedPayload, "section of kind 100|upgrade"),
    "unknown required, after others": (
        {"sections": [(7, b""), (127, b"")]},
        UnsupportedPayload,
        "section of kind 127|upgrade",
    ),
    "more labels than tiles": (
        {"sections": [], "count": 1, "table": table((0x81, 11 + 10 * 4 + 1))},
        CorruptPayload,
        "section table: 52 bytes of labels",
    ),
    "huge labels": (
        {"sections": [], "count": 1, "table": table((0x81, 0xFFFFFFFF))},
        CorruptPayload,
        "section table: 4294967295 bytes of labels",
    ),
    "long varint of a length": (
        {"sections": [], "count": 1, "table": b"\x07\x80\x00" + bytes(4)},
        CorruptPayload,
        "section table: length|more bytes",
    ),
    "empty header": ({"length": 0}, CorruptPayload, "header: the checksum does not match"),
    "header length 233": ({"length": MAX_BODY + 1}, CorruptPayload, "header: length 233"),
    "header length 65535": ({"length": 0xFFFF}, CorruptPayload, "header: length 65535"),
    "header without a body": ({}, CorruptPayload, "header: a field goes beyond its 0 bytes"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_headers_with_right_checksums(name):
    fields, error, words = CRAFTED[name]
    data = crafted.write(**fields)
    if name == "header without a body":
        data = crafted.repair(b"DSIC\1" + bytes(7))
    check_rejects(error, words, h.read_header, data + bytes(300))
    check_rejects(error, words, h.unpack, data + bytes(300))
    crafted.check_reference_rejects(error, data + bytes(300))


@pytest.mark.parametrize("length", range(len(PAYLOAD[12 : HEADER.size])))
def test_header_that_ends_in_any_field(length):
    data = PAYLOAD[:6] + length.to_bytes(2, "little") + PAYLOAD[8 : 12 + length]
    with pytest.raises(DeepSICError, match="header"):
        h.read_header(crafted.repair(data))


def test_a_section_longer_than_the_payload():
    data = crafted.write(sections=[], count=1, table=table((7, 0xFFFFFFFF)))
    assert h.read_header(data).nbytes == len(data) + 0xFFFFFFFF
    check_rejects(CorruptPayload, "features section|truncated, 0 of 4294967295", h.unpack, data)


def test_unknown_optional_sections_are_skipped():
    assert h.read_section(PAYLOAD, HEADER, FEATURES) == b"features" and HEADER.sections[-1].kind == LATER
    payload = h.unpack(crafted.write(sections=[(LATER, b"vector"), (7, b"features")]))
    assert payload.read(FEATURES) == b"features" and payload.sections[LATER] == b"vector"
    assert FEATURES in payload and LABELS not in payload and payload.read(LABELS) is None


def test_sixteen_sections_and_every_size_at_its_largest():
    data = crafted.write(
        axes=b"\x21\x43\x65", shape=(1 << 21, 1, 1, 1, 1 << 10, 1), grid=(1, 1), sections=MANY[1:], dtype=5, layout=3
    )
    header = h.unpack(data).header
    assert len(header.sections) == 16 and header.slices == 1 << 10 and header.nbytes == len(data)


TILE = b"\x40\x40"  # of 64 x 64 pixels: 4 tiles in the chunk of these tests
LABEL_BLOCKS = {
    "empty": (b"", "field"),
    "only a tile": (TILE, "number of classes"),
    "half a tile": (b"\x40\xc0", "field"),
    "tile 0": (b"\x00\x40\x00", "tile 0 x 64"),
    "tile 63": (b"\x40\x3f\x00", "tile 64 x 63"),
    "tile 96": (b"\x60\x40\x00", "tile 96 x 64"),
    "tile of 32 bits": (b"\x40" + crafted.varint(0xFFFFFFC0) + b"\0", "tile 64 x 4294967232"),
    "long varint": (b"\xc0\x00\x40\x00", "tile height|more bytes"),
    "six pairs": (TILE + b"\x06" + bytes(range(48)), "6 classes a tile"),
    "255 pairs": (TILE + b"\xff", "255 classes a tile"),
    "a pair short": (TILE + b"\x01" + 3 * b"\x02\xc8", "9 bytes, expected 11"),
    "a byte long": (TILE + b"\x01" + 4 * b"\x02\xc8" + b"\0", "12 bytes, expected 11"),
    "bytes after none": (TILE + b"\x00\x00", "4 bytes, expected 3"),
    "fewer tiles": (b"\x80\x01\x40\x01" + 4 * b"\x02\xc8", "12 bytes, expected 8"),
    "class without a score": (TILE + b"\x01" + 3 * b"\x02\xc8" + b"\x02\x00", "class without a score"),
    "score without a class": (TILE + b"\x01" + 3 * b"\x02\xc8" + b"\xff\x01", "score without a class"),
    "worst first": (TILE + b"\x02" + 4 * b"\x02\x10\x01\x11", "not in order"),
    "worst first, both faint": (TILE + b"\x02" + 4 * b"\x02\x01\x01\x02", "not in order"),
    "equal scores, larger number first": (TILE + b"\x02" + 4 * b"\x02\x10\x01\x10", "not in order"),
    "unused first": (TILE + b"\x02" + 4 * b"\xff\x00\x01\x10", "not in order"),
    "a class twice": (TILE + b"\x02" + 4 * b"\x02\x11\x02\x10", "twice"),
    "a class twice, apart": (TILE + b"\x03" + 4 * b"\x02\x11\x01\x10\x02\x09", "twice"),
    "a pair twice": (TILE + b"\x02" + 4 * b"\x02\x11\x02\x11", "not in order"),
}


@pytest.mark.parametrize("name", LABEL_BLOCKS)
def test_crafted_labels(name):
    data, words = LABEL_BLOCKS[name]
    payload = crafted.write(sections=[(0x81, data), (7, b"features")])
    check_rejects(CorruptPayload, f"labels section|{words}", h.read_section, payload, h.read_header(payload), LABELS)
    check_rejects(CorruptPayload, f"labels section|{words}", h.unpack(payload).read, LABELS)
    crafted.check_reference_rejects(CorruptPayload, payload, reference.labels)


def test_more_label_tiles_than_a_chunk_may_have():
    slices = (MAX_TILES + 1, 1, 1)
    header = h.read_header(crafted.write(axes=b"\x14\x02", shape=slices, grid=(1, 1)))
    assert header.slices == MAX_TILES + 1
    with config.set(max_pixels=1 << 40):
        check_rejects(CorruptPayload, f"labels section: {MAX_TILES + 1} tiles", decode_labels, TILE + b"\x00", header)


@pytest.mark.parametrize("section", [TILE + b"\x00", TILE + b"\x05"])
def test_a_huge_chunk_in_few_bytes_takes_little_memory(section):
    # 2**31 samples, nearly 2**22 tiles, announced in 80 bytes.
    data = crafted.write(axes=b"\x14\x02", shape=((1 << 22), 512, 1), grid=(512, 1), sections=[(0x81, section)])
    tracemalloc.start()
    try:
        with config.set(max_pixels=1 << 40):
            read_all(data)
    except CorruptPayload:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100_000


def survives(data):
    """Nothing but our own errors comes out, from a buffer of any kind."""
    for read in (h.header_size, h.read_header, h.unpack, read_all):
        try:
            read(data)
        except DeepSICError as error:
            assert isinstance(error, CorruptPayload | UnsupportedPayload)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes(data):
    survives(data)
    survives(b"DSIC\1\0" + data)
    survives(crafted.repair(b"DSIC\1\0" + len(data[12:]).to_bytes(2, "little") + data))


edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255), st.sampled_from(["set", "insert", "delete"])))


def edited(data, changes):
    data = bytearray(data)
    for place, byte, how in changes:
        place %= len(data) + 1
        if how == "insert":
            data.insert(place, byte)
        elif place < len(data):
            if how == "set":
                data[place] = byte
            else:
                del data[place]
    return bytes(data)


@settings(deadline=None)
@given(edits)
def test_edited_headers_with_right_checksums(changes):
    body = edited(PAYLOAD[12 : HEADER.size], changes)[:200]
    start = PAYLOAD[:6] + len(body).to_bytes(2, "little") + bytes(4)
    survives(crafted.repair(start + body + PAYLOAD[HEADER.size :]))


@settings(deadline=None)
@given(edits, st.binary(max_size=30))
def test_edited_labels_with_right_checksums(changes, other):
    whole = b"\x40\x40\x03" + 4 * b"\x02\x21\x01\x10\xff\x00"
    survives(crafted.write(sections=[(0x81, edited(whole, changes)), (7, b"features")]))
    survives(crafted.write(sections=[(0x81, TILE + other), (7, b"features")]))


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_labels(data):
    try:
        block = decode_labels(data, HEADER)
    except CorruptPayload as error:
        assert str(error).startswith("labels section")
    else:
        assert block.classes.shape == (1, -(-70 // block.tile[0]), -(-90 // block.tile[1]), block.classes.shape[3])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
@settings(deadline=None)
@given(data=st.binary(max_size=60))
def test_random_sections(section, data):
    payload = crafted.write(sections=[(section.kind, data)])
    with contextlib.suppress(CorruptPayload, UnsupportedPayload):
        h.unpack(payload).read(section)


@pytest.mark.parametrize("data", [b"", b"DSIC", PAYLOAD[:40]])
def test_header_size_needs_twelve_bytes(data):
    if len(data) < 12:
        check_rejects(CorruptPayload, "header|truncated", h.header_size, data)
    else:
        assert h.header_size(data) == HEADER.size
