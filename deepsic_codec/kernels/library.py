"""Functions of a library that was compiled when the package was built (`deepsic_codec.kernels.build`).

A library holds all compiled functions for one kind of CPU, named by `VARIANTS`. It depends neither on numba nor on the
version of Python. Each function takes one array of 64-bit words, which say where its arguments are, and the library has
a description of the arguments that it accepts.
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
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

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

Words = list[int]


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
    paths += [root / name for name in ("codec/wavelet_rate.py", "labels/vectors.py", "kernels/signatures.json")]
    digest = sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def load() -> "Library | None":
    """Return the best library for this CPU, or None if there is none that was made from these sources.

    The environment variable `DEEPSIC_KERNEL_LIBRARIES` is a folder of other libraries, or `none`.
    """
    setting = os.environ.get("DEEPSIC_KERNEL_LIBRARIES", "")
    if setting == "none" or os.environ.get("NUMBA_BOUNDSCHECK") == "1":
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
            entry.argtypes, entry.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int32
            overloads.append((entry, tuple(_parsed(argument) for argument in one["arguments"]), one["returns"]))
        return Kernel(function, overloads)


class Kernel:
    """A compiled function.

    Raises
    ------
    TypeError
        When called with arguments that it was not compiled for.
    """

    def __init__(self, function: Callable[..., Any], overloads: list[tuple[Any, tuple[Any, ...], str]]) -> None:
        update_wrapper(self, function)
        self.py_func, self._overloads = function, overloads

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        for entry, accepted, returns in self._overloads:
            words: Words = []
            if len(accepted) != len(arguments) or not all(map(_append, repeat(words), accepted, arguments)):
                continue
            words.append(0)  # the result
            block = (ctypes.c_int64 * len(words))(*words)
            address = ctypes.addressof(block)
            if entry(address, address + 8 * (len(words) - 1)):
                raise RuntimeError(f"{self.py_func.__qualname__} failed")
            if returns == "none":
                return None
            return bool(block[-1] & 1) if returns == "bool" else block[-1]
        raise TypeError(f"{self.py_func.__qualname__} is not compiled for {[_kind(value) for value in arguments]}")


class Constant:
    """A tuple for compiled functions whose arrays stay where they are, so that they are looked up once."""

    def __init__(self, values: Any) -> None:
        self._values, self._words = values, {}  # type: Any, dict[int, Words | None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._values, name)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)

    def words(self, accepted: tuple[Any, ...]) -> Words | None:
        """Return the words of the tuple as an argument, or None if it is not accepted."""
        key = id(accepted)
        if key not in self._words:
            words: Words = []
            self._words[key] = words if _append(words, accepted, self._values) else None
        return self._words[key]


def _parsed(argument: Any) -> tuple[Any, ...]:
    """Return an argument of a description in the form that `_append` takes."""
    if isinstance(argument, list):
        return "tuple", tuple(_parsed(part) for part in argument[1:])
    if "[" in argument:
        dtype, _, shape = argument[:-1].partition("[")
        return "array", np.dtype(dtype), int(shape[:-1]), shape[-1] == "C"
    return (argument,)


def _append(words: Words, accepted: tuple[Any, ...], value: Any) -> bool:
    """Append the words of an argument; return whether it is accepted."""
    kind = accepted[0]
    if kind == "array":
        if not isinstance(value, np.ndarray):
            return False
        _, dtype, ndim, contiguous = accepted
        if value.dtype != dtype or value.ndim != ndim or (contiguous and not value.flags.c_contiguous):
            return False
        words.append(_address(value))
        words += value.shape
        if not contiguous:
            words += value.strides
        return True
    if kind == "tuple":
        if isinstance(value, Constant):
            known = value.words(accepted)
            if known is None:
                return False
            words += known
            return True
        parts = accepted[1]
        if not isinstance(value, tuple) or len(value) != len(parts):
            return False
        return all(map(_append, repeat(words), parts, value))
    if kind == "none":
        return value is None
    if kind == "bool":
        if not isinstance(value, (bool, np.bool_)):
            return False
        words.append(int(value))
        return True
    if kind == "float64":
        words.append(struct.unpack("q", struct.pack("d", value))[0])
        return isinstance(value, (float, np.floating))
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        return False
    words.append(int(value))
    return True


def _address(array: Any) -> int:
    """Return where the samples of an array are."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # faster than the other
    except (TypeError, ValueError, BufferError):  # read-only, empty, not contiguous
        return int(array.ctypes.data)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[{value.ndim}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__
