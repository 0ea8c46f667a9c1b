"""The structure section of a payload: what samples are, where their dtype could hold more. See `docs/format.md`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import row_blocks
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.nodata import NoData
from deepsic_codec.payload.quality_map import CELL, decode_quality_map, grid_of
from deepsic_codec.payload.varint import read_varint, write_varint
from deepsic_codec.payload.wavelet import MIN_CHECKED, start_length, verified_start

LEVELS, PADDING = 1, 2  # bits of the layout
GRIDS = 4  # layout: bands are repeated pixels of coarser grids
MAX_FACTOR = 16
# Kinds of sections of grids. The last two hold samples: they have a piece for each of these divisors of a chunk's rows
# and columns.
QUALITY_MAP, RESIDUAL, WAVELET = 6, 8, 9
PIECES = (16, 8, 4, 2, 1)
SAME, TABLE = 0, 1  # kinds of the levels of a band; larger kinds are a divisor plus 1
GAPS, BITMAP = 0, 1  # forms of a table
MAX_DIVISOR = 65535


@dataclass(frozen=True, eq=False)
class Levels:
    """The values that samples of a band have, numbered in ascending order.

    Attributes
    ----------
    divisor : int
        1 to 65535: values are `divisor` n + `offset`, with n of either sign.
    offset : int
        0 to divisor - 1.
    table : ndarray, optional
        int64, ascending: values are `table[n]`, with n counted from the least number of the dtype.
    """

    divisor: int = 1
    offset: int = 0
    table: NDArray[np.int64] | None = None

    def numbers(self, samples: NDArray[Any]) -> NDArray[Any]:
        """Return the numbers, of the dtype of samples, an integer one, all of which are levels."""
        if self.table is not None:
            return (np.searchsorted(self.table, samples) + np.iinfo(samples.dtype).min).astype(samples.dtype)
        return ((samples.astype(np.int32) - self.offset) // self.divisor).astype(samples.dtype)

    def samples(self, numbers: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Undo `numbers`; raises CorruptPayload for numbers without a level of the dtype."""
        info = np.iinfo(dtype)
        if self.table is None:
            values = numbers.astype(np.int64) * self.divisor + self.offset
            if values.min() < info.min or values.max() > info.max:
                raise CorruptPayload("structure section: a sample is no level")
            return values.astype(dtype)
        index = numbers.astype(np.int64) - info.min
        if index.min() < 0 or index.max() >= len(self.table):
            raise CorruptPayload("structure section: a sample is no level")
        return self.table.astype(dtype)[index]

    def ends(self, dtype: np.dtype[Any]) -> tuple[int, int]:
        """Return the numbers of the first and the last level of a dtype, without a table."""
        info = np.iinfo(dtype)
        return -((self.offset - int(info.min)) // self.divisor), (int(info.max) - self.offset) // self.divisor

    def nearest(self, samples: NDArray[Any]) -> NDArray[Any]:
        """Return the levels that are nearest to samples, the lower of two at equal distance."""
        if self.table is None:
            wide = samples.astype(np.int64) - self.offset + (self.divisor - 1) // 2
            numbers = np.clip(wide // self.divisor, *self.ends(samples.dtype))
            return (numbers * self.divisor + self.offset).astype(samples.dtype)
        middles = (self.table[:-1] + self.table[1:]) // 2  # the last values that belong to the lower level
        return self.table.astype(samples.dtype)[np.searchsorted(middles, samples)]

    def gap(self) -> int:
        """Return the least distance of two levels."""
        return self.divisor if self.table is None else int(np.diff(self.table).min(initial=MAX_DIVISOR))


@dataclass(frozen=True, eq=False)
class Grid:
    """Bands that are repeated pixels of one coarser grid.

    Attributes
    ----------
    bands : tuple of int
        Their numbers, ascending.
    factor : int
        1 to 16: rows and columns of the chunk in one of the grid.
    phase : (int, int)
        Rows and columns of the first pixel that lie before the chunk, each less than `factor`.
    sections : dict of int to bytes
        Kinds and bytes of the sections that hold samples of the grid.
    """

    bands: tuple[int, ...]
    factor: int
    phase: tuple[int, int]
    sections: dict[int, bytes]

    def scale(self, scale: int) -> int:
        """Return the largest divisor of rows and columns of the grid, a power of two, of use to 1/scale of a chunk."""
        return 1 << max(0, (scale // self.factor).bit_length() - 1)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the grid under a chunk of this size."""
        down, right = self.phase
        return (height - 1 + down) // self.factor + 1, (width - 1 + right) // self.factor + 1

    def starts(self, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first rows and columns of the pixels of the grid under a chunk of this size."""
        rows, columns = self.size(height, width)
        first = np.maximum(np.arange(rows) * self.factor - self.phase[0], 0)
        return first, np.maximum(np.arange(columns) * self.factor - self.phase[1], 0)

    def thinned(self, samples: NDArray[Any]) -> NDArray[Any]:
        """Return samples (slices, rows, columns, bands) of the grid, from those of all bands of the chunk."""
        first, second = self.starts(*samples.shape[1:3])
        return np.ascontiguousarray(samples[:, first[:, None], second][..., list(self.bands)])

    def repeated(self, samples: NDArray[Any], height: int, width: int) -> NDArray[Any]:
        """Undo `thinned`: return samples (slices, height, width, bands of the grid)."""
        rows = (np.arange(height) + self.phase[0]) // self.factor
        columns = (np.arange(width) + self.phase[1]) // self.factor
        return samples[:, rows[:, None], columns]


@dataclass(frozen=True, eq=False)
class Structure:
    """What samples (slices, height, width, bands) of a chunk are.

    Attributes
    ----------
    levels : tuple of Levels, optional
        One for each band.
    padding : bytes
        Samples that hold one value, which are not coded: as the content of a nodata section. Empty if there are none.
    grids : tuple of Grid
        That hold all samples, without levels and padding; empty if samples are coded as they are.
    """

    levels: tuple[Levels, ...] | None
    padding: bytes = b""
    grids: tuple[Grid, ...] = ()

    def max_error(self, max_error: float) -> float:
        """Return the bound on numbers that keeps a bound on samples."""
        if self.levels is None:
            return max_error
        return min(0 if one.table is not None else int(max_error) // one.divisor for one in self.levels)

    def numbers(self, samples: NDArray[Any]) -> NDArray[Any]:
        """Return the numbers, of the dtype of samples, an integer one; those of padding are any."""
        return self._each_band(samples, samples.dtype, lambda levels, band: levels.numbers(band))

    def samples(self, numbers: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Undo `numbers`; raises CorruptPayload for numbers without a level of the dtype."""
        return self._each_band(numbers, dtype, lambda levels, band: levels.samples(band, dtype))

    def nearest(self, samples: NDArray[Any]) -> NDArray[Any]:
        """Return the levels that are nearest to samples."""
        return self._each_band(samples, samples.dtype, lambda levels, band: levels.nearest(band))

    def _each_band(
        self, array: NDArray[Any], dtype: np.dtype[Any], function: Callable[[Levels, NDArray[Any]], NDArray[Any]]
    ) -> NDArray[Any]:
        if self.levels is None:
            return array.astype(dtype, copy=False)
        out = np.empty(array.shape, dtype)
        for block in row_blocks(array.shape):
            for number, levels in enumerate(self.levels):
                out[block][..., number] = function(levels, array[block][..., number])
        return out


def nodata_on_grid(nodata: NoData, grid: Grid) -> NoData:
    """Return the samples without data of a grid."""
    if nodata.mask is None:
        return nodata
    shape = *nodata.mask.shape[:3], grid.bands[-1] + 1
    wide = nodata.mask if nodata.mask.shape[-1] > 1 else np.broadcast_to(nodata.mask, shape)
    mask = grid.thinned(wide)
    return NoData(nodata.value, nodata.down, mask if mask.any() else None)


def encode_structure(structure: Structure) -> bytes:
    """Write a structure section."""
    if structure.grids:
        return _encode_grids(structure.grids)
    layout = LEVELS * (structure.levels is not None) | PADDING * bool(structure.padding)
    data, before = bytearray((layout,)), b""
    for levels in structure.levels or ():
        coded = _encode_levels(levels)
        data += write_varint(SAME) if coded == before else coded
        before = coded
    return bytes(data) + structure.padding


def _encode_grids(grids: tuple[Grid, ...]) -> bytes:
    from google_crc32c import value as crc32c  # not installed where only images are trained on

    numbers = {band: number for number, grid in enumerate(grids) for band in grid.bands}
    data = bytearray((GRIDS, *(numbers[band] for band in range(len(numbers)))))
    samples: list[list[bytes]] = []
    for grid in grids:
        data += bytes((grid.factor, *grid.phase, len(grid.sections)))
        for kind, content in grid.sections.items():
            data.append(kind)
            if kind in (RESIDUAL, WAVELET):
                samples.append(_cut(grid, kind, content))
                data += b"".join(write_varint(len(piece)) for piece in samples[-1])
                data += crc32c(content).to_bytes(4, "little")
            else:
                data += write_varint(len(content)) + content
    data += crc32c(bytes(data)).to_bytes(4, "little")
    return b"".join((data, *(piece for pieces in zip(*samples, strict=True) for piece in pieces)))


def _cut(grid: Grid, kind: int, content: bytes) -> list[bytes]:
    """Return the pieces of a section of a grid."""
    ends = [len(content)] * len(PIECES)
    if kind == WAVELET and len(content) >= MIN_CHECKED:
        ends = [start_length(content, len(content), grid.scale(scale)) for scale in PIECES]
    return [content[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _encode_levels(levels: Levels) -> bytes:
    if levels.table is None:
        return write_varint(levels.divisor + 1) + (write_varint(levels.offset) if levels.divisor > 1 else b"")
    gaps = np.diff(levels.table)
    start = levels.table[0] & 0xFFFF
    bits = np.zeros(int(gaps.sum()), np.uint8)
    bits[levels.table[1:] - levels.table[0] - 1] = 1
    bitmap = np.packbits(bits, bitorder="little").tobytes()
    varints = b"".join(write_varint(int(gap) - 1) for gap in gaps)
    form, body = (GAPS, varints) if len(varints) <= len(bitmap) else (BITMAP, bitmap)
    size = len(gaps) if form == GAPS else len(bits)
    return b"".join((write_varint(TABLE), bytes((form,)), write_varint(int(start)), write_varint(size), body))


def decode_structure(data: bytes, header: Header) -> Structure:
    """Read a structure section.

    Raises
    ------
    CorruptPayload
        If it is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it has a layout that this version does not know.
    """
    if not data:
        raise CorruptPayload("structure section: empty")
    layout, position = data[0], 1
    if layout == GRIDS:
        try:
            return Structure(None, grids=_decode_grids(data, header))
        except IndexError:
            raise CorruptPayload("structure section: truncated") from None
    if layout not in (LEVELS, PADDING, LEVELS | PADDING):
        raise UnsupportedPayload(f"structure section: unknown layout {layout:#04x}; upgrade deepsic_codec")
    levels = None
    if layout & LEVELS:
        try:
            levels, position = _decode_levels(data, position, header)
        except IndexError:
            raise CorruptPayload("structure section: truncated") from None
    padding = data[position:]
    if bool(padding) != bool(layout & PADDING):
        raise CorruptPayload(f"structure section: {len(padding)} bytes after the levels, with layout {layout:#04x}")
    return Structure(levels, padding)


@dataclass(frozen=True, eq=False)
class _Table:
    """The grids of a section, and where their samples are.

    Attributes
    ----------
    grids : tuple of Grid
        Without the content of sections of samples.
    samples : list of (int, int)
        Number of the grid and kind, of each of these sections.
    pieces : list of list of int
        Their bytes, for each of `PIECES`.
    checksums : list of int
        Theirs.
    end : int
        Where the table ends and the first piece begins.
    """

    grids: tuple[Grid, ...]
    samples: list[tuple[int, int]]
    pieces: list[list[int]]
    checksums: list[int]
    end: int

    def length(self, count: int) -> int:
        """Return the bytes of the section up to the end of the first `count` pieces of each section of samples."""
        return self.end + sum(sum(lengths[:count]) for lengths in self.pieces)

    def contents(self, data: bytes) -> list[bytes]:
        """Return the sections of samples, or their starts, as far as `data` has their pieces."""
        contents, position = [bytearray() for _ in self.pieces], self.end
        for number in range(len(PIECES)):
            for content, lengths in zip(contents, self.pieces, strict=True):
                content += data[position : position + lengths[number]]
                position += lengths[number]
        return [bytes(content) for content in contents]

    def with_samples(self, contents: Sequence[bytes]) -> tuple[Grid, ...]:
        """Return the grids with the content of sections of samples."""
        sections = [dict(grid.sections) for grid in self.grids]
        for (number, kind), content in zip(self.samples, contents, strict=True):
            sections[number][kind] = content
        return tuple(replace(grid, sections=each) for grid, each in zip(self.grids, sections, strict=True))


def _decode_grids(data: bytes, header: Header) -> tuple[Grid, ...]:
    """Read grids, which end the section; raises IndexError if `data` ends early."""
    from google_crc32c import value as crc32c

    table = _read_table(data, header)
    if len(data) != table.length(len(PIECES)):
        raise CorruptPayload(f"structure section: {len(data)} bytes with grids of {table.length(len(PIECES))}")
    contents = table.contents(data)
    if [crc32c(content) for content in contents] != table.checksums:
        raise CorruptPayload("structure section: the checksum of a section of a grid does not match")
    return table.with_samples(contents)


def _read_table(data: bytes, header: Header) -> _Table:
    """Read the table of grids; raises IndexError if `data` ends early."""
    from google_crc32c import value as crc32c

    position = 1 + header.channels
    numbers = data[1:position]
    if len(numbers) < header.channels:
        raise IndexError
    table = _Table((), [], [], [], 0)
    grids = []
    for number in range(max(numbers) + 1):
        bands = tuple(band for band in range(header.channels) if numbers[band] == number)
        factor, down, right, count = (data[position + i] for i in range(4))
        position += 4
        if not bands or not 1 <= factor <= MAX_FACTOR or max(down, right) >= factor:
            raise CorruptPayload(
                f"structure section: grid {number} has {len(bands)} bands, factor {factor}, phase {down}, {right}"
            )
        sections: dict[int, bytes] = {}
        for _ in range(count):
            kind = data[position]
            position += 1
            if kind in sections:
                raise CorruptPayload(f"structure section: grid {number} has a section of kind {kind} twice")
            lengths = []
            for _ in PIECES if kind in (RESIDUAL, WAVELET) else (1,):
                length, position = read_varint(data, position, "structure section")
                lengths.append(length)
            size = 4 if kind in (RESIDUAL, WAVELET) else lengths[0]
            sections[kind], position = data[position : position + size], position + size
            if position > len(data):
                raise IndexError
            if kind in (RESIDUAL, WAVELET):
                table.samples.append((number, kind))
                table.pieces.append(lengths)
                table.checksums.append(int.from_bytes(sections[kind], "little"))
        grids.append(Grid(bands, factor, (down, right), sections))
    if position + 4 > len(data):
        raise IndexError
    if crc32c(data[:position]) != int.from_bytes(data[position : position + 4], "little"):
        raise CorruptPayload("structure section: the checksum of the grids does not match")
    return replace(table, grids=tuple(grids), end=position + 4)


def table_length(data: bytes, header: Header, size: int) -> int:
    """Return the bytes of a structure section with grids up to the end of their table.

    Parameters
    ----------
    data : bytes
        Its start. If the table does not end there, more bytes than these are returned.
    header : Header
        The header of the payload.
    size : int
        Bytes of the section, which are returned if it has no grids.

    Raises
    ------
    CorruptPayload
        If the table is damaged.
    """
    if data and data[0] != GRIDS:
        return size
    try:
        return _read_table(data, header).end
    except IndexError:
        return min(size, max(2 * len(data), 1 << 8))


def grids_length(
    data: bytes, header: Header, size: int, scale: int, limit: int | None = None, groups: int | None = None
) -> int:
    """Return the bytes of a structure section with grids that 1/scale of rows and columns needs.

    Parameters
    ----------
    data, header, size
        As for `table_length`; up to the end of the table at least.
    scale : int
        One of `PIECES`.
    limit : int, optional
        Return no more bytes than these, but the first piece of each grid.
    groups : int, optional
        The same of numbers of pieces.
    """
    table = _read_table(data, header)
    first, needed = table.length(1), table.length(PIECES.index(scale) + 1)
    if groups is not None:
        needed = min(needed, table.length(groups))
    return min(size, needed if limit is None else max(first, min(needed, limit)))


def header_of(header: Header, grid: Grid) -> Header:
    """Return the header of a payload as that of a chunk of a grid's size and bands."""
    sizes = dict(zip(header.axes, header.shape, strict=True))
    sizes["y"], sizes["x"] = grid.size(header.height, header.width)
    if "c" in sizes:
        sizes["c"] = len(grid.bands)
    return replace(header, shape=tuple(sizes[axis] for axis in header.axes))


def has_wavelets(data: bytes, header: Header) -> bool:
    """Tell whether a structure section has grids of wavelets; `data` and errors are as for `grid_qualities`."""
    return data[:1] == bytes((GRIDS,)) and any(WAVELET in grid.sections for grid in _read_table(data, header).grids)


def grid_qualities(data: bytes, header: Header) -> NDArray[np.float64] | None:
    """Return the qualities of cells of a chunk, from the map of its finest grid; None without one.

    Parameters
    ----------
    data : bytes
        The start of a structure section, up to the end of the table of grids at least.
    header : Header
        The header of the payload.

    Raises
    ------
    CorruptPayload
        If the table or the map is damaged.
    """
    if data[:1] != bytes((GRIDS,)):
        return None
    grid = min(_read_table(data, header).grids, key=lambda grid: grid.factor)
    content = grid.sections.get(QUALITY_MAP)
    if content is None:
        return None
    qualities = decode_quality_map(content, header_of(header, grid)).qualities(header.quality)
    rows, columns = (
        (np.arange(count) * CELL + phase) // (grid.factor * CELL)
        for count, phase in zip(grid_of(header.height, header.width), grid.phase, strict=True)
    )
    return qualities[:, rows[:, None], columns]


def verified_grids(data: bytes, header: Header) -> tuple[bytes, tuple[bool, ...]]:
    """Verify the start of a structure section with grids, the first piece of each at least.

    Returns
    -------
    bytes
        A section, of which the wavelets of grids are starts, as `verified_start` returns them.
    tuple of bool
        Which grids are whole.

    Raises
    ------
    CorruptPayload
        If a checksum does not match, or a section of a grid is too short.
    """
    from google_crc32c import value as crc32c

    try:
        table = _read_table(data, header)
    except IndexError:
        raise CorruptPayload("structure section: truncated") from None
    contents, whole = table.contents(data), [True] * len(table.grids)
    for place, ((number, kind), lengths) in enumerate(zip(table.samples, table.pieces, strict=True)):
        content, size = contents[place], sum(lengths)
        if len(content) == size:
            if crc32c(content) != table.checksums[place]:
                raise CorruptPayload("structure section: the checksum of a section of a grid does not match")
            continue
        end = start_length(content, size, 1, len(content)) if kind == WAVELET else size
        if end > len(content):
            raise CorruptPayload(f"structure section: {len(content)} bytes of a section of a grid, expected {end}")
        contents[place], whole[number] = verified_start(content[:end], size), False
    return encode_structure(Structure(None, grids=table.with_samples(contents))), tuple(whole)


def _decode_levels(data: bytes, position: int, header: Header) -> tuple[tuple[Levels, ...], int]:
    """Read the levels of all bands; return them and the position after them. Raises IndexError if `data` ends early."""
    if header.dtype.kind == "f":
        raise CorruptPayload(f"structure section: levels of samples of {header.dtype}")
    bands: list[Levels] = []
    for _ in range(header.channels):
        kind, position = read_varint(data, position, "structure section")
        if kind == SAME and not bands:
            raise CorruptPayload("structure section: the first band has the levels of the band before")
        if kind == SAME:
            bands.append(bands[-1])
        elif kind == TABLE:
            levels, position = _decode_table(data, position, header.dtype)
            bands.append(levels)
        else:
            offset, divisor = 0, kind - 1
            if divisor > 1:
                offset, position = read_varint(data, position, "structure section")
            bands.append(Levels(divisor, offset))
            first, last = bands[-1].ends(header.dtype)
            if divisor > MAX_DIVISOR or offset >= divisor or first > last:
                raise CorruptPayload(f"structure section: divisor {divisor} and offset {offset}")
    return tuple(bands), position


def _decode_table(data: bytes, position: int, dtype: np.dtype[Any]) -> tuple[Levels, int]:
    """Read a table; return it and the position after it. Raises IndexError if `data` ends before it does."""
    info = np.iinfo(dtype)
    form = data[position]
    if form > BITMAP:
        raise UnsupportedPayload(f"structure section: unknown form {form} of a table; upgrade deepsic_codec")
    first, position = read_varint(data, position + 1, "structure section")
    size, position = read_varint(data, position, "structure section")
    if max(first, size) > 0xFFFF:
        raise CorruptPayload(f"structure section: a table of size {size} from {first} on")
    gaps: Any = np.zeros(size, np.int64)
    if form == GAPS:
        for number in range(size):
            gaps[number], position = read_varint(data, position, "structure section")
        table = np.cumsum(gaps + 1)
    else:
        end = position + (size + 7) // 8
        if end > len(data):
            raise IndexError
        bits = np.unpackbits(np.frombuffer(data[position:end], np.uint8), bitorder="little")
        position, table = end, np.flatnonzero(bits) + 1
        if table.max(initial=0) > size:
            raise CorruptPayload("structure section: a bitmap has bits after its last")
    first -= (first >> 15) * 0x10000 if info.min < 0 else 0
    table = np.concatenate([[first], first + table]).astype(np.int64)
    if table[0] < info.min or table[-1] > info.max:
        raise CorruptPayload(f"structure section: levels from {table[0]} to {table[-1]} for {dtype}")
    return Levels(table=table), position
