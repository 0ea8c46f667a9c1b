"""Compile the kernels when a wheel is built (`deepsic_codec/kernels/build.py`).

The environment variable DEEPSIC_BUILD_KERNELS names the libraries that a wheel gets, such as `avx2,generic`; without
it, there is one for each kind of CPU of this machine. `none` makes a wheel without any. Such a wheel, one that is built
where there is no C compiler, and an editable installation depend on numba, which compiles when they run.
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
        names = os.environ.get("DEEPSIC_BUILD_KERNELS", "")
        if version == "editable" or names == "none":
            build_data["dependencies"].append(NUMBA)
            return
        sys.path.insert(0, self.root)
        from deepsic_codec.kernels.build import build, host_variants

        self._scratch = tempfile.TemporaryDirectory()
        variants = names.split(",") if names else host_variants()
        self.app.display_waiting(f"compiling kernels for {', '.join(variants)}: about a minute")
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                paths = list(pool.map(lambda name: build(name, Path(self._scratch.name)), variants))
        except RuntimeError as error:
            self.app.display_warning(f"{error}; the wheel needs numba, which compiles when it runs")
            build_data["dependencies"].append(NUMBA)
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
