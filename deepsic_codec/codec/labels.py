"""From the scores of label cells to the labels of tiles.

A cell is a square of 64 x 64 pixels that the semantic head scores. Cells are uint8 (slices, rows, columns, outputs of
the head): the scores in 1/255, then the values of an embedding plus `EMBEDDING_ZERO`, if the head has any. All are 0 in
cells of which more than half holds no data and in padding.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Axes, ceil_div
from deepsic_codec.payload.constants import LABEL_CELL
from deepsic_codec.payload.embedding import Embedding, tile_vectors
from deepsic_codec.payload.fields import MAX_K
from deepsic_codec.payload.labels import MAX_POOLING, MIN_SCORE, LabelBlock, best_labels, default_tile, tile_scores

if TYPE_CHECKING:
    from deepsic_codec.model.vocabulary import Vocabulary

Cells = NDArray[np.uint8]

LEAVES = 2  # places of a tile that broader classes leave to those that have no members
IMPLIED = 0.75  # score of a member, as a share of that of its parent, which then says no more


def no_cells(slices: int, height: int, width: int, outputs: int) -> Cells:
    """Return cells without data."""
    return np.zeros((slices, ceil_div(height, LABEL_CELL), ceil_div(width, LABEL_CELL), outputs), np.uint8)


def cells_with_data(cells: Cells, mask: NDArray[np.bool_] | None) -> Cells:
    """Return cells that score 0 where more than half of the pixels have no data; `mask` is that of `NoData`."""
    if mask is None:
        return cells
    balance = np.where(mask.all(axis=-1), -1, 1)
    for axis in (1, 2):
        balance = np.add.reduceat(balance, np.arange(0, balance.shape[axis], LABEL_CELL), axis=axis)
    return cells * np.broadcast_to(balance >= 0, cells.shape[:3])[..., None]


def cells_within(cells: Cells, axes: Axes, shape: Sequence[int], valid_shape: Sequence[int]) -> Cells:
    """Return cells that score 0 where they lie wholly in padding, beyond the first `valid_shape` samples of a chunk."""
    by_axis = cells.reshape(*axes.slice_shape(shape), *cells.shape[1:])
    rows, columns = (ceil_div(size(valid_shape), LABEL_CELL) for size in (axes.height, axes.width))
    region = tuple(slice(count) for count in (*axes.slice_shape(valid_shape), rows, columns))
    result = np.zeros_like(by_axis)
    result[region] = by_axis[region]
    return result.reshape(cells.shape)


def tile_labels(
    cells: Cells,
    vocabulary: "Vocabulary",
    height: int,
    width: int,
    tile: tuple[int, int] | None = None,
    pooling: str = MAX_POOLING,
) -> LabelBlock:
    """Return the labels of a chunk, cells joined to tiles as `tile_scores` describes it.

    `height`, `width` and `tile` are in pixels; `default_tile` is the default.
    """
    tile = tile or default_tile(height, width)
    scores = tile_scores(cells[..., : len(vocabulary.names)], tile, pooling, np.asarray(cells.any(axis=-1)))
    return best_labels(with_best_leaves(without_implied(scores, vocabulary), vocabulary), tile)


def without_implied(scores: Cells, vocabulary: "Vocabulary") -> Cells:
    """Return scores (..., classes) that are 0 for classes of which a member scores nearly as much.

    They say no more than the member does, and would take its place among the few classes that a tile stores.
    """
    parents = np.flatnonzero(vocabulary.implied.any(axis=1))
    if not parents.size:
        return scores
    below = vocabulary.implied[parents, : scores.shape[-1]]
    of_members = np.where(below, scores[..., None, :], 0).max(axis=-1)
    of_parents = scores[..., parents]
    result = scores.copy()
    result[..., parents] = np.where(of_members >= IMPLIED * of_parents, 0, of_parents)
    return result


def with_best_leaves(scores: Cells, vocabulary: "Vocabulary") -> Cells:
    """Return scores (..., classes) that are 0 for broader classes which would take the place of the best leaves.

    A tile stores few classes. Broader ones nearly always score more than their members, which would be lost.
    """
    is_parent = np.asarray(vocabulary.implied.any(axis=1))[: scores.shape[-1]]
    if not is_parent.any():
        return scores
    is_leaf = ~is_parent & (np.arange(len(is_parent)) < len(vocabulary.classes))  # "unknown" is none
    leaves = np.where(is_leaf & (scores >= MIN_SCORE), scores, 0)
    chosen = (_ranks(leaves) < LEAVES) & (leaves > 0)
    others = np.where(chosen, 0, scores)
    kept = _ranks(others) < MAX_K - chosen.sum(axis=-1, keepdims=True)
    return np.where(chosen | kept, scores, 0).astype(np.uint8)


def _ranks(scores: Cells) -> NDArray[np.int64]:
    """Return the rank of each class, 0 for the best; of equal scores, the lower class comes first."""
    order = np.argsort(255 - scores, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


def tile_embeddings(
    cells: Cells, vocabulary: "Vocabulary", height: int, width: int, tile: tuple[int, int] | None = None
) -> Embedding:
    """Return the embeddings of a chunk, with the parameters of `tile_labels`; of no values, if the head has none."""
    tile = tile or default_tile(height, width)
    return Embedding(tile, tile_vectors(cells[..., len(vocabulary.names) :], tile))
