"""The ``deepsic`` command.

Exit status: 0 for success, 1 for a failure (one line on standard error), 2 for misuse, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepsic_codec.cli import evaluate, ingest
from deepsic_codec.cli import inspect as cli_look
from deepsic_codec.cli import labels as cli_labels
from deepsic_codec.cli import train as training_cli
from deepsic_codec.errors import ConfigurationError, ExpressionError


@dataclass(frozen=True)
class Command:
    """A subcommand: what help says, its arguments, and what it does with them."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", type=int, choices=(2, 3), default=3, help="Zarr format (default: 3)")
    text = "folder for demo.zarr and before-after.png, both replaced (default: deepsic-demo)"
    parser.add_argument("--out", type=Path, default=Path("deepsic-demo"), metavar="DIR", help=text)
    parser.add_argument("--quality", type=_quality, default=50.0, help="1 (smallest) to 100 (best) (default: 50)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console

    from deepsic_codec.cli import demo

    # A pipe has no width: wide enough for the tables, so that no figure is cut.
    console = Console(quiet=args.json) if sys.stdout.isatty() else Console(width=110, quiet=args.json)
    figures = demo.run(args.out, zarr_format=args.format, quality=args.quality, console=console)
    if args.json:
        print(json.dumps(figures))


COMMANDS = {
    "demo": Command(
        "store two real images, read them back, show what it saved and what is in them", _demo_arguments, _demo
    ),
    "ingest": Command("store images, mosaics, Zarr arrays in an archive", ingest.arguments, ingest.run),
    "info": Command("tell what is in an archive", cli_look.info_arguments, cli_look.info),
    "preview": Command("draw a small picture of an array", cli_look.preview_arguments, cli_look.preview),
    "compare": Command(
        "your images through DeepSIC and other codecs at equal bytes", cli_look.compare_arguments, cli_look.compare
    ),
    "export": Command("copy an array out to plain Zarr, TIFF or PNG", cli_look.export_arguments, cli_look.export),
    "index": Command("write or refresh the label index of an archive", cli_labels.index_arguments, cli_labels.index),
    "labels": Command("count what an archive shows, or map a class", cli_labels.labels_arguments, cli_labels.labels),
    "query": Command("find the chunks that show something", cli_labels.query_arguments, cli_labels.query),
    "train": Command("train a model, or adapt the labels of one", training_cli.add_arguments, training_cli.run),
    "evaluate": Command("measure a model on images, from real payloads", evaluate.add_arguments, evaluate.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (argparse itself exits with 2 on misuse)."""
    args = _parser().parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output wants no more of it, as `deepsic query | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        # Of an expression only the first line: the others point to the place in it.
        text = str(error).split("\n")[0] if isinstance(error, ExpressionError) else str(error)
        message = " ".join(text.split()) or type(error).__name__
        print(f"deepsic {args.command}: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError | ExpressionError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("deepsic-codec")
    except PackageNotFoundError:  # a checkout that is not installed
        release = "(not installed)"
    parser = argparse.ArgumentParser(
        prog="deepsic", description="Store imagery in Zarr as learned features with their labels in front."
    )
    parser.add_argument("--version", action="version", version=f"deepsic {release}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    return parser


def _quality(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 100, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
