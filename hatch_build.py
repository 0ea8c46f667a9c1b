"""Compile the kernels when a wheel is built (`deepsic_codec/kernels/build.py`).

A wheel gets a library for the CPU that builds it, and depends on numba, which compiles when it runs on another. With
the environment variable DEEPSIC_BUILD_KERNELS set to `all`, it gets one for each kind of CPU of this architecture, as a
wheel to be distributed should, and needs no numba. `none` makes a wheel without any, as it is where there is no C
compiler, and as editable installations are.
"""

import os
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NUMBA = "numba>=0.60"


class KernelsHook(BuildHookInterface):
    """Adds libraries of compiled functions to a wheel, or numba to its dependencies."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the libraries."""
        chosen = os.environ.get("DEEPSIC_BUILD_KERNELS", "")
        if chosen != "all":
            build_data["dependencies"].append(NUMBA)
        if version == "editable" or chosen == "none":
            return
        sys.path.insert(0, self.root)
        from deepsic_codec.kernels.build import build, host_variants
        from deepsic_codec.kernels.library import fitting_variants

        self._scratch = tempfile.TemporaryDirectory()
        variants = host_variants() if chosen == "all" else fitting_variants()[:1]
        if not variants:  # of another architecture
            return
        self.app.display_waiting(f"compiling kernels for {', '.join(variants)}: about a minute")
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                paths = list(pool.map(lambda name: build(name, Path(self._scratch.name)), variants))
        except RuntimeError as error:
            if chosen == "all":
                raise
            self.app.display_warning(f"{error}; numba will compile them when they are called")
            return
        for path in paths:
            build_data["force_include"][str(path)] = f"deepsic_codec/kernels/libraries/{path.name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Delete what is in the wheel now."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()
