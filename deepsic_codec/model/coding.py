"""Symbols <-> feature bytes: the integer prior and the arithmetic coder hand in hand.

The prior runs over all images of a batch at once, pass by pass; the arithmetic coder runs
chunk by chunk on a thread pool, without the GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.model.device_coder.coder import DeviceCoder
from deepsic_codec.model.prior import IntegerPrior, Pass, Predictions, passes
from deepsic_codec.model.transfer import fetch, upload
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SymbolDecoder, SymbolEncoder

Symbols = NDArray[np.int16]
Result = TypeVar("Result")


def encode_symbols(
    prior: IntegerPrior,
    tables: CoderTables,
    symbols: list[Symbols],
    qualities: Iterable[float],
    pool: ThreadPoolExecutor | None = None,
    coder: type[SymbolEncoder] | Callable[[CoderTables, Symbols], SymbolEncoder] = SymbolEncoder,
) -> list[bytes]:
    """Feature sections of chunks of equal shape.

    Parameters
    ----------
    prior, tables
        From the model file.
    symbols : list of int16 (S,h,w,C)
        Quantised latents, one array per chunk.
    qualities : iterable of float
        Quality of each chunk, 1..100.
    pool : ThreadPoolExecutor, optional
        Codes the chunks in parallel.
    coder : callable
        Makes the encoder of a chunk; training passes one that remembers.
    """
    joined = upload(np.concatenate(symbols), prior.device)
    return start_encoding(prior, tables, joined, len(symbols), qualities, pool, coder)()


def start_encoding(
    prior: IntegerPrior,
    tables: CoderTables,
    symbols: Tensor,
    chunks: int,
    qualities: Iterable[float],
    pool: ThreadPoolExecutor | None = None,
    coder: type[SymbolEncoder] | Callable[[CoderTables, Symbols], SymbolEncoder] = SymbolEncoder,
    predictions: Predictions | None = None,
    there: DeviceCoder | None = None,
    crowd: int = 0,
) -> Callable[[], list[bytes]]:
    """Like :func:`encode_symbols` for symbols (S,h,w,C) of all chunks joined, on the prior's device.

    ``predictions`` are what the prior makes of just these symbols, if that is known already. The
    device is only given its work, and the pool its own, which waits for the device's.
    What is returned waits for the pool.  ``there`` codes on the device instead, beside a ``crowd``.
    """
    images, h, w, _ = symbols.shape
    listed = list(qualities)
    if predictions is None:
        predictions = predict(prior, symbols, _per_image(listed, images // chunks, prior.device))
    if there is not None:
        streams = there.encode(prior.steps, symbols, chunks, predictions, crowd)

        def coded(chunk: int, stream: bytes | None) -> bytes:
            if stream is not None:
                return stream
            part = symbols[chunk * (images // chunks) :][: images // chunks].cpu().numpy()
            return encode_symbols(prior, tables, [part], listed[chunk : chunk + 1])[0]

        return lambda: [coded(*item) for item in enumerate(streams())]
    order, ys, xs = _order(tuple(prior.steps), h, w)
    passes = order.copy()
    passes[1:, -1] = images * np.cumsum(order[:-1, 1] * order[:-1, 4])  # where each begins among predictions
    # as one array each: a thread that waits for dozens, pass by pass, mostly waits for others to let go of Python
    all_of = (torch.cat([values.reshape(-1) for values in kind]) for kind in zip(*predictions, strict=True))
    own, means, indices = fetch(symbols), *map(fetch, all_of)

    def one(chunk: int) -> bytes:
        encoder = coder(tables, _part(own(), chunks, chunk))
        encoder.encode(passes, ys, xs, means(), indices(), chunk)
        return encoder.finish()

    return begin_each(pool, one, chunks)


@lru_cache(maxsize=64)
def _order(steps: tuple[Pass, ...], h: int, w: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Passes that have positions, as the encoder takes them, and rows and columns of their positions."""
    rows, found, before = [], [], 0
    for step in steps:
        positions = step.positions(h, w)
        if count := len(positions[0]):
            rows.append((step.start, step.count, step.second, before, count, 0))
            found.append(positions)
            before += count
    ys, xs = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return np.array(rows, np.int64), ys, xs


def predict(prior: IntegerPrior, symbols: Tensor, quality: Tensor | int) -> Predictions:
    """What a prior makes of symbols (S,h,w,C) that are all known, at whole qualities (S,) or one."""
    neighbours = prior.neighbours(symbols)
    return [prior.run(n, neighbours, rows, _of(quality, image)) for n, _, rows, _, image in passes(prior, neighbours)]


def decode_symbols(
    prior: IntegerPrior,
    tables: CoderTables,
    features: list[bytes],
    slices: int,
    grid: tuple[int, int],
    qualities: Iterable[float],
    pool: ThreadPoolExecutor | None = None,
) -> list[Symbols]:
    """Inverse of :func:`encode_symbols` for chunks of equal shape; int16 (S,h,w,C) each.

    Raises
    ------
    CorruptPayload
        If a stream holds an impossible symbol or bytes that no symbol needed.
    """
    coders = [SymbolDecoder(tables, data, slices, grid, prior.latents) for data in features]
    images = len(coders) * slices
    neighbours = prior.no_neighbours(images, grid)
    quality = _per_image(qualities, slices, prior.device)
    for n, step, rows, _, image in passes(prior, neighbours):
        ys, xs = step.positions(*grid)
        copies = [fetch(v) for v in prior.run(n, neighbours, rows, _of(quality, image))]
        means, indices = (copied() for copied in copies)
        found = np.empty_like(means)

        def one(
            i: int,
            step: Pass = step,
            ys: NDArray[np.int64] = ys,
            xs: NDArray[np.int64] = xs,
            rows: tuple[NDArray[Any], ...] = (means, indices, found),
        ) -> None:
            coders[i].decode_pass(ys, xs, step.start, step.second, *(_part(v, len(coders), i) for v in rows))

        begin_each(pool, one, len(coders))()
        prior.update(neighbours, step, rows, upload(found, prior.device))
    return [coder.finish() for coder in coders]


def start_decoding(
    prior: IntegerPrior,
    features: list[bytes],
    slices: int,
    grid: tuple[int, int],
    qualities: Iterable[float],
    there: DeviceCoder,
    crowd: int = 0,
) -> tuple[Tensor, Callable[[], None]]:
    """Like :func:`decode_symbols` on the prior's device: int16 (S,h,w,C) of all chunks joined, and what checks them."""
    quality = _per_image(qualities, slices, prior.device)
    return there.decode(prior, features, slices, grid, lambda image: _of(quality, image), crowd)


def begin_each(
    pool: ThreadPoolExecutor | None, function: Callable[[int], Result], count: int
) -> Callable[[], list[Result]]:
    """Begin work on 0, 1, ... in the pool's threads; what is returned gives the results, in order.

    While the interpreter shuts down the pool takes no work, and threads that are still at work finish by themselves.
    """
    futures: list[Future[Result]] = []
    if pool is not None:
        with suppress(RuntimeError):
            for i in range(count):
                futures.append(pool.submit(function, i))

    def results() -> list[Result]:
        rest = [function(i) for i in range(len(futures), count)]
        return [future.result() for future in futures] + rest

    return results


def _per_image(qualities: Iterable[float], slices: int, device: str) -> Tensor | int:
    """Rounded quality of each image; one number if all have the same."""
    rounded = [min(100, max(1, int(q + 0.5))) for q in qualities]
    if len(set(rounded)) == 1:
        return rounded[0]
    return torch.tensor(rounded, device=device).repeat_interleave(slices)


def _of(quality: Tensor | int, image: Tensor) -> Tensor | int:
    return quality if isinstance(quality, int) else quality[image]


def _part(values: NDArray[Any], chunks: int, chunk: int) -> NDArray[Any]:
    """The rows of one of several chunks of equal shape."""
    count = len(values) // chunks
    return values[chunk * count : (chunk + 1) * count]
