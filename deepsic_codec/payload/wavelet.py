"""The wavelet section of a payload: quantised bands of components, and what they decode to. See `docs/wavelet.md`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div, row_blocks
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.quality_map import QualityMap
from deepsic_codec.payload.steps import FRACTION_BITS, STEPS

PLAIN, FILTERED = 0, 1  # layouts
_FIXED = 4  # bytes before the checkpoints: layout, code of the step, numbers of levels and parts
MAX_CHECKPOINTS = 4  # reduced sizes down to 1/16
PARTS, MAX_FOURS = 4, 31  # a stream is divided into a multiple of so many parts, up to so many times
PART = 1 << 11  # bytes of a part, at least: each of 4 bytes of checksum, or 0.2 %
MIN_CHECKED = PARTS * PART  # bytes of a stream from which on checkpoints are worth their bytes


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
    whole : bool
        Whether `stream` is all of it.
    filtered : bool
        Whether decoded components are meant to be filtered, which `decode` leaves to its caller.
    """

    code: int
    stream: bytes
    checkpoints: tuple[int, ...] = ()
    whole: bool = True
    filtered: bool = False

    def decode(
        self,
        shape: tuple[int, int, int, int],
        halvings: int = 0,
        quality_map: QualityMap | None = None,
        dtype: Any = np.int32,
    ) -> NDArray[Any]:
        """Return the components of a shape (slices, components, height, width), in sixteenths.

        They are int32, or int16 where that is `dtype` and all that is decoded fits.

        With `halvings`, each plane has a half, a quarter, ... of its rows and columns, rounded up. Details that the
        start of a stream does not hold are 0.

        Raises
        ------
        CorruptPayload
            If the stream is damaged.
        """
        from deepsic_codec.payload.coders.subbands import decode_planes  # numba, which reading labels does not need

        planes = decode_planes(self.stream, shape, self.code, halvings, quality_map, whole=self.whole, dtype=dtype)
        return to_components(planes, halvings)


def make_checkpoints(stream: bytes, lengths: list[int]) -> tuple[int, ...]:
    """Return the checkpoints of a stream; `lengths` are those of `encode_planes`."""
    return tuple(lengths[-MAX_CHECKPOINTS:]) if len(stream) >= MIN_CHECKED else ()


def _ends(checkpoints: tuple[int, ...], parts: int, size: int) -> list[int]:
    """Return the bytes of a stream of `size` bytes that each checksum covers, ascending."""
    return sorted([*checkpoints, *(size * n // parts for n in range(1, parts))])


def _parts(data: bytes) -> int:
    """Return the number of parts of the stream of a section."""
    return PARTS * (data[_FIXED - 1] >> 3)


def _places(data: bytes) -> tuple[int, int]:
    """Return where the checksums and the stream of a section begin."""
    levels = data[_FIXED - 1] & 7
    return _FIXED + 4 * levels, _FIXED + 4 * levels + 4 * (levels + _parts(data) - 1 if levels else 0)


def checksums_length(data: bytes, size: int) -> int:
    """Return the bytes of a section of `size` bytes up to the end of its checksums; of an empty start, fewer."""
    return min(size, _FIXED if len(data) < _FIXED else _places(data)[1])


def start_length(data: bytes, size: int, scale: int, limit: int | None = None, groups: int | None = None) -> int:
    """Return the bytes of a section that planes at 1/scale of their size need.

    Parameters
    ----------
    data : bytes
        The start of the section, up to the end of its checksums at least.
    size : int
        Bytes of the section.
    scale : int
        A power of 2.
    limit : int, optional
        Return no more bytes than these, as far as a checksum ends there, but those of the first one.
    groups : int, optional
        Return no more bytes than those of so many checksums, 1 at least.
    """
    checkpoints, (_, stream) = decode_wavelet(data).checkpoints, _places(data)
    halvings = min(scale.bit_length() - 1, len(checkpoints))  # small planes have fewer levels
    needed = min(size, stream + checkpoints[-halvings]) if halvings else size
    ends = [min(size, stream + end) for end in _ends(checkpoints, _parts(data), size - stream)]
    if groups is not None:
        needed = min([needed, *ends[groups - 1 : groups]])
    if limit is None or limit >= needed:
        return needed
    return max((end for end in ends if end <= limit), default=min([needed, *ends]))


def verified_start(data: bytes, size: int) -> bytes:
    """Return the start of a section of `size` bytes, which ends where a checksum does; raises CorruptPayload."""
    from google_crc32c import value as crc32c  # not installed where only images are trained on

    checksums, stream = _places(data)
    number = _ends(decode_wavelet(data).checkpoints, _parts(data), size - stream).index(len(data) - stream)
    place = checksums + 4 * number
    if crc32c(data[:checksums] + data[stream:]) != int.from_bytes(data[place : place + 4], "little"):
        raise CorruptPayload("wavelet section: the checksum of the start does not match")
    return data


def to_components(coefficients: NDArray[Any], halvings: int = 0) -> NDArray[Any]:
    """Transform coefficients (slices, components, height, width) back, to a reduced size; they are overwritten.

    They are int32 or int16; components are int32 where they do not fit int16.
    """
    from deepsic_codec.payload.coders.wavelet import join

    height, width = (ceil_div(size, 1 << halvings) for size in coefficients.shape[2:])
    return _in_place(coefficients, lambda plane: join(plane, halvings))[..., :height, :width]


def to_coefficients(components: NDArray[Any]) -> NDArray[Any]:
    """Transform components (slices, components, height, width) below 2^28, in sixteenths; they are overwritten.

    They are int32 or int16; coefficients are int32 where they do not fit int16.
    """
    from deepsic_codec.payload.coders.wavelet import split

    return _in_place(components, split)


def _in_place(planes: NDArray[Any], transform: Callable[[NDArray[Any]], int]) -> NDArray[Any]:
    """Transform each plane (slices, components, height, width) in place, as int32 from the first that is too large on.

    `transform` returns the largest magnitude of what it wrote.
    """
    from deepsic_codec.payload.coders.subbands import INT16_MAX

    planes = np.ascontiguousarray(planes)
    for place in np.ndindex(planes.shape[:2]):
        before = planes[place].copy() if planes.dtype == np.int16 else None
        if transform(planes[place]) > INT16_MAX and before is not None:
            planes = planes.astype(np.int32)
            planes[place] = before
            transform(planes[place])
    return planes


def each_plane(planes: NDArray[Any], transform: Callable[[NDArray[np.int32]], NDArray[np.int32]]) -> NDArray[Any]:
    """Transform each plane of int32 or int16 (slices, components, height, width), in place or as int32."""
    from deepsic_codec.payload.coders.subbands import fits_int16

    for place in np.ndindex(planes.shape[:2]):
        if planes.dtype == np.int32 and planes.flags.c_contiguous:
            transform(planes[place])
            continue
        values = transform(planes[place].astype(np.int32, order="C"))
        if planes.dtype == np.int16 and not fits_int16(values):
            planes = planes.astype(np.int32, order="C")
        planes[place][: values.shape[0], : values.shape[1]] = values
        del values  # before the next ones take memory
    return planes


def rounded(components: NDArray[np.int32]) -> NDArray[np.int32]:
    """Round components in sixteenths to integers; the largest wrap around."""
    return components + (1 << FRACTION_BITS - 1) >> FRACTION_BITS


def encode_wavelet(wavelet: Wavelet) -> bytes:
    """Write a wavelet section."""
    from google_crc32c import extend
    from google_crc32c import value as crc32c

    levels, size = len(wavelet.checkpoints), len(wavelet.stream)
    fours = max(1, min(MAX_FOURS, size // MIN_CHECKED)) if levels else 0
    start = (
        bytes((FILTERED if wavelet.filtered else PLAIN,))
        + wavelet.code.to_bytes(2, "little")
        + bytes((fours << 3 | levels,))
    )
    start += b"".join(length.to_bytes(4, "little") for length in wavelet.checkpoints)
    checksums, crc, before = [], crc32c(start), 0
    for end in _ends(wavelet.checkpoints, PARTS * fours, size):
        crc, before = extend(crc, wavelet.stream[before:end]), end
        checksums.append(crc)
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
    if data[0] not in (PLAIN, FILTERED):
        raise UnsupportedPayload(f"wavelet section: unknown layout {data[0]}; upgrade deepsic_codec")
    code = data[1] | data[2] << 8
    if code >= STEPS:
        raise CorruptPayload(f"wavelet section: step {code}, expected 0 to {STEPS - 1}")
    levels, parts = data[_FIXED - 1] & 7, _parts(data)
    if levels > MAX_CHECKPOINTS or bool(levels) != bool(parts):
        raise CorruptPayload(f"wavelet section: {levels} checkpoints and {parts} parts")
    first, start = _places(data)
    if len(data) < start:
        raise CorruptPayload(f"wavelet section: {levels} checkpoints in {len(data)} bytes")
    checkpoints = tuple(int.from_bytes(data[place : place + 4], "little") for place in range(_FIXED, first, 4))
    if list(checkpoints) != sorted(checkpoints):
        raise CorruptPayload("wavelet section: the lengths of checkpoints fall")
    return Wavelet(code, data[start:], checkpoints, filtered=data[0] == FILTERED)


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


def to_integers(samples: NDArray[Any], ranges: NDArray[Any] | None) -> NDArray[Any]:
    """Undo `from_integers`, but for rounding, for samples (slices, height, width, bands).

    float32 outside of its range is clipped to it. Samples of integer dtypes are returned as they are.
    """
    if samples.dtype.kind != "f":
        return samples
    assert ranges is not None
    low, high = ranges[:, 0].astype(np.float64), ranges[:, 1].astype(np.float64)
    out = np.empty(samples.shape, np.int32)
    for block in row_blocks(samples.shape):
        values = np.clip(samples[block], ranges[:, 0], ranges[:, 1]) - low
        values *= FLOAT_LEVELS
        values /= np.where(high > low, high - low, 1)
        values += 0.5
        out[block] = np.floor(values)
    return out


#: Integers between the ends of the range of float32 samples.
FLOAT_LEVELS = 1 << 20
