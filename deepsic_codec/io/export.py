"""Copy an archive out: to plain Zarr, TIFF or PNG, whole or in part, a block at a time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec.axes import Region, chunks_covering, iter_grid
from deepsic_codec.errors import ConfigurationError, LabelIndexError, MissingPackage, UnsupportedArray, WriteError
from deepsic_codec.io import axes as on_axes
from deepsic_codec.io.png import PngWriter
from deepsic_codec.io.staging import Stage
from deepsic_codec.labels.query import open_labels
from deepsic_codec.progress import Progress
from deepsic_codec.stored import embedded as embed
from deepsic_codec.stored import layout as stored
from deepsic_codec.stored import location as places
from deepsic_codec.stored.geometry import Geometry

BLOCK = 1 << 24  # samples read, decoded and written at once; bounds memory
TILE = 16  # pixels: edges of TIFF tiles are multiples of it
IN_FLIGHT = 8  # chunks read at once, of a block of which only some match
SUFFIXES = {".tif": "tiff", ".tiff": "tiff", ".png": "png"}
KINDS = ("zarr", "tiff", "png")
CODECS = ("blosc", "none")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    kind : str
        zarr, tiff or png.
    targets : list of str
        The array, or the files.
    shape, dtype
        Of what was exported.
    region : list of [int, int]
        Start and stop along each axis of the source.
    chunks : int
        Chunks of the source that were decoded.
    left_out : int
        Chunks within the region that do not satisfy the query; they hold the fill value.
    nbytes : int
        Bytes of its samples.
    seconds : float
        Time it took.
    resumed : bool
        Whether an interrupted run was continued.
    """

    kind: str
    targets: list[str]
    shape: tuple[int, ...]
    dtype: str
    region: list[list[int]]
    chunks: int
    left_out: int
    nbytes: int
    seconds: float
    resumed: bool = False


def export(
    source: Any,
    target: str | Path,
    name: str | None = None,
    *,
    kind: str | None = None,
    where: str | None = None,
    region: Mapping[str, slice | int] | None = None,
    crop: bool = False,
    codec: str = "blosc",
    zarr_format: int | None = None,
    overwrite: bool = False,
    index: Any = None,
    progress: Progress | None = None,
) -> Exported:
    """Decode an array and write it in a format that needs nothing of this package.

    A block of chunks is in memory at a time. Nothing that looks complete is there before it is: files are written
    under another name and renamed, arrays get their metadata last. An array that was interrupted goes on where it
    stopped when the same call is made again; files start again.

    Parameters
    ----------
    source, name
        The array, as for `deepsic_codec.open_archive`.
    target : str or Path
        Where to: a path or URL for Zarr, a path for TIFF and PNG. With axes beside y, x and c, there is one file for
        each of their slices, numbered before the suffix.
    kind : {"zarr", "tiff", "png"}, optional
        What to write; by default what the suffix of `target` says, zarr if none.
    where : str, optional
        Copy only chunks of which a label tile satisfies this expression; the others hold the fill value.
    region : mapping, optional
        Part to copy: position or slice along axes, by letter or name. Positions keep their axis.
    crop : bool
        With `where`, copy only the smallest region that has all these chunks.
    codec : {"blosc", "none"}
        Compression of Zarr (Blosc with Zstd), and none for TIFF instead of Deflate. PNG has its own.
    zarr_format : {2, 3}, optional
        That of the source by default.
    overwrite : bool
        Replace an array or file that is there.
    index : optional
        Where the label index is, if not beside the array.
    progress : callable, optional
        Gets the number of blocks that are done and of all.

    Raises
    ------
    ConfigurationError
        For parameters that do not go together.
    UnsupportedArray
        If there is no such array, or the format cannot hold it.
    WriteError
        If there is something at `target` already and `overwrite` is False, or that is no array.
    MissingPackage
        If writing TIFF needs a package that is not installed.
    """
    kind = kind or SUFFIXES.get(Path(str(target)).suffix.lower(), "zarr")
    if kind not in KINDS or codec not in CODECS or zarr_format not in (None, 2, 3):
        given = f"{kind}, {codec}, {zarr_format}"
        raise ConfigurationError(f"expected one of {KINDS}, one of {CODECS} and format 2 or 3, got {given}")
    if crop and where is None:
        raise ConfigurationError("crop: needs a query (where) that says to what")
    array = places.open_array(source, name)
    embed.use_embedded(array)
    job = _Job.of(array, region or {}, where, crop, index)
    start = time.perf_counter()
    report = progress or (lambda done, total: None)
    if kind == "zarr":
        targets, resumed = _to_zarr(job, str(target), codec, zarr_format, overwrite, report)
    else:
        targets, resumed = _to_files(job, Path(_local(str(target), kind)), kind, codec, overwrite, report), False
    chunks = _chunks(job)
    return Exported(
        kind,
        targets,
        job.shape,
        str(array.dtype),
        [[part.start, part.stop] for part in job.region],
        len(chunks[0]),
        len(chunks[1]),
        prod(job.shape) * array.dtype.itemsize,
        time.perf_counter() - start,
        resumed,
    )


@dataclass(frozen=True)
class _Job:
    """What to copy.

    Attributes
    ----------
    array : zarr.Array
        The source.
    axes : str
        Roles of its axes.
    region : tuple of slice
        Part of it.
    mask : ndarray, optional
        Which chunks of the source to copy, bool; None for all.
    """

    array: zarr.Array
    axes: str
    region: Region
    mask: NDArray[np.bool_] | None = None
    where: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, array: zarr.Array, region: Mapping[str, slice | int], where: str | None, crop: bool, index: Any
    ) -> _Job:
        config = stored.codec_of(array)
        part = on_axes.to_region(array, config.axes, region)
        nodata = config.parameters().get("nodata")
        if where is None:
            return cls(array, config.axes, part, options={"nodata": nodata})
        try:
            labels = open_labels(array, index=index)
        except LabelIndexError:
            if index is not None:
                raise
            labels = open_labels(array, scan=True)
        mask = labels.where(where).mask
        inside = np.zeros(mask.shape, np.bool_)
        first, stop = chunks_covering(part, array.chunks)
        block = tuple(slice(a, b) for a, b in zip(first, stop, strict=True))
        inside[block] = mask[block]
        if not inside.any():
            raise UnsupportedArray(f"nothing to export: no chunk of array {array.path!r} there satisfies {where}")
        if crop:
            found = np.argwhere(inside)
            geometry = Geometry.of(array, config.axes, config.label_tile)
            ends = geometry.chunk_region(found.min(axis=0).tolist()), geometry.chunk_region(found.max(axis=0).tolist())
            part = tuple(
                slice(max(a.start, low.start), min(a.stop, high.stop)) for a, low, high in zip(part, *ends, strict=True)
            )
        return cls(array, config.axes, part, inside, where, {"nodata": nodata})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is copied."""
        return tuple(part.stop - part.start for part in self.region)

    @property
    def fill(self) -> Any:
        """What chunks hold that are not copied."""
        return 0 if self.array.fill_value is None else self.array.fill_value

    def read(self, part: Region) -> NDArray[Any]:
        """Read a part of the region, given in its own coordinates."""
        pairs = zip(part, self.region, strict=True)
        at = tuple(slice(p.start + whole.start, p.stop + whole.start) for p, whole in pairs)
        first, stop = chunks_covering(at, self.array.chunks)
        wanted = None if self.mask is None else self.mask[tuple(slice(a, b) for a, b in zip(first, stop, strict=True))]
        if wanted is None or wanted.all():
            return np.asarray(self.array[at])
        out = np.full([p.stop - p.start for p in at], self.fill, self.array.dtype)

        def one(chunk: tuple[int, ...]) -> None:
            inside = tuple(
                slice(max(p.start, i * n), min(p.stop, (i + 1) * n))
                for p, i, n in zip(at, chunk, self.array.chunks, strict=True)
            )
            to = tuple(slice(a.start - p.start, a.stop - p.start) for a, p in zip(inside, at, strict=True))
            out[to] = np.asarray(self.array[inside])

        chosen = [tuple(a + b for a, b in zip(first, place, strict=True)) for place in np.argwhere(wanted).tolist()]
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(one, chosen))
        return out

    def attributes(self) -> dict[str, Any]:
        """Attributes of the copy: those of the source, but for what is about this codec; moved, if it is a part."""
        from deepsic_codec.labels.vocabulary import ATTRIBUTE

        attributes = {key: value for key, value in self.array.attrs.asdict().items() if key != ATTRIBUTE}
        transform = self.transform()
        return attributes | ({} if transform is None else {"transform": transform})

    def transform(self) -> list[float] | None:
        """Map coordinates of the copy's pixels, as `deepsic ingest` stores them, None if the source has none."""
        given = self.array.attrs.get("transform")
        if not isinstance(given, list | tuple) or len(given) != 6:
            return None
        try:
            a, b, c, d, e, f = (float(number) for number in given)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
        y, x = (self.region[self.axes.index(axis)].start for axis in "yx")
        return [a, b, c + a * x + b * y, d, e, f + d * x + e * y]


def _chunks(job: _Job) -> tuple[list[Any], list[Any]]:
    """Chunks of the source that were copied, and those of the region that were not."""
    indices = list(iter_grid(*chunks_covering(job.region, job.array.chunks)))
    if job.mask is None:
        return indices, []
    mask = job.mask
    return [index for index in indices if mask[index]], [index for index in indices if not mask[index]]


def _blocks(shape: tuple[int, ...], chunks: tuple[int, ...]) -> list[Region]:
    """Cut a region into blocks of whole chunks, in order; they grow along the last axes first, as files are written."""
    counts = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        limit = -(-shape[axis] // chunks[axis])
        while counts[axis] < limit and 2 * prod(counts) * prod(chunks) <= BLOCK:
            counts[axis] = min(2 * counts[axis], limit)
        if counts[axis] < limit:
            break
    steps = [count * chunk for count, chunk in zip(counts, chunks, strict=True)]
    starts = np.ndindex(*(-(-size // step) for size, step in zip(shape, steps, strict=True)))
    return [
        tuple(slice(i * step, min((i + 1) * step, size)) for i, step, size in zip(place, steps, shape, strict=True))
        for place in starts
    ]


def _to_zarr(
    job: _Job, target: str, codec: str, zarr_format: int | None, overwrite: bool, progress: Progress
) -> tuple[list[str], bool]:
    source = job.array
    version = zarr_format or source.metadata.zarr_format
    chunks = tuple(min(chunk, size) for chunk, size in zip(source.chunks, job.shape, strict=True))
    names = list(getattr(source.metadata, "dimension_names", None) or source.attrs.get("_ARRAY_DIMENSIONS") or job.axes)  # type: ignore[arg-type]
    attributes = job.attributes()
    options: dict[str, Any] = {"dimension_names": names} if version == 3 else {}
    attributes.pop("_ARRAY_DIMENSIONS", None)
    if version == 2:
        attributes["_ARRAY_DIMENSIONS"] = names
    fill = job.fill if version == 3 else source.fill_value
    made = zarr.create_array(
        zarr.storage.MemoryStore(),
        shape=job.shape,
        chunks=chunks,
        dtype=source.dtype,
        fill_value=fill,
        compressors=_compressor(codec, version),
        zarr_format=2 if version == 2 else 3,
        attributes=attributes,
        **options,
    )
    request = {
        "source": str(source.store_path),
        "metadata": source.metadata.to_dict(),
        "region": [[part.start, part.stop] for part in job.region],
        "where": job.where,
        "codec": codec,
        "zarr_format": version,
    }
    stage = Stage(target, made, request, overwrite, apart_from=str(source.store_path))
    copy, done = stage.array, stage.done
    resumed = done > 0
    blocks = _blocks(job.shape, chunks)
    progress(done, len(blocks))
    for number in range(done, len(blocks)):
        copy[blocks[number]] = job.read(blocks[number])
        stage.save(number + 1)
        progress(number + 1, len(blocks))
    stage.finish()
    return [target], resumed


def _compressor(codec: str, version: int) -> Any:
    if codec == "none":
        return None
    if version == 2:
        from numcodecs import Blosc

        return Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE)
    return zarr.codecs.BloscCodec(cname="zstd", clevel=5)


def _local(target: str, kind: str) -> str:
    if "://" in target and not target.startswith("file://"):
        raise ConfigurationError(f"{target}: {kind} is written to a local path; export there, then copy the file")
    return target.removeprefix("file://")


def _to_files(job: _Job, target: Path, kind: str, codec: str, overwrite: bool, progress: Progress) -> list[str]:
    slices = [axis for axis in job.axes if axis not in "yxc"]
    sizes = [job.shape[job.axes.index(axis)] for axis in slices]
    channels = job.shape[job.axes.index("c")] if "c" in job.axes else 1
    write = _png if kind == "png" else _tiff()
    if kind == "png" and (channels not in (1, 3) or job.array.dtype not in (np.uint8, np.uint16)):
        raise UnsupportedArray(
            f"{channels} bands of {job.array.dtype}: PNG holds 1 or 3 of uint8 or uint16; choose bands with --region "
            "c=0:3, or write TIFF"
        )
    planes: list[tuple[Path, dict[str, int]]] = []
    for place in np.ndindex(*sizes):
        at = dict(zip(slices, place, strict=True))
        number = "".join(
            f"_{axis}{at[axis] + job.region[job.axes.index(axis)].start:0{len(str(size - 1))}d}"
            for axis, size in zip(slices, (job.array.shape[job.axes.index(axis)] for axis in slices), strict=True)
        )
        many = prod(sizes) > 1
        planes.append((target.with_name(f"{target.stem}{number}{target.suffix}") if many else target, at))
    for path, _ in planes:
        if path.is_dir() or (path.exists() and not overwrite):
            message = f"{path}: there is something already; choose another target, or --overwrite a file"
            raise WriteError(message, [str(path)])
    if not target.parent.is_dir():
        raise WriteError(f"{target.parent}: there is no such folder", [str(target)])
    plane = _Plane(job, {})
    total, done = plane.count * len(planes), 0
    progress(0, total)
    for path, at in planes:
        part = path.with_name(f".{path.name}.part")
        try:

            def step() -> None:
                nonlocal done
                done += 1
                progress(done, total)

            write(part, _Plane(job, at), codec, step)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    return [str(path) for path, _ in planes]


@dataclass(frozen=True)
class _Plane:
    """One image of the region: positions along axes other than y, x and c."""

    job: _Job
    at: Mapping[str, int]

    @property
    def height(self) -> int:
        return self.job.shape[self.job.axes.index("y")]

    @property
    def width(self) -> int:
        return self.job.shape[self.job.axes.index("x")]

    @property
    def channels(self) -> int:
        return self.job.shape[self.job.axes.index("c")] if "c" in self.job.axes else 1

    @property
    def chunk(self) -> tuple[int, int]:
        return self.job.array.chunks[self.job.axes.index("y")], self.job.array.chunks[self.job.axes.index("x")]

    @property
    def blocks(self) -> list[tuple[slice, slice]]:
        """Rows and columns, as many chunks at once as memory is meant for."""
        shape = (self.height, self.width, self.channels)
        cost = prod(self.job.array.chunks) // (self.chunk[0] * self.chunk[1])
        blocks = _blocks((*shape[:2], max(cost, self.channels)), (*self.chunk, max(cost, self.channels)))
        return [(block[0], block[1]) for block in blocks]

    @property
    def count(self) -> int:
        """Blocks of an image."""
        return len(self.blocks)

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Read a part, (H, W, bands)."""
        part = []
        for axis, size in zip(self.job.axes, self.job.shape, strict=True):
            start = self.at.get(axis, 0)
            other = slice(0, size) if axis == "c" else slice(start, start + 1)
            part.append({"y": rows, "x": columns}.get(axis, other))
        values = on_axes.moved(self.job.read(tuple(part)), self.job.axes)
        return np.ascontiguousarray(values.reshape(values.shape[-3:]))

    def strips(self) -> Iterator[tuple[slice, NDArray[Any], int]]:
        """Yield full rows, a row of blocks at a time, and how many blocks that were."""
        rows: slice | None = None
        for block_rows, columns in self.blocks:
            if rows != block_rows:
                rows, parts = block_rows, []
            parts.append(self.read(block_rows, columns))
            if columns.stop == self.width:
                yield block_rows, np.concatenate(parts, axis=1), len(parts)


def _png(path: Path, plane: _Plane, codec: str, step: Callable[[], None]) -> None:
    with open(path, "wb") as file:
        writer = PngWriter(file, plane.height, plane.width, plane.channels, plane.job.array.dtype)
        for _, values, count in plane.strips():
            writer.write(values)
            for _ in range(count):
                step()
        writer.close()


def _tiff() -> Callable[[Path, _Plane, str, Callable[[], None]], None]:
    if find_spec("rasterio"):
        return _rasterio
    if find_spec("tifffile"):
        return _tifffile
    raise MissingPackage("writing TIFF needs rasterio or tifffile: pip install 'deepsic-codec[ingest]'")


def _tile(plane: _Plane) -> tuple[int, int]:
    """Edges of TIFF tiles: those of chunks where the format allows it."""
    rows, columns = (min(edge, 1024) if edge % TILE == 0 else 512 for edge in plane.chunk)
    return rows, columns


def _rasterio(path: Path, plane: _Plane, codec: str, step: Callable[[], None]) -> None:
    import warnings

    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.windows import Window

    dtype = plane.job.array.dtype
    rows, columns = _tile(plane)
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": plane.height,
        "width": plane.width,
        "count": plane.channels,
        "dtype": dtype.name,
        "tiled": True,
        "blockysize": rows,
        "blockxsize": columns,
        "bigtiff": "if_safer",
        "interleave": "pixel",
    }
    if codec != "none":
        profile |= {"compress": "deflate", "predictor": 3 if dtype.kind == "f" else 2}
    if dtype == np.uint8 and plane.channels == 3:
        profile["photometric"] = "rgb"
    profile |= _georeference(plane)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as file:
            for part in plane.blocks:
                values = plane.read(*part)
                window = Window(part[1].start, part[0].start, values.shape[1], values.shape[0])
                file.write(np.moveaxis(values, -1, 0), window=window)
                step()


def _georeference(plane: _Plane) -> dict[str, Any]:
    """Coordinate system, transform and NoData for rasterio, as far as they are known and it takes them."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError
    from rasterio.transform import Affine

    found: dict[str, Any] = {}
    attributes, transform = plane.job.array.attrs, plane.job.transform()
    if transform is not None:
        found["transform"] = Affine(*transform)
    with contextlib.suppress(CRSError, TypeError):
        if attributes.get("crs"):
            found["crs"] = CRS.from_user_input(attributes["crs"])
    nodata = plane.job.options.get("nodata")
    nodata = attributes.get("nodata") if nodata is None else nodata
    with contextlib.suppress(TypeError, ValueError):
        number = float(nodata)  # type: ignore[arg-type]
        dtype = plane.job.array.dtype
        if dtype.kind == "f" or np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
            found["nodata"] = number
    return found


def _tifffile(path: Path, plane: _Plane, codec: str, step: Callable[[], None]) -> None:
    import tifffile

    rows, columns = _tile(plane)

    def tiles() -> Iterator[NDArray[Any]]:
        """Cut rows of blocks into tiles; rows that do not fill one wait for the next."""
        waiting: list[NDArray[Any]] = []
        for strip, values, count in plane.strips():
            waiting.append(values)
            held = sum(map(len, waiting))
            if held >= rows or strip.stop == plane.height:
                joined = np.concatenate(waiting)
                full = held if strip.stop == plane.height else held // rows * rows
                for top in range(0, full, rows):
                    for left in range(0, plane.width, columns):
                        tile = joined[top : min(top + rows, full), left : left + columns]
                        missing = [(0, rows - tile.shape[0]), (0, columns - tile.shape[1]), (0, 0)]
                        yield np.pad(tile, missing)[..., 0] if plane.channels == 1 else np.pad(tile, missing)
                waiting = [joined[full:]]
            for _ in range(count):
                step()

    shape = (plane.height, plane.width) + ((plane.channels,) if plane.channels > 1 else ())
    with tifffile.TiffWriter(path, bigtiff=prod(shape) * plane.job.array.dtype.itemsize > 1 << 31) as file:
        file.write(
            tiles(),
            shape=shape,
            dtype=plane.job.array.dtype,
            tile=(rows, columns),
            compression=None if codec == "none" else "zlib",
            planarconfig="contig" if plane.channels > 1 else None,
            photometric="rgb" if plane.channels == 3 else "minisblack",
            metadata=None,
        )
