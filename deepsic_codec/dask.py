"""Write and read archives with Dask: each task encodes or decodes a block of many chunks as one batch.

Dask alone schedules tasks. As in any Dask computation, they run in threads of this process by default, or on the
workers of a `distributed.Client`. Each process takes device, batch limit and threads from its own
`deepsic_codec.config`, which reads the DEEPSIC_* variables of its environment.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import zarr
from zarr.storage import MemoryStore, StorePath, ZipStore

from deepsic_codec import config as settings
from deepsic_codec.archive import codec_for, create_array, existing_array, measured_codec, open_archive, plain_array
from deepsic_codec.axes import Axes, Index, Region, chunks_covering, iter_grid
from deepsic_codec.bulk.index import index_location, mark_outdated, write_index
from deepsic_codec.bulk.plan import block_shape, check_region, default_batch_size
from deepsic_codec.bulk.preview import ReducedArray, thumbnail
from deepsic_codec.bulk.read import BatchedArray
from deepsic_codec.bulk.resume import RECORD, Journal, complete_chunks
from deepsic_codec.bulk.write import BlockReport, PackedStarts, WriteOptions, check_map, check_process, write_block
from deepsic_codec.codec.measure import thinned
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.scaled import nodata_value
from deepsic_codec.errors import ConfigurationError, DeepSICError, UnsupportedArray, WriteError
from deepsic_codec.labels import html
from deepsic_codec.progress import Progress
from deepsic_codec.require import require
from deepsic_codec.stored import coordinates as places
from deepsic_codec.stored import embedded, replacement
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import (
    IndexLocation,
    is_process_bound,
    is_zip_path,
    refresh_consolidated,
    to_store_path,
    url_of,
    with_absolute_path,
)

if TYPE_CHECKING:
    import dask.array as da

MEASURED_BLOCKS = 32  # of a Dask array, from which the range of its values is measured


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

    def _repr_html_(self) -> str:
        stored = StoredArray(self.array)
        ratio = f"{self.nbytes:,} bytes stored by this run, of {self.array.nbytes:,} bytes of samples"
        chunks = f"{self.written:,} written, {self.skipped:,} complete, {self.empty:,} empty"
        return html.table({**html.about(stored), "bytes": ratio, "written": chunks}, thumbnail(stored))


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
    coordinates: bool = True,
    quality_map: Any = None,
    keep: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Write an array to an archive, many chunks at a time, and then its label index.

    Each task encodes a block of whole chunks and stores them; nothing is read before it is written, and no two tasks
    write to the same shard. Pixels beyond the edge of the array get no labels.

    Parameters
    ----------
    source : dask.array.Array, xarray.DataArray or array_like
        Of a dtype that the codec takes. The dimension names, attributes and coordinates of a DataArray are stored too,
        and its place: see `docs/howto/xarray.md`.
    target : str, Path, store, zarr.Group or zarr.Array
        Where to. An existing array is written to if it is passed as an array, or with `region`, `resume` or
        `overwrite`. The path of a new zip file makes one with this array alone. What only this process can write to,
        such as memory, a zip file or a session of Icechunk, is written by threads of this process, whatever the
        scheduler of Dask.
    name : str, optional
        Path of the array in the group `target`, which is created if it does not exist. Without a name, the array is at
        the root of its store, where no index can be beside it.
    codec : DeepSIC or DeepSICCodec, optional
        `DeepSIC()` with the axes that the dimensions of a DataArray are named for, or that of the array. A new array of
        16 bits or float32 without a `value_range` gets that of its values, as for `create_array`: up to 32 blocks of
        the source are computed once more to measure it.
    chunks, shards : tuple of int, optional
        As for `create_array`.
    batch_size : int, optional
        Chunks encoded in one call. A task gets this number, up to double, or a shard if that has more. The default is
        16, or 256 (fewer if they have more than 64 Mpx) if this process has a GPU. Where only the workers have one,
        set it here too: `config.set(device="cuda")`.
    region : tuple of slice, optional
        Part of an existing array that `source` is written to; whole chunks (or shards).
    resume : bool or "verify"
        Go on with a run that was interrupted: chunks that earlier runs stored completely, from a source of the same
        name in Dask, with the same region and parameters, are neither computed nor encoded again. True reads the header
        of each payload and compares its length; "verify" reads all of each payload and checks all checksums.
    compute : bool
        False returns a `dask.delayed.Delayed` whose result is the report. The array is created now in any case.
    index : "auto", bool or location
        Where the label index goes: "auto" is beside the array if possible, else no index; True is beside the array or
        an error; False is no index; any other is a location as `zarr.open_group` takes.
    retries : int
        How often a failing write is tried again.
    backoff : float
        Seconds before the first retry; doubled for each further one.
    overwrite : bool
        Replace an existing array when the new one is complete, which may be made from it; until then, and if writing
        fails, the old one is there. (In a session of Icechunk, it is deleted first.)
    embed_model : bool
        Store the model beside the array, as `create_array` does; also beside an existing array.
    coordinates : bool
        Store the coordinates of a new array beside it, where xarray finds them: those of a DataArray, and those that
        follow from the attributes `crs` and `transform`.
    quality_map, keep : optional
        Qualities of pixels of the source, and of what labels find, as for `create_array`. An array of Dask is computed
        as a whole; a function is called where chunks are encoded, with regions of the array.
    progress : callable, optional
        Called with the number of blocks that are written and of all blocks, if this call computes and Dask runs the
        tasks in this process. (A `distributed.Client` has a dashboard instead.)
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
        If the codec does not take the dtype of the source, its shape is not that of the array or region, or the region
        cuts chunks.
    ConfigurationError
        If an existing array has another codec or model.
    ModelNotFound
        If the model is not installed.
    LabelIndexError
        If there is no location for the index. After this error and those above, nothing has been written.
    WriteError
        If the store would not take some of the chunks. All others are written, but no index.
    """
    arguments = {**locals(), **kwargs}
    from deepsic_codec.model.zoo import find_model  # late: only writing needs it

    if is_zip_path(target):
        return _store_zip(**{name: value for name, value in arguments.items() if name != "kwargs"})
    _check_options(batch_size, retries, resume)
    da = _dask()
    values = _as_dask(source, da)
    array, beside = _open_target(
        source,
        values,
        target,
        name,
        {"codec": codec, "chunks": chunks, "shards": shards, "embed_model": embed_model, **kwargs},
        storage_options=storage_options,
        must_exist=region is not None,
        may_exist=bool(resume) or region is not None,
        overwrite=overwrite,
        coordinates=coordinates,
    )
    array = with_absolute_path(array)  # workers may be in another folder
    with replacement.discarded_on_error(array):
        target_array = replacement.target_of(array)
        if embed_model:
            embedded.embed_model(target_array)  # also beside an array that existed
        stored = StoredArray(array)
        stored.layout.check_writable()
        find_model(stored.decoder, head=stored.head)  # raises for a model that is missing
        target_region = check_region(array, region)
        shape = tuple(part.stop - part.start for part in target_region)
        if values.shape != shape:
            raise UnsupportedArray(
                f"source: expected shape {shape} for this region of the array {array.shape}, got {values.shape}"
            )
        quality_map, kept = check_map(quality_map, keep, stored.params, shape)
        final = StoredArray(target_array)
        location = index_location(final, index)
        if batch_size is None:
            gpu = settings.device_in_use(loading=True).startswith("cuda")
            batch_size = default_batch_size(array, stored.axes, gpu)
        if final.path == stored.path:
            mark_outdated(stored, location)
        journal = Journal.of(stored, values.name, target_region)
        complete, records = _complete(stored, journal, target_region, resume)
        options = WriteOptions(batch_size, retries, journal, backoff, quality_map=quality_map, keep=kept)
        values, blocks = _plan(stored, values, target_region, batch_size, complete)
        finish = partial(
            _finish,
            skipped=len(complete),
            location=location,
            journal=journal,
            records=records,
            process=os.getpid(),
            final=final,
            beside=beside,
        )
        report = _report(stored, values, blocks, options, finish)
        if not compute:
            return report
        stores = [array.store, *([] if location is None else [location.store])]
        with (
            _this_process() if any(map(is_process_bound, stores)) else nullcontext(),
            _reporting(len(blocks), progress),
        ):
            return report.compute()


def open(
    source: Any,
    name: str | None = None,
    *,
    chunks: Any = "auto",
    batch_size: int | None = None,
    scale: int = 1,
    bytes_per_chunk: int | None = None,
    groups: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> "da.Array":
    """Open an array stored with DeepSIC as a Dask array, each block of which is decoded as one batch.

    Parameters
    ----------
    source : str, Path, store, zarr.Group or zarr.Array
        The array, or a group that has it.
    name : str, optional
        Path of the array in the group; needed if the group has more than one stored with DeepSIC.
    chunks : "auto" or as for `dask.array.from_array`
        Blocks of the Dask array. "auto" makes blocks of `batch_size` chunks, up to double. Blocks that cut chunks work
        too, but those chunks are decoded more than once.
    batch_size : int, optional
        Chunks decoded in one call; a larger block takes several calls. The default is that of `store` once torch has
        been imported or the device is set, else 16.
    scale : {1, 2, 4, 8, 16}
        Rows and columns in one of the result, as for `read_preview`: blocks of that size read the starts of chunks.
    bytes_per_chunk, groups : int, optional
        Bytes, and parts with a checksum, to read of each chunk at most, as for `read_preview`.
    storage_options : dict, optional
        For fsspec, if `source` is a URL.
    **kwargs
        More for `zarr.open`.

    Raises
    ------
    ConfigurationError
        For a scale or a limit that there is not.
    UnsupportedArray, UnsupportedPayload
        If there is no such array.
    """
    _check_options(batch_size, 0, False)
    da = _dask()
    stored = StoredArray(open_archive(source, name, storage_options=storage_options, **kwargs))
    array = stored.array
    if batch_size is None:
        batch_size = default_batch_size(array, stored.axes, settings.device_in_use().startswith("cuda"))
    whole = scale == 1 and bytes_per_chunk is None and groups is None
    reduced = None if whole else ReducedArray(stored, scale, bytes_per_chunk, groups)
    if isinstance(chunks, str) and chunks == "auto":
        chunks = block_shape(array, stored.axes, array.chunks, batch_size)
        if reduced is not None:  # the same chunks
            chunks = tuple(n // m * k for n, m, k in zip(chunks, array.chunks, reduced.chunks, strict=True))
    meta = np.empty((0,) * array.ndim, array.dtype)
    # A name of its own: equal names would mean equal values, and chunks may be written again. With fancy=False, Dask
    # would not join a slice with the reading of its block, and decode all of the block.
    source = BatchedArray(stored, batch_size) if reduced is None else reduced
    return da.from_array(source, chunks=chunks, name=False, fancy=True, lock=False, meta=meta)


def _store_zip(source: Any, target: Any, *, name: str | None, **options: Any) -> Report:
    """Write an array to a new zip file."""
    changes = [key for key in ("region", "resume", "overwrite") if options[key] not in (None, False)]
    if changes or not options["compute"] or Path(target).exists():
        what = changes[0] if changes else f"{target} exists" if options["compute"] else "compute=False"
        raise ConfigurationError(
            f"{what}: a zip file is written once, as a whole; write to a folder and zip it, or to another zip file"
        )
    archive = ZipStore(target, mode="w")
    try:
        report = store(source, archive, name=name, **options)
    except BaseException:
        with suppress(Exception):  # closing writes the directory of the file; the first error says what is wrong
            archive.close()
        Path(target).unlink()
        raise
    archive.close()
    return replace(report, array=open_archive(target, name))


@contextmanager
def _this_process() -> Iterator[None]:
    """Let Dask run tasks in threads of this process during a `with` block."""
    import dask
    from dask.base import get_scheduler

    if get_scheduler() in (None, dask.threaded.get, dask.local.get_sync):
        yield
        return
    warnings.warn(
        "target: only this process can write to it, so the chunks are encoded by threads of this process, and not by "
        "the workers of Dask; another store would let these write",
        stacklevel=4,
    )
    with dask.config.set(scheduler="threads"):
        yield


@contextmanager
def _reporting(total: int, progress: Progress | None) -> Iterator[None]:
    """Report the blocks that Dask writes during a `with` block."""
    from dask.callbacks import Callback

    done = 0

    def posttask(key: Any, value: Any, *rest: Any) -> None:
        nonlocal done
        if progress is not None and isinstance(value, BlockReport):
            done += 1
            progress(done, total)

    with nullcontext() if progress is None else Callback(posttask=posttask):
        yield


def _dask() -> Any:
    require("dask", "dask", purpose="deepsic_codec.dask")
    import dask.array as da

    return da


def _check_options(batch_size: int | None, retries: int, resume: bool | str) -> None:
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigurationError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    if not isinstance(retries, int) or retries < 0:
        raise ConfigurationError(f"retries: expected an integer of at least 0, got {retries!r}")
    if resume not in (True, False, "verify"):
        raise ConfigurationError(f"resume: expected True, False or 'verify', got {resume!r}")


def _is_data_array(source: Any) -> bool:
    """Tell whether a source is an xarray.DataArray, without importing xarray."""
    return all(hasattr(source, name) for name in ("dims", "attrs", "data", "coords"))


def _as_dask(source: Any, da: Any) -> "da.Array":
    if hasattr(source, "data_vars"):
        raise UnsupportedArray("source: expected an array, got a Dataset; pass one of its variables, dataset[name]")
    if isinstance(source, zarr.Array):
        source = da.from_zarr(source)
    if _is_data_array(source):
        # Without Dask, `data` would load what may be a whole file.
        source = (source.chunk("auto") if source.chunks is None else source).data
    values = source if isinstance(source, da.Array) else da.from_array(plain_array(source))
    if any(np.isnan(size) for size in values.shape):
        raise UnsupportedArray("source: the Dask array has an unknown shape; call its compute_chunk_sizes() first")
    return values


def _open_target(
    source: Any,
    values: "da.Array",
    target: Any,
    name: str | None,
    creation: dict[str, Any],
    *,
    storage_options: Mapping[str, Any] | None,
    must_exist: bool,
    may_exist: bool,
    overwrite: bool,
    coordinates: bool,
) -> tuple[zarr.Array, places.Coordinates]:
    """Return the array to write to, created with the arguments `creation` of `create_array` if need be.

    The second result are coordinates that replace those of an array when that is replaced.
    """
    if isinstance(creation["codec"], CodecParams):
        creation["codec"] = creation["codec"].with_band_names(_band_names(source, creation.get("attributes")))
    if isinstance(target, zarr.Array):
        if name is not None:
            raise ConfigurationError(
                f"name: the target is an array and cannot contain an array {name!r}; leave out name"
            )
        if overwrite:
            raise ConfigurationError("overwrite: an open array cannot be replaced; pass its location")
        _check_existing(target, values, creation)
        return target, {}
    group = to_store_path(target, storage_options, write=True)
    path = "/".join(part for part in (group.path, (name or "").strip("/")) if part)
    existing = existing_array(group.store, path, overwrite=overwrite)
    if existing is not None and not overwrite:
        if not may_exist:
            raise ConfigurationError(
                f"array {url_of(existing.store_path)} exists; pass resume=True to complete it, region=... to write "
                "a part of it, overwrite=True to delete it first, or another name"
            )
        _check_existing(existing, values, creation)
        return existing, {}
    if must_exist:
        raise UnsupportedArray(f"region: there is no array {path!r} in {group.store}; create it first")
    beside: places.Coordinates = {}
    attributes: dict[str, Any] = {}
    if _is_data_array(source):
        creation.setdefault("dimension_names", [str(dimension) for dimension in source.dims])
        attributes, beside = places.of_data_array(source)
    attributes |= creation.get("attributes") or {}
    codec = codec_for(creation["codec"], values.shape, creation.get("dimension_names"), values.dtype)
    names = creation.get("dimension_names") or codec.axes
    names = [str(name or axis) for name, axis in zip(names, codec.axes, strict=True)]
    zarr_format, target = creation.get("zarr_format", 3), StorePath(group.store, path)
    if _is_data_array(source):
        codec = _with_nodata(codec, attributes, values.dtype)
    original = {key: attributes[key] for key in ("coordinates", "grid_mapping") if key in attributes}
    places.set_fill_value(attributes, codec.nodata, values.dtype, zarr_format)
    attributes, beside = places.describe(attributes, beside, Axes(codec.axes), names, values.shape)
    if not coordinates or (beside and not places.can_write(target, beside, zarr_format, replace=overwrite)):
        beside = {}
    codec = measured_codec(codec, values.shape, values.dtype, creation["chunks"], partial(_thinned_parts, values))
    creation |= {"codec": codec, "attributes": attributes | (places.references(beside, names) if beside else original)}
    if existing is not None:
        # The model goes beside the array that is replaced.
        template = create_array(
            MemoryStore(), shape=values.shape, dtype=values.dtype, **{**creation, "embed_model": False}
        )
        staged = replacement.staged(group.store, path, template)
        if staged is not None:
            return staged, beside
    array = create_array(
        group.store, name=path or None, shape=values.shape, dtype=values.dtype, overwrite=overwrite, **creation
    )
    places.write(target, beside, zarr_format)
    return array, {}


def _band_names(source: Any, attributes: Mapping[str, Any] | None) -> Any:
    """Return the names of bands: the attribute `long_name` if that is a list, else a coordinate of text."""
    if not _is_data_array(source):
        return (attributes or {}).get("long_name")
    texts = (values for values in source.coords.values() if values.ndim == 1 and values.dtype.kind in "OTU")
    listed = {**source.attrs, **(attributes or {})}.get("long_name")
    return listed if isinstance(listed, list) else next((values.values.tolist() for values in texts), None)


def _with_nodata(codec: CodecParams, attributes: Mapping[str, Any], dtype: Any) -> CodecParams:
    """Return a codec with the NoData value that a DataArray declares, if it has none and this value fits."""
    declared = next((attributes[key] for key in ("_FillValue", "missing_value", "nodata") if key in attributes), None)
    if codec.nodata is not None or declared is None:
        return codec
    try:
        complete = type(codec)(**(codec.parameters() | {"nodata": declared}))
        nodata_value(complete, np.dtype(dtype))
    except DeepSICError:
        return codec
    return complete


def _thinned_parts(values: "da.Array", codec: CodecParams) -> list[Any]:
    """Compute some blocks of a Dask array, spread over it, and return some of their samples."""
    import dask

    if (axis := Axes(codec.axes).c) is not None:
        values = values.rechunk({axis: -1})
    total = int(np.prod(values.numblocks))
    numbers = np.unique(np.linspace(0, total - 1, min(total, MEASURED_BLOCKS)).round().astype(int))
    thin = dask.delayed(thinned)
    blocks = [values.blocks[tuple(index)] for index in np.transpose(np.unravel_index(numbers, values.numblocks))]
    return list(dask.compute(*(thin(block, codec) for block in blocks)))


def _check_existing(array: zarr.Array, values: "da.Array", creation: Mapping[str, Any]) -> None:
    """Raise unless an array is what `creation` asks for."""
    params = StoredArray(array).params
    if creation["codec"] is not None:
        requested, stored = creation["codec"].to_json(), params.to_json()
        # Not the model's name: the decoder identifies the model. JSON leaves out what is None.
        keys = [*stored, *(key for key in requested if key not in stored)]
        # Without a range, that of the array counts, which was measured.
        ignored = {"model"} if "value_range" in requested else {"model", "value_range"}
        different = [key for key in keys if requested.get(key) != stored.get(key) and key not in ignored]
        if different:
            texts = ", ".join(f"{key} {stored.get(key)!r}, not {requested.get(key)!r}" for key in different)
            raise ConfigurationError(
                f"array {url_of(array.store_path)} has another codec: {texts}; leave out codec, or write to "
                "another array"
            )
    for key, shape in (("chunks", array.chunks), ("shards", array.shards)):
        if creation[key] not in (None, "auto") and tuple(creation[key]) != shape:
            raise ConfigurationError(
                f"array {url_of(array.store_path)} has {key} {shape}, not {tuple(creation[key])}; leave out {key}, or "
                "write to another array"
            )
    if creation.get("zarr_format", array.metadata.zarr_format) != array.metadata.zarr_format:
        raise ConfigurationError(
            f"array {url_of(array.store_path)} has Zarr format {array.metadata.zarr_format}; leave out zarr_format, or "
            "write to another array"
        )
    if values.dtype != array.dtype:
        raise UnsupportedArray(
            f"source: expected {array.dtype}, the dtype of array {url_of(array.store_path)}, got {values.dtype}; "
            "convert the source"
        )
    if array.read_only:
        raise ConfigurationError(f"array {url_of(array.store_path)} is open for reading only; open it with mode='r+'")


@dataclass(frozen=True)
class _Block:
    """A part of the source that one task writes: its position in the source, its first chunk, the chunks to encode."""

    position: Index
    first: Index
    pending: tuple[Index, ...] | None


def _complete(
    stored: StoredArray, journal: Journal | None, region: Region, resume: bool | str
) -> tuple[set[Index], Any]:
    """Return the chunks of a region that earlier runs wrote from this source, and the records of them.

    Without `resume`, the records of earlier runs are removed.
    """
    complete: set[Index] = set()
    records = np.empty(0, RECORD)
    if journal is None:
        return complete, records
    if not resume:
        journal.begin(stored)
        return complete, records
    records, others = journal.read(stored)
    if others and not len(records):
        warnings.warn(
            f"array {url_of(stored.array.store_path)}: earlier runs wrote another source, or one whose name in Dask "
            "differs in each run; all chunks are written again. Pass da.from_array a name to continue such runs",
            stacklevel=3,
        )
    indices = list(iter_grid(*chunks_covering(region, stored.chunks)))
    complete = complete_chunks(stored, indices, written=records, read_all=resume == "verify")
    numbers = [np.ravel_multi_index(index, stored.grid) for index in complete]
    return complete, records[np.isin(records["chunk"], numbers)]


def _plan(
    stored: StoredArray, values: "da.Array", region: Region, batch_size: int, complete: set[Index]
) -> tuple["da.Array", list[_Block]]:
    """Cut the source into blocks, and leave out complete chunks; returns it, and the blocks to be written."""
    if not values.size:
        return values, []
    shape = block_shape(stored.array, stored.axes, [max(sizes) for sizes in values.chunks], batch_size)
    values = values.rechunk(shape)
    blocks = []
    for position in np.ndindex(*values.numblocks):
        starts = [part.start + i * size for part, i, size in zip(region, position, shape, strict=True)]
        stops = [min(start + size, part.stop) for start, size, part in zip(starts, shape, region, strict=True)]
        first, last = chunks_covering(tuple(map(slice, starts, stops)), stored.chunks)
        pending = None
        if complete:
            pending = tuple(index for index in iter_grid(first, last) if index not in complete)
            if not pending:
                continue
        blocks.append(_Block(position, first, pending))
    return values, blocks


def _report(
    stored: StoredArray,
    values: "da.Array",
    blocks: Sequence[_Block],
    options: WriteOptions,
    finish: Callable[[StoredArray, Sequence[BlockReport]], Report],
) -> Any:
    """Return a Delayed of the report, which `finish` makes.

    The graph is made by hand. A Delayed for each of many blocks takes ten times the memory, and `map_blocks` would
    also compute the source of blocks that are complete.
    """
    import dask
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph

    (values,) = dask.optimize(values)  # Dask does not optimise the inputs of a Delayed
    run = uuid4().hex
    target, report = f"target-{run}", f"report-{run}"
    # One node for the array, so that a worker gets it once. The rest is bound to the functions: Dask would take tuples
    # among the arguments for keys.
    graph: dict[Any, Any] = {target: stored}
    for number, block in enumerate(blocks):
        each = replace(options, quality_map=_block_map(options.quality_map, stored, values, block))
        write = partial(write_block, first=block.first, pending=block.pending, options=each)
        graph[f"write_block-{run}-{number}"] = (write, (values.name, *block.position), target)
    results = [key for key in graph if key != target]
    graph[report] = (finish, target, results)
    sources: Any = [values] if blocks else []
    return Delayed(report, HighLevelGraph.from_collections(report, graph, dependencies=sources))


def _block_map(quality_map: Any, stored: StoredArray, values: "da.Array", block: _Block) -> Any:
    """Return the part of a quality map of the source that belongs to a block."""
    if quality_map is None or callable(quality_map):
        return quality_map
    parts = [
        slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        for axis, sizes, number in zip(stored.axes, values.chunks, block.position, strict=True)
        if axis != "c"
    ]
    return quality_map[tuple(parts)]


def _finish(
    stored: StoredArray,
    results: Sequence[BlockReport],
    *,
    skipped: int,
    location: IndexLocation | None,
    journal: Journal | None,
    records: Any,
    process: int,
    final: StoredArray,
    beside: places.Coordinates,
) -> Report:
    """Report what the tasks did, replace the array that was to be overwritten, and write the index."""
    is_replacement = final.path != stored.path
    failed = {key: reason for result in results for key, reason in result.failed.items()}
    if failed:
        examples = ", ".join(f"{key} ({reason})" for key, reason in list(failed.items())[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        advice = "All other chunks are stored; fix the store, then write again with resume=True"
        if is_replacement:
            advice = "The array that was to be replaced is as it was; fix the store, then write again"
        raise WriteError(f"{len(failed)} keys could not be written: {examples}{more}. {advice}", sorted(failed))
    starts = PackedStarts.join(stored.grid, [result.starts for result in results])
    if journal is not None:
        journal.finish(stored, np.concatenate([records, starts.records()]))
    if is_replacement:
        stored = StoredArray(replacement.replace_array(stored.array))
        places.write(stored.array.store_path, beside, stored.array.metadata.zarr_format)
        mark_outdated(stored, location)
    if location is not None:
        if os.getpid() != process:
            check_process(location.store)
        write_index(stored, location, starts)
    elif len(starts):
        mark_outdated(stored, location)  # again: an index may have been made since the beginning
    array = stored.array
    refresh_consolidated(array.store_path, array.metadata.zarr_format, create="grid_mapping" in array.attrs)
    return Report(
        array=stored.array,
        written=len(starts),
        skipped=skipped,
        empty=sum(result.empty for result in results),
        nbytes=sum(result.nbytes for result in results),
        index=None if location is None else str(location),
    )
