"""What a head says of images of several data sets: top-1 and top-5, broader names, unknown, calibration, embeddings.

    python -m benchmarks.labels --head scenes --labels EUROSAT_VAL SCENES_LABELLED --split val/ --others KODAK
    python -m benchmarks.labels --labels EUROSAT_VAL --bpp 0.5 --limit 500

Images are of classes of the tree of `deepsic train-head` (`--tree`). Those of at most 64 pixels are chunks as they
are; the centre of larger ones is scaled to 128 x 128 pixels and is a chunk of one label tile. Each chunk is coded as
features of the given bits per pixel, header, labels and embedding included. Labels are those *stored* in the chunk, of
float latents, and those computed from its *features*.

Top-1 and top-5 are among the classes that the image's own data set has, as those of others are unknown, not absent;
images of a class that the head does not announce count as wrong, and data sets of which it announces none are left out;
*of all* is top-1 among all classes and "unknown", right if it is the class or one below it. *Parent* is the share of
images whose best node of the level above (the children of the top of the tree) is right, over all data sets together.
*Like it* is the share of the five nearest other images by embedding that have the same class.

``--mosaics`` is a number of chunks of 2 x 2 images, each scaled to 256 x 256 pixels: top-1 of label tiles of 64, 128
and 256 pixels, among the classes of the image's data set, with both values of ``label_pooling``. A tile of 64 shows a
sixteenth of an image. For small things, as many chunks of 4 x 4 images of one cell: precision and recall of
queries for chunks whose tiles are 64, 128 and 256 pixels. A tile has a class if one of its images has it. ``--png``
plots the shares that are right over scores, at all rates.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, table
from deepsic_codec import DeepSIC
from deepsic_codec.codec.decode import compute_cells, parse_payload
from deepsic_codec.codec.labels import tile_embeddings, tile_labels
from deepsic_codec.io.images import Pixels
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.header import unpack
from deepsic_codec.payload.labels import POOLINGS
from deepsic_codec.payload.sections import EMBEDDING, LABELS
from deepsic_codec.training.head_data import read_source
from deepsic_codec.training.tree import PACKAGED, Tree

EDGE, TILE, BATCH, NEIGHBOURS = 128, 64, 128, 5
SCENE, TILES = 256, (64, 128, 256)  # pixels of an image of a mosaic; of label tiles
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01)

Scores = NDArray[np.float64]


class Measured:
    """Scores and embeddings of images at a rate, stored and from features."""

    def __init__(self, codec: DeepSIC, images: Sequence[Pixels]) -> None:
        info = find_model(*codec.identity()[:1], head=codec.identity()[1])
        count, self.nbytes, self.pixels = len(info.vocabulary.names), 0, 0
        stored, computed, vectors = [], [], []
        for k in range(0, len(images), BATCH):
            payloads = codec.encode_batch(images[k : k + BATCH])
            jobs = [parse_payload(payload, params=codec) for payload in payloads]
            for payload, job, cells in zip(payloads, jobs, compute_cells(jobs, info, get_scheduler(info)), strict=True):
                self.nbytes += len(payload)
                self.pixels += job.header.height * job.header.width
                unpacked = unpack(payload)
                stored.append(unpacked.read(LABELS).dense(count).reshape(-1, count).max(0))
                size = job.header.height, job.header.width, codec.label_tile
                computed.append(tile_labels(cells, info.vocabulary, *size).dense(count).reshape(-1, count).max(0))
                embedding = unpacked.read(EMBEDDING) or tile_embeddings(cells, info.vocabulary, *size)
                vectors.append(embedding.vectors.reshape(-1, embedding.vectors.shape[-1])[0])
        self.scores = {"stored": np.array(stored) / 255, "features": np.array(computed) / 255}
        self.vectors = np.array(vectors, np.float64)
        self.vocabulary = info.vocabulary

    @property
    def bpp(self) -> float:
        """Bits per pixel of whole payloads."""
        return 8 * self.nbytes / max(1, self.pixels)

    def of(self, scores: Scores, name: str) -> Scores:
        """Scores of a class or parent, (N,)."""
        return np.asarray(scores[:, list(self.vocabulary.members(name))].max(1))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a head and print the tables."""
    a = _arguments(argv)
    print(machine(1), "\n")
    tree = Tree.read(a.tree or PACKAGED)
    images, places = labelled_tiles(tree, a)
    others = [_tile(pixels) for path in a.others for _, pixels in read_source(path)][: a.limit]
    names = list(tree.nodes[: tree.leaves])
    rows, parents, calibration, strange, scales, things = [], [], [], [], [], []
    for bpp in a.bpp:
        codec = DeepSIC(model=a.model, head=a.head, bpp=bpp, transform="features", embedding=True, label_tile=EDGE)
        measured = Measured(codec.resolved(), images)
        known = [name for name in names if name in measured.vocabulary.names]
        for kind, scores in measured.scores.items():
            for data_set in dict.fromkeys(one for one, node in places if node in measured.vocabulary.known):
                rows.append(
                    [data_set, bpp, measured.bpp, kind, *_accuracy(measured, scores, places, data_set, known, tree)]
                )
            parents.append([bpp, kind, *_parents(measured, scores, places, tree)])
            calibration += [[bpp, kind, *row] for row in _reliability(measured, scores, places, tree)]
        if a.mosaics:
            scales += [[bpp, *row] for row in _mosaics(codec.resolved(), a, tree)]
            things += [[bpp, *row] for row in _small_things(codec.resolved(), a, tree)]
        if others:
            alone = Measured(codec.resolved(), others)
            for kind, scores in alone.scores.items():
                strange.append([bpp, kind, len(others), 100 * float((alone.of(scores, "unknown") >= 0.5).mean())])
    header = ["data set", "target", "bpp", "labels", "images", "top-1 %", "top-5 %", "of all %", "like it %"]
    print(table(header, rows))
    print("\n" + table(["target", "labels", "parent %", "precision at 0.5 %", "recall at 0.5 %"], parents))
    print("\n" + table(["target", "labels", "score", "classes", "mean score", "share that is right"], calibration))
    if strange:
        print("\n" + table(["target", "labels", "images of no class", "unknown at 0.5 %"], strange))
    if scales:
        print("\n" + table(["target", "label tile", "pooling", "tiles", "top-1 %", "parent %"], scales))
        print("\n" + table(["target", "label tile", "pooling", "tiles", "precision %", "recall %"], things))
    if a.png:
        _plot(a.png, calibration)


def labelled_tiles(tree: Tree, a: argparse.Namespace) -> tuple[list[Pixels], list[tuple[str, str]]]:
    """Read images of classes of the tree; return them as chunks, with data set and node."""
    images, places = _images(tree, a)
    return [_tile(pixels) for pixels in images], places


def _images(tree: Tree, a: argparse.Namespace) -> tuple[list[Pixels], list[tuple[str, str]]]:
    images, places = [], []
    for source in a.labels:
        named = [(tree.locate(Path(n).parent.name, Path(n).name), x) for n, x in read_source(source, a.split)]
        located = [(place, x) for place, x in named if place is not None]
        for place, pixels in located[:: max(1, len(located) // a.limit)] if a.limit else located:
            images.append(pixels)
            places.append(place)
    if not images:
        raise SystemExit("--labels: no image lies in a folder that the tree names")
    return images, places


def _mosaics(codec: DeepSIC, a: argparse.Namespace, tree: Tree) -> list[list[Any]]:
    """Return size, pooling and number of label tiles, shares that are right, and whose parent is."""
    images, places = _images(tree, a)
    large = np.flatnonzero([max(pixels.shape[:2]) > TILE for pixels in images])
    chosen = np.random.default_rng(0).permutation(large)[: len(large) // 4 * 4][: 4 * a.mosaics].reshape(-1, 2, 2)
    info = find_model(*codec.identity()[:1], head=codec.identity()[1])
    vocabulary, count = info.vocabulary, len(info.vocabulary.names)
    right = {(tile, pooling): np.zeros(3) for tile in TILES for pooling in POOLINGS}
    for group in chosen:
        chunk = np.concatenate([np.concatenate([_square(images[i], SCENE) for i in row], 1) for row in group])
        job = parse_payload(codec.encode(chunk), params=codec)
        (cells,) = compute_cells([job], info, get_scheduler(info))
        for tile, pooling in right:
            scores = tile_labels(cells, vocabulary, *chunk.shape[:2], (tile, tile), pooling).dense(count)[0]
            n = SCENE // tile
            for (y, x), i in np.ndenumerate(group):
                data_set, node = places[i]
                classes = dict.fromkeys(tree.data_sets[data_set]["classes"].values())
                known = [name for name in classes if name in vocabulary.known]
                members = [list(vocabulary.members(name)) for name in known]
                at = slice(n * y, n * y + n), slice(n * x, n * x + n)
                for one in scores[at].reshape(n * n, -1):
                    if known:
                        best = known[int(np.argmax([one[m].max() for m in members]))]
                        right[tile, pooling] += 1, best == node, tree.path(best)[-2:] == tree.path(node)[-2:]
    return [[*key, int(n), *(100 * np.array(hits) / max(1, n))] for key, (n, *hits) in right.items()]


def _small_things(codec: DeepSIC, a: argparse.Namespace, tree: Tree) -> list[list[Any]]:
    """Return size, pooling and number of label tiles, and precision and recall of what they have of their cells."""
    images, places = _images(tree, a)
    small = np.flatnonzero([pixels.shape[:2] == (TILE, TILE) for pixels in images])
    chosen = np.random.default_rng(0).permutation(small)[: len(small) // 16 * 16][: 16 * a.mosaics].reshape(-1, 4, 4)
    info = find_model(*codec.identity()[:1], head=codec.identity()[1])
    vocabulary, count = info.vocabulary, len(info.vocabulary.names)
    names = [name for name in dict.fromkeys(places[i][1] for i in small) if name in vocabulary.known]
    members = [list(vocabulary.members(name)) for name in names]
    said = {(tile, pooling): np.zeros(4) for tile in TILES for pooling in POOLINGS}
    for group in chosen:
        chunk = np.concatenate([np.concatenate([images[i] for i in row], 1) for row in group])
        job = parse_payload(codec.encode(chunk), params=codec)
        (cells,) = compute_cells([job], info, get_scheduler(info))
        truth = np.array([[[places[i][1] == name for name in names] for i in row] for row in group])
        for tile, pooling in said:
            scores = tile_labels(cells, vocabulary, *chunk.shape[:2], (tile, tile), pooling).dense(count)[0]
            n = len(scores)
            has = truth.reshape(n, 4 // n, n, 4 // n, -1).any((1, 3))
            named = np.stack([scores[..., m].max(-1) >= 128 for m in members], -1)
            said[tile, pooling] += n * n, (named & has).sum(), named.sum(), has.sum()
    return [
        [*key, int(n), 100 * right / max(1, named), 100 * right / max(1, has)]
        for key, (n, right, named, has) in said.items()
    ]


def _tile(pixels: Pixels) -> Pixels:
    """Return the centre of an image as one label tile; images of at most 64 pixels as they are."""
    return pixels if max(pixels.shape[:2]) <= TILE else _square(pixels, EDGE)


def _square(pixels: Pixels, edge: int) -> Pixels:
    """Return the centre of an image, scaled."""
    from PIL import Image

    height, width = pixels.shape[:2]
    size = min(height, width)
    y, x = (height - size) // 2, (width - size) // 2
    scaled = Image.fromarray(pixels[y : y + size, x : x + size]).resize((edge, edge), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


def _plot(path: str, rows: Sequence[Sequence[Any]]) -> None:
    """Draw the shares that are right over mean scores."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    for bpp, kind in dict.fromkeys((row[0], row[1]) for row in rows):
        points = [(row[4], row[5]) for row in rows if row[:2] == [bpp, kind]]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{kind}, {bpp:g} bpp")
    axis.set(xlabel="mean score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=100)


def _accuracy(
    measured: Measured,
    scores: Scores,
    places: Sequence[tuple[str, str]],
    data_set: str,
    leaves: list[str],
    tree: Tree,
) -> list[Any]:
    at = np.array([one == data_set for one, _ in places])
    truth = np.array([node for _, node in places])[at]
    classes = [name for name in dict.fromkeys(truth) if name in measured.vocabulary.known]
    top = top_shares(measured.vocabulary, scores[at], truth)
    every = list(dict.fromkeys([*leaves, *classes, "unknown"]))
    best = np.array(every)[np.stack([measured.of(scores[at], name) for name in every], 1).argmax(1)]
    unit = measured.vectors[at] / np.maximum(1e-9, np.linalg.norm(measured.vectors[at], axis=1, keepdims=True))
    near = unit @ unit.T
    np.fill_diagonal(near, -2)
    like = truth[np.argsort(-near, 1)[:, :NEIGHBOURS]] == truth[:, None]
    below = [one != "unknown" and node in tree.path(one) for one, node in zip(best, truth, strict=True)]
    return [int(at.sum()), *top, 100 * float(np.mean(below)), 100 * float(like.mean())]


def top_shares(vocabulary: Vocabulary, scores: Scores, truth: NDArray[np.str_]) -> list[float]:
    """Return top-1 and top-5 in percent, among the classes that occur and that the vocabulary has."""
    classes = [name for name in dict.fromkeys(truth) if name in vocabulary.known]
    values = np.stack([scores[:, list(vocabulary.members(name))].max(1) for name in classes], 1)
    ranked = np.array(classes)[np.argsort(-values, 1, kind="stable")]
    return [100 * float((ranked[:, :k] == truth[:, None]).any(1).mean()) for k in (1, 5)]


def _parents(measured: Measured, scores: Scores, places: Sequence[tuple[str, str]], tree: Tree) -> list[float]:
    """Share of images whose best node below the top is right, and precision and recall of these at 0.5."""
    names = [node for node in tree.nodes if len(tree.path(node)) == 2 and node in measured.vocabulary.known]
    truth = [next((one for one in tree.path(node) if one in names), "") for _, node in places]
    at = np.array([one != "" for one in truth])
    if not names:
        return [float("nan")] * 3
    values = np.stack([measured.of(scores[at], name) for name in names], 1)
    expected = np.array(truth)[at][:, None] == np.array(names)
    said = values >= 0.5
    right = (values.argmax(1) == expected.argmax(1)).mean()
    precision, recall = (said & expected).sum() / max(1, said.sum()), (said & expected).sum() / expected.sum()
    return [100 * float(one) for one in (right, precision, recall)]


def _reliability(measured: Measured, scores: Scores, places: Sequence[tuple[str, str]], tree: Tree) -> list[list[Any]]:
    """Mean score and share that is right, by score, of the classes of each image's own data set."""
    values, right = [], []
    for number, (data_set, node) in enumerate(places):
        for name in tree.data_sets[data_set]["classes"].values():
            if name in measured.vocabulary.known:
                values.append(measured.of(scores[number : number + 1], name)[0])
                right.append(name in tree.path(node))
    value, is_right = np.array(values), np.array(right)
    rows = []
    for low, high in zip(BINS[:-1], BINS[1:], strict=True):
        at = (value >= low) & (value < high)
        if at.any():
            rows.append([f"{low:g} to {min(1, high):g}", int(at.sum()), value[at].mean(), is_right[at].mean()])
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="name of the model")
    parser.add_argument("--head", help="name of the head (default: that of the model)")
    parser.add_argument("--labels", nargs="+", required=True, help="labelled images, as for deepsic train-head")
    parser.add_argument("--split", default="val/", help="start of the paths of the images to measure (default: val/)")
    parser.add_argument("--others", nargs="+", default=[], help="images of no class")
    parser.add_argument("--tree", default="", help="JSON of the tree (default: that of the packaged head)")
    parser.add_argument("--bpp", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--mosaics", type=int, default=0, help="chunks of 2 x 2 images for labels at several scales")
    parser.add_argument("--png", help="file of a plot of the calibration")
    parser.add_argument("--limit", type=int, help="about as many images of each source")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
