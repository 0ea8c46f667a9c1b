"""Arrays to a device and back: on CUDA through pinned memory, and without waiting for the device.

On a CPU both are the array itself, and nothing is copied.  Results never depend on which
way they took.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

Key = TypeVar("Key")
Result = TypeVar("Result")


def upload(values: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """Values on a device; on a CPU they share the array's memory.

    On CUDA they are copied beside what the device is at work on.  Work that the caller
    queues afterwards finds them there.
    """
    tensor, device = torch.as_tensor(values), torch.device(device)
    if device.type != "cuda":
        return tensor.to(device)
    beside, here = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        # torch keeps the pinned memory from others until the copy is done
        moved = tensor.pin_memory().to(device, non_blocking=True)
    here.wait_stream(beside)
    moved.record_stream(here)  # and now the tensor's until the work queued here is
    return moved


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
    """Finish, in order, what was started: each only when ``lag`` further ones have been started, or all."""
    waiting: deque[tuple[Key, Callable[[], Result]]] = deque()
    for item in started:
        waiting.append(item)
        if len(waiting) > lag:
            key, finish = waiting.popleft()
            yield key, finish()
    for key, finish in waiting:
        yield key, finish()


@lru_cache(maxsize=64)
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device is given its arrays."""
    return torch.cuda.Stream(device)
