import json

import numpy as np
import pytest

from deepsic_codec.axes import Axes, ceil_div, chunk_region, chunks_covering, grid_shape, iter_grid


def test_axes_are_the_string_that_metadata_has():
    assert json.dumps({"axes": Axes("tyxc")}) == '{"axes": "tyxc"}'
    assert Axes("yx") == "yx"


def test_sizes_by_axis():
    axes, shape = Axes("tczyx"), (2, 4, 3, 50, 70)
    assert (axes.y, axes.x, axes.c) == (3, 4, 1)
    assert (axes.height(shape), axes.width(shape), axes.bands(shape)) == (50, 70, 4)
    assert axes.slice_axes == "tz"
    assert axes.slice_shape(shape) == (2, 3)
    assert axes.slices(shape) == 6
    assert axes.pixels(shape) == 6 * 50 * 70
    assert axes.sizes(shape) == {"t": 2, "c": 4, "z": 3, "y": 50, "x": 70}


def test_an_array_without_bands_or_slices_has_one_of_each():
    axes = Axes("xy")
    assert axes.c is None
    assert (axes.bands((5, 6)), axes.slices((5, 6)), axes.height((5, 6))) == (1, 1, 6)


@pytest.mark.parametrize("axes", ["yx", "xy", "yxc", "cyx", "tcyx", "ctzxy", "nyxct"])
def test_samples_and_back(axes):
    axes = Axes(axes)
    array = np.arange(np.prod(range(2, 2 + len(axes)))).reshape(range(2, 2 + len(axes)))
    samples = axes.to_samples(array)
    shape = array.shape
    assert samples.shape == (axes.slices(shape), axes.height(shape), axes.width(shape), axes.bands(shape))
    position = dict.fromkeys(axes, 0) | {"y": 1, "x": 1}
    assert samples[0, 1, 1, 0] == array[tuple(position[axis] for axis in axes)]
    assert np.array_equal(axes.from_samples(samples, shape), array)


def test_slices_are_counted_in_the_order_of_the_array():
    array = np.zeros((3, 1, 2, 1), int)
    array[2, 0, 1, 0] = 7
    assert Axes("zytx").to_samples(array)[2 * 2 + 1, 0, 0, 0] == 7


def test_ceil_div():
    assert [ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_grid_of_chunks():
    assert grid_shape((10, 8, 0), (4, 4, 4)) == (3, 2, 0)
    assert chunk_region((2, 1), (4, 4), (10, 8)) == (slice(8, 10), slice(4, 8))
    assert chunks_covering((slice(3, 9), slice(4, 8)), (4, 4)) == ((0, 1), (3, 2))
    assert list(iter_grid((0, 1), (2, 3))) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert list(iter_grid((), ())) == [()]
