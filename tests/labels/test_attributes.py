"""Chunk attributes: the figures that are reported of a payload."""

import numpy as np
import pytest

from deepsic_codec import chunk_attrs
from tests.labels.common import archive, payload, put

pytestmark = pytest.mark.usefixtures("stub")


@pytest.mark.parametrize(
    "axes,shape,slices", [("yxc", (128, 192, 3), 1), ("tyxc", (5, 128, 192, 3), 5), ("zcytx", (2, 3, 128, 4, 192), 8)]
)
def test_bits_per_pixel_are_those_of_all_slices(axes, shape, slices):
    array = archive(shape=shape, chunks=shape, axes=axes)
    data = payload(array, np.zeros((slices, 2, 3, 4), "u1"))
    index = (0,) * len(shape)
    put(array, index, data)
    attributes = chunk_attrs(array, index)
    assert attributes["nbytes"] == len(data)
    assert attributes["bpp"] == pytest.approx(8 * len(data) / (slices * 128 * 192))
