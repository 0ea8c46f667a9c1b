"""Training a head: what data sets say of one another, and a file that labels and embeds."""

import json

import numpy as np
import pytest

from deepsic_codec import config
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.zoo import HEAD_ALIASES, PACKAGED, find_head, find_model
from deepsic_codec.training.tree import Tree
from tests.common import check_rejects

TREE = {
    "parents": {
        "Oak": "Wood",
        "Beech": "Wood",
        "Wood": "Land",
        "Sand": "Land",
        "Land": "",
        "Cat": "Indoors",
        "Indoors": "",
    },
    "others": {"Green": ["Wood"]},
    "data_sets": {
        "Trees": {"prefix": "t_", "classes": {"oak": "Oak", "beech": "Beech"}},
        "Land": {"prefix": "", "classes": {"wood": "Wood", "sand": "Sand"}},
        "Pets": {"prefix": "p_", "classes": {"cat": "Cat"}},
    },
}


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(TREE))
    return Tree.read(path)


def test_what_an_image_says(tree):
    assert tree.nodes == ("Oak", "Beech", "Sand", "Cat", "Wood", "Land", "Indoors") and tree.leaves == 4
    assert tree.vocabulary.members("Wood") == (0, 1, 4) and tree.vocabulary.members("Green") == (0, 1, 4)
    expected, weight = tree.says("Land", "Wood")
    assert expected.tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert weight.tolist() == [0, 0, 1, 1, 1, 1, 1, 1], "which tree it is, is not known; what it is not, is"
    expected, weight = tree.says("Trees", "Oak")
    assert expected.tolist() == [1, 0, 0, 0, 1, 1, 0, 0]
    assert weight[1] == 1 and weight[3] == 1, "a class of the same set, and one far away, are absent"
    expected, weight = tree.says_other({"Land": 1.0})
    assert expected.tolist() == [0] * 7 + [1] and weight.tolist() == [1, 1, 1, 0, 1, 1, 0, 1]


def test_names_of_files(tree):
    assert tree.locate("oak", "t_1.png") == ("Trees", "Oak") and tree.locate("sand", "x.png") == ("Land", "Sand")
    assert tree.locate("oak", "1.png") is None and tree.locate("other", "t_1.png") is None


@pytest.mark.parametrize(
    "change,words",
    [
        ({"parents": TREE["parents"] | {"Land": "Oak"}}, "a cycle"),
        ({"parents": TREE["parents"] | {"Land": "Earth"}}, "Earth is no node"),
        ({"data_sets": {"a": {"prefix": "", "classes": {"x": "Elm"}}}}, "Elm is no node"),
        ({"data_sets": None}, "no tree of classes"),
    ],
)
def test_trees_that_are_wrong(tmp_path, change, words):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(TREE | change))
    check_rejects(ConfigurationError, words, Tree.read, path)


def test_training_writes_a_head(tmp_path):
    pytest.importorskip("torch")
    from PIL import Image

    from benchmarks.fuzz import tiny_model
    from deepsic_codec.training.head_settings import HeadSettings
    from deepsic_codec.training.train_head import train_head

    model = tiny_model(tmp_path)
    config.set(model_path=(str(tmp_path),))
    (tmp_path / "tree.json").write_text(json.dumps(TREE))
    rng, sizes = np.random.default_rng(0), {"oak": ("t_", 64), "beech": ("t_", 64), "wood": ("", 90), "cat": ("p_", 70)}
    for folder, (prefix, size) in sizes.items():
        place = tmp_path / "labels" / folder
        place.mkdir(parents=True)
        for i in range(17):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(place / f"{prefix}{i}.png")
    (tmp_path / "others").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (130, 100, 3), np.uint8)).save(tmp_path / "others" / f"{i}.png")
    said = []
    settings = HeadSettings(
        labels=[str(tmp_path / "labels")],
        others=[str(tmp_path / "others")],
        out=str(tmp_path / "woods.safetensors"),
        base=model.name,
        tree=str(tmp_path / "tree.json"),
        passes=1,
        last_steps=3,
        steps=2,
        values=5,
    )
    head = train_head(settings, report=said.append)
    info = find_model(model.name, head=find_head("woods", model.decoder))
    assert info.head == head.head and info.values == 5
    assert info.vocabulary.classes == ("Oak", "Beech", "Sand", "Cat", "Wood", "Land", "Indoors")
    assert any("cells of 34 labelled images" in line for line in said), said
    check_rejects(ConfigurationError, "--others", train_head, HeadSettings(labels=["x"], others=[]))
    empty = HeadSettings(labels=[str(tmp_path / "others")], others=[str(tmp_path / "others")], base=model.name)
    check_rejects(ConfigurationError, "no image lies in a folder", train_head, empty)


def test_the_packaged_head_has_the_classes_of_the_packaged_tree():
    info = find_model("base", head=find_head("scenes", find_model("base").decoder))
    assert info.vocabulary.classes == Tree.read().nodes and info.vocabulary.parents == Tree.read().vocabulary.parents
    assert (PACKAGED / f"{HEAD_ALIASES['scenes']}.safetensors").stat().st_size < 400_000
