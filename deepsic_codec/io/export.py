"""Copy an array out of an archive: to plain Zarr, TIFF or PNG, as a whole or in part."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec import config
from deepsic_codec.axes import Axes, Index, Region, chunk_region, chunks_covering, grid_shape, iter_grid
from deepsic_codec.errors import ConfigurationError, UnsupportedArray, WriteError
from deepsic_codec.io import georeference
from deepsic_codec.io.region import Part, open_index, select_chunks, to_region
from deepsic_codec.io.temporary import complete_only
from deepsic_codec.io.zarr_target import new_group_member, target_path, write_array
from deepsic_codec.labels.vocabulary import ATTRIBUTE
from deepsic_codec.progress import Progress, no_progress
from deepsic_codec.require import require
from deepsic_codec.stored import coordinates
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.embedded import use_embedded
from deepsic_codec.stored.location import refresh_consolidated

BLOCK = 1 << 24  # samples that are read, decoded and written at once; bounds memory
PNG_LIMIT = 1 << 28  # samples of a PNG file, which is in memory as a whole
TILE_STEP = 16  # pixels: edges of TIFF tiles are multiples of it
TILE_MIN, TILE_MAX = 128, 1024  # pixels: edges of TIFF tiles, if chunks have no shorter one
READERS = 8  # chunks read at once, of a block from which chunks are left out
SUFFIXES = {".tif": "tiff", ".tiff": "tiff", ".png": "png"}
KINDS = ("zarr", "tiff", "png")
CODECS = ("blosc", "none")


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes
    ----------
    kind : str
        zarr, tiff or png.
    targets : list of str
        The array, or the files.
    shape, dtype
        Shape and dtype of the copy.
    region : list of [int, int]
        Start and stop along each axis of the source.
    chunks : int
        Number of chunks of the source that were decoded.
    left_out : int
        Number of chunks in the region that do not satisfy the query. The copy has the fill value there.
    nbytes : int
        Bytes of the samples.
    seconds : float
        Duration of the export.
    """

    kind: str
    targets: list[str]
    shape: Index
    dtype: str
    region: list[list[int]]
    chunks: int
    left_out: int
    nbytes: int
    seconds: float


def export(
    source: Any,
    target: str | Path,
    name: str | None = None,
    *,
    kind: str | None = None,
    where: str | None = None,
    region: Mapping[str, Part] | None = None,
    crop: bool = False,
    codec: str = "blosc",
    zarr_format: int | None = None,
    overwrite: bool = False,
    index: Any = None,
    progress: Progress = no_progress,
) -> Exported:
    """Decode an array and write it in a format that other software reads without this package.

    Zarr and TIFF are written block by block, PNG as a whole. An export that fails leaves nothing at the target that
    looks complete: files are written under a temporary name, and an array gets its metadata last. On a local path, a
    file or array that was to be replaced is still there. To continue a failed export, repeat the call.

    Parameters
    ----------
    source, name
        The array, as for `deepsic_codec.open_archive`.
    target : str or Path
        A path or URL for Zarr, a path for TIFF and PNG. For Zarr it is that of the array if it lies in a group or an
        array is there, else that of a new group, in which the array keeps its name, or is called "image". For files, if
        the array has axes other than y, x and c, each of their slices becomes one, numbered before the suffix.
    kind : {"zarr", "tiff", "png"}, optional
        Format of the copy. The default follows from the suffix of `target`, and is zarr for unknown suffixes.
    where : str, optional
        Copy only chunks of which a label tile satisfies this expression. The copy has the fill value in the others.
    region : mapping, optional
        Part to copy: a position or slice by the letter or name of an axis. Positions keep their axis.
    crop : bool
        With `where`, copy only the smallest region that contains these chunks.
    codec : {"blosc", "none"}
        Compression: "blosc" is Blosc with Zstd for Zarr, and Deflate for TIFF. PNG is always compressed.
    zarr_format : {2, 3}, optional
        Zarr format of the copy; by default, that of the source.
    overwrite : bool
        Replace an existing array or file.
    index : optional
        Location of the label index, if it is not beside the array.
    progress : callable
        Called with the number of blocks that are written, and of all.

    Returns
    -------
    Exported
        What was written.

    Raises
    ------
    ConfigurationError
        If parameters do not fit together.
    UnsupportedArray
        If there is no such array, or the format cannot store it.
    WriteError
        If the target exists and `overwrite` is False, or the target is no array.
    MissingPackage
        If a package that writes the format is not installed.
    """
    kind = kind or SUFFIXES.get(Path(str(target)).suffix.lower(), "zarr")
    if kind not in KINDS or codec not in CODECS or zarr_format not in (None, 2, 3):
        raise ConfigurationError(
            f"expected one of {KINDS}, one of {CODECS} and Zarr format 2 or 3, got {kind}, {codec} and {zarr_format}"
        )
    if crop and where is None:
        raise ConfigurationError("crop: needs a query (where) that selects the chunks to crop to")
    stored = StoredArray.open(source, name)
    use_embedded(stored.array)
    start = time.perf_counter()
    request = _request(stored, region or {}, where, crop, index)
    if kind == "zarr":
        to_format = zarr_format or stored.array.metadata.zarr_format
        targets = [_write_zarr(request, str(target), codec, to_format, overwrite, progress)]
    else:
        targets = _write_files(request, str(target), kind, codec, overwrite, progress)
    copied, left_out = request.count_chunks()
    return Exported(
        kind,
        targets,
        request.shape,
        str(request.dtype),
        [[part.start, part.stop] for part in request.region],
        copied,
        left_out,
        prod(request.shape) * request.dtype.itemsize,
        time.perf_counter() - start,
    )


@dataclass(frozen=True)
class ExportRequest:
    """The part of an array to copy; with a `mask` (grid of chunks), only chunks where it is True."""

    stored: StoredArray
    region: Region
    mask: NDArray[np.bool_] | None = None

    @property
    def axes(self) -> Axes:
        """Axes of the copy."""
        return self.stored.axes

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""
        return np.dtype(self.stored.array.dtype)

    @property
    def shape(self) -> Index:
        """Shape of the copy."""
        return tuple(part.stop - part.start for part in self.region)

    def count_chunks(self) -> tuple[int, int]:
        """Return the number of chunks in the region that are copied, and of those that are not."""
        start, stop = chunks_covering(self.region, self.stored.chunks)
        total = prod(last - first for first, last in zip(start, stop, strict=True))
        copied = total if self.mask is None else int(self.mask[_slices(start, stop)].sum())
        return copied, total - copied

    def read(self, part: Region) -> NDArray[Any]:
        """Read a part of the copy, in coordinates of the copy."""
        region = tuple(
            slice(inner.start + outer.start, inner.stop + outer.start)
            for inner, outer in zip(part, self.region, strict=True)
        )
        start, stop = chunks_covering(region, self.stored.chunks)
        if self.mask is None or self.mask[_slices(start, stop)].all():
            return np.asarray(self.stored.array[region])
        values = np.full([item.stop - item.start for item in region], self.stored.fill_value, self.dtype)

        def read_chunk(index: Index) -> None:
            chunk = chunk_region(index, self.stored.chunks, self.stored.shape)
            common = _intersection(region, chunk)
            to = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(common, region, strict=True))
            values[to] = np.asarray(self.stored.array[common])

        with ThreadPoolExecutor(READERS) as pool:
            list(config.pool_map(pool, read_chunk, (index for index in iter_grid(start, stop) if self.mask[index])))
        return values

    @cached_property
    def described(self) -> tuple[dict[str, Any], coordinates.Coordinates]:
        """Attributes and coordinates of the copy: those of the source without labels, for the place of the region."""
        array, names = self.stored.array, self.stored.dimension_names
        attributes = {key: value for key, value in array.attrs.asdict().items() if key != ATTRIBUTE}
        beside = coordinates.read(array, names)
        parts = coordinates.part(attributes, beside, self.axes, names, self.region)
        return coordinates.describe(*parts, self.axes, names, self.shape)

    def images(self) -> Iterator[tuple[str, "ExportRequest"]]:
        """Yield the slices of the copy, each with a text such as "_t03" that tells its position."""
        axes = [self.axes.index(axis) for axis in self.axes.slice_axes]
        for position in np.ndindex(*(self.shape[axis] for axis in axes)):
            region, text = list(self.region), ""
            for axis, offset in zip(axes, position, strict=True):
                start = self.region[axis].start + offset
                region[axis] = slice(start, start + 1)
                text += f"_{self.axes[axis]}{start:0{len(str(self.stored.shape[axis] - 1))}d}"
            yield text, replace(self, region=tuple(region))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and number of bands of a slice."""
        return self.axes.height(self.shape), self.axes.width(self.shape), self.axes.bands(self.shape)

    def row_blocks(self, tile: int = 1) -> list[range]:
        """Cut the rows of a slice into blocks of about `BLOCK` samples: whole tiles, and whole chunks if those fit."""
        height, width, bands = self.image_shape
        chunk = self.axes.height(self.stored.chunks)
        pixel = max(bands, prod(self.stored.chunks) // (chunk * self.axes.width(self.stored.chunks)))
        step = tile if chunk % tile else chunk
        rows = step * max(1, BLOCK // (step * width * pixel))
        return [range(top, min(top + rows, height)) for top in range(0, height, rows)]

    def read_rows(self, rows: range) -> NDArray[Any]:
        """Read rows of a slice, array (rows, width, bands)."""
        part = [slice(0, size) for size in self.shape]
        part[self.axes.y] = slice(rows.start, rows.stop)
        return self.axes.to_samples(self.read(tuple(part)))[0]


def _request(
    stored: StoredArray, parts: Mapping[str, Part], where: str | None, crop: bool, index: Any
) -> ExportRequest:
    region = to_region(stored.array, stored.axes, parts)
    if where is None:
        return ExportRequest(stored, region)
    selected = _slices(*chunks_covering(region, stored.chunks))
    mask = np.zeros(stored.grid, np.bool_)
    labels = open_index(stored.array, index)
    mask[selected] = select_chunks(stored.array, labels, where).mask[selected]
    if not mask.any():
        raise UnsupportedArray(f"nothing to export: no chunk of array {stored.path!r} in this region satisfies {where}")
    if crop:
        indices = np.argwhere(mask)
        first, last = (stored.geometry.chunk_region(end.tolist()) for end in (indices.min(axis=0), indices.max(axis=0)))
        bounds = tuple(slice(a.start, b.stop) for a, b in zip(first, last, strict=True))
        region = _intersection(region, bounds)
    return ExportRequest(stored, region, mask)


def _slices(start: Index, stop: Index) -> Region:
    return tuple(slice(first, last) for first, last in zip(start, stop, strict=True))


def _intersection(a: Region, b: Region) -> Region:
    return tuple(slice(max(i.start, j.start), min(i.stop, j.stop)) for i, j in zip(a, b, strict=True))


def _blocks(shape: Index, chunks: Index) -> list[Region]:
    """Cut a region into blocks of whole chunks, in order. Blocks grow along the last axes first, up to `BLOCK`."""
    block = list(chunks)
    for axis in reversed(range(len(shape))):
        while block[axis] < shape[axis] and 2 * prod(block) <= BLOCK:
            block[axis] *= 2
        if block[axis] < shape[axis]:
            break
    grid = grid_shape(shape, block)
    return [chunk_region(index, block, shape) for index in iter_grid([0] * len(grid), grid)]


def _write_zarr(
    request: ExportRequest, target: str, codec: str, zarr_format: int, overwrite: bool, progress: Progress
) -> str:
    """Return where the array is: at the target if that lies in a group, else in a new group."""
    stored = request.stored
    chunks = tuple(max(1, min(chunk, size)) for chunk, size in zip(stored.chunks, request.shape, strict=True))
    attributes, beside = request.described
    attributes.pop("_ARRAY_DIMENSIONS", None)
    coordinates.set_fill_value(attributes, stored.params.nodata, request.dtype, zarr_format)
    target, name = new_group_member(target, stored.path.rpartition("/")[2] or "image", zarr_format)
    place = target_path(target, read_only=bool(name)) / name
    if beside and not coordinates.can_write(place, beside, zarr_format, replace=overwrite):
        beside = {}
    attributes |= coordinates.references(beside, stored.dimension_names)
    if zarr_format == 2:
        attributes["_ARRAY_DIMENSIONS"] = stored.dimension_names
    template = zarr.create_array(
        zarr.storage.MemoryStore(),
        shape=request.shape,
        chunks=chunks,
        dtype=request.dtype,
        fill_value=stored.fill_value if zarr_format == 3 else stored.array.fill_value,
        compressors=_compressor(codec, zarr_format),
        zarr_format=2 if zarr_format == 2 else 3,
        attributes=attributes,
        dimension_names=stored.dimension_names if zarr_format == 3 else None,
    )
    blocks = _blocks(request.shape, chunks)
    with write_array(target, template, overwrite=overwrite, source=str(stored.array.store_path), name=name) as copy:
        progress(0, len(blocks))
        for number, block in enumerate(blocks, 1):
            copy[block] = request.read(block)
            progress(number, len(blocks))
    place = target_path(target) / name
    coordinates.write(place, beside, zarr_format)
    refresh_consolidated(place, zarr_format, create=True)
    return f"{target}/{name}" if name else target


def _compressor(codec: str, zarr_format: int) -> Any:
    if codec == "none":
        return None
    if zarr_format == 2:
        from numcodecs import Blosc

        return Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE)
    return zarr.codecs.BloscCodec(cname="zstd", clevel=5)


def _write_files(
    request: ExportRequest, target: str, kind: str, codec: str, overwrite: bool, progress: Progress
) -> list[str]:
    """Write one file for each slice; each is written under a temporary name and then renamed."""
    if "://" in target and not target.startswith("file://"):
        raise ConfigurationError(
            f"{target}: {kind} can only be written to a local path; export there, then copy the file"
        )
    first = Path(target.removeprefix("file://"))
    if kind == "png":
        _check_png(request.image_shape, request.dtype)
    else:
        require("images", "tifffile", "imagecodecs")
    if not prod(request.shape):
        raise UnsupportedArray(f"nothing to export: the shape of the copy is {request.shape}")
    images = list(request.images())
    paths = [first.with_name(f"{first.stem}{text}{first.suffix}") for text, _ in images] if len(images) > 1 else [first]
    for path in paths:
        if path.is_dir() or (path.exists() and not overwrite):
            raise WriteError(
                f"{path}: exists already; choose another target, or replace it with --overwrite", [str(path)]
            )
    if not first.parent.is_dir():
        raise WriteError(f"{first.parent}: no such folder; create it first", [target])
    tile = tuple(_tile_edge(request.stored.chunks[axis]) for axis in (request.axes.y, request.axes.x))
    blocks = request.row_blocks(tile[0])
    done, total = 0, len(images) * len(blocks)
    progress(done, total)

    def read_blocks(image: ExportRequest) -> Iterator[NDArray[Any]]:
        nonlocal done
        for rows in blocks:
            values = image.read_rows(rows)
            done += 1
            progress(done, total)
            yield values

    for path, (_, image) in zip(paths, images, strict=True):
        with complete_only(path, "file") as partial:
            if kind == "png":
                _write_png(partial, np.concatenate(list(read_blocks(image))))
            else:
                _write_tiff(partial, image, read_blocks(image), tile, compress=codec != "none")
    return [str(path) for path in paths]


def write_image(path: Path, values: NDArray[Any], kind: str, attributes: Mapping[str, Any] | None = None) -> None:
    """Write one image as a file.

    Parameters
    ----------
    path : Path
        The file.
    values : array (H, W, bands)
        Samples.
    kind : {"png", "tiff"}
        Format.
    attributes : mapping, optional
        Place and meaning of the image, as `deepsic_codec.io.georeference.write` takes them; PNG has none.

    Raises
    ------
    UnsupportedArray
        If PNG cannot store the samples.
    MissingPackage
        If a package that writes the format is not installed.
    """
    if kind == "png":
        _check_png(values.shape, values.dtype)
        _write_png(path, values)
        return
    require("images", "tifffile", "imagecodecs")
    import tifffile

    options = _tiff_options(values.shape[2], values.dtype)
    tifffile.imwrite(path, values if values.shape[2] > 1 else values[..., 0], compression="zlib", **options)
    georeference.write(path, attributes or {})


def image_attributes(stored: StoredArray, region: Region) -> dict[str, Any]:
    """Return the attributes of a file that shows a region of an array."""
    attributes, _ = ExportRequest(stored, region).described
    nodata = stored.params.nodata
    return attributes if nodata is None else {**attributes, "nodata": nodata}


def _check_png(shape: Index, dtype: np.dtype[Any]) -> None:
    height, width, bands = shape
    if bands not in (1, 3) or dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise UnsupportedArray(
            f"PNG holds 1 or 3 bands of uint8 or uint16, not {bands} bands of {dtype}; write TIFF, or select "
            "bands, such as --region c=0:3"
        )
    if prod(shape) > PNG_LIMIT:
        raise UnsupportedArray(
            f"{height} x {width} pixels exceed the limit of PNG ({PNG_LIMIT:,} samples), which is written as a "
            "whole; write TIFF, or select a part with --region"
        )
    require("images", *(("imagecodecs",) if bands == 3 and dtype == np.uint16 else ("PIL",)))


def _write_png(path: Path, values: NDArray[Any]) -> None:
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.shape[2] == 3 and values.dtype == np.uint16:
        import imagecodecs

        path.write_bytes(imagecodecs.png_encode(values))  # Pillow has no colour of 16 bits
        return
    from PIL import Image

    pixels = values if values.shape[2] == 3 else values[..., 0]
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, format="PNG")


def _tiff_options(bands: int, dtype: np.dtype[Any]) -> dict[str, Any]:
    return {
        "photometric": "rgb" if bands == 3 and dtype.kind == "u" else "minisblack",
        "planarconfig": "contig" if bands > 1 else None,
        "metadata": None,
        "software": False,
    }


def _write_tiff(
    path: Path, image: ExportRequest, blocks: Iterator[NDArray[Any]], tile: tuple[int, ...], *, compress: bool
) -> None:
    """Write a tiled TIFF, and the georeference if the array has one. Blocks have whole tiles, but for the last one."""
    import tifffile

    height, width, bands = image.image_shape
    dtype = np.dtype("u1") if image.dtype.kind == "b" else image.dtype  # of 8 bits: predictors need bytes
    rows, columns = tile

    def tiles() -> Iterator[NDArray[Any]]:
        for values in blocks:
            values = np.pad(values.astype(dtype, copy=False), ((0, -len(values) % rows), (0, -width % columns), (0, 0)))
            for top, left in product(range(0, len(values), rows), range(0, width, columns)):
                part = values[top : top + rows, left : left + columns]
                yield part if bands > 1 else part[..., 0]

    with tifffile.TiffWriter(path, bigtiff=height * width * bands * dtype.itemsize > 1 << 31) as file:
        file.write(
            tiles(),
            shape=(height, width, bands) if bands > 1 else (height, width),
            dtype=dtype,
            tile=tile,
            compression="zlib" if compress else None,
            predictor=compress and (dtype.kind == "f" or dtype.itemsize < 8),
            **_tiff_options(bands, dtype),
        )
    georeference.write(path, image_attributes(image.stored, image.region))


def _tile_edge(chunk: int) -> int:
    """Return the edge of TIFF tiles: the largest that divides a chunk, 512 if there is none of a reasonable size."""
    edges = range(min(chunk, TILE_MIN), TILE_MAX + 1)
    return max((edge for edge in edges if edge % TILE_STEP == 0 and chunk % edge == 0), default=512)
