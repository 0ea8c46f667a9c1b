"""The residual section of a payload: samples, exact or within a bound. See `docs/format.md`.

The section starts with how integers become samples; `deepsic_codec.payload.coders.residual` codes the integers, which
are what is left of each sample after its prediction from others.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import row_blocks
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.nodata import NoData
from deepsic_codec.payload.structure import Structure
from deepsic_codec.payload.varint import read_varint, write_varint

INTEGERS, FLOATS, FLOAT_BITS = 0, 1, 2  # layouts
MAX_STEP = 2 * 65535 + 1  # more than between any two samples of 16 bits
FLOAT_MAX = float(np.finfo(np.float32).max)
# A step of float32 is this number of units: predictions are finer than a step.
UNITS = 15
MAX_RANGE = (1 << 24) - 1  # of integers of a band, for the coder
MAX_UNITS = (1 << 31) - 1


@dataclass(frozen=True)
class Residual:
    """Coded integers, one for each sample, and what they stand for."""

    layout: int  # INTEGERS for samples that are integers, FLOATS or FLOAT_BITS for float32
    step: int  # of the integers, 1 for FLOAT_BITS
    unit: float  # units of the samples in one integer, for FLOATS only
    coded: bytes

    def decode(self, header: Header, nodata: NoData | None, structure: Structure | None = None) -> NDArray[Any]:
        """Return samples (slices, height, width, bands); those under the mask of `nodata` are undefined.

        With a structure, the integers are numbers of its levels.

        Raises
        ------
        CorruptPayload
            If the integers are damaged.
        """
        from deepsic_codec.payload.coders.residual import decode_integers  # numba, which reading labels does not need

        shape = header.slices, header.height, header.width, header.channels
        mask = None if nodata is None else nodata.mask
        if self.layout == FLOAT_BITS:
            shape = (*shape[:3], 2 * shape[3])
            mask = _twice(mask)
        dtype = np.int32 if header.dtype.kind == "f" else header.dtype.newbyteorder("=")
        return _samples(self, decode_integers(self.coded, shape, mask, self.step, dtype), header.dtype, structure)


def bounded_residual(
    samples: NDArray[Any], max_error: float, nodata: NoData | None, structure: Structure | None = None
) -> tuple[Residual, NDArray[Any]]:
    """Code samples within a bound on the error, and verify it.

    Parameters
    ----------
    samples : ndarray
        (slices, height, width, bands).
    max_error : float
        The bound on the absolute difference, in units of the samples.
    nodata : NoData or None
        Applied to what is decoded. Samples under its mask need no bound.
    structure : Structure, optional
        Levels of the samples, whose numbers are coded.

    Returns
    -------
    (Residual, ndarray)
        And what it decodes to, NoData included.
    """
    mask = None if nodata is None else nodata.mask
    bound = max_error if structure is None else structure.max_error(max_error)
    for layout, step, unit in _candidates(_data(samples, mask), bound):
        residual, result = _encode(samples, layout, step, unit, 0, nodata, structure)
        if _within(samples, result, max_error, mask):
            return residual, result
    raise AssertionError(f"no residual keeps the error below {max_error}")


def stepped_residual(samples: NDArray[Any], step: float, nodata: NoData | None) -> tuple[Residual, NDArray[Any]]:
    """Code samples in steps, in fewer bytes than for a bound.

    Parameters
    ----------
    samples, nodata
        As for `bounded_residual`.
    step : float
        In units of the samples, rounded to float32. For integers its whole part is the step; the fraction widens the
        range of differences that become 0.

    Returns
    -------
    (Residual, ndarray)
        As from `bounded_residual`.
    """
    step = float(np.float32(step))  # it comes from errors, whose last bits depend on the order of their sum
    if samples.dtype.kind == "f":
        steps, unit = _float_steps(_data(samples, None if nodata is None else nodata.mask), step)
        return _encode(samples, FLOATS if unit else FLOAT_BITS, steps, unit, 0, nodata)
    whole = min(max(1, int(step)), MAX_STEP)
    # Chosen so that the mean square error rises about evenly from one whole step to the next.
    zero = int(whole * (0.5 + sqrt(max(0.0, step - whole) / (6 * whole))))
    return _encode(samples, INTEGERS, whole, 1.0, zero, nodata)


def encode_residual(residual: Residual) -> bytes:
    """Write a residual section."""
    start = bytes((residual.layout,))
    if residual.layout != FLOAT_BITS:
        start += write_varint(residual.step)
    if residual.layout == FLOATS:
        start += struct.pack("<d", residual.unit)
    return start + residual.coded


def decode_residual(data: bytes, header: Header) -> Residual:
    """Read a residual section; its integers are decoded by `Residual.decode`.

    Raises
    ------
    CorruptPayload
        If the section is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it has a layout that this version does not know.
    """
    if not data:
        raise CorruptPayload("residual section: empty")
    layout, end, step, unit = data[0], 1, 1, 1.0
    if layout > FLOAT_BITS:
        raise UnsupportedPayload(f"residual section: unknown layout {layout}; upgrade deepsic_codec")
    if (layout == INTEGERS) == (header.dtype.kind == "f"):
        raise CorruptPayload(f"residual section: layout {layout} does not fit samples of {header.dtype}")
    if layout != FLOAT_BITS:
        try:
            step, end = read_varint(data, 1, "residual section: step")
        except IndexError:
            raise CorruptPayload("residual section: truncated") from None
        if not 0 < step <= MAX_STEP:
            raise CorruptPayload(f"residual section: step {step}, expected 1 to {MAX_STEP}")
    if layout == FLOATS:
        if len(data) < end + 8:
            raise CorruptPayload("residual section: truncated")
        (unit,) = struct.unpack_from("<d", data, end)
        end += 8
        if not 0 < unit <= FLOAT_MAX:
            raise CorruptPayload(f"residual section: unit {unit}, expected more than 0 and at most {FLOAT_MAX}")
    return Residual(layout, step, unit, data[end:])


def _candidates(samples: NDArray[Any], max_error: float) -> Iterator[tuple[int, int, float]]:
    """Yield layouts, steps and units, those of fewer bytes first; the last keeps any bound."""
    if samples.dtype.kind != "f":
        bound = min(int(max_error), 65535)
        # The second step is for data on both sides of a NoData value: moving off that value may add 1 to the error.
        yield from ((INTEGERS, step, 1.0) for step in (2 * bound + 1, 2 * bound - 1) if step > 0)
        return
    largest = np.float32(min(FLOAT_MAX, float(np.abs(samples).max(initial=0)) + max_error))
    with np.errstate(over="ignore"):  # of the largest number
        room = max_error - float(np.spacing(largest)) / 2  # less the error of rounding to float32
    # Half of the bound serves a few larger numbers, too: those that are farther apart become themselves.
    few = room <= max_error / 2 and samples.size and float(np.spacing(np.median(np.abs(samples)))) < max_error
    if room > max_error / 2 or few:
        step, unit = _float_steps(samples, 2 * max(room, max_error / 2) * (1 - 2**-40))
        if unit:
            yield FLOATS, step, unit
    yield FLOAT_BITS, 1, 1.0


def _data(samples: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return the samples of float32 that are data, in one dimension; samples of integers as they are."""
    if samples.dtype.kind != "f" or mask is None:
        return samples
    return samples[~np.broadcast_to(mask, samples.shape)]


def _float_steps(samples: NDArray[Any], width: float) -> tuple[int, float]:
    """Return the step and the unit for steps of a width; unit 0 if the samples have too many."""
    low, high = (float(samples.min()), float(samples.max())) if samples.size else (0.0, 0.0)
    largest, extent = max(abs(low), abs(high)), high - low
    for step in (UNITS, 1):
        unit = width / step
        if extent / unit < MAX_RANGE - 1 and largest / unit < MAX_UNITS - MAX_RANGE:
            return step, unit
    return 1, 0.0


def _encode(
    samples: NDArray[Any],
    layout: int,
    step: int,
    unit: float,
    zero: int,
    nodata: NoData | None,
    structure: Structure | None = None,
) -> tuple[Residual, NDArray[Any]]:
    from deepsic_codec.payload.coders.residual import encode_integers

    mask = None if nodata is None else nodata.mask
    if samples.dtype.kind == "f" and mask is not None:
        samples = np.where(mask, np.float32(0), samples)  # NaN is no number of units
    integers: NDArray[Any]
    if layout == FLOAT_BITS:
        integers, mask = np.empty((*samples.shape[:3], 2 * samples.shape[3]), np.int32), _twice(mask)
        for block in row_blocks(samples.shape):
            integers[block] = _split_halves(_ordered(samples[block]))
    elif layout == FLOATS:
        integers = np.empty(samples.shape, np.int32)
        for block in row_blocks(samples.shape):
            integers[block] = np.rint(samples[block].astype(np.float64) / unit)
    else:
        integers = samples if structure is None else structure.numbers(samples)
    coded, decoded = encode_integers(integers, mask, step, zero)
    del integers
    residual = Residual(layout, step, unit, coded)
    result = _samples(residual, decoded, samples.dtype, structure)
    if nodata is not None:
        if np.may_share_memory(result, samples):
            result = samples.copy()
        nodata.apply(result)
    return residual, result


def _samples(
    residual: Residual, integers: NDArray[Any], dtype: np.dtype[Any], structure: Structure | None
) -> NDArray[Any]:
    """Return samples of the dtype, in the byte order of this machine, which may be the integers.

    Raises CorruptPayload for impossible integers.
    """
    if residual.layout == FLOAT_BITS:
        samples = np.empty((*integers.shape[:3], integers.shape[3] // 2), np.float32)
        for block in row_blocks(integers.shape):
            order = _join_halves(integers[block])
            samples[block] = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)
        return samples
    if residual.layout == FLOATS:
        samples = np.empty(integers.shape, np.float32)
        for block in row_blocks(integers.shape):
            samples[block] = np.clip(integers[block] * np.float64(residual.unit), -FLOAT_MAX, FLOAT_MAX)
        return samples
    native = dtype.newbyteorder("=")
    info = np.iinfo(native)
    if integers.dtype != native and (integers.min() < info.min or integers.max() > info.max):
        raise CorruptPayload(f"residual section: samples from {integers.min()} to {integers.max()} for {dtype}")
    return integers.astype(native, copy=False) if structure is None else structure.samples(integers, native)


def _twice(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    return mask if mask is None or mask.shape[-1] == 1 else np.concatenate([mask, mask], axis=-1)


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
    for block in row_blocks(samples.shape):
        within = np.abs(samples[block].astype(wide) - result[block]) <= max_error
        if not (within if mask is None else within | mask[block]).all():
            return False
    return True
