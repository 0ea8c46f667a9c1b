"""Identifiers say what a thing is, in words that a reader would search for."""

import ast
import re

import pytest

from tests.common import ROOT

#: Words that name nothing by themselves: prepositions, participles and adjectives of quantity.
EMPTY_WORDS = {
    "there",
    "here",
    "aside",
    "behind",
    "crowd",
    "most",
    "many",
    "some",
    "fine",
    "own",
    "found",
    "given",
    "wanted",
    "sought",
    "seen",
    "shown",
}
ALLOWED = {"ModelNotFound"}


def identifiers(path):
    """Yield the names that a file defines, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def empty_words(name):
    return EMPTY_WORDS.intersection(part.lower() for part in re.split(r"_|(?<=[a-z])(?=[A-Z])", name))


@pytest.mark.parametrize("folder", ["deepsic_codec", "benchmarks"])
def test_names_say_what_things_are(folder):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in identifiers(path)
        if empty_words(name) and name not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_sees_parts_of_names():
    assert empty_words("how_many") and empty_words("BytesWanted") and not empty_words("foundation")
