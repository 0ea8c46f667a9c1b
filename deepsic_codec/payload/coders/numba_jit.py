"""Compile loops with numba, without reference counts.

Numba counts references to an array wherever a variable is bound to it, and so at each call that it inlines. Counting
takes one locked instruction for each reference. In coders that call several small functions for each bit, counting took
more time than the coding, and threads that shared an array waited for one another. `jit` therefore switches it off.

Numba caches a compiled function until its own file changes. After a change in a function that is inlined into another
file, such as those of `deepsic_codec.payload.coders.binary`, delete the folders `__pycache__`.
"""

from typing import Any

import numba


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {"nogil": True, "cache": True}
    try:
        from numba.core.cpu import CPUTargetOptions
    except ImportError:  # numba does not document this module
        return options
    return options | {"_nrt": False} if hasattr(CPUTargetOptions, "_nrt") else options


# For functions that create no array and return numbers, compiled without counting; the caller holds all arrays.
jit: Any = numba.njit(**_options())
# For functions that create arrays.
array_jit: Any = numba.njit(nogil=True, cache=True)
# For functions that are inlined into their callers.
inline: Any = numba.njit(inline="always")
