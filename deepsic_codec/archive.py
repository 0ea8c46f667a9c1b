"""The everyday API: create and open arrays stored with DeepSIC, and ask a chunk what it shows."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr

from deepsic_codec._compat import native_dtype
from deepsic_codec.codec import core
from deepsic_codec.codec.params import NAN, CodecParams
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.codec.v3 import DeepSICCodec
from deepsic_codec.errors import ConfigurationError, DeepSICError, UnsupportedArray
from deepsic_codec.labels import attributes as headers
from deepsic_codec.labels.vocabulary import ATTRIBUTE
from deepsic_codec.stored import embedded as embed
from deepsic_codec.stored import layout as stored

if TYPE_CHECKING:
    pass

AUTO_CHUNK = 512  # pixels: seams and headers cost little, and a read of a corner is still small


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
    **kwargs: Any,
) -> zarr.Array:
    """Create an array whose chunks are stored with DeepSIC.

    Takes what `zarr.create_array` takes, for either format, but for the codecs, which are `codec` alone. The axes are
    also recorded as dimension names, as xarray reads them in either format, and the model's vocabulary as an attribute.

    Parameters
    ----------
    store, name
        Where the array goes, as for `zarr.create_array`.
    shape : tuple of int, optional
        Shape of the array, unless `data` is given.
    dtype : dtype, optional
        uint8, int8, uint16, int16 or float32, unless `data` is given.
    chunks : tuple of int or "auto"
        Shape of a chunk; along an axis c it has to divide the array, and at most 256. "auto" is 512 pixels along y and
        x, all bands, and one slice.
    codec : DeepSIC or DeepSICCodec, optional
        Either kind for either format; `DeepSIC()` by default.
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
        Store the model beside the array, once for each group, as a plain uint8 array: the archive can then be read
        wherever this package is, with or without the model. Needs a `name` (or a path in the store).
    **kwargs
        More for `zarr.create_array`: `fill_value` (by default the codec's `nodata`), `overwrite`,
        `storage_options`, ...

    Returns
    -------
    zarr.Array
        The new array.

    Raises
    ------
    UnsupportedArray
        If dtype, axes or channels are not what the codec takes; nothing is written then.
    ConfigurationError
        If `codec` is no codec of DeepSIC, or other codecs are asked for beside it; if its `value_range`, `nodata` or
        `max_error` do not fit the dtype, or the model cannot keep a `max_error`.
    ModelNotFound
        If the model of `codec` is not there.
    """
    codec = DeepSIC() if codec is None else codec
    if not isinstance(codec, CodecParams):
        raise ConfigurationError(f"codec: expected DeepSIC(...) or DeepSICCodec(...), got {codec!r}")
    codec = codec.resolved()
    for key in ("compressor", "compressors", "filters", "serializer"):
        if kwargs.pop(key, None) not in (None, "auto", (), []):
            raise ConfigurationError(f"{key}: DeepSIC takes images in and needs nothing after it; leave {key} out")
    if zarr_format not in (2, 3):
        raise ConfigurationError(f"zarr_format: expected 2 or 3, got {zarr_format!r}")
    if zarr_format == 2 and shards is not None:
        raise ConfigurationError("shards: Zarr format 2 has none; use zarr_format=3")
    if data is not None:
        data = np.asarray(data)
        shape, dtype = data.shape, data.dtype
    elif shape is None or dtype is None:
        raise TypeError("create_array() needs shape and dtype, or data")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    chunks = _check_array(codec, shape, native_dtype(dtype), chunks)
    core.check_exact(codec)
    if codec.nodata is not None:  # what is missing, and what pads the last chunks, is no data either
        kwargs.setdefault("fill_value", float("nan") if codec.nodata == NAN else codec.nodata)
    attributes = dict(attributes or {})
    attributes[ATTRIBUTE] = {**attributes.get(ATTRIBUTE, {}), "vocabulary": _vocabulary(*codec.identity())}
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
    write = kwargs.pop("write_data", True) and data is not None
    kwargs |= {
        "shape": shape,
        "dtype": dtype,
    }  # not data: zarr 3.0.8 writes that in parts of shards, one over the other
    kwargs |= {"name": name, "chunks": chunks, "shards": shards, "zarr_format": zarr_format, "attributes": attributes}
    if embed_model:
        embed.check_place(store, name, zarr_format, kwargs.get("storage_options"))
    array = zarr.create_array(store, **kwargs)
    if embed_model:
        embed.embed_model(array)
    if write:
        array[...] = data
    return array


def open_archive(
    store: Any, name: str | None = None, *, mode: Literal["r", "r+", "a"] = "r", **kwargs: Any
) -> zarr.Array:
    """Open an array stored with DeepSIC, to read it unless `mode` says otherwise.

    A model that is not installed here and is embedded in the archive is put into the cache folder (DEEPSIC_CACHE, by
    default ~/.cache/deepsic_codec), where `zarr.open` then finds it too.

    Parameters
    ----------
    store
        A path, URL or store, as for `zarr.open`: of the array, or of a group that has it.
    name : str, optional
        Path of the array in the group; needed if the group has more than one such array.
    mode : str
        As for `zarr.open`. Writing a part of a chunk decodes and encodes the whole, at a loss.
    **kwargs
        More for `zarr.open`: `storage_options`, `zarr_format`, ...

    Raises
    ------
    UnsupportedArray
        If there is no such array, or more than one and no name.
    ModelMismatch
        If the model is not installed here, and what is embedded under its name is not that model.
    """
    found: Any = zarr.open(store, mode=mode, **kwargs)
    if isinstance(found, zarr.Group):
        if name is not None:
            if name not in found:
                raise UnsupportedArray(f"group {found.path!r} has no array {name!r}")
            found = found[name]
        else:
            arrays = [node for _, node in found.members(max_depth=None) if _is_deepsic(node)]
            if len(arrays) != 1:
                names = ", ".join(sorted(array.path for array in arrays)) or "none"
                raise UnsupportedArray(f"expected one array stored with DeepSIC, found {names}; pass its name")
            found = arrays[0]
    elif name is not None:
        raise UnsupportedArray(f"{found.store_path} is an array, not a group with an array {name!r}")
    if not _is_deepsic(found):
        raise UnsupportedArray(f"{found.store_path} is not an array stored with DeepSIC")
    embed.use_embedded(found)
    return found


def chunk_attrs(array: zarr.Array, index: Sequence[int]) -> dict[str, Any]:
    """Tell what a chunk is and shows, from one read of 256 bytes in most cases.

    Only for `semantics="post"` is the whole chunk read, to compute labels from its features.

    Parameters
    ----------
    array : zarr.Array
        An array stored with DeepSIC.
    index : sequence of int
        Position in the grid of chunks (those within shards, if there are shards), one number for each axis.

    Returns
    -------
    dict
        In JSON types: `labels`, a list of label tiles, slice by slice and row by row, each a dict of class name to
        score (0 to 1, best first; the class "unknown" among them), empty for a tile wholly outside of the array; None
        for a chunk without labels. `tile_shape`, height and width of a tile in pixels. `model`, its name, or the
        first digits of the decoder's identity if the chunk was not written by the model in the metadata; `quality`;
        `nbytes`; `bpp`, bits per pixel (slices x height x width); `format_version`. For a missing chunk, which holds
        no data, `labels` is empty and the rest None.

    Raises
    ------
    UnsupportedPayload
        If the array is not stored with DeepSIC, or the chunk needs a newer version.
    CorruptPayload
        If what was read of the chunk is damaged.
    IndexError
        If the array has no such chunk.
    ModelNotFound
        If labels cannot be named or computed without a model that is not there.
    """
    return headers.chunk_attrs(array, index)


def _check_array(
    codec: CodecParams, shape: tuple[int, ...], dtype: np.dtype, chunks: Sequence[int] | str
) -> tuple[int, ...]:
    core.check_axes(shape, codec.axes)
    if isinstance(chunks, str):
        if chunks != "auto":
            raise ConfigurationError(f"chunks: expected a shape or 'auto', got {chunks!r}")
        sizes = dict(zip(codec.axes, shape, strict=True))
        auto = {axis: min(size, AUTO_CHUNK) for axis, size in sizes.items() if axis in "yx"}
        chunks = [max(1, auto.get(axis, size if axis == "c" else 1)) for axis, size in sizes.items()]
    chunks = (chunks,) * len(shape) if isinstance(chunks, int) else tuple(int(size) for size in chunks)
    core.check_chunk(chunks, dtype, codec)
    for axis, size, chunk in zip(codec.axes, shape, chunks, strict=True):
        if axis == "c" and size % chunk:
            raise UnsupportedArray(f"{size} channels in chunks of {chunk}: the last chunk would be padded; choose 1")
        if axis == "c" and size != chunk and isinstance(codec.value_range, tuple) and len(codec.value_range) > 1:
            raise ConfigurationError(f"value_range: a range for each of {chunk} bands, and the array has {size}")
        if axis == "c" and chunks[codec.axes.index("y")] <= 4 < chunk:  # it would work, and be poor in every way
            rows = chunks[codec.axes.index("y")]
            warnings.warn(
                f"axes={codec.axes!r} makes chunks {chunks} images of {chunk} bands and {rows} rows: if they are not, "
                "pass the codec other axes, such as 'cyx'",
                stacklevel=3,
            )
    return chunks


def _vocabulary(decoder: str, head: str | None) -> dict[str, Any]:
    from deepsic_codec.model.zoo import find_model

    info = find_model(decoder, head=head)
    parents = {parent: list(children) for parent, children in info.vocabulary.parents.items()}
    return {"head": info.head, "classes": list(info.vocabulary.classes), "parents": parents}


def _is_deepsic(node: Any) -> bool:
    if not isinstance(node, zarr.Array):
        return False
    try:
        stored.codec_of(node)
    except DeepSICError:
        return False
    return True
