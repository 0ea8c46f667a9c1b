"""Labels learned from examples: the classifier, the column in the index, what becomes of it, and what is refused."""

import json

import numpy as np
import pytest
import zarr
from PIL import Image
from zarr.storage import LocalStore

from deepsic_codec import DeepSIC, consolidate_labels, create_array, open_labels, relabel
from deepsic_codec.axes import Axes
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError, ExpressionError, LabelIndexError, StaleIndex
from deepsic_codec.labels.learned import Examples, fit, sigmoid
from deepsic_codec.labels.learned_label import LearnedLabel
from deepsic_codec.labels.vectors import TileVectors
from deepsic_codec.stored.geometry import Geometry
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
    for some in (Examples(near, far, np.zeros((0, 4))), Examples(near, np.zeros((0, 4)), far)):
        result = some.cross_validate()
        assert (result.precision, result.recall) == (1, 1) and 0 < result.loss < 0.2
    noise = rng.normal(size=(200, 4))
    result = Examples(noise[:100], noise[100:], np.zeros((0, 4))).cross_validate()
    assert 0.3 < result.precision < 0.7 and 0.3 < result.recall < 0.7 and result.loss > 0.6


def test_tiles_of_a_place_are_held_out_together():
    """Ten copies of each place say nothing of other places, however many there are."""
    rng = np.random.default_rng(3)
    places = rng.normal(size=(12, 40))
    part = {"like": np.repeat(places[:6], 10, 0), "unlike": np.repeat(places[6:], 10, 0), "background": places[:0]}
    leaking = Examples(**part).cross_validate()
    kept = dict.fromkeys(("like", "unlike"), np.repeat(np.arange(6), 10))
    result = Examples(**part, places=kept).cross_validate()
    assert leaking.recall == 1 and leaking.loss < 0.1
    assert result.recall < 0.9 and result.loss > 0.3
    one = Examples(**part, places=dict.fromkeys(("like", "unlike"), np.zeros(60, int))).cross_validate()
    assert one == leaking, "a single place is all there is"


@pytest.mark.parametrize("axes", ["yxc", "cyx", "tcyx"])
def test_tiles_around_count_within_the_chunk(axes):
    sizes = {"t": 2, "c": 3, "y": 300, "x": 450}
    chunks = {"t": 1, "c": 3, "y": 128, "x": 256}
    shape, chunk = ([part[axis] for axis in axes] for part in (sizes, chunks))
    array = zarr.zeros(shape=shape, chunks=chunk, dtype="u1")
    geometry = Geometry.of(array, Axes(axes), (64, 64))
    y, x = geometry.axes.y, geometry.axes.x
    vectors = np.random.default_rng(4).integers(-127, 128, (*geometry.tile_grid, 7)).astype(np.int8)
    vectors[tuple(2 if axis == y else 0 for axis in range(len(axes)))] = 0  # a tile without data
    tiles = TileVectors(vectors)
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    for radius in (0, 1, 2, 9):
        pooled = TileVectors(tiles.pooled(radius, geometry)).vectors
        for number, position in enumerate(np.ndindex(geometry.tile_grid)):
            region = [slice(i, i + 1) for i in position]
            for axis in (y, x):
                first = position[axis] // geometry.per_chunk[axis] * geometry.per_chunk[axis]
                last = first + geometry.per_chunk[axis]
                region[axis] = slice(max(first, position[axis] - radius), min(last, position[axis] + radius + 1))
            expected = units[tuple(region)].reshape(-1, 7).sum(0) * vectors[position].any()
            cosine = pooled[number] @ expected
            assert cosine >= 0.999 * np.linalg.norm(pooled[number].astype(float)) * np.linalg.norm(expected)
            assert pooled[number].any() == vectors[position].any()
        some = np.array([5, 3, 11])
        np.testing.assert_array_equal(tiles.pooled(radius, geometry, some), pooled[some])
    block = TileVectors(vectors[geometry.tiles_of((0,) * len(axes), (1,) * len(axes))])
    first = tiles.pooled(1, geometry).reshape(vectors.shape)[geometry.tiles_of((0,) * len(axes), (1,) * len(axes))]
    np.testing.assert_array_equal(block.pooled(1, geometry).reshape(first.shape), first)


def grid_of(level):
    """Labels of an array of cells of these levels, in chunks of 3 x 3 cells."""
    store = zarr.open_group(zarr.storage.MemoryStore()).store
    pixels = level.repeat(64, 0).repeat(64, 1)[..., None].repeat(3, 2).astype("u1")
    codec = DeepSIC(label_tile=64, embedding=True)
    return consolidate_labels(create_array(store, name="img", data=pixels, chunks=(192, 192, 3), codec=codec))


def test_examples_say_whether_tiles_around_count():
    """Places of dark and light tiles are known as a whole, single dark tiles alone."""
    rng = np.random.default_rng(5)
    is_dark = np.arange(36).reshape(6, 6) % 2 == 0  # chunks
    mixed = np.where(is_dark, 95, 160).repeat(3, 0).repeat(3, 1) + rng.integers(-90, 91, (18, 18))
    labels = grid_of(mixed)
    like, unlike = ([(*chunk, 0) for chunk in np.argwhere(which)[:6].tolist()] for which in (is_dark, ~is_dark))
    by_place, alone = (labels.learn("dim", like, unlike, around=around) for around in (None, 0))
    assert by_place.around > alone.around == 0 and by_place.recall > alone.recall
    truth = is_dark.repeat(3, 0).repeat(3, 1)
    right = [
        ((labels.learn("dim", like, unlike, around=n) and labels.map("dim") > 0.5) == truth).mean() for n in (0, 1)
    ]
    assert right[1] > right[0] + 0.1
    assert open_labels(labels.array).index.learned[0].around == 1
    np.testing.assert_array_equal(consolidate_labels(labels.array).map("dim"), labels.map("dim"))
    single = rng.integers(110, 250, (18, 18))
    single[1::3, 1::3][is_dark] = 20
    labels = grid_of(single)
    like = [(slice(y, y + 64), slice(x, x + 64)) for y, x in (64 + 192 * np.argwhere(is_dark)[:6]).tolist()]
    assert labels.learn("night", like).around == 0
    labels = grid_of(mixed)
    few = [(*chunk, 0) for chunk in np.argwhere(is_dark)[:3].tolist()]
    assert labels.learn("dim", few, unlike).around == 0, "three chunks are too few to choose by"


def test_the_distance_is_checked():
    labels = consolidate_labels(archive())
    for around in (-1, 17, 1.5, True, "1"):
        check_rejects(ConfigurationError, "around", labels.learn, "night", [cell(20), cell(40)], around=around)


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
    expected = label.scores(again.embeddings(), again.geometry)
    np.testing.assert_array_equal(np.round(scores * 255), expected[..., 0])
    about = dict(again.index.group.attrs)["deepsic_labels"]["learned"][0]
    assert (
        about["name"] == "night"
        and about["examples"]["like"][0] == "region y=0:64, x=0:64"
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
    others = np.abs(label.chances(labels.tile_vectors(), labels.geometry) - 0.5).reshape(LEVELS.shape)
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
        {"around": -1},
        {"around": 17},
        {"around": None},
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
    assert LearnedLabel.from_json(document, 12) == label and "weights" not in repr(label)
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
