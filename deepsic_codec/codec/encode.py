"""Encode chunks to payloads: as features, as wavelets, or sample by sample within a bound."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepsic_codec.codec.batching import Batcher, batch_limit, in_halves
from deepsic_codec.codec.chunk import ChunkToEncode, EncodeTask, find_info, scheduler_of
from deepsic_codec.codec.parallel import parallel_map
from deepsic_codec.codec.rate_search import encode_tasks, search_rate
from deepsic_codec.codec.structure import find_structure
from deepsic_codec.codec.wavelet import WaveletEncoder
from deepsic_codec.payload.sections import RESIDUAL, STRUCTURE
from deepsic_codec.payload.wavelet import Wavelet

if TYPE_CHECKING:
    from deepsic_codec.model.scheduler import Encoded


def encode_chunks(chunks: Sequence[ChunkToEncode]) -> list[bytes]:
    """Encode chunks of one key in one call on this thread.

    For callers that have whole batches; `ENCODER` joins the chunks of several callers.
    """
    info = find_info(*chunks[0].key)
    tasks = [EncodeTask(chunk, info) for chunk in chunks]
    payloads = {task: task.pack(None, task.quality) for task in tasks if task.scaled.empty}
    with_data = [task for task in tasks if not task.scaled.empty]
    payloads |= _encode_features([task for task in with_data if task.chunk.features])
    others = [task for task in with_data if not task.chunk.features]
    _score(others)
    payloads |= zip(others, parallel_map(_encode_other, others), strict=True)
    return [payloads[task] for task in tasks]


def _encode_features(tasks: Sequence[EncodeTask]) -> dict[EncodeTask, bytes]:
    if not tasks:
        return {}
    scheduler = scheduler_of(tasks[0].info)
    searched = [task for task in tasks if task.params.quality is None]  # psnr=, bpp=
    payloads: dict[EncodeTask, bytes] = {}
    if searched:
        payloads |= zip(searched, search_rate(searched, scheduler), strict=True)
    qualities = {task: task.quality for task in tasks if task.params.quality is not None}
    return payloads | encode_tasks(qualities, scheduler, _finish, features=True, pixels=False, symbols=False)


def _finish(task: EncodeTask, quality: float, encoded: "Encoded") -> bytes:
    return task.pack(encoded, quality)


def _score(tasks: Sequence[EncodeTask]) -> None:
    """Score the labels of chunks without features."""
    scored = [task for task in tasks if task.params.semantics == "pre"]
    if not scored:
        return
    images = [task.label_images() for task in scored]
    qualities = [task.quality for task in scored]
    results = scheduler_of(scored[0].info).encode(images, qualities, [0] * len(scored), features=False, labels=True)
    for task, result in zip(scored, results, strict=True):
        task.cells = result.cells


def _encode_other(task: EncodeTask) -> bytes:
    params, scaled = task.params, task.scaled
    if params.max_error is not None:
        structure = find_structure(scaled.samples, scaled.mask, params.max_error)
        residual = scaled.bounded_residual(params.max_error, structure)
        return task.pack_sections({RESIDUAL: residual, STRUCTURE: structure}, task.quality, task.cells)
    encoder = WaveletEncoder(scaled, params)
    if params.quality is not None:
        wavelet, _ = encoder.at_quality(params.quality)
    elif params.bpp is not None:
        rest = len(task.pack_sections(encoder.sections(Wavelet(0, b"")), task.quality, task.cells))
        wavelet = encoder.for_bytes(params.bpp * task.chunk.axes.pixels(task.chunk.array.shape) / 8 - rest)
    elif params.psnr is not None:
        wavelet = encoder.for_psnr(params.psnr)
    else:
        assert params.rmse is not None
        wavelet = encoder.for_rmse(params.rmse)
    quality = encoder.quality_of(wavelet.code) if params.quality is None else params.quality
    return task.pack_sections(encoder.sections(wavelet), quality, task.cells)


ENCODER = Batcher(in_halves(encode_chunks), batch_limit)
