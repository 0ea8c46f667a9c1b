"""Embeddings of tiles are the same from the index, from the sections of chunks, and computed again."""

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, consolidate_labels, create_array, open_labels, relabel
from deepsic_codec.dask import store as dask_store
from deepsic_codec.errors import ConfigurationError, LabelIndexError
from deepsic_codec.labels.embeddings import chunk_embeddings, embed_image, read_embeddings
from deepsic_codec.stored.array import StoredArray
from tests import stub_runtime
from tests.common import check_rejects


def scene():
    """Three bands of brightness, 64 pixels wide each: 20, 120, 240."""
    return np.repeat(np.repeat([20, 120, 240], 64)[None, :, None], 128, 0).repeat(3, 2).astype("u1")


def vectors(levels):
    """What the stub's head says of cells of such brightness."""
    return np.array([[level - 128, 128 - level, 100, -100] for level in levels]).clip(-127, 127)


def archive(zarr_format=3, data=True, **options):
    store = zarr.storage.MemoryStore()
    zarr.open_group(store, zarr_format=zarr_format)
    codec = DeepSIC(label_tile=64, **{"embedding": True, **options})
    array = create_array(
        store, name="img", shape=(128, 192, 3), dtype="u1", chunks=(64, 128, 3), codec=codec, zarr_format=zarr_format
    )
    if data:
        array[:] = scene()
    return array


EXPECTED = np.broadcast_to(vectors([20, 120, 240])[None, :, None], (2, 3, 1, 4))


@pytest.mark.parametrize("transform", ["features", "wavelet"])
@pytest.mark.parametrize("semantics", ["pre", "post"])
def test_sections(stub, transform, semantics):
    array = archive(semantics=semantics, transform=transform)
    labels = consolidate_labels(array)
    np.testing.assert_array_equal(read_embeddings(labels), EXPECTED if semantics == "pre" else 0 * EXPECTED)
    pairs = list(chunk_embeddings(StoredArray(array), np.ndindex(2, 2, 1)))
    assert [position for position, _ in pairs] == list(np.ndindex(2, 2, 1))
    np.testing.assert_array_equal(pairs[0][1], np.moveaxis(EXPECTED[:1, :2], -1, 0))
    np.testing.assert_array_equal(pairs[1][1], np.moveaxis(EXPECTED[:1, 2:], -1, 0))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_index(stub, zarr_format):
    array = archive(zarr_format)
    np.testing.assert_array_equal(read_embeddings(open_labels(array, scan=True)), EXPECTED)
    labels = consolidate_labels(array)
    assert labels.index.values == 4 and labels.index.group["embeddings"].shape == (2, 3, 1, 4)
    np.testing.assert_array_equal(read_embeddings(open_labels(array)), EXPECTED)
    array[:64, :128] = 0  # missing from now on
    array[64:, :128] = 30
    expected = EXPECTED.copy()
    expected[0, :2], expected[1, :2] = 0, vectors([30])[0]
    np.testing.assert_array_equal(read_embeddings(consolidate_labels(array)), expected)


def test_bulk_write(stub):
    import dask.array

    array = archive(data=False)
    dask_store(dask.array.from_array(scene(), chunks=(64, 128, 3)), array, index=True)
    np.testing.assert_array_equal(read_embeddings(open_labels(array)), EXPECTED)


def test_relabelling_computes_them_and_consolidating_keeps_them(stub):
    array = archive(embedding=False)
    labels = consolidate_labels(array)
    assert not labels.index.values
    check_rejects(LabelIndexError, "compute=True|relabel", read_embeddings, labels)
    np.testing.assert_array_equal(read_embeddings(labels, compute=True), EXPECTED)
    np.testing.assert_array_equal(read_embeddings(relabel(array)), EXPECTED)
    array[64:, 128:] = 30
    expected = EXPECTED.copy()
    expected[1, 2] = 0  # the new chunk stores none
    np.testing.assert_array_equal(read_embeddings(consolidate_labels(array)), expected)


def test_tiles_without_data(stub):
    array = archive(nodata=7)
    array[:64, :64], array[64:, 128:] = 7, 7
    expected = EXPECTED.copy()
    expected[0, 0], expected[1, 2] = 0, 0
    np.testing.assert_array_equal(read_embeddings(consolidate_labels(array)), expected)


def test_image(stub):
    info = stub_runtime.MODELS[0]
    np.testing.assert_array_equal(embed_image(scene(), info), EXPECTED[:, :, 0])
    np.testing.assert_array_equal(embed_image(scene()[..., 0], info), EXPECTED[:, :, 0])
    whole = embed_image(scene(), info, tile=(128, 192))
    np.testing.assert_array_equal(whole, np.floor(vectors([20, 120, 240]).mean(0) + 0.5)[None, None])
    for bad in (scene().astype("f4"), scene()[..., :2], scene()[:0]):
        check_rejects(ConfigurationError, "image: expected uint8", embed_image, bad, info)


def test_chunks_of_other_heads_are_refused(stub):
    array = archive()
    other = archive(model="other")
    other.store_path.store._store_dict.update(
        {k: v for k, v in array.store_path.store._store_dict.items() if k.endswith("c/0/0/0")}
    )
    read = lambda: list(chunk_embeddings(StoredArray(other), [(0, 0, 0)]))  # noqa: E731
    check_rejects(LabelIndexError, "head cdcdcdcd|write the chunk again", read)


def test_wrong_parameters():
    check_rejects(ConfigurationError, "embedding", DeepSIC, embedding=1)
    check_rejects(ConfigurationError, "semantics='none'", DeepSIC, embedding=True, semantics="none")


def test_damaged_index(stub):
    array = archive()
    labels = consolidate_labels(array)
    labels.index.values = 5
    check_rejects(
        LabelIndexError, "embeddings is int8 (2, 3, 1, 4), expected int8 (2, 3, 1, 5)", read_embeddings, labels
    )
