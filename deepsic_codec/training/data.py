"""Training images: all decoded once, kept in device memory when they fit, cropped there.

Sources are folders, zip files, single image files or Zarr arrays of uint8.  Unlabelled
images are photographs in what follows, labelled ones tiles.
"""

from __future__ import annotations

import csv
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.io.images import SUFFIXES, decode_rgb, read_rgb
from deepsic_codec.payload.constants import LABEL_CELL

#: Zarr arrays are read in blocks of this edge, so that one of any size becomes images.
ZARR_BLOCK = 1024
Pixels = NDArray[np.uint8]
Load = Callable[[], Pixels]


def read_images(source: str | Path, skipped: list[str] | None = None) -> Iterator[tuple[str, Pixels]]:
    """Name and RGB pixels (H,W,3) of every image of a source, sorted by name.

    An image that cannot be read is left out and its name appended to ``skipped``.

    Raises
    ------
    ConfigurationError
        If the source does not exist or is of no kind that can be read.
    """
    for name, loaded in _ahead(entries(source)):
        try:
            pixels = loaded.result()
        except Exception as error:  # on damaged files Pillow's readers raise almost anything
            if skipped is None:
                raise ConfigurationError(f"{source}: {name} cannot be read: {error}") from None
            skipped.append(f"{name} ({type(error).__name__}: {error})")
            continue
        yield name, pixels


def _ahead(pairs: Iterable[tuple[str, Load]]) -> Iterator[tuple[str, Future[Pixels]]]:
    """Names and images to be, in their order, a few of which are read at a time by all cores."""
    count = os.cpu_count() or 1
    begun: deque[tuple[str, Future[Pixels]]] = deque()
    with ThreadPoolExecutor(count) as pool:
        for name, load in pairs:
            begun.append((name, pool.submit(load)))
            if len(begun) > 4 * count:
                yield begun.popleft()
        yield from begun


def entries(source: str | Path) -> Iterator[tuple[str, Load]]:
    """Name of every image of a source and what reads it."""
    source = Path(source)
    if source.is_dir() and any((source / f).exists() for f in ("zarr.json", ".zarray", ".zgroup")):
        yield from _zarr_blocks(source)
    elif source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES):
            yield str(path.relative_to(source)), lambda path=path: read_rgb(path)
    elif source.is_file() and source.suffix.lower() in SUFFIXES:
        yield source.name, lambda: read_rgb(source)
    elif source.is_file() and zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)  # closed with the last of what reads from it
        for name in sorted(n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES):
            yield name, lambda name=name: decode_rgb(archive.read(name), Path(name).suffix)
    else:
        what = "does not exist" if not source.exists() else "is no folder, zip file, image or Zarr array"
        raise ConfigurationError(f"{source} {what}")


def _zarr_blocks(path: Path) -> Iterator[tuple[str, Load]]:
    import zarr  # not where only images are trained on

    node = zarr.open(str(path), mode="r")
    arrays = [("", node)] if isinstance(node, zarr.Array) else list(node.arrays())
    for name, array in arrays:
        shape = array.shape
        colour = len(shape) > 2 and shape[-1] in (1, 3)
        if array.dtype != np.uint8 or not (len(shape) == 2 or (colour and len(shape) in (3, 4))):
            raise ConfigurationError(
                f"{path}/{name}: expected uint8 of axes yx, yxc or nyxc with c of 1 or 3, got "
                f"{array.dtype} of shape {shape}"
            )
        height, width = shape[-3:-1] if colour else shape
        for n in range(shape[0] if len(shape) == 4 else 1):
            for y in range(0, height, ZARR_BLOCK):
                for x in range(0, width, ZARR_BLOCK):

                    def load(array=array, n=n, y=y, x=x) -> Pixels:  # type: ignore[no-untyped-def]
                        where = (slice(y, y + ZARR_BLOCK), slice(x, x + ZARR_BLOCK))
                        block = np.asarray(array[(n, *where)] if array.ndim == 4 else array[where])
                        block = block if block.ndim == 3 else block[..., None]
                        return np.ascontiguousarray(np.broadcast_to(block, (*block.shape[:2], 3)))

                    yield f"{name}[{n},{y},{x}]", load


class Pool:
    """Images of various sizes, flat in memory, and crops of them.

    Parameters
    ----------
    images : list of uint8 (H,W,3)
    device : str
        Where crops are wanted.
    keep : str
        Where the images lie; "auto" is ``device`` if they fill at most half of its free memory.
    """

    def __init__(self, images: list[Pixels], device: str, keep: str = "auto") -> None:
        self.device = device
        shapes = np.array([im.shape[:2] for im in images], np.int64)
        self.heights, self.widths = shapes.T
        self.shortest = shapes.min(1)
        self.by_size = np.argsort(-self.shortest, kind="stable")
        sizes = shapes.prod(1)
        self.offsets = np.cumsum(sizes) - sizes
        self.nbytes = int(3 * sizes.sum())
        if keep == "auto":
            fits = not device.startswith("cuda") or self.nbytes < torch.cuda.mem_get_info(device)[0] / 2
            keep = device if fits else "cpu"
        self.flat = torch.empty(int(sizes.sum()), 3, dtype=torch.uint8, device=keep)
        for image, at in zip(images, self.offsets, strict=True):
            self.flat[at : at + image.size // 3] = torch.tensor(image.reshape(-1, 3)).to(keep)

    def crops(self, pick: NDArray[np.int64], side: int, rng: np.random.Generator) -> Tensor:
        """Crops at random places of the images ``pick``, randomly turned and flipped: uint8 (B,side,side,3)."""
        top, left = rng.integers(self.heights[pick] - side + 1), rng.integers(self.widths[pick] - side + 1)
        orientation = rng.integers(0, 2, (3, len(pick)))
        table = np.stack([self.offsets[pick], self.widths[pick], top, left, *orientation])
        at, width, top_, left_, flip_y, flip_x, turn = torch.from_numpy(table).to(self.flat.device)[:, :, None]
        along = torch.arange(side, device=self.flat.device)
        rows = top_ + torch.where(flip_y > 0, side - 1 - along, along)  # (B,side)
        columns = left_ + torch.where(flip_x > 0, side - 1 - along, along)
        index = (at + rows * width)[:, :, None] + columns[:, None, :]
        index = torch.where(turn[:, :, None] > 0, index.transpose(1, 2), index)
        found = self.flat.index_select(0, index.reshape(-1))
        return found.reshape(len(pick), side, side, 3).to(self.device)


class Photographs:
    """Images without labels; gives random square crops.

    Parameters
    ----------
    sources : iterable of path
    crop : int
        Smallest edge that is wanted.
    held_out : int
        Every n-th image (n = total / held_out) is kept for choosing checkpoints.
    device, keep : str
        See :class:`Pool`.

    Raises
    ------
    ConfigurationError
        If there are no images, or some are smaller than the crop.
    """

    def __init__(
        self,
        sources: Iterable[str | Path],
        crop: int = 256,
        held_out: int = 24,
        device: str = "cpu",
        keep: str = "auto",
    ) -> None:
        self.skipped: list[str] = []
        named = [pair for source in sources for pair in read_images(source, self.skipped)]
        if not named:
            raise ConfigurationError(f"no readable image in --images ({len(self.skipped)} unreadable)")
        if len(named) < 2:
            raise ConfigurationError("--images: one image alone; at least two are needed, as one is held out")
        _refuse_small(named, crop, "--images", f"leave them out or lower --crop (now {crop})")
        images = [pixels for _, pixels in named]
        held_out = max(1, min(held_out, len(images) // 10))
        every = len(images) // held_out
        self.held_out = images[::every][:held_out]
        self.pool = Pool([im for i, im in enumerate(images) if i % every or i // every >= held_out], device, keep)

    def crops(self, count: int, size: int, rng: np.random.Generator, jitter: bool = True) -> Tensor:
        """Float (count,3,size,size) in 0..255 of crops with flips, quarter turns and, half the time, reduction.

        The reduced ones of one call share a scale, and come from images large enough for it.
        """
        pool, parts = self.pool, []
        reduced = int(rng.binomial(count, 0.5)) if jitter else 0
        if reduced:
            side = int(rng.uniform(size, min(2 * size, int(pool.shortest.max())) + 1))
            large = int((pool.shortest >= side).sum())
            if side > size and large:
                found = pool.crops(pool.by_size[rng.integers(large, size=reduced)], side, rng)
                found = found.permute(0, 3, 1, 2).float()
                found = F.interpolate(found, (size, size), mode="bicubic", antialias=True)
                parts.append(found.round_().clamp_(0, 255))
            else:
                reduced = 0
        if count > reduced:
            found = pool.crops(rng.integers(len(pool.shortest), size=count - reduced), size, rng)
            parts.append(found.permute(0, 3, 1, 2).float())
        return torch.cat(parts)


class LabelledTiles:
    """Labelled images, from which cells of 64x64 pixels are taken.

    Parameters
    ----------
    sources : iterable of path
        With ``<Class>/<image>`` inside, or CSV files of ``file,label``.
    held_out : float
        Share of each class that is kept for testing, at least one image.
    seed : int
        Chooses them.
    root : str
        Folder or zip file that names in a CSV are relative to; default: its own folder.
    device, keep : str
        See :class:`Pool`.

    Raises
    ------
    ConfigurationError
        If there are no images, a class has one alone, a CSV names files that are missing, or
        images are smaller than a cell.
    """

    def __init__(
        self,
        sources: Iterable[str | Path],
        held_out: float = 0.05,
        seed: int = 0,
        root: str = "",
        device: str = "cpu",
        keep: str = "auto",
    ) -> None:
        self.skipped: list[str] = []
        found = [one for source in sources for one in _labelled(Path(source), root, self.skipped)]
        if not found:
            raise ConfigurationError(
                "--labels: no readable image; expected <Class>/<image> inside each source, or a CSV of file,label"
            )
        _refuse_small([(name, pixels) for name, _, pixels in found], LABEL_CELL, "--labels", "enlarge them")
        self.classes = sorted({label for _, label, _ in found})
        labels = np.array([self.classes.index(label) for _, label, _ in found])
        counts = np.bincount(labels)
        alone = [name for name, n in zip(self.classes, counts, strict=True) if n < 2]
        if alone:
            raise ConfigurationError(
                f"--labels: one image alone in class {', '.join(alone)}; a class needs two, as one is held out"
            )
        if len(self.classes) > 255:
            raise ConfigurationError(f"--labels: {len(self.classes)} classes; a payload numbers at most 255")
        if "unknown" in self.classes:
            raise ConfigurationError("--labels: the class 'unknown' is the head's own; give such images to --images")
        rng, test, train = np.random.default_rng(seed), [], []
        for c in range(len(self.classes)):
            order = rng.permutation(np.flatnonzero(labels == c))
            cut = max(1, round(len(order) * held_out))
            test += list(order[:cut])
            train += list(order[cut:])
        self.labels, self.test_labels = labels[train], labels[test]
        self.test_pixels = np.stack([_centre(found[i][2], LABEL_CELL) for i in test])
        self.pool = Pool([found[i][2] for i in train], device, keep)

    def mosaics(self, count: int, tiles: int, rng: np.random.Generator, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
        """Float (count,3,64 tiles,64 tiles) of random cells, and their labels int64 (count,tiles,tiles).

        ``jitter`` varies light and place of each cell: 1 is as much as days and scenes differ.
        """
        pick = rng.integers(len(self.labels), size=count * tiles * tiles)
        cells = self.pool.crops(pick, LABEL_CELL, rng)
        if jitter:
            cells = _jittered(cells.float(), jitter, rng)
        cells = cells.reshape(count, tiles, tiles, LABEL_CELL, LABEL_CELL, 3)
        edge = tiles * LABEL_CELL
        pixels = cells.permute(0, 5, 1, 3, 2, 4).reshape(count, 3, edge, edge)
        labels = torch.from_numpy(self.labels[pick].reshape(count, tiles, tiles)).to(self.pool.device)
        return pixels.to(memory_format=torch.channels_last).float(), labels


def _jittered(cells: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Cells (N,64,64,3) with other contrast, brightness and colour balance, moved by up to 8 pixels."""
    n = len(cells)

    def drawn(width: float, channels: int) -> Tensor:
        values = rng.uniform(-width, width, (n, 1, 1, channels)) * strength
        return torch.from_numpy(values).to(cells)

    mean = cells.mean((1, 2), keepdim=True)
    out = (cells - mean) * (1 + drawn(0.2, 1)) + mean * (1 + drawn(0.1, 3)) + drawn(12, 1)
    by = rng.integers(-8, 9, (n, 2)) * min(1.0, strength)
    rows, columns = (_mirrored(np.arange(LABEL_CELL) + by[:, i, None].round().astype(int)) for i in (0, 1))
    index = torch.from_numpy(rows[:, :, None] * LABEL_CELL + columns[:, None, :]).to(cells.device)
    out = out.reshape(n, -1, 3).gather(1, index.reshape(n, -1, 1).expand(-1, -1, 3))
    return out.reshape(cells.shape).round_().clamp_(0, 255)


def _mirrored(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places beyond the edges of a cell, mirrored into it."""
    places = np.abs(places)
    return np.where(places >= LABEL_CELL, 2 * LABEL_CELL - 2 - places, places)


def _labelled(source: Path, root: str, skipped: list[str]) -> Iterator[tuple[str, str, Pixels]]:
    """Name, class and pixels of every labelled image of a source."""
    if source.suffix.lower() != ".csv":
        for name, pixels in read_images(source, skipped):
            label = Path(name).parent.name
            if not label:
                raise ConfigurationError(f"--labels: {source}: {name} lies in no class folder")
            yield name, label, pixels
        return
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigurationError(f"--labels: {source} cannot be read: {error}") from None
    if rows and [c.strip().lower() for c in rows[0][:2]] == ["file", "label"]:
        rows = rows[1:]
    wrong = [i for i, row in enumerate(rows, 1) if len(row) < 2 or not row[0].strip() or not row[1].strip()]
    if wrong:
        raise ConfigurationError(
            f"--labels: {source}: expected file,label in each row; {len(wrong)} are not so, the first is row {wrong[0]}"
        )
    wanted = {row[0].strip(): row[1].strip() for row in rows}
    place = Path(root) if root else source.parent
    if place.is_dir():
        loaders: dict[str, Load] = {n: (lambda n=n: read_rgb(place / n)) for n in wanted if (place / n).is_file()}
    else:
        loaders = dict(entries(place))
    missing = [name for name in wanted if name not in loaders]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ConfigurationError(
            f"--labels: {source} names {len(missing)} files that are not in {place}: {first}; see --label-root"
        )
    pixels_of = read_images(place, skipped) if not place.is_dir() else _read(loaders, skipped)
    for name, pixels in pixels_of:
        if name in wanted:
            yield name, wanted[name], pixels


def _read(loaders: dict[str, Load], skipped: list[str]) -> Iterator[tuple[str, Pixels]]:
    for name, loaded in _ahead(loaders.items()):
        try:
            yield name, loaded.result()
        except Exception as error:  # see read_images
            skipped.append(f"{name} ({type(error).__name__}: {error})")


def _refuse_small(named: list[tuple[str, Pixels]], edge: int, option: str, advice: str) -> None:
    small = [f"{name} ({im.shape[0]}x{im.shape[1]})" for name, im in named if min(im.shape[:2]) < edge]
    if small:
        raise ConfigurationError(
            f"{option}: {len(small)} of {len(named)} images are smaller than {edge}x{edge} "
            f"pixels, among them {', '.join(small[:3])}; {advice}"
        )


def _centre(image: Pixels, edge: int) -> Pixels:
    y, x = ((n - edge) // 2 for n in image.shape[:2])
    return image[y : y + edge, x : x + edge]
