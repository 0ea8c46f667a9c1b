"""Query expressions such as `Forest > 0.6 & ~Water`: their grammar, and how they are evaluated.

Scores are integers in 1/255. A comparison becomes "score >= m" with an integer m when it is made, by exact fractions,
so that no two ways to evaluate an expression can differ by rounding. `docs/labels.md` has the grammar.
"""

import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import chain
from math import ceil, floor, inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ExpressionError
from deepsic_codec.model.vocabulary import Vocabulary

Scores = NDArray[np.uint8]
Hits = NDArray[np.bool_]
Column = Callable[[str], Scores]  # the scores of a name

FLOAT_MAX = int(sys.float_info.max)
NAME_ALONE = Fraction(1, 2)  # threshold of a name without a comparison
MAX_DEPTH = 100  # of parentheses and negations: deeper is a mistake, and would exhaust Python's stack
MAX_TEXT = 10_000  # characters
MAX_NUMBER = 100  # characters of a number
MAX_LEVELS = 2 * MAX_DEPTH + 2  # of conditions within each other: a level of parentheses can have an | and an &

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?%?)|(?P<name>[^\W\d]\w*)"
    r"|(?P<quoted>\"[^\"]*\"|'[^']*')|(?P<op>>=|<=|>|<|&&|&|\|\||\||==?|!=?|~|\(|\)))"
)
#: Spellings of other languages, and the one of this one.
_INSTEAD = {"and": "&", "or": "|", "not": "~", "&&": "&", "||": "|", "!": "~"}
_EQUALITY = ("=", "==", "!=")
_MIRRORED = {">": "<", "<": ">", ">=": "<=", "<=": ">="}


class Expression:
    """A condition on the scores of a label tile. Combine with `&`, `|` and `~`."""

    levels = 0  # of conditions within this one

    def __and__(self, other: "Expression") -> "Expression":
        return And((self, _expression(other)))

    def __or__(self, other: "Expression") -> "Expression":
        return Or((self, _expression(other)))

    def __invert__(self) -> "Expression":
        return self.inner if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        # `a and b`, `not a` and `0.2 < a < 0.6` would silently be another condition.
        raise TypeError("combine conditions with &, | and ~, each comparison in parentheses, or write them as text")

    def names(self) -> Iterator[tuple[str, int | None]]:
        """Yield the names of the expression, each with its position in the text or None."""
        raise NotImplementedError

    def tiles(self, score: Column) -> Hits:
        """Tell of each tile whether it satisfies the expression.

        Parameters
        ----------
        score : callable
            Returns the scores of a name, uint8.
        """
        raise NotImplementedError

    def chunks(self, largest: Column) -> "Verdict":
        """Judge chunks of one or more tiles by their largest scores.

        Parameters
        ----------
        largest : callable
            Returns the largest score of a name in each chunk, uint8.
        """
        return self._verdict(largest, False)

    def _verdict(self, largest: Column, negated: bool) -> "Verdict":
        raise NotImplementedError

    def check(self, vocabulary: Vocabulary, text: str | None = None) -> list[str]:
        """Return the names of the expression.

        Raises
        ------
        ExpressionError
            If the vocabulary does not have one of them. The message points to it in `text`.
        """
        names: dict[str, None] = {}
        for name, position in self.names():
            try:
                vocabulary.members(name)
            except ExpressionError as error:
                if text is None or position is None:
                    raise
                raise ExpressionError(_pointed(str(error), text, position)) from None
            names[name] = None
        return list(names)


@dataclass(frozen=True)
class Verdict:
    """What is certain of the tiles of chunks.

    Attributes
    ----------
    all_tiles, any_tile : ndarray
        bool: all tiles certainly satisfy the condition, or at least one does.
    possible : ndarray
        bool: a tile may satisfy it.
    """

    all_tiles: Hits
    any_tile: Hits
    possible: Hits


@dataclass(frozen=True)
class Compare(Expression):
    """The condition that the score of `name` is at least `least`, in 1/255: 0 always holds, 256 never does."""

    name: str
    least: int
    text: str
    position: int | None = None

    def names(self) -> Iterator[tuple[str, int | None]]:
        """Yield the name."""
        yield self.name, self.position

    def tiles(self, score: Column) -> Hits:
        """Evaluate for tiles."""
        return _at_least(score(self.name), self.least)

    def _verdict(self, largest: Column, negated: bool) -> Verdict:
        reached = _at_least(largest(self.name), self.least)
        if negated:  # a tile of the chunk may have any score from 0 on
            missed = ~reached
            return Verdict(missed, missed, np.full_like(reached, self.least > 0))
        return Verdict(np.full_like(reached, self.least == 0), reached, reached)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Nested(Expression):
    """A condition that has others within it, so few levels of them that no evaluation exhausts Python's stack."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", 1 + max(part.levels for part in self._inside()))
        if self.levels > MAX_LEVELS:
            raise ExpressionError(f"at most {MAX_LEVELS} levels of conditions within each other are allowed")

    def _inside(self) -> Sequence[Expression]:
        raise NotImplementedError

    def names(self) -> Iterator[tuple[str, int | None]]:
        """Yield the names of all conditions within."""
        for part in self._inside():
            yield from part.names()


@dataclass(frozen=True)
class Not(_Nested):
    """The condition that `inner` does not hold."""

    inner: Expression

    def _inside(self) -> Sequence[Expression]:
        return (self.inner,)

    def tiles(self, score: Column) -> Hits:
        """Evaluate for tiles."""
        return ~self.inner.tiles(score)

    def _verdict(self, largest: Column, negated: bool) -> Verdict:
        return self.inner._verdict(largest, not negated)

    def __str__(self) -> str:
        return f"~{_wrapped(self.inner)}"


@dataclass(frozen=True)
class _Joined(_Nested):
    """A condition on several others; those of its own kind are merged into it, so that a long chain has one level."""

    parts: tuple[Expression, ...]

    def __post_init__(self) -> None:
        merged = [part.parts if isinstance(part, type(self)) else (part,) for part in self.parts]
        object.__setattr__(self, "parts", tuple(chain.from_iterable(merged)))
        super().__post_init__()

    def _inside(self) -> Sequence[Expression]:
        return self.parts

    def _all(self, largest: Column, negated: bool) -> Verdict:
        """Judge the conjunction of all parts, or of their negations."""

        def both(a: Verdict, b: Verdict) -> Verdict:
            any_tile = (a.all_tiles & b.any_tile) | (a.any_tile & b.all_tiles)
            return Verdict(a.all_tiles & b.all_tiles, any_tile, a.possible & b.possible)

        return reduce(both, (part._verdict(largest, negated) for part in self.parts))

    def _any(self, largest: Column, negated: bool) -> Verdict:
        """Judge the disjunction of all parts, or of their negations."""

        def either(a: Verdict, b: Verdict) -> Verdict:
            return Verdict(a.all_tiles | b.all_tiles, a.any_tile | b.any_tile, a.possible | b.possible)

        return reduce(either, (part._verdict(largest, negated) for part in self.parts))


class And(_Joined):
    """The condition that all parts hold."""

    def tiles(self, score: Column) -> Hits:
        """Evaluate for tiles."""
        return reduce(operator.and_, (part.tiles(score) for part in self.parts))

    def _verdict(self, largest: Column, negated: bool) -> Verdict:
        return self._any(largest, True) if negated else self._all(largest, False)

    def __str__(self) -> str:
        return " & ".join(map(_wrapped, self.parts))


class Or(_Joined):
    """The condition that at least one part holds."""

    def tiles(self, score: Column) -> Hits:
        """Evaluate for tiles."""
        return reduce(operator.or_, (part.tiles(score) for part in self.parts))

    def _verdict(self, largest: Column, negated: bool) -> Verdict:
        return self._all(largest, True) if negated else self._any(largest, False)

    def __str__(self) -> str:
        return " | ".join(map(_wrapped, self.parts))


@dataclass(frozen=True)
class Described(_Nested):
    """What no scores of one tile decide, in words, and the conditions in it."""

    text: str
    parts: tuple[Expression, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", 1 + max((part.levels for part in self.parts), default=0))

    def _inside(self) -> Sequence[Expression]:
        return self.parts

    def __str__(self) -> str:
        return self.text


class Name(Compare):
    """The score of a class, to compare with a number; without a comparison, the condition that it is at least 0.5."""

    def __init__(self, name: str) -> None:
        super().__init__(name, _comparison(name, ">=", NAME_ALONE, None).least, _quoted(name))

    def __gt__(self, threshold: float) -> Expression:
        return self._compared(">", threshold)

    def __ge__(self, threshold: float) -> Expression:
        return self._compared(">=", threshold)

    def __lt__(self, threshold: float) -> Expression:
        return self._compared("<", threshold)

    def __le__(self, threshold: float) -> Expression:
        return self._compared("<=", threshold)

    def _compared(self, op: str, threshold: float) -> Expression:
        # The shortest decimal that means this float: 0.6 here is the 0.6 of an expression in text.
        try:
            number = float(threshold)
        except OverflowError:
            number = inf
        if not isfinite(number):
            raise ExpressionError(f"{self.name}: expected a finite number, got {number}")
        return _normalised(self.name, op, Fraction(repr(number)), None)


def parse(text: str) -> Expression:
    """Read an expression.

    Parameters
    ----------
    text : str
        For instance ``"Forest > 0.6 & ~Water"``.

    Raises
    ------
    ExpressionError
        If the text is none. The message points to the mistake.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"expected an expression such as 'Forest > 0.6 & ~Water', got {text!r}")
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"the expression has {len(text)} characters; at most {MAX_TEXT} are allowed")
    return _Parser(text).parse()


@dataclass(frozen=True)
class _Token:
    kind: str  # "number", "name", "end", or the operator itself
    text: str
    position: int


class _Parser:
    """A recursive descent parser: | binds least, then &, ~, comparisons."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokens()
        self.token = next(self.tokens)
        self.depth = 0

    def _tokens(self) -> Iterator[_Token]:
        position = 0
        while self.text[position:].strip():
            match = _TOKEN.match(self.text, position)
            if match is None:
                position += len(self.text[position:]) - len(self.text[position:].lstrip())
                raise self._error(f"cannot read {self.text[position]!r}", position)
            kind = str(match.lastgroup)
            text, start = match[kind], match.start(kind)
            position = match.end()
            if kind != "quoted" and text.lower() in _INSTEAD:
                quoted = f', or "{text}" in quotes for a class of that name' if kind == "name" else ""
                raise self._error(f"write {_INSTEAD[text.lower()]!r} instead of {text!r}{quoted}", start)
            if text in _EQUALITY:
                raise self._error(f"scores are compared with >, >=, < or <=, not with {text!r}", start)
            if kind == "number" and text.endswith("%"):
                raise self._error(f"write {float(text[:-1]) / 100:g} instead of {text!r}", start)
            if kind == "op":
                yield _Token(text, text, start)
            elif kind == "quoted":
                yield _Token("name", text[1:-1], start)
            else:
                yield _Token(kind, text, start)
        yield _Token("end", "", len(self.text.rstrip()))

    def _error(self, message: str, position: int) -> ExpressionError:
        return ExpressionError(_pointed(message, self.text, position))

    def _take(self) -> _Token:
        token = self.token
        if token.kind != "end":
            self.token = next(self.tokens)
        return token

    def _expected(self, what: str) -> ExpressionError:
        token = f"{self.token.text!r}" if self.token.kind != "end" else "the end"
        return self._error(f"expected {what}, got {token}", self.token.position)

    def parse(self) -> Expression:
        expression = self._or()
        if self.token.kind != "end":
            raise self._expected("'&', '|' or the end")
        return expression

    def _or(self) -> Expression:
        parts = [self._and()]
        while self.token.kind == "|":
            self._take()
            parts.append(self._and())
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def _and(self) -> Expression:
        parts = [self._not()]
        while self.token.kind == "&":
            self._take()
            parts.append(self._not())
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def _not(self) -> Expression:
        if self.token.kind not in ("~", "("):
            return self._comparison()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(
                f"at most {MAX_DEPTH} levels of parentheses and negations are allowed", self.token.position
            )
        inner: Expression
        if self._take().kind == "~":
            inner = Not(self._not())
        else:
            inner = self._or()
            if self.token.kind != ")":
                raise self._expected("')'")
            self._take()
        self.depth -= 1
        return inner

    def _comparison(self) -> Expression:
        if self.token.kind == "number":  # 0.2 < Forest
            threshold = self._number()
            if self.token.kind not in _MIRRORED:
                raise self._expected("'>', '>=', '<' or '<='")
            op = _MIRRORED[self._take().kind]
            name = self._name()
        else:
            name = self._name()
            if self.token.kind not in _MIRRORED:
                return _comparison(name.text, ">=", NAME_ALONE, name.position, _quoted(name.text))
            op = self._take().kind
            threshold = self._number()
        if self.token.kind in _MIRRORED:
            text = _quoted(name.text)
            raise self._error(f"write two comparisons, such as {text} > 0.2 & {text} < 0.6", self.token.position)
        return _normalised(name.text, op, threshold, name.position)

    def _name(self) -> _Token:
        if self.token.kind != "name":
            raise self._expected("the name of a class")
        return self._take()

    def _number(self) -> Fraction:
        if self.token.kind != "number":
            raise self._expected("a number")
        if len(self.token.text) > MAX_NUMBER:
            raise self._error(
                f"a number of {len(self.token.text)} characters; at most {MAX_NUMBER} are allowed", self.token.position
            )
        return Fraction(self._take().text)


def _comparison(name: str, op: str, value: Fraction, position: int | None, text: str | None = None) -> Compare:
    scaled = value * 255
    least = floor(scaled) + 1 if op == ">" else ceil(scaled)
    if text is None:
        # of integers: comparing a fraction with a float takes longer than all else here
        text = f"{_quoted(name)} {op} {float(value):g}" if least < FLOAT_MAX else f"{_quoted(name)} {op} 1e999"
    return Compare(name, min(max(least, 0), 256), text, position)


def _normalised(name: str, op: str, value: Fraction, position: int | None) -> Expression:
    if op in (">", ">="):
        return _comparison(name, op, value, position)
    return Not(_comparison(name, ">=" if op == "<" else ">", value, position))


def _at_least(scores: Scores, least: int) -> Hits:
    if least > 255:
        return np.zeros(scores.shape, np.bool_)
    return scores >= np.uint8(least)


def _expression(value: Any) -> Expression:
    if not isinstance(value, Expression):
        raise TypeError(f"expected a condition on labels, got {value!r}")
    return value


def _wrapped(expression: Expression) -> str:
    return str(expression) if isinstance(expression, Compare | Not) else f"({expression})"


def _quoted(name: str) -> str:
    plain = re.fullmatch(r"[^\W\d]\w*", name) and name.lower() not in _INSTEAD
    return name if plain else f"'{name}'" if '"' in name else f'"{name}"'


def _pointed(message: str, text: str, position: int) -> str:
    line = text.replace("\n", " ").replace("\t", " ").replace("\r", " ")
    return f"{message}\n  {line}\n  {' ' * position}^"
