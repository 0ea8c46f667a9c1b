import importlib.util
import sys

import hypothesis
import pytest

from deepsic_codec import config
from deepsic_codec.codec import batching
from tests import stub_runtime

# A busy machine is no failure: nothing here is about time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

if importlib.util.find_spec("torch") is None:
    # A read that fails leaves those of other chunks in flight, past the end of its test. There they would import the
    # model itself, and an import that fails takes the next test's stand-in out of sys.modules.
    stub_runtime.install()


@pytest.fixture
def stub(monkeypatch):
    """The lossless stand-in for the model, empty of what earlier tests did."""
    for name, module in stub_runtime.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(stub_runtime, "RUNTIME", stub_runtime.Scheduler())
    yield stub_runtime.RUNTIME
    # A read that failed leaves the chunks beside it in flight. They have to end with this model.
    for batcher in list(batching._batchers):
        with batcher._finished:
            batcher._finished.wait_for(lambda batcher=batcher: not batcher._busy, 10)


@pytest.fixture(autouse=True)
def settings():
    """Settings that a test changes are those of before afterwards."""
    with config.set():
        yield
