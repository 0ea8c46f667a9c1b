"""Training images: decoded once, kept in memory (on the device if they fit) and cropped there.

Unlabelled images are called photographs, labelled ones tiles.
"""

import csv
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.errors import ConfigurationError, DeepSICError
from deepsic_codec.io.images import SUFFIXES, TIFF, Pixels, decode_rgb, read_rgb
from deepsic_codec.payload.constants import LABEL_CELL
from deepsic_codec.training.scenes import Loaders, scene_loaders

#: Images that are decoded at the same time.
READ_BATCH = 64


def read_images(source: str | Path, skipped: list[str] | None = None) -> Iterator[tuple[str, Pixels]]:
    """Read all images of a source.

    Parameters
    ----------
    source : str or Path
        Folder, zip file, image file, or Zarr array or group. Zarr arrays and TIFF files may have any number of bands of
        any depth: see `deepsic_codec.training.scenes`. Blocks of more NoData than data are skipped.
    skipped : list of str, optional
        Receives the names of images that cannot be read. Without it, such an image is an error.

    Yields
    ------
    name : str
    pixels : uint8 array (H,W,3)

    Raises
    ------
    ConfigurationError
        If the source does not exist or is of another kind.
    """
    yield from _read(_loaders(Path(source)), source, skipped)


def _read(loaders: Loaders, source: str | Path, skipped: list[str] | None) -> Iterator[tuple[str, Pixels]]:
    names = list(loaders)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(names), READ_BATCH):
            futures = {name: pool.submit(loaders[name]) for name in names[start : start + READ_BATCH]}
            for name, future in futures.items():
                error = future.exception()  # of any class: libraries raise almost anything for damaged files
                if error is None:
                    yield name, future.result()
                elif skipped is None:
                    raise ConfigurationError(f"{source}: {name} cannot be read: {error}") from None
                else:
                    skipped.append(f"{name} ({type(error).__name__}: {error})")


def _loaders(source: Path) -> Loaders:
    """Return a function for each image of a source that reads it, by name."""
    if any((source / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
        return scene_loaders(source) or {}
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        return {name: load for path in paths for name, load in _file_loaders(path, source).items()}
    if source.is_file() and source.suffix.lower() in SUFFIXES:
        return _file_loaders(source, source.parent)
    if source.is_file() and zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)  # closed with the last function that reads from it

        def load(name: str) -> Pixels:
            return decode_rgb(archive.read(name), Path(name).suffix)

        names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)
        return {name: partial(load, name) for name in names}
    problem = "is no folder, zip file, image or Zarr array" if source.exists() else "does not exist"
    raise ConfigurationError(f"{source} {problem}")


def _file_loaders(path: Path, folder: Path) -> Loaders:
    """Return a function for each image of a file."""
    name = path.relative_to(folder).as_posix()
    if path.suffix.lower() in TIFF:
        try:
            scene = scene_loaders(path)
        except DeepSICError:
            scene = None  # reading tells why, where unreadable images are listed
        if scene is not None:
            return {name + image.removeprefix(path.name): load for image, load in scene.items()}
    return {name: partial(read_rgb, path)}


class Pool:
    """Images of various sizes, one after another in memory, and crops of them.

    Parameters
    ----------
    images : list of uint8 array (H,W,3)
    device : str
        Device that crops are returned on.
    keep : str
        Device that holds the images; "auto" is `device` if they fill at most half of its free memory, else "cpu".
    """

    def __init__(self, images: list[Pixels], device: str, keep: str = "auto") -> None:
        self.device = device
        shapes = np.array([image.shape[:2] for image in images], np.int64)
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
        for image, offset in zip(images, self.offsets, strict=True):
            self.flat[offset : offset + image.size // 3] = torch.tensor(image.reshape(-1, 3)).to(keep)

    def crops(self, numbers: NDArray[np.int64], side: int, rng: np.random.Generator) -> Tensor:
        """Return a crop of each numbered image at a random position, turned and flipped: uint8 (B,side,side,3)."""
        top, left = rng.integers(self.heights[numbers] - side + 1), rng.integers(self.widths[numbers] - side + 1)
        orientation = rng.integers(0, 2, (3, len(numbers)))
        table = np.stack([self.offsets[numbers], self.widths[numbers], top, left, *orientation])
        offset, width, y, x, flip_y, flip_x, turn = torch.from_numpy(table).to(self.flat.device)[:, :, None]
        steps = torch.arange(side, device=self.flat.device)
        rows = y + torch.where(flip_y > 0, side - 1 - steps, steps)  # (B,side)
        columns = x + torch.where(flip_x > 0, side - 1 - steps, steps)
        index = (offset + rows * width)[:, :, None] + columns[:, None, :]
        index = torch.where(turn[:, :, None] > 0, index.transpose(1, 2), index)
        pixels = self.flat.index_select(0, index.reshape(-1))
        return pixels.reshape(len(numbers), side, side, 3).to(self.device)


class Photographs:
    """Unlabelled images; returns random square crops.

    Parameters
    ----------
    sources : iterable of path
        As `read_images` takes them.
    crop : int
        Smallest edge in pixels that an image may have.
    held_out : int
        Every n-th image (n = total / held_out) is kept for measuring.
    device, keep : str
        As for `Pool`.

    Raises
    ------
    ConfigurationError
        If fewer than two images can be read, or an image is smaller than the crop.
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
            raise ConfigurationError("--images: only one image; give at least two, because one is held out")
        _refuse_small(named, crop, "--images", f"leave them out or lower --crop (now {crop})")
        images = [pixels for _, pixels in named]
        held_out = max(1, min(held_out, len(images) // 10))
        every = len(images) // held_out
        self.held_out = images[::every][:held_out]
        self.pool = Pool([x for i, x in enumerate(images) if i % every or i // every >= held_out], device, keep)

    def crops(self, count: int, size: int, rng: np.random.Generator) -> Tensor:
        """Return crops, each flipped and turned at random; half of them are reduced by up to 2 on average.

        The reduced crops of one call share a scale and come from images that are large enough for it.

        Returns
        -------
        float32 Tensor (count,3,size,size)
            0 to 255.
        """
        pool, parts = self.pool, []
        reduced = int(rng.binomial(count, 0.5))
        if reduced:
            side = int(rng.uniform(size, min(2 * size, int(pool.shortest.max())) + 1))
            large = int((pool.shortest >= side).sum())
            if side > size and large:
                pixels = pool.crops(pool.by_size[rng.integers(large, size=reduced)], side, rng)
                pixels = pixels.permute(0, 3, 1, 2).float()
                pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
                parts.append(pixels.round_().clamp_(0, 255))
            else:
                reduced = 0
        if count > reduced:
            pixels = pool.crops(rng.integers(len(pool.shortest), size=count - reduced), size, rng)
            parts.append(pixels.permute(0, 3, 1, 2).float())
        return torch.cat(parts)


class LabelledTiles:
    """Labelled images, from which cells of 64x64 pixels are taken.

    Parameters
    ----------
    sources : iterable of path
        Folders or zip files with `<Class>/<image>` inside, or CSV files of `file,label`.
    held_out : float
        Share of each class that is kept for measuring, at least one image.
    seed : int
        Seed of the choice of these images.
    root : str
        Folder or zip file that names in a CSV file are relative to; default: the folder of the CSV file.
    device, keep : str
        As for `Pool`.

    Raises
    ------
    ConfigurationError
        If there are no images, a class has only one, a CSV file names missing files, or an image is smaller than a
        cell.
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
        tiles = [tile for source in sources for tile in _labelled(Path(source), root, self.skipped)]
        if not tiles:
            raise ConfigurationError(
                "--labels: no readable image; expected <Class>/<image> inside each source, or a CSV of file,label"
            )
        _refuse_small([(name, pixels) for name, _, pixels in tiles], LABEL_CELL, "--labels", "enlarge them")
        self.classes = sorted({label for _, label, _ in tiles})
        labels = np.array([self.classes.index(label) for _, label, _ in tiles])
        single = [name for name, n in zip(self.classes, np.bincount(labels), strict=True) if n < 2]
        if single:
            raise ConfigurationError(
                f"--labels: only one image of class {', '.join(single)}; give at least two of each class, "
                "because one is held out"
            )
        if len(self.classes) > 255:
            raise ConfigurationError(f"--labels: {len(self.classes)} classes; a payload has at most 255")
        if "unknown" in self.classes:
            raise ConfigurationError("--labels: every model has a class 'unknown'; pass such images to --images")
        rng, test, train = np.random.default_rng(seed), [], []
        for c in range(len(self.classes)):
            order = rng.permutation(np.flatnonzero(labels == c))
            cut = max(1, round(len(order) * held_out))
            test += list(order[:cut])
            train += list(order[cut:])
        self.labels, self.test_labels = labels[train], labels[test]
        self.test_pixels = np.stack([_centre(tiles[i][2], LABEL_CELL) for i in test])
        self.pool = Pool([tiles[i][2] for i in train], device, keep)

    def mosaics(self, count: int, edge: int, rng: np.random.Generator, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return mosaics of random cells.

        Parameters
        ----------
        count : int
        edge : int
            Cells along each edge of a mosaic.
        rng : Generator
        jitter : float
            Variation of light and position of each cell; 1 is about the variation between days and scenes.

        Returns
        -------
        pixels : float32 Tensor (count,3,64*edge,64*edge)
            0 to 255.
        labels : int64 Tensor (count,edge,edge)
            Number of each cell's class.
        """
        numbers = rng.integers(len(self.labels), size=count * edge * edge)
        cells = self.pool.crops(numbers, LABEL_CELL, rng)
        if jitter:
            cells = jittered(cells.float(), jitter, rng)
        cells = cells.reshape(count, edge, edge, LABEL_CELL, LABEL_CELL, 3)
        side = edge * LABEL_CELL
        pixels = cells.permute(0, 5, 1, 3, 2, 4).reshape(count, 3, side, side)
        labels = torch.from_numpy(self.labels[numbers].reshape(count, edge, edge)).to(self.pool.device)
        return pixels.to(memory_format=torch.channels_last).float(), labels


def jittered(cells: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Return cells (N,64,64,3) with other contrast, brightness and colour balance, moved by up to 8 pixels."""
    n = len(cells)

    def draw(width: float, channels: int) -> Tensor:
        values = rng.uniform(-width, width, (n, 1, 1, channels)) * strength
        return torch.from_numpy(values).to(cells)

    mean = cells.mean((1, 2), keepdim=True)
    out = (cells - mean) * (1 + draw(0.2, 1)) + mean * (1 + draw(0.1, 3)) + draw(12, 1)
    offset = rng.integers(-8, 9, (n, 2)) * min(1.0, strength)
    rows, columns = (_mirrored(np.arange(LABEL_CELL) + offset[:, i, None].round().astype(int)) for i in (0, 1))
    index = torch.from_numpy(rows[:, :, None] * LABEL_CELL + columns[:, None, :]).to(cells.device)
    out = out.reshape(n, -1, 3).gather(1, index.reshape(n, -1, 1).expand(-1, -1, 3))
    return out.reshape(cells.shape).round_().clamp_(0, 255)


def _mirrored(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Mirror positions beyond the edges of a cell into it."""
    positions = np.abs(positions)
    return np.where(positions >= LABEL_CELL, 2 * LABEL_CELL - 2 - positions, positions)


def _labelled(source: Path, root: str, skipped: list[str]) -> Iterator[tuple[str, str, Pixels]]:
    """Yield name, class and pixels of every labelled image of a source."""
    if source.suffix.lower() == ".csv":
        labels, folder = _read_csv(source), Path(root) if root else source.parent
        loaders = _loaders(folder)
        missing = [name for name in labels if name not in loaders]
        if missing:
            first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ConfigurationError(
                f"--labels: {source} names {len(missing)} files that are not in {folder}: {first}; set the "
                "folder with --label-root"
            )
        for name, pixels in _read({name: loaders[name] for name in labels}, folder, skipped):
            yield name, labels[name], pixels
        return
    for name, pixels in read_images(source, skipped):
        label = Path(name).parent.name
        if not label:
            raise ConfigurationError(f"--labels: {source}: {name} is in no folder of a class")
        yield name, label, pixels


def _read_csv(path: Path) -> dict[str, str]:
    """Return the label of each file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[text.strip() for text in row] for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigurationError(f"--labels: {path} cannot be read: {error}") from None
    if rows and [text.lower() for text in rows[0][:2]] == ["file", "label"]:
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or not row[0] or not row[1]:
            raise ConfigurationError(f"--labels: {path}: expected file,label in each row, row {number} is {row}")
    return {Path(row[0]).as_posix(): row[1] for row in rows}


def _refuse_small(named: list[tuple[str, Pixels]], edge: int, option: str, advice: str) -> None:
    small = [f"{name} ({x.shape[0]}x{x.shape[1]})" for name, x in named if min(x.shape[:2]) < edge]
    if small:
        raise ConfigurationError(
            f"{option}: {len(small)} of {len(named)} images are smaller than {edge}x{edge} "
            f"pixels, among them {', '.join(small[:3])}; {advice}"
        )


def _centre(image: Pixels, edge: int) -> Pixels:
    y, x = ((n - edge) // 2 for n in image.shape[:2])
    return image[y : y + edge, x : x + edge]
