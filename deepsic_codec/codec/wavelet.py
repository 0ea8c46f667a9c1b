"""Chunks as wavelets of spectral components: the way of all imagery but 8-bit colour that features code in fewer bytes.

Integers of the samples become components (`spectral`), components become coefficients, and these are quantised with
one step for all. Rates and errors of a step are estimated from the coefficients, so that a search takes two encodings,
or three.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import row_blocks
from deepsic_codec.codec import spectral
from deepsic_codec.codec.params import DEFAULT_QUALITY, NO_SPECTRAL, CodecParams
from deepsic_codec.codec.quality_map import map_of, without_care
from deepsic_codec.codec.scaled import ScaledChunk
from deepsic_codec.codec.structure import (
    fill_grids,
    find_grids,
    find_levels,
    join_grids,
    make_structure,
    on_grid,
    without_padding,
)
from deepsic_codec.payload.constants import deep_quality, deep_step
from deepsic_codec.payload.quality_map import CELL, QualityMap
from deepsic_codec.payload.sections import QUALITY_MAP, SPECTRAL, STRUCTURE, WAVELET, Section
from deepsic_codec.payload.spectral import Matrix
from deepsic_codec.payload.steps import FRACTION_BITS, PER_OCTAVE, STEPS, UNIT, step_code, step_of
from deepsic_codec.payload.structure import Levels, Structure
from deepsic_codec.payload.value_range import Ranges, full_range
from deepsic_codec.payload.wavelet import (
    FLOAT_LEVELS,
    Wavelet,
    each_plane,
    from_integers,
    make_checkpoints,
    rounded,
    to_coefficients,
    to_components,
)

# Step of the trellis whose error is that of quantising to whole steps, at high rates; the qualities mean these.
STEP_GAIN = 1.15
REACHED_ERROR = 1.07  # errors of wavelets, as a share of the estimated ones, at moderate rates
MAX_TRIALS = 9  # two are enough where rates fall evenly
SHORT = 0.1  # an error beyond its target by more octaves than that is not accepted, if a smaller one is possible
CLOSE_BYTES, CLOSE_ERROR = 0.02, 0.02  # a trial this close to its target ends the search, in octaves
MAX_MAGNITUDE = 1 << 22  # largest coefficient, in steps of the planes times 16
SMALLEST = 2.0**-26  # error that counts as none, as a share of the range
# Root mean square error, as a share of the gap between levels, up to which the nearest level has the smaller error.
MAX_SNAPPED = 0.25
# The filter is tried on the first components of the middle of a chunk: on what is coded, if this is all of a component,
# otherwise with a step of each half octave. It has to lower the squared error by one part in so many.
TRIED_COMPONENTS, TRIED_EDGE, LEAST_GAIN = 4, 128, 200
GUESS = 1 / 64  # step for which a spectral transform is chosen before a search, as a share of the range
# With many bands, components whose root mean square is below this share of the step are left out, and their rows.
LEFT_OUT_FROM, LEFT_OUT = 16, 1 / 4
ROW_ENTRY = 8  # bytes of a spectral transform section besides its rows, and of its entry in the header


def decode_wavelet(
    wavelet: Wavelet,
    matrix: Matrix | None,
    shape: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    ranges: Ranges | None,
    quality_map: QualityMap | None = None,
    halvings: int = 0,
) -> tuple[NDArray[Any], int]:
    """Decode a chunk of a shape (slices, height, width, bands), or halve its rows and columns some times.

    Returns
    -------
    ndarray
        Samples.
    int
        Halvings that are left to do, because the planes are too small for them.

    Raises
    ------
    CorruptPayload
        If the stream is damaged.
    """
    from deepsic_codec.payload.coders.wavelet import max_halvings  # numba

    slices, height, width, bands = shape
    done = min(halvings, max_halvings(height, width)) if halvings else 0
    count = bands if matrix is None else len(matrix)
    narrow = np.int16 if dtype.itemsize == 1 else np.int32
    components = wavelet.decode((slices, count, height, width), done, quality_map, narrow)
    if not done:
        components = _filtered(wavelet, components)
    return _restored(components, matrix, dtype, ranges), halvings - done


def _filtered(wavelet: Wavelet, components: NDArray[Any]) -> NDArray[Any]:
    """Filter decoded components of the whole size, where a wavelet asks for it."""
    if not (wavelet.filtered and wavelet.whole):
        return components
    from deepsic_codec.codec.wavelet_filter import filter_plane

    return each_plane(components, lambda plane: filter_plane(plane, wavelet.code))


def _squares(one: NDArray[Any], other: NDArray[Any], counted: Any) -> int:
    """Return the sum of squared differences of counted integers, which is the same on all machines."""
    return int(np.square((one.astype(np.int64) - other) * counted).sum())


def _restored(
    components: NDArray[Any], matrix: Matrix | None, dtype: np.dtype[Any], ranges: Ranges | None
) -> NDArray[Any]:
    components = np.ascontiguousarray(components)  # those of a reduced size are parts of larger planes
    slices, count, height, width = components.shape
    samples = np.empty((slices, height, width, count if matrix is None else matrix.shape[1]), dtype.newbyteorder("="))
    by_pixel = np.moveaxis(components, 1, -1)
    for block in row_blocks(samples.shape):  # because integers and float64 take more memory than samples
        if matrix is None:
            values = rounded(by_pixel[block].astype(np.int32, copy=False))
        else:
            values = spectral.inverse_planes(components, matrix, *block, samples.dtype)
        samples[block] = values if values.dtype == samples.dtype else from_integers(values, samples.dtype, ranges)
    return samples


def components_of(values: NDArray[Any], matrix: Matrix | None) -> NDArray[Any]:
    """Return the components (slices, components, height, width), int16 if they fit, of integers with bands last."""
    slices, height, width, bands = values.shape
    # Rows are orthonormal, so that no component is longer than a pixel.
    limit = spectral.largest(values) * (1 << FRACTION_BITS) * (1.0 if matrix is None else 1.01 * bands**0.5)
    dtype = np.int16 if limit + 1 < np.iinfo(np.int16).max else np.int32
    components = np.empty((slices, bands if matrix is None else len(matrix), height, width), dtype)
    if matrix is None:
        by_pixel = np.moveaxis(components, 1, -1)
        for block in row_blocks(values.shape):
            by_pixel[block] = values[block].astype(np.int32) << FRACTION_BITS
    else:
        spectral.forward_planes(values, matrix, components)
    return components


@dataclass(frozen=True)
class CodedWavelets:
    """A chunk as wavelets: one, or one for each grid.

    Attributes
    ----------
    code : int
        Of the step; that of a grid is finer.
    wavelets : tuple of Wavelet
        In the order of the grids.
    """

    code: int
    wavelets: tuple[Wavelet, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        return sum(len(wavelet.stream) for wavelet in self.wavelets)


class _Part:
    """A chunk, or the bands of one grid, as coefficients."""

    def __init__(
        self, scaled: ScaledChunk, params: CodecParams, step: float, quality_map: QualityMap | None = None
    ) -> None:
        self.scaled, self.quality_map = scaled, quality_map
        self.coded, self._coded_padding = without_padding(scaled, None)
        self._padding = self.coded.nodata if self._coded_padding else None
        coded = self.coded if quality_map is None else without_care(self.coded)
        values = coded.integers
        self.matrix: Matrix | None = None
        if values.shape[-1] > 1 and params.spectral != NO_SPECTRAL:
            matrix = None if isinstance(params.spectral, str) else np.array(params.spectral)
            self.matrix = spectral.choose(values, coded.mask, step, matrix)
        components = components_of(values, self.matrix)
        slices, _, height, width = components.shape
        edges = (min(size, TRIED_EDGE) for size in (height, width))
        rows, columns = (
            slice((size - edge) // 2, (size + edge) // 2) for size, edge in zip((height, width), edges, strict=True)
        )
        self._tried = components[slices // 2, :TRIED_COMPONENTS, rows, columns][None].copy()
        whole = self._tried.shape == components.shape
        self._exact = values if whole else self._rounded(self._tried.astype(np.int32))
        #: Whether the tried components are whole ones.
        self._small = slices == 1 and self._tried.shape[2:] == components.shape[2:]
        self._counted: Any = self._which_count(coded.mask) if self._small else True
        del values
        self._sizes = np.full(components.shape[1], np.inf)  # of components that a large step leaves out
        if self.matrix is not None and len(self.matrix) >= LEFT_OUT_FROM and isinstance(params.spectral, str):
            self._sizes[1:] = spectral.root_mean_squares(np.moveaxis(components[:, 1:], 1, -1))
        self._gains: dict[int, bool] = {}  # whether the filter lowers the error, by half octaves of codes
        #: int16, or int32 where they do not fit (slices, components, height, width); those that `encode` left, if last.
        self.coefficients = to_coefficients(components)
        del components
        # Errors that a map allows may be too large for the nearest level to be the right one.
        self._levels = find_levels(coded.samples, coded.mask, None) if quality_map is None else None
        self._rated: NDArray[Any] | None = None
        self._near_levels: dict[int, bool] = {}  # whether errors with the step of a code are small enough for levels
        # Symbols fit 26 bits then: low bands have steps up to 68 times as small, and symbols up to two magnitudes.
        self.min_code = step_code(max(1, spectral.largest(self.coefficients)) / MAX_MAGNITUDE)

    def encode(self, code: int, last: bool) -> tuple[Wavelet, NDArray[Any]]:
        """Encode with the step of a code; return the coefficients that it decodes to, too.

        The last time, these take the place of all coefficients, which saves the memory of a copy.
        """
        from deepsic_codec.payload.coders.subbands import encode_planes

        code = max(code, self.min_code)
        kept = np.flatnonzero(self._kept(code)).tolist()
        self._is_near_levels(code)
        planes = self.coefficients if last else self.coefficients.copy()
        stream, lengths, planes = encode_planes(planes, code, self.quality_map, numbers=kept, keep=True)
        if last:
            self.coefficients = planes
        planes = planes if len(kept) == planes.shape[1] else planes[:, kept]
        return Wavelet(code, stream, make_checkpoints(stream, lengths)), planes

    @property
    def _by_components(self) -> bool:
        """Whether the filter is tried on components, because bands depend on more of them."""
        return self.matrix is not None and len(self.matrix) > TRIED_COMPONENTS

    def _rounded(self, tried: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the integers that tried components give, bands last; or the components."""
        by_pixel = np.moveaxis(tried, 1, -1)
        if self._by_components:
            return by_pixel
        values = rounded(by_pixel) if self.matrix is None else spectral.inverse(by_pixel, self.matrix)
        dtype = self.scaled.samples.dtype
        return np.clip(values, *((0, FLOAT_LEVELS) if dtype.kind == "f" else full_range(dtype)))

    def _which_count(self, mask: NDArray[np.bool_] | None) -> Any:
        """Tell which of these count: those with data, and the finest step of a map, as coarser ones outweigh it."""
        counted: Any = True
        if mask is not None:
            counted = ~(mask.all(-1, keepdims=True) if self._by_components else mask[..., :TRIED_COMPONENTS])
        if self.quality_map is None:
            return counted
        height, width = self._tried.shape[2:]
        finest = (self.quality_map.cells == 1).repeat(CELL, 1).repeat(CELL, 2)[:, :height, :width, None]
        return counted & finest

    def filter_gains(self, wavelet: Wavelet, planes: NDArray[Any] | None) -> bool:
        """Tell whether the filter lowers the error, which it does not of noise.

        Of a small chunk, that of its first components, whose coefficients may be known; of others, that with about the
        step of the wavelet.
        """
        from deepsic_codec.payload.coders.subbands import encode_planes

        if self._small:
            kept = self._kept(wavelet.code)[:TRIED_COMPONENTS]
            if planes is None:
                components = self._decoded(wavelet)[:, : kept.sum()]
            else:
                components = to_components(planes[:, : kept.sum()].astype(np.int32))
            exact = self._exact if kept.all() else self._exact[..., kept]
            levels = None if self._by_components else self._levels_of(wavelet)
            return self._lowers_error(wavelet.code, components, exact, levels)
        part = wavelet.code // (PER_OCTAVE // 2)
        if part not in self._gains:
            middle = max(part * PER_OCTAVE // 2 + PER_OCTAVE // 4, self.min_code)
            _, _, planes = encode_planes(to_coefficients(self._tried.copy()), middle, keep=True)
            self._gains[part] = self._lowers_error(middle, to_components(planes.astype(np.int32)), self._exact, None)
        return self._gains[part]

    def _lowers_error(
        self, code: int, components: NDArray[np.int32], exact: NDArray[np.int32], levels: tuple[Levels, ...] | None
    ) -> bool:
        """Tell whether the filter lowers the error of components, which it overwrites, in what counts."""

        def error(components: NDArray[np.int32]) -> int:
            values: NDArray[Any] = self._rounded(components)
            if levels is not None:
                structure = Structure(levels[: values.shape[-1]])
                values = structure.nearest(values.astype(self.scaled.samples.dtype))
            return _squares(values, exact, self._counted)

        before = error(components)
        after = error(_filtered(Wavelet(code, b"", filtered=True), components))
        return LEAST_GAIN * (before - after) > before

    def _decoded(self, wavelet: Wavelet) -> NDArray[Any]:
        """Return the components of a wavelet, without the filter."""
        slices, _, height, width = self.coefficients.shape
        shape = slices, int(self._kept(wavelet.code).sum()), height, width
        return wavelet.decode(shape, quality_map=self.quality_map)

    def decode(self, wavelet: Wavelet, components: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the samples that a wavelet stands for; its components are decoded unless they are known."""
        if components is None:
            components = self._decoded(wavelet)
        scaled, levels = self.scaled, self._levels_of(wavelet)
        components = _filtered(wavelet, components)
        samples = _restored(components, self._matrix_of(wavelet.code), scaled.samples.dtype, scaled.coded_ranges)
        if levels is not None:
            samples = Structure(levels).nearest(samples)
        if self._padding is not None:
            self._padding.apply(samples)
        return samples

    def _kept(self, code: int) -> NDArray[np.bool_]:
        """Tell which components are coded with the step of a code."""
        return self._sizes >= LEFT_OUT * step_of(code)

    def _matrix_of(self, code: int) -> Matrix | None:
        """Return the rows of the components that are coded with the step of a code."""
        return None if self.matrix is None else self.matrix[self._kept(code)]

    def matrix_bytes(self, code: int) -> int:
        """Return about how many bytes the spectral transform section takes with the step of a code."""
        matrix = self._matrix_of(max(code, self.min_code))
        return 0 if matrix is None else ROW_ENTRY + matrix.nbytes

    def _levels_of(self, wavelet: Wavelet) -> tuple[Levels, ...] | None:
        """Return the levels of samples, if errors of a wavelet are small enough for the nearest to be the right one."""
        return self._levels if self._is_near_levels(wavelet.code) else None

    def _is_near_levels(self, code: int) -> bool:
        """Tell whether errors with the step of a code are small enough for levels, if samples have any."""
        from deepsic_codec.codec.wavelet_rate import estimated_error

        if self._levels is None:
            return False
        if code not in self._near_levels:
            gap = min(levels.gap() for levels in self._levels if levels.divisor > 1)
            self._near_levels[code] = estimated_error(self.coefficients, code) < MAX_SNAPPED * gap
        return self._near_levels[code]

    def sections(self, wavelet: Wavelet) -> dict[Section[Any], Any]:
        """Return the sections of the payload or the grid."""
        structure = make_structure(self._levels_of(wavelet), self._coded_padding)
        matrix = self._matrix_of(wavelet.code)
        return {STRUCTURE: structure, SPECTRAL: matrix, QUALITY_MAP: self.quality_map, WAVELET: wavelet}

    def estimated_bytes(self, code: int) -> float:
        """Return about how many bytes the bands take with the step of a code."""
        from deepsic_codec.codec.wavelet_rate import estimated_bytes
        from deepsic_codec.payload.coders.wavelet import LOW, bands_of

        if self.quality_map is None:
            return estimated_bytes(self.coefficients, code)
        if self._rated is None:  # coarser steps have the bytes of smaller coefficients
            self._rated = self.coefficients.copy()
            for band in bands_of(*self._rated.shape[2:]):
                if band.kind != LOW:
                    part = self._rated[..., band.y : band.y + band.height, band.x : band.x + band.width]
                    values = self.quality_map.of_band(band.level, band.kind, band.height, band.width)[:, None]
                    part[...] = np.where(values > 0, part * 2.0 ** ((1.0 - values) / 8), 0)
        return estimated_bytes(self._rated, code)


class WaveletEncoder:
    """A chunk as coefficients, which can be encoded with any step."""

    def __init__(self, scaled: ScaledChunk, params: CodecParams) -> None:
        self._scaled, self.grids = scaled, find_grids(scaled.samples)
        # Units of the integers in the range of values.
        self._extent = FLOAT_LEVELS / scaled.widening if scaled.samples.dtype.kind == "f" else scaled.extent
        step = self._extent * GUESS if params.quality is None else self._step(params.quality)
        parts = [(on_grid(scaled, grid), step / grid.factor) for grid in self.grids] or [(scaled, step)]
        finest = scaled.finest or params.quality or DEFAULT_QUALITY
        maps = [map_of(part.qualities, finest, lambda q: step_code(self._step(q))) for part, _ in parts]
        self._parts = [_Part(part, params, one, each) for (part, one), each in zip(parts, maps, strict=True)]
        # Steps below this one have the same results.
        finer = [STEPS - code for code in self._codes(STEPS)]
        self._min_code = min(part.min_code + less for part, less in zip(self._parts, finer, strict=True))
        # The last wavelets with their coefficients, or with the samples that they decode to.
        self._last: tuple[CodedWavelets, list[NDArray[Any]] | NDArray[Any]] | None = None
        # Padding has no error, and must not make up for that of data.
        self._measured = scaled if self.grids else self._parts[0].coded

    @property
    def samples(self) -> int:
        """Samples that are coded."""
        return sum(part.scaled.samples.size for part in self._parts)

    def _step(self, quality: float) -> float:
        return STEP_GAIN * deep_step(quality) / 255 * self._extent

    def _codes(self, code: int) -> list[int]:
        """Return the codes of parts. An error of a grid is repeated, so its step is finer by its factor."""
        if not self.grids:
            return [code]
        return [max(0, code - round(PER_OCTAVE * log2(grid.factor))) for grid in self.grids]

    def quality_of(self, code: int) -> float:
        """Return the quality that the step of a code is nearest to."""
        return round(deep_quality(step_of(code) * 255 / self._extent / STEP_GAIN), 2)

    def _encode(self, code: int, last: bool = False) -> CodedWavelets:
        """Encode with the step of a code, for the last time or not."""
        self._last = None  # its memory is needed
        pairs = [part.encode(one, last) for part, one in zip(self._parts, self._codes(code), strict=True)]
        if not self.grids:
            code = pairs[0][0].code
        coded = CodedWavelets(code, tuple(wavelet for wavelet, _ in pairs))
        self._last = coded, [coefficients for _, coefficients in pairs]
        return coded

    def _decided(self, coded: CodedWavelets) -> CodedWavelets:
        """Return wavelets that ask for the filter, where that lowers the error."""
        last = self._last if self._last is not None and self._last[0] is coded else None
        known = last[1] if last is not None else [None] * len(self._parts)
        parts = zip(self._parts, coded.wavelets, known, strict=True)
        wavelets = [replace(wavelet, filtered=part.filter_gains(wavelet, planes)) for part, wavelet, planes in parts]
        decided = replace(coded, wavelets=tuple(wavelets))
        if last is not None:
            self._last = decided, last[1]
        return decided

    def decode(self, coded: CodedWavelets) -> NDArray[Any]:
        """Return the samples that wavelets stand for."""
        known: list[NDArray[Any] | None] = [None] * len(self._parts)
        if self._last is not None and self._last[0] is coded:
            if not isinstance(self._last[1], list):
                return self._last[1]
            known = [to_components(one) for one in self._last[1]]
        parts = zip(self._parts, coded.wavelets, known, strict=True)
        decoded = [part.decode(wavelet, one) for part, wavelet, one in parts]
        samples = join_grids(self.grids, decoded, self._scaled.samples.shape) if self.grids else decoded[0]
        self._last = coded, samples
        return samples

    def sections(self, coded: CodedWavelets | None) -> dict[Section[Any], Any]:
        """Return the sections of the payload; without wavelets, what is needed besides their streams and matrices."""
        wavelets = [Wavelet(0, b"")] * len(self._parts) if coded is None else coded.wavelets
        sections = [part.sections(wavelet) for part, wavelet in zip(self._parts, wavelets, strict=True)]
        if coded is None:
            sections = [one | {SPECTRAL: None} for one in sections]
        return {STRUCTURE: fill_grids(self.grids, sections)} if self.grids else sections[0]

    def at_quality(self, quality: float) -> CodedWavelets:
        """Encode at a quality; nothing else can be encoded, or estimated, afterwards."""
        return self.at_code(step_code(self._step(quality)))

    def at_code(self, code: int) -> CodedWavelets:
        """Encode with the step of a code; nothing else can be encoded, or estimated, afterwards."""
        return self._decided(self._encode(code, last=True))

    def matrix_bytes(self, code: int) -> int:
        """Return about how many bytes spectral transforms take with the step of a code."""
        return sum(part.matrix_bytes(one) for part, one in zip(self._parts, self._codes(code), strict=True))

    def estimated_bytes(self, code: int) -> float:
        """Return about how many bytes the step of a code takes, those of spectral transforms included."""
        parts = zip(self._parts, self._codes(code), strict=True)
        return sum(part.estimated_bytes(one) for part, one in parts) + self.matrix_bytes(code)

    @cached_property
    def _bytes_curve(self) -> "_Curve":
        """Logarithms of estimated bytes."""
        return _Curve(lambda code: log2(self.estimated_bytes(code) + 1), self._min_code)

    @cached_property
    def _error_curve(self) -> "_Curve":
        """Logarithms, with their signs changed, of estimated errors in units of the components."""
        from deepsic_codec.codec.wavelet_rate import estimated_error

        def estimate(code: int) -> float:
            parts = zip(self._parts, self._codes(code), strict=True)
            errors = [estimated_error(part.coefficients, one) for part, one in parts]
            weights = [len(grid.bands) for grid in self.grids] or [1]
            square = sum(weight * error**2 for weight, error in zip(weights, errors, strict=True)) / sum(weights)
            return -log2(max(square**0.5 if self.grids else errors[0], self._extent * self._smallest))

        return _Curve(estimate, self._min_code)

    @property
    def _smallest(self) -> float:
        return SMALLEST * min(1.0, self._scaled.widening)

    def code_for_bytes(self, limit: float) -> int:
        """Return the code of the step that takes about this number of bytes, without encoding."""
        return self._bytes_curve.code_of(log2(max(limit, 0.0) + 1))

    def code_for_error(self, error: float, extent: float) -> int:
        """Return the code of the step that leaves about an error, without encoding.

        The range of values has the extent in the error's unit.
        """
        return self._error_curve.code_of(-log2(error / REACHED_ERROR) - log2(self._extent / extent))

    def for_bytes(self, limit: float) -> CodedWavelets:
        """Encode to about this number of bytes, those of spectral transforms included."""

        def trial(code: int) -> tuple[float, CodedWavelets]:
            coded = self._encode(code)
            return log2(coded.nbytes + self.matrix_bytes(code) + 1), coded

        return self._decided(_search(self._bytes_curve, log2(max(limit, 0.0) + 1), 0.0, trial, CLOSE_BYTES))

    def for_rmse(self, rmse: float) -> CodedWavelets:
        """Encode to about a root mean square error in units of the samples."""
        return self._for_error(-log2(rmse), self._measured.rmse, self._scaled.extent)

    def for_psnr(self, psnr: float) -> CodedWavelets:
        """Encode to about a PSNR in dB, whose peak is the range of values."""
        return self._for_error(psnr / 20 * log2(10), lambda samples: 10 ** (-self._measured.psnr(samples) / 20), 1.0)

    def _for_error(self, target: float, measure: Callable[[NDArray[Any]], float], extent: float) -> CodedWavelets:
        """Encode to an error that `measure` gives, 2^-target; the range of values has this extent in its unit."""

        def trial(code: int) -> tuple[float, CodedWavelets]:
            coded = self._decided(self._encode(code))
            return -log2(max(measure(self.decode(coded)), extent * self._smallest)), coded

        # No coefficient of such a step, rounded, has a larger error than the target.
        safe = max(self._min_code, step_code(max(1 / UNIT, 2**-target * self._extent / extent)))
        return _search(self._error_curve, target, log2(self._extent / extent), trial, CLOSE_ERROR, safe)


class _Curve:
    """A falling curve over codes of steps, computed once an octave and interpolated between."""

    def __init__(self, compute: Callable[[int], float], min_code: int = 0) -> None:
        self._compute, self._min_code = compute, min_code
        self._known: dict[int, float] = {}

    def _at(self, octave: int) -> float:
        if octave not in self._known:
            self._known[octave] = self._compute(min(octave * PER_OCTAVE, STEPS - 1))
        return self._known[octave]

    def __call__(self, code: int) -> float:
        octave, rest = divmod(code, PER_OCTAVE)
        low = self._at(octave)
        return low + (self._at(octave + 1) - low) * rest / PER_OCTAVE if rest else low

    def code_of(self, value: float) -> int:
        """Return the code, not below the smallest, at which the curve is nearest to a value."""
        low, high = 0, STEPS // PER_OCTAVE
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._at(middle) >= value else (low, middle)
        fall = self._at(low) - self._at(high)
        share = (self._at(low) - value) / fall if fall > 0 else 0.0
        return min(STEPS - 1, max(self._min_code, round(PER_OCTAVE * (low + min(1.0, max(0.0, share))))))


def _search(
    curve: _Curve,
    target: float,
    correction: float,
    trial: Callable[[int], tuple[float, CodedWavelets]],
    close: float,
    safe: int | None = None,
) -> CodedWavelets:
    """Find the step whose trial comes nearest to a target.

    Parameters
    ----------
    curve : _Curve
        An estimate of what trials give; `correction` is what they give beyond it.
    target : float
        What the trial should give.
    trial : callable
        Encodes with the step of a code; returns a value that falls with the code, and the result.
    close : float
        Distance from the target at which the search ends.
    safe : int, optional
        Code that reaches the target, or more, where errors do not follow the step, as those of a constant.
    """
    trials: dict[int, tuple[float, CodedWavelets]] = {}
    code = curve.code_of(target - correction)
    while code not in trials and len(trials) < MAX_TRIALS:
        trials[code] = trial(code)
        value = trials[code][0]
        if abs(value - target) <= close:
            break
        below = max((one for one in trials if trials[one][0] > target), default=None)
        above = min((one for one in trials if trials[one][0] <= target), default=None)
        if below is None or above is None:
            code = curve.code_of(target - (value - curve(code)))
        else:  # the target lies between these codes
            share = (trials[below][0] - target) / (trials[below][0] - trials[above][0])
            # Where a curve has a bend, interpolation stays on one side of it: every second trial halves the distance.
            code = round(below + (0.5 if len(trials) % 2 else min(0.9, max(0.1, share))) * (above - below))
    value, best = min(trials.values(), key=lambda pair: abs(pair[0] - target))
    if safe is None or safe in trials or value >= target - SHORT:
        return best
    surer = trial(safe)
    return surer[1] if surer[0] > value else best
