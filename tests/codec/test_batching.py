import asyncio
import os
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from deepsic_codec import config
from deepsic_codec.codec import batching
from deepsic_codec.codec.batching import Batcher
from tests.common import run_python

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@dataclass(frozen=True)
class Job:
    value: int
    key: str = ""
    pixels: int = 1


class Doubler:
    """What a batcher runs: doubles values, fails with negative ones, remembers batches."""

    def __init__(self, seconds=0.0, limit=100):
        self.batches, self.seconds = [], seconds
        self.batcher = Batcher(self.run, lambda: limit)

    def run(self, jobs):
        self.batches.append([job.value for job in jobs])
        time.sleep(self.seconds)
        assert len({job.key for job in jobs}) == 1
        for job in jobs:
            if job.value < 0:
                raise ValueError(f"negative {job.value}")
        return [2 * job.value for job in jobs]

    def submit(self, *values):
        return self.batcher.submit([Job(value) for value in values])

    def sizes(self):
        return [len(batch) for batch in self.batches]


def in_threads(count, function):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count), timeout=30))


def shown(results):
    return [str(result) if isinstance(result, Exception) else result for result in results]


def test_lone_caller_runs_at_once(monkeypatch):
    doubler = Doubler()
    monkeypatch.setattr(doubler.batcher._arrived, "wait_for", lambda *a, **k: pytest.fail("a lone caller waited"))
    assert [doubler.submit(i) for i in range(20)] == [[2 * i] for i in range(20)]
    assert doubler.submit(*range(5)) == [0, 2, 4, 6, 8]
    assert doubler.submit() == []
    assert doubler.sizes() == [1] * 20 + [5]


def test_threads_are_joined():
    doubler = Doubler(seconds=0.01)
    assert in_threads(16, lambda i: [doubler.submit(100 * i + k) for k in range(6)]) == [
        [[2 * (100 * i + k)] for k in range(6)] for i in range(16)
    ]
    assert sum(doubler.sizes()) == 96
    assert len(doubler.batches) < 24, doubler.sizes()  # 96 alone, 6 at best


def test_one_batch_at_a_time():
    running = threading.Semaphore(1)

    def run(jobs):
        assert running.acquire(blocking=False)
        time.sleep(0.002)
        running.release()
        return jobs

    batcher = Batcher(run, lambda: 100)
    jobs = in_threads(8, lambda i: batcher.submit([Job(i)])[0].value)
    assert jobs == list(range(8))


def test_bad_job_fails_alone():
    doubler = Doubler()
    assert shown(doubler.submit(1, -2, 3, -4)) == [2, "negative -2", 6, "negative -4"]
    assert doubler.batches == [[1, -2, 3, -4], [1], [-2], [3], [-4]]


def test_bad_job_fails_alone_among_threads():
    doubler = Doubler(seconds=0.005)
    results = in_threads(12, lambda i: shown(doubler.submit(i - 3))[0])
    assert results == ["negative -3", "negative -2", "negative -1", *range(0, 18, 2)]


def test_failing_together_only():
    def run(jobs):
        if len(jobs) > 1:
            raise MemoryError
        return [jobs[0].value]

    assert Batcher(run, lambda: 100).submit([Job(i) for i in range(4)]) == [0, 1, 2, 3]


def test_wrong_number_of_results_is_an_error():
    assert [type(r) for r in Batcher(lambda jobs: [], lambda: 100).submit([Job(1), Job(2)])] == [RuntimeError] * 2


def test_limit():
    doubler = Doubler(limit=10)
    sizes = [4, 4, 4, 25, 1, 9, 1]
    results = doubler.batcher.submit([Job(i, pixels=size) for i, size in enumerate(sizes)])
    assert results == [2 * i for i in range(7)]
    assert doubler.batches == [[0, 1], [2], [3], [4, 5], [6]]


def test_keys_are_not_mixed():
    doubler = Doubler()
    assert doubler.batcher.submit([Job(i, key="ab"[i % 2]) for i in range(6)]) == [0, 2, 4, 6, 8, 10]
    assert doubler.batches == [[0, 2, 4], [1, 3, 5]]


def test_coroutines_are_joined():
    doubler = Doubler()

    async def main():
        return await asyncio.gather(*(doubler.batcher.submit_async([Job(i), Job(-i)]) for i in range(1, 41)))

    assert [shown(r) for r in asyncio.run(main())] == [[2 * i, f"negative {-i}"] for i in range(1, 41)]
    assert doubler.sizes() == [80] + [1] * 80


def test_coroutines_and_threads_share_batches():
    doubler = Doubler(seconds=0.02)

    async def main():
        threads = [asyncio.to_thread(doubler.submit, i) for i in range(4)]
        coroutines = [doubler.batcher.submit_async([Job(i)]) for i in range(4, 12)]
        return await asyncio.gather(*threads, *coroutines)

    assert asyncio.run(main()) == [[2 * i] for i in range(12)]
    assert len(doubler.batches) <= 5, doubler.sizes()


def test_full_thread_pool_is_no_deadlock():
    doubler = Doubler(seconds=0.002)

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        threads = [asyncio.to_thread(doubler.submit, i) for i in range(20)]
        coroutines = [doubler.batcher.submit_async([Job(i)]) for i in range(20, 40)]
        return await asyncio.wait_for(asyncio.gather(*coroutines, *threads), 20)

    assert sorted(result for [result] in asyncio.run(main())) == list(range(0, 80, 2))


def test_two_loops():
    doubler = Doubler(seconds=0.005)

    async def main(i):
        return await asyncio.gather(*(doubler.batcher.submit_async([Job(10 * i + k)]) for k in range(5)))

    assert in_threads(4, lambda i: asyncio.run(main(i))) == [[[2 * (10 * i + k)] for k in range(5)] for i in range(4)]


def test_cancelled_coroutine_leaves_the_others():
    doubler = Doubler(seconds=0.02)

    async def main():
        tasks = [asyncio.create_task(doubler.batcher.submit_async([Job(i)])) for i in range(4)]
        await asyncio.sleep(0.005)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert isinstance(results[1], asyncio.CancelledError)
    assert [results[0], *results[2:]] == [[0], [4], [6]]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupted_leader_leaves_the_others_their_turn(interrupt):
    started, queued = threading.Event(), threading.Event()

    def run(jobs):
        if not queued.is_set():
            started.set()
            queued.wait(10)
            raise interrupt
        return [job.value for job in jobs]

    batcher = Batcher(run, lambda: 100)
    outcome = []

    def leader():
        try:
            batcher.submit([Job(1)])
        except BaseException as error:
            outcome.append(type(error))

    thread = threading.Thread(target=leader)
    thread.start()
    started.wait(10)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(batcher.submit, [Job(i)]) for i in (2, 3, 4)]
        while len(batcher._queue) < 3:
            time.sleep(0.001)
        queued.set()
        assert [other.result(10) for other in others] == [[2], [3], [4]]
    thread.join(10)
    assert outcome == [interrupt]
    assert batcher._queue == [] and batcher._callers == 0 and not batcher._busy


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_jobs_of_others_in_an_interrupted_batch_run_again(interrupt):
    release, batches, outcomes = threading.Event(), [], {}

    def run(jobs):
        batches.append(sorted(job.value for job in jobs))
        if len(batches) == 1:
            release.wait(10)
        elif len(batches) == 2:
            raise interrupt
        return [job.value for job in jobs]

    batcher = Batcher(run, lambda: 100)

    def submit(value):
        try:
            outcomes[value] = batcher.submit([Job(value)])
        except BaseException as error:
            outcomes[value] = type(error)

    def started(value):
        thread = threading.Thread(target=submit, args=(value,), daemon=True)  # may wait for ever if this test fails
        thread.start()
        return thread

    threads = [started(1)]
    while not batches:
        time.sleep(0.001)
    threads += [started(2), started(3)]
    while len(batcher._queue) < 2:
        time.sleep(0.001)
    release.set()
    for thread in threads:
        thread.join(10)
    assert batches[:2] == [[1], [2, 3]], "the second batch has jobs of two callers"
    assert outcomes in ({1: [1], 2: interrupt, 3: [3]}, {1: [1], 2: [2], 3: interrupt})
    assert batcher._queue == [] and not batcher._busy


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
@pytest.mark.parametrize("place", ["limit", "gathering"])
def test_a_leader_that_never_got_to_its_batch_leaves_the_lead(monkeypatch, place, error):
    """Interrupted while it waits for others, or by the limit: the next caller leads, and does not wait for ever."""
    failing = threading.Event()

    def fail(*args, **kwargs):
        if failing.is_set():
            raise error
        return 100

    batcher = Batcher(lambda jobs: [job.value for job in jobs], fail if place == "limit" else lambda: 100)
    assert batcher.submit([Job(1)]) == [1]
    failing.set()
    if place == "gathering":
        monkeypatch.setattr(batcher._arrived, "wait_for", fail)
        batcher._expected, batcher._ended, batcher._took = 2, time.monotonic() + 60, 60
    with pytest.raises(error):
        batcher.submit([Job(2)])
    failing.clear()
    assert not batcher._busy and batcher._queue == [] and batcher._callers == 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(batcher.submit, [Job(3), Job(4)]).result(10) == [3, 4]


def test_used_again_after_every_job_failed():
    doubler = Doubler()
    for _ in range(3):
        assert shown(doubler.submit(-1, -2)) == ["negative -1", "negative -2"]
        assert doubler.submit(1, 2) == [2, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_a_batch_runs():
    started, forked = threading.Event(), threading.Event()

    def run(jobs):
        if jobs[0].value == 1:
            started.set()
            forked.wait(10)
        return [job.value for job in jobs]

    batcher = Batcher(run, lambda: 100)
    thread = threading.Thread(target=batcher.submit, args=([Job(1)],))
    thread.start()
    started.wait(10)
    batcher._finished.acquire()  # the worst moment: another thread holds the lock
    child = os.fork()
    if child == 0:
        os._exit(0 if batcher.submit([Job(7)]) == [7] else 1)
    batcher._finished.release()
    forked.set()
    thread.join(10)
    deadline = time.monotonic() + 20
    status = None
    while time.monotonic() < deadline and status is None:
        pid, code = os.waitpid(child, os.WNOHANG)
        status = code if pid else time.sleep(0.01)
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == 0


def test_while_the_interpreter_shuts_down():
    output = run_python("""
        import asyncio, atexit, threading
        from dataclasses import dataclass
        from deepsic_codec.codec.batching import Batcher

        @dataclass
        class Job:
            value: int
            key = ""
            pixels = 1

        batcher = Batcher(lambda jobs: [job.value for job in jobs], lambda: 100)

        async def main():
            return await asyncio.gather(*(batcher.submit_async([Job(i)]) for i in range(3)))

        # Not asyncio.run, which itself starts a thread when it ends.
        atexit.register(lambda: print(batcher.submit([Job(5)]), asyncio.new_event_loop().run_until_complete(main())))
    """)
    assert output.split("\n")[0] == "[5] [[0], [1], [2]]"


def test_module_needs_nothing():
    assert run_python("import sys, deepsic_codec.codec.batching; print('numpy' in sys.modules)").strip() == "False"
    assert sys.version_info >= (3, 11)


def test_threads_of_torch_do_not_change_the_limit(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(get_num_threads=lambda: 99, cuda=None))
    with config.set(device="cpu", threads=4):
        assert batching.batch_limit() == config.get().pixels_per_batch("cpu", 4)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    with config.set(device="cpu"):
        assert batching.batch_limit() == config.get().pixels_per_batch("cpu", 8)
