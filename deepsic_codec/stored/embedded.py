"""A model inside an archive: the model file as a plain uint8 array beside the images, found by its identity.

A head in a file of its own is an array of its own, which names the model that it goes with.

With it, an archive can be read where only this package is installed, even if the model is no longer available
elsewhere. The array is called `deepsic-model-<decoder>-<head>`, with the first digits of the two identities as payloads
have them. It is uncompressed: any Zarr reader returns the bytes of the `.safetensors` file.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import StorePath

from deepsic_codec import config
from deepsic_codec._compat import make_store_path, native_dtype, sync
from deepsic_codec.axes import ceil_div
from deepsic_codec.errors import ConfigurationError, ModelMismatch, ModelNotFound
from deepsic_codec.stored.layout import StoredLayout, codec_names
from deepsic_codec.stored.location import is_in_group, parent_and_name

if TYPE_CHECKING:
    from deepsic_codec.model.file import HeadInfo, ModelInfo

PREFIX, HEAD_PREFIX = "deepsic-model", "deepsic-head"
ATTRIBUTE = "deepsic_model"
NO_GROUP = "embed_model: an array at the root of its store has no group for the model to be in; pass a name for it"
CHUNK = 1 << 22  # bytes: a model is fetched in a few requests, in parallel
MAX_CHUNKS = 1 << 10  # each costs a request


def array_name(decoder: str, head: str, prefix: str = PREFIX) -> str:
    """Return the name of the array that holds a model, or with `HEAD_PREFIX` a head."""
    return f"{prefix}-{decoder[:16]}-{head[:8]}"


def embed_model(array: zarr.Array, info: "ModelInfo | None" = None) -> zarr.Array:
    """Store the model of an array beside it, once for all arrays of a group, and return the array that has it.

    A head in a file of its own is stored in an array of its own. By default the model is that in the metadata of the
    array, which has to be installed here. An earlier array is left as it is if it holds this model, or another one with
    the same decoder and head, which decodes the same.

    Raises
    ------
    ConfigurationError
        If the array is at the root of its store, or another node has the name.
    ModelNotFound, ModelMismatch
        If the model is not installed here, or its file is damaged.
    """
    from deepsic_codec.model import file, zoo

    if info is None:
        params = StoredLayout(array).params
        decoder, head = params.identity()
        info = zoo.find_model(decoder, head=head, preferred=params.model)
    if _path_beside(array, info.decoder, info.head) is None:
        raise ConfigurationError(NO_GROUP)
    file.load_arrays(info)  # raises for a damaged file, which must not be stored
    if info.head_file is None:
        return _embed(array, info)
    model = file.read_info(info.path)
    embedded = _embed(array, model)
    _embed(array, info.head_file, model=model.head)
    return embedded


def _embed(array: zarr.Array, info: "ModelInfo | HeadInfo", **more: str) -> zarr.Array:
    """Store a file beside an array, unless it is there."""
    path = _path_beside(array, info.decoder, info.head, HEAD_PREFIX if more else PREFIX)
    assert path is not None
    data = np.fromfile(info.path, np.uint8)
    digest = hashlib.sha256(data.tobytes()).hexdigest()
    about = {"name": info.name, "decoder": info.decoder, "head": info.head, "sha256": digest, "format": "safetensors"}
    about |= more
    existing = _open(path, array.metadata.zarr_format)
    if existing is None:
        embedded = _create(path, data, about, array.metadata.zarr_format)
    else:
        embedded = existing
        attribute = existing.attrs.get(ATTRIBUTE) if isinstance(existing, zarr.Array) else None
        same = isinstance(attribute, Mapping) and dict(attribute) == about and existing.shape == data.shape
        if not same and not _holds(existing, attribute, info):
            raise ConfigurationError(
                f"{path} exists, is not this model, and is never overwritten; delete it, or write to another group"
            )
        # Different bytes under the right attribute: writing them was interrupted.
        if same and (str(path), digest) not in _complete and not np.array_equal(existing[:], data):
            existing[:] = data
    _complete.add((str(path), digest))
    return embedded


#: Paths and contents that this process wrote or compared: an archive may get a thousand arrays in a row.
_complete: set[tuple[str, str]] = set()


def _create(path: StorePath, data: np.ndarray[Any, Any], about: dict[str, str], zarr_format: Any) -> zarr.Array:
    attributes: dict[str, Any] = {ATTRIBUTE: about}
    options: dict[str, Any] = {}
    names = [f"{ATTRIBUTE}_byte"]  # without dimension names, xarray cannot open the group
    if zarr_format == 2:
        attributes["_ARRAY_DIMENSIONS"] = names
    else:
        options["dimension_names"] = names
    array = zarr.create_array(
        path.store,
        name=path.path,
        shape=data.shape,
        dtype=np.uint8,
        chunks=(min(CHUNK, data.size),),
        compressors=None,
        filters=None,
        zarr_format=zarr_format,
        attributes=attributes,
        fill_value=0,
        config={"write_empty_chunks": True},
        **options,
    )
    array[:] = data
    return array


def check_location(store: Any, name: str | None, zarr_format: int, options: Any = None) -> None:
    """Raise ConfigurationError if an array that is to be created will have no group that a model can be in."""
    path = sync(make_store_path(store, path=name or "", mode="a", storage_options=options))
    if not is_in_group(path, zarr_format):
        raise ConfigurationError(NO_GROUP)


def use_embedded(array: zarr.Array) -> "ModelInfo | None":
    """Make the model of an array available to this process and, through the cache folder, to later ones.

    Returns None if the model is neither installed nor in the group.

    Raises
    ------
    ModelMismatch
        If an array with the name of the model is not that model.
    """
    from deepsic_codec.model import zoo

    decoder, head = StoredLayout(array).params.identity()
    try:
        return zoo.find_model(decoder, head=head)
    except ModelNotFound:
        pass
    if head is None:
        return None
    if not _use(array, decoder, head, PREFIX):
        attribute = _use(array, decoder, head, HEAD_PREFIX)
        if attribute is None or not _use(array, decoder, str(attribute.get("model", "")), PREFIX):
            return None
    return zoo.find_model(decoder, head=head)


def _use(array: zarr.Array, decoder: str, head: str, prefix: str) -> "Mapping[str, Any] | None":
    """Put a file that is beside an array into the cache folder; return the attribute of its array, None without one."""
    path = _path_beside(array, decoder, head, prefix)
    embedded = None if path is None else _open(path, array.metadata.zarr_format)
    if embedded is None:
        return None
    _cache(_read(embedded, config.get().max_model_bytes), decoder, head, str(path))
    return dict(embedded.attrs[ATTRIBUTE])  # `_read` compared the digest in it


def is_embedded(array: zarr.Array, decoder: str, head: str) -> bool:
    """Tell whether the model with this decoder and head is beside an array."""
    paths = (_path_beside(array, decoder, head, prefix) for prefix in (PREFIX, HEAD_PREFIX))
    node = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    return any(path is not None and bool(sync((path / node).exists())) for path in paths)


def _path_beside(array: Any, decoder: str, head: str, prefix: str = PREFIX) -> StorePath | None:
    """Return where the model or head of an array is or is to be, None if nothing can be beside the array."""
    parent, _ = parent_and_name(array.store_path)
    return None if parent is None else parent / array_name(decoder, head, prefix)


def _open(path: StorePath, zarr_format: Any) -> Any:
    """Open a node, None if there is none.

    Its own metadata is read: metadata of the group that was consolidated earlier does not have it.
    """
    with suppress(FileNotFoundError, KeyError):
        # "r" would reopen a store that is open for writing.
        return zarr.open(path, mode="r" if path.store.read_only else "r+", zarr_format=zarr_format)
    return None


def _holds(node: Any, attribute: Any, info: "ModelInfo | HeadInfo") -> bool:
    """Tell whether a node holds an undamaged model with the decoder and head of `info`."""
    if not isinstance(attribute, Mapping):
        return False
    if (attribute.get("decoder"), attribute.get("head")) != (info.decoder, info.head):
        return False
    with suppress(ModelMismatch):
        _read(node, config.get().max_model_bytes)
        return True
    return False


def _read(node: Any, max_size: int) -> bytes:
    """Read the array of a model. An array that could expand to more than `max_size` bytes is refused before that."""
    name = getattr(node, "path", "")
    if not isinstance(node, zarr.Array) or node.ndim != 1 or native_dtype(node.dtype) != np.uint8:
        raise ModelMismatch(f"{name}: expected an array of uint8 with one axis, as embed_model=True writes it")
    if codec_names(node) not in ("none", "bytes"):
        raise ModelMismatch(f"{name}: stored with {codec_names(node)}; models are stored uncompressed")
    if not 0 < node.size <= max_size or node.chunks[0] > max_size:
        raise ModelMismatch(f"{name}: {node.size} bytes in chunks of {node.chunks[0]}, expected at most {max_size}")
    if (count := ceil_div(node.size, node.chunks[0])) > MAX_CHUNKS:
        raise ModelMismatch(f"{name}: {count} chunks of {node.chunks[0]} bytes, expected at most {MAX_CHUNKS} chunks")
    attribute = node.attrs.get(ATTRIBUTE)
    expected = attribute.get("sha256") if isinstance(attribute, Mapping) else None
    try:
        data = np.asarray(node[:]).tobytes()
    except (ValueError, TypeError, KeyError) as error:  # chunks of another size than the metadata says
        raise ModelMismatch(f"{name}: damaged: {error}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise ModelMismatch(f"{name}: damaged: SHA-256 {digest}, expected {expected}")
    return data


@lru_cache(maxsize=1)
def _temporary_folder(pid: int) -> Path:
    """Return a folder for models that goes away with this process."""
    folder = Path(tempfile.mkdtemp(prefix="deepsic-models-"))
    atexit.register(_remove_folder, folder, pid)
    return folder


def _remove_folder(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not when a process that was forked from it ends
        shutil.rmtree(folder, ignore_errors=True)


def _cache(data: bytes, decoder: str, head: str, source: str) -> None:
    """Put a model or a head into the cache folder, once it is verified to have this decoder and head."""
    from deepsic_codec.model import file, zoo

    folder = zoo.cache_folder()
    try:
        if folder is None:
            raise FileNotFoundError("the user has no home")
        folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(suffix=".part", dir=folder)
    except OSError:  # the home cannot be written to: keep the model for this process only
        folder = _temporary_folder(os.getpid())
        zoo.add_folder(folder)
        handle, part = tempfile.mkstemp(suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        info = file.read_file(part)
        if (info.decoder, info.head) != (decoder, head):
            raise ModelMismatch(
                f"{source}: the model has decoder {info.decoder} and head {info.head}, expected {decoder} and {head}"
            )
        file.verify(info)
        os.replace(part, folder / f"{decoder[:32]}-{head[:16]}.safetensors")
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)
