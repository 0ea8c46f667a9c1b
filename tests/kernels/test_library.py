"""Functions of a library give what numba's give, refuse what they are not compiled for, and are used where they fit."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from deepsic_codec.kernels import build, library
from tests.common import run_python

NAMES = ("payload.coders.cells._code_cells", "payload.coders.wavelet._split", "payload.coders.wavelet._join")
CODE = """
    import hashlib, sys
    import numpy as np
    from deepsic_codec import kernels
    from deepsic_codec.payload.coders import cells, wavelet

    rng = np.random.default_rng(0)
    values = rng.integers(0, 128, (2, 9, 7)).repeat(3, 2).astype(np.uint8)
    coded = cells.encode_cells(values)
    plane = rng.integers(-9999, 9999, (61, 50)).astype(np.int32)
    bands = wavelet.forward(plane)
    assert (cells.decode_cells(coded, values.shape) == values).all()
    back = np.abs(wavelet.inverse(bands.copy()) - plane).max()
    print(kernels.LIBRARY and kernels.LIBRARY.name, "numba" in sys.modules, back,
          hashlib.sha256(coded + bands.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a library of three functions, compiled for any CPU of this machine's architecture."""
    if not shutil.which(os.environ.get("CC", "cc").split()[0]) or sys.platform == "win32":
        pytest.skip("no C compiler here")
    if "generic" not in build.host_variants():
        pytest.skip("no libraries for this architecture")
    path = tmp_path_factory.mktemp("libraries")
    everything = json.loads(build.SIGNATURES.read_text())
    chosen = {f"deepsic_codec.{name}": everything[f"deepsic_codec.{name}"] for name in NAMES}
    signatures = path / "signatures.json"
    signatures.write_text(json.dumps(chosen))
    build.build("generic", path, signatures)
    return path


def printed(folder):
    # A library is not used where indices are to be checked, as in `.ci/run tests`.
    return run_python(CODE, DEEPSIC_KERNEL_LIBRARIES=str(folder), NUMBA_BOUNDSCHECK="0").split()


def test_a_library_gives_what_numba_gives_without_it(folder):
    name, with_numba, error, digest = printed(folder)
    assert (name, with_numba) == ("generic", "False") and int(error) <= 2
    assert printed("none") == ["None", "True", error, digest]


@pytest.mark.parametrize("damage", ["sources", "cut", "text", "description"])
def test_another_file_is_not_used(folder, tmp_path, damage):
    path = tmp_path / f"generic{library.SUFFIX}"
    data = (folder / path.name).read_bytes()
    edited = {
        "sources": data.replace(library.sources().encode(), b"0" * 64),
        "cut": data[:1000],
        "text": b"no library",
        "description": data.replace(b'{"sources"', b'["sources"'),
    }[damage]
    assert edited != data
    path.write_bytes(edited)
    assert printed(tmp_path)[0] == "None"


@pytest.fixture(scope="module")
def split(folder):
    loaded = library.Library(folder / f"generic{library.SUFFIX}")

    def _split(out, part, turned): ...

    _split.__module__, _split.__qualname__ = "deepsic_codec.payload.coders.wavelet", "_split"
    return loaded.kernel(_split)


def test_arguments_that_it_is_not_compiled_for_are_refused(split):
    plane = np.zeros((20, 16), np.int32)
    part, turned = np.empty((20, 16), np.int32), np.empty((16, 20), np.int32)
    assert split(plane, part, turned) is None
    wrong = [
        (plane.astype(np.int64), part, turned),
        (plane.astype(">i4"), part, turned),
        (plane[0], part, turned),
        (plane, part[:, ::2], turned),
        (plane, part.T, turned),
        (plane, part),
        (plane, part, turned, 0),
        (plane, part, None),
        (plane, part, plane.tobytes()),
    ]
    for arguments in wrong:
        with pytest.raises(TypeError, match="_split is not compiled for"):
            split(*arguments)


def packed(argument, value):
    words = []
    return words if library._append(words, library._parsed(argument), value) else None


def test_words_of_arguments():
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert packed("int16[2C]", array) == [array.ctypes.data, 3, 4]
    assert packed("int16[2A]", array[:, ::2]) == [array.ctypes.data, 3, 2, 8, 4]
    array.flags.writeable = False
    assert packed("int16[2C]", array) == [array.ctypes.data, 3, 4]
    assert packed("uint8[1C]", np.empty(0, np.uint8))[1:] == [0]
    assert packed("int64", -3) == packed("int64", np.int16(-3)) == [-3]
    assert packed("bool", True) == packed("bool", np.True_) == [1]
    assert packed("float64", 1.0) == [0x3FF0 << 48]
    assert packed("none", None) == []
    assert packed(["", "int64", ["", "none", "bool"]], (7, (None, False))) == [7, 0]
    for argument, value in (("int64", True), ("int64", 1.0), ("bool", 1), ("none", 0), ("float64", 1)):
        assert packed(argument, value) is None
    for value in ((1,), (1, 2, 3), [1, 2], (1, None), 1):
        assert packed(["", "int64", "int64"], value) is None


def test_a_constant_is_looked_up_once(monkeypatch):
    calls = []
    found = library._address
    monkeypatch.setattr(library, "_address", lambda array: calls.append(array) or found(array))
    array = np.arange(3.0)
    constant, accepted = library.Constant((array, 5)), library._parsed(["", "float64[1C]", "int64"])
    for _ in range(3):
        words = []
        assert library._append(words, accepted, constant) and words == [array.ctypes.data, 3, 5]
    assert len(calls) == 1 and constant[1] == len(constant) + 3 == 5
    assert not library._append([], library._parsed(["", "int64"]), constant)


def test_types_survive_the_file():
    for overloads in json.loads(build.SIGNATURES.read_text()).values():
        for arguments in overloads:
            assert [build.described(build.parsed(one)) for one in arguments] == arguments


def test_every_function_that_python_calls_has_types():
    names = json.loads(build.SIGNATURES.read_text())
    code = f"""
        from importlib import import_module
        for name in {build.MODULES!r}:
            import_module("deepsic_codec." + name)
        from deepsic_codec.kernels.numba_jit import ENTRIES
        print(*ENTRIES)
    """
    entries = run_python(code, DEEPSIC_KERNEL_LIBRARIES="none").split()
    assert sorted(entries) == sorted(names)
    assert not [name for name, overloads in names.items() if not overloads]
