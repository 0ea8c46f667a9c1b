"""What the benchmarks share: the machine's name, images, and running codecs on a number of threads."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deepsic_codec.io.images import SUFFIXES, read_rgb
from deepsic_codec.io.peers import PEERS, Peer, Pixels

__all__ = [
    "PEERS",
    "Peer",
    "Pixels",
    "machine",
    "median_time",
    "over_threads",
    "read_images",
    "table",
]

T, R = TypeVar("T"), TypeVar("R")


def machine(threads: int) -> str:
    """One line: CPU, cores, threads used, versions of what is measured."""
    packages = ("deepsic-codec", "torch", "numba", "zarr", "imagecodecs", "pillow")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    cores = f"{os.cpu_count()} cores, {threads} threads used"
    return f"{_cpu_name()}, {cores}; Python {platform.python_version()}, {versions}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                # Some virtual machines give no more than the maker's name; family and model tell it apart.
                return f"{name} ({_cpu_numbers()})"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_numbers() -> str:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    values = {key.strip(): value.strip() for key, value in fields.items()}
    return f"family {values.get('cpu family', '?')}, model {values.get('model', '?')}"


def read_images(folder: str | Path, limit: int | None = None) -> list[tuple[str, Pixels]]:
    """Name and RGB pixels (H, W, 3) of the image files of a folder, sorted by name.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)[:limit]
    if not paths:
        raise FileNotFoundError(f"no image in {folder}")
    return [(path.name, read_rgb(path)) for path in paths]


def over_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """Apply `function` to every item, on a pool of so many threads (peers are single-threaded inside)."""
    if threads == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def median_time(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned for a terminal, also valid Markdown; floats with two decimals, NaN as a dash."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.2f}"
    return str(value)
