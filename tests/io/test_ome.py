"""Levels of a pyramid: where they lie on Earth and in the image (`tests/ecosystem/test_ome.py` reads written ones)."""

import dask.array as da
import numpy as np
import pytest

from deepsic_codec.io.images import ImageSource
from deepsic_codec.io.ome import describe, pyramid


def test_every_level_has_pixels_twice_as_large():
    attributes = {"transform": [10, 1, 500, 2, -10, 900], "crs": "EPSG:32632"}
    source = ImageSource("image", da.zeros((3, 100, 70), "u1"), "cyx", attributes)
    levels = pyramid(source, 16)
    assert [level.values.shape[1:] for level in levels] == [(100, 70), (50, 35), (25, 18), (13, 9)]
    for number, level in enumerate(levels):
        size = 2**number
        assert level.attributes["transform"] == [10 * size, size, 500, 2 * size, -10 * size, 900]
        assert level.attributes["crs"] == "EPSG:32632"
    assert source.attributes == attributes


def test_every_level_says_where_its_first_pixel_lies():
    levels = [np.empty((1, n, n), "u2") for n in (64, 32, 16, 8)]
    (image,) = describe("image", levels, "cyx")["ome"]["multiscales"]
    for number, dataset in enumerate(image["datasets"]):
        scale, *translation = dataset["coordinateTransformations"]
        assert dataset["path"] == str(number) and scale["scale"] == [1, 2.0**number, 2.0**number]
        expected = [0, *[pytest.approx(np.arange(2**number).mean())] * 2]
        assert [one["translation"] for one in translation] == ([expected] if number else [])
