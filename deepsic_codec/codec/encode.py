"""Encode chunks to payloads: scale, analyse, choose, code, pack."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from deepsic_codec.codec.batching import Batcher, batch_limit, in_halves
from deepsic_codec.codec.chunk import ChunkToEncode, EncodeTask, inexact_model, load_model
from deepsic_codec.codec.rate_search import search_rate
from deepsic_codec.codec.scaled import unscale

if TYPE_CHECKING:
    from deepsic_codec.model.scheduler import Encoded, Scheduler


def encode_chunks(chunks: Sequence[ChunkToEncode]) -> list[bytes]:
    """Encode chunks of one key in one call on this thread.

    For callers that have whole batches; `ENCODER` joins the chunks of several callers.

    Raises
    ------
    ConfigurationError
        For `max_error` with a model that cannot keep a bound.
    """
    info, scheduler = load_model(*chunks[0].key)
    if any(chunk.params.max_error is not None for chunk in chunks) and not scheduler.model.exact:
        raise inexact_model(info)
    tasks = [EncodeTask(chunk, info) for chunk in chunks]
    payloads = {task: task.pack(None, task.quality) for task in tasks if task.scaled.empty}
    with_data = [task for task in tasks if not task.scaled.empty]
    searched = [task for task in with_data if task.params.quality is None]  # psnr=, bpp=
    bounded = [task for task in with_data if task.params.max_error is not None]
    plain = [task for task in with_data if task.params.quality is not None and task.params.max_error is None]
    if plain:
        payloads |= zip(plain, _encode(plain, scheduler), strict=True)
    if bounded:
        payloads |= zip(bounded, _encode(bounded, scheduler, pixels=True), strict=True)
    if searched:
        payloads |= zip(searched, search_rate(searched, scheduler), strict=True)
    return [payloads[task] for task in tasks]


def _encode(tasks: Sequence[EncodeTask], scheduler: "Scheduler", pixels: bool = False) -> list[bytes]:
    """Encode chunks at their qualities; with `pixels`, add the residual that keeps their `max_error`."""
    payloads: list[bytes] = scheduler.encode(
        [task.images() for task in tasks],
        [task.quality for task in tasks],
        [task.params.effort for task in tasks],
        [task.params.tune for task in tasks],
        labels=any(task.params.semantics == "pre" for task in tasks),
        pixels=pixels,
        finish=[partial(_finish, task) for task in tasks],
    )
    return payloads


def _finish(task: EncodeTask, encoded: "Encoded") -> bytes:
    if task.params.max_error is None or encoded.pixels is None:
        return task.pack(encoded, task.quality)
    decoded = unscale(task.bands(encoded.pixels), task.scaled.ranges)
    return task.pack(encoded, task.quality, task.scaled.bounded_residual(decoded, task.params.max_error))


ENCODER = Batcher(in_halves(encode_chunks), batch_limit)
