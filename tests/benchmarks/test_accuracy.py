"""The accuracy benchmark on the bundled model and images."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import accuracy
from deepsic_codec.samples import drone_frame, eurosat_classes, eurosat_mosaic


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
