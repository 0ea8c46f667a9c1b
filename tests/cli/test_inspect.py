import argparse
import json
import re
import shlex

import numpy as np
import pytest
import zarr
from PIL import Image

from deepsic_codec import DeepSIC, create_array, open_labels
from deepsic_codec.cli.demo import METADATA
from deepsic_codec.cli.main import main
from deepsic_codec.cli.options import axis_part
from deepsic_codec.io import compare
from deepsic_codec.samples import drone_frame, eurosat_mosaic
from tests.common import check_rejects, photograph, psnr


@pytest.fixture
def place(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_array("a.zarr", name="img", data=photograph(128, 192, 3), chunks=(64, 64, 3))
    return tmp_path


def run(capsys, *arguments):
    code = main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "a.zarr", "--json"],
        ["preview", "a.zarr", "--json"],
        ["export", "a.zarr", "b.zarr", "--json"],
        ["compare", "a.png", "--json", "--codecs", "WebP", "--no-curve"],
        ["index", "a.zarr", "--json"],
        ["labels", "a.zarr", "--scan", "--json"],
        ["labels", "a.zarr", "--scan", "--map", "Dark", "--json"],
        ["ingest", "a.png", "i.zarr", "--json"],
    ],
)
def test_every_command_prints_json_and_nothing_else(place, capsys, arguments):
    Image.fromarray(photograph(192, 192, 3)).save("a.png")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_info_describes_the_installation(capsys, monkeypatch):
    code, out, _ = run(capsys, "info", "--system", "--json")
    described = json.loads(out)
    assert code == 0 and described["packages"]["numpy"] == np.__version__ and described["cpu"]["threads"] >= 1
    monkeypatch.setattr("deepsic_codec.io.system.find_spec", lambda name: None)
    code, out, _ = run(capsys, "info", "--system")
    assert code == 0 and "torch is not installed" in out and described["cpu"]["instructions"] in out
    assert run(capsys, "info")[0] == 2


def test_query_prints_a_line_of_json_for_each_match(place, capsys):
    code, out, _ = run(capsys, "query", "a.zarr", "Visible", "--scan", "--json")
    assert code == 0 and out.splitlines() and all("region" in json.loads(line) for line in out.splitlines())


def test_answers_of_an_index_say_whether_they_were_compared(place, capsys):
    assert run(capsys, "index", "a.zarr")[0] == 0
    for words in (["labels", "a.zarr"], ["query", "a.zarr", "Visible"]):
        assert "not compared with the chunks; --verify" in run(capsys, *words)[2]
        verified = run(capsys, *words, "--verify", *["all"][: words[0] == "query"])
        assert verified[0] == 0 and "compared" not in verified[2]
    zarr.open_group("a.zarr")["img"][:64, :64] = 0
    code, _, err = run(capsys, "labels", "a.zarr", "--verify")
    assert code == 1 and "1 chunk written again" in err and "deepsic index" in err


def test_query_reports_what_it_read_to_open_the_index_too(place, capsys):
    assert run(capsys, "index", "a.zarr")[0] == 0
    labels = open_labels("a.zarr")
    selection = labels.where("Visible")
    code, out, _ = run(capsys, "query", "a.zarr", "Visible")
    nbytes, requests = labels.bytes_read + selection.bytes_read, labels.requests + selection.requests
    assert labels.bytes_read and selection.bytes_read
    assert code == 0 and f"read {nbytes:,} bytes in {requests} requests" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "a.zarr", "Visible"],
        ["labels", "a.zarr"],
        ["preview", "a.zarr", "--where", "Visible"],
        ["export", "a.zarr", "b.zarr", "--where", "Visible"],
    ],
)
def test_an_index_that_is_named_is_the_one_that_is_read(place, capsys, arguments):
    """The index beside the array would answer as well."""
    assert run(capsys, "index", "a.zarr")[0] == 0
    assert run(capsys, *arguments)[0] == 0
    code, _, error = run(capsys, *arguments, "--index", "missing.zarr", *(["--overwrite"] * ("export" in arguments)))
    assert code == 1 and "missing.zarr" in error


def test_query_exports_images_of_any_bands_as_tiff(place, capsys):
    tifffile = pytest.importorskip("tifffile")
    data = photograph(64, 64, 6).astype("u2") * 9
    codec = DeepSIC(value_range="chunk")
    array = create_array("bands.zarr", name="img", data=data, chunks=(64, 64, 6), codec=codec)
    arguments = ["query", "bands.zarr", "Dark | ~Dark", "--scan", "--export", "out"]
    code, _, err = run(capsys, *arguments, "--as", "tiff")
    assert code == 0 and err == "1 image: out\n"
    np.testing.assert_array_equal(tifffile.imread("out/img_0_0_0.tiff"), array[...])
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "PNG holds 1 or 3 bands" in err and "not 6 bands of uint16; write TIFF" in err


def test_demo_as_json_and_in_the_older_format(tmp_path, capsys, monkeypatch):
    code, out, _ = run(capsys, "demo", "--format", "2", "--out", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0 and [one["image"] for one in found["images"]] == ["mosaic", "drone"]
    assert found["labels"]["tiles"] == 192 and found["labels"]["right"] > 0.7 * 192
    assert found["query"]["bytes_read"] <= 12 * 256 + 3000  # and metadata
    for one, image in zip(found["images"], (eurosat_mosaic(), drone_frame()), strict=True):
        folder = tmp_path / "demo.zarr" / one["image"]
        array = zarr.open(folder, mode="r")
        assert array.metadata.zarr_format == 2 and psnr(image, array[:]) == pytest.approx(one["psnr"])
        files = [file for file in folder.rglob("*") if file.is_file() and file.name not in METADATA]
        assert len(files) == 12 and sum(file.stat().st_size for file in files) == one["nbytes"] < image.nbytes / 8
    scene = zarr.open(tmp_path / "demo.zarr" / "landsat", mode="r")
    assert scene.metadata.zarr_format == 2 and scene.attrs["crs"] == "EPSG:32617"
    assert all((tmp_path / "demo.zarr" / f"{name}_labels").is_dir() for name in ("mosaic", "drone", "landsat"))
    monkeypatch.chdir(tmp_path)
    assert [main(shlex.split(line)[1:]) for line in found["commands"]] == [0, 0, 0]


def test_info_in_words(place, capsys):
    code, out, _ = run(capsys, "info", "a.zarr")
    assert code == 0 and "128 x 192 x 3 (y, x, c) uint8" in out and "6 of 6 stored" in out
    assert all(line == line.rstrip() and len(line) <= 120 for line in out.splitlines())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_error": 0}, "none: lossless"),
        ({"max_error": 3}, "at most 3 units of the data in any sample"),
        ({"quality": 50}, "less where the image has less detail"),
        ({"psnr": 40}, "RMSE of about 2.55 in units of the data (PSNR of about 40.0 dB, peak 255)"),
        ({"rmse": 3}, "RMSE of about 3 in units of the data"),
        ({"quality": 200}, "quantiser step 0.0156 of 255"),
        (
            {"quality": 50, "value_range": (0, 51)},
            "RMSE of about 1.67 in units of the data (PSNR of about 29.7 dB, peak 51)",
        ),
    ],
)
def test_info_says_what_error_to_expect(place, capsys, parameters, words):
    create_array("b.zarr", name="img", data=photograph(64, 64, 3), codec=DeepSIC(**parameters))
    code, out, _ = run(capsys, "info", "b.zarr")
    assert code == 0 and f" {words}" in " ".join(out.split())


def test_preview_and_export_say_what_they_wrote(place, capsys):
    code, out, _ = run(capsys, "preview", "a.zarr", "--out", "p.png", "--size", "100")
    assert (
        code == 0
        and re.fullmatch(r"p\.png: 6 of 6 chunks decoded from [\d,]+ bytes\n", out)
        and Image.open("p.png").width > 200
    )
    code, out, _ = run(capsys, "export", "a.zarr", "b.zarr", "--region", "y=0:64", "x=64:192")
    assert code == 0 and "2 chunks decoded" in out and "wrote b.zarr/img" in out
    np.testing.assert_array_equal(zarr.open_array("b.zarr/img", mode="r")[...], photograph(128, 192, 3)[:64, 64:])


def test_compare_writes_a_table_and_pictures(place, capsys):
    Image.fromarray(photograph(192, 192, 3)).save("a.png")
    Image.fromarray(photograph(192, 200, 3, seed=1)).save("curve.png")
    code, out, _ = run(capsys, "compare", "a.png", "curve.png", "--codecs", "WebP", "--out", "c", "--crop", "10,20")
    assert code == 0 and "mean of 2 images" in out and out.count("WebP") == 3
    assert sorted(path.name for path in (place / "c").iterdir()) == ["a.png", "curve-2.png", "curve.png"]


def test_the_part_that_compare_enlarges_is_named_column_first(place, capsys, monkeypatch):
    Image.fromarray(photograph(64, 64, 3)).save("a.png")
    corners = []
    monkeypatch.setattr(compare, "picture", lambda *args: corners.append(args[-1]) or Image.new("RGB", (1, 1)))
    for options in ([], ["--crop", "10,20"]):
        assert run(capsys, "compare", "a.png", "--codecs", "WebP", "--no-curve", *options)[0] == 0
    assert corners == [None, (20, 10)]


@pytest.mark.parametrize(
    ("code", "words", "arguments"),
    [
        (1, "no array or group", ["info", "nothing.zarr"]),
        (1, "no array or group", ["preview", "nothing.zarr"]),
        (2, "no axis 'q'", ["preview", "a.zarr", "--select", "q=1"]),
        (2, "crop", ["export", "a.zarr", "b.zarr", "--crop"]),
        (2, "axis y are 0 to 127", ["export", "a.zarr", "b.zarr", "--region", "y=300:400"]),
        (1, "overlaps the source", ["export", "a.zarr", "a.zarr/img"]),
        (1, "no such file or folder", ["compare", "nothing.png"]),
    ],
)
def test_errors_are_one_line(place, capsys, code, words, arguments):
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    (line,) = err.splitlines()
    assert line.startswith(f"deepsic {arguments[0]}: error: ") and words in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "a.zarr"],
        ["export", "a.zarr", "b.zarr", "--region", "y"],
        ["export", "a.zarr", "b.zarr", "--codec", "gzip"],
        ["preview", "a.zarr", "--bands", "1,2"],
        ["preview", "a.zarr", "--select", "t=x"],
        ["compare"],
        ["compare", "a.png", "--quality", "0"],
        ["compare", "a.png", "--quality", "30", "--bpp", "1"],
        ["compare", "a.png", "--codecs", "BPG"],
        ["compare", "a.png", "--crop", "5"],
    ],
)
def test_misuse_exits_with_2(place, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"deepsic {arguments[0]}: error: ")


@pytest.mark.parametrize("text", ["y", "y=", "=3", "y=a:b", "y=1:2:3", "y=1.5"])
def test_parts_of_axes_that_are_none(text):
    check_rejects(argparse.ArgumentTypeError, "axis=number", axis_part, text)


def test_parts_of_axes():
    assert [axis_part(text) for text in ("y=0:512", "t=3", "x=:-4")] == [
        ("y", slice(0, 512)),
        ("t", 3),
        ("x", slice(None, -4)),
    ]
