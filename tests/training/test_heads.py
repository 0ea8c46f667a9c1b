"""Training a head: what data sets say of one another, and a file that labels and embeds."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from deepsic_codec import config
from deepsic_codec.errors import ConfigurationError, ModelNotFound
from deepsic_codec.model.file import load_arrays, save_head
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import HEAD_ALIASES, PACKAGED, find_head, find_model
from deepsic_codec.samples import eurosat_mosaic
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


def test_a_tree_without_some_nodes(tree):
    less = tree.without(["Oak", "Indoors"])
    assert less.nodes == ("Beech", "Sand", "Wood", "Land") and less.locate("oak", "t_1.png") is None
    assert less.locate("beech", "t_1.png") == ("Trees", "Beech") and less.locate("cat", "p_1.png") is None
    less = tree.without(["Wood"])
    assert less.nodes == ("Sand", "Cat", "Land", "Indoors") and not less.others, "what lies below goes, too"
    assert tree.without(["Cat"]).nodes == ("Oak", "Beech", "Sand", "Wood", "Land"), "nothing is left of Indoors"
    assert tree.without([]) == tree
    check_rejects(ConfigurationError, "no node 'Elm'", tree.without, ["Oak", "Elm"])
    check_rejects(ConfigurationError, "exclude fewer", tree.without, ["Land", "Indoors"])


def cell_set(marks, seed=0):
    """Cells whose first latents tell marks apart."""
    from deepsic_codec.training.heads import CellSet

    rng, marks = np.random.default_rng(seed), np.array(marks)
    cells = rng.integers(-60, 60, (len(marks), 4, 4, 320)).astype(np.int16)
    cells[:, :, :, :8] += (200 * np.eye(8, dtype=np.int16))[marks][:, None, None]
    return CellSet(cells, marks, np.arange(len(marks)), np.full(len(marks), 50, np.float32))


def test_cells_without_some_nodes(tree):
    pytest.importorskip("torch")
    from deepsic_codec.training.train_head import Cells

    # Trees: Oak 0, Beech 1; Land: Wood 2, Sand 3; Pets: Cat 4; no class: 5
    some = cell_set([0, 1, 2, 3, 4, 5, 1])
    less = Cells(tree, [(0.7, some)]).without(["Oak"])
    ((share, cells),) = less.sources
    assert share == 0.7 and "Oak" not in less.tree.nodes
    assert cells.marks.tolist() == [0, 1, 2, 3, 4, 0] and cells.images.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(cells.cells, some.cells[1:])


def test_embeddings_are_discriminant_directions(tree):
    torch = pytest.importorskip("torch")
    from deepsic_codec.training import heads

    known = heads.Marks(tree, {})
    cells = cell_set([0, 1, 2, 3, 4, 5] * 40)
    head = heads.starting_head(find_model("base"), tree.vocabulary, 3)
    seen = heads._pooled_of(head, cells)
    heads.fit_last(head, [(1.0, cells)], known, steps=0, report=str)
    before = heads.all_outputs(head, cells)[:, head.classes :]
    apart = before[torch.from_numpy(cells.marks) == 0].mean(0) - before[torch.from_numpy(cells.marks) == 1].mean(0)
    spread = before[torch.from_numpy(cells.marks) == 0].std(0)
    assert (apart.abs() > 2 * spread).any() and before.square().mean().sqrt() == pytest.approx(heads.SPREAD, rel=0.05)
    line = torch.linalg.lstsq(torch.cat([seen, torch.ones(len(seen), 1)], 1), before).solution
    fitted = torch.cat([seen, torch.ones(len(seen), 1)], 1) @ line
    assert (fitted - before).abs().quantile(0.99) < 0.01, "an embedding is linear in what the last two layers see"
    scores = heads.all_outputs(head, cells)[:, : head.classes]
    heads.fit_last(head, [(1.0, cells)], known, steps=120, batch=32, report=str)
    after = heads.all_outputs(head, cells)
    np.testing.assert_allclose(after[:, head.classes :], before, atol=1e-4)
    marks = torch.from_numpy(cells.marks)
    losses = [float(heads.label_loss(one, marks, known)) for one in (scores, after[:, : head.classes])]
    assert losses[1] < 0.5 * losses[0]


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
    again = replace(settings, head="woods", steps=0, last_steps=0, out=str(tmp_path / "again.safetensors"))
    train_head(again, report=str)
    first, second, of_model = (
        load_arrays(one)["head.hidden.weight"][5:].ravel()
        for one in (info, find_model(model.name, head=find_head("again", model.decoder)), model)
    )
    assert np.corrcoef(first, second)[0, 1] > 0.99 > 0.5 > np.corrcoef(first, of_model)[0, 1]
    train_head(replace(settings, exclude=["Oak", "Indoors"], out=str(tmp_path / "less.safetensors")))
    less = find_model(model.name, head=find_head("less", model.decoder))
    assert less.vocabulary.classes == ("Beech", "Sand", "Wood", "Land") and less.values == 5
    check_rejects(ModelNotFound, "no head 'other'", train_head, replace(settings, head="other", labels=[]))
    check_rejects(ConfigurationError, "--others", train_head, HeadSettings(labels=["x"], others=[]))
    empty = HeadSettings(labels=[str(tmp_path / "others")], others=[str(tmp_path / "others")], base=model.name)
    check_rejects(ConfigurationError, "no image lies in a folder", train_head, empty)


def test_leaves_at_chance_are_left_out(tree, monkeypatch):
    """Oak is told from beech, beech is not; few images of sand say nothing; cats are alone in their set."""
    torch = pytest.importorskip("torch")
    from deepsic_codec.training import heads

    known = heads.Marks(tree, {})
    cells = cell_set(([0] * 2 + [1] * 2) * 7 + [2] * 9 + [3] * 2 + [4] * 9 + [5] * 4)
    cells.images[:28] = np.repeat(np.arange(14), 2)
    cells.images[28:] = np.arange(20, 20 + len(cells) - 28)
    rng = np.random.default_rng(0)

    def outputs(head, some):
        scores = rng.normal(size=(len(some), 8)).astype(np.float32)
        scores[:, 0] += some.marks == 0
        scores[::2, 0] -= 3  # of one of two cells of an image
        scores[1::2, 0] += 3
        scores[:, 1] = 0
        return torch.from_numpy(scores)

    monkeypatch.setattr(heads, "all_outputs", outputs)
    head = SimpleNamespace(classes=8)
    assert heads.chance_leaves(head, [cells[:28], cells[28:]], known) == ["Beech"]
    assert heads.chance_leaves(head, [cells[28:]], known) == [], "two images of sand, none of trees"


def test_a_head_without_some_classes_scores_the_others_as_before(tmp_path):
    pytest.importorskip("torch")
    from deepsic_codec.training.heads import without_classes

    base = find_model("base")
    whole = find_model("base", head=find_head("scenes", base.decoder))
    arrays = {name: value for name, value in load_arrays(whole).items() if name.startswith("head.")}
    kept, vocabulary = without_classes(arrays, whole.vocabulary, ["River", "Animal"])
    assert vocabulary.classes == tuple(name for name in whole.vocabulary.classes if name not in ("River", "Animal"))
    assert vocabulary.parents["RiverLake"] == ("Pond",) and "Animal" not in vocabulary.parents["Ground"]
    sizes = whole.architecture | {"classes": len(vocabulary.names)}
    save_head(tmp_path / "less.safetensors", "less", kept, base, sizes, vocabulary, {})
    config.set(model_path=(str(tmp_path),))
    less = find_model("base", head=find_head("less", base.decoder))
    image = eurosat_mosaic()[:128, :128]
    cells = [
        get_scheduler(info).encode([image[None]], [50], [0], features=False, labels=True)[0].cells
        for info in (whole, less)
    ]
    rows = [whole.vocabulary.names.index(name) for name in vocabulary.names]
    np.testing.assert_array_equal(cells[0][..., rows], cells[1][..., : len(rows)])
    np.testing.assert_array_equal(cells[0][..., -48:], cells[1][..., -48:])


def test_the_packaged_head_has_the_classes_of_the_packaged_tree():
    """But for those that were at chance on held-out images."""
    info, tree = find_model("base", head=find_head("scenes", find_model("base").decoder)), Tree.read()
    left_out = {"Cat", "Dog", "GroundBuildings"}
    assert info.vocabulary.classes == tuple(name for name in tree.nodes if name not in left_out)
    assert {*info.vocabulary.known} >= {*tree.parents} - left_out and len(info.vocabulary.members("GroundUrban")) == 2
    assert (PACKAGED / f"{HEAD_ALIASES['scenes']}.safetensors").stat().st_size < 400_000
