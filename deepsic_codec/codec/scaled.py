"""Samples of a chunk to what the networks see, and back.

Samples are (slices, height, width, bands). The networks see grey levels: uint8 of plain uint8 images unchanged, all
other samples scaled to int16 in 64ths of a level (fixed point, q6). Wavelets see integers: samples of integer dtypes
unchanged, float32 scaled. Samples without data are filled before encoding.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log2, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import row_blocks
from deepsic_codec.codec.params import CHUNK, NAN, CodecParams
from deepsic_codec.errors import ConfigurationError, UnsupportedArray, counted
from deepsic_codec.payload.cast import CAST_DTYPES
from deepsic_codec.payload.constants import deep_step
from deepsic_codec.payload.nodata import NoData, next_value
from deepsic_codec.payload.residual import Residual, bounded_residual, stepped_residual
from deepsic_codec.payload.structure import Structure
from deepsic_codec.payload.value_range import MIDDLE_Q6, Ranges, from_q6, full_range, to_q6
from deepsic_codec.payload.wavelet import FLOAT_LEVELS, to_integers

UINT8 = np.dtype("u1")
DTYPES = (*(np.dtype(name) for name in ("u1", "i1", "u2", "i2", "f4")), *CAST_DTYPES)
WIDE = tuple(np.dtype(name) for name in ("u2", "i2", "f4", "f8"))  # seldom use the values of their dtype
ELSEWHERE = "zarr.create_array(store, data=data), which stores them without loss"
FLOAT_MAX = float(np.finfo(np.float32).max)
# Outliers lie farther from all but this share of the values at either end than these lie from each other.
TAIL, MIN_MEASURED, MEASURED = 1 / 1000, 64, 1 << 16  # share; samples of a band that are needed, and enough, to tell
# An only value this many ranges outside of its range marks samples without data, declared or not.
FAR = 256
MAX_SPARE = 64  # ranges that are wider than the values by this factor become narrower
# Few values, equal to most of their neighbours, and not one apart where they differ, are classes.
MAX_CLASSES, MAX_EDGES, MIN_JUMPS = 64, 1 / 4, 1 / 4
NARROW = 4  # values in less than this part of their range deserve a warning
MIDDLE = {"u1": 128, "i2": MIDDLE_Q6, "i4": 0}  # fills a band without data


def unscale(bands: NDArray[Any], ranges: Ranges | None) -> NDArray[Any]:
    """Turn decoded bands, uint8 or int16 (slices, height, width, bands), into samples; may return `bands`."""
    return bands if ranges is None else from_q6(bands, ranges)


def grey_levels(samples: NDArray[Any], ranges: Ranges | None) -> NDArray[Any]:
    """Return samples as the networks see them, uint8 or int16 in 64ths of a grey level."""
    return samples if ranges is None else to_q6(samples, ranges)


@dataclass(frozen=True, eq=False)
class ScaledChunk:
    """A chunk as networks and wavelets see it."""

    # The original, of the chunk's dtype in the byte order of this machine; may be a view of the caller's array.
    samples: NDArray[Any]
    ranges: Ranges | None  # None for uint8 that is not scaled
    nodata: NoData | None  # the parameter `nodata`; its mask has the shape of the samples
    # Ranges between whose ends float32 becomes integers: `ranges`, or these times one factor if they do not fit.
    coded_ranges: Ranges | None = None
    # float32 (slices, height, width, 1): qualities of a map, 0 where errors do not matter.
    qualities: NDArray[np.float32] | None = None

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """True where a sample holds no data; None if all samples are data."""
        return None if self.nodata is None else self.nodata.mask

    @cached_property
    def bands(self) -> NDArray[Any]:
        """Grey levels uint8, or int16 in 64ths of a grey level, of the shape of the samples."""
        return self._filled(grey_levels(self._finite(), self.ranges))

    @property
    def integers(self) -> NDArray[Any]:
        """What wavelets code, of the shape of the samples: int32, or the samples themselves where all are data."""
        values = to_integers(self._finite(), self.coded_ranges)
        return values if self.mask is None else fill_nodata(values.astype(np.int32, copy=False), self.mask)

    def _finite(self) -> NDArray[Any]:
        if self.mask is not None and self.samples.dtype.kind == "f":
            return np.where(self.mask, np.float32(0), self.samples)  # NaN cannot be scaled
        return self.samples

    def _filled(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self.mask is None else fill_nodata(values, self.mask)

    @property
    def finest(self) -> float:
        """The largest quality of the map; 0 without one."""
        return 0.0 if self.qualities is None else float(self.qualities.max())

    @property
    def empty(self) -> bool:
        """Whether no sample is data."""
        return self.mask is not None and bool(self.mask.all())

    def outside(self) -> int:
        """Return how many samples that are data lie outside of their range."""
        if self.ranges is None:
            return 0
        outside = (self.samples < self.ranges[:, 0]) | (self.samples > self.ranges[:, 1])
        return int(np.count_nonzero(outside if self.mask is None else outside & ~self.mask))

    @property
    def extent(self) -> float:
        """Size of the value range in units of the samples, the largest of all bands; 1 for a constant."""
        if self.ranges is None:
            return 255.0
        return float(_extents(self.ranges).max()) or 1.0

    @property
    def widening(self) -> float:
        """By which factor coded ranges are wider than the ranges."""
        return 1.0 if self.coded_ranges is None else (float(_extents(self.coded_ranges).max()) or 1.0) / self.extent

    @property
    def level(self) -> float:
        """Units of the samples in one of the integers that wavelets code; the largest of all bands."""
        return 1.0 if self.samples.dtype.kind != "f" else self.extent * self.widening / FLOAT_LEVELS

    @property
    def min_step(self) -> float:
        """Smallest step in which coding samples can pay, in their units."""
        return 1.0 if self.samples.dtype.kind != "f" else self.extent * min(1.0, self.widening) / (1 << 24)

    @property
    def is_narrow(self) -> bool:
        """Whether samples that are data differ, but use under a quarter of the range in all bands."""
        assert self.ranges is not None
        used = _extents(np.stack(extremes(self.samples, self.mask), axis=-1))
        return bool(used.max() > 0 and (used * NARROW < _extents(self.ranges)).all())

    @cached_property
    def has_few_values(self) -> bool:
        """Whether samples are integers of at least two values, and each band has no more than a map of classes."""
        if self.samples.dtype.kind == "f":
            return False
        bands = np.moveaxis(self.samples, -1, 0)
        if any(np.unique(band[:, ::8, ::8]).size > MAX_CLASSES for band in bands):
            return False
        counts = [np.unique(band).size for band in bands]
        return max(counts) <= MAX_CLASSES and bool((self.samples != self.samples.flat[0]).any())

    @property
    def least_bytes(self) -> float:
        """About the fewest bytes that integers of few values take without loss.

        Samples that differ from their left and from their upper neighbour cost bits, up to two each: hardly any of a
        map or a drawing do, most of a photograph.
        """
        bits = 0.0
        for planes in np.moveaxis(self.samples, -1, 0):
            inner = planes[:, 1:, 1:]
            new = np.count_nonzero((inner != planes[:, 1:, :-1]) & (inner != planes[:, :-1, 1:]))
            bits += new * min(2.0, log2(np.unique(planes).size) / 2)
        return bits / 8

    @property
    def is_classes(self) -> bool:
        """Whether samples look like a mask or a map of classes: even areas of few values that are no neighbours."""
        if self.samples.shape[-1] > 1 or not self.has_few_values:
            return False
        planes = self.samples[..., 0]
        jumps = np.concatenate([np.diff(planes.astype(np.int32), axis=axis).ravel() for axis in (1, 2)])
        edges = np.abs(jumps[jumps != 0])
        if not edges.size or edges.size > MAX_EDGES * jumps.size:
            return False
        return np.unique(planes).size == 2 or np.count_nonzero(edges > 1) > MIN_JUMPS * edges.size

    def bounded_residual(self, max_error: float, structure: Structure | None = None) -> Residual:
        """Return the samples coded within `max_error` of the original."""
        return bounded_residual(self.samples, max_error, self.nodata, structure)[0]

    def stepped_residual(self, step: float) -> tuple[Residual, NDArray[Any]]:
        """Return the samples coded in steps of this size, and what they decode to."""
        return stepped_residual(self.samples, step, self.nodata)

    def allowed_error(self, params: CodecParams) -> float | None:
        """Return the root mean square error that a target allows, in units of the samples; None for `bpp`."""
        extent = 1.0 if self.ranges is None else float(_extents(self.ranges).min()) or self.extent
        if params.quality is not None:
            return deep_step(params.quality) / 255 * extent / sqrt(12)
        return extent * 10 ** (-params.psnr / 20) if params.psnr is not None else params.rmse

    def psnr(self, samples: NDArray[Any]) -> float:
        """Return the PSNR of decoded samples in dB over all samples that are data; its peak is the value range."""
        extents = np.full(1, 255.0) if self.ranges is None else _extents(self.ranges)
        error = self._mean_square(samples, np.where(extents > 0, extents, 1))
        return float("inf") if error == 0 else -10 * float(np.log10(error))

    def rmse(self, samples: NDArray[Any]) -> float:
        """Return the root mean square error of decoded samples over all samples that are data, in their units."""
        return float(np.sqrt(self._mean_square(samples, np.ones(1))))

    def _mean_square(self, samples: NDArray[Any], units: NDArray[np.float64]) -> float:
        """Return the mean square of differences in units of bands."""
        total, count = 0.0, 0
        for block in row_blocks(samples.shape):
            difference = self.samples[block].astype(np.float64) - samples[block]
            difference /= units
            if self.mask is not None:
                difference = difference[~np.broadcast_to(self.mask[block], difference.shape)]
            total, count = total + float(np.square(difference).sum()), count + difference.size
        return total / count


def check_values(dtype: np.dtype[Any], params: CodecParams, bands: int | None = None) -> None:
    """Raise unless chunks of this dtype, and of this number of bands, can be encoded with these parameters.

    Raises
    ------
    UnsupportedArray
        For a dtype that the codec does not encode.
    ConfigurationError
        If `value_range`, `nodata`, `max_error` or `spectral` does not fit the dtype or the number of bands.
    """
    native = np.dtype(dtype).newbyteorder("=")
    if native not in DTYPES:
        raise UnsupportedArray(
            f"dtype {dtype}: DeepSIC takes bool, integers of 8 to 64 bits, float32 and float64; {_cast_advice(native)}"
        )
    if must_be_bounded(native) and (params.max_error is None or (native.kind == "b" and params.max_error >= 1)):
        raise ConfigurationError(
            f"max_error: {dtype} is stored without loss or within a bound; pass max_error=0, which is without loss"
            + ("" if native.kind == "b" else ", or convert the values with astype('float32') for a quality")
        )
    pairs = params.value_range
    if native.kind == "f" and pairs is None and needs_range(params):
        raise ConfigurationError(
            f"value_range: for {dtype}, quality and psnr need a value range; pass (low, high), or 'chunk' to measure "
            "the range of every chunk; or pass rmse, bpp or max_error instead, which need none"
        )
    if native.kind == "f" and params.max_error == 0:
        raise ConfigurationError(f"max_error: {dtype} cannot be lossless; pass a bound above 0, or use another codec")
    if isinstance(pairs, tuple):
        if bands is not None and len(pairs) not in (1, bands):
            raise ConfigurationError(
                f"value_range: {len(pairs)} pairs for {counted(bands, 'band')}; pass one pair, or one for each band"
            )
        ranges = np.array([[_value(number, native, "value_range") for number in pair] for pair in pairs])
        if not (ranges[:, 0] < ranges[:, 1]).all():
            raise ConfigurationError(
                f"value_range: low and high of {pairs!r} are equal in {native}; pass low below high"
            )
    rows = params.spectral
    if not isinstance(rows, str) and bands is not None and len(rows) != bands:
        raise ConfigurationError(
            f"spectral: a matrix of {len(rows)} x {len(rows)} for {bands} bands; pass one of {bands} x {bands}"
        )
    label_numbers = params.label_numbers
    if label_numbers is not None and bands is not None and max(label_numbers) >= bands:
        raise ConfigurationError(
            f"label_bands: {list(label_numbers)} of chunks of {counted(bands, 'band')}; pass numbers below {bands}"
        )
    if params.nodata is not None:
        value = nodata_value(params, native)
        if native.kind != "b" and value == value and all(next_value(value, down) is None for down in (False, True)):
            raise ConfigurationError(
                f"nodata: {value!r} has no neighbour in {native} that data of this value could become; choose another "
                "value"
            )


def _cast_advice(dtype: np.dtype[Any]) -> str:
    """Say how values of a dtype that is not taken can be stored."""
    if dtype.kind == "f":
        return f"convert the values with data.astype('float32'), or use {ELSEWHERE}"
    return f"convert the values to one of them, or use {ELSEWHERE}"


def must_be_bounded(dtype: np.dtype[Any]) -> bool:
    """Tell whether samples are masks, classes or counts, which errors without a bound would ruin."""
    return dtype.kind in "biu" and dtype in CAST_DTYPES


def needs_range(params: CodecParams) -> bool:
    """Tell whether the target is a share of the range of values."""
    return params.max_error is None and params.rmse is None and params.bpp is None


def nodata_value(params: CodecParams, dtype: np.dtype[Any]) -> Any:
    """Return the NoData value as a number of this dtype; raises ConfigurationError if the dtype does not have it."""
    if params.nodata == NAN:
        if dtype.kind != "f":
            raise ConfigurationError(f"nodata: {dtype} has no NaN; pass a number")
        return dtype.type(np.nan)
    return _value(params.nodata, dtype, "nodata")


def _value(number: Any, dtype: np.dtype[Any], name: str) -> Any:
    low, high = full_range(dtype) if dtype.kind in "iu" else (0, 1)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            finite = np.isfinite(dtype.type(number))
        if not finite:
            raise ConfigurationError(f"{name}: {number!r} is outside the range of {dtype}; pass a value of that dtype")
    elif number != int(number) or not low <= number <= high:
        raise ConfigurationError(f"{name}: {number!r} cannot be stored as {dtype}; pass a value of that dtype")
    return dtype.type(number)


def check_finite(array: NDArray[Any], params: CodecParams) -> None:
    """Raise UnsupportedArray for infinities, and for NaN if another value means no data."""
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    if params.nodata in (None, NAN):
        finite |= np.isnan(array)
        names, advice = "infinite", "set them to a number, or to NaN if they are no data"
    else:
        names, advice = "NaN or infinite", f"set them to a number, or to the NoData value {params.nodata}"
    if not finite.all():
        number = array.size - int(np.count_nonzero(finite))
        raise UnsupportedArray(f"the chunk has {counted(number, names + ' sample')}; {advice}")


def scale_chunk(samples: NDArray[Any], params: CodecParams, features: bool = False) -> ScaledChunk:
    """Scale samples (slices, height, width, bands) of any byte order; `params` was checked against their dtype.

    With `features`, measured ranges hold all samples, because features clip those outside.
    """
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    nodata = None
    if params.nodata is not None:
        nodata = _nodata(samples, nodata_value(params, samples.dtype))
    elif samples.dtype.kind == "f" and np.isnan(samples).any():
        nodata = _nodata(samples, np.float32(np.nan))
    ranges = _ranges(samples, params, None if nodata is None else nodata.mask, features)
    if samples.dtype.kind != "f":
        return ScaledChunk(samples, ranges, nodata)
    assert ranges is not None
    coded_ranges = _fitting(ranges, samples, nodata, not needs_range(params))
    if nodata is None and (far := _far_value(samples, ranges, coded_ranges)) is not None:
        nodata = _nodata(samples, far)
        coded_ranges = _fitting(ranges, samples, nodata, not needs_range(params))
    return ScaledChunk(samples, ranges, nodata, coded_ranges)


def nodata_mask(samples: NDArray[Any], params: CodecParams) -> NDArray[np.bool_] | None:
    """Return where samples have the value of the parameter `nodata`; None without one."""
    return None if params.nodata is None else _equal(samples, nodata_value(params, samples.dtype))


def _equal(samples: NDArray[Any], value: Any) -> NDArray[np.bool_]:
    return np.isnan(samples) if value != value else samples == value


def _nodata(samples: NDArray[Any], value: Any) -> NoData:
    mask = _equal(samples, value)
    return NoData(value, _nodata_rounds_down(samples, value, mask), mask if mask.any() else None)


def _extents(ranges: Ranges) -> NDArray[np.float64]:
    return ranges[:, 1].astype(np.float64) - ranges[:, 0]


def _fitting(ranges: Ranges, samples: NDArray[np.float32], nodata: NoData | None, narrower: bool) -> Ranges:
    """Return ranges, times one factor, so that one step serves all bands, that hold all data.

    They may be narrower for targets that are no share of the ranges, and need precision where these are far too wide.
    """
    low, high = extremes(samples, None if nodata is None else nodata.mask)
    low, high = (np.where(low > high, ranges[:, 0], end) for end in (low, high))  # a band without data
    extents = _extents(ranges)
    shares = _extents(np.stack([low, high], axis=-1)) / np.where(extents > 0, extents, np.inf)
    if not narrower or shares.max() * MAX_SPARE > 1:
        low, high = np.minimum(low, ranges[:, 0]), np.maximum(high, ranges[:, 1])
        if (low == ranges[:, 0]).all() and (high == ranges[:, 1]).all():
            return ranges
        shares = _extents(np.stack([low, high], axis=-1)) / np.where(extents > 0, extents, np.inf)
    factor = float(shares.max())
    ends = np.minimum(low + factor * extents, FLOAT_MAX)
    starts = np.maximum(np.minimum(ends - factor * extents, low), -FLOAT_MAX)
    return np.stack([starts.astype(np.float32), np.maximum(ends.astype(np.float32), high)], axis=-1) + np.float32(0)


def _far_value(samples: NDArray[np.float32], ranges: Ranges, coded_ranges: Ranges) -> np.float32 | None:
    """Return the only value of samples far outside of the range; None if there is none, or if there are several."""
    extents = _extents(ranges)
    if not (_extents(coded_ranges) > FAR * extents).any():
        return None
    below, above = ranges[:, 0] - FAR * extents, ranges[:, 1] + FAR * extents
    far = samples[(samples < below) | (samples > above)]
    return far[0] if far.size and (far == far[0]).all() else None


def _nodata_rounds_down(samples: NDArray[Any], value: Any, mask: NDArray[np.bool_]) -> bool:
    """Tell whether data that decodes to the NoData value becomes the next smaller value: where most data lies."""
    if next_value(value, down=False) is None:
        return True
    if next_value(value, down=True) is None:
        return False
    below = np.count_nonzero(samples < value)
    return bool(2 * below > samples.size - np.count_nonzero(mask))


def _ranges(
    samples: NDArray[Any], params: CodecParams, mask: NDArray[np.bool_] | None, features: bool
) -> Ranges | None:
    dtype, bands = samples.dtype, samples.shape[-1]
    if params.value_range is None and dtype.kind != "f":
        if dtype == UINT8:
            return None
        pairs: Any = [full_range(dtype)]
    elif params.value_range in (None, CHUNK):
        low, high = extremes(samples, mask)
        pairs = np.stack([low, high], axis=-1)
        pairs[low > high] = 0  # a band without data
        if not features:
            pairs = np.array([without_outliers(samples[..., k], *pairs[k].tolist()) for k in range(bands)])
        pairs += dtype.type(0)  # zeros become positive: which of two zeros is the smallest depends on the order
    else:
        pairs = params.value_range
    return np.broadcast_to(np.array(pairs, dtype), (bands, 2))


def extremes(samples: NDArray[Any], mask: NDArray[np.bool_] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the least and the largest value of each band, without masked samples."""
    if mask is None and samples.size:  # band by band, which takes a tenth of the time of all at once
        bands = np.moveaxis(samples, -1, 0)
        return np.array([band.min() for band in bands]), np.array([band.max() for band in bands])
    where: Any = True if mask is None else ~mask  # of a band without data, the least is the largest of the dtype
    top, bottom = (np.inf, -np.inf) if samples.dtype.kind == "f" else full_range(samples.dtype)[::-1]
    low = samples.min(axis=(0, 1, 2), initial=top, where=where)
    return low, samples.max(axis=(0, 1, 2), initial=bottom, where=where)


def without_outliers(band: NDArray[Any], low: float, high: float) -> tuple[float, float]:
    """Return the range of a band whose data lie between low and high, without the few values far from all others."""
    inner = band.ravel()[:: max(1, band.size // MEASURED)]
    inner = inner[(inner > low) & (inner < high)]  # either end may be a value for no data, of any number of samples
    tail = int(inner.size * TAIL)
    if inner.size < MIN_MEASURED:
        return low, high
    first, last = (float(np.partition(inner, k)[k]) for k in (tail, inner.size - 1 - tail))
    if first == last:
        return low, high
    below, above = max(low, 2 * first - last), min(high, 2 * last - first)
    if below == low and high == above:
        return low, high
    near = band[(band >= below) & (band <= above)]
    return float(near.min()), float(near.max())


def fill_nodata(bands: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Return a copy whose masked samples continue the surrounding data smoothly.

    They get means over ever larger blocks of valid samples, interpolated where a block has none. So no edge is left
    that would cost bits or smear over its neighbours.
    """
    planes = np.moveaxis(bands, -1, 1)
    shape = planes.shape
    planes = planes.reshape(-1, *shape[2:])
    holes = np.moveaxis(np.broadcast_to(mask, bands.shape), -1, 1).reshape(planes.shape)
    out = planes.copy()
    for number in range(len(planes)):  # plane by plane: memory stays small, and many planes have no holes
        if not holes[number].any():
            continue
        if holes[number].all():
            out[number] = MIDDLE[bands.dtype.str[1:]]
            continue
        smooth = _filled_from_coarse(planes[number].astype(np.float32), ~holes[number])
        np.copyto(out[number], np.rint(smooth).astype(bands.dtype), where=holes[number])
    return np.ascontiguousarray(np.moveaxis(out.reshape(shape), 1, -1))


def _filled_from_coarse(values: NDArray[np.floating[Any]], valid: NDArray[np.bool_]) -> NDArray[np.floating[Any]]:
    """Fill a plane, which has valid samples, from its copy of half the size, filled in the same way."""
    if valid.all():
        return values
    height, width = values.shape
    pad = (0, height & 1), (0, width & 1)
    weight = np.pad(valid, pad).astype(np.float32)
    total = np.pad(np.where(valid, values, 0), pad)
    counts, sums = _sums_of_four(weight), _sums_of_four(total)
    coarse = _filled_from_coarse(sums / np.maximum(counts, 1), counts > 0)
    return np.where(valid, values, _doubled(_doubled(coarse, 0), 1)[:height, :width])


def _sums_of_four(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Add up squares of 2 x 2, in a stated order: what is filled in is coded."""
    pairs = values[:, ::2] + values[:, 1::2]
    return pairs[::2] + pairs[1::2]


def _doubled(values: NDArray[np.floating[Any]], axis: int) -> NDArray[np.floating[Any]]:
    """Interpolate to twice the size along an axis."""
    padded = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
    before, after = (np.take(padded, range(start, start + values.shape[axis]), axis) for start in (0, 2))
    pairs = np.stack([0.75 * values + 0.25 * before, 0.75 * values + 0.25 * after], axis=axis + 1)
    return pairs.reshape([2 * n if a == axis else n for a, n in enumerate(values.shape)])
