"""DeepSIC image compression for Zarr: learned features with their labels in front. Names are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepsic_codec import config, errors
    from deepsic_codec.archive import chunk_attrs, create_array, open_archive
    from deepsic_codec.codecs.numcodecs import DeepSIC
    from deepsic_codec.codecs.zarr import DeepSICCodec

__all__ = ["DeepSIC", "DeepSICCodec", "chunk_attrs", "config", "create_array", "errors", "open_archive"]

_HOMES = {"DeepSIC": "codecs.numcodecs", "DeepSICCodec": "codecs.zarr"}
_HOMES |= dict.fromkeys(("chunk_attrs", "create_array", "open_archive"), "archive")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
