"""Kill, fill, cut and mislead what writes and reads an archive, and say what was readable then and what mended it.

    python -m benchmarks.faults --count 100
    python -m benchmarks.faults kill-store two-writers --count 20 --seed 1

Faults:

- kill-OPERATION: kill -9 at a random moment of `store`, `consolidate_labels`, `export`, `relabel` or `ingest`.
- two-writers: two processes write the index of an array at once.
- full-OPERATION: the disk is full from a random write on (for files of an export: beyond a random size).
- lost-OPERATION: writes arrive, but their answers do not.
- short-reads: reads return a part of what is stored.
- clock-skew: the clock jumps by years between runs, and files have times of other years.

Before each case the archive holds an old picture with a label index; the operation writes a new one. Afterwards,
every chunk must be the old one or the new one, what was reported as written must be the new one, and an answer from
the index must be right, or say that it was not compared with the chunks, or be a typed error. Then the same operation
runs again, and everything must be new. Exit status 1 if anything was lost or wrong.
"""

import argparse
import errno
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, WrapperStore

from benchmarks.fuzz import tiny_model
from deepsic_codec import DeepSIC, config, consolidate_labels, open_archive, open_labels, relabel
from deepsic_codec.axes import chunk_region
from deepsic_codec.errors import DeepSICError, StaleIndex
from deepsic_codec.labels import index_writer

SHAPE, CHUNK = (128, 192, 3), (64, 64, 3)
LIMIT = 120.0  # seconds after which an operation counts as one that hangs
YEARS = 3  # of a clock that is wrong


class Fault(AssertionError):
    """Something that was lost, or wrong without a word."""


def picture(seed: int) -> NDArray[np.uint8]:
    """Return an image (128, 192, 3) whose chunks all differ."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    rng = np.random.default_rng(seed)
    waves = [np.sin(y / rng.uniform(3, 20) + rng.uniform(0, 6)) * np.cos(x / rng.uniform(3, 20)) for _ in range(3)]
    return np.clip(128 + 100 * np.stack(waves, -1) + rng.normal(0, 4, SHAPE), 0, 255).astype(np.uint8)


OLD, NEW = picture(1), picture(2)


@dataclass
class Scenario:
    """An operation on an archive in a folder.

    Attributes
    ----------
    operate : callable
        Runs the operation on a folder and a store of its archive; calls `report(name)` for what is written.
    check : callable
        Looks at a folder, and at what was reported; returns what is readable, or raises Fault.
    prepare : callable
        Writes the old picture to a folder.
    on_files : bool
        Whether the operation writes files, and not to the store.
    """

    operate: Callable[[Path, Any, Callable[[str], None]], None]
    check: Callable[[Path, Sequence[str]], str]
    prepare: Callable[[Path], None]
    on_files: bool = False


def codec(semantics: str = "pre") -> DeepSIC:
    """Return the codec of all archives: exact, so that every wrong sample is noticed."""
    return DeepSIC(model="fuzz-tiny", transform="features", max_error=0, semantics=semantics)


def store_picture(store: Any, values: NDArray[Any], semantics: str = "pre", **options: Any) -> None:
    """Store a picture as the array `image`."""
    import dask
    import dask.array as da

    from deepsic_codec import dask as bulk

    source = da.from_array(values, chunks=CHUNK, name=f"picture-{values[0, 0, 0]}-{values.sum()}")
    with dask.config.set(num_workers=2):  # threads that a child process has for itself, with the settings of this one
        bulk.store(source, store, name="image", codec=codec(semantics), chunks=CHUNK, batch_size=2, **options)


def archive(folder: Path) -> Path:
    """Return the path of the archive in a folder."""
    return folder / "archive.zarr"


def chunk_states(values: NDArray[Any]) -> Counter:
    """Count chunks that are of the old picture, of the new one, empty, or anything else."""
    states: Counter = Counter()
    for index in np.ndindex(*(-(-n // c) for n, c in zip(SHAPE, CHUNK, strict=True))):
        region = chunk_region(index, CHUNK, SHAPE)
        kinds = {"old": OLD[region], "new": NEW[region], "empty": np.zeros((), np.uint8)}
        states[next((name for name, part in kinds.items() if (values[region] == part).all()), "wrong")] += 1
    return states


def check_array(folder: Path, reported: Sequence[str]) -> str:
    """Read the array `image`, and ask its index."""
    states = chunk_states(open_archive(archive(folder), "image")[...])
    if states["wrong"] or states["empty"]:
        raise Fault(f"wrong pixels: {dict(states)}")
    if "image" in reported and states["old"]:
        raise Fault(f"lost: {dict(states)} after the write was reported")
    state = next(iter(states)) if len(states) == 1 else "mixed"
    return f"{state}, {check_labels(archive(folder), reported)}"


def check_labels(path: Path, reported: Sequence[str] = (), name: str = "image") -> str:
    """Compare answers from an index with the headers of the chunks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = {text: open_labels(path, name, scan=True).where(text).mask for text in QUERIES}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            labels = open_labels(path, name)
            answers = {text: labels.where(text) for text in QUERIES}
            verified = {text: labels.where(text, verify="all").mask for text in QUERIES}
        except DeepSICError as error:
            if "index" in reported:
                raise Fault(f"lost: {error}") from error
            return f"{type(error).__name__} of the index"
    for text, selection in answers.items():
        if not np.array_equal(verified[text], truth[text]):
            raise Fault(f"stale: {text} with verify='all' selects {verified[text].sum()} chunks")
        if not np.array_equal(selection.mask, truth[text]):
            if selection.compared or "index" in reported:
                raise Fault(f"stale: {text} selects {selection.count} chunks instead of {truth[text].sum()}")
            return "index old, warning" if said else "index old, not compared"
    return "index right"


QUERIES = ("Class1 > 0.591", "Class5 > 0.531", "Class8 > 0.539")  # about half of the chunks, others of each picture


def prepare_array(folder: Path) -> None:
    """Store the old picture and its index."""
    store_picture(archive(folder), OLD)


def prepare_rewritten(folder: Path) -> None:
    """Store the new picture over the old one, whose index stays."""
    prepare_array(folder)
    open_archive(archive(folder), "image", mode="r+")[...] = NEW


def prepare_features(folder: Path) -> None:
    """Store the new picture with labels of features; the index is one without labels."""
    store_picture(archive(folder), NEW, "post")


def check_features(folder: Path, reported: Sequence[str]) -> str:
    """Compare the index with one that relabelling makes elsewhere."""
    try:
        labels = open_labels(archive(folder), "image")
        masks = [labels.where(text).mask for text in QUERIES]
    except DeepSICError as error:
        if "index" in reported:
            raise Fault(f"lost: {error}") from error
        return f"{type(error).__name__} of the index"
    summary = labels.summary()
    if summary["features"]:
        truth = relabel(archive(folder), name="image", index=zarr.storage.MemoryStore())
        if any(not np.array_equal(mask, truth.where(text).mask) for mask, text in zip(masks, QUERIES, strict=True)):
            raise Fault("wrong: labels differ from those of another run")
        return "index right"
    if "index" in reported:
        raise Fault("lost: the index that was reported")
    return "index old"


def prepare_export(folder: Path) -> None:
    """Store the new picture, beside an export of the old one."""
    from deepsic_codec.io.export import export

    prepare_array(folder)
    for name in ("copy.tif", "copy.zarr"):
        export(archive(folder), folder / name, "image")
    open_archive(archive(folder), "image", mode="r+")[...] = NEW


def operate_export(folder: Path, store: Any, report: Callable[[str], None]) -> None:
    """Export to a file and to an array, over what is there."""
    from deepsic_codec.io.export import export

    for name in ("copy.tif", "copy.zarr"):
        export(archive(folder), folder / name, "image", overwrite=True)
        report(name)


def check_export(folder: Path, reported: Sequence[str]) -> str:
    """Read both exports."""
    import tifffile

    states = []
    for name, read in (
        ("copy.tif", lambda path: tifffile.imread(path)),
        ("copy.zarr", lambda path: zarr.open_array(path / "image", mode="r")[...]),
    ):
        values = read(folder / name)
        states += [kind for kind, array in (("old", OLD), ("new", NEW)) if np.array_equal(values, array)] or ["wrong"]
        if states[-1] == "wrong" or (name in reported and states[-1] != "new"):
            raise Fault(f"{name} is {states[-1]}, reported: {reported}")
    return states[0] if len({*states}) == 1 else "mixed"


def prepare_ingest(folder: Path) -> None:
    """Write three images, and an archive that has the old picture under the name of one."""
    from PIL import Image

    prepare_array(folder)
    (folder / "images").mkdir()
    for name in ("image", "other", "third"):
        Image.fromarray(NEW).save(folder / "images" / f"{name}.png")
    shutil.rmtree(archive(folder) / "image")
    shutil.rmtree(archive(folder) / "image_labels")


def operate_ingest(folder: Path, store: Any, report: Callable[[str], None]) -> None:
    """Store the images, or go on with that."""
    from deepsic_codec.io.ingest import ingest
    from deepsic_codec.io.sources import open_sources

    options = {"model": "fuzz-tiny", "transform": "features", "max_error": 0}
    for source in open_sources([str(folder / "images")]):
        ingest(source, store, codec=options, chunk=CHUNK[0], workers=2, batch_size=2, resume=True)
        report(source.name)


def check_ingest(folder: Path, reported: Sequence[str]) -> str:
    """Read the arrays that are there."""
    states: Counter = Counter()
    for name in ("image", "other", "third"):
        try:
            values = open_archive(archive(folder), name)[...]
        except DeepSICError as error:
            if name in reported:
                raise Fault(f"lost: {name}: {error}") from error
            states["absent"] += 1
            continue
        chunks = chunk_states(values)
        if chunks["wrong"] or chunks["old"] or (name in reported and chunks["empty"]):
            raise Fault(f"{name}: {dict(chunks)}, reported: {reported}")
        check_labels(archive(folder), ["index"] if name in reported else [], name)
        states["partial" if chunks["empty"] else "new"] += 1
    return "new" if states["new"] == 3 else "absent" if states["absent"] == 3 else "mixed"


def _operate_store(folder: Path, store: Any, report: Callable[[str], None]) -> None:
    store_picture(store, NEW, resume=True, retries=1, backoff=0)
    report("image")
    report("index")


def _operate_index(folder: Path, store: Any, report: Callable[[str], None]) -> None:
    consolidate_labels(store, "image")
    report("index")


def _operate_relabel(folder: Path, store: Any, report: Callable[[str], None]) -> None:
    relabel(store, name="image")
    report("index")


SCENARIOS = {
    "store": Scenario(_operate_store, check_array, prepare_array),
    "consolidate_labels": Scenario(_operate_index, check_array, prepare_rewritten),
    "export": Scenario(operate_export, check_export, prepare_export, on_files=True),
    "relabel": Scenario(_operate_relabel, check_features, prepare_features),
    "ingest": Scenario(operate_ingest, check_ingest, prepare_ingest),
}
FINISHED = {
    "store": ["image", "index"],
    "consolidate_labels": ["image", "index"],
    "export": ["copy.tif", "copy.zarr"],
    "relabel": ["index"],
    "ingest": ["image", "other", "third"],
}


class FaultyStore(WrapperStore[Any]):
    """A store on which things go wrong.

    Parameters
    ----------
    store : Store
        The store.
    fault : {"full", "lost", "short"}
        Writes fail from the one with number `after` on; they arrive, but one in three from there on fails; or the
        read of this number returns a part.
    after : int
        Number of a call.
    seed : int
        For the length of a part.
    """

    def __init__(self, store: Any, fault: str, after: int, seed: int = 0) -> None:
        super().__init__(store)
        self.fault, self.after, self.calls, self.seed = fault, after, [0, 0], seed

    def _with_store(self, store: Any) -> Self:
        copy = type(self)(store, self.fault, self.after, self.seed)
        copy.calls = self.calls
        return copy

    async def _write(self, method: Callable[..., Any], key: str, *args: Any) -> None:
        self.calls[0] += 1
        if self.fault == "full" and self.calls[0] > self.after:
            raise OSError(errno.ENOSPC, "No space left on device", key)
        await method(key, *args)
        if self.fault == "lost" and self.calls[0] > self.after and (self.calls[0] - self.after) % 3 == 1:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer", key)

    async def set(self, key: str, value: Any) -> None:  # noqa: D102
        await self._write(super().set, key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:  # noqa: D102
        await self._write(super().set_if_not_exists, key, value)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:  # noqa: D102
        value = await super().get(key, prototype, byte_range)
        self.calls[1] += 1
        if self.fault == "short" and self.calls[1] == self.after and value is not None and len(value):
            return value[: int(np.random.default_rng(self.seed).integers(len(value)))]
        return value


@dataclass
class Child:
    """A forked process that runs an operation and reports through a pipe."""

    pid: int
    pipe: int
    data: bytes = b""

    @classmethod
    def start(cls, work: Callable[[Callable[[str], None]], None]) -> "Child":
        """Fork a process that does some work; it reports names, and the error that ends it."""
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            os.close(writing)
            return cls(pid, reading)
        try:
            os.close(reading)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work(lambda name: os.write(writing, f"{name}\n".encode()) and None)
            os.write(writing, b"!done\n")
        except BaseException as error:
            kind = "typed" if isinstance(error, DeepSICError | OSError) else "untyped"
            text = "".join(traceback.format_exception(error)) if kind == "untyped" else str(error)
            os.write(writing, f"!{kind} {json.dumps(f'{type(error).__name__}: {text}')}\n".encode())
        finally:
            os._exit(0)

    def wait(self, seconds: float | None = None) -> tuple[list[str], str]:
        """Wait, kill the process if it takes longer, and return what it reported and how it ended.

        Without a number of seconds, a process that takes longer than LIMIT hangs.
        """
        stop = time.monotonic() + (LIMIT if seconds is None else seconds)
        os.set_blocking(self.pipe, False)
        ended = False
        while not ended and time.monotonic() < stop:
            ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            self._read()
            if not ended:
                time.sleep(min(0.002, max(0.0, stop - time.monotonic())))
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._read()
        os.close(self.pipe)
        lines = self.data.decode().split("\n")[:-1]
        killed = "killed" if seconds is not None else f"untyped: no end within {LIMIT:g} s"
        end = next((line[1:] for line in lines if line.startswith("!")), "" if ended else killed)
        return [line for line in lines if not line.startswith("!")], end

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self.pipe, 65536):
                self.data += part


@dataclass
class Table:
    """Outcomes of all cases, by fault."""

    rows: dict[str, Counter] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def note(self, fault: str, *outcomes: str) -> None:
        """Count outcomes of a case."""
        self.rows.setdefault(fault, Counter()).update(outcomes)

    def fail(self, fault: str, case: int, error: BaseException | str) -> None:
        """Keep a fault."""
        self.faults.append(f"{fault}, case {case}: {error}")
        self.note(fault, "FAILED")

    def text(self) -> str:
        """Return the table, with what failed below it."""
        lines = []
        for fault, outcomes in self.rows.items():
            lines.append(f"{fault}: {outcomes['cases']} cases")
            lines += [f"  {number:6d}  {name}" for name, number in sorted(outcomes.items()) if name != "cases"]
        return "\n".join([*lines, f"{len(self.faults)} things lost or wrong", *self.faults[:50]])


@dataclass
class Bench:
    """Runs cases on copies of prepared folders."""

    root: Path
    seed: int
    table: Table = field(default_factory=Table)
    seconds: dict[str, float] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        """Return a new copy of the folder of a scenario."""
        base, copy = self.root / f"base-{name}", self.root / "case"
        if not base.exists():
            base.mkdir()
            self.finish(lambda report: SCENARIOS[name].prepare(base))
            for _ in range(2):  # the time of the second one counts
                self.folder(name)
                start = time.monotonic()
                self.operate(name, copy)
                self.seconds[name] = time.monotonic() - start
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base, copy)
        return copy

    def finish(self, work: Callable[[Callable[[str], None]], None]) -> list[str]:
        """Run work in a process, which must succeed; return what it reported."""
        reported, end = Child.start(work).wait()
        if end != "done":
            raise Fault(f"another run: {end or 'ended by a signal'}")
        return reported

    def operate(self, name: str, folder: Path) -> None:
        """Run an operation to its end."""
        self.finish(lambda report: SCENARIOS[name].operate(folder, LocalStore(archive(folder)), report))

    def case(self, fault: str, name: str, number: int, work: Callable[[Path, Any], tuple[list[str], str]]) -> None:
        """Run a case: the fault, a look at what is readable, another run, another look."""
        rng = np.random.default_rng([self.seed, number])
        folder = self.folder(name)
        self.table.note(fault, "cases")
        try:
            reported, end = work(folder, rng)
            if end.startswith("untyped") or not end:
                raise Fault(f"ended by {end[:3000] or 'a signal'}")
            self.table.note(fault, f"run: {end.partition(' ')[0].replace('done', 'finished')}")
            finished = FINISHED[name] if end == "done" else reported
            self.table.note(fault, f"then: {SCENARIOS[name].check(folder, finished)}")
            self.operate(name, folder)
            state = SCENARIOS[name].check(folder, FINISHED[name])
            self.table.note(fault, "another run: everything new")
            left = [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".replaced"))]
            self.table.note(fault, *(["left: temporary files"] if left else []))
            if "old" in state or "mixed" in state:
                raise Fault(f"after another run: {state}")
        except Exception as error:
            text = error if isinstance(error, Fault) else "".join(traceback.format_exception(error))
            self.table.fail(fault, number, str(text))


def kill(bench: Bench, name: str, number: int) -> None:
    """Kill an operation at a random moment."""

    def work(folder: Path, rng: Any) -> tuple[list[str], str]:
        child = Child.start(lambda report: SCENARIOS[name].operate(folder, LocalStore(archive(folder)), report))
        return child.wait(float(rng.uniform(0, 1.05)) * bench.seconds[name])

    bench.case(f"kill-{name}", name, number, work)


def full(bench: Bench, name: str, number: int) -> None:
    """Let the disk be full from a random write on."""

    def work(folder: Path, rng: Any) -> tuple[list[str], str]:
        after = int(rng.integers(0, {"store": 25, "ingest": 90}.get(name, 30)))

        def fail(report: Callable[[str], None]) -> None:
            store: Any = LocalStore(archive(folder))
            if SCENARIOS[name].on_files:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << int(rng.integers(6, 18)),) * 2)
            else:
                store = FaultyStore(store, "full", after)
            SCENARIOS[name].operate(folder, store, report)

        return Child.start(fail).wait()

    bench.case(f"full-{name}", name, number, work)


def lost(bench: Bench, name: str, number: int) -> None:
    """Lose the answers of some writes that arrive."""

    def work(folder: Path, rng: Any) -> tuple[list[str], str]:
        store = FaultyStore(LocalStore(archive(folder)), "lost", int(rng.integers(0, 30)))
        return Child.start(lambda report: SCENARIOS[name].operate(folder, store, report)).wait()

    bench.case(f"lost-{name}", name, number, work)


def two_writers(bench: Bench, number: int) -> None:
    """Write the index of an array from two processes at once."""

    def work(folder: Path, rng: Any) -> tuple[list[str], str]:
        delay = float(rng.uniform(0, 1.2)) * bench.seconds["consolidate_labels"] * float(rng.integers(2))

        def late(report: Callable[[str], None]) -> None:
            time.sleep(delay)
            consolidate_labels(LocalStore(archive(folder)), "image")
            report("index")

        children = [Child.start(late)]
        children.append(Child.start(lambda report: _operate_index(folder, LocalStore(archive(folder)), report)))
        ends = [child.wait() for child in children]
        for _, end in ends:
            bench.table.note("two-writers", f"a writer: {end.partition(' ')[0].replace('done', 'finished')}")
            if end != "done" and not end.startswith("typed"):
                return [], end
        reported = [name for names, _ in ends for name in names]
        return reported, "done" if reported else ends[0][1]

    bench.case("two-writers", "consolidate_labels", number, work)


def short_reads(bench: Bench, number: int) -> None:
    """Read and query an archive through a store that returns a part of one value."""
    fault, rng = "short-reads", np.random.default_rng([bench.seed, number])
    folder = bench.folder("store")
    bench.table.note(fault, "cases")
    store = FaultyStore(LocalStore(archive(folder)), "short", int(rng.integers(1, 30)), number)
    operation = ("read", "query", "verify", "scan")[number % 4]
    text = QUERIES[number % len(QUERIES)]

    def run(store: Any) -> Any:
        if operation == "read":
            return open_archive(store, "image")[...]
        labels = open_labels(store, "image", scan=operation == "scan")
        return labels.where(text, verify="all" if operation == "verify" else "fetched").mask

    try:
        answer = run(store)
    except (DeepSICError, OSError) as error:
        bench.table.note(fault, f"{operation}: {type(error).__name__}")
    except Exception as error:
        bench.table.fail(fault, number, "".join(traceback.format_exception(error)))
    else:
        bench.table.note(fault, f"{operation}: right")
        if not np.array_equal(answer, run(LocalStore(archive(folder)))):
            bench.table.fail(fault, number, f"{operation}: another answer than without the fault")


@contextmanager
def clock(delta: timedelta) -> Iterator[None]:
    """Let the clock of the writer of indexes be wrong."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + delta

    original = index_writer.datetime
    index_writer.datetime = Clock  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        index_writer.datetime = original  # type: ignore[misc]


def clock_skew(bench: Bench, number: int) -> None:
    """Store, index and relabel with a clock that jumps, among files of other years."""

    def work(folder: Path, rng: Any) -> tuple[list[str], str]:
        days = [float(day) for day in rng.uniform(-365 * YEARS, 365 * YEARS, 4)]

        def jump(report: Callable[[str], None]) -> None:
            for day, operate in zip(
                days, (_operate_index, _operate_store, _operate_index, _operate_index), strict=True
            ):
                held = None
                with suppress(DeepSICError):
                    held = open_labels(archive(folder), "image")
                before = None if held is None else [held.where(text).mask for text in QUERIES]
                for path in archive(folder).rglob("*"):
                    if rng.random() < 0.3:
                        moment = (datetime.now(UTC) + timedelta(days=float(rng.uniform(-3650, 3650)))).timestamp()
                        os.utime(path, (moment, moment))
                with clock(timedelta(days=day)):
                    operate(folder, LocalStore(archive(folder)), lambda name: None)
                if held is not None:  # opened before: the same answers, or an error that says so
                    with suppress(StaleIndex):
                        after = [held.where(text).mask for text in QUERIES]
                        assert all(map(np.array_equal, before or [], after)), "open labels changed their answer"
            report("image")
            report("index")

        return Child.start(jump).wait()

    bench.case("clock-skew", "store", number, work)


def warm_up(folder: Path) -> None:
    """Run every operation once, so that what it needs is in memory when children are forked."""
    import dask.threaded

    for name, scenario in SCENARIOS.items():
        (folder / name).mkdir(parents=True)
        scenario.prepare(folder / name)
        if name == "consolidate_labels" and not check_array(folder / name, ["image"]).startswith("new, index old"):
            raise Fault("queries do not tell the pictures apart")
        scenario.operate(folder / name, LocalStore(archive(folder / name)), lambda name: None)
        scenario.check(folder / name, FINISHED[name])
    dask.threaded.pools.clear()  # a child has none of the threads
    dask.threaded.default_pool = None


def faults() -> dict[str, Callable[[Bench, int], None]]:
    """Return all faults by name."""
    table: dict[str, Callable[[Bench, int], None]] = {}
    for name, scenario in SCENARIOS.items():
        table[f"kill-{name}"] = lambda bench, number, name=name: kill(bench, name, number)
        table[f"full-{name}"] = lambda bench, number, name=name: full(bench, name, number)
        if not scenario.on_files:
            table[f"lost-{name}"] = lambda bench, number, name=name: lost(bench, name, number)
    return table | {"two-writers": two_writers, "short-reads": short_reads, "clock-skew": clock_skew}


def run(names: Sequence[str], count: int, seed: int, root: Path, say: Callable[[str], None] = print) -> Table:
    """Run cases of some faults; the folder has the model, too."""
    bench = Bench(root, seed)
    with config.set(threads=1, model_path=root):
        tiny_model(root)
        warm_up(root / "warm-up")
        for name in names:
            start = time.monotonic()
            for number in range(count):
                faults()[name](bench, number)
            say(f"{name}: {count} cases in {time.monotonic() - start:.0f} s, {len(bench.table.faults)} failed")
    return bench.table


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", nargs="*", choices=[*faults(), []], help="what goes wrong (default: everything)")
    parser.add_argument("--count", type=int, default=100, help="cases of each fault (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        table = run(args.fault or list(faults()), args.count, args.seed, Path(root))
    print(table.text())
    return 1 if table.faults else 0


if __name__ == "__main__":
    sys.exit(main())
