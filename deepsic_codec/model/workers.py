"""Threads that work on one core each.

Several threads that share a layer wait for each other after each of it, and spin while they do;
threads that each take images of their own do not.  On a CPU, batches of several chunks are
shared out to these.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Workers:
    """Threads for which torch uses one thread.

    Parameters
    ----------
    count : int
        How many.
    """

    _local = threading.local()
    _starting = threading.Lock()

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "deepsic-networks")
        ready = threading.Barrier(count + 1)

        def begin() -> None:
            # A thread takes over the number that holds for all when it first asks, so it asks before it sets its own;
            # that is also what later threads take over, until it is set again below.
            torch.get_num_threads()
            torch.set_num_threads(1)
            self._local.inside = True
            ready.wait()

        with self._starting:
            before = torch.get_num_threads()
            try:
                for _ in range(count):
                    self._pool.submit(begin)
                ready.wait()
            except RuntimeError:  # the interpreter is ending: whoever waits is let go, and all is done by the caller
                ready.abort()
            torch.set_num_threads(before)

    @classmethod
    def inside(cls) -> bool:
        """Whether the caller is such a thread."""
        return getattr(cls._local, "inside", False)

    def _here(self, task: Callable[[], Result]) -> Result:
        """Do a task in the caller's thread, which holds already what a worker must not wait for."""
        self._local.inside = True
        try:
            return task()
        finally:
            self._local.inside = False

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Results of all tasks, in order; the first error is raised when none is under way any longer."""
        futures: list[Future[Result]] = []
        try:
            for task in tasks:
                futures.append(self._pool.submit(task))
        except RuntimeError:  # the interpreter is ending and takes no more work: the rest is done here
            pass
        results: list[Result] = []
        errors: list[BaseException] = []
        for number, task in enumerate(tasks):
            try:
                results.append(futures[number].result() if number < len(futures) else self._here(task))
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results
