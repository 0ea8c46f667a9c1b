"""Chunks and label tiles: every sample of an array lies in one tile, and no tile leaves its chunk."""

import numpy as np
import pytest

from deepsic_codec.axes import Axes
from deepsic_codec.stored.geometry import Geometry

ARRAYS = pytest.mark.parametrize(
    "axes,shape,chunks,tile",
    [
        ("yxc", (7, 10, 3), (4, 5, 3), (2, 3)),  # a tile divides a chunk along neither axis, or along one
        ("yx", (9, 8), (8, 8), (3, 8)),
        ("tyxc", (2, 5, 7, 4), (2, 3, 3, 2), (2, 2)),
        ("cxy", (2, 6, 6), (1, 4, 6), (4, 3)),
        ("yx", (5, 5), (8, 8), (16, 16)),  # a chunk and a tile beyond the array
    ],
)


@ARRAYS
def test_tiles_part_the_array(axes, shape, chunks, tile):
    geometry = Geometry(Axes(axes), shape, chunks, tile)
    seen = np.zeros(shape, int)
    for position in np.ndindex(*geometry.tile_grid):
        region = geometry.tile_region(position)
        seen[region] += 1
        chunk = tuple(part.start // size for part, size in zip(region, chunks, strict=True))
        for part, whole, inside in zip(
            region, geometry.chunk_region(chunk), geometry.tiles_of(chunk, [i + 1 for i in chunk]), strict=True
        ):
            assert whole.start <= part.start < part.stop <= whole.stop
            assert 0 <= inside.start < inside.stop
        starts = [geometry.starts(axis)[number] for axis, number in enumerate(position)]
        assert starts == [part.start for part in region]
    assert (seen == 1).all()


@ARRAYS
def test_tiles_straddle_where_the_last_chunk_is_padded(axes, shape, chunks, tile):
    geometry = Geometry(Axes(axes), shape, chunks, tile)
    for axis, (size, chunk, per) in enumerate(zip(shape, chunks, geometry.per_chunk, strict=True)):
        padding = np.arange(size, geometry.grid[axis] * chunk)
        padded = padding // chunk * per + padding % chunk // geometry.steps[axis]
        assert np.flatnonzero(geometry.straddles(axis)).tolist() == sorted(
            {*padded} & {*range(geometry.tile_grid[axis])}
        )
