import importlib
import importlib.util
import os
import sys

# Several processes of tests share the cores. Threads of OpenMP that wait for one another then take the time of those
# that work: the same operations of torch took eight times as long. Both are read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest

from deepsic_codec import config
from deepsic_codec.codec import chunk, encode
from tests import stub_runtime

# A busy machine is no failure: nothing here is about time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A read that fails leaves those of other chunks in flight, past the end of its test. They use the model itself then. If
# they had to import it, the stand-ins of the next test would get between its modules.
importlib.import_module("deepsic_codec.model.scheduler")
importlib.import_module("deepsic_codec.model.cpu.scheduler")
if importlib.util.find_spec("torch") is not None:
    importlib.import_module("deepsic_codec.model.torch_scheduler")


@pytest.fixture
def stub(monkeypatch):
    """The lossless stand-in for the model, empty of what earlier tests did."""
    for name, module in stub_runtime.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(stub_runtime, "RUNTIME", stub_runtime.Scheduler())
    monkeypatch.setattr(chunk, "transform_of", stub_runtime.transform_of)
    monkeypatch.setattr(encode, "_without_loss", stub_runtime.without_loss)
    return stub_runtime.RUNTIME


@pytest.fixture(autouse=True)
def settings():
    """Settings that a test changes are those of before afterwards."""
    with config.set():
        yield
