"""Work on a device: copies, CUDA streams, threads of a CPU, and the memory that freed tensors leave.

On a CPU an array and its tensor share memory, and nothing is copied. Results never depend on the stream or thread that
computed them.
"""

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import copy_context
from functools import lru_cache
from itertools import cycle
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")

Pending = Callable[[], Result]
"""A result that is being computed: a call, on any thread, waits for it and returns it or raises its error."""

# CUDA streams that side work takes in turn: two batches of two parts each. A device has eight queues in all.
SIDE_STREAMS = 4
# malloc parameters (numbers from malloc.h) and the values at which glibc's own adaptation ends.
MMAP_THRESHOLD, MMAP_BYTES = -3, 32 << 20
TRIM_THRESHOLD, TRIM_BYTES = -1, 64 << 20


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


def pipelined(started: Iterable[tuple[Key, Pending[Result]]], prefetch: int) -> Iterator[tuple[Key, Result]]:
    """Yield keys and results in order, with up to `prefetch` further items started before a result is waited for.

    If an item fails, all items that were started are waited for before its error is raised: they hold device memory.
    """
    waiting: deque[tuple[Key, Pending[Result]]] = deque()
    try:
        for item in started:
            waiting.append(item)
            if len(waiting) > prefetch:
                key, wait = waiting.popleft()
                yield key, wait()
        while waiting:
            key, wait = waiting.popleft()
            yield key, wait()
    except Exception:
        for _, wait in waiting:
            with suppress(Exception):
                wait()
        raise


def submit(pool: ThreadPoolExecutor | None, function: Callable[..., Result], *args: Any) -> Pending[Result]:
    """Start a call on a thread of a pool.

    Without a pool, or while the interpreter shuts down, the call runs at once in this thread.
    """
    if pool is not None:
        with suppress(RuntimeError):
            return pool.submit(copy_context().run, function, *args).result
    result = function(*args)
    return lambda: result


def submit_each(
    pool: ThreadPoolExecutor | None, function: Callable[[int], Result], count: int
) -> Pending[list[Result]]:
    """Start `function(0)` to `function(count - 1)` on the threads of a pool; the results come in order.

    Without a pool, and for calls that the pool refuses while the interpreter shuts down, the thread that waits for the
    results runs the calls. The first error is raised when no call runs any more.
    """
    futures: list[Future[Result]] = []
    if pool is not None:
        with suppress(RuntimeError):
            for i in range(count):
                futures.append(pool.submit(copy_context().run, function, i))

    def wait() -> list[Result]:
        try:
            rest = [function(i) for i in range(len(futures), count)]
        finally:
            wait_for_all(futures)
        return [future.result() for future in futures] + rest

    return wait


class Workers:
    """Threads that each run torch on one core.

    Several threads that share a layer wait for each other after each layer, and spin while they do. Threads that take
    images of their own do not, so a CPU shares the chunks of a batch among workers.

    Parameters
    ----------
    count : int
        Number of threads.
    """

    _local = threading.local()
    _starting = threading.Lock()

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "deepsic-networks")
        ready = threading.Barrier(count + 1)

        def start() -> None:
            # torch initialises a thread's count from the global one on first use, and setting it in a thread changes
            # the global default. So: read first, set to 1, restore the global value below.
            torch.get_num_threads()
            torch.set_num_threads(1)
            self._local.active = True
            ready.wait()

        with self._starting:
            before = torch.get_num_threads()
            try:
                for _ in range(count):
                    self._pool.submit(start)
                ready.wait()
            except RuntimeError:  # the interpreter shuts down: release the threads; the caller will run the tasks
                ready.abort()
            torch.set_num_threads(before)

    @classmethod
    def is_worker(cls) -> bool:
        """Whether the current thread is a worker."""
        return getattr(cls._local, "active", False)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run all tasks and return their results in order; the first error is raised when no task runs any more."""

        def as_worker(i: int) -> Result:
            # The caller, too, is a worker while it runs tasks: it holds the locks that a worker must not wait for.
            before, self._local.active = self.is_worker(), True
            try:
                return tasks[i]()
            finally:
                self._local.active = before

        return submit_each(self._pool, as_worker, len(tasks))()


def keep_freed_memory() -> bool:
    """Make malloc keep the memory of freed tensors, if the environment switched off its adaptation.

    `distributed` starts its workers with MALLOC_TRIM_THRESHOLD_, and glibc then no longer adapts to the sizes that a
    process allocates. The activations of each layer are mapped, zeroed page by page and unmapped again, which takes
    longer than the layers themselves. An environment that sets MALLOC_MMAP_THRESHOLD_, too, is left as it is. Returns
    whether a parameter was changed.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    if not sys.platform.startswith("linux"):
        return False
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, MMAP_BYTES) and mallopt(TRIM_THRESHOLD, TRIM_BYTES))


_local = threading.local()


@lru_cache(maxsize=64)
def _side_streams(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Return an endless iterator over a few streams, each of which has memory of its own."""
    return cycle([torch.cuda.Stream(device, priority=-1) for _ in range(SIDE_STREAMS)])


@lru_cache(maxsize=64)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
