import importlib.util
import json

import numpy as np
import pytest
import zarr
from PIL import Image

from deepsic_codec import open_labels
from deepsic_codec.cli import main as cli
from deepsic_codec.errors import ConfigurationError, SourceError, UnsupportedArray
from deepsic_codec.io import images as sources
from deepsic_codec.io.images import georeference, open_sources, stack
from deepsic_codec.io.ingest import declared_nodata
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
    check_rejects(UnsupportedArray, "nothing", stack, [], "all")


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
    assert ingest(folder, tmp_path / "three.zarr", "--skip-unreadable") == 0
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 2 and "broken.png" in out and "cut.png" in out
    assert set(zarr.open_group(tmp_path / "three.zarr", mode="r").array_keys()) == {"a", "b"}


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    check_rejects(SourceError, "nowhere.png", opened, tmp_path / "nowhere.png")
    check_rejects(SourceError, "without images", opened, tmp_path / "empty")
    check_rejects(SourceError, "text.txt", opened, tmp_path / "text.txt")


def test_transparency_and_depth(tmp_path):
    rgba = photograph(20, 30, 4)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    check_rejects(UnsupportedArray, "a.png|drop-alpha", opened, tmp_path / "a.png")
    np.testing.assert_array_equal(opened(tmp_path / "a.png", drop_alpha=True)["a"].values, rgba[..., :3])
    Image.fromarray(photograph(20, 30).astype("u2") * 9).save(tmp_path / "deep.png")
    deep = opened(tmp_path / "deep.png")["deep"].values
    assert deep.dtype == np.uint16
    np.testing.assert_array_equal(deep, photograph(20, 30).astype("u2") * 9)


def test_equal_names_get_their_suffix(tmp_path):
    for suffix in ("png", "bmp"):
        Image.fromarray(photograph(20, 30, 3)).save(tmp_path / f"a.{suffix}")
    assert set(opened(tmp_path)) == {"a", "a-png"}
    check_rejects(ConfigurationError, "both", opened, tmp_path, tmp_path)


def test_one_name_for_many_sources(folder, tmp_path, capsys):
    assert ingest(folder, tmp_path / "out.zarr", "--name", "one") == 2
    assert "--stack" in capsys.readouterr().err


GEO = {
    33550: (10.0, 20.0, 0.0),
    33922: (0.0, 0.0, 0.0, 500000.0, 5600000.0, 0.0),
    34735: (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632),
    42113: "255",
}


def test_georeference():
    assert georeference({}) == {}
    assert georeference(GEO) == {
        "crs": "EPSG:32632",
        "transform": [10.0, 0.0, 500000.0, 0.0, -20.0, 5600000.0],
        "nodata": 255.0,
    }
    points = {**GEO, 34735: (1, 1, 0, 2, 1025, 0, 1, 2, 2048, 0, 1, 4326)}
    assert georeference(points)["crs"] == "EPSG:4326"
    assert georeference(points)["transform"] == [10.0, 0.0, 499995.0, 0.0, -20.0, 5600010.0]
    turned = {34264: (1.0, 2.0, 0.0, 5.0, 3.0, 4.0, 0.0, 6.0, *[0.0] * 7, 1.0)}
    assert georeference(turned) == {"transform": [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]}
    assert georeference({34735: (1, 1, 0, 1, 3072, 0, 1, 32767)}) == {}


def write_geotiff(path, values):
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind in {33550: 12, 33922: 12, 34735: 3}.items():
        tags[tag] = GEO[tag]
        tags.tagtype[tag] = kind
    Image.fromarray(values).save(path, tiffinfo=tags, compression="tiff_deflate")


@pytest.mark.parametrize("reader", ["rasterio", "tifffile", "PIL"])
@pytest.mark.parametrize("shape", [(70, 90, 3), (70, 90)])
def test_geotiff(tmp_path, monkeypatch, reader, shape):
    pytest.importorskip(reader)
    readers = [pair for pair in sources._TIFF_READERS if pair[0] == reader]
    monkeypatch.setattr(sources, "_TIFF_READERS", readers)
    values = photograph(*shape)
    write_geotiff(tmp_path / "geo.tif", values)
    assert ingest(tmp_path / "geo.tif", tmp_path / "out.zarr", "--chunk", 64) == 0
    array = zarr.open_array(tmp_path / "out.zarr", path="geo", mode="r")
    np.testing.assert_array_equal(array[:], values)
    assert array.attrs["crs"] == "EPSG:32632"
    assert array.attrs["transform"] == [10.0, 0.0, 500000.0, 0.0, -20.0, 5600000.0]


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
    # NaN that stands for nothing is an error
    assert ingest(tmp_path / "deep.tif", tmp_path / "plain.zarr", "--nodata", "none") == (nodata != nodata)


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
        (["--value-range", "5,1"], "value_range"),
        (["--nodata", "300"], "nodata|300"),
        (["--psnr", "40", "--bpp", "1"], "psnr, bpp"),
        (["--max-error", "-1"], "max_error"),
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


def test_a_large_geotiff_is_read_in_parts(tmp_path, monkeypatch):
    pytest.importorskip("rasterio")
    monkeypatch.setattr(sources, "WINDOW", 64)
    write_geotiff(tmp_path / "geo.tif", photograph(130, 90, 3))
    values = opened(tmp_path / "geo.tif")["geo"].values
    assert values.numblocks == (3, 2, 1)
    np.testing.assert_array_equal(values, photograph(130, 90, 3))


def test_pages_of_a_tiff(tmp_path, monkeypatch):
    pages = [Image.fromarray(photograph(20, 30, seed=n)) for n in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    if importlib.util.find_spec("tifffile"):
        monkeypatch.setattr(sources, "_TIFF_READERS", [("tifffile", sources._tifffile)])
        found = opened(tmp_path / "pages.tif")["pages"]
        assert found.axes == "nyx"
        np.testing.assert_array_equal(found.values[2], photograph(20, 30, seed=2))
    monkeypatch.setattr(sources, "_TIFF_READERS", [])
    check_rejects(UnsupportedArray, "3 images", opened, tmp_path / "pages.tif")


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
    assert set(again.array_keys()) == {"scene", "bare"}
    np.testing.assert_array_equal(again["bare"][:], photograph(70, 90, 3))


def test_zarr_arrays_that_are_no_images(tmp_path):
    group = zarr.open_group(tmp_path / "in.zarr", mode="w")
    group.create_array("a", shape=(70, 90), dtype="f4")
    check_rejects(SourceError, "without arrays", opened, tmp_path / "in.zarr")
    group.create_array("b", shape=(70, 90), dtype="f8")
    check_rejects(UnsupportedArray, "float64", opened, tmp_path / "in.zarr" / "b")


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
