"""What a stranger can put into metadata, queries and names, for `benchmarks.fuzz` and the tests.

Each function runs one case and returns what came of it; an error that is no `DeepSICError` is a fault of the package.
"""

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from zarr.storage import MemoryStore

from deepsic_codec import open_archive, open_labels
from deepsic_codec._compat import default_buffer_prototype
from deepsic_codec.errors import DeepSICError, ExpressionError
from deepsic_codec.io.info import describe
from deepsic_codec.io.sources import RESERVED, ArrayNames
from deepsic_codec.labels.expression import parse
from deepsic_codec.labels.query import Labels

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
    """Return a text that may be an expression."""
    words = (
        rng.choice(np.array(WORDS, object), rng.integers(0, 40))
        if rng.random() < 0.5
        else [rng.choice(WORDS[2:8])] * 400
    )
    return str(rng.choice(["", " "])).join(map(str, words))


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


def random_metadata(rng: np.random.Generator, store: MemoryStore, keys: str = "") -> MemoryStore:
    """Return a copy of a store with another value in one place of one of its JSON documents."""
    chosen = {key: document for key, document in documents(store).items() if keys in key}
    key = str(rng.choice(list(chosen)))
    paths = [path for path in places(chosen[key]) if path]
    value = (*VALUES, ...)[rng.integers(len(VALUES) + 1)]
    return changed_store(store, key, with_value(chosen[key], paths[rng.integers(len(paths))], value))


def documents(store: MemoryStore) -> dict[str, Any]:
    """Return the JSON documents of a store by key."""
    data = store._store_dict
    return {key: json.loads(data[key].to_bytes()) for key in sorted(data) if key.rpartition("/")[2] in METADATA}


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


def changed_store(store: MemoryStore, key: str, document: Any) -> MemoryStore:
    """Return a copy of a store with another JSON document."""
    buffer = default_buffer_prototype().buffer.from_bytes(json.dumps(document).encode())
    return MemoryStore({**store._store_dict, key: buffer})


def run_metadata(store: MemoryStore, name: str = "image") -> dict[str, Exception]:
    """Open, read, query and describe an archive; return the errors that are not typed, by operation."""

    def read() -> None:
        array = open_archive(store, name)
        if prod(array.shape) <= 1 << 20:
            array[...]

    def query() -> None:
        labels = open_labels(store, name)
        labels.where("unknown > 0.2").count  # noqa: B018
        labels.summary()

    operations = {
        "read": read,
        "labels": query,
        "scan": lambda: open_labels(store, name, scan=True).summary(),
        "describe": lambda: describe(store),
        "describe array": lambda: describe(store, name),
    }
    errors = {}
    for operation, run in operations.items():
        try:
            run()
        except DeepSICError:
            pass
        except Exception as error:
            errors[operation] = error
    return errors
