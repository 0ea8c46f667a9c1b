import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from zarr.codecs import TransposeCodec

from deepsic_codec import DeepSIC, DeepSICCodec, config, create_array, errors
from tests import stub_runtime
from tests.common import check_rejects, photograph, run_python

pytestmark = pytest.mark.usefixtures("stub")

FUSED = Version(zarr.__version__) >= Version("3.4")
PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline"]
PIPELINES += ["zarr.core.codec_pipeline.FusedCodecPipeline"] if FUSED else []


@pytest.fixture(params=PIPELINES, ids=lambda name: name.rsplit(".", 1)[1])
def pipeline(request):
    with zarr.config.set({"codec_pipeline.path": request.param}):
        yield request.param


def create(zarr_format, store=None, codec=None, **arguments):
    """An array made with nothing but zarr's own functions."""
    store = {} if store is None else store
    codec = DeepSIC() if codec is None else codec
    arguments = {"dtype": "u1", **arguments}
    if zarr_format == 2:
        return zarr.open(store, mode="w", zarr_format=2, compressor=codec, **arguments)
    return zarr.create_array(store, serializer=codec.convert(DeepSICCodec), compressors=None, **arguments)


def stored(store):
    return {key: value.to_bytes() for key, value in store.items() if not key.endswith((".json", ".zarray", ".zattrs"))}


LAYOUTS = [
    ("yxc", (70, 45, 3), (32, 20, 3)),
    ("yx", (33, 50), (16, 16)),
    ("cyx", (3, 40, 31), (3, 16, 16)),
    ("cyx", (3, 40, 31), (1, 16, 16)),
    ("yxc", (20, 20, 1), (7, 9, 1)),
    ("tyxc", (5, 20, 21, 3), (2, 8, 8, 3)),
    ("xyt", (9, 20, 5), (4, 8, 2)),
    ("zyxtc", (3, 9, 8, 2, 3), (2, 8, 8, 2, 3)),
    ("yxc", (1, 1, 3), (1, 1, 3)),
    ("yxc", (1, 1, 3), (64, 64, 3)),
]


@pytest.mark.parametrize("axes,shape,chunks", LAYOUTS)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_roundtrip(pipeline, zarr_format, axes, shape, chunks):
    array = photograph(*shape)
    store = {}
    z = create(zarr_format, store, DeepSIC(axes=axes), shape=shape, chunks=chunks)
    z[...] = array
    again = zarr.open(store, mode="r")
    np.testing.assert_array_equal(again[...], array)
    corner = tuple(slice(size // 2, size) for size in shape)
    np.testing.assert_array_equal(again[corner], array[corner])


@given(st.data())
def test_any_layout(data):
    axes = "".join(data.draw(st.permutations(data.draw(st.sampled_from(["yx", "yxc", "tyx", "tyxc"])))))
    sizes = {"y": st.integers(1, 70), "x": st.integers(1, 45), "c": st.sampled_from([1, 3]), "t": st.integers(1, 3)}
    shape = tuple(data.draw(sizes[axis]) for axis in axes)
    chunks = tuple(
        size if axis == "c" else data.draw(st.integers(1, 30)) for axis, size in zip(axes, shape, strict=True)
    )
    chunks = tuple(max(chunk, size // 3) for chunk, size in zip(chunks, shape, strict=True))
    order = data.draw(st.sampled_from("CF"))
    array = np.array(photograph(*shape), order=data.draw(st.sampled_from("CF")))
    stores = {}, {}
    create(2, stores[0], DeepSIC(axes=axes), shape=shape, chunks=chunks, order=order)[...] = array
    create(3, stores[1], DeepSIC(axes=axes), shape=shape, chunks=chunks)[...] = array
    for store in stores:
        np.testing.assert_array_equal(zarr.open(store, mode="r")[...], array)


def test_formats_write_the_same_bytes(pipeline):
    array = photograph(70, 45, 3)
    stores = {}, {}, {}
    create(2, stores[0], shape=array.shape, chunks=(32, 20, 3))[...] = array
    create(3, stores[1], shape=array.shape, chunks=(32, 20, 3))[...] = array
    create(3, stores[2], shape=array.shape, chunks=(32, 20, 3))[...] = np.asfortranarray(array)
    two = {key.replace(".", "/"): value for key, value in stored(stores[0]).items()}
    assert len(two) == 9
    for store in stores[1:]:
        assert {key.removeprefix("c/"): value for key, value in stored(store).items()} == two


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_f_order(pipeline, zarr_format):
    array = photograph(40, 31, 3)
    arguments = {"order": "F"} if zarr_format == 2 else {"config": {"order": "F"}}
    for source in (array, np.asfortranarray(array), array[::-1], np.repeat(array, 2, axis=1)[:, ::2]):
        z = create(zarr_format, shape=array.shape, chunks=(16, 20, 3), **arguments)
        z[...] = source
        np.testing.assert_array_equal(z[...], source)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_big_endian_and_strides(pipeline, zarr_format):
    array = photograph(80, 62, 3)
    z = create(zarr_format, shape=(40, 31, 3), chunks=(16, 20, 3), dtype=">u1")
    for source in (array[::2, ::2], array[:40, 31:].astype(">u1"), array.T[:, :31, :40].T):
        z[...] = source
        np.testing.assert_array_equal(z[...], source)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_source_is_left_alone(pipeline, zarr_format):
    array = photograph(32, 32, 3)
    z = create(zarr_format, shape=array.shape, chunks=(32, 32, 3))
    z[...] = array
    np.testing.assert_array_equal(array, photograph(32, 32, 3))
    array[...] = 0
    np.testing.assert_array_equal(z[...], photograph(32, 32, 3))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_partial_writes_fill_and_missing_chunks(pipeline, zarr_format):
    store = {}
    z = create(zarr_format, store, shape=(40, 40, 3), chunks=(16, 16, 3), fill_value=9)
    expected = np.full((40, 40, 3), 9, "u1")
    assert (z[...] == 9).all() and not stored(store)
    for part in (np.s_[3:20, 5:6], np.s_[30:, 30:, 1], np.s_[::7, ::5]):
        expected[part] = z[part] = photograph(*expected[part].shape)
    np.testing.assert_array_equal(z[...], expected)
    z[:16, :16] = 9
    expected[:16, :16] = 9
    np.testing.assert_array_equal(z[...], expected)
    z.resize((50, 40, 3))
    assert (z[40:] == 9).all()


@pytest.mark.parametrize("location", ["start", "end"])
def test_shards(pipeline, location):
    array = photograph(100, 70, 3)
    shards = {"shape": (64, 64, 3), "index_location": location}
    z = zarr.create_array(
        {},
        shape=array.shape,
        dtype="u1",
        chunks=(16, 32, 3),
        shards=shards,
        serializer=DeepSICCodec(),
        compressors=None,
    )
    z[...] = array
    np.testing.assert_array_equal(z[...], array)
    z[5:9, 40:50] = 3
    array[5:9, 40:50] = 3
    np.testing.assert_array_equal(z[...], array)
    np.testing.assert_array_equal(z[17:20, 33:34], array[17:20, 33:34])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_sixteen_threads(pipeline, zarr_format, stub):
    array = photograph(256, 256, 3)
    z = create(zarr_format, shape=array.shape, chunks=(32, 32, 3))
    corners = [np.s_[y : y + 32, x : x + 32] for y in range(0, 256, 32) for x in range(0, 256, 32)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda part: z.__setitem__(part, array[part]), corners, timeout=60))
        np.testing.assert_array_equal(z[...], array)
        parts = list(pool.map(lambda part: z[part], corners * 2, timeout=60))
    for part, got in zip(corners * 2, parts, strict=True):
        np.testing.assert_array_equal(got, array[part])
    assert sum(stub.sizes("encode")) == 64


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_in_flight_are_joined(zarr_format, stub):
    array = photograph(128, 128, 3)
    z = create(zarr_format, shape=array.shape, chunks=(16, 16, 3))
    stub.delay = lambda: threading.Event().wait(0.005)
    z[...] = array
    z[...]
    for kind in ("encode", "decode"):
        assert sum(stub.sizes(kind)) == 64
        assert max(stub.sizes(kind)) >= 4, stub.sizes(kind)
    if zarr_format == 3:
        assert stub.sizes("encode") == [10, 10, 10, 10, 10, 10, 4]  # zarr's own async.concurrency


def test_both_formats_share_batches(stub):
    array = photograph(64, 64, 3)
    arrays = [create(2, shape=array.shape, chunks=(64, 64, 3)), create(3, shape=array.shape, chunks=(64, 64, 3))] * 4
    begin = threading.Barrier(8)
    stub.delay = lambda: threading.Event().wait(0.02)

    def write(z):
        begin.wait(10)
        z[...] = array

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, arrays, timeout=30))
    assert sum(stub.sizes("encode")) == 8 and len(stub.batches) <= 4, stub.batches


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_batch_limit(zarr_format, stub):
    with config.set(batch_pixels=600):
        create(zarr_format, shape=(64, 64, 3), chunks=(16, 16, 3))[...] = photograph(64, 64, 3)
    assert max(stub.sizes("encode")) <= 2 and sum(stub.sizes("encode")) == 16


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_failing_chunk_fails_alone(pipeline, zarr_format):
    array = photograph(64, 64, 3)
    array[16:32, 32:48] = stub_runtime.POISON
    store = {}
    z = create(zarr_format, store, shape=array.shape, chunks=(16, 16, 3))
    with ThreadPoolExecutor(16) as pool:
        corners = [np.s_[y : y + 16, x : x + 16] for y in range(0, 64, 16) for x in range(0, 64, 16)]
        writes = [pool.submit(z.__setitem__, part, array[part]) for part in corners]
        outcomes = {n: repr(error) for n, write in enumerate(writes) if (error := write.exception(30))}
    assert outcomes == {6: "RuntimeError('a poisoned image')"}
    array[16:32, 32:48] = 0
    np.testing.assert_array_equal(z[...], array)

    (key,) = [key for key in store if key.endswith(("1.1", "c/1/1/0", "1.1.0"))]
    store[key] = type(store[key]).from_bytes(store[key].to_bytes()[:-1] + b"\x00")
    with ThreadPoolExecutor(16) as pool:
        reads = [pool.submit(z.__getitem__, part) for part in corners]
        outcomes = [read.exception(30) for read in reads]
    assert [n for n, error in enumerate(outcomes) if error] == [5]
    assert type(outcomes[5]) is errors.CorruptPayload
    with pytest.raises(errors.CorruptPayload):
        z[...]


def test_lists_with_gaps():
    """Empty chunks are None inside a batch, when zarr makes batches."""
    with zarr.config.set({"codec_pipeline.batch_size": 16}):
        z = create(3, shape=(64, 64, 3), chunks=(16, 16, 3))
        array = photograph(64, 64, 3)
        array[:16] = 0
        z[...] = array
        np.testing.assert_array_equal(z[...], array)


def test_dask_threads(stub):
    da = pytest.importorskip("dask.array")
    array = photograph(128, 128, 3)
    for zarr_format in (2, 3):
        z = create(zarr_format, shape=array.shape, chunks=(16, 16, 3))
        da.store(da.from_array(array, chunks=(16, 16, 3)), z, lock=False, num_workers=16)
        read = da.from_array(z, chunks=(16, 16, 3)).compute(num_workers=16)
        np.testing.assert_array_equal(read, array)
    assert len(stub.sizes("encode")) < 128


def test_zarr_refuses_at_creation():
    def make(**arguments):
        store = {}
        arguments = {"shape": (8, 8, 3), "dtype": "u1", "chunks": (4, 4, 3), **arguments}
        try:
            zarr.create_array(store, serializer=DeepSICCodec(), compressors=None, **arguments)
        finally:
            assert not store

    make.__test__ = False
    for arguments, words in [
        ({"dtype": "f2"}, "float16"),
        ({"shape": (8, 8), "chunks": (4, 4)}, "2 axes|axes="),
        ({"shape": (8, 8, 257), "chunks": (4, 4, 257)}, "257 bands"),
        ({"dtype": "f2", "shards": (8, 8, 3)}, "float16"),
        ({"shape": (8, 8), "chunks": (4, 4), "shards": (8, 8)}, "2 axes"),
    ]:
        check_rejects(errors.UnsupportedArray, words, make, **arguments)


def test_format_2_refuses_at_the_first_write():
    for arguments, words in [
        ({"dtype": "f2", "fill_value": np.nan}, "float16"),
        ({"shape": (8, 8), "chunks": (4, 4)}, "2 axes"),
        ({"filters": [__import__("numcodecs").Delta("u1")]}, "filter"),
    ]:
        z = create(2, **{"shape": (8, 8, 3), "chunks": (4, 4, 3), **arguments})
        check_rejects(errors.UnsupportedArray, words, z.__setitem__, Ellipsis, 1)


def test_transposed_array_says_to_use_axes():
    with pytest.raises(errors.UnsupportedArray, match="bands"):
        zarr.create_array(
            {},
            shape=(3, 8, 400),
            dtype="u1",
            chunks=(3, 4, 400),
            filters=[TransposeCodec(order=(1, 2, 0))],
            serializer=DeepSICCodec(),
            compressors=None,
        )


def test_chunk_of_another_array():
    store = {}
    z = create(3, store, shape=(16, 16, 3), chunks=(8, 8, 3))
    z[...] = photograph(16, 16, 3)
    wrong = DeepSIC().encode(photograph(8, 4, 3))
    store["c/0/0/0"] = type(store["c/0/0/0"]).from_bytes(wrong)
    check_rejects(errors.CorruptPayload, "(8, 4, 3)|(8, 8, 3)", z.__getitem__, Ellipsis)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "change,words",
    [({"lossless": True}, "unknown parameter lossless"), ({"format": 7}, "format"), ({"quality": 0}, "quality")],
)
def test_hostile_metadata(zarr_format, change, words):
    store = {}
    create(zarr_format, store, shape=(8, 8, 3), chunks=(8, 8, 3))
    key = {2: ".zarray", 3: "zarr.json"}[zarr_format]
    metadata = json.loads(store[key].to_bytes())
    (metadata["compressor"] if zarr_format == 2 else metadata["codecs"][0]["configuration"]).update(change)
    store[key] = type(store[key]).from_bytes(json.dumps(metadata).encode())
    check_rejects(errors.ConfigurationError, words, zarr.open, store, mode="r")


def test_metadata_migration_reads_the_same_chunks():
    """Format 3 metadata beside the chunks of format 2."""
    array = photograph(20, 20, 3)
    for order in "CF":
        store = {}
        create(2, store, shape=array.shape, chunks=(8, 8, 3), order=order)[...] = array
        z = zarr.create_array(
            store,
            shape=array.shape,
            dtype="u1",
            chunks=(8, 8, 3),
            serializer=DeepSICCodec(),
            compressors=None,
            chunk_key_encoding={"name": "v2", "separator": "."},
        )
        assert z.metadata.zarr_format == 3
        np.testing.assert_array_equal(z[...], array)


def test_inside_a_running_loop():
    """A user's own event loop, and zarr's asynchronous arrays."""
    array = photograph(32, 32, 3)

    async def main():
        z = await zarr.api.asynchronous.create_array(
            {}, shape=array.shape, dtype="u1", chunks=(16, 16, 3), serializer=DeepSICCodec(), compressors=None
        )
        await z.setitem(Ellipsis, array)
        return await z.getitem(Ellipsis)

    np.testing.assert_array_equal(asyncio.run(main()), array)


def test_written_while_the_interpreter_shuts_down():
    output = run_python("""
        from tests import stub_runtime; stub_runtime.install()
        import atexit, numpy as np
        from deepsic_codec import DeepSIC
        codec = DeepSIC()
        atexit.register(lambda: print(len(codec.decode(codec.encode(np.zeros((4, 4, 3), "u1"))))))
    """)
    assert output.strip() == "4"


def test_create_array_is_a_drop_in():
    assert create_array({}, shape=(8, 8, 3), dtype="u1", chunks=(8, 8, 3)).metadata.codecs == (
        DeepSICCodec().resolved(),
    )


@pytest.mark.parametrize("has, expects", [("f4", "u1"), ("u1", "i1"), ("i2", "u2"), ("f4", "i2"), ("u1", "u1")])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_payload_of_another_dtype_or_shape_is_refused(pipeline, zarr_format, has, expects):
    """A file that was copied to a wrong place: its samples would pass for those of the array."""

    def array_of(dtype, shape):
        codec = DeepSIC(axes="yx", max_error=1, semantics="none", value_range=(0, 300) if dtype == "f4" else None)
        return create_array({}, shape=shape, dtype=dtype, chunks=shape, codec=codec, zarr_format=zarr_format)

    source = array_of(has, (64, 64))
    source[:] = np.full((64, 64), 100, has)
    ((key, payload),) = [item for item in source.store._store_dict.items() if item[0][0] in "0c"]
    same_bytes = 64 * np.dtype(has).itemsize // np.dtype(expects).itemsize
    for shape in {(64, 64), (64, same_bytes), (32, 128)} - ({(64, 64)} if has == expects else set()):
        array = array_of(expects, shape)
        array.store._store_dict[key] = payload
        for opened in (array, zarr.open_array(array.store, mode="r")):
            with pytest.raises(errors.CorruptPayload, match="header: (chunk shape|samples)"):
                opened[:]


def test_a_group_is_a_store_of_new_arrays(tmp_path):
    group = zarr.create_group(tmp_path, path="a")
    image = photograph(64, 64, 3)
    assert create_array(group, name="b", data=image, embed_model=False).path == "a/b"
    np.testing.assert_array_equal(zarr.open_array(tmp_path, path="a/b", mode="r"), image)
    create_array(group, name="b", data=255 - image, overwrite=True)
    np.testing.assert_array_equal(group["b"], 255 - image)


@pytest.mark.parametrize("chunks", [((32, 32), (64,), (3,)), None, (32.5, 64, 3), "small", ("a", "b", "c")])
def test_chunks_that_are_no_shape(chunks):
    image = photograph(64, 64, 3)
    check_rejects(errors.ConfigurationError, "chunks: expected", create_array, {}, data=image, chunks=chunks)
