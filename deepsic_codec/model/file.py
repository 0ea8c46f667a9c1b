"""Model files, of weights, integer tables, vocabulary and description, and head files: one `.safetensors` file each.

A model has two identities, both SHA-256 over named tensors and their description: the *decoder* (integer prior, coder
tables, gains, synthesis: all that decoding needs) and the *head* (semantic head and vocabulary). The analysis transform
belongs to neither, so a better encoder writes the same format. Reading a description needs neither torch nor the
weights, only the file's JSON header.

A head file has another head for a decoder: its tensors, their sizes, the vocabulary, and the identity of the decoder.
With a model of that decoder it makes a model with that head (`ModelInfo.with_head`), not that of the model file.

Archives contain models, so a file may come from anywhere, and nothing in it is trusted: the size is checked before the
file is read, the tensors have to fill the file exactly, and no tensor is used before the identities have been verified
and all tensors were compared with the table of the architecture (`families.load_checked`).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deepsic_codec import config
from deepsic_codec.errors import ModelMismatch, ModelNotFound
from deepsic_codec.model.vocabulary import Vocabulary

#: Bytes of a header; a description takes a few thousand.
MAX_HEADER = 1 << 20
#: Far above those of any model; they bound the work that a header causes.
MAX_TENSORS, MAX_DIMENSIONS, MAX_SIZES, MAX_SIZE = 1 << 12, 8, 64, 1 << 16
MAX_NAME = 256
#: Types of tensors, by their names in the safetensors format.
DTYPES = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "F16", "F32"}
HEAD_PART = "head."
PARTS = ("decoder.", HEAD_PART, "encoder.")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ModelInfo:
    """Description of a model file.

    Attributes
    ----------
    name : str
        Such as `base-` and the first digits of the decoder.
    path : str
        Path of the file.
    decoder, head : str
        The two identities, 64 hexadecimal digits each.
    encoder : str
        SHA-256 of the tensors that only encoding needs. The format does not depend on it; it tells files of one decoder
        and one head apart.
    vocabulary : Vocabulary
        Names of the head's scores.
    architecture : dict
        Family and sizes of the networks.
    head_file : HeadInfo or None
        The head, if it is in a file of its own.
    """

    name: str
    path: str
    decoder: str
    head: str
    encoder: str
    vocabulary: Vocabulary
    architecture: dict[str, Any]
    head_file: "HeadInfo | None" = None

    def with_head(self, head: "HeadInfo") -> "ModelInfo":
        """Return the same model with the head of a head file.

        Raises
        ------
        ModelMismatch
            If the head is for another decoder or family.
        """
        if (head.decoder, head.family) != (self.decoder, self.architecture.get("family")):
            raise ModelMismatch(
                f"head {head.name!r} is for decoder {head.decoder[:16]} of the family {head.family!r}, but model "
                f"{self.name!r} has decoder {self.decoder[:16]}; use a head for this decoder"
            )
        architecture = {k: v for k, v in self.architecture.items() if not _is_of_head(k)} | head.sizes
        return replace(self, head=head.head, vocabulary=head.vocabulary, architecture=architecture, head_file=head)

    @property
    def values(self) -> int:
        """Values of an embedding, 0 if the head gives none."""
        return int(self.architecture.get("head_embedding", 0))

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a label cell: scores of classes and "unknown", and an embedding."""
        return len(self.vocabulary.names) + self.values


@dataclass(frozen=True)
class HeadInfo:
    """Description of a head file.

    Attributes
    ----------
    name, path : str
        As of `ModelInfo`.
    decoder : str
        Identity of the decoder whose latents the head reads.
    head : str
        Its own identity.
    vocabulary : Vocabulary
        Names of its scores.
    family : str
        Family of its networks.
    sizes : dict
        The part of an architecture that describes it.
    """

    name: str
    path: str
    decoder: str
    head: str
    vocabulary: Vocabulary
    family: str
    sizes: dict[str, Any]


def _is_of_head(size: str) -> bool:
    """Tell whether a size of an architecture is one of the head."""
    return size.startswith("head") or size == "classes"


def identity(arrays: Arrays, prefix: str, description: Mapping[str, Any]) -> str:
    """SHA-256 over a canonical description and all arrays whose name starts with `prefix`.

    Hashed are the description as JSON with sorted keys and no spaces, then for each array in the order of names
    `name|dtype|shape|` and the little-endian bytes, all in UTF-8.
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
    return decoder, head_identity(arrays, architecture, vocabulary)


def head_identity(arrays: Arrays, architecture: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    """Identity of a head, of a model file or of a file of its own."""
    sizes = {k: v for k, v in architecture.items() if k.startswith("head")}
    return identity(arrays, "head.", {"architecture": sizes, "vocabulary": replace(vocabulary, head="").to_json()})


def save_model(
    path: str | Path,
    name: str,
    arrays: Arrays,
    architecture: Mapping[str, Any],
    vocabulary: Vocabulary,
    trained: Mapping[str, Any],
) -> ModelInfo:
    """Write a model file, or replace one, and return its description.

    Names of arrays start with `decoder.`, `head.` or `encoder.`. The architecture is the JSON of its family and sizes.
    `trained` tells people how the model was trained; it is not part of an identity.
    """
    decoder, head = identities(arrays, architecture, vocabulary)
    about = {
        "name": name,
        "decoder": decoder,
        "head": head,
        "encoder": identity(arrays, "encoder.", {}),
        "architecture": dict(architecture),
        "vocabulary": replace(vocabulary, head="").to_json(),
        "trained": dict(trained),
    }
    _save(path, arrays, {"deepsic": json.dumps(about)})
    return read_info(path)


def save_head(
    path: str | Path,
    name: str,
    arrays: Arrays,
    model: ModelInfo,
    sizes: Mapping[str, Any],
    vocabulary: Vocabulary,
    trained: Mapping[str, Any],
) -> HeadInfo:
    """Write a head file, or replace one, and return its description.

    Names of arrays start with `head.`. `model` has the decoder that the head is for, `sizes` are those of the head in
    an architecture. `trained` is as for `save_model`.
    """
    of_head = {k: v for k, v in sizes.items() if _is_of_head(k)}
    about = {
        "name": name,
        "decoder": model.decoder,
        "head": head_identity(arrays, of_head, vocabulary),
        "family": model.architecture["family"],
        "architecture": of_head,
        "vocabulary": replace(vocabulary, head="").to_json(),
        "trained": dict(trained),
    }
    _save(path, arrays, {"deepsic_head": json.dumps(about)})
    info = read_file(path)
    assert isinstance(info, HeadInfo)
    return info


def _save(path: str | Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    part = Path(path).with_suffix(".part")
    save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, part, metadata)
    part.chmod(0o644)  # safetensors writes files that only their owner may read
    os.replace(part, path)


def read_info(path: str | Path) -> ModelInfo:
    """Description of a model file, from its header alone.

    Raises
    ------
    ModelMismatch
        If the file is no model file of this package.
    ModelNotFound
        If there is no such file, or it cannot be read.
    """
    info = read_file(path)
    if isinstance(info, HeadInfo):
        raise ModelMismatch(f"{path}: a head file; pass it as head=, with a model of decoder {info.decoder[:16]}")
    return info


def read_file(path: str | Path) -> ModelInfo | HeadInfo:
    """Description of a model file or of a head file, from its header alone; raises ModelMismatch for any other.

    ModelNotFound if there is no such file, or it cannot be read.
    """
    with _opened(path) as file:
        return _describe_head(str(path), file) if "deepsic_head" in file.metadata() else _describe(str(path), file)


def load_arrays(info: ModelInfo) -> Arrays:
    """All arrays of a model file, after both identities and the encoder have been verified.

    Raises
    ------
    ModelMismatch
        If the file is damaged or is not the model that `info` describes.
    """
    with _opened(info.path) as file:
        _describe(info.path, file)
        arrays = _read_tensors(file, PARTS)
    if info.head_file is not None:
        arrays = {name: array for name, array in arrays.items() if not name.startswith(HEAD_PART)}
        with _opened(info.head_file.path) as file:
            _describe_head(info.head_file.path, file)
            arrays |= _read_tensors(file, (HEAD_PART,))
    computed = (*identities(arrays, info.architecture, info.vocabulary), identity(arrays, "encoder.", {}))
    stored = info.decoder, info.head, info.encoder
    for part, actual, expected in zip(("decoder", "head", "encoder"), computed, stored, strict=True):
        if actual != expected:
            path = info.head_file.path if part == "head" and info.head_file is not None else info.path
            raise ModelMismatch(
                f"{path}: damaged or altered: its {part} has SHA-256 {actual}, expected {expected}; replace the file"
            )
    return arrays


def verify(info: ModelInfo | HeadInfo) -> None:
    """Read a whole file; raises ModelMismatch if it is damaged or is not what `info` describes."""
    if isinstance(info, ModelInfo):
        load_arrays(info)
        return
    with _opened(info.path) as file:
        arrays = _read_tensors(file, (HEAD_PART,))
    if head_identity(arrays, info.sizes, info.vocabulary) != info.head:
        raise ModelMismatch(f"{info.path}: damaged or altered: the head has another SHA-256; replace the file")


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file, whose sizes are checked before it is read; any damage is a ModelMismatch.

    ModelNotFound if it cannot be read.
    """
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ModelNotFound(
            f"{path}: the file cannot be read ({error.strerror}); pass the path of a model file or head file"
        ) from None
    limit = config.get().max_model_bytes
    if size > limit:
        raise ModelMismatch(
            f"{path}: {size} bytes, more than the limit of {limit} of a model file; if you trust the file, raise the "
            "limit with deepsic_codec.config.set(max_model_bytes=...)"
        )
    if not 2 <= header <= min(MAX_HEADER, size - 8):
        raise ModelMismatch(f"{path}: not a DeepSIC model file (header of {header} bytes in a file of {size})")
    try:
        with safe_open(path, "np") as tensors:
            yield tensors
    except ModelMismatch:
        raise
    # RecursionError: deeply nested JSON
    except (SafetensorError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise ModelMismatch(f"{path}: not a DeepSIC model file, or damaged ({type(e).__name__}: {e})") from None


def _parse(text: str) -> Any:
    """Parse JSON; a name that occurs twice and NaN are refused, since readers treat them differently."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    def refuse(text: str) -> Any:
        raise ValueError(f"the number {text} is not allowed")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _describe(path: str, file: Any) -> ModelInfo:
    about = _parse(file.metadata()["deepsic"])
    name, decoder, head, encoder = (about[key] for key in ("name", "decoder", "head", "encoder"))
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise ValueError(f"name: expected text of at most {MAX_NAME} characters")
    if not all(re.fullmatch(r"[0-9a-f]{64}", digits) for digits in (decoder, head, encoder)):
        raise ValueError("decoder, head and encoder: expected SHA-256 hashes")
    vocabulary, architecture = replace(Vocabulary.from_json(about["vocabulary"]), head=head), about["architecture"]
    _check_description(architecture)
    return ModelInfo(name, path, decoder, head, encoder, vocabulary, dict(architecture))


def _describe_head(path: str, file: Any) -> HeadInfo:
    about = _parse(file.metadata()["deepsic_head"])
    name, decoder, head, family = (about[key] for key in ("name", "decoder", "head", "family"))
    for text in (name, family):
        if not isinstance(text, str) or len(text) > MAX_NAME:
            raise ValueError(f"name and family: expected text of at most {MAX_NAME} characters")
    if not all(re.fullmatch(r"[0-9a-f]{64}", digits) for digits in (decoder, head)):
        raise ValueError("decoder and head: expected SHA-256 hashes")
    vocabulary, sizes = replace(Vocabulary.from_json(about["vocabulary"]), head=head), about["architecture"]
    _check_description(sizes)
    if not all(map(_is_of_head, sizes)):
        raise ValueError(f"architecture: sizes of other networks than a head: {sorted(sizes)}")
    return HeadInfo(name, path, decoder, head, vocabulary, family, dict(sizes))


def _check_description(data: Any) -> None:
    """Raise ValueError unless it is a flat mapping of names to sizes, lists of sizes, rates and short text."""
    if not isinstance(data, dict) or len(data) > MAX_SIZES:
        raise ValueError(f"architecture: expected a mapping of at most {MAX_SIZES} names")
    for name, value in data.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_SIZES or not all(_is_size(one) for one in values):
            raise ValueError(f"architecture: unsupported value {str(value)[:40]} of {name}")


def _is_size(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_NAME
    return isinstance(value, int | float) and 0 <= value <= MAX_SIZE


def _read_tensors(file: Any, prefixes: tuple[str, ...]) -> Arrays:
    """Read all tensors; raises ValueError for those that no model has."""
    _check_tensors(file, prefixes)
    return {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # no mapping


def _check_tensors(file: Any, prefixes: tuple[str, ...]) -> None:
    """Raise ValueError for tensors that no model has, or whose names start otherwise.

    That shapes fit their bytes, and that the tensors fill the file without gaps, safetensors has verified.
    """
    names = list(file.keys())
    if len(names) > MAX_TENSORS:
        raise ValueError(f"{len(names)} tensors, expected at most {MAX_TENSORS}")
    for name in names:
        tensor = file.get_slice(name)
        shape, dtype = tensor.get_shape(), tensor.get_dtype()
        if not name.startswith(prefixes) or len(name) > MAX_NAME:
            raise ValueError(f"tensor {name[:40]!r}: expected a name that starts with one of {', '.join(prefixes)}")
        if len(shape) > MAX_DIMENSIONS or dtype not in DTYPES:
            raise ValueError(f"tensor {name}: unsupported: {len(shape)} dimensions of {dtype}")
