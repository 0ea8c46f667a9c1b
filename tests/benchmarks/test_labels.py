from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import labels
from deepsic_codec import DeepSIC
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
    assert [row[:2] for row in rows] == [[64, 64], [128, 16], [256, 4]], "six images make one chunk of four"
    assert all(0 <= top <= parent <= 100 and 0 <= mean <= 100 for _, _, top, parent, mean in rows)


def test_plots_are_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    labels._plot(str(tmp_path / "a.png"), [[0.5, "stored", "0 to 0.1", 9, 0.05, 0.1], [0.5, "stored", "", 9, 0.9, 0.8]])
    assert Image.open(tmp_path / "a.png").size[0] > 300
