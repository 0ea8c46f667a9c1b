"""The arithmetic coder on CUDA: all chunks of a batch at once, one warp for each chunk (`coder.cu`).

It writes and reads the streams of `deepsic_codec.payload.coders.symbols`; `device_coder_for` compares the two before
the device's coder is used. Only the streams themselves pass through the host. Decoding does not wait for the
host: prior and coder alternate on the device, pass by pass.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.model.cpu.trellis import odd_states
from deepsic_codec.model.device import current_stream_context, download, synchronize, upload
from deepsic_codec.model.device_coder import launch as launching
from deepsic_codec.model.device_coder.launch import GENERAL, LANES, MAX_PASSES, PASS_FIELDS, STATE, Launch
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.neighbours import Predictions, iter_steps
from deepsic_codec.model.schedule import Step
from deepsic_codec.model.threads import Pending
from deepsic_codec.payload.coders import interval as bits
from deepsic_codec.payload.coders import symbols as arithmetic
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SymbolEncoder

log = logging.getLogger(__name__)

# Fields of a pass: the number of positions, and the first of its addresses.
POSITIONS, ADDRESSES = 4, 5
# Bytes of a stream that are allocated for each symbol; only noise needs more.
BYTES_PER_SYMBOL = 1


class DeviceCoder:
    """Arithmetic coder of whole batches on a device.

    Up to `max_shared` chunks are coded in shared memory, which is faster but has room for one chunk on each
    multiprocessor. The chunks of larger batches keep their contexts in global memory.
    """

    def __init__(
        self, start: CoderTables, latents: int, device: torch.device, launch: Launch, max_shared: int = 0
    ) -> None:
        self.device, self.latents, self.max_shared, self._launch = device, latents, max_shared, launch
        arrays = launching.lookup_tables(), arithmetic.NEIGHBOUR, start.levels, start.low_bits
        self._constant = [_bytes(array).to(device) for array in arrays]
        self._contexts = torch.from_numpy(arithmetic.initial_contexts(start).view(np.int32)).to(device)
        self._weights = torch.from_numpy(start.weights.astype(np.int64).ravel()).to(device)
        self._numbers = start.limit, start.rate, start.single, latents

    def encode(
        self, steps: Sequence[Step], symbols: Tensor, chunks: int, predictions: Predictions, batch_total: int = 0
    ) -> Pending[list[bytes | None]]:
        """Start to encode symbols int16 (S chunks,h,w,C) of stacked chunks; parameters as in `start_encoding`.

        The results are streams, with None for a stream that is longer than its symbols.
        """
        images, h, w, _ = symbols.shape
        symbols, predictions = symbols.contiguous(), [(m.contiguous(), i.contiguous()) for m, i in predictions]
        capacity = BYTES_PER_SYMBOL * symbols.numel() // chunks + bits.CODE_BITS
        data = torch.empty(chunks, capacity, dtype=torch.uint8, device=self.device)
        positions, rows = _positions(tuple(steps), h, w, self.device), _rows(tuple(steps), h, w)
        rows = rows[rows[:, POSITIONS] > 0]
        for row, (means, indices) in zip(rows, predictions, strict=True):
            row[ADDRESSES:] = means.data_ptr(), indices.data_ptr(), 0
        state = np.zeros((chunks, STATE), np.int64)
        state[:, :4] = bits.begin_encoding()
        bounds = torch.arange(chunks + 1, dtype=torch.int64, device=self.device) * capacity
        work = self._work(chunks, images // chunks, h, w, state)
        job = self._job(work, positions, rows, (images // chunks, h, w), symbols, data, bounds)
        self._launch("encode", job, chunks, max(chunks, batch_total) <= self.max_shared)
        end_states, on_stream = download(work[3]), current_stream_context(self.device)

        def wait() -> list[bytes | None]:
            ends = end_states()
            longest = int(ends[:, 3].clip(max=capacity).max())
            with torch.inference_mode(), on_stream():
                coded = download(data[:, :longest].contiguous())()
            _ = symbols, predictions, work  # the device may have used their memory until now
            return [
                bits.finish_encoding(end[:4], stream) if end[3] <= capacity else None
                for end, stream in zip(ends, coded, strict=True)
            ]

        return wait

    def decode(
        self,
        prior: CodingPrior,
        features: Sequence[bytes],
        slices: int,
        grid: tuple[int, int],
        quality_of: Callable[[Tensor], Tensor | int],
        batch_total: int = 0,
        trellis: bool = False,
    ) -> tuple[Tensor, Pending[None]]:
        """Start to decode feature sections of chunks of equal shape; parameters and results as in `start_decoding`.

        `quality_of` returns the whole qualities of images, given their numbers.
        """
        chunks, (h, w) = len(features), grid
        sizes = np.array([len(data) for data in features], np.int64)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        state = np.zeros((chunks, STATE), np.int64)
        state[:, :4] = [bits.read_first(data)[0] for data in features]
        data = upload(np.frombuffer(bytearray(b"".join(features) + b"\0"), np.uint8), self.device)
        bounds = upload(ends, self.device)
        work, positions = self._work(chunks, slices, h, w, state), _positions(tuple(prior.steps), h, w, self.device)
        rows, shared = _rows(tuple(prior.steps), h, w), max(chunks, batch_total) <= self.max_shared
        job = self._job(work, positions, rows[:1], (slices, h, w), work[0], data, bounds)
        neighbours = prior.no_neighbours(chunks * slices, grid, trellis)
        for number, step, padded, _, image in iter_steps(prior, neighbours):
            means, indices = (t.contiguous() for t in prior.run(number, neighbours, padded, quality_of(image)))
            decoded = torch.empty_like(means)
            rows[number, ADDRESSES:] = means.data_ptr(), indices.data_ptr(), decoded.data_ptr()
            job[GENERAL : GENERAL + PASS_FIELDS] = rows[number]
            self._launch("decode_trellis" if trellis else "decode", job, chunks, shared)
            prior.update(neighbours, step, padded, decoded)
        symbols = work[0].view(chunks * slices, h + 2, w + 2, -1)[:, 1:-1, 1:-1].contiguous()
        end_states = download(work[3])

        def check() -> None:
            for end, size in zip(end_states(), sizes, strict=True):
                if end[4]:
                    raise CorruptPayload(arithmetic.OUT_OF_RANGE)
                bits.check_end(int(end[3]), int(size), "features", unit="symbol")

        return symbols, check

    def _work(self, chunks: int, slices: int, h: int, w: int, state: NDArray[np.int64]) -> list[Tensor]:
        """Return symbols with a border, contexts, weights and state, as coding starts."""
        shape = chunks, slices, h + 2, w + 2, self.latents
        return [
            torch.zeros(shape, dtype=torch.int16, device=self.device),
            self._contexts.repeat(chunks, 1),
            self._weights.repeat(chunks, 1),
            upload(state, self.device),
        ]

    def _job(
        self,
        work: list[Tensor],
        positions: Tensor,
        rows: NDArray[np.int64],
        size: tuple[int, int, int],
        source: Tensor,
        data: Tensor,
        bounds: Tensor,
    ) -> NDArray[np.int64]:
        """Return `Job` of `coder.cu`."""
        job = np.zeros(GENERAL + MAX_PASSES * PASS_FIELDS, np.int64)
        job[:GENERAL] = [
            *(t.data_ptr() for t in self._constant),
            *self._numbers,
            len(bounds) - 1,
            positions.data_ptr(),
            len(rows),
            *size,
            *(t.data_ptr() for t in (source, *work, data, bounds)),
        ]
        job[GENERAL : GENERAL + rows.size] = rows.ravel()
        return job


def device_coder_for(
    start: CoderTables, latents: int, steps: Sequence[Step], device: torch.device | str
) -> DeviceCoder | None:
    """Return the coder of a device for symbols of this number of channels in these passes.

    None for a device without a coder that writes the host's streams. The reason is logged.
    """
    device = torch.device(device)
    if device.type != "cuda" or config.get().kernels == "plain" or len(steps) > MAX_PASSES:
        return None
    try:
        fits = launching.fits_shared(device, latents)
        max_shared = torch.cuda.get_device_properties(device).multi_processor_count if fits else 0
        coder = DeviceCoder(start, latents, device, launching.launcher(device, latents), max_shared)
        same = matches_host(coder, start) and matches_host(coder, start, max_shared + 1)
    except Exception as error:  # whatever fails in a compiler or driver, the host's coder works
        if not isinstance(error, ImportError):
            log.warning(
                "the entropy coder for %s failed (%s: %s); the CPU codes instead", device, type(error).__name__, error
            )
        return None
    if not same:
        log.warning("the entropy coder for %s writes different streams; the CPU codes instead", device)
        return None
    synchronize(device)
    return coder


def matches_host(coder: DeviceCoder, start: CoderTables, batch_total: int = 0) -> bool:
    """Tell whether a coder writes and reads the host's streams, on random symbols of all sizes."""
    rng = np.random.default_rng(0)
    chunks, grid, latents = 3, (5, 6), coder.latents
    count = min(latents, LANES + 3)
    steps = [Step(0, count, "1", (), 0), Step(0, count, "2", ((0, -1),), 0)]
    symbols = np.zeros((chunks, *grid, latents), np.int16)
    spread = rng.choice([0.2, 2, 30, 3000], (chunks, *grid, count), p=[0.7, 0.2, 0.08, 0.02])
    symbols[..., :count] = np.rint(rng.standard_normal((chunks, *grid, count)) * spread)
    paths = 2 * symbols
    for chunk in range(chunks):
        paths[chunk] -= np.sign(symbols[chunk]) * odd_states(steps, paths[chunk : chunk + 1])[0]
    predicted = []
    for step in steps:
        ys, xs = step.positions(*grid)
        values = symbols[:, ys, xs, :count].reshape(-1, count)
        means = (8 * values * rng.integers(0, 2, values.shape) + rng.integers(-9, 9, values.shape)).astype(np.int16)
        predicted.append((ys, xs, step, means, rng.integers(0, 253, values.shape).astype(np.uint8)))

    def streams(of_chunks: NDArray[np.int16], trellis: bool) -> list[bytes]:
        coded = []
        for chunk in range(chunks):
            encoder = SymbolEncoder(start, of_chunks[chunk : chunk + 1], trellis)
            for ys, xs, step, means, indices in predicted:
                rows = slice(chunk * len(ys), (chunk + 1) * len(ys))
                encoder.encode_pass(ys, xs, step.start, step.second, means[rows], indices[rows])
            coded.append(encoder.finish())
        return coded

    with torch.inference_mode():
        predictions: Predictions = []
        for *_, means, indices in predicted:
            predictions.append((torch.from_numpy(means).to(coder.device), torch.from_numpy(indices).to(coder.device)))
        on_device = torch.from_numpy(symbols).to(coder.device)
        if coder.encode(steps, on_device, chunks, predictions, batch_total)() != streams(symbols, False):
            return False
        prior: Any = _FixedPrior(steps, predictions, on_device)
        for of_chunks, trellis in ((symbols, False), (paths, True)):
            coded = streams(of_chunks, trellis)
            decoded, check = coder.decode(prior, coded, 1, grid, lambda image: 50, batch_total, trellis)
            check()
            if not np.array_equal(decoded.cpu().numpy(), of_chunks):
                return False
        return True


class _FixedPrior:
    """A prior with fixed predictions; has the methods that decoding calls."""

    def __init__(self, steps: list[Step], predictions: Predictions, symbols: Tensor) -> None:
        self.steps, self._predictions, self._symbols = steps, predictions, symbols

    def no_neighbours(self, images: int, grid: tuple[int, int], trellis: bool) -> Self:
        return self

    def rows(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.zeros(len(self._symbols) * len(step.positions(*self._symbols.shape[1:3])[0]), dtype=torch.int64)
        return rows, rows, rows

    def run(self, number: int, neighbours: Any, rows: Tensor, quality: Any) -> Any:
        return self._predictions[number]

    def update(self, neighbours: Any, step: Step, rows: Tensor, symbols: Tensor) -> None:
        """Do nothing: no prediction depends on the symbols."""


def _bytes(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy())


def _rows(steps: tuple[Step, ...], h: int, w: int) -> NDArray[np.int64]:
    """Return `Step` of `coder.cu` for every pass, without addresses."""
    return _rows_without_addresses(steps, h, w).copy()


@lru_cache(maxsize=64)
def _rows_without_addresses(steps: tuple[Step, ...], h: int, w: int) -> NDArray[np.int64]:
    rows, before = np.zeros((len(steps), PASS_FIELDS), np.int64), 0
    for row, step in zip(rows, steps, strict=True):
        positions = len(step.positions(h, w)[0])
        row[:ADDRESSES] = step.start, step.count, step.second, before, positions
        before += positions
    return rows


@lru_cache(maxsize=64)
def _positions(steps: tuple[Step, ...], h: int, w: int, device: torch.device) -> Tensor:
    """Return rows and columns, int32 (positions, 2), of all passes in order."""
    array = np.concatenate([np.stack(step.positions(h, w), 1) for step in steps]).astype(np.int32)
    with torch.inference_mode(False):
        positions = torch.from_numpy(array).to(device)
    synchronize(device)
    return positions
