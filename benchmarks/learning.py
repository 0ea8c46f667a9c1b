"""Labels from ten examples: average precision on classes of aerial images, beside colour histograms.

    python -m benchmarks.learning --labels EUROSAT_0 EUROSAT_1 SCENES --others PHOTOS
    python -m benchmarks.learning --labels SCENES --head scenes

Each class whose folder begins with ``--prefix`` is learned from ten of its training images, ten of other classes, and
other training images as those drawn at random. The images of the split ``val/`` are ranked by the score. An image is
scaled to ``--edge`` pixels, and its embedding is the mean of those of its label tiles.

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
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import machine, table
from deepsic_codec import config
from deepsic_codec.labels.embeddings import embed_image
from deepsic_codec.labels.learned import BACKGROUND, Examples
from deepsic_codec.labels.vectors import unit
from deepsic_codec.model.file import ModelInfo
from deepsic_codec.model.zoo import find_head, find_model
from deepsic_codec.training.head_data import read_source
from deepsic_codec.training.head_settings import HeadSettings
from deepsic_codec.training.tree import Tree

BINS = 8  # of a colour histogram, for each of three bands
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
    """Square roots of the shares of colours, whose products compare distributions."""
    bins = (image.reshape(-1, 3) // (256 // BINS)).astype(int) @ [BINS * BINS, BINS, 1]
    return np.sqrt(np.bincount(bins, minlength=BINS**3) / len(bins))


def average_precision(scores: Floats, truth: NDArray[np.bool_]) -> float:
    """Mean precision at the rank of each right one."""
    right = truth[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())


def embed(images: Sequence[NDArray[np.uint8]], info: ModelInfo) -> Floats:
    """Return the embedding of each image: the mean of those of its label tiles."""
    return np.stack([embed_image(one, info, tile=TILE).reshape(-1, info.values).mean(0) for one in images])


def precision_of(vectors: Floats, is_class: Truth, training: Truth, examples: int, repeats: int) -> float:
    """Return the average precision of a class learned from examples, as mean over draws of the examples."""
    results = []
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        like = rng.permutation(np.flatnonzero(is_class & training))[:examples]
        unlike = rng.permutation(np.flatnonzero(~is_class & training))[:examples]
        others = np.setdiff1d(np.flatnonzero(training), np.concatenate([like, unlike]))
        others = rng.permutation(others)[:BACKGROUND]
        weights = Examples(vectors[like], vectors[unlike], vectors[others]).fit()
        scores = vectors[~training] @ weights[:-1] + weights[-1]
        results.append(average_precision(scores, is_class[~training]))
    return float(np.mean(results))


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
    histograms = np.stack([histogram(image) for image in images])
    alone = embed(images, model)
    table_rows: dict[str, list[float]] = {}
    for fold, info in folds_of(a, sorted({*classes}), nodes):
        embedded = embed(images, info)
        inputs = [unit(embedded), unit(alone), histograms]
        for name in fold:
            truth = classes == name
            row = [precision_of(vectors, truth, training, a.examples, a.repeats) for vectors in inputs]
            table_rows[name] = [*row, float(truth[~training].mean())]
    rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in sorted(table_rows.items())]
    means = {"mean": np.array([*table_rows.values()]).mean(0)}
    if unseen := [row for name, row in table_rows.items() if nodes[name] not in model.vocabulary.names]:
        means["mean of classes that base has not"] = np.array(unseen).mean(0)
    rows += [[name, *(f"{value:.3f}" for value in row)] for name, row in means.items()]
    print(table(["class", "embeddings", f"those of {a.model}", "colour histograms", "share of images"], rows), "\n")
    ours, _, colours, _ = means["mean"]
    is_met = ours >= TARGETS["mean"] and ours >= TARGETS["ratio"] * colours
    print(
        f"{len(table_rows)} classes, {a.examples} examples each, {(~training).sum():,} images ranked: mean average "
        f"precision {ours:.3f}, {ours / colours:.2f} times that of colour histograms: "
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
