"""Quality maps: which quality each pixel gets, from an array of the caller or from labels, and steps of cells."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import nan
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Axes
from deepsic_codec.codec.params import DEFAULT_QUALITY, CodecParams
from deepsic_codec.codec.scaled import ScaledChunk
from deepsic_codec.errors import ConfigurationError
from deepsic_codec.payload.constants import DEEP_QUALITY, LABEL_CELL, MIN_QUALITY
from deepsic_codec.payload.nodata import NoData
from deepsic_codec.payload.quality_map import CELL, SPACING, VALUES, QualityMap

#: float32 (slices, height, width, 1): qualities from 1 to 200, and 0 where errors do not matter.
Qualities = NDArray[np.float32]


class Condition(Protocol):
    """A condition on labels, such as an expression of `deepsic_codec.labels`."""

    def tiles(self, score: Callable[[str], NDArray[np.uint8]]) -> NDArray[np.bool_]:
        """Tell which tiles satisfy it; `score` returns the scores of a name."""


#: Conditions, and the quality of what satisfies them.
Keep = Sequence[tuple[Condition, float]]


def check_mapped(params: CodecParams) -> None:
    """Raise ConfigurationError for parameters that allow no quality map."""
    if params.transform == "features":
        raise ConfigurationError("quality_map, keep: features have one quality; use transform='wavelet' or 'auto'")
    for name in ("max_error", "psnr", "rmse"):
        if getattr(params, name) is not None:
            raise ConfigurationError(
                f"quality_map, keep: {name} is the same in all of a chunk; pass quality=, or bpp=, which scales the map"
            )


def check_quality(value: Any, name: str) -> float:
    """Return a quality of a map as a number; raises ConfigurationError unless it is 0, or 1 to 200."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else nan
    if number != 0 and not MIN_QUALITY <= number <= DEEP_QUALITY:
        raise ConfigurationError(f"{name}: expected a quality from 1 to {DEEP_QUALITY:g}, or 0, got {value!r}")
    return number


def map_on(values: Any, axes: Axes, shape: Sequence[int], params: CodecParams) -> NDArray[np.float32]:
    """Return the map of an array or a chunk.

    Parameters
    ----------
    values : array_like
        Qualities, or bool: True for the quality of `params`, False for 0. It has all axes but that of the bands, or y
        and x alone.
    axes : Axes
        Of the array.
    shape : sequence of int
        Of the array, or of a part of it.
    params : CodecParams
        Of the array.

    Returns
    -------
    ndarray
        float32 (all axes but that of the bands).

    Raises
    ------
    ConfigurationError
        If it has another shape or dtype, or other values.
    """
    others = [axis for axis in axes if axis != "c"]
    sizes = dict(zip(axes, shape, strict=True))
    expected = tuple(sizes[axis] for axis in others)
    flat = tuple(sizes[axis] for axis in others if axis in "yx")
    values = np.asarray(values)
    if values.shape not in (expected, flat):
        raise ConfigurationError(
            f"quality_map: expected an array of shape {expected}{'' if flat == expected else f' or {flat}'}, a quality "
            f"for each pixel, got shape {values.shape}"
        )
    if values.dtype.kind == "b":
        values = np.where(values, np.float32(params.quality or DEFAULT_QUALITY), np.float32(0))
    if values.dtype.kind not in "iuf":
        raise ConfigurationError(f"quality_map: expected numbers or bool, got {values.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        qualities = values.astype(np.float32)
        if not ((qualities == 0) | ((qualities >= MIN_QUALITY) & (qualities <= DEEP_QUALITY))).all():  # NaN neither
            raise ConfigurationError(f"quality_map: expected qualities from 1 to {DEEP_QUALITY:g}, or 0")
    if values.shape != expected:
        qualities = qualities.reshape([sizes[axis] if axis in "yx" else 1 for axis in others])
    return np.broadcast_to(qualities, expected)


def constant_quality(values: NDArray[np.float32]) -> float | None:
    """Return the only quality of a map; None if there are several, or if it is 0."""
    first = float(values.flat[0])
    return first if first and (values == values.flat[0]).all() else None


def kept_qualities(
    keep: Keep, score: Callable[[str], NDArray[np.uint8]], shape: tuple[int, int, int], others: Qualities | float
) -> Qualities:
    """Return the map of what labels find: the largest quality of the conditions that a label cell satisfies.

    Parameters
    ----------
    keep : sequence of (Condition, float)
        Conditions and qualities.
    score : callable
        Returns the scores (slices, rows, columns) of label cells for a name.
    shape : (int, int, int)
        Slices, height and width of the chunk.
    others : ndarray or float
        Qualities elsewhere.
    """
    best: Any = np.float32(-1)
    for condition, quality in keep:
        best = np.maximum(best, np.where(condition.tiles(score), np.float32(quality), np.float32(-1)))
    wide = best.repeat(LABEL_CELL, 1).repeat(LABEL_CELL, 2)[:, : shape[1], : shape[2], None]
    return np.where(wide >= 0, wide, others).astype(np.float32)


def cell_qualities(qualities: Qualities) -> NDArray[np.float32]:
    """Return the largest quality of the pixels of each cell, (slices, rows, columns)."""
    cells = qualities[..., 0]
    for axis in (1, 2):
        cells = np.maximum.reduceat(cells, np.arange(0, cells.shape[axis], CELL), axis=axis)
    return cells


def map_of(qualities: Qualities | None, finest: float, code: Callable[[float], int]) -> QualityMap | None:
    """Return the map of a chunk relative to its largest quality; None if all cells have its step."""
    if qualities is None:
        return None
    cells = cell_qualities(qualities)
    levels, numbers = np.unique(cells, return_inverse=True)
    first = code(finest)
    values = [0 if one == 0 else min(VALUES - 1, 1 + round((code(float(one)) - first) / SPACING)) for one in levels]
    if values == [1] * len(values):
        return None
    return QualityMap(np.array(values, np.uint8)[numbers].reshape(cells.shape))


def without_care(scaled: ScaledChunk) -> ScaledChunk:
    """Return a chunk in which pixels of quality 0 count as no data, so that they are filled."""
    assert scaled.qualities is not None
    ignored = scaled.qualities == 0
    if not ignored.any():
        return scaled
    if scaled.mask is not None:
        ignored = ignored | scaled.mask
    nodata = scaled.nodata or NoData(scaled.samples.dtype.type(0), False, None)
    return replace(scaled, nodata=replace(nodata, mask=np.broadcast_to(ignored, scaled.samples.shape)))
