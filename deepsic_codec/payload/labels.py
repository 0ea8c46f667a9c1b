"""The labels section of a payload: the best classes of each tile of a chunk and their scores. See `docs/format.md`."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.payload.constants import LABEL_CELL
from deepsic_codec.payload.fields import MAX_K, MAX_SAMPLES, MAX_TILES, Header
from deepsic_codec.payload.limits import check_size
from deepsic_codec.payload.varint import read_varint, write_varint

NO_CLASS = 255  # of an unused pair, whose score is 0
MIN_SCORE = 8  # of 255: lower scores are not worth a pair
MAX_TILE = MAX_SAMPLES  # pixels along an axis: no chunk is longer
MAX_POOLING, MEAN_POOLING = "max", "mean"
POOLINGS = (MAX_POOLING, MEAN_POOLING)
#: Log odds of each score, ln((s + 1/2) / (255 1/2 - s)), in 1/256, int64 (256,).
LOG_ODDS = np.round(256 * np.log((np.arange(256) + 0.5) / (255.5 - np.arange(256)))).astype(np.int64)


@dataclass(frozen=True, eq=False)
class LabelBlock:
    """Labels of a chunk.

    Attributes
    ----------
    tile : (int, int)
        Height and width of a tile in pixels; the last ones may reach beyond the chunk.
    classes : ndarray
        uint8 (slices, rows, columns, k): class numbers, best first; NO_CLASS where a tile has fewer.
    scores : ndarray
        uint8 of the same shape, in 1/255; 0 where a tile has fewer classes.
    """

    tile: tuple[int, int]
    classes: NDArray[np.uint8]
    scores: NDArray[np.uint8]

    def dense(self, n_classes: int) -> NDArray[np.uint8]:
        """Return scores uint8 (slices, rows, columns, n_classes), 0 for what was not stored.

        Raises
        ------
        CorruptPayload
            If a class is not below `n_classes`.
        """
        used = self.scores > 0
        largest = int(self.classes[used].max(initial=0))
        if used.any() and largest >= n_classes:
            raise CorruptPayload(f"labels section: class {largest}, but the vocabulary has {n_classes} classes")
        dense = np.zeros((*self.classes.shape[:3], n_classes + 1), np.uint8)  # the last column is for unused pairs
        np.put_along_axis(dense, np.minimum(self.classes.astype(np.intp), n_classes), self.scores, axis=-1)
        return dense[..., :n_classes]


def best_labels(scores: NDArray[np.uint8], tile: tuple[int, int]) -> LabelBlock:
    """Choose the classes of each tile that are stored: at most the 5 best, none below MIN_SCORE.

    Parameters
    ----------
    scores : ndarray
        uint8 (slices, rows, columns, classes), in 1/255, of at most 255 classes.
    tile : (int, int)
        Height and width of a tile in pixels, multiples of 64.

    Raises
    ------
    ConfigurationError
        For a tile that cannot be stored.
    UnsupportedArray
        For more than MAX_TILES tiles.
    ValueError
        For scores of another dtype or shape.
    """
    _check_tile(tile)
    if scores.dtype != np.uint8 or scores.ndim != 4 or not 0 < scores.shape[3] <= NO_CLASS or not scores.size:
        raise ValueError(f"scores: expected uint8 (slices, rows, columns, 1..255), got {scores.dtype} {scores.shape}")
    if scores.size // scores.shape[3] > MAX_TILES:
        raise UnsupportedArray(
            f"{scores.shape[:3]} label tiles, expected at most {MAX_TILES}; choose larger tiles or smaller chunks"
        )
    # One number for a class, larger for the better: its score, and of equal scores the lower class first.
    keys = np.left_shift(scores, 8, dtype=np.uint16)
    keys |= np.arange(255, 255 - scores.shape[3], -1, dtype=np.uint16)
    keys.sort(axis=-1)
    best = keys[..., : -MAX_K - 1 : -1]
    kept = best >= MIN_SCORE << 8
    k = int(kept.sum(axis=-1).max())
    return _block(tile, (best * kept)[..., :k])


def _block(tile: tuple[int, int], keys: NDArray[Any]) -> LabelBlock:
    """Make a block of keys: score in the upper byte, 255 - class in the lower, 0 for an unused pair."""
    return LabelBlock(tile, (keys & 255 ^ 255).astype(np.uint8), (keys >> 8).astype(np.uint8))


def encode_labels(labels: LabelBlock) -> bytes:
    """Write a labels section."""
    pairs = np.stack([labels.classes, labels.scores], axis=-1)
    height, width = labels.tile
    return write_varint(height) + write_varint(width) + bytes((labels.classes.shape[-1],)) + pairs.tobytes()


def decode_labels(data: bytes, header: Header) -> LabelBlock:
    """Read a labels section; the chunk shape in the header says how many tiles it has.

    Raises
    ------
    CorruptPayload
        If the section is not exactly that of such a chunk.
    UnsupportedPayload
        If the chunk is larger than the limit `max_pixels`.
    """
    tile, pairs = read_tiles(data, header, "labels section", "classes", MAX_K, np.dtype("<u2"))
    keys = pairs ^ 255
    if (((keys & 255) == 0) != (keys < 256)).any():
        raise CorruptPayload("labels section: a class without a score, or a score without a class")
    if ((keys[..., :-1] <= keys[..., 1:]) & (keys[..., 1:] > 0)).any():
        raise CorruptPayload("labels section: the classes of a tile are not in order, best first")
    block = _block(tile, keys)
    numbers = np.sort(block.classes, axis=-1)
    if ((numbers[..., :-1] == numbers[..., 1:]) & (numbers[..., 1:] != NO_CLASS)).any():
        raise CorruptPayload("labels section: a class occurs twice in a tile")
    return block


def read_tiles(
    data: bytes, header: Header, section: str, what: str, limit: int, dtype: np.dtype[Any]
) -> tuple[tuple[int, int], NDArray[Any]]:
    """Read a section with up to `limit` values for each label tile; errors name the section and `what` these are.

    Returns height and width of a tile in pixels, and values (slices, rows, columns, values of a tile); raises the
    errors of `decode_labels`.
    """
    check_size(header.slices, header.height, header.width, UnsupportedPayload)
    try:
        height, position = read_varint(data, 0, f"{section}: tile height")
        width, position = read_varint(data, position, f"{section}: tile width")
    except IndexError:
        raise CorruptPayload(f"{section}: a field goes beyond its {len(data)} bytes") from None
    if not (_is_tile(height) and _is_tile(width)):
        raise CorruptPayload(f"{section}: tile {height} x {width}, expected multiples of {LABEL_CELL} up to {MAX_TILE}")
    if position == len(data):
        raise CorruptPayload(f"{section}: the number of {what} is missing")
    count, position = data[position], position + 1
    if count > limit:
        raise CorruptPayload(f"{section}: {count} {what} a tile, expected at most {limit}")
    grid = header.slices, ceil_div(header.height, height), ceil_div(header.width, width)
    tiles = prod(grid)
    if tiles > MAX_TILES:
        raise CorruptPayload(f"{section}: {tiles} tiles, expected at most {MAX_TILES}")
    if len(data) != (expected := position + count * tiles * dtype.itemsize):
        raise CorruptPayload(f"{section}: {len(data)} bytes, expected {expected} for {grid}")
    return (height, width), np.frombuffer(data, dtype, offset=position).reshape(*grid, count)


def default_tile(height: int, width: int) -> tuple[int, int]:
    """Return the smallest tile (height, width), multiples of 64 pixels, with at most 4 along each axis of an image."""
    return LABEL_CELL * ceil_div(height, 4 * LABEL_CELL), LABEL_CELL * ceil_div(width, 4 * LABEL_CELL)


def tile_scores(
    cells: NDArray[np.uint8],
    tile: tuple[int, int],
    pooling: str = MAX_POOLING,
    has_data: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Join cells of 64 x 64 pixels to tiles.

    Parameters
    ----------
    cells : ndarray
        Scores, uint8 (slices, rows, columns, classes).
    tile : (int, int)
        Height and width of a tile in pixels, multiples of 64.
    pooling : {"max", "mean"}
        "max": the score of a class in a tile is its largest score in a cell of the tile. "mean": the score whose log
        odds are the mean of those of the cells with data.
    has_data : ndarray, optional
        bool (slices, rows, columns): cells with data; by default, those with a score above 0.

    Returns
    -------
    ndarray
        uint8 (slices, rows of tiles, columns of tiles, classes); 0 in tiles without data.
    """
    _check_tile(tile)
    starts = [np.arange(0, cells.shape[axis], tile[axis - 1] // LABEL_CELL) for axis in (1, 2)]
    if pooling == MAX_POOLING:
        for axis in (1, 2):
            cells = np.maximum.reduceat(cells, starts[axis - 1], axis=axis)
        return cells
    valid = np.asarray(cells.any(axis=-1) if has_data is None else has_data)[..., None]
    sums, counts = LOG_ODDS[cells] * valid, valid.astype(np.int64)
    for axis in (1, 2):
        sums, counts = (np.add.reduceat(values, starts[axis - 1], axis=axis) for values in (sums, counts))
    twice = (4 * sums + counts) // np.maximum(2 * counts, 1)  # the mean, rounded to halves
    scores = np.searchsorted(LOG_ODDS[:-1] + LOG_ODDS[1:], twice, side="right")
    return np.where(counts > 0, scores, 0).astype(np.uint8)


def _is_tile(length: int) -> bool:
    return LABEL_CELL <= length <= MAX_TILE and length % LABEL_CELL == 0


def _check_tile(tile: tuple[int, int]) -> None:
    if not (_is_tile(tile[0]) and _is_tile(tile[1])):
        raise ConfigurationError(
            f"label tile: expected multiples of {LABEL_CELL} pixels up to {MAX_TILE}, got {tile!r}"
        )
