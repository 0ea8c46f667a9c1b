"""The nodata section of a payload: which samples hold no data, and the value that says so. See `docs/format.md`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.fields import Header

NONE, ALL, PIXELS, SAMPLES = 0, 1, 2, 3  # layouts: what the mask covers
DOWN = 4  # bit: data equal to the NoData value becomes the next smaller value, not the next larger one


@dataclass(frozen=True, eq=False)
class NoData:
    """Samples without data.

    Attributes
    ----------
    value : numpy.generic
        The NoData value, of the chunk's dtype in the byte order of this machine.
    down : bool
        Whether data that decodes to `value` becomes the next smaller value, not the next larger one.
    mask : ndarray or None
        bool (slices, height, width, bands), or 1 for the last if all bands agree; None if all samples are data.
    """

    value: Any
    down: bool
    mask: NDArray[np.bool_] | None

    def apply(self, samples: NDArray[Any]) -> None:
        """Set samples under the mask to the NoData value, in place, and move all others off it."""
        neighbour = next_value(self.value, self.down)
        if neighbour is not None:  # data never decodes to NaN
            samples[samples == self.value] = neighbour
        if self.mask is not None:
            np.copyto(samples, self.value, where=self.mask)


def next_value(value: Any, down: bool) -> Any:
    """Return the next larger or smaller value of the dtype, None without a finite one or for NaN."""
    dtype = value.dtype
    if dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):  # of the largest number, or of a signalling NaN
            number = np.nextafter(value, dtype.type(-np.inf if down else np.inf))
        return number if np.isfinite(number) else None
    info = np.iinfo(dtype)
    integer = int(value) + (-1 if down else 1)
    return dtype.type(integer) if info.min <= integer <= info.max else None


def encode_nodata(nodata: NoData) -> bytes:
    """Write a nodata section."""
    from deepsic_codec.payload.coders.mask import encode_mask  # numba, which reading labels does not need

    mask, layout, coded = nodata.mask, NONE, b""
    if mask is not None and mask.any():
        if mask.all():
            layout = ALL
        elif mask.shape[-1] == 1 or (mask == mask[..., :1]).all():
            layout, coded = PIXELS, encode_mask(np.ascontiguousarray(mask[..., 0]))
        else:
            planes = np.moveaxis(mask, -1, 1)
            layout, coded = SAMPLES, encode_mask(np.ascontiguousarray(planes).reshape(-1, *mask.shape[1:3]))
    value = np.asarray(nodata.value)
    return value.astype(value.dtype.newbyteorder("<")).tobytes() + bytes((layout | DOWN * nodata.down,)) + coded


def is_empty(data: bytes | None, header: Header) -> bool:
    """Tell whether a nodata section marks all samples of the chunk; False for None, no section."""
    size = header.dtype.itemsize
    return data is not None and len(data) == size + 1 and data[size] & ~DOWN == ALL


def decode_value(data: bytes, header: Header) -> Any:
    """Read the NoData value of a section; raises CorruptPayload if it is truncated."""
    dtype = header.dtype.newbyteorder("<")
    if len(data) <= dtype.itemsize:
        raise CorruptPayload(f"nodata section: {len(data)} bytes, expected more than {dtype.itemsize}")
    return np.frombuffer(data, dtype, 1).astype(dtype.newbyteorder("="))[0]


def decode_nodata(data: bytes, header: Header) -> NoData:
    """Read a nodata section.

    Raises
    ------
    CorruptPayload
        If it is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it has a layout that this version does not know.
    """
    from deepsic_codec.payload.coders.mask import decode_mask

    value = decode_value(data, header)
    layout, coded = data[value.itemsize], data[value.itemsize + 1 :]
    if layout > (DOWN | SAMPLES):
        raise UnsupportedPayload(f"nodata section: unknown layout {layout:#04x}; upgrade deepsic_codec")
    down, layout = bool(layout & DOWN), layout & SAMPLES
    if np.isinf(value) or (value == value and next_value(value, down) is None):
        raise CorruptPayload(f"nodata section: value {value} has no neighbour that data could become")
    if layout in (NONE, ALL) and coded:
        raise CorruptPayload(f"nodata section: {len(coded)} bytes after a layout without a mask")
    shape = header.slices, header.height, header.width
    mask: NDArray[np.bool_] | None = None
    if layout == ALL:
        mask = np.broadcast_to(np.True_, (*shape, 1))
    elif layout == PIXELS:
        mask = decode_mask(coded, shape)[..., None]
    elif layout == SAMPLES:
        planes = decode_mask(coded, (shape[0] * header.channels, *shape[1:]))
        mask = np.moveaxis(planes.reshape(shape[0], header.channels, *shape[1:]), 1, -1)
    return NoData(value, down, mask)
