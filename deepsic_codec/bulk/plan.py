"""Which chunks a task gets, and which regions can be written without touching what lies beside them."""

from collections.abc import Sequence
from math import prod
from typing import Any

from deepsic_codec.axes import Index, Region, ceil_div, grid_shape
from deepsic_codec.errors import UnsupportedArray

#: Chunks in a batch, and about as many in a task; on a GPU, and most pixels of so many. Two such batches are at work
#: there at a time, and the threads of Dask hold one each.
BATCH, GPU_BATCH, GPU_PIXELS = 16, 256, 1 << 26


def unit_of(array: Any) -> Index:
    """Return the shape of what one task has to write as a whole: a shard, or a chunk where there are no shards."""
    return tuple(array.shards or array.chunks)


def check_region(array: Any, region: Any) -> Region:
    """Check where values are to be written.

    Parameters
    ----------
    array : zarr.Array
        The array.
    region : tuple of slice, slice, Ellipsis or None
        None is all of the array; missing axes are whole.

    Returns
    -------
    tuple of slice
        One for each axis, with start and stop.

    Raises
    ------
    UnsupportedArray
        If the region cuts a chunk (or a shard): the message names the smallest region around it that does not.
    """
    parts = list(region) if isinstance(region, tuple | list) else [slice(None) if region is None else region]
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(array.shape) - len(parts) + 1)
    parts += [slice(None)] * (len(array.shape) - len(parts))
    if len(parts) != len(array.shape) or not all(isinstance(part, slice) for part in parts):
        raise UnsupportedArray(f"region: expected one slice for each of {len(array.shape)} axes, got {region!r}")
    given, aligned = [], []
    for part, size, unit in zip(parts, array.shape, unit_of(array), strict=True):
        start, stop, step = part.indices(size)
        if step != 1 or start >= stop:
            raise UnsupportedArray(f"region: expected slices of step 1 that are not empty, got {part} of {size}")
        given.append(slice(start, stop))
        aligned.append(slice(start // unit * unit, min(ceil_div(stop, unit) * unit, size)))
    if given != aligned:
        what = "shards" if array.shards else "chunks"
        raise UnsupportedArray(
            f"region ({_text(given)}) cuts {what} of {unit_of(array)}, whose other pixels would be encoded a second "
            f"time, at a loss; the aligned region around it is ({_text(aligned)})"
        )
    return tuple(given)


def _text(region: Sequence[slice]) -> str:
    return ", ".join(f"{part.start}:{part.stop}" for part in region)


def block_shape(array: Any, axes: str, source_chunks: Sequence[int], batch_size: int) -> Index:
    """Choose the part of an array that one task gets.

    Parameters
    ----------
    array : zarr.Array
        The array.
    axes : str
        Roles of its axes.
    source_chunks : sequence of int
        Largest chunk of the source along each axis: where it can, a block grows along what lies together there.
    batch_size : int
        Chunks in a block, at least as many if the array has them and at most double, unless a shard has more.

    Returns
    -------
    tuple of int
        A multiple of a shard, or of a chunk, along each axis.
    """
    unit = unit_of(array)
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


def usual_batch(array: Any, axes: str, gpu: bool) -> int:
    """Return how many chunks of an array are coded in one call if nobody says: on a GPU it takes many to gain by it."""
    if not gpu:
        return BATCH
    pixels = prod(size for size, axis in zip(array.chunks, axes, strict=True) if axis != "c")
    return min(GPU_BATCH, max(BATCH, GPU_PIXELS // pixels))
