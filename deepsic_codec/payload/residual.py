"""The residual section of a payload: integers that correct decoded samples. See `docs/format.md`.

The section starts with how the integers are applied; `deepsic_codec.payload.coders.residual` codes the integers.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.nodata import NoData
from deepsic_codec.payload.varint import read_varint, write_varint

STEPS, FLOAT_STEPS, FLOAT_BITS = 0, 1, 2  # layouts
MAX_INTEGER = (1 << 20) - 1  # of either sign, for the coder
MAX_STEP = 2 * 65535 + 1  # more than between any two samples of 16 bits
FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Residual:
    """Coded integers, one for each sample, and how they are applied."""

    layout: int  # STEPS for samples that are integers, FLOAT_STEPS or FLOAT_BITS for float32
    step: float  # units of the samples in one integer: a whole number for STEPS, not used by FLOAT_BITS
    coded: bytes

    def apply(self, decoded: NDArray[Any], context: NDArray[np.int32]) -> NDArray[Any]:
        """Return new samples: decoded ones (slices, height, width, bands) plus the residual.

        `context` is int32 of that shape, equal to the encoder's. Raises CorruptPayload if the integers are damaged.
        """
        from deepsic_codec.payload.coders.residual import decode_integers  # numba, which reading labels does not need

        if self.layout == FLOAT_BITS:
            integers = _join_halves(decode_integers(self.coded, _twice(context)))
        else:
            integers = decode_integers(self.coded, context)
        return UncodedResidual(self.layout, self.step, integers).apply(decoded)


@dataclass(frozen=True, eq=False)
class UncodedResidual:
    """A residual whose integers, int32 (slices, height, width, bands), are not coded."""

    layout: int
    step: float
    integers: NDArray[np.int32]

    def apply(self, decoded: NDArray[Any]) -> NDArray[Any]:
        """Return new samples: decoded ones plus the residual."""
        if self.layout == FLOAT_BITS:
            # Wraps around in 32 bits, as the difference did.
            order = _ordered(decoded) + self.integers
            return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)
        if self.layout == FLOAT_STEPS:
            values = self.integers * np.float64(self.step) + decoded
            return np.clip(values, -FLOAT_MAX, FLOAT_MAX).astype(np.float32)
        info = np.iinfo(decoded.dtype)
        values = decoded + self.integers.astype(np.int64) * int(self.step)
        return np.clip(values, info.min, info.max).astype(decoded.dtype)

    def encode(self, context: NDArray[np.int32]) -> Residual:
        """Code the integers; `context` is that of `Residual.apply`."""
        from deepsic_codec.payload.coders.residual import encode_integers

        integers = self.integers
        if self.layout == FLOAT_BITS:
            integers, context = _split_halves(integers), _twice(context)
        return Residual(self.layout, self.step, encode_integers(integers, context))


def bounded_residual(
    samples: NDArray[Any], decoded: NDArray[Any], context: NDArray[np.int32], max_error: float, nodata: NoData | None
) -> Residual:
    """Choose the residual that keeps every sample within a bound, and verify it.

    Parameters
    ----------
    samples, decoded : ndarray
        (slices, height, width, bands): the original, and what decoding gives without a residual; of one dtype.
    context : ndarray
        int32 of that shape, which the decoder has, too.
    max_error : float
        The bound on the absolute difference, in units of the samples.
    nodata : NoData or None
        Applied after the residual. Samples under its mask need no bound.
    """
    mask = None if nodata is None else nodata.mask
    if mask is not None:
        samples = np.where(mask, decoded, samples)
    for residual in _candidates(samples, decoded, max_error):
        result = residual.apply(decoded)
        if nodata is not None:
            nodata.apply(result)
        if _within(samples, result, max_error, mask):
            return residual.encode(context)
    raise AssertionError(f"no residual keeps the error below {max_error}")


def stepped_residual(
    samples: NDArray[Any], decoded: NDArray[Any], step: float, nodata: NoData | None
) -> UncodedResidual:
    """Choose a residual that corrects samples in steps, in fewer bytes than for a bound.

    Parameters
    ----------
    samples, decoded, nodata
        As for `bounded_residual`.
    step : float
        In units of the samples. For integers its whole part is the step; the fraction widens the range of differences
        that become 0.
    """
    layout, whole = FLOAT_STEPS, step
    if samples.dtype.kind != "f":
        layout, whole = STEPS, min(max(1, int(step)), MAX_STEP)
    steps = (samples.astype(np.float64) - decoded) / whole
    # Chosen so that the mean square error rises about evenly from one whole step to the next.
    zero_range = 0.5 + sqrt(max(0.0, step - whole) / (6 * whole))
    steps[~(np.abs(steps) > zero_range)] = 0  # NaN, too
    if nodata is not None and nodata.mask is not None:
        np.copyto(steps, 0, where=nodata.mask)
    integers = np.clip(np.rint(steps), -MAX_INTEGER, MAX_INTEGER).astype(np.int32)
    return UncodedResidual(layout, whole, integers)


def encode_residual(residual: Residual) -> bytes:
    """Write a residual section."""
    start = bytes((residual.layout,))
    if residual.layout == STEPS:
        start += write_varint(int(residual.step))
    elif residual.layout == FLOAT_STEPS:
        start += struct.pack("<d", residual.step)
    return start + residual.coded


def decode_residual(data: bytes, header: Header) -> Residual:
    """Read a residual section; its integers are decoded when they are applied.

    Raises
    ------
    CorruptPayload
        If the section is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it has a layout that this version does not know.
    """
    if not data:
        raise CorruptPayload("residual section: empty")
    layout, end, step = data[0], 1, 1.0
    if layout > FLOAT_BITS:
        raise UnsupportedPayload(f"residual section: unknown layout {layout}; upgrade deepsic_codec")
    if (layout == STEPS) == (header.dtype.kind == "f"):
        raise CorruptPayload(f"residual section: layout {layout} does not fit samples of {header.dtype}")
    if layout == STEPS:
        try:
            step, end = read_varint(data, 1, "residual section: step")
        except IndexError:
            raise CorruptPayload("residual section: truncated") from None
        if not 0 < step <= MAX_STEP:
            raise CorruptPayload(f"residual section: step {step}, expected 1 to {MAX_STEP}")
    elif layout == FLOAT_STEPS:
        end = 9
        if len(data) < end:
            raise CorruptPayload("residual section: truncated")
        (step,) = struct.unpack_from("<d", data, 1)
        if not 0 < step <= FLOAT_MAX:
            raise CorruptPayload(f"residual section: step {step}, expected more than 0 and at most {FLOAT_MAX}")
    return Residual(layout, step, data[end:])


def _candidates(samples: NDArray[Any], decoded: NDArray[Any], max_error: float) -> Iterator[UncodedResidual]:
    """Yield residuals, those of fewer bytes first; the last keeps any bound."""
    if samples.dtype.kind != "f":
        bound = min(int(max_error), 65535)
        # The second step is for data on both sides of a NoData value: moving off that value may add 1 to the error.
        for step in (2 * bound + 1, 2 * bound - 1):
            if step > 0:
                difference = samples.astype(np.int32) - decoded
                yield UncodedResidual(STEPS, step, (2 * difference + step) // (2 * step))
        return
    largest = np.float32(min(FLOAT_MAX, float(np.abs(samples).max(initial=0)) + max_error))
    room = max_error - float(np.spacing(largest)) / 2  # less the error of rounding to float32
    if room > max_error / 2:
        width = 2 * room * (1 - 2**-40)
        steps = np.rint((samples.astype(np.float64) - decoded) / width)
        if np.abs(steps).max(initial=0) <= MAX_INTEGER:
            yield UncodedResidual(FLOAT_STEPS, width, steps.astype(np.int32))
    yield UncodedResidual(FLOAT_BITS, 1.0, _ordered(samples) - _ordered(decoded))


def _twice(context: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([context, context], axis=-1)


def _split_halves(integers: NDArray[np.int32]) -> NDArray[np.int32]:
    """Split 32 bits into two bands: the upper 16, signed, and the lower 16."""
    return np.concatenate([integers >> 16, integers & 0xFFFF], axis=-1)


def _join_halves(halves: NDArray[np.int32]) -> NDArray[np.int32]:
    bands = halves.shape[-1] // 2
    upper, lower = halves[..., :bands], halves[..., bands:]
    if lower.size and (lower.min() < 0 or lower.max() > 0xFFFF or upper.min() < -0x8000 or upper.max() > 0x7FFF):
        raise CorruptPayload("residual section: a value has more than 16 bits")
    return upper << 16 | lower


def _ordered(values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the bits of numbers as integers in the same order."""
    bits = np.ascontiguousarray(values).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _within(samples: NDArray[Any], result: NDArray[Any], max_error: float, mask: NDArray[np.bool_] | None) -> bool:
    wide = np.float64 if samples.dtype.kind == "f" else np.int64
    difference = np.abs(samples.astype(wide) - result)
    return bool((difference <= max_error if mask is None else (difference <= max_error) | mask).all())
