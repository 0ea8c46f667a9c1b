"""A model inside an archive: the model file as a plain uint8 array beside the images, found by identity.

With it, an archive can be read by this package and nothing else, wherever the model is no longer to be had. The array
is called `deepsic-model-<decoder>-<head>`, with the first digits of the two identities as payloads have them; it is
uncompressed, so that any Zarr reader gives the bytes of the `.safetensors` file.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import StorePath

from deepsic_codec._compat import make_store_path, native_dtype, sync
from deepsic_codec.errors import ConfigurationError, ModelMismatch, ModelNotFound
from deepsic_codec.stored.layout import StoredLayout
from deepsic_codec.stored.location import is_in_group, parent_and_name

if TYPE_CHECKING:
    from deepsic_codec.model.file import ModelInfo

PREFIX = "deepsic-model"
ATTRIBUTE = "deepsic_model"
NO_GROUP = "embed_model: an array at the root of its store has no group for the model to be in; pass a name for it"
CHUNK = 1 << 22  # bytes: a model is fetched in a few requests, in parallel


def array_name(decoder: str, head: str) -> str:
    """Return what the array of a model is called."""
    return f"{PREFIX}-{decoder[:16]}-{head[:8]}"


def embed_model(array: zarr.Array, info: "ModelInfo | None" = None) -> zarr.Array:
    """Store the model of an array beside it, once for all arrays of a group.

    Parameters
    ----------
    array : zarr.Array
        Stored with DeepSIC, in a group.
    info : ModelInfo, optional
        The model; by default the one in the array's metadata, which has to be installed here.

    Returns
    -------
    zarr.Array
        The model file: uint8, one axis, uncompressed, in the Zarr format of `array`. Left as it is if it is there, or
        another with its decoder and head, which decodes the same.

    Raises
    ------
    ConfigurationError
        If the array is at the root of its store, or something else has the name.
    ModelNotFound, ModelMismatch
        If the model is not here, or its file is damaged.
    """
    from deepsic_codec.model import file, zoo

    if info is None:
        params = StoredLayout(array).params
        decoder, head = params.identity()
        info = zoo.find_model(decoder, head=head, preferred=params.model)
    place = _beside(array, info.decoder, info.head)
    if place is None:
        raise ConfigurationError(NO_GROUP)
    file.load_arrays(info)  # what is damaged is not handed on
    data = np.fromfile(info.path, np.uint8)
    digest = hashlib.sha256(data.tobytes()).hexdigest()
    about = {"name": info.name, "decoder": info.decoder, "head": info.head, "sha256": digest, "format": "safetensors"}
    there = _existing(place, array.metadata.zarr_format)
    if there is not None:
        has = there.attrs.get(ATTRIBUTE) if isinstance(there, zarr.Array) else None
        same = isinstance(has, Mapping) and dict(has) == about and there.shape == data.shape
        if not same and not _serves(there, has, info):
            raise ConfigurationError(
                f"{place} is there and is not this model; it is never overwritten: delete it, or write to another group"
            )
        if same and (str(place), digest) not in _seen and not np.array_equal(there[:], data):  # it was interrupted
            there[:] = data
        _seen.add((str(place), digest))
        return there
    options: dict[str, Any] = {"compressors": None, "filters": None, "chunks": (min(CHUNK, data.size),)}
    attributes: dict[str, Any] = {ATTRIBUTE: about}
    if array.metadata.zarr_format == 2:
        attributes["_ARRAY_DIMENSIONS"] = [f"{ATTRIBUTE}_byte"]  # xarray opens no group without names
    else:
        options["dimension_names"] = [f"{ATTRIBUTE}_byte"]
    created = zarr.create_array(
        place.store,
        name=place.path,
        shape=data.shape,
        dtype=np.uint8,
        zarr_format=array.metadata.zarr_format,
        attributes=attributes,
        fill_value=0,
        config={"write_empty_chunks": True},
        **options,
    )
    created[:] = data
    _seen.add((str(place), digest))
    return created


#: Places and contents that this process wrote or compared: an archive may get a thousand arrays in a row.
_seen: set[tuple[str, str]] = set()


def check_location(store: Any, name: str | None, zarr_format: int, options: Any = None) -> None:
    """Raise ConfigurationError if an array that is to be created will have no group that a model can be in."""
    path = sync(make_store_path(store, path=name or "", mode="a", storage_options=options))
    if not is_in_group(path, zarr_format):
        raise ConfigurationError(NO_GROUP)


def use_embedded(array: zarr.Array) -> "ModelInfo | None":
    """Make the model of an array known to this process and, through the cache folder, to later ones, if it is not.

    Parameters
    ----------
    array : zarr.Array
        Stored with DeepSIC.

    Returns
    -------
    ModelInfo or None
        The model; None if it is neither here nor in the group.

    Raises
    ------
    ModelMismatch
        If an array with the model's name is not that model.
    """
    from deepsic_codec.model import file, zoo

    decoder, head = StoredLayout(array).params.identity()
    try:
        return zoo.find_model(decoder, head=head)
    except ModelNotFound:
        pass
    place = None if head is None else _beside(array, decoder, head)
    stored = None if place is None else _existing(place, array.metadata.zarr_format)
    if head is None or stored is None:
        return None
    return _keep(_read(stored, file.MAX_FILE), decoder, head, str(place))


def is_embedded(array: zarr.Array, decoder: str, head: str) -> bool:
    """Tell whether the model with this decoder and head is beside an array."""
    path = _beside(array, decoder, head)
    node = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    return path is not None and bool(sync((path / node).exists()))


def _beside(array: Any, decoder: str, head: str) -> StorePath | None:
    """Return where the model of an array is or is to be, None if there is nothing beside the array."""
    parent, _ = parent_and_name(array.store_path)
    return None if parent is None else parent / array_name(decoder, head)


def _existing(place: StorePath, zarr_format: Any) -> Any:
    """Open a node by its own metadata, which metadata that was consolidated earlier does not have."""
    with suppress(FileNotFoundError, KeyError):
        # "r" would reopen a store that is open for writing
        return zarr.open(place, mode="r" if place.store.read_only else "r+", zarr_format=zarr_format)
    return None


def _serves(stored: Any, about: Any, info: "ModelInfo") -> bool:
    """Tell whether an embedded model reads what another encodes: it has its decoder and head, and is undamaged."""
    from deepsic_codec.model import file

    if not isinstance(about, Mapping) or (about.get("decoder"), about.get("head")) != (info.decoder, info.head):
        return False
    with suppress(ModelMismatch):
        _read(stored, file.MAX_FILE)
        return True
    return False


def _read(stored: Any, most: int) -> bytes:
    """Bytes of a model's array; everything that could make them more than `most` is refused before they are read."""
    where = getattr(stored, "path", "")
    if not isinstance(stored, zarr.Array) or stored.ndim != 1 or native_dtype(stored.dtype) != np.uint8:
        raise ModelMismatch(f"{where}: expected an array of uint8 with one axis, as embed_model=True writes it")
    metadata: Any = stored.metadata
    if metadata.zarr_format == 2:
        codecs = [codec for codec in (*(metadata.filters or ()), metadata.compressor) if codec is not None]
    else:
        codecs = [codec for codec in metadata.codecs if type(codec).__name__ != "BytesCodec"]
    if codecs:
        raise ModelMismatch(f"{where}: stored with {type(codecs[0]).__name__}; models are stored as they are")
    if not 0 < stored.size <= most or stored.chunks[0] > most:
        raise ModelMismatch(f"{where}: {stored.size} bytes in chunks of {stored.chunks[0]}, expected at most {most}")
    about = stored.attrs.get(ATTRIBUTE)
    wanted = about.get("sha256") if isinstance(about, Mapping) else None
    try:
        data = np.asarray(stored[:]).tobytes()
    except (ValueError, TypeError, KeyError) as error:  # chunks of another size than the metadata says
        raise ModelMismatch(f"{where}: damaged: {error}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise ModelMismatch(f"{where}: damaged: its bytes have SHA-256 {found}, its attributes say {wanted}")
    return data


def _keep(data: bytes, decoder: str, head: str, where: str) -> "ModelInfo":
    """Put a model into the cache folder once it has proved to be what it is looked for as."""
    from deepsic_codec.model import file, zoo

    folder = zoo.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(suffix=".part", dir=folder)
    except OSError:  # a home that cannot be written to: then for this process only
        folder = Path(tempfile.mkdtemp(prefix="deepsic-models-"))
        zoo.add_folder(folder)
        handle, part = tempfile.mkstemp(suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        info = file.read_info(part)
        if (info.decoder, info.head) != (decoder, head):
            raise ModelMismatch(
                f"{where}: holds the model with decoder {info.decoder} and head {info.head}, expected {decoder}, {head}"
            )
        file.load_arrays(info)
        path = folder / f"{decoder[:32]}-{head[:16]}.safetensors"
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)
    return zoo.find_model(decoder, head=head)
