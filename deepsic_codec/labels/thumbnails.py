"""Thumbnails of regions of an array for notebooks, from the starts of chunks where these are enough."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import Index, Region
from deepsic_codec.codec.reduced import SCALES, decode_reduced, needed_length, parse_start
from deepsic_codec.errors import DeepSICError
from deepsic_codec.labels import html
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.embedded import use_embedded

COUNT, EDGE, GAP = 6, 64, 4  # thumbnails side by side; pixels of their longer edge, and between them
MAX_SAMPLES = 1 << 24  # of chunks that are decoded
PAPER, INK = 255, 128

Pixels = NDArray[np.uint8]


def thumbnails(stored: StoredArray, chunks: Sequence[Index], regions: Sequence[Region]) -> list[Pixels | None]:
    """Return a picture of each region of an array, with one stretch for all.

    Parameters
    ----------
    stored : StoredArray
        The array.
    chunks, regions : sequence
        The chunk that each region is in, and its slices; of several slices along t, z or n, the first is shown.

    Returns
    -------
    list of ndarray
        uint8 (height, width, 3). None for chunks that are missing, damaged, or need a model that is not installed;
        empty if decoding would take long.
    """
    if not regions or prod(stored.chunks) * len({*chunks}) > MAX_SAMPLES:
        return []
    axes = stored.axes
    longest = max(part[axis].stop - part[axis].start for part in regions for axis in (axes.y, axes.x))
    scale = max(one for one in SCALES if one == 1 or longest >= one * EDGE)
    decoded = _decode(stored, dict.fromkeys(chunks), scale)
    samples: list[NDArray[Any]] = []
    for index, region in zip(chunks, regions, strict=True):
        part: list[slice] = []
        for axis, (one, number, size) in enumerate(zip(region, index, stored.chunks, strict=True)):
            first, step = one.start - number * size, scale if axis in (axes.y, axes.x) else 1
            part.append(slice(first // step, -(-(one.stop - number * size) // step)))
        if index in decoded:
            samples.append(axes.to_samples(decoded[index][tuple(part)])[0])
    if not samples:
        return [None] * len(chunks)
    step = -(-max(max(one.shape[:2]) for one in samples) // EDGE)
    samples = [one[::step, ::step] for one in samples]
    flat = html.to_picture(np.concatenate([one.reshape(-1, one.shape[-1]) for one in samples]), stored)
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in samples])
    parts = zip(np.split(flat, ends[:-1]), samples, strict=True)
    pictures = iter([part.reshape(*one.shape[:2], 3) for part, one in parts])
    return [next(pictures) if index in decoded else None for index in chunks]


def _decode(stored: StoredArray, chunks: Iterable[Index], scale: int) -> dict[Index, NDArray[Any]]:
    """Return the chunks that can be decoded, at a part of their size: a notebook shows what it can."""
    with suppress(DeepSICError):
        use_embedded(stored.array)
    read = partial(stored.reader.read_as_needed, needed=partial(needed_length, scale=scale))
    decoded = {}
    for index, start in stored.reader.map(chunks, read, ignore=(DeepSICError,)):
        if start is not None:
            with suppress(DeepSICError):
                payload = parse_start(start, scale, stored.chunks, stored.array.dtype, stored.params)
                decoded[index] = decode_reduced(payload, scale)
    return decoded


def sheet(pictures: Sequence[Pixels | None]) -> Pixels | None:
    """Return pictures side by side, uint8 (height, width, 3), a cross in the place of None; None without any."""
    if all(picture is None for picture in pictures):
        return None
    side = EDGE + GAP
    result = np.full((EDGE, len(pictures) * side - GAP, 3), PAPER, np.uint8)
    for number, picture in enumerate(pictures):
        if picture is None:
            diagonal = np.eye(EDGE, dtype=bool)
            result[:, number * side : number * side + EDGE][diagonal | diagonal[::-1]] = INK
            continue
        result[: len(picture), number * side : number * side + picture.shape[1]] = picture
    return result
