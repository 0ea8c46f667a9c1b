"""Run a model in torch over whole batches: groups of equal shape, results in order.

A pipeline starts each group on the device, waits for its results and passes each result through the last function of
its chunk, on the host. A GPU has further groups started while the host codes, packs or restores the chunks of one.
"""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec import config
from deepsic_codec.axes import ceil_div
from deepsic_codec.model.batch import (
    DEFAULT_EFFORT,
    DEFAULT_TUNE,
    Encoded,
    Pixels,
    Qualities,
    Scheduler,
    Shape,
    grid_of,
    uses_trellis,
)
from deepsic_codec.model.device import download, stack_padded, upload
from deepsic_codec.model.device_coder.coder import DeviceCoder
from deepsic_codec.model.neighbours import Predictions
from deepsic_codec.model.runtime import Chosen, LoadedModel
from deepsic_codec.model.threads import Pending, host_threads, pipelined, submit, submit_each
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.payload.fields import Quantiser

# Pixels of a call on a CPU, whose activations fit its caches (tried: 2^17 to 2^21).
CACHED_PIXELS = 1 << 18
# A GPU takes a batch in PARTS groups, if each has at least PART_PIXELS (tried: 1 to 16 parts).
PARTS, PART_PIXELS = 2, 1 << 21
# The GPU does the entropy coding from min(96, 6 per host thread) chunks on: its run time hardly depends on their number
# (measured with 16 cores; further cores would wait for one another).
DEVICE_CODER_MIN_PER_THREAD = 6
DEVICE_CODER_MIN_CHUNKS = 96
# Batches that a GPU works on at a time: while one is entropy-coded, the networks run on the other.
CONCURRENT_BATCHES = 2
# Threads that copy images to and from pinned memory: one does not keep up with a GPU.
COPY_THREADS = 4

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Pipeline(Generic[Result]):
    """Functions that a batch goes through.

    `start(indices, total)` starts a group of chunks of equal shape and returns their pending results; `total` is the
    number of chunks of this shape in the batch. `finish` has the last function of each chunk, which takes its result on
    the host; the threads of `pool` share these. `prefetch` groups are started before the results of one are waited for.
    """

    start: Callable[[list[int], int], Pending[list[Result]]]
    finish: Sequence[Callable[[Result], Any]] | None = None
    prefetch: int = 0
    pool: ThreadPoolExecutor | None = None

    def finished(self, indices: list[int], results: list[Result]) -> list[Any]:
        """Pass the results of a group through the last functions of their chunks."""
        if self.finish is None:
            return results
        finish = [self.finish[i] for i in indices]
        return submit_each(self.pool if len(indices) > 1 else None, lambda k: finish[k](results[k]), len(indices))()


@dataclass(frozen=True, eq=False)
class Group:
    """Chunks of a batch of one shape, all with a trellis or all without; `total` as in `Pipeline`."""

    indices: list[int]
    total: int
    shape: Shape
    qualities: list[float]
    trellis: bool

    def of_images(self) -> Qualities:
        """Return the quality of each image (N,)."""
        return np.repeat(self.qualities, self.shape[0])

    def joined(self, symbols: Sequence[NDArray[np.int16]]) -> NDArray[np.int16]:
        """Return those of the symbols of a batch that belong to this group, one after the other."""
        return np.concatenate([symbols[i] for i in self.indices])


class TorchScheduler(Scheduler):
    """Runs a model with torch.

    Parameters
    ----------
    model : LoadedModel
        The model on its device.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.device = model.device
        self._coder_pools: dict[int, ThreadPoolExecutor] = {}  # by their number of threads
        # The networks use every core already: two calls at a time would only compete.
        self._networks = threading.Lock()
        # Groups that are started before one is waited for; a CPU that works on two groups is not faster.
        self._prefetch = 0 if self.device.type == "cpu" else 1
        self._decode_pool = ThreadPoolExecutor(2, "deepsic-decoder") if self._prefetch else None
        self._copy_pool = ThreadPoolExecutor(COPY_THREADS, "deepsic-copier") if self._prefetch else None
        self._batches = threading.BoundedSemaphore(CONCURRENT_BATCHES) if self._prefetch else nullcontext()

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
        tune = [DEFAULT_TUNE] * len(images) if tunes is None else list(tunes)

        of_each = zip(effort, qualities, strict=True)
        quantisers = [Quantiser(q, self.model.exact and uses_trellis(e, q)) for e, q in of_each]

        def start(group: list[int], total: int) -> Pending[list[Encoded]]:
            first = group[0]
            shape: Shape = images[first].shape[:3]
            quality = [qualities[i] for i in group]
            # Repeated edges cost fewer bits than a hard edge.
            stacked = stack_padded([images[i] for i in group], LATENT_STRIDE, self.device, self._copy_pool)
            results = features or symbols or pixels
            if quantisers[first].trellis and results:
                settings = effort[first], tune[first], labels, pixels, features
                chosen, scores, decoded = self._choose_paths(stacked, quality, shape, *settings)
            else:
                chosen, scores, decoded = self._choose(
                    stacked, np.repeat(quality, shape[0]), shape, effort[first], tune[first], labels, pixels
                )
            coder = self.device_coder(total) if features else None
            pending: dict[str, Pending[Sequence[Any]]] = {}
            if features:
                pending["features"] = self.model.encode_symbols(chosen, len(group), quality, self._pool(), coder, total)
            if labels:
                pending["cells"] = _split(scores, len(group))
            if symbols:
                pending["symbols"] = _split([download(chosen.symbols)], len(group))
            if pixels:
                pending["pixels"] = _split(decoded, len(group))

            def wait() -> list[Encoded]:
                columns = {name: values() for name, values in pending.items()}
                rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
                return [Encoded(grid_of(shape), quantisers[i], **row) for i, row in zip(group, rows, strict=True)]

            return wait

        columns = zip(images, effort, tune, quantisers, strict=True)
        keys = [(*i.shape[:3], e, t, i.dtype == np.int16, quantiser.trellis) for i, e, t, quantiser in columns]
        # Residuals, which need the pixels, are work for several threads; packing alone is not.
        pool = self._copy_pool if pixels else None
        with self._batches:
            return self._run(keys, Pipeline(start, finish, self._prefetch, pool))

    def decode(
        self,
        features: Sequence[bytes],
        shapes: Sequence[Shape],
        quantisers: Sequence[Quantiser],
        q6: Sequence[bool] | None = None,
        finish: Sequence[Callable[[Pixels], Any]] | None = None,
    ) -> list[Any]:
        in_q6 = [False] * len(shapes) if q6 is None else list(q6)

        def start_group(group: Group) -> Pending[list[Pixels]]:
            symbols, check = self._decoded_symbols(features, group)
            pixels = self._synthesise(symbols, group, in_q6[group.indices[0]])

            def wait() -> list[Pixels]:
                check()
                return pixels()

            return wait

        def start(group: Group) -> Pending[list[Pixels]]:
            if self.device_coder(group.total) is not None:
                return start_group(group)
            # Prior and coder wait for one another a dozen times; meanwhile those of the next group work.
            started = submit(self._decode_pool, start_group, group)
            return lambda: started()()

        with self._batches:
            return self._run_groups(start, shapes, quantisers, in_q6, finish, 2 * self._prefetch, self._copy_pool)

    def decode_symbols(
        self, features: Sequence[bytes], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[NDArray[np.int16]]:
        def start(group: Group) -> Pending[list[NDArray[np.int16]]]:
            symbols, check = self._decoded_symbols(features, group)
            on_host = download(symbols) if isinstance(symbols, Tensor) else lambda: symbols

            def wait() -> list[NDArray[np.int16]]:
                check()
                return [part.transpose(0, 3, 1, 2).copy() for part in np.split(on_host(), len(group.indices))]

            return wait

        return self._run_groups(start, shapes, quantisers)

    def encode_symbols(
        self, symbols: Sequence[NDArray[np.int16]], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[bytes]:
        def start(group: Group) -> Pending[list[bytes]]:
            chosen = Chosen(upload(group.joined(symbols), self.device), trellis=group.trellis)
            coder, count = self.device_coder(group.total), len(group.indices)
            return self.model.encode_symbols(chosen, count, group.qualities, self._pool(), coder, group.total)

        with self._batches:
            return self._run_groups(start, shapes, quantisers)

    def synthesise(
        self, symbols: Sequence[NDArray[np.int16]], shapes: Sequence[Shape], quantisers: Sequence[Quantiser], q6: bool
    ) -> list[Pixels]:
        def start(group: Group) -> Pending[list[Pixels]]:
            return self._synthesise(group.joined(symbols), group, q6)

        with self._batches:
            return self._run_groups(start, shapes, quantisers)

    def score(
        self, symbols: Sequence[NDArray[np.int16]], shapes: Sequence[Shape], quantisers: Sequence[Quantiser]
    ) -> list[NDArray[np.uint8]]:
        def start(group: Group) -> Pending[list[NDArray[np.uint8]]]:
            quality = group.of_images()
            channels_last = np.ascontiguousarray(group.joined(symbols).transpose(0, 2, 3, 1))
            with self._exclusive():
                latents = self.model.transforms.latents(channels_last, quality, group.trellis)
                scores = download(self.model.score(latents, quality))
            return _split([scores], len(group.indices))

        return self._run_groups(start, shapes, quantisers)

    def dequantise(self, symbols: NDArray[np.int16], quantiser: Quantiser) -> NDArray[np.float32]:
        quality = np.full(len(symbols), quantiser.quality)
        return self.model.transforms.latents(symbols, quality, quantiser.trellis).float().cpu().numpy()

    def map(self, function: Callable[..., Result], *columns: Iterable[Any]) -> list[Result]:
        rows = list(zip(*columns, strict=True))
        return submit_each(self._pool() if len(rows) > 1 else None, lambda i: function(*rows[i]), len(rows))()

    def device_coder(self, chunks: int) -> DeviceCoder | None:
        """Return the device's entropy coder, if it has one and codes this number of chunks faster than the host."""
        least = min(DEVICE_CODER_MIN_CHUNKS, DEVICE_CODER_MIN_PER_THREAD * host_threads())
        return None if chunks < least else self.model.device_coder()

    def _run_groups(
        self,
        start: Callable[[Group], Pending[list[Any]]],
        shapes: Sequence[Shape],
        quantisers: Sequence[Quantiser],
        q6: Sequence[bool] | None = None,
        finish: Sequence[Callable[[Any], Any]] | None = None,
        prefetch: int | None = None,
        pool: ThreadPoolExecutor | None = None,
    ) -> list[Any]:
        """Run over features or symbols; chunks of a group are alike in shape, trellis and, if it is passed, `q6`."""

        def start_indices(indices: list[int], total: int) -> Pending[list[Any]]:
            of_group = [quantisers[i] for i in indices]
            qualities = [one.quality for one in of_group]
            return start(Group(indices, total, shapes[indices[0]], qualities, of_group[0].trellis))

        flags = [()] * len(shapes) if q6 is None else zip(q6)
        keys = [(*shape, one.trellis, *flag) for shape, one, flag in zip(shapes, quantisers, flags, strict=True)]
        return self._run(keys, Pipeline(start_indices, finish, self._prefetch if prefetch is None else prefetch, pool))

    def _run(self, keys: Sequence[tuple[Any, ...]], pipeline: Pipeline[Any]) -> list[Any]:
        """Run a pipeline over a batch; results come in order. Chunks of equal keys (S, H, W, ...) form a group."""
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, key in enumerate(keys):
            groups[key].append(i)

        def parts(limit: int) -> Iterator[tuple[list[int], int]]:
            """Yield indices of groups of at most `limit` pixels, and the number of chunks of their shape."""
            for (s, h, w, *_), members in groups.items():
                size = max(1, limit // max(1, s * h * w))
                for k in range(0, len(members), size):
                    yield members[k : k + size], len(members)

        limit = config.get().pixels_per_call(self.device.type)
        if self._prefetch:  # parts: while one is entropy-coded, the device has another
            part = max(PART_PIXELS, ceil_div(sum(s * h * w for s, h, w, *_ in keys), PARTS))
            if self.device_coder(max(map(len, groups.values()), default=0)) is not None:
                limit, pipeline = part, replace(pipeline, prefetch=PARTS)
            else:
                limit = min(limit, part)
        started = ((indices, pipeline.start(indices, total)) for indices, total in parts(limit))
        results = pipelined(started, pipeline.prefetch)
        finished = ((indices, pipeline.finished(indices, values)) for indices, values in results)
        return _in_order(finished, len(keys))

    def _pool(self) -> ThreadPoolExecutor | None:
        """Return the threads for entropy coding."""
        threads = host_threads()
        if threads not in self._coder_pools:
            self._coder_pools[threads] = ThreadPoolExecutor(threads, "deepsic-coder")
        return self._coder_pools[threads]

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the networks, and keep a caller's autocast from them."""
        threads = config.get().threads
        with self._networks, torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            before = torch.get_num_threads()
            if not threads or threads == before or _forked:
                yield
                return
            torch.set_num_threads(threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def _pieces(self, images: int, shape: Shape) -> Iterator[slice]:
        """Yield slices of a group of images: within the batch limit and, on a CPU, small enough for its caches.

        A slice has whole chunks, if the limit has room for one.
        """
        slices, h, w = shape
        limit = config.get().pixels_per_call(self.device.type)
        if self.device.type == "cpu":
            limit = min(limit, CACHED_PIXELS)
        size = max(1, limit // (h * w))
        size -= size % slices if size > slices else 0
        for k in range(0, images, size):
            yield slice(k, k + size)

    def _choose(
        self, images: Tensor, quality: Qualities, shape: Shape, effort: int, tune: str, labels: bool, pixels: bool
    ) -> tuple[Chosen, list[Pending[NDArray[Any]]], list[Pending[NDArray[Any]]]]:
        """Analyse padded images (N,H,W,3) and choose their symbols; start label scores and reconstruction, if asked."""
        model, (_, height, width) = self.model, shape
        chosen: list[Chosen] = []
        scores: list[Pending[NDArray[Any]]] = []
        decoded: list[Pending[NDArray[Any]]] = []
        with self._exclusive():
            for part in self._pieces(len(images), (1, images.shape[1], images.shape[2])):
                analysed = model.analyse(images[part], quality[part])
                unpadded = images[part, :height, :width]
                chosen.append(model.choose(analysed.scaled, quality[part], effort, tune, unpadded))
                if labels:
                    scores.append(download(model.score(analysed.latents, quality[part])))
                if pixels:
                    q6 = images.dtype == torch.int16
                    synthesised = model.synthesise(chosen[-1].symbols, quality[part], q6, False)
                    decoded.append(download(synthesised[:, :height, :width]))
            symbols = torch.cat([one.symbols for one in chosen])
            return Chosen(symbols, _joined([one.predictions for one in chosen])), scores, decoded

    def _choose_paths(
        self,
        images: Tensor,
        quality: list[float],
        shape: Shape,
        effort: int,
        tune: str,
        labels: bool,
        pixels: bool,
        features: bool,
    ) -> tuple[Chosen, list[Pending[NDArray[Any]]], list[Pending[NDArray[Any]]]]:
        """Do as `_choose`, for paths through the trellis, which the host chooses and may encode, chunk by chunk."""
        model, (_, height, width), of_images = self.model, shape, np.repeat(quality, shape[0])
        latents: list[Pending[NDArray[Any]]] = []
        scores: list[Pending[NDArray[Any]]] = []
        with self._exclusive():
            for part in self._pieces(len(images), (1, images.shape[1], images.shape[2])):
                analysed = model.analyse(images[part], of_images[part])
                latents.append(download(analysed.latents))
                if labels:
                    scores.append(download(model.score(analysed.latents, of_images[part])))
        of_chunks = _split(latents, len(quality))()

        def choose(i: int) -> tuple[NDArray[np.int16], bytes | None]:
            of_chunk = np.ascontiguousarray(of_chunks[i])
            if effort > 1:
                part = images[i * shape[0] : (i + 1) * shape[0], :height, :width]
                with self._exclusive():
                    return model.refine_paths(part, of_chunk, quality[i], effort, tune), None
            return model.choose_paths(of_chunk, quality[i], features)

        chunks = submit_each(self._pool() if len(quality) > 1 else None, choose, len(quality))()
        symbols = upload(np.concatenate([one for one, _ in chunks]), self.device)
        streams = [stream for _, stream in chunks if stream is not None]
        decoded: list[Pending[NDArray[Any]]] = []
        with self._exclusive():
            for part in self._pieces(len(images) if pixels else 0, shape):
                synthesised = model.synthesise(symbols[part], of_images[part], images.dtype == torch.int16, True)
                decoded.append(download(synthesised[:, :height, :width]))
        return Chosen(symbols, trellis=True, features=streams or None), scores, decoded

    def _decoded_symbols(
        self, features: Sequence[bytes], group: Group
    ) -> tuple[NDArray[np.int16] | Tensor, Pending[Any]]:
        """Decode to symbols (N,h,w,C); the second result raises CorruptPayload if the device finds damage later."""
        coder, streams = self.device_coder(group.total), [features[i] for i in group.indices]
        shape, qualities, trellis = group.shape, group.qualities, group.trellis
        if coder is not None:
            return self.model.decode_symbols_on_device(streams, shape, qualities, coder, group.total, trellis)
        symbols = self.model.decode_symbols(streams, shape, qualities, self._pool(), trellis)
        return np.concatenate(symbols), lambda: None

    def _synthesise(self, symbols: NDArray[np.int16] | Tensor, group: Group, q6: bool) -> Pending[list[Pixels]]:
        """Start to reconstruct the chunks of a group from their symbols (N,h,w,C)."""
        _, height, width = group.shape
        quality = group.of_images()
        started: list[Pending[NDArray[Any]]] = []
        with self._exclusive():
            for part in self._pieces(len(symbols), group.shape):
                pixels = self.model.synthesise(symbols[part], quality[part], q6, group.trellis)
                started.append(download(pixels[:, :height, :width]))
        return _split(started, len(group.indices))


def _split(pending: list[Pending[NDArray[Any]]], chunks: int) -> Pending[list[NDArray[Any]]]:
    """Return the parts that belong to N chunks of equal shape, given pieces of their stacked images."""

    def wait() -> list[NDArray[Any]]:
        pieces = [piece() for piece in pending]
        pending.clear()
        slices = sum(map(len, pieces)) // chunks
        if all(len(piece) % slices == 0 for piece in pieces):  # of whole chunks: views of the pieces
            return [chunk for piece in pieces for chunk in np.split(piece, len(piece) // slices)]
        return np.split(np.concatenate(pieces), chunks)

    return wait


def _in_order(results: Iterable[tuple[list[int], list[Any]]], count: int) -> list[Any]:
    """Return the results of groups, which come with their indices, in the order of the batch."""
    by_index: dict[int, Any] = {}
    for indices, values in results:
        by_index |= zip(indices, values, strict=True)
    return [by_index[i] for i in range(count)]


def _joined(parts: list[Predictions | None]) -> Predictions | None:
    """Join predictions of the parts of a batch, pass by pass; None unless all are known."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return [(torch.cat([m for m, _ in one]), torch.cat([s for _, s in one])) for one in zip(*known, strict=True)]


# Whether this process was forked: the threads of OpenMP did not survive that, and torch would wait for them forever.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
