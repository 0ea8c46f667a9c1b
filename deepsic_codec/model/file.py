"""Model files: one ``.safetensors`` with weights, integer tables, vocabulary and description.

A model has two identities, both SHA-256 over named tensors and their description: the
*decoder* (integer prior, coder tables, gains, synthesis: all that decoding needs) and the
*head* (semantic head and vocabulary).  The analysis transform belongs to neither, so a
better encoder writes the same format.  Finding a model and reading its vocabulary needs
neither torch nor the weights, only the file's JSON header.

A file may come from anywhere, since archives carry models, and so nothing in it is believed: a
description claims no more than the tensors beside it hold, the tensors fill the file exactly,
and no byte of them is used before the identities are found to be right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from deepsic_codec.errors import ModelMismatch, ModelNotFound

#: Directories or files to look in besides the package, separated as in PATH.
SEARCH_VARIABLE = "DEEPSIC_MODEL_PATH"
PACKAGED = Path(__file__).resolve().parent.parent / "models"
#: Folder for models that archives brought along (``embed.py``); ``~/.cache/deepsic_codec`` if it is not set.
CACHE_VARIABLE = "DEEPSIC_CACHE"
#: A description is a few kilobytes; a header beyond this is no model of ours.
MAX_HEADER = 1 << 20
#: Weights of a few million parameters; a file beyond this is refused before it is read.
MAX_FILE = 1 << 28
#: Far more than any model has; they bound what a header makes a reader do.
MAX_TENSORS, MAX_DIMENSIONS, MAX_SIZES, MAX_SIZE = 1 << 12, 8, 64, 1 << 16
#: A class number is one byte, and 255 means none.
MAX_CLASSES, MAX_NAME = 255, 256
#: What tensors may be made of, by the names of the safetensors format.
DTYPES = {
    "I8": "<i1",
    "U8": "<u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
}
PARTS = ("decoder.", "head.", "encoder.")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Vocabulary:
    """What a semantic head can name.

    Attributes
    ----------
    classes : tuple of str
        Names, in the order of the head's scores; the score after the last is *unknown*.
    parents : dict of str to tuple of str
        Broader names and the classes they stand for (the paper's WordTree idea).
    """

    classes: tuple[str, ...]
    parents: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Classes and, last, ``unknown``: one name per score."""
        return (*self.classes, "unknown")

    def parents_among(self, classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Broader names whose classes are all among these."""
        known = set(classes)
        return {name: below for name, below in self.parents.items() if known.issuperset(below)}

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, as in model files and array attributes."""
        return {"classes": list(self.classes), "parents": {k: list(v) for k, v in self.parents.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Vocabulary:
        """Inverse of :meth:`to_json`."""
        return cls(tuple(data["classes"]), {k: tuple(v) for k, v in data.get("parents", {}).items()})


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of itself.

    Attributes
    ----------
    name : str
        Such as ``base``.
    path : str
        Where the file lies.
    decoder, head : str
        The two identities, 64 hexadecimal digits each.
    vocabulary : Vocabulary
        Names of the head's scores.
    architecture : dict
        Sizes of the networks.
    encoder : str
        SHA-256 of the analysis transform and what else only encodes, empty in older files. No identity, since the
        format does not depend on it: it tells files of one decoder and one head apart.
    """

    name: str
    path: str
    decoder: str
    head: str
    vocabulary: Vocabulary
    architecture: dict[str, Any]
    encoder: str = ""


def identity(arrays: Arrays, prefix: str, description: Mapping[str, Any]) -> str:
    """SHA-256 over a canonical description and all arrays whose name starts with ``prefix``.

    Hashed are: the description as JSON with sorted keys and no spaces, then per array in
    order of names ``name|dtype|shape|`` and the little-endian bytes, all in UTF-8.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(k for k in arrays if k.startswith(prefix)):
        a = np.asarray(arrays[name], order="C")
        digest.update(f"{name}|{a.dtype.newbyteorder('<').str}|{','.join(map(str, a.shape))}|".encode())
        digest.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def identities(arrays: Arrays, architecture: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[str, str]:
    """Decoder and head identity of a model."""
    parts = {k: v for k, v in architecture.items() if not k.startswith(("analysis", "head", "classes"))}
    decoder = identity(arrays, "decoder.", {"architecture": parts})
    sizes = {k: v for k, v in architecture.items() if k.startswith("head")}
    head = identity(arrays, "head.", {"architecture": sizes, "vocabulary": vocabulary.to_json()})
    return decoder, head


def save_model(
    path: str | Path,
    name: str,
    arrays: Arrays,
    architecture: Mapping[str, Any],
    vocabulary: Vocabulary,
    trained: Mapping[str, Any],
) -> ModelInfo:
    """Write a model file.

    Parameters
    ----------
    path : path
        Where to; replaced if it exists.
    name : str
        Name under which :func:`find_model` finds it.
    arrays : dict of str to ndarray
        Named ``decoder.*``, ``head.*`` and ``encoder.*``.
    architecture : mapping
        Sizes of the networks, as JSON.
    vocabulary : Vocabulary
        Names of the head's scores.
    trained : mapping
        How it was trained, for people; not part of an identity.
    """
    decoder, head = identities(arrays, architecture, vocabulary)
    about = {
        "name": name,
        "decoder": decoder,
        "head": head,
        "encoder": identity(arrays, "encoder.", {}),
        "architecture": dict(architecture),
        "vocabulary": vocabulary.to_json(),
        "trained": dict(trained),
    }
    part = Path(path).with_suffix(".part")
    save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, part, {"deepsic": json.dumps(about)})
    part.chmod(0o644)  # safetensors writes files for the owner alone
    os.replace(part, path)
    return read_info(path)


def read_info(path: str | Path) -> ModelInfo:
    """Description of a model file, from its header alone.

    Raises
    ------
    ModelMismatch
        If the file is no model file of this package.
    """
    try:
        with open(path, "rb") as file:
            return _describe(str(path), _read_header(file, os.fstat(file.fileno()).st_size))
    except _NONSENSE as error:
        if isinstance(error, ModelMismatch | OSError):
            raise
        raise ModelMismatch(f"{path}: not a DeepSIC model file ({type(error).__name__}: {error})") from None


def load_arrays(info: ModelInfo) -> Arrays:
    """All arrays of a model file, after verifying both identities.

    Raises
    ------
    ModelMismatch
        If the file is damaged or is not the model that ``info`` describes.
    """
    try:
        with open(info.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size)
            table = _tensor_table(header, size - file.tell())
            data = file.read(size - file.tell())
        _check_claims(_describe(info.path, header), table)
        arrays = {
            name: np.frombuffer(data, dtype, prod(shape), offset).reshape(shape).copy()
            for name, (dtype, shape, offset) in table.items()
        }
    except _NONSENSE as error:
        if isinstance(error, ModelMismatch):
            raise
        raise ModelMismatch(f"{info.path}: damaged model file: {type(error).__name__}: {error}") from None
    found = identities(arrays, info.architecture, info.vocabulary)
    for part, wanted, has in zip(("decoder", "head"), (info.decoder, info.head), found, strict=True):
        if wanted != has:
            raise ModelMismatch(
                f"{info.path}: damaged or altered: its {part} has SHA-256 {has}, expected {wanted}; replace the file"
            )
    # no part of the format, but a damaged encoder would write damaged images; older files do not say
    if info.encoder and info.encoder != identity(arrays, "encoder.", {}):
        raise ModelMismatch(f"{info.path}: damaged or altered: its encoder is not the one that was stored; replace it")
    return arrays


#: What reading a file that is no model can raise. Deep JSON ends in RecursionError.
_NONSENSE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError, OSError)


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """JSON header of a safetensors file of ``size`` bytes, tested before it is read; leaves the file at its tensors."""
    if size > MAX_FILE:
        raise ModelMismatch(f"{file.name}: {size} bytes, more than the {MAX_FILE} that a model may have")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ModelMismatch(f"{file.name}: not a DeepSIC model file (header of {length} bytes in a file of {size})")
    header = _parse(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("a header that is no mapping")
    return header


def _parse(text: str | bytes) -> Any:
    """JSON without what two readers could take for two things: names that are there twice, NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    def never(text: str) -> Any:
        raise ValueError(f"the number {text}")

    return json.loads(text, object_pairs_hook=once, parse_constant=never)


def _describe(path: str, header: Mapping[str, Any]) -> ModelInfo:
    about = _parse(header["__metadata__"]["deepsic"])
    names = [about["name"], about["decoder"], about["head"]]
    if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in names):
        raise ValueError("names and identities have to be short text")
    encoder = about.get("encoder") or ""
    if not all(re.fullmatch(r"[0-9a-f]{64}", identity) for identity in [*names[1:], *([encoder] if encoder else [])]):
        raise ValueError("an identity is no SHA-256")
    vocabulary, architecture = about["vocabulary"], about["architecture"]
    _check_vocabulary(vocabulary)
    _check_description(architecture)
    name, decoder, head = names
    return ModelInfo(name, path, decoder, head, Vocabulary.from_json(vocabulary), dict(architecture), encoder)


def _check_vocabulary(data: Any) -> None:
    """Raise ValueError unless it is lists of at most 255 short names, and parents of them."""
    parents = data.get("parents", {})
    lists = [data["classes"], list(parents), *parents.values()]
    for names in lists:
        if not isinstance(names, list) or len(names) > MAX_CLASSES or len({*names}) < len(names):
            raise ValueError(f"vocabulary: expected lists of at most {MAX_CLASSES} different names")
        if not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() for name in names):
            raise ValueError(f"vocabulary: expected names of 1 to {MAX_NAME} printable characters")


def _check_description(data: Any) -> None:
    """Raise ValueError unless it is a flat mapping of names to sizes, lists of sizes, rates and short text."""
    if not isinstance(data, dict) or len(data) > MAX_SIZES:
        raise ValueError(f"architecture: expected a mapping of at most {MAX_SIZES} names")
    for name, value in data.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_SIZES or not all(_is_size(one) for one in values):
            raise ValueError(f"architecture: {name} is {str(value)[:40]}")


def _is_size(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_NAME
    return isinstance(value, int | float) and 0 <= value <= MAX_SIZE


Table = dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]


def _tensor_table(header: Mapping[str, Any], size: int) -> Table:
    """Dtype, shape and offset of each tensor; raises ValueError unless they fill ``size`` bytes exactly."""
    table: Table = {}
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors where at most {MAX_TENSORS} were expected")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (low, high) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not name.startswith(PARTS) or len(name) > MAX_NAME:
            raise ValueError(f"tensor {name[:40]!r}: expected a name that starts with one of {', '.join(PARTS)}")
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_FILE for n in (*shape, low, high)):
            raise ValueError(f"tensor {name}: shape or offsets out of range")
        if low != end or high - low != prod(shape) * np.dtype(dtype).itemsize or high > size:
            raise ValueError(f"tensor {name}: bytes {low} to {high} of {size} for shape {shape}, after byte {end}")
        table[name] = np.dtype(dtype), tuple(shape), low
        end = high
    if end != size:
        raise ValueError(f"{size - end} bytes after the last tensor")
    return table


def _check_claims(info: ModelInfo, table: Table) -> None:
    """Raise ValueError if networks as described would be far larger than the tensors that are there.

    What is built before tensors are compared in detail is thus at most a small multiple of the file.
    """
    elements = max(MAX_SIZE, sum(prod(shape) for _, shape, _ in table.values()))  # toys may be smaller than they say
    sizes = info.architecture
    for name, value in sizes.items():
        values = value if isinstance(value, list) else [value]
        numbers = [n for n in values if isinstance(n, int) and not isinstance(n, bool)]
        if any(n**2 > elements for n in numbers):
            raise ValueError(f"architecture: {name} is {value} in a file of {elements} weights")
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            widths = sizes.get(f"{stem}_widths", [sizes.get(f"{stem}_width")])
            sound = isinstance(widths, list) and len(widths) == len(values) == len(numbers)
            if not sound or not all(isinstance(w, int) for w in widths):
                raise ValueError(f"architecture: {name} is {value} for widths {widths}")
            if sum(n * w**2 for n, w in zip(numbers, widths, strict=True)) > elements:
                raise ValueError(f"architecture: {name} is {value} in a file of {elements} weights")


def find_model(name: str = "base", *, head: str | None = None, preferred: str | None = None) -> ModelInfo:
    """Look a model up along ``DEEPSIC_MODEL_PATH``, in the package, and among what archives brought, in this order.

    The first file that fits is the answer, in a folder the first by file name. Several may have one decoder: any of
    them decodes what another encoded, and to label or encode, ``head`` and ``preferred`` say which.

    Parameters
    ----------
    name : str
        Name of a model, or at least 8 hexadecimal digits of its decoder's identity.
    head : str, optional
        Leading digits of the identity of the head that it must have; any if None or all zeros.
    preferred : str, optional
        Name of the model to choose where several fit: with one decoder and one head, they may still encode differently.

    Raises
    ------
    ModelNotFound
        If there is none; names the identity and every place looked at.
    """
    wanted = head if head and set(head) != {"0"} else ""
    by_hash = len(name) >= 8 and set(name) <= set("0123456789abcdef")
    first = None
    # what the user points to comes before what is packaged
    for path, brought in _candidates():
        info = _cached_info(str(path), path.stat().st_mtime_ns)
        if info is None or not info.head.startswith(wanted):
            continue
        # what an archive brought answers to its identity alone: a name is the user's to give
        if (info.name == name and not brought) or (by_hash and info.decoder.startswith(name)):
            if preferred is None or (info.name == preferred and not brought):
                return info
            first = first or info
    if first is not None:
        return first
    asked = f"with decoder {name}" if by_hash else f"named {name!r}"
    asked += f" and head {wanted}" if wanted else ""
    places = ", ".join(str(p) for p in [*_places(), *_brought()])
    raise ModelNotFound(
        f"no model {asked}; looked in {places}. Set {SEARCH_VARIABLE} to the folder that has it. If the archive has it "
        "embedded, call deepsic_codec.open_archive(URL) once: from then on zarr.open and xarray.open_zarr find it too"
    )


def cache_folder() -> Path:
    """Folder for models that archives brought along."""
    given = os.environ.get(CACHE_VARIABLE, "")
    return Path(given).expanduser() if given else Path("~/.cache/deepsic_codec").expanduser()


def add_folder(folder: Path) -> None:
    """Also look in a folder for models by their identity, for the rest of the process."""
    if folder not in _added:
        _added.append(folder)


@lru_cache(maxsize=256)
def _cached_info(path: str, modified: int) -> ModelInfo | None:
    try:
        return read_info(path)
    except (ModelMismatch, OSError):
        return None


def _places() -> Iterable[Path]:
    extra = [Path(p) for p in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep) if p]
    return [*extra, PACKAGED]


_added: list[Path] = []


def _brought() -> list[Path]:
    cache = cache_folder()
    return [cache, *(folder for folder in _added if folder != cache)]


def _candidates() -> Iterator[tuple[Path, bool]]:
    """Files to look at, each with whether an archive brought it."""
    for places, brought in ((_places(), False), (_brought(), True)):
        for place in places:
            if place.is_dir():
                yield from ((path, brought) for path in sorted(place.glob("*.safetensors")))
            elif place.is_file():
                yield place, brought
