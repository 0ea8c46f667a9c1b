import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsic_codec import reference
from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray
from deepsic_codec.payload import header as h
from deepsic_codec.payload.constants import MAX_QUALITY
from deepsic_codec.payload.fields import (
    COLOURS,
    MAX_BANDS,
    MAX_BODY,
    MAX_K,
    MAX_NDIM,
    MAX_SAMPLES,
    MAX_SECTIONS,
    MAX_TILES,
    PLANES,
    PREFIX,
)
from deepsic_codec.payload.labels import best_labels, default_tile, encode_labels
from deepsic_codec.payload.sections import FEATURES, LABELS, SECTIONS, Section
from deepsic_codec.payload.varint import MAX_VARINT, read_varint, write_varint
from tests.common import check_lazy, check_rejects, raw
from tests.payload import crafted

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
RAW_LABELS = raw(LABELS)
DTYPES = ["u1", "i1", "<u2", ">u2", "<i2", ">i2", "<f4", ">f4"]
CHUNK = {
    "dtype": "u1",
    "shape": (70, 90, 3),
    "order": "C",
    "axes": "yxc",
    "decoder": bytes(range(8)),
    "head": b"head",
    "quality": 50,
    "grid": (5, 6),
    "sections": {RAW_LABELS: b"\x40\x40\x01" + 4 * b"\x02\xc8", FEATURES: b"features"},
}


def later(number, required=False):
    """A kind of section of a later version; 100 to 127 stay free while kinds are added."""
    return Section(number, "later", required, bytes, lambda data, header: data)


def pack(**changes):
    return h.pack(**{**CHUNK, **changes})


@st.composite
def chunks(draw):
    """Arguments of pack, from all that it takes."""
    axes = "".join(draw(st.permutations("yx" + draw(st.sampled_from(["", "c", "t", "ct", "zc", "n", "ctzn"])))))
    shape, room = [], MAX_SAMPLES
    for axis in axes:
        most = min(room, MAX_BANDS) if axis == "c" else room
        shape.append(draw(st.one_of(st.integers(1, min(most, 300)), st.integers(1, most))))
        room //= shape[-1]
    height, width = shape[axes.index("y")], shape[axes.index("x")]
    bands = shape[axes.index("c")] if "c" in axes else 1
    groupings = [COLOURS] + [PLANES] * (bands > 1)
    kinds = draw(st.permutations([*map(raw, SECTIONS), later(100), later(109), later(127)]))
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "shape": tuple(draw(st.permutations(shape))) if axes == "yx" and height == width else tuple(shape),
        "order": draw(st.sampled_from("CF")),
        "axes": axes,
        "decoder": draw(st.binary(min_size=8, max_size=8)),
        "head": draw(st.binary(min_size=4, max_size=4)),
        "quality": draw(st.integers(100, 20000)) / 100,
        "grid": (draw(st.integers(1, height)), draw(st.integers(1, width))),
        "sections": {kind: draw(st.binary(max_size=11)) for kind in kinds[: draw(st.integers(0, 5))]},
        "grouping": draw(st.sampled_from(groupings)),
    }


@settings(deadline=None)
@given(chunks())
def test_what_was_packed_is_read(chunk):
    payload = h.pack(**chunk)
    unpacked = h.unpack(payload)
    header = unpacked.header
    assert header.dtype.str == np.dtype(chunk["dtype"]).str
    for name in ("grouping", "shape", "order", "axes", "decoder", "head", "quality", "grid"):
        assert getattr(header, name) == chunk[name], name
    sizes = dict(zip(chunk["axes"], chunk["shape"], strict=True))
    assert (header.height, header.width, header.channels) == (sizes["y"], sizes["x"], sizes.get("c", 1))
    assert header.slices == np.prod([size for axis, size in sizes.items() if axis not in "yxc"], dtype=int)
    assert (header.nbytes, header.version) == (len(payload), 1)
    assert {entry.kind for entry in header.sections} == {section.kind for section in chunk["sections"]}
    for section, data in chunk["sections"].items():
        assert section in unpacked and unpacked.read(section) == h.read_section(payload, header, section) == data
    assert unpacked.read(later(110)) is h.read_section(payload, header, later(110)) is None
    assert h.header_size(payload[:12]) == header.size and h.read_header(payload[: header.size]) == header
    assert header.size <= PREFIX + MAX_BODY <= 256


@settings(deadline=None)
@given(chunks())
def test_a_reader_made_from_the_specification_agrees(chunk):
    sizes = dict(zip(chunk["axes"], chunk["shape"], strict=True))
    chunk["grid"] = (-(-sizes["y"] // 16), -(-sizes["x"] // 16))
    fields = fields_of(h.pack(**chunk))
    assert np.dtype(fields.pop("dtype")) == np.dtype(chunk.pop("dtype"))
    chunk["sections"] = {section.kind: data for section, data in chunk["sections"].items()}
    assert fields == chunk


def fields_of(payload):
    """Arguments of pack, as the reference decoder reads them; sections by kind."""
    header = reference.read_header(payload)
    names = ("dtype", "shape", "axes", "decoder", "head", "grid", "grouping")
    assert header.size == len(payload)
    return {name: getattr(header, name) for name in names} | {
        "order": "F" if header.fortran else "C",
        "quality": header.quality / 100,
        "sections": {kind: reference.read_section(payload, header, kind) for kind in header.sections},
    }


def test_a_writer_made_from_the_specification_agrees():
    assert crafted.write() == pack()


def test_order_of_sections_does_not_depend_on_how_they_were_given():
    sections = {FEATURES: b"features", later(100): b"later", RAW_LABELS: b"\x40\x40\x00"}
    payload = pack(sections=sections)
    assert payload == pack(sections=dict(reversed(sections.items())))
    assert [section.kind for section in h.read_header(payload).sections] == [0x81, 7, later(100).kind]
    assert payload.endswith(b"\x40\x40\x00featureslater")


@pytest.mark.parametrize(
    "as_buffer", [bytearray, memoryview, lambda data: np.frombuffer(data, "u1"), lambda data: np.array([[*data]], "u1")]
)
def test_any_buffer_will_do(as_buffer):
    payload = pack()
    header = h.unpack(as_buffer(payload)).header
    assert header == h.read_header(payload) == h.read_header(as_buffer(payload))
    assert type(h.read_section(as_buffer(payload), header, FEATURES)) is bytes
    check_rejects(CorruptPayload, "header|empty", h.unpack, as_buffer(b""))


def test_a_view_into_the_middle_of_a_buffer():
    payload = pack()
    view = memoryview(b"shard" + payload + b"shard")[5:-5]
    assert h.unpack(view).read(FEATURES) == b"features"


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"dtype": "f8"}, UnsupportedArray, "float64"),
        ({"dtype": "u4"}, UnsupportedArray, "uint32"),
        ({"shape": (70, 90)}, UnsupportedArray, "'yxc'"),
        ({"shape": (70, 0, 3)}, UnsupportedArray, "samples"),
        ({"shape": (1 << 16, 1 << 15, 3)}, UnsupportedArray, "samples"),
        ({"axes": "yyc"}, ConfigurationError, "axes"),
        ({"axes": "yzc"}, ConfigurationError, "axes"),
        ({"axes": "yxb"}, ConfigurationError, "axes"),
        ({"quality": 0.99}, ConfigurationError, "quality"),
        ({"quality": 200.1}, ConfigurationError, "quality"),
        ({"quality": float("nan")}, ConfigurationError, "quality"),
        ({"shape": (70, 90, 257)}, UnsupportedArray, "256 bands"),
        ({"grouping": PLANES, "shape": (70, 90, 1)}, ValueError, "grouping"),
        ({"order": "K"}, ValueError, "order"),
        ({"decoder": b"short"}, ValueError, "identities"),
        ({"head": b""}, ValueError, "identities"),
        ({"grid": (0, 6)}, ValueError, "grid"),
        ({"grid": (5, 91)}, ValueError, "grid"),
        ({"sections": {FEATURES: b"", later(7): b""}}, ValueError, "each once"),
        ({"sections": dict.fromkeys(map(later, range(100, 117)), b"")}, ValueError, "at most 16"),
        *[({"sections": {later(number): b""}}, ValueError, "may skip") for number in (0, -1, 7, 128, 256)],
        *[({"sections": {later(number, True): b""}}, ValueError, "may skip") for number in (0, 1, 100, 109)],
        ({"sections": {RAW_LABELS: bytes(52)}}, ValueError, "labels"),
    ],
)
def test_pack_refuses_what_no_reader_takes(changes, error, words):
    check_rejects(error, words, pack, **changes)


def test_limits_fit_their_fields():
    assert MAX_BODY < 1 << 16 and PREFIX + MAX_BODY <= 256
    assert MAX_SAMPLES <= MAX_VARINT and 100 * MAX_QUALITY < 1 << 16 and MAX_SECTIONS < 256
    assert 2 * 5 + 1 + 2 * MAX_K * MAX_TILES <= MAX_VARINT
    assert len(write_varint(MAX_VARINT)) == 5


@settings(deadline=None)
@given(st.one_of(st.integers(0, MAX_VARINT), st.sampled_from([0, 127, 128, 16383, 16384, MAX_VARINT])))
def test_integers_come_back(value):
    data = write_varint(value)
    assert data == crafted.varint(value)
    assert read_varint(b"?" + data + b"\xff", 1, "") == (value, 1 + len(data))


@pytest.mark.parametrize("value", [-1, MAX_VARINT + 1])
def test_integers_out_of_range_are_not_written(value):
    check_rejects(ValueError, "0 to|got", write_varint, value)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\x80\x00", "more bytes than it needs"),
        (b"\xff\x80\x00", "more bytes than it needs"),
        (b"\x80\x80\x80\x80\x00", "more bytes than it needs"),
        (b"\xff\xff\xff\xff\x10", "at most"),
        (b"\xff\xff\xff\xff\x8f\x00", "more than 5 bytes"),
    ],
)
def test_each_integer_is_written_in_one_way(data, words):
    check_rejects(CorruptPayload, f"field|{words}", read_varint, data, 0, "field")


def test_a_small_chunk_spends_63_bytes_before_its_features():
    # 12 prefix, 25 body without table, 13 table of two sections (features of 128 to 16383 bytes), 13 labels (k = 5).
    labels = best_labels(np.full((1, 1, 1, 12), 99, "u1"), (64, 64))
    sections = {LABELS: labels, FEATURES: bytes(16383)}
    header = h.read_header(pack(shape=(64, 64, 3), grid=(4, 4), sections=sections))
    assert header.sections[0].offset == 50 and header.sections[1].offset == 63
    # Features larger than the pixels would still fit: one byte more.
    assert h.read_header(pack(sections={LABELS: labels, FEATURES: bytes(16384)})).sections[1].offset <= 64


@settings(deadline=None)
@given(chunks(), st.integers(1, 4), st.integers(1, 4), st.data())
def test_sixteen_label_tiles_lie_within_the_first_256_bytes(chunk, rows, columns, data):
    sizes = dict(zip(chunk["axes"], chunk["shape"], strict=True))
    tile = tuple(64 * -(-sizes[axis] // (64 * count)) for axis, count in (("y", rows), ("x", columns)))
    grid = [-(-sizes[axis] // length) for axis, length in zip("yx", tile, strict=True)]
    for axis in "tzn":  # shrink to 16 tiles, and give the samples to the channels
        if axis in sizes:
            sizes[axis] = data.draw(st.integers(1, max(1, min(sizes[axis], 16 // (grid[0] * grid[1])))))
            grid.append(sizes[axis])
    slices = int(np.prod(grid[2:]))
    if slices * grid[0] * grid[1] > 16:
        return
    if "c" in sizes:
        room = MAX_SAMPLES // int(np.prod([size for axis, size in sizes.items() if axis != "c"], dtype="i8"))
        sizes["c"] = min(room, MAX_BANDS)
    labels = best_labels(np.full((slices, *grid[:2], 7), 200, "u1"), tile)
    assert labels.classes.shape[-1] == 5
    grouping = COLOURS if sizes.get("c", 1) in (1, 3) else PLANES
    chunk |= {"grouping": grouping, "shape": tuple(sizes.values()), "sections": {LABELS: labels, FEATURES: b""}}
    header = h.read_header(h.pack(**chunk))
    slack = 4  # bytes that the length of real features needs, at most
    assert header.sections[0].offset + len(encode_labels(labels)) + slack <= 256


def example():
    """The annotated bytes of docs/format.md."""
    block = re.search(r"<!-- example -->\s*```text\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL).group(1)
    return bytes.fromhex("".join(line[:27] for line in block.splitlines()))


def test_the_example_in_the_specification():
    payload = example()
    header = h.unpack(payload).header
    fields = fields_of(payload)
    fields["sections"] = {section: h.read_section(payload, header, section) for section in (LABELS, FEATURES)}
    assert payload == h.pack(**fields)
    assert (header.shape, header.axes, header.grid, header.quality) == ((128, 64, 3), "yxc", (8, 4), 50)
    block = fields["sections"][LABELS]
    assert block.tile == default_tile(128, 64) == (64, 64)
    assert block.classes.tolist() == [[[[8, 3]], [[1, 255]]]] and block.scores.tolist() == [[[[230, 12]], [[201, 0]]]]


def test_the_specification_has_the_limits_of_the_code():
    text = FORMAT.read_text(encoding="utf-8")
    limits = {
        "chunk samples": MAX_SAMPLES,
        "bands": MAX_BANDS,
        "axes": MAX_NDIM,
        "sections": MAX_SECTIONS,
        "header length": MAX_BODY,
        "integers (varint)": MAX_VARINT,
        "label tiles": MAX_TILES,
        "pairs of a tile": MAX_K,
    }
    for name, value in limits.items():
        assert re.search(rf"^\| {re.escape(name)} \| {value:,} \|", text, re.MULTILINE), name


def test_each_section_has_a_row_in_the_specification():
    assert len({section.number for section in SECTIONS}) == len({section.name for section in SECTIONS}) == len(SECTIONS)
    rows = re.findall(
        r"^\| `([0-9A-F]{2})` \| ([a-z ]+) \| (skips|refuses)", FORMAT.read_text(encoding="utf-8"), re.MULTILINE
    )
    expected = [(f"{s.kind:02X}", s.name, "refuses" if s.required else "skips") for s in SECTIONS]
    assert rows == expected


def test_reading_a_header_imports_little():
    code = "from deepsic_codec.payload import header, labels"
    check_lazy(code, unwanted=("torch", "zarr", "numcodecs", "numba", "dask", "xarray"))


def test_a_trellis_needs_features():
    data = h.pack(**CHUNK, trellis=True)
    assert h.read_header(data).trellis and not h.read_header(h.pack(**CHUNK)).trellis
    assert reference.read_header(data).trellis
    without = CHUNK | {"sections": {}}
    with pytest.raises(ValueError, match="a trellis without features"):
        h.pack(**without, trellis=True)
    damaged = crafted.write(layout=16, sections=())
    for read, error in ((h.read_header, CorruptPayload), (reference.read_header, reference.Damaged)):
        with pytest.raises(error, match="a trellis without"):
            read(damaged)
