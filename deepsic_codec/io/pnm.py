"""PBM, PGM and PPM files: samples as they are in the file, whatever their largest value."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index
from deepsic_codec.errors import SourceError

PLAIN = {b"P1": b"P4", b"P2": b"P5", b"P3": b"P6"}  # samples as text, and the same kind in binary
MAGIC = (*PLAIN, *PLAIN.values())
BITMAPS = (b"P1", b"P4")  # in which 1 is black
MAX_HEADER = 1 << 16  # bytes, with comments


@dataclass(frozen=True)
class Header:
    """Kind, shape (height, width, bands), largest value, and position of the samples."""

    kind: bytes
    shape: Index
    max_value: int
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""
        return np.dtype("u1" if self.max_value < 256 else "u2")


def read_header(file: IO[bytes]) -> Header:
    """Read the header of a file; raises SourceError if it is damaged."""
    data = file.read(MAX_HEADER)
    kind, position = data[:2], 2
    numbers: list[int] = []
    expected = 2 if kind in BITMAPS else 3
    while len(numbers) < expected:
        while position < len(data) and (data[position : position + 1].isspace() or data[position] == ord("#")):
            if data[position] == ord("#"):
                position = data.find(b"\n", position) if data.find(b"\n", position) >= 0 else len(data)
            else:
                position += 1
        start = position
        while data[position : position + 1].isdigit():
            position += 1
        if start == position or position - start > 9:
            raise SourceError("cannot be read as an image: the header is damaged")
        numbers.append(int(data[start:position]))
    width, height = numbers[:2]
    max_value = 1 if kind in BITMAPS else numbers[2]
    if not (width and height and 0 < max_value < 1 << 16):
        raise SourceError("cannot be read as an image: the header is damaged")
    bands = 3 if kind in (b"P3", b"P6") else 1
    return Header(kind, (height, width, bands), max_value, position + 1)


def read(path: Path, header: Header) -> NDArray[Any]:
    """Return the samples of a file, array (height, width, bands); raises SourceError if some are missing."""
    height, width, bands = header.shape
    is_bitmap, is_plain = header.kind in BITMAPS, header.kind in PLAIN
    data = path.read_bytes()[header.offset :]
    values: NDArray[Any]
    if is_plain:
        text = b"\n".join(line.partition(b"#")[0] for line in data.splitlines())
        words = list(text.replace(b"0", b" 0 ").replace(b"1", b" 1 ").split()) if is_bitmap else text.split()
        values = np.array([int(word) for word in words], np.int64)
    elif is_bitmap:
        row = -(-width // 8)
        packed = np.frombuffer(data[: height * row], np.uint8)
        values = np.unpackbits(packed[: len(packed) // row * row].reshape(-1, row), axis=1)[:, :width].ravel()
    else:
        size = header.dtype.itemsize
        values = np.frombuffer(data[: len(data) // size * size], header.dtype.newbyteorder(">"))
    if values.size < height * width * bands:
        raise SourceError(f"{path}: cannot be read as an image: the file ends before its samples do")
    values = values[: height * width * bands]
    if values.size and int(values.max()) > header.max_value:
        raise SourceError(f"{path}: cannot be read as an image: samples exceed its largest value {header.max_value}")
    return values.astype(header.dtype).reshape(header.shape)
