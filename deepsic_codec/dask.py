"""Write and read archives with Dask: each task encodes or decodes a block of many chunks as one batch.

Dask schedules; nothing here does. Where tasks run is chosen as for any other Dask computation: the threads of this
process by default, or the workers of a `distributed.Client`. Each process takes device, batch limit and threads from
its own `deepsic_codec.config`, that is from the DEEPSIC_* variables of its environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import zarr

from deepsic_codec import config as settings
from deepsic_codec.archive import create_array, open_archive
from deepsic_codec.axes import Index, Region, chunks_covering, grid_shape, iter_grid
from deepsic_codec.bulk.index import index_place, write_index
from deepsic_codec.bulk.layout import Layout
from deepsic_codec.bulk.plan import block_shape, check_region, usual_batch
from deepsic_codec.bulk.read import Source
from deepsic_codec.bulk.resume import complete_chunks
from deepsic_codec.bulk.write import Heads, Options, Written, write_block
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.errors import ConfigurationError, UnsupportedArray, WriteError
from deepsic_codec.stored import embedded as embed
from deepsic_codec.stored.location import given
from deepsic_codec.stored.location import storage_options as for_many_requests

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True)
class Report:
    """What a bulk write did.

    Attributes
    ----------
    array : zarr.Array
        The array written to.
    written : int
        Chunks encoded and stored.
    skipped : int
        Chunks that were complete already.
    empty : int
        Chunks that are the fill value everywhere, and therefore not stored.
    nbytes : int
        Bytes stored by this run.
    index : str or None
        Where the label index is.
    """

    array: zarr.Array
    written: int
    skipped: int
    empty: int
    nbytes: int
    index: str | None


def store(
    source: Any,
    target: Any,
    *,
    name: str | None = None,
    codec: CodecParams | None = None,
    chunks: Sequence[int] | str = "auto",
    shards: Sequence[int] | None = None,
    batch_size: int | None = None,
    region: Any = None,
    resume: bool | str = False,
    compute: bool = True,
    index: Any = "auto",
    retries: int = 5,
    backoff: float = 0.2,
    overwrite: bool = False,
    embed_model: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Write an array to an archive, many chunks at a time, and then its label index.

    Each task encodes a block of whole chunks and sets their keys; nothing is read before it is written, and no two
    tasks write one shard. Pixels beyond the edge of the array get no labels.

    Parameters
    ----------
    source : dask.array.Array, xarray.DataArray or array_like
        Of a dtype that the codec takes. Of a DataArray, the names of dimensions and the attributes go along.
    target : str, Path, store, zarr.Group or zarr.Array
        Where to. An array that exists is written to if it is given as one, or with `region`, `resume` or `overwrite`.
    name : str, optional
        Path of the array in the group that `target` is or becomes. An array without one is at the root of its store,
        where no index can be beside it.
    codec : DeepSIC or DeepSICCodec, optional
        `DeepSIC()` by default, or that of the array.
    chunks, shards : tuple of int, optional
        As for `create_array`.
    batch_size : int, optional
        Chunks encoded in one call. A task gets as many, up to double, or a shard if that has more. By default 16, and
        256, of 64 Mpx together at most, if this process has a GPU (or is told so, `config.set(device="cuda")`, where
        only its workers have one).
    region : tuple of slice, optional
        Part of an existing array that `source` is for; whole chunks (or shards).
    resume : bool or "verify"
        Go on with a run that was interrupted: chunks stored whole by this codec are neither computed nor encoded
        again. That is seen from header and length of a payload; "verify" reads all of it and checks all checksums.
    compute : bool
        False returns a `dask.delayed.Delayed` that gives the report. The array is created now in any case.
    index : "auto", bool or location
        Where the label index goes: beside the array if there can be one ("auto"), there or an error (True), nowhere
        (False), or where `zarr.open_group` is told.
    retries : int
        How often a failing write is tried again.
    backoff : float
        Seconds before the first retry; doubled for each further one.
    overwrite : bool
        Delete what is there.
    embed_model : bool
        Store the model beside the array, as `create_array` does; also beside one that exists.
    storage_options : dict, optional
        For fsspec, if `target` is a URL.
    **kwargs
        More for `create_array`: `attributes`, `zarr_format`, `fill_value`, ...

    Returns
    -------
    Report or dask.delayed.Delayed
        What was done.

    Raises
    ------
    UnsupportedArray
        If the source has a dtype that the codec does not take or another shape than its place, or the region cuts
        chunks.
    ConfigurationError
        If the array that exists has another codec or model.
    ModelNotFound
        If the model is not there.
    LabelIndexError
        If the index has no place. Nothing has been written when one of these is raised.
    WriteError
        If the store would not take some of the chunks. All others are written, but no index.
    """
    _check_options(batch_size, retries, resume)
    da = _dask()
    values = _as_dask(source, da)
    array = _open_target(
        source,
        values,
        target,
        name,
        codec,
        chunks,
        shards,
        storage_options=storage_options,
        region=region,
        resume=resume,
        overwrite=overwrite,
        more=kwargs | ({"embed_model": True} if embed_model else {}),
    )
    if embed_model:
        embed.embed_model(array)  # does nothing if it is there
    config = Layout(array).config
    _check_model(config)
    where = check_region(array, region)
    shape = tuple(part.stop - part.start for part in where)
    if values.shape != shape:
        raise UnsupportedArray(f"source {values.shape} for a region of {shape} of array {array.shape}")
    place = index_place(array, index)
    if batch_size is None:
        batch_size = usual_batch(array, config.axes, settings.device_in_use(loading=True).startswith("cuda"))
    options = Options(batch_size=batch_size, retries=retries, backoff=backoff)
    values, blocks, skipped = _plan(array, config, values, where, batch_size, resume)
    report = _report(array, values, blocks, options, skipped, place)
    return report.compute() if compute else report


def open(
    source: Any,
    name: str | None = None,
    *,
    chunks: Any = "auto",
    batch_size: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> da.Array:
    """Open an array stored with DeepSIC as a Dask array, each block of which is decoded as one batch.

    Parameters
    ----------
    source : str, Path, store, zarr.Group or zarr.Array
        The array, or a group that has it.
    name : str, optional
        Path of the array in the group; needed if the group has more than one stored with DeepSIC.
    chunks : "auto" or as for `dask.array.from_array`
        Blocks of the Dask array. "auto" makes them of `batch_size` chunks, up to double. Others work too, but those
        that cut chunks decode them more than once.
    batch_size : int, optional
        Chunks decoded in one call; a larger block takes several. The default is that of `store`, where torch has been
        imported or the device is set.
    storage_options : dict, optional
        For fsspec, if `source` is a URL.
    **kwargs
        More for `zarr.open`.

    Raises
    ------
    UnsupportedArray, UnsupportedPayload
        If there is no such array.
    """
    _check_options(batch_size, 0, False)
    da = _dask()
    if not isinstance(source, zarr.Array):
        if isinstance(source, zarr.Group):
            source = source.store_path
        else:
            kwargs["storage_options"] = for_many_requests(source, storage_options)
        source = open_archive(source, name, **kwargs)
    axes = Layout(source).config.axes
    if batch_size is None:
        batch_size = usual_batch(source, axes, settings.device_in_use().startswith("cuda"))
    if isinstance(chunks, str) and chunks == "auto":
        chunks = block_shape(source, axes, source.chunks, batch_size)
    empty = np.empty((0,) * source.ndim, source.dtype)
    # A name of its own: chunks may be written again, and equal names would mean equal values. With fancy=False, Dask
    # would no longer join a slice with the reading of its block, and decode all of the block.
    return da.from_array(Source(source, batch_size), chunks=chunks, name=False, fancy=True, lock=False, meta=empty)


def _dask() -> Any:
    try:
        import dask.array as da
    except ImportError as error:
        raise ImportError("deepsic_codec.dask needs Dask: pip install 'deepsic-codec[dask]'") from error
    return da


def _check_options(batch_size: int | None, retries: int, resume: bool | str) -> None:
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigurationError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    if not isinstance(retries, int) or retries < 0:
        raise ConfigurationError(f"retries: expected an integer of at least 0, got {retries!r}")
    if resume not in (True, False, "verify"):
        raise ConfigurationError(f"resume: expected True, False or 'verify', got {resume!r}")


def _is_labelled(source: Any) -> bool:
    """Tell a DataArray without importing xarray."""
    return all(hasattr(source, name) for name in ("dims", "attrs", "data", "coords"))


def _as_dask(source: Any, da: Any) -> da.Array:
    if hasattr(source, "data_vars"):
        raise UnsupportedArray("source: a Dataset; pass one of its variables, dataset[name]")
    if isinstance(source, zarr.Array):
        source = da.from_zarr(source)
    if _is_labelled(source):
        # Without Dask, `data` would load what may be a whole file.
        source = (source.chunk("auto") if source.chunks is None else source).data
    values = source
    values = values if isinstance(values, da.Array) else da.from_array(np.asarray(values))
    if any(np.isnan(size) for size in values.shape):
        raise UnsupportedArray("source: a Dask array of unknown shape; call its compute_chunk_sizes() first")
    return values


def _open_target(
    source: Any,
    values: da.Array,
    target: Any,
    name: str | None,
    codec: CodecParams | None,
    chunks: Sequence[int] | str,
    shards: Sequence[int] | None,
    *,
    storage_options: Mapping[str, Any] | None,
    region: Any,
    resume: bool | str,
    overwrite: bool,
    more: dict[str, Any],
) -> zarr.Array:
    """Return the array to write to, created if need be."""
    if isinstance(target, zarr.Array) and name is not None:
        raise ConfigurationError(f"name: the target is an array, which has no array {name!r} in it")
    if isinstance(target, zarr.Array):
        existing: zarr.Array | None = target
    else:
        options = for_many_requests(target, storage_options)
        place = given(target, 3, options, write=True)
        path = "/".join(part for part in (place.path, (name or "").strip("/")) if part)
        existing = _existing(place.store, path)
        if existing is not None and not (overwrite or resume or region is not None):
            raise ConfigurationError(
                f"array {existing.store_path} exists: pass resume=True to complete it, region=... to write a part of "
                "it, overwrite=True to delete it first, or another name"
            )
    if existing is not None and not overwrite:
        _check_existing(existing, values, codec, chunks, shards, more)
        return existing
    if isinstance(target, zarr.Array):
        raise ConfigurationError("overwrite: an open array cannot be replaced; pass the place where it is")
    if region is not None:
        raise UnsupportedArray(f"region: there is no array {path!r} yet in {place.store} that it could be a part of")
    codec = DeepSIC() if codec is None else codec
    if not isinstance(codec, CodecParams):
        raise ConfigurationError(f"codec: expected DeepSIC(...) or DeepSICCodec(...), got {codec!r}")
    _check_model(codec)
    if _is_labelled(source):
        more.setdefault("dimension_names", [str(dimension) for dimension in source.dims])
        more["attributes"] = {**_plain(source.attrs), **(more.get("attributes") or {})}
    return create_array(
        place.store,
        name=path or None,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        shards=shards,
        codec=codec,
        overwrite=overwrite,
        **more,
    )


def _existing(store: Any, path: str) -> zarr.Array | None:
    try:
        found = zarr.open(store, path=path, mode="r+")
    except FileNotFoundError:
        return None
    if isinstance(found, zarr.Group):
        if not path and not any(True for _ in found.members()):
            return None  # an empty group, which the array then replaces
        raise ConfigurationError(f"{found.store_path} is a group; pass the name of the array in it")
    return found


def _check_existing(
    array: zarr.Array,
    values: da.Array,
    codec: CodecParams | None,
    chunks: Sequence[int] | str,
    shards: Sequence[int] | None,
    more: Mapping[str, Any],
) -> None:
    """Raise unless what is asked for is what the array is."""
    config = Layout(array).config
    if codec is not None:
        asked, has = codec.to_json(), config.to_json()
        different = [
            key for key in has | asked if asked.get(key) != has.get(key) and key != "model"
        ]  # a name; decoder is the model
        if different:
            texts = ", ".join(f"{key} {has.get(key)!r}, not {asked.get(key)!r}" for key in different)
            raise ConfigurationError(
                f"array {array.store_path} has another codec: {texts}; its chunks would be of two kinds. Write to "
                "another place, or without `codec`"
            )
    for what, given_shape, has_shape in (("chunks", chunks, array.chunks), ("shards", shards, array.shards)):
        if given_shape not in (None, "auto") and tuple(given_shape) != has_shape:
            raise ConfigurationError(f"array {array.store_path} has {what} {has_shape}, not {tuple(given_shape)}")
    if more.get("zarr_format", array.metadata.zarr_format) != array.metadata.zarr_format:
        raise ConfigurationError(f"array {array.store_path} is of Zarr format {array.metadata.zarr_format}")
    if values.dtype != array.dtype:
        raise UnsupportedArray(f"source of {values.dtype} for array {array.store_path} of {array.dtype}")
    if array.read_only:
        raise ConfigurationError(f"array {array.store_path} is open for reading only")


def _check_model(config: CodecParams) -> None:
    from deepsic_codec.model.zoo import find_model

    decoder, head = config.identity()
    find_model(decoder, head=head)


def _plain(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return attributes as JSON can hold them, numpy's scalars and arrays as numbers and lists."""
    return {str(key): value.tolist() if hasattr(value, "tolist") else value for key, value in attributes.items()}


Block = tuple[Index, Index, tuple[Index, ...] | None]


def _plan(
    array: zarr.Array, config: CodecParams, values: da.Array, where: Region, batch_size: int, resume: bool | str
) -> tuple[da.Array, list[Block], int]:
    """Cut the source into blocks and leave out what is complete.

    Returns
    -------
    (dask.array.Array, list, int)
        The source in blocks; for each block to be written its place among them, its first chunk, and the chunks to
        encode (None for all); and the number of complete chunks.
    """
    shape = block_shape(array, config.axes, [max(sizes) for sizes in values.chunks], batch_size)
    values = values.rechunk(shape)
    done: set[Index] = set()
    if resume:
        done = complete_chunks(
            array, list(iter_grid(*chunks_covering(where, array.chunks))), read_all=resume == "verify"
        )
    blocks: list[Block] = []
    for place in np.ndindex(*values.numblocks):
        starts = [part.start + i * size for part, i, size in zip(where, place, shape, strict=True)]
        stops = [min(start + size, part.stop) for start, size, part in zip(starts, shape, where, strict=True)]
        region = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
        first, last = chunks_covering(region, array.chunks)
        todo = None
        if done:
            missing = tuple(index for index in iter_grid(first, last) if index not in done)
            if not missing:
                continue
            todo = missing
        blocks.append((place, first, todo))
    return values, blocks, len(done)


def _report(
    array: zarr.Array, values: da.Array, blocks: Sequence[Block], options: Options, skipped: int, place: Any
) -> Any:
    """Put the tasks into one graph; by hand, as a Delayed for each of many blocks takes ten times the memory."""
    import dask
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph

    (values,) = dask.optimize(values)  # of a Delayed, Dask leaves what it depends on as it is
    run = uuid4().hex
    target, report = f"target-{run}", f"report-{run}"
    # One node for the array, so that a worker gets it once. The rest is bound to the functions: Dask would take tuples
    # among the arguments for keys.
    graph: dict[Any, Any] = {target: array}
    for number, (at, first, todo) in enumerate(blocks):
        write = partial(write_block, first=first, todo=todo, options=options)
        graph[f"write_block-{run}-{number}"] = (write, (values.name, *at), target)
    results = [key for key in graph if key != target]
    graph[report] = (partial(_finish, skipped=skipped, place=place), target, results)
    sources: Any = [values] if blocks else []
    return Delayed(report, HighLevelGraph.from_collections(report, graph, dependencies=sources))


def _finish(array: zarr.Array, results: Sequence[Written], skipped: int, place: Any) -> Report:
    """Report what the tasks did, and write the index."""
    failed = {key: reason for result in results for key, reason in result.failed.items()}
    if failed:
        some = ", ".join(f"{key} ({reason})" for key, reason in list(failed.items())[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise WriteError(
            f"the store would not take {len(failed)} keys: {some}{more}. All else is written; mend the store and write "
            "again with resume=True",
            sorted(failed),
        )
    heads = Heads.join(grid_shape(array.shape, array.chunks), [result.heads for result in results])
    if place is not None:
        write_index(array, place, heads)
    return Report(
        array=array,
        written=len(heads),
        skipped=skipped,
        empty=sum(result.empty for result in results),
        nbytes=sum(result.nbytes for result in results),
        index=None if place is None else str(place),
    )
