"""DeepSIC image compression for Zarr: learned features with their labels in front. Names are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` marks a name as public for type checkers
    from deepsic_codec import config as config
    from deepsic_codec import errors as errors
    from deepsic_codec.archive import create_array as create_array
    from deepsic_codec.archive import open_archive as open_archive
    from deepsic_codec.bulk.preview import read_preview as read_preview
    from deepsic_codec.codec.v2 import DeepSIC as DeepSIC
    from deepsic_codec.codec.v3 import DeepSICCodec as DeepSICCodec
    from deepsic_codec.labels.attributes import chunk_attrs as chunk_attrs
    from deepsic_codec.labels.attributes import iter_chunk_attrs as iter_chunk_attrs
    from deepsic_codec.labels.consolidate import consolidate_labels as consolidate_labels
    from deepsic_codec.labels.features import decode_features as decode_features
    from deepsic_codec.labels.open import open_labels as open_labels
    from deepsic_codec.labels.relabel import relabel as relabel

#: Module of each public name; "" for a module of the package.
_MODULES = {
    "DeepSIC": "codec.v2",
    "DeepSICCodec": "codec.v3",
    "chunk_attrs": "labels.attributes",
    "config": "",
    "consolidate_labels": "labels.consolidate",
    "create_array": "archive",
    "decode_features": "labels.features",
    "errors": "",
    "iter_chunk_attrs": "labels.attributes",
    "open_archive": "archive",
    "open_labels": "labels.open",
    "read_preview": "bulk.preview",
    "relabel": "labels.relabel",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _release()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    return getattr(import_module(f"{__name__}.{module}"), name) if module else import_module(f"{__name__}.{name}")


def _release() -> str:
    """Return the version of the installed package."""
    from importlib.metadata import PackageNotFoundError, version  # late: slower to import than all else here

    try:
        return version("deepsic-codec")
    except PackageNotFoundError:  # a checkout that is not installed
        return "(not installed)"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
