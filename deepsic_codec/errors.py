"""What can go wrong, in twelve kinds. A message says what was found, what was expected, what to do."""

from collections.abc import Sequence


class DeepSICError(Exception):
    """Base of every error that deepsic_codec raises on purpose."""


class CorruptPayload(DeepSICError, ValueError):
    """The bytes began as a DeepSIC payload and are damaged: empty, truncated, bit-flipped, inconsistent.

    The message names the section and field. Store the chunk again, or fetch it again.
    """


class UnsupportedPayload(DeepSICError, ValueError):
    """The bytes may be sound, but this release cannot read them.

    Not a DeepSIC payload (wrong magic), a newer format version, or a section that a reader must know and this one does
    not. Use another codec, or a newer deepsic_codec.
    """


class UnsupportedArray(DeepSICError, ValueError):
    """An array that the codec cannot take: dtype, axes, shape, or NaN in it. Raised at array creation if possible."""


class ConfigurationError(DeepSICError, ValueError):
    """A codec parameter or metadata key that is unknown or out of range."""


class ModelNotFound(DeepSICError, LookupError):
    """No model with the name or identity asked for. The message names the hash and every place looked at."""


class ModelMismatch(DeepSICError, ValueError):
    """A model file is damaged, or its content does not have the identity asked for."""


class ExpressionError(DeepSICError, ValueError):
    """A query that is not an expression, or names a class that there is not. The message points to the place."""


class LabelIndexError(DeepSICError, LookupError):
    """No label index, one that is damaged or made for another array or vocabulary, or nowhere to write one."""


class StaleIndex(LabelIndexError):
    """The index no longer fits the chunks: some were written again since, or the array has another shape now."""


class WriteError(DeepSICError, OSError):
    """Chunks or shards that the store would not take, after retries; all others are written. `keys` has their keys.

    Mend the store, then write again with `resume=True`.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class SourceError(DeepSICError, OSError):
    """An image file or array that cannot be read. The message names it."""


class MissingPackage(DeepSICError, ImportError):
    """Something that needs a package which is not installed. The message says what to install."""
