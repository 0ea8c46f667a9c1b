"""Let an archive of Zarr format 2 be read as format 3: new metadata beside the same chunks, which are not touched."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from deepsic_codec._compat import default_buffer_prototype, make_store_path, sync
from deepsic_codec.codec.v3 import NAME
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.stored.location import storage_options as with_connections

DOCUMENT = "zarr.json"
OLD = (".zmetadata", ".zattrs", ".zgroup", ".zarray")  # in the order in which they may go: what says "array" last
DIMENSIONS = "_ARRAY_DIMENSIONS"  # where xarray keeps the names of dimensions in format 2
KINDS = "biufc"  # numpy's letters of data types whose names and fill values are the same in both formats
SHUFFLES = {0: "noshuffle", 1: "shuffle", 2: "bitshuffle"}


@dataclass(frozen=True)
class Migrated:
    """A node that can be read as format 3 now, or could be after a dry run.

    Attributes
    ----------
    path : str
        Its path in the store.
    document : dict
        Its `zarr.json`.
    consolidated : bool
        Whether it is a group with consolidated metadata, which format 3 gets, too.
    """

    path: str
    document: dict[str, Any]
    consolidated: bool = False


def migrate(
    source: Any,
    name: str | None = None,
    *,
    dry_run: bool = False,
    remove: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Migrated]:
    """Write `zarr.json` beside the metadata of format 2, of an array or of a group and all that is in it.

    Format 3 then finds the same chunks under the same keys. Nothing but metadata is read or written; of labels and
    their index nothing changes either. All of it is made and checked before the first byte is written, and the group
    on top is written last, so that an interrupted run leaves a sound archive of format 2; run it again.

    Parameters
    ----------
    source
        A path, URL or store, as for `zarr.open`.
    name : str, optional
        Path of an array or group in it.
    dry_run : bool
        Write nothing.
    remove : bool
        Delete the metadata of format 2 afterwards. While both are there, zarr warns and takes format 3; without
        `zarr.json` the archive is one of format 2 again.
    storage_options : dict, optional
        For fsspec, if `source` is a URL.

    Returns
    -------
    list of Migrated
        Arrays before the groups that hold them.

    Raises
    ------
    UnsupportedArray
        If there is no metadata of format 2, if an array is stored in a way that format 3 cannot say (filters other
        than DeepSIC, structured or text data types, some compressors), or a `zarr.json` that differs is there.
    """
    if isinstance(source, zarr.Array | zarr.Group):
        source = source.store_path
    options = with_connections(source, storage_options)
    source = str(source) if isinstance(source, Path) else source
    mode: Any = "r" if dry_run else "r+"
    place = sync(make_store_path(source, path=name or "", mode=mode, storage_options=options))
    found = sync(_walk(place.store, place.path))
    if not found:
        raise UnsupportedArray(f"{place}: no array or group of Zarr format 2, so there is nothing to migrate")
    for node in found:
        _check(node, sync(_json(place.store, _key(node.path, DOCUMENT))))
    if not dry_run:
        sync(_write(place.store, found))
        for node in found:
            if node.consolidated:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that format 3 does not specify it: others read on without it
                    zarr.consolidate_metadata(place.store, path=node.path, zarr_format=3)
        if remove:
            sync(_remove(place.store, found))
    return found


def array_document(metadata: Mapping[str, Any], attributes: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the `zarr.json` under which format 3 reads the chunks of a format 2 array.

    Parameters
    ----------
    metadata, attributes : dict
        Contents of `.zarray` and `.zattrs`.
    path : str
        Of the array, for messages.

    Raises
    ------
    UnsupportedArray
        If format 3 cannot say it.
    """
    dtype = _dtype(metadata, path)
    fill = metadata.get("fill_value")
    zero: Any = False if dtype.kind == "b" else [0.0, 0.0] if dtype.kind == "c" else 0
    codecs = _codecs(metadata, dtype, path)
    attributes = dict(attributes)
    names = attributes.pop(DIMENSIONS, None)
    if names is None and codecs[0]["name"] == NAME:
        names = list(codecs[0]["configuration"].get("axes", "yxc"))
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": metadata["shape"],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": metadata["chunks"]}},
        "chunk_key_encoding": {
            "name": "v2",
            "configuration": {"separator": metadata.get("dimension_separator", ".")},
        },
        "fill_value": zero if fill is None else fill,  # format 3 needs one; None reads as 0 in format 2
        "codecs": codecs,
        "attributes": attributes,
    }
    if names is not None:
        document["dimension_names"] = names
    return document


def _dtype(metadata: Mapping[str, Any], path: str) -> np.dtype:
    text = metadata.get("dtype")
    dtype = np.dtype(text) if isinstance(text, str) else None
    if dtype is None or dtype.kind not in KINDS or metadata.get("object_codec"):
        raise UnsupportedArray(f"array {path!r}: data type {text!r} is none that this can carry over; copy the array")
    return dtype


def _codecs(metadata: Mapping[str, Any], dtype: np.dtype, path: str) -> list[dict[str, Any]]:
    chain = [codec for codec in (*(metadata.get("filters") or ()), metadata.get("compressor")) if codec]
    if chain and chain[0].get("id") == NAME:
        first, *after = chain
        # A payload says itself whether it is in C or F order and which byte comes first, and DeepSIC in format 3 acts
        # on that: neither needs a codec of its own.
        configuration = {key: value for key, value in first.items() if key != "id"}
        codecs = [{"name": NAME, "configuration": configuration}]
    else:
        codecs, after = [_plain_bytes(dtype)], chain
        if metadata.get("order") == "F" and len(metadata["shape"]) > 1:
            order = list(range(len(metadata["shape"])))[::-1]
            codecs.insert(0, {"name": "transpose", "configuration": {"order": order}})
    for codec in after:
        codecs.append(_compressor(codec, dtype, path))
    return codecs


def _plain_bytes(dtype: np.dtype) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    little = dtype.newbyteorder("<") == dtype
    return {"name": "bytes", "configuration": {"endian": "little" if little else "big"}}


def _compressor(codec: Mapping[str, Any], dtype: np.dtype, path: str) -> dict[str, Any]:
    """Return what format 3 calls a compressor of numcodecs that writes the same bytes."""
    name = codec.get("id")
    if name == "zstd":
        configuration = {"level": codec.get("level", 0), "checksum": bool(codec.get("checksum", False))}
    elif name == "gzip":
        configuration = {"level": codec.get("level", 1)}
    elif name == "blosc":
        shuffle = codec.get("shuffle", 1)
        shuffle = shuffle if shuffle in SHUFFLES else (2 if dtype.itemsize == 1 else 1)  # -1: numcodecs decides so
        configuration = {
            "cname": codec.get("cname", "lz4"),
            "clevel": codec.get("clevel", 5),
            "shuffle": SHUFFLES[shuffle],
            "blocksize": codec.get("blocksize", 0),
            "typesize": dtype.itemsize,
        }
    else:
        raise UnsupportedArray(
            f"array {path!r}: codec {name!r} of format 2 has no counterpart here in format 3; copy the array instead"
        )
    return {"name": name, "configuration": configuration}


def _check(node: Migrated, existing: Any) -> None:
    """Raise if zarr cannot open what is to be written, or something else is there already."""
    if existing is not None:
        existing.pop("consolidated_metadata", None)
        if existing != node.document:
            raise UnsupportedArray(f"{_key(node.path, DOCUMENT)} is there and differs; delete it to migrate again")
    if node.document["node_type"] == "array":
        trial = MemoryStore({DOCUMENT: default_buffer_prototype().buffer.from_bytes(_dump(node.document))})
        try:
            zarr.open_array(trial, mode="r")
        except Exception as error:
            raise UnsupportedArray(f"array {node.path!r} cannot be expressed in format 3: {error}") from error


async def _walk(store: Any, path: str) -> list[Migrated]:
    """Nodes of format 2 at and below a path, children first."""
    attributes = await _json(store, _key(path, ".zattrs")) or {}
    metadata = await _json(store, _key(path, ".zarray"))
    if metadata is not None:
        return [Migrated(path, array_document(metadata, attributes, path))]
    if await _json(store, _key(path, ".zgroup")) is None:
        return []
    found: list[Migrated] = []
    names = {str(key).rstrip("/").rsplit("/", 1)[-1] async for key in store.list_dir(path)}
    for name in sorted(names - {DOCUMENT, *OLD}):
        found += await _walk(store, _key(path, name))
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return [*found, Migrated(path, document, await store.exists(_key(path, ".zmetadata")))]


async def _write(store: Any, nodes: list[Migrated]) -> None:
    for node in nodes:
        await store.set(_key(node.path, DOCUMENT), default_buffer_prototype().buffer.from_bytes(_dump(node.document)))


async def _remove(store: Any, nodes: list[Migrated]) -> None:
    for node in nodes:
        for name in OLD:
            key = _key(node.path, name)
            if await store.exists(key):
                await store.delete(key)


async def _json(store: Any, key: str) -> Any:
    data = await store.get(key, default_buffer_prototype())
    return None if data is None else json.loads(data.to_bytes())


def _dump(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()


def _key(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic migrate`."""
    parser.add_argument("url", metavar="URL", help="path or URL of an array or group of Zarr format 2")
    parser.add_argument("--name", help="path of one array or group in it")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--remove", action="store_true", help="delete the metadata of format 2 afterwards")
    parser.add_argument("--json", action="store_true", help="print the documents, one line of JSON for each node")


def run(args: argparse.Namespace) -> None:
    """Migrate and print what was, or would be, written."""
    found = migrate(args.url, args.name, dry_run=args.dry_run, remove=args.remove)
    for node in found:
        if args.json:
            print(json.dumps({"path": node.path, "written": not args.dry_run, "document": node.document}))
        else:
            kind = node.document["node_type"]
            codecs = " + ".join(codec["name"] for codec in node.document.get("codecs", ()))
            done = "would write" if args.dry_run else "wrote"
            print(f"{done} {_key(node.path, DOCUMENT)}: {kind} {codecs}".rstrip())
    if not args.json:
        gone = "; metadata of format 2 is gone" if args.remove and not args.dry_run else ""
        print(f"chunks are left as they are{gone}")
