"""How an array is laid out in its store, as far as a writer of whole payloads has to know."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from deepsic_codec._compat import setting
from deepsic_codec.axes import Index
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.stored import layout as stored


class Layout:
    """Keys and bytes of an array whose chunks are payloads of DeepSIC and nothing but checksums after them.

    Parameters
    ----------
    array : zarr.Array
        The array.

    Raises
    ------
    UnsupportedPayload, UnsupportedArray
        If it is stored otherwise.
    """

    def __init__(self, array: Any) -> None:
        self.array = array
        self.config: CodecParams = stored.codec_of(array)
        metadata = array.metadata
        self.order = metadata.order if metadata.zarr_format == 2 else "C"
        codecs = () if metadata.zarr_format == 2 else tuple(metadata.codecs)
        sharding = codecs[0] if codecs and isinstance(codecs[0], ShardingCodec) else None
        outer = codecs[1:] if sharding else ()
        chain = tuple(sharding.codecs) if sharding else codecs
        before = metadata.filters if metadata.zarr_format == 2 else chain[: _position(chain)]
        if before or outer:
            raise UnsupportedArray(
                f"array {array.path!r} has other codecs around DeepSIC ({', '.join(map(_name, before or outer))}), "
                "which the bulk writer does not run; write it through zarr, or create it with create_array"
            )
        self.checksums = sum(isinstance(codec, Crc32cCodec) for codec in chain)  # behind each payload
        if sharding:
            numbers, *checks = sharding.index_codecs
            if not isinstance(numbers, BytesCodec) or not all(isinstance(codec, Crc32cCodec) for codec in checks):
                raise UnsupportedArray(f"array {array.path!r}: shard index stored with {sharding.index_codecs}")
            self._number = ">u8" if setting(numbers.endian) == "big" else "<u8"
            self._index_checksums = len(checks)
            self._index_first = setting(sharding.index_location) == "start"

    @property
    def shard_grid(self) -> Index:
        """Chunks of a shard along each axis."""
        return tuple(size // chunk for size, chunk in zip(self.array.shards, self.array.chunks, strict=True))

    def key(self, place: Index) -> str:
        """Return the key of a shard, or of a chunk where there are no shards."""
        key, path = self.array.metadata.encode_chunk_key(place), self.array.store_path.path
        return f"{path}/{key}" if path else key

    def stored_length(self, payload_length: int) -> int:
        """Return how many bytes a payload of this length has with its checksums."""
        return payload_length + 4 * self.checksums

    def stored_bytes(self, payload: bytes) -> bytes:
        """Return what is stored of a payload."""
        return _with_checksums(payload, self.checksums)

    def shard(self, payloads: Mapping[Index, bytes]) -> bytes:
        """Put a shard together.

        Parameters
        ----------
        payloads : mapping of tuple of int to bytes
            By position in the grid of chunks of the array; chunks that are not there read as the fill value.

        Returns
        -------
        bytes
            The whole shard: payloads in the order of the grid, and the index that says where they are.
        """
        table = np.full((*self.shard_grid, 2), stored.EMPTY, self._number)
        size = table.nbytes + 4 * self._index_checksums
        parts, offset = [], size if self._index_first else 0
        for index, payload in sorted(payloads.items()):
            data = self.stored_bytes(payload)
            table[tuple(i % n for i, n in zip(index, self.shard_grid, strict=True))] = offset, len(data)
            parts.append(data)
            offset += len(data)
        numbers = _with_checksums(table.tobytes(), self._index_checksums)
        return b"".join([numbers, *parts] if self._index_first else [*parts, numbers])


def _with_checksums(data: bytes, count: int) -> bytes:
    for _ in range(count):
        data += crc32c(data).to_bytes(4, "little")
    return data


def _position(chain: tuple[Any, ...]) -> int:
    return next(i for i, codec in enumerate(chain) if isinstance(codec, CodecParams))


def _name(codec: Any) -> str:
    return type(codec).__name__
