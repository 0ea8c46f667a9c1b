"""Names that queries know: the classes of a model, and broader names that stand for several (the paper's WordTree)."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ExpressionError, LabelIndexError, ModelNotFound

UNKNOWN = "unknown"  # the class after those of the vocabulary
ATTRIBUTE = "deepsic"  # of arrays; holds the vocabulary, so that labels can be read where the model is not


@dataclass(frozen=True)
class Vocabulary:
    """What labels can name.

    Attributes
    ----------
    classes : tuple of str
        In the order of the head's scores, without "unknown", which is the last score.
    parents : dict of str to tuple of str
        Broader names and what they stand for: classes, or other parents.
    head : str
        Identity of the semantic head, hexadecimal.
    descriptions : dict of str to str
        Longer texts for some of the names.
    """

    classes: tuple[str, ...]
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: str = ""
    descriptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each score: the classes and, last, "unknown"."""
        return (*self.classes, UNKNOWN)

    @cached_property
    def known(self) -> tuple[str, ...]:
        """All names that a query may use: those of the scores, then parents that stand for one of them."""
        return (*self.names, *(name for name in self.parents if name not in self.names and self._resolve(name)))

    def _resolve(self, name: str) -> set[int]:
        found: set[int] = set()
        pending, seen = [name], set()
        while pending:
            one = pending.pop()
            if one in self.names:  # a class hides a parent of the same name
                found.add(self.names.index(one))
            elif one not in seen:
                seen.add(one)
                pending += self.parents.get(one, ())
        return found

    def members(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the classes that a name stands for.

        Raises
        ------
        ExpressionError
            If there is no such name; the message has the nearest ones.
        """
        if name in self.known:
            return tuple(sorted(self._resolve(name)))
        if name in self.parents:
            raise ExpressionError(f"{name!r} stands for no class of this vocabulary")
        raise ExpressionError(self.unknown_name(name))

    def row(self, name: str) -> int:
        """Return the number of a name in an index: classes first, then parents."""
        return self.known.index(name)

    def unknown_name(self, name: str) -> str:
        """Return what to say of a name that there is not."""
        by_case = {known.casefold(): known for known in self.known}
        near = difflib.get_close_matches(name.casefold(), by_case, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(by_case[n] for n in near)}?" if near else f"known: {', '.join(self.known)}"
        return f"no class {name!r}; {hint}"

    def score(self, name: str, column: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return the scores of a name: of a class its own, of a parent the largest of its classes.

        Parameters
        ----------
        name : str
            Class or parent.
        column : callable
            Gives the scores of a class by its number.
        """
        members = self.members(name)
        scores = column(members[0])
        for number in members[1:]:
            scores = np.maximum(scores, column(number))
        return scores

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as array attributes have it."""
        data: dict[str, Any] = {
            "head": self.head,
            "classes": list(self.classes),
            "parents": {name: list(members) for name, members in self.parents.items()},
        }
        return data | ({"descriptions": dict(self.descriptions)} if self.descriptions else {})

    @classmethod
    def from_json(cls, data: Any) -> "Vocabulary":
        """Make a vocabulary from attributes; raises LabelIndexError if they are none."""
        try:
            classes = tuple(str(name) for name in data["classes"])
            parents = {str(name): tuple(str(m) for m in members) for name, members in data.get("parents", {}).items()}
            texts = {str(name): str(text) for name, text in data.get("descriptions", {}).items()}
            return cls(classes, parents, str(data.get("head") or ""), texts)
        except (KeyError, TypeError, AttributeError) as error:
            raise LabelIndexError(f"not a vocabulary ({type(error).__name__}: {error})") from None


def of_model(info: Any) -> Vocabulary:
    """Return the vocabulary of a model file's description."""
    given = info.vocabulary
    parents = {name: tuple(members) for name, members in given.parents.items()}
    return Vocabulary(tuple(given.classes), parents, info.head, dict(getattr(given, "descriptions", {})))


def of_head(array: Any, decoder: str, head: str | None) -> Vocabulary:
    """Return the vocabulary of the head that labelled a chunk.

    It is that of the array's attributes, or, for a chunk that another model labelled or an array that this package
    did not create, that of the model.

    Parameters
    ----------
    array : zarr.Array
        The array.
    decoder, head : str
        SHA-256 identities, or their first hexadecimal digits; a head of None is any head.

    Raises
    ------
    ModelNotFound
        If it takes a model that is not there.
    """
    from deepsic_codec.model.zoo import find_model
    from deepsic_codec.stored import embedded as embed

    attribute = array.attrs.get(ATTRIBUTE)
    given: Any = attribute.get("vocabulary") if isinstance(attribute, Mapping) else None
    ours = isinstance(given, Mapping) and str(given.get("head")).startswith(head or "")
    if ours and isinstance(given.get("classes"), list):
        return Vocabulary.from_json(given)
    try:
        return of_model(find_model(decoder, head=head))
    except ModelNotFound:
        if embed.use_embedded(array) is None:
            raise
    return of_model(find_model(decoder, head=head))
