"""Arrays at a reduced size: the same as of the whole, from a part of the bytes."""

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, create_array, read_preview
from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray
from deepsic_codec.stored.location import Counter
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")


def scene(*shape):
    noise = np.random.default_rng(0).integers(0, 900, shape)
    return (photograph(*shape).astype("i4") * 60 + noise).astype("u2")


def codec(**options):
    return DeepSIC(transform="wavelet", semantics="none", rmse=30, **options)


@pytest.mark.parametrize("layout", [{"zarr_format": 2}, {}, {"shards": (512, 512, 2)}], ids=str)
def test_a_part_of_the_bytes_is_read(tmp_path, layout):
    data = scene(512, 512, 2)
    array = create_array(str(tmp_path / "a.zarr"), data=data, chunks=(256, 256, 2), codec=codec(), **layout)
    wanted = np.block([[[codec().decode_preview(codec().encode(part))] for part in row] for row in _parts(data)])
    counter = Counter()
    found = read_preview(tmp_path / "a.zarr", scale=8, counter=counter)
    assert found.dtype == data.dtype and found.shape == (64, 64, 2)
    np.testing.assert_array_equal(found, wanted)
    assert counter.bytes < 0.06 * array.nbytes_stored() + 8000 and counter.requests <= 13


def _parts(data):
    return [[data[y : y + 256, x : x + 256] for x in (0, 256)] for y in (0, 256)]


def test_ends_slices_and_missing_chunks(tmp_path):
    data = scene(2, 100, 135)
    array = create_array(
        tmp_path / "a.zarr", shape=data.shape, dtype="u2", chunks=(1, 64, 64), codec=codec(axes="tyx"), fill_value=7
    )
    array[0] = data[0]
    array[1, :64, :64] = data[1, :64, :64]
    found = read_preview(array, scale=4)
    assert found.shape == (2, 25, 33)  # 135 / 4, without the pixels beside those that fill the chunk up
    whole = np.stack([plane[::4, ::4] for plane in data])[:, :25, :33].astype(int)
    assert np.abs(found[0] - whole[0]).mean() < 700
    assert (found[1, 16:] == 7).all() and (found[1, :, 16:] == 7).all() and (found[1, :16, :16] != 7).all()
    assert read_preview(array, scale=1).shape == data.shape
    np.testing.assert_array_equal(read_preview(array, scale=1), array[...])


def test_one_chunk_of_any_size(tmp_path):
    array = create_array(tmp_path / "a.zarr", data=scene(75, 93), chunks=(75, 93), codec=codec(axes="yx"))
    assert read_preview(array, scale=16).shape == (5, 6)


def test_what_cannot_be_read(tmp_path):
    array = create_array(tmp_path / "a.zarr", data=scene(300, 300), chunks=(150, 150), codec=codec(axes="yx"))
    check_rejects(UnsupportedArray, "8 does not divide chunks of (150, 150)", read_preview, array)
    check_rejects(ConfigurationError, "scale", read_preview, array, scale=5)
    path = tmp_path / "a.zarr" / "c" / "0" / "1"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 50] ^= 1
    path.write_bytes(bytes(damaged))
    check_rejects(CorruptPayload, "chunk (0, 1)", read_preview, array, scale=2)
    plain = zarr.create_array(tmp_path / "b.zarr", shape=(8, 8), dtype="u1")
    with pytest.raises(Exception, match="deepsic|DeepSIC"):
        read_preview(plain)
