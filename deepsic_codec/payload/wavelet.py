"""The wavelet section of a payload: quantised bands of components, and what they decode to. See `docs/wavelet.md`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.quality_map import QualityMap
from deepsic_codec.payload.steps import FRACTION_BITS, STEPS

PLAIN = 0  # layout
_FIXED = 4  # bytes before the checkpoints: layout, code of the step, number of checkpoints
_CHECKPOINT = 8  # bytes: a length and a checksum
MAX_CHECKPOINTS = 4  # reduced sizes down to 1/16
MIN_CHECKED = 1 << 13  # bytes of a stream from which on checkpoints are worth their bytes
#: Bytes of a section up to the end of its checkpoints, at most.
START = _FIXED + _CHECKPOINT * MAX_CHECKPOINTS


@dataclass(frozen=True)
class Wavelet:
    """Coded components.

    Attributes
    ----------
    code : int
        Of the quantiser's step.
    stream : bytes
        The arithmetic-coded bands; or the start of it, for planes at a reduced size.
    checkpoints : tuple of int
        Bytes from the start of the stream that hold planes at reduced sizes, ascending: the last one those at a half.
    """

    code: int
    stream: bytes
    checkpoints: tuple[int, ...] = ()

    def decode(
        self, shape: tuple[int, int, int, int], halvings: int = 0, quality_map: QualityMap | None = None
    ) -> NDArray[np.int32]:
        """Return the components, int32 of a shape (slices, components, height, width), in sixteenths.

        With `halvings`, each plane has a half, a quarter, ... of its rows and columns, rounded up.

        Raises
        ------
        CorruptPayload
            If the stream is damaged.
        """
        from deepsic_codec.payload.coders.subbands import decode_planes  # numba, which reading labels does not need

        return to_components(decode_planes(self.stream, shape, self.code, halvings, quality_map), halvings)


def make_checkpoints(stream: bytes, lengths: list[int]) -> tuple[int, ...]:
    """Return the checkpoints of a stream; `lengths` are those of `encode_planes`."""
    return tuple(lengths[-MAX_CHECKPOINTS:]) if len(stream) >= MIN_CHECKED else ()


def start_length(data: bytes, scale: int) -> int | None:
    """Return the bytes of a section that planes at 1/scale of their size need; None if all of them.

    `data` is its start, `START` bytes or the whole.
    """
    wavelet, halvings = decode_wavelet(data), scale.bit_length() - 1
    if not 0 < halvings <= len(wavelet.checkpoints):
        return None
    return _FIXED + _CHECKPOINT * len(wavelet.checkpoints) + wavelet.checkpoints[-halvings]


def wavelet_start(data: bytes, scale: int) -> bytes:
    """Return the start of a section that planes at 1/scale of their size need.

    Raises
    ------
    CorruptPayload
        If it is not there, or its checksum does not match.
    """
    from google_crc32c import value as crc32c  # not installed where only images are trained on

    length, count = start_length(data, scale), data[_FIXED - 1]
    if length is None or len(data) < length:
        raise CorruptPayload(f"wavelet section: truncated, {len(data)} of {length or 'more'} bytes")
    checksums, stream = _FIXED + 4 * count, _FIXED + _CHECKPOINT * count
    place = stream - 4 * (scale.bit_length() - 1)
    if crc32c(data[:checksums] + data[stream:length]) != int.from_bytes(data[place : place + 4], "little"):
        raise CorruptPayload("wavelet section: the checksum of the start does not match")
    return data[:length]


def to_components(coefficients: NDArray[np.int32], halvings: int = 0) -> NDArray[np.int32]:
    """Transform coefficients (slices, components, height, width) back, to a reduced size; they are overwritten."""
    from deepsic_codec.payload.coders.wavelet import inverse

    height, width = coefficients.shape[2:]
    for planes in coefficients:
        for plane in planes:
            height, width = inverse(plane, halvings).shape
    return coefficients[..., :height, :width]


def rounded(components: NDArray[np.int32]) -> NDArray[np.int32]:
    """Round components in sixteenths to integers; the largest wrap around."""
    return components + (1 << FRACTION_BITS - 1) >> FRACTION_BITS


def to_coefficients(components: NDArray[np.int32]) -> NDArray[np.int32]:
    """Transform components int32 (slices, components, height, width) below 2^28, in sixteenths; a new array."""
    from deepsic_codec.payload.coders.wavelet import forward

    out = np.empty(components.shape, np.int32)
    for number, planes in enumerate(components):
        for k, plane in enumerate(planes):
            out[number, k] = forward(plane)
    return out


def encode_wavelet(wavelet: Wavelet) -> bytes:
    """Write a wavelet section."""
    from google_crc32c import value as crc32c

    start = bytes((PLAIN,)) + wavelet.code.to_bytes(2, "little") + bytes((len(wavelet.checkpoints),))
    start += b"".join(length.to_bytes(4, "little") for length in wavelet.checkpoints)
    checksums = [crc32c(start + wavelet.stream[:length]) for length in wavelet.checkpoints]
    return start + b"".join(crc.to_bytes(4, "little") for crc in checksums) + wavelet.stream


def decode_wavelet(data: bytes, header: Header | None = None) -> Wavelet:
    """Read a wavelet section, or its start.

    Raises
    ------
    CorruptPayload
        If it is too short, or has no such step.
    UnsupportedPayload
        If it has another layout.
    """
    if len(data) < _FIXED:
        raise CorruptPayload(f"wavelet section: {len(data)} bytes, expected at least {_FIXED}")
    if data[0] != PLAIN:
        raise UnsupportedPayload(f"wavelet section: unknown layout {data[0]}; upgrade deepsic_codec")
    code = data[1] | data[2] << 8
    if code >= STEPS:
        raise CorruptPayload(f"wavelet section: step {code}, expected 0 to {STEPS - 1}")
    start = _FIXED + _CHECKPOINT * data[3]
    if data[3] > MAX_CHECKPOINTS or len(data) < start:
        raise CorruptPayload(f"wavelet section: {data[3]} checkpoints in {len(data)} bytes")
    places = range(_FIXED, _FIXED + 4 * data[3], 4)
    checkpoints = tuple(int.from_bytes(data[place : place + 4], "little") for place in places)
    if list(checkpoints) != sorted(checkpoints):
        raise CorruptPayload("wavelet section: the lengths of checkpoints fall")
    return Wavelet(code, data[start:], checkpoints)


def from_integers(values: NDArray[np.int32], dtype: np.dtype[Any], ranges: NDArray[Any] | None) -> NDArray[Any]:
    """Turn decoded integers (..., bands) into samples of a dtype.

    Those of integer dtypes are the samples, clipped to the dtype; float32 needs its ranges (bands, 2).
    """
    if dtype.kind != "f":
        info = np.iinfo(dtype)
        return np.clip(values, info.min, info.max).astype(dtype)
    assert ranges is not None
    low, high = ranges[:, 0].astype(np.float64), ranges[:, 1].astype(np.float64)
    samples = values * (high - low)
    samples /= FLOAT_LEVELS
    samples += low
    result = np.clip(samples, low, high).astype(np.float32)
    result += np.float32(0)  # zeros become positive: versions of NumPy differ in which of two zeros `clip` returns
    return result


def to_integers(samples: NDArray[Any], ranges: NDArray[Any] | None) -> NDArray[np.int32]:
    """Undo `from_integers`, but for rounding; float32 outside of its range is clipped to it."""
    if samples.dtype.kind != "f":
        return samples.astype(np.int32)
    assert ranges is not None
    low, high = ranges[:, 0].astype(np.float64), ranges[:, 1].astype(np.float64)
    values = np.clip(samples, ranges[:, 0], ranges[:, 1]) - low
    values *= FLOAT_LEVELS
    values /= np.where(high > low, high - low, 1)
    values += 0.5
    return np.floor(values).astype(np.int32)


#: Integers between the ends of the range of float32 samples.
FLOAT_LEVELS = 1 << 20
