"""Image files as lazy Dask arrays, and as RGB pixels: PNG, JPEG and the like, TIFF, GeoTIFF, JPEG 2000, JPEG XL."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index, Region, ceil_div
from deepsic_codec.codec.scaled import DTYPES
from deepsic_codec.errors import DeepSICError, SourceError, UnsupportedArray
from deepsic_codec.io import draw, georeference
from deepsic_codec.io.require import require

if TYPE_CHECKING:
    import dask.array as da
    from PIL import ImageFile

Pixels = NDArray[np.uint8]

TIFF = (".tif", ".tiff")
JPEG_2000 = (".jp2", ".j2k")
PILLOW = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".avif", ".gif")
IMAGECODECS = {".jxl": "jpegxl_decode", ".jxr": "jpegxr_decode"}  # decoders of imagecodecs
SUFFIXES = (*TIFF, *PILLOW, *JPEG_2000, *IMAGECODECS)
BLOCK_EDGE = 2048  # pixels: edge of the blocks in which TIFF and JPEG 2000 files are read
#: Formats of Pillow that are tried, whatever the name of a file: it has others that start programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "PPM", "AVIF", "GIF", "TIFF", "JPEG2000")
DEEP_MODES = {"I;16": "u2", "I;16L": "u2", "I;16B": "u2", "F": "f4"}  # Pillow's modes of more than 8 bits, their dtypes
GREY_MODES = ("1", "L", "LA", "La")
ALPHA = (1, 2)  # values of the TIFF tag ExtraSamples for associated and unassociated alpha
TIFF_AXES = {"S": "c", "C": "c", "I": "n", "Q": "n"}  # tifffile's letters that differ from ours
AXES = "yxctzn"


@dataclass(frozen=True)
class ImageSource:
    """An image to store as one array.

    Attributes
    ----------
    name : str
        Path of the array in the archive.
    values : dask.array.Array
        Samples. Files are read when they are computed.
    axes : str
        Axes of `values`, such as "yxc".
    attributes : dict
        Attributes of the array: `source` (name of the file); for georeferenced files also `crs`, `transform` and
        `nodata` (see `deepsic_codec.io.georeference`); for Zarr arrays their own attributes.
    """

    name: str
    values: "da.Array"
    axes: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _ImageFile:
    """An image file before its samples are read, with the interface that `dask.array.from_array` needs.

    The shape is that of the image without its alpha channel. `read(region)` opens the file anew, because an open file
    cannot be sent to another process, and returns a part of the image. `block` is the shape of the parts to read.
    """

    path: Path
    shape: Index
    dtype: np.dtype[Any]
    axes: str
    has_alpha: bool
    block: Index
    read: Callable[[Region], NDArray[Any]]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, region: Region) -> NDArray[Any]:
        with _source_errors(self.path):
            return self.read(region)


@contextmanager
def _source_errors(path: Path) -> Iterator[None]:
    """Raise SourceError for errors of libraries, which are of any class for damaged files."""
    try:
        yield
    except DeepSICError:
        raise
    except Exception as error:
        raise SourceError(f"{path}: cannot be read as an image: {error}") from error


def open_image(path: str | Path, *, drop_alpha: bool = False) -> ImageSource:
    """Open an image file.

    Parameters
    ----------
    path : str or Path
        File with a suffix of `SUFFIXES`.
    drop_alpha : bool
        Leave out the alpha channel.

    Returns
    -------
    ImageSource
        Named after the file. TIFF and JPEG 2000 are read in blocks, other files as a whole.

    Raises
    ------
    SourceError
        If the file cannot be read.
    UnsupportedArray
        If the codec cannot store the image: several images in one file, an alpha channel, samples of another dtype.
    MissingPackage
        If the package that reads the format is not installed.
    """
    require("images", "dask")
    import dask.array as da
    from dask.base import tokenize

    path = Path(path)
    suffix = path.suffix.lower()
    with _source_errors(path):
        status = path.stat()
        if suffix in JPEG_2000:
            file = _open_rasterio(path, georeference.JPEG_2000)
        else:
            file = _open_tiff(path) if suffix in TIFF else _open_whole(path)
    if file.has_alpha and not drop_alpha:
        raise UnsupportedArray(f"{path}: the codec cannot store transparency; leave it out with --drop-alpha")
    check_dtype(path, file.dtype)
    options: dict[str, Any] = {
        # Equal in each run, so that an interrupted one can be continued, as long as the file is the same.
        "name": f"image-{tokenize(str(path.resolve()), status.st_size, status.st_mtime_ns)}",
        "lock": False,
        "fancy": False,
        "meta": np.empty((0,) * file.ndim, file.dtype),
    }
    values = da.from_array(file, chunks=file.block, **options)
    single = [axis not in "yx" and size == 1 for axis, size in zip(file.axes, file.shape, strict=True)]
    values = values[tuple(0 if drop else slice(None) for drop in single)]
    axes = "".join(axis for axis, drop in zip(file.axes, single, strict=True) if not drop)
    return ImageSource(path.stem, values, axes, {"source": path.name, **file.attributes})


def read_rgb(path: str | Path) -> Pixels:
    """Read an image file as 8-bit RGB, as `decode_rgb` does.

    Raises
    ------
    SourceError
        If the file cannot be read.
    MissingPackage
        If the package that reads the format is not installed.
    """
    path = Path(path)
    with _source_errors(path):
        return decode_rgb(path.read_bytes(), path.suffix)


def decode_rgb(data: bytes, suffix: str) -> Pixels:
    """Decode the bytes of an image file to 8-bit RGB.

    Parameters
    ----------
    data : bytes
        Content of the file.
    suffix : str
        Suffix of its name, such as ".png".

    Returns
    -------
    uint8 array (H, W, 3)
        The first three bands, or one band three times. An alpha channel is left out. Samples of more than 8 bits are
        stretched between their 1st and 99th percentile.

    Raises
    ------
    MissingPackage
        If the package that reads the format is not installed.
    Exception
        Of any class, if the data is damaged.
    """
    suffix = suffix.lower()
    if suffix in IMAGECODECS:
        return _to_rgb(_imagecodecs(IMAGECODECS[suffix])(data))
    require("images", "PIL")
    from PIL import UnidentifiedImageError

    try:
        with _open_pillow(BytesIO(data)) as image:
            if image.mode not in DEEP_MODES and not (image.format in ("PNG", "TIFF") and _loses_bits(image)):
                return np.asarray(image.convert("RGB"))
            kind, values = image.format, np.asarray(image) if image.mode in DEEP_MODES else None
    except UnidentifiedImageError:
        if suffix not in TIFF:
            raise
        kind, values = "TIFF", None  # Pillow does not read TIFF of any number of bands, tifffile does
    if values is None and kind == "PNG":
        values = _imagecodecs("png_decode")(data)
    elif values is None:
        require("images", "tifffile")
        import tifffile

        with tifffile.TiffFile(BytesIO(data)) as file:
            page = file.pages.first
            values = page.asarray()
            if page.axes.startswith("S"):
                values = np.moveaxis(values, 0, -1)
    return _to_rgb(values)


def check_dtype(name: Path | str, dtype: Any) -> None:
    """Raise UnsupportedArray for a dtype that the codec cannot store."""
    if np.dtype(dtype).newbyteorder("=") not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise UnsupportedArray(f"{name}: the codec cannot store {dtype}; convert the samples to one of {names}")


def _open_pillow(file: Path | BytesIO) -> "ImageFile.ImageFile":
    from PIL import Image

    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _open_whole(path: Path) -> _ImageFile:
    """Open a file that can only be decoded as a whole."""
    if path.suffix.lower() in IMAGECODECS:
        return _open_decoded(path, IMAGECODECS[path.suffix.lower()])
    require("images", "PIL")

    with _open_pillow(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # of these JPEG files of cameras, the first image is the photograph
            raise UnsupportedArray(
                f"{path}: the file has {frames} images; save each as a file of its own, or all as one TIFF"
            )
        if image.mode == "I":
            raise UnsupportedArray(
                f"{path}: the samples have 32 bits, but the codec stores up to 16; convert them first"
            )
        if _loses_bits(image):
            if image.format == "PNG":
                return _open_decoded(path, "png_decode")
            drivers = georeference.PNM if image.format == "PPM" else georeference.GEOTIFF
            return replace(_open_rasterio(path, drivers), attributes={})
        mode = image.mode if image.mode in DEEP_MODES else "L" if image.mode in GREY_MODES else "RGB"
        has_alpha = image.has_transparency_data
        shape: Index = (image.height, image.width, 3 if mode == "RGB" else 1)
    dtype = np.dtype(DEEP_MODES.get(mode, "u1"))

    def read(region: Region) -> NDArray[Any]:
        with _open_pillow(path) as image:
            values = np.asarray(image if image.mode == mode else image.convert(mode)).astype(dtype)
        return values.reshape(shape)[region]

    return _ImageFile(path, shape, dtype, "yxc", has_alpha, shape, read)


def _open_decoded(path: Path, decoder: str) -> _ImageFile:
    """Open a file that imagecodecs decodes, by decoding it once to know its shape."""
    decode = _imagecodecs(decoder)
    first = decode(path.read_bytes())
    if first.ndim not in (2, 3) or (first.ndim == 3 and first.shape[2] > 4):
        raise UnsupportedArray(f"{path}: expected a grey or colour image, got shape {first.shape}")
    height, width, bands = (*first.shape, 1)[:3]
    has_alpha = bands in (2, 4)
    shape = (height, width, bands - has_alpha)

    def read(region: Region) -> NDArray[Any]:
        return decode(path.read_bytes()).reshape(height, width, bands)[region]

    return _ImageFile(path, shape, first.dtype, "yxc", has_alpha, shape, read)


def _open_tiff(path: Path) -> _ImageFile:
    """Open a TIFF file with tifffile, or with rasterio if it is georeferenced and has one image."""
    require("images", "tifffile")
    import tifffile
    import zarr

    with _open_tifffile(path) as file:
        series, page = file.series[0], file.pages.first
        is_georeferenced = georeference.is_georeferenced(path, {tag.name for tag in page.tags})
        if is_georeferenced and set(series.axes) <= set("YXS"):
            return _open_rasterio(path)
        letters = "".join(TIFF_AXES.get(axis, axis.lower()) for axis in series.axes)
        shape, dtype = series.shape, np.dtype("u1" if series.dtype == bool else series.dtype)
        has_alpha = series.axes.endswith("S") and page.extrasamples[-1:] in [(value,) for value in ALPHA]
        is_contiguous = series.dataoffset is not None  # samples lie in the file as in memory
        if is_contiguous:
            chunks = (1,) * len(shape)
        else:
            with series.aszarr(level=0) as store:
                chunks = zarr.open_array(store, mode="r").chunks
    # Planar files have their bands first, rasterio has them last in any case.
    bands_first = series.axes.startswith("S")
    order = (*range(1, len(shape)), 0) if bands_first else tuple(range(len(shape)))
    axes = "".join(letters[axis] for axis in order)
    single = {axis for axis, size in zip(letters, shape, strict=True) if size == 1}
    if not {"y", "x"} <= set(axes) <= set(AXES) | single or any(axes.count(axis) > 1 for axis in set(axes) - single):
        raise UnsupportedArray(
            f"{path}: tifffile reports axes {series.axes}, but only {AXES} can be stored; extract images with "
            "these axes"
        )
    shape, chunks = (tuple(sizes[axis] for axis in order) for sizes in (shape, chunks))
    if has_alpha:
        shape = (*shape[:-1], shape[-1] - 1)

    def read(region: Region) -> NDArray[Any]:
        selection = tuple(region[order.index(axis)] for axis in range(len(order)))
        values: Any
        if is_contiguous:
            values = tifffile.memmap(path, mode="r", series=0, _multifile=False)[selection]
        else:
            with _open_tifffile(path) as file, file.series[0].aszarr(level=0) as store:
                values = zarr.open_array(store, mode="r")[selection]
        return np.asarray(values).transpose(order).astype(dtype, copy=False)

    attributes = {}
    if is_georeferenced:
        with georeference.open_raster(path) as raster:
            attributes = georeference.attributes(raster)
    return _ImageFile(path, shape, dtype, axes, has_alpha, _block(axes, shape, chunks), read, attributes)


def _open_tifffile(path: Path) -> Any:
    """Open a TIFF file, but none of the other files that its OME description may name."""
    import tifffile

    return tifffile.TiffFile(path, _multifile=False)


def _open_rasterio(path: Path, drivers: Sequence[str] = georeference.GEOTIFF) -> _ImageFile:
    """Open a georeferenced file."""
    from rasterio.enums import ColorInterp
    from rasterio.windows import Window

    with georeference.open_raster(path, drivers=drivers) as file:
        has_alpha = file.count in (2, 4) and file.colorinterp[-1] == ColorInterp.alpha
        shape = (file.height, file.width, file.count - has_alpha)
        dtype, attributes = np.dtype(file.dtypes[0]), georeference.attributes(file)
        chunks = (*file.block_shapes[0], file.count)

    def read(region: Region) -> NDArray[Any]:
        rows, columns, bands = (range(*part.indices(size)) for part, size in zip(region, shape, strict=True))
        window = Window(columns.start, rows.start, len(columns), len(rows))
        with georeference.open_raster(path, drivers=drivers) as file:
            return np.moveaxis(file.read([band + 1 for band in bands], window=window), 0, -1)

    return _ImageFile(path, shape, dtype, "yxc", has_alpha, _block("yxc", shape, chunks), read, attributes)


def _block(axes: str, shape: Index, chunks: Index) -> Index:
    """Return the shape of the blocks to read of a file that has `chunks`: whole chunks, `BLOCK_EDGE` or more each way.

    Blocks of files with more than four bands have a quarter of the edge. Blocks of small images have several images.
    """
    sizes = dict(zip(axes, zip(shape, chunks, strict=True), strict=True))
    bands = sizes["c"][0] if "c" in sizes else 1
    edge = BLOCK_EDGE if bands <= 4 else BLOCK_EDGE // 4
    block = {axis: size if axis == "c" else 1 for axis, (size, _) in sizes.items()}
    for axis in "yx":
        size, chunk = sizes[axis]
        block[axis] = min(size, ceil_div(edge, chunk) * chunk)
    for axis in reversed(axes):
        if axis not in "yxc":
            block[axis] = max(1, min(sizes[axis][0], BLOCK_EDGE**2 // prod(block.values())))
    return tuple(block[axis] for axis in axes)


def _loses_bits(image: "ImageFile.ImageFile") -> bool:
    """Tell whether Pillow reduces an image to 8 bits: it has no modes for colour of 16 bits."""
    if image.mode in DEEP_MODES:
        return False
    from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8
    modes = [value for tile in image.tile for value in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    has_depth = image.format == "PPM" and any(isinstance(value, int) and value > 255 for value in modes)
    return has_depth or any(isinstance(value, str) and ";16" in value for value in modes)


def _imagecodecs(decoder: str) -> Callable[[bytes], NDArray[Any]]:
    require("images", "imagecodecs")
    import imagecodecs

    decode: Callable[[bytes], NDArray[Any]] = getattr(imagecodecs, decoder)
    return decode


def _to_rgb(values: NDArray[Any]) -> Pixels:
    """Turn an image (H, W) or (H, W, bands) of any dtype into RGB."""
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3:
        raise ValueError(f"expected an image (H, W) or (H, W, bands), got shape {values.shape}")
    values = values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    values = values.astype(np.float32)
    return draw.to_grey_levels(values, draw.stretch_limits(values), brighten=True)
