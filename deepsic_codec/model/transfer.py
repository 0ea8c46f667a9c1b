"""Arrays to a device and back: on CUDA through pinned memory, and without waiting for the device.

On a CPU both are the array itself, and nothing is copied.  Results never depend on which
way they took.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from itertools import cycle
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Pieces of work that go beside a stream at a time: of two batches, two parts each. A device has eight queues for all.
ASIDES = 4

Key = TypeVar("Key")
Result = TypeVar("Result")


def upload(values: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """Values on a device; on a CPU they share the array's memory.

    On CUDA they are copied beside what the device is at work on.  Work that the caller
    queues afterwards finds them there.
    """
    tensor, device = torch.as_tensor(values), torch.device(device)
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    beside, here = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        # torch keeps the pinned memory from others until the copy is done
        moved = tensor.pin_memory().to(device, non_blocking=True)
    here.wait_stream(beside)
    moved.record_stream(here)  # and now the tensor's until the work queued here is
    return moved


def join(
    images: Sequence[NDArray[Any]],
    multiple: int,
    device: torch.device | str,
    each: Callable[[Callable[[int], None], Sequence[int]], Any] = lambda copy, numbers: list(map(copy, numbers)),
) -> Tensor:
    """Images (S,H,W,C) one after the other in memory that is fast to copy to a device from.

    Height and width are brought up to multiples of a number by repeating the last row and column. ``each`` calls
    a function with each of some numbers, in any order and from any threads.
    """
    s, h, w, c = images[0].shape
    shape = s * len(images), h + -h % multiple, w + -w % multiple, c
    kind = torch.from_numpy(np.empty(0, images[0].dtype)).dtype
    joined = torch.empty(shape, dtype=kind, pin_memory=torch.device(device).type == "cuda")
    pixels = joined.numpy()

    def copy(k: int) -> None:
        pixels[k * s : (k + 1) * s, :h, :w] = images[k]

    each(copy, range(len(images)))
    pixels[:, :h, w:] = pixels[:, :h, w - 1 : w]
    pixels[:, h:] = pixels[:, h - 1 : h]
    return joined


def fetch(tensor: Tensor) -> Callable[[], NDArray[Any]]:
    """Begin to copy a tensor to the host; what is returned waits for it, from any thread, and gives the array."""
    if tensor.device.type != "cuda":
        found = tensor.cpu().numpy()
        return lambda: found
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # who waits sleeps: its core is the entropy coder's
    copied.record(torch.cuda.current_stream(tensor.device))

    def array() -> NDArray[Any]:
        copied.synchronize()
        return host.numpy()

    return array


def behind(started: Iterable[tuple[Key, Callable[[], Result]]], lag: int) -> Iterator[tuple[Key, Result]]:
    """Finish, in order, what was started: each only when ``lag`` further ones have been started, or all.

    Where one fails, the others are waited for: what they hold of the device's memory is free then.
    """
    waiting: deque[tuple[Key, Callable[[], Result]]] = deque()
    try:
        for item in started:
            waiting.append(item)
            if len(waiting) > lag:
                key, finish = waiting.popleft()
                yield key, finish()
        while waiting:
            key, finish = waiting.popleft()
            yield key, finish()
    except Exception:
        for _, finish in waiting:
            with suppress(Exception):
                finish()
        raise


def before_others(device: torch.device | str) -> AbstractContextManager[Any]:
    """Let this thread's work on CUDA go before what other streams are at; elsewhere nothing.

    For many small pieces of work whose results somebody waits for, beside large ones.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return nullcontext()
    streams: dict[torch.device, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=-1)
    return torch.cuda.stream(streams[device])


@contextmanager
def aside(device: torch.device | str, after: bool = True) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let work on CUDA go beside, and before, what this thread's stream is given later; elsewhere nothing.

    It finds there what that stream has been given until now, unless it does not come ``after`` that. What is yielded
    makes a result of it ready for that stream, in which case the stream waits for it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield lambda tensor: tensor
        return
    here, beside = torch.cuda.current_stream(device), next(_asides(device))
    if after:
        beside.wait_stream(here)

    def ready(tensor: Tensor) -> Tensor:
        here.wait_stream(beside)
        tensor.record_stream(here)
        return tensor

    with torch.cuda.stream(beside):
        yield ready


def now_on(device: torch.device | str) -> Callable[[], AbstractContextManager[Any]]:
    """What lets work go where this thread's goes now, later and from any thread."""
    if torch.device(device).type != "cuda":
        return nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)


def settle(device: torch.device | str) -> None:
    """Wait until what this thread has queued is done, so that other streams may use it without further ado."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()


_own = threading.local()


@lru_cache(maxsize=64)
def _asides(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Streams in turn: few, since each has memory of its own."""
    return cycle([torch.cuda.Stream(device, priority=-1) for _ in range(ASIDES)])


@lru_cache(maxsize=64)
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device is given its arrays."""
    return torch.cuda.Stream(device)
