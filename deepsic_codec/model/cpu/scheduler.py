"""A model on a CPU. Threads of one pool take chunks; where there are fewer of these, they share an image."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.batch import (
    DEFAULT_EFFORT,
    DEFAULT_TUNE,
    Encoded,
    Pixels,
    Scheduler,
    Shape,
    grid_of,
    uses_trellis,
    whole_qualities,
)
from deepsic_codec.model.cpu.dot import check as check_instructions
from deepsic_codec.model.cpu.prior import Prior
from deepsic_codec.model.cpu.transforms import Analysis, Head, Synthesis, dequantise
from deepsic_codec.model.exact.formats import HUNDREDTHS, PIXEL_BITS, QUALITIES
from deepsic_codec.model.families import load_checked
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, PRIOR, RDO, SYNTHESIS, below
from deepsic_codec.model.file import ModelInfo
from deepsic_codec.model.threads import host_threads, keep_freed_memory, parallel_map
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.require import require

Result = TypeVar("Result")
Symbols = NDArray[np.int16]

#: A part of an image that a thread takes has at least this many times the rows of its halo, which are computed twice.
HALOS = 2


class CpuScheduler(Scheduler):
    """`batch.Scheduler` of the family `"deepsic"` in compiled loops.

    Raises
    ------
    ModelMismatch
        If the file is damaged, altered, or does not fit its path description.
    """

    def __init__(self, info: ModelInfo) -> None:
        keep_freed_memory()
        check_instructions()
        self.info = info
        arch, arrays = load_checked(info)
        self.arch: Sizes = arch
        sizes = cast(Architecture, arch)
        self.coder_tables = CoderTables.from_arrays(below(arrays, "decoder.coder"))
        gains = below(arrays, GAINS)
        self.prior = Prior(sizes, below(arrays, PRIOR), below(arrays, RDO), gains, self.coder_tables)
        self._analysis = Analysis(sizes, below(arrays, ANALYSIS))
        self._synthesis = Synthesis(sizes, below(arrays, SYNTHESIS))
        self._head = Head(sizes, below(arrays, HEAD))
        self._step_tables = [gains[name].astype(np.int64) for name in ("step", "half")]
        self._refining = threading.Lock()
        self._torch: Any = None

    def encode(
        self,
        images: Sequence[Pixels],
        qualities: Sequence[float],
        efforts: Sequence[int] | None = None,
        tunes: Sequence[str] | None = None,
        *,
        features: bool = True,
        labels: bool = True,
        symbols: bool = False,
        pixels: bool = False,
        finish: Sequence[Callable[[Encoded], Any]] | None = None,
    ) -> list[Any]:
        effort = [DEFAULT_EFFORT] * len(images) if efforts is None else list(efforts)
        if max(effort, default=0) > 1:
            require("torch", "torch", purpose=f"effort={max(effort)}")
        tune = [DEFAULT_TUNE] * len(images) if tunes is None else list(tunes)
        parts = self._parts(len(images), sum(map(len, images)))

        def encode(i: int) -> Any:
            image = images[i]
            slices, height, width, _ = image.shape
            quantiser = Quantiser(qualities[i], uses_trellis(effort[i], qualities[i]))
            trellis, (whole, steps) = quantiser.trellis, self.steps(quantiser)
            latents = self.analyse(image, whole, parts)
            refines, stream = effort[i] > 1, None
            if refines:
                chosen = self._refined(image, latents, quantiser, effort[i], tune[i])
            elif features or symbols or pixels:
                chosen, stream = self.prior.choose(latents, steps, whole, effort[i] > 0, features, trellis)
            cells = self._scores(latents, height, width, whole) if labels else None
            del latents
            if refines and features:
                stream = self.prior.encode(chosen, whole, trellis)
            decoded = None
            if pixels:
                decoded = self._synthesise(chosen, steps, whole, (height, width), image.dtype == np.int16, parts)
            grid = grid_of((slices, height, width))
            encoded = Encoded(grid, quantiser, stream, cells, chosen if symbols else None, decoded)
            return encoded if finish is None else finish[i](encoded)

        return self._each(encode, len(images), parts)

    def decode(
        self,
        features: Sequence[bytes],
        shapes: Sequence[Shape],
        quantisers: Sequence[Quantiser],
        q6: Sequence[bool] | None = None,
        finish: Sequence[Callable[[Pixels], Any]] | None = None,
    ) -> list[Any]:
        parts = self._parts(len(features), sum(slices for slices, _, _ in shapes))

        def decode(i: int) -> Any:
            whole, steps = self.steps(quantisers[i])
            symbols = self.prior.decode(features[i], shapes[i][0], grid_of(shapes[i]), whole, quantisers[i].trellis)
            pixels = self._synthesise(symbols, steps, whole, shapes[i][1:], q6 is not None and q6[i], parts)
            return pixels if finish is None else finish[i](pixels)

        return self._each(decode, len(features), parts)

    def decode_symbols(
        self, features: Sequence[bytes], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[Symbols]:
        def decode(i: int) -> Symbols:
            whole, _ = self.steps(quantisers[i])
            symbols = self.prior.decode(features[i], shapes[i][0], grid_of(shapes[i]), whole, quantisers[i].trellis)
            return np.ascontiguousarray(symbols.transpose(0, 3, 1, 2))

        return parallel_map(decode, range(len(features)))

    def encode_symbols(
        self, symbols: Sequence[Symbols], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[bytes]:
        def encode(i: int) -> bytes:
            return self.prior.encode(symbols[i], self.steps(quantisers[i])[0], quantisers[i].trellis)

        return parallel_map(encode, range(len(symbols)))

    def synthesise(
        self, symbols: Sequence[Symbols], shapes: Sequence[Shape], quantisers: Sequence[Quantiser], q6: bool
    ) -> list[Pixels]:
        parts = self._parts(len(symbols), sum(map(len, symbols)))

        def synthesise(i: int) -> Pixels:
            whole, steps = self.steps(quantisers[i])
            return self._synthesise(symbols[i], steps, whole, shapes[i][1:], q6, parts)

        return self._each(synthesise, len(symbols), parts)

    def score(
        self, symbols: Sequence[Symbols], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[NDArray[np.uint8]]:
        def score(i: int) -> NDArray[np.uint8]:
            whole, steps = self.steps(quantisers[i])
            latents = _latents(symbols[i].transpose(0, 2, 3, 1), steps)
            return self._scores(latents, shapes[i][1], shapes[i][2], whole)

        return parallel_map(score, range(len(symbols)))

    def dequantise(self, symbols: Symbols, quantiser: Quantiser) -> NDArray[np.float32]:
        return _latents(symbols, self.steps(quantiser)[1]).astype(np.float32)

    def map(self, function: Callable[..., Result], *columns: Iterable[Any]) -> list[Result]:
        rows = list(zip(*columns, strict=True))
        return parallel_map(lambda i: function(*rows[i]), range(len(rows)))

    def steps(self, quantiser: Quantiser) -> tuple[int, NDArray[np.int32]]:
        """Return the whole quality of a quantiser, and its steps int32 (C,): with a trellis, half steps."""
        hundredths, whole = (int(values[0]) for values in whole_qualities(np.array([quantiser.quality])))
        low = min(max(hundredths // HUNDREDTHS, 1), QUALITIES - 1)
        part = hundredths - low * HUNDREDTHS
        table = self._step_tables[quantiser.trellis]
        steps = table[low - 1] * (HUNDREDTHS - part) + table[low] * part
        return whole, ((steps + HUNDREDTHS // 2) // HUNDREDTHS).astype(np.int32)

    def _parts(self, chunks: int, images: int) -> int:
        """Return the number of parts of each image: more than one where threads would have nothing to do."""
        threads = host_threads()
        return 1 if chunks >= threads else ceil_div(threads, max(1, images))

    def _each(self, function: Callable[[int], Result], count: int, parts: int) -> list[Result]:
        """Run a function for each chunk, on threads of the pool unless these share images."""
        if parts > 1:
            return [function(i) for i in range(count)]
        return parallel_map(function, range(count))

    def analyse(self, image: Pixels, whole: int, parts: int = 1) -> NDArray[np.int32]:
        """Return latents (S,h,w,C) of a chunk (S,H,W,3) at a whole quality; `parts` of each image run at a time."""
        height, width = image.shape[1:3]
        edge = -height % LATENT_STRIDE, -width % LATENT_STRIDE
        # Repeated edges cost fewer bits than a hard edge.
        if any(edge):
            image = cast(Pixels, np.pad(image, ((0, 0), (0, edge[0]), (0, edge[1]), (0, 0)), "edge"))
        rest: NDArray[np.int8] | None = None
        if image.dtype == np.int16:
            grey = ((image + (1 << PIXEL_BITS >> 1)) >> PIXEL_BITS).astype(np.uint8)
            rest = (image - (grey.astype(np.int16) << PIXEL_BITS)).astype(np.int8)
        else:
            grey = np.ascontiguousarray(image)
        slices, h, w = len(image), image.shape[1] // LATENT_STRIDE, image.shape[2] // LATENT_STRIDE
        latents = np.empty((slices, h, w, self.arch.latents), np.int32)

        def analyse(part: tuple[int, int, int, int, int]) -> None:
            s, first, last, above, below = part
            rows = slice((first - above) * LATENT_STRIDE, (last + below) * LATENT_STRIDE)
            levels, fractions = grey[s, rows], None if rest is None else rest[s, rows]
            self._analysis(levels, fractions, whole, latents[s, first:last], above, below)

        _in_parts(analyse, slices, h, parts, self._analysis.halo)
        return latents

    def _synthesise(
        self, symbols: Symbols, steps: NDArray[np.int32], whole: int, size: tuple[int, int], q6: bool, parts: int
    ) -> Pixels:
        """Return pixels (S,H,W,3) of symbols (S,h,w,C)."""
        pixels = np.empty((len(symbols), *size, 3), np.int16 if q6 else np.uint8)
        whole_symbols = np.ascontiguousarray(symbols)

        def synthesise(part: tuple[int, int, int, int, int]) -> None:
            s, first, last, above, below = part
            out = pixels[s, first * LATENT_STRIDE : last * LATENT_STRIDE]
            self._synthesis(whole_symbols[s, first - above : last + below], steps, whole, out, above, below)

        _in_parts(synthesise, len(symbols), symbols.shape[1], parts, self._synthesis.halo)
        return pixels

    def _scores(self, latents: NDArray[np.int32], height: int, width: int, whole: int) -> NDArray[np.uint8]:
        """Return what the head gives (S,rows,columns,outputs) for the label cells of latents (S,h,w,C)."""
        shape = len(latents), ceil_div(height, LABEL_CELL), ceil_div(width, LABEL_CELL), self.arch.outputs
        scores = np.empty(shape, np.uint8)
        for image, out in zip(latents, scores, strict=True):
            self._head(image, whole, out)
        return scores

    def _refined(
        self, image: Pixels, latents: NDArray[np.int32], quantiser: Quantiser, effort: int, tune: str
    ) -> Symbols:
        """Return refined symbols of a chunk, which torch computes."""
        require("torch", "torch", purpose=f"effort={effort}")
        import torch

        from deepsic_codec.model.exact.transforms import in_steps
        from deepsic_codec.model.runtime import LoadedModel

        with self._refining, torch.inference_mode():
            if self._torch is None:
                self._torch = LoadedModel(self.info)
            pixels = torch.from_numpy(np.array(image))  # torch warns of arrays that cannot be written to
            if quantiser.trellis:
                return cast(Symbols, self._torch.refine_paths(pixels, latents, quantiser.quality, effort, tune))
            steps = torch.from_numpy(np.tile(self.steps(quantiser)[1], (len(image), 1)))
            scaled = in_steps(torch.from_numpy(latents), steps)
            qualities = np.full(len(image), quantiser.quality)
            chosen = self._torch.choose(scaled, qualities, effort, tune, pixels)
            return cast(Symbols, chosen.symbols.numpy())


def _latents(symbols: Symbols, steps: NDArray[np.int32]) -> NDArray[np.int32]:
    latents = np.empty(symbols.shape, np.int32)
    channels = symbols.shape[-1]
    dequantise(np.ascontiguousarray(symbols).reshape(-1, channels), steps, latents.reshape(-1, channels))
    return latents


def _in_parts(
    function: Callable[[tuple[int, int, int, int, int]], None], images: int, rows: int, parts: int, halo: int
) -> None:
    """Call a function for parts of images: image, first and last row, and rows of the halo on both sides."""
    count = max(1, min(parts, rows // (HALOS * max(1, halo))))
    ends = [rows * i // count for i in range(count + 1)]
    tasks = [
        (image, first, last, halo if first else 0, halo if last < rows else 0)
        for image in range(images)
        for first, last in zip(ends[:-1], ends[1:], strict=True)
    ]
    if parts > 1:
        parallel_map(function, tasks)
    else:
        for task in tasks:
            function(task)
