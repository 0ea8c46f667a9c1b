"""Freed memory that processes of Dask keep between the layers of a network."""

import subprocess
import sys

import pytest

from deepsic_codec.model import threads

# Page faults of allocating and freeing what a layer of a network does, after the first time.
CODE = """
import resource
from deepsic_codec.model.threads import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        np.ones(1 << 18, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(keep):
    environment = {"MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again():
    before = faults(keep=False)
    if before < 50 * 200:
        pytest.skip("this C library keeps it anyway")
    assert faults(keep=True) < before / 20


@pytest.mark.parametrize(
    "environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "1", "MALLOC_MMAP_THRESHOLD_": "1"}], ids=["glibc's own", "user's"]
)
def test_other_environments_change_nothing(monkeypatch, environment):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda name: pytest.fail("asked the C library"))
    assert not threads.keep_freed_memory()


def test_a_model_on_a_cpu_keeps_freed_memory(monkeypatch):
    from deepsic_codec.model.cpu import scheduler
    from deepsic_codec.model.zoo import find_model

    asked = []
    monkeypatch.setattr(scheduler, "keep_freed_memory", lambda: asked.append(True))
    scheduler.CpuScheduler(find_model("base"))
    assert asked
