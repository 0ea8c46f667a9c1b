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
    assert (name, with_numba) == ("generic", "False") and int(error) < 20
    assert printed("none") == ["None", "True", error, digest]


@pytest.mark.parametrize("damage", ["sources", "text", "description"])
def test_another_file_is_not_used(folder, tmp_path, damage):
    path = tmp_path / f"generic{library.SUFFIX}"
    data = (folder / path.name).read_bytes()
    edited = {
        "sources": data.replace(library.sources().encode(), b"0" * 64),
        "text": b"no library",
        "description": data.replace(b'{"sources"', b'["sources"'),
    }[damage]
    assert edited != data
    path.write_bytes(edited)
    assert printed(tmp_path)[0] == "None"


@pytest.fixture(scope="module")
def split(folder):
    loaded = library.Library(folder / f"generic{library.SUFFIX}")

    def _split(plane, rows, lower, levels, largest): ...

    _split.__module__, _split.__qualname__ = "deepsic_codec.payload.coders.wavelet", "_split"
    return loaded.kernel(_split)


def test_arrays_of_a_subclass_are_taken_as_others(split, tmp_path):
    plane = np.arange(320, dtype=np.int32).reshape(20, 16)
    mapped = np.memmap(tmp_path / "plane", np.int32, "w+", shape=plane.shape)
    mapped[...] = plane
    for one in (plane, mapped):
        split(one, np.empty((8, 112), np.int32), np.empty((10, 16), np.int32), 1, 320)
    assert (mapped == plane).all() and plane[0, 0] != 0


def test_arguments_that_it_is_not_compiled_for_are_refused(split):
    plane = np.zeros((20, 16), np.int32)
    rows, lower = np.empty((8, 112), np.int32), np.empty((10, 16), np.int32)
    assert split(plane, rows, lower, 1, 0) == 0
    wrong = [
        (plane.astype(np.int64), rows, lower, 1, 0),
        (plane.astype(">i4"), rows, lower, 1, 0),
        (plane[0], rows, lower, 1, 0),
        (plane, rows[:, ::2], lower, 1, 0),
        (plane, rows.T, lower, 1, 0),
        (plane, rows, lower, 1),
        (plane, rows, lower, 1, 0, 0),
        (plane, rows, None, 1, 0),
        (plane, rows, plane.tobytes(), 1, 0),
    ]
    for arguments in wrong:
        with pytest.raises(TypeError, match="_split is not compiled for"):
            split(*arguments)


def words(argument, value):
    packed = library.Packer([argument])((value,))
    return packed and list(np.frombuffer(packed, np.int64)[2:])


def test_words_of_arguments():
    array = np.zeros((3, 4), np.int16)
    assert words("int16[2C]", array) == [id(array)]
    assert words("int64", -3) == words("int64", np.int16(-3)) == [-3]
    assert words("bool", True) == words("bool", np.True_) == [1]
    assert words("none", None) == []
    assert words(["", "int64", ["", "none", "bool"]], (7, (None, False))) == [7, 0]
    for argument, value in (("int64", True), ("int64", 1.0), ("int64", 1 << 63), ("bool", 1), ("none", 0)):
        assert words(argument, value) is None
    for value in ((1,), (1, 2, 3), (1, None), 1):
        assert words(["", "int64", "int64"], value) is None


def test_a_constant_is_looked_up_once():
    values = [np.arange(3.0), 5]
    constant, packer = library.Constant(tuple(values)), library.Packer([["", "float64[1C]", "int64"]])
    assert packer((constant,)) == packer((tuple(values),))
    constant._values = None
    assert packer((constant,)) == packer((tuple(values),))
    constant = library.Constant(tuple(values))
    assert constant[1] == len(constant) + 3 == 5
    assert library.Packer([["", "int64"]])((constant,)) is None


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


def test_without_a_compiler_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(RuntimeError, match="no C compiler no-such-compiler"):
        build.build("generic", tmp_path / "libraries")
    assert not (tmp_path / "libraries").exists()
