"""The exceptions of this package. A message says what is wrong, what was expected, and what to do."""

import difflib
from collections.abc import Iterable, Sequence


class DeepSICError(Exception):
    """Base of every error that deepsic_codec raises on purpose."""


class CorruptPayload(DeepSICError, ValueError):
    """A DeepSIC payload is damaged: empty, truncated, altered or inconsistent.

    The message names the section and field. Fetch the chunk again, or store it again.
    """


class UnsupportedPayload(DeepSICError, ValueError):
    """The bytes may be intact, but this version cannot read them.

    They are not a DeepSIC payload, or they have a newer format version or an unknown required section. Use another
    codec, or a newer deepsic_codec.
    """


class RefusedCodec(DeepSICError, ValueError):
    """An array names a codec or a dtype that is not read of any archive. The message says how to allow a codec."""


class UnsupportedArray(DeepSICError, ValueError):
    """The codec cannot store an array with this dtype, axes, shape or NaN. Raised at array creation if possible."""


class ConfigurationError(DeepSICError, ValueError):
    """A parameter, setting or metadata key is unknown or out of range."""


class OutOfMemory(DeepSICError, MemoryError):
    """A chunk was not coded or decoded, because the memory of the machine or the device ran out."""


class ModelNotFound(DeepSICError, LookupError):
    """No model has this name or identity. The message names the identity and every folder that was searched."""


class ModelMismatch(DeepSICError, ValueError):
    """A model file is damaged, or its content does not have the expected identity."""


class ExpressionError(DeepSICError, ValueError):
    """The text of a query is no expression, or names an unknown class. The message points to the mistake."""


class LabelIndexError(DeepSICError, LookupError):
    """A label index is missing, damaged, made for another array or vocabulary, or cannot be written."""


class StaleIndex(LabelIndexError):
    """The label index is older than the array: chunks were written again, or the shape has changed."""


class WriteError(DeepSICError, OSError):
    """Chunks or shards could not be written, after retries. `keys` has their keys. All others are written.

    Fix the store, then write again with `resume=True`.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class SourceError(DeepSICError, OSError):
    """An image file or array cannot be read. The message names it."""


class MissingPackage(DeepSICError, ImportError):
    """A package that is needed is not installed. The message says what to install."""


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the end of a message about a name that does not exist: the known ones like it, or nothing."""
    by_case = {word.casefold(): word for word in known}
    similar = difflib.get_close_matches(str(name).casefold(), by_case, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(by_case[word] for word in similar)}?" if similar else ""


def counted(number: int, noun: str, nouns: str = "") -> str:
    """Return a number with its noun for a message: 1 chunk, 1,234 chunks; `nouns` is the plural without an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
