"""A loaded model on a device: images to feature streams and label scores, and back."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec import config
from deepsic_codec.errors import ModelMismatch
from deepsic_codec.model.allocator import keep_freed_memory
from deepsic_codec.model.architecture import architecture_from, integer_prior
from deepsic_codec.model.coding import begin_each, decode_symbols, start_decoding, start_encoding
from deepsic_codec.model.device_coder.coder import DeviceCoder, coder_on
from deepsic_codec.model.exact.transforms import (
    PRIOR,
    RDO,
    SYNTHESIS,
    IntegerTransforms,
    Pixels,
    below,
    grey_levels,
    make_transforms,
    multiplies_bfloat16,
    whole_qualities,
)
from deepsic_codec.model.file import Arrays, ModelInfo, load_arrays
from deepsic_codec.model.networks import Architecture
from deepsic_codec.model.prior import Predictions
from deepsic_codec.model.quantise import RdoTables, quantise
from deepsic_codec.model.refine import SCHEDULES, Refiner
from deepsic_codec.model.transfer import aside, before_others, behind, fetch, join, settle, upload
from deepsic_codec.model.workers import Workers
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE

#: The encoder's effort where nothing is said.
DEFAULT_EFFORT = 1
#: What it is for.
DEFAULT_TUNE = "mse"

#: Pixels whose activations a CPU's caches hold (tried: 2^17 to 2^21).
CACHED_PIXELS = 1 << 18
#: The same for threads that work beside each other, which get in each other's way at every step, and what they take at
#: a time (tried: 2^17 to 2^21).
SPREAD_PIXELS = 1 << 19

#: On a GPU a batch is gone through in so many parts, if each has at least so many pixels (tried: 1 to 16).
PARTS, PART_PIXELS = 2, 1 << 21
#: From so many chunks for each thread of the host on, and from so many in all, a GPU does its own entropy coding, which
#: takes about as long for one as for hundreds (measured with 16 cores, more of which would wait for one another).
CODED_THERE, ENOUGH_THERE = 6, 96
#: Pixels that are refined at a time: gradients take a good hundred times as many bytes.
REFINED_PIXELS = 1 << 22
#: Batches that a GPU is at work on at a time: while one is entropy-coded, networks are at the other.
AT_ONCE = 2
#: Threads that copy images to and from where a GPU reads and writes them: one does not keep up with it.
COPIERS = 4

Shape = tuple[int, int, int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Encoded:
    """One encoded chunk.

    Attributes
    ----------
    features : bytes
        The arithmetic-coded symbols.
    cells : uint8 (S, ceil(H/64), ceil(W/64), classes + 1) or None
        Scores of each 64x64 pixel cell in 1/255; the last is *unknown*.
    grid : (int, int)
        Rows and columns of the symbols.
    """

    features: bytes
    cells: NDArray[np.uint8] | None
    grid: tuple[int, int]


class Runtime:
    """A model, loaded on a device.  All methods may be called from any thread.

    Parameters
    ----------
    info : ModelInfo
        The model file.
    device : str
        A torch device.

    Raises
    ------
    ModelMismatch
        If the file is damaged, altered, or does not fit its own description.
    """

    def __init__(self, info: ModelInfo, device: str = "cpu") -> None:
        self.info, self.device = info, torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        arrays = load_arrays(info)
        try:
            self.arch = architecture_from(info.architecture)
            self._transforms = make_transforms(self.arch, arrays, self.device)
            prior = {k: torch.from_numpy(v) for k, v in below(arrays, PRIOR).items()}
            self._prior = integer_prior(self.arch, prior, str(self.device))
            self._rdo = self._rdo_tables(arrays)
            self._tables = CoderTables.from_arrays(below(arrays, "decoder.coder")).check(self.arch.latents)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ModelMismatch(f"{info.path}: tensors do not fit the architecture: {error}") from None
        self._differentiable: Refiner | None = None
        self._device_coder: DeviceCoder | None = None
        self._sought = False
        #: Whether equal payloads give equal pixels on every machine: an integer synthesis.
        self.exact = self._transforms.exact
        threads = config.get().threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads, "deepsic-coder")
        #: From so many chunks on the device codes them.
        self._many = min(ENOUGH_THERE, CODED_THERE * threads)
        # networks already use every core; two at a time would only fight over them
        self._networks = threading.Lock()
        self._workers: Workers | None = None
        self._refining = threading.Lock()
        # batches, or parts of one, begun before another is waited for; a CPU that works on two is not faster
        self._lag = 0 if self.device.type == "cpu" else 1
        self._decoders = ThreadPoolExecutor(2, "deepsic-decoder") if self._lag else None
        self._copiers = ThreadPoolExecutor(COPIERS, "deepsic-copier") if self._lag else None
        self._at_once = threading.BoundedSemaphore(AT_ONCE) if self._lag else nullcontext()
        settle(self.device)

    def _rdo_tables(self, arrays: Arrays) -> RdoTables | None:
        """Tables of the optimised quantiser, if the model has any."""
        found = {k: torch.from_numpy(v) for k, v in below(arrays, RDO).items()}
        if not found:
            return None
        return RdoTables(found["saved"], found["price"]).check(self.arch.latents).to(self.device)

    def encode(
        self,
        images: Sequence[Pixels],
        qualities: Sequence[float],
        labels: bool = True,
        efforts: Sequence[int] | None = None,
        tunes: Sequence[str] | None = None,
        then: Callable[[int, Encoded], Any] | None = None,
    ) -> list[Any]:
        """Encode chunks.

        Parameters
        ----------
        images : sequence of uint8 or int16 (S,H,W,3)
            One array per chunk, in grey levels (uint8) or 64ths of them (int16, 0..16320);
            shapes may differ, equal ones of one dtype run as one batch.
        qualities : sequence of float
            1..100, one per chunk.
        labels : bool
            Whether to compute label scores.
        efforts : sequence of int, optional
            One per chunk, 1 by default: 0 for the nearest symbols, 1 for rate-distortion optimised quantisation,
            more for refinement (refine.SCHEDULES).
        tunes : sequence of str, optional
            What refinement is for: "mse", the default, or "ms-ssim" (distortion.py); one per chunk.
        then : callable, optional
            Called with the number of each chunk and what it was encoded to, from any thread, while others are at work.

        Returns
        -------
        list
            Encoded, or what ``then`` made of them.
        """
        effort = [DEFAULT_EFFORT] * len(images) if efforts is None else list(efforts)
        tune = [DEFAULT_TUNE] * len(images) if tunes is None else list(tunes)

        def start(group: list[int], crowd: int) -> Callable[[], list[Encoded]]:
            s, h, w, _ = images[group[0]].shape
            # repeating the edge costs fewer bits than a hard edge would
            joined, coder = (
                join([images[i] for i in group], LATENT_STRIDE, self.device, self.each),
                self._coder_for(crowd),
            )
            quality = [qualities[i] for i in group]
            symbols, predictions, cells = self._start_analysis(
                joined, np.repeat(quality, s), labels, effort[group[0]], (h, w), tune[group[0]]
            )
            with torch.inference_mode(), aside(self.device) if coder else nullcontext():
                streams = start_encoding(
                    self._prior,
                    self._tables,
                    symbols,
                    len(group),
                    quality,
                    self._coders,
                    predictions=predictions,
                    there=coder,
                    crowd=crowd,
                )
            grid = symbols.shape[1], symbols.shape[2]

            def finish() -> list[Encoded]:
                scores = np.split(cells(), len(group)) if labels else [None] * len(group)
                return [Encoded(f, c, grid) for f, c in zip(streams(), scores, strict=True)]

            return finish

        groups = [(*i.shape[:3], e, t, i.dtype == np.int16) for i, e, t in zip(images, effort, tune, strict=True)]
        with self._at_once:
            return self._grouped(groups, start, then=then)

    def decode(
        self,
        features: Sequence[bytes],
        shapes: Sequence[Shape],
        qualities: Sequence[float],
        fine: Sequence[bool] | None = None,
        then: Callable[[int, Pixels], Any] | None = None,
    ) -> list[Any]:
        """Decode feature sections to chunks (S,H,W,3) of the given (S,H,W).

        Those that ``fine`` names come as int16 in 64ths of a grey level, 0..16320, the others
        as uint8 in grey levels.  They may be parts of larger arrays.  With ``then``, which is called
        with the number of each chunk and the chunk, from any threads, what that returns is.

        Raises
        ------
        CorruptPayload
            If a stream cannot be decoded.
        """

        def begin(group: list[int], crowd: int) -> Callable[[], list[Pixels]]:
            s, h, w = shapes[group[0]]
            quality = [qualities[i] for i in group]
            given, coder = ([features[i] for i in group], shapes[group[0]], quality), self._coder_for(crowd)
            symbols: Any
            check: Callable[[], Any] = list  # nothing
            if coder is None:
                symbols = np.concatenate(self._symbols(*given))
            else:
                symbols, check = self._start_symbols(*given, coder, crowd)
            pixels = self._start_synthesis(symbols, np.repeat(quality, s), h, w, wanted[group[0]], len(group))

            def finish() -> list[Pixels]:
                check()
                return pixels()

            return finish

        def start(group: list[int], crowd: int) -> Callable[[], list[Pixels]]:
            if self._coder_for(crowd) is not None:
                return begin(group, crowd)
            # prior and coder wait for one another a dozen times: meanwhile those of the next group are at work
            begun = _submitted(self._decoders, begin, group, crowd)
            return lambda: begun()()

        wanted = [False] * len(shapes) if fine is None else list(fine)
        groups = [(*shape, f) for shape, f in zip(shapes, wanted, strict=True)]
        with self._at_once:
            return self._grouped(groups, start, 2 * self._lag, then, self.each)

    def decode_symbols(
        self, features: Sequence[bytes], shapes: Sequence[Shape], qualities: Sequence[float]
    ) -> list[NDArray[np.int16]]:
        """Decode feature sections to quantised latents int16 (S,C,h,w) only."""

        def start(group: list[int], crowd: int) -> Callable[[], list[NDArray[np.int16]]]:
            given = [features[i] for i in group], shapes[group[0]], [qualities[i] for i in group]
            if (coder := self._coder_for(crowd)) is None:
                found = self._symbols(*given)
                return lambda: [np.ascontiguousarray(v.transpose(0, 3, 1, 2)) for v in found]
            symbols, check = self._start_symbols(*given, coder, crowd)
            joined = fetch(symbols.permute(0, 3, 1, 2).contiguous())

            def finish() -> list[NDArray[np.int16]]:
                check()
                return [part.copy() for part in np.split(joined(), len(group))]

            return finish

        return self._grouped(shapes, start)

    def label_symbols(
        self, symbols: Sequence[NDArray[np.int16]], shapes: Sequence[Shape], qualities: Sequence[float]
    ) -> list[NDArray[np.uint8]]:
        """Label scores (S,ceil(H/64),ceil(W/64),classes + 1) from quantised latents (S,C,h,w)."""

        def start(group: list[int], crowd: int) -> Callable[[], list[NDArray[np.uint8]]]:
            quality = np.repeat([qualities[i] for i in group], shapes[group[0]][0])
            with self._alone():
                nhwc = np.concatenate([symbols[i] for i in group]).transpose(0, 2, 3, 1)
                cells = fetch(self._score(self._transforms.latents(np.ascontiguousarray(nhwc), quality), quality))
            return lambda: np.split(cells(), len(group))

        return self._grouped(shapes, start)

    def _grouped(
        self,
        shapes: Sequence[Any],
        start: Callable[[list[int], int], Callable[[], list[Result]]],
        lag: int | None = None,
        then: Callable[[int, Result], Any] | None = None,
        each: Callable[[Callable[[Any], Any], Sequence[Any]], Any] = lambda function, items: list(map(function, items)),
    ) -> list[Any]:
        """Results in order from groups of equal shape, none much larger than the batch limit.

        ``start`` begins a group, of so many of its shape in all, and what it returns waits for its results; ``lag``
        further ones are begun before. Where the device codes by itself they are larger, and more are begun.
        ``then`` is called with ``each`` number and result.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, shape in enumerate(shapes):
            groups[tuple(shape)].append(i)

        def parts(limit: int, shares: int = 1) -> Iterator[tuple[list[int], int]]:
            for (s, h, w, *_), members in groups.items():
                size = max(1, min(limit // max(1, s * h * w), -(-len(members) // shares)))
                for k in range(0, len(members), size):
                    yield members[k : k + size], len(members)

        def whole_part(part: list[int], crowd: int) -> list[Any]:
            results = start(part, crowd)()
            return results if then is None else list(map(then, part, results))

        limit, threads = config.get().pixels_per_call(self.device.type), self._threads()
        if self._lag:  # parts, so that one is entropy-coded while the device has another
            whole = sum(s * h * w for s, h, w, *_ in shapes)
            part = max(PART_PIXELS, -(-whole // PARTS))
            there = self._coder_for(max(map(len, groups.values()), default=0)) is not None
            limit, lag = (part, PARTS) if there else (min(limit, part), lag)
        share = SPREAD_PIXELS if config.get().batch_pixels is None else min(SPREAD_PIXELS, limit // threads)
        small = list(parts(share, threads)) if threads > 1 else []
        if len(small) >= threads > 1:
            with self._networks:
                found = self._team(threads).run([lambda part=part: whole_part(*part) for part in small])  # type: ignore[misc]
            return _in_order(zip((part for part, _ in small), found, strict=True), len(shapes), None, each)
        begun = ((part, start(part, crowd)) for part, crowd in parts(limit))
        return _in_order(behind(begun, self._lag if lag is None else lag), len(shapes), then, each)

    def each(self, function: Callable[[Any], Result], items: Sequence[Any]) -> list[Result]:
        """What a function makes of each item; beside a GPU some cores share them out."""
        if self._copiers is None or len(items) < 2:
            return [function(item) for item in items]
        return begin_each(self._copiers, lambda i: function(items[i]), len(items))()

    def _threads(self) -> int:
        """How many threads may share out a batch: those of a CPU, unless this is one of them."""
        if self.device.type != "cpu" or Workers.inside() or _forked:
            return 1
        return config.get().threads or torch.get_num_threads()

    def _team(self, count: int) -> Workers:
        if self._workers is None or self._workers.count != count:
            self._workers = Workers(count)
        return self._workers

    @property
    def _coders(self) -> ThreadPoolExecutor | None:
        """Threads for entropy coding; a worker does its own."""
        return None if Workers.inside() else self._pool

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the networks, and keep them from a caller's autocast."""
        worker, threads = Workers.inside(), config.get().threads
        held = nullcontext() if worker else self._networks  # for a worker, who gave it its work holds them
        with held, torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            if threads and threads != torch.get_num_threads() and not worker and not _forked:
                torch.set_num_threads(threads)
            yield

    def _pieces(self, images: int, h: int, w: int, slices: int = 1) -> Iterator[slice]:
        """Slices of a batch of images within the batch limit; on a CPU small enough for its caches.

        They have whole chunks of so many ``slices`` where the limit has room for one.
        """
        limit = config.get().pixels_per_call(self.device.type)
        if self.device.type == "cpu":
            limit = min(limit, SPREAD_PIXELS if Workers.inside() else CACHED_PIXELS)
        size = max(1, limit // (h * w))
        size -= size % slices if size > slices else 0
        for k in range(0, images, size):
            yield slice(k, k + size)

    def _analyse(
        self, images: Pixels, quality: NDArray[np.float64], labels: bool, effort: int = DEFAULT_EFFORT
    ) -> tuple[NDArray[np.int16], NDArray[np.uint8] | None]:
        """(N,H,W,3) -> symbols (N,h,w,C) and cell scores."""
        joined = join([images], LATENT_STRIDE, self.device)
        symbols, _, cells = self._start_analysis(joined, quality, labels, effort, images.shape[1:3])
        return fetch(symbols)(), cells() if labels else None

    def _start_analysis(
        self,
        images: Tensor,
        quality: NDArray[np.float64],
        labels: bool,
        effort: int,
        size: tuple[int, int],
        tune: str = DEFAULT_TUNE,
    ) -> tuple[Tensor, Predictions | None, Callable[[], NDArray[np.uint8]]]:
        """Images (N,H,W,3), brought up to whole latents from this size -> symbols.

        Returns
        -------
        symbols : Tensor
            int16 (N,h,w,C), on the device.
        predictions : Predictions or None
            What the prior makes of them, where that came up on the way.
        cells : callable
            Waits for the cell scores.
        """
        n, h, w, _ = images.shape
        symbols: list[Tensor] = []
        predictions: list[Predictions | None] = []
        cells: list[Callable[[], NDArray[np.uint8]]] = []
        with self._alone():
            for part in self._pieces(n, h, w):
                found = self._transforms.analyse(images[part], quality[part])
                scaled = found.scaled.clamp(-SYMBOL_MAX, SYMBOL_MAX).contiguous()
                whole = whole_qualities(quality[part])[1]
                same = int(whole[0]) if bool((whole == whole[0]).all()) else upload(whole, self.device)
                chosen, known = quantise(self._prior, self._rdo if effort else None, scaled, same)
                if effort in SCHEDULES and self._rdo is not None and isinstance(self._transforms, IntegerTransforms):
                    own = images[part, : size[0], : size[1]]
                    chosen, known = self._refined(self._transforms, own, chosen, quality[part], effort, tune), None
                symbols.append(chosen.to(torch.int16))
                predictions.append(known)
                if labels:
                    cells.append(fetch(self._score(found.latents, quality[part])))
            return torch.cat(symbols), _joined(predictions), lambda: np.concatenate([some() for some in cells])

    def _refined(
        self,
        transforms: IntegerTransforms,
        images: Tensor,
        symbols: Tensor,
        quality: NDArray[np.float64],
        effort: int,
        tune: str,
    ) -> Tensor:
        """Symbols (N,h,w,C) of images (N,H,W,3), improved; some images at a time."""
        steps, whole = transforms.steps(quality), whole_qualities(quality)[1]
        size, found = max(1, REFINED_PIXELS // (images.shape[1] * images.shape[2])), []
        for k in range(0, len(images), size):
            some = slice(k, k + size)
            given = grey_levels(images[some]), symbols[some], steps[some], whole[some]
            found.append(self._refiner().refine(*given, SCHEDULES[effort], tune))
        return torch.cat(found)

    def _refiner(self) -> Refiner:
        """The decoder in differentiable form, made on first use."""
        with self._refining:
            if self._differentiable is None:
                arrays = load_arrays(self.info)
                synthesis, prior = (
                    {k: torch.from_numpy(v) for k, v in below(arrays, part).items()} for part in (SYNTHESIS, PRIOR)
                )
                with torch.inference_mode(False):
                    bf16 = multiplies_bfloat16(self.device)
                    self._differentiable = Refiner(cast(Architecture, self.arch), synthesis, prior, self.device, bf16)
            return self._differentiable

    def _symbols(self, features: list[bytes], shape: Shape, quality: list[float]) -> list[NDArray[np.int16]]:
        s, h, w = shape
        grid = -(-h // LATENT_STRIDE), -(-w // LATENT_STRIDE)
        with torch.inference_mode(), before_others(self.device):
            return decode_symbols(self._prior, self._tables, features, s, grid, quality, self._coders)

    def _start_symbols(
        self, features: list[bytes], shape: Shape, quality: list[float], coder: DeviceCoder, crowd: int
    ) -> tuple[Tensor, Callable[[], None]]:
        """Symbols (N,h,w,C) on the device, and what checks them."""
        s, h, w = shape
        grid = -(-h // LATENT_STRIDE), -(-w // LATENT_STRIDE)
        with torch.inference_mode(), aside(self.device, after=False) as ready:
            symbols, check = start_decoding(self._prior, features, s, grid, quality, coder, crowd)
        with torch.inference_mode():
            return ready(symbols), check

    def _coder_for(self, chunks: int) -> DeviceCoder | None:
        """The device's own entropy coder, if so many chunks are worth it."""
        if self.device.type == "cpu" or chunks < self._many:
            return None
        with self._refining:
            if not self._sought:
                self._sought = True
                self._device_coder = coder_on(self._tables, self.arch.latents, self._prior.steps, self.device)
            return self._device_coder

    def _synthesise(
        self, symbols: NDArray[np.int16], quality: NDArray[np.float64], h: int, w: int, fine: bool = False
    ) -> Pixels:
        """Symbols (N,h,w,C) -> (N,H,W,3)."""
        return self._start_synthesis(symbols, quality, h, w, fine, 1)()[0]

    def _start_synthesis(
        self,
        symbols: NDArray[np.int16] | Tensor,
        quality: NDArray[np.float64],
        h: int,
        w: int,
        fine: bool,
        chunks: int,
    ) -> Callable[[], list[Pixels]]:
        """Symbols (N,h,w,C) of some chunks -> what waits for these, (N / chunks,H,W,3) each."""
        slices = len(symbols) // chunks
        begun: list[tuple[slice, Callable[[], Any]]] = []
        with self._alone():
            for part in self._pieces(len(symbols), h, w, slices):
                begun.append((part, fetch(self._transforms.synthesise(symbols[part], quality[part], fine)[:, :h, :w])))

        def finish() -> list[Pixels]:
            found = [(part, pixels()) for part, pixels in begun]
            begun.clear()
            if all(part.start % slices == 0 for part, _ in found):  # of whole chunks
                return [chunk for part, pixels in found for chunk in np.split(pixels, len(pixels) // slices)]
            return np.split(np.concatenate([pixels for _, pixels in found]), chunks)

        return finish

    def _score(self, latents: Tensor, quality: NDArray[np.float64]) -> Tensor:
        """Scores of all cells of latents (N,h,w,C); cells at the lower and right border may be smaller."""
        n = LABEL_CELL // LATENT_STRIDE
        images, h, w, c = latents.shape
        rows, cols = -(-h // n), -(-w // n)
        scores = torch.empty((images, rows, cols, self.arch.classes), dtype=torch.uint8, device=self.device)
        for r0, r1 in _blocks(h, n):
            for c0, c1 in _blocks(w, n):
                part = latents[:, r0 * n : min(r1 * n, h), c0 * n : min(c1 * n, w)]
                ch, cw = min(n, part.shape[1]), min(n, part.shape[2])
                cells = part.reshape(images, r1 - r0, ch, c1 - c0, cw, c).permute(0, 1, 3, 2, 4, 5)
                count = (r1 - r0) * (c1 - c0)
                found = self._transforms.score(cells.reshape(-1, ch, cw, c), np.repeat(quality, count))
                scores[:, r0:r1, c0:c1] = found.reshape(images, r1 - r0, c1 - c0, -1)
        return scores


def _in_order(
    found: Iterable[tuple[list[int], list[Result]]],
    count: int,
    then: Callable[[int, Result], Any] | None,
    each: Callable[[Callable[[Any], Any], Sequence[Any]], Any],
) -> list[Any]:
    """Results of parts, each with the numbers of its own, in the order of these."""
    out: dict[int, Any] = {}
    for part, results in found:
        pairs = list(zip(part, results, strict=True))
        out |= pairs if then is None else zip(part, each(lambda pair: then(*pair), pairs), strict=True)
    return [out[i] for i in range(count)]


def _submitted(pool: ThreadPoolExecutor | None, function: Callable[..., Result], *given: Any) -> Callable[[], Result]:
    """Begin a call on a thread of a pool; what is returned gives its result.

    It is made here and now without a pool, or if the interpreter is ending.
    """
    if pool is not None:
        with suppress(RuntimeError):
            return pool.submit(function, *given).result
    found = function(*given)
    return lambda: found


def _joined(parts: list[Predictions | None]) -> Predictions | None:
    """Predictions of parts of a batch, pass by pass; None unless all are known."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return [(torch.cat([m for m, _ in one]), torch.cat([s for _, s in one])) for one in zip(*known, strict=True)]


def _blocks(size: int, n: int) -> Iterator[tuple[int, int]]:
    """Ranges of cells along one axis: the whole ones, then a last smaller one."""
    whole = size // n
    if whole:
        yield 0, whole
    if size % n:
        yield whole, whole + 1


_loaded: dict[tuple[str, ...], Runtime] = {}
_loading = threading.Lock()
#: Whether this process was forked: OpenMP's threads did not survive that, and torch would wait for them for ever.
_forked = False


def get_runtime(info: ModelInfo) -> Runtime:
    """The model on this process's device, loaded on first use."""
    device = config.device_in_use()
    # one decoder and head may have several encoders
    key = (info.decoder, info.head, info.encoder, device, config.get().kernels)
    with _loading:
        if key not in _loaded:
            _loaded[key] = Runtime(info, device)
        return _loaded[key]


def _after_fork() -> None:
    """Forget locks, thread pools and models of the parent, whose threads do not exist here."""
    global _loading, _forked
    _loading, _forked = threading.Lock(), True
    _loaded.clear()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
