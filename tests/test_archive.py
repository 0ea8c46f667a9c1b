import json
import pickle
import re

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from deepsic_codec import DeepSIC, DeepSICCodec, chunk_attrs, create_array, errors, open_archive
from deepsic_codec._compat import sync
from deepsic_codec.stored.array import StoredArray
from tests import stub_runtime
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")

UINT8 = {"shape": (40, 40, 3), "dtype": "u1", "chunks": (16, 16, 3)}
LABELS = {"Dark": 200, "Dim": 10, "Bright": 10, "unknown": 10}


class CountingStore(zarr.storage.WrapperStore):
    """Remembers what is read."""

    def __init__(self, store):
        super().__init__(store)
        self.reads = []

    async def get(self, key, prototype, byte_range=None):
        data = await super().get(key, prototype, byte_range)
        self.reads.append((key, None if data is None else len(data)))
        return data


def scene():
    """128 x 192 x 3: left third dark, middle dim, right bright."""
    array = np.empty((128, 192, 3), "u1")
    array[:, :64], array[:, 64:128], array[:, 128:] = 20, 120, 240
    return array


def best(tiles):
    return [next(iter(tile), None) for tile in tiles]


# create_array


def test_masked_values_are_refused(tmp_path):
    """Their mask would be lost."""
    values = np.ma.masked_array(photograph(40, 40, 3), mask=False)
    array = create_array(zarr.storage.MemoryStore(), data=values, chunks=(16, 16, 3))
    np.testing.assert_array_equal(array[...], values.data)
    values[3, 4] = np.ma.masked
    check_rejects(errors.UnsupportedArray, "masked|filled", create_array, tmp_path / "a.zarr", data=values)
    bulk = pytest.importorskip("deepsic_codec.dask")
    check_rejects(errors.UnsupportedArray, "masked|filled", bulk.store, values, tmp_path / "a.zarr", name="a")
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("bands, expected", [(3, 3), (256, 256), (285, 95), (300, 150), (512, 256), (257, 1)])
def test_default_chunks_of_any_number_of_bands(bands, expected):
    array = create_array(zarr.storage.MemoryStore(), shape=(20, 20, bands), dtype="u2")
    assert array.chunks == (20, 20, expected)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", [DeepSIC, DeepSICCodec])
@pytest.mark.parametrize("name", [None, "img", "a/b/img"])
def test_create(zarr_format, kind, name):
    store = zarr.storage.MemoryStore()
    z = create_array(store, name=name, **UINT8, codec=kind(quality=20), zarr_format=zarr_format, fill_value=7)
    array = photograph(40, 40, 3)
    z[...] = array
    again = zarr.open(store, path=name or "", mode="r")
    assert again.metadata.zarr_format == zarr_format and again.fill_value == 7
    np.testing.assert_array_equal(again[...], array)
    codecs = [again.metadata.compressor] if zarr_format == 2 else again.metadata.codecs
    assert list(codecs) == [(DeepSIC if zarr_format == 2 else DeepSICCodec)(quality=20).resolved()]
    assert chunk_attrs(again, (1, 2, 0))["quality"] == 20


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_vocabulary_and_dimensions_are_attributes(zarr_format):
    z = create_array({}, **UINT8, zarr_format=zarr_format, attributes={"a": 1, "deepsic": {"b": 2}})
    assert z.attrs["a"] == 1
    about = z.attrs["deepsic"]
    assert re.fullmatch("[0-9a-f]{32}", about.pop("id"))
    assert about == {
        "b": 2,
        "vocabulary": {
            "head": "cd" * 32,
            "classes": ["Dark", "Dim", "Bright"],
            "parents": {"Visible": ["Dim", "Bright"]},
        },
    }
    names = z.attrs["_ARRAY_DIMENSIONS"] if zarr_format == 2 else z.metadata.dimension_names
    assert tuple(names) == ("y", "x", "c")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_callers_attributes_stay_as_they_are(zarr_format):
    attributes = {"a": 1, "deepsic": {"b": 2}}
    create_array({}, **UINT8, zarr_format=zarr_format, attributes=attributes)
    assert attributes == {"a": 1, "deepsic": {"b": 2}}


def test_dimension_names_can_be_passed():
    assert create_array({}, **UINT8, dimension_names=("a", "b", None)).metadata.dimension_names == ("a", "b", None)
    z = create_array({}, **UINT8, zarr_format=2, dimension_names=("a", "b", "c"))
    assert z.attrs["_ARRAY_DIMENSIONS"] == ["a", "b", "c"]


def test_data():
    array = photograph(40, 40, 3)
    for zarr_format in (2, 3):
        z = create_array({}, data=array, chunks=(16, 16, 3), zarr_format=zarr_format)
        np.testing.assert_array_equal(z[...], array)


@pytest.mark.parametrize(
    "axes,shape,chunks",
    [
        ("yxc", (1000, 700, 3), (512, 512, 3)),
        ("tcyx", (9, 3, 100, 2000), (1, 3, 100, 512)),
        ("xy", (5, 6), (5, 6)),
        ("yxc", (0, 700, 3), (1, 512, 3)),
    ],
)
def test_automatic_chunks(axes, shape, chunks):
    assert create_array({}, shape=shape, dtype="u1", codec=DeepSIC(axes=axes)).chunks == chunks


def test_shards():
    array = photograph(100, 70, 3)
    z = create_array({}, shape=array.shape, dtype="u1", chunks=(16, 32, 3), shards=(64, 64, 3))
    z[...] = array
    np.testing.assert_array_equal(z[...], array)
    assert z.shards == (64, 64, 3)


@pytest.mark.parametrize("bands, edge", [(1, 512), (64, 512), (65, 256), (256, 256), (198, 256)])
def test_chunks_of_many_bands_are_smaller(bands, edge):
    array = create_array({}, shape=(2000, 2000, bands), dtype="u2", codec=DeepSIC(max_error=0))
    assert array.chunks == (edge, edge, bands)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "change,words",
    [
        ({"dtype": "c8"}, "complex64"),
        ({"dtype": "f2"}, "float16"),
        ({"shape": (40, 40), "chunks": (16, 16), "codec": DeepSIC()}, "2 axes|'yxc'|'yx'"),
        ({"shape": (3, 512, 512), "chunks": (3, 128, 128)}, "axes='yxc'|axes='cyx'"),
        ({"dimension_names": ("band", "y", "x"), "codec": DeepSIC()}, "band, y, x|axes='cyx'"),
        ({"shape": (2, 40, 40, 3), "chunks": (1, 16, 16, 3)}, "4 axes|'tyxc'|'tcyx'"),
        ({"shape": 40, "chunks": 16}, "1 axes"),
        ({"chunks": (16, 16)}, "2 axes"),
        ({"chunks": (16, 16, 2)}, "3 bands|chunks of 2 bands"),
        ({"shape": (40, 40, 257), "chunks": (16, 16, 257)}, "257 bands|256"),
        ({"shape": (40, 40, 4)}, "4 bands|3"),
        ({"shape": (40, 40, 300), "chunks": (16, 16, 300)}, "300 bands"),
        ({"chunks": (1 << 16, 1 << 15, 3)}, "samples"),
    ],
    ids=str,
)
def test_unsupported_arrays_leave_nothing_behind(zarr_format, change, words):
    store = {}
    check_rejects(
        errors.UnsupportedArray, words, create_array, store, name="x", zarr_format=zarr_format, **(UINT8 | change)
    )
    assert not store


@pytest.mark.parametrize(
    "change,words",
    [
        ({"codec": "deepsic"}, "codec"),
        ({"compressors": zarr.codecs.ZstdCodec()}, "compressors"),
        ({"compressor": 3}, "compressor"),
        ({"filters": [1]}, "filters"),
        ({"serializer": DeepSICCodec}, "serializer"),
        ({"zarr_format": 4}, "zarr_format"),
        ({"zarr_format": 2, "shards": (32, 32, 3)}, "shards|format 2"),
        ({"chunks": "big"}, "chunks"),
    ],
    ids=str,
)
def test_wrong_arguments(change, words):
    store = {}
    check_rejects(errors.ConfigurationError, words, create_array, store, **(UINT8 | change))
    assert not store


def test_missing_arguments():
    check_rejects(TypeError, "shape", create_array, {}, dtype="u1")
    check_rejects(TypeError, "shape", create_array, {}, shape=(1, 1, 3))


def test_missing_model_leaves_nothing_behind():
    store = {}
    codec = DeepSIC(model="lost", decoder="77" * 32)
    check_rejects(errors.ModelNotFound, "7777", create_array, store, codec=codec, **UINT8)
    assert not store


# open_archive


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_open(tmp_path, zarr_format):
    create_array(tmp_path / "one", **UINT8, zarr_format=zarr_format)
    create_array(tmp_path / "many", name="a/img", **UINT8, zarr_format=zarr_format)
    group = zarr.open_group(tmp_path / "many", mode="a")
    assert group.metadata.zarr_format == zarr_format
    group.create_array("other", shape=(3,), dtype="f4")
    assert open_archive(str(tmp_path / "one")).path == ""
    assert open_archive(tmp_path / "many").path == "a/img"
    assert open_archive(tmp_path / "many", "a/img").read_only
    check_rejects(errors.UnsupportedArray, "no array 'b'", open_archive, tmp_path / "many", "b")
    check_rejects(errors.UnsupportedPayload, "other|not with DeepSIC", open_archive, tmp_path / "many", "other")
    check_rejects(errors.UnsupportedPayload, "not with DeepSIC", open_archive, tmp_path / "many" / "other")
    check_rejects(errors.UnsupportedArray, "no array 'img'", open_archive, tmp_path / "one", "img")
    check_rejects(errors.UnsupportedArray, "no array or group", open_archive, tmp_path / "none")
    create_array(tmp_path / "many", name="b", **UINT8, zarr_format=zarr_format)
    check_rejects(errors.UnsupportedArray, "a/img, b", open_archive, tmp_path / "many")
    open_archive(tmp_path / "many", "b", mode="r+")[...] = 1
    check_rejects(
        errors.UnsupportedArray, "no array stored with DeepSIC", open_archive, zarr.open_group({}, mode="w").store
    )


# chunk_attrs


@pytest.mark.parametrize("name", [None, "img", "a/b/img"])
@pytest.mark.parametrize("arguments", [{"zarr_format": 2}, {}, {"shards": (128, 384, 3)}], ids=str)
def test_attrs(arguments, name):
    store = CountingStore(zarr.storage.MemoryStore())
    z = create_array(store, name=name, shape=(128, 192, 3), dtype="u1", chunks=(128, 192, 3), **arguments)
    z[...] = scene()
    store.reads.clear()
    attrs = chunk_attrs(z, (0, 0, 0))
    payload = DeepSIC().encode(scene())
    assert json.loads(json.dumps(attrs)) == attrs
    labels = attrs.pop("labels")
    assert attrs == {
        "tile_shape": [64, 64],
        "model": "base",
        "quality": 50,
        "nbytes": len(payload),
        "bpp": 8 * len(payload) / (128 * 192),
        "quality_map": None,
        "format_version": 1,
    }
    assert best(labels) == ["Dark", "Dim", "Bright"] * 2
    assert labels[1] == {"Dim": 0.7843, "Dark": 0.0392, "Bright": 0.0392, "unknown": 0.0392}
    assert list(labels[1]) == ["Dim", "Dark", "Bright", "unknown"]
    assert len(store.reads) == (2 if "shards" in arguments else 1), store.reads
    assert max(size for _, size in store.reads) <= 256


@pytest.mark.parametrize("codecs", [None, [Crc32cCodec()]])
@pytest.mark.parametrize("location", ["start", "end"])
def test_attrs_in_shards(location, codecs):
    z = zarr.create_array(
        {},
        shape=(256, 320, 3),
        dtype="u1",
        chunks=(64, 64, 3),
        serializer=DeepSICCodec(),
        compressors=codecs,
        shards={"shape": (128, 192, 3), "index_location": location},
    )
    assert chunk_attrs(z, (3, 4, 0)) == chunk_attrs(z, (0, 0, 0))
    z[:, 128:256], z[64:128, :64] = 240, 120
    found = {index: best(chunk_attrs(z, index)["labels"]) for index in np.ndindex(4, 5, 1)}
    expected = {index: [] for index in found}
    expected |= {(y, x, 0): ["Bright"] for y in range(4) for x in (2, 3)} | {(1, 0, 0): ["Dim"]}
    assert found == expected


def test_damaged_shard_index():
    store = {}
    z = create_array(store, shape=(64, 64, 3), dtype="u1", chunks=(32, 32, 3), shards=(64, 64, 3))
    z[...] = 100
    for change in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[-9:]):
        store["c/0/0/0"] = type(store["c/0/0/0"]).from_bytes(change(store["c/0/0/0"].to_bytes()))
        check_rejects(errors.CorruptPayload, "(0, 0, 0)|index", chunk_attrs, z, (1, 1, 0))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_slices_come_first(zarr_format):
    array = np.stack([scene() // 20, scene()]).transpose(1, 0, 3, 2)
    z = create_array({}, data=array, chunks=(128, 2, 3, 128), codec=DeepSIC(axes="ytcx"), zarr_format=zarr_format)
    assert best(chunk_attrs(z, (0, 0, 0, 0))["labels"]) == ["Dark"] * 4 + ["Dark", "Dim"] * 2
    assert best(chunk_attrs(z, (0, 0, 0, 1))["labels"]) == ["Dark", None] * 2 + ["Bright", None] * 2


def test_tiles_outside_of_the_array_are_empty():
    z = create_array({}, shape=(3, 100, 65, 3), dtype="u1", chunks=(2, 192, 64, 3), codec=DeepSIC(axes="tyxc"))
    z[...] = 240
    tiles = chunk_attrs(z, (1, 0, 1, 0))["labels"]
    assert [bool(tile) for tile in tiles] == [True, True, False] + [False] * 3
    assert all(chunk_attrs(z, (0, 0, 0, 0))["labels"][k] for k in (0, 1, 3, 4))


@pytest.mark.parametrize("arguments", [{"zarr_format": 2}, {}, {"shards": (128, 192, 3)}], ids=str)
def test_missing_chunk(arguments):
    z = create_array({}, shape=(128, 192, 3), dtype="u1", chunks=(64, 64, 3), **arguments)
    nothing = {
        "labels": [],
        "tile_shape": None,
        "model": None,
        "quality": None,
        "nbytes": None,
        "bpp": None,
        "quality_map": None,
        "format_version": None,
    }
    assert chunk_attrs(z, (1, 2, 0)) == nothing
    z[:64, :64] = 9
    assert chunk_attrs(z, (1, 2, 0)) == nothing
    assert chunk_attrs(z, (0, 0, 0)) != nothing
    for index in [(2, 0, 0), (0, 3, 0), (0, 0, 1), (-1, 0, 0), (0, 0)]:
        check_rejects(IndexError, "grid", chunk_attrs, z, index)


@pytest.mark.parametrize("semantics,labels", [("pre", True), ("post", True), ("none", False)])
@pytest.mark.parametrize("shards", [None, (128, 192, 3)])
def test_semantics(semantics, labels, shards, stub):
    codec = DeepSIC(semantics=semantics)
    z = create_array({}, data=scene(), chunks=(128, 192, 3), codec=codec, shards=shards)
    stub.batches.clear()
    attrs = chunk_attrs(z, (0, 0, 0))
    assert bool(stub.batches) == (semantics == "post")
    if labels:
        assert attrs["tile_shape"] == [64, 64] and best(attrs["labels"]) == ["Dark", "Dim", "Bright"] * 2
    else:
        assert attrs["tile_shape"] is None and attrs["labels"] is None
    assert attrs["nbytes"] > 50


def test_post_labels_behind_a_checksum():
    z = zarr.create_array(
        {}, data=scene(), chunks=(128, 192, 3), serializer=DeepSICCodec(semantics="post"), compressors=[Crc32cCodec()]
    )
    assert best(chunk_attrs(z, (0, 0, 0))["labels"]) == ["Dark", "Dim", "Bright"] * 2


def test_label_tile():
    z = create_array({}, data=scene(), chunks=(128, 192, 3), codec=DeepSIC(label_tile=(128, 128)))
    attrs = chunk_attrs(z, (0, 0, 0))
    assert attrs["tile_shape"] == [128, 128]
    assert [sorted(name for name, score in tile.items() if score > 0.5) for tile in attrs["labels"]] == [
        ["Dark", "Dim"],
        ["Bright"],
    ]


def test_many_labels_need_a_second_read():
    store = CountingStore(zarr.storage.MemoryStore())
    z = create_array(
        store, shape=(640, 640), dtype="u1", chunks=(640, 640), codec=DeepSIC(axes="yx", label_tile=(64, 64))
    )
    z[...] = photograph(640, 640)
    store.reads.clear()
    assert len(chunk_attrs(z, (0, 0))["labels"]) == 100
    assert len(store.reads) == 2


def test_payload_of_another_model():
    store = {}
    z = create_array(store, data=scene(), chunks=(128, 192, 3))
    payload = DeepSIC(model="other", quality=7).encode(scene())
    store["c/0/0/0"] = type(store["c/0/0/0"]).from_bytes(payload)
    attrs = chunk_attrs(z, (0, 0, 0))
    assert attrs["model"] == "12" * 8 and attrs["quality"] == 7
    assert best(attrs["labels"]) == ["Dark", "Dim", "Bright"] * 2
    np.testing.assert_array_equal(z[...], scene())


def test_class_names_come_from_the_array_without_the_model(monkeypatch):
    z = create_array({}, data=scene(), chunks=(128, 192, 3))
    plain = zarr.create_array(
        {}, data=scene(), chunks=(128, 192, 3), serializer=DeepSICCodec(), compressors=None
    )  # has no vocabulary
    assert best(chunk_attrs(plain, (0, 0, 0))["labels"]) == ["Dark", "Dim", "Bright"] * 2
    monkeypatch.setattr(stub_runtime, "MODELS", ())
    assert best(chunk_attrs(z, (0, 0, 0))["labels"]) == ["Dark", "Dim", "Bright"] * 2
    check_rejects(errors.ModelNotFound, "abab", chunk_attrs, plain, (0, 0, 0))


def test_vocabulary_too_small():
    z = create_array({}, data=scene(), chunks=(128, 192, 3))
    z.attrs["deepsic"] = {"vocabulary": {"head": "cd" * 32, "classes": ["Dark"], "parents": {}}}
    check_rejects(errors.CorruptPayload, "chunk (0, 0, 0)|vocabulary", chunk_attrs, z, (0, 0, 0))


def test_chunk_of_another_codec():
    store = {}
    z = create_array(store, data=scene(), chunks=(128, 192, 3))
    store["c/0/0/0"] = type(store["c/0/0/0"]).from_bytes(b"\xff\xd8\xff\xe0" * 100)
    check_rejects(errors.UnsupportedPayload, "(0, 0, 0)", chunk_attrs, z, (0, 0, 0))
    good = DeepSIC().encode(scene())
    for end in range(0, 60, 7):
        store["c/0/0/0"] = type(store["c/0/0/0"]).from_bytes(good[:end])
        check_rejects(errors.CorruptPayload, "(0, 0, 0)", chunk_attrs, z, (0, 0, 0))
    store["c/0/0/0"] = type(store["c/0/0/0"]).from_bytes(DeepSIC().encode(scene()[:64]))
    check_rejects(errors.CorruptPayload, "(64, 192, 3)", chunk_attrs, z, (0, 0, 0))


def test_array_of_another_codec():
    plain = zarr.create_array({}, shape=(8, 8, 3), dtype="u1", chunks=(8, 8, 3))
    check_rejects(errors.UnsupportedPayload, "Zstd|not with DeepSIC", chunk_attrs, plain, (0, 0, 0))
    old = zarr.create_array({}, shape=(8, 8, 3), dtype="u1", chunks=(8, 8, 3), zarr_format=2)
    check_rejects(errors.UnsupportedPayload, "not with DeepSIC", chunk_attrs, old, (0, 0, 0))
    hidden = zarr.create_array({}, shape=(8, 8, 3), dtype="u1", chunks=(8, 8, 3), serializer=DeepSICCodec())
    check_rejects(errors.UnsupportedPayload, "Zstd|compressors=None", chunk_attrs, hidden, (0, 0, 0))


def test_codec_as_filter_of_format_2():
    z = zarr.create_array({}, data=scene(), chunks=(128, 192, 3), filters=[DeepSIC()], compressors=None, zarr_format=2)
    np.testing.assert_array_equal(z[...], scene())
    assert best(chunk_attrs(z, (0, 0, 0))["labels"]) == ["Dark", "Dim", "Bright"] * 2


def test_chunks_of_shards_are_read_alone():
    z = create_array({}, data=scene(), chunks=(64, 64, 3), shards=(128, 192, 3))
    reader = StoredArray(z).reader
    index = sync(reader.read_shard_index((0, 0, 0)))
    assert index.shape == (2, 3, 1, 2) and index[..., 1].min() > 50
    header = reader.start((1, 2, 0)).header
    assert reader.payload((1, 2, 0)) == DeepSIC().encode(scene()[64:, 128:])
    assert header.shape == (64, 64, 3)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", ["folder", "zip", "fsspec"])
def test_stores(tmp_path, kind, zarr_format):
    if kind == "fsspec":
        pytest.importorskip("fsspec")
        store = zarr.storage.FsspecStore.from_url(f"memory://deepsic/{zarr_format}")
    else:
        store = tmp_path / "a" if kind == "folder" else zarr.storage.ZipStore(tmp_path / "a.zip", mode="w")
    create_array(store, name="img", data=scene(), chunks=(128, 192, 3), zarr_format=zarr_format)
    if kind == "zip":
        store.close()
        store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="r")
    z = open_archive(store, "img")
    np.testing.assert_array_equal(z[...], scene())
    assert best(chunk_attrs(z, (0, 0, 0))["labels"]) == ["Dark", "Dim", "Bright"] * 2


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_xarray(tmp_path, zarr_format):
    xr = pytest.importorskip("xarray")
    create_array(tmp_path / "a", name="img", data=scene(), chunks=(64, 64, 3), zarr_format=zarr_format)
    with xr.open_zarr(tmp_path / "a", consolidated=False, zarr_format=zarr_format) as opened:
        assert opened["img"].dims == ("y", "x", "c") and opened["img"].dtype == np.uint8
        np.testing.assert_array_equal(opened["img"], scene())
        encoding = (
            {"serializer": DeepSICCodec(), "compressors": None} if zarr_format == 3 else {"compressors": DeepSIC()}
        )
        fresh = opened.drop_encoding().load()
    fresh.to_zarr(tmp_path / "b", zarr_format=zarr_format, consolidated=False, encoding={"img": encoding})
    np.testing.assert_array_equal(open_archive(tmp_path / "b")[...], scene())


@pytest.mark.parametrize("vocabulary", [None, 3, {}, {"head": "cd" * 32}, {"head": "cd" * 32, "classes": 5}], ids=str)
def test_an_invalid_vocabulary_is_ignored(vocabulary):
    z = create_array({}, data=scene(), chunks=(128, 192, 3))
    z.attrs["deepsic"] = {"vocabulary": vocabulary}
    assert best(chunk_attrs(z, (0, 0, 0))["labels"]) == ["Dark", "Dim", "Bright"] * 2


def test_arrays_can_be_pickled(tmp_path):
    z = create_array(tmp_path / "a", data=scene(), chunks=(64, 64, 3))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(z))[...], scene())


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", [None, "a/b"])
def test_an_array_that_exists_is_kept_and_the_message_says_how_to_replace_it(tmp_path, zarr_format, name):
    store = tmp_path / "a.zarr"
    array, options = photograph(16, 16, 3), {"name": name, "zarr_format": zarr_format}
    create_array(store, data=array, **options)
    words = f"a.zarr{'/' + name if name else ''}|exists|overwrite=True"
    check_rejects(errors.ConfigurationError, words, create_array, store, data=array // 2, **options)
    np.testing.assert_array_equal(open_archive(store, name)[...], array)
    np.testing.assert_array_equal(create_array(store, data=array // 2, overwrite=True, **options)[...], array // 2)


def store_dask(store, *, data, **options):
    return pytest.importorskip("deepsic_codec.dask").store(data, store, **options)


@pytest.mark.parametrize("write", [create_array, store_dask])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_array_is_never_deleted(tmp_path, write, overwrite):
    array = photograph(16, 16, 3)
    group = zarr.create_group(tmp_path / "group.zarr")
    create_array(group, name="inner/a", data=array)
    for name in (None, "inner"):
        check_rejects(
            errors.ConfigurationError,
            "is a group|name",
            write,
            tmp_path / "group.zarr",
            name=name,
            data=array,
            overwrite=overwrite,
        )
    np.testing.assert_array_equal(open_archive(group, "inner/a")[...], array)
    if overwrite:
        folder = tmp_path / "pictures"
        folder.mkdir()
        (folder / "a.png").write_bytes(b"x")
        for options in ({"store": folder}, {"store": tmp_path, "name": "pictures"}):
            words = "pictures|no array of Zarr"
            store = options.pop("store")
            check_rejects(errors.ConfigurationError, words, write, store, data=array, overwrite=True, **options)
        assert (folder / "a.png").read_bytes() == b"x"
