"""Embeddings of label tiles in memory: lengths, cosines, the largest values."""

from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.kernels import jit
from deepsic_codec.model.threads import parallel_map
from deepsic_codec.stored.geometry import Geometry

BLOCK = 1 << 16  # tiles that a thread compares at a time
PRECISION = 32767  # of the largest value of a direction, which is compared as int16


@jit
def _inverse_lengths(vectors: Any, result: Any) -> None:
    """Set result to one over the length of each vector, 0 for a vector of zeros."""
    for row in range(vectors.shape[0]):
        square = np.int32(0)
        for k in range(vectors.shape[1]):
            square = np.int32(square + np.int32(vectors[row, k]) * np.int32(vectors[row, k]))
        result[row] = np.float32(1) / np.sqrt(np.float32(square)) if square else np.float32(0)


@jit
def _products(vectors: Any, direction: Any, inverse: Any, result: Any) -> None:
    """Set result to the product of each vector with a direction, divided by the vector's length."""
    # The largest sum is 255 * 127 * 32767: int32 is enough, and eight products take one instruction.
    for row in range(vectors.shape[0]):
        total = np.int32(0)
        for k in range(vectors.shape[1]):
            total = np.int32(total + np.int32(vectors[row, k]) * np.int32(direction[k]))
        result[row] = np.float32(total) * inverse[row]


class TileVectors:
    """The embeddings of all label tiles of an array, in memory.

    Parameters
    ----------
    vectors : ndarray
        int8 (tiles along each axis, values), as from `read_embeddings`.

    Attributes
    ----------
    vectors : ndarray
        The same, int8 (tiles, values).
    grid : tuple of int
        Tiles along each axis.
    """

    def __init__(self, vectors: NDArray[np.int8]) -> None:
        self.grid = vectors.shape[:-1]
        self.vectors = np.ascontiguousarray(vectors.reshape(-1, vectors.shape[-1]))

    @cached_property
    def inverse(self) -> NDArray[np.float32]:
        """One over the length of each vector, float32 (tiles,); 0 for a tile without an embedding."""
        result = np.zeros(len(self.vectors), np.float32)
        parallel_map(lambda part: _inverse_lengths(self.vectors[part], result[part]), self._blocks)
        return result

    @property
    def exist(self) -> NDArray[np.bool_]:
        """Whether each tile has an embedding, bool (tiles,)."""
        return self.inverse > 0

    @property
    def _blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK) for start in range(0, len(self.vectors), BLOCK)]

    def cosines(self, direction: NDArray[Any]) -> NDArray[np.float32]:
        """Return the cosine of the angle between each tile's embedding and a direction, -1 to 1; 0 without one."""
        peak, inverse = np.abs(direction).max(), self.inverse
        steps = np.round(direction * (PRECISION / peak)).astype(np.int16)
        result = np.empty(len(self.vectors), np.float32)
        parallel_map(lambda part: _products(self.vectors[part], steps, inverse[part], result[part]), self._blocks)
        result *= np.float32(1 / np.sqrt((steps.astype(np.float64) ** 2).sum()))
        return result

    def pooled(self, radius: int, geometry: Geometry, numbers: NDArray[np.int64] | None = None) -> NDArray[np.int8]:
        """Return vectors whose directions are the means of those of the tiles around some tiles, within their chunks.

        A chunk's vectors depend on that chunk alone, as all labels do.

        Parameters
        ----------
        radius : int
            Distance in tiles along y and along x up to which tiles of the same chunk count.
        geometry : Geometry
            Of the array. The vectors may be those of a block of whole chunks.
        numbers : ndarray, optional
            Numbers of the tiles, int64 (n,); all by default.

        Returns
        -------
        ndarray
            int8 (n, values), 0 for tiles without an embedding.
        """
        numbers = np.arange(len(self.vectors)) if numbers is None else numbers
        if not radius:
            return self.vectors[numbers]
        result = np.empty((len(numbers), self.vectors.shape[-1]), np.int8)
        self.inverse  # noqa: B018  # computed once, before the threads that read it
        parts = [slice(start, start + BLOCK) for start in range(0, len(numbers), BLOCK)]
        parallel_map(lambda part: self._pool(numbers[part], radius, geometry, result[part]), parts)
        return result

    def _pool(self, numbers: NDArray[np.int64], radius: int, geometry: Geometry, result: NDArray[np.int8]) -> None:
        positions = np.unravel_index(numbers, self.grid)
        ranges = []
        for axis in (geometry.axes.y, geometry.axes.x):
            per_chunk, size, position = geometry.per_chunk[axis], self.grid[axis], positions[axis]
            first = position // per_chunk * per_chunk
            reach = min(radius, per_chunk - 1)
            stride = int(np.prod(self.grid[axis + 1 :]))
            moved = [(position + step, step * stride) for step in range(-reach, reach + 1)]
            ranges.append([((at >= first) & (at < np.minimum(first + per_chunk, size)), move) for at, move in moved])
        inverse, sums = self.inverse, np.zeros((len(numbers), self.vectors.shape[-1]), np.float32)
        for (in_rows, rows), (in_columns, columns) in product(*ranges):
            inside = in_rows & in_columns
            others = numbers[inside] + (rows + columns)
            sums[inside] += self.vectors[others] * inverse[others, None]
        exist = inverse[numbers] > 0
        peak = np.maximum(np.abs(sums).max(axis=1), np.finfo(np.float32).tiny)
        result[:] = np.rint(sums * (127 * exist / peak)[:, None])


def unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Return vectors (n, values) divided by their lengths."""
    values = vectors.astype(np.float64)
    return values / np.sqrt((values**2).sum(axis=1, keepdims=True))


def largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the numbers of the k largest values, the largest first; of equal ones, those with smaller numbers."""
    least = np.partition(values, -k)[-k] if k < len(values) else -np.inf
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]
