"""What a codec is set to, and its JSON form in the metadata of both Zarr formats."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Self, TypeVar

from deepsic_codec.errors import ConfigurationError, ModelNotFound
from deepsic_codec.payload.constants import LABEL_CELL

FORMAT = 1  # of this metadata and of the payloads that it announces
AXES = "yxctzn"
SEMANTICS = ("pre", "post", "none")
DEFAULT_EFFORT, MAX_EFFORT = 1, 4  # 1 is rate-distortion optimised quantisation, from 2 on symbols are refined
REFINED = 2  # the least effort that can be tuned
TUNES = ("psnr", "ms-ssim")
DEFAULT_QUALITY = 50.0
# Beside a residual, which codes what the features leave, fewer features make smaller payloads; benchmarks/imagery.py
BOUNDED_QUALITY = 20.0
CHUNK = "chunk"  # value_range: measured
NAN = "NaN"  # nodata, as JSON has no such number
BANDS = ("planes", "triples")
OPTIONAL = ("bands", "value_range", "max_error", "psnr", "bpp")  # metadata leaves them out where they are None
MAX_TILE = 1 << 20  # pixels: beyond any chunk, and small enough for every integer of the label section

AnyCodec = TypeVar("AnyCodec", bound="CodecConfig")


@dataclass(frozen=True, init=False, repr=False)
class CodecConfig:
    """Configuration that both codec classes share; `deepsic_codec.DeepSIC` documents the parameters.

    The attribute `hints` holds the parameter `encode`, a name that codecs need for their method.

    Raises
    ------
    ConfigurationError
        For a value out of range, naming the parameter.
    ModelNotFound
        If `decoder` is not given and there is no such model here.
    """

    model: str
    quality: float | None
    axes: str
    semantics: str
    label_tile: tuple[int, int] | None
    nodata: float | str | None
    bands: str | None
    value_range: str | tuple[tuple[float, float], ...] | None
    max_error: float | None
    psnr: float | None
    bpp: float | None
    hints: dict[str, Any] = field(hash=False)
    decoder: str
    head: str | None

    def __init__(
        self,
        model: str = "base",
        quality: float | None = None,
        axes: str = "yxc",
        semantics: str = "pre",
        label_tile: int | tuple[int, int] | None = None,
        nodata: float | str | None = None,
        encode: Mapping[str, Any] | None = None,
        *,
        bands: str | None = None,
        value_range: Any = None,
        max_error: float | None = None,
        psnr: float | None = None,
        bpp: float | None = None,
        decoder: str | None = None,
        head: str | None = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise ConfigurationError(f"model: expected a name, got {model!r}")
        if semantics not in SEMANTICS:
            raise ConfigurationError(f"semantics: expected one of {', '.join(SEMANTICS)}, got {semantics!r}")
        if bands is not None and (not isinstance(bands, str) or bands not in BANDS):
            raise ConfigurationError(f"bands: expected None, {' or '.join(map(repr, BANDS))}, got {bands!r}")
        _check_rate(quality, psnr, bpp, max_error)
        if quality is None and psnr is None and bpp is None:
            quality = DEFAULT_QUALITY if max_error is None else BOUNDED_QUALITY
        if decoder is None:  # a new codec; metadata that was written has it, and is readable where the model is not
            hints = _check_hints(encode)
            _check_known(hints)
            decoder, head = _local_identity(model)
        else:  # of an array that there is: what a later version asks of its encoder keeps nobody from reading it
            hints = _check_hints(encode)
        values = {
            "model": model,
            "quality": None if quality is None else _check_quality(quality),
            "axes": _check_axes(axes),
            "semantics": semantics,
            "label_tile": None if label_tile is None else _check_tile(label_tile),
            "nodata": _check_nodata(nodata),
            "bands": bands,
            "value_range": _check_range(value_range),
            "max_error": None if max_error is None else _check_positive("max_error", max_error, zero=True),
            "psnr": None if psnr is None else _check_positive("psnr", psnr),
            "bpp": None if bpp is None else _check_positive("bpp", bpp),
            "hints": hints,
            "decoder": _check_hash("decoder", decoder),
            "head": None if head is None else _check_hash("head", head),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def effort(self) -> int:
        """How long to look for fewer bytes when encoding, 0 to 4; readers have no use for it."""
        effort = self.hints.get("effort", DEFAULT_EFFORT)
        return effort if _is_effort(effort) else DEFAULT_EFFORT

    @property
    def tune(self) -> str:
        """The measure of quality that bytes are spent on when encoding; readers have no use for it."""
        tune = self.hints.get("tune", TUNES[0])
        return str(tune) if tune in TUNES and self.effort >= REFINED else TUNES[0]

    def parameters(self) -> dict[str, Any]:
        """Return what `__init__` takes to make this configuration, as plain JSON."""
        values = {
            "model": self.model,
            "quality": None if self.quality is None else _plain(self.quality),
            "axes": self.axes,
            "semantics": self.semantics,
            "label_tile": None if self.label_tile is None else list(self.label_tile),
            "nodata": self.nodata,
            "bands": self.bands,
            "value_range": _listed(self.value_range),
            "max_error": self.max_error,
            "psnr": self.psnr,
            "bpp": self.bpp,
            "encode": json.loads(json.dumps(self.hints)),
            "decoder": self.decoder,
            "head": self.head,
        }
        if self.quality is None:
            del values["quality"]
        return {key: value for key, value in values.items() if value is not None or key not in OPTIONAL}

    def to_json(self) -> dict[str, Any]:
        """Return the array metadata of this configuration."""
        return {"format": FORMAT, **self.parameters()}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Make a configuration from array metadata; what is missing gets its default.

        Raises
        ------
        ConfigurationError
            If `data` is no mapping, has an unknown key, a bad value, or a format newer than this version knows.
        """
        if not isinstance(data, Mapping):
            raise ConfigurationError(f"configuration: expected a mapping, got {data!r}")
        values = dict(data)
        version = values.pop("format", FORMAT)
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise ConfigurationError(f"format: expected a version number, got {version!r}")
        if version == 0:
            raise ConfigurationError("format: 0 was that of development versions, which nothing reads; encode again")
        if version > FORMAT:
            raise ConfigurationError(
                f"format: this array says {version}, this version of deepsic_codec reads up to {FORMAT}; upgrade it"
            )
        first = ("model", "quality", "axes", "semantics", "label_tile", "nodata")
        known = (*first, *OPTIONAL, "encode", "decoder", "head")
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ConfigurationError(f"unknown parameter {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    def convert(self, kind: type[AnyCodec]) -> AnyCodec:
        """Return the same configuration as another kind of codec."""
        return kind(**self.parameters())

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.parameters().items() if value not in (None, {})}
        try:
            local = _local_identity(self.model)
        except ModelNotFound:
            local = ("", None)
        if (self.decoder, self.head) == local:  # then the model's name says it
            del shown["decoder"]
            shown.pop("head", None)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _local_identity(model: str) -> tuple[str, str | None]:
    from deepsic_codec.model.file import find_model

    info = find_model(model)
    return info.decoder, info.head


def _check_quality(quality: object) -> float:
    if not isinstance(quality, Real) or isinstance(quality, bool) or not 1 <= float(quality) <= 100:
        raise ConfigurationError(f"quality: expected a number from 1 to 100, got {quality!r}")
    return round(float(quality) * 100) / 100  # payloads store hundredths


def _check_rate(quality: object, psnr: object, bpp: object, max_error: object) -> None:
    given = [name for name, value in (("quality", quality), ("psnr", psnr), ("bpp", bpp)) if value is not None]
    if len(given) > 1:
        raise ConfigurationError(f"{', '.join(given)}: each decides how many bytes a chunk takes; give one of them")
    if max_error is not None and given and given != ["quality"]:
        raise ConfigurationError(f"max_error, {given[0]}: a bound on the error leaves no choice of that; give one")


def _plain(number: Any) -> float:
    """Return a number in the one form that metadata has it in: an int if it is whole."""
    if isinstance(number, Integral):
        return int(number)
    value = float(number)
    return int(value) if value == int(value) and abs(value) < 1 << 53 else value


def _check_positive(name: str, value: object, zero: bool = False) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if number and (float(value) > 0 or (zero and value == 0)):  # type: ignore[arg-type, comparison-overlap]
        return _plain(value)
    raise ConfigurationError(f"{name}: expected None or a number {'from' if zero else 'above'} 0, got {value!r}")


def _check_nodata(value: object) -> float | str | None:
    if value is None or (isinstance(value, str) and value == NAN):
        return value
    if not isinstance(value, Real) or isinstance(value, bool) or math.isinf(value):
        raise ConfigurationError(f"nodata: expected None, a number or NaN, got {value!r}")
    return NAN if math.isnan(value) else _plain(value)


def _check_range(value: Any) -> str | tuple[tuple[float, float], ...] | None:
    if value is None or (isinstance(value, str) and value == CHUNK):
        return value
    expected = f"value_range: expected None, {CHUNK!r}, (low, high), or a list of such pairs, one for each band"
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, tuple | list) or not value:
        raise ConfigurationError(f"{expected}, got {value!r}")
    pairs = list(value) if isinstance(value[0], tuple | list) else [value]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ConfigurationError(f"{expected}, got {value!r}")
        for number in pair:
            if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
                raise ConfigurationError(f"{expected}, finite numbers, got {value!r}")
        if not pair[0] < pair[1]:
            raise ConfigurationError(f"{expected}, low below high, got {tuple(pair)!r}")
    return tuple((_plain(low), _plain(high)) for low, high in pairs)


def _listed(value: str | tuple[tuple[float, float], ...] | None) -> Any:
    if value is None or isinstance(value, str):
        return value
    return list(value[0]) if len(value) == 1 else [list(pair) for pair in value]


def _check_axes(axes: object) -> str:
    if not isinstance(axes, str) or len(set(axes)) != len(axes) or set(axes) - set(AXES) or not {"y", "x"} <= set(axes):
        raise ConfigurationError(
            f"axes: expected y, x and any of c, t, z, n, each once, in the order of the array (such as 'yxc' or "
            f"'tcyx'), got {axes!r}"
        )
    return axes


def _check_tile(tile: object) -> tuple[int, int]:
    if isinstance(tile, Integral) and not isinstance(tile, bool):
        tile = (tile, tile)
    if not isinstance(tile, tuple | list) or len(tile) != 2 or not all(isinstance(size, Integral) for size in tile):
        raise ConfigurationError(f"label_tile: expected None, a size or (height, width) in pixels, got {tile!r}")
    if not all(0 < size <= MAX_TILE and size % LABEL_CELL == 0 for size in tile):
        raise ConfigurationError(f"label_tile: height and width have to be multiples of {LABEL_CELL}, got {tile!r}")
    return int(tile[0]), int(tile[1])


def _check_hints(hints: object) -> dict[str, Any]:
    if hints is None:
        return {}
    try:
        copy = json.loads(json.dumps(hints, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"encode: expected values that JSON can hold, got {hints!r}: {error}") from None
    if not isinstance(copy, dict):
        raise ConfigurationError(f"encode: expected a mapping of hints, got {hints!r}")
    return copy


def _is_effort(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_EFFORT


def _check_known(hints: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for values that this version would not know what to do with."""
    effort, tune = hints.get("effort", DEFAULT_EFFORT), hints.get("tune", TUNES[0])
    if not _is_effort(effort):
        raise ConfigurationError(f"encode: effort has to be an integer from 0 to {MAX_EFFORT}, got {effort!r}")
    if tune not in TUNES:
        raise ConfigurationError(f"encode: tune has to be one of {', '.join(TUNES)}, got {tune!r}")
    if tune != TUNES[0] and effort < REFINED:
        raise ConfigurationError(
            f"encode: to tune for {tune}, symbols have to be refined: give an effort of {REFINED} to {MAX_EFFORT}, too"
        )


def _check_hash(name: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ConfigurationError(f"{name}: expected a SHA-256 in lowercase hexadecimal (64 digits), got {value!r}")
    return value
