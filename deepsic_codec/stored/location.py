"""Open arrays in any store, find where their index belongs, and count reads."""

import json
import lzma
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath, WrapperStore, ZipStore

from deepsic_codec._compat import Buffer, array_config, make_store_path, read_part, sync
from deepsic_codec.errors import (
    ConfigurationError,
    DeepSICError,
    LabelIndexError,
    MissingPackage,
    SourceError,
    UnsupportedArray,
    WriteError,
    did_you_mean,
)
from deepsic_codec.require import require
from deepsic_codec.stored.layout import StoredLayout

SUFFIX = "_labels"  # of the group beside an array that has its index
MAX_NAMES = 10  # of a message
CONNECTIONS = 128  # to S3 at once; botocore's default of 10 makes a scan ten times slower

# s3fs asks for the size of an object before it reads all of it, but not before it reads a part. Stores clip a range
# that is too long.
WHOLE = RangeByteRequest(0, 1 << 40)

Mode = Literal["r", "r+", "a"]


def url_of(path: StorePath) -> str:
    """Return where a node is, as users write it: a path, or a URL such as s3://bucket/survey.zarr/image."""
    store = path.store
    while isinstance(store, WrapperStore):
        store = store._store
    if not isinstance(store, FsspecStore):
        return str(StorePath(store, path.path)).removeprefix("file://")
    inside = "/".join(part for part in (store.path.rstrip("/"), path.path) if part)
    url: str = getattr(store.fs, "sync_fs", store.fs).unstrip_protocol(inside)
    return url


def is_deepsic(node: Any) -> bool:
    """Tell whether `node` is an array whose chunks are payloads of DeepSIC."""
    if not isinstance(node, zarr.Array):
        return False
    try:
        StoredLayout(node)
    except DeepSICError:
        return False
    return True


#: What zarr and Python raise for damaged metadata, and codecs for damaged chunks.
DAMAGED = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(lzma.LZMAError, zlib.error),
)


@contextmanager
def metadata_errors(what: Any, kind: type[DeepSICError] = UnsupportedArray, detail: str = "") -> Iterator[None]:
    """Raise a typed error in place of those in `DAMAGED`; its text begins with a location and a detail."""
    try:
        yield
    except (DeepSICError, OSError):  # some errors of zarr are both FileNotFoundError and ValueError
        raise
    except DAMAGED as error:
        what = url_of(what) if isinstance(what, StorePath) else what
        text = f"{what}: {detail}the metadata or data cannot be read ({type(error).__name__}: {error})"
        raise kind(text) from error


# Packages whose errors a store raises as they are: an address, a network, or credentials do not work.
REMOTE_PACKAGES = {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "requests"}


@contextmanager
def remote_errors(location: Any, *, write: bool = False) -> Iterator[None]:
    """Raise typed errors that name a URL and say what to do, in place of those of the packages that reach it.

    Raises
    ------
    MissingPackage
        If a package is missing that reads such URLs.
    ConfigurationError
        If no package reads them.
    SourceError, WriteError
        If the store cannot be read, or written to with `write`.
    """
    try:
        yield
    except DeepSICError:
        raise
    except Exception as error:
        url = url_of(location) if isinstance(location, StorePath) else str(location)
        if "://" not in url or url.startswith("file://"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ImportError):
            package = re.search(r"[Ii]nstall (\w+)", text)
            advice = f"run pip install {package[1]}" if package else "install the package that reads it"
            raise MissingPackage(f"{url}: {text}; {advice}") from error
        if isinstance(error, ValueError) and "rotocol not known" in text:
            from fsspec.registry import known_implementations

            protocol = url.partition("://")[0]
            similar = did_you_mean(protocol, known_implementations) or "; expected s3://, gs://, https:// or a path"
            raise ConfigurationError(f"{url}: no file system is called {protocol}{similar}") from error
        if isinstance(error, FileNotFoundError) and not write:
            raise  # who opens a node says what is missing
        raised_by = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError | NotImplementedError) and raised_by not in REMOTE_PACKAGES:
            raise
        advice = "check the address, the network and the credentials (storage_options)"
        kind: type[DeepSICError] = SourceError
        if write:
            advice, kind = f"{advice}, and whether its store can be written to", WriteError
        what = f"cannot be {'written' if write else 'read'} ({type(error).__name__}: {text})"
        raise kind(f"{url}: {what}; {advice}") from error


def members(group: zarr.Group) -> list[tuple[str, Any]]:
    """Return paths and nodes of all members of a group, those of its groups included, ordered by path.

    Raises
    ------
    UnsupportedArray
        If the metadata of one of them cannot be read.
    """
    with metadata_errors(group.store_path):
        nodes = sorted(group.members(max_depth=None), key=lambda member: member[0])
        return [(path, _checked(node)) for path, node in nodes]


def listed(names: Sequence[str]) -> str:
    """Return names as text, of more than 10 the first ones and the number of the others."""
    others = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {others:,} more" if others > 0 else "")


def _existing_arrays(path: StorePath, name: str) -> str:
    """Return the end of a message about an array that does not exist: those of its group, if the store can list."""
    try:
        group = zarr.open_group(path, mode="r" if path.store.read_only else "r+")
        names = [one for one, node in members(group) if is_deepsic(node)]
    except Exception:  # each store has errors of its own
        return ""
    similar = did_you_mean(name, names) if len(names) > MAX_NAMES else ""
    return similar or (f"; it has {listed(names)}" if names else "")


def _open_member(path: StorePath, mode: Mode, **kwargs: Any) -> Any:
    """Open an array, or else a group, such as that of a pyramid; an array takes no more requests than needed."""
    try:
        return zarr.open_array(path, mode=mode, **kwargs)
    except (FileNotFoundError, *DAMAGED):
        with suppress(FileNotFoundError, *DAMAGED):
            return zarr.open_group(path, mode="r" if mode == "r" else "r+", **kwargs)
        raise


def _checked(node: Any) -> Any:
    """Return a node, once it is sure that its attributes are a dict, which zarr does not check."""
    if not isinstance(node.metadata.attributes, Mapping):
        raise TypeError(f"attributes: expected an object, got {node.metadata.attributes!r:.80}")
    return node


def fsspec_options(source: Any, options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return options for fsspec that allow many requests at once to S3, unless the user set their number."""
    if not (isinstance(source, str) and source.startswith(("s3://", "s3a://"))):
        return None if options is None else dict(options)
    require("s3", "s3fs")
    result = dict(options or {})
    result["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **result.get("config_kwargs", {})}
    return result


class Counter:
    """Number of requests to a store, and of bytes that it returned."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0


class CountingStore(WrapperStore[Store]):
    """A store that counts the reads of the store that it wraps."""

    def __init__(self, store: Store, counter: Counter | None = None) -> None:
        super().__init__(store)
        self.wrapped = store
        self.counter = counter or Counter()

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self.counter)

    async def get(self, key: str, prototype: Any, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a value, or part of it."""
        if byte_range is None and isinstance(self.wrapped, FsspecStore):
            byte_range = WHOLE
        data = await read_part(self.wrapped, key, prototype, byte_range)
        self.counter.requests += 1
        self.counter.bytes += 0 if data is None else len(data)
        return data


def counting_array(array: Any, counter: Counter) -> zarr.AsyncArray[Any]:
    """Return an array that reads through a counter, for any array of Zarr."""
    path = array.store_path
    store = path.store.wrapped if isinstance(path.store, CountingStore) else path.store
    return zarr.AsyncArray(array.metadata, StorePath(CountingStore(store, counter), path.path))


def open_node(
    source: Any,
    name: str | None = None,
    *,
    mode: Mode = "r",
    options: Mapping[str, Any] | None = None,
    counter: Counter | None = None,
    **kwargs: Any,
) -> Any:
    """Open an array or group.

    Parameters
    ----------
    source
        An array or group of Zarr, or what `zarr.open` takes.
    name : str, optional
        Path of an array in the group, or of a group in it.
    mode : {"r", "r+", "a"}
        As for `zarr.open`.
    options : dict, optional
        `storage_options` for a URL.
    counter : Counter, optional
        Counts what opening reads.
    **kwargs
        More for `zarr.open`.

    Raises
    ------
    UnsupportedArray
        If there is no such node.
    """
    if isinstance(source, zarr.Array | zarr.Group):
        if name is None:
            return source
        with metadata_errors(source.store_path):
            if not isinstance(source, zarr.Group) or name not in source:
                others = _existing_arrays(source.store_path, name)
                raise UnsupportedArray(f"{url_of(source.store_path)} has no array {name!r}{others}")
            return _checked(source[name])
    options = fsspec_options(source, options)
    source = str(source) if isinstance(source, Path) else source
    if mode != "r":
        refuse_zip_path(source)
    elif is_zip_path(source) and Path(source).is_file():
        source = ZipStore(source, mode="r")  # zarr itself takes the path for that of a folder
    if isinstance(source, Store) and mode == "r" and not source.read_only:
        mode = "r+"  # "r" would reopen the store, which a zip file being written cannot bear
    try:
        with remote_errors(source):
            path = sync(make_store_path(source, path=name or "", mode=mode, storage_options=options))
        store = path.store
        counting = StorePath(CountingStore(store, counter), path.path)
        # With a name straight to the array: the group need not be looked at, which saves requests.
        with metadata_errors(path), remote_errors(path):
            node = _checked((zarr.open if name is None else _open_member)(counting, mode=mode, **kwargs))
    except FileNotFoundError as error:
        if name is None and isinstance(source, str) and Path(source).is_file():
            text = "is a file, not an array or group of Zarr; store images with deepsic ingest"
            raise UnsupportedArray(f"{source} {text}") from None
        if name is None:
            what = url_of(path) if isinstance(source, Store) else source
            raise UnsupportedArray(f"{what} has no array or group of Zarr; check the location") from error
        group = StorePath(path.store, path.path.removesuffix(name).rstrip("/"))
        raise UnsupportedArray(f"{source} has no array {name!r}{_existing_arrays(group, name)}") from None
    # What is read later is not counted here.
    path = StorePath(store, node.store_path.path)
    if isinstance(node, zarr.Group):
        return zarr.Group(zarr.AsyncGroup(node.metadata, path))
    return zarr.Array(zarr.AsyncArray(node.metadata, path))


def to_store_path(location: Any, options: Mapping[str, Any] | None = None, *, write: bool = False) -> StorePath:
    """Return the path in a store that a user named: a node, store or path as `zarr.open_group` takes.

    `options` are `storage_options` for a URL; `write` opens the store for writing, with an absolute path for workers
    that are in another folder. Raises FileNotFoundError if there is no such store, and ConfigurationError for the path
    of a zip file that is to be written to.
    """
    if isinstance(location, zarr.Group | zarr.Array):
        location = location.store_path
    if isinstance(location, StorePath):
        return _absolute(location) if write else location
    source = str(location) if isinstance(location, Path) else location
    if write:
        refuse_zip_path(source)
    elif is_zip_path(source) and Path(source).is_file():
        source = ZipStore(source, mode="r")
    mode: Mode = "a" if write or isinstance(source, Store) and not source.read_only else "r"
    with remote_errors(source, write=write):
        path = sync(make_store_path(source, mode=mode, storage_options=fsspec_options(source, options)))
    return _absolute(path) if write else path


# File systems of fsspec that keep in this process what they write, or that write their file when it is closed.
_PROCESS_BOUND = {"memory", "zip", "tar", "libarchive", "reference", "cached", "blockcache", "filecache", "simplecache"}


def is_process_bound(store: Any) -> bool:
    """Tell whether only this process can write to a store: what another one writes to its copy is lost."""
    if isinstance(store, MemoryStore | ZipStore):
        return True
    if isinstance(store, FsspecStore):
        return _is_bound_file_system(store.fs)
    if type(store).__module__.partition(".")[0] == "icechunk":
        return True  # a session in another process has changes of its own
    if isinstance(store, WrapperStore):
        return is_process_bound(store._store)
    inner = getattr(store, "store", None)  # of obstore
    return type(inner).__name__ == "MemoryStore"


def _is_bound_file_system(fs: Any) -> bool:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    inner = getattr(fs, "sync_fs", None) or getattr(fs, "fs", None)  # of adapters
    return bool(protocols & _PROCESS_BOUND) or (hasattr(inner, "protocol") and _is_bound_file_system(inner))


def with_absolute_path(array: zarr.Array) -> zarr.Array:
    """Return an array whose local path means the same folder in every process."""
    path = _absolute(array.store_path)
    return array if path is array.store_path else zarr.Array(zarr.AsyncArray(array.metadata, path, array_config(array)))


def _absolute(path: StorePath) -> StorePath:
    store = path.store
    if not isinstance(store, LocalStore) or store.root.is_absolute():
        return path
    return StorePath(LocalStore(store.root.absolute(), read_only=store.read_only), path.path)


def is_zip_path(source: Any) -> bool:
    """Tell whether a user's location is the path of a zip file, which zarr would take for that of a folder."""
    path = str(source) if isinstance(source, str | Path) else ""
    return path.lower().endswith(".zip") and "://" not in path and not Path(path).is_dir()


def refuse_zip_path(source: Any) -> None:
    """Raise ConfigurationError for the path of a zip file that is to be written to."""
    if is_zip_path(source):
        raise ConfigurationError(
            f"{source}: a zip file cannot be changed by its path; write to a folder and zip it, or pass "
            "zarr.storage.ZipStore(path, mode='w') and close it at the end"
        )


def parent_and_name(path: StorePath) -> tuple[StorePath | None, str]:
    """Return the group that a node may be in, None if the store cannot tell, and the name of the node in it."""
    store = path.store
    if path.path:
        parent, _, name = path.path.rpartition("/")
        return StorePath(store, parent), name
    if isinstance(store, LocalStore):  # opened by the path of the node: the folder around it may still be a group
        root = store.root.absolute()
        return StorePath(LocalStore(root.parent, read_only=store.read_only)), root.name
    if isinstance(store, FsspecStore) and "/" in store.path.strip("/"):
        parent, _, name = store.path.rstrip("/").rpartition("/")
        return StorePath(FsspecStore(store.fs, read_only=store.read_only, path=parent)), name
    return None, ""


def is_in_group(path: StorePath, zarr_format: int) -> bool:
    """Tell whether a node lies in a group, where other nodes can be its siblings; may take one request."""
    parent, name = parent_and_name(path)
    if parent is None or not name:
        return False
    return bool(path.path) or sync((parent / ("zarr.json" if zarr_format == 3 else ".zgroup")).exists())


def refresh_consolidated(path: StorePath, zarr_format: Any, *, create: bool = False) -> None:
    """Write the consolidated metadata of the groups around a node again, where there are any.

    With `create`, the group of the node gets them in format 2, which specifies them. Failures leave them as they are.
    """
    parent, _ = parent_and_name(path)
    while parent is not None:
        with suppress(DeepSICError, OSError, NotImplementedError, ValueError):
            if _is_consolidated(parent, zarr_format) or (create and zarr_format == 2):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that format 3 does not specify it
                    zarr.consolidate_metadata(parent.store, path=parent.path or None, zarr_format=zarr_format)
        create = False
        parent = StorePath(parent.store, parent.path.rpartition("/")[0]) if parent.path else None


def _is_consolidated(group: StorePath, zarr_format: int) -> bool:
    if not getattr(group.store, "supports_consolidated_metadata", True):
        return False
    if zarr_format == 2:
        return sync((group / ".zmetadata").exists())
    data = sync((group / "zarr.json").get())
    return data is not None and bool(json.loads(data.to_bytes()).get("consolidated_metadata"))


@dataclass(frozen=True)
class IndexLocation:
    """Where a label index is or is to be: a group in a store."""

    store: Store
    path: str
    zarr_format: int

    def __str__(self) -> str:
        return url_of(StorePath(self.store, self.path))

    @classmethod
    def sibling_of(cls, array: Any, *, check: bool = False) -> "IndexLocation":
        """Return the location beside an array, where its index is by default; LabelIndexError if there can be none.

        With `check`, look whether the array lies in a group, as is needed to write an index; may take one request.
        """
        parent, name = parent_and_name(array.store_path)
        zarr_format = array.metadata.zarr_format
        if parent is None or not name or check and not is_in_group(array.store_path, zarr_format):
            raise LabelIndexError(
                f"array {url_of(array.store_path)} is at the root of its store, so no index can be beside it; pass "
                "another location (consolidate_labels(array, index=...)), or scan the headers "
                "(open_labels(array, scan=True))"
            )
        path = f"{parent.path}/{name}{SUFFIX}" if parent.path else f"{name}{SUFFIX}"
        return cls(parent.store, path, zarr_format)

    @classmethod
    def from_user(
        cls, location: Any, zarr_format: int, options: Mapping[str, Any] | None = None, *, write: bool = False
    ) -> "IndexLocation":
        """Return the location that a user named, as `to_store_path` does; LabelIndexError if there is no such store."""
        try:
            path = to_store_path(location, options, write=write)
        except FileNotFoundError as error:
            raise LabelIndexError(f"{location}: no label index ({error}); run consolidate_labels") from None
        return cls(path.store, path.path, zarr_format)

    def child(self, name: str) -> "IndexLocation":
        """Return the location of a group in the group at this one."""
        return IndexLocation(self.store, f"{self.path}/{name}" if self.path else name, self.zarr_format)

    def key(self, name: str) -> str:
        """Return the key of a document of the group, such as zarr.json."""
        return f"{self.path}/{name}" if self.path else name
