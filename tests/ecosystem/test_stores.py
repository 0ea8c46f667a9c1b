"""Every kind of store that Zarr has: pixels, and headers read by range."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zarr
from packaging.version import Version
from zarr.abc.store import RangeByteRequest, Store

from deepsic_codec import chunk_attrs, consolidate_labels, create_array, open_labels
from tests.common import photograph

pytestmark = pytest.mark.usefixtures("stub")

IMAGE = photograph(200, 130, 3)


def memory(folder):
    return zarr.storage.MemoryStore()


def local(folder):
    return zarr.storage.LocalStore(folder / "archive.zarr")


def zipped(folder):
    return zarr.storage.ZipStore(folder / "archive.zip", mode="w")


def over_fsspec(folder):
    return zarr.storage.FsspecStore.from_url(f"memory://{folder.name}")


def over_obstore(folder):
    store = pytest.importorskip("obstore.store")
    if Version(zarr.__version__) < Version("3.1"):
        pytest.skip("ObjectStore of zarr 3.0 raises for deleting a key that is not there")
    return zarr.storage.ObjectStore(store.LocalStore(folder))


def over_icechunk(folder):
    icechunk = pytest.importorskip("icechunk")
    return icechunk.Repository.create(icechunk.in_memory_storage()).writable_session("main").store


class Case(NamedTuple):
    """How to make a kind of store in a folder, and the Zarr formats that it can hold."""

    make: Callable[[Path], Store]
    formats: tuple[int, ...] = (2, 3)


STORES = {
    "memory": Case(memory),
    "local": Case(local),
    "zip": Case(zipped),
    "fsspec": Case(over_fsspec),
    "obstore": Case(over_obstore),
    "icechunk": Case(over_icechunk, formats=(3,)),
}
FORMATS = [(name, number) for name, case in STORES.items() for number in case.formats]


@pytest.mark.filterwarnings("ignore:Duplicate name")  # a zip file keeps what is overwritten
@pytest.mark.parametrize(("name", "zarr_format"), FORMATS)
def test_pixels_and_labels(name, zarr_format, tmp_path):
    store = STORES[name].make(tmp_path)
    z = create_array(store, name="image", data=IMAGE, chunks=(64, 64, 3), zarr_format=zarr_format)
    again = zarr.open_group(store, mode="r+")["image"]
    np.testing.assert_array_equal(again[...], IMAGE)
    np.testing.assert_array_equal(again[100:, :70], IMAGE[100:, :70])
    assert chunk_attrs(again, (3, 2, 0))["labels"] == chunk_attrs(z, (3, 2, 0))["labels"] != []
    consolidate_labels(again)
    assert open_labels(again).where("Bright | Dim | Dark").count == 12
    assert chunk_attrs(create_array(store, name="empty", shape=IMAGE.shape, dtype="u1"), (0, 0, 0))["labels"] == []


@pytest.mark.parametrize("name", [name for name, number in FORMATS if number == 3])
def test_shards(name, tmp_path):
    store = STORES[name].make(tmp_path)
    create_array(store, name="image", data=IMAGE, chunks=(32, 32, 3), shards=(128, 128, 3))
    again = zarr.open_group(store, mode="r+")["image"]
    np.testing.assert_array_equal(again[90:150, 20:], IMAGE[90:150, 20:])
    assert len(chunk_attrs(again, (3, 2, 0))["labels"]) == 1


def test_a_commit_of_icechunk_has_image_and_labels(tmp_path):
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))
    session = repository.writable_session("main")
    z = create_array(session.store, name="image", data=IMAGE, chunks=(64, 64, 3))
    consolidate_labels(z)
    first = session.commit("image and labels")
    session = repository.writable_session("main")
    zarr.open_group(session.store, mode="r+")["image"][...] = 255
    session.commit("painted over")
    old = zarr.open_group(repository.readonly_session(snapshot_id=first).store, mode="r")["image"]
    np.testing.assert_array_equal(old[...], IMAGE)
    assert open_labels(old).where("Bright | Dim | Dark", verify=None).count == 12
    assert (zarr.open_group(repository.readonly_session("main").store, mode="r")["image"][...] == 255).all()


class Strict(zarr.storage.WrapperStore):
    """A store that refuses ranges beyond the end of a value, as Icechunk 2 does."""

    async def get(self, key, prototype, byte_range=None):
        value = await self._store.get(key, prototype)
        if value is not None and isinstance(byte_range, RangeByteRequest) and byte_range.end > len(value):
            raise ValueError(f"byte range {byte_range} is out of bounds for chunk of length {len(value)}")
        return await self._store.get(key, prototype, byte_range)


@pytest.mark.parametrize("shards", [None, (128, 128, 3)])
def test_a_store_that_refuses_ranges_beyond_the_end(shards):
    store = zarr.storage.MemoryStore()
    z = create_array(store, name="image", shape=IMAGE.shape, dtype="u1", chunks=(64, 64, 3), shards=shards)
    z[:] = 200  # payloads of less than the 256 bytes that are asked for
    strict = zarr.open_group(Strict(store), mode="r")["image"]
    assert chunk_attrs(strict, (1, 1, 0)) == chunk_attrs(z, (1, 1, 0))
    assert chunk_attrs(strict, (1, 1, 0))["nbytes"] < 256
    consolidate_labels(z)
    assert open_labels(strict).where("Bright").count == 6  # the others are mostly padding, which is black


def test_other_errors_of_a_store_are_not_hidden():
    class Broken(zarr.storage.WrapperStore):
        async def get(self, key, prototype, byte_range=None):
            if "/c/" in key:
                raise OSError("the disk is gone")
            return await self._store.get(key, prototype, byte_range)

    store = zarr.storage.MemoryStore()
    create_array(store, name="image", data=IMAGE, chunks=(64, 64, 3))
    with pytest.raises(OSError, match="the disk is gone"):
        chunk_attrs(zarr.open_group(Broken(store), mode="r")["image"], (0, 0, 0))
