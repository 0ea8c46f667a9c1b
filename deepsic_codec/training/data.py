"""Training images: decoded once into memory, cropped there.

Sources are folders or zip files.  A folder level that is named after a class makes an
image labelled when the source is given as labelled; other images are plain photographs.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
Pixels = NDArray[np.uint8]


def read_images(source: str | Path) -> Iterator[tuple[str, Pixels]]:
    """Name and RGB pixels (H,W,3) of every image in a folder or zip file, sorted by name."""
    source = Path(source)
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield str(path.relative_to(source)), _decode(path.read_bytes())
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if Path(name).suffix.lower() in SUFFIXES:
                    yield name, _decode(archive.read(name))
    else:
        raise ValueError(f"{source} is neither a folder nor a zip file")


def _decode(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


class Photographs:
    """Images without labels; gives random square crops.

    Parameters
    ----------
    sources : iterable of path
        Folders or zip files.
    held_out : int
        Every n-th image (n = total / held_out) is kept for choosing checkpoints.
    """

    def __init__(self, sources: Iterable[str | Path], held_out: int = 24) -> None:
        images = [pixels for source in sources for _, pixels in read_images(source)]
        if not images:
            raise ValueError("no images found in the training sources")
        every = max(1, len(images) // max(1, held_out))
        self.held_out = images[::every][:held_out]
        self.train = [im for i, im in enumerate(images) if i % every or i // every >= held_out]

    def crops(self, count: int, size: int, rng: np.random.Generator, jitter: bool = True) -> Pixels:
        """(count, size, size, 3) crops with flips, quarter turns and, half the time, reduction."""
        out = np.empty((count, size, size, 3), np.uint8)
        for i in range(count):
            image = self.train[rng.integers(len(self.train))]
            shortest = min(image.shape[:2])
            side = size
            if jitter and rng.random() < 0.5:
                side = int(rng.uniform(size, min(2 * size, max(size, shortest)) + 1))
            if shortest < side:
                reps = -(-side // shortest)
                image = np.tile(image, (reps, reps, 1))
            y, x = (int(rng.integers(n - side + 1)) for n in image.shape[:2])
            crop = image[y : y + side, x : x + side]
            if side != size:
                crop = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.LANCZOS))
            out[i] = orient(crop, rng)
        return out


class LabelledTiles:
    """Small square images in class folders (``.../<Class>/<file>``), all of one size."""

    def __init__(self, sources: Iterable[str | Path], held_out: float = 0.05, seed: int = 0) -> None:
        pairs = [(Path(name).parent.name, px) for source in sources for name, px in read_images(source)]
        if not pairs:
            raise ValueError("no labelled images found: expected <Class>/<image> below each source")
        self.classes = sorted({name for name, _ in pairs})
        labels = np.array([self.classes.index(name) for name, _ in pairs])
        pixels = np.stack([px for _, px in pairs])
        order = np.random.default_rng(seed).permutation(len(pairs))
        cut = int(len(pairs) * held_out)
        self.test_pixels, self.test_labels = pixels[order[:cut]], labels[order[:cut]]
        self.pixels, self.labels = pixels[order[cut:]], labels[order[cut:]]

    def mosaics(self, count: int, tiles: int, rng: np.random.Generator) -> tuple[Pixels, NDArray[np.int64]]:
        """``count`` images of tiles x tiles random tiles, and their labels (count, tiles, tiles)."""
        pick = rng.integers(len(self.labels), size=(count, tiles, tiles))
        size = self.pixels.shape[1]
        out = np.empty((count, tiles * size, tiles * size, 3), np.uint8)
        for n, i, j in np.ndindex(count, tiles, tiles):
            tile = orient(self.pixels[pick[n, i, j]], rng)
            out[n, i * size : (i + 1) * size, j * size : (j + 1) * size] = tile
        return out, self.labels[pick]


def orient(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Random flip and quarter turn of a square image."""
    image = np.rot90(image, int(rng.integers(4)))
    return image[:, ::-1] if rng.random() < 0.5 else image
