"""Options that several commands share, and the checks of their values."""

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from deepsic_codec.errors import did_you_mean

#: Parameters of Python whose option has another name.
PARAMETERS = {"format": "zarr_format", "all": "everything"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors name options and choices like a misspelt one."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(match[1], [name.strip("'") for name in match[2].split(", ")])
        elif match := re.search(r"unrecognized arguments: (?:.*? )?(--[\w-]+)", message):
            subparsers = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
            parsers = [self, *(parser for parsers in subparsers for parser in parsers)]
            message += did_you_mean(
                match[1], {name for parser in parsers for name in parser._option_string_actions}, 0.8
            )
        super().error(message)


def option_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the option of each parameter of Python that a command has one for."""
    names = {}
    for action in parser._actions:
        for option in reversed(action.option_strings):
            names[PARAMETERS.get(action.dest, action.dest)] = option
            if option.startswith("--") and not option.startswith("--no-"):
                break
    return names


def with_options(text: str, options: Mapping[str, str]) -> str:
    """Return a message with the options of a command in the place of parameters of Python.

    A parameter is a word before "=", a word at the start before ":", or a word with an underscore.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match["name"], (match["value"] or "").strip("'\"()")
        if name not in options:
            return match[0]
        return options[name] if value in ("", "True") else f"{options[name]} {value.replace(', ', ',')}"

    text = text.replace("run consolidate_labels", "run deepsic index")
    # what only Python has is no advice, as "region=... to write a part of it, "
    text = re.sub(
        r"(?P<name>[a-z]\w*)=\.\.\. [^,]*, ", lambda match: match[0] if match["name"] in options else "", text
    )
    start = re.match(r"(?P<names>\w+(?: and \w+)*):", text)
    if start is not None and options.keys() >= {*start["names"].split(" and ")}:
        text = " and ".join(options[name] for name in start["names"].split(" and ")) + text[start.end() - 1 :]
    called = rf"\b\w+\((?:array, )?((?:{'|'.join(map(re.escape, options))})=[^()]*)\)"  # as in DeepSIC(max_error=0)
    text = re.sub(called, r"\1", text)
    value = r"(?P<value>\([^()]*\)|'[^']*'|\"[^\"]*\"|-?[\w.]+|)"
    text = re.sub(rf"(?<![\w?&/.-])(?P<name>[a-z]\w*)={value}", option, text)
    return re.sub(r"(?<![\w?&/.-])(?P<name>[a-z]+_\w+)(?P<value>)(?![\w=(/.])", option, text)


def add_array(parser: argparse.ArgumentParser, *, scan: bool = False) -> None:
    """Declare the arguments that name one array and its label index; with `scan`, also the option to do without it."""
    parser.add_argument("url", metavar="URL", help="path or URL of the array, or of a group that has it")
    parser.add_argument("--name", help="which array, if the group has several")
    parser.add_argument("--index", metavar="URL", help="location of the label index, if not beside the array")
    if scan:
        parser.add_argument("--scan", action="store_true", help="read the headers of all chunks instead of an index")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_quality(parser: Any, default: float | None = 50.0, note: str = "") -> None:
    """Declare `--quality` on a parser or a group of options."""
    note = note or f" (default: {default:g})"
    parser.add_argument("--quality", type=deep_quality, default=default, help=f"1 (smallest) to 200 (best){note}")


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Declare `--effort` and `--tune`."""
    from deepsic_codec.codec.params import DEFAULT_EFFORT, DEFAULT_TUNE, MAX_EFFORT, MIN_REFINED_EFFORT, TUNES

    text = (
        f"0 to {MAX_EFFORT}: time spent on fewer bytes; from {MIN_REFINED_EFFORT} on encoding takes many times as long "
        f"(default: {DEFAULT_EFFORT})"
    )
    parser.add_argument("--effort", type=int, metavar="N", help=text)
    text = f"error measure that bytes are spent on (default: {DEFAULT_TUNE}); ms-ssim needs --effort "
    parser.add_argument("--tune", choices=TUNES, help=f"{text}{MIN_REFINED_EFFORT} or more")


def encoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters `effort` and `tune` of `DeepSIC` from the command line, as far as they are set."""
    return {name: getattr(args, name) for name in ("effort", "tune") if getattr(args, name) is not None}


def number(low: float, high: float, expected: str) -> Callable[[str], float]:
    """Return a type of arguments: a number within limits."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def positive(text: str) -> int:
    """Parse an integer above 0; a type of arguments."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {text!r}")
    return int(text)


quality = number(1, 100, "a number from 1 to 100")  # of networks
deep_quality = number(1, 200, "a number from 1 to 200")


def nodata(text: str) -> float | None:
    """Parse a NoData value; a type of arguments."""
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, nan or none, got {text!r}") from None


def integers(counts: tuple[int, ...], expected: str) -> Callable[[str], tuple[int, ...]]:
    """Return a type of arguments: integers from 0 on, separated by commas. Their number is one of `counts`."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) not in counts or min(values, default=0) < 0:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return values

    return parse


def bands(text: str) -> tuple[int | str, ...]:
    """Parse names or numbers of one or three bands, separated by commas; a type of arguments."""
    values = tuple(int(part) if part.isdecimal() else part for part in text.split(","))
    if len(values) not in (1, 3) or "" in values:
        raise argparse.ArgumentTypeError(f"expected one or three bands such as red,green,blue or 3,2,1, got {text!r}")
    return values


def axis_part(text: str) -> tuple[str, slice | int]:
    """Parse `axis=number` or `axis=start:stop`; a type of arguments."""
    axis, _, value = text.partition("=")
    try:
        if not axis:
            raise ValueError
        if ":" not in value:
            return axis, int(value)
        start, stop = (int(end) if end.strip() else None for end in value.split(":"))
        return axis, slice(start, stop)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected axis=number or axis=start:stop, got {text!r}") from None


def chunk_position(text: str) -> tuple[int, ...]:
    """Parse the position of a chunk, numbers separated by dots; a type of arguments."""
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected the position of a chunk such as 0.3.0, got {text!r}") from None
