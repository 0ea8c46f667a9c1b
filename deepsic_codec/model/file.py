"""Model files: one ``.safetensors`` with weights, integer tables, vocabulary and description.

A model has two identities, both SHA-256 over named tensors and their description: the
*decoder* (integer prior, coder tables, gains, synthesis: all that decoding needs) and the
*head* (semantic head and vocabulary).  The analysis transform belongs to neither, so a
better encoder writes the same format.  Finding a model and reading its vocabulary needs
neither torch nor the weights, only the file's JSON header.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from deepsic_codec.errors import ModelMismatch, ModelNotFound

#: Directories or files to look in besides the package, separated as in PATH.
SEARCH_VARIABLE = "DEEPSIC_MODEL_PATH"
PACKAGED = Path(__file__).resolve().parent.parent / "models"
#: A description is a few kilobytes; a header beyond this is no model of ours.
MAX_HEADER = 1 << 20
#: Weights of a few million parameters; a file beyond this is refused before it is read.
MAX_FILE = 1 << 30

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
    """

    name: str
    path: str
    decoder: str
    head: str
    vocabulary: Vocabulary
    architecture: dict[str, Any]


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
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER:
                raise ModelMismatch(f"{path}: not a DeepSIC model file (header of {size} bytes)")
            header = json.loads(file.read(size))
        about = json.loads(header["__metadata__"]["deepsic"])
        return ModelInfo(
            name=str(about["name"]),
            path=str(path),
            decoder=str(about["decoder"]),
            head=str(about["head"]),
            vocabulary=Vocabulary.from_json(about["vocabulary"]),
            architecture=dict(about["architecture"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelMismatch):
            raise
        raise ModelMismatch(f"{path}: not a DeepSIC model file ({type(error).__name__}: {error})") from None


def load_arrays(info: ModelInfo) -> Arrays:
    """All arrays of a model file, after verifying both identities.

    Raises
    ------
    ModelMismatch
        If the file is damaged or is not the model that ``info`` describes.
    """
    if os.path.getsize(info.path) > MAX_FILE:
        raise ModelMismatch(f"{info.path}: larger than {MAX_FILE} bytes, which no model is")
    try:
        arrays = load_file(info.path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelMismatch(f"{info.path}: damaged model file: {error}") from None
    found = identities(arrays, info.architecture, info.vocabulary)
    for part, wanted, has in zip(("decoder", "head"), (info.decoder, info.head), found, strict=True):
        if wanted != has:
            raise ModelMismatch(
                f"{info.path}: damaged or altered: its {part} has SHA-256 {has}, expected {wanted}; replace the file"
            )
    return arrays


def find_model(name: str = "base", *, head: str | None = None) -> ModelInfo:
    """Look a model up in the package and along ``DEEPSIC_MODEL_PATH``.

    Parameters
    ----------
    name : str
        Name of a model, or at least 8 hexadecimal digits of its decoder's identity.
    head : str, optional
        Leading digits of the identity of the head that it must have; any if None or all zeros.

    Raises
    ------
    ModelNotFound
        If there is none; names the identity and every place looked at.
    """
    wanted = head if head and set(head) != {"0"} else ""
    by_hash = len(name) >= 8 and set(name) <= set("0123456789abcdef")
    # what the user points to comes before what is packaged
    for path in _candidates():
        info = _cached_info(str(path), path.stat().st_mtime_ns)
        if info is None or not info.head.startswith(wanted):
            continue
        if info.name == name or (by_hash and info.decoder.startswith(name)):
            return info
    asked = f"with decoder {name}" if by_hash else f"named {name!r}"
    asked += f" and head {wanted}" if wanted else ""
    places = ", ".join(str(p) for p in _places())
    raise ModelNotFound(f"no model {asked}; looked in {places}. Set {SEARCH_VARIABLE} to the folder that has it")


@lru_cache(maxsize=256)
def _cached_info(path: str, modified: int) -> ModelInfo | None:
    try:
        return read_info(path)
    except (ModelMismatch, OSError):
        return None


def _places() -> Iterable[Path]:
    extra = [Path(p) for p in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep) if p]
    return [*extra, PACKAGED]


def _candidates() -> Iterator[Path]:
    for place in _places():
        if place.is_dir():
            yield from sorted(place.glob("*.safetensors"))
        elif place.is_file():
            yield place
