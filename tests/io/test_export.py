import json
import os

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepsic_codec import DeepSIC, create_array
from deepsic_codec.codec import chunk
from deepsic_codec.errors import ConfigurationError, MissingPackage, UnsupportedArray, WriteError
from deepsic_codec.io import export as module
from deepsic_codec.io.export import export
from tests.common import check_rejects, photograph, run_python


@pytest.fixture
def image(stub, monkeypatch):
    """An image in 12 chunks, copied one row of chunks or less at a time."""
    monkeypatch.setattr(module, "BLOCK", 2 * 64 * 64 * 3)
    attributes = {"crs": "EPSG:32632", "transform": [10.0, 0.0, 500000.0, 0.0, -10.0, 4600000.0], "title": "x"}
    return create_array({}, data=photograph(180, 200, 3), chunks=(64, 64, 3), attributes=attributes)


@pytest.mark.parametrize("codec", ["blosc", "none"])
@pytest.mark.parametrize("zarr_format", [2, 3, None])
def test_zarr_holds_the_same_and_needs_no_package(image, tmp_path, codec, zarr_format):
    steps = []
    done = export(image, tmp_path / "a.zarr", codec=codec, zarr_format=zarr_format, progress=lambda *n: steps.append(n))
    copy = zarr.open_array(tmp_path / "a.zarr/image", mode="r")
    np.testing.assert_array_equal(copy[...], image[...])
    assert copy.metadata.zarr_format == (zarr_format or 3) and copy.chunks == (64, 64, 3)
    assert copy.attrs["title"] == "x" and "deepsic" not in copy.attrs
    assert (done.kind, done.shape, done.chunks, done.left_out) == ("zarr", (180, 200, 3), 12, 0)
    assert steps[0] == (0, 6) and steps[-1] == (6, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    stored = sum(path.stat().st_size for path in (tmp_path / "a.zarr").rglob("[0-9]*") if path.is_file())
    assert (stored >= done.nbytes) == (codec == "none")
    if zarr_format != 2:
        code = f"""
            import sys, zarr
            sys.modules["deepsic_codec"] = None
            print(zarr.open_array({str(tmp_path / "a.zarr/image")!r}, mode="r")[100, 100].tolist())
        """
        assert json.loads(run_python(code)) == image[100, 100].tolist()


@settings(max_examples=25)
@given(st.data())
def test_any_region(data):
    from tests import stub_runtime

    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stub_runtime.modules().items():
            patch.setitem(__import__("sys").modules, name, stub)
        patch.setattr(chunk, "transform_of", stub_runtime.transform_of)
        patch.setattr(module, "BLOCK", data.draw(st.sampled_from([1, 20_000, 1 << 24])))
        values = photograph(3, 70, 90)
        array = create_array({}, data=values, chunks=(2, 32, 32), codec=DeepSIC(axes="tyx"))
        region = {}
        for axis, size in zip("tyx", values.shape, strict=True):
            start = data.draw(st.integers(0, size - 1))
            region[axis] = slice(start, data.draw(st.integers(start + 1, size)))
        target = data.draw(st.sampled_from([2, 3]))
        store = f"memory://export-{os.urandom(6).hex()}"
        export(array, store, region=region, zarr_format=target)
        np.testing.assert_array_equal(zarr.open_array(f"{store}/image", mode="r")[...], values[tuple(region.values())])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("full")], ids=str)
def test_an_export_that_fails_leaves_nothing(image, tmp_path, error):
    def stop(done, total):
        if done == 4:
            (partial,) = tmp_path.iterdir()
            assert partial.name.startswith(".a.zarr.") and list((partial / "image" / "c").rglob("*"))
            assert not list(partial.rglob("zarr.json"))  # no reader takes it for an array
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
        export(image, tmp_path / "a.zarr", progress=stop)
    assert not list(tmp_path.iterdir())
    export(image, tmp_path / "a.zarr")
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a.zarr/image", mode="r")[...], image[...])
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_killed_process_leaves_nothing_that_looks_complete(tmp_path):
    """With the model itself, in processes of their own."""
    from deepsic_codec.samples import drone_frame

    source = create_array(tmp_path / "s.zarr", name="img", data=drone_frame()[:128, :256], chunks=(64, 64, 3))
    code = f"""
        import os
        import deepsic_codec.io.export as module
        module.BLOCK = 64 * 64 * 3
        last = None
        done = module.export({str(tmp_path / "s.zarr")!r}, {str(tmp_path / "t.zarr")!r},
                             progress=lambda done, total: os._exit(0) if done == last else None)
        print(done.chunks)
    """
    assert run_python(code.replace("last = None", "last = 5")) == ""
    assert not (tmp_path / "t.zarr").exists()
    (partial,) = tmp_path.glob(".t.zarr.*")
    with pytest.raises(FileNotFoundError):
        zarr.open(partial, mode="r")
    assert run_python(code) == "8\n"
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "t.zarr/img", mode="r")[...], source[...])
    assert not partial.exists()


def test_remote_targets_get_their_metadata_last(image):
    import fsspec

    target = f"memory://bucket-{os.urandom(6).hex()}/a.zarr"
    files = fsspec.filesystem("memory")
    seen = []
    done = export(
        image, target, progress=lambda *step: seen.append(any("zarr.json" in file for file in files.find(target)))
    )
    assert seen and not any(seen) and files.exists(f"{target}/zarr.json")
    np.testing.assert_array_equal(zarr.open_array(f"{target}/image", mode="r")[...], image[...])
    check_rejects(WriteError, "--overwrite", export, image, target)
    export(image, target, region={"x": slice(0, 64)}, overwrite=True)
    assert zarr.open_array(f"{target}/image", mode="r").shape == (180, 64, 3)
    assert len([file for file in files.find(target) if "/image/c/" in file]) == 3
    assert done.targets == [f"{target}/image"]


def test_remote_targets_have_no_chunks_of_other_exports(image):
    import fsspec

    target = f"memory://bucket-{os.urandom(6).hex()}/a.zarr"
    files = fsspec.filesystem("memory")

    def stop(done, total):
        if done == 4:
            assert files.find(target)
            raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        export(image, target, progress=stop)
    assert not files.find(target)
    files.pipe(f"{target}/c/0/0/0", b"left by a process that was killed")
    check_rejects(WriteError, "delete what an export left", export, image, target)


def test_a_remote_array_stays_until_another_is_complete(image):
    target = f"memory://bucket-{os.urandom(6).hex()}/a.zarr"
    export(image, target, region={"y": slice(0, 64)})

    def stop(done, total):
        if done:
            raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        export(image, target, overwrite=True, progress=stop)
    array = zarr.open_array(f"{target}/image", mode="r")
    np.testing.assert_array_equal(array[...], image[:64])


def test_what_is_there_is_not_lost(image, tmp_path):
    export(image, tmp_path / "a.zarr", region={"y": slice(0, 64)})
    check_rejects(WriteError, "--overwrite", export, image, tmp_path / "a.zarr")
    assert zarr.open_array(tmp_path / "a.zarr/image", mode="r").shape == (64, 200, 3)

    def stop(done, total):
        raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        export(image, tmp_path / "a.zarr", overwrite=True, progress=stop)
    assert zarr.open_array(tmp_path / "a.zarr/image", mode="r").shape == (64, 200, 3)
    export(image, tmp_path / "a.zarr", overwrite=True)
    assert zarr.open_array(tmp_path / "a.zarr/image", mode="r").shape == (180, 200, 3)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").touch()
    check_rejects(WriteError, "no Zarr array", export, image, tmp_path / "home", overwrite=True)
    zarr.open_group(tmp_path / "group.zarr", mode="w")
    check_rejects(WriteError, "no Zarr array", export, image, tmp_path / "group.zarr", overwrite=True)
    check_rejects(WriteError, "no such folder", export, image, tmp_path / "no" / "a.zarr")
    assert (tmp_path / "home" / "letters").exists() and (tmp_path / "group.zarr" / "zarr.json").exists()
    (tmp_path / "empty").mkdir()
    export(image, tmp_path / "empty")
    assert zarr.open_array(tmp_path / "empty/image", mode="r").shape == (180, 200, 3)
    check_rejects(ConfigurationError, "zip", export, image, tmp_path / "a.zip")


def test_source_and_target_are_apart(stub, tmp_path):
    array = create_array(tmp_path / "s.zarr", name="img", data=photograph(64, 64, 3))
    for target in (tmp_path / "s.zarr" / "img", tmp_path / "s.zarr", tmp_path / "s.zarr" / "img" / "copy"):
        check_rejects(WriteError, "overlap", export, array, target, overwrite=True)
    assert array[...].shape == (64, 64, 3)


def test_a_query_leaves_the_rest_at_the_fill_value(stub, tmp_path):
    data = np.full((192, 192, 3), 10, "u1")
    data[64:128, 64:128] = data[128:, 128:] = 250
    array = create_array({}, data=data, chunks=(64, 64, 3), fill_value=9)
    stub.batches.clear()
    done = export(array, tmp_path / "q.zarr", where="Bright")
    assert (done.chunks, done.left_out, sum(stub.sizes("decode"))) == (2, 7, 2)
    expected = np.where(data == 250, 250, 9)
    copy = zarr.open_array(tmp_path / "q.zarr/image", mode="r")
    np.testing.assert_array_equal(copy[...], expected)
    assert copy.nchunks_initialized == 2
    export(array, tmp_path / "crop.zarr", where="Bright", crop=True)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "crop.zarr/image", mode="r")[...], expected[64:, 64:])
    export(array, tmp_path / "crop.png", where="Bright", crop=True, region={"y": slice(0, 100)})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "crop.png")), expected[64:100, 64:128])
    check_rejects(UnsupportedArray, "nothing to export", export, array, tmp_path / "no.zarr", where="Dim")
    check_rejects(ConfigurationError, "crop", export, array, tmp_path / "no.zarr", crop=True)
    assert not (tmp_path / "no.zarr").exists()


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_geotiff_keeps_its_place_on_earth(image, tmp_path, codec):
    rasterio = pytest.importorskip("rasterio")
    export(image, tmp_path / "a.tif", codec=codec, region={"y": slice(20, 180), "x": slice(30, 180)})
    with rasterio.open(tmp_path / "a.tif") as file:
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), image[20:180, 30:180])
        assert file.crs.to_string() == "EPSG:32632"
        assert tuple(file.transform)[:6] == (10, 0, 500300, 0, -10, 4599800)
        assert (file.compression is None) == (codec == "none")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize("axes", ["yx", "yxc", "cyx"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f4"])
def test_tiff_of_any_type(stub, tmp_path, monkeypatch, dtype, axes):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(module, "BLOCK", 40 * 64)
    sizes = {"y": 100, "x": 140, "c": 5}
    values = photograph(*(sizes[axis] for axis in axes)).astype(dtype)
    options = {} if dtype == "u1" else {"value_range": "chunk"}
    chunks = tuple({"y": 40, "x": 64, "c": 5}[axis] for axis in axes)
    array = create_array({}, data=values, chunks=chunks, codec=DeepSIC(axes=axes, **options))
    export(array, tmp_path / "a.tif")
    copy = tifffile.imread(tmp_path / "a.tif")
    assert copy.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(copy, np.moveaxis(array[...], 0, -1) if axes == "cyx" else array[...])


@pytest.mark.parametrize("package", ["tifffile", "rasterio", "imagecodecs"])
def test_a_missing_package_is_named(image, stub, tmp_path, monkeypatch, package):
    monkeypatch.setattr("deepsic_codec.require.find_spec", lambda name: None if name == package else True)
    words = f"{package}|deepsic-codec[images]"
    check_rejects(MissingPackage, words, export, image, tmp_path / "a.tif")
    assert not list(tmp_path.iterdir())
    deep = create_array({}, data=photograph(64, 64, 3).astype("u2"))
    if package == "imagecodecs":
        check_rejects(MissingPackage, words, export, deep, tmp_path / "a.png")
    elif package == "rasterio":
        export(deep, tmp_path / "a.tif")  # without a georeference


@pytest.mark.parametrize("chunk, edge", [(512, 512), (2048, 1024), (64, 64), (1040, 208), (100, 512), (1072, 512)])
def test_tiles_divide_chunks(chunk, edge):
    assert module._tile_edge(chunk) == edge


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_what_a_tiff_cannot_say_is_left_out(stub, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    attributes = {"crs": "no such system", "transform": [1, 0, 0], "nodata": -9999}
    array = create_array({}, data=photograph(64, 64), codec=DeepSIC(axes="yx"), attributes=attributes)
    export(array, tmp_path / "a.tif")
    with rasterio.open(tmp_path / "a.tif") as file:
        assert file.crs is None and file.nodata is None and file.transform.is_identity
    codec = DeepSIC(axes="yx", value_range="chunk", nodata=7)
    array = create_array({}, data=photograph(64, 64).astype("u2"), codec=codec)
    export(array, tmp_path / "b.tif")
    with rasterio.open(tmp_path / "b.tif") as file:
        assert file.nodata == 7
        np.testing.assert_array_equal(file.read(1), array[...])


@pytest.mark.parametrize("shape", [(100, 140, 3), (100, 140, 1), (1, 1, 3), (200, 3, 1)])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_png_of_8_and_16_bits(stub, tmp_path, monkeypatch, shape, dtype):
    imagecodecs = pytest.importorskip("imagecodecs")
    monkeypatch.setattr(module, "BLOCK", 1)
    values = photograph(*shape).astype(dtype) * (1 if dtype == "u1" else 251)
    codec = DeepSIC() if dtype == "u1" else DeepSIC(value_range="chunk")
    array = create_array({}, data=values, chunks=(64, 64, shape[2]), codec=codec)
    export(array, tmp_path / "a.png")
    copy = imagecodecs.imread(str(tmp_path / "a.png"))
    assert copy.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(copy.reshape(shape), array[...])


def test_png_refuses_what_it_cannot_hold(image, stub, tmp_path, monkeypatch):
    six = create_array({}, data=photograph(64, 64, 6), chunks=(64, 64, 6))
    check_rejects(UnsupportedArray, "c=0:3", export, six, tmp_path / "b.png")
    export(six, tmp_path / "b.png", region={"c": slice(2, 5)})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), six[..., 2:5])
    monkeypatch.setattr(module, "PNG_LIMIT", 180 * 200 * 3 - 1)
    check_rejects(UnsupportedArray, "180 x 200|TIFF|--region", export, image, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
    export(image, tmp_path / "c.png", region={"x": slice(0, 100)})


def test_slices_become_files(stub, tmp_path):
    values = photograph(12, 64, 70, 3)
    array = create_array({}, data=values, chunks=(5, 64, 64, 3), codec=DeepSIC(axes="tyxc"))
    done = export(array, tmp_path / "s.png", region={"t": slice(8, 12)})
    assert [os.path.basename(path) for path in done.targets] == [f"s_t{n:02d}.png" for n in range(8, 12)]
    for number, path in enumerate(done.targets):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), values[8 + number])
    export(array, tmp_path / "one.png", region={"t": 3})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one.png")), values[3])


def test_files_are_whole_or_not_there(image, tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    for name in ("a.png", "a.tif"):
        with pytest.raises(KeyboardInterrupt):
            export(image, tmp_path / name, progress=stop)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.png").write_text("mine")
    check_rejects(WriteError, "--overwrite", export, image, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "mine"
    export(image, tmp_path / "a.png", overwrite=True)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image[...])
    check_rejects(ConfigurationError, "local path", export, image, "s3://bucket/a.png")


def test_memory_stays_flat(stub, tmp_path, monkeypatch):
    """No part that is read at once is larger than a block, however large the array is."""
    monkeypatch.setattr(module, "BLOCK", 1 << 15)
    array = create_array({}, data=photograph(512, 512), chunks=(64, 64), codec=DeepSIC(axes="yx"))
    sizes = []
    read = module.ExportRequest.read

    def measured(request, part):
        values = read(request, part)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(module.ExportRequest, "read", measured)
    export(array, tmp_path / "a.zarr")
    export(array, tmp_path / "a.tif")
    assert max(sizes) <= 1 << 15 and sum(sizes) == 2 * 512 * 512


@pytest.mark.parametrize("suffix", ["zarr", "tif", "png"])
def test_an_array_without_samples(tmp_path, suffix):
    codec = DeepSIC(axes="tyxc")
    array = create_array(tmp_path / "a.zarr", name="days", shape=(0, 64, 64, 3), dtype="u1", codec=codec)
    if suffix == "zarr":
        export(array, tmp_path / "b.zarr")
        assert zarr.open_array(tmp_path / "b.zarr/days", mode="r").shape == (0, 64, 64, 3)
    else:
        check_rejects(UnsupportedArray, "nothing to export", export, array, tmp_path / f"b.{suffix}")


@pytest.mark.parametrize("bands", [1, 3])
def test_png_of_big_endian_samples(tmp_path, bands):
    from deepsic_codec.io.images import open_image

    values = (photograph(40, 50, bands).astype("u2") * 200).astype(">u2")
    array = create_array(tmp_path / "a.zarr", name="im", data=values, codec=DeepSIC(max_error=0), zarr_format=2)
    export(array, tmp_path / "a.png")
    np.testing.assert_array_equal(open_image(tmp_path / "a.png").values, np.squeeze(values))
