"""References: other files' bytes as chunks of an array, which kerchunk, VirtualiZarr and Icechunk make and read."""

import fsspec
import numpy as np
import pytest
import zarr

from deepsic_codec import chunk_attrs, create_array
from tests.common import photograph

pytestmark = pytest.mark.usefixtures("stub")

IMAGE = photograph(70, 45, 3)


@pytest.fixture
def folder(tmp_path):
    for zarr_format in (2, 3):
        url = tmp_path / f"format{zarr_format}.zarr"
        create_array(url, name="image", data=IMAGE, chunks=(32, 32, 3), zarr_format=zarr_format)
    return tmp_path


def virtual(url):
    """A dataset of references to the chunks of an archive."""
    virtualizarr = pytest.importorskip("virtualizarr")
    pytest.importorskip("arro3.core")
    from obspec_utils.registry import ObjectStoreRegistry
    from obstore.store import LocalStore
    from virtualizarr.parsers import ZarrParser

    registry = ObjectStoreRegistry({"file://": LocalStore()})
    return virtualizarr.open_virtual_dataset(f"file://{url}", parser=ZarrParser(), registry=registry)


def referenced(references):
    """The group that references describe, and what of it was copied into them."""
    filesystem = fsspec.filesystem("reference", fo=references, asynchronous=True, remote_protocol="file")
    store = zarr.storage.FsspecStore(filesystem, read_only=True, path="")
    return zarr.open_group(store, mode="r", zarr_format=2)


def check(array):
    np.testing.assert_array_equal(array[...], IMAGE)
    np.testing.assert_array_equal(array[30:40, 20:40], IMAGE[30:40, 20:40])
    assert len(chunk_attrs(array, (1, 1, 0))["labels"]) == 1


def test_kerchunk(folder):
    kerchunk = pytest.importorskip("kerchunk.zarr")
    references = kerchunk.single_zarr(str(folder / "format2.zarr"), inline_threshold=0)
    array = referenced(references)["image"]
    check(array)
    places = [value for key, value in references["refs"].items() if key.startswith("image/") and "/." not in key]
    assert len(places) == 6 and all(str(folder) in str(place) for place in places)  # places, not contents


def test_virtualizarr(folder):
    dataset = virtual(folder / "format3.zarr")
    assert type(dataset["image"].data.metadata.codecs[0]).__name__ == "DeepSICCodec"
    manifest = dataset["image"].data.manifest.dict()
    assert len(manifest) == 6 and all(entry["length"] > 64 for entry in manifest.values())


def test_icechunk_references(folder):
    icechunk = pytest.importorskip("icechunk")
    prefix = f"file://{folder}/"
    config = icechunk.RepositoryConfig.default()
    files = icechunk.local_filesystem_store(str(folder))
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(prefix, files))
    credentials = getattr(icechunk, "credentials", None)  # None says "no secrets" before version 2
    access = {prefix: getattr(credentials, "LocalFileSystemAccess", None)}
    repository = icechunk.Repository.create(
        icechunk.in_memory_storage(), config=config, authorize_virtual_chunk_access=access
    )
    session = repository.writable_session("main")
    source = zarr.open_array(folder / "format3.zarr" / "image", mode="r")
    zarr.create_array(
        session.store,
        name="image",
        shape=source.shape,
        chunks=source.chunks,
        dtype="u1",
        fill_value=0,
        serializer=source.metadata.codecs[0],
        compressors=None,
        dimension_names=["y", "x", "c"],
        attributes=dict(source.attrs),
    )
    for index in np.ndindex(3, 2, 1):
        key = "image/c/" + "/".join(map(str, index))
        file = folder / "format3.zarr" / key
        session.store.set_virtual_ref(key, f"file://{file}", offset=0, length=file.stat().st_size)
    session.commit("references to chunks elsewhere")
    check(zarr.open_group(repository.readonly_session("main").store, mode="r")["image"])
