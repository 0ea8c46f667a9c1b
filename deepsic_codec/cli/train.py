"""Arguments of ``deepsic train``; torch is imported only when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.training.settings import PRESETS, Settings, resolve

if TYPE_CHECKING:
    from deepsic_codec.model.file import ModelInfo

#: What help says of the settings that most users need; the others are named for what they are.
HELP = {
    "images": "unlabelled images: folders, zip files, image files or Zarr arrays of uint8",
    "labels": "labelled images: folders or zip files with <Class>/<image> inside, or CSV files of file,label",
    "label_root": "folder or zip file that names in a CSV are relative to (default: the CSV's folder)",
    "out": "the model file; its stem is the model's name",
    "run": "folder for checkpoints and log (default: runs/<name>)",
    "start": "run's folder, or name or file of a model, whose networks to begin with; smaller ones grow",
    "architecture": "base, tiny, or paper-0.25, paper-0.5, paper-1.0, paper-1.5",
    "minutes": "for the joint phase; each phase ends by its minutes or its steps",
    "encoder_minutes": "with --from: train the analysis transform too, for the decoder as it is",
    "quality_low": "lowest quality that is trained; equal to the highest: a model for one rate",
    "device": "auto, cpu, cuda or cuda:<n>",
    "data_device": "where decoded images lie: auto, cpu or cuda",
    "optimiser": "soap, or adam, which needs more steps for the same",
    "graphs": "record steps of the joint loss as CUDA graphs (CUDA only)",
    "compile": "compile the transforms (CUDA only; goes on without where it fails)",
    "processes": "on a CPU: processes of one thread that share out each step's images; as many as there are cores",
    "plot": "draw log.png at every checkpoint",
}


def add_train(parser: argparse.ArgumentParser) -> None:
    """Every field of Settings is an option; only those that are given reach :func:`run`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples and what was measured: docs/training.md"
    parser.add_argument("--preset", choices=list(PRESETS), default="", help="named settings that others override")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, with its settings")
    text = "name or file of a model whose decoder stays: trains its labels (--labels), its encoder, or both"
    parser.add_argument("--from", dest="base", metavar="MODEL", default=argparse.SUPPRESS, help=text)
    parser.add_argument(
        "--parents",
        metavar="JSON",
        default=argparse.SUPPRESS,
        type=_parents,
        help='broader names, such as {"Water": ["River", "SeaLake"]}, or a file of that',
    )
    text = "print what the model file holds and the last held-out figures as JSON; progress goes to standard error"
    parser.add_argument("--json", action="store_true", help=text)
    for f in fields(Settings):
        if f.name in ("base", "parents"):
            continue
        default: Any = f.default if f.default is not MISSING else []
        option = "--" + f.name.replace("_", "-")
        help_ = HELP.get(f.name, "") + ("" if default in ("", [], False) else f" (default: {default})")
        if isinstance(default, list):
            parser.add_argument(option, nargs="+", default=argparse.SUPPRESS, help=help_, metavar="PATH")
        elif isinstance(default, bool):
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=HELP.get(f.name, "")
            )
        else:
            kind = type(default)
            parser.add_argument(
                option,
                type=kind,
                default=argparse.SUPPRESS,
                help=help_.strip(),
                metavar={int: "N", float: "X", str: "TEXT"}[kind],
            )


def run_train(args: argparse.Namespace) -> None:
    """Train; raises ConfigurationError for what cannot be trained with."""
    names = {f.name for f in fields(Settings)}
    settings = resolve({k: v for k, v in vars(args).items() if k in names}, args.preset, args.resume)
    from rich.console import Console

    from deepsic_codec.training.progress import Log
    from deepsic_codec.training.train import train

    info = train(
        settings, args.resume, Console(stderr=True, width=None if sys.stderr.isatty() else 200) if args.json else None
    )
    if args.json:
        rows = Log(settings.folder).last_held_out()
        print(json.dumps(summary(info, rows)))


def summary(info: ModelInfo, held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model file holds and the last measures on held-out images, in JSON types."""
    figures = [
        {k: v if k == "phase" else int(v) if k == "step" else float(v) for k, v in row.items() if v not in (None, "")}
        for row in held_out
    ]
    return {
        "model": info.name,
        "file": info.path,
        "nbytes": Path(info.path).stat().st_size,
        "decoder": info.decoder,
        "head": info.head,
        "encoder": info.encoder,
        "vocabulary": info.vocabulary.to_json(),
        "architecture": info.architecture,
        "held_out": figures,
    }


def _parents(text: str) -> dict[str, list[str]]:
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
        return {str(k): [str(c) for c in v] for k, v in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"expected JSON of names and lists, got {text!r} ({error})") from None
