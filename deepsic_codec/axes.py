"""Axes of arrays: which axis is where, sizes by axis, grids of chunks, and the order in which networks see samples."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

from numpy.typing import NDArray

Index = tuple[int, ...]
Region = tuple[slice, ...]


class Axes(str):
    """The axes of an array as a string with one letter for each, such as "tyxc".

    Letters are y (rows), x (columns), c (bands) and t, z, n, which all count slices: images of their own. Every array
    has y and x; without c it has one band.

    Methods that take a shape take that of an array or a chunk with these axes.
    """

    __slots__ = ()

    @property
    def y(self) -> int:
        """Number of the axis of rows."""
        return self.index("y")

    @property
    def x(self) -> int:
        """Number of the axis of columns."""
        return self.index("x")

    @property
    def c(self) -> int | None:
        """Number of the axis of bands, None without one."""
        number = self.find("c")
        return None if number < 0 else number

    @property
    def slice_axes(self) -> str:
        """Letters of the axes that count slices, in the order of the array."""
        return "".join(axis for axis in self if axis not in "yxc")

    @property
    def image_order(self) -> "Axes":
        """The same axes as networks see them: slices, rows, columns, bands."""
        return Axes(self.slice_axes + "yx" + ("c" if "c" in self else ""))

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """Return the size of each axis by its letter."""
        return dict(zip(self, shape, strict=True))

    def height(self, shape: Sequence[int]) -> int:
        """Return the number of rows."""
        return shape[self.y]

    def width(self, shape: Sequence[int]) -> int:
        """Return the number of columns."""
        return shape[self.x]

    def bands(self, shape: Sequence[int]) -> int:
        """Return the number of bands, 1 without an axis c."""
        return 1 if self.c is None else shape[self.c]

    def slice_shape(self, shape: Sequence[int]) -> Index:
        """Return the sizes of the axes that count slices."""
        return tuple(shape[self.index(axis)] for axis in self.slice_axes)

    def slices(self, shape: Sequence[int]) -> int:
        """Return the number of slices, 1 without an axis that counts them."""
        return prod(self.slice_shape(shape))

    def pixels(self, shape: Sequence[int]) -> int:
        """Return the number of pixels in all slices; a pixel has all bands."""
        return self.slices(shape) * self.height(shape) * self.width(shape)

    def to_image_order(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array with its axes in `image_order`."""
        return array.transpose([self.index(axis) for axis in self.image_order])

    def from_image_order(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array whose axes are in `image_order`, in the order of these axes."""
        return array.transpose([self.image_order.index(axis) for axis in self])

    def to_samples(self, array: NDArray[Any]) -> NDArray[Any]:
        """Arrange an array of any strides as samples.

        Parameters
        ----------
        array : ndarray
            With these axes.

        Returns
        -------
        ndarray
            (slices, height, width, bands), a view where possible.
        """
        samples = self.to_image_order(array)
        if self.c is None:
            samples = samples[..., None]
        return samples.reshape(-1, *samples.shape[-3:])

    def from_samples(self, samples: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """Undo `to_samples`.

        Parameters
        ----------
        samples : ndarray
            (slices, height, width, bands).
        shape : sequence of int
            Shape of the result.

        Returns
        -------
        ndarray
            With these axes, a view where possible.
        """
        return self.from_image_order(samples.reshape([shape[self.index(axis)] for axis in self.image_order]))


#: Names of dimensions, and the axes that they mean.
DIMENSIONS = {
    **dict.fromkeys(("y", "lat", "latitude", "northing", "row", "rows", "height"), "y"),
    **dict.fromkeys(("x", "lon", "longitude", "easting", "col", "cols", "column", "columns", "width"), "x"),
    **dict.fromkeys(("c", "band", "bands", "channel", "channels", "wavelength", "rgb"), "c"),
    **dict.fromkeys(("t", "time"), "t"),
    **dict.fromkeys(("z", "depth", "level"), "z"),
    **dict.fromkeys(("n", "image", "sample"), "n"),
}


def axes_of_names(names: Sequence[Any]) -> Axes | None:
    """Return the axes that dimensions are named for; None if a name is unknown or two mean the same axis."""
    letters = [DIMENSIONS.get(str(name).lower(), "") for name in names]
    if "" in letters or not {"y", "x"} <= set(letters) or len(set(letters)) < len(letters):
        return None
    return Axes("".join(letters))


def axes_of_number(number: int) -> Axes:
    """Return the axes of arrays with this number of dimensions, where nothing says more."""
    return Axes("yx" if number == 2 else "yxc")


def is_implausible(axes: str, shape: Sequence[int]) -> bool:
    """Tell whether the bands of a chunk are more probably the columns of an image, with its bands or slices first.

    Chunks have as many rows as columns as a rule, so that bands equal to the columns beside few rows mean (c, y, x).
    """
    if axes != "yxc" or len(shape) != 3:
        return False
    rows, columns, bands = shape
    return bands > 16 and bands == columns and 2 * rows <= bands


def ceil_div(a: int, b: int) -> int:
    """Divide integers and round up."""
    return -(-a // b)


def grid_shape(shape: Sequence[int], chunks: Sequence[int]) -> Index:
    """Return the number of chunks along each axis; the last one may reach beyond the array."""
    return tuple(ceil_div(size, chunk) for size, chunk in zip(shape, chunks, strict=True))


def chunk_region(index: Sequence[int], chunks: Sequence[int], shape: Sequence[int]) -> Region:
    """Return the part of an array of this shape that a chunk covers."""
    return tuple(
        slice(i * chunk, min((i + 1) * chunk, size)) for i, chunk, size in zip(index, chunks, shape, strict=True)
    )


def chunks_covering(region: Region, chunks: Sequence[int]) -> tuple[Index, Index]:
    """Return the first chunk of a region, and one past its last, along each axis."""
    start = tuple(part.start // chunk for part, chunk in zip(region, chunks, strict=True))
    return start, tuple(ceil_div(part.stop, chunk) for part, chunk in zip(region, chunks, strict=True))


def iter_grid(start: Sequence[int], stop: Sequence[int]) -> Iterator[Index]:
    """Iterate over the positions from `start` to `stop`, the last axis fastest."""
    return product(*(range(first, last) for first, last in zip(start, stop, strict=True)))


def row_blocks(shape: Sequence[int], pixels: int = 1 << 16) -> Iterator[tuple[int, slice]]:
    """Yield the number of a slice and its rows, a block of about `pixels`, of samples (slices, height, width, ...).

    What is computed block by block takes memory for a block only.
    """
    slices, height, width = shape[:3]
    rows = max(1, pixels // max(1, width))
    for number in range(slices):
        for top in range(0, height, rows):
            yield number, slice(top, min(top + rows, height))
