"""Innermost loops are compiled without counting references to arrays, and kept where that is possible."""

import importlib.util
import pickle
import sys

import numba
import numpy as np
import pytest
from numba.core import caching

from deepsic_codec.kernels import numba_jit
from tests.common import run_python


def total(values):
    result = 0
    for row in range(len(values)):
        part = values[row]  # would be counted
        for i in range(len(part)):
            result += part[i]
    return result


def test_nothing_is_counted():
    """The code is compiled here: what comes from a cache cannot be inspected."""
    codes = []
    for options in (numba_jit._options(), {"nogil": True}):
        compiled = numba.njit(**options)(total)
        assert compiled(np.ones((2, 3), np.int64)) == 6
        codes += compiled.inspect_llvm().values()
    assert ["NRT_" in code for code in codes] == [False, True]
    assert numba_jit.jit(total)(np.ones((2, 3), np.int64)) == 6


def test_without_the_option_all_is_compiled_as_usual(monkeypatch):
    assert numba_jit._options()["_nrt"] is False
    monkeypatch.setitem(sys.modules, "numba.core.cpu", None)
    assert "_nrt" not in numba_jit._options()


MODULE = """
import numpy as np
from deepsic_codec.kernels.numba_jit import jit

@jit
def doubled(value):
    return 2 * value
"""


def doubled(path, name):
    """Import the module anew, as another process would, and call its function: the result, and whether it was kept."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.doubled(21)
    return result, sum(module.doubled.stats.cache_hits.values()) == 1


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module with a compiled function, and the folder of its cache."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "kernels.py").write_text(MODULE)
    return tmp_path / "kernels.py", tmp_path / "cache"


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_damaged_files_of_the_cache_are_replaced(module, suffix, damage):
    path, cache = module
    assert doubled(path, "a") == (42, False) and doubled(path, "a") == (42, True)
    (file,) = cache.rglob(f"*.{suffix}")
    data = bytearray(file.read_bytes())
    data[-len(data) // 3] ^= 4
    cases = {"empty": b"", "cut": data[: len(data) // 2], "flipped": data, "foreign": pickle.dumps(["x"])}
    file.write_bytes(bytes(cases[damage]))
    assert doubled(path, "a") == (42, False)
    assert doubled(path, "a") == (42, True)


def test_what_is_kept_runs_without_what_compiling_needs(module):
    path, cache = module
    code = """
        import sys
        from kernels import doubled
        print(doubled(21), doubled.stats.cache_hits.total(), "numba.np.arraymath" in sys.modules)
    """
    printed = [run_python(code, path.parent, NUMBA_CACHE_DIR=str(cache)).split() for _ in range(2)]
    assert printed == [["42", "0", "True"], ["42", "1", "False"]]


def test_without_a_folder_functions_are_compiled_with_one_warning(module, monkeypatch, tmp_path):
    path, cache = module
    cache.touch()  # a file, in which no folder can be made
    beside = getattr(caching, "InTreeCacheLocator", None) or caching._InTreeCacheLocator  # older numba
    monkeypatch.setattr(beside, "from_function", lambda *arguments: None)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no home
    monkeypatch.setattr(numba_jit, "_classes", [])
    monkeypatch.setattr(numba_jit, "_warned", [])
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR") as warned:
        assert doubled(path, "a") == doubled(path, "b") == (42, False)
    assert len(warned) == 1
    assert {file.name for file in tmp_path.iterdir()} - {"__pycache__"} == {"kernels.py", "cache"}


def test_a_cache_that_cannot_be_written_is_no_error(module, monkeypatch):
    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    assert doubled(module[0], "a") == (42, False)


def test_indices_are_checked_where_numba_is_told_to(tmp_path):
    """`.ci/run` runs the tests so."""
    code = """
        import numpy as np
        from deepsic_codec.kernels.numba_jit import inner, jit

        @inner
        def element(values, position):
            return values[position]

        @jit
        def read(values, position):
            return element(values, position)

        values = np.arange(3.0)
        assert read(values, 2) == 2
        try:
            read(values, 3)
        except IndexError:
            print("refused")
        """
    assert run_python(code, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path)) == "refused\n"
