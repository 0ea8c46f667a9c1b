"""Work on threads of the host, and the memory that it leaves; needs no torch."""

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from contextlib import suppress
from contextvars import copy_context
from typing import Any, TypeVar

from deepsic_codec import config

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")

Pending = Callable[[], Result]
"""A result that is being computed: a call, on any thread, waits for it and returns it or raises its error."""

# malloc parameters (numbers from malloc.h) and the values at which glibc's own adaptation ends.
MMAP_THRESHOLD, MMAP_BYTES = -3, 32 << 20
TRIM_THRESHOLD, TRIM_BYTES = -1, 64 << 20


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


def start(pool: Executor, function: Callable[..., Result], *args: Any) -> Future[Result]:
    """Start a call on a thread of a pool, or run it in this thread if the pool can start none.

    Pools refuse calls while the interpreter shuts down. Where the system allows no more threads, they raise the same
    error, but keep the call: one of their other threads may take it at any time. So whoever comes first runs it.
    """
    future: Future[Result] = Future()
    taken = threading.Lock()

    def run() -> None:
        if taken.acquire(blocking=False):
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

    try:
        pool.submit(copy_context().run, run)
    except RuntimeError:
        run()
    return future


def submit(pool: Executor | None, function: Callable[..., Result], *args: Any) -> Pending[Result]:
    """Start a call on a thread of a pool; without a pool, or if it can start no thread, run it in this one."""
    if pool is not None:
        return start(pool, function, *args).result
    result = function(*args)
    return lambda: result


def submit_each(pool: Executor | None, function: Callable[[int], Result], count: int) -> Pending[list[Result]]:
    """Start `function(0)` to `function(count - 1)` on the threads of a pool; the results come in order.

    Without a pool, the thread that waits for the results runs the calls. The first error is raised when no call runs
    any more.
    """
    if pool is None:
        return lambda: [function(i) for i in range(count)]
    futures = [start(pool, function, i) for i in range(count)]

    def wait() -> list[Result]:
        wait_for_all(futures)
        return [future.result() for future in futures]

    return wait


def host_threads() -> int:
    """Return the number of threads for work on the host: the setting, or one for each core."""
    return config.get().threads or os.cpu_count() or 1


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function that releases the GIL to items, on as many threads as the settings say.

    All callers share one pool, so that no more threads compute than the settings say. A call within a call runs on the
    thread that it is made on. The first error is raised when no call runs any more.
    """
    threads = host_threads()
    if len(items) < 2 or threads < 2 or getattr(_local, "active", False):
        return [function(item) for item in items]
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "deepsic-host", initializer=_mark)
    return submit_each(_pools[threads], lambda i: function(items[i]), len(items))()


def _mark() -> None:
    _local.active = True


_local = threading.local()
_pools: dict[int, ThreadPoolExecutor] = {}
# A forked process has none of the threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


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
