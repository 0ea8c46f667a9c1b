"""Memory of freed activations kept for the next ones, in processes that Dask started."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# Both are where glibc's own adaptation ends. The parameters' numbers are those of malloc.h.
MMAP_THRESHOLD, MMAP_BYTES = -3, 32 << 20
TRIM_THRESHOLD, TRIM_BYTES = -1, 64 << 20


def keep_freed_memory() -> bool:
    """Have malloc keep the memory of freed tensors, if the environment has switched off that it learns to.

    `distributed` starts its workers with MALLOC_TRIM_THRESHOLD_, and glibc then no longer adapts to the sizes that a
    process allocates: each layer's activations are mapped, zeroed page by page and unmapped again, which takes
    more time than the layers themselves. An environment with MALLOC_MMAP_THRESHOLD_ as well is left as it is.

    Returns
    -------
    bool
        Whether anything was changed.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    if not sys.platform.startswith("linux"):
        return False
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, MMAP_BYTES) and mallopt(TRIM_THRESHOLD, TRIM_BYTES))
