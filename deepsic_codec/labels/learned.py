"""Labels that were learned from examples: a linear classifier on embeddings, whose scores are a column of the index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError, ExpressionError, LabelIndexError, StaleIndex, did_you_mean
from deepsic_codec.labels.index import LabelIndex
from deepsic_codec.labels.index_writer import IndexWriter, replace
from deepsic_codec.labels.learned_label import LearnedLabel
from deepsic_codec.labels.selection import Selection, TileSelection
from deepsic_codec.labels.similarity import Example, check_k, example_of, select, where_mask
from deepsic_codec.labels.vectors import TileVectors, largest, unit
from deepsic_codec.model.vocabulary import MAX_CLASSES, MAX_NAME, Vocabulary
from deepsic_codec.stored.location import Counter, IndexLocation

if TYPE_CHECKING:
    from deepsic_codec.labels.query import Labels

RIDGE = 0.01  # weight of the squared length of the weights against the mean loss
STEPS = 50  # of Newton's method, at most
BACKGROUND = 1000  # tiles drawn at random that stand for all others
BACKGROUND_SHARE = 0.8  # of the weight of what the label is not, where there are examples of that too
FOLDS = 5
MIN_LIKE = 2
MAX_EXAMPLES = 10_000
LISTED = 5  # tiles that a message names

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
    """

    like: Floats
    unlike: Floats
    background: Floats

    def fit(self) -> Floats:
        """Fit the classifier; what the label is weighs as much as what it is not."""
        share: float = (
            BACKGROUND_SHARE if len(self.unlike) and len(self.background) else float(len(self.background) > 0)
        )
        parts = ((self.like, 0.5), (self.unlike, 0.5 * (1 - share)), (self.background, 0.5 * share))
        weights = np.concatenate([np.full(len(part), weight / max(1, len(part))) for part, weight in parts])
        targets = np.arange(len(weights)) < len(self.like)
        return fit(np.concatenate([part for part, _ in parts]), targets, weights)

    def cross_validate(self) -> tuple[float | None, float]:
        """Return precision and recall of examples that the classifier was not fitted to, from 0.5 on.

        What the label is not are the examples of that, or without any the tiles drawn at random.
        """
        others = "unlike" if len(self.unlike) >= MIN_LIKE else "background"
        negative = getattr(self, others)
        rng = np.random.default_rng(0)
        folds = min(FOLDS, len(self.like))
        of_like, of_negative = (rng.permutation(len(part)) % folds for part in (self.like, negative))
        hits = wrong = 0
        for fold in range(folds):
            parts = {"like": self.like[of_like != fold], "unlike": self.unlike, "background": self.background}
            parts[others] = negative[of_negative != fold]
            weights = Examples(**parts).fit()
            hits += int((self.like[of_like == fold] @ weights[:-1] + weights[-1] >= 0).sum())
            wrong += int((negative[of_negative == fold] @ weights[:-1] + weights[-1] >= 0).sum())
        return (hits / (hits + wrong) if hits + wrong else None), hits / len(self.like)


def learn(labels: "Labels", name: Any, like: Any, unlike: Any) -> LearnedLabel:
    """Learn the label that `Labels.learn` describes, and write it to the index."""
    index = labels.index
    _check_name(name, labels.vocabulary)
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
            f"{len(both)} tiles are examples of {name!r} and of what it is not: {listed}; leave them out of one of both"
        )
    like_vectors, unlike_vectors = _directions(positive, positives, tiles), _directions(negative, other, tiles)
    if len(like_vectors) < MIN_LIKE:
        raise ConfigurationError(
            f"like: expected at least {MIN_LIKE} tiles of {name!r}, got {len(like_vectors)}; pass more"
        )
    rng = np.random.default_rng(0)
    others: NDArray[np.int64] = np.setdiff1d(np.flatnonzero(tiles.exist), np.concatenate([positives, other]))
    others = np.sort(rng.permutation(others)[:BACKGROUND])
    if not len(others) and not len(unlike_vectors):
        raise ConfigurationError(f"unlike: all tiles of the array are examples of {name!r}; pass tiles that are not")
    examples = Examples(like_vectors, unlike_vectors, unit(tiles.vectors[others]))
    precision, recall = examples.cross_validate()
    weights = examples.fit()
    texts = {"like": [one.text for one in positive], "unlike": [one.text for one in negative]}
    learned = LearnedLabel(
        name=name,
        weights=tuple(weights[:-1].tolist()),
        bias=float(weights[-1]),
        head=labels.vocabulary.head,
        precision=precision,
        recall=recall,
        like=len(like_vectors),
        unlike=len(unlike_vectors),
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
    chances = learned.chances(tiles)
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


def _directions(examples: Sequence[Example], numbers: NDArray[np.int64], tiles: TileVectors) -> Floats:
    """Return the directions of examples; a tile counts once."""
    images = [one.vectors for one in examples if not len(one.numbers)]
    return unit(np.concatenate([tiles.vectors[numbers], *images]))


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
