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
from typing import Any

import deepsic_codec
from deepsic_codec.cli.console import printable_lines, printable_warnings, say, silent
from deepsic_codec.cli.options import Parser, option_names, with_options
from deepsic_codec.errors import ConfigurationError, DeepSICError, ExpressionError


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes
    ----------
    module : str
        Module in `deepsic_codec.cli` with `add_<name>(parser)`, which declares the arguments, and `run_<name>(args)`,
        which may return an exit status. Hyphens of the name are underscores there.
    help : str
        Line in the help of `deepsic`.
    examples : tuple of str
        Command lines for the end of its help.
    """

    module: str
    help: str
    examples: tuple[str, ...]


COMMANDS = {
    "demo": Command(
        "demo",
        "store three real images, read them back, show the savings and the labels",
        ("deepsic demo", "deepsic demo --quality 80 -o demo-80"),
    ),
    "ingest": Command(
        "ingest",
        "store images, mosaics or Zarr arrays in an archive",
        (
            "deepsic ingest photos/ archive.zarr --quality 60",
            "deepsic ingest scene.tif scene.zarr --rmse 15 --nodata 0 --semantics none",
            "deepsic ingest classes.tif scene.zarr --max-error 0",
            "deepsic ingest scene.tif s3://bucket/scene.zarr --dry-run",
        ),
    ),
    "info": Command(
        "inspect", "describe an archive", ("deepsic info archive.zarr --name image", "deepsic info --system")
    ),
    "preview": Command(
        "inspect",
        "draw a small picture of an array",
        (
            "deepsic preview archive.zarr -o small.png",
            "deepsic preview scene.zarr --bands 3,2,1",
            "deepsic preview archive.zarr --where 'River > 0.6'",
        ),
    ),
    "compare": Command(
        "compare",
        "compare DeepSIC with other codecs on your images, at equal bytes",
        (
            "deepsic compare scene.tif",
            "deepsic compare dem.tif --max-error 0.25 --nodata -9999",
            "deepsic compare photo.png --quality 40 --no-curve -o compared",
        ),
    ),
    "export": Command(
        "inspect",
        "copy an array to plain Zarr, TIFF or PNG",
        (
            "deepsic export archive.zarr plain.zarr",
            "deepsic export archive.zarr part.tif --region y=0:512 x=256:768",
            "deepsic export archive.zarr water.zarr --where 'Water > 0.5' --crop",
        ),
    ),
    "index": Command("labels", "write or refresh the label index of an archive", ("deepsic index archive.zarr",)),
    "labels": Command(
        "labels",
        "count the classes in an archive, or map one",
        ("deepsic labels archive.zarr", "deepsic labels archive.zarr --map Forest -o forest.png"),
    ),
    "query": Command(
        "labels",
        "find the chunks whose labels satisfy an expression",
        (
            "deepsic query archive.zarr 'Forest > 0.6 & ~Water'",
            "deepsic query archive.zarr 'River > 0.5' --tiles --json",
            "deepsic query archive.zarr 'River > 0.5' -o rivers --as tiff",
            "deepsic query archive.zarr 'River > 0.5' --tiles --geojson rivers.geojson",
        ),
    ),
    "changes": Command(
        "labels",
        "find the label tiles that showed one thing and then another",
        (
            "deepsic changes series.zarr Forest '~Forest & ~unknown'",
            "deepsic changes series.zarr Forest BuiltUp --between 2019 2024 --geojson built.geojson",
        ),
    ),
    "similar": Command(
        "labels",
        "find the label tiles that look like a chunk, a region or a picture",
        (
            "deepsic similar archive.zarr --chunk 0.3.0",
            "deepsic similar archive.zarr --region y=0:64 x=128:192 -k 50 --where '~Water'",
            "deepsic similar archive.zarr --image example.jpg --geojson similar.geojson",
        ),
    ),
    "learn": Command(
        "labels",
        "learn a label from a few examples",
        (
            "deepsic learn archive.zarr 'solar farm' --like 0.3.0 2.7.0 y=0:64,x=128:192 --unlike 5.5.0",
            "deepsic learn archive.zarr 'solar farm' --forget",
        ),
    ),
    "suggest": Command(
        "labels",
        "find the label tiles of which a learned label is least sure",
        ("deepsic suggest archive.zarr 'solar farm' -k 10",),
    ),
    "train": Command(
        "train",
        "train a model, or adapt the labels of one",
        (
            "deepsic train --images photos/ --preset smoke -o small.safetensors",
            "deepsic train --from base --labels tiles/ -o mine.safetensors",
        ),
    ),
    "train-head": Command(
        "train",
        "train a head of its own: classes of several data sets and embeddings, for the decoder of a model",
        ("deepsic train-head --labels eurosat.zip scenes.zip --others photos.zip -o mine.safetensors",),
    ),
    "evaluate": Command(
        "evaluate",
        "measure a model on images, from real payloads",
        ("deepsic evaluate photos/ --qualities 30 60", "deepsic evaluate tiles/ --model mine.safetensors --labelled"),
    ),
    "export-model": Command(
        "export_model",
        "write the networks of a model as ONNX",
        ("deepsic export-model base --onnx base-onnx",),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (argparse itself exits with 2 on misuse)."""
    argv = sys.argv[1:] if argv is None else argv
    # Only the module of the chosen command is imported, so that `deepsic --help` is quick.
    parser = build_parser([name for name in argv if name in COMMANDS][:1])
    args = parser.parse_args(argv)

    def warning(text: str) -> str:
        return f"deepsic {args.command}: warning: {with_options(text, args.options)}"

    try:
        with (
            printable_warnings(warning),
            silent(args.quiet and not getattr(args, "json", False), progress=not args.quiet),
        ):
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
        if isinstance(error, OSError) and not isinstance(error, DeepSICError) and error.filename:
            text = f"{error.filename}: {(error.strerror or text).lower()}"  # no number, and what it is about in front
        if isinstance(error, ExpressionError) and text.endswith("^"):  # below the position in the expression
            text, *pointer = text.rsplit("\n", 2)
        text = with_options(" ".join(text.split()), args.options)
        say(f"deepsic {args.command}: error: {text or type(error).__name__}", error=True)
        for line in filter(None, pointer):
            say(line, error=True)
        return 2 if isinstance(error, ConfigurationError | ExpressionError) else 1
    return status or 0


def _print_exception(*args: Any) -> None:
    sys.stderr.write(printable_lines("".join(traceback.format_exception(*args))))


def build_parser(commands: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the arguments of these commands only."""
    parser = Parser(prog="deepsic", description="Store imagery in Zarr as learned features with their labels in front.")
    parser.add_argument("--version", action="version", version=f"deepsic {deepsic_codec.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        examples = "\n".join(("examples:", *(f"  {line}" for line in command.examples)))
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in commands:
            _function("add", name)(subparser)
            text = "print neither results, unless --json asks for them, nor progress; errors and warnings stay"
            subparser.add_argument("-q", "--quiet", action="store_true", help=text)
            subparser.set_defaults(options=option_names(subparser))
    return parser


def _function(action: str, command: str) -> Any:
    return getattr(
        import_module(f"deepsic_codec.cli.{COMMANDS[command].module}"), f"{action}_{command.replace('-', '_')}"
    )


if __name__ == "__main__":
    sys.exit(main())
