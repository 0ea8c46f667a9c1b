"""Labels that were learned from examples: a linear classifier on embeddings, whose scores are a column of the index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError, ExpressionError, LabelIndexError, StaleIndex, counted, did_you_mean
from deepsic_codec.labels.index import LabelIndex
from deepsic_codec.labels.index_writer import IndexWriter, replace
from deepsic_codec.labels.learned_label import MAX_AROUND, LearnedLabel
from deepsic_codec.labels.selection import Selection, TileSelection
from deepsic_codec.labels.similarity import Example, check_k, example_of, select, where_mask
from deepsic_codec.labels.vectors import TileVectors, largest, unit
from deepsic_codec.model.vocabulary import MAX_CLASSES, MAX_NAME, Vocabulary
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import Counter, IndexLocation

if TYPE_CHECKING:
    from deepsic_codec.labels.query import Labels

RIDGE = 0.01  # weight of the squared length of the weights against the mean loss
STEPS = 50  # of Newton's method, at most
BACKGROUND = 1000  # tiles drawn at random that stand for all others
BACKGROUND_SHARE = 0.8  # of the weight of what the label is not, where there are examples of that too
FOLDS = 5
KINDS = "like", "unlike", "background"
MIN_LIKE = 2
MIN_CHUNKS = 4  # of examples that say whether tiles around count
MAX_EXAMPLES = 10_000
LISTED = 5  # tiles that a message names
AROUND = 0, 1, 2  # distances of tiles that may count, of which cross-validation chooses one

Floats = NDArray[np.float64]


def fit(vectors: Floats, targets: NDArray[np.bool_], weights: Floats) -> Floats:
    """Fit a logistic regression with a ridge penalty.

    Parameters
    ----------
    vectors : ndarray
        float64 (n, values).
    targets : ndarray
        bool (n,).
    weights : ndarray
        Of the examples, float64 (n,), 1 together.

    Returns
    -------
    ndarray
        float64 (values + 1,): weights of the values, and last the bias, which has no penalty.
    """
    inputs = np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1)
    penalty = np.full(inputs.shape[1], RIDGE)
    penalty[-1] = 1e-9  # so that the matrix has an inverse
    result = np.zeros(inputs.shape[1])
    for _ in range(STEPS):
        chances = sigmoid(inputs @ result)
        gradient = inputs.T @ (weights * (chances - targets)) + penalty * result
        curvature = (inputs * (weights * chances * (1 - chances))[:, None]).T @ inputs + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        result -= step / max(1.0, np.abs(step).max() / 10)
        if np.abs(step).max() < 1e-9:
            break
    return result


def sigmoid(values: Floats) -> Floats:
    """Return 1 / (1 + exp(-values))."""
    return 0.5 * (1 + np.tanh(values / 2))


@dataclass(frozen=True)
class Examples:
    """Examples of a label, of what it is not, and tiles drawn at random.

    Attributes
    ----------
    like, unlike, background : ndarray
        Directions of embeddings, float64 (n, values).
    places : dict of str to ndarray
        For "like", "unlike" and "background", numbers of the places that they are of, int64 (n,); without, each is of
        another place. Tiles of one place look alike, so that cross-validation holds out all of them together.
    """

    like: Floats
    unlike: Floats
    background: Floats
    places: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, tuple[Floats, float]]:
        """The kinds of examples, each with the weight of all of its kind: what the label is weighs half."""
        share: float = (
            BACKGROUND_SHARE if len(self.unlike) and len(self.background) else float(len(self.background) > 0)
        )
        return {
            "like": (self.like, 0.5),
            "unlike": (self.unlike, 0.5 * (1 - share)),
            "background": (self.background, 0.5 * share),
        }

    def fit(self) -> Floats:
        """Fit the classifier."""
        parts = self.parts.values()
        weights = np.concatenate([np.full(len(part), weight / max(1, len(part))) for part, weight in parts])
        targets = np.arange(len(weights)) < len(self.like)
        return fit(np.concatenate([part for part, _ in parts]), targets, weights)

    def cross_validate(self) -> "CrossValidation":
        """Judge examples by classifiers that were fitted to examples of other places.

        If all are of one place, other tiles of the place take part in fitting.
        """
        rng = np.random.default_rng(0)
        folds = min(FOLDS, len(np.unique(self.places["like"])) if "like" in self.places else len(self.like))
        folds = folds if folds >= MIN_LIKE else min(FOLDS, len(self.like))
        fold_of = {kind: self._folds(kind, folds, rng) for kind in KINDS}
        logits = {kind: np.full(len(part), np.nan) for kind, (part, _) in self.parts.items()}
        for fold in range(folds):
            left = {kind: part[fold_of[kind] != fold] for kind, (part, _) in self.parts.items()}
            weights = Examples(**left).fit()
            for kind, (part, _) in self.parts.items():
                at = fold_of[kind] == fold
                logits[kind][at] = part[at] @ weights[:-1] + weights[-1]
        loss = 0.0
        for kind, (_, weight) in self.parts.items():
            judged = logits[kind][~np.isnan(logits[kind])]
            if len(judged):
                loss += weight * float(np.logaddexp(0, -judged if kind == "like" else judged).mean())
        # What the label is not are the examples of that, or without any the tiles drawn at random.
        negative = logits["unlike" if len(self.unlike) >= MIN_LIKE else "background"]
        hits, wrong = int((logits["like"] >= 0).sum()), int((negative >= 0).sum())
        return CrossValidation(hits / (hits + wrong) if hits + wrong else None, hits / len(self.like), loss)

    def _folds(self, kind: str, folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the fold of each example, int64 (n,); a single one is never held out."""
        count = len(self.parts[kind][0])
        if count < MIN_LIKE:
            return np.full(count, -1)
        _, place = np.unique(self.places.get(kind, np.arange(count)), return_inverse=True)
        place = place if place.max() else np.arange(count)
        return (rng.permutation(int(place.max()) + 1) % folds)[place]


@dataclass(frozen=True)
class CrossValidation:
    """What classifiers say of examples that they were not fitted to.

    Attributes
    ----------
    precision : float or None
        From a score of 0.5 on; None if no example reaches it.
    recall : float
        From a score of 0.5 on.
    loss : float
        Mean cross-entropy, in nats.
    """

    precision: float | None
    recall: float
    loss: float


def learn(labels: "Labels", name: Any, like: Any, unlike: Any, around: Any) -> LearnedLabel:
    """Learn the label that `Labels.learn` describes, and write it to the index."""
    index = labels.index
    _check_name(name, labels.vocabulary)
    radii = _radii(labels.geometry, around)
    if not index.values:
        raise LabelIndexError(
            f"{index.location}: the index has no embeddings, which labels are learned from; run relabel, or write the "
            "array with DeepSIC(embedding=True)"
        )
    if index.location.store.read_only:
        raise LabelIndexError(
            f"{index.location}: the store is open for reading only, and a label is written to the index; pass "
            "mode='r+' to open_labels"
        )
    tiles = labels.tile_vectors()
    positive, negative = _examples(labels, tiles, "like", like), _examples(labels, tiles, "unlike", unlike)
    positives, other = _numbers(positive), _numbers(negative)
    both = np.intersect1d(positives, other)
    if len(both):
        grid = labels.geometry.tile_grid
        listed = ", ".join(str(tuple(map(int, np.unravel_index(number, grid)))) for number in both[:LISTED])
        raise ConfigurationError(
            f"{counted(len(both), 'tile')} in the examples of {name!r} and of what it is not: {listed}; leave them out "
            "of one of both"
        )
    counts = [len(numbers) + len(_images(part)) for part, numbers in ((positive, positives), (negative, other))]
    if counts[0] < MIN_LIKE:
        raise ConfigurationError(f"like: expected at least {MIN_LIKE} tiles of {name!r}, got {counts[0]}; pass more")
    rng = np.random.default_rng(0)
    others: NDArray[np.int64] = np.setdiff1d(np.flatnonzero(tiles.exist), np.concatenate([positives, other]))
    others = np.sort(rng.permutation(others)[:BACKGROUND])
    if not len(others) and not counts[1]:
        raise ConfigurationError(f"unlike: all tiles of the array are examples of {name!r}; pass tiles that are not")
    parts: dict[str, tuple[list[Example], NDArray[np.int64]]] = {
        "like": (positive, positives),
        "unlike": (negative, other),
        "background": ([], others),
    }
    places = {kind: _places(labels.geometry, *part) for kind, part in parts.items()}
    if around is None and len(np.unique(places["like"][: len(positives)])) < MIN_CHUNKS:
        radii = radii[:1]  # too few for a choice; images have no tiles around
    tried = {
        radius: Examples(
            **{kind: _directions(*part, tiles, radius, labels.geometry) for kind, part in parts.items()}, places=places
        )
        for radius in radii
    }
    results = {radius: examples.cross_validate() for radius, examples in tried.items()}
    radius = min(radii, key=lambda one: results[one].loss)
    weights = tried[radius].fit()
    texts = {"like": [one.text for one in positive], "unlike": [one.text for one in negative]}
    learned = LearnedLabel(
        name=name,
        weights=tuple(weights[:-1].tolist()),
        bias=float(weights[-1]),
        around=radius,
        head=labels.vocabulary.head,
        precision=results[radius].precision,
        recall=results[radius].recall,
        like=counts[0],
        unlike=counts[1],
        examples={kind: tuple(text[:MAX_NAME] for text in part[:MAX_EXAMPLES]) for kind, part in texts.items()},
        tiles={"like": positives.tolist(), "unlike": other.tolist()},
    )
    _write(labels, [*(one for one in index.learned if one.name != name), learned])
    return learned


def forget(labels: "Labels", name: str) -> None:
    """Take a learned label out of the index."""
    of_name(labels.index, name)
    _write(labels, [one for one in labels.index.learned if one.name != name])


def of_name(index: LabelIndex, name: str) -> LearnedLabel:
    """Return the learned label of this name; raises ExpressionError if there is none."""
    known = {one.name: one for one in index.learned}
    if name not in known:
        raise ExpressionError(f"no learned label {name!r}{did_you_mean(name, known) or '; learn it first'}")
    return known[name]


def suggest(labels: "Labels", name: str, k: int, where: Any) -> TileSelection:
    """Return the tiles that `Labels.suggest` describes."""
    check_k(k)
    learned, tiles, counter = of_name(labels.index, name), labels.tile_vectors(), Counter()
    chances = learned.chances(tiles, labels.geometry)
    possible = tiles.exist
    if where is not None:
        possible &= where_mask(labels, where, counter)
    for part in learned.tiles.values():
        possible[np.array(part, np.int64)] = False
    doubt = np.where(possible, -np.abs(chances - 0.5), -np.inf).astype(np.float32)
    numbers = largest(doubt, k)
    numbers = numbers[possible[numbers]]
    return select(labels, numbers, f"unsure of {name}", {"score": chances[numbers].astype(np.float32)}, counter)


def _check_name(name: Any, vocabulary: Vocabulary) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable() or {"'", '"'} <= {*name}:
        raise ConfigurationError(
            f"name: expected 1 to {MAX_NAME} printable characters, without both kinds of quotes, got {name!r:.80}"
        )
    if name in (*vocabulary.names, *vocabulary.parents):
        raise ConfigurationError(f"name: {name!r} is a label of the vocabulary already; choose another name")
    if name not in vocabulary.learned and len(vocabulary.learned) >= MAX_CLASSES:
        raise ConfigurationError(f"name: the index has {MAX_CLASSES} learned labels already; forget one of them")


def _examples(labels: "Labels", tiles: TileVectors, kind: str, parts: Any) -> list[Example]:
    if isinstance(parts, Selection):
        parts = [parts]
    if not isinstance(parts, list | tuple):
        raise ConfigurationError(f"{kind}: expected a list of chunks, regions, selections or images, got {parts!r:.80}")
    if len(parts) > MAX_EXAMPLES:
        raise ConfigurationError(f"{kind}: {len(parts):,} examples; at most {MAX_EXAMPLES:,} are allowed")
    return [example_of(labels, tiles, part) for part in parts]


def _numbers(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the numbers of the tiles that are examples, each once, int64 (tiles,)."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(one.numbers for one in examples)]))


def _images(examples: Sequence[Example]) -> list[NDArray[np.int8]]:
    """Return the embeddings of the images among examples, each int8 (1, values)."""
    return [one.vectors for one in examples if not len(one.numbers)]


def _directions(
    examples: Sequence[Example], numbers: NDArray[np.int64], tiles: TileVectors, radius: int, geometry: Geometry
) -> Floats:
    """Return the directions of examples, tiles first; a tile counts once, with the tiles around it."""
    return unit(np.concatenate([tiles.pooled(radius, geometry, numbers), *_images(examples)]))


def _places(geometry: Geometry, examples: Sequence[Example], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return numbers of the places of examples: of the chunk of a tile, and another one for each image."""
    positions = np.stack(np.unravel_index(numbers, geometry.tile_grid)) // np.array(geometry.per_chunk)[:, None]
    chunks = np.ravel_multi_index(tuple(positions), geometry.grid)
    return np.concatenate([chunks, prod(geometry.grid) + np.arange(len(_images(examples)))])


def _radii(geometry: Geometry, around: Any) -> tuple[int, ...]:
    """Return the distances of tiles to choose from."""
    if around is None:
        reach = max(geometry.per_chunk[axis] for axis in (geometry.axes.y, geometry.axes.x))
        return tuple(radius for radius in AROUND if radius < reach)
    if not isinstance(around, int | np.integer) or isinstance(around, bool) or not 0 <= around <= MAX_AROUND:
        raise ConfigurationError(f"around: expected a number of tiles from 0 to {MAX_AROUND}, or None, got {around!r}")
    return (int(around),)


def _write(labels: "Labels", learned: Sequence[LearnedLabel]) -> None:
    """Write the index again with these learned labels, and make the new version that of the labels."""
    old = labels.index
    if LabelIndex(old.location).group.path != old.group.path:
        raise StaleIndex(f"{old.location}: the index was replaced since it was opened; open the labels again")
    vocabulary = old.vocabulary.with_learned(one.name for one in learned)
    about = {key: old.about[key] for key in ("name", "decoder", "fingerprint")}

    def write(version: IndexLocation) -> None:
        writer = IndexWriter(version, old.geometry, vocabulary, about, learned)
        for start, stop in writer.chunking.units(old.geometry.grid):
            writer.write(old.block(start, stop))
        writer.finish()

    replace(old.location, write)
    labels.use_index(LabelIndex(old.location))
