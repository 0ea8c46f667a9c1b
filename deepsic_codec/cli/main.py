"""The command `deepsic`.

Exit status: 0 for success, 1 for a failure (one line on standard error), 2 for misuse, 3 if parts of the sources were
left out, 130 after an interrupt.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deepsic_codec.cli.console import printable_lines, printable_warnings, say
from deepsic_codec.errors import ConfigurationError, ExpressionError


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes
    ----------
    module : str
        Module in `deepsic_codec.cli` with `add_<name>(parser)`, which declares the arguments, and `run_<name>(args)`,
        which may return an exit status.
    help : str
        Line in the help of `deepsic`.
    """

    module: str
    help: str


COMMANDS = {
    "demo": Command("demo", "store two real images, read them back, show the savings and the labels"),
    "ingest": Command("ingest", "store images, mosaics or Zarr arrays in an archive"),
    "info": Command("inspect", "describe an archive"),
    "preview": Command("inspect", "draw a small picture of an array"),
    "compare": Command("compare", "compare DeepSIC with other codecs on your images, at equal bytes"),
    "export": Command("inspect", "copy an array to plain Zarr, TIFF or PNG"),
    "index": Command("labels", "write or refresh the label index of an archive"),
    "labels": Command("labels", "count the classes in an archive, or map one"),
    "query": Command("labels", "find the chunks whose labels satisfy an expression"),
    "train": Command("train", "train a model, or adapt the labels of one"),
    "evaluate": Command("evaluate", "measure a model on images, from real payloads"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (argparse itself exits with 2 on misuse)."""
    argv = sys.argv[1:] if argv is None else argv
    # Only the module of the chosen command is imported, so that `deepsic --help` is quick.
    args = build_parser([name for name in argv if name in COMMANDS][:1]).parse_args(argv)
    try:
        with printable_warnings():
            status: int | None = _function("run", args.command)(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has ended, as in `deepsic query ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            sys.excepthook = _print_exception
            raise
        text, pointer = str(error), []
        if isinstance(error, ExpressionError) and text.endswith("^"):  # below the position in the expression
            text, *pointer = text.rsplit("\n", 2)
        text = " ".join(text.split())
        say(f"deepsic {args.command}: error: {text or type(error).__name__}", error=True)
        for line in filter(None, pointer):
            say(line, error=True)
        return 2 if isinstance(error, ConfigurationError | ExpressionError) else 1
    return status or 0


def _print_exception(*args: Any) -> None:
    sys.stderr.write(printable_lines("".join(traceback.format_exception(*args))))


def build_parser(commands: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the arguments of these commands only."""
    try:
        release = version("deepsic-codec")
    except PackageNotFoundError:  # a checkout that is not installed
        release = "(not installed)"
    parser = argparse.ArgumentParser(
        prog="deepsic", description="Store imagery in Zarr as learned features with their labels in front."
    )
    parser.add_argument("--version", action="version", version=f"deepsic {release}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if name in commands:
            _function("add", name)(subparser)
    return parser


def _function(action: str, command: str) -> Any:
    return getattr(import_module(f"deepsic_codec.cli.{COMMANDS[command].module}"), f"{action}_{command}")


if __name__ == "__main__":
    sys.exit(main())
