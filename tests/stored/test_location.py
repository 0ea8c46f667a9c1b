"""Locations of arrays and indices, and the store that counts."""

import http.server
import threading

import numpy as np
import pytest
import zarr
from zarr.core.buffer import cpu
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath, ZipStore
from zarr.testing.store import StoreTests

from deepsic_codec import consolidate_labels, create_array, open_archive, open_labels
from deepsic_codec.errors import (
    ConfigurationError,
    LabelIndexError,
    MissingPackage,
    SourceError,
    UnsupportedArray,
    UnsupportedPayload,
    WriteError,
)
from deepsic_codec.io.export import export
from deepsic_codec.io.info import describe
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import (
    CONNECTIONS,
    Counter,
    CountingStore,
    IndexLocation,
    counting_array,
    fsspec_options,
    is_deepsic,
    is_in_group,
    open_node,
    parent_and_name,
    url_of,
)
from tests.common import check_rejects, photograph


class TestCountingStore(StoreTests[CountingStore, cpu.Buffer]):
    """Zarr's contract for stores."""

    store_cls = CountingStore
    buffer_cls = cpu.Buffer

    async def get(self, store, key):
        return self.buffer_cls.from_bytes((store.wrapped.root / key).read_bytes())

    async def set(self, store, key, value):
        path = store.wrapped.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.to_bytes())

    @pytest.fixture
    def store_kwargs(self, tmp_path):
        return {"store": LocalStore(tmp_path)}

    @pytest.fixture
    def open_kwargs(self, tmp_path):
        return {"store_cls": LocalStore, "root": tmp_path}

    @pytest.fixture
    def store(self, open_kwargs):
        return sync(self.store_cls.open(**open_kwargs))

    @pytest.fixture
    def store_not_open(self, store_kwargs):
        return self.store_cls(**store_kwargs)

    def test_store_repr(self, store):
        assert "LocalStore" in repr(store)

    def test_store_supports_writes(self, store):
        assert store.supports_writes

    def test_store_supports_listing(self, store):
        assert store.supports_listing


@pytest.fixture
def group(stub):
    store = MemoryStore()
    create_array(store, name="a/image", data=photograph(64, 64, 3), chunks=(64, 64, 3))
    zarr.open_group(store).create_array("other", shape=(3,), dtype="f4")
    return store


def test_reads_are_counted_in_requests_and_bytes(group):
    counter = Counter()
    array = zarr.open_array(group, path="a/image")
    values = sync(counting_array(array, counter).getitem(...))
    np.testing.assert_array_equal(values, array[...])
    stored = sync(group.getsize("a/image/c/0/0/0"))
    assert (counter.requests, counter.bytes) == (1, stored)
    again = counting_array(counting_array(array, counter), Counter())
    sync(again.getitem(...))
    assert counter.requests == 1, "an array that counts is not counted twice"


def test_opening_is_counted_and_reading_afterwards_is_not(group):
    counter = Counter()
    array = StoredArray.open(group, "a/image", counter=counter).array
    opened = counter.requests
    assert opened > 0 and counter.bytes > 0
    assert array[...].shape == (64, 64, 3) and array.store is group
    assert counter.requests == opened


def test_nodes_of_any_kind_of_source(group, tmp_path, stub):
    array = StoredArray.open(group).array
    assert array.path == "a/image" and is_deepsic(array)
    assert open_node(array) is array
    node = open_node(group)
    assert open_node(node, "other").path == "other" and not is_deepsic(node["other"]) and not is_deepsic(node)
    with ZipStore(tmp_path / "a.zip", mode="w") as store:
        create_array(store, name="image", data=photograph(8, 8, 3))
    assert StoredArray.open(tmp_path / "a.zip", "image").array.shape == (8, 8, 3)


def test_no_such_node(group, tmp_path):
    check_rejects(UnsupportedArray, "no array 'b'", open_node, group, "b")
    check_rejects(UnsupportedArray, "no array 'b'", open_node, open_node(group), "b")
    check_rejects(UnsupportedArray, "no array 'b'; it has a/image", open_node, open_node(group), "b")
    check_rejects(UnsupportedArray, "no array or group", open_node, tmp_path / "nothing")
    (tmp_path / "a.tif").touch()
    check_rejects(UnsupportedArray, "a.tif is a file|deepsic ingest", open_node, tmp_path / "a.tif")
    check_rejects(UnsupportedPayload, "not with DeepSIC", StoredArray.open, group, "other")
    create_array(group, name="b", data=photograph(8, 8, 3))
    check_rejects(UnsupportedArray, "a/image, b|pass name= for one of them", StoredArray.open, group)


def test_the_group_around_a_node(tmp_path):
    memory = MemoryStore()
    assert parent_and_name(StorePath(memory, "a/b/image")) == (StorePath(memory, "a/b"), "image")
    assert parent_and_name(StorePath(memory, "image")) == (StorePath(memory, ""), "image")
    assert parent_and_name(StorePath(memory)) == (None, "")
    parent, name = parent_and_name(StorePath(LocalStore(tmp_path / "image", read_only=True)))
    assert name == "image" and parent.store.root == tmp_path and parent.store.read_only
    parent, name = parent_and_name(StorePath(FsspecStore.from_url("memory://folder/image")))
    assert name == "image" and parent.store.path.strip("/") == "folder"
    assert parent_and_name(StorePath(FsspecStore.from_url("memory://image")))[0] is None


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_opened_by_its_own_path_is_in_a_group_if_there_is_one(tmp_path, zarr_format):
    path = StorePath(LocalStore(tmp_path / "image"))
    assert not is_in_group(path, zarr_format)
    zarr.open_group(tmp_path, mode="w", zarr_format=zarr_format)
    assert is_in_group(path, zarr_format)
    assert is_in_group(StorePath(MemoryStore(), "image"), zarr_format)
    assert not is_in_group(StorePath(MemoryStore()), zarr_format)


def test_index_locations(group, tmp_path):
    array = StoredArray.open(group).array
    location = IndexLocation.sibling_of(array, check=True)
    assert location == IndexLocation(group, "a/image_labels", 3)
    assert location.child("v") == IndexLocation(group, "a/image_labels/v", 3)
    assert IndexLocation(group, "", 3).child("v").path == "v" and location.key(".zattrs") == "a/image_labels/.zattrs"
    assert IndexLocation.from_user(open_node(group)["a"], 2) == IndexLocation(group, "a", 2)
    assert IndexLocation.from_user(StorePath(group, "b"), 3) == IndexLocation(group, "b", 3)
    assert IndexLocation.from_user(tmp_path / "index", 3, write=True).store == LocalStore(tmp_path / "index")
    check_rejects(LabelIndexError, "no label index", IndexLocation.from_user, tmp_path / "nothing", 3)


def test_an_array_at_the_root_has_no_location_for_an_index(stub):
    array = create_array(MemoryStore(), data=photograph(8, 8, 3))
    check_rejects(LabelIndexError, "root of its store|index=|scan=True", IndexLocation.sibling_of, array)


def test_many_requests_to_s3_at_once_unless_the_user_says_how_many():
    assert fsspec_options("s3://bucket/a", None) == {"config_kwargs": {"max_pool_connections": CONNECTIONS}}
    options = {"anon": True, "config_kwargs": {"max_pool_connections": 7}}
    assert fsspec_options("s3a://bucket/a", options) == options
    assert fsspec_options("file:///a", None) is None
    assert fsspec_options("gs://a", {"token": "x"}) == {"token": "x"}


def test_locations_are_shown_as_users_write_them(tmp_path):
    s3fs = pytest.importorskip("s3fs")
    bucket = FsspecStore(s3fs.S3FileSystem(asynchronous=True), path="bucket/a.zarr")
    assert url_of(StorePath(bucket, "image")) == "s3://bucket/a.zarr/image"
    assert url_of(StorePath(CountingStore(bucket), "")) == "s3://bucket/a.zarr"
    assert str(IndexLocation(bucket, "image_labels", 3)) == "s3://bucket/a.zarr/image_labels"
    assert url_of(StorePath(FsspecStore.from_url("memory://a/b"), "c")).startswith("memory://")
    assert url_of(StorePath(LocalStore(tmp_path), "a")) == f"{tmp_path}/a"


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(int(self.path.split("/")[1]))

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing():
    """Address of a server that answers each path with the status in front."""
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def check_names(url, read, write, words):
    """Whatever takes a URL names it in errors, of one kind where it reads and one where it writes."""
    picture = photograph(16, 16, 3)
    array = create_array({}, name="a", data=picture)
    for function in (open_archive, describe, open_labels, consolidate_labels):
        check_rejects(read, words, function, url)
    for function in (open_labels, consolidate_labels):
        check_rejects(read, words, function, array, index=url)
    check_rejects(write, words, create_array, url, data=picture)
    with pytest.raises((read, write), match=url):
        export(array, url)


@pytest.mark.parametrize("status", [403, 500])
def test_a_server_that_refuses_is_named(refusing, status):
    url = f"{refusing}/{status}/a.zarr"
    check_names(url, SourceError, WriteError, f"{url}|cannot be|check the address")


@pytest.mark.parametrize(
    ("url", "read", "write", "words"),
    [
        ("nosuch://bucket/a.zarr", ConfigurationError, ConfigurationError, "no file system"),
        ("missing://bucket/a.zarr", MissingPackage, MissingPackage, "pip install missingfs"),
        ("http://127.0.0.1:9/a.zarr", SourceError, WriteError, "check the address"),
    ],
)
def test_a_url_that_cannot_be_reached_is_named(url, read, write, words, monkeypatch):
    registry = pytest.importorskip("fsspec.registry")
    pytest.importorskip("aiohttp")
    about = {"class": "missing_package_of_a_test.FS", "err": "Please install missingfs to access it"}
    monkeypatch.setitem(registry.known_implementations, "missing", about)
    check_names(url, read, write, f"{url}|{words}")
