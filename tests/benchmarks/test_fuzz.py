"""The fuzzer itself: a short run of every stage, the corpus, and that it keeps what is wrong.

In `.ci/run`, compiled code checks every index here, as in all tests of that step.
"""

import asyncio
import json
import threading
from collections import Counter

import numpy as np
import pytest
import zarr

from benchmarks import fuzz
from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload import header as h

CASES = {
    "bytes": 400,
    "header": 300,
    "labels": 300,
    "section": 40,
    "coder": 150,
    "parts": 60,
    "zarr": 15,
    "shard": 15,
    "metadata": 150,
    "index": 80,
    "model": 200,
    "expression": 500,
    "names": 300,
}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with config.set(max_pixels=fuzz.MAX_PIXELS, model_path=folder):
        yield fuzz.Fuzzer.make(folder)


@pytest.mark.parametrize("name", fuzz.STAGES)
def test_a_short_run(fuzzer, name):
    rng = np.random.default_rng(7)
    for _ in range(CASES[name]):
        fuzzer.step(name, fuzzer.stages[name].make(rng))
    counts = Counter()
    for (stage, text), count in fuzzer.outcomes.items():
        if stage == name:
            counts[text.partition(":")[0]] += count
    assert sum(counts.values()) == CASES[name]
    assert len(counts) > 1 or name in ("model", "names"), f"only {counts}: the cases do not reach the reader"
    assert f"{name}: {CASES[name]} cases" in fuzzer.report()


def test_a_damaged_payload_that_is_decoded_fails(fuzzer, monkeypatch):
    stage = fuzzer.stages["bytes"]
    case = bytearray(stage.sound()[0])
    case[-1] ^= 1
    with pytest.raises(CorruptPayload):
        stage.run(bytes(case))
    monkeypatch.setattr(h, "crc32c", lambda data: 0)
    monkeypatch.setattr(h, "crc32c_extend", lambda crc, data: 0)
    forged = fuzz.with_header_checksum(bytes(case[1:]))
    header = bytearray(forged)
    header[8:12] = bytes(4)
    table = fuzz.with_sections(bytes(header), h.read_header(bytes(header)), fuzz.sections_of(stage.seeds[0]))
    table = bytearray(table)
    table[8:12] = bytes(4)
    with pytest.raises((fuzz.Failure, CorruptPayload)):
        stage.run(bytes(case[:1]) + bytes(table))


def test_other_errors_and_slow_cases_fail(fuzzer, monkeypatch):
    stage = fuzzer.stages["labels"]
    case = stage.sound()[0]
    monkeypatch.setattr(stage, "run", lambda case: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuzzer.step("labels", case)
    monkeypatch.setattr(stage, "run", lambda case: sum(range(10_000_000)) and "decoded")
    monkeypatch.setitem(fuzzer.normal, "labels", 1e-6)
    monkeypatch.setattr(fuzz, "SLOW_SECONDS", 0.001)
    with pytest.raises(fuzz.Failure, match="times a sound case"):
        fuzzer.step("labels", case)


def test_mutations_change_everything_sometimes():
    rng = np.random.default_rng(0)
    data = bytes(range(100))
    found = [fuzz.mutate(rng, data, [b"other" * 20]) for _ in range(2000)]
    assert len({len(one) for one in found}) > 50 and len(set(found)) > 1500
    flipped = {i for one in found for i in range(min(len(one), 100)) if one[i] != data[i]}
    assert flipped == set(range(100))
    assert all(isinstance(one, bytes) for one in found) and fuzz.mutate(rng, b"") is not None


def test_repaired_payloads_are_sound(fuzzer):
    for seed in fuzzer.stages["bytes"].seeds:
        assert fuzz.with_header_checksum(seed.payload) == seed.payload
        assert fuzz.with_sections(seed.payload, seed.header, fuzz.sections_of(seed)) == seed.payload


def test_coroutines_run_in_this_thread():
    threads = []

    async def work():
        await asyncio.to_thread(lambda: threads.append(threading.get_ident()))
        return zarr.core.sync.sync(nested()) if len(threads) == 1 else len(threads)

    async def nested():
        threads.append(threading.get_ident())

    with fuzz.without_threads():
        assert zarr.core.array.sync(work()) is None  # within a coroutine, zarr's own thread runs another one
        with pytest.raises(ZeroDivisionError):
            zarr.core.array.sync(asyncio.to_thread(lambda: 1 / 0))
    assert threads[0] == threading.get_ident() != threads[1]
    zarr.core.array.sync(nested())
    assert threads[2] == threads[1]


def test_the_corpus(fuzzer):
    """Cases that failed once."""
    said = []
    run = fuzz.Run(fuzzer, fuzz.Progress(None, {}), said.append, fuzz.CORPUS)
    assert run.stored(list(fuzz.TARGETS)) == len(list(fuzz.CORPUS.iterdir())) > 0
    assert not said


def small_run(fuzzer, folder, count, said):
    """A run of the target `expression`, as the command does it."""
    progress = fuzz.Progress.open(str(folder / "progress.json"), {"seed": 3})
    run = fuzz.Run(fuzzer, progress, said.append, folder / "corpus")
    run.target("expression", 3, count, 0)
    return progress.of("expression")


def test_a_run_goes_on_where_it_stopped(fuzzer, tmp_path, monkeypatch):
    cases = []
    monkeypatch.setattr(fuzz.Fuzzer, "step", lambda self, name, case: setattr(self, "counted", self.counted + 1))
    make = fuzz.Expression.make
    monkeypatch.setattr(fuzz.Expression, "make", lambda self, rng: cases.append(make(self, rng)) or cases[-1])
    small_run(fuzzer, tmp_path, 20, [])
    state = small_run(fuzzer, tmp_path, 50, [])
    assert (state["next"], state["counted"], state["findings"]) == (50, 50, {})
    (tmp_path / "progress.json").unlink()
    assert small_run(fuzzer, tmp_path, 50, [])["counted"] == 50
    assert cases[:50] == cases[50:] and len({*cases[:50]}) > 40
    with pytest.raises(SystemExit, match="use another file"):
        fuzz.Progress.open(str(tmp_path / "progress.json"), {"seed": 4})


def test_a_case_that_fails_is_kept_once_for_each_place(fuzzer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(fuzzer.stages["expression"], "run", lambda case: 1 / (case[1] % 2) and "evaluated")
    state = small_run(fuzzer, tmp_path, 20, said)
    assert state["next"] > state["counted"] == 20
    ((place, name),) = state["findings"].items()
    assert place.startswith("ZeroDivisionError") and "ZeroDivisionError" in "".join(said)
    case = tmp_path / "corpus" / name
    assert case.read_bytes()[1] % 2 == 0
    monkeypatch.undo()
    assert fuzz.main(["--replay", str(case)]) == 0


def test_the_command(tmp_path, capsys):
    options = [
        "--corpus",
        str(tmp_path / "corpus"),
        "--resume",
        str(tmp_path / "a.json"),
        "--log",
        str(tmp_path / "log"),
    ]
    assert fuzz.main(["names", "expression", "--count", "30", *options]) == 0
    assert "expression: 30 cases past checksums of 30, 0 findings" in capsys.readouterr().out
    progress = json.loads((tmp_path / "a.json").read_text())
    progress["targets"]["names"]["findings"] = {"KeyError in x": "names-0.case"}
    (tmp_path / "a.json").write_text(json.dumps(progress))
    assert fuzz.main(["names", "--count", "30", *options]) == 1
    assert "KeyError in x: names-0.case" in (tmp_path / "log").read_text()
