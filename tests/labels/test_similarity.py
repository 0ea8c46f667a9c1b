"""Tiles like others: exact cosines, every kind of example, ties, conditions, and what is refused."""

import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from zarr.storage import LocalStore

from deepsic_codec import DeepSIC, consolidate_labels, create_array, open_labels
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError, ExpressionError, LabelIndexError
from deepsic_codec.labels.vectors import TileVectors, largest
from tests.common import check_rejects

pytestmark = pytest.mark.usefixtures("stub")
LEVELS = np.array([[20, 120, 240, 30], [200, 60, 90, 225], [140, 40, 250, 128]])


def scene():
    """Cells of 64 x 64 pixels of these levels."""
    return np.repeat(np.repeat(LEVELS, 64, 0), 64, 1)[..., None].repeat(3, 2).astype("u1")


def archive(store=None, **options):
    store = zarr.storage.MemoryStore() if store is None else store
    zarr.open_group(store)
    codec = DeepSIC(label_tile=64, **{"embedding": True, **options})
    array = create_array(store, name="img", data=scene(), chunks=(128, 128, 3), codec=codec)
    return array


def direction(level):
    """What the stub's head says of a cell of this brightness."""
    return np.array([level - 128, 128 - level, 100, -100]).clip(-127, 127)


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def levels(found):
    return [int(LEVELS[y, x]) for y, x, _ in found.tiles.tolist()]


def ranked(level, without=()):
    """Levels of all cells but some, by their likeness to one, and the likeness."""
    pairs = [
        (float(cosine(direction(level), direction(one))), int(one)) for one in LEVELS.ravel() if one not in without
    ]
    return sorted(pairs, key=lambda pair: -pair[0])


@pytest.mark.parametrize("scan", [False, True])
def test_tiles_come_in_the_order_of_their_likeness(scan):
    array = archive()
    labels = open_labels(array, scan=True) if scan else consolidate_labels(array)
    found = labels.similar((slice(0, 64), slice(64, 128)))
    expected = ranked(120, without=[120])
    assert levels(found) == [level for _, level in expected]
    np.testing.assert_allclose(found.to_table()["similarity"], [likeness for likeness, _ in expected], atol=1e-4)
    assert levels(labels.similar((slice(0, 64), slice(64, 128)), 3)) == levels(found)[:3]
    assert found.chunks[0] == tuple(found.tiles[0] // 2) and len(found.regions) == len(found.tiles)
    assert "like region y=0:64, x=64:128" in repr(found)


def test_every_kind_of_example(stub):
    labels = consolidate_labels(archive())
    by_image = labels.similar(scene()[:64, :64], 4)
    assert levels(by_image)[0] == 20  # an image is in no archive: its cell is a match like others
    stub.batches.clear()
    assert levels(labels.similar((slice(0, 64), slice(0, 64)), 3)) == levels(by_image)[1:]
    chunk = labels.similar((0, 1, 0), 12)  # 240, 30, 90, 225
    assert len(chunk.tiles) == 8 and not {240, 30, 90, 225} & set(levels(chunk))
    mean = sum(direction(level) / np.linalg.norm(direction(level)) for level in (240, 30, 90, 225))
    best = max((cosine(mean, direction(level)), level) for level in {*LEVELS.ravel().tolist()} - {240, 30, 90, 225})
    assert levels(chunk)[0] == best[1]
    bright = labels.where("Bright", tiles=True)
    assert not {200, 240, 225, 250} & set(levels(labels.similar(bright)))
    assert levels(labels.similar(labels.similar((slice(0, 64), slice(0, 64)), 1)))[0] in (20, 30)
    assert not stub.batches, "nothing is decoded"


def test_a_condition_narrows_the_search():
    labels = consolidate_labels(archive())
    example = (slice(0, 64), slice(0, 64))  # 20
    assert levels(labels.similar(example, where="Bright")) == [level for _, level in ranked(20) if level > 170]
    assert labels.similar(example, where=labels["Bright"] > 2).count == 0
    check_rejects(ExpressionError, "did you mean Bright?", labels.similar, example, where="Brigt")


@settings(max_examples=30)
@given(data=st.data())
def test_cosines_and_order_are_exact(data):
    count, size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 48))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    vectors = rng.integers(-128, 128, (count, size)).astype("i1")
    vectors[rng.random(count) < 0.2] = 0
    vectors[rng.integers(count)] = vectors[rng.integers(count)]
    query = rng.normal(size=size)
    values = TileVectors(vectors).cosines(query)
    for vector, value in zip(vectors.astype("f8"), values, strict=True):
        expected = cosine(vector, query) if vector.any() else 0
        assert abs(value - expected) < 2e-4
    k = data.draw(st.integers(1, 45))
    assert largest(values, k).tolist() == sorted(range(count), key=lambda i: (-values[i], i))[:k]


def test_the_largest_sums_fit():
    vectors = np.full((2, 255), -128, "i1")
    np.testing.assert_allclose(TileVectors(vectors).cosines(np.full(255, -1.0)), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("to", "k", "error", "words"),
    [
        ((0, 1, 0), 0, ConfigurationError, "k|from 1 on"),
        ((0, 1, 0), -3, ConfigurationError, "k"),
        ((0, 1, 0), 2.5, ConfigurationError, "k"),
        ((0, 2, 0), 5, ConfigurationError, "no chunk (0, 2, 0)|(2, 2, 1)"),
        ((0, -1, 0), 5, ConfigurationError, "no chunk"),
        ((0, 1), 5, ConfigurationError, "no chunk"),
        ((slice(64, 64),), 5, ConfigurationError, "empty"),
        ((slice(900, 1000),), 5, ConfigurationError, "empty"),
        ((slice(None),) * 4, 5, ConfigurationError, "at most 3"),
        ("photo.jpg", 5, ConfigurationError, "read_rgb"),
        (7, 5, ConfigurationError, "expected a chunk"),
        (np.zeros((64, 64, 3), "f4"), 5, ConfigurationError, "uint8"),
        ((), 5, ConfigurationError, "expected a chunk"),
    ],
    ids=str,
)
def test_what_is_no_example(to, k, error, words):
    check_rejects(error, words, consolidate_labels(archive()).similar, to, k)


def test_examples_of_other_archives_and_without_data():
    array = archive()
    labels = consolidate_labels(array)
    other = consolidate_labels(archive()).where("Bright")
    check_rejects(ConfigurationError, "another array|pixels", labels.similar, other)
    array[128:, :128] = 0
    labels = consolidate_labels(array)
    assert labels.stored.reader.payload((1, 0, 0)) is None
    check_rejects(ConfigurationError, "chunk 1.0.0 has no embedding|no data", labels.similar, (1, 0, 0))
    assert not (labels.similar((0, 0, 0)).tiles // [2, 2, 1] == [1, 0, 0]).all(axis=1).any()
    check_rejects(ConfigurationError, "the selection Bright > 1 is empty", labels.similar, labels.where("Bright > 1"))


def test_a_region_is_named_by_its_axes():
    labels = consolidate_labels(archive())
    region = slice(0, 64), slice(64, 128)
    message = "region y=0:64, x=64:128, c=5:9|axis c|axes y, x, c"
    check_rejects(ConfigurationError, message, labels.similar, (*region, slice(5, 9)))


def test_archives_without_embeddings(stub):
    array = archive(embedding=False)
    labels = consolidate_labels(array)
    check_rejects(LabelIndexError, "compute=True|relabel", labels.similar, (0, 0, 0))
    assert levels(labels.similar((slice(0, 64), slice(0, 64)), 1, compute=True)) == [30]


def test_command(tmp_path, capsys):
    consolidate_labels(archive(LocalStore(tmp_path / "a.zarr")))
    Image.fromarray(scene()[:64, :64]).save(tmp_path / "a.png")
    for options in (["--image", str(tmp_path / "a.png")], ["--region", "y=0:64", "x=0:64"], ["--chunk", "0.0.0"]):
        assert main(["similar", str(tmp_path / "a.zarr"), "-k", "3", "--where", "~Bright", *options, "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == 3 and lines[0]["similarity"] >= lines[1]["similarity"] >= lines[2]["similarity"]
    assert main(["similar", str(tmp_path / "a.zarr"), "--chunk", "0.0.0", "-k", "0"]) == 2
    assert "-k: expected" in capsys.readouterr().err
