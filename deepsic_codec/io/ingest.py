"""Store images, mosaics and Zarr arrays in an archive, and measure the result."""

import base64
import json
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from deepsic_codec import dask as deepsic_dask
from deepsic_codec.archive import auto_edge, chunk_bands, measured_codec
from deepsic_codec.axes import Axes, Region, axes_of_names, chunk_region, grid_shape
from deepsic_codec.codec.measure import thinned
from deepsic_codec.codec.params import NAN, CodecParams
from deepsic_codec.codec.scaled import must_be_bounded, nodata_value
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.io import georeference, ome, validity
from deepsic_codec.io.images import ImageSource
from deepsic_codec.io.zarr_source import PlainNode, as_number
from deepsic_codec.labels.open import open_labels
from deepsic_codec.metrics import errors, psnr
from deepsic_codec.progress import Progress
from deepsic_codec.stored.array import StoredArray

PSNR_CHUNKS = 4  # chunks that are read back to measure PSNR
# Chunks of an estimate: after the first four, as many as are encoded in these seconds, and have so many samples.
ESTIMATE_CHUNKS, ESTIMATE_SECONDS, MAX_ESTIMATED = 16, 20, 1 << 25
RATES = ("quality", "psnr", "bpp", "rmse")  # parameters that allow errors
MIN_BOUNDED_BITS = 0.5  # per sample: a bound does not pay off below
NAMES = {"c": "band", "t": "time"}  # of dimensions that do not have the letter of their axis
TOP_LABELS = 3  # classes of an array that are reported


@dataclass(frozen=True)
class Ingested:
    """Result of storing one source.

    Attributes
    ----------
    name : str
        Path of the array.
    shape : tuple of int
        Shape of the array.
    raw, stored : int
        Bytes of the samples, and of all payloads.
    written, skipped, empty : int
        Numbers of chunks: stored by this call, already complete, and not stored because they equal the fill value.
    seconds : float
        Time to write the array.
    psnr, peak, rmse, largest : float
        Errors over a few chunks: PSNR in dB and its peak, root mean square error and largest error in units of the
        data; NaN if no chunk was stored.
    closer_bound : float or None
        `max_error` that made smaller errors in fewer bytes than the parameters passed, in one of these chunks.
    labels : dict of str to int
        Numbers of chunks that show a class, for the most frequent classes.
    """

    name: str
    shape: tuple[int, ...]
    raw: int
    stored: int
    written: int
    skipped: int
    empty: int
    seconds: float
    psnr: float
    peak: float
    rmse: float
    largest: float
    closer_bound: float | None
    labels: dict[str, int]


def ingest(
    source: ImageSource,
    url: Any,
    *,
    codec: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    shard: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Ingested:
    """Store one source as an array, with its label index.

    Parameters
    ----------
    source : ImageSource
        The image.
    url
        The archive, a group of Zarr: a path, URL or store. It is made if needed.
    codec : mapping, optional
        Parameters of `DeepSIC`. The default of `nodata` is the value that the source declares. The
        default of `value_range` beyond 8 bits is the range of the array, which `store` measures.
    chunk, shard : int, optional
        Edges of chunks and shards in pixels.
    workers : int, optional
        Threads; one for each core by default.
    progress : callable, optional
        Called with the number of blocks that are written and of all blocks.
    **options
        Further arguments of `deepsic_codec.dask.store`, such as `resume`, `zarr_format`, `quality_map` and `keep`.
    """
    import dask

    parameters = codec_parameters(source, codec)
    source = with_one_nodata(source, parameters["nodata"])
    if source.dimensions is not None:
        options.setdefault("dimension_names", source.dimensions)
    shape = source.values.shape
    regions = sample_regions(source, chunk)
    originals = dask.compute(*(source.values[region] for region in regions))  # now: the target may replace the source
    start = time.perf_counter()
    with dask.config.set(scheduler="threads", num_workers=workers):
        report = deepsic_dask.store(
            source.values,
            url,
            name=source.name,
            codec=DeepSIC(axes=source.axes, **parameters),
            chunks="auto" if chunk is None else chunk_edges(source.axes, shape, chunk, clip=True),
            shards=None if shard is None else chunk_edges(source.axes, shape, shard, clip=False),
            attributes=source.attributes,
            **{"dimension_names": _dimension_names(source), **options},
            progress=progress,
        )
    seconds = time.perf_counter() - start
    decoded = [np.asarray(report.array[region]) for region in regions]
    stored, labels = _contents(report)
    array = StoredArray(report.array)
    return Ingested(
        source.name,
        shape,
        int(source.values.nbytes),
        stored,
        report.written,
        report.skipped,
        report.empty,
        seconds,
        *_errors(originals, decoded, array.params, report.array.dtype),
        _closer_bound(array, regions[0], originals[0], decoded[0]) if regions else None,
        labels,
    )


@dataclass(frozen=True)
class Estimate:
    """What storing a source would make, estimated from a few chunks.

    Attributes
    ----------
    name, shape, dtype, axes
        Of the array.
    chunks : tuple of int
        Shape of a chunk.
    nodata : number, "NaN" or None
        Value of samples without data.
    raw, stored : int
        Bytes of the samples, and about those of all payloads.
    seconds : float
        About the time to load and compile what is needed, and to read and encode one chunk at a time.
    psnr, peak, rmse, largest : float
        Errors over these chunks: PSNR in dB and its peak, root mean square error and largest error in units of the
        data; NaN without samples that are data.
    closer_bound : float or None
        As of `Ingested`.
    sampled, total : int
        Numbers of chunks that the estimate is from, and of all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: str
    chunks: tuple[int, ...]
    nodata: Any
    raw: int
    stored: int
    seconds: float
    psnr: float
    peak: float
    rmse: float
    largest: float
    closer_bound: float | None
    sampled: int
    total: int


def estimate(source: ImageSource, *, codec: Mapping[str, Any] | None = None, chunk: int | None = None) -> Estimate:
    """Encode a few chunks of a source as `ingest` would, and write nothing.

    The parameters and errors are those of `ingest`.
    """
    import dask

    parameters = codec_parameters(source, codec)
    source = with_one_nodata(source, parameters["nodata"])
    shape, dtype = source.values.shape, source.values.dtype
    chunks = chunk_edges(source.axes, shape, chunk)
    count = min(ESTIMATE_CHUNKS, max(PSNR_CHUNKS, MAX_ESTIMATED // prod(chunks)))
    start = time.perf_counter()
    samples = dask.compute(*(source.values[region] for region in sample_regions(source, chunk, count)))
    read = time.perf_counter()
    encoder = sample_codec(source, parameters, chunks, samples)
    encoder.encode_batch(samples[:1])  # loads the model and compiles
    warm = time.perf_counter()
    payloads: list[bytes] = []
    for sample in samples:
        payloads.append(encoder.encode(sample))
        if len(payloads) >= PSNR_CHUNKS and time.perf_counter() > warm + ESTIMATE_SECONDS:
            break
    encode = time.perf_counter() - warm
    reading = (read - start) * len(payloads) / max(1, len(samples))
    starting = max(0.0, warm - read - encode / max(1, len(payloads)))
    samples = samples[: len(payloads)]
    decoded = encoder.decode_batch(payloads)
    share = source.values.size / max(1, sum(sample.size for sample in samples))
    return Estimate(
        source.name,
        shape,
        str(dtype),
        str(source.axes),
        chunks,
        parameters["nodata"],
        int(source.values.nbytes),
        round(sum(map(len, payloads)) * share),
        starting + (reading + encode) * share,
        *_errors(samples, decoded, encoder, dtype),
        closer_bound(encoder, samples[0], decoded[0], len(payloads[0])) if samples else None,
        len(samples),
        prod(grid_shape(shape, chunks)),
    )


def sample_codec(
    source: ImageSource, parameters: Mapping[str, Any], chunks: Sequence[int], samples: Sequence[NDArray[Any]]
) -> DeepSIC:
    """Return the codec of a source; the range of values, if it is needed and not passed, is that of a few chunks."""
    plain, values = DeepSIC(axes=source.axes, **parameters), source.values
    plain = plain.with_band_names(source.attributes.get("long_name"))
    return measured_codec(
        plain, values.shape, values.dtype, chunks, lambda codec: [thinned(sample, codec) for sample in samples]
    ).convert(DeepSIC)


def closer_bound(codec: DeepSIC, sample: NDArray[Any], decoded: NDArray[Any], nbytes: int) -> float | None:
    """Return the `max_error` that makes smaller errors than a codec with loss, in fewer bytes; None if there is none.

    Parameters
    ----------
    codec : DeepSIC
        The codec.
    sample, decoded : ndarray
        A chunk, and what the codec made of it.
    nbytes : int
        Bytes that it took.
    """
    if codec.max_error is not None or 8 * nbytes < MIN_BOUNDED_BITS * sample.size:
        return None
    _, _, rmse, largest = _errors([sample], [decoded], codec, sample.dtype)
    # Uniform errors within a bound have this root mean square.
    bound = rmse * 3**0.5 if sample.dtype.kind == "f" else float(((1 + 12 * rmse**2) ** 0.5 - 1) // 2)
    if not rmse or (sample.dtype.kind == "f" and not bound) or bound != bound:
        return None
    bound = float(f"{bound:.2g}") if sample.dtype.kind == "f" else bound
    bounded = codec.changed(**dict.fromkeys(RATES), max_error=bound)
    payload = bounded.encode(sample)
    if len(payload) >= nbytes:
        return None
    _, _, closer, limit = _errors([sample], [bounded.decode(payload)], codec, sample.dtype)
    return bound if closer <= rmse and limit < largest else None


def _closer_bound(array: StoredArray, region: Region, original: NDArray[Any], decoded: NDArray[Any]) -> float | None:
    """Return `closer_bound` of a chunk of an array."""
    index = tuple(part.start // edge for part, edge in zip(region, array.chunks, strict=True))
    ((_, start),) = array.reader.starts([index])
    return (
        None if start is None else closer_bound(array.params.convert(DeepSIC), original, decoded, start.header.nbytes)
    )


def copy_node(node: PlainNode, url: Any, *, zarr_format: int = 3) -> str | None:
    """Copy what a Zarr group has beside images, such as coordinates, as it is.

    What is at its path in the archive stays. Returns a message if something else is there, or the archive cannot have
    the array.
    """
    group = zarr.open_group(url, mode="a", zarr_format=3 if zarr_format == 3 else 2)
    if not node.is_array:
        target = zarr.open_group(url, path=node.path, mode="a", zarr_format=3 if zarr_format == 3 else 2)
        target.attrs.update({key: value for key, value in node.node.attrs.items() if key not in target.attrs})
        return None
    array = node.node
    try:
        if node.path in group:
            existing: Any = group[node.path]
            same = isinstance(existing, zarr.Array) and existing.shape == array.shape
            if same and np.array_equal(existing[...], array[...]):
                return None
            return f"{node.path}: is not copied, because the archive has another {node.path}"
        names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
        attributes = {key: value for key, value in array.attrs.items() if key != "_ARRAY_DIMENSIONS"}
        if zarr_format == 2 and (names or not array.ndim):
            attributes["_ARRAY_DIMENSIONS"] = list(names or ())
        fill_value = _fill_value(array, attributes, zarr_format)
        copy = group.create_array(
            node.path,
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            fill_value=fill_value,
            attributes=attributes,
            dimension_names=names if zarr_format == 3 else None,
        )
        if not array.ndim:
            copy[...] = array[...]
        for start in range(0, array.shape[0] if array.ndim else 0, array.chunks[0] if array.ndim else 1):
            part = slice(start, start + array.chunks[0])
            copy[part] = array[part]
    except Exception as error:  # zarr and its stores have errors of their own
        return f"{node.path}: cannot be copied ({type(error).__name__}: {error})"
    return None


def _fill_value(array: zarr.Array, attributes: dict[str, Any], zarr_format: int) -> Any:
    """Return the fill value of a copy of an array; changes `_FillValue` of its attributes to what xarray reads.

    For xarray, values that equal the fill value of format 2 are missing, but not those that equal one of format 3.
    """
    if zarr_format == array.metadata.zarr_format or array.dtype.kind not in "iufb":
        return array.fill_value
    if zarr_format == 2:
        return as_number(attributes.pop("_FillValue", None))
    if array.fill_value is not None:
        is_float = array.dtype.kind == "f"
        text = base64.b64encode(struct.pack("<d", array.fill_value)).decode()
        attributes["_FillValue"] = text if is_float else int(array.fill_value)
    return 0 if array.fill_value is None else array.fill_value


def _dimension_names(source: ImageSource) -> list[str]:
    """Return the names of a source's dimensions, unless they contradict axes that the user passed."""
    if source.dimensions is not None and axes_of_names(source.dimensions) in (None, source.axes):
        return list(source.dimensions)
    return [NAMES.get(axis, axis) for axis in source.axes]


def ingest_pyramid(
    source: ImageSource,
    url: Any,
    *,
    codec: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    zarr_format: int = 3,
    **options: Any,
) -> list[Ingested]:
    """Store one source as an OME-Zarr pyramid; only its first level has labels.

    The parameters are those of `ingest`; `quality_map` and `keep` are for the first level. The group gets its metadata
    when all levels are complete.

    Raises
    ------
    ConfigurationError
        For Zarr format 2.
    """
    if zarr_format != 3:
        raise ConfigurationError(f"zarr_format: OME-NGFF {ome.VERSION} needs Zarr format 3, got {zarr_format}")
    parameters = codec_parameters(source, codec)
    levels = ome.pyramid(source, chunk, parameters["nodata"])
    group = ome.open_group(url, source.name)
    options = {**options, "dimension_names": list(levels[0].axes), "coordinates": False}  # of OME-NGFF
    results = [ingest(levels[0], url, codec=parameters, chunk=chunk, zarr_format=zarr_format, **options)]
    # Levels have one range, that of the first.
    parameters["value_range"] = StoredArray.open(
        group, levels[0].name.removeprefix(f"{source.name}/")
    ).params.value_range
    parameters["semantics"] = "none"  # labels are for pixels of the original size
    options |= {"index": False, "quality_map": None, "keep": None}
    results += [
        ingest(level, url, codec=parameters, chunk=chunk, zarr_format=zarr_format, **options) for level in levels[1:]
    ]
    arrays = [level.values for level in levels]
    group.attrs.update(ome.describe(source.name, arrays, levels[0].axes, classes=source.lossless))
    return results


def codec_parameters(source: ImageSource, codec: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the parameters of `DeepSIC` for a source: those passed, and defaults that suit its samples.

    Classes, masks, samples of less than 8 bits and integers of 32 and 64 bits are stored without loss, whatever was
    passed, the last within a `max_error` too. They and images with a table of colours get no labels.

    Raises
    ------
    ConfigurationError
        If a bound on the error is passed, and samples had to move to set those without data apart; if NaN is passed as
        `nodata` and the source declares a number, which then would be data.
    """
    declared = declared_nodata(source)
    parameters = {"nodata": declared, **(codec or {})}
    nodata = parameters["nodata"]
    if declared not in (None, NAN) and nodata is not None and nodata != nodata:
        raise ConfigurationError(
            f"nodata: {source.name} declares {declared}, and {declared} beside NaN would be data; leave nodata out, "
            f"and NaN becomes {declared}"
        )
    bounded = must_be_bounded(source.values.dtype.newbyteorder("="))
    if source.lossless or (bounded and parameters.get("max_error") is None):
        parameters = {key: value for key, value in parameters.items() if key not in RATES} | {"max_error": 0}
    if bounded or "color_table" in source.attributes:
        parameters.setdefault("semantics", "none")
    if source.shifted and parameters.get("max_error") is not None:
        raise ConfigurationError(
            f"max_error: all values of {source.values.dtype} are data in {source.name}, so none is left for the pixels "
            "that its mask or alpha channel hides; pass a quality, or leave the mask out with --drop-alpha"
        )
    return parameters


def with_one_nodata(source: ImageSource, nodata: Any) -> ImageSource:
    """Return a float32 source with its NoData value, if that is a number, in the place of NaN and infinity."""
    number = georeference.number(nodata)
    if source.values.dtype.kind != "f" or number is None or not np.isfinite(number):
        return source
    return replace(source, values=validity.join_values(source.values, [np.nan, np.inf, -np.inf], number))


def in_groups(sources: Sequence[ImageSource]) -> list[ImageSource]:
    """Return sources with names that put images of different places into groups of their own.

    Coordinates are arrays of a group, so that only images of one grid can share them. Image "scene" of several grids
    becomes array "scene/scene".
    """
    keys = ("crs", "transform", "gcps")
    places = []
    for source in sources:
        sizes = [size for axis, size in zip(source.axes, source.values.shape, strict=True) if axis in "yx"]
        place = {key: source.attributes[key] for key in keys if key in source.attributes}
        is_file = place and not source.reads  # arrays of Zarr groups keep their groups
        places.append(json.dumps([place, sizes], sort_keys=True) if is_file else None)
    if len({place for place in places if place is not None}) < 2:
        return list(sources)
    names = [
        source.name if place is None else _in_group(source.name) for source, place in zip(sources, places, strict=True)
    ]
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def _in_group(name: str) -> str:
    *groups, last = name.split("/")
    return name if groups[-1:] == [last] else f"{name}/{last}"


def declared_nodata(source: ImageSource) -> Any:
    """Return the NoData value that a source declares, None without one or if its samples cannot have this value.

    Files often declare a value of another dtype from which they were converted.
    """
    value = georeference.number(source.attributes.get("nodata"))
    if value is None or not georeference.fits(value, source.values.dtype):
        return None
    return "NaN" if np.isnan(value) else value


def chunk_edges(axes: str, shape: Sequence[int], edge: int | None, clip: bool = True) -> tuple[int, ...]:
    """Return the shape of chunks of an edge in pixels, None for the default; no larger than the array with `clip`."""
    bands = chunk_bands(Axes(axes).bands(shape))
    edge = edge or auto_edge(bands)
    edges = {axis: max(1, min(edge, size)) if clip else edge for axis, size in zip(axes, shape, strict=True)}
    return tuple(edges[axis] if axis in "yx" else bands if axis == "c" else 1 for axis in axes)


def _contents(report: Any) -> tuple[int, dict[str, int]]:
    """Return the bytes of all payloads of an array, and its most frequent labels."""
    if report.index is None:
        return report.nbytes, {}
    labels = open_labels(report.array)
    sizes = labels.index.member("nbytes")
    counts = labels.summary()["classes"]
    best = sorted(((counts[name], name) for name in labels.vocabulary.names), reverse=True)[:TOP_LABELS]
    return int(np.asarray(sizes[...]).sum(dtype=np.int64)), {name: count for count, name in best if count}


def sample_regions(source: ImageSource, chunk: int | None, count: int = PSNR_CHUNKS) -> list[Region]:
    """Return the regions of a few chunks of a source, the same ones in every run."""
    shape = source.values.shape
    chunks = chunk_edges(source.axes, shape, chunk)
    grid = grid_shape(shape, chunks)
    total = prod(grid)
    numbers = np.sort(np.random.default_rng(0).choice(total, min(count, total), replace=False))
    return [chunk_region(index, chunks, shape) for index in np.transpose(np.unravel_index(numbers, grid)).tolist()]


def _errors(
    before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]], params: CodecParams, dtype: Any
) -> tuple[float, float, float, float]:
    """Return the PSNR in dB over a few chunks, its peak, the root mean square error and the largest error.

    The peak is 255 for uint8, otherwise the range of the samples in these chunks.
    """
    empty = np.zeros(0, dtype)
    originals, decoded = (np.concatenate([empty, *(part.ravel() for part in parts)]) for parts in (before, after))
    if params.nodata is not None:
        nodata = nodata_value(params, originals.dtype.newbyteorder("="))
        data = ~np.isnan(originals) if nodata != nodata else originals != nodata
        originals, decoded = originals[data], decoded[data]
    if not originals.size:
        return (float("nan"),) * 4
    peak = 255.0 if dtype == np.uint8 else float(np.ptp(originals.astype(np.float64))) or 1.0
    return psnr(originals, decoded, peak), peak, *errors(originals, decoded)
