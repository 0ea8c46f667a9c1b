"""The residual section of a payload: what brings decoded samples within a bound of the original. See `docs/format.md`.

The section starts with how its integers are to be applied; `deepsic_codec.payload.coders.residual` codes the integers.
"""

import struct
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.varint import read_varint, write_varint

STEPS, FLOAT_STEPS, FLOAT_BITS = 0, 1, 2
MOST = (1 << 20) - 1  # of either sign, for the coder
MAX_STEP = 2 * 65535 + 1  # more than between any two samples of 16 bits
FLOAT_MAX = float(np.finfo(np.float32).max)


def encode_bounded(
    samples: NDArray[Any],
    decoded: NDArray[Any],
    context: NDArray[np.int32],
    error: float,
    mask: NDArray[np.bool_] | None,
    finish: Callable[[NDArray[Any]], None],
) -> bytes:
    """Write a residual section, verified.

    Parameters
    ----------
    samples, decoded : ndarray
        (slices, height, width, bands): the original, and what decoding gives without this section; of one dtype.
    context : ndarray
        int32 of that shape, which the decoder has, too.
    error : float
        The bound on the absolute difference, in units of the samples.
    mask : ndarray or None
        True where there is no data, which needs no bound.
    finish : callable
        What decoding does after this section, in place.

    Returns
    -------
    bytes
        The section whose application keeps the bound at every sample.
    """
    from deepsic_codec.payload.coders.residual import encode_residual  # with numba, which reading labels has no need of

    if mask is not None:
        samples = np.where(mask, decoded, samples)
    for start, residual in _candidates(samples, decoded, error):
        after = _applied(start, residual, decoded)
        finish(after)
        if _within(samples, after, error, mask):
            if start[0] == FLOAT_BITS:
                residual, context = _halves(residual), _twice(context)
            return start + encode_residual(residual, context)
    raise AssertionError(f"no residual keeps the error below {error}")


def encode_stepped(
    samples: NDArray[Any],
    decoded: NDArray[Any],
    context: NDArray[np.int32],
    step: float,
    mask: NDArray[np.bool_] | None,
) -> bytes:
    """Write a residual section that brings samples nearer to the original, for fewer bytes than a bound takes.

    Parameters are those of `encode_bounded`, but for `step`, in units of the samples: for integers its whole part is
    the step, and the fraction makes more of what is small count for nothing.
    """
    from deepsic_codec.payload.coders.residual import encode_residual

    whole: float
    if samples.dtype.kind == "f":
        whole, start = step, bytes((FLOAT_STEPS,)) + struct.pack("<d", step)
    else:
        whole = min(max(1, int(step)), MAX_STEP)
        start = bytes((STEPS,)) + write_varint(int(whole))
    steps = (samples.astype(np.float64) - decoded) / whole
    # Wider by so much that the mean square error rises about evenly from one whole step to the next.
    steps[~(np.abs(steps) > 0.5 + sqrt(max(0.0, step - whole) / (6 * whole)))] = 0  # NaN, too
    if mask is not None:
        np.copyto(steps, 0, where=mask)
    return start + encode_residual(np.clip(np.rint(steps), -MOST, MOST).astype(np.int32), context)


def apply_bounded(data: bytes, decoded: NDArray[Any], context: NDArray[np.int32]) -> NDArray[Any]:
    """Apply a residual section to decoded samples; returns new ones.

    Raises
    ------
    CorruptPayload
        If the section is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it is to be applied in a way that this version does not know.
    """
    from deepsic_codec.payload.coders.residual import decode_residual

    start, rest = _split(data, decoded.dtype)
    if start[0] != FLOAT_BITS:
        return _applied(start, decode_residual(rest, decoded.shape, context), decoded)
    context = _twice(context)
    return _applied(start, _joined(decode_residual(rest, context.shape, context)), decoded)


def _candidates(samples: NDArray[Any], decoded: NDArray[Any], error: float) -> Any:
    """Yield starts of a section and residuals, smaller ones first; the last keeps any bound."""
    if samples.dtype.kind != "f":
        bound = min(int(error), 65535)
        # The second for data on both sides of a NoData value: where it steps aside from that, it may move by one more.
        for step in (2 * bound + 1, 2 * bound - 1):
            if step > 0:
                difference = samples.astype(np.int32) - decoded
                yield bytes((STEPS,)) + write_varint(step), (2 * difference + step) // (2 * step)
        return
    largest = np.float32(min(FLOAT_MAX, float(np.abs(samples).max(initial=0)) + error))
    room = error - float(np.spacing(largest)) / 2  # for rounding to float32
    if room > error / 2:
        width = 2 * room * (1 - 2**-40)
        steps = np.rint((samples.astype(np.float64) - decoded) / width)
        if np.abs(steps).max(initial=0) <= MOST:
            yield bytes((FLOAT_STEPS,)) + struct.pack("<d", width), steps.astype(np.int32)
    yield bytes((FLOAT_BITS,)), _ordered(samples) - _ordered(decoded)


def _split(data: bytes, dtype: np.dtype[Any]) -> tuple[bytes, bytes]:
    """Part a section into how it is applied and the coded integers."""
    if not data:
        raise CorruptPayload("residual section: it is empty")
    if data[0] > FLOAT_BITS:
        raise UnsupportedPayload(f"residual section: layout {data[0]}; upgrade deepsic_codec")
    if (data[0] == STEPS) == (dtype.kind == "f"):
        raise CorruptPayload(f"residual section: layout {data[0]} for samples of {dtype}")
    end = 1
    if data[0] == STEPS:
        try:
            step, end = read_varint(data, 1, "residual section: step")
        except IndexError:
            raise CorruptPayload("residual section: truncated") from None
        if not 0 < step <= MAX_STEP:
            raise CorruptPayload(f"residual section: step {step}, expected 1 to {MAX_STEP}")
    elif data[0] == FLOAT_STEPS:
        end = 9
        if len(data) < end:
            raise CorruptPayload("residual section: truncated")
        (step,) = struct.unpack_from("<d", data, 1)
        if not 0 < step <= FLOAT_MAX:
            raise CorruptPayload(f"residual section: step {step}")
    return data[:end], data[end:]


def _applied(start: bytes, residual: NDArray[np.int32], decoded: NDArray[Any]) -> NDArray[Any]:
    if start[0] == FLOAT_BITS:
        # Wraps around in 32 bits, as the difference did.
        order = _ordered(decoded) + residual
        return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)
    if start[0] == FLOAT_STEPS:
        (step,) = struct.unpack_from("<d", start, 1)
        values = residual * np.float64(step) + decoded
        return np.clip(values, -FLOAT_MAX, FLOAT_MAX).astype(np.float32)
    step, _ = read_varint(start, 1, "residual section: step")
    info = np.iinfo(decoded.dtype)
    return np.clip(decoded + residual.astype(np.int64) * step, info.min, info.max).astype(decoded.dtype)


def _twice(context: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([context, context], axis=-1)


def _halves(residual: NDArray[np.int32]) -> NDArray[np.int32]:
    """Part 32 bits into two bands: the upper 16, signed, and the lower 16."""
    return np.concatenate([residual >> 16, residual & 0xFFFF], axis=-1)


def _joined(halves: NDArray[np.int32]) -> NDArray[np.int32]:
    bands = halves.shape[-1] // 2
    upper, lower = halves[..., :bands], halves[..., bands:]
    if lower.size and (lower.min() < 0 or lower.max() > 0xFFFF or upper.min() < -0x8000 or upper.max() > 0x7FFF):
        raise CorruptPayload("residual section: a half of more than 16 bits")
    return upper << 16 | lower


def _ordered(values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the bits of numbers as integers that rise with them."""
    bits = np.ascontiguousarray(values).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _within(samples: NDArray[Any], after: NDArray[Any], error: float, mask: NDArray[np.bool_] | None) -> bool:
    wide = np.float64 if samples.dtype.kind == "f" else np.int64
    difference = np.abs(samples.astype(wide) - after)
    return bool((difference <= error if mask is None else (difference <= error) | mask).all())
