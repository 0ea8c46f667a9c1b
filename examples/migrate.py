"""Make an archive of Zarr format 2 readable as format 3: new metadata beside the same chunks.

    python examples/migrate.py land.zarr --dry-run
    python examples/migrate.py land.zarr

Only metadata is read and written. No chunk is copied, decoded or changed.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.codec.v3 import NAME
from deepsic_codec.errors import UnsupportedArray

DOCUMENT = "zarr.json"
FORMAT_2_FILES = (".zmetadata", ".zattrs", ".zgroup", ".zarray")  # in the order of removal, `.zarray` last
DIMENSIONS = "_ARRAY_DIMENSIONS"  # attribute in which xarray stores dimension names in format 2
KINDS = "biufc"  # numpy's letters of data types whose names and fill values are the same in both formats
SHUFFLES = {0: "noshuffle", 1: "shuffle", 2: "bitshuffle"}


@dataclass(frozen=True)
class Node:
    """An array or group and its metadata in format 3.

    Attributes
    ----------
    path : str
        Path in the store.
    document : dict
        Content of its `zarr.json`.
    consolidated : bool
        Whether it is a group with consolidated metadata; then format 3 gets consolidated metadata, too.
    """

    path: str
    document: dict[str, Any]
    consolidated: bool = False


def migrate(source: Any, name: str | None = None, *, dry_run: bool = False, remove: bool = False) -> list[Node]:
    """Write `zarr.json` beside the metadata of format 2, for an array or for a group and everything in it.

    Format 3 then finds the same chunks under the same keys. The label index stays valid. All metadata is made and
    checked before the first byte is written. The outermost group is written last, so that an interrupted run leaves a
    valid archive of format 2; run it again.

    Parameters
    ----------
    source
        A path, URL or store, as for `zarr.open`.
    name : str, optional
        Path of an array or group in it.
    dry_run : bool
        Write nothing.
    remove : bool
        Delete the metadata of format 2 afterwards. As long as both exist, zarr warns and takes format 3; without
        `zarr.json` the archive is one of format 2 again.

    Returns
    -------
    list of Node
        Arrays before the groups that hold them.

    Raises
    ------
    UnsupportedArray
        If there is no metadata of format 2, if format 3 cannot express an array (filters other than DeepSIC, structured
        or text data types, some compressors), or if a different `zarr.json` exists.
    """
    try:
        root = zarr.open(source, path=name, mode="r" if dry_run else "r+", zarr_format=2)
    except FileNotFoundError as error:
        raise UnsupportedArray(f"{source}: no array or group of Zarr format 2, so nothing to migrate") from error
    store, path = root.store_path.store, root.store_path.path
    nodes = sync(_walk(store, path))
    for node in nodes:
        _check(node, sync(_read_json(store, _key(node.path, DOCUMENT))))
    if dry_run:
        return nodes
    sync(_write(store, nodes))
    for node in nodes:
        if node.consolidated:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # format 3 does not specify consolidated metadata yet
                zarr.consolidate_metadata(store, path=node.path, zarr_format=3)
    if remove:
        sync(_remove(store, nodes))
    return nodes


def array_document(metadata: Mapping[str, Any], attributes: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the `zarr.json` with which format 3 reads the chunks of an array of format 2.

    Parameters
    ----------
    metadata, attributes : dict
        Contents of `.zarray` and `.zattrs`.
    path : str
        Path of the array, for messages.

    Raises
    ------
    UnsupportedArray
        If format 3 cannot express the array.
    """
    dtype = _dtype(metadata, path)
    fill = metadata.get("fill_value")
    zero: Any = False if dtype.kind == "b" else [0.0, 0.0] if dtype.kind == "c" else 0
    codecs = _codecs(metadata, dtype, path)
    attributes = dict(attributes)
    names = attributes.pop(DIMENSIONS, None)
    if names is None and codecs[0]["name"] == NAME:
        names = list(codecs[0]["configuration"].get("axes", "yxc"))
    separator = metadata.get("dimension_separator", ".")
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": metadata["shape"],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": metadata["chunks"]}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": separator}},
        "fill_value": zero if fill is None else fill,  # format 3 needs a fill value; format 2 reads None as 0
        "codecs": codecs,
        "attributes": attributes,
    }
    return document if names is None else {**document, "dimension_names": names}


def _dtype(metadata: Mapping[str, Any], path: str) -> np.dtype:
    text = metadata.get("dtype")
    dtype = np.dtype(text) if isinstance(text, str) else None
    if dtype is None or dtype.kind not in KINDS or metadata.get("object_codec"):
        raise UnsupportedArray(f"array {path!r}: data type {text!r} cannot be migrated; copy the array instead")
    return dtype


def _codecs(metadata: Mapping[str, Any], dtype: np.dtype, path: str) -> list[dict[str, Any]]:
    chain = [codec for codec in (*(metadata.get("filters") or ()), metadata.get("compressor")) if codec]
    if chain and chain[0].get("id") == NAME:
        first, *others = chain
        # A payload stores memory order and byte order itself, so DeepSIC in format 3 needs no codec for either.
        codecs = [{"name": NAME, "configuration": {key: value for key, value in first.items() if key != "id"}}]
    else:
        others, codecs = chain, [_bytes_codec(dtype)]
        if metadata.get("order") == "F" and len(metadata["shape"]) > 1:
            order = list(range(len(metadata["shape"])))[::-1]
            codecs.insert(0, {"name": "transpose", "configuration": {"order": order}})
    return codecs + [_compressor(codec, dtype, path) for codec in others]


def _bytes_codec(dtype: np.dtype) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    little = dtype.newbyteorder("<") == dtype
    return {"name": "bytes", "configuration": {"endian": "little" if little else "big"}}


def _compressor(codec: Mapping[str, Any], dtype: np.dtype, path: str) -> dict[str, Any]:
    """Return the codec of format 3 that reads and writes the same bytes as a compressor of numcodecs."""
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
        raise UnsupportedArray(f"array {path!r}: no codec {name!r} in format 3; copy the array instead")
    return {"name": name, "configuration": configuration}


def _check(node: Node, existing: Any) -> None:
    """Raise UnsupportedArray if zarr cannot open the document, or a different one exists."""
    if existing is not None:
        existing.pop("consolidated_metadata", None)
        if existing != node.document:
            raise UnsupportedArray(f"{_key(node.path, DOCUMENT)} exists and differs; delete it to migrate again")
    if node.document["node_type"] == "array":
        trial = MemoryStore({DOCUMENT: default_buffer_prototype().buffer.from_bytes(_dump(node.document))})
        try:
            zarr.open_array(trial, mode="r")
        except Exception as error:
            raise UnsupportedArray(f"array {node.path!r} cannot be expressed in format 3: {error}") from error


async def _walk(store: Any, path: str) -> list[Node]:
    """Return the nodes of format 2 at and below a path, children first."""
    attributes = await _read_json(store, _key(path, ".zattrs")) or {}
    metadata = await _read_json(store, _key(path, ".zarray"))
    if metadata is not None:
        return [Node(path, array_document(metadata, attributes, path))]
    if await _read_json(store, _key(path, ".zgroup")) is None:
        return []
    nodes: list[Node] = []
    names = {str(key).rstrip("/").rsplit("/", 1)[-1] async for key in store.list_dir(path)}
    for name in sorted(names - {DOCUMENT, *FORMAT_2_FILES}):
        nodes += await _walk(store, _key(path, name))
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return [*nodes, Node(path, document, await store.exists(_key(path, ".zmetadata")))]


async def _write(store: Any, nodes: list[Node]) -> None:
    for node in nodes:
        await store.set(_key(node.path, DOCUMENT), default_buffer_prototype().buffer.from_bytes(_dump(node.document)))


async def _remove(store: Any, nodes: list[Node]) -> None:
    for node in nodes:
        for name in FORMAT_2_FILES:
            key = _key(node.path, name)
            if await store.exists(key):
                await store.delete(key)


async def _read_json(store: Any, key: str) -> Any:
    data = await store.get(key, default_buffer_prototype())
    return None if data is None else json.loads(data.to_bytes())


def _dump(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()


def _key(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def main() -> None:
    """Migrate an archive and print what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url", metavar="URL", help="path or URL of an array or group of Zarr format 2")
    parser.add_argument("--name", help="path of one array or group in it")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    parser.add_argument("--remove", action="store_true", help="delete the metadata of format 2 afterwards")
    args = parser.parse_args()
    try:
        nodes = migrate(args.url, args.name, dry_run=args.dry_run, remove=args.remove)
    except UnsupportedArray as error:
        sys.exit(f"error: {error}")
    for node in nodes:
        codecs = " + ".join(codec["name"] for codec in node.document.get("codecs", ()))
        action = "would write" if args.dry_run else "wrote"
        print(f"{action} {_key(node.path, DOCUMENT)}: {node.document['node_type']} {codecs}".rstrip())
    print("no chunk was changed" + ("; the metadata of format 2 is gone" if args.remove and not args.dry_run else ""))


if __name__ == "__main__":
    main()
