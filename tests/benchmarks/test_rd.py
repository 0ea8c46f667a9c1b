"""The rate-distortion benchmark on two small images: one curve for each effort and model, from real payloads."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import rd
from deepsic_codec import DeepSIC
from deepsic_codec.model.paper import RATES, PaperArchitecture
from deepsic_codec.samples import drone_frame


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        Image.fromarray(drone_frame()[200 * i :][:96, :128]).save(folder / f"{i}.png")
    return folder


def test_efforts_and_models_are_curves_of_their_own(images, tmp_path, capsys):
    out, table = tmp_path / "rd.json", tmp_path / "rd.csv"
    command = [
        "--images",
        str(images),
        "--qualities",
        "50",
        "--codecs",
        "--efforts",
        "0",
        "1",
        "2:ms-ssim",
        "--beside",
        "base",
        "--threads",
        "1",
        "--json",
        str(out),
        "--csv",
        str(table),
    ]
    rd.main(command)
    found = json.loads(out.read_text())
    names = ["DeepSIC", "DeepSIC effort 0", "DeepSIC effort 1", "DeepSIC effort 2, ms-ssim", "DeepSIC base"]
    assert list(found["averages"]) == names
    assert [p["codec"] for p in found["images"]] == [name for name in names for _ in range(2)]
    bpp = {name: rows[0]["bpp"] for name, rows in found["averages"].items()}
    assert bpp["DeepSIC effort 0"] > bpp["DeepSIC effort 1"] == bpp["DeepSIC"] == bpp["DeepSIC base"]
    pixels = [np.asarray(Image.open(images / f"{i}.png")) for i in range(2)]
    payloads = DeepSIC(quality=50, effort=0, transform="features").encode_batch(pixels)
    assert bpp["DeepSIC effort 0"] == pytest.approx(np.mean([8 * len(p) / (96 * 128) for p in payloads]))
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    with open(table, newline="") as file:
        assert [row["codec"] for row in csv.DictReader(file)] == names


def test_fixed_rates_are_compared_with_fixed_rates(images, tmp_path, capsys):
    out = tmp_path / "rd.json"
    command = ["--images", str(images), "--qualities", "5", "40", "--rates", "0.2", "0.39", "--threads", "1"]
    rd.main([*command, "--codecs", "JPEG 2000 ratio", "WebP", "--json", str(out)])
    found = json.loads(out.read_text())
    assert [row["bpp"] for row in found["averages"][rd.BY_RATE]] == pytest.approx([0.2, 0.39], rel=0.05)
    assert [row["codec"] for row in found["bd_rate_by_rate"]] == ["DeepSIC", "JPEG 2000 ratio"]
    assert [row["codec"] for row in found["bd_rate"]] == [rd.BY_RATE, "JPEG 2000 ratio", "WebP"]
    # both of ours are the same codec, which only the comparison image by image shows
    assert abs(found["bd_rate"][0]["per_image"]) < 10
    assert f"BD-rate of {rd.BY_RATE} in %" in capsys.readouterr().out


def test_bd_rates_image_by_image_are_averaged_last():
    def points(codec, image, factor):
        return [rd.Point(codec, s, image, factor * s, 30 + 5 * s, 30 + 5 * s, 0.9 + s / 30) for s in (0.2, 0.5, 1.0)]

    found = points("DeepSIC", "a", 1.0) + points("DeepSIC", "b", 1.0)
    found += points("other", "a", 2.0) + points("other", "b", 0.8)
    (row,) = rd.compare(found, rd.average(found), {})
    assert row["codec"] == "other" and row["per_image"] == pytest.approx((-50 + 25) / 2, abs=1e-6)


def test_peers_alone(images, capsys):
    rd.main(["--images", str(images), "--no-deepsic", "--codecs", "--threads", "1"])
    assert "nothing to compare" in capsys.readouterr().out


def test_models_of_one_rate_each_are_known_by_it(monkeypatch):
    assert rd._only_rate("base") is None
    described = PaperArchitecture(1.0, RATES[1.0]).to_json()
    monkeypatch.setattr("deepsic_codec.model.zoo.find_model", lambda name: SimpleNamespace(architecture=described))
    assert rd._only_rate("paper-1.0") == 1.0
