"""NoData values for images whose alpha channel or mask says which pixels hold data."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.payload.value_range import full_range

if TYPE_CHECKING:
    import dask.array as da

# Values of an alpha channel that say "opaque", beside the largest of the dtype: channels may have fewer bits.
OPAQUE = (255, 1023, 4095, 16383, 32767, 65535)


class Summary:
    """What an alpha channel or mask says, and which values samples have, collected over the blocks of an image.

    Parameters
    ----------
    dtype : dtype
        Of the samples, one that the codec stores.
    declared : number, optional
        NoData value that the file declares beside its mask.

    Attributes
    ----------
    kind : {"opaque", "mask", "empty", "between"}
        All pixels hold data; some do, or all have one value; none does, though they differ; or the channel has values
        between.
    """

    def __init__(self, dtype: np.dtype[Any], declared: float | None = None) -> None:
        self.dtype, self.declared = dtype, declared
        self._levels: set[float] = set()  # of the alpha channel beside 0; more than one is too many
        self._has_valid = self._has_missing = False
        self._hidden: set[float] = set()  # samples of missing pixels; more than one is too many
        self._used: set[int] = set()  # values of samples that hold data; of large integers only those in question

    def add(self, values: NDArray[Any], valid: NDArray[np.bool_], channel: NDArray[Any] | None) -> None:
        """Add a block: samples (..., bands), where they hold data (...), and the alpha channel (...), if it is one."""
        if channel is not None and len(self._levels) < 2:
            self._levels.update(np.unique(channel[valid])[:2].tolist())
        self._has_valid |= bool(valid.any())
        self._has_missing |= not valid.all()
        if len(self._hidden) < 2:
            self._hidden.update(np.unique(values[~valid])[:2].tolist())
        data = values[valid]
        if self.dtype.kind in "iu" and self.dtype.itemsize < 4:
            self._used.update(np.unique(data).tolist())
        elif self.dtype.kind in "iu":
            self._used.update(value for value in self._choices if value not in self._used and value in data)

    @property
    def kind(self) -> str:
        """See the class."""
        top = 1.0 if self.dtype.kind == "f" else np.iinfo(self.dtype).max
        if len(self._levels) > 1 or self._levels - {top, *OPAQUE}:
            return "between"
        if not self._has_missing:
            return "opaque"
        return "mask" if self._has_valid or len(self._hidden) == 1 else "empty"

    def nodata(self) -> tuple[float, bool]:
        """Return a NoData value, and whether samples that hold data have it, too.

        It is the declared one, NaN for float32, else the value that all missing pixels have, 0, or the largest or
        smallest of the dtype; the first of these that no other sample has. If all are in use, it is any that is not.
        """
        if self.declared is not None:
            return self.declared, self.dtype.kind != "f" and int(self.declared) in self._used
        if self.dtype.kind == "f":
            return float("nan"), False
        low, high = full_range(self.dtype)
        hidden = self._hidden if len(self._hidden) == 1 and self.dtype.itemsize < 4 else ()
        others = range(low, high + 1) if self.dtype.itemsize < 4 else ()
        free = (int(value) for value in chain(hidden, self._choices, others) if int(value) not in self._used)
        return next(((value, False) for value in free), (0, True))

    @property
    def _choices(self) -> list[int]:
        low, high = full_range(self.dtype)
        return [int(self.declared)] if self.declared is not None else [0, high, low]


def join_values(values: Any, others: Sequence[float], nodata: float) -> "da.Array":
    """Return a Dask array with one NoData value for several. Equal arguments give an array of the same name."""
    from dask.base import tokenize

    name = f"nodata-{tokenize(values.name, list(others), nodata)}"
    join: Any = partial(_joined, others=tuple(others), nodata=nodata)
    joined: da.Array = values.map_blocks(join, dtype=values.dtype, meta=values._meta, name=name)
    return joined


def _joined(block: NDArray[Any], *, others: Sequence[float], nodata: float) -> NDArray[Any]:
    for value in others:
        missing = np.isnan(block) if value != value else block == block.dtype.type(value)
        block = np.where(missing, block.dtype.type(nodata), block)
    return block


def burn(values: NDArray[Any], valid: NDArray[np.bool_], nodata: float, shifted: bool) -> NDArray[Any]:
    """Return samples (..., bands) with the NoData value where `valid` (...) is False.

    With `shifted`, samples that hold data and have this value become the next one.
    """
    value = values.dtype.type(nodata)
    if shifted:
        step = -1 if nodata == np.iinfo(values.dtype).max else 1
        values = np.where(values == value, values.dtype.type(int(nodata) + step), values)
    return np.where(valid[..., None], values, value)
