"""Find a chunk of an array in its store and read as little of it as a question needs, in both formats and in shards.

Coroutines, so that a scan can have many reads in flight; `array` is a `zarr.Array` or `zarr.AsyncArray`.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from deepsic_codec._compat import default_buffer_prototype, read_part, setting
from deepsic_codec.axes import grid_shape
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.codec.v3 import DeepSICCodec
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.sections import LABELS

FIRST_READ = 256  # bytes: header and labels of any chunk with up to 16 label tiles lie within
EMPTY = np.iinfo(np.uint64).max  # offset and length of a chunk that a shard does not have


@dataclass(frozen=True)
class Location:
    """Where a payload is: bytes from `offset` on of what the store has under `key`, `length` of them if known."""

    key: str
    offset: int = 0
    length: int | None = None


def codec_of(array: Any) -> CodecParams:
    """Return the DeepSIC codec of an array, its model resolved.

    Raises UnsupportedPayload if the chunks of the array are not payloads of DeepSIC.
    """
    if array.metadata.zarr_format == 2:
        filters = array.metadata.filters or ()
        chain = [codec for codec in (*filters, array.metadata.compressor) if codec is not None]
    else:
        sharding = _sharding(array)
        chain = [*(sharding.codecs if sharding else array.metadata.codecs)]
    found = next((codec for codec in chain if isinstance(codec, DeepSIC | DeepSICCodec)), None)
    names = ", ".join(type(codec).__name__ for codec in chain) or "no codec"
    if found is None:
        raise UnsupportedPayload(f"array {array.path!r} is stored with {names}, not with DeepSIC")
    after = chain[chain.index(found) + 1 :]
    if not all(isinstance(codec, Crc32cCodec) for codec in after):  # four bytes at the end, in nobody's way
        raise UnsupportedPayload(
            f"array {array.path!r} is stored with {names}: what follows DeepSIC hides its headers and saves nothing; "
            "rewrite the array through deepsic_codec.create_array, or with compressors=None"
        )
    return found.resolved()


def check_index(array: Any, index: tuple[int, ...]) -> None:
    """Raise IndexError unless the array has a chunk at this position."""
    grid = grid_shape(array.shape, array.chunks)
    if len(index) != len(grid) or not all(0 <= i < n for i, n in zip(index, grid, strict=True)):
        raise IndexError(f"chunk {tuple(index)}: array {array.path!r} has a grid of {grid} chunks")


async def locate(array: Any, index: tuple[int, ...]) -> Location | None:
    """Find a chunk.

    Parameters
    ----------
    array : zarr.Array or zarr.AsyncArray
        Stored with DeepSIC.
    index : tuple of int
        Position in the grid of chunks; in sharded arrays that of the chunks inside the shards.

    Returns
    -------
    Location or None
        None for a chunk that a shard lacks. Outside of shards the store knows only when it is read.
    """
    check_index(array, index)
    if _sharding(array) is None:
        return Location(_key(array, index))
    table = await read_shard_index(array, shard_of(array, index))
    return None if table is None else locate_in(array, index, table)


def shard_of(array: Any, index: tuple[int, ...]) -> tuple[int, ...]:
    """Return the position of the shard that has a chunk."""
    return tuple(i // (shard // chunk) for i, shard, chunk in zip(index, array.shards, array.chunks, strict=True))


def locate_in(array: Any, index: tuple[int, ...], table: np.ndarray) -> Location | None:
    """Find a chunk, given what `read_shard_index` read of its shard."""
    offset, length = table[tuple(i % n for i, n in zip(index, table.shape[:-1], strict=True))].tolist()
    if offset == EMPTY and length == EMPTY:
        return None
    return Location(_key(array, shard_of(array, index)), offset, length)


async def read_shard_index(array: Any, shard: tuple[int, ...]) -> np.ndarray | None:
    """Read where a shard has its chunks.

    Returns
    -------
    ndarray or None
        uint64, the shard's grid of chunks and a last axis of offset and length in bytes, both 2**64 - 1 for a missing
        chunk; None if the store has no such shard.
    """
    sharding = _sharding(array)
    if sharding is None:
        raise ValueError(f"array {array.path!r} has no shards")
    numbers, *checks = sharding.index_codecs
    if not isinstance(numbers, BytesCodec) or not all(isinstance(codec, Crc32cCodec) for codec in checks):
        raise UnsupportedPayload(f"array {array.path!r}: shard index stored with {sharding.index_codecs}")
    grid = tuple(shard_size // chunk for shard_size, chunk in zip(array.shards, array.chunks, strict=True))
    size = 16 * prod(grid) + 4 * len(checks)
    at_start = setting(sharding.index_location) == "start"
    data = await _get(array, _key(array, shard), RangeByteRequest(0, size) if at_start else SuffixByteRequest(size))
    if data is None:
        return None
    if len(data) != size:
        raise CorruptPayload(f"shard {shard} of array {array.path!r}: truncated index")
    for _ in checks:
        data, stored = data[:-4], data[-4:]
        if crc32c(data) != int.from_bytes(stored, "little"):
            raise CorruptPayload(f"shard {shard} of array {array.path!r}: index does not match its checksum")
    order = ">" if setting(numbers.endian) == "big" else "<"
    return np.frombuffer(data, f"{order}u8").reshape(*grid, 2)


async def read_head(array: Any, index: tuple[int, ...], place: Location | None = None) -> tuple[Header, bytes] | None:
    """Read header and labels of a chunk: one request of 256 bytes, a second one only for more labels than usual.

    Parameters
    ----------
    array : zarr.Array or zarr.AsyncArray
        Stored with DeepSIC.
    index : tuple of int
        Position in the grid of chunks.
    place : Location, optional
        Where it is, if that is known.

    Returns
    -------
    (Header, bytes) or None
        The header and the start of the payload, up to the end of its labels at least. None for a missing chunk, which
        reads as the fill value everywhere.
    """
    place = place or await locate(array, index)
    data = None if place is None else await _read(array, place, FIRST_READ)
    if place is None or data is None:
        return None
    needed = payload_header.header_size(data)
    if needed > len(data):
        data = await _read(array, place, needed) or b""
    header = payload_header.read_header(data)
    labels = header.entry(LABELS.kind)
    needed = 0 if labels is None else labels.offset + labels.length
    if needed > len(data):
        data = await _read(array, place, needed) or b""
    return header, data


async def read_payload(array: Any, index: tuple[int, ...], place: Location | None = None) -> bytes | None:
    """Read the whole payload of a chunk, None if it is missing; `place` is where it is, if that is known."""
    place = place or await locate(array, index)
    data = None if place is None else await _read(array, place, place.length)
    # What follows the payload is the checksum of a Crc32cCodec.
    return None if data is None else data[: payload_header.read_header(data).nbytes]


async def _read(array: Any, place: Location, size: int | None) -> bytes | None:
    if size is None:
        return await _get(array, place.key, OffsetByteRequest(place.offset))
    size = size if place.length is None else min(size, place.length)
    return await _get(array, place.key, RangeByteRequest(place.offset, place.offset + size))


async def _get(array: Any, key: str, part: ByteRequest) -> bytes | None:
    # Not get_partial_values: stores differ in what that does for a missing key.
    data = await read_part(array.store_path.store, key, default_buffer_prototype(), part)
    return None if data is None else data.to_bytes()


def _key(array: Any, index: tuple[int, ...]) -> str:
    key = array.metadata.encode_chunk_key(index)
    path = array.store_path.path
    return f"{path}/{key}" if path else key


def _sharding(array: Any) -> ShardingCodec | None:
    codecs = getattr(array.metadata, "codecs", ())
    return codecs[0] if codecs and isinstance(codecs[0], ShardingCodec) else None
