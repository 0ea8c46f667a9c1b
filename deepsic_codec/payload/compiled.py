"""How innermost loops are compiled.

Numba counts references to an array wherever a variable is bound to it, and so at each call that it inlines.
Counting takes a locked instruction each way; in coders that call a handful of small functions for each
bit, that took more time than the coding, and threads that share an array wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def _kernel() -> Any:
    compile_: Callable[..., Any] = numba.njit
    try:
        return compile_(nogil=True, cache=True, _nrt=False)
    except KeyError:  # a version of numba that has no such option
        return compile_(nogil=True, cache=True)


#: Compiles functions that create no array and return numbers, without counting references; the caller holds them all.
kernel = _kernel()
