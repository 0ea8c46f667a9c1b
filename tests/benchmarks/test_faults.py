"""The run of faults itself: each kind once, and that it notices what is lost or wrong."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from zarr.storage import LocalStore

from benchmarks import faults
from benchmarks.fuzz import tiny_model
from deepsic_codec import config, consolidate_labels, open_archive
from tests.common import ROOT

pytest.importorskip("dask.array")
pytest.importorskip("tifffile")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits sizes of files")


@pytest.fixture(scope="module", autouse=True)
def command():
    """The command, beside the other tests."""
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.faults", "--count", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield run
    run.kill()
    run.communicate()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with config.set(model_path=folder):
        tiny_model(folder)
    return folder


@pytest.fixture
def folder(models, tmp_path):
    """A folder with the new picture over the old one, whose index stayed."""
    with config.set(model_path=models):
        faults.prepare_rewritten(tmp_path)
        yield tmp_path


def fails(words, call, *args):
    with pytest.raises(faults.Fault, match=words):
        call(*args)


def test_what_is_lost_or_wrong_is_noticed(folder, monkeypatch):
    path = faults.archive(folder)
    assert faults.check_array(folder, ["image"]) == "new, index old, not compared"
    fails("stale", faults.check_array, folder, ["image", "index"])
    consolidate_labels(path, "image")
    assert faults.check_array(folder, ["image", "index"]) == "new, index right"
    array = open_archive(path, "image", mode="r+")
    array[:64, :64] = faults.OLD[:64, :64]
    assert faults.check_array(folder, []).startswith("mixed")
    fails("lost: .*old", faults.check_array, folder, ["image"])
    array[:1, :1] += np.uint8(1)
    fails("wrong pixels", faults.check_array, folder, [])
    array[...] = faults.NEW
    shutil.rmtree(path / "image_labels")
    assert faults.check_array(folder, ["image"]) == "new, LabelIndexError of the index"
    fails("lost: .*no label index", faults.check_array, folder, ["index"])


def test_faulty_stores(folder):
    path = faults.archive(folder)
    for fault, error in (("full", OSError), ("lost", ConnectionResetError)):
        with pytest.raises(error, match="No space left|reset by peer"):
            consolidate_labels(faults.FaultyStore(LocalStore(path), fault, 5), "image")
    reads = [faults.FaultyStore(LocalStore(path), "short", after, 1) for after in range(1, 8)]
    outcomes = set()
    for store in reads:
        try:
            outcomes.add(np.array_equal(open_archive(store, "image")[...], faults.NEW))
        except (OSError, ValueError) as error:
            outcomes.add(type(error).__name__)
    assert len(outcomes) > 1 and False not in outcomes, outcomes


def test_an_operation_that_hangs_is_noticed(monkeypatch):
    monkeypatch.setattr(faults, "LIMIT", 0.05)
    assert faults.Child.start(lambda report: time.sleep(60)).wait() == ([], "untyped: no end within 0.05 s")
    assert faults.Child.start(lambda report: time.sleep(60)).wait(0.05) == ([], "killed")


def test_each_kind_once(command):
    printed, _ = command.communicate(timeout=600)
    assert command.returncode == 0, printed[-3000:]
    assert printed.count(": 1 cases\n") == len(faults.faults()) and "0 things lost or wrong" in printed


def test_the_table(tmp_path):
    table = faults.Table()
    bench = faults.Bench(Path(tmp_path), 0, table)
    table.note("kill-store", "cases", "run: killed")
    table.fail("kill-store", 0, "lost")
    assert "1  FAILED" in bench.table.text() and "kill-store, case 0: lost" in table.text()
