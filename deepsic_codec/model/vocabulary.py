"""Names of labels: the classes of a semantic head, and broader names that stand for several (the paper's WordTree)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ExpressionError, LabelIndexError, did_you_mean

UNKNOWN = "unknown"  # the class after those of the vocabulary
# A class number is one byte, and 255 means none. Other limits bound the work that a stranger's vocabulary causes.
MAX_CLASSES, MAX_NAME, MAX_MEMBERS, MAX_DESCRIPTION = 255, 256, 4096, 1 << 16


@dataclass(frozen=True)
class Vocabulary:
    """Names of the labels of one semantic head.

    Attributes
    ----------
    classes : tuple of str
        In the order of the head's scores, without "unknown", whose score comes last.
    parents : dict of str to tuple of str
        Broader names, each with the classes or other parents that it stands for. A class that is a parent, too, stands
        for itself and its members: it has a score of its own where the head knows no more.
    head : str
        SHA-256 of the semantic head, hexadecimal; "" in a description of a model that has none yet.
    descriptions : dict of str to str
        Longer texts for some of the names.
    learned : tuple of str
        Names of labels that an index has beside those of the head. They stand for no class.
    """

    classes: tuple[str, ...]
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: str = ""
    descriptions: Mapping[str, str] = field(default_factory=dict)
    learned: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each score: the classes and, last, "unknown"."""
        return (*self.classes, UNKNOWN)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in reversed([*enumerate(self.names)])}

    @cached_property
    def known(self) -> tuple[str, ...]:
        """All names that a query may use: those of the scores, parents that stand for one of them, learned labels."""
        parents = (name for name in self.parents if name not in self.names and self._resolve(name))
        return (*self.names, *parents, *self.learned)

    def with_learned(self, names: Iterable[str]) -> "Vocabulary":
        """Return the vocabulary with these learned labels instead of others, without those that it has otherwise."""
        plain = replace(self, learned=())
        return replace(self, learned=tuple(name for name in names if name not in plain.known))

    def _resolve(self, name: str) -> set[int]:
        numbers: set[int] = set()
        pending, visited = [name], set()
        while pending:
            current = pending.pop()
            if current in self._numbers:
                numbers.add(self._numbers[current])
            if current not in visited:
                visited.add(current)
                pending += self.parents.get(current, ())
        return numbers

    @cached_property
    def implied(self) -> NDArray[np.bool_]:
        """Tell which scores imply others: bool (names, names), True where the second name is below the first."""
        below = np.zeros((len(self.names), len(self.names)), np.bool_)
        for number, name in enumerate(self.names):
            below[number, list(self._resolve(name) - {number})] = True
        return below

    def members(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the classes that a name stands for; none for a learned label.

        Raises
        ------
        ExpressionError
            If there is no such name. The message has the most similar ones.
        """
        if name in self.known:
            return tuple(sorted(self._resolve(name)))
        if name in self.parents:
            raise ExpressionError(f"{name!r} stands for no class of this vocabulary")
        raise ExpressionError(self.unknown_name(name))

    def parents_among(self, classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the parents whose members are all among these classes."""
        return {name: members for name, members in self.parents.items() if {*members} <= {*classes}}

    def row(self, name: str) -> int:
        """Return the number of a name in an index: classes first, then parents."""
        return self.known.index(name)

    def unknown_name(self, name: str) -> str:
        """Return the message for a name that does not exist."""
        return f"no class {name!r}{did_you_mean(name, self.known) or '; known: ' + ', '.join(self.known)}"

    def score(self, name: str, column: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return the scores of a class, or for a parent the largest scores of its classes.

        Parameters
        ----------
        name : str
            Class or parent.
        column : callable
            Returns the scores of a class, given its number.
        """
        members = self.members(name)
        scores = column(members[0])
        for number in members[1:]:
            scores = np.maximum(scores, column(number))
        return scores

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as model files and array attributes have it."""
        data: dict[str, Any] = {
            "classes": list(self.classes),
            "parents": {name: list(members) for name, members in self.parents.items()},
        }
        if self.head:
            data["head"] = self.head
        if self.descriptions:
            data["descriptions"] = dict(self.descriptions)
        return data

    @classmethod
    def from_json(cls, data: Any) -> "Vocabulary":
        """Make a vocabulary from `to_json`.

        Raises
        ------
        LabelIndexError
            If `data` is no vocabulary: lists of at most 255 short printable names, parents of them, and texts for
            them.
        """
        try:
            _check(data)
            classes = tuple(str(name) for name in data["classes"])
            parents = {str(name): tuple(str(m) for m in members) for name, members in data.get("parents", {}).items()}
            texts = {str(name): str(text) for name, text in data.get("descriptions", {}).items()}
            return cls(classes, parents, str(data.get("head") or ""), texts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LabelIndexError(f"not a vocabulary ({type(error).__name__}: {error})") from None


def _check(data: Any) -> None:
    """Raise ValueError, or what data of another kind causes, unless `data` is a vocabulary within the limits."""
    parents, texts = data.get("parents", {}), data.get("descriptions", {})
    for names in (data["classes"], list(parents), *parents.values(), list(texts)):
        if not isinstance(names, list) or len(names) > MAX_CLASSES or len({*names}) < len(names):
            raise ValueError(f"vocabulary: expected lists of at most {MAX_CLASSES} different names")
        if not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() for name in names):
            raise ValueError(f"vocabulary: expected names of 1 to {MAX_NAME} printable characters")
    if sum(map(len, parents.values())) > MAX_MEMBERS:
        raise ValueError(f"vocabulary: expected at most {MAX_MEMBERS} members of all parents together")
    _check_cycles(parents)
    if not all(
        isinstance(text, str) and len(text) <= MAX_DESCRIPTION and text.isprintable() for text in texts.values()
    ):
        raise ValueError(f"vocabulary: expected descriptions of at most {MAX_DESCRIPTION} printable characters")


def _check_cycles(parents: Mapping[str, list[str]]) -> None:
    """Raise ValueError if a parent stands for itself through others."""
    left = {name: [member for member in members if member in parents] for name, members in parents.items()}
    while ends := [name for name, members in left.items() if not any(member in left for member in members)]:
        for name in ends:
            del left[name]
    if left:
        raise ValueError(f"vocabulary: a cycle of parents, with {min(left)!r}; a parent cannot stand for itself")
