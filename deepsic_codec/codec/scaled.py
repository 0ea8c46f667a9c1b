"""Values: from the samples of a chunk to what the networks are shown, and from what they give back to samples.

Samples are (slices, height, width, bands). Networks see grey levels: uint8 of plain uint8 images as they are, anything
else scaled to int16 in 64ths of a level. NoData is filled before and restored after.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.codec.params import CHUNK, NAN, CodecParams
from deepsic_codec.errors import ConfigurationError, UnsupportedArray
from deepsic_codec.payload import nodata as payload_nodata
from deepsic_codec.payload import value_range as scaling
from deepsic_codec.payload.nodata import NoData
from deepsic_codec.payload.residual import Residual, bounded_residual, stepped_residual
from deepsic_codec.payload.value_range import Ranges

UINT8 = np.dtype("u1")
DTYPES = tuple(np.dtype(name) for name in ("u1", "i1", "u2", "i2", "f4"))
MIDDLE = {"u1": 128, "i2": scaling.MIDDLE_Q6}  # what fills a band without data


@dataclass(frozen=True, eq=False)
class Shown:
    """What the networks are shown of a chunk.

    Attributes
    ----------
    samples : ndarray
        The original, of the chunk's dtype in the byte order of this machine; may be a view of the caller's array.
    bands : ndarray
        uint8 in grey levels or int16 in 64ths of them; of the same shape.
    ranges : ndarray or None
        The value range; None for uint8 as it is.
    nodata : NoData or None
        As configured; its mask has the shape of the samples.
    """

    samples: NDArray[Any]
    bands: NDArray[Any]
    ranges: Ranges | None
    nodata: NoData | None

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """True where there is no data; None if there is data everywhere."""
        return None if self.nodata is None else self.nodata.mask

    @property
    def empty(self) -> bool:
        """Whether there is no data at all."""
        return self.mask is not None and bool(self.mask.all())


def check_values(dtype: np.dtype[Any], config: CodecParams, bands: int | None = None) -> None:
    """Raise unless chunks of this dtype can be coded as configured.

    Parameters
    ----------
    dtype : dtype
        Of the chunks.
    config : CodecParams
        Whose parameters `value_range`, `nodata` and `max_error` have to fit it.
    bands : int, optional
        Of a chunk, if that is known.

    Raises
    ------
    UnsupportedArray
        For a dtype that the codec does not take.
    ConfigurationError
        For a parameter that does not fit the dtype or the number of bands.
    """
    native = np.dtype(dtype).newbyteorder("=")
    if native not in DTYPES:
        raise UnsupportedArray(
            f"dtype {dtype}: DeepSIC codes uint8, int8, uint16, int16 and float32; convert the values to one of them"
        )
    pairs = config.value_range
    if native.kind == "f" and pairs is None:
        raise ConfigurationError(
            "value_range: float32 has no range of its own; give (low, high) of the values, or 'chunk' to measure it in "
            "every chunk"
        )
    if native.kind == "f" and config.max_error == 0:
        raise ConfigurationError("max_error: 0 is for integers; give float32 a bound above 0, or use another codec")
    if isinstance(pairs, tuple):
        if bands is not None and len(pairs) not in (1, bands):
            raise ConfigurationError(f"value_range: {len(pairs)} pairs for {bands} bands; give one, or {bands}")
        ranges = np.array([[_value(number, native, "value_range") for number in pair] for pair in pairs])
        if not (ranges[:, 0] < ranges[:, 1]).all():
            raise ConfigurationError(f"value_range: {pairs!r} is a single value in {native}; give low below high")
    if config.nodata is not None:
        value = nodata_value(config, native)
        if value == value and all(payload_nodata.next_value(value, down) is None for down in (False, True)):
            raise ConfigurationError(f"nodata: {value!r} has no neighbour in {native}")


def nodata_value(config: CodecParams, dtype: np.dtype[Any]) -> Any:
    """Return the NoData value as a number of this dtype; raises ConfigurationError if it is none."""
    if config.nodata == NAN:
        if dtype.kind != "f":
            raise ConfigurationError(f"nodata: {dtype} has no NaN; give a value that it has")
        return np.float32(np.nan)
    return _value(config.nodata, dtype, "nodata")


def _value(number: Any, dtype: np.dtype[Any], name: str) -> Any:
    if dtype.kind == "f":
        if abs(number) > float(np.finfo(dtype).max):
            raise ConfigurationError(f"{name}: {number!r} is outside of {dtype}")
    elif number != int(number) or not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
        raise ConfigurationError(f"{name}: {number!r} is no value of {dtype}")
    return dtype.type(number)


def check_finite(array: NDArray[Any], config: CodecParams) -> None:
    """Raise UnsupportedArray for NaN and infinities that are not NoData."""
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    if config.nodata == NAN:
        finite |= np.isnan(array)
    if not finite.all():
        number = array.size - np.count_nonzero(finite)
        raise UnsupportedArray(
            f"{number} samples of the chunk are NaN or infinite: fill them, or pass nodata=float('nan') if NaN stands "
            "for no data"
        )


def show(samples: NDArray[Any], config: CodecParams) -> Shown:
    """Scale samples for the networks.

    Parameters
    ----------
    samples : ndarray
        (slices, height, width, bands), of any byte order; not written to.
    config : CodecParams
        Checked against their dtype.
    """
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    nodata, filled = None, samples
    if config.nodata is not None:
        value = nodata_value(config, samples.dtype)
        mask = np.isnan(samples) if value != value else samples == value
        nodata = NoData(value, _aside(samples, value, mask), mask if mask.any() else None)
    ranges = _ranges(samples, config, None if nodata is None else nodata.mask)
    if nodata is not None and nodata.mask is not None and samples.dtype.kind == "f":
        filled = np.where(nodata.mask, np.float32(0), samples)  # NaN is no number to scale
    bands = filled if ranges is None else scaling.to_q6(filled, ranges)
    if nodata is not None and nodata.mask is not None:
        bands = fill(bands, nodata.mask)
    return Shown(samples, bands, ranges, nodata)


def _aside(samples: NDArray[Any], value: Any, mask: NDArray[np.bool_]) -> bool:
    """Whether data that comes out as NoData had better step down: to where most of the data is."""
    if payload_nodata.next_value(value, down=False) is None:
        return True
    if payload_nodata.next_value(value, down=True) is None:
        return False
    below = np.count_nonzero(samples < value)
    return bool(2 * below > samples.size - np.count_nonzero(mask))


def _ranges(samples: NDArray[Any], config: CodecParams, mask: NDArray[np.bool_] | None) -> Ranges | None:
    dtype, bands = samples.dtype, samples.shape[-1]
    if config.value_range is None:
        if dtype == UINT8:
            return None
        pairs: Any = [scaling.full_range(dtype)]
    elif config.value_range == CHUNK:
        where: Any = True if mask is None else ~mask
        top, bottom = (np.inf, -np.inf) if dtype.kind == "f" else scaling.full_range(dtype)[::-1]
        low = samples.min(axis=(0, 1, 2), initial=top, where=where)
        high = samples.max(axis=(0, 1, 2), initial=bottom, where=where)
        pairs = np.stack([low, high], axis=-1)
        pairs[low > high] = 0  # a band without data
    else:
        pairs = config.value_range
    return np.broadcast_to(np.array(pairs, dtype), (bands, 2))


def fill(bands: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Return a copy in which what the mask covers goes on smoothly from what surrounds it.

    Means over ever larger blocks of valid samples, interpolated where there are none: no edge is left to be coded or to
    smear over its neighbours.
    """
    planes = np.moveaxis(bands, -1, 1)
    shape = planes.shape
    planes = planes.reshape(-1, *shape[2:])
    holes = np.moveaxis(np.broadcast_to(mask, bands.shape), -1, 1).reshape(planes.shape)
    out = planes.copy()
    for number in range(len(planes)):  # one at a time: memory stays small, and whole planes are common
        if not holes[number].any():
            continue
        if holes[number].all():
            out[number] = MIDDLE[bands.dtype.str[1:]]
            continue
        smooth = _pulled(planes[number].astype(np.float32), ~holes[number])
        np.copyto(out[number], np.rint(smooth).astype(bands.dtype), where=holes[number])
    return np.ascontiguousarray(np.moveaxis(out.reshape(shape), 1, -1))


def _pulled(values: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Fill a plane from its half-size copy, filled likewise; some of it is valid."""
    if valid.all():
        return values
    height, width = values.shape
    pad = (0, height & 1), (0, width & 1)
    weight = np.pad(valid, pad).astype(np.float32)
    total = np.pad(np.where(valid, values, 0), pad)
    counts = weight.reshape(weight.shape[0] // 2, 2, -1, 2).sum(axis=(1, 3))
    sums = total.reshape(total.shape[0] // 2, 2, -1, 2).sum(axis=(1, 3))
    coarse = _pulled(sums / np.maximum(counts, 1), counts > 0)
    return np.where(valid, values, _doubled(_doubled(coarse, 0), 1)[:height, :width])


def _doubled(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Interpolate to twice the size along an axis."""
    padded = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
    before, after = (np.take(padded, range(start, start + values.shape[axis]), axis) for start in (0, 2))
    pairs = np.stack([0.75 * values + 0.25 * before, 0.75 * values + 0.25 * after], axis=axis + 1)
    return pairs.reshape([2 * n if a == axis else n for a, n in enumerate(values.shape)])


def bound(shown: Shown, bands: NDArray[Any], error: float) -> Residual:
    """Return the residual that keeps a chunk, decoded as `bands`, within `error` of the original."""
    decoded, context = _decoded(bands, shown.ranges)
    return bounded_residual(shown.samples, decoded, context, error, shown.nodata)


def refine(shown: Shown, bands: NDArray[Any], step: float) -> Residual:
    """Return the residual that brings a chunk, decoded as `bands`, nearer to the original in such steps."""
    decoded, context = _decoded(bands, shown.ranges)
    return stepped_residual(shown.samples, decoded, context, step, shown.nodata)


def restore(
    bands: NDArray[Any], ranges: Ranges | None, residual: Residual | None = None, nodata: NoData | None = None
) -> NDArray[Any]:
    """Turn what the networks gave, uint8 or int16 (slices, height, width, bands), into samples; may be a view of it."""
    samples, context = _decoded(bands, ranges, residual is not None)
    if residual is not None:
        samples = residual.apply(samples, context)
    if nodata is not None:
        samples = samples if samples.flags.writeable and samples is not bands else samples.copy()
        nodata.apply(samples)
    return samples


def _decoded(bands: NDArray[Any], ranges: Ranges | None, context: bool = True) -> tuple[NDArray[Any], Any]:
    """Return samples without residual, and its context: these samples, or the 64ths where they are no integers."""
    samples = bands if ranges is None else scaling.from_q6(bands, ranges)
    if not context:
        return samples, None
    return samples, (bands if samples.dtype.kind == "f" else samples).astype(np.int32)


def extent(shown: Shown) -> float:
    """Return the size of the value range in units of the samples, the largest of all bands; 1 for a constant."""
    if shown.ranges is None:
        return 255.0
    return float((shown.ranges[:, 1].astype(np.float64) - shown.ranges[:, 0]).max()) or 1.0


def finest_step(shown: Shown) -> float:
    """Return the smallest step of a residual that is worth trying."""
    return 1.0 if shown.samples.dtype.kind != "f" else extent(shown) / (1 << 16)


def decibels(shown: Shown, bands: NDArray[Any], residual: Residual | None) -> float:
    """Return the PSNR of what decodes to `bands` in dB, its peak the value range, over all samples that are data."""
    samples = restore(bands, shown.ranges, residual, None)
    difference = shown.samples.astype(np.float64) - samples
    if shown.ranges is not None:
        wide = shown.ranges[:, 1].astype(np.float64) - shown.ranges[:, 0]
        difference /= np.where(wide > 0, wide, 1)
    else:
        difference /= 255
    mask = shown.mask
    error = float(np.square(difference if mask is None else difference[~mask]).mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))
