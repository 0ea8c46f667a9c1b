"""Chunk attributes, read from the start of each payload: one chunk, or many at once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import zarr

from deepsic_codec.axes import Axes, Index
from deepsic_codec.codec.decode import PayloadToDecode, compute_cells, compute_labels
from deepsic_codec.codec.labels import tile_labels
from deepsic_codec.errors import CorruptPayload, DeepSICError, UnsupportedPayload
from deepsic_codec.labels.vocabulary import vocabulary_of
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload import labels as payload_labels
from deepsic_codec.payload.fields import Header
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.reader import CONCURRENCY, PayloadStart, map_end

MAP_FIELDS = ("mean", "min", "max")
BATCH_SIZE = 64  # maximum of whole chunks that are read and labelled together
BATCH_PIXELS = 1 << 26  # maximum of their pixels; the symbols of a pixel take 1.5 bytes


def label_batch_size(stored: StoredArray) -> int:
    """Return the number of chunks to read whole and to label in one call."""
    return max(1, min(BATCH_SIZE, BATCH_PIXELS // stored.axes.pixels(stored.chunks)))


def check_tile(section: str, tile: tuple[int, int], head: PayloadStart, geometry: Geometry) -> None:
    """Raise UnsupportedPayload for a section whose tiles are not those of the array."""
    if tile != geometry.tile or head.header.axes != geometry.axes:
        raise UnsupportedPayload(
            f"{section}: tiles of {tile} pixels with axes {head.header.axes!r}, expected {geometry.tile} with axes "
            f"{geometry.axes!r}; write the chunk again"
        )


class Attributes:
    """Makes chunk attributes from the starts of payloads.

    Parameters
    ----------
    stored : StoredArray
        The array; its attributes have the vocabulary.
    """

    def __init__(self, stored: StoredArray) -> None:
        self.stored = stored
        self._vocabularies: dict[tuple[str, str], Vocabulary] = {}
        self._blocks: dict[Index, payload_labels.LabelBlock] = {}

    @cached_property
    def _fields(self) -> dict[str, None]:
        return dict.fromkeys(("tile_shape", "model", "quality", "quality_map", "nbytes", "bpp", "format_version"))

    def of(self, index: Index, start: PayloadStart | None) -> dict[str, Any]:
        """Return the attributes of a chunk as `chunk_attrs` describes them."""
        if start is None:
            return {"labels": [], **self._fields}
        header, config = start.header, self.stored.params
        with self.stored.reader.error_context(index):
            block = start.labels()
            if block is None and self._is_post(header):
                block = self._blocks.pop(index, None) or self._computed(index)
            labels = None if block is None else self._tiles(index, header, block)
            cells = start.qualities()
        return {
            "labels": labels,
            "tile_shape": None if block is None else [int(size) for size in block.tile],
            "model": config.model if self.stored.decoder.startswith(header.decoder.hex()) else header.decoder.hex(),
            "quality": header.quality,
            "quality_map": None if cells is None else {k: round(float(getattr(cells, k)()), 2) for k in MAP_FIELDS},
            "nbytes": header.nbytes,
            "bpp": 8 * header.nbytes / (header.slices * header.height * header.width),
            "format_version": header.version,
        }

    def vocabulary(self, header: Header) -> Vocabulary:
        """Return the vocabulary of the labels of a chunk."""
        key = self.stored.params.identity_of(header)
        if key not in self._vocabularies:
            self._vocabularies[key] = vocabulary_of(self.stored.array, *key)
        return self._vocabularies[key]

    def prepare(self, starts: Iterable[tuple[Index, PayloadStart | None]]) -> None:
        """Compute the labels of all chunks of a list that store none in one call, for `of` to use.

        Errors are ignored here: `of` meets them again and names the chunk.
        """
        self._blocks.clear()
        with suppress(DeepSICError):
            indices = [i for i, one in starts if one is not None and self._is_post(one.header) and not one.labels()]
            if len(indices) < 2:
                return
            embedded.use_embedded(self.stored.array)
            payloads = self.stored.reader.payloads(indices)
            jobs = {i: self.stored.parse(payload) for i, payload in payloads if payload is not None}
            groups: dict[tuple[str, str], list[Index]] = {}
            for i, job in jobs.items():
                groups.setdefault((job.decoder, job.head), []).append(i)
            for key, members in groups.items():
                self._blocks |= self._labelled({i: jobs[i] for i in members}, *key)

    def _labelled(self, jobs: dict[Index, PayloadToDecode], decoder: str, head: str) -> dict[Index, Any]:
        from deepsic_codec.model.scheduler import get_scheduler
        from deepsic_codec.model.zoo import find_model

        info = find_model(decoder, head=head)
        cells = compute_cells(list(jobs.values()), info, get_scheduler(info))
        params = self.stored.params
        return {
            index: tile_labels(
                scores, info.vocabulary, job.header.height, job.header.width, params.label_tile, params.label_pooling
            )
            for (index, job), scores in zip(jobs.items(), cells, strict=True)
        }

    def _is_post(self, header: Header) -> bool:
        return self.stored.params.semantics == "post" and any(header.head)

    def _computed(self, index: Index) -> payload_labels.LabelBlock | None:
        embedded.use_embedded(self.stored.array)
        payload = self.stored.reader.payload(index)
        if payload is None:  # the chunk was deleted since its header was read
            return None
        params = self.stored.params
        return compute_labels(self.stored.parse(payload), params.label_tile, params.label_pooling)

    def _tiles(self, index: Index, header: Header, block: payload_labels.LabelBlock) -> list[dict[str, float]]:
        names = self.vocabulary(header).names
        # Pixels of the chunk that lie within the array; an edge chunk is padded beyond them.
        sizes = [size - i * chunk for size, i, chunk in zip(self.stored.shape, index, header.shape, strict=True)]
        inside = dict(zip(header.axes, sizes, strict=True))
        axes = Axes(header.axes)
        slices, grid = axes.slice_axes, axes.slice_shape(header.shape)
        tiles = []
        for place in np.ndindex(*block.classes.shape[:3]):
            start = {"y": place[1] * block.tile[0], "x": place[2] * block.tile[1]}
            if slices:
                start |= dict(zip(slices, (int(i) for i in np.unravel_index(place[0], grid)), strict=True))
            scores: dict[str, float] = {}
            if all(start[axis] < inside[axis] for axis in start):
                for number, score in zip(block.classes[place].tolist(), block.scores[place].tolist(), strict=True):
                    if number == payload_labels.NO_CLASS:
                        continue
                    if number >= len(names):
                        raise CorruptPayload(
                            f"labels section: class {number}, but the vocabulary has {len(names)} classes"
                        )
                    scores[names[number]] = round(score / 255, 4)
            tiles.append(scores)
        return tiles


def chunk_attrs(array: zarr.Array, index: Sequence[int]) -> dict[str, Any]:
    """Return the labels of a chunk and how it is stored, in most cases from one read of 256 bytes.

    With `semantics="post"` the whole chunk is read, to compute labels from its features.

    Parameters
    ----------
    array : zarr.Array
        An array stored with DeepSIC.
    index : sequence of int
        Position in the grid of chunks (those within shards, if there are shards), one number for each axis.

    Returns
    -------
    dict
        In JSON types:

        - `labels`: a list of label tiles, slice by slice and row by row. Each is a dict of class name to score (0 to
          1, best first, with the class "unknown"), empty for a tile wholly outside of the array. None for a chunk
          without labels.
        - `tile_shape`: height and width of a tile in pixels.
        - `model`: its name, or the first digits of the decoder's identity if another model than that in the metadata
          wrote the chunk.
        - `quality`, `nbytes`, `format_version`: of the payload.
        - `quality_map`: `mean`, `min` and `max` of the qualities of the squares of 16 x 16 pixels of a chunk with a
          quality map, 0 where errors do not matter; otherwise None. `quality` is the largest one. If bands have
          several resolutions, these are the qualities of the finest one.
        - `bpp`: bits per pixel (slices x height x width).

        For a missing chunk, which holds no data, `labels` is empty and all others are None.

    Raises
    ------
    UnsupportedPayload
        If the array is not stored with DeepSIC, or the chunk needs a newer version.
    CorruptPayload
        If the part of the chunk that was read is damaged.
    IndexError
        If the array has no such chunk.
    ModelNotFound
        If labels cannot be named or computed because the model is not installed.
    """
    stored = StoredArray(array)
    ((position, start),) = stored.reader.starts([index], map_end)
    return Attributes(stored).of(position, start)


def iter_chunk_attrs(
    array: zarr.Array, indices: Iterable[Sequence[int]] | None = None, *, concurrency: int = CONCURRENCY
) -> Iterator[tuple[Index, dict[str, Any]]]:
    """Yield the attributes of many chunks, read concurrently.

    Parameters
    ----------
    array : zarr.Array
        An array stored with DeepSIC.
    indices : iterable of sequences of int, optional
        Positions in the grid of chunks (those within shards, if there are shards); all by default.
    concurrency : int
        Reads in flight. S3 through fsspec also has a limit of its own, `max_pool_connections`, that is 10 unless
        `storage_options={"config_kwargs": {"max_pool_connections": ...}}` raises it.

    Yields
    ------
    (tuple of int, dict)
        Position and attributes as from `chunk_attrs`, in the order of `indices`.

    Raises
    ------
    UnsupportedPayload, CorruptPayload, IndexError, ModelNotFound
        As `chunk_attrs`.
    """
    stored = StoredArray(array, concurrency=concurrency)
    attributes = Attributes(stored)
    starts = stored.reader.starts(stored.indices() if indices is None else indices, map_end)
    while part := list(islice(starts, label_batch_size(stored))):
        attributes.prepare(part)
        for index, start in part:
            yield index, attributes.of(index, start)
