"""Open arrays and find where their index belongs, in any store; count what is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.storage import FsspecStore, LocalStore, StorePath, WrapperStore, ZipStore

from deepsic_codec._compat import Buffer, make_store_path, read_part, sync
from deepsic_codec.errors import DeepSICError, LabelIndexError, UnsupportedArray
from deepsic_codec.stored import layout as stored

SUFFIX = "_labels"  # of the group beside an array that has its index
CONNECTIONS = 128  # to S3 at once; what botocore allows by default, 10, makes a scan ten times slower

# Asked for a whole object, s3fs first asks how large it is; asked for a part, it does not. Stores clip long ranges.
WHOLE = RangeByteRequest(0, 1 << 40)

Mode = Literal["r", "r+", "a"]


def is_deepsic(node: Any) -> bool:
    """Tell whether `node` is an array whose chunks are payloads of DeepSIC."""
    if not isinstance(node, zarr.Array):
        return False
    try:
        stored.codec_of(node)
    except DeepSICError:
        return False
    return True


def storage_options(source: Any, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return options for fsspec that allow many requests at once to S3, unless the user set their number."""
    if not (isinstance(source, str) and source.startswith(("s3://", "s3a://"))):
        return None if given is None else dict(given)
    options = dict(given or {})
    options["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **options.get("config_kwargs", {})}
    return options


def open_node(
    source: Any,
    name: str | None = None,
    *,
    mode: Mode = "r",
    options: Mapping[str, Any] | None = None,
    counter: "Counter | None" = None,
) -> Any:
    """Open an array or group.

    Parameters
    ----------
    source
        An array or group of Zarr, or what `zarr.open` takes.
    name : str, optional
        Path of an array in the group.
    mode : {"r", "r+", "a"}
        As for `zarr.open`.
    options : dict, optional
        `storage_options` for a URL.
    counter : Counter, optional
        Counts what opening reads.

    Raises
    ------
    UnsupportedArray
        If the group has no such array.
    """
    if isinstance(source, zarr.Array | zarr.Group):
        if name is None:
            return source
        if not isinstance(source, zarr.Group) or name not in source:
            raise UnsupportedArray(f"{source.store_path} has no array {name!r}")
        return source[name]
    options = storage_options(source, options)
    source = str(source) if isinstance(source, Path) else source
    if isinstance(source, str) and source.endswith(".zip") and mode == "r" and Path(source).is_file():
        source = ZipStore(source, mode="r")  # zarr itself takes the path for that of a folder
    if isinstance(source, Store) and mode == "r" and not source.read_only:
        mode = "r+"  # "r" would reopen the store, which a zip file being written cannot bear
    try:
        place = sync(make_store_path(source, path=name or "", mode=mode, storage_options=options))
        counting = StorePath(CountingStore(place.store, counter), place.path)
        if name is not None:  # straight to the array: a group need not be looked at, which saves requests
            return _uncounted(zarr.open_array(counting, mode=mode))
        return _uncounted(zarr.open(counting, mode=mode))
    except FileNotFoundError as error:
        raise UnsupportedArray(f"{source}: no array or group{f' {name!r}' if name else ''} of Zarr ({error})") from None


def _uncounted(node: Any) -> Any:
    path = StorePath(node.store_path.store._store, node.store_path.path)
    if isinstance(node, zarr.Group):
        return zarr.Group(zarr.AsyncGroup(node.metadata, path))
    return zarr.Array(zarr.AsyncArray(node.metadata, path))


def arrays_in(node: Any) -> list[zarr.Array]:
    """Return the arrays stored with DeepSIC that a node of Zarr is or has, by path; UnsupportedArray for none."""
    if isinstance(node, zarr.Array):
        stored.codec_of(node)  # says what it is stored with instead
        return [node]
    arrays: list[Any] = [member for _, member in node.members(max_depth=None) if is_deepsic(member)]
    if not arrays:
        raise UnsupportedArray(f"{node.store_path} has no array stored with DeepSIC")
    return sorted(arrays, key=lambda array: array.path)


def open_array(source: Any, name: str | None = None, **kwargs: Any) -> zarr.Array:
    """Open the one array stored with DeepSIC that `source` is or has; raises UnsupportedArray for more than one."""
    arrays = arrays_in(open_node(source, name, **kwargs))
    if len(arrays) > 1:
        names = ", ".join(array.path for array in arrays)
        raise UnsupportedArray(f"expected one array stored with DeepSIC, found {names}; pass its name")
    return arrays[0]


@dataclass(frozen=True)
class Place:
    """Where an index is or is to be: a group in a store."""

    store: Store
    path: str
    zarr_format: int

    def __str__(self) -> str:
        return str(StorePath(self.store, self.path))

    def other(self, suffix: str) -> "Place":
        """Return the place beside it."""
        return Place(self.store, f"{self.path}{suffix}" if self.path else suffix.strip("_"), self.zarr_format)


def array_name(array: Any) -> str:
    """Return the last part of an array's path: empty at the root of a store whose place in a tree is unknown."""
    return split(array)[1]


def split(array: Any) -> tuple[StorePath | None, str]:
    """Return the group that an array may be in, None if the store cannot tell, and its name in that group."""
    store, path = array.store_path.store, array.store_path.path
    if path:
        parent, _, name = path.rpartition("/")
        return StorePath(store, parent), name
    if isinstance(store, LocalStore):  # opened by its own path: what is beside it may still be a group
        root = store.root.absolute()
        return StorePath(LocalStore(root.parent, read_only=store.read_only)), root.name
    if isinstance(store, FsspecStore) and "/" in store.path.strip("/"):
        parent, _, name = store.path.rstrip("/").rpartition("/")
        return StorePath(FsspecStore(store.fs, read_only=store.read_only, path=parent)), name
    return None, ""


def beside(array: Any) -> Place | None:
    """Return where the index of an array is unless told otherwise, None if nothing can be beside the array."""
    parent, name = split(array)
    if parent is None or not name:
        return None
    path = f"{parent.path}/{name}{SUFFIX}" if parent.path else f"{name}{SUFFIX}"
    return Place(parent.store, path, array.metadata.zarr_format)


def given(location: Any, zarr_format: int, options: Mapping[str, Any] | None = None, *, write: bool = False) -> Place:
    """Return an index place that the user gave: a group, store or path as `zarr.open_group` takes."""
    if isinstance(location, zarr.Group | zarr.Array | StorePath):
        path = location if isinstance(location, StorePath) else location.store_path
        return Place(path.store, path.path, zarr_format)
    text = str(location) if isinstance(location, Path) else location
    mode: Mode = "a" if write or isinstance(text, Store) and not text.read_only else "r"
    try:
        path = sync(make_store_path(text, mode=mode, storage_options=storage_options(text, options)))
    except FileNotFoundError as error:
        raise LabelIndexError(f"{location}: no label index there ({error})") from None
    return Place(path.store, path.path, zarr_format)


def check_parent(array: Any) -> None:
    """Raise LabelIndexError unless the array lies in a group, where an index can be its sibling."""
    parent, name = split(array)
    if parent is not None and name:
        node = "zarr.json" if array.metadata.zarr_format == 3 else ".zgroup"
        if array.store_path.path or sync((parent / node).exists()):
            return
    raise LabelIndexError(
        f"array {array.store_path} is at the root of its store, where nothing can be beside it; give the index another "
        "place (consolidate_labels(array, index=...)), or scan the headers (open_labels(array, scan=True))"
    )


class Counter:
    """Requests made of a store, and the bytes that came."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0


class CountingStore(WrapperStore[Store]):
    """A store that counts what is read of it."""

    def __init__(self, store: Store, counter: Counter | None = None) -> None:
        super().__init__(store)
        self.counter = counter or Counter()

    def _with_store(self, store: Store) -> "CountingStore":
        return type(self)(store, self.counter)

    async def get(self, key: str, prototype: Any, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a value, or part of it."""
        if byte_range is None and isinstance(self._store, FsspecStore):
            byte_range = WHOLE
        data = await read_part(self._store, key, prototype, byte_range)
        self.counter.requests += 1
        self.counter.bytes += 0 if data is None else len(data)
        return data


def counted(array: Any, counter: Counter) -> Any:
    """Return the same array, reading through a counter, as an AsyncArray."""
    path = array.store_path
    store = path.store._store if isinstance(path.store, CountingStore) else path.store
    return zarr.AsyncArray(array.metadata, StorePath(CountingStore(store, counter), path.path))
