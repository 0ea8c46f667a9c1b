"""Compiled loops: from a library that was compiled with the package, or compiled by numba when they are first called.

Modules that hold loops take the decorators from here:

- `jit`: for functions that Python calls
- `inner`, `float_jit`: for functions that other compiled functions call; `float_jit` lets multiplications and additions
  become one instruction, which is exact for integers below 2^24
- `inline`: for functions that are inlined into their callers

Compiled functions take arrays, numbers, None, and tuples of these. They create no array and return a number or None.
`int32` is the type of numbers of 32 bits in compiled code, where Python's integers have 64. `constant` marks a tuple
that many calls share.

`library.load` says how the library is found.
"""

import atexit
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.kernels.library import Constant, load
from deepsic_codec.require import require

#: The library that functions come from, or None where numba compiles them.
LIBRARY = load()

if LIBRARY is not None and not TYPE_CHECKING:
    import numpy as np

    jit, int32, constant = LIBRARY.kernel, np.int32, Constant

    def inline(function):
        """Return the function, which the library has within others."""
        return function

    inner = float_jit = inline
else:
    require("jit", "numba", purpose="a CPU, or a version of the package, that no compiled library fits")
    from numba import int32 as int32

    from deepsic_codec.kernels.numba_jit import float_jit as float_jit
    from deepsic_codec.kernels.numba_jit import inline as inline
    from deepsic_codec.kernels.numba_jit import inner as inner
    from deepsic_codec.kernels.numba_jit import jit as jit

    def constant(values: Any) -> Any:
        """Return the tuple."""
        return values

    if path := os.environ.get("DEEPSIC_RECORD_KERNELS"):
        from deepsic_codec.kernels.build import record

        atexit.register(record, Path(path))
