"""A label that was learned from examples, as an index stores it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.labels.vectors import TileVectors
from deepsic_codec.model.vocabulary import MAX_NAME
from deepsic_codec.payload.fields import MAX_VALUES
from deepsic_codec.stored.geometry import Geometry

KINDS = ("like", "unlike")
MAX_EXAMPLES = 100_000  # tiles and texts of each kind
MAX_AROUND = 16  # tiles


@dataclass(frozen=True)
class LearnedLabel:
    """A label that was learned from examples: a linear classifier on the directions of embeddings.

    A tile is judged by the mean direction of the tiles around it.

    Attributes
    ----------
    name : str
        Its name in expressions.
    weights : tuple of float
        One for each value of an embedding.
    bias : float
        The score of a tile is 1 / (1 + exp(-(weights * mean direction + bias))).
    around : int
        Distance in tiles along y and along x up to which tiles of the same chunk count; 0 for the tile alone.
    head : str
        SHA-256 of the semantic head whose embeddings it is for.
    precision, recall : float or None
        From a score of 0.5 on, by cross-validation: of examples that the classifier was not fitted to. Precision is
        None if none of them reached it.
    like, unlike : int
        Numbers of tiles, and images, that were examples of it and of what it is not.
    examples : dict of str to tuple of str
        The examples as they were named, "like" and "unlike".
    tiles : dict of str to list of int
        Numbers of the tiles of the array among them, counted along the last axis first.
    """

    name: str
    weights: tuple[float, ...] = field(repr=False)
    bias: float = field(repr=False)
    around: int = 0
    head: str = ""
    precision: float | None = None
    recall: float | None = None
    like: int = 0
    unlike: int = 0
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    tiles: Mapping[str, list[int]] = field(default_factory=dict, repr=False)

    def chances(self, tiles: TileVectors, geometry: Geometry) -> NDArray[np.float64]:
        """Return the score of each tile of whole chunks, float64 (tiles,), 0 without an embedding."""
        if self.around:
            tiles = TileVectors(tiles.pooled(self.around, geometry))
        weights = np.array(self.weights)
        length = np.sqrt((weights**2).sum())
        logits = np.full(len(tiles.vectors), self.bias)
        if length:
            logits += length * tiles.cosines(weights)
        return np.where(tiles.exist, 0.5 * (1 + np.tanh(logits / 2)), 0)

    def scores(self, vectors: NDArray[np.int8], geometry: Geometry) -> NDArray[np.uint8]:
        """Return the scores of the tiles of whole chunks, in 1/255, by embeddings (tiles along each axis, values)."""
        tiles = TileVectors(vectors)
        return np.round(255 * self.chances(tiles, geometry)).astype(np.uint8).reshape(tiles.grid)

    def to_json(self) -> dict[str, Any]:
        """Return the label as the attributes of an index have it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, cells: int) -> "LearnedLabel":
        """Make a label from `to_json`, for an array with a number of label tiles; raises ValueError if it is none."""
        values = {key: data[key] for key in cls.__dataclass_fields__}
        name, weights = values["name"], [float(value) for value in values["weights"]]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ValueError("learned label: expected a short printable name")
        if not 0 < len(weights) <= MAX_VALUES or not all(map(isfinite, [*weights, float(values["bias"])])):
            raise ValueError(f"learned label: expected 1 to {MAX_VALUES} finite weights, and a bias")
        texts = {kind: tuple(map(str, values["examples"].get(kind, ()))) for kind in KINDS}
        tiles = {kind: [int(number) for number in values["tiles"].get(kind, ())] for kind in KINDS}
        if any(len(part) > MAX_EXAMPLES for part in (*texts.values(), *tiles.values())):
            raise ValueError(f"learned label: expected at most {MAX_EXAMPLES} examples")
        if any(not 0 <= number < cells for part in tiles.values() for number in part):
            raise ValueError("learned label: an example is not a tile of the array")
        around = int(values["around"])
        if not 0 <= around <= MAX_AROUND:
            raise ValueError(f"learned label: expected tiles of at most {MAX_AROUND} around one, got {around}")
        shares = {key: None if values[key] is None else float(values[key]) for key in ("precision", "recall")}
        counts = {key: int(values[key]) for key in KINDS}
        return cls(
            name=name,
            weights=tuple(weights),
            bias=float(values["bias"]),
            around=around,
            head=str(values["head"]),
            precision=shares["precision"],
            recall=shares["recall"],
            like=counts["like"],
            unlike=counts["unlike"],
            examples=texts,
            tiles=tiles,
        )
