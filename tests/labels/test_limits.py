"""Labels of archives that announce far more than they hold: answered at once, or refused with what to set."""

from math import prod

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, chunk_attrs, config, consolidate_labels, create_array, iter_chunk_attrs, open_labels
from deepsic_codec.errors import LabelIndexError, UnsupportedArray, UnsupportedPayload
from deepsic_codec.io.info import describe
from deepsic_codec.io.preview import preview
from deepsic_codec.labels import evaluation, index
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload import header as h
from deepsic_codec.payload.labels import LabelBlock
from deepsic_codec.payload.sections import FEATURES, LABELS
from tests.common import check_rejects, photograph


@pytest.fixture(params=[(512, 512, 3), (1, 1, 3)], ids=str)
def empty(request, tmp_path):
    """An array of 2^32 x 2^32 pixels without a chunk."""
    codec = DeepSIC()
    create_array(tmp_path, name="image", shape=(1 << 32, 1 << 32, 3), dtype="u1", chunks=request.param, codec=codec)
    return zarr.open_array(tmp_path, path="image")


def test_arrays_of_too_many_chunks_are_described_and_drawn_from_a_sample(empty):
    about = describe(empty)
    assert about["chunks"]["total"] == prod(1 << 32 if n == 1 else 1 << 23 for n in empty.chunks[:2])
    assert 1000 < about["chunks"]["headers_read"] <= 1024 and about["chunks"]["stored"] == 0 and not about["exact"]
    picture = preview(empty, size=64, labels=False)
    assert picture.sampled and picture.decoded == 0 and picture.chunks == about["chunks"]["total"]


def test_arrays_of_too_many_chunks_are_not_scanned(empty, tmp_path):
    for call in (
        lambda: open_labels(empty, scan=True),
        lambda: consolidate_labels(empty, index=tmp_path / "index"),
        lambda: preview(empty, where="Forest"),
    ):
        check_rejects(LabelIndexError, "max_chunks", call)
    for call in (lambda: describe(empty, everything=True), lambda: preview(empty, everything=True)):
        check_rejects(UnsupportedArray, "max_chunks", call)


def test_a_scan_reports_its_progress(stub):
    store = {}
    array = create_array(store, name="image", data=photograph(64, 96, 3), chunks=(32, 32, 3), codec=DeepSIC())
    calls = []
    labels = open_labels(array, scan=True, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (6, 6) and labels.geometry.count == 6
    with config.set(max_chunks=5):
        check_rejects(LabelIndexError, "max_chunks", open_labels, array, scan=True)


def test_an_index_of_too_many_chunks_or_of_huge_parts_is_refused(stub, tmp_path, monkeypatch):
    array = create_array(tmp_path, name="image", data=photograph(64, 96, 3), chunks=(32, 32, 3), codec=DeepSIC())
    consolidate_labels(array)
    assert open_labels(array).summary()["chunks"] == 6
    with config.set(max_chunks=5):
        check_rejects(LabelIndexError, "max_chunks", open_labels, array)
    with config.set(max_memory=10):
        labels = open_labels(array)
        check_rejects(LabelIndexError, "max_memory", labels.map, labels.vocabulary.known[0])
    monkeypatch.setattr(index, "MAX_PART", 3)
    check_rejects(LabelIndexError, "has chunks of 6 bytes", open_labels, array)


def test_coordinates_of_an_index_are_limited(tmp_path):
    """Few chunks of many tiles along one axis."""
    codec, shape, chunks = DeepSIC(axes="nyx"), (1 << 31, 1, 1), (1 << 16, 1, 1)
    array = create_array(tmp_path, name="image", shape=shape, dtype="u1", chunks=chunks, codec=codec)
    check_rejects(LabelIndexError, "tiles along an axis|max_chunks", open_labels, array, scan=True)
    with config.set(max_chunks=1 << 40, max_memory=1 << 28):
        check_rejects(LabelIndexError, "coordinates|max_memory", open_labels, array, scan=True)
        check_rejects(LabelIndexError, "coordinates|max_memory", consolidate_labels, array)


def test_comparisons_and_tiles_of_an_index_are_limited(stub, monkeypatch):
    data = photograph(128, 192, 3)
    array = create_array({}, name="image", data=data, chunks=(128, 64, 3), codec=DeepSIC(label_tile=(64, 64)))
    labels = consolidate_labels(array)
    selection = labels.where("unknown | ~unknown", tiles=True)
    monkeypatch.setattr(evaluation, "COMPARED", 2)  # in pieces
    assert labels.rewritten().tolist() == [[[False]] * 3]
    array[:, 64:128] = data[::-1, 64:128]
    assert labels.rewritten().tolist() == [[[False], [True], [False]]]
    assert labels.where("unknown | ~unknown", verify="all").count == 3
    with config.set(max_chunks=2):
        check_rejects(LabelIndexError, "3 chunks|max_chunks", labels.rewritten)
        check_rejects(LabelIndexError, "3 chunks|max_chunks", labels.where, "unknown", verify="all")
    with config.set(max_memory=100):
        check_rejects(LabelIndexError, "max_memory", lambda: selection.tiles)


@pytest.fixture
def crowded(tmp_path):
    """An array of 1 kB with one chunk of 65,536 images of a tile each."""
    shape = (1 << 16, 16, 16)
    array = create_array(tmp_path, name="image", shape=shape, dtype="u1", chunks=shape, codec=DeepSIC(axes="nyx"))
    nothing = np.zeros((shape[0], 1, 1, 0), np.uint8)
    decoder, head = array.metadata.to_dict()["codecs"][0]["configuration"]["decoder"], bytes(4)
    sections = {LABELS: LabelBlock((64, 64), nothing, nothing), FEATURES: b"x"}
    identity = {"decoder": bytes.fromhex(decoder)[:8], "head": head}
    payload = h.pack(
        dtype="u1", shape=shape, order="C", axes="nyx", quality=50, grid=(1, 1), sections=sections, **identity
    )
    path = tmp_path / "image" / "c" / "0" / "0" / "0"
    path.parent.mkdir(parents=True)
    path.write_bytes(payload)
    return array


def test_labels_of_chunks_beyond_the_limit_are_refused_as_their_pixels_are(crowded):
    for read in (
        lambda: crowded[0, 0, 0],
        lambda: chunk_attrs(crowded, (0, 0, 0)),
        lambda: list(iter_chunk_attrs(crowded)),
        lambda: open_labels(crowded, scan=True),
        lambda: consolidate_labels(crowded),
        lambda: describe(crowded),
    ):
        with config.set(max_pixels=1 << 20):
            check_rejects(UnsupportedPayload, "max_pixels", read)
    assert len(chunk_attrs(crowded, (0, 0, 0))["labels"]) == 1 << 16


def test_a_vocabulary_of_a_stranger_is_limited():
    names = [f"c{i}" for i in range(255)]
    words = Vocabulary.from_json({"classes": names[:250], "parents": {f"p{i}": names[i : i + 16] for i in range(200)}})
    assert len(words.known) == 451 and words.members("p3") == tuple(range(3, 19))
    many = {f"p{i}": names for i in range(17)}
    for data in (
        {"classes": [f"c{i}" for i in range(256)]},
        {"classes": names, "parents": {f"p{i}": [] for i in range(256)}},
        {"classes": names, "parents": many},
        {"classes": names, "parents": {"p": names * 2}},
        {"classes": ["a"], "descriptions": {"a": "x" * 100_000}},
    ):
        check_rejects(LabelIndexError, "vocabulary", Vocabulary.from_json, data)
