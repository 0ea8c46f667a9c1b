"""Symbols <-> feature bytes: the integer prior and the arithmetic coder hand in hand.

The prior runs over all images of a batch at once, pass by pass; the arithmetic coder runs
chunk by chunk on a thread pool, without the GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.model.prior import IntegerPrior, Pass, passes
from deepsic_codec.payload.arithmetic import SymbolDecoder, SymbolEncoder
from deepsic_codec.payload.tables import CoderTables

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
    slices = symbols[0].shape[0]
    joined = torch.from_numpy(np.concatenate(symbols)).to(prior.device)
    neighbours = prior.neighbours(joined)
    quality = _per_image(qualities, slices, prior.device)
    h, w = symbols[0].shape[1:3]
    steps = []
    for n, step, rows, _, image in passes(prior, neighbours):
        means, scales = (_split(v, len(symbols)) for v in prior.run(n, neighbours, rows, _of(quality, image)))
        steps.append((step, *step.positions(h, w), means, scales))

    def one(chunk: int) -> bytes:
        encoder = coder(tables, symbols[chunk])
        for step, ys, xs, means, scales in steps:
            encoder.encode_pass(ys, xs, step.start, step.second, means[chunk], tables.levels[scales[chunk]])
        return encoder.finish()

    return _each(pool, one, len(symbols))


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
    neighbours = prior.neighbours(torch.zeros(images, *grid, prior.latents, dtype=torch.int16, device=prior.device))
    quality = _per_image(qualities, slices, prior.device)
    for n, step, rows, _, image in passes(prior, neighbours):
        ys, xs = step.positions(*grid)
        means, scales = (_split(v, len(coders)) for v in prior.run(n, neighbours, rows, _of(quality, image)))

        def one(
            i: int, step: Pass = step, ys: NDArray[np.int64] = ys, xs: NDArray[np.int64] = xs,
            means: list[NDArray[np.int16]] = means, scales: list[NDArray[np.uint8]] = scales,
        ) -> Symbols:  # fmt: skip
            coders[i].decode_pass(ys, xs, step.start, step.second, means[i], tables.levels[scales[i]])
            group = slice(step.start, step.start + step.count)
            return coders[i].symbols[:, ys + 1, xs + 1, group].reshape(-1, step.count)

        found = np.concatenate(_each(pool, one, len(coders)))
        prior.update(neighbours, step, rows, torch.from_numpy(found).to(prior.device))
    return [coder.finish() for coder in coders]


def _each(pool: ThreadPoolExecutor | None, function: Callable[[int], Result], count: int) -> list[Result]:
    """Results for 0, 1, ... in order, from the pool's threads as far as it takes work.

    While the interpreter shuts down it takes none, and threads that are still at work finish by themselves.
    """
    futures: list[Future[Result]] = []
    if pool is not None:
        with suppress(RuntimeError):
            for i in range(count):
                futures.append(pool.submit(function, i))
    rest = [function(i) for i in range(len(futures), count)]
    return [future.result() for future in futures] + rest


def _per_image(qualities: Iterable[float], slices: int, device: str) -> Tensor | int:
    """Rounded quality of each image; one number if all have the same."""
    rounded = [min(100, max(1, int(q + 0.5))) for q in qualities]
    if len(set(rounded)) == 1:
        return rounded[0]
    return torch.tensor(rounded, device=device).repeat_interleave(slices)


def _of(quality: Tensor | int, image: Tensor) -> Tensor | int:
    return quality if isinstance(quality, int) else quality[image]


def _split(values: Tensor, chunks: int) -> list[NDArray]:  # type: ignore[type-arg]
    return np.split(values.cpu().numpy(), chunks)
