"""Labels learned from examples: the classifier, the column in the index, what becomes of it, and what is refused."""

import json

import numpy as np
import pytest
import zarr
from PIL import Image
from zarr.storage import LocalStore

from deepsic_codec import consolidate_labels, open_labels, relabel
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError, ExpressionError, LabelIndexError, StaleIndex
from deepsic_codec.labels.learned import Examples, fit, sigmoid
from deepsic_codec.labels.learned_label import LearnedLabel
from tests.common import check_rejects
from tests.labels.test_similarity import LEVELS, archive, levels, scene

pytestmark = pytest.mark.usefixtures("stub")


def cell(level):
    """The region of a cell of this brightness."""
    y, x = np.argwhere(level == LEVELS)[0].tolist()
    return slice(64 * y, 64 * y + 64), slice(64 * x, 64 * x + 64)


def learned(array=None):
    array = archive() if array is None else array
    labels = consolidate_labels(array)
    label = labels.learn("night", like=[cell(20), cell(40)], unlike=[cell(200), cell(250), cell(140)])
    return array, labels, label


def dark(labels):
    return sorted(levels(labels.where("night", tiles=True)))


def test_the_classifier_is_the_optimum():
    """Of the penalised mean loss: no step lowers it."""
    rng = np.random.default_rng(1)
    vectors, targets = rng.normal(size=(60, 5)), rng.random(60) < 0.4
    weights = rng.random(60)
    weights /= weights.sum()

    def loss(result):
        logits = vectors @ result[:-1] + result[-1]
        return (weights * np.logaddexp(0, np.where(targets, -logits, logits))).sum() + 0.005 * (result[:-1] ** 2).sum()

    best = fit(vectors, targets, weights)
    assert all(loss(best) <= loss(best + step) for step in rng.normal(size=(200, 6)) * 1e-3)
    np.testing.assert_allclose(sigmoid(np.array([-800.0, 0, 800])), [0, 0.5, 1])


def test_cross_validation_counts_what_was_held_out():
    rng = np.random.default_rng(2)
    near, far = rng.normal(3, 1, (20, 4)), rng.normal(-3, 1, (30, 4))
    assert Examples(near, far, np.zeros((0, 4))).cross_validate() == (1, 1)
    assert Examples(near, np.zeros((0, 4)), far).cross_validate() == (1, 1)
    noise = rng.normal(size=(200, 4))
    precision, recall = Examples(noise[:100], noise[100:], np.zeros((0, 4))).cross_validate()
    assert 0.3 < precision < 0.7 and 0.3 < recall < 0.7


def test_a_learned_label_is_a_column_of_the_index(stub):
    array, labels, label = learned()
    assert dark(labels) == [20, 30, 40, 60]
    assert label.like == 2 and label.unlike == 3 and 0 <= label.recall <= 1
    stub.batches.clear()
    again = open_labels(array)
    assert dark(again) == dark(labels) and again.where("night & ~Visible").count > 0 and "night" in repr(again)
    assert (
        again.index.learned == labels.index.learned
        and again.summary()["classes"]["night"] == again.where("night").count
    )
    scores = again.map("night")
    expected = label.scores(again.embeddings())
    np.testing.assert_array_equal(np.round(scores * 255), expected[..., 0])
    about = dict(again.index.group.attrs)["deepsic_labels"]["learned"][0]
    assert (
        about["name"] == "night"
        and about["examples"]["like"][0] == "region 0:64, 0:64"
        and len(about["tiles"]["unlike"]) == 3
    )
    assert not stub.batches, "nothing is decoded"
    check_rejects(ExpressionError, "did you mean night", again.where, "nigt")


def test_images_are_examples():
    _, labels, _ = learned()
    label = labels.learn("day", like=[scene()[:64, 128:192], np.full((64, 64, 3), 230, "u1")])
    found = levels(labels.where("day", tiles=True))
    assert {240, 250} <= set(found) and not {20, 30, 40} & set(found) and label.unlike == 0
    assert [one.name for one in labels.index.learned] == ["night", "day"] and dark(labels)


def test_a_label_is_replaced_and_forgotten():
    array, labels, _ = learned()
    labels.learn("night", like=[cell(240), cell(250)])
    assert 250 in dark(labels) and [one.name for one in open_labels(array).index.learned] == ["night"]
    labels.forget("night")
    check_rejects(ExpressionError, "no class 'night'", labels.where, "night")
    check_rejects(ExpressionError, "no learned label", labels.forget, "night")
    assert not open_labels(array).index.learned


def test_a_later_index_has_the_label_with_scores_of_new_chunks():
    array, labels, _ = learned()
    array[:128, :128] = 30
    check_rejects(StaleIndex, "consolidate_labels", labels.where, "night", verify="all")
    # The chunk is selected by its old embedding, and no header says what the label makes of the new one.
    check_rejects(StaleIndex, "(0, 0, 0)|consolidate_labels", lambda: list(labels.where("night").iter_arrays()))
    check_rejects(StaleIndex, "(0, 0, 0)", labels.where("night & ~Bright").to_dask().compute, scheduler="sync")
    assert (0, 0, 0) in [one.chunk for one in labels.where("night", verify=None).iter_arrays()]
    renewed = consolidate_labels(array)
    assert renewed.index.learned == labels.index.learned
    assert len(dark(renewed)) == len(dark(labels)) + 2 and (renewed.map("night")[:2, :2] > 0.5).all()
    assert not consolidate_labels(array, keep=False).index.learned


def test_relabelling_keeps_labels_of_the_same_head_alone():
    array, labels, _ = learned()
    assert dark(relabel(array)) == dark(labels)
    stored = labels.index.learned[0].to_json() | {"head": "00" * 32}
    group = zarr.open_group(array.store, path=labels.index.group.path)
    about = dict(group.attrs["deepsic_labels"]) | {"learned": [stored]}
    labels = open_labels(array)
    version = zarr.open_group(array.store, path=labels.index.group.path)
    version.attrs["deepsic_labels"] = {**version.attrs["deepsic_labels"], "learned": about["learned"]}
    zarr.consolidate_metadata(array.store, path=version.path)
    parent = zarr.open_group(array.store, path="img_labels")
    parent.attrs["deepsic_labels"] = {**parent.attrs["deepsic_labels"], "metadata": None}
    assert open_labels(array).index.learned[0].head == "00" * 32
    with pytest.warns(UserWarning, match="another head"):
        assert not relabel(array).index.learned


def test_suggestions_are_the_tiles_of_which_it_is_least_sure():
    _, labels, label = learned()
    found = labels.suggest("night", 4)
    doubt = np.abs(found.to_table()["score"] - 0.5)
    assert (np.diff(doubt) >= 0).all() and not {20, 40, 200, 250, 140} & set(levels(found))
    others = np.abs(label.chances(labels.tile_vectors()) - 0.5).reshape(LEVELS.shape)
    used = np.isin(LEVELS, [20, 40, 200, 250, 140])
    np.testing.assert_allclose(doubt, np.sort(others[~used])[:4], atol=1e-6)
    assert not {20, 30, 60, 90, 120} & set(levels(labels.suggest("night", where="Bright")))
    check_rejects(ConfigurationError, "k", labels.suggest, "night", 0)
    check_rejects(ExpressionError, "learn it first|no learned", labels.suggest, "Dark")


@pytest.mark.parametrize(
    ("name", "like", "unlike", "words"),
    [
        ("night", [cell(20)], [cell(200)], "at least 2|got 1"),
        ("night", [], [cell(200)], "at least 2"),
        ("night", [cell(20), cell(20)], [], "at least 2"),
        ("night", [cell(20), cell(40)], [cell(40)], "and of what it is not|(2, 1, 0)"),
        ("night", [(0, 0, 0)], [cell(20)], "and of what it is not"),
        ("night", [(slice(None),)], [], "all tiles"),
        ("night", "0.0.0", [], "expected a list"),
        ("night", ["a.png"], [], "read_rgb"),
        ("night", [(9, 0, 0), (0, 0, 0)], [], "no chunk"),
        ("Dark", [cell(20), cell(40)], [], "already"),
        ("Visible", [cell(20), cell(40)], [], "already"),
        ("unknown", [cell(20), cell(40)], [], "already"),
        ("a\x1b[31m", [cell(20), cell(40)], [], "printable"),
        ("", [cell(20), cell(40)], [], "printable"),
        ("'\"", [cell(20), cell(40)], [], "quotes"),
        (7, [cell(20), cell(40)], [], "printable"),
    ],
    ids=str,
)
def test_wrong_input(name, like, unlike, words):
    array = archive()
    labels = consolidate_labels(array)
    check_rejects(ConfigurationError, words, labels.learn, name, like, unlike)
    assert not open_labels(array).index.learned


def test_where_it_cannot_be_written():
    labels = consolidate_labels(archive(embedding=False))
    check_rejects(LabelIndexError, "no embeddings|relabel", labels.learn, "night", [cell(20), cell(40)])
    array, labels, _ = learned()
    consolidate_labels(array)
    check_rejects(StaleIndex, "open the labels again", labels.learn, "night", [cell(20), cell(40)])


@pytest.mark.parametrize(
    "change",
    [
        {"weights": []},
        {"weights": [float("inf")] * 4},
        {"weights": "x"},
        {"bias": None},
        {"name": "a\x1b"},
        {"tiles": {"like": [-1]}},
        {"tiles": {"like": [12]}},
        {"examples": 3},
        {"precision": "x"},
    ],
    ids=str,
)
def test_damaged_labels_are_refused(change):
    none = {"like": (), "unlike": ()}
    label = LearnedLabel("a", (1.0,) * 4, 0.0, examples=none, tiles={"like": [3], "unlike": []})
    document = json.loads(json.dumps(label.to_json()))
    assert LearnedLabel.from_json(document, 12) == label
    with pytest.raises((AttributeError, TypeError, ValueError)):
        LearnedLabel.from_json({**document, **change}, 12)


def test_names_are_text():
    _, labels, _ = learned()
    name = "<b>solar & farm</b>"
    labels.learn(name, like=[cell(240), cell(250)])
    assert labels.where(f'"{name}"').count and "<b>" not in labels._repr_html_()


def test_commands(tmp_path, capsys):
    consolidate_labels(archive(LocalStore(tmp_path / "a.zarr")))
    Image.fromarray(scene()[:64, :64]).save(tmp_path / "a.png")
    url = str(tmp_path / "a.zarr")
    examples = ["--like", str(tmp_path / "a.png"), "y=128:192,x=64:128", "--unlike", "1.1.0"]
    assert main(["learn", url, "night", *examples]) == 0
    out = capsys.readouterr().out
    assert "night: 2 examples, 2 of what it is not" in out and "recall" in out
    assert main(["query", url, "night", "--tiles", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert main(["suggest", url, "night", "-k", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and 0 <= lines[0]["score"] <= 1
    assert main(["learn", url, "night", "--forget"]) == 0
    assert main(["suggest", url, "night"]) == 2
    assert main(["learn", url, "night", "--like", "7.7.7"]) == 2
    assert "no chunk (7, 7, 7)" in capsys.readouterr().err
