import sys

import pytest

from tests import stub_runtime


@pytest.fixture
def stub(monkeypatch):
    """The lossless stand-in for the model, empty of what earlier tests did."""
    for name, module in stub_runtime.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(stub_runtime, "RUNTIME", stub_runtime.Runtime())
    return stub_runtime.RUNTIME
