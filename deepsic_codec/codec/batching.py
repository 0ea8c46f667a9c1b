"""Join the chunks that are in flight in this process into few, large calls.

Zarr hands over one chunk at a time, from many threads (format 2, Dask) or many coroutines of one event loop (format 3).
All chunks enter one queue. A caller that finds the machine free becomes the leader, takes the queued chunks and runs
them in its own thread. The other callers wait, and the chunks that arrive meanwhile are the next batch. The batcher has
no thread and no pool of its own, and no caller waits for a thread that has yet to start, so a full thread pool cannot
cause a deadlock.
"""

import asyncio
import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from deepsic_codec import config
from deepsic_codec.errors import OutOfMemory
from deepsic_codec.model.threads import host_threads

# A leader that expects further callers waits for at most this share of the last batch's time, and this many seconds.
GATHER_SHARE, GATHER_SECONDS = 1 / 16, 0.005
# Callers of a batch that ended longer ago than this are not expected again.
GATHER_MEMORY_SECONDS = 0.1
# At its end the interpreter waits this long for the last batch.
LAST_BATCH_SECONDS = 60


class Job(Protocol):
    """One chunk to work on."""

    @property
    def key(self) -> Hashable:
        """Jobs with equal keys may share a call."""

    @property
    def pixels(self) -> int:
        """The job's share of the limit of a batch."""


class _Caller:
    """The settings of a caller, and the context in which they apply."""

    def __init__(self) -> None:
        self.settings, self.context = config.get(), copy_context()


@dataclass(eq=False)
class _Item:
    job: Any
    caller: _Caller
    call: object = None  # the call of `submit` that queued the job
    done: bool = False
    result: Any = None  # of the job, or the exception that it raised


class Batcher:
    """A queue of jobs that are joined to batches.

    Parameters
    ----------
    run : callable
        Takes a list of jobs with equal keys, returns their results in order. If it raises, the jobs run one by one, so
        that only the bad one fails.
    limit : callable
        Returns the maximum pixels of a batch. A single job may be larger.
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]], limit: Callable[[], int]) -> None:
        self._run, self._limit = run, limit
        self._reset()
        _batchers.add(self)
        if hasattr(os, "register_at_fork"):
            # A forked child has none of the threads that would finish these jobs and release this lock.
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)  # a leader waits here for more jobs
        self._finished = threading.Condition(lock)  # followers wait here for their results, or to lead
        self._queue: list[_Item] = []
        self._busy = False
        self._callers = 0  # calls of submit now in progress
        self._expected, self._took, self._ended = 1, 0.0, 0.0  # last batch: callers at its end, duration, end
        self._gathering: WeakKeyDictionary[asyncio.AbstractEventLoop, list[tuple[list[_Item], asyncio.Future]]]
        self._gathering = WeakKeyDictionary()
        self._tasks: set[asyncio.Task] = set()  # the loop itself keeps only weak references

    def submit(self, jobs: Sequence[Job]) -> list[Any]:
        """Run jobs, together with those of other threads.

        Returns
        -------
        list
            For each job its result, or the Exception that it raised.
        """
        caller = _Caller()
        return self._submit([_Item(job, caller) for job in jobs])

    def _submit(self, mine: list[_Item]) -> list[Any]:
        call = object()
        for item in mine:
            item.call = call
        with self._finished:
            self._callers += 1
            self._queue += mine
            self._arrived.notify()
        try:
            while batch := self._lead(mine):
                self._work(batch)
        finally:
            with self._finished:
                self._callers -= 1
                if not all(item.done for item in mine):  # interrupted, by Ctrl-C for one
                    self._queue = [item for item in self._queue if item.call is not call]
        return [item.result for item in mine]

    def _lead(self, mine: list[_Item]) -> list[_Item]:
        """Wait until all of `mine` are done (returns an empty list), or return the batch for this caller to run."""
        with self._finished:
            while True:
                if all(item.done for item in mine):
                    return []
                if not self._busy and not (_ending and threading.current_thread() is not threading.main_thread()):
                    break
                self._finished.wait()
            self._busy = True
            try:
                if self._expected > 1 and time.monotonic() - self._ended < GATHER_MEMORY_SECONDS:
                    self._arrived.wait_for(
                        lambda: len({item.call for item in self._queue}) >= self._expected,
                        timeout=min(GATHER_SECONDS, GATHER_SHARE * self._took),
                    )
                return self._take()
            except BaseException:
                self._release()
                raise

    def _take(self) -> list[_Item]:
        """Take the oldest job from the queue, and as many with its key and settings as the limit allows."""
        first = self._queue[0]
        room = first.caller.context.run(self._limit)
        batch: list[_Item] = []
        for item in self._queue:
            if item.job.key == first.job.key and item.caller.settings == first.caller.settings:
                room -= item.job.pixels
                if batch and room < 0:
                    break
                batch.append(item)
        taken = {id(item) for item in batch}
        self._queue = [item for item in self._queue if id(item) not in taken]
        return batch

    def _release(self) -> None:
        self._busy = False
        self._finished.notify_all()

    def _work(self, batch: list[_Item]) -> None:
        began = time.monotonic()
        try:
            try:
                results = self._call(batch)
            except Exception as error:
                results = [error] if len(batch) == 1 else [self._alone(item) for item in batch]
            for item, result in zip(batch, results, strict=True):
                item.result, item.done = result, True
        finally:
            with self._finished:
                # If the leader was interrupted, the next leader runs the jobs of other callers that are left.
                self._queue[:0] = [item for item in batch if not item.done]
                self._expected, self._ended = self._callers, time.monotonic()
                self._took = self._ended - began
                self._release()

    def _call(self, batch: list[_Item]) -> Sequence[Any]:
        results = batch[0].caller.context.run(self._run, [item.job for item in batch])
        if len(results) != len(batch):  # no caller may get the pixels of another
            raise RuntimeError(f"{len(results)} results for {len(batch)} jobs")
        return results

    def _alone(self, item: _Item) -> Any:
        try:
            return self._call([item])[0]
        except Exception as error:
            return error

    async def submit_async(self, jobs: Sequence[Job]) -> list[Any]:
        """Run jobs like `submit`, from a coroutine, together with those of other coroutines of the loop."""
        loop = asyncio.get_running_loop()
        calls = self._gathering.setdefault(loop, [])
        future = loop.create_future()
        caller = _Caller()
        calls.append(([_Item(job, caller) for job in jobs], future))
        if len(calls) == 1:
            task = loop.create_task(self._flush(calls))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _flush(self, gathering: list[tuple[list[_Item], asyncio.Future]]) -> None:
        count = 0
        while count != len(gathering):  # all coroutines that can run do so before the loop returns to this one
            count = len(gathering)
            await asyncio.sleep(0)
        calls = gathering.copy()
        gathering.clear()
        items = [item for mine, _ in calls for item in mine]
        try:
            try:
                await asyncio.to_thread(self._submit, items)
            except RuntimeError:  # no new threads while the interpreter shuts down; `_submit` raises none
                self._submit(items)
            for mine, future in calls:
                if not future.done():
                    future.set_result([item.result for item in mine])
        finally:
            for _, future in calls:
                future.cancel()  # no effect on a future that is done


# torch has an error class for CUDA only. Its CPU allocator raises RuntimeError with one of these messages.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def in_halves(run: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[[Sequence[Any]], list[Any]]:
    """Return `run` for batches that may not fit into memory: if memory runs out, each half runs by itself.

    `run` takes a sequence of jobs and returns their results in order. Lack of memory for a single job raises
    OutOfMemory.
    """

    def halves(jobs: Sequence[Any]) -> list[Any]:
        try:
            return list(run(jobs))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(jobs) < 2:
                raise OutOfMemory(
                    "one chunk takes more memory than is left; make memory free, or use smaller chunks when you write"
                ) from error
        # Here and not above: while the exception lives, its traceback holds the tensors that filled the memory.
        release_memory()
        middle = (len(jobs) + 1) // 2
        return halves(jobs[:middle]) + halves(jobs[middle:])

    return halves


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device or the machine has no more memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)
    )


def release_memory() -> None:
    """Release the device memory that torch caches: its small pieces have no room for a large tensor."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_available():
        cuda.empty_cache()


def batch_limit() -> int:
    """Return the maximum pixels of a batch on this process's device."""
    return config.get().pixels_per_batch(config.device_in_use().split(":")[0], host_threads())


def raise_first(outcomes: list[Any]) -> list[Any]:
    """Return the results of `Batcher.submit`, or raise the first exception among them."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


_batchers: WeakSet[Batcher] = WeakSet()
_ending = False  # while the interpreter ends, daemon threads start no batches


def _finish_batches() -> None:
    """Wait for batches of daemon threads, and start no new ones.

    At its end the interpreter stops daemon threads at any point, and a stop inside torch aborts the process.
    """
    global _ending
    _ending = True
    for batcher in list(_batchers):
        with batcher._finished:
            batcher._finished.wait_for(lambda batcher=batcher: not batcher._busy, LAST_BATCH_SECONDS)  # type: ignore[misc]


atexit.register(_finish_batches)
