"""The parts of the bulk writer without Dask: shards, retries, memory, what counts as complete."""

import asyncio

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from deepsic_codec import DeepSIC, DeepSICCodec, create_array
from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.axes import iter_grid
from deepsic_codec.bulk.resume import complete_chunks
from deepsic_codec.bulk.write import PackedStarts, WriteOptions, put, write_block
from deepsic_codec.codec.batching import in_halves
from deepsic_codec.errors import OutOfMemory, UnsupportedArray, UnsupportedPayload
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import Counter
from deepsic_codec.stored.reader import PayloadStart
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")


def empty(shape=(200, 300, 3), chunks=(64, 64, 3), **kwargs):
    kwargs.setdefault("codec", DeepSIC(label_tile=64))
    return create_array(MemoryStore(), name="image", shape=shape, dtype="u1", chunks=chunks, **kwargs)


def write(array, values, **kwargs):
    return write_block(values, StoredArray(array), (0,) * array.ndim, None, WriteOptions(**kwargs))


def keys_of(array):
    async def listed():
        return [key async for key in array.store.list()]

    metadata = ("zarr.json", ".zarray", ".zattrs", ".zgroup")
    return sorted(key for key in sync(listed()) if not key.endswith(metadata))


def raw(array, key, value=None):
    if value is None:
        return sync(array.store.get(key, default_buffer_prototype())).to_bytes()
    return sync(array.store.set(key, default_buffer_prototype().buffer.from_bytes(value)))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"zarr_format": 2},
        {"zarr_format": 2, "order": "F"},
        {"shards": (128, 192, 3)},
        {"fill_value": 7},
        {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    ],
    ids=str,
)
def test_values_come_back(kwargs):
    values, array = photograph(200, 300, 3), empty(**kwargs)
    result = write(array, values)
    np.testing.assert_array_equal(array[:], values)
    assert len(result.starts) == 20 and not result.failed and result.empty == 0
    assert result.nbytes == sum(len(raw(array, key)) for key in keys_of(array))


def test_payloads_of_whole_chunks_are_those_that_zarr_writes():
    values, ours, theirs = photograph(128, 192, 3), empty((128, 192, 3)), empty((128, 192, 3))
    write(ours, values)
    theirs[:] = values
    assert keys_of(ours) == keys_of(theirs)
    assert all(raw(ours, key) == raw(theirs, key) for key in keys_of(ours))


@pytest.mark.parametrize("axes, shape, chunks", [("tcyx", (3, 3, 70, 90), (2, 3, 64, 64)), ("yx", (70, 90), (64, 64))])
def test_axes(axes, shape, chunks):
    values, array = photograph(*shape), empty(shape, chunks, codec=DeepSIC(axes=axes))
    write(array, values)
    np.testing.assert_array_equal(array[:], values)


@pytest.mark.parametrize("location", ["start", "end"])
def test_shards_are_those_that_zarr_reads(location):
    from zarr.codecs import BytesCodec, ShardingCodec

    sharding = ShardingCodec(
        chunk_shape=(64, 64, 3),
        codecs=[DeepSICCodec(), Crc32cCodec()],
        index_codecs=[BytesCodec(endian="big"), Crc32cCodec(), Crc32cCodec()],
        index_location=location,
    )
    array = zarr.create_array(
        MemoryStore(),
        name="image",
        shape=(200, 300, 3),
        chunks=(128, 128, 3),
        dtype="u1",
        serializer=sharding,
        compressors=None,
        fill_value=0,
    )
    values = photograph(200, 300, 3)
    values[:64, 64:128] = 0  # a chunk that a shard lacks
    values[128:, 256:] = 0  # a shard that is not there
    result = write(array, values)
    np.testing.assert_array_equal(array[:], values)
    assert result.empty == 3 and len(keys_of(array)) == 5
    assert StoredArray(array).reader.start((0, 1, 0)) is None
    everything = list(iter_grid((0, 0, 0), (4, 5, 1)))
    assert complete_chunks(StoredArray(array), everything, read_all=True) == set(result.starts)


@pytest.mark.parametrize("kwargs", [{}, {"shards": (128, 128, 3)}], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_fill_chunks_are_stored_as_zarr_stores_them(kwargs, keep):
    arrays = [empty((128, 192, 3), fill_value=9, config={"write_empty_chunks": keep}, **kwargs) for _ in range(2)]
    values = np.full((128, 192, 3), 9, "u1")
    values[64:, :64] = 1
    write(arrays[0], photograph(128, 192, 3))  # is to be replaced
    result = write(arrays[0], values)
    arrays[1][:] = values
    assert keys_of(arrays[0]) == keys_of(arrays[1])
    assert result.empty == (0 if keep else 5) and len(result.starts) == (6 if keep else 1)
    np.testing.assert_array_equal(arrays[0][:], values)


def test_padding_has_no_labels():
    dark = np.full((200, 300, 3), 1, "u1")  # nearest to it, padding with zeros would be Dark as well: pad is not
    array = empty((70, 100, 3), (256, 256, 3), codec=DeepSIC(label_tile=64))
    result = write(array, dark[:70, :100])
    block = PayloadStart.of(next(iter(result.starts.values()))).labels()
    # 6 of 64 rows of the second row of cells are data, 36 of 64 columns of the second column.
    assert (block.scores.max(axis=-1)[0] > 0).tolist() == [[True, True, False, False]] + [[False] * 4] * 3


def test_padding_along_slices_has_no_labels():
    array = empty((3, 64, 64), (2, 64, 64), codec=DeepSIC(axes="tyx"))
    result = write(array, photograph(3, 64, 64))
    block = PayloadStart.of(result.starts[1, 0, 0]).labels()
    assert (block.scores.max(axis=-1).ravel() > 0).tolist() == [True, False]


def test_padding_continues_the_image():
    bright = np.full((110, 110, 3), 250, "u1")  # fill value 0 in the last cells would make them Dim
    result = write(empty((110, 110, 3), (128, 128, 3)), bright)
    block = PayloadStart.of(next(iter(result.starts.values()))).labels()
    assert (block.classes[..., 0] == 2).all()


def test_a_batch_is_one_call(stub):
    write(empty((256, 320, 3)), photograph(256, 320, 3), batch_size=8)
    assert stub.sizes("encode") == [8, 8, 4]


def test_codecs_before_deepsic_are_refused():
    from zarr.codecs import TransposeCodec

    array = zarr.create_array(
        MemoryStore(),
        shape=(64, 64, 3),
        chunks=(64, 64, 3),
        dtype="u1",
        filters=[TransposeCodec(order=(1, 0, 2))],
        serializer=DeepSICCodec(),
        compressors=None,
    )
    check_rejects(UnsupportedArray, "TransposeCodec|through zarr", StoredArray(array).layout.check_writable)
    plain = zarr.create_array(MemoryStore(), shape=(64, 64), chunks=(64, 64), dtype="u1")
    check_rejects(UnsupportedPayload, "not with DeepSIC", StoredArray, plain)


def test_blocks_that_do_not_fit_the_array_are_refused():
    array = empty()
    check_rejects(UnsupportedArray, "goes beyond", write, array, photograph(201, 300, 3))
    check_rejects(UnsupportedArray, "float64", write, array, photograph(200, 300, 3).astype("f8"))
    masked = np.ma.masked_equal(photograph(200, 300, 3), 128)
    check_rejects(UnsupportedArray, "masked", write, array, masked)
    assert keys_of(array) == []


def test_a_memory_store_of_another_process_is_refused():
    check_rejects(UnsupportedArray, "threads", write, empty(), photograph(200, 300, 3), process=-1)


def test_another_process_writes_only_where_it_sees_the_array(stub, tmp_path):
    array = create_array(tmp_path / "a.zarr", name="image", shape=(200, 300, 3), dtype="u1", chunks=(64, 64, 3))
    assert len(write(array, photograph(200, 300, 3), process=-1).starts) == 20
    for metadata in (tmp_path / "a.zarr").rglob("zarr.json"):
        metadata.unlink()  # as if this path were another folder there
    check_rejects(UnsupportedArray, "does not find", write, array, photograph(200, 300, 3), process=-1)


@pytest.mark.parametrize("codec", [{}, {"nodata": 7}, {"max_error": 1}, {"quality": 80}], ids=str)
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
@pytest.mark.parametrize("shards", [None, (128, 128, 3)])
def test_an_enlarged_array_has_no_data_where_none_was_written(codec, dtype, shards):
    values = photograph(100, 90, 3).astype(dtype) + np.dtype(dtype).type(20)
    ranges = {"value_range": (0, 300)} if dtype == "f4" and "max_error" not in codec else {}
    array = create_array(
        MemoryStore(),
        name="image",
        shape=values.shape,
        dtype=dtype,
        chunks=(64, 64, 3),
        shards=shards,
        codec=DeepSIC(semantics="none", **codec, **ranges),
    )
    write(array, values)
    array.resize((128, 192, 3))
    outside = np.ones(array.shape, bool)
    outside[:100, :90] = False
    added = array[...][outside]
    assert ((added == array.fill_value) | np.isnan(added)).all()
    assert np.abs(array[:100, :90].astype("f8") - values).max() < 60


def test_an_encoding_error_names_the_chunks(stub):
    values = np.full((64, 64, 3), 13, "u1")
    with pytest.raises(RuntimeError, match="poison") as caught:
        write(empty((64, 64, 3)), values)
    assert "(0, 0, 0) of array 'image'" in caught.value.__notes__[0]


class Flaky:
    """A store of which the first `failures` writes fail."""

    supports_deletes = True

    def __init__(self, failures, error=OSError):
        self.failures, self.error, self.calls = failures, error, 0

    async def set(self, key, value):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error("busy")


@pytest.mark.parametrize(
    "failures, error, calls, fails",
    [(0, OSError, 1, False), (2, OSError, 3, False), (9, OSError, 4, True), (1, PermissionError, 1, True)],
)
def test_failing_writes_are_retried(failures, error, calls, fails):
    flaky = Flaky(failures, error)

    async def run():
        return await put(flaky, "key", b"x", WriteOptions(retries=3, backoff=0.001), asyncio.Semaphore(1))

    reason = asyncio.run(run())
    assert flaky.calls == calls
    assert (reason is not None) == fails
    if fails:
        assert reason == f"{error.__name__}: busy"


def truncate(array, key):
    raw(array, key, raw(array, key)[:-1])


def flip(array, key):
    data = bytearray(raw(array, key))
    data[-1] ^= 1  # in the features: the header is whole, the length right
    raw(array, key, bytes(data))


EVERYTHING = list(iter_grid((0, 0, 0), (4, 5, 1)))


def test_truncated_payloads_are_not_complete():
    array = empty()
    assert complete_chunks(StoredArray(array), EVERYTHING) == set()
    write(array, photograph(200, 300, 3))
    assert complete_chunks(StoredArray(array), EVERYTHING) == set(EVERYTHING)
    truncate(array, "image/c/1/2/0")
    raw(array, "image/c/0/0/0", b"")
    raw(array, "image/c/0/1/0", b"nonsense" * 20)
    assert complete_chunks(StoredArray(array), EVERYTHING) == set(EVERYTHING) - {(1, 2, 0), (0, 0, 0), (0, 1, 0)}


@pytest.mark.parametrize("checksums", [0, 1])
def test_payloads_with_bytes_after_their_end_are_not_complete(checksums):
    """Readers refuse them, so resuming has to write them again."""
    array = zarr.create_array(
        MemoryStore(),
        name="image",
        shape=(200, 300, 3),
        dtype="u1",
        chunks=(64, 64, 3),
        serializer=DeepSICCodec(label_tile=64),
        compressors=[Crc32cCodec()] * checksums or None,
    )
    write(array, photograph(200, 300, 3))
    for key, rest in (("image/c/1/2/0", b"\0"), ("image/c/0/0/0", b"0000")):
        raw(array, key, raw(array, key) + rest)
    for read_all in (False, True):
        complete = complete_chunks(StoredArray(array), EVERYTHING, read_all=read_all)
        assert complete == set(EVERYTHING) - {(1, 2, 0), (0, 0, 0)}


def test_damaged_sections_are_found_by_reading_all():
    array = empty()
    write(array, photograph(200, 300, 3))
    flip(array, "image/c/1/2/0")
    assert complete_chunks(StoredArray(array), EVERYTHING) == set(EVERYTHING)
    assert complete_chunks(StoredArray(array), EVERYTHING, read_all=True) == set(EVERYTHING) - {(1, 2, 0)}


@pytest.mark.parametrize("other", [{"quality": 51}, {"semantics": "none"}, {"model": "other"}], ids=str)
def test_payloads_of_another_codec_are_not_complete(other):
    array, another = empty(), empty(codec=DeepSIC(**{"label_tile": 64, **other}))
    write(another, photograph(200, 300, 3))
    for key in keys_of(another)[:5]:
        raw(array, key, raw(another, key))
    assert complete_chunks(StoredArray(array), EVERYTHING) == set()


def test_a_cut_shard_is_not_complete():
    array = empty(shards=(128, 128, 3))
    write(array, photograph(200, 300, 3))
    assert complete_chunks(StoredArray(array), EVERYTHING) == set(EVERYTHING)
    truncate(array, "image/c/0/0/0")
    assert set(EVERYTHING) - complete_chunks(StoredArray(array), EVERYTHING) == {
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
    }


def test_complete_chunks_of_a_shard_are_kept(stub):
    array, values = empty((128, 128, 3), shards=(128, 128, 3)), photograph(128, 128, 3)
    write(array, values)
    before = StoredArray(array).reader.payload((1, 1, 0))
    stub.batches.clear()
    counter = Counter()
    stored = StoredArray(array, counter=counter)
    result = write_block(255 - values, stored, (0, 0, 0), [(0, 1, 0)], WriteOptions())
    assert counter.requests == 1 + 3, "the index of the shard once, for three payloads"
    assert stub.sizes("encode") == [1] and set(result.starts) == {(0, 1, 0)}
    values[:64, 64:] = 255 - values[:64, 64:]
    np.testing.assert_array_equal(array[:], values)
    assert StoredArray(array).reader.payload((1, 1, 0)) == before


FULL = [MemoryError(), RuntimeError("CUDA out of memory."), RuntimeError("can't allocate memory")]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_batch_that_does_not_fit_is_halved(error):
    calls = []

    def run(jobs):
        calls.append(len(jobs))
        if len(jobs) > 2:
            raise error
        return [job * 10 for job in jobs]

    assert in_halves(run)(list(range(7))) == [job * 10 for job in range(7)]
    assert calls == [7, 4, 2, 2, 3, 2, 1]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_chunk_that_does_not_fit_alone_is_an_error(error):
    def run(jobs):
        raise error

    with pytest.raises(OutOfMemory, match="one chunk takes more memory") as caught:
        in_halves(run)([1, 2])
    assert isinstance(caught.value, MemoryError) and caught.value.__cause__ is error


def test_other_errors_are_not_retried():
    calls = []

    def run(jobs):
        calls.append(len(jobs))
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        in_halves(run)([1, 2])
    assert calls == [2]


def test_the_writer_halves_batches(stub):
    def full():
        if stub.batches[-1][1] > 3:
            raise MemoryError

    stub.delay = full
    values, array = photograph(256, 256, 3), empty((256, 256, 3))
    write(array, values)
    assert stub.sizes("encode")[:4] == [16, 8, 4, 2]
    stub.delay = None
    np.testing.assert_array_equal(array[:], values)


def test_starts_are_packed_by_position():
    grid = (3, 4)
    first, second = {(2, 1): b"abc", (0, 3): b""}, {(1, 0): b"de"}
    starts = PackedStarts.join(
        grid, [PackedStarts.pack(grid, first), PackedStarts(grid), PackedStarts.pack(grid, second)]
    )
    assert dict(starts) == first | second and len(starts) == 3
    assert list(starts) == [(0, 3), (1, 0), (2, 1)]
    assert starts.get((2, 2)) is None and starts.get((2, 3)) is None and (0, 0) not in starts
    assert dict(PackedStarts.join(grid, [])) == {}
