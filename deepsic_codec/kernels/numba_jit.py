"""Compile loops with numba, without reference counts.

Numba counts references to an array wherever a variable is bound to it, and so at each call that it inlines. Counting
takes one locked instruction for each reference. In coders that call several small functions for each bit, counting took
more time than the coding, and threads that shared an array waited for one another. Here it is switched off, and so
compiled functions can create no arrays.

Numba caches a compiled function until its own file changes. After a change in a function that is inlined into another
file, such as those of `deepsic_codec.payload.coders.binary`, delete the folders `__pycache__`.

Where numba has no folder for its cache, functions are compiled anew in each process, with one warning. A file of the
cache that is damaged, as a full disk or a crash leaves it, is replaced. Numba itself fails at it in every process, or
runs it.
"""

import os
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from zlib import crc32

import numba

try:
    from numba.core import caching
    from numba.core.serialize import dumps
except ImportError:  # numba does not document these modules
    caching = None  # type: ignore[assignment]


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True}
    try:
        from numba.core.cpu import CPUTargetOptions
    except ImportError:  # numba does not document this module
        return options
    return options | {"_nrt": False} if hasattr(CPUTargetOptions, "_nrt") else options


#: Functions that Python calls, by module and name.
ENTRIES: dict[str, Any] = {}


def _cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles with numba and keeps the result, if there is a folder for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        if not options.get("no_cpython_wrapper"):
            ENTRIES[f"{function.__module__}.{function.__qualname__}"] = dispatcher
        if hasattr(dispatcher, "enable_caching"):  # not with NUMBA_DISABLE_JIT
            try:
                if caching is None:
                    dispatcher.enable_caching()
                else:
                    dispatcher._cache = _cache_class()(function)
            except RuntimeError as error:
                _warn_once(error)
        return dispatcher

    return decorate


def _cache_class() -> Any:
    """Return the cache of numba, with checksums, and without errors."""
    if _classes:
        return _classes[0]
    base: Any = caching.FunctionCache
    implementation: Any = base._impl_class
    # Without a home, the folder of the user would be one of the name ~ in the current folder.
    has_home = os.path.isabs(os.path.expanduser("~"))
    skipped = "" if has_home else "UserWideCacheLocator"  # with a leading _ in older versions of numba

    class Checked(implementation):
        _locator_classes = [
            locator for locator in implementation._locator_classes if locator.__name__.lstrip("_") != skipped
        ]

        def reduce(self, result: Any) -> tuple[int, bytes]:
            data = dumps(super().reduce(result))
            return crc32(data), data

        def rebuild(self, target: Any, reduced: Any) -> Any:
            checksum, data = reduced
            if crc32(data) != checksum:
                raise ValueError("the checksum of compiled code does not match")
            return super().rebuild(target, pickle.loads(data))

    class Cache(base):
        _impl_class = Checked

        def load_overload(self, signature: Any, target: Any) -> Any:
            try:
                # Numba would first start its runtime and import all that compiling needs, which takes longer than to
                # decode a chunk.
                with self._guard_against_spurious_io_errors():
                    return self._load_overload(signature, target)
            except Exception:  # damaged files raise errors of any class
                with suppress(OSError):
                    self.flush()
                return None

        def save_overload(self, signature: Any, result: Any) -> None:
            with suppress(Exception):  # the disk is full, or a damaged file cannot be replaced: the code is there
                super().save_overload(signature, result)

    _classes.append(Cache)
    return Cache


_classes: list[Any] = []
_warned: list[bool] = []


def _warn_once(error: Exception) -> None:
    if not _warned:
        _warned.append(True)
        warnings.warn(
            f"numba has no folder to keep compiled code in ({error}), so each process compiles for a minute; set "
            "NUMBA_CACHE_DIR to a folder that can be written to",
            RuntimeWarning,
            stacklevel=4,
        )


jit: Any = _cached(**_options())
# Functions that compiled code alone calls need no code to take Python's objects.
inner: Any = _cached(no_cpython_wrapper=True, **_options())
float_jit: Any = _cached(fastmath={"contract"}, no_cpython_wrapper=True, **_options())
inline: Any = numba.njit(forceinline=True, **_options())
