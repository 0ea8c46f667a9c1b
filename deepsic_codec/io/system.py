"""Describe this installation: versions, and what runs the networks on which device."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from deepsic_codec import config
from deepsic_codec.kernels import LIBRARY
from deepsic_codec.model.cpu.dot import VARIANT
from deepsic_codec.model.threads import host_threads

PACKAGES = ("deepsic-codec", "numpy", "numba", "zarr", "numcodecs", "torch", "triton")


def describe_system() -> dict[str, Any]:
    """Describe this installation; imports torch if it is installed, to ask for GPUs.

    Returns
    -------
    dict
        `python` and `platform`; `packages`, the version of each, None for those that are missing; `cpu` with its name,
        where its compiled functions come from, the instructions that multiply 8-bit integers, cores and threads in use;
        `device` in use; `gpus`, their names, None without torch.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": _cpu_name(),
            "kernels": f"library {LIBRARY.name}" if LIBRARY is not None else "compiled by numba",
            "instructions": VARIANT,
            "cores": os.cpu_count(),
            "threads": host_threads(),
        },
        "device": config.device_in_use(loading=True),
        "gpus": _gpus(),
    }


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as lines:  # Linux
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _gpus() -> list[str] | None:
    if find_spec("torch") is None:
        return None
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
