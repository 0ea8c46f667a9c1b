"""What the benchmarks share: the machine's name, images, peer codecs, and running them on a number of threads."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Peer:
    """Another codec: RGB image (H, W, 3) -> bytes at a setting -> image, on the calling thread alone.

    `settings` go from few bits to many.
    """

    name: str
    settings: tuple[float, ...]
    encode: Callable[[Pixels, float], bytes]
    decode: Callable[[bytes], Pixels]
    lossless: bool = False


def _jpeg(subsampling: str) -> Callable[[Pixels, float], bytes]:
    return lambda x, level: bytes(imagecodecs.jpeg8_encode(x, level=int(level), subsampling=subsampling, optimize=True))


def _jpeg2000_ratio(x: Pixels, ratio: float) -> bytes:
    """OpenJPEG told how many bytes to use; imagecodecs has only the other way, so this goes through Pillow."""
    out = io.BytesIO()
    options: dict[str, Any] = {"irreversible": True, "mct": 1, "no_jp2": True}  # mct: Pillow's default leaves it out
    Image.fromarray(x).save(out, "JPEG2000", quality_mode="rates", quality_layers=[ratio], **options)
    return out.getvalue()


def _jpeg2000_psnr(x: Pixels, level: float) -> bytes:
    """OpenJPEG told which PSNR to reach."""
    return bytes(imagecodecs.jpeg2k_encode(x, level=level, codecformat="j2k", reversible=False, mct=True, numthreads=1))


def _jpegxl(effort: int) -> Callable[[Pixels, float], bytes]:
    return lambda x, distance: bytes(imagecodecs.jpegxl_encode(x, distance=distance, effort=effort, numthreads=1))


def _avif(x: Pixels, level: float) -> bytes:
    return bytes(imagecodecs.avif_encode(x, level=int(level), speed=6, pixelformat="yuv444", numthreads=1))


def _webp(x: Pixels, level: float) -> bytes:
    return bytes(imagecodecs.webp_encode(x, level=level, method=6, lossless=False))


def _jpeg2000_decode(data: bytes) -> Pixels:
    return imagecodecs.jpeg2k_decode(data, numthreads=1)


def _avif_decode(data: bytes) -> Pixels:
    return imagecodecs.avif_decode(data, numthreads=1)


def _jpegxl_decode(data: bytes) -> Pixels:
    return imagecodecs.jpegxl_decode(data, numthreads=1)


_JPEG = (5, 10, 15, 25, 35, 50, 65, 75, 85, 90)
_DISTANCES = (15, 11, 8, 6, 4, 3, 2, 1.5, 1, 0.6)
_RATIOS = (240, 160, 120, 80, 60, 48, 40, 30, 24, 20, 16, 12)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("JPEG 4:2:0", _JPEG, _jpeg("420"), imagecodecs.jpeg8_decode),
        Peer("JPEG 4:4:4", _JPEG, _jpeg("444"), imagecodecs.jpeg8_decode),
        Peer("JPEG 2000 ratio", _RATIOS, _jpeg2000_ratio, _jpeg2000_decode),
        Peer("JPEG 2000 PSNR", tuple(range(25, 41)), _jpeg2000_psnr, _jpeg2000_decode),
        Peer("WebP", (1, 5, 15, 30, 45, 60, 75, 85, 92), _webp, imagecodecs.webp_decode),
        Peer("AVIF 4:4:4 s6", (15, 25, 35, 45, 55, 65, 75, 85), _avif, _avif_decode),
        Peer("JPEG XL e3", _DISTANCES, _jpegxl(3), _jpegxl_decode),
        Peer("JPEG XL e7", _DISTANCES, _jpegxl(7), _jpegxl_decode),
    )
}


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
    """Name and RGB pixels (H, W, 3) of the PNG, TIFF and JPEG files of a folder, sorted by name.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    suffixes = {".png", ".tif", ".tiff", ".jpg", ".jpeg"}
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in suffixes)[:limit]
    if not paths:
        raise FileNotFoundError(f"no PNG, TIFF or JPEG image in {folder}")
    return [(path.name, read_image(path)) for path in paths]


def read_image(path: str | Path) -> Pixels:
    """RGB pixels (H, W, 3) of an image file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


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
