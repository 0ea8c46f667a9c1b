"""Find label tiles that show about the same as others, by the directions of their embeddings. Nothing is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.labels.embeddings import embed_image
from deepsic_codec.labels.expression import Described
from deepsic_codec.labels.selection import Selection, TileSelection
from deepsic_codec.labels.vectors import TileVectors, largest, unit
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import Counter, url_of

if TYPE_CHECKING:
    from deepsic_codec.labels.query import Labels

WHOLE = (1 << 20, 1 << 20)  # a tile larger than any image


@dataclass(frozen=True)
class Example:
    """Something to compare tiles with.

    Attributes
    ----------
    text : str
        What it is.
    vectors : ndarray
        Embeddings, int8 (n, values), none of them zero.
    numbers : ndarray
        Numbers of the tiles of the array that they are of, int64 (n,); none for an image.
    """

    text: str
    vectors: NDArray[np.int8]
    numbers: NDArray[np.int64]

    def direction(self) -> NDArray[np.float64]:
        """Return the mean of the directions of the embeddings."""
        return unit(self.vectors).mean(axis=0)


def example_of(labels: "Labels", tiles: TileVectors, to: Any) -> Example:
    """Return an example that a user named, as `Labels.similar` describes it.

    Raises
    ------
    ConfigurationError
        If it is none, lies outside of the array, is of another archive, or shows no data.
    """
    geometry = labels.geometry
    axes = len(geometry.axes)
    cells: NDArray[np.int64] | None = None
    if isinstance(to, Selection):
        if to.stored.fingerprint() != labels.stored.fingerprint() or to.geometry != geometry:
            raise ConfigurationError(
                f"the example is a selection of another array, {url_of(to.stored.array.store_path)}; pass its pixels "
                "as an array"
            )
        text = f"the selection {to.expression}"
        cells = to.cells if to.by_tiles else _tiles_of_chunks(geometry, to.indices)
    elif isinstance(to, tuple | list) and to and all(isinstance(part, slice) for part in to):
        text, cells = _region_text(geometry, to), _tiles_of_region(geometry, to)
    elif isinstance(to, tuple | list) and to and all(_is_integer(part) for part in to):
        position = [int(part) for part in to]
        if len(position) != axes or not all(0 <= i < n for i, n in zip(position, geometry.grid, strict=True)):
            raise ConfigurationError(f"no chunk {tuple(position)}; the grid of chunks is {geometry.grid}")
        text, cells = f"chunk {'.'.join(map(str, position))}", _tiles_of_chunks(geometry, np.array([position]))
    elif getattr(to, "ndim", 0) >= 2 or hasattr(to, "__array_interface__"):
        text, vectors = "an image", _of_image(labels, np.asarray(to))
    else:
        raise ConfigurationError(
            f"expected a chunk (integers), a region (slices), a selection or an image (array), got {to!r:.80}; read "
            "the pixels of a file with deepsic_codec.io.images.read_rgb"
        )
    numbers = np.zeros(0, np.int64)
    if cells is not None:
        numbers = np.ravel_multi_index(tuple(cells.T), tiles.grid) if len(cells) else numbers
        numbers = numbers[tiles.exist[numbers]]
        vectors = tiles.vectors[numbers]
        if not cells.size:
            raise ConfigurationError(f"{text} is empty; pass another example")
    if not vectors.any():
        raise ConfigurationError(f"{text} has no embedding: it is missing, or shows no data; pass another example")
    if vectors.shape[1] != tiles.vectors.shape[1]:
        raise ConfigurationError(
            f"{text} has an embedding of {vectors.shape[1]} values, the tiles of the array have "
            f"{tiles.vectors.shape[1]}: they are of different heads"
        )
    return Example(text, vectors, numbers)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _region_text(geometry: Geometry, region: Sequence[slice]) -> str:
    ends = (":".join("" if end is None else str(end) for end in (part.start, part.stop)) for part in region)
    return "region " + ", ".join(f"{axis}={part}" for axis, part in zip(geometry.axes, ends, strict=False))


def _tiles_of_chunks(geometry: Geometry, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of the tiles of chunks, int64 (tiles, axes)."""
    mask = np.zeros(geometry.grid, np.bool_)
    mask[tuple(chunks.T)] = True
    return np.argwhere(geometry.spread(mask))


def _tiles_of_region(geometry: Geometry, region: Sequence[slice]) -> NDArray[np.int64]:
    """Return the positions of the tiles that have samples of a region, int64 (tiles, axes)."""
    if len(region) > len(geometry.axes):
        raise ConfigurationError(f"region: expected at most {len(geometry.axes)} slices, got {len(region)}")
    ranges = []
    for axis, size in enumerate(geometry.shape):
        start, stop, step = region[axis].indices(size) if axis < len(region) else (0, size, 1)
        if step != 1 or start >= stop:
            raise ConfigurationError(
                f"{_region_text(geometry, region)}: axis {geometry.axes[axis]} is empty, has a step, or is not in 0 to "
                f"{size}; pass a slice for each of the axes {', '.join(geometry.axes)}"
            )
        starts = geometry.starts(axis)
        ranges.append(np.arange(np.searchsorted(starts, start, "right") - 1, np.searchsorted(starts, stop, "left")))
    return np.stack([grid.ravel() for grid in np.meshgrid(*ranges, indexing="ij")], axis=-1)


def _of_image(labels: "Labels", image: NDArray[Any]) -> NDArray[np.int8]:
    """Return the embedding of an image as a whole, int8 (1, values)."""
    from deepsic_codec.model.zoo import find_model

    info = find_model(labels.stored.decoder, head=labels.vocabulary.head or None)
    quality = labels.stored.params.quality
    vectors = embed_image(image, info, tile=WHOLE, **({} if quality is None else {"quality": min(quality, 100.0)}))
    return vectors.reshape(-1, vectors.shape[-1])


def check_k(k: Any) -> None:
    """Raise ConfigurationError unless k is a number of tiles."""
    if not _is_integer(k) or k < 1:
        raise ConfigurationError(f"k: expected a number of tiles from 1 on, got {k!r}")


def where_mask(labels: "Labels", where: Any, counter: Counter) -> NDArray[np.bool_]:
    """Return which tiles satisfy an expression, bool (tiles,)."""
    selection = labels.where(where, tiles=True)
    mask = np.zeros(labels.geometry.tile_grid, np.bool_)
    mask[tuple(selection.tiles.T)] = True
    counter.bytes += selection.bytes_read
    counter.requests += selection.requests
    return mask.ravel()


def find_similar(labels: "Labels", tiles: TileVectors, to: Any, k: int, where: Any) -> TileSelection:
    """Return the tiles that `Labels.similar` describes."""
    check_k(k)
    example, counter = example_of(labels, tiles, to), Counter()
    direction = example.direction()
    if not direction.any():
        raise ConfigurationError(f"the embeddings of {example.text} cancel one another; pass a part of it")
    cosines = tiles.cosines(direction)
    possible = tiles.exist
    if where is not None:
        possible &= where_mask(labels, where, counter)
    possible[example.numbers] = False
    cosines[~possible] = -np.inf
    numbers = largest(cosines, min(k, int(np.count_nonzero(possible))) or 1)
    numbers = numbers[possible[numbers]]
    text = f"like {example.text}" + ("" if where is None else f" and {where}")
    return select(labels, numbers, text, {"similarity": cosines[numbers]}, counter)


def select(
    labels: "Labels", numbers: NDArray[np.int64], text: str, details: dict[str, NDArray[Any]], counter: Counter
) -> TileSelection:
    """Return the selection of tiles of these numbers, in this order."""
    grid = labels.geometry.tile_grid
    positions = np.stack(np.unravel_index(numbers, grid), axis=-1).reshape(-1, len(grid)).astype(np.int64)
    described = Described(text)
    return TileSelection.of(
        labels.stored, labels.index, described, positions, details, counter, compared=labels.compared
    )
