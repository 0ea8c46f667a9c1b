"""Labels from ten examples: average precision on classes of aerial images, beside colour histograms.

    python -m benchmarks.learning --scenes SCENES

``--scenes`` is a zip file ``train/<Class>/<name>.webp`` and ``val/...``. Each class whose name begins with ``--prefix``
is learned from ten of its training images, ten of other classes, and other training images as those drawn at random.
The images of ``val`` are ranked by the score. A head that was trained on these classes says nothing of new ones:
``--model`` names another.
"""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import machine, table
from deepsic_codec.labels.embeddings import embed_image
from deepsic_codec.labels.learned import BACKGROUND, Examples
from deepsic_codec.labels.similarity import WHOLE
from deepsic_codec.labels.vectors import unit
from deepsic_codec.model.zoo import find_model

BINS = 8  # of a colour histogram, for each of three bands
TARGETS = {"mean": 0.6, "ratio": 3.0}

Floats = NDArray[np.float64]


def read_scenes(path: Path, prefix: str, limit: int) -> tuple[list[NDArray[np.uint8]], list[str], NDArray[np.bool_]]:
    """Images, their classes, and whether each is for training."""
    archive = zipfile.ZipFile(path)
    images: list[NDArray[np.uint8]] = []
    classes: list[str] = []
    training: list[bool] = []
    count: dict[tuple[str, ...], int] = {}
    for name in sorted(archive.namelist()):
        parts = name.split("/")
        if len(parts) < 3 or not parts[-2].startswith(prefix) or not name.endswith(".webp"):
            continue
        key = tuple(parts[-3:-1])
        count[key] = count.get(key, 0) + 1
        if count[key] > limit:
            continue
        images.append(np.asarray(Image.open(BytesIO(archive.read(name))).convert("RGB")))
        classes.append(parts[-2])
        training.append(parts[-3] == "train")
    return images, classes, np.array(training)


def histogram(image: NDArray[np.uint8]) -> Floats:
    """Square roots of the shares of colours, whose products compare distributions."""
    bins = (image.reshape(-1, 3) // (256 // BINS)).astype(int) @ [BINS * BINS, BINS, 1]
    return np.sqrt(np.bincount(bins, minlength=BINS**3) / len(bins))


def average_precision(scores: Floats, truth: NDArray[np.bool_]) -> float:
    """Mean precision at the rank of each right one."""
    right = truth[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--prefix", default="Overhead", help="of classes that are learned (default: Overhead)")
    parser.add_argument("--model", default="base")
    parser.add_argument("--examples", type=int, default=10, help="of a class, and of others (default: 10)")
    parser.add_argument("--repeats", type=int, default=5, help="draws of the examples (default: 5)")
    parser.add_argument("--limit", type=int, default=1000, help="images of a class and part, at most")
    args = parser.parse_args(argv)
    print(machine(os.cpu_count() or 1), "\n", flush=True)
    images, classes, training = read_scenes(args.scenes, args.prefix, args.limit)
    info = find_model(args.model)
    embedded = np.concatenate([embed_image(image, info, tile=WHOLE).reshape(1, -1) for image in images])
    inputs = {"embeddings": unit(embedded), "colour histograms": np.stack([histogram(image) for image in images])}
    names = np.array(classes)
    rows: list[list[str]] = []
    means: dict[str, list[float]] = {kind: [] for kind in inputs}
    for name in sorted({*classes}):
        is_class = names == name
        results: dict[str, list[float]] = {kind: [] for kind in inputs}
        for repeat in range(args.repeats):
            rng = np.random.default_rng(repeat)
            like = rng.permutation(np.flatnonzero(is_class & training))[: args.examples]
            unlike = rng.permutation(np.flatnonzero(~is_class & training))[: args.examples]
            others = np.setdiff1d(np.flatnonzero(training), np.concatenate([like, unlike]))
            others = rng.permutation(others)[:BACKGROUND]
            for kind, vectors in inputs.items():
                weights = Examples(vectors[like], vectors[unlike], vectors[others]).fit()
                scores = vectors[~training] @ weights[:-1] + weights[-1]
                results[kind].append(average_precision(scores, is_class[~training]))
        chance = is_class[~training].mean()
        row = [float(np.mean(part)) for part in results.values()]
        for kind, value in zip(inputs, row, strict=True):
            means[kind].append(value)
        rows.append([name, *(f"{value:.3f}" for value in row), f"{chance:.3f}"])
    mean = {kind: float(np.mean(part)) for kind, part in means.items()}
    rows.append(["mean", *(f"{value:.3f}" for value in mean.values()), ""])
    print(table(["class", *(f"AP, {kind}" for kind in inputs), "share of images"], rows), "\n")
    ratio = mean["embeddings"] / mean["colour histograms"]
    is_met = mean["embeddings"] >= TARGETS["mean"] and ratio >= TARGETS["ratio"]
    print(
        f"{len(rows) - 1} classes, {args.examples} examples each, {(~training).sum():,} images ranked: mean average "
        f"precision {mean['embeddings']:.3f}, {ratio:.2f} times that of colour histograms: "
        f"{'met' if is_met else 'missed'} ({TARGETS['mean']:g}, {TARGETS['ratio']:g} times)"
    )


if __name__ == "__main__":
    main()
