"""The cast section of a payload: the dtype of a chunk that is coded in a smaller one. See `docs/format.md`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header

BIG = 128  # bit of the dtype code
DTYPES = {code: np.dtype(f"<{name}") for code, name in enumerate(("?", "i4", "u4", "i8", "u8", "f8"), start=1)}
DTYPES |= {code | BIG: dtype.newbyteorder(">") for code, dtype in DTYPES.items() if dtype.itemsize > 1}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
CAST_DTYPES = tuple(dtype.newbyteorder("=") for code, dtype in DTYPES.items() if code < BIG)
# Coded dtypes of each kind of dtype.
SMALLER = {"b": ("u1",), "f": ("f4",), "i": ("u1", "u2", "f4"), "u": ("u1", "u2", "f4")}
LIMIT = 1 << 40  # of coded floats that stand for integers: beyond any that an encoder writes


@dataclass(frozen=True, eq=False)
class Cast:
    """What turns coded samples into those of the chunk.

    Attributes
    ----------
    dtype : numpy.dtype
        Of the chunk, with its byte order.
    offset : int
        Added to coded samples of integers.
    nodata : numpy.generic, optional
        Value of samples without data, if it is not that of the nodata section plus the offset.
    """

    dtype: np.dtype[Any]
    offset: int = 0
    nodata: Any = None

    def restore(self, coded: NDArray[Any], nodata: Any) -> NDArray[Any]:
        """Return decoded samples as those of the chunk; `nodata` is the value of the nodata section, or None."""
        native = self.dtype.newbyteorder("=")
        if self.dtype.kind in "iu":
            info = np.iinfo(native)
            ends = max(info.min - self.offset, -LIMIT), min(info.max - self.offset, LIMIT)
            is_float = coded.dtype.kind == "f"
            numbers = np.rint(np.nan_to_num(coded.astype(np.float64))) if is_float else coded.astype(np.int64)
            values = np.clip(numbers, *ends).astype(np.int64).astype(native) + native.type(self.offset)
        else:
            values = coded.astype(native)
        if self.nodata is not None:
            values[np.isnan(coded) if nodata != nodata else coded == nodata] = self.nodata
        return values.astype(self.dtype, copy=False)


def encode_cast(cast: Cast) -> bytes:
    """Write a cast section."""
    data = bytes((_CODES[cast.dtype],)) + (cast.offset % (1 << 64)).to_bytes(8, "little")
    return data if cast.nodata is None else data + np.array(cast.nodata, cast.dtype.newbyteorder("<")).tobytes()


def decode_cast(data: bytes, header: Header) -> Cast:
    """Read a cast section.

    Raises
    ------
    CorruptPayload
        If it is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it has a dtype that this version does not know.
    """
    if not data:
        raise CorruptPayload("cast section: empty")
    dtype = DTYPES.get(data[0])
    if dtype is None:
        raise UnsupportedPayload(f"cast section: unknown dtype code {data[0]}; upgrade deepsic_codec")
    if header.dtype.newbyteorder("=").str[1:] not in SMALLER[dtype.kind]:
        raise CorruptPayload(f"cast section: samples of {header.dtype} for {dtype}")
    if len(data) not in (9, 9 + dtype.itemsize) or (len(data) > 9 and dtype.kind == "b"):
        raise CorruptPayload(f"cast section: {len(data)} bytes, expected 9, or {9 + dtype.itemsize} with NoData")
    offset = int.from_bytes(data[1:9], "little", signed=dtype.kind != "u")
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    if not (offset == 0 if limits is None else limits.min <= offset <= limits.max):
        raise CorruptPayload(f"cast section: offset {offset} for {dtype}")
    value = np.frombuffer(data, dtype.newbyteorder("<"), offset=9)
    if not np.isfinite(value).all():
        raise CorruptPayload(f"cast section: NoData value {value[0]}")
    return Cast(dtype, offset, value[0].astype(dtype.newbyteorder("=")) if value.size else None)
