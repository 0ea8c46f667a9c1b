"""What the samples of a chunk are: multiples of a number, few of the values that their dtype has, or padding."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from math import gcd, isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import row_blocks
from deepsic_codec.codec.scaled import ScaledChunk
from deepsic_codec.payload.nodata import NoData, encode_nodata
from deepsic_codec.payload.sections import Section
from deepsic_codec.payload.structure import Grid, Levels, Structure, encode_structure, nodata_on_grid

PROBE = 4096  # samples that rule out a divisor
OVERHEAD = 12  # bytes of the section and its entry in the header, about
NEIGHBOURS = 4  # levels on either side, between which gaps are measured
# A table of levels has to save this share of a bit of each sample, and its bytes this number of times.
MIN_SAVED, MIN_RATIO = 0.1, 4
PROBE_ROWS = 8  # of which two are equal if pixels are repeated
MAX_REPEATED, MIN_EDGE = 6, 16  # factor, and pixels along y and x from which repetition is looked for
MIN_PADDING = 0.03  # share of the samples
MIN_OCTAVES = 1.5  # in the mean, between steps at the edges of padding and usual differences


def without_padding(scaled: ScaledChunk, max_error: float | None) -> tuple[ScaledChunk, bytes]:
    """Return a chunk whose padding counts as no data, and that padding, coded; a chunk with NoData stays as it is."""
    padding = find_padding(scaled.samples, max_error) if scaled.nodata is None else None
    return (scaled, b"") if padding is None else (replace(scaled, nodata=padding), encode_nodata(padding))


def make_structure(levels: tuple[Levels, ...] | None, padding: bytes) -> Structure | None:
    """Return the content of the section; None without levels and padding."""
    return None if levels is None and not padding else Structure(levels, padding)


def find_padding(samples: NDArray[Any], max_error: float | None) -> NoData | None:
    """Find padding: samples (slices, height, width, bands) in large areas that hold the least or the largest value.

    `max_error` is as for `find_levels`.

    Returns
    -------
    NoData or None
        All samples of one value; None if there is none for which a mask saves bytes.
    """
    probe = samples[:, :: max(1, samples.shape[1] // 64), :: max(1, samples.shape[2] // 64)]
    for value, down in ((probe.min(), False), (probe.max(), True)):
        if np.count_nonzero(probe == value) < MIN_PADDING * probe.size:
            continue
        if value == (samples.max() if down else samples.min()):
            mask = samples == value
            if _is_padding(samples, mask, max_error):
                return NoData(value, down, mask)
    return None


def _is_padding(samples: NDArray[Any], mask: NDArray[np.bool_], max_error: float | None) -> bool:
    """Tell whether the steps at the edges of a mask cost more than the mask."""
    if mask.all():
        return False
    sums = np.zeros((2, 2))  # of differences inside, by axis: their sum and number
    for axis, differences, before, after in _steps(samples, mask):
        inside = differences[~(before | after)]
        sums[axis] += float(inside.sum()), inside.size
    usual = np.maximum(sums[:, 0] / np.maximum(sums[:, 1], 1), max(2 * (max_error or 0.0), 1e-9))
    edges, octaves = 0, 0.0
    for axis, differences, before, after in _steps(samples, mask):
        steps = differences[before != after]
        octaves += float(np.log2(np.maximum(steps / usual[axis], 1)).sum())
        edges += steps.size
    return octaves >= MIN_OCTAVES * max(edges, 1)


def _steps(
    samples: NDArray[Any], mask: NDArray[np.bool_]
) -> Iterator[tuple[int, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield, in blocks, 0 or 1 for neighbours along y or x, their absolute differences, and the masks of both."""
    wide = np.float64 if samples.dtype.kind == "f" else np.int32
    for number, rows in row_blocks(samples.shape):
        block = slice(rows.start, rows.stop + 1)  # with the row below
        values, holes = samples[number, block].astype(wide), mask[number, block]
        yield 0, np.abs(np.diff(values, axis=0)), holes[:-1], holes[1:]
        count = rows.stop - rows.start
        yield 1, np.abs(np.diff(values[:count], axis=1)), holes[:count, :-1], holes[:count, 1:]


def find_grids(samples: NDArray[Any]) -> tuple[Grid, ...]:
    """Find bands of samples (slices, height, width, bands) that are repeated pixels of coarser grids.

    Returns
    -------
    tuple of Grid
        That have all bands, but no sections; empty if no band is repeated.
    """
    if samples.dtype.kind == "f":
        samples = samples.view(np.uint32)  # NaN equals itself
    bands: dict[tuple[int, tuple[int, int]], list[int]] = {}
    for number in range(samples.shape[-1]):
        bands.setdefault(_repetition(samples[..., number]), []).append(number)
    if max(factor for factor, _ in bands) == 1:
        return ()
    return tuple(Grid(tuple(numbers), factor, phase, {}) for (factor, phase), numbers in bands.items())


def _repetition(band: NDArray[Any]) -> tuple[int, tuple[int, int]]:
    """Return by which factor pixels of a band (slices, height, width) are repeated, and the phase."""
    height, width = band.shape[1:]
    middle = band[:, height // 2 : height // 2 + PROBE_ROWS]
    if min(height, width) < MIN_EDGE or not (middle[:, 1:] == middle[:, :-1]).all(axis=(0, 2)).any():
        return 1, (0, 0)
    rows = (band[:, 1:] == band[:, :-1]).all(axis=(0, 2))
    columns = (band[:, :, 1:] == band[:, :, :-1]).all(axis=(0, 1))
    if not rows.all() or not columns.all():  # constant bands need no grid
        for factor in range(MAX_REPEATED, 1, -1):
            phases = _phase(rows, factor), _phase(columns, factor)
            if phases[0] is not None and phases[1] is not None:
                return factor, (phases[0], phases[1])
    return 1, (0, 0)


def _phase(equal: NDArray[np.bool_], factor: int) -> int | None:
    """Return the phase with which all neighbours in one pixel are equal."""
    after = np.arange(1, len(equal) + 1)
    return next((phase for phase in range(factor) if equal[(after + phase) % factor != 0].all()), None)


def on_grid(scaled: ScaledChunk, grid: Grid) -> ScaledChunk:
    """Return the samples of a grid."""
    nodata, bands = scaled.nodata, list(grid.bands)
    if nodata is not None:
        nodata = nodata_on_grid(nodata, grid)
    ranges, coded = (None if one is None else one[bands] for one in (scaled.ranges, scaled.coded_ranges))
    qualities = scaled.qualities
    if qualities is not None:
        for axis, starts in enumerate(grid.starts(*qualities.shape[1:3]), 1):
            qualities = np.maximum.reduceat(qualities, starts, axis=axis)
    return ScaledChunk(grid.thinned(scaled.samples), ranges, nodata, coded, qualities)


def join_grids(grids: Sequence[Grid], parts: Sequence[NDArray[Any]], shape: tuple[int, int, int, int]) -> NDArray[Any]:
    """Return samples of a shape (slices, height, width, bands) from those of its grids, in their order."""
    samples = np.empty(shape, parts[0].dtype)
    for grid, part in zip(grids, parts, strict=True):
        samples[..., list(grid.bands)] = grid.repeated(part, *shape[1:3])
    return samples


def fill_grids(grids: Sequence[Grid], sections: Sequence[dict[Section[Any], Any]]) -> Structure:
    """Return the content of the section for grids and the sections that hold their samples."""
    return Structure(
        None,
        grids=tuple(
            replace(grid, sections={s.kind: s.encode(content) for s, content in coded.items() if content is not None})
            for grid, coded in zip(grids, sections, strict=True)
        ),
    )


def find_levels(
    samples: NDArray[Any], mask: NDArray[np.bool_] | None, max_error: float | None
) -> tuple[Levels, ...] | None:
    """Find which values samples have.

    Parameters
    ----------
    samples : ndarray
        (slices, height, width, bands).
    mask : ndarray of bool, optional
        Broadcast to that shape: samples that are no data.
    max_error : float or None
        The bound on errors, in units of the samples; None if all are quantised with one step, whatever they are.

    Returns
    -------
    tuple of Levels or None
        None if samples are best coded as they are.
    """
    if samples.dtype.kind == "f":
        return None
    bands = [_Band(samples, mask, number) for number in range(samples.shape[-1])]
    divisors = [_divisor(band) for band in bands]
    levels = [_lattice(band, divisor) for band, divisor in zip(bands, divisors, strict=True)]
    if max_error is not None:
        bound = int(min(max_error, 65535))
        levels = [_table(band, one) or one for band, one in zip(bands, levels, strict=True)]
        if bound and any(one.gap() <= 2 * bound for one, divisor in zip(levels, divisors, strict=True) if divisor):
            # Errors remain, in one step for all bands. It has to be as wide as without a divisor.
            common = reduce(gcd, divisors)
            levels = [_lattice(band, common if 2 * (bound % max(common, 1)) < common else 1) for band in bands]
    saved = sum(band.size * np.log2(one.gap()) / 8 for band, one in zip(bands, levels, strict=True))
    tables = any(one.table is not None for one in levels)
    return tuple(levels) if tables or saved > OVERHEAD + _size(*levels) else None


def _size(*levels: Levels) -> int:
    return len(encode_structure(Structure(levels)))


class _Band:
    """The samples of a band that are data.

    Attributes
    ----------
    size : int
    first : int
        The first of them; 0 without any.
    """

    def __init__(self, samples: NDArray[Any], mask: NDArray[np.bool_] | None, number: int) -> None:
        self._samples = samples[..., number]
        self._mask = None if mask is None else mask[..., number if mask.shape[-1] > 1 else 0]
        self.size = self._samples.size if self._mask is None else self._mask.size - int(np.count_nonzero(self._mask))
        self.first = int(next(part for part in self.blocks() if part.size)[0]) if self.size else 0

    def blocks(self, step: int = 1) -> Iterator[NDArray[Any]]:
        """Yield blocks of them, of every step-th row and column."""
        samples = self._samples[:, ::step, ::step]
        mask = None if self._mask is None else self._mask[:, ::step, ::step]
        for block in row_blocks(samples.shape):
            yield samples[block].ravel() if mask is None else samples[block][~mask[block]]


def _divisor(band: _Band) -> int:
    """Return the greatest common divisor of the differences of samples; 0 if all are equal."""
    divisor = 0
    for step in (max(1, isqrt(band.size // PROBE)), 1):
        for part in band.blocks(step):
            divisor = gcd(divisor, int(np.gcd.reduce(part.astype(np.int32) - band.first, initial=0)))
            if divisor == 1:
                return 1
    return divisor


def _lattice(band: _Band, divisor: int) -> Levels:
    return Levels(divisor, band.first % divisor) if divisor > 1 and band.size else Levels()


def _table(band: _Band, lattice: Levels) -> Levels | None:
    """Return the table of the levels of a band; None if it takes more than it saves."""
    if not band.size:
        return None
    parts = [(int(part.min()), int(part.max())) for part in band.blocks() if part.size]
    low, high = min(low for low, _ in parts), max(high for _, high in parts)
    counts = np.zeros(high - low + 1, np.int64)
    for part in band.blocks():
        counts += np.bincount(part.astype(np.int32) - low, minlength=len(counts))
    values = np.flatnonzero(counts)
    counts = counts[values]
    first = np.maximum(np.arange(len(values)) - NEIGHBOURS, 0)
    last = np.minimum(np.arange(len(values)) + NEIGHBOURS, len(values) - 1)
    # Values of the lattice between levels nearby. Some are missing by chance where samples are few.
    extent = np.maximum((values[last] - values[first]) // lattice.divisor, 1)
    total = np.cumsum(counts)
    expected = extent * -np.expm1((total[first] - total[last]) / extent)
    saved = float((counts * np.maximum(np.log2(expected / np.maximum(last - first, 1) + 1e-9), 0)).sum())
    if saved < MIN_SAVED * band.size:
        return None
    levels = Levels(table=values.astype(np.int64) + low)
    return levels if saved / 8 > MIN_RATIO * _size(levels) + OVERHEAD else None
