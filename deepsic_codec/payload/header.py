"""Payloads: header, section table and sections, read and written. `docs/format.md` is the specification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, TypeVar

import numpy as np
from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c

from deepsic_codec.axes import Axes, ceil_div
from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.payload import sections as registry
from deepsic_codec.payload.constants import DEEP_QUALITY, LABEL_CELL, MIN_QUALITY
from deepsic_codec.payload.fields import (
    AXIS_CODES,
    BIG_ENDIAN,
    COLOURS,
    DTYPES,
    FORMAT_VERSION,
    FORTRAN,
    GROUPING,
    MAGIC,
    MAX_BANDS,
    MAX_BODY,
    MAX_K,
    MAX_NDIM,
    MAX_SAMPLES,
    MAX_SECTIONS,
    MAX_TILES,
    MAX_VALUES,
    MIN_NDIM,
    OPTIONAL,
    PLANES,
    PREFIX,
    TRELLIS,
    Header,
    SectionEntry,
)
from deepsic_codec.payload.sections import Section, section_name
from deepsic_codec.payload.varint import MAX_VARINT, read_varint, write_varint

T = TypeVar("T")

_KINDS, _LABELS, _EMBEDDING = frozenset(registry.NAMES), registry.LABELS.kind, registry.EMBEDDING.kind
_FEATURES = registry.FEATURES.kind
_AXES = {code: axis for axis, code in AXIS_CODES.items()}
_DTYPE_KEYS = {dtype: key for key, dtype in DTYPES.items()}


def header_size(data: Any) -> int:
    """Return the length of a header in bytes, from the first 12 bytes of a payload at least.

    Raises
    ------
    CorruptPayload
        If there are fewer than 12 bytes, or the length in them is out of range.
    UnsupportedPayload
        If it is no payload of DeepSIC, or of a newer version of the format.
    """
    start: bytes = data if isinstance(data, bytes) else _start(data)
    if not start:
        raise CorruptPayload("header: truncated, the payload is empty")
    if start[:4] != MAGIC[: len(start)]:
        raise UnsupportedPayload(f"not a payload of DeepSIC: starts with {start[:4]!r}, expected {MAGIC!r}")
    if len(start) < PREFIX:
        raise CorruptPayload(f"header: truncated, {len(start)} bytes, expected at least {PREFIX}")
    if start[4] != FORMAT_VERSION:
        raise UnsupportedPayload(
            f"header: format version {start[4]}, but this deepsic_codec reads version {FORMAT_VERSION}; "
            "upgrade deepsic_codec, unless the payload is damaged"
        )
    length = start[6] | start[7] << 8
    if length > MAX_BODY:
        raise CorruptPayload(f"header: length {length}, expected at most {MAX_BODY}")
    return PREFIX + length


def read_header(data: Any) -> Header:
    """Read a header and the section table; sections are not read.

    Parameters
    ----------
    data : bytes-like
        The payload, or the start of it; 256 bytes are always enough.

    Raises
    ------
    CorruptPayload
        If the header is truncated, damaged or inconsistent.
    UnsupportedPayload
        If it is no payload of DeepSIC, or needs a newer version.
    """
    if not isinstance(data, bytes):
        data = _start(data)
    size = header_size(data)
    if len(data) < size:
        raise CorruptPayload(f"header: truncated, {len(data)} of {size} bytes")
    body = data[PREFIX:size]
    stored = int.from_bytes(data[8:PREFIX], "little")
    if crc32c_extend(crc32c(data[:8]), body) != stored:
        raise CorruptPayload("header: the checksum does not match")
    if data[5]:
        raise UnsupportedPayload(f"header: unknown flags {data[5]:#04x}; upgrade deepsic_codec")
    try:
        return _read_body(body, size)
    except IndexError:
        raise CorruptPayload(f"header: a field goes beyond its {len(body)} bytes") from None


def _read_body(body: bytes, size: int) -> Header:
    # One flat pass without calls of `Axes`: a scan of labels reads a million headers.
    layout, ndim = body[1], body[2]
    dtype = DTYPES.get(body[0] | (layout & BIG_ENDIAN) << 8)
    if dtype is None:
        raise UnsupportedPayload(
            f"header: unknown dtype code {body[0]} with layout {layout:#04x}; upgrade deepsic_codec"
        )
    grouping = (layout & GROUPING) >> 2
    if layout & ~(BIG_ENDIAN | FORTRAN | GROUPING | TRELLIS) or grouping > PLANES:
        raise UnsupportedPayload(f"header: unknown layout {layout:#04x}; upgrade deepsic_codec")
    if not MIN_NDIM <= ndim <= MAX_NDIM:
        raise CorruptPayload(f"header: {ndim} axes, expected {MIN_NDIM} to {MAX_NDIM}")
    position = 3 + (ndim + 1 >> 1)
    axes = _read_axes(ndim, body[3:position])

    sizes, samples = [], 1
    for _ in range(ndim):
        length = body[position]
        if length < 128:
            position += 1
        else:
            length, position = read_varint(body, position, "header: chunk shape")
        sizes.append(length)
        samples *= length
    shape = tuple(sizes)
    if not 0 < samples <= MAX_SAMPLES:
        raise CorruptPayload(f"header: chunk shape {shape}, expected 1 to {MAX_SAMPLES} samples")
    bands = shape[axes.index("c")] if "c" in axes else 1
    if bands > MAX_BANDS:
        raise CorruptPayload(f"header: {bands} bands, expected at most {MAX_BANDS}")
    if grouping == PLANES and bands == 1:
        raise CorruptPayload(f"header: grouping {grouping} is impossible with {bands} bands")

    decoder, head = body[position : position + 8], body[position + 8 : position + 12]
    position += 14
    quality = body[position - 2] | body[position - 1] << 8
    if not MIN_QUALITY <= quality / 100 <= DEEP_QUALITY:
        raise CorruptPayload(f"header: quality {quality / 100}, expected 1 to 200")
    rows, position = read_varint(body, position, "header: grid")
    columns, position = read_varint(body, position, "header: grid")
    height, width = shape[axes.index("y")], shape[axes.index("x")]
    if not (0 < rows <= height and 0 < columns <= width):
        raise CorruptPayload(f"header: grid of {rows} x {columns} symbols does not fit {height} x {width} pixels")

    count, offset = body[position], size
    numbers = 0  # a set of them, as bits
    position += 1
    if count > MAX_SECTIONS:
        raise CorruptPayload(f"section table: {count} sections, expected at most {MAX_SECTIONS}")
    sections = []
    for index in range(count):
        kind = body[position]
        length, position = read_varint(body, position + 1, "section table: length")
        crc = body[position] | body[position + 1] << 8 | body[position + 2] << 16 | body[position + 3] << 24
        position += 4
        if kind not in _KINDS:
            _check_kind(kind)
        if numbers >> (kind & ~OPTIONAL) & 1:
            raise CorruptPayload(f"section table: the {section_name(kind)} occurs twice")
        numbers |= 1 << (kind & ~OPTIONAL)
        if kind == _LABELS:
            if index:
                raise CorruptPayload("section table: the labels section is not the first")
            limit = _max_labels(samples // (bands * height * width), height, width)
            if length > limit:
                raise CorruptPayload(f"section table: {length} bytes of labels, expected at most {limit}")
        elif kind == _EMBEDDING:
            limit = _max_embedding(samples // (bands * height * width), height, width)
            if length > limit:
                raise CorruptPayload(f"section table: {length} bytes of an embedding, expected at most {limit}")
        sections.append(SectionEntry(kind, length, crc, offset))
        offset += length
    if position != len(body):
        raise CorruptPayload(f"header: {len(body) - position} bytes after the section table")
    trellis = bool(layout & TRELLIS)
    if trellis and not numbers >> _FEATURES & 1:
        raise CorruptPayload("header: a trellis without a features section")
    order = "F" if layout & FORTRAN else "C"
    grid, entries = (rows, columns), tuple(sections)
    return Header(
        dtype, shape, order, axes, decoder, head, quality / 100, grid, entries, size, FORMAT_VERSION, grouping, trellis
    )


@lru_cache(maxsize=64)  # the chunks of an array agree
def _read_axes(ndim: int, packed: bytes) -> Axes:
    codes = [packed[i >> 1] >> (4 * (i & 1)) & 15 for i in range(ndim)]
    if not all(code in _AXES for code in codes):
        raise UnsupportedPayload(f"header: unknown axis codes {codes}, expected 1 to 6; upgrade deepsic_codec")
    axes = Axes("".join(_AXES[code] for code in codes))
    if len(set(axes)) != ndim or "y" not in axes or "x" not in axes:
        raise CorruptPayload(f"header: axes {axes!r}, expected y, x and others, each once")
    if ndim & 1 and packed[-1] >> 4:
        raise CorruptPayload("header: padding of the axes is not zero")
    return axes


def _max_labels(slices: int, height: int, width: int) -> int:
    """Return the largest length of a labels section in bytes: readers may fetch that much after the header."""
    return 2 * 5 + 1 + 2 * MAX_K * _max_tiles(slices, height, width)


def _max_embedding(slices: int, height: int, width: int) -> int:
    """Return the largest length of an embedding section in bytes."""
    return 2 * 5 + 1 + MAX_VALUES * _max_tiles(slices, height, width)


def _max_tiles(slices: int, height: int, width: int) -> int:
    return min(slices * ceil_div(height, LABEL_CELL) * ceil_div(width, LABEL_CELL), MAX_TILES)


def _check_kind(kind: int) -> None:
    """Raise unless a section of a kind that this version does not read can be skipped."""
    if kind & ~OPTIONAL == 0:
        raise CorruptPayload("section table: kind 0 does not exist")
    if kind ^ OPTIONAL in _KINDS:
        expected = "optional" if kind < OPTIONAL else "required"
        raise CorruptPayload(f"section table: the {section_name(kind ^ OPTIONAL)} is not marked as {expected}")
    if kind < OPTIONAL:
        raise UnsupportedPayload(
            f"section table: unknown {section_name(kind)}, which is required; upgrade deepsic_codec"
        )


@dataclass(frozen=True, eq=False)
class Payload:
    """A payload whose checksums are right."""

    header: Header
    sections: Mapping[int, bytes]  # coded, by kind, those of unknown kinds included

    def __contains__(self, section: Section[Any]) -> bool:
        """Whether the payload has a section."""
        return section.kind in self.sections

    def read(self, section: Section[T]) -> T | None:
        """Decode a section; None if the payload has no such section. Raises the errors of `Section.decode`."""
        data = self.sections.get(section.kind)
        return None if data is None else section.decode(data, self.header)


def read_section(payload: Any, header: Header, section: Section[T]) -> T | None:
    """Verify the checksum of a section and decode it; None if the payload has no such section.

    Parameters
    ----------
    payload : bytes-like
        The payload, up to the end of this section at least.
    header : Header
        Its header.
    section : Section
        LABELS or another kind of `deepsic_codec.payload.sections`.

    Raises
    ------
    CorruptPayload
        If the section is truncated or damaged.
    UnsupportedPayload
        If it needs a newer version.
    """
    entry = header.entry(section.kind)
    if entry is None:
        return None
    return section.decode(read_verified(payload if isinstance(payload, bytes) else _view(payload), entry), header)


def read_verified(payload: bytes | memoryview, entry: SectionEntry) -> bytes:
    """Return the bytes of a section; raises CorruptPayload if it is truncated or its checksum does not match."""
    return verified(bytes(payload[entry.offset : entry.offset + entry.length]), entry)


def verified(data: bytes, entry: SectionEntry) -> bytes:
    """Return the bytes of a section as `read_verified` does, from just these bytes."""
    if len(data) < entry.length:
        raise CorruptPayload(f"{section_name(entry.kind)}: truncated, {len(data)} of {entry.length} bytes")
    if crc32c(data) != entry.crc:
        raise CorruptPayload(f"{section_name(entry.kind)}: the checksum does not match")
    return data


def unpack(payload: Any) -> Payload:
    """Verify a whole payload, bytes-like: its header, the checksum of each section, and its length.

    Raises
    ------
    CorruptPayload
        With the name of the section that is truncated, damaged or inconsistent.
    UnsupportedPayload
        If it is no payload of DeepSIC, or needs a newer version.
    """
    payload = payload if isinstance(payload, bytes) else _view(payload)
    header = read_header(payload)
    sections = {entry.kind: read_verified(payload, entry) for entry in header.sections}
    if len(payload) > header.nbytes:
        raise CorruptPayload(f"payload: {len(payload) - header.nbytes} bytes after its last section")
    return Payload(header, sections)


def _view(data: Any) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses zeros in a shape


def _start(data: Any) -> bytes:
    return bytes(_view(data)[: PREFIX + MAX_BODY])


def pack(
    *,
    dtype: Any,
    shape: Sequence[int],
    order: str,
    axes: str,
    decoder: bytes,
    head: bytes,
    quality: float,
    grid: tuple[int, int],
    sections: Mapping[Section[Any], Any],
    grouping: int = COLOURS,
    trellis: bool = False,
) -> bytes:
    """Write a payload.

    Parameters
    ----------
    dtype, shape, order, axes, decoder, head, quality, grid, grouping, trellis
        As in `Header`; the dtype is u1, i1, u2, i2 or f4, and the quality is stored in hundredths.
    sections : mapping of Section to its content
        Kinds of `deepsic_codec.payload.sections`, and others that readers may skip. Stored in ascending order of their
        numbers, so that labels come first.

    Returns
    -------
    bytes
        Equal for equal arguments.

    Raises
    ------
    UnsupportedArray
        For a dtype, or a shape under these axes, that a payload cannot have.
    ConfigurationError
        For axes or a quality out of range.
    ValueError
        For any other argument out of range.
    """
    shape = tuple(int(length) for length in shape)
    key = _DTYPE_KEYS.get(np.dtype(dtype))
    if key is None:
        raise UnsupportedArray(f"dtype {np.dtype(dtype)}: a payload holds uint8, int8, uint16, int16 or float32")
    if len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes) <= set(AXIS_CODES):
        raise ConfigurationError(f"axes: expected y, x and any of c, t, z, n, each once, got {axes!r}")
    axes = Axes(axes)
    if len(shape) != len(axes) or min(shape) < 1 or prod(shape) > MAX_SAMPLES:
        raise UnsupportedArray(f"chunk {shape} with axes {axes!r}: expected 1 to {MAX_SAMPLES} samples, sizes above 0")
    bands = axes.bands(shape)
    if bands > MAX_BANDS:
        raise UnsupportedArray(
            f"chunk {shape} with axes {axes!r} has too many bands; choose chunks of at most {MAX_BANDS} bands"
        )
    if grouping == PLANES and bands == 1:
        raise ValueError(f"grouping {grouping} of {bands} bands")
    if not MIN_QUALITY <= quality <= DEEP_QUALITY:
        raise ConfigurationError(f"quality: expected a number from 1 to 200, got {quality!r}")
    if order not in ("C", "F") or len(decoder) != 8 or len(head) != 4:
        raise ValueError(f"expected order C or F and identities of 8 and 4 bytes, got {order!r}, {decoder!r}, {head!r}")
    height, width = axes.height(shape), axes.width(shape)
    if not (0 < grid[0] <= height and 0 < grid[1] <= width):
        raise ValueError(f"grid of {grid[0]} x {grid[1]} symbols for {height} x {width} pixels")
    coded = _encode_sections(sections)
    if trellis and _FEATURES not in coded:
        raise ValueError("a trellis without features")
    if len(coded.get(_LABELS, b"")) > _max_labels(axes.slices(shape), height, width):
        raise ValueError(f"{len(coded[_LABELS])} bytes of labels are more than chunk {shape} can have")

    layout = key >> 8 | (FORTRAN if order == "F" else 0) | grouping << 2 | (TRELLIS if trellis else 0)
    body = bytearray((key & 255, layout, len(shape)))
    codes = [AXIS_CODES[axis] for axis in axes] + [0]
    body += bytes(codes[i] | codes[i + 1] << 4 for i in range(0, len(axes), 2))
    for length in shape:
        body += write_varint(length)
    body += decoder + head + round(quality * 100).to_bytes(2, "little")
    body += write_varint(grid[0]) + write_varint(grid[1])
    body.append(len(coded))
    for kind, data in coded.items():
        body.append(kind)
        body += write_varint(len(data)) + crc32c(data).to_bytes(4, "little")
    start = MAGIC + bytes((FORMAT_VERSION, 0)) + len(body).to_bytes(2, "little")
    crc = crc32c(start + body)
    return b"".join((start, crc.to_bytes(4, "little"), body, *coded.values()))


def _encode_sections(sections: Mapping[Section[Any], Any]) -> dict[int, bytes]:
    """Return coded sections by kind, in the order in which they are stored."""
    numbers = [section.number for section in sections]
    if len(sections) > MAX_SECTIONS or len(set(numbers)) < len(numbers):
        raise ValueError(f"sections {sorted(numbers)}: expected at most {MAX_SECTIONS}, each once")
    for section in sections:
        unknown = not section.required and section.kind ^ OPTIONAL not in _KINDS
        if not 0 < section.number < OPTIONAL or not (section.kind in _KINDS or unknown):
            raise ValueError(f"section {section.number}: expected a known kind, or one that readers may skip")
    ordered = sorted(sections.items(), key=lambda item: item[0].number)
    coded = {section.kind: bytes(section.encode(content)) for section, content in ordered}
    if any(len(data) > MAX_VARINT for data in coded.values()):
        raise ValueError(f"a section of more than {MAX_VARINT} bytes")
    return coded
