"""What a stranger can put into metadata, label indexes, queries and names, for `benchmarks.fuzz` and the tests.

Each function runs one case and returns what came of it; an error that is no `DeepSICError` is a fault of the package.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from deepsic_codec import consolidate_labels, open_archive, open_labels
from deepsic_codec._compat import default_buffer_prototype
from deepsic_codec.errors import DeepSICError, ExpressionError
from deepsic_codec.io.info import describe
from deepsic_codec.io.sources import RESERVED, ArrayNames
from deepsic_codec.labels.expression import parse
from deepsic_codec.labels.index import ATTRIBUTE
from deepsic_codec.labels.query import Labels

# Shares of operations that write an index, which takes eight to thirty times as long as others.
SHARES = {"repair": 0.05, "again": 0.15, "scan": 0.2}
METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    1 << 64,
    1e308,
    0.5,
    "",
    "x",
    "0" * 64,
    [],
    [0],
    [-1] * 3,
    {},
    {"x": 1},
)
WORDS = (
    "Class0",
    "unknown",
    "&",
    "|",
    "~",
    "(",
    ")",
    ">",
    ">=",
    "<",
    "0.5",
    "1e400",
    "9" * 200,
    "%",
    "'",
    '"',
    "\ud800",
    "\0",
    "and",
    "=",
)
PARTS = (
    "a",
    "a_labels",
    "zarr.json",
    "ZARR.json",
    ".zarray",
    ".",
    "..",
    "__a",
    "a\\b",
    "deepsic-model-1",
    "a-png",
    "\x1b[2J",
    "",
)


def random_expression(rng: np.random.Generator) -> str:
    """Return a text that may be an expression: one with a few changes, words in a row, or one word many times."""
    style = rng.random()
    if style < 0.1:
        words = [rng.choice(WORDS[2:8])] * int(rng.integers(1, 600))
    elif style < 0.3:
        words = rng.choice(np.array(WORDS, object), rng.integers(0, 40)).tolist()
    else:
        words = _expression(rng, int(rng.integers(7)))
        for _ in range(int(rng.integers(4) * (style > 0.6))):
            place = int(rng.integers(len(words)))
            words[place : place + int(rng.integers(2))] = [rng.choice(WORDS)]
    return str(rng.choice(["", " "])).join(map(str, words))


def _expression(rng: np.random.Generator, depth: int) -> list[str]:
    """Return the words of an expression."""
    style = int(rng.integers(5)) if depth else 4
    if style == 0:
        return ["~", *_expression(rng, depth - 1)]
    if style == 1:
        return ["(", *_expression(rng, depth - 1), ")"]
    if style < 4:
        return [*_expression(rng, depth - 1), str(rng.choice(["&", "|"])), *_expression(rng, depth - 1)]
    name = str(rng.choice(["Class0", "Class1", "unknown", "'Class2'", "Class99"]))
    number = str(rng.choice(["0", "0.5", "20%", "1", "1e-300", "0.50196078431372548", "-1", "2"]))
    comparison = str(rng.choice([">", ">=", "<", "<="]))
    if rng.random() < 0.9:
        name = name.replace("99", "0")
    return [[name], [name, comparison, number], [number, comparison, name]][int(rng.integers(3))]


def run_expression(text: str, labels: Labels) -> str:
    """Parse and evaluate a text."""
    try:
        expression = parse(text)
        again = parse(str(expression))
    except ExpressionError:
        return "refused"
    try:
        counts = {labels.where(one).count for one in (text, expression, again)}
    except ExpressionError:
        return "refused by the vocabulary"
    assert len(counts) == 1, f"{expression} has other matches than {text!r}"
    return "evaluated"


def random_names(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return names and suffixes of files."""
    count = rng.integers(1, 8)
    return [
        ("/".join(rng.choice(PARTS, rng.integers(1, 4))), str(rng.choice(["png", "tif", ""]))) for _ in range(count)
    ]


def run_names(sources: list[tuple[str, str]]) -> str:
    """Name arrays after files, and check that each has a place of its own."""
    names = ArrayNames()
    chosen = [names.choose(*source) for source in sources]
    for name in chosen:
        for part in name.split("/"):
            assert part.strip(".") and part.lower() not in RESERVED and "\\" not in part, name
            assert not part.startswith(("__", "deepsic-model")) and not part.endswith("_labels"), name
        assert not any(other.startswith(f"{name}/") for other in chosen), f"{name} would have arrays within it"
    assert len({*chosen}) == len(chosen), chosen
    return "named"


def random_change(rng: np.random.Generator, store: MemoryStore, keys: str = "") -> dict[str, Any]:
    """Choose another value for one place of one of the JSON documents of a store."""
    key = str(rng.choice([key for key in document_keys(store) if keys in key]))
    paths = [path for path in places(document(store, key)) if path] or [()]
    change: dict[str, Any] = {"key": key, "path": paths[rng.integers(len(paths))]}
    number = int(rng.integers(len(VALUES) + 1))
    return change if number == len(VALUES) else {**change, "value": VALUES[number]}


def changed(store: MemoryStore, change: dict[str, Any]) -> MemoryStore:
    """Return a copy of a store with a change of `random_change`."""
    key = change["key"]
    return changed_store(store, key, with_value(document(store, key), tuple(change["path"]), change.get("value", ...)))


def random_metadata(rng: np.random.Generator, store: MemoryStore, keys: str = "") -> MemoryStore:
    """Return a copy of a store with another value in one place of one of its JSON documents."""
    return changed(store, random_change(rng, store, keys))


def document_keys(store: MemoryStore) -> list[str]:
    """Return the keys of the JSON documents of a store."""
    return [key for key in sorted(store._store_dict) if key.rpartition("/")[2] in METADATA]


def document(store: MemoryStore, key: str) -> Any:
    """Return a JSON document of a store."""
    return json.loads(store._store_dict[key].to_bytes())


def documents(store: MemoryStore) -> dict[str, Any]:
    """Return the JSON documents of a store by key."""
    return {key: document(store, key) for key in document_keys(store)}


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values in a JSON document."""
    yield path
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*path, key))


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a document with another value in one place; `...` leaves the place out."""
    if not path:
        return None if value is ... else value
    copy = document.copy()
    if value is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = with_value(document[path[0]], path[1:], value)
    return copy


def changed_store(store: MemoryStore, key: str, value: Any) -> MemoryStore:
    """Return a copy of a store with another JSON document."""
    buffer = default_buffer_prototype().buffer.from_bytes(json.dumps(value).encode())
    return MemoryStore({**store._store_dict, key: buffer})


def operations(store: MemoryStore, name: str = "image") -> dict[str, Callable[[], Any]]:
    """Return what is tried on an archive whose metadata or index is of a stranger."""

    def read() -> None:
        array = open_archive(store, name)
        if prod(array.shape) <= 1 << 20:
            array[...]

    def query() -> None:
        labels = open_labels(store, name)
        labels.where("unknown > 0.2").count  # noqa: B018
        labels.summary()

    return {
        "read": read,
        "labels": query,
        "scan": lambda: open_labels(store, name, scan=True).summary(),
        "describe": lambda: describe(store),
        "describe array": lambda: describe(store, name),
    }


def run_metadata(store: MemoryStore, name: str = "image") -> dict[str, Exception]:
    """Open, read, query and describe an archive; return the errors that are not typed, by operation."""
    errors = {}
    for operation, run in operations(store, name).items():
        try:
            run()
        except DeepSICError:
            pass
        except Exception as error:
            errors[operation] = error
    return errors


def version_of(store: MemoryStore, name: str = "image") -> str:
    """Return the path of the current version of the index of an array."""
    index = f"{name}_labels"
    if f"{index}/zarr.json" in store._store_dict:
        attributes = document(store, f"{index}/zarr.json")["attributes"]
    else:
        attributes = document(store, f"{index}/.zattrs")
    return f"{index}/{attributes[ATTRIBUTE]['current']}"


def random_operation(rng: np.random.Generator, names: Iterable[str]) -> str:
    """Choose one of some operations by their shares."""
    names = list(names)
    shares = np.array([SHARES.get(name, 1.0) for name in names])
    return str(rng.choice(names, p=shares / shares.sum()))


def random_array(rng: np.random.Generator, store: MemoryStore) -> dict[str, Any]:
    """Choose other values, and now and then another shape, dtype or chunks, for one array of a label index."""
    path = version_of(store)
    keys = [key for key in document_keys(store) if key.startswith(f"{path}/") and key.count("/") == 3]
    name = str(rng.choice(sorted({key.split("/")[2] for key in keys})))
    about = document(store, next(key for key in keys if key.split("/")[2:] in ([name, "zarr.json"], [name, ".zarray"])))
    shape, dtype = about["shape"], np.dtype(about["data_type" if "data_type" in about else "dtype"])
    style = rng.random()
    if style < 0.05:
        return {"member": name}
    if style < 0.2 and shape:
        shape[rng.integers(len(shape))] = int(rng.choice([0, 1, 2, 3, 100]))
    elif style < 0.25:
        shape = [*shape, 1] if style < 0.23 else shape[1:]
    chunks = [max(1, n) for n in shape]
    if style > 0.9 and chunks:
        chunks[rng.integers(len(chunks))] = int(rng.choice([1, 2, 3, 1000]))
    if style > 0.7:
        dtype = np.dtype(str(rng.choice(["u1", "i1", "u2", "u4", "i8", "u8", "f4", "f8", "?"])))
    values = rng.integers(0, 256, max(1, prod(shape)) * dtype.itemsize, dtype=np.uint8)
    if dtype.itemsize == 1 and rng.random() < 0.7:  # sources and scores that mean something
        values = rng.choice(np.array([0, 1, 2, 3, 127, 128, 255], np.uint8), values.size)
    if dtype == np.bool_:
        values &= 1
    return {"member": name, "shape": shape, "chunks": chunks, "dtype": dtype.str, "values": values.tobytes().hex()}


def with_array(store: MemoryStore, change: dict[str, Any]) -> MemoryStore:
    """Return a copy of a store with an array of a label index as in a change of `random_array`, or without it."""
    store = MemoryStore(dict(store._store_dict))
    path = version_of(store)
    index, version = path.split("/")
    key = f"{path}/{change['member']}/"
    for old in [old for old in store._store_dict if old.startswith(key) or old == f"{path}/.zmetadata"]:
        del store._store_dict[old]
    group = zarr.open_group(store, path=path, mode="r+", use_consolidated=False)
    if "shape" in change:
        dtype, shape = np.dtype(change["dtype"]), tuple(change["shape"])
        array = group.create_array(change["member"], shape=shape, chunks=tuple(change["chunks"]), dtype=dtype)
        values = np.frombuffer(bytes.fromhex(change["values"]), dtype)
        if prod(shape):
            array[...] = values[: prod(shape)].reshape(shape)
    metadata = f"{index}/zarr.json"
    if metadata not in store._store_dict:
        return store
    # As its writer would: the group of the index has the metadata of all arrays.
    index_document = document(store, metadata)
    members = index_document["attributes"][ATTRIBUTE]["metadata"]["consolidated_metadata"]["metadata"]
    members.pop(change["member"], None)
    if "shape" in change:
        members[change["member"]] = document(store, f"{key}zarr.json")
    return changed_store(store, metadata, index_document)


def index_operations(store: MemoryStore, name: str = "image") -> dict[str, Callable[[], str]]:
    """Return what is tried on an archive whose label index is of a stranger; each returns what came of it."""

    def summary() -> str:
        about = open_labels(store, name).summary()
        assert min(about["classes"].values()) >= 0
        assert max(about["classes"].values()) <= about["chunks"]
        return "summarised"

    def select(verify: Any) -> str:
        labels = open_labels(store, name)
        for text in ("Class0 > 0.2 & ~unknown", "Class1 | Class2 < 0.7"):
            selection = labels.where(text, tiles=True, verify=verify)
            assert selection.mask.shape == labels.geometry.grid
            assert selection.count == len(selection.chunks)
            assert len(selection.regions) == len(selection.tiles) == len(selection.straddling)
        return "queried"

    def fetch() -> str:
        array = open_archive(store, name)[...]
        for match in open_labels(store, name).where("Class0 > 0.2").iter_arrays():
            assert np.array_equal(match.array, array[match.region])
        return "fetched"

    def draw() -> str:
        labels = open_labels(store, name)
        values = labels.map("Class0")
        assert values.dtype == np.float32
        assert np.isnan(values).any() or (values.min() >= 0 and values.max() <= 1)
        return "drawn"

    def rewritten() -> str:
        labels = open_labels(store, name)
        assert labels.rewritten().shape == labels.stored.grid
        return "compared"

    def repair() -> str:
        truth = open_labels(store, name, scan=True).summary()
        labels = consolidate_labels(store, name, keep=False)
        assert labels.summary() == truth == open_labels(store, name).summary()
        assert not labels.rewritten().any()
        return "repaired"

    def again() -> str:
        consolidate_labels(store, name).summary()
        return "indexed again"

    return {
        "summary": summary,
        "select": lambda: select("fetched"),
        "verify": lambda: select("all"),
        "fetch": fetch,
        "map": draw,
        "rewritten": rewritten,
        "repair": repair,
        "again": again,
        "describe": lambda: describe(store, name) and "described",
    }
