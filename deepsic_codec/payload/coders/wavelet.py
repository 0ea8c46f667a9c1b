"""The wavelet transform of planes of integers: CDF 9/7, by lifting, in integers.

Each level splits a plane into a low band of half its size and three bands of horizontal, vertical and diagonal detail;
the next level splits the low band. Planes of any size have bands, without padding. The inverse undoes each step of the
transform, but for the rounding of the scale of low bands. `docs/wavelet.md` is normative.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.kernels import inner, jit

MAX_LEVELS, MIN_EDGE = 6, 12  # a plane with a shorter edge is not split
STRIP, TILE = 64, 32  # columns, or rows, that are transformed at a time; of tiles that are turned, even
SMALL = 1 << 18  # coefficients of a plane that is transformed at once
#: Steps of lifting in 2^-LIFT_BITS, and in 2^-SCALE_BITS the scale of low bands. A constant plane keeps its value, and
#: has no detail: the third step is chosen for that, and with fewer bits a large constant would have some.
LIFT_BITS, SCALE_BITS = 24, 24
LIFTING = (-26610918, -888859, 14812789, 7440810)
SCALE_LOW, UNSCALE_LOW = 13638083, 20638896

LOW, HORIZONTAL, VERTICAL, DIAGONAL = range(4)
#: Norms of the synthesis of one coefficient, in 2^-NORM_BITS: of low bands by level, of detail by level from 1 on, for
#: horizontal and vertical detail, and for diagonal detail. A step divided by them has the same effect in all bands.
NORM_BITS = 12
LOW_NORMS = (4096, 8053, 16887, 34479, 69381, 138990, 278107)
EDGE_NORMS = (0, 5096, 10062, 21081, 43007, 86516, 173302)
DIAGONAL_NORMS = (0, 3225, 5995, 12889, 26659, 53853, 107993)


class Band(NamedTuple):
    """A band of a transformed plane.

    Attributes
    ----------
    level : int
        Number of splits that made it; 0 for a plane that is not split.
    kind : int
        `LOW`, `HORIZONTAL`, `VERTICAL` or `DIAGONAL`.
    y, x : int
        Its first row and column in the transformed plane.
    height, width : int
        Its size.
    """

    level: int
    kind: int
    y: int
    x: int
    height: int
    width: int

    @property
    def norm(self) -> int:
        """Norm of the synthesis of one coefficient in 2^-NORM_BITS."""
        if self.kind == LOW:
            return LOW_NORMS[self.level]
        return (DIAGONAL_NORMS if self.kind == DIAGONAL else EDGE_NORMS)[self.level]


@lru_cache(maxsize=256)
def bands_of(height: int, width: int) -> tuple[Band, ...]:
    """Return the bands of a plane, from the coarsest to the finest."""
    sizes = list(_sizes(height, width))
    bands = [Band(len(sizes) - 1, LOW, 0, 0, *sizes[-1])]
    for level in range(len(sizes) - 1, 0, -1):
        (h, w), (rows, columns) = sizes[level - 1 : level + 1]
        bands += [
            Band(level, HORIZONTAL, 0, columns, rows, w - columns),
            Band(level, VERTICAL, rows, 0, h - rows, columns),
            Band(level, DIAGONAL, rows, columns, h - rows, w - columns),
        ]
    return tuple(bands)


def _sizes(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the sizes of the plane and of the low bands of all levels."""
    yield height, width
    for _ in range(MAX_LEVELS):
        if min(height, width) < MIN_EDGE:
            return
        height, width = (height + 1) // 2, (width + 1) // 2
        yield height, width


def forward(plane: NDArray[np.int32]) -> NDArray[np.int32]:
    """Transform a plane int32 (height, width) below 2^28 in 2^-FRACTION_BITS; its bands lie where `bands_of` says."""
    return split(plane.astype(np.int32, order="C"))


def split(plane: NDArray[np.int32]) -> NDArray[np.int32]:
    """Transform a plane as `forward` does, in place; return it."""
    for height, width in list(_sizes(*plane.shape))[:-1]:
        _split(plane, *_strips(height, width))
    return plane


def max_halvings(height: int, width: int) -> int:
    """Return how often a plane is split."""
    return len(list(_sizes(height, width))) - 1


def inverse(bands: NDArray[np.int32], halvings: int = 0) -> NDArray[np.int32]:
    """Undo `forward` for a transformed plane (height, width), which is overwritten.

    With `halvings`, the low band of that level is returned, a view: the plane at a half, a quarter, ... of its size.
    Sums wrap around modulo 2^32, so that damaged coefficients give some plane.
    """
    sizes = list(_sizes(*bands.shape))
    for height, width in sizes[halvings:-1][::-1]:
        _join(bands, *_strips(height, width))
    height, width = sizes[halvings]
    return bands[:height, :width]


def _strips(height: int, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return memory for a strip of columns (height, columns) of a plane, and for one of rows (width, rows)."""
    columns, rows = width, height
    if height * width > SMALL:
        columns, rows = (ceil_div(size, ceil_div(size, STRIP)) for size in (width, height))
    return np.zeros((height, columns), np.int32), np.zeros((width, rows), np.int32)


# In compiled code, integers of one type only, and loops in place of assignments to slices: each literal makes a
# function of its own, and an assignment to a slice compiles the text of its error, for seconds.
@inner
def _lift(x, first, step, sign):
    """Add to every second row, from row `first` on, a multiple of the sum of its neighbours; mirrored at the ends.

    `sign` is 1, or -1 to undo it.
    """
    count, width = x.shape
    for row in range(first, count, 2):
        above = row - 1 if row > 0 else 1
        below = row + 1 if row + 1 < count else row - 1
        for k in range(width):
            total = np.int64(x[above, k]) + np.int64(x[below, k])
            x[row, k] += np.int32(sign) * np.int32((total * step + (1 << (LIFT_BITS - 1))) >> LIFT_BITS)


@inner
def _scale(x, factor):
    """Multiply every second row, from the first on."""
    for row in range(0, x.shape[0], 2):
        for k in range(x.shape[1]):
            x[row, k] = np.int32((np.int64(x[row, k]) * factor + (1 << (SCALE_BITS - 1))) >> SCALE_BITS)


@inner
def _split_rows(x):
    """Transform the columns of x (n, width), n at least 2, in place; low and high rows alternate."""
    for n in range(4):
        _lift(x, 1 - n % 2, LIFTING[n], np.int64(1))
    _scale(x, np.int64(SCALE_LOW))


@inner
def _join_rows(x):
    """Undo `_split_rows`."""
    _scale(x, np.int64(UNSCALE_LOW))
    for n in range(3, -1, -1):
        _lift(x, 1 - n % 2, LIFTING[n], np.int64(-1))


@jit
def _split(plane, columns, rows):
    """Split the upper left part (height, width) of a plane in place, with memory (height, n) and (width, m).

    Strips of n columns, and of m rows as columns, stay in the cache.
    """
    height, width = columns.shape[0], rows.shape[0]
    whole = columns.shape[1] == width and rows.shape[1] == height
    half = (height + 1) // 2
    for left in range(0, width, columns.shape[1]):
        count = min(columns.shape[1], width - left)
        for y in range(height):
            for k in range(count):
                columns[y, k] = plane[y, left + k]
        _split_rows(columns)  # those beyond the plane, too, which are not used
        for y in range(height):
            target = y // 2 if y % 2 == 0 else half + y // 2
            if whole:
                for k in range(count):
                    rows[k, target] = columns[y, k]
            else:
                for k in range(count):
                    plane[target, left + k] = columns[y, k]
    half = (width + 1) // 2
    for top in range(0, height, rows.shape[1]):
        count = min(rows.shape[1], height - top)
        if not whole:
            for first in range(0, width, TILE):
                for k in range(count):
                    for x in range(first, min(first + TILE, width)):
                        rows[x, k] = plane[top + k, x]
        _split_rows(rows)
        if whole:
            for x in range(width):
                target = x // 2 if x % 2 == 0 else half + x // 2
                for k in range(height):
                    plane[k, target] = rows[x, k]
            continue
        for first in range(0, width, TILE):
            for k in range(count):
                for x in range(first, min(first + TILE, width), 2):
                    plane[top + k, x >> 1] = rows[x, k]
                for x in range(first + 1, min(first + TILE, width), 2):
                    plane[top + k, half + (x >> 1)] = rows[x, k]


@jit
def _join(plane, columns, rows):
    """Undo `_split`."""
    height, width = columns.shape[0], rows.shape[0]
    whole = columns.shape[1] == width and rows.shape[1] == height
    half = (width + 1) // 2
    for top in range(0, height, rows.shape[1]):
        count = min(rows.shape[1], height - top)
        if whole:
            for x in range(width):
                source = x // 2 if x % 2 == 0 else half + x // 2
                for k in range(height):
                    rows[x, k] = plane[k, source]
        else:
            for first in range(0, width, TILE):
                for k in range(count):
                    for x in range(first, min(first + TILE, width), 2):
                        rows[x, k] = plane[top + k, x >> 1]
                    for x in range(first + 1, min(first + TILE, width), 2):
                        rows[x, k] = plane[top + k, half + (x >> 1)]
        _join_rows(rows)
        if not whole:
            for first in range(0, width, TILE):
                for k in range(count):
                    for x in range(first, min(first + TILE, width)):
                        plane[top + k, x] = rows[x, k]
    half = (height + 1) // 2
    for left in range(0, width, columns.shape[1]):
        count = min(columns.shape[1], width - left)
        for y in range(height):
            source = y // 2 if y % 2 == 0 else half + y // 2
            if whole:
                for k in range(count):
                    columns[y, k] = rows[k, source]
            else:
                for k in range(count):
                    columns[y, k] = plane[source, left + k]
        _join_rows(columns)
        for y in range(height):
            for k in range(count):
                plane[y, left + k] = columns[y, k]
