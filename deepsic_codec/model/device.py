"""Work on a device: copies, CUDA streams, threads of a CPU that run torch.

On a CPU an array and its tensor share memory, and nothing is copied. Results never depend on the stream or thread that
computed them.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import cycle
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.model.threads import Pending, submit_each

Result = TypeVar("Result")

# CUDA streams that side work takes in turn: two batches of two parts each. A device has eight queues in all.
SIDE_STREAMS = 4


def upload(values: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """Copy values to a device.

    On a CPU the tensor shares the array's memory. On CUDA the copy goes through pinned memory on a stream of its own,
    while the device computes; the current stream waits for it.
    """
    tensor, device = torch.as_tensor(values), torch.device(device)
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    copies, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        # torch does not hand out the pinned memory again until the copy is done.
        copied = tensor.pin_memory().to(device, non_blocking=True)
    current.wait_stream(copies)
    copied.record_stream(current)  # the memory stays the tensor's until work queued on this stream is done
    return copied


def download(tensor: Tensor) -> Pending[NDArray[Any]]:
    """Start to copy a tensor to the host.

    On a CPU the array shares the tensor's memory.
    """
    if tensor.device.type != "cuda":
        array = tensor.cpu().numpy()
        return lambda: array
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # a waiting thread sleeps and leaves its core to the entropy coder
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> NDArray[Any]:
        copied.synchronize()
        return host.numpy()

    return wait


def stack_padded(
    images: Sequence[NDArray[Any]],
    multiple: int,
    device: torch.device | str,
    pool: ThreadPoolExecutor | None = None,
) -> Tensor:
    """Stack images (S,H,W,C) of one shape and dtype in host memory, pinned if the device is CUDA.

    Height and width are padded to multiples of a number by repeating the last row and column. The threads of the pool
    share the copying.
    """
    s, h, w, c = images[0].shape
    shape = s * len(images), h + -h % multiple, w + -w % multiple, c
    dtype = torch.from_numpy(np.empty(0, images[0].dtype)).dtype
    stacked = torch.empty(shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda")
    pixels = stacked.numpy()

    def copy(k: int) -> None:
        pixels[k * s : (k + 1) * s, :h, :w] = images[k]

    submit_each(pool if len(images) > 1 else None, copy, len(images))()
    pixels[:, :h, w:] = pixels[:, :h, w - 1 : w]
    pixels[:, h:] = pixels[:, h - 1 : h]
    return stacked


def high_priority_stream(device: torch.device | str) -> AbstractContextManager[Any]:
    """Run CUDA work on this thread's own high-priority stream; no-op on other devices.

    For many small kernels whose results the host waits for, next to large ones of other streams.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return nullcontext()
    streams: dict[torch.device, torch.cuda.Stream] = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=-1)
    return torch.cuda.stream(streams[device])


@contextmanager
def side_stream(device: torch.device | str, after: bool = True) -> Iterator[Callable[[Tensor], Tensor]]:
    """Run CUDA work on a high-priority side stream; no-op on other devices.

    The side stream first waits for the current stream, unless `after=False`. The context's value is a function that
    makes the current stream wait for the side stream, and returns the tensor for use on the current stream.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield lambda tensor: tensor
        return
    current, side = torch.cuda.current_stream(device), next(_side_streams(device))
    if after:
        side.wait_stream(current)

    def hand_over(tensor: Tensor) -> Tensor:
        current.wait_stream(side)
        tensor.record_stream(current)
        return tensor

    with torch.cuda.stream(side):
        yield hand_over


def current_stream_context(device: torch.device | str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes a context on the current stream, for use later and in other threads."""
    if torch.device(device).type != "cuda":
        return nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)


def synchronize(device: torch.device | str) -> None:
    """Wait for the current stream, so that every other stream may use its results."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()


_local = threading.local()


@lru_cache(maxsize=64)
def _side_streams(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Return an endless iterator over a few streams, each of which has memory of its own."""
    return cycle([torch.cuda.Stream(device, priority=-1) for _ in range(SIDE_STREAMS)])


@lru_cache(maxsize=64)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
