"""Arrays that replace others: written among the keys of the old one, which they replace when they are complete.

Until then readers see the old array, and it may be the source of the new one.
"""

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, StorePath

from deepsic_codec._compat import default_buffer_prototype, sync

PREFIX = ".deepsic-new-"  # of the folder among the keys of an array that has the new one
DOCUMENTS = ("zarr.json", ".zarray", ".zattrs")
CONCURRENCY = 32  # keys that are moved at once


def staged(store: Store, path: str, template: Any) -> Any:
    """Return an array that is to replace the one at `path`, with the metadata of `template`.

    Nothing is written yet, its metadata not before it is complete. None if the store cannot hold it: a session of
    Icechunk has no keys without an array, and replaces nothing before it is committed.
    """
    if not store.supports_deletes or type(store).__module__.startswith("icechunk"):
        return None
    location = f"{path}/{PREFIX}{uuid4().hex[:8]}".lstrip("/")
    return zarr.Array(zarr.AsyncArray(template.metadata, StorePath(store, location)))


def discard(array: Any) -> None:
    """Remove an array that was to replace another."""
    sync(array.store_path.store.delete_dir(array.store_path.path))


@contextmanager
def discarded_on_error(array: Any) -> Iterator[None]:
    """Remove an array that is to replace another if a `with` block fails."""
    try:
        yield
    except BaseException:
        if target_of(array) is not array:
            discard(array)
        raise


def target_of(array: Any) -> Any:
    """Return an array as it is when it has replaced the one at its path; itself if it is to replace none."""
    group, _, name = array.store_path.path.rpartition("/")
    if not name.startswith(PREFIX):
        return array
    return zarr.Array(zarr.AsyncArray(array.metadata, StorePath(array.store_path.store, group)))


def replace_array(array: Any) -> Any:
    """Put an array in the place of the one that it is to replace; returns it."""
    store, folder = array.store_path.store, array.store_path.path
    target = target_of(array)
    if isinstance(store, LocalStore):
        _rename(store, target.store_path.path, folder)
    else:
        sync(_copy(store, target.store_path.path, folder))
    for key, document in array.metadata.to_buffer_dict(default_buffer_prototype()).items():
        sync((target.store_path / key).set(document))
    return target


def _rename(store: LocalStore, path: str, staged: str) -> None:
    folder, new = store.root / path, store.root / staged
    new.mkdir(exist_ok=True)  # there is none if all chunks are empty
    old = folder / f"{new.name}-old"
    old.mkdir()
    for entry in [*folder.iterdir()]:
        if entry not in (new, old):
            os.rename(entry, old / entry.name)
    for entry in [*new.iterdir()]:
        os.rename(entry, folder / entry.name)
    shutil.rmtree(old)
    new.rmdir()


async def _copy(store: Store, path: str, staged: str) -> None:
    limit, prefix = asyncio.Semaphore(CONCURRENCY), f"{path}/" if path else ""
    keys = [key async for key in store.list_prefix(prefix)]
    names = [key.removeprefix(f"{staged}/") for key in keys if key.startswith(f"{staged}/")]
    replaced = [key for key in keys if not key.startswith(f"{staged}/")]

    async def delete(key: str) -> None:
        async with limit:
            await store.delete(key)

    async def copy(name: str) -> None:
        async with limit:
            data = await store.get(f"{staged}/{name}", default_buffer_prototype())
            if data is not None:
                await store.set(f"{prefix}{name}", data)

    documents = [key for key in replaced if key.removeprefix(prefix) in DOCUMENTS]
    for key in documents:  # first, so that an interruption leaves no array that lacks chunks
        await store.delete(key)
    await asyncio.gather(*(delete(key) for key in replaced if key not in documents))
    await asyncio.gather(*map(copy, names))
    await store.delete_dir(staged)
