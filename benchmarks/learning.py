"""Labels from ten examples: average precision on classes of aerial images, beside colour histograms.

    python -m benchmarks.learning --labels EUROSAT_0 EUROSAT_1 SCENES --others PHOTOS
    python -m benchmarks.learning --labels SCENES --head scenes

Each class whose folder begins with ``--prefix`` is learned from ten of its training images, ten of other classes, and
tiles of other training images as those drawn at random. An image is scaled to ``--edge`` pixels and is a chunk of label
tiles of 64 pixels, all of which are examples. The images of the split ``val/``, none of which is an example, are ranked
by the score of their best tile, as a query ranks chunks. *Tiles* are ranked one by one, right if their image is.

``around`` is the distance of tiles of the image whose mean direction judges a tile. The table of classes has that which
cross-validation chooses, as `labels.learn` does. Colour histograms of tiles go the same way: each is a vector of the
square roots of shares of colours, along as many axes as hold nearly all of them.

With ``--others``, classes are left out in folds: for each fold a head is trained, as by ``deepsic train-head``, without
any image of its classes, and learns these from examples. Cells are drawn once. Images of EuroSAT are left out with the
class of the same name. The decoder is that of ``--model``; the head that its training starts from saw EuroSAT alone.

With ``--head``, or the head of ``--model``, nothing is trained; classes that the head was trained on say nothing of new
ones.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import machine, table
from deepsic_codec import config
from deepsic_codec.axes import Axes
from deepsic_codec.labels.embeddings import embed_image
from deepsic_codec.labels.learned import AROUND, BACKGROUND, Examples
from deepsic_codec.labels.vectors import TileVectors, unit
from deepsic_codec.model.file import ModelInfo
from deepsic_codec.model.zoo import find_head, find_model
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.training.head_data import read_source
from deepsic_codec.training.head_settings import HeadSettings
from deepsic_codec.training.tree import Tree

BINS = 8  # of a colour histogram, for each of three bands
AXES = 128  # along which histograms are compared
TARGETS = {"mean": 0.6, "ratio": 3.0}

TILE = 64, 64
EDGE = 192

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]
Names = list[str]


def read_scenes(paths: Sequence[Path], prefix: str, edge: int) -> tuple[list[NDArray[np.uint8]], Names]:
    """Return the images of classes whose folders have a prefix, scaled to squares, and their names."""
    images, names = [], []
    for path in paths:
        for name, pixels in read_source(path):
            if Path(name).parent.name.startswith(prefix):
                size = min(pixels.shape[:2])
                square = Image.fromarray(pixels[:size, :size]).resize((edge, edge), Image.Resampling.BICUBIC)
                images.append(np.asarray(square))
                names.append(name)
    return images, names


def histogram(image: NDArray[np.uint8]) -> Floats:
    """Square roots of the shares of colours of a tile, whose products compare distributions."""
    bins = (image.reshape(-1, 3) // (256 // BINS)).astype(int) @ [BINS * BINS, BINS, 1]
    return np.sqrt(np.bincount(bins, minlength=BINS**3) / len(bins))


def average_precision(scores: Floats, truth: NDArray[np.bool_]) -> float:
    """Mean precision at the rank of each right one."""
    right = truth[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())


def embed(images: Sequence[NDArray[np.uint8]], info: ModelInfo) -> NDArray[np.int8]:
    """Return the embeddings of the tiles of each image, int8 (images, rows, columns, values)."""
    return np.stack([embed_image(one, info, tile=TILE) for one in images])


def colours(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.int8]:
    """Return histograms of the tiles of each image along their main axes, int8 (images, rows, columns, AXES)."""
    n = len(images[0]) // TILE[0]
    tiles = np.stack(images).reshape(len(images), n, TILE[0], n, TILE[1], 3).swapaxes(2, 3)
    values = np.stack([histogram(tile) for tile in tiles.reshape(-1, *TILE, 3)])
    axes = np.linalg.eigh(values.T @ values)[1][:, ::-1][:, :AXES]
    result: NDArray[np.int8] = np.rint(127 * values @ axes).astype(np.int8).reshape(len(images), n, n, -1)
    return result


def pooled(vectors: NDArray[np.int8]) -> dict[int, Floats]:
    """Return directions of the tiles of each image, (images, tiles, values), by the distance of tiles that count."""
    count, rows, columns, values = vectors.shape
    chunk = rows * TILE[0], columns * TILE[1]
    array = zarr.zeros(shape=(count * chunk[0], chunk[1]), chunks=chunk, dtype="u1")
    geometry, tiles = Geometry.of(array, Axes("yx"), TILE), TileVectors(vectors.reshape(-1, columns, values))
    return {around: unit(tiles.pooled(around, geometry)).reshape(count, -1, values) for around in AROUND}


def precisions_of(
    vectors: Mapping[int, Floats], is_class: Truth, training: Truth, examples: int, repeats: int
) -> NDArray[np.float64]:
    """Return average precisions of a class, of tiles and of images, for each distance and last for the chosen one.

    They are means over draws of the examples, float64 (distances + 1, 2).
    """
    results = np.zeros((len(vectors) + 1, 2))
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        like = rng.permutation(np.flatnonzero(is_class & training))[:examples]
        unlike = rng.permutation(np.flatnonzero(~is_class & training))[:examples]
        others = np.setdiff1d(np.flatnonzero(training), np.concatenate([like, unlike]))
        count = vectors[0].shape[1]
        drawn = rng.permutation(len(others) * count)[:BACKGROUND]
        places = {
            "like": np.repeat(like, count),
            "unlike": np.repeat(unlike, count),
            "background": others[drawn // count],
        }
        losses, rows = [], []
        for tiles in vectors.values():
            parts = (tiles[at].reshape(-1, tiles.shape[-1]) for at in (like, unlike, others))
            positive, negative, background = parts
            tried = Examples(positive, negative, background[drawn], places)
            losses.append(tried.cross_validate().loss)
            weights = tried.fit()
            scores, truth = tiles[~training] @ weights[:-1] + weights[-1], is_class[~training]
            of_tiles = average_precision(scores.ravel(), np.repeat(truth, count))
            rows.append([of_tiles, average_precision(scores.max(1), truth)])
        results += np.array([*rows, rows[int(np.argmin(losses))]]) / repeats
    return results


def folds_of(
    a: argparse.Namespace, classes: Sequence[str], nodes: Mapping[str, str]
) -> Iterator[tuple[Names, ModelInfo]]:
    """Yield folds of the classes, and a model whose head was trained without them; or all, and the head by its name."""
    model = find_model(a.model)
    if not a.others:
        yield list(classes), find_model(a.model, head=find_head(a.head, model.decoder)) if a.head else model
        return
    from deepsic_codec.training.train_head import draw_cells, fit_head

    paths = {"labels": [str(path) for path in a.labels], "others": [str(path) for path in a.others]}
    training = {name: getattr(a, name) for name in ("passes", "last_steps", "steps")}
    settings = HeadSettings(base=a.model, **paths, **training)
    cells = draw_cells(settings, Tree.read(), say)
    with TemporaryDirectory() as folder:
        config.set(model_path=(folder,))
        for number in range(a.folds):
            fold = list(classes[number :: a.folds])
            left_out = sorted({nodes[name] for name in fold})
            say(f"fold {number + 1}: a head without {', '.join(left_out)}")
            out = Path(folder) / f"fold-{number}.safetensors"
            fit_head(replace(settings, out=str(out)), cells.without(left_out), lambda text: None)
            yield fold, find_model(a.model, head=find_head(out.stem, model.decoder))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    a = _arguments(argv)
    say(machine(os.cpu_count() or 1))
    images, names = read_scenes(a.labels, a.prefix, a.edge)
    classes = np.array([Path(name).parent.name for name in names])
    training = np.array([name.startswith("train/") for name in names])
    tree, model = Tree.read(), find_model(a.model)
    nodes = {folder: node for one in tree.data_sets.values() for folder, node in one["classes"].items()}
    names_of = ["embeddings", f"those of {a.model}", "colour histograms"]
    fixed = [pooled(embed(images, model)), pooled(colours(images))]
    measured: dict[str, NDArray[np.float64]] = {}  # (inputs, distances + 1, 2)
    shares: dict[str, float] = {}
    for fold, info in folds_of(a, sorted({*classes}), nodes):
        inputs = [pooled(embed(images, info)), *fixed]
        for name in fold:
            truth = classes == name
            shares[name] = float(truth[~training].mean())
            measured[name] = np.stack([precisions_of(v, truth, training, a.examples, a.repeats) for v in inputs])
    rows = [[name, *measured[name][:, -1, 1], shares[name]] for name in sorted(measured)]
    means = {"mean": [*measured]}
    if unseen := [name for name in measured if nodes[name] not in model.vocabulary.names]:
        means["mean of classes that base has not"] = unseen
    for title, members in means.items():
        part = np.stack([measured[name] for name in members]).mean(0)
        rows.append([title, *part[:, -1, 1], np.mean([shares[name] for name in members])])
    print(table(["class", *names_of, "share of images"], [[row[0], *(f"{v:.3f}" for v in row[1:])] for row in rows]))
    mean = np.stack([*measured.values()]).mean(0)
    kinds = [*map(str, AROUND), "chosen"]
    rows = [
        [name, kind, *(f"{value:.3f}" for value in pair)]
        for name, part in zip(names_of, mean, strict=True)
        for kind, pair in zip(kinds, part, strict=True)
    ]
    print("\n" + table(["mean of all classes", "around", "tiles", "images"], rows), "\n")
    ours, of_colours = mean[0, -1, 1], mean[-1, -1, 1]
    is_met = ours >= TARGETS["mean"] and ours >= TARGETS["ratio"] * of_colours
    print(
        f"{len(measured)} classes, {a.examples} examples each, {(~training).sum():,} images ranked: mean average "
        f"precision {ours:.3f}, {ours / of_colours:.2f} times that of colour histograms: "
        f"{'met' if is_met else 'missed'} ({TARGETS['mean']:g}, {TARGETS['ratio']:g} times)"
    )


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, nargs="+", required=True, help="as for deepsic train-head")
    parser.add_argument("--others", type=Path, nargs="+", default=[], help="as for it: train a head for each fold")
    parser.add_argument("--prefix", default="Overhead", help="of classes that are learned (default: Overhead)")
    parser.add_argument("--model", default="base")
    parser.add_argument("--head", help="measure this head instead of training some")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=10, help="of a class, and of others (default: 10)")
    parser.add_argument("--repeats", type=int, default=5, help="draws of the examples (default: 5)")
    parser.add_argument("--edge", type=int, default=EDGE, help=f"of images in pixels (default: {EDGE})")
    for name in ("passes", "last_steps", "steps"):
        default = getattr(HeadSettings, name)
        text = f"of training, as for deepsic train-head (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
