"""Coding of the integers of a residual section, exactly or within a bound.

Each band in turn, a fixed filter predicts each integer, here called a sample, from the samples already decoded in this
band and in its references, which are earlier bands. The section holds the weights of that filter. With a step above 1,
predictions come from samples as they are decoded, not from the originals. Nothing is trained; all arithmetic is on
integers. `docs/residual.md` is normative and derives the bounds.
"""

from collections.abc import Callable
from typing import Any

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
from deepsic_codec.payload.coders.residual_filter import TAPS, USED, Sampled, fit
from deepsic_codec.payload.varint import read_varint, write_varint

RANGE_MAX = (1 << 24) - 1  # between the smallest and the largest sample of a band
STRIP, MIN_ROWS = 1 << 16, 8  # pixels that are coded at a time, about, and rows
NO_REFERENCE, BAND_BEFORE, SLICE_BEFORE = 0, 1, 2  # modes of a band
# Weights that the first band inherits: 1/2 above, 3/4 left, 1/4 above right, -1/2 above left.
FIRST_WEIGHTS = (768, 0, 0, 0, 0, -512, 256)


class _Bands:
    """Bands as they are decoded, and rows of a band, of its references and of errors as `code_band` takes them.

    Parameters
    ----------
    values : ndarray
        Integers (S, H, W, C), which become what a decoder gets, those under a mask filled.
    low, tops : ndarray
        int64 (C,): the smallest integer of each band, and the largest less the smallest.
    """

    def __init__(self, values: NDArray[Any], low: NDArray[np.int64], tops: NDArray[np.int64]) -> None:
        slices, height, width, bands = values.shape
        self.values, self._low, self._height = values, low.astype(np.int32), height
        rows = min(height, max(MIN_ROWS, STRIP // width))
        self.strips = [(top, min(rows, height - top)) for top in range(0, height, rows)]
        self.samples = np.empty((rows, width), np.int32)
        self.covered = np.zeros((rows, width), np.bool_)
        self.work = np.zeros((3, rows + 4, width + 6), np.int32)
        self.errors, self.before = np.zeros((2, 2, rows + 4, width + 4), np.int32)
        # Errors of the first band of a slice, and of the band before, which that of the next band replaces.
        shape, dtype = (2, height, width), np.int16 if tops.max() << 4 <= np.iinfo(np.int16).max else np.int32
        first = np.zeros(shape if slices > 1 or bands > 1 else 0, dtype)
        self._errors = first, np.zeros(shape, dtype) if slices > 1 and bands > 2 else first
        self._mode, self._last = NO_REFERENCE, (0, -1)

    def modes(self, s: int, c: int) -> list[int]:
        """Return the modes that band c of slice s can have."""
        return [NO_REFERENCE] + [BAND_BEFORE] * (c > 0) + [SLICE_BEFORE] * (s > 0)

    def references(self, s: int, c: int, mode: int) -> list[tuple[int, int]]:
        """Return slices and numbers of the bands that a band refers to."""
        if mode == NO_REFERENCE:
            return []
        first = [(s, c - 1)] if c else []
        if mode == SLICE_BEFORE:
            return [*first, (s - 1, c)]
        return [*first, (s, c - 2)] if c > 1 else first

    def refer(self, s: int, c: int, mode: int, top: int, rows: int) -> None:
        """Put rows of the references of a band into `work`."""
        for number, reference in enumerate(self.references(s, c, mode)):
            self._load(1 + number, *reference, top, rows)

    def sample(self, s: int, c: int, samples: NDArray[np.int32], top: int) -> None:
        """Put rows of the original of a band into `work`, before it is coded."""
        rows = self.strips[0][1]  # of the strip before, if there is one
        above = self.work[0, rows : rows + 3, 3:-3].copy()
        # What the encoder chooses depends on the border, and is pinned: it is that of the band before.
        if self._last[1] >= 0:
            self._load(0, *self._last, top, len(samples))
        if top:
            self.work[0, :3, 3:-3] = above
        self.work[0, 3 : len(samples) + 3, 3:-3] = samples

    def _load(self, plane: int, s: int, c: int, top: int, rows: int) -> None:
        """Put rows of a band with three rows above and one below, and with a border, into a plane of `work`."""
        band, out = self.values[s, :, :, c], self.work[plane]
        first, stop = max(top - 3, 0), min(top + rows + 1, self._height)
        inner = out[first - top + 3 : stop - top + 3]
        inner[:, 3:-3] = band[first:stop]
        inner[:, -3:] = band[first:stop, -1:]
        inner[0, :3] = band[max(first - 1, 0), 0]  # the first sample of the row above
        inner[1:, :3] = band[first : stop - 1, :1]
        inner -= self._low[c]
        out[: first - top + 3], out[stop - top + 3 : rows + 4] = inner[0], inner[-1]

    def begin(self, s: int, c: int, mode: int) -> None:
        """Begin to code a band."""
        self._mode, self._last = mode, (s, c)
        self.work[0, :3], self.errors[:, :2], self.before[:] = 0, 0, 0
        if mode != NO_REFERENCE:
            self.before[:, 2, 2:-2] = self._errors[c > 1][:, 0]

    def load(self, top: int, rows: int) -> None:
        """Put rows of all that a band refers to into `work` and `before`."""
        s, c = self._last
        self.refer(s, c, self._mode, top, rows)
        if self._mode != NO_REFERENCE:  # its first three rows are there
            last = min(top + rows + 1, self._height)
            self.before[:, 3 : last - top + 2, 2:-2] = self._errors[c > 1][:, top + 1 : last]
            self.before[:, last - top + 2 : rows + 3] = 0

    def save(self, top: int, rows: int, keep: bool) -> None:
        """Keep rows that were coded, if `keep`, and their errors, for bands that refer to them."""
        s, c = self._last
        if keep:
            self.fill(s, c, self.work[0, 3 : rows + 3, 3:-3], top, top + rows)
        if c + 1 < self.values.shape[3] or (c == 0 and s + 1 < len(self.values)):
            self._errors[c > 0][:, top : top + rows] = self.errors[:, 2 : rows + 2, 2:-2]
        self.work[0, :3], self.errors[:, :2] = (
            self.work[0, rows : rows + 3].copy(),
            self.errors[:, rows : rows + 2].copy(),
        )
        self.before[:, :3] = self.before[:, rows : rows + 3].copy()

    def fill(self, s: int, c: int, samples: NDArray[np.int32], top: int, stop: int) -> None:
        """Set rows of a band to samples less the smallest."""
        np.add(samples, self._low[c], out=self.values[s, top:stop, :, c], casting="unsafe")

    def no_errors(self, c: int) -> None:
        """Let a band have no errors."""
        self._errors[c > 0][...] = 0


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
        values: NDArray[Any] | None,
        out: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        low: NDArray[np.int64],
        tops: NDArray[np.int64],
        step: int,
        zero: int,
    ) -> None:
        """Encode values (S, H, W, C), or decode them if they are None; `out` becomes what a decoder gets.

        `out` may be `values`, if that is the same. The mask is broadcast to the shape; the rest is as for `code_band`.
        """
        decoding, (slices, _, width, count) = values is None, out.shape
        bands = _Bands(out, low, tops)
        for s, c in np.ndindex(slices, count):
            if not tops[c]:
                if out is not values:
                    out[s, :, :, c] = low[c]
                bands.no_errors(c)
                continue
            band = None if values is None else values[s, :, :, c]
            covered = None if mask is None else mask[s, :, :, c]
            mode, weights = NO_REFERENCE, np.zeros_like(self.weights)
            if band is not None:
                mode, weights = self._choose(bands, _filled(band, covered, np.int64(low[c])), s, c)
                self.plain = grown(self.plain, self.state[6], 64 + len(TAPS) * PLAIN_BYTES)
                self.data = grown(self.data, self.state[3], 64 + len(TAPS) * 4 * (2 + WEIGHT_BITS))
            mode = code_mode(decoding, mode, self.state, self.plain)
            if mode not in bands.modes(s, c):
                raise CorruptPayload(f"residual section: references {mode} of band {c} in slice {s}")
            used = USED[len(bands.references(s, c, mode))]
            if code_filter(decoding, weights, used, self.weights, self.contexts, self.state, self.data, self.plain):
                raise CorruptPayload("residual section: a weight is outside the allowed range")
            self.weights = weights
            if s == 0 and c > 1:
                self.adaptive[c] = self.adaptive[c - 1]
            memory = self.adaptive[c], self.inputs, self.biases, self.bias_counts, self.mixers, self.contexts
            limits = np.int64(tops[c]), np.int64(step), np.int64(zero)
            rows = BandMemory.of(width)
            bands.begin(s, c, mode)
            for top, height in bands.strips:
                bands.load(top, height)
                if covered is not None:
                    bands.covered[:height] = covered[top : top + height]
                if band is not None:
                    bands.samples[:height] = band[top : top + height]
                    bands.samples[:height] -= np.int32(low[c])
                flat = rows.flat[0]
                self._code_strip(decoding, bands, height, used, weights, memory, limits, rows)
                if top and flat and not rows.flat[0]:  # rows without data above the first data continue it
                    bands.fill(s, c, bands.work[0, 3, 3:-3], 0, top)
                bands.save(top, height, out is not values)
        if mask is not None:
            for c in range(count):
                np.copyto(out[..., c], low[c].astype(out.dtype), where=mask[..., c])

    def _code_strip(
        self,
        decoding: bool,
        bands: _Bands,
        height: int,
        used: int,
        weights: NDArray[np.int64],
        memory: tuple[NDArray[Any], ...],
        limits: tuple[np.int64, np.int64, np.int64],
        rows: BandMemory,
    ) -> None:
        samples, covered, row = bands.samples[:height], bands.covered[:height], 0
        while row < height:
            if not decoding:
                self.data = grown(self.data, self.state[3], samples.shape[1] * SAMPLE_BYTES + 64)
                self.plain = grown(self.plain, self.state[6], samples.shape[1] * PLAIN_BYTES + 64)
            row = code_band(
                decoding, samples, covered, bands.work, used, weights, bands.errors,
                bands.before, memory, limits, self.state, self.data, self.plain, rows, row,
            )  # fmt: skip
            if row < 0:
                raise CorruptPayload("residual section: a sample is outside the allowed range")

    def _choose(
        self, bands: _Bands, original: Callable[[int, int], NDArray[np.int32]], s: int, c: int
    ) -> tuple[int, NDArray[np.int64]]:
        """Choose the references and the weights of a band."""
        height, width = bands.values.shape[1:3]
        sampled = Sampled(height, width)
        used = {mode: USED[len(bands.references(s, c, mode))] for mode in bands.modes(s, c)}
        inputs = {mode: np.empty((len(sampled), taps + 1), np.int64) for mode, taps in used.items()}
        for top, rows in bands.strips if len(sampled) else ():
            bands.sample(s, c, original(top, rows), top)
            part = sampled.follow(bands.work[0, : rows + 4], top)
            for mode, values in inputs.items():
                bands.refer(s, c, mode, top, rows)
                sampled.inputs(bands.work, top, part, values)
        best: tuple[float, int, NDArray[np.int64]] | None = None
        for mode, values in inputs.items():
            weights, saved = fit(values, height * width, self.weights)
            if best is None or saved > best[0]:
                best = saved, mode, weights
        assert best is not None
        return best[1:]


def encode_integers(
    values: NDArray[Any], mask: NDArray[np.bool_] | None = None, step: int = 1, zero: int = 0
) -> tuple[bytes, NDArray[Any]]:
    """Encode the integers of a residual section.

    Parameters
    ----------
    values : ndarray
        Integers of at most 32 bits (S, H, W, C), of any strides.
    mask : ndarray, optional
        bool, broadcast to that shape: integers that are not coded.
    step : int
        1 to 131071: errors are at most half of it; 1 is lossless.
    zero : int
        Errors of predictions up to this size become 0, although the step asks for more.

    Returns
    -------
    (bytes, ndarray)
        The coded integers, and what they decode to, of the dtype of `values`; `values` itself if that is the same.

    Raises
    ------
    ValueError
        If the integers of a band are further apart than RANGE_MAX, or shapes differ.
    """
    if values.ndim != 4 or not values.size:
        raise ValueError(f"integers {values.shape}: expected (S, H, W, C)")
    covered = None if mask is None else np.broadcast_to(mask, values.shape)
    low, high = _extremes(values, covered)
    if (high - low).max() > RANGE_MAX:
        raise ValueError(f"integers of a band are {(high - low).max()} apart, expected at most {RANGE_MAX}")
    out = values if step == 1 and mask is None else np.empty(values.shape, values.dtype)
    empty = np.empty(1 << 12, np.uint8)
    coder = _Coder(begin_encoding(), empty, empty.copy(), len(low))
    coder.code(values, out, covered, low, high - low, step, zero)
    coded = finish_encoding(coder.state[:4], coder.data)
    coder.data = empty  # its memory is needed
    buffer, buffered, position = (int(v) for v in coder.state[4:])
    start = b"".join(write_varint(_fold(int(a))) + write_varint(int(b - a)) for a, b in zip(low, high, strict=True))
    plain = coder.plain[:position].data, bytes([buffer]) if buffered else b""
    return b"".join((start, write_varint(len(coded)), coded, *plain)), out


def decode_integers(
    data: bytes,
    shape: tuple[int, int, int, int],
    mask: NDArray[np.bool_] | None = None,
    step: int = 1,
    dtype: Any = np.int32,
) -> NDArray[Any]:
    """Decode the integers of a residual section (S, H, W, C); arguments as for `encode_integers`.

    They have a dtype of at most 32 bits, or int32 if the section says that they may be outside of its range.

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
    state, stream = begin_decoding(memoryview(data)[start : start + length], "residual section")
    plain = np.frombuffer(memoryview(data)[start + length :], np.uint8).copy()
    coder = _Coder(state, stream, plain, bands)
    info = np.iinfo(dtype)
    fits = low.min() >= info.min and (low + tops).max() <= info.max
    out = np.empty(shape, dtype if fits else np.int32)
    coder.code(None, out, None if mask is None else np.broadcast_to(mask, shape), low, tops, step, 0)
    check_end(int(coder.state[3]), stream.size, "residual section")
    if int(coder.state[6]) != plain.size or coder.state[4]:
        raise CorruptPayload("residual section: plain bits are missing, or left over after the last sample")
    return out


def _filled(
    band: NDArray[Any], mask: NDArray[np.bool_] | None, low: np.int64
) -> Callable[[int, int], NDArray[np.int32]]:
    """Return a function of the first row and a number of rows, called in order, for the choice of a filter.

    It returns rows of the band less its smallest sample. Those under the mask are as `code_band` leaves them.
    """
    width = band.shape[1]

    def data(top: int, rows: int) -> NDArray[np.int32]:
        part = band[top : top + rows].astype(np.int32)
        part -= low.astype(np.int32)
        if mask is None:
            return part
        covered = mask[top : top + rows]
        left = np.maximum.accumulate(np.where(covered, -1, np.arange(width)), axis=1)
        filled = np.take_along_axis(part, np.where(left < 0, covered.argmin(axis=1)[:, None], left), axis=1)
        above = np.maximum.accumulate(np.where(covered.all(axis=1), -1, np.arange(len(part))))
        filled = np.where(above[:, None] < 0, last, filled[np.maximum(above, 0)])
        last[:] = filled[-1]
        return filled

    last = np.zeros(width, np.int32)  # the row above
    if mask is not None:
        rows = np.flatnonzero(~mask.all(axis=1))
        if rows.size:  # rows without data above the first data continue it
            data(int(rows[0]), 1)
    return data


def _extremes(values: NDArray[Any], mask: NDArray[np.bool_] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the smallest and the largest integer of each band that are not masked; 0 of a band without any."""
    bands, info = np.moveaxis(values, -1, 0), np.iinfo(values.dtype)
    if mask is None:
        pairs = [(int(band.min()), int(band.max())) for band in bands]
    else:
        pairs = []
        for band, covered in zip(bands, np.moveaxis(mask, -1, 0), strict=True):
            data = ~covered
            low = band.min(where=data, initial=info.max)
            pairs.append((int(low), int(band.max(where=data, initial=info.min))) if data.any() else (0, 0))
    low, high = np.array(pairs, np.int64).T
    return low, high


def _fold(number: int) -> int:
    """Return a number of either sign as one without."""
    return 2 * number if number >= 0 else -2 * number - 1


def _unfold(number: int) -> int:
    return number >> 1 if not number & 1 else -(number >> 1) - 1
