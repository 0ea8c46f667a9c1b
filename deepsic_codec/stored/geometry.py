"""Chunks and label tiles of an array: how many there are, and which samples they cover."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Axes, Index, Region, ceil_div, chunk_region, grid_shape
from deepsic_codec.payload.labels import default_tile


@dataclass(frozen=True)
class Geometry:
    """Chunks and label tiles of an array, along each of its axes.

    Tiles are counted through the whole array. The last chunk may reach beyond the array; tiles of it that lie wholly
    outside are not counted. Padding therefore has no labels, whatever its payload says.

    Attributes
    ----------
    axes : Axes
        Letter of each axis.
    shape, chunks : tuple of int
        Shapes of the array and of a chunk, in samples.
    tile : (int, int)
        Height and width of a label tile in pixels.
    """

    axes: Axes
    shape: Index
    chunks: Index
    tile: tuple[int, int]

    @classmethod
    def of(cls, array: Any, axes: str, tile: Sequence[int] | None) -> "Geometry":
        """Return the geometry of an array; without a `tile`, with the codec's default for the chunks of the array."""
        axes = Axes(axes)
        chunks = tuple(int(size) for size in array.chunks)
        if tile is None:
            tile = default_tile(axes.height(chunks), axes.width(chunks))
        return cls(axes, tuple(int(size) for size in array.shape), chunks, (int(tile[0]), int(tile[1])))

    @cached_property
    def grid(self) -> Index:
        """Chunks along each axis."""
        return grid_shape(self.shape, self.chunks)

    @cached_property
    def steps(self) -> Index:
        """Samples that a tile covers along each axis: one slice, all bands of a chunk."""
        sizes = {"y": self.tile[0], "x": self.tile[1], "c": self.axes.bands(self.chunks)}
        return tuple(sizes.get(axis, 1) for axis in self.axes)

    @cached_property
    def per_chunk(self) -> Index:
        """Tiles of a whole chunk along each axis."""
        return grid_shape(self.chunks, self.steps)

    @cached_property
    def tile_grid(self) -> Index:
        """Tiles of the array along each axis."""
        counts = []
        for size, chunk, step, n, per in zip(
            self.shape, self.chunks, self.steps, self.grid, self.per_chunk, strict=True
        ):
            counts.append((n - 1) * per + ceil_div(size - (n - 1) * chunk, step) if n else 0)
        return tuple(counts)

    @property
    def count(self) -> int:
        """Chunks of the array."""
        return prod(self.grid)

    @property
    def one_tile(self) -> bool:
        """Whether every chunk has one label tile."""
        return prod(self.per_chunk) == 1

    def starts(self, axis: int) -> NDArray[np.int64]:
        """Return the first sample of every tile along an axis."""
        number = np.arange(self.tile_grid[axis])
        per = self.per_chunk[axis]
        return number // per * self.chunks[axis] + number % per * self.steps[axis]

    def straddles(self, axis: int) -> NDArray[np.bool_]:
        """Tell of every tile along an axis whether the array ends within it: padding then influenced its scores."""
        chunk_stop = (np.arange(self.tile_grid[axis]) // self.per_chunk[axis] + 1) * self.chunks[axis]
        return np.minimum(self.starts(axis) + self.steps[axis], chunk_stop) > self.shape[axis]

    def chunk_region(self, index: Sequence[int]) -> Region:
        """Return the samples of a chunk that lie within the array."""
        return chunk_region(index, self.chunks, self.shape)

    def tile_region(self, tile: Sequence[int]) -> Region:
        """Return the samples of a tile that lie within its chunk and the array."""
        region = []
        for axis, number in enumerate(tile):
            i, k = divmod(int(number), self.per_chunk[axis])
            start = i * self.chunks[axis] + k * self.steps[axis]
            stop = min(start + self.steps[axis], (i + 1) * self.chunks[axis], self.shape[axis])
            region.append(slice(start, stop))
        return tuple(region)

    def bounds(self, cells: NDArray[np.int64], *, tiles: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first samples of tiles or chunks, and one past their last within the array, int64 (cells, axes).

        Parameters
        ----------
        cells : ndarray
            Positions in the grid of label tiles if `tiles`, otherwise in that of chunks, int64 (cells, axes).
        tiles : bool
            What they are positions of.
        """
        chunks, shape = np.array(self.chunks), np.array(self.shape)
        if not tiles:
            return cells * chunks, np.minimum((cells + 1) * chunks, shape)
        number, inside = np.divmod(cells, np.array(self.per_chunk))
        starts = number * chunks + inside * np.array(self.steps)
        return starts, np.minimum(np.minimum(starts + np.array(self.steps), (number + 1) * chunks), shape)

    def tiles_of(self, start: Sequence[int], stop: Sequence[int]) -> Region:
        """Return the tiles of a block of chunks."""
        return tuple(
            slice(a * per, min(b * per, n))
            for a, b, per, n in zip(start, stop, self.per_chunk, self.tile_grid, strict=True)
        )

    def arrange(self, values: NDArray[Any], index: Sequence[int]) -> NDArray[Any]:
        """Bring values of a payload's tiles into the order of the array's axes, and drop tiles outside of the array.

        Values (slices, rows, columns, n), as in the label block of the chunk at `index`, become (n, tiles along each
        axis of the array).
        """
        order = self.axes.slice_axes + "yx"
        sizes = [self.per_chunk[self.axes.index(axis)] for axis in order]
        values = values.reshape(*sizes, values.shape[-1])
        values = values.transpose(len(order), *(order.index(axis) for axis in self.axes if axis != "c"))
        if self.axes.c is not None:
            values = np.expand_dims(values, 1 + self.axes.c)
        tiles = self.tiles_of(index, [i + 1 for i in index])
        return values[(slice(None), *(slice(part.stop - part.start) for part in tiles))]

    def any_tile(self, hits: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Reduce a block of tiles (that starts with a chunk) to its chunks: whether one of the tiles is True."""
        return any_of(hits, self.per_chunk)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Repeat values of all chunks for their tiles."""
        for axis, per in enumerate(self.per_chunk):
            if per > 1:
                values = np.repeat(values, per, axis=axis)
        return values[tuple(slice(n) for n in self.tile_grid)]

    def to_json(self) -> dict[str, Any]:
        """Return what an index says of the array that it was made for."""
        return {
            "axes": self.axes,
            "shape": list(self.shape),
            "chunks": list(self.chunks),
            "tile_shape": list(self.tile),
        }


def any_of(flags: NDArray[np.bool_], block: Sequence[int]) -> NDArray[np.bool_]:
    """Reduce an array to blocks of this shape, the last ones perhaps smaller: whether one of the cells is True."""
    words = {2: np.uint16, 4: np.uint32, 8: np.uint64}
    for axis, size in enumerate(block):
        length = flags.shape[axis]
        if size == 1 or not length:
            continue
        # Along the innermost axis numpy goes cell by cell; reading `size` bytes as one number is 20 times as fast.
        inner = flags.flags.c_contiguous and prod(flags.shape[axis + 1 :]) == 1
        if inner and size in words and length % size == 0:
            merged = flags.reshape(-1, length).view(words[size]) != 0
            flags = merged.reshape(*flags.shape[:axis], length // size, *flags.shape[axis + 1 :])
            continue
        rows = np.moveaxis(flags, axis, 0)
        result = np.zeros((ceil_div(length, size), *rows.shape[1:]), np.bool_)
        for offset in range(min(size, length)):
            part = rows[offset::size]
            result[: len(part)] |= part
        flags = np.moveaxis(result, 0, axis)
    return flags
