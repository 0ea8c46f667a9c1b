"""Encode chunks to payloads: scale, analyse, choose, code, pack."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepsic_codec.codec.batching import Batcher, batch_limit, in_halves
from deepsic_codec.codec.chunk import ChunkToEncode, EncodeTask, inexact_model, load_model
from deepsic_codec.codec.rate_search import encode_tasks, search_rate

if TYPE_CHECKING:
    from deepsic_codec.model.scheduler import Encoded


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
    if searched:
        payloads |= zip(searched, search_rate(searched, scheduler), strict=True)
    for bounded in (False, True):
        qualities = {
            task: task.quality
            for task in with_data
            if task.params.quality is not None and (task.params.max_error is not None) == bounded
        }
        payloads |= encode_tasks(qualities, scheduler, _finish, features=True, pixels=bounded, symbols=False)
    return [payloads[task] for task in tasks]


def _finish(task: EncodeTask, quality: float, encoded: "Encoded") -> bytes:
    """Return the payload, with the residual that keeps `max_error` if there is one."""
    residual = None
    if task.params.max_error is not None:
        residual = task.scaled.bounded_residual(task.decode(encoded.pixels), task.params.max_error)
    return task.pack(encoded, quality, residual)


ENCODER = Batcher(in_halves(encode_chunks), batch_limit)
