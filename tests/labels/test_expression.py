import operator
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.strangers import WORDS as WORDS_OF_QUERIES
from deepsic_codec.errors import ExpressionError
from deepsic_codec.labels.expression import MAX_DEPTH, MAX_LEVELS, Name, parse
from deepsic_codec.model.vocabulary import Vocabulary
from tests.common import check_rejects

WORDS = Vocabulary(
    ("Forest", "River", "Sea Lake", "and"),
    {"Water": ("River", "Sea Lake"), "Wet": ("Water", "Forest"), "Loop": ("Loop", "River"), "Empty": ()},
)
ALL = np.arange(256, dtype=np.uint8)


def hits(text, **scores):
    """The scores of `Forest` (or of others given) for which the expression holds."""
    columns = {WORDS.names.index(name.replace("_", " ")): values for name, values in scores.items()} or {0: ALL}
    columns = {i: columns.get(i, np.zeros(256, np.uint8)) for i in range(len(WORDS.names))}
    return set(np.flatnonzero(parse(text).tiles(lambda name: WORDS.score(name, columns.__getitem__))).tolist())


@pytest.mark.parametrize("op", [">", ">=", "<", "<="])
@pytest.mark.parametrize("number", ["0", "1", "0.5", ".6", "0.6000001", "2", "6e-1", "7.", "0.50196078431372548"])
def test_comparisons_are_exact(op, number):
    value = Fraction(number)
    compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}[op]
    expected = {s for s in range(256) if compare(Fraction(s, 255), value)}
    assert hits(f"Forest {op} {number}") == expected
    mirrored = {">": "<", "<": ">", ">=": "<=", "<=": ">="}[op]
    assert hits(f"{number} {mirrored} Forest") == expected


@given(st.integers(0, 1000), st.sampled_from([">", ">=", "<", "<="]))
def test_python_operators_say_the_same(thousandths, op):
    name, number = Name("Forest"), thousandths / 1000
    made = {">": name > number, ">=": name >= number, "<": name < number, "<=": name <= number}[op]
    np.testing.assert_array_equal(made.tiles(lambda _: ALL), parse(f"Forest {op} {number}").tiles(lambda _: ALL))


@pytest.mark.parametrize(
    "text,same",
    [
        ("Forest", "Forest >= 0.5"),
        ("~Forest > 0.6", "~(Forest > 0.6)"),
        ("~ Forest", "Forest < 0.5"),
        ("0.2 < Forest & Forest <= 0.6", "(Forest > 0.2) & ~(Forest > 0.6)"),
        ("Forest > .9 | Forest > .1 & Forest < .2", "(Forest > .9) | ((Forest > .1) & (Forest < .2))"),
        ("~Forest & ~Forest", "~(Forest | Forest)"),
        ("Forest>.1&Forest<.2|'Forest'>.9", '((.1<Forest) & (Forest<.2)) | "Forest" > .9'),
        ("\n Forest\t>\n.5 ", "Forest > .5"),
    ],
)
def test_grammar(text, same):
    assert hits(text) == hits(same) and 0 < len(hits(text)) < 256
    assert hits(str(parse(text))) == hits(text)


def test_parents_take_the_largest_score_of_their_classes():
    low, high = np.full(256, 30, np.uint8), ALL
    assert hits("Water > .5", River=low, Sea_Lake=high) == set(range(128, 256))
    assert hits("Wet > .5", Forest=high) == hits("Loop > .5", River=high) == set(range(128, 256))
    assert hits('"and" | "Sea Lake"', Sea_Lake=high) == set(range(128, 256))
    check_rejects(ExpressionError, "'Empty'", hits, "Empty")


@pytest.mark.parametrize(
    "text,words,column",
    [
        ("", "expected the name of a class, got the end", 0),
        ("Forest >", "expected a number, got the end", 8),
        ("Forest > & River", "expected a number, got '&'", 9),
        ("Forest River", "got 'River'", 7),
        ("(Forest | River", "expected ')'", 15),
        ("Forest)", "got ')'", 6),
        ("0.5", "expected '>'", 3),
        ("Forest & ", "expected the name", 8),
        ("Forest > 0.5 # really", "cannot read '#'", 13),
        ("Forest = 0.5", ">, >=, < or <=, not with '='", 7),
        ("Forest == 0.5", "not with '=='", 7),
        ("Forest != 0.5", "not with '!='", 7),
        ("Forest && River", "write '&' instead of '&&'", 7),
        ("Forest || River", "write '|' instead of '||'", 7),
        ("!Forest", "write '~' instead of '!'", 0),
        ("Forest AND River", "write '&' instead of 'AND', or \"AND\" in quotes", 7),
        ("Forest or River", "write '|' instead of 'or'", 7),
        ("not Forest", "write '~' instead of 'not'", 0),
        ("Forest > 60%", "write 0.6 instead of '60%'", 9),
        ("0.2 < Forest <= 0.6", "two comparisons, such as Forest > 0.2 & Forest < 0.6", 13),
        ("Forest > 0.2 > 0.1", "two comparisons", 13),
        ("'Forest", 'cannot read "\'"', 0),
        ("~" * (MAX_DEPTH + 1) + "Forest", "levels of parentheses", MAX_DEPTH),
        ("Forest > River", "expected a number", 9),
    ],
)
def test_errors_point_to_the_place(text, words, column):
    message = check_rejects(ExpressionError, words, parse, text)
    assert message.splitlines()[-1].index("^") == column + 2
    assert message.splitlines()[-2] == f"  {text}"


def test_misspelt_names():
    message = check_rejects(ExpressionError, "'Foerst'|Forest", parse("River & Foerst").check, WORDS, "River & Foerst")
    assert message.endswith("\n  River & Foerst\n          ^")
    check_rejects(ExpressionError, "did you mean Forest?", WORDS.members, "forest")
    check_rejects(ExpressionError, "known: Forest, River", WORDS.members, "Quasar")
    check_rejects(ExpressionError, "at most", parse, "~" * 20_000)


def test_python_mistakes_are_errors():
    name = Name("Forest")
    mistakes = (
        lambda: name and name,
        lambda: 0.2 < name < 0.6,
        lambda: not name,
        lambda: name & 1,
        lambda: name | "b",
    )
    for wrong in mistakes:
        with pytest.raises(TypeError, match="condition"):
            wrong()
    with pytest.raises(ExpressionError, match="finite"):
        operator.gt(name, float("nan"))
    with pytest.raises(ExpressionError, match="finite"):
        operator.gt(name, 10**400)


@pytest.mark.parametrize("op", ["&", "|"])
def test_long_chains_have_one_level(op):
    text = f" {op} ".join(["Forest"] * 1000)
    joined = reduce(operator.and_ if op == "&" else operator.or_, [Name("Forest")] * 1000)
    for expression in (parse(text), joined, parse(str(joined))):
        assert expression.levels == 1 and len(list(expression.names())) == 1000 and str(expression) == text
        assert expression.tiles(lambda name: ALL).sum() == 128
        assert expression.chunks(lambda name: ALL).possible.sum() == 128


def test_levels_are_limited():
    twice = reduce(lambda inner, _: ~inner, range(1200), Name("Forest") > 0.5)
    assert twice.tiles(lambda name: ALL).sum() == (Name("Forest") > 0.5).tiles(lambda name: ALL).sum()
    with pytest.raises(ExpressionError, match="levels"):
        reduce(
            lambda inner, number: inner & Name("Forest") if number % 2 else inner | Name("River"),
            range(1200),
            Name("Forest"),
        )
    deepest = "(Forest | River & ~" * (MAX_DEPTH // 2) + "Forest" + ")" * (MAX_DEPTH // 2)
    expression = parse(deepest)
    assert expression.levels <= MAX_LEVELS and str(expression).startswith("Forest | (River & ~(Forest")
    assert expression.chunks(lambda name: ALL).possible.any() and len(list(expression.names())) == MAX_DEPTH + 1


@pytest.mark.parametrize("number", ["9" * 5000, "0." + "0" * 5000 + "1", "9" * 101])
def test_long_numbers_are_refused(number):
    check_rejects(ExpressionError, "characters; at most 100", parse, f"Forest > {number}")
    check_rejects(ExpressionError, "characters; at most 100", parse, f"{number} > Forest")


@pytest.mark.parametrize("number, matches", [("1e400", 0), ("1e999", 0), ("1e-999", 255), ("9" * 100, 0)])
def test_numbers_beyond_floats_are_numbers(number, matches):
    for text in (f"Forest > {number}", f"{number} < Forest", str(parse(f"Forest > {number}"))):
        assert len(hits(text)) == matches


@given(st.lists(st.sampled_from(WORDS_OF_QUERIES) | st.text(max_size=3), max_size=60), st.sampled_from(["", " "]))
def test_every_text_is_an_expression_or_an_expression_error(words, between):
    try:
        expression = parse(between.join(words))
    except ExpressionError:
        return
    score = lambda name: ALL  # noqa: E731
    again = parse(str(expression))
    assert np.array_equal(expression.tiles(score), again.tiles(score))


@st.composite
def expressions(draw, depth=3):
    """Text of an expression."""
    if depth == 0 or draw(st.booleans()):
        name = draw(st.sampled_from(["Forest", "River", "'Sea Lake'", "Water", "unknown", "Wet"]))
        op, number = draw(st.sampled_from([">", ">=", "<", "<="])), draw(st.sampled_from([0, 0.1, 0.5, 0.9, 1, 1.5]))
        return name if draw(st.booleans()) else f"{name} {op} {number}"
    inner = draw(expressions(depth=depth - 1))
    if draw(st.booleans()):
        return f"~({inner})"
    return f"({inner}) {draw(st.sampled_from('&|'))} ({draw(expressions(depth=depth - 1))})"


@given(expressions(), st.integers(0, 2**32 - 1))
def test_what_is_certain_of_chunks_is_true_of_their_tiles(text, seed):
    rng = np.random.default_rng(seed)
    tiles = rng.choice(np.array([0, 0, 0, 20, 127, 128, 255], np.uint8), (len(WORDS.names), 40, 3))
    expression = parse(text)
    true = expression.tiles(lambda name: WORDS.score(name, tiles.__getitem__))
    largest = tiles.max(axis=2)
    verdict = expression.chunks(lambda name: WORDS.score(name, largest.__getitem__))
    assert not (verdict.any_tile & ~true.any(axis=1)).any(), "said some tile, and none is"
    assert not (true.any(axis=1) & ~verdict.possible).any(), "lost a match"
    assert not (verdict.all_tiles & ~true.all(axis=1)).any(), "said every tile, and one is not"


def test_what_is_no_text_is_no_expression():
    check_rejects(ExpressionError, "expected an expression", parse, 3)
