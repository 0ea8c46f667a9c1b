"""Describe an archive from its metadata, the label index, and the headers of some or all chunks, decoding nothing."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import zarr

from deepsic_codec.axes import Index
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.errors import ConfigurationError, DeepSICError, ModelNotFound, UnsupportedArray
from deepsic_codec.io.region import open_index
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.index import ATTRIBUTE as INDEX
from deepsic_codec.labels.index import MISSING
from deepsic_codec.labels.query import SUMMARY_SCORE, Labels
from deepsic_codec.payload.constants import deep_step
from deepsic_codec.payload.header import read_section
from deepsic_codec.payload.limits import check_count
from deepsic_codec.payload.sections import VALUE_RANGE, section_name
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.layout import codec_names
from deepsic_codec.stored.location import Counter, is_deepsic, members, open_node, url_of
from deepsic_codec.stored.reader import PayloadStart

MAX_HEADERS = 1024  # headers that are read of an array, unless `everything` is set
MAX_INDEXED = 1 << 24  # chunks: the index of a larger array is not read for a summary

Start = tuple[Index, PayloadStart | None]


def describe(
    source: Any,
    name: str | None = None,
    *,
    index: Any = None,
    everything: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe an array, or a group and the arrays in it.

    Parameters
    ----------
    source
        A path, URL or store as `zarr.open` takes, or an array or group of Zarr.
    name : str, optional
        Path of an array in the group.
    index : optional
        Location of the label index of an array, if not beside it.
    everything : bool
        Read the headers of all chunks; otherwise of at most 1024 of each array, a random sample of all chunks.
    storage_options : dict, optional
        For fsspec, if `source` is a URL.

    Returns
    -------
    dict
        JSON types. For a group: `kind` "group", `zarr_format`, `arrays` (those stored with DeepSIC), `other_arrays`
        (with their shape, dtype and codecs), and the paths of `label_indices` and `embedded_models`.

        For an array: `kind` "array", shape, dtype and the like, and if it is stored with DeepSIC:

        - `codec_parameters`: all parameters of the codec.
        - `model`: its identity, whether it is `installed` (with this head: `head_installed`) and whether it is
          `embedded` in the archive.
        - `chunks`: how many are `stored`, and how many are `missing`.
        - `written_by`: decoder, head, quality and payload format in the headers, with the number of chunks.
        - `size`: bytes, bits per pixel and per sample, ratio to the raw samples, and shares of the payloads' sections.
        - `exact`: False if numbers of chunks and sizes are estimates from a sample.
        - `error`: see `expected_error`.
        - `labels`: in how many chunks a class scores at least 0.5, `from` the index or the headers.
        - `read`: bytes and requests that the description took.

    Raises
    ------
    UnsupportedArray
        If there is no such array or group, or `everything` is more chunks than the setting `max_chunks`.
    LabelIndexError
        If there is no label index of the array at `index`.
    ConfigurationError
        If there is an `index` for a group without arrays, or of several.
    """
    counter = Counter()
    node = open_node(source, name, options=storage_options, counter=counter)
    if isinstance(node, zarr.Array):
        return {"kind": "array", **_describe(node, index, everything, counter)}
    if index is not None:
        try:
            stored = StoredArray.open(node, counter=counter)
        except UnsupportedArray as error:
            raise ConfigurationError(f"index {index}: it is for one array; {error}") from error
        return {"kind": "array", **_describe(stored.array, index, everything, counter)}
    arrays: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    indices: list[str] = []
    models: list[str] = []
    for path, member in members(node):
        if any(path.startswith(f"{group}/") for group in indices):
            continue  # a version of an index, or an array of one
        if isinstance(member, zarr.Group):
            indices += [path] if INDEX in member.attrs else []
        elif embedded.ATTRIBUTE in member.attrs:
            models.append(path)
        else:
            (arrays if is_deepsic(member) else others).append(_describe(member, None, everything, Counter()))
    return {
        "kind": "group",
        "store": url_of(node.store_path),
        "zarr_format": node.metadata.zarr_format,
        "arrays": arrays,
        "other_arrays": others,
        "label_indices": indices,
        "embedded_models": models,
    }


def _describe(array: zarr.Array, index: Any, everything: bool, counter: Counter) -> dict[str, Any]:
    """Describe an array; `counter` counts reads."""
    if not is_deepsic(array):
        return {**_outline(array), "codec": codec_names(array)}
    stored = StoredArray(array, counter=counter)
    params, total = stored.params, stored.geometry.count
    labels = open_index(array, index) if total <= MAX_INDEXED else None
    if everything:
        check_count(total, "reading all headers", UnsupportedArray)
    starts = list(stored.reader.starts(stored.indices() if everything else _sample(stored)))
    size, writers = _summary_of_headers(stored, starts)
    exact = len(starts) == total
    if labels is not None and not exact:
        size |= _summary_of_index(stored, labels)
        exact = True
    count = size.pop("chunks")
    present = [start for _, start in starts if start is not None]
    quality = float(np.median([start.header.quality for start in present])) if present else None
    return {
        **_outline(array),
        "axes": params.axes,
        "dimension_names": stored.dimension_names,
        "codec": "deepsic",
        "codec_parameters": params.parameters(),
        "quality": params.quality,
        "semantics": params.semantics,
        "label_tile": list(stored.geometry.tile),
        "model": _model(stored),
        "chunks": {"total": total, "stored": count, "missing": total - count, "headers_read": len(starts)},
        "exact": exact,
        "written_by": writers,
        "size": size,
        "error": expected_error(params, array.dtype, present, quality),
        "labels": _classes_in_headers(stored, present) if labels is None else _classes_in_index(labels),
        "read": {
            "bytes": counter.bytes + (labels.bytes_read if labels else 0),
            "requests": counter.requests + (labels.requests if labels else 0),
        },
    }


def _outline(array: zarr.Array) -> dict[str, Any]:
    fill = None if array.fill_value is None else np.asarray(array.fill_value).item()
    return {
        "store": url_of(array.store_path),
        "path": array.path,
        "zarr_format": array.metadata.zarr_format,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "chunk_shape": list(array.chunks),
        "shard_shape": None if array.shards is None else list(array.shards),
        "fill_value": str(fill) if isinstance(fill, float) and not np.isfinite(fill) else fill,
    }


def _model(stored: StoredArray) -> dict[str, Any]:
    decoder, head = stored.decoder, stored.head
    return {
        "name": stored.params.model,
        "decoder": decoder,
        "head": head,
        "installed": _is_installed(decoder, None),
        "head_installed": _is_installed(decoder, head),
        "embedded": head is not None and embedded.is_embedded(stored.array, decoder, head),
    }


def _is_installed(decoder: str, head: str | None) -> bool:
    from deepsic_codec.model.zoo import find_model

    try:
        find_model(decoder, head=head)
    except ModelNotFound:
        return False
    return True


def _sample(stored: StoredArray) -> Iterable[Index]:
    """Return the positions of all chunks, or of a random sample if there are many."""
    total = stored.geometry.count
    if total <= MAX_HEADERS:
        return stored.indices()
    rng = np.random.default_rng(0)
    if total > MAX_INDEXED:  # `choice` would take memory for every chunk
        drawn = rng.integers(stored.grid, size=(MAX_HEADERS, len(stored.grid))).tolist()
        return sorted({tuple(index) for index in drawn})
    numbers = np.sort(rng.choice(total, MAX_HEADERS, replace=False))
    return zip(*(part.tolist() for part in np.unravel_index(numbers, stored.grid)), strict=True)


def _summary_of_headers(stored: StoredArray, starts: Sequence[Start]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the sizes of all chunks, scaled up from those read, and the models that wrote them."""
    headers = [(index, start.header) for index, start in starts if start is not None]
    scale = stored.geometry.count / max(1, len(starts))
    nbytes = sum(header.nbytes for _, header in headers)
    samples = sum(prod(p.stop - p.start for p in stored.geometry.chunk_region(index)) for index, _ in headers)
    parts: Tally[str] = Tally()
    for _, header in headers:
        parts["header"] += header.size
        for section in header.sections:
            parts[section_name(section.kind).removesuffix(" section")] += section.length
    size = _sizes(stored, round(scale * len(headers)), round(scale * nbytes), scale * samples)
    size["parts"] = {name: count / nbytes for name, count in parts.items()}
    writers = Tally((h.decoder.hex(), h.head.hex() if any(h.head) else None, h.quality, h.version) for _, h in headers)
    names = ("decoder", "head", "quality", "payload_format")
    return size, [{**dict(zip(names, key, strict=True)), "chunks": n} for key, n in writers.most_common()]


def _summary_of_index(stored: StoredArray, labels: Labels) -> dict[str, Any]:
    """Return the sizes of all chunks, as they were when they were indexed."""
    index = labels.index
    source, nbytes = index.read([(array, (...,)) for array in (index.source, index.member("nbytes"))])
    present = source != MISSING
    samples = present.astype(np.float64)
    for size, chunk, count in zip(stored.shape[::-1], stored.chunks[::-1], stored.grid[::-1], strict=True):
        samples = samples @ np.minimum(chunk, size - np.arange(count) * chunk)
    return _sizes(stored, int(present.sum()), int(nbytes[present].sum(dtype=np.int64)), float(samples))


def _sizes(stored: StoredArray, chunks: int, nbytes: int, samples: float) -> dict[str, Any]:
    """Return sizes from the number of stored chunks, their bytes, and the samples of the array in them."""
    itemsize = stored.array.dtype.itemsize
    return {
        "chunks": chunks,
        "bytes": nbytes,
        "array_bytes": prod(stored.shape) * itemsize,
        "bpp": 8 * nbytes * stored.axes.bands(stored.shape) / samples if samples else None,
        "bits_per_sample": 8 * nbytes / samples if samples else None,
        "ratio": samples * itemsize / nbytes if nbytes else None,
    }


def _classes_in_index(labels: Labels) -> dict[str, Any]:
    summary = labels.summary()
    return {"from": "index", "of_chunks": summary["header"] + summary["features"], "classes": summary["classes"]}


def _classes_in_headers(stored: StoredArray, starts: Sequence[PayloadStart]) -> dict[str, Any]:
    """Count the chunks that show a class, by the rule of `Labels.summary`."""
    if stored.params.semantics == "none":
        return {"from": None, "note": "stored without labels (semantics none)"}
    attributes = Attributes(stored)
    counts: Tally[str] = Tally()
    labelled = 0
    for start in starts:
        block = start.labels()
        if block is None:
            continue
        labelled += 1
        try:
            vocabulary = attributes.vocabulary(start.header)
        except DeepSICError as error:
            return {"from": None, "note": str(error)}
        largest = block.dense(len(vocabulary.names)).max(axis=(0, 1, 2))
        for name in vocabulary.known:
            counts[name] += bool(max(largest[number] for number in vocabulary.members(name)) >= 255 * SUMMARY_SCORE)
    if starts and not labelled:
        return {"from": None, "note": "labels are computed on demand (semantics post); deepsic index stores them"}
    return {"from": "headers", "of_chunks": labelled, "classes": dict(counts)}


def expected_error(
    params: CodecParams, dtype: np.dtype, starts: Iterable[PayloadStart] = (), quality: float | None = None
) -> dict[str, Any]:
    """Return the error to expect, as far as metadata and headers tell.

    Parameters
    ----------
    params : CodecParams
        Parameters of the array.
    dtype : numpy.dtype
        Dtype of the array.
    starts : iterable of PayloadStart
        Starts of chunks, for value ranges that were measured chunk by chunk.
    quality : float, optional
        Quality to assume if the parameters have none, such as the median over headers.

    Returns
    -------
    dict
        Unknown values are None.

        - `max_error`: bound on the error in units of the data.
        - `psnr`, `rmse`: target PSNR in dB, and target RMS error in units of the data.
        - `step`: nominal step of the quantiser in grey levels.
        - `rms`: RMS error in grey levels: that of the PSNR, otherwise step / sqrt(12), as uniform rounding in an
          orthonormal transform leaves it. Images whose detail is below the step have a smaller error.
        - `unit`: a grey level in units of the data, one number or one for each band; the median over chunks if each
          has its own scale.
    """
    quality = params.quality if params.quality is not None else quality
    step = None if quality is None else deep_step(quality)
    rms = None if step is None else step / 12**0.5
    if params.psnr is not None:  # the quality of each chunk was chosen to reach it
        rms = 255 / 10 ** (params.psnr / 20)
    unit = _unit(params.parameters().get("value_range"), np.dtype(dtype), starts)
    targets = {"max_error": params.max_error, "psnr": params.psnr, "rmse": params.rmse}
    return targets | {"step": step, "rms": rms, "unit": unit}


def _unit(value_range: Any, dtype: np.dtype, starts: Iterable[PayloadStart]) -> float | list[float] | None:
    """Return a grey level in units of the data."""
    if isinstance(value_range, list):
        ends = np.asarray(value_range, np.float64)
        units = np.atleast_1d((ends[..., 1] - ends[..., 0]) / 255)
    elif value_range is None and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        units = np.array([(int(limits.max) - int(limits.min)) / 255])
    else:
        measured = [ranges for start in starts if (ranges := _ranges(start)) is not None]
        if len({len(ranges) for ranges in measured}) != 1:
            return None
        units = np.median([(ranges[:, 1] - ranges[:, 0]) / 255 for ranges in measured], axis=0)
    return float(units[0]) if (units == units[0]).all() else units.tolist()


def _ranges(start: PayloadStart) -> np.ndarray | None:
    """Return the value ranges of a chunk, float64 (bands, 2), if they lie in the bytes that were read."""
    entry = start.header.entry(VALUE_RANGE.kind)
    if entry is None or entry.offset + entry.length > len(start.data):
        return None
    return np.asarray(read_section(start.data, start.header, VALUE_RANGE), np.float64)
