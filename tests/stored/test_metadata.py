"""One value of the metadata of an archive is changed: opening, reading, queries and descriptions raise typed errors."""

import json

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from benchmarks.strangers import (
    changed_store,
    documents,
    random_metadata,
    random_names,
    run_metadata,
    run_names,
    with_array,
    with_value,
)
from deepsic_codec import consolidate_labels, create_array, open_archive, open_labels
from deepsic_codec.errors import LabelIndexError, UnsupportedArray
from deepsic_codec.stored.array import StoredArray
from tests.common import check_rejects, photograph

pytestmark = [pytest.mark.usefixtures("stub"), pytest.mark.filterwarnings("ignore")]

IMAGE = photograph(96, 64, 3)


def archive(zarr_format):
    store = MemoryStore()
    zarr.open_group(store, zarr_format=zarr_format)
    create_array(store, name="image", data=IMAGE, chunks=(64, 64, 3), zarr_format=zarr_format)
    consolidate_labels(store, "image")
    return store


def sound(store):
    assert run_metadata(store) == {}
    return store


@pytest.mark.parametrize("keys", ["image/", "_labels/"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_one_value_is_changed(zarr_format, keys):
    store, rng = sound(archive(zarr_format)), np.random.default_rng(zarr_format)
    for _ in range(12):
        errors = run_metadata(random_metadata(rng, store, keys))
        assert not errors, errors


@pytest.mark.parametrize(
    "zarr_format, name, path, value",
    [
        (2, "image/.zattrs", (), 0.5),
        (3, "image/zarr.json", ("attributes",), 3),
        (2, "image/.zattrs", ("_ARRAY_DIMENSIONS",), 1 << 64),
        (2, "image/.zattrs", ("_ARRAY_DIMENSIONS",), "x"),
        (2, "image/.zarray", ("chunks", 0), 0),
        (2, "image/.zarray", ("chunks", 2), 1 << 64),
        (3, "image/zarr.json", ("shape", 2), 1 << 64),
        (3, "image/zarr.json", ("codecs", 0, "configuration"), []),
        (2, "chunk_scores/.zarray", ("chunks", 2), 3),
        (2, "source/.zarray", ("filters",), {"x": 1}),
        (2, "source/.zarray", ("shape", 0), 0),
        (2, "source/.zarray", ("compressor",), {"id": {}}),
        (2, "image_labels/.zattrs", (), 1),
    ],
)
def test_values_that_led_to_other_errors(zarr_format, name, path, value):
    store = archive(zarr_format)
    (key,) = [key for key in documents(store) if key.endswith(name)]
    store = changed_store(store, key, with_value(documents(store)[key], path, value))
    for consolidated in [key for key in documents(store) if key.endswith(".zmetadata")]:
        del store._store_dict[consolidated]
    assert run_metadata(store) == {}


def test_a_damaged_document_is_named():
    store = archive(3)
    store._store_dict["image/zarr.json"] = changed_store(store, "image/zarr.json", [])._store_dict["image/zarr.json"]
    check_rejects(UnsupportedArray, "image|cannot be read", open_archive, store, "image")


def test_names_of_files():
    rng = np.random.default_rng(0)
    assert {run_names(random_names(rng)) for _ in range(100)} == {"named"}


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_damaged_chunks_of_an_index(zarr_format):
    store = archive(zarr_format)
    for key, value in store._store_dict.items():
        if key.startswith("image_labels/") and key not in documents(store):
            store._store_dict[key] = type(value).from_bytes(b"x" * 40)
    assert run_metadata(store) == {}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "name, shape, dtype, fault",
    [
        ("crc", None, "u4", "crc"),
        ("crc", (2, 1, 1), "i8", "crc is int64"),
        ("chunk_scores", (2, 1, 1), "u1", "chunk_scores is uint8"),
        ("source", (2, 1, 1), "f4", "source is float32"),
        ("source", (2, 1, 1), "u1", "source 9, expected less than 4"),
    ],
)
def test_arrays_that_are_none_of_an_index(zarr_format, name, shape, dtype, fault):
    change = {"member": name}
    if shape is not None:
        values = np.full(shape, 9, dtype).tobytes().hex()
        change |= {"shape": shape, "chunks": shape, "dtype": dtype, "values": values}
    store = with_array(archive(zarr_format), change)

    def use():
        labels = open_labels(store, "image")
        return labels.where("unknown", verify="all").count, labels.rewritten(), labels.summary()

    check_rejects(LabelIndexError, fault, use)
    consolidate_labels(store, "image")
    assert use()[2]["chunks"] == 2


def test_an_array_whose_metadata_is_damaged_after_it_was_opened(tmp_path):
    """Its fingerprint is read anew."""
    array = create_array(tmp_path / "a.zarr", data=photograph(20, 20, 3))
    path = tmp_path / "a.zarr" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"storage_transformers": {"x": 1}}))
    check_rejects(UnsupportedArray, "metadata", StoredArray(array).fingerprint, fresh=True)
