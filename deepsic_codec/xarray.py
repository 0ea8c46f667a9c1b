"""Accessor ``.deepsic`` for xarray, registered by importing this module.

>>> import deepsic_codec.xarray  # doctest: +SKIP
>>> ds = xr.open_zarr("archive.zarr")  # doctest: +SKIP
>>> ds["image"].deepsic.where("Forest > 0.6 & ~Water").to_xarray()  # doctest: +SKIP
"""

from typing import Any

import xarray as xr
import zarr

from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.labels.expression import Expression
from deepsic_codec.labels.query import Labels, Selection, open_labels


@xr.register_dataarray_accessor("deepsic")
class DeepSICAccessor:
    """Labels of a variable that was opened from Zarr, as it was opened: not of a part or a result of computing."""

    def __init__(self, variable: xr.DataArray) -> None:
        self._variable = variable

    @property
    def array(self) -> zarr.Array:
        """The array in the store; raises UnsupportedArray if the variable is not one as it was opened."""
        found = _stored(self._variable.variable._data)
        if found is None or found.shape != self._variable.shape:
            raise UnsupportedArray(
                f"variable {self._variable.name!r} is not a Zarr array as xarray opened it; use "
                "deepsic_codec.open_labels with the array itself"
            )
        return found

    @property
    def labels(self) -> Labels:
        """The labels, from the index beside the array."""
        return open_labels(self.array)

    def open_labels(self, **kwargs: Any) -> Labels:
        """Open the labels with the options of `deepsic_codec.open_labels`: `index`, `scan`."""
        return open_labels(self.array, **kwargs)

    def where(self, expression: str | Expression, **kwargs: Any) -> Selection:
        """Select the chunks that satisfy an expression, as `Labels.where` does."""
        return self.labels.where(expression, **kwargs)


def _stored(data: Any) -> zarr.Array | None:
    """Find the Zarr array within what xarray wraps it in, directly or in a Dask graph."""
    pending, seen = [data], 0
    while pending and seen < 1000:
        node, seen = pending.pop(), seen + 1
        if isinstance(node, zarr.Array):
            return node
        if hasattr(node, "dask") and hasattr(node, "name"):
            original = f"original-{node.name}"  # what Dask calls the array that this one, and no other, was made from
            pending += [value for key, value in dict(node.dask).items() if str(key) == original]
            continue
        # Layers of laziness in xarray, and the box that Dask puts an object in.
        for name in ("array", "_array", "value", "data"):
            inner = getattr(node, name, None) if not callable(getattr(node, name, None)) else None
            if inner is not None and inner is not node:
                pending.append(inner)
    return None
