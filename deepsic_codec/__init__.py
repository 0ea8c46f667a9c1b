"""DeepSIC image compression for Zarr: learned features with their labels in front. Names are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepsic_codec import config, errors
    from deepsic_codec.archive import chunk_attrs, create_array, open_archive
    from deepsic_codec.codec.v2 import DeepSIC
    from deepsic_codec.codec.v3 import DeepSICCodec
    from deepsic_codec.labels.attributes import iter_chunk_attrs
    from deepsic_codec.labels.features import decode_features
    from deepsic_codec.labels.index_writer import consolidate_labels
    from deepsic_codec.labels.query import open_labels
    from deepsic_codec.labels.relabel import relabel

_HOMES = {
    "DeepSIC": "codec.v2",
    "DeepSICCodec": "codec.v3",
    "chunk_attrs": "archive",
    "consolidate_labels": "labels.index_writer",
    "create_array": "archive",
    "decode_features": "labels.features",
    "iter_chunk_attrs": "labels.attributes",
    "open_archive": "archive",
    "open_labels": "labels.query",
    "relabel": "labels.relabel",
}
__all__ = [
    "DeepSIC",
    "DeepSICCodec",
    "chunk_attrs",
    "config",
    "consolidate_labels",
    "create_array",
    "decode_features",
    "errors",
    "iter_chunk_attrs",
    "open_archive",
    "open_labels",
    "relabel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
