"""Image files as lazy Dask arrays, and as RGB pixels: PNG, JPEG and the like, TIFF, GeoTIFF, JPEG 2000, JPEG XL.

Samples are those of the file, not what a library shows of them: palettes stay numbers of colours, 1 to 4 and 9 to 15
bits are not stretched, grey levels are not inverted. What marks pixels as missing beside the samples, alpha and masks,
becomes a NoData value (`deepsic_codec.io.validity`).
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index, Region, ceil_div, chunk_region, iter_grid
from deepsic_codec.codec.scaled import DTYPES
from deepsic_codec.errors import DeepSICError, SourceError, UnsupportedArray
from deepsic_codec.io import draw, georeference, pnm, validity
from deepsic_codec.require import require

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
# Pillow's other modes, and those whose arrays have the samples of the file; the second if pixels may be transparent.
MODES = {"1": ("1", "LA"), "L": ("L", "LA"), "LA": ("LA", "LA"), "P": ("P", "P"), "RGB": ("RGB", "RGBA")}
MODES |= {"RGBX": ("RGB", "RGB"), "RGBA": ("RGBA", "RGBA"), "CMYK": ("CMYK", "CMYK")}
GREY_STEPS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies samples of 2 and 4 bits
ORIENTATION = 0x0112  # tag of EXIF and TIFF
HIGH_BIT_DEPTH = 0x40  # flag in the configuration of AVIF files
ASSOCIATED, UNASSOCIATED = 1, 2  # values of the TIFF tag ExtraSamples for alpha
REDUCED, MASK = 1, 4  # flags of the TIFF tag NewSubfileType
# Photometric interpretations (numbers of TIFF) that tifffile and GDAL read alike.
MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
# Compressions of TIFF whose decoders turn YCbCr into RGB: JPEG, WebP and JPEG XL in its old and new number.
RGB_DECODERS = (6, 7, 33003, 33005, 34712, 50001, 50002, 52546)
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
        `nodata` (see `deepsic_codec.io.georeference`); `color_table` of palettes, a list of [red, green, blue] or
        [red, green, blue, alpha]; `photometric`, if samples are neither grey levels from black to white nor RGB;
        `orientation` of a photograph as in EXIF, if it is turned; for Zarr arrays their own attributes.
    lossless : bool
        Samples are numbers of classes or of colours, or have less than 8 bits: any error changes what they mean.
    shifted : bool
        Samples that hold data and equal the NoData value are one step off, since a mask and not this value says what
        is missing in the file, and all values are in use.
    left_out : tuple of str
        What the file has beside this image, in messages.
    dimensions : tuple of str, optional
        Names of the dimensions; the letters of the axes by default.
    reads : tuple of str
        Locations of the Zarr arrays that are read when `values` are computed.
    """

    name: str
    values: "da.Array"
    axes: str
    attributes: dict[str, Any] = field(default_factory=dict)
    lossless: bool = False
    shifted: bool = False
    left_out: tuple[str, ...] = ()
    dimensions: tuple[str, ...] | None = None
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class _ImageFile:
    """An image file before its samples are read, with the interface that `dask.array.from_array` needs.

    `read(region)` opens the file anew, because an open file cannot be sent to another process, and returns a part of
    the image. `block` is the shape of the parts to read. `alpha` is the number of the band that is an alpha channel;
    bands are the last axis then. `valid(region)` returns where a mask of the file says that pixels hold data.
    """

    path: Path
    shape: Index
    dtype: np.dtype[Any]
    axes: str
    block: Index
    read: Callable[[Region], NDArray[Any]]
    attributes: dict[str, Any] = field(default_factory=dict)
    alpha: int | None = None
    alpha_may_be_data: bool = False  # declared as alpha by a program that has no other word for a fourth band
    valid: Callable[[Region], NDArray[np.bool_]] | None = None
    lossless: bool = False
    shifted: bool = False
    left_out: tuple[str, ...] = ()

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


def open_image(path: str | Path, *, drop_alpha: bool = False, keep_alpha: bool = False) -> ImageSource:
    """Open an image file.

    An alpha channel or mask that says no more than which pixels hold data becomes a NoData value; the file is read once
    to find a value that no sample has. A band of a TIFF file that is declared as unassociated alpha and has values
    between is a band like the others. Other transparency is refused.

    Parameters
    ----------
    path : str or Path
        File with a suffix of `SUFFIXES`.
    drop_alpha : bool
        Leave out the alpha channel, or the mask.
    keep_alpha : bool
        Keep the alpha channel as a band.

    Returns
    -------
    ImageSource
        Named after the file. TIFF and JPEG 2000 are read in blocks, other files as a whole.

    Raises
    ------
    SourceError
        If the file cannot be read.
    UnsupportedArray
        If the codec cannot store the image: several images in one file, transparency, samples of another dtype.
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
    check_dtype(path, file.dtype)
    with _source_errors(path):
        file = _with_nodata(_without_infinity(file), drop_alpha, keep_alpha)
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
    attributes = {"source": path.name, **file.attributes}
    return ImageSource(path.stem, values, axes, attributes, file.lossless, file.shifted, file.left_out)


def _with_nodata(file: _ImageFile, drop_alpha: bool, keep_alpha: bool) -> _ImageFile:
    """Return a file in which a NoData value stands for what its alpha channel or mask marks as missing."""
    alpha = file.alpha if file.valid is None else None  # beside a mask, alpha is a band
    if keep_alpha and alpha is not None or alpha is None and (file.valid is None or drop_alpha):
        return file if alpha is None else replace(file, attributes={**file.attributes, "alpha_band": alpha})
    bands = [band for band in range(file.shape[-1]) if band != alpha]
    shape, block = ((*sizes[:-1], len(bands)) for sizes in (file.shape, file.block))

    def whole(region: Region) -> NDArray[Any]:
        return file.read((*region[:-1], slice(0, file.shape[-1])))

    def data(region: Region) -> NDArray[Any]:
        return whole(region)[..., bands][..., region[-1]]

    plain = replace(file, shape=shape, block=block, read=data, alpha=None, valid=None)
    if drop_alpha:
        return plain
    declared = georeference.number(file.attributes.get("nodata"))
    if declared is not None and not georeference.fits(declared, file.dtype):
        declared = None
    summary = validity.Summary(file.dtype, declared)
    for region in iter_blocks(file.shape, file.block):
        values = whole(region)
        channel = None if alpha is None else values[..., alpha]
        valid = channel != 0 if channel is not None else file.valid(region)  # type: ignore[misc]
        summary.add(values[..., bands], valid, channel)
    if summary.kind == "between" and file.alpha_may_be_data:
        return file
    if summary.kind in ("between", "empty"):
        raise UnsupportedArray(
            f"{file.path}: the codec cannot store transparency; leave it out with --drop-alpha, or store it as a band "
            "with --keep-alpha"
        )
    if summary.kind == "opaque":
        return plain
    nodata, shifted = summary.nodata()

    def read(region: Region) -> NDArray[Any]:
        values = whole(region)
        valid = values[..., alpha] != 0 if alpha is not None else file.valid(region)  # type: ignore[misc]
        return validity.burn(values[..., bands][..., region[-1]], valid, nodata, shifted)

    attributes = {**file.attributes, "nodata": "NaN" if nodata != nodata else nodata}
    return replace(plain, read=read, attributes=attributes, shifted=shifted)


def _without_infinity(file: _ImageFile) -> _ImageFile:
    """Return a file with NaN for a NoData value that is infinite, which neither JSON nor the codec have."""
    value = georeference.number(file.attributes.get("nodata"))
    if value is None or not np.isinf(value):
        return file

    def read(region: Region) -> NDArray[Any]:
        values = file.read(region)
        return np.where(values == value, np.float32(np.nan), values)

    return replace(file, read=read, attributes={**file.attributes, "nodata": "NaN"})


def iter_blocks(shape: Index, block: Index) -> Iterator[Region]:
    """Iterate over the regions of the blocks of an image."""
    grid = tuple(ceil_div(size, edge) for size, edge in zip(shape, block, strict=True))
    return (chunk_region(index, block, shape) for index in iter_grid([0] * len(grid), grid))


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
    """Open an image of any size with Pillow; `Image.open` refuses those of more than 179 Mpx."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    data = file.open("rb") if isinstance(file, Path) else file
    try:
        start = data.read(16)
        for name in FORMATS:
            opener, accepts = Image.OPEN.get(name, (None, None))
            if opener is None or accepts is not None and accepts(start) is not True:
                continue
            data.seek(0)
            try:
                image: ImageFile.ImageFile = opener(data, str(file) if isinstance(file, Path) else "")
            except (SyntaxError, IndexError, TypeError, KeyError, EOFError, struct.error):
                continue  # as Pillow does: another plugin may know it
            image._exclusive_fp = isinstance(file, Path)  # leaving a `with` block closes the file
            return image
        raise UnidentifiedImageError("cannot identify the format")
    except BaseException:
        if isinstance(file, Path):
            data.close()
        raise


def _open_whole(path: Path) -> _ImageFile:
    """Open a file that can only be decoded as a whole."""
    suffix = path.suffix.lower()
    if suffix in IMAGECODECS:
        return _open_decoded(path, IMAGECODECS[suffix])
    with path.open("rb") as opened:
        start = opened.read(1 << 12)
    if start[:2] in pnm.MAGIC:
        return _open_pnm(path)
    if _is_deep_avif(start):
        return _open_decoded(path, "avif_decode")
    if start[:2] == b"\xff\xd8" and _jpeg_bits(path) > 8:
        return _open_decoded(path, "jpeg_decode")
    if start[8:12] == b"WEBP" and _is_large_webp(path):
        return _open_decoded(path, "webp_decode")
    require("images", "PIL")

    with _open_pillow(path) as image:
        left_out = _other_images(path, image)
        if image.mode == "I":
            raise UnsupportedArray(
                f"{path}: the samples have 32 bits, but the codec stores up to 16; convert them first"
            )
        if image.format == "JPEG2000":  # under another suffix
            return _open_rasterio(path, georeference.JPEG_2000)
        if image.format == "TIFF":
            return _open_tiff(path)
        if image.format == "PNG" and _loses_bits(image):
            return _open_decoded(path, "png_decode")
        deep = image.mode in DEEP_MODES
        transparent = image.has_transparency_data
        if not deep and image.mode not in MODES:
            raise UnsupportedArray(f"{path}: samples of the kind {image.mode!r} are not known; convert them to RGB")
        mode = image.mode if deep else MODES[image.mode][transparent]
        key = image.info.get("transparency") if deep and transparent else None  # the value that is transparent
        step = 1 if deep else 255 if mode == "LA" and image.mode == "1" else GREY_STEPS.get(_raw_mode(image), 1)
        bands = 1 + (key is not None) if deep else len("L" if mode in ("1", "P") else mode)
        attributes: dict[str, Any] = {}
        if image.mode == "P":
            attributes["color_table"] = _color_table(image)
        if mode == "CMYK":
            attributes["photometric"] = "SEPARATED"
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation in range(2, 9):
            attributes["orientation"] = orientation
        shape: Index = (image.height, image.width, bands)
        lossless = mode in ("1", "P") or step > 1
    dtype = np.dtype(DEEP_MODES.get(mode, "u1"))

    def read(region: Region) -> NDArray[Any]:
        with _open_pillow(path) as image:
            values = np.asarray(image if image.mode == mode else image.convert(mode)).astype(dtype)
        if key is not None:
            values = np.stack([values, np.where(values == key, 0, np.iinfo(dtype).max).astype(dtype)], axis=-1)
        values = values.reshape(shape)
        if step > 1:
            values[..., 0] //= step
        return values[region]

    alpha = bands - 1 if mode in ("LA", "RGBA") or key is not None else None
    file = _ImageFile(path, shape, dtype, "yxc", shape, read, attributes, alpha)
    return replace(file, lossless=lossless, left_out=left_out)


def _other_images(path: Path, image: "ImageFile.ImageFile") -> tuple[str, ...]:
    """Name the images of a file that are not stored; raises UnsupportedArray for animations and documents."""
    frames = getattr(image, "n_frames", 1)
    if frames <= 1:
        return ()
    if image.format != "MPO":
        raise UnsupportedArray(
            f"{path}: the file has {frames} images; save each as a file of its own, or all as one TIFF"
        )
    # Of these JPEG files of cameras, the first image is the photograph. Smaller ones are made from it.
    size, others = image.size, []
    for number in range(1, frames):
        try:
            image.seek(number)
        except (EOFError, OSError, SyntaxError, ValueError):
            continue  # listed, but not in the file: a program copied the header and not the previews
        if image.width >= size[0] and image.height >= size[1]:
            others.append(f"{path}: image {number + 1} of {frames} ({image.width} x {image.height} pixels)")
    image.seek(0)
    return tuple(others)


def _color_table(image: "ImageFile.ImageFile") -> list[list[int]]:
    """Return the colours of a palette, with alpha if it has one."""
    table = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    transparency = image.info.get("transparency")
    if transparency is not None:
        alpha = np.full(len(table), 255, np.uint8)
        if isinstance(transparency, bytes):
            known = np.frombuffer(transparency, np.uint8)[: len(alpha)]
            alpha[: len(known)] = known
        elif transparency < len(alpha):
            alpha[transparency] = 0
        table = np.column_stack([table, alpha])
    colors: list[list[int]] = table.tolist()
    return colors


def _raw_mode(image: "ImageFile.ImageFile") -> Any:
    args = image.tile[0][3] if image.tile else None
    return args[0] if isinstance(args, tuple) and args else args


def _is_deep_avif(start: bytes) -> bool:
    """Tell whether a file is AVIF with samples of 10 or 12 bits, which Pillow cuts to 8."""
    position = start.find(b"av1C")
    return start[4:8] == b"ftyp" and position >= 0 and bool(start[position + 6] & HIGH_BIT_DEPTH)


def _is_large_webp(path: Path) -> bool:
    """Tell whether Pillow refuses a WebP file for its size."""
    require("images", "PIL")
    from PIL import Image

    try:
        with _open_pillow(path):
            return False
    except Image.DecompressionBombError:
        return True


def _jpeg_bits(path: Path) -> int:
    """Return the bits of a sample of a JPEG file; 8 where they are not known."""
    with path.open("rb") as file:
        file.seek(2)
        while len(head := file.read(4)) == 4 and head[0] == 0xFF:
            marker, length = head[1], int.from_bytes(head[2:], "big")
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                return (file.read(1) or b"\x08")[0]
            if marker == 0xDA:
                break
            file.seek(length - 2, 1)
    return 8


def _open_pnm(path: Path) -> _ImageFile:
    """Open a PGM, PPM or PBM file."""
    with path.open("rb") as opened:
        header = pnm.read_header(opened)

    def read(region: Region) -> NDArray[Any]:
        return pnm.read(path, header)[region]

    attributes = {"photometric": "MINISWHITE"} if header.kind in pnm.BITMAPS else {}
    file = _ImageFile(path, header.shape, header.dtype, "yxc", header.shape, read, attributes)
    return replace(file, lossless=header.max_value < 16)


def _open_decoded(path: Path, decoder: str) -> _ImageFile:
    """Open a file that imagecodecs decodes, by decoding it once to know its shape."""
    decode = _imagecodecs(decoder)
    first = decode(path.read_bytes())
    if first.ndim not in (2, 3) or (first.ndim == 3 and first.shape[2] > 4):
        raise UnsupportedArray(f"{path}: expected a grey or colour image, got shape {first.shape}")
    height, width, bands = (*first.shape, 1)[:3]
    shape = (height, width, bands)

    def read(region: Region) -> NDArray[Any]:
        return decode(path.read_bytes()).reshape(shape)[region]

    alpha = bands - 1 if bands in (2, 4) else None
    return _ImageFile(path, shape, first.dtype, "yxc", shape, read, alpha=alpha)


def _open_tiff(path: Path) -> _ImageFile:
    """Open a TIFF file with tifffile, or with rasterio if it is georeferenced and has one image."""
    require("images", "tifffile")
    import tifffile
    import zarr

    with _open_tifffile(path) as file:
        series, page = file.series[0], file.pages.first
        photometric, compression = int(page.photometric), int(page.compression)
        if photometric == YCBCR and compression not in RGB_DECODERS:
            raise UnsupportedArray(f"{path}: samples are YCbCr without JPEG, which readers differ on; convert to RGB")
        has_mask = any(int(getattr(other, "subfiletype", 0)) & MASK for other in file.pages)
        is_georeferenced = georeference.is_georeferenced(path, {tag.name for tag in page.tags}) or has_mask
        attributes = _tiff_attributes(page)
        left_out = tuple(
            f"{path}: image {number} of {len(file.series)} ({' x '.join(map(str, other.shape))})"
            for number, other in enumerate(file.series[1:], 2)
            if not int(other.keyframe.subfiletype) & (REDUCED | MASK)
        )
        lossless = "color_table" in attributes or int(np.max(page.bitspersample)) < 8
        alphas = [number for number, kind in enumerate(page.extrasamples) if kind in (ASSOCIATED, UNASSOCIATED)]
        alpha_may_be_data = UNASSOCIATED in page.extrasamples
        is_image = set(series.axes) <= set("YXS") and photometric in (*range(4), YCBCR)
        if is_georeferenced and is_image:
            raster = _open_rasterio(path)
            return replace(
                raster,
                attributes={**attributes, **raster.attributes},
                alpha_may_be_data=alpha_may_be_data,
                lossless=lossless or raster.lossless,
                left_out=left_out,
            )
        if has_mask:
            raise UnsupportedArray(f"{path}: masks of several pages, or of colours that are not RGB, are not read")
        letters = "".join(TIFF_AXES.get(axis, axis.lower()) for axis in series.axes)
        shape, dtype = series.shape, np.dtype("u1" if series.dtype == bool else series.dtype)
        samples = dict(zip(series.axes, shape, strict=True)).get("S", 1)
        alpha = samples - len(page.extrasamples) + alphas[-1] if alphas and samples > 1 else None
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

    def read(region: Region) -> NDArray[Any]:
        selection = tuple(region[order.index(axis)] for axis in range(len(order)))
        values: Any
        if is_contiguous:
            values = tifffile.memmap(path, mode="r", series=0, _multifile=False)[selection]
        else:
            with _open_tifffile(path) as file, file.series[0].aszarr(level=0) as store:
                values = zarr.open_array(store, mode="r")[selection]
        return np.asarray(values).transpose(order).astype(dtype, copy=False)

    if is_georeferenced:
        with georeference.open_raster(path) as raster:
            attributes |= georeference.attributes(raster)
    image = _ImageFile(path, shape, dtype, axes, _block(axes, shape, chunks), read, attributes, alpha)
    return replace(image, alpha_may_be_data=alpha_may_be_data, lossless=lossless, left_out=left_out)


def _tiff_attributes(page: Any) -> dict[str, Any]:
    """Return what the samples of a TIFF page mean, if they are not grey levels from black to white, or RGB."""
    attributes: dict[str, Any] = {}
    photometric = int(page.photometric)
    if page.colormap is not None:  # GDAL adds one to files of grey levels
        attributes["color_table"] = (np.asarray(page.colormap).T >> 8).tolist()
    elif photometric not in (MIN_IS_BLACK, RGB, PALETTE, YCBCR):
        attributes["photometric"] = page.photometric.name
    orientation = page.tags.get("Orientation")
    if orientation is not None and int(orientation.value) in range(2, 9):
        attributes["orientation"] = int(orientation.value)
    return attributes


def _open_tifffile(path: Path) -> Any:
    """Open a TIFF file, but none of the other files that its OME description may name."""
    import tifffile

    return tifffile.TiffFile(path, _multifile=False)


def _open_rasterio(path: Path, drivers: Sequence[str] = georeference.GEOTIFF) -> _ImageFile:
    """Open a georeferenced file."""
    from rasterio.enums import ColorInterp, MaskFlags
    from rasterio.windows import Window

    with georeference.open_raster(path, drivers=drivers) as file:
        alphas = [band for band, kind in enumerate(file.colorinterp) if kind == ColorInterp.alpha]
        alpha = alphas[-1] if alphas and file.count > 1 else None
        flags = file.mask_flag_enums[0]
        has_mask = MaskFlags.per_dataset in flags and not {MaskFlags.alpha, MaskFlags.nodata} & {*flags}
        shape = (file.height, file.width, file.count)
        dtype, attributes = np.dtype(file.dtypes[0]), georeference.attributes(file)
        chunks = (*file.block_shapes[0], file.count)
        bits = int(file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
        has_colors = ColorInterp.palette in file.colorinterp
        if has_colors:
            colors = file.colormap(file.colorinterp.index(ColorInterp.palette) + 1)
            attributes["color_table"] = [list(colors[number]) for number in sorted(colors)]

    def window_of(region: Region) -> tuple[Window, range]:
        rows, columns, bands = (range(*part.indices(size)) for part, size in zip(region, shape, strict=True))
        return Window(columns.start, rows.start, len(columns), len(rows)), bands

    def read(region: Region) -> NDArray[Any]:
        window, bands = window_of(region)
        with georeference.open_raster(path, drivers=drivers) as file:
            return np.moveaxis(file.read([band + 1 for band in bands], window=window), 0, -1)

    def valid(region: Region) -> NDArray[np.bool_]:
        with georeference.open_raster(path, drivers=drivers) as file:
            mask: NDArray[np.bool_] = file.read_masks(1, window=window_of(region)[0]) != 0
        return mask

    block = _block("yxc", shape, chunks)
    image = _ImageFile(path, shape, dtype, "yxc", block, read, attributes, alpha, valid=valid if has_mask else None)
    return replace(image, lossless=has_colors or bits < 8)


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
    return any(isinstance(value, str) and ";16" in value for value in modes)


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
