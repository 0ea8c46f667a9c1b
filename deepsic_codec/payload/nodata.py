"""The nodata section of a payload: which samples hold no data, and the value that says so. See `docs/format.md`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from deepsic_codec.payload.header import Header

NONE, ALL, PIXELS, SAMPLES = 0, 1, 2, 3  # what the section has of a mask
DOWN = 4  # bit: data that would read as NoData becomes the next smaller value instead of the next larger one


@dataclass(frozen=True, eq=False)
class NoData:
    """Samples without data.

    Attributes
    ----------
    value : numpy.generic
        What they hold, of the chunk's dtype in the byte order of this machine.
    down : bool
        Whether data that came out as `value` becomes the next smaller value, not the next larger one.
    mask : ndarray or None
        bool (slices, height, width, bands), or 1 for the last if all bands agree; None if all samples are data.
    """

    value: Any
    down: bool
    mask: NDArray[np.bool_] | None

    @property
    def neighbour(self) -> Any:
        """What data becomes that came out as `value`; None for NaN, as data never comes out so."""
        return neighbour(self.value, self.down)

    def apply(self, samples: NDArray[Any]) -> None:
        """Put the value where there is no data and nowhere else, in place."""
        beside = self.neighbour
        if beside is not None:
            samples[samples == self.value] = beside
        if self.mask is not None:
            np.copyto(samples, self.value, where=self.mask)


def neighbour(value: Any, down: bool) -> Any:
    """Return the next value of the dtype; None for NaN, and where there is none."""
    dtype = value.dtype
    if dtype.kind == "f":
        beside = np.nextafter(value, dtype.type(-np.inf if down else np.inf))
        return beside if np.isfinite(beside) else None
    info = np.iinfo(dtype)
    number = int(value) + (-1 if down else 1)
    return dtype.type(number) if info.min <= number <= info.max else None


def encode_nodata(nodata: NoData) -> bytes:
    """Write a nodata section."""
    from deepsic_codec.payload.coders.mask import encode_mask  # with numba, which reading labels has no need of

    mask, kind, coded = nodata.mask, NONE, b""
    if mask is not None and mask.any():
        if mask.all():
            kind = ALL
        elif mask.shape[-1] == 1 or (mask == mask[..., :1]).all():
            kind, coded = PIXELS, encode_mask(np.ascontiguousarray(mask[..., 0]))
        else:
            planes = np.moveaxis(mask, -1, 1)
            kind, coded = SAMPLES, encode_mask(np.ascontiguousarray(planes).reshape(-1, *mask.shape[1:3]))
    value = np.asarray(nodata.value)
    return value.astype(value.dtype.newbyteorder("<")).tobytes() + bytes((kind | DOWN * nodata.down,)) + coded


def is_empty(data: bytes | None, header: Header) -> bool:
    """Tell whether a nodata section says that there is no data in the chunk; False without a section."""
    place = header.dtype.itemsize
    return data is not None and len(data) == place + 1 and data[place] & ~DOWN == ALL


def decode_nodata(data: bytes, header: Header) -> NoData:
    """Read a nodata section.

    Raises
    ------
    CorruptPayload
        If it is damaged, or not that of such a chunk.
    UnsupportedPayload
        If it has a mask of another kind.
    """
    from deepsic_codec.payload.coders.mask import decode_mask

    dtype = header.dtype.newbyteorder("<")
    if len(data) <= dtype.itemsize:
        raise CorruptPayload(f"nodata section: {len(data)} bytes, expected more than {dtype.itemsize}")
    value = np.frombuffer(data, dtype, 1).astype(dtype.newbyteorder("="))[0]
    kind, coded = data[dtype.itemsize], data[dtype.itemsize + 1 :]
    if kind > (DOWN | SAMPLES):
        raise UnsupportedPayload(f"nodata section: layout {kind:#04x}; upgrade deepsic_codec")
    down, kind = bool(kind & DOWN), kind & SAMPLES
    if np.isinf(value) or (value == value and neighbour(value, down) is None):
        raise CorruptPayload(f"nodata section: value {value}, beside which there is none for data")
    if kind in (NONE, ALL) and coded:
        raise CorruptPayload(f"nodata section: {len(coded)} bytes after a layout without a mask")
    shape = header.slices, header.height, header.width
    mask: NDArray[np.bool_] | None = None
    if kind == ALL:
        mask = np.broadcast_to(np.True_, (*shape, 1))
    elif kind == PIXELS:
        mask = decode_mask(coded, shape)[..., None]
    elif kind == SAMPLES:
        planes = decode_mask(coded, (shape[0] * header.channels, *shape[1:]))
        mask = np.moveaxis(planes.reshape(shape[0], header.channels, *shape[1:]), 1, -1)
    return NoData(value, down, mask)
