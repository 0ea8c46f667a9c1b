"""Options that several commands share, and the checks of their values."""

import argparse
from collections.abc import Callable
from typing import Any


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
