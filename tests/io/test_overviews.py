"""An array that stores one size as an image pyramid."""

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, create_array, read_preview
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io.overviews import open_overviews
from tests.common import check_rejects

CODEC = {"semantics": "none", "max_error": 0}


def test_levels_are_previews_of_the_array(tmp_path):
    values = np.random.default_rng(0).integers(0, 999, (70, 150, 2)).astype(">u2")
    attributes = {"crs": "EPSG:32632", "transform": [10.0, 0.0, 500.0, 0.0, -10.0, 900.0]}
    codec = DeepSIC(axes="yxc", **CODEC)
    create_array(tmp_path, name="a", data=values, chunks=(32, 64, 2), codec=codec, attributes=attributes)
    group = open_overviews(tmp_path, smallest=40)
    levels = [group[str(number)] for number in range(3)]
    assert "3" not in group and [level.shape for level in levels] == [(2, 70, 150), (2, 35, 75), (2, 17, 37)]
    assert [level.chunks for level in levels] == [(2, 32, 64), (2, 16, 32), (2, 8, 16)]
    for number, level in enumerate(levels):
        expected = read_preview(tmp_path, name="a", scale=2**number)
        np.testing.assert_array_equal(level[...], np.moveaxis(expected, -1, 0))
        assert level[1, 3, -1] == expected[3, -1, 1] and level.attrs["transform"][0] == 10.0 * 2**number
    image = group.attrs["ome"]["multiscales"][0]
    assert [axis["name"] for axis in image["axes"]] == ["c", "y", "x"]
    assert [one["path"] for one in image["datasets"]] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="read-only"):
        levels[0][0, 0, 0] = 1


def test_parts_of_chunks_are_read_by_bytes(tmp_path):
    """As codecs such as that of shards ask for them."""
    from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    create_array(
        tmp_path, data=np.arange(64, dtype="u1").reshape(8, 8), chunks=(8, 8), codec=DeepSIC(axes="yx", **CODEC)
    )
    store = open_overviews(tmp_path).store

    def read(part):
        return sync(store.get("0/c/0/0", default_buffer_prototype(), part)).to_bytes()

    whole = bytes(range(64))
    assert read(None) == whole and read(RangeByteRequest(3, 9)) == whole[3:9]
    assert read(OffsetByteRequest(60)) == whole[60:] and read(SuffixByteRequest(5)) == whole[-5:]
    assert sync(store.exists("0/c/0/0")) and not sync(store.exists("7/zarr.json"))


def test_axes_that_pyramids_do_not_have(tmp_path):
    values = np.zeros((2, 8, 8), "u1")
    create_array(tmp_path, data=values, chunks=(1, 8, 8), codec=DeepSIC(axes="nyx", **CODEC))
    check_rejects(UnsupportedArray, "no axis n", open_overviews, tmp_path)
    assert isinstance(zarr.open(tmp_path, mode="r"), zarr.Array)
