"""The one place of limits: what readers may allocate, and how often they may loop, on the word of a few bytes.

Every reader of payloads, labels, indexes and metadata asks here first. The limits are settings (`config.Settings`).
"""

import os
from contextlib import suppress
from pathlib import Path

from deepsic_codec import config
from deepsic_codec.axes import ceil_div
from deepsic_codec.errors import DeepSICError
from deepsic_codec.payload.constants import LATENT_STRIDE

# Memory that decoding takes for a pixel of an image of up to 3 bands, at most, its samples included: of features; and
# of wavelets and exact samples by the bytes of a sample. Of the latter, scenes and noise of 2 Mpx took up to 16, 33
# and 58; masks and tables come on top.
FEATURES_BYTES = 44
SAMPLES_BYTES = {1: 28, 2: 48, 4: 80}
# Memory besides for a row and a column, as rows and columns around the samples, of which narrow chunks have the most:
# of noise of 1 to 16 rows or columns it took up to 88 and 327 bytes.
ROW_BYTES, COLUMN_BYTES = 90, 330
# Bytes that are not compared with the memory of the system: asking it takes longer than this is worth.
SMALL = 1 << 30


def check_size(images: int, height: int, width: int, error: type[DeepSICError]) -> None:
    """Raise an error unless the pixels of a chunk, with a border of one latent, are within `max_pixels`."""
    rows, columns = ceil_div(height, LATENT_STRIDE) + 2, ceil_div(width, LATENT_STRIDE) + 2
    limit = config.get().max_pixels
    if images * rows * columns * LATENT_STRIDE**2 > limit:
        raise error(
            f"a chunk of {images} images of {height} x {width} pixels, each with a border, exceeds the limit of "
            f"{limit} pixels; if you expect chunks of this size, raise the limit with "
            "deepsic_codec.config.set(max_pixels=...)"
        )


def check_memory(nbytes: int, subject: str, error: type[DeepSICError]) -> None:
    """Raise an error if a task would take more memory than `max_memory`, or than the system has available."""
    limit = config.get().max_memory
    if limit is None and nbytes > SMALL:
        limit = available_memory()
    if limit is not None and nbytes > limit:
        raise error(
            f"{subject} takes about {nbytes / 1e9:.2f} GB of memory, more than the limit of {limit / 1e9:.2f} GB; to "
            "allow more, set the bytes with deepsic_codec.config.set(max_memory=...) or DEEPSIC_MAX_MEMORY"
        )


def check_count(count: int, subject: str, error: type[DeepSICError], unit: str = "chunks") -> None:
    """Raise an error if a task goes through more chunks, or other units, than `max_chunks`."""
    limit = config.get().max_chunks
    if count > limit:
        raise error(
            f"{subject} goes through {count:,} {unit}, more than the limit of {limit:,}; if the array has that many, "
            "raise the limit with deepsic_codec.config.set(max_chunks=...) or DEEPSIC_MAX_CHUNKS"
        )


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate, None where the system does not tell."""
    known = [_of_system(), _of_group(), _of_address_space()]
    return min((nbytes for nbytes in known if nbytes is not None), default=None)


def _of_system() -> int | None:
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable")))
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_group() -> int | None:
    """Return what a container's limit leaves; the cache of files gives way."""
    root = Path("/sys/fs/cgroup")
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError, KeyError):
            largest, current = (int((folder / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(0, largest - current + int(stat[cache]))
    return None


def _of_address_space() -> int | None:
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            return max(0, limit - pages * resource.getpagesize())
    return None
