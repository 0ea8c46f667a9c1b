"""Output of the commands: text, tables, JSON, and the progress bar."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec
from math import isfinite
from typing import Any

from deepsic_codec.progress import Progress, no_progress

_hidden = False  # the progress bar, under --quiet


@contextmanager
def silent(output: bool, *, progress: bool) -> Iterator[None]:
    """Drop standard output during a `with` block if `output`, and progress bars unless `progress`."""
    global _hidden
    _hidden = not progress
    try:
        with ExitStack() as stack:
            if output:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    finally:
        _hidden = False


def say(text: str = "", *, error: bool = False) -> None:
    """Print a line to standard output, or to standard error, with control characters escaped.

    Line breaks at the end of the text are printed, others are escaped: with one, a name could print a line of its own.
    """
    line = text.rstrip("\n")
    print(printable(line) + text[len(line) :], file=sys.stderr if error else sys.stdout)


def printable(text: str) -> str:
    """Escape control characters: names in an archive may come from strangers, and terminals obey such characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def printable_warnings(line: Callable[[str], str]) -> Iterator[None]:
    """Print warnings during a `with` block as `line` makes them of their messages, with control characters escaped."""
    before = warnings.formatwarning

    def format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
        return printable_lines(line(str(message)))

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


def printable_lines(text: str) -> str:
    """Escape the control characters of a text of several lines, each of which ends in a line break."""
    return "".join(f"{printable(line)}\n" for line in text.rstrip("\n").split("\n"))


def say_json(document: Any) -> None:
    """Print one line of JSON, with null for NaN and infinity, which JSON does not have."""
    print(json.dumps(finite(document), allow_nan=False))


def finite(value: Any) -> Any:
    """Return a document of JSON types with None in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def say_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()) -> None:
    """Print rows of cells below their column names.

    Parameters
    ----------
    columns : sequence of str
        Names of the columns.
    rows : sequence of sequences of str
        Cells, one for each column.
    left : collection of str
        Columns to align on the left, beside the first one. All others are aligned on the right.
    """
    cells = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        parts = [
            cell.ljust(width) if number == 0 or name in left else cell.rjust(width)
            for number, (cell, width, name) in enumerate(zip(row, widths, columns, strict=True))
        ]
        print("  ".join(parts).rstrip())


@contextmanager
def progress_bar(text: str) -> Iterator[Progress]:
    """Show a progress bar on standard error during a `with` block, which gets the callback that moves it.

    There is no bar if standard error is no terminal, rich is not installed, or the command is to be quiet.
    """
    if _hidden or not sys.stderr.isatty() or find_spec("rich") is None:
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(text), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
