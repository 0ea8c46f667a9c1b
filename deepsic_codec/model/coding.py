"""Symbols to feature bytes and back, with the integer prior and the arithmetic coder.

The prior runs over all images of a batch at once, pass by pass. The arithmetic coder runs chunk by chunk on a thread
pool, without the GIL, or on the device for all chunks at once.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.model.batch import whole_qualities
from deepsic_codec.model.device import download, upload
from deepsic_codec.model.device_coder.coder import DeviceCoder
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.neighbours import Predictions, iter_steps
from deepsic_codec.model.schedule import Step
from deepsic_codec.model.threads import Pending, submit_each
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.coders.symbols import SymbolDecoder, SymbolEncoder

Symbols = NDArray[np.int16]
EncoderFactory = Callable[[CoderTables, Symbols, bool], SymbolEncoder]


def encode_symbols(
    prior: CodingPrior,
    tables: CoderTables,
    symbols: list[Symbols],
    qualities: Iterable[float],
    pool: ThreadPoolExecutor | None = None,
    coder: EncoderFactory = SymbolEncoder,
    trellis: bool = False,
) -> list[bytes]:
    """Encode chunks of equal shape, symbols int16 (S,h,w,C) each, to feature sections at qualities 1 to 100.

    The threads of the pool code the chunks in parallel. `coder` makes the encoder of a chunk; training passes one that
    keeps statistics. With `trellis`, symbols are those of a path through it.
    """
    stacked = upload(np.concatenate(symbols), prior.device)
    return start_encoding(prior, tables, stacked, len(symbols), qualities, pool, coder, trellis=trellis)()


def start_encoding(
    prior: CodingPrior,
    tables: CoderTables,
    symbols: Tensor,
    chunks: int,
    qualities: Iterable[float],
    pool: ThreadPoolExecutor | None = None,
    coder: EncoderFactory = SymbolEncoder,
    predictions: Predictions | None = None,
    device_coder: DeviceCoder | None = None,
    batch_total: int = 0,
    trellis: bool = False,
) -> Pending[list[bytes]]:
    """Start to encode chunks of equal shape, without waiting for the device; like `encode_symbols`.

    Parameters
    ----------
    symbols : Tensor
        int16 (S chunks,h,w,C), all chunks stacked, on the prior's device.
    predictions : Predictions, optional
        The prior's predictions of these symbols, if they are known already.
    device_coder : DeviceCoder, optional
        Codes on the device instead of the pool, unless there is a trellis.
    batch_total : int
        Number of chunks that the device codes at the same time, these included.
    trellis : bool
        Whether the symbols are those of a path through the trellis.
    """
    images, h, w, _ = symbols.shape
    quality_list = list(qualities)
    if predictions is None:
        predictions = predict(prior, symbols, whole_quality(quality_list, images // chunks, prior.device), trellis)
    if device_coder is not None and not trellis:
        streams = device_coder.encode(prior.steps, symbols, chunks, predictions, batch_total)

        def or_on_host(chunk: int, stream: bytes | None) -> bytes:
            if stream is not None:
                return stream
            part = symbols[chunk * (images // chunks) :][: images // chunks].cpu().numpy()
            return encode_symbols(prior, tables, [part], quality_list[chunk : chunk + 1])[0]

        return lambda: [or_on_host(*item) for item in enumerate(streams())]
    order, ys, xs = _order(tuple(prior.steps), h, w)
    passes = order.copy()
    passes[1:, -1] = images * np.cumsum(order[:-1, 1] * order[:-1, 4])  # start of each pass in the predictions
    # Means and indices of all passes are one array each: a thread that waits for dozens of arrays, pass by pass, mostly
    # waits for the GIL.
    joined = (torch.cat([values.reshape(-1) for values in kind]) for kind in zip(*predictions, strict=True))
    all_symbols, means, indices = download(symbols), *map(download, joined)

    def encode_chunk(chunk: int) -> bytes:
        encoder = coder(tables, _rows_of(all_symbols(), chunks, chunk), trellis)
        encoder.encode(passes, ys, xs, means(), indices(), chunk)
        return encoder.finish()

    return submit_each(pool, encode_chunk, chunks)


@lru_cache(maxsize=64)
def _order(steps: tuple[Step, ...], h: int, w: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the passes that have positions, as the encoder takes them, and rows and columns of their positions."""
    rows, parts, before = [], [], 0
    for step in steps:
        positions = step.positions(h, w)
        if count := len(positions[0]):
            rows.append((step.start, step.count, step.second, before, count, 0))
            parts.append(positions)
            before += count
    ys, xs = (np.concatenate(axis) for axis in zip(*parts, strict=True))
    return np.array(rows, np.int64), ys, xs


def predict(prior: CodingPrior, symbols: Tensor, quality: Tensor | int, trellis: bool = False) -> Predictions:
    """Return the prior's predictions of known symbols (S,h,w,C), at whole qualities (S,) or one quality."""
    neighbours = prior.neighbours(symbols, trellis)
    return [
        prior.run(n, neighbours, rows, _quality_of(quality, image))
        for n, _, rows, _, image in iter_steps(prior, neighbours)
    ]


def decode_symbols(
    prior: CodingPrior,
    tables: CoderTables,
    features: list[bytes],
    slices: int,
    grid: tuple[int, int],
    qualities: Iterable[float],
    pool: ThreadPoolExecutor | None = None,
    trellis: bool = False,
) -> list[Symbols]:
    """Decode feature sections of chunks of equal shape to symbols, int16 (S,h,w,C) each.

    Raises
    ------
    CorruptPayload
        If a stream holds an impossible symbol, or bytes that no symbol needs.
    """
    coders = [SymbolDecoder(tables, data, slices, grid, prior.latents, trellis) for data in features]
    images = len(coders) * slices
    neighbours = prior.no_neighbours(images, grid, trellis)
    quality = whole_quality(qualities, slices, prior.device)
    for n, step, rows, _, image in iter_steps(prior, neighbours):
        ys, xs = step.positions(*grid)
        copies = [download(v) for v in prior.run(n, neighbours, rows, _quality_of(quality, image))]
        means, indices = (wait() for wait in copies)
        symbols = np.empty_like(means)
        decode_chunk = partial(_decode_pass, coders, step, (ys, xs), (means, indices, symbols))
        submit_each(pool, decode_chunk, len(coders))()
        prior.update(neighbours, step, rows, upload(symbols, prior.device))
    return [coder.finish() for coder in coders]


def _decode_pass(
    coders: list[SymbolDecoder],
    step: Step,
    positions: tuple[NDArray[np.int64], NDArray[np.int64]],
    rows: tuple[NDArray[Any], ...],
    chunk: int,
) -> None:
    parts = (_rows_of(values, len(coders), chunk) for values in rows)
    coders[chunk].decode_pass(*positions, step.start, step.second, *parts)


def start_decoding(
    prior: CodingPrior,
    features: list[bytes],
    slices: int,
    grid: tuple[int, int],
    qualities: Iterable[float],
    device_coder: DeviceCoder,
    batch_total: int = 0,
    trellis: bool = False,
) -> tuple[Tensor, Pending[None]]:
    """Start to decode feature sections on the prior's device.

    Returns
    -------
    symbols : Tensor
        int16 (S chunks,h,w,C), all chunks stacked.
    check : Pending
        Waits for the symbols and raises CorruptPayload if a stream is damaged.
    """
    quality_of = partial(_quality_of, whole_quality(qualities, slices, prior.device))
    return device_coder.decode(prior, features, slices, grid, quality_of, batch_total, trellis)


def whole_quality(qualities: Iterable[float], slices: int, device: str | torch.device) -> Tensor | int:
    """Return the whole quality of each image of some chunks, or one number if all have the same."""
    whole = whole_qualities(np.array(list(qualities)))[1]
    return int(whole[0]) if (whole == whole[0]).all() else upload(whole.repeat(slices), device)


def _quality_of(quality: Tensor | int, image: Tensor) -> Tensor | int:
    return quality if isinstance(quality, int) else quality[image]


def _rows_of(values: NDArray[Any], chunks: int, chunk: int) -> NDArray[Any]:
    """Return the part of an array that belongs to one of several chunks of equal shape."""
    count = len(values) // chunks
    return values[chunk * count : (chunk + 1) * count]
