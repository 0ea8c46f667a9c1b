"""The value range section of a payload: samples of any dtype to 64ths of a grey level and back. See `docs/format.md`.

Scaled samples are fixed point numbers with six fractional bits: q6.

Integer samples are scaled in integers, float32 in float64 with every operation written out, so that the same section
gives the same samples on every machine.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header

Q6 = 64  # units of a grey level
MAX_Q6 = 255 * Q6  # the end of a range; its start is 0
MIDDLE_Q6 = 128 * Q6  # where the only value of an empty range lies
SHARED, PER_BAND = 0, 1  # layouts: one range for all bands, or one for each band
TABLE_MIN_SAMPLES = 1 << 16  # from here on a table of all values is faster than arithmetic

Ranges = NDArray[Any]


def full_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the least and the largest value of an integer dtype."""
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def encode_ranges(ranges: Ranges) -> bytes:
    """Write a value range section, which has one range if all are equal.

    Parameters
    ----------
    ranges : ndarray
        (bands, 2), of the chunk's dtype: the values that become grey levels 0 and 255, the first at most the second.
    """
    same = bool((ranges == ranges[:1]).all())
    stored = ranges[:1] if same else ranges
    return bytes((SHARED if same else PER_BAND,)) + stored.astype(stored.dtype.newbyteorder("<")).tobytes()


def decode_ranges(data: bytes, header: Header) -> Ranges:
    """Read a value range section: (bands, 2), of the chunk's dtype in the byte order of this machine.

    Raises
    ------
    CorruptPayload
        If the section is not exactly that of such a chunk, or a range is not finite or ends before it starts.
    UnsupportedPayload
        If it has another layout.
    """
    if not data:
        raise CorruptPayload("value range section: empty")
    if data[0] not in (SHARED, PER_BAND):
        raise UnsupportedPayload(f"value range section: unknown layout {data[0]}; upgrade deepsic_codec")
    dtype = header.dtype.newbyteorder("<")
    count = header.channels if data[0] == PER_BAND else 1
    if len(data) != 1 + count * 2 * dtype.itemsize:
        raise CorruptPayload(f"value range section: {len(data)} bytes, expected {1 + count * 2 * dtype.itemsize}")
    ranges = np.frombuffer(data, dtype, offset=1).reshape(count, 2).astype(dtype.newbyteorder("="))
    if not (np.isfinite(ranges).all() and (ranges[:, 0] <= ranges[:, 1]).all()):
        raise CorruptPayload("value range section: a range is not finite, or ends before it starts")
    return np.broadcast_to(ranges, (header.channels, 2))


def to_q6(samples: NDArray[Any], ranges: Ranges) -> NDArray[np.int16]:
    """Scale finite samples (..., bands) to int16 in q6 grey levels, 0 to 16320.

    Samples have the dtype of the ranges (bands, 2). Those outside of their range are clipped to it.
    """
    out = np.empty(samples.shape, np.int16)
    for band, group in _band_groups(ranges):
        low, high = ranges[band]
        part = samples[..., group]
        if low == high:
            out[..., group] = MIDDLE_Q6
        elif samples.dtype.kind == "f":
            out[..., group] = _float_to_q6(part, float(low), float(high))
        elif part.size < TABLE_MIN_SAMPLES:
            out[..., group] = _integer_to_q6(part, int(low), int(high))
        else:
            table = _table_to_q6(samples.dtype.str, int(low), int(high))
            out[..., group] = table[part.view(f"u{samples.dtype.itemsize}")]
    return out


def from_q6(scaled: NDArray[np.int16], ranges: Ranges) -> NDArray[Any]:
    """Undo `to_q6`, but for rounding and clipping: return samples of the dtype of the ranges."""
    out = np.empty(scaled.shape, ranges.dtype)
    for band, group in _band_groups(ranges):
        low, high = ranges[band].tolist()
        out[..., group] = _table_from_q6(ranges.dtype.str, low, high)[scaled[..., group]]
    return out


def _band_groups(ranges: Ranges) -> list[tuple[int, Any]]:
    """Return the bands that have one range: the first band, and an index of all of them."""
    if (ranges == ranges[:1]).all():
        return [(0, slice(None))]
    return [(band, slice(band, band + 1)) for band in range(len(ranges))]


def _integer_to_q6(values: NDArray[Any], low: int, high: int) -> NDArray[np.int16]:
    extent = high - low
    steps = np.clip(values.astype(np.int64), low, high) - low
    return ((2 * MAX_Q6 * steps + extent) // (2 * extent)).astype(np.int16)


def _float_to_q6(values: NDArray[Any], low: float, high: float) -> NDArray[np.int16]:
    steps = np.clip(values.astype(np.float64), low, high)
    steps -= low
    steps *= MAX_Q6
    steps /= high - low
    steps += 0.5
    return np.clip(steps, 0, MAX_Q6).astype(np.int16)  # truncation is rounding now


@lru_cache(maxsize=64)
def _table_to_q6(dtype: str, low: int, high: int) -> NDArray[np.int16]:
    size = np.dtype(dtype).itemsize
    return _integer_to_q6(np.arange(1 << 8 * size).astype(f"u{size}").view(dtype), low, high)


@lru_cache(maxsize=256)
def _table_from_q6(dtype: str, low: Any, high: Any) -> NDArray[Any]:
    if np.dtype(dtype).kind == "f":
        steps = np.arange(MAX_Q6 + 1, dtype=np.float64) * (high - low) / MAX_Q6 + low
        # versions of NumPy differ in which of two zeros `clip` returns: all zeros become positive
        return np.clip(steps.astype(np.float32), np.float32(low), np.float32(high)) + np.float32(0)
    extent = high - low
    return (low + (2 * np.arange(MAX_Q6 + 1) * extent + MAX_Q6) // (2 * MAX_Q6)).astype(dtype)
