"""Coding of the integers of a residual section, exactly or within a bound.

Each band in turn, a fixed filter predicts each integer, here called a sample, from the samples already decoded in this
band and in its references, which are earlier bands. The section holds the weights of that filter. With a step above 1,
predictions come from samples as they are decoded, not from the originals. Nothing is trained; all arithmetic is on
integers. `docs/residual.md` is normative and derives the bounds.
"""

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload.coders.binary import grown
from deepsic_codec.payload.coders.interval import begin_decoding, begin_encoding, check_end, finish_encoding
from deepsic_codec.payload.coders.residual_band import (
    ADAPTIVE_TAPS,
    BIAS_LEVELS,
    BIAS_START,
    MIXERS,
    PLAIN_BYTES,
    SAMPLE_BYTES,
    SIGNS,
    START,
    WEIGHT_BITS,
    BandMemory,
    code_band,
    code_filter,
    code_mode,
)
from deepsic_codec.payload.coders.residual_filter import TAPS, USED, fit
from deepsic_codec.payload.varint import read_varint, write_varint

RANGE_MAX = (1 << 24) - 1  # between the smallest and the largest sample of a band
NO_REFERENCE, BAND_BEFORE, SLICE_BEFORE = 0, 1, 2  # modes of a band
# Weights that the first band inherits: 1/2 above, 3/4 left, 1/4 above right, -1/2 above left.
FIRST_WEIGHTS = (768, 0, 0, 0, 0, -512, 256)


class _Planes:
    """Bands as they are decoded, of this slice and the one before, and errors in the bands that others refer to."""

    def __init__(self, bands: int, height: int, width: int) -> None:
        self.bands = np.zeros((2, bands, height + 4, width + 6), np.int32)
        self.work = np.zeros((3, height + 4, width + 6), np.int32)
        # for the first band of slices in turn, and for other bands in turn
        self.errors = np.zeros((4, 2, height + 4, width + 4), np.int32)
        self.none = np.zeros_like(self.errors[0])

    def modes(self, s: int, c: int) -> list[int]:
        """Return the modes that band c of slice s can have."""
        return [NO_REFERENCE] + [BAND_BEFORE] * (c > 0) + [SLICE_BEFORE] * (s > 0)

    def refer(self, s: int, c: int, mode: int) -> int:
        """Put the references of a band into `work`; returns how many taps its filter has."""
        now, ago = self.bands[s & 1], self.bands[1 - (s & 1)]
        references = []
        if mode != NO_REFERENCE:
            references = [now[c - 1]] if c else []
            if mode == SLICE_BEFORE:
                references.append(ago[c])
            elif c > 1:
                references.append(now[c - 2])
        for number, plane in enumerate(references):
            self.work[1 + number] = plane
        return USED[len(references)]

    def errors_of(self, s: int, c: int) -> NDArray[np.int32]:
        """Return the errors of a band, of those that are kept."""
        return self.errors[2 + (c & 1) if c else s & 1]

    def errors_before(self, s: int, c: int, mode: int) -> NDArray[np.int32]:
        """Return the errors of the first reference."""
        if mode == NO_REFERENCE:
            return self.none
        return self.errors_of(s, c - 1) if c else self.errors_of(s - 1, 0)


class _Coder:
    """The state of a coder between bands."""

    def __init__(self, state: NDArray[np.int64], data: NDArray[np.uint8], plain: NDArray[np.uint8], bands: int) -> None:
        self.state, self.data, self.plain = np.concatenate([state, np.zeros(3, np.int64)]), data, plain
        self.contexts, self.mixers = START.copy(), MIXERS.copy()
        self.biases = np.zeros(SIGNS * BIAS_LEVELS, np.int64)
        self.bias_counts = np.full(SIGNS * BIAS_LEVELS, BIAS_START, np.int64)
        self.inputs = np.zeros(ADAPTIVE_TAPS, np.int64)
        self.adaptive = np.zeros((bands, ADAPTIVE_TAPS), np.int64)
        self.weights = np.zeros(len(TAPS), np.int64)  # of the band before
        self.weights[: len(FIRST_WEIGHTS)] = FIRST_WEIGHTS

    def code(
        self,
        decoding: bool,
        samples: NDArray[np.int32],
        mask: NDArray[np.bool_],
        tops: NDArray[np.int64],
        step: int,
        zero: int,
    ) -> None:
        """Code samples (S, C, H, W), less the smallest of each band; see `code_band`."""
        slices, bands, height, width = samples.shape
        planes = _Planes(bands, height, width)
        work = planes.work
        for s, c in np.ndindex(slices, bands):
            errors = planes.errors_of(s, c)
            if not tops[c]:
                samples[s, c], planes.bands[s & 1, c], errors[:] = 0, 0, 0
                continue
            mode, weights = NO_REFERENCE, np.zeros_like(self.weights)
            if not decoding:
                mode, weights = self._choose(planes, _filled(samples[s, c], mask[s, c]), s, c)
                self.plain = grown(self.plain, self.state[6], 64 + len(TAPS) * PLAIN_BYTES)
                self.data = grown(self.data, self.state[3], 64 + len(TAPS) * 4 * (2 + WEIGHT_BITS))
            mode = code_mode(decoding, mode, self.state, self.plain)
            if mode not in planes.modes(s, c):
                raise CorruptPayload(f"residual section: references {mode} of band {c} in slice {s}")
            used = planes.refer(s, c, mode)
            if code_filter(decoding, weights, used, self.weights, self.contexts, self.state, self.data, self.plain):
                raise CorruptPayload("residual section: a weight is outside the allowed range")
            self.weights = weights
            if s == 0 and c > 1:
                self.adaptive[c] = self.adaptive[c - 1]
            memory = self.adaptive[c], self.inputs, self.biases, self.bias_counts, self.mixers, self.contexts
            limits = np.int64(tops[c]), np.int64(step), np.int64(zero)
            work[0, :3], errors[:] = 0, 0
            rows, row = BandMemory.of(width), 0
            while row < height:
                if not decoding:
                    self.data = grown(self.data, self.state[3], width * SAMPLE_BYTES + 64)
                    self.plain = grown(self.plain, self.state[6], width * PLAIN_BYTES + 64)
                row = code_band(
                    decoding, samples[s, c], mask[s, c], work, used, weights, errors,
                    planes.errors_before(s, c, mode), memory, limits, self.state, self.data, self.plain, rows, row,
                )  # fmt: skip
                if row < 0:
                    raise CorruptPayload("residual section: a sample is outside the allowed range")
            planes.bands[s & 1, c] = work[0]

    def _choose(self, planes: _Planes, samples: NDArray[np.int32], s: int, c: int) -> tuple[int, NDArray[np.int64]]:
        """Choose the references and the weights of a band."""
        height, width = samples.shape
        work = planes.work
        work[0, 3 : height + 3, 3 : width + 3] = samples
        best: tuple[float, int, NDArray[np.int64]] | None = None
        for mode in planes.modes(s, c):
            used = planes.refer(s, c, mode)
            weights, saved = fit(work, used, self.weights)
            if best is None or saved > best[0]:
                best = saved, mode, weights
        assert best is not None
        return best[1:]


def encode_integers(
    values: NDArray[np.int32], mask: NDArray[np.bool_] | None = None, step: int = 1, zero: int = 0
) -> tuple[bytes, NDArray[np.int32]]:
    """Encode the integers of a residual section.

    Parameters
    ----------
    values : ndarray
        int32 (S, H, W, C).
    mask : ndarray, optional
        bool, broadcast to that shape: integers that are not coded.
    step : int
        1 to 131071: errors are at most half of it; 1 is lossless.
    zero : int
        Errors of predictions up to this size become 0, although the step asks for more.

    Returns
    -------
    (bytes, ndarray)
        The coded integers, and what they decode to.

    Raises
    ------
    ValueError
        If the integers of a band are further apart than RANGE_MAX, or shapes differ.
    """
    if values.ndim != 4 or not values.size:
        raise ValueError(f"integers {values.shape}: expected (S, H, W, C)")
    samples, covered = _by_band(values), _mask_by_band(mask, values.shape)
    axes = (0, 2, 3)
    low = samples.min(axis=axes, where=~covered, initial=np.iinfo(np.int32).max).astype(np.int64)
    high = samples.max(axis=axes, where=~covered, initial=np.iinfo(np.int32).min).astype(np.int64)
    low, high = np.where(low > high, 0, low), np.where(low > high, 0, high)
    if (high - low).max() > RANGE_MAX:
        raise ValueError(f"integers of a band are {(high - low).max()} apart, expected at most {RANGE_MAX}")
    samples = np.where(covered, 0, samples - low.reshape(-1, 1, 1)).astype(np.int32)
    empty = np.empty(1 << 12, np.uint8)
    coder = _Coder(begin_encoding(), empty, empty.copy(), len(low))
    coder.code(False, samples, covered, high - low, step, zero)
    coded = finish_encoding(coder.state[:4], coder.data)
    buffer, buffered, position = (int(v) for v in coder.state[4:])
    plain = coder.plain[:position].tobytes() + (bytes([buffer]) if buffered else b"")
    start = b"".join(write_varint(_fold(int(a))) + write_varint(int(b - a)) for a, b in zip(low, high, strict=True))
    return start + write_varint(len(coded)) + coded + plain, _by_pixel(samples, low)


def decode_integers(
    data: bytes, shape: tuple[int, int, int, int], mask: NDArray[np.bool_] | None = None, step: int = 1
) -> NDArray[np.int32]:
    """Decode the integers of a residual section, int32 (S, H, W, C); arguments as for `encode_integers`.

    Raises
    ------
    CorruptPayload
        If the section holds an impossible sample or weight, ends early, or goes on after the last sample.
    """
    slices, height, width, bands = shape
    try:
        numbers, start = [], 0
        for _ in range(2 * bands + 1):
            number, start = read_varint(data, start, "residual section")
            numbers.append(number)
    except IndexError:
        raise CorruptPayload("residual section: truncated") from None
    length = numbers.pop()
    if start + length > len(data):
        raise CorruptPayload("residual section: truncated")
    low = np.array([_unfold(number) for number in numbers[::2]], np.int64)
    tops = np.array(numbers[1::2], np.int64)
    if tops.max() > RANGE_MAX or (low + tops).max() > np.iinfo(np.int32).max:
        raise CorruptPayload("residual section: the range of a band is too large")
    state, stream = begin_decoding(data[start : start + length], "residual section")
    plain = np.frombuffer(data[start + length :], np.uint8).copy()
    coder = _Coder(state, stream, plain, bands)
    samples = np.zeros((slices, bands, height, width), np.int32)
    coder.code(True, samples, _mask_by_band(mask, shape), tops, step, 0)
    check_end(int(coder.state[3]), stream.size, "residual section")
    if int(coder.state[6]) != plain.size or coder.state[4]:
        raise CorruptPayload("residual section: plain bits are missing, or left over after the last sample")
    del coder  # as large as the samples three times
    return _by_pixel(samples, low)


def _filled(samples: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return samples (H, W) with those under the mask as `code_band` leaves them, for the choice of a filter."""
    rows = np.flatnonzero(~mask.all(axis=1))
    if not mask.any() or not rows.size:
        return samples
    columns = np.where(mask, -1, np.arange(mask.shape[1]))
    left = np.maximum.accumulate(columns, axis=1)
    first = np.argmin(mask, axis=1)[:, None]
    filled = np.take_along_axis(samples, np.where(left < 0, first, left), axis=1)
    above = np.searchsorted(rows, np.arange(mask.shape[0]), side="right") - 1
    return filled[rows[np.maximum(above, 0)]]


def _by_band(values: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(np.moveaxis(values, -1, 1))


def _mask_by_band(mask: NDArray[np.bool_] | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return a mask as (S, C, H, W); without any, an array that takes no memory."""
    slices, height, width, bands = shape
    if mask is None:
        return np.zeros((slices, bands, height, width), np.bool_)
    return np.ascontiguousarray(np.moveaxis(np.broadcast_to(mask, shape), -1, 1))


def _by_pixel(samples: NDArray[np.int32], low: NDArray[np.int64]) -> NDArray[np.int32]:
    slices, bands, height, width = samples.shape
    result = np.empty((slices, height, width, bands), np.int32)
    return np.add(np.moveaxis(samples, 1, -1), low.astype(np.int32), out=result)


def _fold(number: int) -> int:
    """Return a number of either sign as one without."""
    return 2 * number if number >= 0 else -2 * number - 1


def _unfold(number: int) -> int:
    return number >> 1 if not number & 1 else -(number >> 1) - 1
