"""The specification made runnable: a decoder of payloads in Python and NumPy alone.

It follows docs/format.md and the pages that it refers to, section by section, with
their names and in their order. It is plain, exact and slow, and uses nothing else of
the package: this file, NumPy, a model file if there are features, and the file
wavelet-contexts.txt if there are wavelets, are enough. It has no limits but those of
the format: a few hostile bytes can ask for much time.

    python -m deepsic_codec.reference chunk.dsic --out chunk.npy
    python reference.py chunk.dsic --model base-407b2baf.safetensors
"""

import argparse
import base64
import hashlib
import json
import math
import struct
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]
Model = tuple[Tensors, dict[str, Any]]  # tensors, and a description of their networks
ModelPath = str | PathLike[str]


class DecodeError(ValueError):
    """A payload, or a model file, that cannot be decoded."""


class Damaged(DecodeError):
    """No version of the format writes such bytes."""


class Unsupported(DecodeError):
    """The bytes may be sound, but this version of the format cannot read them."""


def clip(value: int, low: int, high: int) -> int:
    """Return a number within bounds."""
    return low if value < low else high if value > high else value


def half_up(value: float) -> int:
    """Round a real number."""
    return math.floor(value + 0.5)


def table(text: str) -> list[list[int]]:
    """Return rows of numbers, between which there is an empty line."""
    return [[int(number) for number in row.split()] for row in text.split("\n\n")]


# docs/format.md: conventions


class Reader:
    """Fields of a section, one after the other."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name, self.position = data, name, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise Damaged(f"{self.name}: ends early, within a field")
        return self.data[start : self.position]

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self.data) - self.position)

    def integer(self, size: int) -> int:
        """Return an unsigned integer of 1, 2 or 4 bytes."""
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        """Return a LEB128 integer of at most 32 bits, in the fewest bytes."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.integer(1)
            value |= (byte & 127) << shift
            if byte < 128:
                break
        if byte > 127 or value >> 32 or (byte == 0 and shift):
            raise Damaged(
                f"{self.name}: an integer above 2^32 - 1, or with spare bytes"
            )
        return value

    def finish(self) -> None:
        """Refuse bytes after the last field."""
        if self.position < len(self.data):
            left = len(self.data) - self.position
            raise Damaged(f"{self.name}: {left} bytes after its last field")


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # 1EDC6F41 reflected
    return byte


CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


# docs/format.md: Prefix, Body, Limits

DTYPES = {1: "u1", 2: "i1", 3: "u2", 4: "i2", 5: "f4"}
AXES = {1: "y", 2: "x", 3: "c", 4: "t", 5: "z", 6: "n"}
LABELS, VALUE_RANGE, NODATA, STRUCTURE = 0x81, 2, 3, 4
SPECTRAL, QUALITY_MAP, FEATURES, RESIDUAL, WAVELET, CAST = 5, 6, 7, 8, 9, 10
EMBEDDING = 0x8B
KINDS = {
    LABELS: "labels",
    VALUE_RANGE: "value range",
    NODATA: "nodata",
    STRUCTURE: "structure",
    SPECTRAL: "spectral transform",
    QUALITY_MAP: "quality map",
    FEATURES: "features",
    RESIDUAL: "residual",
    WAVELET: "wavelet",
    CAST: "cast",
    EMBEDDING: "embedding",
}
MAX_BODY, MAX_SAMPLES, MAX_BANDS = 232, 1 << 31, 256
MAX_SECTIONS, MAX_TILES, MAX_PAIRS = 16, 1 << 22, 5


@dataclass(frozen=True)
class Entry:
    """An entry of the section table."""

    offset: int
    length: int
    crc: int


@dataclass(frozen=True)
class Header:
    """Prefix and body of a payload."""

    dtype: np.dtype[Any]  # with its byte order
    fortran: bool
    grouping: int
    trellis: bool  # of the symbols of features
    axes: str
    shape: tuple[int, ...]  # in the order of axes
    decoder: bytes
    head: bytes
    quality: int  # in hundredths
    grid: tuple[int, int]
    sections: dict[int, Entry]  # by kind
    size: int  # of the payload, in bytes

    @property
    def samples(self) -> tuple[int, int, int, int]:
        """Slices, rows, columns and bands."""
        sizes = dict(zip(self.axes, self.shape, strict=True))
        y, x, c = sizes["y"], sizes["x"], sizes.get("c", 1)
        return math.prod(self.shape) // (y * x * c), y, x, c


def read_header(payload: bytes) -> Header:
    """Read prefix and body of a payload, or of its first 256 bytes or more."""
    prefix = Reader(payload[:12], "prefix")
    if not b"DSIC".startswith(payload[:4]):
        raise Unsupported("prefix: another magic, this is no payload")
    prefix.take(4)
    version = prefix.integer(1)
    if version != 1:
        raise Unsupported(f"prefix: version {version} of the format is not known")
    flags, length, crc = (prefix.integer(size) for size in (1, 2, 4))
    if length > MAX_BODY:
        raise Damaged(f"prefix: a body of {length} bytes")
    body = Reader(Reader(payload[12:], "body").take(length), "body")
    if crc32c(payload[:8] + body.data) != crc:
        raise Damaged("prefix: the checksum of the header does not match")
    if flags:
        raise Unsupported(f"prefix: reserved flags {flags:#04x}")

    code, layout, ndim = (body.integer(1) for _ in range(3))
    if code not in DTYPES:
        raise Unsupported(f"body: reserved dtype {code}")
    dtype = np.dtype((">" if layout & 1 else "<") + DTYPES[code])
    grouping, trellis = layout >> 2 & 3, bool(layout & 16)
    if layout >> 5 or grouping > 1 or (layout & 1 and dtype.itemsize == 1):
        raise Unsupported(f"body: reserved bits of the layout {layout:#04x}")
    if not 2 <= ndim <= 8:
        raise Damaged(f"body: {ndim} axes")
    packed = int.from_bytes(body.take((ndim + 1) // 2), "little")
    codes = [packed >> 4 * axis & 15 for axis in range(ndim)]
    if packed >> 4 * ndim:
        raise Damaged("body: padding of the axes is not 0")
    if not all(code in AXES for code in codes):
        raise Unsupported(f"body: reserved axes {codes}")
    axes = "".join(AXES[code] for code in codes)
    if len({*axes}) < ndim or not {*"yx"} <= {*axes}:
        raise Damaged(f"body: axes {axes}")
    shape = tuple(body.varint() for _ in range(ndim))
    if not 1 <= math.prod(shape) <= MAX_SAMPLES:
        raise Damaged(f"body: chunk shape {shape}")
    sizes = dict(zip(axes, shape, strict=True))
    bands = sizes.get("c", 1)
    if bands > MAX_BANDS or (grouping == 1 and bands == 1):
        raise Damaged(f"body: {bands} bands with grouping {grouping}")
    decoder, head, quality = body.take(8), body.take(4), body.integer(2)
    if not 100 <= quality <= 20000:
        raise Damaged(f"body: quality of {quality} hundredths")
    grid = body.varint(), body.varint()
    if grid != (-(-sizes["y"] // 16), -(-sizes["x"] // 16)):
        raise Damaged(f"body: grid {grid} for a chunk of shape {shape}")
    sections, end = _read_table(body, 12 + length)
    names = decoder, head, quality, grid, sections, end
    if trellis and FEATURES not in sections:
        raise Damaged("body: a trellis without features")
    fortran = bool(layout & 2)
    header = Header(dtype, fortran, grouping, trellis, axes, shape, *names)
    slices, rows, columns, _ = header.samples
    tiles = min(MAX_TILES, slices * -(-rows // 64) * -(-columns // 64))
    for kind, of_tile in ((LABELS, 2 * MAX_PAIRS), (EMBEDDING, 255)):
        if kind in sections and sections[kind].length > 11 + of_tile * tiles:
            raise Damaged(f"body: {KINDS[kind]} of {sections[kind].length} bytes")
    return header


def _read_table(body: Reader, offset: int) -> tuple[dict[int, Entry], int]:
    count = body.integer(1)
    if count > MAX_SECTIONS:
        raise Damaged(f"body: {count} sections")
    sections: dict[int, Entry] = {}
    unknown = []
    for _ in range(count):
        kind, length, crc = body.integer(1), body.varint(), body.integer(4)
        if kind & 127 == 0 or kind in sections or kind ^ 128 in sections:
            raise Damaged(f"body: section {kind:02X} is not allowed, or occurs twice")
        if kind ^ 128 in KINDS:
            raise Damaged(f"body: the {KINDS[kind ^ 128]} section with the other bit 7")
        if kind == LABELS and sections:
            raise Damaged("body: the labels section is not the first")
        if kind not in KINDS and kind < 128:
            unknown.append(kind)
        sections[kind] = Entry(offset, length, crc)
        offset += length
    body.finish()
    if unknown:
        raise Unsupported(f"body: section {unknown[0]:02X} is required and not known")
    return sections, offset


def read_section(payload: bytes, header: Header, kind: int) -> bytes:
    """Return the bytes of a section, whose checksum is verified."""
    entry, name = header.sections[kind], KINDS.get(kind, f"{kind:02X}")
    data = payload[entry.offset : entry.offset + entry.length]
    if len(data) < entry.length:
        raise Damaged(f"{name} section: {len(data)} of {entry.length} bytes")
    if crc32c(data) != entry.crc:
        raise Damaged(f"{name} section: the checksum does not match")
    return data


# docs/format.md: Order of decoding


@dataclass(frozen=True)
class Chunk:
    """What sections have to know of a chunk, or of a grid of its bands."""

    shape: tuple[int, int, int, int]  # slices, rows, columns, bands
    dtype: np.dtype[Any]
    ranges: Array | None  # pairs low, high


def decode(payload: bytes, model: ModelPath | None = None) -> Array:
    """Decode a payload.

    Parameters
    ----------
    payload : bytes
        A whole payload.
    model : path, optional
        The model file, which features need. The default is that of the payload in the
        folder ``models`` beside this file, where the package has its own.

    Returns
    -------
    ndarray
        The chunk, with its shape, dtype and memory order.

    Raises
    ------
    DecodeError
        If the payload is damaged or unsupported, or if the model file is missing, is
        another one, or is damaged.
    """
    payload = bytes(payload)
    header = read_header(payload)
    if len(payload) > header.size:
        raise Damaged(f"payload: {len(payload) - header.size} bytes after its sections")
    sections = {n: read_section(payload, header, n) for n in header.sections}
    dtype = header.dtype.newbyteorder("<")
    ranges = None
    if VALUE_RANGE in sections:
        ranges = read_ranges(sections[VALUE_RANGE], dtype, header.samples[3])
    elif dtype != np.uint8:
        raise Damaged(f"body: samples of {dtype} without a value range section")
    chunk = Chunk(header.samples, dtype, ranges)
    nodata = None
    if NODATA in sections:
        nodata = read_nodata(sections[NODATA], chunk, "nodata section")
    if FEATURES in sections and header.grouping == 0 and chunk.shape[3] not in (1, 3):
        raise Damaged(f"body: features of {chunk.shape[3]} bands with grouping 0")
    if FEATURES in sections:
        _check_sections(sections, False, nodata)
        loaded = load_model(model, header.decoder)
        images = chunk.shape[0] * (chunk.shape[3] if header.grouping else 1)
        of_header = header.grid, header.quality, header.trellis
        symbols = decode_features(sections[FEATURES], loaded, images, *of_header)
        samples = samples_of_features(symbols, header, loaded, chunk)
    else:
        samples = decode_samples(sections, chunk, nodata)
    if nodata is not None:
        samples = nodata.restore(samples)
    if CAST in sections:
        dtype, samples = cast(sections[CAST], samples, nodata)
    else:
        dtype = header.dtype
    # axes other than y, x and c are the slices, in the order of the chunk shape
    sizes = dict(zip(header.axes, header.shape, strict=True))
    order = [axis for axis in header.axes if axis not in "yxc"] + [*"yxc"]
    samples = samples.reshape([sizes.get(axis, 1) for axis in order])
    if "c" not in header.axes:
        samples, order = samples[..., 0], order[:-1]
    samples = samples.transpose([order.index(axis) for axis in header.axes])
    return np.array(samples, dtype, order="F" if header.fortran else "C")


def _check_sections(
    sections: dict[int, bytes], grids: bool, nodata: "NoData | None"
) -> None:
    """Refuse sections that do not go together."""
    coded = [n for n in (FEATURES, RESIDUAL, WAVELET) if n in sections]
    if len(coded) + grids > 1:
        raise Damaged("body: samples in several sections")
    if not coded and not grids and not (nodata and nodata.all):
        raise Damaged("body: samples in no section")
    for kind in (SPECTRAL, QUALITY_MAP):
        if kind in sections and WAVELET not in coded:
            raise Damaged(f"body: a {KINDS[kind]} section without a wavelet section")
    if STRUCTURE in sections and not grids and coded in ([], [FEATURES]):
        raise Damaged("body: a structure section without a wavelet or residual section")


def decode_samples(
    sections: dict[int, bytes], chunk: Chunk, nodata: "NoData | None"
) -> Array:
    """Decode samples of a chunk without features, or of a grid of its bands."""
    structure = Structure([], [], None)
    if STRUCTURE in sections:
        structure = read_structure(sections[STRUCTURE], chunk)
    _check_sections(sections, bool(structure.grids), nodata)
    padding = structure.padding
    if padding is not None and nodata is not None:
        raise Damaged("structure section: padding beside a nodata section")
    masked = padding or nodata
    mask = None if masked is None else masked.mask
    if structure.grids:
        samples = np.zeros(chunk.shape, chunk.dtype)
        for grid in structure.grids:
            samples[..., grid.bands] = decode_grid(grid, chunk, nodata)
    elif RESIDUAL in sections:
        samples = read_residual(sections[RESIDUAL], chunk, mask, structure.levels)
    elif WAVELET in sections:
        matrix = cells = None
        if SPECTRAL in sections:
            matrix = read_spectral(sections[SPECTRAL], chunk.shape[3])
        if QUALITY_MAP in sections:
            cells = read_cells(sections[QUALITY_MAP], chunk.shape)
        samples = read_wavelet(sections[WAVELET], chunk, matrix, cells)
        for band, levels in enumerate(structure.levels):
            samples[..., band] = levels.nearest(samples[..., band])
    else:  # no sample has data
        samples = np.zeros(chunk.shape, chunk.dtype)
    return samples if padding is None else padding.restore(samples)


# docs/format.md: Labels


def labels(payload: bytes) -> tuple[tuple[int, int], Array] | None:
    """Return the labels of a payload, of which the first bytes are enough.

    Returns
    -------
    ((int, int), ndarray) or None
        Height and width of a tile in pixels, and uint8 (slices, rows, columns, k, 2) of
        tiles: k pairs of a class and its score in 1/255, the unused ones (255, 0). None
        if the payload has no labels section.

    Raises
    ------
    DecodeError
        If header or labels are damaged or unsupported.
    """
    header = read_header(payload)
    if LABELS not in header.sections:
        return None
    return read_labels(read_section(payload, header, LABELS), header.samples)


def read_labels(
    section: bytes, shape: tuple[int, int, int, int]
) -> tuple[tuple[int, int], Array]:
    """Read the labels section of a chunk of slices, rows, columns and bands."""
    data = Reader(section, "labels section")
    (height, width), tiles = read_tiles(data, shape)
    k = data.integer(1)
    if k > MAX_PAIRS:
        raise Damaged(f"labels section: {k} pairs for each tile")
    pairs = np.frombuffer(data.take(math.prod(tiles) * k * 2), np.uint8)
    data.finish()
    pairs = pairs.reshape(*tiles, k, 2)
    classes, scores = pairs[..., 0].astype(int), pairs[..., 1].astype(int)
    if ((classes == 255) != (scores == 0)).any():
        raise Damaged("labels section: a class without a score, or the reverse")
    # descending scores, then ascending classes; only unused pairs are alike
    rank = classes - 256 * scores
    if (np.diff(rank, axis=-1) < (classes[..., 1:] < 255)).any():
        raise Damaged("labels section: pairs out of order")
    ordered = np.sort(classes, axis=-1)
    if ((np.diff(ordered, axis=-1) == 0) & (ordered[..., 1:] < 255)).any():
        raise Damaged("labels section: a class twice in a tile")
    return (height, width), pairs


def read_tiles(
    data: Reader, shape: tuple[int, int, int, int]
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Read the size of a tile; return it, and slices, rows and columns of tiles."""
    height, width = data.varint(), data.varint()
    for side in (height, width):
        if side % 64 or not 64 <= side <= 1 << 31:
            raise Damaged(f"{data.name}: tiles of {height} x {width}")
    slices, rows, columns, _ = shape
    tiles = slices, -(-rows // height), -(-columns // width)
    if math.prod(tiles) > MAX_TILES:
        raise Damaged(f"{data.name}: {math.prod(tiles)} tiles")
    return (height, width), tiles


# docs/format.md: Embedding


def embedding(payload: bytes) -> tuple[tuple[int, int], Array] | None:
    """Return the embeddings of a payload.

    Returns
    -------
    ((int, int), array) or None
        Height and width of a tile in pixels, and int8 (slices, rows and columns of
        tiles, values); None if the payload has no embedding section.

    Raises
    ------
    Damaged, Unsupported
        If header or section are damaged or unsupported.
    """
    header = read_header(payload)
    if EMBEDDING not in header.sections:
        return None
    section = read_section(payload, header, EMBEDDING)
    data = Reader(section, "embedding section")
    tile, tiles = read_tiles(data, header.samples)
    values = data.integer(1)
    if not values:
        raise Damaged("embedding section: no values")
    vectors = np.frombuffer(data.take(math.prod(tiles) * values), np.int8)
    data.finish()
    if (vectors == -128).any():
        raise Damaged("embedding section: a value of -128")
    return tile, vectors.reshape(*tiles, values)


# docs/format.md: Value range


def read_ranges(section: bytes, dtype: np.dtype[Any], bands: int) -> Array:
    """Return pairs low, high, one for each band."""
    data = Reader(section, "value range section")
    layout = data.integer(1)
    if layout > 1:
        raise Unsupported(f"value range section: reserved layout {layout}")
    count = bands if layout else 1
    ranges = np.frombuffer(data.take(2 * count * dtype.itemsize), dtype).reshape(-1, 2)
    data.finish()
    if not np.isfinite(ranges).all() or (ranges[:, 0] > ranges[:, 1]).any():
        raise Damaged("value range section: a range that is not finite, or none")
    return np.broadcast_to(ranges + dtype.type(0), (bands, 2))  # -0 + 0 is 0


def from_64ths(values: Array, chunk: Chunk) -> Array:
    """Turn 64ths of features into samples."""
    assert chunk.ranges is not None
    low, high = chunk.ranges[:, 0], chunk.ranges[:, 1]
    if chunk.dtype.kind == "f":
        return scaled_floats(values, 16320, low, high)
    extent = high.astype(int) - low
    samples = low + (2 * values * extent + 16320) // 32640
    return samples.astype(chunk.dtype)


def scaled_floats(values: Array, unit: int, low: Array, high: Array) -> Array:
    """Turn integers into float32 by float64, one rounded operation after the other."""
    extent = high.astype(np.float64) - low.astype(np.float64)
    samples = values.astype(np.float64) * extent / unit + low.astype(np.float64)
    return np.clip(samples.astype(np.float32), low, high) + np.float32(0)


# docs/format.md: Features
# docs/entropy-coder.md: Arithmetic coder, Contexts

STRETCH = [
    clip(half_up(256 * math.log((i + 0.5) / (16383.5 - i))), -3071, 3071)
    for i in range(16384)
]  # S
SQUASH = [
    clip(half_up(65536 / (1 + math.exp(-dot / 256))), 16, 65520)
    for dot in range(-3071, 3072)
]  # P by dot
RATES = [half_up(65536 / (n + 1.5)) for n in range(1024)]  # R
ONES = (1 << 48) - 1
EVEN = 32768  # even odds

Context = list[int]  # probability of a one in 22 bits, count of observations


def new_contexts(count: int) -> list[Context]:
    """Return contexts of even odds that nothing was observed of."""
    return [[1 << 21, 0] for _ in range(count)]


def new_family() -> dict[int, Context]:
    """Return such contexts by index, each of which is made when it is first used."""
    return defaultdict(lambda: [1 << 21, 0])


def two_families() -> tuple[dict[int, Context], dict[int, Context]]:
    """Return a family for each of two cases."""
    return new_family(), new_family()


class Bits:
    """An arithmetic decoder of bits, and what its contexts learn from them."""

    def __init__(self, data: bytes, name: str, limit: int = 255) -> None:
        self.data, self.name, self.limit = data, name, limit
        self.stretch = STRETCH
        self.position, self.low, self.high, self.value = 0, 0, ONES, 0
        for _ in range(6):
            self.value = self.value << 8 | self._next()

    def _next(self) -> int:
        """Return the next byte, a zero past the end."""
        self.position += 1
        return self.data[self.position - 1] if self.position <= len(self.data) else 0

    def bit(self, probability: int) -> int:
        """Decode a bit whose probability of being one is in 1/65536."""
        middle = self.low + (self.high - self.low >> 16) * probability
        one = self.value <= middle
        if one:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 40 == self.high >> 40:
            self.low = self.low << 8 & ONES
            self.high = (self.high << 8 & ONES) + 255
            self.value = (self.value << 8 & ONES) + self._next()
        return int(one)

    def learn(self, context: Context, bit: int) -> None:
        """Move a context towards a bit."""
        p, n = context
        context[0] = p + (((4194303 if bit else 0) - p) * RATES[n] >> 16)
        if n < self.limit:
            context[1] = n + 1

    def one(self, context: Context, lowest: int = 16) -> int:
        """Decode a bit under one context."""
        bit = self.bit(clip(context[0] >> 6, lowest, 65536 - lowest))
        self.learn(context, bit)
        return bit

    def mixed(self, contexts: list[Context], rate: int, *mixers: list[int]) -> int:
        """Decode a bit under several contexts, and 256 if there are more weights.

        The weights of several mixers are added.
        """
        a = [self.stretch[context[0] >> 8] for context in contexts]
        if len(mixers[0]) > len(a):
            a.append(256)
        weights = [sum(column) for column in zip(*mixers, strict=True)]
        dot = clip(sum(map(mul, weights, a)) >> 16, -3071, 3071)
        probability = SQUASH[dot + 3071]
        bit = self.bit(probability)
        error = ((65535 if bit else 0) - probability) * rate
        for weights in mixers:
            for i, value in enumerate(a):
                weights[i] += value * error + 131072 >> 18
        for context in contexts:
            self.learn(context, bit)
        return bit

    def escape(self, contexts: list[Context]) -> int:
        """Decode a number of ones, then a zero; there are fewer ones than contexts."""
        for ones, context in enumerate(contexts):
            if not self.one(context):
                return ones
        raise Damaged(f"{self.name}: a number out of range")

    def plain(self, count: int) -> int:
        """Decode bits of even odds, the highest first."""
        value = 0
        for _ in range(count):
            value = 2 * value + self.bit(EVEN)
        return value

    def finish(self) -> None:
        """Refuse bytes after the last symbol."""
        if self.position < len(self.data):
            raise Damaged(f"{self.name}: bytes left over after the last symbol")


def new_bits(data: bytes, name: str) -> Bits:
    """Return a decoder of a stream that may not end in a zero byte."""
    if data.endswith(b"\0"):
        raise Damaged(f"{name}: the stream ends in a zero byte")
    return Bits(data, name)


# docs/entropy-coder.md: Symbols and coding order

DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))
CROSS = ((0, -1), (0, 1), (-1, 0), (1, 0))
CENTRE = ((0, 0),)


@dataclass(frozen=True)
class Pass:
    """A pass over the positions of a group of channels."""

    channels: range
    neighbours: tuple[tuple[int, int], ...]  # in the same group, that the prior sees
    positions: Array  # rows of slice, y and x, in their order


def passes(groups: list[int], slices: int, grid: tuple[int, int]) -> Iterator[Pass]:
    """Yield the passes in coding order."""
    y, x = np.indices(grid)
    even = (y + x) % 2 == 0
    first = [((), even & (y % 2 == 0)), (DIAGONAL, even & (y % 2 == 1)), (CROSS, ~even)]
    later = [((), even), (CROSS, ~even)]
    start = 0
    for count in groups:
        for neighbours, selected in later if start else first:
            positions = np.argwhere(np.broadcast_to(selected, (slices, *grid)))
            yield Pass(range(start, start + count), neighbours, positions)
        start += count


# docs/entropy-coder.md: Trellis
# the next state, by state and parity of the number
NEXT_STATE = ((0, 1), (3, 2), (5, 4), (6, 7), (1, 0), (2, 3), (4, 5), (7, 6))


def decode_features(
    section: bytes,
    model: Model,
    images: int,
    grid: tuple[int, int],
    hundredths: int,
    trellis: bool,
) -> Array:
    """Decode symbols (images, rows, columns, channels)."""
    tensors, description = model
    groups, detail = description["prior_groups"], description["prior_detail"]
    rows, columns = grid
    coder = SymbolCoder(section, tensors, sum(groups))
    levels = tensors["decoder.coder.levels"].tolist()
    # symbols with a border of zeros for the prior, and their magnitudes for contexts
    symbols = np.zeros((images, rows + 2, columns + 2, sum(groups)), int)
    sizes = symbols.tolist()
    quality = whole_quality(hundredths)
    for number, step in enumerate(passes(groups, images, grid)):
        if not len(step.positions):
            continue  # of a small grid
        predicted = predict(tensors, number, step, detail, symbols, quality, trellis)
        state = 0
        for (s, y, x), means, indices in zip(step.positions, *predicted, strict=True):
            near = [sizes[s][y + 1 + dy][x + 1 + dx] for dy, dx in CROSS + DIAGONAL]
            size, values = sizes[s][y + 1][x + 1], []
            for k, mean, index in zip(step.channels, means, indices, strict=True):
                odd = state & 1
                q = coder.number(step, k, mean, levels[index], near, size, trellis, odd)
                if trellis:
                    state = NEXT_STATE[state][q & 1]
                    q = 2 * q - odd * ((q > 0) - (q < 0))
                if abs(q) > 32767:
                    raise Damaged("features section: a symbol out of range")
                values.append(q)
                size[k] = abs(q)
            symbols[s, y + 1, x + 1, step.channels] = values
    coder.bits.finish()
    return symbols[:, 1:-1, 1:-1]


# docs/entropy-coder.md: Prior


def whole_quality(hundredths: int) -> int:
    """Round a quality to 1..100."""
    return clip((hundredths + 50) // 100, 1, 100)


def shifted(values: Array, shift: Array) -> Array:
    """Return round(v / 2^s) of integers."""
    return values + (1 << shift >> 1) >> shift


def product(a: Array, w: Array) -> Array:
    """Return a times the transpose of w; no sum of a layer reaches 2^53."""
    return (a.astype(float) @ w.astype(float).T).astype(int)


def predict(
    tensors: Tensors,
    number: int,
    step: Pass,
    detail: int,
    symbols: Array,
    quality: int,
    trellis: bool,
) -> tuple[list[list[int]], list[list[int]]]:
    """Return means and indices of each position of a pass, and of its channels.

    No position of a pass is a neighbour of another, so that one product serves all.
    `symbols` has a border of zeros.
    """
    t = part_of(tensors, f"decoder.prior.{number}.")
    name = "compand_half" if trellis else "compand"
    compand = tensors[f"decoder.prior.{name}"].astype(int)
    start, end, count = step.channels.start, step.channels.stop, len(step.channels)
    s, y, x = step.positions.T

    def at(offsets: tuple[tuple[int, int], ...], start: int, end: int) -> Array:
        """Return symbols (positions, neighbours, channels)."""
        places = [symbols[s, y + 1 + dy, x + 1 + dx, start:end] for dy, dx in offsets]
        return np.stack(places, axis=1)

    def clipped(values: Array) -> Array:
        """Return clipped numbers of symbols."""
        return np.clip(values + (values > 0) >> 1 if trellis else values, -127, 127)

    inputs = []
    direct = np.zeros((len(s), count), int)  # D
    if step.neighbours:
        same = at(step.neighbours, start, end)
        inputs.append(compand[np.abs(same)])
        if start < detail:
            inputs.append(clipped(same))
            direct = (inputs[-1] * t["direct"]).sum(axis=1)
    if start:
        close = min(start, detail)
        inputs.append(compand[np.abs(at(CENTRE + CROSS, 0, start))])
        inputs.append(compand[np.abs(at(DIAGONAL, 0, close))])
        inputs.append(clipped(at(CENTRE + CROSS, 0, close)))
    o = np.tile(t["out_bias"][quality - 1].astype(int), (len(s), 1))
    if inputs:
        v = np.concatenate([one.reshape(len(s), -1) for one in inputs], axis=1)
        h = product(v, t["first"]) + t["first_bias"][quality - 1]
        h = np.clip(shifted(h, t["first_shift"].astype(int) - 1), 0, 255)
        h = product(h, t["second"]) + t["second_bias"]
        h = np.clip(shifted(h, t["second_shift"].astype(int)), 0, 255)
        o += product(h, t["out"])
    # the first half of the outputs are means, the other half indices
    mean, index = np.split(t["out_shift"].astype(int), 2)
    means = shifted(o[:, :count] + (direct << mean - 2), mean + 1)
    indices = shifted(o[:, count:], index - 1) + 128
    return np.clip(means, -32767, 32767).tolist(), np.clip(indices, 0, 252).tolist()


# docs/entropy-coder.md: Binarisation, Contexts

BOUNDS = (1, 2, 3, 4, 6, 8, 12, 20, 36)
COUNTS = [sum(bound <= n for bound in BOUNDS) for n in range(64)]


class SymbolCoder:
    """The coder of features, with the contexts and mixers of a model file."""

    def __init__(self, section: bytes, tensors: Tensors, channels: int) -> None:
        part = part_of(tensors, "decoder.coder.")
        tables = {name: tensor.tolist() for name, tensor in part.items()}
        limit = tables["limit"]
        self.rate, self.single = tables["rate"], tables["single"]
        self.low_bits, self.mixers = tables["low_bits"], tables["weights"]
        pairs = zip(tables["probabilities"], tables["confidence"], strict=True)
        contexts = [[64 * p, min(count, limit)] for p, count in pairs]
        sizes = [128 * 5 * 2, 128 * 6 * 5, 128 * 12, 16 * 10 * 12, channels * 3 * 4]
        sizes += [*sizes, 2 * channels * 10 * 2, 128 * 5, 128, 17]
        ends = np.cumsum([0, *sizes]).tolist()
        families = [contexts[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        self.sets = families[:5], families[5:10]  # for even and for odd states
        self.zero_channel, self.sign, self.low, self.escape = families[10:]
        self.channels = channels
        self.bits = Bits(section, "features section", limit)

    def number(
        self,
        step: Pass,
        k: int,
        mean: int,
        level: int,
        near: list[Any],
        size: list[int],
        trellis: bool,
        odd: int,
    ) -> int:
        """Decode the number of a channel k.

        `near` are the magnitudes of all channels of the eight neighbours, `size` those
        of the position itself, both of symbols. `odd` is 1 in odd states.
        """
        left, right, up, down, *diagonal = [one[k] for one in near]
        n = 2 * (left + right + up + down) + sum(diagonal)
        n = COUNTS[min(n >> trellis, 63)]
        # magnitudes of the numbers of the two channels before
        one, two = [size[k - i] + trellis >> trellis for i in (1, 2)]
        e = 2 * min(one, 2) if k > step.channels.start else 0
        e += min(two, 1) if k > step.channels.start + 1 else 0
        if odd:
            mean += clip(mean, -4, 4)
        zero_level, zero_previous, unary_level, unary_near, unary_channel = self.sets[
            odd
        ]
        centre = mean + 4 >> 3
        f = mean - 8 * centre
        flip, f = f < 0, abs(f)
        z, t = int(centre != 0), int(bool(step.neighbours))

        bits = self.bits
        previous = zero_previous[(level * 6 + e) * 5 + min(n >> 1, 4)]
        if level < self.single:
            differs = bits.one(previous)
        else:
            zeros = [
                zero_level[(level * 5 + f) * 2 + z],
                self.zero_channel[((t * self.channels + k) * 10 + n) * 2 + z],
                previous,
            ]
            differs = bits.mixed(zeros, self.rate, self.mixers[level])
        if not differs:
            return centre
        negative = bits.one(self.sign[level * 5 + f])
        v = 0
        while v < 12:
            unary = [
                unary_level[level * 12 + v],
                unary_near[((level >> 3) * 10 + n) * 12 + v],
                unary_channel[(k * 3 + min(e + 1 >> 1, 2)) * 4 + min(v, 3)],
            ]
            mixer = self.mixers[128 + 16 * min(v, 3) + (level >> 3)]
            if not bits.mixed(unary, self.rate, mixer):
                break
            v += 1
        if v == 12:
            length = bits.escape(self.escape)
            v = 12 + (1 << length | bits.plain(length)) - 1
        p = self.low_bits[level]
        if p:
            v = 2 * v + bits.one(self.low[level])
            v = (v << p - 1) + bits.plain(p - 1)
        d = -(v + 1) if negative else v + 1
        return centre - d if flip else centre + d


# docs/integer-transforms.md: Values, Layer


def part_of(tensors: Tensors, name: str) -> Tensors:
    """Return the tensors whose names start with a name, without it."""
    return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}


def digits(v: Array) -> tuple[Array, Array]:
    """Split values of two digits into the high and the low one."""
    high = v + 64 >> 7
    return high, v - 128 * high


def read(h: Array) -> Array:
    """Return a stream as 1x1 layers read it."""
    return np.clip(h + 8 >> 4, -128, 127)


def layer(t: Tensors, name: str, a: Array, bounds: tuple[int, int], q: int) -> Array:
    """Apply a layer of 1x1; q is a whole quality."""
    w = t[f"{name}.weight"].astype(int)
    b = t[f"{name}.bias"].astype(int)
    b = b[q - 1] if b.ndim == 2 else b
    sums = product(a, w.reshape(len(w), -1)) + b
    return np.clip(sums >> t[f"{name}.shift"].astype(int), *bounds)


def blocks(t: Tensors, name: str, h: Array, q: int) -> Array:
    """Apply all residual blocks of a name."""
    rows, columns, _ = h.shape
    for n in range(sum(k.startswith(name) and k.endswith("up.weight") for k in t)):
        at = f"{name}.{n}"
        w = t[f"{at}.spatial.weight"].astype(int)
        padded = np.pad(h, ((1, 1), (1, 1), (0, 0)))
        sums = t[f"{at}.spatial.bias"] + sum(
            padded[y : y + rows, x : x + columns] * w[:, 0, y, x]
            for y, x in np.ndindex(3, 3)
        )
        a = np.clip(sums >> t[f"{at}.spatial.shift"].astype(int), -128, 127)
        up = layer(t, f"{at}.up", a, (0, 255), q)
        down = layer(t, f"{at}.down", up, (-32768, 32768), q)
        h = np.clip(h + down, -2047, 2047)
    return h


def modulate(t: Tensors, name: str, v: Array, q: int) -> Array:
    """Scale and shift channels."""
    m, b = (t[f"{name}.{part}"][q - 1].astype(int) for part in ("scale", "offset"))
    return np.clip(v * m + b >> 8, -2047, 2047)


def shuffle(v: Array, n: int) -> Array:
    """Turn channels into n x n pixels."""
    rows, columns, channels = v.shape
    v = v.reshape(rows, columns, channels // n**2, n, n).transpose(0, 3, 1, 4, 2)
    return v.reshape(rows * n, columns * n, -1)


# docs/integer-transforms.md: Dequantiser, Synthesis


def quantiser_steps(tensors: Tensors, hundredths: int, trellis: bool) -> Array:
    """Return the step of symbols of each channel at a quality."""
    t = tensors["decoder.gains.half" if trellis else "decoder.gains.step"].astype(int)
    i = clip(hundredths // 100, 1, 99)
    p = hundredths - 100 * i
    return (t[i - 1] * (100 - p) + t[i] * p + 50) // 100  # t[0] is of quality 1


def dequantise(
    tensors: Tensors, symbols: Array, hundredths: int, trellis: bool = False
) -> Array:
    """Turn symbols, channels last, into latents."""
    latents = symbols * quantiser_steps(tensors, hundredths, trellis) + 128 >> 8
    return np.clip(latents, -16319, 16319)


def synthesise(
    tensors: Tensors, symbols: Array, hundredths: int, trellis: bool = False
) -> Array:
    """Turn symbols (h, w, channels) of an image into 64ths (16h, 16w, 3)."""
    t, q = part_of(tensors, "decoder.synthesis."), whole_quality(hundredths)
    latents = dequantise(tensors, symbols, hundredths, trellis)
    w = t["linear.weight"].astype(int)
    (wh, wl), (ah, al) = digits(w.reshape(len(w), -1)), digits(latents)
    sums = 128 * product(ah, wh) + product(ah, wl) + product(al, wh)
    linear = sums + (t["linear.bias"].astype(int) >> 7)
    linear = np.clip(linear >> t["linear.shift"].astype(int) - 7, -16383, 16383)

    z = np.floor(latents * 2.0 ** (t["normaliser"].astype(int) + 1) + 0.5).astype(int)
    z = np.clip(z, -16319, 16319)
    wide = -4095, 4095
    h = modulate(t, "mod16", layer(t, "stem", z, wide, q), q)
    h = blocks(t, "blocks16", h, q)
    h = shuffle(layer(t, "expand", read(h), wide, q), 2)
    h = blocks(t, "blocks8", modulate(t, "mod8", h, q), q)
    rest = shuffle(layer(t, "out", read(h), (-16383, 16383), q), 8)
    pixels = np.clip(shuffle(linear, 16) + rest, -8192, 8128) + 8192
    return np.clip(pixels + filtered(t, pixels, q), 0, 16320)


def filtered(t: Tensors, pixels: Array, q: int) -> Array:
    """Return what the filter adds to an image (H, W, 3)."""
    grey = np.pad((pixels + 32 >> 6) - 128, ((2, 2), (2, 2), (0, 0)), "edge")
    sums = convolution(grey, t["filter_up.weight"]) + t["filter_up.bias"][q - 1]
    rows, columns, _ = sums.shape  # one more than the image has at each side
    places = np.moveaxis(t["filter_up.places"].astype(int), 0, -1)
    places = places[np.arange(-1, rows - 1) % 8][:, np.arange(-1, columns - 1) % 8]
    hidden = np.clip(sums + places >> t["filter_up.shift"].astype(int), 0, 255)
    sums = convolution(hidden, t["filter_down.weight"]) + t["filter_down.bias"]
    change = np.clip(sums >> t["filter_down.shift"].astype(int), -16383, 16383)
    return change * int(t["filter_down.scale"][q - 1]) + 128 >> 8


def convolution(a: Array, weight: Array) -> Array:
    """Return sums over 3x3 neighbours, (h, w, outputs), of (h + 2, w + 2, inputs)."""
    rows, columns = a.shape[0] - 2, a.shape[1] - 2
    w = weight.astype(int)
    parts = (
        product(a[y : y + rows, x : x + columns], w[:, :, y, x])
        for y, x in np.ndindex(3, 3)
    )
    return sum(parts, start=np.zeros(1, int))


# docs/integer-transforms.md: Semantic head


def score_cell(
    tensors: Tensors, classes: int, latents: Array, quality: int
) -> tuple[Array, Array]:
    """Return scores and embedding of a cell of at most 4x4 latents at a whole quality.

    The number of classes counts "unknown".
    """
    t, q = part_of(tensors, "head."), quality
    v = np.sign(latents) * t["compand"].astype(int)[np.abs(latents)]
    h = np.maximum(modulate(t, "mod", layer(t, "stem", v, (-4095, 4095), q), q), 0)
    h = blocks(t, "blocks", h, q)
    n = h.shape[0] * h.shape[1]
    mean, peak = (2 * h.sum((0, 1)) + n) // (2 * n), h.max((0, 1))
    hidden = layer(t, "hidden", read(np.concatenate([mean, peak])), (0, 255), q)
    logits = layer(t, "out", hidden, (-2047, 2047), q)
    embedding = np.clip(logits[classes:] + 8 >> 4, -127, 127)
    return t["score"][logits[:classes] + 2047], embedding


# docs/format.md: Images


def samples_of_features(
    symbols: Array, header: Header, model: Model, chunk: Chunk
) -> Array:
    """Return the samples that symbols of images stand for."""
    slices, rows, columns, bands = chunk.shape
    planes = []
    for image in symbols:
        pixels = synthesise(model[0], image, header.quality, header.trellis)
        pixels = pixels[:rows, :columns]
        if chunk.ranges is None:
            pixels = pixels + 32 >> 6  # grey levels
        if header.grouping == 0 and bands == 3:
            planes += [*np.moveaxis(pixels, -1, 0)]
        else:
            planes.append((2 * pixels.sum(axis=-1) + 3) // 6)
    values = np.array(planes).reshape(slices, bands, rows, columns)
    values = np.moveaxis(values, 1, -1)
    return values.astype("u1") if chunk.ranges is None else from_64ths(values, chunk)


# docs/model.md: The file

MODEL_DTYPES = {"I8": "i1", "U8": "u1", "I16": "i2", "U16": "u2", "I32": "i4"}
MODEL_DTYPES |= {"U32": "u4", "I64": "i8", "F16": "f2", "F32": "f4"}


def load_model(path: ModelPath | None, decoder: bytes) -> Model:
    """Return tensors and description of a model, whose identity is verified.

    Parameters
    ----------
    path : path or None
        A model file; None for one in the folder ``models`` beside this file.
    decoder : bytes
        The first bytes of its identity.

    Raises
    ------
    DecodeError
        If there is no such file, or if it is another model or damaged.
    """
    if path is None:
        name = f"models/*-{decoder[:4].hex()}.safetensors"
        paths = sorted(Path(__file__).parent.glob(name))
        if not paths:
            raise DecodeError(f"features need the model file of {decoder.hex()}...")
        path = paths[0]
    try:
        tensors, description = _read_safetensors(Path(path).read_bytes())
        identity = _identity(tensors, description)
        family = description.get("family")
    except (
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise DecodeError(f"{path}: not a model file, or damaged ({error})") from None
    except OSError as error:
        raise DecodeError(f"{path}: {error.strerror}") from None
    if identity[: len(decoder)] != decoder:
        pair = f"decoder {identity.hex()}, and the payload needs {decoder.hex()}..."
        raise DecodeError(f"{path}: another model: {pair}")
    if family != "deepsic":
        raise DecodeError(f"{path}: networks of family {family} are in floating point")
    return tensors, description


def _read_safetensors(data: bytes) -> Model:
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    about = json.loads(table.pop("__metadata__")["deepsic"])
    tensors = {}
    for name, entry in table.items():
        first, end = (start + offset for offset in entry["data_offsets"])
        dtype = np.dtype("<" + MODEL_DTYPES[entry["dtype"]])
        tensors[name] = np.frombuffer(data[first:end], dtype).reshape(entry["shape"])
    return tensors, about["architecture"]


def _identity(tensors: Tensors, description: dict[str, Any]) -> bytes:
    sizes = {
        name: value
        for name, value in description.items()
        if not name.startswith(("analysis", "head", "classes"))
    }
    text = json.dumps({"architecture": sizes}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode())
    for name in sorted(name for name in tensors if name.startswith("decoder.")):
        tensor = tensors[name]
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}|{tensor.dtype.str}|{shape}|".encode() + tensor.tobytes())
    return digest.digest()


# docs/format.md: NoData


@dataclass(frozen=True)
class NoData:
    """A value, and the samples that have it."""

    value: Any
    neighbour: Any  # None for NaN
    all: bool  # whether the layout says that all samples are under the mask
    mask: Array | None  # bool, of the chunk's shape

    def restore(self, samples: Array) -> Array:
        """Return samples with the value where the mask is, and nowhere else."""
        samples = samples.copy()
        if self.neighbour is not None:
            samples[samples == self.value] = self.neighbour
        if self.mask is not None:
            samples[self.mask] = self.value
        return samples


def read_nodata(section: bytes, chunk: Chunk, name: str) -> NoData:
    """Read a nodata section, or the padding of a structure section."""
    data, dtype = Reader(section, name), chunk.dtype
    value = np.frombuffer(data.take(dtype.itemsize), dtype)[0]
    layout = data.integer(1)
    if layout > 7:
        raise Unsupported(f"{name}: reserved layout {layout:#04x}")
    neighbour = _neighbour(value, layout & 4)
    if neighbour is None and value == value:
        raise Damaged(f"{name}: value {value} has no neighbour")
    coded, (slices, rows, columns, bands) = data.rest(), chunk.shape
    mask = None
    if layout & 2 == 0:
        if coded:
            raise Damaged(f"{name}: {len(coded)} bytes after a layout without a mask")
        if layout & 1:
            mask = np.ones(chunk.shape, bool)
    elif layout & 1 == 0:
        mask = decode_mask(coded, (slices, rows, columns), name)[..., None]
        mask = np.repeat(mask, bands, axis=-1)
    else:
        mask = decode_mask(coded, (slices * bands, rows, columns), name)
        mask = np.moveaxis(mask.reshape(slices, bands, rows, columns), 1, -1)
    return NoData(value, neighbour, layout & 3 == 1, mask)


def _neighbour(value: Any, down: int) -> Any:
    """Return the next value of the dtype, None if there is no finite one."""
    dtype = value.dtype
    if dtype.kind == "f":
        if np.isnan(value):
            return None
        towards = np.float32(-np.inf if down else np.inf)
        with np.errstate(over="ignore"):
            number = np.nextafter(value, towards)
        return number if np.isfinite(value) and np.isfinite(number) else None
    integer, info = int(value) + (-1 if down else 1), np.iinfo(dtype)
    return dtype.type(integer) if info.min <= integer <= info.max else None


# docs/residual.md: NoData mask


def decode_mask(data: bytes, shape: tuple[int, int, int], name: str) -> Array:
    """Decode a mask, bool (slices, rows, columns)."""
    bits = new_bits(data, name)
    contexts = new_contexts(2051)
    for index in range(2048):
        w, n, d, e = (index >> place & 1 for place in (0, 4, 5, 3))
        contexts[index][0] = 1 + 10 * (2 * w + 2 * n + d + e) << 16
    slices, height, width = shape
    mask = np.zeros(shape, bool)
    before = [[0] * (width + 4) for _ in range(height + 2)]  # bordered with zeros
    for s in range(slices):
        rows = before
        if not bits.one(contexts[2048], 1):
            value = 0
            constant = bits.one(contexts[2049], 1)
            if constant:
                value = bits.one(contexts[2050], 1)
            line = [0, 0] + [value] * width + [0, 0]
            rows = [[0] * (width + 4) for _ in range(2)]
            rows += [line.copy() for _ in range(height)]
            for y in range(0 if constant else height):
                upper, above, row = rows[y : y + 3]
                for x in range(width):
                    index = before[y + 2][x + 2]
                    for bit in (
                        *upper[x + 1 : x + 4],
                        *above[x : x + 5],
                        row[x],
                        row[x + 1],
                    ):
                        index = 2 * index + bit
                    row[x + 2] = bits.one(contexts[index], 1)
        mask[s] = np.array(rows, bool)[2:, 2:-2]
        before = rows
    bits.finish()
    return mask


# docs/format.md: Spectral transform


def read_spectral(section: bytes, bands: int) -> Array:
    """Return the matrix, a row for each component."""
    data = Reader(section, "spectral transform section")
    count = data.integer(1) + 1
    if count > bands:
        raise Damaged(f"{data.name}: {count} components of {bands} bands")
    matrix = np.frombuffer(data.take(2 * count * bands), "<i2").astype(int)
    data.finish()
    matrix = matrix.reshape(count, bands)
    if np.abs(matrix @ matrix.T - (np.eye(count, dtype=int) << 28)).max() > 1 << 20:
        raise Damaged(f"{data.name}: the rows are not orthonormal")
    return matrix


# docs/format.md: Quality map


def read_cells(section: bytes, shape: tuple[int, ...]) -> Array:
    """Return the values of cells (slices, rows, columns)."""
    data = Reader(section, "quality map section")
    layout = data.integer(1)
    if layout:
        raise Unsupported(f"quality map section: reserved layout {layout}")
    bits, flag, bit = new_bits(data.rest(), data.name), new_family(), new_family()
    cells = np.zeros((shape[0], -(-shape[1] // 16), -(-shape[2] // 16)), int)
    for s, y, x in np.ndindex(cells.shape):
        before = cells[s - 1, y, x] if s else cells[0, 0, 0]
        above = cells[s, y - 1, x] if y else before
        left = cells[s, y, x - 1] if x else above
        corner = cells[s, y - 1, x - 1] if y and x else left
        n = (left == above) + 2 * (above == corner)
        n = int(n + 4 * (left == corner) + 8 * (before == left))
        if bits.one(flag[n]):
            value = left
        elif above != left and bits.one(flag[16 + n]):
            value = above
        elif before not in (left, above) and bits.one(flag[32 + n]):
            value = before
        else:
            value = 1
            for _ in range(7):
                value = 2 * value + bits.one(bit[value])
            value -= 128
        cells[s, y, x] = value
    bits.finish()
    return cells


# docs/format.md: Residual


def read_residual(
    section: bytes, chunk: Chunk, mask: Array | None, levels: "Sequence[Levels]"
) -> Array:
    """Decode samples of a residual section."""
    data, dtype = Reader(section, "residual section"), chunk.dtype
    layout, step, unit = data.integer(1), 1, 1.0
    if layout > 2:
        raise Unsupported(f"residual section: reserved layout {layout}")
    if (layout == 0) != (dtype.kind != "f"):
        raise Damaged(f"residual section: layout {layout} of samples of {dtype}")
    if layout < 2:
        step = data.varint()
        if not 1 <= step <= 131071:
            raise Damaged(f"residual section: step {step}")
    if layout == 1:
        (unit,) = struct.unpack("<d", data.take(8))
        if not 0 < unit <= FLOAT_MAX:
            raise Damaged(f"residual section: unit {unit}")
    shape = chunk.shape
    if layout == 2:
        shape = (*shape[:3], 2 * shape[3])
        mask = None if mask is None else np.concatenate([mask, mask], axis=-1)
    integers = ResidualDecoder(data.rest(), shape, step, mask).decode()
    if layout == 1:
        return np.clip(integers * unit, -FLOAT_MAX, FLOAT_MAX).astype("<f4")
    if layout == 2:
        upper, lower = np.split(integers, 2, axis=-1)
        if (lower >> 16).any() or (upper + 32768 >> 16).any():
            raise Damaged("residual section: halves of more than 16 bits")
        order = (upper * 65536 + lower).astype("<i4")
        return np.where(order < 0, order ^ 0x7FFFFFFF, order).view("<f4")
    for band, one in enumerate(levels):
        integers[..., band] = one.samples(integers[..., band])
    info = np.iinfo(dtype)
    if (integers < info.min).any() or (integers > info.max).any():
        raise Damaged(f"residual section: integers that are not of {dtype}")
    return integers.astype(dtype)


FLOAT_MAX = float(np.finfo(np.float32).max)

# docs/residual.md: Residual

# (plane, dy, dx) of taps: 0 the band, 1 and 2 its references, 3 the mean
TAPS = [(0, 0, -1), (0, 0, -2), (0, 0, -3)]
TAPS += [(0, -1, dx) for dx in (-3, -2, -1, 1, 2, 3)]
TAPS += [(0, -2, dx) for dx in (-3, -2, -1, 0, 1, 2, 3)]
TAPS += [(0, -3, 0), (3, 0, 0)]
for _plane in (1, 2):
    TAPS += [(_plane, 0, 0), (_plane, 0, -1), (_plane, 0, 1), (_plane, 1, 0)]
    TAPS += [(_plane, -1, -1), (_plane, -1, 1), (_plane, 1, -1), (_plane, 1, 1)]
# start of the contexts zero and high by level, in 1/256
FIRST_START, LATER_START = table("""
2 3 3 3 3 4 4 4 5 5 6 7 10 13 20 29 40 56 74 91 109 128 146 159 170 181
62 79 97 115

20 20 20 20 20 20 20 19 19 19 18 18 18 17 16 17 18 19 21 25 33 44 57 71 85 100
48 62 78 96
""")
_SMALL = [(n**4).bit_length() for n in range(4096)]


def log_size(n: int) -> int:
    """Return L(n): about 4 log2 n, plus 1."""
    steps = 0
    while n >= 4096:
        n >>= 4
        steps += 16
    return _SMALL[n] + steps


class Plane:
    """A band of a slice and its errors, with borders of three samples."""

    def __init__(self, height: int, width: int, top: int) -> None:
        self.r, self.e1, self.size = (  # size is E
            [[0] * (width + 6) for _ in range(height + 4)] for _ in range(3)
        )
        self.top, self.width = top, width
        self.references: list[Plane] = []
        self.weights: list[int] = []
        self.f: list[int] = [0] * 12
        self.means = [0] * width  # M


class ResidualDecoder:
    """The integers of a residual section, and all that adapts to them."""

    def __init__(
        self, section: bytes, shape: tuple[int, ...], step: int, mask: Array | None
    ) -> None:
        data = Reader(section, "residual section")
        self.shape, self.step, self.name = shape, step, data.name
        self.covered = np.zeros(shape, bool) if mask is None else mask
        self.lows, self.tops = [], []
        for _ in range(shape[3]):
            low, top = data.varint(), data.varint()
            low = -(low + 1 >> 1) if low & 1 else low >> 1
            if top >> 24 or low + top >= 1 << 31:
                raise Damaged(
                    f"{self.name}: a range of samples from {low} to {low + top}"
                )
            self.lows.append(low)
            self.tops.append(top)
        self.bits = new_bits(data.take(data.varint()), data.name)
        plain = data.rest()
        self.plain, self.plain_left = int.from_bytes(plain, "little"), 8 * len(plain)

        # Binarisation
        self.zero, self.high = new_contexts(100 * 9 * 2), new_contexts(100 * 20)
        for level in range(100):
            at = level if level < 30 else 26 + (level - 26) % 4
            for j in range(9):
                self.zero[(level * 9 + j) * 2][:] = FIRST_START[at] << 14, 6
                self.zero[(level * 9 + j) * 2 + 1][:] = LATER_START[at] << 14, 6
            for v in range(20):
                self.high[level * 20 + v][:] = LATER_START[at] << 14, 6
        self.near, self.far, self.value, self.low = (new_family() for _ in range(4))
        self.sign, self.sign_by_value, self.sign_by_signs = (
            new_family() for _ in range(3)
        )
        self.new, self.not_zero, self.length, self.escape = (
            new_contexts(count) for count in (1, 2, 12, 26)
        )
        self.mixers = [[30000, 18000, 18000] for _ in range(100 * 21)]
        # Weights and Prediction
        self.weights = [768, 0, 0, 0, 0, -512, 256]
        self.mean_errors = [[0, 6] for _ in range(64 * 25)]

    def decode(self) -> Array:
        """Return the integers, those under the mask as the smallest of their band."""
        slices, height, width, bands = self.shape
        planes: dict[tuple[int, int], Plane] = {}
        result = np.zeros(self.shape, int)
        for s in range(slices):
            for c in range(bands):
                planes[s, c] = plane = Plane(height, width, self.tops[c])
                if s:
                    plane.f = planes[s - 1, c].f  # adapts on
                elif c >= 2 and plane.top:
                    plane.f = planes[s, c - 1].f.copy()
                if plane.top:
                    places = self.references(s, c)
                    plane.references = [planes[place] for place in places]
                    self.decode_weights(plane)
                    self.decode_band(plane, self.covered[s, ..., c].tolist())
                    result[s, ..., c] = np.array(plane.r)[3:-1, 3:-3]
        self.bits.finish()
        if self.plain_left > 7 or self.plain:
            raise Damaged(f"{self.name}: plain bits left over")
        result[self.covered] = 0
        return result + np.array(self.lows)

    def take_plain(self, count: int) -> int:
        """Return plain bits, the lowest first."""
        if count > self.plain_left:
            raise Damaged(f"{self.name}: the plain bits end early")
        value = self.plain & (1 << count) - 1
        self.plain >>= count
        self.plain_left -= count
        return value

    # docs/residual.md: References, Weights

    def references(self, s: int, c: int) -> list[tuple[int, int]]:
        """Return slices and bands of the references of a band."""
        mode = self.take_plain(2)
        if mode == 3 or (mode == 1 and c == 0) or (mode == 2 and s == 0):
            raise Damaged(f"{self.name}: references that are not decoded yet")
        if mode == 1:
            return [(s, band) for band in (c - 1, c - 2) if band >= 0]
        if mode == 2:
            return [(s, c - 1), (s - 1, c)] if c else [(s - 1, 0)]
        return []

    def decode_weights(self, plane: Plane) -> None:
        """Decode the weights of a band, or take those of the band before."""
        used = (18, 26, 34)[len(plane.references)]
        weights = self.weights[:used] + [0] * (used - len(self.weights))
        last, new = 1, self.bits.one(self.new[0])
        for tap in range(used if new else 0):
            last = self.bits.one(self.not_zero[last])
            weights[tap] = 0
            if last:
                length = self.bits.escape(self.length)
                value = self.take_plain(length + 1)
                size = (1 << length) + (value >> 1)
                weights[tap] = -size if value & 1 else size
        self.weights = plane.weights = weights

    # docs/residual.md: Surroundings

    def decode_band(self, plane: Plane, mask: list[list[bool]]) -> None:
        """Decode the samples of a band that are not under the mask."""
        rows, width, first = plane.r, plane.width, True
        for y, covered in enumerate(mask, start=3):
            row, above = rows[y], rows[y - 1]
            row[:3] = [above[3]] * 3
            row[3:-3] = above[3:-3]
            last = 0  # sample that was coded in this row
            for x in range(3, width + 3):
                if not covered[x - 3]:
                    row[x] = last = self.sample(
                        plane, y, x, 16 * last if first else None
                    )
            if not all(covered):
                start = covered.index(False) + 3
                row[3:start] = [row[start]] * (start - 3)
                for x in range(start + 1, width + 3):
                    if covered[x - 3]:
                        row[x] = row[x - 1]
            row[-3:] = [row[-4]] * 3
            if first and all(covered):
                continue
            if first:
                row[:3] = [row[3]] * 3
                rows[:y] = [row.copy() for _ in range(y)]
            wide = np.pad(row[3:-3], 8, mode="edge")
            boxes = 16 * np.lib.stride_tricks.sliding_window_view(wide, 17).sum(1) // 17
            for x, box in enumerate(boxes.tolist()):
                plane.means[x] += box if first else box - plane.means[x] >> 3
            first = False
        rows[-1] = rows[-2].copy()

    # docs/residual.md: Prediction, Local size

    def sample(self, plane: Plane, y: int, x: int, b: int | None) -> int:
        """Decode a sample; its prediction b is that of a first row, else None."""
        r, f, limit, references = plane.r, plane.f, 16 * plane.top, plane.references
        if b is None:
            planes, north = [plane, *references], r[y - 1][x]
            total = 0
            for (source, dy, dx), weight in zip(TAPS, plane.weights, strict=False):
                if weight and source < 3:
                    rows = planes[source].r
                    total += weight * (rows[y + dy][x + dx] - rows[y - 1][x])
                elif weight:
                    total += weight * ((plane.means[x - 3] >> 4) - north)
            b = clip(16 * north + (total >> 6), 0, limit)

        row, above, above2 = plane.e1[y], plane.e1[y - 1], plane.e1[y - 2]
        u = [row[x - 1], above[x], above[x - 1], above[x + 1], row[x - 2], above2[x]]
        u.append(above[x - 2])
        before = 0
        if references:
            e1 = references[0].e1
            u += [e1[y - 1][x], e1[y][x], e1[y][x - 1], e1[y][x + 1], e1[y + 1][x]]
            size = references[0].size
            cross = size[y][x - 1] + size[y][x + 1] + size[y - 1][x] + size[y + 1][x]
            before = 5 * (2 * size[y][x] + cross) >> 5
        else:
            u += [0] * 5
        a = clip(b + (sum(map(mul, f, u)) >> 16), 0, limit)

        row, above, above2 = plane.size[y], plane.size[y - 1], plane.size[y - 2]
        west, from_north = (
            row[x - 1],
            2 * above[x] + above[x - 1] + above[x + 1] + above2[x],
        )
        expected = (2 if references else 3) * (from_north + 2 * west + row[x - 2])
        expected = expected + 6 * before >> 3
        level = min(log_size(expected * (65536 // self.step) >> 16), 99)
        near = min(log_size(from_north + 2 * before) >> 1, 31)
        k = max(0, level - 22 >> 2)

        row, above, above2 = r[y], r[y - 1], r[y - 2]
        values = [row[x - 1], above[x], above[x + 1], above[x - 1]]
        values += [2 * row[x - 1] - row[x - 2], 2 * above[x] - above2[x]]
        signs = sum((16 * value > a) << i for i, value in enumerate(values))
        mean_error = self.mean_errors[signs * 25 + (level >> 2)]
        m = clip(a + (mean_error[0] >> 8), 0, limit)

        d = self.difference(m, level, near, k, log_size(west) >> 2, signs)
        sample = clip((m + 8 >> 4) + self.step * d, 0, plane.top)

        e = 16 * sample - a
        plane.e1[y][x], plane.size[y][x] = 16 * sample - b, abs(16 * sample - m)
        mean_error[0] += ((e << 8) - mean_error[0]) * RATES[mean_error[1]] >> 16
        mean_error[1] = min(mean_error[1] + 1, 255)
        gain = (e << 15) // (4096 + sum(map(mul, u, u)))
        for i, value in enumerate(u):
            f[i] = clip(f[i] + (gain * value + 32 >> 6), -(1 << 20), 1 << 20)
        return sample

    # docs/residual.md: Binarisation

    def difference(
        self, m: int, level: int, near: int, k: int, west: int, signs: int
    ) -> int:
        """Decode the number of steps from the prediction m to the sample."""
        bits, west = self.bits, min(west, 15)
        c = m + 8 >> 4
        j = m - 16 * c
        flip, j = int(j < 0), abs(j)

        def value_of(p: int) -> int:
            return 79 if p < 0 else min(log_size(p), 78)

        def decode_sign() -> int:
            by_value = (min(level >> 1, 31) * 80 + value_of(c)) * 2 + flip
            contexts = [self.sign[level * 9 + j], self.sign_by_value[by_value]]
            contexts.append(self.sign_by_signs[signs * 2 + flip])
            return bits.mixed(contexts, 16, self.mixers[level * 21 + 20])

        negative, side = 0, 2
        if k > 0:
            negative = decode_sign()
            side = negative ^ flip
        v = 0
        while v < 20:
            distance = v * self.step << k
            value = value_of(c - distance if side == 1 else c + distance)
            if v < 2:
                contexts = [self.zero[(level * 9 + j) * 2 + v]]
                contexts.append(self.near[(near * 16 + west) * 2 + v])
            else:
                contexts = [self.high[level * 20 + v], self.far[near * 20 + v]]
            contexts.append(self.value[(value * 3 + side) * 16 + min(k, 15)])
            if not bits.mixed(contexts, 16, self.mixers[level * 21 + v]):
                break
            if v == 0 and k == 0:
                negative = decode_sign()
                side = negative ^ flip
            v += 1
        if v == 20:
            length = bits.escape(self.escape)
            v = 19 + (1 << length) + self.take_plain(length)
        if k > 0:
            v = 2 * v + bits.one(self.low[level * 2 + min(v, 1)])
            v = (v << k - 1) + self.take_plain(k - 1)
            v += negative  # a is -d - 1
        return -v if negative ^ flip else v


# docs/wavelet.md: Section


def read_wavelet(
    section: bytes, chunk: Chunk, matrix: Array | None, cells: Array | None
) -> Array:
    """Decode samples of a wavelet section."""
    data, (slices, rows, columns, bands) = (
        Reader(section, "wavelet section"),
        chunk.shape,
    )
    layout = data.integer(1)
    if layout > 1:
        raise Unsupported(f"wavelet section: reserved layout {layout}")
    code, (parts, count) = data.integer(2), divmod(data.integer(1), 8)
    if code > 8191 or count > 4 or (parts > 0) != (count > 0):
        raise Damaged(f"wavelet section: step {code}, counts {parts}, {count}")
    lengths = [data.integer(4) for _ in range(count)]
    if count:  # checksums of starts; that of the whole section is verified
        data.take(4 * (count + 4 * parts - 1))
    stream = data.rest()
    if lengths != sorted(lengths):
        raise Damaged("wavelet section: lengths of checkpoints fall")

    components = bands if matrix is None else len(matrix)
    decoder = WaveletDecoder(stream, code, slices * components, components, cells)
    planes = decoder.decode(rows, columns)
    if layout:
        planes = np.stack([corrected(plane, code) for plane in planes])
    planes = planes.reshape(slices, components, rows, columns)
    return samples_of_bands(bands_of_components(planes, matrix), chunk)


# docs/wavelet.md: Bands, Steps

LOW, HORIZONTAL, VERTICAL, DIAGONAL_BAND = range(4)
LOW_NORMS = (4096, 8053, 16887, 34479, 69381, 138990, 278107)
EDGE_NORMS = (0, 5096, 10062, 21081, 43007, 86516, 173302)
DIAGONAL_NORMS = (0, 3225, 5995, 12889, 26659, 53853, 107993)
NORMS = (LOW_NORMS, EDGE_NORMS, EDGE_NORMS, DIAGONAL_NORMS)  # by kind


def low_sizes(rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the sizes of a plane and of its low bands, by level."""
    sizes = [(rows, columns)]
    while min(sizes[-1]) >= 12 and len(sizes) <= 6:
        h, w = sizes[-1]
        sizes.append(((h + 1) // 2, (w + 1) // 2))
    return sizes


def band_step(code: int, level: int, kind: int) -> int:
    """Return the step of a band in 2^-16 of a coefficient's unit."""
    m = half_up(2 ** (15 + code % 256 / 256))
    return (m << code // 256 + 9) // NORMS[kind][level]


# docs/wavelet.md: Quality map


def values_of_band(cells: Array, level: int, kind: int, size: tuple[int, int]) -> Array:
    """Return the values of coefficients of a band, from the cells of a slice."""
    reached = []  # by the coefficients of a row or column
    for count, end, high in zip(size, cells.shape, divmod(kind, 2), strict=True):
        places = 2**level * np.arange(count) + high * 2 ** (level - 1)
        first = ((places - 2**level) // 16).clip(0, end - 1)
        last = ((places + 2**level - 1) // 16).clip(0, end - 1)
        reached.append([slice(a, b + 1) for a, b in zip(first, last, strict=True)])
    cares = np.where(cells == 0, 128, cells)
    least = [
        [cares[rows, columns].min() for columns in reached[1]] for rows in reached[0]
    ]
    return np.array(least, int).reshape(size) % 128


# docs/wavelet.md: Neighbours

LARGER = [half_up(2 ** (15 + i / 8)) for i in range(8)]  # m
SMALLER = [half_up(2 ** (15 - i / 8)) for i in range(8)]  # w


def common_scale(h: int, v: int) -> int:
    """Return a size of a coefficient of value v in the scale of all; v = 0 has none."""
    octaves, i = divmod(v - 1, 8)
    return min((h * LARGER[i] << octaves) + 1024 >> 11, (1 << 31) - 1) if v else h


def rescaled(n: int, v: int) -> int:
    """Return a number of the scale of all in that of value v."""
    octaves, i = divmod(v - 1, 8)
    return n * SMALLER[i] + (1 << 18 + octaves) >> 19 + octaves if v else n


# docs/wavelet.md: Symbols, Binarisation, Coefficients

TRELLIS = ((0, 1), (3, 2), (5, 4), (6, 7), (1, 0), (2, 3), (4, 5), (7, 6))
# of A(0,-1), A(-1,0), A(-1,-1), A(-1,1), A(0,-2), A(-2,0) and A(-1,2); of the coarser
# band at the place, below it and on its right; of band 1 at the place and below it; of
# band 2 at the place and on its right; of the plane before; by kind
WEIGHTS = (
    (20, 20, 8, 8, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (15, 15, 4, 7, 4, 5, 3, 2, 2, 0, 0, 0, 0, 0, 2),
    (16, 11, 4, 6, 5, 2, 3, 2, 0, 2, 4, 4, 0, 0, 2),
    (10, 10, 5, 6, 3, 2, 2, 1, 0, 0, 3, 3, 3, 3, 1),
)
OFFSETS = table("""
 35  35  34  32  30  27  25  22  18  14  11   8   5   3   0
 -1  -3  -8  -9 -10  -9 -13 -14 -13 -13 -17 -16 -14 -13 -15

-19 -19 -19 -19 -19 -20 -20 -21 -22 -24 -26 -27 -29 -33 -35
-35 -35 -44 -45 -44 -44 -51 -50 -50 -47 -54 -55 -52 -54 -57

 34  33  32  31  30  27  25  22  18  13   8   5   3   7   6
  3   0  -2  -5  -7  -9 -10 -11 -11 -11 -13 -14 -15 -11 -14

 32  28  30  28  27  24  23  22  18  14  11   8   6  12  11
  8   5   2  -1  -3  -4  -6  -7  -8  -9 -10 -10 -11 -12 -12
""")


def bits32(value: Any) -> Any:
    """Reduce an integer, or an array of them, to 32 bits."""
    return (value + (1 << 31) & (1 << 32) - 1) - (1 << 31)


def initial_contexts() -> tuple[list[Context], list[list[int]]]:
    """Return all contexts and mixers at the start of a stream."""
    folder = Path(__file__).parent
    name = "wavelet-contexts.txt"
    places = [
        place for place in (folder / name, folder / "data" / name) if place.exists()
    ]
    if not places:
        raise DecodeError(f"wavelets need the file {name} beside this one")
    text = places[0].read_text().replace("\n", "")
    data = zlib.decompress(base64.b85decode(text))
    count = (len(data) - 920 * 5 * 2) // 2
    logits, counts = np.frombuffer(data, np.int8, 2 * count).reshape(2, count).tolist()
    contexts = [
        [SQUASH[32 * a + 3071] << 6, n] for a, n in zip(logits, counts, strict=True)
    ]
    weights = np.frombuffer(data, "<i2", offset=2 * count).astype(int) * 64
    return contexts, weights.reshape(-1, 5).tolist()


class Band:
    """Symbols of a band of a plane, and the bands that its contexts come from."""

    def __init__(
        self, level: int, kind: int, size: tuple[int, int], before: "Band | None"
    ) -> None:
        self.level, self.kind, self.before = level, kind, before
        self.coarser: Band | None = None
        self.details: list[Band] = []  # of other kinds
        self.h = [
            [0] * (size[1] + 4) for _ in range(size[0] + 4)
        ]  # bordered with zeros
        self.a = [row.copy() for row in self.h]  # |h|, in the scale of all
        self.values = np.zeros(size, int)  # of the quality map; 0 without
        self.filled = 0
        self.means: list[list[int]] = []  # with a border of one

    def finish(self) -> None:
        """Compute the means around all places."""
        a = np.array(self.a)
        sides = a[1:-1, :-2] + a[1:-1, 2:] + a[:-2, 1:-1] + a[2:, 1:-1]
        self.means = (8 * a[1:-1, 1:-1] + 2 * sides).tolist()
        self.filled = int(a.any())


class WaveletDecoder:
    """The planes of a wavelet section, and all that adapts to their symbols."""

    def __init__(
        self,
        stream: bytes,
        code: int,
        planes: int,
        components: int,
        cells: Array | None = None,
    ) -> None:
        self.bits = new_bits(stream, "wavelet section")
        self.bits.limit = 127
        self.bits.stretch = [STRETCH[i & ~3 | 2] for i in range(16384)]
        self.code, self.components, self.cells = code, components, cells
        self.planes: list[dict[tuple[int, int], Band]] = [{} for _ in range(planes)]
        contexts, self.mixers = initial_contexts()
        sizes = [
            96 * 14,
            3**7,
            108 * 14,
            28 * 48 * 3,
            96 * 32 * 3,
        ]
        sizes += [*sizes, 4 * 27, 96 * 4, 27, 28 * 2, 4 * 2]
        ends = np.cumsum([0, *sizes]).tolist()
        families = [contexts[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        self.sets = families[:5], families[5:10]  # one for each z
        self.sign, self.low, self.escape, self.quiet, self.filled = families[10:]

    def decode(self, rows: int, columns: int) -> Array:
        """Return the planes (planes, rows, columns), with four binary places."""
        sizes = low_sizes(rows, columns)
        deepest = len(sizes) - 1
        low = self.decode_bands(deepest, LOW, sizes[-1])
        for level in range(deepest, 0, -1):
            (h, w), (h2, w2) = sizes[level - 1], sizes[level]
            parts = [low, self.decode_bands(level, HORIZONTAL, (h2, w - w2))]
            parts.append(self.decode_bands(level, VERTICAL, (h - h2, w2)))
            parts.append(self.decode_bands(level, DIAGONAL_BAND, (h - h2, w - w2)))
            low = inverse(parts, h, w)
        self.bits.finish()
        return low

    def decode_bands(self, level: int, kind: int, size: tuple[int, int]) -> Array:
        """Return the coefficients of a band of all planes."""
        out = np.zeros((len(self.planes), *size), int)
        before = None
        for number, plane in enumerate(self.planes):
            if number % self.components == 0:
                before = None
            band = plane[level, kind] = Band(level, kind, size, before)
            if kind != LOW:
                band.coarser = plane.get((level + 1, kind))
            if kind != LOW and self.cells is not None:
                cells = self.cells[number // self.components]
                band.values = values_of_band(cells, level, kind, size)
            band.details = [plane[level, one] for one in range(HORIZONTAL, kind)]
            if self.bits.one(self.filled[2 * kind + (before.filled if before else 0)]):
                self.decode_band(band, out[number])
            band.finish()
            before = band
        return out

    def decode_band(self, band: Band, out: Array) -> None:
        """Decode the symbols of a band that is filled, and write its coefficients."""
        state, values = 0, np.zeros(out.shape, int)
        mapped = self.cells is not None and band.kind != LOW
        codes = [min(self.code + 32 * max(v - 1, 0), 8191) for v in range(128)]
        steps = [band_step(code, band.level, band.kind) for code in codes]
        for (y, x), v in np.ndenumerate(band.values):
            if mapped and v == 0:
                continue
            z, step = state % 2, steps[v]
            q, rank = self.symbol(band, z, y, x)
            h = 2 * q - (z if q > 0 else -z) if q else 0
            band.h[y + 2][x + 2], band.a[y + 2][x + 2] = h, common_scale(abs(h), int(v))
            if band.kind == LOW:
                values[y, x] = value = bits32(q + median(values, y, x))
                out[y, x] = bits32(value * step + (1 << 15) >> 16)
                continue
            state = TRELLIS[state][q % 2]
            if q:
                row = OFFSETS[z if abs(q) == 1 else min(abs(q), 3)]
                o = row[clip(rank, 16, 45) - 16]
                size = (128 * abs(h) - o) * step + (1 << 23) >> 24
                out[y, x] = bits32(size if q > 0 else -size)

    # docs/wavelet.md: Neighbours

    def expected(self, band: Band, y: int, x: int) -> int:
        """Return the size that is expected of a symbol, in the scale of all."""
        row, above, above2 = band.a[y + 2], band.a[y + 1], band.a[y]
        sizes = [row[x + 1], above[x + 2], above[x + 1], above[x + 3]]
        sizes += [row[x], above2[x + 2], above[x + 4]]
        coarser, y2, x2 = band.coarser, y >> 1, x >> 1
        first, second = [*band.details, None, None][:2]
        places = [(coarser, y2, x2), (coarser, y2 + 1, x2), (coarser, y2, x2 + 1)]
        places += [(first, y, x), (first, y + 1, x), (second, y, x), (second, y, x + 1)]
        for one, i, k in (*places, (band.before, y, x)):
            sizes.append(one.a[i + 2][k + 2] if one else 0)
        return sum(map(mul, WEIGHTS[band.kind], sizes))

    def symbol(self, band: Band, z: int, y: int, x: int) -> tuple[int, int]:
        """Return a symbol, and the rank of the size that was expected of it."""
        kind, before, number = band.kind, band.before, 4 * band.level + band.kind
        value = int(band.values[y, x])
        row, above, above2 = band.a[y + 2], band.a[y + 1], band.a[y]
        a_w, a_n, a_nw, a_ne = row[x + 1], above[x + 2], above[x + 1], above[x + 3]
        near = 5 * (a_w + a_n) + 2 * (a_nw + a_ne) + row[x] + above2[x + 2]
        total, shares = 2 * near, 2
        coarse = other = earlier = 0
        if band.coarser is not None:
            coarse = band.coarser.means[(y >> 1) + 1][(x >> 1) + 1]
            total, shares = total + coarse, shares + 2
        if band.details:
            sizes = [one.means[y + 1][x + 1] for one in band.details]
            other = sum(sizes) // len(sizes)
            total, shares = total + sum(sizes), shares + len(sizes)
        if before is not None:
            earlier = before.means[y + 1][x + 1]
            total, shares = total + earlier, shares + 1
        size = rescaled(self.expected(band, y, x), value)
        mean_rank = min(log_size(2 * (rescaled(total, value) // shares)), 95)
        rank = min(log_size(size >> 1), 95)
        bits = self.bits
        quiet = total == 0 and kind != LOW
        if quiet and not bits.one(self.quiet[2 * number + z]):
            return 0, rank

        coarse, other, earlier, a_w, a_n, a_nw, a_ne = (
            rescaled(v, value) for v in (coarse, other, earlier, a_w, a_n, a_nw, a_ne)
        )
        u = max(0, size.bit_length() - 8)

        def digit(v: int, largest: int) -> int:
            return min(v + 1 >> u + 1, largest)

        def digit_of_mean(v: int) -> int:
            return min((v >> u + 1) + 7 >> 4, 2)

        shape = 0
        for v in (a_w, a_n, a_nw, a_ne):
            shape = 3 * shape + digit(v, 2)
        for v in (coarse, other, earlier):
            shape = 3 * shape + digit_of_mean(v)
        nearest = (6 * digit(a_w, 5) + digit(a_n, 5)) * 3 + digit_of_mean(coarse)
        b = min(log_size(earlier), 95) // 3
        i = int(quiet)  # the first one of the unary part
        while i < 14:
            j = min(i, 2)
            indices = [
                14 * rank + i,
                shape,
                14 * nearest + i,
                (48 * number + (mean_rank >> 1)) * 3 + j,
                (32 * rank + b) * 3 + j,
            ]
            pairs = list(zip(self.sets[z], indices, strict=True))
            del pairs[1 if i else 2]
            contexts = [family[index] for family, index in pairs]
            first = self.mixers[108 * (4 * z + min(i, 3)) + nearest]
            second = self.mixers[864 + 2 * number + min(i, 1)]
            if not bits.mixed(contexts, 3, first, second):
                break
            i += 1
        v = i
        if i == 14:
            length = bits.escape(self.escape)
            v = 13 + (1 << length | bits.plain(length))
        a = v
        for place in range(u):
            if place == 0:
                bit = bits.one(self.low[4 * rank + (3 if v == 0 else 0)])
            elif place == 1:
                bit = bits.one(self.low[4 * rank + 1 + a % 2])
            else:
                bit = bits.bit(EVEN)
            a = 2 * a + bit
        if a >= 1 << 26:
            raise Damaged("wavelet section: a symbol out of range")
        if a:
            around = [band.h[y + 2][x + 1], band.h[y + 1][x + 2]]
            around.append(0 if before is None else before.h[y + 2][x + 2])
            signs = 0
            for h in around:
                signs = 3 * signs + (h > 0) - (h < 0) + 1
            if bits.one(self.sign[27 * kind + signs]):
                a = -a
        return a, rank


def median(values: Array, y: int, x: int) -> int:
    """Return the prediction of a quantised value of a low band."""
    if y == 0:
        return int(values[0, x - 1]) if x else 0
    if x == 0:
        return int(values[y - 1, 0])
    left, upper = int(values[y, x - 1]), int(values[y - 1, x])
    return sorted((left, upper, left + upper - int(values[y - 1, x - 1])))[1]


# docs/wavelet.md: Inverse transform


def inverse(parts: list[Array], rows: int, columns: int) -> Array:
    """Join four bands (planes, rows, columns) to the low band of the next level."""
    low, horizontal, vertical, diagonal = parts
    joined = np.zeros((len(low), rows, columns), int)
    joined[:, ::2, ::2], joined[:, ::2, 1::2] = low, horizontal
    joined[:, 1::2, ::2], joined[:, 1::2, 1::2] = vertical, diagonal
    return lift(lift(joined).swapaxes(1, 2)).swapaxes(1, 2)


def lift(z: Array) -> Array:
    """Transform along the last axis."""
    z = z.copy()
    z[..., ::2] = bits32(20638896 * z[..., ::2] + (1 << 23) >> 24)
    steps = ((0, 7440810), (1, 14812789), (0, -888859), (1, -26610918))
    for start, factor in steps:
        mirrored = np.pad(z, ((0, 0), (0, 0), (1, 1)), mode="reflect")
        sums = (mirrored[..., :-2] + mirrored[..., 2:])[..., start::2]
        z[..., start::2] = bits32(z[..., start::2] - (factor * sums + (1 << 23) >> 24))
    return z


# docs/wavelet.md: Filter


def corrected(plane: Array, code: int) -> Array:
    """Correct the numbers of a plane by those around them."""
    octave, part = divmod(code, 256)
    centre = (int(plane.min()) + int(plane.max())) >> 1
    shift, inverse_step = 6 + octave, half_up(2 ** (15 - part / 256))
    in_steps = (plane - centre) * inverse_step + (1 << shift - 1) >> shift
    first, *middle, last = filter_layers()
    # two rows and columns more at each side, copies of the outer ones, to whole squares
    edges = [(2, 2 + size % 2) for size in plane.shape]
    x = np.pad(np.clip(in_steps, -(1 << 15), (1 << 15) - 1), edges, "edge")
    squares = np.stack([x[y::2, x0::2] for y in range(2) for x0 in range(2)])
    values = np.clip(around(squares, *first), 0, 255)
    for weight, bias, shifts in middle:
        sums = np.einsum("oc,cyx->oyx", weight[:, :, 0], values) + bias[:, None, None]
        values = np.clip(sums >> shifts[:, None, None], 0, 255)
    outer = np.pad(values, ((0, 0), (1, 1), (1, 1)), "edge")
    largest = (1 << 15) - 1
    changes = np.clip(around(outer, *last), -largest, largest)
    step = half_up(2 ** (15 + part / 256)) << octave
    result = np.pad(plane, [(0, size % 2) for size in plane.shape])
    for number, change in enumerate(changes * step + (1 << 26) >> 27):
        result[number // 2 :: 2, number % 2 :: 2] += change
    return bits32(result[: plane.shape[0], : plane.shape[1]])


def around(values: Array, weight: Array, bias: Array, shifts: Array) -> Array:
    """Return a layer's results, which see the 3 x 3 squares around each."""
    rows, columns = (size - 2 for size in values.shape[1:])
    sums = np.zeros((len(weight), rows, columns), int) + bias[:, None, None]
    for tap in range(9):
        y, x = divmod(tap, 3)
        part = values[:, y : y + rows, x : x + columns]
        sums += np.einsum("oc,cyx->oyx", weight[:, :, tap], part)
    return sums >> shifts[:, None, None]


# docs/wavelet.md: the weights, in base 85
FILTER = (
    "{`U6;3nKy)5&8B1<23*T2?z-WC-MTU000aX^8x+8^#KO{0{;L4-1Pqs`~Uv~6eRuu_yGJs$p!Q80099E"
    "{Qvt2{Q&*|*d;AG3LGBszdGsf-5ab14eB?_01FU26zk^O1@!|P+1>CT{sRO6BKHFR00R00|1JOo`Tqm?"
    "_5B_N{{8_MnEv$-{Q&*|tN_XV0u2oG&h6kPBm(*^?HD8)6YswA)gK-eWwI9L;v!D)|NH^|M4<lp3jhNE"
    "0S)a3<OBfq00hAO|NjI69{vYc0003000aF2LHqs?`2Yg|0rUI`3IG1$1_H_m0R9630|NK}1ONR10`mqS"
    "7yShV_yqa`qa*426aNtt=Mnh@1^@NqE&%HP{`L+700RF28v_6S0sja9{7C=*1ONc>{{rs+00IF7(*Xk7"
    "{{jF2{{I5{Hv9wR1p)y7H_rm<4*vr9{`@WY0RjI80|B5a{Q~{}5D)(q7X1ql_~HTo*!~6X`4ZmX0{iy|"
    "^X>&e{{smG@D>O50Rsd5_XPg`1pfs66t@Kd{{R2KKm$bk0R9055c=T-{{aC0GHX`^Ar`$)93|6I8t5q%"
    "FVO^-x*_}u)1|w$6xU1x51;qk0RjR9uH6C41OWj6<Szm4^#B0`{QX=40R;m82m&Vz0RjR40008}xAg%6"
    "{r~{~FfafB0RRCI0{;2{0RI5;_y7L`0RRC20sry;KNkJL;_wmp0T%%LuLAh`IROCL1L^=D1_KE<00;R3"
    "0RH~?&kq4(`v4C7^0EaFKLP{s2mm>{0}}uL-~s;X{Q(C3@&XkA2pS&+_9yrVDeel~1oj*p{Lc6Z1PTSJ"
    "*5@qv2l)8}009334g&x92mSy7W2XNF`2hd$3Ih4}0003C2LBb=000310|ojA10(qv?E4G>_R{+d-vayT"
    "3kd|={{93a(F4|d{Ra2}{s8{~^A`dO`vL&~@z?_N3I7281pnU+|NjB}_5W_$0s;R3E6VLB{@xfEBm7Ij"
    "<rx#Z2NWVT9n;<SLntV}{_PI^67TAZ|Nj2~NdW%={sIL5)y)V01pWXj^8ri=0R8~u0|D~A1^@s7`0W7("
    "zXJsn`0wxiBGnA|VFCnx{rHDI{ty365CYbY`2+;~<m&9o=nc^ECKV46JnjKV;p-(53`HT`6%On8_VbS>"
    "3*iV3{}KQOKLi2&{0Hp;?9c%B2mS-1-}meP0s#U3Z37<#1^od500IC0<~IQS0ssU5>jne}?*ab;`v|WP"
    "0sj954FB>p009312;cYW!Swt30p|<SFZ$;f3iaVMA@l0}>j(ot`aB#10uA6900jX9^B4gS1OxN|{73-^"
    "xdQ_H_xu$100991FaG<v{s8{|0}BESDh2xN`TO<%=idDi3IYjYCHmI)|M~#Mu>TY$0R#j90ssI10u=%D"
    "0RQy=`4|NG3jP4m{r?ga0RR5}x&R44{r~~~HeW$IOZy-U{Wi&4z_c9X%N;a?oGX#TD<2o2w<Mv)F(MOA"
    "1qB8L1_cBK1O)^I2L%KM1_cEL1qKBM1qB5K1qB5MR09A2^8f$<76AYN_W%F@!2kdN9RL6TGywnr00IC2"
    ";Q#;thyefq^8f$;rT_o{rvU%}+W-ImVE_OCngaj;;s5{t1ONa4asmJVH39$tx&QzF@c;k+C;<QfoCE*>"
    "_y7O@xc~qFlmP$$9RL6TX8-^H#{vKVgaQBnxc~qF1`reM687}-___!C6z1^%`1acK1`+!31MvM5^7#rE"
    "1<yY7F0=&T+rbp#C4$`c!w%{S)-(X(E5P0-)A-(F2n!Db2J#2^_4yG60`~yO=mGWY^9uFz5(?-Ir3Vra"
    "6CoJf9S7k07cmO?3h4(JoCvM&xg`WE8VLa)<O|p`?gj?%4FK@}rUw872nYHE0{i|C`vw6G1O5dJ_zVII"
    "{Nw8h2muES3;g{6rT+}N?fL!)6Al>f0RsUC2KgEQ_UZ%f9rp(Q4haDGAqD9V4GQ`A?h&l|0_W)(?Dq{E"
    "0wwMt00#7_4gAt8{@3~w6y+2B3-$^D*X$wt5&#GW6(0hc7u*F5^4=5~3lZ}Z;spWD3Jd|<7YOJS;sCS_"
    "(%vrPIM%xS`tTCu70Cc0gznAiyEqD@5*^z#u=)u!{|OHG4fqlM_W}gY4*}-(0|vee#|ZuX1Lpw+_W2nM"
    "${`=`D*N`;_7e!HE85)$=+Xm^;~4e|3fTcE-2xXy>o*cBJ^BA>EgRrkIb91F8XghLK_q12)?73+5BfkP"
    "J_7Fj02B8!;V7l`+P~T}FS_~41nt&NvC<9dA^ZC6`VsIICky!$0@;!B)YjLX9h@ut?$z+;iTlva4*F2%"
    "5EBXRA_4~P>kA3bE9~Y95Axjy%^4up5aov?+v)Zx1;5<o|M3Ry0Tu)c5()bU1Om<K?g0k@2mucX`UwXI"
    "^#>*BF3kbk`}_{pB$@CV=m-AXyEQc68k_Vpy#*Iv6#WGK5C@>+3kd-U`*Z60{Ra;a>;VAQ9Nhp5E-n@f"
    "`}zU?1P(|1`U3+10_yYz0s;jC`~Ld&{viYc00;*K&|=t22_5!G2LZLP?CliU1*OvGsp{F}uOCFdGz`?~"
    "8|?e6^+o^D5ZI~N=j7HW;Jz=X4$(#-ljEw#2k#Q!|M~^|1qT28{sRgD0{i>?|Mda}{R8#=1r!1Y2c-rI"
    "4fOF71?uwm?B2!<{q_p>8_Ej&9qRq~tm+xzAMxGp4G`lB<|hpNCI<}&`Vub#B=hSw0rdz$C;=S=79Z~R"
    "oB#M3%TDpj3k8V%00{ReIiVFY56~#_i?&9>L-8y2K^r&0^dR}_`sU2S=GFo<ERh2!lhOdqxaY{i`u*3$"
    "0s0642LJs600agF1o^fC`~ds@0|pQP0R8>~0saOF>gyBa=nD|k3Ha3f?D*#C6YBWs>-qmc()Rzp3<D(l"
    "Cf4NT=`imx>IjV&=*kk-2a&2gx8(KXsrv<_3iLVQ(ckJ&_#Xa78d&8K*|EF~^`YC>HS^N^?Up;#;Tyc@"
    "1sDz|&&Lz=BnA5o$o5#K`R3~I0_JD^^7`J|IRM|J2M7lU2L}fS2nYuV2?z)X2M7oU2nYuU2nYxU2M7oV"
    "*$4mtbPxalZU+DWtN;K2PzeA4*98Co>jVG*dHetW0v7-PgB1V(VgmpGMhyS}k;?!7FZuuf>;M1%sS*GH"
    "@&^C_h35bN;spQzAOHXWNCE%=?f?J)TMGaHO#}b{)an2KItTy&uL1x7Hvj+tIs*Uzx%>bBod5s-bq)Xk"
    "0u<pV{s8_R0~;Fq;;;Dd72yN^)%5ll!yx$l70lHAEfm@D9q|3u=L8<CozLeC*|+NN(5M0W;w?P$VO{g^"
    "0{G$wA{x>Y;NKA;+ua^H9?`eY<gwlc&p!1)!VUYpA@JkR?gr=HDX{4=>i`F}5cUo24)y5)*BBN3_0$OY"
    "9qsS|0}=u>4O$f;vJep*8`1Rv*Bk^9@Al>p6V2QO@aYil7T(s}M6n6|n&w9R>f6)uKE}{yz|Q%-{xjdv"
    "7!&@}x7ygc%3a?ay3_>N6yD&;^C8et1^BeU<=!3TH&rPJ?FGO0@82T~#NX081;EwK3i|ie((uO+`oh@D"
    "3<~)2{nHWZ0}%4?<_YQs!~P2c{Qv;`_42a>|LqV85hoc$;}Ieg7}@dz)aCsL_u!lJ-o*Y4r$GYp^du0?"
    "BQf~p^a@DD05<&+zY+nK8q4zUt1|Kp^71eM=AHEK2p#_d`vV3B`4I*V{tXKa3i1E>`vr^&^$8OJ3m5_B"
    "6DbY`_X8Xb{~G`f{RIgE2;=zh3=jMQ`3)Y12@m?_BSrP-(FETS_!-zJ;=$4!3d#YqJ;d}k(d1GE=vedE"
    ">ix_7ISTz02mcro#Ps<6@#odE_$&zA{2vm{FFWS$tWf<3=J*o>q%<fB5HK1f9?#n6A6xTNwFw3JU?ITe"
    "tR*W60|6oXtS%Y{qx$j~0`vFt87KH>=>Rwiy4lL)C`Sa&+W{l`{72Z7%?K1eE5r!*M%e-d(hTMSy4oAz"
    "rb*556%hRFTUgg3-Txmx3)AQG2Zj5<;#ey8$rLKR(D>)0)2zYJ1?nI{#q-?I2H48S`xzwm$jzI&1laKN"
    "2p#+W{sIRG`40sM1Q`(+4DJ7$2N(Yo><k0?APE2F0oecy<o5B`&`%rzz2^co`ugY4$`1s6i~a2RVF|~;"
    "_6y$#?B%!Q6Z_}$%nKO)Deu<n1>Ecw-6{L)0r271<et9$)Zxa*%?+;er_A!j0u9f!0RA$z(CjDY2OEsr"
    "-U2!B&+|F)5FwUKwe24`^vDeIBeTat&eYu-#Oc_x1TN?Pn*$0503ZJq0s{sg5$X2v1K$Au_X-*U5CID6"
    "F2m&6+6FS~7Dv<ski`)>D7x6r_DA3u|I4uR6vXZD_AfN#ND2cF0TtB#?CBFL8rI9~2@e7a)cz;@78WA{"
    "6z|gH;`8hK6Q>%!sQd2);`lu61s5g&>K9H61!(j5!bh+w>$>#o7E0O<w5x6o1kvUF60q|!;pFN9_2Tge"
    "0mo+!-1W`q;;rE+oCh-Z037e^SLfyv*hB5-->(Aq0}}w{`Xc=0^A_|B*#Wc=$L|IP{ObVq<n;#t2KxN{"
    "2nYxX2nh)Y2M7oV2nYxX2nY!Y2nYuW2nY!X2nYxV)d>Iqy8r+H$MgUHiRl0T83h0U5Y_+xujK##cLx9f"
    "A_M>c>;V7(g$Muuf(rlubqD|efdv2nRQ><|tQP<P?g#(?2?PKDKo0-_wB!H(-w6N!?g#(?5&{4K5byv0"
    "RRsV5DGLAq;ne^CF8}}k=luWw8wmgafdBvijspMy{`C0*2?YWL{Td_s9NO;s?*#nV^C9vE4*Uf56&mFO"
    "=NS<U4H5qo{{8^>_X`0L@ACBK;s6~0^4$6B2=NL7#rymJBMR&aF#hxv{L}*J@dNkw{`Bt%3kU5T{Ixv="
    "{tpKU69fR>`Ty+r0sH&~P5=A#`|=9?{uuuI;{yH%{`>(3{{;pB{0IHi0R#X9*8&U!?gI!6{1@Q`;tLM)"
    "A^HCW1O@2=2LuTW1M12c_V4W9@%{GjPyqD>|0fF!>CpcX0q+OZ-ZJ3lI{X6V`uP9i`Q;7_{3-i6(BS_5"
    "{r&s~`p*dg2L=NM{1Nu_83G{p-~J*c`uP0*?Cbve0SN{Q0T@9G@8byM-3|m0{r(UG@%H}l<?<c`=^Y>m"
    "0`mY7zb69#4Dws(4D;^+>;2yD|L_eP_W}<M<`D7^`UMvG1pp5d#4`N$`Op5)81otw5FP0N3+~nC>;v}@"
    ";M?pRBLx2WBoy-=0n!NY;R^5a5%=;G{sH$70p1N2009d8^z;E49RLst1pEF7+1LOD{^C#G0N?@r81eZB"
    "{}sq8{09X56YT;L@B{nz^VA>y|M&eJ`~U&@`Rpb81PuQX_xU#B0tEW(<^JXU8R+#H`wtWL^#c9`4=eK`"
    "4BFcS3G5Z_$t()e931@K4G<6X?<?;I2mcoi6T<oh1O@^J{mKOa^a241`SAAv)BF<u)BgW)_5SJn2)`2J"
    "K=%at1MNv2@B8cj%>)wm4ckHK0O<zo|JD=|=M5no|L^z~HVf<3`t2PAP3P?C_5K_O3={qU2i*DZ`}_t9"
    "65R6$2?_n}<Mt*T`U?IT^7;oA2lxK)Aoe2s-}ngw;|2N$3Kq{29T5a6^xXjU+4|1?5OnqK;_?6d|HC`@"
    "+bRkI3IhEO0sFrC`~v{~B?t%y|MwUK1^f2__y_nB{2b)~;v5C{0|W#A{OlSH_y+>f?inBt`~Cz38ode6"
    "O$7D+{tEpJ^!5i5_Wt_;>Imrt2=@aJ$^jAB2`VH1@52%d^Y9Ar^Y+i(WB2s>`w;#M4Gj$p{0aRa1nvmz"
    "^#1+*0tEXCBK_h31P%ZI0Rbfi2m=J>`|=$74eS2IG5{Uz{0JZf5gQBMybt*c`z#3q#}W4C-TM;r-!T&g"
    "2I~G0{5}f61n~t6`#A0N`s(u)9rOeo&;bAg^#mjO76lmu1P2HH%=r}BG5_Z7>>K6;^%ME>3JV4C4-NJR"
    "@A>@_5AqZ25gQ6G0o4ox$pPc&9X~M*&(i@1{p$Vt^a&IE_xktq^#Lk4{{995=k^5r{rnLB=qTC(ANKtE"
    "2Lw3C39Uf;8TA&vHs?dn0r>{+#5)H|@csP;0Pytj{w4qN`|wTX1iS|B2i@BN3lts-1PJ{N`1c6};vgRv"
    "6~pBe+xHCt>lEL>IV<M@`tkGeAL{4w|L+Y99L)9-`276)^*`<X7Xt$K{RJ!H+zt8#3Iqf6_yG6>4(AHv"
    "P3H>H2JJNh{1q(n&gBjE1py8I=oj+s=imnh*&`hf2L}fSUjP6AHUIzsN&o-=!vFvO"
)


def filter_layers() -> list[tuple[Array, Array, Array]]:
    """Return weights (outputs, inputs, taps), biases and shifts of all layers."""
    data, layers = np.frombuffer(base64.b85decode(FILTER), np.int8), []
    for outputs, inputs, taps in ((32, 4, 9), (32, 32, 1), (32, 32, 1), (4, 32, 9)):
        size = outputs * inputs * taps
        weight, shifts = data[:size], data[size : size + outputs]
        data = data[size + outputs :]
        bias, data = data[: 4 * outputs].view("<i4"), data[4 * outputs :]
        weight = weight.reshape(outputs, inputs, taps)
        layers.append((weight.astype(int), bias.astype(int), shifts.astype(int)))
    return layers


# docs/wavelet.md: Components to bands, Bands to samples


def bands_of_components(planes: Array, matrix: Array | None) -> Array:
    """Turn planes (slices, components, rows, columns) to bands, the last axis."""
    c = np.moveaxis(planes, 1, -1)
    if matrix is None:
        return bits32(c + 8) >> 4
    count = len(matrix)
    square = (3 << 28) * np.eye(count, dtype=int) - matrix @ matrix.T
    refined = square @ matrix + (1 << 22) >> 23
    largest = (1 << 28) - 1
    return np.clip(c, -largest, largest) @ refined + (1 << 23) >> 24


def samples_of_bands(bands: Array, chunk: Chunk) -> Array:
    """Turn bands into samples of the dtype."""
    if chunk.dtype.kind == "f":
        assert chunk.ranges is not None
        return scaled_floats(bands, 1 << 20, chunk.ranges[:, 0], chunk.ranges[:, 1])
    info = np.iinfo(chunk.dtype)
    return np.clip(bands, info.min, info.max).astype(chunk.dtype)


# docs/format.md: Structure


@dataclass(frozen=True)
class Levels:
    """The values that a band has."""

    first: int  # number of the smallest
    values: Array  # int, in ascending order

    def samples(self, numbers: Array) -> Array:
        """Return the levels of numbers."""
        indices = numbers - self.first
        if (indices < 0).any() or (indices >= len(self.values)).any():
            raise Damaged("structure section: an integer without a level")
        return self.values[indices]

    def nearest(self, samples: Array) -> Array:
        """Return the levels nearest to samples, the lower one of two."""
        samples = samples.astype(int)
        upper = np.searchsorted(self.values, samples).clip(1, len(self.values) - 1)
        if len(self.values) == 1:
            return np.full(samples.shape, self.values[0])
        below, above = self.values[upper - 1], self.values[upper]
        return np.where(samples - below <= above - samples, below, above)


@dataclass(frozen=True)
class Grid:
    """Bands of a coarser resolution."""

    bands: list[int]
    factor: int
    phase: tuple[int, int]
    sections: dict[int, bytes]


@dataclass(frozen=True)
class Structure:
    """The content of a structure section."""

    levels: list[Levels]  # one for each band, or none
    grids: list[Grid]
    padding: NoData | None


def read_structure(section: bytes, chunk: Chunk) -> Structure:
    """Read a structure section."""
    data, dtype, bands = (
        Reader(section, "structure section"),
        chunk.dtype,
        chunk.shape[3],
    )
    layout = data.integer(1)
    if not 1 <= layout <= 4:
        raise Unsupported(f"structure section: reserved layout {layout}")
    if layout == 4:
        return Structure([], _read_grids(data, bands), None)
    levels: list[Levels] = []
    if layout & 1:
        if dtype.kind == "f":
            raise Damaged("structure section: levels of float32")
        for _ in range(bands):
            kind = data.varint()
            if kind == 0 and not levels:
                raise Damaged("structure section: the first band has no band before")
            levels.append(_read_levels(data, kind, dtype) if kind else levels[-1])
    if not layout & 2:
        data.finish()
        return Structure(levels, [], None)
    return Structure(levels, [], read_nodata(data.rest(), chunk, "structure section"))


def _read_levels(data: Reader, kind: int, dtype: np.dtype[Any]) -> Levels:
    """Read the levels of a band."""
    info = np.iinfo(dtype)
    low, high = int(info.min), int(info.max)
    if kind > 1:
        d = kind - 1
        offset = data.varint() if d > 1 else 0
        if d > 65535 or offset >= d:
            raise Damaged(f"structure section: divisor {d} and offset {offset}")
        first, last = -((offset - low) // d), (high - offset) // d
        values = d * np.arange(first, last + 1) + offset
    else:
        first, form, entry, length = low, data.integer(1), data.varint(), data.varint()
        if form > 1:
            raise Unsupported(f"structure section: reserved form {form}")
        if max(entry, length) > 65535:
            raise Damaged("structure section: an entry or a length above 65535")
        if low < 0 and entry > 32767:
            entry -= 65536
        if form == 0:
            gaps = [data.varint() + 1 for _ in range(length)]
        else:
            bitmap = np.frombuffer(data.take((length + 7) // 8), np.uint8)
            bits = np.unpackbits(bitmap, bitorder="little")
            if bits[length:].any():
                raise Damaged("structure section: bits of a bitmap after its last")
            gaps = np.diff(np.flatnonzero(bits), prepend=-1).tolist()
        values = entry + np.cumsum([0, *gaps])
    if not len(values) or values[0] < low or values[-1] > high:
        raise Damaged(
            f"structure section: no levels, or levels that are not of {dtype}"
        )
    return Levels(first, values)


# docs/format.md: Grids


GRID_KINDS = (STRUCTURE, SPECTRAL, QUALITY_MAP, RESIDUAL, WAVELET)


def _read_grids(data: Reader, bands: int) -> list[Grid]:
    numbers = data.take(bands)
    grids, sampled = [], []  # sections of samples, lengths of their pieces, checksums
    for number in range(max(numbers) + 1):
        members = [band for band in range(bands) if numbers[band] == number]
        factor, y, x, count = (data.integer(1) for _ in range(4))
        if not members or not 1 <= factor <= 16 or max(y, x) >= factor:
            raise Damaged(f"structure section: grid {number} is of no bands or size")
        sections: dict[int, bytes] = {}
        for _ in range(count):
            kind = data.integer(1)
            if kind in sections or kind not in GRID_KINDS:
                raise Damaged(
                    f"structure section: a grid with section {kind}, or twice"
                )
            sections[kind] = b""
            if kind in (RESIDUAL, WAVELET):
                lengths = [data.varint() for _ in range(5)]
                sampled.append((sections, kind, lengths, data.integer(4)))
            else:
                sections[kind] = data.take(data.varint())
        if sections.get(STRUCTURE, b"").startswith(b"\4"):
            raise Damaged("structure section: a grid with grids")
        grids.append(Grid(members, factor, (y, x), sections))
    if crc32c(data.data[: data.position]) != data.integer(4):
        raise Damaged("structure section: checksum of the grids")
    for piece in range(5):
        for sections, kind, lengths, _ in sampled:
            sections[kind] += data.take(lengths[piece])
    data.finish()
    for sections, kind, _, checksum in sampled:
        if crc32c(sections[kind]) != checksum:
            raise Damaged("structure section: checksum of a section of a grid")
    return grids


def decode_grid(grid: Grid, chunk: Chunk, nodata: NoData | None) -> Array:
    """Return samples of a grid's bands, repeated to the rows of the chunk."""
    slices, height, width, _ = chunk.shape
    factor, (py, px) = grid.factor, grid.phase
    rows = (np.arange(height) + py) // factor
    columns = (np.arange(width) + px) // factor
    shape = slices, int(rows[-1]) + 1, int(columns[-1]) + 1, len(grid.bands)
    ranges = None if chunk.ranges is None else chunk.ranges[grid.bands]
    if nodata is not None:
        mask = nodata.mask
        if mask is not None:
            # of the first sample of the chunk that repeats a sample of the grid
            y = np.searchsorted(rows, np.arange(shape[1]))
            x = np.searchsorted(columns, np.arange(shape[2]))
            mask = mask[:, y][:, :, x][..., grid.bands]
        nodata = replace(nodata, all=False, mask=mask)
    part = decode_samples(grid.sections, Chunk(shape, chunk.dtype, ranges), nodata)
    return part[:, rows][:, :, columns]


# docs/format.md: Cast

CAST_DTYPES = {1: "?", 2: "i4", 3: "u4", 4: "i8", 5: "u8", 6: "f8"}
CODED_DTYPES = {"b": ("u1",), "f": ("f4",), "i": ("u1", "u2", "f4")}


def cast(
    section: bytes, samples: Array, nodata: NoData | None
) -> tuple[np.dtype[Any], Array]:
    """Return the dtype of the chunk, and samples of it."""
    data = Reader(section, "cast section")
    code = data.integer(1)
    if code & 127 not in CAST_DTYPES or code == 129:
        raise Unsupported(f"cast section: reserved dtype {code:#04x}")
    dtype = np.dtype("<" + CAST_DTYPES[code & 127])
    coded = "i" if dtype.kind == "u" else dtype.kind
    if samples.dtype.str[1:] not in CODED_DTYPES[coded]:
        raise Damaged(f"cast section: samples of {samples.dtype} for {dtype}")
    offset = int.from_bytes(data.take(8), "little", signed=dtype.kind != "u")
    low, high = 0, 0
    if coded == "i":
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if not low <= offset <= high:
        raise Damaged(f"cast section: offset {offset} for {dtype}")
    if coded == "i":
        # numbers within 2^40 are exact in float64
        limit = 1 << 40
        ends = max(low - offset, -limit), min(high - offset, limit)
        v = np.clip(np.rint(np.nan_to_num(samples.astype(np.float64))), *ends)
        # modulo 2^64, which the sum is within for signed and unsigned dtypes
        result = v.astype("<i8").astype(dtype) + dtype.type(offset)
    else:
        result = samples.astype(dtype)
    stored = data.rest()
    if stored and (len(stored) != dtype.itemsize or nodata is None or coded == "b"):
        raise Damaged("cast section: NoData of another dtype, or without a section")
    if stored and nodata is not None:
        value = np.frombuffer(stored, dtype)[0]
        if not np.isfinite(value):
            raise Damaged(f"cast section: NoData value {value}")
        old = nodata.value
        result[np.isnan(samples) if old != old else samples == old] = value
    return dtype.newbyteorder(">" if code & 128 else "<"), result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a payload holds, and write its samples to a file of NumPy."""
    parser = argparse.ArgumentParser(prog="reference.py", description=main.__doc__)
    parser.add_argument(
        "file", type=Path, help="a payload: a chunk as its store has it"
    )
    parser.add_argument("--model", help="model file, for features")
    parser.add_argument("--out", help="write the samples to this file, as .npy")
    options = parser.parse_args(arguments)
    try:
        payload = options.file.read_bytes()
        header, stored = read_header(payload), labels(payload)
        print(f"{header.dtype.name} {header.shape}, axes {header.axes}")
        print(f"quality {header.quality / 100}, decoder {header.decoder.hex()}")
        for kind, entry in header.sections.items():
            print(f"{KINDS.get(kind, f'{kind:02X}')} section: {entry.length} bytes")
        if stored is not None:
            print(f"labels of tiles of {stored[0]} pixels: class, score / 255")
            print(stored[1].tolist())
        samples = decode(payload, options.model)
    except (DecodeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"samples from {samples.min()} to {samples.max()}")
    if options.out:
        np.save(options.out, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
