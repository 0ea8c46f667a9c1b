"""The embedding section of a payload: a vector for each label tile of a chunk. See `docs/format.md`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.constants import EMBEDDING_ZERO, LABEL_CELL
from deepsic_codec.payload.fields import MAX_VALUES, Header
from deepsic_codec.payload.labels import read_tiles
from deepsic_codec.payload.varint import write_varint


@dataclass(frozen=True, eq=False)
class Embedding:
    """Embeddings of a chunk.

    Attributes
    ----------
    tile : (int, int)
        Height and width of a tile in pixels, as those of labels.
    vectors : ndarray
        int8 (slices, rows, columns, values) from -127 to 127. All values of a tile without data are 0.
    """

    tile: tuple[int, int]
    vectors: NDArray[np.int8]


def tile_vectors(cells: NDArray[np.uint8], tile: tuple[int, int]) -> NDArray[np.int8]:
    """Join cells of 64 x 64 pixels to tiles: the vector of a tile is the mean of its cells with data, rounded.

    Parameters
    ----------
    cells : ndarray
        uint8 (slices, rows, columns, values), with `EMBEDDING_ZERO` added; all 0 in cells without data.
    tile : (int, int)
        Height and width of a tile in pixels, multiples of 64.

    Returns
    -------
    ndarray
        int8 (slices, rows, columns, values).
    """
    has_data = cells.any(axis=-1, keepdims=True)
    sums = (cells.astype(np.int32) - EMBEDDING_ZERO) * has_data
    counts = has_data.astype(np.int32)
    for axis, length in zip((1, 2), tile, strict=True):
        starts = np.arange(0, cells.shape[axis], length // LABEL_CELL)
        sums, counts = (np.add.reduceat(values, starts, axis=axis) for values in (sums, counts))
    return np.where(counts > 0, (2 * sums + counts) // np.maximum(2 * counts, 1), 0).astype(np.int8)


def encode_embedding(content: Embedding) -> bytes:
    """Write an embedding section."""
    height, width = content.tile
    values = content.vectors.shape[-1]
    return write_varint(height) + write_varint(width) + bytes((values,)) + content.vectors.astype(np.int8).tobytes()


def decode_embedding(data: bytes, header: Header) -> Embedding:
    """Read an embedding section; the chunk shape in the header says how many tiles it has.

    Raises
    ------
    CorruptPayload
        If the section is not exactly that of such a chunk.
    UnsupportedPayload
        If the chunk is larger than the limit `max_pixels`.
    """
    tile, vectors = read_tiles(data, header, "embedding section", "values", MAX_VALUES, np.dtype(np.int8))
    if not vectors.shape[-1]:
        raise CorruptPayload("embedding section: no values")
    if (vectors == -128).any():
        raise CorruptPayload("embedding section: a value of -128, expected -127 to 127")
    return Embedding(tile, vectors)
