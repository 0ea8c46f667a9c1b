"""Draw a small picture of an array with its labels, from a sample of the chunks if there are many."""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec import config
from deepsic_codec.axes import Index, Region, ceil_div
from deepsic_codec.bulk.preview import ReducedArray
from deepsic_codec.errors import ConfigurationError, UnsupportedArray, counted
from deepsic_codec.io import draw
from deepsic_codec.io.region import Part, axis_number, open_index, select_chunks, to_region
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.colours import Colour, colours
from deepsic_codec.labels.index import MISSING
from deepsic_codec.labels.query import Labels
from deepsic_codec.labels.selection import Selection
from deepsic_codec.payload.limits import check_count
from deepsic_codec.payload.quality_map import CELL, grid_of
from deepsic_codec.progress import Progress, no_progress
from deepsic_codec.require import require
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import Counter, url_of
from deepsic_codec.stored.reader import PayloadStart, label_end, map_end

if TYPE_CHECKING:
    from PIL import Image as PillowImage

MAX_CHUNKS = 1 << 14  # the same: each costs a request
MAX_PIXELS = 1 << 25  # decoded for a picture (33 megapixels: some seconds), unless `everything` is set
MAX_TABLE = 1 << 26  # bytes of tile scores that are read from an index
IN_FLIGHT = 8  # chunks that are read and decoded at once
MAX_ZOOM = 4
MIN_SIZE = 16  # pixels
MIN_WIDTH = 480  # pixels of the sheet, so that captions fit
NO_DATA = (236, 236, 236)
# Classes of qualities, and colours from dark to bright.
QUALITIES: dict[str, Colour] = {
    "errors do not matter": (60, 60, 60),
    "quality below 20": (68, 1, 84),
    "20 to 39": (59, 82, 139),
    "40 to 59": (33, 144, 141),
    "60 to 79": (93, 201, 99),
    "80 to 99": (253, 231, 37),
    "100 and more": (255, 255, 255),
}
QUALITY_STEP = 20

Box = tuple[slice, slice]  # rows and columns of the picture
Tiles = Mapping[Index, NDArray[Any]]  # a value for each tile of a chunk, (rows, columns)
_Legend = tuple[str, Mapping[str, Colour], Mapping[str, int]]  # heading, colours, numbers of tiles


@dataclass(frozen=True)
class Preview:
    """A picture and its contents.

    Attributes
    ----------
    image : PIL.Image.Image
        The picture, with captions and a legend.
    chunks, decoded : int
        Chunks of the plane that is shown, and the number of those that were decoded.
    sampled : bool
        Whether decoded chunks stand for their neighbours.
    scale : int
        Rows and columns of the array in one of those that were decoded.
    bytes_read : int
        Bytes of chunks that were read.
    classes : dict of str to int
        Numbers of label tiles by their best class.
    qualities : dict of str to int
        Numbers of squares of 16 x 16 pixels by their quality, if they are shown.
    limits : list of (float, float) or None
        Values shown as black and white, for each band; None if samples are shown unchanged.
    """

    image: "PillowImage.Image"
    chunks: int
    decoded: int
    sampled: bool
    scale: int = 1
    bytes_read: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    qualities: dict[str, int] = field(default_factory=dict)
    limits: list[tuple[float, float]] | None = None


def preview(
    source: Any,
    name: str | None = None,
    *,
    size: int = 1024,
    labels: bool | None = None,
    quality_map: bool = False,
    where: str | None = None,
    select: Mapping[str, Part] | None = None,
    bands: Sequence[int] | None = None,
    stretch: bool | None = None,
    everything: bool = False,
    index: Any = None,
    progress: Progress = no_progress,
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
    quality_map : bool
        Whether to add an image with the qualities of chunks, and of their squares of 16 x 16 pixels where a chunk has a
        map of them.
    where : str, optional
        Expression of labels. The picture dims everything that does not satisfy it; of a large array, only chunks that
        satisfy it are decoded. Without an index, the headers of all chunks are read.
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
    progress : callable
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
        If there is no label index at `index`.
    MissingPackage
        If Pillow is not installed.
    """
    require("cli", "PIL")
    if size < MIN_SIZE:
        raise ConfigurationError(f"size: expected at least {MIN_SIZE} pixels, got {size}")
    counter = Counter()
    stored = StoredArray.open(source, name, counter=counter)
    embedded.use_embedded(stored.array)
    plane = _plane(stored, select or {}, bands)
    indexed = open_index(stored.array, index)
    selection = None if where is None else select_chunks(stored.array, indexed, where)

    zoom = min(size / max(plane.shape), MAX_ZOOM)
    shape = max(1, round(plane.shape[0] * zoom)), max(1, round(plane.shape[1] * zoom))
    plane = replace(plane, scale=_scale(plane, zoom))
    boxes, side = _choose(plane, shape, everything, _candidates(plane, indexed, selection))
    end = map_end if quality_map else label_end
    starts = {chunk: start for chunk, start in stored.reader.starts(boxes, end) if start is not None}
    values = np.full((*shape, len(plane.bands)), np.nan, np.float32)
    for number, (chunk, samples) in enumerate(_decoded(plane, list(starts)), 1):
        values[boxes[chunk]] = draw.shrink(samples, *values[boxes[chunk]].shape[:2])
        progress(number, len(starts))
    pixels, limits = to_pixels(values, plane.stored, stretch)
    if selection is not None:
        matches = np.zeros(shape, np.bool_)
        _paint(matches, plane, boxes, selection.geometry.tile, _matches(plane, boxes, selection))
        pixels = draw.dim(pixels, matches)
    panels = [pixels]

    classes: dict[str, int] = {}
    legends: list[_Legend] = []
    show_labels = where is None if labels is None else labels
    if show_labels:
        names, geometry, tiles = _best_labels(plane, indexed, starts)
        counts = Tally(number for grid in tiles.values() for number in grid[grid >= 0].tolist())
        classes = {names[number]: count for number, count in counts.most_common()}
        palette = colours(names)
        if classes:
            numbers = np.full(shape, -1)
            _paint(numbers, plane, boxes, geometry.tile, tiles)
            numbers[np.isnan(values).any(axis=-1)] = -1
            panels.append(draw.tint(pixels, numbers, np.array([palette[name] for name in names], np.uint8)))
            legends.append(("Best label of each tile, and its share of the tiles shown:", palette, classes))
    qualities: dict[str, int] = {}
    if quality_map:
        cells = _qualities(plane, starts)
        tally = Tally(number for grid in cells.values() for number in grid.ravel().tolist())
        qualities = {name: tally[number] for number, name in enumerate(QUALITIES) if tally[number]}
        numbers = np.full(shape, -1)
        _paint(numbers, plane, boxes, (CELL, CELL), cells)
        panels.append(draw.tint(pixels, numbers, np.array(list(QUALITIES.values()), np.uint8)))
        legends.append(("Quality, and its share of what is shown:", QUALITIES, qualities))

    caption = _caption(plane, len(boxes), len(starts), side, selection, limits)
    note = "No labels in these chunks." if show_labels and not classes else ""
    image = _compose(panels, caption, legends, note)
    chunks = prod(plane.grid)
    return Preview(image, chunks, len(starts), side > 1, plane.scale, counter.bytes, classes, qualities, limits)


@dataclass(frozen=True)
class _Plane:
    """The plane along y and x that is shown.

    `region` is one position along all other axes but bands, and whole along y, x and c. Chunks are read at a `scale` of
    1/scale.
    """

    stored: StoredArray
    region: Region
    bands: tuple[int, ...]
    scale: int = 1

    @property
    def yx(self) -> tuple[int, int]:
        """Numbers of the axes y and x."""
        return self.stored.axes.y, self.stored.axes.x

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.stored.shape[self.yx[0]], self.stored.shape[self.yx[1]]

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks along y and x."""
        return self.stored.grid[self.yx[0]], self.stored.grid[self.yx[1]]

    def index(self, row: Any, column: Any) -> tuple[Any, ...]:
        """Return the position of a chunk in the grid of the array; with several chunks of bands, of the first band."""
        index: list[Any] = [part.start // chunk for part, chunk in zip(self.region, self.stored.chunks, strict=True)]
        index[self.yx[0]], index[self.yx[1]] = row, column
        if self.stored.axes.c is not None:
            index[self.stored.axes.c] = self.bands[0] // self.stored.chunks[self.stored.axes.c]
        return tuple(index)

    def read(self, index: Index) -> NDArray[Any]:
        """Read and decode the bands of a chunk, (H, W, bands), with NaN for pixels without data."""
        region, reduced = list(self.region), ReducedArray(self.stored, self.scale)
        for axis in self.yx:
            part = self.stored.geometry.chunk_region(index)[axis]
            start = part.start // self.scale
            stop = min(ceil_div(part.stop, self.scale), reduced.shape[axis])
            region[axis] = slice(start, max(stop, start + 1))
        first = min(self.bands)
        if self.stored.axes.c is not None:
            region[self.stored.axes.c] = slice(first, max(self.bands) + 1)
        values = self.stored.axes.to_samples(np.asarray(reduced[tuple(region)]))[0]
        values = values[..., [band - first for band in self.bands]]
        nodata = self.stored.params.nodata
        if nodata is None or nodata == "NaN":
            return values
        missing = (values == nodata).all(axis=-1, keepdims=True)
        return np.where(missing, np.float32(np.nan), values) if missing.any() else values

    def tiles(self, index: Index, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values of the plane among those of all label tiles of a chunk: (rows, columns)."""
        axes, chunks = self.stored.axes, self.stored.chunks
        part = [slice(None)] * len(axes)
        for axis in (axes.index(letter) for letter in axes.slice_axes):
            position = self.region[axis].start - index[axis] * chunks[axis]
            part[axis] = slice(position, position + 1)
        return axes.to_samples(values[tuple(part)])[0, ..., 0]

    def tiles_of(self, index: Index, values: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
        """Return the values of the plane in a chunk among those of all label tiles of the array."""
        return self.tiles(index, values[geometry.tiles_of(index, [i + 1 for i in index])])


def _plane(stored: StoredArray, select: Mapping[str, Part], bands: Sequence[int] | None) -> _Plane:
    axes, array = stored.axes, stored.array
    if not min(array.shape):
        raise ConfigurationError(f"array {array.path!r} has no samples; its shape is {array.shape}")
    positions: dict[str, Part] = dict.fromkeys(axes.slice_axes, 0)
    for name, part in select.items():
        axis = axes[axis_number(name, axes, stored.dimension_names)]
        if isinstance(part, slice) or axis in "yxc":
            raise ConfigurationError(f"select {name}: expected one position along an axis other than y, x and c")
        positions[axis] = part
    count = axes.bands(array.shape)
    chosen = tuple(bands) if bands else (0, 1, 2) if count >= 3 else (0,)
    if len(chosen) not in (1, 3) or not all(0 <= band < count for band in chosen):
        raise ConfigurationError(f"bands: expected one or three numbers from 0 to {count - 1}, got {list(chosen)}")
    return _Plane(stored, to_region(array, axes, positions), chosen)


def _scale(plane: _Plane, zoom: float) -> int:
    """Return the smallest size that chunks have at their start and that has as many pixels as the picture."""
    for scale in (16, 8, 4, 2):
        if scale * zoom <= 1:
            with suppress(UnsupportedArray):
                ReducedArray(plane.stored, scale)
                return scale
    return 1


def _candidates(plane: _Plane, indexed: Labels | None, selection: Selection | None) -> NDArray[np.bool_] | None:
    """Tell which chunks of the plane are worth decoding, None for all, as far as index and selection tell."""
    if selection is not None:
        mask = selection.mask
    elif indexed is not None and plane.stored.geometry.count <= MAX_TABLE:
        mask = np.asarray(indexed.index.source[...]) != MISSING
    else:
        return None
    mask = mask[plane.index(slice(None), slice(None))]
    return mask if plane.yx[0] < plane.yx[1] else mask.T


def _choose(
    plane: _Plane, shape: tuple[int, int], everything: bool, candidates: NDArray[np.bool_] | None
) -> tuple[dict[Index, Box], int]:
    """Choose a chunk for each block of `side` x `side` chunks; return the boxes that the chunks fill, and `side`."""
    axes, chunks = plane.stored.axes, plane.stored.chunks
    cost = axes.pixels(chunks) * len({band // axes.bands(chunks) for band in plane.bands}) // plane.scale**2

    def is_sample(side: int) -> bool:
        count = prod(ceil_div(n, side) for n in plane.grid)
        return cost * count <= MAX_PIXELS and count <= MAX_CHUNKS

    side = 1
    if everything:
        check_count(prod(plane.grid), "drawing all chunks", UnsupportedArray)
    else:
        side += bisect_left(range(1, max(plane.grid)), True, key=is_sample)
    edges = []
    for axis, size, pixels in zip(plane.yx, plane.shape, shape, strict=True):
        step = side * chunks[axis]
        edges.append([round(min(edge, size) / size * pixels) for edge in range(0, size + step, step)])
    boxes = {}
    for row, column in np.ndindex(*(len(part) - 1 for part in edges)):
        box = slice(*edges[0][row : row + 2]), slice(*edges[1][column : column + 2])
        if any(edge.start == edge.stop for edge in box):
            continue
        i, j = ((min(side, n - at * side) - 1) // 2 for n, at in zip(plane.grid, (row, column), strict=True))
        if side > 1 and candidates is not None:  # of a small array, chunks that do not match are drawn, too, dimmed
            part = candidates[row * side : (row + 1) * side, column * side : (column + 1) * side]
            positions = np.argwhere(part)
            if not len(positions):
                continue
            closest = np.abs(positions - (np.array(part.shape) - 1) / 2).sum(axis=1).argmin()
            i, j = positions[closest].tolist()
        boxes[plane.index(row * side + i, column * side + j)] = box
    return boxes, side


def _decoded(plane: _Plane, chunks: Sequence[Index]) -> Iterator[tuple[Index, NDArray[Any]]]:
    """Yield the samples of chunks, decoded a few at a time."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for start in range(0, len(chunks), IN_FLIGHT):
            part = chunks[start : start + IN_FLIGHT]
            yield from zip(part, config.pool_map(pool, plane.read, part), strict=True)


def to_pixels(
    values: NDArray[np.float32], stored: StoredArray, stretch: bool | None = None
) -> tuple[draw.Pixels, list[tuple[float, float]] | None]:
    """Return samples (..., bands) of an array as RGB, NaN as light grey, and the values that are black and white."""
    dtype = stored.array.dtype
    if stretch is None:
        stretch = dtype != np.uint8 or stored.axes.bands(stored.shape) not in (1, 3)
    limits = draw.stretch_limits(values) if stretch else None
    info = np.iinfo(dtype) if dtype.kind in "iu" else None
    full = (0.0, 1.0) if info is None else (float(info.min), float(info.max))
    pixels = draw.to_grey_levels(values, limits or [full] * values.shape[-1], brighten=bool(limits))
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    pixels[np.isnan(values).any(axis=-1)] = NO_DATA
    return pixels, limits


def _matches(plane: _Plane, chunks: Collection[Index], selection: Selection) -> Tiles:
    """Tell which tiles of chunks satisfy the expression."""
    grid = np.zeros(selection.geometry.tile_grid, np.bool_)
    grid[tuple(selection.tiles.T)] = True
    return {chunk: plane.tiles_of(chunk, grid, selection.geometry) for chunk in chunks}


def _best_labels(
    plane: _Plane, indexed: Labels | None, starts: Mapping[Index, PayloadStart]
) -> tuple[list[str], Geometry, Tiles]:
    """Return the names of classes, and the number of the best class of each tile, -1 for none.

    Labels come from the index if it is small enough, otherwise from the headers. Names are in the order of the
    vocabulary, so that a colour does not depend on what happens to be shown.
    """
    if indexed is not None and indexed.index.tile_scores.size <= MAX_TABLE:
        names = list(indexed.vocabulary.names)
        scores = np.asarray(indexed.index.tile_scores[...])[: len(names)]
        best = np.where(scores.max(axis=0) > 0, scores.argmax(axis=0), -1)
        return names, indexed.geometry, {chunk: plane.tiles_of(chunk, best, indexed.geometry) for chunk in starts}
    geometry = plane.stored.geometry
    attributes = Attributes(plane.stored)
    numbers: dict[str, int] = {}
    tiles = {}
    for chunk, start in starts.items():
        labels = attributes.of(chunk, start)["labels"]
        if not labels:
            continue
        for name in attributes.vocabulary(start.header).names:
            numbers.setdefault(name, len(numbers))
        best = np.array([numbers[max(tile, key=tile.__getitem__)] if tile else -1 for tile in labels])
        rows, columns = (geometry.per_chunk[axis] for axis in plane.yx)
        tiles[chunk] = plane.tiles(chunk, geometry.arrange(best.reshape(-1, rows, columns, 1), chunk)[0])
    return list(numbers), geometry, tiles


def _qualities(plane: _Plane, starts: Mapping[Index, PayloadStart]) -> Tiles:
    """Return the numbers in `QUALITIES` of the cells of chunks that have a quality."""
    cells = {}
    for chunk, start in starts.items():
        header = start.header
        if not start.quantised:
            continue
        rows, columns = grid_of(header.height, header.width)
        qualities = start.qualities()
        if qualities is None:
            qualities = np.full((header.slices, rows, columns), header.quality)
        numbers = np.where(qualities > 0, 1 + qualities // QUALITY_STEP, 0).clip(0, len(QUALITIES) - 1).astype(int)
        sizes = dict(zip(header.axes, header.shape, strict=True)) | {"y": rows, "x": columns, "c": 1}
        values = header.axes.from_samples(numbers[..., None], [sizes[axis] for axis in header.axes])
        cells[chunk] = plane.tiles(chunk, values)
    return cells


def _paint(
    canvas: NDArray[Any], plane: _Plane, boxes: Mapping[Index, Box], tile: tuple[int, int], tiles: Tiles
) -> None:
    """Set the pixels that show a chunk to the values of its tiles, of a size in pixels of the array."""
    for chunk, values in tiles.items():
        region = plane.stored.geometry.chunk_region(chunk)
        numbers = []
        for axis, edge, size, count in zip(plane.yx, boxes[chunk], tile, values.shape, strict=True):
            pixels = edge.stop - edge.start
            samples = (np.arange(pixels) + 0.5) / pixels * (region[axis].stop - region[axis].start)
            numbers.append(np.minimum(samples // size, count - 1).astype(int))
        canvas[boxes[chunk]] = values[np.ix_(*numbers)]


def _caption(
    plane: _Plane,
    chosen: int,
    decoded: int,
    side: int,
    selection: Selection | None,
    limits: list[tuple[float, float]] | None,
) -> list[str]:
    array, axes = plane.stored.array, plane.stored.axes
    first = f"{url_of(array.store_path)}: {' x '.join(map(str, array.shape))} {array.dtype}"
    first += "".join(f", {axis}={plane.region[axes.index(axis)].start}" for axis in axes.slice_axes)
    if plane.stored.params.quality is not None:
        first += f", quality {plane.stored.params.quality:g}"
    second = f"{decoded:,} of {counted(prod(plane.grid), 'chunk')} decoded"
    if side > 1:
        second = f"a sample: {second}, each for a block of {side} x {side} chunks"
    elif chosen > decoded:
        second += f", {chosen - decoded} without data"
    if selection is not None:
        second += f"; {selection.count:,} of {counted(selection.mask.size, 'chunk')} satisfy {selection.expression}"
    if limits is not None:
        pairs = zip(plane.bands, limits, strict=True)
        second += f"; bands stretched ({', '.join(f'{band}: {low:.4g} to {high:.4g}' for band, (low, high) in pairs)})"
    return [first, second]


def _compose(
    panels: list[draw.Pixels],
    caption: list[str],
    legends: list[_Legend],
    note: str,
) -> "PillowImage.Image":
    from PIL import Image

    images = [Image.fromarray(panel) for panel in panels]
    if images[0].width <= 1.7 * images[0].height:
        images = [draw.side_by_side(images)]
    width = max(images[0].width, MIN_WIDTH)
    parts: list[Any] = [(caption[0], 17, draw.INK), (caption[1], 14, draw.FAINT), *images]
    for heading, palette, counts in legends:
        total = sum(counts.values())
        shares = {name: f"{count / total:.0%}" if 200 * count >= total else "< 1%" for name, count in counts.items()}
        parts.append((heading, 14, draw.FAINT))
        parts.append(draw.legend({name: palette[name] for name in counts}, shares, width))
    if note:
        parts.append((note, 14, draw.FAINT))
    return draw.sheet(parts, width)
