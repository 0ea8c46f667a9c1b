from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import labels
from deepsic_codec import DeepSIC
from deepsic_codec.samples import eurosat_classes, eurosat_mosaic
from deepsic_codec.training.tree import Tree


@pytest.fixture
def scenes(tmp_path):
    rng = np.random.default_rng(0)
    for folder, prefix in (("OverheadForest", "aid_"), ("OverheadBeach", "aid_"), ("OverheadGrass", "rsscn7_")):
        place = tmp_path / "val" / folder
        place.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (90, 100, 3), "u1")).save(place / f"{prefix}{number}.png")
    return tmp_path


def test_mosaics_count_every_tile(scenes):
    a = SimpleNamespace(labels=[scenes], split="val/", limit=None, mosaics=5)
    codec = DeepSIC(head="scenes", quality=30, transform="features", label_tile=128).resolved()
    rows = labels._mosaics(codec, a, Tree.read())
    sizes = [(64, 64), (128, 16), (256, 4)]  # six images make one chunk of four
    assert [row[:3] for row in rows] == [[tile, kind, n] for tile, n in sizes for kind in ("max", "mean")]
    assert all(0 <= top <= parent <= 100 for *_, top, parent in rows)
    assert rows[0][3:] == rows[1][3:], "a tile of one cell is that cell"


def test_small_things_are_counted_in_every_tile(tmp_path):
    """Chunks of 16 tiles of EuroSAT, which the head of base was trained on."""
    mosaic, classes = eurosat_mosaic(), eurosat_classes()
    for number, (y, x) in enumerate(np.ndindex(4, 4)):
        row, column = 3 * y, 4 * x  # far from each other
        place = tmp_path / "val" / classes[row][column]
        place.mkdir(parents=True, exist_ok=True)
        tile = mosaic[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
        Image.fromarray(tile).save(place / f"{number}.png")
    a = SimpleNamespace(labels=[tmp_path], split="val/", limit=None, mosaics=5)
    codec = DeepSIC(quality=50, transform="features", label_tile=256).resolved()
    rows = {(tile, kind): row for tile, kind, *row in labels._small_things(codec, a, Tree.read())}
    assert [row[0] for row in rows.values()] == [16, 16, 4, 4, 1, 1]
    assert rows[64, "max"] == rows[64, "mean"] and min(rows[64, "max"][1:]) > 80
    assert rows[256, "max"][2] > 60 > 20 > rows[256, "mean"][2], "a tile has at most five classes, or none as a whole"


def test_plots_are_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    labels._plot(str(tmp_path / "a.png"), [[0.5, "stored", "0 to 0.1", 9, 0.05, 0.1], [0.5, "stored", "", 9, 0.9, 0.8]])
    assert Image.open(tmp_path / "a.png").size[0] > 300
