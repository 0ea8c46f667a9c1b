"""A picture of an array: small, with its labels over it, from few chunks where there are many."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec import config
from deepsic_codec.axes import Axes, Index
from deepsic_codec.errors import ConfigurationError, LabelIndexError
from deepsic_codec.io import draw
from deepsic_codec.io.region import axis_number, to_region
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.index import MISSING
from deepsic_codec.labels.query import Labels, Selection, open_labels
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray, dimension_names
from deepsic_codec.stored.geometry import Geometry

if TYPE_CHECKING:
    from PIL import Image as PillowImage

PIXELS = 1 << 25  # decoded at most for a picture (33 megapixels: some seconds), unless all are asked for
SCAN = 4096  # chunks: more are not scanned for a query where there is no index
TABLE = 1 << 26  # bytes of tile scores that are read of an index
IN_FLIGHT = 8  # chunks read and decoded at once
ENLARGE = 4  # times at most
NO_DATA = (236, 236, 236)


@dataclass(frozen=True)
class Preview:
    """A picture, and what it shows.

    Attributes
    ----------
    image : PIL.Image.Image
        With captions and legend.
    chunks, shown : int
        Chunks of the plane that is shown, and how many of them were decoded.
    sampled : bool
        Whether they stand for others beside them.
    classes : dict of str to int
        Label tiles shown by their best class.
    limits : list of (float, float) or None
        Values that became black and white, for each band; None if samples are shown as they are.
    """

    image: PillowImage.Image
    chunks: int
    shown: int
    sampled: bool
    classes: dict[str, int] = field(default_factory=dict)
    limits: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class _Cell:
    """A chunk, the pixels of the picture that it fills (rows and columns from, to), and how much of it fits there.

    `size` is that in pixels of the array: a chunk that stands for a smaller block at the edge is cut, not squeezed.
    """

    index: Index
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def preview(
    source: Any,
    name: str | None = None,
    *,
    size: int = 1024,
    labels: bool | None = None,
    where: str | None = None,
    select: Mapping[str, slice | int] | None = None,
    bands: Sequence[int] | None = None,
    stretch: bool | None = None,
    everything: bool = False,
    index: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Preview:
    """Draw a small picture of an array.

    Parameters
    ----------
    source, name
        The array, as for `deepsic_codec.open_archive`.
    size : int
        Longer edge of the image in pixels.
    labels : bool, optional
        Whether to show a second image with the best label of each tile; by default if there is no `where`.
    where : str, optional
        Show where this expression holds and dim the rest; of a large array, only chunks that it selects are decoded.
    select : mapping, optional
        Position along axes other than y, x and c, by letter or name; 0 by default.
    bands : sequence of int, optional
        One or three bands to show; the first ones by default.
    stretch : bool, optional
        Whether to scale values between their percentiles; by default for all but uint8 of one or three bands.
    everything : bool
        Decode all chunks of the plane.
    index : optional
        Where the label index is, if not beside the array.
    progress : callable, optional
        Gets the number of chunks that are done and of all to do.

    Raises
    ------
    UnsupportedArray
        If there is no such array.
    ConfigurationError
        If axes, positions or bands are not those of the array.
    ExpressionError
        If `where` cannot be read.
    LabelIndexError
        If a large array has no index to answer `where` from.
    """
    if size < 16:
        raise ConfigurationError(f"size: expected at least 16 pixels, got {size}")
    stored = StoredArray.open(source, name)
    array, config, geometry = stored.array, stored.params, stored.geometry
    embedded.use_embedded(array)
    plane = _Plane(array, config.axes, select or {}, bands)
    labels = where is None if labels is None else labels
    opened = _index(array, geometry, index)
    found = None if where is None else _query(array, where, opened, geometry)
    cells, step = _choose(plane, geometry, size, everything, _candidates(plane, geometry, opened, found))
    attributes = Attributes(stored)
    heads = dict(stored.reader.starts([cell.index for cell in cells]))
    height, width = plane.picture(size)
    values = np.full((height, width, len(plane.bands)), np.nan, np.float32)
    there = [cell for cell in cells if heads[cell.index] is not None]
    for number, (cell, part) in enumerate(_parts(array, plane, there, config.parameters().get("nodata"))):
        top, bottom, left, right = cell.box
        values[top:bottom, left:right] = draw.shrink(part[: cell.size[0], : cell.size[1]], bottom - top, right - left)
        if progress is not None:
            progress(number + 1, len(there))
    pixels, limits = _pixels(values, array, plane, stretch)
    panels = [pixels if found is None else draw.dim(pixels, _matching(found, plane, geometry, cells, pixels.shape[:2]))]
    entries: dict[str, draw.Colour] = {}
    classes: dict[str, int] = {}
    if labels:
        tiles = _best(array, plane, geometry, opened, there, attributes, heads)
        named = _known_names(tiles, opened, attributes, heads)
        palette = draw.colours(named)
        numbers = _painted(
            {cell: tiles[cell.index] for cell in there if cell.index in tiles}, plane, geometry, named, pixels.shape[:2]
        )
        numbers[np.isnan(values).any(axis=-1)] = -1
        counts = Tally(one for grid in tiles.values() for one in grid.ravel().tolist() if one)
        classes = dict(counts.most_common())
        entries = {one: palette[one] for one in classes}
        colours = np.array([palette[one] for one in named] or [draw.GREY], np.uint8)
        if classes:
            panels.append(draw.tint(panels[0], numbers, colours))
    caption = _caption(array, plane, config.quality, cells, there, step, found, limits, everything)
    note = "No labels in these chunks." if labels and not classes else ""
    image = _compose(panels, caption, entries, classes, note)
    return Preview(image, plane.count, len(there), step != (1, 1), classes, limits)


class _Plane:
    """The y-x plane of an array that is shown: positions along its other axes, and bands."""

    def __init__(
        self, array: zarr.Array, axes: str, select: Mapping[str, slice | int], bands: Sequence[int] | None
    ) -> None:
        self.array, self.axes = array, axes
        self.y, self.x, self.c = axes.index("y"), axes.index("x"), axes.find("c")
        for name, part in select.items():
            if isinstance(part, slice) or axes[axis_number(name, axes, dimension_names(array, axes))] in "yxc":
                raise ConfigurationError(f"select {name}: expected one position along an axis other than y, x and c")
        self.region = list(to_region(array, axes, select))
        for number, axis in enumerate(axes):
            if axis not in "yxc" and self.region[number] == slice(0, array.shape[number]):
                self.region[number] = slice(0, 1)
        self.fixed = {axis: self.region[number].start for number, axis in enumerate(axes) if axis not in "yxc"}
        count = array.shape[self.c] if self.c >= 0 else 1
        self.bands = list(bands) if bands else [0, 1, 2] if count >= 3 else [0]
        if len(self.bands) not in (1, 3) or not all(0 <= band < count for band in self.bands):
            raise ConfigurationError(f"bands: expected one or three of 0 to {count - 1}, got {self.bands}")
        self.shape = array.shape[self.y], array.shape[self.x]
        self.chunk = array.chunks[self.y], array.chunks[self.x]
        self.grid = -(-self.shape[0] // self.chunk[0]), -(-self.shape[1] // self.chunk[1])
        if not min(self.shape):
            raise ConfigurationError(f"array {array.path!r} is empty: {array.shape}")

    @property
    def count(self) -> int:
        """Chunks along y and x."""
        return self.grid[0] * self.grid[1]

    @property
    def cost(self) -> int:
        """Pixels decoded for one chunk of the plane: all slices in it, and all chunks of bands."""
        sizes = [size for size, axis in zip(self.array.chunks, self.axes, strict=True) if axis != "c"]
        parts = 1 if self.c < 0 else len({band // self.array.chunks[self.c] for band in self.bands})
        return int(np.prod(sizes)) * parts

    def picture(self, size: int) -> tuple[int, int]:
        """Height and width of the picture."""
        scale = min(size / max(self.shape), ENLARGE)
        return max(1, round(self.shape[0] * scale)), max(1, round(self.shape[1] * scale))

    def index(self, row: int, column: int) -> Index:
        """Position of a chunk in the grid of chunks, that of the first band shown."""
        place = [part.start // chunk for part, chunk in zip(self.region, self.array.chunks, strict=True)]
        place[self.y], place[self.x] = row, column
        if self.c >= 0:
            place[self.c] = self.bands[0] // self.array.chunks[self.c]
        return tuple(place)

    def read(self, index: Index) -> NDArray[Any]:
        """Read the bands shown of a chunk, (H, W, n)."""
        region = list(self.region)
        for axis in (self.y, self.x):
            chunk, size = self.array.chunks[axis], self.array.shape[axis]
            region[axis] = slice(index[axis] * chunk, min((index[axis] + 1) * chunk, size))
        if self.c >= 0:
            region[self.c] = slice(min(self.bands), max(self.bands) + 1)
        values = Axes(self.axes).to_samples(np.asarray(self.array[tuple(region)]))[0]
        return values[..., [band - min(self.bands) for band in self.bands]]


def _index(array: zarr.Array, geometry: Geometry, index: Any) -> Labels | None:
    try:
        return open_labels(array, index=index)
    except LabelIndexError:
        if index is not None:
            raise
        return None


def _query(array: zarr.Array, where: str, opened: Labels | None, geometry: Geometry) -> Selection:
    if opened is None:
        if geometry.count > SCAN:
            raise LabelIndexError(
                f"array {array.path!r} has {geometry.count:,} chunks and no label index; run deepsic index first"
            )
        opened = open_labels(array, scan=True)
    return opened.where(where)


def _candidates(
    plane: _Plane, geometry: Geometry, opened: Labels | None, found: Selection | None
) -> NDArray[np.bool_] | None:
    """Which chunks of the plane are worth decoding, None if nothing is known."""
    if found is not None:
        mask = found.mask
    elif opened is not None and geometry.count <= TABLE:
        mask = np.asarray(opened.index.source[...]) != MISSING
    else:
        return None
    place: list[Any] = list(plane.index(0, 0))
    place[plane.y] = place[plane.x] = slice(None)
    flat = mask[tuple(place)]
    return flat if plane.y < plane.x else flat.T


def _choose(
    plane: _Plane, geometry: Geometry, size: int, everything: bool, candidates: NDArray[np.bool_] | None
) -> tuple[list[_Cell], tuple[int, int]]:
    """Choose the chunks to decode, each for a block of chunks around it; returns the shape of such a block, too."""
    budget = plane.count if everything else max(1, PIXELS // plane.cost)
    side = 1
    while -(-plane.grid[0] // side) * -(-plane.grid[1] // side) > budget:
        side += 1
    step = min(side, plane.grid[0]), min(side, plane.grid[1])
    height, width = plane.picture(size)

    def edge(number: int, axis: int) -> int:
        pixels = (height, width)[axis]
        return round(min(number * step[axis] * plane.chunk[axis], plane.shape[axis]) / plane.shape[axis] * pixels)

    cells = []
    for row in range(-(-plane.grid[0] // step[0])):
        for column in range(-(-plane.grid[1] // step[1])):
            block = np.ones(plane.grid, np.bool_) if candidates is None else candidates
            block = block[row * step[0] : (row + 1) * step[0], column * step[1] : (column + 1) * step[1]]
            places_ = np.argwhere(block)
            box = edge(row, 0), edge(row + 1, 0), edge(column, 1), edge(column + 1, 1)
            if box[0] == box[1] or box[2] == box[3]:
                continue
            if not len(places_):
                # Nothing matches here: of a small array show it all the same, dimmed.
                if side > 1:
                    continue
                places_ = np.zeros((1, 2), int)
            middle = np.abs(places_ - (np.array(block.shape) - 1) / 2).sum(axis=1).argmin()
            i, j = places_[middle].tolist()
            index = plane.index(row * step[0] + i, column * step[1] + j)
            fits = [_fits(plane, index, axis, first, step[axis]) for axis, first in enumerate((row, column))]
            cells.append(_Cell(index, box, (fits[0], fits[1])))
    return cells, step


def _fits(plane: _Plane, index: Index, axis: int, block: int, step: int) -> int:
    """Pixels along an axis that are drawn of a chunk: all, unless its block is cut by the edge of the array."""
    chunk, size = plane.chunk[axis], plane.shape[axis]
    inside = min(chunk, size - index[(plane.y, plane.x)[axis]] * chunk)
    covered = min(step * chunk, size - block * step * chunk)
    return max(1, min(inside, round(covered / step)))


def _parts(
    array: zarr.Array, plane: _Plane, cells: Sequence[_Cell], nodata: Any
) -> Iterator[tuple[_Cell, NDArray[Any]]]:
    """Yield chunks, decoded a few at a time, NaN where there is no data."""

    def one(cell: _Cell) -> NDArray[Any]:
        values = plane.read(cell.index)
        if nodata is None or nodata == "NaN":
            return values
        missing = (values == nodata).all(axis=-1)
        return np.where(missing[..., None], np.float32(np.nan), values) if missing.any() else values

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for start in range(0, len(cells), IN_FLIGHT):
            some = cells[start : start + IN_FLIGHT]
            yield from zip(some, config.pool_map(pool, one, some), strict=True)


def _pixels(
    values: NDArray[np.float32], array: zarr.Array, plane: _Plane, stretch: bool | None
) -> tuple[draw.Pixels, list[tuple[float, float]] | None]:
    channels = array.shape[plane.c] if plane.c >= 0 else 1
    if stretch is None:
        stretch = array.dtype != np.uint8 or channels not in (1, 3)
    limits = draw.stretch_limits(values) if stretch else None
    full = [(0.0, 255.0)] if array.dtype == np.uint8 else [_full(array.dtype)]
    pixels = draw.to_grey_levels(values, limits or full * len(plane.bands), brighten=bool(limits))
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
    pixels[np.isnan(values).any(axis=-1)] = NO_DATA
    return pixels, limits


def _full(dtype: np.dtype) -> tuple[float, float]:
    return (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)) if dtype.kind in "iu" else (0.0, 1.0)


def _best(
    array: zarr.Array,
    plane: _Plane,
    geometry: Geometry,
    opened: Labels | None,
    cells: Sequence[_Cell],
    attributes: Attributes,
    heads: Mapping[Index, Any],
) -> dict[Index, NDArray[np.object_]]:
    """Name of the best class of each tile of the plane, (rows, columns) by chunk; None for a tile without labels."""
    if opened is not None and int(np.prod(opened.index.tile_scores.shape)) <= TABLE:
        return _best_of_index(plane, opened, cells)
    result = {}
    for cell in cells:
        attrs = attributes.of(cell.index, heads[cell.index])
        if not attrs["labels"]:
            continue
        tile = attrs["tile_shape"]
        rows, columns = (-(-size // edge) for size, edge in zip(plane.chunk, tile, strict=True))
        sizes = [chunk for chunk, axis in zip(array.chunks, plane.axes, strict=True) if axis not in "yxc"]
        place = [plane.fixed[axis] % chunk for axis, chunk in zip(plane.fixed, sizes, strict=True)]
        number = int(np.ravel_multi_index(place, sizes)) if sizes else 0
        names = [max(tile, key=tile.__getitem__) if tile else None for tile in attrs["labels"]]
        grid = np.array(names, object).reshape(-1, rows, columns)[number]
        result[cell.index] = _sized(grid, tile, plane, cell)
    return result


def _sized(grid: NDArray[np.object_], tile: Sequence[int], plane: _Plane, cell: _Cell) -> NDArray[np.object_]:
    """Cut tiles off that lie outside of the array."""
    inside = [
        min(chunk, size - cell.index[axis] * chunk)
        for axis, chunk, size in zip((plane.y, plane.x), plane.chunk, plane.shape, strict=True)
    ]
    return grid[: -(-inside[0] // tile[0]), : -(-inside[1] // tile[1])]


def _best_of_index(plane: _Plane, opened: Labels, cells: Sequence[_Cell]) -> dict[Index, NDArray[np.object_]]:
    names = opened.vocabulary.names
    scores = np.asarray(opened.index.tile_scores[...])[: len(names)]
    best = scores.argmax(axis=0)
    labelled = scores.max(axis=0) > 0
    result = {}
    for cell in cells:
        part: list[Any] = list(opened.geometry.tiles_of(cell.index, [i + 1 for i in cell.index]))
        for number, axis in enumerate(plane.axes):
            if axis in plane.fixed:
                part[number] = slice(plane.fixed[axis], plane.fixed[axis] + 1)
        found: Any = np.array(names, object)[best[tuple(part)]]
        found[~labelled[tuple(part)]] = None
        result[cell.index] = Axes(plane.axes).to_samples(found)[0, ..., 0]
    return result


def _known_names(
    tiles: Mapping[Index, NDArray[np.object_]],
    opened: Labels | None,
    attributes: Attributes,
    heads: Mapping[Index, Any],
) -> list[str]:
    """Names in the order of the vocabulary, so that colours do not depend on what happens to be shown."""
    known: dict[str, None] = {} if opened is None else dict.fromkeys(opened.vocabulary.names)
    if opened is None:
        for index in tiles:
            known |= dict.fromkeys(attributes.vocabulary(heads[index].header).names)
    return list(known)


def _painted(
    tiles: Mapping[_Cell, NDArray[np.object_]],
    plane: _Plane,
    geometry: Geometry,
    names: Sequence[str],
    shape: tuple[int, ...],
) -> NDArray[np.int64]:
    """Number of the class of every pixel of the picture, -1 for none."""
    numbers = np.full(shape, -1, np.int64)
    of = {name: number for number, name in enumerate(names)}
    for cell, grid in tiles.items():
        values = np.array([[of.get(name, -1) for name in row] for row in grid.tolist()], np.int64)
        top, bottom, left, right = cell.box
        numbers[top:bottom, left:right] = _enlarged(values, cell, plane, geometry)
    return numbers


def _enlarged(grid: NDArray[Any], cell: _Cell, plane: _Plane, geometry: Geometry) -> NDArray[Any]:
    """Repeat the tiles of a chunk for the pixels that show them."""
    top, bottom, left, right = cell.box
    places_ = []
    for k, pixels in enumerate((bottom - top, right - left)):
        number = (np.arange(pixels) + 0.5) / pixels * cell.size[k] // geometry.tile[k]
        places_.append(np.minimum(number, grid.shape[k] - 1).astype(int))
    return grid[np.ix_(*places_)]


def _matching(
    found: Selection, plane: _Plane, geometry: Geometry, cells: Sequence[_Cell], shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Which pixels of the picture show tiles that satisfy the expression."""
    geometry = found.labels.geometry
    grid = np.zeros(geometry.tile_grid, np.bool_)
    grid[tuple(found.tiles.T)] = True
    shown = np.zeros(shape, np.bool_)
    for cell in cells:
        part: list[Any] = list(geometry.tiles_of(cell.index, [i + 1 for i in cell.index]))
        for number, axis in enumerate(plane.axes):
            if axis in plane.fixed:
                part[number] = slice(plane.fixed[axis], plane.fixed[axis] + 1)
        tiles = Axes(plane.axes).to_samples(grid[tuple(part)])[0].any(axis=-1)
        top, bottom, left, right = cell.box
        shown[top:bottom, left:right] = _enlarged(tiles, cell, plane, geometry)
    return shown


def _caption(
    array: zarr.Array,
    plane: _Plane,
    quality: float | None,
    cells: Sequence[_Cell],
    there: Sequence[_Cell],
    step: tuple[int, int],
    found: Selection | None,
    limits: Any,
    everything: bool,
) -> list[str]:
    place = str(array.store_path).removeprefix("file://")
    at = "".join(f", {axis}={number}" for axis, number in plane.fixed.items())
    first = f"{place}: {' x '.join(map(str, array.shape))} {array.dtype}{at}"
    if quality is not None:
        first += f", quality {quality:g}"
    if step == (1, 1):
        second = f"{len(there)} of {plane.count} chunks decoded"
        missing = len(cells) - len(there)
        second += f", {missing} without data" if missing else ""
    else:
        second = (
            f"a sample: {len(there):,} of {plane.count:,} chunks, each drawn over the {step[0]} x {step[1]} chunks "
            "that it stands for"
        )
    if found is not None:
        second += f"; {found.count:,} of {found.mask.size:,} chunks satisfy {found.expression}"
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
    entries: dict[str, draw.Colour],
    classes: Mapping[str, int],
    note: str,
) -> PillowImage.Image:
    from PIL import Image

    images = [Image.fromarray(panel) for panel in panels]
    beside = len(images) > 1 and images[0].width <= 1.7 * images[0].height
    body = [draw.side_by_side(images)] if beside else images
    width = max(body[0].width, 480)
    parts: list[Any] = [(caption[0], 17, draw.INK), (caption[1], 14, draw.FAINT), *body]
    if entries:
        total = sum(classes.values())
        shares = {name: f"{count / total:.0%}" if 200 * count >= total else "< 1%" for name, count in classes.items()}
        parts += [("Best label of each tile, and its part of the tiles shown:", 14, draw.FAINT)]
        parts += [draw.legend(entries, shares, width)]
    elif note:
        parts += [(note, 14, draw.FAINT)]
    return draw.sheet(parts, width)
