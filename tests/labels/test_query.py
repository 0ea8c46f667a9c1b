import re
import warnings

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import WrapperStore

from deepsic_codec import (
    DeepSIC,
    DeepSICCodec,
    chunk_attrs,
    consolidate_labels,
    create_array,
    iter_chunk_attrs,
    open_labels,
)
from deepsic_codec.errors import (
    ConfigurationError,
    CorruptPayload,
    ExpressionError,
    StaleIndex,
    UnsupportedPayload,
    WriteError,
)
from deepsic_codec.labels import attributes as headers
from deepsic_codec.labels.selection import StaleIndexWarning
from deepsic_codec.stored.coordinates import Coordinate
from deepsic_codec.stored.coordinates import write as write_coordinates
from tests import stub_runtime
from tests.common import check_rejects
from tests.labels.common import archive, fill, payload, put

pytestmark = pytest.mark.usefixtures("stub")
PARENTS = {"Visible": ("Dim", "Bright")}


def brute(array, tile_matches):
    """Evaluate every tile within the array, from chunk attributes alone; returns chunks and regions of tiles."""
    codec = array.metadata.compressor if array.metadata.zarr_format == 2 else array.metadata.codecs[0]
    chunks, regions = [], []
    for index, attrs in iter_chunk_attrs(array):
        assert attrs == chunk_attrs(array, index)
        size = dict(zip(codec.axes, array.chunks, strict=True))
        slices = [axis for axis in codec.axes if axis not in "yxc"]
        grid = [size[a] for a in slices] + [-(-size[a] // n) for a, n in zip("yx", codec.label_tile, strict=True)]
        found = []
        for place, tile in zip(np.ndindex(*grid), attrs["labels"] or (), strict=bool(attrs["labels"])):
            region = {}
            for axis, at in zip([*slices, "y", "x"], place, strict=True):
                step = {"y": codec.label_tile[0], "x": codec.label_tile[1]}.get(axis, 1)
                k = codec.axes.index(axis)
                origin = index[k] * array.chunks[k]
                stop = min(origin + (at + 1) * step, origin + array.chunks[k], array.shape[k])
                region[axis] = slice(origin + at * step, stop)
            if "c" in codec.axes:
                k = codec.axes.index("c")
                region["c"] = slice(index[k] * array.chunks[k], (index[k] + 1) * array.chunks[k])
            inside = all(part.start < part.stop for part in region.values())
            assert inside or not tile
            if inside and tile_matches(tile):
                found.append(tuple(region[axis] for axis in codec.axes))
        if found:
            chunks.append(index)
            regions += found
    return chunks, sorted(regions, key=str)


def score(tile, name):
    return max((round(tile.get(one, 0) * 255) for one in PARENTS.get(name, (name,))), default=0)


@st.composite
def conditions(draw, depth=3):
    """An expression and the same in Python, for a tile of chunk attributes."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        name = draw(st.sampled_from(["Dark", "Dim", "Bright", "unknown", "Visible"]))
        if draw(st.booleans()):
            return name, lambda tile: score(tile, name) * 2 >= 255
        tenths, op = draw(st.integers(0, 10)), draw(st.sampled_from([">", ">=", "<", "<="]))
        return f"{name} {op} {tenths / 10}", lambda tile: eval(f"{score(tile, name) * 10} {op} {tenths * 255}")
    text, test = draw(conditions(depth=depth - 1))
    if draw(st.integers(0, 2)) == 0:
        return f"~({text})", lambda tile: not test(tile)
    other_text, other = draw(conditions(depth=depth - 1))
    if draw(st.booleans()):
        return f"({text}) & ({other_text})", lambda tile: test(tile) and other(tile)
    return f"({text}) | ({other_text})", lambda tile: test(tile) or other(tile)


LAYOUTS = [
    {"shape": (300, 250, 3), "chunks": (64, 64, 3)},
    {"shape": (300, 250, 3), "chunks": (128, 192, 3)},
    {"shape": (300, 250), "chunks": (100, 70), "axes": "xy", "tile": (64, 64)},
    {"shape": (3, 5, 200, 130), "chunks": (1, 2, 128, 128), "axes": "ctyx"},
    {"shape": (300, 250, 3), "chunks": (128, 192, 3), "zarr_format": 2},
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def filled(request):
    patch = pytest.MonkeyPatch()
    for name, module in stub_runtime.modules().items():
        patch.setitem(__import__("sys").modules, name, module)
    array = archive(**request.param)
    fill(array, seed=4, missing=0.2, unlabelled=0.1)
    labels = consolidate_labels(array)
    patch.undo()
    return array, labels


@settings(max_examples=25, deadline=None)
@given(condition=conditions())
def test_queries_find_what_chunk_attributes_say_and_nothing_else(filled, condition):
    array, labels = filled
    text, test = condition
    chunks, regions = brute(array, test)
    found = labels.where(text)
    assert found.chunks == chunks and found.count == len(found) == len(chunks)
    assert sorted(labels.where(text, tiles=True).regions, key=str) == regions
    assert labels.where(text, verify="all").chunks == chunks


def test_a_scan_gives_the_same(filled):
    array, labels = filled
    scanned = open_labels(array, scan=True)
    for text in ("Dark > 0.7", "~Visible", "Dark & ~Dim"):
        assert scanned.where(text).chunks == labels.where(text).chunks
        np.testing.assert_array_equal(scanned.where(text).tiles, labels.where(text).tiles)
    assert scanned.summary() == labels.summary()
    assert scanned.bytes_read >= 60 * labels.summary()["header"] and scanned.requests >= labels.summary()["header"]


def test_a_summary_counts_from_a_half_on():
    """What "Dim" alone means in an expression, too: a score of 0.5 lies between 127 and 128 of 255."""
    array = archive(shape=(128, 384, 3))
    for column, largest in enumerate((127, 128, 126)):
        scores = np.zeros((1, 2, 2, 4), "u1")
        scores[0, :, :, 1] = [[0, 100], [largest, 126]]
        put(array, (0, column, 0), payload(array, scores))
    labels = open_labels(array, scan=True)
    assert labels.summary()["classes"] == {"Dark": 0, "Dim": 1, "Bright": 0, "unknown": 0, "Visible": 1}
    assert labels.where("Dim").chunks == [(0, 1, 0)]


def test_summary_and_map(filled):
    array, labels = filled
    summary = labels.summary()
    attrs = [attrs for _, attrs in iter_chunk_attrs(array)]
    assert summary["chunks"] == len(attrs)
    assert summary["missing"] == sum(a["labels"] == [] for a in attrs)
    assert summary["unlabelled"] == sum(a["labels"] is None for a in attrs)
    for name in ("Dark", "unknown", "Visible"):
        assert summary["classes"][name] == labels.where(name).count
    scores = labels.map("Visible")
    codec_axes = labels.geometry.axes
    shape = [n for axis, n in zip(codec_axes, labels.geometry.tile_grid, strict=True) if axis != "c" or n > 1]
    assert scores.shape == tuple(shape) and scores.dtype == np.float32
    assert np.isnan(scores).any() == (summary["missing"] + summary["unlabelled"] > 0)
    assert np.nansum(scores >= 0.5) == len(labels.where("Visible", tiles=True).regions)


def test_edges_are_marked():
    array = archive(shape=(200, 250, 3), chunks=(128, 128, 3))
    fill(array, seed=2, missing=0)
    found = consolidate_labels(array).where("Dark >= 0", tiles=True)
    assert len(found.regions) == len(found.straddling) == 4 * 4
    expected = [any(part.stop - part.start < 64 for part in region[:2]) for region in found.regions]
    assert found.straddling.tolist() == expected and sum(expected) == 7


def test_reads_only_the_classes_it_names():
    array = archive(shape=(640, 640, 3), chunks=(64, 64, 3))
    fill(array, seed=3)
    labels = consolidate_labels(array)
    one, two = labels.where("Visible"), labels.where("Visible & Dark")
    assert (one.requests, two.requests) == (2, 3) and 0 < one.bytes_read < two.bytes_read
    words = re.search(r"(\d+) of 100 chunks, selected by reading ([\d,]+) bytes in 2 requests", repr(one))
    assert words and int(words[1]) == one.count and int(words[2].replace(",", "")) == one.bytes_read


def test_python_operators(filled):
    _, labels = filled
    assert labels.where((labels["Dark"] > 0.6) & ~labels["Dim"]).chunks == labels.where("Dark > .6 & ~Dim").chunks
    assert labels.where(labels["Visible"]).chunks == labels.where("Visible").chunks
    check_rejects(ExpressionError, "did you mean Dark?", labels.__getitem__, "Dork")
    check_rejects(ExpressionError, "did you mean Dark?|^", labels.where, "Dim & Dork")
    check_rejects(ConfigurationError, "verify", labels.where, "Dim", verify="some")


# Fetching


def scene(shape=(184, 200, 3)):
    """Left third dark, middle dim, right bright."""
    array = np.empty(shape, "u1")
    array[:, :64], array[:, 64:128], array[:, 128:] = 20, 120, 240
    return array


@pytest.mark.parametrize("options", [{}, {"zarr_format": 2}, {"shards": (128, 192, 3)}], ids=str)
def test_fetches_only_what_matched(options, stub):
    store = zarr.storage.MemoryStore()
    zarr.open_group(store, zarr_format=options.get("zarr_format", 3))
    array = create_array(store, name="img", data=scene(), chunks=(64, 64, 3), fill_value=255, **options)
    labels = consolidate_labels(array)
    stub.batches.clear()
    found = labels.where("Bright")
    assert found.chunks == [(y, x, 0) for y in range(3) for x in (2, 3)] and not stub.batches
    for chunk, region, pixels in found.iter_arrays():
        np.testing.assert_array_equal(pixels, scene()[region])
        assert region[0].start == chunk[0] * 64
    assert sum(stub.sizes("decode")) == 6 and len(stub.batches) == 1
    stub.batches.clear()
    stack = found.to_dask()
    assert stack.shape == (6, 64, 64, 3) and not stub.batches
    values = stack.compute(scheduler="sync")
    assert (values[5, :56, :8] == 240).all() and (values[5, 56:] == 255).all() and (values[5, :, 8:] == 255).all()
    np.testing.assert_array_equal(stack[2, 5:9, ::2, 1].compute(), values[2, 5:9, ::2, 1])
    np.testing.assert_array_equal(stack[[4, 1]].compute(), values[[4, 1]])
    data = found.to_xarray()
    assert data.dims == ("match", "y", "x", "c") and data.y_start.values.tolist() == [0, 0, 64, 64, 128, 128]
    np.testing.assert_array_equal(data.isel(match=5), values[5])
    assert labels.where("Bright & Dark").to_dask().compute().shape == (0, 64, 64, 3)
    assert list(labels.where("Bright & Dark").iter_arrays()) == []


# Chunks that were written again


def stale():
    array = archive(store := zarr.storage.MemoryStore(), shape=(64, 256, 3), chunks=(64, 64, 3))
    image = np.full((64, 256, 3), 20, "u1")
    image[:, 128:] = 240
    array[:] = image
    labels = consolidate_labels(array)
    array[:, 0:64] = 240  # the index knows nothing of it
    array[:, 192:] = 21
    return store, array, labels


def test_stale_entries_are_judged_anew_when_fetched():
    _, array, labels = stale()
    assert labels.where("Bright").chunks == [(0, 2, 0), (0, 3, 0)]
    with pytest.warns(StaleIndexWarning, match=r"\(0, 3, 0\)"):
        assert [match.chunk for match in labels.where("Bright").iter_arrays()] == [(0, 2, 0)]
    unchecked = list(labels.where("Bright", verify=None).iter_arrays())
    assert [match.chunk for match in unchecked] == [(0, 2, 0), (0, 3, 0)]
    assert (unchecked[1].array == 21).all()
    # Still what was asked for, though other pixels than were indexed.
    array[:, 128:192] = 230
    with pytest.warns(StaleIndexWarning, match=r"\(0, 3, 0\)"):
        (match,) = labels.where("Bright").iter_arrays()
    assert (match.array == 230).all()
    stack = labels.where("Bright").to_dask()
    check_rejects(StaleIndex, "(0, 3, 0)|consolidate_labels", stack.compute, scheduler="sync")
    assert labels.where("Bright", verify=None).to_dask().compute().shape[0] == 2


def test_verifying_all_finds_what_a_stale_index_missed():
    store, array, labels = stale()
    found = labels.where("Bright", verify="all", tiles=True)
    assert found.chunks == [(0, 0, 0), (0, 2, 0)]
    assert [region[1] for region in found.regions] == [slice(0, 64), slice(128, 192)]
    assert consolidate_labels(array).where("Bright").chunks == found.chunks
    assert open_labels(array).where("Bright").chunks == found.chunks
    assert labels.where("Bright").chunks == [(0, 2, 0), (0, 3, 0)], "labels that are open go on with their version"


def test_chunks_deleted_or_new_since():
    store, array, labels = stale()
    array[:, 128:192] = 0  # equal to fill: the chunk is deleted
    with pytest.warns(StaleIndexWarning):
        assert list(labels.where("Bright").iter_arrays()) == []
    unverified = labels.where("Bright", verify=None)
    words = "chunk (0, 2, 0) was deleted|consolidate_labels"
    check_rejects(StaleIndex, words, lambda: list(unverified.iter_arrays()))
    check_rejects(StaleIndex, words, unverified.to_dask().compute, scheduler="sync")
    assert labels.where("Bright", verify="all").chunks == [(0, 0, 0)]
    labels = consolidate_labels(array)
    assert labels.summary()["missing"] == 1
    assert labels.where("~Bright").chunks == [(0, 1, 0), (0, 3, 0)], "no data is not the absence of a class"
    array[:, 128:192] = 20
    assert labels.where("~Bright", verify="all").chunks == [(0, 1, 0), (0, 2, 0), (0, 3, 0)]


def test_new_labels_that_nobody_knows():
    _, array, labels = stale()
    put(array, (0, 2, 0), payload(array, None))
    check_rejects(StaleIndex, "(0, 2, 0)|relabel", lambda: list(labels.where("Bright").iter_arrays()))
    check_rejects(StaleIndex, "(0, 2, 0)|relabel", labels.where, "Bright", verify="all")


@pytest.mark.filterwarnings("ignore::deepsic_codec.labels.selection.StaleIndexWarning")
def test_damaged_chunks_are_named_when_fetched():
    _, array, labels = stale()
    bad = payload(array, np.full((1, 1, 1, 4), 200, "u1"))
    put(array, (0, 2, 0), bad)
    found = labels.where("Bright")
    check_rejects(CorruptPayload, "chunk (0, 2, 0)", lambda: list(found.iter_arrays()))
    put(array, (0, 2, 0), bad[:-3])
    check_rejects(CorruptPayload, "chunk (0, 2, 0)|features", lambda: list(found.iter_arrays()))
    put(array, (0, 2, 0), b"\xff\xd8\xff" * 100)
    check_rejects(UnsupportedPayload, "chunk (0, 2, 0)", lambda: list(found.iter_arrays()))
    check_rejects(UnsupportedPayload, "chunk (0, 2, 0)", labels.where, "Bright", verify="all")


def test_iterating_over_some_chunks(filled):
    array, _ = filled
    last = tuple(n - 1 for n in array.cdata_shape)
    first = (0,) * len(last)
    assert [index for index, _ in iter_chunk_attrs(array, [last, first, last])] == [last, first, last]
    check_rejects(IndexError, "grid", lambda: list(iter_chunk_attrs(array, [(99,) * len(last)])))


def test_labels_of_features_are_computed(stub):
    array = create_array({}, data=scene(), chunks=(64, 64, 3), codec=DeepSIC(semantics="post"))
    stub.batches.clear()
    found = dict(iter_chunk_attrs(array))
    assert found[(0, 2, 0)]["labels"][0]["Bright"] > 0.7
    assert stub.sizes("decode") == [len(found)] and len(found) > 4, "all of them in one call"
    assert found == {index: chunk_attrs(array, index) for index in found}


def test_labels_of_features_and_stored_ones_side_by_side(stub, monkeypatch):
    codec = DeepSIC(semantics="post", label_tile=64)
    array = create_array({}, data=scene(), chunks=(64, 64, 3), codec=codec)
    indices = list(np.ndindex(*array.cdata_shape))
    put(array, indices[1], payload(array, np.full((1, 1, 1, 4), 99, "u1")))
    put(array, indices[3], DeepSIC(model="other", semantics="post").encode(scene()[:64, :64]))
    put(array, indices[4], DeepSIC(semantics="none").encode(scene()[:64, :64]))
    alone = {index: chunk_attrs(array, index) for index in indices}
    assert alone[indices[4]]["labels"] is None and alone[indices[3]]["model"] == "12" * 8
    stub.batches.clear()
    assert dict(iter_chunk_attrs(array)) == alone
    assert stub.sizes("decode") == [len(indices) - 3, 1], "one call for each model"
    monkeypatch.setattr(headers, "BATCH_PIXELS", 3 * 64 * 64)
    assert dict(iter_chunk_attrs(array)) == alone
    assert list(iter_chunk_attrs(array, [indices[2], indices[0], indices[2]]))[2] == (indices[2], alone[indices[2]])


def test_one_bad_chunk_among_features_is_named(stub):
    array = create_array({}, data=scene(), chunks=(64, 64, 3), codec=DeepSIC(semantics="post"))
    put(array, (0, 2, 0), payload(array, None))  # features that are none
    found = iter_chunk_attrs(array)
    assert [next(found)[0] for _ in range(2)] == [(0, 0, 0), (0, 1, 0)]
    check_rejects(CorruptPayload, "chunk (0, 2, 0)|features", next, found)


# What an index was made of


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_that_was_replaced_is_noticed(zarr_format):
    store = zarr.storage.MemoryStore()
    old = archive(store, zarr_format=zarr_format)
    old[:] = 200
    consolidate_labels(old)
    assert open_labels(store).where("Bright").count == 2
    arguments = {"chunks": old.chunks, "codec": DeepSIC(label_tile=(64, 64)), "zarr_format": zarr_format}
    new = create_array(store, name="img", data=np.full(old.shape, 21, "u1"), overwrite=True, **arguments)
    for source in (store, new, old):  # of `old`, only the metadata of the array that is no more are in memory
        check_rejects(StaleIndex, "replaced|consolidate_labels", open_labels, source)
    for source in (new, old):
        assert consolidate_labels(store, "img").where("Dark").count == 2
        assert open_labels(source).where("Dark").count == 2
    zarr.open_array(store, path="img", mode="r+").attrs["note"] = "of the user"
    assert open_labels(new).where("Dark").count == open_labels(store).where("Dark").count == 2


def test_another_codec_without_identity_is_noticed():
    store = zarr.storage.MemoryStore()
    for quality in (40, 50):
        codec = DeepSICCodec(quality=quality, label_tile=(64, 64))
        arguments = {"shape": (64, 64, 3), "chunks": (64, 64, 3), "dtype": "u1", "compressors": None}
        array = zarr.create_array(store, name="img", serializer=codec, overwrite=True, **arguments)
        array[:] = 200
        if quality == 40:
            consolidate_labels(array)
            assert open_labels(store, "img").where("Bright").count == 1
    check_rejects(StaleIndex, "replaced|consolidate_labels", open_labels, store, "img")


def test_answers_say_whether_they_were_compared_with_the_chunks():
    store, array, _ = stale()
    labels = open_labels(store)
    assert not labels.compared and not labels.where("Bright").compared
    assert "not compared" in repr(labels.where("Bright"))
    assert np.argwhere(labels.rewritten()).tolist() == [[0, 0, 0], [0, 3, 0]]
    exact = labels.where("Bright", verify="all")
    assert exact.compared and "not compared" not in repr(exact)
    assert open_labels(store, scan=True).where("Bright").compared
    assert consolidate_labels(array).compared and not open_labels(array).rewritten().any()


def test_bulk_writes_that_do_not_update_the_index_are_noticed():
    bulk = pytest.importorskip("deepsic_codec.dask")
    pytest.importorskip("dask.array")
    store = zarr.storage.MemoryStore()
    array = archive(store)
    array[:] = 200
    consolidate_labels(array)
    region = np.s_[:, :128]
    dark = np.full((128, 128, 3), 21, "u1")
    bulk.store(dark, array, region=region, index=False)
    with pytest.warns(StaleIndexWarning, match="written since.*consolidate_labels"):
        labels = open_labels(store)
    assert labels.where("Bright").count == 2 and labels.where("Bright", verify="all").count == 1
    consolidate_labels(array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_labels(store).where("Bright").count == 1
    bulk.store(dark + 200, array, region=region)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_labels(store).where("Bright").count == 2

    class Full(WrapperStore):
        async def set(self, key, value, *args):
            if "/c/" in key:
                raise PermissionError("disk full")
            await super().set(key, value, *args)

    with pytest.raises(WriteError):
        bulk.store(dark, Full(store), name="img", region=region)
    with pytest.warns(StaleIndexWarning, match="written since"):
        open_labels(store)


# Tables


def test_tables_have_a_row_for_each_region(filled):
    _, labels = filled
    for tiles in (False, True):
        found = labels.where("Visible > 0.3 & ~Dark", tiles=tiles)
        data, names = found.to_pandas(), found.stored.dimension_names
        assert len(data) == len(found.regions)
        for axis, name in enumerate(names):
            assert data[f"{name}_start"].tolist() == [region[axis].start for region in found.regions]
            assert data[f"{name}_stop"].tolist() == [region[axis].stop for region in found.regions]
        assert list(data.columns)[-3:] == ["label", "score_Visible", "score_Dark"]
        expected = {name: brute_scores(labels, found, name, tiles) for name in labels.vocabulary.known}
        np.testing.assert_allclose(data.score_Visible, expected["Visible"], atol=1e-6)
        for row, label in enumerate(data.label):
            best = max(expected[name][row] for name in labels.vocabulary.names)
            assert expected[label][row] == best
    assert set(data.chunk) == {".".join(map(str, chunk)) for chunk in found.chunks}


def brute_scores(labels, found, name, tiles):
    scores = labels.map(name)
    scores = np.expand_dims(scores, found.geometry.axes.c) if scores.ndim < found.mask.ndim else scores
    if tiles:
        return scores[tuple(found.tiles.T)]
    parts = [found.geometry.tiles_of(chunk, [i + 1 for i in chunk]) for chunk in found.chunks]
    return [np.nanmax(scores[part]) for part in parts]


def test_dates_of_a_time_axis(filled):
    array = archive(shape=(4, 64, 64), chunks=(2, 64, 64), axes="tyx")
    for index in np.ndindex(*array.cdata_shape):
        put(array, index, payload(array, np.full((2, 1, 1, 4), 200, "u1")))
    labels = consolidate_labels(array)
    assert "date" not in labels.where("Dark").to_table()
    days = Coordinate(("t",), np.array([0.0, 1.5, 2, np.nan]), {"units": "days since 2024-02-28"})
    write_coordinates(array.store_path, {"t": days}, 3)
    table = open_labels(array).where("Dark", tiles=True).to_table()
    assert table["date"].astype(str).tolist() == [
        "2024-02-28T00:00:00",
        "2024-02-29T12:00:00",
        "2024-03-01T00:00:00",
        "NaT",
    ]


def test_scores_of_chunks_that_were_written_again_are_unknown():
    _, _, labels = stale()
    found = labels.where("Bright", verify="all")
    assert np.isnan(found.scores()["Bright"]).tolist() == [True, False]
    assert found.to_table()["label"].tolist() == ["", "Bright"]
