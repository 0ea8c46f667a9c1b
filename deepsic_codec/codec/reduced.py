"""Chunks at a reduced size: wavelets decode to it from the start of a payload, others are decoded and averaged."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.codec.decode import PayloadToDecode, decode_coded, decode_samples, parse_unpacked
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.wavelet import decode_wavelet
from deepsic_codec.errors import ConfigurationError, CorruptPayload
from deepsic_codec.payload.fields import Header
from deepsic_codec.payload.header import Payload, read_header, read_verified, unpack
from deepsic_codec.payload.nodata import NoData, decode_nodata
from deepsic_codec.payload.sections import CAST, FEATURES, RESIDUAL, STRUCTURE, WAVELET
from deepsic_codec.payload.structure import Grid, grids_length, nodata_on_grid, table_length, verified_grids
from deepsic_codec.payload.wavelet import checksums_length, start_length, verified_start

#: Divisors of rows and columns.
SCALES = (1, 2, 4, 8, 16)


def check_scale(scale: Any) -> None:
    """Raise ConfigurationError for a divisor that there is not."""
    if isinstance(scale, bool) or scale not in SCALES:
        raise ConfigurationError(f"scale: expected one of {', '.join(map(str, SCALES))}, got {scale!r}")


def needed_length(start: bytes, header: Header, scale: int, limit: int | None = None, groups: int | None = None) -> int:
    """Return the bytes of a payload that a reduced size needs, or first, for another call, more of its start.

    Parameters
    ----------
    start : bytes
        The payload's first bytes, its header at least.
    header : Header
        That header.
    scale : int
        One of `SCALES`.
    limit : int, optional
        Return no more bytes than these, as far as they can be verified, but the fewest that can, and whole payloads of
        which no part can.
    groups : int, optional
        The same of the number of parts of the payload that can be verified one after another.
    """
    entry = header.entry(WAVELET.kind)
    gridded = entry is None and header.entry(FEATURES.kind) is None and header.entry(RESIDUAL.kind) is None
    if gridded:
        entry = header.entry(STRUCTURE.kind)
    limited = (limit is not None and limit < header.nbytes) or groups is not None
    if entry is None or header.entry(CAST.kind) is not None or (scale == 1 and not limited):  # a cast comes last
        return header.nbytes
    data = start[entry.offset :]
    end = table_length(data, header, entry.length) if gridded else checksums_length(data, entry.length)
    if len(data) < end:
        return entry.offset + end
    rest = None if limit is None else limit - entry.offset
    if gridded:
        return entry.offset + grids_length(data, header, entry.length, scale, rest, groups)
    return entry.offset + start_length(data[:end], entry.length, scale, rest, groups)


def parse_start(
    start: Any,
    scale: int,
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype[Any] | None = None,
    params: CodecParams | None = None,
    limit: int | None = None,
    groups: int | None = None,
) -> PayloadToDecode:
    """Verify a payload, or as much of its start as a reduced size needs, or as `needed_length` says of limits.

    Takes the other arguments of `parse_payload`, and raises its errors; also CorruptPayload if more bytes are needed.
    """
    view = memoryview(start).cast("B")
    header = read_header(view)
    if len(view) >= header.nbytes:
        return parse_unpacked(unpack(view), shape, dtype, params)
    needed = needed_length(bytes(view), header, scale, limit, groups)
    if len(view) < needed:
        raise CorruptPayload(f"payload: {len(view)} bytes, 1/{scale} of the size needs {needed} of {header.nbytes}")
    sections: dict[int, bytes] = {}
    whole: tuple[bool, ...] = ()
    started = False
    for entry in header.sections:
        if entry.offset + entry.length <= len(view):
            sections[entry.kind] = read_verified(view, entry)
        elif entry.kind == WAVELET.kind:
            sections[entry.kind] = verified_start(bytes(view[entry.offset : needed]), entry.length)
            started = True
        elif entry.kind == STRUCTURE.kind:
            sections[entry.kind], whole = verified_grids(bytes(view[entry.offset : needed]), header)
    payload = parse_unpacked(Payload(header, sections), shape, dtype, params)
    if whole:
        parts = zip(payload.parts, whole, strict=True)
        return replace(payload, parts=tuple(part if one else _started(part) for part, one in parts))
    return _started(payload) if started else payload


def _started(payload: PayloadToDecode) -> PayloadToDecode:
    """Return a payload, or a grid, whose wavelet is a start."""
    assert payload.wavelet is not None
    return replace(payload, wavelet=replace(payload.wavelet, whole=False))


def decode_reduced(payload: PayloadToDecode, scale: int) -> NDArray[Any]:
    """Decode a chunk to the means of blocks of pixels, about.

    Parameters
    ----------
    payload : PayloadToDecode
        Of `parse_start` with this scale; without all bytes that the scale needs, details are missing.
    scale : int
        One of `SCALES`: rows and columns in one of the result. Blocks at the ends may have fewer.

    Returns
    -------
    ndarray
        The chunk with ceil(rows / scale) rows and columns likewise. A pixel without data is one whose block has none.

    Raises
    ------
    CorruptPayload
        If a section is damaged.
    """
    header, nodata = payload.header, payload.nodata()
    if scale == 1 or (payload.wavelet is None and not payload.parts):
        samples = header.axes.to_samples(decode_coded([payload])[0])
        samples = _averaged(samples, scale, None if nodata is None else nodata.mask)
    else:
        samples = _reduced(payload, scale, nodata)
    if nodata is not None:
        samples = np.ascontiguousarray(samples)
        _apply(nodata, samples, scale)
    sizes = dict(zip(header.axes, header.shape, strict=True))
    sizes |= {axis: ceil_div(sizes[axis], scale) for axis in "yx"}
    chunk = header.axes.from_samples(samples, [sizes[axis] for axis in header.axes])
    return payload.restore(np.ascontiguousarray(chunk, header.dtype))


def _reduced(payload: PayloadToDecode, scale: int, nodata: NoData | None) -> NDArray[Any]:
    """Return samples (slices, rows, columns, bands) of a payload or a grid; those without data are any.

    `nodata` is that of what has no wavelet.
    """
    header, structure = payload.header, payload.structure
    if payload.parts:
        assert structure is not None
        shape = (header.slices, ceil_div(header.height, scale), ceil_div(header.width, scale), header.channels)
        joined = np.empty(shape, header.dtype.newbyteorder("="))
        for grid, part in zip(structure.grids, payload.parts, strict=True):
            of_grid = None if nodata is None else nodata_on_grid(nodata, grid)
            joined[..., list(grid.bands)] = _from_grid(_reduced(part, grid.scale(scale), of_grid), grid, header, scale)
        return joined
    if payload.wavelet is None:
        samples = decode_samples(payload, nodata)
        return _averaged(samples, scale, None if nodata is None else nodata.mask)
    shape = (header.slices, header.height, header.width, header.channels)
    halvings = SCALES.index(scale)
    samples, rest = decode_wavelet(
        payload.wavelet, payload.matrix, shape, header.dtype, payload.ranges, payload.quality_map, halvings
    )
    samples = _averaged(samples, scale >> (halvings - rest), None) if rest else samples
    if structure is not None and structure.padding:
        samples = np.ascontiguousarray(samples)
        _apply(decode_nodata(structure.padding, header), samples, scale)
    return samples


def _from_grid(samples: NDArray[Any], grid: Grid, header: Header, scale: int) -> NDArray[Any]:
    """Return means over blocks of a chunk, from samples of a grid at the reduced size of use to it."""
    pitch = grid.factor * grid.scale(scale)  # rows and columns of the chunk in one of the samples
    dtype = samples.dtype
    for axis, (size, phase) in enumerate(zip((header.height, header.width), grid.phase, strict=True), 1):
        starts = np.arange(0, size, scale) + phase
        stops = np.minimum(starts + scale, size + phase)
        first, last = starts // pitch, (stops - 1) // pitch
        shape = [-1 if n == axis else 1 for n in range(4)]
        if not (last > first).any():
            samples = samples.take(first, axis)
            continue
        total: Any = 0
        for pixel in (first + n for n in range(int((last - first).max()) + 1)):
            covered = (np.minimum(stops, (pixel + 1) * pitch) - np.maximum(starts, pixel * pitch)).clip(0)
            weights = (covered / (stops - starts)).reshape(shape)
            total = total + weights * samples.take(np.minimum(pixel, last), axis)
        samples = total
    return samples.astype(dtype) if dtype.kind == "f" or samples.dtype == dtype else np.rint(samples).astype(dtype)


def _blocks(values: NDArray[Any], scale: int) -> NDArray[Any]:
    """Return values (slices, rows, columns, bands) as (slices, rows, scale, columns, scale, bands), 0 past the ends."""
    slices, height, width, bands = values.shape
    padded = np.pad(values, [(0, 0), (0, -height % scale), (0, -width % scale), (0, 0)])
    return padded.reshape(slices, ceil_div(height, scale), scale, ceil_div(width, scale), scale, bands)


def _averaged(samples: NDArray[Any], scale: int, mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return the means of blocks of samples, of those that are data; 0 of a block without."""
    if scale == 1:
        return samples
    valid = np.ones(samples.shape, bool) if mask is None else ~np.broadcast_to(mask, samples.shape)
    counts = _blocks(valid, scale).sum(axis=(2, 4))
    means = _blocks(np.where(valid, samples, 0).astype(np.float64), scale).sum(axis=(2, 4)) / np.maximum(counts, 1)
    return means.astype(samples.dtype) if samples.dtype.kind == "f" else np.rint(means).astype(samples.dtype)


def _apply(nodata: NoData, samples: NDArray[Any], scale: int) -> None:
    """Apply NoData, or padding, to the means of blocks; the mask holds where it is set in a whole block."""
    mask = None if nodata.mask is None else _blocks(~nodata.mask, scale).sum(axis=(2, 4)) == 0
    NoData(nodata.value, nodata.down, mask).apply(samples)
