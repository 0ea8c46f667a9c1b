"""Threads for work on the host that needs no networks."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from deepsic_codec import config

Item = TypeVar("Item")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
# A forked process has none of the threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function that releases the GIL to items, on as many threads as the settings say.

    The first error is raised when no call runs any more.
    """
    threads = config.get().threads or os.cpu_count() or 1
    if len(items) < 2 or threads < 2:
        return [function(item) for item in items]
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "deepsic-host")
    try:
        futures = [_pools[threads].submit(copy_context().run, function, item) for item in items]
    except RuntimeError:  # the interpreter shuts down
        return [function(item) for item in items]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]
