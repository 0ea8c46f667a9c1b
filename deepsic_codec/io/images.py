"""What `deepsic ingest` reads: image files, TIFF and GeoTIFF, folders of them, and Zarr arrays, as lazy Dask arrays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from deepsic_codec import dask as bulk
from deepsic_codec.codec.scaled import DTYPES
from deepsic_codec.errors import ConfigurationError, DeepSICError, SourceError, UnsupportedArray
from deepsic_codec.labels.vocabulary import ATTRIBUTE
from deepsic_codec.stored import layout as stored
from deepsic_codec.stored.location import is_deepsic

if TYPE_CHECKING:
    import dask.array as da

TIFF = (".tif", ".tiff")
PILLOW = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".jp2", ".j2k", ".avif", ".gif")
OTHERS = (".jxl", ".jxr")  # through imagecodecs
SUFFIXES = (*TIFF, *PILLOW, *OTHERS)
NODES = ("zarr.json", ".zarray", ".zgroup")
PILLOW_DEEP: dict[str, np.dtype[Any]] = {  # modes of more than 8 bits
    **dict.fromkeys(("I;16", "I;16L", "I;16B"), np.dtype("u2")),
    "F": np.dtype("f4"),
}
WINDOW = 2048  # pixels: edge of what is read of a GeoTIFF at once
# Names of dimensions as they are in use, and the axes of the codec that they are.
DIMENSIONS = {
    **dict.fromkeys(("y", "lat", "latitude", "northing", "row", "height"), "y"),
    **dict.fromkeys(("x", "lon", "longitude", "easting", "col", "column", "width"), "x"),
    **dict.fromkeys(("c", "band", "bands", "channel", "channels", "rgb"), "c"),
    **dict.fromkeys(("t", "time"), "t"),
    **dict.fromkeys(("z", "depth"), "z"),
    **dict.fromkeys(("n", "image", "sample"), "n"),
}
# Tags of GeoTIFF 1.1 (OGC 19-008r4), and of GDAL.
SCALE, TIEPOINTS, TRANSFORM, GEO_KEYS, GDAL_NODATA = 33550, 33922, 34264, 34735, 42113
CRS_KEYS = (3072, 2048)  # projected, geographic: the value is an EPSG code
USER_DEFINED = 32767


@dataclass(frozen=True)
class ImageSource:
    """Something to be stored as one array.

    Attributes
    ----------
    name : str
        Of the array that it becomes.
    values : dask.array.Array
        Its samples; read when computed.
    axes : str
        Roles of its axes.
    attributes : dict
        What is known of it: `source`, the name of the file; `crs` and `transform` (a, b, c, d, e, f: x = a * column +
        b * row + c, y = d * column + e * row + f) if it is georeferenced; `nodata`; all attributes of a Zarr array.
    """

    name: str
    values: da.Array
    axes: str
    attributes: dict[str, Any] = field(default_factory=dict)


def open_sources(
    places: Iterable[str | Path],
    *,
    axes: str | None = None,
    drop_alpha: bool = False,
    skip: Callable[[str], None] | None = None,
) -> Iterator[ImageSource]:
    """Open files, folders and Zarr arrays.

    Parameters
    ----------
    places : iterable of str or Path
        Image files; folders, whose images are taken in the order of their names, those of folders within included;
        Zarr arrays and groups, also by URL.
    axes : str, optional
        Roles of the axes of Zarr arrays whose dimensions have no telling names.
    drop_alpha : bool
        Take images with transparency without it.
    skip : callable, optional
        Gets the message for what cannot be read, and the rest goes on. All of a file is then read beforehand.

    Yields
    ------
    ImageSource
        One for each file or array.

    Raises
    ------
    SourceError
        If something cannot be read.
    UnsupportedArray
        If it is no image that the codec takes.
    """
    seen: dict[str, Path | str] = {}
    for place, name in _expand(places):
        try:
            if isinstance(place, Path) and place.suffix.lower() in SUFFIXES:
                opened = [_file(place, name, drop_alpha)]
                if skip is not None:
                    _probe(opened[0], place)
            else:
                opened = list(_zarr(place, name, axes))
        except (DeepSICError, OSError) as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        for source in opened:
            if source.name in seen:
                source = replace(source, name=f"{source.name}-{Path(str(place)).suffix.strip('.')}")
            if source.name in seen:
                raise ConfigurationError(f"{seen[source.name]} and {place} would both become array {source.name!r}")
            seen[source.name] = place
            yield source


def stack(sources: Sequence[ImageSource], name: str) -> ImageSource:
    """Join images of equal size into one array with a first axis n.

    Raises
    ------
    UnsupportedArray
        If there is none, or their sizes differ.
    """
    import dask.array as da

    if not sources:
        raise UnsupportedArray("nothing to stack")
    first = sources[0]
    for source in sources:
        if (source.values.shape, source.axes) != (first.values.shape, first.axes):
            raise UnsupportedArray(
                f"{source.name} is {source.values.shape} ({source.axes}), {first.name} {first.values.shape} "
                f"({first.axes}): only images of equal size make a stack"
            )
    if "n" in first.axes:
        raise UnsupportedArray(f"{first.name} has an axis n already ({first.axes})")
    names = [source.attributes.get("source", source.name) for source in sources]
    return ImageSource(name, da.stack([source.values for source in sources]), f"n{first.axes}", {"sources": names})


def _expand(places: Iterable[str | Path]) -> Iterator[tuple[Path | str, str]]:
    """Yield what to read, and what to call it."""
    for given in places:
        text = str(given)
        if "://" in text:
            yield text, Path(text.rstrip("/").rpartition("/")[2]).stem
            continue
        path = Path(text)
        if not path.exists():
            raise SourceError(f"{path}: there is no such file or folder")
        if path.is_file() or _is_node(path):
            yield path, path.stem
            continue
        found = sorted(child for child in path.rglob("*") if child.suffix.lower() in SUFFIXES and child.is_file())
        if not found:
            raise SourceError(f"{path}: a folder without images; known are {', '.join(SUFFIXES)}")
        yield from ((child, child.relative_to(path).with_suffix("").as_posix()) for child in found)


def _is_node(path: Path) -> bool:
    return any((path / name).is_file() for name in NODES)


def _file(path: Path, name: str, drop_alpha: bool) -> ImageSource:
    suffix = path.suffix.lower()
    reader: Callable[[Path, bool], ImageSource] = _imagecodecs if suffix in OTHERS else _pillow
    if suffix in TIFF:
        # rasterio and tifffile read parts of a file, and big ones; Pillow is always there.
        reader = next((read for module, read in _TIFF_READERS if importlib.util.find_spec(module)), _pillow)
    try:
        source = reader(path, drop_alpha)
    except DeepSICError:
        raise
    except Exception as error:  # libraries raise whatever they like for damaged files
        raise SourceError(f"{path}: cannot be read: {error}") from error
    _check_dtype(path, source.values.dtype)
    return replace(source, name=name, attributes={"source": path.name, **source.attributes})


def _check_dtype(place: Path | str, dtype: Any) -> None:
    if np.dtype(dtype).newbyteorder("=") not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise UnsupportedArray(f"{place}: samples of {dtype}, and the codec takes {names}; convert it")


def _probe(source: ImageSource, path: Path) -> None:
    import dask

    with dask.config.set(scheduler="sync"):
        for block in source.values.blocks.ravel():
            block.compute()


def _whole(path: Path, read: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: Any) -> da.Array:
    """Make an array of one block of a file that can only be read as a whole."""
    import dask
    import dask.array as da

    block = dask.delayed(_named(path, read), pure=False)()
    return da.from_delayed(block, shape=shape, dtype=dtype, name=False)


def _named(path: Path, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    def named() -> np.ndarray:
        try:
            return read()
        except Exception as error:
            raise SourceError(f"{path}: cannot be read: {error}") from error

    return named


def _pillow(path: Path, drop_alpha: bool) -> ImageSource:
    from PIL import Image

    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise UnsupportedArray(f"{path}: {frames} images in one file; install tifffile, or save the first")
        alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        if alpha and not drop_alpha:
            raise UnsupportedArray(f"{path}: has transparency, which the codec does not store; drop it (--drop-alpha)")
        dtype: np.dtype[Any] = PILLOW_DEEP.get(image.mode, np.dtype("u1"))
        if image.mode == "I":
            raise UnsupportedArray(f"{path}: samples of 32 bits, which the codec does not take; save it with 16 bits")
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        mode = image.mode if image.mode in PILLOW_DEEP else mode
        shape: tuple[int, ...] = (image.height, image.width) + ((3,) if mode == "RGB" else ())
        tags = dict(image.tag_v2) if hasattr(image, "tag_v2") else {}

    def read() -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image if image.mode == mode else image.convert(mode)).astype(dtype)

    axes = "yxc" if mode == "RGB" else "yx"
    return ImageSource("", _whole(path, read, shape, dtype), axes, georeference(tags))


def _imagecodecs(path: Path, drop_alpha: bool) -> ImageSource:
    if not importlib.util.find_spec("imagecodecs"):
        raise SourceError(f"{path}: needs imagecodecs: pip install imagecodecs")
    import imagecodecs

    first = imagecodecs.imread(str(path))
    if first.ndim not in (2, 3) or (first.ndim == 3 and first.shape[2] not in (1, 3, 4)):
        raise UnsupportedArray(f"{path}: shape {first.shape} is no image in colour or grey")
    alpha = first.ndim == 3 and first.shape[2] == 4
    if alpha and not drop_alpha:
        raise UnsupportedArray(f"{path}: has transparency, which the codec does not store; drop it (--drop-alpha)")

    def read() -> np.ndarray:
        values = imagecodecs.imread(str(path))
        return values[..., :3] if alpha else values

    shape = (*first.shape[:2], 3) if alpha else first.shape
    return ImageSource("", _whole(path, read, shape, first.dtype), "yxc"[: first.ndim])


class _Windows:
    """A raster file that rasterio reads in parts; opened for each, as open files cannot go to other processes."""

    def __init__(self, path: Path, bands: int, height: int, width: int, dtype: np.dtype) -> None:
        self.path, self.bands = path, bands
        self.shape, self.dtype, self.ndim = (height, width, bands), dtype, 3

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        import rasterio
        from rasterio.windows import Window

        rows, columns, bands = (range(*part.indices(size)) for part, size in zip(key, self.shape, strict=True))
        window = Window(columns.start, rows.start, len(columns), len(rows))
        try:
            with rasterio.open(self.path) as file:
                return np.moveaxis(file.read([band + 1 for band in bands], window=window), 0, -1)
        except Exception as error:
            raise SourceError(f"{self.path}: cannot be read: {error}") from error


def _rasterio(path: Path, drop_alpha: bool) -> ImageSource:
    import warnings

    import dask.array as da
    import rasterio
    from rasterio.enums import ColorInterp
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            if file.subdatasets and importlib.util.find_spec("tifffile"):
                return _tifffile(path, drop_alpha)
            bands = file.count
            if bands in (2, 4) and file.colorinterp[-1] == ColorInterp.alpha:
                if not drop_alpha:
                    raise UnsupportedArray(f"{path}: has transparency; drop it (--drop-alpha)")
                bands -= 1
            windows = _Windows(path, bands, file.height, file.width, np.dtype(file.dtypes[0]))
            attributes: dict[str, Any] = {}
            if file.crs:
                attributes["crs"] = file.crs.to_string()
            if not file.transform.is_identity:
                attributes["transform"] = list(file.transform)[:6]
            if file.nodata is not None:
                attributes["nodata"] = "NaN" if file.nodata != file.nodata else file.nodata
    edge = WINDOW if bands <= 4 else WINDOW // 4
    values = da.from_array(
        windows,
        chunks=(edge, edge, bands),
        name=False,
        lock=False,
        fancy=False,
        meta=np.empty((0, 0, 0), windows.dtype),
    )
    return ImageSource("", values if bands > 1 else values[..., 0], "yxc" if bands > 1 else "yx", attributes)


def _tifffile(path: Path, drop_alpha: bool) -> ImageSource:
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes = "".join({"S": "c", "C": "c", "I": "n", "Q": "n"}.get(axis, axis.lower()) for axis in series.axes)
        tags = {tag.code: tag.value for tag in series.keyframe.tags}
        shape, dtype = series.shape, series.dtype
        extra = getattr(series.keyframe, "extrasamples", ())
    keep = [axis for axis, size in enumerate(shape) if size > 1 or axes[axis] in "yx"]
    alpha = bool(extra) and "c" in axes and shape[axes.index("c")] in (2, 4)
    if alpha and not drop_alpha:
        raise UnsupportedArray(f"{path}: has transparency, which the codec does not store; drop it (--drop-alpha)")
    squeezed, sizes = "".join(axes[axis] for axis in keep), [shape[axis] for axis in keep]
    if alpha:
        sizes[squeezed.index("c")] -= 1

    def read() -> np.ndarray:
        values = tifffile.imread(path, series=0).reshape([shape[axis] for axis in keep])
        return values[tuple(slice(size) for size in sizes)]

    return ImageSource("", _whole(path, read, tuple(sizes), dtype), squeezed, georeference(tags))


_TIFF_READERS: tuple[tuple[str, Callable[[Path, bool], ImageSource]], ...] = (
    ("rasterio", _rasterio),
    ("tifffile", _tifffile),
)


def georeference(tags: Mapping[int, Any]) -> dict[str, Any]:
    """Return what the tags of a GeoTIFF say of its place on Earth.

    Parameters
    ----------
    tags : mapping of int to value
        All tags of its first image.

    Returns
    -------
    dict
        `crs`, such as "EPSG:32632", and `transform` as in `ImageSource`, and `nodata`, as far as they are there.
    """
    found: dict[str, Any] = {}
    keys = np.asarray(tags.get(GEO_KEYS, ()), int).ravel()
    codes = {int(k): int(v) for k, place, _, v in keys[4 : 4 + 4 * (len(keys) // 4 - 1)].reshape(-1, 4) if place == 0}
    code = next((codes[key] for key in CRS_KEYS if codes.get(key, USER_DEFINED) != USER_DEFINED), None)
    if code is not None:
        found["crs"] = f"EPSG:{code}"
    matrix, scale, tie = (np.asarray(tags.get(tag, ()), float).ravel() for tag in (TRANSFORM, SCALE, TIEPOINTS))
    # GTRasterTypeGeoKey 2: the tie point is the centre of a pixel, half a pixel from the corner that is meant here.
    shift = 0.5 if codes.get(1025) == 2 else 0.0
    if matrix.size == 16:
        a, b, c, d, e, f = (float(matrix[i]) for i in (0, 1, 3, 4, 5, 7))
        found["transform"] = [a, b, c - shift * (a + b), d, e, f - shift * (d + e)]
    elif scale.size >= 2 and tie.size >= 6:
        width, height = float(scale[0]), float(scale[1])
        column, row, _, x, y, _ = (float(value) for value in tie[:6])
        left, top = x - (column + shift) * width, y + (row + shift) * height
        found["transform"] = [width, 0.0, left, 0.0, -height, top]
    if GDAL_NODATA in tags:
        text = str(tags[GDAL_NODATA]).strip("\0 ")
        try:
            found["nodata"] = "NaN" if text.lower() == "nan" else float(text)
        except ValueError:
            found["nodata"] = text
    return found


def _zarr(place: Path | str, name: str, axes: str | None) -> Iterator[ImageSource]:
    try:
        node = zarr.open(str(place), mode="r")
    except Exception as error:  # every store has errors of its own
        raise SourceError(f"{place}: neither an image file that is known nor a Zarr array: {error}") from error
    if isinstance(node, zarr.Array):
        yield _array(node, str(place), name, axes)
        return
    arrays = [(path, found) for path, found in node.members(max_depth=None) if isinstance(found, zarr.Array)]
    images = [(path, array) for path, array in sorted(arrays) if _may_be_image(path, array)]
    if not images:
        raise SourceError(f"{place}: a group without arrays of 8 or 16 bits and 2 dimensions or more")
    for path, array in images:
        yield _array(array, f"{place}/{path}", path, axes)


def _may_be_image(path: str, array: zarr.Array) -> bool:
    # Not float32: coordinates and masks are, and for images the range of values has to be given anyway.
    image = array.ndim >= 2 and array.dtype.newbyteorder("=") in DTYPES and array.dtype.kind != "f"
    return image and not any(part.endswith("_labels") for part in path.split("/"))


def _array(array: zarr.Array, place: str, name: str, axes: str | None) -> ImageSource:
    import dask.array as da

    _check_dtype(place, array.dtype)
    attributes = {key: value for key, value in array.attrs.items() if key not in (ATTRIBUTE, "_ARRAY_DIMENSIONS")}
    if is_deepsic(array):
        return ImageSource(name, bulk.open(array), stored.codec_of(array).axes, attributes)
    named: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    letters = [DIMENSIONS.get(str(dimension).lower(), "") for dimension in named]
    known = "".join(letters) if len(letters) == array.ndim and all(letters) and len(set(letters)) == array.ndim else ""
    chosen = axes or known
    if not chosen:
        raise UnsupportedArray(
            f"{place}: what its {array.ndim} axes are, nothing says (dimension names: {list(named) or 'none'}); tell "
            "with --axes, such as yxc"
        )
    return ImageSource(name, da.from_zarr(array), chosen, attributes)
