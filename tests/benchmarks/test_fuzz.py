"""The fuzzer itself: a short run of every stage, and that it stops at what is wrong."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from benchmarks import fuzz
from deepsic_codec import config
from deepsic_codec.errors import CorruptPayload
from deepsic_codec.payload import header as h
from tests.common import ROOT

CASES = {
    "bytes": 400,
    "header": 300,
    "labels": 300,
    "section": 40,
    "coder": 150,
    "parts": 60,
    "zarr": 15,
    "shard": 15,
    "model": 25,
}


@pytest.fixture(scope="module", autouse=True)
def bounds_checked(tmp_path_factory):
    """The run under bounds checking, which compiles all kernels anew: beside the other tests, which use one core."""
    stages = [text for stage in ("coder", "parts", "section") for text in ("--stage", stage)]
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.fuzz", "--count", "300", *stages],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("kernels"))},
    )
    yield run
    run.kill()
    run.communicate()


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
    assert len(counts) > 1 or name == "model", f"only {counts}: the cases do not reach the reader"
    assert f"{name}: {CASES[name]} cases" in fuzzer.report()


def test_a_damaged_payload_that_is_decoded_stops_the_run(fuzzer, monkeypatch):
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


def test_other_errors_and_slow_cases_stop_the_run(fuzzer, monkeypatch):
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


def test_kernels_under_bounds_checking(bounds_checked):
    """Numba checks no index unless told to: mutated streams, mask and residual sections, with checks compiled in."""
    printed, _ = bounds_checked.communicate(timeout=600)
    assert bounds_checked.returncode == 0, printed[-3000:]
    assert "300 cases in" in printed
