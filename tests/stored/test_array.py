"""StoredArray: keys, codecs and shards of an array, and the reader of its payloads."""

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec
from zarr.storage import MemoryStore

from deepsic_codec import DeepSIC, DeepSICCodec, create_array
from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.axes import iter_grid
from deepsic_codec.errors import CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.layout import MISSING, PayloadLocation
from deepsic_codec.stored.location import Counter
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")

IMAGE = photograph(128, 192, 3)


def stored_image(**kwargs):
    return StoredArray(create_array(MemoryStore(), name="image", data=IMAGE, chunks=(64, 64, 3), **kwargs))


def sharding(location="end", codecs=None, index_codecs=None):
    return ShardingCodec(
        chunk_shape=(64, 64, 3),
        codecs=codecs or [DeepSICCodec()],
        index_codecs=index_codecs or [BytesCodec(), Crc32cCodec()],
        index_location=location,
    )


def array_of(serializer, **kwargs):
    options = {"shape": (128, 192, 3), "chunks": (128, 192, 3), "dtype": "u1", "compressors": None} | kwargs
    return zarr.create_array(MemoryStore(), name="image", serializer=serializer, **options)


def set_bytes(stored, key, data):
    sync(stored.array.store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def test_what_metadata_says():
    codec = DeepSIC(axes="tyx", label_tile=64)
    array = create_array(MemoryStore(), name="a/b", shape=(5, 100, 70), dtype="u2", chunks=(2, 64, 64), codec=codec)
    stored = StoredArray(array)
    assert (stored.axes, stored.path, stored.shape, stored.chunks) == ("tyx", "a/b", (5, 100, 70), (2, 64, 64))
    assert stored.grid == stored.geometry.grid == (3, 2, 2) and list(stored.indices()) == list(np.ndindex(3, 2, 2))
    assert stored.geometry.tile == (64, 64) and stored.dimension_names == ["t", "y", "x"]
    assert stored.params.label_tile == (64, 64) and len(stored.decoder) == len(stored.head) == 64
    assert stored.fill_value == 0 and stored.layout.order == "C"


def test_format_2_has_an_order_and_perhaps_no_fill_value():
    array = create_array(MemoryStore(), shape=(8, 8, 3), dtype="u1", zarr_format=2, order="F")
    stored = StoredArray(array)
    assert stored.layout.order == "F" and array.fill_value is None and stored.fill_value == 0


@pytest.mark.parametrize("name, key", [("image", "image/c/1/2/0"), (None, "c/1/2/0")])
def test_keys(name, key):
    array = create_array(MemoryStore(), name=name, data=IMAGE, chunks=(64, 64, 3))
    layout = StoredArray(array).layout
    assert layout.key((1, 2, 0)) == key and layout.locate((1, 2, 0), None) == PayloadLocation(key)
    for index in [(2, 0, 0), (0, -1, 0), (0, 0)]:
        check_rejects(IndexError, f"chunk {index}|grid of (2, 3, 1)", layout.check_index, index)


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("checksums", [0, 1, 2])
def test_shards_are_written_as_they_are_read(location, endian, checksums):
    index_codecs = [BytesCodec(endian=endian), *[Crc32cCodec()] * checksums]
    layout = StoredArray(array_of(sharding(location, [DeepSICCodec(), Crc32cCodec()], index_codecs))).layout
    payloads = {(0, 1, 0): b"first", (1, 2, 0): b"second one"}
    shard = layout.build_shard(payloads)
    size = 6 * 16 + 4 * checksums
    index = shard[:size] if location == "start" else shard[-size:]
    table = layout.parse_shard_index(index, (0, 0, 0))
    assert table.shape == (2, 3, 1, 2) and (table == MISSING).sum() == 8
    assert layout.locate((0, 0, 0), table) is None and layout.locate((0, 1, 0), None) is None
    for chunk, payload in payloads.items():
        found = layout.locate(chunk, table)
        assert found.key == "image/c/0/0/0" and found.length == len(payload) + 4
        assert shard[found.offset : found.offset + len(payload)] == payload
    for damaged in [index[:-1], b"x" + index[1:]] if checksums else [index[:-1]]:
        check_rejects(CorruptPayload, "shard (0, 0, 0)|index", layout.parse_shard_index, damaged, (0, 0, 0))


def test_codecs_around_deepsic():
    transpose = TransposeCodec(order=(2, 0, 1))
    layout = StoredArray(array_of(DeepSICCodec(axes="cyx"), filters=[transpose])).layout
    check_rejects(UnsupportedArray, "TransposeCodec|first", layout.check_first)
    check_rejects(UnsupportedArray, "TransposeCodec|through zarr", layout.check_writable)
    layout = StoredArray(array_of(sharding(codecs=[transpose, DeepSICCodec(axes="cyx")]))).layout
    check_rejects(UnsupportedArray, "TransposeCodec|first", layout.check_first)
    outside = array_of(sharding(), compressors=[Crc32cCodec()])
    check_rejects(UnsupportedPayload, "ShardingCodec, Crc32cCodec|hides chunks", StoredArray, outside)
    check_rejects(UnsupportedPayload, "BytesCodec|not with DeepSIC", StoredArray, array_of(BytesCodec()))
    compressed = array_of(DeepSICCodec(), compressors="auto")
    check_rejects(UnsupportedPayload, "ZstdCodec|hides its headers", StoredArray, compressed)


def test_payloads_and_starts_in_the_order_asked_for():
    stored = stored_image()
    sync(stored.array.store.delete("image/c/0/1/0"))
    indices = [(1, 2, 0), (0, 1, 0), (0, 0, 0), (1, 2, 0)]
    payloads = list(stored.reader.payloads(indices))
    assert [index for index, _ in payloads] == indices and payloads[1] == ((0, 1, 0), None)
    assert payloads[2][1] == DeepSIC().encode(IMAGE[:64, :64]) and payloads[0] == payloads[3]
    starts = dict(stored.reader.starts(indices))
    assert starts[0, 1, 0] is None
    start = starts[1, 2, 0]
    assert payloads[0][1].startswith(start.data) and start.trim() == start.data[: len(start.trim())]
    assert start.header.nbytes == len(payloads[0][1]) and start.labels().classes.shape[:3] == (1, 1, 1)


def test_checksums_after_a_payload_are_not_part_of_it():
    array = array_of(sharding(codecs=[DeepSICCodec(), Crc32cCodec()]))
    array[...] = IMAGE
    assert StoredArray(array).reader.payload((0, 0, 0)) == DeepSIC().encode(IMAGE[:64, :64])


def test_chunks_of_a_shard_share_one_read_of_its_index():
    counter = Counter()
    stored = StoredArray(stored_image(shards=(128, 192, 3)).array, counter=counter)
    assert len(list(stored.reader.starts(stored.indices()))) == 6
    assert counter.requests == 1 + 6
    assert stored.counting(Counter()).array is stored.array


def test_errors_name_the_chunk_once():
    stored = stored_image()
    set_bytes(stored, "image/c/0/1/0", b"nonsense" * 40)
    message = check_rejects(UnsupportedPayload, "chunk (0, 1, 0) of array 'image'", stored.reader.payload, (0, 1, 0))
    assert message.count("chunk (") == 1
    other = create_array(MemoryStore(), data=IMAGE[:32, :32], chunks=(32, 32, 3))
    set_bytes(stored, "image/c/0/1/0", StoredArray(other).reader.payload((0, 0, 0)))
    check_rejects(CorruptPayload, "chunk (0, 1, 0)|(32, 32, 3)", stored.reader.start, (0, 1, 0))
    with pytest.raises(KeyError), stored.reader.error_context((0, 0, 0)):
        raise KeyError("others pass")


def test_errors_that_are_ignored_are_missing_results():
    stored = stored_image(shards=(64, 192, 3))
    set_bytes(stored, "image/c/0/0/0", b"cut")

    async def length(location):
        return await stored.reader.stored_length(location)

    found = dict(stored.reader.map(iter_grid((0, 0, 0), (2, 3, 1)), length, ignore=(CorruptPayload,)))
    assert [index for index, one in found.items() if one is None] == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    with pytest.raises(CorruptPayload, match="truncated index"):
        list(stored.reader.map([(0, 0, 0)], length))
    with pytest.raises(IndexError):
        list(stored.reader.map([(9, 0, 0)], length, ignore=(CorruptPayload,)))


def test_length_of_what_is_stored():
    stored = stored_image()
    assert sync(stored.reader.stored_length(stored.layout.locate((0, 0, 0), None))) == len(
        stored.reader.payload((0, 0, 0))
    )


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), OSError("lost"), ConnectionResetError(), TimeoutError("slow")], ids=repr
)
@pytest.mark.parametrize("options", [{}, {"shards": (128, 192, 3)}], ids=["chunks", "shards"])
def test_errors_of_a_store_keep_their_type_and_name_the_key(monkeypatch, error, options):
    stored = stored_image(**options)
    key = stored.layout.key((0, 0, 0))

    async def fail(self, name, *arguments, **keywords):
        raise error

    monkeypatch.setattr(MemoryStore, "get", fail)
    for read in (stored.reader.starts, stored.reader.payloads):
        check_rejects(type(error), key, lambda read=read: list(read([(0, 0, 0)])))
