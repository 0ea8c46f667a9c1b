"""`deepsic evaluate` on the bundled model and images."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from deepsic_codec.cli.main import main
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.zoo import PACKAGED
from deepsic_codec.samples import drone_frame, eurosat_classes, eurosat_mosaic
from tests.common import check_rejects, psnr


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


@pytest.mark.parametrize("semantics", ["pre", "post"])
def test_command_writes_what_it_prints(tiles, tmp_path, capsys, semantics):
    (tiles / "broken.png").write_bytes(b"nothing")
    table = tmp_path / "r.csv"
    model = str(PACKAGED / "base-407b2baf.safetensors")
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


def test_figures_are_those_of_the_payloads(tmp_path, capsys):
    """Bytes, bits per pixel and PSNR of each image, and their means over images of different sizes."""
    images = {"a": drone_frame()[:96, :128], "b": drone_frame()[300:364, 500:700]}
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    assert main(["evaluate", str(tmp_path), "--qualities", "30", "75", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = []
    for quality, mean in zip((30, 75), found["means"], strict=True):
        codec = DeepSIC(quality=quality, transform="features")
        rows = [row for row in found["images"] if row["quality"] == quality]
        for row, image in zip(rows, images.values(), strict=True):
            payload = codec.encode(image)
            bits = 8 * len(payload) / (image.shape[0] * image.shape[1])
            expected.append((len(payload), bits, psnr(image, codec.decode(payload))))
            assert (row["nbytes"], row["bpp"], row["psnr"]) == pytest.approx(expected[-1], rel=1e-4)
        for name, values in zip(("bpp", "psnr"), list(zip(*expected[-2:], strict=True))[1:], strict=True):
            assert mean[name] == pytest.approx(sum(values) / 2, rel=1e-4), name


def test_a_file_for_json_is_refused(tiles):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(tiles), "--json", "r.json"])
    assert caught.value.code == 2


def test_nothing_to_evaluate(tmp_path):
    check_rejects(ConfigurationError, "no readable image", main, ["--debug", "evaluate", str(tmp_path)])
