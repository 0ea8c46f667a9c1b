"""The wavelet section of a payload: quantised bands of components, and what they decode to. See `docs/wavelet.md`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.steps import FRACTION_BITS, STEPS

PLAIN = 0  # layout
_FIXED = 3  # bytes before the stream: layout, code of the step


@dataclass(frozen=True)
class Wavelet:
    """Coded components.

    Attributes
    ----------
    code : int
        Of the quantiser's step.
    stream : bytes
        The arithmetic-coded bands.
    """

    code: int
    stream: bytes

    def decode(self, shape: tuple[int, int, int, int]) -> NDArray[np.int32]:
        """Return the components, int32 of a shape (slices, components, height, width), in sixteenths.

        Raises
        ------
        CorruptPayload
            If the stream is damaged.
        """
        from deepsic_codec.payload.coders.subbands import decode_planes  # numba, which reading labels does not need

        return to_components(decode_planes(self.stream, shape, self.code))


def to_components(coefficients: NDArray[np.int32]) -> NDArray[np.int32]:
    """Transform coefficients (slices, components, height, width) back; they are overwritten."""
    from deepsic_codec.payload.coders.wavelet import inverse

    for planes in coefficients:
        for plane in planes:
            inverse(plane)
    return coefficients


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
    return bytes((PLAIN,)) + wavelet.code.to_bytes(2, "little") + wavelet.stream


def decode_wavelet(data: bytes, header: Header) -> Wavelet:
    """Read a wavelet section.

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
    return Wavelet(code, data[_FIXED:])


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
