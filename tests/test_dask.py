import json
import os
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import deepsic_codec.dask as bulk
from deepsic_codec import DeepSIC, create_array
from deepsic_codec import config as settings
from deepsic_codec.errors import (
    ConfigurationError,
    CorruptPayload,
    LabelIndexError,
    ModelNotFound,
    UnsupportedArray,
    UnsupportedPayload,
    WriteError,
)
from deepsic_codec.labels.consolidate import consolidate_labels
from tests.common import ROOT, check_lazy, check_rejects, photograph, run_python

da = pytest.importorskip("dask.array")
CHUNKS = (64, 64, 3)


def image(seed=0):
    return photograph(300, 500, 3, seed=seed)


def lazy(values=None, chunks=(100, 130, 3)):
    return da.from_array(image() if values is None else values, chunks=chunks)


def save(target, values=None, **kwargs):
    return bulk.store(lazy(values), target, **{"name": "image", "chunks": CHUNKS, "backoff": 0.001, **kwargs})


def contents(group):
    """All arrays and attributes of a group, the versions of indexes under one name."""
    nodes = {re.sub("[0-9a-f]{32}", "version", name): node for name, node in group.members(max_depth=None)}
    arrays = {name: node[...] for name, node in nodes.items() if isinstance(node, zarr.Array)}
    attributes = {name: dict(node.attrs) for name, node in {**nodes, "": group}.items()}
    for about in attributes.values():
        about.get("deepsic", {}).pop("id", None)
        about.get("deepsic_labels", {}).get("array", {}).pop("fingerprint", None)
        if "current" in about.get("deepsic_labels", {}):
            about["deepsic_labels"] = {"format": 1}
    return arrays, attributes


def current_index(group):
    """The current version of the index that a group has or is."""
    return group[group.attrs["deepsic_labels"]["current"]]


def check_same(one, other):
    (arrays, attributes), (expected, expected_attributes) = contents(one), contents(other)
    assert sorted(arrays) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(arrays[name], values, name)
    assert attributes == expected_attributes


def check_index(store, name="image"):
    """The index is the one that consolidate_labels makes of the headers."""
    group = zarr.open_group(store, mode="r")
    made = MemoryStore()
    consolidate_labels(group[name], index=made)
    check_same(current_index(group[f"{name}_labels"]), current_index(zarr.open_group(made, mode="r")))


FORMS = [{}, {"zarr_format": 2}, {"shards": (128, 192, 3)}]


@pytest.mark.parametrize("kwargs", FORMS, ids=str)
def test_store_writes_array_and_index(stub, kwargs):
    store = MemoryStore()
    report = save(store, **kwargs)
    np.testing.assert_array_equal(zarr.open_array(store, path="image", mode="r")[:], image())
    assert (report.written, report.skipped, report.empty) == (40, 0, 0)
    assert report.index.endswith("image_labels")
    assert sum(stub.sizes("encode")) == 40 and max(stub.sizes("encode")) == 16
    check_index(store)


def test_nothing_is_read_before_it_is_written(stub):
    read = []

    class Watched(WrapperStore):
        async def get(self, key, *args, **kwargs):
            read.append(key)
            return await super().get(key, *args, **kwargs)

    array = create_array(Watched(MemoryStore()), name="image", shape=(300, 500, 3), dtype="u1", chunks=CHUNKS)
    read.clear()
    bulk.store(lazy(), array, index=False)
    assert not [key for key in read if "/c/" in key]
    assert stub.sizes("decode") == []


@pytest.mark.parametrize("kwargs", FORMS, ids=str)
def test_fill_chunks_are_not_stored(stub, kwargs):
    values = image()
    values[:128, :192] = 0
    store = MemoryStore()
    report = save(store, values, **kwargs)
    assert (report.written, report.empty) == (34, 6)
    np.testing.assert_array_equal(report.array[:], values)
    check_index(store)


@pytest.mark.parametrize("semantics", ["post", "none"])
def test_semantics_without_labels_in_the_header(stub, semantics):
    store = MemoryStore()
    save(store, codec=DeepSIC(semantics=semantics))
    check_index(store)


def test_data_array(stub):
    xr = pytest.importorskip("xarray")
    source = xr.DataArray(
        lazy(), dims=("lat", "lon", "band"), attrs={"crs": "EPSG:32632", "transform": np.arange(6.0), "n": np.int64(3)}
    )
    store = MemoryStore()
    array = bulk.store(source, store, name="image", chunks=CHUNKS).array
    assert array.metadata.dimension_names == ("lat", "lon", "band")
    assert array.attrs["crs"] == "EPSG:32632" and array.attrs["transform"] == [0, 1, 2, 3, 4, 5]
    assert array.attrs["n"] == 3 and "vocabulary" in array.attrs["deepsic"]
    np.testing.assert_array_equal(array[:], image())
    loaded = xr.DataArray(image(), dims=("y", "x", "c"))
    np.testing.assert_array_equal(bulk.store(loaded, store, name="loaded", chunks=CHUNKS).array[:], image())
    check_rejects(UnsupportedArray, "Dataset|variables", bulk.store, source.to_dataset(name="a"), store, name="b")


def test_attributes_that_are_passed_win_over_those_of_a_data_array(stub):
    xr = pytest.importorskip("xarray")
    source = xr.DataArray(image(), dims=("y", "x", "c"), attrs={"crs": "EPSG:4326", "sensor": "A"})
    before = dict(source.attrs)
    passed = {"crs": "EPSG:32632", "year": 2020}
    array = bulk.store(source, MemoryStore(), name="image", chunks=CHUNKS, attributes=passed).array
    assert [array.attrs[key] for key in ("crs", "sensor", "year")] == ["EPSG:32632", "A", 2020]
    assert source.attrs == before and passed == {"crs": "EPSG:32632", "year": 2020}
    named = bulk.store(source, MemoryStore(), name="image", chunks=CHUNKS, dimension_names=("lat", "lon", "band")).array
    assert named.metadata.dimension_names == ("lat", "lon", "band")


def test_numpy_and_zarr_sources(stub):
    store = MemoryStore()
    first = bulk.store(image(), store, name="a", chunks=CHUNKS).array
    second = bulk.store(first, store, name="b", chunks=CHUNKS).array
    np.testing.assert_array_equal(second[:], image())


def test_compute_false_is_lazy(stub):
    store = MemoryStore()
    delayed = save(store, compute=False)
    assert stub.batches == [] and not zarr.open_array(store, path="image", mode="r")[:].any()
    report = delayed.compute()
    assert report.written == 40
    np.testing.assert_array_equal(zarr.open_array(store, path="image", mode="r")[:], image())


def test_to_zarr_and_assignment_still_work(stub, tmp_path):
    array = create_array(tmp_path / "a.zarr", shape=(300, 500, 3), dtype="u1", chunks=CHUNKS)
    lazy().rechunk((128, 128, 3)).to_zarr(array)
    np.testing.assert_array_equal(array[:], image())
    np.testing.assert_array_equal(da.from_zarr(array).compute(), image())


def test_region(stub):
    store = MemoryStore()
    save(store)
    part = photograph(128, 116, 3, seed=5)
    report = bulk.store(part, store, name="image", region=(slice(64, 192), slice(384, 500)))
    assert report.written == 4
    expected = image()
    expected[64:192, 384:] = part
    np.testing.assert_array_equal(report.array[:], expected)
    check_index(store)


def test_labels_from_features_are_kept_for_unchanged_chunks(stub):
    from deepsic_codec.labels.index import FEATURES, UNLABELLED
    from deepsic_codec.labels.relabel import relabel

    store = MemoryStore()
    save(store, codec=DeepSIC(semantics="post"))

    def sources():
        return current_index(zarr.open_group(store, path="image_labels", mode="r"))["source"][:]

    assert (sources() == UNLABELLED).all()
    relabel(store, name="image")
    assert (sources() == FEATURES).all()
    bulk.store(photograph(64, 500, 3, seed=5), store, name="image", region=slice(64, 128))
    source = sources()
    assert (source[1] == UNLABELLED).all() and (np.delete(source, 1, axis=0) == FEATURES).all()


def test_a_group_as_target(stub):
    group = zarr.open_group(MemoryStore(), mode="w")
    report = bulk.store(image(), group, name="deep/image", chunks=CHUNKS)
    np.testing.assert_array_equal(group["deep/image"][:], image())
    assert report.index.endswith("deep/image_labels")
    inner = group["deep"]
    np.testing.assert_array_equal(bulk.open(inner, "image").compute(), image())
    assert pickle.loads(pickle.dumps(bulk.store(image(), inner, name="image", resume=True))).skipped == 40


def test_misaligned_region_writes_nothing(stub):
    store = MemoryStore()
    save(store)
    message = check_rejects(
        UnsupportedArray,
        "cuts chunks|(64:192, 0:500, 0:3)",
        bulk.store,
        photograph(100, 500, 3),
        store,
        name="image",
        region=slice(70, 170),
    )
    assert "second encoding" in message
    np.testing.assert_array_equal(zarr.open_array(store, path="image", mode="r")[:], image())


@pytest.mark.parametrize(
    "source, words",
    [
        (np.full((300, 500, 3), np.nan, "f2"), "float16"),
        (photograph(300, 500, 3).astype("c8"), "complex64"),
        (photograph(300, 500), "axes"),
        (photograph(20, 20, 300), "300 bands"),
    ],
)
def test_sources_that_the_codec_cannot_take(stub, source, words):
    store = MemoryStore()
    check_rejects(UnsupportedArray, words, bulk.store, source, store, name="image", chunks=(64, 64, source.shape[-1]))
    assert not store._store_dict


def test_source_of_unknown_or_other_shape(stub):
    store = MemoryStore()
    save(store)
    unknown = lazy()[lazy()[:, 0, 0] > 3]
    check_rejects(UnsupportedArray, "unknown shape", bulk.store, unknown, store, name="other")
    for shape in ((300, 499, 3), (299, 500, 3)):
        words = f"{shape}|(300, 500, 3)"
        check_rejects(UnsupportedArray, words, bulk.store, photograph(*shape), store, name="image", resume=True)
    np.testing.assert_array_equal(zarr.open_array(store, path="image", mode="r")[:], image())


def test_an_array_that_exists_is_not_overwritten_unless_asked(stub):
    store = MemoryStore()
    save(store)
    check_rejects(ConfigurationError, "exists|resume=True|region|overwrite", save, store, image(1))
    np.testing.assert_array_equal(zarr.open_array(store, path="image", mode="r")[:], image())
    save(store, image(1), overwrite=True, codec=DeepSIC(quality=7))
    array = zarr.open_array(store, path="image", mode="r")
    np.testing.assert_array_equal(array[:], image(1))
    check_index(store)


@pytest.mark.parametrize(
    "other, words",
    [
        ({"codec": DeepSIC(quality=60, decoder="ab" * 32, head="cd" * 32)}, "quality 50, not 60"),
        ({"codec": DeepSIC(model="other", decoder="12" * 32, head="34" * 32)}, "decoder|head"),
        ({"chunks": (128, 64, 3)}, "chunks (64, 64, 3), not (128, 64, 3)"),
        ({"shards": (128, 64, 3)}, "shards None"),
        ({"zarr_format": 2}, "format 3"),
    ],
    ids=["quality", "model", "chunks", "shards", "format"],
)
def test_an_array_of_another_kind_is_refused(stub, other, words):
    store = MemoryStore()
    save(store)
    check_rejects(ConfigurationError, words, save, store, image(1), resume=True, **other)
    np.testing.assert_array_equal(zarr.open_array(store, path="image", mode="r")[:], image())


@pytest.mark.parametrize(
    "has, asked",
    [
        ({}, {"max_error": 0}),
        ({"max_error": 0}, {}),
        ({}, {"value_range": (0, 100)}),
        ({}, {"nodata": 0}),
        ({}, {"spectral": "none"}),
        ({"spectral": "none"}, {}),
        ({"quality": 40}, {"bpp": 2.0}),
        ({"psnr": 40}, {"quality": 50}),
        ({}, {"label_tile": 128}),
    ],
    ids=str,
)
def test_codecs_are_compared_as_a_whole(stub, has, asked):
    store = MemoryStore()
    create_array(store, name="image", shape=(64, 64, 3), dtype="u1", chunks=CHUNKS, codec=DeepSIC(**has))
    source = photograph(64, 64, 3)
    name = next(iter({**asked, **has}))
    check_rejects(
        ConfigurationError, name, bulk.store, source, store, name="image", resume=True, codec=DeepSIC(**asked)
    )
    bulk.store(source, store, name="image", resume=True, codec=DeepSIC(**has))


def test_invalid_targets(stub, tmp_path):
    store = MemoryStore()
    zarr.create_array(store, name="plain", shape=(300, 500, 3), dtype="u1", chunks=CHUNKS)
    check_rejects(UnsupportedPayload, "not with DeepSIC", bulk.store, image(), store, name="plain", resume=True)
    check_rejects(ConfigurationError, "group|name", bulk.store, image(), store, chunks=CHUNKS)
    check_rejects(UnsupportedArray, "no array 'image'", save, store, region=slice(0, 64))
    check_rejects(ConfigurationError, "codec", save, store, codec="zstd")
    array = save(store).array
    check_rejects(ConfigurationError, "name", bulk.store, image(), array, name="x")
    check_rejects(ConfigurationError, "overwrite", bulk.store, image(), array, overwrite=True)
    save(tmp_path / "b.zarr")
    for index in (True, "auto"):
        only = zarr.open_array(LocalStore(tmp_path / "b.zarr", read_only=True), path="image", mode="r")
        check_rejects(ConfigurationError, "reading only", bulk.store, image(), only, index=index)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"retries": -1}, {"resume": "maybe"}])
def test_options_out_of_range(stub, option):
    check_rejects(ConfigurationError, next(iter(option)), save, MemoryStore(), **option)


def test_missing_model(stub):
    store = MemoryStore()
    codec = DeepSIC(model="gone", decoder="99" * 32, head="99" * 32)
    check_rejects(ModelNotFound, "9999", save, store, codec=codec)


def test_arrays_that_can_have_no_index(stub, tmp_path):
    report = bulk.store(image(), tmp_path / "a.zarr", chunks=CHUNKS)
    assert report.index is None
    check_rejects(LabelIndexError, "root", bulk.store, image(), MemoryStore(), chunks=CHUNKS, index=True)
    report = bulk.store(image(), tmp_path / "b.zarr", chunks=CHUNKS, index=tmp_path / "b_index.zarr")
    assert "chunk_scores" in current_index(zarr.open_group(tmp_path / "b_index.zarr", mode="r"))
    store = MemoryStore()
    assert save(store, index=False).index is None and "image_labels" not in zarr.open_group(store)


class Broken(WrapperStore):
    """A store that fails for some keys, and counts."""

    def __init__(self, store, broken=(), times=10**9):
        super().__init__(store)
        self.broken, self.left, self.sets = set(broken), dict.fromkeys(broken, times), []

    async def set(self, key, value, *args):
        self.sets.append(key)
        if self.left.get(key, 0) > 0:
            self.left[key] -= 1
            raise OSError("disk is on fire")
        return await super().set(key, value, *args)

    def _with_store(self, store):
        return Broken(store)  # read-only, by zarr


def test_failing_writes_are_retried_then_reported(stub):
    inner = MemoryStore()
    broken = Broken(inner, ["image/c/1/2/0", "image/c/4/7/0"])
    with pytest.raises(WriteError, match="2 keys could not be written: .*disk is on fire.*resume=True") as caught:
        save(broken, retries=2)
    assert caught.value.keys == ("image/c/1/2/0", "image/c/4/7/0")
    assert pickle.loads(pickle.dumps(caught.value)).keys == caught.value.keys
    assert broken.sets.count("image/c/1/2/0") == 3
    stub.batches.clear()
    report = save(inner, resume=True)
    assert (report.written, report.skipped, sum(stub.sizes("encode"))) == (2, 38, 2)
    np.testing.assert_array_equal(report.array[:], image())
    check_index(inner)


def test_writes_that_fail_once_succeed(stub):
    store = Broken(MemoryStore(), ["image/c/1/2/0"], times=2)
    report = save(store)
    np.testing.assert_array_equal(report.array[:], image())


class Halving(WrapperStore):
    """A store that leaves part of a value behind when a write fails, as a full disk does; it then fails for good."""

    def __init__(self, store, share):
        super().__init__(store)
        self.share, self.sets = share, 0

    async def set(self, key, value, *args):
        if "/c/" not in key and "/0." not in key and not key[-1].isdigit():
            return await super().set(key, value, *args)
        self.sets += 1
        if self.sets % 2:
            return await super().set(key, value, *args)
        await super().set(key, value[: int(len(value) * self.share)], *args)
        raise PermissionError("disk full")

    def _with_store(self, store):
        return type(self)(store, self.share)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kwargs", FORMS, ids=str)
def test_truncated_payloads_never_count_as_complete(stub, kwargs, share):
    undisturbed, inner = MemoryStore(), MemoryStore()
    save(undisturbed, **kwargs)
    with pytest.raises(WriteError) as caught:
        save(Halving(inner, share), **kwargs)
    assert len(caught.value.keys) >= 3
    report = save(inner, resume=True, **kwargs)
    assert report.skipped > 0 and report.written > 0
    check_same(zarr.open_group(inner, mode="r"), zarr.open_group(undisturbed, mode="r"))


@pytest.mark.parametrize("kwargs", FORMS, ids=str)
def test_resume_encodes_only_what_is_missing(stub, kwargs):
    undisturbed, store = MemoryStore(), MemoryStore()
    save(undisturbed, **kwargs)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    import dask

    stub.delay = stop
    computed = []

    def load(block, block_info=None):
        computed.append(1)
        return block

    source = lazy().map_blocks(load, dtype="u1", meta=np.empty((0, 0, 0), "u1"), name="survey")
    with dask.config.set(scheduler="sync"), pytest.raises(KeyboardInterrupt):
        bulk.store(source, store, name="image", chunks=CHUNKS, **kwargs)
    stub.delay = None
    stub.batches.clear()
    report = bulk.store(source, store, name="image", chunks=CHUNKS, resume=True, **kwargs)
    assert 0 < report.skipped < 40 and report.written == 40 - report.skipped == sum(stub.sizes("encode"))
    np.testing.assert_array_equal(report.array[:], image())
    check_same(zarr.open_group(store, mode="r"), zarr.open_group(undisturbed, mode="r"))

    computed.clear()
    stub.batches.clear()
    report = bulk.store(source, store, name="image", chunks=CHUNKS, resume=True, **kwargs)
    assert (report.written, report.skipped) == (0, 40)
    assert computed == [] and stub.batches == []


@pytest.mark.parametrize("kwargs", FORMS, ids=str)
@pytest.mark.parametrize("resume", [True, "verify"])
def test_an_interrupted_rewrite_is_completed_with_the_new_source(stub, kwargs, resume):
    store = MemoryStore()
    old, new = image(1), image(2)
    new[128:256, :384] = old[128:256, :384]  # payloads of old chunks that are right, too
    new[:128, 128:256] = old[128:256, :128]  # and such as are right elsewhere
    save(store, old, **kwargs)

    class Refusing(WrapperStore):
        sets = 0

        async def set(self, key, value, *args):
            if key[-1].isdigit():
                Refusing.sets += 1
                if Refusing.sets % 2:
                    raise PermissionError("disk full")
            await super().set(key, value, *args)

    with pytest.raises(WriteError):
        bulk.store(lazy(new), Refusing(store), name="image", region=np.s_[:], retries=0)
    report = save(store, new, resume=resume, **kwargs)
    assert 0 < report.skipped < 40
    np.testing.assert_array_equal(report.array[:], new)
    check_index(store)
    assert save(store, new, resume=resume, **kwargs).skipped == 40
    with pytest.warns(UserWarning, match="another source"):
        report = save(store, old, resume=resume, **kwargs)
    assert report.skipped == 0
    np.testing.assert_array_equal(report.array[:], old)


def test_chunks_that_others_wrote_since_are_written_again(stub):
    store = MemoryStore()
    array = save(store).array
    array[64:128, 64:128] = 0
    array[128:192, 64:128] = array[128:192, 128:192]
    report = save(store, resume=True)
    assert report.skipped == 38
    np.testing.assert_array_equal(report.array[:], image())


def test_a_run_with_another_region_is_not_continued(stub):
    store = MemoryStore()
    save(store, region=None, resume=False)
    region = np.s_[:64]
    report = save(store, image()[:64], region=region, resume=True)
    assert report.skipped == 0, "of another region: it might be of another source"
    assert save(store, image()[:64], region=region, resume=True).skipped == 8
    assert save(store, resume=True).skipped == 40, "the chunks are the same"


def test_a_run_with_other_parameters_is_not_continued(stub):
    """Somebody changes the parameters of an array in place, whose chunks stay as they are."""
    store = MemoryStore()
    save(store)
    document = json.loads(store._store_dict["image/zarr.json"].to_bytes())
    document["codecs"][0]["configuration"]["value_range"] = [0, 255]
    data = json.dumps(document).encode()
    store._store_dict["image/zarr.json"] = store._store_dict["image/zarr.json"].from_bytes(data)
    with pytest.warns(UserWarning, match="another source"):
        report = save(store, resume=True)
    assert (report.written, report.skipped) == (40, 0)


def test_the_journal_is_one_value_in_the_end(stub):
    store = MemoryStore()
    save(store)
    journal = [key for key in store._store_dict if "journal" in key]
    assert len(journal) == 1 and journal[0].startswith("image/deepsic-journal/")
    assert len(store._store_dict[journal[0]].to_bytes()) == 12 * 40
    store._store_dict[journal[0]] = store._store_dict[journal[0]][: 12 * 30 + 5]
    assert save(store, resume=True).skipped == 30, "cut short by a crash"
    assert len([key for key in store._store_dict if "journal" in key]) == 1
    assert save(store, resume=True).skipped == 40


def test_stores_that_take_no_journal(stub):
    class Strict(WrapperStore):
        async def set(self, key, value, *args):
            if "journal" in key:
                raise RuntimeError(f"invalid key {key}")
            await super().set(key, value, *args)

    report = save(Strict(MemoryStore()), retries=5, backoff=100)
    assert report.written == 40
    assert save(report.array.store, resume=True).skipped == 0


def test_resume_verify_finds_damage_that_length_does_not_show(stub, tmp_path):
    save(tmp_path / "a.zarr")
    path = tmp_path / "a.zarr" / "image" / "c" / "1" / "2" / "0"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert save(tmp_path / "a.zarr", resume=True).written == 0
    assert save(tmp_path / "a.zarr", resume="verify").written == 1
    assert path.read_bytes() == data


def test_a_killed_run_can_be_resumed(tmp_path):
    """The process dies in the middle, by SIGKILL; what it leaves is either whole or not taken for whole."""
    target = tmp_path / "a.zarr"
    code = f"""
        import os, signal, sys
        from tests import stub_runtime
        stub_runtime.install()
        from tests.test_dask import save
        def die():
            if len(stub_runtime.RUNTIME.batches) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        stub_runtime.RUNTIME.delay = die
        import dask
        with dask.config.set(scheduler="sync"):
            save({str(target)!r})
    """
    with pytest.raises(AssertionError):
        run_python(code)
    finish = f"""
        from tests import stub_runtime
        stub_runtime.install()
        from tests.test_dask import save, image, check_index
        report = save({str(target)!r}, resume=True)
        assert (report.array[:] == image()).all()
        check_index({str(target)!r})
        print(report.skipped, sum(stub_runtime.RUNTIME.sizes("encode")))
    """
    assert run_python(finish).split() == ["32", "8"]


@pytest.mark.parametrize("kwargs", FORMS, ids=str)
def test_open_decodes_blocks_as_batches(stub, kwargs):
    store = MemoryStore()
    save(store, **kwargs)
    opened = bulk.open(store, "image")
    assert opened.dtype == np.uint8 and opened.numblocks == (2, 2, 1)
    np.testing.assert_array_equal(opened.compute(), image())
    assert max(stub.sizes("decode")) == 16 and sum(stub.sizes("decode")) == 40 and len(stub.sizes("decode")) <= 6


def test_batches_are_larger_beside_a_gpu(stub, monkeypatch):
    store = MemoryStore()
    monkeypatch.setattr(settings, "device_in_use", lambda loading=False: "cuda:1")
    monkeypatch.setattr(bulk, "default_batch_size", lambda array, axes, gpu: 40 if gpu else 16)
    save(store)
    assert stub.sizes("encode") == [40] and bulk.open(store, "image").numblocks == (1, 1, 1)
    assert bulk.open(store, "image", batch_size=16).numblocks == (2, 2, 1)


@pytest.mark.parametrize(
    "key",
    [
        np.s_[10:200, 130:140],
        np.s_[::-1, 5:300:7],
        np.s_[70, :, 1],
        np.s_[-3:, -1],
        np.s_[0:0],
        np.s_[[3, 250], :, 0],
        np.s_[299:3:-50, 499:0:-3],
    ],
)
@pytest.mark.parametrize("chunks", ["auto", (50, 333, 2)])
def test_open_slices(stub, key, chunks):
    store = MemoryStore()
    save(store)
    opened = bulk.open(store, chunks=chunks)
    np.testing.assert_array_equal(opened[key].compute(), image()[key])


def test_open_reads_only_what_a_slice_needs(stub):
    store = MemoryStore()
    save(store)
    bulk.open(store)[:64, 64:128].compute()
    assert stub.sizes("decode") == [1]


def test_open_missing_chunks_are_fill(stub):
    array = create_array(MemoryStore(), shape=(300, 500, 3), dtype="u1", chunks=CHUNKS, fill_value=9)
    assert (bulk.open(array).compute() == 9).all()


def test_open_names_the_damaged_chunk(stub, tmp_path):
    save(tmp_path / "a.zarr")
    path = tmp_path / "a.zarr" / "image" / "c" / "1" / "2" / "0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptPayload, match=r"chunk \(1, 2, 0\) of array 'image'.*truncated"):
        bulk.open(tmp_path / "a.zarr", "image").compute()


def test_threads_work_concurrently(stub):
    """Entropy coding of one batch overlaps the networks of another only if two batches can be under way."""
    barrier = threading.Barrier(2, timeout=20)
    calls = []

    def meet():
        calls.append(1)
        if len(calls) <= 2:
            barrier.wait()

    import dask

    stub.delay = meet
    with dask.config.set(scheduler="threads", num_workers=2):
        save(MemoryStore())


def test_settings_are_not_in_the_metadata(stub, tmp_path):
    with settings.set(device="cpu", batch_pixels=1000, threads=1):
        save(tmp_path / "a.zarr")
    text = (tmp_path / "a.zarr" / "image" / "zarr.json").read_text()
    assert not [word for word in ("device", "batch", "threads", "cpu") if word in text]


def test_dask_is_optional():
    code = """
        import sys
        sys.modules["dask"] = None
        import deepsic_codec.dask
        try:
            deepsic_codec.dask.open("nowhere")
        except ImportError as error:
            print(error)
    """
    assert "deepsic-codec[dask]" in run_python(code)
    check_lazy("import deepsic_codec.dask")


def test_distributed_workers(tmp_path):
    """Two worker processes: a killed one's tasks run again, and the archive is that of an undisturbed run."""
    pytest.importorskip("distributed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "cluster_run.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "same" in done.stdout


@pytest.fixture
def s3(monkeypatch):
    """Endpoint of an S3 server on loopback with the bucket "bucket"."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    boto3, s3fs = pytest.importorskip("boto3"), pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
    s3fs.S3FileSystem.clear_instance_cache()
    yield endpoint
    server.stop()


def test_s3(stub, s3):
    from zarr.storage import ObjectStore

    options = {"endpoint_url": s3, "anon": False}
    save("s3://bucket/a.zarr", storage_options=options)
    opened = bulk.open("s3://bucket/a.zarr", "image", storage_options=options)
    np.testing.assert_array_equal(opened.compute(), image())
    obstore = pytest.importorskip("obstore.store").S3Store(
        "bucket", prefix="a.zarr", endpoint=s3, client_options={"allow_http": True}, virtual_hosted_style_request=False
    )
    store = ObjectStore(obstore)
    np.testing.assert_array_equal(bulk.open(store, "image").compute(), image())
    report = save(store, resume=True)
    assert (report.written, report.skipped) == (0, 40)
    save(store, image(1), overwrite=True)
    check_index(store)


def test_progress_counts_blocks(stub):
    calls = []
    save(MemoryStore(), progress=lambda done, total: calls.append((done, total)), batch_size=16)
    total = calls[0][1]
    assert total > 1 and calls == [(done, total) for done in range(1, total + 1)]


def process_bound(tmp_path, kind):
    """A store that only this process can write to."""
    if kind == "zip":
        return zarr.storage.ZipStore(tmp_path / "a.zip", mode="w")
    if kind == "obstore":
        return zarr.storage.ObjectStore(pytest.importorskip("obstore.store").MemoryStore())
    if kind == "icechunk":
        icechunk = pytest.importorskip("icechunk")
        repository = icechunk.Repository.create(icechunk.in_memory_storage())
        return repository.writable_session("main").store
    if kind == "memory URL":
        return f"memory://{tmp_path.name}.zarr"
    return WrapperStore(MemoryStore()) if kind == "wrapped" else MemoryStore()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["memory", "wrapped", "memory URL", "zip", "obstore", "icechunk"])
def test_threads_write_what_other_processes_cannot(stub, tmp_path, kind):
    def workers(*args, **kwargs):
        raise AssertionError("the tasks were sent to the workers")

    import dask

    target = process_bound(tmp_path, kind)
    with dask.config.set(scheduler=workers), pytest.warns(UserWarning, match="only this process"):
        report = save(target)
    assert report.written == 40
    np.testing.assert_array_equal(report.array[:], image())


def test_a_relative_path_means_the_same_folder_for_workers_elsewhere(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    later = save("a.zarr", compute=False, index="labels.zarr")
    wrapped = save(zarr.storage.LocalStore("b.zarr"), compute=False)
    monkeypatch.chdir(tmp_path / "other")
    later.compute(), wrapped.compute()
    monkeypatch.chdir(tmp_path)
    for name in ("a.zarr", "b.zarr"):
        np.testing.assert_array_equal(zarr.open_group(name, mode="r")["image"][:], image())
    assert not list((tmp_path / "other").iterdir()) and (tmp_path / "labels.zarr").is_dir()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_file_by_its_path_is_written_once(stub, tmp_path):
    target = tmp_path / "a.zip"
    report = save(target)
    assert target.is_file()
    for values in (report.array, bulk.open(target, "image"), bulk.open(str(target))):
        np.testing.assert_array_equal(np.asarray(values[:]), image())
    for options in ({}, {"resume": True}, {"overwrite": True}):
        check_rejects(ConfigurationError, "written once", save, target, **options)
    check_rejects(ConfigurationError, "compute", save, tmp_path / "b.zip", compute=False)
    check_rejects(UnsupportedArray, "float16", save, tmp_path / "b.zip", image().astype("f2"))
    check_rejects(ConfigurationError, "zip", create_array, tmp_path / "b.zip", shape=(8, 8, 3), dtype="u1")
    check_rejects(ConfigurationError, "zip", consolidate_labels, target)
    check_rejects(ConfigurationError, "zip", consolidate_labels, report.array, index=tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


def test_icechunk_takes_every_kind_of_write_a_second_time(stub):
    icechunk = pytest.importorskip("icechunk")
    session = icechunk.Repository.create(icechunk.in_memory_storage()).writable_session("main")
    save(session.store)
    for options in ({"resume": True}, {"resume": "verify"}, {"overwrite": True}, {"region": (slice(0, 300),)}):
        report = save(session.store, **options)
        np.testing.assert_array_equal(report.array[:], image())
