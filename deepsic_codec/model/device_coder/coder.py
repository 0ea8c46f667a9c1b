"""The arithmetic coder on CUDA: all chunks of a batch at once, each by one warp (``coder.cu``).

The same streams as :mod:`deepsic_codec.payload.coders.symbols` makes and reads, which is what
:func:`coder_on` compares it with before anything relies on it. Nothing goes through the host but
the streams themselves, and decoding needs no word from it: prior and coder follow one another
on the device, pass by pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module, resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.model.prior import IntegerPrior, Pass, Predictions, passes
from deepsic_codec.model.transfer import fetch, now_on, settle, upload
from deepsic_codec.payload.coders import contexts as tables
from deepsic_codec.payload.coders import interval as bits
from deepsic_codec.payload.coders import symbols as arithmetic
from deepsic_codec.payload.coders.contexts import CoderTables, Layout
from deepsic_codec.payload.coders.symbols import SymbolEncoder

log = logging.getLogger(__name__)

#: Most passes that a launch takes; how many numbers it takes before them, and for each.
PASSES, GENERAL, PER_PASS = 32, 21, 8
#: Where of those of a pass the number of positions is, and where addresses begin.
POSITIONS, MEANS = 4, 5
#: Lanes of a warp, and warps of a block whose chunks are not in shared memory.
LANES, WARPS = 32, 8
#: Percentage of a multiprocessor's cache that is left to others as shared memory by chunks that are not there.
#: With the default of none, kernels that want some would wait for the coder to end.
CARVEOUT = 50
#: Words of a chunk's state: low, high, value, position, error, and some that keep chunks apart.
STATE = 8
#: Bytes of a stream for which there is room, by symbol; there is more in noise only.
ROOM = 1

#: Runs "encode" or "decode" with these numbers (``Job`` in coder.cu) on so many chunks, in shared memory or not.
Launch = Callable[[str, NDArray[np.int64], int, bool], None]


class DeviceCoder:
    """Arithmetic coder of whole batches on a device.

    Parameters
    ----------
    start : CoderTables
        Trained start.
    latents : int
        Channels of the symbols.
    device : torch.device
        Where symbols and predictions are.
    launch : callable
        Runs the compiled coder.
    apart : int
        Up to so many chunks at a time are coded in shared memory, which is faster, but has room for one on each
        multiprocessor only. More share these with their contexts in other memory.
    """

    def __init__(self, start: CoderTables, latents: int, device: torch.device, launch: Launch, apart: int = 0) -> None:
        self.device, self.latents, self.apart, self._launch = device, latents, apart, launch
        arrays = _tables(), arithmetic.NEIGHBOUR, start.levels, start.low_bits
        self._constant = [_bytes(array).to(device) for array in arrays]
        self._contexts = torch.from_numpy(arithmetic.first_contexts(start).view(np.int32)).to(device)
        self._weights = torch.from_numpy(start.weights.astype(np.int64).ravel()).to(device)
        self._numbers = start.limit, start.rate, start.single, latents

    def encode(
        self, steps: Sequence[Pass], symbols: Tensor, chunks: int, predictions: Predictions, crowd: int = 0
    ) -> Callable[[], list[bytes | None]]:
        """Begin to encode symbols int16 (S,h,w,C) of some chunks joined, as the prior expects them.

        ``crowd`` chunks, these included, are coded beside one another. What is returned waits for the streams, from any
        thread; None stands for one that is longer than its symbols.
        """
        images, h, w, _ = symbols.shape
        symbols, predictions = symbols.contiguous(), [(m.contiguous(), i.contiguous()) for m, i in predictions]
        room = ROOM * symbols.numel() // chunks + bits.CODE_BITS
        data = torch.empty(chunks, room, dtype=torch.uint8, device=self.device)
        places, rows = _places(tuple(steps), h, w, self.device), _rows(tuple(steps), h, w)
        rows = rows[rows[:, POSITIONS] > 0]
        for row, (means, indices) in zip(rows, predictions, strict=True):
            row[MEANS:] = means.data_ptr(), indices.data_ptr(), 0
        beginning = np.zeros((chunks, STATE), np.int64)
        beginning[:, :4] = bits.begin_encoding()
        bounds = torch.arange(chunks + 1, dtype=torch.int64, device=self.device) * room
        work = self._work(chunks, images // chunks, h, w, beginning)
        job = self._job(work, places, rows, (images // chunks, h, w), symbols, data, bounds)
        self._launch("encode", job, chunks, max(chunks, crowd) <= self.apart)
        state, again = fetch(work[3]), now_on(self.device)

        def streams() -> list[bytes | None]:
            ends = state()
            longest = int(ends[:, 3].clip(max=room).max())
            with torch.inference_mode(), again():
                coded = fetch(data[:, :longest].contiguous())()
            _ = symbols, predictions, work  # which the device may have been at work on until now
            return [
                bits.finish_encoding(end[:4], stream) if end[3] <= room else None
                for end, stream in zip(ends, coded, strict=True)
            ]

        return streams

    def decode(
        self,
        prior: IntegerPrior,
        features: Sequence[bytes],
        slices: int,
        grid: tuple[int, int],
        quality_of: Callable[[Tensor], Tensor | int],
        crowd: int = 0,
    ) -> tuple[Tensor, Callable[[], None]]:
        """Begin to decode feature sections of chunks of equal shape.

        Parameters
        ----------
        prior : IntegerPrior
            On this device.
        features : sequence of bytes
            One for each chunk.
        slices, grid : int, (int, int)
            Size of the symbols (slices, *grid, latents) of a chunk.
        quality_of : callable
            Gives whole qualities of images with these numbers.
        crowd : int
            How many chunks, these included, are coded beside one another.

        Returns
        -------
        symbols : Tensor
            int16 (chunks slices, *grid, latents).
        check : callable
            Waits for them and raises CorruptPayload if a stream could not be decoded.
        """
        chunks, (h, w) = len(features), grid
        begun = [bits.read_first(data)[0] for data in features]
        sizes = np.array([len(data) for data in features], np.int64)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        beginning = np.zeros((chunks, STATE), np.int64)
        beginning[:, :4] = begun
        data = upload(np.frombuffer(bytearray(b"".join(features) + b"\0"), np.uint8), self.device)
        bounds = upload(ends, self.device)
        work, places = self._work(chunks, slices, h, w, beginning), _places(tuple(prior.steps), h, w, self.device)
        numbers, apart = _rows(tuple(prior.steps), h, w), max(chunks, crowd) <= self.apart
        job = self._job(work, places, numbers[:1], (slices, h, w), work[0], data, bounds)
        neighbours = prior.no_neighbours(chunks * slices, grid)
        for number, step, rows, _, image in passes(prior, neighbours):
            means, indices = (t.contiguous() for t in prior.run(number, neighbours, rows, quality_of(image)))
            found = torch.empty_like(means)
            numbers[number, MEANS:] = means.data_ptr(), indices.data_ptr(), found.data_ptr()
            job[GENERAL : GENERAL + PER_PASS] = numbers[number]
            self._launch("decode", job, chunks, apart)
            prior.update(neighbours, step, rows, found)
        symbols = work[0].view(chunks * slices, h + 2, w + 2, -1)[:, 1:-1, 1:-1].contiguous()
        state = fetch(work[3])

        def check() -> None:
            for end, size in zip(state(), sizes, strict=True):
                if end[4]:
                    raise CorruptPayload(arithmetic.OUT_OF_RANGE)
                bits.check_end(int(end[3]), int(size), "features", last="symbol")

        return symbols, check

    def _work(self, chunks: int, slices: int, h: int, w: int, beginning: NDArray[np.int64]) -> list[Tensor]:
        """Symbols with a border, contexts, weights and state at the beginning."""
        shape = chunks, slices, h + 2, w + 2, self.latents
        return [
            torch.zeros(shape, dtype=torch.int16, device=self.device),
            self._contexts.repeat(chunks, 1),
            self._weights.repeat(chunks, 1),
            upload(beginning, self.device),
        ]

    def _job(
        self,
        work: list[Tensor],
        places: Tensor,
        rows: NDArray[np.int64],
        size: tuple[int, int, int],
        source: Tensor,
        data: Tensor,
        bounds: Tensor,
    ) -> NDArray[np.int64]:
        """``Job`` of coder.cu."""
        job = np.zeros(GENERAL + PASSES * PER_PASS, np.int64)
        job[:GENERAL] = [
            *(t.data_ptr() for t in self._constant),
            *self._numbers,
            len(bounds) - 1,
            places.data_ptr(),
            len(rows),
            *size,
            *(t.data_ptr() for t in (source, *work, data, bounds)),
        ]
        job[GENERAL : GENERAL + rows.size] = rows.ravel()
        return job


def coder_on(start: CoderTables, latents: int, steps: Sequence[Pass], device: torch.device | str) -> DeviceCoder | None:
    """The coder of a device for symbols of so many channels in these passes.

    None where there is none that gives the streams it should; why is logged.
    """
    device = torch.device(device)
    if device.type != "cuda" or config.get().kernels == "plain" or len(steps) > PASSES:
        return None
    try:
        apart = torch.cuda.get_device_properties(device).multi_processor_count if _fits(device, latents) else 0
        coder = DeviceCoder(start, latents, device, _launcher(device, latents), apart)
        same = agrees(coder, start) and agrees(coder, start, apart + 1)
    except Exception as error:  # a compiler, a driver: whatever fails there, the host has a coder
        if not isinstance(error, ImportError):
            log.warning("entropy coder for %s: %s: %s; using the host's", device, type(error).__name__, error)
        return None
    if not same:
        log.warning("the entropy coder for %s gives other streams; using the host's", device)
        return None
    settle(device)
    return coder


def agrees(coder: DeviceCoder, start: CoderTables, crowd: int = 0) -> bool:
    """Whether a coder makes and reads the streams of the host's, on random symbols of all sizes."""
    chance = np.random.default_rng(0)
    chunks, grid, latents = 3, (5, 6), coder.latents
    count = min(latents, LANES + 3)
    steps = [Pass(0, count, "1", (), 0), Pass(0, count, "2", ((0, -1),), 0)]
    symbols = np.zeros((chunks, *grid, latents), np.int16)
    spread = chance.choice([0.2, 2, 30, 3000], (chunks, *grid, count), p=[0.7, 0.2, 0.08, 0.02])
    symbols[..., :count] = np.rint(chance.standard_normal((chunks, *grid, count)) * spread)
    expected = []
    for step in steps:
        ys, xs = step.positions(*grid)
        near = symbols[:, ys, xs, :count].reshape(-1, count)
        means = (8 * near * chance.integers(0, 2, near.shape) + chance.integers(-9, 9, near.shape)).astype(np.int16)
        expected.append((ys, xs, step, means, chance.integers(0, 253, near.shape).astype(np.uint8)))
    wanted = []
    for chunk in range(chunks):
        encoder = SymbolEncoder(start, symbols[chunk : chunk + 1])
        for ys, xs, step, means, indices in expected:
            own = slice(chunk * len(ys), (chunk + 1) * len(ys))
            encoder.encode_pass(ys, xs, step.start, step.second, means[own], indices[own])
        wanted.append(encoder.finish())
    with torch.inference_mode():
        predictions = [tuple(torch.from_numpy(v).to(coder.device) for v in e[3:]) for e in expected]
        given = torch.from_numpy(symbols).to(coder.device)
        if coder.encode(steps, given, chunks, predictions, crowd)() != wanted:  # type: ignore[arg-type]
            return False
        found, check = coder.decode(_Foreseen(steps, predictions, given), wanted, 1, grid, lambda image: 50, crowd)  # type: ignore[arg-type]
        check()
        return bool((found == given).all())


class _Foreseen:
    """A prior whose predictions are known: as much of one as decoding asks for."""

    def __init__(self, steps: list[Pass], predictions: list[Any], symbols: Tensor) -> None:
        self.steps, self._predictions, self._symbols = steps, predictions, symbols

    def no_neighbours(self, images: int, grid: tuple[int, int]) -> _Foreseen:
        return self

    def rows(self, step: Pass) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.zeros(len(self._symbols) * len(step.positions(*self._symbols.shape[1:3])[0]), dtype=torch.int64)
        return rows, rows, rows

    def run(self, number: int, neighbours: Any, rows: Tensor, quality: Any) -> Any:
        return self._predictions[number]

    def update(self, neighbours: Any, step: Pass, rows: Tensor, symbols: Tensor) -> None:
        """Nothing else depends on them."""


def shared_bytes(latents: int) -> int:
    """Shared memory of a chunk that has its contexts there."""
    working = LANES * (16 + 4 + 4) + 16
    return working + 4 * (Layout(latents).size + 2 * tables.MIXERS * tables.INPUTS) + _tables().nbytes


def source(latents: int, shared: bool, lanes: int = LANES) -> str:
    """``coder.cu`` with the format's constants in front, for contexts in shared memory or without."""
    layout = Layout(latents)
    constants = {
        "CODE_BITS": bits.CODE_BITS,
        "CODE_MAX": f"{bits.CODE_MAX}ULL",
        "STRETCH_ONE": arithmetic.STRETCH_ONE,
        "STRETCH_MAX": arithmetic.STRETCH_MAX,
        "SYMBOL_MAX": arithmetic.SYMBOL_MAX,
        "FRACTIONS": tables.FRACTIONS,
        "NEIGHBOURS": tables.NEIGHBOURS,
        "PREVIOUS": tables.PREVIOUS,
        "UNARY": tables.UNARY,
        "ESCAPE_BITS": tables.ESCAPE_BITS,
        "SCALES": tables.SCALES,
        "INPUTS": tables.INPUTS,
        "MIXERS": tables.MIXERS,
        "ZERO_SCALE": layout.zero_scale,
        "ZERO_CHANNEL": layout.zero_channel,
        "ZERO_PREVIOUS": layout.zero_previous,
        "SIGN": layout.sign,
        "UNARY_SCALE": layout.unary_scale,
        "UNARY_NEIGHBOURS": layout.unary_neighbours,
        "UNARY_CHANNEL": layout.unary_channel,
        "LOW_BIT": layout.low_bit,
        "ESCAPE": layout.escape,
        "CONTEXTS": layout.size,
        "PASSES": PASSES,
        "STATE": STATE,
        "LANES": lanes,
        "WARPS": 1 if shared else WARPS,
        "SQUASH_AT": arithmetic.STRETCH.size,
        "RECIPROCAL_AT": arithmetic.STRETCH.size + arithmetic.SQUASH.size,
        "TABLE_WORDS": _tables().size // 2,
        "IN_SHARED": int(shared),
    }
    text = resources.files("deepsic_codec.model.device_coder").joinpath("coder.cu").read_text("utf-8")
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + text


@lru_cache(maxsize=16)
def _launcher(device: torch.device, latents: int) -> Launch:
    """Compile and load the coder for a device."""
    driver: Any = import_module("cuda.bindings.driver")  # comes with PyTorch for CUDA; nothing else here needs it
    kernels: dict[tuple[str, bool], Any] = {}
    attribute = driver.CUfunction_attribute
    room, warps = {False: 0, True: shared_bytes(latents)}, {False: WARPS, True: 1}
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context, if there is none yet
        for shared in (False, True)[: 1 + _fits(device, latents)]:
            code = compiled(source(latents, shared), torch.cuda.get_device_capability(device))
            module = _done(driver.cuModuleLoadData(code))
            for name in ("encode", "decode"):
                kernel = kernels[name, shared] = _done(driver.cuModuleGetFunction(module, name.encode()))
                given = (
                    (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, room[shared]),
                    (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100 if shared else CARVEOUT),
                )
                for what, value in given:
                    _done(driver.cuFuncSetAttribute(kernel, what, value))

    def launch(name: str, job: NDArray[np.int64], chunks: int, shared: bool) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            given = np.array([job.ctypes.data], np.uint64)  # copied by the call
            _done(
                driver.cuLaunchKernel(
                    kernels[name, shared],
                    -(-chunks // warps[shared]),
                    1,
                    1,
                    LANES * warps[shared],
                    1,
                    1,
                    room[shared],
                    stream,
                    given.ctypes.data,
                    0,
                )
            )

    return launch


def _fits(device: torch.device, latents: int) -> bool:
    """Whether a multiprocessor has room for a chunk in its shared memory."""
    most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return bool(shared_bytes(latents) <= most)


def compiled(text: str, capability: tuple[int, int]) -> bytes:
    """Machine code of a CUDA source for a GPU of a compute capability."""
    nvrtc: Any = import_module("cuda.bindings.nvrtc")
    program = _done(nvrtc.nvrtcCreateProgram(text.encode(), b"coder.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_%d%d" % capability, b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result[0]:
        said = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
        _done(nvrtc.nvrtcGetProgramLog(program, said))
        raise RuntimeError(said.decode(errors="replace").strip("\0 \n"))
    code = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
    _done(nvrtc.nvrtcGetCUBIN(program, code))
    _done(nvrtc.nvrtcDestroyProgram(program))
    return code


def _done(result: tuple[Any, ...]) -> Any:
    """What a call of CUDA returned, or RuntimeError."""
    if result[0]:
        raise RuntimeError(f"CUDA: {result[0]!r}")
    return result[1] if len(result) > 1 else None


def _tables() -> NDArray[np.uint16]:
    """The coder's larger tables, one after the other, of an even size."""
    parts = [np.asarray(t).astype(np.int64) for t in (arithmetic.STRETCH, arithmetic.SQUASH, arithmetic.RECIPROCAL)]
    joined = np.concatenate(parts).astype(np.uint16)  # they have 16 bits, with a sign or without
    return np.pad(joined, (0, joined.size % 2))


def _bytes(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy())


def _rows(steps: tuple[Pass, ...], h: int, w: int) -> NDArray[np.int64]:
    """``Step`` of coder.cu for every pass, without addresses."""
    return _known_rows(steps, h, w).copy()


@lru_cache(maxsize=64)
def _known_rows(steps: tuple[Pass, ...], h: int, w: int) -> NDArray[np.int64]:
    rows, before = np.zeros((len(steps), PER_PASS), np.int64), 0
    for row, step in zip(rows, steps, strict=True):
        positions = len(step.positions(h, w)[0])
        row[:MEANS] = step.start, step.count, step.second, before, positions
        before += positions
    return rows


@lru_cache(maxsize=64)
def _places(steps: tuple[Pass, ...], h: int, w: int, device: torch.device) -> Tensor:
    """Rows and columns, int32 (positions, 2), of all passes one after the other."""
    found = np.concatenate([np.stack(step.positions(h, w), 1) for step in steps]).astype(np.int32)
    with torch.inference_mode(False):
        places = torch.from_numpy(found).to(device)
    settle(device)
    return places
