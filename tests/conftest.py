import sys

import hypothesis
import pytest

from tests import stub_runtime

# A busy machine is no failure: nothing here is about time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def stub(monkeypatch):
    """The lossless stand-in for the model, empty of what earlier tests did."""
    for name, module in stub_runtime.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(stub_runtime, "RUNTIME", stub_runtime.Runtime())
    return stub_runtime.RUNTIME
