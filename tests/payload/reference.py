"""Payloads read and written from docs/format.md alone, in its order: plain Python, nothing imported of the package."""

import struct
from itertools import product

AXES = "?yxctzn"
DTYPES = {1: "u1", 2: "i1", 3: "u2", 4: "i2", 5: "f4"}
FORMATS = {"u1": "B", "i1": "b", "u2": "H", "i2": "h", "f4": "f"}


def crc32c(data):
    """CRC-32C (Castagnoli) bit by bit: reflected polynomial 82F63B78, start and end inverted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def varint(value):
    data = [value >> 7 * i & 127 for i in range(5)]
    while len(data) > 1 and data[-1] == 0:
        data.pop()
    return bytes([byte | 128 for byte in data[:-1]] + [data[-1]])


class Reader:
    def __init__(self, data):
        self.data = data

    def take(self, count):
        taken, self.data = self.data[:count], self.data[count:]
        assert len(taken) == count
        return taken

    def u8(self):
        return self.take(1)[0]

    def varint(self):
        value, shift, byte = 0, 0, 128
        while byte & 128:
            byte = self.u8()
            value |= (byte & 127) << shift
            shift += 7
        return value


def read(payload):
    """Return the fields of a sound payload as a dict, its sections as {kind: bytes}."""
    magic, version, flags, length, crc = struct.unpack("<4sBBHI", payload[:12])
    assert (magic, version, flags) == (b"DSIC", 1, 0)
    body = Reader(payload[12 : 12 + length])
    assert crc == crc32c(payload[:8] + body.data)
    dtype, layout, ndim = body.take(3)
    packed = body.take((ndim + 1) // 2)
    axes = "".join(AXES[packed[i // 2] >> 4 * (i % 2) & 15] for i in range(ndim))
    shape = tuple(body.varint() for _ in range(ndim))
    fields = {
        "dtype": (">" if layout & 1 else "<") + DTYPES[dtype],
        "order": "F" if layout & 2 else "C",
        "grouping": layout >> 2,
        "axes": axes,
        "shape": shape,
        "decoder": body.take(8),
        "head": body.take(4),
        "quality": struct.unpack("<H", body.take(2))[0] / 100,
        "grid": (body.varint(), body.varint()),
    }
    table = [(body.u8(), body.varint(), *struct.unpack("<I", body.take(4))) for _ in range(body.u8())]
    assert not body.data
    rest = Reader(payload[12 + length :])
    fields["sections"] = {kind: rest.take(length) for kind, length, _ in table}
    assert not rest.data
    assert [crc32c(data) for data in fields["sections"].values()] == [crc for _, _, crc in table]
    return fields


def read_labels(section, shape, axes):
    """Return the tile, and a dict (class -> score, best first) for each tile at its (slice, row, column)."""
    sizes = dict(zip(axes, shape, strict=True))
    height, width = sizes.pop("y"), sizes.pop("x")
    sizes.pop("c", None)
    slices = 1
    for size in sizes.values():
        slices *= size
    data = Reader(section)
    tile = data.varint(), data.varint()
    k = data.u8()
    places = product(range(slices), range(-(-height // tile[0])), range(-(-width // tile[1])))
    tiles = {place: dict(tuple(data.take(2)) for _ in range(k)) for place in places}
    assert not data.data
    for labels in tiles.values():
        labels.pop(255, None)
    return tile, tiles


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


def read_spectral(section, bands):
    """Return the rows of the matrix of a spectral transform section of a chunk with N bands."""
    count = section[0] + 1
    numbers = struct.unpack(f"<{count * bands}h", section[1:])
    return [numbers[bands * i : bands * (i + 1)] for i in range(count)]


def read_wavelet(section):
    """Return the code of the step and the stream of a wavelet section, whose checkpoints are verified."""
    layout, code, count = struct.unpack("<BHB", section[:4])
    assert layout == 0 and count <= 4
    stream = section[4 + 8 * count :]
    numbers = struct.unpack(f"<{2 * count}I", section[4 : 4 + 8 * count])
    for length, crc in zip(numbers[:count], numbers[count:], strict=True):
        assert crc32c(section[: 4 + 4 * count] + stream[:length]) == crc
    return code, stream


def read_ranges(section, dtype, bands):
    """Return a pair (low, high) for each band of a value range section; `dtype` is a code of numpy."""
    numbers = struct.unpack(f"<{(len(section) - 1) // int(dtype[1])}{FORMATS[dtype]}", section[1:])
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    return pairs if section[0] else pairs * bands


def read_structure(section, dtype, bands):
    """Return levels by their numbers for each band of a structure section, and its padding; `dtype` as of numpy."""
    bits = 8 * int(dtype[1])
    least = -(1 << bits - 1) if dtype[0] == "i" else 0
    values = range(least, least + (1 << bits))
    data = Reader(section)
    layout = data.u8()
    found = []
    for _ in range(bands if layout & 1 else 0):
        kind = data.varint()
        if kind == 0:
            found.append(found[-1])
        elif kind == 1:
            form, first, length = data.u8(), data.varint(), data.varint()
            entries = [first - 65536 if first > 32767 and least < 0 else first]
            if form == 0:
                for _ in range(length):
                    entries.append(entries[-1] + data.varint() + 1)
            else:
                bitmap = int.from_bytes(data.take((length + 7) // 8), "little")
                entries += [entries[0] + i + 1 for i in range(length) if bitmap >> i & 1]
            assert entries[0] in values and entries[-1] in values
            found.append({least + i: entry for i, entry in enumerate(entries)})
        else:
            offset = data.varint() if kind > 2 else 0
            found.append({(v - offset) // (kind - 1): v for v in values if (v - offset) % (kind - 1) == 0})
    assert bool(data.data) == bool(layout & 2) and layout < 4
    return found, data.data


def read_grids(section, bands):
    """Return (bands, factor, phases, sections by kind) of each grid of a structure section of layout 4."""
    data = Reader(section)
    assert data.u8() == 4
    numbers = data.take(bands)
    grids = []
    for number in range(max(numbers) + 1):
        factor, down, right, count = data.take(4)
        sections = {}
        for _ in range(count):
            kind = data.u8()
            sections[kind] = data.take(data.varint())
        grids.append(([band for band in range(bands) if numbers[band] == number], factor, (down, right), sections))
    assert not data.data
    return grids


def repeat(rows, height, width, factor, phases):
    """Return rows of a grid, each a list, as rows of the chunk."""
    return [[rows[(y + phases[0]) // factor][(x + phases[1]) // factor] for x in range(width)] for y in range(height)]
