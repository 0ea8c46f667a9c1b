import asyncio
import json
import re
import warnings
from datetime import UTC, datetime, timedelta

import fsspec
import numpy as np
import obstore.store
import pytest
import xarray
import zarr
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore, ZipStore

from deepsic_codec import DeepSICCodec, consolidate_labels, create_array, iter_chunk_attrs, open_labels
from deepsic_codec.errors import CorruptPayload, LabelIndexError, StaleIndex, UnsupportedArray, UnsupportedPayload
from deepsic_codec.labels import index as label_index
from deepsic_codec.labels import index_writer
from deepsic_codec.labels.index_writer import IndexWriter, replace
from deepsic_codec.stored.location import IndexLocation
from tests import stub_runtime
from tests.common import check_rejects
from tests.labels.common import archive, fill, payload, put

pytestmark = [pytest.mark.usefixtures("stub"), pytest.mark.filterwarnings("ignore:Duplicate name")]
LONG_AGO = "2020-01-01T00:00:00+00:00"
QUERIES = ("Dark > 0.6 & ~Visible", "~Dark", "unknown")


def stores(folder):
    memory = fsspec.filesystem("memory", asynchronous=True, skip_instance_cache=True)
    memory.store.clear()
    yield "memory", MemoryStore()
    yield "local", LocalStore(folder / "local.zarr")
    yield "zip", ZipStore(folder / "archive.zip", mode="w")
    yield "fsspec", FsspecStore.from_url("memory://bucket/archive.zarr")
    yield "obstore", ObjectStore(obstore.store.MemoryStore())


def answers(labels):
    return [labels.where(text).chunks for text in QUERIES]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("name", ["img", "a/b/img"])
def test_every_store(tmp_path, number, zarr_format, name):
    _, store = list(stores(tmp_path))[number]
    array = archive(store, name=name, zarr_format=zarr_format, shape=(300, 300, 3))
    fill(array, seed=5)
    made = consolidate_labels(store)
    assert list(made) == [name]
    expected = answers(open_labels(array, scan=True))
    assert answers(made[name]) == answers(open_labels(store)) == answers(open_labels(store, name)) == expected
    assert any(expected)
    group = zarr.open_group(store, path=f"{name}_labels", mode="r+", zarr_format=zarr_format)
    assert group.metadata.zarr_format == zarr_format
    if not isinstance(store, ZipStore):
        put(array, (0, 0, 0), payload(array, np.full((1, 2, 2, 4), 255, "u1")))
        made = consolidate_labels(store, name)
        assert answers(made) == answers(open_labels(store, scan=True)) != expected


def test_icechunk(tmp_path):
    icechunk = pytest.importorskip("icechunk")
    session = icechunk.Repository.create(icechunk.in_memory_storage()).writable_session("main")
    array = archive(session.store)
    array[:] = 200
    assert consolidate_labels(array).where("Bright").count == 2


def test_an_index_is_read_where_the_package_is_not(tmp_path):
    array = archive(LocalStore(tmp_path), shape=(3, 100, 300), chunks=(2, 128, 128), axes="tyx")
    fill(array, seed=6)
    labels = consolidate_labels(array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xarray.open_zarr(tmp_path / labels.index.group.path)
    about = zarr.open_group(tmp_path / "img_labels", mode="r").attrs
    assert labels.index.group.path == f"img_labels/{about['deepsic_labels']['current']}"
    assert about["zarr_conventions"] == data.attrs["zarr_conventions"]
    assert data.label.attrs["flag_meanings"] == "Dark Dim Bright unknown Visible"
    assert data.source.attrs["flag_values"] == [0, 1, 2, 3] and "header" in data.source.attrs["flag_meanings"]
    assert data.attrs["zarr_conventions"][0]["uuid"]
    assert data.chunk_scores.dims == ("label", "t_chunk", "y_chunk", "x_chunk")
    dark = data.tile_scores.sel(label=0)
    assert dark.sizes == {"t_tile": 3, "y_tile": 2, "x_tile": 5}
    scores, wanted = dark.values, labels.map("Dark")
    np.testing.assert_allclose(scores, np.nan_to_num(wanted), atol=1e-6)
    assert data.x_tile.values.tolist() == [0, 64, 128, 192, 256]
    assert data.straddles.values.tolist() == [[0, 0, 0, 0, 1], [1] * 5]
    np.testing.assert_array_equal(data.crc.values > 0, data.source.values > 0)
    assert int(data["head"].max()) == int(stub_runtime.MODELS[0].head[:8], 16)
    assert json.loads(json.dumps(data.attrs)) == data.attrs


def test_large_grids_are_parted(monkeypatch):
    monkeypatch.setattr(label_index, "UNIT_CHUNKS", 16)
    monkeypatch.setattr(label_index, "UNIT_TILES", 16)
    array = archive(shape=(1000, 900, 3), chunks=(128, 128, 3))
    fill(array, seed=7)
    labels = consolidate_labels(array)
    assert labels.index.scores.chunks == (1, 4, 4, 1) and labels.index.tile_scores.chunks == (1, 4, 4, 1)
    assert labels.index.tile_unit == (2, 2, 1)
    chunks = {
        index
        for index, attrs in iter_chunk_attrs(array)
        if any(tile.get("Dark", 0) > 0.6 and tile.get("Dim", 0) < 0.5 for tile in attrs["labels"])
    }
    assert set(labels.where("Dark > 0.6 & ~Dim").chunks) == chunks


@pytest.mark.parametrize("nbytes", [1, 40])
def test_scores_are_written_a_few_rows_at_a_time(monkeypatch, nbytes):
    array = archive(shape=(300, 300, 3))
    fill(array, seed=8)
    expected = answers(open_labels(array, scan=True))
    monkeypatch.setattr(index_writer, "ROWS_BYTES", nbytes)
    assert answers(consolidate_labels(array)) == answers(open_labels(array)) == expected != [[], [], []]


def test_a_query_parses_only_the_arrays_that_it_reads(monkeypatch):
    array = archive()
    array[:] = 200
    consolidate_labels(array)
    parsed = []
    original = label_index.LabelIndex._open_member
    monkeypatch.setattr(
        label_index.LabelIndex, "_open_member", lambda self, name: parsed.append(name) or original(self, name)
    )
    assert open_labels(array).where("Bright").count == 2
    assert sorted(parsed) == ["chunk_scores", "source", "tile_scores"]


# Root arrays and other places


def test_an_array_at_the_root_of_a_store(tmp_path):
    array = create_array({}, data=np.full((64, 128, 3), 200, "u1"), chunks=(64, 64, 3))
    check_rejects(LabelIndexError, "root|index=|scan=True", consolidate_labels, array)
    check_rejects(LabelIndexError, "root|index=|scan=True", open_labels, array)
    assert open_labels(array, scan=True).where("Bright").count == 2
    for place in (MemoryStore(), tmp_path / "elsewhere.zarr", zarr.open_group(MemoryStore(), path="a/b")):
        assert consolidate_labels(array, index=place).where("Bright").count == 2
        assert open_labels(array, index=place).where("Bright").count == 2
    local = create_array(tmp_path / "alone.zarr", data=np.full((64, 128, 3), 200, "u1"), chunks=(64, 64, 3))
    check_rejects(LabelIndexError, "root", consolidate_labels, local)
    check_rejects(LabelIndexError, "no label index", open_labels, local)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.zarr", "elsewhere.zarr"]


def test_an_array_opened_by_its_own_path(tmp_path):
    archive(LocalStore(tmp_path))[:] = 200
    labels = consolidate_labels(tmp_path / "img")
    assert (tmp_path / "img_labels").is_dir()
    assert open_labels(str(tmp_path / "img")).where("Bright").count == labels.where("Bright").count == 2
    assert open_labels(tmp_path).where("Bright").count == 2


def test_no_permission_to_write(tmp_path):
    archive(LocalStore(tmp_path))[:] = 200
    array = zarr.open_array(LocalStore(tmp_path, read_only=True), path="img", mode="r")
    check_rejects(LabelIndexError, "reading only|scan=True", consolidate_labels, array)
    check_rejects(LabelIndexError, "no label index|consolidate_labels|scan=True", open_labels, array)
    other = MemoryStore()
    assert consolidate_labels(array, index=other).where("Bright").count == 2


def test_what_is_in_the_way_stays(tmp_path):
    store = MemoryStore()
    array = archive(store)
    array[:] = 200
    other = zarr.create_array(store, name="img_labels/precious", shape=3, dtype="u1")
    check_rejects(LabelIndexError, "no label index|another location", consolidate_labels, array)
    assert other.shape == zarr.open_array(store, path="img_labels/precious").shape
    (tmp_path / "letter.txt").write_text("dear")
    check_rejects(LabelIndexError, "no label index|another location", consolidate_labels, array, index=tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


# Bad input


def test_index_of_another_array():
    one, other = archive(name="one"), archive(name="other")
    for array in (one, other):
        array[:] = 200
        consolidate_labels(array)
    place = zarr.open_group(other.store, path="other_labels")
    check_rejects(LabelIndexError, "another array|'other'", open_labels, one, index=place)
    same = create_array(other.store, name="x/other", shape=(128, 128, 3), dtype="u1", chunks=(64, 64, 3))
    check_rejects(LabelIndexError, "chunks", open_labels, same, index=place)


def test_array_of_another_shape_than_indexed():
    array = archive()
    array[:] = 200
    consolidate_labels(array)
    array.resize((256, 192, 3))
    check_rejects(StaleIndex, "shape|consolidate_labels", open_labels, array)
    assert consolidate_labels(array).summary()["missing"] == 2


def test_labels_of_another_vocabulary(monkeypatch):
    array = archive()
    array[:] = 200
    labels = consolidate_labels(array)
    before = labels.summary()
    vocabulary = stub_runtime.Vocabulary(("Cat", "Dog", "Fish"))
    other = stub_runtime.ModelInfo("new", "ab" * 32, "ee" * 32, vocabulary)
    monkeypatch.setattr(stub_runtime, "MODELS", (*stub_runtime.MODELS, other))
    put(array, (0, 1, 0), payload(array, np.full((1, 2, 2, 4), 99, "u1"), head=other.head))
    check_rejects(LabelIndexError, "(0, 1, 0)|eeeeeeee", consolidate_labels, array)
    assert open_labels(array).summary() == before


@pytest.mark.parametrize("data,error", [(b"\xff\xd8\xff" * 99, UnsupportedPayload), (b"DSIC\1", CorruptPayload)])
def test_a_failed_consolidation_changes_nothing(data, error):
    array = archive(shape=(256, 256, 3), chunks=(64, 64, 3))
    fill(array, seed=8)
    put(array, (3, 3, 0), data)
    check_rejects(error, "chunk (3, 3, 0)", consolidate_labels, array)
    left = [key for key in array.store._store_dict if key.startswith("img_labels")]
    assert left == ["img_labels/zarr.json"], "half an index is left"
    check_rejects(LabelIndexError, "never finished|consolidate_labels", open_labels, array)
    put(array, (3, 3, 0), payload(array, None))
    expected = answers(consolidate_labels(array))
    before = dict(array.store._store_dict)
    put(array, (3, 3, 0), data)
    check_rejects(error, "chunk (3, 3, 0)", consolidate_labels, array)
    after = dict(array.store._store_dict)
    assert {key: value for key, value in after.items() if "img_labels" in key} == {
        key: value for key, value in before.items() if "img_labels" in key
    }
    assert answers(open_labels(array)) == expected


class Failing(WrapperStore):
    """Refuses to write or delete after so many times."""

    left = 10**9

    async def set(self, key, value):
        self._count()
        await super().set(key, value)

    async def delete(self, key):
        self._count()
        await super().delete(key)

    def _count(self):
        Failing.left -= 1
        if Failing.left < 0:
            raise OSError("disk full")


def test_a_refresh_may_be_interrupted_anywhere():
    inner = MemoryStore()
    array = archive(inner)
    fill(array, seed=9, missing=0)
    old = answers(consolidate_labels(array))
    put(array, (0, 0, 0), payload(array, np.full((1, 2, 2, 4), 255, "u1")))
    new = answers(open_labels(array, scan=True))
    assert old != new
    saved, seen, writes = dict(inner._store_dict), [], 0
    while True:
        store = MemoryStore(dict(saved))
        Failing.left = writes
        try:
            consolidate_labels(Failing(store), "img")
            finished = True
        except OSError:
            finished = False
        Failing.left = 10**9
        seen.append(answers(open_labels(store, "img")))
        assert seen[-1] in (old, new), f"neither the old index nor the new after {writes} writes"
        if writes % 7 == 0:
            assert answers(consolidate_labels(store, "img")) == new, "cannot be done again"
        if finished:
            break
        writes += 1
    assert seen[0] == old and seen[-1] == new and seen == sorted(seen, key=lambda s: s == new)


def test_the_first_error_is_raised_where_what_was_written_cannot_be_deleted():
    class Full(Failing):
        async def delete_dir(self, prefix):
            raise OSError("directory not empty")

    inner = MemoryStore()
    fill(archive(inner), seed=9, missing=0)
    Failing.left = 3
    try:
        with pytest.raises(OSError, match="disk full"):
            consolidate_labels(Full(inner), "img")
    finally:
        Failing.left = 10**9


VERSIONS = "img_labels/[0-9a-f]{32}"


def versions(store):
    return {match[0] for key in store._store_dict if (match := re.match(VERSIONS, key))}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("first", [True, False])
def test_of_two_writers_the_last_wins_whole(zarr_format, first):
    """One writes a whole index at each write of the other."""
    inner = MemoryStore()
    array = archive(inner, zarr_format=zarr_format)
    fill(array, seed=9, missing=0)
    if not first:
        consolidate_labels(array)
    brighter = payload(array, np.full((1, 2, 2, 4), 255, "u1"))

    class Interrupting(WrapperStore):
        writes, at = 0, 0

        async def set(self, key, value):
            await super().set(key, value)
            Interrupting.writes += 1
            if Interrupting.writes == Interrupting.at:
                await asyncio.to_thread(run_other)

    def run_other():
        put(other, (0, 0, 0), brighter)
        assert len(seen) < 6
        consolidate_labels(other)
        seen.append(answers(open_labels(other)))

    saved, seen = dict(inner._store_dict), []
    consolidate_labels(Interrupting(MemoryStore(dict(saved))), "img")
    count = Interrupting.writes
    assert count > 20
    for at in (1, 2, 3, count // 2, count - 1, count):
        store = MemoryStore(dict(saved))
        Interrupting.writes, Interrupting.at = 0, at
        other = zarr.open_array(store, path="img", mode="r+")
        made = consolidate_labels(Interrupting(store), "img")
        assert answers(made) == answers(open_labels(store)), "the last does not win"
        assert seen[-1] == answers(open_labels(store, scan=True)), "what the other saw"
        consolidate_labels(store, "img")
        assert answers(open_labels(store)) == seen[-1], "in the way of the next"


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_is_beside_an_index_stays(zarr_format):
    store = MemoryStore()
    array = archive(store, zarr_format=zarr_format)
    names = ("img_labels_next", "img_labels_next2", "img_labels/mine", f"img_labels/{'ab' * 16}")
    consolidate_labels(array)
    for name in names:
        zarr.create_array(store, name=name, shape=3, dtype="u1", zarr_format=zarr_format)[:] = 7
    for _ in range(2):
        consolidate_labels(array)
        group = zarr.open_group(store, path="img_labels", zarr_format=zarr_format)
        about = group.attrs["deepsic_labels"]
        group.attrs["deepsic_labels"] = {**about, "superseded": dict.fromkeys(about["superseded"], LONG_AGO)}
    consolidate_labels(array)
    assert len(versions(store)) == 2 + 1, "the last but one, the last, and the array"
    for name in names:
        assert zarr.open_array(store, path=name, mode="r")[:].tolist() == [7, 7, 7]


def test_old_versions_are_removed_later():
    store = MemoryStore()
    array = archive(store)
    array[:] = 200
    first = consolidate_labels(array)
    (name,) = versions(store)
    killed = IndexLocation(store, f"img_labels/{'cd' * 16}", 3)
    IndexWriter(killed, first.geometry, first.vocabulary, {})
    consolidate_labels(array)
    assert first.where("Bright").count == 2, "programs that have it open go on"
    for days in (0.9, 1.1, 7.1):
        group = zarr.open_group(store, path="img_labels")
        about = group.attrs["deepsic_labels"]
        assert "cd" * 16 in about["superseded"]
        then = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        group.attrs["deepsic_labels"] = {**about, "superseded": dict.fromkeys(about["superseded"], then)}
        consolidate_labels(array)
        assert (name in versions(store)) == (days < 1) and (killed.path in versions(store)) == (days < 7)
    check_rejects(StaleIndex, "open the labels again", first.where, "Bright")
    check_rejects(StaleIndex, "open the labels again", first.summary)
    check_rejects(StaleIndex, "open the labels again", first.map, "Bright")


@pytest.mark.parametrize("time", ["2999-01-01T00:00:00+00:00", "2020-01-01T00:00:00", "yesterday", None, 3])
def test_times_that_say_nothing_remove_nothing(time):
    store = MemoryStore()
    array = archive(store)
    consolidate_labels(array)
    consolidate_labels(array)
    group = zarr.open_group(store, path="img_labels")
    about = group.attrs["deepsic_labels"]
    group.attrs["deepsic_labels"] = {**about, "superseded": dict.fromkeys(about["superseded"], time)}
    consolidate_labels(array)
    assert len(versions(store)) == 3


def test_a_version_that_was_deleted_while_it_was_written():
    store = MemoryStore()
    array = archive(store)
    old = answers(consolidate_labels(array))

    with pytest.raises(LabelIndexError, match="deleted while it was written"):
        replace(IndexLocation(store, "img_labels", 3), lambda version: None)
    assert answers(open_labels(array)) == old


def test_a_lost_answer_loses_no_index():
    """The store makes the version current, but says that it failed."""

    class Lossy(WrapperStore):
        async def set(self, key, value):
            await super().set(key, value)
            if key == "img_labels/zarr.json":
                raise OSError("connection reset")

    store = MemoryStore()
    array = archive(store)
    array[:] = 200
    consolidate_labels(array)
    pytest.raises(OSError, consolidate_labels, Lossy(store), "img")
    assert open_labels(array).where("Bright").count == 2


@pytest.mark.parametrize("current", ["../img", "", 3, "AB" * 16, "ab" * 16])
def test_names_of_versions_lead_nowhere_else(current):
    store = MemoryStore()
    array = archive(store)
    consolidate_labels(array)
    group = zarr.open_group(store, path="img_labels")
    group.attrs["deepsic_labels"] = {"format": 1, "current": current}
    check_rejects(LabelIndexError, "consolidate_labels", open_labels, array)


def without(metadata, name):
    """The metadata of a version that has no array of this name."""
    members = dict(metadata["consolidated_metadata"]["metadata"])
    del members[name]
    return {**metadata, "consolidated_metadata": {**metadata["consolidated_metadata"], "metadata": members}}


def test_damaged_index():
    array = archive()
    array[:] = 200
    group = zarr.open_group(array.store, path=consolidate_labels(array).index.group.path, mode="r+")
    pointer = zarr.open_group(array.store, path="img_labels", mode="r+")
    valid, about = pointer.attrs["deepsic_labels"], group.attrs["deepsic_labels"]
    for change, words in [
        ({"vocabulary": {"classes": ["Dark"]}}, "damaged|scores"),
        ({"vocabulary": 3}, "vocabulary"),
        ({"array": {"axes": "yxc"}}, "damaged"),
    ]:
        group.attrs["deepsic_labels"] = {**about, **change}
        pointer.attrs["deepsic_labels"] = {**valid, "metadata": None}
        check_rejects(LabelIndexError, words, open_labels, array)
    for change, words in [
        ({"format": 99}, "format 99"),
        ({"metadata": {"attributes": 3}}, "damaged"),
        ({"metadata": 3}, "damaged"),
        ({"metadata": {**valid["metadata"], "consolidated_metadata": {"metadata": 3}}}, "damaged"),
        ({"metadata": without(valid["metadata"], "source")}, "damaged|source"),
    ]:
        pointer.attrs["deepsic_labels"] = {**valid, **change}
        check_rejects(LabelIndexError, words, open_labels, array)
    pointer.attrs["deepsic_labels"] = {"format": 1}
    check_rejects(LabelIndexError, "never finished", open_labels, array)


def test_not_an_archive(tmp_path):
    plain = zarr.create_array({}, shape=(8, 8, 3), dtype="u1", chunks=(8, 8, 3))
    check_rejects(UnsupportedPayload, "not with DeepSIC", open_labels, plain)
    check_rejects(UnsupportedArray, "no array", consolidate_labels, zarr.open_group({}))
    two = zarr.open_group(MemoryStore())
    for name in "ab":
        create_array(two.store, name=name, shape=(64, 64, 3), dtype="u1")
    check_rejects(UnsupportedArray, "a, b|name", open_labels, two)
    assert sorted(consolidate_labels(two)) == ["a", "b"]
    check_rejects(UnsupportedArray, "'c'", open_labels, two, "c")
    turned = zarr.create_array(
        {},
        shape=(8, 9, 3),
        dtype="u1",
        chunks=(8, 9, 3),
        compressors=None,
        serializer=DeepSICCodec(),
        filters=[zarr.codecs.TransposeCodec(order=(1, 0, 2))],
    )
    check_rejects(UnsupportedArray, "Transpose", open_labels, turned, scan=True)


def test_progress_counts_chunks():
    steps = []
    consolidate_labels(archive(), progress=lambda *step: steps.append(step))
    assert steps == [(2, 2)]
