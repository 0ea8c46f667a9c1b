"""Arrays that replace others: the old one is there until the new one is complete."""

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from deepsic_codec import DeepSIC, create_array, open_archive, open_labels
from deepsic_codec.dask import open as open_dask
from deepsic_codec.dask import store
from deepsic_codec.errors import UnsupportedArray, WriteError
from tests.common import photograph

da = pytest.importorskip("dask.array")
fsspec = pytest.importorskip("fsspec")
pytestmark = pytest.mark.usefixtures("stub")

CHUNKS = (32, 32, 3)


def local(folder):
    return str(folder / "a.zarr")


def local_store(folder):
    return LocalStore(folder / "a.zarr")


def memory(folder):
    return MemoryStore()


def remote(folder):
    from zarr.storage import FsspecStore

    return FsspecStore.from_url(f"memory://{folder.name}")


LOCATIONS = [local, local_store, memory, remote]


@pytest.fixture(params=LOCATIONS, ids=lambda function: function.__name__)
def target(request, tmp_path):
    return request.param(tmp_path)


def image(seed=0, shape=(70, 90, 3)):
    return photograph(*shape, seed=seed)


def keys(target, path):
    prefix = f"{path}/" if path else ""
    return [key for key in _all_keys(target) if key.startswith(prefix)]


def _all_keys(target):
    from zarr.core.sync import sync

    async def collect(store):
        return [key async for key in store.list()]

    return sync(collect(LocalStore(target) if isinstance(target, str) else target))


@pytest.mark.parametrize("name", ["im", "group/im", None])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_can_be_made_from_the_one_that_it_replaces(target, name, zarr_format):
    options = {"name": name, "chunks": CHUNKS, "zarr_format": zarr_format}
    store(image(), target, codec=DeepSIC(quality=90), **options)
    other = (64, 64, 3)
    report = store(
        open_dask(target, name), target, codec=DeepSIC(quality=30), overwrite=True, **(options | {"chunks": other})
    )
    array = open_archive(target, name)
    np.testing.assert_array_equal(array[...], image())
    assert array.chunks == other and report.array.path == (name or "") and report.written == 4
    assert not [key for key in keys(target, name or "") if "deepsic-new" in key]
    if name:
        assert open_labels(target, name).index is not None


def test_create_array_from_itself(target):
    create_array(target, name="im", data=image(), chunks=CHUNKS)
    create_array(
        target, name="im", data=open_archive(target, "im"), chunks=CHUNKS, overwrite=True, codec=DeepSIC(quality=9)
    )
    array = open_archive(target, "im")
    np.testing.assert_array_equal(array[...], image())
    assert array.metadata.codecs[0].quality == 9


def test_a_source_that_fails_leaves_the_old_array_and_its_index(target):
    store(image(), target, name="im", chunks=CHUNKS)

    def fail(block):
        raise OSError("a damaged file")

    source = da.from_array(image(1), chunks=CHUNKS).map_blocks(fail, dtype="u1", meta=np.empty((0, 0, 0), "u1"))
    before = sorted(_all_keys(target))
    with pytest.raises(OSError, match="damaged"):
        store(source, target, name="im", chunks=CHUNKS, overwrite=True)
    assert sorted(_all_keys(target)) == before
    np.testing.assert_array_equal(open_archive(target, "im")[...], image())
    assert open_labels(target, "im").index is not None


def test_data_that_cannot_be_encoded_leave_the_old_array(target):
    values = image().astype("f4")
    codec = DeepSIC(value_range=(0, 255), nodata=-1)
    create_array(target, name="im", data=values, chunks=CHUNKS, codec=codec)
    values[50, 60] = np.nan
    before = sorted(_all_keys(target))
    with pytest.raises(UnsupportedArray):
        create_array(target, name="im", data=values, chunks=CHUNKS, codec=codec, overwrite=True)
    left = [key for key in sorted(_all_keys(target)) if "deepsic-new" not in key]  # of writes that were under way
    assert left == before
    np.testing.assert_allclose(open_archive(target, "im")[...], image(), atol=2)


def test_a_store_that_fails_leaves_the_old_array(tmp_path, monkeypatch):
    target = str(tmp_path / "a.zarr")
    store(image(), target, name="im", chunks=CHUNKS)
    write = LocalStore.set

    async def fail(self, key, value, **kwargs):
        if "/c/1/" in key:
            raise PermissionError("no space")
        await write(self, key, value, **kwargs)

    monkeypatch.setattr(LocalStore, "set", fail)
    with pytest.raises(WriteError, match="as it was"):
        store(image(1), target, name="im", chunks=CHUNKS, overwrite=True, retries=0)
    monkeypatch.setattr(LocalStore, "set", write)
    np.testing.assert_array_equal(open_archive(target, "im")[...], image())


def test_a_replacement_can_be_computed_later(tmp_path):
    target = str(tmp_path / "a.zarr")
    store(image(), target, name="im", chunks=CHUNKS)
    later = store(image(1), target, name="im", chunks=CHUNKS, overwrite=True, compute=False)
    np.testing.assert_array_equal(open_archive(target, "im")[...], image())
    assert {*zarr.open_group(target, mode="r").array_keys()} == {"im"}, "the new one is not seen"
    report = later.compute()
    np.testing.assert_array_equal(report.array[...], image(1))
    np.testing.assert_array_equal(open_archive(target, "im")[...], image(1))


def test_an_old_index_does_not_answer_for_a_new_array(tmp_path):
    target = str(tmp_path / "a.zarr")
    store(image(), target, name="im", chunks=CHUNKS)
    store(image(1), target, name="im", chunks=CHUNKS, overwrite=True, index=False)
    with pytest.raises(Exception, match="replaced"):
        open_labels(target, "im")


def test_what_an_interrupted_replacement_left_goes_with_the_next(tmp_path):
    target = str(tmp_path / "a.zarr")
    store(image(), target, name="im", chunks=CHUNKS)
    store(image(1), target, name="im", chunks=CHUNKS, overwrite=True, compute=False)  # and never computed
    store(image(2), target, name="im", chunks=CHUNKS, overwrite=True)
    assert not [key for key in _all_keys(target) if "deepsic-new" in key]
    np.testing.assert_array_equal(open_archive(target, "im")[...], image(2))
