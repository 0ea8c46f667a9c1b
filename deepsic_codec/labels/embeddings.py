"""Embeddings of label tiles: from the index, from the sections of chunks, or computed.

An embedding is a vector of int8 whose direction says what a tile shows: tiles that show the same have embeddings of
about one direction. All values are 0 where there is none: in missing chunks, and in tiles of NoData or padding only.
Only embeddings of one head can be compared.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index
from deepsic_codec.codec.decode import compute_cells
from deepsic_codec.codec.labels import tile_embeddings
from deepsic_codec.errors import ConfigurationError, LabelIndexError, ModelMismatch
from deepsic_codec.labels.attributes import check_tile, label_batch_size
from deepsic_codec.labels.index import FEATURES, HEADER
from deepsic_codec.payload.limits import check_memory
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.embedded import use_embedded
from deepsic_codec.stored.reader import PayloadStart

if TYPE_CHECKING:
    from deepsic_codec.labels.query import Labels
    from deepsic_codec.model.file import ModelInfo

Vectors = NDArray[np.int8]
COLOURS = 3  # bands of what heads see


def read_embeddings(labels: "Labels", *, compute: bool = False) -> Vectors:
    """Return the embeddings of all label tiles of an array.

    From the index, if it has them. Otherwise from the sections of chunks, in one or two requests for each.

    Parameters
    ----------
    labels : Labels
        The labels of the array. Entries of an index may be stale, as those of scores are.
    compute : bool
        Compute those of chunks that store none, from their features, or from their pixels if they have no features.

    Returns
    -------
    ndarray
        int8 (tiles along each axis of the array, values); all values of a tile are 0 if it has none.

    Raises
    ------
    LabelIndexError
        If no chunk has embeddings, or those of chunks are of different heads.
    ModelNotFound, ModelMismatch
        If embeddings are to be computed and the head of the labels is missing, or gives none.
    """
    index, geometry = labels.index, labels.geometry
    if index.values:
        check_memory(index.values * prod(geometry.tile_grid), "the embeddings of all tiles", LabelIndexError)
        vectors, source = index.read([(index.member("embeddings"), (...,)), (index.source, (...,))])
        labelled = geometry.spread((source == HEADER) | (source == FEATURES))
        return vectors * labelled[..., None]
    result: Vectors | None = None
    for position, part in chunk_embeddings(labels.stored, labels.stored.indices(), compute=compute):
        if part is None:
            continue
        if result is None:
            check_memory(len(part) * prod(geometry.tile_grid), "the embeddings of all tiles", LabelIndexError)
            result = np.zeros((*geometry.tile_grid, len(part)), np.int8)
        result[geometry.tiles_of(position, [i + 1 for i in position])] = np.moveaxis(part, 0, -1)
    if result is None:
        raise LabelIndexError(
            f"array {labels.stored.path!r} has no embeddings; pass compute=True, run relabel, or write it with "
            "DeepSIC(embedding=True)"
        )
    return result


def chunk_embeddings(
    stored: StoredArray, indices: Iterable[Sequence[int]], *, compute: bool = False
) -> Iterator[tuple[Index, Vectors | None]]:
    """Yield the embeddings of the tiles of chunks, from their sections.

    Parameters
    ----------
    stored : StoredArray
        The array.
    indices : iterable of sequences of int
        Positions in the grid of chunks.
    compute : bool
        Compute those of chunks that store none, with the head of the array.

    Yields
    ------
    (tuple of int, ndarray or None)
        Position, and int8 (values, tiles of the chunk along each axis of the array) without tiles outside of the array;
        None for a missing chunk, or one without embeddings.

    Raises
    ------
    LabelIndexError
        If another head than that of the array made the embeddings of a chunk.
    ModelNotFound, ModelMismatch
        If embeddings are to be computed and the head of the array is missing, or gives none.
    CorruptPayload, UnsupportedPayload
        If a chunk is damaged or of another codec.
    """
    starts = stored.reader.starts(indices, vectors=True)
    while part := list(islice(starts, label_batch_size(stored))):
        vectors = {index: _stored_vectors(stored, index, start) for index, start in part if start is not None}
        missing = [index for index, one in vectors.items() if one is None]
        if compute and missing:
            vectors |= _computed(stored, missing)
        for index, _ in part:
            yield index, vectors.get(index)


def _stored_vectors(stored: StoredArray, index: Index, start: PayloadStart) -> Vectors | None:
    with stored.reader.error_context(index):
        embedding = start.embedding()
        if embedding is None:
            return None
        check_tile("embedding section", embedding.tile, start, stored.geometry)
    if stored.head is not None and not stored.head.startswith(start.header.head.hex()):
        raise LabelIndexError(
            f"chunk {index} of array {stored.path!r} has an embedding of head {start.header.head.hex()}, the array has "
            f"head {stored.head[:8]}; write the chunk again"
        )
    return stored.geometry.arrange(embedding.vectors, index)


def _computed(stored: StoredArray, indices: list[Index]) -> dict[Index, Vectors]:
    """Compute the embeddings of chunks."""
    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import find_model

    info = use_embedded(stored.array) or find_model(stored.decoder, head=stored.head)
    check_values(info)
    jobs = {}
    for index, payload in stored.reader.payloads(indices):
        if payload is not None:
            with stored.reader.error_context(index):
                jobs[index] = stored.parse(payload)
    tile = stored.geometry.tile
    cells = compute_cells(list(jobs.values()), info, get_scheduler(info))
    blocks = (
        tile_embeddings(one, info.vocabulary, job.header.height, job.header.width, tile)
        for job, one in zip(jobs.values(), cells, strict=True)
    )
    return {index: stored.geometry.arrange(block.vectors, index) for index, block in zip(jobs, blocks, strict=True)}


def check_values(info: "ModelInfo") -> None:
    """Raise ModelMismatch if a head gives no embeddings."""
    if not info.values:
        raise ModelMismatch(f"the head of model {info.name!r} gives no embeddings; use another head")


def embed_image(
    image: NDArray[np.uint8], info: "ModelInfo", *, tile: tuple[int, int] | None = None, quality: float = 50.0
) -> Vectors:
    """Compute the embeddings of the tiles of an image that is in no archive.

    Parameters
    ----------
    image : ndarray
        uint8 (height, width), or (height, width, 1 or 3).
    info : ModelInfo
        The model whose head embeds, as from `find_model`.
    tile : (int, int), optional
        Height and width of a tile in pixels, multiples of 64; those of `default_tile` by default. A tile larger than
        the image gives one embedding of all of it.
    quality : float
        Of the features, 1 to 100, best about that of the archive to compare with.

    Returns
    -------
    ndarray
        int8 (rows, columns, values).

    Raises
    ------
    ConfigurationError
        For an image of another dtype or shape.
    ModelMismatch
        If the head gives no embeddings.
    """
    from deepsic_codec.model.scheduler import get_scheduler

    check_values(info)
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] not in (1, COLOURS) or not values.size:
        raise ConfigurationError(f"image: expected uint8 (height, width, 1 or 3), got {values.dtype} {np.shape(image)}")
    height, width, _ = values.shape
    pixels = np.ascontiguousarray(np.broadcast_to(values, (height, width, COLOURS)))[None]
    (encoded,) = get_scheduler(info).encode([pixels], [quality], [0], features=False, labels=True)
    return tile_embeddings(encoded.cells, info.vocabulary, height, width, tile).vectors[0]
