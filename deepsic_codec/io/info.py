"""What is in an archive, from metadata, the label index, and the headers of some or all chunks. Nothing is decoded."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import zarr

from deepsic_codec.axes import Index, ceil_div
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.errors import DeepSICError, LabelIndexError, ModelNotFound
from deepsic_codec.labels.attributes import Attributes
from deepsic_codec.labels.index import ATTRIBUTE as INDEX
from deepsic_codec.labels.index import MISSING, LabelIndex
from deepsic_codec.labels.query import LARGE, Labels
from deepsic_codec.payload.constants import quality_step
from deepsic_codec.payload.header import read_section
from deepsic_codec.payload.sections import VALUE_RANGE, section_name
from deepsic_codec.stored import embedded
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.layout import codec_names
from deepsic_codec.stored.location import Counter, IndexLocation, is_deepsic, open_node
from deepsic_codec.stored.reader import PayloadStart

SAMPLE = 1024  # headers read where there are more chunks, unless all are asked for
LARGE_INDEX = 1 << 24  # chunks: the columns of an index of more are not read for a summary


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
        Where the label index is, if not beside the array.
    everything : bool
        Read the headers of all chunks; otherwise of at most 1024, evenly at random, of each array.
    storage_options : dict, optional
        For fsspec, if `source` is a URL.

    Returns
    -------
    dict
        In JSON types. For an array what `describe_array` returns, with `kind` "array"; for a group `kind` "group",
        `zarr_format`, `arrays` (those stored with DeepSIC), `others`, with their shape, dtype and codecs, and the paths
        of `label_indices` and `embedded_models`.

    Raises
    ------
    UnsupportedArray
        If there is no such array or group.
    """
    counter = Counter()
    node = open_node(source, name, options=storage_options, counter=counter)
    if isinstance(node, zarr.Array):
        return {"kind": "array", **_array(node, index, everything, counter)}
    described: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    indices: list[str] = []
    models: list[str] = []
    for path, member in sorted(node.members(max_depth=None)):
        if isinstance(member, zarr.Group):
            indices += [path] if INDEX in member.attrs else []
        elif embedded.ATTRIBUTE in member.attrs:
            models.append(path)
        elif not any(path.startswith(f"{place}/") for place in indices):
            one = _array(member, index, everything, Counter())
            (described if "codec_parameters" in one else others).append(one)
    return {
        "kind": "group",
        "store": str(node.store_path),
        "zarr_format": node.metadata.zarr_format,
        "arrays": described,
        "others": others,
        "label_indices": indices,
        "embedded_models": models,
    }


def _array(array: zarr.Array, index: Any, everything: bool, counter: Counter) -> dict[str, Any]:
    if is_deepsic(array):
        return describe_array(array, index=index, everything=everything, counter=counter)
    return _outside(array)


def describe_array(
    array: zarr.Array, *, index: Any = None, everything: bool = False, counter: Counter | None = None
) -> dict[str, Any]:
    """Describe an array stored with DeepSIC.

    Returns
    -------
    dict
        Beside shape, dtype and the like: `codec_parameters`, all of them; `model`, whether it is `here` and where;
        `written_by`, the identities found in headers; `chunks`, how many there are and how many are stored or
        missing; `size`, bytes, bits per pixel, ratio to the samples, parts of the payloads; `exact`, False where these
        are estimates from a sample; `error`, what the quality means in grey levels and units of the data; `labels`,
        in how many chunks a class scores 0.5 at least, and where that comes from; `read`, what it took.
    """
    counter = counter or Counter()
    stored = StoredArray(array, counter=counter)
    config, geometry = stored.params, stored.geometry
    result: dict[str, Any] = _outline(array)
    result |= {
        "axes": config.axes,
        "dimension_names": stored.dimension_names,
        "codec": "deepsic",
        "codec_parameters": config.parameters(),
        "quality": config.quality,
        "semantics": config.semantics,
        "label_tile": list(geometry.tile),
        "model": _model(stored),
    }
    labels, why = _labels(stored, index, counter)
    heads = list(_heads(stored, everything))
    stats = _of_heads(array, geometry, heads)
    exact = len(heads) == geometry.count
    if labels is not None and not exact:
        stats |= _of_index(array, labels, geometry)
        exact = True
    total, found = geometry.count, stats.pop("found")
    result["chunks"] = {"total": total, "stored": found, "missing": total - found, "headers_read": len(heads)}
    result["exact"] = exact
    result["written_by"] = stats.pop("written_by")
    result["size"] = stats
    found_heads = [head for _, head in heads if head is not None]
    quality = float(np.median([head.header.quality for head in found_heads])) if found_heads else None
    result["error"] = error_of(config, array.dtype, found_heads, quality)
    if labels is not None:
        summary = labels.summary()
        result["labels"] = {
            "from": "index",
            "of_chunks": summary["header"] + summary["features"],
            "classes": summary["classes"],
        }
    else:
        result["labels"] = _shown(stored, heads, why)
    result["read"] = {"bytes": counter.bytes, "requests": counter.requests}
    return result


def _outline(array: zarr.Array) -> dict[str, Any]:
    fill = array.fill_value
    return {
        "store": str(array.store_path),
        "path": array.path,
        "zarr_format": array.metadata.zarr_format,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "chunk_shape": list(array.chunks),
        "shard_shape": None if array.shards is None else list(array.shards),
        "fill_value": None if fill is None else _plain(fill),
    }


def _plain(value: Any) -> Any:
    value = np.asarray(value).item()
    return value if isinstance(value, int | bool | str) or np.isfinite(value) else str(value)


def _outside(array: zarr.Array) -> dict[str, Any]:
    return {**_outline(array), "codec": codec_names(array)}


def _model(stored: StoredArray) -> dict[str, Any]:
    from deepsic_codec.model.zoo import find_model

    config, decoder, head = stored.params, stored.decoder, stored.head
    about: dict[str, Any] = {"name": config.model, "decoder": decoder, "head": head}
    about["embedded"] = head is not None and embedded.is_embedded(stored.array, decoder, head)
    try:
        info = find_model(decoder)
        heads = head is None or info.head.startswith(head) or _has_head(config)
        return {**about, "here": True, "head_here": heads, "file": getattr(info, "path", "")}
    except ModelNotFound:
        return {**about, "here": False, "head_here": False, "file": None}


def _has_head(config: CodecParams) -> bool:
    from deepsic_codec.model.zoo import find_model

    try:
        decoder, head = config.identity()
        find_model(decoder, head=head)
    except ModelNotFound:
        return False
    return True


def _labels(stored: StoredArray, index: Any, counter: Counter) -> tuple[Labels | None, str]:
    """Open the label index, or say why it cannot be opened."""
    if stored.geometry.count > LARGE_INDEX:
        return None, "too many chunks to read the index for a summary"
    array = stored.array
    try:
        if index is None:
            location = IndexLocation.sibling_of(array)
        else:
            location = IndexLocation.from_user(index, array.metadata.zarr_format)
    except LabelIndexError:
        return None, "no index"
    try:
        return Labels(stored, LabelIndex(location, counter)), ""
    except LabelIndexError as error:
        stale = "no label index" not in str(error)
        return None, str(error) if stale else "no index"


def _heads(stored: StoredArray, everything: bool) -> Iterator[tuple[Index, PayloadStart | None]]:
    total = stored.geometry.count
    indices: Iterable[Index] = stored.indices()
    if total > SAMPLE and not everything:
        picked = np.sort(np.random.default_rng(0).choice(total, SAMPLE, replace=False))
        indices = zip(*(part.tolist() for part in np.unravel_index(picked, stored.grid)), strict=True)
    return stored.reader.starts(indices)


def _of_heads(array: zarr.Array, geometry: Geometry, heads: list[tuple[Index, PayloadStart | None]]) -> dict[str, Any]:
    """Sum up headers; what stands for more chunks than were read is scaled up."""
    present = [(index, head.header) for index, head in heads if head is not None]
    part = geometry.count / max(1, len(heads))
    nbytes = sum(header.nbytes for _, header in present)
    samples = sum(prod(p.stop - p.start for p in geometry.chunk_region(index)) for index, _ in present)
    parts: Tally[str] = Tally()
    for _, header in present:
        parts["header"] += header.size
        for section in header.sections:
            parts[section_name(section.kind).removesuffix(" section")] += section.length
    writers = Tally((h.decoder.hex(), h.head.hex() if any(h.head) else None, h.quality, h.version) for _, h in present)
    return {
        "found": round(part * len(present)),
        **_sizes(array, geometry, round(part * nbytes), part * samples),
        "parts": {name: count / nbytes for name, count in parts.items()},
        "written_by": [
            {"decoder": decoder, "head": head, "quality": quality, "payload_format": version, "chunks": count}
            for (decoder, head, quality, version), count in writers.most_common()
        ],
    }


def _of_index(array: zarr.Array, labels: Labels, geometry: Geometry) -> dict[str, Any]:
    nbytes, source = labels.index.group["nbytes"], labels.index.source
    assert isinstance(nbytes, zarr.Array)
    there = np.asarray(source[...]) != MISSING
    covered = there.astype(np.float64)
    for size, chunk in zip(reversed(array.shape), reversed(array.chunks), strict=True):
        covered = covered @ np.minimum(chunk, size - np.arange(ceil_div(size, chunk)) * chunk)
    stored_bytes = int(np.asarray(nbytes[...])[there].sum(dtype=np.int64))
    return {"found": int(there.sum()), **_sizes(array, geometry, stored_bytes, float(covered))}


def _sizes(array: zarr.Array, geometry: Geometry, nbytes: int, samples: float) -> dict[str, Any]:
    """Bytes, and what they are per pixel and sample; `samples` are those of the array in stored chunks."""
    channels = geometry.axes.bands(array.shape)
    return {
        "bytes": nbytes,
        "array_bytes": prod(array.shape) * array.dtype.itemsize,
        "bpp": 8 * nbytes * channels / samples if samples else None,
        "bits_per_sample": 8 * nbytes / samples if samples else None,
        "ratio": samples * array.dtype.itemsize / nbytes if nbytes else None,
    }


def _shown(stored: StoredArray, heads: list[tuple[Index, PayloadStart | None]], why: str) -> dict[str, Any]:
    """Count classes in headers, by the rule of `Labels.summary`."""
    if stored.params.semantics == "none":
        return {"from": None, "note": "stored without labels (semantics none)"}
    attributes = Attributes(stored)
    counts: Tally[str] = Tally()
    known: dict[str, None] = {}
    labelled = 0
    for _, head in heads:
        block = None if head is None else head.labels()
        if head is None or block is None:
            continue
        labelled += 1
        try:
            vocabulary = attributes.vocabulary(head.header)
        except DeepSICError as error:
            return {"from": None, "note": str(error)}
        largest = block.dense(len(vocabulary.names)).max(axis=(0, 1, 2))
        known |= dict.fromkeys(vocabulary.known)
        for name in vocabulary.known:
            counts[name] += bool(max(largest[number] for number in vocabulary.members(name)) >= 255 * LARGE)
    if not labelled and any(head is not None for _, head in heads):
        note = "labels are computed from features when asked for (semantics post); deepsic index writes them down"
        return {"from": None, "note": note}
    classes = {name: counts[name] for name in known}
    return {"from": "headers", "of_chunks": labelled, "classes": classes, "note": why}


def error_of(
    config: CodecParams, dtype: np.dtype, heads: Iterable[PayloadStart] = (), quality: float | None = None
) -> dict[str, Any]:
    """Say what error to expect, as far as metadata and headers tell.

    Parameters
    ----------
    config : CodecParams
        Of the array.
    dtype : numpy.dtype
        Of the array.
    heads : iterable of PayloadStart
        Of chunks, for value ranges that were measured per chunk.
    quality : float, optional
        Where the configuration has none, such as the median over headers.

    Returns
    -------
    dict
        `max_error`, the bound in units of the data if there is one; `psnr`, if the codec was asked for one. `step`,
        the quantiser's nominal step in grey levels, and `rms`: what that PSNR is, otherwise step / sqrt(12), which
        uniform rounding in an orthonormal transform would leave; images whose detail is below the step come out better.
        `unit`, what a grey level is in units of the data, one number or one for each band (the median over chunks where
        each has a scale of its own); `step_data` and `rms_data`, the same in these units. None for what is not known.
    """
    parameters = config.parameters()
    quality = config.quality if config.quality is not None else quality
    step = None if quality is None else quality_step(quality)
    rms = None if step is None else step / 12**0.5
    if parameters.get("psnr") is not None:  # then every chunk's quality was chosen for that
        rms = 255 / 10 ** (parameters["psnr"] / 20)
    unit = _unit(parameters.get("value_range"), np.dtype(dtype), heads)
    return {
        "max_error": parameters.get("max_error"),
        "psnr": parameters.get("psnr"),
        "step": step,
        "rms": rms,
        "unit": unit,
        "step_data": None if unit is None or step is None else np.multiply(unit, step).tolist(),
        "rms_data": None if unit is None or rms is None else np.multiply(unit, rms).tolist(),
    }


def _unit(value_range: Any, dtype: np.dtype, heads: Iterable[PayloadStart]) -> float | list[float] | None:
    """Units of the data in a grey level."""
    if isinstance(value_range, list):
        ends = np.asarray(value_range, np.float64)
        units = np.atleast_1d((ends[..., 1] - ends[..., 0]) / 255)
    elif value_range is None and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        units = np.array([(int(limits.max) - int(limits.min)) / 255])
    else:
        measured = [ranges for head in heads if (ranges := _ranges(head)) is not None]
        if not measured:
            return None
        bands = {len(ranges) for ranges in measured}
        if len(bands) > 1:
            return None
        units = np.median([(ranges[:, 1] - ranges[:, 0]) / 255 for ranges in measured], axis=0)
    return float(units[0]) if (units == units[0]).all() else units.tolist()


def _ranges(head: PayloadStart) -> np.ndarray | None:
    """Value ranges of a chunk, float64 (bands, 2), if its header's read had them."""
    entry = head.header.entry(VALUE_RANGE.kind)
    if entry is None or entry.offset + entry.length > len(head.data):
        return None
    ranges = read_section(head.data, head.header, VALUE_RANGE)
    return None if ranges is None else ranges.astype(np.float64)
