"""Draw a small picture of an array with its labels, from a sample of the chunks if there are many."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index, Region, ceil_div
from deepsic_codec.errors import ConfigurationError, LabelIndexError
from deepsic_codec.io import draw
from deepsic_codec.io.region import Part, axis_number, to_region
from deepsic_codec.io.require import require
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.index import MISSING
from deepsic_codec.labels.open import open_labels
from deepsic_codec.labels.query import Labels
from deepsic_codec.labels.selection import Selection
from deepsic_codec.progress import Progress
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.reader import PayloadStart

if TYPE_CHECKING:
    from PIL import Image as PillowImage

MAX_PIXELS = 1 << 25  # decoded for a picture (33 megapixels: some seconds), unless `everything` is set
MAX_SCAN = 4096  # chunks whose headers are read to answer a query if there is no index
MAX_TABLE = 1 << 26  # bytes of tile scores that are read from an index
IN_FLIGHT = 8  # chunks that are read and decoded at once
MAX_ZOOM = 4
MIN_SIZE = 16  # pixels
MIN_WIDTH = 480  # pixels of the sheet, so that captions fit
NO_DATA = (236, 236, 236)

Starts = Mapping[Index, PayloadStart | None]


@dataclass(frozen=True)
class Preview:
    """A picture and its contents.

    Attributes
    ----------
    image : PIL.Image.Image
        The picture, with captions and a legend.
    chunks, shown : int
        Chunks of the plane that is shown, and the number of those that were decoded.
    sampled : bool
        Whether decoded chunks stand for their neighbours.
    classes : dict of str to int
        Numbers of label tiles by their best class.
    limits : list of (float, float) or None
        Values shown as black and white, for each band; None if samples are shown unchanged.
    """

    image: "PillowImage.Image"
    chunks: int
    shown: int
    sampled: bool
    classes: dict[str, int] = field(default_factory=dict)
    limits: list[tuple[float, float]] | None = None


def preview(
    source: Any,
    name: str | None = None,
    *,
    size: int = 1024,
    labels: bool | None = None,
    where: str | None = None,
    select: Mapping[str, Part] | None = None,
    bands: Sequence[int] | None = None,
    stretch: bool | None = None,
    everything: bool = False,
    index: Any = None,
    progress: Progress | None = None,
) -> Preview:
    """Draw a small picture of an array.

    Parameters
    ----------
    source, name
        The array, as for `deepsic_codec.open_archive`.
    size : int
        Longer edge of the image in pixels.
    labels : bool, optional
        Whether to add an image with the best label of each tile; by default if there is no `where`.
    where : str, optional
        Expression of labels. The picture dims everything that does not satisfy it; of a large array, only chunks that
        satisfy it are decoded.
    select : mapping, optional
        Position along axes other than y, x and c, by letter or name; 0 by default.
    bands : sequence of int, optional
        One or three bands to show; the first ones by default.
    stretch : bool, optional
        Whether to scale values between their percentiles; by default yes, except for uint8 with one or three bands.
    everything : bool
        Decode all chunks of the plane.
    index : optional
        Location of the label index, if not beside the array.
    progress : callable, optional
        Called with the number of decoded chunks and of all chunks to decode.

    Raises
    ------
    UnsupportedArray
        If there is no such array.
    ConfigurationError
        If the array has no such axes, positions or bands.
    ExpressionError
        If `where` is no valid expression.
    LabelIndexError
        If `where` is given and a large array has no index.
    MissingPackage
        If Pillow is not installed.
    """
    require("cli", "PIL")
    if size < MIN_SIZE:
        raise ConfigurationError(f"size: expected at least {MIN_SIZE} pixels, got {size}")
    stored = StoredArray.open(source, name)
    embedded.use_embedded(stored.array)
    plane = _plane(stored, select or {}, bands)
    show_labels = where is None if labels is None else labels
    indexed = _open_index(stored, index)
    selection = None if where is None else _query(stored, where, indexed)
    cells, block = _choose(plane, size, everything, _candidates(plane, indexed, selection))
    starts = dict(stored.reader.starts([cell.index for cell in cells]))
    present = [cell for cell in cells if starts[cell.index] is not None]

    values = np.full((*plane.picture(size), len(plane.bands)), np.nan, np.float32)
    for number, (cell, samples) in enumerate(_decoded(plane, present)):
        values[cell.box] = draw.shrink(samples[: cell.height, : cell.width], *values[cell.box].shape[:2])
        if progress is not None:
            progress(number + 1, len(present))
    pixels, limits = _to_pixels(values, plane, stretch)
    panels = [pixels if selection is None else draw.dim(pixels, _matches(selection, plane, cells, pixels.shape[:2]))]

    classes: dict[str, int] = {}
    palette: dict[str, draw.Colour] = {}
    if show_labels:
        names, tiles = _best_labels(plane, indexed, present, starts)
        counts = Counter(number for grid in tiles.values() for number in grid[grid >= 0].tolist())
        classes = {names[number]: count for number, count in counts.most_common()}
        palette = draw.colours(names)
    if classes:
        numbers = np.full(pixels.shape[:2], -1, np.int64)
        for cell in present:
            if cell.index in tiles:
                _paint(numbers, plane, cell, tiles[cell.index])
        numbers[np.isnan(values).any(axis=-1)] = -1
        panels.append(draw.tint(panels[0], numbers, np.array([palette[name] for name in names], np.uint8)))

    caption = _caption(plane, cells, len(present), block, selection, limits)
    note = "No labels in these chunks." if show_labels and not classes else ""
    image = _compose(panels, caption, {name: palette[name] for name in classes}, classes, note)
    return Preview(image, plane.count, len(present), block != (1, 1), classes, limits)


@dataclass(frozen=True)
class _Plane:
    """The plane along y and x that is shown.

    `region` is one position along all other axes but bands, and whole along y, x and c.
    """

    stored: StoredArray
    region: Region
    bands: tuple[int, ...]

    @property
    def yx(self) -> tuple[int, int]:
        """Numbers of the axes y and x."""
        return self.stored.axes.y, self.stored.axes.x

    def of_plane(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Return the sizes along y and x."""
        return sizes[self.yx[0]], sizes[self.yx[1]]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.of_plane(self.stored.shape)

    @property
    def chunk(self) -> tuple[int, int]:
        """Height and width of a chunk in pixels."""
        return self.of_plane(self.stored.chunks)

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks along y and x."""
        return self.of_plane(self.stored.grid)

    @property
    def count(self) -> int:
        """Number of chunks along y and x."""
        return self.grid[0] * self.grid[1]

    @property
    def cost(self) -> int:
        """Pixels that are decoded for one chunk of the plane: all its slices, in all chunks of the bands."""
        bands = self.stored.axes.bands(self.stored.chunks)
        return self.stored.axes.pixels(self.stored.chunks) * len({band // bands for band in self.bands})

    def picture(self, size: int) -> tuple[int, int]:
        """Return height and width of the picture."""
        scale = min(size / max(self.shape), MAX_ZOOM)
        return max(1, round(self.shape[0] * scale)), max(1, round(self.shape[1] * scale))

    def index(self, row: Any, column: Any) -> tuple[Any, ...]:
        """Return the position of a chunk in the grid of the array; with several chunks of bands, of the first band."""
        index: list[Any] = [part.start // chunk for part, chunk in zip(self.region, self.stored.chunks, strict=True)]
        index[self.yx[0]], index[self.yx[1]] = row, column
        if self.stored.axes.c is not None:
            index[self.stored.axes.c] = self.bands[0] // self.stored.chunks[self.stored.axes.c]
        return tuple(index)

    def read(self, index: Index) -> NDArray[Any]:
        """Read and decode the bands of a chunk, (H, W, bands)."""
        region = list(self.region)
        for axis in self.yx:
            region[axis] = self.stored.geometry.chunk_region(index)[axis]
        first = min(self.bands)
        if self.stored.axes.c is not None:
            region[self.stored.axes.c] = slice(first, max(self.bands) + 1)
        values = self.stored.axes.to_samples(np.asarray(self.stored.array[tuple(region)]))[0]
        return values[..., [band - first for band in self.bands]]

    def tiles(self, index: Index, values: NDArray[Any]) -> NDArray[Any]:
        """Return what belongs to the plane of values for the tiles of a chunk: (rows, columns)."""
        axes, chunks = self.stored.axes, self.stored.chunks
        part = [slice(None)] * len(axes)
        for axis in (axes.index(letter) for letter in axes.slice_axes):
            position = self.region[axis].start - index[axis] * chunks[axis]
            part[axis] = slice(position, position + 1)
        return axes.to_samples(values[tuple(part)])[0, ..., 0]


def _plane(stored: StoredArray, select: Mapping[str, Part], bands: Sequence[int] | None) -> _Plane:
    axes, array = stored.axes, stored.array
    for name, part in select.items():
        if isinstance(part, slice) or axes[axis_number(name, axes, stored.dimension_names)] in "yxc":
            raise ConfigurationError(f"select {name}: expected one position along an axis other than y, x and c")
    if not min(array.shape):
        raise ConfigurationError(f"array {array.path!r} is empty: {array.shape}")
    positions: dict[str, Part] = dict.fromkeys(axes.slice_axes, 0)
    positions |= {axes[axis_number(name, axes, stored.dimension_names)]: part for name, part in select.items()}
    region = to_region(array, axes, positions)
    count = axes.bands(array.shape)
    chosen = tuple(bands) if bands else (0, 1, 2) if count >= 3 else (0,)
    if len(chosen) not in (1, 3) or not all(0 <= band < count for band in chosen):
        raise ConfigurationError(f"bands: expected one or three of 0 to {count - 1}, got {list(chosen)}")
    return _Plane(stored, region, chosen)


@dataclass(frozen=True)
class _Cell:
    """A chunk and its box in the picture.

    `height` and `width` are the pixels of the chunk that fill the box: a chunk that stands for a smaller block at the
    edge of the array is cut, not squeezed.
    """

    index: Index
    box: tuple[slice, slice]
    height: int
    width: int


def _open_index(stored: StoredArray, index: Any) -> Labels | None:
    try:
        return open_labels(stored.array, index=index)
    except LabelIndexError:
        if index is not None:
            raise
        return None


def _query(stored: StoredArray, where: str, indexed: Labels | None) -> Selection:
    if indexed is None:
        count = stored.geometry.count
        if count > MAX_SCAN:
            raise LabelIndexError(f"array {stored.path!r} has {count:,} chunks and no label index; run deepsic index")
        indexed = open_labels(stored.array, scan=True)
    return indexed.where(where)


def _candidates(plane: _Plane, indexed: Labels | None, selection: Selection | None) -> NDArray[np.bool_]:
    """Tell which chunks of the plane are worth decoding, as far as index and selection tell."""
    if selection is not None:
        mask = selection.mask
    elif indexed is not None and plane.stored.geometry.count <= MAX_TABLE:
        mask = np.asarray(indexed.index.source[...]) != MISSING
    else:
        return np.ones(plane.grid, np.bool_)
    mask = mask[plane.index(slice(None), slice(None))]
    return mask if plane.yx[0] < plane.yx[1] else mask.T


def _choose(
    plane: _Plane, size: int, everything: bool, candidates: NDArray[np.bool_]
) -> tuple[list[_Cell], tuple[int, int]]:
    """Choose a chunk for each block of chunks, the candidate closest to its middle; also return the block's shape."""
    budget = plane.count if everything else max(1, MAX_PIXELS // plane.cost)
    side = 1
    while ceil_div(plane.grid[0], side) * ceil_div(plane.grid[1], side) > budget:
        side += 1
    block = min(side, plane.grid[0]), min(side, plane.grid[1])
    picture = plane.picture(size)

    def box(axis: int, number: int) -> slice:
        ends = (min(n * block[axis] * plane.chunk[axis], plane.shape[axis]) for n in (number, number + 1))
        return slice(*(round(end / plane.shape[axis] * picture[axis]) for end in ends))

    cells = []
    for row, column in np.ndindex(ceil_div(plane.grid[0], block[0]), ceil_div(plane.grid[1], block[1])):
        boxes = box(0, row), box(1, column)
        part = candidates[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
        positions = np.argwhere(part)
        if not len(positions) and side == 1:
            positions = np.zeros((1, 2), int)  # of a small array, chunks that do not match are drawn, too, dimmed
        if not len(positions) or any(one.start == one.stop for one in boxes):
            continue
        closest = np.abs(positions - (np.array(part.shape) - 1) / 2).sum(axis=1).argmin()
        i, j = positions[closest].tolist()
        index = plane.index(row * block[0] + i, column * block[1] + j)
        inside = plane.stored.geometry.chunk_region(index)
        height, width = (
            max(1, min(inside[axis].stop - inside[axis].start, round(covered / step)))
            for axis, covered, step in zip(plane.yx, _covered(plane, block, (row, column)), block, strict=True)
        )
        cells.append(_Cell(index, boxes, height, width))
    return cells, block


def _covered(plane: _Plane, block: tuple[int, int], position: tuple[int, int]) -> list[int]:
    """Return height and width in pixels of a block of chunks, within the array."""
    sizes = zip(block, plane.chunk, position, plane.shape, strict=True)
    return [min(count * chunk, size - number * count * chunk) for count, chunk, number, size in sizes]


def _decoded(plane: _Plane, cells: Sequence[_Cell]) -> Iterator[tuple[_Cell, NDArray[Any]]]:
    """Yield the samples of chunks, decoded a few at a time, with NaN for pixels without data."""
    nodata = plane.stored.params.nodata

    def read(cell: _Cell) -> NDArray[Any]:
        values = plane.read(cell.index)
        if nodata is None or nodata == "NaN":
            return values
        missing = (values == nodata).all(axis=-1)
        return np.where(missing[..., None], np.float32(np.nan), values) if missing.any() else values

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for start in range(0, len(cells), IN_FLIGHT):
            part = cells[start : start + IN_FLIGHT]
            yield from zip(part, pool.map(read, part), strict=True)


def _to_pixels(
    values: NDArray[np.float32], plane: _Plane, stretch: bool | None
) -> tuple[draw.Pixels, list[tuple[float, float]] | None]:
    dtype = plane.stored.array.dtype
    if stretch is None:
        stretch = dtype != np.uint8 or plane.stored.axes.bands(plane.stored.shape) not in (1, 3)
    limits = draw.stretch_limits(values) if stretch else None
    info = np.iinfo(dtype) if dtype.kind in "iu" else None
    full = (0.0, 1.0) if info is None else (float(info.min), float(info.max))
    pixels = draw.to_grey_levels(values, limits or [full] * len(plane.bands), brighten=bool(limits))
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    pixels[np.isnan(values).any(axis=-1)] = NO_DATA
    return pixels, limits


def _best_labels(
    plane: _Plane, indexed: Labels | None, cells: Sequence[_Cell], starts: Starts
) -> tuple[list[str], dict[Index, NDArray[np.int64]]]:
    """Return the names of classes, and for each chunk the number of the best class of its tiles, -1 for none.

    Labels come from the index if it is small enough, otherwise from the headers. Names are in the order of the
    vocabulary, so that a colour does not depend on what happens to be shown.
    """
    geometry = plane.stored.geometry
    if indexed is not None and indexed.index.tile_scores.size <= MAX_TABLE:
        names = list(indexed.vocabulary.names)
        scores = np.asarray(indexed.index.tile_scores[...])[: len(names)]
        best = np.where(scores.max(axis=0) > 0, scores.argmax(axis=0), -1)
        regions = {cell.index: geometry.tiles_of(cell.index, [i + 1 for i in cell.index]) for cell in cells}
        return names, {index: plane.tiles(index, best[region]) for index, region in regions.items()}
    attributes = Attributes(plane.stored)
    numbers: dict[str, int] = {}
    tiles = {}
    for cell in cells:
        start = starts[cell.index]
        labels = attributes.of(cell.index, start)["labels"]
        if start is None or not labels:
            continue
        for name in attributes.vocabulary(start.header).names:
            numbers.setdefault(name, len(numbers))
        best = np.array([numbers[max(tile, key=tile.__getitem__)] if tile else -1 for tile in labels])
        tiles_per_chunk = [n for axis, n in zip(geometry.axes, geometry.per_chunk, strict=True) if axis in "yx"]
        rows, columns = tiles_per_chunk if plane.yx[0] < plane.yx[1] else tiles_per_chunk[::-1]
        arranged = geometry.arrange(best.reshape(-1, rows, columns, 1), cell.index)[0]
        tiles[cell.index] = plane.tiles(cell.index, arranged)
    return list(numbers), tiles


def _paint(canvas: NDArray[Any], plane: _Plane, cell: _Cell, tiles: NDArray[Any]) -> None:
    """Set the pixels that show a chunk to the values of its tiles (rows, columns)."""
    box = canvas[cell.box]
    sizes = zip(box.shape, (cell.height, cell.width), plane.stored.geometry.tile, tiles.shape, strict=True)
    numbers = [
        np.minimum((np.arange(pixels) + 0.5) / pixels * size // tile, count - 1).astype(int)
        for pixels, size, tile, count in sizes
    ]
    box[...] = tiles[np.ix_(*numbers)]


def _matches(selection: Selection, plane: _Plane, cells: Sequence[_Cell], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Tell which pixels of the picture show tiles that satisfy the expression."""
    geometry = selection.geometry
    grid = np.zeros(geometry.tile_grid, np.bool_)
    grid[tuple(selection.tiles.T)] = True
    matches = np.zeros(shape, np.bool_)
    for cell in cells:
        tiles = plane.tiles(cell.index, grid[geometry.tiles_of(cell.index, [i + 1 for i in cell.index])])
        _paint(matches, plane, cell, tiles)
    return matches


def _caption(
    plane: _Plane,
    cells: Sequence[_Cell],
    decoded: int,
    block: tuple[int, int],
    selection: Selection | None,
    limits: list[tuple[float, float]] | None,
) -> list[str]:
    array, axes = plane.stored.array, plane.stored.axes
    first = f"{str(array.store_path).removeprefix('file://')}: {' x '.join(map(str, array.shape))} {array.dtype}"
    first += "".join(f", {axis}={plane.region[axes.index(axis)].start}" for axis in axes.slice_axes)
    if plane.stored.params.quality is not None:
        first += f", quality {plane.stored.params.quality:g}"
    if block == (1, 1):
        missing = f", {len(cells) - decoded} without data" if len(cells) > decoded else ""
        second = f"{decoded} of {plane.count} chunks decoded{missing}"
    else:
        second = f"a sample: {decoded:,} of {plane.count:,} chunks, each for a block of {block[0]} x {block[1]} chunks"
    if selection is not None:
        second += f"; {selection.count:,} of {selection.mask.size:,} chunks satisfy {selection.expression}"
    if limits is not None:
        pairs = zip(plane.bands, limits, strict=True)
        bands = ", ".join(f"{band}: {_short(low)} to {_short(high)}" for band, (low, high) in pairs)
        second += f"; bands stretched ({bands})"
    return [first, second]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _compose(
    panels: list[draw.Pixels],
    caption: list[str],
    palette: Mapping[str, draw.Colour],
    classes: Mapping[str, int],
    note: str,
) -> "PillowImage.Image":
    from PIL import Image

    images = [Image.fromarray(panel) for panel in panels]
    if images[0].width <= 1.7 * images[0].height:
        images = [draw.side_by_side(images)]
    width = max(images[0].width, MIN_WIDTH)
    parts: list[Any] = [(caption[0], 17, draw.INK), (caption[1], 14, draw.FAINT), *images]
    if classes:
        total = sum(classes.values())
        shares = {name: f"{count / total:.0%}" if 200 * count >= total else "< 1%" for name, count in classes.items()}
        parts.append(("Best label of each tile, and its share of the tiles shown:", 14, draw.FAINT))
        parts.append(draw.legend(palette, shares, width))
    elif note:
        parts.append((note, 14, draw.FAINT))
    return draw.sheet(parts, width)
