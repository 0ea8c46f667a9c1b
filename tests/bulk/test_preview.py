"""Arrays at a reduced size: the same as of the whole, from a part of the bytes."""

import numpy as np
import pytest
import zarr

import deepsic_codec.dask
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


@pytest.mark.parametrize("layout", [{}, {"shards": (512, 512, 2)}], ids=str)
def test_bytes_of_each_chunk_are_limited(tmp_path, layout):
    data = scene(512, 512, 2)
    array = create_array(str(tmp_path / "a.zarr"), data=data, chunks=(256, 256, 2), codec=codec(), **layout)
    sizes, errors = [], []
    for limit in (1, 5_000, 20_000, 10**9):
        counter = Counter()
        found = read_preview(tmp_path / "a.zarr", bytes_per_chunk=limit, counter=counter)
        assert found.shape == data.shape
        sizes.append(counter.bytes)
        errors.append(np.square(found.astype(int) - array[...]).mean())
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert sizes == sorted(sizes) and sizes[1] < 4 * 6_500 + 2_000 and sizes[2] < 4 * 21_500 + 2_000
    parts = [[codec().decode_preview(codec().encode(part)[:5_000], 2) for part in row] for row in _parts(data)]
    np.testing.assert_array_equal(
        read_preview(array, scale=2, bytes_per_chunk=5_000), np.block([[[p] for p in row] for row in parts])
    )
    for wrong in (0, -1, 1.5, "9"):
        check_rejects(ConfigurationError, "bytes_per_chunk", read_preview, array, bytes_per_chunk=wrong)


def test_groups_of_each_chunk_are_limited(tmp_path):
    data = scene(512, 512, 2)
    array = create_array(str(tmp_path / "a.zarr"), data=data, chunks=(256, 256, 2), codec=codec())
    sizes, errors = [], []
    for groups in (1, 4, 10, 1000):
        counter = Counter()
        found = read_preview(tmp_path / "a.zarr", groups=groups, counter=counter)
        assert found.shape == data.shape
        sizes.append(counter.bytes)
        errors.append(np.square(found.astype(int) - array[...]).mean())
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 and len(set(errors)) == 4
    assert sizes == sorted(sizes) and sizes[0] < 0.02 * sizes[-1] + 8000
    assert read_preview(array, scale=8, groups=3).shape == (64, 64, 2)
    for wrong in (0, -1, 1.5, "9", True):
        check_rejects(ConfigurationError, "groups", read_preview, array, groups=wrong)


def test_bands_of_several_resolutions_are_read_from_their_starts(tmp_path):
    data = scene(512, 512, 3)
    data[..., 2] = data[::2, ::2, 2].repeat(2, 0).repeat(2, 1)
    array = create_array(str(tmp_path / "a.zarr"), data=data, chunks=(256, 256, 3), codec=codec())
    counter = Counter()
    found = read_preview(tmp_path / "a.zarr", scale=8, counter=counter)
    parts = [[codec().decode_preview(codec().encode(part)) for part in row] for row in _parts(data)]
    np.testing.assert_array_equal(found, np.block([[[part] for part in row] for row in parts]))
    assert counter.bytes < 0.1 * array.nbytes_stored() + 8000 and counter.requests <= 13


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


def test_regions_and_dask_read_the_chunks_that_they_need(tmp_path):
    data = scene(512, 512, 2)
    create_array(tmp_path / "a.zarr", data=data, chunks=(256, 256, 2), codec=codec())
    whole = read_preview(tmp_path / "a.zarr", scale=4)
    every, counter = Counter(), Counter()
    read_preview(tmp_path / "a.zarr", scale=4, counter=every)
    part = read_preview(tmp_path / "a.zarr", scale=4, region=(slice(8, 200), slice(256, 511)), counter=counter)
    np.testing.assert_array_equal(part, whole[2:50, 64:128])
    assert counter.bytes < 0.4 * every.bytes
    for options in ({}, {"chunks": (50, 128, 1)}, {"batch_size": 1}):
        lazy = deepsic_codec.dask.open(tmp_path / "a.zarr", scale=4, **options)
        np.testing.assert_array_equal(lazy.compute(), whole)
        np.testing.assert_array_equal(lazy[5:9, ::-7, 1].compute(), whole[5:9, ::-7, 1])
    assert deepsic_codec.dask.open(tmp_path / "a.zarr", scale=4, batch_size=1).chunks == ((64, 64), (64, 64), (2,))
    limits = {"scale": 4, "groups": 1}
    coarse = read_preview(tmp_path / "a.zarr", **limits)
    assert (coarse != whole).any()
    np.testing.assert_array_equal(deepsic_codec.dask.open(tmp_path / "a.zarr", **limits).compute(), coarse)
    limits = {"bytes_per_chunk": 3000}
    np.testing.assert_array_equal(
        deepsic_codec.dask.open(tmp_path / "a.zarr", **limits).compute(), read_preview(tmp_path / "a.zarr", **limits)
    )
    for region in ((slice(2, 9),), (slice(0, 9, 2),), (3,), (slice(None),) * 4, slice(0, 8), 3):
        check_rejects(ConfigurationError, "region", read_preview, tmp_path / "a.zarr", scale=4, region=region)


def test_xarray_shows_previews(tmp_path):
    xarray = pytest.importorskip("xarray")
    import deepsic_codec.xarray  # noqa: F401

    data = scene(2, 300, 270)
    image = xarray.DataArray(data, dims=("time", "y", "x"), coords={"y": np.arange(300.0), "x": np.arange(270) * 2.0})
    deepsic_codec.dask.store(image, tmp_path, name="image", chunks=(1, 128, 128), codec=codec(axes="tyx"))
    with xarray.open_zarr(tmp_path, consolidated=False) as dataset:
        small = dataset.deepsic.preview(scale=4)["image"]
        assert small.dims == image.dims and small.x.values.tolist() == (np.arange(67) * 8.0).tolist()
        np.testing.assert_array_equal(small.values, read_preview(tmp_path, "image", scale=4))
        coarse = dataset.deepsic.preview(2, bytes_per_chunk=700, groups=1)["image"]
        np.testing.assert_array_equal(coarse.values, read_preview(tmp_path, "image", scale=2, groups=1))
        assert small.chunks is not None
        check_rejects(UnsupportedArray, "no variable", xarray.Dataset().deepsic.preview)
