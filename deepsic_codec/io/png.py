"""PNG, written a few rows at a time, so that an image never has to be in memory as a whole."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

ROWS = 64  # filtered at a time
COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # colour types of the format: grey, grey and alpha, RGB, RGB and alpha


class PngWriter:
    """Writes an image of 8 or 16 bits, top to bottom.

    Parameters
    ----------
    file : binary file
        Where to.
    height, width, channels : int
        Size; 1 to 4 channels.
    dtype : numpy.dtype
        uint8 or uint16.

    Raises
    ------
    ValueError
        For any other image.
    """

    def __init__(self, file: BinaryIO, height: int, width: int, channels: int, dtype: np.dtype) -> None:
        if channels not in COLOUR or np.dtype(dtype) not in (np.uint8, np.uint16):
            raise ValueError(f"PNG holds 1 to 4 channels of uint8 or uint16, not {channels} of {dtype}")
        self._file, self._left, self._shape = file, height, (width, channels)
        self._dtype = np.dtype(dtype).newbyteorder(">")
        self._step = channels * self._dtype.itemsize  # bytes of a pixel
        self._above = np.zeros((1, width * self._step), np.uint8)
        self._deflate = zlib.compressobj(6)
        file.write(b"\x89PNG\r\n\x1a\n")
        depth = 8 * self._dtype.itemsize
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, COLOUR[channels], 0, 0, 0))

    def write(self, rows: NDArray[np.integer]) -> None:
        """Write the next rows, (n, width, channels)."""
        if rows.shape[1:] != self._shape or len(rows) > self._left:
            raise ValueError(f"rows {rows.shape} where at most {self._left} of {self._shape} were expected")
        self._left -= len(rows)
        for start in range(0, len(rows), ROWS):
            part = np.ascontiguousarray(rows[start : start + ROWS], self._dtype)
            self._write(part.view(np.uint8).reshape(len(part), -1))

    def close(self) -> None:
        """Write what is left; raises ValueError if rows are missing."""
        if self._left:
            raise ValueError(f"{self._left} rows of the image were not written")
        self._chunk(b"IDAT", self._deflate.flush())
        self._chunk(b"IEND", b"")

    def _write(self, raw: NDArray[np.uint8]) -> None:
        above = np.concatenate([self._above, raw[:-1]])
        self._above = raw[-1:]
        left, corner = np.zeros_like(raw), np.zeros_like(raw)
        left[:, self._step :] = raw[:, : -self._step]
        corner[:, self._step :] = above[:, : -self._step]
        # Filter types 1, 2 and 4 of the format; the one whose differences are smallest in sum usually deflates best.
        found = np.stack([raw - left, raw - above, raw - _paeth(left, above, corner)])
        sums = np.abs(found.view(np.int8).astype(np.int16)).sum(axis=2, dtype=np.int64)
        best = sums.argmin(axis=0)
        lines = np.concatenate([np.array([1, 2, 4], np.uint8)[best][:, None], found[best, np.arange(len(raw))]], axis=1)
        data = self._deflate.compress(lines.tobytes())
        if data:
            self._chunk(b"IDAT", data)

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _paeth(left: NDArray[np.uint8], above: NDArray[np.uint8], corner: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Predict a byte by that of its three neighbours which is nearest to left + above - corner."""
    a, b, c = (x.astype(np.int16) for x in (left, above, corner))
    to_left, to_above, to_corner = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = np.where(to_above <= to_corner, above, corner)
    return np.where((to_left <= to_above) & (to_left <= to_corner), left, nearest)
