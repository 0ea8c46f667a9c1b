"""Scenes of any depth and number of bands, as the images of three 8-bit bands that networks are trained on."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Axes
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io.images import TIFF, ImageSource, Pixels, open_image

#: Edge in pixels of the blocks that scenes are cut into; each block is an image.
BLOCK = 1024
# Share of the samples of a band that a stretch to 8 bits may clip at either end.
TAIL = 0.001
# A stretch is at most this many times as wide as the data of a block: ranges often are those of a whole archive.
MAX_WIDENING = 4.0
MIN_DATA = 0.5  # share of a block that has to be data

USUAL_AXES = {2: "yx", 3: "yxc", 4: "nyxc"}

Loaders = dict[str, Callable[[], Pixels]]


def scene_loaders(path: Path) -> Loaders | None:
    """Return a function for each image of a scene that reads it, by name.

    Parameters
    ----------
    path : Path
        TIFF file, Zarr array or group.

    Returns
    -------
    dict or None
        None for a TIFF file of 8-bit grey levels or colours, which is an image as it is.

    Raises
    ------
    SourceError, UnsupportedArray
        If the source cannot be read, or holds samples that the codec does not store.
    """
    if path.suffix.lower() in TIFF:
        source = open_image(path, drop_alpha=True)
        if source.values.dtype == np.uint8 and (source.axes == "yx" or source.values.shape[source.axes.find("c")] == 3):
            return None
        return _loaders(source, path.name)
    from deepsic_codec.io.sources import open_sources  # zarr, which image files do not need

    try:
        sources = list(open_sources([path], drop_alpha=True))
    except UnsupportedArray:  # dimensions without names
        sources = list(open_sources([path], drop_alpha=True, axes=_usual_axes(path)))
    return {name: load for source in sources for name, load in _loaders(source, source.name).items()}


def _usual_axes(path: Path) -> str | None:
    """Return the axes that arrays with so many dimensions usually have."""
    import zarr  # not installed where only image files are trained on

    node = zarr.open(str(path), mode="r")
    numbers = {node.ndim} if isinstance(node, zarr.Array) else {array.ndim for _, array in node.arrays()}
    return USUAL_AXES.get(numbers.pop()) if len(numbers) == 1 else None


def _loaders(source: ImageSource, name: str) -> Loaders:
    from deepsic_codec.io.ingest import declared_nodata

    values, axes = source.values, Axes(source.axes)
    nodata = declared_nodata(source)
    height, width, bands = axes.height(values.shape), axes.width(values.shape), axes.bands(values.shape)
    loaders: Loaders = {}
    slices = product(*(range(size) for size in axes.slice_shape(values.shape)))
    for index, y, x, band in product(slices, _starts(height), _starts(width), range(0, bands, 3)):
        places = iter(index)
        sizes = {"y": slice(y, y + BLOCK), "x": slice(x, x + BLOCK), "c": slice(band, band + 3)}
        region = tuple(sizes[axis] if axis in sizes else next(places) for axis in source.axes)
        image = f"{name}[{','.join(map(str, (*index, y, x)))}; {band + 1}-{min(band + 3, bands)}]"
        kept = Axes("".join(axis for axis in source.axes if axis in "yxc"))
        loaders[image] = partial(_read, values, region, kept, nodata, crc32(image.encode()))
    return loaders


def _starts(size: int) -> list[int]:
    """Return where blocks begin; the last one overlaps the one before rather than being small."""
    return [min(start, max(0, size - BLOCK)) for start in range(0, size, BLOCK)]


def _read(values: Any, region: Any, axes: Axes, nodata: Any, seed: int) -> Pixels:
    return to_pixels(axes.to_samples(np.asarray(values[region]))[0], nodata, np.random.default_rng(seed))


def to_pixels(block: NDArray[Any], nodata: Any, rng: np.random.Generator) -> Pixels:
    """Stretch samples to 8 bits; uint8 stays as it is.

    Parameters
    ----------
    block : ndarray
        (H,W,bands) of one to three bands of any dtype.
    nodata : number, "NaN" or None
        Value of samples that are no data; they are filled with what surrounds them. NaN and infinities never are data.
    rng : Generator
        Draws how much wider than the data the stretch is, and where the data lies in it: sensors, and ranges that serve
        many scenes, leave such room.

    Returns
    -------
    uint8 array (H,W,3)
        The bands; one band three times; of two bands the first one again as third.

    Raises
    ------
    ValueError
        If less than half of the block is data.
    """
    samples = block.astype(np.float64)
    holes = ~np.isfinite(samples)
    if nodata not in (None, "NaN"):
        holes |= block == nodata
    if holes.mean() > 1 - MIN_DATA:
        raise ValueError(f"{100 * holes.mean():.0f} % of the block is no data")
    out = block.astype(np.uint8) if block.dtype == np.uint8 else _stretched(samples, holes, block.dtype, rng)
    if holes.any():
        from deepsic_codec.codec.scaled import fill_nodata

        out = fill_nodata(out[None], holes[None])[0]
    bands = [0, min(1, block.shape[2] - 1), 2 if block.shape[2] == 3 else 0]
    return np.stack([out[..., band] for band in bands], axis=-1)


def _stretched(
    samples: NDArray[np.float64], holes: NDArray[np.bool_], dtype: np.dtype[Any], rng: np.random.Generator
) -> Pixels:
    width, place = MAX_WIDENING ** rng.uniform(), rng.uniform()
    out = np.empty(samples.shape, np.uint8)
    for band in range(samples.shape[2]):
        valid = samples[..., band][~holes[..., band]]
        low, high = np.quantile(valid, [TAIL, 1 - TAIL]) if valid.size else (0.0, 1.0)
        extent = max((high - low) * width, float(np.finfo(np.float32).tiny) if dtype.kind == "f" else 1.0)
        start = low - place * (extent - (high - low))
        levels = np.where(holes[..., band], 0, samples[..., band] - start) * (255 / extent)
        out[..., band] = np.rint(np.clip(levels, 0, 255))
    return out
