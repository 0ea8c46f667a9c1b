"""Label cells to train a head on: latents of crops of labelled images, at random scales, orientations and qualities."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.io.images import Pixels
from deepsic_codec.model.cpu.scheduler import CpuScheduler
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.training.data import jittered, read_images
from deepsic_codec.training.heads import CellSet, Marks

#: Qualities of latents: log-uniform between these.
QUALITIES = (3.0, 90.0)
#: Share of cells from decoded latents, and of those that the encoder chose with its rate-distortion optimisation; the
#: others are rounded with a dead zone, which is nearly the same and takes a tenth of the time.
STORED, OPTIMISED = 0.5, 0.2
DEAD_ZONE = (0.3, 0.5)
#: Share of grey images, and variation of light (`data.jittered`).
GREY, JITTER = 0.07, 0.5
#: Smallest crop of an image, as a share of its shorter side: labels are those of whole images.
LEAST_LABELLED, LEAST_OTHER = 0.45, 0.12
#: Cells along an edge of what is encoded together: a single cell, a crop of a scene, a mosaic of small images.
SINGLE, SCENE, MOSAIC = 1, 2, 4

Images = list[tuple[str, Pixels]]


def read_source(source: str | Path, split: str = "") -> Images:
    """Return the images of a source whose path starts with a split such as "train/"; all if there are none of it."""
    images = list(read_images(source))
    return [pair for pair in images if pair[0].startswith(split)] or images


def labelled(images: Images, known: Marks) -> tuple[Images, NDArray[np.int64]]:
    """Return the images that a data set of the tree has, and their marks.

    Raises
    ------
    ConfigurationError
        If there are none.
    """
    kept, marks = [], []
    for name, pixels in images:
        path = Path(name)
        place = known.tree.locate(path.parent.name, path.name)
        if place is not None:
            kept.append((name, pixels))
            marks.append(known.pairs.index(place))
    if not kept:
        raise ConfigurationError("--labels: no image lies in a folder that the tree names as a class of a data set")
    return kept, np.array(marks)


def random_cells(image: Pixels, least: float, rng: np.random.Generator, edge: int = SINGLE) -> Pixels:
    """Return a crop of an image as so many cells along an edge: turned, in other light, at times grey.

    `least` is the smallest crop as a share of the shorter side of the image.
    """
    from PIL import Image

    side = edge * LABEL_CELL
    height, width = image.shape[:2]
    short = min(height, width)
    low = min(short, max(0.75 * LABEL_CELL, least * short))
    size = short if rng.random() < 0.25 else float(np.exp(rng.uniform(np.log(low), np.log(short))))
    x, y = rng.uniform(0, width - size), rng.uniform(0, height - size)
    box = (x, y, x + size, y + size)
    crop = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box=box))
    turn = int(rng.integers(8))
    crop = np.rot90(crop, turn & 3)[:, :: -1 if turn & 4 else 1]
    if edge == SINGLE:
        values = jittered(torch.from_numpy(np.array(crop))[None].float(), JITTER, rng)[0].numpy()
    else:
        values = crop * rng.uniform(1 - 0.3 * JITTER, 1 + 0.3 * JITTER) + rng.uniform(-16, 16) * JITTER
    if rng.random() < GREY:
        values = np.repeat(values.mean(-1, keepdims=True), 3, -1)
    return values.round().clip(0, 255).astype(np.uint8)


class Drawer:
    """Draws cells from images.

    Parameters
    ----------
    scheduler : CpuScheduler
        Model whose latents are drawn.
    seed : int
        Of all random draws.
    """

    def __init__(self, scheduler: CpuScheduler, seed: int) -> None:
        self.scheduler, self.rng = scheduler, np.random.default_rng(seed)

    def draw(
        self,
        images: Iterable[Pixels],
        marks: NDArray[np.int64],
        passes: int,
        *,
        least: float = LEAST_LABELLED,
        progress: Callable[[int, int], None] | None = None,
    ) -> CellSet:
        """Return cells of all images, so many times over.

        Images of one cell are encoded alone or, every other one, in mosaics. Of larger ones come two crops of a cell
        and one of 2 x 2 cells.
        """
        images = list(images)
        small = np.array([max(pixels.shape[:2]) <= LABEL_CELL for pixels in images])
        parts: list[tuple[NDArray[np.int16], list[int], float]] = []
        total, done = passes * len(images), 0

        def add(picture: Pixels, numbers: list[int]) -> None:
            nonlocal done
            latents, quality = self._latents(picture)
            parts.append((latents, numbers, quality))
            done += 1
            if progress is not None:
                progress(min(done, total), total)

        for _ in range(passes):
            order = self.rng.permutation(len(images))
            tiles = [int(i) for i in order if small[i]]
            half = len(tiles) // 2
            for i in tiles[:half]:
                add(random_cells(images[i], least, self.rng), [i])
            for k in range(half, len(tiles) - MOSAIC**2 + 1, MOSAIC**2):
                numbers = tiles[k : k + MOSAIC**2]
                cells = np.stack([random_cells(images[i], least, self.rng) for i in numbers])
                cells = cells.reshape(MOSAIC, MOSAIC, LABEL_CELL, LABEL_CELL, 3).swapaxes(1, 2)
                add(cells.reshape(MOSAIC * LABEL_CELL, -1, 3), numbers)
            for i in (int(i) for i in order if not small[i]):
                for edge in (SINGLE, SINGLE, SCENE):
                    add(random_cells(images[i], least, self.rng, edge), [i] * edge**2)
        of_images = np.array([i for _, one, _ in parts for i in one])
        quality = np.array([q for _, one, q in parts for _ in one], np.float32)
        return CellSet(np.concatenate([latents for latents, _, _ in parts]), marks[of_images], of_images, quality)

    def _latents(self, picture: Pixels) -> tuple[NDArray[np.int16], float]:
        """Return the latents of the cells of a picture, (cells,4,4,C), and their quality."""
        rng, scheduler = self.rng, self.scheduler
        low, high = np.log(QUALITIES)
        quality = float(np.exp(rng.uniform(low, high)))
        whole, steps = scheduler.steps(Quantiser(quality, False))
        latents: NDArray[Any] = scheduler.analyse(np.ascontiguousarray(picture)[None], whole)
        if rng.random() < STORED:
            if rng.random() < OPTIMISED:
                (encoded,) = scheduler.encode([picture[None]], [quality], features=False, labels=False, symbols=True)
                latents = scheduler.dequantise(encoded.symbols, encoded.quantiser)
            else:
                unit = steps / 256
                symbols = np.floor(np.abs(latents) / unit + rng.uniform(*DEAD_ZONE)) * np.sign(latents)
                latents = np.floor(symbols * unit + 0.5)
        n = LABEL_CELL // LATENT_STRIDE
        _, h, w, c = latents.shape
        cells = latents.reshape(h // n, n, w // n, n, c).swapaxes(1, 2).reshape(-1, n, n, c)
        return cells.astype(np.int16), quality
