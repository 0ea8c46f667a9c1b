"""The everyday API: create and open arrays stored with DeepSIC."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import MemoryStore, StorePath

from deepsic_codec._compat import native_dtype, sync
from deepsic_codec.axes import Axes, Index, axes_of_names, axes_of_number
from deepsic_codec.bulk.write import WriteOptions, check_map, write_block
from deepsic_codec.codec.chunk import check_axes, check_chunk, implausible_axes
from deepsic_codec.codec.measure import is_measured, thinned, with_range
from deepsic_codec.codec.params import NAN, CodecParams
from deepsic_codec.codec.scaled import must_be_bounded
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.codec.v3 import DeepSICCodec
from deepsic_codec.errors import ConfigurationError, UnsupportedArray, WriteError
from deepsic_codec.payload.fields import MAX_BANDS
from deepsic_codec.stored import embedded, replacement
from deepsic_codec.stored.array import ATTRIBUTE, StoredArray
from deepsic_codec.stored.location import Mode, metadata_errors, refuse_zip_path, remote_errors, to_store_path, url_of

LOSSLESS: dict[str, Any] = {"max_error": 0, "semantics": "none"}  # of masks, classes and counts, by default
AUTO_CHUNK = 512  # pixels: seams and headers cost little, and a read of a corner is still small
AUTO_SAMPLES = 1 << 24  # of a chunk: with more bands its edge is halved


def create_array(
    store: Any,
    *,
    name: str | None = None,
    shape: Sequence[int] | int | None = None,
    dtype: Any = None,
    chunks: Sequence[int] | str = "auto",
    codec: CodecParams | None = None,
    zarr_format: int = 3,
    shards: Sequence[int] | str | None = None,
    data: Any = None,
    attributes: Mapping[str, Any] | None = None,
    dimension_names: Sequence[str | None] | None = None,
    embed_model: bool = False,
    quality_map: Any = None,
    keep: Mapping[str, float] | None = None,
    **kwargs: Any,
) -> zarr.Array:
    """Create an array whose chunks are stored with DeepSIC.

    Takes the arguments of `zarr.create_array`, for either format. Only the codecs differ: `codec` is the only one. The
    axes are also recorded as dimension names, where xarray reads them in either format, and the vocabulary of the
    model and an identity of the array as an attribute.

    Parameters
    ----------
    store, name
        Where the array goes, as for `zarr.create_array`.
    shape : tuple of int, optional
        Shape of the array, unless `data` is given.
    dtype : dtype, optional
        bool, an integer of 8 to 64 bits, float32 or float64, unless `data` is given.
    chunks : tuple of int or "auto"
        Shape of a chunk; along an axis c it has to divide the array, and at most 256. "auto" is 512 pixels along y and
        x (256 from 65 bands on), all bands (of more than 256, the largest divisor that is not above), and one slice.
    codec : DeepSIC or DeepSICCodec, optional
        Either kind for either format. The default is `DeepSIC()`, with the axes that `dimension_names` mean, such as
        ("band", "y", "x"), or "yx" for two dimensions. Bool and integers of 32 and 64 bits are stored without loss by
        default, and have no labels. For `data` of 16 bits or float32 without a `value_range`, the
        range of the array is measured, and is in the codec of the array: without outliers, one pair for each band, or
        one for all if chunks have only some of the bands.
    zarr_format : {3, 2}
        Zarr format.
    shards : tuple of int, optional
        Shape of a shard (format 3 only).
    data : array_like, optional
        Values to write.
    attributes : dict, optional
        Attributes of the array.
    dimension_names : sequence of str, optional
        Names of the axes; the letters of `codec.axes` by default.
    embed_model : bool
        Store the model beside the array, once for each group, as a plain uint8 array. The archive can then be read
        wherever this package is installed, also without the model. Needs a `name` (or a path in the store).
    quality_map : array_like or callable, optional
        Qualities of the pixels of `data`, from 1 to 200, or 0 where errors do not matter: an array with all axes but
        that of the bands, or with y and x alone. A mask (bool) means the quality of the codec, and 0. A function gets
        the region of each chunk, a tuple of slices of the array, and returns its part. Each square of 16 x 16 pixels
        gets its largest quality. Chunks with a map are stored as wavelets; a constant map is the same as `quality`.
        With `bpp`, the map is scaled to that size. Other targets, `max_error` and features have no map.
    keep : mapping, optional
        Qualities of what labels find while `data` are encoded, by expression, such as {"River": 80, "~unknown": 60}:
        squares of 64 x 64 pixels that satisfy an expression get its quality (of several, the largest), all others that
        of `quality_map` or of the codec (50 with `bpp`).
    **kwargs
        More for `zarr.create_array`: `fill_value` (by default the codec's `nodata`), `overwrite` (with `data`, the old
        array is replaced when the new one is complete),
        `storage_options`, ...

    Returns
    -------
    zarr.Array
        The new array.

    Raises
    ------
    UnsupportedArray
        If the codec does not take the dtype, axes or channels; nothing is written then.
    ExpressionError
        If `keep` has an expression of labels that the model does not have.
    WriteError
        If the store would not take chunks with a quality map.
    ConfigurationError
        If `codec` is no codec of DeepSIC, or other codecs are passed too; if its `value_range`, `nodata` or `max_error`
        do not fit the dtype, or the model cannot keep a `max_error`; if the quality map does not fit the data or the
        codec; if `store` is the path of a zip file; if an array exists there and `overwrite` is not set; if what is
        there is no array, and would be deleted.
    ModelNotFound
        If the model of `codec` is not installed.
    """
    refuse_zip_path(store)
    for key in ("compressor", "compressors", "filters", "serializer"):
        if kwargs.pop(key, None) not in (None, "auto", (), []):
            raise ConfigurationError(f"{key}: DeepSIC is the only codec of the array; leave out {key}")
    if zarr_format not in (2, 3):
        raise ConfigurationError(f"zarr_format: expected 2 or 3, got {zarr_format!r}")
    if zarr_format == 2 and shards is not None:
        raise ConfigurationError("shards: Zarr format 2 has no shards; use zarr_format=3")
    if data is not None:
        data = plain_array(data)
        shape, dtype = data.shape, data.dtype
    elif shape is None or dtype is None:
        raise TypeError("create_array() needs either shape and dtype, or data")
    if isinstance(store, zarr.Group):
        store = store.store_path
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    codec = codec_for(codec, shape, dimension_names, native_dtype(dtype)).resolved()
    codec = codec.with_band_names((attributes or {}).get("long_name"))
    if data is not None:
        codec = measured_codec(codec, shape, native_dtype(dtype), chunks, lambda codec: [thinned(data, codec)])
    if data is None and (quality_map is not None or keep):
        raise ConfigurationError("quality_map, keep: they say how data are written; pass data=, or use dask.store")
    quality_map, kept = check_map(quality_map, keep, codec, shape)
    chunks = _check_array(codec, shape, native_dtype(dtype), chunks)
    if codec.nodata is not None:  # missing chunks and padding have no data either
        kwargs.setdefault("fill_value", float("nan") if codec.nodata == NAN else codec.nodata)
    attributes = dict(attributes or {})
    about = {"vocabulary": _vocabulary(*codec.identity()), "id": uuid4().hex}  # see StoredArray.fingerprint
    attributes[ATTRIBUTE] = {**attributes.get(ATTRIBUTE, {}), **about}
    names = list(codec.axes) if dimension_names is None else list(dimension_names)
    if zarr_format == 2:
        attributes.setdefault("_ARRAY_DIMENSIONS", names)  # where xarray looks in format 2
        # None reads as 0, and xarray does not take it for NaN: with 0 it would hand out float32 with black masked.
        kwargs.setdefault("fill_value", None)
        kwargs |= {"compressors": codec.convert(DeepSIC), "filters": None}
    else:
        dtype = native_dtype(dtype).newbyteorder("=")  # format 3 has no byte order, and zarr 3.0 refuses another
        # Not "auto": zarr then appends Zstd, and the header of a chunk can no longer be read alone.
        kwargs |= {"serializer": codec.convert(DeepSICCodec), "compressors": None, "dimension_names": names}
    # Data are written below: zarr 3.0.8 writes them in parts of shards, one over the other.
    write = kwargs.pop("write_data", True) and data is not None
    kwargs |= {"shape": shape, "dtype": dtype, "chunks": chunks, "shards": shards}
    kwargs |= {"name": name, "zarr_format": zarr_format, "attributes": attributes}
    if embed_model:
        with remote_errors(store, write=True):
            embedded.check_location(store, name, zarr_format, kwargs.get("storage_options"))
    array = None
    if kwargs.get("overwrite"):
        group = to_store_path(store, kwargs.get("storage_options"), write=True)
        path = "/".join(part for part in (group.path, (name or "").strip("/")) if part)
        existing = existing_array(group.store, path, overwrite=True)
        if write and existing is not None:
            array = _replacement(StorePath(group.store, path), kwargs)
    if array is None:
        try:
            with remote_errors(store, write=True):
                array = zarr.create_array(store, **kwargs)
        except (ContainsArrayError, ContainsGroupError) as error:
            group = to_store_path(store, kwargs.get("storage_options"), write=True)
            where = url_of(group / (name or "").strip("/"))
            if isinstance(error, ContainsGroupError):
                raise ConfigurationError(f"{where} is a group; pass the name of an array in it") from error
            raise ConfigurationError(
                f"array {where} exists; pass overwrite=True to replace it, or another name"
            ) from error
    with replacement.discarded_on_error(array), remote_errors(array.store_path, write=True):
        if write and quality_map is None and not kept:
            array[...] = data
        elif write:
            options = WriteOptions(quality_map=quality_map, keep=kept)
            failed = write_block(data, StoredArray(array), (0,) * len(shape), None, options).failed
            if failed:
                raise WriteError(f"{len(failed)} keys could not be written: {'; '.join(failed.values())}", list(failed))
    if replacement.target_of(array) is not array:
        array = replacement.replace_array(array)
    if embed_model:
        embedded.embed_model(array)
    return array


def existing_array(store: Any, path: str, *, overwrite: bool = False) -> zarr.Array | None:
    """Return the array at a path of a store, None without one.

    Raises
    ------
    ConfigurationError
        If a group is there, unless it is empty and the root of its store. With `overwrite`, if anything else is there,
        which zarr would delete.
    """
    where = StorePath(store, path)
    try:
        with metadata_errors(where), remote_errors(where):
            node = zarr.open(store, path=path, mode="r+")
    except FileNotFoundError:
        if overwrite and not sync(store.is_empty(path)):
            raise ConfigurationError(
                f"{url_of(where)} has content that is no array of Zarr, and is not deleted; choose another location"
            ) from None
        return None
    if isinstance(node, zarr.Group):
        if not path and not any(True for _ in node.members()):
            return None  # an empty group, which the array then replaces
        raise ConfigurationError(f"{url_of(node.store_path)} is a group; pass the name of an array in it")
    return node


def _replacement(target: StorePath, kwargs: Mapping[str, Any]) -> Any:
    """Return an array that is to replace the one that `zarr.create_array` would delete first; None without one."""
    changes = {"name": None, "overwrite": False, "storage_options": None}
    return replacement.staged(target.store, target.path, zarr.create_array(MemoryStore(), **{**kwargs, **changes}))


def open_archive(
    store: Any,
    name: str | None = None,
    *,
    mode: Mode = "r",
    storage_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> zarr.Array:
    """Open an array stored with DeepSIC, to read it unless `mode` says otherwise.

    If the model is not installed here but embedded in the archive, it is copied into the cache folder (DEEPSIC_CACHE,
    by default ~/.cache/deepsic_codec), where `zarr.open` then finds it too.

    Parameters
    ----------
    store
        The array, or a group that has it: a path, URL or store, as for `zarr.open`, or an array or group of Zarr.
    name : str, optional
        Path of the array in the group; needed if the group has more than one such array.
    mode : {"r", "r+", "a"}
        As for `zarr.open`. Writing a part of a chunk decodes and encodes the whole chunk, at a loss.
    storage_options : dict, optional
        For fsspec, if `store` is a URL.
    **kwargs
        More for `zarr.open`: `zarr_format`, ...

    Raises
    ------
    UnsupportedArray
        If there is no such array, or more than one and no name.
    UnsupportedPayload
        If the array is stored with other codecs.
    ModelMismatch
        If the model is not installed here, and the array embedded under its name is not that model.
    """
    array = StoredArray.open(store, name, mode=mode, options=storage_options, **kwargs).array
    embedded.use_embedded(array)
    return array


def chunk_bands(bands: int) -> int:
    """Return the number of bands of a chunk by default: all, or the largest divisor that a chunk can have."""
    return max((size for size in range(1, min(bands, MAX_BANDS) + 1) if bands % size == 0), default=1)


def auto_edge(bands: int) -> int:
    """Return the edge in pixels of a chunk of some bands by default."""
    edge = AUTO_CHUNK
    while edge**2 * bands > AUTO_SAMPLES:
        edge //= 2
    return edge


def plain_array(data: Any) -> NDArray[Any]:
    """Return array_like data as an array; raises UnsupportedArray if some of its values are masked."""
    if isinstance(data, np.ma.MaskedArray) and np.ma.getmaskarray(data).any():
        raise UnsupportedArray(
            "data: the codec cannot store masked values; fill them first, as in values.filled(-9999) with "
            "DeepSIC(nodata=-9999)"
        )
    return np.asarray(data)


def codec_for(
    codec: CodecParams | None, shape: Sequence[int], names: Sequence[Any] | None, dtype: np.dtype[Any]
) -> CodecParams:
    """Return the codec of an array; without one, `DeepSIC` with the axes that its dimensions are named for.

    Raises
    ------
    UnsupportedArray
        If the names of the dimensions say other axes than the codec.
    """
    if not isinstance(codec, CodecParams | None):
        raise ConfigurationError(f"codec: expected DeepSIC(...) or DeepSICCodec(...), got {codec!r}")
    if names is not None and len(names) != len(shape):
        raise ConfigurationError(f"dimension_names: expected a name for each of {len(shape)} axes, got {list(names)}")
    axes = axes_of_names(names or ())
    if codec is None:
        codec = DeepSIC(axes=axes or axes_of_number(len(shape)), **(LOSSLESS if must_be_bounded(dtype) else {}))
    check_axes(shape, codec.axes)
    if axes not in (None, codec.axes):
        raise UnsupportedArray(
            f"the dimensions {', '.join(map(str, names or ()))} are axes {str(axes)!r}, but the codec has axes "
            f"{str(codec.axes)!r}; pass DeepSIC(axes={str(axes)!r}), or other dimension_names"
        )
    return codec


def measured_codec(
    codec: CodecParams,
    shape: Index,
    dtype: np.dtype[Any],
    chunks: Sequence[int] | str,
    parts: Callable[[CodecParams], Iterable[NDArray[np.float64]]],
) -> CodecParams:
    """Return a codec with the range of an array, if it has none; `parts` returns thinned parts of the array."""
    check_axes(shape, codec.axes)
    if not is_measured(codec, dtype):
        return codec
    axes = Axes(codec.axes)
    return with_range(codec, parts(codec), dtype, axes.bands(_chunk_shape(axes, shape, chunks)) < axes.bands(shape))


def _chunk_shape(axes: Axes, shape: Index, chunks: Sequence[int] | str) -> Index:
    if isinstance(chunks, str):
        if chunks != "auto":
            raise ConfigurationError(f"chunks: expected a shape or 'auto', got {chunks!r}")
        bands = chunk_bands(axes.bands(shape))
        edge = auto_edge(bands)
        sizes = {"y": min(axes.height(shape), edge), "x": min(axes.width(shape), edge), "c": bands}
        chunks = [max(1, sizes.get(axis, 1)) for axis in axes]
    try:
        chunks = (chunks,) * len(shape) if isinstance(chunks, int) else tuple(index(size) for size in chunks)
    except TypeError:  # such as the chunks of a Dask array, which may differ
        raise ConfigurationError(f"chunks: expected an integer for each axis or 'auto', got {chunks!r}") from None
    check_axes(chunks, axes)
    return chunks


def _check_array(codec: CodecParams, shape: Index, dtype: np.dtype[Any], chunks: Sequence[int] | str) -> Index:
    """Check that a codec can store an array, and return the shape of its chunks."""
    check_axes(shape, codec.axes)
    axes = Axes(codec.axes)
    chunks = _chunk_shape(axes, shape, chunks)
    check_chunk(chunks, dtype, codec)
    if message := implausible_axes(chunks, codec.axes):
        raise UnsupportedArray(message)
    bands, per_chunk, rows = axes.bands(shape), axes.bands(chunks), axes.height(chunks)
    if bands % per_chunk:
        raise UnsupportedArray(
            f"chunks: {bands} bands cannot be divided into chunks of {per_chunk} bands; choose a divisor, such as 1"
        )
    if bands != per_chunk and isinstance(codec.value_range, tuple) and len(codec.value_range) > 1:
        raise ConfigurationError(
            f"value_range: {per_chunk} pairs for an array of {bands} bands; pass one pair, or choose chunks of "
            "all bands"
        )
    if rows <= 4 < per_chunk:  # this would work, but compress poorly
        warnings.warn(
            f"axes={codec.axes!r} means that a chunk {chunks} has {per_chunk} bands and {rows} rows; if that is "
            "wrong, pass the codec other axes, such as 'cyx'",
            stacklevel=3,
        )
    return chunks


def _vocabulary(decoder: str, head: str | None) -> dict[str, Any]:
    from deepsic_codec.model.zoo import find_model

    info = find_model(decoder, head=head)
    return info.vocabulary.to_json()
