"""The wavelet transform of planes of integers: CDF 9/7, by lifting, in integers.

Each level splits a plane into a low band of half its size and three bands of horizontal, vertical and diagonal detail;
the next level splits the low band. Planes of any size have bands, without padding. The inverse undoes each step of the
transform, but for the rounding of the scale of low bands. `docs/wavelet.md` is normative.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import inner, int32, jit

MAX_LEVELS, MIN_EDGE = 6, 12  # a plane with a shorter edge is not split
#: Steps of lifting in 2^-LIFT_BITS, and in 2^-SCALE_BITS the scale of low bands. A constant plane keeps its value, and
#: has no detail: the third step is chosen for that, and with fewer bits a large constant would have some.
LIFT_BITS, SCALE_BITS = 24, 24
LIFTING = (-26610918, -888859, 14812789, 7440810)
SCALE_LOW, UNSCALE_LOW = 13638083, 20638896
_HALF = 1 << (LIFT_BITS - 1)
#: Rows that are transformed at a time, a power of 2.
ROWS = 8
_LAST = ROWS - 1
#: The even columns of a row, in a multiple of `BLOCK` places, lie in front of the odd ones; mirrored ones in the gap.
BLOCK, GAP = 32, 16
#: Sums of neighbours fit 32 bits within a level whose coefficients are below this: lifting multiplies them by 124.
WIDE = 1 << 22

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
    bands = plane.astype(np.int32, order="C")
    split(bands)
    return bands


def split(plane: NDArray[Any]) -> int:
    """Transform a plane int32 or int16 in C order as `forward` does, in place.

    Returns the largest magnitude of what was written. Where int16 is too narrow for it, the plane is lost.
    """
    levels = max_halvings(*plane.shape)
    return _split(plane, *_memory(plane), levels, _largest(plane)) if levels else 0


def max_halvings(height: int, width: int) -> int:
    """Return how often a plane is split."""
    return len(list(_sizes(height, width))) - 1


def inverse(bands: NDArray[np.int32], halvings: int = 0) -> NDArray[np.int32]:
    """Undo `forward` for a transformed plane (height, width), which is overwritten.

    With `halvings`, the low band of that level is returned, a view: the plane at a half, a quarter, ... of its size.
    Sums wrap around modulo 2^32, so that damaged coefficients give some plane.
    """
    join(bands, halvings)
    height, width = list(_sizes(*bands.shape))[halvings]
    return bands[:height, :width]


def join(bands: NDArray[Any], halvings: int = 0) -> int:
    """Undo `split`, or all but some of the halvings."""
    levels = max_halvings(*bands.shape)
    return _join(bands, *_memory(bands), levels, halvings, _largest(bands)) if levels > halvings else 0


def _memory(plane: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Return memory for rows of a plane that are transformed, and for half of the plane."""
    height, width = plane.shape
    return np.zeros((ROWS, width + 2 * (BLOCK + GAP)), np.int32), np.empty(((height + 1) // 2, width), plane.dtype)


def _largest(plane: NDArray[Any]) -> int:
    """Return the largest magnitude of a plane, or 0 where it cannot matter."""
    return 0 if plane.dtype == np.int16 else max(-int(plane.min()), int(plane.max()))


# In compiled code, integers of one type only, and loops in place of assignments to slices: each literal makes a
# function of its own, and an assignment to a slice compiles the text of its error, for seconds.
@inner
def _lift(row, above, below, step, half, wide):
    """Add to a row the sum of its neighbours times a step below 2^31, in 2^-LIFT_BITS.

    The sum has 33 bits; with `wide`, 2^32 times the step makes up for the bit that 32 bits do not hold.
    """
    factor = np.int64(int32(step))
    if wide:
        for k in range(row.size):
            total = int32(np.int64(above[k]) + below[k])
            over = int32(int32(above[k] ^ total) & int32(below[k] ^ total)) >> int32(31)
            sign = above[k] >> int32(31)
            lost = int32(over) & int32(int32(int32(step << (32 - LIFT_BITS)) ^ int32(sign)) - int32(sign))
            row[k] += int32(int32(lost) + int32((np.int64(total) * factor + half) >> LIFT_BITS))
    else:
        for k in range(row.size):
            total = int32(np.int64(above[k]) + below[k])
            row[k] += int32((np.int64(total) * factor + half) >> LIFT_BITS)


@inner
def _scale(row, factor):
    """Multiply a row by a factor below 2^31, in 2^-SCALE_BITS."""
    for k in range(row.size):
        row[k] = int32((np.int64(row[k]) * np.int64(int32(factor)) + (1 << (SCALE_BITS - 1))) >> SCALE_BITS)


@inner
def _copy(target, source):
    """Copy integers; return their largest magnitude."""
    low, high = int32(0), int32(0)
    for k in range(target.size):
        value = int32(source[k])
        low, high = min(low, value), max(high, value)
        target[k] = value
    return max(-np.int64(low), np.int64(high))


@inner
def _take_apart(line, source, even, start):
    """Copy a row, its even columns to the front and its odd ones to column `start`."""
    count = source.size - even
    first, second = line[:count], line[start : start + count]
    for k in range(count):
        first[k] = source[2 * k]
        second[k] = source[2 * k + 1]
    if even > count:
        line[count] = source[source.size - 1]


@inner
def _put_together(target, line, even, start):
    """Undo `_take_apart`; return the largest magnitude."""
    count = target.size - even
    first, second = line[:count], line[start : start + count]
    low = high = line[0] if even == count else line[count]
    for k in range(count):
        one, other = first[k], second[k]
        low, high = min(low, min(one, other)), max(high, max(one, other))
        target[2 * k] = one
        target[2 * k + 1] = other
    if even > count:
        target[target.size - 1] = line[count]
    return max(-np.int64(low), np.int64(high))


@inner
def _lift_row(rows, row, height, used, step, half, wide):
    """Lift a row by those above and below, mirrored at the ends of the plane; no row beyond the plane."""
    if 0 <= row < height:
        above = row - 1 if row > 0 else 1
        below = row + 1 if row + 1 < height else row - 1
        _lift(rows[row & _LAST][:used], rows[above & _LAST], rows[below & _LAST], step, half, wide)


@inner
def _lift_odd(line, even, start, step, half, wide):
    """Lift the odd columns of a row by the even ones beside them, mirrored at the ends."""
    line[even] = line[even - 1]
    _lift(line[start : 2 * start - GAP], line, line[1:], step, half, wide)


@inner
def _lift_even(line, odd, start, step, half, wide):
    """Lift the even columns of a row by the odd ones beside them, mirrored at the ends."""
    line[start - 1] = line[start]
    line[start + odd] = line[start + odd - 1]
    _lift(line[: start - GAP], line[start - 1 :], line[start:], step, half, wide)


@inner
def _split_level(plane, rows, lower, height, width, wide):
    """Split the upper left part of a plane; return the largest magnitude of its bands."""
    half, even, largest = (height + 1) // 2, (width + 1) // 2, np.int64(0)
    odd, start = width - even, (even + BLOCK - 1) // BLOCK * BLOCK + GAP
    used = 2 * start - GAP
    for top in range(0, height + 5, 2):  # two more rows come, and up to five rows earlier two are ready
        for row in range(top, min(top + 2, height)):
            _take_apart(rows[row & _LAST], plane[row][:width], even, start)
        for n in range(4):
            _lift_row(rows, top - 1 - n, height, used, np.int64(LIFTING[n]), np.int64(_HALF), wide)
        first, end = max(0, top - 5), min(top - 3, height)
        if 4 <= top < height + 4:
            _scale(rows[(top - 4) & _LAST][:used], np.int64(SCALE_LOW))
        for n in range(0, 4, 2):  # in turn, because a step has to wait for the one before it
            for row in range(first, end):
                _lift_odd(rows[row & _LAST], even, start, np.int64(LIFTING[n]), np.int64(_HALF), wide)
            for row in range(first, end):
                _lift_even(rows[row & _LAST], odd, start, np.int64(LIFTING[n + 1]), np.int64(_HALF), wide)
        for row in range(first, end):
            line, target = rows[row & _LAST], lower[row >> 1] if row & 1 else plane[row >> 1]
            _scale(line[: start - GAP], np.int64(SCALE_LOW))
            largest = max(largest, _copy(target[:even], line))
            largest = max(largest, _copy(target[even:width], line[start:]))
    for row in range(half, height):
        _copy(plane[row][:width], lower[row - half])
    return largest


@inner
def _join_level(plane, rows, upper, height, width, wide):
    """Undo `_split_level`; return the largest magnitude of the plane."""
    half, even, largest = (height + 1) // 2, (width + 1) // 2, np.int64(0)
    odd, start = width - even, (even + BLOCK - 1) // BLOCK * BLOCK + GAP
    used = 2 * start - GAP
    for row in range(half):
        _copy(upper[row][:width], plane[row])
    for top in range(0, height + 4, 2):
        end = min(top + 2, height)
        for row in range(top, end):
            line, source = rows[row & _LAST], plane[half + (row >> 1)] if row & 1 else upper[row >> 1]
            _copy(line[:even], source)
            _copy(line[start : start + odd], source[even:])
            _scale(line[: start - GAP], np.int64(UNSCALE_LOW))
        for n in range(3, 0, -2):
            for row in range(top, end):
                _lift_even(rows[row & _LAST], odd, start, np.int64(-LIFTING[n]), np.int64(_HALF - 1), wide)
            for row in range(top, end):
                _lift_odd(rows[row & _LAST], even, start, np.int64(-LIFTING[n - 1]), np.int64(_HALF - 1), wide)
        if top < height:
            _scale(rows[top & _LAST][:used], np.int64(UNSCALE_LOW))
        for n in range(4):
            _lift_row(rows, top - n, height, used, np.int64(-LIFTING[3 - n]), np.int64(_HALF - 1), wide)
        for row in range(max(0, top - 4), min(top - 2, height)):
            largest = max(largest, _put_together(plane[row][:width], rows[row & _LAST], even, start))
    return largest


@jit
def _split(plane, rows, lower, levels, largest):
    """Split a plane in place, whose largest magnitude is known; return that of its bands.

    `rows` is memory for the rows in work, `lower` for those of the lower half, whose places others have yet to leave.
    """
    for level in range(levels):
        height, width = ((plane.shape[0] - 1) >> level) + 1, ((plane.shape[1] - 1) >> level) + 1
        largest = max(largest, _split_level(plane, rows, lower, height, width, largest >= WIDE))
    return largest


@jit
def _join(plane, rows, upper, levels, halvings, largest):
    """Undo all of `levels` but `halvings`, as `_split` does; `upper` is memory for the rows of the upper half."""
    for level in range(levels - 1, halvings - 1, -1):
        height, width = ((plane.shape[0] - 1) >> level) + 1, ((plane.shape[1] - 1) >> level) + 1
        largest = max(largest, _join_level(plane, rows, upper, height, width, largest >= WIDE))
    return largest
