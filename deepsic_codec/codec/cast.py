"""Samples of bool, of 32 and of 64 bits to those that are coded: uint8, uint16 or float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.codec.params import NAN, CodecParams
from deepsic_codec.codec.scaled import ELSEWHERE, nodata_value
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.payload.cast import CAST_DTYPES, Cast

MAX_UINT16 = 65535
MAX_SPAN = 1 << 31  # of integers as float32
EXACT = 0.49  # error of a float that still rounds to its integer
MIN_LEVELS = 64  # numbers of float32 between the ends of a chunk's values, unless these are all the same


def narrow(params: CodecParams, array: NDArray[Any]) -> tuple[CodecParams, NDArray[Any], Cast | None]:
    """Return a chunk in the dtype in which it is coded, with parameters in its units, and what undoes that, if needed.

    Raises
    ------
    UnsupportedArray
        If the values do not fit within the bound on the error.
    """
    native = array.dtype.newbyteorder("=")
    if native not in CAST_DTYPES:
        return params, array, None
    value = None if params.nodata is None else nodata_value(params, native)
    make = _from_floats if native.kind == "f" else _from_integers
    return make(params, array.astype(native, copy=False), value, array.dtype)


def _from_integers(
    params: CodecParams, array: NDArray[Any], value: Any, dtype: np.dtype[Any]
) -> tuple[CodecParams, NDArray[Any], Cast]:
    assert params.max_error is not None  # `check_values` saw to it
    array = array.view(np.uint8) if dtype.kind == "b" else array
    missing = None if value is None else array == value
    data = array if missing is None else array[~missing]
    number = None if value is None else int(value)
    low, high = (int(data.min()), int(data.max())) if data.size else (number or 0,) * 2
    if number is not None and max(high, number) - min(low, number) <= MAX_UINT16:
        low, high = min(low, number), max(high, number)
    remapped = number is not None and not low <= number <= high
    top = high + remapped  # a NoData value far away becomes the one after the largest
    offset = 0 if low >= 0 and top <= MAX_UINT16 else low
    if top - offset <= MAX_UINT16:
        coded = (array - array.dtype.type(offset)).astype(np.uint8 if top - offset < 256 else np.uint16)
        if remapped:
            coded[missing] = top - offset
        nodata = None if number is None else top - offset if remapped else number - offset
        changed = params.changed(value_range=None, nodata=nodata)
        return changed, coded, Cast(dtype, offset, value if remapped else None)
    bound = int(params.max_error)
    if number is not None and low - bound <= number <= high + bound:
        bound = 0  # no sample may become the NoData value
    wide = (array - array.dtype.type(low)).view(f"u{dtype.itemsize}").astype(np.float64)
    if missing is not None:
        wide[missing] = np.nan
    floats = wide.astype(np.float32)
    room = (bound or EXACT) - float(np.nanmax(np.abs(floats - wide)))
    if room <= 0 or high - low >= MAX_SPAN:
        raise UnsupportedArray(
            f"values of the chunk lie between {low} and {high}, which neither 16 bits nor float32 hold within a "
            f"max_error of {params.max_error}; pass a larger max_error, or use {ELSEWHERE}"
        )
    changed = params.changed(value_range=None, max_error=room, nodata=None if value is None else NAN)
    return changed, floats, Cast(dtype, low, value)


def _from_floats(
    params: CodecParams, array: NDArray[Any], value: Any, dtype: np.dtype[Any]
) -> tuple[CodecParams, NDArray[Any], Cast]:
    data = ~np.isnan(array) if value is None or value != value else array != value
    with np.errstate(over="ignore"):
        floats = array.astype(np.float32)
        remapped = value is not None and value == value and float(np.float32(value)) != value
    errors = np.abs(floats - array, where=data, out=np.zeros(array.shape))
    error, extent = float(errors.max()), float(np.ptp(array[data])) if data.any() else 0.0
    room = None if params.max_error is None else params.max_error - error
    if room <= 0 if room is not None else error * MIN_LEVELS > extent and (extent or np.isinf(error)):
        raise UnsupportedArray(
            f"float64 is stored as float32, from which samples of the chunk differ by up to {error:.3g}; "
            + ("pass a larger max_error, " if room is not None else "subtract an offset, such as their mean, ")
            + f"or use {ELSEWHERE}"
        )
    if room is not None:
        params = params.changed(max_error=room)
    if remapped:
        floats[~data] = np.nan
        params = params.changed(nodata=NAN)
    return params, floats, Cast(dtype, 0, value if remapped else None)
