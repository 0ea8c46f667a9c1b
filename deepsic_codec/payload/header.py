"""Header and section table of a payload. `docs/format.md` is the specification, in the same order and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c

from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.payload.constants import LABEL_CELL, MAX_QUALITY, MIN_QUALITY
from deepsic_codec.payload.varint import MAX_VARINT, read_varint, write_varint

MAGIC = b"DSIC"
FORMAT_VERSION = 1  # frozen: readable for ever
PREFIX = 12  # bytes: magic, version, flags, header length, CRC

# Section kinds, as the byte in the table. Bit 7: a reader that does not know the kind may skip the section.
OPTIONAL = 0x80
LABELS, VALUE_SCALING, FEATURES, NODATA = 1 | OPTIONAL, 2, 3, 4
EMBEDDING, RESIDUAL, REFINEMENT, SIDE = 5 | OPTIONAL, 6, 7, 8
KIND_NAMES = {
    LABELS: "labels",
    VALUE_SCALING: "value scaling",
    FEATURES: "features",
    NODATA: "nodata",
    EMBEDDING: "embedding",
    RESIDUAL: "residual",
    REFINEMENT: "refinement",
    SIDE: "side information",
}
# The required kinds among them are all that this version can do without loss.
READABLE = frozenset((LABELS, VALUE_SCALING, FEATURES, NODATA, RESIDUAL))
# And those that readers skip where they do not know them.
_WRITABLE = READABLE | {kind for kind in range(OPTIONAL + 1, 256) if kind ^ OPTIONAL not in KIND_NAMES}

# Limits, all tested before anything is allocated.
MIN_NDIM, MAX_NDIM = 2, 8  # y and x at least; eight nibbles of axes
MAX_BANDS = 256  # of axis c: more are no images, and each has an entry in the value scaling
MAX_SAMPLES = 1 << 31  # a chunk is decoded whole and in memory; its size in bytes then fits 64 bits with ease
MAX_SECTIONS = 16  # twice the kinds there are; keeps the header within MAX_BODY
# Seven fixed bytes of layout and axes, eight sizes, identities, quality, grid, table of sections: with the prefix 244
# bytes, so that a first read of 256 bytes holds every header.
MAX_BODY = 3 + 4 + 8 * 5 + 12 + 2 + 2 * 5 + 1 + MAX_SECTIONS * 10
MAX_K = 5  # (class, score) pairs of a tile
MAX_TILES = 1 << 22  # label tiles of a chunk: more than 40 MB of labels are no labels

AXES = {"y": 1, "x": 2, "c": 3, "t": 4, "z": 5, "n": 6}
_AXIS_OF = {code: axis for axis, code in AXES.items()}
BIG_ENDIAN, FORTRAN, GROUPING = 1, 2, 12  # bits of the layout byte
# How bands are joined to images of three channels: all in triples, all but the first triple alone, or all alone.
TRIPLES, FIRST_TRIPLE, PLANES = 0, 1, 2
_LEAST_BANDS = {FIRST_TRIPLE: 4, PLANES: 2}  # fewer are in one image: equal chunks are equal bytes
# dtype code, plus 256 if big-endian; one-byte types have no byte order and leave that bit clear.
_DTYPES = {code: np.dtype(f"<{name}") for code, name in enumerate(("u1", "i1", "u2", "i2", "f4"), start=1)}
_DTYPES |= {code | 256: dtype.newbyteorder(">") for code, dtype in _DTYPES.items() if dtype.itemsize > 1}
_DTYPE_KEYS = {dtype: key for key, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Section:
    """An entry of the section table.

    Attributes
    ----------
    kind : int
        LABELS, FEATURES or another byte of the table.
    length : int
        Bytes.
    crc : int
        CRC-32C of these bytes.
    offset : int
        Of the first byte, from the start of the payload.
    """

    kind: int
    length: int
    crc: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a payload says of its chunk before any section is read.

    Attributes
    ----------
    dtype : numpy.dtype
        Of the chunk, with its byte order.
    shape : tuple of int
        Of the chunk, in the order of `axes`.
    order : {"C", "F"}
        Memory order in which the chunk came and is returned.
    axes : str
        One of the letters y, x, c, t, z, n for each axis.
    decoder, head : bytes
        The first 8 bytes of the decoder's SHA-256, the first 4 of the head's; a head of zeros is none.
    quality : float
        1 to 100.
    grid : (int, int)
        Rows and columns of symbols.
    sections : tuple of Section
        In the order in which they follow.
    size : int
        Bytes before the first section.
    version : int
        Of the format.
    grouping : int
        TRIPLES, FIRST_TRIPLE or PLANES: how bands are joined to images.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    axes: str
    decoder: bytes
    head: bytes
    quality: float
    grid: tuple[int, int]
    sections: tuple[Section, ...]
    size: int
    version: int
    grouping: int = TRIPLES

    @property
    def nbytes(self) -> int:
        """Bytes of the whole payload."""
        return self.sections[-1].offset + self.sections[-1].length if self.sections else self.size

    @property
    def height(self) -> int:
        """Pixels along y."""
        return self.shape[self.axes.index("y")]

    @property
    def width(self) -> int:
        """Pixels along x."""
        return self.shape[self.axes.index("x")]

    @property
    def channels(self) -> int:
        """Samples along c, 1 without that axis."""
        return self.shape[self.axes.index("c")] if "c" in self.axes else 1

    @property
    def images(self) -> int:
        """Images that the networks see, of all slices."""
        return self.slices * image_count(self.channels, self.grouping)

    @property
    def slices(self) -> int:
        """The product of all axes but y, x and c."""
        return prod(self.shape) // (self.height * self.width * self.channels)


def image_count(bands: int, grouping: int) -> int:
    """Return how many images of three channels hold the bands of a slice."""
    if grouping == PLANES:
        return bands
    return 1 + max(0, bands - 3) if grouping == FIRST_TRIPLE else -(-bands // 3)


def kind_name(kind: int) -> str:
    """Return what errors call a section."""
    return f"{KIND_NAMES[kind]} section" if kind in KIND_NAMES else f"section of kind {kind & ~OPTIONAL}"


def header_size(data: Any) -> int:
    """Return how many bytes the header has, given the first 12 at least.

    Raises
    ------
    CorruptPayload
        If there are fewer than 12 bytes, or the length in them is out of range.
    UnsupportedPayload
        If it is no payload of DeepSIC, or a newer one.
    """
    start: bytes = data if isinstance(data, bytes) else _start(data)
    if not start:
        raise CorruptPayload("header: truncated, the payload is empty")
    if start[:4] != MAGIC[: len(start)]:
        raise UnsupportedPayload(f"not a payload of DeepSIC: starts with {start[:4]!r}, expected {MAGIC!r}")
    if len(start) < PREFIX:
        raise CorruptPayload(f"header: truncated, {len(start)} bytes where at least {PREFIX} were expected")
    if start[4] != FORMAT_VERSION:
        advice = "written while the format was developed; encode again" if not start[4] else "upgrade it"
        raise UnsupportedPayload(
            f"header: format version {start[4]}, this version of deepsic_codec reads {FORMAT_VERSION}; {advice} "
            "(or that byte is damaged)"
        )
    length = start[6] | start[7] << 8
    if length > MAX_BODY:
        raise CorruptPayload(f"header: length {length} where at most {MAX_BODY} was expected")
    return PREFIX + length


def read_header(data: Any) -> Header:
    """Read a header; no section is looked at.

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
        raise CorruptPayload("header: its bytes do not match their checksum")
    if data[5]:
        raise UnsupportedPayload(f"header: flags {data[5]:#04x}, this version knows none; upgrade deepsic_codec")
    try:
        return _read_body(body, size)
    except IndexError:
        raise CorruptPayload(f"header: a field goes beyond its {len(body)} bytes") from None


def _read_body(body: bytes, size: int) -> Header:
    # One flat pass, on purpose: a scan of labels comes through here a million times (7 microseconds each).
    layout, ndim = body[1], body[2]
    dtype = _DTYPES.get(body[0] | (layout & BIG_ENDIAN) << 8)
    if dtype is None:
        raise UnsupportedPayload(f"header: dtype code {body[0]} with layout {layout:#04x}; upgrade deepsic_codec")
    grouping = (layout & GROUPING) >> 2
    if layout & ~(BIG_ENDIAN | FORTRAN | GROUPING) or grouping > PLANES:
        raise UnsupportedPayload(f"header: layout {layout:#04x}, unknown to this version; upgrade deepsic_codec")
    if not MIN_NDIM <= ndim <= MAX_NDIM:
        raise CorruptPayload(f"header: {ndim} axes where {MIN_NDIM} to {MAX_NDIM} were expected")
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
        raise CorruptPayload(f"header: chunk shape {shape} where 1 to {MAX_SAMPLES} samples were expected")
    bands = shape[axes.index("c")] if "c" in axes else 1
    if bands > MAX_BANDS:
        raise CorruptPayload(f"header: {bands} bands where at most {MAX_BANDS} were expected")
    if grouping and bands < _LEAST_BANDS[grouping]:
        raise CorruptPayload(f"header: grouping {grouping} of {bands} bands")

    decoder, head = body[position : position + 8], body[position + 8 : position + 12]
    position += 14
    quality = body[position - 2] | body[position - 1] << 8
    if not MIN_QUALITY <= quality / 100 <= MAX_QUALITY:
        raise CorruptPayload(f"header: quality {quality / 100} where 1 to 100 was expected")
    rows, position = read_varint(body, position, "header: grid")
    columns, position = read_varint(body, position, "header: grid")
    height, width = shape[axes.index("y")], shape[axes.index("x")]
    if not (0 < rows <= height and 0 < columns <= width):
        raise CorruptPayload(f"header: grid of {rows} x {columns} symbols for {height} x {width} pixels")

    count, offset, seen = body[position], size, 0
    position += 1
    if count > MAX_SECTIONS:
        raise CorruptPayload(f"section table: {count} sections where at most {MAX_SECTIONS} were expected")
    sections = []
    for index in range(count):
        kind = body[position]
        length, position = read_varint(body, position + 1, "section table: length")
        crc = body[position] | body[position + 1] << 8 | body[position + 2] << 16 | body[position + 3] << 24
        position += 4
        if kind not in READABLE:
            _check_kind(kind)
        if seen >> (kind & ~OPTIONAL) & 1:
            raise CorruptPayload(f"section table: the {kind_name(kind)} is there twice")
        seen |= 1 << (kind & ~OPTIONAL)
        if kind == LABELS:
            if index:
                raise CorruptPayload("section table: the labels section is not the first")
            limit = _labels_limit(samples, shape, axes)
            if length > limit:
                raise CorruptPayload(f"section table: {length} bytes of labels where at most {limit} can be")
        sections.append(Section(kind, length, crc, offset))
        offset += length
    if position != len(body):
        raise CorruptPayload(f"header: {len(body) - position} bytes after the section table")
    order = "F" if layout & FORTRAN else "C"
    return Header(
        dtype,
        shape,
        order,
        axes,
        decoder,
        head,
        quality / 100,
        (rows, columns),
        tuple(sections),
        size,
        FORMAT_VERSION,
        grouping,
    )


@lru_cache(maxsize=64)  # an archive has one or two
def _read_axes(ndim: int, packed: bytes) -> str:
    codes = [packed[i >> 1] >> (4 * (i & 1)) & 15 for i in range(ndim)]
    if not all(code in _AXIS_OF for code in codes):
        raise UnsupportedPayload(f"header: axis codes {codes}, this version knows 1 to 6; upgrade deepsic_codec")
    axes = "".join(_AXIS_OF[code] for code in codes)
    if len(set(axes)) != ndim or "y" not in axes or "x" not in axes:
        raise CorruptPayload(f"header: axes {axes!r} where y, x and others, each once, were expected")
    if ndim & 1 and packed[-1] >> 4:
        raise CorruptPayload("header: padding of the axes is not zero")
    return axes


def _labels_limit(samples: int, shape: tuple[int, ...], axes: str) -> int:
    """Bytes that labels can have: so many a first read may be followed by, whatever the table says."""
    height, width = shape[axes.index("y")], shape[axes.index("x")]
    slices = samples // (height * width * (shape[axes.index("c")] if "c" in axes else 1))
    tiles = slices * -(-height // LABEL_CELL) * -(-width // LABEL_CELL)
    return 2 * 5 + 1 + 2 * MAX_K * min(tiles, MAX_TILES)


def _check_kind(kind: int) -> None:
    """Raise unless a section of a kind that this version does not read can be skipped."""
    if kind & ~OPTIONAL == 0:
        raise CorruptPayload("section table: kind 0")
    if kind ^ OPTIONAL in KIND_NAMES:
        known = "optional" if kind < OPTIONAL else "required"
        raise CorruptPayload(f"section table: the {kind_name(kind ^ OPTIONAL)} is not marked as {known}")
    if kind < OPTIONAL:
        raise UnsupportedPayload(
            f"section table: this version cannot decode a {kind_name(kind)}, and it is required; upgrade deepsic_codec"
        )


def read_section(payload: Any, header: Header, kind: int) -> bytes | None:
    """Read a section and verify its checksum.

    Parameters
    ----------
    payload : bytes-like
        The payload, up to the end of this section at least.
    header : Header
        Its header.
    kind : int
        LABELS, FEATURES or another byte of the table.

    Returns
    -------
    bytes or None
        None if the payload has no such section.

    Raises
    ------
    CorruptPayload
        If the section is truncated or damaged.
    """
    for section in header.sections:
        if section.kind == kind:
            return _read(payload if isinstance(payload, bytes) else _view(payload), section)
    return None


def _read(payload: bytes | memoryview, section: Section) -> bytes:
    data = bytes(payload[section.offset : section.offset + section.length])
    if len(data) < section.length:
        raise CorruptPayload(f"{kind_name(section.kind)}: truncated, {len(data)} of {section.length} bytes")
    if crc32c(data) != section.crc:
        raise CorruptPayload(f"{kind_name(section.kind)}: its bytes do not match their checksum")
    return data


def check_payload(payload: Any) -> Header:
    """Verify a whole payload: its header, every section's checksum, and that it ends where it should.

    Raises
    ------
    CorruptPayload
        Naming the section that is truncated, damaged or inconsistent.
    UnsupportedPayload
        If it is no payload of DeepSIC, or needs a newer version.
    """
    payload = payload if isinstance(payload, bytes) else _view(payload)
    header = read_header(payload)
    for section in header.sections:
        _read(payload, section)
    if len(payload) > header.nbytes:
        raise CorruptPayload(f"payload: {len(payload) - header.nbytes} bytes after its last section")
    return header


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
    sections: Mapping[int, bytes],
    grouping: int = TRIPLES,
) -> bytes:
    """Put a payload together.

    Parameters
    ----------
    dtype : dtype-like
        Of the chunk: u1, i1, u2, i2 or f4, in either byte order.
    shape : sequence of int
        Of the chunk, in the order of `axes`.
    order : {"C", "F"}
        Memory order of the chunk.
    axes : str
        y, x and any of c, t, z, n, each once.
    decoder, head : bytes
        The first 8 bytes of the decoder's SHA-256, the first 4 of the head's; four zeros for no head.
    quality : float
        1 to 100, stored in hundredths.
    grid : (int, int)
        Rows and columns of symbols.
    sections : mapping of int to bytes
        By kind: LABELS, FEATURES, or any with the optional bit. Stored in ascending order of their numbers, so that
        labels come first.
    grouping : int
        TRIPLES, FIRST_TRIPLE (of 4 bands or more) or PLANES (of 2 or more).

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
        For anything else out of range.
    """
    shape = tuple(int(length) for length in shape)
    key = _DTYPE_KEYS.get(np.dtype(dtype))
    if key is None:
        raise UnsupportedArray(f"dtype {np.dtype(dtype)}: a payload holds uint8, int8, uint16, int16 or float32")
    if len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes) <= set(AXES):
        raise ConfigurationError(f"axes: expected y, x and any of c, t, z, n, each once, got {axes!r}")
    if len(shape) != len(axes) or min(shape) < 1 or prod(shape) > MAX_SAMPLES:
        raise UnsupportedArray(f"chunk {shape} with axes {axes!r}: expected 1 to {MAX_SAMPLES} samples, sizes above 0")
    bands = shape[axes.index("c")] if "c" in axes else 1
    if bands > MAX_BANDS:
        raise UnsupportedArray(f"chunk {shape} with axes {axes!r}: at most {MAX_BANDS} bands in a chunk")
    if grouping and bands < _LEAST_BANDS[grouping]:
        raise ValueError(f"grouping {grouping} of {bands} bands")
    if not MIN_QUALITY <= quality <= MAX_QUALITY:
        raise ConfigurationError(f"quality: expected a number from 1 to 100, got {quality!r}")
    if order not in ("C", "F") or len(decoder) != 8 or len(head) != 4:
        raise ValueError(f"expected order C or F and identities of 8 and 4 bytes, got {order!r}, {decoder!r}, {head!r}")
    height, width = shape[axes.index("y")], shape[axes.index("x")]
    if not (0 < grid[0] <= height and 0 < grid[1] <= width):
        raise ValueError(f"grid of {grid[0]} x {grid[1]} symbols for {height} x {width} pixels")
    if len(sections) > MAX_SECTIONS or any(len(data) > MAX_VARINT for data in sections.values()):
        raise ValueError(f"expected at most {MAX_SECTIONS} sections of at most {MAX_VARINT} bytes")
    numbers = [kind & ~OPTIONAL for kind in sections]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"sections {sorted(sections)}: a kind is there twice")
    if not sections.keys() <= _WRITABLE:
        raise ValueError(f"sections {sorted(sections)}: expected kinds of this version, or that readers may skip")
    if LABELS in sections and len(sections[LABELS]) > _labels_limit(prod(shape), shape, axes):
        raise ValueError(f"{len(sections[LABELS])} bytes of labels are more than chunk {shape} can have")

    body = bytearray((key & 255, key >> 8 | (FORTRAN if order == "F" else 0) | grouping << 2, len(shape)))
    codes = [AXES[axis] for axis in axes] + [0]
    body += bytes(codes[i] | codes[i + 1] << 4 for i in range(0, len(axes), 2))
    for length in shape:
        body += write_varint(length)
    body += decoder + head + round(quality * 100).to_bytes(2, "little")
    body += write_varint(grid[0]) + write_varint(grid[1])
    body.append(len(sections))
    stored = sorted(sections.items(), key=lambda item: item[0] & ~OPTIONAL)
    for kind, data in stored:
        body.append(kind)
        body += write_varint(len(data)) + crc32c(bytes(data)).to_bytes(4, "little")
    start = MAGIC + bytes((FORMAT_VERSION, 0)) + len(body).to_bytes(2, "little")
    crc = crc32c(start + body)
    return b"".join((start, crc.to_bytes(4, "little"), body, *(data for _, data in stored)))
