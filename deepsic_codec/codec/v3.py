"""The codec of Zarr format 3: an array-to-bytes codec, zarr's `serializer`."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

from deepsic_codec._compat import Buffer, NDBuffer, native_dtype
from deepsic_codec.codec.batching import raise_first
from deepsic_codec.codec.chunk import ChunkToEncode, check_axes, check_chunk, prepare_chunk
from deepsic_codec.codec.decode import DECODER, PayloadToDecode, parse_payload
from deepsic_codec.codec.encode import ENCODER
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.scaled import check_values
from deepsic_codec.errors import ConfigurationError

NAME = "deepsic"


class DeepSICCodec(CodecParams, ArrayBytesCodec):
    """Codec for Zarr format 3 with the parameters of `DeepSIC`, writing the same payloads.

    Pass it as `zarr.create_array(..., serializer=DeepSICCodec(), compressors=None)`. Without the `None`, zarr appends
    Zstd, and labels can only be read with whole chunks. `deepsic_codec.create_array` passes it for you.
    """

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Make a codec from its entry in array metadata."""
        if data.get("name") != NAME:
            raise ConfigurationError(f"name: expected {NAME!r}, got {data.get('name')!r}")
        return cls.from_json(data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of this codec in array metadata."""
        return {"name": NAME, "configuration": self.to_json()}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Raise for an array that cannot be coded; zarr calls this when an array is created or opened."""
        check_chunk(getattr(chunk_grid, "chunk_shape", shape), native_dtype(dtype), self)

    def evolve_from_array_spec(self, array_spec: Any) -> Self:
        """Return this codec with its model resolved, as the metadata of the array has it.

        Also checks dtype and axes, which zarr 3.1 does not pass to `validate` for chunks in shards.
        """
        # Depending on the version of zarr, the shape here is the chunk's or the array's: only dtype and axes are sure.
        check_values(native_dtype(array_spec.dtype), self)
        check_axes(array_spec.shape, self.axes)
        return self.resolved()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Raise NotImplementedError: the size depends on the content."""
        raise NotImplementedError

    def _encode_job(self, chunk: NDBuffer, spec: Any) -> ChunkToEncode:
        # zarr may pass the user's own array here, strided and in another byte order. Memory order is no property of
        # a format 3 array, so the payload says C whatever it was: equal pixels give equal bytes.
        array = chunk.as_numpy_array().astype(native_dtype(spec.dtype), copy=False)
        return prepare_chunk(self, array, order="C")

    def _decode_job(self, data: Buffer, spec: Any) -> PayloadToDecode:
        return parse_payload(data.to_bytes(), spec.shape, native_dtype(spec.dtype), self)

    def _encode_sync(self, chunk: NDBuffer, spec: Any) -> Buffer | None:
        return _buffer(raise_first(ENCODER.submit([self._encode_job(chunk, spec)]))[0], spec)

    def _decode_sync(self, data: Buffer, spec: Any) -> NDBuffer:
        return _ndbuffer(raise_first(DECODER.submit([self._decode_job(data, spec)]))[0], spec)

    async def _encode_single(self, chunk: NDBuffer, spec: Any) -> Buffer | None:
        return (await self.encode([(chunk, spec)]))[0]

    async def _decode_single(self, data: Buffer, spec: Any) -> NDBuffer:
        (array,) = await self.decode([(data, spec)])
        assert array is not None  # as the input is not
        return array

    async def encode(self, chunks_and_specs: Iterable[tuple[NDBuffer | None, Any]]) -> list[Buffer | None]:
        """Encode chunks in one call; None stays None."""
        pairs = list(chunks_and_specs)
        jobs = [self._encode_job(chunk, spec) for chunk, spec in pairs if chunk is not None]
        payloads = iter(raise_first(await ENCODER.submit_async(jobs)))
        return [None if chunk is None else _buffer(next(payloads), spec) for chunk, spec in pairs]

    async def decode(self, chunks_and_specs: Iterable[tuple[Buffer | None, Any]]) -> list[NDBuffer | None]:
        """Decode payloads in one call; None stays None."""
        pairs = list(chunks_and_specs)
        jobs = [self._decode_job(data, spec) for data, spec in pairs if data is not None]
        arrays = iter(raise_first(await DECODER.submit_async(jobs)))
        return [None if data is None else _ndbuffer(next(arrays), spec) for data, spec in pairs]


def _buffer(payload: bytes, spec: Any) -> Buffer:
    return spec.prototype.buffer.from_bytes(payload)


def _ndbuffer(array: np.ndarray, spec: Any) -> NDBuffer:
    return spec.prototype.nd_buffer.from_numpy_array(array)


register_codec(NAME, DeepSICCodec)  # for checkouts that are not installed; an installed package is found by entry point
