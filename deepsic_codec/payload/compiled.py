"""How innermost loops are compiled.

Numba counts references to an array wherever a variable is bound to it, and so at each call that it inlines.
Counting takes a locked instruction each way; in coders that call a handful of small functions for each
bit, that took more time than the coding, and threads that share an array wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def _kernel() -> Callable[[Any], Any]:
    options: dict[str, Any] = {"nogil": True, "cache": True}
    try:
        return njit(_nrt=False, **options)
    except KeyError:  # a version of numba that has no such option
        return njit(**options)


#: Compiles functions that create no array and return numbers, without counting references; the caller holds them all.
kernel: Any = _kernel()
