"""Encode chunks to payloads: scale, analyse, choose, code, pack."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepsic_codec.codec.batching import Batcher, batch_limit, in_halves
from deepsic_codec.codec.chunk import ChunkToEncode, EncodeTask, load_model
from deepsic_codec.codec.rate_search import encode_labels, encode_tasks, search_rate

if TYPE_CHECKING:
    from deepsic_codec.model.scheduler import Encoded


def encode_chunks(chunks: Sequence[ChunkToEncode]) -> list[bytes]:
    """Encode chunks of one key in one call on this thread.

    For callers that have whole batches; `ENCODER` joins the chunks of several callers.
    """
    info, scheduler = load_model(*chunks[0].key)
    tasks = [EncodeTask(chunk, info) for chunk in chunks]
    payloads = {task: task.pack(None, task.quality) for task in tasks if task.scaled.empty}
    with_data = [task for task in tasks if not task.scaled.empty]
    searched = [task for task in with_data if task.params.quality is None]  # psnr=, bpp=
    if searched:
        payloads |= zip(searched, search_rate(searched, scheduler), strict=True)
    lossy = [task for task in with_data if task.params.quality is not None and task.params.max_error is None]
    qualities = {task: task.quality for task in lossy}
    payloads |= encode_tasks(qualities, scheduler, _finish, features=True, pixels=False, symbols=False)
    bounded = [task for task in with_data if task.params.quality is not None and task.params.max_error is not None]
    encoded = encode_labels(bounded, scheduler)
    payloads |= zip(bounded, scheduler.map(_finish_bounded, bounded, encoded), strict=True)
    return [payloads[task] for task in tasks]


def _finish(task: EncodeTask, quality: float, encoded: "Encoded") -> bytes:
    return task.pack(encoded, quality)


def _finish_bounded(task: EncodeTask, encoded: "Encoded | None") -> bytes:
    """Return the payload with the residual that keeps `max_error`."""
    assert task.params.max_error is not None
    return task.pack(encoded, task.quality, task.scaled.bounded_residual(task.params.max_error))


ENCODER = Batcher(in_halves(encode_chunks), batch_limit)
