"""Functions of a library that was compiled when the package was built (`deepsic_codec.kernels.build`).

A library holds all compiled functions for one kind of CPU, named by `VARIANTS`. It depends neither on numba nor on the
version of Python. Each function takes words of 64 bits, which say where its arguments are, and the library has a
description of the arguments that it accepts.
"""

import ctypes
import json
import os
import platform
import struct
import sys
from collections.abc import Callable
from functools import update_wrapper
from hashlib import sha256
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

#: Bytes of what every object of Python begins with; its type comes last in them.
HEADER = object.__basicsize__
#: What a compiled function returns if its arguments are not those that it was compiled for, and if it failed.
REFUSED, FAILED = -(1 << 63), 1 - (1 << 63)
#: Folder of the libraries.
FOLDER = Path(__file__).parent / "libraries"
#: Names of libraries by instruction set of the CPU, best first, with the features of the CPU, as NumPy names them, that
#: each needs.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512vnni": ("AVX512F", "AVX512CD", "AVX512_SKX", "AVX512_CLX"),
        "avx2": ("AVX2", "FMA3", "F16C"),
        "generic": (),
    },
    "aarch64": {"generic": ()},
}
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
#: Symbol of the description in a library.
DESCRIPTION = "deepsic_kernels"


def machine() -> str:
    """Return the name of this kind of CPU, a key of `VARIANTS`."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def fitting_variants() -> list[str]:
    """Return the names of the libraries that this CPU can run, best first."""
    core: Any = getattr(np, "_core", None) or np.core  # type: ignore[attr-defined]
    features = getattr(core._multiarray_umath, "__cpu_features__", {})
    variants = VARIANTS.get(machine(), {})
    return [name for name, needed in variants.items() if all(features.get(feature) for feature in needed)]


def sources() -> str:
    """Return the hash of all that a library is made from."""
    root = Path(__file__).parents[1]
    folders = ("kernels", "model/cpu", "payload/coders")
    paths = [path for folder in folders for path in (root / folder).glob("*.py")]
    paths += [root / "kernels" / "signatures.json"]
    loops = "jacobi", "spectral_rows", "wavelet_filter", "wavelet_rate"
    paths += [root / "codec" / f"{name}.py" for name in loops] + [root / "labels" / "vectors.py"]
    digest = sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def load() -> "Library | None":
    """Return the best library for this CPU, or None if there is none that was made from these sources.

    The environment variable `DEEPSIC_KERNEL_LIBRARIES` is a folder of other libraries, or `none`.
    """
    setting = os.environ.get("DEEPSIC_KERNEL_LIBRARIES", "")
    if setting == "none" or os.environ.get("NUMBA_BOUNDSCHECK") == "1" or not arrays_are_as_expected():
        return None
    folder = Path(setting) if setting else FOLDER
    for name in fitting_variants():
        path = folder / f"{name}{SUFFIX}"
        if path.exists():
            try:
                library = Library(path)
            except (OSError, AttributeError, KeyError, TypeError, ValueError):  # of another system, or damaged
                continue
            return library if library.sources == sources() else None
    return None


class Library:
    """A library of compiled functions.

    Raises
    ------
    OSError
        If the system cannot load it.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        text = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self._library, DESCRIPTION)))
        description = json.loads(text)
        self.name, self.sources, self.tile = path.stem, description["sources"], description["tile"]
        self._kernels: dict[str, list[dict[str, Any]]] = description["kernels"]

    def kernel(self, function: Callable[..., Any]) -> "Kernel":
        """Return the compiled form of a function."""
        overloads = []
        for one in self._kernels.get(f"{function.__module__}.{function.__qualname__}", []):
            entry = getattr(self._library, one["symbol"])
            entry.argtypes, entry.restype = [ctypes.c_char_p], ctypes.c_int64
            overloads.append((entry, Packer(one["arguments"]), one["returns"]))
        return Kernel(function, overloads)


class Kernel:
    """A compiled function.

    Raises
    ------
    TypeError
        When called with arguments that it was not compiled for.
    """

    def __init__(self, function: Callable[..., Any], overloads: list[tuple[Any, "Packer", str]]) -> None:
        update_wrapper(self, function)
        self.py_func, self._overloads = function, overloads

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        result = self._call(arguments)
        if result == REFUSED:
            result = self._call(_plain(arguments))
        if result == REFUSED:
            kinds = ", ".join(map(_kind, arguments))
            raise TypeError(f"{self.py_func.__qualname__} is not compiled for ({kinds})")
        if result == FAILED:
            raise RuntimeError(f"{self.py_func.__qualname__} failed")
        return result

    def _call(self, arguments: tuple[Any, ...]) -> Any:
        """Return the result, `FAILED`, or `REFUSED`."""
        for entry, packer, returns in self._overloads:
            words = packer(arguments)
            if words is None:
                continue
            result = entry(words)
            if result != REFUSED:
                if result == FAILED or returns == "int64":
                    return result
                return None if returns == "none" else result != 0
        return REFUSED


class Constant:
    """A tuple for compiled functions that many calls share: what says where its parts are is made once."""

    def __init__(self, values: Any) -> None:
        self._values, self._words = values, {}  # type: Any, dict[Any, tuple[int, ...]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._values, name)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)

    def words(self, of_tuple: Callable[[Any], tuple[int, ...]]) -> tuple[int, ...]:
        """Return the words of the tuple, as a function gives them for an argument of one kind."""
        known = self._words.get(of_tuple)
        if known is None:
            known = self._words[of_tuple] = of_tuple(self._values)
        return known


class Packer:
    """Turns arguments into the words that a compiled function reads, or None if their number or kinds do not fit.

    An array becomes the address of its object: the function itself compares its type with what it was compiled for. A
    tuple becomes the words of its parts, None none.
    """

    def __init__(self, arguments: list[Any]) -> None:
        self._words = _words_of(arguments)
        self._pack = struct.Struct(f"{2 + _count(arguments)}q").pack

    def __call__(self, arguments: tuple[Any, ...]) -> bytes | None:
        """Return the words, behind those that say how objects lie in memory."""
        try:
            return self._pack(HEADER, id(np.ndarray), *self._words(arguments))
        except (TypeError, ValueError, struct.error):
            return None


def _count(arguments: list[Any]) -> int:
    """Return the number of words of arguments, or of the parts of a tuple."""
    return sum(_count(one[1:]) if isinstance(one, list) else one != "none" for one in arguments)


def _words_of(arguments: list[Any]) -> Callable[[Any], tuple[int, ...]]:
    """Return a function that returns the words of a tuple of arguments; it raises ValueError if they do not fit."""
    makers: list[tuple[bool, Callable[[Any], Any]]] = []  # whether it returns one word, or a tuple of words
    for one in arguments:
        if isinstance(one, list):
            makers.append((False, _of_tuple(_words_of(one[1:]))))
        elif one == "none":
            makers.append((False, _nothing))
        else:
            makers.append((True, id if "[" in one else _boolean if one == "bool" else _integer))

    def words(values: Any) -> tuple[int, ...]:
        result: list[int] = []
        for (single, make), value in zip(makers, values, strict=True):
            if single:
                result.append(make(value))
            else:
                result += make(value)
        return tuple(result)

    return words


def _of_tuple(words: Callable[[Any], tuple[int, ...]]) -> Callable[[Any], tuple[int, ...]]:
    return lambda values: values.words(words) if type(values) is Constant else words(values)


def _wrong() -> Any:
    raise ValueError


def _integer(value: Any) -> Any:
    return value if type(value) is int else index(value) if type(value) is not bool else _wrong()


def _boolean(value: Any) -> int:
    return int(value) if type(value) is bool or isinstance(value, np.bool_) else _wrong()


def _nothing(value: Any) -> tuple[int, ...]:
    return () if value is None else _wrong()


def _plain(value: Any) -> Any:
    """Return arguments whose arrays are of NumPy's own class, and of the usual one of equal types such as C's longs."""
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray).view(np.dtype(value.dtype.str))
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        order = "" if value.flags.c_contiguous else ", strided"
        return f"{value.dtype}[{value.ndim}{order}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__


def arrays_are_as_expected() -> bool:
    """Return whether arrays lie in memory as compiled functions read them; see `build.ARRAY`."""
    if sys.implementation.name != "cpython":
        return False
    array = np.zeros((5, 7), np.int16)[:, ::2]
    words = ctypes.cast(id(array) + HEADER, ctypes.POINTER(ctypes.c_int64))
    dimensions, strides = (ctypes.cast(words[i], ctypes.POINTER(ctypes.c_int64)) for i in (2, 3))
    of_dtype = ctypes.cast(id(array.dtype) + HEADER, ctypes.POINTER(ctypes.c_int64))
    actual = (
        *(words[-1], words[0], words[1] & 0xFFFFFFFF, dimensions[:2], strides[:2], words[5], words[6] & 0x101),
        of_dtype[1] >> 32,
    )
    expected = (
        *(id(np.ndarray), array.ctypes.data, 2, [*array.shape], [*array.strides], id(array.dtype), 0x100),
        array.dtype.num,
    )
    return actual == expected
