import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from benchmarks import pixels  # noqa: E402  needs torch
from deepsic_codec.training.heads import Marks  # noqa: E402
from deepsic_codec.training.tree import Tree  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Dark forests and light beaches of AID, and rivers of EuroSAT; photographs of no class."""
    rng = np.random.default_rng(0)
    for name, prefix, size, level in (("OverheadForest", "aid_", 90, 40), ("OverheadBeach", "aid_", 90, 200)):
        for split in ("train", "val"):
            place = tmp_path / "scenes" / split / name
            place.mkdir(parents=True)
            for number in range(6):
                Image.fromarray(rng.integers(level - 30, level + 30, (size, size, 3), "u1")).save(
                    place / f"{prefix}{number}.png"
                )
    for split, place in (("train", "River"), ("", "photographs")):
        path = tmp_path / ("scenes" if split else "") / split / place
        path.mkdir(parents=True)
        for number in range(4):
            edge = 64 if split else 150
            Image.fromarray(rng.integers(0, 256, (edge, edge, 3), "u1")).save(path / f"{number}.png")
    return tmp_path


def test_batches_have_the_shares_of_heads(folder):
    known = Marks(Tree.read(), {})
    crops = pixels.Crops([str(folder / "scenes")], [str(folder / "photographs")], known)
    values, marks = crops.batch(40)
    assert values.shape == (40, 3, 64, 64) and values.min() >= 0 and values.max() <= 255
    nodes = [known.pairs[mark][1] if mark != known.other else "" for mark in marks.tolist()]
    assert nodes.count("River") == 17 and nodes.count("") == 6 and {"Forest", "Beach"} <= {*nodes}


def test_networks_learn_the_training_images(folder, capsys, monkeypatch):
    monkeypatch.setattr(pixels, "BATCH", 12)
    scenes = str(folder / "scenes")
    common = ["--train", scenes, "--others", str(folder / "photographs"), "--labels", scenes, "--head", "scenes"]
    pixels.main([*common, "--minutes", "5", "--steps", "15"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    figures = {(row[0].split(",")[0], row[1]): row[2:] for row in rows if len(row) == 5}
    assert figures["ResNet-18", "AID"][0] == "12" and float(figures["ResNet-18", "AID"][1]) > 90
    assert {network for network, _ in figures} >= {"head scenes", "ResNet-18", "own trunk"}
