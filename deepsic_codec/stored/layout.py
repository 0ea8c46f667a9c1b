"""How the chunks of an array lie in its store: keys, codecs around the payloads, and shards, read and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from deepsic_codec._compat import setting
from deepsic_codec.axes import Index, grid_shape
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.errors import CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.stored.allowed import check_codecs

MISSING = np.iinfo(np.uint64).max  # offset and length in a shard index of a chunk that is not stored


@dataclass(frozen=True)
class PayloadLocation:
    """Where a payload is in a store: from byte `offset` of the value of `key` on; `length` is None if unknown."""

    key: str
    offset: int = 0
    length: int | None = None


class StoredLayout:
    """Keys and bytes of an array whose chunks are payloads of DeepSIC.

    The codecs of such an array are, in this order: any that change arrays, DeepSIC, and any number of CRC-32C
    checksums. All of them may be within shards.

    Only the metadata and path of the array are used. `params` is its codec, the model resolved; `grid` has the chunks
    of the array along each axis, `shard_grid` those of a shard, None without shards; `order` is the memory order of
    chunks.

    Raises
    ------
    UnsupportedPayload
        If the array is stored otherwise.
    RefusedCodec
        If one of its codecs is not read of any archive.
    """

    def __init__(self, array: Any) -> None:
        metadata = array.metadata
        self._metadata, self._prefix = metadata, array.store_path.path
        self.name = f"array {array.path!r}" if array.path else "the array"
        check_codecs(array)
        self._sharding: ShardingCodec | None = None
        self.order: str = "C"
        if metadata.zarr_format == 2:
            self.order = metadata.order
            self._chain = [codec for codec in (*(metadata.filters or ()), metadata.compressor) if codec is not None]
        else:
            self._chain = list(metadata.codecs)
            if self._chain and isinstance(self._chain[0], ShardingCodec):
                if len(self._chain) > 1:
                    names = ", ".join(map(_name, self._chain))
                    raise UnsupportedPayload(
                        f"{self.name} is stored with {names}: a codec after shards hides chunks; rewrite the array "
                        "without it"
                    )
                self._sharding = self._chain[0]
                self._chain = list(self._sharding.codecs)
        self.params = self._codec()
        self.chunks: Index = tuple(array.chunks)
        if not all(0 < size < 1 << 32 for size in self.chunks):
            raise UnsupportedArray(f"{self.name}: chunks of {self.chunks}; expected sizes of 1 to 2^32 - 1")
        self.grid = grid_shape(array.shape, self.chunks)
        self.shard_grid: Index | None = None
        if self._sharding is not None:
            self.shard_grid = tuple(size // chunk for size, chunk in zip(array.shards, self.chunks, strict=True))

    def _codec(self) -> CodecParams:
        number = next((i for i, codec in enumerate(self._chain) if isinstance(codec, CodecParams)), None)
        names = ", ".join(map(_name, self._chain)) or "no codec"
        if number is None:
            raise UnsupportedPayload(f"{self.name} is stored with {names}, not with DeepSIC")
        self._before, trailing = self._chain[:number], self._chain[number + 1 :]
        if not all(isinstance(codec, Crc32cCodec) for codec in trailing):
            raise UnsupportedPayload(
                f"{self.name} is stored with {names}: a codec after DeepSIC hides its headers and saves "
                "nothing; rewrite the array with deepsic_codec.create_array, or with compressors=None"
            )
        self._checksums = len(trailing)
        codec: CodecParams = self._chain[number]
        return codec.resolved()

    def check_first(self) -> None:
        """Raise UnsupportedArray if DeepSIC is not the first codec: others may move the tiles that headers describe."""
        if self._before:
            names = ", ".join(map(_name, self._chain))
            raise UnsupportedArray(f"{self.name} is stored with {names}: labels need DeepSIC as the first codec")

    def check_writable(self) -> None:
        """Raise UnsupportedArray or UnsupportedPayload if `stored_bytes` and `build_shard` do not know all codecs."""
        if self._before:
            names = ", ".join(map(_name, self._before))
            raise UnsupportedArray(
                f"{self.name} has other codecs before DeepSIC ({names}), which the bulk writer does not "
                "support; write it through zarr, or create it with create_array"
            )
        if self._sharding is not None:
            _ = self._index_format

    def check_index(self, index: Sequence[int]) -> None:
        """Raise IndexError unless the array has a chunk at this position."""
        if len(index) != len(self.grid) or not all(0 <= i < n for i, n in zip(index, self.grid, strict=True)):
            raise IndexError(f"chunk {tuple(index)}: {self.name} has a grid of {self.grid} chunks")

    def key(self, index: Index) -> str:
        """Return the key of a shard at a position in the grid of shards, or of a chunk if there are no shards."""
        key: str = self._metadata.encode_chunk_key(index)
        return f"{self._prefix}/{key}" if self._prefix else key

    def shard_of(self, index: Index) -> Index:
        """Return the position of the shard that has a chunk."""
        return tuple(i // n for i, n in zip(index, self._shards, strict=True))

    @property
    def _shards(self) -> Index:
        assert self.shard_grid is not None
        return self.shard_grid

    # What is stored of a payload.

    def stored_length(self, payload_length: int) -> int:
        """Return the number of bytes that a payload of this length has with its checksums."""
        return payload_length + 4 * self._checksums

    def stored_bytes(self, payload: bytes) -> bytes:
        """Return a payload with its checksums."""
        return _with_checksums(payload, self._checksums)

    # Shards.

    @cached_property
    def _index_format(self) -> tuple[str, int, bool]:
        """Dtype of the numbers of a shard index, number of its checksums, and whether it comes first."""
        assert self._sharding is not None
        numbers, *checks = self._sharding.index_codecs
        if not isinstance(numbers, BytesCodec) or not all(isinstance(codec, Crc32cCodec) for codec in checks):
            raise UnsupportedPayload(
                f"{self.name}: the shard index has unsupported codecs {self._sharding.index_codecs}"
            )
        dtype = ">u8" if setting(numbers.endian) == "big" else "<u8"
        return dtype, len(checks), setting(self._sharding.index_location) == "start"

    def shard_index_range(self) -> ByteRequest:
        """Return the part of a shard that holds its index."""
        _, checksums, first = self._index_format
        size = 16 * prod(self._shards) + 4 * checksums
        return RangeByteRequest(0, size) if first else SuffixByteRequest(size)

    def parse_shard_index(self, data: bytes, shard: Index) -> NDArray[np.uint64]:
        """Read a shard index from the `shard_index_range` of the shard at a position.

        Returns uint64 (chunks of a shard along each axis, 2): offset and length in bytes, both `MISSING` for a missing
        chunk. Raises CorruptPayload for an index that is truncated or does not match its checksums.
        """
        dtype, checksums, _ = self._index_format
        if len(data) != 16 * prod(self._shards) + 4 * checksums:
            raise CorruptPayload(f"shard {shard} of {self.name}: truncated index")
        for _ in range(checksums):
            data, checksum = data[:-4], data[-4:]
            if crc32c(data) != int.from_bytes(checksum, "little"):
                raise CorruptPayload(f"shard {shard} of {self.name}: the checksum of the index does not match")
        return np.frombuffer(data, dtype).reshape(*self._shards, 2)

    def locate(self, index: Index, table: NDArray[np.uint64] | None) -> PayloadLocation | None:
        """Find a chunk; None if it is not stored, which without shards only reading it tells.

        `table` is the index of its shard, None for a missing shard or an array without shards.
        """
        if self.shard_grid is None:
            return PayloadLocation(self.key(index))
        if table is None:
            return None
        offset, length = table[tuple(i % n for i, n in zip(index, self.shard_grid, strict=True))].tolist()
        if offset == MISSING and length == MISSING:
            return None
        return PayloadLocation(self.key(self.shard_of(index)), offset, length)

    def build_shard(self, payloads: Mapping[Index, bytes]) -> bytes:
        """Put a shard together.

        Parameters
        ----------
        payloads : mapping of tuple of int to bytes
            By position in the grid of chunks of the array. Chunks that are left out read as the fill value.

        Returns
        -------
        bytes
            The whole shard: payloads in the order of the grid, and the index of their offsets and lengths.
        """
        dtype, checksums, first = self._index_format
        table = np.full((*self._shards, 2), MISSING, dtype)
        parts, offset = [], table.nbytes + 4 * checksums if first else 0
        for index, payload in sorted(payloads.items()):
            data = self.stored_bytes(payload)
            table[tuple(i % n for i, n in zip(index, self._shards, strict=True))] = offset, len(data)
            parts.append(data)
            offset += len(data)
        numbers = _with_checksums(table.tobytes(), checksums)
        return b"".join([numbers, *parts] if first else [*parts, numbers])


def codec_names(array: Any) -> str:
    """Return the names of the codecs in the metadata of any array, in their order, "none" without any."""
    metadata = array.metadata
    if metadata.zarr_format == 2:
        names = [codec.codec_id for codec in (*(metadata.filters or ()), metadata.compressor) if codec is not None]
    else:
        names = [codec.to_dict().get("name", _name(codec)) for codec in metadata.codecs]
    return ", ".join(map(setting, names)) or "none"


def _with_checksums(data: bytes, count: int) -> bytes:
    for _ in range(count):
        data += crc32c(data).to_bytes(4, "little")
    return data


def _name(codec: Any) -> str:
    return type(codec).__name__
