"""The fields of a header, their codes and limits. `docs/format.md` is the specification, in the same order."""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from deepsic_codec.axes import Axes

MAGIC = b"DSIC"
FORMAT_VERSION = 1
PREFIX = 12  # bytes: magic, version, flags, header length, CRC
OPTIONAL = 0x80  # bit of a section's kind: a reader that does not know the kind may skip the section

# Limits, all tested before anything is allocated.
MIN_NDIM, MAX_NDIM = 2, 8  # y and x at least; eight nibbles of axes
MAX_BANDS = 256  # of axis c: arrays with more are no images, and each band has an entry in the value range section
MAX_SAMPLES = 1 << 31  # a chunk is decoded whole and in memory; its size in bytes then fits 64 bits with ease
MAX_SECTIONS = 16  # keeps the header within MAX_BODY
# Seven fixed bytes of layout and axes, eight sizes, identities, quality, grid, table of sections: with the prefix 244
# bytes, so that a first read of 256 bytes holds every header.
MAX_BODY = 3 + 4 + 8 * 5 + 12 + 2 + 2 * 5 + 1 + MAX_SECTIONS * 10
MAX_K = 5  # (class, score) pairs of a label tile
MAX_VALUES = 255  # of an embedding
MAX_TILES = 1 << 22  # label tiles of a chunk: more than 40 MB of labels are no labels

AXIS_CODES = {"y": 1, "x": 2, "c": 3, "t": 4, "z": 5, "n": 6}
BIG_ENDIAN, FORTRAN, GROUPING, TRELLIS = 1, 2, 12, 16  # bits of the layout byte
# How bands are joined to images of three channels: colours in one image, or one band repeated; or each band in an image
# of its own. Payloads without images have the first.
COLOURS, PLANES = 0, 1
# dtype code, plus 256 if big-endian; one-byte types have no byte order and leave that bit clear.
DTYPES = {code: np.dtype(f"<{name}") for code, name in enumerate(("u1", "i1", "u2", "i2", "f4"), start=1)}
DTYPES |= {code | 256: dtype.newbyteorder(">") for code, dtype in DTYPES.items() if dtype.itemsize > 1}


@dataclass(frozen=True, slots=True)
class SectionEntry:
    """An entry of the section table."""

    kind: int  # number of the section, with the bit OPTIONAL if a reader may skip it
    length: int  # bytes
    crc: int  # CRC-32C of these bytes
    offset: int  # of the first byte, from the start of the payload


class Quantiser(NamedTuple):
    """How the symbols of a chunk were quantised; another quantiser makes other latents of them.

    Attributes
    ----------
    quality : float
        1 to 100.
    trellis : bool
        Whether the symbols are those of a path through the trellis, in half steps.
    """

    quality: float
    trellis: bool


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
    axes : Axes
        One of the letters y, x, c, t, z, n for each axis.
    decoder, head : bytes
        The first 8 bytes of the decoder's SHA-256, the first 4 of the head's; four zeros for no head.
    quality : float
        1 to 100.
    grid : (int, int)
        Rows and columns of symbols.
    sections : tuple of SectionEntry
        In the order in which they follow.
    size : int
        Bytes before the first section.
    version : int
        Of the format.
    grouping : int
        COLOURS or PLANES: how bands are joined to images.
    trellis : bool
        Whether the symbols of the features are those of a path through the trellis.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    axes: Axes
    decoder: bytes
    head: bytes
    quality: float
    grid: tuple[int, int]
    sections: tuple[SectionEntry, ...]
    size: int
    version: int
    grouping: int = COLOURS
    trellis: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole payload."""
        return self.sections[-1].offset + self.sections[-1].length if self.sections else self.size

    @property
    def quantiser(self) -> Quantiser:
        """Of the features."""
        return Quantiser(self.quality, self.trellis)

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
        return self.axes.bands(self.shape)

    @property
    def slices(self) -> int:
        """The product of the sizes of all axes but y, x and c."""
        return prod(self.shape) // (self.height * self.width * self.channels)

    @property
    def images(self) -> int:
        """Images that the networks see, of all slices."""
        return self.slices * (self.channels if self.grouping == PLANES else 1)

    def entry(self, kind: int) -> SectionEntry | None:
        """Return the entry of a kind of section, None if the payload has no such section."""
        return next((entry for entry in self.sections if entry.kind == kind), None)
