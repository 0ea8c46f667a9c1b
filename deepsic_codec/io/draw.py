"""Parts of pictures of archives: grey levels, tints, legends, captions."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.axes import ceil_div
from deepsic_codec.labels.colours import Colour

if TYPE_CHECKING:
    from PIL import Image as PillowImage
    from PIL import ImageFont

Pixels = NDArray[np.uint8]
PERCENTILES = (1.0, 99.0)
DARK_MEDIAN = 0.25  # as a part of white; an image whose median is below is dark
INK, PAPER, FAINT = (25, 25, 25), (255, 255, 255), (110, 110, 110)
FRAME = (255, 220, 0)  # around a part of an image
GAP = 8  # pixels
CHARACTER = 0.55  # average width of a character as a part of the font's size, at most


def stretch_limits(values: NDArray[Any]) -> list[tuple[float, float]]:
    """Return the values of each band (last axis) to show as black and white; NaN does not count."""
    limits = []
    for band in np.moveaxis(values, -1, 0):
        finite = band[np.isfinite(band)]
        low, high = np.percentile(finite, PERCENTILES).tolist() if finite.size else (0.0, 1.0)
        limits.append((low, high if high > low else low + 1))
    return limits


def to_grey_levels(values: NDArray[Any], limits: Sequence[tuple[float, float]], brighten: bool = False) -> Pixels:
    """Scale bands (..., n) between their limits to 0..255; NaN becomes 0.

    With `brighten`, an image whose median is dark, such as land between bright clouds, gets a gamma below 1.
    """
    low, high = np.array(limits, np.float32).T
    scaled = np.clip((values - low) / (high - low), 0, 1)
    if brighten and np.isfinite(scaled).any():
        median = float(np.nanmedian(scaled))
        if median < DARK_MEDIAN:
            gamma = max(0.4, np.log(DARK_MEDIAN) / np.log(max(median, 1e-3)))
            scaled = scaled**gamma
    return np.round(np.nan_to_num(scaled) * 255).astype(np.uint8)


def shrink(values: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """Resize bands (H, W, n): each new pixel is the mean of the pixels that it covers, without NaN."""
    from PIL import Image

    values = values.astype(np.float32)
    finite = np.isfinite(values)
    resample = Image.Resampling.BOX if values.shape[0] >= height else Image.Resampling.BILINEAR

    def resized(band: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(Image.fromarray(band.astype(np.float32)).resize((width, height), resample))

    bands = []
    for k in range(values.shape[2]):
        band = resized(np.where(finite[..., k], values[..., k], 0))
        if not finite[..., k].all():
            with np.errstate(invalid="ignore"):
                band = band / resized(finite[..., k])  # 0 / 0 is NaN
        bands.append(band)
    return np.stack(bands, axis=-1)


def tint(image: Pixels, numbers: NDArray[np.integer], palette: NDArray[np.uint8]) -> Pixels:
    """Colour an image by class, and draw a line where classes meet.

    Parameters
    ----------
    image : uint8 array (H, W, 3)
        The image.
    numbers : integer array (H, W)
        Class of each pixel, -1 for none.
    palette : uint8 array (classes, 3)
        Colours.
    """
    grey = image.astype(np.float32).mean(axis=-1, keepdims=True)
    base = 0.6 * grey + 0.4 * image  # less colourful, so that the colours of classes stand out
    coloured = 0.55 * base + 0.45 * palette[np.maximum(numbers, 0)]
    result = np.where(numbers[..., None] >= 0, coloured, image)
    edge = np.zeros(numbers.shape, np.bool_)
    edge[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    edge[1:] |= numbers[1:] != numbers[:-1]
    lines = np.where(numbers[..., None] >= 0, palette[np.maximum(numbers, 0)], 80)
    return np.where(edge[..., None], lines, result).round().astype(np.uint8)


def dim(image: Pixels, visible: NDArray[np.bool_]) -> Pixels:
    """Darken pixels where `visible` is False, and draw a line around the others."""
    dark = image.mean(axis=-1, keepdims=True) * 0.35
    result = np.where(visible[..., None], image, dark)
    inside = visible.copy()
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            inside &= np.roll(visible, step, axis)
    edge = visible & ~inside
    return np.where(edge[..., None], FRAME, result).round().astype(np.uint8)


def font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """Return Pillow's own font, which is the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def legend(entries: Mapping[str, Colour], notes: Mapping[str, str], width: int) -> "PillowImage.Image":
    """Draw a swatch, name and note for each class, in as many columns as fit into `width` pixels."""
    from PIL import Image, ImageDraw

    text = font(15)
    labels = {name: f"{name}  {notes.get(name, '')}".rstrip() for name in entries}
    cell = max([int(text.getlength(label)) for label in labels.values()], default=0) + 22 + 2 * GAP
    columns = max(1, width // cell)
    rows = ceil_div(len(labels), columns)
    image = Image.new("RGB", (width, max(1, rows * 24)), PAPER)
    draw = ImageDraw.Draw(image)
    for number, (name, label) in enumerate(labels.items()):
        x, y = number // rows * cell, number % rows * 24
        draw.rectangle((x, y + 4, x + 15, y + 19), entries[name], (60, 60, 60))
        draw.text((x + 22, y + 3), label, INK, text)
    return image


def sheet(parts: Iterable["PillowImage.Image | tuple[str, int, Colour]"], width: int) -> "PillowImage.Image":
    """Put images and texts (words, size, colour) below each other, on white with a margin."""
    from PIL import Image

    images = [_text(*part, width) if isinstance(part, tuple) else part for part in parts]
    result = Image.new("RGB", (width + 2 * GAP, sum(image.height + GAP for image in images) + GAP), PAPER)
    top = GAP
    for image in images:
        result.paste(image, (GAP, top))
        top += image.height + GAP
    return result


def _text(words: str, size: int, colour: Colour, width: int) -> "PillowImage.Image":
    from PIL import Image, ImageDraw

    lines = textwrap.wrap(words, round(width / (CHARACTER * size)))
    image = Image.new("RGB", (width, (size + 5) * len(lines)), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, (size + 5) * number), line, colour, font(size))
    return image


def side_by_side(images: Sequence["PillowImage.Image"]) -> "PillowImage.Image":
    """Put images beside each other, a gap between them."""
    from PIL import Image

    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + GAP
    return row
