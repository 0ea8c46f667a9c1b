import numpy as np
import pytest
import zarr

from deepsic_codec import (
    DeepSIC,
    chunk_attrs,
    consolidate_labels,
    create_array,
    decode_features,
    iter_chunk_attrs,
    open_labels,
    relabel,
)
from deepsic_codec.cli.main import main
from deepsic_codec.errors import LabelIndexError, ModelMismatch, ModelNotFound
from deepsic_codec.labels import index as label_index
from deepsic_codec.model.file import load_arrays, save_model
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import eurosat_mosaic
from deepsic_codec.stored.reader import PayloadReader
from tests import stub_runtime
from tests.common import check_rejects, photograph
from tests.labels.common import archive, payload, put


def scene():
    array = np.empty((128, 192, 3), "u1")
    array[:, :64], array[:, 64:128], array[:, 128:] = 20, 120, 240
    return array


@pytest.mark.parametrize("shards", [None, (128, 192, 3)])
def test_post_semantic_labels(stub, shards):
    store = zarr.storage.MemoryStore()
    zarr.open_group(store)
    codec = DeepSIC(semantics="post", label_tile=(64, 64))
    array = create_array(store, name="img", data=scene(), chunks=(64, 192, 3), codec=codec, shards=shards)
    assert consolidate_labels(array).summary()["unlabelled"] == 2
    labels = relabel(array)
    assert labels.summary() == {
        "chunks": 2,
        "missing": 0,
        "header": 0,
        "features": 2,
        "unlabelled": 0,
        "classes": {"Dark": 2, "Dim": 2, "Bright": 2, "unknown": 0, "Visible": 2},
    }
    assert [region[1] for region in labels.where("Bright", tiles=True).regions] == [slice(128, 192)] * 2
    assert labels.where("Bright", verify="all").count == 2
    np.testing.assert_array_equal(next(labels.where("Dark").iter_arrays()).array, scene()[:64])


def test_consolidating_keeps_what_comes_from_features_while_it_is_true(stub):
    array = archive(semantics="post", shape=(64, 256, 3), chunks=(64, 64, 3))
    array[:] = 240
    relabel(array)
    array[:, :64] = 20
    array[:, 64:128] = 0
    labels = consolidate_labels(array)
    summary = labels.summary()
    assert [summary[kind] for kind in ("missing", "header", "features", "unlabelled")] == [1, 0, 2, 1]
    assert labels.where("Bright").chunks == [(0, 2, 0), (0, 3, 0)]
    assert int(np.asarray(labels.index.group["head"][0, 2, 0])) == int("cd" * 4, 16)
    # Grown at its end: whole chunks are the same as ever.
    array.resize((64, 320, 3))
    assert consolidate_labels(array).summary()["features"] == 2
    assert consolidate_labels(array, keep=False).summary()["features"] == 0


def test_damaged_labels_of_features_are_left_out_only_if_that_is_asked_for(stub):
    array = archive(semantics="post", shape=(64, 256, 3), chunks=(64, 64, 3))
    array[:] = 240
    index = relabel(array).index
    (key,) = [key for key in array.store._store_dict if key.startswith(f"{index.group.path}/crc/c/")]
    array.store._store_dict[key] = array.store._store_dict[key][:10]
    check_rejects(LabelIndexError, "keep=False", consolidate_labels, array)
    assert consolidate_labels(array, keep=False).summary()["unlabelled"] == 4


@pytest.mark.parametrize(
    ("before", "after"),
    [((64, 192), (128, 192)), ((128, 192), (64, 192)), ((128, 192), (128, 256)), ((128, 256), (128, 192)),
     ((128, 192), (100, 130)), ((100, 130), (128, 192)), ((128, 192), (60, 130))],
)  # fmt: skip
def test_labels_from_features_are_kept_only_where_a_chunk_has_the_tiles_that_it_had(stub, before, after):
    """An array that is resized within a chunk of several tiles: what was labelled there says nothing of the rest."""
    array = archive(semantics="post", shape=(*before, 3), chunks=(128, 128, 3))
    array[:] = 240
    old = relabel(array).map("Bright")
    array.resize((*after, 3))
    labels = consolidate_labels(array)
    new = labels.map("Bright")

    def tiles(shape, chunk):
        return [-(-min(size - 128 * i, 128) // 64) for size, i in zip(shape, chunk, strict=True)]

    for chunk in np.ndindex(labels.index.geometry.grid[:2]):
        there = all(128 * i < size for size, i in zip(before, chunk, strict=True))
        same = there and tiles(before, chunk) == tiles(after, chunk)
        source = int(np.asarray(labels.index.source[(*chunk, 0)]))
        assert source == (label_index.FEATURES if same else label_index.UNLABELLED), chunk
        rows, columns = (slice(2 * i, 2 * i + 2) for i in chunk)
        if same:
            np.testing.assert_array_equal(new[rows, columns], old[rows, columns])
        else:
            assert not (np.nan_to_num(new[rows, columns]) > 0).any()


def test_a_new_head_has_its_own_vocabulary(stub, monkeypatch):
    array = archive(shape=(64, 192, 3), chunks=(64, 64, 3))
    array[:] = scene()[:64]
    consolidate_labels(array)
    vocabulary = stub_runtime.Vocabulary(("Night", "Dusk", "Day"), {})
    monkeypatch.setattr(
        stub_runtime,
        "MODELS",
        (*stub_runtime.MODELS, stub_runtime.ModelInfo("times", "ab" * 32, "ef" * 32, vocabulary)),
    )
    labels = relabel(array, "times")
    assert labels.where("Night").chunks == [(0, 0, 0)] and "Dark" not in labels.vocabulary.known
    assert (np.asarray(labels.index.group["head"][...]) == int("ef" * 4, 16)).all(), "which head made these labels"
    array[:, :64] = 240
    with pytest.warns(UserWarning, match="labels of 1 chunk are of another vocabulary"):
        labels = consolidate_labels(array)
    assert labels.where("Day").chunks == [(0, 2, 0)] and labels.summary()["unlabelled"] == 1
    assert open_labels(array, scan=True).where("Bright").chunks == [(0, 0, 0), (0, 2, 0)]
    assert relabel(array, "times").where("Day").chunks == [(0, 0, 0), (0, 2, 0)]


def test_command(stub, monkeypatch, tmp_path, capsys):
    array = archive(tmp_path / "a.zarr", shape=(64, 192, 3), chunks=(64, 64, 3))
    array[:] = scene()[:64]
    vocabulary = stub_runtime.Vocabulary(("Night", "Dusk", "Day"), {})
    times = stub_runtime.ModelInfo("times", "ab" * 32, "ef" * 32, vocabulary)
    monkeypatch.setattr(stub_runtime, "MODELS", (*stub_runtime.MODELS, times))
    assert main(["index", str(tmp_path / "a.zarr"), "--relabel", "times"]) == 0
    assert "3 from features" in capsys.readouterr().out
    assert open_labels(array).where("Night").chunks == [(0, 0, 0)]
    assert main(["index", str(tmp_path / "a.zarr"), "--relabel"]) == 0
    assert open_labels(array).where("Dark").chunks == [(0, 0, 0)]


def test_refuses_other_decoders(stub):
    array = archive(shape=(64, 192, 3), chunks=(64, 64, 3))
    array[:] = 100
    before = consolidate_labels(array).summary()
    check_rejects(ModelMismatch, "other|abab", relabel, array, "other")
    check_rejects(ModelNotFound, "nobody", relabel, array, "nobody")
    foreign = DeepSIC(model="other").encode(scene()[:64, :64])
    put(array, (0, 1, 0), foreign)
    check_rejects(ModelMismatch, "chunk (0, 1, 0)|1212", relabel, array)
    put(array, (0, 1, 0), payload(array, None))
    with pytest.raises(Exception, match="features"):  # which are none
        relabel(array)
    assert open_labels(array).summary() == before


def test_real_features(tmp_path):
    image = eurosat_mosaic()[:128, :320]
    store = zarr.storage.LocalStore(tmp_path / "a.zarr")
    zarr.open_group(store)
    both = {}
    for semantics in ("pre", "post"):
        codec = DeepSIC(quality=80, semantics=semantics, label_tile=(64, 64), transform="features")
        both[semantics] = create_array(store, name=semantics, data=image, chunks=(128, 128, 3), codec=codec)
    before = consolidate_labels(both["pre"])
    labels = relabel(both["post"])
    maps = np.stack([[m.map(name) for name in labels.vocabulary.classes] for m in (before, labels)])
    assert maps.shape == (2, 10, 2, 5) and (maps[0].argmax(0) == maps[1].argmax(0)).mean() > 0.85
    assert labels.vocabulary.members("Water") and labels.summary()["features"] == 3

    features = decode_features(both["post"])
    info = find_model()
    assert features.shape == (info.architecture["latents"], 8, 24) and features.dtype == np.int16
    payload = both["post"].metadata.codecs[0].convert(DeepSIC).encode(image[:, 128:256])
    expected = DeepSIC().decode_features(payload)[0]
    symbols = features.compute(scheduler="sync")
    np.testing.assert_array_equal(symbols[:, :, 8:16], expected)
    latents = decode_features(both["post"], dequantise=True)
    assert latents.dtype == np.float32 and latents.shape == features.shape
    for channel, values in zip(symbols, latents.compute(scheduler="sync"), strict=True):
        largest = np.unravel_index(np.abs(channel).argmax(), channel.shape)
        if channel[largest]:  # latents are rounded to integers
            np.testing.assert_allclose(values, channel * (values[largest] / channel[largest]), rtol=0, atol=1)
    assert np.abs(latents.compute(scheduler="sync")).max() > 2 * np.abs(symbols).max()

    # A file with another head on the same decoder.
    arrays = dict(load_arrays(info))
    names = tuple(f"class {i}" for i in range(len(info.vocabulary.classes)))
    path = tmp_path / "new.safetensors"
    new = save_model(path, "new", arrays, info.architecture, type(info.vocabulary)(names, {}), {})
    assert new.decoder == info.decoder and new.head != info.head
    renamed = relabel(both["post"], path)
    assert renamed.where('"class 0"').chunks == labels.where(info.vocabulary.classes[0]).chunks


@pytest.mark.parametrize("axes", ["tyxc", "yxtc"])
def test_features_of_shards_read_each_shard_index_once(stub, axes, monkeypatch):
    sizes = {"t": 3, "y": 96, "x": 128, "c": 3}
    image = photograph(*(sizes[axis] for axis in axes))
    chunks = tuple({"t": 1, "y": 32, "x": 32, "c": 3}[axis] for axis in axes)
    shards = tuple({"t": 2, "y": 64, "x": 64, "c": 3}[axis] for axis in axes)
    codec = DeepSIC(axes=axes)
    plain = create_array({}, data=image, chunks=chunks, codec=codec)
    sharded = create_array({}, data=image, chunks=chunks, shards=shards, codec=codec)
    expected = decode_features(plain).compute(scheduler="sync")
    features = decode_features(sharded)
    assert features.shape == expected.shape == (3, 768, 6, 8) and features.numblocks == (2, 1, 2, 2)
    reads = []
    read = PayloadReader.read_shard_index
    monkeypatch.setattr(PayloadReader, "read_shard_index", lambda self, at: reads.append(at) or read(self, at))
    np.testing.assert_array_equal(features.compute(scheduler="sync"), expected)
    assert len(reads) == len(set(reads)) == 8


def test_scores_of_a_tile_as_a_whole_are_alike_wherever_they_are_computed(stub):
    """Stored in the header, computed by chunk_attrs for one chunk and several, and by relabel; not the best cell's."""
    read, together, indexed = {}, {}, {}
    for semantics, pooling in (("pre", "mean"), ("post", "mean"), ("pre", "max")):
        codec = DeepSIC(semantics=semantics, label_tile=(64, 192), label_pooling=pooling)
        store = zarr.open_group(zarr.storage.MemoryStore()).store
        array = create_array(store, name="img", data=scene(), chunks=(64, 192, 3), codec=codec)
        read[semantics, pooling] = chunk_attrs(array, (0, 0, 0))["labels"]
        together[semantics, pooling] = [attributes["labels"] for _, attributes in iter_chunk_attrs(array)]
        indexed[semantics, pooling] = relabel(array).index.scores[:, 0, 0, 0].tolist()
    for scores in (read, together, indexed):
        assert scores["pre", "mean"] == scores["post", "mean"] != scores["pre", "max"]
