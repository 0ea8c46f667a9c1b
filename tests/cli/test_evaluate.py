"""`deepsic evaluate` and the accuracy benchmark on the bundled model and images."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import accuracy
from deepsic_codec.cli.evaluate import evaluate, means
from deepsic_codec.cli.main import main
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.metrics import ms_ssim, psnr
from deepsic_codec.model.zoo import PACKAGED
from deepsic_codec.samples import drone_frame, eurosat_classes, eurosat_mosaic
from tests.common import check_rejects


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Two tiles of every class of the bundled mosaic, in class folders."""
    folder = tmp_path_factory.mktemp("tiles")
    mosaic, names = eurosat_mosaic(), np.array(eurosat_classes())
    for name in np.unique(names):
        (folder / name).mkdir()
        for i, (r, c) in enumerate(np.argwhere(names == name)[:2]):
            Image.fromarray(mosaic[64 * r : 64 * r + 64, 64 * c : 64 * c + 64]).save(folder / name / f"{i}.png")
    return folder


def test_figures_are_those_of_the_codec():
    image = drone_frame()[:192, :256]
    (result,) = evaluate([("a.png", image)], "base", 40.0)
    codec = DeepSIC(quality=40.0)
    payload = codec.encode(image)
    decoded = codec.decode(payload)
    assert result.nbytes == len(payload) and result.bpp == 8 * len(payload) / (192 * 256)
    assert result.psnr == psnr(image, decoded) and result.ms_ssim == ms_ssim(image, decoded)
    small = means(list(evaluate([("b.png", image[:64, :64]), ("a.png", image)], "base", 40.0)))
    assert len(small) == 1 and small[0].ms_ssim == result.ms_ssim, "an image too small for MS-SSIM is left out of it"


@pytest.mark.parametrize("semantics", ["pre", "post"])
def test_command_writes_what_it_prints(tiles, tmp_path, capsys, semantics):
    (tiles / "broken.png").write_bytes(b"nothing")
    table = tmp_path / "r.csv"
    model = str(PACKAGED / "base-89eaa6c0.safetensors")
    command = [
        "evaluate",
        str(tiles),
        "--labelled",
        "--qualities",
        "40",
        "70",
        "--model",
        model,
        "--semantics",
        semantics,
    ]
    assert main([*command, "--csv", str(table)]) == 0
    printed = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (tiles / "broken.png").unlink()
    found = json.loads(capsys.readouterr().out)
    assert "skipped: broken.png" in printed and found["skipped"][0].startswith("broken.png (")
    assert f"decoding {found['kmac_per_pixel']['decoding']:.2f}" in printed
    assert found["kmac_per_pixel"]["decoding"] <= 20 and found["kmac_per_pixel"]["head"] <= 1
    low, high = found["means"]
    assert low["bpp"] < high["bpp"] and low["psnr"] < high["psnr"] and f"{low['bpp']:.4f}" in printed
    assert min(low["top1"], high["top1"]) >= 0.5 and low["ms_ssim"] is None
    count = len(found["images"]) // 2
    right = [r["top1"] for r in found["images"][:count]]
    assert np.isclose(low["top1"], np.mean(right)) and f"{low['top1']:.3f}" in printed
    with open(table, newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * count + 2


def test_effort_and_tune_are_the_codecs(tmp_path, capsys):
    image = drone_frame()[:96, :128]
    Image.fromarray(image).save(tmp_path / "a.png")
    command = ["evaluate", str(tmp_path), "--qualities", "40", "--json"]
    assert main([*command, "--effort", "2", "--tune", "ms-ssim"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["means"]
    codec = DeepSIC(quality=40, effort=2, tune="ms-ssim")
    assert found["nbytes"] == len(codec.encode(image)) < len(DeepSIC(quality=40).encode(image))
    assert main([*command, "--tune", "ms-ssim"]) == 2
    assert "needs an effort of 2 to 4" in capsys.readouterr().err


def test_a_file_for_json_is_refused(tiles):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(tiles), "--json", "r.json"])
    assert caught.value.code == 2


def test_nothing_to_evaluate(tmp_path):
    check_rejects(ConfigurationError, "no readable image", main, ["--debug", "evaluate", str(tmp_path)])


def test_accuracy_benchmark(tiles, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(drone_frame()[:128, :192]).save(photos / "a.png")
    out = tmp_path / "a.json"
    accuracy.main(
        [
            "--data",
            str(tiles),
            "--train",
            str(tiles),
            "--photos",
            str(photos),
            "--qualities",
            "60",
            "--steps",
            "2",
            "--batch",
            "4",
            "--json",
            str(out),
            "--csv",
            str(tmp_path / "a.csv"),
            "--png",
            str(tmp_path / "a.png"),
        ]
    )
    rows = json.loads(out.read_text())["rows"]
    assert [r["network"] for r in rows] == ["DeepSIC pre", "DeepSIC post", "ResNet-18", "own trunk, raw pixels"]
    pre, post = rows[:2]
    assert pre["top1"] >= 0.5 and post["top1"] >= 0.5 and pre["top5"] >= pre["top1"]
    assert pre["bpp"] > post["bpp"] > pre["mosaic_bpp"] / 2, "labels cost bytes"
    assert 0 <= pre["unknown"] <= 1 and (tmp_path / "a.png").stat().st_size > 5000
    assert "Conclusion: DeepSIC" in capsys.readouterr().out


def test_top_k():
    scores = np.array([[1, 9, 3, 4, 5, 6, 7], [7, 1, 2, 3, 4, 5, 6], [5, 5, 5, 5, 5, 5, 5]], np.uint8)
    assert accuracy.top_k(scores, np.array([1, 3, 6])) == (1 / 3, 2 / 3)
    assert accuracy.top_k(scores, np.array([0, 0, 0])) == (2 / 3, 2 / 3)


def test_mosaics_show_the_tiles_that_they_name():
    tiles = np.random.default_rng(0).integers(0, 255, (37, 64, 64, 3)).astype("u1")
    images, pick = accuracy._mosaics(tiles, 2)
    assert len(images) == 9 and len(pick) == len(set(pick)) == 36
    np.testing.assert_array_equal(images[2][64:, :64], tiles[pick[2 * 4 + 2]])


def test_the_architecture_stays_within_the_budget():
    """Decoding in 20 kMAC/px, the semantic head in 1, the second look at each digit counted."""
    from types import SimpleNamespace

    from deepsic_codec.cli.evaluate import complexity
    from deepsic_codec.training.phases import ARCHITECTURES

    cost = complexity(SimpleNamespace(arch=ARCHITECTURES["base"]))
    assert cost["decoding"] == cost["prior"] + cost["synthesis"]
    assert 8 < cost["decoding"] <= 20 and cost["head"] <= 1
