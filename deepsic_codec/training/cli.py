"""Arguments of ``deepsic train``; torch is imported only when it runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from deepsic_codec.training.settings import PRESETS, Settings, resolve

#: What help says of the settings that most users need; the others are named for what they are.
HELP = {
    "images": "unlabelled images: folders, zip files, image files or Zarr arrays of uint8",
    "labels": "labelled images: folders or zip files with <Class>/<image> inside, or CSV files of file,label",
    "label_root": "folder or zip file that names in a CSV are relative to (default: the CSV's folder)",
    "out": "the model file; its stem is the model's name",
    "run": "folder for checkpoints and log (default: runs/<name>)",
    "start": "folder of a run whose networks to begin with",
    "architecture": "base, tiny, or paper-0.25, paper-0.5, paper-1.0, paper-1.5",
    "minutes": "for the joint phase; each phase ends by its minutes or its steps",
    "quality_low": "lowest quality that is trained; equal to the highest: a model for one rate",
    "device": "auto, cpu, cuda or cuda:<n>",
    "data_device": "where decoded images lie: auto, cpu or cuda",
    "compile": "compile the transforms (CUDA only; goes on without where it fails)",
    "plot": "draw log.png at every checkpoint",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of Settings is an option; only those that are given reach :func:`run`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples and what was measured: docs/training.md"
    parser.add_argument("--preset", choices=list(PRESETS), default="", help="named settings that others override")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, with its settings")
    parser.add_argument("--from", dest="base", metavar="MODEL", default=argparse.SUPPRESS,
                        help="name or file of a model whose semantic head alone is trained")  # fmt: skip
    parser.add_argument("--parents", metavar="JSON", default=argparse.SUPPRESS, type=_parents,
                        help='broader names, such as {"Water": ["River", "SeaLake"]}, or a file of that')  # fmt: skip
    for f in fields(Settings):
        if f.name in ("base", "parents"):
            continue
        default: Any = f.default if f.default is not MISSING else []
        option = "--" + f.name.replace("_", "-")
        help_ = HELP.get(f.name, "") + ("" if default in ("", [], False) else f" (default: {default})")
        if isinstance(default, list):
            parser.add_argument(option, nargs="+", default=argparse.SUPPRESS, help=help_, metavar="PATH")
        elif isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                                help=HELP.get(f.name, ""))  # fmt: skip
        else:
            kind = type(default)
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=help_.strip(),
                                metavar={int: "N", float: "X", str: "TEXT"}[kind])  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Train; raises ConfigurationError for what cannot be trained with."""
    names = {f.name for f in fields(Settings)}
    settings = resolve({k: v for k, v in vars(args).items() if k in names}, args.preset, args.resume)
    from deepsic_codec.training.train import train

    train(settings, args.resume)


def _parents(text: str) -> dict[str, list[str]]:
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
        return {str(k): [str(c) for c in v] for k, v in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"expected JSON of names and lists, got {text!r} ({error})") from None
