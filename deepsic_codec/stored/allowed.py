"""Codecs and dtypes that this package reads of any archive: an archive of a stranger may name every installed codec."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from zarr.codecs import ShardingCodec

from deepsic_codec import config
from deepsic_codec._compat import native_dtype, setting
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.errors import RefusedCodec

_COMPRESSORS = {"blosc", "bz2", "gzip", "lz4", "lzma", "packbits", "zlib", "zstd"}
_CHECKSUMS = {"adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3"}
_FILTERS = {"astype", "bitround", "delta", "fixedscaleoffset", "quantize", "shuffle", "transpose"}
#: Names without the prefix "numcodecs." that Zarr format 3 has. They turn bytes or numbers into such, and no more.
ALLOWED = frozenset({"bytes", "deepsic", "sharding_indexed", *_COMPRESSORS, *_CHECKSUMS, *_FILTERS})
NUMBERS = "biufc"  # kinds of dtypes that are no objects, strings or records
PREFIX = "numcodecs."
_DTYPES = ("dtype", "astype", "encode_dtype", "decode_dtype")  # settings of numcodecs


def check_codecs(array: Any) -> None:
    """Check the codecs and dtypes in the metadata of an array, before any chunk of it is decoded.

    Parameters
    ----------
    array : zarr.Array
        Any array.

    Raises
    ------
    RefusedCodec
        For a codec that is neither in `ALLOWED` nor in the setting `allowed_codecs`, or a dtype that is no number.
    """
    allowed = ALLOWED.union(config.get().allowed_codecs)
    for name, settings in _codecs(array.metadata):
        if name.removeprefix(PREFIX) not in allowed and name not in allowed:
            raise RefusedCodec(
                f"array {array.path!r} is stored with the codec {name!r}, which is not read unless it is allowed: some "
                f"codecs run code that is in the data. If you trust the archive, use "
                f"config.set(allowed_codecs=[{name!r}]) or DEEPSIC_ALLOWED_CODECS={name}"
            )
        for key in _DTYPES:
            if settings.get(key) is not None:
                _check_dtype(array.path, f"codec {name!r}, {key}", settings[key])
    _check_dtype(array.path, "dtype", native_dtype(array.dtype))


def _check_dtype(path: str, what: str, dtype: Any) -> None:
    try:
        kind = np.dtype(dtype).kind
    except (TypeError, ValueError):
        kind = "?"
    if kind not in NUMBERS:
        raise RefusedCodec(f"array {path!r}: {what}: expected numbers, got {dtype!r}")


def _codecs(metadata: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and settings of all codecs in the metadata of an array, those within shards included."""
    if metadata.zarr_format == 2:
        for codec in (*(metadata.filters or ()), metadata.compressor):
            if codec is not None:
                yield str(codec.codec_id), {} if isinstance(codec, CodecParams) else codec.get_config()
        return
    pending = list(metadata.codecs)
    while pending:
        codec = pending.pop()
        if isinstance(codec, ShardingCodec):
            pending += [*codec.codecs, *codec.index_codecs]
        elif not isinstance(codec, CodecParams):
            about = codec.to_dict()
            settings = about.get("configuration")
            yield setting(about.get("name", type(codec).__name__)), settings if isinstance(settings, Mapping) else {}
