"""Transforms of parts and of reduced images: every pixel keeps its place on Earth, also where images are turned."""

import pytest

from deepsic_codec.io.georeference import scaled, shifted

TURNED = [2.0, 3.0, 500.0, 5.0, -7.0, 900.0]


def place(transform, row, column):
    a, b, c, d, e, f = transform
    return a * column + b * row + c, d * column + e * row + f


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 0), (0, 9), (4, 9)])
def test_a_part_lies_where_it_lay(row, column):
    part = shifted(TURNED, row, column)
    for y, x in ((0, 0), (1, 0), (0, 1), (11, 13)):
        assert place(part, y, x) == place(TURNED, row + y, column + x)


def test_a_reduced_image_covers_the_same_ground():
    for y, x in ((0, 0), (1, 0), (0, 1), (11, 13)):
        assert place(scaled(TURNED, 4), y, x) == place(TURNED, 4 * y, 4 * x)
