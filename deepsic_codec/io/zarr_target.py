"""A Zarr array that no reader sees before it is complete."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import LocalStore, StorePath

from deepsic_codec._compat import default_buffer_prototype, make_store_path, sync
from deepsic_codec.errors import ConfigurationError, WriteError
from deepsic_codec.io.temporary import complete_only
from deepsic_codec.stored import replacement
from deepsic_codec.stored.location import fsspec_options, is_in_group, remote_errors

METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")


@contextlib.contextmanager
def write_array(
    target: str, template: zarr.Array, *, overwrite: bool, source: str, name: str = ""
) -> Iterator[zarr.Array]:
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
    name : str
        Name of the array in a new group, which the target then is; empty if the target is the array.

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
        yield from _write_remote(target, template, overwrite, source, name)
    else:
        yield from _write_local(_local(target), template, overwrite, source, name)


def new_group_member(target: str, name: str, zarr_format: int) -> tuple[str, str]:
    """Return where an array of a name goes: a target, and its name in a new group there, empty if it needs none.

    A target in a group, or where an array is, is that of the array. So is the array of this name in a group there.
    """
    if _is_remote(target) or _local(target).parent.is_dir():
        # Read-only, because a local store would make its folder.
        in_group = is_in_group(target_path(target, read_only=True), zarr_format)
        if in_group or _is_array(_documents(target)):
            return target, ""
        if _is_array(_documents(f"{target}/{name}")):
            return f"{target}/{name}", ""
    return target, name


def target_path(target: str, *, read_only: bool = False) -> StorePath:
    """Return the place of a target, without making anything there."""
    if _is_remote(target):
        mode: Any = "r" if read_only else "a"
        with remote_errors(target, write=not read_only):
            return sync(make_store_path(target, mode=mode, storage_options=fsspec_options(target, None)))
    return StorePath(LocalStore(_local(target), read_only=read_only))


def _local(target: str) -> Path:
    return Path(target.removeprefix("file://"))


def _is_remote(target: str) -> bool:
    return "://" in target and not target.startswith("file://")


def _write_local(path: Path, template: zarr.Array, overwrite: bool, source: str, name: str) -> Iterator[zarr.Array]:
    if source.startswith("file://"):
        origin, resolved = Path(source.removeprefix("file://")).resolve(), path.resolve()
        if resolved == origin or resolved in origin.parents or origin in resolved.parents:
            raise WriteError(f"{path}: the target overlaps the source {origin}; choose another target", [str(path)])
    if not path.parent.is_dir():
        raise WriteError(f"{path.parent}: no such folder; create it first", [str(path)])
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        _check_replaceable(str(path), _documents(str(path)), overwrite)
    with complete_only(path, "folder") as folder:
        location = sync(make_store_path(str(folder), mode="a"))
        yield zarr.Array(zarr.AsyncArray(template.metadata, location / name))
        _write_metadata(template, location, name)


def _write_remote(target: str, template: zarr.Array, overwrite: bool, source: str, name: str) -> Iterator[zarr.Array]:
    if source.rstrip("/") == target.rstrip("/"):
        raise WriteError(f"{target}: the target is the source; choose another target", [target])
    location = target_path(target)
    store, path = location.store, location.path
    if documents := _documents(target):
        _check_replaceable(target, documents, overwrite)
        staged = replacement.staged(store, path, template)
        if staged is None:
            raise ConfigurationError(f"{target}: arrays in this store cannot be replaced; choose another target")
        with replacement.discarded_on_error(staged):
            yield staged
        replacement.replace_array(staged)
        return
    with remote_errors(target, write=True):
        empty = sync(store.is_empty(path))
    if not empty:
        message = "has objects that are no Zarr array: choose another target, or delete what an export left there"
        raise WriteError(f"{target}: {message}", [target])
    try:
        yield zarr.Array(zarr.AsyncArray(template.metadata, location / name))
    except BaseException:
        with contextlib.suppress(Exception):  # the first error says what is wrong
            sync(store.delete_dir(path))
        raise
    _write_metadata(template, location, name)


def _check_replaceable(target: str, documents: dict[str, bytes], overwrite: bool) -> None:
    """Raise WriteError unless these metadata documents of a target are those of an array to be overwritten."""
    if not _is_array(documents):
        raise WriteError(f"{target}: exists already and is no Zarr array; choose another target", [target])
    if not overwrite:
        raise WriteError(f"{target}: exists already; choose another target, or replace it with --overwrite", [target])


def _is_array(documents: Mapping[str, bytes]) -> bool:
    with contextlib.suppress(ValueError, AttributeError, KeyError):
        return ".zarray" in documents or json.loads(documents["zarr.json"]).get("node_type") == "array"
    return False


def _documents(target: str) -> dict[str, bytes]:
    """Return the documents of metadata at a target."""
    if not _is_remote(target):
        return {key: (_local(target) / key).read_bytes() for key in METADATA if (_local(target) / key).is_file()}
    location = target_path(target, read_only=True)
    with remote_errors(target):
        return {key: data for key in METADATA if (data := _read(location / key)) is not None}


def _write_metadata(template: zarr.Array, location: StorePath, name: str) -> None:
    for key, document in template.metadata.to_buffer_dict(default_buffer_prototype()).items():
        sync((location / name / key).set(document))
    if name:
        zarr.open_group(location, mode="a", zarr_format=template.metadata.zarr_format)


def _read(location: StorePath) -> bytes | None:
    data = sync(location.get(default_buffer_prototype()))
    return None if data is None else data.to_bytes()
