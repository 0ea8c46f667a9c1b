"""How innermost loops are compiled.

Numba counts references to an array wherever a variable is bound to it, and so at each call that it inlines.
Counting takes a locked instruction each way; in coders that call a handful of small functions for each
bit, that took more time than the coding, and threads that share an array wait for one another.
"""

from __future__ import annotations

from typing import Any

import numba


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {"nogil": True, "cache": True}
    try:
        from numba.core.cpu import CPUTargetOptions
    except ImportError:  # numba names this nowhere in its documentation
        return options
    return options | {"_nrt": False} if hasattr(CPUTargetOptions, "_nrt") else options


#: Compiles functions that create no array and return numbers, without counting references; the caller holds them all.
kernel: Any = numba.njit(**_options())
