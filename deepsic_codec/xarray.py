"""Accessor `.deepsic` for xarray, registered by importing this module.

>>> import deepsic_codec.xarray  # doctest: +SKIP
>>> ds = xr.open_zarr("archive.zarr")  # doctest: +SKIP
>>> ds["image"].deepsic.where("Forest > 0.6 & ~Water").to_xarray()  # doctest: +SKIP
"""

from typing import Any

import zarr

from deepsic_codec.bulk.preview import thumbnail
from deepsic_codec.errors import LabelIndexError, UnsupportedArray
from deepsic_codec.labels import html
from deepsic_codec.labels.expression import Expression
from deepsic_codec.labels.open import open_labels
from deepsic_codec.labels.query import Labels
from deepsic_codec.labels.selection import Selection
from deepsic_codec.require import require
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.location import is_deepsic

require("xarray", "xarray")
import xarray as xr  # noqa: E402  # not before the message about its absence

NO_INDEX = "no index; consolidate_labels makes one, open_labels(scan=True) reads all headers"
MAX_LAYERS = 1000  # objects to look at for the array that xarray and Dask wrap


@xr.register_dataarray_accessor("deepsic")
class DeepSICAccessor:
    """The labels of a variable as xarray opened it from Zarr; a part or a result of a computation has none."""

    def __init__(self, variable: xr.DataArray) -> None:
        self._variable = variable

    @property
    def array(self) -> zarr.Array:
        """The array in the store; raises UnsupportedArray if the variable is not a whole array as it was opened."""
        array = _find_array(self._variable.variable._data)
        if array is None or array.shape != self._variable.shape:
            raise UnsupportedArray(
                f"variable {self._variable.name!r} is not a Zarr array as xarray opened it; use "
                "deepsic_codec.open_labels with the array itself"
            )
        return array

    def _repr_html_(self) -> str:
        array = self.array
        try:
            return open_labels(array)._repr_html_()
        except LabelIndexError:  # none yet
            stored = StoredArray(array)
            return html.table(html.about(stored) | {"labels": NO_INDEX}, thumbnail(stored))

    @property
    def labels(self) -> Labels:
        """The labels, from the index beside the array."""
        return open_labels(self.array)

    def open_labels(self, **kwargs: Any) -> Labels:
        """Open the labels with the options of `deepsic_codec.open_labels`: `index`, `scan`."""
        return open_labels(self.array, **kwargs)

    def preview(self, scale: int = 8, *, bytes_per_chunk: int | None = None, groups: int | None = None) -> xr.DataArray:
        """Return the variable with a part of its rows and columns, lazily: see `deepsic_codec.read_preview`.

        Coordinates are those of the first pixels of blocks. Limits reduce detail. Needs Dask.
        """
        from deepsic_codec import dask

        array = self.array
        axes, names = StoredArray(array).axes, self._variable.dims
        values = dask.open(array, scale=scale, bytes_per_chunk=bytes_per_chunk, groups=groups)
        sizes = dict(zip(names, values.shape, strict=True))
        parts = {names[axis]: slice(None, None, scale) for axis in (axes.y, axes.x)}
        thinned = self._variable.isel(parts).isel({name: slice(size) for name, size in sizes.items()})
        return thinned.copy(data=values)

    def where(self, expression: str | Expression, **kwargs: Any) -> Selection:
        """Select the chunks that satisfy an expression, as `Labels.where` does."""
        return self.labels.where(expression, **kwargs)


@xr.register_dataset_accessor("deepsic")
class DeepSICDatasetAccessor:
    """The variables of a dataset that are stored with DeepSIC."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    def preview(self, scale: int = 8, *, bytes_per_chunk: int | None = None, groups: int | None = None) -> xr.Dataset:
        """Return those variables with a part of their rows and columns, as `DeepSICAccessor.preview` does."""
        arrays = {name: _find_array(variable.variable._data) for name, variable in self._dataset.data_vars.items()}
        names = [name for name, array in arrays.items() if array is not None and is_deepsic(array)]
        if not names:
            raise UnsupportedArray("the dataset has no variable that is stored with DeepSIC, as it was opened")
        limits: Any = {"bytes_per_chunk": bytes_per_chunk, "groups": groups}
        reduced = {name: self._dataset[name].deepsic.preview(scale, **limits) for name in names}
        return xr.Dataset(reduced, attrs=self._dataset.attrs)


def _find_array(data: Any) -> zarr.Array | None:
    """Find the Zarr array that xarray wraps, directly or in a Dask graph; None if there is none."""
    pending = [data]
    for _ in range(MAX_LAYERS):
        if not pending:
            break
        node = pending.pop()
        if isinstance(node, zarr.Array):
            return node
        if hasattr(node, "dask") and hasattr(node, "name"):
            original = f"original-{node.name}"  # Dask's key of the array that this one, and no other, was made from
            pending += [value for key, value in dict(node.dask).items() if str(key) == original]
            continue
        # Layers of laziness in xarray, and Dask's wrapper of a literal object.
        for name in ("array", "_array", "value", "data"):
            inner = getattr(node, name, None)
            if inner is not None and inner is not node and not callable(inner):
                pending.append(inner)
    return None
