"""Show an archive that stores one size as an image pyramid: coarser levels are read from the starts of its chunks."""

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import MemoryStore, WrapperStore

from deepsic_codec._compat import Buffer
from deepsic_codec.bulk.preview import ReducedArray
from deepsic_codec.codec.reduced import SCALES
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io import ome
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.coordinates import reduced

THREADS = 8  # chunks that are read at a time
CHUNK = re.compile(r"(\d+)/c/(\d+(?:/\d+)*)")


def open_overviews(
    store: Any,
    name: str | None = None,
    *,
    smallest: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> zarr.Group:
    """Open an array as an image pyramid with the metadata of OME-Zarr, of which only the array itself is stored.

    Level 0 is the array, each further level half as wide and high, down to a sixteenth. Nothing is computed before a
    chunk of a level is read, and nothing is kept. Where chunks have their reduced sizes at their start, as wavelets
    do, a part of each is read; others are read and decoded as a whole, and averaged.

    Parameters
    ----------
    store, name, storage_options, **kwargs
        The array, as for `open_archive`.
    smallest : int, optional
        Edge in pixels (default: 512). No level is made of one that is at most as wide and high.

    Returns
    -------
    zarr.Group
        Read-only, of Zarr format 3, with arrays "0", "1", ... in the axes of OME-NGFF: t, c, z, y, x. Attributes of
        the array, such as its reference system and transform, are those of each level.

    Raises
    ------
    UnsupportedArray
        If the array has axes that OME-NGFF does not have.
    """
    stored = StoredArray.open(store, name, mode="r", options=storage_options, **kwargs)
    embedded.use_embedded(stored.array)
    axes = stored.axes
    if unknown := sorted(set(axes) - set(ome.AXES)):
        raise UnsupportedArray(f"OME-NGFF has no axis {', '.join(unknown)}; its axes are t, c, z, y, x")
    order = [axes.index(axis) for axis in ome.AXES if axis in axes]
    levels, smallest = [ReducedArray(stored, 1)], ome.SMALLEST if smallest is None else max(1, smallest)
    for scale in SCALES[1:]:
        if max(levels[-1].shape[axis] for axis in (axes.y, axes.x)) <= smallest:
            break
        try:
            levels.append(ReducedArray(stored, scale))
        except UnsupportedArray:  # the scale does not divide chunks
            break
    return zarr.open_group(_Overviews(levels, order), mode="r", zarr_format=3)


class _Overviews(WrapperStore[MemoryStore]):
    """A store that has the metadata of a pyramid, and computes the chunks of its levels."""

    def __init__(self, levels: list[ReducedArray], order: list[int]) -> None:
        self._levels, self._order = levels, order
        self._pool = ThreadPoolExecutor(THREADS, "deepsic-overviews")
        stored, metadata = levels[0].stored, MemoryStore()
        axes, attributes = "".join(stored.axes[axis] for axis in order), dict(stored.array.attrs)
        group = zarr.create_group(metadata, zarr_format=3)
        described = [_Level(self._ordered(level.shape), level.dtype) for level in levels]
        name = stored.path.rpartition("/")[2] or "image"
        group.attrs.update(ome.describe(name, described, axes))
        for number, level in enumerate(levels):
            group.create_array(
                str(number),
                shape=self._ordered(level.shape),
                chunks=self._ordered(level.chunks),
                dtype=level.dtype,
                compressors=None,
                fill_value=stored.fill_value,
                dimension_names=list(axes),
                attributes=reduced(attributes, level.scale) if number else attributes,
            )
        super().__init__(metadata.with_read_only(True) if hasattr(metadata, "with_read_only") else metadata)

    def _ordered(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self._order)

    async def get(self, key: str, prototype: Any, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read metadata, or compute a chunk."""
        match = CHUNK.fullmatch(key)
        if match is None:
            return await super().get(key, prototype, byte_range)
        level, index = self._levels[int(match[1])], tuple(map(int, match[2].split("/")))
        # On threads of its own: the chunk is read through this loop, and local files through the loop's threads.
        data = await asyncio.get_running_loop().run_in_executor(self._pool, self._chunk, level, index)
        if isinstance(byte_range, RangeByteRequest):
            data = data[byte_range.start : byte_range.end]
        elif isinstance(byte_range, OffsetByteRequest):
            data = data[byte_range.offset :]
        elif isinstance(byte_range, SuffixByteRequest):
            data = data[-byte_range.suffix :]
        value: Buffer = prototype.buffer.from_bytes(data)
        return value

    def _chunk(self, level: ReducedArray, ordered: tuple[int, ...]) -> bytes:
        """Compute a chunk, filled up beyond the array."""
        index = [ordered[self._order.index(axis)] for axis in range(level.ndim)]
        pairs = zip(index, level.chunks, level.shape, strict=True)
        region = tuple(slice(i * chunk, min((i + 1) * chunk, size)) for i, chunk, size in pairs)
        whole = np.full(level.chunks, level.stored.fill_value, level.dtype)
        part = level[region]
        whole[tuple(slice(size) for size in part.shape)] = part
        return whole.transpose(self._order).astype(level.dtype.newbyteorder("<")).tobytes()

    async def exists(self, key: str) -> bool:
        """Tell whether there is such metadata or chunk."""
        return CHUNK.fullmatch(key) is not None or await super().exists(key)


class _Level:
    """Shape and dtype of a level, as `ome.describe` takes them."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
