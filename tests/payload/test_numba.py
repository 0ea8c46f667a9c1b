"""Innermost loops are compiled without counting references to arrays."""

import sys

import numpy as np

from deepsic_codec.payload.coders import numba_jit


def test_nothing_is_counted():
    @numba_jit.jit
    def total(values):
        found = 0
        for row in range(len(values)):
            own = values[row]  # would be counted
            for i in range(len(own)):
                found += own[i]
        return found

    assert total.py_func(np.ones((2, 3), np.int64)) == total(np.ones((2, 3), np.int64)) == 6
    assert "NRT_" not in next(iter(total.inspect_llvm().values()))


def test_without_the_option_all_is_compiled_as_usual(monkeypatch):
    assert numba_jit._options()["_nrt"] is False
    monkeypatch.setitem(sys.modules, "numba.core.cpu", None)
    assert numba_jit._options() == {"nogil": True, "cache": True}
