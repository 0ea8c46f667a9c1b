"""A Zarr array that no reader sees before it is complete."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import zarr
from zarr.storage import LocalStore, StorePath

from deepsic_codec._compat import default_buffer_prototype, make_store_path, sync
from deepsic_codec.errors import ConfigurationError, WriteError
from deepsic_codec.io.temporary import complete_only
from deepsic_codec.stored import replacement
from deepsic_codec.stored.location import fsspec_options

METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")


@contextlib.contextmanager
def write_array(target: str, template: zarr.Array, *, overwrite: bool, source: str) -> Iterator[zarr.Array]:
    """Create an array, fill it in a `with` block, and store its metadata when the block has ended without an error.

    On a local path, the chunks go to a hidden folder beside the target. At the end the folder gets the name of the
    target; if the block fails, it is removed, and an array that was to be replaced is still there. Other stores cannot
    rename: there the chunks go among the keys of the array to replace, and are copied at the end; those of a block that
    fails are deleted. Chunks of a process that was killed have no metadata and are no array for any reader.

    Parameters
    ----------
    target : str
        Path or URL of the array.
    template : zarr.Array
        Array of the same metadata, in memory.
    overwrite : bool
        Replace an array at the target.
    source : str
        URL of an array that the target must not overlap.

    Raises
    ------
    WriteError
        If the target exists and must not be replaced, or overlaps the source.
    ConfigurationError
        If the target is a zip file, whose members cannot be replaced.
    """
    if target.endswith(".zip"):
        raise ConfigurationError(f"{target}: cannot export to a zip file; export to a folder, then zip it")
    if _is_remote(target):
        yield from _write_remote(target, template, overwrite, source)
    else:
        yield from _write_local(Path(target.removeprefix("file://")), template, overwrite, source)


def target_path(target: str) -> StorePath:
    """Return the place of a target, without making anything there."""
    if _is_remote(target):
        return sync(make_store_path(target, mode="a", storage_options=fsspec_options(target, None)))
    return StorePath(LocalStore(Path(target.removeprefix("file://"))))


def _is_remote(target: str) -> bool:
    return "://" in target and not target.startswith("file://")


def _write_local(path: Path, template: zarr.Array, overwrite: bool, source: str) -> Iterator[zarr.Array]:
    if source.startswith("file://"):
        origin, resolved = Path(source.removeprefix("file://")).resolve(), path.resolve()
        if resolved == origin or resolved in origin.parents or origin in resolved.parents:
            raise WriteError(f"{path}: the target overlaps the source {origin}; choose another target", [str(path)])
    if not path.parent.is_dir():
        raise WriteError(f"{path.parent}: no such folder; create it first", [str(path)])
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        documents = {key: (path / key).read_bytes() for key in METADATA if (path / key).is_file()}
        _check_replaceable(str(path), documents, overwrite)
    with complete_only(path, "folder") as folder:
        location = sync(make_store_path(str(folder), mode="a"))
        yield zarr.Array(zarr.AsyncArray(template.metadata, location))
        _write_metadata(template, location)


def _write_remote(target: str, template: zarr.Array, overwrite: bool, source: str) -> Iterator[zarr.Array]:
    if source.rstrip("/") == target.rstrip("/"):
        raise WriteError(f"{target}: the target is the source; choose another target", [target])
    location = sync(make_store_path(target, mode="a", storage_options=fsspec_options(target, None)))
    store, path = location.store, location.path
    documents = {key: data for key in METADATA if (data := _read(location / key)) is not None}
    if documents:
        _check_replaceable(target, documents, overwrite)
        staged = replacement.staged(store, path, template)
        if staged is None:
            raise ConfigurationError(f"{target}: arrays in this store cannot be replaced; choose another target")
        with replacement.discarded_on_error(staged):
            yield staged
        replacement.replace_array(staged)
        return
    if not sync(store.is_empty(path)):
        message = "has objects that are no Zarr array: choose another target, or delete what an export left there"
        raise WriteError(f"{target}: {message}", [target])
    try:
        yield zarr.Array(zarr.AsyncArray(template.metadata, location))
    except BaseException:
        sync(store.delete_dir(path))
        raise
    _write_metadata(template, location)


def _check_replaceable(target: str, documents: dict[str, bytes], overwrite: bool) -> None:
    """Raise WriteError unless these metadata documents of a target are those of an array to be overwritten."""
    is_array = ".zarray" in documents
    with contextlib.suppress(ValueError, AttributeError, KeyError):
        is_array = is_array or json.loads(documents["zarr.json"]).get("node_type") == "array"
    if not is_array:
        raise WriteError(f"{target}: exists already and is no Zarr array; choose another target", [target])
    if not overwrite:
        raise WriteError(f"{target}: exists already; choose another target, or replace it with --overwrite", [target])


def _write_metadata(template: zarr.Array, location: StorePath) -> None:
    for key, document in template.metadata.to_buffer_dict(default_buffer_prototype()).items():
        sync((location / key).set(document))


def _read(location: StorePath) -> bytes | None:
    data = sync(location.get(default_buffer_prototype()))
    return None if data is None else data.to_bytes()
