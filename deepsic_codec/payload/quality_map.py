"""The quality map of a payload: steps of a wavelet by cells of 16 x 16 pixels. See `docs/format.md`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.constants import LATENT_STRIDE, deep_quality, deep_step
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.steps import PER_OCTAVE

CELL = LATENT_STRIDE  # pixels
PLAIN = 0  # layout
VALUES = 128
#: Codes of steps between two values.
SPACING = PER_OCTAVE // 8


@dataclass(frozen=True, eq=False)
class QualityMap:
    """Steps by cells.

    Attributes
    ----------
    cells : ndarray
        uint8 (slices, rows, columns) below `VALUES`: 0 where errors do not matter; 1 for the step of the wavelet, and
        each further one for a step larger by an eighth of an octave.
    """

    cells: NDArray[np.uint8]

    def qualities(self, finest: float) -> NDArray[np.float64]:
        """Return the qualities of cells, if the wavelet has quality `finest`; 0 where errors do not matter."""
        levels = [0.0] + [deep_quality(deep_step(finest) * 2 ** (n / 8)) for n in range(VALUES - 1)]
        return np.array(levels)[self.cells]

    def of_band(self, level: int, kind: int, height: int, width: int) -> NDArray[np.uint8]:
        """Return the values of coefficients (slices, height, width) of a band.

        A coefficient has the finest step of the cells that it reaches, so that a cell has no errors of coarser ones.
        """
        finest = np.where(self.cells == 0, VALUES, self.cells)  # the least one
        for axis, size, high in ((1, height, kind >> 1), (2, width, kind & 1)):
            centres = 2 * np.arange(size) + high  # in halves of 2^level pixels
            first = ((centres - 2 << level - 1) // CELL).clip(0)
            last = (((centres + 2 << level - 1) - 1) // CELL).clip(0, finest.shape[axis] - 1)
            first = np.minimum(first, last)
            out = np.take(finest, first, axis)
            for step in range(1, int((last - first).max()) + 1):
                np.minimum(out, np.take(finest, np.minimum(first + step, last), axis), out=out)
            finest = out
        return np.where(finest == VALUES, 0, finest).astype(np.uint8)


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of cells of an image."""
    return ceil_div(height, CELL), ceil_div(width, CELL)


def encode_quality_map(content: QualityMap) -> bytes:
    """Write a quality map section."""
    from deepsic_codec.payload.coders.cells import encode_cells  # numba, which reading labels does not need

    return bytes((PLAIN,)) + encode_cells(content.cells)


def decode_quality_map(data: bytes, header: Header) -> QualityMap:
    """Read a quality map section.

    Raises
    ------
    CorruptPayload
        If it is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it has another layout.
    """
    from deepsic_codec.payload.coders.cells import decode_cells

    if not data:
        raise CorruptPayload("quality map section: empty")
    if data[0] != PLAIN:
        raise UnsupportedPayload(f"quality map section: unknown layout {data[0]}; upgrade deepsic_codec")
    return QualityMap(decode_cells(data[1:], (header.slices, *grid_of(header.height, header.width))))
