"""Which chunks a task writes, and which regions can be written without touching chunks beside them."""

from collections.abc import Sequence
from math import prod
from typing import Any

from deepsic_codec.axes import Axes, Index, Region, ceil_div, grid_shape
from deepsic_codec.errors import UnsupportedArray

#: Chunks in a batch, and about the number of chunks in a task.
BATCH_SIZE = 16
#: The same on a GPU, which codes larger batches faster, and the maximum of pixels in a batch there. Two batches are
#: coded at a time, and each thread of Dask holds one.
GPU_BATCH_SIZE, GPU_BATCH_PIXELS = 256, 1 << 26


def write_unit(array: Any) -> Index:
    """Return the shape that one task writes as a whole: that of a shard, or of a chunk if there are no shards."""
    return tuple(array.shards or array.chunks)


def check_region(array: Any, region: Any) -> Region:
    """Return a region to write to, as slices with start and stop, one for each axis.

    A region of None is all of the array; axes that are left out are whole.

    Raises
    ------
    UnsupportedArray
        If the region cuts a chunk (or a shard). The message names the smallest region around it that does not.
    """
    parts = list(region) if isinstance(region, tuple | list) else [slice(None) if region is None else region]
    if Ellipsis in parts:
        number = parts.index(Ellipsis)
        parts[number : number + 1] = [slice(None)] * (len(array.shape) - len(parts) + 1)
    parts += [slice(None)] * (len(array.shape) - len(parts))
    if len(parts) != len(array.shape) or not all(isinstance(part, slice) for part in parts):
        raise UnsupportedArray(f"region: expected one slice for each of {len(array.shape)} axes, got {region!r}")
    bounds, aligned = [], []
    for part, size, unit in zip(parts, array.shape, write_unit(array), strict=True):
        start, stop, step = part.indices(size)
        if step != 1 or (start >= stop and size):
            raise UnsupportedArray(f"region: expected slices of step 1 that are not empty, got {part} of {size}")
        bounds.append(slice(start, stop))
        aligned.append(slice(start // unit * unit, min(ceil_div(stop, unit) * unit, size)))
    if bounds != aligned:
        what = "shards" if array.shards else "chunks"
        raise UnsupportedArray(
            f"region ({_text(bounds)}) cuts {what} of {write_unit(array)}, whose other pixels would lose quality "
            f"by a second encoding; write the aligned region ({_text(aligned)}) instead"
        )
    return tuple(bounds)


def _text(region: Sequence[slice]) -> str:
    return ", ".join(f"{part.start}:{part.stop}" for part in region)


def block_shape(array: Any, axes: str, source_chunks: Sequence[int], batch_size: int) -> Index:
    """Choose the shape of the part of an array that one task writes.

    It is a multiple of a shard, or of a chunk, along each axis. It has at least `batch_size` chunks, unless the array
    has fewer, and less than double that number, unless a shard has more. It first grows within `source_chunks`, the
    largest chunk of the source along each axis.
    """
    unit = write_unit(array)
    per_unit = prod(size // chunk for size, chunk in zip(unit, array.chunks, strict=True))
    limits = grid_shape(array.shape, unit)
    counts = [1] * len(unit)
    while prod(counts) * per_unit < batch_size:
        growing = [axis for axis, limit in enumerate(limits) if counts[axis] < limit]
        if not growing:
            break

        def rank(axis: int) -> tuple[bool, bool, int]:
            extent = counts[axis] * unit[axis]
            return extent >= source_chunks[axis], axes[axis] not in "yx", extent

        axis = min(growing, key=rank)
        counts[axis] = min(2 * counts[axis], limits[axis])
    return tuple(count * size for count, size in zip(counts, unit, strict=True))


def default_batch_size(array: Any, axes: str, gpu: bool) -> int:
    """Return the number of chunks of an array that are coded in one call by default."""
    if not gpu:
        return BATCH_SIZE
    return min(GPU_BATCH_SIZE, max(BATCH_SIZE, GPU_BATCH_PIXELS // Axes(axes).pixels(array.chunks)))
