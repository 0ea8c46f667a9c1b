import json

import numpy as np
import pytest
import zarr
from PIL import Image

from deepsic_codec import chunk_attrs, open_labels
from deepsic_codec.cli import main as cli
from deepsic_codec.errors import MissingPackage, SourceError, UnsupportedArray
from deepsic_codec.io import images
from deepsic_codec.io.images import decode_rgb, read_rgb
from deepsic_codec.io.ingest import declared_nodata, ingest_pyramid
from deepsic_codec.io.ingest import ingest as ingest_source
from deepsic_codec.io.sources import open_sources, stack
from tests import stub_runtime
from tests.common import check_rejects, photograph
from tests.test_dask import check_index

pytest.importorskip("dask.array")
pytestmark = pytest.mark.usefixtures("stub")


def opened(*places, **kwargs):
    return {source.name: source for source in open_sources(places, **kwargs)}


def ingest(*args):
    return cli.main(["ingest", *map(str, args)])


@pytest.fixture
def folder(tmp_path):
    """Images in colour and grey, in folders."""
    path = tmp_path / "images"
    (path / "sub").mkdir(parents=True)
    for name, shape in {"a.png": (70, 90, 3), "b.png": (70, 90, 3), "sub/grey.png": (130, 40)}.items():
        Image.fromarray(photograph(*shape, seed=len(name))).save(path / name)
    return path


def test_a_folder(folder, tmp_path, capsys):
    assert ingest(folder, tmp_path / "out.zarr", "--chunk", 64) == 0
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    np.testing.assert_array_equal(group["a"][:], photograph(70, 90, 3, seed=5))
    np.testing.assert_array_equal(group["sub/grey"][:], photograph(130, 40, seed=12))
    assert group["a"].chunks == (64, 64, 3) and group["a"].attrs["source"] == "a.png"
    check_index(tmp_path / "out.zarr", "a")
    out = capsys.readouterr().out
    assert "all 3" in out and "inf" in out and "sub/grey" in out


def test_labels_of_tiles(folder, tmp_path, monkeypatch):
    times = stub_runtime.ModelInfo("times", "ab" * 32, "ef" * 32)
    monkeypatch.setattr(stub_runtime, "MODELS", (*stub_runtime.MODELS, times))
    options = ["--label-tile", 128, "--label-pooling", "mean", "--embedding", "--model", "base", "--head", "times"]
    assert ingest(folder / "a.png", tmp_path / "out.zarr", *options) == 0
    codec = zarr.open_group(tmp_path / "out.zarr", mode="r")["a"].metadata.codecs[0]
    assert (codec.label_tile, codec.label_pooling, codec.embedding) == ((128, 128), "mean", True)
    assert (codec.model, codec.head) == ("base", "ef" * 32)
    assert open_labels(tmp_path / "out.zarr", "a").embeddings().shape[:2] == (1, 1)
    with pytest.raises(SystemExit):
        ingest(folder / "a.png", tmp_path / "other.zarr", "--label-pooling", "median")


def test_a_stack(folder, tmp_path):
    assert (
        ingest(
            folder / "a.png",
            folder / "b.png",
            tmp_path / "out.zarr",
            "--stack",
            "all",
            "--quality",
            30,
            "--effort",
            3,
            "--tune",
            "ms-ssim",
        )
        == 0
    )
    array = zarr.open_array(tmp_path / "out.zarr", path="all", mode="r")
    assert array.shape == (2, 70, 90, 3) and array.attrs["sources"] == ["a.png", "b.png"]
    np.testing.assert_array_equal(array[1], photograph(70, 90, 3, seed=5))
    codec = array.metadata.codecs[0]
    assert codec.quality == 30 and codec.effort == 3 and codec.tune == "ms-ssim"
    assert array.metadata.codecs[0].axes == "nyxc"


def test_stacks_of_unequal_sizes_are_refused(folder):
    check_rejects(UnsupportedArray, "sub/grey|equal size", stack, list(open_sources([folder])), "all")
    check_rejects(UnsupportedArray, "no images", stack, [], "all")


@pytest.mark.parametrize("options", [["--format", 2], ["--shard", 128]], ids=str)
def test_format_and_shards(folder, tmp_path, options):
    assert ingest(folder / "a.png", tmp_path / "out.zarr", "--chunk", 64, "--name", "one", *options) == 0
    array = zarr.open_array(tmp_path / "out.zarr", path="one", mode="r")
    assert array.metadata.zarr_format == (2 if "--format" in options else 3)
    assert array.shards == (None if "--format" in options else (128, 128, 3))
    np.testing.assert_array_equal(array[:], photograph(70, 90, 3, seed=5))


def test_resume_and_overwrite(folder, tmp_path, stub, capsys):
    target = tmp_path / "out.zarr"
    assert ingest(folder / "a.png", target, "--chunk", 64) == 0
    assert ingest(folder / "a.png", target, "--chunk", 64) == 2
    assert "resume" in capsys.readouterr().err
    (target / "a" / "c" / "0" / "1" / "0").unlink()
    stub.batches.clear()
    assert ingest(folder, target, "--chunk", 64, "--resume") == 0
    assert sum(stub.sizes("encode")) == 1 + 4 + 3  # of a, b and grey
    assert ingest(folder / "a.png", target, "--overwrite", "--quality", 20) == 0
    assert zarr.open_array(target, path="a", mode="r").metadata.codecs[0].quality == 20


def test_an_archive_is_compressed_again_in_place(folder, tmp_path, capsys):
    target = tmp_path / "out.zarr"
    assert ingest(folder, target, "--chunk", 64, "--quality", 90) == 0
    capsys.readouterr()
    assert ingest(target, target, "--chunk", 32, "--quality", 30, "--overwrite", "--json") == 0
    for result in json.loads(capsys.readouterr().out)["arrays"]:
        assert result["psnr"] is None, "equal to what was read"  # infinite
    group = zarr.open_group(target, mode="r")
    np.testing.assert_array_equal(group["a"][:], photograph(70, 90, 3, seed=5))
    assert group["a"].chunks == (32, 32, 3) and group["a"].metadata.codecs[0].quality == 30
    check_index(target, "a")


def test_a_damaged_file_replaces_nothing(folder, tmp_path, capsys):
    target = tmp_path / "out.zarr"
    assert ingest(folder / "a.png", target, "--chunk", 64) == 0
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    assert ingest(folder / "a.png", target, "--chunk", 64, "--overwrite") == 1
    np.testing.assert_array_equal(zarr.open_array(target, path="a", mode="r")[:], photograph(70, 90, 3, seed=5))
    check_index(target, "a")


def test_unreadable_files_are_named(folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    whole = (folder / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert ingest(folder, tmp_path / "out.zarr") == 1
    assert "broken.png: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out.zarr").exists()
    (folder / "broken.png").unlink()
    assert ingest(folder, tmp_path / "two.zarr") == 1
    assert "cut.png: cannot be read" in capsys.readouterr().err
    (folder / "broken.png").write_bytes(b"no image")
    assert ingest(folder, tmp_path / "three.zarr", "--skip-unreadable") == 3
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 2 and "broken.png" in out and "cut.png" in out
    assert set(zarr.open_group(tmp_path / "three.zarr", mode="r").array_keys()) == {"a", "b"}
    assert ingest(folder, tmp_path / "four.zarr", "--skip-unreadable", "-q") == 3
    out, err = capsys.readouterr()
    assert not out and err.count("skipped: ") == 2


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    check_rejects(SourceError, "nowhere.png", opened, tmp_path / "nowhere.png")
    check_rejects(SourceError, "no images", opened, tmp_path / "empty")
    check_rejects(SourceError, "text.txt", opened, tmp_path / "text.txt")


def test_transparency_and_depth(tmp_path):
    rgba = photograph(20, 30, 4)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    check_rejects(UnsupportedArray, "a.png|drop-alpha", opened, tmp_path / "a.png")
    np.testing.assert_array_equal(opened(tmp_path / "a.png", drop_alpha=True)["a"].values, rgba[..., :3])
    np.testing.assert_array_equal(opened(tmp_path / "a.png", keep_alpha=True)["a"].values, rgba)
    Image.fromarray(rgba).convert("LA").save(tmp_path / "LA.png")
    check_rejects(UnsupportedArray, "drop-alpha", opened, tmp_path / "LA.png")
    grey = np.asarray(Image.open(tmp_path / "LA.png").convert("L"))
    np.testing.assert_array_equal(opened(tmp_path / "LA.png", drop_alpha=True)["LA"].values, grey)
    Image.fromarray(photograph(20, 30).astype("u2") * 9).save(tmp_path / "deep.png")
    deep = opened(tmp_path / "deep.png")["deep"].values
    assert deep.dtype == np.uint16
    np.testing.assert_array_equal(deep, photograph(20, 30).astype("u2") * 9)


def test_equal_names_get_their_suffix(tmp_path):
    for suffix in ("png", "bmp"):
        Image.fromarray(photograph(20, 30, 3)).save(tmp_path / f"a.{suffix}")
    assert set(opened(tmp_path)) == {"a", "a-png"}
    assert set(opened(tmp_path, tmp_path, renamed=list)) == {"a", "a-png", "a-bmp", "a-2"}


def test_one_name_for_many_sources(folder, tmp_path, capsys):
    assert ingest(folder, tmp_path / "out.zarr", "--name", "one") == 2
    assert "--stack" in capsys.readouterr().err


def write_geotiff(path, values, **profile):
    """Write an image as a GeoTIFF of pixels of 10 x 20 m."""
    rasterio = pytest.importorskip("rasterio")
    bands = np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)
    count, height, width = bands.shape
    transform = rasterio.Affine(10, 0, 500000, 0, -20, 5600000)
    profile = {"crs": "EPSG:32632", "transform": transform, "dtype": values.dtype, "driver": "GTiff", **profile}
    with rasterio.open(path, "w", height=height, width=width, count=count, **profile) as file:
        file.write(bands)


@pytest.mark.parametrize("options", [{}, {"interleave": "band"}, {"tiled": True, "blockxsize": 16, "blockysize": 16}])
@pytest.mark.parametrize("shape", [(70, 90, 3), (70, 90), (70, 90, 7)])
def test_geotiff(tmp_path, monkeypatch, shape, options):
    monkeypatch.setattr(images, "BLOCK_EDGE", 32)
    values = photograph(*shape)
    write_geotiff(tmp_path / "geo.tif", values, **options)
    assert ingest(tmp_path / "geo.tif", tmp_path / "out.zarr", "--chunk", 64) == 0
    array = zarr.open_array(tmp_path / "out.zarr", path="geo", mode="r")
    np.testing.assert_array_equal(array[:], values)
    assert array.attrs["crs"] == "EPSG:32632"
    assert array.attrs["transform"] == [10.0, 0.0, 500000.0, 0.0, -20.0, 5600000.0]


def test_georeferences_of_other_kinds(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    turned = rasterio.Affine(1, 2, 5, 3, 4, 6)
    write_geotiff(tmp_path / "turned.tif", photograph(70, 90), transform=turned, crs=None)
    assert opened(tmp_path / "turned.tif")["turned"].attributes["transform"] == [1, 2, 5, 3, 4, 6]
    write_geotiff(tmp_path / "points.tif", photograph(70, 90))
    with rasterio.open(tmp_path / "points.tif", "r+") as file:
        file.update_tags(AREA_OR_POINT="Point")
    assert opened(tmp_path / "points.tif")["points"].attributes["transform"] == [10, 0, 500000, 0, -20, 5600000]
    Image.fromarray(photograph(70, 90)).save(tmp_path / "world.tif")
    (tmp_path / "world.tfw").write_text("10\n0\n0\n-10\n105\n895\n")
    assert opened(tmp_path / "world.tif")["world"].attributes == {
        "source": "world.tif",
        "transform": [10, 0, 100, 0, -10, 900],
    }
    write_geotiff(tmp_path / "a.jp2", photograph(70, 90, 3), driver="JP2OpenJPEG", REVERSIBLE="YES", QUALITY="100")
    source = opened(tmp_path / "a.jp2")["a"]
    assert source.attributes["crs"] == "EPSG:32632" and source.axes == "yxc"
    np.testing.assert_array_equal(source.values, photograph(70, 90, 3))


@pytest.mark.parametrize("package, name", [("rasterio", "geo.tif"), ("tifffile", "geo.tif"), ("PIL", "a.png")])
def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, package, name):
    write_geotiff(folder / "geo.tif", photograph(20, 30))
    monkeypatch.setattr("deepsic_codec.require.find_spec", lambda name: None if name == package else True)
    text = "pillow" if package == "PIL" else package
    check_rejects(MissingPackage, f"{text}|deepsic-codec[images]", opened, folder / name)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("dtype, nodata", [("uint16", 0), ("int16", -9999), ("float32", float("nan"))])
def test_deep_images_of_many_bands(tmp_path, capsys, dtype, nodata):
    rasterio = pytest.importorskip("rasterio")
    values = (photograph(70, 90, 5).astype("f8") * 20 + 300).astype(dtype)
    values[20:40, 30:50] = nodata
    profile = {"driver": "GTiff", "height": 70, "width": 90, "count": 5, "dtype": dtype, "nodata": nodata}
    with rasterio.open(tmp_path / "deep.tif", "w", **profile) as file:
        file.write(np.moveaxis(values, -1, 0))
    options = ["--value-range", "0,6000"] if dtype == "float32" else ["--max-error", 0, "--value-range", "chunk"]
    assert ingest(tmp_path / "deep.tif", tmp_path / "out.zarr", "--chunk", 64, *options) == 0
    array = zarr.open_array(tmp_path / "out.zarr", path="deep", mode="r")
    assert array.dtype == dtype and array.metadata.codecs[0].nodata == ("NaN" if nodata != nodata else nodata)
    np.testing.assert_equal(array.fill_value, np.dtype(dtype).type(nodata))
    np.testing.assert_allclose(array[:], values, atol=0.3 if dtype == "float32" else 0, rtol=0)
    assert ingest(tmp_path / "deep.tif", tmp_path / "plain.zarr", "--nodata", "none") == 0


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_value_that_samples_cannot_have_is_no_nodata(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    values = photograph(70, 90)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=70, width=90, count=1, dtype="uint16") as file:
        file.write(values, 1)
    (source,) = open_sources([tmp_path / "a.tif"])
    for value in (-9999.0, 0.5, "NaN", "none at all"):
        source.attributes["nodata"] = value
        assert declared_nodata(source) is None
    source.attributes["nodata"] = 7.0
    assert declared_nodata(source) == 7


@pytest.mark.parametrize(
    "options, words",
    [
        (["--value-range", "5,1"], "--value-range"),
        (["--nodata", "300"], "nodata|300"),
        (["--psnr", "40", "--bpp", "1"], "--psnr and --bpp"),
        (["--max-error", "-1"], "--max-error"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(folder, tmp_path, capsys, options, words):
    assert ingest(folder / "a.png", tmp_path / "out.zarr", *options) != 0
    err = capsys.readouterr().err
    assert all(word in err for word in words.split("|")), err


@pytest.mark.parametrize("options", [["--value-range", "1"], ["--value-range", "a,b"], ["--nodata", "x"]], ids=str)
def test_options_that_cannot_be_read(folder, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        ingest(folder / "a.png", tmp_path / "out.zarr", *options)
    assert stop.value.code == 2 and f"argument {options[0]}: expected" in capsys.readouterr().err


def test_qualities_of_pixels_and_of_labels(folder, tmp_path, capsys):
    qualities = np.full((70, 90), 20, "u1")
    qualities[:32, :32] = 90
    Image.fromarray(qualities).save(tmp_path / "map.png")
    options = "--transform", "wavelet", "--quality", 20
    assert ingest(folder / "a.png", tmp_path / "out.zarr", *options, "--quality-map", tmp_path / "map.png") == 0
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert chunk_attrs(group["a"], (0, 0, 0))["quality_map"]["max"] == 90
    assert ingest(folder / "b.png", tmp_path / "out.zarr", *options, "--keep", "unknown=0", "--keep", "~unknown=0") == 0
    assert chunk_attrs(group["b"], (0, 0, 0))["quality_map"]["max"] == 0
    capsys.readouterr()
    wrong = {
        "expected an image of one band": (folder / "a.png", "--quality-map", folder / "b.png"),
        "shape (70, 90)": (folder / "sub", "--quality-map", tmp_path / "map.png"),
        "one source": (folder, "--quality-map", tmp_path / "map.png"),
        "not estimated": (folder / "a.png", "--keep", "unknown=9", "--dry-run"),
    }
    for words, (source, *more) in wrong.items():
        assert ingest(source, tmp_path / "wrong.zarr", *options, *more) == 2
        assert words in capsys.readouterr().err
    check_rejects(SystemExit, "", ingest, folder / "a.png", tmp_path / "wrong.zarr", "--keep", "River")
    assert "River=80" in capsys.readouterr().err


@pytest.mark.parametrize("writer", ["rasterio", "tifffile", "contiguous"])
def test_large_files_are_read_in_blocks(tmp_path, monkeypatch, writer):
    monkeypatch.setattr(images, "BLOCK_EDGE", 64)
    values = photograph(130, 90, 3)
    if writer == "rasterio":
        write_geotiff(tmp_path / "a.tif", values, tiled=True, blockxsize=32, blockysize=32)
    else:
        tile = None if writer == "contiguous" else (32, 32)
        pytest.importorskip("tifffile").imwrite(tmp_path / "a.tif", values, tile=tile, photometric="rgb")
    array = opened(tmp_path / "a.tif")["a"].values
    assert array.chunks == ((64, 64, 2), (64, 26), (3,))
    np.testing.assert_array_equal(array, values)
    np.testing.assert_array_equal(array[50:70, 60:90, 1], values[50:70, 60:90, 1])


def test_pages_of_a_tiff(tmp_path, monkeypatch):
    pages = [Image.fromarray(photograph(20, 30, seed=n)) for n in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(images, "BLOCK_EDGE", 40)
    source = opened(tmp_path / "pages.tif")["pages"]
    assert source.axes == "nyx" and source.values.numblocks == (2, 1, 1)
    np.testing.assert_array_equal(source.values, [photograph(20, 30, seed=n) for n in range(3)])
    pages[0].save(tmp_path / "pages.gif", save_all=True, append_images=pages[1:])
    check_rejects(UnsupportedArray, "3 images", opened, tmp_path / "pages.gif")


TIFFS = {  # options of tifffile.imwrite, shape, axes and shape as the source has them
    "planar": ({"photometric": "rgb", "planarconfig": "separate"}, (3, 20, 30), "yxc", (20, 30, 3)),
    "bands first": ({"photometric": "minisblack", "planarconfig": "separate"}, (5, 20, 30), "yxc", (20, 30, 5)),
    "ImageJ": ({"imagej": True, "metadata": {"axes": "ZYX"}}, (4, 20, 30), "zyx", (4, 20, 30)),
    "OME": ({"ome": True, "metadata": {"axes": "TCYX"}}, (2, 3, 20, 30), "tcyx", (2, 3, 20, 30)),
    "single": ({"photometric": "minisblack"}, (1, 4, 1, 20, 30), "nyx", (4, 20, 30)),
    "row": ({}, (1, 30), "yx", (1, 30)),
    "big-endian": ({"byteorder": ">"}, (20, 30), "yx", (20, 30)),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_axes_of_a_tiff(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    options, shape, axes, expected = TIFFS[kind]
    values = photograph(*shape).astype("u2") * 251
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    (source,) = open_sources([tmp_path / "a.tif"])
    assert source.values.dtype == source.values[..., :1].compute().dtype == np.dtype("u2")
    assert (source.axes, source.values.shape) == (axes, expected)
    first = source.values.transpose(2, 0, 1) if kind in ("planar", "bands first") else source.values
    np.testing.assert_array_equal(first, values.reshape(first.shape))


def test_axes_that_the_codec_does_not_have(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", photograph(2, 20, 30), metadata={"axes": "RYX"})
    check_rejects(UnsupportedArray, "RYX", opened, tmp_path / "a.tif")


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_transparency_of_a_tiff(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    values = photograph(20, 30, 4)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=[kind])
    if kind == 1:
        check_rejects(UnsupportedArray, "a.tif|drop-alpha", opened, tmp_path / "a.tif")
    else:  # as declared by programs that have no other word for a fourth band
        np.testing.assert_array_equal(opened(tmp_path / "a.tif")["a"].values, values)
    source = opened(tmp_path / "a.tif", drop_alpha=True)["a"]
    np.testing.assert_array_equal(source.values, values[..., :3] if kind else values)


def test_bits_become_bytes(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", photograph(20, 30) > 100, photometric="minisblack")
    source = opened(tmp_path / "a.tif")["a"]
    assert source.values.dtype == np.uint8
    np.testing.assert_array_equal(source.values, photograph(20, 30) > 100)


def test_no_bits_are_lost(tmp_path):
    """Pillow reads colour of 16 bits as 8 bits."""
    imagecodecs = pytest.importorskip("imagecodecs")
    values = photograph(20, 30, 3).astype("u2") * 251
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
    source = opened(tmp_path / "a.png")["a"]
    assert source.values.dtype == np.uint16
    np.testing.assert_array_equal(source.values, values)
    (tmp_path / "a.ppm").write_bytes(b"P6 30 20 65535\n" + values.astype(">u2").tobytes())
    source = opened(tmp_path / "a.ppm")["a"]
    assert source.attributes == {"source": "a.ppm"}
    np.testing.assert_array_equal(source.values, values)


def test_photographs_with_a_preview(tmp_path):
    """Cameras and drones write JPEG files with a second, small image."""
    images = [Image.fromarray(photograph(*shape, 3)) for shape in ((40, 60), (20, 30))]
    images[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=images[1:], quality=95)
    source = opened(tmp_path / "a.jpg")["a"]
    np.testing.assert_array_equal(
        source.values, np.asarray(images[0].convert("RGB")) * 0 + read_rgb(tmp_path / "a.jpg")
    )
    assert source.values.shape == (40, 60, 3)


def test_rgb_of_any_file(tmp_path):
    """8 bits are as they are; deeper samples are stretched to 8 bits, in the same way from each format."""
    tifffile, imagecodecs = pytest.importorskip("tifffile"), pytest.importorskip("imagecodecs")
    values = photograph(40, 60, 3)
    for name in ("a.png", "a.tif", "a.bmp"):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(read_rgb(tmp_path / name), values)
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(values, lossless=True))
    np.testing.assert_array_equal(decode_rgb((tmp_path / "a.jxl").read_bytes(), ".JXL"), values)
    Image.fromarray(values[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "grey.png"), np.repeat(values[..., :1], 3, axis=2))
    Image.fromarray(np.dstack([values, values[..., :1]])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "alpha.png"), values)

    deep = values.astype("u2") * 40 + 500
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb")
    stretched = read_rgb(tmp_path / "deep.tif")
    assert stretched.dtype == np.uint8 and stretched.shape == values.shape and np.ptp(stretched) == 255
    tifffile.imwrite(tmp_path / "planar.tif", np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_rgb(tmp_path / "planar.tif"), stretched)
    bands = np.concatenate([deep, deep[..., :2]], axis=2)
    tifffile.imwrite(tmp_path / "bands.tif", bands, photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(read_rgb(tmp_path / "bands.tif"), stretched)
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(deep))
    np.testing.assert_array_equal(read_rgb(tmp_path / "deep.png"), stretched)
    Image.fromarray(deep[..., 1]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "grey.png")[..., 0], stretched[..., 1])
    (tmp_path / "broken.png").write_bytes(b"no image")
    check_rejects(SourceError, "broken.png", read_rgb, tmp_path / "broken.png")
    (tmp_path / "broken.tif").write_bytes(b"no image")
    check_rejects(SourceError, "broken.tif", read_rgb, tmp_path / "broken.tif")


def test_jpeg_xl(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    values = photograph(20, 30, 3)
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(values, lossless=True))
    np.testing.assert_array_equal(opened(tmp_path / "a.jxl")["a"].values, values)


def test_zarr_arrays_and_groups(tmp_path, capsys):
    group = zarr.open_group(tmp_path / "in.zarr", mode="w")
    values = photograph(3, 70, 90)
    named = group.create_array("scene", shape=values.shape, dtype="u1", dimension_names=["band", "lat", "lon"])
    named[:] = values
    named.attrs["crs"] = "EPSG:32632"
    group.create_array("lat", shape=(70,), dtype="f8")
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr") == 0
    array = zarr.open_array(tmp_path / "out.zarr", path="scene", mode="r")
    np.testing.assert_array_equal(array[:], values)
    assert array.attrs["crs"] == "EPSG:32632" and array.metadata.codecs[0].axes == "cyx"

    zarr.create_array(tmp_path / "bare.zarr", data=photograph(70, 90, 3))
    assert ingest(tmp_path / "bare.zarr", tmp_path / "out.zarr") == 1
    assert "--axes" in capsys.readouterr().err
    assert ingest(tmp_path / "bare.zarr", tmp_path / "out.zarr", "--axes", "yxc") == 0
    assert ingest(tmp_path / "out.zarr", tmp_path / "again.zarr") == 0
    again = zarr.open_group(tmp_path / "again.zarr", mode="r")
    assert set(again.array_keys()) == {"scene", "bare", "lat", "band", "spatial_ref"}
    np.testing.assert_array_equal(again["bare"][:], photograph(70, 90, 3))


def test_zarr_arrays_that_are_no_images(tmp_path):
    group = zarr.open_group(tmp_path / "in.zarr", mode="w")
    group.create_array("a", shape=(70, 90), dtype="f4")
    check_rejects(UnsupportedArray, "--axes", opened, tmp_path / "in.zarr")
    check_rejects(SourceError, "no arrays", opened, tmp_path / "in.zarr", axes="yxc")
    group.create_array("b", shape=(70, 90), dtype="f2")
    check_rejects(UnsupportedArray, "float16", opened, tmp_path / "in.zarr" / "b")


def scene(dtype, nodata):
    """Samples of two bands with a part that has no data, in 3 chunks of 64 x 64 and a narrow one."""
    values = (photograph(64, 200, 2).astype("f8") * (1 if dtype == "uint8" else 20) + 3).clip(3, 30000).astype(dtype)
    if nodata is not None:
        values[10:50, 20:120] = nodata
    return values


@pytest.mark.parametrize(
    "dtype, nodata", [("uint8", None), ("uint8", 0), ("uint16", 0), ("int16", -9), ("float32", np.nan), ("float32", -1)]
)
def test_reported_figures_are_those_of_the_archive(tmp_path, capsys, stub, dtype, nodata):
    """Bytes, chunks, labels, and the PSNR as computed by hand: samples without data have no say in it."""
    stub.lossy = True
    values = scene(dtype, nodata)
    group = zarr.open_group(tmp_path / "in.zarr", mode="w")
    group.create_array("scene", data=values, dimension_names=["y", "x", "band"])
    options = ["--chunk", 64, "--quality", 20] + ([] if nodata is None else ["--nodata", nodata])
    assert ingest(tmp_path / "in.zarr" / "scene", tmp_path / "out.zarr", *options, "--json") == 0
    (figures,) = json.loads(capsys.readouterr().out)["arrays"]
    array = zarr.open_array(tmp_path / "out.zarr", path="scene", mode="r")
    payloads = [path.stat().st_size for path in (tmp_path / "out.zarr" / "scene" / "c").rglob("*") if path.is_file()]
    assert (figures["raw"], figures["stored"]) == (values.nbytes, sum(payloads))
    assert (figures["written"], figures["skipped"], figures["empty"]) == (4, 0, 0) and len(payloads) == 4
    assert figures["shape"] == [64, 200, 2] and figures["name"] == "scene" and figures["seconds"] > 0

    data = np.ones(values.shape, bool) if nodata is None else ~(np.isnan(values) | (values == nodata))
    error = np.square(values[data].astype("f8") - array[:][data].astype("f8")).mean()
    peak = 255 if dtype == "uint8" else float(values[data].max()) - float(values[data].min())
    assert error > 0 and figures["psnr"] == pytest.approx(10 * np.log10(peak**2 / error), abs=1e-3)
    assert figures["rmse"] == pytest.approx(error**0.5) and figures["peak"] == peak
    assert figures["largest"] == np.abs(values[data].astype("f8") - array[:][data]).max()

    classes = open_labels(array).summary()["classes"]
    assert figures["labels"] == {name: classes[name] for name in figures["labels"]} and figures["labels"]
    assert set(figures["labels"].values()) == {classes[name] for name in ("Dark", "Dim", "Bright") if classes[name]}


def test_a_source_without_data_has_no_psnr(tmp_path, capsys):
    group = zarr.open_group(tmp_path / "in.zarr", mode="w")
    group.create_array("scene", data=np.full((70, 90), 7, "u1"), dimension_names=["y", "x"])
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr", "--nodata", 7, "--json") == 0
    (figures,) = json.loads(capsys.readouterr().out)["arrays"]
    assert figures["psnr"] is None and figures["stored"] == figures["written"] == 0 and figures["empty"] == 1


def test_a_resumed_run_reports_the_whole_array(folder, tmp_path, capsys):
    """Bytes and labels of all chunks, also of those that an earlier run wrote."""
    target = tmp_path / "out.zarr"
    for options in ([], ["--resume"]):
        assert ingest(folder / "a.png", target, "--chunk", 64, "--json", *options) == 0
    first, second = (json.loads(line)["arrays"][0] for line in capsys.readouterr().out.splitlines())
    assert (first["written"], first["skipped"], second["written"], second["skipped"]) == (4, 0, 0, 4)
    assert all(first[name] == second[name] for name in ("raw", "stored", "labels", "psnr", "shape"))


def test_the_table_adds_up(folder, tmp_path, capsys):
    target = tmp_path / "out.zarr"
    assert ingest(folder, target, "--chunk", 64) == 0
    out = capsys.readouterr().out.splitlines()
    total = {"raw": 0, "stored": 0}
    for name, raw in {"a": 70 * 90 * 3, "b": 70 * 90 * 3, "sub/grey": 130 * 40}.items():
        stored = sum(path.stat().st_size for path in (target / name / "c").rglob("*") if path.is_file())
        (row,) = [line for line in out if name in line.split()]
        assert all(text in row for text in (f"{raw:,}", f"{stored:,}", f"{raw / stored:.1f}")), row
        total["raw"], total["stored"] = total["raw"] + raw, total["stored"] + stored
    (row,) = [line for line in out if "all 3" in line]
    texts = f"{total['raw']:,}", f"{total['stored']:,}", f"{total['raw'] / total['stored']:.1f}", " 11 "
    assert all(text in row for text in texts), row


def test_progress_counts_blocks_up_to_all(folder, tmp_path):
    steps = []
    (source,) = open_sources([folder / "a.png"])
    done = ingest_source(source, tmp_path / "out.zarr", chunk=16, progress=lambda *step: steps.append(step))
    total = steps[-1][1]
    assert done.written == 30 and total > 1 and steps == [(n, total) for n in range(1, total + 1)]


def test_levels_of_a_pyramid_have_no_labels_but_the_first(folder, tmp_path):
    (source,) = open_sources([folder / "a.png"])
    levels = ingest_pyramid(source, tmp_path / "out.zarr", chunk=32)
    assert [level.shape[1:] for level in levels] == [(70, 90), (35, 45), (18, 23)]
    assert levels[0].labels and not levels[1].labels


def test_levels_of_a_pyramid_have_one_range_of_values(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "a.tif", rng.integers(300, 5000, (70, 90), "u2"))
    (source,) = open_sources([tmp_path / "a.tif"])
    levels = ingest_pyramid(source, tmp_path / "out.zarr", chunk=32, codec={"semantics": "none"})
    arrays = [zarr.open_array(tmp_path / "out.zarr", path=level.name, mode="r") for level in levels]
    assert [array.metadata.codecs[0].value_range for array in arrays] == [((300, 4999),)] * 3


@pytest.mark.parametrize("options", [[], ["--max-error", "0"], ["--chunk", "32"]], ids=str)
def test_a_dry_run_says_what_would_be_stored_and_writes_nothing(folder, tmp_path, capsys, options):
    target = tmp_path / "out.zarr"
    assert ingest(folder, target, "--dry-run", "--json", *options) == 0
    arrays = json.loads(capsys.readouterr().out)["arrays"]
    assert not target.exists()
    assert [(item["name"], item["shape"], item["axes"], item["dtype"], item["nodata"]) for item in arrays] == [
        ("a", [70, 90, 3], "yxc", "uint8", None),
        ("b", [70, 90, 3], "yxc", "uint8", None),
        ("sub/grey", [130, 40], "yx", "uint8", None),
    ]
    assert ingest(folder, target, "--json", *options) == 0
    for item, stored in zip(arrays, json.loads(capsys.readouterr().out)["arrays"], strict=True):
        assert item["raw"] == stored["raw"] and 0.3 < item["stored"] / stored["stored"] < 3
        assert item["psnr"] == pytest.approx(stored["psnr"], abs=0.5) if stored["psnr"] else item["psnr"] is None
        assert item["seconds"] > 0 and item["sampled"] == item["total"] == np.prod(
            -(-np.array(item["shape"]) // item["chunks"])
        )
        assert item["chunks"] == list(zarr.open_array(target, path=item["name"], mode="r").chunks)
    assert ingest(folder, target, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "sub/grey" in out and "Nothing was written." in out and "its peak" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("all 3")]
    assert row[2] == f"{sum(item['raw'] for item in arrays):,}" and row[-3:] == ["3", "of", "3"]


def test_a_source_without_samples(tmp_path):
    zarr.create_array(tmp_path / "in.zarr", shape=(0, 40, 50), dtype="u1", dimension_names=["time", "y", "x"])
    assert ingest(tmp_path / "in.zarr", tmp_path / "out.zarr", "--name", "days") == 0
    assert zarr.open_array(tmp_path / "out.zarr", path="days", mode="r").shape == (0, 40, 50)
