"""A model inside an archive: found by identity, verified, never replaced, readable with plain zarr."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ZipStore

from deepsic_codec import (
    DeepSIC,
    DeepSICCodec,
    chunk_attrs,
    config,
    consolidate_labels,
    create_array,
    decode_features,
    iter_chunk_attrs,
    open_archive,
    open_labels,
    relabel,
)
from deepsic_codec import dask as bulk
from deepsic_codec.errors import ConfigurationError, ModelMismatch, ModelNotFound
from deepsic_codec.model import file, scheduler, zoo
from deepsic_codec.stored import embedded
from tests.codec.test_entry_points import installed  # noqa: F401  # a fixture
from tests.common import check_lazy, check_rejects, photograph, run_python

IMAGE = photograph(70, 45, 3)


def _tiny_model(folder, **options):
    pytest.importorskip("torch")
    from benchmarks.fuzz import tiny_model

    return tiny_model(folder, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return _tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def uninstall(tiny, tmp_path, monkeypatch):
    """Install the model, and return a function that uninstalls it."""
    config.set(model_path=Path(tiny.path).parent, cache=tmp_path / "cache")

    def remove():
        config.set(model_path=())
        monkeypatch.setattr(scheduler, "_schedulers", {})
        with pytest.raises(ModelNotFound):
            zoo.find_model(tiny.decoder)

    return remove


def write(store, name="group/image", codec=None, **options):
    options = {"chunks": (32, 32, 3), "embed_model": True, **options}
    return create_array(
        store, name=name, data=IMAGE, codec=codec or DeepSIC(model="fuzz-tiny", transform="features"), **options
    )


def path_of(tiny):
    return embedded.array_name(tiny.decoder, tiny.head)


def test_named_by_identity(tiny, uninstall):
    store = {}
    z = write(store)
    stored = zarr.open_array(store, path=f"group/{path_of(tiny)}", mode="r")
    data = Path(tiny.path).read_bytes()
    assert path_of(tiny) == f"deepsic-model-{tiny.decoder[:16]}-{tiny.head[:8]}"
    assert stored[:].tobytes() == data and stored.dtype == np.uint8
    assert stored.attrs["deepsic_model"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert stored.attrs["deepsic_model"]["decoder"] == tiny.decoder
    write(store, "group/second")
    assert sum(name.startswith(embedded.PREFIX) for name in zarr.open_group(store, path="group")) == 1
    assert open_archive(store, "group/image").path == z.path


@pytest.mark.parametrize("kind", ["dict", "memory", "path", "zip", "fsspec", "url"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_read_without_the_installed_model(tiny, uninstall, tmp_path, kind, zarr_format):
    import fsspec

    url = f"memory://{tmp_path.name}-{zarr_format}/a.zarr"
    stores = {
        "dict": lambda: {},
        "memory": MemoryStore,
        "path": lambda: str(tmp_path / "a.zarr"),
        "zip": lambda: ZipStore(tmp_path / "a.zip", mode="w"),
        "fsspec": lambda: FsspecStore.from_url(url, storage_options={"asynchronous": True}),
        "url": lambda: url,
    }
    store = stores[kind]()
    expected = write(store, zarr_format=zarr_format)[...]
    if kind == "zip":
        store.close()
        store = ZipStore(tmp_path / "a.zip", mode="r")
    uninstall()
    z = open_archive(store, "group/image")
    np.testing.assert_array_equal(z[...], expected)
    np.testing.assert_array_equal(zarr.open_array(store, path="group/image", mode="r")[...], expected)
    assert "Class0" in z.attrs["deepsic"]["vocabulary"]["classes"] and chunk_attrs(z, (0, 0, 0))["labels"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"{tiny.decoder[:32]}-{tiny.head[:16]}.safetensors"]
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("options", [{"shards": (64, 64, 3)}, {}], ids=["shards", "chunks"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_shards_and_consolidated_metadata(tiny, uninstall, tmp_path, options, when):
    path = tmp_path / "a.zarr"
    if when == "before":
        create_array(path, name="other", data=IMAGE, codec=DeepSIC(model="fuzz-tiny", transform="features"))
        zarr.consolidate_metadata(path)
    expected = write(path, "image", **options)[...]
    if when == "after":
        zarr.consolidate_metadata(path)
        assert path_of(tiny) in zarr.open_group(path, mode="r", use_consolidated=True)
    uninstall()
    np.testing.assert_array_equal(open_archive(path / "image")[...], expected)
    assert (tmp_path / "cache").is_dir()


def test_opened_from_its_group_or_alone(tiny, uninstall, tmp_path):
    expected = write(tmp_path / "a.zarr", "image")[...]
    uninstall()
    np.testing.assert_array_equal(open_archive(tmp_path / "a.zarr")[...], expected)
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(open_archive(LocalStore(tmp_path / "a.zarr" / "image"))[...], expected)


def test_bulk_writer(tiny, uninstall):
    store = MemoryStore()
    report = bulk.store(
        IMAGE,
        store,
        name="image",
        codec=DeepSIC(model="fuzz-tiny", transform="features"),
        chunks=(32, 32, 3),
        embed_model=True,
    )
    bulk.store(IMAGE, store, name="image", embed_model=True, resume=True)
    expected = report.array[...]
    uninstall()
    np.testing.assert_array_equal(open_archive(store, "image")[...], expected)


def test_an_array_that_exists_can_be_given_its_model(tiny, uninstall):
    store = MemoryStore()
    report = bulk.store(IMAGE, store, name="image", codec=DeepSIC(model="fuzz-tiny", transform="features"))
    assert path_of(tiny) not in zarr.open_group(store)
    embedded.embed_model(report.array)
    assert path_of(tiny) in zarr.open_group(store)


def test_an_array_at_the_root_has_no_group_for_a_model(uninstall, tmp_path):
    for store in ({}, str(tmp_path / "a.zarr")):
        check_rejects(ConfigurationError, "embed_model|name", write, store, None)
    assert not (tmp_path / "a.zarr" / "zarr.json").exists(), "nothing was written"
    zarr.open_group(tmp_path / "group.zarr")
    assert len(list(write(tmp_path / "group.zarr" / "image", None).shape)) == 3, "a path in a group is a place"


def test_never_overwritten_by_another(tiny, uninstall):
    store = {}
    write(store)
    stored = zarr.open_array(store, path=f"group/{path_of(tiny)}")
    stored[:] = 7
    about = dict(stored.attrs["deepsic_model"])
    stored.attrs["deepsic_model"] = about | {"sha256": "0" * 64}
    check_rejects(ConfigurationError, "never overwritten", write, store, "group/second")
    assert (stored[:] == 7).all()


def test_one_for_all_encoders_of_a_decoder(tiny, uninstall, tmp_path):
    """What a group has embedded reads the chunks of any model of its decoder and head."""
    arrays = {k: v.copy() for k, v in file.load_arrays(tiny).items()}
    arrays["encoder.analysis.out.bias"] += 1000
    other = file.save_model(
        Path(tiny.path).parent / "other.safetensors", "other", arrays, tiny.architecture, tiny.vocabulary, {}
    )
    try:
        store = {}
        write(store)
        expected = write(store, "group/second", DeepSIC(model="other"))[...]
        assert (other.decoder, other.head) == (tiny.decoder, tiny.head)
        assert sum(name.startswith(embedded.PREFIX) for name in zarr.open_group(store, path="group")) == 1
        stored = zarr.open_array(store, path=f"group/{path_of(tiny)}")
        assert stored.attrs["deepsic_model"]["name"] == "fuzz-tiny"
    finally:
        Path(other.path).unlink()
    uninstall()
    np.testing.assert_array_equal(open_archive(store, "group/second")[...], expected)


def test_interrupted_writing_is_completed(tiny, uninstall, monkeypatch):
    store = {}
    with monkeypatch.context() as patch:
        assign = zarr.Array.__setitem__
        fail = lambda array, *args: 1 / 0 if embedded.PREFIX in array.path else assign(array, *args)  # noqa: E731
        patch.setattr(zarr.Array, "__setitem__", fail)
        with pytest.raises(ZeroDivisionError):
            write(store)
    stored = zarr.open_array(store, path=f"group/{path_of(tiny)}")
    assert not stored[:].any()
    write(store, "group/second")
    assert stored[:].tobytes() == Path(tiny.path).read_bytes()


@pytest.mark.parametrize("at", [-3, -20_000])
def test_a_damaged_model_is_not_embedded(at, tiny, uninstall, tmp_path, monkeypatch):
    broken = bytearray(Path(tiny.path).read_bytes())
    broken[at] ^= 1
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "m.safetensors").write_bytes(broken)
    config.set(model_path=folder)
    check_rejects(ModelMismatch, "damaged", write, {})


def flipped(data, at):
    data = data.copy()
    data[at] ^= 1
    return data


CRAFTED = {
    "a flipped bit": lambda data: {"data": flipped(data, -5)},
    "truncated": lambda data: {"data": data[:-100]},
    "longer": lambda data: {"data": np.append(data, data[:5])},
    "empty": lambda data: {"shape": (0,), "dtype": "u1", "chunks": (1,)},
    "nothing but fill": lambda data: {"shape": data.shape, "dtype": "u1"},
    "text": lambda data: {"data": np.frombuffer(b"not a model at all", "u1")},
    "two axes": lambda data: {"data": data[: data.size // 2 * 2].reshape(2, -1)},
    "another dtype": lambda data: {"data": data.astype("u2")},
    "huge": lambda data: {"shape": (1 << 40,), "dtype": "u1", "chunks": (1 << 20,)},
    "huge chunks": lambda data: {"shape": data.shape, "dtype": "u1", "chunks": (1 << 40,)},
    "just too large": lambda data: {"shape": (config.get().max_model_bytes + 1,), "dtype": "u1", "chunks": (1 << 20,)},
    "a byte a chunk": lambda data: {"shape": data.shape, "dtype": "u1", "chunks": (1,)},
    "compressed": lambda data: {"data": data, "compressors": "auto"},
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_arrays_are_refused(tiny, uninstall, tmp_path, name, zarr_format):
    store = {}
    write(store, embed_model=False, zarr_format=zarr_format)
    about = {"sha256": hashlib.sha256(Path(tiny.path).read_bytes()).hexdigest()}
    options = {"compressors": None, "attributes": {"deepsic_model": about}}
    options |= CRAFTED[name](np.fromfile(tiny.path, "u1"))
    zarr.create_array(store, name=f"group/{path_of(tiny)}", zarr_format=zarr_format, **options)
    uninstall()
    check_rejects(ModelMismatch, "", open_archive, store, "group/image")
    assert not list((tmp_path / "cache").glob("*")), "nothing is left behind"


def test_a_chunk_of_another_size_is_refused(tiny, uninstall):
    store = {}
    write(store)
    uninstall()
    key = next(key for key in store if key.startswith(f"group/{path_of(tiny)}/c/"))
    store[key] = store[key][:100]
    check_rejects(ModelMismatch, "damaged", open_archive, store, "group/image")


def test_a_group_with_the_name_is_refused(tiny, uninstall):
    store = {}
    write(store, embed_model=False)
    zarr.create_group(store, path=f"group/{path_of(tiny)}")
    check_rejects(ConfigurationError, "not this model", write, store, "group/second")
    uninstall()
    check_rejects(ModelMismatch, "expected an array", open_archive, store, "group/image")


def test_another_undamaged_model_under_the_name_is_refused(tiny, uninstall, tmp_path):
    other = _tiny_model(tmp_path, seed=1)
    store = {}
    write(store, embed_model=False)
    data = np.fromfile(other.path, "u1")
    attributes = {"deepsic_model": {"sha256": hashlib.sha256(data.tobytes()).hexdigest()}}
    zarr.create_array(store, name=f"group/{path_of(tiny)}", data=data, compressors=None, attributes=attributes)
    uninstall()
    check_rejects(ModelMismatch, f"{other.decoder}|{tiny.decoder}", open_archive, store, "group/image")


def test_embedded_models_are_not_found_by_name(tiny, uninstall):
    store = {}
    write(store)
    uninstall()
    open_archive(store, "group/image")
    assert zoo.find_model(tiny.decoder[:16]).head == tiny.head
    check_rejects(ModelNotFound, "'fuzz-tiny'", zoo.find_model, "fuzz-tiny")


def test_a_home_that_cannot_be_written_to(tiny, uninstall, tmp_path, monkeypatch):
    store = {}
    expected = write(store)[...]
    uninstall()
    (tmp_path / "file").write_text("no folder")
    config.set(cache=tmp_path / "file" / "cache")
    monkeypatch.setattr(zoo, "_added", [])
    np.testing.assert_array_equal(open_archive(store, "group/image")[...], expected)


def test_a_model_that_cannot_be_kept_leaves_nothing_behind(uninstall, tmp_path):
    write(tmp_path / "a.zarr")
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").touch()
    code = """
        import os, tempfile
        from deepsic_codec import open_archive
        assert open_archive({url!r}, "group/image")[0, 0].shape == (3,)
        assert [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("deepsic-models-")]
        if not os.fork():
            raise SystemExit
        os.wait()
        assert [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("deepsic-models-")]
    """.replace("{url!r}", repr(str(tmp_path / "a.zarr")))
    run_python(code, TMPDIR=str(tmp_path / "temporary"), DEEPSIC_CACHE=str(tmp_path / "file" / "cache"))
    assert not list((tmp_path / "temporary").iterdir())


def test_a_user_without_a_home(uninstall, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    store = {}
    expected = write(store)[...]
    uninstall()
    config.set(cache="~/cache", model_path="~/models")
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(zoo, "_added", [])
    np.testing.assert_array_equal(open_archive(store, "group/image")[...], expected)


@pytest.mark.parametrize("to", ["iter_arrays", "to_dask"])
def test_queries_fetch_it_when_they_decode(tiny, uninstall, tmp_path, to):
    path = tmp_path / "a.zarr"
    expected = write(path, "image")[...]
    consolidate_labels(path, "image")
    uninstall()
    labels = open_labels(path, "image")
    found = labels.where("Class0 >= 0 | ~Class0")
    assert found.count and not (tmp_path / "cache").exists(), "a query needs no model"
    array = next(found.iter_arrays()).array if to == "iter_arrays" else found.to_dask()[0].compute()
    np.testing.assert_array_equal(array, expected[found.regions[0]][: len(array)])
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_features_are_labelled_with_it(tiny, uninstall, tmp_path):
    path = tmp_path / "a.zarr"
    codec = DeepSIC(model="fuzz-tiny", semantics="post", transform="features")
    z = write(path, "image", codec)
    attrs, features = dict(iter_chunk_attrs(z)), decode_features(z).compute()
    uninstall()
    calls = {
        "relabel": lambda: relabel(path, name="image").summary(),
        "scan": lambda: open_labels(path, "image", scan=True).summary(),
        "attrs": lambda: dict(iter_chunk_attrs(zarr.open_array(path, path="image", mode="r"))),
        "one": lambda: chunk_attrs(zarr.open_array(path, path="image", mode="r"), (0, 0, 0)),
        "features": lambda: decode_features(zarr.open_array(path, path="image", mode="r")).compute(),
    }
    found = {}
    for name, call in calls.items():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        found[name] = call()
        assert (tmp_path / "cache").exists() == (name != "scan"), name
    assert found["relabel"]["features"] == len(attrs) and found["scan"]["unlabelled"] == len(attrs)
    assert found["attrs"] == attrs and found["one"] == attrs[0, 0, 0]
    np.testing.assert_array_equal(found["features"], features)


def test_vocabulary_of_an_array_that_zarr_created(tiny, uninstall, tmp_path):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path)
    z = group.create_array(
        "image",
        data=IMAGE,
        chunks=(32, 32, 3),
        compressors=None,
        serializer=DeepSICCodec(model="fuzz-tiny"),
    )
    embedded.embed_model(z)
    uninstall()
    assert "Class0" in open_labels(path, "image", scan=True).vocabulary.classes


def test_xarray_accessor(tiny, uninstall, tmp_path):
    xr = pytest.importorskip("xarray")
    import deepsic_codec.xarray  # noqa: F401

    path = tmp_path / "a.zarr"
    expected = write(path, "image", zarr_format=2)[...]
    consolidate_labels(path, "image")
    uninstall()
    opened = xr.open_zarr(path, consolidated=False, chunks=None)
    words = "deepsic_codec.open_archive(URL) once|xarray.open_zarr"
    check_rejects(ModelNotFound, words, lambda: opened["image"].values)
    found = opened["image"].deepsic.where("Class0 >= 0 | ~Class0")
    np.testing.assert_array_equal(next(found.iter_arrays()).array, expected[found.regions[0]])
    np.testing.assert_array_equal(xr.open_zarr(path, consolidated=False, chunks=None)["image"], expected)


def test_without_an_embedded_model_the_error_says_what_to_do(tiny, uninstall):
    store = {}
    write(store, embed_model=False)
    uninstall()
    z = open_archive(store, "group/image")
    assert chunk_attrs(z, (0, 0, 0))["labels"], "labels need no model"
    with pytest.raises(ModelNotFound, match="open_archive"):
        z[...]


def test_other_processes(tiny, uninstall, installed, tmp_path):  # noqa: F811
    path = tmp_path / "a.zarr"
    total = write(path)[...].sum(dtype="i8")
    uninstall()
    where = f"group/{path_of(tiny)}"
    plain = "import sys; sys.modules['deepsic_codec'] = None; import zarr, hashlib\n" + (
        f"print(hashlib.sha256(zarr.open_array({str(path)!r}, path={where!r}, mode='r')[:].tobytes()).hexdigest())"
    )
    assert run_python(plain).strip() == hashlib.sha256(Path(tiny.path).read_bytes()).hexdigest()
    environment = {"DEEPSIC_CACHE": str(tmp_path / "fresh"), "DEEPSIC_MODEL_PATH": ""}
    code = f"import zarr, deepsic_codec as d\nz = d.open_archive({str(path)!r}, 'group/image')\n"
    code += f"print(zarr.open({str(path)!r}, mode='r')['group/image'][...].sum(dtype='i8'))"
    assert run_python(code, installed, **environment).strip() == str(total)
    # and from then on without open_archive, in any process that has the cache folder
    code = f"import zarr; print(zarr.open({str(path)!r}, mode='r')['group/image'][...].sum(dtype='i8'))"
    assert run_python(code, installed, **environment).strip() == str(total)


def test_opening_imports_no_torch(tiny, uninstall, installed, tmp_path, monkeypatch):  # noqa: F811
    write(tmp_path / "a.zarr")
    uninstall()
    check_lazy(f"import deepsic_codec as d; d.open_archive({str(tmp_path / 'a.zarr')!r}, 'group/image')", installed)


def test_metadata_is_plain(tiny, uninstall, tmp_path):
    for zarr_format, name in ((2, ".zattrs"), (3, "zarr.json")):
        path = tmp_path / f"{zarr_format}.zarr"
        write(path, zarr_format=zarr_format)
        text = json.loads((path / "group" / path_of(tiny) / name).read_text())
        about = text if zarr_format == 2 else text["attributes"]
        assert about["deepsic_model"]["format"] == "safetensors" and str(tmp_path) not in json.dumps(text)
