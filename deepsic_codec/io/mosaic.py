"""A mosaic of thumbnails of what a selection has, from the starts of chunks where these are enough."""

import warnings
from contextlib import suppress
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.bulk.preview import ReducedArray
from deepsic_codec.codec.reduced import SCALES
from deepsic_codec.errors import ConfigurationError, CorruptPayload, UnsupportedArray
from deepsic_codec.io import draw
from deepsic_codec.io.preview import to_pixels
from deepsic_codec.labels.selection import Selection
from deepsic_codec.require import require
from deepsic_codec.stored import embedded

if TYPE_CHECKING:
    from PIL import Image as PillowImage

COUNT, EDGE = 24, 128
MAX_COUNT, MAX_EDGE = 1000, 1024
CAPTION = 18  # pixels below a thumbnail
TEXT = 12


def mosaic(selection: Selection, count: int = COUNT, edge: int = EDGE) -> "PillowImage.Image":
    """Draw thumbnails of the first regions of a selection, with their scores.

    Parameters
    ----------
    selection : Selection
        Chunks, or label tiles; those of `similar` come best first.
    count : int
        Maximum number of thumbnails, 1 to 1000.
    edge : int
        Longer edge of a thumbnail in pixels, 16 to 1024.

    Returns
    -------
    PIL.Image.Image
        RGB. The caption of a thumbnail has the position of its chunk, and its first score or similarity. A cross is in
        the place of a chunk that is damaged, of which there is a warning.

    Raises
    ------
    ConfigurationError
        For a count or an edge outside of these limits.
    MissingPackage
        If Pillow is not installed.
    """
    require("cli", "PIL")
    from PIL import Image, ImageDraw

    if not 1 <= count <= MAX_COUNT or not 16 <= edge <= MAX_EDGE:
        raise ConfigurationError(f"mosaic: expected 1 to {MAX_COUNT} thumbnails of 16 to {MAX_EDGE} pixels")
    regions = selection.regions[:count]
    embedded.use_embedded(selection.stored.array)
    parts = [_samples_or_none(selection, region, edge) for region in regions]
    columns = max(1, min(len(parts), ceil(sqrt(len(parts) * 1.5))))
    rows = max(1, ceil(len(parts) / columns))
    sheet = Image.new("RGB", (columns * (edge + draw.GAP) + draw.GAP, rows * (edge + CAPTION) + draw.GAP), draw.PAPER)
    readable = [part for part in parts if part is not None]
    if not readable:
        return sheet
    # One stretch for all, so that dark regions look dark.
    flat = np.concatenate([part.reshape(-1, part.shape[-1]) for part in readable])
    pixels = to_pixels(flat.astype(np.float32), selection.stored)[0].reshape(len(flat), 3)
    captions, writer, start = _captions(selection, len(parts)), ImageDraw.Draw(sheet), 0
    for number, part in enumerate(parts):
        left = draw.GAP + number % columns * (edge + draw.GAP)
        top = draw.GAP + number // columns * (edge + CAPTION)
        writer.text((left, top + edge + 1), captions[number], draw.INK, draw.font(TEXT))
        if part is None:
            writer.line((left, top, left + edge, top + edge), draw.INK)
            writer.line((left, top + edge, left + edge, top), draw.INK)
            continue
        height, width = part.shape[:2]
        picture = Image.fromarray(pixels[start : start + height * width].reshape(height, width, 3))
        start += height * width
        zoom = edge / max(height, width)
        size = max(1, round(width * zoom)), max(1, round(height * zoom))
        sheet.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, top))
    return sheet


def _samples_or_none(selection: Selection, region: tuple[slice, ...], edge: int) -> NDArray[Any] | None:
    """Read a region; None with a warning if its chunk is damaged."""
    try:
        return _samples(selection, region, edge)
    except CorruptPayload as error:
        warnings.warn(f"mosaic: left out {error}", stacklevel=3)
        return None


def _samples(selection: Selection, region: tuple[slice, ...], edge: int) -> NDArray[Any]:
    """Read a region at the smallest size that has enough pixels, (height, width, 1 or 3), NaN without data."""
    stored = selection.stored
    axes = stored.axes
    longest = max(region[axis].stop - region[axis].start for axis in (axes.y, axes.x))
    for scale in reversed(SCALES):
        if scale > 1 and longest < scale * edge:
            continue
        with suppress(UnsupportedArray, ConfigurationError):
            reduced = ReducedArray(stored, scale)
            part = [
                slice(one.start, one.stop if axes[axis] in "yxc" else one.start + 1) for axis, one in enumerate(region)
            ]
            values = np.asarray(reduced[reduced.region_of(part)])
            break
    samples = axes.to_samples(values)[0]
    bands = samples.shape[-1]
    chosen = [band for band in stored.params.label_numbers or () if band < bands]
    samples = samples[..., chosen if len(chosen) in (1, 3) else [0, 1, 2] if bands >= 3 else [0]]
    nodata = stored.params.nodata
    if nodata is not None and nodata != "NaN":
        samples = np.where((samples == nodata).all(axis=-1, keepdims=True), np.float32(np.nan), samples)
    return samples


def _captions(selection: Selection, count: int) -> list[str]:
    table = selection.to_table()
    scores = next((table[name] for name in table if name == "similarity" or name.startswith("score")), None)
    texts = [str(chunk) for chunk in table["chunk"][:count]]
    return texts if scores is None else [f"{text}  {value:.2f}" for text, value in zip(texts, scores, strict=False)]
