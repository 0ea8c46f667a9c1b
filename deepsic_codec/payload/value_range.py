"""Value scaling of a payload: samples of any dtype to 64ths of a grey level and back. See `docs/format.md`.

Integer samples are scaled in integers, float32 in float64 with every operation written out, so that the same section
gives the same samples on every machine.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.header import Header

UNIT = 64  # of a grey level
TOP = 255 * UNIT  # the end of a range; its start is 0
MIDDLE = 128 * UNIT  # a range of one value
ONE, EACH = 0, 1  # layouts: one range for all bands, or one for each
TABLE = 1 << 16  # samples from which on a table of all values is faster than arithmetic

Ranges = NDArray[Any]


def full_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the least and the largest value of an integer dtype."""
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def encode_ranges(ranges: Ranges) -> bytes:
    """Write a value scaling section.

    Parameters
    ----------
    ranges : ndarray
        (bands, 2), of the chunk's dtype: the value that becomes 0 and the one that becomes 255, not below it.

    Returns
    -------
    bytes
        The section; one range if all are equal.
    """
    same = bool((ranges == ranges[:1]).all())
    stored = ranges[:1] if same else ranges
    return bytes((ONE if same else EACH,)) + stored.astype(stored.dtype.newbyteorder("<")).tobytes()


def decode_ranges(data: bytes, header: Header) -> Ranges:
    """Read a value scaling section.

    Returns
    -------
    ndarray
        (bands, 2), of the chunk's dtype in the byte order of this machine.

    Raises
    ------
    CorruptPayload
        If the section is not exactly that of such a chunk, or a range is not finite or ends before it starts.
    UnsupportedPayload
        If it has another layout.
    """
    if not data:
        raise CorruptPayload("value scaling section: it is empty")
    if data[0] not in (ONE, EACH):
        raise UnsupportedPayload(f"value scaling section: layout {data[0]}; upgrade deepsic_codec")
    dtype = header.dtype.newbyteorder("<")
    count = header.channels if data[0] == EACH else 1
    if len(data) != 1 + count * 2 * dtype.itemsize:
        raise CorruptPayload(f"value scaling section: {len(data)} bytes, expected {1 + count * 2 * dtype.itemsize}")
    ranges = np.frombuffer(data, dtype, offset=1).reshape(count, 2).astype(dtype.newbyteorder("="))
    if not (np.isfinite(ranges).all() and (ranges[:, 0] <= ranges[:, 1]).all()):
        raise CorruptPayload("value scaling section: a range that is not finite, or ends before it starts")
    return np.broadcast_to(ranges, (header.channels, 2))


def to_fine(samples: NDArray[Any], ranges: Ranges) -> NDArray[np.int16]:
    """Scale samples.

    Parameters
    ----------
    samples : ndarray
        (..., bands), of the dtype of the ranges; finite. What lies outside of its range is clipped to it.
    ranges : ndarray
        (bands, 2).

    Returns
    -------
    ndarray
        int16 in 64ths of a grey level, 0 to 16320, of the same shape.
    """
    out = np.empty(samples.shape, np.int16)
    for band, pick in _parts(ranges):
        low, high = ranges[band]
        part = samples[..., pick]
        if samples.dtype.kind == "f":
            out[..., pick] = _float_to_fine(part, float(low), float(high))
        elif part.size < TABLE:
            out[..., pick] = _to_fine(part, int(low), int(high))
        else:
            table = _table_to_fine(samples.dtype.str, int(low), int(high))
            out[..., pick] = table[part.view(f"u{samples.dtype.itemsize}")]
    return out


def from_fine(fine: NDArray[np.int16], ranges: Ranges) -> NDArray[Any]:
    """Scale back: 64ths (..., bands), each from 0 to 16320, to samples of the dtype of the ranges."""
    out = np.empty(fine.shape, ranges.dtype)
    for band, pick in _parts(ranges):
        low, high = ranges[band].tolist()
        out[..., pick] = _table_from_fine(ranges.dtype.str, low, high)[fine[..., pick]]
    return out


def _parts(ranges: Ranges) -> list[tuple[int, Any]]:
    """Return bands that are scaled together, as the number of the first and what picks them all."""
    if (ranges == ranges[:1]).all():
        return [(0, slice(None))]
    return [(band, slice(band, band + 1)) for band in range(len(ranges))]


def _to_fine(values: NDArray[Any], low: int, high: int) -> NDArray[np.int16]:
    if low == high:
        return np.full(values.shape, MIDDLE, np.int16)
    extent = high - low
    steps = np.clip(values.astype(np.int64), low, high) - low
    return ((2 * TOP * steps + extent) // (2 * extent)).astype(np.int16)


def _float_to_fine(values: NDArray[Any], low: float, high: float) -> NDArray[np.int16]:
    if low == high:
        return np.full(values.shape, MIDDLE, np.int16)
    steps = np.clip(values.astype(np.float64), low, high)
    steps -= low
    steps *= TOP
    steps /= high - low
    steps += 0.5
    return np.clip(steps, 0, TOP).astype(np.int16)  # truncation is rounding now


@lru_cache(maxsize=64)
def _table_to_fine(dtype: str, low: int, high: int) -> NDArray[np.int16]:
    size = np.dtype(dtype).itemsize
    return _to_fine(np.arange(1 << 8 * size).astype(f"u{size}").view(dtype), low, high)


@lru_cache(maxsize=256)
def _table_from_fine(dtype: str, low: Any, high: Any) -> NDArray[Any]:
    if np.dtype(dtype).kind == "f":
        steps = np.arange(TOP + 1, dtype=np.float64) * (high - low) / TOP + low
        return np.clip(steps.astype(np.float32), np.float32(low), np.float32(high))
    extent = high - low
    return (low + (2 * np.arange(TOP + 1) * extent + TOP) // (2 * TOP)).astype(dtype)
