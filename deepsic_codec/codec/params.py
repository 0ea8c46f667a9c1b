"""Codec parameters as a plain value, and their JSON form in the metadata of both Zarr formats."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np

from deepsic_codec.errors import ConfigurationError, did_you_mean
from deepsic_codec.payload.constants import DEEP_QUALITY, LABEL_CELL, MAX_QUALITY
from deepsic_codec.payload.fields import MAX_BANDS, Header
from deepsic_codec.payload.labels import MAX_POOLING, POOLINGS

FORMAT = 1  # of this metadata and of the payloads that it announces
AXES = "yxctzn"
SEMANTICS = ("pre", "post", "none")
DEFAULT_EFFORT, MAX_EFFORT = 1, 4  # 1 quantises with rate-distortion optimisation, from 2 on symbols are refined, too
MIN_REFINED_EFFORT = 2  # `tune` has no effect below
TUNES = ("mse", "ms-ssim")
DEFAULT_TUNE = TUNES[0]
DEFAULT_QUALITY = 50.0
# With `max_error`, the quality is that of the latents that labels are scored on.
BOUNDED_QUALITY = 20.0
CHUNK = "chunk"  # value_range: measured in each chunk
NAN = "NaN"  # nodata: JSON has no such number
AUTO_SPECTRAL, NO_SPECTRAL = "auto", "none"
AUTO_TRANSFORM = "auto"
TRANSFORMS = (AUTO_TRANSFORM, "features", "wavelet")
ORTHONORMAL = 1e-3  # largest deviation of the products of rows of a spectral matrix
MAX_TILE = 1 << 20  # pixels: beyond any chunk, and small enough for every integer of the label section

AnyCodec = TypeVar("AnyCodec", bound="CodecParams")
P = ParamSpec("P")


def _names_checked(init: Callable[P, None]) -> Callable[P, None]:
    """Return `__init__` with a TypeError for a parameter that does not exist which names those like it."""
    known = inspect.signature(init).parameters

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs.keys() - known:
            raise TypeError(f"DeepSIC: no parameter {name}{did_you_mean(name, known)}")
        init(*args, **kwargs)

    return checked


@dataclass(frozen=True, init=False, repr=False)
class CodecParams:
    """Parameters that both codec classes share; `deepsic_codec.DeepSIC` documents them.

    A plain value that holds its arguments and reads no file. `identity` looks the model up.

    Attributes
    ----------
    unread : dict
        Parameters of the encoder in stored metadata whose value this version does not know. They have no effect and
        are written again with the metadata.

    Raises
    ------
    ConfigurationError
        For a value out of range. The message names the parameter.
    """

    model: str
    quality: float | None
    axes: str
    semantics: str
    label_tile: tuple[int, int] | None
    label_pooling: str
    label_bands: tuple[int | str, ...] | None
    embedding: bool
    nodata: float | str | None
    effort: int
    tune: str
    transform: str
    spectral: str | tuple[tuple[float, ...], ...]
    value_range: str | tuple[tuple[float, float], ...] | None
    max_error: float | None
    psnr: float | None
    bpp: float | None
    rmse: float | None
    decoder: str | None
    head: str | None
    unread: dict[str, Any] = field(hash=False, init=False)

    @_names_checked
    def __init__(
        self,
        model: str = "base",
        quality: float | None = None,
        axes: str = "yxc",
        semantics: str = "pre",
        label_tile: int | tuple[int, int] | None = None,
        nodata: float | str | None = None,
        *,
        label_pooling: str = MAX_POOLING,
        label_bands: Any = None,
        embedding: bool = False,
        effort: int = 1,  # defaults as readers of the signature see them: those of `_ENCODER_DEFAULTS`
        tune: str = "mse",
        transform: str = "auto",
        spectral: Any = "auto",
        value_range: Any = None,
        max_error: float | None = None,
        psnr: float | None = None,
        bpp: float | None = None,
        rmse: float | None = None,
        decoder: str | None = None,
        head: str | None = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise ConfigurationError(f"model: expected a name, got {model!r}")
        _check_choice("semantics", semantics, SEMANTICS)
        _check_choice("label_pooling", label_pooling, POOLINGS)
        _check_rate(quality, psnr, bpp, rmse, max_error)
        if quality is None and psnr is None and bpp is None and rmse is None:
            quality = DEFAULT_QUALITY if max_error is None else BOUNDED_QUALITY
        _check_effort(effort)
        _check_tune(tune, effort)
        quality = None if quality is None else _check_quality(quality)
        _check_transform(transform, quality, rmse)
        values: dict[str, Any] = {
            "model": model,
            "quality": quality,
            "axes": _check_axes(axes),
            "semantics": semantics,
            "label_tile": None if label_tile is None else _check_tile(label_tile),
            "label_pooling": label_pooling,
            "label_bands": None if label_bands is None else _check_label_bands(label_bands, transform),
            "embedding": _check_embedding(embedding, semantics),
            "nodata": _check_nodata(nodata),
            "effort": int(effort),
            "tune": tune,
            "transform": transform,
            "spectral": _check_spectral(spectral),
            "value_range": _check_range(value_range),
            "max_error": None if max_error is None else _check_positive("max_error", max_error, zero=True),
            "psnr": None if psnr is None else _check_positive("psnr", psnr),
            "bpp": None if bpp is None else _check_positive("bpp", bpp),
            "rmse": None if rmse is None else _check_positive("rmse", rmse),
            "decoder": None if decoder is None else _check_hash("decoder", decoder),
            "head": None if head is None else _check_head(head, decoder),
            "unread": {},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def identity(self) -> tuple[str, str | None]:
        """Return the SHA-256 of decoder and head; without `decoder`, those of the local model named `model`.

        Raises
        ------
        ModelNotFound
            If `decoder` is None and no model or head has that name.
        ModelMismatch
            If the head is for another decoder.
        """
        if self.decoder is not None:
            return self.decoder, self.head
        from deepsic_codec.model.zoo import find_model, resolve  # late: making a codec imports no module of models

        if self.head is None or not _is_hash(self.head):
            return resolve(self.model, self.head)
        info = find_model(self.model, head=self.head)
        return info.decoder, info.head

    def identity_of(self, header: Header) -> tuple[str, str]:
        """Return decoder and head of a payload: whole if they are those of the metadata, else as the header has them.

        Payloads have the first 8 and 4 bytes of the two hashes, which other models may share.
        """
        pairs = ((self.decoder, header.decoder.hex()), (self.head, header.head.hex()))
        decoder, head = (whole if whole and whole.startswith(short) else short for whole, short in pairs)
        return decoder, head

    def resolved(self) -> Self:
        """Return the same parameters with `decoder` and `head` set, as array metadata has them.

        Raises
        ------
        ModelNotFound
            If `decoder` is None and no model has the name `model`.
        """
        if self.decoder is not None:
            return self
        decoder, head = self.identity()
        return self.changed(decoder=decoder, head=head)

    def changed(self, **values: Any) -> Self:
        """Return the same parameters but for these values."""
        return self._make(self.parameters() | values, self.unread)

    @property
    def label_numbers(self) -> tuple[int, ...] | None:
        """`label_bands` as numbers; raises ConfigurationError for names, which only those of an array can resolve."""
        bands = self.with_band_names(None).label_bands
        return None if bands is None else tuple(int(one) for one in bands)

    def with_band_names(self, names: object) -> Self:
        """Return the same parameters with numbers for names in `label_bands`; `names` is a list of the bands' names.

        Raises
        ------
        ConfigurationError
            If a band has no such name.
        """
        if self.label_bands is None or all(isinstance(one, int) for one in self.label_bands):
            return self
        names = names if isinstance(names, list) else []
        known = {str(name).casefold(): number for number, name in enumerate(names)}
        missing = [one for one in self.label_bands if isinstance(one, str) and one.casefold() not in known]
        if missing:
            bands = ", ".join(map(str, names)) or "bands without names"
            raise ConfigurationError(f"label_bands: no band is named {missing[0]!r}, of {bands}; pass names or numbers")
        return self.changed(
            label_bands=[known[one.casefold()] if isinstance(one, str) else one for one in self.label_bands]
        )

    def parameters(self) -> dict[str, Any]:
        """Return the arguments of `__init__` that make these parameters, as plain JSON; None is left out."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        values["quality"] = None if self.quality is None else _plain(self.quality)
        values["label_tile"] = None if self.label_tile is None else list(self.label_tile)
        values["label_bands"] = None if self.label_bands is None else list(self.label_bands)
        if not isinstance(self.spectral, str):
            values["spectral"] = [list(row) for row in self.spectral]
        values["value_range"] = _range_to_json(self.value_range)
        if self.label_pooling == MAX_POOLING:  # the default, which metadata leave out
            del values["label_pooling"]
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the array metadata of these parameters, with the full hashes of the model.

        Raises
        ------
        ModelNotFound
            If `decoder` is None and no model has the name `model`.
        """
        return {"format": FORMAT, **self.resolved().parameters(), **deepcopy(self.unread)}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Make parameters from array metadata; a missing key gets its default.

        Metadata with the key `decoder` is that of a stored array: any value of the encoder's parameters `effort`,
        `tune`, `transform` and `spectral` is accepted, and one that this version does not know goes to `unread`.

        Raises
        ------
        ConfigurationError
            If `data` is no mapping, has an unknown key, a bad value, or a format newer than this version knows.
        """
        if not isinstance(data, Mapping):
            raise ConfigurationError(f"configuration: expected a mapping, got {data!r}")
        values = dict(data)
        version = values.pop("format", FORMAT)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ConfigurationError(f"format: expected a version number of at least 1, got {version!r}")
        if version > FORMAT:
            raise ConfigurationError(
                f"format: the array has version {version}, but this deepsic_codec reads up to version {FORMAT}; "
                "upgrade deepsic_codec"
            )
        unknown = sorted(str(name) for name in values if name not in _NAMES)
        if unknown:
            known = did_you_mean(unknown[0], _NAMES) or f"; known are {', '.join(_NAMES)}"
            raise ConfigurationError(f"unknown parameter {', '.join(unknown)}{known}")
        unread = {} if values.get("decoder") is None else _pop_unread(values)
        return cls._make(values, unread)

    @classmethod
    def _make(cls, values: Mapping[str, Any], unread: Mapping[str, Any]) -> Self:
        params = cls(**values)
        object.__setattr__(params, "unread", deepcopy(dict(unread)))
        return params

    def convert(self, kind: type[AnyCodec]) -> AnyCodec:
        """Return the same parameters as another kind of codec."""
        return kind._make(self.parameters(), self.unread)

    def __repr__(self) -> str:
        values = self.parameters()
        for name, default in _ENCODER_DEFAULTS.items():
            if values[name] == default:
                del values[name]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


# Defaults of the encoder's parameters, which `repr` leaves out.
_ENCODER_DEFAULTS = {
    "embedding": False,
    "effort": DEFAULT_EFFORT,
    "tune": DEFAULT_TUNE,
    "transform": TRANSFORMS[0],
    "spectral": AUTO_SPECTRAL,
}
_NAMES = tuple(item.name for item in fields(CodecParams) if item.name != "unread")


def _pop_unread(values: dict[str, Any]) -> dict[str, Any]:
    """Remove those parameters of the encoder whose value this version does not know; return them."""
    unread = {}
    try:
        _check_effort(values.get("effort", DEFAULT_EFFORT))
    except ConfigurationError:
        unread["effort"] = values.pop("effort")
    try:
        _check_tune(values.get("tune", DEFAULT_TUNE), values.get("effort", DEFAULT_EFFORT))
    except ConfigurationError:
        unread["tune"] = values.pop("tune")
    try:
        _check_transform(values.get("transform", TRANSFORMS[0]), None, None)
    except ConfigurationError:
        unread["transform"] = values.pop("transform")
    try:
        _check_spectral(values.get("spectral", AUTO_SPECTRAL))
    except ConfigurationError:
        unread["spectral"] = values.pop("spectral")
    return unread


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        similar = did_you_mean(value, choices)
        raise ConfigurationError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{similar}")


def _check_effort(effort: object) -> None:
    if not isinstance(effort, Integral) or isinstance(effort, bool) or not 0 <= int(effort) <= MAX_EFFORT:
        raise ConfigurationError(f"effort: expected an integer from 0 to {MAX_EFFORT}, got {effort!r}")


def _check_tune(tune: object, effort: int) -> None:
    _check_choice("tune", tune, TUNES)
    if tune != DEFAULT_TUNE and effort < MIN_REFINED_EFFORT:
        raise ConfigurationError(
            f"tune: {tune!r} needs an effort of {MIN_REFINED_EFFORT} to {MAX_EFFORT}, got effort={effort}"
        )


def _check_transform(transform: object, quality: float | None, rmse: object) -> None:
    _check_choice("transform", transform, TRANSFORMS)
    if transform == "features" and rmse is not None:
        raise ConfigurationError("rmse: features have no such target; use psnr, or transform='wavelet'")
    if transform == "features" and quality is not None and quality > MAX_QUALITY:
        raise ConfigurationError(
            f"quality: features have qualities up to {MAX_QUALITY:g}, got {quality!r}; use transform='wavelet'"
        )


def _check_quality(quality: object) -> float:
    if not isinstance(quality, Real) or isinstance(quality, bool) or not 1 <= float(quality) <= DEEP_QUALITY:
        raise ConfigurationError(f"quality: expected a number from 1 to {DEEP_QUALITY:g}, got {quality!r}")
    return round(float(quality) * 100) / 100  # payloads store hundredths


def _check_rate(quality: object, psnr: object, bpp: object, rmse: object, max_error: object) -> None:
    pairs = (("quality", quality), ("psnr", psnr), ("bpp", bpp), ("rmse", rmse))
    targets = [name for name, value in pairs if value is not None]
    if len(targets) > 1:
        raise ConfigurationError(f"{' and '.join(targets)}: each sets the size of a chunk; pass only one of them")
    if max_error is not None and targets and targets != ["quality"]:
        raise ConfigurationError(
            f"max_error and {targets[0]}: a bound on the error determines the size; pass only one of them"
        )


def _plain(number: Any) -> float:
    """Return a number in the one form that metadata has it in: an int if it is whole."""
    if isinstance(number, Integral):
        return int(number)
    value = float(number)
    return int(value) if value == int(value) and abs(value) < 1 << 53 else value


def _check_positive(name: str, value: object, zero: bool = False) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if math.isfinite(number) and (number > 0 or (zero and number == 0)):
        return _plain(value)
    raise ConfigurationError(f"{name}: expected None or a number {'of at least' if zero else 'above'} 0, got {value!r}")


def _check_nodata(value: object) -> float | str | None:
    if value is None or (isinstance(value, str) and value == NAN):
        return value
    if not isinstance(value, Real) or isinstance(value, bool) or math.isinf(value):
        raise ConfigurationError(f"nodata: expected None, a number or NaN, got {value!r}")
    return NAN if math.isnan(value) else _plain(value)


def _check_spectral(value: Any) -> str | tuple[tuple[float, ...], ...]:
    if isinstance(value, str) and value in (AUTO_SPECTRAL, NO_SPECTRAL):
        return value
    expected = f"spectral: expected {AUTO_SPECTRAL!r}, {NO_SPECTRAL!r}, or a matrix with a row for each component"
    try:
        matrix = np.array(value)
        if matrix.dtype.kind not in "iuf":
            raise TypeError(f"dtype {matrix.dtype}")
        matrix = matrix.astype(np.float64)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{expected}, got {value!r}") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not 2 <= len(matrix) <= MAX_BANDS:
        raise ConfigurationError(
            f"{expected} and a column for each band, for 2 to {MAX_BANDS} bands; got an array of shape {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise ConfigurationError(f"{expected}; its numbers have to be finite")
    deviation = float(np.abs(matrix @ matrix.T - np.eye(len(matrix))).max())
    if deviation > ORTHONORMAL:
        raise ConfigurationError(
            f"spectral: the rows of the matrix have to be orthonormal, but the product of two rows is {deviation:.3g} "
            "off; take Q of numpy.linalg.qr(matrix.T)[0].T, or the eigenvectors of a covariance matrix"
        )
    return tuple(map(tuple, matrix.tolist()))


def _check_range(value: Any) -> str | tuple[tuple[float, float], ...] | None:
    if value is None or (isinstance(value, str) and value == CHUNK):
        return value
    expected = f"value_range: expected None, {CHUNK!r}, (low, high), or a list of such pairs, one for each band"
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, tuple | list) or not value:
        raise ConfigurationError(f"{expected}, got {value!r}")
    value = [item.tolist() if hasattr(item, "tolist") else item for item in value]
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


def _range_to_json(value: str | tuple[tuple[float, float], ...] | None) -> Any:
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
        raise ConfigurationError(f"label_tile: expected multiples of {LABEL_CELL} as height and width, got {tile!r}")
    return int(tile[0]), int(tile[1])


def _check_label_bands(value: object, transform: object) -> tuple[int | str, ...]:
    numbers = (value,) if isinstance(value, Integral | str) else value
    if (
        not isinstance(numbers, tuple | list)
        or len(numbers) not in (1, 3)
        or not all(
            isinstance(one, str)
            or (isinstance(one, Integral) and not isinstance(one, bool) and 0 <= int(one) < MAX_BANDS)
            for one in numbers
        )
    ):
        raise ConfigurationError(
            "label_bands: expected None, or one band or those that show red, green and blue, by name or by number from "
            f"0 on, such as (3, 2, 1); got {value!r}"
        )
    if transform == "features":
        raise ConfigurationError("label_bands: features are scored as they are; use transform='wavelet'")
    return tuple(one if isinstance(one, str) else int(one) for one in numbers)


def _check_embedding(value: object, semantics: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"embedding: expected True or False, got {value!r}")
    if value and semantics == "none":
        raise ConfigurationError(
            "embedding: semantics='none' computes nothing of what a chunk shows; use 'pre' or 'post'"
        )
    return value


def _check_hash(name: str, value: object) -> str:
    if not isinstance(value, str) or not _is_hash(value):
        raise ConfigurationError(f"{name}: expected a SHA-256 in lowercase hexadecimal (64 digits), got {value!r}")
    return value


def _check_head(value: object, decoder: object) -> str:
    if decoder is not None:  # metadata of a stored array, in which names mean nothing
        return _check_hash("head", value)
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"head: expected a name or a SHA-256 in lowercase hexadecimal, got {value!r}")
    return value


def _is_hash(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
